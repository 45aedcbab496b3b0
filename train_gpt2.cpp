// GPT-2 on the CPU: every layer's forward and backward pass by hand, over memory laid out by hand.
// This is the reference twin of train_gpt2.cu: the same sections in the same order, and the same
// mathematics.
//
// Read it from top to bottom: layers first, each forward followed by its backward, then memory,
// then the model. All loops are parallel over independent outputs, or sum in an order fixed by
// sizes, so that a run with the same number of threads gives the same bits.
//
// Layers are templates of the type, Float, of activations and of the parameters that products read:
// `real`, or bf16. Whatever that is they compute in `real`, which is also the type of statistics,
// losses and everything that an update reads and writes.

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __x86_64__
#    include <immintrin.h>
#    include <sys/syscall.h>
#    ifdef GPT2_EMULATED_AMX  // for the tests, on processors without
#        include "dev/emu/amx.h"
#    endif
#endif

#include <atomic>
#include <bit>
#include <cassert>
#include <cstring>
#include <fstream>
#include <map>
#include <thread>
#include <tuple>
#include <unordered_map>

#include "gpt2.h"
#include "trainer.h"
#ifndef GPT2_MODEL_ONLY  // what is tested in double, and what kernels are held against
#    include "commands.h"
#endif
#ifdef GPT2_ONEDNN
#    include <oneapi/dnnl/dnnl.hpp>
#endif

// ==== constants ==================================================================================

constexpr double kGeluScale = 0.7978845608028654;  // sqrt(2 / pi)
constexpr double kGeluCube = 0.044715;

constexpr int kClassifierRows = 256;  // rows of logits that exist at a time
constexpr int kAttentionRows = 64;    // queries whose scores exist at a time
constexpr int kReduceRows = 32;       // partial sums of a bias or layer norm gradient

constexpr int kInt8Most = 127;                 // the largest weight in int8
constexpr size_t kExpanded = size_t(1) << 20;  // numbers of such weights expanded at a time

// A float32 cut to its upper half: the range of float32, with 8 significant bits. Numbers of this
// type are stored; what computes with them computes in `real`.
struct bf16 {
    uint16_t bits;

    bf16() = default;
    bf16(float x) : bits(rounded(x)) {}
    // (Compilers vectorise no loop that would store a whole bf16 made from a float.)
    bf16& operator=(float x) {
        bits = rounded(x);
        return *this;
    }
    operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }

    // To the nearest, ties to even; NaN stays NaN.
    static uint16_t rounded(float x) {
        uint32_t word = std::bit_cast<uint32_t>(x);
        uint32_t nearest = (word + 0x7FFFu + (word >> 16 & 1)) >> 16;
        return uint16_t((word & 0x7FFFFFFFu) > 0x7F800000u ? word >> 16 | 0x40u : nearest);
    }
};

// The distance between two queries' scores of `keys` keys: an odd number of cache lines, so that
// those of one key are spread over a cache, and do not share a few places in it.
static size_t attention_row(size_t keys) {
    constexpr size_t kLine = 64 / sizeof(real);
    return ((keys + kLine - 1) / kLine | 1) * kLine;
}

// Numbers that attention works in on one thread, for `keys` keys of heads of HS: what
// AttentionScratch names.
static size_t attention_numbers(size_t keys, size_t HS, Dtype dtype) {
    size_t scores = kAttentionRows * attention_row(keys);
    return (dtype == Dtype::bf16 ? 3 : 2) * scores + aligned(2 * keys * HS);
}

// The table of a model as it is in memory: weights in int8 are nowhere else, unless they are looked
// up in too.
static ParameterTable held_parameters(const GPT2Config& config, const GPT2Shape& shape) {
    ParameterTable table = parameter_table(config);
    for (int row = 0; row < kParameterRows; row++)
        if (shape.int8 && is_product_weight(config, row) && row != k_wte)
            table[size_t(row)].present = false;
    return table;
}

// Where the weights in int8 of one row of the table, of one layer, begin, and their scales: numbers
// of either. Of the row behind the last: how many there are.
struct Int8Place {
    size_t weights = 0, scales = 0;
};
static Int8Place int8_place(const GPT2Config& config, int row, int layer) {
    ParameterTable table = parameter_table(config);
    Int8Place place;
    for (int i = 0; i <= row && i < kParameterRows; i++) {
        const ParameterRow& tensor = table[size_t(i)];
        if (!is_product_weight(config, i)) continue;
        place.weights += i < row ? tensor.allocated() : size_t(layer) * tensor.size();
        place.scales += i < row ? aligned(tensor.rows * tensor.count) : size_t(layer) * tensor.rows;
    }
    return place;
}

// Each thread has its own scores; a model that generates sees up to `context` keys.
TwinSizes gpt2_sizes(const GPT2Config& config, const GPT2Shape& shape) {
    size_t keys = size_t(shape.generate > 0 ? config.context : shape.T);
    size_t numbers = 0;
    for (const ParameterRow& row : held_parameters(config, shape)) numbers += row.allocated();
    size_t attention = attention_numbers(keys, size_t(config.head_size()), shape.dtype);
    TwinSizes sizes = {size_t(kClassifierRows),
                       size_t(shape.threads) * attention,
                       size_t(kReduceRows),
                       numbers,
                       numbers,
                       numbers,
                       numbers,
                       true};
    if (!shape.int8) return sizes;
    Int8Place all = int8_place(config, kParameterRows, 0);
    sizes.int8_bytes = all.weights + sizeof(real) * all.scales;
    sizes.expanded = kExpanded;
    return sizes;
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
    float power =
        std::bit_cast<float>(std::bit_cast<uint32_t>(e) + (std::bit_cast<uint32_t>(shifted) << 23));
    return x == x ? power : x;  // of a NaN, the low bits too went into the exponent
}

// Of the residual stream products read nothing: in bf16 it stays in float32, so that what blocks
// add to it is not rounded on its way through all of them.
template <class Float>
using Activations = ActivationPointers<Float, real, real>;

// As many numbers as a register of the processor holds.
#if defined(__AVX512F__)
constexpr int kLanes = 64 / sizeof(real);
#elif defined(__AVX__)
constexpr int kLanes = 32 / sizeof(real);
#else
constexpr int kLanes = 16 / sizeof(real);
#endif
typedef real Vector __attribute__((vector_size(kLanes * sizeof(real))));

template <class To, class Number>
static inline To load_lanes(const Number* from) {
    To lanes;
    memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

// kLanes numbers of any type in which weights and activations are stored.
static inline Vector load_vector(const real* from) { return load_lanes<Vector>(from); }
[[maybe_unused]] static inline Vector load_vector(const bf16* from) {
    typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
    typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
    typedef float Floats __attribute__((vector_size(kLanes * 4)));
    Words words = __builtin_convertvector(load_lanes<Halves>(from), Words) << 16;
    return __builtin_convertvector(load_lanes<Floats>(&words), Vector);
}
// (g++ converts vectors of bytes one by one, and takes the AVX-512 instruction that keeps what was
// in its register for a read of what was never written: GCC bugs of version 12.)
static inline Vector load_vector(const int8_t* from) {
    typedef int32_t Words __attribute__((vector_size(kLanes * 4)));
    Words words;
#if defined(__AVX2__)
    __m128i bytes = {};
    memcpy(&bytes, from, kLanes);
#endif
#if defined(__AVX512F__)
    __m512i wide = _mm512_maskz_cvtepi8_epi32(0xFFFF, bytes);
    memcpy(&words, &wide, sizeof(words));
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtepi8_epi32(bytes);
    memcpy(&words, &wide, sizeof(words));
#else
    for (int i = 0; i < kLanes; i++) words[i] = from[i];
#endif
    return __builtin_convertvector(words, Vector);
}

// ==== encoder ====================================================================================

// out = wte[token] + wpe[t]  [Radford et al. 2019, section 2.3]
//
// out (B,T,C) is written; inputs (B,T) are ids below the rows of wte; wte (Vp,C), wpe (at least
// T,C)
template <class Stream, class Float>
void encoder_forward(Stream* out, const int* inputs, const Float* wte, const Float* wpe, int B,
                     int T, int C) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            size_t bt = size_t(b) * T + t;
            const Float* token = wte + size_t(inputs[bt]) * C;
            const Float* position = wpe + size_t(t) * C;
            Stream* out_bt = out + bt * C;
#pragma omp simd
            for (int c = 0; c < C; c++) out_bt[c] = real(token[c]) + real(position[c]);
        }
    }
}

// forward: out = wte[token] + wpe[t], so dwte[token] += dout and dwpe[t] += dout
// dwte (Vp,C) and dwpe (T,C) accumulate. A token may stand at many places: each thread owns the
// rows of wte whose id is its number modulo the threads, and adds to them in the order of places.
template <class Float>
void encoder_backward(real* dwte, real* dwpe, const Float* dout, const int* inputs, int B, int T,
                      int C) {
#pragma omp parallel
    {
        int threads = omp_get_num_threads(), thread = omp_get_thread_num();
        for (size_t bt = 0; bt < size_t(B) * T; bt++) {
            if (inputs[bt] % threads != thread) continue;
            real* dtoken = dwte + size_t(inputs[bt]) * C;
            const Float* dout_bt = dout + bt * C;
#pragma omp simd
            for (int c = 0; c < C; c++) dtoken[c] += real(dout_bt[c]);
        }
#pragma omp for schedule(static)
        for (int t = 0; t < T; t++) {
            real* dposition = dwpe + size_t(t) * C;
            for (int b = 0; b < B; b++) {
                const Float* dout_bt = dout + (size_t(b) * T + t) * C;
#pragma omp simd
                for (int c = 0; c < C; c++) dposition[c] += real(dout_bt[c]);
            }
        }
    }
}

// ==== layer norm =================================================================================

// One row of layer norm: y (C) from x (C), and its mean and rstd. Everything that normalises calls
// this one, never inlined, so that what is computed a second time has the same bits.
template <class Stream, class Float>
__attribute__((noinline)) static void layernorm_row(Float* y, real* mean, real* rstd,
                                                    const Stream* x, const Float* weight,
                                                    const Float* bias, double epsilon, int C) {
    real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < C; c++) sum += real(x[c]);
    real m = sum / C;
#pragma omp simd reduction(+ : squares)
    for (int c = 0; c < C; c++) squares += (real(x[c]) - m) * (real(x[c]) - m);
    real r = 1 / std::sqrt(squares / C + real(epsilon));
    if (bias != nullptr) {
#pragma omp simd
        for (int c = 0; c < C; c++) y[c] = (real(x[c]) - m) * r * real(weight[c]) + real(bias[c]);
    } else {
#pragma omp simd
        for (int c = 0; c < C; c++) y[c] = (real(x[c]) - m) * r * real(weight[c]);
    }
    *mean = m;
    *rstd = r;
}

// y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(variance + epsilon)
// [Ba et al. 2016, arXiv:1607.06450]
//
// out (B,T,C) and mean, rstd (B,T) are written; mean and rstd are kept for backward. inp (B,T,C),
// weight (C), bias (C) or null. The variance is taken in a second pass, about the mean.
template <class Stream, class Float>
void layernorm_forward(Float* out, real* mean, real* rstd, const Stream* inp, const Float* weight,
                       const Float* bias, double epsilon, int B, int T, int C) {
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
// dbias += dy;  dweight += dy * n;  with g = dy * weight:
// dx += rstd * (g - mean(g) - n * mean(g * n))
//
// dinp (B,T,C), dweight (C) and dbias (C) or null accumulate. scratch (2 * kReduceRows, C): the
// weight's and the bias's gradients are first summed over kReduceRows runs of rows, then over
// those.
template <class Stream, class Float>
void layernorm_backward(Stream* dinp, real* dweight, real* dbias, const Float* dout,
                        const Stream* inp, const Float* weight, const real* mean, const real* rstd,
                        real* scratch, int B, int T, int C) {
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
            const Stream* x = inp + bt * C;
            const Float* dy = dout + bt * C;
            Stream* dx = dinp + bt * C;
            real m = mean[bt], r = rstd[bt], sum = 0, sum_n = 0;
#pragma omp simd reduction(+ : sum, sum_n)
            for (int c = 0; c < C; c++) {
                real n = (real(x[c]) - m) * r, g = real(dy[c]) * real(weight[c]);
                sum += g;
                sum_n += g * n;
                dw[c] += real(dy[c]) * n;
                db[c] += real(dy[c]);
            }
            real mean_g = sum / C, mean_gn = sum_n / C;
#pragma omp simd
            for (int c = 0; c < C; c++) {
                real n = (real(x[c]) - m) * r;
                real g = real(dy[c]) * real(weight[c]);
                dx[c] = real(dx[c]) + r * (g - mean_g - n * mean_gn);
            }
        }
    }
    add_partial_sums(dweight, dweights, C);
    if (dbias != nullptr) add_partial_sums(dbias, dbiases, C);
}

// ==== matmul =====================================================================================

// A product: C (M,N) = A' B' + bias + beta C, where ' transposes when asked; bias (N) or null, and
// beta is 0 or 1. A' is (M,K), B' is (K,N), row-major; lda, ldb, ldc are the distances between
// stored rows. Where B is in int8, its rows have scales (N), and trans_b is true.
template <class In, class Out, class Weight = In>
struct Product {
    bool trans_a, trans_b;
    int M, N, K;
    const In* A;
    int lda;
    const Weight* B;
    int ldb;
    const In* bias;
    real beta;
    Out* C;
    int ldc;
    const real* scales = nullptr;
};

