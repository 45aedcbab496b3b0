// Tests of the emulator's NCCL: every rank is a process of its own, this program started again as
// `--nccl-rank SCENARIO RANK RANKS ID`. What a rank finds wrong it says on stderr, and ends with 1.

#include <dirent.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <nccl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <thread>

#include "emu.h"

extern char** environ;

namespace {

using bf16 = __nv_bfloat16;
using namespace std::chrono_literals;

// ==== what a rank has ============================================================================

int failures = 0;
#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            fprintf(stderr, "rank %d, line %d: %s\n", me, __LINE__, #condition); \
            if (++failures > 10) exit(1);                                        \
        }                                                                        \
    } while (false)

int me, ranks;
ncclUniqueId unique_id;
ncclComm_t comm;

void init() {
    ncclResult_t status = ncclCommInitRank(&comm, ranks, unique_id, me);
    if (status == ncclSuccess) return;
    fprintf(stderr, "rank %d: init gives %d\n", me, int(status));
    exit(3);
}

cudaStream_t new_stream() {
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess);
    return stream;
}

template <class T>
struct Buffer {
    explicit Buffer(size_t count) : n(count) {
        CHECK(cudaMalloc(&p, std::max<size_t>(1, count) * sizeof(T)) == cudaSuccess);
    }
    explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) { set(values); }
    ~Buffer() { cudaFree(p); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void set(const std::vector<T>& values) {
        cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
        cudaStreamSynchronize(cudaStreamLegacy);  // other streams do not wait for what is staged
    }
    std::vector<T> host() const {
        std::vector<T> values(n);
        cudaMemcpy(values.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost);
        return values;
    }
    T* p = nullptr;
    size_t n;
};

// Files that tell another rank's host something, without CUDA or NCCL.
std::string flag_path(const std::string& name) {
    return std::string(getenv("TEST_NCCL_DIR")) + "/" + name;
}
void raise_flag(const std::string& name) { std::ofstream(flag_path(name)) << "x"; }
void await_flag(const std::string& name) {
    for (int i = 0; i < 20000 && access(flag_path(name).c_str(), F_OK) != 0; i++)
        std::this_thread::sleep_for(1ms);
    CHECK(access(flag_path(name).c_str(), F_OK) == 0);
}

