// The arithmetic of the emulator's NCCL. Each hop of the ring rounds to the type that travels, as
// the ring of the real library does: a bf16 sum of n ranks is rounded n - 1 times. An average of
// floating-point numbers multiplies every input by 1/n first; one of integers divides the sum.

#include <algorithm>
#include <cmath>

#include "nccl_internal.h"

namespace emu {

namespace {

// An element as it travels, and the type that it is computed in.
template <class Stored, class Computed>
struct Plain {
    using S = Stored;
    using C = Computed;
    static C load(S x) { return C(x); }
    static S store(C x) { return S(x); }
};

struct Bfloat16 {
    using S = uint16_t;
    using C = float;
    static float load(uint16_t x) { return __builtin_bit_cast(float, uint32_t(x) << 16); }
    static uint16_t store(float x) {
        uint32_t bits = __builtin_bit_cast(uint32_t, x);
        if (x != x) return 0x7fff;
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct Float16 {
    using S = __half;
    using C = float;
    static float load(__half x) { return __half2float(x); }
    static __half store(float x) { return __float2half_rn(x); }
};

// Sums and products of integers wrap: they are computed unsigned.
template <class C>
C combine(C a, C b, ncclRedOp_t op) {
    if constexpr (std::is_integral_v<C>) {
        using U = std::conditional_t<sizeof(C) == 8, uint64_t, uint32_t>;
        if (op == ncclProd) return C(U(a) * U(b));
        if (op == ncclMax) return std::max(a, b);
        if (op == ncclMin) return std::min(a, b);
        return C(U(a) + U(b));
    } else {
        if (op == ncclProd) return a * b;
        if (op == ncclMax) return std::fmax(a, b);
        if (op == ncclMin) return std::fmin(a, b);
        return a + b;
    }
}

template <class T, ncclRedOp_t kOp>
void reduce_as(char* out, const char* const* inputs, int ranks, int first, size_t begin,
               size_t count) {
    using S = typename T::S;
    using C = typename T::C;
    constexpr bool kScales = kOp == ncclAvg && !std::is_integral_v<C>;
    C scale = C(1);
    if constexpr (kScales) scale = C(1) / C(ranks);
    S* sums = reinterpret_cast<S*>(out);
    for (int hop = 0; hop < ranks; hop++) {
        const S* in = reinterpret_cast<const S*>(inputs[(first + hop) % ranks]) + begin;
        for (size_t i = 0; i < count; i++) {
            S x = kScales ? T::store(C(T::load(in[i]) * scale)) : in[i];
            sums[i] = hop == 0 ? x : T::store(combine<C>(T::load(x), T::load(sums[i]), kOp));
        }
    }
    if constexpr (kOp == ncclAvg && !kScales)
        for (size_t i = 0; i < count; i++) sums[i] = T::store(C(T::load(sums[i]) / C(ranks)));
}

template <class T>
void reduce_type(char* out, const char* const* inputs, int ranks, int first, size_t begin,
                 size_t count, ncclRedOp_t op) {
    switch (op) {
        case ncclSum:
            return reduce_as<T, ncclSum>(out, inputs, ranks, first, begin, count);
        case ncclProd:
            return reduce_as<T, ncclProd>(out, inputs, ranks, first, begin, count);
        case ncclMax:
            return reduce_as<T, ncclMax>(out, inputs, ranks, first, begin, count);
        case ncclMin:
            return reduce_as<T, ncclMin>(out, inputs, ranks, first, begin, count);
        default:
            return reduce_as<T, ncclAvg>(out, inputs, ranks, first, begin, count);
    }
}

#define EMU_NCCL_TYPES(X)                                   \
    X(ncclInt8, "int8", Plain<int8_t COMMA int8_t>)         \
    X(ncclUint8, "uint8", Plain<uint8_t COMMA uint8_t>)     \
    X(ncclInt32, "int32", Plain<int32_t COMMA int32_t>)     \
    X(ncclUint32, "uint32", Plain<uint32_t COMMA uint32_t>) \
    X(ncclInt64, "int64", Plain<int64_t COMMA int64_t>)     \
    X(ncclUint64, "uint64", Plain<uint64_t COMMA uint64_t>) \
    X(ncclFloat16, "float16", Float16)                      \
    X(ncclFloat32, "float32", Plain<float COMMA float>)     \
    X(ncclFloat64, "float64", Plain<double COMMA double>)   \
    X(ncclBfloat16, "bfloat16", Bfloat16)
#define COMMA ,

}  // namespace

size_t bytes_of(ncclDataType_t type) {
#define EMU_BYTES(name, text, T) \
    if (type == name) return sizeof(T::S);
    EMU_NCCL_TYPES(EMU_BYTES)
#undef EMU_BYTES
    return 0;
}

const char* name_of(ncclDataType_t type) {
#define EMU_NAME(name, text, T) \
    if (type == name) return text;
    EMU_NCCL_TYPES(EMU_NAME)
#undef EMU_NAME
    return "a type that is not emulated";
}

const char* name_of(ncclRedOp_t op) {
    static const char* const kNames[] = {"sum", "prod", "max", "min", "avg"};
    return op >= 0 && op < ncclNumOps ? kNames[op] : "an operation that is not emulated";
}

void reduce(char* out, const char* const* inputs, int ranks, int first, size_t begin, size_t count,
            ncclDataType_t type, ncclRedOp_t op) {
#define EMU_REDUCE(name, text, T) \
    if (type == name) return reduce_type<T>(out, inputs, ranks, first, begin, count, op);
    EMU_NCCL_TYPES(EMU_REDUCE)
#undef EMU_REDUCE
}

}  // namespace emu