// Loop nests over a row of C, in pieces that stay in cache; they need no library, and sum in `real`
// whatever the types.
template <class In, class Out>
static void product_plain(const Product<In, Out>& p) {
    constexpr int kPiece = 256;
#pragma omp parallel for schedule(static)
    for (int m = 0; m < p.M; m++) {
        auto a = [&](int k) {
            return real(p.trans_a ? p.A[size_t(k) * p.lda + m] : p.A[size_t(m) * p.lda + k]);
        };
        for (int first = 0; first < p.N; first += kPiece) {
            Out* c = p.C + size_t(m) * p.ldc + first;
            int n_piece = std::min(kPiece, p.N - first);
            real sums[kPiece];
            for (int n = 0; n < n_piece; n++) {
                sums[n] = p.beta == 0 ? real(0) : p.beta * real(c[n]);
                if (p.bias != nullptr) sums[n] += real(p.bias[first + n]);
            }
            if (p.trans_b) {
                for (int n = 0; n < n_piece; n++) {
                    const In* b = p.B + size_t(first + n) * p.ldb;
                    real sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int k = 0; k < p.K; k++) sum += real(b[k]) * a(k);
                    sums[n] += sum;
                }
            } else {
                for (int k = 0; k < p.K; k++) {
                    const In* b = p.B + size_t(k) * p.ldb + first;
                    real factor = a(k);
#pragma omp simd
                    for (int n = 0; n < n_piece; n++) sums[n] += factor * real(b[n]);
                }
            }
            for (int n = 0; n < n_piece; n++) c[n] = sums[n];
        }
    }
}

#ifdef GPT2_ONEDNN

[[noreturn]] static void fail_product(int M, int N, int K, int status) {
    if (status == dnnl_out_of_memory) throw std::bad_alloc();
    fail_machine("oneDNN: product of (%d,%d) and (%d,%d): status %d", M, K, K, N, status);
}

// Products as oneDNN's primitives: each is made once for its shape and types, and called with other
// memory from then on. Making one generates and compiles code, some milliseconds of it. Scratch
// memory is the library's, one buffer that all primitives of a thread share.
class ProductPlans {
  public:
    // False where the library has no such product for this processor.
    template <class In, class Out>
    bool operator()(const Product<In, Out>& p) {
        Key key = {p.trans_a, p.trans_b,         p.M,    p.N,   p.K,        p.lda,
                   p.ldb,     p.bias != nullptr, p.beta, p.ldc, sizeof(In), sizeof(Out)};
        auto place = plans_.find(key);
        try {
            if (place == plans_.end() && plans_.size() >= kMostPlans) plans_.clear();
            if (place == plans_.end()) place = plans_.emplace(key, make(p)).first;
            Plan& plan = place->second;
            if (!plan.primitive) return false;
            plan.arguments.at(DNNL_ARG_SRC).set_data_handle(const_cast<In*>(p.A));
            plan.arguments.at(DNNL_ARG_WEIGHTS).set_data_handle(const_cast<In*>(p.B));
            plan.arguments.at(DNNL_ARG_DST).set_data_handle(p.C);
            if (p.bias != nullptr)
                plan.arguments.at(DNNL_ARG_BIAS).set_data_handle(const_cast<In*>(p.bias));
            plan.primitive.execute(stream_, plan.arguments);
            stream_.wait();
            return true;
        } catch (const dnnl::error& error) {
            if (error.status != dnnl_unimplemented) fail_product(p.M, p.N, p.K, int(error.status));
            plans_[key] = Plan();
            return false;
        }
    }

  private:
    static constexpr size_t kMostPlans = 256;  // training has about 30; prompts are of any length
    using Key = std::tuple<bool, bool, int, int, int, int, int, bool, real, int, size_t, size_t>;
    struct Plan {
        dnnl::matmul primitive;
        std::unordered_map<int, dnnl::memory> arguments;
    };

    template <class Number>
    static constexpr dnnl::memory::data_type type() {
        return sizeof(Number) == 2 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
    }
    template <class Number>
    static dnnl::memory::desc matrix(int rows, int columns, int ld, bool transposed) {
        dnnl::memory::dims strides = {ld, 1};
        if (transposed) std::swap(strides[0], strides[1]);
        return dnnl::memory::desc({rows, columns}, type<Number>(), strides);
    }

    template <class In, class Out>
    Plan make(const Product<In, Out>& p) {
        auto a = matrix<In>(p.M, p.K, p.lda, p.trans_a), b = matrix<In>(p.K, p.N, p.ldb, p.trans_b);
        auto c = matrix<Out>(p.M, p.N, p.ldc, false);
        auto bias = p.bias != nullptr ? matrix<In>(1, p.N, p.N, false) : dnnl::memory::desc();
        dnnl::primitive_attr attributes;
        if (p.beta != 0) {
            dnnl::post_ops sum;
            sum.append_sum(p.beta);
            attributes.set_post_ops(sum);
        }
#    if DNNL_VERSION_MAJOR >= 3
        dnnl::matmul::primitive_desc description(engine_, a, b, bias, c, attributes);
#    else
        dnnl::matmul::primitive_desc description({a, b, bias, c}, attributes, engine_);
#    endif
        Plan plan;
        plan.primitive = dnnl::matmul(description);
        auto argument = [&](int name, const dnnl::memory::desc& desc) {
            plan.arguments.emplace(name, dnnl::memory(desc, engine_, nullptr));
        };
        argument(DNNL_ARG_SRC, a), argument(DNNL_ARG_WEIGHTS, b), argument(DNNL_ARG_DST, c);
        if (p.bias != nullptr) argument(DNNL_ARG_BIAS, bias);
        return plan;
    }

    std::map<Key, Plan> plans_;
    dnnl::engine engine_ = dnnl::engine(dnnl::engine::kind::cpu, 0);
    dnnl::stream stream_ = dnnl::stream(engine_);
};

// The plans of the calling thread: each thread that runs a model has its own, so that they need no
// lock.
static ProductPlans& product_plans() {
    static thread_local ProductPlans plans;
    return plans;
}

#endif

// What a vector of sums takes from two rows at a time: kLanes numbers of each, as `real`; or pairs,
// both for the same sum, where the processor multiplies those in bf16. (A weight in int8 loses no
// digit in bf16.)
struct Numbers {
    static constexpr int kCount = kLanes;
    template <class Number>
    static Vector load(const Number* from) {
        return load_vector(from);
    }
    static void add_products(Vector& sums, Vector a, Vector b) { sums += a * b; }
};
#ifdef __AVX512BF16__
struct Pairs {
    static constexpr int kCount = 2 * kLanes;
    static __m512bh load(const bf16* from) { return load_lanes<__m512bh>(from); }
    static __m512bh load(const int8_t* from) {
        return _mm512_cvtne2ps_pbh(__m512(load_vector(from + kLanes)), __m512(load_vector(from)));
    }
    static void add_products(Vector& sums, __m512bh a, __m512bh b) {
        sums = Vector(_mm512_dpbf16_ps(__m512(sums), a, b));
    }
};
template <class In>
using Factors = std::conditional_t<std::is_same_v<In, bf16> && sizeof(real) == 4, Pairs, Numbers>;
#else
template <class In>
using Factors = Numbers;
#endif

// The sum of a vector's lanes: to each is added the one `Distance` away, for half of the lanes, a
// quarter of them, and so on.
template <int Distance, int... Lane>
static inline Vector exchange_lanes(Vector v, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(v, v, (Lane ^ Distance)...);
}
template <int Distance = kLanes / 2>
static inline real sum_of_lanes(Vector v) {
    if constexpr (Distance == 0) return v[0];
    else {
        v += exchange_lanes<Distance>(v, std::make_integer_sequence<int, kLanes>());
        return sum_of_lanes<Distance / 2>(v);
    }
}

// Rows of B that are read side by side: several give a processor more to do at a time than one
// whose numbers are added up in order, and are used while numbers of A are in registers, of which
// AVX-512 has twice as many. Where many rows of A share what is read, fewer do.
constexpr int kFewColumns = sizeof(Vector) == 64 ? 4 : 2;
constexpr int kManyRows = sizeof(Vector) == 64 ? 8 : 4, kManyRowsColumns = 2;
template <int N>
using Count = std::integral_constant<int, N>;

// sums[c * kFewRows + r] = a_r . b_c for `Rows` rows of a and `Columns` rows of b, of K numbers:
// lanes add up the same numbers in the same order whatever Rows and Columns are, and only vectors
// are added to: the rounding of a scalar sum depends on what a compiler makes of its loop. What is
// read next is asked for early, for processors foresee that a row goes on, and not that several do:
// 3 KiB for each row that is read side by side, or what is behind those rows, if they are longer;
// and into the second-level cache, because Zen 4 waits at half the speed for lines of the first.
template <int Rows, int Columns, class In, class Weight>
static inline void few_rows_block(real* sums, const In* a, int lda, const Weight* b, int ldb,
                                  int K) {
    using Some = Factors<In>;
    constexpr int kCacheLine = 64 / sizeof(Weight), kAhead = Columns * 3072 / sizeof(Weight);
    size_t ahead = Columns == 1 ? kAhead : std::max(size_t(kAhead), size_t(Columns) * ldb);
    Vector partial[Columns][Rows] = {};
    int k = 0;
    for (; k + Some::kCount <= K; k += Some::kCount) {
        decltype(Some::load(a)) a_k[Rows];
        for (int r = 0; r < Rows; r++) a_k[r] = Some::load(a + size_t(r) * lda + k);
        for (int c = 0; c < Columns; c++) {
            const Weight* b_k = b + size_t(c) * ldb + k;
            if (k % kCacheLine == 0) __builtin_prefetch(b_k + ahead, 0, 2);
            for (int r = 0; r < Rows; r++)
                Some::add_products(partial[c][r], a_k[r], Some::load(b_k));
        }
    }
    auto rest = [&]<class Number>(const Number* from) {
        Number numbers[Some::kCount] = {};
        std::copy_n(from + k, K - k, numbers);
        return Some::load(numbers);
    };
    for (int c = 0; k < K && c < Columns; c++) {
        auto b_k = rest(b + size_t(c) * ldb);
        for (int r = 0; r < Rows; r++)
            Some::add_products(partial[c][r], rest(a + size_t(r) * lda), b_k);
    }
    for (int c = 0; c < Columns; c++)
        for (int r = 0; r < Rows; r++) sums[c * kFewRows + r] = sum_of_lanes(partial[c][r]);
}

// All rows of C, `Columns` columns from n on.
template <int Columns, class In, class Bias, class Out, class Weight>
static inline void few_rows_columns(const Product<In, Out, Weight>& p, const Bias* bias, int n) {
    const Weight* b = p.B + size_t(n) * p.ldb;
    real sums[Columns * kFewRows];
    for (int m = 0; m < p.M;) {
        const In* a = p.A + size_t(m) * p.lda;
        auto block = [&](auto rows) {
            few_rows_block<rows(), Columns>(sums + m, a, p.lda, b, p.ldb, p.K);
            m += rows();
        };
        if (Columns <= kManyRowsColumns && m + kManyRows <= p.M) block(Count<kManyRows>());
        else if (m + 4 <= p.M) block(Count<4>());
        else block(Count<1>());
    }
    for (int c = 0; c < Columns; c++) {
        for (int m = 0; m < p.M; m++) {
            Out* out = p.C + size_t(m) * p.ldc + n + c;
            real sum = sums[c * kFewRows + m];
            if (p.scales != nullptr) sum *= p.scales[n + c];
            if (p.beta != 0) sum += p.beta * real(*out);
            if (bias != nullptr) sum += real(bias[n + c]);
            *out = sum;
        }
    }
}

// The same with B transposed and so few rows of A that reading B is all that takes time, as where a
// token is generated: each thread reads its rows of B once, from first to last. A row of C has the
// same bits whatever M is. bias is null or of numbers of any type. A row or two of A ask so little
// that weights which need no conversion come fastest a row of B at a time.
template <class In, class Bias, class Out, class Weight>
static void product_few_rows(const Product<In, Out, Weight>& p, const Bias* bias) {
    assert(p.M <= kFewRows && p.trans_b && !p.trans_a);
    auto side_by_side = [&](auto columns) {
#pragma omp parallel for schedule(static)
        for (int first = 0; first < p.N; first += columns()) {
            int last = std::min(first + columns(), p.N);
            if (last == first + columns()) few_rows_columns<columns()>(p, bias, first);
            else
                for (int n = first; n < last; n++) few_rows_columns<1>(p, bias, n);
        }
    };
    if (p.M < 4 && std::is_same_v<In, Weight>) side_by_side(Count<1>());
    else if (p.M < kManyRows) side_by_side(Count<kFewColumns>());
    else side_by_side(Count<kManyRowsColumns>());
}

// Rows of A in a type that is not multiplied as it is are converted first, once, into memory of the
// thread's own that lies as vectors do: one that ends in another cache line is two to read.
template <class In, class Out, class Weight>
static void product_few_rows(const Product<In, Out, Weight>& p) {
    constexpr bool kAsItIs = std::is_same_v<In, real> || Factors<In>::kCount != kLanes;
    if constexpr (kAsItIs) {
        product_few_rows<In, In, Out, Weight>(p, p.bias);
    } else {
        struct alignas(sizeof(Vector)) Line {
            real numbers[kLanes];
        };
        static thread_local std::vector<Line> converted;
        size_t row = (size_t(p.K) + kLanes - 1) / kLanes;  // lines of it
        converted.resize(std::max(converted.size(), kFewRows * row));
        for (int m = 0; m < p.M; m++)
            std::copy_n(p.A + size_t(m) * p.lda, p.K, converted[size_t(m) * row].numbers);
        product_few_rows<real, In, Out, Weight>(
            {p.trans_a, p.trans_b, p.M, p.N, p.K, converted[0].numbers, int(row) * kLanes, p.B,
             p.ldb, nullptr, p.beta, p.C, p.ldc, p.scales},
            p.bias);
    }
}

#if defined(GPT2_ONEDNN) && defined(__x86_64__)

// Products in bf16 on AMX, without the library, whose kernels lay weights out again in every call
// and transpose slowly: gradients of weights take half the time here. A tile register holds 16 rows
// of 64 bytes; one instruction adds to 16x16 sums in float32 the products of 16 rows of A' and 16
// columns of B' (`lines` below), of 32 numbers each. Every thread makes a rectangle of C, of what
// it packed itself: some columns, which stay in its second-level cache, then 32 rows at a time.
#    define GPT2_AMX __attribute__((target("avx512f,avx512bw,amx-tile,amx-bf16")))

constexpr int kTileLines = 16, kTileDepth = 32, kTileNumbers = kTileLines * kTileDepth;
constexpr int kPanelLines = 2 * kTileLines;  // of A' or B', whose tiles follow each other along K
constexpr int kDeepest = 1024;               // numbers of a line that are packed at a time
constexpr int kKept = 1 << 19;               // numbers of B' that a thread keeps packed: 1 MiB
constexpr int kSummedRows = 1024;            // of C, where sums wait for more than kDeepest numbers
// What a thread holds of all that, at most.
constexpr size_t kAmxBytes = (kKept + kPanelLines * kDeepest) * sizeof(bf16) +
                             size_t(kSummedRows) * (kKept / kDeepest) * sizeof(float);

