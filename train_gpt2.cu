// GPT-2 on an NVIDIA GPU: every layer's forward and backward pass as kernels of our own, matrix
// products through cuBLASLt, over memory laid out by hand. This is the twin of train_gpt2.cpp: the
// same sections in the same order, and the same mathematics.
//
// A section holds a layer's kernels and then the launchers, which bear the names of the CPU
// functions. Float is the type of activations and of the parameters that products read, bf16 or
// float; gradients of parameters, statistics and losses are float whatever that is.
//
// The same source runs on a CPU, where dev/emu takes the place of the card (make emu).

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef GPT2_NCCL
#    include <nccl.h>
#endif

#include <sys/file.h>

#include <cassert>
#include <map>
#include <thread>

#include "dataloader.h"
#include "gpt2.h"
#ifndef GPT2_LAYERS_ONLY  // the programs of dev/cuda take the layers alone
#    include "commands.h"
#endif

// ==== constants ==================================================================================

using bf16 = __nv_bfloat16;

constexpr double kGeluScale = 0.7978845608028654;  // sqrt(2 / pi)
constexpr double kGeluCube = 0.044715;

constexpr int kWarp = 32;           // lanes of a warp
constexpr int kMostThreads = 1024;  // of a block
constexpr int kMostColumns = 32;    // columns of a row that a thread owns in the row kernels
constexpr int kMostChannels = 4096;
constexpr int kMostHeadSize = 128;
constexpr int kClassifierRows = 4096;  // rows of logits that exist at a time
constexpr int kReduceRows = 1024;      // partial sums of a bias or layer norm gradient
constexpr int kNormBlocks = 1024;      // partial sums of the global norm, of a bucket
constexpr size_t kWorkspaceBytes = size_t(32) << 20;  // what NVIDIA advises for cuBLASLt on Hopper
constexpr size_t kMostShared = size_t(99) << 10;      // of a block: 8.6, 8.9, 12.0 have no more

// What kernels use of the hardware beyond CUDA C++: shared memory, tensor cores and copies that go
// on while a kernel computes, as PTX [NVIDIA, Parallel Thread Execution ISA]. Off the GPU, the
// emulator defines the same names and checks how they are used.
#ifdef __CUDACC__

template <class T>
using Shared = T*;

// The next `count` T of the block's dynamic shared memory, from a multiple of 16 bytes on; `offset`
// moves behind them.
template <class T>
__device__ Shared<T> shared_array(size_t& offset, int count) {
    extern __shared__ __align__(1024) unsigned char dynamic_shared[];
    size_t begin = (offset + 15) / 16 * 16;
    offset = begin + size_t(count) * sizeof(T);
    return reinterpret_cast<T*>(dynamic_shared + begin);
}

template <class V, class T>
__device__ V load_shared(const T* from) {
    return *reinterpret_cast<const V*>(from);
}

