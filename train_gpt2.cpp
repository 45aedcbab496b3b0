// GPT-2 on the CPU: every layer's forward and backward pass by hand, over memory laid out by hand.
// This is the reference twin of train_gpt2.cu: the same sections in the same order, and the same
// mathematics.
//
// Read it from top to bottom: layers first, each forward followed by its backward, then memory,
// then the model. All loops are parallel over independent outputs, or sum in an order fixed by
// sizes, so that a run with the same number of threads gives the same bits.

#include <omp.h>
#include <sys/mman.h>

#include <bit>
#include <cassert>
#include <chrono>
#include <fstream>
#include <thread>

#include "gpt2.h"
#include "trainer.h"
#ifndef GPT2_MODEL_ONLY  // what is tested in double, and what kernels are held against
#    include "commands.h"
#endif
#ifdef GPT2_ONEDNN
#    include <oneapi/dnnl/dnnl.h>
#endif

// ==== constants ==================================================================================

constexpr double kGeluScale = 0.7978845608028654;  // sqrt(2 / pi)
constexpr double kGeluCube = 0.044715;

constexpr int kClassifierRows = 256;  // rows of logits that exist at a time
constexpr int kAttentionRows = 64;    // queries that share a block of scores
constexpr int kReduceRows = 32;       // partial sums of a bias or layer norm gradient

// Scores of attention exist for a block of queries on each thread, those of the weights and of
// their gradient; a model that generates sees up to `context` keys.
TwinSizes gpt2_sizes(const GPT2Config& config, const GPT2Shape& shape) {
    size_t keys = size_t(shape.generate > 0 ? config.context : shape.T);
    size_t numbers = allocated_parameters(config);
    return {size_t(kClassifierRows),
            size_t(shape.threads) * 2 * kAttentionRows * keys,
            size_t(kReduceRows),
            numbers,
            numbers,
            numbers,
            numbers};
}

// e^x in a form that compilers turn into vector code. For float: x = n ln2 + r with |r| <= ln2 / 2,
// a polynomial for e^r (its own error is below half a unit in the last place), and n added to the
// exponent; within 1.5 units in the last place on [-87, 88], flat outside, NaN for NaN. For double,
// where only tests call it, the library's.
inline double vector_exp(double x) { return std::exp(x); }
inline float vector_exp(float x) {
    constexpr float kRound =
        12582912.f;  // 1.5 * 2^23: adding it leaves a whole number in the low bits
    x = x < -87.f ? -87.f : x;
    x = x > 88.f ? 88.f : x;
    float shifted = x * 1.44269504f + kRound;
    float n = shifted - kRound;
    float r =
        x - n * 0.693359375f + n * 2.12194440e-4f;  // ln2 in two parts, the first exact in 9 bits
    float e = 1.f / 5040;
    e = e * r + 1.f / 720;
    e = e * r + 1.f / 120;
    e = e * r + 1.f / 24;
    e = e * r + 1.f / 6;
    e = e * r + 0.5f;
    e = e * (r * r) + r + 1.f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(e) +
                                (std::bit_cast<uint32_t>(shifted) << 23));
}

// ==== encoder ====================================================================================

// out = wte[token] + wpe[t]                                          [Radford et al. 2019,
// section 2.3] out (B,T,C) is written; inputs (B,T) are ids below the rows of wte; wte (Vp,C), wpe
// (at least T,C)
void encoder_forward(real* out, const int* inputs, const real* wte, const real* wpe, int B, int T,
                     int C) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            size_t bt = size_t(b) * T + t;
            const real* token = wte + size_t(inputs[bt]) * C;
            const real* position = wpe + size_t(t) * C;
            real* out_bt = out + bt * C;
#pragma omp simd
            for (int c = 0; c < C; c++) out_bt[c] = token[c] + position[c];
        }
    }
}

// forward: out = wte[token] + wpe[t], so dwte[token] += dout and dwpe[t] += dout
// dwte (Vp,C) and dwpe (T,C) accumulate. A token may stand at many places: each thread owns the
// rows of wte whose id is its number modulo the threads, and adds to them in the order of places.
void encoder_backward(real* dwte, real* dwpe, const real* dout, const int* inputs, int B, int T,
                      int C) {
#pragma omp parallel
    {
        int threads = omp_get_num_threads(), thread = omp_get_thread_num();
        for (size_t bt = 0; bt < size_t(B) * T; bt++) {
            if (inputs[bt] % threads != thread) continue;
            real* dtoken = dwte + size_t(inputs[bt]) * C;
            const real* dout_bt = dout + bt * C;
#pragma omp simd
            for (int c = 0; c < C; c++) dtoken[c] += dout_bt[c];
        }
#pragma omp for schedule(static)
        for (int t = 0; t < T; t++) {
            real* dposition = dwpe + size_t(t) * C;
            for (int b = 0; b < B; b++) {
                const real* dout_bt = dout + (size_t(b) * T + t) * C;
#pragma omp simd
                for (int c = 0; c < C; c++) dposition[c] += dout_bt[c];
            }
        }
    }
}

// ==== layer norm =================================================================================

// One row of layer norm: y (C) from x (C), and its mean and rstd. Everything that normalises calls
// this one, never inlined, so that what is computed a second time has the same bits.
__attribute__((noinline)) static void layernorm_row(real* y, real* mean, real* rstd, const real* x,
                                                    const real* weight, const real* bias,
                                                    double epsilon, int C) {
    real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += x[c];
    real m = sum / C;
#pragma omp simd reduction(+ : squares)
    for (int c = 0; c < C; c++) squares += (x[c] - m) * (x[c] - m);
    real r = 1 / std::sqrt(squares / C + real(epsilon));
    if (bias != nullptr) {
#pragma omp simd
        for (int c = 0; c < C; c++) y[c] = (x[c] - m) * r * weight[c] + bias[c];
    } else {
#pragma omp simd
        for (int c = 0; c < C; c++) y[c] = (x[c] - m) * r * weight[c];
    }
    *mean = m;
    *rstd = r;
}

// y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(variance + epsilon)  [Ba et al. 2016,
// arXiv:1607.06450] out (B,T,C) and mean, rstd (B,T) are written; mean and rstd are kept for
// backward inp (B,T,C), weight (C), bias (C) or null. The variance is taken in a second pass, about
// the mean.
void layernorm_forward(real* out, real* mean, real* rstd, const real* inp, const real* weight,
                       const real* bias, double epsilon, int B, int T, int C) {
#pragma omp parallel for schedule(static)
    for (size_t bt = 0; bt < size_t(B) * T; bt++)
        layernorm_row(out + bt * C, mean + bt, rstd + bt, inp + bt * C, weight, bias, epsilon, C);
}

// column[c] += sum over rows of partial (kReduceRows,C): the second stage of a deterministic sum
static void add_partial_sums(real* column, const real* partial, int C) {
#pragma omp parallel for simd schedule(static)
    for (int c = 0; c < C; c++) {
        real sum = 0;
        for (int p = 0; p < kReduceRows; p++) sum += partial[size_t(p) * C + c];
        column[c] += sum;
    }
}

