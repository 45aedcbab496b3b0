// The emulator's own tests: its primitives against the PTX ISA's definitions, the CUDA runtime and
// cuBLASLt against their documentation, and the seeded bugs of bugs.cu, each of which must be
// caught. Built like every other variant of the tests, and run under the sanitizers too.
//
// ./build/.../test_emu [--gtest_filter=Suite.Test] ends with `N passed, N failed, N skipped`.

#include <cublasLt.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <numeric>
#include <random>

#include "bugs.cu"
#include "emu.h"

#ifdef __has_feature
#    define EMU_FEATURE(x) __has_feature(x)
#else
#    define EMU_FEATURE(x) 0
#endif
#if defined(__SANITIZE_THREAD__) || EMU_FEATURE(thread_sanitizer)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__) || EMU_FEATURE(address_sanitizer)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

namespace bugs {
void PrintTo(const Bug& bug, std::ostream* out) { *out << bug.name; }  // found by GoogleTest
}  // namespace bugs

namespace {

using bf16 = __nv_bfloat16;

// ==== tools ======================================================================================

// A variable of the environment for as long as this lives.
class Environment {
  public:
    Environment(const char* name, const std::string& value) : name_(name) {
        if (const char* old = getenv(name)) old_ = old, had_ = true;
        setenv(name, value.c_str(), 1);
    }
    ~Environment() { had_ ? setenv(name_, old_.c_str(), 1) : unsetenv(name_); }
    Environment(const Environment&) = delete;
    Environment& operator=(const Environment&) = delete;

  private:
    const char* name_;
    std::string old_;
    bool had_ = false;
};

// Device memory that holds a host vector.
template <class T>
class Device {
  public:
    explicit Device(size_t count) : count_(count) {
        EXPECT_EQ(cudaMalloc(&data_, count * sizeof(T)), cudaSuccess);
    }
    explicit Device(const std::vector<T>& values) : Device(values.size()) {
        cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice);
    }
    ~Device() { EXPECT_EQ(cudaFree(data_), cudaSuccess); }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    operator T*() const { return data_; }
    T* get() const { return data_; }
    std::vector<T> host() const {
        std::vector<T> values(count_);
        cudaError_t status =
            cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost);
        EXPECT_EQ(status, cudaSuccess);
        return values;
    }

  private:
    T* data_ = nullptr;
    size_t count_;
};

template <class... P, class... A>
void go(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) {
    emu::launch("kernel", kernel, grid, block, shared, nullptr, arguments...);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

std::vector<float> normal(size_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> draw;
    std::vector<float> values(count);
    for (float& value : values) value = draw(generator);
    return values;
}

std::vector<bf16> rounded(const std::vector<float>& values) {
    std::vector<bf16> result;
    for (float value : values) result.push_back(__float2bfloat16(value));
    return result;
}

// Every test here runs in the three thread orders.
class Orders : public testing::TestWithParam<int> {
  protected:
    Environment order_{"EMU_ORDER", std::to_string(GetParam())};
};
INSTANTIATE_TEST_SUITE_P(Thread, Orders, testing::Values(0, 1, 2));

// ==== threads and blocks =========================================================================

__global__ void places_kernel(int* out) {
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    atomicAdd(&out[block * threads + thread], 1);
}

TEST_P(Orders, EveryThreadOfEveryBlockRunsOnce) {
    Device<int> out(std::vector<int>(3 * 2 * 5 * 4 * 3 * 7, 0));
    go(places_kernel, dim3(3, 2, 5), dim3(4, 3, 7), 0, out.get());
    for (int times : out.host()) EXPECT_EQ(times, 1);
}

// A tree over the block, then over everything through atomics.
__global__ void sum_kernel(float* total, unsigned* count, const float* in, int n) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, int(blockDim.x));
    int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    s[threadIdx.x] = i < n ? in[i] : 0;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) s[threadIdx.x] += s[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        atomicAdd(total, float(s[0]));
        atomicAdd(count, 1u);
    }
}

TEST_P(Orders, BlocksReduceAndAtomicsAdd) {
    for (unsigned threads : {1u, 32u, 256u, 1024u}) {
        constexpr int kCount = 3000;
        std::vector<float> values(kCount);
        std::iota(values.begin(), values.end(), 1.0f);
        Device<float> in(values), total(std::vector<float>{0});
        Device<unsigned> count(std::vector<unsigned>{0});
        unsigned blocks = (kCount + threads - 1) / threads;
        go(sum_kernel, blocks, threads, threads * sizeof(float), total.get(), count.get(),
           static_cast<const float*>(in.get()), kCount);
        EXPECT_EQ(total.host()[0], kCount * (kCount + 1) / 2.0f);
        EXPECT_EQ(count.host()[0], blocks);
    }
}

// The last block to finish adds up what the others left: fences on both sides of the counter.
__global__ void last_block_kernel(float* total, float* parts, unsigned* done) {
    size_t offset = 0;
    Shared<int> last = shared_array<int>(offset, 1);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = float(blockIdx.x + 1);
        __threadfence();
        last[0] = atomicAdd(done, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (last[0] == 0 || threadIdx.x != 0) return;
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += parts[i];
    *total = sum;
}

TEST_P(Orders, TheLastBlockSeesWhatTheOthersWrote) {
    Device<float> total(1), parts(9);
    Device<unsigned> done(std::vector<unsigned>{0});
    go(last_block_kernel, 9, 64, sizeof(int), total.get(), parts.get(), done.get());
    EXPECT_EQ(total.host()[0], 45);
}

// ==== warp collectives ===========================================================================

struct ShuffleCase {
    int kind, argument, width;
};

template <class T>
__global__ void shuffle_kernel(T* out, ShuffleCase c) {
    T x = T(threadIdx.x + 100), y = 0;
    if (c.kind == 0) y = __shfl_sync(~0u, x, c.argument, c.width);
    if (c.kind == 1) y = __shfl_up_sync(~0u, x, unsigned(c.argument), c.width);
    if (c.kind == 2) y = __shfl_down_sync(~0u, x, unsigned(c.argument), c.width);
    if (c.kind == 3) y = __shfl_xor_sync(~0u, x, c.argument, c.width);
    out[threadIdx.x] = y;
}

// The PTX ISA's definition of shfl.sync, with b, c, segment mask and clamp as the CUDA headers pass
// them: which lane `lane` reads.
int shuffle_source(const ShuffleCase& c, int lane) {
    int b = c.argument & 31, clamp = c.kind == 1 ? 0 : 31, segment = 32 - c.width;
    int most = (lane & segment) | (clamp & ~segment), least = lane & segment, j = 0;
    bool reads = false;
    if (c.kind == 0) j = least | (b & ~segment), reads = j <= most;
    if (c.kind == 1) j = lane - b, reads = j >= most;
    if (c.kind == 2) j = lane + b, reads = j <= most;
    if (c.kind == 3) j = lane ^ b, reads = j <= most;
    return reads ? j : lane;
}

template <class T>
void expect_shuffles() {
    Device<T> out(32);
    for (int kind = 0; kind < 4; kind++) {
        for (int width : {1, 2, 4, 8, 16, 32}) {
            for (int argument : {0, 1, 2, 5, 8, 15, 16, 31, 32, 33, -1}) {
                ShuffleCase c = {kind, argument, width};
                go(shuffle_kernel<T>, 1, 32, 0, out.get(), c);
                std::vector<T> got = out.host();
                for (int lane = 0; lane < 32; lane++)
                    ASSERT_EQ(got[size_t(lane)], T(shuffle_source(c, lane) + 100))
                        << "kind " << kind << " width " << width << " argument " << argument;
            }
        }
    }
}

TEST_P(Orders, ShufflesReadTheLaneThatPtxNames) {
    expect_shuffles<float>();
    expect_shuffles<int64_t>();
}

__global__ void votes_kernel(unsigned* out) {
    unsigned lane = threadIdx.x % 32;
    unsigned* mine = out + threadIdx.x * 8;
    mine[0] = __ballot_sync(~0u, lane % 3 == 0);
    mine[1] = unsigned(__any_sync(~0u, lane == 31));
    mine[2] = unsigned(__all_sync(~0u, lane < 32));
    mine[3] = unsigned(__all_sync(~0u, lane < 31));
    mine[4] = __reduce_add_sync(~0u, lane + 1);
    mine[5] = __reduce_max_sync(~0u, lane ^ 5u);
    mine[6] = unsigned(__reduce_max_sync(~0u, -1 - int(lane)));
    mine[7] = unsigned(__reduce_add_sync(~0u, -int(lane)));
}

TEST_P(Orders, VotesAndReductions) {
    Device<unsigned> out(2 * 32 * 8);
    go(votes_kernel, 1, 64, 0, out.get());
    std::vector<unsigned> got = out.host();
    unsigned thirds = 0;
    for (unsigned lane = 0; lane < 32; lane += 3) thirds |= 1u << lane;
    const unsigned expected[] = {thirds, 1, 1, 0, 528, 31, unsigned(-1), unsigned(-496)};
    for (size_t i = 0; i < got.size(); i++) EXPECT_EQ(got[i], expected[i % 8]) << i;
}

// Each half of a warp may go its own way, as long as its mask says so.
__global__ void halves_kernel(int* out) {
    int lane = int(threadIdx.x), x = lane;
    if (lane < 16) {
        for (int d = 8; d > 0; d /= 2) x += __shfl_xor_sync(0x0000ffffu, x, d);
    } else {
        x = __reduce_max_sync(0xffff0000u, x);
        __syncwarp(0xffff0000u);
    }
    __syncwarp();
    out[lane] = x + __shfl_sync(~0u, x, 31);
}

TEST_P(Orders, HalvesOfAWarpGoTheirOwnWay) {
    Device<int> out(32);
    go(halves_kernel, 1, 32, 0, out.get());
    std::vector<int> got = out.host();
    for (size_t lane = 0; lane < 32; lane++) EXPECT_EQ(got[lane], (lane < 16 ? 120 : 31) + 31);
}

// A patch of shared memory that only one warp uses needs no more than __syncwarp.
__global__ void warp_patch_kernel(float* out) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, int(blockDim.x));
    unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
    float sum = 0;
    for (int turn = 1; turn <= 3; turn++) {
        s[threadIdx.x] = float(turn * int(lane));
        __syncwarp();
        sum += s[first + 31 - lane];
        __syncwarp();
    }
    out[threadIdx.x] = sum;
}

