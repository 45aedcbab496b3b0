// What the library inside the program tells the harness outside it: a page of shared memory, which
// outlives a process that is killed.
#pragma once

#include <atomic>
#include <cstdint>

// name, what it stands for
#define FAULT_KINDS(X)                           \
    X(open)   /* for reading, folders too */     \
    X(create) /* open for writing */             \
    X(read)                                      \
    X(write)                                     \
    X(sync)                                      \
    X(close)                                     \
    X(rename)                                    \
    X(unlink) /* and rmdir */                    \
    X(mkdir)                                     \
    X(link) /* symbolic or hard */               \
    X(truncate)                                  \
    X(map)                                       \
    X(list) /* a folder is opened, or read on */ \
    X(stat) /* and access, readlink, statvfs */  \
    X(lock)                                      \
    X(alloc)

#define FAULT_KIND_ENUM(name) name,
enum class FaultKind : int { FAULT_KINDS(FAULT_KIND_ENUM) count };
#undef FAULT_KIND_ENUM

#define FAULT_KIND_NAME(name) #name,
constexpr const char* kFaultKindNames[] = {FAULT_KINDS(FAULT_KIND_NAME)};
#undef FAULT_KIND_NAME

constexpr int kFaultKinds = int(FaultKind::count);

struct FaultStatus {
    std::atomic<uint64_t> calls;  // counted so far
    std::atomic<uint64_t> by_kind[kFaultKinds];
    std::atomic<uint64_t> injected;
    std::atomic<int> kind;  // where the first fault fell
    char path[200];
    // A save is begun when its temporary folder is made, and completed when OUT/last was renamed
    // into place and OUT was synced: from then on it must not be lost.
    std::atomic<uint64_t> saves_begun, saves_completed;
    std::atomic<int64_t> last_step;  // that OUT/last was switched to
    std::atomic<int64_t> completed_step;
};

// The numbers must be usable from two processes and inside signal handlers.
static_assert(std::atomic<uint64_t>::is_always_lock_free);
