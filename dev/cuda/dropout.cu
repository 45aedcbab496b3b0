// Dropout: the elements that it drops must be those that the CPU twin drops, every one. Checked
// against that twin, and timed.
#include "bench.cuh"

// ==== check ======================================================================================

template <class Real>
static Numbers twin_forward(const Numbers& inp, const Dropout& dropout, int B, int T, int C) {
    std::vector<Real> out(inp.size());
    dropout_forward(out.data(), as<Real>(inp).data(), dropout, B, T, C);
    return wide(out);
}

static Numbers zeros_of(Numbers values) {
    for (double& value : values) value = value == 0 ? 1 : 0;
    return values;
}

template <class Float>
static void check_forward(const Dropout& dropout, int B, int T, int C) {
    checks.label =
        format("dropout_forward %s B=%d T=%d C=%d p=%g first %llu", type_name<Float>(), B, T, C,
               dropout.probability, static_cast<unsigned long long>(dropout.first_sequence));
    // No input is 0, so that a 0 is one that was dropped.
    Numbers inp = random_numbers<Float>(size_t(B) * T * C, 1, 1, 2);
    Device<Float> out(inp.size()), device_inp(inp);
    dropout_forward<Float>(out, device_inp, dropout, B, T, C, stream());
    Numbers got = out.download(), reference = twin_forward<double>(inp, dropout, B, T, C);
    expect_equal("what is dropped", zeros_of(got), zeros_of(reference));
    expect_close<Float>("out", got, reference, twin_forward<float>(inp, dropout, B, T, C));
    dropout_forward<Float>(device_inp, device_inp, dropout, B, T, C, stream());
    expect_equal("out over inp", device_inp.download(), got);
}

template <class Float>
static void check_type() {
    struct Shape {
        int B, T, C;
    };
    uint64_t seed = 0xfedcba9876543210ull;
    for (Shape shape : {Shape{3, 17, 48}, {3, 65, 64}, {3, 129, 20}, {1, 64, 33}, {2, 3, 768}}) {
        auto [B, T, C] = shape;
        check_forward<Float>({0.2, seed, 12, 0, RandomUse::encoder, 0}, B, T, C);
        check_forward<Float>({0.9, seed, 0, 4, RandomUse::attention_projection, 11}, B, T, C);
        check_forward<Float>({0, seed, 1, 0, RandomUse::encoder, 0}, B, T, C);
    }
    // A sequence's number and the step use their lower 32 bits.
    check_forward<Float>(
        {0.5, 1, (1ull << 32) + 7, (1ull << 32) - 1, RandomUse::mlp_projection, 47}, 3, 17, 48);
    // An element whose word of Philox is the threshold itself stays.
    for (uint32_t word : philox(seed, 0, 0, random_stream(RandomUse::encoder, 0), 12).word)
        check_forward<Float>({word / 4294967296.0, seed, 12, 0, RandomUse::encoder, 0}, 3, 17, 48);
}

static void run_checks() {
    check_type<float>();
    check_type<bf16>();
}

// ==== bench ======================================================================================

template <class Float>
static void bench_type(const BenchModel& model) {
    int C = model.C, T = model.T, B = std::max(1, bench_options.tokens / T);
    Device<Float> out(size_t(B) * T * C), inp(out.size());
    fill_random(inp, 1);
    Dropout dropout = {0.1, 1, 1, 0, RandomUse::encoder, 0};
    double ms = time_ms([&] { dropout_forward<Float>(out, inp, dropout, B, T, C, stream()); });
    table_bytes("dropout_forward", type_name<Float>(), format("%s, B=%d, T=%d", model.name, B, T),
                2. * sizeof(Float) * double(inp.size()), ms);
}

static void run_bench() {
    for (const BenchModel& model : bench_models()) {
        bench_type<bf16>(model);
        bench_type<float>(model);
    }
}

int main(int argc, char** argv) { return bench_main(argc, argv, run_checks, run_bench); }
