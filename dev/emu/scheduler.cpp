// Runs the blocks of a grid one after another, and the threads of a block as fibers that switch
// only where a thread has to wait: at a block barrier or in a warp collective. The last thread to
// arrive computes the result for all and runs on, so that a barrier costs one switch a thread.
//
// Which threads can run is kept as one bit mask a warp. When none can and some have not exited,
// nothing will ever release them: the program ends and says who waits where.
//
// Under the thread sanitizer (EMU_TSAN) each CUDA thread is a fiber that it knows, barriers are
// release and acquire, and this file is compiled without instrumentation: to the sanitizer, what
// the scheduler itself reads and writes does not exist. Two pools of fibers take the blocks in
// turn, so that what two neighbouring blocks touch without atomics is a race too.

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "emu.h"
#include "internal.h"

#ifdef EMU_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emu {

const uint3* thread_index;
uint3 block_index;
dim3 block_size, grid_size;

namespace {

// ==== the thread sanitizer =======================================================================

#ifdef EMU_TSAN
constexpr int kPools = 2;
void sanitizer_release(void* key) { __tsan_release(key); }
void sanitizer_acquire(void* key) { __tsan_acquire(key); }
void sanitizer_switch(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }  // 1: orders nothing
void* sanitizer_fiber() { return __tsan_create_fiber(0); }
void* sanitizer_current() { return __tsan_get_current_fiber(); }
#else
constexpr int kPools = 1;
void sanitizer_release(void*) {}
void sanitizer_acquire(void*) {}
void sanitizer_switch(void*) {}
void* sanitizer_fiber() { return nullptr; }
void* sanitizer_current() { return nullptr; }
#endif

// ==== switching stacks ===========================================================================

#ifdef __x86_64__
// Saves what the System V ABI asks a function to preserve, and continues where `load` stopped.
using Context = void*;
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch,.-emu_switch
)");

void switch_context(Context* from, Context* to) { emu_switch(from, *to); }

// A context that begins with entry() on the stack that ends at `top`: six registers, the address
// that emu_switch returns to, and a return address for entry itself, which never returns.
void make_context(Context* context, char* /*stack*/, char* top, void (*entry)()) {
    void** at = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
    *--at = nullptr;
    *--at = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--at = nullptr;
    *context = at;
}
#else
}  // namespace
}  // namespace emu
#    include <ucontext.h>
namespace emu {
namespace {
using Context = ucontext_t;
void switch_context(Context* from, Context* to) { swapcontext(from, to); }
void make_context(Context* context, char* stack, char* top, void (*entry)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = size_t(top - stack);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}
#endif

// ==== state ======================================================================================

constexpr size_t kStackBytes = 256 << 10;  // address space; only what is touched takes memory
constexpr size_t kGuardBytes = 64 << 10;   // below it, without access; a multiple of any page
constexpr int kMaxThreads = 1024, kMaxWarps = kMaxThreads / 32;
constexpr int kMeetings = 64;

struct Copy {
    AsyncCopy copy;
    uint32_t group;
};

constexpr int kMostProducts = 16;

struct Thread {
    uint3 index;
    uint32_t lane, warp;
    // What it waits for, where, and what it brings to and takes from a collective.
    Collective kind;
    uint32_t mask;
    Site site;
    uint64_t value;
    int argument, width;
    char* meeting;  // the sanitizer's key of this meeting of a warp barrier
    // Copies issued and not yet landed, oldest first; the number of groups committed.
    Copy* copies;
    int copy_count, copy_capacity;
    uint32_t groups;
    // Products of its warpgroup that it has not waited for, oldest first, and the sums that they
    // add to, which have no value until then.
    WarpgroupProduct products[kMostProducts];
    float sums_before[kMostProducts][32];
    int product_count, products_done;
    bool fenced;  // since it last waited

