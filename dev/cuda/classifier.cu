// The classifier: softmax, loss and the gradient of the logits in one pass, in place. Checked
// against the CPU twin, and timed.
#include "bench.cuh"

// ==== check ======================================================================================

struct ClassifierResult {
    Numbers losses, logits;
};

template <class Real>
static ClassifierResult twin_classifier(const Numbers& logits, const std::vector<int>& targets,
                                        double loss_scale, bool gradient, int V, int Vp) {
    int BT = int(targets.size());
    std::vector<Real> losses(targets.size()), changed = as<Real>(logits);
    classifier_forward(losses.data(), changed.data(), targets.data(), loss_scale, gradient, BT, V,
                       Vp);
    return {wide(losses), wide(changed)};
}

template <class Float>
static void check_classifier(int BT, int V, double spread, bool gradient) {
    int Vp = (V + 127) / 128 * 128;
    checks.label = format("classifier_forward %s BT=%d V=%d up to %g%s", type_name<Float>(), BT, V,
                          spread, gradient ? "" : " loss alone");
    std::vector<int> targets = random_ids(size_t(BT), 1, V);
    for (size_t i = 3; i < targets.size(); i += 5) targets[i] = -1;  // takes no part
    targets[0] = V - 1;
    Numbers logits = random_numbers<Float>(size_t(BT) * Vp, 2, spread);
    for (int bt = 0; bt < BT; bt++)  // the padding may hold anything
        for (int j = V; j < Vp; j++) logits[size_t(bt) * Vp + j] = rounded<Float>(1e30);
    Device<Float> device_logits(logits);
    Device<float> losses{size_t(BT)};
    double loss_scale = 1. / BT;
    classifier_forward<Float>(losses, device_logits, Device<int>(targets), loss_scale, gradient, BT,
                              V, Vp, stream());
    Numbers got = losses.download(), changed = device_logits.download();
    auto reference = twin_classifier<double>(logits, targets, loss_scale, gradient, V, Vp);
    auto twin = twin_classifier<float>(logits, targets, loss_scale, gradient, V, Vp);
    expect_close<float>("losses", got, reference.losses, twin.losses);
    if (gradient) expect_close<Float>("logits", changed, reference.logits, twin.logits);
    else expect_equal("logits, not written", changed, logits);
}

template <class Float>
static void check_type() {
    for (int V : {97, 251, 1031, 128, 1, 2500})
        for (double spread : {1., 20.})
            for (bool gradient : {true, false})
                check_classifier<Float>(V > 1000 ? 17 : 51, V, spread, gradient);
}

// The losses of a batch's parts add up to its mean: in double, so that the order does not show.
static void check_sum(int BT) {
    checks.label = format("add_losses BT=%d", BT);
    Numbers losses = random_numbers<float>(size_t(BT), 1, 1, 4);
    Device<double> loss(std::vector<double>{1.5});
    add_losses(loss, Device<float>(losses), 0.25, BT, stream());
    double expected = 1.5;
    for (double value : losses) expected += 0.25 * value;
    double off = std::fabs(loss.copy_out()[0] - expected), allowed = 1e-14 * expected;
    checks.count(off <= allowed, format("loss: off by %.3g (allowed %.3g)", off, allowed));
}

static void run_checks() {
    for (int BT : {1, 17, 64, 1025, 4096}) check_sum(BT);
    check_type<float>();
    check_type<bf16>();
}

// ==== bench ======================================================================================

// Loss and gradient over the rows of logits that exist at a time; the gradient takes the place of
// the logits, so that each round but the first reads the last one's, whose values cost the same.
template <class Float>
static void bench_type(const BenchModel& model, bool gradient) {
    int V = model.V, Vp = (V + 127) / 128 * 128,
        BT = std::min(bench_options.tokens, kClassifierRows);
    Device<Float> logits(size_t(BT) * Vp);
    Device<float> losses{size_t(BT)};
    Device<int> targets(random_ids(size_t(BT), 1, V));
    fill_random(logits, 2);
    double ms = time_ms([&] {
        classifier_forward<Float>(losses, logits, targets, 1. / BT, gradient, BT, V, Vp, stream());
    });
    table_bytes(gradient ? "classifier_forward, gradient" : "classifier_forward, loss alone",
                type_name<Float>(), format("%d x %d", BT, V),
                sizeof(Float) * double(BT) * (gradient ? V + Vp : V), ms);
}

// The same kernel with other numbers of threads for a row, which it keeps in shared memory or reads
// again.
static void bench_blocks(const BenchModel& model) {
    int V = model.V, Vp = (V + 127) / 128 * 128;
    int BT = std::min(bench_options.tokens, kClassifierRows);
    Device<bf16> logits(size_t(BT) * Vp);
    Device<float> losses{size_t(BT)};
    Device<int> targets(random_ids(size_t(BT), 1, V));
    fill_random(logits, 2);
    for (int threads : {128, 256, 512, 1024}) {
        double ms = time_ms([&] {
            launch("classifier_forward", classifier_forward_kernel<bf16>, unsigned(BT),
                   unsigned(threads), 2 * kWarp * sizeof(float), stream(),
                   static_cast<float*>(losses), static_cast<bf16*>(logits),
                   static_cast<const int*>(targets), 1.f / float(BT), true, V, Vp);
        });
        table_bytes(format("classifier_forward, blocks of %d", threads), "bf16",
                    format("%d x %d", BT, V), 2. * double(BT) * (V + Vp), ms);
    }
}

static void run_bench() {
    BenchModel model = bench_models()[0];
    for (bool gradient : {true, false}) {
        bench_type<bf16>(model, gradient);
        bench_type<float>(model, gradient);
    }
    bench_blocks(model);
}

int main(int argc, char** argv) { return bench_main(argc, argv, run_checks, run_bench); }