// forward: y = n * weight + bias with n = (x - mean) * rstd
// dbias += dy;  dweight += dy * n;  dx += rstd * (g - mean(g) - n * mean(g * n)) with g = dy *
// weight dinp (B,T,C), dweight (C) and dbias (C) or null accumulate. scratch (2 * kReduceRows, C):
// the weight's and the bias's gradients are first summed over kReduceRows runs of rows, then over
// those.
void layernorm_backward(real* dinp, real* dweight, real* dbias, const real* dout, const real* inp,
                        const real* weight, const real* mean, const real* rstd, real* scratch,
                        int B, int T, int C) {
    size_t BT = size_t(B) * T;
    real* dweights = scratch;
    real* dbiases = scratch + size_t(kReduceRows) * C;
#pragma omp parallel for schedule(static)
    for (int p = 0; p < kReduceRows; p++) {
        real* dw = dweights + size_t(p) * C;
        real* db = dbiases + size_t(p) * C;
        std::fill(dw, dw + C, real(0));
        std::fill(db, db + C, real(0));
        for (size_t bt = BT * p / kReduceRows; bt < BT * (p + 1) / kReduceRows; bt++) {
            const real *x = inp + bt * C, *dy = dout + bt * C;
            real* dx = dinp + bt * C;
            real m = mean[bt], r = rstd[bt], sum = 0, sum_n = 0;
#pragma omp simd reduction(+ : sum, sum_n)
            for (int c = 0; c < C; c++) {
                real n = (x[c] - m) * r, g = dy[c] * weight[c];
                sum += g;
                sum_n += g * n;
                dw[c] += dy[c] * n;
                db[c] += dy[c];
            }
            real mean_g = sum / C, mean_gn = sum_n / C;
#pragma omp simd
            for (int c = 0; c < C; c++) {
                real n = (x[c] - m) * r;
                dx[c] += r * (dy[c] * weight[c] - mean_g - n * mean_gn);
            }
        }
    }
    add_partial_sums(dweight, dweights, C);
    if (dbias != nullptr) add_partial_sums(dbias, dbiases, C);
}

// ==== matmul =====================================================================================

// C = A' B' + beta C: four loop nests, one for each pair of transposes, parallel over the rows of
// C. A' is (M,K), B' is (K,N), C is (M,N), row-major; lda, ldb, ldc are the distances between
// stored rows.
void gemm_plain(bool trans_a, bool trans_b, int M, int N, int K, const real* A, int lda,
                const real* B, int ldb, real beta, real* C, int ldc) {
#pragma omp parallel for schedule(static)
    for (int m = 0; m < M; m++) {
        real* c = C + size_t(m) * ldc;
        for (int n = 0; n < N; n++) c[n] = beta == 0 ? real(0) : beta * c[n];
        if (trans_b) {
            for (int n = 0; n < N; n++) {
                const real* b = B + size_t(n) * ldb;
                real sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int k = 0; k < K; k++)
                    sum += b[k] * (trans_a ? A[size_t(k) * lda + m] : A[size_t(m) * lda + k]);
                c[n] += sum;
            }
        } else {
            for (int k = 0; k < K; k++) {
                real a = trans_a ? A[size_t(k) * lda + m] : A[size_t(m) * lda + k];
                const real* b = B + size_t(k) * ldb;
#pragma omp simd
                for (int n = 0; n < N; n++) c[n] += a * b[n];
            }
        }
    }
}

// The same product by oneDNN, which picks the kernel for the processor when the program runs.
// Inside a parallel region it works on the calling thread alone.
void gemm(bool trans_a, bool trans_b, int M, int N, int K, const real* A, int lda, const real* B,
          int ldb, real beta, real* C, int ldc) {
#ifdef GPT2_ONEDNN
    dnnl_status_t status = dnnl_sgemm(trans_a ? 'T' : 'N', trans_b ? 'T' : 'N', M, N, K, 1.f, A,
                                      lda, B, ldb, beta, C, ldc);
    if (status != dnnl_success)
        fail_machine("oneDNN: product of (%d,%d) and (%d,%d): status %d", M, K, K, N, int(status));
#else
    gemm_plain(trans_a, trans_b, M, N, K, A, lda, B, ldb, beta, C, ldc);
#endif
}

// out = inp weight^T + bias
// out (BT,OC) is written; inp (BT,C), weight (OC,C), bias (OC) or null
void matmul_forward(real* out, const real* inp, const real* weight, const real* bias, int BT, int C,
                    int OC) {
    if (bias != nullptr) {
#pragma omp parallel for schedule(static)
        for (int bt = 0; bt < BT; bt++) std::copy(bias, bias + OC, out + size_t(bt) * OC);
    }
    gemm(false, true, BT, OC, C, inp, C, weight, C, bias != nullptr ? 1 : 0, out, OC);
}

// forward: out = inp weight^T + bias
// dinp = dout weight;  dweight += dout^T inp;  dbias += sum over rows of dout
// dinp (BT,C) is written; dweight (OC,C) and dbias (OC) or null accumulate. scratch
// (kReduceRows,OC).
void matmul_backward(real* dinp, real* dweight, real* dbias, const real* dout, const real* inp,
                     const real* weight, real* scratch, int BT, int C, int OC) {
    gemm(false, false, BT, C, OC, dout, OC, weight, C, 0, dinp, C);
    gemm(true, false, OC, C, BT, dout, OC, inp, C, 1, dweight, C);
    if (dbias == nullptr) return;
#pragma omp parallel for schedule(static)
    for (int p = 0; p < kReduceRows; p++) {
        real* sum = scratch + size_t(p) * OC;
        std::fill(sum, sum + OC, real(0));
        for (int bt = int(int64_t(BT) * p / kReduceRows);
             bt < int(int64_t(BT) * (p + 1) / kReduceRows); bt++) {
            const real* dout_bt = dout + size_t(bt) * OC;
#pragma omp simd
            for (int o = 0; o < OC; o++) sum[o] += dout_bt[o];
        }
    }
    add_partial_sums(dbias, scratch, OC);
}

// ==== dropout ====================================================================================

// out[j] = inp[j] / (1 - p) with probability 1 - p, else 0            [Srivastava et al. 2014, JMLR
// 15:1929] One row of n of `cols` numbers. Whether an element stays depends on the key and its
// place alone, so that backward, another rank or the other twin decides the same; out may be inp.
static void dropout_row(real* out, const real* inp, const Dropout& dropout, uint64_t sequence,
                        int row, int cols, int n) {
    uint32_t threshold = uint32_t(dropout.probability * 4294967296.0);
    uint32_t stream = random_stream(dropout.use, dropout.layer);
    uint32_t groups = (uint32_t(cols) + 3) / 4;
    real scale = real(1 / (1 - dropout.probability));
    for (int j = 0; j < n; j += 4) {
        Philox random = philox(dropout.seed, uint32_t(row) * groups + uint32_t(j) / 4,
                               uint32_t(sequence), stream, uint32_t(dropout.step));
        for (int i = 0; i < 4 && j + i < n; i++)
            out[j + i] = random.word[i] >= threshold ? inp[j + i] * scale : real(0);
    }
}

