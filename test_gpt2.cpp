// The tests: one source for both twins, built against the object that the program itself is made
// of.
//
// It is built twice with the CPU twin: in float, where it holds every part to its contract, and in
// double (GPT2_REAL), where gradients are checked by central differences and the whole model
// against PyTorch's float64. Gradient.* and Layer.* call the layers of the CPU twin; everything
// else goes through what both twins provide, and makes its models with the precision that
// $GPT2_TEST_DTYPE names (fp32 unless it is set), where the test is not about float32 itself.
// Buffers stand between guard bytes and are full of NaN until written; comparisons are written so
// that NaN fails. A tolerance says where it comes from. Tests that read
// ../shared/data skip, counted, where it is missing.
//
// ./build/.../test_gpt2 [--gtest_filter=Suite.Test] ends with `N passed, N failed, N skipped`.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <omp.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <regex>
#include <set>
#include <thread>

#include "commands.h"
#include "dev/test/tools.h"

// ==== tools ======================================================================================

namespace {

constexpr bool kDouble = sizeof(real) == 8;
constexpr real kNaN = std::numeric_limits<real>::quiet_NaN();

// Numbers between guard bytes, full of NaN at first; a write outside fails the test when the buffer
// goes.
class Buffer {
  public:
    explicit Buffer(size_t size) : bytes_(size * sizeof(real) + 2 * kGuard, kMark), size_(size) {
        std::fill(begin(), end(), kNaN);
    }
    explicit Buffer(int size) : Buffer(size_t(size)) {}
    Buffer(const Buffer& other) = default;
    ~Buffer() {
        auto intact = [](uint8_t byte) { return byte == kMark; };
        EXPECT_TRUE(std::all_of(bytes_.begin(), bytes_.begin() + kGuard, intact))
            << "written before its start";
        EXPECT_TRUE(std::all_of(bytes_.end() - kGuard, bytes_.end(), intact))
            << "written behind its end";
    }
    Buffer& operator=(const Buffer&) = delete;

    real* begin() { return reinterpret_cast<real*>(bytes_.data() + kGuard); }
    real* end() { return begin() + size_; }
    const real* begin() const { return reinterpret_cast<const real*>(bytes_.data() + kGuard); }
    const real* end() const { return begin() + size_; }
    operator real*() { return begin(); }
    operator const real*() const { return begin(); }
    real& operator[](size_t i) { return begin()[i]; }
    real operator[](size_t i) const { return begin()[i]; }
    real& operator[](int i) { return begin()[i]; }
    real operator[](int i) const { return begin()[i]; }
    size_t size() const { return size_; }

    Buffer& fill(real value) {
        std::fill(begin(), end(), value);
        return *this;
    }
    Buffer& normal(unsigned seed, double scale = 1) {
        std::mt19937 generator(seed);
        std::normal_distribution<double> draw(0, scale);
        for (real& value : *this) value = real(draw(generator));
        return *this;
    }

  private:
    static constexpr size_t kGuard = 64;
    static constexpr uint8_t kMark = 0xA5;
    std::vector<uint8_t> bytes_;
    size_t size_;
};

// The largest |a - b|; NaN anywhere gives NaN, which fails every `<=`.
double largest_difference(const real* a, const real* b, size_t size) {
    double largest = 0;
    for (size_t i = 0; i < size; i++) {
        double difference = std::abs(double(a[i]) - double(b[i]));
        if (!(difference <= largest)) largest = difference;
    }
    return largest;
}

double largest_magnitude(const real* a, size_t size) {
    double largest = 0;
    for (size_t i = 0; i < size; i++) largest = std::max(largest, std::abs(double(a[i])));
    return largest;
}

// eps of `real`; a sum of n products of numbers near 1 is within about sqrt(n) to n of it.
constexpr double kEps = std::numeric_limits<real>::epsilon();

// What models compute in.
Dtype test_dtype() {
    static const char* const name = getenv("GPT2_TEST_DTYPE");
    static const Dtype dtype = gpt2_dtype(name != nullptr ? name : "fp32");
    return dtype;
}

// A tolerance, as a part of the largest number: `exact` where float32 (or double) computes it in
// another order, `narrow` where numbers on the way are rounded to bf16 and an order that rounds one
// of them to its neighbour moves it by 2^-8.
double tolerance(double exact, double narrow) {
    return test_dtype() == Dtype::bf16 ? narrow * 0x1p-8 : exact * kEps;
}

GPT2Shape test_shape(int B, int T, bool training = false, int generate = 0) {
    GPT2Shape shape;
    shape.B = B, shape.T = T, shape.training = training, shape.generate = generate;
    shape.threads = omp_get_max_threads(), shape.dtype = test_dtype();
    return shape;
}

GPT2Shape training_shape(int B, int T, int generate = 0) {
    return test_shape(B, T, true, generate);
}

#define EXPECT_AT_MOST(value, bound) \
    EXPECT_TRUE((value) <= (bound)) << #value " is " << (value) << ", more than " << (bound)

}  // namespace

// ==== layers: gradients by central differences ===================================================

namespace {

// The gradient of `objective` with respect to x, by (f(x+h) - f(x-h)) / 2h in double with h = 1e-5:
// its own error is about h^2 f'''/6 + 1e-16 |f| / h, some 1e-10 of the numbers here; the bound
// leaves a factor of 100.
void expect_gradient(const char* name, Buffer& x, const real* analytic,
                     const std::function<double()>& objective) {
    constexpr double kStep = 1e-5;
    double scale = std::max(1.0, largest_magnitude(analytic, x.size()));
    size_t stride = x.size() / 300 + 1;
    for (size_t i = 0; i < x.size(); i += stride) {
        real saved = x[i];
        x[i] = real(saved + kStep);
        double above = objective();
        x[i] = real(saved - kStep);
        double below = objective();
        x[i] = saved;
        double numeric = (above - below) / (2 * kStep);
        EXPECT_TRUE(std::abs(numeric - double(analytic[i])) <= 1e-8 * scale)
            << name << "[" << i << "]: central difference " << numeric << ", backward "
            << analytic[i];
    }
}

double dot(const Buffer& a, const Buffer& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); i++) sum += double(a[i]) * double(b[i]);
    return sum;
}

// Gradients that accumulate start at 1, so that an overwrite is seen; this takes the 1 away again.
void subtract_one(Buffer& gradient) {
    for (real& value : gradient) value -= 1;
}

struct Sizes {
    int B, T, C, NH;
};
constexpr Sizes kOddSizes[] = {{3, 17, 15, 3}, {1, 1, 1, 1}, {2, 130, 10, 2}, {1, 65, 7, 1}};

// Memory that the layers of the CPU twin work in, full of NaN.
Buffer attention_scratch(int T) {
    return Buffer(gpt2_sizes(GPT2Config{}, test_shape(1, T)).attention_scratch);
}
Buffer reduce_scratch(size_t columns) {
    return Buffer(gpt2_sizes(GPT2Config{}, test_shape(1, 1)).reduce_rows * columns);
}

TEST(Gradient, Encoder) {
    for (const Sizes& sizes : kOddSizes) {
        const int B = sizes.B, T = sizes.T, C = sizes.C;
        int V = 13;
        std::vector<int> inputs = random_ids(size_t(B * T), V, 1);
        Buffer wte(V * C), wpe(T * C), out(B * T * C), dout(out.size());
        Buffer dwte(wte.size()), dwpe(wpe.size());
        wte.normal(2), wpe.normal(3), dout.normal(4), dwte.fill(1), dwpe.fill(1);
        encoder_backward(dwte, dwpe, dout, inputs.data(), B, T, C);
        subtract_one(dwte), subtract_one(dwpe);
        auto objective = [&] {
            encoder_forward(out, inputs.data(), wte, wpe, B, T, C);
            return dot(out, dout);
        };
        expect_gradient("wte", wte, dwte, objective);
        expect_gradient("wpe", wpe, dwpe, objective);
    }
}

TEST(Gradient, LayerNorm) {
    for (const Sizes& sizes : kOddSizes) {
        const int B = sizes.B, T = sizes.T, C = sizes.C;
        for (bool with_bias : {true, false}) {
            size_t BT = size_t(B * T), N = BT * size_t(C), c = size_t(C);
            Buffer inp(N), weight(c), bias(c), out(N), mean(BT), rstd(BT), dout(N);
            Buffer dinp(N), dweight(c), dbias(c), scratch = reduce_scratch(2 * c);
            inp.normal(1), weight.normal(2), bias.normal(3), dout.normal(4);
            dinp.fill(1), dweight.fill(1), dbias.fill(1);
            auto objective = [&] {
                layernorm_forward(out, mean, rstd, inp, weight, with_bias ? bias.begin() : nullptr,
                                  1e-5, B, T, C);
                return dot(out, dout);
            };
            objective();
            layernorm_backward(dinp, dweight, with_bias ? dbias.begin() : nullptr, dout, inp,
                               weight, mean, rstd, scratch, B, T, C);
            subtract_one(dinp), subtract_one(dweight), subtract_one(dbias);
            expect_gradient("inp", inp, dinp, objective);
            expect_gradient("weight", weight, dweight, objective);
            expect_gradient("bias", bias, dbias, objective);  // 0 where it takes no part
        }
    }
}

TEST(Gradient, Matmul) {
    constexpr int kShapes[][3] = {{51, 15, 45}, {1, 1, 1}, {7, 33, 2}, {130, 3, 17}};
    for (const auto& shape : kShapes) {
        const int BT = shape[0], C = shape[1], OC = shape[2];
        Buffer inp(BT * C), weight(OC * C), bias(OC), out(BT * OC), dout(out.size());
        Buffer dinp(inp.size()), dweight(weight.size()), dbias(bias.size());
        Buffer scratch = reduce_scratch(bias.size());
        inp.normal(1), weight.normal(2), bias.normal(3), dout.normal(4), dweight.fill(1),
            dbias.fill(1);
        matmul_backward(dinp, dweight, dbias, dout, inp, weight, scratch, BT, C, OC);
        subtract_one(dweight), subtract_one(dbias);
        auto objective = [&] {
            matmul_forward(out, inp, weight, bias, BT, C, OC);
            return dot(out, dout);
        };
        expect_gradient("inp", inp, dinp, objective);
        expect_gradient("weight", weight, dweight, objective);
        expect_gradient("bias", bias, dbias, objective);
    }
}

TEST(Gradient, Attention) {
    for (const Sizes& sizes : kOddSizes) {
        const int B = sizes.B, T = sizes.T, C = sizes.C, NH = sizes.NH;
        for (double probability : {0.0, 0.3}) {
            size_t N = size_t(B * T * C);
            Dropout dropout{probability, 7, 3, 5, RandomUse::attention, 2};
            Buffer qkv(3 * N), out(N), logsumexp(B * NH * T), dout(N), dqkv(3 * N);
            Buffer scratch = attention_scratch(T);
            qkv.normal(1), dout.normal(2);
            auto objective = [&] {
                attention_forward(out, logsumexp, qkv, scratch, dropout, B, T, C, NH);
                return dot(out, dout);
            };
            objective();
            attention_backward(dqkv, dout, qkv, out, logsumexp, scratch, dropout, B, T, C, NH);
            expect_gradient("qkv", qkv, dqkv, objective);
        }
    }
}

TEST(Gradient, Gelu) {
    Buffer inp(101), out(101), dout(101), dinp(101);
    inp.normal(1, 3), dout.normal(2);
    inp[0] = 0, inp[1] = 12, inp[2] = -12;
    gelu_backward(dinp, dout, inp, inp.size());
    expect_gradient("inp", inp, dinp, [&] {
        gelu_forward(out, inp, inp.size());
        return dot(out, dout);
    });
}

TEST(Gradient, GeluMatmul) {
    const int BT = 19, C = 14, OC = 9;
    Buffer pre(BT * C), inp(pre.size()), weight(OC * C), bias(OC), out(BT * OC), dout(out.size());
    Buffer dpre(pre.size()), dweight(weight.size()), dbias(bias.size());
    Buffer scratch = reduce_scratch(size_t(OC));
    pre.normal(1), weight.normal(2), bias.normal(3), dout.normal(4), dweight.fill(1), dbias.fill(1);
    auto objective = [&] {
        gelu_forward(inp, pre, pre.size());
        matmul_forward(out, inp, weight, bias, BT, C, OC);
        return dot(out, dout);
    };
    objective();
    gelu_matmul_backward(dpre, dweight, dbias, dout, inp, pre, weight, scratch, BT, C, OC);
    subtract_one(dweight), subtract_one(dbias);
    expect_gradient("pre", pre, dpre, objective);
    expect_gradient("weight", weight, dweight, objective);
    expect_gradient("bias", bias, dbias, objective);
}

TEST(Gradient, DropoutAndResidual) {
    int B = 3, T = 5, C = 7;
    size_t N = size_t(B * T * C), BT = size_t(B * T);
    Dropout dropout{0.4, 11, 2, 9, RandomUse::mlp_projection, 1};
    Buffer inp(N), branch(N), residual(N), out(N), mean(BT), rstd(BT), weight(C), dout(N),
        dbranch(N);
    inp.normal(1), branch.normal(2), dout.normal(3), weight.fill(1);
    auto objective = [&] {
        residual_layernorm_forward(residual, out, mean, rstd, inp, branch, weight, nullptr, 1e-5,
                                   dropout, B, T, C);
        return dot(residual, dout);
    };
    dropout_forward(dbranch, dout, dropout, B, T, C);
    expect_gradient("branch", branch, dbranch, objective);
    expect_gradient("inp", inp, dout, objective);
}

TEST(Gradient, Classifier) {
    int BT = 6, V = 131, Vp = 256;
    std::vector<int> targets = random_ids(size_t(BT), V, 1);
    targets[2] = kIgnore;
    Buffer logits(BT * Vp), work(logits.size()), losses(BT);
    logits.normal(2, 3);
    auto objective = [&] {
        std::copy(logits.begin(), logits.end(), work.begin());
        classifier_forward(losses, work, targets.data(), 0.2, false, BT, V, Vp);
        return 0.2 * double(std::accumulate(losses.begin(), losses.end(), real(0)));
    };
    Buffer dlogits(logits);
    classifier_forward(losses, dlogits, targets.data(), 0.2, true, BT, V, Vp);
    expect_gradient("logits", logits, dlogits, objective);
    for (int j = V; j < Vp; j++) EXPECT_EQ(dlogits[j], 0) << "padding " << j;
}

// A model with every parameter random, so that nothing is 0 or 1 by its initialisation.
GPT2Ptr random_model(const GPT2Config& config, const GPT2Shape& shape, unsigned seed = 1) {
    GPT2Ptr model(gpt2_create(config, shape, 0, 1));
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        for (int layer = 0; row.present && layer < int(row.count); layer++) {
            Buffer values(row.file_size());
            values.normal(seed++, 0.3);
            gpt2_copy_in(model.get(), Group::parameters, index, layer, values);
        }
    }
    return model;
}

struct Batch {
    std::vector<int> inputs, targets;
    double scale;
    Batch(int B, int T, int V, unsigned seed, bool ignore_some = false)
        : inputs(random_ids(size_t(B * T), V, seed)),
          targets(random_ids(size_t(B * T), V, seed + 1)) {
        if (ignore_some)
            for (size_t i = 0; i < targets.size(); i += 3) targets[i] = kIgnore;
        scale = 1.0 / double(targets.size() -
                             size_t(std::count(targets.begin(), targets.end(), kIgnore)));
    }
};

double forward_loss(GPT2* model, const Batch& batch, int B, int T, GPT2Pass pass) {
    pass.loss_scale = batch.scale;
    gpt2_zero_gradients(model);
    gpt2_forward(model, batch.inputs.data(), batch.targets.data(), B, T, pass);
    return gpt2_stats(model).loss;
}

GPT2Config odd_config() {
    GPT2Config config;
    config.vocab_size = 61, config.context = 19, config.layers = 2, config.heads = 3,
    config.channels = 15;
    return config;
}

// Every tensor of the table, through the whole model: dropout, ignored targets, heads tied and not,
// no biases, a batch smaller than the model was made for.
TEST(Gradient, WholeModelByTableRow) {
    constexpr int B = 3, T = 17;
    for (int variant = 0; variant < 4; variant++) {
        GPT2Config config = odd_config();
        config.dropout = variant == 1 ? 0.2 : 0;
        config.tied = variant != 2, config.bias = variant != 3;
        if (variant == 3) config.hidden = 22;
        GPT2Ptr model = random_model(config, training_shape(B + 1, T + 2));
        Batch batch(B, T, config.vocab_size, 5, variant > 0);
        GPT2Pass pass{true, 0, 3, 4, 8, nullptr};
        forward_loss(model.get(), batch, B, T, pass);
        gpt2_backward(model.get());
        ParameterTable table = parameter_table(config);
        std::vector<Buffer> gradients;
        for (int index = 0; index < kParameterRows; index++) {
            const ParameterRow& row = table[size_t(index)];
            gradients.emplace_back(row.file_size());
            if (row.present)
                gpt2_copy_out(model.get(), Group::gradients, index, int(row.count) - 1,
                              gradients.back());
        }
        for (int index = 0; index < kParameterRows; index++) {
            const ParameterRow& row = table[size_t(index)];
            if (!row.present) continue;
            int layer = int(row.count) - 1;
            const Buffer& gradient = gradients[size_t(index)];
            Buffer values(row.file_size());
            gpt2_copy_out(model.get(), Group::parameters, index, layer, values);
            for (size_t i = 0; i < values.size(); i += values.size() / 7 + 1) {
                real saved = values[i];
                double loss[2];
                for (int side : {0, 1}) {
                    values[i] = real(saved + (side == 0 ? 1e-5 : -1e-5));
                    gpt2_copy_in(model.get(), Group::parameters, index, layer, values);
                    loss[side] = forward_loss(model.get(), batch, B, T, pass);
                }
                values[i] = saved;
                gpt2_copy_in(model.get(), Group::parameters, index, layer, values);
                EXPECT_TRUE(std::abs((loss[0] - loss[1]) / 2e-5 - double(gradient[i])) <= 1e-9)
                    << hf_name(row, layer) << "[" << i << "], variant " << variant
                    << ": central difference " << (loss[0] - loss[1]) / 2e-5 << ", backward "
                    << gradient[i];
            }
        }
    }
}

}  // namespace

// ==== layers: against plain definitions ==========================================================

namespace {

TEST(Layer, GemmAgreesWithPlainLoopsForAllTransposes) {
    constexpr int kShapes[][3] = {
        {1, 1, 1}, {17, 13, 5}, {64, 65, 33}, {3, 130, 257}, {129, 1, 40}};
    for (auto [M, N, K] : kShapes) {
        for (int mode = 0; mode < 8; mode++) {
            bool trans_a = mode & 1, trans_b = mode & 2;
            real beta = mode & 4 ? real(1) : real(0);
            int lda = (trans_a ? M : K) + 3, ldb = (trans_b ? K : N) + 1, ldc = N + 2;
            Buffer A(size_t(lda * (trans_a ? K : M))), B(size_t(ldb * (trans_b ? N : K)));
            Buffer C(ldc * M), D(ldc * M);
            A.normal(1), B.normal(2);
            if (beta != 0) C.normal(3), D.normal(3);
            gemm(trans_a, trans_b, M, N, K, A, lda, B, ldb, beta, C, ldc);
            gemm_plain(trans_a, trans_b, M, N, K, A, lda, B, ldb, beta, D, ldc);
            for (int m = 0; m < M; m++) {
                double exact_bound = 8 * kEps * std::sqrt(double(K) + 1) * 4;
                EXPECT_AT_MOST(largest_difference(C + m * ldc, D + m * ldc, size_t(N)),
                               exact_bound);
                EXPECT_EQ(std::isnan(C[m * ldc + N]), beta == 0) << "written between the rows";
            }
        }
    }
}

// Attention by its definition, in double, one query at a time.
void plain_attention(std::vector<double>& out, const Buffer& qkv, int B, int T, int C, int NH) {
    int HS = C / NH;
    out.assign(size_t(B * T * C), 0);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < NH; h++)
            for (int t = 0; t < T; t++) {
                std::vector<double> weight(size_t(t + 1));
                double largest = -INFINITY, sum = 0;
                const real* q = qkv + size_t((b * T + t) * 3 * C + h * HS);
                for (int j = 0; j <= t; j++) {
                    const real* k = qkv + size_t((b * T + j) * 3 * C + C + h * HS);
                    double s = 0;
                    for (int i = 0; i < HS; i++) s += double(q[i]) * double(k[i]);
                    weight[size_t(j)] = s / std::sqrt(HS);
                    largest = std::max(largest, weight[size_t(j)]);
                }
                for (double& w : weight) sum += w = std::exp(w - largest);
                for (int j = 0; j <= t; j++)
                    for (int i = 0; i < HS; i++)
                        out[size_t((b * T + t) * C + h * HS + i)] +=
                            weight[size_t(j)] / sum *
                            double(qkv[(b * T + j) * 3 * C + 2 * C + h * HS + i]);
            }
}

TEST(Layer, AttentionAgreesWithItsDefinition) {
    for (auto [B, T, C, NH] :
         {Sizes{3, 17, 15, 3}, {2, 129, 32, 2}, {1, 64, 40, 1}, {1, 1, 4, 4}}) {
        Buffer qkv(B * T * 3 * C), out(B * T * C), logsumexp(B * NH * T);
        Buffer scratch = attention_scratch(T);
        qkv.normal(1, 2);
        attention_forward(out, logsumexp, qkv, scratch, Dropout{}, B, T, C, NH);
        std::vector<double> expected;
        plain_attention(expected, qkv, B, T, C, NH);
        for (size_t i = 0; i < expected.size();
             i++)  // scores near 10, so their rounding is 10 eps of a weight
            EXPECT_TRUE(std::abs(double(out[i]) - expected[i]) <= 60 * kEps) << "at " << i;
        for (real value : logsumexp) EXPECT_TRUE(std::isfinite(value));
    }
}

TEST(Layer, GeluKeepsItsDigitsFromEndToEnd) {
    std::vector<double> points = {0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 100, -100, 1e5, -1e5};
    for (double x = -9; x <= 9; x += 0.0137) points.push_back(x);
    Buffer inp(points.size()), out(points.size());
    std::transform(points.begin(), points.end(), inp.begin(), [](double x) { return real(x); });
    gelu_forward(out, inp, inp.size());
    for (size_t i = 0; i < inp.size(); i++) {
        double x = double(inp[i]), u = std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x);
        double expected = x / (1 + std::exp(-2 * u));
        // relative: 4 roundings of u reach the result times |2u|
        double bound = std::abs(expected) * kEps * (4 + 8 * std::abs(u)) + 1e-30;
        EXPECT_TRUE(std::abs(double(out[i]) - expected) <= bound)
            << "gelu(" << x << ") = " << out[i];
    }
}

TEST(Layer, SoftmaxOfExtremeLogitsIsFinite) {
    int V = 5, Vp = 128;
    for (double size : {1e3, 1e6, 1e30}) {
        Buffer logits(Vp), losses(1);
        logits.fill(kNaN);  // the padding must not be read
        for (int j = 0; j < V; j++) logits[j] = real(j == 3 ? size : -size);
        int target = 3;
        classifier_forward(losses, logits, &target, 1, true, 1, V, Vp);
        EXPECT_EQ(losses[0], 0);
        for (int j = 0; j < Vp; j++) EXPECT_TRUE(std::abs(logits[j]) <= 1e-37) << j;
    }
}

TEST(Layer, NaNGoesThroughEveryLayer) {
    Buffer inp(4), out(4), mean(1), rstd(1), weight(4), logits(128), losses(1);
    weight.fill(1), inp.fill(1), logits.fill(0);
    inp[2] = kNaN, logits[2] = kNaN;
    gelu_forward(out, inp, 4);
    EXPECT_TRUE(std::isnan(out[2]));
    layernorm_forward(out, mean, rstd, inp, weight, nullptr, 1e-5, 1, 1, 4);
    EXPECT_TRUE(std::isnan(out[0]));
    int target = 1;
    classifier_forward(losses, logits, &target, 1, false, 1, 100, 128);
    EXPECT_TRUE(std::isnan(losses[0]));
    EXPECT_TRUE(std::isnan(global_norm(inp, 4)));
}

// Dropout keeps 1 - p of the elements and their mean, and decides by place alone: the same for a
// sequence wherever it stands in a micro-batch, different for another step, layer, use, seed or
// sequence.
TEST(Layer, DropoutDependsOnItsKeyAndPlaceAlone) {
    int B = 4, T = 33, C = 61;
    size_t row = size_t(T * C);
    Dropout dropout{0.25, 1, 2, 0, RandomUse::encoder, 0};
    Buffer ones(size_t(B) * row), whole(ones.size()), part(2 * row);
    ones.fill(1);
    dropout_forward(whole, ones, dropout, B, T, C);
    double kept = 0;
    for (real value : whole) {
        EXPECT_TRUE(value == 0 || std::abs(double(value) - 4.0 / 3) <= kEps * 4);
        kept += value != 0;
    }
    double deviation = std::sqrt(0.25 * 0.75 / double(whole.size()));
    EXPECT_AT_MOST(std::abs(kept / double(whole.size()) - 0.75), 4 * deviation);

    dropout.first_sequence = 2;
    dropout_forward(part, ones, dropout, 2, T, C);
    EXPECT_EQ(largest_difference(part, whole + 2 * row, 2 * row), 0);
    auto differs = [&](Dropout other) {
        dropout_forward(part, ones, other, 2, T, C);
        EXPECT_GT(largest_difference(part, whole + 2 * row, 2 * row), 0);
    };
    Dropout other = dropout;
    differs((other.seed = 9, other)), other = dropout;
    differs((other.step = 9, other)), other = dropout;
    differs((other.layer = 9, other)), other = dropout;
    differs((other.use = RandomUse::mlp_projection, other)), other = dropout;
    differs((other.first_sequence = 0, other));
}

// A joined name computes what its parts do, bit for bit.
TEST(Layer, JointsAgreeWithTheirParts) {
    for (auto [B, T, C, NH] : {Sizes{3, 17, 15, 3}, {1, 1, 1, 1}, {2, 9, 130, 2}}) {
        for (double probability : {0.0, 0.3}) {
            size_t BT = size_t(B * T), N = BT * size_t(C);
            Dropout dropout{probability, 7, 3, 5, RandomUse::attention_projection, NH};
            Buffer inp(N), branch(N), weight(C), bias(C), dropped(N), sum(N), norm(N), mean(BT);
            Buffer rstd(BT), residual(N), out(N), out_mean(BT), out_rstd(BT);
            inp.normal(1), branch.normal(2), weight.normal(3), bias.normal(4);
            for (const real* added :
                 {static_cast<const real*>(nullptr), static_cast<const real*>(bias)}) {
                dropout_forward(dropped, branch, dropout, B, T, C);
                for (size_t i = 0; i < N; i++)
                    sum[i] = inp[i] + (probability > 0 ? dropped : branch)[i];
                layernorm_forward(norm, mean, rstd, sum, weight, added, 1e-5, B, T, C);
                residual_layernorm_forward(residual, out, out_mean, out_rstd, inp, branch, weight,
                                           added, 1e-5, dropout, B, T, C);
                EXPECT_EQ(largest_difference(residual, sum, N), 0);
                EXPECT_EQ(largest_difference(out, norm, N), 0);
                EXPECT_EQ(largest_difference(out_mean, mean, BT), 0);
                EXPECT_EQ(largest_difference(out_rstd, rstd, BT), 0);
            }
        }
    }
    constexpr int BT = 21, C = 13, OC = 34;
    Buffer inp(BT * C), weight(OC * C), bias(OC), pre(BT * OC), act(pre.size()), pre2(pre.size()),
        act2(pre.size());
    inp.normal(1), weight.normal(2), bias.normal(3);
    matmul_forward(pre, inp, weight, bias, BT, C, OC);
    gelu_forward(act, pre, pre.size());
    matmul_gelu_forward(act2, pre2, inp, weight, bias, BT, C, OC);
    EXPECT_EQ(largest_difference(pre, pre2, pre.size()), 0);
    EXPECT_EQ(largest_difference(act, act2, act.size()), 0);
}

TEST(Layer, PhiloxGivesThePublishedNumbers) {  // the known answers of Random123 1.09, philox4x32 10
    Philox zero = philox(0, 0, 0, 0, 0);
    EXPECT_EQ(zero.word[0], 0x6627e8d5u);
    EXPECT_EQ(zero.word[1], 0xe169c58du);
    EXPECT_EQ(zero.word[2], 0xbc57ac4cu);
    EXPECT_EQ(zero.word[3], 0x9b00dbd8u);
    Philox ones = philox(~0ull, ~0u, ~0u, ~0u, ~0u);
    EXPECT_EQ(ones.word[0], 0x408f276du);
    EXPECT_EQ(ones.word[1], 0x41c83b0eu);
    EXPECT_EQ(ones.word[2], 0xa20bc7c6u);
    EXPECT_EQ(ones.word[3], 0x6d5451fdu);
}

TEST(Layer, AdamWAgreesWithTheEquations) {
    size_t N = 1001;
    Buffer p(N), m(N), v(N), g(N);
    p.normal(1), m.normal(2, 0.1), g.normal(3);
    for (size_t i = 0; i < N; i++) v[i] = g[i] * g[i] + real(0.01);
    AdamW adamw{0.01, 0.9, 0.95, 1e-8, 0.1, 1, 3};
    Buffer p0(p), m0(m), v0(v);
    adamw_update(p, m, v, g, N, adamw, 0.1, 0.5);
    for (size_t i = 0; i < N; i++) {
        double gradient = double(g[i]) * 0.5;
        double mean = 0.9 * double(m0[i]) + 0.1 * gradient,
               square = 0.95 * double(v0[i]) + 0.05 * gradient * gradient;
        double step =
            mean / (1 - std::pow(0.9, 3)) / (std::sqrt(square / (1 - std::pow(0.95, 3))) + 1e-8);
        double expected = double(p0[i]) * (1 - 0.01 * 0.1) - 0.01 * step;
        EXPECT_TRUE(std::abs(double(p[i]) - expected) <= 4 * kEps * (std::abs(expected) + 0.01))
            << i;
        EXPECT_TRUE(std::abs(double(m[i]) - mean) <= 4 * kEps) << i;
        EXPECT_TRUE(std::abs(double(v[i]) - square) <= 4 * kEps * (1 + square)) << i;
    }
}

}  // namespace

// ==== the model ==================================================================================

namespace {

std::vector<real> all_of_group(const GPT2* model, Group group) {
    std::vector<real> all;
    ParameterTable table = parameter_table(gpt2_config(model));
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        for (int layer = 0; row.present && layer < int(row.count); layer++) {
            std::vector<real> values(row.file_size());
            gpt2_copy_out(model, group, index, layer, values.data());
            all.insert(all.end(), values.begin(), values.end());
        }
    }
    return all;
}

TEST(Model, NamedSizesAreTheFamily) {
    constexpr std::pair<const char*, size_t> kPublished[] = {{"gpt2", 124439808},
                                                             {"gpt2-medium", 354823168},
                                                             {"gpt2-large", 774030080},
                                                             {"gpt2-xl", 1557611200}};
    for (auto [name, parameters] : kPublished) {
        GPT2Config config;
        ASSERT_TRUE(named_config(name, &config));
        validate(config);
        EXPECT_EQ(count_parameters(config), parameters) << name;
    }
    for (auto [name, layers] :
         {std::pair("d12", "gpt2"), {"d24", "gpt2-medium"}, {"d36", "gpt2-large"}}) {
        GPT2Config mine, family;
        ASSERT_TRUE(named_config(name, &mine) && named_config(layers, &family));
        EXPECT_EQ(mine.channels, family.channels) << name;
    }
    GPT2Config config;
    ASSERT_TRUE(named_config("d48", &config));
    EXPECT_EQ(config.channels, 1600);
    EXPECT_EQ(config.heads, 25);
    for (int layers = 1; layers <= 60; layers++) {
        ASSERT_TRUE(named_config("d" + std::to_string(layers), &config));
        validate(config);
    }
    for (const char* name : {"", "d", "d0", "dx", "gpt3", "d12x", "d12345"})
        EXPECT_FALSE(named_config(name, &config)) << name;
}

TEST(Model, ConfigurationRefusalsSayWhatFits) {
    GPT2Config config;
    config.heads = 5, config.channels = 64;
    EXPECT_EQ(error_of([&] { validate(config); }),
              "2 --heads 5 --channels 64: heads must divide channels; 4 or 8 heads would fit, or "
              "60 or 65 channels");
    config = GPT2Config{}, config.heads = 800;
    EXPECT_NE(error_of([&] { validate(config); }).find("768 heads would fit, or 800 channels"),
              std::string::npos);
    for (int GPT2Config::*field :
         {&GPT2Config::vocab_size, &GPT2Config::context, &GPT2Config::layers, &GPT2Config::heads,
          &GPT2Config::channels}) {
        for (int value : {0, -1, INT32_MIN, INT32_MAX}) {
            config = GPT2Config{}, config.*field = value;
            EXPECT_EQ(error_of([&] { validate(config); }).substr(0, 2), "2 ");
        }
    }
    for (double value : {-0.1, 1.0, double(NAN), double(INFINITY)}) {
        config = GPT2Config{}, config.dropout = value;
        EXPECT_EQ(error_of([&] { validate(config); }).substr(0, 2), "2 ");
    }
}

TEST(Model, InitialisationFollowsTheTable) {
    GPT2Config config;
    named_config("tiny", &config);
    config.vocab_size = 1000;
    GPT2Ptr model(gpt2_create(config, training_shape(1, 8), 0, 1));
    gpt2_initialise(model.get(), 42);
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        if (!row.present) continue;
        std::vector<real> values(row.file_size());
        gpt2_copy_out(model.get(), Group::parameters, index, int(row.count) - 1, values.data());
        double mean = 0, square = 0, n = double(values.size());
        for (real value : values)
            mean += double(value) / n, square += double(value) * double(value) / n;
        double deviation = row.init == Init::normal     ? 0.02
                           : row.init == Init::residual ? 0.02 / 2
                                                        : 0;
        if (deviation == 0) {
            EXPECT_EQ(mean, row.init == Init::ones ? 1 : 0) << row.name;
            continue;
        }
        EXPECT_AT_MOST(std::abs(mean), 5 * deviation / std::sqrt(n));
        EXPECT_AT_MOST(std::abs(std::sqrt(square) / deviation - 1), 5 / std::sqrt(2 * n));
    }
    std::vector<real> first = all_of_group(model.get(), Group::parameters);
    gpt2_initialise(model.get(), 42);
    EXPECT_EQ(first, all_of_group(model.get(), Group::parameters));
    gpt2_initialise(model.get(), 43);
    EXPECT_NE(first, all_of_group(model.get(), Group::parameters));
}

// The loss of a fresh model is near that of a uniform guess.
TEST(Model, FirstLossIsNearLogV) {
    GPT2Config config = odd_config();
    GPT2Ptr model(gpt2_create(config, training_shape(3, 17), 0, 1));
    gpt2_initialise(model.get(), 1);
    Batch batch(3, 17, config.vocab_size, 1);
    EXPECT_NEAR(forward_loss(model.get(), batch, 3, 17, GPT2Pass{}), std::log(61), 0.1);
}

// Padding never takes part: a step leaves the padded rows of embedding, gradient and moments zero,
// and logits end at V. Seen through the loss: the same model in a vocabulary that needs no padding
// gives the same numbers.
TEST(Model, PaddedVocabularyChangesNothing) {
    GPT2Config config = odd_config();
    config.vocab_size = 127;  // padded to 128
    GPT2Ptr model = random_model(config, training_shape(2, 9));
    Batch batch(2, 9, config.vocab_size, 3);
    Buffer logits(size_t(2 * 9 * config.vocab_size));
    GPT2Pass pass;
    pass.logits = logits;
    pass.training = true;
    for (int step = 1; step <= 5; step++) {
        forward_loss(model.get(), batch, 2, 9, pass);
        gpt2_backward(model.get());
        gpt2_update(model.get(), AdamW{0.1, 0.9, 0.95, 1e-8, 0.1, 1, uint64_t(step)});
    }
    double loss = forward_loss(model.get(), batch, 2, 9, pass), expected = 0;
    for (size_t bt = 0; bt < 18; bt++) {
        double sum = 0;
        for (int j = 0; j < 127; j++) sum += std::exp(double(logits[bt * 127 + size_t(j)]));
        expected += (std::log(sum) - double(logits[bt * 127 + size_t(batch.targets[bt])])) / 18;
    }
    EXPECT_AT_MOST(std::abs(loss - expected), 20 * kEps * std::max(1.0, std::abs(expected)));
}

TEST(Model, SameBitsEveryTime) {
    GPT2Config config = odd_config();
    config.dropout = 0.1;
    std::vector<real> first;
    for (int run = 0; run < 4; run++) {
        GPT2Ptr model = random_model(config, training_shape(3, 17));
        for (int step = 1; step <= 3; step++) {
            Batch batch(3, 17, config.vocab_size, unsigned(step));
            forward_loss(model.get(), batch, 3, 17,
                         GPT2Pass{true, 0, 1, uint64_t(step), 0, nullptr});
            gpt2_backward(model.get());
            gpt2_update(model.get(), AdamW{0.01, 0.9, 0.95, 1e-8, 0.1, 1, uint64_t(step)});
        }
        std::vector<real> result = all_of_group(model.get(), Group::parameters);
        if (run == 0) first = result;
        EXPECT_EQ(first, result) << "run " << run;
    }
}

