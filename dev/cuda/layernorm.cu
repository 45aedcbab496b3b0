// Layer norm, alone and of a residual sum with dropout, and its gradient: checked against the CPU
// twin, and timed.
#include "bench.cuh"

// ==== check ======================================================================================

constexpr double kEpsilon = 1e-5;

struct RowShape {
    int B, T, C;
};

struct LayerNormInputs {
    Numbers inp, branch, weight, bias;
};

// Rows whose mean is not near 0, so that a variance taken in one pass would lose digits.
template <class Float>
static LayerNormInputs inputs_of(const RowShape& shape, bool bias) {
    size_t C = size_t(shape.C), N = size_t(shape.B) * size_t(shape.T) * C;
    return {random_numbers<Float>(N, 1, 1, 3), random_numbers<Float>(N, 2),
            random_numbers<Float>(C, 3, 1, 1), random_numbers<Float>(bias ? C : 0, 4)};
}

static Dropout dropout_of(double probability) {
    return {probability, 0x123456789abcull, 77, 5, RandomUse::mlp_projection, 3};
}

template <class Real>
static std::array<Numbers, 3> twin_forward(const LayerNormInputs& in, int B, int T, int C) {
    std::vector<Real> out(in.inp.size()), mean(size_t(B) * T), rstd(mean), bias = as<Real>(in.bias);
    layernorm_forward(out.data(), mean.data(), rstd.data(), as<Real>(in.inp).data(),
                      as<Real>(in.weight).data(), or_null(bias), kEpsilon, B, T, C);
    return {wide(out), wide(mean), wide(rstd)};
}

template <class Float>
static void check_forward(const RowShape& shape, bool has_bias) {
    auto [B, T, C] = shape;
    checks.label = format("layernorm_forward %s B=%d T=%d C=%d%s", type_name<Float>(), B, T, C,
                          has_bias ? "" : " no bias");
    LayerNormInputs in = inputs_of<Float>(shape, has_bias);
    Device<Float> out(in.inp.size()), inp(in.inp), weight(in.weight), bias(in.bias);
    Device<float> mean(size_t(B) * T), rstd(size_t(B) * T);
    layernorm_forward<Float>(out, mean, rstd, inp, weight, bias, kEpsilon, B, T, C, stream());
    auto reference = twin_forward<double>(in, B, T, C);
    auto twin = twin_forward<float>(in, B, T, C);
    expect_close<Float>("out", out.download(), reference[0], twin[0]);
    expect_close<float>("mean", mean.download(), reference[1], twin[1]);
    expect_close<float>("rstd", rstd.download(), reference[2], twin[2]);
}

template <class Real>
static std::array<Numbers, 4> twin_residual(const LayerNormInputs& in, const Dropout& dropout,
                                            int B, int T, int C) {
    std::vector<Real> residual(in.inp.size()), out(in.inp.size()), mean(size_t(B) * T), rstd(mean),
        bias = as<Real>(in.bias);
    residual_layernorm_forward(residual.data(), out.data(), mean.data(), rstd.data(),
                               as<Real>(in.inp).data(), as<Real>(in.branch).data(),
                               as<Real>(in.weight).data(), or_null(bias), kEpsilon, dropout, B, T,
                               C);
    return {wide(residual), wide(out), wide(mean), wide(rstd)};
}

// The kernel normalises the sum as it stores it, so the norm's twin starts from that sum too: what
// is checked of it is the norm, and of the sum the sum.
template <class Float>
static void check_residual(const RowShape& shape, double probability) {
    auto [B, T, C] = shape;
    checks.label = format("residual_layernorm_forward %s B=%d T=%d C=%d dropout %g",
                          type_name<Float>(), B, T, C, probability);
    LayerNormInputs in = inputs_of<Float>(shape, true);
    Dropout dropout = dropout_of(probability);
    Device<Float> residual(in.inp.size()), out(in.inp.size()), inp(in.inp), branch(in.branch);
    Device<Float> weight(in.weight), bias(in.bias);
    Device<float> mean(size_t(B) * T), rstd(size_t(B) * T);
    residual_layernorm_forward<Float>(residual, out, mean, rstd, inp, branch, weight, bias,
                                      kEpsilon, dropout, B, T, C, stream());
    Numbers sum = residual.download();
    expect_close<Float>("residual", sum, twin_residual<double>(in, dropout, B, T, C)[0],
                        twin_residual<float>(in, dropout, B, T, C)[0]);
    in.inp = sum;
    auto reference = twin_forward<double>(in, B, T, C), twin = twin_forward<float>(in, B, T, C);
    Numbers result = out.download();
    expect_close<Float>("out", result, reference[0], twin[0]);
    expect_close<float>("mean", mean.download(), reference[1], twin[1]);
    expect_close<float>("rstd", rstd.download(), reference[2], twin[2]);

    residual_layernorm_forward<Float>(inp, out, mean, rstd, inp, branch, weight, bias, kEpsilon,
                                      dropout, B, T, C, stream());
    expect_equal("residual over inp", inp.download(), sum);
    expect_equal("out, with residual over inp", out.download(), result);
}