// out (B,T,C) is written; out may be inp. The gradient goes through the same function: dinp = mask
// * dout / (1 - p).
void dropout_forward(real* out, const real* inp, const Dropout& dropout, int B, int T, int C) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            size_t bt = size_t(b) * T + t;
            dropout_row(out + bt * C, inp + bt * C, dropout, dropout.first_sequence + uint64_t(b),
                        t, C, C);
        }
    }
}

// ==== attention ==================================================================================

// The largest of n numbers, 16 running maxima at a time (compilers do not split a maximum on their
// own).
static real largest_of(const real* row, int n) {
    constexpr int kLanes = 16;
    real lanes[kLanes];
    std::fill(lanes, lanes + kLanes, row[0]);
    int whole = n / kLanes * kLanes;
    for (int j = 0; j < whole; j += kLanes) {
#pragma omp simd
        for (int i = 0; i < kLanes; i++) lanes[i] = row[j + i] > lanes[i] ? row[j + i] : lanes[i];
    }
    for (int j = whole; j < n; j++) lanes[0] = row[j] > lanes[0] ? row[j] : lanes[0];
    return *std::max_element(lanes, lanes + kLanes);
}

// softmax of a row of n scores times `scale`, in place; returns its log-sum-exp
static real softmax_row(real* row, int n, real scale) {
    real largest = largest_of(row, n), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; j++) {
        real e = vector_exp((row[j] - largest) * scale);
        row[j] = e;
        sum += e;
    }
    real inverse = 1 / sum;
#pragma omp simd
    for (int j = 0; j < n; j++) row[j] *= inverse;
    return largest * scale + std::log(sum);
}

// out = dropout(softmax(q k^T / sqrt(HS), causal)) v, a head at a time  [Vaswani et al. 2017,
// arXiv:1706.03762] out (B,T,C) and logsumexp (B,NH,T) are written; qkv (B,T,3C) holds q, k and v,
// each (NH,HS) Scores exist for kAttentionRows queries at a time, in scratch (threads, 2 *
// kAttentionRows * T): a (B,NH,T,T) tensor is never held, and backward computes the scores again,
// which costs it one product in five.
void attention_forward(real* out, real* logsumexp, const real* qkv, real* scratch,
                       const Dropout& dropout, int B, int T, int C, int NH) {
    int HS = C / NH, blocks = (T + kAttentionRows - 1) / kAttentionRows;
    real scale = real(1 / std::sqrt(double(HS)));
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < NH; h++) {
            for (int block = 0; block < blocks; block++) {
                int first = block * kAttentionRows, keys = std::min(first + kAttentionRows, T);
                const real* q = qkv + size_t(b) * T * 3 * C + h * HS;
                const real *k = q + C, *v = q + 2 * C;
                real* scores = scratch + size_t(omp_get_thread_num()) * 2 * kAttentionRows * T;
                gemm(false, true, keys - first, keys, HS, q + size_t(first) * 3 * C, 3 * C, k,
                     3 * C, 0, scores, keys);
                for (int t = first; t < keys; t++) {
                    real* row = scores + size_t(t - first) * keys;
                    logsumexp[(size_t(b) * NH + h) * T + t] = softmax_row(row, t + 1, scale);
                    std::fill(row + t + 1, row + keys, real(0));
                    if (dropout.probability > 0)
                        dropout_row(row, row, dropout, dropout.first_sequence + uint64_t(b),
                                    h * T + t, T, t + 1);
                }
                gemm(false, false, keys - first, HS, keys, scores, keys, v, 3 * C, 0,
                     out + (size_t(b) * T + first) * C + h * HS, C);
            }
        }
    }
}

// One row of the gradient of the scores. On entry p holds scores and dp the gradient of the dropped
// weights; on exit p holds the dropped weights and dp the gradient of the scores. n of `keys` are
// visible to this query.
static void attention_backward_row(real* p, real* dp, real logsumexp, real dout_out, real scale,
                                   const Dropout& dropout, uint64_t sequence, int row, int T, int n,
                                   int keys) {
    bool drops = dropout.probability > 0;
    if (drops) dropout_row(dp, dp, dropout, sequence, row, T, n);
#pragma omp simd
    for (int j = 0; j < n; j++) {
        p[j] = vector_exp(p[j] * scale - logsumexp);
        dp[j] = p[j] * (dp[j] - dout_out) * scale;
    }
    // A query that sees one key weighs it 1, whatever its score: the gradient is 0, and what
    // rounding leaves of it AdamW would divide by its own size.
    if (n == 1) dp[0] = 0;
    if (drops) dropout_row(p, p, dropout, sequence, row, T, n);
    std::fill(p + n, p + keys, real(0));
    std::fill(dp + n, dp + keys, real(0));
}

// forward: s = q k^T / sqrt(HS);  p = softmax(s);  d = dropout(p);  out = d v
// dv = d^T dout;  dd = dout v^T;  ds = p * (dropout(dd) - sum(dout * out)) / sqrt(HS);  dq = ds k;
// dk = ds^T q (sum_j p_j dropout(dd)_j = sum_j d_j dd_j = dout . out, so the row's sum needs no
// second pass [Dao et al. 2022, arXiv:2205.14135, appendix B]). dqkv (B,T,3C) is written; dout, out
// (B,T,C); scratch as in forward. Query blocks go from last to first: the last sees every key, so
// that it writes dk and dv and the others add.
void attention_backward(real* dqkv, const real* dout, const real* qkv, const real* out,
                        const real* logsumexp, real* scratch, const Dropout& dropout, int B, int T,
                        int C, int NH) {
    int HS = C / NH, blocks = (T + kAttentionRows - 1) / kAttentionRows;
    real scale = real(1 / std::sqrt(double(HS)));
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < NH; h++) {
            const real* q = qkv + size_t(b) * T * 3 * C + h * HS;
            const real *k = q + C, *v = q + 2 * C;
            real* dq = dqkv + size_t(b) * T * 3 * C + h * HS;
            real *dk = dq + C, *dv = dq + 2 * C;
            real* p = scratch + size_t(omp_get_thread_num()) * 2 * kAttentionRows * T;
            real* dp = p + size_t(kAttentionRows) * T;
            for (int block = blocks - 1; block >= 0; block--) {
                int first = block * kAttentionRows, keys = std::min(first + kAttentionRows, T);
                int rows = keys - first;
                const real* q_block = q + size_t(first) * 3 * C;
                const real* dout_block = dout + (size_t(b) * T + first) * C + h * HS;
                const real* out_block = out + (size_t(b) * T + first) * C + h * HS;
                gemm(false, true, rows, keys, HS, q_block, 3 * C, k, 3 * C, 0, p, keys);
                gemm(false, true, rows, keys, HS, dout_block, C, v, 3 * C, 0, dp, keys);
                for (int t = first; t < keys; t++) {
                    const real* dout_t = dout_block + size_t(t - first) * C;
                    const real* out_t = out_block + size_t(t - first) * C;
                    real dout_out = 0;
#pragma omp simd reduction(+ : dout_out)
                    for (int i = 0; i < HS; i++) dout_out += dout_t[i] * out_t[i];
                    attention_backward_row(
                        p + size_t(t - first) * keys, dp + size_t(t - first) * keys,
                        logsumexp[(size_t(b) * NH + h) * T + t], dout_out, scale, dropout,
                        dropout.first_sequence + uint64_t(b), h * T + t, T, t + 1, keys);
                }
                real beta = block == blocks - 1 ? real(0) : real(1);
                gemm(false, false, rows, HS, keys, dp, keys, k, 3 * C, 0,
                     dq + size_t(first) * 3 * C, 3 * C);
                gemm(true, false, keys, HS, rows, dp, keys, q_block, 3 * C, beta, dk, 3 * C);
                gemm(true, false, keys, HS, rows, p, keys, dout_block, C, beta, dv, 3 * C);
            }
        }
    }
}