    Context context;
    void* fiber;
    char* stack;
};

struct Warp {
    uint32_t exists, ready, at_barrier, in_collective;  // a bit a lane; none of them: exited
    uint32_t meetings;                                  // begun so far
};

// The threads that take every kPools-th block, and the keys of their barriers: kept apart, as what
// one pool releases must not reach the other within a grid.
struct Pool {
    Thread threads[kMaxThreads];
    int created = 0;    // threads that have a stack
    uint32_t turn = 0;  // blocks begun
    char end[2], barrier[2], meeting[kMaxWarps][kMeetings];
    unsigned char* shared = nullptr;  // mapped, as large as the largest block so far asked for
    size_t shared_capacity = 0;
};

Pool pools[kPools];
Warp warps[kMaxWarps];
Context host_context;
void* host_fiber;
char grid_start, grid_end, fence_key;

const Launch* launched;  // null while the host runs
Pool* pool;
Thread* running;
Order order;
uint64_t random_state;
uint32_t thread_count, warp_count, cursor, alive, arrived;
uint64_t barriers;
Site barrier_site;

// xorshift64* [Vigna 2016, arXiv:1402.6246]: below `limit`.
uint32_t random_below(uint32_t limit) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return uint32_t((random_state * 0x2545f4914f6cdd1dull >> 32) * limit >> 32);
}

// ==== reports ====================================================================================

const char* name_of(Collective kind) {
    static const char* const kNames[] = {
        "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",
        "__shfl_xor_sync",   "__ballot_sync",     "__any_sync",        "__all_sync",
        "__reduce_add_sync", "__reduce_max_sync", "__reduce_max_sync", "mma_bf16",
        "ldmatrix"};
    return kNames[int(kind)];
}

// What thread i does, as the end of a sentence.
void describe_thread(uint32_t i, char* text, size_t size) {
    const Thread& thread = pool->threads[i];
    const Warp& warp = warps[thread.warp];
    uint32_t bit = 1u << thread.lane;
    if (warp.ready & bit) snprintf(text, size, "can run");
    else if (warp.at_barrier & bit)
        snprintf(text, size, "at __syncthreads, %s:%d", thread.site.file, thread.site.line);
    else if (warp.in_collective & bit)
        snprintf(text, size, "in %s of lanes %08x, %s:%d", name_of(thread.kind), thread.mask,
                 thread.site.file, thread.site.line);
    else snprintf(text, size, "exited");
}

// Who waits where, one line for each run of threads that do the same.
void report_threads() {
    char text[256], next[256];
    int lines = 0;
    for (uint32_t from = 0, to; from < thread_count && lines < 12; from = to, lines++) {
        describe_thread(from, text, sizeof(text));
        for (to = from + 1; to < thread_count; to++) {
            describe_thread(to, next, sizeof(next));
            if (strcmp(text, next) != 0) break;
        }
        if (to - from == 1) fprintf(stderr, "  thread %u: %s\n", from, text);
        else fprintf(stderr, "  threads %u to %u: %s\n", from, to - 1, text);
    }
    if (lines == 12) fprintf(stderr, "  ...\n");
}

[[noreturn]] void vdie(const char* pattern, va_list args) {
    char who[256];
    fflush(stdout);
    bool in_kernel = describe_running_thread(who, sizeof(who));
    fprintf(stderr, "emu: %s ", in_kernel ? who : "the host");
    vfprintf(stderr, pattern, args);
    fputc('\n', stderr);
    if (in_kernel) report_threads();
    abort();
}

}  // namespace

void die(const char* pattern, ...) {
    va_list args;
    va_start(args, pattern);
    vdie(pattern, args);
}

bool describe_running_thread(char* text, size_t size) {
    if (launched == nullptr || running == nullptr) return false;
    const uint3& t = running->index;
    snprintf(text, size, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u):", launched->name,
             block_index.x, block_index.y, block_index.z, t.x, t.y, t.z);
    return true;
}

bool is_stack_guard(const void* address) {
    const char* at = static_cast<const char*>(address);
    for (const Pool& p : pools)
        for (int i = 0; i < p.created; i++)
            if (at >= p.threads[i].stack - kGuardBytes && at < p.threads[i].stack) return true;
    return false;
}

// ==== running and waiting ========================================================================