struct LayerNormGradients {
    Numbers dinp, dweight, dbias;  // what is there before, and after
};

template <class Real>
static LayerNormGradients twin_backward(LayerNormGradients d, const Numbers& dout,
                                        const LayerNormInputs& in, const Numbers& mean,
                                        const Numbers& rstd, int B, int T, int C) {
    std::vector<Real> dinp = as<Real>(d.dinp), dweight = as<Real>(d.dweight),
                      dbias = as<Real>(d.dbias), scratch(twin_scratch(C));
    layernorm_backward(dinp.data(), dweight.data(), or_null(dbias), as<Real>(dout).data(),
                       as<Real>(in.inp).data(), as<Real>(in.weight).data(), as<Real>(mean).data(),
                       as<Real>(rstd).data(), scratch.data(), B, T, C);
    return {wide(dinp), wide(dweight), wide(dbias)};
}

template <class Float>
static LayerNormGradients kernel_backward(const LayerNormGradients& d, const Numbers& dout,
                                          const LayerNormInputs& in, const Numbers& mean,
                                          const Numbers& rstd, int B, int T, int C) {
    Device<Float> dinp(d.dinp), device_dout(dout), inp(in.inp), weight(in.weight);
    Device<float> dweight(d.dweight), dbias(d.dbias), device_mean(mean), device_rstd(rstd);
    Device<float> scratch(size_t(2 * kReduceRows) * C);
    layernorm_backward<Float>(dinp, dweight, dbias, device_dout, inp, weight, device_mean,
                              device_rstd, scratch, B, T, C, stream());
    return {dinp.download(), dweight.download(), dbias.download()};
}

template <class Float>
static void check_backward(const RowShape& shape, bool has_bias) {
    auto [B, T, C] = shape;
    checks.label = format("layernorm_backward %s B=%d T=%d C=%d%s", type_name<Float>(), B, T, C,
                          has_bias ? "" : " no bias");
    LayerNormInputs in = inputs_of<Float>(shape, has_bias);
    auto forward = twin_forward<double>(in, B, T, C);
    Numbers mean = rounded<float>(forward[1]), rstd = rounded<float>(forward[2]);
    Numbers dout = random_numbers<Float>(in.inp.size(), 5);
    LayerNormGradients before = {random_numbers<Float>(in.inp.size(), 6),
                                 random_numbers<float>(size_t(C), 7),
                                 random_numbers<float>(in.bias.size(), 8)};
    auto got = kernel_backward<Float>(before, dout, in, mean, rstd, B, T, C);
    auto again = kernel_backward<Float>(before, dout, in, mean, rstd, B, T, C);
    auto reference = twin_backward<double>(before, dout, in, mean, rstd, B, T, C);
    auto twin = twin_backward<float>(before, dout, in, mean, rstd, B, T, C);
    expect_close<Float>("dinp", got.dinp, reference.dinp, twin.dinp);
    expect_close<float>("dweight", got.dweight, reference.dweight, twin.dweight);
    expect_close<float>("dbias", got.dbias, reference.dbias, twin.dbias);
    expect_equal("dinp, a second time", again.dinp, got.dinp);
    expect_equal("dweight, a second time", again.dweight, got.dweight);
    expect_equal("dbias, a second time", again.dbias, got.dbias);
}

template <class Float>
static void check_type() {
    for (RowShape shape : {RowShape{3, 17, 48},
                           {3, 65, 64},
                           {3, 129, 20},
                           {1, 64, 33},
                           {3, 17, 768},
                           {3, 9, 1600},
                           {1, 1, 8}}) {
        check_forward<Float>(shape, true);
        check_residual<Float>(shape, 0);
        check_residual<Float>(shape, 0.2);
        check_backward<Float>(shape, true);
    }
    check_forward<Float>({3, 17, 64}, false);
    check_backward<Float>({3, 17, 64}, false);
}

static void run_checks() {
    check_type<float>();
    check_type<bf16>();
}

// ==== bench ======================================================================================