__global__ void add_kernel(float* out, const float* in, float x, int n) {
    int i = int(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = in[i] + x;
}
void add(float* out, const float* in, float x, size_t n, cudaStream_t stream) {
    emu::launch("add", add_kernel, unsigned(n + 63) / 64, 64u, 0, stream, out, in, x, int(n));
    CHECK(cudaGetLastError() == cudaSuccess);
}
struct Hidden {
    float* out;
    const float* in;
};
__global__ void hidden_copy_kernel(Hidden h) { h.out[threadIdx.x] = h.in[threadIdx.x]; }

bool same_bits(const auto& a, const auto& b) {
    if (a.empty() || b.empty()) return a.empty() && b.empty();
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
}

// ==== every collective, type and operation =======================================================

template <class T>
T as(double x) {
    return T(x);
}
template <>
bf16 as(double x) {
    return __float2bfloat16(float(x));
}
template <>
__half as(double x) {
    return __float2half(float(x));
}
template <class T>
double number(T x) {
    if constexpr (std::is_same_v<T, bf16>) return double(__bfloat162float(x));
    else if constexpr (std::is_same_v<T, __half>) return double(__half2float(x));
    else return double(x);
}

// Small numbers, whose sums and products are exact in every type and order.
double value(int rank, size_t i) { return double((i * 7 + size_t(rank) * 5 + i / 11) % 3 + 1); }

double expected(size_t i, ncclRedOp_t op) {
    double x = value(0, i);
    for (int r = 1; r < ranks; r++) {
        double y = value(r, i);
        x = op == ncclProd  ? x * y
            : op == ncclMax ? std::max(x, y)
            : op == ncclMin ? std::min(x, y)
                            : x + y;
    }
    return op == ncclAvg ? x / ranks : x;
}

template <class T>
bool near(T got, double want, ncclRedOp_t op) {
    if (op != ncclAvg) return number(got) == want;
    if (std::is_integral_v<T>) return number(got) == std::floor(want);
    double tolerance = sizeof(T) == 2 ? (std::is_same_v<T, bf16> ? 0.03 : 0.004) : 1e-6;
    return !(std::fabs(number(got) - want) > tolerance * want);
}

template <class T>
std::vector<T> values(int rank, size_t count) {
    std::vector<T> v;
    for (size_t i = 0; i < count; i++) v.push_back(as<T>(value(rank, i)));
    return v;
}

template <class T>
void expect_reductions(ncclDataType_t type, size_t n, ncclRedOp_t op, bool in_place) {
    size_t all = n * size_t(ranks), mine = n * size_t(me);
    int root = ranks - 1;
    Buffer<T> a(values<T>(me, all)), b(all), c(all);
    T* send = in_place ? b.p : a.p;
    if (in_place) b.set(values<T>(me, all));
    CHECK(ncclAllReduce(send, b.p, all, type, op, comm, nullptr) == ncclSuccess);
    std::vector<T> got = b.host();
    for (size_t i = 0; i < all; i++) CHECK(near(got[i], expected(i, op), op));
    if (in_place) c.set(values<T>(me, all));
    send = in_place ? c.p : a.p;
    T* recv = in_place ? c.p + mine : c.p;
    CHECK(ncclReduceScatter(send, recv, n, type, op, comm, nullptr) == ncclSuccess);
    got = c.host();
    size_t at = in_place ? mine : 0;
    for (size_t i = 0; i < n; i++) CHECK(near(got[at + i], expected(mine + i, op), op));
    Buffer<T> d(all);
    if (in_place) d.set(values<T>(me, all));
    send = in_place ? d.p : a.p;
    CHECK(ncclReduce(send, me == root ? d.p : nullptr, all, type, op, root, comm, nullptr) ==
          ncclSuccess);
    got = d.host();
    for (size_t i = 0; me == root && i < all; i++) CHECK(near(got[i], expected(i, op), op));
    if (!in_place) CHECK(same_bits(a.host(), values<T>(me, all)));
}

template <class T>
void expect_moves(ncclDataType_t type, size_t n, bool in_place) {
    size_t all = n * size_t(ranks), mine = n * size_t(me);
    Buffer<T> a(values<T>(me, n)), b(all);
    T* send = a.p;
    if (in_place) {
        send = b.p + mine;
        if (n > 0) cudaMemcpy(send, a.p, n * sizeof(T), cudaMemcpyDeviceToDevice);
    }
    CHECK(ncclAllGather(send, b.p, n, type, comm, nullptr) == ncclSuccess);
    std::vector<T> got = b.host();
    for (size_t i = 0; i < all; i++) CHECK(number(got[i]) == value(int(i / n), i % n));
    for (int root = 0; root < ranks; root++) {
        Buffer<T> c(values<T>(me, n)), d(n);
        bool null_send = !in_place && me != root;
        CHECK(ncclBroadcast(null_send ? nullptr : c.p, in_place ? c.p : d.p, n, type, root, comm,
                            nullptr) == ncclSuccess);
        CHECK(same_bits(in_place ? c.host() : d.host(), values<T>(root, n)));
    }
}

template <class T>
void expect_type(ncclDataType_t type) {
    for (size_t n : {0, 1, 5, 67, 1500}) {
        for (bool in_place : {false, true}) {
            for (ncclRedOp_t op : {ncclSum, ncclProd, ncclMax, ncclMin, ncclAvg})
                expect_reductions<T>(type, n, op, in_place);
            expect_moves<T>(type, n, in_place);
        }
    }
}

void everything() {
    init();
    expect_type<float>(ncclFloat32);
    expect_type<bf16>(ncclBfloat16);
    expect_type<__half>(ncclFloat16);
    expect_type<double>(ncclFloat64);
    expect_type<int8_t>(ncclInt8);
    expect_type<uint8_t>(ncclUint8);
    expect_type<int32_t>(ncclInt32);
    expect_type<uint32_t>(ncclUint32);
    expect_type<int64_t>(ncclInt64);
    expect_type<uint64_t>(ncclUint64);
    CHECK(ncclCommFinalize(comm) == ncclSuccess);
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
}

// Wide and signed integers, which a float32 would lose.
void integers() {
    init();
    Buffer<int64_t> a({INT64_MAX - me, INT64_MIN + me, -1 - me}), b(3);
    ncclAllReduce(a.p, b.p, 3, ncclInt64, ncclMin, comm, nullptr);
    CHECK(b.host() == (std::vector<int64_t>{INT64_MAX - ranks + 1, INT64_MIN, -ranks}));
    Buffer<uint64_t> c({(uint64_t(1) << 60) + uint64_t(me), UINT64_MAX}), d(2);
    ncclAllReduce(c.p, d.p, 2, ncclUint64, ncclSum, comm, nullptr);
    uint64_t n = uint64_t(ranks);
    CHECK(d.host() == (std::vector<uint64_t>{n * (uint64_t(1) << 60) + n * (n - 1) / 2, -n}));
    Buffer<int8_t> e({100, -100}), f(2);
    ncclAllReduce(e.p, f.p, 2, ncclInt8, ncclMax, comm, nullptr);
    CHECK(f.host() == (std::vector<int8_t>{100, -100}));
    ncclCommDestroy(comm);
}

// ==== the order of sums ==========================================================================

std::vector<float> noise(int rank, size_t count) {
    std::mt19937 generator(unsigned(rank) + 1);
    std::normal_distribution<float> draw;
    std::vector<float> v(count);
    for (float& x : v) x = draw(generator);
    return v;
}

// One element, added up from rank `first` round the ring.
float ring_sum(const std::vector<std::vector<float>>& in, size_t i, int first) {
    float x = in[size_t(first)][i];
    for (int hop = 1; hop < ranks; hop++) x = in[size_t((first + hop) % ranks)][i] + x;
    return x;
}
// An average scales each input first. (Volatile: product and sum are to stay apart.)
float ring_mean(const std::vector<std::vector<float>>& in, size_t i, int first) {
    float scale = 1.0f / float(ranks), sum = 0;
    for (int hop = 0; hop < ranks; hop++) {
        volatile float x = in[size_t((first + hop) % ranks)][i] * scale;
        sum = hop == 0 ? float(x) : float(x) + sum;
    }
    return sum;
}
bf16 ring_sum_bf16(const std::vector<std::vector<float>>& in, size_t i, int first) {
    bf16 x = __float2bfloat16(in[size_t(first)][i]);
    for (int hop = 1; hop < ranks; hop++) {
        bf16 y = __float2bfloat16(in[size_t((first + hop) % ranks)][i]);
        x = __float2bfloat16(__bfloat162float(y) + __bfloat162float(x));
    }
    return x;
}

// Which rank's part of an all-reduce the element is in.
int owner(size_t i, size_t count) {
    size_t turn = 1024 * size_t(ranks), left = count - i / turn * turn;
    size_t part = std::min<size_t>(1024, (left + size_t(ranks) - 1) / size_t(ranks));
    return int(i % turn / part);
}

void order() {
    init();
    bool plain = getenv("EMU_NCCL_ORDER") != nullptr;
    size_t count = 10007, n = count / size_t(ranks);
    std::vector<std::vector<float>> in;
    for (int r = 0; r < ranks; r++) in.push_back(noise(r, count));
    auto first = [&](int c) { return plain ? 0 : (c + 1) % ranks; };
    std::vector<float> sums, scattered, naive, reduced, means;
    std::vector<bf16> narrow, own;
    for (float x : in[size_t(me)]) own.push_back(__float2bfloat16(x));
    for (size_t i = 0; i < count; i++) {
        int o = owner(i, count);
        sums.push_back(ring_sum(in, i, first(o)));
        narrow.push_back(ring_sum_bf16(in, i, first(o)));
        naive.push_back(ring_sum(in, i, 0));
        means.push_back(ring_mean(in, i, first(o)));
        reduced.push_back(ring_sum(in, i, first(0)));
        if (i < n) scattered.push_back(ring_sum(in, size_t(me) * n + i, first(me)));
    }
    Buffer<float> a(in[size_t(me)]), b(count), c(n), e(count);
    Buffer<bf16> d(own);
    for (int turn = 0; turn < 2; turn++) {
        ncclAllReduce(a.p, b.p, count, ncclFloat32, ncclSum, comm, nullptr);
        ncclReduceScatter(a.p, c.p, n, ncclFloat32, ncclSum, comm, nullptr);
        ncclReduce(a.p, e.p, count, ncclFloat32, ncclSum, 0, comm, nullptr);
        d.set(own);
        ncclAllReduce(d.p, d.p, count, ncclBfloat16, ncclSum, comm, nullptr);
        CHECK(same_bits(b.host(), sums));
        ncclAllReduce(a.p, b.p, count, ncclFloat32, ncclAvg, comm, nullptr);
        CHECK(same_bits(b.host(), means));
        CHECK(same_bits(c.host(), scattered));
        CHECK(same_bits(d.host(), narrow));
        if (me == 0) CHECK(same_bits(e.host(), reduced));
    }
    CHECK(same_bits(sums, naive) == (plain || ranks < 3));
    ncclCommDestroy(comm);
}

// ==== groups, sends and receives =================================================================

void groups() {
    init();
    cudaStream_t one = new_stream(), two = new_stream();
    size_t n = 1000;
    Buffer<float> a(values<float>(me, n)), b(n), c(values<float>(me, n)), d(n * size_t(ranks));
    Buffer<float> e(n), f(n);
    cudaDeviceSynchronize();
    ncclGroupStart();
    CHECK(ncclAllReduce(a.p, b.p, n, ncclFloat32, ncclSum, comm, one) == ncclSuccess);
    ncclGroupStart();
    CHECK(ncclAllGather(c.p, d.p, n, ncclFloat32, comm, two) == ncclSuccess);
    ncclGroupEnd();
    CHECK(cudaStreamQuery(one) == cudaSuccess);  // nothing is on it yet
    CHECK(ncclGroupEnd() == ncclSuccess);
    // Both streams wait for the whole group.
    add(e.p, d.p, 1, n, one);
    add(f.p, b.p, 1, n, two);
    cudaStreamSynchronize(one);
    for (size_t i = 0; i < n; i++) CHECK(e.host()[i] == value(0, i) + 1);
    cudaStreamSynchronize(two);
    for (size_t i = 0; i < n; i++) CHECK(f.host()[i] == expected(i, ncclSum) + 1);
    // Round the ring, to oneself as well, with messages of several sizes in order.
    int next = (me + 1) % ranks, before = (me + ranks - 1) % ranks;
    for (size_t count : {size_t(0), size_t(1), n}) {
        ncclGroupStart();
        CHECK(ncclSend(a.p, count, ncclFloat32, next, comm, one) == ncclSuccess);
        CHECK(ncclRecv(e.p, count, ncclFloat32, before, comm, one) == ncclSuccess);
        CHECK(ncclSend(c.p, 1, ncclFloat32, me, comm, one) == ncclSuccess);
        CHECK(ncclRecv(b.p, 1, ncclFloat32, me, comm, one) == ncclSuccess);
        CHECK(ncclGroupEnd() == ncclSuccess);
        cudaStreamSynchronize(one);
        std::vector<float> got = e.host();
        for (size_t i = 0; i < count; i++) CHECK(got[i] == value(before, i));
        CHECK(b.host()[0] == value(me, 0));
    }
    // One after the other, without a group.
    if (me == 0 && ranks > 1) {
        for (int k = 0; k < 3; k++) ncclSend(a.p + k, 5, ncclFloat32, 1, comm, one);
    } else if (me == 1) {
        for (int k = 0; k < 3; k++) ncclRecv(e.p + 5 * k, 5, ncclFloat32, 0, comm, one);
        cudaStreamSynchronize(one);
        for (size_t i = 0; i < 15; i++) CHECK(e.host()[i] == value(0, i / 5 + i % 5));
    }
    CHECK(ncclGroupEnd() == ncclInvalidUsage);
    ncclCommDestroy(comm);
}

// Another communicator of the same ranks, whose id travels by the first.
ncclComm_t second_comm(bool reversed = false) {
    Buffer<ncclUniqueId> id(1);
    ncclUniqueId other = {};
    if (me == 0) ncclGetUniqueId(&other);
    id.set({other});
    ncclBroadcast(id.p, id.p, sizeof(other), ncclInt8, 0, comm, nullptr);
    ncclComm_t second = nullptr;
    int rank = reversed ? ranks - 1 - me : me;
    CHECK(ncclCommInitRank(&second, ranks, id.host()[0], rank) == ncclSuccess);
    return second;
}

// More calls than a rank may be ahead, of several communicators.
void many() {
    init();
    ncclComm_t second = second_comm(true);
    int number = -1;
    CHECK(ncclCommUserRank(second, &number) == ncclSuccess && number == ranks - 1 - me);
    cudaStream_t stream = new_stream();
    Buffer<float> x(std::vector<float>{1, 1}), y(std::vector<float>{1});
    for (int i = 0; i < 1500; i++) {
        if (me == 1 && i == 0) std::this_thread::sleep_for(300ms);
        ncclAllReduce(x.p, x.p, 1, ncclFloat32, ncclMin, comm, stream);
        ncclAllReduce(x.p + 1, x.p + 1, 1, ncclFloat32, ncclMax, second, stream);
        add(x.p, x.p, 1, 2, stream);
        if (i % 5 == 0) ncclAllReduce(y.p, y.p, 0, ncclFloat32, ncclMax, comm, nullptr);
    }
    cudaStreamSynchronize(stream);
    for (float got : x.host()) CHECK(got == 1501);
    if (ranks > 1)
        for (int i = 0; i < 1500 && me < 2; i++) {
            if (me == 0) ncclSend(x.p, 1, ncclFloat32, 1, comm, stream);
            else ncclRecv(y.p, 1, ncclFloat32, 0, comm, stream);
        }
    cudaStreamSynchronize(stream);
    CHECK(me != 1 || y.host()[0] == 1501);
    CHECK(ncclCommDestroy(second) == ncclSuccess);
    ncclCommDestroy(comm);
}

// A communicator whose other ranks have not called yet does not hold up another, on another stream.
void apart() {
    init();
    ncclComm_t second = second_comm();
    cudaStream_t one = new_stream(), two = new_stream();
    Buffer<float> a(values<float>(me, 8)), b(values<float>(me, 8));
    cudaDeviceSynchronize();
    if (me == 0) ncclAllReduce(a.p, a.p, 8, ncclFloat32, ncclSum, comm, one);
    ncclAllReduce(b.p, b.p, 8, ncclFloat32, ncclSum, second, two);
    CHECK(cudaStreamSynchronize(two) == cudaSuccess);
    if (me == 0) raise_flag("over");
    else await_flag("over");
    if (me != 0) ncclAllReduce(a.p, a.p, 8, ncclFloat32, ncclSum, comm, one);
    CHECK(cudaStreamSynchronize(one) == cudaSuccess);
    for (size_t i = 0; i < 8; i++) CHECK(a.host()[i] == expected(i, ncclSum));
    CHECK(same_bits(a.host(), b.host()));
    ncclCommDestroy(second);
    ncclCommDestroy(comm);
}

// The calls of one communicator have their turns in the order of the calls: the second, on a stream
// of its own, waits while the first cannot begin on rank 0.
void in_turn() {
    init();
    ncclComm_t second = second_comm();
    cudaStream_t one = new_stream(), two = new_stream(), three = new_stream();
    Buffer<float> a(values<float>(me, 8)), b(values<float>(me, 8)), c(8);
    cudaDeviceSynchronize();
    if (me == 0) ncclAllReduce(c.p, c.p, 8, ncclFloat32, ncclSum, second, one);
    ncclBroadcast(a.p, a.p, 8, ncclFloat32, 0, comm, one);
    ncclAllReduce(b.p, b.p, 8, ncclFloat32, ncclSum, comm, two);
    raise_flag("called" + std::to_string(me));
    if (me == 0) {
        for (int r = 1; r < ranks; r++) await_flag("called" + std::to_string(r));
        for (int i = 0; i < 50; i++) {
            CHECK(cudaStreamQuery(two) == cudaErrorNotReady);
            std::this_thread::sleep_for(1ms);
        }
        raise_flag("seen");
    } else {
        await_flag("seen");
        ncclAllReduce(c.p, c.p, 8, ncclFloat32, ncclSum, second, three);
    }
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    CHECK(same_bits(a.host(), values<float>(0, 8)));
    for (size_t i = 0; i < 8; i++) CHECK(b.host()[i] == expected(i, ncclSum));
    ncclCommDestroy(second);
    ncclCommDestroy(comm);
}

// ==== streams ====================================================================================

// Rank 0's host runs on past all of it, kernels too, and tells the others only then to begin; then
// it does nothing at all, and its streams go on nevertheless.
void hosts_run_on() {
    init();
    cudaStream_t stream = new_stream();
    size_t n = 100;
    Buffer<float> a(values<float>(me, n)), b(n), c(n), d(n);
    float* result;
    cudaMallocHost(&result, n * sizeof(float));
    if (me != 0) await_flag("called");
    add(a.p, a.p, 1, n, stream);
    ncclAllReduce(a.p, b.p, n, ncclFloat32, ncclSum, comm, stream);
    add(b.p, b.p, float(me), n, stream);
    ncclAllReduce(b.p, c.p, n, ncclFloat32, ncclSum, comm, stream);
    cudaMemsetAsync(a.p, 0, n * sizeof(float), stream);
    add(d.p, c.p, 1, n, stream);
    cudaMemcpyAsync(result, d.p, n * sizeof(float), cudaMemcpyDeviceToHost, stream);
    if (me == 0) {
        for (int i = 0; i < 5; i++) CHECK(cudaStreamQuery(stream) == cudaErrorNotReady);
        raise_flag("called");
        for (int r = 1; r < ranks; r++) await_flag("done" + std::to_string(r));
    }
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
    CHECK(cudaStreamQuery(stream) == cudaSuccess);
    for (size_t i = 0; i < n; i++) {
        double sum = expected(i, ncclSum) + ranks;
        CHECK(result[i] == float(sum * ranks + ranks * (ranks - 1) / 2 + 1));
    }
    for (float x : a.host()) CHECK(x == 0);
    raise_flag("done" + std::to_string(me));
    cudaFreeHost(result);
    ncclCommDestroy(comm);
}

// Each kind of work that comes after a collective waits for it, with what it was given at the call.
void work_waits() {
    init();
    cudaStream_t stream = new_stream(), other = new_stream();
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    size_t n = 64, bytes = n * sizeof(float);
    Buffer<float> a(values<float>(me, n)), b(n), c(n);
    std::vector<float> pageable(n, 7);
    float* pinned;
    cudaMallocHost(&pinned, bytes);
    std::fill(pinned, pinned + n, 9.0f);
    if (me != 0) await_flag("called");
    ncclAllReduce(a.p, b.p, n, ncclFloat32, ncclSum, comm, stream);
    // The collective still reads a: what overwrites it comes later, whatever it is.
    cudaMemcpyAsync(a.p, pageable.data(), bytes / 2, cudaMemcpyHostToDevice, stream);
    pageable.assign(n, -1);
    cudaMemcpyAsync(a.p + n / 2, pinned, bytes / 2, cudaMemcpyHostToDevice, stream);
    cudaMemcpyAsync(c.p, b.p, bytes, cudaMemcpyDeviceToDevice, stream);
    cudaEventRecord(event, stream);
    cudaStreamWaitEvent(other, event, 0);
    add(c.p, c.p, 1, n, other);
    if (me == 0) {
        for (int i = 0; i < 3; i++) CHECK(cudaEventQuery(event) == cudaErrorNotReady);
        CHECK(cudaStreamQuery(other) == cudaErrorNotReady);
        raise_flag("called");
    }
    CHECK(cudaStreamSynchronize(other) == cudaSuccess);
    CHECK(cudaEventSynchronize(event) == cudaSuccess);
    std::vector<float> got = c.host(), now = a.host();
    for (size_t i = 0; i < n; i++) {
        CHECK(got[i] == expected(i, ncclSum) + 1);
        CHECK(now[i] == (i < n / 2 ? 7 : 9));
    }
    // A synchronous copy waits itself, and so does the end of the memory.
    if (me == 0) std::this_thread::sleep_for(30ms);
    ncclAllReduce(b.p, b.p, n, ncclFloat32, ncclSum, comm, nullptr);
    cudaMemcpy(pageable.data(), b.p, bytes, cudaMemcpyDeviceToHost);
    for (size_t i = 0; i < n; i++) CHECK(pageable[i] == expected(i, ncclSum) * ranks);
    cudaFreeHost(pinned);
    cudaEventDestroy(event);
    ncclCommDestroy(comm);
}

// Whoever has not waited sees no numbers; nor does the memory of a result change under its reader.
void results_are_late() {
    init();
    cudaStream_t stream = new_stream(), other = new_stream();
    Buffer<float> a(values<float>(me, 32)), b(std::vector<float>(32, 5)), c(32);
    ncclAllReduce(a.p, b.p, 32, ncclFloat32, ncclSum, comm, stream);
    std::this_thread::sleep_for(50ms);  // by now it is over
    emu::launch("peek", hidden_copy_kernel, 1u, 32u, 0, other, Hidden{c.p, b.p});
    cudaStreamSynchronize(other);
    for (float x : c.host()) CHECK(std::isnan(x));
    cudaStreamSynchronize(stream);
    for (size_t i = 0; i < 32; i++) CHECK(b.host()[i] == expected(i, ncclSum));
    ncclCommDestroy(comm);
}

void unordered_kernel() {
    init();
    cudaStream_t stream = new_stream(), other = new_stream();
    Buffer<float> a(32), b(32);
    cudaDeviceSynchronize();
    ncclAllReduce(a.p, b.p, 32, ncclFloat32, ncclSum, comm, stream);
    add(b.p, b.p, 1, 32, other);
}
void unordered_collective() {
    init();
    cudaStream_t stream = new_stream(), other = new_stream();
    Buffer<float> a(32), b(32);
    cudaDeviceSynchronize();
    add(a.p, a.p, 1, 32, other);
    ncclAllReduce(a.p, b.p, 32, ncclFloat32, ncclSum, comm, stream);
}

// ==== communicators that do not block ============================================================

ncclResult_t poll(ncclComm_t c) {
    ncclResult_t state = ncclInProgress;
    while (state == ncclInProgress) {
        CHECK(ncclCommGetAsyncError(c, &state) == ncclSuccess);
        if (state == ncclInProgress) std::this_thread::sleep_for(1ms);
    }
    return state;
}

void nonblocking() {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    Buffer<float> a(values<float>(me, 8));
    ncclUniqueId unused;
    if (me == 0)
        CHECK(ncclCommInitRankConfig(&comm, ranks, unique_id, me, &config) == ncclInProgress);
    if (me == 0) ncclGetUniqueId(&unused);  // leaves the file of the one that is being made alone
    if (me == 0) raise_flag("begun");
    else await_flag("begun");
    if (me != 0)
        CHECK(ncclCommInitRankConfig(&comm, ranks, unique_id, me, &config) == ncclInProgress);
    CHECK(ncclAllReduce(a.p, a.p, 8, ncclFloat32, ncclSum, comm, nullptr) == ncclInvalidArgument);
    CHECK(poll(comm) == ncclSuccess);
    CHECK(ncclAllReduce(a.p, a.p, 8, ncclFloat32, ncclSum, comm, nullptr) == ncclInProgress);
    CHECK(ncclAllReduce(a.p, a.p, 8, ncclFloat32, ncclSum, comm, nullptr) == ncclInvalidArgument);
    CHECK(poll(comm) == ncclSuccess);
    cudaStreamSynchronize(nullptr);
    for (size_t i = 0; i < 8; i++) CHECK(a.host()[i] == expected(i, ncclSum));
    CHECK(ncclCommFinalize(comm) == ncclInProgress);
    CHECK(poll(comm) == ncclSuccess);
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
}

void arguments() {
    init();
    int x = -1;
    CHECK(ncclGetVersion(&x) == ncclSuccess && x == NCCL_VERSION_CODE);
    CHECK(ncclCommCount(comm, &x) == ncclSuccess && x == ranks);
    CHECK(ncclCommUserRank(comm, &x) == ncclSuccess && x == me);
    CHECK(ncclCommCuDevice(comm, &x) == ncclSuccess && x == 0);
    Buffer<float> a(8);
    cudaStream_t gone = new_stream();
    cudaStreamDestroy(gone);
    auto reduce = [&](void* p, ncclDataType_t type, ncclRedOp_t op, ncclComm_t c, cudaStream_t s) {
        return ncclAllReduce(p, p, 8, type, op, c, s);
    };
    CHECK(reduce(a.p, ncclFloat8e4m3, ncclSum, comm, nullptr) == ncclInvalidArgument);
    CHECK(reduce(a.p, ncclFloat32, ncclNumOps, comm, nullptr) == ncclInvalidArgument);
    CHECK(reduce(a.p, ncclFloat32, ncclSum, nullptr, nullptr) == ncclInvalidArgument);
    CHECK(reduce(nullptr, ncclFloat32, ncclSum, comm, nullptr) == ncclInvalidArgument);
    CHECK(reduce(a.p, ncclFloat32, ncclSum, comm, gone) == ncclInvalidArgument);
    CHECK(ncclBroadcast(a.p, a.p, 8, ncclFloat32, ranks, comm, nullptr) == ncclInvalidArgument);
    CHECK(strstr(ncclGetLastError(comm), "ncclBroadcast refuses a root") != nullptr);
    CHECK(strcmp(ncclGetErrorString(ncclInvalidUsage), "") != 0);
    ncclGroupStart();
    CHECK(reduce(a.p, ncclFloat32, ncclNumOps, comm, nullptr) == ncclInvalidArgument);
    CHECK(reduce(a.p, ncclFloat32, ncclSum, comm, nullptr) == ncclSuccess);
    CHECK(ncclGroupEnd() == ncclInvalidArgument);  // and nothing was enqueued
    CHECK(cudaStreamQuery(nullptr) == cudaSuccess);
    ncclComm_t other;
    ncclUniqueId wrong = {};
    CHECK(ncclCommInitRank(&other, 2, wrong, 0) == ncclInvalidArgument);
    CHECK(ncclCommInitRank(&other, 2, unique_id, 2) == ncclInvalidArgument);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.magic = 0;
    CHECK(ncclCommInitRankConfig(&other, 1, unique_id, 0, &config) == ncclInvalidArgument);
    setenv("EMU_NCCL_DIR", "/nowhere", 1);
    CHECK(ncclCommInitRank(&other, 1, unique_id, 0) == ncclSystemError);
    CHECK(ncclCommDestroy(comm) == ncclSuccess);
    CHECK(ncclCommDestroy(comm) == ncclInvalidArgument);
}

// ==== wrong use ==================================================================================

// What TEST_NCCL_WRONG names, on rank 1 or on all.
void wrong_use() {
    std::string wrong = getenv("TEST_NCCL_WRONG");
    bool odd = me == 1;
    if (wrong == "size") ranks += odd;
    if (wrong == "twice") me = 0;
    if (wrong == "missing" && odd) return;
    if (wrong == "order_variable" && odd) setenv("EMU_NCCL_ORDER", "plain", 1);
    init();
    Buffer<float> a(64), b(64);
    int other = 1 - me;
    size_t n = wrong == "count" && odd ? 5 : 4;
    ncclDataType_t type = wrong == "type" && odd ? ncclInt32 : ncclFloat32;
    ncclRedOp_t op = wrong == "op" && odd ? ncclMax : ncclSum;
    if (wrong == "kind" && odd) ncclAllGather(a.p, b.p, n, type, comm, nullptr);
    else if (wrong == "root") ncclReduce(a.p, b.p, n, type, op, me, comm, nullptr);
    else if (wrong == "pair" && odd) ncclSend(a.p, 3, type, other, comm, nullptr);
    else if (wrong == "pair") ncclRecv(b.p, 4, type, other, comm, nullptr);
    else if (wrong == "host") ncclAllReduce(&n, b.p, 1, type, op, comm, nullptr);
    else if (wrong == "bounds") ncclAllGather(a.p, b.p, 33, type, comm, nullptr);
    else if (wrong == "overlap") ncclAllReduce(a.p, a.p + 4, 8, type, op, comm, nullptr);
    else if (wrong == "not_in_place") ncclReduceScatter(a.p, a.p + 1, 8, type, op, comm, nullptr);
    else if (wrong == "left" && odd) ncclCommDestroy(comm);
    else if (wrong == "zero") ncclAllReduce(a.p, b.p, odd ? 1 : 0, type, op, comm, nullptr);
    else if (wrong == "group") {
        if (odd) ncclGroupStart();
        ncclAllReduce(a.p, a.p, n, type, op, comm, nullptr);
        ncclAllReduce(b.p, b.p, n, type, op, comm, nullptr);
        if (odd) ncclGroupEnd();
    } else if (wrong == "open") {
        ncclGroupStart();
        odd ? ncclCommAbort(comm) : ncclCommDestroy(comm);
    } else ncclAllReduce(a.p, b.p, n, type, op, comm, nullptr);
    if (wrong == "zero" && !odd) ncclAllReduce(a.p, b.p, 1, type, op, comm, nullptr);
    cudaStreamSynchronize(nullptr);
}

// ==== faults =====================================================================================

// Polls as a trainer does. An error is followed by ncclCommAbort, after which the stream is free.
void faults() {
    init();
    cudaStream_t stream = new_stream();
    Buffer<float> a(std::vector<float>(16, 1));
    bool expects_nothing = getenv("TEST_NCCL_IMPATIENT") != nullptr;
    std::chrono::milliseconds patience = expects_nothing ? 1500ms : 30000ms;
    for (int step = 0; step < 5; step++) {
        ncclAllReduce(a.p, a.p, 16, ncclFloat32, ncclSum, comm, stream);
        add(a.p, a.p, 1, 16, stream);
        auto deadline = std::chrono::steady_clock::now() + patience;
        ncclResult_t error = ncclSuccess;
        while (cudaStreamQuery(stream) == cudaErrorNotReady) {
            CHECK(ncclCommGetAsyncError(comm, &error) == ncclSuccess);
            bool late = std::chrono::steady_clock::now() > deadline;
            if (error == ncclSuccess && !late) continue;
            CHECK(cudaStreamQuery(stream) == cudaErrorNotReady);
            if (!late) CHECK(ncclAllReduce(a.p, a.p, 1, ncclInt8, ncclSum, comm, stream) == error);
            fprintf(stderr, "rank %d: step %d: %s\n", me, step,
                    late ? "nothing happens" : ncclGetErrorString(error));
            fprintf(stderr, "rank %d: %s\n", me, ncclGetLastError(comm));
            CHECK(ncclCommAbort(comm) == ncclSuccess);
            CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
            CHECK(std::isnan(a.host()[0]));
            exit(failures > 0 ? 1 : 7);
        }
    }
    ncclCommDestroy(comm);
}

// A watchdog ends the wait of the main thread.
void watchdog() {
    init();
    Buffer<float> a(16);
    if (me == 1) {
        await_flag("aborted");
        exit(0);
    }
    std::thread dog([] {
        std::this_thread::sleep_for(100ms);
        CHECK(ncclCommAbort(comm) == ncclSuccess);
    });
    ncclAllReduce(a.p, a.p, 16, ncclFloat32, ncclSum, comm, nullptr);
    CHECK(cudaStreamSynchronize(nullptr) == cudaSuccess);
    dog.join();
    raise_flag("aborted");
}

// What would wait for ever is said instead.
void destroys_after_error() {
    init();
    Buffer<float> a(16);
    if (me == 1) _exit(0);
    ncclAllReduce(a.p, a.p, 16, ncclFloat32, ncclSum, comm, nullptr);
    ncclCommDestroy(comm);
}

// One rank aborts, and the others learn of it.
void abort_is_seen() {
    init();
    Buffer<float> a(16);
    if (me == 1) exit(ncclCommAbort(comm) == ncclSuccess ? 0 : 1);
    ncclAllReduce(a.p, a.p, 16, ncclFloat32, ncclSum, comm, nullptr);
    ncclResult_t error = ncclSuccess;
    while (error == ncclSuccess) ncclCommGetAsyncError(comm, &error);
    CHECK(error == ncclRemoteError);
    CHECK(ncclCommAbort(comm) == ncclSuccess);
}

// A rank that ends when it has done its part is missed by nobody.
void ends_early() {
    init();
    Buffer<float> a(values<float>(me, 16));
    ncclAllReduce(a.p, a.p, 16, ncclFloat32, ncclSum, comm, nullptr);
    if (me == 1) {
        cudaStreamSynchronize(nullptr);
        _exit(0);
    }
    std::this_thread::sleep_for(100ms);
    cudaStreamSynchronize(nullptr);
    ncclResult_t error = ncclSuccess;
    CHECK(ncclCommGetAsyncError(comm, &error) == ncclSuccess && error == ncclSuccess);
    CHECK(a.host()[1] == expected(1, ncclSum));
    ncclCommDestroy(comm);
}

const std::map<std::string, void (*)()> kScenarios = {
    {"everything", everything},
    {"integers", integers},
    {"order", order},
    {"groups", groups},
    {"many", many},
    {"apart", apart},
    {"in_turn", in_turn},
    {"hosts_run_on", hosts_run_on},
    {"work_waits", work_waits},
    {"results_are_late", results_are_late},
    {"unordered_kernel", unordered_kernel},
    {"unordered_collective", unordered_collective},
    {"nonblocking", nonblocking},
    {"arguments", arguments},
    {"wrong_use", wrong_use},
    {"faults", faults},
    {"watchdog", watchdog},
    {"destroys_after_error", destroys_after_error},
    {"abort_is_seen", abort_is_seen},
    {"ends_early", ends_early},
};

// ==== the tests: starting ranks, and what they said ==============================================

struct Ended {
    int status = 0;  // as waitpid gives it
    std::string said;
    bool exited(int code) const { return WIFEXITED(status) && WEXITSTATUS(status) == code; }
    bool died() const { return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT; }
    bool killed() const { return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL; }
};

class Nccl : public testing::Test {
  protected:
    Nccl() {
        char name[] = "/dev/shm/test_nccl_XXXXXX";
        char other[] = "/tmp/test_nccl_XXXXXX";
        shared_ = mkdtemp(name);
        flags_ = mkdtemp(other);
        setenv("EMU_NCCL_DIR", shared_.c_str(), 1);
        setenv("TEST_NCCL_DIR", flags_.c_str(), 1);
    }
    ~Nccl() {
        EXPECT_EQ(rmdir(shared_.c_str()), 0) << "something is left in " << shared_;
        for (const std::string& name : entries(flags_)) unlink((flags_ + "/" + name).c_str());
        rmdir(flags_.c_str());
        for (const auto& [name, value] : variables_) unsetenv(name.c_str());
        unsetenv("EMU_NCCL_DIR");
        unsetenv("TEST_NCCL_DIR");
    }

    static std::vector<std::string> entries(const std::string& folder) {
        std::vector<std::string> names;
        DIR* all = opendir(folder.c_str());
        while (dirent* entry = readdir(all))
            if (entry->d_name[0] != '.') names.push_back(entry->d_name);
        closedir(all);
        return names;
    }

    void set(const std::string& name, const std::string& value) {
        setenv(name.c_str(), value.c_str(), 1);
        variables_[name] = value;
    }

    static std::string hex(const ncclUniqueId& id) {
        std::string text;
        for (char c : id.internal) {
            char two[3];
            snprintf(two, sizeof(two), "%02x", static_cast<unsigned char>(c));
            text += two;
        }
        return text;
    }

    pid_t start(const std::string& scenario, int rank, int count, const ncclUniqueId& id) {
        std::string words[] = {"test_emu",           "--nccl-rank",         scenario,
                               std::to_string(rank), std::to_string(count), hex(id)};
        std::vector<char*> argv;
        for (std::string& word : words) argv.push_back(word.data());
        argv.push_back(nullptr);
        std::string log = flags_ + "/said" + std::to_string(rank);
        posix_spawn_file_actions_t actions;
        posix_spawn_file_actions_init(&actions);
        for (int file : {1, 2})
            posix_spawn_file_actions_addopen(&actions, file, log.c_str(),
                                             O_WRONLY | O_CREAT | O_APPEND, 0600);
        pid_t pid = -1;
        EXPECT_EQ(posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv.data(), environ), 0);
        posix_spawn_file_actions_destroy(&actions);
        return pid;
    }

    // Kills what is left once all others have ended (a rank that stops), or after a minute or two.
    std::vector<Ended> finish(const std::vector<pid_t>& pids, size_t stopped) {
        std::vector<Ended> ended(pids.size());
        std::vector<bool> done(pids.size(), false);
        size_t left = pids.size();
        auto deadline = std::chrono::steady_clock::now() + 60s;
        while (left > 0) {
            bool over = left <= stopped || std::chrono::steady_clock::now() > deadline;
            for (size_t r = 0; r < pids.size(); r++) {
                if (done[r]) continue;
                if (over) kill(pids[r], SIGKILL);
                if (waitpid(pids[r], &ended[r].status, over ? 0 : WNOHANG) == 0) continue;
                done[r] = true;
                left--;
            }
            std::this_thread::sleep_for(2ms);
        }
        EXPECT_LT(std::chrono::steady_clock::now(), deadline) << "a rank hangs";
        for (size_t r = 0; r < pids.size(); r++) {
            std::ifstream file(flags_ + "/said" + std::to_string(r));
            std::stringstream text;
            text << file.rdbuf();
            ended[r].said = text.str();
        }
        return ended;
    }

    std::vector<Ended> run(const std::string& scenario, int count, size_t stopped = 0) {
        ncclUniqueId id;
        EXPECT_EQ(ncclGetUniqueId(&id), ncclSuccess);
        for (const std::string& name : entries(flags_)) unlink((flags_ + "/" + name).c_str());
        std::vector<pid_t> pids;
        for (int r = 0; r < count; r++) pids.push_back(start(scenario, r, count, id));
        std::vector<Ended> ended = finish(pids, stopped);
        EXPECT_TRUE(entries(shared_).empty());
        return ended;
    }

    void expect_fine(const std::string& scenario, int count) {
        SCOPED_TRACE(scenario + " of " + std::to_string(count));
        std::vector<Ended> ended = run(scenario, count);
        for (const Ended& rank : ended)
            EXPECT_TRUE(rank.exited(0)) << rank.status << ": " << rank.said;
    }

    std::string shared_, flags_;
    std::map<std::string, std::string> variables_;
};

