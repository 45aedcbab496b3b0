// cuBLASLt's prototypes, defined on the CPU: descriptors, heuristics, and the product with its
// epilogues. What the real library documents as refused is refused with the same status; a product
// that is refused also says why on stderr, as nothing in this project expects it to be.
//
// Matrices are column-major. D (m,n) = epilogue(alpha A' B' + beta C), A' (m,k), B' (k,n). Operands
// are unpacked once, to float, into panels of kRows rows of A'; the inner loop sums runs of k in
// order, so that a result depends on nothing but its operands and the algorithm:
//   0  the whole sum in order; no workspace
//   1  two halves of k, summed apart in the workspace, then added
//   2  three parts of k, each added to D in place, in an order that changes from call to call, as
//      the place of blocks on a card may: what must repeat bitwise must not choose it

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "internal.h"

namespace emu {

namespace {

// ==== descriptors ================================================================================

constexpr size_t kMostAlignment = 256;  // that a pointer can promise, and of the workspace
constexpr size_t kVector = 16;          // bytes that the fast kernels move at once

struct Operation {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    cublasLtPointerMode_t pointer_mode = CUBLASLT_POINTER_MODE_HOST;
    cublasOperation_t trans_a = CUBLAS_OP_N, trans_b = CUBLAS_OP_N;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    void *bias = nullptr, *aux = nullptr;
    int64_t aux_ld = 0;
    int32_t bias_type = -1, aux_type = -1;  // -1: that of D
};

struct Layout {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
    cublasLtOrder_t order = CUBLASLT_ORDER_COL;
    int32_t batch = 1;
    int64_t stride = 0;
};

struct Preference {
    uint32_t search_mode = 0;
    uint64_t workspace = 0;
    uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
    std::array<uint32_t, 4> alignment = {kMostAlignment, kMostAlignment, kMostAlignment,
                                         kMostAlignment};  // of A, B, C, D
};

constexpr uint32_t kMagic = 0x454d554cu;

// What the 64 bytes of cublasLtMatmulAlgo_t hold.
struct Algorithm {
    uint32_t magic, version;
    uint32_t id, reduction;
    int32_t splits;
    std::array<uint32_t, 4> alignment;  // of A, B, C, D, which it was chosen for
    uint32_t unused[7];
};
static_assert(sizeof(Algorithm) == sizeof(cublasLtMatmulAlgo_t));

struct Problem {
    const Operation& op;
    const Layout &a, &b, &c, &d;
    size_t m() const { return size_t(d.rows); }
    size_t n() const { return size_t(d.cols); }
    size_t k() const { return size_t(op.trans_a == CUBLAS_OP_N ? a.cols : a.rows); }
};

// What a product owns.
struct Kept {
    Operation op;
    Layout a, b, c, d;
};

size_t bytes_of(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

bool adds_bias(cublasLtEpilogue_t e) {
    return e == CUBLASLT_EPILOGUE_BIAS || e == CUBLASLT_EPILOGUE_GELU_BIAS ||
           e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}
bool writes_bias(cublasLtEpilogue_t e) {
    return e == CUBLASLT_EPILOGUE_DGELU_BGRAD || e == CUBLASLT_EPILOGUE_BGRADA ||
           e == CUBLASLT_EPILOGUE_BGRADB;
}
bool writes_aux(cublasLtEpilogue_t e) {
    return e == CUBLASLT_EPILOGUE_GELU_AUX || e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
}
bool reads_aux(cublasLtEpilogue_t e) {
    return e == CUBLASLT_EPILOGUE_DGELU || e == CUBLASLT_EPILOGUE_DGELU_BGRAD;
}
bool has_gelu(cublasLtEpilogue_t e) {
    return writes_aux(e) || e == CUBLASLT_EPILOGUE_GELU || e == CUBLASLT_EPILOGUE_GELU_BIAS;
}
bool is_known(cublasLtEpilogue_t e) {
    return e == CUBLASLT_EPILOGUE_DEFAULT || adds_bias(e) || writes_bias(e) || reads_aux(e) ||
           has_gelu(e);
}
size_t bias_length(const Problem& p) {
    return p.op.epilogue == CUBLASLT_EPILOGUE_BGRADB ? p.n() : p.m();
}

// ==== what is refused ============================================================================

// A status and why.
struct Verdict {
    cublasStatus_t status;
    char why[256];
};

__attribute__((format(printf, 2, 3))) Verdict verdict(cublasStatus_t status, const char* pattern,
                                                      ...) {
    Verdict v = {status, ""};
    va_list args;
    va_start(args, pattern);
    vsnprintf(v.why, sizeof(v.why), pattern, args);
    va_end(args);
    return v;
}

const Verdict kFine = {CUBLAS_STATUS_SUCCESS, ""};

Verdict check_types(const Problem& p) {
    for (const Layout* l : {&p.a, &p.b, &p.c, &p.d})
        if (l->type != CUDA_R_32F && l->type != CUDA_R_16BF)
            return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "a matrix of type %d", int(l->type));
    if (p.a.type != p.b.type || p.c.type != p.d.type)
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "A and B, or C and D, differ in type");
    if (p.a.type == CUDA_R_32F && p.d.type != CUDA_R_32F)
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "bf16 made of float32 matrices");
    if (p.op.scale != CUDA_R_32F)
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "alpha and beta not of type float32");
    bool tf32 = p.op.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
    if (p.op.compute != CUBLAS_COMPUTE_32F && !(tf32 && p.a.type == CUDA_R_32F))
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "compute type %d for matrices of type %d",
                       int(p.op.compute), int(p.a.type));
    return kFine;
}