template <class V, class T>
__device__ void store_shared(T* to, V value) {
    *reinterpret_cast<V*>(to) = value;
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// d (16,8) += a (16,16) b (16,8), spread over the lanes of a warp as the PTX ISA lays out m16n8k16
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit numbers; lane i names the i-th of their 32 rows.
__device__ inline void ldmatrix(uint32_t (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

// 16 bytes on their way to shared memory; zeros where the source is not valid.
template <class T>
__device__ void cp_async16(T* to, const T* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most N of the groups that this thread committed are still on their way.
template <int N>
__device__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Hopper's tensor cores read matrices from shared memory themselves: rows of 64 bf16 that begin at
// a multiple of 1024 bytes, in which the 16 bytes that are the c-th of row r lie where the
// (c xor r % 8)-th would (128-byte swizzle). This names what begins at a row, a multiple of 8, and
// a column of such a tile, as a matrix descriptor [PTX ISA, wgmma]: address, 1024 bytes from eight
// rows to the next, kind of swizzle.
using SharedMatrix = uint64_t;

__device__ inline SharedMatrix shared_matrix(const bf16* tile, int row, int column) {
    uint32_t place = (shared_address(tile) >> 4) + unsigned(row * 64 + column) * 2 / 16;
    constexpr uint32_t kEightRows = 1024 >> 4, kSwizzle128 = 1u << 30;
    return uint64_t(kSwizzle128 | kEightRows) << 32 | place | 1u << 16;
}

// Kernels with wgmma are compiled for every card, and have a body where it exists.
#    ifdef __CUDA_ARCH_FEAT_SM90_ALL
#        define WGMMA(...) asm volatile(__VA_ARGS__)
#    else
#        define WGMMA(...) __trap()
#    endif
#    define WGMMA_SUMS                                                                    \
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#    define WGMMA_SUM(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#    define WGMMA_ALL(d)                                                                     \
        WGMMA_SUM(d, 0), WGMMA_SUM(d, 1), WGMMA_SUM(d, 2), WGMMA_SUM(d, 3), WGMMA_SUM(d, 4), \
            WGMMA_SUM(d, 5), WGMMA_SUM(d, 6), WGMMA_SUM(d, 7)

// d (64,64) = a (64,16) b^T, or += where it `adds`, by the four warps of a warpgroup: a warp holds
// 16 rows of d as mma.sync does. Nothing may touch d or the tiles until wgmma_wait.
__device__ inline void wgmma_abT(float (&d)[8][4], SharedMatrix a, SharedMatrix b, bool adds) {
    WGMMA(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_SUMS
        ", %32, %33, p, 1, 1, 0, 0;\n}\n"
        : WGMMA_ALL(d)
        : "l"(a), "l"(b), "r"(int(adds)));
}

// d (64,64) += a (64,16) b (16,64), with a warp's rows of a in registers as mma.sync takes them,
// which wgmma_wait must be given too. (Not for an a that a loop uses again: ptxas 13.0 gives such
// registers to others.)
__device__ inline void wgmma_ab(float (&d)[8][4], const uint32_t (&a)[4], SharedMatrix b) {
    WGMMA(
        "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_SUMS
        ", {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}\n"
        : WGMMA_ALL(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Before the first wgmma of some: their sums, and what is in registers of their left factors, are
// settled. (That they are operands keeps the compiler from moving their use over it.)
__device__ inline void wgmma_fence(float (&d)[8][4]) {
    WGMMA("wgmma.fence.sync.aligned;\n" : WGMMA_ALL(d)::"memory");
}
template <int n>
__device__ void keep_registers(uint32_t (&a)[n][4]) {
#    pragma unroll
    for (int i = 0; i < n; i++)
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3]));
}
template <int n>
__device__ void wgmma_fence(float (&d)[8][4], uint32_t (&a)[n][4]) {
    keep_registers(a);
    wgmma_fence(d);
}

// Until all of this warpgroup's products are done, of which d are the last sums.
__device__ inline void wgmma_wait(float (&d)[8][4]) {
    WGMMA("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
          : WGMMA_ALL(d)::"memory");
}

// The same where their left factors are in registers, which are read until then and no others'.
template <int n>
__device__ void wgmma_wait(float (&d)[8][4], uint32_t (&a)[n][4]) {
    wgmma_wait(d);
    keep_registers(a);
}

// Sums beside those that wgmma_wait named have their values too: for the compiler, that must not
// have used them before. (A second wait would cost the tensor cores an empty product.)
__device__ inline void wgmma_settled(float (&d)[8][4]) { asm volatile("" : WGMMA_ALL(d)); }

// What this thread has written to shared memory, and the block's next barrier: then wgmma sees it.
__device__ inline void wgmma_sees_shared() {
    WGMMA("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Whether this card's code has wgmma: that of sm_90a alone does.
#    ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ int code_has_wgmma[] = {1};
#    else
__device__ int code_has_wgmma[] = {0};
#    endif

#else
#    include "dev/emu/emu.h"
#endif

static void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) fail_machine("%s: %s", what, cudaGetErrorString(status));
}

// Launches a kernel on blocks of `shared` bytes of dynamic shared memory, after making sure that
// the card can run it so. `name` is for messages.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
            cudaStream_t stream, A... arguments) {
    static std::map<const void*, cudaFuncAttributes> known;
    auto address = reinterpret_cast<const void*>(kernel);
    auto [found, is_new] = known.try_emplace(address);
    cudaFuncAttributes& limits = found->second;
    if (is_new) check(cudaFuncGetAttributes(&limits, address), name);
    unsigned threads = block.x * block.y * block.z;
    if (threads > unsigned(limits.maxThreadsPerBlock))
        fail_machine("%s: blocks of %u threads; with its %d registers a thread the card runs %d",
                     name, threads, limits.numRegs, limits.maxThreadsPerBlock);
    if (shared > size_t(limits.maxDynamicSharedSizeBytes)) {
        check(
            cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
            name);
        limits.maxDynamicSharedSizeBytes = int(shared);
    }
#ifdef __CUDACC__
    kernel<<<grid, block, shared, stream>>>(static_cast<P>(arguments)...);
#else
    emu::launch(name, kernel, grid, block, shared, stream, arguments...);
#endif
    check(cudaGetLastError(), name);
}

static int multiprocessors() {
    static const int count = [] {
        int device = 0, value = 0;
        check(cudaGetDevice(&device), "cudaGetDevice");
        check(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device),
              "multiprocessors");
        return value;
    }();
    return count;
}

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return divide_up(a, b) * b; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

// To the nearest number of the type, ties to even.
template <class Float>
__device__ Float from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// The sum over the lanes of a warp; every lane gets it.
template <class T>
__device__ T warp_sum(T x) {
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// 2^x with a relative error of 2^-22, and 0 where that is no normal number: one instruction.
__device__ inline float fast_exp2(float x) {
#ifdef __CUDACC__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

constexpr float kLog2e = 1.44269504f;

// Width numbers that travel as one: 128 bits where the rows are aligned for them, else a number.
template <class Float>
constexpr int kWide = 16 / sizeof(Float);

template <class Float>
__device__ void unpack(float* values, uint4 bits) {
    Float numbers[kWide<Float>];
    memcpy(static_cast<void*>(numbers), &bits, sizeof(bits));
#pragma unroll
    for (int k = 0; k < kWide<Float>; k++) values[k] = to_float(numbers[k]);
}

template <class Float, int Width>
__device__ void load_pack(float* values, const Float* from) {
    if constexpr (Width == 1) {
        values[0] = to_float(*from);
    } else {
        static_assert(Width == kWide<Float>);
        unpack<Float>(values, *reinterpret_cast<const uint4*>(from));
    }
}

// A pack of bf16 may also be half as wide, so that it goes with one of float.
template <class Float, int Width>
__device__ void store_pack(Float* to, const float* values) {
    if constexpr (Width == 1) {
        *to = from_float<Float>(values[0]);
    } else {
        using Bits = std::conditional_t<Width == kWide<Float>, uint4, uint2>;
        static_assert(sizeof(Bits) == Width * sizeof(Float));
        Float numbers[Width];
#pragma unroll
        for (int k = 0; k < Width; k++) numbers[k] = from_float<Float>(values[k]);
        Bits bits;
        memcpy(&bits, numbers, sizeof(bits));
        *reinterpret_cast<Bits*>(to) = bits;
    }
}

// The row kernels: a row of C numbers at a time, of which each thread owns some columns, as packs
// of Width that lie a row's threads apart, so that a warp's accesses are whole lines. What a thread
// keeps of a row, or sums up over rows, stays in its registers. A row takes as few warps as they
// allow: what a thread does once a row, such as its part in a sum over the row, costs as much as
// the arithmetic of many columns, and a row of one warp needs no barrier. These kernels, and all
// others whose bytes are given and nothing else, are bound by memory: nine tenths of the rate of a
// large copy are expected of them at the sizes of GPT-2, and the wide form of packs.
template <class Float, int Width, int Columns>
struct RowSlice {
    static constexpr int kPacks = Columns / Width;

    // The first column of pack i of this thread; it owns the pack when that is below C.
    static __device__ int column(int i) { return (i * int(blockDim.x) + int(threadIdx.x)) * Width; }
    static __device__ void load(float (&values)[Columns], const Float* row, int C) {
#pragma unroll
        for (int i = 0; i < kPacks; i++) {
            if (column(i) < C) {
                load_pack<Float, Width>(&values[i * Width], row + column(i));
            } else {
#pragma unroll
                for (int k = 0; k < Width; k++) values[i * Width + k] = 0;
            }
        }
    }
    static __device__ void store(Float* row, const float (&values)[Columns], int C) {
#pragma unroll
        for (int i = 0; i < kPacks; i++)
            if (column(i) < C) store_pack<Float, Width>(row + column(i), &values[i * Width]);
    }
    static __device__ bool owns(int j, int C) { return column(j / Width) < C; }
};

// Blocks of the row kernels: the threads of a row in x, several rows of one warp in y.
constexpr int kRowWarps = 4;
constexpr int kNarrowColumns = 8;  // of a thread where packs are numbers

template <int Width>
constexpr int kRowThreads = Width == 1 ? kMostChannels / kNarrowColumns : kRowWarps* kWarp;
static_assert(kRowThreads<4> * kMostColumns == kMostChannels);

static dim3 row_block(int C, int columns) {
    int threads = round_up(divide_up(C, columns), kWarp);
    return dim3(unsigned(threads), threads == kWarp ? kRowWarps : 1);
}

// The rows that a block of theirs goes through.
__device__ inline int first_row() { return int(blockIdx.x * blockDim.y + threadIdx.y); }
__device__ inline int row_step() { return int(gridDim.x * blockDim.y); }

// Blocks that the card runs at once.
template <class... P>
int resident_blocks(void (*kernel)(P...), dim3 block, size_t shared) {
    int each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
              &each, reinterpret_cast<const void*>(kernel), int(block.x * block.y), shared),
          "resident blocks");
    return multiprocessors() * std::max(1, each);
}

// Those of them that find a row. One more than the card runs at once would make the others wait.
template <class... P>
int row_blocks(void (*kernel)(P...), dim3 block, size_t shared, int rows) {
    return std::min(divide_up(rows, int(block.y)), resident_blocks(kernel, block, shared));
}

// Whether rows of C numbers can be moved in wide packs. Those that can must also begin where such
// packs do.
template <class Float, class... Rows>
bool are_wide(size_t C, const Rows*... rows) {
    if (C % kWide<Float> != 0) return false;
    assert(((reinterpret_cast<uintptr_t>(rows) % 16 == 0) && ...));
    return true;
}

// Calls f.template operator()<Width>() with the width of a pack.
template <class Float, class F>
void with_width(bool wide, F f) {
    if (wide) f.template operator()<kWide<Float>>();
    else f.template operator()<1>();
}

// Calls f.template operator()<Width, Columns>() with the width of a pack and the columns of a
// thread for rows of C.
template <class Float, class F>
void with_columns(bool wide, int C, F f) {
    constexpr int Width = kWide<Float>;
    int columns = divide_up(C, divide_up(C, kMostColumns * kWarp) * kWarp);
    if (!wide) f.template operator()<1, kNarrowColumns>();
    else if (columns <= 8) f.template operator()<Width, 8>();
    else if (columns <= 16) f.template operator()<Width, 16>();
    else if (columns <= 24) f.template operator()<Width, 24>();
    else f.template operator()<Width, kMostColumns>();
}

// Sums of N numbers over a row's threads, to each of them, warps in their order. `partial` holds 2
// * N * kWarp floats, of which two calls in a row use different halves: a thread that is ahead
// cannot overwrite what another still reads, since the next call's barrier lies between.
template <int N>
struct BlockSum {
    Shared<float> partial;
    int half = 0;

    __device__ explicit BlockSum(size_t& offset)
        : partial(shared_array<float>(offset, 2 * N * kWarp)) {}
    static size_t bytes() { return 2 * N * kWarp * sizeof(float); }

    __device__ void operator()(float (&values)[N]) {
        int warps = int(blockDim.x) / kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = warp_sum(values[i]);
        if (warps == 1) return;
        int base = half * N * kWarp;
        half ^= 1;
        if (threadIdx.x % kWarp == 0) {
#pragma unroll
            for (int i = 0; i < N; i++) partial[base + warp * N + i] = values[i];
        }
        __syncthreads();  // every warp's sums are there before any thread adds them up
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = 0;
        for (int w = 0; w < warps; w++) {
#pragma unroll
            for (int i = 0; i < N; i++) values[i] += partial[base + w * N + i];
        }
    }
};

// Of values[0..Width) in the columns from `column` on of a row: those that dropout drops become 0,
// the others grow by 1/(1-p) [Srivastava et al. 2014, JMLR 15:1929]. As in the CPU twin, whether an
// element stays depends on the key and its place alone: four numbers a call of Philox.
template <int Width>
__device__ void drop_pack(float* values, const Dropout& dropout, uint64_t sequence, int row,
                          int column, int cols) {
    uint32_t threshold = uint32_t(dropout.probability * 4294967296.0);
    uint32_t stream = random_stream(dropout.use, dropout.layer);
    uint32_t group = uint32_t(row) * ((uint32_t(cols) + 3) / 4) + uint32_t(column) / 4;
    float scale = float(1 / (1 - dropout.probability));
    Philox random;
#pragma unroll
    for (int k = 0; k < Width; k++) {
        if (k % 4 == 0)
            random = philox(dropout.seed, group + uint32_t(k) / 4, uint32_t(sequence), stream,
                            uint32_t(dropout.step));
        uint32_t word = random.word[Width == 1 ? column % 4 : k % 4];
        values[k] = word >= threshold ? values[k] * scale : 0.f;
    }
}

// ==== encoder ====================================================================================

// Moves 3 BTC numbers: two rows read, one written.
template <class Float, int Width, int Columns>
__global__ void __launch_bounds__(kRowThreads<Width>)
    encoder_forward_kernel(Float* out, const int* inputs, const Float* wte, const Float* wpe,
                           int BT, int T, int C) {
    using Slice = RowSlice<Float, Width, Columns>;
    for (int bt = first_row(); bt < BT; bt += row_step()) {
        float token[Columns], position[Columns];
        Slice::load(token, wte + size_t(inputs[bt]) * C, C);
        Slice::load(position, wpe + size_t(bt % T) * C, C);
#pragma unroll
        for (int j = 0; j < Columns; j++) token[j] += position[j];
        Slice::store(out + size_t(bt) * C, token, C);
    }
}

// out = wte[token] + wpe[t]                           [Radford et al. 2019, section 2.3]
// out (B,T,C) is written; inputs (B,T) are ids below the rows of wte; wte (Vp,C), wpe (T,C)
template <class Float>
void encoder_forward(Float* out, const int* inputs, const Float* wte, const Float* wpe, int B,
                     int T, int C, cudaStream_t stream) {
    bool wide = are_wide<Float>(size_t(C), out, wte, wpe);
    with_columns<Float>(wide, C, [&]<int Width, int Columns>() {
        auto kernel = encoder_forward_kernel<Float, Width, Columns>;
        dim3 block = row_block(C, Columns);
        launch("encoder_forward", kernel, unsigned(row_blocks(kernel, block, 0, B * T)), block, 0,
               stream, out, inputs, wte, wpe, B * T, T, C);
    });
}

constexpr int kFewPlaces = 16;

// How many different tokens a batch has, and how many of them stand at more than kFewPlaces.
struct TokenCounts {
    int all, frequent;
};

// The places of a batch sorted by their token, so that one block can own a token's gradient: token
// tokens[i] stands at places[starts[i]] .. places[starts[i + 1] - 1], in order. Frequent tokens
// come first.
struct TokenBuckets {
    const int *tokens, *starts, *places;
    TokenCounts count;
};

// Fills tokens (BT), starts (BT+1) and places (BT) from inputs (BT); counts (V) is scratch. Runs on
// the host, while the device works on the pass before.
inline TokenCounts sort_tokens(int* tokens, int* starts, int* places, int* counts,
                               const int* inputs, int BT, int V) {
    std::fill(counts, counts + V, 0);
    for (int bt = 0; bt < BT; bt++) counts[inputs[bt]]++;
    TokenCounts different = {0, 0};
    int place = 0;
    for (bool frequent : {true, false}) {
        for (int token = 0; token < V; token++) {
            if (counts[token] <= 0 || (counts[token] > kFewPlaces) != frequent) continue;
            tokens[different.all] = token;
            starts[different.all++] = place;
            // From now on it says, below 0, where the token's next place goes.
            place += std::exchange(counts[token], ~place);
        }
        if (frequent) different.frequent = different.all;
    }
    starts[different.all] = place;
    for (int bt = 0; bt < BT; bt++) places[~counts[inputs[bt]]--] = bt;
    return different;
}

// to[0..Width) += values, in wide packs where Width is one.
template <int Width>
__device__ void add_pack(float* to, const float* values) {
    constexpr int kStep = Width == 1 ? 1 : kWide<float>;
#pragma unroll
    for (int k = 0; k < Width; k += kStep) {
        float sum[kStep];
        load_pack<float, kStep>(sum, to + k);
#pragma unroll
        for (int i = 0; i < kStep; i++) sum[i] += values[k + i];
        store_pack<float, kStep>(to + k, sum);
    }
}

// Tokens of few places: each is what a row is to the row kernels. Its places are added up in order.
// With the kernel below, moves BTC numbers of dout and reads and writes the rows of the tokens that
// occur.
template <class Float, int Width, int Columns>
__global__ void __launch_bounds__(kRowThreads<Width>)
    encoder_backward_few_kernel(float* dwte, const Float* dout, TokenBuckets buckets, int C) {
    using Slice = RowSlice<Float, Width, Columns>;
    int bucket = buckets.count.frequent + first_row();
    if (bucket >= buckets.count.all) return;
    float sum[Columns] = {};
    int end = buckets.starts[bucket + 1];
    for (int i = buckets.starts[bucket]; i < end; i++) {
        float values[Columns];
        Slice::load(values, dout + size_t(buckets.places[i]) * C, C);
#pragma unroll
        for (int j = 0; j < Columns; j++) sum[j] += values[j];
    }
    float* dtoken = dwte + size_t(buckets.tokens[bucket]) * C;
#pragma unroll
    for (int i = 0; i < Slice::kPacks; i++)
        if (Slice::column(i) < C) add_pack<Width>(dtoken + Slice::column(i), &sum[i * Width]);
}

constexpr int kBucketWarps = 16;

// A block for a frequent token and kWarp * Width of its columns; its warps take the token's places
// in turn, kAtOnce on their way together, and the first adds up what they found, in their order: no
// atomics, the same bits every time.
template <class Float, int Width>
__global__ void __launch_bounds__(kBucketWarps* kWarp)
    encoder_backward_frequent_kernel(float* dwte, const Float* dout, TokenBuckets buckets, int C) {
    constexpr int kAtOnce = 4;
    size_t offset = 0;
    Shared<float> sums = shared_array<float>(offset, kBucketWarps * kWarp * Width);
    int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    int c = (int(blockIdx.y) * kWarp + lane) * Width;
    float sum[Width] = {};
    int end = buckets.starts[blockIdx.x + 1];
    int first = buckets.starts[blockIdx.x] + warp;
    for (; c < C && first < end; first += kAtOnce * kBucketWarps) {
        float values[kAtOnce][Width];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {  // the last again where none is left: nothing waits
            int place = buckets.places[min(first + i * kBucketWarps, end - 1)];
            load_pack<Float, Width>(values[i], dout + size_t(place) * C + c);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            bool is_left = first + i * kBucketWarps < end;
#pragma unroll
            for (int k = 0; k < Width; k++) sum[k] += is_left ? values[i][k] : 0.f;
        }
    }
#pragma unroll
    for (int k = 0; k < Width; k++) sums[(warp * Width + k) * kWarp + lane] = sum[k];
    __syncthreads();  // the first warp reads what every warp wrote
    if (warp > 0 || c >= C) return;
#pragma unroll
    for (int k = 0; k < Width; k++) {
        sum[k] = 0;
        for (int w = 0; w < kBucketWarps; w++) sum[k] += sums[(w * Width + k) * kWarp + lane];
    }
    add_pack<Width>(dwte + size_t(buckets.tokens[blockIdx.x]) * C + c, sum);
}

// A thread for a pack of a position, which it sums over the batch. Moves BTC numbers of dout.
template <class Float, int Width>
__global__ void encoder_backward_positions_kernel(float* dwpe, const Float* dout, int B,
                                                  size_t TC) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * Width;
    if (i >= TC) return;
    float sum[Width] = {};
#pragma unroll 8
    for (int b = 0; b < B; b++) {
        float values[Width];
        load_pack<Float, Width>(values, dout + size_t(b) * TC + i);
#pragma unroll
        for (int k = 0; k < Width; k++) sum[k] += values[k];
    }
    add_pack<Width>(dwpe + i, sum);
}

// forward: out = wte[token] + wpe[t], so dwte[token] += dout and dwpe[t] += dout
// dwte (Vp,C) and dwpe (T,C) accumulate; dout (B,T,C).
template <class Float>
void encoder_backward(float* dwte, float* dwpe, const Float* dout, const TokenBuckets& buckets,
                      int B, int T, int C, cudaStream_t stream) {
    int all = buckets.count.all, frequent = buckets.count.frequent;
    size_t TC = size_t(T) * size_t(C);
    bool wide = are_wide<Float>(size_t(C), dwte, dwpe, dout);
    with_width<Float>(wide, [&]<int Width>() {
        dim3 grid(unsigned(frequent), unsigned(divide_up(C, kWarp * Width)));
        if (frequent > 0)
            launch("encoder_backward, frequent", encoder_backward_frequent_kernel<Float, Width>,
                   grid, kBucketWarps * kWarp, kBucketWarps * kWarp * Width * sizeof(float), stream,
                   dwte, dout, buckets, C);
        launch("encoder_backward, positions", encoder_backward_positions_kernel<Float, Width>,
               unsigned((TC / Width + kWarp - 1) / kWarp), kWarp, 0, stream, dwpe, dout, B, TC);
    });
    if (all == frequent) return;
    with_columns<Float>(wide, C, [&]<int Width, int Columns>() {
        dim3 block = row_block(C, Columns);
        launch("encoder_backward, few", encoder_backward_few_kernel<Float, Width, Columns>,
               unsigned(divide_up(all - frequent, int(block.y))), block, 0, stream, dwte, dout,
               buckets, C);
    });
}

// ==== layer norm =================================================================================

// sum / C, rounded as a division would be but for one time in many: 1/C is the same for all rows.
__device__ inline float mean_of(float sum, float C, float inverse) {
    float mean = sum * inverse;
    return fmaf(fmaf(-mean, C, sum), inverse, mean);
}

// Mean and 1/standard deviation of a row of which this thread holds `x`: the variance in a second
// pass, about the mean, which is taken off x.
template <class Slice, int Columns>
__device__ float2 row_statistics(float (&x)[Columns], BlockSum<1>& block_sum, float epsilon,
                                 int C) {
    constexpr int Width = Columns / Slice::kPacks;
    float sum[1] = {0}, squares[1] = {0}, inverse = 1 / float(C);
#pragma unroll
    for (int j = 0; j < Columns; j++) sum[0] += x[j];  // columns past C hold 0
    block_sum(sum);
    float mean = mean_of(sum[0], float(C), inverse);
#pragma unroll
    for (int i = 0; i < Slice::kPacks; i++) {
        if (Slice::column(i) >= C) continue;
#pragma unroll
        for (int j = i * Width; j < (i + 1) * Width; j++) {
            x[j] -= mean;
            squares[0] += x[j] * x[j];
        }
    }
    block_sum(squares);
    return make_float2(mean, 1 / sqrtf(mean_of(squares[0], float(C), inverse) + epsilon));
}

// out = x * rstd * weight + bias. These two are read again for each row, a pack at a time: a
// multiprocessor's cache holds them, and registers would be taken from the rows on their way.
template <class Slice, class Float, int Columns>
__device__ void store_normalised(Float* out, const float (&x)[Columns], float rstd,
                                 const Float* weight, const Float* bias, int C) {
    constexpr int Width = Columns / Slice::kPacks;
#pragma unroll
    for (int i = 0; i < Slice::kPacks; i++) {
        int column = Slice::column(i);
        if (column >= C) continue;
        float y[Width], b[Width] = {};
        load_pack<Float, Width>(y, weight + column);
        if (bias != nullptr) load_pack<Float, Width>(b, bias + column);
#pragma unroll
        for (int k = 0; k < Width; k++) y[k] = x[i * Width + k] * rstd * y[k] + b[k];
        store_pack<Float, Width>(out + column, y);
    }
}

// Moves 2 BTC numbers.
template <class Float, int Width, int Columns>
__global__ void __launch_bounds__(kRowThreads<Width>)
    layernorm_forward_kernel(Float* out, float* mean, float* rstd, const Float* inp,
                             const Float* weight, const Float* bias, float epsilon, int BT, int C) {
    using Slice = RowSlice<Float, Width, Columns>;
    size_t offset = 0;
    BlockSum<1> block_sum(offset);
    for (int bt = first_row(); bt < BT; bt += row_step()) {
        float x[Columns];
        Slice::load(x, inp + size_t(bt) * C, C);
        float2 statistics = row_statistics<Slice>(x, block_sum, epsilon, C);
        store_normalised<Slice>(out + size_t(bt) * C, x, statistics.y, weight, bias, C);
        if (threadIdx.x == 0) mean[bt] = statistics.x, rstd[bt] = statistics.y;
    }
}

// y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(variance + epsilon)
// [Ba et al. 2016, arXiv:1607.06450]
//
// out (B,T,C) and mean, rstd (B,T) are written; mean and rstd are kept for backward. inp (B,T,C),
// weight (C), bias (C) or null.
template <class Float>
void layernorm_forward(Float* out, float* mean, float* rstd, const Float* inp, const Float* weight,
                       const Float* bias, double epsilon, int B, int T, int C,
                       cudaStream_t stream) {
    bool wide = are_wide<Float>(size_t(C), out, inp, weight, bias);
    with_columns<Float>(wide, C, [&]<int Width, int Columns>() {
        auto kernel = layernorm_forward_kernel<Float, Width, Columns>;
        dim3 block = row_block(C, Columns);
        size_t shared = BlockSum<1>::bytes();
        launch("layernorm_forward", kernel, unsigned(row_blocks(kernel, block, shared, B * T)),
               block, shared, stream, out, mean, rstd, inp, weight, bias, float(epsilon), B * T, C);
    });
}

// first[c] += sum over rows of partial[row][c] for c < C; second likewise from column C on, where
// it is given: the second stage of a sum that has the same bits every time. A block takes
// kSumColumns columns, as many as memory moves at once, and its threads the rows in turn; what they
// found is added up in a tree.
constexpr int kSumColumns = 8, kSumWarps = 16;

// Over the lanes of a warp that have the same column.
__device__ inline float sum_of_column(float x) {
    for (int distance = kSumColumns; distance < kWarp; distance *= 2)
        x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

__global__ void __launch_bounds__(kSumWarps* kWarp)
    add_partial_sums_kernel(float* first, float* second, const float* partial, int rows, int C) {
    constexpr int kEach = kWarp / kSumColumns;  // rows that a warp takes at once
    size_t offset = 0;
    Shared<float> sums = shared_array<float>(offset, kSumWarps * kSumColumns);
    int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    int warps = int(blockDim.x) / kWarp, columns = second != nullptr ? 2 * C : C;
    int c = int(blockIdx.x) * kSumColumns + thread % kSumColumns;
    float sum = 0;
    if (c < columns) {
#pragma unroll 8
        for (int row = thread / kSumColumns; row < rows; row += warps * kEach)
            sum += partial[size_t(row) * columns + c];
    }
    sum = sum_of_column(sum);
    if (lane < kSumColumns) sums[warp * kSumColumns + lane] = sum;
    __syncthreads();  // the first warp reads what every warp wrote
    if (warp > 0) return;
    sum = 0;
    for (int w = lane / kSumColumns; w < warps; w += kEach)
        sum += sums[w * kSumColumns + lane % kSumColumns];
    sum = sum_of_column(sum);
    if (lane < kSumColumns && c < columns) (c < C ? first[c] : second[c - C]) += sum;
}

static void add_partial_sums(float* first, float* second, const float* partial, int rows, int C,
                             cudaStream_t stream) {
    int warps = std::min(divide_up(rows, kWarp / kSumColumns), kSumWarps);
    int columns = second != nullptr ? 2 * C : C;
    launch("add_partial_sums", add_partial_sums_kernel, unsigned(divide_up(columns, kSumColumns)),
           unsigned(warps * kWarp), kSumWarps * kSumColumns * sizeof(float), stream, first, second,
           partial, rows, C);
}

// Each thread sums the weight's and the bias's gradients of its columns in registers, over all rows
// that it goes through; the block adds up what its rows found, and writes that as a partial sum.
// All of a row is on its way before the first sum over it. Moves 4 BTC numbers.
template <class Float, int Width, int Columns>
__global__ void __launch_bounds__(kRowThreads<Width>)
    layernorm_backward_kernel(Float* dinp, float* partial, bool has_bias, const Float* dout,
                              const Float* inp, const Float* weight, const float* mean,
                              const float* rstd, int BT, int C) {
    using Slice = RowSlice<Float, Width, Columns>;
    size_t offset = 0;
    BlockSum<2> block_sum(offset);
    Shared<float> gradients = shared_array<float>(offset, int(blockDim.y) * 2 * C);
    float dw[Columns] = {}, db[Columns] = {}, inverse = 1 / float(C);
    for (int bt = first_row(); bt < BT; bt += row_step()) {
        float dy[Columns], n[Columns], dx[Columns], w[Columns], sums[2] = {0, 0};  // of g, of g n
        Slice::load(dy, dout + size_t(bt) * C, C);
        Slice::load(n, inp + size_t(bt) * C, C);
        Slice::load(dx, dinp + size_t(bt) * C, C);
        Slice::load(w, weight, C);
        float m = mean[bt], r = rstd[bt];
#pragma unroll
        for (int j = 0; j < Columns; j++) {  // past C, dy and w are 0
            n[j] = (n[j] - m) * r;
            dw[j] += dy[j] * n[j];
            db[j] += dy[j];
            dy[j] *= w[j];
            sums[0] += dy[j];
            sums[1] += dy[j] * n[j];
        }
        block_sum(sums);
        float mean_g = sums[0] * inverse, mean_gn = sums[1] * inverse;
#pragma unroll
        for (int j = 0; j < Columns; j++) dx[j] += r * (dy[j] - mean_g - n[j] * mean_gn);
        Slice::store(dinp + size_t(bt) * C, dx, C);
    }
#pragma unroll
    for (int j = 0; j < Columns; j++) {
        if (!Slice::owns(j, C)) continue;
        int c = int(threadIdx.y) * 2 * C + Slice::column(j / Width) + j % Width;
        gradients[c] = dw[j];
        gradients[c + C] = db[j];
    }
    __syncthreads();  // what every row's threads found is there
    int columns = has_bias ? 2 * C : C, step = int(blockDim.x * blockDim.y);
    for (int c = int(threadIdx.y * blockDim.x + threadIdx.x); c < columns; c += step) {
        float sum = 0;
        for (int row = 0; row < int(blockDim.y); row++) sum += gradients[row * 2 * C + c];
        partial[size_t(blockIdx.x) * columns + c] = sum;
    }
}

// forward: y = n * weight + bias with n = (x - mean) * rstd
// dbias += dy;  dweight += dy * n;  with g = dy * weight:
// dx += rstd * (g - mean(g) - n * mean(g * n))
//
// dinp (B,T,C), dweight (C) and dbias (C) or null accumulate. scratch (2 * kReduceRows, C).
template <class Float>
void layernorm_backward(Float* dinp, float* dweight, float* dbias, const Float* dout,
                        const Float* inp, const Float* weight, const float* mean, const float* rstd,
                        float* scratch, int B, int T, int C, cudaStream_t stream) {
    int blocks = 0;
    bool wide = are_wide<Float>(size_t(C), dinp, dout, inp, weight);
    with_columns<Float>(wide, C, [&]<int Width, int Columns>() {
        auto kernel = layernorm_backward_kernel<Float, Width, Columns>;
        dim3 block = row_block(C, Columns);
        size_t shared = BlockSum<2>::bytes() + block.y * 2 * size_t(C) * sizeof(float);
        blocks = std::min(row_blocks(kernel, block, shared, B * T), kReduceRows);
        launch("layernorm_backward", kernel, unsigned(blocks), block, shared, stream, dinp, scratch,
               dbias != nullptr, dout, inp, weight, mean, rstd, B * T, C);
    });
    add_partial_sums(dweight, dbias, scratch, blocks, C, stream);
}

// ==== matmul =====================================================================================

// All products go through cuBLASLt, which thinks in columns: our row-major (rows, cols) is its
// column-major (cols, rows). D (m,n) = A' B' + beta D with m the contiguous side, n rows of ours.
struct Product {
    int m, n, k;
    bool trans_a, trans_b;
    cudaDataType_t type, type_d;  // of A and B, and of D
    bool accumulate;              // beta is 1
    cublasLtEpilogue_t epilogue;
    int align_d = 16, align_a = 16, align_b = 16;  // bytes that the addresses are multiples of

    // The same for these operands: a layer's tensor begins at a multiple of its size, so that odd
    // sizes leave less alignment than the 16 bytes that the fastest algorithms ask for.
    Product of(const void* D, const void* A, const void* B) const {
        auto alignment = [](const void* p) {
            auto address = reinterpret_cast<uintptr_t>(p) | 16;
            return int(address & -address);
        };
        Product product = *this;
        product.align_d = alignment(D), product.align_a = alignment(A);
        product.align_b = alignment(B);
        return product;
    }
    std::string key() const {
        return format("m%d n%d k%d %c%c type%d-%d beta%d epilogue%d align%d-%d-%d", m, n, k,
                      trans_a ? 'T' : 'N', trans_b ? 'T' : 'N', int(type), int(type_d),
                      int(accumulate), int(epilogue), align_d, align_a, align_b);
    }
};

struct ProductOptions {
    bool tf32 = false, deterministic = true;
    bool tune = true;          // time the candidates for each shape, and keep the winners on disk
    std::string cache_folder;  // "": nothing is kept
};

template <class Float>
constexpr cudaDataType_t kDataType = sizeof(Float) == 2 ? CUDA_R_16BF : CUDA_R_32F;

static void check(cublasStatus_t status, const std::string& what) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail_machine("cuBLASLt: %s: %s", what.c_str(), cublasLtGetStatusString(status));
}

// The products of a model: cuBLASLt's handle, its workspace, a plan for each product and the stream
// they run on. A plan is made the first time that a product is asked for; `tune` makes it ahead of
// the first step, by timing what the library proposes, and keeps the winners on disk by the name of
// the card and the library's version.
//
// Deterministic products never add up parts of a sum in place, in an order that is not fixed. Two
// algorithms may still round differently: it is the file of winners that makes two runs agree, and
// where it cannot be written the library's own first choice is taken without timing. One program at
// a time adds to that file: of two, the second would lose what the first goes by.
class Products {
  public:
    Products(const ProductOptions& options, cudaStream_t stream)
        : options_(options), stream_(stream) {
        check(cublasLtCreate(&handle_), "cublasLtCreate");
        check(cudaMalloc(&workspace_, kWorkspaceBytes), "out of memory: library workspace");
        check(cublasLtMatmulPreferenceCreate(&preference_), "preference");
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
        uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
        if (options.deterministic) reductions &= ~uint32_t(CUBLASLT_REDUCTION_SCHEME_INPLACE);
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
        if (!options.cache_folder.empty() && !options.tune) read_winners();
    }
    ~Products() {
        for (auto& entry : plans_) destroy(entry.second);
        cublasLtMatmulPreferenceDestroy(preference_);
        cudaFree(workspace_);
        cublasLtDestroy(handle_);
    }
    Products(const Products&) = delete;
    Products& operator=(const Products&) = delete;

    cudaStream_t stream() const { return stream_; }

    // Whether the library has an algorithm for the product with its epilogue.
    bool supports(const Product& product) { return plan(product).supported; }

    // D = A' B' + beta D, then the epilogue: `bias` is added to each column, or is where the bias's
    // gradient is written; `aux` is where the input of GELU is written, or read.
    void run(const Product& product, void* D, const void* A, const void* B, const void* bias,
             void* aux) {
        Plan& p = plan(product);
        if (!p.supported) fail_machine("cuBLASLt: no algorithm for %s", product.key().c_str());
        if (bias != nullptr) describe(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
        if (aux != nullptr) describe(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
        multiply(product, p, p.algorithm, D, A, B);
    }

    // Whether the faster of two ways to the same result is the first; decided once for `key`, by
    // timing, and kept with the winners. False where nothing is timed.
    template <class First, class Second>
    bool first_wins(const std::string& key, First first, Second second) {
        auto known = winners_.find(key);
        if (known != winners_.end()) return known->second == "first";
        if (!tuning_) return false;
        bool wins = time_ms(first) < time_ms(second);
        winners_[key] = wins ? "first" : "second";
        changed_ = true;
        return wins;
    }

    // Calls `use` with the products being timed as they are met, and writes the winners.
    template <class Use>
    void tune(Use use) {
        if (!options_.tune) return;
        bool writable = cache_is_writable();
        Turn turn(options_.cache_folder);
        if (!options_.cache_folder.empty()) read_winners();
        if (!writable) return;
        tuning_ = true;
        use();
        tuning_ = false;
        if (untimed_ > 0)
            fprintf(stderr,
                    "%s: note: the card has no memory left to time products: the library's first "
                    "proposals for %d of them are taken%s\n",
                    gpt2_program(), untimed_,
                    options_.cache_folder.empty() ? "" : (" and kept in " + cache_file()).c_str());
        if (changed_) write_winners();
    }

  private:
    struct Plan {
        cublasLtMatmulDesc_t description = nullptr;
        cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
        cublasLtMatmulAlgo_t algorithm = {};
        bool supported = false, timed = false;
    };

    template <class T>
    void prefer(cublasLtMatmulPreferenceAttributes_t attribute, T value) {
        check(cublasLtMatmulPreferenceSetAttribute(preference_, attribute, &value, sizeof(value)),
              "preference");
    }
    template <class T>
    void describe(Plan& p, cublasLtMatmulDescAttributes_t attribute, T value) {
        check(cublasLtMatmulDescSetAttribute(p.description, attribute, &value, sizeof(value)),
              "description");
    }
    static void destroy(Plan& p) {
        cublasLtMatrixLayoutDestroy(p.a);
        cublasLtMatrixLayoutDestroy(p.b);
        cublasLtMatrixLayoutDestroy(p.d);
        cublasLtMatmulDescDestroy(p.description);
    }

    static bool has_aux(cublasLtEpilogue_t epilogue) {
        return epilogue == CUBLASLT_EPILOGUE_GELU_AUX ||
               epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS || epilogue == CUBLASLT_EPILOGUE_DGELU;
    }

    Plan& plan(const Product& product) {
        auto [found, is_new] = plans_.try_emplace(product.key());
        Plan& p = found->second;
        if (is_new) make_plan(product, p);
        if (tuning_ && p.supported && !p.timed) choose_algorithm(product, p);
        return p;
    }

    void make_plan(const Product& product, Plan& p) {
        int m = product.m, n = product.n, k = product.k;
        cudaDataType_t type = product.type, type_d = product.type_d;
        cublasLtEpilogue_t epilogue = product.epilogue;
        cublasComputeType_t compute =
            options_.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
        if (type != CUDA_R_32F) compute = CUBLAS_COMPUTE_32F;
        check(cublasLtMatmulDescCreate(&p.description, compute, CUDA_R_32F), "description");
        describe(p, CUBLASLT_MATMUL_DESC_TRANSA, product.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
        describe(p, CUBLASLT_MATMUL_DESC_TRANSB, product.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
        describe(p, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        // A pointer must be there for the library to see that there is a bias or an input of GELU.
        if (epilogue != CUBLASLT_EPILOGUE_DEFAULT && epilogue != CUBLASLT_EPILOGUE_DGELU)
            describe(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, workspace_);
        if (epilogue == CUBLASLT_EPILOGUE_BGRADB)
            describe(p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_32F);
        if (has_aux(epilogue)) {
            describe(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, workspace_);
            describe(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(m));
        }
        int a_rows = product.trans_a ? k : m, a_cols = product.trans_a ? m : k;
        int b_rows = product.trans_b ? n : k, b_cols = product.trans_b ? k : n;
        check(cublasLtMatrixLayoutCreate(&p.a, type, a_rows, a_cols, a_rows), "layout");
        check(cublasLtMatrixLayoutCreate(&p.b, type, b_rows, b_cols, b_rows), "layout");
        check(cublasLtMatrixLayoutCreate(&p.d, type_d, m, n, m), "layout");
        cublasLtMatmulHeuristicResult_t proposal;
        p.supported = propose(&proposal, 1, product, p) == 1;
        if (!p.supported) return;
        p.algorithm = proposal.algo;
        auto known = winners_.find(product.key());
        if (known != winners_.end()) p.timed = read_algorithm(known->second, p);
    }

    // Up to `most` algorithms that the library's heuristics propose, best first; returns how many.
    int propose(cublasLtMatmulHeuristicResult_t* results, int most, const Product& product,
                const Plan& p) {
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t(product.align_a));
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t(product.align_b));
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, uint32_t(product.align_d));
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t(product.align_d));
        int count = 0;
        cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
            handle_, p.description, p.a, p.b, p.d, p.d, preference_, most, results, &count);
        return status == CUBLAS_STATUS_SUCCESS ? count : 0;
    }

    // The algorithm that a file of winners holds for a product; false where this library refuses
    // it.
    bool read_algorithm(const std::string& hex, Plan& p) {
        cublasLtMatmulAlgo_t algorithm;
        auto* bytes = reinterpret_cast<unsigned char*>(&algorithm);
        if (hex.size() != 2 * sizeof(algorithm)) return false;
        for (size_t i = 0; i < sizeof(algorithm); i++) {
            unsigned value = 0;
            if (sscanf(&hex[2 * i], "%2x", &value) != 1) return false;
            bytes[i] = static_cast<unsigned char>(value);
        }
        cublasLtMatmulHeuristicResult_t result;
        bool fits = cublasLtMatmulAlgoCheck(handle_, p.description, p.a, p.b, p.d, p.d, &algorithm,
                                            &result) == CUBLAS_STATUS_SUCCESS &&
                    result.workspaceSize <= kWorkspaceBytes;
        if (fits) p.algorithm = algorithm;
        return fits;
    }

    // Times what the heuristics propose, on operands of pseudo-random numbers: on zeros a card
    // draws less power, and runs faster than it will.
    void choose_algorithm(const Product& product, Plan& p) {
        p.timed = true;
        int m = product.m, n = product.n, k = product.k;
        cudaDataType_t type = product.type, type_d = product.type_d;
        cublasLtEpilogue_t epilogue = product.epilogue;
        constexpr int kProposals = 16;
        cublasLtMatmulHeuristicResult_t proposals[kProposals];
        int count = propose(proposals, kProposals, product, p);
        if (count < 2) return;
        size_t narrow = type == CUDA_R_32F ? 4 : 2, wide = type_d == CUDA_R_32F ? 4 : 2;
        TuningMemory memory(*this, (size_t(m) + size_t(n)) * size_t(k) * narrow +
                                       size_t(m) * size_t(n) * (wide + narrow) +
                                       (size_t(m) + size_t(n)) * 4);
        if (memory.at(0) == nullptr) {  // no room to time it: the first proposal stays
            untimed_++;
            keep_algorithm(product, p);
            return;
        }
        const void* A = memory.take(size_t(m) * size_t(k) * narrow);
        const void* B = memory.take(size_t(n) * size_t(k) * narrow);
        void* D = memory.take(size_t(m) * size_t(n) * wide);
        describe(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                 epilogue == CUBLASLT_EPILOGUE_DEFAULT || epilogue == CUBLASLT_EPILOGUE_DGELU
                     ? nullptr
                     : memory.take((size_t(m) + size_t(n)) * 4));
        if (has_aux(epilogue))
            describe(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
                     memory.take(size_t(m) * size_t(n) * narrow));
        double best_ms = INFINITY;
        for (int i = 0; i < count; i++) {
            if (proposals[i].state != CUBLAS_STATUS_SUCCESS) continue;
            double ms = time_ms([&] { multiply(product, p, proposals[i].algo, D, A, B); });
            if (ms < best_ms) best_ms = ms, p.algorithm = proposals[i].algo;
        }
        keep_algorithm(product, p);
    }

    void keep_algorithm(const Product& product, const Plan& p) {
        std::string hex;
        const auto* bytes = reinterpret_cast<const unsigned char*>(&p.algorithm);
        for (size_t i = 0; i < sizeof(p.algorithm); i++) hex += format("%02x", bytes[i]);
        winners_[product.key()] = hex;
        changed_ = true;
    }

    void multiply(const Product& product, const Plan& p, const cublasLtMatmulAlgo_t& algorithm,
                  void* D, const void* A, const void* B) {
        float one = 1, beta = product.accumulate ? 1 : 0;
        cublasStatus_t status =
            cublasLtMatmul(handle_, p.description, &one, A, p.a, B, p.b, &beta, D, p.d, D, p.d,
                           &algorithm, workspace_, kWorkspaceBytes, stream_);
        if (status != CUBLAS_STATUS_SUCCESS) check(status, product.key());
    }

    // The best of a few, in milliseconds, after a first that does not count.
    template <class F>
    double time_ms(F work) {
        constexpr int kTries = 3;
        cudaEvent_t begin, end;
        check(cudaEventCreate(&begin), "event");
        check(cudaEventCreate(&end), "event");
        work();
        float best = INFINITY;
        for (int i = 0; i < kTries; i++) {
            float ms = 0;
            check(cudaEventRecord(begin, stream_), "event");
            work();
            check(cudaEventRecord(end, stream_), "event");
            check(cudaEventSynchronize(end), "event");
            check(cudaEventElapsedTime(&ms, begin, end), "event");
            best = std::min(best, ms);
        }
        cudaEventDestroy(begin);
        cudaEventDestroy(end);
        return best;
    }

    // Memory to time a product in, filled with numbers of both signs in either type.
    class TuningMemory {
      public:
        TuningMemory(Products& products, size_t bytes) {
            bytes += kSlack;
            if (cudaMalloc(&memory_, bytes) != cudaSuccess) {
                memory_ = nullptr;
                cudaGetLastError();  // asked and answered: it must not reach the next launch
                return;
            }
            fill(products.stream(), bytes);
        }
        ~TuningMemory() { cudaFree(memory_); }
        TuningMemory(const TuningMemory&) = delete;
        TuningMemory& operator=(const TuningMemory&) = delete;

        void* at(size_t offset) const {
            return memory_ == nullptr ? nullptr : static_cast<char*>(memory_) + offset;
        }
        void* take(size_t bytes) {
            size_t begin = used_;
            used_ += (bytes + 255) / 256 * 256;
            return at(begin);
        }

      private:
        static constexpr size_t kSlack = 8 * 256;  // of the pieces' alignment
        void fill(cudaStream_t stream, size_t bytes);
        void* memory_ = nullptr;
        size_t used_ = 0;
    };

    // ---- the file of winners ----

    // While it lives, no other program times products for the file: an flock on its folder, for
    // which it waits a minute. A file system without locks is passed over.
    class Turn {
      public:
        explicit Turn(const std::string& folder)
            : fd_(open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
            constexpr int kTries = 1200;
            for (int i = 0; fd_ >= 0 && i < kTries; i++) {
                if (flock(fd_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) break;
                usleep(50000);
            }
        }
        ~Turn() {
            if (fd_ >= 0) close(fd_);
        }
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;

      private:
        int fd_;
    };

    std::string cache_file() const {
        int device = 0;
        cudaDeviceProp card;
        check(cudaGetDevice(&device), "cudaGetDevice");
        check(cudaGetDeviceProperties(&card, device), "cudaGetDeviceProperties");
        std::string name =
            format("%s-cublaslt%zu%s%s", card.name, cublasLtGetVersion(),
                   options_.deterministic ? "" : "-any", options_.tf32 ? "-tf32" : "");
        for (char& c : name)
            if (!isalnum(static_cast<unsigned char>(c)) && c != '-' && c != '.') c = '_';
        return options_.cache_folder + "/" + name + ".json";
    }

    bool cache_is_writable() {
        if (!options_.deterministic) return true;
        if (options_.cache_folder.empty()) return false;
        std::error_code error;
        std::filesystem::create_directories(options_.cache_folder, error);
        return access(options_.cache_folder.c_str(), W_OK) == 0;
    }

    // A file that is not there is no matter; one that cannot be used is said and made anew.
    void read_winners() {
        std::string path = cache_file();
        if (access(path.c_str(), F_OK) != 0) return;
        try {
            json root = parse_json(read_file(path), path);
            for (const auto& [key, value] : root.at("winners").items())
                winners_[key] = value.get<std::string>();
        } catch (const std::exception&) {
            winners_.clear();
            fprintf(stderr, "%s: note: %s: not a file of timed products; made anew\n",
                    gpt2_program(), path.c_str());
        }
    }

    void write_winners() {
        if (options_.cache_folder.empty()) return;
        ordered_json root;
        root["winners"] = winners_;
        try {
            write_file_atomic(cache_file(), root.dump(1) + "\n");
        } catch (const Error& error) {
            fprintf(stderr, "%s: note: %s: products will be timed again next time\n",
                    gpt2_program(), error.what());
        }
    }

    ProductOptions options_;
    cudaStream_t stream_;
    cublasLtHandle_t handle_ = nullptr;
    cublasLtMatmulPreference_t preference_ = nullptr;
    void* workspace_ = nullptr;
    std::map<std::string, Plan> plans_;
    std::map<std::string, std::string> winners_;
    bool tuning_ = false, changed_ = false;
    int untimed_ = 0;  // products that were met while tuning, without memory to time them in
};

// Bits of a hash of its place, made a number between 1 and 2 of either sign in float and, both
// halves, in bf16.
__global__ void fill_random_kernel(uint32_t* words, size_t N) {
    size_t stride = size_t(gridDim.x) * blockDim.x;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < N; i += stride) {
        uint32_t hash = uint32_t(i) * 2654435761u;
        hash ^= hash >> 15;
        words[i] = (hash & 0x807F807Fu) | 0x3F803F80u;
    }
}

inline void Products::TuningMemory::fill(cudaStream_t stream, size_t bytes) {
    launch("fill_random", fill_random_kernel, unsigned(4 * multiprocessors()), 256u, 0, stream,
           static_cast<uint32_t*>(memory_), bytes / 4);
}

template <class Float, class Out = Float>
Product forward_product(int BT, int C, int OC, cublasLtEpilogue_t epilogue) {
    return {OC, BT, C, true, false, kDataType<Float>, kDataType<Out>, false, epilogue};
}

// out = inp weight^T + bias
// out (BT,OC) is written; inp (BT,C), weight (OC,C), bias (OC) or null
template <class Float, class Out = Float>
void matmul_forward(std::type_identity_t<Out>* out, const Float* inp, const Float* weight,
                    const Float* bias, int BT, int C, int OC, Products& products) {
    cublasLtEpilogue_t epilogue =
        bias != nullptr ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    products.run(forward_product<Float, Out>(BT, C, OC, epilogue).of(out, weight, inp), out, weight,
                 inp, bias, nullptr);
}

template <class Float>
void gelu_forward(Float* out, const Float* inp, size_t N, cudaStream_t stream);
template <class Float>
void gelu_backward(Float* dinp, const Float* dout, const Float* inp, size_t N, cudaStream_t stream);

// pre = inp weight^T + bias,  out = gelu(pre)
// pre, out (BT,OC) are written; in bf16, GELU by the product's epilogue where that is faster: in
// float32 the library's is less exact than ours.
template <class Float>
void matmul_gelu_forward(Float* out, Float* pre, const Float* inp, const Float* weight,
                         const Float* bias, int BT, int C, int OC, Products& products) {
    Product fused = forward_product<Float>(BT, C, OC,
                                           bias != nullptr ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS
                                                           : CUBLASLT_EPILOGUE_GELU_AUX)
                        .of(out, weight, inp);
    auto in_one = [&] { products.run(fused, out, weight, inp, bias, pre); };
    auto in_two = [&] {
        matmul_forward(pre, inp, weight, bias, BT, C, OC, products);
        gelu_forward(out, pre, size_t(BT) * OC, products.stream());
    };
    if (sizeof(Float) == 2 && products.supports(fused) &&
        products.first_wins("gelu " + fused.key(), in_one, in_two))
        in_one();
    else in_two();
}

constexpr int kBiasWarps = 8;

// A warp takes kWarp * Width columns and every so many rows, kAtOnce of them on their way together;
// the block's first warp adds up what they found. Moves BT*OC numbers.
template <class Float, int Width>
__global__ void __launch_bounds__(kBiasWarps* kWarp, 4)
    bias_backward_kernel(float* partial, const Float* dout, int BT, int OC) {
    constexpr int kAtOnce = 8;
    size_t offset = 0;
    Shared<float> sums = shared_array<float>(offset, int(blockDim.x) * Width);
    int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    int warps = int(blockDim.x) / kWarp, c = (int(blockIdx.x) * kWarp + lane) * Width;
    float sum[Width] = {};
    if (c < OC) {
        int first = int(blockIdx.y) * warps + warp, stride = warps * int(gridDim.y);
        size_t step = size_t(stride) * OC;
        const Float* from = dout + size_t(first) * OC + c;
        int left = first < BT ? divide_up(BT - first, stride) : 0;  // rows
        for (; left > 0; left -= kAtOnce, from += kAtOnce * step) {
            float values[kAtOnce][Width];
            // Where no row is left, the first again: no load waits for a branch.
#pragma unroll
            for (int i = 0; i < kAtOnce; i++)
                load_pack<Float, Width>(values[i], i < left ? from + i * step : from);
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
#pragma unroll
                for (int k = 0; k < Width; k++) sum[k] += i < left ? values[i][k] : 0.f;
            }
        }
    }
#pragma unroll
    for (int k = 0; k < Width; k++) sums[(warp * Width + k) * kWarp + lane] = sum[k];
    __syncthreads();  // the first warp reads what every warp wrote
    if (warp > 0 || c >= OC) return;
#pragma unroll
    for (int k = 0; k < Width; k++) {
        float total = 0;
        for (int w = 0; w < warps; w++) total += sums[(w * Width + k) * kWarp + lane];
        partial[size_t(blockIdx.y) * OC + c + k] = total;
    }
}