// Four sequences in one pass, in four, or in pieces of unequal size: one gradient, with dropout and
// ignored targets.
TEST(Model, AccumulationIsTheMeanHoweverCut) {
    constexpr int B = 4, T = 11;
    GPT2Config config = odd_config();
    config.dropout = 0.2;
    Batch batch(B, T, config.vocab_size, 1, true);
    std::vector<real> whole;
    double whole_loss = 0;
    for (const std::vector<int>& cut : {std::vector<int>{4}, {1, 1, 1, 1}, {3, 1}, {1, 2, 1}}) {
        GPT2Ptr model = random_model(config, training_shape(B, T));
        gpt2_zero_gradients(model.get());
        int first = 0;
        for (int rows : cut) {
            GPT2Pass pass{true, batch.scale, 1, 2, uint64_t(first), nullptr};
            gpt2_forward(model.get(), batch.inputs.data() + first * T,
                         batch.targets.data() + first * T, rows, T, pass);
            gpt2_backward(model.get());
            first += rows;
        }
        std::vector<real> gradients = all_of_group(model.get(), Group::gradients);
        double loss = gpt2_stats(model.get()).loss;
        if (whole.empty()) whole = gradients, whole_loss = loss;
        // sums of 44 terms, reordered
        double bound = tolerance(100, 4) * largest_magnitude(whole.data(), whole.size());
        EXPECT_AT_MOST(largest_difference(gradients.data(), whole.data(), whole.size()), bound);
        EXPECT_AT_MOST(std::abs(loss - whole_loss), tolerance(20, 1) * whole_loss);
    }
}

// More rows than the classifier holds at a time, and more queries than a block of attention.
TEST(Model, LargeBatchesAreCutWithoutASeam) {
    GPT2Config config = odd_config();
    config.context = 150;
    constexpr int B = 4, T = 150;
    Batch batch(B, T, config.vocab_size, 1);
    GPT2Ptr model = random_model(config, training_shape(B, T));
    Buffer together(size_t(B * T * config.vocab_size)), apart(together.size());
    GPT2Pass pass;
    pass.logits = together;
    gpt2_forward(model.get(), batch.inputs.data(), batch.targets.data(), B, T, pass);
    for (int b = 0; b < B; b++) {
        pass.logits = apart + size_t(b * T * config.vocab_size);
        gpt2_forward(model.get(), batch.inputs.data() + b * T, nullptr, 1, T, pass);
    }
    double bound = tolerance(200, 4) * largest_magnitude(together, together.size());
    EXPECT_AT_MOST(largest_difference(together, apart, together.size()), bound);
}

// Passes that the classifier cuts give what passes give that it holds whole; so does generation.
TEST(Model, RowsBeyondThoseOfTheClassifierAreCutWithoutASeam) {
    GPT2Config config = odd_config();
    config.layers = 1, config.heads = 1, config.channels = 8, config.context = 8;
    constexpr int T = 8;
    int held = int(gpt2_sizes(config, training_shape(1, T)).classifier_rows);
    int B = (held + held / 4) / T;
    Batch batch(B, T, config.vocab_size, 1, true);
    auto V = size_t(config.vocab_size), rows = size_t(B * T);
    Buffer together(rows * V), apart(rows * V);
    std::vector<real> gradients[2];
    double losses[2];
    for (int parts : {1, 2}) {
        GPT2Ptr model = random_model(config, training_shape(B, T));
        gpt2_zero_gradients(model.get());
        for (int part = 0; part < parts; part++) {
            size_t first = rows / size_t(parts) * size_t(part);
            GPT2Pass pass{true, batch.scale, 1, 2, first / T, nullptr};
            pass.logits = (parts == 1 ? together : apart) + first * V;
            gpt2_forward(model.get(), &batch.inputs[first], &batch.targets[first], B / parts, T,
                         pass);
            gpt2_backward(model.get());
        }
        gradients[parts - 1] = all_of_group(model.get(), Group::gradients);
        losses[parts - 1] = gpt2_stats(model.get()).loss;
    }
    EXPECT_AT_MOST(largest_difference(together, apart, together.size()),
                   tolerance(20, 2) * largest_magnitude(together, together.size()));
    EXPECT_AT_MOST(std::abs(losses[0] - losses[1]), tolerance(20, 1) * losses[1]);
    // sums over all rows, reordered
    EXPECT_AT_MOST(
        largest_difference(gradients[0].data(), gradients[1].data(), gradients[0].size()),
        tolerance(1000, 4) * largest_magnitude(gradients[1].data(), gradients[1].size()));

    // One new token for more sequences than that: the same token, the same logits.
    int sequences = held + held / 4;
    GPT2Ptr model = random_model(config, test_shape(sequences, 1, false, sequences));
    std::vector<int> tokens(static_cast<size_t>(sequences));
    for (size_t b = 0; b < tokens.size(); b++) tokens[b] = int(b % V);
    Buffer logits(tokens.size() * V), first_ones(logits.size());
    gpt2_generate(model.get(), tokens.data(), sequences, 1, 0, logits);
    for (size_t i = 0; i < logits.size(); i++) first_ones[i] = logits[i % (V * V)];
    EXPECT_AT_MOST(largest_difference(logits, first_ones, logits.size()),
                   tolerance(20, 2) * largest_magnitude(logits, logits.size()));
}

// A model with dropout is, where it is not trained, the model without.
TEST(Model, NothingIsDroppedOutsideTraining) {
    GPT2Config config = odd_config();
    Batch batch(3, 17, config.vocab_size, 1);
    double losses[2];
    for (int drops : {0, 1}) {
        config.dropout = drops * 0.5;
        GPT2Ptr model = random_model(config, training_shape(3, 17));
        losses[drops] = forward_loss(model.get(), batch, 3, 17, GPT2Pass{});
    }
    EXPECT_EQ(losses[0], losses[1]);
}

// A token changes no logits before it.
TEST(Model, AttentionIsCausal) {
    GPT2Config config = odd_config();
    config.context = 140;
    constexpr int T = 140;
    Batch batch(1, T, config.vocab_size, 1);
    GPT2Ptr model = random_model(config, test_shape(1, T));
    size_t V = size_t(config.vocab_size);
    Buffer before(T * V), after(T * V);
    GPT2Pass pass;
    for (int changed : {0, 1, 63, 64, 65, 127, 139}) {
        pass.logits = before;
        gpt2_forward(model.get(), batch.inputs.data(), nullptr, 1, T, pass);
        batch.inputs[size_t(changed)] ^= 1;
        pass.logits = after;
        gpt2_forward(model.get(), batch.inputs.data(), nullptr, 1, T, pass);
        EXPECT_EQ(largest_difference(before, after, size_t(changed) * V), 0) << changed;
        EXPECT_GT(largest_difference(before + size_t(changed) * V, after + size_t(changed) * V, V),
                  0)
            << changed;
    }
}

// The key-value cache: any way of feeding a sequence gives the logits of the whole forward pass.
TEST(Model, GenerationAgreesWithForward) {
    GPT2Config config = odd_config();
    constexpr int B = 3, T = 19;
    Batch batch(B, T, config.vocab_size, 1);
    for (bool tied : {true, false}) {
        config.tied = tied;
        GPT2Ptr model = random_model(config, test_shape(B, 7, false, B));
        GPT2Ptr whole = random_model(config, test_shape(B, T));
        size_t V = size_t(config.vocab_size);
        Buffer expected(B * T * V);
        GPT2Pass pass;
        pass.logits = expected;
        gpt2_forward(whole.get(), batch.inputs.data(), nullptr, B, T, pass);
        for (const std::vector<int>& cut :
             {std::vector<int>{19}, {1, 1, 1, 16}, {5, 14}, {18, 1}}) {
            int position = 0;
            for (int n : cut) {
                std::vector<int> tokens;
                for (int b = 0; b < B; b++)
                    tokens.insert(tokens.end(), batch.inputs.begin() + b * T + position,
                                  batch.inputs.begin() + b * T + position + n);
                Buffer logits(B * V);
                gpt2_generate(model.get(), tokens.data(), B, n, position, logits);
                position += n;
                for (int b = 0; b < B; b++)
                    EXPECT_AT_MOST(
                        largest_difference(logits + size_t(b) * V,
                                           expected + size_t(b * T + position - 1) * V, V),
                        tolerance(200, 4) * largest_magnitude(expected, expected.size()));
            }
        }
    }
}

// Sampling between a forward and a backward pass of other steps must not disturb training.
TEST(Model, GenerationLeavesTrainingAlone) {
    GPT2Config config = odd_config();
    std::vector<real> gradients[2];
    for (int generates : {0, 1}) {
        GPT2Ptr model = random_model(config, training_shape(2, 9, 1));
        Batch batch(2, 9, config.vocab_size, 1);
        Buffer logits(size_t(config.vocab_size));
        std::vector<int> prompt = random_ids(12, config.vocab_size, 4);
        if (generates) gpt2_generate(model.get(), prompt.data(), 1, 12, 0, logits);
        forward_loss(model.get(), batch, 2, 9, GPT2Pass{true, 0, 0, 0, 0, nullptr});
        gpt2_backward(model.get());
        gradients[generates] = all_of_group(model.get(), Group::gradients);
    }
    EXPECT_EQ(gradients[0], gradients[1]);
}

TEST(Model, OverfitsOneBatch) {
    GPT2Config config;
    named_config("tiny", &config);
    config.vocab_size = 257, config.context = 16, config.channels = 64;
    GPT2Ptr model(gpt2_create(config, training_shape(2, 16), 0, 1));
    gpt2_initialise(model.get(), 1);
    Batch batch(2, 16, config.vocab_size, 1);
    double loss = 0;
    for (int step = 1; step <= 150; step++) {
        loss = forward_loss(model.get(), batch, 2, 16, GPT2Pass{true, 0, 0, 0, 0, nullptr});
        gpt2_backward(model.get());
        gpt2_update(model.get(), AdamW{3e-3, 0.9, 0.95, 1e-8, 0, 1, uint64_t(step)});
    }
    EXPECT_AT_MOST(loss, 0.01);
}

TEST(Model, UpdateOfABadStepChangesNothing) {
    GPT2Config config = odd_config();
    GPT2Ptr model = random_model(config, training_shape(2, 9));
    Buffer bias(size_t(config.channels));
    bias.fill(0);
    bias[1] = kNaN;
    gpt2_copy_in(model.get(), Group::parameters, k_lnfb, 0, bias);
    Batch batch(2, 9, config.vocab_size, 1);
    forward_loss(model.get(), batch, 2, 9, GPT2Pass{true, 0, 0, 0, 0, nullptr});
    gpt2_backward(model.get());
    auto bits = [&] {
        std::vector<real> all = all_of_group(model.get(), Group::parameters);
        return hash_bytes(all.data(), all.size() * sizeof(real));
    };
    uint64_t before = bits();
    gpt2_update(model.get(), AdamW{});
    EXPECT_FALSE(std::isfinite(gpt2_stats(model.get()).loss));
    EXPECT_EQ(before, bits());
    for (real value : all_of_group(model.get(), Group::first_moments)) EXPECT_EQ(value, 0);
}

// What backward computes again is what forward computed: every level trains to the same bits, over
// two passes a step, with dropout and without, heads tied and not.
TEST(Model, RecomputingChangesNoBit) {
    constexpr int B = 3, T = 70;
    for (int variant = 0; variant < 3; variant++) {
        GPT2Config config = odd_config();
        config.layers = 3, config.context = T;
        config.dropout = variant == 1 ? 0.2 : 0;
        config.tied = config.bias = variant < 2;
        std::vector<real> expected[3];
        double losses[2] = {0, 0};
        for (int level = 0; level < kRecomputeLevels; level++) {
            GPT2Shape shape = training_shape(B, T, 1);
            shape.recompute = level;
            GPT2Ptr model = random_model(config, shape);
            for (int step = 0; step < 2; step++) {
                Batch batch(B, T, config.vocab_size, unsigned(step), true);
                GPT2Pass pass{true, batch.scale, 1, uint64_t(step), 0, nullptr};
                gpt2_zero_gradients(model.get());
                for (int pass_rows : {2, 1}) {  // the second pass is smaller than the model
                    size_t first = pass.first_sequence * T;
                    gpt2_forward(model.get(), &batch.inputs[first], &batch.targets[first],
                                 pass_rows, T - step, pass);
                    gpt2_backward(model.get());
                    pass.first_sequence += uint64_t(pass_rows);
                }
                double loss = gpt2_stats(model.get()).loss;
                if (level == 0) losses[step] = loss;
                EXPECT_EQ(loss, losses[step]) << "level " << level << ", step " << step;
                AdamW adamw;
                adamw.step = uint64_t(step) + 1;
                gpt2_update(model.get(), adamw);
            }
            std::vector<real> logits(size_t(config.vocab_size));
            std::vector<int> prompt = random_ids(9, config.vocab_size, 3);
            gpt2_generate(model.get(), prompt.data(), 1, 9, 0, logits.data());
            std::vector<real> results[3] = {all_of_group(model.get(), Group::gradients),
                                            all_of_group(model.get(), Group::parameters), logits};
            for (int i = 0; i < 3; i++) {
                if (level == 0) expected[i] = results[i];
                EXPECT_TRUE(results[i] == expected[i])
                    << "result " << i << ", variant " << variant << ", level " << level;
            }
        }
    }
}

// Each row of the tables has its place: what is written to one is not found in another, and the
// numbers between rows take no part in the norm of the gradient.
TEST(Model, RowsAreAlignedAndApart) {
    for (bool tied : {true, false}) {
        GPT2Config config = odd_config();
        config.tied = tied;
        for (const ParameterRow& row : parameter_table(config)) {
            EXPECT_EQ(row.allocated() % kRowAlignment, 0u) << row.name;
            EXPECT_TRUE(row.allocated() - row.size() * row.count < kRowAlignment) << row.name;
        }
        GPT2Ptr model = random_model(config, training_shape(2, 9), 1);
        Batch batch(2, 9, config.vocab_size, 1);
        forward_loss(model.get(), batch, 2, 9, GPT2Pass{true, 0, 0, 0, 0, nullptr});
        gpt2_backward(model.get());
        double squares = 0;
        for (real value : all_of_group(model.get(), Group::gradients))
            squares += double(value) * double(value);
        gpt2_update(model.get(), AdamW{});
        double norm = gpt2_stats(model.get()).grad_norm;
        EXPECT_AT_MOST(std::abs(norm / std::sqrt(squares) - 1), 1e-6);

        ParameterTable table = parameter_table(config);
        auto each = [&](auto f) {
            real number = 1;
            for (size_t group = 0; group < 4; group++)
                for (int index = 0; index < kParameterRows; index++)
                    for (int l = 0;
                         table[size_t(index)].present && l < int(table[size_t(index)].count); l++)
                        f(Group(group), index, l, number++);
        };
        each([&](Group group, int index, int layer, real number) {
            std::vector<real> host(table[size_t(index)].file_size(), number);
            gpt2_copy_in(model.get(), group, index, layer, host.data());
        });
        each([&](Group group, int index, int layer, real number) {
            std::vector<real> host(table[size_t(index)].file_size());
            gpt2_copy_out(model.get(), group, index, layer, host.data());
            EXPECT_TRUE(host == std::vector<real>(host.size(), number))
                << table[size_t(index)].name << ", layer " << layer;
        });
    }
}

// A step is read while the next one is at work: the stats of the update before the last.
TEST(Model, PreviousStatsAreThoseOfTheUpdateBefore) {
    GPT2Config config = odd_config();
    GPT2Ptr model = random_model(config, training_shape(2, 9));
    GPT2Stats before = {};
    for (int step = 1; step <= 4; step++) {
        Batch batch(2, 9, config.vocab_size, unsigned(step));
        forward_loss(model.get(), batch, 2, 9, GPT2Pass{true, 0, 0, 0, 0, nullptr});
        gpt2_backward(model.get());
        gpt2_update(model.get(), AdamW{0.01, 0.9, 0.95, 1e-8, 0.1, 1, uint64_t(step)});
        GPT2Stats previous = gpt2_previous_stats(model.get()), now = gpt2_stats(model.get());
        if (step > 1) {
            EXPECT_EQ(previous.loss, before.loss) << step;
            EXPECT_EQ(previous.grad_norm, before.grad_norm) << step;
        }
        EXPECT_NE(now.loss, before.loss);
        before = now;
        forward_loss(model.get(), batch, 2, 9, GPT2Pass{});  // an evaluation changes neither
        EXPECT_EQ(gpt2_previous_stats(model.get()).loss, previous.loss);
    }
}

// A snapshot is the model as it was when the copy began, whatever the next step does beside it.
TEST(Model, ASnapshotIsTheModelAsItWasWhenItBegan) {
    GPT2Config config = odd_config();
    GPT2Shape shape = training_shape(2, 8);
    shape.snapshot = true;
    GPT2Ptr model(gpt2_create(config, shape, 0, 1));
    gpt2_initialise(model.get(), 3);
    Batch batch(2, 8, config.vocab_size, 4);
    auto step = [&](uint64_t number) {
        gpt2_zero_gradients(model.get());
        GPT2Pass pass;
        pass.training = true, pass.loss_scale = 1.0 / 16;
        gpt2_forward(model.get(), batch.inputs.data(), batch.targets.data(), 2, 8, pass);
        gpt2_backward(model.get());
        AdamW adamw;
        adamw.step = number;
        gpt2_update(model.get(), adamw);
    };
    auto rows = [&](auto copy) {
        std::vector<std::vector<real>> all;
        ParameterTable table = parameter_table(config);
        for (Group group : kSnapshotGroups)
            for (int row = 0; row < kParameterRows; row++)
                for (int layer = 0;
                     table[size_t(row)].present && layer < int(table[size_t(row)].count); layer++) {
                    all.emplace_back(table[size_t(row)].file_size());
                    copy(model.get(), group, row, layer, all.back().data());
                }
        return all;
    };
    auto snapshot = [&](const GPT2* from, Group group, int row, int layer, real* host) {
        const real* numbers = gpt2_snapshot_tensor(from, group, row, layer);
        std::copy(numbers, numbers + parameter_table(config)[size_t(row)].file_size(), host);
    };
    step(1);
    auto before = rows(gpt2_copy_out);
    gpt2_snapshot_begin(model.get());
    step(2);
    gpt2_snapshot_wait(model.get());
    EXPECT_EQ(rows(snapshot), before);
    EXPECT_NE(rows(gpt2_copy_out), before) << "and the step was made";
    gpt2_snapshot_begin(model.get());
    gpt2_snapshot_wait(model.get());
    EXPECT_EQ(rows(snapshot), rows(gpt2_copy_out));
    step(3);
    gpt2_snapshot_begin(model.get());  // before the host has waited for the step
    gpt2_snapshot_wait(model.get());
    EXPECT_EQ(rows(snapshot), rows(gpt2_copy_out));
}

// What the host writes comes after the update that is under way, and after the snapshot of what it
// replaces.
TEST(Model, WhatIsWrittenWaitsForWhatIsUnderWay) {
    GPT2Config config = odd_config();
    GPT2Shape shape = training_shape(2, 8);
    shape.snapshot = true;
    GPT2Ptr model = random_model(config, shape);
    Batch batch(2, 8, config.vocab_size, 4);
    std::vector<real> before(parameter_table(config)[k_lnfw].file_size()), after(before.size());
    gpt2_copy_out(model.get(), Group::parameters, k_lnfw, 0, before.data());
    gpt2_snapshot_begin(model.get());
    std::vector<real> written(before.size(), 3);
    gpt2_copy_in(model.get(), Group::parameters, k_lnfw, 0, written.data());
    const real* kept = gpt2_snapshot_tensor(model.get(), Group::parameters, k_lnfw, 0);
    EXPECT_EQ(std::vector<real>(kept, kept + before.size()), before);

    forward_loss(model.get(), batch, 2, 8, GPT2Pass{true, 0, 0, 0, 0, nullptr});
    gpt2_backward(model.get());
    AdamW adamw;
    adamw.step = 1;
    gpt2_update(model.get(), adamw);
    gpt2_copy_in(model.get(), Group::parameters, k_lnfw, 0, written.data());
    gpt2_copy_out(model.get(), Group::parameters, k_lnfw, 0, after.data());
    EXPECT_EQ(after, written);
}

TEST(Model, TooLargeForTheMachineIsSaidBeforeItIsAllocated) {
    GPT2Config config;
    named_config("gpt2-xl", &config);
    config.layers = 900, config.channels = 4096, config.heads = 64;
    std::string error =
        error_of([&] { gpt2_destroy(gpt2_create(config, training_shape(1, 64), 0, 1)); });
    EXPECT_EQ(error.substr(0, 18), "1 out of memory: p") << error;
    EXPECT_NE(error.find("a smaller --model would fit"), std::string::npos) << error;
}

}  // namespace

// ==== golden: PyTorch's results for small models ================================================

namespace {

// What dev/reference/make_fixtures.py wrote: a small GPT-2, a batch, and PyTorch's float64 results
// for them, each with the error that PyTorch itself makes in float32, in bf16 and in float64
// (dev/reference/README.md).
constexpr const char* kFixtureFolder = "dev/reference/fixtures/";
constexpr const char* kFixtures[] = {"odd", "least", "masked", "untied", "long"};

struct Fixture {
    explicit Fixture(const std::string& name) : file(kFixtureFolder + name + ".safetensors") {
        json facts = parse_json(file.metadata().at("fixture"), file.path());
        const json& sizes = facts.at("config");
        config.vocab_size = sizes.at("vocab_size");
        config.context = sizes.at("n_positions");
        config.layers = sizes.at("n_layer");
        config.heads = sizes.at("n_head");
        config.channels = sizes.at("n_embd");
        config.hidden = sizes.at("n_inner").is_null() ? 0 : int(sizes.at("n_inner"));
        config.tied = sizes.at("tie_word_embeddings");
        config.layer_norm_epsilon = sizes.at("layer_norm_epsilon");
        const json& recipe = facts.at("adamw");
        steps = recipe.at("steps");
        adamw.learning_rate = recipe.at("learning_rate");
        adamw.beta1 = recipe.at("beta1");
        adamw.beta2 = recipe.at("beta2");
        adamw.epsilon = recipe.at("epsilon");
        adamw.weight_decay = recipe.at("weight_decay");
        adamw.grad_clip = recipe.at("grad_clip");
        read_tokens();
    }

    // (B, T+1) ids are inputs and, one place on, targets; -1 is no target, and 0 where it is an
    // input.
    void read_tokens() {
        const auto& shape = file.entry("tokens").shape;
        B = int(shape.at(0)), T = int(shape.at(1)) - 1;
        std::vector<int> ids(file.entry("tokens").count());
        file.read("tokens", ids.data());
        for (int b = 0; b < B; b++) {
            for (int t = 0; t < T; t++) {
                const int* id = &ids[size_t(b) * size_t(T + 1) + size_t(t)];
                inputs.push_back(std::max(id[0], 0));
                targets.push_back(id[1]);
                counted += id[1] >= 0;
            }
        }
    }

    std::vector<double> read(const std::string& name) const {
        std::vector<double> values(file.entry(name).count());
        file.read(name, values.data());
        return values;
    }

    SafetensorsFile file;
    GPT2Config config;
    AdamW adamw;
    int steps = 0, B = 0, T = 0, counted = 0;
    std::vector<int> inputs, targets;
};

// Calls f(index, row, layer, name) for each tensor of the model, with its Hugging Face name.
template <typename F>
void for_each_tensor(const GPT2Config& config, F f) {
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        for (int layer = 0; row.present && layer < int(row.count); layer++)
            f(index, row, layer, hf_name(row, layer));
    }
}

// Between our order, (outputs, inputs), and the file's, (inputs, outputs), where they differ.
void to_file_order(const ParameterRow& row, const std::vector<real>& ours,
                   std::vector<real>* file) {
    *file = ours;
    if (!row.transposed) return;
    for (size_t r = 0; r < row.file_rows; r++)
        for (size_t c = 0; c < row.cols; c++)
            (*file)[c * row.file_rows + r] = ours[r * row.cols + c];
}

void from_file_order(const ParameterRow& row, const std::vector<double>& file,
                     std::vector<real>* ours) {
    ours->assign(file.begin(), file.end());
    if (!row.transposed) return;
    for (size_t r = 0; r < row.file_rows; r++)
        for (size_t c = 0; c < row.cols; c++)
            (*ours)[r * row.cols + c] = real(file[c * row.file_rows + r]);
}

// A model that trains, with the fixture's parameters, for `rows` sequences at a time.
GPT2Ptr fixture_model(const Fixture& fixture, int rows) {
    GPT2Ptr model(gpt2_create(fixture.config, training_shape(rows, fixture.T), 0, 1));
    for_each_tensor(fixture.config,
                    [&](int index, const ParameterRow& row, int layer, std::string name) {
                        std::vector<real> host;
                        from_file_order(row, fixture.read("start." + name), &host);
                        gpt2_copy_in(model.get(), Group::parameters, index, layer, host.data());
                    });
    return model;
}

// Gradients and loss of the whole batch, `rows` sequences a pass; logits (B,T,V) when asked. `rows`
// divides B.
void fixture_gradients(GPT2* model, const Fixture& fixture, int rows, real* logits = nullptr) {
    gpt2_zero_gradients(model);
    GPT2Pass pass;
    pass.training = true;
    pass.loss_scale = 1.0 / fixture.counted;
    for (int b = 0; b < fixture.B; b += rows) {
        size_t first = size_t(b) * size_t(fixture.T);
        pass.first_sequence = uint64_t(b);
        pass.logits =
            logits == nullptr ? nullptr : logits + first * size_t(fixture.config.vocab_size);
        gpt2_forward(model, &fixture.inputs[first], &fixture.targets[first], rows, fixture.T, pass);
        gpt2_backward(model);
    }
}

// The bound of every golden test. In float each tensor is at most twice as far from PyTorch's
// float64 as PyTorch's float32 is, and in bf16 as PyTorch's bf16 is (with float32 parameters for
// AdamW, as here). PyTorch can be right by luck where a tensor is small, so its error counts as at
// least one unit roundoff of the tensor's largest element. c_attn is judged as
// the query, key and value that it holds. The double build is there to see wrong formulas and
// constants that float's rounding hides; its reference is itself only a float64 result, of which
// the fixtures know the spread. It is given four bits of that, which is some 1e-15 to 1e-13 of the
// largest element, where a constant rounded to float would show as 1e-8.
constexpr double kTimesPyTorch = kDouble ? 16 : 2;

void expect_golden(const Fixture& fixture, const std::string& name, const real* ours) {
    std::vector<double> reference = fixture.read(name);
    bool narrow = test_dtype() == Dtype::bf16;
    const char* kind = kDouble ? "error64." : narrow ? "errorbf16." : "error32.";
    std::vector<double> error = fixture.read(kind + name);
    double roundoff = narrow ? 0x1p-9 : kEps / 2, largest = 0;
    for (double value : reference) largest = std::max(largest, std::abs(value));
    size_t columns = fixture.file.entry(name).shape.back(), width = columns / error.size();
    ASSERT_EQ(width * error.size(), columns) << name;
    for (size_t part = 0; part < error.size(); part++) {
        double distance = 0;
        for (size_t i = part * width; i < reference.size();
             i += (i + 1) % width == 0 ? columns - width + 1 : 1) {
            double difference = std::abs(double(ours[i]) - reference[i]);
            if (!(difference <= distance)) distance = difference;
        }
        double bound = kTimesPyTorch * std::max(error[part], roundoff * largest);
        EXPECT_TRUE(distance <= bound)
            << name << ", part " << part << ": off by " << distance << ", at most " << bound
            << " (largest element " << largest << ")";
    }
}

// Every tensor of a group against PREFIX.NAME of the fixture, and none of the fixture's is left
// out.
void expect_golden_group(const Fixture& fixture, const GPT2* model, Group group,
                         const std::string& prefix) {
    size_t compared = 0, stored = 0;
    for_each_tensor(
        fixture.config, [&](int index, const ParameterRow& row, int layer, std::string name) {
            std::vector<real> ours(row.file_size()), in_order;
            gpt2_copy_out(model, group, index, layer, ours.data());
            to_file_order(row, ours, &in_order);
            ASSERT_EQ(fixture.file.entry(prefix + name).count(), in_order.size()) << name;
            expect_golden(fixture, prefix + name, in_order.data());
            compared++;
        });
    for (const auto& [name, entry] : fixture.file.entries()) stored += name.rfind(prefix, 0) == 0;
    EXPECT_EQ(compared, stored);
}

// Ten losses, each before its update, and the parameters after the last.
void expect_golden_training(const Fixture& fixture, int rows) {
    GPT2Ptr model = fixture_model(fixture, rows);
    std::vector<real> losses;
    AdamW adamw = fixture.adamw;
    for (int step = 0; step < fixture.steps; step++) {
        fixture_gradients(model.get(), fixture, rows);
        losses.push_back(real(gpt2_stats(model.get()).loss));
        adamw.step = uint64_t(step) + 1;
        gpt2_update(model.get(), adamw);
    }
    ASSERT_EQ(fixture.file.entry("losses").count(), losses.size());
    expect_golden(fixture, "losses", losses.data());
    expect_golden_group(fixture, model.get(), Group::parameters, "param.");
}

TEST(Golden, LossAndLogitsAreAtMostTwicePyTorchsErrorOff) {
    for (const char* name : kFixtures) {
        SCOPED_TRACE(name);
        Fixture fixture(name);
        GPT2Ptr model = fixture_model(fixture, fixture.B);
        Buffer logits(fixture.B * fixture.T * fixture.config.vocab_size);
        ASSERT_EQ(fixture.file.entry("logits").count(), logits.size());
        fixture_gradients(model.get(), fixture, fixture.B, logits);
        real loss = real(gpt2_stats(model.get()).loss);
        expect_golden(fixture, "loss", &loss);
        expect_golden(fixture, "logits", logits);
    }
}

TEST(Golden, GradientsAreAtMostTwicePyTorchsErrorOff) {
    for (const char* name : kFixtures) {
        SCOPED_TRACE(name);
        Fixture fixture(name);
        GPT2Ptr model = fixture_model(fixture, fixture.B);
        fixture_gradients(model.get(), fixture, fixture.B);
        expect_golden_group(fixture, model.get(), Group::gradients, "grad.");
    }
}

TEST(Golden, TenStepsOfAdamWAreAtMostTwicePyTorchsErrorOff) {
    for (const char* name : kFixtures) {
        SCOPED_TRACE(name);
        Fixture fixture(name);
        ASSERT_EQ(fixture.steps, 10);
        expect_golden_training(fixture, fixture.B);
    }
}

// The mean is over all targets that count, however they are cut: with ignored ones spread unevenly,
// a mean of the passes' means would be another number.
TEST(Golden, AccumulationOverSequencesHoldsTheSameBounds) {
    for (const char* name : {"odd", "masked", "long"}) {
        SCOPED_TRACE(name);
        Fixture fixture(name);
        for (int rows = 1; rows < fixture.B; rows++) {
            if (fixture.B % rows != 0) continue;
            SCOPED_TRACE(rows);
            GPT2Ptr model = fixture_model(fixture, rows);
            fixture_gradients(model.get(), fixture, rows);
            real loss = real(gpt2_stats(model.get()).loss);
            expect_golden(fixture, "loss", &loss);
            expect_golden_group(fixture, model.get(), Group::gradients, "grad.");
            expect_golden_training(fixture, rows);
        }
    }
}

TEST(Golden, TheFixturesHoldIgnoredTargetsUnevenly) {
    Fixture fixture("masked");
    std::set<int> counts;
    for (int b = 0; b < fixture.B; b++) {
        auto first = fixture.targets.begin() + b * fixture.T;
        counts.insert(int(std::count(first, first + fixture.T, -1)));
    }
    EXPECT_GT(counts.size(), 1u);
    EXPECT_LT(fixture.counted, fixture.B * fixture.T);
}

}  // namespace

// ==== sampler ====================================================================================

namespace {

// The tokens that come up in many draws, and how often.
std::map<int, int> data_draws(Sampler sampler, const std::vector<float>& logits, int draws) {
    std::map<int, int> hits;
    for (int i = 0; i < draws; i++) hits[sampler.sample(logits.data(), int(logits.size())).token]++;
    return hits;
}

std::set<int> data_drawn(SamplerOptions options, const std::vector<float>& logits) {
    std::set<int> tokens;
    for (const auto& [token, hits] : data_draws(Sampler(options, 1), logits, 4000))
        tokens.insert(token);
    return tokens;
}

std::vector<float> data_logits_of(const std::vector<double>& probabilities) {
    std::vector<float> logits;
    for (double p : probabilities) logits.push_back(float(std::log(p)));
    return logits;
}

const float kDataInfinity = std::numeric_limits<float>::infinity();

}  // namespace

TEST(Sampler, DrawsAsOftenAsProbabilitySays) {
    std::vector<double> p = {0.4, 0.05, 0.3, 0.01, 0.24};
    constexpr int kDraws = 100000;
    double chi_square = 0;
    std::map<int, int> hits = data_draws(Sampler({}, 42), data_logits_of(p), kDraws);
    for (size_t i = 0; i < p.size(); i++) {
        double expected = p[i] * kDraws, error = hits[int(i)] - expected;
        chi_square += error * error / expected;
    }
    EXPECT_LT(chi_square, 18.5) << "4 degrees of freedom: one seed in a thousand is above";
    for (double temperature : {0.5, 2.0}) {  // p^(1/temperature), renormalised
        double Z = 0;
        for (double each : p) Z += std::pow(each, 1 / temperature);
        hits = data_draws(Sampler({temperature, 0, 1}, 43), data_logits_of(p), kDraws);
        for (size_t i = 0; i < p.size(); i++) {
            double q = std::pow(p[i], 1 / temperature) / Z;
            EXPECT_NEAR(hits[int(i)], q * kDraws, 4 * std::sqrt(q * kDraws));
        }
    }
}

TEST(Sampler, SuccessiveDrawsAreIndependent) {
    for (uint64_t seed : {0, 1, 2}) {
        std::vector<float> logits(4);
        Sampler sampler({}, seed);
        std::vector<int> pairs(16);
        int last = 0;
        for (int i = 0; i < 64000; i++) {
            int token = sampler.sample(logits.data(), 4).token;
            pairs[size_t(last * 4 + token)]++;
            last = token;
        }
        for (int hits : pairs) EXPECT_NEAR(hits, 4000, 300);
    }
    std::vector<float> logits(1000);  // near seeds are not near in what they draw
    std::set<int> first;
    for (uint64_t seed = 0; seed < 50; seed++)
        first.insert(Sampler({}, seed).sample(logits.data(), 1000).token);
    EXPECT_GT(first.size(), 40u);
}

TEST(Sampler, TopKKeepsExactlyTheMostProbable) {
    std::vector<float> logits = {1, 5, 3, 5, 2, 3};
    EXPECT_EQ(data_drawn({3, 1, 1}, logits), (std::set<int>{1})) << "the lower id among equals";
    EXPECT_EQ(data_drawn({3, 2, 1}, logits), (std::set<int>{1, 3}));
    EXPECT_EQ(data_drawn({3, 3, 1}, logits), (std::set<int>{1, 2, 3}));
    EXPECT_EQ(data_drawn({3, 4, 1}, logits), (std::set<int>{1, 2, 3, 5}));
    for (int k : {0, 6, 7, INT_MAX}) EXPECT_EQ(data_drawn({3, k, 1}, logits).size(), 6u);
    EXPECT_EQ(data_drawn({1, 3, 1}, {0, -kDataInfinity, -kDataInfinity, 0}), (std::set<int>{0, 3}));
}

TEST(Sampler, TopPKeepsTheTokenThatCrosses) {
    std::vector<float> logits = data_logits_of({0.1, 0.4, 0.2, 0.3});
    EXPECT_EQ(data_drawn({1, 0, 0}, logits), (std::set<int>{1})) << "at least one stays";
    EXPECT_EQ(data_drawn({1, 0, 0.39}, logits), (std::set<int>{1}));
    EXPECT_EQ(data_drawn({1, 0, 0.41}, logits), (std::set<int>{1, 3}));
    EXPECT_EQ(data_drawn({1, 0, 0.69}, logits), (std::set<int>{1, 3}));
    EXPECT_EQ(data_drawn({1, 0, 0.71}, logits), (std::set<int>{1, 2, 3}));
    EXPECT_EQ(data_drawn({1, 0, 0.91}, logits), (std::set<int>{0, 1, 2, 3}));
    EXPECT_EQ(data_drawn({1, 0, 0.75}, {0, 0, 0, 0}), (std::set<int>{0, 1, 2}))
        << "p itself is enough";
    EXPECT_EQ(data_drawn({1, 0, 0.4}, {0, 0, 0, 0}), (std::set<int>{0, 1}));
}

TEST(Sampler, TopPComesAfterTemperatureAndTopK) {
    std::vector<float> logits = data_logits_of({0.1, 0.4, 0.2, 0.3});
    // Of the top two, 4/7 and 3/7: 0.6 needs both; of all four it would need 0.4 and 0.3 as well,
    // 0.5 not.
    EXPECT_EQ(data_drawn({1, 2, 0.5}, logits), (std::set<int>{1}));
    EXPECT_EQ(data_drawn({1, 0, 0.5}, logits), (std::set<int>{1, 3}));
    EXPECT_EQ(data_drawn({1, 2, 0.6}, logits), (std::set<int>{1, 3}));
    EXPECT_EQ(data_drawn({0.1, 0, 0.9}, logits), (std::set<int>{1}))
        << "0.4^10 is 95% of the powers";
    EXPECT_EQ(data_drawn({1e6, 0, 0.51}, logits), (std::set<int>{1, 2, 3})) << "nearly uniform";
}

TEST(Sampler, TemperatureZeroIsGreedy) {
    std::vector<float> logits = {1, 7, -kDataInfinity, 7, 6.999f};
    Sampler sampler({0, 3, 0.5}, 9);
    SampledToken sampled = sampler.sample(logits.data(), 5);
    EXPECT_EQ(sampled.token, 1) << "the lowest id among equals";
    EXPECT_EQ(sampled.probability, 1);
    EXPECT_EQ(sampled.entropy, 0);
    logits[1] = 0;
    EXPECT_EQ(sampler.sample(logits.data(), 5).token, 3);
}