// Whether the processor has AMX, oneDNN is not told to do without, and Linux lets us use it.
static bool has_amx() {
#    ifdef GPT2_EMULATED_AMX
    return true;
#    endif
    static const bool has = [] {
        constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
        constexpr auto kAmx = unsigned(dnnl::cpu_isa::avx512_core_amx);
        return (unsigned(dnnl::get_effective_cpu_isa()) & kAmx) == kAmx &&
               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return has;
}

// One side of a product: number k of a line is at line * ld + k, or, where rows in memory run
// `across` lines, at k * ld + line.
struct AmxSide {
    const bf16* numbers;
    size_t ld;
    bool across;
    int lines, depth;
};

typedef uint32_t TileWords __attribute__((vector_size(64)));  // a row of a tile: pairs of numbers

// Halves, quarters ... of words (16,16) change places across the diagonal, Distance words at a
// time: all four steps transpose.
template <int Distance, int... Lane>
GPT2_AMX static inline void swap_across(TileWords* words, std::integer_sequence<int, Lane...>) {
    for (int i = 0; i < kTileLines; i++) {
        if (i & Distance) continue;
        TileWords a = words[i], b = words[i + Distance];
        words[i] =
            __builtin_shufflevector(a, b, (Lane & Distance ? 16 + Lane - Distance : Lane)...);
        words[i + Distance] =
            __builtin_shufflevector(a, b, (Lane & Distance ? 16 + Lane : Lane + Distance)...);
    }
}
GPT2_AMX static inline void transpose_words(TileWords* words) {
    constexpr auto kWords = std::make_integer_sequence<int, 16>();
    swap_across<8>(words, kWords), swap_across<4>(words, kWords);
    swap_across<2>(words, kWords), swap_across<1>(words, kWords);
}

// The tile of 16 lines from `line` on and 32 numbers from k on, zeros beyond the side's end: of A'
// a row of it is a line, of B' the same two numbers of every line. What comes next is asked for
// early, for each row in memory is another page.
template <bool kOfB>
GPT2_AMX static inline void pack_tile(bf16* tile, const AmxSide& side, int line, int k) {
    const bf16* from =
        side.numbers + (side.across ? size_t(k) * side.ld + line : size_t(line) * side.ld + k);
    if (line + kTileLines > side.lines || k + kTileDepth > side.depth) {
        for (int l = 0; l < kTileLines; l++)
            for (int i = 0; i < kTileDepth; i++) {
                bool inside = line + l < side.lines && k + i < side.depth;
                bf16* to = tile + (kOfB ? i / 2 * 32 + 2 * l + i % 2 : l * kTileDepth + i);
                *to = inside ? from[side.across ? i * side.ld + l : l * side.ld + i] : bf16(0.f);
            }
        return;
    }
    TileWords words[kTileLines];
    if (side.across) {
        typedef uint16_t Halves __attribute__((vector_size(32)));
        for (int i = 0; i < kTileLines; i++) {
            const bf16 *even = from + 2 * i * side.ld, *odd = even + side.ld;
            Halves low, high;
            memcpy(&low, even, sizeof(low)), memcpy(&high, odd, sizeof(high));
            words[i] = __builtin_convertvector(low, TileWords) |
                       __builtin_convertvector(high, TileWords) << 16;
            __builtin_prefetch(even + kTileDepth * side.ld, 0, 2);
            __builtin_prefetch(odd + kTileDepth * side.ld, 0, 2);
        }
    } else {
        for (int i = 0; i < kTileLines; i++) {
            memcpy(&words[i], from + i * side.ld, sizeof(words[i]));
            __builtin_prefetch(from + i * side.ld + 4 * kTileDepth, 0, 2);
        }
    }
    if (side.across != kOfB) transpose_words(words);
    memcpy(tile, words, sizeof(words));
}

// The panel of lines from `line` on: both tiles of each 32 of `depth` numbers from k on.
template <bool kOfB>
GPT2_AMX static void pack_panel(bf16* panel, const AmxSide& side, int line, int k, int depth) {
    for (int last = k + depth; k < last; k += kTileDepth, panel += 2 * kTileNumbers) {
        pack_tile<kOfB>(panel, side, line, k);
        pack_tile<kOfB>(panel + kTileNumbers, side, line + kTileLines, k);
    }
}

// sums (32,32) = start + A' B' of two panels; start is null or, like sums, of rows `ld` apart. (To
// compilers of GCC's kind these instructions read no memory: hence the fences.)
GPT2_AMX static inline void multiply_panels(float* sums, size_t sums_ld, const float* start,
                                            size_t start_ld, const bf16* a, const bf16* b,
                                            int depth) {
    constexpr size_t kRow = 64;
    std::atomic_signal_fence(std::memory_order_seq_cst);
    if (start != nullptr) {
        const float* lower = start + kTileLines * start_ld;
        _tile_loadd(0, start, start_ld * sizeof(float));
        _tile_loadd(1, start + kTileLines, start_ld * sizeof(float));
        _tile_loadd(2, lower, start_ld * sizeof(float));
        _tile_loadd(3, lower + kTileLines, start_ld * sizeof(float));
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < depth; k += kTileDepth, a += 2 * kTileNumbers, b += 2 * kTileNumbers) {
        _tile_loadd(4, a, kRow);
        _tile_loadd(6, b, kRow);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + kTileNumbers, kRow);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + kTileNumbers, kRow);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    float* lower = sums + kTileLines * sums_ld;
    _tile_stored(0, sums, sums_ld * sizeof(float));
    _tile_stored(1, sums + kTileLines, sums_ld * sizeof(float));
    _tile_stored(2, lower, sums_ld * sizeof(float));
    _tile_stored(3, lower + kTileLines, sums_ld * sizeof(float));
    std::atomic_signal_fence(std::memory_order_seq_cst);
}

// The numbers of C from (m,n) on, up to 32x32 of them, from two panels and the sums of those
// before.
template <class Out>
GPT2_AMX static void product_amx_block(const Product<bf16, Out>& p, int m, int n, const float* sums,
                                       const bf16* a, const bf16* b, int depth) {
    int rows = std::min(kPanelLines, p.M - m), columns = std::min(kPanelLines, p.N - n);
    Out* c = p.C + size_t(m) * p.ldc + n;
    for (int r = 0; r < rows; r++) {  // written soon, by instructions that no processor foresees
        __builtin_prefetch(c + size_t(r) * p.ldc, 1);
        __builtin_prefetch(c + size_t(r) * p.ldc + columns - 1, 1);
    }
    if constexpr (std::is_same_v<Out, float>) {
        bool whole = rows == kPanelLines && columns == kPanelLines;
        if (whole && p.bias == nullptr && (p.beta == 0 || sums == nullptr)) {
            const float* start = p.beta == 0 ? sums : c;
            size_t start_ld = p.beta == 0 ? kPanelLines : size_t(p.ldc);
            return multiply_panels(c, size_t(p.ldc), start, start_ld, a, b, depth);
        }
    }
    alignas(64) float last[kPanelLines * kPanelLines];
    multiply_panels(last, kPanelLines, sums, kPanelLines, a, b, depth);
    for (int r = 0; r < rows; r++, c += p.ldc) {
        float* sum = last + r * kPanelLines;
        if (p.bias != nullptr)
            for (int i = 0; i < columns; i++) sum[i] += float(p.bias[n + i]);
        if (p.beta != 0)
            for (int i = 0; i < columns; i++) sum[i] += float(c[i]);
#    pragma omp simd
        for (int i = 0; i < columns; i++) c[i] = sum[i];
    }
}

// Rows [m0, m1) and columns [n0, n1) of C. Where lines are longer than kDeepest, sums of blocks
// wait in memory of the thread's own for the rest of K.
template <class Out>
GPT2_AMX static void product_amx_rectangle(const Product<bf16, Out>& p, int m0, int m1, int n0,
                                           int n1) {
    struct alignas(64) TileConfig {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const TileConfig config;
    struct alignas(64) Line {
        bf16 numbers[32];
    };
    static thread_local std::vector<Line> kept(kKept / 32), panel(kPanelLines * kDeepest / 32);
    static thread_local std::vector<float> sums;
    AmxSide A = {p.A, size_t(p.lda), p.trans_a, p.M, p.K};
    AmxSide B = {p.B, size_t(p.ldb), !p.trans_b, p.N, p.K};
    auto whole_tiles = [](int depth) { return (depth + kTileDepth - 1) / kTileDepth * kTileDepth; };
    int deepest = std::min(whole_tiles(p.K), kDeepest);
    int columns = kKept / deepest / kPanelLines * kPanelLines;  // at a time
    if (p.K > deepest) sums.resize(size_t(kSummedRows) * size_t(columns));
    _tile_loadconfig(&config);
    for (int row = m0; row < m1; row += kSummedRows) {
        int last_row = std::min(row + kSummedRows, m1);
        for (int column = n0; column < n1; column += columns) {
            int last_column = std::min(column + columns, n1);
            for (int k = 0; k < p.K; k += deepest) {
                int depth = std::min(whole_tiles(p.K - k), deepest);
                for (int n = column; n < last_column; n += kPanelLines)
                    pack_panel<true>(kept[0].numbers + size_t(n - column) * size_t(depth), B, n, k,
                                     depth);
                for (int m = row; m < last_row; m += kPanelLines) {
                    pack_panel<false>(panel[0].numbers, A, m, k, depth);
                    for (int n = column; n < last_column; n += kPanelLines) {
                        const bf16* b = kept[0].numbers + size_t(n - column) * size_t(depth);
                        float* sum = sums.data() + size_t(m - row) * size_t(columns) +
                                     size_t(n - column) * kPanelLines;
                        const float* start = k > 0 ? sum : nullptr;
                        if (k + depth < p.K)
                            multiply_panels(sum, kPanelLines, start, kPanelLines, panel[0].numbers,
                                            b, depth);
                        else product_amx_block(p, m, n, start, panel[0].numbers, b, depth);
                    }
                }
            }
        }
    }
    _tile_release();
}

// The rectangles are those that ask the least of a thread: products, and packing its two sides.
template <class Out>
static void product_amx(const Product<bf16, Out>& p) {
    auto panels = [](int lines) { return (lines + kPanelLines - 1) / kPanelLines; };
    int threads = omp_get_max_threads(), down = 1;  // rectangles one below the other
    auto cost = [&](int down) {
        int across = threads / down;
        return (panels(p.M) / double(down) + 2) * (panels(p.N) / double(across) + 2);
    };
    for (int i = 2; i <= threads; i++)
        if (threads % i == 0 && cost(i) < cost(down)) down = i;
    int across = threads / down;
#    pragma omp parallel for schedule(static, 1)
    for (int i = 0; i < threads; i++) {
        auto first = [&](int piece, int pieces, int lines) {
            int64_t panel = int64_t(panels(lines)) * piece / pieces;
            return int(std::min(panel * kPanelLines, int64_t(lines)));
        };
        product_amx_rectangle(p, first(i / across, down, p.M), first(i / across + 1, down, p.M),
                              first(i % across, across, p.N), first(i % across + 1, across, p.N));
    }
}

#endif

// The same by the loops above: a few rows of A at a time, where rows of B are what they multiply.
template <class In, class Out>
static void product_without_library(const Product<In, Out>& p) {
#ifndef GPT2_IN_ORDER
    if (p.trans_b && !p.trans_a) {
        for (int m = 0; m < p.M; m += kFewRows) {
            Product<In, Out> some = p;
            some.A += size_t(m) * p.lda, some.C += size_t(m) * p.ldc;
            some.M = std::min(kFewRows, p.M - m);
            product_few_rows(some);
        }
        return;
    }
#endif
    product_plain(p);
}

// The same product by oneDNN, which picks the kernel for the processor when the program runs, but
// for bf16 on AMX. In float32 its BLAS interface was measured to be as fast as its primitives or
// faster, except where a weight is transposed and a bias added, which a primitive does on the way.
template <class In, class Out>
static void product(const Product<In, Out>& p) {
#ifndef GPT2_IN_ORDER  // the yardstick of the CUDA kernels adds up in order: see the Makefile
    if (p.M <= kFewRows && p.trans_b && !p.trans_a) return product_few_rows(p);
#endif
#ifdef GPT2_ONEDNN
    if constexpr (std::is_same_v<In, float>) {
        if (p.bias == nullptr) {
            dnnl_status_t status =
                dnnl_sgemm(p.trans_a ? 'T' : 'N', p.trans_b ? 'T' : 'N', p.M, p.N, p.K, 1.f, p.A,
                           p.lda, p.B, p.ldb, p.beta, p.C, p.ldc);
            if (status != dnnl_success) fail_product(p.M, p.N, p.K, int(status));
            return;
        }
    }
#    ifdef GPT2_AMX
    if constexpr (std::is_same_v<In, bf16> && !std::is_same_v<Out, double>)
        if (has_amx()) return product_amx(p);
#    endif
    if (!product_plans()(p)) product_without_library(p);
#else
    product_without_library(p);
#endif
}

void gemm(bool trans_a, bool trans_b, int M, int N, int K, const real* A, int lda, const real* B,
          int ldb, real beta, real* C, int ldc) {
    product<real, real>({trans_a, trans_b, M, N, K, A, lda, B, ldb, nullptr, beta, C, ldc});
}

void gemm_plain(bool trans_a, bool trans_b, int M, int N, int K, const real* A, int lda,
                const real* B, int ldb, real beta, real* C, int ldc) {
    product_plain<real, real>({trans_a, trans_b, M, N, K, A, lda, B, ldb, nullptr, beta, C, ldc});
}

void gemm_bf16(bool plain, bool trans_a, bool trans_b, int M, int N, int K, const uint16_t* A,
               int lda, const uint16_t* B, int ldb, real beta, real* C, int ldc) {
    auto numbers = [](const uint16_t* bits) { return reinterpret_cast<const bf16*>(bits); };
    Product<bf16, real> p = {trans_a,    trans_b, M,       N,    K, numbers(A), lda,
                             numbers(B), ldb,     nullptr, beta, C, ldc};
    if constexpr (sizeof(real) == 4) return plain ? product_plain(p) : product(p);
    product_plain(p);
}

// q = round(W / scale), scale = max |W| / 127, of each row, as gpt2.h says. |W / scale - q| is at
// most 1/2 but for the rounding of the quotient, 127 times half an eps.
void quantise_rows(int8_t* q, real* scales, const real* weights, size_t rows, size_t cols) {
#pragma omp parallel for schedule(static)
    for (size_t o = 0; o < rows; o++) {
        const real* w = weights + o * cols;
        int8_t* q_o = q + o * cols;
        real largest = 0, strange = 0;
        for (size_t c = 0; c < cols; c++) {
            largest = std::abs(w[c]) > largest ? std::abs(w[c]) : largest;
            strange += w[c] * 0;  // NaN where w is NaN or infinite
        }
        real scale = largest / kInt8Most + strange;
        scales[o] = scale;
        bool some = scale > 0;  // neither all zero nor NaN
#pragma omp simd
        for (size_t c = 0; c < cols; c++) {
            real quotient = some ? w[c] / scale : real(0);
            // (Scales that are almost zero have few digits.)
            q_o[c] =
                int8_t(std::clamp(std::nearbyint(quotient), -real(kInt8Most), real(kInt8Most)));
        }
    }
}

// The weights of a product as a model holds them: numbers, or int8 with scales, which products of
// many rows expand into memory for kExpanded numbers.
template <class Float>
struct Weights {
    const Float* numbers;
    const int8_t* q = nullptr;
    const real* scales = nullptr;
    Float* expanded = nullptr;
};

// out = (inp q^T) * scale + bias, q expanded a few rows at a time: any q is a bf16 exactly, so that
// the weights are those that few rows read.
// out (BT,OC) is written; inp (BT,C), q (OC,C), scales (OC), bias (OC) or null
template <class Float, class Out>
static void matmul_expanded(Out* out, const Float* inp, const Weights<Float>& weight,
                            const Float* bias, int BT, int C, int OC) {
    int most = std::max(1, int(kExpanded / size_t(C)));
    for (int first = 0; first < OC; first += most) {
        int rows = std::min(most, OC - first);
        const int8_t* q = weight.q + size_t(first) * C;
#pragma omp parallel for simd schedule(static)
        for (size_t i = 0; i < size_t(rows) * C; i++) weight.expanded[i] = real(q[i]);
        product<Float, Out>(
            {false, true, BT, rows, C, inp, C, weight.expanded, C, nullptr, 0, out + first, OC});
    }
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < BT; bt++) {
        Out* out_bt = out + size_t(bt) * OC;
#pragma omp simd
        for (int o = 0; o < OC; o++)
            out_bt[o] = real(out_bt[o]) * weight.scales[o] + (bias != nullptr ? real(bias[o]) : 0);
    }
}

