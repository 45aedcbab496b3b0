// What a CUDA kernel sees when it is compiled for the CPU: built-in variables, barriers, warp
// collectives, atomics, shared memory, tensor cores, asynchronous copies, and launch().
//
// train_gpt2.cu includes this file where nvcc is not the compiler, beside NVIDIA's own headers,
// whose types and prototypes stay. Each thread of a block runs as a fiber (scheduler.cpp); the CUDA
// runtime and cuBLASLt are defined in runtime.cpp and cublaslt.cpp. A mistake that a GPU would pass
// over, or answer with a wrong number, ends the program here with a sentence. README.md lists what
// is caught and what cannot be.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

// ==== specifiers =================================================================================

// Under a host compiler NVIDIA's headers turn these into attributes that nobody understands, or
// leave them undefined.
#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

// ==== what the scheduler offers ==================================================================

namespace emu {

// Where in the source a thread stands. As default arguments these two give the caller's place.
struct Site {
    const char* file = "?";
    int line = 0;
};
#define EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

enum class Collective : uint8_t {
    sync,
    shuffle_index,
    shuffle_up,
    shuffle_down,
    shuffle_xor,
    ballot,
    any,
    all,
    add,
    max_signed,
    max_unsigned,
    mma,
    ldmatrix,
};

extern const uint3* thread_index;
extern uint3 block_index;
extern dim3 block_size, grid_size;

// Ends the program: a sentence on stderr with the kernel, block and thread, then who waits where.
[[noreturn]] __attribute__((format(printf, 1, 2))) void die(const char* pattern, ...);

// __syncthreads: returns once every thread of the block has arrived, all at the same site.
void block_barrier(Site site);

// One warp collective over the lanes of `mask`: returns this lane's result once all have arrived.
// argument: source lane, delta or lane mask of a shuffle; width: 1, 2, 4, 8, 16 or 32.
uint64_t collective(Collective kind, uint32_t mask, uint64_t value, int argument, int width,
                    Site site);

// __syncwarp: the collective, and the only one that orders memory.
void warp_barrier(uint32_t mask, Site site);

// __threadfence, which the thread sanitizer must be told of.
void fence();

// The whole warp takes part in both. d (16,8) += a (16,16) b (16,8) in the fragments of the PTX
// ISA; row: the 16 bytes of this lane's matrix row.
void mma(float* d, const uint32_t* a, const uint32_t* b, Site site);
void exchange_matrices(uint32_t* r, const uint16_t* row, bool transposed, Site site);

// cp.async: 16 bytes that land when their group is waited for; from is null for zeros.
struct AsyncCopy {
    void* to;
    const void* from;
};
void issue_async_copy(AsyncCopy copy);
void commit_async_copies();
bool next_landing(int groups_in_flight, AsyncCopy* copy);  // false: nothing more has to land

// A wgmma: sums of 16 x 64 numbers of this lane's warp, which have no value until the product is
// waited for; its factors are read then. One of a and a_at is null.
struct WarpgroupProduct {
    float* sums;
    const uint32_t* a;            // registers
    const uint16_t *a_at, *b_at;  // the tiles they begin in
    int a_row, a_column, b_row, b_column;
    bool adds, transposed;
};
void issue_warpgroup_product(const WarpgroupProduct& product);
bool next_warpgroup_product(WarpgroupProduct* product);  // false: all are done
bool adds_warpgroup_products(const float* sums);         // that are not done
void warpgroup_fence();

// The block's dynamic shared memory.
unsigned char* shared_memory(size_t offset, size_t bytes);

// A launch as a value: what the kernel is, what it was given, and how to call it once a thread.
struct Argument {
    const void* pointer;  // null: not a pointer
    bool constant;        // a pointer to const: the kernel cannot write there
    size_t bytes;         // 0, or those of a structure at `pointer`, which may hold pointers
};
struct Launch {
    const char* name;
    const void* kernel;
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
    void (*body)(void* values);
    void* values;
    const Argument* arguments;
    int argument_count;
    std::shared_ptr<void> (*keep)(const void* values);  // copies them, for a launch that must wait
};
void run(const Launch& launch);  // runtime.cpp: checks the limits, then runs every block

}  // namespace emu