TEST(Sampler, TemperatureHasItsLimits) {
    std::vector<float> logits = {1, 7, -kDataInfinity, 6, 5};
    for (double cold : {1e-3, 1e-300, std::numeric_limits<double>::denorm_min()}) {
        EXPECT_EQ(data_drawn({cold, 0, 1}, logits), (std::set<int>{1}));
        SampledToken sampled = Sampler({cold, 0, 0.9}, 1).sample(logits.data(), 5);
        EXPECT_EQ(sampled.probability, 1);
        EXPECT_EQ(sampled.entropy, 0);
    }
    SampledToken hot = Sampler({1e300, 0, 1}, 1).sample(logits.data(), 5);
    EXPECT_DOUBLE_EQ(hot.entropy, std::log(4.0)) << "all equal but the impossible one";
    EXPECT_DOUBLE_EQ(hot.probability, 0.25);
    EXPECT_EQ(data_drawn({1e300, 0, 1}, logits), (std::set<int>{0, 1, 3, 4}));
    std::vector<float> extreme = {std::numeric_limits<float>::max(),
                                  std::numeric_limits<float>::lowest()};
    EXPECT_EQ(data_drawn({1, 0, 1}, extreme), (std::set<int>{0}));
    std::vector<double> wide = {std::numeric_limits<double>::max(),
                                std::numeric_limits<double>::lowest()};
    EXPECT_EQ(Sampler({}, 0).sample(wide.data(), 2).token, 0);
}

TEST(Sampler, EntropyIsThatOfTheDistribution) {
    for (int V : {1, 2, 3, 17, 50257}) {
        std::vector<float> logits(size_t(V), -3.5f);
        EXPECT_DOUBLE_EQ(Sampler({}, 0).sample(logits.data(), V).entropy, std::log(double(V)));
    }
    std::vector<double> p = {0.5, 0.25, 0.125, 0.125}, logits;
    for (double each : p) logits.push_back(std::log(each) + 100);
    Sampler sampler({}, 3);
    for (int i = 0; i < 20; i++) {
        SampledToken sampled = sampler.sample(logits.data(), 4);
        EXPECT_NEAR(sampled.entropy, 1.75 * std::log(2.0), 1e-12);
        EXPECT_NEAR(sampled.probability, p[size_t(sampled.token)], 1e-12);
    }
    SampledToken cut = Sampler({1, 2, 1}, 3).sample(logits.data(), 4);
    double third = 1.0 / 3;
    EXPECT_NEAR(cut.entropy, -2 * third * std::log(2 * third) - third * std::log(third), 1e-12);
    EXPECT_NEAR(cut.probability, cut.token == 0 ? 2 * third : third, 1e-12);
}

TEST(Sampler, IsDeterministic) {
    std::vector<float> logits;
    for (int i = 0; i < 100; i++) logits.push_back(float(i * 37 % 101) / 16);
    auto tokens = [&](Sampler sampler, int count) {
        std::vector<int> drawn;
        for (int i = 0; i < count; i++) drawn.push_back(sampler.sample(logits.data(), 100).token);
        return drawn;
    };
    // Whoever changes these changes what every seed gives.
    EXPECT_EQ(tokens(Sampler({}, 1337), 8), (std::vector<int>{19, 35, 70, 38, 79, 92, 13, 67}));
    EXPECT_EQ(tokens(Sampler({0.8, 10, 1}, 1337), 8),
              (std::vector<int>{60, 90, 8, 19, 38, 98, 30, 79}));
    EXPECT_EQ(tokens(Sampler({1, 0, 0.5}, 1337), 8),
              (std::vector<int>{68, 8, 90, 79, 60, 30, 98, 90}));

    std::vector<int> whole = tokens(Sampler({1, 20, 0.9}, 7), 30);
    Sampler sampler({1, 20, 0.9}, 7);
    for (int i = 0; i < 10; i++) sampler.sample(logits.data(), 100);
    Sampler resumed({1, 20, 0.9}, 0);
    resumed.restore(sampler.state());
    EXPECT_EQ(tokens(resumed, 20), std::vector<int>(whole.begin() + 10, whole.end()));
    EXPECT_EQ(sampler.state().seed, 7u);
    EXPECT_EQ(sampler.state().draws, 10u);
}

TEST(Sampler, RefusesLogitsThatAreNoNumbers) {
    for (double temperature : {0.0, 1.0})
        for (size_t at : {0, 1, 2}) {
            Sampler sampler({temperature, 2, 0.9}, 0);
            std::vector<float> logits = {1, 2, 3};
            logits[at] = std::numeric_limits<float>::quiet_NaN();
            std::string where = "1 token " + std::to_string(at) + " of 3 has logit ";
            EXPECT_EQ(error_of([&] { sampler.sample(logits.data(), 3); }).substr(0, where.size()),
                      where);
            logits[at] = kDataInfinity;
            EXPECT_EQ(error_of([&] { sampler.sample(logits.data(), 3); }).substr(0, where.size()),
                      where);
            logits.assign(3, -kDataInfinity);
            EXPECT_EQ(error_of([&] { sampler.sample(logits.data(), 3); }).substr(0, 28),
                      "1 all 3 logits are -inf; the");
            logits[at] = -5;
            EXPECT_EQ(sampler.sample(logits.data(), 3).token, int(at))
                << "one that is possible is enough";
        }
}

TEST(Sampler, RefusesOptionsOutOfRange) {
    double nan = std::numeric_limits<double>::quiet_NaN(),
           inf = std::numeric_limits<double>::infinity();
    auto error = [](SamplerOptions options) { return error_of([&] { Sampler(options, 0); }); };
    for (double bad : {-1.0, -1e-9, nan, inf, -inf})
        expect_refused(error({bad, 0, 1}), "--temperature");
    for (double bad : {-0.1, 1.0001, nan, inf}) expect_refused(error({1, 0, bad}), "--top-p");
    for (int bad : {-1, INT_MIN}) expect_refused(error({1, bad, 1}), "--top-k");
    EXPECT_EQ(error({0, 0, 0}), "");
    EXPECT_EQ(error({100, INT_MAX, 1}), "");
}

// ==== checkpoint =================================================================================

namespace checkpoint_test {

using Strings = std::vector<std::string>;

// One line, exit code `code`, and `part` in it.
template <typename F>
void expect_failure(F action, int code, const std::string& part) {
    std::string error = error_of(action);
    EXPECT_EQ(error.substr(0, 2), std::to_string(code) + " ") << error << "\nexpected: " << part;
    EXPECT_NE(error.find(part), std::string::npos) << error << "\nexpected: " << part;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
    EXPECT_LT(error.size(), 1000u) << error;
}

// Without the syncs of write_file_atomic, of which there would be thousands (and a file that is cut
// to nothing and written again is synced by some file systems too, hence the removal).
void put_file(const std::string& path, std::string_view content) {
    fs::remove(path);
    FILE* file = fopen(path.c_str(), "wb");
    ASSERT_NE(file, nullptr) << path;
    EXPECT_EQ(fwrite(content.data(), 1, content.size(), file), content.size());
    EXPECT_EQ(fclose(file), 0);
}

// What Python's safetensors 0.8.0 wrote for tensors of six formats, a scalar and an empty one.
const char* const kReferenceHeader =
    R"({"__metadata__":{"format":"pt","note":"a \"quoted\" line"},)"
    R"("i64":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},)"
    R"("f64":{"dtype":"F64","shape":[2,2],"data_offsets":[16,48]},)"
    R"("empty":{"dtype":"F32","shape":[2,0],"data_offsets":[48,48]},)"
    R"("f32":{"dtype":"F32","shape":[4],"data_offsets":[48,64]},)"
    R"("scalar":{"dtype":"F32","shape":[],"data_offsets":[64,68]},)"
    R"("i32":{"dtype":"I32","shape":[2],"data_offsets":[68,76]},)"
    R"("bf16":{"dtype":"BF16","shape":[5],"data_offsets":[76,86]},)"
    R"("f16":{"dtype":"F16","shape":[6],"data_offsets":[86,98]}}    )";
const char* const kReferenceData =
    "ffffff7f0000000000000080ffffffff000000000000f83f9a9999999999b9bf9c7500883ce4377e010000000000"
    "0000cdcccc3d0000008001000000ffff7f7f000020400000008007000000803f01007f7f80ffcd3d003c0100ff7b"
    "007c0080662e";

std::string from_hex(const std::string& hex) {
    std::string bytes;
    for (size_t i = 0; i < hex.size(); i += 2)
        bytes += char(std::stoi(hex.substr(i, 2), nullptr, 16));
    return bytes;
}

std::string with_length(const std::string& header, const std::string& data) {
    std::string length(8, '\0');
    for (int i = 0; i < 8; i++) length[size_t(i)] = char(uint64_t(header.size()) >> 8 * i);
    return length + header + data;
}

std::string reference_file() { return with_length(kReferenceHeader, from_hex(kReferenceData)); }

template <typename To>
std::vector<To> read_all(const SafetensorsFile& file, const std::string& name) {
    std::vector<To> values(file.entry(name).count());
    file.read(name, values.data());
    return values;
}

std::string reference_path() {
    std::string path = join_path(test_folder(), "reference.safetensors");
    put_file(path, reference_file());
    return path;
}

TEST(Safetensors, ReadsWhatTheReferenceImplementationWrote) {
    SafetensorsFile file(reference_path());
    double infinity = std::numeric_limits<double>::infinity();
    EXPECT_EQ(read_all<double>(file, "f64"),
              (std::vector<double>{1.5, -0.1, 0x1.7e43c8800759cp+996, 0x1p-1074}));
    EXPECT_EQ(read_all<double>(file, "f32"),
              (std::vector<double>{0x1.99999ap-4, -0.0, 0x1p-149, 0x1.fffffep+127}));
    EXPECT_EQ(read_all<double>(file, "f16"),
              (std::vector<double>{1, 0x1p-24, 0x1.ffcp+15, infinity, -0.0, 0x1.998p-4}));
    EXPECT_EQ(read_all<double>(file, "bf16"),
              (std::vector<double>{1, 0x1p-133, 0x1.fep+127, -infinity, 0x1.9ap-4}));
    EXPECT_EQ(read_all<float>(file, "bf16")[1], 0x1p-133f);
    EXPECT_EQ(read_all<float>(file, "f64")[1], -0.1f);
    EXPECT_TRUE(std::signbit(read_all<float>(file, "f32")[1]));
    EXPECT_TRUE(std::signbit(read_all<float>(file, "f16")[4]));
    EXPECT_EQ(read_all<int>(file, "i32"), (std::vector<int>{INT_MIN, 7}));
    EXPECT_EQ(read_all<int>(file, "i64"), (std::vector<int>{INT_MAX, INT_MIN}));
    EXPECT_EQ(read_all<float>(file, "scalar"), std::vector<float>{2.5});
    EXPECT_EQ(file.entry("scalar").shape, std::vector<size_t>{});
    EXPECT_EQ(read_all<float>(file, "empty"), std::vector<float>{});
    EXPECT_EQ(file.entry("f64").shape, (std::vector<size_t>{2, 2}));
    EXPECT_EQ(file.metadata().at("note"), "a \"quoted\" line");
    EXPECT_EQ(file.entries().size(), 8u);
    EXPECT_FALSE(file.has("__metadata__"));
}

TEST(Safetensors, WritesTheBytesThatTheReferenceImplementationWrites) {
    std::string path = join_path(test_folder(), "ours.safetensors"),
                data = from_hex(kReferenceData);
    SafetensorsWriter writer(path, {{"note", "a \"quoted\" line"}, {"format", "pt"}});
    writer.add("i64", "I64", {2}, data.data());
    writer.add("empty", "F32", {2, 0}, nullptr);
    writer.add("f32", "F32", {4}, data.data() + 48);
    writer.add("bf16", "BF16", {5}, data.data() + 76);
    writer.add("f16", "F16", {6}, [&] { return static_cast<const void*>(data.data() + 86); });
    writer.add("f64", "F64", {2, 2}, data.data() + 16);
    writer.add("scalar", "F32", {}, data.data() + 64);
    writer.add("i32", "I32", {2}, data.data() + 68);
    FileDigest digest = writer.commit();
    EXPECT_EQ(read_file(path), reference_file());
    EXPECT_EQ(digest, digest_file(path));
    EXPECT_EQ(digest.bytes, reference_file().size());
}

TEST(Safetensors, EveryHalfAndEveryBfloat16HasItsValue) {
    for (int bits = 0; bits < 65536; bits++) {
        int sign = bits & 0x8000 ? -1 : 1;
        auto expected = [&](int exponent_bits, int fraction_bits, int bias) -> double {
            int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
            int fraction = bits & ((1 << fraction_bits) - 1);
            if (exponent == (1 << exponent_bits) - 1) return fraction != 0 ? NAN : sign * INFINITY;
            int whole = exponent == 0 ? 0 : 1 << fraction_bits;
            return sign *
                   std::ldexp(whole + fraction, std::max(exponent, 1) - bias - fraction_bits);
        };
        auto check = [&](float value, double expect) {
            if (std::isnan(expect)) EXPECT_TRUE(std::isnan(value)) << bits;
            else EXPECT_TRUE(double(value) == expect && std::signbit(value) == (sign < 0)) << bits;
        };
        check(half_to_float(uint16_t(bits)), expected(5, 10, 15));
        check(bfloat16_to_float(uint16_t(bits)), expected(8, 7, 127));
    }
}

TEST(Safetensors, NumbersOfTheWrongKindAreRefused) {
    SafetensorsFile file(reference_path());
    std::vector<double> floats(8);
    std::vector<int> ints(8);
    expect_failure([&] { file.read("f32", ints.data()); }, 2, "f32: dtype F32 where I32 or I64");
    expect_failure([&] { file.read("i32", floats.data()); }, 2, "i32: dtype I32 where F64");
    expect_failure([&] { file.read("nothing", ints.data()); }, 2, "nothing: no such tensor");
    std::string path = join_path(test_folder(), "long.safetensors");
    for (int64_t value : {int64_t(1) << 31, -(int64_t(1) << 31) - 1, INT64_MIN}) {
        SafetensorsWriter writer(path);
        writer.add("x", "I64", {1}, &value);
        writer.commit();
        SafetensorsFile wide(path);
        expect_failure([&] { wide.read("x", ints.data()); }, 2, "does not fit 32 bits");
    }
}

TEST(Safetensors, EveryTruncationAndAnExtraByteAreRefused) {
    std::string path = join_path(test_folder(), "cut.safetensors"), whole = reference_file();
    for (size_t size = 0; size < whole.size(); size++) {
        put_file(path, whole.substr(0, size));
        expect_failure([&] { SafetensorsFile file(path); }, 2, path + ": ");
    }
    put_file(path, whole + 'x');
    expect_failure([&] { SafetensorsFile file(path); }, 2, "1 bytes after the last tensor");
    expect_failure([&] { SafetensorsFile file(test_folder()); }, 2, "not a regular file");
    expect_failure([&] { SafetensorsFile file(path + "x"); }, 2, "No such file");
}

TEST(Safetensors, AWrongHeaderLengthIsRefused) {
    std::string path = join_path(test_folder(), "length.safetensors"), whole = reference_file();
    uint64_t right = strlen(kReferenceHeader), beyond = whole.size() - 7;
    for (uint64_t length : {uint64_t(0), uint64_t(1), right - 5, right + 1, beyond - 1, beyond,
                            uint64_t(100'000'000), uint64_t(1) << 63, ~uint64_t(0), ~uint64_t(7)}) {
        for (int i = 0; i < 8; i++) whole[size_t(i)] = char(length >> 8 * i);
        put_file(path, whole);
        expect_failure([&] { SafetensorsFile file(path); }, 2, path + ": ");
    }
    put_file(path, with_length("", "").replace(0, 4, "\x01\xe1\xf5\x05", 4));  // 100,000,001
    fs::resize_file(path, 200'000'000);                                        // sparse
    expect_failure([&] { SafetensorsFile file(path); }, 2, "at most 100000000 are read");
}

// Headers over 8 bytes of data, and what the refusal says. The first is right, and accepted.
TEST(Safetensors, HostileHeadersAreRefused) {
    auto entry = [](const char* dtype, const char* shape, const char* offsets) {
        return format(R"({"a":{"dtype":%s,"shape":%s,"data_offsets":%s}})", dtype, shape, offsets);
    };
    const std::pair<std::string, const char*> kCases[] = {
        {entry(R"("F32")", "[2]", "[0,8]"), ""},
        {entry(R"("F32")", "[2]", "[0,7]"), "7 bytes, its shape and dtype need 8"},
        {entry(R"("F32")", "[2]", "[8,0]"), "at bytes 8 to 0"},
        {entry(R"("F32")", "[2]", "[1,9]"), "at bytes 1 to 9 of the data, which has 8"},
        {entry(R"("F32")", "[2]", "[-8,0]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[0.0,8.0]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[0,8,8]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[0]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "8"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[0,18446744073709551616]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[18446744073709551608,8]"), "at bytes"},
        {entry(R"("F32")", "[-2]", "[0,8]"), "-2 in its shape"},
        {entry(R"("F32")", "[2.0]", "[0,8]"), "2.0 in its shape"},
        {entry(R"("F32")", R"(["2"])", "[0,8]"), "in its shape"},
        {entry(R"("F32")", "[null]", "[0,8]"), "in its shape"},
        {entry(R"("F32")", "2", "[0,8]"), "shape is not an array"},
        {entry(R"("F32")", "[4611686018427387904,2]", "[0,8]"), "overflows"},
        {entry(R"("F32")", "[4294967296,4294967296]", "[0,8]"), "overflows"},
        {entry(R"("F32")", "[4611686018427387904]", "[0,8]"), "overflows"},
        {entry(R"("F99")", "[2]", "[0,8]"), "dtype \"F99\" is not known"},
        {entry("\"\"", "[2]", "[0,8]"), "is not known"},
        {entry("32", "[2]", "[0,8]"), "dtype 32 is not known"},
        {R"({"a":{"dtype":"F32","shape":[2]}})", "not described by"},
        {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}})", "not described by"},
        {R"({"a":7})", "not described by"},
        {R"({})", "8 bytes after the last tensor"},
        {R"({"__metadata__":{"format":1}})", "not an object of texts"},
        {R"({"__metadata__":"pt"})", "not an object of texts"},
        {R"({"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}})", "twice"},
        {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
         R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
         "\"a\" is there twice"},
        {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
         R"("b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
         "overlap"},
        {R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},)"
         R"("b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
         "overlap"},
        {R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
         R"("b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
         "gaps"},
        {R"({"a":{"dtype":"U8","shape":[7],"data_offsets":[1,8]}})", "gaps"},
        {R"({"a":{"dtype":"U8","shape":[7],"data_offsets":[0,7]}})", "1 bytes after"},
        {R"({"a\n\u0000b":7})", "a??b: not described"},
        {R"({"a":1e999})", "too large"},
        {R"([])", "no JSON object"},
        {R"( {})", "no JSON object"},
        {R"({"a":)", "not valid JSON"},
        {"{\"\xff\":1}", "not valid JSON"},
        {R"({"a":)" + std::string(100000, '['), "nested deeper"},
        {R"({")" + std::string(100000, 'n') + R"(":1})", "not described by"},
    };
    std::string path = join_path(test_folder(), "hostile.safetensors");
    for (const auto& [header, part] : kCases) {
        put_file(path, with_length(header, std::string(8, '\0')));
        if (*part == '\0') EXPECT_EQ(error_of([&] { SafetensorsFile file(path); }), "");
        else expect_failure([&] { SafetensorsFile file(path); }, 2, part);
    }
}

// ---- config.json
// -----------------------------------------------------------------------------------

GPT2Config config_of(const std::string& text) {
    std::string folder = test_folder();
    put_file(join_path(folder, "config.json"), text);
    return read_config(folder);
}

std::vector<GPT2Config> odd_configs() {
    std::vector<GPT2Config> configs(5);
    for (GPT2Config& config : configs) {
        config.vocab_size = 37, config.context = 5, config.layers = 2;
        config.heads = 3, config.channels = 15;
    }
    configs[1].tied = false, configs[1].vocab_size = 131, configs[1].dropout = 0.1;
    configs[2].bias = false, configs[2].hidden = 7, configs[2].layer_norm_epsilon = 1e-6;
    configs[3].layers = 1, configs[3].heads = 1, configs[3].channels = 1, configs[3].context = 1;
    configs[3].vocab_size = 1;
    configs[4].bias = false, configs[4].tied = false, configs[4].vocab_size = 128;
    configs[4].layers = 11;
    return configs;
}

TEST(Config, WhatIsWrittenIsRead) {
    for (GPT2Config config : odd_configs()) {
        config.layer_norm_epsilon = 1.0 / 3e5;
        std::string folder = test_folder();
        write_config(config, 36, folder);
        EXPECT_TRUE(read_config(folder) == config);
        EXPECT_TRUE(read_config(join_path(folder, "config.json")) == config);
        json root = read_json_object(join_path(folder, "config.json"));
        EXPECT_EQ(root["eos_token_id"], 36);
        EXPECT_EQ(root["architectures"][0], "GPT2LMHeadModel");
        write_config(config, -1, folder);
        EXPECT_TRUE(read_json_object(join_path(folder, "config.json"))["eos_token_id"].is_null());
    }
}

TEST(Config, MissingKeysHaveTheDefaultsOfTransformers) {
    GPT2Config expected;
    expected.dropout = 0.1;
    EXPECT_TRUE(config_of(R"({"model_type":"gpt2"})") == expected);
    EXPECT_TRUE(config_of(R"({"model_type":"gpt2","n_inner":3072,"unknown":[{}]})") == expected);
    expected.context = 64, expected.dropout = 0, expected.layers = 3, expected.hidden = 10;
    EXPECT_TRUE(config_of(R"({"model_type":"gpt2","n_ctx":64,"resid_pdrop":0,"n_inner":10,)"
                          R"("num_hidden_layers":3,"activation_function":"gelu_pytorch_tanh",)"
                          R"("reorder_and_upcast_attn":true})") == expected);
    EXPECT_EQ(config_of(R"({"model_type":"gpt2","n_ctx":64,"n_positions":32})").context, 32);
}

TEST(Config, WhatIsNoGpt2OrCannotBeIsRefused) {
    const std::pair<const char*, const char*> kCases[] = {
        {R"("model_type":"llama")", "/config.json: model_type \"llama\": this program reads gpt2"},
        {R"("model_type":7)", "model_type 7"},
        {R"("model_type":"ll\nama")", "model_type \"ll\\nama\""},
        {R"("n_layer":"12")", "n_layer: \"12\" is not a positive whole number"},
        {R"("n_layer":2.5)", "n_layer: 2.5 is not"},
        {R"("n_layer":12.0)", "n_layer: 12.0 is not"},
        {R"("n_layer":-3)", "n_layer: -3 is not"},
        {R"("n_layer":0)", "n_layer: 0 is not from 1"},
        {R"("n_layer":null)", "n_layer: null is not"},
        {R"("n_layer":[1])", "n_layer: [1] is not"},
        {R"("n_layer":true)", "n_layer: true is not"},
        {R"("n_layer":1e99)", "n_layer: 1e+99 is not"},
        {R"("n_layer":1e999)", "too large"},
        {R"("n_layer":4294967297)", "n_layer: 4294967297 is not from 1"},
        {R"("n_layer":18446744073709551617)", "n_layer: "},
        {R"("n_layer":2000)", "/config.json: --layers 2000"},
        {R"("n_head":5)", "heads must divide channels"},
        {R"("num_attention_heads":"x")", "num_attention_heads: \"x\""},
        {R"("n_embd":2147483647)", "--channels"},
        {R"("n_inner":0)", "n_inner: 0"},
        {R"("n_inner":"x")", "n_inner: \"x\""},
        {R"("n_positions":-1)", "n_positions: -1"},
        {R"("n_ctx":-1)", "n_ctx: -1"},
        {R"("vocab_size":0)", "vocab_size: 0"},
        {R"("vocab_size":2000000000)", "vocabulary size"},
        {R"("activation_function":"gelu")", "activation_function: \"gelu\" is not the tanh GELU"},
        {R"("activation_function":null)", "activation_function: null"},
        {R"("resid_pdrop":1)", "--dropout 1"},
        {R"("resid_pdrop":-0.5)", "--dropout -0.5"},
        {R"("resid_pdrop":"0")", "resid_pdrop: \"0\" is not a number"},
        {R"("layer_norm_epsilon":0)", "layer_norm_epsilon 0"},
        {R"("layer_norm_epsilon":-1e-5)", "layer_norm_epsilon -1e-05"},
        {R"("layer_norm_epsilon":null)", "layer_norm_epsilon: null"},
        {R"("layer_norm_epsilon":NaN)", "not valid JSON"},
        {R"("tie_word_embeddings":"yes")", "tie_word_embeddings: \"yes\""},
        {R"("tie_word_embeddings":1)", "tie_word_embeddings: 1"},
        {R"("bias":0)", "bias: 0 is neither true nor false"},
        {R"("scale_attn_weights":false)", "scale_attn_weights: false is a variant"},
        {R"("scale_attn_by_inverse_layer_idx":true)", "scale_attn_by_inverse_layer_idx: true"},
        {R"("add_cross_attention":true)", "add_cross_attention: true"},
        {R"("n_layer":2,"n_layer":3)", "\"n_layer\" is there twice"},
    };
    for (const auto& [keys, part] : kCases) {
        bool typed = strstr(keys, "model_type") != nullptr;
        std::string text = (typed ? "{" : R"({"model_type":"gpt2",)") + std::string(keys) + "}";
        expect_failure([&] { config_of(text); }, 2, part);
    }
    expect_failure([] { config_of("{}"); }, 2, "no model_type");
    expect_failure([] { config_of("[]"); }, 2, "no JSON object");
    expect_failure([] { config_of(""); }, 2, "not valid JSON");
    expect_failure([] { read_config(test_folder()); }, 2, "config.json: cannot open");
}

// ---- model folders
// ---------------------------------------------------------------------------------

constexpr Group kStored[] = {Group::parameters, Group::first_moments, Group::second_moments};

GPT2Ptr model_of(const GPT2Config& config) {
    GPT2Shape shape;
    shape.training = true;
    return GPT2Ptr(gpt2_create(config, shape, 0, 1));
}

// Visits every tensor that a model has: visit(row's index, row, layer).
template <typename Visit>
void each_tensor(const GPT2Config& config, Visit visit) {
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < kParameterRows; index++)
        for (int layer = 0; layer < int(table[size_t(index)].count); layer++)
            if (table[size_t(index)].present) visit(index, table[size_t(index)], layer);
}

// Different numbers everywhere, tiny and large ones among them.
GPT2Ptr filled_model(const GPT2Config& config, uint64_t seed) {
    GPT2Ptr model = model_of(config);
    std::vector<real> host;
    uint32_t drawn = 0;
    for (Group group : kStored)
        each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
            host.resize(row.file_size());
            for (real& value : host) {
                Philox random = philox(seed, drawn++, 0, 0, 0);
                value = real(std::ldexp(int32_t(random.word[0]), int(random.word[1] % 64) - 80));
                if (random.word[2] % 50 == 0) value = real(-0.0);
                if (random.word[2] % 50 == 1) value = std::numeric_limits<real>::denorm_min();
                if (random.word[2] % 50 == 2) value = std::numeric_limits<real>::max();
            }
            gpt2_copy_in(model.get(), group, index, layer, host.data());
        });
    return model;
}

// The hash of the bits of some groups; of everything that a checkpoint keeps.
uint64_t bits_of(const GPT2* model, std::initializer_list<Group> groups) {
    uint64_t hash = 0;
    std::vector<real> host;
    for (Group group : groups)
        each_tensor(gpt2_config(model), [&](int index, const ParameterRow& row, int layer) {
            host.resize(row.file_size());
            gpt2_copy_out(model, group, index, layer, host.data());
            hash = hash_bytes(host.data(), host.size() * sizeof(real), hash);
        });
    return hash;
}

uint64_t bits_of(const GPT2* model) {
    return bits_of(model, {Group::parameters, Group::first_moments, Group::second_moments});
}

struct RawTensor {
    std::string dtype;
    std::vector<size_t> shape;
    std::string bytes;
};
using RawTensors = std::map<std::string, RawTensor>;

RawTensors read_raw(const std::string& path) {
    SafetensorsFile file(path);
    std::string content = read_file(path);
    size_t data = 0;
    for (const auto& [name, entry] : file.entries()) data = std::max(data, entry.end);
    data = content.size() - data;
    RawTensors tensors;
    for (const auto& [name, entry] : file.entries())
        tensors[name] = {entry.dtype, entry.shape,
                         content.substr(data + entry.begin, entry.end - entry.begin)};
    return tensors;
}

void write_raw(const std::string& path, const RawTensors& tensors) {
    SafetensorsWriter writer(path);
    for (const auto& [name, tensor] : tensors)
        writer.add(name, tensor.dtype, tensor.shape, tensor.bytes.data());
    writer.commit();
}

std::string model_path(const std::string& folder) { return join_path(folder, "model.safetensors"); }

TEST(ModelFolder, KeepsEveryBit) {
    for (const GPT2Config& config : odd_configs()) {
        std::string folder = test_folder();
        GPT2Ptr model = filled_model(config, 1), other = filled_model(config, 2);
        save_model(model.get(), nullptr, folder);
        EXPECT_TRUE(read_model_config(folder) == config);
        load_model(other.get(), folder);
        EXPECT_EQ(bits_of(model.get(), {Group::parameters}),
                  bits_of(other.get(), {Group::parameters}));
    }
}

TEST(ModelFolder, HoldsTheTensorsOfTransformersInTheirShapes) {
    for (const GPT2Config& config : odd_configs()) {
        std::string folder = test_folder();
        GPT2Ptr model = filled_model(config, 3);
        save_model(model.get(), nullptr, folder);
        SafetensorsFile file(model_path(folder));
        EXPECT_EQ(file.metadata().at("format"), "pt");
        size_t V = size_t(config.vocab_size), C = size_t(config.channels);
        EXPECT_EQ(file.entry("transformer.wte.weight").shape, (std::vector<size_t>{V, C}));
        EXPECT_EQ(file.entry("transformer.h.0.attn.c_attn.weight").shape,
                  (std::vector<size_t>{C, 3 * C}));
        EXPECT_EQ(file.entry("transformer.h.0.mlp.c_proj.weight").shape,
                  (std::vector<size_t>{size_t(config.hidden_size()), C}));
        EXPECT_EQ(file.entry("transformer.h.0.mlp.c_fc.bias").shape,
                  std::vector<size_t>{size_t(config.hidden_size())});
        EXPECT_EQ(file.has("lm_head.weight"), !config.tied);
        EXPECT_EQ(file.entries().size(), size_t(4 + 12 * config.layers + !config.tied));
        if (!config.bias) {
            EXPECT_EQ(read_all<double>(file, "transformer.ln_f.bias"), std::vector<double>(C, 0));
        }

        std::vector<real> host(3 * C * C);
        gpt2_copy_out(model.get(), Group::parameters, k_qkvw, config.layers - 1, host.data());
        std::string name = format("transformer.h.%d.attn.c_attn.weight", config.layers - 1);
        std::vector<real> stored = read_all<real>(file, name);
        for (size_t out = 0; out < 3 * C; out++)
            for (size_t in = 0; in < C; in++)
                ASSERT_EQ(stored[in * 3 * C + out], host[out * C + in]) << name;
    }
}

TEST(ModelFolder, LoadsWithoutThePrefixWithMasksAndWithATiedHead) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 4), other = filled_model(config, 5);
    save_model(model.get(), nullptr, folder);
    RawTensors bare;
    for (const auto& [name, tensor] : read_raw(model_path(folder)))
        bare[name.substr(strlen("transformer."))] = tensor;
    bare["lm_head.weight"] = bare["wte.weight"];
    for (int layer = 0; layer < config.layers; layer++) {
        bare[format("h.%d.attn.bias", layer)] = {"BOOL", {1, 1, 5, 5}, std::string(25, '\1')};
        bare[format("transformer.h.%d.attn.masked_bias", layer)] = {
            "F16", {}, std::string(2, '\0')};
    }
    write_raw(model_path(folder), bare);
    load_model(other.get(), folder);
    EXPECT_EQ(bits_of(model.get(), {Group::parameters}), bits_of(other.get(), {Group::parameters}));

    bare["lm_head.weight"].bytes[0] ^= 1;
    write_raw(model_path(folder), bare);
    expect_failure([&] { load_model(other.get(), folder); }, 2,
                   "lm_head.weight: differs from wte.weight, but the head is tied; set "
                   "\"tie_word_embeddings\": false");
}

TEST(ModelFolder, LoadsHalfBfloat16AndDouble) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = model_of(config);
    save_model(model.get(), nullptr, folder);
    for (const char* dtype : {"F16", "BF16", "F32", "F64"}) {
        RawTensors tensors = read_raw(model_path(folder));
        size_t size = dtype_size(dtype);
        double one = 1.5;
        float single = 1.5f;
        uint16_t half = strcmp(dtype, "F16") == 0 ? 0x3e00 : 0x3fc0;
        const void* pattern = size == 8   ? static_cast<void*>(&one)
                              : size == 4 ? static_cast<void*>(&single)
                                          : &half;
        for (auto& [name, tensor] : tensors) {
            size_t count = tensor.bytes.size() / dtype_size(tensor.dtype);
            tensor.dtype = dtype, tensor.bytes.clear();
            for (size_t i = 0; i < count; i++)
                tensor.bytes.append(static_cast<const char*>(pattern), size);
        }
        write_raw(model_path(folder), tensors);
        GPT2Ptr other = model_of(config);
        load_model(other.get(), folder);
        each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
            std::vector<real> host(row.file_size());
            gpt2_copy_out(other.get(), Group::parameters, index, layer, host.data());
            EXPECT_EQ(host, std::vector<real>(host.size(), real(1.5))) << row.name << dtype;
        });
    }
}

TEST(ModelFolder, RefusesTensorsThatDoNotFitAndNamesThem) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 6);
    save_model(model.get(), nullptr, folder);
    const RawTensors good = read_raw(model_path(folder));
    const std::string qkv = "transformer.h.1.attn.c_attn.weight";
    uint64_t before = bits_of(model.get());
    auto expect = [&](auto edit, const std::string& part) {
        RawTensors tensors = good;
        edit(tensors);
        write_raw(model_path(folder), tensors);
        expect_failure([&] { load_model(model.get(), folder); }, 2,
                       model_path(folder) + ": " + part);
        expect_failure([&] { read_model_config(folder); }, 2, model_path(folder) + ": " + part);
        EXPECT_EQ(bits_of(model.get()), before);
    };
    expect([&](RawTensors& t) { t.erase(qkv); }, qkv +
                                                     ": missing; the configuration asks for shape "
                                                     "(15, 45)");
    expect([&](RawTensors& t) { std::swap(t[qkv].shape[0], t[qkv].shape[1]); },
           qkv + ": shape (45, 15), the configuration says (15, 45)");
    expect([&](RawTensors& t) { t[qkv].shape = {675}; },
           qkv + ": shape (675), the configuration says (15, 45)");
    expect(
        [&](RawTensors& t) { t["transformer.h.2.ln_1.weight"] = good.at("transformer.ln_f.bias"); },
        "transformer.h.2.ln_1.weight: a GPT-2 of 2 layers has no such tensor");
    expect([&](RawTensors& t) { t["score\n.weight"] = good.at("transformer.ln_f.bias"); },
           "score?.weight: a GPT-2 of 2 layers");
    expect([&](RawTensors& t) { t[qkv.substr(12)] = good.at(qkv); },
           "h.1.attn.c_attn.weight: a GPT-2 of 2 layers has no such tensor, or has it already");
    expect(
        [&](RawTensors& t) { t["transformer.h.2.attn.bias"] = good.at("transformer.ln_f.bias"); },
        "transformer.h.2.attn.bias: ");
}

TEST(ModelFolder, RefusesNumbersThatAreNotFiniteOrNotNumbersAtAll) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 7);
    save_model(model.get(), nullptr, folder);
    const std::string name = "transformer.h.1.mlp.c_fc.weight";
    RawTensors tensors = read_raw(model_path(folder));
    std::string last = tensors[name].bytes;
    for (real value : {real(NAN), real(INFINITY), real(-INFINITY)}) {
        memcpy(tensors[name].bytes.data() + last.size() - sizeof(real), &value, sizeof(real));
        write_raw(model_path(folder), tensors);
        expect_failure([&] { load_model(model.get(), folder); }, 2,
                       name + ": holds numbers that are");
    }
    tensors[name].bytes = last;
    tensors[name].dtype = sizeof(real) == 8 ? "I64" : "I32";
    write_raw(model_path(folder), tensors);
    expect_failure([&] { load_model(model.get(), folder); }, 2, name + ": dtype I");

    std::vector<real> host(size_t(config.channels), real(NAN));
    gpt2_copy_in(model.get(), Group::parameters, k_lnfw, 0, host.data());
    std::string other = test_folder();
    expect_failure([&] { save_model(model.get(), nullptr, other); }, 1,
                   "transformer.ln_f.weight: holds numbers that are not finite; not saved");
    EXPECT_FALSE(path_exists(model_path(other)));
}

TEST(ModelFolder, AModelWithoutBiasesTakesZerosOrNone) {
    GPT2Config config = odd_configs()[2];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 8), other = filled_model(config, 9);
    save_model(model.get(), nullptr, folder);
    RawTensors tensors = read_raw(model_path(folder)), fewer;
    for (const auto& [name, tensor] : tensors)
        if (name.find("bias") == std::string::npos) fewer[name] = tensor;
    EXPECT_LT(fewer.size(), tensors.size());
    write_raw(model_path(folder), fewer);
    load_model(other.get(), folder);
    EXPECT_EQ(bits_of(model.get(), {Group::parameters}), bits_of(other.get(), {Group::parameters}));
    tensors["transformer.h.1.mlp.c_fc.bias"].bytes.back() = 1;
    write_raw(model_path(folder), tensors);
    expect_failure([&] { load_model(other.get(), folder); }, 2,
                   "transformer.h.1.mlp.c_fc.bias: not zero, but config.json says \"bias\": false");
}