Verdict check_shapes(const Problem& p) {
    bool a_plain = p.op.trans_a == CUBLAS_OP_N, b_plain = p.op.trans_b == CUBLAS_OP_N;
    if ((!a_plain && p.op.trans_a != CUBLAS_OP_T) || (!b_plain && p.op.trans_b != CUBLAS_OP_T))
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "a transposition of another kind than N and T");
    for (const Layout* l : {&p.a, &p.b, &p.c, &p.d}) {
        if (l->order != CUBLASLT_ORDER_COL)
            return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "a layout that is not column-major");
        if (l->rows == 0 || l->cols == 0)
            return verdict(CUBLAS_STATUS_INVALID_VALUE, "an empty matrix");
        if (l->ld < int64_t(l->rows))
            return verdict(CUBLAS_STATUS_INVALID_VALUE,
                           "leading dimension %lld below the %llu rows",
                           static_cast<long long>(l->ld), static_cast<unsigned long long>(l->rows));
        if (l->batch != p.d.batch || l->batch < 1)
            return verdict(CUBLAS_STATUS_INVALID_VALUE, "batch counts that differ");
    }
    uint64_t a_rows = a_plain ? p.a.rows : p.a.cols, b_rows = b_plain ? p.b.rows : p.b.cols;
    uint64_t b_cols = b_plain ? p.b.cols : p.b.rows;
    if (a_rows != p.d.rows || b_cols != p.d.cols || b_rows != p.k() || p.c.rows != p.d.rows ||
        p.c.cols != p.d.cols)
        return verdict(
            CUBLAS_STATUS_INVALID_VALUE,
            "shapes that do not fit: A' (%llu,%zu) B' (%llu,%llu) D (%llu,%llu)",
            static_cast<unsigned long long>(a_rows), p.k(), static_cast<unsigned long long>(b_rows),
            static_cast<unsigned long long>(b_cols), static_cast<unsigned long long>(p.d.rows),
            static_cast<unsigned long long>(p.d.cols));
    return kFine;
}

// `alignment`: what the pointers of A, B, C, D promise.
Verdict check_epilogue(const Problem& p, const std::array<uint32_t, 4>& alignment) {
    cublasLtEpilogue_t e = p.op.epilogue;
    if (!is_known(e)) return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "epilogue %d", int(e));
    if (e != CUBLASLT_EPILOGUE_DEFAULT && p.d.batch > 1)
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "an epilogue of a batch");
    if (adds_bias(e) || writes_bias(e)) {
        if (p.op.bias == nullptr)
            return verdict(CUBLAS_STATUS_INVALID_VALUE,
                           "an epilogue with a bias whose pointer is null");
        if (p.op.bias_type != -1 && p.op.bias_type != int32_t(p.d.type))
            return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "a bias of another type than D");
    }
    if (writes_aux(e) || reads_aux(e)) {
        if (p.op.aux == nullptr)
            return verdict(CUBLAS_STATUS_INVALID_VALUE, "an epilogue whose aux pointer is null");
        if (p.op.aux_type != -1 && p.op.aux_type != int32_t(p.d.type))
            return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "an aux matrix of another type than D");
        if (p.op.aux_ld < int64_t(p.m()) || p.op.aux_ld % 8 != 0)
            return verdict(
                CUBLAS_STATUS_NOT_SUPPORTED,
                "an aux leading dimension of %lld for %zu rows: it must be a multiple of "
                "8, and no less",
                static_cast<long long>(p.op.aux_ld), p.m());
        if (reinterpret_cast<uintptr_t>(p.op.aux) % kVector != 0)
            return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "an aux pointer not aligned to 16 bytes");
    }
    // Kernels with more than a bias to do exist for whole vectors only.
    if (e == CUBLASLT_EPILOGUE_DEFAULT || e == CUBLASLT_EPILOGUE_BIAS) return kFine;
    const Layout* layouts[] = {&p.a, &p.b, &p.c, &p.d};
    for (size_t i = 0; i < 4; i++)
        if (alignment[i] % kVector != 0 ||
            size_t(layouts[i]->ld) * bytes_of(layouts[i]->type) % kVector != 0)
            return verdict(CUBLAS_STATUS_NOT_SUPPORTED,
                           "an epilogue on columns not aligned to 16 bytes");
    return kFine;
}

