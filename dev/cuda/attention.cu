// Attention, its gradient and the form that reads a cache: checked against the CPU twin, and timed,
// with other cuts of the tiles beside the ones in use, and cuDNN's attention where it is installed.
#include <omp.h>

#include "bench.cuh"
#ifdef GPT2_CUDNN
#    include "cudnn.cuh"
#endif

// ==== check ======================================================================================

struct HeadShape {
    int B, T, NH, HS;
    size_t numbers() const { return size_t(B) * T * NH * HS; }  // of a (B,T,C)
    size_t rows() const { return size_t(B) * NH * T; }
};

static Dropout dropout_of(double probability) {
    return {probability, 0x123456789abcull, 77, 5, RandomUse::attention, 3};
}

static size_t twin_attention_scratch(const HeadShape& heads) {
    GPT2Config config;
    GPT2Shape shape;
    config.heads = heads.NH, config.channels = heads.NH * heads.HS;
    shape.T = heads.T, shape.threads = omp_get_max_threads();
    return gpt2_sizes(config, shape).attention_scratch;
}

// Scores of a few units, so that some weights are near 1 and some near 0.
template <class Float>
static Numbers random_qkv(const HeadShape& shape) {
    return random_numbers<Float>(3 * shape.numbers(), 1, 2.5);
}

struct ForwardResult {
    Numbers out, logsumexp;
};

template <class Real>
static ForwardResult twin_forward(const Numbers& qkv, const Dropout& dropout,
                                  const HeadShape& shape) {
    std::vector<Real> out(shape.numbers()), logsumexp(shape.rows());
    std::vector<Real> scratch(twin_attention_scratch(shape));
    attention_forward(out.data(), logsumexp.data(), as<Real>(qkv).data(), scratch.data(), dropout,
                      shape.B, shape.T, shape.NH * shape.HS, shape.NH);
    return {wide(out), wide(logsumexp)};
}

template <class Real>
static Numbers twin_backward(const Numbers& dout, const Numbers& qkv, const ForwardResult& forward,
                             const Dropout& dropout, const HeadShape& shape) {
    std::vector<Real> dqkv(qkv.size()), scratch(twin_attention_scratch(shape));
    attention_backward(dqkv.data(), as<Real>(dout).data(), as<Real>(qkv).data(),
                       as<Real>(forward.out).data(), as<Real>(forward.logsumexp).data(),
                       scratch.data(), dropout, shape.B, shape.T, shape.NH * shape.HS, shape.NH);
    return wide(dqkv);
}

// The part of (B,T,3,C) that is q (0), k (1) or v (2).
static Numbers part_of(const Numbers& qkv, int part, int C) {
    Numbers values;
    for (size_t i = 0; i < qkv.size(); i++)
        if (int(i / size_t(C)) % 3 == part) values.push_back(qkv[i]);
    return values;
}

// What dropout does to weight (t, j) of head h of sequence b: 0, or the factor of what it keeps.
static double dropout_factor(const Dropout& dropout, int b, int h, int t, int j, int T) {
    if (dropout.probability == 0) return 1;
    uint32_t row = uint32_t(h * T + t), group = row * ((uint32_t(T) + 3) / 4) + uint32_t(j) / 4;
    Philox random = philox(dropout.seed, group, uint32_t(dropout.first_sequence + uint64_t(b)),
                           random_stream(dropout.use, dropout.layer), uint32_t(dropout.step));
    bool kept = random.word[j % 4] >= uint32_t(dropout.probability * 4294967296.0);
    return kept ? 1 / (1 - dropout.probability) : 0;
}

