// GELU and its gradient: checked against the CPU twin, and timed.
#include "bench.cuh"

// ==== check ======================================================================================

template <class Real>
static Numbers twin_forward(const Numbers& inp) {
    std::vector<Real> out(inp.size());
    gelu_forward(out.data(), as<Real>(inp).data(), inp.size());
    return wide(out);
}

template <class Real>
static Numbers twin_backward(const Numbers& dout, const Numbers& inp) {
    std::vector<Real> dinp(inp.size());
    gelu_backward(dinp.data(), as<Real>(dout).data(), as<Real>(inp).data(), inp.size());
    return wide(dinp);
}

// Over [-spread, spread): a large one reaches where exp() would overflow.
template <class Float>
static void check_gelu(size_t N, double spread) {
    checks.label = format("gelu %s N=%zu up to %g", type_name<Float>(), N, spread);
    Numbers inp = random_numbers<Float>(N, 1, spread), dout = random_numbers<Float>(N, 2);
    Device<Float> out(N), dinp(N), device_inp(inp), device_dout(dout);
    gelu_forward<Float>(out, device_inp, N, stream());
    expect_close<Float>("out", out.download(), twin_forward<double>(inp), twin_forward<float>(inp));
    gelu_backward<Float>(dinp, device_dout, device_inp, N, stream());
    Numbers got = dinp.download();
    expect_close<Float>("dinp", got, twin_backward<double>(dout, inp),
                        twin_backward<float>(dout, inp));
    gelu_backward<Float>(device_dout, device_dout, device_inp, N, stream());
    expect_equal("dinp over dout", device_dout.download(), got);
}

static void run_checks() {
    for (size_t N : {1u, 7u, 8u, 51u * 192, 17u * 131, 65u * 256}) {
        for (double spread : {1., 6., 200.}) {
            check_gelu<float>(N, spread);
            check_gelu<bf16>(N, spread);
        }
    }
}

// ==== bench ======================================================================================

template <class Float>
static void bench_type(const BenchModel& model) {
    size_t N = size_t(bench_options.tokens) * 4 * size_t(model.C);
    double numbers = sizeof(Float) * double(N);
    std::string size = format("%s, %d x %d", model.name, bench_options.tokens, 4 * model.C);
    Device<Float> out(N), inp(N), dinp(N);
    fill_random(inp, 1), fill_random(out, 2);
    double ms = time_ms([&] { gelu_forward<Float>(dinp, inp, N, stream()); });
    table_bytes("gelu_forward", type_name<Float>(), size, 2 * numbers, ms);
    ms = time_ms([&] { gelu_backward<Float>(dinp, out, inp, N, stream()); });
    table_bytes("gelu_backward", type_name<Float>(), size, 3 * numbers, ms);
}

// The same kernel in blocks of other sizes; kPackThreads should be the best of them.
static void bench_blocks(const BenchModel& model) {
    constexpr int Width = kWide<bf16>;
    size_t N = size_t(bench_options.tokens) * 4 * size_t(model.C);
    Device<bf16> out(N), inp(N);
    fill_random(inp, 1);
    for (int threads : {64, 128, 256, 512, 1024}) {
        double ms = time_ms([&] {
            launch("gelu_forward", gelu_forward_kernel<bf16, Width>,
                   pack_blocks<bf16, Width>(N, threads), unsigned(threads), 0, stream(),
                   static_cast<bf16*>(out), static_cast<const bf16*>(inp), N);
        });
        table_bytes(format("gelu_forward, blocks of %d", threads), "bf16", model.name,
                    4. * double(N), ms);
    }
}

static void run_bench() {
    for (const BenchModel& model : bench_models()) {
        bench_type<bf16>(model);
        bench_type<float>(model);
    }
    bench_blocks(bench_models()[0]);
}

int main(int argc, char** argv) { return bench_main(argc, argv, run_checks, run_bench); }