Verdict check_problem(const Problem& p, const std::array<uint32_t, 4>& alignment) {
    if (Verdict v = check_types(p); v.status != CUBLAS_STATUS_SUCCESS) return v;
    if (Verdict v = check_shapes(p); v.status != CUBLAS_STATUS_SUCCESS) return v;
    if (p.op.pointer_mode != CUBLASLT_POINTER_MODE_HOST)
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "alpha and beta on the device");
    return check_epilogue(p, alignment);
}

// ==== algorithms =================================================================================

constexpr uint32_t kAlgorithms = 3;

Algorithm make_algorithm(uint32_t id, const std::array<uint32_t, 4>& alignment) {
    constexpr uint32_t kReductions[] = {CUBLASLT_REDUCTION_SCHEME_NONE,
                                        CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
                                        CUBLASLT_REDUCTION_SCHEME_INPLACE};
    return {kMagic, uint32_t(CUBLAS_VERSION), id, kReductions[id], int32_t(id) + 1, alignment, {}};
}

size_t workspace_of(const Algorithm& algorithm, const Problem& p) {
    size_t outputs = p.m() * p.n() * size_t(p.d.batch);
    if (algorithm.id == 0) return 0;
    return algorithm.id == 1 ? outputs * sizeof(float) * 2 : (outputs + 1023) / 1024 * 4;
}

// Whether the algorithm can do this product.
Verdict check_algorithm(const Algorithm& algorithm, const Problem& p) {
    if (algorithm.magic != kMagic || algorithm.version != CUBLAS_VERSION ||
        algorithm.id >= kAlgorithms)
        return verdict(CUBLAS_STATUS_INVALID_VALUE,
                       "an algorithm that is not of this version of the library");
    for (uint32_t alignment : algorithm.alignment)
        if (alignment == 0 || alignment > kVector || (alignment & (alignment - 1)) != 0)
            return verdict(CUBLAS_STATUS_INVALID_VALUE, "an algorithm that is damaged");
    Algorithm whole = make_algorithm(algorithm.id, algorithm.alignment);
    if (algorithm.splits != whole.splits || algorithm.reduction != whole.reduction)
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "a configuration that the algorithm lacks");
    if (p.k() < size_t(algorithm.splits))
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED, "more parts of k than k");
    bool plain = p.op.epilogue == CUBLASLT_EPILOGUE_DEFAULT && p.d.type == CUDA_R_32F;
    if (algorithm.id == 2 && !plain)
        return verdict(CUBLAS_STATUS_NOT_SUPPORTED,
                       "a reduction in place with an epilogue or bf16");
    return check_epilogue(p, algorithm.alignment);
}

Algorithm unpack(const cublasLtMatmulAlgo_t& algo) {
    Algorithm algorithm;
    memcpy(&algorithm, &algo, sizeof(algorithm));
    return algorithm;
}

cublasLtMatmulAlgo_t pack(const Algorithm& algorithm) {
    cublasLtMatmulAlgo_t algo;
    memcpy(&algo, &algorithm, sizeof(algo));
    return algo;
}

// ==== products ===================================================================================

constexpr size_t kRows = 32, kCols = 6;  // of D that the inner loop keeps in registers
constexpr size_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

