// Seeded bugs: each a few lines of CUDA that are wrong in one way, and how the emulator must say
// so. test_emu.cpp includes this file and runs each in a process of its own.

#include <functional>
#include <vector>

#include "emu.h"

namespace bugs {

// How a bug is caught: always; only under one of the sanitizers; where threads race, by the thread
// sanitizer, and without it as a read of what nobody has written or as a result that depends on the
// order of threads.
enum class By { emulator, address_sanitizer, race, race_or_unwritten, race_or_order };

struct Bug {
    const char* name;
    By by;
    const char* sentence;        // part of the message, as a regular expression
    std::function<float()> run;  // returns a checksum, if it returns
};

constexpr int kThreads = 64;

// ==== a device buffer to write to ================================================================

struct Floats {
    float* data = nullptr;
    int count;
    explicit Floats(int n) : count(n) { cudaMalloc(&data, size_t(n) * sizeof(float)); }
    ~Floats() { cudaFree(data); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
    float checksum() const {
        std::vector<float> host(static_cast<size_t>(count));
        cudaMemcpy(host.data(), data, host.size() * sizeof(float), cudaMemcpyDeviceToHost);
        float sum = 0;
        for (size_t i = 0; i < host.size(); i++) sum += float(i + 1) * host[i];
        return sum;
    }
};

template <class... P, class... A>
void go(void (*kernel)(P...), int blocks, int threads, size_t shared, A... arguments) {
    emu::launch("bug", kernel, unsigned(blocks), unsigned(threads), shared, nullptr, arguments...);
}

// ==== memory =====================================================================================

__global__ void write_at(float* out, int i) {
    if (threadIdx.x == 0) out[i] = 1;
}

__global__ void read_at(float* out, const float* in, int i) {
    if (threadIdx.x == 0) out[0] = in[i];
}

__global__ void fill(float* out, int n) {
    int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = float(i);
}

struct Hidden {
    float* out;
};
__global__ void write_hidden(Hidden h) { h.out[threadIdx.x] = 1; }

__global__ void shared_overrun(float* out) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, int(blockDim.x));
    s[threadIdx.x + 1] = 1;  // the last thread is past the end
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x];
}

__global__ void unwritten_tile(float* out) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, int(blockDim.x));
    if (threadIdx.x < 60) s[threadIdx.x] = 1;  // the tail of the tile is forgotten
    __syncthreads();
    out[threadIdx.x] = s[threadIdx.x];
}

__global__ void deep_recursion(float* out, int depth) {
    volatile char frame[4096];
    frame[depth % 4096] = char(depth);
    if (depth > 0) deep_recursion(out, depth - 1);
    out[0] = frame[depth % 4096];
}

// ==== barriers and collectives ===================================================================

__global__ void missing_barrier(float* out) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, int(blockDim.x));
    s[threadIdx.x] = float(threadIdx.x);
    out[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];  // no barrier between
}

__global__ void missing_second_barrier(float* out) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, int(blockDim.x));
    float sum = 0;
    for (int turn = 1; turn <= 3; turn++) {
        s[threadIdx.x] = float(turn * int(threadIdx.x));
        __syncthreads();
        sum += s[blockDim.x - 1 - threadIdx.x];
        // no barrier before the next turn overwrites what others still read
    }
    out[threadIdx.x] = sum;
}

__global__ void missing_warp_barrier(float* out) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, 32);
    float sum = 0;
    for (int turn = 1; turn <= 3; turn++) {
        s[threadIdx.x] = float(turn * int(threadIdx.x));
        __syncwarp();
        sum += s[31 - threadIdx.x];  // no __syncwarp before the next turn
    }
    out[threadIdx.x] = sum;
}

// A shuffle orders the lanes in time, here and on most cards, but not their memory.
__global__ void shuffle_is_no_barrier(float* out) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, 32);
    s[threadIdx.x] = float(threadIdx.x);
    float other = __shfl_xor_sync(~0u, float(threadIdx.x), 1);
    out[threadIdx.x] = s[31 - threadIdx.x] + other;
}

__global__ void blocks_share_a_sum(float* out) {
    if (threadIdx.x == 0) out[0] = float(blockIdx.x);  // every block, without atomics
}