// The gradient in double, except that weights and score gradients are rounded to bf16 before they
// are multiplied: tensor cores take nothing wider. What this is off by, no kernel in bf16 avoids.
static Numbers rounding_backward(const Numbers& dout, const Numbers& qkv,
                                 const ForwardResult& forward, const Dropout& dropout,
                                 const HeadShape& shape) {
    auto [B, T, NH, HS] = shape;
    int C = NH * HS;
    double scale = 1 / std::sqrt(double(HS));
    Numbers dqkv(qkv.size());
    for (int bh = 0; bh < B * NH; bh++) {
        int b = bh / NH, h = bh % NH;
        for (int t = 0; t < T; t++) {
            for (int j = 0; j <= t; j++) {
                size_t at = (size_t(b) * T + t) * C + h * HS;
                size_t q = (size_t(b) * T + t) * 3 * C + h * HS;
                size_t k = (size_t(b) * T + j) * 3 * C + C + h * HS, v = k + C;
                double score = 0, slope = 0, delta = 0;
                for (int i = 0; i < HS; i++) {
                    score += qkv[q + i] * qkv[k + i];
                    slope += dout[at + i] * qkv[v + i];
                    delta += dout[at + i] * forward.out[at + i];
                }
                double p = std::exp(score * scale - forward.logsumexp[size_t(bh) * T + t]);
                double factor = dropout_factor(dropout, b, h, t, j, T);
                double ds = t == 0 ? 0 : rounded<bf16>(p * (factor * slope - delta)) * scale;
                double d = factor * rounded<bf16>(p);
                for (int i = 0; i < HS; i++) {
                    dqkv[q + i] += ds * qkv[k + i];
                    dqkv[k + i] += ds * qkv[q + i];
                    dqkv[v + i] += d * dout[at + i];
                }
            }
        }
    }
    return dqkv;
}

// As expect_close, but for the largest element of a small tensor. In float a weight is off by up to
// 2^-22 of itself (ex2.approx), and an element by about as much of the largest. In bf16 the
// roundings inside a kernel can exceed twice those of the twin's outputs, where the norm stays
// below 1.6 times: there the yardstick is the worse of the twin and of rounding_backward.
template <class Float>
static void expect_gradient(const char* name, const Numbers& got, const Numbers& reference,
                            const Numbers& twin, const Numbers& rounding) {
    Distance error = distance(got, reference), allowed = distance(rounded<Float>(twin), reference);
    Distance inside = distance(rounded<Float>(rounding), reference);
    double norm = checks.factor * allowed.norm;
    double largest = checks.factor * std::max(allowed.largest, inside.largest);
    if constexpr (sizeof(Float) == 4) {
        double size = distance(reference, Numbers(reference.size())).largest;
        largest = checks.factor * allowed.largest + 0x1p-22 * size;
    }
    checks.count(error.norm <= norm && error.largest <= largest,
                 format("%s: off by %.3g in norm (allowed %.3g) and %.3g in one element (allowed "
                        "%.3g; by roundings inside %.3g)",
                        name, error.norm, norm, error.largest, largest, inside.largest));
}

template <class Float>
static void check_forward(const HeadShape& shape, double probability) {
    int B = shape.B, T = shape.T, NH = shape.NH, C = NH * shape.HS;
    checks.label = format("attention_forward %s B=%d T=%d NH=%d HS=%d dropout %g",
                          type_name<Float>(), B, T, NH, shape.HS, probability);
    Dropout dropout = dropout_of(probability);
    Numbers host_qkv = random_qkv<Float>(shape);
    Device<Float> out(shape.numbers()), qkv(host_qkv);
    Device<float> logsumexp(shape.rows());
    attention_forward<Float>(out, logsumexp, qkv, dropout, B, T, C, NH, stream());
    ForwardResult reference = twin_forward<double>(host_qkv, dropout, shape);
    ForwardResult twin = twin_forward<float>(host_qkv, dropout, shape);
    Numbers got = out.download(), sums = logsumexp.download();
    // A query that sees one key gets its value. The twin returns it; the kernel multiplies and
    // divides by a weight near 1, two roundings of numbers up to 2.5.
    double floor = T == 1 ? 2.5 * 0x1p-23 : 0;
    expect_close<Float>("out", got, reference.out, twin.out, floor);
    // The kernel's exponents are of 2: rounding the largest of them, log2(e) times the largest
    // logit, moves the logarithm of the sum by up to 2^-24 of that logit, which the twin does not
    // do.
    double logit = 0;
    for (double sum : reference.logsumexp) logit = std::max(logit, std::fabs(sum) + std::log(T));
    expect_close<float>("logsumexp", sums, reference.logsumexp, twin.logsumexp, logit * 0x1p-24);
    attention_forward<Float>(out, logsumexp, qkv, dropout, B, T, C, NH, stream());
    expect_equal("out, a second time", out.download(), got);
    expect_equal("logsumexp, a second time", logsumexp.download(), sums);
}