// dbias (OC) += sum over rows of dout (BT,OC); scratch (kReduceRows,OC)
template <class Float>
void bias_backward(float* dbias, const Float* dout, float* scratch, int BT, int OC,
                   cudaStream_t stream) {
    int warps = std::min(kBiasWarps, BT), rows = 0;
    with_width<Float>(are_wide<Float>(size_t(OC), dout), [&]<int Width>() {
        auto kernel = bias_backward_kernel<Float, Width>;
        int threads = warps * kWarp, columns = divide_up(OC, kWarp * Width);
        size_t shared = size_t(threads) * Width * sizeof(float);
        // No more blocks than run at once: the last few would take as long as all others did.
        int most = resident_blocks(kernel, unsigned(threads), shared) / columns;
        rows = std::min({std::max(1, most), divide_up(BT, warps), kReduceRows});
        launch("bias_backward", kernel, dim3(unsigned(columns), unsigned(rows)), unsigned(threads),
               shared, stream, scratch, dout, BT, OC);
    });
    add_partial_sums(dbias, nullptr, scratch, rows, OC, stream);
}

// dweight (OC,C) += dout^T inp;  dbias (OC) += sum over rows of dout, as a by-product where the
// library does that faster than our kernel.
template <class Float>
void weight_backward(float* dweight, float* dbias, const Float* dout, const Float* inp,
                     float* scratch, int BT, int C, int OC, Products& products) {
    Product product = {
        C, OC, BT, false, true, kDataType<Float>, CUDA_R_32F, true, CUBLASLT_EPILOGUE_DEFAULT};
    product = product.of(dweight, inp, dout);
    if (dbias == nullptr) return products.run(product, dweight, inp, dout, nullptr, nullptr);
    Product fused = product;
    fused.epilogue = CUBLASLT_EPILOGUE_BGRADB;
    auto in_one = [&] {
        products.run(fused, dweight, inp, dout, scratch, nullptr);
        add_partial_sums(dbias, nullptr, scratch, 1, OC, products.stream());
    };
    auto in_two = [&] {
        products.run(product, dweight, inp, dout, nullptr, nullptr);
        bias_backward(dbias, dout, scratch, BT, OC, products.stream());
    };
    if (products.supports(fused) && products.first_wins("bias " + fused.key(), in_one, in_two))
        in_one();
    else in_two();
}

// forward: out = inp weight^T + bias
// dinp = dout weight;  dweight += dout^T inp;  dbias += sum over rows of dout
// dinp (BT,C) is written; dweight (OC,C) and dbias (OC) or null accumulate. scratch
// (kReduceRows,OC).
template <class Float>
void matmul_backward(Float* dinp, float* dweight, float* dbias, const Float* dout, const Float* inp,
                     const Float* weight, float* scratch, int BT, int C, int OC,
                     Products& products) {
    Product product = {C,
                       BT,
                       OC,
                       false,
                       false,
                       kDataType<Float>,
                       kDataType<Float>,
                       false,
                       CUBLASLT_EPILOGUE_DEFAULT};
    products.run(product.of(dinp, weight, dout), dinp, weight, dout, nullptr, nullptr);
    weight_backward(dweight, dbias, dout, inp, scratch, BT, C, OC, products);
}

// forward: inp = gelu(pre),  out = inp weight^T + bias
// dpre = (dout weight) * gelu'(pre), the second factor, in bf16, by the product's epilogue where
// that is faster; dweight and dbias as above. dpre (BT,C) is written.
template <class Float>
void gelu_matmul_backward(Float* dpre, float* dweight, float* dbias, const Float* dout,
                          const Float* inp, const Float* pre, const Float* weight, float* scratch,
                          int BT, int C, int OC, Products& products) {
    Product product = {C,
                       BT,
                       OC,
                       false,
                       false,
                       kDataType<Float>,
                       kDataType<Float>,
                       false,
                       CUBLASLT_EPILOGUE_DEFAULT};
    product = product.of(dpre, weight, dout);
    Product fused = product;
    fused.epilogue = CUBLASLT_EPILOGUE_DGELU;
    auto in_one = [&] {
        products.run(fused, dpre, weight, dout, nullptr, const_cast<Float*>(pre));
    };
    auto in_two = [&] {
        products.run(product, dpre, weight, dout, nullptr, nullptr);
        gelu_backward(dpre, dpre, pre, size_t(BT) * C, products.stream());
    };
    if (sizeof(Float) == 2 && products.supports(fused) &&
        products.first_wins("dgelu " + fused.key(), in_one, in_two))
        in_one();
    else in_two();
    weight_backward(dweight, dbias, dout, inp, scratch, BT, C, OC, products);
}

// ==== dropout ====================================================================================

// Moves 2 BTC numbers.
template <class Float, int Width, int Columns>
__global__ void __launch_bounds__(kRowThreads<Width>)
    dropout_forward_kernel(Float* out, const Float* inp, Dropout dropout, int BT, int T, int C) {
    using Slice = RowSlice<Float, Width, Columns>;
    for (int bt = first_row(); bt < BT; bt += row_step()) {
        float x[Columns];
        Slice::load(x, inp + size_t(bt) * C, C);
        uint64_t sequence = dropout.first_sequence + uint64_t(bt / T);
#pragma unroll
        for (int i = 0; i < Slice::kPacks; i++)
            drop_pack<Width>(&x[i * Width], dropout, sequence, bt % T, Slice::column(i), C);
        Slice::store(out + size_t(bt) * C, x, C);
    }
}

// out = dropout(inp) (B,T,C), by drop_pack; out may be inp. The gradient goes through the same
// function: dinp = mask * dout / (1 - p).
template <class Float>
void dropout_forward(Float* out, const Float* inp, const Dropout& dropout, int B, int T, int C,
                     cudaStream_t stream) {
    bool wide = are_wide<Float>(size_t(C), out, inp);
    with_columns<Float>(wide, C, [&]<int Width, int Columns>() {
        auto kernel = dropout_forward_kernel<Float, Width, Columns>;
        dim3 block = row_block(C, Columns);
        launch("dropout_forward", kernel, unsigned(row_blocks(kernel, block, 0, B * T)), block, 0,
               stream, out, inp, dropout, B * T, T, C);
    });
}

// ==== attention ==================================================================================

// Flash attention [Dao 2023, arXiv:2307.08691]: scores exist for one tile at a time, in registers,
// and a (B,NH,T,T) tensor nowhere.
//
// A block works on one head of one sequence. It owns some rows (queries; keys in the kernel of dk
// and dv), whose tiles stay in shared memory, 16 * kTall of them to a warp, and goes through the
// rows of the other side kStep at a time: while one step computes, cp.async brings the next. All
// products have two forms, and both keep their sums where mma.sync m16n8k16 does, so that nothing
// else depends on the type: of a 16 x 8 piece, lane 4g + t holds
//   element e = 0..3:  row g + 8 (e / 2),  column 2t + e % 2
// bf16 multiplies on tensor cores, with sums in float; float multiplies with plain FMA.

// How a kernel is cut. head: the head size, rounded up to what the type is compiled for; the rest
// of a row is zeros. hold: keep the left factor of the first products in registers, not only in
// shared memory, where the kernel has registers to spare.
template <class Number, int head, int tall, int warps, int step, bool hold>
struct AttentionTiles {
    using Float = Number;
    static constexpr bool kTensorCores = sizeof(Number) == 2, kWarpgroup = false;
    static constexpr int kHead = head, kTall = tall, kWarps = warps, kStep = step;
    static constexpr bool kHold = hold && kTensorCores;
    static constexpr int kRows = 16 * tall;  // that a warp owns
    static constexpr int kThreads = kWarp * warps;
    static constexpr int kBlocks = 256 / kThreads;  // that share a multiprocessor's registers
    // Numbers from row to row in shared memory: 16 bytes more than a row has, so that the same
    // column of eight rows lies in different banks.
    static constexpr int kPitch = head + kWide<Number>;
    // Where a warp of the float form passes the weights to the product that they are factors of.
    static constexpr int kPatchPitch = step + 4;
    static constexpr int kPatch = kTensorCores ? 0 : kRows * kPatchPitch;
    using Scores = float[tall][step / 8][4];
    using Sums = float[tall][head / 8][4];
    static_assert(head % 16 == 0 && (step == 16 || step == 32 || step == 64) && kBlocks >= 1);

    // Where column `column` of row `row` of a tile lies.
    __host__ __device__ static constexpr int place(int row, int column) {
        return row * kPitch + column;
    }

    // Shared memory of a block of `count` warps that owns rows of `owned` tensors; the other side
    // is two tensors, each twice: one step and the next.
    static constexpr size_t shared_bytes(int owned, int count) {
        return size_t(owned * count * kRows + 4 * step) * kPitch * sizeof(Number) +
               size_t(count) * kPatch * sizeof(float);
    }
};

// The same for wgmma: a warpgroup of 64 rows, 16 to a warp, and tiles as it reads them. blocks:
// that share a multiprocessor, so that one computes weights while another multiplies.
template <int blocks>
struct AttentionWarpgroup : AttentionTiles<bf16, 64, 1, 4, 64, false> {
    static constexpr bool kWarpgroup = true;
    static constexpr int kBlocks = blocks, kPitch = 64;

    __host__ __device__ static constexpr int place(int row, int column) {
        return row * kPitch + (column ^ row % 8 * 8);
    }
    static constexpr size_t shared_bytes(int owned, int) {
        return size_t(owned + 4) * 64 * kPitch * sizeof(bf16);
    }
};

struct AttentionShape {
    int T, C, NH, HS;
    int heads;            // B * NH
    int heads_at_a_time;  // see attention_place
    bool packed;          // rows of a head start at, and are, multiples of 16 bytes
    float scale, scale2;  // 1 / sqrt(HS), and log2(e) times that
};

template <class Tiles>
__device__ int warps_of_block() {
    if constexpr (Tiles::kWarpgroup) return Tiles::kWarps;
    else return int(blockDim.x) / kWarp;
}

// What a block works on.
struct AttentionPlace {
    int b, h, tile;
};

// Heads go in groups whose other side fits the level-2 cache together, and within a group the tiles
// of all heads go in order: with the longest first, no long block runs alone at the end.
__device__ inline AttentionPlace attention_place(const AttentionShape& shape, int tiles) {
    int index = int(blockIdx.x), group = index / (shape.heads_at_a_time * tiles);
    int first = group * shape.heads_at_a_time;
    int count = min(shape.heads_at_a_time, shape.heads - first);
    int rest = index - first * tiles;
    int head = first + rest % count;
    return {head / shape.NH, head % shape.NH, rest / count};
}

template <class Tiles>
AttentionShape attention_shape(int B, int T, int C, int NH) {
    constexpr size_t kCacheBytes = size_t(16) << 20;  // of the 40 to 50 MB of an A100 or H100
    using Float = typename Tiles::Float;
    int HS = C / NH, heads = B * NH;
    size_t head_bytes = 2 * size_t(T) * size_t(HS) * sizeof(Float);
    int at_a_time = int(std::clamp<size_t>(kCacheBytes / head_bytes, 1, size_t(heads)));
    assert(HS <= Tiles::kHead && size_t(heads) * size_t(T) < size_t(INT32_MAX));
    float scale = float(1 / std::sqrt(double(HS)));
    bool packed = HS % kWide<Float> == 0;
    return {T, C, NH, HS, heads, at_a_time, packed, scale, kLog2e * scale};
}

// Rows [first, first + count) of a tensor of T rows that lie `stride` numbers apart, HS numbers of
// each, to a tile in shared memory; zeros beyond T and HS. The whole block calls it. What it copies
// is there after cp_async_wait and a barrier.
template <class Tiles>
__device__ void load_tile(Shared<typename Tiles::Float> tile, const typename Tiles::Float* rows,
                          int stride, int first, int count, const AttentionShape& shape) {
    using Float = typename Tiles::Float;
    if (shape.packed) {
        constexpr int kWidth = kWide<Float>, kPacks = Tiles::kHead / kWidth;
        int row = int(threadIdx.x) / kPacks, column = int(threadIdx.x) % kPacks * kWidth;
        int threads = warps_of_block<Tiles>() * kWarp, down = threads / kPacks;
        if constexpr (kWarp % kPacks == 0) {  // a thread copies the same columns of its rows
            int valid = column < shape.HS ? shape.T - first : 0;
            const Float* from = rows + int64_t(first + row) * stride + column;
            Shared<Float> to = tile + Tiles::place(row, column);
            int times = Tiles::kWarpgroup ? count / down : divide_up(count - row, down);
#pragma unroll 4
            for (int i = 0; i < times; i++, from += down * stride)
                cp_async16(to + i * down * Tiles::kPitch, from, row + i * down < valid);
        } else {
#pragma unroll 4
            for (int i = int(threadIdx.x); i < count * kPacks; i += threads) {
                row = i / kPacks, column = i % kPacks * kWidth;
                cp_async16(tile + Tiles::place(row, column),
                           rows + int64_t(first + row) * stride + column,
                           first + row < shape.T && column < shape.HS);
            }
        }
        return;
    }
#pragma unroll 1  // registers are for what happens often
    for (int i = int(threadIdx.x); i < count * Tiles::kHead; i += int(blockDim.x)) {
        int row = i / Tiles::kHead, column = i % Tiles::kHead;
        bool valid = first + row < shape.T && column < shape.HS;
        tile[Tiles::place(row, column)] =
            valid ? rows[int64_t(first + row) * stride + column] : from_float<Float>(0.f);
    }
}

// Until what load_tile copied is there for this thread and, behind a barrier, for the block.
template <class Tiles>
__device__ void wait_for_tiles() {
    cp_async_wait<0>();
    if constexpr (Tiles::kWarpgroup) wgmma_sees_shared();
}

__device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

__device__ inline void store_pair(Shared<bf16> to, float low, float high) {
    store_shared(to, pack_bf16(low, high));
}
__device__ inline void store_pair(Shared<float> to, float low, float high) {
    store_shared(to, float2{low, high});
}

// A warp's sums, each row times its factor, to rows [first, first + kRows) of a tensor as above.
// They pass through the warp's own rows of a tile, so that they leave in 128-bit stores.
template <class Tiles>
__device__ void store_rows(typename Tiles::Float* rows, size_t stride, int first,
                           Shared<typename Tiles::Float> tile, const typename Tiles::Sums& sums,
                           const float (&factor)[Tiles::kTall][2], const AttentionShape& shape) {
    using Float = typename Tiles::Float;
    constexpr int kWidth = kWide<Float>, kPacks = Tiles::kHead / kWidth;
    int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
    // Every lane, or a warpgroup's products, have read what the tile held.
    if constexpr (Tiles::kWarpgroup) __syncthreads();
    else __syncwarp();
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
        for (int n = 0; n < Tiles::kHead / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                store_pair(tile + Tiles::place(16 * m + 8 * i + g, 8 * n + 2 * t),
                           sums[m][n][2 * i] * factor[m][i], sums[m][n][2 * i + 1] * factor[m][i]);
        }
    }
    __syncwarp();  // every lane's sums are there before other lanes take them
    if (shape.packed) {
        for (int i = lane; i < Tiles::kRows * kPacks; i += kWarp) {
            int row = i / kPacks, column = i % kPacks * kWidth;
            if (first + row >= shape.T || column >= shape.HS) continue;
            uint4 pack = load_shared<uint4>(tile + Tiles::place(row, column));
            *reinterpret_cast<uint4*>(rows + size_t(first + row) * stride + column) = pack;
        }
        return;
    }
#pragma unroll 1
    for (int i = lane; i < Tiles::kRows * Tiles::kHead; i += kWarp) {
        int row = i / Tiles::kHead, column = i % Tiles::kHead;
        if (first + row < shape.T && column < shape.HS)
            rows[size_t(first + row) * stride + column] = tile[Tiles::place(row, column)];
    }
}

// ---- products ----

// The rows of a tile that a warp owns, as the left factor of multiply_abT; kHold: in registers.
template <class Tiles, bool kHold>
class LeftRows {
  public:
    using Float = typename Tiles::Float;

    // Of a tile that the block owns.
    __device__ explicit LeftRows(Shared<const Float> tile) : rows_(tile + start()) {}

    // The whole block calls it, once the tile is on its way.
    __device__ void hold() {
        if constexpr (kHold) {
            wait_for_tiles<Tiles>();
            __syncthreads();  // what other threads copied is there too
#pragma unroll
            for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
                for (int k = 0; k < Tiles::kHead / 16; k++)
                    ldmatrix(held_[m][k], rows_ + (m * 16 * Tiles::kPitch + k * 16));
            }
        }
    }

    // Columns k to k + 15 of the warpgroup's rows, as wgmma takes them.
    __device__ SharedMatrix of_warpgroup(int k) const { return shared_matrix(rows_, 0, k); }

    // Rows 16m to 16m + 15, columns k to k + 15, as mma.sync takes them.
    __device__ void read(uint32_t (&a)[4], int m, int k) const {
        if constexpr (kHold) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = held_[m][k / 16][i];
        } else {
            ldmatrix(a, rows_ + (m * 16 * Tiles::kPitch + k));
        }
    }

    // Row 16m + 8i + g, columns k to k + 3.
    __device__ float4 read(int m, int i, int k) const {
        return load_shared<float4>(rows_ + ((16 * m + 8 * i) * Tiles::kPitch + k));
    }

  private:
    static __device__ int start() {
        int lane = int(threadIdx.x) % kWarp;
        int rows = int(threadIdx.x) / kWarp * Tiles::kRows * Tiles::kPitch;
        if constexpr (Tiles::kWarpgroup) return 0;  // the tensor cores find a warp's own
        else if constexpr (Tiles::kTensorCores)
            return rows + lane % 16 * Tiles::kPitch + lane / 16 * 8;
        else return rows + lane / 4 * Tiles::kPitch;
    }

    Shared<const Float> rows_;
    uint32_t held_[kHold ? Tiles::kTall : 1][kHold ? Tiles::kHead / 16 : 1][4];
};

// acc (kRows,kStep) = a (kRows,kHead) b^T, b a tile (kStep,kHead)
// These two are what the instructions of another card replace.
template <class Tiles, bool kHold>
requires(!Tiles::kWarpgroup) __device__
    void multiply_abT(typename Tiles::Scores& acc, const LeftRows<Tiles, kHold>& a,
                      Shared<const bf16> b) {
    int lane = int(threadIdx.x) % kWarp;
    Shared<const bf16> from = b + ((lane % 8 + lane / 16 * 8) * Tiles::kPitch + lane / 8 % 2 * 8);
    memset(acc, 0, sizeof(acc));
#pragma unroll
    for (int k = 0; k < Tiles::kHead; k += 16) {
        uint32_t left[Tiles::kTall][4];
#pragma unroll
        for (int m = 0; m < Tiles::kTall; m++) a.read(left[m], m, k);
#pragma unroll
        for (int n = 0; n < Tiles::kStep; n += 16) {
            uint32_t r[4];
            ldmatrix(r, from + (n * Tiles::kPitch + k));
            const uint32_t first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
#pragma unroll
            for (int m = 0; m < Tiles::kTall; m++) {
                mma_bf16(acc[m][n / 8], left[m], first);
                mma_bf16(acc[m][n / 8 + 1], left[m], second);
            }
        }
    }
}

template <class Tiles, bool kHold>
requires(Tiles::kWarpgroup) __device__
    void multiply_abT(typename Tiles::Scores& acc, const LeftRows<Tiles, kHold>& a,
                      Shared<const bf16> b) {
    wgmma_fence(acc[0]);
#pragma unroll
    for (int k = 0; k < Tiles::kHead; k += 16)
        wgmma_abT(acc[0], a.of_warpgroup(k), shared_matrix(b, 0, k), k > 0);
    wgmma_wait(acc[0]);
}

template <class Tiles, bool kHold>
__device__ void multiply_abT(typename Tiles::Scores& acc, const LeftRows<Tiles, kHold>& a,
                             Shared<const float> b) {
    Shared<const float> from = b + int(threadIdx.x) % 4 * 2 * Tiles::kPitch;
    memset(acc, 0, sizeof(acc));
#pragma unroll 1
    for (int k = 0; k < Tiles::kHead; k += 4) {
        float4 left[Tiles::kTall][2];
#pragma unroll
        for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
            for (int i = 0; i < 2; i++) left[m][i] = a.read(m, i, k);
        }
#pragma unroll
        for (int n = 0; n < Tiles::kStep; n += 8) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float4 right = load_shared<float4>(from + ((n + j) * Tiles::kPitch + k));
#pragma unroll
                for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const float4& l = left[m][i];
                        float sum = fmaf(l.x, right.x, acc[m][n / 8][2 * i + j]);
                        sum = fmaf(l.y, right.y, sum);
                        sum = fmaf(l.z, right.z, sum);
                        acc[m][n / 8][2 * i + j] = fmaf(l.w, right.w, sum);
                    }
                }
            }
        }
    }
}

// Two such products, which a warpgroup waits for together.
template <class Tiles, bool kHold1, bool kHold2>
__device__ void multiply_two_abT(typename Tiles::Scores& acc1, const LeftRows<Tiles, kHold1>& a1,
                                 Shared<const typename Tiles::Float> b1,
                                 typename Tiles::Scores& acc2, const LeftRows<Tiles, kHold2>& a2,
                                 Shared<const typename Tiles::Float> b2) {
    if constexpr (Tiles::kWarpgroup) {
        wgmma_fence(acc1[0]);
        wgmma_fence(acc2[0]);
#pragma unroll
        for (int k = 0; k < Tiles::kHead; k += 16)
            wgmma_abT(acc1[0], a1.of_warpgroup(k), shared_matrix(b1, 0, k), k > 0);
#pragma unroll
        for (int k = 0; k < Tiles::kHead; k += 16)
            wgmma_abT(acc2[0], a2.of_warpgroup(k), shared_matrix(b2, 0, k), k > 0);
        wgmma_wait(acc1[0]);
        wgmma_settled(acc2[0]);
    } else {
        multiply_abT<Tiles>(acc1, a1, b1);
        multiply_abT<Tiles>(acc2, a2, b2);
    }
}

// Rows 16m to 16m + 15, columns k to k + 15 of p, rounded to bf16: the sums of a 16 x 16 piece lie
// as its left factor does.
template <class Tiles>
__device__ void round_left(uint32_t (&a)[4], const typename Tiles::Scores& p, int m, int k) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float(&piece)[4] = p[m][k / 8 + i / 2];
        a[i] = pack_bf16(piece[i % 2 * 2], piece[i % 2 * 2 + 1]);
    }
}

// acc (kRows,kHead) += p (kRows,kStep) b, b a tile (kStep,kHead)
template <class Tiles>
requires(!Tiles::kWarpgroup) __device__
    void multiply_pb(typename Tiles::Sums& acc, const typename Tiles::Scores& p,
                     Shared<const bf16> b, Shared<float>) {
    int lane = int(threadIdx.x) % kWarp;
    Shared<const bf16> from = b + (lane % 16 * Tiles::kPitch + lane / 16 * 8);
#pragma unroll
    for (int k = 0; k < Tiles::kStep; k += 16) {
        uint32_t left[Tiles::kTall][4];
#pragma unroll
        for (int m = 0; m < Tiles::kTall; m++) round_left<Tiles>(left[m], p, m, k);
#pragma unroll
        for (int n = 0; n < Tiles::kHead; n += 16) {
            uint32_t r[4];
            ldmatrix_transposed(r, from + (k * Tiles::kPitch + n));
            const uint32_t first[2] = {r[0], r[1]}, second[2] = {r[2], r[3]};
#pragma unroll
            for (int m = 0; m < Tiles::kTall; m++) {
                mma_bf16(acc[m][n / 8], left[m], first);
                mma_bf16(acc[m][n / 8 + 1], left[m], second);
            }
        }
    }
}

template <class Tiles>
requires(Tiles::kWarpgroup) __device__
    void multiply_pb(typename Tiles::Sums& acc, const typename Tiles::Scores& p,
                     Shared<const bf16> b, Shared<float>) {
    uint32_t left[Tiles::kStep / 16][4];
#pragma unroll
    for (int k = 0; k < Tiles::kStep; k += 16) round_left<Tiles>(left[k / 16], p, 0, k);
    wgmma_fence(acc[0], left);
#pragma unroll
    for (int k = 0; k < Tiles::kStep; k += 16)
        wgmma_ab(acc[0], left[k / 16], shared_matrix(b, k, 0));
    wgmma_wait(acc[0], left);
}

// The float form passes p from the lanes that hold it to those that multiply through the warp's
// patch (kRows,kPatchPitch).
template <class Tiles>
__device__ void multiply_pb(typename Tiles::Sums& acc, const typename Tiles::Scores& p,
                            Shared<const float> b, Shared<float> patch) {
    int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int n = 0; n < Tiles::kStep; n += 8)
                store_pair(patch + ((16 * m + 8 * i + g) * Tiles::kPatchPitch + n + 2 * t),
                           p[m][n / 8][2 * i], p[m][n / 8][2 * i + 1]);
        }
    }
    __syncwarp();  // a row of p comes from four lanes and is read by four
#pragma unroll 1
    for (int k = 0; k < Tiles::kStep; k += 4) {
        float4 left[Tiles::kTall][2];
#pragma unroll
        for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                left[m][i] =
                    load_shared<float4>(patch + ((16 * m + 8 * i + g) * Tiles::kPatchPitch + k));
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int n = 0; n < Tiles::kHead; n += 8) {
                float2 right = load_shared<float2>(b + ((k + j) * Tiles::kPitch + n + 2 * t));
#pragma unroll
                for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const float4& l = left[m][i];
                        float x = j == 0 ? l.x : j == 1 ? l.y : j == 2 ? l.z : l.w;
                        float* sum = &acc[m][n / 8][2 * i];
                        sum[0] = fmaf(x, right.x, sum[0]);
                        sum[1] = fmaf(x, right.y, sum[1]);
                    }
                }
            }
        }
    }
    __syncwarp();  // all have read the patch before the next product fills it
}

// ---- dropout of the weights ----

// philox of gpt2.h with half of its rounds in a loop. In line, the compiler would find the rounds'
// keys to be the same in every step of a kernel, and keep all twenty in registers.
__device__ inline Philox looped_philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                       uint32_t c3) {
#pragma unroll 5
    for (int round = 0; round < kPhiloxRounds; round++) philox_round(key, round, c0, c1, c2, c3);
    return {{c0, c1, c2, c3}};
}

// Philox decides for four keys of a query at a time, as drop_pack does: row h * T + query of T
// columns. The lanes that hold elements of such a four share one call.
struct AttentionDropout {
    uint64_t seed = 0, first_sequence = 0;
    uint32_t threshold = 0, stream = 0, step = 0;
    float scale = 1;
    bool drops = false;