TEST(ModelFolder, RefusesOtherContainersHeadsAndFolders) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 10);
    save_model(model.get(), nullptr, folder);
    GPT2Config other = config;
    other.heads = 5;
    write_config(other, -1, folder);
    expect_failure([&] { load_model(model.get(), folder); }, 2, "config.json: 5 heads");
    other = config;
    other.layer_norm_epsilon = 1e-6;
    write_config(other, -1, folder);
    expect_failure([&] { load_model(model.get(), folder); }, 2, "layer_norm_epsilon 1e-06");
    fs::remove(model_path(folder));
    expect_failure([&] { load_model(model.get(), folder); }, 2, "model.safetensors: cannot open");
    for (const char* name : {"pytorch_model.bin.index.json", "pytorch_model.bin"}) {
        put_file(join_path(folder, name), "{}");
        expect_failure([&] { load_model(model.get(), folder); }, 2,
                       std::string(name) + ": this program reads model.safetensors");
    }
}

TEST(ModelFolder, AFailedWriteLeavesTheOldFile) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 11), other = filled_model(config, 12);
    save_model(model.get(), nullptr, folder);
    if (!path_exists("/dev/full")) GTEST_SKIP() << "there is no /dev/full";
    fs::create_symlink("/dev/full", model_path(folder) + format(".%d.tmp", int(getpid())));
    std::string before = read_file(model_path(folder));
    expect_failure([&] { save_model(other.get(), nullptr, folder); }, 1, "No space left");
    EXPECT_EQ(read_file(model_path(folder)), before);
    expect_failure([&] { save_model(other.get(), nullptr, "/proc/no_such_folder"); }, 1,
                   "/proc/no_such_folder: cannot create");
}

// ---- checkpoints
// -----------------------------------------------------------------------------------

struct SavedRun {
    std::string out = join_path(test_folder(), "run");
    GPT2Ptr model = filled_model(odd_configs()[0], 20);

    Checkpoint checkpoint(uint64_t step, bool best = false) const {
        ordered_json state = {{"epoch", 0.1}, {"seed", ~uint64_t(0)}, {"data", "\xff text"}};
        return {step, gpt2_config(model.get()), view_of(model.get()), nullptr, state, best};
    }
    void save(uint64_t step, bool best = false, int keep = 0, uint64_t keep_every = 0) {
        EXPECT_EQ(save_checkpoint(out, checkpoint(step, best), {keep, keep_every}), "");
    }
    std::string path(const std::string& name) const { return join_path(out, name); }
    std::string link(const char* name) const { return fs::read_symlink(path(name)).string(); }
    Strings names() const {
        Strings names;
        for (const auto& item : fs::directory_iterator(out))
            names.push_back(item.path().filename().string());
        std::sort(names.begin(), names.end());
        return names;
    }
};

void flip_byte(const std::string& path, size_t at) {
    std::string content = read_file(path);
    content[at] ^= 1;
    put_file(path, content);
}

TEST(Checkpoint, TransposesAnyShape) {
    for (auto [rows, cols] : {std::pair(1, 1),
                              {3, 5},
                              {8, 8},
                              {16, 9},
                              {7, 24},
                              {257, 65},
                              {264, 72},
                              {300, 130},
                              {64, 512}}) {
        size_t N = size_t(rows) * size_t(cols);
        Buffer inp(N), out(N);
        inp.normal(1);
        transpose(out, inp, size_t(rows), size_t(cols));
        size_t wrong = 0;
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++) wrong += !(out[c * rows + r] == inp[r * cols + c]);
        EXPECT_EQ(wrong, 0u) << rows << " x " << cols;
    }
}

TEST(Checkpoint, KeepsEveryBitOfParametersMomentsAndState) {
    for (const GPT2Config& config : odd_configs()) {
        std::string out = test_folder();
        GPT2Ptr model = filled_model(config, 21), other = filled_model(config, 22);
        ordered_json state = {{"step", 7}, {"rate", 0.1 + 0.2}, {"loader", {{"window", 3}}}};
        Tokenizer tokenizer = Tokenizer::bytes();
        Checkpoint checkpoint{1234567890123, config, view_of(model.get()), &tokenizer, state, true};
        save_checkpoint(out, checkpoint, {1});
        std::string folder = latest_checkpoint(out);
        EXPECT_EQ(folder, join_path(out, "step_1234567890123"));
        json trainer = load_checkpoint(other.get(), folder);
        EXPECT_EQ(bits_of(model.get()), bits_of(other.get()));
        EXPECT_EQ(trainer["step"], 1234567890123);
        EXPECT_EQ(trainer["rate"], 0.1 + 0.2);
        EXPECT_EQ(trainer["loader"]["window"], 3);
        EXPECT_EQ(Tokenizer::load(folder).fingerprint(), tokenizer.fingerprint());
        EXPECT_EQ(read_json_object(join_path(folder, "config.json"))["eos_token_id"],
                  tokenizer.end_of_text());
    }
}

TEST(Checkpoint, LinksPointToTheLastAndTheBestAndOldOnesGo) {
    SavedRun run;
    run.save(1, true, 2);
    EXPECT_EQ(run.names(), (Strings{"best", "last", "step_00000001"}));
    run.save(2, true, 2);
    run.save(3, false, 2);
    EXPECT_EQ(run.names(), (Strings{"best", "last", "step_00000002", "step_00000003"}));
    run.save(4, false, 1);
    EXPECT_EQ(run.names(), (Strings{"best", "last", "step_00000002", "step_00000004"}));
    EXPECT_EQ(run.link("last"), "step_00000004");
    EXPECT_EQ(run.link("best"), "step_00000002");
    run.save(3, false, 1);  // a run that was resumed further back
    EXPECT_EQ(run.names(),
              (Strings{"best", "last", "step_00000002", "step_00000003", "step_00000004"}));
    EXPECT_EQ(run.link("last"), "step_00000003");
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000003"));
    run.save(5, false, 0);
    EXPECT_EQ(run.names().size(), 6u);
}

TEST(Checkpoint, MultiplesOfAStepStayForGood) {
    SavedRun run;
    for (uint64_t step = 1; step <= 7; step++) run.save(step, false, 1, 3);
    EXPECT_EQ(run.names(), (Strings{"last", "step_00000003", "step_00000006", "step_00000007"}));
}

TEST(Checkpoint, SavingAStepAgainReplacesIt) {
    SavedRun run;
    run.save(5);
    run.model = filled_model(odd_configs()[0], 23);
    run.save(5);
    GPT2Ptr other = model_of(odd_configs()[0]);
    load_checkpoint(other.get(), latest_checkpoint(run.out));
    EXPECT_EQ(bits_of(other.get()), bits_of(run.model.get()));
    EXPECT_EQ(run.names(), (Strings{"last", "step_00000005"}));
}

TEST(Checkpoint, WhatAnInterruptedSaveLeftIsPassedOverAndRemoved) {
    SavedRun run;
    run.save(5);
    for (const char* name : {"step_00000009.tmp", "step_00000005.tmp", "step_00000004.old"})
        fs::copy(run.path("step_00000005"), run.path(name));
    for (const char* name : {"step_1", "step_x", "step_00000006x", "notes.tmp", "step_000000006"})
        fs::create_directory(run.path(name));
    fs::create_symlink("step_00000005", run.path("last.tmp"));
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000005"));
    run.save(6, false, 2);  // names that are not quite a step's are somebody else's folders
    EXPECT_EQ(run.names(), (Strings{"last", "notes.tmp", "step_000000006", "step_00000005",
                                    "step_00000006", "step_00000006x", "step_1", "step_x"}));
    // Stopped between the two renames of a replacement: the replaced one is still found.
    fs::rename(run.path("step_00000006"), run.path("step_00000006.old"));
    fs::rename(run.path("step_00000005"), run.path("step_00000005.tmp"));
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000006.old"));
}

TEST(Checkpoint, ADamagedOneIsReportedAndTheOneBeforeIsTaken) {
    SavedRun run;
    run.save(1);
    run.save(2);
    std::string last = run.path("step_00000002"), kept = run.path("kept");
    fs::copy(last, kept);
    for (const char* name : {"config.json", "model.safetensors", "optimizer.safetensors"}) {
        std::string file = join_path(last, name), warning;
        size_t size = read_file(file).size();
        auto expect_fallback = [&](const char* part) {
            warning.clear();
            EXPECT_EQ(latest_checkpoint(run.out, &warning), run.path("step_00000001"));
            EXPECT_NE(warning.find(file + ": "), std::string::npos) << warning;
            EXPECT_NE(warning.find(part), std::string::npos) << warning;
            expect_failure([&] { load_checkpoint(run.model.get(), last); }, 2, part);
            fs::copy_file(join_path(kept, name), file, fs::copy_options::overwrite_existing);
            EXPECT_EQ(latest_checkpoint(run.out), last);
        };
        for (size_t at : {size_t(0), size / 2, size - 1}) {
            flip_byte(file, at);
            expect_fallback("does not match the hash");
        }
        fs::resize_file(file, size - 1);
        expect_fallback("bytes, trainer.json recorded");
        fs::resize_file(file, size + 1);
        expect_fallback("bytes, trainer.json recorded");
        fs::remove(file);
        expect_fallback("cannot open");
    }
    fs::remove_all(run.path("step_00000001"));
    fs::remove_all(last);
    EXPECT_EQ(latest_checkpoint(run.out), "");
    EXPECT_EQ(latest_checkpoint(run.out + "/none"), "");
}

TEST(Checkpoint, AnyByteOfTrainerJsonThatChangesIsNoticed) {
    SavedRun run;
    run.save(1);
    std::string folder = run.path("step_00000001"), path = join_path(folder, "trainer.json");
    std::string content = read_file(path);
    for (size_t at = 0; at + 1 < content.size(); at++) {  // a last line end more or less is nothing
        std::string changed = content;
        changed[at] ^= 1;
        put_file(path, changed);
        EXPECT_NE(error_of([&] { verify_checkpoint(folder); }), "") << at << changed;
    }
    for (size_t size = 0; size + 1 < content.size(); size++) {
        put_file(path, content.substr(0, size));
        EXPECT_NE(error_of([&] { verify_checkpoint(folder); }), "") << size;
    }
}

TEST(Checkpoint, TrainerJsonNamesNoFilesOutsideItsFolder) {
    SavedRun run;
    run.save(1);
    std::string folder = run.path("step_00000001"), path = join_path(folder, "trainer.json");
    for (const char* name :
         {"../run/step_00000001/config.json", "/etc/passwd", "..", "", ".hidden"}) {
        json root = json::parse(read_file(path));
        root["files"][name] = root["files"]["config.json"];
        root["checksum"] = json_checksum(root);
        put_file(path, root.dump());
        expect_failure([&] { verify_checkpoint(folder); }, 2, "is no file with bytes and xxh3");
        root["files"].erase(name);
        root["checksum"] = json_checksum(root);
        put_file(path, root.dump());
    }
    EXPECT_EQ(error_of([&] { verify_checkpoint(folder); }), "");
    for (json files : {json(), json(3), json::array(), json::object()}) {
        json root = json::parse(read_file(path));
        root["files"] = files;
        root["checksum"] = json_checksum(root);
        put_file(path, root.dump());
        expect_failure([&] { verify_checkpoint(folder); }, 2, "config.json is not listed");
    }
}

TEST(Checkpoint, LinksThatLeadElsewhereAreNotFollowed) {
    SavedRun run;
    run.save(1);
    run.save(2);
    std::string elsewhere = test_folder();
    fs::rename(run.path("step_00000002"), join_path(elsewhere, "step_00000002"));
    for (const std::string& target :
         Strings{elsewhere + "/step_00000002", "../x", "step_00000002"}) {
        fs::remove(run.path("last"));
        fs::create_symlink(target, run.path("last"));
        EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000001"));
        EXPECT_EQ(resolve_model_folder(run.out), run.path("step_00000001"));
    }
    fs::create_directory_symlink(elsewhere + "/step_00000002", run.path("step_00000002"));
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000001"));
    run.save(3, false, 1);  // removes the folder of step 1, and not what the link leads to
    EXPECT_TRUE(path_exists(join_path(elsewhere, "step_00000002/config.json")));
}

// A disk that takes no more than `limit` bytes a file.
TEST(Checkpoint, AFullDiskLeavesTheCheckpointBefore) {
    SavedRun run;
    run.save(1);
    uint64_t before = bits_of(run.model.get());
    rlimit old_limit;
    getrlimit(RLIMIT_FSIZE, &old_limit);
    auto old_action = signal(SIGXFSZ, SIG_IGN);
    for (rlim_t limit : {0, 1, 500, 1000, 5000, 20000, 40000, 50000}) {
        run.model = filled_model(odd_configs()[0], limit);
        rlimit small = {limit, old_limit.rlim_max};
        setrlimit(RLIMIT_FSIZE, &small);
        std::string error = error_of([&] { run.save(2, true, 1); });
        setrlimit(RLIMIT_FSIZE, &old_limit);
        EXPECT_EQ(error.substr(0, 2), "1 ") << limit << error;
        EXPECT_NE(error.find("cannot write: "), std::string::npos) << error;
        EXPECT_EQ(run.names(), (Strings{"last", "step_00000001"})) << limit;
        GPT2Ptr other = model_of(odd_configs()[0]);
        load_checkpoint(other.get(), latest_checkpoint(run.out));
        EXPECT_EQ(bits_of(other.get()), before);
    }
    signal(SIGXFSZ, old_action);
    expect_failure([&] { save_checkpoint("/proc/x/run", run.checkpoint(1), {}); }, 1,
                   "/proc/x/run: cannot create");
    std::string file = run.path("file");
    put_file(file, "x");
    expect_failure([&] { save_checkpoint(file, run.checkpoint(1), {}); }, 1, file);
}

TEST(Checkpoint, MomentsOfAnotherModelOrPrecisionAreRefused) {
    SavedRun run;
    run.save(1);
    std::string folder = run.path("step_00000001"),
                path = join_path(folder, "optimizer.safetensors");
    const RawTensors good = read_raw(path);
    EXPECT_EQ(good.size(), size_t(2 * (4 + 12 * 2)));
    auto expect = [&](auto edit, const char* part) {
        RawTensors tensors = good;
        edit(tensors);
        write_raw(path, tensors);
        fs::remove(join_path(folder, "trainer.json"));
        write_trainer_json(folder, 1, {}, {});
        expect_failure([&] { load_checkpoint(run.model.get(), folder); }, 2, part);
    };
    const std::string name = "v.transformer.h.1.ln_2.bias";
    expect([&](RawTensors& t) { t.erase(name); }, "v.transformer.h.1.ln_2.bias: no such tensor");
    expect([&](RawTensors& t) { t["extra"] = t[name]; }, "holds 57 tensors, the model has 56");
    expect(
        [&](RawTensors& t) {
            t[name].shape = {1, 15};
        },
        "shape (1, 15), the configuration says");
    expect([&](RawTensors& t) { t[name].dtype = "F16", t[name].bytes.resize(30); },
           "is F16, this program keeps it in");
}

TEST(Checkpoint, APathIsResolvedToAModelFolder) {
    SavedRun run;
    expect_failure([&] { resolve_model_folder(run.out); }, 2, "no such folder; expected a model");
    run.save(1);
    run.save(2);
    EXPECT_EQ(resolve_model_folder(run.out), run.path("step_00000002"));
    EXPECT_EQ(resolve_model_folder(run.out + "/"), run.path("step_00000002"));
    EXPECT_EQ(resolve_model_folder(run.path("step_00000001")), run.path("step_00000001"));
    EXPECT_EQ(resolve_model_folder(run.path("last")), run.path("last"));
    fs::remove(run.path("last"));
    EXPECT_EQ(resolve_model_folder(run.out), run.path("step_00000002"));
    expect_failure([&] { resolve_model_folder(run.path("step_00000001/config.json")); }, 2,
                   "a file");
    expect_failure([] { resolve_model_folder(test_folder()); }, 2, "neither a model folder");
}

TEST(Checkpoint, APathIsDescribed) {
    SavedRun run;
    run.save(1, true);
    run.save(2);
    PathDescription whole = describe_path(run.out);
    EXPECT_TRUE(whole.intact);
    EXPECT_NE(whole.text.find("run folder, 2 checkpoints"), std::string::npos) << whole.text;
    EXPECT_NE(whole.text.find("step_00000001 (best): checkpoint, step 1, verified"),
              std::string::npos)
        << whole.text;
    flip_byte(run.path("step_00000002/model.safetensors"), 3000);
    PathDescription damaged = describe_path(run.out);
    EXPECT_FALSE(damaged.intact);
    EXPECT_NE(damaged.text.find("step_00000002 (last): cannot be used: "), std::string::npos);
    EXPECT_FALSE(describe_path(run.path("step_00000002")).intact);
    EXPECT_NE(describe_path(run.path("step_00000001")).text.find("37: 6450 parameters"),
              std::string::npos)
        << describe_path(run.path("step_00000001")).text;
    fs::remove(run.path("step_00000001/trainer.json"));
    EXPECT_EQ(describe_path(run.path("step_00000001")).text.substr(0, 13), "model folder:");
    std::string tensors = describe_path(run.path("step_00000001/model.safetensors")).text;
    EXPECT_NE(tensors.find("28 tensors, 6450 numbers"), std::string::npos) << tensors;
    put_file(run.path("cut.safetensors"), reference_file().substr(0, 100));
    EXPECT_FALSE(describe_path(run.path("cut.safetensors")).intact);
    put_file(run.path("text"), "words");
    EXPECT_EQ(describe_path(run.path("text")).text, "text, 5 bytes");
    put_file(run.path("empty"), "");
    EXPECT_EQ(describe_path(run.path("empty")).text, "empty file");
    EXPECT_EQ(describe_path(test_folder()).text, "folder, neither a model nor a run");
    expect_failure([&] { describe_path(run.path("nothing")); }, 2, "no such file or folder");
}

}  // namespace checkpoint_test

// ==== convert ====================================================================================

namespace convert_test {

using checkpoint_test::each_tensor;
using checkpoint_test::expect_failure;
using checkpoint_test::filled_model;
using checkpoint_test::kStored;
using checkpoint_test::model_of;
using checkpoint_test::odd_configs;
using checkpoint_test::put_file;
using checkpoint_test::read_raw;

uint64_t parameter_bits(const GPT2* model) {
    return checkpoint_test::bits_of(model, {Group::parameters});
}

// Models that every form can hold: of two layers with a prime vocabulary, of one channel, and of a
// vocabulary that needs no padding.
std::vector<GPT2Config> plain_configs() {
    std::vector<GPT2Config> configs = {odd_configs()[0], odd_configs()[3], odd_configs()[0]};
    configs[2].vocab_size = 128, configs[2].heads = 5, configs[2].layers = 1;
    return configs;
}

// Numbers of a trained model's size, which fp16 holds too.
GPT2Ptr mild_model(const GPT2Config& config, unsigned seed) {
    GPT2Ptr model = model_of(config);
    for (Group group : kStored)
        each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
            Buffer host(row.file_size());
            host.normal(seed++, index % 3 == 0 ? 3e-6 : 0.3);
            if (group == Group::second_moments)
                for (real& value : host) value = std::abs(value);
            gpt2_copy_in(model.get(), group, index, layer, host);
        });
    return model;
}

std::string saved(const GPT2* model, const Tokenizer* tokenizer = nullptr) {
    std::string folder = test_folder();
    save_model(model, tokenizer, folder);
    return folder;
}

void save_step(const std::string& run, uint64_t step, const GPT2* model,
               const Tokenizer* tokenizer = nullptr, const ordered_json& state = {}) {
    Checkpoint content = {step, gpt2_config(model), view_of(model), tokenizer, state, true};
    EXPECT_EQ(save_checkpoint(run, content, {}), "");
}

struct Wish {
    std::string dtype = "fp32";
    size_t limit = 0;
    const Tokenizer* tokenizer = nullptr;
};

void export_to(const std::string& out, const std::string& model, const Wish& wish = {}) {
    ExportRequest request;
    request.model = open_model(resolve_model(model));
    request.out = out, request.tokenizer = wish.tokenizer;
    request.format = export_format(wish.dtype), request.max_shard_bytes = wish.limit;
    export_model(request);
}

// What is at `path`, loaded into a new model.
GPT2Ptr loaded(const std::string& path) {
    GPT2Ptr model = model_of(read_any_config(resolve_model(path)));
    load_any_model(model.get(), path);
    return model;
}

std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    for (const auto& item : fs::directory_iterator(folder))
        names.push_back(item.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}

// ---- numbers

// Of all halves (or bfloat16s) the nearest to a value, and of two equally near the even one.
template <typename Widen>
uint16_t nearest_of_all(double value, uint16_t infinity, Widen widen) {
    auto value_of = [&](int i) {  // infinity stands where the next number would be
        if (i < infinity) return double(widen(uint16_t(i)));
        return 2 * double(widen(uint16_t(i - 1))) - double(widen(uint16_t(i - 2)));
    };
    int sign = std::signbit(value) ? 0x8000 : 0, low = 0, high = infinity;
    double magnitude = std::fabs(value);
    if (magnitude >= value_of(infinity)) return uint16_t(infinity | sign);
    while (high - low > 1) {  // low: the last one that is not above the value
        int middle = (low + high) / 2;
        (value_of(middle) <= magnitude ? low : high) = middle;
    }
    double below = magnitude - value_of(low), above = value_of(high) - magnitude;
    return uint16_t((below < above || (below == above && low % 2 == 0) ? low : high) | sign);
}

TEST(Convert, RoundsToTheNearestAndTiesToEven) {
    std::mt19937_64 generator(1);
    auto check = [](double value) {
        float odd = to_odd_float(value);
        EXPECT_EQ(float_to_half(odd), nearest_of_all(value, 0x7c00, half_to_float)) << value;
        EXPECT_EQ(float_to_bfloat16(odd), nearest_of_all(value, 0x7f80, bfloat16_to_float))
            << value;
    };
    for (int i = 0; i < 20000; i++) {
        uint64_t bits = generator();
        float value;
        memcpy(&value, &bits, sizeof(value));
        if (std::isfinite(value)) check(value);
        check(std::ldexp(double(bits), -64 + int(generator() % 48) - 30));  // where halves are
        double near = half_to_float(uint16_t(bits & 0x7bff));  // ties, and what is beside them
        double next = half_to_float(uint16_t((bits & 0x7bff) + 1));
        if (!std::isfinite(next)) next = 65536;
        double tie = (near + next) / 2;
        for (double beside : {near, -tie, std::nextafter(tie, 0), std::nextafter(tie, 1e9)})
            check(beside);
    }
    EXPECT_EQ(float_to_half(65519.996f), 0x7bff);
    EXPECT_EQ(float_to_half(65520), 0x7c00);
    EXPECT_EQ(float_to_half(-0.0f), 0x8000);
    EXPECT_EQ(float_to_bfloat16(-0.0f), 0x8000);
    EXPECT_TRUE(std::isnan(half_to_float(float_to_half(std::nanf("")))));
    EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(std::nanf("")))));
    for (int i = 0; i < 1 << 16; i++) {
        float half = half_to_float(uint16_t(i)), wide = bfloat16_to_float(uint16_t(i));
        if (std::isfinite(half)) { EXPECT_EQ(float_to_half(half), i); }
        if (std::isfinite(wide)) { EXPECT_EQ(float_to_bfloat16(wide), i); }
    }
}

TEST(Convert, SizesAreBytesWithOrWithoutAUnit) {
    EXPECT_EQ(parse_size("1"), 1u);
    EXPECT_EQ(parse_size("5GB"), 5000000000u);
    EXPECT_EQ(parse_size("500MB"), 500000000u);
    EXPECT_EQ(parse_size("20KB"), 20000u);
    EXPECT_EQ(parse_size("2KiB"), 2048u);
    EXPECT_EQ(parse_size("1GiB"), size_t(1) << 30);
    for (const char* wrong : {"", "0", "GB", "-1", "5 GB", "5gb", "1.5GB", "5GBB", "999999999999TB",
                              "99999999999999999999"})
        EXPECT_EQ(parse_size(wrong), 0u) << wrong;
}

// ---- folders

TEST(Export, AFolderInFp32HoldsTheSameBits) {
    for (const GPT2Config& config : odd_configs()) {
        GPT2Ptr model = filled_model(config, 31);
        std::string from = saved(model.get()), out = test_folder() + "/deep/new/";
        export_to(out, from);
        EXPECT_TRUE(read_model_config(out) == config);
        EXPECT_EQ(parameter_bits(loaded(out).get()), parameter_bits(model.get()));
        std::vector<std::string> names = {"README.md", "config.json", "generation_config.json",
                                          "model.safetensors"};
        EXPECT_EQ(names_in(out), names);
        auto written = read_raw(join_path(out, "model.safetensors"));
        auto expected = read_raw(join_path(from, "model.safetensors"));
        ASSERT_EQ(written.size(), expected.size());
        for (const auto& [name, tensor] : expected) {
            EXPECT_EQ(written[name].bytes, tensor.bytes) << name;
            EXPECT_EQ(written[name].shape, tensor.shape) << name;
        }
    }
}

TEST(Export, NarrowFormatsAreReadAsTheRoundedNumbers) {
    for (const GPT2Config& config : odd_configs())
        for (const char* dtype : {"bf16", "fp16"}) {
            GPT2Ptr model = mild_model(config, 5);
            std::string out = test_folder() + "/new";
            export_to(out, saved(model.get()), {dtype, 0, nullptr});
            EXPECT_EQ(read_json_object(join_path(out, "config.json"))["torch_dtype"],
                      export_format(dtype).torch_name);
            GPT2Ptr other = loaded(out);
            bool half = *dtype == 'f';
            each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
                std::vector<real> before(row.file_size()), after(row.file_size());
                gpt2_copy_out(model.get(), Group::parameters, index, layer, before.data());
                gpt2_copy_out(other.get(), Group::parameters, index, layer, after.data());
                for (size_t i = 0; i < before.size(); i++) {
                    uint16_t bits = half ? nearest_of_all(before[i], 0x7c00, half_to_float)
                                         : nearest_of_all(before[i], 0x7f80, bfloat16_to_float);
                    EXPECT_EQ(after[i], half ? half_to_float(bits) : bfloat16_to_float(bits));
                }
            });
        }
}

TEST(Export, ANumberThatWouldBecomeInfiniteIsRefusedByName) {
    GPT2Config config = odd_configs()[0];
    GPT2Ptr model = mild_model(config, 6);
    std::vector<real> bias(size_t(config.channels), 65520);
    gpt2_copy_in(model.get(), Group::parameters, k_fcprojb, 1, bias.data());
    std::string from = saved(model.get()), out = test_folder() + "/new";
    expect_failure(
        [&] {
            export_to(out, from, {"fp16", 0, nullptr});
        },
        2, "transformer.h.1.mlp.c_proj.bias: holds 65520, and fp16 ends at 65504");
    EXPECT_FALSE(fs::exists(out));
    export_to(out, from, {"bf16", 0, nullptr});
    bias[3] = real(3.4e38);
    gpt2_copy_in(model.get(), Group::parameters, k_fcprojb, 1, bias.data());
    from = saved(model.get()), out = test_folder() + "/new.bin";
    expect_failure(
        [&] {
            export_to(out, from, {"bf16", 0, nullptr});
        },
        2, "c_proj.bias: holds 3.4e+38");
    EXPECT_EQ(names_in(fs::path(out).parent_path()), std::vector<std::string>());
    export_to(out, from);
}

TEST(Export, ShardsOfAnySizeHoldTheSameBits) {
    for (const GPT2Config& config : odd_configs())
        for (size_t limit : {1, 500, 3000, 1 << 20}) {
            if (limit < 3000 && config.layers > 2) continue;  // hundreds of files, each synced
            GPT2Ptr model = filled_model(config, 32);
            std::string out = test_folder() + "/new";
            export_to(out, saved(model.get()), {"fp32", limit, nullptr});
            EXPECT_TRUE(read_model_config(out) == config);
            EXPECT_EQ(parameter_bits(loaded(out).get()), parameter_bits(model.get()));
            ModelFiles files(out);
            bool small = limit == 1 << 20 || (config.channels == 1 && limit > 1);
            EXPECT_EQ(files.files().size() == 1, small);
            size_t total = 0;
            for (const SafetensorsFile& file : files.files()) {
                size_t bytes = 0;
                for (const auto& [name, entry] : file.entries()) bytes += entry.end - entry.begin;
                EXPECT_TRUE(bytes <= limit || file.entries().size() == 1);
                total += bytes;
            }
            if (small) continue;
            json index = read_json_object(join_path(out, "model.safetensors.index.json"));
            EXPECT_EQ(index["metadata"]["total_size"], total);
            std::string again = test_folder() + "/again";
            export_to(again, out);
            EXPECT_EQ(parameter_bits(loaded(again).get()), parameter_bits(model.get()));
        }
}

// A model in three shards; edit(change) changes model.safetensors.index.json.
struct ShardedModel {
    std::string folder = test_folder() + "/sharded";
    std::string index = join_path(folder, "model.safetensors.index.json");
    ShardedModel() {
        GPT2Ptr model = filled_model(odd_configs()[0], 33);
        export_to(folder, saved(model.get()), {"fp32", 9500, nullptr});
    }
    template <typename Edit>
    void edit(Edit change) const {
        json root = read_json_object(index);
        change(root);
        put_file(index, root.dump());
    }
    std::string shard(int i) const {
        return join_path(folder, format("model-%05d-of-00003.safetensors", i));
    }
    void expect_refused(const std::string& part) const {
        expect_failure([&] { read_model_config(folder); }, 2, part);
        expect_failure([&] { loaded(folder); }, 2, part);
        EXPECT_FALSE(describe_path(folder).intact);
    }
};

TEST(Sharded, HostileIndexesAreRefused) {
    const std::string wte = "transformer.wte.weight", lnf = "transformer.ln_f.weight";
    struct Case {
        const char* part;
        std::function<void(json&)> change;
    };
    auto place = [&](const std::string& tensor, json value) {
        return [=](json& root) { root["weight_map"][tensor] = value; };
    };
    const Case cases[] = {
        {"weight_map: transformer.wte.weight: \"/etc/passwd\" is no", place(wte, "/etc/passwd")},
        {"is no safetensors file", place(wte, "/tmp/x.safetensors")},
        {"is no safetensors file", place(wte, "../x.safetensors")},
        {"is no safetensors file", place(wte, "..")},
        {"is no safetensors file", place(wte, ".hidden.safetensors")},
        {"is no safetensors file", place(wte, "a/b.safetensors")},
        {"is no safetensors file", place(wte, "a\\b.safetensors")},
        {"is no safetensors file", place(wte, std::string("a\0.safetensors", 14))},
        {"is no safetensors file", place(wte, "a\n.safetensors")},
        {"is no safetensors file", place(wte, "model.bin")},
        {"is no safetensors file", place(wte, "")},
        {"is no safetensors file", place(wte, 7)},
        {"is no safetensors file", place(wte, nullptr)},
        {"is no safetensors file", place(wte, json::array({"x.safetensors"}))},
        {"the index says that it is in nothing.safetensors", place(wte, "nothing.safetensors")},
        {"transformer.wte.weight: the index says that it is in model-00003",
         place(wte, "model-00003-of-00003.safetensors")},
        {"a.safetensors: cannot open", place("more", "a.safetensors")},
        {"missing; the index says that it is here",
         place("more", "model-00001-of-00003.safetensors")},
        {"the index says that it is not there", [&](json& root) { root["weight_map"].erase(lnf); }},
        {"weight_map: no object", [](json& root) { root.erase("weight_map"); }},
        {"weight_map: no object", [](json& root) { root["weight_map"] = json::object(); }},
        {"weight_map: no object", [](json& root) { root["weight_map"] = json::array(); }},
        {"weight_map: no object", [](json& root) { root["weight_map"] = "x"; }},
        {"holds no JSON object", [](json& root) { root = json::array(); }},
        {"total_size 1, the tensors have", [](json& root) { root["metadata"]["total_size"] = 1; }},
        {"total_size \"1\" is not a number",
         [](json& root) { root["metadata"]["total_size"] = "1"; }},
    };
    ShardedModel model;
    std::string intact = read_file(model.index);
    for (const Case& hostile : cases) {
        put_file(model.index, intact);
        model.edit(hostile.change);
        model.expect_refused(hostile.part);
    }
    put_file(model.index, intact);
    model.edit([](json& root) { root.erase("metadata"); });
    EXPECT_TRUE(describe_path(model.folder).intact) << describe_path(model.folder).text;
    put_file(model.index, "{\"weight_map\":{}," + intact.substr(1));
    model.expect_refused("\"weight_map\" is there twice");
    put_file(model.index, std::string(70, '[') + std::string(70, ']'));
    model.expect_refused("nested deeper");
}

TEST(Sharded, WrongFilesBesideARightIndexAreRefused) {
    {
        ShardedModel model;
        fs::remove(model.shard(2));
        model.expect_refused("model-00002-of-00003.safetensors: cannot open");
        fs::copy_file(model.shard(1), model.shard(2));
        model.expect_refused("the index says that it is in model-00001");
    }
    {
        ShardedModel model;  // one tensor under two names, each in a file of its own
        auto tensors = read_raw(model.shard(3));
        tensors["ln_f.weight"] = tensors["transformer.ln_f.weight"];
        checkpoint_test::write_raw(model.shard(3), tensors);
        model.edit([&](json& root) {
            root.erase("metadata");
            root["weight_map"]["ln_f.weight"] = fs::path(model.shard(3)).filename().string();
        });
        model.expect_refused("has no such tensor, or has it already");
    }
    ShardedModel model;
    for (int i = 1; i <= 3; i++) {  // as the cache of the hub has it
        std::string blob = join_path(test_folder(), "blob");
        fs::rename(model.shard(i), blob);
        fs::create_symlink(blob, model.shard(i));
    }
    loaded(model.folder);
    std::string content = read_file(model.shard(2));
    for (size_t size = 0; size<content.size(); size += size> 3000 ? 97 : 1) {
        put_file(model.shard(2), content.substr(0, size));
        EXPECT_EQ(error_of([&] { ModelFiles files(model.folder); }).substr(0, 2), "2 ") << size;
    }
    put_file(model.shard(2), content + "x");
    model.expect_refused("1 bytes after the last tensor");
}

TEST(Export, AFolderHasWhatOtherProgramsAskFor) {
    std::string text;
    for (int i = 0; i < 200; i++) text += "the cat sat on mat " + std::to_string(i * i) + ".\n";
    Tokenizer bpe = Tokenizer::train_bpe(text, 290), bytes = Tokenizer::bytes();
    Tokenizer chars = Tokenizer::chars(text);
    for (const Tokenizer* tokenizer : {&bpe, &bytes, &chars}) {
        GPT2Config config = odd_configs()[0];
        config.vocab_size = tokenizer->vocab_size() + 3;
        std::string out = test_folder() + "/new";
        export_to(out, saved(mild_model(config, 7).get()), {"bf16", 0, tokenizer});
        EXPECT_EQ(Tokenizer::load(out).fingerprint(), tokenizer->fingerprint());
        int end = tokenizer->end_of_text();
        for (const char* name : {"config.json", "generation_config.json"}) {
            EXPECT_EQ(read_json_object(join_path(out, name))["eos_token_id"], end) << name;
            EXPECT_EQ(read_json_object(join_path(out, name))["bos_token_id"], end) << name;
        }
        json specials = read_json_object(join_path(out, "special_tokens_map.json"));
        EXPECT_EQ(specials["eos_token"], "<|endoftext|>");
        EXPECT_EQ(read_json_object(join_path(out, "tokenizer_config.json"))["model_max_length"],
                  config.context);
        EXPECT_EQ(fs::exists(join_path(out, "merges.txt")), tokenizer == &bpe);
        EXPECT_EQ(fs::exists(join_path(out, "vocab.json")), tokenizer == &bpe);
        PathDescription description = describe_path(out);
        EXPECT_TRUE(description.intact) << description.text;
        if (tokenizer != &bpe) continue;
        Tokenizer merges = Tokenizer::load(join_path(out, "merges.txt"));
        EXPECT_EQ(merges.encode(text), bpe.encode(text));
        json vocabulary = read_json_object(join_path(out, "vocab.json"));
        EXPECT_EQ(vocabulary.size(), size_t(bpe.vocab_size()));
        EXPECT_EQ(vocabulary["<|endoftext|>"], end);
        EXPECT_EQ(vocabulary["\xC4\xA0"], bpe.encode(" ").at(0));  // a space is spelt so
        EXPECT_EQ(vocabulary["at"], bpe.encode("at").at(0));
    }
}

TEST(Export, TheModelCardSaysHowItWasTrainedAndMarksUpNothing) {
    std::string run = test_folder();
    GPT2Ptr model = mild_model(odd_configs()[0], 8);
    ordered_json state = {{"tokens", 12345},
                          {"best_val_loss", 9.5},
                          {"settings", {{"schedule", "wsd"}, {"steps", 99}}},
                          {"run", {{"seed", 7}, {"data", "ab`|<b>\n# x"}, {"layers", 99}}}};
    save_step(run, 40, model.get(), nullptr, state);
    put_file(join_path(run, "log.jsonl"),
             "{\"step\":20,\"val_loss\":1}\n{\"step\":40,\"val_loss\":2.5}\n"
             "{\"step\":40}\nno record \"val_loss\"\n" +
                 std::string(100, '[') + "\"val_loss\"\n{\"step\":40,\"val_lo");
    std::string out = test_folder() + "/new";
    export_to(out, join_path(run, "last"));
    std::string card = read_file(join_path(out, "README.md"));
    for (const char* line : {"library_name: transformers\n", "pipeline_tag: text-generation\n",
                             "| steps | 40 |\n", "| tokens seen | 12345 |\n", "| seed | 7 |\n",
                             "| validation loss, nats a token | 2.5000 |\n", "| layers | 2 |\n",
                             "| schedule | wsd |\n", "| parameters | 6450 |\n",
                             "| hash of the data | ab\\`\\|\\<b\\>?\\# x |\n"})
        EXPECT_NE(card.find(line), std::string::npos) << line << card;
    EXPECT_EQ(card.find("99"), std::string::npos) << card;
    fs::remove(join_path(run, "log.jsonl"));
    export_to(out + "2", run);
    card = read_file(join_path(out + "2", "README.md"));
    EXPECT_NE(card.find("best validation loss, nats a token | 9.5 |"), std::string::npos) << card;
}