template <class Float>
static void check_backward(const HeadShape& shape, double probability) {
    int B = shape.B, T = shape.T, NH = shape.NH, C = NH * shape.HS;
    checks.label = format("attention_backward %s B=%d T=%d NH=%d HS=%d dropout %g",
                          type_name<Float>(), B, T, NH, shape.HS, probability);
    Dropout dropout = dropout_of(probability);
    Numbers host_qkv = random_qkv<Float>(shape);
    Numbers host_dout = random_numbers<Float>(shape.numbers(), 2);
    ForwardResult forward = twin_forward<double>(host_qkv, dropout, shape);
    forward.out = rounded<Float>(forward.out);
    forward.logsumexp = rounded<float>(forward.logsumexp);
    Device<Float> dqkv(host_qkv.size()), dout(host_dout), qkv(host_qkv), out(forward.out);
    Device<float> logsumexp(forward.logsumexp), scratch(shape.rows());
    auto run = [&] {
        attention_backward<Float>(dqkv, dout, qkv, out, logsumexp, scratch, dropout, B, T, C, NH,
                                  stream());
        return dqkv.download();
    };
    Numbers got = run();
    Numbers reference = twin_backward<double>(host_dout, host_qkv, forward, dropout, shape);
    Numbers twin = twin_backward<float>(host_dout, host_qkv, forward, dropout, shape);
    Numbers rounding = rounding_backward(host_dout, host_qkv, forward, dropout, shape);
    const char* names[] = {"dq", "dk", "dv"};
    for (int part = 0; part < 3; part++)
        expect_gradient<Float>(names[part], part_of(got, part, C), part_of(reference, part, C),
                               part_of(twin, part, C), part_of(rounding, part, C));
    Numbers first_query(got.begin(), got.begin() + C);
    expect_equal("dq of the query that sees one key", first_query, Numbers(size_t(C), 0));
    expect_equal("dqkv, a second time", run(), got);
}

// n new tokens at `position` give what they give as the end of a sequence that is computed whole.
template <class Float>
static void check_cached(const HeadShape& shape, int n) {
    int B = shape.B, T = shape.T, NH = shape.NH, C = NH * shape.HS;
    int position = T - n, context = T + 3;
    checks.label = format("attention_cached_forward %s B=%d position=%d n=%d NH=%d HS=%d",
                          type_name<Float>(), B, position, n, NH, shape.HS);
    Numbers all = random_qkv<Float>(shape), recent, keys, values;
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < context; t++) {
            const double* row = t < T ? &all[(size_t(b) * T + t) * 3 * C] : nullptr;
            if (t >= position && t < T) recent.insert(recent.end(), row, row + 3 * C);
            Numbers unset(size_t(C), 77);
            if (t >= T) row = unset.data() - C;
            keys.insert(keys.end(), t < T ? row + C : unset.data(),
                        t < T ? row + 2 * C : unset.data() + C);
            values.insert(values.end(), t < T ? row + 2 * C : unset.data(),
                          t < T ? row + 3 * C : unset.data() + C);
        }
    }
    Numbers old_keys = keys, old_values = values;
    for (size_t i = 0; i < keys.size(); i++) {
        int t = int(i / size_t(C)) % context;
        if (t >= position && t < T) old_keys[i] = old_values[i] = NAN;
    }
    Device<Float> out(size_t(B) * n * C), qkv(recent), key_cache(old_keys), value_cache(old_values);
    attention_cached_forward<Float>(out, key_cache, value_cache, qkv, B, n, position, context, C,
                                    NH, stream());
    auto last = [&](const Numbers& whole) {
        Numbers rows;
        for (int b = 0; b < B; b++)
            rows.insert(rows.end(), whole.begin() + (ptrdiff_t(b) * T + position) * C,
                        whole.begin() + ptrdiff_t(b + 1) * T * C);
        return rows;
    };
    expect_close<Float>("out", out.download(), last(twin_forward<double>(all, {}, shape).out),
                        last(twin_forward<float>(all, {}, shape).out));
    expect_equal("the cache of keys", key_cache.download(), rounded<Float>(keys));
    expect_equal("the cache of values", value_cache.download(), rounded<Float>(values));
}

// A weight whose word of Philox is the threshold itself stays.
template <class Float>
static void check_threshold() {
    HeadShape shape = {1, 17, 1, 16};
    Dropout dropout = dropout_of(0.5);
    uint32_t groups = (uint32_t(shape.T) + 3) / 4, four = 2, row = 11;
    Philox random = philox(dropout.seed, row * groups + four, uint32_t(dropout.first_sequence),
                           random_stream(dropout.use, dropout.layer), uint32_t(dropout.step));
    for (uint32_t word : random.word) check_forward<Float>(shape, word / 4294967296.0);
}