    explicit AttentionDropout(const Dropout& dropout)
        : seed(dropout.seed),
          first_sequence(dropout.first_sequence),
          threshold(uint32_t(dropout.probability * 4294967296.0)),
          stream(random_stream(dropout.use, dropout.layer)),
          step(uint32_t(dropout.step)),
          scale(float(1 / (1 - dropout.probability))),
          drops(dropout.probability > 0) {}

    // Bit i: whether key 4 * four + i stays, of the query in `row`.
    __device__ uint32_t draw(int b, int row, int four, int T) const {
        uint32_t groups = (uint32_t(T) + 3) / 4;
        Philox random = looped_philox(seed, uint32_t(row) * groups + uint32_t(four),
                                      uint32_t(first_sequence + uint64_t(b)), stream, step);
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) bits |= uint32_t(random.word[i] >= threshold) << i;
        return bits;
    }

    // Bit e: whether element e of this lane's share of a 16 x 8 piece stays. Rows are queries from
    // `row` on, columns are keys from `key` on: lanes 2i and 2i + 1 share the four keys of rows g
    // and g + 8, and each draws one of them.
    __device__ uint32_t keep_by_query(int b, int row, int key, int T) const {
        int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
        uint32_t mine = draw(b, row + g + t % 2 * 8, key / 4 + t / 2, T);
        uint32_t other = __shfl_xor_sync(~0u, mine, 1);
        return t % 2 == 0 ? (mine & 3) | (other & 3) << 2 : other >> 2 | (mine & 12);
    }

    // The same with keys as rows and queries as columns: the lanes of four neighbouring keys share
    // the fours of two queries and of keys g and g + 8, and each draws one of those.
    __device__ uint32_t keep_by_key(int b, int row, int key, int T) const {
        int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4, i = g % 4;
        uint32_t all = draw(b, row + 2 * t + i % 2, key / 4 + i / 2 * 2 + g / 4, T) << (4 * i);
        all |= __shfl_xor_sync(~0u, all, 4);
        all |= __shfl_xor_sync(~0u, all, 8);
        all >>= i;
        return (all & 1) | (all >> 3 & 2) | (all >> 6 & 4) | (all >> 9 & 8);
    }
};

// ---- forward ----

// One step of the running softmax [Milakov & Gimelshein 2018, arXiv:1805.02867]. Turns scores into
// weights relative to the largest score so far, and brings sums to the same scale. `largest` is of
// scores before scaling; `total` is of this lane's columns alone. scale: log2(e) / sqrt(HS)
template <class Tiles>
__device__ void softmax_step(typename Tiles::Scores& scores, typename Tiles::Sums& sums,
                             float (&largest)[Tiles::kTall][2], float (&total)[Tiles::kTall][2],
                             float scale) {
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float most = largest[m][i];
#pragma unroll
            for (int n = 0; n < Tiles::kStep / 8; n++)
                most = fmaxf(most, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            float shrink = fast_exp2((largest[m][i] - most) * scale), shift = most * scale;
            largest[m][i] = most;
            total[m][i] *= shrink;
#pragma unroll
            for (int n = 0; n < Tiles::kStep / 8; n++) {
#pragma unroll
                for (int e = 2 * i; e < 2 * i + 2; e++) {
                    scores[m][n][e] = fast_exp2(fmaf(scores[m][n][e], scale, -shift));
                    total[m][i] += scores[m][n][e];
                }
            }
#pragma unroll
            for (int n = 0; n < Tiles::kHead / 8; n++) {
                sums[m][n][2 * i] *= shrink;
                sums[m][n][2 * i + 1] *= shrink;
            }
        }
    }
}

// Puts `value` where a key comes after its query. Rows are queries from `query` on, columns are
// keys from `key` on; with by_key the other way round.
template <class Tiles, bool by_key>
__device__ void mask_later_keys(typename Tiles::Scores& scores, int query, int key, float value) {
    int lane = int(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
    int distance = by_key ? query + 2 * t - (key + g) : query + g - (key + 2 * t);
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
        for (int n = 0; n < Tiles::kStep / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int further = 16 * m + e / 2 * 8 - (8 * n + e % 2);
                if (distance + (by_key ? -further : further) < 0) scores[m][n][e] = value;
            }
        }
    }
}

// Which elements of a tile of weights dropout keeps, a bit each: those of this lane.
template <class Tiles>
struct KeptWeights {
    static constexpr int kBits = Tiles::kStep / 2;  // a lane's elements of 16 rows
    uint32_t words[divide_up(Tiles::kTall * kBits, 32)] = {};

    __device__ void add(int m, int n, uint32_t bits) {
        words[m * kBits / 32] |= bits << (m * kBits % 32 + 4 * n);
    }
    __device__ bool has(int m, int n, int e) const {
        return (words[m * kBits / 32] >> (m * kBits % 32 + 4 * n + e) & 1) != 0;
    }
};

// Draws for queries from `query` on and keys from `key` on; with by_key, keys are the rows.
template <class Tiles, bool by_key>
__device__ KeptWeights<Tiles> kept_weights(const AttentionDropout& dropout,
                                           const AttentionPlace& place, int query, int key, int T) {
    KeptWeights<Tiles> kept;
    int row = place.h * T + query;
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll 1
        for (int n = 0; n < Tiles::kStep / 8; n++)
            kept.add(m, n,
                     by_key ? dropout.keep_by_key(place.b, row + 8 * n, key + 16 * m, T)
                            : dropout.keep_by_query(place.b, row + 16 * m, key + 8 * n, T));
    }
    return kept;
}

template <class Tiles>
__device__ void drop_weights(typename Tiles::Scores& weights, const KeptWeights<Tiles>& kept) {
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
        for (int n = 0; n < Tiles::kStep / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (!kept.has(m, n, e)) weights[m][n][e] = 0;
        }
    }
}

// A block owns queries and goes through the keys that they see. A warp leaves out steps whose keys
// all come after its queries, and masks only those that straddle the diagonal. Moves 4 BTC numbers
// (keys and values again for each tile of queries, but those come from the level-2 cache), and
// multiplies 4 B NH HS T^2 / 2 times: bound by tensor cores and, at a head size of 64, as much by
// exponentials. Measured on an H200: 35% of the rate of a large product by wgmma, 28% by mma.sync.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks)
    attention_forward_kernel(typename Tiles::Float* __restrict__ out, float* __restrict__ logsumexp,
                             const typename Tiles::Float* __restrict__ qkv,
                             AttentionDropout dropout, AttentionShape shape) {
    using Float = typename Tiles::Float;
    constexpr int kStep = Tiles::kStep, kTile = kStep * Tiles::kPitch;
    int warps = warps_of_block<Tiles>(), warp = int(threadIdx.x) / kWarp;
    int T = shape.T, C = shape.C, rows = warps * Tiles::kRows, tiles = divide_up(T, rows);
    AttentionPlace place = attention_place(shape, tiles);
    int first = (tiles - 1 - place.tile) * rows, own = first + warp * Tiles::kRows;
    int steps = divide_up(min(first + rows, T), kStep);
    int stride = 3 * C;
    const Float* q = qkv + size_t(place.b) * T * stride + place.h * shape.HS;
    const Float *k = q + C, *v = k + C;

    size_t offset = 0;
    Shared<Float> queries = shared_array<Float>(offset, rows * Tiles::kPitch);
    Shared<Float> keys = shared_array<Float>(offset, 2 * kTile);
    Shared<Float> values = shared_array<Float>(offset, 2 * kTile);
    Shared<float> patch = shared_array<float>(offset, warps * Tiles::kPatch) + warp * Tiles::kPatch;
    Shared<Float> own_queries = queries + warp * Tiles::kRows * Tiles::kPitch;
    LeftRows<Tiles, Tiles::kHold> left(queries);
    load_tile<Tiles>(queries, q, stride, first, rows, shape);
    load_tile<Tiles>(keys, k, stride, 0, kStep, shape);
    load_tile<Tiles>(values, v, stride, 0, kStep, shape);
    cp_async_commit();

    left.hold();
    typename Tiles::Sums sums = {};
    float largest[Tiles::kTall][2], total[Tiles::kTall][2] = {};
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) largest[m][0] = largest[m][1] = -INFINITY;
    for (int step = 0; step < steps; step++) {
        int key = step * kStep, current = step % 2 * kTile, next = kTile - current;
        wait_for_tiles<Tiles>();
        // This step's tiles are there for every thread, and every warp is done with those of the
        // step before, whose place the next ones take.
        __syncthreads();
        if (step + 1 < steps) {
            load_tile<Tiles>(keys + next, k, stride, key + kStep, kStep, shape);
            load_tile<Tiles>(values + next, v, stride, key + kStep, kStep, shape);
            cp_async_commit();
        }
        if (key >= own + Tiles::kRows) continue;
        KeptWeights<Tiles> kept;
        if (dropout.drops) kept = kept_weights<Tiles, false>(dropout, place, own, key, T);
        typename Tiles::Scores scores;
        multiply_abT<Tiles>(scores, left, keys + current);
        if (key + kStep - 1 > own) mask_later_keys<Tiles, false>(scores, own, key, -INFINITY);
        softmax_step<Tiles>(scores, sums, largest, total, shape.scale2);
        if (dropout.drops) drop_weights(scores, kept);
        multiply_pb<Tiles>(sums, scores, values + current, patch);
    }

    float factor[Tiles::kTall][2];
    int lane = int(threadIdx.x) % kWarp;
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = total[m][i];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            factor[m][i] = dropout.scale / sum;
            int t = own + 16 * m + 8 * i + lane / 4;
            if (lane % 4 == 0 && t < T)
                logsumexp[(size_t(place.b) * shape.NH + place.h) * T + t] =
                    fmaf(largest[m][i], shape.scale, logf(sum));
        }
    }
    store_rows<Tiles>(out + size_t(place.b) * T * C + place.h * shape.HS, size_t(C), own,
                      own_queries, sums, factor, shape);
}

// Calls f.template operator()<HSP>() with HSP the head size rounded up to what is compiled.
template <class Float, class F>
void with_head_size(int HS, F f) {
    assert(HS >= 1 && HS <= kMostHeadSize);
    if constexpr (sizeof(Float) == 2) {
        switch (divide_up(HS, 16)) {
            case 1:
                return f.template operator()<16>();
            case 2:
                return f.template operator()<32>();
            case 3:
                return f.template operator()<48>();
            case 4:
                return f.template operator()<64>();
            case 5:
                return f.template operator()<80>();
            case 6:
                return f.template operator()<96>();
            case 7:
                return f.template operator()<112>();
            default:
                return f.template operator()<128>();
        }
    } else {
        switch (divide_up(HS, 32)) {
            case 1:
                return f.template operator()<32>();
            case 2:
                return f.template operator()<64>();
            case 3:
                return f.template operator()<96>();
            default:
                return f.template operator()<128>();
        }
    }
}

// Warps of a block: fewer than the tiles allow where T is short.
template <class Tiles>
int attention_warps(int T) {
    return Tiles::kWarpgroup ? Tiles::kWarps : std::min(Tiles::kWarps, divide_up(T, Tiles::kRows));
}

template <class Tiles>
unsigned attention_blocks(const AttentionShape& shape, int warps) {
    return unsigned(shape.heads) * unsigned(divide_up(shape.T, warps * Tiles::kRows));
}

template <class Tiles>
void attention_forward_tiled(typename Tiles::Float* out, float* logsumexp,
                             const typename Tiles::Float* qkv, const Dropout& dropout, int B, int T,
                             int C, int NH, cudaStream_t stream) {
    AttentionShape shape = attention_shape<Tiles>(B, T, C, NH);
    int warps = attention_warps<Tiles>(T);
    launch("attention_forward", attention_forward_kernel<Tiles>,
           attention_blocks<Tiles>(shape, warps), unsigned(warps * kWarp),
           Tiles::shared_bytes(1, warps), stream, out, logsumexp, qkv, AttentionDropout(dropout),
           shape);
}

// In float32 the tiles of larger heads are smaller, so that every card has shared memory for them.
template <class Float, int HSP>
using AttentionForwardTiles = std::conditional_t<
    sizeof(Float) == 2, AttentionTiles<Float, HSP, 2, 4, HSP <= 96 ? 64 : 32, HSP <= 64>,
    AttentionTiles<Float, HSP, HSP <= 96 ? 2 : 1, 4, HSP <= 64 ? 32 : 16, false>>;
using AttentionForwardWarpgroup = AttentionWarpgroup<5>;

// Whether the card and this program's code for it have wgmma. (Code of an earlier architecture,
// which the driver translates, has not.)
static bool has_wgmma() {
    static const bool has = [] {
        int device = 0, major = 0;
        check(cudaGetDevice(&device), "cudaGetDevice");
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "wgmma");
        if (major != 9) return false;
        int in_code = 0;
        check(cudaMemcpyFromSymbol(&in_code, code_has_wgmma, sizeof(in_code)), "wgmma");
        return in_code != 0;
    }();
    return has;
}

// Calls f.template operator()<Warpgroup>() where this card has wgmma and heads are of its size,
// else with Tiles.
template <class Warpgroup, class Tiles, class F>
void with_tiles(F f) {
    if constexpr (Tiles::kTensorCores && Tiles::kHead == Warpgroup::kHead)
        if (has_wgmma()) return f.template operator()<Warpgroup>();
    f.template operator()<Tiles>();
}

// out = dropout(softmax(q k^T / sqrt(HS), causal)) v, a head at a time  [Vaswani et al. 2017,
// arXiv:1706.03762]
// out (B,T,C) and logsumexp (B,NH,T), of the scaled scores, are written; qkv (B,T,3C) holds q, k
// and v, each (NH,HS). HS at most kMostHeadSize.
template <class Float>
void attention_forward(Float* out, float* logsumexp, const Float* qkv, const Dropout& dropout,
                       int B, int T, int C, int NH, cudaStream_t stream) {
    with_head_size<Float>(C / NH, [&]<int HSP>() {
        with_tiles<AttentionForwardWarpgroup, AttentionForwardTiles<Float, HSP>>(
            [&]<class Tiles>() {
                static_assert(Tiles::shared_bytes(1, Tiles::kWarps) <= kMostShared);
                attention_forward_tiled<Tiles>(out, logsumexp, qkv, dropout, B, T, C, NH, stream);
            });
    });
}

// ---- backward ----

// delta = sum over a head of dout * out, a row of it (B,NH,T). kShare lanes take a row, 16 bytes
// each, and add up by shuffles. Moves 2 BTC numbers, at the rate of memory.
template <class Float>
__global__ void attention_delta_kernel(float* delta, const Float* __restrict__ dout,
                                       const Float* __restrict__ out, AttentionShape shape,
                                       int share) {
    constexpr int kWidth = kWide<Float>;
    int T = shape.T, HS = shape.HS, index = int(threadIdx.x) / share;
    int tiles = divide_up(T, int(blockDim.x) / share);
    int head = int(blockIdx.x) / tiles, b = head / shape.NH, h = head % shape.NH;
    int t = int(blockIdx.x) % tiles * (int(blockDim.x) / share) + index;
    int column = int(threadIdx.x) % share * kWidth;
    float sum = 0;
    if (t < T && column < HS) {
        size_t offset = (size_t(b) * T + t) * shape.C + h * HS + column;
        float x[kWidth], y[kWidth];
        if (shape.packed) {
            load_pack<Float, kWidth>(x, dout + offset);
            load_pack<Float, kWidth>(y, out + offset);
        } else {
#pragma unroll
            for (int k = 0; k < kWidth; k++) {
                x[k] = column + k < HS ? to_float(dout[offset + k]) : 0.f;
                y[k] = column + k < HS ? to_float(out[offset + k]) : 0.f;
            }
        }
#pragma unroll
        for (int k = 0; k < kWidth; k++) sum = fmaf(x[k], y[k], sum);
    }
    for (int distance = share / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(~0u, sum, distance);
    if (column == 0 && t < T) delta[size_t(head) * T + t] = sum;
}

// weights: scores q k^T on entry, p = 2^(score * scale - shift) on exit. slopes: dout v^T on entry,
// ds = p * (dropout(slope) - delta), less its factor 1/sqrt(HS), on exit. `at(m, n, e, x)` gives
// the shift (x = 0) or delta (x = 1) of an element's query. `straddles`: keys after their query
// weigh nothing. With dropout, the weights are dropped last, though not yet scaled.
template <class Tiles, bool by_key, class At>
__device__ void score_gradient(typename Tiles::Scores& weights, typename Tiles::Scores& slopes,
                               const AttentionDropout& dropout, const KeptWeights<Tiles>& kept,
                               int query, int key, bool straddles, float scale, At at) {
    if (straddles) mask_later_keys<Tiles, by_key>(weights, query, key, -INFINITY);
    if (dropout.drops) drop_weights(slopes, kept);
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) {
#pragma unroll
        for (int n = 0; n < Tiles::kStep / 8; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float p = fast_exp2(fmaf(weights[m][n][e], scale, -at(m, n, e, 0)));
                slopes[m][n][e] = p * fmaf(slopes[m][n][e], dropout.scale, -at(m, n, e, 1));
                weights[m][n][e] = p;
            }
        }
    }
    // A query that sees one key weighs it 1, whatever its score: the gradient is 0, and what
    // rounding leaves of it AdamW would divide by its own size.
    if (query == 0 && key == 0 && threadIdx.x % kWarp == 0) slopes[0][0][0] = 0;
    if (dropout.drops) drop_weights(weights, kept);
}

// A block owns keys and goes through the queries that see them, in order, so that the sums dk and
// dv have one owner. It works on transposed scores: what a lane holds of p^T and ds^T is then a
// left factor. 4 of backward's 7 products; moves 6 BTC numbers. Measured on an H200, both kernels:
// 42% of the rate of a large product by wgmma, counting what they execute, 31% by mma.sync.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks)
    attention_backward_keys_kernel(typename Tiles::Float* __restrict__ dqkv,
                                   const typename Tiles::Float* __restrict__ dout,
                                   const typename Tiles::Float* __restrict__ qkv,
                                   const float* __restrict__ logsumexp,
                                   const float* __restrict__ delta, AttentionDropout dropout,
                                   AttentionShape shape) {
    using Float = typename Tiles::Float;
    constexpr int kStep = Tiles::kStep, kTile = kStep * Tiles::kPitch;
    static_assert(kStep <= (Tiles::kWarpgroup ? 4 : 1) * kWarp, "a thread fetches a query");
    int warps = warps_of_block<Tiles>(), warp = int(threadIdx.x) / kWarp, tid = int(threadIdx.x);
    int T = shape.T, C = shape.C, rows = warps * Tiles::kRows, tiles = divide_up(T, rows);
    AttentionPlace place = attention_place(shape, tiles);
    int first = place.tile * rows, own = first + warp * Tiles::kRows;
    int first_query = first / kStep * kStep, stride = 3 * C;
    size_t head = size_t(place.b) * T * stride + place.h * shape.HS;
    const Float *q = qkv + head, *k = q + C, *v = k + C;
    const Float* d = dout + size_t(place.b) * T * C + place.h * shape.HS;
    int vectors = (place.b * shape.NH + place.h) * T;

    size_t offset = 0;
    // What has the same size in every block first: its places need no registers.
    Shared<Float> queries = shared_array<Float>(offset, 2 * kTile);
    Shared<Float> douts = shared_array<Float>(offset, 2 * kTile);
    Shared<float> query_numbers = shared_array<float>(offset, 2 * 2 * kStep);
    Shared<Float> keys = shared_array<Float>(offset, rows * Tiles::kPitch);
    Shared<Float> values = shared_array<Float>(offset, rows * Tiles::kPitch);
    Shared<float> patch = shared_array<float>(offset, warps * Tiles::kPatch) + warp * Tiles::kPatch;
    Shared<Float> own_keys = keys + warp * Tiles::kRows * Tiles::kPitch;
    Shared<Float> own_values = values + warp * Tiles::kRows * Tiles::kPitch;
    LeftRows<Tiles, Tiles::kHold> left_keys(keys), left_values(values);
    load_tile<Tiles>(keys, k, stride, first, rows, shape);
    load_tile<Tiles>(values, v, stride, first, rows, shape);
    int start = first_query / kStep % 2 * kTile;
    load_tile<Tiles>(queries + start, q, stride, first_query, kStep, shape);
    load_tile<Tiles>(douts + start, d, C, first_query, kStep, shape);
    cp_async_commit();

    float next_shift = 0, next_delta = 0;  // on their way for this thread's query of the next step
    auto fetch = [&](int query) {
        if (tid >= kStep) return;
        bool valid = query + tid < T;  // a padded query weighs nothing: 2^-infinity
        next_shift = valid ? logsumexp[vectors + query + tid] * kLog2e : INFINITY;
        next_delta = valid ? delta[vectors + query + tid] : 0.f;
    };
    fetch(first_query);
    left_keys.hold(), left_values.hold();
    typename Tiles::Sums dk = {}, dv = {};
    for (int query = first_query; query < T; query += kStep) {
        int current = query / kStep % 2, next = 1 - current;
        Shared<float> numbers = query_numbers + current * 2 * kStep;
        if (tid < kStep) {
            numbers[tid] = next_shift;
            numbers[kStep + tid] = next_delta;
        }
        wait_for_tiles<Tiles>();
        // This step's tiles and numbers are there for every thread, and every warp is done with
        // those of the step before, whose place the next ones take.
        __syncthreads();
        if (query + kStep < T) {
            load_tile<Tiles>(queries + next * kTile, q, stride, query + kStep, kStep, shape);
            load_tile<Tiles>(douts + next * kTile, d, C, query + kStep, kStep, shape);
            cp_async_commit();
            fetch(query + kStep);
        }
        if (own > query + kStep - 1) continue;
        Shared<const Float> query_tile = queries + current * kTile;
        Shared<const Float> dout_tile = douts + current * kTile;
        KeptWeights<Tiles> kept;
        if (dropout.drops) kept = kept_weights<Tiles, true>(dropout, place, query, own, T);
        typename Tiles::Scores weights, slopes;
        multiply_two_abT<Tiles>(weights, left_keys, query_tile, slopes, left_values, dout_tile);
        bool straddles = own + Tiles::kRows - 1 > query;
        score_gradient<Tiles, true>(weights, slopes, dropout, kept, query, own, straddles,
                                    shape.scale2, [&](int, int n, int e, int x) -> float {
                                        return numbers[x * kStep + 8 * n + tid % 4 * 2 + e % 2];
                                    });
        multiply_pb<Tiles>(dv, weights, dout_tile, patch);
        multiply_pb<Tiles>(dk, slopes, query_tile, patch);
    }

    float key_factor[Tiles::kTall][2], value_factor[Tiles::kTall][2];
#pragma unroll
    for (int m = 0; m < Tiles::kTall; m++) {
        key_factor[m][0] = key_factor[m][1] = shape.scale;
        value_factor[m][0] = value_factor[m][1] = dropout.scale;
    }
    Float* dq = dqkv + (q - qkv);  // from what is in registers
    store_rows<Tiles>(dq + C, stride, own, own_keys, dk, key_factor, shape);
    store_rows<Tiles>(dq + 2 * C, stride, own, own_values, dv, value_factor, shape);
}

// A block owns queries and goes through the keys that they see, as in forward. 3 of backward's 7
// products; moves 5 BTC numbers.
template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks)
    attention_backward_queries_kernel(typename Tiles::Float* __restrict__ dqkv,
                                      const typename Tiles::Float* __restrict__ dout,
                                      const typename Tiles::Float* __restrict__ qkv,
                                      const float* __restrict__ logsumexp,
                                      const float* __restrict__ delta, AttentionDropout dropout,
                                      AttentionShape shape) {
    using Float = typename Tiles::Float;
    constexpr int kStep = Tiles::kStep, kTile = kStep * Tiles::kPitch, kTall = Tiles::kTall;
    int warps = warps_of_block<Tiles>(), warp = int(threadIdx.x) / kWarp;
    int T = shape.T, C = shape.C, rows = warps * Tiles::kRows, tiles = divide_up(T, rows);
    AttentionPlace place = attention_place(shape, tiles);
    int first = (tiles - 1 - place.tile) * rows, own = first + warp * Tiles::kRows;
    int steps = divide_up(min(first + rows, T), kStep);
    int stride = 3 * C;
    size_t head = size_t(place.b) * T * stride + place.h * shape.HS;
    const Float *q = qkv + head, *k = q + C, *v = k + C;
    const Float* d = dout + size_t(place.b) * T * C + place.h * shape.HS;

    size_t offset = 0;
    Shared<Float> queries = shared_array<Float>(offset, rows * Tiles::kPitch);
    Shared<Float> douts = shared_array<Float>(offset, rows * Tiles::kPitch);
    Shared<Float> keys = shared_array<Float>(offset, 2 * kTile);
    Shared<Float> values = shared_array<Float>(offset, 2 * kTile);
    Shared<float> patch = shared_array<float>(offset, warps * Tiles::kPatch) + warp * Tiles::kPatch;
    Shared<Float> own_queries = queries + warp * Tiles::kRows * Tiles::kPitch;
    LeftRows<Tiles, Tiles::kHold> left_queries(queries);
    LeftRows<Tiles, false> left_douts(douts);
    load_tile<Tiles>(queries, q, stride, first, rows, shape);
    load_tile<Tiles>(douts, d, C, first, rows, shape);
    load_tile<Tiles>(keys, k, stride, 0, kStep, shape);
    load_tile<Tiles>(values, v, stride, 0, kStep, shape);
    cp_async_commit();

    float numbers[2][kTall][2];
#pragma unroll
    for (int m = 0; m < kTall; m++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int t = own + 16 * m + 8 * i + int(threadIdx.x) % kWarp / 4;
            size_t place_t = (size_t(place.b) * shape.NH + place.h) * T + t;
            numbers[0][m][i] = t < T ? logsumexp[place_t] * kLog2e : INFINITY;
            numbers[1][m][i] = t < T ? delta[place_t] : 0.f;
        }
    }
    left_queries.hold();
    typename Tiles::Sums dq = {};
    for (int step = 0; step < steps; step++) {
        int key = step * kStep, current = step % 2 * kTile, next = kTile - current;
        wait_for_tiles<Tiles>();
        // This step's tiles are there for every thread, and every warp is done with those of the
        // step before, whose place the next ones take.
        __syncthreads();
        if (step + 1 < steps) {
            load_tile<Tiles>(keys + next, k, stride, key + kStep, kStep, shape);
            load_tile<Tiles>(values + next, v, stride, key + kStep, kStep, shape);
            cp_async_commit();
        }
        if (key >= own + Tiles::kRows) continue;
        KeptWeights<Tiles> kept;
        if (dropout.drops) kept = kept_weights<Tiles, false>(dropout, place, own, key, T);
        typename Tiles::Scores weights, slopes;
        multiply_two_abT<Tiles>(weights, left_queries, keys + current, slopes, left_douts,
                                values + current);
        bool straddles = key + kStep - 1 > own;
        score_gradient<Tiles, false>(
            weights, slopes, dropout, kept, own, key, straddles, shape.scale2,
            [&](int m, int, int e, int x) { return numbers[x][m][e / 2]; });
        multiply_pb<Tiles>(dq, slopes, keys + current, patch);
    }
    float factor[kTall][2];
#pragma unroll
    for (int m = 0; m < kTall; m++) factor[m][0] = factor[m][1] = shape.scale;
    store_rows<Tiles>(dqkv + head, stride, own, own_queries, dq, factor, shape);
}

template <class Float>
void attention_delta(float* delta, const Float* dout, const Float* out, AttentionShape shape,
                     cudaStream_t stream) {
    constexpr int kThreads = 256;
    int share = 1;
    while (share * kWide<Float> < shape.HS) share *= 2;
    int threads = std::min(kThreads, round_up(shape.T * share, kWarp));
    unsigned blocks = unsigned(shape.heads) * unsigned(divide_up(shape.T, threads / share));
    launch("attention_delta", attention_delta_kernel<Float>, blocks, unsigned(threads), 0, stream,
           delta, dout, out, shape, share);
}

// Beside its tiles a block of the keys has two numbers of each query, of this step and the next.
template <class Tiles>
constexpr size_t attention_keys_shared_bytes(int warps) {
    return Tiles::shared_bytes(2, warps) + 4 * Tiles::kStep * sizeof(float);
}

