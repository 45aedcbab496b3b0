// The norm of all gradients: checked against the CPU twin, and timed.
#include "bench.cuh"

// ==== check ======================================================================================

static void kernel_squares(double* squares, double* scratch, const float* gradients, size_t N) {
    int blocks = global_norm_part(scratch, gradients, N, stream());
    global_norm(squares, scratch, blocks, stream());
}

static double kernel_norm(const Numbers& gradients) {
    Device<double> squares(1), scratch{size_t(kNormBlocks)};
    kernel_squares(squares, scratch, Device<float>(gradients), gradients.size());
    return std::sqrt(squares.copy_out()[0]);
}

// Both twins sum in double. In another order, N terms of one sign may differ by N units in the last
// place of a double at most: that is the floor.
static void check_norm(size_t N, double spread) {
    checks.label = format("global_norm N=%zu up to %g", N, spread);
    Numbers gradients = random_numbers<float>(N, 1, spread);
    double norm = kernel_norm(gradients), reference = global_norm(gradients.data(), N);
    double twin = global_norm(as<float>(gradients).data(), N);
    double floor = double(N) * 0x1p-53 * reference;
    bool good = std::fabs(norm - reference) <= 2 * std::fabs(twin - reference) + floor;
    checks.count(good, format("%.17g for %.17g", norm, reference));
    expect_equal("a second time", {kernel_norm(gradients)}, {norm});
}

static void run_checks() {
    for (size_t rows : {1u, 3u, 8u, 33u, 260u, 2051u}) check_norm(rows * kRowAlignment, 1);
    check_norm(8 * kRowAlignment, 1e25);  // squares that float does not hold
    check_norm(8 * kRowAlignment, 1e-25);
    Numbers gradients = random_numbers<float>(8 * kRowAlignment, 1);
    for (double wrong : {double(NAN), double(INFINITY)}) {
        checks.label = format("global_norm of %g", wrong);
        gradients[777] = wrong;
        checks.count(!std::isfinite(kernel_norm(gradients)), "the norm is finite");
    }
}

// ==== bench ======================================================================================

static void run_bench() {
    for (size_t millions : {124u, 1558u}) {
        size_t N = bench_options.tiny ? millions * kRowAlignment : millions * 1000000;
        Device<float> gradients(N);
        Device<double> squares(1), scratch{size_t(kNormBlocks)};
        fill_random(gradients, 1);
        double ms = time_ms([&] { kernel_squares(squares, scratch, gradients, N); });
        table_bytes("global_norm", "fp32", format("%zuM", millions), 4. * double(N), ms);
    }
}

int main(int argc, char** argv) { return bench_main(argc, argv, run_checks, run_bench); }