#define EXPECT_SAYS(rank, text) \
    EXPECT_NE((rank).said.find(text), std::string::npos) << (rank).status << ": " << (rank).said

TEST_F(Nccl, EveryCollectiveTypeAndOperation) {
    for (int count : {1, 2, 3, 4}) expect_fine("everything", count);
}

TEST_F(Nccl, IntegersKeepAllTheirBits) {
    for (int count : {1, 3}) expect_fine("integers", count);
}

TEST_F(Nccl, SumsGoRoundTheRing) {
    for (int count : {1, 2, 3, 4}) expect_fine("order", count);
    set("EMU_NCCL_ORDER", "plain");
    for (int count : {2, 3}) expect_fine("order", count);
}

TEST_F(Nccl, GroupsSendsAndReceives) {
    for (int count : {1, 2, 3}) expect_fine("groups", count);
}

TEST_F(Nccl, ManyCallsOfSeveralCommunicators) {
    for (int count : {1, 2, 3}) expect_fine("many", count);
}

TEST_F(Nccl, StreamsGoOnApart) {
    for (int count : {2, 3}) expect_fine("apart", count);
    for (int count : {2, 3}) expect_fine("in_turn", count);
}

TEST_F(Nccl, HostsRunOn) {
    for (int count : {2, 3}) expect_fine("hosts_run_on", count);
}