TEST_P(Orders, SyncwarpOrdersTheMemoryOfAWarp) {
    Device<float> out(96);
    go(warp_patch_kernel, 1, 96, 96 * sizeof(float), out.get());
    std::vector<float> got = out.host();
    for (size_t i = 0; i < 96; i++) EXPECT_EQ(got[i], float(6 * (31 - i % 32)));
}

// ==== shared memory ==============================================================================

__global__ void shared_kernel(float* out) {
    size_t offset = 0;
    Shared<float> a = shared_array<float>(offset, 3);  // 12 bytes: the next begins at 16
    Shared<bf16> b = shared_array<bf16>(offset, 16);
    Shared<float4> c = shared_array<float4>(offset, 2);
    out[0] = float(offset);
    a[0] = 2, a[1] = a[0], a[2] = 1;
    a[1] += 3;
    a[1] -= 1;
    a[1] *= a[0];
    Shared<float> tail = a + 2;
    tail[-1] *= 2;
    out[1] = a[1];
    for (int i = 0; i < 16; i++) b[i] = __float2bfloat16(float(i));
    Shared<const bf16> same = b;
    uint2 four = load_shared<uint2>(same + 4);
    out[2] = __uint_as_float(four.x << 16);
    out[3] = __uint_as_float(four.y & 0xffff0000u);
    store_shared(b, uint4{0x3f803f80u, 0, 0, 0});
    out[4] = __bfloat162float(same[1]);
    c[1] = float4{1, 2, 3, 4};
    float4 values = c[1];
    out[5] = values.w;
    out[6] = atomicAdd(a + 2, 0.5f);
    out[7] = *tail;
}

TEST(Shared, ArraysPointersAndVectors) {
    Device<float> out(8);
    go(shared_kernel, 1, 1, 96, out.get());
    EXPECT_EQ(out.host(), (std::vector<float>{80, 16, 4, 7, 1, 4, 1, 1.5f}));
}

__global__ void carve_kernel(int count) {
    size_t offset = 0;
    shared_array<float>(offset, count);
}

TEST(Shared, NoMoreThanTheLaunchGave) {
    go(carve_kernel, 1, 1, 64, 16);
    EXPECT_DEATH(go(carve_kernel, 1, 1, 64, 17), "carves bytes 0 to 68 .* the launch gave 64");
}

__global__ void fresh_kernel(int write) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, 1);
    if (write != 0 && blockIdx.x == 0) s[0] = 1;
    if (write == 0 || blockIdx.x != 0) {
        float x = s[0];
        s[0] = x;
    }
}

TEST(Shared, IsFreshForEveryBlock) {
    EXPECT_DEATH(go(fresh_kernel, 2, 1, 4, 1), "block .1,0,0.*never written");
}

// ==== tensor cores and asynchronous copies =======================================================

// Where element i of a lane's fragment lies [PTX ISA, mma.m16n8k16 with bf16].
struct Place {
    int row, col;
};
Place place_a(int lane, int i) {
    int group = lane >> 2, pair = lane % 4 * 2;
    return {i % 4 < 2 ? group : group + 8, i < 4 ? pair + (i & 1) : pair + (i & 1) + 8};
}
Place place_b(int lane, int i) {
    return {i < 2 ? lane % 4 * 2 + (i & 1) : lane % 4 * 2 + (i & 1) + 8, lane >> 2};
}
Place place_d(int lane, int i) {
    return {i < 2 ? lane >> 2 : (lane >> 2) + 8, lane % 4 * 2 + (i & 1)};
}

__global__ void mma_kernel(float* d, const uint32_t* a, const uint32_t* b) {
    unsigned lane = threadIdx.x % 32;
    float sum[4];
    for (int i = 0; i < 4; i++) sum[i] = d[threadIdx.x * 4 + unsigned(i)];
    uint32_t x[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
    uint32_t y[2] = {b[lane * 2], b[lane * 2 + 1]};
    mma_bf16(sum, x, y);
    for (int i = 0; i < 4; i++) d[threadIdx.x * 4 + unsigned(i)] = sum[i];
}

// Small whole numbers, so that every sum is exact.
std::vector<float> whole(size_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::vector<float> values(count);
    for (float& value : values) value = float(int(generator() % 17) - 8);
    return values;
}

TEST_P(Orders, MmaMultipliesTheFragmentsOfPtx) {
    std::vector<float> a = whole(16 * 16, 1), b = whole(16 * 8, 2), c = whole(16 * 8, 3);
    std::vector<bf16> fragment_a(32 * 8), fragment_b(32 * 4);
    std::vector<float> fragment_d(2 * 32 * 4);
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 8; i++) {
            auto [row, col] = place_a(lane, i);
            fragment_a[size_t(lane * 8 + i)] = __float2bfloat16(a[size_t(row * 16 + col)]);
        }
        for (int i = 0; i < 4; i++) {
            auto [row, col] = place_b(lane, i);
            fragment_b[size_t(lane * 4 + i)] = __float2bfloat16(b[size_t(row * 8 + col)]);
            auto [d_row, d_col] = place_d(lane, i);
            float value = c[size_t(d_row * 8 + d_col)];
            fragment_d[size_t(lane * 4 + i)] = fragment_d[size_t((lane + 32) * 4 + i)] = value;
        }
    }
    Device<bf16> device_a(fragment_a), device_b(fragment_b);
    Device<float> device_d(fragment_d);
    go(mma_kernel, 1, 64, 0, device_d.get(), reinterpret_cast<const uint32_t*>(device_a.get()),
       reinterpret_cast<const uint32_t*>(device_b.get()));
    std::vector<float> got = device_d.host();
    for (int thread = 0; thread < 64; thread++) {
        for (int i = 0; i < 4; i++) {
            auto [row, col] = place_d(thread % 32, i);
            float sum = c[size_t(row * 8 + col)];
            for (int k = 0; k < 16; k++) sum += a[size_t(row * 16 + k)] * b[size_t(k * 8 + col)];
            ASSERT_EQ(got[size_t(thread * 4 + i)], sum) << thread << " " << i;
        }
    }
}