__global__ void place_kernel(int* places, AttentionShape shape, int tiles) {
    AttentionPlace place = attention_place(shape, tiles);
    if (threadIdx.x != 0) return;
    int* mine = places + 3 * blockIdx.x;
    mine[0] = place.b, mine[1] = place.h, mine[2] = place.tile;
}

// Every tile of every head has one block, in the order of the groups, however many heads go in one.
// The batches above are too small for a second group; those that are trained on have many.
static void check_places() {
    for (int NH : {1, 3}) {
        for (int heads : {NH, 2 * NH, 5 * NH}) {
            for (int at_a_time = 1; at_a_time <= heads; at_a_time++) {
                constexpr int kTiles = 3;
                checks.label =
                    format("attention_place of %d heads, %d at a time", heads, at_a_time);
                AttentionShape shape = {1, NH, NH, 1, heads, at_a_time, false, 1, 1};
                int blocks = heads * kTiles;
                Device<int> places(size_t(3 * blocks));
                launch("place", place_kernel, unsigned(blocks), unsigned(kWarp), 0, stream(),
                       static_cast<int*>(places), shape, kTiles);
                std::vector<int> got = places.copy_out(), expected;
                for (int first = 0; first < heads; first += at_a_time)
                    for (int tile = 0; tile < kTiles; tile++)
                        for (int i = first; i < std::min(first + at_a_time, heads); i++)
                            expected.insert(expected.end(), {i / NH, i % NH, tile});
                checks.count(got == expected, "a group after the other, in it a tile of each head");
            }
        }
    }
}

template <class Float>
static void check_type() {
    constexpr HeadShape kShapes[] = {
        {3, 17, 3, 16},  {3, 65, 2, 48},  {3, 129, 2, 64},  {1, 64, 2, 64}, {3, 65, 1, 80},
        {1, 129, 1, 96}, {1, 33, 1, 112}, {1, 129, 1, 128}, {3, 17, 2, 20}, {3, 65, 2, 8},
        {3, 33, 3, 5},   {3, 1, 2, 64},   {1, 257, 1, 32},
    };
    for (const HeadShape& shape : kShapes) {
        for (double probability : {0., 0.2}) {
            check_forward<Float>(shape, probability);
            check_backward<Float>(shape, probability);
        }
        check_cached<Float>(shape, 1);
        if (shape.T >= 17) check_cached<Float>(shape, 17);
    }
    check_threshold<Float>();
}

// The shapes that Hopper's kernels are for, with heads of 64 numbers and of fewer, of
// one tile and of several.
static void check_warpgroups() {
    constexpr HeadShape kShapes[] = {
        {3, 129, 2, 64}, {1, 64, 2, 64},  {3, 65, 1, 64}, {2, 257, 2, 64},
        {3, 1, 2, 64},   {2, 100, 3, 52}, {1, 70, 2, 56},
    };
    checks.count(has_wgmma(), "this card has wgmma");
    for (const HeadShape& shape : kShapes) {
        for (double probability : {0., 0.2}) {
            check_forward<bf16>(shape, probability);
            check_backward<bf16>(shape, probability);
        }
    }
}

static void run_checks() {
    if (checks.wgmma) return check_warpgroups();
    check_places();
    check_type<float>();
    check_type<bf16>();
}

// ==== bench ======================================================================================

// Operations/s of a large square product without epilogue: the roof.
template <class Float>
static double product_roof() {
    int n = bench_options.tiny ? 64 : sizeof(Float) == 2 ? 8192 : 4096;
    size_t N = size_t(n) * n;
    ProductOptions options;
    options.deterministic = false;
    Products products(options, stream());
    Device<Float> out(N), inp(N), weight(N);
    fill_random(inp, 1), fill_random(weight, 2);
    auto product = [&] { matmul_forward<Float>(out, inp, weight, nullptr, n, n, n, products); };
    products.tune(product);
    return 2e3 * n * n * n / time_ms(product);
}

template <class Float>
struct AttentionTensors {
    int B, T, C, NH;
    Device<Float> out, qkv, dout, dqkv;
    Device<float> logsumexp, scratch;