TEST_F(Nccl, WorkWaitsForACollective) {
    for (int count : {2, 4}) expect_fine("work_waits", count);
}

TEST_F(Nccl, ResultsAreLate) { expect_fine("results_are_late", 2); }

TEST_F(Nccl, StreamsThatDoNotWaitAreStopped) {
    for (const Ended& rank : run("unordered_kernel", 2)) {
        EXPECT_TRUE(rank.died());
        EXPECT_SAYS(rank, "which writes memory that ncclAllReduce on stream 1 still writes");
    }
    for (const Ended& rank : run("unordered_collective", 2)) {
        EXPECT_TRUE(rank.died());
        EXPECT_SAYS(rank,
                    "puts ncclAllReduce on stream 1, which reads memory that kernel add on "
                    "stream 2 still writes");
    }
}

TEST_F(Nccl, WithoutBlocking) {
    for (int count : {1, 3}) expect_fine("nonblocking", count);
}

TEST_F(Nccl, ArgumentsAreChecked) { expect_fine("arguments", 2); }

struct Wrong {
    const char* name;
    bool dies;  // else it gives an error
    const char* says[2];
};
const Wrong kWrong[] = {
    {"count",
     true,
     {"ncclAllReduce of 4 float32, sum, where rank 1 calls ncclAllReduce of 5",
      "on rank 1 as collective 1 ncclAllReduce of 5 float32, sum, where rank 0"}},
    {"type", true, {"where rank 1 calls ncclAllReduce of 4 int32", "where rank 0 calls"}},
    {"op", true, {"where rank 1 calls ncclAllReduce of 4 float32, max", "where rank 0 calls"}},
    {"root",
     true,
     {"root 0, where rank 1 calls ncclReduce of 4 float32, sum, root 1",
      "root 1, where rank 0 calls ncclReduce of 4 float32, sum, root 0"}},
    {"kind", true, {"where rank 1 calls ncclAllGather of 4", "where rank 0 calls ncclAllReduce"}},
    {"zero", true, {"ncclAllReduce of 0 float32, sum, where rank 1 calls ncclAllReduce of 1", ""}},
    {"group",
     true,
     {"where rank 1 calls ncclAllReduce of 4 float32, sum, 1 of a group of 2",
      "where rank 0 calls ncclAllReduce of 4 float32, sum"}},
    {"open",
     true,
     {"calls ncclCommDestroy inside of a group", "calls ncclCommAbort inside of a group"}},
    {"pair",
     true,
     {"ncclRecv of 4 float32, where rank 1 calls ncclSend of 3 float32",
      "ncclSend of 3 float32, where rank 0 calls ncclRecv of 4 float32"}},
    {"left", true, {"for rank 1, which has destroyed its communicator", ""}},
    {"host", true, {"gives ncclAllReduce a send buffer at", "which is no device memory"}},
    {"bounds", true, {"a receive buffer of 264 bytes at byte 0 of an allocation of 256", "of 264"}},
    {"overlap", true, {"buffers that overlap and are not in place", "overlap"}},
    {"not_in_place", true, {"overlap and are not in place", "overlap and are not in place"}},
    {"size", false, {"ranks on rank", "ranks on rank"}},
    {"twice", false, {"refuses rank 0 twice: processes", "refuses rank 0 twice: processes"}},
    {"order_variable", false, {"another EMU_NCCL_ORDER", "another EMU_NCCL_ORDER"}},
};