// Attention of n new queries a sequence at `position` over the keys and values of a cache
// (B,context,C), to which this call first adds the new ones. out (B,n,C) is written; qkv (B,n,3C);
// scratch (threads, context) at least.
static void attention_cached_forward(real* out, real* key_cache, real* value_cache, const real* qkv,
                                     real* scratch, int B, int n, int position, int context, int C,
                                     int NH) {
    int HS = C / NH;
    real scale = real(1 / std::sqrt(double(HS)));
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int b = 0; b < B; b++) {
            for (int t = 0; t < n; t++) {
                const real* k = qkv + (size_t(b) * n + t) * 3 * C + C;
                size_t place = (size_t(b) * context + position + t) * C;
                std::copy(k, k + C, key_cache + place);
                std::copy(k + C, k + 2 * C, value_cache + place);
            }
        }  // the barrier here: queries read every key of this call
#pragma omp for collapse(3) schedule(static)
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < NH; h++) {
                for (int t = 0; t < n; t++) {
                    const real* q = qkv + (size_t(b) * n + t) * 3 * C + h * HS;
                    const real* k = key_cache + size_t(b) * context * C + h * HS;
                    const real* v = value_cache + size_t(b) * context * C + h * HS;
                    real* out_h = out + (size_t(b) * n + t) * C + h * HS;
                    real* row = scratch + size_t(omp_get_thread_num()) * context;
                    int keys = position + t + 1;
                    for (int j = 0; j < keys; j++) {
                        real sum = 0;
#pragma omp simd reduction(+ : sum)
                        for (int i = 0; i < HS; i++) sum += q[i] * k[size_t(j) * C + i];
                        row[j] = sum;
                    }
                    softmax_row(row, keys, scale);
                    std::fill(out_h, out_h + HS, real(0));
                    for (int j = 0; j < keys; j++) {
#pragma omp simd
                        for (int i = 0; i < HS; i++) out_h[i] += row[j] * v[size_t(j) * C + i];
                    }
                }
            }
        }
    }
}

// ==== gelu =======================================================================================

// y = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3)  [Hendrycks & Gimpel 2016,
// arXiv:1606.08415]
//   = x sigmoid(2u), which loses no digits where tanh(u) is near -1
// out (N) is written
void gelu_forward(real* out, const real* inp, size_t N) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < N; i++) {
        real x = inp[i];
        real u = real(kGeluScale) * (x + real(kGeluCube) * x * x * x);
        out[i] = x / (1 + vector_exp(-2 * u));
    }
}

// forward: y = x s, s = sigmoid(2u(x))
// dx = dy (s + 2 x s (1 - s) u'),  u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)
// dinp (N) is written; it may be dout
void gelu_backward(real* dinp, const real* dout, const real* inp, size_t N) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < N; i++) {
        real x = inp[i];
        real u = real(kGeluScale) * (x + real(kGeluCube) * x * x * x);
        real du = real(kGeluScale) * (1 + 3 * real(kGeluCube) * x * x);
        real s = 1 / (1 + vector_exp(-2 * u));
        dinp[i] = dout[i] * (s + 2 * x * s * (1 - s) * du);
    }
}

// pre = inp weight^T + bias;  out = gelu(pre)
// pre and out (BT,OC) are written, both kept for backward; inp (BT,C), weight (OC,C), bias (OC) or
// null. One name because the other twin's product applies GELU to its result before it is stored.
void matmul_gelu_forward(real* out, real* pre, const real* inp, const real* weight,
                         const real* bias, int BT, int C, int OC) {
    matmul_forward(pre, inp, weight, bias, BT, C, OC);
    gelu_forward(out, pre, size_t(BT) * OC);
}

// forward: inp = gelu(pre);  out = inp weight^T + bias
// dpre = (dout weight) * gelu'(pre);  dweight += dout^T inp;  dbias += sum over rows of dout
// dpre (BT,C) is written; dweight (OC,C) and dbias (OC) or null accumulate. dout (BT,OC); inp and
// pre (BT,C); scratch (kReduceRows,OC).
void gelu_matmul_backward(real* dpre, real* dweight, real* dbias, const real* dout, const real* inp,
                          const real* pre, const real* weight, real* scratch, int BT, int C,
                          int OC) {
    matmul_backward(dpre, dweight, dbias, dout, inp, weight, scratch, BT, C, OC);
    gelu_backward(dpre, dpre, pre, size_t(BT) * C);
}

// ==== residual ===================================================================================

// residual = inp + dropout(branch)   [He et al. 2015, arXiv:1512.03385];  out = layer norm of it
// residual, out (B,T,C) and mean, rstd (B,T) are written; inp, branch (B,T,C), neither of them
// residual; weight (C), bias (C) or null. A row is normalised while it is in cache. The gradient of
// residual goes to inp as it is, and to branch through dropout_forward.
void residual_layernorm_forward(real* residual, real* out, real* mean, real* rstd, const real* inp,
                                const real* branch, const real* weight, const real* bias,
                                double epsilon, const Dropout& dropout, int B, int T, int C) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            size_t bt = size_t(b) * T + t;
            const real *inp_bt = inp + bt * C, *added = branch + bt * C;
            real* residual_bt = residual + bt * C;
            if (dropout.probability > 0) {
                dropout_row(residual_bt, added, dropout, dropout.first_sequence + uint64_t(b), t, C,
                            C);
                added = residual_bt;
            }
#pragma omp simd
            for (int c = 0; c < C; c++) residual_bt[c] = inp_bt[c] + added[c];
            layernorm_row(out + bt * C, mean + bt, rstd + bt, residual_bt, weight, bias, epsilon,
                          C);
        }
    }
}

// ==== classifier =================================================================================

// loss = log(sum_j exp(logit_j)) - logit_target;  dlogit_j = (softmax_j - [j = target]) *
// loss_scale losses (BT) is written, 0 where the target is -1. logits (BT,Vp): only V take part;
// with `gradient` they are replaced by dlogits, 0 in the padding and where the target is -1. One
// pass over memory per row, while in cache.
void classifier_forward(real* losses, real* logits, const int* targets, double loss_scale,
                        bool gradient, int BT, int V, int Vp) {
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < BT; bt++) {
        real* row = logits + size_t(bt) * Vp;
        int target = targets[bt];
        losses[bt] = 0;
        if (target == kIgnore) {
            if (gradient) std::fill(row, row + Vp, real(0));
            continue;
        }
        real at_target = row[target];
        if (!gradient) {
            real largest = largest_of(row, V), sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int j = 0; j < V; j++) sum += vector_exp(row[j] - largest);
            losses[bt] = largest + std::log(sum) - at_target;
            continue;
        }
        losses[bt] = softmax_row(row, V, 1) - at_target;
        row[target] -= 1;
