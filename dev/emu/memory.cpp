// Device memory and pinned host memory of the emulator, and what happens when somebody steps
// outside it.
//
// An allocation ends within 255 bytes of pages without access, so that running past its end faults
// at once, or writes into a pattern that is checked after every launch. The same lies before it.
// Freed memory stays mapped without access for a while, so that late use is recognised. A handler
// for the fault says in one sentence who touched what.

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>

#include "internal.h"

#if defined(__has_feature)
#    if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#        define __SANITIZE_ADDRESS__
#    endif
#endif
#ifdef __SANITIZE_ADDRESS__
#    include <sanitizer/asan_interface.h>

// Fibers have stacks that the sanitizer does not know; its fake ones would outlive their frames.
extern "C" __attribute__((weak)) const char* __asan_default_options() {
    return "detect_stack_use_after_return=0";
}
#endif

namespace emu {

namespace {

constexpr size_t kAlignment = 256;          // of cudaMalloc
constexpr size_t kFence = size_t(1) << 20;  // address space without access on both sides
constexpr size_t kGraves = 256;             // freed allocations that stay recognisable

std::map<const char*, Allocation> allocations;  // by the first byte of the pages between fences
std::deque<const char*> graves;                 // keys of those that were freed, oldest first
size_t device_in_use = 0;
int open_depth = 0;  // DeviceAccess objects alive
bool device_is_shut = false;

size_t page_bytes() {
    static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
    return bytes;
}

size_t round_up(size_t a, size_t b) { return (a + b - 1) / b * b; }

// The allocation whose pages or fences hold `pointer`, or null.
Allocation* owner(const void* pointer) {
    const char* at = static_cast<const char*>(pointer);
    auto next = allocations.upper_bound(at + kFence);
    if (next == allocations.begin()) return nullptr;
    Allocation& found = std::prev(next)->second;
    return at < found.mapping + found.mapped + kFence ? &found : nullptr;
}

// ==== the bytes around an allocation =============================================================

#ifdef __SANITIZE_ADDRESS__
void mark_surroundings(const Allocation& a) {
    ASAN_POISON_MEMORY_REGION(a.mapping, size_t(a.begin - a.mapping));
    ASAN_POISON_MEMORY_REGION(a.begin + a.bytes, size_t(a.mapping + a.mapped - a.begin) - a.bytes);
}
void unmark(const Allocation& a) { ASAN_UNPOISON_MEMORY_REGION(a.mapping, a.mapped); }
void check_one(const Allocation&, const char*) {}
#else
constexpr unsigned char kPattern = 0xa5;

void mark_surroundings(const Allocation& a) {
    memset(a.mapping, kPattern, size_t(a.begin - a.mapping));
    memset(a.begin + a.bytes, kPattern, size_t(a.mapping + a.mapped - a.begin) - a.bytes);
}
void unmark(const Allocation&) {}

// The index of the first byte of [from, to) that is not the pattern, or -1.
ptrdiff_t first_change(const char* from, const char* to) {
    const unsigned char* p = reinterpret_cast<const unsigned char*>(from);
    ptrdiff_t count = to - from;
    unsigned char differs = 0;
    for (ptrdiff_t i = 0; i < count; i++) differs |= p[i] ^ kPattern;
    if (differs == 0) return -1;
    ptrdiff_t i = 0;
    while (p[i] == kPattern) i++;
    return i;
}

void check_one(const Allocation& a, const char* when) {
    const char* end = a.begin + a.bytes;
    ptrdiff_t behind = first_change(end, a.mapping + a.mapped);
    if (behind >= 0)
        die("finds %s that byte %td behind an allocation of %zu bytes was written", when, behind,
            a.bytes);
    ptrdiff_t before = first_change(a.mapping, a.begin);
    if (before >= 0)
        die("finds %s that byte %td before an allocation of %zu bytes was written", when,
            a.begin - a.mapping - before, a.bytes);
}
#endif

// ==== faults =====================================================================================

struct sigaction previous_action;

// Who runs, as the beginning of a sentence.
void fault(const char* pattern, size_t a, size_t b) {
    char text[256];
    snprintf(text, sizeof(text), pattern, a, b);
    die("%s", text);
}

void explain_device_fault(const Allocation& a, const char* at) {
    if (a.freed)
        fault("touches byte %zu of an allocation of %zu bytes after it was freed",
              size_t(at - a.begin), a.bytes);
    if (at >= a.begin + a.bytes)
        fault("touches a byte %zu bytes past the end of an allocation of %zu bytes",
              size_t(at - a.begin) - a.bytes, a.bytes);
    if (at < a.begin)
        fault("touches a byte %zu bytes before an allocation of %zu bytes", size_t(a.begin - at),
              a.bytes);
    fault("touches byte %zu of %zu of device memory: copy it with cudaMemcpy", size_t(at - a.begin),
          a.bytes);
}

void handle_fault(int, siginfo_t* info, void*) {
    const char* at = static_cast<const char*>(info->si_addr);
    char who[256];
    if (const Allocation* a = owner(at)) {
        bool inside = at >= a->begin && at < a->begin + a->bytes;
        if (a->pinned && !a->freed && inside && !explain_pinned_fault(at)) return;
        explain_device_fault(*a, at);
    }
    if (is_stack_guard(at)) die("uses up the stack of its thread");
    if (describe_running_thread(who, sizeof(who)))
        die("touches address %p, where no allocation is", static_cast<const void*>(at));
    sigaction(SIGSEGV, &previous_action, nullptr);  // not ours: fault again, without this handler
}

// On a stack of its own: the fault may be that there is no stack left.
void install_fault_handler() {
    static const bool installed = [] {
        use_fault_stack();
        struct sigaction action = {};
        action.sa_sigaction = handle_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        return sigaction(SIGSEGV, &action, &previous_action) == 0;
    }();
    if (!installed) die("cannot install a handler for faults");
}

void shut(const Allocation& a, bool shut) {
    mprotect(a.mapping, a.mapped, shut ? PROT_NONE : PROT_READ | PROT_WRITE);
}

bool host_check() { return setting("EMU_HOST_CHECK", 0) != 0; }

// Forgets the oldest grave when there are too many.
void bury(Allocation* a) {
    unmark(*a);
    // Fresh pages without access take the place of the old ones, whose memory returns.
    mmap(a->mapping, a->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
         -1, 0);
    a->freed = true;
    graves.push_back(a->mapping);
    if (graves.size() <= kGraves) return;
    auto oldest = allocations.find(graves.front());
    munmap(oldest->second.mapping - kFence, oldest->second.mapped + 2 * kFence);
    allocations.erase(oldest);
    graves.pop_front();
}

}  // namespace

void use_fault_stack() {
    constexpr size_t kBytes = 256 << 10;
    stack_t stack = {};
    stack.ss_sp = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stack.ss_size = kBytes;
    if (stack.ss_sp != MAP_FAILED) sigaltstack(&stack, nullptr);
}

// ==== allocations ================================================================================

char* allocate(size_t bytes, bool pinned) {
    install_fault_handler();
    DeviceAccess open;
    Allocation a = {};
    size_t taken = round_up(bytes, kAlignment);
    a.bytes = bytes;
    a.pinned = pinned;
    a.mapped = round_up(taken, page_bytes());
    void* reserved = mmap(nullptr, a.mapped + 2 * kFence, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return nullptr;
    a.mapping = static_cast<char*>(reserved) + kFence;
    if (mprotect(a.mapping, a.mapped, PROT_READ | PROT_WRITE) != 0) {
        munmap(reserved, a.mapped + 2 * kFence);
        return nullptr;
    }
    // Pinned memory begins with a page, as pages are what the copies in flight shut.
    a.begin = pinned ? a.mapping : a.mapping + a.mapped - taken;
    memset(a.begin, 0xff, bytes);
    mark_surroundings(a);
    if (!pinned) device_in_use += taken;
    allocations[a.mapping] = a;
    return a.begin;
}

bool release(void* pointer, bool pinned) {
    Allocation* a = owner(pointer);
    if (a == nullptr || a->begin != pointer || a->pinned != pinned) return false;
    if (a->freed) die("frees an allocation of %zu bytes twice", a->bytes);
    DeviceAccess open;
    check_one(*a, "when it is freed");
    if (!pinned) device_in_use -= round_up(a->bytes, kAlignment);
    bury(a);
    return true;
}

const Allocation* find(const void* pointer) {
    const Allocation* a = owner(pointer);
    if (a == nullptr || a->freed) return nullptr;
    const char* at = static_cast<const char*>(pointer);
    return at >= a->begin && at < a->begin + a->bytes ? a : nullptr;
}

void check_surroundings(const char* when) {
    for (const auto& [mapping, a] : allocations)
        if (!a.freed && !a.pinned) check_one(a, when);
}

size_t device_bytes_in_use() { return device_in_use; }

// The variable may change while memory is shut: what is shut is opened whatever it says.
DeviceAccess::DeviceAccess() {
    if (open_depth++ > 0 || !device_is_shut) return;
    for (const auto& [mapping, a] : allocations)
        if (!a.freed && !a.pinned) shut(a, false);
    device_is_shut = false;
}

DeviceAccess::~DeviceAccess() {
    if (--open_depth > 0 || !host_check()) return;
    for (const auto& [mapping, a] : allocations)
        if (!a.freed && !a.pinned) shut(a, true);
    device_is_shut = true;
}

}  // namespace emu