// out = inp weight^T + bias
// out (BT,OC) is written; inp (BT,C), weight (OC,C), bias (OC) or null
template <class Float, class Out>
void matmul_forward(Out* out, const Float* inp, const Float* weight, const Float* bias, int BT,
                    int C, int OC) {
    product<Float, Out>({false, true, BT, OC, C, inp, C, weight, C, bias, 0, out, OC});
}

// The same by weights as they are held.
template <class Float, class Out>
void matmul_forward(Out* out, const Float* inp, const Weights<Float>& weight, const Float* bias,
                    int BT, int C, int OC) {
    if (weight.q == nullptr)
        return matmul_forward<Float>(out, inp, weight.numbers, bias, BT, C, OC);
    if (BT > kFewRows) return matmul_expanded(out, inp, weight, bias, BT, C, OC);
    product_few_rows<Float, Out, int8_t>(
        {false, true, BT, OC, C, inp, C, weight.q, C, bias, 0, out, OC, weight.scales});
}

void gemm_int8(int M, int N, int K, const real* A, const int8_t* q, const real* scales,
               const real* bias, real* expanded, real* C) {
    matmul_forward<real>(C, A, Weights<real>{nullptr, q, scales, expanded}, bias, M, K, N);
}

// forward: out = inp weight^T + bias
// dinp = dout weight;  dweight += dout^T inp;  dbias += sum over rows of dout
// dinp (BT,C) is written; dweight (OC,C) and dbias (OC) or null accumulate, but dweight is written
// where it is `fresh`, which spares reading and zeroing what is as large as the weights. scratch
// (kReduceRows,OC).
template <class Float>
void matmul_backward(Float* dinp, real* dweight, real* dbias, const Float* dout, const Float* inp,
                     const Float* weight, real* scratch, bool fresh, int BT, int C, int OC) {
    real beta = fresh ? 0 : 1;
    product<Float, Float>({false, false, BT, C, OC, dout, OC, weight, C, nullptr, 0, dinp, C});
    product<Float, real>({true, false, OC, C, BT, dout, OC, inp, C, nullptr, beta, dweight, C});
    if (dbias == nullptr) return;
#pragma omp parallel for schedule(static)
    for (int p = 0; p < kReduceRows; p++) {
        real* sum = scratch + size_t(p) * OC;
        std::fill(sum, sum + OC, real(0));
        for (int bt = int(int64_t(BT) * p / kReduceRows);
             bt < int(int64_t(BT) * (p + 1) / kReduceRows); bt++) {
            const Float* dout_bt = dout + size_t(bt) * OC;
#pragma omp simd
            for (int o = 0; o < OC; o++) sum[o] += real(dout_bt[o]);
        }
    }
    add_partial_sums(dbias, scratch, OC);
}

// ==== dropout ====================================================================================

// Where a row's dropout decides from: its key and its place.
struct DropoutRow {
    const Dropout& dropout;
    uint64_t sequence;
    int row, cols;
};

constexpr int kDropoutRun = 64;  // elements decided on at a time

// Decides for kDropoutRun elements of such a row at a time.
struct DropoutDraw {
    DropoutRow place;
    uint32_t stream, threshold;
    real scale;

    explicit DropoutDraw(const DropoutRow& place)
        : place(place),
          stream(random_stream(place.dropout.use, place.dropout.layer)),
          threshold(uint32_t(place.dropout.probability * 4294967296.0)),
          scale(real(1 / (1 - place.dropout.probability))) {}

    // What to multiply the elements from `first` on by, a multiple of 4: 0 or 1 / (1 - p). Groups
    // of four are drawn side by side, because the rounds of one counter wait for each other.
    void factors(real* factors, int first) const {
        constexpr int kGroups = kDropoutRun / 4;
        uint32_t groups = (uint32_t(place.cols) + 3) / 4;  // of a row
        uint32_t group = uint32_t(place.row) * groups + uint32_t(first) / 4;
        uint64_t x0[kGroups], x1[kGroups], x2[kGroups], x3[kGroups];
        for (int g = 0; g < kGroups; g++) {
            x0[g] = group + uint32_t(g), x1[g] = place.sequence;
            x2[g] = stream, x3[g] = place.dropout.step;
        }
        for (int round = 0; round < kPhiloxRounds; round++) {
#pragma omp simd
            for (int g = 0; g < kGroups; g++)
                philox_round(place.dropout.seed, round, x0[g], x1[g], x2[g], x3[g]);
        }
        auto factor = [&](uint64_t word) { return uint32_t(word) >= threshold ? scale : real(0); };
#pragma omp simd
        for (int g = 0; g < kGroups; g++) {
            factors[4 * g] = factor(x0[g]), factors[4 * g + 1] = factor(x1[g]);
            factors[4 * g + 2] = factor(x2[g]), factors[4 * g + 3] = factor(x3[g]);
        }
    }
};

// out[j] = inp[j] / (1 - p) with probability 1 - p, else 0  [Srivastava et al. 2014, JMLR 15:1929]
//
// For n numbers of a row. Whether an element stays depends on the key and its place alone, so that
// backward, another rank or the other twin decides the same; out may be inp.
template <class Out, class Float>
static void dropout_row(Out* out, const Float* inp, const DropoutRow& place, int n) {
    DropoutDraw draw(place);
    real factors[kDropoutRun];
    for (int j = 0; j < n; j += kDropoutRun) {
        draw.factors(factors, j);
        int count = std::min(n - j, kDropoutRun);
#pragma omp simd
        for (int i = 0; i < count; i++) out[j + i] = real(inp[j + i]) * factors[i];
    }
}

// out (B,T,C) is written; out may be inp. The gradient goes through the same function: dinp = mask
// * dout / (1 - p).
template <class Out, class Float>
void dropout_forward(Out* out, const Float* inp, const Dropout& dropout, int B, int T, int C) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            size_t bt = size_t(b) * T + t;
            dropout_row(out + bt * C, inp + bt * C,
                        {dropout, dropout.first_sequence + uint64_t(b), t, C}, C);
        }
    }
}

// ==== attention ==================================================================================

// The largest of n numbers, 16 running maxima at a time (compilers do not split a maximum on their
// own).
template <class Float>
static real largest_of(const Float* row, int n) {
    constexpr int kRunning = 16;
    real running[kRunning];
    std::fill(running, running + kRunning, real(row[0]));
    int whole = n / kRunning * kRunning;
    for (int j = 0; j < whole; j += kRunning) {
#pragma omp simd
        for (int i = 0; i < kRunning; i++)
            running[i] = real(row[j + i]) > running[i] ? real(row[j + i]) : running[i];
    }
    for (int j = whole; j < n; j++)
        running[0] = real(row[j]) > running[0] ? real(row[j]) : running[0];
    return *std::max_element(running, running + kRunning);
}

// out = softmax(scale * row) of n scores, which are lost; out may be row. Returns the logarithm of
// the sum of their exponentials.
template <class Out>
static real softmax_row(Out* out, real* row, int n, real scale) {
    real largest = largest_of(row, n), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < n; j++) {
        real e = vector_exp((row[j] - largest) * scale);
        row[j] = e;
        sum += e;
    }
    real inverse = 1 / sum;
#pragma omp simd
    for (int j = 0; j < n; j++) out[j] = row[j] * inverse;
    return largest * scale + std::log(sum);
}

// What a thread works in, in its part of the scratch memory: of a block of queries, scores and the
// gradients of weights (kAttentionRows,row), and what products read, made of either: weights and
// the gradients of scores, in the same memory where the type is the same.
template <class Float>
struct AttentionScratch {
    int row;
    real *scores, *dweights;
    Float *weights, *dscores;
    real *dk, *dv;  // (keys,HS), of all keys of a head

    AttentionScratch(real* scratch, size_t keys, size_t HS) : row(int(attention_row(keys))) {
        constexpr bool kSame = std::is_same_v<Float, real>;
        size_t block = kAttentionRows * size_t(row);
        scores = scratch + size_t(omp_get_thread_num()) *
                               attention_numbers(keys, HS, kSame ? Dtype::fp32 : Dtype::bf16);
        dweights = scores + block;
        if constexpr (kSame) weights = scores, dscores = dweights;
        else {
            weights = reinterpret_cast<Float*>(dweights + block);
            dscores = weights + block;
        }
        dk = dweights + block + (kSame ? 0 : block);
        dv = dk + keys * HS;
    }
};

// One head of one sequence: rows of queries lie q_stride apart, those of keys and values kv_stride.
// Query t stands at `position` + t and sees the keys up to there.
template <class Float>
struct AttentionHead {
    const Float *q, *k, *v;
    int q_stride, kv_stride, position, HS;
    DropoutRow dropout;  // of query 0; its row counts on with t

    bool drops() const { return dropout.dropout.probability > 0; }
    DropoutRow dropout_of(int t) const {
        return {dropout.dropout, dropout.sequence, dropout.row + t, dropout.cols};
    }
    real scale() const { return real(1 / std::sqrt(double(HS))); }
};

// Head h of sequence b of qkv (B,T,3C), as training has it.
template <class Float>
static AttentionHead<Float> training_head(const Float* qkv, const Dropout& dropout, int b, int h,
                                          int T, int C, int HS) {
    const Float* q = qkv + size_t(b) * T * 3 * C + h * HS;
    return {q,     q + C, q + 2 * C, 3 * C,
            3 * C, 0,     HS,        {dropout, dropout.first_sequence + uint64_t(b), h * T, T}};
}

// out and logsumexp (or null) of the queries [first, first + rows) of one head.
template <class Float>
static void attention_queries_forward(Float* out, int out_stride, real* logsumexp,
                                      const AttentionScratch<Float>& s,
                                      const AttentionHead<Float>& head, int first, int rows) {
    int HS = head.HS, keys = head.position + first + rows;
    const Float* q = head.q + size_t(first) * head.q_stride;
    product<Float, real>({false, true, rows, keys, HS, q, head.q_stride, head.k, head.kv_stride,
                          nullptr, 0, s.scores, s.row});
    for (int t = 0; t < rows; t++) {
        int seen = head.position + first + t + 1;
        real* scores = s.scores + size_t(t) * s.row;
        Float* weights = s.weights + size_t(t) * s.row;
        real lse;
        if (head.drops()) {
            lse = softmax_row(scores, scores, seen, head.scale());
            dropout_row(weights, scores, head.dropout_of(first + t), seen);
        } else {
            lse = softmax_row(weights, scores, seen, head.scale());
        }
        std::fill(weights + seen, weights + keys, Float(0));
        if (logsumexp != nullptr) logsumexp[first + t] = lse;
    }
    product<Float, Float>({false, false, rows, HS, keys, s.weights, s.row, head.v, head.kv_stride,
                           nullptr, 0, out + size_t(first) * out_stride, out_stride});
}

