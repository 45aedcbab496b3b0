// AdamW with decay, clipping, float32 master weights and their bf16 copy: checked against the CPU
// twin, and timed.
#include "bench.cuh"

// ==== check ======================================================================================

struct AdamWState {
    Numbers params, m, v;
};

template <class Real>
static AdamWState twin_update(const AdamWState& before, const Numbers& grads, const AdamW& adamw,
                              double weight_decay, double grad_scale) {
    std::vector<Real> params = as<Real>(before.params), m = as<Real>(before.m),
                      v = as<Real>(before.v);
    adamw_update(params.data(), m.data(), v.data(), as<Real>(grads).data(), grads.size(), adamw,
                 weight_decay, grad_scale);
    return {wide(params), wide(m), wide(v)};
}

// What the kernel is told on the device: how to scale the gradients, and whether to change
// anything.
static std::vector<UpdateGate> gate_of(double grad_scale, bool apply) {
    UpdateGate gate = {};
    gate.grad_scale = float(grad_scale);
    gate.apply = apply ? 1 : 0;
    return {gate};
}

template <class Float>
static void check_update(size_t N, double weight_decay, double grad_scale, uint64_t step) {
    checks.label = format("adamw_update %s N=%zu decay %g scale %g step %llu", type_name<Float>(),
                          N, weight_decay, grad_scale, static_cast<unsigned long long>(step));
    bool has_copy = sizeof(Float) == 2;
    AdamW adamw;
    adamw.step = step;
    AdamWState before = {random_numbers<float>(N, 1, 0.1), random_numbers<float>(N, 2, 0.01),
                         random_numbers<float>(N, 3, 0.001, 0.001)};
    Numbers grads = random_numbers<float>(N, 4);
    Numbers copy = random_numbers<bf16>(has_copy ? N : 0, 5);
    Device<float> params(before.params), m(before.m), v(before.v), device_grads(grads);
    Device<Float> narrow(copy);
    adamw_update<Float>(params, narrow, m, v, device_grads, N, adamw, weight_decay,
                        Device<UpdateGate>(gate_of(grad_scale, false)), stream());
    expect_equal("params, not to be changed", params.download(), before.params);
    expect_equal("m, not to be changed", m.download(), before.m);
    expect_equal("v, not to be changed", v.download(), before.v);
    expect_equal("the copy, not to be changed", narrow.download(), copy);

    adamw_update<Float>(params, narrow, m, v, device_grads, N, adamw, weight_decay,
                        Device<UpdateGate>(gate_of(grad_scale, true)), stream());
    auto reference = twin_update<double>(before, grads, adamw, weight_decay, grad_scale);
    auto twin = twin_update<float>(before, grads, adamw, weight_decay, grad_scale);
    Numbers master = params.download();
    expect_close<float>("params", master, reference.params, twin.params);
    expect_close<float>("m", m.download(), reference.m, twin.m);
    expect_close<float>("v", v.download(), reference.v, twin.v);
    if (has_copy) expect_equal("the copy", narrow.download(), rounded<Float>(master));
}

// What no gradient has reached yet, as the padding of a vocabulary: 0 / (0 + epsilon) moves
// nothing.
template <class Float>
static void check_untouched() {
    checks.label = format("adamw_update %s of zeros", type_name<Float>());
    size_t N = kRowAlignment;
    Numbers before = random_numbers<float>(N, 1, 0.1), zeros(N, 0);
    AdamW adamw;
    adamw.step = 1;
    Device<float> params(before), m(zeros), v(zeros), grads(zeros);
    Device<Float> narrow(random_numbers<bf16>(sizeof(Float) == 2 ? N : 0, 5));
    adamw_update<Float>(params, narrow, m, v, grads, N, adamw, 0,
                        Device<UpdateGate>(gate_of(1, true)), stream());
    expect_equal("params", params.download(), before);
    expect_equal("m", m.download(), zeros);
    expect_equal("v", v.download(), zeros);
}