#pragma omp simd
        for (int j = 0; j < V; j++) row[j] *= real(loss_scale);
        std::fill(row + V, row + Vp, real(0));
    }
}

// ==== global norm ================================================================================

// sqrt(sum of squares) of N gradients, summed in double over 1,024 runs of fixed bounds
double global_norm(const real* gradients, size_t N) {
    constexpr size_t kRuns = 1024;
    std::array<double, kRuns> sums;
#pragma omp parallel for schedule(static)
    for (size_t run = 0; run < kRuns; run++) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = N * run / kRuns; i < N * (run + 1) / kRuns; i++)
            sum += double(gradients[i]) * double(gradients[i]);
        sums[run] = sum;
    }
    double total = 0;
    for (double sum : sums) total += sum;
    return std::sqrt(total);
}

// ==== adamw ======================================================================================

// m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  with g scaled by grad_scale
// p = p - lr decay p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
// [Kingma & Ba 2014, arXiv:1412.6980; Loshchilov & Hutter 2017, arXiv:1711.05101]
// params, m, v (N) are updated; grads (N)
void adamw_update(real* params, real* m, real* v, const real* grads, size_t N, const AdamW& adamw,
                  double weight_decay, double grad_scale) {
    double correction1 = 1 - std::pow(adamw.beta1, double(adamw.step));
    double correction2 = 1 - std::pow(adamw.beta2, double(adamw.step));
    real keep = real(1 - adamw.learning_rate * weight_decay);
    real rate = real(adamw.learning_rate / correction1), epsilon = real(adamw.epsilon);
    real inverse_root = real(1 / std::sqrt(correction2)), scale = real(grad_scale);
    real beta1 = real(adamw.beta1), beta2 = real(adamw.beta2);
    real rest1 = real(1 - adamw.beta1), rest2 = real(1 - adamw.beta2);
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < N; i++) {
        real g = grads[i] * scale;
        m[i] = beta1 * m[i] + rest1 * g;
        v[i] = beta2 * v[i] + rest2 * g * g;
        params[i] = keep * params[i] - rate * m[i] / (std::sqrt(v[i]) * inverse_root + epsilon);
    }
}

// ==== memory =====================================================================================

// One allocation of `size` zeros; it asks for huge pages, and is first touched by the threads that
// will use it.
static real* allocate(size_t size, const char* group) {
    constexpr size_t kAlignment = 1 << 21;
    size_t bytes = (size * sizeof(real) + kAlignment - 1) / kAlignment * kAlignment;
    if (size == 0) return nullptr;
    void* memory = size > SIZE_MAX / 16 ? nullptr : aligned_alloc(kAlignment, bytes);
    if (memory == nullptr)
        fail_machine(
            "out of memory: %s need %.1f MiB; a smaller --batch-size, --sequence-length or --model "
            "would fit",
            group, double(size) * sizeof(real) / 1048576);
    madvise(memory, bytes, MADV_HUGEPAGE);
    real* values = static_cast<real*>(memory);
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < size; i++) values[i] = 0;
    return values;
}

struct GPT2 {
    GPT2Config config;
    GPT2Shape shape;
    ParameterTable parameter_rows;
    ActivationTable activation_rows;
    std::array<real*, 4> groups = {};  // parameters, gradients, moments: each laid out as the table
    real* snapshot = nullptr;          // parameters and moments, one group after the other
    std::thread snapshot_copy;         // what fills it
    std::array<ParameterTensors, 2>
        layer0;  // where each tensor starts, in parameters and in gradients
    real* activation_memory = nullptr;
    ActivationTensors activations;
    size_t parameters = 0;
    int B = 0, T = 0;  // of the last forward
    const int* inputs = nullptr;
    GPT2Pass pass;
    double loss = 0;                        // of the passes since gpt2_zero_gradients
    GPT2Stats last = {}, before_last = {};  // of the last two updates

    ~GPT2() {
        if (snapshot_copy.joinable()) snapshot_copy.join();
        for (real* group : groups) free(group);
        free(snapshot);
        free(activation_memory);
    }