TEST_F(Nccl, WrongUseNamesBothSides) {
    for (const Wrong& wrong : kWrong) {
        SCOPED_TRACE(wrong.name);
        set("TEST_NCCL_WRONG", wrong.name);
        std::vector<Ended> ended = run("wrong_use", 2);
        for (size_t r = 0; r < 2; r++) {
            bool unaware = *wrong.says[r] == '\0';  // this side may end in another way
            EXPECT_TRUE(unaware || (wrong.dies ? ended[r].died() : ended[r].exited(3)))
                << ended[r].status << ended[r].said;
            EXPECT_SAYS(ended[r], wrong.says[r]);
        }
    }
}

TEST_F(Nccl, RanksThatAreMissingAreNamed) {
    set("EMU_NCCL_TIMEOUT", "3");
    set("TEST_NCCL_WRONG", "missing");
    std::vector<Ended> ended = run("wrong_use", 3);
    for (size_t r : {0, 2}) {
        EXPECT_TRUE(ended[r].exited(3));
        EXPECT_SAYS(ended[r], "refuses ranks that are missing after 3 s: 1 of 3");
    }
}

TEST_F(Nccl, OneCardForTwoRanksCanBeRefused) {
    set("EMU_NCCL_DUPLICATE", "refuse");
    set("TEST_NCCL_WRONG", "nothing");
    for (const Ended& rank : run("wrong_use", 2)) {
        EXPECT_TRUE(rank.exited(3));
        EXPECT_SAYS(rank, "Duplicate GPU detected: rank 0 and rank 1 both on CUDA device 0");
    }
}