// Gradients shrink to the norm that clipping allows and never grow; nothing is applied where the
// norm or the loss is not a number.
static void check_gate(double loss, double norm, double grad_clip, bool apply, double scale) {
    checks.label = format("update_gate loss %g norm %g clip %g", loss, norm, grad_clip);
    UpdateGate before = {};
    before.loss = loss, before.squares = norm * norm;
    Device<UpdateGate> gate(std::vector<UpdateGate>{before});
    launch("update_gate", update_gate_kernel, 1u, 1u, 0, stream(), static_cast<UpdateGate*>(gate),
           grad_clip);
    UpdateGate after = gate.copy_out()[0];
    expect_equal("whether to apply", {double(after.apply)}, {apply ? 1. : 0.});
    if (std::isfinite(norm)) expect_equal("norm", {after.norm}, {std::sqrt(norm * norm)});
    if (apply) expect_equal("scale", {double(after.grad_scale)}, {double(float(scale))});
}

static void run_checks() {
    check_gate(3, 4, 1, true, 1 / (4 + 1e-6));
    check_gate(3, 0.5, 1, true, 1);
    check_gate(3, 0, 1, true, 1);
    check_gate(3, 4, 0, true, 1);
    for (double bad : {double(NAN), double(INFINITY)}) {
        check_gate(bad, 4, 1, false, 0);
        check_gate(3, bad, 1, false, 0);
    }
    check_untouched<float>();
    check_untouched<bf16>();
    for (size_t rows : {1u, 3u, 16u, 157u}) {
        size_t N = rows * kRowAlignment;
        for (double weight_decay : {0., 0.1}) {
            check_update<float>(N, weight_decay, 1, 1);
            check_update<bf16>(N, weight_decay, 0.25, 1000);
        }
    }
}

// ==== bench ======================================================================================

template <class Float>
static void bench_type(size_t millions) {
    size_t N = bench_options.tiny ? millions * kRowAlignment : millions * 1000000;
    Device<float> params(N), m(N), v(N), grads(N);
    Device<Float> narrow(sizeof(Float) == 2 ? N : 0);
    fill_random(params, 1), fill_random(m, 2), fill_random(grads, 3);
    check(cudaMemsetAsync(v, 0, N * sizeof(float), stream()), "second moments");
    AdamW adamw;
    Device<UpdateGate> gate(gate_of(1, true));
    double ms = time_ms(
        [&] { adamw_update<Float>(params, narrow, m, v, grads, N, adamw, 0.1, gate, stream()); });
    table_bytes("adamw_update", type_name<Float>(), format("%zuM", millions),
                (sizeof(Float) == 2 ? 30. : 28.) * double(N), ms);
}

// The same kernel in blocks of other sizes, with and without hints that what it moves is not
// needed again soon; kPackThreads and the choice in adamw_update should be the best of them.
static void bench_blocks() {
    size_t N = bench_options.tiny ? kRowAlignment : size_t(124) * 1000000;
    Device<float> params(N), m(N), v(N), grads(N);
    Device<bf16> narrow(N);
    Device<UpdateGate> gate(gate_of(1, true));
    fill_random(params, 1), fill_random(m, 2), fill_random(grads, 3);
    check(cudaMemsetAsync(v, 0, N * sizeof(float), stream()), "second moments");
    AdamWFactors factors = {0.9f, 0.1f, 0.95f, 0.05f, 1.f, 1e-3f, 1.f, 1e-8f};
    for (int threads : {64, 128, 256, 512, 1024}) {
        double ms = time_ms([&] {
            launch("adamw_update", adamw_update_kernel<bf16>,
                   pack_blocks<float, kWide<float>>(N, threads), unsigned(threads), 0, stream(),
                   static_cast<float*>(params), static_cast<bf16*>(narrow), static_cast<float*>(m),
                   static_cast<float*>(v), static_cast<const float*>(grads), N, factors,
                   static_cast<const UpdateGate*>(gate));
        });
        table_bytes(format("adamw_update, blocks of %d", threads), "bf16", "124M", 30. * double(N),
                    ms);
    }
}

static void run_bench() {
    for (size_t millions : {124u, 1558u}) {
        bench_type<bf16>(millions);
        bench_type<float>(millions);
    }
    bench_blocks();
}

int main(int argc, char** argv) { return bench_main(argc, argv, run_checks, run_bench); }