template <class KeyTiles, class QueryTiles>
void attention_backward_tiled(typename KeyTiles::Float* dqkv, const typename KeyTiles::Float* dout,
                              const typename KeyTiles::Float* qkv,
                              const typename KeyTiles::Float* out, const float* logsumexp,
                              float* scratch, const Dropout& dropout, int B, int T, int C, int NH,
                              cudaStream_t stream) {
    AttentionShape shape = attention_shape<KeyTiles>(B, T, C, NH);
    attention_delta(scratch, dout, out, shape, stream);
    int warps = attention_warps<KeyTiles>(T);
    launch("attention_backward_keys", attention_backward_keys_kernel<KeyTiles>,
           attention_blocks<KeyTiles>(shape, warps), unsigned(warps * kWarp),
           attention_keys_shared_bytes<KeyTiles>(warps), stream, dqkv, dout, qkv, logsumexp,
           scratch, AttentionDropout(dropout), shape);
    warps = attention_warps<QueryTiles>(T);
    launch("attention_backward_queries", attention_backward_queries_kernel<QueryTiles>,
           attention_blocks<QueryTiles>(shape, warps), unsigned(warps * kWarp),
           QueryTiles::shared_bytes(2, warps), stream, dqkv, dout, qkv, logsumexp, scratch,
           AttentionDropout(dropout), shape);
}

// Beyond a head size of 64 the sums of 32 rows a warp would take all registers there are. The
// largest heads leave fewer warps room in shared memory.
template <int HSP>
constexpr int kBackwardTall = HSP <= 64 ? 2 : 1;
template <int HSP>
constexpr int kBackwardWarps = HSP <= 64 || HSP > 112 ? 4 : 8;  // of bf16
template <class Float, int HSP>
using AttentionKeyTiles = std::conditional_t<
    sizeof(Float) == 2,
    AttentionTiles<Float, HSP, kBackwardTall<HSP>, kBackwardWarps<HSP>, 32, false>,
    AttentionTiles<Float, HSP, kBackwardTall<HSP>, HSP <= 96 ? 4 : 3, HSP <= 32 ? 32 : 16, false>>;
template <class Float, int HSP>
using AttentionQueryTiles = std::conditional_t<
    sizeof(Float) == 2,
    AttentionTiles<Float, HSP, kBackwardTall<HSP>, kBackwardWarps<HSP>, 32, HSP <= 64>,
    AttentionKeyTiles<Float, HSP>>;

using AttentionKeyWarpgroup = AttentionWarpgroup<3>;
using AttentionQueryWarpgroup = AttentionWarpgroup<4>;

// forward: s = q k^T;  p = softmax(s / sqrt(HS));  d = dropout(p);  out = d v
// dv = d^T dout;  dd = dout v^T;  ds = p * (dropout(dd) - dout . out) / sqrt(HS)
// dq = ds k;  dk = ds^T q                 [Dao et al. 2022, arXiv:2205.14135, appendix B]
//
// dqkv (B,T,3C) is written, each element once, by sums in a fixed order: no atomics, so that it
// repeats bitwise. That costs 7 products instead of 5: s and dd are computed where the keys' sums
// live, and again where the queries' do. dout, out (B,T,C), qkv (B,T,3C), logsumexp (B,NH,T) of
// forward; scratch (B,NH,T).
template <class Float>
void attention_backward(Float* dqkv, const Float* dout, const Float* qkv, const Float* out,
                        const float* logsumexp, float* scratch, const Dropout& dropout, int B,
                        int T, int C, int NH, cudaStream_t stream) {
    with_head_size<Float>(C / NH, [&]<int HSP>() {
        with_tiles<AttentionKeyWarpgroup, AttentionKeyTiles<Float, HSP>>([&]<class Keys>() {
            using Queries = std::conditional_t<Keys::kWarpgroup, AttentionQueryWarpgroup,
                                               AttentionQueryTiles<Float, HSP>>;
            static_assert(attention_keys_shared_bytes<Keys>(Keys::kWarps) <= kMostShared);
            static_assert(Queries::shared_bytes(2, Queries::kWarps) <= kMostShared);
            attention_backward_tiled<Keys, Queries>(dqkv, dout, qkv, out, logsumexp, scratch,
                                                    dropout, B, T, C, NH, stream);
        });
    });
}

// ---- generation ----

// A thread a number: new keys and values of each sequence to their place in the caches.
template <class Float>
__global__ void attention_cache_kernel(Float* key_cache, Float* value_cache, const Float* qkv,
                                       int n, int position, int context, int C) {
    int b = int(blockIdx.x) / n, i = int(blockIdx.x) % n;
    const Float* k = qkv + size_t(blockIdx.x) * 3 * C + C;
    size_t place = (size_t(b) * context + position + i) * C;
    for (int c = int(threadIdx.x); c < C; c += int(blockDim.x)) {
        key_cache[place + c] = k[c];
        value_cache[place + c] = k[C + c];
    }
}

constexpr int kCachedKeys = 8;   // that a warp works on at once
constexpr int kCachedWarps = 8;  // of a block, at most

// A block answers one query of one head. Its warps take kCachedKeys keys at a time in turn, each
// with its own running softmax; a lane holds every 32nd number of the head. Reads each key and
// value that the query sees once: 2 NH HS numbers a key, bound by memory where there are many
// sequences, and by latency where there are few.
template <class Float>
__global__ void attention_cached_kernel(Float* out, const Float* __restrict__ key_cache,
                                        const Float* __restrict__ value_cache,
                                        const Float* __restrict__ qkv, int n, int position,
                                        int context, int C, int NH) {
    constexpr int kShare = kMostHeadSize / kWarp;  // numbers of the head that a lane holds
    int HS = C / NH, lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    int warps = int(blockDim.x) / kWarp, h = int(blockIdx.x) % NH, bi = int(blockIdx.x) / NH;
    int visible = position + bi % n + 1;
    const Float* q = qkv + size_t(bi) * 3 * C + h * HS;
    size_t cache = size_t(bi / n) * context * C + h * HS;
    const Float *k = key_cache + cache, *v = value_cache + cache;
    const float scale = kLog2e / sqrtf(float(HS));
    float query[kShare], sum[kShare] = {}, largest = -INFINITY, total = 0;
#pragma unroll
    for (int s = 0; s < kShare; s++)
        query[s] = lane + s * kWarp < HS ? to_float(q[lane + s * kWarp]) * scale : 0.f;

    for (int first = warp * kCachedKeys; first < visible; first += warps * kCachedKeys) {
        float scores[kCachedKeys], values[kCachedKeys][kShare], most = largest;
#pragma unroll
        for (int j = 0; j < kCachedKeys; j++) {
            size_t row = size_t(min(first + j, visible - 1)) * C;
            scores[j] = 0;
#pragma unroll
            for (int s = 0; s < kShare; s++) {
                int c = lane + s * kWarp;
                if (c < HS) scores[j] = fmaf(query[s], to_float(k[row + c]), scores[j]);
                values[j][s] = c < HS ? to_float(v[row + c]) : 0.f;
            }
        }
#pragma unroll
        for (int j = 0; j < kCachedKeys; j++) {
            scores[j] = warp_sum(scores[j]);
            if (first + j >= visible) scores[j] = -INFINITY;
            most = fmaxf(most, scores[j]);
        }
        float shrink = fast_exp2(largest - most);
        largest = most;
        total *= shrink;
#pragma unroll
        for (int s = 0; s < kShare; s++) sum[s] *= shrink;
#pragma unroll
        for (int j = 0; j < kCachedKeys; j++) {
            float p = fast_exp2(scores[j] - most);
            total += p;
#pragma unroll
            for (int s = 0; s < kShare; s++) sum[s] = fmaf(p, values[j][s], sum[s]);
        }
    }

    size_t offset = 0;
    Shared<float> sums = shared_array<float>(offset, warps * kMostHeadSize);
    Shared<float> ends = shared_array<float>(offset, 2 * warps);  // largest and total of each warp
#pragma unroll
    for (int s = 0; s < kShare; s++) sums[warp * kMostHeadSize + lane + s * kWarp] = sum[s];
    if (lane == 0) ends[warp] = largest;
    if (lane == 0) ends[warps + warp] = total;
    __syncthreads();  // every thread adds up over the warps, in their order
    float most = ends[0], all = 0;
    for (int w = 1; w < warps; w++) most = fmaxf(most, ends[w]);
    for (int w = 0; w < warps; w++) all += ends[warps + w] * fast_exp2(ends[w] - most);
    for (int c = int(threadIdx.x); c < HS; c += int(blockDim.x)) {
        float value = 0;
        for (int w = 0; w < warps; w++)
            value += sums[w * kMostHeadSize + c] * fast_exp2(ends[w] - most);
        out[size_t(bi) * C + h * HS + c] = from_float<Float>(value / all);
    }
}

// Attention of n new queries a sequence at `position` over the keys and values of a cache
// (B,context,C), to which this call first adds the new ones. out (B,n,C) is written; qkv (B,n,3C).
// position + n is at most context.
template <class Float>
void attention_cached_forward(Float* out, Float* key_cache, Float* value_cache, const Float* qkv,
                              int B, int n, int position, int context, int C, int NH,
                              cudaStream_t stream) {
    constexpr int kThreads = 256;
    assert(position >= 0 && position + n <= context && C / NH <= kMostHeadSize);
    launch("attention_cache", attention_cache_kernel<Float>, unsigned(B * n),
           unsigned(std::min(kThreads, round_up(C, kWarp))), 0, stream, key_cache, value_cache, qkv,
           n, position, context, C);
    int warps = std::min(kCachedWarps, divide_up(position + n, kCachedKeys));
    launch("attention_cached", attention_cached_kernel<Float>, unsigned(B * n * NH),
           unsigned(warps * kWarp), size_t(warps) * (kMostHeadSize + 2) * sizeof(float), stream,
           out, key_cache, value_cache, qkv, n, position, context, C, NH);
}

// ==== gelu =======================================================================================

// sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): GELU is x times it
__device__ inline float gelu_gate(float x) {
    float u = float(kGeluScale) * (x + float(kGeluCube) * x * x * x);
    return 1 / (1 + expf(-2 * u));
}

// A pack a thread; moves 2 N numbers.
template <class Float, int Width>
__global__ void gelu_forward_kernel(Float* out, const Float* inp, size_t N) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * Width;
    if (i >= N) return;
    float x[Width];
    load_pack<Float, Width>(x, inp + i);
#pragma unroll
    for (int k = 0; k < Width; k++) x[k] *= gelu_gate(x[k]);
    store_pack<Float, Width>(out + i, x);
}

// A thread for each pack of Width numbers.
template <class Float, int Width>
unsigned pack_blocks(size_t N, int threads) {
    size_t blocks = (N / Width + size_t(threads) - 1) / size_t(threads);
    assert(N % Width == 0 && blocks <= size_t(INT32_MAX));
    return unsigned(blocks);
}

constexpr int kPackThreads = 256;

// y = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3)  [Hendrycks & Gimpel 2016,
// arXiv:1606.08415]
//   = x sigmoid(2u), which loses no digits where tanh(u) is near -1
// out (N) is written
template <class Float>
void gelu_forward(Float* out, const Float* inp, size_t N, cudaStream_t stream) {
    with_width<Float>(are_wide<Float>(N, out, inp), [&]<int Width>() {
        launch("gelu_forward", gelu_forward_kernel<Float, Width>,
               pack_blocks<Float, Width>(N, kPackThreads), kPackThreads, 0, stream, out, inp, N);
    });
}

// As forward; moves 3 N numbers.
template <class Float, int Width>
__global__ void gelu_backward_kernel(Float* dinp, const Float* dout, const Float* inp, size_t N) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * Width;
    if (i >= N) return;
    float x[Width], dy[Width];
    load_pack<Float, Width>(x, inp + i);
    load_pack<Float, Width>(dy, dout + i);
#pragma unroll
    for (int k = 0; k < Width; k++) {
        float du = float(kGeluScale) * (1 + 3 * float(kGeluCube) * x[k] * x[k]);
        float s = gelu_gate(x[k]);
        dy[k] *= s + 2 * x[k] * s * (1 - s) * du;
    }
    store_pack<Float, Width>(dinp + i, dy);
}

// forward: y = x s, s = sigmoid(2u(x))
// dx = dy (s + 2 x s (1 - s) u'),  u' = sqrt(2/pi) (1 + 3 * 0.044715 x^2)
// dinp (N) is written; it may be dout
template <class Float>
void gelu_backward(Float* dinp, const Float* dout, const Float* inp, size_t N,
                   cudaStream_t stream) {
    with_width<Float>(are_wide<Float>(N, dinp, dout, inp), [&]<int Width>() {
        launch("gelu_backward", gelu_backward_kernel<Float, Width>,
               pack_blocks<Float, Width>(N, kPackThreads), kPackThreads, 0, stream, dinp, dout, inp,
               N);
    });
}

// ==== residual ===================================================================================

// As layernorm_forward; moves 4 BTC numbers where two kernels would move 5. The norm is taken of
// the sum as it is stored, rounded, which is what backward reads.
template <class Float, int Width, int Columns, bool kDrops>
__global__ void __launch_bounds__(kRowThreads<Width>)
    residual_layernorm_forward_kernel(Float* residual, Float* out, float* mean, float* rstd,
                                      const Float* inp, const Float* branch, const Float* weight,
                                      const Float* bias, float epsilon, Dropout dropout, int BT,
                                      int T, int C) {
    using Slice = RowSlice<Float, Width, Columns>;
    size_t offset = 0;
    BlockSum<1> block_sum(offset);
    for (int bt = first_row(); bt < BT; bt += row_step()) {
        float x[Columns], y[Columns];
        Slice::load(x, inp + size_t(bt) * C, C);
        Slice::load(y, branch + size_t(bt) * C, C);
        if constexpr (kDrops) {
            uint64_t sequence = dropout.first_sequence + uint64_t(bt / T);
#pragma unroll
            for (int i = 0; i < Slice::kPacks; i++)
                drop_pack<Width>(&y[i * Width], dropout, sequence, bt % T, Slice::column(i), C);
        }
#pragma unroll
        for (int j = 0; j < Columns; j++) x[j] = to_float(from_float<Float>(x[j] + y[j]));
        Slice::store(residual + size_t(bt) * C, x, C);
        float2 statistics = row_statistics<Slice>(x, block_sum, epsilon, C);
        store_normalised<Slice>(out + size_t(bt) * C, x, statistics.y, weight, bias, C);
        if (threadIdx.x == 0) mean[bt] = statistics.x, rstd[bt] = statistics.y;
    }
}

// residual = inp + dropout(branch) [He et al. 2015, arXiv:1512.03385], then out = layer norm of it.
// residual, out (B,T,C) and mean, rstd (B,T) are written; inp, branch (B,T,C); residual may be inp.
template <class Float>
void residual_layernorm_forward(Float* residual, Float* out, float* mean, float* rstd,
                                const Float* inp, const Float* branch, const Float* weight,
                                const Float* bias, double epsilon, const Dropout& dropout, int B,
                                int T, int C, cudaStream_t stream) {
    bool wide = are_wide<Float>(size_t(C), residual, out, inp, branch, weight, bias);
    with_columns<Float>(wide, C, [&]<int Width, int Columns>() {
        auto kernel = dropout.probability > 0
                          ? residual_layernorm_forward_kernel<Float, Width, Columns, true>
                          : residual_layernorm_forward_kernel<Float, Width, Columns, false>;
        dim3 block = row_block(C, Columns);
        size_t shared = BlockSum<1>::bytes();
        launch("residual_layernorm_forward", kernel,
               unsigned(row_blocks(kernel, block, shared, B * T)), block, shared, stream, residual,
               out, mean, rstd, inp, branch, weight, bias, float(epsilon), dropout, B * T, T, C);
    });
}

// ==== classifier =================================================================================

// The larger of two running maxima, and the sums of exponentials about them brought to it.
struct SoftmaxSum {
    float largest, sum;  // -infinity and 0 before the first number
};

__device__ inline SoftmaxSum merge(SoftmaxSum a, SoftmaxSum b) {
    float largest = fmaxf(a.largest, b.largest);
    if (largest == -INFINITY) return a;
    return {largest, a.sum * expf(a.largest - largest) + b.sum * expf(b.largest - largest)};
}

// Over all lanes, then over the warps in their order; every thread gets the result.
__device__ inline SoftmaxSum block_merge(SoftmaxSum mine, Shared<float> partial) {
    int warps = int(blockDim.x) / kWarp, warp = int(threadIdx.x) / kWarp;
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        mine = merge(mine, {__shfl_xor_sync(~0u, mine.largest, distance),
                            __shfl_xor_sync(~0u, mine.sum, distance)});
    if (warps == 1) return mine;
    if (threadIdx.x % kWarp == 0) {
        partial[2 * warp] = mine.largest;
        partial[2 * warp + 1] = mine.sum;
    }
    __syncthreads();  // every warp's part is there before any thread merges them
    SoftmaxSum all = {-INFINITY, 0};
    for (int w = 0; w < warps; w++) all = merge(all, {partial[2 * w], partial[2 * w + 1]});
    return all;
}

// e^x, for bf16 with the error of fast_exp2.
template <class Float>
__device__ float exp_for(float x) {
    if constexpr (sizeof(Float) == 2) return fast_exp2(x * kLog2e);
    else return expf(x);
}

// Takes N more numbers into a sum: one exponential each, and one to bring the sum to its new
// maximum.
template <class Float, int N>
__device__ void add_numbers(SoftmaxSum& sum, const float (&values)[N]) {
    float largest = sum.largest, added = 0;
#pragma unroll
    for (int k = 0; k < N; k++) largest = fmaxf(largest, values[k]);
#pragma unroll
    for (int k = 0; k < N; k++) added += exp_for<Float>(values[k] - largest);
    sum.sum = sum.sum * exp_for<Float>(sum.largest - largest) + added;
    sum.largest = largest;
}

// A block a row. The logits are read once for the softmax's sum and, with `gradient`, once more,
// from cache, when they are replaced. (Kept in shared memory instead, they would gain 3%.) Moves
// BT*Vp numbers, and with the gradient 2 BT*Vp.
template <class Float>
__global__ void __launch_bounds__(kMostThreads)
    classifier_forward_kernel(float* losses, Float* logits, const int* targets, float loss_scale,
                              bool gradient, int V, int Vp) {
    constexpr int Width = kWide<Float>, kAtOnce = 4;  // packs that are on their way together
    size_t offset = 0;
    Shared<float> partial = shared_array<float>(offset, 2 * kWarp);
    Float* row = logits + size_t(blockIdx.x) * Vp;
    int target = targets[blockIdx.x], threads = int(blockDim.x), first = int(threadIdx.x);
    if (target == kIgnore) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        float zeros[Width] = {};
        for (int p = first; gradient && p < Vp / Width; p += threads)
            store_pack<Float, Width>(row + p * Width, zeros);
        return;
    }
    float at_target = to_float(row[target]);
    SoftmaxSum mine = {-INFINITY, 0};
    uint4 bits[kAtOnce] = {};
    int p = first;
    for (; p + (kAtOnce - 1) * threads < V / Width; p += kAtOnce * threads) {
        float values[kAtOnce * Width];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
            bits[i] = *reinterpret_cast<const uint4*>(row + (p + i * threads) * Width);
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) unpack<Float>(&values[i * Width], bits[i]);
        add_numbers<Float>(mine, values);
    }
    for (; p * Width < V; p += threads) {  // what is left, of which the last pack may be a part
        float values[Width];
        load_pack<Float, Width>(values, row + p * Width);
#pragma unroll
        for (int k = 0; k < Width; k++)
            if (p * Width + k >= V) values[k] = -INFINITY;
        add_numbers<Float>(mine, values);
    }
    // The barrier inside also keeps the row as it is until every thread has read the target's
    // logit.
    SoftmaxSum all = block_merge(mine, partial);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(all.sum) + (all.largest - at_target);
    if (!gradient) return;
    __syncwarp();  // of a block that is one warp, for the same reason
    float inverse = 1 / all.sum;
    for (p = first; p * Width < Vp; p += kAtOnce * threads) {
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            int at = (p + i * threads) * Width;
            if (at < Vp) bits[i] = *reinterpret_cast<uint4*>(row + at);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            int j = (p + i * threads) * Width;
            if (j >= Vp) break;
            float values[Width];
            unpack<Float>(values, bits[i]);
#pragma unroll
            for (int k = 0; k < Width; k++)
                values[k] = exp_for<Float>(values[k] - all.largest) * inverse;
            if ((target >= j && target < j + Width) || j + Width > V) {  // in few packs of a row
#pragma unroll
                for (int k = 0; k < Width; k++)
                    values[k] = j + k < V ? values[k] - float(j + k == target) : 0;
            }
#pragma unroll
            for (int k = 0; k < Width; k++) values[k] *= loss_scale;
            store_pack<Float, Width>(row + j, values);
        }
    }
}

// loss = log(sum_j exp(logit_j)) - logit_target
// dlogit_j = (softmax_j - [j = target]) * loss_scale
//
// losses (BT) is written, 0 where the target is -1. logits (BT,Vp): only V take part;
// with `gradient` they are replaced by dlogits, 0 in the padding and where the target is -1.
template <class Float>
void classifier_forward(float* losses, Float* logits, const int* targets, double loss_scale,
                        bool gradient, int BT, int V, int Vp, cudaStream_t stream) {
    constexpr int kPacks = 4;  // of a thread, before a row takes more threads
    int threads = round_up(divide_up(Vp, kPacks * kWide<Float>), kWarp);
    threads = std::min(threads, 512);
    launch("classifier_forward", classifier_forward_kernel<Float>, unsigned(BT), unsigned(threads),
           2 * kWarp * sizeof(float), stream, losses, logits, targets, float(loss_scale), gradient,
           V, Vp);
}

// The sum of N numbers over a block of one warp or more, in double, to the first thread.
__device__ inline double block_sum_double(double x, Shared<double> partial) {
    int warps = int(blockDim.x) / kWarp;
    x = warp_sum(x);
    if (threadIdx.x % kWarp == 0) partial[int(threadIdx.x) / kWarp] = x;
    __syncthreads();  // every warp's sum is there before the first thread adds them up
    double total = 0;
    if (threadIdx.x == 0)
        for (int w = 0; w < warps; w++) total += partial[w];
    return total;
}

// One block, in a fixed order: reads BT numbers, 5 us of a step.
__global__ void add_losses_kernel(double* loss, const float* losses, double loss_scale, int BT) {
    size_t offset = 0;
    Shared<double> partial = shared_array<double>(offset, kWarp);
    double sum = 0;
    for (int bt = int(threadIdx.x); bt < BT; bt += int(blockDim.x)) sum += double(losses[bt]);
    sum = block_sum_double(sum, partial);
    if (threadIdx.x == 0) *loss += sum * loss_scale;
}

// loss += loss_scale * sum over losses (BT)
static void add_losses(double* loss, const float* losses, double loss_scale, int BT,
                       cudaStream_t stream) {
    int threads = std::min(round_up(BT, kWarp), kMostThreads);
    launch("add_losses", add_losses_kernel, 1u, unsigned(threads), kWarp * sizeof(double), stream,
           loss, losses, loss_scale, BT);
}

// ==== global norm ================================================================================

