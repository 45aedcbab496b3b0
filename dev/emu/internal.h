// What the parts of the emulator share among themselves: scheduler.cpp runs one grid, memory.cpp
// keeps device and pinned memory, runtime.cpp devices, streams, events, copies and launches,
// cublaslt.cpp the matrix products, nccl.cpp the collectives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "emu.h"

namespace emu {

// ==== scheduler.cpp ==============================================================================

// The order in which the threads of a block, and the blocks of a grid, run.
enum class Order { forward, reverse, random };

// Runs every block of a launch that has passed all checks.
void run_grid(const Launch& launch, Order order, uint64_t seed);

// Which kernel and thread runs, as the beginning of a sentence; false while the host runs. Safe in
// a signal handler.
bool describe_running_thread(char* text, size_t size);

// Whether a fault at `address` means that a fiber used up its stack.
bool is_stack_guard(const void* address);

// ==== memory.cpp =================================================================================

struct Allocation {
    char* begin;  // what the program was given
    size_t bytes;
    char* mapping;  // whole pages around it, with pages without access before and behind
    size_t mapped;
    bool pinned;  // host memory that copies may use while the host runs on; else device memory
    bool freed;
};

// Null where the machine has no memory. Fresh memory is filled with 0xFF.
char* allocate(size_t bytes, bool pinned);

// False where `pointer` is not what allocate() gave.
bool release(void* pointer, bool pinned);

// The living allocation that holds `pointer`, or null.
const Allocation* find(const void* pointer);

// Aborts where bytes around an allocation were written. `when`: the end of a sentence.
void check_surroundings(const char* when);

size_t device_bytes_in_use();

// Faults of the calling thread are explained on a stack of their own. Once a thread.
void use_fault_stack();

// Device memory is open while one of these lives. With EMU_HOST_CHECK=1 it is shut at other times,
// so that host code which touches it directly is stopped.
class DeviceAccess {
  public:
    DeviceAccess();
    ~DeviceAccess();
};

// ==== runtime.cpp ================================================================================

// One lock for every entry of the runtime: launches and copies run one at a time.
extern std::recursive_mutex runtime_lock;

// Keeps `status` for cudaGetLastError() where it is a failure, and returns it.
cudaError_t remember(cudaError_t status);

// cudaSuccess where there is a card that this program can use.
cudaError_t card();

// A number from the environment.
long long setting(const char* name, long long otherwise);

// A part of memory that an operation reads or writes.
struct Use {
    const char* begin;
    size_t bytes;
    bool writes;
    bool hidden = false;  // perhaps a use: what comes after it waits for it, it waits for nothing
};

// What an operation does when its turn comes, device memory open and under the lock. False: it has
// not ended, and is called again later; what is ordered after it waits.
using Step = std::function<bool()>;

// Puts an operation on a stream, ordered after all that the stream has waited for. Where all of
// that has ended its turn is now, and the copies among it land first; else it waits, and the caller
// does not: what `step` needs must be its own. Aborts where the operation uses memory that another
// stream, not waited for, still uses. `all`: it may touch anything beside `uses`.
// cudaErrorInvalidResourceHandle: no such stream.
cudaError_t enqueue(cudaStream_t stream, const char* name, const std::vector<Use>& uses, bool all,
                    Step step);

// From a step: `bytes` are written to device memory when an operation ordered after it begins, or
// the host waits for it.
void write_late(char* to, std::vector<char> bytes);

// What comes next on each of the streams comes after all that is on any of them. False: one of
// them is no stream.
bool join_streams(const std::vector<cudaStream_t>& handles);

// Gives operations that have not ended another turn, where the order allows.
void run_unfinished();

// Waits with the lock open, which the caller holds once, until `done`. What can go on meanwhile
// does so.
void host_blocks(const std::function<bool()>& done);

// Explains a fault in pinned memory that a copy in flight has shut, and ends the program; false
// where no copy covers that byte, and the page is open again.
bool explain_pinned_fault(const void* address);

}  // namespace emu