__global__ void partial_barrier(float* out) {
    if (threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = 1;
}

__global__ void two_barriers(float* out) {
    if (threadIdx.x % 2 == 0) __syncthreads();
    else __syncthreads();
    out[threadIdx.x] = 1;
}

__global__ void divergent_shuffle(float* out) {
    float x = float(threadIdx.x);
    if (threadIdx.x < 16) x += __shfl_xor_sync(~0u, x, 1);
    out[threadIdx.x] = x;
}

__global__ void shuffles_at_two_places(float* out) {
    float x = float(threadIdx.x);
    if (threadIdx.x < 16) x += __shfl_xor_sync(~0u, x, 1);
    else x += __shfl_xor_sync(~0u, x, 2);
    out[threadIdx.x] = x;
}

__global__ void lane_not_in_mask(float* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffu, float(threadIdx.x), 1);
}

__global__ void reads_an_absent_lane(float* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, float(threadIdx.x), 20);
}

__global__ void lanes_that_do_not_exist(float* out) {
    out[threadIdx.x] = __shfl_xor_sync(~0u, float(threadIdx.x), 1);
}

// ==== tensor cores and asynchronous copies =======================================================

__global__ void copy_not_waited_for(float* out, const float* in) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, 4 * kThreads);
    cp_async16(s + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    cp_async_commit();
    out[threadIdx.x] = s[4 * threadIdx.x];
    cp_async_wait<0>();
}

__global__ void copy_left_behind(float* out, const float* in) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, 4 * kThreads);
    cp_async16(s + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    cp_async_commit();
    out[threadIdx.x] = 1;
}

__global__ void waits_for_the_wrong_group(float* out, const float* in) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, 4 * kThreads);
    cp_async16(s + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<1>();  // one group, the only one, may still be on its way
    out[threadIdx.x] = s[4 * threadIdx.x];
    cp_async_wait<0>();
}

__global__ void copy_without_barrier(float* out, const float* in) {
    size_t offset = 0;
    Shared<float> s = shared_array<float>(offset, 4 * kThreads);
    cp_async16(s + 4 * threadIdx.x, in + 4 * threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<0>();  // a thread's own copies; those of others need the barrier
    out[threadIdx.x] = s[4 * (blockDim.x - 1 - threadIdx.x)];
}

__global__ void misaligned_matrix(float* out) {
    size_t offset = 0;
    Shared<__nv_bfloat16> s = shared_array<__nv_bfloat16>(offset, 1024);
    for (unsigned i = threadIdx.x; i < 1024; i += blockDim.x) s[i] = __float2bfloat16(1.0f);
    __syncthreads();
    uint32_t r[4];
    ldmatrix(r, s + 12 * threadIdx.x);  // rows of 24 bytes
    out[threadIdx.x] = float(r[0]);
}

// A product of a warpgroup that goes wrong in the way that is asked for.
enum WgmmaBug {
    kWithoutFence,
    kWithoutWait,
    kReadsBeforeWait,
    kBesideItsTile,
    kWithoutLeft,
    kSettledBeforeWait
};

__global__ void wgmma_bug(float* out, int bug) {
    size_t offset = 0;
    Shared<__nv_bfloat16> s = shared_array<__nv_bfloat16>(offset, 4096);
    for (unsigned i = threadIdx.x; i < 4096; i += blockDim.x) s[i] = __float2bfloat16(1.0f);
    __syncthreads();
    float d[8][4] = {}, early = 0;
    if (bug != kWithoutFence) wgmma_fence(d);
    Shared<__nv_bfloat16> tile = s + (bug == kBesideItsTile ? 64 : 0);
    const uint32_t left[4] = {};
    if (bug == kWithoutLeft) wgmma_ab(d, left, shared_matrix(tile, 0, 0));
    else wgmma_abT(d, shared_matrix(tile, 0, 0), shared_matrix(tile, 0, 0), true);
    if (bug == kReadsBeforeWait) early = d[0][0];
    if (bug == kSettledBeforeWait) wgmma_settled(d);
    if (bug != kWithoutWait) wgmma_wait(d);
    out[threadIdx.x] = d[0][0] + early;
}

// ==== the host ===================================================================================

// Two streams, a pinned and a device buffer.
struct Streams {
    cudaStream_t compute, copies;
    float* pinned;
    Floats device{kThreads};
    size_t bytes = kThreads * sizeof(float);
    Streams() {
        cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking);
        cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking);
        cudaMallocHost(&pinned, bytes);
        for (int i = 0; i < kThreads; i++) pinned[i] = 1;
    }
    ~Streams() {
        cudaDeviceSynchronize();
        cudaFreeHost(pinned);
        cudaStreamDestroy(compute);
        cudaStreamDestroy(copies);
    }
    Streams(const Streams&) = delete;
    Streams& operator=(const Streams&) = delete;
    void upload() { cudaMemcpyAsync(device.data, pinned, bytes, cudaMemcpyHostToDevice, copies); }
};