    // The tensors of one layer; those that exist once are the same in every layer, those not
    // present are null.
    ParameterTensors layer(Group group, int l) const {
        ParameterTensors tensors = layer0[size_t(group)];
#define X(name, ...)                                                   \
    if (tensors.name != nullptr && parameter_rows[k_##name].count > 1) \
        tensors.name += size_t(l) * parameter_rows[k_##name].size();
        GPT2_PARAMETER_TABLE(X)
#undef X
        return tensors;
    }
    ActivationTensors layer(int l) const {
        ActivationTensors tensors = activations;
#define X(name, ...)                         \
    if (activation_rows[a_##name].count > 1) \
        tensors.name += size_t(l) * activation_rows[a_##name].size;
        GPT2_ACTIVATION_TABLE(X)
#undef X
        return tensors;
    }
    // The layer norm that block l begins with, or, after the last block, the last one.
    struct Norm {
        real *out, *mean, *rstd;
        const real *weight, *bias;
    };
    Norm norm_before(int l) const {
        if (l == config.layers) {
            const ParameterTensors& p = layer0[0];
            const ActivationTensors& a = activations;
            return {a.lnf, a.lnf_mean, a.lnf_rstd, p.lnfw, p.lnfb};
        }
        ParameterTensors p = layer(Group::parameters, l);
        ActivationTensors a = layer(l);
        return {a.ln1, a.ln1_mean, a.ln1_rstd, p.ln1w, p.ln1b};
    }
    // What block l adds to: the embeddings, or what the block before it left.
    real* block_input(int l) const { return l == 0 ? activations.encoded : layer(l - 1).residual3; }
    Dropout dropout(RandomUse use, int l) const {
        double probability = pass.training ? config.dropout : 0;
        return {probability, pass.seed, pass.step, pass.first_sequence, use, l};
    }
};

size_t gpt2_memory_free() { return machine_memory_free(); }

// What the whole process will take: the tables; the copies of one tensor at a time, of which
// initialisation, files and the library's packing hold at most two; and the program with its
// libraries, as measured.
std::vector<MemoryRow> gpt2_memory(const GPT2Config& config, const GPT2Shape& shape) {
    constexpr size_t kProgramBytes = size_t(30) << 20;
    std::vector<MemoryRow> rows = tensor_memory(config, shape);
    size_t largest = 0;
    for (const ParameterRow& row : parameter_table(config))
        largest = std::max(largest, row.file_size());
    if (shape.snapshot) rows.push_back({"snapshot", snapshot_bytes(allocated_parameters(config))});
    rows.push_back({"copies of a tensor", 2 * largest * sizeof(real)});
    rows.push_back({"program, libraries", kProgramBytes});
    return rows;
}

std::vector<MemoryRow> gpt2_host_memory(const GPT2Config&, const GPT2Shape&) { return {}; }

// Refuses what is larger than the memory that is free, before any of it is taken.
static void check_memory(const GPT2Config& config, const GPT2Shape& shape) {
    std::vector<MemoryRow> rows = gpt2_memory(config, shape);
    size_t needed = total_bytes(rows), free = gpt2_memory_free();
    if (free == 0 || needed <= free) return;
    auto smaller = [](const MemoryRow& a, const MemoryRow& b) { return a.bytes < b.bytes; };
    const MemoryRow& largest = *std::max_element(rows.begin(), rows.end(), smaller);
    fail_machine("out of memory: %s need %.1f MiB, all together %.1f MiB more than there is; %s",
                 largest.group.c_str(), double(largest.bytes) / 1048576,
                 double(needed - free) / 1048576, what_would_fit(config, shape, free).c_str());
}

GPT2* gpt2_create(const GPT2Config& config, const GPT2Shape& shape, int) {
    validate(config);
    check_range("--threads", shape.threads, 1, 4096);
    check_range("--batch-size", shape.B, 1, 1 << 24);
    check_range("--sequence-length", shape.T, 1, config.context);
    check_range("tokens in a batch", double(shape.B) * shape.T, 1, INT32_MAX);
    assert(shape.dtype == Dtype::fp32 && shape.recompute >= 0 && shape.recompute <= 3);
    check_memory(config, shape);
    omp_set_num_threads(shape.threads);
    auto model = std::make_unique<GPT2>();
    model->config = config;
    model->shape = shape;
    model->parameter_rows = parameter_table(config);
    model->activation_rows = activation_table(config, shape);
    model->parameters = allocated_parameters(config);
    constexpr const char* kGroups[] = {"parameters", "gradients", "first moments",
                                       "second moments"};
    for (size_t group = 0; group < (shape.training ? 4u : 1u); group++)
        model->groups[group] = allocate(model->parameters, kGroups[group]);
    if (shape.snapshot)
        model->snapshot =
            allocate(snapshot_bytes(model->parameters) / sizeof(real), "the snapshot");
    size_t numbers = 0, offset = 0;
    for (const ActivationRow& row : model->activation_rows) numbers += row.allocated();
    model->activation_memory = allocate(numbers, "activations");
#define X(name, ...)                                                           \
    if (model->parameter_rows[k_##name].present) {                             \
        model->layer0[0].name = model->groups[0] + offset;                     \
        if (shape.training) model->layer0[1].name = model->groups[1] + offset; \
        offset += model->parameter_rows[k_##name].allocated();                 \
    }
    GPT2_PARAMETER_TABLE(X)
#undef X
    offset = 0;
#define X(name, ...)                                             \
    model->activations.name = model->activation_memory + offset; \
    offset += model->activation_rows[a_##name].allocated();
    GPT2_ACTIVATION_TABLE(X)
#undef X
    return model.release();
}

void gpt2_destroy(GPT2* model) { delete model; }
const GPT2Config& gpt2_config(const GPT2* model) { return model->config; }
const GPT2Shape& gpt2_shape(const GPT2* model) { return model->shape; }

// Where one row of the table, of one layer, begins in its group.
static size_t tensor_offset(const GPT2* model, int row, int layer) {
    size_t offset = size_t(layer) * model->parameter_rows[size_t(row)].size();
    for (int i = 0; i < row; i++) offset += model->parameter_rows[size_t(i)].allocated();
    return offset;
}

void gpt2_copy_out(const GPT2* model, Group group, int row, int layer, real* host) {
    const real* memory = model->groups[size_t(group)] + tensor_offset(model, row, layer);
    std::copy(memory, memory + model->parameter_rows[size_t(row)].file_size(), host);
}

void gpt2_copy_in(GPT2* model, Group group, int row, int layer, const real* host) {
    gpt2_snapshot_wait(model);
    std::copy(host, host + model->parameter_rows[size_t(row)].file_size(),
              model->groups[size_t(group)] + tensor_offset(model, row, layer));
}

void gpt2_activation_out(const GPT2* model, int row, int layer, real* host) {
    size_t offset = 0;
    for (int i = 0; i < row; i++) offset += model->activation_rows[size_t(i)].allocated();
    size_t N = model->activation_rows[size_t(row)].size;
    const real* memory = model->activation_memory + offset + size_t(layer) * N;
    std::copy(memory, memory + N, host);
}

// One thread copies: it takes less time than the passes beside it, which have the others.
void gpt2_snapshot_begin(GPT2* model) {
    assert(model->shape.snapshot);
    gpt2_snapshot_wait(model);
    model->snapshot_copy = std::thread([model] {
        real* to = model->snapshot;
        for (Group group : kSnapshotGroups) {
            const real* from = model->groups[size_t(group)];
            to = std::copy(from, from + model->parameters, to);
        }
    });
}

void gpt2_snapshot_wait(GPT2* model) {
    if (model->snapshot_copy.joinable()) model->snapshot_copy.join();
}

const real* gpt2_snapshot_tensor(const GPT2* model, Group group, int row, int layer) {
    return model->snapshot + snapshot_offset(group, model->parameters) +
           tensor_offset(model, row, layer);
}

// ==== ranks ======================================================================================

// Threads share the work of one machine, and a process of a job could add nothing to them.
std::string gpt2_alone() {
    return "the CPU program trains in one process, with --threads; several ranks are for "
           "train_gpt2cu";
}
void gpt2_select_device(int) {}
std::string gpt2_job_id() { fail_input("%s", gpt2_alone().c_str()); }
void gpt2_join(GPT2*, const std::string&) { fail_input("%s", gpt2_alone().c_str()); }
void gpt2_share(GPT2*) {}

// ==== gpt2_forward ===============================================================================

// The second half of block l up to its last product, from the residual stream between the halves:
// residual2 = inp + dropout(branch);  fch_gelu = gelu(fc(ln2(residual2))).
static void mlp_forward(const GPT2* model, const real* inp, int l, int B, int T) {
    ParameterTensors p = model->layer(Group::parameters, l);
    ActivationTensors a = model->layer(l);
    int C = model->config.channels, F = model->config.hidden_size();
    residual_layernorm_forward(a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, inp, a.branch, p.ln2w,
                               p.ln2b, model->config.layer_norm_epsilon,
                               model->dropout(RandomUse::attention_projection, l), B, T, C);
    matmul_gelu_forward(a.fch_gelu, a.fch, a.ln2, p.fcw, p.fcb, B * T, C, F);
}

// Block l up to its last product, whose input ln1 is there: branch = attproj(attention(ln1)), then
// the MLP. inp (B,T,C) is the residual stream.
static void block_forward(const GPT2* model, const real* inp, int l, int B, int T) {
    ParameterTensors p = model->layer(Group::parameters, l);
    ActivationTensors a = model->layer(l);
    int C = model->config.channels, NH = model->config.heads, BT = B * T;
    matmul_forward(a.qkv, a.ln1, p.qkvw, p.qkvb, BT, C, 3 * C);
    attention_forward(a.atty, a.logsumexp, a.qkv, a.att_scratch,
                      model->dropout(RandomUse::attention, l), B, T, C, NH);
    matmul_forward(a.branch, a.atty, p.attprojw, p.attprojb, BT, C, C);
    mlp_forward(model, inp, l, B, T);
}

// The end of block l: residual3 = residual2 + dropout(fcproj(fch_gelu)), and the layer norm that
// follows it.
static void block_end_forward(const GPT2* model, int l, int B, int T) {
    ParameterTensors p = model->layer(Group::parameters, l);
    ActivationTensors a = model->layer(l);
    GPT2::Norm next = model->norm_before(l + 1);
    int C = model->config.channels, F = model->config.hidden_size();
    matmul_forward(a.branch, a.fch_gelu, p.fcprojw, p.fcprojb, B * T, F, C);
    residual_layernorm_forward(a.residual3, next.out, next.mean, next.rstd, a.residual2, a.branch,
                               next.weight, next.bias, model->config.layer_norm_epsilon,
                               model->dropout(RandomUse::mlp_projection, l), B, T, C);
}

// The classifier over kClassifierRows rows of logits at a time, so that (B,T,Vp) is never whole.
// Training also takes its gradient: dnorm, that of lnf, is written; that of the classifier's weight
// accumulates.
static void head_forward(GPT2* model, const int* targets, const GPT2Pass& pass) {
    const GPT2Config& config = model->config;
    ParameterTensors p = model->layer(Group::parameters, 0), d = model->layer(Group::gradients, 0);
    ActivationTensors a = model->activations;
    int C = config.channels, V = config.vocab_size, Vp = config.padded_vocab(),
        BT = model->B * model->T;
    const real* weight = config.tied ? p.wte : p.headw;
    real* dweight = config.tied ? d.wte : d.headw;
    for (int first = 0; first < BT; first += kClassifierRows) {
        int rows = std::min(kClassifierRows, BT - first);
        const real* lnf = a.lnf + size_t(first) * C;
        matmul_forward(a.logits, lnf, weight, nullptr, rows, C, Vp);
        if (pass.logits != nullptr)
            for (int bt = 0; bt < rows; bt++)
                std::copy(a.logits + size_t(bt) * Vp, a.logits + size_t(bt) * Vp + V,
                          pass.logits + size_t(first + bt) * V);
        if (targets == nullptr) continue;
        classifier_forward(a.losses + first, a.logits, targets + first, pass.loss_scale,
                           pass.training, rows, V, Vp);
        if (pass.training)
            matmul_backward(a.dnorm + size_t(first) * C, dweight, nullptr, a.logits, lnf, weight,
                            nullptr, rows, C, Vp);
    }
    if (targets == nullptr) return;
    double sum = 0;
    for (int bt = 0; bt < BT; bt++) sum += double(a.losses[bt]);
    model->loss += sum * pass.loss_scale;
}

void gpt2_forward(GPT2* model, const int* inputs, const int* targets, int B, int T,
                  const GPT2Pass& pass) {
    assert(B >= 1 && B <= model->shape.B && T >= 1 && T <= model->shape.T);
    assert(!pass.training || (model->shape.training && targets != nullptr));
    const GPT2Config& config = model->config;
    ParameterTensors p = model->layer(Group::parameters, 0);
    ActivationTensors a = model->activations;
    int C = config.channels;
    model->B = B, model->T = T, model->inputs = inputs, model->pass = pass;
    encoder_forward(a.encoded, inputs, p.wte, p.wpe, B, T, C);
    Dropout dropout = model->dropout(RandomUse::encoder, 0);
    if (dropout.probability > 0) dropout_forward(a.encoded, a.encoded, dropout, B, T, C);
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.encoded, p.ln1w, p.ln1b,
                      config.layer_norm_epsilon, B, T, C);
    for (int l = 0; l < config.layers; l++) {
        block_forward(model, model->block_input(l), l, B, T);
        block_end_forward(model, l, B, T);
    }
    head_forward(model, targets, pass);
}

// Block l, as block_forward does it, over the new tokens alone, with keys and values of the earlier
// ones from the cache.
static void block_generate(const GPT2* model, const real* inp, int l, int B, int n, int position) {
    ParameterTensors p = model->layer(Group::parameters, l);
    ActivationTensors a = model->layer(l);
    const GPT2Config& config = model->config;
    int C = config.channels;
    matmul_forward(a.qkv, a.ln1, p.qkvw, p.qkvb, B * n, C, 3 * C);
    attention_cached_forward(a.atty, a.key_cache, a.value_cache, a.qkv, a.att_scratch, B, n,
                             position, config.context, C, config.heads);
    matmul_forward(a.branch, a.atty, p.attprojw, p.attprojb, B * n, C, C);
    mlp_forward(model, inp, l, B, n);
}

void gpt2_generate(GPT2* model, const int* tokens, int B, int n, int position, real* logits) {
    const GPT2Config& config = model->config;
    assert(B >= 1 && B <= model->shape.generate && B <= model->shape.B * model->shape.T);
    assert(n >= 1 && position >= 0 && position + n <= config.context);
    ParameterTensors p = model->layer(Group::parameters, 0);
    ActivationTensors a = model->activations;
    int C = config.channels, V = config.vocab_size, Vp = config.padded_vocab();
    model->pass = GPT2Pass{};
    int most =
        std::min(n, model->shape.B * model->shape.T / B);  // new tokens that the activations hold
    std::vector<int> inputs;
    for (int done = 0; done < n; done += most) {
        int now = std::min(most, n - done);
        inputs.clear();
        for (int b = 0; b < B; b++)
            inputs.insert(inputs.end(), tokens + size_t(b) * n + done,
                          tokens + size_t(b) * n + done + now);
        encoder_forward(a.encoded, inputs.data(), p.wte, p.wpe + size_t(position + done) * C, B,
                        now, C);
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.encoded, p.ln1w, p.ln1b,
                          config.layer_norm_epsilon, B, now, C);
        for (int l = 0; l < config.layers; l++) {
            block_generate(model, model->block_input(l), l, B, now, position + done);
            block_end_forward(model, l, B, now);
        }
        if (done + now < n) continue;
        for (int b = 0; b < B; b++) {
            const real* last = a.lnf + (size_t(b) * now + now - 1) * C;
            std::copy(last, last + C, a.branch + size_t(b) * C);
        }
    }
    for (int first = 0; first < B; first += kClassifierRows) {
        int rows = std::min(kClassifierRows, B - first);
        matmul_forward(a.logits, a.branch + size_t(first) * C, config.tied ? p.wte : p.headw,
                       nullptr, rows, C, Vp);
        for (int b = 0; b < rows; b++)
            std::copy(a.logits + size_t(b) * Vp, a.logits + size_t(b) * Vp + V,
                      logits + size_t(first + b) * V);
    }
}

// ==== gpt2_backward ==============================================================================

// The gradient that enters a branch behind its dropout: dresidual itself where nothing is dropped.
static const real* branch_gradient(const GPT2* model, const ActivationTensors& a, RandomUse use,
                                   int l) {
    Dropout dropout = model->dropout(use, l);
    if (dropout.probability == 0) return a.dresidual;
    dropout_forward(a.dbranch, a.dresidual, dropout, model->B, model->T, model->config.channels);
    return a.dbranch;
}

// Computes again what forward did not keep of block l, with the functions that forward used: [Chen
// et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174]. inp is the
// residual stream before the block, which is always kept.
static void block_recompute(const GPT2* model, const real* inp, int l) {
    ParameterTensors p = model->layer(Group::parameters, l);
    ActivationTensors a = model->layer(l);
    const GPT2Config& config = model->config;
    int level = model->shape.recompute, B = model->B, T = model->T, C = config.channels;
    if (level >= 2)
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, inp, p.ln1w, p.ln1b,
                          config.layer_norm_epsilon, B, T, C);
    if (level >= 3) return block_forward(model, inp, l, B, T);
    if (level >= 2)
        layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b,
                          config.layer_norm_epsilon, B, T, C);
    if (level >= 1) gelu_forward(a.fch_gelu, a.fch, size_t(B) * T * config.hidden_size());
}

// forward: inp -> residual2 = inp + attproj(...) -> residual3 = residual2 + fcproj(...)
// a.dresidual is the gradient of residual3 on entry and of inp on exit.
static void block_backward(const GPT2* model, const real* inp, int l) {
    ParameterTensors p = model->layer(Group::parameters, l), d = model->layer(Group::gradients, l);
    ActivationTensors a = model->layer(l);
    int B = model->B, T = model->T, BT = B * T;
    int C = model->config.channels, F = model->config.hidden_size(), NH = model->config.heads;

    const real* dbranch = branch_gradient(model, a, RandomUse::mlp_projection, l);
    gelu_matmul_backward(a.dfch, d.fcprojw, d.fcprojb, dbranch, a.fch_gelu, a.fch, p.fcprojw,
                         a.reduce_scratch, BT, F, C);
    matmul_backward(a.dnorm, d.fcw, d.fcb, a.dfch, a.ln2, p.fcw, a.reduce_scratch, BT, C, F);
    layernorm_backward(a.dresidual, d.ln2w, d.ln2b, a.dnorm, a.residual2, p.ln2w, a.ln2_mean,
                       a.ln2_rstd, a.reduce_scratch, B, T, C);

    dbranch = branch_gradient(model, a, RandomUse::attention_projection, l);
    matmul_backward(a.datty, d.attprojw, d.attprojb, dbranch, a.atty, p.attprojw, a.reduce_scratch,
                    BT, C, C);
    attention_backward(a.dqkv, a.datty, a.qkv, a.atty, a.logsumexp, a.att_scratch,
                       model->dropout(RandomUse::attention, l), B, T, C, NH);
    matmul_backward(a.dnorm, d.qkvw, d.qkvb, a.dqkv, a.ln1, p.qkvw, a.reduce_scratch, BT, C, 3 * C);
    layernorm_backward(a.dresidual, d.ln1w, d.ln1b, a.dnorm, inp, p.ln1w, a.ln1_mean, a.ln1_rstd,
                       a.reduce_scratch, B, T, C);
}

void gpt2_backward(GPT2* model) {
    assert(model->pass.training);
    const GPT2Config& config = model->config;
    ParameterTensors p = model->layer(Group::parameters, 0), d = model->layer(Group::gradients, 0);
    ActivationTensors a = model->activations;
    int B = model->B, T = model->T, C = config.channels, L = config.layers;
    std::fill(a.dresidual, a.dresidual + size_t(B) * T * C, real(0));
    layernorm_backward(a.dresidual, d.lnfw, d.lnfb, a.dnorm, model->layer(L - 1).residual3, p.lnfw,
                       a.lnf_mean, a.lnf_rstd, a.reduce_scratch, B, T, C);
    for (int l = L - 1; l >= 0; l--) {
        block_recompute(model, model->block_input(l), l);
        block_backward(model, model->block_input(l), l);
    }
    encoder_backward(d.wte, d.wpe, branch_gradient(model, a, RandomUse::encoder, 0), model->inputs,
                     B, T, C);
}

// ==== gpt2_update ================================================================================

void gpt2_zero_gradients(GPT2* model) {
    model->loss = 0;
    if (!model->shape.training) return;
    real* gradients = model->groups[size_t(Group::gradients)];
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < model->parameters; i++) gradients[i] = 0;
}

void gpt2_update(GPT2* model, const AdamW& adamw) {
    auto [params, grads, m, v] = model->groups;
    double grad_norm = global_norm(grads, model->parameters);
    gpt2_snapshot_wait(model);  // what it copies is about to change
    bool finite = std::isfinite(grad_norm) && std::isfinite(model->loss);
    double grad_scale =
        adamw.grad_clip > 0 ? std::min(1.0, adamw.grad_clip / (grad_norm + 1e-6)) : 1;
    size_t offset = 0;
    for (const ParameterRow& row : model->parameter_rows) {
        size_t N = row.size() * row.count;
        if (finite)
            adamw_update(params + offset, m + offset, v + offset, grads + offset, N, adamw,
                         row.decays ? adamw.weight_decay : 0, grad_scale);
        offset += row.allocated();
    }
    model->before_last = model->last;
    model->last = {model->loss, grad_norm, now_s()};
}

GPT2Stats gpt2_stats(GPT2* model) {
    return {model->loss, model->last.grad_norm, model->last.finished_s};
}

GPT2Stats gpt2_previous_stats(GPT2* model) { return model->before_last; }

// ==== device =====================================================================================

const char* gpt2_program() { return "train_gpt2"; }

Dtype gpt2_dtype(const std::string& option) {
    if (option == "bf16")
        fail_input("--dtype bf16: this program computes in float32; give --dtype fp32 or auto");
    return Dtype::fp32;
}

std::string gpt2_device() {
    std::string name = "CPU", line;
    std::ifstream file("/proc/cpuinfo");
    while (std::getline(file, line)) {
        if (line.rfind("model name", 0) != 0) continue;
        name = line.substr(line.find(':') + 2);
        break;
    }
#ifdef GPT2_ONEDNN
    const dnnl_version_t* version = dnnl_version();
    return name + format(", %d threads, oneDNN %d.%d.%d", omp_get_max_threads(), version->major,
                         version->minor, version->patch);
#else
    return name + format(", %d threads, no oneDNN", omp_get_max_threads());
#endif
}

// The best of a few products of square matrices on the shape's threads, about 50 ms in all: of 768
// rows, unless one of those would take as long.
PeakRate gpt2_peak(const GPT2Shape& shape) {
    constexpr int kSizes[] = {128, 768}, kTries = 6;
    constexpr double kLimit_s = 0.05;
    omp_set_num_threads(shape.threads);
    double best = 0;
    for (int N : kSizes) {
        double operations = 2.0 * N * N * N;
        if (best > 0 && operations / best > kLimit_s) break;
        std::vector<real> a(size_t(N) * size_t(N), 1), b = a, c = a;
        for (int i = 0; i < kTries; i++) {
            auto start = std::chrono::steady_clock::now();
            gemm(false, true, N, N, N, a.data(), N, b.data(), N, 0, c.data(), N);
            std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            best = std::max(best, operations / seconds.count());
        }
    }
    return {best, "measured"};
}

// ==== main =======================================================================================

#ifndef GPT2_MODEL_ONLY
// Weak: the tests, which are linked with this file, have a main of their own.
__attribute__((weak)) int main(int argc, char** argv) { return run(argc, argv); }
#endif