    explicit AttentionTensors(const BenchModel& model)
        : B(std::max(1, bench_options.tokens / model.T)),
          T(model.T),
          C(model.C),
          NH(model.NH),
          out(size_t(B) * T * C),
          qkv(3 * out.size()),
          dout(out.size()),
          dqkv(qkv.size()),
          logsumexp(size_t(B) * NH * T),
          scratch(logsumexp.size()) {
        fill_random(qkv, 1), fill_random(dout, 2);
        attention_forward<Float>(out, logsumexp, qkv, Dropout(), B, T, C, NH, stream());
    }
    // Of two products over the keys that a query sees.
    double operations() const { return 2. * B * T * (T + 1) * C; }
    std::string size(const char* model) const {
        return format("%s, B=%d, T=%d, NH=%d, HS=%d", model, B, T, NH, C / NH);
    }
};

template <class Tiles>
static std::string name_of_cut() {
    return format("%d x %d, steps of %d%s%s", Tiles::kWarps, Tiles::kRows, Tiles::kStep,
                  Tiles::kHold ? ", held" : "",
                  Tiles::kWarpgroup ? format(", wgmma, %d blocks", Tiles::kBlocks).c_str() : "");
}

// A row of the table for one cut of the forward tiles.
template <class Tiles, class Float = typename Tiles::Float>
static void bench_forward_cut(const AttentionTensors<Float>& t, const std::string& size,
                              double roof) {
    double ms = time_ms([&] {
        attention_forward_tiled<Tiles>(t.out, t.logsumexp, t.qkv, Dropout(), t.B, t.T, t.C, t.NH,
                                       stream());
    });
    table_operations(format("attention_forward cut %s", name_of_cut<Tiles>().c_str()),
                     type_name<Float>(), size, t.operations(), roof, ms);
}

template <class KeyTiles, class QueryTiles, class Float = typename KeyTiles::Float>
static void bench_backward_cut(const AttentionTensors<Float>& t, const std::string& size,
                               double roof) {
    double ms = time_ms([&] {
        attention_backward_tiled<KeyTiles, QueryTiles>(t.dqkv, t.dout, t.qkv, t.out, t.logsumexp,
                                                       t.scratch, Dropout(), t.B, t.T, t.C, t.NH,
                                                       stream());
    });
    table_operations(format("attention_backward cut %s; %s", name_of_cut<KeyTiles>().c_str(),
                            name_of_cut<QueryTiles>().c_str()),
                     type_name<Float>(), size, 2.5 * t.operations(), roof, ms);
}

// What cuDNN's way takes, 0 where it was not run, and by how much its results differ from ours, of
// which the largest is given: both round sums of the same numbers to bf16.
struct Peer {
    double forward_ms = 0, backward_ms = 0;
    std::string forward_difference, backward_difference;

    // For the last column; the ratio is above 1 where ours is faster.
    static std::string beside(double peer_ms, double ms, const std::string& difference) {
        if (peer_ms == 0) return "";
        return format("cuDNN %.1f us (%.2f), %s", peer_ms * 1e3, peer_ms / ms, difference.c_str());
    }
};

#ifdef GPT2_CUDNN

// The largest difference, in words. bf16 keeps 8 bits: ten roundings of the largest
// element would say that they did not compute the same.
static std::string difference(const char* name, const Device<bf16>& peer,
                              const Device<bf16>& ours) {
    Numbers theirs = peer.download(), own = ours.download();
    double off = distance(theirs, own).largest, size = 0;
    for (double value : own) size = std::max(size, std::fabs(value));
    if (!(off <= size / 25))
        printf("%s: cuDNN's result is not ours: off by %.3g where the largest is %.3g\n", name, off,
               size);
    return format("off by %.2g of %.2g", off, size);
}

static Peer time_cudnn(const AttentionTensors<bf16>& t) {
    Peer peer;
    try {
        static Cudnn cudnn;
        CudnnAttention theirs(cudnn, t.qkv, t.dout, t.B, t.T, t.NH, t.C / t.NH);
        peer.forward_ms = time_ms([&] { theirs.forward(); });
        peer.forward_difference = difference("attention_forward", theirs.out, t.out);
        peer.backward_ms = time_ms([&] { theirs.backward(); });
        attention_backward<bf16>(t.dqkv, t.dout, t.qkv, t.out, t.logsumexp, t.scratch, Dropout(),
                                 t.B, t.T, t.C, t.NH, stream());
        peer.backward_difference = difference("attention_backward", theirs.dqkv, t.dqkv);
    } catch (const Error& error) { printf("attention by cuDNN: skipped: %s\n", error.what()); }
    return peer;
}