inline float early_host_read() {
    Streams s;
    emu::launch("fill", fill, 1u, unsigned(kThreads), 0, s.compute, s.device.data, kThreads);
    cudaMemcpyAsync(s.pinned, s.device.data, s.bytes, cudaMemcpyDeviceToHost, s.compute);
    return s.pinned[3];
}

inline float host_overwrites_source() {
    Streams s;
    s.upload();
    s.pinned[0] = 2;
    return s.pinned[0];
}

inline float missing_wait() {
    Streams s;
    Floats out(1);
    s.upload();
    emu::launch("read_at", read_at, 1u, 1u, 0, s.compute, out.data, s.device.data, 3);
    return 0;
}

inline float overwrites_what_a_kernel_reads() {
    Streams s;
    Floats out(1);
    cudaMemset(s.device.data, 0, s.bytes);
    cudaDeviceSynchronize();
    emu::launch("read_at", read_at, 1u, 1u, 0, s.compute, out.data, s.device.data, 3);
    s.upload();
    return 0;
}

inline float host_pointer_to_kernel() {
    float host[4] = {};
    go(write_at, 1, 1, 0, static_cast<float*>(host), 0);
    return 0;
}

inline float write_after_free() {
    float* data = nullptr;
    cudaMalloc(&data, 64);
    cudaFree(data);
    emu::launch("bug", write_hidden, 1u, 1u, 0, nullptr, Hidden{data});
    return 0;
}

inline float host_touches_device() {
    setenv("EMU_HOST_CHECK", "1", 1);
    float* data = nullptr;
    cudaMalloc(&data, 64);
    return *static_cast<volatile float*>(data);
}

// ==== the table ==================================================================================

inline float with_output(int count, const std::function<void(float*)>& run) {
    Floats out(count);
    run(out.data);
    cudaDeviceSynchronize();
    return out.checksum();
}

inline float on_tile(void (*kernel)(float*), int blocks = 1, int threads = kThreads) {
    return with_output(kThreads * 2, [=](float* out) {
        cudaMemset(out, 0, 2 * kThreads * sizeof(float));
        go(kernel, blocks, threads, kThreads * sizeof(float), out);
    });
}

inline float on_copy(void (*kernel)(float*, const float*)) {
    Floats in(4 * kThreads);
    go(fill, 4, kThreads, 0, in.data, in.count);
    return with_output(kThreads, [&](float* out) {
        go(kernel, 1, kThreads, 16 * kThreads, out, static_cast<const float*>(in.data));
    });
}

float on_wgmma(WgmmaBug bug, int threads = 128) {
    float sum =
        with_output(threads, [&](float* p) { go(wgmma_bug, 1, threads, 8192, p, int(bug)); });
    if (std::isnan(sum)) emu::die("computes with the sums of a wgmma before it is done");
    return sum;
}