TEST_F(Nccl, ARankThatDiesIsReported) {
    set("EMU_NCCL_FAULT", "1:3:die");
    std::vector<Ended> ended = run("faults", 3);
    EXPECT_TRUE(ended[1].killed());
    for (size_t r : {0, 2}) {
        EXPECT_TRUE(ended[r].exited(7)) << ended[r].status << ended[r].said;
        EXPECT_SAYS(ended[r], "step 2: remote process exited");
    }
    EXPECT_TRUE((ended[0].said + ended[2].said).find("for rank 1 (process ") != std::string::npos);
}

TEST_F(Nccl, ARankThatDiesBeforeAllHaveMetIsReported) {
    set("EMU_NCCL_FAULT", "1:0:die");
    set("EMU_NCCL_TIMEOUT", "10");  // for a rank that begins when both others have ended already
    std::vector<Ended> ended = run("faults", 3);
    EXPECT_TRUE(ended[1].killed());
    for (size_t r : {0, 2}) EXPECT_TRUE(ended[r].exited(3)) << ended[r].status << ended[r].said;
    EXPECT_TRUE((ended[0].said + ended[2].said).find("which has ended before all ranks met") !=
                std::string::npos);
}

TEST_F(Nccl, ARankThatStopsIsReportedByNobody) {
    set("TEST_NCCL_IMPATIENT", "1");
    for (const char* fault : {"1:2:stop", "1:2:hang"}) {
        set("EMU_NCCL_FAULT", fault);
        bool stops = std::string(fault) == "1:2:stop";
        std::vector<Ended> ended = run("faults", 3, stops ? 1 : 0);
        EXPECT_TRUE(stops ? ended[1].killed() : ended[1].exited(7));
        // Others may learn first that one of them has given up.
        std::string said = ended[0].said + ended[1].said + ended[2].said;
        EXPECT_NE(said.find("step 1: nothing happens"), std::string::npos) << said;
        for (size_t r : {0, 2}) EXPECT_TRUE(ended[r].exited(7)) << ended[r].said;
    }
}