float from_bf16(uint16_t bits) { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

// To the nearest, ties to even; NaN stays NaN.
uint16_t to_bf16(float x) {
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// The nearest number with 10 bits behind the point, ties away from zero.
float to_tf32(float x) {
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return x;
    return __builtin_bit_cast(float, (bits + 0x1000u) & ~0x1fffu);
}

float read(const void* p, cudaDataType_t type, size_t i) {
    return type == CUDA_R_32F ? static_cast<const float*>(p)[i]
                              : from_bf16(static_cast<const uint16_t*>(p)[i]);
}

void write(void* p, cudaDataType_t type, size_t i, float x) {
    if (type == CUDA_R_32F) static_cast<float*>(p)[i] = x;
    else static_cast<uint16_t*>(p)[i] = to_bf16(x);
}

float to_float(float x) { return x; }
float to_float(uint16_t x) { return from_bf16(x); }

// out (outer, inner) = the operand, whose columns, `ld` apart, are its outer or its inner index. In
// squares, so that neither side jumps from one cache line to another all the time.
template <class Number>
void unpack_as(float* out, const Number* from, size_t ld, size_t outer, size_t inner,
               bool outer_is_column, bool tf32) {
    constexpr size_t kSquare = 32;
    size_t outer_step = outer_is_column ? ld : 1, inner_step = outer_is_column ? 1 : ld;
    for (size_t o0 = 0; o0 < outer; o0 += kSquare) {
        size_t o1 = std::min(outer, o0 + kSquare);
        for (size_t i0 = 0; i0 < inner; i0 += kSquare) {
            size_t i1 = std::min(inner, i0 + kSquare);
            for (size_t o = o0; o < o1; o++)
                for (size_t i = i0; i < i1; i++)
                    out[o * inner + i] = to_float(from[o * outer_step + i * inner_step]);
        }
    }
    if (!tf32) return;
    for (size_t i = 0; i < outer * inner; i++) out[i] = to_tf32(out[i]);
}

void unpack_operand(std::vector<float>* out, const void* from, const Layout& layout, size_t outer,
                    size_t inner, bool outer_is_column, bool tf32) {
    out->resize(outer * inner);
    size_t ld = size_t(layout.ld);
    if (layout.type == CUDA_R_32F)
        unpack_as(out->data(), static_cast<const float*>(from), ld, outer, inner, outer_is_column,
                  tf32);
    else
        unpack_as(out->data(), static_cast<const uint16_t*>(from), ld, outer, inner,
                  outer_is_column, tf32);
}

// Both operands: A' as panels of kRows rows, each (k, kRows), B' as (n, k); both zero-padded.
struct Operands {
    std::vector<float> a, b;
    size_t panels, padded_n;

    Operands(const Problem& p, const void* A, const void* B) {
        bool tf32 = p.op.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
        size_t m = p.m(), n = p.n(), k = p.k();
        std::vector<float> flat;
        unpack_operand(&flat, A, p.a, k, m, p.op.trans_a == CUBLAS_OP_N, tf32);
        panels = (m + kRows - 1) / kRows;
        a.assign(panels * k * kRows, 0);
        for (size_t panel = 0; panel < panels; panel++) {
            size_t rows = std::min(kRows, m - panel * kRows);
            for (size_t i = 0; i < k; i++)
                memcpy(&a[(panel * k + i) * kRows], &flat[i * m + panel * kRows],
                       rows * sizeof(float));
        }
        unpack_operand(&b, B, p.b, n, k, p.op.trans_b == CUBLAS_OP_N, tf32);
        padded_n = (n + kCols - 1) / kCols * kCols;
        b.resize(padded_n * k, 0);
    }
};

// out (kCols, kRows) = sum over i in [begin, end) of a[i] (kRows) * b[.][i]
void multiply_block(float* out, const float* a, const float* b, size_t k, size_t begin,
                    size_t end) {
    constexpr size_t kVectors = kRows / kLanes;
    Vector sum[kCols][kVectors] = {};
    for (size_t i = begin; i < end; i++) {
        Vector x[kVectors];
        memcpy(x, a + i * kRows, sizeof(x));
#pragma GCC unroll 8
        for (size_t col = 0; col < kCols; col++) {
            float y = b[col * k + i];
#pragma GCC unroll 8
            for (size_t v = 0; v < kVectors; v++) sum[col][v] += x[v] * y;
        }
    }
    memcpy(out, sum, sizeof(sum));
}

// out (n, m) = A' B' over [begin, end) of k, in runs of kRun, as a card's tiles are: one long sum
// would lose more digits than any library's.
void multiply_part(float* out, const Operands& operands, size_t m, size_t n, size_t k, size_t begin,
                   size_t end) {
    constexpr size_t kRun = 64;
    float block[kCols * kRows], total[kCols * kRows];
    for (size_t col = 0; col < n; col += kCols) {
        size_t cols = std::min(kCols, n - col);
        for (size_t panel = 0; panel < operands.panels; panel++) {
            std::fill(total, total + kCols * kRows, 0.0f);
            for (size_t i = begin; i < end; i += kRun) {
                multiply_block(block, &operands.a[panel * k * kRows], &operands.b[col * k], k, i,
                               std::min(i + kRun, end));
                for (size_t j = 0; j < kCols * kRows; j++) total[j] += block[j];
            }
            size_t row = panel * kRows, rows = std::min(kRows, m - row);
            for (size_t c = 0; c < cols; c++)
                memcpy(out + (col + c) * m + row, total + c * kRows, rows * sizeof(float));
        }
    }
}

// The tanh form [Hendrycks and Gimpel 2016, arXiv:1606.08415] and its derivative.
constexpr float kGeluScale = 0.7978845608f, kGeluCube = 0.044715f;

float gelu(float x) { return 0.5f * x * (1 + std::tanh(kGeluScale * (x + kGeluCube * x * x * x))); }

float gelu_slope(float x) {
    float t = std::tanh(kGeluScale * (x + kGeluCube * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kGeluScale * (1 + 3 * kGeluCube * x * x);
}

// One column of D, from what alpha A' B' + beta C gave. bias_sum (m): the gradient of the bias.
void finish_column(const Problem& p, void* D, size_t col, float* values, float* bias_sum) {
    cublasLtEpilogue_t e = p.op.epilogue;
    size_t m = p.m(), aux_at = col * size_t(p.op.aux_ld);
    for (size_t row = 0; row < m; row++) {
        float v = values[row];
        if (adds_bias(e)) v += read(p.op.bias, p.d.type, row);
        if (writes_aux(e)) write(p.op.aux, p.d.type, aux_at + row, v);
        if (has_gelu(e)) v = gelu(v);
        if (reads_aux(e)) v *= gelu_slope(read(p.op.aux, p.d.type, aux_at + row));
        if (e == CUBLASLT_EPILOGUE_DGELU_BGRAD) bias_sum[row] += v;
        write(D, p.d.type, col * size_t(p.d.ld) + row, v);
    }
}

// The gradients of a bias that are sums over k of an operand.
void reduce_operand(const Problem& p, const Operands& operands) {
    size_t k = p.k();
    for (size_t i = 0; i < bias_length(p); i++) {
        float sum = 0;
        for (size_t j = 0; j < k; j++)
            sum += p.op.epilogue == CUBLASLT_EPILOGUE_BGRADB
                       ? operands.b[i * k + j]
                       : operands.a[(i / kRows * k + j) * kRows + i % kRows];
        write(p.op.bias, p.d.type, i, sum);
    }
}

void multiply_one(const Problem& p, const Algorithm& algorithm, float alpha, const void* A,
                  const void* B, float beta, const void* C, void* D) {
    size_t m = p.m(), n = p.n(), k = p.k(), parts = size_t(algorithm.splits);
    Operands operands(p, A, B);
    std::vector<float> sums(m * n), part(parts > 1 ? m * n : 0), bias_sum(m, 0.0f);
    static size_t calls = 0;
    size_t first = algorithm.id == 2 ? calls++ : 0;  // which part comes first
    for (size_t i = 0; i < parts; i++) {
        size_t which = (first + i) % parts;
        float* out = i == 0 ? sums.data() : part.data();
        multiply_part(out, operands, m, n, k, k * which / parts, k * (which + 1) / parts);
        if (i == 0) continue;
        for (size_t j = 0; j < m * n; j++) sums[j] += part[j];
    }
    for (size_t col = 0; col < n; col++) {
        float* values = &sums[col * m];
        for (size_t row = 0; row < m; row++) {
            values[row] *= alpha;
            if (beta != 0) values[row] += beta * read(C, p.c.type, col * size_t(p.c.ld) + row);
        }
        finish_column(p, D, col, values, bias_sum.data());
    }
    if (p.op.epilogue == CUBLASLT_EPILOGUE_DGELU_BGRAD)
        for (size_t row = 0; row < m; row++) write(p.op.bias, p.d.type, row, bias_sum[row]);
    else if (writes_bias(p.op.epilogue)) reduce_operand(p, operands);
}

// ==== pointers ===================================================================================

// The bytes from the first element to the last.
size_t extent(const Layout& l) {
    size_t last = (l.cols - 1) * size_t(l.ld) + l.rows - 1;
    last += size_t(l.batch - 1) * size_t(l.stride);
    return (last + 1) * bytes_of(l.type);
}

struct Range {
    const char* name;
    const void* begin;
    size_t bytes;
    bool writes;
};

// All memory of the product must lie in device allocations, and nothing that is written may overlap
// anything else.
void check_ranges(const std::vector<Range>& ranges) {
    for (const Range& r : ranges) {
        const Allocation* found = find(r.begin);
        if (found == nullptr || found->pinned)
            die("gives a product %s at %p, which is no device memory", r.name, r.begin);
        size_t offset = size_t(static_cast<const char*>(r.begin) - found->begin);
        if (offset + r.bytes > found->bytes)
            die("gives a product %s of %zu bytes at byte %zu of an allocation of %zu bytes", r.name,
                r.bytes, offset, found->bytes);
    }
    for (size_t i = 0; i < ranges.size(); i++) {
        for (size_t j = 0; j < ranges.size(); j++) {
            const Range &w = ranges[i], &r = ranges[j];
            const char *wb = static_cast<const char*>(w.begin),
                       *rb = static_cast<const char*>(r.begin);
            bool same_place = wb == rb && (r.name[0] == 'C' || w.name[0] == 'C');
            if (i == j || !w.writes || same_place) continue;
            if (wb < rb + r.bytes && rb < wb + w.bytes)
                die("gives a product %s and %s in the same memory", w.name, r.name);
        }
    }
}

Verdict check_pointers(const Problem& p, const Algorithm& algorithm, const void* A, const void* B,
                       const void* C, const void* D, const void* workspace,
                       size_t workspace_bytes) {
    const void* pointers[] = {A, B, C, D};
    for (size_t i = 0; i < 4; i++)
        if (reinterpret_cast<uintptr_t>(pointers[i]) % algorithm.alignment[i] != 0)
            return verdict(CUBLAS_STATUS_INVALID_VALUE,
                           "%c at %p, not aligned to the %u bytes that the preference promised",
                           "ABCD"[i], pointers[i], algorithm.alignment[i]);
    if (C == D && p.c.ld != p.d.ld)
        return verdict(CUBLAS_STATUS_INVALID_VALUE, "C in the place of D with another layout");
    size_t needed = workspace_of(algorithm, p);
    if (needed > workspace_bytes || (needed > 0 && workspace == nullptr))
        return verdict(CUBLAS_STATUS_INVALID_VALUE,
                       "a workspace of %zu bytes where the algorithm needs %zu", workspace_bytes,
                       needed);
    if (reinterpret_cast<uintptr_t>(workspace) % kMostAlignment != 0)
        return verdict(CUBLAS_STATUS_INVALID_VALUE, "a workspace not aligned to 256 bytes");
    return kFine;
}

std::vector<Range> ranges_of(const Problem& p, const Algorithm& algorithm, const void* A,
                             const void* B, float beta, const void* C, const void* D,
                             const void* workspace) {
    cublasLtEpilogue_t e = p.op.epilogue;
    std::vector<Range> ranges = {
        {"A", A, extent(p.a), false}, {"B", B, extent(p.b), false}, {"D", D, extent(p.d), true}};
    if (beta != 0) ranges.push_back({"C", C, extent(p.c), false});
    if (adds_bias(e) || writes_bias(e))
        ranges.push_back(
            {"the bias", p.op.bias, bias_length(p) * bytes_of(p.d.type), writes_bias(e)});
    if (writes_aux(e) || reads_aux(e)) {
        size_t count = (p.n() - 1) * size_t(p.op.aux_ld) + p.m();
        ranges.push_back({"aux", p.op.aux, count * bytes_of(p.d.type), writes_aux(e)});
    }
    if (size_t bytes = workspace_of(algorithm, p); bytes > 0)
        ranges.push_back({"its workspace", workspace, bytes, true});
    return ranges;
}

// The value of an attribute, if it has the size that it should.
template <class T>
cublasStatus_t set_attribute(T* to, const void* from, size_t bytes) {
    if (from == nullptr || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(static_cast<void*>(to), from, sizeof(T));
    return CUBLAS_STATUS_SUCCESS;
}

Operation* as_operation(cublasLtMatmulDesc_t d) { return reinterpret_cast<Operation*>(d); }
Layout* as_layout(cublasLtMatrixLayout_t l) { return reinterpret_cast<Layout*>(l); }
Preference* as_preference(cublasLtMatmulPreference_t p) { return reinterpret_cast<Preference*>(p); }

Problem as_problem(cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                   cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d) {
    return {*as_operation(op), *as_layout(a), *as_layout(b), *as_layout(c), *as_layout(d)};
}

constexpr uintptr_t kHandle = 0x454d55;  // every handle: none holds anything

}  // namespace

}  // namespace emu

using namespace emu;

extern "C" {

// ==== the library ================================================================================

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (handle == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    if (card() != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
    *handle = reinterpret_cast<cublasLtHandle_t>(kHandle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    return reinterpret_cast<uintptr_t>(handle) == kHandle ? CUBLAS_STATUS_SUCCESS
                                                          : CUBLAS_STATUS_NOT_INITIALIZED;
}

size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
size_t cublasLtGetCudartVersion() { return CUDART_VERSION; }

#define EMU_STATUSES(X)                                                                            \
    X(CUBLAS_STATUS_SUCCESS, "success")                                                            \
    X(CUBLAS_STATUS_NOT_INITIALIZED, "the library was not initialized")                            \
    X(CUBLAS_STATUS_ALLOC_FAILED, "the resource allocation failed")                                \
    X(CUBLAS_STATUS_INVALID_VALUE, "an unsupported value or parameter was passed to the function") \
    X(CUBLAS_STATUS_ARCH_MISMATCH, "the feature is absent from the device architecture")           \
    X(CUBLAS_STATUS_EXECUTION_FAILED, "the function failed to launch on the GPU")                  \
    X(CUBLAS_STATUS_INTERNAL_ERROR, "an internal operation failed")                                \
    X(CUBLAS_STATUS_NOT_SUPPORTED, "the functionality requested is not supported")

const char* cublasLtGetStatusName(cublasStatus_t status) {
#define EMU_NAME(name, text) \
    if (status == name) return #name;
    EMU_STATUSES(EMU_NAME)
#undef EMU_NAME
    return "unknown status";
}

const char* cublasLtGetStatusString(cublasStatus_t status) {
#define EMU_TEXT(name, text) \
    if (status == name) return text;
    EMU_STATUSES(EMU_TEXT)
#undef EMU_TEXT
    return "unknown status";
}

// ==== descriptors ================================================================================

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description,
                                        cublasComputeType_t compute, cudaDataType_t scale) {
    if (description == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    Operation* op = new Operation;
    op->compute = compute;
    op->scale = scale;
    *description = reinterpret_cast<cublasLtMatmulDesc_t>(op);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    delete as_operation(description);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
    Operation* op = as_operation(description);
    if (op == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATMUL_DESC_POINTER_MODE:
            return set_attribute(&op->pointer_mode, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSA:
            return set_attribute(&op->trans_a, value, bytes);
        case CUBLASLT_MATMUL_DESC_TRANSB:
            return set_attribute(&op->trans_b, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE:
            return set_attribute(&op->epilogue, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
            return set_attribute(&op->bias, value, bytes);
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
            return set_attribute(&op->bias_type, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
            return set_attribute(&op->aux, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
            return set_attribute(&op->aux_ld, value, bytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
            return set_attribute(&op->aux_type, value, bytes);
        default:
            return CUBLAS_STATUS_INVALID_VALUE;
    }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t cols, int64_t ld) {
    if (layout == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    Layout* l = new Layout;
    l->type = type;
    l->rows = rows;
    l->cols = cols;
    l->ld = ld;
    *layout = reinterpret_cast<cublasLtMatrixLayout_t>(l);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete as_layout(layout);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* value, size_t bytes) {
    Layout* l = as_layout(layout);
    if (l == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATRIX_LAYOUT_TYPE:
            return set_attribute(&l->type, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_ORDER:
            return set_attribute(&l->order, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_ROWS:
            return set_attribute(&l->rows, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_COLS:
            return set_attribute(&l->cols, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_LD:
            return set_attribute(&l->ld, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
            return set_attribute(&l->batch, value, bytes);
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
            return set_attribute(&l->stride, value, bytes);
        default:
            return CUBLAS_STATUS_INVALID_VALUE;
    }
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    if (preference == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    *preference = reinterpret_cast<cublasLtMatmulPreference_t>(new Preference);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete as_preference(preference);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t bytes) {
    Preference* p = as_preference(preference);
    if (p == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
        case CUBLASLT_MATMUL_PREF_SEARCH_MODE:
            return set_attribute(&p->search_mode, value, bytes);
        case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
            return set_attribute(&p->workspace, value, bytes);
        case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
            return set_attribute(&p->reductions, value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
            return set_attribute(&p->alignment[0], value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
            return set_attribute(&p->alignment[1], value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
            return set_attribute(&p->alignment[2], value, bytes);
        case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
            return set_attribute(&p->alignment[3], value, bytes);
        default:
            return CUBLAS_STATUS_INVALID_VALUE;
    }
}

// ==== algorithms =================================================================================

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t op,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int most,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int* count) {
    if (reinterpret_cast<uintptr_t>(handle) != kHandle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (op == nullptr || a == nullptr || b == nullptr || c == nullptr || d == nullptr ||
        preference == nullptr || results == nullptr || count == nullptr || most < 1)
        return CUBLAS_STATUS_INVALID_VALUE;
    *count = 0;
    Problem p = as_problem(op, a, b, c, d);
    Preference wish = *as_preference(preference);
    // A promise of more than a kernel can use asks for no more than that.
    for (uint32_t& alignment : wish.alignment) {
        if (alignment == 0 || (alignment & (alignment - 1)) != 0)
            return CUBLAS_STATUS_INVALID_VALUE;
        alignment = std::min<uint32_t>(alignment, kVector);
    }
    Verdict v = check_problem(p, wish.alignment);
    if (v.status != CUBLAS_STATUS_SUCCESS) return v.status;
    // Long sums of few outputs are split first.
    bool split_first = p.k() > 4 * std::max(p.m(), p.n());
    constexpr uint32_t kOrders[2][kAlgorithms] = {{0, 1, 2}, {1, 2, 0}};
    for (uint32_t id : kOrders[split_first ? 1 : 0]) {
        Algorithm algorithm = make_algorithm(id, wish.alignment);
        size_t workspace = workspace_of(algorithm, p);
        bool allowed = algorithm.reduction == CUBLASLT_REDUCTION_SCHEME_NONE ||
                       (algorithm.reduction & wish.reductions) != 0;
        if (*count == most || workspace > wish.workspace || !allowed ||
            check_algorithm(algorithm, p).status != CUBLAS_STATUS_SUCCESS)
            continue;
        results[(*count)++] = {pack(algorithm), workspace, CUBLAS_STATUS_SUCCESS, 1.0f, {}};
    }
    return *count > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t op,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algo,
                                       cublasLtMatmulHeuristicResult_t* result) {
    if (reinterpret_cast<uintptr_t>(handle) != kHandle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (op == nullptr || a == nullptr || b == nullptr || c == nullptr || d == nullptr ||
        algo == nullptr || result == nullptr)
        return CUBLAS_STATUS_INVALID_VALUE;
    Problem p = as_problem(op, a, b, c, d);
    Algorithm algorithm = unpack(*algo);
    Verdict v = check_algorithm(algorithm, p);
    if (v.status == CUBLAS_STATUS_SUCCESS) v = check_problem(p, algorithm.alignment);
    result->state = v.status;
    if (v.status != CUBLAS_STATUS_SUCCESS) return v.status;
    result->workspaceSize = workspace_of(algorithm, p);
    result->wavesCount = 1;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                    void* value, size_t bytes, size_t* written) {
    if (algo == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    Algorithm algorithm = unpack(*algo);
    uint32_t found = 0;
    switch (attribute) {
        case CUBLASLT_ALGO_CONFIG_ID:
            found = algorithm.id;
            break;
        case CUBLASLT_ALGO_CONFIG_SPLITK_NUM:
            found = uint32_t(algorithm.splits);
            break;
        case CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME:
            found = algorithm.reduction;
            break;
        default:
            return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (written != nullptr) *written = sizeof(found);
    if (bytes == 0) return written == nullptr ? CUBLAS_STATUS_INVALID_VALUE : CUBLAS_STATUS_SUCCESS;
    if (value == nullptr || bytes != sizeof(found)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(value, &found, sizeof(found));
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoConfigSetAttribute(cublasLtMatmulAlgo_t* algo,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                    const void* value, size_t bytes) {
    if (algo == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
    Algorithm algorithm = unpack(*algo);
    cublasStatus_t status = CUBLAS_STATUS_INVALID_VALUE;
    if (attribute == CUBLASLT_ALGO_CONFIG_SPLITK_NUM)
        status = set_attribute(&algorithm.splits, value, bytes);
    if (attribute == CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME)
        status = set_attribute(&algorithm.reduction, value, bytes);
    if (status == CUBLAS_STATUS_SUCCESS) *algo = pack(algorithm);
    return status;
}

// ==== the product ================================================================================

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t op, const void* alpha,
                              const void* A, cublasLtMatrixLayout_t a, const void* B,
                              cublasLtMatrixLayout_t b, const void* beta, const void* C,
                              cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t* algo, void* workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
    std::lock_guard lock(runtime_lock);
    if (reinterpret_cast<uintptr_t>(handle) != kHandle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (op == nullptr || alpha == nullptr || beta == nullptr || A == nullptr || B == nullptr ||
        D == nullptr || a == nullptr || b == nullptr || c == nullptr || d == nullptr)
        return CUBLAS_STATUS_INVALID_VALUE;
    Problem p = as_problem(op, a, b, c, d);
    float scale = *static_cast<const float*>(alpha), old = *static_cast<const float*>(beta);
    constexpr uint32_t kWhole = kVector;
    Algorithm algorithm =
        algo != nullptr ? unpack(*algo) : make_algorithm(0, {kWhole, kWhole, kWhole, kWhole});
    Verdict v = check_algorithm(algorithm, p);
    if (v.status == CUBLAS_STATUS_SUCCESS) v = check_problem(p, algorithm.alignment);
    if (v.status == CUBLAS_STATUS_SUCCESS)
        v = check_pointers(p, algorithm, A, B, old != 0 ? C : D, D, workspace, workspace_bytes);
    if (v.status != CUBLAS_STATUS_SUCCESS) {
        fprintf(stderr, "emu: cublasLtMatmul refuses %s\n", v.why);
        return v.status;
    }
    std::vector<Range> ranges = ranges_of(p, algorithm, A, B, old, C, D, workspace);
    check_ranges(ranges);
    std::vector<Use> uses;
    for (const Range& r : ranges)
        uses.push_back({static_cast<const char*>(r.begin), r.bytes, r.writes});
    // The descriptors may be changed or gone by the time that a product which has to wait begins.
    auto kept = std::make_shared<Kept>(Kept{p.op, p.a, p.b, p.c, p.d});
    auto step = [=] {
        Problem q = {kept->op, kept->a, kept->b, kept->c, kept->d};
        for (int32_t i = 0; i < q.d.batch; i++) {
            auto at = [i](const void* from, const Layout& l) {
                return static_cast<const char*>(from) + i * l.stride * int64_t(bytes_of(l.type));
            };
            multiply_one(q, algorithm, scale, at(A, q.a), at(B, q.b), old,
                         old != 0 ? at(C, q.c) : nullptr, const_cast<char*>(at(D, q.d)));
        }
        return true;
    };
    if (enqueue(stream, "a product", uses, false, step) != cudaSuccess)
        return CUBLAS_STATUS_EXECUTION_FAILED;
    return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