// Squares and sums in double, eight numbers of a thread at a time; each block writes one sum. Reads
// N numbers, which takes longer than the sums even on cards that are slow in double.
__global__ void global_norm_kernel(double* partial, const float* gradients, size_t N) {
    constexpr int Width = kWide<float>;
    size_t offset = 0;
    Shared<double> sums = shared_array<double>(offset, kWarp);
    double sum = 0;
    size_t stride = size_t(gridDim.x) * blockDim.x * 2 * Width;
    size_t first = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 2 * Width;
    for (size_t i = first; i < N; i += stride) {
        float g[2 * Width];
        load_pack<float, Width>(g, gradients + i);
        load_pack<float, Width>(g + Width, gradients + i + Width);
#pragma unroll
        for (int k = 0; k < 2 * Width; k++) sum += double(g[k]) * double(g[k]);
    }
    sum = block_sum_double(sum, sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block adds up the blocks' sums.
__global__ void global_norm_root_kernel(double* squares, const double* partial, int blocks) {
    size_t offset = 0;
    Shared<double> sums = shared_array<double>(offset, kWarp);
    double sum = 0;
    for (int i = int(threadIdx.x); i < blocks; i += int(blockDim.x)) sum += partial[i];
    sum = block_sum_double(sum, sums);
    if (threadIdx.x == 0) *squares = sum;
}

// Sums of the squares of N gradients, a multiple of kRowAlignment of them, to at most kNormBlocks
// numbers of partial. Returns how many.
static int global_norm_part(double* partial, const float* gradients, size_t N,
                            cudaStream_t stream) {
    constexpr int kThreads = 256;
    size_t needed = (N / (2 * kWide<float>)+kThreads - 1) / kThreads;
    int blocks = int(std::min({needed, size_t(8 * multiprocessors()), size_t(kNormBlocks)}));
    launch("global_norm", global_norm_kernel, unsigned(blocks), kThreads, kWarp * sizeof(double),
           stream, partial, gradients, N);
    return blocks;
}

// squares = the square of the norm: the sum of `blocks` numbers of partial, in a fixed order
static void global_norm(double* squares, const double* partial, int blocks, cudaStream_t stream) {
    constexpr int kThreads = 256;
    launch("global_norm, root", global_norm_root_kernel, 1u,
           unsigned(std::min(round_up(blocks, kWarp), kThreads)), kWarp * sizeof(double), stream,
           squares, partial, blocks);
}

// ==== adamw ======================================================================================

// What the norm and the loss allow the update to do, decided on the device so that the host need
// not wait for them.
struct UpdateGate {
    double loss, squares;  // of the gradients, summed
    double norm;
    float grad_scale;
    int apply;  // 0: loss or norm is not finite, and nothing may change
};

__global__ void update_gate_kernel(UpdateGate* gate, double grad_clip) {
    gate->norm = sqrt(gate->squares);
    gate->apply = isfinite(gate->norm) && isfinite(gate->loss);
    double scale = grad_clip > 0 ? grad_clip / (gate->norm + 1e-6) : 1;
    gate->grad_scale = float(scale < 1 ? scale : 1);
}

// What every element needs of AdamW's settings, in float.
struct AdamWFactors {
    float beta1, rest1, beta2, rest2, keep, rate, inverse_root, epsilon;
};

// A pack a thread, of four arrays, all on their way before the first is needed; lanes that lie side
// by side fill whole lines. Reads 16 N bytes and writes 12 N, and 2 N more where there is a bf16
// copy.
template <class Float>
__global__ void adamw_update_kernel(float* params, Float* narrow, float* m, float* v,
                                    const float* grads, size_t N, AdamWFactors f,
                                    const UpdateGate* gate) {
    constexpr int Width = kWide<float>;
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * Width;
    if (i >= N) return;
    float g[Width], m_new[Width], v_new[Width], p[Width];
    load_pack<float, Width>(g, grads + i);
    load_pack<float, Width>(m_new, m + i);
    load_pack<float, Width>(v_new, v + i);
    load_pack<float, Width>(p, params + i);
    float scale = gate->grad_scale;
    if (!gate->apply) return;
#pragma unroll
    for (int k = 0; k < Width; k++) {
        g[k] *= scale;
        m_new[k] = f.beta1 * m_new[k] + f.rest1 * g[k];
        v_new[k] = f.beta2 * v_new[k] + f.rest2 * g[k] * g[k];
        p[k] = f.keep * p[k] - f.rate * m_new[k] / (sqrtf(v_new[k]) * f.inverse_root + f.epsilon);
    }
    store_pack<float, Width>(m + i, m_new);
    store_pack<float, Width>(v + i, v_new);
    store_pack<float, Width>(params + i, p);
    if constexpr (sizeof(Float) == 2) store_pack<Float, Width>(narrow + i, p);
}

// m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  with g scaled by the gate
// p = p - lr decay p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
// [Kingma & Ba 2014, arXiv:1412.6980; Loshchilov & Hutter 2017, arXiv:1711.05101]
// params, m, v (N) are updated; grads (N), a multiple of kRowAlignment. With Float bf16, narrow (N)
// gets params rounded to nearest: the float32 ones remember what rounding drops, so that there is
// no drift for stochastic rounding to mend, and the same bits every time. With Float float it is
// not used.
template <class Float>
void adamw_update(float* params, Float* narrow, float* m, float* v, const float* grads, size_t N,
                  const AdamW& adamw, double weight_decay, const UpdateGate* gate,
                  cudaStream_t stream) {
    double correction1 = 1 - std::pow(adamw.beta1, double(adamw.step));
    double correction2 = 1 - std::pow(adamw.beta2, double(adamw.step));
    AdamWFactors factors = {float(adamw.beta1),
                            float(1 - adamw.beta1),
                            float(adamw.beta2),
                            float(1 - adamw.beta2),
                            float(1 - adamw.learning_rate * weight_decay),
                            float(adamw.learning_rate / correction1),
                            float(1 / std::sqrt(correction2)),
                            float(adamw.epsilon)};
    launch("adamw_update", adamw_update_kernel<Float>,
           pack_blocks<float, kWide<float>>(N, kPackThreads), kPackThreads, 0, stream, params,
           narrow, m, v, grads, N, factors, gate);
}

#ifndef GPT2_LAYERS_ONLY

// ==== memory =====================================================================================

// What a batch needs on the device, and the pinned memory that it is copied from: inputs and
// targets (B,T), and the buckets of its tokens. Two of them take turns, so that the copy of one
// batch overlaps with the pass over the other.
struct BatchSlot {
    int *host = nullptr, *device = nullptr;
    cudaEvent_t copied = nullptr;  // recorded on the copy stream
    cudaEvent_t read = nullptr;    // recorded when the pass over it no longer reads it
    TokenCounts different = {};    // tokens

    static size_t numbers(size_t BT) { return 5 * BT + 1; }
};

// Where tensors lie in the memory of a group: in buckets, one for each layer and a last one for
// those that exist once, because ranks add up gradients, and send each other what they have
// updated, a bucket at a time. Within a bucket the tensors that decay come first, so that AdamW
// takes it in two runs. It divides into equal parts, one for each rank, whose bounds every wide
// load finds aligned.
struct Layout {
    struct Bucket {
        size_t begin = 0, size = 0;  // numbers of a group
        size_t decayed = 0;          // from its begin on, those that decay
        size_t used = 0;             // without what makes the parts equal
    };
    std::vector<Bucket> buckets;
    std::array<size_t, kParameterRows> places = {};  // of a row in its bucket
    size_t numbers = 0;                              // of a whole group

    Layout() = default;
    Layout(const GPT2Config& config, int world) {
        ParameterTable rows = parameter_table(config);
        Bucket layer, once;
        for (bool decays : {true, false}) {
            for (size_t i = 0; i < kParameterRows; i++) {
                if (!rows[i].present || rows[i].decays != decays) continue;
                Bucket& bucket = rows[i].per_layer() ? layer : once;
                places[i] = bucket.size;
                bucket.size += aligned(rows[i].size());
                if (decays) bucket.decayed = bucket.size;
            }
        }
        size_t whole = kRowAlignment * size_t(world);
        for (int l = 0; l <= config.layers; l++) {
            Bucket bucket = l < config.layers ? layer : once;
            bucket.used = bucket.size;
            bucket.size = (bucket.size + whole - 1) / whole * whole;
            bucket.begin = numbers;
            numbers += bucket.size;
            buckets.push_back(bucket);
        }
    }
    const Bucket& layer() const { return buckets.front(); }  // all of them are alike
    const Bucket& once() const { return buckets.back(); }
};

// What a rank holds of a group: all of it, or of each bucket its part.
static bool shards(const GPT2Shape& shape, Group group) {
    if (shape.zero == 0) return false;
    if (group == Group::parameters) return shape.dtype == Dtype::bf16;  // the float32 ones
    return group != Group::gradients || shape.zero == 2;
}

// What a rank's snapshot holds, and where a group begins in it: everything, or, of several ranks
// that save parts, of the moments its own, and on rank 0 all parameters.
struct SnapshotPlaces {
    std::array<size_t, 3> places = {};  // of kSnapshotGroups
    size_t numbers = 0;

    SnapshotPlaces(const Layout& layout, const GPT2Shape& shape, int rank) {
        for (size_t i = 0; i < kSnapshotGroups.size(); i++) {
            places[i] = numbers;
            if (shape.saves_parts && kSnapshotGroups[i] != Group::parameters)
                numbers += layout.numbers / size_t(shape.world);
            else if (rank == 0) numbers += layout.numbers;
        }
    }
    size_t place(Group group) const { return places[snapshot_index(group)]; }
};

// Gradients that are sharded exist whole for the tensors that are there once, which every layer may
// add to, and for two layers: while one is summed over ranks, backward computes the next.
constexpr size_t kLayersInFlight = 2;

static size_t gradient_numbers(const Layout& layout, const GPT2Shape& shape) {
    if (!shards(shape, Group::gradients)) return layout.numbers;
    size_t layers = layout.buckets.size() - 1;
    return layout.once().size + layers * layout.layer().size / size_t(shape.world) +
           kLayersInFlight * layout.layer().size;
}

// Levels of a tree over the leaves of a step: see add_leaf_kernel.
static size_t tree_levels(const GPT2Shape& shape) {
    return size_t(std::bit_width(unsigned(shape.leaves)));
}

// The other ranks of a job: the stream on which sums over them are made, so that the backward pass
// goes on meanwhile, and updated parameters sent, so that the next forward pass does.
struct Peers {
#    ifdef GPT2_NCCL
    ncclComm_t comm = nullptr;
#    endif
    cudaStream_t stream = nullptr;
    cudaEvent_t ready = nullptr;       // what is to be sent
    cudaEvent_t summed = nullptr;      // the gradients of a step, all of them
    std::vector<cudaEvent_t> sent;     // gradients of a pass, by GPT2::place_of
    std::vector<cudaEvent_t> arrived;  // updated parameters, by bucket, where states are sharded

    void leave();  // once nothing is under way
    void abort();  // whatever is: nothing waits for a rank any more
};

struct GPT2 {
    GPT2Config config;
    GPT2Shape shape;
    ParameterTable parameter_rows;
    ActivationTable activation_rows;
    Layout layout;
    std::vector<void*> allocations;
    std::array<float*, 4> groups = {};  // by Group; parameters are null where only bf16 ones are
    bf16* narrow_parameters = nullptr;  // what products read in bf16
    bf16* narrow_gradients = nullptr;   // of a bucket, on their way to other ranks
    void* pieces = nullptr;             // of this rank's part of a bucket, from every rank
    float* tree = nullptr;              // sums of gradients: see add_leaf_kernel
    double* row_squares = nullptr;      // of the gradients, kRowAlignment at a time
    double* leaf_losses = nullptr;
    std::array<void*, kActivationRows> activations = {};
    double* norm_scratch = nullptr;
    UpdateGate* gate = nullptr;

    float* snapshot = nullptr;  // pinned
    float* staging = nullptr;   // a part of another rank, on its way to or from there
    bool snapshot_begun = false;
    cudaEvent_t snapshot_ready = nullptr, snapshot_copied = nullptr;

    cudaStream_t stream = nullptr, copy_stream = nullptr;
    cudaStream_t snapshot_stream = nullptr;  // so that no batch waits behind it
    std::unique_ptr<Products> products;
    std::array<BatchSlot, 2> slots;
    uint64_t passes = 0, updates = 0;
    UpdateGate* host_gates = nullptr;  // pinned: of two updates in turn, and one asked for
    std::array<cudaEvent_t, 2> gate_copied = {};
    std::array<cudaEvent_t, 2> begun = {}, computed = {};  // the passes of a step
    cudaEvent_t reached = nullptr;                         // what the host waits for
    std::vector<int> counts;                               // of each token
    std::vector<char> host_copy;                           // of a tensor, on its way
    int B = 0, T = 0;                                      // of the last forward
    GPT2Pass pass;

    int rank = 0;
    Peers peers;

    ~GPT2() {
        if (std::uncaught_exceptions() > 0) peers.abort();
        if (stream != nullptr) cudaStreamSynchronize(stream);
        if (copy_stream != nullptr) cudaStreamSynchronize(copy_stream);
        if (snapshot_stream != nullptr) cudaStreamSynchronize(snapshot_stream);
        peers.leave();
        products.reset();
        for (void* memory : allocations) cudaFree(memory);
        for (BatchSlot& slot : slots) {
            cudaFreeHost(slot.host);
            if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
            if (slot.read != nullptr) cudaEventDestroy(slot.read);
        }
        cudaFreeHost(host_gates);
        cudaFreeHost(snapshot);
        for (cudaEvent_t event : {snapshot_ready, snapshot_copied, reached})
            if (event != nullptr) cudaEventDestroy(event);
        for (const auto& events : {gate_copied, begun, computed})
            for (cudaEvent_t event : events)
                if (event != nullptr) cudaEventDestroy(event);
        if (stream != nullptr) cudaStreamDestroy(stream);
        if (copy_stream != nullptr) cudaStreamDestroy(copy_stream);
        if (snapshot_stream != nullptr) cudaStreamDestroy(snapshot_stream);
    }

    // The parameters of one layer as products read them, and their gradients; tensors that exist
    // once are the same in every layer, those not present are null.
    template <class Float>
    ParameterPointers<const Float> parameters_of(int l) const {
        const void* memory = narrow_parameters;
        if (memory == nullptr) memory = groups[size_t(Group::parameters)];
        const Float* all = static_cast<const Float*>(memory);
        return pointers(all + layout.buckets[size_t(l)].begin, all + layout.once().begin);
    }
    ParameterPointers<float> gradients_of(int l) const {
        if (groups[size_t(Group::gradients)] == nullptr) return {};  // it does not train
        return pointers(gradients_at(size_t(l)), gradients_at(layout.buckets.size() - 1));
    }

    template <class Number>
    ParameterPointers<Number> pointers(Number* layer, Number* once) const {
        ParameterPointers<Number> tensors;
#    define X(name, ...)                                                      \
        {                                                                     \
            const ParameterRow& row = parameter_rows[k_##name];               \
            Number* bucket = row.per_layer() ? layer : once;                  \
            if (row.present) tensors.name = bucket + layout.places[k_##name]; \
        }
        GPT2_PARAMETER_TABLE(X)
#    undef X
        return tensors;
    }

    // This rank's part of a bucket.
    size_t part_size(size_t bucket) const {
        return layout.buckets[bucket].size / size_t(shape.world);
    }
    size_t part_begin(size_t bucket) const { return size_t(rank) * part_size(bucket); }
    bool shards_states() const { return shards(shape, Group::first_moments); }
    SnapshotPlaces snapshot_places() const { return SnapshotPlaces(layout, shape, rank); }
    // Whether this rank saves, and reads, its own part of a group.
    bool saves_part(Group group) const { return shape.saves_parts && group != Group::parameters; }
    bool shards_gradients() const { return shards(shape, Group::gradients); }
    bool is_layer(size_t bucket) const { return bucket + 1 < layout.buckets.size(); }

    // Whether the gradients of a bucket are summed over ranks in every pass, not once a step, and
    // which other buckets' memory they have: those of the same place.
    bool sums_every_pass(size_t bucket) const {
        return shape.leaves > 0 || (is_layer(bucket) && shards_gradients());
    }
    size_t place_of(size_t bucket) const {
        return is_layer(bucket) && shards_gradients() ? bucket % kLayersInFlight : bucket;
    }

    // Where backward writes the gradients of a bucket, and where this rank's part of their sum is.
    // Sharded ones lie in this order: once, the parts of the layers, the layers in flight.
    float* gradients_at(size_t bucket) const {
        float* all = groups[size_t(Group::gradients)];
        if (!shards_gradients()) return all + layout.buckets[bucket].begin;
        size_t layers = layout.buckets.size() - 1, size = layout.layer().size;
        if (bucket == layers) return all;
        return all + layout.once().size + layers * part_size(0) + place_of(bucket) * size;
    }
    float* gradient_part(size_t bucket) const {
        if (shards_gradients() && is_layer(bucket))
            return groups[size_t(Group::gradients)] + layout.once().size + bucket * part_size(0);
        return gradients_at(bucket) + part_begin(bucket);
    }

    // The tree of this rank's part of a bucket's gradients.
    float* tree_of(size_t bucket) const {
        return tree + tree_levels(shape) * layout.buckets[bucket].begin / size_t(shape.world);
    }

    // The numbers of a bucket that this rank updates, and where they are in a group: its part, or
    // all of them.
    size_t updated_begin(size_t bucket) const { return shards_states() ? part_begin(bucket) : 0; }
    size_t updated_size(size_t bucket) const {
        return shards_states() ? part_size(bucket) : layout.buckets[bucket].size;
    }
    float* updated(Group group, size_t bucket) const {
        if (group == Group::gradients)
            return shards_states() ? gradient_part(bucket) : gradients_at(bucket);
        size_t begin = layout.buckets[bucket].begin;
        bool part = shards(shape, group);
        return groups[size_t(group)] +
               (part ? begin / size_t(shape.world) : begin + updated_begin(bucket));
    }

    template <class Float>
    ActivationPointers<Float, float> activations_of(int l) const {
        ActivationPointers<Float, float> tensors;
#    define X(name, type, ...)                                                                     \
        {                                                                                          \
            using Number = std::remove_pointer_t<decltype(tensors.name)>;                          \
            const ActivationRow& row = activation_rows[a_##name];                                  \
            size_t layer = row.count > 1 ? size_t(l) * row.size : 0;                               \
            if (row.count > 0) tensors.name = static_cast<Number*>(activations[a_##name]) + layer; \
        }
        GPT2_ACTIVATION_TABLE(X)
#    undef X
        return tensors;
    }

    Dropout dropout(RandomUse use, int l) const {
        double probability = pass.training ? config.dropout : 0;
        return {probability, pass.seed, pass.step, pass.first_sequence, use, l};
    }
    BatchSlot& slot() { return slots[passes % 2]; }
};

// Calls f.template operator()<Float>() with the type of the model's activations.
template <class F>
void with_type(Dtype dtype, F f) {
    if (dtype == Dtype::bf16) f.template operator()<bf16>();
    else f.template operator()<float>();
}

TwinSizes gpt2_sizes(const GPT2Config& config, const GPT2Shape& shape) {
    size_t delta = size_t(shape.B) * size_t(shape.T) * size_t(config.heads);
    Layout layout(config, shape.world);
    auto held = [&](Group group) {
        return shards(shape, group) ? layout.numbers / size_t(shape.world) : layout.numbers;
    };
    return {kClassifierRows,
            shape.training ? delta : 0,
            kReduceRows,
            layout.numbers,
            held(Group::parameters),
            gradient_numbers(layout, shape),
            held(Group::first_moments)};
}

// Numbers of the largest part of a bucket.
static size_t largest_part(const Layout& layout, const GPT2Shape& shape) {
    return std::max(layout.layer().size, layout.once().size) / size_t(shape.world);
}

static size_t sums_bytes(const GPT2Config& config) {
    return sizeof(UpdateGate) + (size_t(config.layers) + 1) * kNormBlocks * sizeof(double);
}

// Sums of this rank's parts on every level, the squares of all rows, and the losses.
static size_t tree_bytes(const Layout& layout, const GPT2Shape& shape) {
    return tree_levels(shape) * layout.numbers / size_t(shape.world) * sizeof(float) +
           (layout.numbers / kRowAlignment + size_t(shape.leaves)) * sizeof(double);
}

static std::vector<MemoryRow> memory_beside_tensors(const GPT2Config& config,
                                                    const GPT2Shape& shape) {
    size_t BT = size_t(shape.B) * size_t(shape.T);
    std::vector<MemoryRow> rows = {{"batches", 2 * BatchSlot::numbers(BT) * sizeof(int)},
                                   {"library workspace", kWorkspaceBytes},
                                   {"sums", sums_bytes(config)}};
    Layout layout(config, shape.world);
    size_t part = largest_part(layout, shape), world = size_t(shape.world);
    bool narrow = shape.reduce == Dtype::bf16;
    if (shape.training && narrow)
        rows.push_back({"gradients to send", part * world * sizeof(bf16)});
    if (shape.training && (shape.leaves > 0 || shape.sums_exactly))
        rows.push_back(
            {"gradients received", part * world * (narrow ? sizeof(bf16) : sizeof(float))});
    if (shape.training && shape.leaves > 0)
        rows.push_back({"sums in a tree", tree_bytes(layout, shape)});
    if (shards(shape, Group::first_moments) && shape.snapshot)
        rows.push_back({"a part to save", part * sizeof(float)});
    // It depends on the links; up to 1.6 GB have been reported (github.com/NVIDIA/nccl issue 864).
    constexpr size_t kNcclBytes = size_t(1) << 30;
    if (shape.world > 1) rows.push_back({"NCCL, assumed", kNcclBytes});
    return rows;
}

std::vector<MemoryRow> gpt2_memory(const GPT2Config& config, const GPT2Shape& shape) {
    std::vector<MemoryRow> rows = tensor_memory(config, shape);
    for (const MemoryRow& row : memory_beside_tensors(config, shape)) rows.push_back(row);
    return rows;
}

std::vector<MemoryRow> gpt2_host_memory(const GPT2Config& config, const GPT2Shape& shape) {
    if (!shape.snapshot) return {};
    SnapshotPlaces places(Layout(config, shape.world), shape, 0);  // of rank 0, which has the most
    return {{"snapshot, not on the card", places.numbers * sizeof(float)}};
}

static void require_device();

size_t gpt2_memory_free() {
    require_device();
    size_t free = 0, total = 0;
    check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    return free;
}

// Refuses a model that is too large for what is free on the card, before anything is allocated.
static void check_memory(const GPT2Config& config, const GPT2Shape& shape) {
    size_t free = gpt2_memory_free(), needed = 0;
    std::vector<MemoryRow> rows = gpt2_memory(config, shape);
    size_t missing = total_bytes(rows) - std::min(free, total_bytes(rows));
    if (missing == 0) return;
    for (const MemoryRow& row : rows) {
        needed += row.bytes;
        if (needed > free)
            fail_machine(
                "out of memory: %s need %.1f MiB, and the model %.1f MiB more than the "
                "%.1f MiB that are free on the card; %s",
                row.group.c_str(), double(row.bytes) / 1048576, double(missing) / 1048576,
                double(free) / 1048576, what_would_fit(config, shape, free).c_str());
    }
}

static void* allocate(GPT2* model, size_t bytes, const std::string& group) {
    void* memory = nullptr;
    if (cudaMalloc(&memory, bytes) != cudaSuccess) {
        cudaGetLastError();
        fail_machine("out of memory: %s need %.1f MiB on the card; %s", group.c_str(),
                     double(bytes) / 1048576,
                     what_would_fit(model->config, model->shape, gpt2_memory_free()).c_str());
    }
    model->allocations.push_back(memory);
    check(cudaMemsetAsync(memory, 0, bytes, model->stream), "cudaMemsetAsync");
    return memory;
}

// One allocation a group of tensor_memory's, and the address of every buffer in them.
static void allocate_tensors(GPT2* model) {
    const GPT2Shape& shape = model->shape;
    std::map<std::string, char*> memory;
    for (const MemoryRow& row : tensor_memory(model->config, shape))
        memory[row.group] = static_cast<char*>(allocate(model, row.bytes, row.group));
    auto group = [&](const char* name) {
        auto found = memory.find(name);
        return found == memory.end() ? nullptr : reinterpret_cast<float*>(found->second);
    };
    model->groups = {group("parameters"), group("gradients"), group("first moments"),
                     group("second moments")};
    model->narrow_parameters = reinterpret_cast<bf16*>(group("parameters, bf16"));
    std::map<std::string, size_t> used;
    for (int i = 0; i < kActivationRows; i++) {
        size_t bytes = model->activation_rows[size_t(i)].bytes(shape.dtype);
        if (bytes == 0) continue;
        std::string name = activation_group(i);
        model->activations[size_t(i)] = memory.at(name) + used[name];
        used[name] += bytes;
    }
}

static void allocate_slots(GPT2* model) {
    size_t BT = size_t(model->shape.B) * size_t(model->shape.T);
    size_t bytes = BatchSlot::numbers(BT) * sizeof(int);
    auto* device = static_cast<int*>(allocate(model, 2 * bytes, "batches"));
    for (BatchSlot& slot : model->slots) {
        slot.device = device + (&slot - model->slots.data()) * ptrdiff_t(BatchSlot::numbers(BT));
        check(cudaMallocHost(reinterpret_cast<void**>(&slot.host), bytes), "pinned memory");
        check(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming), "event");
        check(cudaEventCreateWithFlags(&slot.read, cudaEventDisableTiming), "event");
    }
    auto* sums = static_cast<char*>(allocate(model, sums_bytes(model->config), "sums"));
    model->gate = reinterpret_cast<UpdateGate*>(sums);
    model->norm_scratch = reinterpret_cast<double*>(sums + sizeof(UpdateGate));
    check(cudaMallocHost(reinterpret_cast<void**>(&model->host_gates), 3 * sizeof(UpdateGate)),
          "pinned memory");
    for (cudaEvent_t& event : model->gate_copied)
        check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
    for (auto* events : {&model->begun, &model->computed})
        for (cudaEvent_t& event : *events) check(cudaEventCreate(&event), "event");
    check(cudaEventCreateWithFlags(&model->reached, cudaEventDisableTiming), "event");
    model->counts.resize(size_t(model->config.vocab_size));
}

// Moments of a model that was never saved are zeros, where other ranks get them from here too.
static void allocate_snapshot(GPT2* model) {
    size_t bytes = model->snapshot_places().numbers * sizeof(float);
    if (cudaMallocHost(reinterpret_cast<void**>(&model->snapshot), bytes) != cudaSuccess) {
        cudaGetLastError();
        fail_machine(
            "out of memory: the snapshot needs %.1f MiB of the machine's memory; "
            "--background-save off would do without",
            double(bytes) / 1048576);
    }
    if (!model->shards_states()) return;
    memset(model->snapshot, 0, bytes);
    if (model->rank > 0) return;
    size_t part = largest_part(model->layout, model->shape);
    void* memory = allocate(model, part * sizeof(float), "a part to save");
    model->staging = static_cast<float*>(memory);
}

// What gradients need on their way to a sum, beside their own memory.
static void allocate_sums(GPT2* model) {
    for (const MemoryRow& row : memory_beside_tensors(model->config, model->shape)) {
        if (row.group == "gradients to send")
            model->narrow_gradients = static_cast<bf16*>(allocate(model, row.bytes, row.group));
        if (row.group == "gradients received")
            model->pieces = allocate(model, row.bytes, row.group);
        if (row.group != "sums in a tree") continue;
        auto* squares = static_cast<double*>(allocate(model, row.bytes, row.group));
        model->row_squares = squares;
        model->leaf_losses = squares + model->layout.numbers / kRowAlignment;
        model->tree = reinterpret_cast<float*>(model->leaf_losses + model->shape.leaves);
    }
}

// Products that take less time than a launch are not worth timing.
static bool worth_tuning(const GPT2Config& config, const GPT2Shape& shape) {
    constexpr double kMultiplications = 1 << 24;
    double largest = std::max(config.padded_vocab(), config.hidden_size());
    return shape.training &&
           double(shape.B) * shape.T * config.channels * largest >= kMultiplications;
}

// Times every product of a training step, in a step over nothing: parameters are 0 still, and so
// are the gradients that it leaves.
static void tune_products(GPT2* model) {
    model->products->tune([&] {
        std::vector<int> nothing(size_t(model->shape.B) * size_t(model->shape.T), 0);
        GPT2Pass pass;
        pass.training = true;
        gpt2_forward(model, nothing.data(), nothing.data(), model->shape.B, model->shape.T, pass);
        gpt2_backward(model);
    });
    gpt2_zero_gradients(model);
}

GPT2* gpt2_create(const GPT2Config& config, const GPT2Shape& shape, int rank) {
    validate(config);
    if (shape.int8)
        fail_input("--weights int8: is for the CPU program, train_gpt2; here fp32 or bf16");
    check_range("--batch-size", shape.B, 1, 1 << 24);
    check_range("--sequence-length", shape.T, 1, config.context);
    check_range("tokens in a batch", double(shape.B) * shape.T, 1, 1 << 24);
    if (config.channels > kMostChannels)
        fail_input("--channels %d: on a GPU at most %d", config.channels, kMostChannels);
    if (config.head_size() > kMostHeadSize)
        fail_input("--heads %d --channels %d: heads of %d; on a GPU at most %d, as with --heads %d",
                   config.heads, config.channels, config.head_size(), kMostHeadSize,
                   divide_up(config.channels, kMostHeadSize));
    require_device();
    check_memory(config, shape);
    auto model = std::make_unique<GPT2>();
    model->config = config;
    model->shape = shape;
    model->rank = rank;
    model->parameter_rows = parameter_table(config);
    model->activation_rows = activation_table(config, shape);
    model->layout = Layout(config, shape.world);
    for (cudaStream_t* stream : {&model->stream, &model->copy_stream, &model->snapshot_stream})
        check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "stream");
    for (cudaEvent_t* event : {&model->snapshot_ready, &model->snapshot_copied})
        check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "event");
    allocate_tensors(model.get());
    allocate_slots(model.get());
    if (shape.snapshot) allocate_snapshot(model.get());
    allocate_sums(model.get());
    check(cudaStreamSynchronize(model->stream), "gpt2_create");  // the copy stream sees zeros too
    ProductOptions options = {shape.tf32, shape.deterministic, worth_tuning(config, shape),
                              user_cache_folder()};
    model->products = std::make_unique<Products>(options, model->stream);
    if (options.tune) tune_products(model.get());
    check(cudaStreamSynchronize(model->stream), "gpt2_create");
    return model.release();
}

void gpt2_destroy(GPT2* model) { delete model; }
const GPT2Config& gpt2_config(const GPT2* model) { return model->config; }
const GPT2Shape& gpt2_shape(const GPT2* model) { return model->shape; }

static size_t bucket_of(const GPT2* model, int row, int layer) {
    return model->parameter_rows[size_t(row)].per_layer() ? size_t(layer)
                                                          : model->layout.buckets.size() - 1;
}

static size_t tensor_offset(const GPT2* model, int row, int layer) {
    size_t bucket = bucket_of(model, row, layer);
    return model->layout.buckets[bucket].begin + model->layout.places[size_t(row)];
}

// Waits until the device has nothing to do, and updated parameters have come from every rank.
static void wait_for_device(const GPT2* model, const char* what);

// The numbers of a tensor that lie in this rank's part of its bucket, and where there.
struct HeldPart {
    size_t begin = 0, end = 0, place = 0;
};
static HeldPart held_part(const GPT2* model, int row, int layer) {
    size_t bucket = bucket_of(model, row, layer), first = model->layout.places[size_t(row)];
    size_t N = model->parameter_rows[size_t(row)].file_size();
    size_t part = model->part_begin(bucket), end = part + model->part_size(bucket);
    size_t from = std::max(first, part), to = std::min(first + N, end);
    if (from >= to) return {};
    return {from - first, to - first, from - part};
}

// What this rank holds of a tensor of a sharded group, and zeros for the rest.
static void copy_part_out(const GPT2* model, Group group, int row, int layer, real* host) {
    std::fill(host, host + model->parameter_rows[size_t(row)].file_size(), real(0));
    HeldPart held = held_part(model, row, layer);
    const float* memory = model->updated(group, bucket_of(model, row, layer)) + held.place;
    check(cudaMemcpy(host + held.begin, memory, (held.end - held.begin) * sizeof(float),
                     cudaMemcpyDeviceToHost),
          "gpt2_copy_out");
}

// On the model's stream: a cudaMemcpy from pageable memory may return before the device has it all,
// and what the default stream still does no other stream here waits for.
static void copy_to_device(GPT2* model, void* memory, const void* host, size_t bytes) {
    check(cudaMemcpyAsync(memory, host, bytes, cudaMemcpyHostToDevice, model->stream),
          "gpt2_copy_in");
    check(cudaStreamSynchronize(model->stream), "gpt2_copy_in");  // the host's may go
}

static void copy_part_in(GPT2* model, Group group, int row, int layer, const real* host) {
    HeldPart held = held_part(model, row, layer);
    float* memory = model->updated(group, bucket_of(model, row, layer)) + held.place;
    copy_to_device(model, memory, host + held.begin, (held.end - held.begin) * sizeof(float));
}

void gpt2_copy_out(const GPT2* model, Group group, int row, int layer, real* host) {
    size_t offset = tensor_offset(model, row, layer);
    size_t N = model->parameter_rows[size_t(row)].file_size();
    wait_for_device(model, "gpt2_copy_out");
    const float* memory = model->groups[size_t(group)];
    bool sharded = shards(model->shape, group);
    if (sharded && group != Group::parameters) return copy_part_out(model, group, row, layer, host);
    if (memory != nullptr && !sharded) {
        check(cudaMemcpy(host, memory + offset, N * sizeof(float), cudaMemcpyDeviceToHost),
              "gpt2_copy_out");
        return;
    }
    std::vector<bf16> narrow(N);
    check(cudaMemcpy(narrow.data(), model->narrow_parameters + offset, N * sizeof(bf16),
                     cudaMemcpyDeviceToHost),
          "gpt2_copy_out");
    for (size_t i = 0; i < N; i++) host[i] = __bfloat162float(narrow[i]);
}

// Parameters go to the float32 copy and, rounded to nearest, to the bf16 one, where they are. What
// is sharded goes to the snapshot, from which gpt2_share takes every rank's part, unless every rank
// takes its own.
void gpt2_copy_in(GPT2* model, Group group, int row, int layer, const real* host) {
    size_t offset = tensor_offset(model, row, layer);
    size_t N = model->parameter_rows[size_t(row)].file_size();
    gpt2_snapshot_wait(model);
    wait_for_device(model, "gpt2_copy_in");
    float* memory = model->groups[size_t(group)];
    if (model->saves_part(group)) {
        copy_part_in(model, group, row, layer, host);
    } else if (shards(model->shape, group)) {
        assert(model->snapshot != nullptr);
        std::copy(host, host + N, model->snapshot + model->snapshot_places().place(group) + offset);
    } else if (memory != nullptr) {
        copy_to_device(model, memory + offset, host, N * sizeof(float));
    }
    if (group != Group::parameters || model->narrow_parameters == nullptr) return;
    std::vector<bf16> narrow(N);
    for (size_t i = 0; i < N; i++) narrow[i] = __float2bfloat16_rn(host[i]);
    copy_to_device(model, model->narrow_parameters + offset, narrow.data(), N * sizeof(bf16));
}

void gpt2_activation_out(const GPT2* model, int row, int layer, real* host) {
    const ActivationRow& buffer = model->activation_rows[size_t(row)];
    size_t width = buffer.bytes(model->shape.dtype) / buffer.allocated();
    const char* memory = static_cast<const char*>(model->activations[size_t(row)]) +
                         size_t(layer) * buffer.size * width;
    std::vector<char> numbers(buffer.size * width);
    check(cudaStreamSynchronize(model->stream), "gpt2_activation_out");
    check(cudaMemcpy(numbers.data(), memory, numbers.size(), cudaMemcpyDeviceToHost),
          "gpt2_activation_out");
    if (width == sizeof(float)) {
        memcpy(host, numbers.data(), numbers.size());
        return;
    }
    const auto* narrow = reinterpret_cast<const bf16*>(numbers.data());
    for (size_t i = 0; i < buffer.size; i++) host[i] = __bfloat162float(narrow[i]);
}

static void wait_for(const GPT2* model, cudaEvent_t event, const char* what);
static void parameters_arrive(const GPT2* model);
static void gather_snapshot(GPT2* model, Group group);

// The copy has a stream of its own, which begins when the updates so far are done; the next update
// waits for it on the device, so that the host waits for nothing.
void gpt2_snapshot_begin(GPT2* model) {
    assert(model->shape.snapshot || model->shards_states());
    cudaStream_t stream = model->snapshot_stream;
    parameters_arrive(model);
    check(cudaEventRecord(model->snapshot_ready, model->stream), "snapshot");
    check(cudaStreamWaitEvent(stream, model->snapshot_ready, 0), "snapshot");
    for (Group group : kSnapshotGroups) {
        bool part = model->saves_part(group);
        if (shards(model->shape, group) && !part) gather_snapshot(model, group);
        else if (part || (model->shape.snapshot && model->rank == 0)) {
            size_t numbers = model->layout.numbers / size_t(part ? model->shape.world : 1);
            check(cudaMemcpyAsync(model->snapshot + model->snapshot_places().place(group),
                                  model->groups[size_t(group)], numbers * sizeof(float),
                                  cudaMemcpyDeviceToHost, stream),
                  "snapshot");
        }
    }
    check(cudaEventRecord(model->snapshot_copied, stream), "snapshot");
    model->snapshot_begun = true;
}

void gpt2_snapshot_wait(GPT2* model) {
    if (model->snapshot_begun) wait_for(model, model->snapshot_copied, "snapshot");
}

TensorPart gpt2_snapshot_tensor(const GPT2* model, Group group, int row, int layer) {
    const float* kept = model->snapshot + model->snapshot_places().place(group);
    if (!model->saves_part(group))
        return {0, model->parameter_rows[size_t(row)].file_size(),
                kept + tensor_offset(model, row, layer)};
    HeldPart held = held_part(model, row, layer);
    size_t begin = model->layout.buckets[bucket_of(model, row, layer)].begin;
    return {held.begin, held.end, kept + begin / size_t(model->shape.world) + held.place};
}

// ==== ranks ======================================================================================

// sum += level, and level = sum, of Width numbers
template <int Width>
__device__ void add_level(float* sum, const float* level) {
    constexpr int Half = kWide<float>;
    float numbers[Half];
#    pragma unroll
    for (int k = 0; k < Width; k += Half) {
        load_pack<float, Half>(numbers, level + k);
#    pragma unroll
        for (int j = 0; j < Half; j++) sum[k + j] += numbers[j];
    }
}
template <int Width>
__device__ void store_level(float* level, const float* sum) {
    constexpr int Half = kWide<float>;
#    pragma unroll
    for (int k = 0; k < Width; k += Half) store_pack<float, Half>(level + k, sum + k);
}

// Eight numbers a thread, in 128-bit accesses: reads 4 N bytes and writes 2 N.
__global__ void narrow_numbers_kernel(bf16* out, const float* inp, size_t N) {
    constexpr int Width = kWide<float>;
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 2 * Width;
    if (i >= N) return;
    float values[2 * Width];
    load_pack<float, Width>(values, inp + i);
    load_pack<float, Width>(values + Width, inp + i + Width);
    store_pack<bf16, 2 * Width>(out + i, values);
}

// The same the other way. Reads 2 N bytes, or 4 N, and writes 4 N; with `add` it reads those too.
template <class Float>
__global__ void widen_numbers_kernel(float* out, const Float* inp, size_t N, bool add) {
    constexpr int Width = kWide<Float>;
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * Width;
    if (i >= N) return;
    float values[Width];
    load_pack<Float, Width>(values, inp + i);
    if (add) add_level<Width>(values, out + i);
    store_level<Width>(out + i, values);
}

// out = inp (N), a multiple of kRowAlignment, rounded to nearest
static void narrow_numbers(bf16* out, const float* inp, size_t N, cudaStream_t stream) {
    launch("narrow_numbers", narrow_numbers_kernel,
           pack_blocks<float, 2 * kWide<float>>(N, kPackThreads), kPackThreads, 0, stream, out, inp,
           N);
}

// out = inp or, with `add`, out += inp (N), a multiple of kRowAlignment
template <class Float>
void widen_numbers(float* out, const Float* inp, size_t N, bool add, cudaStream_t stream) {
    launch("widen_numbers", widen_numbers_kernel<Float>,
           pack_blocks<Float, kWide<Float>>(N, kPackThreads), kPackThreads, 0, stream, out, inp, N,
           add);
}

// A tree over leaves that come one after the other, as the digits of a binary number that counts
// them: level k of the tree (levels,N) is the sum of 2^k leaves while that digit of their number is
// 1. A leaf carries as far as an addition of 1 does, so that every sum is of neighbours, whichever
// rank made them and however many come at a time. Reads and writes, for each level that it passes
// and the one where it ends, 4 N bytes.
template <class Float>
__global__ void add_leaf_kernel(float* tree, const Float* leaf, unsigned number, size_t N) {
    constexpr int Width = kWide<Float>;
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * Width;
    if (i >= N) return;
    float sum[Width];
    load_pack<Float, Width>(sum, leaf + i);
    for (; number & 1; number /= 2, tree += N) add_level<Width>(sum, tree + i);
    store_level<Width>(tree + i, sum);
}

// The sum of the `leaves` that the tree holds, from its lowest level up. Reads 4 N bytes for each
// digit that is 1, and writes 4 N.
__global__ void add_tree_kernel(float* sums, const float* tree, unsigned leaves, size_t N) {
    constexpr int Width = kWide<float>;
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * Width;
    if (i >= N) return;
    float sum[Width] = {};
    for (; leaves > 0; leaves /= 2, tree += N)
        if (leaves & 1) add_level<Width>(sum, tree + i);
    store_level<Width>(sums + i, sum);
}

// The sums of the squares of rows of kRowAlignment gradients, a warp a row.
__global__ void row_squares_kernel(double* squares, const float* gradients, size_t rows) {
    constexpr int Width = int(kRowAlignment) / kWarp;
    size_t row = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
    if (row >= rows) return;
    float g[Width];
    load_pack<float, Width>(g, gradients + row * kRowAlignment + threadIdx.x % kWarp * Width);
    double sum = 0;
#    pragma unroll
    for (int k = 0; k < Width; k++) sum += double(g[k]) * double(g[k]);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) squares[row] = sum;
}

// tree (levels,N), of which there were `number` leaves before, gets one more (N).
template <class Float>
void add_leaf(float* tree, const Float* leaf, size_t number, size_t N, cudaStream_t stream) {
    launch("add_leaf", add_leaf_kernel<Float>, pack_blocks<Float, kWide<Float>>(N, kPackThreads),
           kPackThreads, 0, stream, tree, leaf, unsigned(number), N);
}

// sums (N) = all leaves of tree (levels,N)
static void add_tree(float* sums, const float* tree, size_t leaves, size_t N, cudaStream_t stream) {
    launch("add_tree", add_tree_kernel, pack_blocks<float, kWide<float>>(N, kPackThreads),
           kPackThreads, 0, stream, sums, tree, unsigned(leaves), N);
}

// squares (rows) of gradients (rows,kRowAlignment)
static void row_squares(double* squares, const float* gradients, size_t rows, cudaStream_t stream) {
    launch("row_squares", row_squares_kernel,
           pack_blocks<float, kRowAlignment / kWarp>(rows * kRowAlignment, kPackThreads),
           kPackThreads, 0, stream, squares, gradients, rows);
}

// The place of this pass's first rank among the leaves of the step.
static size_t first_leaf(const GPT2* model) {
    return size_t(model->pass.first_sequence) / size_t(model->shape.B) - size_t(model->rank);
}

// The next kernels wait until the updated parameters of a bucket have come from all ranks.
static void bucket_arrives(const GPT2* model, size_t bucket) {
    if (!model->peers.arrived.empty())
        check(cudaStreamWaitEvent(model->stream, model->peers.arrived[bucket], 0), "parameters");
}

static void parameters_arrive(const GPT2* model) {
    for (size_t b = 0; b < model->layout.buckets.size(); b++) bucket_arrives(model, b);
}

static void wait_for_device(const GPT2* model, const char* what) {
    parameters_arrive(model);
    check(cudaEventRecord(model->reached, model->stream), what);
    wait_for(model, model->reached, what);
}

#    ifdef GPT2_NCCL

static void check(ncclResult_t status, const char* what) {
    if (status != ncclSuccess)
        fail_machine("NCCL: %s: %s: %s", what, ncclGetErrorString(status),
                     ncclGetLastError(nullptr));
}

// Calls of NCCL that go together. Where one of them fails the group is closed as well: the
// communicator is aborted next, and inside of a group that would wait for its end.
class CallGroup {
  public:
    explicit CallGroup(const char* what) : what_(what) { check(ncclGroupStart(), what); }
    ~CallGroup() {
        if (open_) ncclGroupEnd();
    }
    CallGroup(const CallGroup&) = delete;
    CallGroup& operator=(const CallGroup&) = delete;

    void end() {
        open_ = false;
        check(ncclGroupEnd(), what_);
    }

  private:
    const char* what_;
    bool open_ = true;
};

std::string gpt2_alone() { return ""; }

std::string gpt2_job_id() {
    ncclUniqueId id;
    check(ncclGetUniqueId(&id), "ncclGetUniqueId");
    return std::string(id.internal, sizeof id.internal);
}

void Peers::abort() {
    if (comm != nullptr) ncclCommAbort(std::exchange(comm, nullptr));
}

void Peers::leave() {
    if (stream != nullptr) cudaStreamSynchronize(stream);
    if (comm != nullptr) ncclCommDestroy(comm);
    for (const std::vector<cudaEvent_t>& events : {sent, arrived})
        for (cudaEvent_t event : events) cudaEventDestroy(event);
    for (cudaEvent_t event : {ready, summed})
        if (event != nullptr) cudaEventDestroy(event);
    if (stream != nullptr) cudaStreamDestroy(stream);
}

// Waits for an event behind which there may be sums over ranks. The library notes what becomes of
// the others; a wait of the runtime's alone would not end where one of them is lost.
static void wait_for(const GPT2* model, cudaEvent_t event, const char* what) {
    if (model->peers.comm == nullptr) return check(cudaEventSynchronize(event), what);
    for (;;) {
        cudaError_t status = cudaEventQuery(event);
        if (status != cudaErrorNotReady) return check(status, what);
        ncclResult_t lost = ncclSuccess;
        check(ncclCommGetAsyncError(model->peers.comm, &lost), what);
        if (lost != ncclInProgress) check(lost, what);
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
}

void gpt2_join(GPT2* model, const std::string& bytes) {
    ncclUniqueId id;
    if (bytes.size() != sizeof id.internal) fail_machine("an id of %zu bytes", bytes.size());
    memcpy(id.internal, bytes.data(), bytes.size());
    Peers& peers = model->peers;
    // NCCL's few blocks go before those that grids of the backward pass have still to place.
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream");
    check(cudaStreamCreateWithPriority(&peers.stream, cudaStreamNonBlocking, greatest), "stream");
    auto create = [](cudaEvent_t* event) {
        check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "event");
    };
    for (cudaEvent_t* event : {&peers.ready, &peers.summed}) create(event);
    peers.sent.resize(model->layout.buckets.size());
    if (model->shards_states()) peers.arrived.resize(model->layout.buckets.size());
    for (std::vector<cudaEvent_t>* events : {&peers.sent, &peers.arrived})
        for (cudaEvent_t& event : *events) create(&event);
    check(ncclCommInitRank(&peers.comm, model->shape.world, id, model->rank), "ncclCommInitRank");
}

// What the peers' stream does next comes after what the model's stream was given so far.
static void peers_follow(GPT2* model, const char* what) {
    check(cudaEventRecord(model->peers.ready, model->stream), what);
    check(cudaStreamWaitEvent(model->peers.stream, model->peers.ready, 0), what);
}

// What the model's stream does next comes after the sums that were asked for so far.
static void model_follows(GPT2* model, const char* what) {
    check(cudaEventRecord(model->peers.summed, model->peers.stream), what);
    check(cudaStreamWaitEvent(model->stream, model->peers.summed, 0), what);
}

// One part of a bucket between rank 0, in whose snapshot it has its place, and the rank that holds
// it; other ranks have no part in it.
static void exchange_part(GPT2* model, Group group, size_t bucket, int holder, bool to_snapshot) {
    const char* what = "the parts of the optimizer";
    ncclComm_t comm = model->peers.comm;
    cudaStream_t stream = model->snapshot_stream;
    size_t N = model->part_size(bucket);
    float* held = model->updated(group, bucket);
    if (model->rank > 0) {
        if (holder != model->rank) return;
        if (to_snapshot) check(ncclSend(held, N, ncclFloat32, 0, comm, stream), what);
        else check(ncclRecv(held, N, ncclFloat32, 0, comm, stream), what);
        return;
    }
    if (holder > 0) held = model->staging;
    float* kept = model->snapshot + model->snapshot_places().place(group) +
                  model->layout.buckets[bucket].begin + size_t(holder) * N;
    if (to_snapshot) {
        if (holder > 0) check(ncclRecv(held, N, ncclFloat32, holder, comm, stream), what);
        check(cudaMemcpyAsync(kept, held, N * sizeof(float), cudaMemcpyDeviceToHost, stream), what);
    } else {
        check(cudaMemcpyAsync(held, kept, N * sizeof(float), cudaMemcpyHostToDevice, stream), what);
        if (holder > 0) check(ncclSend(held, N, ncclFloat32, holder, comm, stream), what);
    }
}

// The parts of all ranks to or from the snapshot of rank 0.
static void exchange_parts(GPT2* model, Group group, bool to_snapshot) {
    for (size_t bucket = 0; bucket < model->layout.buckets.size(); bucket++)
        for (int holder = 0; holder < model->shape.world; holder++)
            exchange_part(model, group, bucket, holder, to_snapshot);
}

static void gather_snapshot(GPT2* model, Group group) { exchange_parts(model, group, true); }

void gpt2_share(GPT2* model) {
    Peers& peers = model->peers;
    gpt2_snapshot_wait(model);
    parameters_arrive(model);
    peers_follow(model, "gpt2_share");
    check(cudaStreamWaitEvent(model->snapshot_stream, peers.ready, 0), "gpt2_share");
    auto share = [&](void* memory, size_t bytes) {
        if (memory == nullptr) return;
        check(ncclBroadcast(memory, memory, bytes, ncclUint8, 0, peers.comm, peers.stream),
              "gpt2_share");
    };
    for (Group group : kSnapshotGroups) {
        if (model->saves_part(group)) continue;
        if (shards(model->shape, group)) exchange_parts(model, group, false);
        else share(model->groups[size_t(group)], model->layout.numbers * sizeof(float));
    }
    share(model->narrow_parameters, model->layout.numbers * sizeof(bf16));
    check(cudaEventRecord(model->snapshot_copied, model->snapshot_stream), "gpt2_share");
    check(cudaStreamWaitEvent(peers.stream, model->snapshot_copied, 0), "gpt2_share");
    check(cudaEventRecord(peers.summed, peers.stream), "gpt2_share");
    check(cudaStreamWaitEvent(model->stream, peers.summed, 0), "gpt2_share");
    wait_for(model, peers.summed, "gpt2_share");
}

// Gradients of a bucket on their way: sums over ranks, in place, of this rank's part, or of all of
// it where every rank updates all of it.
static void reduce_bucket(GPT2* model, size_t bucket, ncclDataType_t type, void* numbers,
                          size_t width) {
    Peers& peers = model->peers;
    size_t size = model->layout.buckets[bucket].size, part = model->part_size(bucket);
    if (!model->shards_states())
        return check(ncclAllReduce(numbers, numbers, size, type, ncclSum, peers.comm, peers.stream),
                     "gradients");
    void* sums = static_cast<char*>(numbers) + model->part_begin(bucket) * width;
    check(ncclReduceScatter(numbers, sums, part, type, ncclSum, peers.comm, peers.stream),
          "gradients");
}

// Numbers in place, each the sum over ranks of that number.
static void sum_doubles_over_ranks(GPT2* model, double* numbers, size_t N, const char* what) {
    Peers& peers = model->peers;
    check(ncclAllReduce(numbers, numbers, N, ncclFloat64, ncclSum, peers.comm, peers.stream), what);
}

// Every rank's piece of this rank's part of a bucket, in the order of ranks: each sends and gets
// (world - 1) / world of the bucket's bytes.
static const void* exchange_pieces(GPT2* model, size_t bucket, const void* numbers) {
    Peers& peers = model->peers;
    bool narrow = model->narrow_gradients != nullptr;
    size_t N = model->part_size(bucket), bytes = N * (narrow ? sizeof(bf16) : sizeof(float));
    ncclDataType_t type = narrow ? ncclBfloat16 : ncclFloat32;
    CallGroup group("gradients");
    for (int r = 0; r < model->shape.world; r++) {
        const char* theirs = static_cast<const char*>(numbers) + size_t(r) * bytes;
        char* piece = static_cast<char*>(model->pieces) + size_t(r) * bytes;
        check(ncclSend(theirs, N, type, r, peers.comm, peers.stream), "gradients");
        check(ncclRecv(piece, N, type, r, peers.comm, peers.stream), "gradients");
    }
    group.end();
    return model->pieces;
}

// The sums of a bucket's parts to all ranks, where all of them update all of it.
static void gather_sums(GPT2* model, size_t bucket) {
    Peers& peers = model->peers;
    if (model->shards_states()) return;
    check(ncclAllGather(model->gradient_part(bucket), model->gradients_at(bucket),
                        model->part_size(bucket), ncclFloat32, peers.comm, peers.stream),
          "gradients");
}

// The same sums of gradients that travel in bf16, each rounded once: in float32, in the order of
// ranks. Where every rank updates all of them, they are sent on as they are.
static void sum_pieces(GPT2* model, size_t bucket, bool adds) {
    size_t N = model->part_size(bucket);
    const auto* pieces =
        static_cast<const bf16*>(exchange_pieces(model, bucket, model->narrow_gradients));
    for (size_t r = 0; r < size_t(model->shape.world); r++)
        widen_numbers(model->gradient_part(bucket), pieces + r * N, N, adds || r > 0,
                      model->peers.stream);
    gather_sums(model, bucket);
}

// dweight = sum over ranks of dweight, in place, of the tensors of a bucket, once the pass that
// completes a step has them; with the last bucket the loss too. They are finished on the model's
// stream, and nothing there writes to them again before the update, so that the sums overlap with
// the rest of the backward pass. Sharded gradients of a layer are summed in every pass, and added
// to this rank's part: their memory is needed again for the layer two before it. Each rank sends
// and gets 2 (world - 1) / world of their bytes, or half of that where it updates a part.
static void sum_over_ranks(GPT2* model, size_t bucket) {
    Peers& peers = model->peers;
    bool adds = model->sums_every_pass(bucket), layer = model->is_layer(bucket);
    if (peers.comm == nullptr || !(model->pass.completes || adds)) return;
    peers_follow(model, "gradients");
    float* gradients = model->gradients_at(bucket);
    bf16* narrow = model->narrow_gradients;
    size_t size = model->layout.buckets[bucket].size;
    if (narrow != nullptr) narrow_numbers(narrow, gradients, size, peers.stream);
    if (model->shape.sums_exactly) {
        sum_pieces(model, bucket, adds);
        if (!layer) sum_doubles_over_ranks(model, &model->gate->loss, 1, "loss");
    } else {
        CallGroup group("gradients");
        if (narrow != nullptr) reduce_bucket(model, bucket, ncclBfloat16, narrow, sizeof(bf16));
        else reduce_bucket(model, bucket, ncclFloat32, gradients, sizeof(float));
        if (!layer) sum_doubles_over_ranks(model, &model->gate->loss, 1, "loss");
        group.end();
        size_t first = model->updated_begin(bucket), N = model->updated_size(bucket);
        float* sums = model->updated(Group::gradients, bucket);
        if (narrow != nullptr) widen_numbers(sums, narrow + first, N, adds, peers.stream);
        else if (adds) widen_numbers(sums, gradients + first, N, true, peers.stream);
    }
    if (adds)
        check(cudaEventRecord(peers.sent[model->place_of(bucket)], peers.stream), "gradients");
    if (!layer) model_follows(model, "gradients");
}

// Where states are sharded, every rank's updated part of a bucket to all, while the model's stream
// goes on: what reads the bucket waits for it. Each rank sends and gets (world - 1) / world of it.
static void send_parameters(GPT2* model, size_t bucket) {
    Peers& peers = model->peers;
    if (peers.comm == nullptr || !model->shards_states()) return;
    peers_follow(model, "parameters");
    size_t begin = model->layout.buckets[bucket].begin, part = model->part_size(bucket);
    size_t mine = begin + model->part_begin(bucket);
    float* exact = model->groups[size_t(Group::parameters)];
    bf16* narrow = model->narrow_parameters;
    if (narrow != nullptr)
        check(ncclAllGather(narrow + mine, narrow + begin, part, ncclBfloat16, peers.comm,
                            peers.stream),
              "parameters");
    else
        check(
            ncclAllGather(exact + mine, exact + begin, part, ncclFloat32, peers.comm, peers.stream),
            "parameters");
    check(cudaEventRecord(peers.arrived[bucket], peers.stream), "parameters");
}

#    else

std::string gpt2_alone() { return "this program was built without NCCL, and trains on one GPU"; }
std::string gpt2_job_id() { fail_input("%s", gpt2_alone().c_str()); }
void Peers::leave() {}
void Peers::abort() {}
void gpt2_join(GPT2*, const std::string&) { fail_input("%s", gpt2_alone().c_str()); }
void gpt2_share(GPT2*) {}
static void gather_snapshot(GPT2*, Group) {}
static void peers_follow(GPT2*, const char*) {}
static void model_follows(GPT2*, const char*) {}
static void sum_over_ranks(GPT2*, size_t) {}
static void sum_doubles_over_ranks(GPT2*, double*, size_t, const char*) {}
static const void* exchange_pieces(GPT2*, size_t, const void* numbers) { return numbers; }
static void gather_sums(GPT2*, size_t) {}
static void send_parameters(GPT2*, size_t) {}
static void wait_for(const GPT2*, cudaEvent_t event, const char* what) {
    check(cudaEventSynchronize(event), what);
}

#    endif

// Adds the leaves of a pass to the tree. See add_leaf_kernel.
template <class Float>
static void add_leaves(GPT2* model, size_t bucket, const void* pieces, cudaStream_t stream) {
    size_t N = model->part_size(bucket), first = first_leaf(model);
    for (size_t r = 0; r < size_t(model->shape.world); r++)
        add_leaf(model->tree_of(bucket), static_cast<const Float*>(pieces) + r * N, first + r, N,
                 stream);
}

// The gradients of a bucket, summed in one tree over all passes of all ranks, in every pass; with
// the last bucket the losses too, of which each is on one rank and zero on the others. Costs, over
// sum_over_ranks, an exchange in every pass, and the memory of the tree.
static void sum_in_tree(GPT2* model, size_t bucket) {
    Peers& peers = model->peers;
    bool alone = model->shape.world == 1, layer = model->is_layer(bucket);
    if (!alone && peers.stream == nullptr) return;
    cudaStream_t stream = alone ? model->stream : peers.stream;
    if (!alone) peers_follow(model, "gradients");
    const void* pieces = model->gradients_at(bucket);
    bf16* narrow = model->narrow_gradients;
    if (narrow != nullptr) {
        narrow_numbers(narrow, model->gradients_at(bucket), model->layout.buckets[bucket].size,
                       stream);
        pieces = narrow;
    }
    if (!alone) pieces = exchange_pieces(model, bucket, pieces);
    if (narrow != nullptr) add_leaves<bf16>(model, bucket, pieces, stream);
    else add_leaves<float>(model, bucket, pieces, stream);
    if (model->pass.completes) {
        add_tree(model->gradient_part(bucket), model->tree_of(bucket), size_t(model->shape.leaves),
                 model->part_size(bucket), stream);
        if (!alone) gather_sums(model, bucket);
    }
    if (!alone) check(cudaEventRecord(peers.sent[model->place_of(bucket)], stream), "gradients");
    if (layer || !model->pass.completes) return;
    auto leaves = size_t(model->shape.leaves);
    if (!alone) sum_doubles_over_ranks(model, model->leaf_losses, leaves, "loss");
    global_norm(&model->gate->loss, model->leaf_losses, int(leaves), stream);
    if (!alone) model_follows(model, "gradients");
}

// Gradients that are summed over ranks in every pass begin each at zero, in memory from which an
// earlier pass, or an earlier layer of this one, must have been sent before.
static void begin_gradients(GPT2* model, size_t bucket) {
    if (!model->sums_every_pass(bucket)) return;
    if (!model->peers.sent.empty())
        check(cudaStreamWaitEvent(model->stream, model->peers.sent[model->place_of(bucket)], 0),
              "gradients");
    check(cudaMemsetAsync(model->gradients_at(bucket), 0,
                          model->layout.buckets[bucket].size * sizeof(float), model->stream),
          "gradients");
}

// The gradients of a bucket are there.
static void end_gradients(GPT2* model, size_t bucket) {
    if (model->pass.alone) return;
    if (model->shape.leaves > 0) sum_in_tree(model, bucket);
    else sum_over_ranks(model, bucket);
}

void gpt2_select_device(int local_rank, bool sees_all) {
    require_device();
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    if (count == 1 && !sees_all) return;  // where it is another rank's too, NCCL says so
    if (local_rank >= count)
        fail_machine("rank %d of this machine has no GPU: there are %d here", local_rank, count);
    check(cudaSetDevice(local_rank), "cudaSetDevice");
}

// ==== gpt2_forward ===============================================================================

// Brings a batch to the device on the copy stream, from pinned memory, and makes the next kernels
// wait for it. The host waits only if the pass before the last one still reads this slot.
static void stage_batch(GPT2* model, const int* inputs, const int* targets, int B, int T,
                        bool sort) {
    model->passes++;
    BatchSlot& slot = model->slot();
    check(cudaEventSynchronize(slot.read), "gpt2_forward");
    auto BT = size_t(B) * size_t(T);
    std::copy(inputs, inputs + BT, slot.host);
    if (targets != nullptr) std::copy(targets, targets + BT, slot.host + BT);
    size_t numbers = targets != nullptr ? 2 * BT : BT;
    if (sort) {
        int *tokens = slot.host + 2 * BT, *starts = tokens + BT, *places = starts + BT + 1;
        slot.different = sort_tokens(tokens, starts, places, model->counts.data(), inputs, int(BT),
                                     model->config.vocab_size);
        numbers = BatchSlot::numbers(BT);
    }
    check(cudaMemcpyAsync(slot.device, slot.host, numbers * sizeof(int), cudaMemcpyHostToDevice,
                          model->copy_stream),
          "gpt2_forward");
    check(cudaEventRecord(slot.copied, model->copy_stream), "gpt2_forward");
    check(cudaStreamWaitEvent(model->stream, slot.copied, 0), "gpt2_forward");
}

// The first half of a block: the branch attproj(attention(qkv(ln1))) and residual2 = inp + branch.
// ln1 (B,T,C) is there already.
template <class Float>
static void attention_half_forward(GPT2* model, const Float* inp, int l, int B, int T) {
    auto p = model->parameters_of<Float>(l);
    auto a = model->activations_of<Float>(l);
    int C = model->config.channels, NH = model->config.heads, BT = B * T;
    matmul_forward(a.qkv, a.ln1, p.qkvw, p.qkvb, BT, C, 3 * C, *model->products);
    attention_forward(a.atty, a.logsumexp, a.qkv, model->dropout(RandomUse::attention, l), B, T, C,
                      NH, model->stream);
    matmul_forward(a.branch, a.atty, p.attprojw, p.attprojb, BT, C, C, *model->products);
    residual_layernorm_forward(a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, inp, a.branch, p.ln2w,
                               p.ln2b, model->config.layer_norm_epsilon,
                               model->dropout(RandomUse::attention_projection, l), B, T, C,
                               model->stream);
}

// The second half: residual3 = residual2 + fcproj(gelu(fc(ln2))), and the layer norm that follows
// it, of the next block or of the classifier.
template <class Float>
static void mlp_half_forward(GPT2* model, int l, int B, int T) {
    const GPT2Config& config = model->config;
    auto p = model->parameters_of<Float>(l);
    auto a = model->activations_of<Float>(l);
    int C = config.channels, F = config.hidden_size(), BT = B * T;
    matmul_gelu_forward(a.fch_gelu, a.fch, a.ln2, p.fcw, p.fcb, BT, C, F, *model->products);
    matmul_forward(a.branch, a.fch_gelu, p.fcprojw, p.fcprojb, BT, F, C, *model->products);
    Dropout dropout = model->dropout(RandomUse::mlp_projection, l);
    if (l + 1 == config.layers)
        return residual_layernorm_forward(a.residual3, a.lnf, a.lnf_mean, a.lnf_rstd, a.residual2,
                                          a.branch, p.lnfw, p.lnfb, config.layer_norm_epsilon,
                                          dropout, B, T, C, model->stream);
    auto next_p = model->parameters_of<Float>(l + 1);
    auto next_a = model->activations_of<Float>(l + 1);
    residual_layernorm_forward(a.residual3, next_a.ln1, next_a.ln1_mean, next_a.ln1_rstd,
                               a.residual2, a.branch, next_p.ln1w, next_p.ln1b,
                               config.layer_norm_epsilon, dropout, B, T, C, model->stream);
}

// rows of logits (rows,Vp) to the host (rows,V), in float; waits for the device
template <class Float>
static void copy_logits(GPT2* model, real* host, const Float* logits, int rows) {
    auto V = size_t(model->config.vocab_size), Vp = size_t(model->config.padded_vocab());
    model->host_copy.resize(size_t(rows) * V * sizeof(Float));
    check(cudaStreamSynchronize(model->stream), "logits");
    check(cudaMemcpy2D(model->host_copy.data(), V * sizeof(Float), logits, Vp * sizeof(Float),
                       V * sizeof(Float), size_t(rows), cudaMemcpyDeviceToHost),
          "logits");
    const auto* values = reinterpret_cast<const Float*>(model->host_copy.data());
    for (size_t i = 0; i < size_t(rows) * V; i++) host[i] = float(values[i]);
}

// As many rows of logits in this type as there is memory for.
template <class Logit>
static int logits_held(const GPT2* model) {
    size_t bytes = model->activation_rows[a_logits].bytes(model->shape.dtype);
    return int(bytes / (sizeof(Logit) * size_t(model->config.padded_vocab())));
}

// The classifier over as many rows of logits at a time as there is memory for, so that (B,T,Vp) is
// never whole. Training also takes its gradient: dnorm, that of lnf, is written; that of the
// classifier's weight accumulates. Other passes are after losses and logits alone, and have them in
// float: those of a trained model may all lie near -100, where numbers in bf16 are 0.5 apart.
template <class Float, class Logit>
static void head_forward(GPT2* model, const int* targets) {
    const GPT2Config& config = model->config;
    const GPT2Pass& pass = model->pass;
    auto p = model->parameters_of<Float>(0);
    auto d = model->gradients_of(0);
    auto a = model->activations_of<Float>(0);
    int C = config.channels, V = config.vocab_size, Vp = config.padded_vocab();
    int BT = model->B * model->T;
    if (pass.training) begin_gradients(model, model->layout.buckets.size() - 1);
    const Float* weight = config.tied ? p.wte : p.headw;
    float* dweight = config.tied ? d.wte : d.headw;
    auto* logits = reinterpret_cast<Logit*>(a.logits);
    int held = logits_held<Logit>(model);
    for (int first = 0; first < BT; first += held) {
        int rows = std::min(held, BT - first);
        const Float* lnf = a.lnf + size_t(first) * C;
        matmul_forward<Float, Logit>(logits, lnf, weight, nullptr, rows, C, Vp, *model->products);
        if (pass.logits != nullptr)
            copy_logits(model, pass.logits + size_t(first) * V, logits, rows);
        if (targets == nullptr) continue;
        classifier_forward(a.losses + first, logits, targets + first, pass.loss_scale,
                           pass.training, rows, V, Vp, model->stream);
        if (pass.training)
            matmul_backward(a.dnorm + size_t(first) * C, dweight, nullptr, a.logits, lnf, weight,
                            a.reduce_scratch, rows, C, Vp, *model->products);
    }
    double* loss = &model->gate->loss;
    if (pass.training && model->shape.leaves > 0)
        loss = model->leaf_losses + first_leaf(model) + model->rank;
    if (targets != nullptr) add_losses(loss, a.losses, pass.loss_scale, BT, model->stream);
}

template <class Float>
static void model_forward(GPT2* model, const int* inputs, const int* targets) {
    const GPT2Config& config = model->config;
    auto p = model->parameters_of<Float>(0);
    auto a = model->activations_of<Float>(0);
    int B = model->B, T = model->T, C = config.channels;
    bucket_arrives(model, model->layout.buckets.size() - 1);
    encoder_forward(a.encoded, inputs, p.wte, p.wpe, B, T, C, model->stream);
    bucket_arrives(model, 0);
    Dropout dropout = model->dropout(RandomUse::encoder, 0);
    if (dropout.probability > 0)
        dropout_forward(a.encoded, a.encoded, dropout, B, T, C, model->stream);
    layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.encoded, p.ln1w, p.ln1b,
                      config.layer_norm_epsilon, B, T, C, model->stream);
    const Float* residual = a.encoded;
    for (int l = 0; l < config.layers; l++) {
        attention_half_forward(model, residual, l, B, T);
        if (l + 1 < config.layers) bucket_arrives(model, size_t(l) + 1);
        mlp_half_forward<Float>(model, l, B, T);
        residual = model->activations_of<Float>(l).residual3;
    }
    if (model->pass.training) head_forward<Float, Float>(model, targets);
    else head_forward<Float, float>(model, targets);
}

void gpt2_forward(GPT2* model, const int* inputs, const int* targets, int B, int T,
                  const GPT2Pass& pass) {
    assert(B >= 1 && B <= model->shape.B && T >= 1 && T <= model->shape.T);
    assert(!pass.training || (model->shape.training && targets != nullptr));
    model->B = B, model->T = T, model->pass = pass;
    stage_batch(model, inputs, targets, B, T, pass.training);
    const int* device = model->slot().device;
    const int* device_targets = targets != nullptr ? device + size_t(B) * T : nullptr;
    with_type(model->shape.dtype,
              [&]<class Float>() { model_forward<Float>(model, device, device_targets); });
    check(cudaEventRecord(model->slot().read, model->stream), "gpt2_forward");
}

// One block over the new tokens alone, with keys and values of the earlier ones from the cache.
template <class Float>
static void block_generate(GPT2* model, const Float* inp, int l, int B, int n, int position) {
    const GPT2Config& config = model->config;
    auto p = model->parameters_of<Float>(l);
    auto a = model->activations_of<Float>(l);
    int C = config.channels;
    matmul_forward(a.qkv, a.ln1, p.qkvw, p.qkvb, B * n, C, 3 * C, *model->products);
    attention_cached_forward(a.atty, a.key_cache, a.value_cache, a.qkv, B, n, position,
                             config.context, C, config.heads, model->stream);
    matmul_forward(a.branch, a.atty, p.attprojw, p.attprojb, B * n, C, C, *model->products);
    residual_layernorm_forward(a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, inp, a.branch, p.ln2w,
                               p.ln2b, config.layer_norm_epsilon, Dropout{}, B, n, C,
                               model->stream);
    mlp_half_forward<Float>(model, l, B, n);
}

template <class Float>
static void model_generate(GPT2* model, const int* tokens, int B, int n, int position,
                           real* logits) {
    const GPT2Config& config = model->config;
    auto p = model->parameters_of<Float>(0);
    auto a = model->activations_of<Float>(0);
    auto C = size_t(config.channels);
    int Vp = config.padded_vocab();
    int most = std::min(n, model->shape.B * model->shape.T / B);  // new tokens that fit at a time
    std::vector<int> inputs;
    for (int done = 0, now = 0; done < n; done += now) {
        now = std::min(most, n - done);
        inputs.clear();
        for (int b = 0; b < B; b++)
            inputs.insert(inputs.end(), tokens + size_t(b) * size_t(n) + done,
                          tokens + size_t(b) * size_t(n) + done + now);
        stage_batch(model, inputs.data(), nullptr, B, now, false);
        encoder_forward(a.encoded, model->slot().device, p.wte, p.wpe + size_t(position + done) * C,
                        B, now, int(C), model->stream);
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.encoded, p.ln1w, p.ln1b,
                          config.layer_norm_epsilon, B, now, int(C), model->stream);
        const Float* residual = a.encoded;
        for (int l = 0; l < config.layers; l++) {
            block_generate(model, residual, l, B, now, position + done);
            residual = model->activations_of<Float>(l).residual3;
        }
        check(cudaEventRecord(model->slot().read, model->stream), "gpt2_generate");
        if (done + now < n) continue;
        // The last block has taken the classifier's layer norm of every new token: of each sequence
        // the last one counts.
        check(cudaMemcpy2DAsync(a.branch, C * sizeof(Float), a.lnf + size_t(now - 1) * C,
                                size_t(now) * C * sizeof(Float), C * sizeof(Float), size_t(B),
                                cudaMemcpyDeviceToDevice, model->stream),
              "gpt2_generate");
    }
    auto* exact = reinterpret_cast<float*>(a.logits);
    int held = logits_held<float>(model);
    for (int first = 0; first < B; first += held) {
        int rows = std::min(held, B - first);
        matmul_forward<Float, float>(exact, a.branch + size_t(first) * C,
                                     config.tied ? p.wte : p.headw, nullptr, rows, int(C), Vp,
                                     *model->products);
        copy_logits(model, logits + size_t(first) * size_t(config.vocab_size), exact, rows);
    }
}

void gpt2_generate(GPT2* model, const int* tokens, int B, int n, int position, real* logits) {
    assert(B >= 1 && B <= model->shape.generate && B <= model->shape.B * model->shape.T);
    assert(n >= 1 && position >= 0 && position + n <= model->config.context);
    model->pass = GPT2Pass{};
    parameters_arrive(model);
    with_type(model->shape.dtype,
              [&]<class Float>() { model_generate<Float>(model, tokens, B, n, position, logits); });
}

void gpt2_copy_cache(GPT2* model, int from, int to, int n) {
    int most = model->shape.generate;
    assert(from >= 0 && from < most && to >= 0 && to < most && from != to);
    assert(n >= 0 && n <= model->config.context);
    size_t C = size_t(model->config.channels), sequence = size_t(model->config.context) * C;
    with_type(model->shape.dtype, [&]<class Float>() {
        for (int l = 0; l < model->config.layers; l++) {
            auto a = model->activations_of<Float>(l);
            auto copy = [&](Float* cache) {
                check(cudaMemcpyAsync(
                          cache + size_t(to) * sequence, cache + size_t(from) * sequence,
                          size_t(n) * C * sizeof(Float), cudaMemcpyDeviceToDevice, model->stream),
                      "gpt2_copy_cache");
            };
            copy(a.key_cache);
            copy(a.value_cache);
        }
    });
}

// ==== gpt2_backward ==============================================================================

// The gradient that enters a branch behind its dropout: dresidual itself where nothing is dropped.
template <class Float>
static const Float* branch_gradient(const GPT2* model, RandomUse use, int l) {
    auto a = model->activations_of<Float>(l);
    Dropout dropout = model->dropout(use, l);
    if (dropout.probability == 0) return a.dresidual;
    dropout_forward(a.dbranch, a.dresidual, dropout, model->B, model->T, model->config.channels,
                    model->stream);
    return a.dbranch;
}

// What forward did not keep of block l, again from what it did; inp is the block's input.
template <class Float>
static void block_recompute(GPT2* model, const Float* inp, int l) {
    auto p = model->parameters_of<Float>(l);
    auto a = model->activations_of<Float>(l);
    const GPT2Config& config = model->config;
    int B = model->B, T = model->T, BT = B * T, C = config.channels, F = config.hidden_size();
    int level = model->shape.recompute;
    if (level >= 2)
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, inp, p.ln1w, p.ln1b,
                          config.layer_norm_epsilon, B, T, C, model->stream);
    if (level >= 3) {
        attention_half_forward(model, inp, l, B, T);
        return matmul_gelu_forward(a.fch_gelu, a.fch, a.ln2, p.fcw, p.fcb, BT, C, F,
                                   *model->products);
    }
    if (level >= 2)
        layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, p.ln2w, p.ln2b,
                          config.layer_norm_epsilon, B, T, C, model->stream);
    if (level >= 1) gelu_forward(a.fch_gelu, a.fch, size_t(BT) * size_t(F), model->stream);
}