template <class Float>
static void bench_type(const BenchModel& model) {
    int C = model.C, T = model.T, B = std::max(1, bench_options.tokens / T);
    size_t N = size_t(B) * T * C, rows = size_t(B) * T;
    double numbers = sizeof(Float) * double(N);  // the bytes of one (B,T,C)
    std::string size = format("%s, B=%d, T=%d", model.name, B, T);
    const char* type = type_name<Float>();
    Device<Float> inp(N), branch(N), residual(N), out(N), weight{size_t(C)}, bias{size_t(C)};
    Device<float> mean(rows), rstd(rows), dweight{size_t(C)}, dbias{size_t(C)};
    Device<float> scratch(size_t(2 * kReduceRows) * C);
    fill_random(inp, 1), fill_random(branch, 2), fill_random(weight, 3), fill_random(bias, 4);
    fill_random(dweight, 5), fill_random(dbias, 6);
    double ms = time_ms([&] {
        layernorm_forward<Float>(out, mean, rstd, inp, weight, bias, kEpsilon, B, T, C, stream());
    });
    table_bytes("layernorm_forward", type, size, 2 * numbers + 8 * double(rows), ms);
    for (double probability : {0., 0.1}) {
        ms = time_ms([&] {
            residual_layernorm_forward<Float>(residual, out, mean, rstd, inp, branch, weight, bias,
                                              kEpsilon, dropout_of(probability), B, T, C, stream());
        });
        table_bytes("residual_layernorm_forward", type, size + format(", dropout %g", probability),
                    4 * numbers + 8 * double(rows), ms);
    }
    ms = time_ms([&] {  // dinp is `residual`, dout is `branch`
        layernorm_backward<Float>(residual, dweight, dbias, branch, inp, weight, mean, rstd,
                                  scratch, B, T, C, stream());
    });
    table_bytes("layernorm_backward", type, size, 4 * numbers + 8 * double(rows), ms);
}

// Forward and backward with other columns for a thread, and with other numbers of blocks for each
// multiprocessor, up to what it runs at once. with_columns() and row_blocks() should choose the
// best.
template <int Columns>
static void bench_columns(const BenchModel& model) {
    constexpr int Width = kWide<bf16>;
    int C = model.C, BT = bench_options.tokens;
    dim3 block = row_block(C, Columns);
    if (block.x * block.y > kRowThreads<Width>) return;
    Device<bf16> out(size_t(BT) * C), inp(out.size()), dinp(out.size());
    Device<bf16> weight{size_t(C)}, bias{size_t(C)};
    Device<float> mean{size_t(BT)}, rstd{size_t(BT)}, scratch(size_t(2 * kReduceRows) * C);
    fill_random(inp, 1), fill_random(dinp, 2), fill_random(weight, 3), fill_random(bias, 4);
    auto rows = [&](const char* name, auto kernel, size_t shared, int moved, int most, auto run) {
        int all = resident_blocks(kernel, block, shared) / multiprocessors();
        for (int each = all; each >= divide_up(all, 4); each = divide_up(each, 2)) {
            int blocks = std::min({each * multiprocessors(), divide_up(BT, int(block.y)), most});
            double ms = time_ms([&] { run(unsigned(blocks)); });
            table_bytes(format("%s, %d columns, %d blocks a multiprocessor", name, Columns, each),
                        "bf16", model.name, 2. * moved * double(out.size()) + 8. * BT, ms);
            if (each == 1) break;
        }
    };
    auto forward = layernorm_forward_kernel<bf16, Width, Columns>;
    size_t forward_shared = BlockSum<1>::bytes();
    rows("layernorm_forward", forward, forward_shared, 2, BT, [&](unsigned blocks) {
        launch("layernorm_forward", forward, blocks, block, forward_shared, stream(),
               static_cast<bf16*>(out), static_cast<float*>(mean), static_cast<float*>(rstd),
               static_cast<const bf16*>(inp), static_cast<const bf16*>(weight),
               static_cast<const bf16*>(bias), float(kEpsilon), BT, C);
    });
    auto backward = layernorm_backward_kernel<bf16, Width, Columns>;
    size_t backward_shared = BlockSum<2>::bytes() + block.y * 2 * size_t(C) * sizeof(float);
    rows("layernorm_backward alone", backward, backward_shared, 4, kReduceRows,
         [&](unsigned blocks) {
             launch("layernorm_backward", backward, blocks, block, backward_shared, stream(),
                    static_cast<bf16*>(dinp), static_cast<float*>(scratch), true,
                    static_cast<const bf16*>(out), static_cast<const bf16*>(inp),
                    static_cast<const bf16*>(weight), static_cast<const float*>(mean),
                    static_cast<const float*>(rstd), BT, C);
         });
}

static void run_bench() {
    for (const BenchModel& model : bench_models()) {
        bench_type<bf16>(model);
        bench_type<float>(model);
    }
    for (const BenchModel& model : bench_models()) {
        bench_columns<8>(model);
        bench_columns<16>(model);
        bench_columns<24>(model);
        bench_columns<32>(model);
    }
}

int main(int argc, char** argv) { return bench_main(argc, argv, run_checks, run_bench); }