// out = dropout(softmax(q k^T / sqrt(HS), causal)) v, a head at a time
// [Vaswani et al. 2017, arXiv:1706.03762]
//
// out (B,T,C) and logsumexp (B,NH,T) are written; qkv (B,T,3C) holds q, k and v, each (NH,HS).
// Scores exist for kAttentionRows queries at a time, in scratch (threads, attention_numbers(T, HS,
// type)): a (B,NH,T,T) tensor is never held, and backward computes the scores again, which costs it
// one product in five  [Dao et al. 2022, arXiv:2205.14135]. A thread takes a block of queries, and
// makes its products alone.
template <class Float>
void attention_forward(Float* out, real* logsumexp, const Float* qkv, real* scratch,
                       const Dropout& dropout, int B, int T, int C, int NH) {
    int HS = C / NH, blocks = (T + kAttentionRows - 1) / kAttentionRows;
#pragma omp parallel
    {
        omp_set_num_threads(1);
#pragma omp for collapse(3) schedule(dynamic)
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < NH; h++) {
                for (int block = 0; block < blocks; block++) {
                    auto head = training_head(qkv, dropout, b, h, T, C, HS);
                    int first = block * kAttentionRows;
                    attention_queries_forward(
                        out + size_t(b) * T * C + h * HS, C, logsumexp + (size_t(b) * NH + h) * T,
                        AttentionScratch<Float>(scratch, size_t(T), size_t(HS)), head, first,
                        std::min(kAttentionRows, T - first));
                }
            }
        }
    }
}

// dscores, the gradient of the scores of query t of a head, from scores and dweights, the gradient
// of its dropped weights, of the keys that it sees; and the weights, dropped again. dscores may be
// dweights, and weights may be scores.
template <class Float>
static void attention_scores_backward(Float* weights, Float* dscores, const real* scores,
                                      const real* dweights, real logsumexp, real dot,
                                      const AttentionHead<Float>& head, int t) {
    real scale = head.scale(), factors[kDropoutRun];
    std::fill(factors, factors + kDropoutRun, real(1));
    DropoutDraw draw(head.dropout_of(t));
    for (int j = 0; j <= t; j += kDropoutRun) {
        if (head.drops()) draw.factors(factors, j);
        int count = std::min(t + 1 - j, kDropoutRun);
#pragma omp simd
        for (int i = 0; i < count; i++) {
            real p = vector_exp(scores[j + i] * scale - logsumexp);
            dscores[j + i] = p * (factors[i] * dweights[j + i] - dot) * scale;
            weights[j + i] = p * factors[i];
        }
    }
    // A query that sees one key weighs it 1, whatever its score: the gradient is 0, and what
    // rounding leaves of it AdamW would divide by its own size.
    if (t == 0) dscores[0] = real(0);
}

// dq of the queries [first, first + rows) is written, and what they add to dk and dv of the head;
// dq's rows lie 3C apart, those of dout and out C.
template <class Float>
static void attention_queries_backward(Float* dq, const Float* dout, const Float* out,
                                       const real* logsumexp, const AttentionScratch<Float>& s,
                                       const AttentionHead<Float>& head, int C, int first,
                                       int rows) {
    int HS = head.HS, keys = first + rows;
    const Float* q = head.q + size_t(first) * head.q_stride;
    dout += size_t(first) * C, out += size_t(first) * C;
    product<Float, real>({false, true, rows, keys, HS, q, head.q_stride, head.k, head.kv_stride,
                          nullptr, 0, s.scores, s.row});
    product<Float, real>({false, true, rows, keys, HS, dout, C, head.v, head.kv_stride, nullptr, 0,
                          s.dweights, s.row});
    for (int t = 0; t < rows; t++) {
        const Float *dout_t = dout + size_t(t) * C, *out_t = out + size_t(t) * C;
        real dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int i = 0; i < HS; i++) dot += real(dout_t[i]) * real(out_t[i]);
        size_t row = size_t(t) * s.row;
        Float *weights = s.weights + row, *dscores = s.dscores + row;
        attention_scores_backward(weights, dscores, s.scores + row, s.dweights + row,
                                  logsumexp[first + t], dot, head, first + t);
        std::fill(weights + first + t + 1, weights + keys, Float(0));
        std::fill(dscores + first + t + 1, dscores + keys, Float(0));
    }
    product<Float, real>(
        {true, false, keys, HS, rows, s.weights, s.row, dout, C, nullptr, 1, s.dv, HS});
    product<Float, real>(
        {true, false, keys, HS, rows, s.dscores, s.row, q, head.q_stride, nullptr, 1, s.dk, HS});
    product<Float, Float>({false, false, rows, HS, keys, s.dscores, s.row, head.k, head.kv_stride,
                           nullptr, 0, dq + size_t(first) * 3 * C, 3 * C});
}

// forward: s = q k^T;  p = softmax(s / sqrt(HS));  d = dropout(p);  out = d v
// dv = d^T dout;  dd = dout v^T;  ds = p * (dropout(dd) - dout . out) / sqrt(HS)
// dq = ds k;  dk = ds^T q
//
// (sum_j p_j dropout(dd)_j = sum_j d_j dd_j = dout . out, so the row's sum needs no second pass
// [Dao et al. 2022, arXiv:2205.14135, appendix B].) dqkv (B,T,3C) is written; dout, out (B,T,C);
// scratch as in forward. A thread takes a head, whose dk and dv it sums up in `real` over the
// blocks of queries, in order.
template <class Float>
void attention_backward(Float* dqkv, const Float* dout, const Float* qkv, const Float* out,
                        const real* logsumexp, real* scratch, const Dropout& dropout, int B, int T,
                        int C, int NH) {
    int HS = C / NH;
    auto store = [&](Float* to, const real* from) {
        for (int t = 0; t < T; t++) std::copy_n(from + size_t(t) * HS, HS, to + size_t(t) * 3 * C);
    };
#pragma omp parallel
    {
        omp_set_num_threads(1);
#pragma omp for collapse(2) schedule(dynamic)
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < NH; h++) {
                size_t at = size_t(b) * T * C + h * HS, at_qkv = size_t(b) * T * 3 * C + h * HS;
                auto head = training_head(qkv, dropout, b, h, T, C, HS);
                AttentionScratch<Float> s(scratch, size_t(T), size_t(HS));
                std::fill(s.dk, s.dk + size_t(2) * T * HS, real(0));
                for (int first = 0; first < T; first += kAttentionRows)
                    attention_queries_backward(dqkv + at_qkv, dout + at, out + at,
                                               logsumexp + (size_t(b) * NH + h) * T, s, head, C,
                                               first, std::min(kAttentionRows, T - first));
                store(dqkv + at_qkv + C, s.dk);
                store(dqkv + at_qkv + 2 * C, s.dv);
            }
        }
    }
}

// One query of a head against `keys` keys, a dot product and a sum at a time: what is left to do
// where a token is generated. row (keys) is scratch.
template <class Float>
static void attention_query_forward(Float* out, const AttentionHead<Float>& head, int t,
                                    real* row) {
    int HS = head.HS, keys = head.position + t + 1;
    const Float* q = head.q + size_t(t) * head.q_stride;
    for (int j = 0; j < keys; j++) {
        const Float* k = head.k + size_t(j) * head.kv_stride;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int i = 0; i < HS; i++) sum += real(q[i]) * real(k[i]);
        row[j] = sum;
    }
    softmax_row(row, row, keys, head.scale());
    real* sums = row + keys;
    std::fill(sums, sums + HS, real(0));
    for (int j = 0; j < keys; j++) {
        const Float* v = head.v + size_t(j) * head.kv_stride;
#pragma omp simd
        for (int i = 0; i < HS; i++) sums[i] += row[j] * real(v[i]);
    }
#pragma omp simd
    for (int i = 0; i < HS; i++) out[i] = sums[i];
}

// Attention of n new queries a sequence at `position` over the keys and values of a cache
// (B,NH,context,HS), in which those of a head follow each other in memory, and to which this call
// first adds the new ones. out (B,n,C) is written; qkv (B,n,3C); scratch as in forward, for
// `context` keys. A thread takes a block of queries of a head.
template <class Float>
static void attention_cached_forward(Float* out, Float* key_cache, Float* value_cache,
                                     const Float* qkv, real* scratch, int B, int n, int position,
                                     int context, int C, int NH) {
    int HS = C / NH, step = n < kAttentionRows / 4 ? 1 : kAttentionRows;
    auto cached = [&](int b, int h) { return (size_t(b) * NH + h) * context * HS; };
    Dropout none;
#pragma omp parallel
    {
        omp_set_num_threads(1);
#pragma omp for collapse(2) schedule(static)
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < NH; h++) {
                for (int t = 0; t < n; t++) {
                    const Float* k = qkv + (size_t(b) * n + t) * 3 * C + C + h * HS;
                    size_t place = cached(b, h) + size_t(position + t) * HS;
                    std::copy(k, k + HS, key_cache + place);
                    std::copy(k + C, k + C + HS, value_cache + place);
                }
            }
        }  // the barrier here: queries read every key of this call