// Fragments of A by ldmatrix from (16,16), of B from (8,16) as its rows, or transposed from (16,8).
__global__ void ldmatrix_kernel(float* out, const bf16* a, const bf16* b, int transposed) {
    size_t offset = 0;
    Shared<bf16> sa = shared_array<bf16>(offset, 16 * 16), sb = shared_array<bf16>(offset, 16 * 16);
    for (int i = int(threadIdx.x); i < 256; i += 32) sa[i] = a[i], sb[i] = b[i];
    __syncthreads();
    int lane = int(threadIdx.x), row = lane % 16, half = lane / 16 * 8;
    uint32_t fa[4], fb[4];
    ldmatrix(fa, sa + (row * 16 + half));
    if (transposed != 0) ldmatrix_transposed(fb, sb + (row * 16 + half));
    else ldmatrix(fb, sb + ((lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8));
    for (int n = 0; n < 2; n++) {
        float d[4] = {};
        uint32_t column[2] = {fb[2 * n], fb[2 * n + 1]};
        mma_bf16(d, fa, column);
        for (int i = 0; i < 4; i++)
            out[(lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
}

TEST_P(Orders, LdmatrixFeedsMma) {
    std::vector<float> a = whole(256, 4), b = whole(256, 5);
    Device<bf16> device_a(rounded(a)), device_b(rounded(b));
    Device<float> out(256);
    for (int transposed : {0, 1}) {
        go(ldmatrix_kernel, 1, 32, 1024, out.get(), static_cast<const bf16*>(device_a.get()),
           static_cast<const bf16*>(device_b.get()), transposed);
        std::vector<float> got = out.host();
        for (size_t row = 0; row < 16; row++) {
            for (size_t col = 0; col < 16; col++) {
                float sum = 0;
                for (size_t k = 0; k < 16; k++)
                    sum += a[row * 16 + k] * (transposed ? b[k * 16 + col] : b[col * 16 + k]);
                ASSERT_EQ(got[row * 16 + col], sum) << row << " " << col << " " << transposed;
            }
        }
    }
}

// Tiles as wgmma takes them: place of a number in one.
int swizzled_place(int row, int column) {
    return row * 64 + (column / 8 ^ row % 8) * 8 + column % 8;
}

// d = a b^T, twice, then += a b, of tiles (64,64) that lie as wgmma takes them.
__global__ void wgmma_kernel(float* out, const bf16* a, const bf16* b) {
    size_t offset = 0;
    Shared<bf16> sa = shared_array<bf16>(offset, 4096), sb = shared_array<bf16>(offset, 4096);
    for (int i = int(threadIdx.x); i < 4096; i += 128) sa[i] = a[i], sb[i] = b[i];
    wgmma_sees_shared();
    __syncthreads();
    int warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
    float d[8][4] = {};
    wgmma_fence(d);
    for (int k = 0; k < 64; k += 16)
        wgmma_abT(d, shared_matrix(sa, 0, k), shared_matrix(sb, 0, k), k > 0);
    for (int k = 0; k < 64; k += 16)
        wgmma_abT(d, shared_matrix(sa, 0, k), shared_matrix(sb, 0, k), true);
    wgmma_wait(d);
    uint32_t left[4][4];
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < 4; i++) {
            int row = 16 * warp + g + i % 2 * 8, column = 16 * k + 2 * t + i / 2 * 8;
            left[k][i] = load_shared<uint32_t>(sa + swizzled_place(row, column));
        }
    }
    wgmma_fence(d, left);
    for (int k = 0; k < 4; k++) wgmma_ab(d, left[k], shared_matrix(sb, 16 * k, 0));
    wgmma_wait(d, left);
    wgmma_settled(d);
    for (int n = 0; n < 8; n++) {
        for (int e = 0; e < 4; e++)
            out[(16 * warp + g + e / 2 * 8) * 64 + 8 * n + 2 * t + e % 2] = d[n][e];
    }
}

TEST_P(Orders, WgmmaMultipliesSwizzledTiles) {
    std::vector<float> a = whole(4096, 6), b = whole(4096, 7), tile_a(4096), tile_b(4096);
    for (int row = 0; row < 64; row++) {
        for (int column = 0; column < 64; column++) {
            auto place = size_t(swizzled_place(row, column)), at = size_t(row * 64 + column);
            tile_a[place] = a[at], tile_b[place] = b[at];
        }
    }
    Device<bf16> device_a(rounded(tile_a)), device_b(rounded(tile_b));
    Device<float> out(4096);
    go(wgmma_kernel, 1, 128, 2 * 8192, out.get(), static_cast<const bf16*>(device_a.get()),
       static_cast<const bf16*>(device_b.get()));
    std::vector<float> got = out.host();
    for (size_t row = 0; row < 64; row++) {
        for (size_t col = 0; col < 64; col++) {
            float sum = 0;
            for (size_t k = 0; k < 64; k++)
                sum += a[row * 64 + k] * (2 * b[col * 64 + k] + b[k * 64 + col]);
            ASSERT_EQ(got[row * 64 + col], sum) << row << " " << col;
        }
    }
}

// Two tiles in turn, as a kernel that computes on one while the next is on its way.
__global__ void double_buffer_kernel(float* out, const float* in, int tiles, int valid) {
    size_t offset = 0;
    int n = 4 * int(blockDim.x), mine = 4 * int(threadIdx.x);
    Shared<float> s[2] = {shared_array<float>(offset, n), shared_array<float>(offset, n)};
    cp_async16(s[0] + mine, in + mine, mine < valid);
    cp_async_commit();
    float sum = 0;
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) {
            int at = (tile + 1) * n + mine;
            cp_async16(s[(tile + 1) % 2] + mine, in + (at < valid ? at : 0), at < valid);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        for (int i = 0; i < 4; i++) sum += s[tile % 2][n - 1 - mine - i];
        __syncthreads();
    }
    cp_async_wait<0>();
    out[threadIdx.x] = sum;
}

TEST_P(Orders, AsynchronousCopiesLandGroupByGroup) {
    constexpr int kThreads = 64, kTiles = 5, kValid = 4 * kThreads * kTiles - 40;
    std::vector<float> values(kValid);
    std::iota(values.begin(), values.end(), 1.0f);
    Device<float> in(values), out(kThreads);
    go(double_buffer_kernel, 1, kThreads, 32 * kThreads, out.get(),
       static_cast<const float*>(in.get()), kTiles, kValid);
    std::vector<float> got = out.host();
    for (int thread = 0; thread < kThreads; thread++) {
        float sum = 0;
        for (int tile = 0; tile < kTiles; tile++) {
            for (int i = 0; i < 4; i++) {
                int at = (tile + 1) * 4 * kThreads - 1 - 4 * thread - i;
                if (at < kValid) sum += values[size_t(at)];
            }
        }
        EXPECT_EQ(got[size_t(thread)], sum) << thread;
    }
}

__global__ void arithmetic_kernel(float* out) {
    out[0] = __uint_as_float(__float_as_uint(1.5f));
    out[1] = float(__umulhi(0x80000000u, 6u));
    out[2] = float(__popc(0xf0f0u) + 100 * __clz(1) + 10000 * __ffs(8) + 100000 * __clz(0));
    out[3] = max(1, 2u) + min(3.0f, NAN) + fmaxf(NAN, 2.0f);
    out[4] = rsqrtf(4.0f) + __fdividef(1, 4) + __frcp_rn(8);
    out[5] = __expf(0.0f) + __logf(1.0f);
    float4 wide = {1, 2, 3, 4};
    __stcs(reinterpret_cast<float4*>(out + 8), wide);
    out[6] = __ldcs(reinterpret_cast<const float4*>(out + 8)).z;
    out[7] = float(warpSize);
}

TEST(Arithmetic, Intrinsics) {
    Device<float> out(12);
    go(arithmetic_kernel, 1, 1, 0, out.get());
    EXPECT_EQ(out.host(), (std::vector<float>{1.5f, 3, 3243108, 7, 0.875f, 1, 3, 32, 1, 2, 3, 4}));
}

// ==== the runtime: card and launches =============================================================

TEST(Card, IsWhatTheEnvironmentSays) {
    Environment name("EMU_NAME", "NVIDIA H100"), capability("EMU_CAPABILITY", "9.0");
    Environment memory("EMU_MEMORY", "1000000"), clock("EMU_CLOCK_KHZ", "1980000");
    Environment processors("EMU_MULTIPROCESSORS", "132");
    cudaDeviceProp properties;
    ASSERT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
    EXPECT_STREQ(properties.name, "NVIDIA H100");
    EXPECT_EQ(properties.major, 9);
    EXPECT_EQ(properties.totalGlobalMem, 1000000u);
    EXPECT_EQ(properties.multiProcessorCount, 132);
    int value = 0;
    EXPECT_EQ(cudaDeviceGetAttribute(&value, cudaDevAttrClockRate, 0), cudaSuccess);
    EXPECT_EQ(value, 1980000);
    EXPECT_EQ(cudaGetDeviceProperties(&properties, 1), cudaErrorInvalidDevice);
    void *first = nullptr, *second = nullptr;
    EXPECT_EQ(cudaMalloc(&first, 900000), cudaSuccess);
    EXPECT_EQ(cudaMalloc(&second, 200000), cudaErrorMemoryAllocation);
    EXPECT_EQ(cudaGetLastError(), cudaErrorMemoryAllocation);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    size_t free = 0, total = 0;
    EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    EXPECT_EQ(total, 1000000u);
    EXPECT_EQ(free, 1000000u - 900096u);
    EXPECT_EQ(cudaFree(first), cudaSuccess);
}

TEST(Card, MayBeMissingOrItsDriverOld) {
    int count = -1, version = -1;
    {
        Environment none("EMU_DEVICES", "0");
        EXPECT_EQ(cudaGetDeviceCount(&count), cudaErrorNoDevice);
        EXPECT_EQ(count, 0);
        EXPECT_STREQ(cudaGetErrorName(cudaGetLastError()), "cudaErrorNoDevice");
    }
    {
        Environment no_driver("EMU_DEVICES", "none");
        EXPECT_EQ(cudaGetDeviceCount(&count), cudaErrorInsufficientDriver);
        EXPECT_EQ(cudaDriverGetVersion(&version), cudaSuccess);
        EXPECT_EQ(version, 0);
    }
    {
        Environment old("EMU_DRIVER", "12000");
        void* data;
        EXPECT_EQ(cudaMalloc(&data, 4), cudaErrorInsufficientDriver);
        EXPECT_EQ(cudaDriverGetVersion(&version), cudaSuccess);
        EXPECT_EQ(version, 12000);
        cublasLtHandle_t handle;
        EXPECT_EQ(cublasLtCreate(&handle), CUBLAS_STATUS_NOT_INITIALIZED);
    }
    cudaGetLastError();
    EXPECT_EQ(cudaGetDeviceCount(&count), cudaSuccess);
    EXPECT_EQ(count, 1);
}

__global__ void nothing_kernel() {}

cudaError_t try_launch(dim3 grid, dim3 block, size_t shared) {
    emu::launch("nothing", nothing_kernel, grid, block, shared, nullptr);
    return cudaGetLastError();
}

TEST(Launch, KeepsTheLimitsOfTheCard) {
    EXPECT_EQ(try_launch(1, 1024, 49152), cudaSuccess);
    EXPECT_EQ(try_launch(1, 1025, 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(try_launch(1, dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(try_launch(dim3(1, 65536), 1, 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(try_launch(0, 1, 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(try_launch(1, 0, 0), cudaErrorInvalidConfiguration);
    EXPECT_EQ(try_launch(1, 1, 49153), cudaErrorInvalidValue);
    auto kernel = reinterpret_cast<const void*>(nothing_kernel);
    auto raise = [kernel](int bytes) {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    EXPECT_EQ(raise(163 * 1024 + 1), cudaErrorInvalidValue);
    EXPECT_EQ(raise(163 * 1024), cudaSuccess);
    cudaGetLastError();
    EXPECT_EQ(try_launch(1, 1, 163 * 1024), cudaSuccess);
    cudaFuncAttributes attributes;
    EXPECT_EQ(cudaFuncGetAttributes(&attributes, kernel), cudaSuccess);
    EXPECT_EQ(attributes.maxDynamicSharedSizeBytes, 163 * 1024);
    int blocks = 0;
    EXPECT_EQ(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing_kernel, 256, 40000),
              cudaSuccess);
    EXPECT_EQ(blocks, 4);
    Environment old("EMU_CAPABILITY", "7.5");
    EXPECT_EQ(try_launch(1, 1, 0), cudaErrorNoKernelImageForDevice);
}

// Shared memory of a block, as the CUDA C++ Programming Guide lists it by compute capability.
TEST(Launch, SharedMemoryIsThatOfTheCapability) {
    const std::pair<const char*, int> kMost_KiB[] = {{"8.0", 163}, {"8.6", 99},  {"8.7", 163},
                                                     {"8.9", 99},  {"9.0", 227}, {"10.0", 227},
                                                     {"12.0", 99}};
    auto kernel = reinterpret_cast<const void*>(nothing_kernel);
    auto raise = [kernel](int bytes) {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    for (const auto& [name, most_KiB] : kMost_KiB) {
        Environment capability("EMU_CAPABILITY", name);
        int most = 0, most_together = 0;
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
        cudaDeviceGetAttribute(&most_together, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0);
        EXPECT_EQ(most, most_KiB * 1024) << name;
        EXPECT_EQ(most_together, (most_KiB + 1) * 1024) << name;
        EXPECT_EQ(raise(most + 1), cudaErrorInvalidValue) << name;
        EXPECT_EQ(raise(most), cudaSuccess) << name;
        cudaGetLastError();
        EXPECT_EQ(try_launch(1, 1, size_t(most)), cudaSuccess) << name;
    }
}

TEST(Memory, FailsWhenAskedTo) {
    for (int n : {1, 3}) {
        Environment fail("EMU_FAIL_MALLOC", std::to_string(n));
        for (int i = 1; i <= 4; i++) {
            void* data = nullptr;
            cudaError_t status = cudaMalloc(&data, 16);
            EXPECT_EQ(status, i == n ? cudaErrorMemoryAllocation : cudaSuccess) << i;
            EXPECT_EQ(data == nullptr, i == n);
            EXPECT_EQ(cudaFree(data), cudaSuccess);
        }
    }
    cudaGetLastError();
}

// ==== the runtime: copies, streams, events =======================================================

TEST(Copies, BetweenPageableAndDeviceMemory) {
    std::vector<int> values(100), back(100);
    std::iota(values.begin(), values.end(), 0);
    Device<int> a(100), b(100);
    EXPECT_EQ(b.host()[7], -1);  // fresh memory is full of ones
    EXPECT_EQ(cudaMemcpy(a, values.data(), 400, cudaMemcpyHostToDevice), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(b, a, 400, cudaMemcpyDeviceToDevice), cudaSuccess);
    EXPECT_EQ(b.host(), values);
    EXPECT_EQ(cudaMemset(b, 0, 200), cudaSuccess);
    EXPECT_EQ(cudaMemcpy2D(b.get(), 40, values.data() + 50, 20, 12, 3, cudaMemcpyHostToDevice),
              cudaSuccess);
    back = b.host();
    EXPECT_EQ(back[0], 50);
    EXPECT_EQ(back[3], 0);
    EXPECT_EQ(back[10], 55);
    EXPECT_EQ(back[99], 99);
    EXPECT_EQ(cudaMemcpy(a, values.data(), 404, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMemcpy(a, values.data(), 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
    EXPECT_EQ(cudaMemset(values.data(), 0, 4), cudaErrorInvalidValue);
    EXPECT_EQ(cudaFree(values.data()), cudaErrorInvalidValue);
    cudaGetLastError();
}

__global__ void double_kernel(float* out, const float* in) {
    out[threadIdx.x] = 2 * in[threadIdx.x];
}

// What a pointer inside a structure hides from the launch.
struct Buffers {
    float* out;
    const float* in;
};
__global__ void double_hidden_kernel(Buffers b) { b.out[threadIdx.x] = 2 * b.in[threadIdx.x]; }

class Streams : public testing::Test {
  protected:
    static constexpr size_t kCount = 32, kBytes = kCount * sizeof(float);
    cudaStream_t compute_, copies_;
    cudaEvent_t event_;
    float *pinned_, *result_;
    Device<float> in_{kCount}, out_{kCount};

    Streams() {
        cudaStreamCreateWithFlags(&compute_, cudaStreamNonBlocking);
        cudaStreamCreateWithFlags(&copies_, cudaStreamNonBlocking);
        cudaEventCreateWithFlags(&event_, cudaEventDisableTiming);
        cudaMallocHost(&pinned_, kBytes);
        cudaMallocHost(&result_, kBytes);
        for (size_t i = 0; i < kCount; i++) pinned_[i] = float(i);
    }
    ~Streams() {
        EXPECT_EQ(cudaFreeHost(pinned_), cudaSuccess);
        EXPECT_EQ(cudaFreeHost(result_), cudaSuccess);
        EXPECT_EQ(cudaEventDestroy(event_), cudaSuccess);
        EXPECT_EQ(cudaStreamDestroy(copies_), cudaSuccess);
        EXPECT_EQ(cudaStreamDestroy(compute_), cudaSuccess);
    }
    void upload() { cudaMemcpyAsync(in_, pinned_, kBytes, cudaMemcpyHostToDevice, copies_); }
    void download() { cudaMemcpyAsync(result_, out_, kBytes, cudaMemcpyDeviceToHost, compute_); }
    void compute() {
        emu::launch("double", double_kernel, 1u, unsigned(kCount), 0, compute_, out_.get(),
                    static_cast<const float*>(in_.get()));
    }
};

TEST_F(Streams, AnEventCarriesACopyToAnotherStream) {
    for (int turn = 0; turn < 3; turn++) {
        upload();
        cudaEventRecord(event_, copies_);
        cudaStreamWaitEvent(compute_, event_, 0);
        compute();
        download();
        cudaEventRecord(event_, compute_);
        EXPECT_EQ(cudaEventQuery(event_), cudaErrorNotReady);
        EXPECT_EQ(cudaEventSynchronize(event_), cudaSuccess);
        EXPECT_EQ(cudaEventQuery(event_), cudaSuccess);
        for (size_t i = 0; i < kCount; i++) EXPECT_EQ(result_[i], float(2 * i + 2 * size_t(turn)));
        for (size_t i = 0; i < kCount; i++) pinned_[i] += 1;  // its copy too has ended
    }
}

TEST_F(Streams, WithoutTheEventAKernelSeesNoNumbers) {
    upload();
    emu::launch("double", double_hidden_kernel, 1u, unsigned(kCount), 0, compute_,
                Buffers{out_, in_});
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (float x : out_.host()) EXPECT_TRUE(std::isnan(x));
    for (size_t i = 0; i < kCount; i++) EXPECT_EQ(in_.host()[i], float(i));
}

// cudaMemcpy has staged it when it returns; what comes next on other streams does not wait.
TEST_F(Streams, ACopyOfPageableMemoryLandsLate) {
    std::vector<float> values(kCount, 3);
    auto copy = [&] {
        EXPECT_EQ(cudaMemcpy(in_, values.data(), kBytes, cudaMemcpyHostToDevice), cudaSuccess);
    };
    copy();
    values.assign(kCount, 4);
    emu::launch("double", double_hidden_kernel, 1u, unsigned(kCount), 0, compute_,
                Buffers{out_, in_});
    EXPECT_EQ(cudaStreamSynchronize(compute_), cudaSuccess);
    for (float x : out_.host()) EXPECT_TRUE(std::isnan(x));
    for (float x : in_.host()) EXPECT_EQ(x, 3);
    copy();
    EXPECT_DEATH(compute(),
                 "kernel double on stream .* reads memory that a copy on stream 0 still "
                 "writes");
    EXPECT_EQ(cudaStreamSynchronize(cudaStreamLegacy), cudaSuccess);
    compute();
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (float x : out_.host()) EXPECT_EQ(x, 8);
}

TEST_F(Streams, WhatAKernelReadsThroughAStructureIsNotOverwritten) {
    upload();
    cudaStreamSynchronize(copies_);
    emu::launch("double", double_hidden_kernel, 1u, unsigned(kCount), 0, compute_,
                Buffers{out_, in_});
    EXPECT_DEATH(upload(), "a copy on stream .* writes memory that kernel double .* still reads");
    cudaEventRecord(event_, compute_);
    cudaStreamWaitEvent(copies_, event_, 0);
    upload();
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (size_t i = 0; i < kCount; i++) EXPECT_EQ(out_.host()[i], 2 * float(i));
}

TEST_F(Streams, TheDefaultStreamWaitsForBlockingStreamsAlone) {
    cudaStream_t blocking;
    cudaStreamCreate(&blocking);
    cudaMemcpyAsync(in_, pinned_, kBytes, cudaMemcpyHostToDevice, blocking);
    emu::launch("double", double_kernel, 1u, unsigned(kCount), 0, nullptr, out_.get(),
                static_cast<const float*>(in_.get()));
    EXPECT_EQ(out_.host()[5], 10);
    cudaStreamDestroy(blocking);
    cudaDeviceSynchronize();
    upload();
    EXPECT_DEATH(emu::launch("double", double_kernel, 1u, unsigned(kCount), 0, nullptr, out_.get(),
                             static_cast<const float*>(in_.get())),
                 "still writes");
    cudaDeviceSynchronize();
}

TEST_F(Streams, PrioritiesAreKeptWithinTheirRange) {
    int least = 1, greatest = 1;
    ASSERT_EQ(cudaDeviceGetStreamPriorityRange(&least, &greatest), cudaSuccess);
    EXPECT_LT(greatest, least);  // numbers fall as priorities rise
    auto given = [](int priority) {
        cudaStream_t stream = nullptr;
        EXPECT_EQ(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority),
                  cudaSuccess);
        int kept = 0;
        EXPECT_EQ(cudaStreamGetPriority(stream, &kept), cudaSuccess);
        EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
        return kept;
    };
    EXPECT_EQ(given(greatest), greatest);
    EXPECT_EQ(given(greatest - 1), greatest);
    EXPECT_EQ(given(least + 1), least);
    int kept = 1;
    EXPECT_EQ(cudaStreamGetPriority(compute_, &kept), cudaSuccess);
    EXPECT_EQ(kept, least);
}

TEST_F(Streams, CopiesLandWhileDeviceMemoryIsShutToTheHost) {
    Environment check("EMU_HOST_CHECK", "1");
    Device<float> in(kCount), out(kCount);
    cudaMemcpyAsync(in, pinned_, kBytes, cudaMemcpyHostToDevice, compute_);
    emu::launch("double", double_kernel, 1u, unsigned(kCount), 0, compute_, out.get(),
                static_cast<const float*>(in.get()));
    cudaMemcpyAsync(result_, out, kBytes, cudaMemcpyDeviceToHost, compute_);
    cudaStreamSynchronize(compute_);
    for (size_t i = 0; i < kCount; i++) EXPECT_EQ(result_[i], float(2 * i));
}

// A ring of results in one page: the one that has arrived may be read while the next is in flight.
TEST_F(Streams, APageOfSeveralCopiesIsOpenWhereTheyHaveEnded) {
    cudaMemset(out_, 0, kBytes);
    cudaDeviceSynchronize();
    auto fetch = [&](size_t i) {
        cudaMemcpyAsync(result_ + i, out_ + i, 4, cudaMemcpyDeviceToHost, compute_);
    };
    fetch(0);
    cudaEventRecord(event_, compute_);
    fetch(1);
    cudaEventSynchronize(event_);
    EXPECT_EQ(result_[0], 0);
    result_[2] = 5;
    EXPECT_TRUE(std::isnan(result_[1])) << "read too early: either stopped, or not a number";
    cudaStreamSynchronize(compute_);
    EXPECT_EQ(result_[1], 0);
    EXPECT_EQ(result_[2], 5);
}

TEST_F(Streams, EventsTimeWhatHasEnded) {
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    float time_ms = -1;
    EXPECT_EQ(cudaEventElapsedTime(&time_ms, begin, end), cudaErrorInvalidResourceHandle);
    cudaMemset(in_, 0, kBytes);
    cudaDeviceSynchronize();
    cudaEventRecord(begin, compute_);
    compute();
    cudaEventRecord(end, compute_);
    EXPECT_EQ(cudaEventElapsedTime(&time_ms, begin, end), cudaErrorNotReady);
    cudaEventSynchronize(end);
    EXPECT_EQ(cudaEventElapsedTime(&time_ms, begin, end), cudaSuccess);
    EXPECT_GE(time_ms, 0);
    cudaEventRecord(event_, compute_);
    cudaEventSynchronize(event_);
    EXPECT_EQ(cudaEventElapsedTime(&time_ms, begin, event_), cudaErrorInvalidResourceHandle);
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    EXPECT_EQ(cudaEventRecord(begin, compute_), cudaErrorInvalidResourceHandle);
    EXPECT_EQ(cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(&time_ms)),
              cudaErrorInvalidResourceHandle);
    cudaGetLastError();
}

// ==== cuBLASLt ===================================================================================

// One product: its descriptors, operands and what it should give, in double.
struct Product {
    int m, n, k;
    bool trans_a, trans_b;
    cudaDataType_t type = CUDA_R_16BF, type_d = CUDA_R_16BF;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    float alpha = 1, beta = 0;
    int slack = 0, batch = 1;  // slack: leading dimensions beyond the rows
    cublasComputeType_t compute = CUBLAS_COMPUTE_32F;
};

class Matrix {
  public:
    Matrix(int rows, int cols, const Product& p, cudaDataType_t type, unsigned seed)
        : type_(type),
          ld_(rows + p.slack),
          stride_(size_t(ld_) * size_t(cols)),
          values_(normal(stride_ * size_t(p.batch), seed)),
          wide_(type == CUDA_R_32F ? values_.size() : 1),
          narrow_(type == CUDA_R_32F ? 1 : values_.size()) {
        if (type == CUDA_R_32F) {
            cudaMemcpy(wide_, values_.data(), 4 * values_.size(), cudaMemcpyHostToDevice);
        } else {
            std::vector<bf16> half = rounded(values_);
            for (size_t i = 0; i < half.size(); i++) values_[i] = __bfloat162float(half[i]);
            cudaMemcpy(narrow_, half.data(), 2 * half.size(), cudaMemcpyHostToDevice);
        }
        cublasLtMatrixLayoutCreate(&layout_, type, uint64_t(rows), uint64_t(cols), ld_);
        int64_t stride = int64_t(stride_);
        cublasLtMatrixLayoutSetAttribute(layout_, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &p.batch, 4);
        cublasLtMatrixLayoutSetAttribute(layout_, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                         &stride, 8);
    }
    ~Matrix() { cublasLtMatrixLayoutDestroy(layout_); }
    Matrix(const Matrix&) = delete;
    Matrix& operator=(const Matrix&) = delete;

    void* data() const {
        return type_ == CUDA_R_32F ? static_cast<void*>(wide_.get()) : narrow_.get();
    }
    double at(int batch, int row, int col) const {
        return double(values_[size_t(batch) * stride_ + size_t(col) * size_t(ld_) + size_t(row)]);
    }
    void fetch() {
        if (type_ == CUDA_R_32F) {
            values_ = wide_.host();
        } else {
            std::vector<bf16> half = narrow_.host();
            for (size_t i = 0; i < half.size(); i++) values_[i] = __bfloat162float(half[i]);
        }
    }
    cublasLtMatrixLayout_t layout() const { return layout_; }
    int ld() const { return ld_; }

  private:
    cudaDataType_t type_;
    int ld_;
    size_t stride_;
    std::vector<float> values_;
    Device<float> wide_;
    Device<bf16> narrow_;
    cublasLtMatrixLayout_t layout_ = nullptr;
};

template <class T>
cublasStatus_t describe(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attribute, T value) {
    return cublasLtMatmulDescSetAttribute(d, attribute, &value, sizeof(value));
}

class Multiplication {
  public:
    explicit Multiplication(const Product& p)
        : p(p),
          a(p.trans_a ? p.k : p.m, p.trans_a ? p.m : p.k, p, p.type, 1),
          b(p.trans_b ? p.n : p.k, p.trans_b ? p.k : p.n, p, p.type, 2),
          d(p.m, p.n, p, p.type_d, 3),
          old(p.m, p.n, p, p.type_d, 3),
          aux(p.m, p.n, p, p.type_d, 4),
          bias(std::max(p.m, p.n), 1, p, p.type_d, 5) {
        EXPECT_EQ(cublasLtCreate(&handle), CUBLAS_STATUS_SUCCESS);
        cublasLtMatmulDescCreate(&op, p.compute, CUDA_R_32F);
        describe(op, CUBLASLT_MATMUL_DESC_TRANSA, p.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
        describe(op, CUBLASLT_MATMUL_DESC_TRANSB, p.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
        describe(op, CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
        describe(op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.data());
        describe(op, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.data());
        describe(op, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(aux.ld()));
        cublasLtMatmulPreferenceCreate(&preference);
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(1) << 20);
    }
    ~Multiplication() {
        cublasLtMatmulPreferenceDestroy(preference);
        cublasLtMatmulDescDestroy(op);
        cublasLtDestroy(handle);
    }
    Multiplication(const Multiplication&) = delete;
    Multiplication& operator=(const Multiplication&) = delete;

    template <class T>
    cublasStatus_t prefer(cublasLtMatmulPreferenceAttributes_t attribute, T value) {
        return cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
    }
    cublasStatus_t propose(int most = 8) {
        int count = 0;
        proposals.resize(size_t(most));
        cublasStatus_t status =
            cublasLtMatmulAlgoGetHeuristic(handle, op, a.layout(), b.layout(), d.layout(),
                                           d.layout(), preference, most, proposals.data(), &count);
        proposals.resize(size_t(count));
        return status;
    }
    cublasStatus_t run(const cublasLtMatmulAlgo_t* algo = nullptr, size_t workspace_bytes = 1 << 20,
                       size_t workspace_offset = 0, const void* A = nullptr) {
        return cublasLtMatmul(handle, op, &p.alpha, A != nullptr ? A : a.data(), a.layout(),
                              b.data(), b.layout(), &p.beta, d.data(), d.layout(), d.data(),
                              d.layout(), algo, workspace + workspace_offset, workspace_bytes,
                              nullptr);
    }
    double left(int i, int row, int k) const {
        return p.trans_a ? a.at(i, k, row) : a.at(i, row, k);
    }
    double right(int i, int k, int col) const {
        return p.trans_b ? b.at(i, col, k) : b.at(i, k, col);
    }
    // alpha A' B' + beta C
    double plain(int i, int row, int col) const {
        double sum = 0;
        for (int k = 0; k < p.k; k++) sum += left(i, row, k) * right(i, k, col);
        return p.alpha * sum + (p.beta != 0 ? p.beta * old.at(i, row, col) : 0);
    }

    Product p;
    Matrix a, b, d, old, aux, bias;
    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t op = nullptr;
    cublasLtMatmulPreference_t preference = nullptr;
    Device<char> workspace{(1 << 20) + 64};
    std::vector<cublasLtMatmulHeuristicResult_t> proposals;
};

// Half a unit in the last place of the type, plus float32's own over a sum of k.
double tolerance(cudaDataType_t type, double value, int k, cublasComputeType_t compute) {
    double unit = type == CUDA_R_32F ? 0 : std::ldexp(1, -8) * 1.01;
    double sums = std::ldexp(1, -24) * (k + 8) * 4;
    if (compute == CUBLAS_COMPUTE_32F_FAST_TF32) sums += std::ldexp(1, -10) * 4;
    return unit * std::abs(value) + sums * std::sqrt(double(k)) + 1e-6;
}

double gelu(double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
double gelu_slope(double x) {
    double h = 1e-5;
    return (gelu(x + h) - gelu(x - h)) / (2 * h);
}

void expect_plain(Multiplication& x) {
    x.d.fetch();
    for (int i = 0; i < x.p.batch; i++) {
        for (int col = 0; col < x.p.n; col++) {
            for (int row = 0; row < x.p.m; row++) {
                double want = x.plain(i, row, col), got = x.d.at(i, row, col);
                double most = tolerance(x.p.type_d, want, x.p.k, x.p.compute);
                ASSERT_TRUE(std::abs(got - want) <= most)
                    << row << " " << col << ": " << got << " for " << want;
            }
            for (int row = x.p.m; row < x.d.ld(); row++)  // between the columns nothing changes
                ASSERT_EQ(x.d.at(i, row, col), x.old.at(i, row, col));
        }
    }
}

TEST(Products, AgainstDouble) {
    const cudaDataType_t kTypes[][2] = {
        {CUDA_R_16BF, CUDA_R_16BF}, {CUDA_R_16BF, CUDA_R_32F}, {CUDA_R_32F, CUDA_R_32F}};
    const int kShapes[][3] = {{1, 1, 1}, {5, 7, 3}, {33, 13, 65}, {64, 70, 40}};
    for (auto [type, type_d] : kTypes) {
        for (auto [m, n, k] : kShapes) {
            for (int transposed = 0; transposed < 4; transposed++) {
                Product p = {m, n, k, transposed % 2 == 1, transposed / 2 == 1, type, type_d};
                p.alpha = 0.5f, p.slack = transposed, p.beta = float(transposed % 3);
                Multiplication x(p);
                ASSERT_EQ(x.run(), CUBLAS_STATUS_SUCCESS);
                expect_plain(x);
            }
        }
    }
}

TEST(Products, InBatches) {
    Product p = {17, 9, 20, true, false};
    p.batch = 3;
    Multiplication x(p);
    ASSERT_EQ(x.run(), CUBLAS_STATUS_SUCCESS);
    expect_plain(x);
}

TEST(Products, Tf32RoundsTheOperands) {
    Product p = {16, 16, 64, false, false, CUDA_R_32F, CUDA_R_32F};
    Multiplication exact(p);
    p.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
    Multiplication fast(p);
    ASSERT_EQ(exact.run(), CUBLAS_STATUS_SUCCESS);
    ASSERT_EQ(fast.run(), CUBLAS_STATUS_SUCCESS);
    expect_plain(exact);
    expect_plain(fast);
    EXPECT_GT(std::abs(fast.d.at(0, 1, 1) - fast.plain(0, 1, 1)), 1e-5);
}

// A sum halfway between two bf16 goes to the even one; an operand halfway between two TF32 numbers
// goes away from zero.
TEST(Products, RoundingOfTies) {
    Multiplication narrow({1, 2, 2, false, false});
    const float kLeft[] = {1, std::ldexp(1.0f, -8)}, kRight[] = {1, 1, 1.0078125f, 1};
    std::vector<bf16> left = rounded({kLeft, kLeft + 2}), right = rounded({kRight, kRight + 4});
    cudaMemcpy(narrow.a.data(), left.data(), 4, cudaMemcpyHostToDevice);
    cudaMemcpy(narrow.b.data(), right.data(), 8, cudaMemcpyHostToDevice);
    ASSERT_EQ(narrow.run(), CUBLAS_STATUS_SUCCESS);
    narrow.d.fetch();
    EXPECT_EQ(narrow.d.at(0, 0, 0), 1);
    EXPECT_EQ(narrow.d.at(0, 0, 1), 1.015625);
    Product p = {2, 1, 1, false, false, CUDA_R_32F, CUDA_R_32F};
    p.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
    Multiplication wide(p);
    const float kWide[] = {1 + std::ldexp(1.0f, -11), -1 - std::ldexp(1.0f, -12)}, kOne = 1;
    cudaMemcpy(wide.a.data(), kWide, 8, cudaMemcpyHostToDevice);
    cudaMemcpy(wide.b.data(), &kOne, 4, cudaMemcpyHostToDevice);
    ASSERT_EQ(wide.run(), CUBLAS_STATUS_SUCCESS);
    wide.d.fetch();
    EXPECT_EQ(wide.d.at(0, 0, 0), 1 + std::ldexp(1.0, -10));
    EXPECT_EQ(wide.d.at(0, 1, 0), -1);
}

TEST(Products, BetaZeroDoesNotReadC) {
    Multiplication x({8, 8, 8, false, false, CUDA_R_32F, CUDA_R_32F});
    cudaMemset(x.d.data(), 0xff, 256);
    ASSERT_EQ(x.run(), CUBLAS_STATUS_SUCCESS);
    expect_plain(x);
}

// D, aux and bias of an epilogue, element by element.
void expect_epilogue(Multiplication& x) {
    const Product& p = x.p;
    cublasLtEpilogue_t e = p.epilogue;
    Matrix bias_before(std::max(p.m, p.n), 1, p, p.type_d, 5), aux_before(p.m, p.n, p, p.type_d, 4);
    x.d.fetch();
    x.bias.fetch();
    x.aux.fetch();
    bool adds_bias = e & CUBLASLT_EPILOGUE_BIAS;
    bool forward_gelu = (e & CUBLASLT_EPILOGUE_GELU) != 0;
    bool backward = (e & 64) != 0;
    auto near = [&](double got, double want, const char* what) {
        EXPECT_TRUE(std::abs(got - want) <= 4 * tolerance(p.type_d, want, p.k, p.compute))
            << what << " " << got << " for " << want << ", epilogue " << int(e);
    };
    std::vector<double> sums(size_t(p.m), 0);
    for (int col = 0; col < p.n; col++) {
        for (int row = 0; row < p.m; row++) {
            double v = x.plain(0, row, col);
            if (adds_bias) v += bias_before.at(0, row, 0);
            if (forward_gelu && (e & 128) != 0) near(x.aux.at(0, row, col), v, "aux");
            if (forward_gelu) v = gelu(v);
            if (backward) v *= gelu_slope(aux_before.at(0, row, col));
            near(x.d.at(0, row, col), v, "D");
            sums[size_t(row)] += v;
        }
    }
    if (e == CUBLASLT_EPILOGUE_DGELU_BGRAD)
        for (int row = 0; row < p.m; row++) near(x.bias.at(0, row, 0), sums[size_t(row)], "bias");
    for (int i = 0; i < p.m && e == CUBLASLT_EPILOGUE_BGRADA; i++) {
        double sum = 0;
        for (int k = 0; k < p.k; k++) sum += x.left(0, i, k);
        near(x.bias.at(0, i, 0), sum, "bias");
    }
    for (int i = 0; i < p.n && e == CUBLASLT_EPILOGUE_BGRADB; i++) {
        double sum = 0;
        for (int k = 0; k < p.k; k++) sum += x.right(0, k, i);
        near(x.bias.at(0, i, 0), sum, "bias");
    }
}

TEST(Products, Epilogues) {
    for (cublasLtEpilogue_t epilogue :
         {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS,
          CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU,
          CUBLASLT_EPILOGUE_DGELU_BGRAD, CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB}) {
        for (bool wide : {false, true}) {
            Product p = {40, 24, 32, true, true};
            p.epilogue = epilogue;
            if (wide) p.type = p.type_d = CUDA_R_32F;
            Multiplication x(p);
            ASSERT_EQ(x.propose(), CUBLAS_STATUS_SUCCESS);
            ASSERT_EQ(x.run(&x.proposals[0].algo), CUBLAS_STATUS_SUCCESS);
            expect_epilogue(x);
        }
    }
}

TEST(Products, AlgorithmsDifferInWorkspaceAndOrder) {
    Multiplication x({40, 24, 333, false, false, CUDA_R_32F, CUDA_R_32F});
    ASSERT_EQ(x.propose(), CUBLAS_STATUS_SUCCESS);
    ASSERT_EQ(x.proposals.size(), 3u);
    for (const auto& proposal : x.proposals) {
        ASSERT_EQ(x.run(&proposal.algo, proposal.workspaceSize), CUBLAS_STATUS_SUCCESS);
        expect_plain(x);
        cublasLtMatmulHeuristicResult_t checked;
        EXPECT_EQ(cublasLtMatmulAlgoCheck(x.handle, x.op, x.a.layout(), x.b.layout(), x.d.layout(),
                                          x.d.layout(), &proposal.algo, &checked),
                  CUBLAS_STATUS_SUCCESS);
        EXPECT_EQ(checked.workspaceSize, proposal.workspaceSize);
        if (proposal.workspaceSize > 0) {
            EXPECT_EQ(x.run(&proposal.algo, proposal.workspaceSize - 1),
                      CUBLAS_STATUS_INVALID_VALUE);
            EXPECT_EQ(x.run(&proposal.algo, 1 << 20, 16), CUBLAS_STATUS_INVALID_VALUE);
        }
    }
    x.prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
             uint32_t(CUBLASLT_REDUCTION_SCHEME_MASK & ~CUBLASLT_REDUCTION_SCHEME_INPLACE));
    EXPECT_EQ(x.propose(), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(x.proposals.size(), 2u);
    x.prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(0));
    EXPECT_EQ(x.propose(), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(x.proposals.size(), 1u);
}

// Sums in place need not repeat bitwise; all others must.
TEST(Products, OnlyReductionsInPlaceVary) {
    Multiplication x({40, 24, 333, false, false, CUDA_R_32F, CUDA_R_32F});
    ASSERT_EQ(x.propose(), CUBLAS_STATUS_SUCCESS);
    for (const auto& proposal : x.proposals) {
        uint32_t scheme = 0;
        size_t written = 0;
        ASSERT_EQ(cublasLtMatmulAlgoConfigGetAttribute(&proposal.algo,
                                                       CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
                                                       &scheme, sizeof(scheme), &written),
                  CUBLAS_STATUS_SUCCESS);
        std::vector<double> first, second;
        for (std::vector<double>* values : {&first, &second}) {
            ASSERT_EQ(x.run(&proposal.algo), CUBLAS_STATUS_SUCCESS);
            x.d.fetch();
            for (int col = 0; col < 24; col++)
                for (int row = 0; row < 40; row++) values->push_back(x.d.at(0, row, col));
        }
        EXPECT_EQ(first == second, scheme != CUBLASLT_REDUCTION_SCHEME_INPLACE);
    }
}

TEST(Products, DamagedAlgorithmsAreRefused) {
    Multiplication x({16, 16, 16, false, false});
    ASSERT_EQ(x.propose(1), CUBLAS_STATUS_SUCCESS);
    for (size_t byte = 0; byte < 36; byte++) {
        cublasLtMatmulAlgo_t algo = x.proposals[0].algo;
        reinterpret_cast<unsigned char*>(&algo)[byte] ^= 0x41;
        EXPECT_NE(x.run(&algo), CUBLAS_STATUS_SUCCESS) << "byte " << byte;
    }
}

TEST(Products, WhatTheLibraryRefuses) {
    auto refused = [](const Product& p, const std::function<void(Multiplication&)>& change) {
        Multiplication x(p);
        change(x);
        cublasStatus_t proposed = x.propose();
        EXPECT_TRUE(x.proposals.empty());
        EXPECT_EQ(x.run(), proposed);
        return proposed;
    };
    auto nothing = [](Multiplication&) {};
    Product plain = {16, 16, 16, false, false}, gelu = plain, bias = plain, wide = plain;
    gelu.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    bias.epilogue = CUBLASLT_EPILOGUE_BIAS;
    wide.type = CUDA_R_32F;
    EXPECT_EQ(refused(wide, nothing), CUBLAS_STATUS_NOT_SUPPORTED);  // bf16 made of float32
    Product tf32 = plain;
    tf32.compute = CUBLAS_COMPUTE_32F_FAST_TF32;
    EXPECT_EQ(refused(tf32, nothing), CUBLAS_STATUS_NOT_SUPPORTED);
    Product relu = plain;
    relu.epilogue = CUBLASLT_EPILOGUE_RELU;
    EXPECT_EQ(refused(relu, nothing), CUBLAS_STATUS_NOT_SUPPORTED);
    Product odd = gelu;
    odd.m = 12;
    EXPECT_EQ(refused(odd, nothing), CUBLAS_STATUS_NOT_SUPPORTED);  // aux rows no multiple of 8
    EXPECT_EQ(refused(bias,
                      [](Multiplication& x) {
                          void* none = nullptr;
                          describe(x.op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, none);
                      }),
              CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_EQ(refused(bias,
                      [](Multiplication& x) {
                          describe(x.op, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_32F);
                      }),
              CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT_EQ(refused(gelu,
                      [](Multiplication& x) {
                          describe(x.op, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(8));
                      }),
              CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT_EQ(refused(plain,
                      [](Multiplication& x) {
                          int64_t ld = 15;
                          cublasLtMatrixLayoutSetAttribute(x.a.layout(), CUBLASLT_MATRIX_LAYOUT_LD,
                                                           &ld, sizeof(ld));
                      }),
              CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_EQ(refused(plain,
                      [](Multiplication& x) {
                          uint64_t rows = 15;
                          cublasLtMatrixLayoutSetAttribute(
                              x.b.layout(), CUBLASLT_MATRIX_LAYOUT_ROWS, &rows, sizeof(rows));
                      }),
              CUBLAS_STATUS_INVALID_VALUE);
}

TEST(Products, AttributesAreChecked) {
    Multiplication x({16, 16, 16, false, false});
    EXPECT_EQ(describe(x.op, CUBLASLT_MATMUL_DESC_TRANSA, int64_t(0)), CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_EQ(describe(x.op, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t(1)),
              CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_EQ(x.prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, int32_t(1)),
              CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_STREQ(cublasLtGetStatusName(CUBLAS_STATUS_NOT_SUPPORTED), "CUBLAS_STATUS_NOT_SUPPORTED");
}

TEST(Products, PointersKeepWhatThePreferencePromised) {
    Multiplication x({8, 8, 8, false, false});
    Device<char> memory(1024);
    ASSERT_EQ(x.propose(1), CUBLAS_STATUS_SUCCESS);
    cudaMemset(memory, 0, 1024);
    EXPECT_EQ(x.run(&x.proposals[0].algo, 0, 0, memory + 2), CUBLAS_STATUS_INVALID_VALUE);
    x.prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t(2));
    ASSERT_EQ(x.propose(1), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(x.run(&x.proposals[0].algo, 0, 0, memory + 2), CUBLAS_STATUS_SUCCESS);
    EXPECT_DEATH(x.run(nullptr, 0, 0, memory + 1024 - 64), "A of 128 bytes at byte 960");
    EXPECT_DEATH(x.run(nullptr, 0, 0, x.d.data()), "D and A in the same memory");
    alignas(16) char host[256] = {};
    EXPECT_DEATH(x.run(nullptr, 0, 0, host), "A at .* which is no device memory");
}

// ==== seeded bugs ================================================================================

// Those that this build can catch: a sanitizer's own need that sanitizer.
std::vector<bugs::Bug> catchable() {
    std::vector<bugs::Bug> found;
    for (const bugs::Bug& bug : bugs::kTable) {
        if (bug.by == bugs::By::address_sanitizer && !kAddressSanitizer) continue;
        if (bug.by == bugs::By::race && !kThreadSanitizer) continue;
        found.push_back(bug);
    }
    return found;
}

class Bugs : public testing::TestWithParam<bugs::Bug> {};
INSTANTIATE_TEST_SUITE_P(Seeded, Bugs, testing::ValuesIn(catchable()),
                         [](const auto& info) { return std::string(info.param.name); });

// Whether the checksum is the same in all thread orders.
bool depends_on_order(const bugs::Bug& bug) {
    std::vector<float> sums;
    for (const char* order : {"0", "1", "2"}) {
        Environment set("EMU_ORDER", order);
        sums.push_back(bug.run());
    }
    return sums[0] != sums[1] || sums[1] != sums[2];
}

TEST_P(Bugs, AreCaught) {
    const bugs::Bug& bug = GetParam();
    bool races = bug.by == bugs::By::race || bug.by == bugs::By::race_or_unwritten ||
                 bug.by == bugs::By::race_or_order;
    if (kThreadSanitizer && races) {
        // A program in which the thread sanitizer found a race ends with an exit code that is not
        // 0.
        EXPECT_DEATH((bug.run(), exit(0)), "data race|never written");
    } else if (bug.by == bugs::By::race_or_order) {
        EXPECT_TRUE(depends_on_order(bug));
    } else {
        EXPECT_DEATH(bug.run(), bug.sentence);
    }
}

}  // namespace

int nccl_rank(int argc, char** argv);  // test_nccl.cpp

int main(int argc, char** argv) {
    if (argc > 1 && strcmp(argv[1], "--nccl-rank") == 0) return nccl_rank(argc, argv);
    testing::InitGoogleTest(&argc, argv);
    // In a child that was forked from several threads, which fibers are to it, the thread sanitizer
    // ignores half of what happens: its children start anew.
    if (kThreadSanitizer) testing::GTEST_FLAG(death_test_style) = "threadsafe";
    int status = RUN_ALL_TESTS();
    const testing::UnitTest& tests = *testing::UnitTest::GetInstance();
    printf("%d passed, %d failed, %d skipped\n", tests.successful_test_count(),
           tests.failed_test_count(), tests.skipped_test_count());
    return status;
}