// forward: inp -> residual2 = inp + attproj(...) -> residual3 = residual2 + fcproj(...)
// a.dresidual is the gradient of residual3 on entry and of inp on exit.
template <class Float>
static void block_backward(GPT2* model, const Float* inp, int l) {
    auto p = model->parameters_of<Float>(l);
    auto d = model->gradients_of(l);
    auto a = model->activations_of<Float>(l);
    int B = model->B, T = model->T, BT = B * T;
    int C = model->config.channels, F = model->config.hidden_size(), NH = model->config.heads;
    Products& products = *model->products;
    cudaStream_t stream = model->stream;
    begin_gradients(model, size_t(l));
    block_recompute(model, inp, l);

    const Float* dbranch = branch_gradient<Float>(model, RandomUse::mlp_projection, l);
    gelu_matmul_backward(a.dfch, d.fcprojw, d.fcprojb, dbranch, a.fch_gelu, a.fch, p.fcprojw,
                         a.reduce_scratch, BT, F, C, products);
    matmul_backward(a.dnorm, d.fcw, d.fcb, a.dfch, a.ln2, p.fcw, a.reduce_scratch, BT, C, F,
                    products);
    layernorm_backward(a.dresidual, d.ln2w, d.ln2b, a.dnorm, a.residual2, p.ln2w, a.ln2_mean,
                       a.ln2_rstd, a.reduce_scratch, B, T, C, stream);

    dbranch = branch_gradient<Float>(model, RandomUse::attention_projection, l);
    matmul_backward(a.datty, d.attprojw, d.attprojb, dbranch, a.atty, p.attprojw, a.reduce_scratch,
                    BT, C, C, products);
    attention_backward(a.dqkv, a.datty, a.qkv, a.atty, a.logsumexp, a.att_scratch,
                       model->dropout(RandomUse::attention, l), B, T, C, NH, stream);
    matmul_backward(a.dnorm, d.qkvw, d.qkvb, a.dqkv, a.ln1, p.qkvw, a.reduce_scratch, BT, C, 3 * C,
                    products);
    layernorm_backward(a.dresidual, d.ln1w, d.ln1b, a.dnorm, inp, p.ln1w, a.ln1_mean, a.ln1_rstd,
                       a.reduce_scratch, B, T, C, stream);
}