#pragma omp for collapse(3) schedule(static)
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < NH; h++) {
                for (int first = 0; first < n; first += step) {
                    AttentionHead<Float> head = {qkv + size_t(b) * n * 3 * C + h * HS,
                                                 key_cache + cached(b, h),
                                                 value_cache + cached(b, h),
                                                 3 * C,
                                                 HS,
                                                 position,
                                                 HS,
                                                 {none, 0, 0, 0}};
                    AttentionScratch<Float> s(scratch, size_t(context), size_t(HS));
                    Float* out_b = out + size_t(b) * n * C + h * HS;
                    if (step == 1)
                        attention_query_forward(out_b + size_t(first) * C, head, first, s.scores);
                    else
                        attention_queries_forward(out_b, C, nullptr, s, head, first,
                                                  std::min(step, n - first));
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
template <class Float>
void gelu_forward(Float* out, const Float* inp, size_t N) {
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
template <class Float>
void gelu_backward(Float* dinp, const Float* dout, const Float* inp, size_t N) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < N; i++) {
        real x = inp[i];
        real u = real(kGeluScale) * (x + real(kGeluCube) * x * x * x);
        real du = real(kGeluScale) * (1 + 3 * real(kGeluCube) * x * x);
        real s = 1 / (1 + vector_exp(-2 * u));
        dinp[i] = real(dout[i]) * (s + 2 * x * s * (1 - s) * du);
    }
}

// pre = inp weight^T + bias;  out = gelu(pre)
// pre and out (BT,OC) are written, both kept for backward; inp (BT,C), weight (OC,C), bias (OC) or
// null. One name because the other twin's product applies GELU to its result before it is stored.
template <class Float>
void matmul_gelu_forward(Float* out, Float* pre, const Float* inp, const Weights<Float>& weight,
                         const Float* bias, int BT, int C, int OC) {
    matmul_forward(pre, inp, weight, bias, BT, C, OC);
    gelu_forward(out, pre, size_t(BT) * OC);
}

// forward: inp = gelu(pre);  out = inp weight^T + bias
// dpre = (dout weight) * gelu'(pre);  dweight += dout^T inp;  dbias += sum over rows of dout
// dpre (BT,C) is written; dweight (OC,C), unless it is fresh, and dbias (OC) or null accumulate.
// dout (BT,OC); inp and pre (BT,C); scratch (kReduceRows,OC).
template <class Float>
void gelu_matmul_backward(Float* dpre, real* dweight, real* dbias, const Float* dout,
                          const Float* inp, const Float* pre, const Float* weight, real* scratch,
                          bool fresh, int BT, int C, int OC) {
    matmul_backward(dpre, dweight, dbias, dout, inp, weight, scratch, fresh, BT, C, OC);
    gelu_backward(dpre, dpre, pre, size_t(BT) * C);
}

// ==== residual ===================================================================================

// residual = inp + dropout(branch)   [He et al. 2015, arXiv:1512.03385];  out = layer norm of it
// residual, out (B,T,C) and mean, rstd (B,T) are written; inp, branch (B,T,C), neither of them
// residual; weight (C), bias (C) or null. A row is normalised while it is in cache. The gradient of
// residual goes to inp as it is, and to branch through dropout_forward.
template <class Stream, class Float>
void residual_layernorm_forward(Stream* residual, Float* out, real* mean, real* rstd,
                                const Stream* inp, const Float* branch, const Float* weight,
                                const Float* bias, double epsilon, const Dropout& dropout, int B,
                                int T, int C) {
#pragma omp parallel for collapse(2) schedule(static)
    for (int b = 0; b < B; b++) {
        for (int t = 0; t < T; t++) {
            size_t bt = size_t(b) * T + t;
            const Stream* inp_bt = inp + bt * C;
            const Float* branch_bt = branch + bt * C;
            Stream* residual_bt = residual + bt * C;
            if (dropout.probability > 0) {
                dropout_row(residual_bt, branch_bt,
                            {dropout, dropout.first_sequence + uint64_t(b), t, C}, C);
#pragma omp simd
                for (int c = 0; c < C; c++) residual_bt[c] = real(inp_bt[c]) + real(residual_bt[c]);
            } else {
#pragma omp simd
                for (int c = 0; c < C; c++) residual_bt[c] = real(inp_bt[c]) + real(branch_bt[c]);
            }
            layernorm_row(out + bt * C, mean + bt, rstd + bt, residual_bt, weight, bias, epsilon,
                          C);
        }
    }
}

// ==== classifier =================================================================================

// loss = log(sum_j exp(logit_j)) - logit_target
// dlogit_j = (softmax_j - [j = target]) * loss_scale
//
// losses (BT) is written, 0 where the target is -1. logits (BT,Vp): only V take part;
// with `gradient` they are replaced by dlogits, 0 in the padding and where the target is -1. A row
// is read and written while it is in cache; its exponentials are taken again rather than kept, for
// the logits may have no room for their digits.
template <class Float>
void classifier_forward(real* losses, Float* logits, const int* targets, double loss_scale,
                        bool gradient, int BT, int V, int Vp) {
#pragma omp parallel for schedule(static)
    for (int bt = 0; bt < BT; bt++) {
        Float* row = logits + size_t(bt) * Vp;
        int target = targets[bt];
        losses[bt] = 0;
        if (target == kIgnore) {
            if (gradient) std::fill(row, row + Vp, Float(0));
            continue;
        }
        real largest = largest_of(row, V), sum = 0, at_target = row[target];
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < V; j++) sum += vector_exp(real(row[j]) - largest);
        losses[bt] = std::log(sum) + (largest - at_target);  // both may be far from 0
        if (!gradient) continue;
        real factor = real(loss_scale) / sum;
#pragma omp simd
        for (int j = 0; j < V; j++) row[j] = vector_exp(real(row[j]) - largest) * factor;
        row[target] = (vector_exp(at_target - largest) / sum - 1) * real(loss_scale);
        std::fill(row + V, row + Vp, Float(0));
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
// params, m, v (N) are updated; grads (N). With Float bf16, narrow (N) gets params rounded to
// nearest: those of more digits remember what rounding drops. With Float `real` it is not used.
template <class Float>
void adamw_update(real* params, Float* narrow, real* m, real* v, const real* grads, size_t N,
                  const AdamW& adamw, double weight_decay, double grad_scale) {
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
        if constexpr (!std::is_same_v<Float, real>) narrow[i] = params[i];
    }
}

// The layers as gpt2.h declares them, with the type of whose numbers it says `real`.
void encoder_forward(real* out, const int* inputs, const real* wte, const real* wpe, int B, int T,
                     int C) {
    encoder_forward<real, real>(out, inputs, wte, wpe, B, T, C);
}
void encoder_backward(real* dwte, real* dwpe, const real* dout, const int* inputs, int B, int T,
                      int C) {
    encoder_backward<real>(dwte, dwpe, dout, inputs, B, T, C);
}
void layernorm_forward(real* out, real* mean, real* rstd, const real* inp, const real* weight,
                       const real* bias, double epsilon, int B, int T, int C) {
    layernorm_forward<real, real>(out, mean, rstd, inp, weight, bias, epsilon, B, T, C);
}
void layernorm_backward(real* dinp, real* dweight, real* dbias, const real* dout, const real* inp,
                        const real* weight, const real* mean, const real* rstd, real* scratch,
                        int B, int T, int C) {
    layernorm_backward<real, real>(dinp, dweight, dbias, dout, inp, weight, mean, rstd, scratch, B,
                                   T, C);
}
void matmul_forward(real* out, const real* inp, const real* weight, const real* bias, int BT, int C,
                    int OC) {
    matmul_forward<real>(out, inp, weight, bias, BT, C, OC);
}
void matmul_backward(real* dinp, real* dweight, real* dbias, const real* dout, const real* inp,
                     const real* weight, real* scratch, int BT, int C, int OC) {
    matmul_backward<real>(dinp, dweight, dbias, dout, inp, weight, scratch, false, BT, C, OC);
}
void attention_forward(real* out, real* logsumexp, const real* qkv, real* scratch,
                       const Dropout& dropout, int B, int T, int C, int NH) {
    attention_forward<real>(out, logsumexp, qkv, scratch, dropout, B, T, C, NH);
}
void attention_backward(real* dqkv, const real* dout, const real* qkv, const real* out,
                        const real* logsumexp, real* scratch, const Dropout& dropout, int B, int T,
                        int C, int NH) {
    attention_backward<real>(dqkv, dout, qkv, out, logsumexp, scratch, dropout, B, T, C, NH);
}
void gelu_forward(real* out, const real* inp, size_t N) { gelu_forward<real>(out, inp, N); }
void gelu_backward(real* dinp, const real* dout, const real* inp, size_t N) {
    gelu_backward<real>(dinp, dout, inp, N);
}
void dropout_forward(real* out, const real* inp, const Dropout& dropout, int B, int T, int C) {
    dropout_forward<real, real>(out, inp, dropout, B, T, C);
}
void residual_layernorm_forward(real* residual, real* out, real* mean, real* rstd, const real* inp,
                                const real* branch, const real* weight, const real* bias,
                                double epsilon, const Dropout& dropout, int B, int T, int C) {
    residual_layernorm_forward<real, real>(residual, out, mean, rstd, inp, branch, weight, bias,
                                           epsilon, dropout, B, T, C);
}
void matmul_gelu_forward(real* out, real* pre, const real* inp, const real* weight,
                         const real* bias, int BT, int C, int OC) {
    matmul_gelu_forward<real>(out, pre, inp, Weights<real>{weight}, bias, BT, C, OC);
}
void gelu_matmul_backward(real* dpre, real* dweight, real* dbias, const real* dout, const real* inp,
                          const real* pre, const real* weight, real* scratch, int BT, int C,
                          int OC) {
    gelu_matmul_backward<real>(dpre, dweight, dbias, dout, inp, pre, weight, scratch, false, BT, C,
                               OC);
}
void classifier_forward(real* losses, real* logits, const int* targets, double loss_scale,
                        bool gradient, int BT, int V, int Vp) {
    classifier_forward<real>(losses, logits, targets, loss_scale, gradient, BT, V, Vp);
}
void adamw_update(real* params, real* m, real* v, const real* grads, size_t N, const AdamW& adamw,
                  double weight_decay, double grad_scale) {
    adamw_update<real>(params, nullptr, m, v, grads, N, adamw, weight_decay, grad_scale);
}

// ==== memory =====================================================================================

// One allocation of `size` zeros; it asks for huge pages, and is first touched by the threads that
// will use it.
template <class Number>
static Number* allocate(size_t size, const char* group) {
    constexpr size_t kAlignment = 1 << 21;
    if (size == 0) return nullptr;
    size_t bytes = size * sizeof(Number);
    size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* memory = size > SIZE_MAX / 16 ? nullptr : aligned_alloc(kAlignment, whole);
    if (memory == nullptr)
        fail_machine(
            "out of memory: %s need %.1f MiB; a smaller --batch-size, --sequence-length or --model "
            "would fit",
            group, double(bytes) / 1048576);
    madvise(memory, whole, MADV_HUGEPAGE);
#pragma omp parallel for schedule(static)
    for (size_t at = 0; at < bytes; at += kAlignment)
        memset(static_cast<char*>(memory) + at, 0, std::min(kAlignment, bytes - at));
    return static_cast<Number*>(memory);
}

struct GPT2 {
    GPT2Config config;
    GPT2Shape shape;
    ParameterTable parameter_rows;
    ActivationTable activation_rows;
    std::array<real*, 4> groups = {};  // parameters, gradients, moments: each laid out as the table
    bf16* narrow_parameters = nullptr;  // what products read in bf16; all there is without training
    int8_t* int8_weights = nullptr;     // those of products, where the shape wants them so,
    real* int8_scales = nullptr;        // and of each of their rows
    real* snapshot = nullptr;           // parameters and moments, one group after the other
    std::thread snapshot_copy;          // what fills it
    char* activation_memory = nullptr;
    std::array<void*, kActivationRows> activations = {};
    size_t parameters = 0;
    int B = 0, T = 0;  // of the last forward
    const int* inputs = nullptr;
    GPT2Pass pass;
    double loss = 0;  // of the passes since gpt2_zero_gradients
    // Gradients that count as zero and that the next pass writes: of the classifier, of the blocks.
    mutable bool fresh_head = false, fresh_blocks = false;
    GPT2Stats last = {}, before_last = {};  // of the last two updates

    ~GPT2() {
        if (snapshot_copy.joinable()) snapshot_copy.join();
        for (real* group : groups) free(group);
        free(narrow_parameters);
        free(int8_weights);
        free(int8_scales);
        free(snapshot);
        free(activation_memory);
    }

    // The parameters of one layer as products read them, and their gradients; tensors that exist
    // once are the same in every layer, those not present are null.
    template <class Float>
    ParameterPointers<const Float> parameters_of(int l) const {
        const void* memory = narrow_parameters;
        if (memory == nullptr) memory = groups[size_t(Group::parameters)];
        return pointers(static_cast<const Float*>(memory), l);
    }
    // The weights of a product, `numbers` or what int8 holds of the same row.
    template <class Float>
    Weights<Float> weights(const Float* numbers, int row, int l) const {
        if (int8_weights == nullptr) return {numbers};
        Int8Place place = int8_place(config, row, l);
        return {numbers, int8_weights + place.weights, int8_scales + place.scales,
                activations_of<Float>(l).expanded};
    }
    template <class Float>
    Weights<Float> head_weights() const {
        ParameterPointers<const Float> p = parameters_of<Float>(0);
        return config.tied ? weights(p.wte, k_wte, 0) : weights(p.headw, k_headw, 0);
    }
    ParameterPointers<real> gradients_of(int l) const {
        return pointers(groups[size_t(Group::gradients)], l);
    }

    template <class Number>
    ParameterPointers<Number> pointers(Number* memory, int l) const {
        ParameterPointers<Number> tensors;
        size_t offset = 0;
#define X(name, ...)                                                                  \
    {                                                                                 \
        const ParameterRow& row = parameter_rows[k_##name];                           \
        size_t layer = row.count > 1 ? size_t(l) * row.size() : 0;                    \
        if (row.present && memory != nullptr) tensors.name = memory + offset + layer; \
        offset += row.allocated();                                                    \
    }
        GPT2_PARAMETER_TABLE(X)
#undef X
        return tensors;
    }

    template <class Float>
    Activations<Float> activations_of(int l) const {
        Activations<Float> tensors;
#define X(name, type, ...)                                                                     \
    {                                                                                          \
        using Number = std::remove_pointer_t<decltype(tensors.name)>;                          \
        const ActivationRow& row = activation_rows[a_##name];                                  \
        size_t layer = row.count > 1 ? size_t(l) * row.size : 0;                               \
        if (row.count > 0) tensors.name = static_cast<Number*>(activations[a_##name]) + layer; \
    }
        GPT2_ACTIVATION_TABLE(X)
#undef X
        return tensors;
    }

    // The layer norm that block l begins with, or, after the last block, the last one.
    template <class Float>
    struct Norm {
        Float* out;
        real *mean, *rstd;
        const Float *weight, *bias;
    };
    template <class Float>
    Norm<Float> norm_before(int l) const {
        bool last = l == config.layers;
        ParameterPointers<const Float> p = parameters_of<Float>(last ? 0 : l);
        Activations<Float> a = activations_of<Float>(last ? 0 : l);
        if (last) return {a.lnf, a.lnf_mean, a.lnf_rstd, p.lnfw, p.lnfb};
        return {a.ln1, a.ln1_mean, a.ln1_rstd, p.ln1w, p.ln1b};
    }
    // What block l adds to: the embeddings, or what the block before it left.
    template <class Float>
    const real* block_input(int l) const {
        return l == 0 ? activations_of<Float>(0).encoded : activations_of<Float>(l - 1).residual3;
    }
    Dropout dropout(RandomUse use, int l) const {
        double probability = pass.training ? config.dropout : 0;
        return {probability, pass.seed, pass.step, pass.first_sequence, use, l};
    }
};

// Calls f.template operator()<Float>() with the type of the model's activations.
template <class F>
static void with_type(Dtype dtype, F f) {
    if constexpr (sizeof(real) == 4)
        if (dtype == Dtype::bf16) return f.template operator()<bf16>();
    f.template operator()<real>();
}

size_t gpt2_memory_free() { return machine_memory_free(); }

// Making, reading and saving a model take a copy of a tensor, and one more of those that a file
// holds the other way round: in a save of both moments, of each.
static size_t copies_bytes(const GPT2Config& config, const GPT2Shape& shape) {
    size_t largest = 0, turned = 0;
    for (const ParameterRow& row : parameter_table(config)) {
        largest = std::max(largest, row.file_size());
        if (row.transposed) turned = std::max(turned, row.file_size());
    }
    return (largest + (shape.training ? 2 : 1) * turned) * sizeof(real);
}

// What the whole process will take: the tables, the copies of a tensor, and the program with its
// libraries, as measured.
std::vector<MemoryRow> gpt2_memory(const GPT2Config& config, const GPT2Shape& shape) {
    size_t program_bytes = size_t(40) << 20;  // oneDNN's products among them
#ifdef GPT2_AMX
    if (shape.dtype == Dtype::bf16 && has_amx()) program_bytes += size_t(shape.threads) * kAmxBytes;
#endif
    std::vector<MemoryRow> rows = tensor_memory(config, shape);
    if (shape.snapshot) rows.push_back({"snapshot", snapshot_bytes(allocated_parameters(config))});
    rows.push_back({"copies of a tensor", copies_bytes(config, shape)});
    rows.push_back({"program, libraries", program_bytes});
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
    assert(shape.recompute >= 0 && shape.recompute < kRecomputeLevels);
    assert(shape.dtype == Dtype::fp32 || sizeof(real) == 4);
    assert(!(shape.int8 && (shape.training || shape.snapshot)));
    check_memory(config, shape);
    omp_set_num_threads(shape.threads);
    auto model = std::make_unique<GPT2>();
    model->config = config;
    model->shape = shape;
    model->parameter_rows = held_parameters(config, shape);
    model->activation_rows = activation_table(config, shape);
    model->parameters = gpt2_sizes(config, shape).parameters;
    constexpr const char* kGroups[] = {"parameters", "gradients", "first moments",
                                       "second moments"};
    bool narrow = shape.dtype == Dtype::bf16;
    if (narrow) model->narrow_parameters = allocate<bf16>(model->parameters, "parameters, bf16");
    for (size_t group = 0; group < 4; group++)
        if (shape.training || (group == 0 && !narrow))
            model->groups[group] = allocate<real>(model->parameters, kGroups[group]);
    if (shape.int8) {
        Int8Place all = int8_place(config, kParameterRows, 0);
        model->int8_weights = allocate<int8_t>(all.weights, "parameters, int8");
        model->int8_scales = allocate<real>(all.scales, "parameters, int8");
    }
    if (shape.snapshot)
        model->snapshot =
            allocate<real>(snapshot_bytes(model->parameters) / sizeof(real), "the snapshot");
    size_t bytes = 0;
    for (const ActivationRow& row : model->activation_rows) bytes += row.bytes(shape.dtype);
    model->activation_memory = allocate<char>(bytes, "activations");
    bytes = 0;
    for (size_t row = 0; row < size_t(kActivationRows); row++) {
        model->activations[row] = model->activation_memory + bytes;
        bytes += model->activation_rows[row].bytes(shape.dtype);
    }
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

// The weights of products are most of a model. gpt2_zero_gradients does not touch their gradients:
// the first pass that follows writes them, in its forward pass (head) or in its backward pass
// (blocks), and the others add to them.
enum class FreshGradients { nothing, head, blocks };

static FreshGradients written_by(const GPT2* model, int row) {
    if (row == (model->config.tied ? k_wte : k_headw)) return FreshGradients::head;
    return is_product_weight(model->config, row) ? FreshGradients::blocks : FreshGradients::nothing;
}

// Zeroes the gradients of the rows that `wanted` says, by what writes them.
template <class F>
static void zero_gradient_rows(const GPT2* model, F wanted) {
    real* gradients = model->groups[size_t(Group::gradients)];
    for (int row = 0; row < kParameterRows; row++) {
        size_t N = model->parameter_rows[size_t(row)].allocated();
        if (wanted(written_by(model, row))) {
#pragma omp parallel for simd schedule(static)
            for (size_t i = 0; i < N; i++) gradients[i] = 0;
        }
        gradients += N;
    }
}

// Zeroes what no pass has written yet, for who reads the gradients now.
static void settle_gradients(const GPT2* model) {
    if (!model->fresh_head && !model->fresh_blocks) return;
    zero_gradient_rows(model, [model](FreshGradients written_by) {
        return (written_by == FreshGradients::head && model->fresh_head) ||
               (written_by == FreshGradients::blocks && model->fresh_blocks);
    });
    model->fresh_head = model->fresh_blocks = false;
}

void gpt2_copy_out(const GPT2* model, Group group, int row, int layer, real* host) {
    if (group == Group::gradients) settle_gradients(model);
    if (model->int8_weights != nullptr && is_product_weight(model->config, row)) {
        Int8Place place = int8_place(model->config, row, layer);
        const ParameterRow& tensor = model->parameter_rows[size_t(row)];
        for (size_t i = 0; i < tensor.file_size(); i++)
            host[i] = model->int8_scales[place.scales + i / tensor.cols] *
                      real(model->int8_weights[place.weights + i]);
        return;
    }
    size_t offset = tensor_offset(model, row, layer);
    size_t N = model->parameter_rows[size_t(row)].file_size();
    const real* memory = model->groups[size_t(group)];
    if (memory != nullptr) std::copy(memory + offset, memory + offset + N, host);
    else std::copy(model->narrow_parameters + offset, model->narrow_parameters + offset + N, host);
}

// Parameters go to those in `real` and, rounded to nearest, to those in bf16 or int8, where they
// are.
void gpt2_copy_in(GPT2* model, Group group, int row, int layer, const real* host) {
    gpt2_snapshot_wait(model);
    if (group == Group::gradients) settle_gradients(model);
    if (model->int8_weights != nullptr && is_product_weight(model->config, row)) {
        Int8Place place = int8_place(model->config, row, layer);
        const ParameterRow& tensor = model->parameter_rows[size_t(row)];
        quantise_rows(model->int8_weights + place.weights, model->int8_scales + place.scales, host,
                      tensor.file_rows, tensor.cols);
        if (!tensor.present) return;
    }
    size_t offset = tensor_offset(model, row, layer);
    size_t N = model->parameter_rows[size_t(row)].file_size();
    real* memory = model->groups[size_t(group)];
    if (memory != nullptr) std::copy(host, host + N, memory + offset);
    if (group == Group::parameters && model->narrow_parameters != nullptr)
        std::copy(host, host + N, model->narrow_parameters + offset);
}

void gpt2_activation_out(const GPT2* model, int row, int layer, real* host) {
    const ActivationRow& buffer = model->activation_rows[size_t(row)];
    with_type(buffer.narrow ? model->shape.dtype : Dtype::fp32, [&]<class Float>() {
        const Float* memory = static_cast<const Float*>(model->activations[size_t(row)]);
        memory += size_t(layer) * buffer.size;
        std::copy(memory, memory + buffer.size, host);
    });
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

TensorPart gpt2_snapshot_tensor(const GPT2* model, Group group, int row, int layer) {
    return {0, model->parameter_rows[size_t(row)].file_size(),
            model->snapshot + snapshot_index(group) * model->parameters +
                tensor_offset(model, row, layer)};
}

// ==== ranks ======================================================================================

// Threads share the work of one machine, and a process of a job could add nothing to them.
std::string gpt2_alone() {
    return "the CPU program trains in one process, with --threads; several ranks are for "
           "train_gpt2cu";
}
void gpt2_select_device(int, bool) {}
std::string gpt2_job_id() { fail_input("%s", gpt2_alone().c_str()); }
void gpt2_join(GPT2*, const std::string&) { fail_input("%s", gpt2_alone().c_str()); }
void gpt2_share(GPT2*) {}

// ==== gpt2_forward ===============================================================================

// The second half of block l up to its last product, from the residual stream between the halves:
// residual2 = inp + dropout(branch);  fch_gelu = gelu(fc(ln2(residual2))).
template <class Float>
static void mlp_forward(const GPT2* model, const real* inp, int l, int B, int T) {
    ParameterPointers<const Float> p = model->parameters_of<Float>(l);
    Activations<Float> a = model->activations_of<Float>(l);
    int C = model->config.channels, F = model->config.hidden_size();
    residual_layernorm_forward(a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, inp, a.branch, p.ln2w,
                               p.ln2b, model->config.layer_norm_epsilon,
                               model->dropout(RandomUse::attention_projection, l), B, T, C);
    matmul_gelu_forward(a.fch_gelu, a.fch, a.ln2, model->weights(p.fcw, k_fcw, l), p.fcb, B * T, C,
                        F);
}

// Block l up to its last product, whose input ln1 is there: branch = attproj(attention(ln1)), then
// the MLP. inp (B,T,C) is the residual stream.
template <class Float>
static void block_forward(const GPT2* model, const real* inp, int l, int B, int T) {
    ParameterPointers<const Float> p = model->parameters_of<Float>(l);
    Activations<Float> a = model->activations_of<Float>(l);
    int C = model->config.channels, NH = model->config.heads, BT = B * T;
    matmul_forward(a.qkv, a.ln1, model->weights(p.qkvw, k_qkvw, l), p.qkvb, BT, C, 3 * C);
    attention_forward(a.atty, a.logsumexp, a.qkv, a.att_scratch,
                      model->dropout(RandomUse::attention, l), B, T, C, NH);
    matmul_forward(a.branch, a.atty, model->weights(p.attprojw, k_attprojw, l), p.attprojb, BT, C,
                   C);
    mlp_forward<Float>(model, inp, l, B, T);
}

// The end of block l: residual3 = residual2 + dropout(fcproj(fch_gelu)), and the layer norm that
// follows it.
template <class Float>
static void block_end_forward(const GPT2* model, int l, int B, int T) {
    ParameterPointers<const Float> p = model->parameters_of<Float>(l);
    Activations<Float> a = model->activations_of<Float>(l);
    auto next = model->norm_before<Float>(l + 1);
    int C = model->config.channels, F = model->config.hidden_size();
    matmul_forward(a.branch, a.fch_gelu, model->weights(p.fcprojw, k_fcprojw, l), p.fcprojb, B * T,
                   F, C);
    residual_layernorm_forward(a.residual3, next.out, next.mean, next.rstd, a.residual2, a.branch,
                               next.weight, next.bias, model->config.layer_norm_epsilon,
                               model->dropout(RandomUse::mlp_projection, l), B, T, C);
}

// The classifier over as many rows of logits at a time as there is memory for, so that (B,T,Vp) is
// never whole. Training also takes its gradient: dnorm, that of lnf, is written; that of the
// classifier's weight accumulates, but the first rows after gpt2_zero_gradients write it. Other
// passes are after losses and logits alone, and have them in all digits of `real`: those of a
// trained model may all lie near -100, where numbers in bf16 are 0.5 apart.
template <class Float, class Logit>
static void head_forward(GPT2* model, const int* targets, const GPT2Pass& pass) {
    const GPT2Config& config = model->config;
    ParameterPointers<const Float> p = model->parameters_of<Float>(0);
    ParameterPointers<real> d = model->gradients_of(0);
    Activations<Float> a = model->activations_of<Float>(0);
    int C = config.channels, V = config.vocab_size, Vp = config.padded_vocab(),
        BT = model->B * model->T;
    const Float* weight = config.tied ? p.wte : p.headw;
    real* dweight = config.tied ? d.wte : d.headw;
    auto* logits = reinterpret_cast<Logit*>(a.logits);
    size_t bytes = model->activation_rows[a_logits].bytes(model->shape.dtype);
    int held = int(bytes / (sizeof(Logit) * size_t(Vp)));
    for (int first = 0; first < BT; first += held) {
        int rows = std::min(held, BT - first);
        const Float* lnf = a.lnf + size_t(first) * C;
        matmul_forward<Float>(logits, lnf, model->head_weights<Float>(), nullptr, rows, C, Vp);
        if (pass.logits != nullptr)
            for (int bt = 0; bt < rows; bt++)
                std::copy(logits + size_t(bt) * Vp, logits + size_t(bt) * Vp + V,
                          pass.logits + size_t(first + bt) * V);
        if (targets == nullptr) continue;
        classifier_forward(a.losses + first, logits, targets + first, pass.loss_scale,
                           pass.training, rows, V, Vp);
        if (pass.training)
            matmul_backward<Float>(a.dnorm + size_t(first) * C, dweight, nullptr, a.logits, lnf,
                                   weight, nullptr, model->fresh_head && first == 0, rows, C, Vp);
    }
    if (pass.training) model->fresh_head = false;
    if (targets == nullptr) return;
    double sum = 0;
    for (int bt = 0; bt < BT; bt++) sum += double(a.losses[bt]);
    model->loss += sum * pass.loss_scale;
}

// Scratch memory is there for as many threads as the model has; OpenMP's setting, which belongs to
// the calling thread, may by now be another model's.
static void use_threads(const GPT2* model) { omp_set_num_threads(model->shape.threads); }

template <class Float>
static void model_forward(GPT2* model, const int* inputs, const int* targets, int B, int T,
                          const GPT2Pass& pass) {
    const GPT2Config& config = model->config;
    ParameterPointers<const Float> p = model->parameters_of<Float>(0);
    Activations<Float> a = model->activations_of<Float>(0);
    int C = config.channels;
    model->B = B, model->T = T, model->inputs = inputs, model->pass = pass;
    encoder_forward(a.encoded, inputs, p.wte, p.wpe, B, T, C);
    Dropout dropout = model->dropout(RandomUse::encoder, 0);
    if (dropout.probability > 0) dropout_forward(a.encoded, a.encoded, dropout, B, T, C);
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.encoded, p.ln1w, p.ln1b,
                      config.layer_norm_epsilon, B, T, C);
    for (int l = 0; l < config.layers; l++) {
        block_forward<Float>(model, model->block_input<Float>(l), l, B, T);
        block_end_forward<Float>(model, l, B, T);
    }
    if (pass.training) head_forward<Float, Float>(model, targets, pass);
    else head_forward<Float, real>(model, targets, pass);
}

void gpt2_forward(GPT2* model, const int* inputs, const int* targets, int B, int T,
                  const GPT2Pass& pass) {
    assert(B >= 1 && B <= model->shape.B && T >= 1 && T <= model->shape.T);
    assert(!pass.training || (model->shape.training && targets != nullptr));
    use_threads(model);
    with_type(model->shape.dtype,
              [&]<class Float>() { model_forward<Float>(model, inputs, targets, B, T, pass); });
}

// What is generated at a time: n new tokens at `position` of B sequences, from `sequence` of the
// cache on.
struct NewTokens {
    int sequence, B, n, position;
};

// Block l, as block_forward does it, over the new tokens alone, with keys and values of the earlier
// ones from the cache.
template <class Float>
static void block_generate(const GPT2* model, const real* inp, int l, const NewTokens& now) {
    ParameterPointers<const Float> p = model->parameters_of<Float>(l);
    Activations<Float> a = model->activations_of<Float>(l);
    const GPT2Config& config = model->config;
    int C = config.channels, rows = now.B * now.n;
    size_t cached = size_t(now.sequence) * size_t(config.context) * size_t(C);
    matmul_forward(a.qkv, a.ln1, model->weights(p.qkvw, k_qkvw, l), p.qkvb, rows, C, 3 * C);
    attention_cached_forward(a.atty, a.key_cache + cached, a.value_cache + cached, a.qkv,
                             a.att_scratch, now.B, now.n, now.position, config.context, C,
                             config.heads);
    matmul_forward(a.branch, a.atty, model->weights(p.attprojw, k_attprojw, l), p.attprojb, rows, C,
                   C);
    mlp_forward<Float>(model, inp, l, now.B, now.n);
}

// From tokens (B,n), whose sequences lie `stride` apart, to the classifier's layer norm of the last
// of each, in a.branch (B,C).
template <class Float>
static void tokens_generate(GPT2* model, const int* tokens, int stride, const NewTokens& now) {
    const GPT2Config& config = model->config;
    ParameterPointers<const Float> p = model->parameters_of<Float>(0);
    Activations<Float> a = model->activations_of<Float>(0);
    int C = config.channels;
    std::vector<int> inputs;
    for (int b = 0; b < now.B; b++) {
        const int* tokens_b = tokens + size_t(b) * size_t(stride);
        inputs.insert(inputs.end(), tokens_b, tokens_b + now.n);
    }
    encoder_forward(a.encoded, inputs.data(), p.wte, p.wpe + size_t(now.position) * C, now.B, now.n,
                    C);
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.encoded, p.ln1w, p.ln1b,
                      config.layer_norm_epsilon, now.B, now.n, C);
    for (int l = 0; l < config.layers; l++) {
        block_generate<Float>(model, model->block_input<Float>(l), l, now);
        block_end_forward<Float>(model, l, now.B, now.n);
    }
    for (int b = 0; b < now.B; b++) {
        const Float* last = a.lnf + (size_t(b) * now.n + now.n - 1) * C;
        std::copy(last, last + C, a.branch + size_t(b) * C);
    }
}

// One new token goes in of all sequences together, more of them a sequence at a time, as one
// product of up to T rows: so no row's bits depend on how many sequences there are.
template <class Float>
static void model_generate(GPT2* model, const int* tokens, int B, int n, int position,
                           real* logits) {
    const GPT2Config& config = model->config;
    Activations<Float> a = model->activations_of<Float>(0);
    int C = config.channels, V = config.vocab_size;
    model->pass = GPT2Pass{};
    int together = n == 1 ? std::min(B, kClassifierRows) : 1;
    for (int first = 0; first < B; first += together) {
        int rows = std::min(together, B - first);
        for (int done = 0; done < n; done += model->shape.T) {
            NewTokens now = {first, rows, std::min(model->shape.T, n - done), position + done};
            tokens_generate<Float>(model, tokens + size_t(first) * n + done, n, now);
        }
        matmul_forward<Float>(logits + size_t(first) * V, a.branch, model->head_weights<Float>(),
                              nullptr, rows, C, V);
    }
}

void gpt2_generate(GPT2* model, const int* tokens, int B, int n, int position, real* logits) {
    assert(B >= 1 && B <= model->shape.generate && B <= model->shape.B * model->shape.T);
    assert(n >= 1 && position >= 0 && position + n <= model->config.context);
    use_threads(model);
    with_type(model->shape.dtype,
              [&]<class Float>() { model_generate<Float>(model, tokens, B, n, position, logits); });
}

void gpt2_copy_cache(GPT2* model, int from, int to, int n) {
    const GPT2Config& config = model->config;
    int most = model->shape.generate, NH = config.heads;
    assert(from >= 0 && from < most && to >= 0 && to < most && from != to);
    assert(n >= 0 && n <= config.context);
    auto HS = size_t(config.head_size()), head = size_t(config.context) * HS;
    with_type(model->shape.dtype, [&]<class Float>() {
#pragma omp parallel for collapse(2) schedule(static)
        for (int l = 0; l < config.layers; l++) {
            for (int h = 0; h < NH; h++) {
                Activations<Float> a = model->activations_of<Float>(l);
                for (Float* cache : {a.key_cache, a.value_cache})
                    std::copy_n(cache + (size_t(from) * NH + h) * head, size_t(n) * HS,
                                cache + (size_t(to) * NH + h) * head);
            }
        }
    });
}

// ==== gpt2_backward ==============================================================================

// The gradient that enters a branch behind its dropout, as products read it: dresidual itself where
// it is of their type and nothing is dropped.
template <class Float>
static const Float* branch_gradient(const GPT2* model, const Activations<Float>& a, RandomUse use,
                                    int l) {
    Dropout dropout = model->dropout(use, l);
    int C = model->config.channels;
    size_t N = size_t(model->B) * size_t(model->T) * size_t(C);
    if (dropout.probability > 0) {
        dropout_forward(a.dbranch, a.dresidual, dropout, model->B, model->T, C);
    } else if constexpr (std::is_same_v<Float, real>) {
        return a.dresidual;
    } else {
#pragma omp parallel for simd schedule(static)
        for (size_t i = 0; i < N; i++) a.dbranch[i] = a.dresidual[i];
    }
    return a.dbranch;
}

// Computes again what forward did not keep of block l, with the functions that forward used: [Chen
// et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174]. inp is the
// residual stream before the block, which is always kept.
template <class Float>
static void block_recompute(const GPT2* model, const real* inp, int l) {
    ParameterPointers<const Float> p = model->parameters_of<Float>(l);
    Activations<Float> a = model->activations_of<Float>(l);
    const GPT2Config& config = model->config;
    int level = model->shape.recompute, B = model->B, T = model->T, C = config.channels;
    if (level >= 2)
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, inp, p.ln1w, p.ln1b,
                          config.layer_norm_epsilon, B, T, C);
    if (level >= 3) return block_forward<Float>(model, inp, l, B, T);
    if (level >= 2)
        layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b,
                          config.layer_norm_epsilon, B, T, C);
    if (level >= 1) gelu_forward(a.fch_gelu, a.fch, size_t(B) * T * config.hidden_size());
}

// forward: inp -> residual2 = inp + attproj(...) -> residual3 = residual2 + fcproj(...)
// a.dresidual is the gradient of residual3 on entry and of inp on exit.
template <class Float>
static void block_backward(const GPT2* model, const real* inp, int l) {
    ParameterPointers<const Float> p = model->parameters_of<Float>(l);
    ParameterPointers<real> d = model->gradients_of(l);
    Activations<Float> a = model->activations_of<Float>(l);
    int B = model->B, T = model->T, BT = B * T;
    int C = model->config.channels, F = model->config.hidden_size(), NH = model->config.heads;
    bool fresh = model->fresh_blocks;

    const Float* dbranch = branch_gradient(model, a, RandomUse::mlp_projection, l);
    gelu_matmul_backward(a.dfch, d.fcprojw, d.fcprojb, dbranch, a.fch_gelu, a.fch, p.fcprojw,
                         a.reduce_scratch, fresh, BT, F, C);
    matmul_backward(a.dnorm, d.fcw, d.fcb, a.dfch, a.ln2, p.fcw, a.reduce_scratch, fresh, BT, C, F);
    layernorm_backward(a.dresidual, d.ln2w, d.ln2b, a.dnorm, a.residual2, p.ln2w, a.ln2_mean,
                       a.ln2_rstd, a.reduce_scratch, B, T, C);

    dbranch = branch_gradient(model, a, RandomUse::attention_projection, l);
    matmul_backward(a.datty, d.attprojw, d.attprojb, dbranch, a.atty, p.attprojw, a.reduce_scratch,
                    fresh, BT, C, C);
    attention_backward(a.dqkv, a.datty, a.qkv, a.atty, a.logsumexp, a.att_scratch,
                       model->dropout(RandomUse::attention, l), B, T, C, NH);
    matmul_backward(a.dnorm, d.qkvw, d.qkvb, a.dqkv, a.ln1, p.qkvw, a.reduce_scratch, fresh, BT, C,
                    3 * C);
    layernorm_backward(a.dresidual, d.ln1w, d.ln1b, a.dnorm, inp, p.ln1w, a.ln1_mean, a.ln1_rstd,
                       a.reduce_scratch, B, T, C);
}

template <class Float>
static void model_backward(GPT2* model) {
    const GPT2Config& config = model->config;
    ParameterPointers<const Float> p = model->parameters_of<Float>(0);
    ParameterPointers<real> d = model->gradients_of(0);
    Activations<Float> a = model->activations_of<Float>(0);
    int B = model->B, T = model->T, C = config.channels, L = config.layers;
    std::fill(a.dresidual, a.dresidual + size_t(B) * T * C, real(0));
    layernorm_backward(a.dresidual, d.lnfw, d.lnfb, a.dnorm, model->block_input<Float>(L), p.lnfw,
                       a.lnf_mean, a.lnf_rstd, a.reduce_scratch, B, T, C);
    for (int l = L - 1; l >= 0; l--) {
        block_recompute<Float>(model, model->block_input<Float>(l), l);
        block_backward<Float>(model, model->block_input<Float>(l), l);
    }
    model->fresh_blocks = false;
    Dropout dropout = model->dropout(RandomUse::encoder, 0);
    if (dropout.probability > 0) dropout_forward(a.dresidual, a.dresidual, dropout, B, T, C);
    encoder_backward(d.wte, d.wpe, a.dresidual, model->inputs, B, T, C);
}

void gpt2_backward(GPT2* model) {
    assert(model->pass.training);
    use_threads(model);
    with_type(model->shape.dtype, [&]<class Float>() { model_backward<Float>(model); });
}

// ==== gpt2_update ================================================================================

// What the pass that follows writes is not zeroed: see FreshGradients.
void gpt2_zero_gradients(GPT2* model) {
    model->loss = 0;
    if (!model->shape.training) return;
    model->fresh_head = model->fresh_blocks = true;
    zero_gradient_rows(
        model, [](FreshGradients written_by) { return written_by == FreshGradients::nothing; });
}

void gpt2_update(GPT2* model, const AdamW& adamw) {
    auto [params, grads, m, v] = model->groups;
    bf16* narrow = model->narrow_parameters;
    settle_gradients(model);
    double grad_norm = global_norm(grads, model->parameters);
    gpt2_snapshot_wait(model);  // what it copies is about to change
    bool finite = std::isfinite(grad_norm) && std::isfinite(model->loss);
    double grad_scale =
        adamw.grad_clip > 0 ? std::min(1.0, adamw.grad_clip / (grad_norm + 1e-6)) : 1;
    size_t offset = 0;
    for (const ParameterRow& row : model->parameter_rows) {
        size_t N = row.size() * row.count;
        double weight_decay = row.decays ? adamw.weight_decay : 0;
        if (finite && narrow != nullptr)
            adamw_update(params + offset, narrow + offset, m + offset, v + offset, grads + offset,
                         N, adamw, weight_decay, grad_scale);
        else if (finite)
            adamw_update(params + offset, m + offset, v + offset, grads + offset, N, adamw,
                         weight_decay, grad_scale);
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

// What Linux says of a `property` of the processor, "" where it does not.
static std::string processor_property(const std::string& property) {
    std::string line;
    std::ifstream file("/proc/cpuinfo");
    while (std::getline(file, line)) {
        size_t colon = line.find(':'), end = line.find_last_not_of(" \t", colon - 1);
        if (colon + 2 < line.size() && line.substr(0, end + 1) == property)
            return line.substr(colon + 2);
    }
    return "";
}

static std::string processor_name() {
    std::string name = processor_property("model name");
    return name.empty() ? "CPU" : name;
}

#ifdef GPT2_ONEDNN

// Seconds of the fastest of a few products of the size of a block of GPT-2 124M.
template <class Float>
static double product_seconds(int tries) {
    constexpr int M = 128, N = 768, K = 768;
    static const std::vector<Float> a(size_t(M) * K, Float(1)), b(size_t(N) * K, Float(1));
    static std::vector<Float> c(size_t(M) * N);
    double best = INFINITY;
    for (int i = 0; i < tries; i++) {
        double start = now_s();
        matmul_forward<Float>(c.data(), a.data(), b.data(), nullptr, M, K, N);
        best = std::min(best, now_s() - start);
    }
    return best;
}

// Whether products in bf16 are clearly faster, by some milliseconds of each type in turns.
static bool bf16_products_are_faster() {
    constexpr double kClearly = 1.25;
    double fp32_s = INFINITY, bf16_s = INFINITY;
    for (int turn = 0; turn < 3; turn++) {
        fp32_s = std::min(fp32_s, product_seconds<real>(2));
        bf16_s = std::min(bf16_s, product_seconds<bf16>(2));
    }
    return fp32_s > kClearly * bf16_s;
}

#endif

// What --dtype auto stands for: float32 where oneDNN has no instructions for products in bf16, bf16
// with AMX, and with those of AVX-512 alone what was faster when this processor was first asked,
// so that every run makes the same choice.
static Dtype fastest_dtype() {
#ifdef GPT2_ONEDNN
    auto has = [](dnnl::cpu_isa wanted) {
        return (unsigned(dnnl::get_effective_cpu_isa()) & unsigned(wanted)) == unsigned(wanted);
    };
    if (sizeof(real) != 4 || !has(dnnl::cpu_isa::avx512_core_bf16)) return Dtype::fp32;
    if (has(dnnl::cpu_isa::avx512_core_amx)) return Dtype::bf16;
    std::string folder = user_cache_folder(), name = processor_name();
    for (const char* property : {"cpu family", "model"})  // a virtual machine's name may be any's
        name += " " + processor_property(property);
    const dnnl_version_t* library = dnnl_version();
    name += format(", oneDNN %d.%d.%d", library->major, library->minor, library->patch);
    std::replace(name.begin(), name.end(), '/', '_');
    std::string path = folder + "/dtype of " + name;
    std::string kept = folder.empty() ? "" : first_line(path);
    if (kept == "bf16" || kept == "fp32") return kept == "bf16" ? Dtype::bf16 : Dtype::fp32;
    Dtype fastest = bf16_products_are_faster() ? Dtype::bf16 : Dtype::fp32;
    try {
        if (!folder.empty()) {
            make_folder(folder);
            write_file_atomic(path, std::string(dtype_name(fastest)) + "\n");
        }
    } catch (const Error&) {}  // it is measured again next time
    return fastest;
#else
    return Dtype::fp32;
#endif
}

Dtype gpt2_dtype(const std::string& option) {
    if (option != "auto") return option == "bf16" ? Dtype::bf16 : Dtype::fp32;
    static const Dtype fastest = fastest_dtype();
    return fastest;
}

std::string gpt2_device() {
    std::string name = processor_name();
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
        with_type(shape.dtype, [&]<class Float>() {
            std::vector<Float> a(size_t(N) * size_t(N), Float(1)), b = a, c = a;
            for (int i = 0; i < kTries; i++) {
                double start = now_s();
                matmul_forward<Float>(c.data(), a.data(), b.data(), nullptr, N, N, N);
                best = std::max(best, operations / (now_s() - start));
            }
        });
    }
    return {best, "measured"};
}

// ==== main =======================================================================================

#ifndef GPT2_MODEL_ONLY
// OpenMP's threads wait for each other by spinning, for milliseconds, unless the environment says
// otherwise before the program starts. Where other programs want the cores too, they then burn the
// time that the thread they wait for needs: steps took seven times as long on two busy cores. So
// the program starts itself once more with a short spin, which costs nothing where cores are free.
static void shorten_waits(char** argv) {
    if (getenv("GOMP_SPINCOUNT") != nullptr || getenv("OMP_WAIT_POLICY") != nullptr) return;
    setenv("GOMP_SPINCOUNT", "3000", 0);
    setenv("KMP_BLOCKTIME", "1", 0);  // milliseconds, of clang++'s OpenMP
    execv("/proc/self/exe", argv);    // where that fails, it goes on as it is
}

#    ifdef __x86_64__
// Ends the program on a processor that lacks instructions of the one that it was built for, before
// anything uses them.
__attribute__((constructor(101), target("no-avx"))) static void refuse_other_processor() {
    __builtin_cpu_init();
    bool runs = true;
#        ifdef __AVX2__
    runs = runs && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#        endif
#        ifdef __AVX512F__
    runs = runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#        endif
#        ifdef __AVX512BF16__
    runs = runs && __builtin_cpu_supports("avx512bf16");
#        endif
    if (runs) return;
    static const char kWhy[] =
        "error: this program was built for another processor, whose instructions this one lacks: "
        "build it here (make clean, make), or for both with ARCH=-march=x86-64-v3\n";
    [[maybe_unused]] ssize_t written = write(STDERR_FILENO, kWhy, sizeof(kWhy) - 1);
    _exit(kExitMachine);
}
#    endif

// Weak: the tests, which are linked with this file, have a main of their own.
__attribute__((weak)) int main(int argc, char** argv) {
    shorten_waits(argv);
    return run(argc, argv);
}
#endif