namespace {

uint32_t pick_lane(uint32_t lanes) {
    if (order == Order::forward) return uint32_t(__builtin_ctz(lanes));
    if (order == Order::reverse) return 31u - uint32_t(__builtin_clz(lanes));
    for (uint32_t skip = random_below(uint32_t(__builtin_popcount(lanes))); skip > 0; skip--)
        lanes &= lanes - 1;
    return uint32_t(__builtin_ctz(lanes));
}

// The next thread that can run, or null. Stays with a warp as long as it can, unless at random.
Thread* pick() {
    if (order == Order::random) cursor = random_below(warp_count);
    for (uint32_t tried = 0; tried < warp_count; tried++) {
        if (warps[cursor].ready != 0)
            return &pool->threads[cursor * 32 + pick_lane(warps[cursor].ready)];
        if (order == Order::reverse) cursor = cursor == 0 ? warp_count - 1 : cursor - 1;
        else cursor = cursor + 1 == warp_count ? 0 : cursor + 1;
    }
    return nullptr;
}

void resume(Context* from, Thread* next) {
    running = next;
    thread_index = &next->index;
    sanitizer_switch(next->fiber);
    switch_context(from, &next->context);
}

// Runs others until somebody makes this thread ready.
void wait() {
    Thread* next = pick();
    if (next == nullptr) [[unlikely]]
        die("waits for ever: no thread of the block can run");
    resume(&running->context, next);
}

// A block is ordered after the grid's launch and after the last block that used this pool, not
// after its own threads that have already ended: hence two keys, in turn.
void begin_thread(Thread* me) {
    sanitizer_acquire(&grid_start);
    sanitizer_acquire(&pool->end[(pool->turn + 1) % 2]);
    me->copy_count = 0;
    me->groups = 0;
    me->product_count = me->products_done = 0;
    me->fenced = false;
}

// Leaves the block; when all have, the host goes on.
void end_thread(Thread* me) {
    if (me->copy_count != 0)
        die("ends with %d cp.async copies that nobody waited for", me->copy_count);
    if (me->product_count != 0) die("ends with %d wgmma that nobody waited for", me->product_count);
    sanitizer_release(&pool->end[pool->turn % 2]);
    sanitizer_release(&grid_end);
    warps[me->warp].ready &= ~(1u << me->lane);
    if (--alive != 0) return wait();
    running = nullptr;
    sanitizer_switch(host_fiber);
    switch_context(&me->context, &host_context);
}

// Every fiber runs this for ever: one turn is one thread of one block.
void run_threads() {
    for (;;) {
        Thread* me = running;
        begin_thread(me);
        launched->body(launched->values);
        end_thread(me);
    }
}

void create_thread(Thread* thread, int number) {
    char* base = static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED || mprotect(base, kGuardBytes, PROT_NONE) != 0)
        die("cannot map a stack for a CUDA thread");
    thread->stack = base + kGuardBytes;
    // Tops at one distance would all fall into one set of the processor's cache.
    char* top = thread->stack + kStackBytes - number * 5 * 64 % 4096;
    make_context(&thread->context, thread->stack, top, run_threads);
    thread->fiber = sanitizer_fiber();
    thread->lane = uint32_t(number) % 32;
    thread->warp = uint32_t(number) / 32;
}

// All bits one: shared memory that nobody has written. The thread sanitizer sees memset, and would
// find it racing with the block before.
void forget(unsigned char* memory, size_t bytes) {
#ifdef EMU_TSAN
    volatile uint64_t* words = reinterpret_cast<uint64_t*>(memory);
    for (size_t i = 0; i < (bytes + 7) / 8; i++) words[i] = ~uint64_t(0);
#else
    memset(memory, 0xff, bytes);
#endif
}

// Gives every thread of the pool its place in the block, with shared memory nobody has written.
void prepare_block(uint64_t block) {
    const dim3& size = launched->grid;
    block_index.x = unsigned(block % size.x);
    block_index.y = unsigned(block / size.x % size.y);
    block_index.z = unsigned(block / size.x / size.y);
    for (uint32_t w = 0; w < warp_count; w++) {
        uint32_t lanes = std::min(32u, thread_count - w * 32);
        warps[w].exists = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warps[w].ready = warps[w].exists;
        warps[w].at_barrier = warps[w].in_collective = 0;
    }
    if (launched->shared_bytes != 0) forget(pool->shared, launched->shared_bytes);
    pool->turn++;
    alive = thread_count;
    arrived = 0;
    cursor = order == Order::reverse ? warp_count - 1 : 0;
}

