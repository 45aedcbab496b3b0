// The tests of the model: one source for both twins. (dev/test has those of what surrounds a model:
// data, what is saved, runs, and the command line.)
//
// It is built twice with the CPU twin: in float, against the object that the program itself is
// made of, where it holds every part to its contract, and in double (GPT2_REAL), where gradients
// are checked by central differences and the whole model against PyTorch's float64. Gradient.* and
// Layer.* call the layers of the CPU twin; everything else goes through what both twins provide,
// and makes its models with the precision that $GPT2_TEST_DTYPE names (fp32 unless it is set),
// where the test is not about float32 itself. Buffers stand between guard bytes and are full of
// NaN until written; comparisons are written so that NaN fails. A tolerance says where it comes
// from.
//
// ./build/.../test_gpt2 [--gtest_filter=Suite.Test] ends with `N passed, N failed, N skipped`.

#include <gtest/gtest.h>

#include <bit>
#include <climits>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <set>

#include "checkpoint.h"
#include "dataloader.h"
#include "dev/test/models.h"
#include "dev/test/tools.h"
#include "gpt2.h"
#include "sampler.h"

// ==== tools ======================================================================================

namespace {

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
    GPT2Ptr model(gpt2_create(config, shape));
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
    for (const int* shape : kShapes) {
        int M = shape[0], N = shape[1], K = shape[2];
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

// Both multiply the same bf16 numbers, exactly, and sum in float32. Of numbers near 1 the k-th
// partial sum is near sqrt(k), and each addition rounds it by 0.21 eps of itself (root mean
// square): in order, as the plain loops do, K additions are 0.15 K eps off, of which the largest of
// a hundred thousand is some ten times. What sums in lanes or pairs has shorter sums, and keeps a
// bound that grows with sqrt(K). M of a few has loops of its own; lengths are odd, and longer than
// a piece of the plain loops, or than what a thread has in its caches at a time.
TEST(Layer, Bf16ProductsAreTheSumsOfExactProducts) {
    if (kDouble) return;                 // it has no bf16
    auto bits_of = [](Buffer& values) {  // cut off, so that each is a bf16 exactly
        std::vector<uint16_t> bits;
        for (real& value : values) {
            bits.push_back(uint16_t(std::bit_cast<uint32_t>(float(value)) >> 16));
            value = real(std::bit_cast<float>(uint32_t(bits.back()) << 16));
        }
        return bits;
    };
    constexpr int kShapes[][3] = {{1, 70, 33},  {4, 7, 129},   {13, 300, 64},   {64, 65, 33},
                                  {129, 1, 40}, {96, 64, 128}, {34, 560, 1040}, {1060, 40, 1040}};
    for (const int* shape : kShapes) {
        int M = shape[0], N = shape[1], K = shape[2];
        for (int mode = 0; mode < 8; mode++) {
            bool trans_a = mode & 1, trans_b = mode & 2;
            real beta = mode & 4 ? real(1) : real(0);
            int lda = (trans_a ? M : K) + 3, ldb = (trans_b ? K : N) + 1, ldc = N + 2;
            Buffer A(size_t(lda * (trans_a ? K : M))), B(size_t(ldb * (trans_b ? N : K)));
            Buffer C(ldc * M), D(ldc * M);
            A.normal(1), B.normal(2);
            if (beta != 0) C.normal(3), D.normal(3);
            std::vector<uint16_t> a = bits_of(A), b = bits_of(B);
            auto multiply = [&](bool plain, real* c) {
                gemm_bf16(plain, trans_a, trans_b, M, N, K, a.data(), lda, b.data(), ldb, beta, c,
                          ldc);
            };
            std::vector<double> exact(size_t(M) * size_t(N));
            for (int m = 0; m < M; m++) {
                for (int n = 0; n < N; n++) {
                    double sum = beta == 0 ? 0 : double(C[m * ldc + n]);
                    for (int k = 0; k < K; k++)
                        sum += double(A[trans_a ? k * lda + m : m * lda + k]) *
                               double(B[trans_b ? n * ldb + k : k * ldb + n]);
                    exact[size_t(m) * size_t(N) + size_t(n)] = sum;
                }
            }
            multiply(false, C), multiply(true, D);
            for (int m = 0; m < M; m++) {
                for (int n = 0; n < N; n++) {
                    double sum = exact[size_t(m) * size_t(N) + size_t(n)];
                    EXPECT_AT_MOST(std::abs(double(C[m * ldc + n]) - sum),
                                   8 * kEps * std::sqrt(double(K) + 1) * 4);
                    EXPECT_AT_MOST(std::abs(double(D[m * ldc + n]) - sum), 2 * kEps * (K + 16));
                }
                EXPECT_EQ(std::isnan(C[m * ldc + N]), beta == 0) << "written between the rows";
            }
        }
    }
}

// A weight is at most half a scale from what is stored: q is the nearest whole number to a quotient
// of at most 127, itself off by 127 eps / 2, and the product scale q is rounded by as much again.
TEST(Layer, Int8WeightsAreWithinHalfAStep) {
    constexpr size_t kRows = 7, kCols = 67;
    Buffer weights(kRows * kCols), scales(kRows);
    weights.normal(1);
    auto row = [&](size_t o) { return weights.begin() + o * kCols; };
    std::fill(row(1), row(2), real(0));
    std::fill(row(2), row(3), real(-0.25));
    for (real* w = row(3); w < row(4); w++) *w *= std::numeric_limits<real>::min();
    *row(4) = kNaN, *(row(6) - 1) = std::numeric_limits<real>::infinity();
    *row(6) = -1000;  // what one large number costs the others
    std::vector<int8_t> q(kRows * kCols, 99);
    quantise_rows(q.data(), scales, weights, kRows, kCols);
    for (size_t o = 0; o < kRows; o++) {
        if (o == 4 || o == 5) {
            EXPECT_TRUE(std::isnan(scales[o])) << o;
            continue;
        }
        real largest = 0;
        for (size_t c = 0; c < kCols; c++) largest = std::max(largest, std::abs(row(o)[c]));
        EXPECT_AT_MOST(std::abs(double(scales[o]) - double(largest) / 127),
                       kEps * double(largest) + std::numeric_limits<real>::denorm_min());
        for (size_t c = 0; c < kCols; c++) {
            int8_t q_oc = q[o * kCols + c];
            double off = std::abs(double(scales[o]) * q_oc - double(row(o)[c]));
            double least = o == 3 ? 127 * std::numeric_limits<real>::denorm_min() : 0;
            EXPECT_AT_MOST(off, double(scales[o]) * (0.5 + 127 * kEps) + least) << o << ", " << c;
            EXPECT_TRUE(q_oc >= -127) << o << ", " << c;
            EXPECT_TRUE(o != 1 || (q_oc == 0 && scales[o] == 0)) << "zero stays zero";
        }
    }
}

// Few rows and many, which expand the weights a part at a time: 4,097 inputs make parts of 255
// rows. Both sum exact products and differ in the order alone: of K products near 1 a partial sum
// is near sqrt(K), each of K additions rounds one by half an eps of it, and so many errors of
// either sign add up to sqrt(K) of one: K eps / 2, of which the largest of some thousand is eight
// times.
TEST(Layer, Int8ProductsAgreeWithPlainLoops) {
    GPT2Shape shape = test_shape(1, 1);
    shape.int8 = true;
    Buffer expanded(gpt2_sizes(odd_config(), shape).expanded);
    constexpr int kShapes[][3] = {{1, 70, 33}, {4, 7, 129},   {13, 9, 64},    {16, 31, 100},
                                  {17, 13, 5}, {40, 65, 192}, {17, 300, 4097}};
    for (const int* sizes : kShapes) {
        int M = sizes[0], N = sizes[1], K = sizes[2];
        Buffer A(M * K), W(N * K), scales(N), bias(N), C(M * N);
        A.normal(1), W.normal(2), bias.normal(3);
        std::vector<int8_t> q(W.size());
        quantise_rows(q.data(), scales, W, size_t(N), size_t(K));
        for (const real* added :
             {static_cast<const real*>(nullptr), static_cast<const real*>(bias)}) {
            gemm_int8(M, N, K, A, q.data(), scales, added, expanded, C);
            for (int m = 0; m < M; m++) {
                for (int n = 0; n < N; n++) {
                    double sum = 0;
                    for (int k = 0; k < K; k++)
                        sum += double(A[m * K + k]) * q[size_t(n) * size_t(K) + size_t(k)];
                    sum = sum * double(scales[n]) + (added != nullptr ? double(added[n]) : 0);
                    EXPECT_AT_MOST(std::abs(double(C[m * N + n]) - sum), 4 * kEps * (K + 16))
                        << M << " x " << N << " x " << K << " at " << m << ", " << n;
                }
            }
        }
    }
}

// What a sample is made of must not depend on the samples beside it.
TEST(Layer, AFewRowsHaveTheSameBitsWhateverTheOthers) {
    constexpr int N = 37;
    for (int K : {5, 64, 200, 771}) {
        Buffer A(kFewRows * K), B(N * K), scales(N), one(N), all(kFewRows * N);
        A.normal(1), B.normal(2);
        std::vector<int8_t> q(B.size());
        quantise_rows(q.data(), scales, B, size_t(N), size_t(K));
        std::vector<uint16_t> a(A.size()), b(B.size());
        for (size_t i = 0; i < a.size(); i++)
            a[i] = uint16_t(std::bit_cast<uint32_t>(float(A[i])) >> 16);
        for (size_t i = 0; i < b.size(); i++)
            b[i] = uint16_t(std::bit_cast<uint32_t>(float(B[i])) >> 16);
        for (std::string weights : {"real", "bf16", "int8"}) {
            if (kDouble && weights == "bf16") continue;  // double has no bf16
            auto multiply = [&](int first, int M, real* C) {
                const real* A_m = A + first * K;
                if (weights == "int8")
                    gemm_int8(M, N, K, A_m, q.data(), scales, nullptr, nullptr, C);
                else if (weights == "bf16")
                    gemm_bf16(false, false, true, M, N, K, a.data() + first * K, K, b.data(), K, 0,
                              C, N);
                else gemm(false, true, M, N, K, A_m, K, B, K, 0, C, N);
            };
            for (int M = 1; M <= kFewRows; M++) {
                multiply(0, M, all);
                for (int m = 0; m < M; m++) {
                    multiply(m, 1, one);
                    EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin() + m * N))
                        << weights << ": row " << m << " of " << M << ", " << K << " inputs";
                }
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

// Whatever bits it has: all that arithmetic leaves of a NaN, and those of memory gone bad.
TEST(Layer, NaNGoesThroughEveryLayer) {
    constexpr int T = 9, C = 16;
    for (uint32_t bits : {0x7FC00000u, 0x7FC00001u, 0x7FFFFFFFu, 0xFFFFFFFFu}) {
        real nan = std::bit_cast<float>(bits);
        Buffer inp(4), out(T * C), mean(1), rstd(1), weight(4), logits(128), losses(1);
        weight.fill(1), inp.fill(1), logits.fill(0);
        inp[2] = nan, logits[2] = nan;
        gelu_forward(out, inp, 4);
        EXPECT_TRUE(std::isnan(out[2])) << bits;
        layernorm_forward(out, mean, rstd, inp, weight, nullptr, 1e-5, 1, 1, 4);
        EXPECT_TRUE(std::isnan(out[0])) << bits;
        int target = 1;
        classifier_forward(losses, logits, &target, 1, false, 1, 100, 128);
        EXPECT_TRUE(std::isnan(losses[0])) << bits;
        EXPECT_TRUE(std::isnan(global_norm(inp, 4))) << bits;

        Buffer qkv(T * 3 * C), logsumexp(T), scratch = attention_scratch(T);
        qkv.normal(1);
        qkv[5 * 3 * C + C] = nan;  // of the key at position 5
        attention_forward(out, logsumexp, qkv, scratch, Dropout{}, 1, T, C, 1);
        for (int t = 0; t < T; t++)
            EXPECT_EQ(std::isnan(out[t * C]), t >= 5) << "position " << t << " of " << bits;
    }
}

// Where all logits lie far from 0, a loss is the difference of two large numbers.
TEST(Layer, LossKeepsItsDigitsFarFromZero) {
    constexpr int V = 1000, Vp = 1024;
    for (double shift : {0.0, -100.0, -3000.0}) {
        for (int target = 0; target < 20; target++) {
            Buffer logits(Vp), losses(1);
            logits.normal(unsigned(target));
            double sum = 0;
            for (real& logit : logits) logit = real(double(logit) + shift);
            for (int j = 0; j < V; j++) sum += std::exp(double(logits[j] - logits[target]));
            classifier_forward(losses, logits, &target, 1, false, 1, V, Vp);
            // V numbers are added up in at most 16 lanes; exponentials are 3 eps off
            EXPECT_AT_MOST(std::abs(double(losses[0]) - std::log(sum)), 16 * kEps);
        }
    }
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

// Rows shorter than the groups that are drawn side by side, of several of them, and of no whole
// one.
TEST(Layer, DropoutDrawsFourNumbersOfACounter) {
    for (int C : {1, 4, 61, 64, 130}) {
        int B = 2, T = 3;
        uint32_t groups = (uint32_t(C) + 3) / 4;
        Dropout dropout{0.25, 1, 2, 5, RandomUse::encoder, 3};
        Buffer ones(size_t(B * T * C)), out(ones.size());
        ones.fill(1);
        dropout_forward(out, ones, dropout, B, T, C);
        for (int b = 0; b < B; b++)
            for (int t = 0; t < T; t++)
                for (int c = 0; c < C; c++) {
                    Philox random =
                        philox(dropout.seed, uint32_t(t) * groups + uint32_t(c) / 4,
                               uint32_t(dropout.first_sequence) + uint32_t(b),
                               random_stream(dropout.use, dropout.layer), uint32_t(dropout.step));
                    bool stays = random.word[c % 4] >= uint32_t(0.25 * 4294967296.0);
                    EXPECT_EQ(out[(b * T + t) * C + c] != 0, stays) << b << " " << t << " " << c;
                }
    }
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
    GPT2Ptr model(gpt2_create(config, training_shape(1, 8)));
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

// One thread a core that this process may use, and no more than a container's quota feeds.
TEST(Model, ThreadsFollowTheMachineAndItsQuota) {
    EXPECT_EQ(quota_threads("max 100000"), 0);
    EXPECT_EQ(quota_threads(""), 0);
    EXPECT_EQ(quota_threads("-1 100000"), 0) << "no quota, in version 1";
    EXPECT_EQ(quota_threads("200000 100000"), 2);
    EXPECT_EQ(quota_threads("150000 100000"), 1)
        << "a second thread would be stopped half the time";
    EXPECT_EQ(quota_threads("5000 100000"), 1);
    EXPECT_EQ(quota_threads("nan 100000"), 0);
    EXPECT_GE(machine_threads(), 1);
    EXPECT_LE(machine_threads(), std::max(omp_get_num_procs(), omp_get_max_threads()));
}

// Gradients of large weights are not zeroed but written by the next pass: nobody can tell, whether
// they are looked at before it, or a pass follows another that left numbers in them.
TEST(Model, GradientsAreZeroUntilAPassAddsToThem) {
    for (bool tied : {true, false}) {
        GPT2Config config = odd_config();
        config.tied = tied;
        GPT2Ptr model = random_model(config, training_shape(2, 8));
        Batch batch(2, 8, config.vocab_size, 3);
        GPT2Pass pass;
        pass.training = true;
        auto gradients_of_a_pass = [&] {
            forward_loss(model.get(), batch, 2, 8, pass);
            gpt2_backward(model.get());
            return all_of_group(model.get(), Group::gradients);
        };
        std::vector<real> first = gradients_of_a_pass();
        EXPECT_TRUE(gradients_of_a_pass() == first);
        gpt2_zero_gradients(model.get());
        for (real value : all_of_group(model.get(), Group::gradients)) ASSERT_EQ(value, 0);
        gradients_of_a_pass();
        gpt2_zero_gradients(model.get());
        gpt2_update(model.get(), AdamW());
        EXPECT_EQ(gpt2_stats(model.get()).grad_norm, 0);
        gpt2_zero_gradients(model.get());
        gpt2_forward(model.get(), batch.inputs.data(), nullptr, 2, 8, GPT2Pass());
        for (real value : all_of_group(model.get(), Group::gradients)) ASSERT_EQ(value, 0);
    }
}

// What products read in bf16 is the nearest to what was given, ties to even; and so is what
// adamw_update leaves there, while the float32 parameters keep their digits.
TEST(Model, Bf16ParametersAreRoundedToNearest) {
    if (kDouble) return;  // it has no bf16
    GPT2Config config = odd_config();
    GPT2Shape shape = test_shape(1, 1);
    shape.dtype = Dtype::bf16;
    GPT2Ptr model(gpt2_create(config, shape));
    std::vector<real> given(parameter_table(config)[k_wpe].file_size()), got(given.size());
    const std::pair<float, float> kRounded[] = {
        {1.f, 1.f},
        {0x1.01p0f, 0x1.00p0f},        // a tie: below is even
        {0x1.03p0f, 0x1.04p0f},        // a tie: above is even
        {-0x1.010002p0f, -0x1.02p0f},  // just beyond a tie
        {0x1.00fffep0f, 0x1.00p0f},    // just before one
        {0x1.fffffep127f, INFINITY},   // beyond the largest
        {0x1.8p-133f, 0x1.0p-132f},    // among the smallest, which have fewer digits
        {-0.f, -0.f},
        {-INFINITY, -INFINITY},
        {std::bit_cast<float>(0x7F800001u), NAN},  // its upper half alone would be infinity
        {std::bit_cast<float>(0xFFFFFFFFu), NAN},
    };
    for (size_t i = 0; i < std::size(kRounded); i++) given[i] = real(kRounded[i].first);
    gpt2_copy_in(model.get(), Group::parameters, k_wpe, 0, given.data());
    gpt2_copy_out(model.get(), Group::parameters, k_wpe, 0, got.data());
    for (size_t i = 0; i < std::size(kRounded); i++) {
        float expected = kRounded[i].second;
        if (std::isnan(expected)) EXPECT_TRUE(std::isnan(got[i])) << i;
        else
            EXPECT_EQ(std::bit_cast<uint32_t>(float(got[i])), std::bit_cast<uint32_t>(expected))
                << "of " << given[i];
    }
}

// The loss of a fresh model is near that of a uniform guess.
TEST(Model, FirstLossIsNearLogV) {
    GPT2Config config = odd_config();
    GPT2Ptr model(gpt2_create(config, training_shape(3, 17)));
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

// The CPU twin, which these contracts are of.
bool is_cpu_twin() { return std::string(gpt2_program()) == "train_gpt2"; }

// The same model without int8, of the weights that products read there, each of which is at most
// half a step (of 127 to the largest of its row) from what the model was given, which in bf16 is
// itself read rounded by 2^-8. Its head is apart, for the embedding that is looked up in is exact.
GPT2Ptr expanded_model(const GPT2* model, GPT2Shape shape, unsigned seed) {
    GPT2Config config = gpt2_config(model);
    bool tied = config.tied;
    config.tied = false;
    GPT2Ptr plain = random_model(config, shape, seed);  // every other row is the same
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        if (!is_product_weight(config, index)) continue;
        int source = tied && index == k_headw ? k_wte : index;
        for (int layer = 0; layer < int(row.count); layer++) {
            Buffer values(row.file_size()), given(row.file_size());
            gpt2_copy_out(plain.get(), Group::parameters, source, layer, given);
            gpt2_copy_out(model, Group::parameters, source, layer, values);
            for (size_t o = 0; o < row.file_rows; o++)
                EXPECT_AT_MOST(
                    largest_difference(values + o * row.cols, given + o * row.cols, row.cols),
                    (0.5 / 127 + tolerance(128, 1.1)) *
                        largest_magnitude(given + o * row.cols, row.cols))
                    << row.name << ", layer " << layer << ", row " << o;
            gpt2_copy_in(plain.get(), Group::parameters, index, layer, values);
        }
    }
    return plain;
}

// Logits of weights in int8 are those of the numbers that the bytes stand for: of few rows and of
// many, with a head of its own and without.
TEST(Model, Int8LogitsAreThoseOfTheExpandedWeights) {
    if (!is_cpu_twin()) return;
    GPT2Config config = odd_config();
    constexpr int B = 3, T = 19;
    Batch batch(B, T, config.vocab_size, 1);
    size_t V = size_t(config.vocab_size);
    for (bool tied : {true, false}) {
        config.tied = tied;
        GPT2Shape shape = test_shape(B, T, false, B);
        GPT2Ptr rounded = random_model(config, shape, 5);
        shape.int8 = true;
        GPT2Ptr model = random_model(config, shape, 5);
        shape.int8 = false;
        GPT2Ptr plain = expanded_model(model.get(), shape, 5);
        Buffer logits(B * T * V), expected(logits.size()), others(logits.size());
        GPT2Pass pass;
        for (auto [of, to] :
             {std::pair(&model, &logits), {&plain, &expected}, {&rounded, &others}}) {
            pass.logits = *to;
            gpt2_forward(of->get(), batch.inputs.data(), nullptr, B, T, pass);
        }
        double largest = largest_magnitude(expected, expected.size());
        EXPECT_AT_MOST(largest_difference(logits, expected, logits.size()),
                       tolerance(200, 6) * largest);
        double off = largest_difference(logits, others, logits.size());
        EXPECT_TRUE(off > 1e-4 * largest) << "nothing was rounded to int8";
        for (int cut : {1, 17, 18}) {
            for (int b = 0, position = 0; b < 2; b++, position = cut) {
                int n = b == 0 ? cut : T - cut;
                Buffer next(V);
                gpt2_generate(model.get(), &batch.inputs[size_t(position)], 1, n, position, next);
                EXPECT_AT_MOST(largest_difference(next, expected + size_t(position + n - 1) * V, V),
                               tolerance(200, 6) * largest);
            }
        }
    }
}

// A sequence's logits have the same bits alone and among others, from its prompt on, however that
// is cut; and a copy of its keys and values goes on as it does.
TEST(Model, ASequenceIsGeneratedTheSameAloneAndAmongOthers) {
    if (!is_cpu_twin()) return;
    GPT2Config config = odd_config();
    constexpr int B = kFewRows, kPrompt = 11, T = 15;
    size_t V = size_t(config.vocab_size);
    std::vector<int> ids = random_ids(size_t(B * T), config.vocab_size, 3);
    for (bool int8 : {false, true}) {
        GPT2Shape shape = test_shape(2, 8, false, B);
        shape.int8 = int8;
        GPT2Ptr model = random_model(config, shape), alone = random_model(config, shape);
        Buffer logits(B * V), one(V);
        for (int position = 0; position < T;) {
            int n = position == 0 ? kPrompt : 1;
            std::vector<int> tokens;
            for (int b = 0; b < B; b++)
                tokens.insert(tokens.end(), ids.begin() + b * T + position,
                              ids.begin() + b * T + position + n);
            gpt2_generate(model.get(), tokens.data(), B, n, position, logits);
            position += n;
        }
        for (int b : {0, 3, B - 1}) {
            gpt2_generate(alone.get(), &ids[size_t(b * T)], 1, kPrompt, 0, one);
            for (int t = kPrompt; t < T; t++)
                gpt2_generate(alone.get(), &ids[size_t(b * T + t)], 1, 1, t, one);
            EXPECT_TRUE(std::equal(one.begin(), one.end(), logits.begin() + size_t(b) * V)) << b;
        }
        gpt2_copy_cache(model.get(), 3, 0, T), gpt2_copy_cache(model.get(), 3, 1, T - 1);
        std::vector<int> next = {7, 7, 7, 7};
        gpt2_generate(model.get(), next.data(), 4, 1, T, logits);
        auto row = [&](int b) { return logits.begin() + size_t(b) * V; };
        EXPECT_TRUE(std::equal(row(0), row(1), row(3)));
        EXPECT_FALSE(std::equal(row(1), row(2), row(3))) << "more was copied than asked for";
    }
}

// On any twin a copy of a sequence goes on like it.
TEST(Model, ACopiedCacheGoesOnAsTheOriginal) {
    GPT2Config config = odd_config();
    GPT2Ptr model = random_model(config, test_shape(1, 8, false, 3));
    size_t V = size_t(config.vocab_size);
    std::vector<int> ids = random_ids(12, config.vocab_size, 3);
    Buffer logits(3 * V);
    gpt2_generate(model.get(), ids.data(), 1, 12, 0, logits);
    for (int to : {1, 2}) gpt2_copy_cache(model.get(), 0, to, 12);
    std::vector<int> next = {7, 7, 7};
    gpt2_generate(model.get(), next.data(), 3, 1, 12, logits);
    for (size_t b : {1, 2})
        EXPECT_AT_MOST(largest_difference(logits, logits + b * V, V),
                       tolerance(20, 2) * largest_magnitude(logits, V));
}

// Sampling between the passes of a step, and between steps, must not disturb training.
TEST(Model, GenerationLeavesTrainingAlone) {
    GPT2Config config = odd_config();
    std::vector<real> results[2][2];
    for (int generates : {0, 1}) {
        GPT2Ptr model = random_model(config, training_shape(2, 9, 1));
        Buffer logits(size_t(config.vocab_size));
        std::vector<int> prompt = random_ids(12, config.vocab_size, 4);
        auto sample = [&] {
            if (generates) gpt2_generate(model.get(), prompt.data(), 1, 12, 0, logits);
        };
        for (int step = 1; step <= 2; step++) {
            gpt2_zero_gradients(model.get());
            for (unsigned pass = 0; pass < 2; pass++) {
                Batch batch(2, 9, config.vocab_size, unsigned(step) * 2 + pass);
                sample();
                gpt2_forward(model.get(), batch.inputs.data(), batch.targets.data(), 2, 9,
                             GPT2Pass{true, batch.scale / 2, 0, 0, 0, nullptr});
                gpt2_backward(model.get());
            }
            sample();
            results[generates][0] = all_of_group(model.get(), Group::gradients);
            gpt2_update(model.get(), AdamW{0.01, 0.9, 0.95, 1e-8, 0.1, 1, uint64_t(step)});
        }
        results[generates][1] = all_of_group(model.get(), Group::parameters);
    }
    EXPECT_EQ(results[0][0], results[1][0]);
    EXPECT_EQ(results[0][1], results[1][1]);
}

// Another model's number of threads is not this one's, whose scratch memory is for its own.
TEST(Model, ModelsOfDifferentThreadsLiveSideBySide) {
    GPT2Config config = odd_config();
    GPT2Shape shape = training_shape(3, 17), larger = shape;
    shape.threads = 1, larger.threads = 4;
    int before = omp_get_max_threads();
    std::vector<real> gradients[2];
    for (bool beside : {false, true}) {
        GPT2Ptr model = random_model(config, shape), other;
        if (beside) other = random_model(config, larger);
        Batch batch(3, 17, config.vocab_size, 1);
        forward_loss(model.get(), batch, 3, 17, GPT2Pass{true, 0, 0, 0, 0, nullptr});
        gpt2_backward(model.get());
        gradients[beside] = all_of_group(model.get(), Group::gradients);
    }
    omp_set_num_threads(before);
    EXPECT_EQ(gradients[0], gradients[1]);
}

// In bf16 a logit near -100 would be rounded to halves: those that are sampled from, or whose loss
// is all that is asked for, keep the digits of their sums.
TEST(Model, LogitsInBf16KeepTheDigitsOfTheirSums) {
    if (kDouble) return;  // it has no bf16
    GPT2Config config = odd_config();
    config.tied = false;
    GPT2Shape shape = test_shape(2, 9, false, 1);
    shape.dtype = Dtype::bf16;
    GPT2Ptr model = random_model(config, shape);
    size_t C = size_t(config.channels), V = size_t(config.vocab_size);
    Buffer bias(C), head(V * C), logits(18 * V);
    bias.fill(1), head.normal(3);
    for (real& weight : head) weight = real(double(weight) * 0.1 - 100.0 / double(C));
    gpt2_copy_in(model.get(), Group::parameters, k_lnfb, 0, bias);
    gpt2_copy_in(model.get(), Group::parameters, k_headw, 0, head);
    auto short_ones = [&](size_t rows) {
        int count = 0;
        for (size_t i = 0; i < rows * V; i++)
            count += (std::bit_cast<uint32_t>(float(logits[i])) & 0xFFFF) == 0;
        return count;
    };
    Batch batch(2, 9, config.vocab_size, 3);
    GPT2Pass pass;
    pass.logits = logits;
    double loss = forward_loss(model.get(), batch, 2, 9, pass), expected = 0;
    EXPECT_LT(double(logits[0]), -50);
    EXPECT_LE(short_ones(18), 1);
    for (size_t bt = 0; bt < 18; bt++) {
        double sum = 0, target = double(logits[bt * V + size_t(batch.targets[bt])]);
        for (size_t j = 0; j < V; j++) sum += std::exp(double(logits[bt * V + j]) - target);
        expected += std::log(sum) / 18;
    }
    EXPECT_AT_MOST(std::abs(loss - expected), 16 * kEps);
    for (bool int8 : {false, true}) {
        if (int8 && !is_cpu_twin()) continue;
        shape.int8 = int8;
        GPT2Ptr generating = random_model(config, shape);
        gpt2_copy_in(generating.get(), Group::parameters, k_lnfb, 0, bias);
        gpt2_copy_in(generating.get(), Group::parameters, k_headw, 0, head);
        gpt2_generate(generating.get(), batch.inputs.data(), 1, 9, 0, logits);
        EXPECT_LE(short_ones(1), 1) << "int8: " << int8;
    }
}

TEST(Model, OverfitsOneBatch) {
    GPT2Config config;
    named_config("tiny", &config);
    config.vocab_size = 257, config.context = 16, config.channels = 64;
    GPT2Ptr model(gpt2_create(config, training_shape(2, 16)));
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
    GPT2Ptr model(gpt2_create(config, shape));
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
        const real* numbers = gpt2_snapshot_tensor(from, group, row, layer).numbers;
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
    const real* kept = gpt2_snapshot_tensor(model.get(), Group::parameters, k_lnfw, 0).numbers;
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
    std::string error = error_of([&] { gpt2_destroy(gpt2_create(config, training_shape(1, 64))); });
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
    GPT2Ptr model(gpt2_create(fixture.config, training_shape(rows, fixture.T)));
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

// Against the definition, over all sorted: peaks, plains, equals, and tokens that are excluded.
TEST(Sampler, TopPIsThatOfAllTokensSorted) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    for (int V : {1, 2, 17, 500, 5000})
        for (double spread : {0.0, 0.01, 1.0, 8.0})
            for (double top_p : {1e-6, 0.3, 0.5, 0.9, 0.99, 0.999999}) {
                std::vector<double> logits(static_cast<size_t>(V)), weights;
                for (double& logit : logits)
                    logit = random() % 5 == 0 ? -INFINITY : std::round(normal(random) * 8) * spread;
                logits[size_t(V) / 2] = 0;
                double largest = *std::max_element(logits.begin(), logits.end()), total = 0;
                for (double logit : logits) weights.push_back(std::exp(logit - largest));
                std::sort(weights.rbegin(), weights.rend());
                for (double weight : weights) total += weight;
                size_t kept = 0;
                double reached = 0, entropy = 0;
                while (kept == 0 || reached < top_p * total) reached += weights[kept++];
                for (size_t i = 0; i < kept; i++)
                    if (weights[i] > 0)
                        entropy -= weights[i] / reached * std::log(weights[i] / reached);
                SampledToken sampled = Sampler({1, 0, top_p}, 3).sample(logits.data(), V);
                EXPECT_NEAR(sampled.entropy, entropy, 1e-9) << V << " " << spread << " " << top_p;
                EXPECT_NEAR(sampled.probability,
                            std::exp(logits[size_t(sampled.token)] - largest) / reached, 1e-9);
            }
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

// ==== main =======================================================================================

// What concerns the program that these tests were built for. Gradients of the CPU's layers need
// double, and what does not compute is tested once, in float.
std::string tests_of_program() {
    if (kDouble) return "Gradient.*:Layer.*:Model.*:Golden.*";
    if (std::string(gpt2_program()) == "train_gpt2") return "-Gradient.*";
    return "Model.*:Golden.*";
}

int main(int argc, char** argv) { return run_tests(argc, argv, tests_of_program()); }