inline const std::vector<Bug> kTable = {
    {"write_far_behind", By::emulator, "write_at|past the end of an allocation of 400 bytes",
     [] { return with_output(100, [](float* p) { go(write_at, 1, 32, 0, p, 1000); }); }},
    {"write_just_behind", By::emulator, "byte 0 behind an allocation of 400 bytes|use-after-poison",
     [] { return with_output(100, [](float* p) { go(write_at, 1, 32, 0, p, 100); }); }},
    {"write_just_before", By::emulator, "before an allocation of 400 bytes|use-after-poison",
     [] { return with_output(100, [](float* p) { go(write_at, 1, 32, 0, p, -1); }); }},
    {"read_just_behind", By::address_sanitizer, "use-after-poison",
     [] {
         Floats in(100);
         return with_output(1, [&](float* p) {
             go(read_at, 1, 32, 0, p, static_cast<const float*>(in.data), 100);
         });
     }},
    {"write_after_free", By::emulator, "bytes after it was freed", write_after_free},
    {"host_pointer_to_kernel", By::emulator, "argument 1 points outside device memory",
     host_pointer_to_kernel},
    {"host_touches_device", By::emulator, "the host touches byte 0 of 64 of device memory",
     host_touches_device},
    {"shared_overrun", By::emulator, "touches element 64 of a shared array of 64",
     [] { return on_tile(shared_overrun); }},
    {"unwritten_tile", By::emulator, "reads element 6[0-3] of a shared array",
     [] { return on_tile(unwritten_tile); }},
    {"deep_recursion", By::emulator, "uses up the stack of its thread",
     [] { return with_output(1, [](float* p) { go(deep_recursion, 1, 1, 0, p, 1000); }); }},
    {"missing_barrier", By::race_or_unwritten, "which was never written",
     [] { return on_tile(missing_barrier); }},
    {"missing_second_barrier", By::race_or_order, "",
     [] { return on_tile(missing_second_barrier); }},
    {"missing_warp_barrier", By::race_or_order, "",
     [] { return on_tile(missing_warp_barrier, 1, 32); }},
    {"shuffle_is_no_barrier", By::race, "", [] { return on_tile(shuffle_is_no_barrier, 1, 32); }},
    {"blocks_share_a_sum", By::race_or_order, "",
     [] { return on_tile(blocks_share_a_sum, 4, 32); }},
    {"partial_barrier", By::emulator, "threads 40 to 63: exited",
     [] { return on_tile(partial_barrier); }},
    {"two_barriers", By::emulator, "arrives at __syncthreads, .* while others wait at another",
     [] { return on_tile(two_barriers); }},
    {"divergent_shuffle", By::emulator, "threads 0 to 15: in __shfl_xor_sync of lanes ffffffff",
     [] { return on_tile(divergent_shuffle, 1, 32); }},
    {"shuffles_at_two_places", By::emulator, "arrives at __shfl_xor_sync .* while lane",
     [] { return on_tile(shuffles_at_two_places, 1, 32); }},
    {"lane_not_in_mask", By::emulator, "calls __shfl_xor_sync of lanes 0000ffff, .* is lane",
     [] { return on_tile(lane_not_in_mask, 1, 32); }},
    {"reads_an_absent_lane", By::emulator, "reads lane 20 in __shfl_sync .* takes no part",
     [] { return on_tile(reads_an_absent_lane, 1, 32); }},
    {"lanes_that_do_not_exist", By::emulator, "the warp has lanes 000fffff",
     [] { return on_tile(lanes_that_do_not_exist, 1, 20); }},
    {"copy_not_waited_for", By::emulator, "which was never written",
     [] { return on_copy(copy_not_waited_for); }},
    {"copy_left_behind", By::emulator, "ends with 1 cp.async copies that nobody waited for",
     [] { return on_copy(copy_left_behind); }},
    {"waits_for_the_wrong_group", By::emulator, "which was never written",
     [] { return on_copy(waits_for_the_wrong_group); }},
    {"copy_without_barrier", By::race_or_unwritten, "which was never written",
     [] { return on_copy(copy_without_barrier); }},
    {"misaligned_matrix", By::emulator, "ldmatrix of 16 bytes .* not aligned to 16",
     [] { return with_output(32, [](float* p) { go(misaligned_matrix, 1, 32, 2048, p); }); }},
    {"wgmma_without_fence", By::emulator, "calls wgmma without wgmma.fence",
     [] { return on_wgmma(kWithoutFence); }},
    {"wgmma_not_waited_for", By::emulator, "ends with 1 wgmma that nobody waited for",
     [] { return on_wgmma(kWithoutWait); }},
    {"wgmma_read_too_early", By::emulator, "before it is done",
     [] { return on_wgmma(kReadsBeforeWait); }},
    {"wgmma_beside_its_tile", By::emulator, "not aligned to 1024",
     [] { return on_wgmma(kBesideItsTile); }},
    {"wgmma_waited_for_without_left", By::emulator, "without its left factor",
     [] { return on_wgmma(kWithoutLeft); }},
    {"wgmma_settled_before_the_wait", By::emulator, "that it has not waited for",
     [] { return on_wgmma(kSettledBeforeWait); }},
    {"wgmma_of_two_warps", By::emulator, "in a block of 64 threads, not warpgroups",
     [] { return on_wgmma(kReadsBeforeWait, 64); }},
    {"early_host_read", By::emulator, "the host touches pinned memory that a copy",
     early_host_read},
    {"host_overwrites_source", By::emulator, "the host writes pinned memory that a copy",
     host_overwrites_source},
    {"missing_wait", By::emulator, "kernel read_at on stream .* a copy on stream .* still writes",
     missing_wait},
    {"overwrites_what_a_kernel_reads", By::emulator,
     "a copy on stream .* writes memory that kernel read_at .* still reads",
     overwrites_what_a_kernel_reads},
};

}  // namespace bugs