TEST(Export, AnOutThatIsInUseIsRefusedAndStays) {
    std::string from = saved(mild_model(odd_configs()[0], 9).get()), folder = test_folder();
    put_file(folder + "/note", "mine");
    expect_failure([&] { export_to(folder, from); }, 2,
                   "is there already; give another name, or remove it first");
    expect_failure([&] { export_to(from, from); }, 2, "is there already");
    put_file(folder + "/x.bin", "mine");
    expect_failure([&] { export_to(folder + "/x.bin", from); }, 2, "is there already");
    expect_failure([&] { export_to(folder + "/note", from); }, 2, "is a file; FILE.bin is written");
    fs::create_directory(folder + "/y.bin");
    expect_failure([&] { export_to(folder + "/y.bin", from); }, 2, "is a folder");
    EXPECT_EQ(read_file(folder + "/x.bin") + read_file(folder + "/note"), "minemine");
    fs::create_directory(folder + "/empty");
    put_file(folder + "/z.bin", "");
    export_to(folder + "/empty", from);
    export_to(folder + "/z.bin", from);
    std::vector<std::string> names = {"empty", "note", "x.bin", "y.bin", "z.bin"};
    EXPECT_EQ(names_in(folder), names);
    expect_failure([&] { export_to("/proc/none/new", from); }, 1, "cannot create");
}

TEST(Export, RedundantTensorsThatSaySomethingNewAreRefused) {
    std::string from = saved(mild_model(odd_configs()[0], 10).get());
    auto tensors = read_raw(join_path(from, "model.safetensors"));
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"];
    checkpoint_test::write_raw(join_path(from, "model.safetensors"), tensors);
    export_to(test_folder() + "/new", from);
    tensors["lm_head.weight"].bytes[5] ^= 1;
    checkpoint_test::write_raw(join_path(from, "model.safetensors"), tensors);
    expect_failure([&] { export_to(test_folder() + "/new", from); }, 2, "the head is tied");
}

// ---- llm.c

// The file as its format is described: header, then every tensor of all layers, as float32.
std::string llmc_bytes(const GPT2* model) {
    const GPT2Config& c = gpt2_config(model);
    std::vector<int32_t> header(256);
    int padded = (c.vocab_size + 127) / 128 * 128;
    int32_t words[] = {20240326, 3, c.context, c.vocab_size, c.layers, c.heads, c.channels, padded};
    std::copy(std::begin(words), std::end(words), header.begin());
    std::string bytes(reinterpret_cast<char*>(header.data()), 1024);
    for (int index : {k_wte, k_wpe, k_ln1w, k_ln1b, k_qkvw, k_qkvb, k_attprojw, k_attprojb, k_ln2w,
                      k_ln2b, k_fcw, k_fcb, k_fcprojw, k_fcprojb, k_lnfw, k_lnfb}) {
        ParameterRow row = parameter_table(c)[size_t(index)];
        for (int layer = 0; layer < int(row.count); layer++) {
            std::vector<real> host(row.file_size());
            if (row.present) gpt2_copy_out(model, Group::parameters, index, layer, host.data());
            std::vector<float> values(host.begin(), host.end());
            if (index == k_wte) values.resize(size_t(padded) * size_t(c.channels));
            bytes.append(reinterpret_cast<char*>(values.data()), values.size() * 4);
        }
    }
    return bytes;
}

std::string put_llmc(const GPT2* model) {
    std::string path = join_path(test_folder(), "model.bin");
    put_file(path, llmc_bytes(model));
    return path;
}

void set_word(std::string* bytes, size_t index, int32_t value) {
    memcpy(bytes->data() + 4 * index, &value, 4);
}

TEST(Llmc, ModelsInFloat32KeepEveryBitBothWays) {
    for (const GPT2Config& config : plain_configs()) {
        GPT2Ptr model = filled_model(config, 41);
        std::string path = put_llmc(model.get()), out = test_folder() + "/new.bin";
        EXPECT_TRUE(read_any_config(resolve_model(path)) == config);
        EXPECT_EQ(parameter_bits(loaded(path).get()), parameter_bits(model.get()));
        EXPECT_EQ(any_conversion_note(path), "");
        export_to(out, saved(model.get()));
        EXPECT_TRUE(read_file(out) == read_file(path));
        export_to(out + "-folder", path);
        EXPECT_EQ(parameter_bits(loaded(out + "-folder").get()), parameter_bits(model.get()));
        export_to(out + ".again.bin", path);
        EXPECT_TRUE(read_file(out + ".again.bin") == read_file(path));
    }
}

TEST(Llmc, ModelsInBfloat16AreTheRoundedNumbers) {
    for (const GPT2Config& config : plain_configs()) {
        GPT2Ptr model = mild_model(config, 42);
        std::string from = saved(model.get()), out = test_folder() + "/new.bin";
        export_to(out, from, {"bf16", 0, nullptr});
        export_to(out + "-folder", from, {"bf16", 0, nullptr});
        EXPECT_EQ(parameter_bits(loaded(out).get()), parameter_bits(loaded(out + "-folder").get()));
        std::string wide = llmc_bytes(model.get()), narrow = read_file(out);
        EXPECT_EQ(narrow.size() - 1024, (wide.size() - 1024) / 2);
        EXPECT_NE(any_conversion_note(out).find("BF16"), std::string::npos);
        export_to(out + ".again.bin", out, {"bf16", 0, nullptr});
        EXPECT_TRUE(read_file(out + ".again.bin") == narrow);
    }
}

TEST(Llmc, AModelWithoutBiasesHasZerosThere) {
    GPT2Config config = odd_configs()[0];
    config.bias = false;
    GPT2Ptr model = mild_model(config, 43);
    std::string out = test_folder() + "/new.bin";
    export_to(out, saved(model.get()));
    EXPECT_TRUE(read_file(out) == llmc_bytes(model.get()));
    config.bias = true;
    EXPECT_TRUE(LlmcModel(out).config() == config);
    std::vector<real> bias(size_t(config.channels), 1);
    gpt2_copy_out(loaded(out).get(), Group::parameters, k_fcprojb, 1, bias.data());
    EXPECT_EQ(bias, std::vector<real>(bias.size(), 0));
}

TEST(Llmc, WhatItsModelsCannotBeIsRefusedWithTheReason) {
    std::pair<void (*)(GPT2Config&), const char*> cases[] = {
        {[](GPT2Config& c) { c.tied = false; }, "its head is not tied"},
        {[](GPT2Config& c) { c.hidden = 7; }, "its hidden width is 7, not 60"},
        {[](GPT2Config& c) { c.layer_norm_epsilon = 1e-6; }, "layer_norm_epsilon is 1e-06"}};
    std::string out = test_folder() + "/new.bin";
    for (const auto& [change, part] : cases) {
        GPT2Config config = odd_configs()[0];
        change(config);
        std::string from = saved(mild_model(config, 44).get());
        expect_failure([&] { export_to(out, from); }, 2, part);
        EXPECT_FALSE(fs::exists(out));
    }
    std::string from = saved(mild_model(odd_configs()[0], 45).get());
    expect_failure([&] { export_to(out, from, {"fp16", 0, nullptr}); }, 2, "llm.c has none");
    expect_failure([&] { export_to(out, from, {"fp32", 5, nullptr}); }, 2, "--max-shard-size");
    GPT2Config other = odd_configs()[0];
    other.heads = 5;
    export_to(out, from);
    expect_failure([&] { load_any_model(model_of(other).get(), out); }, 2, "of other sizes");
}

TEST(Llmc, EveryTruncationAndAnExtraByteAreRefused) {
    std::string path = put_llmc(filled_model(plain_configs()[0], 46).get());
    std::string bytes = read_file(path);
    for (size_t size = 0; size < bytes.size(); size += size < 1100 ? 1 : 61) {
        put_file(path, bytes.substr(0, size));
        expect_failure([&] { LlmcModel file(path); }, 2, path);
    }
    put_file(path, bytes.substr(0, bytes.size() - 1));
    expect_failure([&] { open_model(resolve_model(path)); }, 2, "cut?");
    put_file(path, bytes + "x");
    expect_failure([&] { open_model(resolve_model(path)); }, 2, "something follows");
    put_file(path, "GGUF");
    expect_failure([&] { resolve_model(path); }, 2, "a file, and no model of llm.c");
}

// A vocabulary may be larger than it was, up to the padding, and heads may be any that fit: nothing
// else in the file depends on either.
TEST(Llmc, EveryFieldOfTheHeaderIsChecked) {
    std::string path = put_llmc(filled_model(plain_configs()[0], 47).get());
    std::string bytes = read_file(path);
    for (size_t word = 0; word < 256; word++)
        for (int32_t value : {0, -1, 1, 2, 7, 16, 36, 1 << 15, 1 << 20, INT_MAX, INT_MIN}) {
            std::string changed = bytes;
            set_word(&changed, word, value);
            if (changed == bytes || (word == 5 && value == 1)) continue;
            put_file(path, changed);
            expect_failure([&] { loaded(path); }, 2, path);
        }
    for (int version : {1, 2, 4, 5, 6}) {
        set_word(&bytes, 1, version);
        put_file(path, bytes);
        expect_failure([&] { LlmcModel file(path); }, 2,
                       version == 5 ? "the header describes" : "byte 4: version");
    }
}

TEST(Llmc, NumbersThatAreNotFiniteAreNamedAndPaddingMustBeZero) {
    GPT2Ptr model = mild_model(plain_configs()[0], 48);
    std::string path = put_llmc(model.get()), bytes = read_file(path);
    float nan = std::nanf("");
    memcpy(bytes.data() + bytes.size() - 4, &nan, 4);
    put_file(path, bytes);
    expect_failure([&] { loaded(path); }, 2, "transformer.ln_f.bias: holds numbers");
    expect_failure([&] { export_to(test_folder() + "/new", path); }, 2, "transformer.ln_f.bias");
    EXPECT_FALSE(describe_path(path).intact);
    for (const char* dtype : {"fp32", "bf16"})
        for (int at : {37 * 15, 128 * 15 - 1}) {  // the first and the last number of the padding
            std::string out = test_folder() + "/model.bin";
            export_to(out, saved(model.get()), {dtype, 0, nullptr});
            size_t width = *dtype == 'f' ? 4 : 2;
            bytes = read_file(out);
            char& top = bytes[1024 + size_t(at + 1) * width - 1];
            top = char(0x80);  // -0
            put_file(out, bytes);
            loaded(out);
            top = 1;
            put_file(out, bytes);
            expect_failure([&] { loaded(out); }, 2,
                           format("byte %zu: not zero", 1024 + size_t(at) * width));
        }
}

// A state as llm.c writes it: header, moments and weights in the order of the model's file.
std::string llmc_state(const GPT2* model, bool weights, bool shuffle) {
    std::vector<int32_t> header(256);
    header[0] = 20240527, header[1] = 1, header[2] = 1, header[4] = weights, header[5] = shuffle;
    header[10] = 321, header[20] = 77, header[22] = 78, header[30] = 2, header[32] = 9;
    std::string bytes(reinterpret_cast<char*>(header.data()), 1024);
    GPT2Config config = gpt2_config(model);
    for (Group group : {Group::first_moments, Group::second_moments, Group::parameters}) {
        if (group == Group::parameters && !weights) continue;
        GPT2Ptr part = model_of(config);  // whose parameters are this part
        each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
            std::vector<real> host(row.file_size());
            gpt2_copy_out(model, group, index, layer, host.data());
            gpt2_copy_in(part.get(), Group::parameters, index, layer, host.data());
        });
        bytes += llmc_bytes(part.get()).substr(1024);
    }
    if (!shuffle) return bytes;
    uint64_t shards = 3, windows = 5;
    bytes.append(reinterpret_cast<char*>(&shards), 8).append(12, 'a');
    bytes.append(reinterpret_cast<char*>(&windows), 8).append(20, 'b').append(2520, 'c');
    return bytes;
}

void export_with_state(const std::string& out, const std::string& model, const LlmcState& state) {
    ExportRequest request;
    request.model = open_model(model), request.state = &state, request.out = out;
    export_model(request);
}

TEST(Llmc, AStateGivesItsMomentsAndItsWeights) {
    for (int kind = 0; kind < 4; kind++) {
        bool weights = kind % 2 == 1, shuffle = kind >= 2;
        GPT2Ptr model = mild_model(plain_configs()[0], 50);
        std::string folder = test_folder(), path = folder + "/model.bin", out = folder + "/new";
        export_to(path, saved(model.get()), {weights ? "bf16" : "fp32", 0, nullptr});
        put_file(folder + "/state.bin", llmc_state(model.get(), weights, shuffle));
        LlmcState state(folder + "/state.bin", LlmcModel(path));
        EXPECT_EQ(state.step(), 321);
        EXPECT_EQ(state.shuffles(), shuffle);
        export_with_state(out, path, state);
        EXPECT_EQ(parameter_bits(loaded(out).get()), parameter_bits(model.get()));
        EXPECT_EQ(SafetensorsFile(out + "/optimizer.safetensors").metadata().at("step"), "321");
        save_step(folder, 1, model.get());
        auto expected = read_raw(folder + "/step_00000001/optimizer.safetensors");
        auto written = read_raw(out + "/optimizer.safetensors");
        ASSERT_EQ(written.size(), expected.size());
        for (const auto& [name, tensor] : expected)
            EXPECT_TRUE(written[name].bytes == tensor.bytes) << name;
        EXPECT_TRUE(describe_path(out).intact);
        EXPECT_NE(read_file(out + "/README.md").find("| steps | 321 |"), std::string::npos);
    }
}

TEST(Llmc, AStateThatIsDamagedOrOfAnotherModelIsRefused) {
    GPT2Ptr model = mild_model(plain_configs()[0], 51), other = mild_model(plain_configs()[0], 151);
    std::string folder = test_folder(), path = folder + "/state.bin", out = folder + "/new";
    export_to(folder + "/model.bin", saved(model.get()), {"bf16", 0, nullptr});
    LlmcModel file(folder + "/model.bin");
    auto expect_refused = [&](const std::string& bytes, const std::string& part) {
        put_file(path, bytes);
        expect_failure([&] { LlmcState state(path, file); }, 2, part);
    };
    for (bool shuffle : {false, true}) {
        std::string bytes = llmc_state(model.get(), true, shuffle);
        for (size_t size = 0; size < bytes.size(); size += size < 1100 ? 1 : 611)
            expect_refused(bytes.substr(0, size), path);
        for (size_t cut : {1, 2519, 2520, 2521, 2539, 2541, 2549, 2560, 2569})
            expect_refused(bytes.substr(0, bytes.size() - cut), "cut, or");
        expect_refused(bytes + "x", "cut, or the state of another");
        for (size_t word = 0; word < 256; word++) {
            bool free = (word >= 20 && word < 24) || (word >= 30 && word < 34) || word == 10;
            for (int32_t value : {0, -1, 1, 2, INT_MAX}) {
                std::string changed = bytes;
                set_word(&changed, word, value);
                if (changed == bytes || (free && (word != 10 || value >= 0))) continue;
                expect_refused(changed, path);
            }
        }
    }
    std::string bytes = llmc_state(model.get(), true, true);
    uint64_t huge = ~uint64_t(0);
    for (size_t behind : {2520 + 20 + 8, 2520 + 20 + 8 + 12 + 8}) {
        std::string changed = bytes;
        memcpy(changed.data() + bytes.size() - behind, &huge, 8);
        expect_refused(changed, "cut, or");
    }
    auto refuse_export = [&](const std::string& state_bytes, const char* part) {
        put_file(path, state_bytes);
        LlmcState state(path, file);
        expect_failure([&] { export_with_state(out, file.path(), state); }, 2, part);
        EXPECT_FALSE(fs::exists(out));
    };
    refuse_export(llmc_state(other.get(), true, false), "is it of another step?");
    bytes = llmc_state(model.get(), true, false);
    size_t numbers = (bytes.size() - 1024) / 3;
    std::string negative = bytes;
    negative[1024 + 2 * numbers - 1] ^= char(0x80);  // the sign of the last second moment
    refuse_export(negative, "ln_f.bias: holds second moments below zero");
    bytes[1024 + 37 * 15 * 4 + 3] = 1;  // the moment of a row that pads the vocabulary
    refuse_export(bytes, "not zero");
}

// ---- damage

// A folder in memory where there is one: verifying asks the kernel to drop what it holds of a file,
// which on a disk writes each of many thousand changes out.
struct MemoryFolder {
    std::string path;
    MemoryFolder() {
        std::string pattern = "/dev/shm/test_gpt2_XXXXXX";
        path = mkdtemp(pattern.data()) != nullptr ? pattern : test_folder();
    }
    ~MemoryFolder() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
};

// Every bit of every file of a checkpoint, changed, and every length that it may be cut to: refused
// or, where it only spells the same trainer.json in another way, harmless.
TEST(Damage, EveryBitAndEveryTruncationOfACheckpointIsNoticed) {
    GPT2Config config = odd_configs()[3];
    MemoryFolder memory;
    std::string run = memory.path, folder = run + "/step_00000007";
    Tokenizer tokenizer = Tokenizer::chars("a");
    config.vocab_size = tokenizer.vocab_size();
    GPT2Ptr model = filled_model(config, 60);
    ordered_json state = {{"loader", {{"epoch", 0.1}, {"window", 3}}}, {"finished", false}};
    save_step(run, 7, model.get(), &tokenizer, state);
    json intact = verify_checkpoint(folder);
    size_t refused = 0, harmless = 0;
    for (const std::string& name : names_in(folder)) {
        std::string path = join_path(folder, name), content = read_file(path);
        int fd = open(path.c_str(), O_WRONLY);
        ASSERT_GE(fd, 0);
        auto check = [&](size_t at, int bit) {
            try {
                json trainer = verify_checkpoint(folder);
                harmless++;
                EXPECT_TRUE(name == "trainer.json" && trainer == intact)
                    << name << ": byte " << at << ", bit " << bit;
            } catch (const Error& error) {
                refused++;
                EXPECT_EQ(error.exit_code, 2) << error.what();
            }
        };
        for (size_t at = 0; at < content.size(); at++)
            for (int bit = 0; bit < 8; bit++) {
                char changed = char(content[at] ^ (1 << bit));
                ASSERT_EQ(pwrite(fd, &changed, 1, off_t(at)), 1);
                check(at, bit);
                ASSERT_EQ(pwrite(fd, &content[at], 1, off_t(at)), 1);
            }
        for (size_t size = content.size(); size-- > 0;) {
            ASSERT_EQ(ftruncate(fd, off_t(size)), 0);
            check(size, -1);
        }
        ASSERT_EQ(pwrite(fd, content.data(), content.size(), 0), ssize_t(content.size()));
        close(fd);
        EXPECT_EQ(verify_checkpoint(folder), intact);
    }
    printf("files refused: %zu, of %zu that were damaged; %zu read as before\n", refused,
           refused + harmless, harmless);
    EXPECT_LT(harmless, 20u);
}

TEST(Damage, EveryTruncationOfAModelFolderIsRefused) {
    std::string text = "the cat sat on the mat. the dog sat on the cat.\n";
    Tokenizer tokenizer = Tokenizer::train_bpe(text, 262);
    GPT2Config config = odd_configs()[3];
    config.vocab_size = tokenizer.vocab_size();
    std::string out = test_folder() + "/new";
    export_to(out, saved(mild_model(config, 61).get()), {"fp32", 1000, &tokenizer});
    size_t refused = 0;
    for (const std::string& name : names_in(out)) {
        if (name.ends_with(".md") || name == "merges.txt") continue;  // any part of a text is one
        std::string path = join_path(out, name), content = read_file(path);
        bool weights = name.ends_with(".safetensors") || name == "config.json" ||
                       name == "model.safetensors.index.json";
        size_t stride = content.size() > 5000 ? 7 : 1;
        for (size_t size = 0; size + 2 < content.size(); size += stride) {
            put_file(path, content.substr(0, size));
            auto refuses = [](const std::string& error) { return error.substr(0, 2) == "2 "; };
            if (weights) {
                EXPECT_TRUE(refuses(error_of([&] { read_model_config(out); }))) << name << size;
            }
            if (size > 0) {
                EXPECT_TRUE(refuses(error_of([&] { describe_file(path); }))) << name << size;
            }
            refused++;
        }
        put_file(path, content);
    }
    EXPECT_GT(refused, 3000u);
    EXPECT_TRUE(describe_path(out).intact);
}

// Without hashes damage to numbers cannot be seen; damage to what says where they are can.
TEST(Damage, NoBitOfAHeaderMovesANumber) {
    GPT2Config config = odd_configs()[3];
    GPT2Ptr model = mild_model(config, 62), other = model_of(config);
    std::string folder = saved(model.get()), path = join_path(folder, "model.safetensors");
    std::string content = read_file(path);
    size_t header = 8 + size_t(load_bytes<uint64_t>(content.data())), same = 0;
    uint64_t bits = parameter_bits(model.get());
    int fd = open(path.c_str(), O_WRONLY);
    ASSERT_GE(fd, 0);
    for (size_t at = 0; at < header; at++)
        for (int bit = 0; bit < 8; bit++) {
            char changed = char(content[at] ^ (1 << bit));
            ASSERT_EQ(pwrite(fd, &changed, 1, off_t(at)), 1);
            std::string error = error_of([&] { load_model(other.get(), folder); });
            ASSERT_EQ(pwrite(fd, &content[at], 1, off_t(at)), 1);
            if (!error.empty()) {
                EXPECT_EQ(error.substr(0, 2), "2 ") << error;
                continue;
            }
            same++;
            EXPECT_EQ(parameter_bits(other.get()), bits) << "byte " << at << ", bit " << bit;
        }
    close(fd);
    printf("bits of a header: %zu refused, %zu without a meaning\n", 8 * header - same, same);
    EXPECT_LT(same, 400u);  // in __metadata__, which says nothing of the numbers
}

// ---- what a path is

struct DescribedFiles {
    std::string folder = test_folder();
    void expect(const std::string& name, const std::string& content, const std::string& part,
                bool intact = true) const {
        std::string path = join_path(folder, name);
        put_file(path, content);
        PathDescription description = describe_path(path);
        EXPECT_NE(description.text.find(part), std::string::npos)
            << description.text << "\nlacks " << part;
        EXPECT_EQ(description.intact, intact) << description.text;
        EXPECT_EQ(description.text.find('\n'), std::string::npos) << description.text;
    }
};

TEST(Info, KnowsTheFilesOfLlmc) {
    DescribedFiles files;
    GPT2Ptr model = mild_model(plain_configs()[0], 70);
    std::string bytes = llmc_bytes(model.get()), state = llmc_state(model.get(), true, false);
    files.expect("model.bin", bytes, "model of llm.c: GPT-2 of 2 layers, 3 heads");
    files.expect("model.bin", bytes.substr(1), "magic", false);
    files.expect("model.bin", bytes.substr(0, 2000), "cut?", false);
    files.expect("state.bin", state, "version 1: step 321, process 0 of 1, with float32 weights");
    files.expect("state.bin", state.substr(0, 500), "header", false);
    std::string head(1024, '\0');
    set_word(&head, 0, 20240328), set_word(&head, 1, 2), set_word(&head, 2, 2);
    files.expect("tok.bin", head + "\1a\2bc", "tokenizer of llm.c, version 2: 2 tokens");
    files.expect("tok.bin", head + "\1a\2b", "token 1 of 2 is cut", false);
    files.expect("tok.bin", head + "\1a\2bcd", "something follows", false);
    files.expect("tok.bin", head + std::string("\1a\0", 3), "token 1 of 2 is cut", false);
    set_word(&head, 0, 20240327);
    files.expect("debug.bin", head, "debug state of llm.c");
    write_shard(files.folder + "/l.bin", {1, 128000}, true, 4);
    std::string llama = read_file(files.folder + "/l.bin");
    files.expect("l.bin", llama, "token shard, uint32, 2 tokens, largest id 128000, as its hash");
    llama.back() ^= 1;
    files.expect("l.bin", llama, "byte 12: the ids do not match the hash", false);
    write_shard(files.folder + "/s.bin", {1, 2, 700});
    std::string shard = read_file(files.folder + "/s.bin");
    files.expect("s.bin", shard, "token shard, uint16, 3 tokens, largest id 700");
    files.expect("s.bin", shard.substr(0, 1027), "header says 3 tokens", false);
}

TEST(Info, KnowsFilesOfOtherKinds) {
    DescribedFiles files;
    write_npy(files.folder + "/a.npy", {1, 2, 3, 4, 5, 6}, {2, 3});
    std::string array = read_file(files.folder + "/a.npy");
    files.expect("a.npy", array, "NumPy array of integers, 4 bytes each, shape (2, 3)");
    files.expect("a.npy", array.substr(0, 130), "the shape needs", false);
    write_npy(files.folder + "/b.npy", {1, 2}, {2});
    files.expect("b.npy", read_file(files.folder + "/b.npy"),
                 "token shard, .npy of int32, 2 tokens");
    files.expect("pytorch_model.bin", "PK\x03\x04....", "zip archive");
    files.expect("m.gguf", "GGUF....", "llama.cpp");
    files.expect("x.gz", "\x1f\x8b....", "gzip");
    files.expect("merges.txt", "#version: 0.2\na b\n", "merges of a BPE, 258 tokens");
    files.expect("merges.txt", "#version: 0.2\na b\na", "is not two tokens", false);
    files.expect("log.jsonl", "{\"step\":1}\n{\"step\":2}\n",
                 "2 steps and 0 events, the last of step 2");
    files.expect("log.jsonl", "{\"step\":1}\n{\"ste",
                 "1 steps and 0 events, the last of step 1; the last");
    files.expect("log.jsonl", "{\"event\":\"start\",\"step\":0}\n", "0 steps and 1 events");
    files.expect("log.jsonl", "{\"step\":1}\nx\n", "line 2: byte 1: not valid JSON", false);
    files.expect("log.jsonl", "{\"step\":-1}\n", "line 1: no record of a step", false);
    files.expect("noise", std::string("a\0b", 3), "file of no kind that is known here, 3 bytes");
    files.expect("words", "words", "text, 5 bytes");
}

TEST(Info, KnowsJsonByItsName) {
    DescribedFiles files;
    files.expect("vocab.json", R"({"a":0,"b":1})", "vocabulary of a BPE, 2 tokens");
    files.expect("vocab.json", R"({"a":0,"b":0})", "ids are from 0 to 1, each once", false);
    files.expect("vocab.json", R"({"a":0,"b":2})", "b: id 2", false);
    files.expect("vocab.json", R"({"a":0,"a":1})", "\"a\" is there twice", false);
    files.expect("vocab.json", "{}", "0 tokens");
    files.expect("tokenizer_config.json", R"({"x":0})", "settings of a tokenizer, 1 entries");
    files.expect("special_tokens_map.json", "{}", "special tokens of a tokenizer");
    files.expect("generation_config.json", "{}", "settings for generating");
    files.expect("generation_config.json", "{", "not valid JSON", false);
    files.expect("other.json", "[1,2]", "JSON, array of 2 entries");
    files.expect("config.json", R"({"model_type":"gpt2"})", "configuration: GPT-2 of 12 layers");
    files.expect("config.json", R"({"model_type":"llama"})", "this program reads gpt2", false);
    files.expect("trainer.json", R"({"step":1})", "does not match its checksum", false);
    files.expect("model.safetensors.index.json", R"({"weight_map":{"a":"b.safetensors"}})",
                 "index of 1 tensors in 1 safetensors files");
    files.expect("model.safetensors.index.json", R"({"weight_map":{"a":"../b.safetensors"}})",
                 "is no safetensors file", false);
}

// A pipe without a writer, and a device without an end.
TEST(Info, WaitsForNoPipeAndReadsNoDevice) {
    std::string run = test_folder(), step = run + "/step_00000001";
    GPT2Ptr model = mild_model(odd_configs()[3], 72);
    save_step(run, 1, model.get());
    for (const char* name : {"model.safetensors", "config.json", "trainer.json"}) {
        std::string path = join_path(step, name), kept = read_file(path);
        for (bool pipe : {true, false}) {
            fs::remove(path);
            if (!pipe) fs::create_symlink("/dev/zero", path);
            else if (mkfifo(path.c_str(), 0600) != 0) GTEST_SKIP() << "no pipes here";
            expect_failure([&] { describe_file(path); }, 2, "not a regular file");
            expect_failure([&] { verify_checkpoint(step); }, 2, "not a regular file");
            EXPECT_FALSE(describe_path(run).intact);
        }
        fs::remove(path);
        put_file(path, kept);
    }
    EXPECT_TRUE(describe_path(run).intact);
}

TEST(Info, PrintsWhatAFolderHolds) {
    std::string run = test_folder(), step = run + "/step_00000003";
    Tokenizer tokenizer = Tokenizer::chars("a b");
    GPT2Ptr model = mild_model(odd_configs()[0], 71);
    save_step(run, 3, model.get(), &tokenizer);
    put_file(step + "/note\n.txt", "x");
    std::string text = describe_path(step).text;
    for (const char* line :
         {"\n  config.json: ", "\n  model.safetensors: 28360 bytes, as recorded",
          "\n  trainer.json: state of a run at step 3", "\n  note?.txt: text, 1 bytes"})
        EXPECT_NE(text.find(line), std::string::npos) << text;
    put_file(run + "/log.jsonl", "{\"step\":1}\n");
    EXPECT_NE(describe_path(run).text.find("\n  log.jsonl: log of a run, 1 steps and 0 events"),
              std::string::npos);
    fs::remove(step + "/trainer.json");
    put_file(step + "/generation_config.json", "{");
    PathDescription broken = describe_path(step);
    EXPECT_FALSE(broken.intact);
    EXPECT_NE(broken.text.find("\n  generation_config.json: cannot be used: "), std::string::npos);
    std::string only = test_folder();
    tokenizer.save(only);
    EXPECT_EQ(describe_path(only).text.substr(0, 21), "tokenizer of 4 tokens");
}

}  // namespace convert_test

// ==== trainer ====================================================================================

namespace trainer_test {

// English enough for a tokenizer to find something in it, and no period that a window could see.
std::string some_text(size_t words) {
    constexpr const char* kWords[] = {"the ",  "model ",  "reads ", "tokens ",  "and ",
                                      "then ", "writes ", "them, ", "again.\n", "Two "};
    std::string text;
    uint32_t state = 12345;
    for (size_t i = 0; i < words; i++) {
        state = state * 1664525 + 1013904223;
        text += kWords[(state >> 16) % std::size(kWords)];
    }
    return text;
}

// A run of a model so small that a step takes a millisecond, on one thread, seen by nobody.
struct SmallRun {
    std::string folder = test_folder();
    TrainOptions options;

    SmallRun() {
        write_file_atomic(folder + "/text.txt", some_text(700));
        options.data = {folder + "/text.txt"};
        options.tokenizer = "bpe:270";
        options.model.layers = 2, options.model.heads = 2, options.model.channels = 12;
        options.model.context = 9;
        options.batch_size = 4, options.steps = 6, options.warmup = 2;
        options.eval_every = 2, options.eval_batches = 2;
        options.sample_every = 0, options.save_every = 3, options.keep = 0;
        options.compute.threads = 1, options.compute.dtype = dtype_name(test_dtype());
        options.peak = {1e9, "given"};
        options.out = folder + "/run";
        static FILE* const nobody = fopen("/dev/null", "w");
        options.screen = nobody;
    }
    int train() const {
        return train_command(options, now_s(), std::string(gpt2_program()) + " train");
    }
    // What people see of it.
    std::string train_and_read(int code = 0) {
        FILE* file = fopen((folder + "/screen").c_str(), "w");
        std::swap(file, options.screen);
        EXPECT_EQ(train(), code);
        std::swap(file, options.screen);
        fclose(file);
        return read_file(folder + "/screen");
    }

    // Lets every run do one step more and stop, as if a signal had come, until one finishes.
    int train_step_by_step() {
        int code = 0, parts = 0;
        do {
            stop_signal() = SIGINT;
            code = train();
            parts++;
        } while (code == 130 && parts < 100);
        stop_signal() = 0;
        EXPECT_EQ(parts, int(options.steps));
        return code;
    }
    std::string out(const std::string& name) const { return options.out + "/" + name; }
    std::vector<json> log() const {
        std::vector<json> records;
        std::string text = read_file(out("log.jsonl"));
        for (size_t begin = 0; begin < text.size();) {
            size_t end = text.find('\n', begin);
            json record = json::parse(text.substr(begin, end - begin));
            if (!record.contains("event")) records.push_back(record);
            begin = end + 1;
        }
        return records;
    }
    json state() const { return json::parse(read_file(out("last/trainer.json"))); }
};

void expect_same_file(const std::string& a, const std::string& b) {
    EXPECT_EQ(hash_text(hash_bytes(read_file(a).data(), read_file(a).size())),
              hash_text(hash_bytes(read_file(b).data(), read_file(b).size())))
        << a << " and " << b;
}

double largest_difference(const std::string& a, const std::string& b) {
    SafetensorsFile first(a), second(b);
    double largest = 0;
    for (const auto& [name, entry] : first.entries()) {
        std::vector<double> x(entry.count()), y(entry.count());
        first.read(name, x.data());
        second.read(name, y.data());
        for (size_t i = 0; i < x.size(); i++) largest = std::max(largest, std::abs(x[i] - y[i]));
    }
    return largest;
}

TrainOptions schedule_options(const std::string& schedule) {
    TrainOptions o;
    o.schedule = schedule, o.learning_rate = 1, o.warmup = 4, o.final_lr_fraction = 0.2;
    return o;
}

// The rate of update `step` in a run of 14 steps, 10 of them after the warm-up.
double rate_of(const std::string& schedule, size_t step) {
    Goal goal{14, 0};
    return learning_rate(schedule_options(schedule), goal, step, run_progress(goal, step, 0, 0));
}

}  // namespace trainer_test
using namespace trainer_test;

TEST(Schedule, WarmUpRisesLinearlyToTheHighestRate) {
    for (const char* schedule : {"cosine", "linear", "constant", "wsd"}) {
        EXPECT_DOUBLE_EQ(rate_of(schedule, 0), 0.25);
        EXPECT_DOUBLE_EQ(rate_of(schedule, 1), 0.50);
        EXPECT_DOUBLE_EQ(rate_of(schedule, 3), 1.00);
        EXPECT_DOUBLE_EQ(rate_of(schedule, 4), 1.00) << schedule;
    }
}

TEST(Schedule, FallsAsItsNameSaysAndIsHeldAfterTheEnd) {
    EXPECT_DOUBLE_EQ(rate_of("cosine", 9), 0.6);
    EXPECT_DOUBLE_EQ(rate_of("cosine", 6), 0.2 + 0.8 * 0.5 * (1 + std::cos(M_PI * 0.2)));
    EXPECT_DOUBLE_EQ(rate_of("linear", 9), 0.6);
    EXPECT_DOUBLE_EQ(rate_of("linear", 6), 0.84);
    EXPECT_DOUBLE_EQ(rate_of("constant", 9), 1.0);
    EXPECT_DOUBLE_EQ(rate_of("wsd", 12), 1.0);
    EXPECT_NEAR(rate_of("wsd", 13), 0.6, 1e-12);
    for (const char* schedule : {"cosine", "linear", "wsd"})
        for (size_t step : {14, 15, 1000}) EXPECT_DOUBLE_EQ(rate_of(schedule, step), 0.2);
    EXPECT_DOUBLE_EQ(rate_of("constant", 1000), 1.0);
}

TEST(Schedule, NoWarmUpStartsAtTheHighestRate) {
    TrainOptions o = schedule_options("linear");
    o.warmup = 0;
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{10, 0}, 0, 0), 1.0);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{10, 0}, 5, 0.5), 0.6);
}

TEST(Schedule, TheWarmUpIsATenthOfTheRunUnlessItIsGiven) {
    TrainOptions o = schedule_options("linear");
    o.warmup = -1;
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{40, 0}, 1, 0.025), 0.5);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{40, 0}, 4, 0.1), 1.0);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{40, 0}, 22, 0.55), 0.6);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{5, 0}, 0, 0), 1.0);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{0, 60}, 1000, 0.05), 0.5);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{0, 60}, 1000, 0.55), 0.6);
    EXPECT_GT(learning_rate(o, Goal{0, 60}, 0, 0), 0);
}

TEST(Schedule, FollowsTheClockWhenOnlyTimeIsLimited) {
    Goal goal{0, 100};
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 0, 20), 0.0);
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 40, 20), 0.5);
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 90, 20), 1.0);
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 1, 200), 1.0);
    EXPECT_DOUBLE_EQ(learning_rate(schedule_options("linear"), goal, 7, 0.5), 0.6);
    Goal both{10, 100};
    EXPECT_DOUBLE_EQ(run_progress(both, 5, 90, 20), 0.5) << "steps decide where they are given";
}