TEST_F(Nccl, AnErrorThatWasAskedForIsSeenByAll) {
    set("EMU_NCCL_FAULT", "0:9:die,1:4:error");
    std::vector<Ended> ended = run("faults", 3);
    for (const Ended& rank : ended) EXPECT_TRUE(rank.exited(7)) << rank.status << rank.said;
    EXPECT_SAYS(ended[1], "step 3: unhandled system error");
    EXPECT_SAYS(ended[0], "step 3: remote process exited");
    EXPECT_SAYS(ended[2], "step 3: remote process exited");
}

TEST_F(Nccl, ADeathCanGoUnnoticed) {
    set("EMU_NCCL_DETECT", "0");
    set("TEST_NCCL_IMPATIENT", "1");
    set("EMU_NCCL_FAULT", "1:3:die");
    std::vector<Ended> ended = run("faults", 2);
    EXPECT_TRUE(ended[0].exited(7));
    EXPECT_SAYS(ended[0], "step 2: nothing happens");
}

TEST_F(Nccl, AbortEndsTheWaitOfAnotherThread) { expect_fine("watchdog", 2); }

TEST_F(Nccl, AbortIsSeenByTheOthers) { expect_fine("abort_is_seen", 3); }

TEST_F(Nccl, ARankThatHasDoneItsPartMayEnd) { expect_fine("ends_early", 3); }