void prepare_pool() {
    const dim3& size = launched->block;
    for (; pool->created < int(thread_count); pool->created++)
        create_thread(&pool->threads[pool->created], pool->created);
    for (uint32_t i = 0; i < thread_count; i++)
        pool->threads[i].index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    if (pool->shared_capacity >= launched->shared_bytes) return;
    if (pool->shared != nullptr) munmap(pool->shared, pool->shared_capacity);
    pool->shared_capacity = (launched->shared_bytes + 65535) / 65536 * 65536;
    void* mapped = mmap(nullptr, pool->shared_capacity, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) die("cannot map shared memory");
    pool->shared = static_cast<unsigned char*>(mapped);
}

}  // namespace

void run_grid(const Launch& launch, Order thread_order, uint64_t seed) {
    if (launched != nullptr) die("launches a kernel from a kernel");
    launched = &launch;
    order = thread_order;
    random_state = seed * 2 + 1;
    grid_size = launch.grid;
    block_size = launch.block;
    thread_count = launch.block.x * launch.block.y * launch.block.z;
    warp_count = (thread_count + 31) / 32;
    for (Pool& p : pools) {
        pool = &p;
        prepare_pool();
    }
    host_fiber = sanitizer_current();
    sanitizer_release(&grid_start);
    // Blocks too run in the order asked for: at random, block a * i + c with a prime to their
    // number.
    uint64_t count = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    uint64_t step = 1, first = 0;
    if (order == Order::random) {
        first = random_below(uint32_t(std::min<uint64_t>(count, 1u << 31)));
        step = 1 + random_below(uint32_t(std::min<uint64_t>(count, 1u << 31)));
        while (std::gcd(step, count) != 1) step++;
    }
    for (uint64_t i = 0; i < count; i++) {
        pool = &pools[i % kPools];
        prepare_block(order == Order::reverse ? count - 1 - i : (first + i * step) % count);
        resume(&host_context, pick());
    }
    sanitizer_acquire(&grid_end);
    launched = nullptr;
}

// ==== barriers and collectives ===================================================================