TEST(Options, NumbersOutsideTheirRangeAreRefused) {
    auto refused = [](const CLI::Validator& check, std::string word) { return check(word) != ""; };
    CLI::Validator whole = in_range<int>(1, 100), number = in_range<double>(0, 10);
    for (const char* word : {"1", "100", "+7"}) EXPECT_FALSE(refused(whole, word)) << word;
    for (const char* word : {"0", "101", "-1", "1.5", "1e1", "0x10", "", "abc", "7a", "nan", "inf",
                             "99999999999999999999"})
        EXPECT_TRUE(refused(whole, word)) << word;
    for (const char* word : {"0", "10", "2e-3", ".5"}) EXPECT_FALSE(refused(number, word)) << word;
    for (const char* word : {"-0.1", "10.1", "nan", "NaN", "inf", "-inf", "1e999", "0x1p2", ""})
        EXPECT_TRUE(refused(number, word)) << word;
}

TEST(Options, TheNearestWordIsSuggested) {
    EXPECT_EQ(edit_distance("batch", "batch"), 0u);
    EXPECT_EQ(edit_distance("bacth", "batch"), 1u);
    EXPECT_EQ(edit_distance("", "abc"), 3u);
    EXPECT_EQ(nearest("--bacth-size", {"--steps", "--batch-size", "--beta1"}), "--batch-size");
}

TEST(Options, AccumulationFollowsFromTheTokensOfAStep) {
    TrainOptions o;
    o.batch_size = 4;
    EXPECT_EQ(accumulation(o, 8, 1), 1);
    o.total_batch_tokens = 128;
    EXPECT_EQ(accumulation(o, 8, 1), 4);
    EXPECT_EQ(accumulation(o, 8, 2), 2);
    o.total_batch_tokens = 100;
    std::string error = error_of([&] { accumulation(o, 8, 1); });
    EXPECT_NE(error.find("96 or 128"), std::string::npos) << error;
    o.batch_size = 1 << 24;
    EXPECT_EQ(error_of([&] { accumulation(o, 1 << 20, 1); }).substr(0, 2), "2 ");
}

TEST(Options, ModelSizesOverrideTheNamedModelAndMustFit) {
    ModelOptions o;
    o.model = "tiny", o.layers = 3;
    GPT2Config config = choose_model(o).config;
    EXPECT_EQ(config.layers, 3);
    EXPECT_EQ(config.channels, 128);
    o.heads = 5, o.channels = 64;
    EXPECT_EQ(error_of([&] { choose_model(o); }),
              "2 --heads 5 --channels 64: heads must divide channels; 4 or 8 heads would fit, or "
              "60 or 65 channels");
    o.model = "gpt3";
    EXPECT_EQ(error_of([&] { choose_model(o); }).substr(0, 22), "2 --model gpt3: no suc");
    EXPECT_EQ(choose_sequence_length(0, config), 128);
    EXPECT_EQ(choose_sequence_length(5, config), 5);
    EXPECT_EQ(error_of([&] { choose_sequence_length(129, config); }).substr(0, 2), "2 ");
}

TEST(Plan, AddsUpToWhatTheTwinAllocates) {
    for (bool training : {false, true}) {
        for (int generate : {0, 1, 3}) {
            GPT2Config config = default_config();
            config.vocab_size = 1000;
            GPT2Shape shape = test_shape(3, 17, training, generate);
            size_t parameters = allocated_parameters(config), narrow = 0, exact = 0;
            for (const ActivationRow& row : activation_table(config, shape))
                (row.narrow ? narrow : exact) += row.allocated();
            exact += parameters * (training ? 4 : 1);
            shape.dtype = Dtype::fp32;
            size_t bytes = (narrow + exact) * sizeof(real);
            EXPECT_EQ(total_bytes(tensor_memory(config, shape)), bytes);
            EXPECT_LE(bytes, total_bytes(gpt2_memory(config, shape)));
            shape.dtype =
                Dtype::bf16;  // a copy of the parameters, which is all that sampling needs
            if (!training) exact -= parameters;
            EXPECT_EQ(total_bytes(tensor_memory(config, shape)),
                      2 * (narrow + parameters) + exact * sizeof(real));
        }
    }
}

// A level keeps what its name says for one layer in place of all.
TEST(Plan, EachLevelOfRecomputingSavesItsRows) {
    GPT2Config config = default_config();
    config.layers = 5;
    GPT2Shape shape = training_shape(3, 17);
    ActivationTable all = activation_table(config, shape);
    const std::set<int> gelu = {a_fch_gelu}, norms = {a_ln1, a_ln2};
    for (int level = 1; level < kRecomputeLevels; level++) {
        shape.recompute = level;
        ActivationTable table = activation_table(config, shape);
        for (int i = 0; i < kActivationRows; i++) {
            bool saved = all[size_t(i)].count == 5;
            bool once = gelu.count(i) > 0 || (level >= 2 && norms.count(i) > 0) ||
                        (level == 3 && i != a_residual3);
            EXPECT_EQ(table[size_t(i)].count, saved && once ? 1 : all[size_t(i)].count)
                << all[size_t(i)].name << ", level " << level;
        }
    }
    shape.training = false;
    for (const ActivationRow& row : activation_table(config, shape)) EXPECT_LE(row.count, 1u);
}

// The largest batch fits and the next does not; of the levels, the lowest that fits is taken.
TEST(Plan, WhatFitsIsFoundExactly) {
    GPT2Config config = default_config();
    config.layers = 6, config.context = 512;
    GPT2Shape shape = training_shape(1, 512);
    auto bytes = [&](int batch, int level) {
        shape.B = batch, shape.recompute = level;
        return total_bytes(gpt2_memory(config, shape));
    };
    for (int batch : {1, 2, 3, 64, 65, 1000}) {
        for (int level = 0; level < kRecomputeLevels; level++) {
            size_t free = bytes(batch, level);
            EXPECT_EQ(largest_batch(config, shape, free), batch);
            EXPECT_EQ(largest_batch(config, shape, free - 1), batch - 1);
            EXPECT_EQ(choose_recompute("auto", config, shape, free), level);
            EXPECT_EQ(choose_recompute("2", config, shape, free), 2);
        }
    }
    EXPECT_EQ(choose_recompute("auto", config, shape, 0), 0) << "nobody knows what is free";
    EXPECT_EQ(choose_recompute("auto", config, shape, 1), 3) << "nothing fits";

    size_t free = bytes(8, 3);
    bytes(8, 1);
    EXPECT_EQ(what_would_fit(config, shape, free), "--recompute 3 would fit");
    int batch = largest_batch(config, shape, free);
    bytes(100, 1);
    EXPECT_EQ(what_would_fit(config, shape, free), format("--batch-size %d would fit", batch));
    size_t least = bytes(1, 3);
    bytes(100, 1);
    EXPECT_EQ(what_would_fit(config, shape, least), "--batch-size 1 --recompute 3 would fit");
    EXPECT_EQ(what_would_fit(config, shape, least - 1), "a smaller --sequence-length would fit");
    EXPECT_EQ(what_would_fit(config, shape, 1000), "a smaller --model would fit");
}

TEST(Plan, SaysWhatFitsAndWhetherTheRunDoes) {
    GPT2Config config = default_config();
    config.layers = 6, config.context = 512;
    GPT2Shape shape = training_shape(8, 512);
    size_t needed = total_bytes(gpt2_memory(config, shape));
    std::string size = readable_bytes(double(needed));
    std::vector<std::string> lines = fit_report(config, shape, needed);
    ASSERT_EQ(lines.size(), 2u);
    EXPECT_EQ(lines[0], "fits       --batch-size 8 --recompute 0 at most; as asked: " + size +
                            " of " + size + " (--recompute 0)");
    std::string above = "           --batch-size ";
    for (int level = 1; level < kRecomputeLevels; level++) {
        shape.recompute = level;
        above += format(level == 1 ? "%d with --recompute %d" : ", %d with %d",
                        largest_batch(config, shape, needed), level);
    }
    EXPECT_EQ(lines[1], above);
    shape.recompute = 0;
    lines = fit_report(config, shape, needed - 1);
    EXPECT_EQ(lines[0].find("fits       --batch-size 7 --recompute 0 at most; as asked"), 0u);
    EXPECT_NE(lines[0].find(" (--recompute 0), too much"), std::string::npos) << lines[0];
    lines = fit_report(config, shape, 1000);
    ASSERT_EQ(lines.size(), 1u);
    EXPECT_EQ(lines[0].find("fits       no batch; as asked"), 0u) << lines[0];
    EXPECT_EQ(fit_report(config, shape, 0)[0].find("fits       unknown"), 0u);
}

TEST(Plan, NumbersForPeopleAreReadable) {
    EXPECT_EQ(with_commas(0), "0");
    EXPECT_EQ(with_commas(999), "999");
    EXPECT_EQ(with_commas(1234567), "1,234,567");
    EXPECT_EQ(readable_bytes(1536), "1.5 KiB");
    EXPECT_EQ(readable_time(3723), "1:02:03");
    EXPECT_EQ(readable_time(INFINITY), "years");
    EXPECT_EQ(readable_rate(23456), "23.5k");
}

TEST(Data, TheLastTenthOfShardsIsForValidation) {
    std::string folder = test_folder();
    std::vector<int> ids(100);
    for (int i = 0; i < 100; i++) ids[size_t(i)] = i;
    write_shard(folder + "/a.bin", ids);
    write_shard(folder + "/b.bin", std::vector<int>(ids.begin(), ids.begin() + 5));
    TrainOptions o;
    o.data = {folder + "/*.bin"};
    TrainingData data = read_data(o, choose_model(o.model), folder);
    EXPECT_EQ(count_tokens(data.train), 94u);
    EXPECT_EQ(count_tokens(data.val), 11u);
    ASSERT_EQ(data.val.size(), 2u);
    EXPECT_EQ(data.train.back()[93], 93);
    EXPECT_EQ(data.val[0][0], 94);
    EXPECT_EQ(data.val[1][4], 4);
}

TEST(Data, TextShorterThanAWindowSaysWhatWouldFit) {
    SmallRun run;
    write_file_atomic(run.options.data[0], "ab");
    std::string error = error_of([&] { run.train(); });
    EXPECT_EQ(error.substr(0, 2), "2 ");
    EXPECT_NE(error.find("text.txt"), std::string::npos) << error;
    write_file_atomic(run.options.data[0], "abcdefghijk");
    run.options.tokenizer = "bytes";
    run.options.model.context = 64;
    error = error_of([&] { run.train(); });
    EXPECT_NE(error.find("--sequence-length 8"), std::string::npos) << error;
}

TEST(Data, ATrainedTokenizerIsKeptAndADamagedOneMadeAnew) {
    std::string folder = test_folder(), text = some_text(300);
    uint64_t first = train_bpe_cached(text, 280, folder).fingerprint();
    std::string file;
    for (const auto& entry : fs::recursive_directory_iterator(folder))
        if (entry.path().filename() == "tokenizer.json") file = entry.path().string();
    ASSERT_NE(file, "");
    Tokenizer::train_bpe(text, 270).save(fs::path(file).parent_path().string());
    EXPECT_NE(train_bpe_cached(text, 280, folder).fingerprint(), first) << "taken from the cache";
    write_file_atomic(file, "{");
    EXPECT_EQ(train_bpe_cached(text, 280, folder).fingerprint(), first);
}

TEST(Run, WritesOneRecordAStepAndAModelThatLoads) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    std::vector<json> log = run.log();
    ASSERT_EQ(log.size(), 6u);
    for (size_t i = 0; i < log.size(); i++) {
        EXPECT_EQ(log[i].at("step"), i + 1);
        for (const char* key :
             {"train_loss", "learning_rate", "grad_norm", "tokens_per_s", "step_ms", "epoch"})
            EXPECT_TRUE(log[i].at(key).is_number()) << key;
        bool evaluated = i % 2 == 1;
        EXPECT_EQ(log[i].contains("val_loss"), evaluated);
        EXPECT_EQ(log[i].contains("val_bits_per_byte"), evaluated);
    }
    EXPECT_NEAR(log[0].at("train_loss").get<double>(), std::log(270), 0.1);
    EXPECT_DOUBLE_EQ(log[0].at("learning_rate"), 1e-3);
    EXPECT_EQ(run.state().at("step"), 6u);
    EXPECT_TRUE(run.state().at("finished"));
    EXPECT_TRUE(describe_path(run.options.out).intact);
    EXPECT_TRUE(path_exists(run.out("step_00000003/model.safetensors")));
}

TEST(Run, ResumedAtEveryStepItEndsWithTheSameBits) {
    SmallRun whole, parts;
    for (SmallRun* run : {&whole, &parts}) {
        run->options.model.dropout = 0.2;
        run->options.total_batch_tokens = 72;
    }
    EXPECT_EQ(whole.train(), 0);
    EXPECT_EQ(parts.train_step_by_step(), 0);
    expect_same_file(whole.out("last/model.safetensors"), parts.out("last/model.safetensors"));
    expect_same_file(whole.out("last/optimizer.safetensors"),
                     parts.out("last/optimizer.safetensors"));
    std::vector<json> a = whole.log(), b = parts.log();
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); i++) {
        for (const char* key : {"step", "train_loss", "learning_rate", "grad_norm", "epoch"})
            EXPECT_EQ(a[i].at(key), b[i].at(key)) << key << " of record " << i;
        EXPECT_EQ(a[i].value("val_loss", 0.0), b[i].value("val_loss", 0.0));
    }
    for (const char* key : {"best_val_loss", "best_step", "loader", "tokens"})
        EXPECT_EQ(whole.state().at(key), parts.state().at(key)) << key;
}

TEST(Run, TheSameCommandTwiceGivesTheSameBitsAndAnotherSeedOthers) {
    SmallRun a, b, c;
    c.options.seed = 7;
    for (SmallRun* run : {&a, &b, &c}) EXPECT_EQ(run->train(), 0);
    expect_same_file(a.out("last/model.safetensors"), b.out("last/model.safetensors"));
    EXPECT_GT(largest_difference(a.out("last/model.safetensors"), c.out("last/model.safetensors")),
              1e-3);
}

TEST(Run, FourMicroBatchesOfOneEqualOneOfFour) {
    SmallRun one, four;
    four.options.batch_size = 1;
    four.options.total_batch_tokens = 4 * 9;
    for (SmallRun* run : {&one, &four}) {
        run->options.model.dropout = 0.1;
        run->options.compute.dtype = "fp32";
        run->options.epsilon = 1e-4;  // where a gradient is nearly 0, Adam makes its rounding count
        EXPECT_EQ(run->train(), 0);
    }
    EXPECT_LT(
        largest_difference(one.out("last/model.safetensors"), four.out("last/model.safetensors")),
        2e-6);
    for (size_t i = 0; i < 6; i++)
        EXPECT_NEAR(one.log()[i].at("train_loss").get<double>(),
                    four.log()[i].at("train_loss").get<double>(), 1e-5);
}

// A step is looked at while the next one is at work, unless something needs it done: evaluating
// after every step waits for each, and changes neither the records nor the checkpoints.
TEST(Run, LookingAtStepsLaterChangesNoRecordAndNoCheckpoint) {
    SmallRun later, at_once;
    at_once.options.eval_every = 1;
    later.options.eval_every = 4, later.options.sample_every = 6, later.options.save_every = 5;
    for (SmallRun* run : {&later, &at_once}) {
        run->options.steps = 23, run->options.total_batch_tokens = 72;
        EXPECT_EQ(run->train(), 0);
    }
    std::vector<json> log = later.log(), expected = at_once.log();
    ASSERT_EQ(log.size(), 23u);
    ASSERT_EQ(expected.size(), 23u);
    for (size_t i = 0; i < 23; i++) {
        EXPECT_EQ(log[i].at("step"), i + 1);
        for (const char* key :
             {"step", "train_loss", "learning_rate", "grad_norm", "epoch", "tokens"})
            EXPECT_EQ(log[i].at(key), expected[i].at(key)) << key << " of record " << i;
        bool evaluated = i % 4 == 3 || i == 22;
        EXPECT_EQ(log[i].contains("val_loss"), evaluated) << i;
        if (evaluated) { EXPECT_EQ(log[i].at("val_loss"), expected[i].at("val_loss")) << i; }
        EXPECT_GT(log[i].at("step_ms").get<double>(), 0) << i;
        EXPECT_GE(log[i].at("elapsed_s").get<double>(),
                  i > 0 ? log[i - 1].at("elapsed_s").get<double>() : 0.0);
    }
    for (size_t step : {5, 10, 15, 20, 23}) {
        std::string name = step_name(step);
        RunState state = read_state(later.out(name), nullptr);
        EXPECT_EQ(state.step, step);
        EXPECT_EQ(state.tokens, step * 72);
        if (!path_exists(at_once.out(name))) continue;  // kept there as the best only
        RunState other = read_state(at_once.out(name), nullptr);
        EXPECT_EQ(state.position.epoch, other.position.epoch) << name;
        EXPECT_EQ(state.position.window, other.position.window) << name;
        expect_same_file(later.out(name) + "/model.safetensors",
                         at_once.out(name) + "/model.safetensors");
    }
    expect_same_file(later.out("last/optimizer.safetensors"),
                     at_once.out("last/optimizer.safetensors"));
}

TEST(Run, EveryLevelOfRecomputingTrainsToTheSameBits) {
    SmallRun plain;
    plain.options.model.dropout = 0.1;
    plain.options.recompute = "0";
    EXPECT_EQ(plain.train(), 0);
    for (const char* level : {"1", "2", "3"}) {
        SmallRun run;
        run.options.model.dropout = 0.1;
        run.options.recompute = level;
        std::string said = run.train_and_read();
        EXPECT_NE(said.find(std::string("recompute level ") + level), std::string::npos) << said;
        expect_same_file(plain.out("last/model.safetensors"), run.out("last/model.safetensors"));
    }
}

TEST(Run, OverfitsOneBatchToNearlyNothing) {
    SmallRun run;
    run.options.overfit_one_batch = true;
    run.options.model.channels = 32;
    run.options.steps = 250, run.options.learning_rate = 1e-2, run.options.weight_decay = 0;
    run.options.save_every = 0;
    EXPECT_EQ(run.train(), 0);
    EXPECT_LT(run.log().back().at("train_loss").get<double>(), 0.01);
    EXPECT_FALSE(run.log().back().contains("val_loss"));
}

TEST(Run, StopsEarlyWhenEvaluationsDoNotGain) {
    SmallRun run;
    run.options.learning_rate = 0;  // so that no evaluation is better than the first
    run.options.steps = 50, run.options.early_stop = 2;
    EXPECT_EQ(run.train(), 0);
    EXPECT_EQ(run.state().at("step"), 6u);
    EXPECT_EQ(run.state().at("best_step"), 2u);
    EXPECT_EQ(linked_step(run.options.out, "best"), "step_00000002");
    EXPECT_EQ(linked_step(run.options.out, "last"), "step_00000006");
}

TEST(Run, KeepsTheBestBesideTheNewest) {
    SmallRun run;
    run.options.learning_rate = 0, run.options.keep = 1, run.options.save_every = 1;
    EXPECT_EQ(run.train(), 0);
    EXPECT_TRUE(path_exists(run.out("step_00000002")));
    EXPECT_FALSE(path_exists(run.out("step_00000005")));
    EXPECT_TRUE(path_exists(run.out("step_00000006")));
}

TEST(Run, AFinishedRunIsNotTrainedOnUnlessMoreIsAskedFor) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    std::string error = error_of([&] { run.train(); });
    EXPECT_EQ(error.substr(0, 2), "2 ");
    EXPECT_NE(error.find("finished run of 6 steps"), std::string::npos) << error;
    run.options.steps = 8;
    EXPECT_EQ(run.train(), 0);
    EXPECT_EQ(run.log().size(), 8u);
    run.options.resume = "never";
    EXPECT_EQ(run.train(), 0);
    EXPECT_TRUE(path_exists(run.options.out + ".1/step_00000008")) << "set aside, not lost";
    EXPECT_EQ(run.log().size(), 8u);
}

TEST(Run, AnotherModelSeedOrTextIsRefusedWithBothValues) {
    SmallRun run;
    stop_signal() = SIGINT;
    EXPECT_EQ(run.train(), 130);
    stop_signal() = 0;
    TrainOptions first = run.options;
    auto expect_refusal = [&](const std::string& what) {
        std::string error = error_of([&] { run.train(); });
        EXPECT_NE(error.find(what), std::string::npos) << error;
        run.options = first;
    };
    run.options.model.layers = 3;
    expect_refusal("layers is 2 there and 3 here");
    run.options.seed = 1;
    expect_refusal("seed is 42 there and 1 here");
    run.options.sequence_length = 5;
    expect_refusal("sequence length is 9 there and 5 here");
    run.options.tokenizer = "bytes";
    expect_refusal("vocabulary is 270 there and 257 here");
    run.options.windows = "random";
    expect_refusal("windows is \"shuffled\" there and \"random\" here");
    run.options.windows = "sliding";
    expect_refusal("windows is \"shuffled\" there and \"sliding\" here");
    run.options.separate_documents = true;
    expect_refusal("separate documents is false there and true here");
    write_file_atomic(run.options.data[0], some_text(701));
    expect_refusal("data is ");
}

// Runs of before there were orders to choose from.
TEST(Run, AnOlderIdentityIsThatOfTheDefaultOrder) {
    ordered_json mine = {{"seed", 42}, {"windows", "shuffled"}, {"stride", 0}};
    mine["separate documents"] = false;
    json older = {{"seed", 42}};
    EXPECT_EQ(identity_difference(older, mine), "");
    mine["windows"] = "random";
    EXPECT_EQ(identity_difference(older, mine),
              "windows is \"shuffled\" there and \"random\" here");
    mine["windows"] = "shuffled", mine["separate documents"] = true;
    EXPECT_EQ(identity_difference(older, mine), "separate documents is false there and true here");
    mine = {{"layers", 2}};
    EXPECT_EQ(identity_difference(older, mine), "layers is nothing there and 2 here");
}

TEST(Run, EveryOrderOfWindowsIsResumedToTheSameBits) {
    for (const char* order : {"sliding", "random"})
        for (bool apart : {false, true}) {
            SmallRun whole, parts;
            for (SmallRun* run : {&whole, &parts}) {
                run->options.windows = order;
                run->options.stride = std::string(order) == "sliding" ? 4 : 0;
                run->options.separate_documents = apart;
                run->options.total_batch_tokens = 72;
                run->options.steps = 4;
                run->options.data.clear();
                for (int i = 0; i < 9; i++) {
                    run->options.data.push_back(run->folder + format("/%d.txt", i));
                    write_file_atomic(run->options.data.back(), some_text(90 + i));
                }
            }
            EXPECT_EQ(whole.train(), 0);
            EXPECT_EQ(parts.train_step_by_step(), 0);
            for (const char* file : {"last/model.safetensors", "last/optimizer.safetensors"})
                expect_same_file(whole.out(file), parts.out(file));
            json start = json::parse(read_file(whole.out("log.jsonl"))
                                         .substr(0, read_file(whole.out("log.jsonl")).find('\n')));
            EXPECT_EQ(start["run"]["windows"], order);
            EXPECT_EQ(start["run"]["separate documents"], apart);
        }
}

// Documents that are kept apart: the loss is the mean over the other targets, and so is the
// gradient, whatever stands where the loss is not.
TEST(Run, TargetsAcrossDocumentsHaveNoLossAndNoGradient) {
    constexpr int V = 23, T = 9, kEnd = 22;
    GPT2Config config;
    config.vocab_size = V, config.context = T;
    config.layers = 1, config.heads = 2, config.channels = 8;
    GPT2Shape shape{2, T};
    shape.training = true, shape.dtype = test_dtype();
    std::vector<int> inputs = random_ids(2 * T, V - 1, 5), targets = random_ids(2 * T, V - 1, 6);
    inputs[3] = inputs[8] = inputs[9] = kEnd;
    auto gradient = [&](std::vector<int> of, double* loss) {
        for (size_t b = 0; b < 2; b++) separate_documents(&inputs[b * T], &of[b * T], T, kEnd);
        EXPECT_EQ(std::count(of.begin(), of.end(), kIgnore), 3);
        GPT2Ptr model(gpt2_create(config, shape, 0, 1));
        gpt2_initialise(model.get(), 1);
        GPT2Pass pass;
        pass.training = true, pass.loss_scale = 1.0 / (2 * T - 3);
        gpt2_zero_gradients(model.get());
        gpt2_forward(model.get(), inputs.data(), of.data(), 2, T, pass);
        gpt2_backward(model.get());
        *loss = gpt2_stats(model.get()).loss;
        std::vector<real> host(parameter_table(config)[k_wte].file_size());
        gpt2_copy_out(model.get(), Group::gradients, k_wte, 0, host.data());
        return host;
    };
    double loss = 0, other_loss = 0;
    std::vector<real> first = gradient(targets, &loss);
    for (size_t i : {3, 8, 9}) targets[i] = (targets[i] + 7) % (V - 1);
    EXPECT_EQ(gradient(targets, &other_loss), first);
    EXPECT_EQ(loss, other_loss);
    EXPECT_NEAR(loss, std::log(V), 0.1);
}

TEST(Run, ResumesFromANamedCheckpointAndCutsTheLog) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    std::string whole = read_file(run.out("last/model.safetensors"));
    run.options.resume = run.out("step_00000003");
    run.options.out = "";
    EXPECT_EQ(run.train(), 0);
    run.options.out = run.folder + "/run";
    EXPECT_EQ(run.log().size(), 6u);
    EXPECT_TRUE(read_file(run.out("last/model.safetensors")) == whole);
    run.options.resume = run.folder + "/nothing";
    EXPECT_EQ(error_of([&] { run.train(); }).substr(0, 11), "2 --resume ");
}