TEST_F(Nccl, OnlyAbortEndsAFailedCommunicator) {
    std::vector<Ended> ended = run("destroys_after_error", 2);
    EXPECT_TRUE(ended[0].died());
    EXPECT_SAYS(ended[0], "whose communicator has failed, while its collectives wait");
}

// Killed while it waits for the others, the only rank leaves its file; the next id removes it.
TEST_F(Nccl, LeftoversAreRemoved) {
    ncclUniqueId id, next;
    ncclGetUniqueId(&id);
    pid_t pid = start("faults", 0, 2, id);
    for (int i = 0; i < 5000 && entries(shared_).empty(); i++) std::this_thread::sleep_for(1ms);
    std::this_thread::sleep_for(50ms);
    ncclGetUniqueId(&next);
    EXPECT_EQ(entries(shared_).size(), 1u) << "it is in use";
    EXPECT_TRUE(strcmp(id.internal, next.internal) != 0 || memcmp(&id, &next, sizeof(id)) != 0);
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    EXPECT_EQ(entries(shared_).size(), 1u);
    ncclGetUniqueId(&next);
    EXPECT_TRUE(entries(shared_).empty());
}

}  // namespace

// --nccl-rank SCENARIO RANK RANKS ID
int nccl_rank(int argc, char** argv) {
    auto found = argc == 6 ? kScenarios.find(argv[2]) : kScenarios.end();
    if (found == kScenarios.end()) return 2;
    me = atoi(argv[3]);
    ranks = atoi(argv[4]);
    for (size_t i = 0; i < sizeof(unique_id); i++) {
        unsigned byte = 0;
        sscanf(argv[5] + 2 * i, "%2x", &byte);
        unique_id.internal[i] = char(byte);
    }
    found->second();
    return failures > 0 ? 1 : 0;
}