template <class Float>
static void model_backward(GPT2* model) {
    const GPT2Config& config = model->config;
    auto p = model->parameters_of<Float>(0);
    auto d = model->gradients_of(0);
    auto a = model->activations_of<Float>(0);
    int B = model->B, T = model->T, C = config.channels, L = config.layers;
    auto BT = size_t(B) * size_t(T);
    check(cudaMemsetAsync(a.dresidual, 0, BT * size_t(C) * sizeof(Float), model->stream),
          "gpt2_backward");
    layernorm_backward(a.dresidual, d.lnfw, d.lnfb, a.dnorm,
                       model->activations_of<Float>(L - 1).residual3, p.lnfw, a.lnf_mean,
                       a.lnf_rstd, a.reduce_scratch, B, T, C, model->stream);
    for (int l = L - 1; l >= 0; l--) {
        const Float* inp = l == 0 ? a.encoded : model->activations_of<Float>(l - 1).residual3;
        block_backward(model, inp, l);
        end_gradients(model, size_t(l));
    }
    const BatchSlot& slot = model->slot();
    const int *tokens = slot.device + 2 * BT, *starts = tokens + BT, *places = starts + BT + 1;
    encoder_backward(d.wte, d.wpe, branch_gradient<Float>(model, RandomUse::encoder, 0),
                     TokenBuckets{tokens, starts, places, slot.different}, B, T, C, model->stream);
    if (model->pass.completes)
        check(cudaEventRecord(model->computed[model->updates % 2], model->stream), "gpt2_backward");
    end_gradients(model, model->layout.buckets.size() - 1);
}

void gpt2_backward(GPT2* model) {
    assert(model->pass.training);
    with_type(model->shape.dtype, [&]<class Float>() { model_backward<Float>(model); });
    check(cudaEventRecord(model->slot().read, model->stream), "gpt2_backward");
}

// ==== gpt2_update ================================================================================

void gpt2_zero_gradients(GPT2* model) {
    check(cudaEventRecord(model->begun[model->updates % 2], model->stream), "gpt2_zero_gradients");
    check(cudaMemsetAsync(&model->gate->loss, 0, sizeof(double), model->stream),
          "gpt2_zero_gradients");
    if (!model->shape.training) return;
    if (model->leaf_losses != nullptr)
        check(cudaMemsetAsync(model->leaf_losses, 0, size_t(model->shape.leaves) * sizeof(double),
                              model->stream),
              "gpt2_zero_gradients");
    if (model->shape.leaves > 0) return;  // every pass begins at zero
    check(cudaMemsetAsync(model->groups[size_t(Group::gradients)], 0,
                          gradient_numbers(model->layout, model->shape) * sizeof(float),
                          model->stream),
          "gpt2_zero_gradients");
}

// gate->squares = the sum of squares of all gradients, from those of this rank's parts
static void sum_squares(GPT2* model) {
    double* squares = &model->gate->squares;
    int blocks = 0;
    for (size_t b = 0; b < model->layout.buckets.size(); b++)
        blocks += global_norm_part(model->norm_scratch + blocks, model->gradient_part(b),
                                   model->part_size(b), model->stream);
    global_norm(squares, model->norm_scratch, blocks, model->stream);
    if (model->peers.stream == nullptr) return;
    peers_follow(model, "the norm");
    sum_doubles_over_ranks(model, squares, 1, "the norm");
    model_follows(model, "the norm");
}

// The same in an order that does not depend on the ranks: rows of kRowAlignment gradients, of which
// each is on one rank and zero on the others, then the rows of a bucket, then the buckets.
static void sum_row_squares(GPT2* model) {
    const Layout& layout = model->layout;
    cudaStream_t stream = model->stream;
    auto row_of = [](size_t number) { return number / kRowAlignment; };
    check(cudaMemsetAsync(model->row_squares, 0, row_of(layout.numbers) * sizeof(double), stream),
          "the norm");
    for (size_t b = 0; b < layout.buckets.size(); b++)
        row_squares(model->row_squares + row_of(layout.buckets[b].begin + model->part_begin(b)),
                    model->gradient_part(b), row_of(model->part_size(b)), stream);
    if (model->peers.stream != nullptr) {
        peers_follow(model, "the norm");
        sum_doubles_over_ranks(model, model->row_squares, row_of(layout.numbers), "the norm");
        model_follows(model, "the norm");
    }
    for (size_t b = 0; b < layout.buckets.size(); b++)
        global_norm(model->norm_scratch + b, model->row_squares + row_of(layout.buckets[b].begin),
                    int(row_of(layout.buckets[b].used)), stream);
    global_norm(&model->gate->squares, model->norm_scratch, int(layout.buckets.size()), stream);
}

// AdamW over what this rank updates of a bucket: the tensors that decay, then the others.
template <class Float>
static void update_bucket(GPT2* model, size_t b, const AdamW& adamw) {
    const Layout::Bucket& bucket = model->layout.buckets[b];
    size_t first = model->updated_begin(b), end = first + model->updated_size(b);
    for (bool decays : {true, false}) {
        size_t from = std::max(first, decays ? 0 : bucket.decayed);
        size_t to = std::min(end, decays ? bucket.decayed : bucket.size);
        if (from >= to) continue;
        auto in = [&](Group group) { return model->updated(group, b) + (from - first); };
        Float* narrow = nullptr;
        if constexpr (sizeof(Float) == 2) narrow = model->narrow_parameters + bucket.begin + from;
        adamw_update(in(Group::parameters), narrow, in(Group::first_moments),
                     in(Group::second_moments), in(Group::gradients), to - from, adamw,
                     decays ? adamw.weight_decay : 0, model->gate, model->stream);
    }
}

// Norm, gate and AdamW follow each other on the device, and the stats of the step on their way to
// the host: nothing here waits. Forward needs the tensors that exist once first, then the layers
// from the first on: so are they updated, and sent.
void gpt2_update(GPT2* model, const AdamW& adamw) {
    cudaStream_t stream = model->stream;
    if (model->shape.leaves > 0) sum_row_squares(model);
    else sum_squares(model);
    launch("update_gate", update_gate_kernel, 1u, 1u, 0, stream, model->gate, adamw.grad_clip);
    if (model->snapshot_begun)  // what it copies is about to change
        check(cudaStreamWaitEvent(stream, model->snapshot_copied, 0), "gpt2_update");
    size_t buckets = model->layout.buckets.size();
    for (size_t i = 0; i < buckets; i++) {
        size_t bucket = (i + buckets - 1) % buckets;
        with_type(model->shape.dtype,
                  [&]<class Float>() { update_bucket<Float>(model, bucket, adamw); });
        send_parameters(model, bucket);
    }
    size_t turn = model->updates++ % 2;
    check(cudaMemcpyAsync(&model->host_gates[turn], model->gate, sizeof(UpdateGate),
                          cudaMemcpyDeviceToHost, stream),
          "gpt2_update");
    check(cudaEventRecord(model->gate_copied[turn], stream), "gpt2_update");
}

// The stats of an update that is done, one of the last two.
static GPT2Stats stats_of(const GPT2* model, const UpdateGate& gate, size_t turn) {
    float ms = 0;
    bool timed =
        cudaEventElapsedTime(&ms, model->begun[turn], model->computed[turn]) == cudaSuccess;
    if (!timed) cudaGetLastError();  // a pass of another kind came between
    return {gate.loss, gate.norm, 0, timed ? double(ms) / 1000 : 0};
}

GPT2Stats gpt2_stats(GPT2* model) {
    UpdateGate* now = &model->host_gates[2];
    check(cudaMemcpyAsync(now, model->gate, sizeof(UpdateGate), cudaMemcpyDeviceToHost,
                          model->stream),
          "gpt2_stats");
    check(cudaEventRecord(model->reached, model->stream), "gpt2_stats");
    wait_for(model, model->reached, "gpt2_stats");
    return stats_of(model, *now, (model->updates + 1) % 2);
}

GPT2Stats gpt2_previous_stats(GPT2* model) {
    if (model->updates < 2) return {};
    size_t turn = model->updates % 2;
    wait_for(model, model->gate_copied[turn], "gpt2_previous_stats");
    return stats_of(model, model->host_gates[turn], turn);
}

// ==== device =====================================================================================

static cudaDeviceProp card_properties() {
    int device = 0;
    cudaDeviceProp card;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaGetDeviceProperties(&card, device), "cudaGetDeviceProperties");
    return card;
}

// Refuses a machine that cannot run the kernels, in one line that says what it lacks.
static void require_device() {
    constexpr const char* kCpu = "the CPU program takes the same words: train_gpt2";
    int driver = 0, runtime = 0, count = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cudaError_t status = cudaGetDeviceCount(&count);
    if (driver == 0) fail_machine("no NVIDIA driver here; %s", kCpu);
    if (status == cudaErrorInsufficientDriver)
        fail_machine(
            "the driver supports CUDA %d.%d, and this program needs %d.%d: install a newer "
            "driver",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0))
        fail_machine("no GPU here; %s", kCpu);
    check(status, "cudaGetDeviceCount");
    cudaDeviceProp card = card_properties();
    if (card.major < 8)
        fail_machine("%s has compute capability %d.%d; this program needs 8.0 (Ampere) or newer",
                     card.name, card.major, card.minor);
}

const char* gpt2_program() { return "train_gpt2cu"; }

std::string gpt2_device() {
    require_device();
    cudaDeviceProp card = card_properties();
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    return format("%s, %d multiprocessors, %.1f GiB, CUDA %d.%d, cuBLASLt %zu", card.name,
                  card.multiProcessorCount, double(card.totalGlobalMem) / 1073741824, driver / 1000,
                  driver % 1000 / 10, cublasLtGetVersion());
}

// bf16 has the range of float32, so that nothing needs scaling, and half its bytes.
Dtype gpt2_dtype(const std::string& option) { return option == "fp32" ? Dtype::fp32 : Dtype::bf16; }

// What a multiprocessor does in a cycle: bf16 operations by tensor cores (0: it differs between the
// cards of this capability), and float32 ones by its other units.
struct MultiprocessorRate {
    int major, minor;
    double bf16, fp32;
};
constexpr MultiprocessorRate kMultiprocessors[] = {
    {8, 0, 2048, 128}, {8, 6, 0, 256},     {8, 9, 0, 256},
    {9, 0, 4096, 256}, {10, 0, 8192, 256}, {12, 0, 0, 256},
};

PeakRate gpt2_peak(const GPT2Shape& shape) {
    require_device();
    cudaDeviceProp card = card_properties();
    int device = 0, clock_khz = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, device), "clock rate");
    double cycles = 1e3 * clock_khz * card.multiProcessorCount;  // of all, in a second
    double from_clock = 0, cores = 0;
    for (const MultiprocessorRate& row : kMultiprocessors) {
        if (row.major != card.major || row.minor != card.minor) continue;
        from_clock = row.bf16 * cycles;
        cores = row.fp32 * cycles;
    }
    if (shape.dtype == Dtype::fp32 && !shape.tf32) return {cores, "by its clock"};
    double share = shape.dtype == Dtype::fp32 ? 0.5 : 1;  // TF32 runs at half the rate of bf16
    if (const Card* known = find_card(card.name))
        return {share * known->tflops * 1e12, "published for this card"};
    return {share * from_clock, "by its clock"};
}

// ==== main =======================================================================================

// Weak: the tests and benchmarks, which are linked with this file or include it, have a main of
// their own.
__attribute__((weak)) int main(int argc, char** argv) { return run(argc, argv); }

#endif  // GPT2_LAYERS_ONLY