TEST(Run, TheLogLosesWhatCameAfterTheCheckpointAndWhatACrashCutShort) {
    std::string folder = test_folder();
    write_file_atomic(folder + "/log.jsonl",
                      "{\"step\":1}\n{\"step\":2}\n[3]\nnoise\n{\"step\":3}\n{\"st");
    { RunLog log(folder, 2); }
    EXPECT_EQ(read_file(folder + "/log.jsonl"), "{\"step\":1}\n{\"step\":2}\n");
    {
        RunLog log(folder, 2);
        log.write({{"step", 3}});
    }
    EXPECT_EQ(read_file(folder + "/log.jsonl"), "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
}

// A disk that takes no more of the log: the records wait, none is there by half, and once there is
// room all are.
TEST(Run, TheLogKeepsWhatTheDiskRefuses) {
    std::string folder = test_folder(), path = folder + "/log.jsonl";
    RunLog log(folder, 0);
    EXPECT_EQ(log.write({{"step", 1}}), "");
    rlimit old_limit;
    getrlimit(RLIMIT_FSIZE, &old_limit);
    auto old_action = signal(SIGXFSZ, SIG_IGN);
    rlimit small = {15, old_limit.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    std::string first = log.write({{"step", 2}}), second = log.write({{"step", 3}});
    std::string error = error_of([&] { log.sync(); });
    setrlimit(RLIMIT_FSIZE, &old_limit);
    signal(SIGXFSZ, old_action);
    EXPECT_EQ(first, "File too large");
    EXPECT_EQ(second, "") << "said once";
    EXPECT_EQ(error.substr(0, 2), "1 ");
    EXPECT_EQ(read_file(path), "{\"step\":1}\n");
    EXPECT_EQ(log.write({{"step", 4}}), "");
    EXPECT_EQ(read_file(path), "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":4}\n");
}

TEST(Run, TheLogFollowsAFolderThatIsRemoved) {
    std::string folder = test_folder() + "/run", path = folder + "/log.jsonl";
    make_folder(folder);
    RunLog log(folder, 0);
    log.write({{"step", 1}});
    fs::remove_all(folder);
    EXPECT_EQ(log.write({{"step", 2}}), "");
    EXPECT_EQ(read_file(path), "{\"step\":1}\n{\"step\":2}\n");
    log.cut(1);
    EXPECT_EQ(read_file(path), "{\"step\":1}\n");
}

TEST(Run, ADamagedStateIsRefused) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    json root = run.state();
    for (const char* key : {"format", "tokens", "loader", "elapsed_s", "finished", "goal", "run"}) {
        json damaged = root;
        damaged[key] = "x";
        write_file_atomic(run.folder + "/trainer.json", damaged.dump());
        json identity;
        bool any = std::string(key) == "run";  // compared, not interpreted
        EXPECT_EQ(error_of([&] { read_state(run.folder, &identity); }) == "", any) << key;
    }
    fs::resize_file(run.out("step_00000006/model.safetensors"), 1000);
    fs::resize_file(run.out("step_00000003/trainer.json"), 10);
    run.options.steps = 9;
    EXPECT_EQ(run.train(), 0) << "goes on from the newest checkpoint that is intact";
    EXPECT_EQ(run.log().size(), 9u);
}

TEST(Run, AFolderOfWeightsIsWhereFineTuningStarts) {
    SmallRun run, tuned;
    EXPECT_EQ(run.train(), 0);
    tuned.options.model = {};
    tuned.options.model.model = run.options.out;
    tuned.options.tokenizer = "auto";
    tuned.options.learning_rate = 0, tuned.options.steps = 1;
    EXPECT_EQ(tuned.train(), 0);
    expect_same_file(run.out("last/model.safetensors"), tuned.out("last/model.safetensors"));
    tuned.options.out += "-2";
    tuned.options.model.layers = 3;
    EXPECT_EQ(error_of([&] { tuned.train(); }).substr(0, 13), "2 --layers 3:");
}

TEST(Run, ALossThatIsNotANumberEndsIt) {
    SmallRun run, tuned;
    run.options.steps = 1;
    EXPECT_EQ(run.train(), 0);
    GPT2Config config = read_config(resolve_model_folder(run.options.out));
    GPT2Ptr model(gpt2_create(config, GPT2Shape{}, 0, 1));
    load_model(model.get(), resolve_model_folder(run.options.out));
    std::vector<real> huge(size_t(config.channels), std::numeric_limits<real>::max());
    gpt2_copy_in(model.get(), Group::parameters, k_lnfw, 0, huge.data());
    Tokenizer tokenizer = Tokenizer::load(resolve_model_folder(run.options.out));
    save_model(model.get(), &tokenizer, tuned.folder + "/huge");
    tuned.options.model = {};
    tuned.options.model.model = tuned.folder + "/huge";
    tuned.options.tokenizer = "auto";
    std::string error = error_of([&] { tuned.train(); });
    EXPECT_EQ(error.substr(0, 2), "1 ");
    EXPECT_NE(error.find("step 1 and the 2 after it: loss nan"), std::string::npos) << error;
    EXPECT_EQ(latest_checkpoint(tuned.options.out), "");
}

// A model of a folder, untied, whose embedding of the byte Q overflows in the first layer norm, and
// text in which that byte is there once.
struct RunWithOneBadWindow : SmallRun {
    RunWithOneBadWindow() {
        std::string text = some_text(400);
        text[text.size() / 2] = 'Q';
        write_file_atomic(folder + "/text.txt", text);
        GPT2Config config;
        config.vocab_size = 257, config.layers = 2, config.heads = 2, config.channels = 12;
        config.context = 9, config.tied = false;
        GPT2Ptr model(gpt2_create(config, test_shape(1, 9), 0, 1));
        gpt2_initialise(model.get(), 5);
        std::vector<real> wte(257 * 12);
        gpt2_copy_out(model.get(), Group::parameters, k_wte, 0, wte.data());
        std::fill_n(wte.begin() + 'Q' * 12, 12, real(3e38));
        gpt2_copy_in(model.get(), Group::parameters, k_wte, 0, wte.data());
        Tokenizer tokenizer = Tokenizer::bytes();
        save_model(model.get(), &tokenizer, folder + "/model");
        options.model = {};
        options.model.model = folder + "/model";
        options.tokenizer = "auto", options.eval_every = 0, options.save_every = 10;
        options.steps = 60;  // more than an epoch
    }
    std::vector<size_t> skipped_steps() const {
        std::vector<size_t> steps;
        for (const json& record : log())
            if (record.contains("skipped")) steps.push_back(record.at("step"));
        return steps;
    }
};

TEST(Run, AStepThatIsNotFiniteIsSkippedAndItsDataNamed) {
    RunWithOneBadWindow run, parts;
    EXPECT_EQ(run.train(), 0);
    std::vector<json> log = run.log();
    ASSERT_EQ(log.size(), 60u);
    std::vector<size_t> skipped = run.skipped_steps();
    ASSERT_GE(skipped.size(), 1u);
    EXPECT_LE(skipped.size(), 3u);
    for (const json& record : log) {
        bool bad = record.contains("skipped");
        EXPECT_EQ(record.at("train_loss").is_number(), !bad) << record;
        if (bad) { EXPECT_TRUE(record.at("data").at("window").is_number_unsigned()) << record; }
    }
    EXPECT_LT(log.back().at("train_loss").get<double>(), 5.0);
    EXPECT_EQ(parts.train_step_by_step(), 0);
    EXPECT_EQ(parts.skipped_steps(), skipped);
    expect_same_file(run.out("last/model.safetensors"), parts.out("last/model.safetensors"));
}

TEST(Run, TooManyBadStepsEndItWithADiagnosis) {
    for (size_t limit : {1, 2}) {
        RunWithOneBadWindow run;
        run.options.max_bad_steps = limit;
        if (limit == 2) run.options.overfit_one_batch = true;  // a bad batch again and again
        if (limit == 2) write_file_atomic(run.folder + "/text.txt", std::string(3000, 'Q'));
        std::string error = error_of([&] { run.train(); });
        EXPECT_EQ(error.substr(0, 2), "1 ");
        EXPECT_NE(error.find("first in layer 0: ln1; none was applied"), std::string::npos)
            << error;
        if (limit == 2) { EXPECT_NE(error.find("step 1 and the 1 after it"), std::string::npos); }
        json diagnosis = json::parse(read_file(run.out("diagnosis.json")));
        EXPECT_EQ(diagnosis.at("first"), "layer 0: ln1");
        EXPECT_EQ(diagnosis.at("bad_steps_in_a_row"), limit);
        EXPECT_GE(diagnosis.at("not_finite").get<size_t>(), 12u);
        std::string checkpoint = latest_checkpoint(run.options.out);
        if (limit == 2) {
            EXPECT_EQ(checkpoint, "");
        } else {
            EXPECT_EQ(read_state(checkpoint, nullptr).step,
                      diagnosis.at("step").get<size_t>() / 10 * 10);
        }
    }
}

// Text of one pattern, with a stretch that is like nothing before it.
TEST(Run, ASpikeIsReportedAndRolledBack) {
    std::string text;
    for (int i = 0; i < 900; i++) text += "abcd ";
    std::string noise;
    for (int id : random_ids(30, 26, 7)) noise += char('A' + id);
    text.replace(2000, noise.size(), noise);
    auto prepare = [&](SmallRun& run, const char* on_spike) {
        write_file_atomic(run.folder + "/text.txt", text);
        run.options.tokenizer = "bytes", run.options.on_spike = on_spike;
        run.options.spike_threshold = 2;
        run.options.steps = 220, run.options.save_every = 10, run.options.eval_every = 0;
        run.options.schedule = "constant", run.options.learning_rate = 1e-2;
    };
    auto count = [](const SmallRun& run, const char* key) {
        std::string log = read_file(run.out("log.jsonl"));
        size_t found = 0;
        for (size_t at = log.find(key); at != std::string::npos; at = log.find(key, at + 1))
            found++;
        return found;
    };
    SmallRun report, rollback, again;
    prepare(report, "report"), prepare(rollback, "rollback"), prepare(again, "rollback");
    EXPECT_EQ(report.train(), 0);
    EXPECT_GE(count(report, "\"spike\":"), 1u);
    EXPECT_EQ(count(report, "\"rollback\""), 0u);
    EXPECT_EQ(rollback.train(), 0);
    EXPECT_GE(count(rollback, "\"event\":\"rollback\""), 1u);
    EXPECT_GE(rollback.state().at("skipped_data").size(), 1u);
    std::vector<json> log = rollback.log();
    ASSERT_EQ(log.size(), 220u) << "each step once";
    for (size_t i = 0; i < log.size(); i++) EXPECT_EQ(log[i].at("step"), i + 1);
    EXPECT_EQ(again.train(), 0);
    expect_same_file(again.out("last/model.safetensors"), rollback.out("last/model.safetensors"));
}

// A rate beyond all numbers makes the first update the last one that counts. Whether step 2 is
// waited for or step 3 is at work already, step 2 is named, and nothing of it is kept.
TEST(Run, TheStepThatFailsIsNamedAlsoWhenTheNextIsAtWork) {
    for (size_t eval_every : {0, 1, 2, 3}) {
        SmallRun run;
        run.options.schedule = "constant", run.options.warmup = 0;
        run.options.learning_rate = 1e20;
        run.options.eval_every = eval_every == 1 ? 0 : eval_every, run.options.eval_batches = 1;
        run.options.save_every = 1 + eval_every;
        std::string error = error_of([&] { run.train(); });
        EXPECT_EQ(error.substr(0, 2), "1 ");
        EXPECT_NE(error.find("step 2 and the 2 after it: loss nan"), std::string::npos) << error;
        std::vector<json> log = run.log();
        ASSERT_EQ(log.size(), 3u);
        EXPECT_TRUE(log[0].at("train_loss").is_number());
        for (size_t i : {1, 2}) EXPECT_EQ(log[i].at("skipped"), "loss nan, gradient norm nan");
        for (const StepFolder& folder : list_steps(run.options.out, "")) EXPECT_EQ(folder.step, 1u);
    }
}

TEST(Run, SavingInTheBackgroundChangesNothing) {
    SmallRun on, off;
    on.options.background_save = "on", off.options.background_save = "off";
    for (SmallRun* run : {&on, &off}) {
        run->options.steps = 20, run->options.save_every = 1;
        EXPECT_EQ(run->train(), 0);
    }
    for (uint64_t step = 1; step <= 20; step++)
        for (const char* file : {"/model.safetensors", "/optimizer.safetensors"})
            expect_same_file(on.out(step_name(step)) + file, off.out(step_name(step)) + file);
}

// A saver whose disk refuses the first `failures` times.
struct FailingSaver {
    std::string out = join_path(test_folder(), "run");
    GPT2Ptr model;
    int failures, tries = 0;
    std::optional<Saver> saver;

    FailingSaver(int count, bool background, double retry_s = 0) : failures(count) {
        GPT2Config config = odd_config();
        GPT2Shape shape = training_shape(1, 4);
        shape.snapshot = true;
        model.reset(gpt2_create(config, shape, 0, 1));
        gpt2_initialise(model.get(), 1);
        saver.emplace(Saver::Options{out, {0}, background, retry_s}, model.get(), [this] {
            if (tries++ < failures) fail_machine("no space");
        });
    }
    Checkpoint checkpoint(uint64_t step) const {
        return {step, gpt2_config(model.get()), view_of(model.get()), nullptr, {}, false};
    }
    void await() {
        for (int i = 0; i < 5000 && linked_step(out, "last").empty(); i++) {
            saver->poll();
            usleep(1000);
        }
    }
};

TEST(Saver, AFailedSaveIsTriedAgain) {
    FailingSaver failing(2, true);
    failing.saver->begin(failing.checkpoint(1));
    failing.saver->hand_over();
    failing.await();
    EXPECT_EQ(failing.tries, 3);
    EXPECT_EQ(latest_checkpoint(failing.out), join_path(failing.out, "step_00000001"));

    FailingSaver direct(1, false);
    direct.saver->begin(direct.checkpoint(1));
    EXPECT_EQ(latest_checkpoint(direct.out), "");
    EXPECT_TRUE(direct.saver->poll()) << "asks for the model as it is by then";
    direct.saver->begin(direct.checkpoint(2));
    EXPECT_FALSE(direct.saver->poll());
    EXPECT_EQ(linked_step(direct.out, "last"), "step_00000002");

    FailingSaver last(2, true);
    last.saver->finish(last.checkpoint(3));
    EXPECT_EQ(linked_step(last.out, "last"), "step_00000003");

    FailingSaver later(1, true, 3600);
    later.saver->begin(later.checkpoint(1));
    later.saver->hand_over();
    later.saver->wait();
    later.saver->poll();
    EXPECT_EQ(later.tries, 1) << "an hour has not passed";
}

TEST(Saver, TheThirdFailureInARowEndsTheRunAndLeavesWhatWas) {
    for (bool background : {true, false}) {
        FailingSaver failing(0, background);
        failing.saver->finish(failing.checkpoint(1));
        failing.failures = 100;
        std::string error = error_of([&] {
            for (uint64_t step = 2; step < 10; step++) {
                failing.saver->begin(failing.checkpoint(step));
                failing.saver->hand_over();
                failing.saver->wait();
            }
        });
        EXPECT_NE(error.find("step_00000004 was not saved, 3 times in a row: no space; "),
                  std::string::npos)
            << error;
        EXPECT_NE(error.find("step_00000001 is the last good state"), std::string::npos) << error;
        EXPECT_EQ(latest_checkpoint(failing.out), join_path(failing.out, "step_00000001"));
        EXPECT_EQ(list_steps(failing.out, "").size(), 1u);
    }
}

TEST(Run, TwoInOneFolderAreRefused) {
    SmallRun run;
    make_folder(run.options.out);
    {
        RunLock other(run.options.out);
        EXPECT_TRUE(other.taken());
        std::string error = error_of([&] { run.train(); });
        EXPECT_EQ(error.substr(0, 2), "2 ");
        EXPECT_NE(error.find(format("process %d on ", int(getpid()))), std::string::npos) << error;
        EXPECT_NE(error.find("trains in this folder; wait for it, or give another --out"),
                  std::string::npos)
            << error;
    }
    EXPECT_EQ(run.train(), 0) << "the file alone locks nobody out";
}

TEST(Run, AFileNamedStopStopsIt) {
    SmallRun run;
    run.options.steps = 1000000, run.options.save_every = 0;
    make_folder(run.options.out);
    write_file_atomic(run.out("stop"), "");
    std::string said = run.train_and_read(128 + SIGTERM);
    stop_signal() = 0;
    EXPECT_FALSE(path_exists(run.out("stop"))) << "the next command goes on";
    EXPECT_NE(latest_checkpoint(run.options.out), "") << said;
}

TEST(Run, SettingsThatChangeAreSaidWithBothValues) {
    SmallRun run;
    stop_signal() = SIGINT;
    EXPECT_EQ(run.train(), 130);
    stop_signal() = 0;
    run.options.learning_rate = 1e-3, run.options.steps = 7, run.options.batch_size = 2;
    run.options.total_batch_tokens = 4 * 9;
    std::string said = run.train_and_read();
    for (const char* line : {"note       learning rate was 0.002 so far and is 0.001 from here on",
                             "note       steps was 6 so far and is 7 from here on",
                             "note       batch size was 4 so far and is 2 from here on"})
        EXPECT_NE(said.find(line), std::string::npos) << said;
    EXPECT_EQ(said.find("beta1"), std::string::npos) << said;
}

TEST(Run, ADiskTooSmallForItsCheckpointsIsRefusedFirst) {
    SmallRun run;
    GPT2Config config;
    named_config("gpt2-xl", &config);
    make_folder(run.options.out);
    run.options.keep = 0, run.options.save_every = 1;
    std::string error = error_of([&] {
        check_disk(run.options, run.options.out, config, Goal{1000000000, 0});
    });
    EXPECT_EQ(error.substr(0, 2), "1 ");
    EXPECT_NE(error.find("a smaller --keep or a larger --save-every would fit"), std::string::npos)
        << error;
}

TEST(Run, ResumingInAnotherPrecisionIsSaid) {
    SmallRun run;
    stop_signal() = SIGINT;
    EXPECT_EQ(run.train(), 130);
    stop_signal() = 0;
    EXPECT_EQ(run.state().at("dtype"), run.options.compute.dtype);
    ordered_json state = ordered_json::parse(read_file(run.out("last/trainer.json")));
    for (const char* key : {"step", "files", "checksum"}) state.erase(key);
    std::string folder = join_path(run.options.out, linked_step(run.options.out, "last"));
    for (bool known : {true, false}) {
        state["dtype"] = "fp8";
        if (!known) state.erase("dtype");  // as it was before there was a choice: fp32
        fs::remove(folder + "/trainer.json");
        write_trainer_json(folder, 1, state, {});
        RunState read = read_state(folder, nullptr);
        EXPECT_EQ(read.dtype, known ? "fp8" : "fp32");
    }
    state["dtype"] = "fp8";
    fs::remove(folder + "/trainer.json");
    write_trainer_json(folder, 1, state, {});
    std::string said = run.train_and_read();
    EXPECT_NE(said.find("note       the run used --dtype fp8 so far and goes on with " +
                        run.options.compute.dtype),
              std::string::npos)
        << said;
    EXPECT_EQ(run.state().at("dtype"), run.options.compute.dtype);
    EXPECT_EQ(run.log().size(), 6u);
}

TEST(Run, ATimeLimitFinishesTheRun) {
    SmallRun run;
    run.options.steps = 0, run.options.time_limit_s = 1;
    EXPECT_EQ(run.train(), 0);
    EXPECT_TRUE(run.state().at("finished"));
    EXPECT_GE(run.log().size(), 1u);
    EXPECT_TRUE(run.log().back().contains("val_loss"));
}

TEST(Run, FolderNamesFollowTheData) {
    EXPECT_EQ(default_out({"some/where/text.txt"}), "runs/text");
    EXPECT_EQ(default_out({"some/where/"}), "runs/where");
    EXPECT_EQ(default_out({"some/shards/*.bin"}), "runs/shards");
    EXPECT_EQ(default_out({"."}), "runs/text");
    TrainOptions o;
    o.data = {"text.txt"};
    EXPECT_EQ(cache_folder(o), "runs/cache");
    o.out = "a/b/";
    EXPECT_EQ(cache_folder(o), "a/cache");
    o.out = "b";
    EXPECT_EQ(cache_folder(o), "cache");
}

TEST(Evaluate, CountsEveryTokenOnceWhateverTheBatch) {
    std::string folder = test_folder();
    GPT2Config config;
    config.vocab_size = 257, config.context = 8;
    config.layers = 1, config.heads = 2, config.channels = 8;
    GPT2Ptr model(gpt2_create(config, GPT2Shape{4, 8}, 0, 1));
    gpt2_initialise(model.get(), 1);
    std::string text = some_text(20);
    std::vector<int> ids = Tokenizer::bytes().encode(text);
    write_shard(folder + "/text.bin", ids);
    std::vector<Shard> shards{Shard(folder + "/text.bin", 257)};
    std::vector<int> bytes = bytes_per_token(Tokenizer::bytes());
    Evaluation one = evaluate_model(model.get(), shards, bytes, 1, 8, 0);
    Evaluation four = evaluate_model(model.get(), shards, bytes, 4, 8, 0);
    EXPECT_EQ(one.tokens, ids.size() - 1);
    EXPECT_EQ(four.tokens, ids.size() - 1);
    EXPECT_NEAR(one.loss, four.loss, 1e-5);
    EXPECT_NEAR(one.loss, std::log(257), 0.1);
    EXPECT_NEAR(one.bits_per_byte, one.loss / M_LN2, 1e-12) << "a token is a byte";
    EXPECT_NEAR(one.perplexity(), std::exp(one.loss), 1e-9);
    EXPECT_TRUE(std::isnan(evaluate_model(model.get(), shards, {}, 4, 8, 0).bits_per_byte));
    EXPECT_EQ(evaluate_model(model.get(), shards, bytes, 4, 8, 2).tokens, 16u);
}

TEST(Evaluate, LeavesOutWhatFollowsTheEndOfADocument) {
    std::string path = test_folder() + "/a.bin";
    GPT2Config config;
    config.vocab_size = 30, config.context = 8;
    config.layers = 1, config.heads = 2, config.channels = 8;
    GPT2Ptr model(gpt2_create(config, GPT2Shape{4, 8}, 0, 1));
    gpt2_initialise(model.get(), 1);
    std::vector<int> ids = random_ids(101, 30, 3), bytes(30, 1);
    write_shard(path, ids);
    std::vector<Shard> shards{Shard(path, 30)};
    size_t ends = size_t(std::count(ids.begin(), ids.end() - 1, 7));
    ASSERT_GT(ends, 0u);
    EXPECT_EQ(evaluate_model(model.get(), shards, bytes, 4, 8, 0).tokens, 100u);
    EXPECT_EQ(evaluate_model(model.get(), shards, bytes, 4, 8, 0, 7).tokens, 100 - ends);
    write_shard(path, std::vector<int>(9, 7));
    shards = {Shard(path, 30)};
    EXPECT_EQ(error_of([&] { evaluate_model(model.get(), shards, bytes, 4, 8, 0, 7); }),
              "2 " + path + ": nothing but ends of documents, whose targets are left out");
}

// The losses of endings, from the logits of each row alone.
TEST(Evaluate, ScoresHellaSwagAsTheLogitsSay) {
    constexpr int V = 40, kContext = 14, B = 6;
    GPT2Config config;
    config.vocab_size = V, config.context = kContext;
    config.layers = 2, config.heads = 2, config.channels = 16;
    GPT2Shape shape{B, kContext};
    shape.dtype = test_dtype();
    GPT2Ptr model(gpt2_create(config, shape, 0, 1));
    gpt2_initialise(model.get(), 3);
    std::vector<ChoiceExample> examples(7);
    std::mt19937 random(4);
    for (ChoiceExample& example : examples) {
        example.context = random_ids(1 + random() % 12, V, random());
        for (std::vector<int>& ending : example.endings)
            ending = random_ids(1 + random() % 9, V, random());
    }
    auto scores = score_choices(examples, B, kContext, target_losses(model.get()));
    double most = test_dtype() == Dtype::bf16 ? 0.05 : 1e-4;
    for (size_t i = 0; i < examples.size(); i++)
        for (size_t e = 0; e < kChoices; e++) {
            std::vector<int> row = examples[i].context;
            row.insert(row.end(), examples[i].endings[e].begin(), examples[i].endings[e].end());
            size_t ending = examples[i].endings[e].size();
            if (row.size() > kContext + 1) row.erase(row.begin(), row.end() - kContext - 1);
            int T = int(row.size()) - 1;
            std::vector<real> logits(size_t(T) * V);
            GPT2Pass pass;
            pass.logits = logits.data();
            gpt2_forward(model.get(), row.data(), nullptr, 1, T, pass);
            double loss = 0;
            for (size_t t = row.size() - 1 - ending; t < size_t(T); t++) {
                double sum = 0;
                for (size_t v = 0; v < V; v++) sum += std::exp(double(logits[t * V + v]));
                loss += std::log(sum) - double(logits[t * V + size_t(row[t + 1])]);
            }
            EXPECT_NEAR(scores[i].loss[e], loss, most * double(ending)) << i << ", " << e;
            EXPECT_EQ(scores[i].tokens[e], int(ending));
        }
}

// What is left when a file is cut at the wrong moment: a line, and not a signal.
TEST(Errors, AFileThatIsCutWhileItIsReadEndsTheProgramWithALine) {
    std::string folder = test_folder(), path = folder + "/a";
    write_file_atomic(path, std::string(100000, 'a'));
    pid_t child = fork();
    if (child == 0) {
        dup2(open((folder + "/err").c_str(), O_WRONLY | O_CREAT, 0644), 2);
        end_on_cut_file();
        MappedFile file(path);
        if (truncate(path.c_str(), 0) != 0) _exit(9);
        volatile char last = file.view().back();
        _exit(last == 'a' ? 8 : 7);
    }
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1) << status;
    EXPECT_EQ(read_file(folder + "/err"), std::string(gpt2_program()) +
                                              ": error: a file was cut short while it was read; do "
                                              "not write to files in use\n");
}

TEST(Sampling, NeverCutsACharacter) {
    EXPECT_EQ(unfinished_bytes(""), 0u);
    EXPECT_EQ(unfinished_bytes("abc"), 0u);
    EXPECT_EQ(unfinished_bytes("ab\xC3"), 1u);
    EXPECT_EQ(unfinished_bytes("ab\xC3\xA9"), 0u);
    EXPECT_EQ(unfinished_bytes("\xE2\x82"), 2u);
    EXPECT_EQ(unfinished_bytes("\xE2\x82\xAC"), 0u);
    EXPECT_EQ(unfinished_bytes("\xF0\x9F\x98"), 3u);
    EXPECT_EQ(unfinished_bytes("\xF0\x9F\x98\x80"), 0u);
    EXPECT_EQ(unfinished_bytes("\x80\x80\x80\x80"), 0u) << "bytes that continue nothing";
    EXPECT_EQ(unfinished_bytes("\xFF"), 0u);
}

TEST(Sampling, GoesOnBeyondTheContextAndIsRepeatable) {
    GPT2Config config;
    config.vocab_size = 257, config.context = 6;
    config.layers = 1, config.heads = 2, config.channels = 8;
    GPT2Shape shape{1, 4, false, 1, 1};
    GPT2Ptr model(gpt2_create(config, shape, 0, 1));
    gpt2_initialise(model.get(), 3);
    Tokenizer tokenizer = Tokenizer::bytes();
    auto draw = [&](uint64_t seed, size_t tokens) {
        Sampler sampler({1, 0, 1}, seed);
        std::string text;
        generate_text(model.get(), tokenizer, starting_tokens({65, 66}, tokenizer, 6), tokens,
                      sampler, [&](std::string_view bytes) { return text += bytes, true; });
        return text;
    };
    std::string text = draw(5, 40);
    EXPECT_EQ(text, draw(5, 40));
    EXPECT_NE(text, draw(6, 40));
    size_t longest = 0;  // one may meet the end of text by chance
    for (uint64_t seed = 1; seed <= 5; seed++) longest = std::max(longest, draw(seed, 40).size());
    EXPECT_GT(longest, 30u);
    EXPECT_EQ(draw(5, 0), "");
}

TEST(Sampling, StartsFromTheEndOfThePromptOrTheEndOfText) {
    Tokenizer tokenizer = Tokenizer::bytes();
    EXPECT_EQ(starting_tokens({}, tokenizer, 4), std::vector<int>({256}));
    EXPECT_EQ(starting_tokens({1, 2, 3}, tokenizer, 4), std::vector<int>({1, 2, 3}));
    EXPECT_EQ(starting_tokens({1, 2, 3, 4, 5}, tokenizer, 4), std::vector<int>({3, 4, 5}));
    EXPECT_EQ(starting_tokens({1, 2}, tokenizer, 1), std::vector<int>({2}));
}

// ==== the command line ===========================================================================

namespace cli_test {

std::string binary() {
    const char* path = getenv("GPT2_BINARY");
    return fs::absolute(path != nullptr ? path : gpt2_program()).string();
}

struct Outcome {
    int code = -1;  // 128 + the signal when one ended it
    std::string out, err;

    size_t error_lines() const { return size_t(std::count(err.begin(), err.end(), '\n')); }
};

// One call of the program in a working folder of its own. `file_limit` is the most bytes that a
// file may have, which stands in for a full disk.
struct Call {
    std::string folder;
    std::vector<std::string> words;
    std::string input = {};
    rlim_t file_limit = RLIM_INFINITY;
    int out_fd = -1;  // in place of a file

    pid_t start() const {
        write_file_atomic(folder + "/stdin", input);
        std::vector<std::string> all = {binary()};
        all.insert(all.end(), words.begin(), words.end());
        std::vector<char*> argv;
        for (std::string& word : all) argv.push_back(word.data());
        argv.push_back(nullptr);
        pid_t child = fork();
        if (child != 0) return child;
        int in = open((folder + "/stdin").c_str(), O_RDONLY);
        int out = out_fd >= 0
                      ? out_fd
                      : open((folder + "/stdout").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
        int err = open((folder + "/stderr").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
        dup2(in, 0), dup2(out, 1), dup2(err, 2);
        struct rlimit limit = {file_limit, file_limit};
        setrlimit(RLIMIT_FSIZE, &limit);
        signal(SIGXFSZ, SIG_IGN);  // a write beyond the limit fails instead
        if (chdir(folder.c_str()) != 0) _exit(126);
        execv(argv[0], argv.data());
        _exit(127);
    }
    Outcome finish(pid_t child) const {
        Outcome outcome;
        int status = 0;
        waitpid(child, &status, 0);
        outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (out_fd < 0) outcome.out = read_file(folder + "/stdout");
        outcome.err = read_file(folder + "/stderr");
        return outcome;
    }
    Outcome run() const { return finish(start()); }
};

class Cli : public testing::Test {
  protected:
    void SetUp() override {
        if (!fs::exists(binary())) GTEST_SKIP() << "there is no program at " << binary();
        folder_ = test_folder();
        std::string text;
        for (int i = 0; i < 60; i++) text += "The cat sat on mat " + std::to_string(i * i) + ".\n";
        write_file_atomic(folder_ + "/text.txt", text);
    }

    Outcome call(std::vector<std::string> words, const std::string& input = "") const {
        return Call{folder_, std::move(words), input}.run();
    }

    // `train` of a model that takes a moment; later words override nothing and must be new.
    static std::vector<std::string> train_words(const std::vector<std::string>& more) {
        std::vector<std::string> words = {
            "train",      "--layers",  "1",         "--heads", "1",
            "--channels", "8",         "--context", "16",      "--batch-size",
            "2",          "--threads", "1",         "--dtype", dtype_name(test_dtype())};
        words.insert(words.end(), more.begin(), more.end());
        return words;
    }

    // A trained model in folder_/run, with a character vocabulary.
    void make_model(const std::string& tokenizer = "chars") {
        Outcome made = call(train_words(
            {"--data", "text.txt", "--tokenizer", tokenizer, "--steps", "2", "--out", "run"}));
        ASSERT_EQ(made.code, 0) << made.err;
    }

    // The contract of every error: the code, one line, and in it what matters.
    static void expect_error(const Outcome& outcome, int code, const std::string& part) {
        EXPECT_EQ(outcome.code, code) << outcome.err;
        EXPECT_EQ(outcome.error_lines(), 1u) << outcome.err;
        std::string name = gpt2_program();
        EXPECT_EQ(outcome.err.rfind(name + ": error: ", 0), 0u) << outcome.err;
        EXPECT_NE(outcome.err.find(part), std::string::npos) << outcome.err << "lacks " << part;
    }
    void expect_train_error(const std::vector<std::string>& more, int code,
                            const std::string& part) const {
        expect_error(call(train_words(more)), code, part);
    }

    void write(const std::string& name, const std::string& content) const {
        fs::create_directories(fs::path(folder_ + "/" + name).parent_path());
        write_file_atomic(folder_ + "/" + name, content);
    }
    std::string path(const std::string& name) const { return folder_ + "/" + name; }

    std::string folder_;
};

}  // namespace cli_test
using cli_test::binary;
using cli_test::Call;
using cli_test::Cli;
using cli_test::Outcome;

TEST_F(Cli, EveryCommandHasHelp) {
    std::vector<std::vector<std::string>> commands = {{},
                                                      {"train"},
                                                      {"sample"},
                                                      {"evaluate"},
                                                      {"shard"},
                                                      {"dump"},
                                                      {"export"},
                                                      {"plan"},
                                                      {"info"},
                                                      {"tokenizer"},
                                                      {"tokenizer", "train"},
                                                      {"tokenizer", "encode"},
                                                      {"tokenizer", "decode"}};
    for (std::vector<std::string> words : commands) {
        words.push_back("--help");
        Outcome help = call(words);
        EXPECT_EQ(help.code, 0) << words[0];
        EXPECT_EQ(help.err, "");
        EXPECT_NE(help.out.find("--help"), std::string::npos);
    }
    std::string help = call({"train", "--help"}).out;
    EXPECT_NE(help.find("--batch-size N "), std::string::npos);
    EXPECT_NE(help.find("[0.1]"), std::string::npos) << "defaults are shown";
    for (size_t begin = 0, end; (end = help.find('\n', begin)) != std::string::npos;
         begin = end + 1)
        EXPECT_LE(end - begin, 100u) << help.substr(begin, end - begin);
}

TEST_F(Cli, MisspeltWordsGetTheNearest) {
    expect_error(call({}), 2, "no command");
    expect_error(call({"tokenizer"}), 2, "no command");
    expect_error(call({"trian"}), 2, "did you mean train?");
    expect_error(call({"train", "--bacth-size", "4"}), 2,
                 "unknown option --bacth-size: did you mean --batch-size?");
    expect_error(call({"train", "--data", "text.txt", "--lerning-rate=1"}), 2,
                 "--lerning-rate: did you mean --learning-rate?");
    expect_error(call({"tokenizer", "encode", "--tokeniser", "x"}), 2, "--tokenizer?");
    expect_error(call({"train", "--data", "text.txt", "-x"}), 2, "unknown option -x");
    expect_error(call({"train", "text.txt"}), 2, "text.txt");
    expect_error(call({"train", "--data"}), 2, "--data");
    expect_error(call({"train"}), 2, "--data");
    expect_error(call({"train", "--data", "text.txt", "--steps", "2", "--steps", "3"}), 2,
                 "--steps");
}

TEST_F(Cli, ValuesOutOfRangeAreRefused) {
    const char* cases[][2] = {{"--batch-size", "0"},
                              {"--batch-size", "-3"},
                              {"--batch-size", "two"},
                              {"--batch-size", "1.5"},
                              {"--steps", "0"},
                              {"--learning-rate", "nan"},
                              {"--learning-rate", "NaN"},
                              {"--learning-rate", "inf"},
                              {"--learning-rate", "-inf"},
                              {"--learning-rate", "-1"},
                              {"--dropout", "1"},
                              {"--beta2", "1"},
                              {"--epsilon", "0"},
                              {"--schedule", "sine"},
                              {"--dtype", "fp8"},
                              {"--recompute", "4"},
                              {"--tf32", "1"},
                              {"--deterministic", "yes"},
                              {"--time-limit", "nan"},
                              {"--seed", "-1"},
                              {"--keep", "-1"},
                              {"--threads", "0"},
                              {"--tokenizer", "bpe:5"},
                              {"--tokenizer", "bpe:x"},
                              {"--tokenizer", "nothing"},
                              {"--sequence-length", "17"},
                              {"--total-batch-tokens", "33"}};
    for (auto [option, value] : cases) {
        std::vector<std::string> words = {"train", "--data", "text.txt", "--context",
                                          "16",    option,   value};
        std::string part = std::string(value) == "nothing" ? "nothing" : option;
        expect_error(call(words), 2, part);
    }
    expect_error(call({"train", "--data", "text.txt", "--heads", "5", "--channels", "64"}), 2,
                 "--heads 5 --channels 64: heads must divide channels");
    expect_error(call({"train", "--data", "text.txt", "--steps", "1", "--epochs", "1"}), 2,
                 "--steps and --epochs");
    EXPECT_FALSE(fs::exists(path("runs/text"))) << "nothing was begun";
}

// A precision that this program lacks is refused by every command that computes, before it begins.
TEST_F(Cli, APrecisionThatIsNotThereIsRefused) {
    make_model();
    const std::vector<std::string> commands[] = {
        {"train", "--data", "text.txt"},
        {"plan"},
        {"sample", "--model", "run"},
        {"evaluate", "--model", "run", "--data", "text.txt"},
        {"dump", "--model", "run", "--tokens", "ids.npy", "--out", "d.safetensors"}};
    for (std::vector<std::string> words : commands) {
        words.insert(words.end(), {"--dtype", "bf16"});
        expect_error(call(words), 2, "--dtype bf16");
    }
    EXPECT_FALSE(fs::exists(path("runs/text")));
}

// Weights of another format are converted, and one line says so.
TEST_F(Cli, ConvertedWeightsAreSaid) {
    make_model("bytes");
    std::string file = path("run/last/model.safetensors");
    checkpoint_test::RawTensors tensors = checkpoint_test::read_raw(file);
    for (auto& [name, tensor] : tensors) {
        std::string halves;
        for (size_t i = 2; i < tensor.bytes.size(); i += 4) halves += tensor.bytes.substr(i, 2);
        tensor.dtype = "BF16", tensor.bytes = halves;
    }
    fs::create_directories(path("half"));
    for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json"})
        fs::copy_file(path(std::string("run/last/") + name), path(std::string("half/") + name));
    checkpoint_test::write_raw(path("half/model.safetensors"), tensors);
    const std::string note = "weights are BF16 in half/model.safetensors: converted to float32\n";
    std::vector<std::string> words = {"sample", "--threads", "1", "--max-new-tokens", "3"};
    words.insert(words.end(), {"--model", "half"});
    Outcome sampled = call(words);
    EXPECT_EQ(sampled.code, 0) << sampled.err;
    EXPECT_EQ(sampled.err, "note: " + note);
    words.back() = "run";
    EXPECT_EQ(call(words).err, "");
    Outcome tuned = call({"train", "--threads", "1", "--data", "text.txt", "--model", "half",
                          "--steps", "1", "--out", "tuned"});
    EXPECT_EQ(tuned.code, 0) << tuned.err;
    EXPECT_NE(tuned.out.find("note       " + note), std::string::npos) << tuned.out;
}

TEST_F(Cli, DataThatIsNoDataIsRefused) {
    expect_train_error({"--data", "missing.txt"}, 2, "missing.txt");
    expect_train_error({"--data", "*.nothing"}, 2, "*.nothing");
    write("empty.txt", "");
    expect_train_error({"--data", "empty.txt"}, 2, "empty.txt");
    write("short.txt", "Too short.");
    expect_train_error({"--data", "short.txt", "--tokenizer", "bytes"}, 2, "--sequence-length");
    write("one.txt", "a");
    expect_train_error({"--data", "one.txt"}, 2, "one.txt");
    fs::create_directories(path("nothing/.hidden"));
    write("nothing/.hidden/text.txt", "text");
    expect_train_error({"--data", "nothing"}, 2, "nothing");
    expect_train_error({"--data", "/dev/null"}, 2, "/dev/null");
    expect_train_error({"--data", "text.txt", "--val", "missing.txt"}, 2, "missing.txt");
}

TEST_F(Cli, TextThatIsNotUtf8IsKeptAsBytes) {
    std::string bytes;
    for (int i = 0; i < 2000; i++) bytes += char(i * 7 + i / 256);
    write("bytes.txt", bytes);
    Outcome trained = call(train_words({"--data", "bytes.txt", "--steps", "2", "--out", "run"}));
    ASSERT_EQ(trained.code, 0) << trained.err;
    Outcome ids = call({"tokenizer", "encode", "--tokenizer", "run/last", "--in", "bytes.txt"});
    EXPECT_EQ(ids.code, 0) << ids.err;
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "run/last"}, ids.out).out, bytes);
    call({"tokenizer", "encode", "--tokenizer", "run/last", "--in", "bytes.txt", "--out", "x.npy"});
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "run/last", "--in", "x.npy"}).out, bytes);
}

TEST_F(Cli, ShardsAreCheckedWhenTheyAreOpened) {
    write_shard(path("good.bin"), std::vector<int>(200, 7));
    std::string good = read_file(path("good.bin"));
    EXPECT_EQ(call(train_words({"--data", "good.bin", "--steps", "1", "--out", "run"})).code, 0);
    for (size_t size : {0, 1, 3, 4, 11, 12, 1023, 1024, 1025, 1200, 1423}) {
        write("cut.bin", good.substr(0, size));
        expect_train_error({"--data", "cut.bin"}, 2, "cut.bin");
    }
    write("long.bin", good + "x");
    expect_train_error({"--data", "long.bin"}, 2, "long.bin");
    write_shard(path("past.bin"), std::vector<int>(200, 60000));
    expect_train_error({"--data", "past.bin"}, 2, "60000");
    expect_train_error({"--data", "good.bin", "text.txt"}, 2, "not both");
    expect_train_error({"--data", "text.txt", "good.bin"}, 2, "not both");
}

TEST_F(Cli, PlacesThatCannotBeWrittenAreTheMachinesFault) {
    for (const char* out : {"/proc/nothing/run", "/dev/null/run", "text.txt/run"})
        expect_train_error({"--data", "text.txt", "--steps", "1", "--out", out}, 1, "cannot");
    expect_error(call({"tokenizer", "train", "--data", "text.txt", "--out", "/proc/nothing"}), 1,
                 "/proc/nothing");
}

#if defined(__has_feature)
#    if __has_feature(thread_sanitizer)
#        define GPT2_THREAD_SANITIZER
#    endif
#endif
#ifdef GPT2_THREAD_SANITIZER
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
const char* const kDiesOfTheLimit =
    "the thread sanitizer writes files of its own and dies of the limit";

TEST_F(Cli, AFullDiskEndsTheRunWithOneLine) {
    if (kThreadSanitizer) GTEST_SKIP() << kDiesOfTheLimit;
    // From 6,000 bytes up: libomp makes a small file of shared memory when it starts, and needs it.
    for (rlim_t limit : {6000, 9000, 20000}) {
        Call full{folder_, train_words({"--data", "text.txt", "--tokenizer", "bytes", "--steps",
                                        "30", "--save-retry", "0", "--out", "run"})};
        full.file_limit = limit;
        Outcome outcome = full.run();
        std::string error = std::string(gpt2_program()) + ": error: ";
        size_t at = outcome.err.find(error);  // warnings come before
        ASSERT_NE(at, std::string::npos) << outcome.err;
        outcome.err.erase(0, at);
        expect_error(outcome, 1, "File too large");
        fs::remove_all(path("run"));
    }
    make_model();
    Call full{folder_, {"sample", "--threads", "1", "--model", "run"}};
    full.out_fd = open("/dev/full", O_WRONLY);
    expect_error(full.run(), 1, "standard output");
    close(full.out_fd);
}

TEST_F(Cli, AReaderThatGoesAwayIsNoError) {
    make_model();
    int ends[2];
    ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
    Call broken{folder_, {"sample", "--threads", "1", "--model", "run", "--num-samples", "50"}};
    broken.out_fd = ends[1];
    close(ends[0]);
    Outcome outcome = broken.run();
    close(ends[1]);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_EQ(outcome.err, "");
}

TEST_F(Cli, APromptIsCroppedAndItsUnknownCharactersDropped) {
    make_model();
    Outcome long_prompt = call({"sample", "--threads", "1", "--model", "run", "--max-new-tokens",
                                "5", "--prompt", "The cat sat on mat 1. The cat sat"});
    EXPECT_EQ(long_prompt.code, 0);
    EXPECT_EQ(long_prompt.error_lines(), 1u) << long_prompt.err;
    EXPECT_NE(long_prompt.err.find("the context 16: its last 15"), std::string::npos)
        << long_prompt.err;
    Outcome unknown =
        call({"sample", "--threads", "1", "--model", "run", "--prompt", "The \xE2\x82\xAC cat"});
    EXPECT_EQ(unknown.code, 0);
    EXPECT_EQ(unknown.error_lines(), 1u);
    EXPECT_NE(unknown.err.find("\xE2\x82\xAC"), std::string::npos) << unknown.err;
    Outcome empty = call({"sample", "--threads", "1", "--model", "run", "--prompt", ""});
    EXPECT_EQ(empty.code, 0);
    EXPECT_EQ(empty.err, "");
}

TEST_F(Cli, SamplesAreRepeatableAndTheirOptionsChecked) {
    make_model();
    std::vector<std::string> words = {"sample",           "--model", "run",    "--prompt", "The",
                                      "--max-new-tokens", "30",      "--seed", "3"};
    Outcome first = call(words);
    EXPECT_EQ(first.out.rfind("The", 0), 0u);
    EXPECT_EQ(first.out, call(words).out);
    words.insert(words.end(), {"--out", "sample.txt"});
    EXPECT_EQ(call(words).out, "");
    EXPECT_EQ(read_file(path("sample.txt")), first.out);
    const char* cases[][2] = {{"--temperature", "-1"},  {"--temperature", "nan"},
                              {"--top-p", "0"},         {"--top-p", "1.5"},
                              {"--top-k", "-1"},        {"--num-samples", "0"},
                              {"--max-new-tokens", "0"}};
    for (auto [option, value] : cases)
        expect_error(call({"sample", "--threads", "1", "--model", "run", option, value}), 2,
                     option);
}

TEST_F(Cli, ModelFoldersOfOtherKindsAreRefused) {
    expect_error(call({"sample", "--model", "missing"}), 2, "missing");
    expect_error(call({"sample", "--model", "text.txt"}), 2, "text.txt");
    expect_error(call({"sample", "--model", "."}), 2, "neither");
    write("llama/config.json", "{\"model_type\": \"llama\", \"vocab_size\": 10}");
    for (const char* command : {"sample", "evaluate"})
        expect_error(call({command, "--model", "llama", "--data", "text.txt"}), 2,
                     std::string(command) == "sample" ? "--data" : "llama");
    expect_error(call({"sample", "--model", "llama"}), 2, "model_type");
    expect_error(call({"train", "--data", "text.txt", "--model", "llama"}), 2, "model_type");
    write("broken/config.json", "{\"model_type\": ");
    expect_error(call({"sample", "--model", "broken"}), 2, "broken/config.json");
    make_model();
    fs::resize_file(path("run/last/model.safetensors"), 500);
    expect_error(call({"sample", "--threads", "1", "--model", "run"}), 2, "model.safetensors");
    EXPECT_EQ(call({"info", "run"}).code, 2);
    EXPECT_EQ(call({"info", "text.txt"}).code, 0);
    expect_error(call({"info", "missing"}), 2, "missing");
    expect_error(call({"info"}), 2, "PATH");
}

TEST_F(Cli, ModelsGoToOtherProgramsAndComeBack) {
    make_model();
    Outcome made = call({"export", "--model", "run", "--out", "hub", "--max-shard-size", "1KB"});
    EXPECT_EQ(made.code, 0) << made.err;
    EXPECT_EQ(made.err, "");
    made = call({"export", "--model", "hub", "--out", "model.bin"});
    EXPECT_EQ(made.code, 0) << made.err;
    auto same = [&](std::vector<std::string> words) {
        words.insert(words.end(),
                     {"--threads", "1", "--dtype", dtype_name(test_dtype()), "--model"});
        std::vector<std::string> out;
        for (const char* model : {"run", "hub", "model.bin"}) {
            std::vector<std::string> all = words;
            all.push_back(model);
            if (std::string(model) == "model.bin" && words[0] != "dump")
                all.insert(all.end(), {"--tokenizer", "hub"});
            Outcome outcome = call(all);
            EXPECT_EQ(outcome.code, 0) << outcome.err;
            if (words[0] == "evaluate") outcome.out = outcome.out.substr(0, outcome.out.find(','));
            out.push_back(words[0] == "dump" ? read_file(path("dump.safetensors")) : outcome.out);
        }
        EXPECT_EQ(out[0], out[1]);
        EXPECT_EQ(out[0], out[2]);
    };
    write_npy(path("ids.npy"), {1, 2, 3, 4}, {1, 4});
    same({"sample", "--max-new-tokens", "20", "--temperature", "0"});
    same({"evaluate", "--data", "text.txt", "--json"});
    same({"dump", "--tokens", "ids.npy", "--out", "dump.safetensors"});
    Outcome tuned = call({"train", "--data", "text.txt", "--model", "model.bin", "--tokenizer",
                          "hub", "--steps", "1", "--batch-size", "2", "--threads", "1", "--dtype",
                          dtype_name(test_dtype()), "--out", "tuned"});
    EXPECT_EQ(tuned.code, 0) << tuned.err;
    Outcome info = call({"info", "hub", "model.bin", "run"});
    EXPECT_EQ(info.code, 0) << info.out;
    EXPECT_NE(info.out.find("model.bin: model of llm.c"), std::string::npos) << info.out;
}