#else

static Peer time_cudnn(const AttentionTensors<bf16>&) {
    printf("attention by cuDNN: skipped: this program was built without it\n");
    return {};
}

#endif

static Peer time_cudnn(const AttentionTensors<float>&) { return {}; }  // it has none in float32

// Backward counts the five products of the mathematics; ours does seven.
template <class Float>
static void bench_model(const BenchModel& model, double roof) {
    AttentionTensors<Float> t(model);
    std::string size = t.size(model.name);
    Peer peer = time_cudnn(t);
    for (double probability : {0., 0.1}) {
        std::string label = size + (probability > 0 ? format(", dropout %g", probability) : "");
        double ms = time_ms([&] {
            attention_forward<Float>(t.out, t.logsumexp, t.qkv, dropout_of(probability), t.B, t.T,
                                     t.C, t.NH, stream());
        });
        table_operations("attention_forward", type_name<Float>(), label, t.operations(), roof, ms,
                         Peer::beside(peer.forward_ms, ms, peer.forward_difference));
        ms = time_ms([&] {
            attention_backward<Float>(t.dqkv, t.dout, t.qkv, t.out, t.logsumexp, t.scratch,
                                      dropout_of(probability), t.B, t.T, t.C, t.NH, stream());
        });
        table_operations("attention_backward", type_name<Float>(), label, 2.5 * t.operations(),
                         roof, ms, Peer::beside(peer.backward_ms, ms, peer.backward_difference));
        peer = Peer();  // what follows has dropout, and cuDNN had none
    }
    int position = t.T - 1;
    double ms = time_ms([&] {  // qkv holds the caches: (B,T,C) twice
        attention_cached_forward<Float>(t.out, t.dqkv, t.dqkv + t.out.size(), t.qkv, t.B, 1,
                                        position, t.T, t.C, t.NH, stream());
    });
    table_bytes("attention_cached_forward", type_name<Float>(), size,
                2. * sizeof(Float) * double(t.out.size()), ms);
}

// Other cuts for the head size of the GPT-2 family, from which those in use should be chosen.
static void bench_cuts(const BenchModel& model, double roof) {
    constexpr int HS = 64;
    if (model.C / model.NH != HS) return;
    AttentionTensors<bf16> t(model);
    std::string size = t.size(model.name);
    using Keys = AttentionKeyTiles<bf16, HS>;
    using Queries = AttentionQueryTiles<bf16, HS>;
    bench_forward_cut<AttentionForwardTiles<bf16, HS>>(t, size, roof);
    bench_forward_cut<AttentionTiles<bf16, HS, 1, 4, 64, true>>(t, size, roof);
    bench_forward_cut<AttentionTiles<bf16, HS, 2, 4, 64, false>>(t, size, roof);
    bench_forward_cut<AttentionTiles<bf16, HS, 2, 8, 64, true>>(t, size, roof);
    bench_backward_cut<Keys, Queries>(t, size, roof);
    bench_backward_cut<AttentionTiles<bf16, HS, 2, 8, 32, false>, Queries>(t, size, roof);
    bench_backward_cut<Keys, AttentionTiles<bf16, HS, 1, 8, 64, true>>(t, size, roof);
    bench_backward_cut<Keys, AttentionTiles<bf16, HS, 2, 4, 32, false>>(t, size, roof);
    if (!has_wgmma()) return;
    using Three = AttentionWarpgroup<3>;
    bench_forward_cut<Three>(t, size, roof);
    bench_forward_cut<AttentionWarpgroup<4>>(t, size, roof);
    bench_forward_cut<AttentionWarpgroup<5>>(t, size, roof);
    bench_backward_cut<Three, Three>(t, size, roof);
    bench_backward_cut<Three, AttentionWarpgroup<4>>(t, size, roof);
    bench_backward_cut<AttentionWarpgroup<2>, Three>(t, size, roof);
}

static void run_bench() {
    double roof = product_roof<bf16>(), roof_fp32 = product_roof<float>();
    for (const BenchModel& model : bench_models()) {
        bench_model<bf16>(model, roof);
        bench_model<float>(model, roof_fp32);
    }
    if (!bench_options.tiny) bench_cuts(bench_models()[0], roof);
}

int main(int argc, char** argv) { return bench_main(argc, argv, run_checks, run_bench); }