namespace {

bool same_site(const Site& a, const Site& b) {
    return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

}  // namespace

void block_barrier(Site site) {
    if (launched == nullptr) die("calls __syncthreads outside a kernel");
    Thread* me = running;
    void* key = &pool->barrier[barriers % 2];
    sanitizer_release(key);
    me->site = site;
    if (arrived == 0) barrier_site = site;
    else if (!same_site(site, barrier_site)) [[unlikely]]
        die("arrives at __syncthreads, %s:%d, while others wait at another: %s:%d", site.file,
            site.line, barrier_site.file, barrier_site.line);
    warps[me->warp].ready &= ~(1u << me->lane);
    warps[me->warp].at_barrier |= 1u << me->lane;
    if (++arrived == thread_count) {
        arrived = 0;
        barriers++;
        for (uint32_t w = 0; w < warp_count; w++) {
            warps[w].ready |= warps[w].at_barrier;
            warps[w].at_barrier = 0;
        }
    } else {
        wait();
    }
    sanitizer_acquire(key);
}

namespace {

// The lane that a shuffle reads [PTX ISA, shfl.sync].
uint32_t source_lane(const Thread& me) {
    uint32_t lane = me.lane, segment = 32u - uint32_t(me.width);  // bits that name the segment
    uint32_t b = uint32_t(me.argument) & 31u;
    uint32_t first = lane & segment, last = first | (~segment & 31u);
    switch (me.kind) {
        case Collective::shuffle_up:
            return int(lane) - int(b) >= int(first) ? lane - b : lane;
        case Collective::shuffle_down:
            return lane + b <= last ? lane + b : lane;
        case Collective::shuffle_xor:
            return (lane ^ b) <= last ? lane ^ b : lane;
        default:
            return first | (b & ~segment);
    }
}

void finish_shuffle(Thread* lanes, uint32_t mask) {
    uint64_t results[32];
    for (uint32_t m = mask; m != 0; m &= m - 1) {
        Thread& lane = lanes[__builtin_ctz(m)];
        uint32_t source = source_lane(lane);
        if (!(mask >> source & 1)) [[unlikely]] {
            running = &lane;
            die("reads lane %u in %s of lanes %08x, %s:%d, which takes no part", source,
                name_of(lane.kind), mask, lane.site.file, lane.site.line);
        }
        results[lane.lane] = lanes[source].value;
    }
    for (uint32_t m = mask; m != 0; m &= m - 1)
        lanes[__builtin_ctz(m)].value = results[__builtin_ctz(m)];
}

void finish_reduction(Thread* lanes, uint32_t mask, Collective kind) {
    uint64_t result = kind == Collective::max_signed ? uint32_t(INT32_MIN) : 0;
    uint32_t votes = 0;
    for (uint32_t m = mask; m != 0; m &= m - 1) {
        const Thread& lane = lanes[__builtin_ctz(m)];
        uint32_t value = uint32_t(lane.value);
        if (value != 0) votes |= 1u << lane.lane;
        if (kind == Collective::add) result = uint32_t(result + value);
        if (kind == Collective::max_unsigned) result = std::max<uint64_t>(result, value);
        if (kind == Collective::max_signed)
            result = uint32_t(std::max(int32_t(result), int32_t(value)));
    }
    if (kind == Collective::ballot) result = votes;
    if (kind == Collective::any) result = votes != 0;
    if (kind == Collective::all) result = votes == mask;
    for (uint32_t m = mask; m != 0; m &= m - 1) lanes[__builtin_ctz(m)].value = result;
}

struct MmaOperands {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

float low_half(uint32_t pair) { return __builtin_bit_cast(float, pair << 16); }
float high_half(uint32_t pair) { return __builtin_bit_cast(float, pair & 0xffff0000u); }

// Fragments of m16n8k16 [PTX ISA, matrix fragments for mma.m16n8k16 with bf16]: with group = lane /
// 4 and pair = lane % 4 * 2, register i of a holds row group + 8 (i odd) and columns pair, pair + 1
// + 8 (i >= 2); register i of b rows pair, pair + 1 + 8 (i = 1) of column group; d rows group and
// group + 8, columns pair and pair + 1.
void finish_mma(Thread* lanes) {
    float a[16][16], b[16][8], d[16][8];
    for (uint32_t lane = 0; lane < 32; lane++) {
        MmaOperands* operands = reinterpret_cast<MmaOperands*>(lanes[lane].value);
        uint32_t group = lane / 4, pair = lane % 4 * 2;
        for (uint32_t i = 0; i < 4; i++) {
            float* at = &a[group + i % 2 * 8][pair + i / 2 * 8];
            at[0] = low_half(operands->a[i]);
            at[1] = high_half(operands->a[i]);
        }
        for (uint32_t i = 0; i < 2; i++) {
            b[pair + i * 8][group] = low_half(operands->b[i]);
            b[pair + i * 8 + 1][group] = high_half(operands->b[i]);
        }
    }
    for (int row = 0; row < 16; row++) {
        float sum[8] = {};
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) sum[column] += a[row][k] * b[k][column];
        memcpy(d[row], sum, sizeof(sum));
    }
    for (uint32_t lane = 0; lane < 32; lane++) {
        float* out = reinterpret_cast<MmaOperands*>(lanes[lane].value)->d;
        uint32_t group = lane / 4, pair = lane % 4 * 2;
        out[0] += d[group][pair];
        out[1] += d[group][pair + 1];
        out[2] += d[group + 8][pair];
        out[3] += d[group + 8][pair + 1];
    }
}

struct MatrixOperands {
    uint32_t* r;
    const uint16_t* row;
    bool transposed;
};

// Lane l receives of each matrix the elements 2 (l % 4) and the next of row l / 4; transposed, rows
// and columns change places [PTX ISA, ldmatrix].
void finish_ldmatrix(Thread* lanes) {
    auto operands = [lanes](uint32_t lane) {
        return reinterpret_cast<MatrixOperands*>(lanes[lane].value);
    };
    for (uint32_t lane = 0; lane < 32; lane++) {
        bool transposed = operands(lane)->transposed;
        uint32_t group = lane / 4, pair = lane % 4 * 2;
        for (uint32_t matrix = 0; matrix < 4; matrix++) {
            uint32_t row = matrix * 8 + (transposed ? pair : group);
            uint32_t low = transposed ? operands(row)->row[group] : operands(row)->row[pair];
            uint32_t high =
                transposed ? operands(row + 1)->row[group] : operands(row)->row[pair + 1];
            operands(lane)->r[matrix] = low | high << 16;
        }
    }
}

void finish(Thread* lanes, uint32_t mask, Collective kind) {
    switch (kind) {
        case Collective::sync:
            break;
        case Collective::mma:
            finish_mma(lanes);
            break;
        case Collective::ldmatrix:
            finish_ldmatrix(lanes);
            break;
        case Collective::shuffle_index:
        case Collective::shuffle_up:
        case Collective::shuffle_down:
        case Collective::shuffle_xor:
            finish_shuffle(lanes, mask);
            break;
        default:
            finish_reduction(lanes, mask, kind);
    }
}

void check_collective(const Thread* me, Collective kind, uint32_t mask, int width, Site site) {
    uint32_t exists = warps[me->warp].exists;
    if (!(mask >> me->lane & 1))
        die("calls %s of lanes %08x, %s:%d, but is lane %u", name_of(kind), mask, site.file,
            site.line, me->lane);
    if (mask & ~exists)
        die("calls %s of lanes %08x, %s:%d, but the warp has lanes %08x", name_of(kind), mask,
            site.file, site.line, exists);
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
        die("calls %s, %s:%d, with width %d, which is no power of two up to 32", name_of(kind),
            site.file, site.line, width);
}

// All lanes of the mask wait somewhere: it must be here.
void check_meeting(const Thread* me, const Thread* lanes) {
    for (uint32_t m = me->mask; m != 0; m &= m - 1) {
        const Thread& other = lanes[__builtin_ctz(m)];
        if (other.kind != me->kind || other.mask != me->mask || !same_site(other.site, me->site))
            die("arrives at %s of lanes %08x, %s:%d, while lane %u waits in %s of lanes %08x, "
                "%s:%d",
                name_of(me->kind), me->mask, me->site.file, me->site.line, other.lane,
                name_of(other.kind), other.mask, other.site.file, other.site.line);
    }
}

}  // namespace

uint64_t collective(Collective kind, uint32_t mask, uint64_t value, int argument, int width,
                    Site site) {
    if (launched == nullptr) die("calls %s outside a kernel", name_of(kind));
    Thread* me = running;
    Warp& warp = warps[me->warp];
    uint32_t bit = 1u << me->lane;
    bool sound = (mask & bit) != 0 && (mask & ~warp.exists) == 0 && width >= 1 && width <= 32 &&
                 (width & (width - 1)) == 0;
    if (!sound) [[unlikely]]
        check_collective(me, kind, mask, width, site);
    me->kind = kind;
    me->mask = mask;
    me->site = site;
    me->value = value;
    me->argument = argument;
    me->width = width;
    warp.ready &= ~bit;
    warp.in_collective |= bit;
    if ((warp.in_collective & mask) != mask) {
        wait();
        return me->value;
    }
    Thread* lanes = me - me->lane;
    check_meeting(me, lanes);
    finish(lanes, mask, kind);
    warp.in_collective &= ~mask;
    warp.ready |= mask;
    return me->value;
}

void warp_barrier(uint32_t mask, Site site) {
#ifdef EMU_TSAN
    // The first lane to arrive opens a meeting, the others join it. Keys are used again after
    // kMeetings meetings: whoever still sleeps then only sees more ordered than there was.
    Thread* me = running;
    Thread* lanes = me - me->lane;
    me->meeting = nullptr;
    for (uint32_t m = warps[me->warp].in_collective & mask; m != 0; m &= m - 1) {
        const Thread& other = lanes[__builtin_ctz(m)];
        if (other.kind == Collective::sync && other.mask == mask) me->meeting = other.meeting;
    }
    if (me->meeting == nullptr)
        me->meeting = &pool->meeting[me->warp][warps[me->warp].meetings++ % kMeetings];
    char* key = me->meeting;
    sanitizer_release(key);
    collective(Collective::sync, mask, 0, 0, 32, site);
    sanitizer_acquire(key);
#else
    collective(Collective::sync, mask, 0, 0, 32, site);
#endif
}

// What was written before one thread's fence is ordered before what another does after its own.
void fence() {
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    sanitizer_release(&fence_key);
    sanitizer_acquire(&fence_key);
}

void mma(float* d, const uint32_t* a, const uint32_t* b, Site site) {
    MmaOperands operands{d, a, b};
    collective(Collective::mma, ~0u, reinterpret_cast<uintptr_t>(&operands), 0, 32, site);
}

void exchange_matrices(uint32_t* r, const uint16_t* row, bool transposed, Site site) {
    MatrixOperands operands{r, row, transposed};
    collective(Collective::ldmatrix, ~0u, reinterpret_cast<uintptr_t>(&operands), 0, 32, site);
}

// ==== asynchronous copies and shared memory ======================================================

void issue_async_copy(AsyncCopy copy) {
    Thread* me = running;
    if (me->copy_count == me->copy_capacity) {
        me->copy_capacity = std::max(16, me->copy_capacity * 2);
        void* grown = realloc(me->copies, sizeof(Copy) * size_t(me->copy_capacity));
        if (grown == nullptr) die("has no memory for its cp.async copies");
        me->copies = static_cast<Copy*>(grown);
    }
    me->copies[me->copy_count++] = {copy, me->groups};
}

void commit_async_copies() { running->groups++; }

bool next_landing(int groups_in_flight, AsyncCopy* copy) {
    Thread* me = running;
    if (me->copy_count == 0) return false;
    if (int64_t(me->copies[0].group) >= int64_t(me->groups) - groups_in_flight) return false;
    *copy = me->copies[0].copy;
    me->copy_count--;
    memmove(me->copies, me->copies + 1, sizeof(Copy) * size_t(me->copy_count));
    return true;
}

void warpgroup_fence() { running->fenced = true; }

void issue_warpgroup_product(const WarpgroupProduct& product) {
    Thread* me = running;
    if (block_size.x % 128 != 0)
        die("calls wgmma in a block of %u threads, not warpgroups", block_size.x);
    if (!me->fenced) die("calls wgmma without wgmma.fence since it last waited");
    if (me->product_count == kMostProducts)
        die("calls wgmma %d times without waiting", kMostProducts);
    bool first = true;
    for (int i = 0; i < me->product_count; i++) first &= me->products[i].sums != product.sums;
    if (first) {
        memcpy(me->sums_before[me->product_count], product.sums, sizeof(me->sums_before[0]));
        std::fill(product.sums, product.sums + 32, NAN);
    }
    me->products[me->product_count++] = product;
}

bool next_warpgroup_product(WarpgroupProduct* product) {
    Thread* me = running;
    if (me->products_done == me->product_count) {
        me->product_count = me->products_done = 0;
        me->fenced = false;
        return false;
    }
    int at = me->products_done++;
    *product = me->products[at];
    bool first = true;
    for (int i = 0; i < at; i++) first &= me->products[i].sums != product->sums;
    if (first) memcpy(product->sums, me->sums_before[at], sizeof(me->sums_before[at]));
    return true;
}

bool adds_warpgroup_products(const float* sums) {
    const Thread* me = running;
    for (int i = me->products_done; i < me->product_count; i++)
        if (me->products[i].sums == sums) return true;
    return false;
}

unsigned char* shared_memory(size_t offset, size_t bytes) {
    if (launched == nullptr) die("asks for shared memory outside a kernel");
    if (offset + bytes > launched->shared_bytes)
        die("carves bytes %zu to %zu of shared memory, but the launch gave %zu", offset,
            offset + bytes, launched->shared_bytes);
    return pool->shared + offset;
}

}  // namespace emu