TEST_F(Cli, ExportRefusesWhatItCannotDo) {
    make_model();
    expect_error(call({"export", "--out", "x"}), 2, "--model is missing");
    expect_error(call({"export", "--model", "run"}), 2, "--out is missing");
    expect_error(call({"export", "--model", "run", "--out", "run"}), 2,
                 "is there already; give another name, or remove it first");
    expect_error(call({"export", "--model", "none", "--out", "x"}), 2, "none: no such");
    expect_error(call({"export", "--model", "text.txt", "--out", "x"}), 2, "no model of llm.c");
    expect_error(call({"export", "--model", "run", "--out", "x", "--export-dtype", "int8"}), 2,
                 "must be fp32|bf16|fp16");
    expect_error(call({"export", "--model", "run", "--out", "x", "--max-shard-size", "5 G"}), 2,
                 "must be bytes, such as 5GB");
    expect_error(call({"export", "--model", "run", "--out", "x", "--max-shard", "5GB"}), 2,
                 "did you mean --max-shard-size?");
    expect_error(call({"exprot"}), 2, "did you mean export?");
    expect_error(call({"export", "--model", "run", "--out", "x.bin", "--export-dtype", "fp16"}), 2,
                 "llm.c has none");
    expect_error(call({"export", "--model", "run", "--out", "x", "--state", "text.txt"}), 2,
                 "goes from llm.c to a folder");
    EXPECT_EQ(call({"export", "--model", "run", "--out", "m.bin"}).code, 0);
    expect_error(call({"export", "--model", "m.bin", "--out", "x", "--state", "m.bin"}), 2,
                 "a state of llm.c has 20240527");
    expect_error(call({"sample", "--model", "m.bin"}), 2, "there is no tokenizer; name one with");
    expect_error(call({"train", "--data", "text.txt", "--model", "m.bin"}), 2,
                 "m.bin: has no tokenizer; name the one it was trained with");
    expect_error(call({"train", "--data", "text.txt", "--model", "gone.bin"}), 2, "gone.bin");
    Outcome bare = call({"export", "--model", "m.bin", "--out", "bare"});
    EXPECT_EQ(bare.code, 0);
    EXPECT_NE(bare.err.find("note: m.bin has no tokenizer"), std::string::npos) << bare.err;
    fs::resize_file(path("run/last/optimizer.safetensors"), 500);  // its hashes are verified
    expect_error(call({"export", "--model", "run", "--out", "x"}), 2, "optimizer.safetensors");
    fs::resize_file(path("m.bin"), 5000);
    expect_error(call({"export", "--model", "m.bin", "--out", "x"}), 2, "cut?");
    EXPECT_FALSE(fs::exists(path("x")));
    EXPECT_FALSE(fs::exists(path("x.bin")));
}

TEST_F(Cli, AFullDiskLeavesNothingOfAnExport) {
    if (kThreadSanitizer) GTEST_SKIP() << kDiesOfTheLimit;
    make_model();
    for (const char* out : {"new", "new.bin"}) {
        std::vector<std::string> words = {"export", "--model", "run", "--out", out};
        Outcome full = Call{folder_, words, "", 4096, -1}.run();
        expect_error(full, 1, "File too large");
        for (const auto& item : fs::directory_iterator(folder_))
            EXPECT_EQ(item.path().filename().string().find("new"), std::string::npos);
    }
}

TEST_F(Cli, ASignalSavesAndTheRunGoesOn) {
    for (int signal : {SIGINT, SIGTERM, SIGHUP, SIGUSR1}) {
        std::string out = format("run%d", signal);
        std::vector<std::string> words =
            train_words({"--data", "text.txt", "--out", out, "--steps"});
        words.push_back("100000000");
        Call long_run{folder_, words};
        pid_t child = long_run.start();
        std::error_code ignored;
        for (int i = 0; i < 3000; i++) {  // until it trains
            usleep(10000);
            if (fs::file_size(path(out + "/log.jsonl"), ignored) > 200 && !ignored) break;
        }
        kill(child, signal);
        Outcome stopped = long_run.finish(child);
        EXPECT_EQ(stopped.code, 128 + signal) << stopped.err;
        EXPECT_NE(stopped.out.find("go on with: "), std::string::npos);
        json trainer = json::parse(read_file(path(out + "/last/trainer.json")));
        size_t step = trainer.at("step");
        words.back() = std::to_string(step + 2);
        Outcome rest = call(words);
        EXPECT_EQ(rest.code, 0) << rest.err;
        EXPECT_NE(rest.out.find("going on with"), std::string::npos);
        trainer = json::parse(read_file(path(out + "/last/trainer.json")));
        EXPECT_EQ(trainer.at("step"), step + 2);
    }
}

// A kill leaves no time for anything: the run goes on from its last checkpoint and ends with the
// same bits and the same log as one that was left alone. The pipe holds few lines, so that the
// program waits for its reader and dies in the middle.
TEST_F(Cli, AKilledRunGoesOnAndEndsWithTheSameBits) {
    auto words = [](const std::string& out) {
        return train_words({"--data", "text.txt", "--steps", "80", "--save-every", "7",
                            "--eval-every", "5", "--eval-batches", "1", "--sample-every", "0",
                            "--out", out});
    };
    int ends[2];
    ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
    fcntl(ends[1], F_SETPIPE_SZ, 4096);
    Call killed{folder_, words("killed")};
    killed.out_fd = ends[1];
    pid_t child = killed.start();
    close(ends[1]);
    std::string seen;
    char part[256];
    while (seen.find("step 16/80") == std::string::npos) {
        ssize_t size = read(ends[0], part, sizeof part);
        ASSERT_GT(size, 0) << seen;
        seen.append(part, size_t(size));
    }
    kill(child, SIGKILL);
    EXPECT_EQ(killed.finish(child).code, 128 + SIGKILL);
    close(ends[0]);
    ASSERT_EQ(latest_checkpoint(path("killed")) == "", false);
    Outcome rest = call(words("killed"));
    EXPECT_EQ(rest.code, 0) << rest.err;
    EXPECT_NE(rest.out.find("going on with killed/step_"), std::string::npos) << rest.out;
    EXPECT_EQ(call(words("whole")).code, 0);
    for (const char* name : {"model.safetensors", "optimizer.safetensors"})
        EXPECT_TRUE(read_file(path(std::string("killed/last/") + name)) ==
                    read_file(path(std::string("whole/last/") + name)))
            << name;
    auto records = [&](const std::string& out) {
        std::vector<json> log;
        std::stringstream lines(read_file(path(out + "/log.jsonl")));
        for (std::string line; std::getline(lines, line);) {
            log.push_back(json::parse(line));
            if (log.back().contains("event")) log.pop_back();
            else
                for (const char* key : {"step_ms", "tokens_per_s", "elapsed_s"})
                    log.back().erase(key);
        }
        return log;
    };
    EXPECT_EQ(records("killed"), records("whole"));
    EXPECT_EQ(records("whole").size(), 80u);
}

TEST_F(Cli, ARunIsRepeatedFromItsLog) {
    ASSERT_EQ(call(train_words({"--data", "text.txt", "--tokenizer", "bytes", "--steps", "5",
                                "--eval-every", "2", "--dropout", "0.1", "--out", "run"}))
                  .code,
              0);
    Outcome again = call({"train", "--repeat", "run"});
    EXPECT_EQ(again.code, 0) << again.err;
    EXPECT_NE(again.out.find("repeated   all 5 steps have the same losses, to the last bit"),
              std::string::npos)
        << again.out;
    std::string log = read_file(path("run/log.jsonl"));
    size_t at = log.find("\"train_loss\":", log.find("\"step\":4")) + 13;
    log[at + 3] = log[at + 3] == '1' ? '2' : '1';
    write("run/log.jsonl", log);
    expect_error(call({"train", "--repeat", "run", "--out", "other"}), 1, "other: step 4: loss ");
    write("run/log.jsonl", "{}\n");
    expect_error(call({"train", "--repeat", "run"}), 2, "it cannot be repeated");
}

TEST_F(Cli, WithoutOutEveryFinishedRunKeepsItsFolder) {
    std::vector<std::string> words =
        train_words({"--data", "text.txt", "--steps", "2", "--tokenizer", "bytes"});
    for (const char* out : {"runs/text", "runs/text-2"}) {
        EXPECT_EQ(call(words).code, 0);
        EXPECT_TRUE(fs::exists(path(std::string(out) + "/last/model.safetensors"))) << out;
    }
    expect_train_error(
        {"--data", "text.txt", "--steps", "2", "--tokenizer", "bytes", "--out", "runs/text"}, 2,
        "finished run");
}

TEST_F(Cli, EvaluateSaysTheSameAsTheEndOfTheRun) {
    write("val.txt", "The cat sat on mat 16.\nThe cat sat on mat 25.\n");
    ASSERT_EQ(call(train_words({"--data", "text.txt", "--val", "val.txt", "--tokenizer", "bytes",
                                "--steps", "3", "--out", "run"}))
                  .code,
              0);
    std::string log = read_file(path("run/log.jsonl"));
    log.pop_back();
    json last = json::parse(log.substr(log.rfind('\n') + 1));
    Outcome outcome = call({"evaluate", "--model", "run", "--data", "val.txt", "--json", "--dtype",
                            dtype_name(test_dtype())});
    double bound = 1e-6 + tolerance(0, 1);  // the batch is another
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    json result = json::parse(outcome.out);
    EXPECT_NEAR(result.at("loss").get<double>(), last.at("val_loss").get<double>(), bound);
    EXPECT_NEAR(result.at("bits_per_byte").get<double>(),
                last.at("val_bits_per_byte").get<double>(), bound);
    EXPECT_EQ(result.at("tokens"), 45);
    EXPECT_EQ(call({"evaluate", "--model", "run", "--data", "val.txt"}).code, 0);
}

TEST_F(Cli, ShardsMadeFromTextTrain) {
    std::vector<std::string> words = {"shard", "--data",  "text.txt", "--tokenizer",
                                      "bytes", "--out",   "shards",   "--shard-tokens",
                                      "500",   "--stats", "--clean"};
    Outcome made = call(words);
    ASSERT_EQ(made.code, 0) << made.err;
    EXPECT_NE(made.out.find("shards/val.bin: "), std::string::npos) << made.out;
    EXPECT_NE(made.out.find("documents  1, of "), std::string::npos) << made.out;
    size_t tokens = 0, files = 0;
    for (const auto& entry : fs::directory_iterator(path("shards"))) {
        if (entry.path().extension() != ".bin") continue;
        tokens += Shard(entry.path().string(), 257).size(), files++;
    }
    EXPECT_EQ(tokens, read_file(path("text.txt")).size());
    EXPECT_EQ(json::parse(read_file(path("shards/manifest.json"))).at("tokens"), tokens);
    EXPECT_NE(call(words).out.find("it was ready already"), std::string::npos);
    words[8] = "501";
    expect_error(call(words), 2, "was begun with --shard-tokens 500, and this is 501");
    Outcome trained = call(train_words({"--data", "shards/train_*.bin", "--val", "shards/val.bin",
                                        "--tokenizer", "bytes", "--steps", "2", "--out", "run"}));
    EXPECT_EQ(trained.code, 0) << trained.err;
    trained = call(train_words({"--data", "shards", "--steps", "2", "--out", "parts"}));
    EXPECT_EQ(trained.code, 0) << trained.err;
    EXPECT_EQ(losses_by_step(path("run")), losses_by_step(path("parts")));
    Outcome part = call({"evaluate", "--model", "run", "--data", "shards"});
    EXPECT_EQ(part.out.substr(0, 30),
              call({"evaluate", "--model", "run", "--data", "shards/val.bin"}).out.substr(0, 30));
    call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "260", "--out", "tok"});
    expect_train_error({"--data", "shards", "--tokenizer", "tok"}, 2,
                       "made with another tokenizer, \"bytes\"");
    EXPECT_NE(call({"info", "shards/val.bin"}).out.find("token shard"), std::string::npos);
    expect_error(call({"shard", "--data", "text.txt", "--tokenizer", "chars", "--out", "x"}), 2,
                 "--tokenizer chars");
}

// A vocabulary of words, by name or from a file, cuts no word between training and validation.
TEST_F(Cli, WordsAreNotCutForValidation) {
    std::string text;
    for (int i = 0; i < 401; i++) text += "antidisestablishmentarianism, incomprehensibilities ";
    ASSERT_NE(text[validation_start(text) - 1], ' ') << "a word would be cut";
    write("words.txt", text);
    auto train = [&](const std::string& tokenizer, const std::string& out) {
        Outcome outcome = call(train_words({"--data", "words.txt", "--tokenizer", tokenizer,
                                            "--steps", "1", "--out", out}));
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_NE(outcome.out.find("words, "), std::string::npos) << outcome.out;
        return read_config(path(out + "/last/config.json")).vocab_size;
    };
    EXPECT_EQ(train("words", "known"), 3);
    EXPECT_EQ(train("words:unk", "unknown"), 5);
    EXPECT_EQ(train("known/last", "again"), 3);
}

// The step of the last record.
uint64_t newest_logged(const std::string& log) {
    uint64_t step = 0;
    std::stringstream lines(read_file(log));
    for (std::string line; std::getline(lines, line);)
        step = std::max(step, json::parse(line).value("step", uint64_t(0)));
    return step;
}

TEST_F(Cli, AShardThatChangesUnderARunEndsIt) {
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    auto run_until = [&](const char* out, auto change) {
        Call call{folder_,
                  train_words({"--data", "a.bin", "--tokenizer", "bytes", "--steps", "100000000",
                               "--time-limit", "60", "--eval-every", "0", "--out", out})};
        pid_t child = call.start();
        std::string log = path(std::string(out) + "/log.jsonl");
        auto logged = [&] { return fs::exists(log) && fs::file_size(log) > 3000; };
        for (int i = 0; i < 3000 && !logged(); i++)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        change();
        return call.finish(child);
    };
    expect_error(run_until("run1", [&] { fs::resize_file(path("a.bin"), 1100); }), 1,
                 "a.bin: had 11024 bytes and has 1100 since, while the program reads it");
    EXPECT_EQ(verify_checkpoint(path("run1/last"))["step"], newest_logged(path("run1/log.jsonl")));
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    expect_error(run_until("run2", [&] { fs::remove(path("a.bin")); }), 1,
                 "a.bin: was removed while the program reads it");
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    write_shard(path("val.bin"), random_ids(500, 257, 2));
    Call call{folder_, train_words({"--data", "a.bin", "--val", "val.bin", "--tokenizer", "bytes",
                                    "--steps", "100000000", "--eval-every", "50", "--time-limit",
                                    "60", "--out", "run3"})};
    pid_t child = call.start();
    for (int i = 0; i < 3000 && !fs::exists(path("run3/best")); i++)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    fs::resize_file(path("val.bin"), 1100);
    expect_error(call.finish(child), 1, "val.bin: had 2024 bytes and has 1100 since");
}

TEST_F(Cli, OrdersOfDataAreChecked) {
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    auto error = [&](const std::vector<std::string>& more, const std::string& part) {
        std::vector<std::string> words = {"--data", "a.bin", "--steps", "1", "--out", "run"};
        words.insert(words.end(), more.begin(), more.end());
        expect_train_error(words, 2, part);
    };
    error({"--stride", "4"}, "--stride 4: is for --windows sliding");
    error({"--windows", "sliding", "--stride", "17"}, "--stride 17: more than the 16 tokens");
    error({"--windows", "sideways"}, "must be shuffled|sliding|random");
    error({"--separate-documents"}, "name the tokenizer of the shards with --tokenizer");
    EXPECT_EQ(call(train_words({"--data", "a.bin", "--tokenizer", "bytes", "--steps", "1", "--out",
                                "run", "--separate-documents", "--windows", "random"}))
                  .code,
              0);
}

TEST_F(Cli, HellaSwagIsScored) {
    make_model("bytes");
    std::string lines, line;
    for (int i = 0; i < 5; i++) {
        line = format(R"({"ctx": "The cat %d", "label": %d, "endings": [)", i, i % 4);
        lines += line + R"("sat", "on the mat", "was a very long cat indeed", "."]})" + "\n";
    }
    write("hs.jsonl", lines);
    std::vector<std::string> words = {"evaluate", "--model", "run", "--hellaswag", "hs.jsonl"};
    Outcome people = call(words);
    EXPECT_EQ(people.code, 0) << people.err;
    EXPECT_EQ(people.out.rfind("acc_norm 0.", 0), 0u) << people.out;
    EXPECT_NE(people.err.find("of 20 endings are longer than 16 tokens"), std::string::npos);
    words.insert(words.end(), {"--json", "--out", "out.jsonl", "--batch-size", "3"});
    json root = json::parse(call(words).out);
    EXPECT_EQ(root["examples"], 5);
    EXPECT_EQ(root["rows_cut"], 10);
    size_t correct = 0, correct_norm = 0, records = 0;
    std::stringstream out(read_file(path("out.jsonl")));
    for (std::string text; std::getline(out, text); records++) {
        json record = json::parse(text);
        EXPECT_EQ(record["example"], records);
        correct += record["prediction"] == record["label"];
        correct_norm += record["prediction_norm"] == record["label"];
    }
    EXPECT_EQ(records, 5u);
    EXPECT_EQ(root["correct"], correct);
    EXPECT_EQ(root["correct_norm"], correct_norm);
    // The same four words as llm.c's file: a start, 30 bytes, number 0, label 2, ...
    int32_t header[256] = {20240522, 1, 1, 30};
    const uint16_t example[] = {65535, 30, 0, 2, 4, 1, 84, 1, 104, 1, 101, 1, 32, 1, 99};
    write("hs.bin", std::string(reinterpret_cast<const char*>(header), sizeof header) +
                        std::string(reinterpret_cast<const char*>(example), sizeof example));
    EXPECT_EQ(call({"info", "hs.bin"}).out,
              "hs.bin: HellaSwag of llm.c; examples: 1, tokens of the longest row: 1\n");
    Outcome packed = call({"evaluate", "--model", "run", "--hellaswag", "hs.bin", "--json"});
    EXPECT_EQ(packed.err, "");
    EXPECT_EQ(json::parse(packed.out)["examples"], 1);
    words = {"evaluate", "--model", "run"};
    auto error = [&](const std::vector<std::string>& more, const std::string& part) {
        std::vector<std::string> all = words;
        all.insert(all.end(), more.begin(), more.end());
        expect_error(call(all), 2, part);
    };
    write("bad.jsonl", lines + "{}\n");
    error({"--hellaswag", "bad.jsonl"}, "bad.jsonl: line 6: has no string \"ctx_a\"");
    error({"--hellaswag", "hs.jsonl", "--data", "text.txt"}, "--data and --hellaswag");
    error({"--data", "text.txt", "--out", "x"}, "--out: is for --hellaswag");
    error({"--hellaswag", "none.jsonl"}, "none.jsonl: cannot open");
}

TEST_F(Cli, LinesOfJsonAndRawTokensTrain) {
    std::string text = read_file(path("text.txt")), lines, ids;
    for (size_t begin = 0; begin < text.size(); begin += 100)
        lines += json{{"body", text.substr(begin, 100)}}.dump() + "\n";
    write("text.jsonl", lines);
    std::vector<std::string> more = {"--steps", "1", "--tokenizer", "bytes", "--out", "lines"};
    more.insert(more.end(), {"--data", "text.jsonl", "--jsonl-field", "body"});
    EXPECT_EQ(call(train_words(more)).code, 0);
    expect_train_error({"--data", "text.jsonl", "--steps", "1"}, 2, "line 1: no field \"text\"");
    for (char c : text) ids += c, ids += '\0';
    write("raw.bin", ids);
    Outcome raw = call(train_words({"--data", "raw.bin", "--raw-tokens", "uint16", "--tokenizer",
                                    "bytes", "--steps", "1", "--out", "raw"}));
    EXPECT_EQ(raw.code, 0) << raw.err;
    expect_train_error({"--data", "raw.bin", "--steps", "1"}, 2, "use --raw-tokens");
    EXPECT_EQ(
        call({"evaluate", "--model", "raw", "--data", "raw.bin", "--raw-tokens", "uint16"}).code,
        0);
}

TEST_F(Cli, DumpRefusesIdsThatDoNotFit) {
    make_model("bytes");
    auto dump = [&](const std::vector<int>& ids, std::vector<size_t> shape) {
        write_npy(path("ids.npy"), ids, shape);
        return call({"dump", "--model", "run", "--tokens", "ids.npy", "--out", "d.safetensors"});
    };
    EXPECT_EQ(dump({1, 2, 3, 4, 5, -1}, {2, 3}).code, 0);
    EXPECT_TRUE(fs::exists(path("d.safetensors")));
    expect_error(dump({1, 2, 257}, {1, 3}), 2, "id 257 at (0, 2)");
    expect_error(dump({1, 2, -2}, {1, 3}), 2, "id -2");
    expect_error(dump({1, -1, -1}, {1, 3}), 2, "every target");
    expect_error(dump({1, 2, 3}, {3}), 2, "(B, T+1)");
    expect_error(dump(std::vector<int>(18, 1), {1, 18}), 2, "16 positions");
}

TEST_F(Cli, PlanTakesNoMemoryForTheModel) {
    Outcome plan = call({"plan", "--model", "gpt2-xl", "--batch-size", "64"});
    EXPECT_EQ(plan.code, 0) << plan.err;
    EXPECT_NE(plan.out.find("1,557,611,200"), std::string::npos) << plan.out;
    EXPECT_NE(plan.out.find("\nfits       "), std::string::npos) << plan.out;
    EXPECT_NE(plan.out.find("as asked: "), std::string::npos) << plan.out;
    plan = call({"plan", "--model", "tiny", "--recompute", "2", "--dtype", "fp32"});
    EXPECT_NE(plan.out.find("computing  fp32, recompute level 2"), std::string::npos) << plan.out;
}

TEST_F(Cli, TokenizersAreTrainedAndIdsChecked) {
    ASSERT_EQ(
        call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "280", "--out", "tok"})
            .code,
        0);
    Outcome ids = call({"tokenizer", "encode", "--tokenizer", "tok"}, "The cat");
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok"}, ids.out).out, "The cat");
    EXPECT_EQ(call({"tokenizer", "encode", "--tokenizer", "bytes"}, "").out, "\n");
    expect_error(call({"tokenizer", "decode", "--tokenizer", "tok"}, "1 2 x"), 2, "byte 4");
    expect_error(call({"tokenizer", "decode", "--tokenizer", "tok"}, "99999"), 2, "99999");
    expect_error(call({"tokenizer", "encode", "--tokenizer", "chars"}, "x"), 2, "chars");
    expect_error(
        call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "256", "--out", "t"}), 2,
        "--vocab-size");
    expect_error(call({"tokenizer", "encode", "--tokenizer", "gpt2"}, "x"), 2, "vocab.bpe");
    expect_error(call({"tokenizer", "decode", "--tokenizer", "tok"}, "1 2 -3"), 2, "byte 4");
}

TEST_F(Cli, TokenizersAreConvertedAndReadAgain) {
    ASSERT_EQ(call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "300", "--pattern",
                    "o200k", "--min-frequency", "2", "--threads", "1", "--out", "tok"})
                  .code,
              0);
    std::string text = "The CAT's 12345\n\n  end";
    std::string ids = call({"tokenizer", "encode", "--tokenizer", "tok"}, text).out;
    const std::pair<const char*, const char*> formats[] = {{"json", "json"},
                                                           {"merges", "merges"},
                                                           {"openai", "openai"},
                                                           {"tiktoken", "t.tiktoken"},
                                                           {"llmc", "t.bin"}};
    for (auto [format, path] : formats) {
        Outcome made =
            call({"tokenizer", "convert", "--tokenizer", "tok", "--format", format, "--out", path});
        ASSERT_EQ(made.code, 0) << made.err;
        bool says = std::string(format) != "json";
        EXPECT_EQ(made.err.find("--pattern o200k") != std::string::npos, says) << made.err;
        Outcome again =
            call({"tokenizer", "encode", "--tokenizer", path, "--pattern", "o200k"}, text);
        EXPECT_EQ(again.out, ids) << format << again.err;
    }
    expect_error(call({"tokenizer", "encode", "--tokenizer", "t.bin"}, text), 2, "--pattern");
    expect_error(call({"tokenizer", "convert", "--tokenizer", "bytes", "--format", "llmc", "--out",
                       "x.bin"}),
                 2, "byte-level BPE");
}

TEST_F(Cli, EncodingGoesToArraysShardsAndNumbersAndBack) {
    ASSERT_EQ(
        call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "300", "--out", "tok"})
            .code,
        0);
    std::string text = "One caf\303\251 <|endoftext|> and \360\237\230\200\377 bytes";
    write("in.txt", text);
    for (const char* out : {"ids.npy", "ids.bin"}) {
        Outcome made =
            call({"tokenizer", "encode", "--tokenizer", "tok", "--in", "in.txt", "--out", out});
        ASSERT_EQ(made.code, 0) << made.err;
        EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok", "--in", out}).out, text);
        EXPECT_EQ(
            call({"tokenizer", "decode", "--tokenizer", "tok", "--in", out, "--out", "t"}).code, 0);
        EXPECT_EQ(read_file(path("t")), text);
    }
    std::string plain = call({"tokenizer", "encode", "--tokenizer", "tok"}, text).out;
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok"}, plain).out, text);
    std::string end = " " + std::to_string(Tokenizer::load(path("tok")).end_of_text()) + " ";
    EXPECT_EQ(plain.find(end), std::string::npos);
    for (const char* special : {"allow", "<|endoftext|>"}) {
        std::string ids =
            call({"tokenizer", "encode", "--tokenizer", "tok", "--special", special}, text).out;
        EXPECT_NE(ids.find(end), std::string::npos) << ids;
        EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok"}, ids).out, text);
    }
    expect_error(call({"tokenizer", "encode", "--tokenizer", "tok", "--special", "forbid"}, text),
                 2, "byte 10");
    expect_error(call({"tokenizer", "encode", "--tokenizer", "tok", "--special", "<|x|>"}, text), 2,
                 "this tokenizer has <|endoftext|>");
    write("more.txt", "more");
    std::string two =
        call({"tokenizer", "encode", "--tokenizer", "tok", "--in", "in.txt", "more.txt"}).out;
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok"}, two).out,
              text + "<|endoftext|>more");
    Outcome stats = call(
        {"tokenizer", "encode", "--tokenizer", "tok", "--in", "in.txt", "more.txt", "--stats"});
    EXPECT_EQ(stats.code, 0);
    for (const char* part :
         {"bytes        43\n", "bytes each", "never used", "context      64 ",
          "documents    2, of 4 to 38 tokens; half have at most 4, nine in ten 38, 99 in 100 "
          "38\n"})
        EXPECT_NE(stats.out.find(part), std::string::npos) << part << " in " << stats.out;
}

// ==== the CUDA program alone =====================================================================

// These run where the program is train_gpt2cu, on the emulator or on a card: what it says of
// machines that it cannot run on, of memory, and of its file of timed products. The emulator's card
// is described by the environment (dev/emu/README.md).
class Cuda : public Cli {
  protected:
    void SetUp() override {
        Cli::SetUp();
        if (!fs::exists(binary()) || !emulated()) GTEST_SKIP() << "the program has a real card";
    }
    static bool emulated() { return binary().find("_emu") != std::string::npos; }

    // A call with variables of the environment set for it alone.
    Outcome call_with(const std::vector<std::pair<const char*, std::string>>& variables,
                      const std::vector<std::string>& words) const {
        for (const auto& [name, value] : variables) setenv(name, value.c_str(), 1);
        Outcome outcome = call(words);
        for (const auto& variable : variables) unsetenv(variable.first);
        return outcome;
    }
    std::vector<std::string> short_run(const std::vector<std::string>& more = {}) const {
        std::vector<std::string> words = {"--data",  "text.txt", "--tokenizer", "bytes",
                                          "--steps", "2",        "--out",       "run"};
        words.insert(words.end(), more.begin(), more.end());
        return train_words(words);
    }
};

TEST_F(Cuda, MachinesThatCannotRunItAreToldWhy) {
    expect_error(call_with({{"EMU_DEVICES", "none"}}, short_run()), 1, "no NVIDIA driver");
    expect_error(call_with({{"EMU_DEVICES", "0"}}, short_run()), 1, "no GPU here");
    expect_error(call_with({{"EMU_DRIVER", "12000"}}, short_run()), 1,
                 "the driver supports CUDA 12.0, and this program needs ");
    expect_error(call_with({{"EMU_CAPABILITY", "7.5"}, {"EMU_NAME", "Tesla T4"}}, short_run()), 1,
                 "Tesla T4 has compute capability 7.5; this program needs 8.0");
    // What needs no card does without one.
    Outcome help = call_with({{"EMU_DEVICES", "none"}}, {"train", "--help"});
    EXPECT_EQ(help.code, 0) << help.err;
}

TEST_F(Cuda, TooLittleMemoryNamesTheGroupTheBytesAndWhatWouldFit) {
    std::vector<std::string> words = {"train", "--data",      "text.txt", "--tokenizer",
                                      "bytes", "--model",     "small",    "--batch-size",
                                      "64",    "--recompute", "0",        "--steps",
                                      "1",     "--out",       "run"};
    Outcome outcome = call_with({{"EMU_MEMORY", "400000000"}}, words);
    expect_error(outcome, 1, "out of memory: activations need ");
    EXPECT_NE(outcome.err.find("MiB more than the"), std::string::npos) << outcome.err;
    std::smatch fit;
    ASSERT_TRUE(std::regex_search(outcome.err, fit, std::regex("(--[a-z-]+) (\\d+) would fit")))
        << outcome.err;
    // The plan of what it names does fit.
    words[0] = "plan";
    words.resize(words.size() - 4);
    auto option = std::find(words.begin(), words.end(), fit[1].str());
    ASSERT_NE(option, words.end());
    *(option + 1) = fit[2].str();
    Outcome plan = call_with({{"EMU_MEMORY", "400000000"}}, words);
    EXPECT_EQ(plan.code, 0) << plan.err;
    EXPECT_EQ(plan.out.find("does not fit"), std::string::npos) << plan.out;
}

TEST_F(Cuda, EveryAllocationMayFail) {
    for (int n = 1;; n++) {
        ASSERT_LT(n, 100) << "no allocation fails any more, and the run does not end";
        fs::remove_all(path("run"));
        Outcome outcome = call_with({{"EMU_FAIL_MALLOC", std::to_string(n)}}, short_run());
        if (outcome.code == 0) break;
        expect_error(outcome, 1, "out of memory");
    }
}

TEST_F(Cuda, SizesThatTheKernelsDoNotTakeAreRefused) {
    expect_error(
        call({"train", "--data", "text.txt", "--tokenizer", "bytes", "--layers", "1", "--heads",
              "1", "--channels", "136", "--context", "16", "--steps", "1", "--out", "run"}),
        2, "heads of 136; on a GPU at most 128, as with --heads 2");
    expect_error(
        call({"train", "--data", "text.txt", "--tokenizer", "bytes", "--layers", "1", "--heads",
              "64", "--channels", "8192", "--context", "16", "--steps", "1", "--out", "run"}),
        2, "--channels 8192: on a GPU at most 4096");
}

// The losses of a run's log, by step.
std::vector<double> logged_losses(const std::string& log) {
    std::vector<double> losses;
    std::istringstream lines(read_file(log));
    for (std::string line; std::getline(lines, line);) {
        json record = json::parse(line);
        if (!record.contains("event")) losses.push_back(record.at("train_loss"));
    }
    return losses;
}

TEST_F(Cuda, ThePlanIsWhatIsTaken) {
    GPT2Config config;
    named_config("tiny", &config);
    config.vocab_size = 1031;
    for (int recompute = 0; recompute < 4; recompute++) {
        GPT2Shape shape = training_shape(4, 128);
        shape.recompute = recompute, shape.generate = 1;
        size_t before = gpt2_memory_free(), planned = total_bytes(gpt2_memory(config, shape));
        GPT2Ptr model(gpt2_create(config, shape, 0, 1));
        size_t taken = before - gpt2_memory_free();
        EXPECT_NEAR(double(taken), double(planned), 0.002 * double(planned)) << recompute;
    }
}

// TF32 keeps 10 bits of what it multiplies: other numbers, and not far ones.
TEST_F(Cuda, Tf32RoundsProductsAndNothingElse) {
    auto loss = [&](const std::string& out, const std::vector<std::string>& more) {
        std::vector<std::string> words = {
            "train", "--data",       "text.txt", "--tokenizer", "bytes", "--layers",
            "1",     "--heads",      "2",        "--channels",  "64",    "--context",
            "32",    "--batch-size", "4",        "--steps",     "3",     "--dtype",
            "fp32",  "--out",        out};
        words.insert(words.end(), more.begin(), more.end());
        Outcome outcome = call(words);
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        return logged_losses(path(out + "/log.jsonl")).back();
    };
    double exact = loss("exact", {}), rounded = loss("rounded", {"--tf32", "on"});
    EXPECT_NE(exact, rounded);
    EXPECT_NEAR(exact, rounded, 0x1p-10 * exact);
}

// A model whose products are large enough to be timed.
TEST_F(Cuda, TimedProductsAreKeptAndABrokenFileIsMadeAnew) {
    std::vector<std::string> words = {
        "train", "--data",       "text.txt", "--tokenizer",       "bytes", "--layers",
        "1",     "--heads",      "2",        "--channels",        "128",   "--context",
        "64",    "--batch-size", "8",        "--sequence-length", "64",    "--steps",
        "1",     "--out",        "run"};
    std::string cache = path("products");
    auto run = [&] {
        fs::remove_all(path("run"));
        Outcome outcome = call_with({{"XDG_CACHE_HOME", cache}}, words);
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        return outcome;
    };
    run();
    std::vector<fs::path> files;
    for (const auto& entry : fs::recursive_directory_iterator(cache))
        if (entry.is_regular_file()) files.push_back(entry.path());
    ASSERT_EQ(files.size(), 1u);
    std::string first = read_file(files[0].string());
    EXPECT_GT(json::parse(first).at("winners").size(), 5u);
    std::vector<double> losses = logged_losses(path("run/log.jsonl"));
    run();
    EXPECT_EQ(read_file(files[0].string()), first) << "nothing is timed a second time";
    EXPECT_EQ(logged_losses(path("run/log.jsonl")), losses) << "the same winners, the same bits";

    std::string wrong_value = first;
    wrong_value.replace(wrong_value.find("\": \"") + 4, 4, "zzzz");
    for (const std::string& broken : {std::string("{"), std::string("[]"), first.substr(0, 40),
                                      std::string("{\"winners\": {\"a\": 1}}")}) {
        write_file_atomic(files[0].string(), broken);
        Outcome outcome = run();
        EXPECT_NE(outcome.err.find("not a file of timed products; made anew"), std::string::npos)
            << broken;
        EXPECT_EQ(outcome.error_lines(), 1u) << outcome.err;
        EXPECT_EQ(json::parse(read_file(files[0].string())).at("winners").size(),
                  json::parse(first).at("winners").size());
    }
    write_file_atomic(files[0].string(), wrong_value);
    EXPECT_EQ(run().err, "") << "an algorithm that the library refuses is replaced";

    fs::remove_all(path("run"));
    Outcome outcome = call_with({{"XDG_CACHE_HOME", "/dev/null"}}, words);
    EXPECT_EQ(outcome.code, 0) << "no cache can be written: " << outcome.err;
}

// A run that one program begins, the other goes on with and the first ends has the losses of the
// run that nothing interrupted: the checkpoints are the same files, and dropout drops the same in
// both, of every layer, forward and backward. Five digits: AdamW divides each gradient by its own
// size, and so makes a step of what is left of a gradient that should be 0.
TEST_F(Cuda, RunsGoFromOneProgramToTheOther) {
    const char* given = getenv("GPT2_OTHER_BINARY");
    if (given == nullptr) GTEST_SKIP() << "GPT2_OTHER_BINARY, the CPU program, is not set";
    std::string other = fs::absolute(given).string();
    auto train = [&](const std::string& program, const std::string& out, int from) {
        std::string command = "cd " + folder_ + " && " + program +
                              " train --layers 2 --heads 2 --channels 16 --context 16"
                              " --batch-size 2 --threads 1 --dtype fp32 --dropout 0.2"
                              " --data text.txt --tokenizer bytes --steps 6 --save-every 2"
                              " --keep 0 --out " +
                              out;
        if (from > 0) command += format(" --resume %s/step_%08d", out.c_str(), from);
        return system((command + " >" + out + ".out 2>&1").c_str());
    };
    ASSERT_EQ(train(binary(), "whole", 0), 0) << read_file(path("whole.out"));
    fs::copy(path("whole"), path("run"),
             fs::copy_options::recursive | fs::copy_options::copy_symlinks);
    ASSERT_EQ(train(other, "run", 2), 0) << read_file(path("run.out"));
    ASSERT_EQ(train(binary(), "run", 4), 0) << read_file(path("run.out"));
    std::vector<double> whole = logged_losses(path("whole/log.jsonl"));
    std::vector<double> run = logged_losses(path("run/log.jsonl"));
    ASSERT_EQ(whole.size(), 6u);
    ASSERT_EQ(run.size(), 6u);
    for (size_t i = 0; i < 6; i++)
        EXPECT_NEAR(run[i], whole[i], 1e-5 * whole[i]) << "step " << i + 1;
}

// ==== main =======================================================================================

// What concerns the program that these tests were built for. Gradients of the CPU's layers need
// double, and what does not compute is tested once, in float. The CUDA program does not refuse
// bf16, in which the CPU program cannot go on.
std::string tests_of_program() {
    if (kDouble) return "Gradient.*:Layer.*:Model.*:Golden.*";
    if (std::string(gpt2_program()) == "train_gpt2") return "-Gradient.*:Cuda.*";
    std::string tests =
        "Model.*:Golden.*:Checkpoint.*:Saver.*:ModelFolder.*:Plan.*:Run.*:Evaluate.*:Sampling.*:"
        "Cli.*:"
        "Cuda.*-Cli.APrecisionThatIsNotThereIsRefused";
    if (test_dtype() == Dtype::bf16) tests += ":Cuda.RunsGoFromOneProgramToTheOther";
    return tests;
}

int main(int argc, char** argv) { return run_tests(argc, argv, tests_of_program()); }