// ==== built-in variables =========================================================================

#define threadIdx (*emu::thread_index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)
constexpr int warpSize = 32;

// ==== barriers and warp collectives ==============================================================

inline void __syncthreads(EMU_SITE) { emu::block_barrier({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_SITE) {
    emu::warp_barrier(mask, {file, line});
}

namespace emu {

template <class T>
T shuffle(Collective kind, unsigned mask, T value, int argument, int width, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    static_assert(
        !requires { typename T::SharedReference; }, "give the shuffle a value of type T");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = collective(kind, mask, bits, argument, width, site);
    memcpy(static_cast<void*>(&value), &bits, sizeof(T));
    return value;
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMU_SITE) {
    return emu::shuffle(emu::Collective::shuffle_index, mask, value, lane, width, {file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
    return emu::shuffle(emu::Collective::shuffle_up, mask, value, int(delta), width, {file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
    return emu::shuffle(emu::Collective::shuffle_down, mask, value, int(delta), width,
                        {file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMU_SITE) {
    return emu::shuffle(emu::Collective::shuffle_xor, mask, value, lane_mask, width, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_SITE) {
    return unsigned(
        emu::collective(emu::Collective::ballot, mask, predicate != 0, 0, 32, {file, line}));
}

inline int __any_sync(unsigned mask, int predicate, EMU_SITE) {
    return int(emu::collective(emu::Collective::any, mask, predicate != 0, 0, 32, {file, line}));
}

inline int __all_sync(unsigned mask, int predicate, EMU_SITE) {
    return int(emu::collective(emu::Collective::all, mask, predicate != 0, 0, 32, {file, line}));
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, EMU_SITE) {
    return unsigned(emu::collective(emu::Collective::add, mask, value, 0, 32, {file, line}));
}

inline int __reduce_add_sync(unsigned mask, int value, EMU_SITE) {
    return int(emu::collective(emu::Collective::add, mask, unsigned(value), 0, 32, {file, line}));
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, EMU_SITE) {
    return unsigned(
        emu::collective(emu::Collective::max_unsigned, mask, value, 0, 32, {file, line}));
}

inline int __reduce_max_sync(unsigned mask, int value, EMU_SITE) {
    return int(
        emu::collective(emu::Collective::max_signed, mask, unsigned(value), 0, 32, {file, line}));
}

inline void __threadfence() { emu::fence(); }

// ==== shared memory ==============================================================================

namespace emu {

// How many bytes of T are one number whose bits are all ones only where nobody wrote it (fresh
// shared memory is filled with 0xFF, and no operation makes such a NaN); 0: any bits may be meant.
template <class T>
constexpr size_t kNumber = 0;
template <>
inline constexpr size_t kNumber<float> = 4;
template <>
inline constexpr size_t kNumber<float2> = 4;
template <>
inline constexpr size_t kNumber<float4> = 4;
template <>
inline constexpr size_t kNumber<double> = 8;
template <>
inline constexpr size_t kNumber<__nv_bfloat16> = 2;
template <>
inline constexpr size_t kNumber<__nv_bfloat162> = 2;

template <size_t kBytes>
bool all_ones(const void* at) {
    using Bits = std::conditional_t<kBytes == 2, uint16_t,
                                    std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;
    Bits bits;
    memcpy(&bits, at, sizeof(bits));
    return bits == Bits(~Bits(0));
}

// Aborts where a number among `bytes` bytes at `at`, inside an array of T, was never written.
template <class T>
void check_written(const void* at, size_t bytes, ptrdiff_t index) {
    constexpr size_t kStep = kNumber<std::remove_const_t<T>>;
    if constexpr (kStep != 0) {
        for (size_t i = 0; i < bytes; i += kStep)
            if (all_ones<kStep>(static_cast<const char*>(at) + i)) [[unlikely]]
                die("reads element %td of a shared array, which was never written (or was copied "
                    "from global memory never written)",
                    index + ptrdiff_t(i / sizeof(T)));
    }
}

}  // namespace emu

// A pointer into an array in shared memory that knows where the array ends. p[i] is a stand-in for
// the element: reading checks that it was written, assigning writes. `auto x = p[i]` would name the
// element and not its value: spell the type.
template <class T>
class Shared {
  public:
    class Reference {
      public:
        using SharedReference = void;
        using Value = std::remove_const_t<T>;

        Reference(T* at, ptrdiff_t index) : at_(at), index_(index) {}
        Reference(const Reference&) = default;
        operator Value() const {
            emu::check_written<T>(at_, sizeof(T), index_);
            return *at_;
        }
        Value operator=(Value value) const { return *at_ = value; }
        Value operator=(const Reference& other) const { return *at_ = Value(other); }
        Value operator+=(Value value) const { return *at_ = Value(*this) + value; }
        Value operator-=(Value value) const { return *at_ = Value(*this) - value; }
        Value operator*=(Value value) const { return *at_ = Value(*this) * value; }

      private:
        T* at_;
        ptrdiff_t index_;
    };

    Shared() = default;
    Shared(T* begin, int count) : begin_(begin), count_(count) {}

    // A pointer to const elements, from one to the elements.
    operator Shared<const T>() const requires(!std::is_const_v<T>) {
        Shared<const T> copy(begin_, int(count_));
        return copy + offset_;
    }

    Reference operator[](ptrdiff_t i) const { return Reference(at(i, 1), offset_ + i); }
    Reference operator*() const { return (*this)[0]; }
    Shared operator+(ptrdiff_t n) const {
        Shared moved = *this;
        moved.offset_ += n;
        return moved;
    }
    Shared operator-(ptrdiff_t n) const { return *this + -n; }
    Shared& operator+=(ptrdiff_t n) { return *this = *this + n; }
    Shared& operator-=(ptrdiff_t n) { return *this = *this + -n; }

    // The address of `count` elements from element i on, all of which must lie in the array.
    T* at(ptrdiff_t i, ptrdiff_t count) const {
        ptrdiff_t from = offset_ + i;
        if (from < 0 || from + count > count_) [[unlikely]]
            emu::die("touches element %td of a shared array of %td",
                     from < 0 ? from : from + count - 1, count_);
        return begin_ + from;
    }

    // The address of `bytes` bytes here, inside the array and aligned to `alignment`.
    T* vector(size_t bytes, size_t alignment, const char* what) const {
        T* address = at(0, ptrdiff_t(bytes / sizeof(T)));
        if (reinterpret_cast<uintptr_t>(address) % alignment != 0) [[unlikely]]
            emu::die(
                "%s of %zu bytes at element %td of a shared array, which is not aligned to %zu "
                "bytes",
                what, bytes, offset_, alignment);
        return address;
    }
    ptrdiff_t offset() const { return offset_; }

  private:
    T* begin_ = nullptr;
    ptrdiff_t count_ = 0, offset_ = 0;
};

// Takes `count` elements of the block's dynamic shared memory at byte `offset`, rounded up to 16,
// and moves `offset` behind them. Aborts where the launch gave less.
template <class T>
Shared<T> shared_array(size_t& offset, int count) {
    offset = (offset + 15) / 16 * 16;
    size_t bytes = size_t(count) * sizeof(T);
    T* begin = reinterpret_cast<T*>(emu::shared_memory(offset, bytes));
    offset += bytes;
    return Shared<T>(begin, count);
}

// sizeof(V) bytes (4, 8 or 16) from or to shared memory in one access, aligned to their size.
template <class V, class T>
V load_shared(Shared<T> p) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
    static_assert(sizeof(V) % sizeof(T) == 0);
    const T* from = p.vector(sizeof(V), sizeof(V), "a load");
    emu::check_written<T>(from, sizeof(V), p.offset());
    V value;
    memcpy(static_cast<void*>(&value), static_cast<const void*>(from), sizeof(V));
    return value;
}

template <class V, class T>
void store_shared(Shared<T> p, const V& value) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
    static_assert(sizeof(V) % sizeof(T) == 0);
    memcpy(static_cast<void*>(p.vector(sizeof(V), sizeof(V), "a store")), &value, sizeof(V));
}

// ==== tensor cores and asynchronous copies =======================================================

// mma.sync.m16n8k16, row.col: d (16,8) += a (16,16) b (16,8), bf16 in and float32 out.
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_SITE) {
    emu::mma(d, a, b, {file, line});
}

namespace emu {

// Each lane reads its own row here, in its own name, so that the thread sanitizer sees who read.
inline void load_matrices(uint32_t (&r)[4], Shared<const __nv_bfloat16> row, bool transposed,
                          Site site) {
    const __nv_bfloat16* from = row.vector(16, 16, "ldmatrix");
    check_written<const __nv_bfloat16>(from, 16, row.offset());
    uint16_t values[8];
    memcpy(values, from, sizeof(values));
    exchange_matrices(r, values, transposed, site);
}

}  // namespace emu

// ldmatrix.x4: four 8x8 matrices; lanes 8i to 8i+7 give the rows of matrix i, which lands in r[i].
inline void ldmatrix(uint32_t (&r)[4], Shared<const __nv_bfloat16> row, EMU_SITE) {
    emu::load_matrices(r, row, false, {file, line});
}

inline void ldmatrix_transposed(uint32_t (&r)[4], Shared<const __nv_bfloat16> row, EMU_SITE) {
    emu::load_matrices(r, row, true, {file, line});
}

// cp.async.cg of 16 bytes: zeros, and `from` is not touched, where !valid. The bytes land when
// their group is waited for; until then the place holds 0xFF, which is also what a thread finds
// there that should have finished reading the old content before this copy was issued.
template <class T>
void cp_async16(Shared<T> to, const std::type_identity_t<T>* from, bool valid) {
    static_assert(16 % sizeof(T) == 0);
    void* place = to.vector(16, 16, "cp.async");
    if (valid) {
        if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
            emu::die("cp.async from global address %p, which is not aligned to 16 bytes",
                     static_cast<const void*>(from));
        char touched[16];
        memcpy(touched, from, 16);
        asm volatile("" : : "r"(touched) : "memory");  // keeps the read, which may fault
    }
    memset(place, 0xff, 16);
    emu::issue_async_copy({place, valid ? from : nullptr});
}

inline void cp_async_commit() { emu::commit_async_copies(); }

// Lands all but the N youngest groups.
template <int N>
void cp_async_wait() {
    emu::AsyncCopy copy;
    while (emu::next_landing(N, &copy)) {
        if (copy.from != nullptr) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
}

// ==== products of a warpgroup ====================================================================

// What begins at a row and a column of a tile of rows of 64 numbers, of which the eight that are
// the c-th of row r lie at place c xor r % 8.
struct SharedMatrix {
    Shared<const __nv_bfloat16> tile;
    int row, column;
};

inline SharedMatrix shared_matrix(Shared<const __nv_bfloat16> tile, int row, int column) {
    if (reinterpret_cast<uintptr_t>(tile.at(0, 1)) % 1024 != 0)
        emu::die(
            "a tile for wgmma at element %td of a shared array, which is not aligned to 1024 bytes",
            tile.offset());
    if (row % 8 != 0 || column % 16 != 0)
        emu::die("a matrix for wgmma at row %d and column %d of its tile", row, column);
    return {tile, row, column};
}

namespace emu {

inline int swizzled(int row, int column) { return row * 64 + (column ^ row % 8 * 8); }

// Every number of `rows` x `columns` there has been written.
inline const uint16_t* checked_matrix(const SharedMatrix& matrix, int rows, int columns) {
    for (int row = 0; row < rows; row++) {
        for (int column = 0; column < columns; column += 8) {
            auto piece = matrix.tile + swizzled(matrix.row + row, matrix.column + column);
            check_written<const __nv_bfloat16>(piece.at(0, 8), 16, piece.offset());
        }
    }
    return reinterpret_cast<const uint16_t*>(matrix.tile.at(0, 1));
}

inline uint32_t pair_at(const uint16_t* tile, int row, int column) {
    return tile[swizzled(row, column)] | uint32_t(tile[swizzled(row, column + 1)]) << 16;
}

}  // namespace emu

// wgmma.mma_async m64n64k16, bf16 in and float32 out; the sums are NaN until wgmma_wait.
inline void wgmma_abT(float (&d)[8][4], const SharedMatrix& a, const SharedMatrix& b, bool adds) {
    emu::issue_warpgroup_product({&d[0][0], nullptr, emu::checked_matrix(a, 64, 16),
                                  emu::checked_matrix(b, 64, 16), a.row, a.column, b.row, b.column,
                                  adds, false});
}
inline void wgmma_ab(float (&d)[8][4], const uint32_t (&a)[4], const SharedMatrix& b) {
    emu::issue_warpgroup_product(
        {&d[0][0], a, nullptr, emu::checked_matrix(b, 16, 64), 0, 0, b.row, b.column, true, true});
}

inline void wgmma_fence(float (&)[8][4]) { emu::warpgroup_fence(); }
template <int n>
void wgmma_fence(float (&)[8][4], uint32_t (&)[n][4]) {
    emu::warpgroup_fence();
}

namespace emu {

// Each warp multiplies its 16 rows, eight columns at a time. left: all that the wait names of left
// factors in registers.
inline void finish_warpgroup_products(const uint32_t* left, size_t left_size, Site site) {
    WarpgroupProduct p;
    while (next_warpgroup_product(&p)) {
        int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
        uint32_t a[4];
        if (p.a_at != nullptr) {
            int row = p.a_row + int(threadIdx.x) / 32 % 4 * 16 + g;
            for (int i = 0; i < 4; i++)
                a[i] = pair_at(p.a_at, row + i % 2 * 8, p.a_column + 2 * t + i / 2 * 8);
        } else if (p.a >= left && p.a < left + left_size) {
            memcpy(a, p.a, sizeof(a));
        } else {
            die("waits for a wgmma without its left factor, whose registers may be others' by "
                "then");
        }
        for (int n = 0; n < 8; n++) {
            uint32_t b[2];
            for (int i = 0; i < 2; i++) {
                int k = 2 * t + 8 * i, column = 8 * n + g;
                if (p.transposed) {
                    const uint16_t* tile = p.b_at;
                    int at = swizzled(p.b_row + k, p.b_column + column);
                    int next = swizzled(p.b_row + k + 1, p.b_column + column);
                    b[i] = tile[at] | uint32_t(tile[next]) << 16;
                } else {
                    b[i] = pair_at(p.b_at, p.b_row + column, p.b_column + k);
                }
            }
            float* sums = p.sums + 4 * n;
            if (!p.adds) sums[0] = sums[1] = sums[2] = sums[3] = 0;
            mma(sums, a, b, site);
        }
    }
}

}  // namespace emu

inline void wgmma_wait(float (&)[8][4], EMU_SITE) {
    emu::finish_warpgroup_products(nullptr, 0, {file, line});
}
template <int n>
void wgmma_wait(float (&)[8][4], uint32_t (&a)[n][4], EMU_SITE) {
    emu::finish_warpgroup_products(&a[0][0], 4 * n, {file, line});
}

inline void wgmma_settled(float (&d)[8][4]) {
    if (emu::adds_warpgroup_products(&d[0][0]))
        emu::die("takes the sums of a wgmma to be settled that it has not waited for");
}

// Generic writes and the reads of wgmma share one memory here.
inline void wgmma_sees_shared() {}

inline int code_has_wgmma[] = {1};  // that every card of this kind runs

// ==== atomics ====================================================================================

inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }

inline unsigned atomicAdd(unsigned* p, unsigned value) {
    return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long value) {
    return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

namespace emu {

template <class Bits, class Float>
Float add_float(Float* p, Float value) {
    Bits* place = reinterpret_cast<Bits*>(p);
    Bits bits = __atomic_load_n(place, __ATOMIC_RELAXED);
    for (;;) {
        Float old = __builtin_bit_cast(Float, bits);
        Bits sum = __builtin_bit_cast(Bits, Float(old + value));
        if (__atomic_compare_exchange_n(place, &bits, sum, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED))
            return old;
    }
}

}  // namespace emu

inline float atomicAdd(float* p, float value) { return emu::add_float<uint32_t>(p, value); }
inline double atomicAdd(double* p, double value) { return emu::add_float<uint64_t>(p, value); }

template <class T>
T atomicAdd(Shared<T> p, std::type_identity_t<T> value) {
    T* place = p.at(0, 1);
    emu::check_written<T>(place, sizeof(T), p.offset());
    return atomicAdd(place, value);
}

// ==== loads and stores with a hint for the caches ================================================

namespace emu {

template <class T>
void check_aligned(const T* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) [[unlikely]]
        die("touches %zu bytes at address %p, which is not aligned to them", sizeof(T),
            static_cast<const void*>(p));
}

template <class T>
T load(const T* p) {
    check_aligned(p);
    return *p;
}

template <class T>
void store(T* p, const T& value) {
    check_aligned(p);
    *p = value;
}

}  // namespace emu

#define EMU_LOAD(name)       \
    template <class T>       \
    T name(const T* p) {     \
        return emu::load(p); \
    }
#define EMU_STORE(name)                              \
    template <class T>                               \
    void name(T* p, std::type_identity_t<T> value) { \
        emu::store(p, value);                        \
    }
EMU_LOAD(__ldg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldcs)
EMU_STORE(__stcg)
EMU_STORE(__stcs)
EMU_STORE(__stwt)
#undef EMU_LOAD
#undef EMU_STORE

// ==== arithmetic =================================================================================

// Macros where the C library has, or may have, functions of the same name.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define rsqrtf(x) (1.0f / sqrtf(x))

inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

#define EMU_MIN_MAX(R, A, B)                                                                  \
    inline R min(A x, B y) {                                                                  \
        return static_cast<R>(y) < static_cast<R>(x) ? static_cast<R>(y) : static_cast<R>(x); \
    }                                                                                         \
    inline R max(A x, B y) {                                                                  \
        return static_cast<R>(x) < static_cast<R>(y) ? static_cast<R>(y) : static_cast<R>(x); \
    }
EMU_MIN_MAX(int, int, int)
EMU_MIN_MAX(unsigned, unsigned, unsigned)
EMU_MIN_MAX(unsigned, int, unsigned)
EMU_MIN_MAX(unsigned, unsigned, int)
EMU_MIN_MAX(long, long, long)
EMU_MIN_MAX(unsigned long, unsigned long, unsigned long)
EMU_MIN_MAX(unsigned long, long, unsigned long)
EMU_MIN_MAX(unsigned long, unsigned long, long)
EMU_MIN_MAX(long long, long long, long long)
EMU_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef EMU_MIN_MAX

// Of a number and a NaN they give the number.
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }
inline double min(double x, double y) { return fmin(x, y); }
inline double max(double x, double y) { return fmax(x, y); }

// ==== launch =====================================================================================

namespace emu {

template <class T>
Argument describe(const T& value) {
    if constexpr (std::is_pointer_v<T> && !std::is_function_v<std::remove_pointer_t<T>>)
        return {static_cast<const void*>(value), std::is_const_v<std::remove_pointer_t<T>>, 0};
    else if constexpr (std::is_class_v<T>) return {&value, true, sizeof(T)};
    else return {nullptr, true, 0};
}

// Runs kernel(arguments...) for every thread of every block before it returns, unless a collective
// that it is ordered after is still under way: then once that has ended. A launch that the
// card would refuse says why on stderr and is found by cudaGetLastError().
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, const A&... arguments) {
    struct Values {
        void (*kernel)(P...);
        std::tuple<P...> arguments;
    } values{kernel, {static_cast<P>(arguments)...}};
    auto described = std::apply(
        [](const auto&... a) { return std::array<Argument, sizeof...(P)>{describe(a)...}; },
        values.arguments);
    auto body = [](void* erased) {
        Values* v = static_cast<Values*>(erased);
        std::apply(v->kernel, v->arguments);
    };
    auto keep = [](const void* erased) -> std::shared_ptr<void> {
        return std::make_shared<Values>(*static_cast<const Values*>(erased));
    };
    run({name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream, body,
         &values, described.data(), int(sizeof...(P)), keep});
}

}  // namespace emu
