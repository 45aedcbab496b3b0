// The CUDA runtime's prototypes, defined on the CPU: the card, memory, copies, streams, events and
// launches. What NVIDIA's headers declare and this file lacks fails at link time.
//
// A kernel has ended when its launch returns. What is asynchronous on a GPU shows all the same:
// each stream knows, as a vector clock [Fidge 1988; Mattern 1989], which operations of the others
// come before its next one. A copy between pinned and device memory happens as late as that order
// allows: it lands when an operation ordered after it begins, or when the host waits for it. Until
// then the destination holds 0xFF, the host pages are shut, and operations of streams that have not
// waited for it are refused the memory that it uses. A synchronous copy to the device from pageable
// memory, which the program may use again at once, lands as late.
//
// A collective of nccl.cpp lasts until the other ranks take part, and the host runs on: what is
// ordered after it waits in a list. The list goes on in every call that waits or asks, and in a
// thread of its own, so that ranks which wait for this one need not wait for its host.

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>

#include "internal.h"

namespace emu {

std::recursive_mutex runtime_lock;

namespace {

using Clock = std::vector<uint64_t>;  // per stream: the number of its operations that are known

struct Stream {
    int id;
    bool blocking;       // ordered with the default stream
    Clock seen;          // what its next operation comes after; its own entry counts what it began
    int priority;        // kept, and of no effect
    bool asked = false;  // a query has already said: not ready
};

struct Event {
    Clock at;
    bool recorded = false, timed = true, asked = false;
    std::chrono::steady_clock::time_point time;
};

struct PendingCopy {
    char* to;
    const char* from;
    size_t bytes;
    int stream;
    uint64_t operation;  // its number on the stream
    bool to_device;
    bool done;                 // the source was read
    std::vector<char> staged;  // device to host: what it read
    char* host() const { return to_device ? const_cast<char*>(from) : to; }
};

// An operation that has not ended. All that it is ordered after is above it in the list.
struct Unfinished {
    int stream;
    uint64_t number;  // on the stream
    Clock after;
    std::vector<Use> uses;
    bool all;
    bool begun;
    Step step;
};

// What an operation that has ended is still to write.
struct LateWrite {
    int stream;
    uint64_t operation;
    char* to;
    std::vector<char> bytes;
};

// Memory that an operation was given, which streams that have not waited for it must leave alone:
// of equal uses the latest.
using PastUses = std::map<std::tuple<const char*, size_t, bool>,  // as in Use
                          std::pair<uint64_t, std::string>>;  // number and name of the operation

constexpr int kSharedDefault = 48 << 10, kSharedReserved = 1 << 10;  // of a block
constexpr int kThreadsMost = 1024, kThreadsProcessor = 2048, kBlocksProcessor = 32;
constexpr unsigned kGridMost = 65535;
constexpr int kLeastPriority = 0, kGreatestPriority = -5;  // of streams

std::vector<std::unique_ptr<Stream>> streams;  // [0]: the default stream; a destroyed one is null
std::set<Event*> events;
Clock host_seen;  // what the host has waited for
std::vector<PendingCopy> pending;
std::list<Unfinished> unfinished;
const Unfinished* stepping = nullptr;  // whose turn it is
std::vector<LateWrite> late_writes;
std::map<int, PastUses> past;              // by stream
std::map<const void*, int> shared_limits;  // of kernels that asked for more than the default
cudaError_t last_error = cudaSuccess;
int current_device = 0;

// ==== clocks =====================================================================================

uint64_t entry(const Clock& clock, int stream) {
    return size_t(stream) < clock.size() ? clock[size_t(stream)] : 0;
}

void merge(Clock* into, const Clock& other) {
    if (into->size() < other.size()) into->resize(other.size(), 0);
    for (size_t i = 0; i < other.size(); i++) (*into)[i] = std::max((*into)[i], other[i]);
}

bool covers(const Clock& clock, const Clock& other) {
    for (size_t i = 0; i < other.size(); i++)
        if (entry(clock, int(i)) < other[i]) return false;
    return true;
}

Stream* default_stream() {
    if (streams.empty())
        streams.push_back(std::make_unique<Stream>(Stream{0, true, Clock(1, 0), 0}));
    return streams[0].get();
}

// Null where the handle is none that cudaStreamCreate gave.
Stream* find_stream(cudaStream_t handle) {
    Stream* standard = default_stream();
    if (handle == nullptr || handle == cudaStreamLegacy) return standard;
    for (auto& stream : streams)
        if (stream && reinterpret_cast<cudaStream_t>(stream.get()) == handle) return stream.get();
    return nullptr;
}

// What an operation, or an event, that is put on the stream now comes after.
void catch_up(Stream* stream) {
    merge(&stream->seen, host_seen);
    if (stream->id == 0) {
        for (auto& other : streams)
            if (other && other->blocking) merge(&stream->seen, other->seen);
    } else if (stream->blocking) {
        merge(&stream->seen, default_stream()->seen);
    }
}

// ==== copies in flight ===========================================================================

bool overlap(const char* a, size_t a_bytes, const char* b, size_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

void open_pinned(const Allocation& allocation) {
    mprotect(allocation.mapping, allocation.mapped, PROT_READ | PROT_WRITE);
}

// Shuts the host pages of the copies in flight, and opens those of no copy.
void protect_pinned(const Allocation& allocation) {
    uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    open_pinned(allocation);
    for (bool to_device : {true, false}) {  // those that forbid reading too come last
        for (const PendingCopy& copy : pending) {
            if (copy.to_device != to_device || find(copy.host()) != &allocation) continue;
            uintptr_t begin = reinterpret_cast<uintptr_t>(copy.host()) / page * page;
            uintptr_t end = reinterpret_cast<uintptr_t>(copy.host()) + copy.bytes;
            mprotect(reinterpret_cast<void*>(begin), (end - begin + page - 1) / page * page,
                     to_device ? PROT_READ : PROT_NONE);
        }
    }
}

// Reads the source: from here on it may change. To the device it also writes.
void perform(PendingCopy* copy) {
    if (copy->done) return;
    copy->done = true;
    if (copy->to_device) memcpy(copy->to, copy->from, copy->bytes);
    else copy->staged.assign(copy->from, copy->from + copy->bytes);
}

bool has_unfinished(const Clock& clock) {
    for (const Unfinished& u : unfinished)
        if (entry(clock, u.stream) >= u.number) return true;
    return false;
}

// Writes what `clock` covers and `touched` chooses.
template <class F>
void land_writes(const Clock& clock, F touched) {
    std::erase_if(late_writes, [&](const LateWrite& w) {
        if (entry(clock, w.stream) < w.operation || !touched(w)) return false;
        memcpy(w.to, w.bytes.data(), w.bytes.size());
        return true;
    });
}

// The host waits for everything up to `clock`: what it covers lands, and may be used.
void host_waits(Clock clock) {
    host_blocks([&clock] { return !has_unfinished(clock); });
    DeviceAccess open;
    merge(&host_seen, clock);
    land_writes(host_seen, [](const LateWrite&) { return true; });
    std::vector<PendingCopy> landed;
    for (PendingCopy& copy : pending) {
        if (entry(host_seen, copy.stream) < copy.operation) continue;
        perform(&copy);
        landed.push_back(std::move(copy));
        copy.bytes = 0;
    }
    std::erase_if(pending, [](const PendingCopy& copy) { return copy.bytes == 0; });
    for (PendingCopy& copy : landed) {
        open_pinned(*find(copy.host()));
        if (!copy.to_device) memcpy(copy.to, copy.staged.data(), copy.bytes);
    }
    for (PendingCopy& copy : landed) protect_pinned(*find(copy.host()));
    for (auto& [stream, uses] : past) {
        uint64_t known = entry(host_seen, stream);
        std::erase_if(uses, [known](const auto& use) { return use.second.first <= known; });
    }
    check_surroundings("when the host waits");
}

void host_waits_for_all() {
    Clock all;
    for (auto& stream : streams)
        if (stream) merge(&all, stream->seen);
    auto include = [&all](int stream, uint64_t operation) {
        if (all.size() <= size_t(stream)) all.resize(size_t(stream) + 1, 0);
        all[size_t(stream)] = std::max(all[size_t(stream)], operation);
    };
    for (const PendingCopy& copy : pending) include(copy.stream, copy.operation);
    for (const Unfinished& u : unfinished) include(u.stream, u.number);
    for (const LateWrite& w : late_writes) include(w.stream, w.operation);
    host_waits(all);
}

// Aborts where `use` meets memory that an operation not ordered before this one uses.
void check_order(const Stream& stream, const char* name, const Use& use) {
    for (const auto& [id, uses] : past) {
        if (id == stream.id) continue;
        for (const auto& [other, operation] : uses) {
            auto [begin, bytes, writes] = other;
            if (entry(stream.seen, id) >= operation.first) continue;
            if (!use.writes && !writes) continue;
            if (!overlap(use.begin, use.bytes, begin, bytes)) continue;
            die("puts %s on stream %d, which %s memory that %s on stream %d still %s: wait for an "
                "event recorded after it",
                name, stream.id, use.writes ? "writes" : "reads", operation.second.c_str(), id,
                writes ? "writes" : "reads");
        }
    }
}

}  // namespace

// ==== operations and their turns =================================================================

namespace {

// What the operation uses, of all that is to land before it, lands.
void begin(const Unfinished& u) {
    auto touched = [&u](const char* at, size_t bytes) {
        for (const Use& use : u.uses)
            if (overlap(use.begin, use.bytes, at, bytes)) return true;
        return u.all;
    };
    land_writes(u.after, [&](const LateWrite& w) { return touched(w.to, w.bytes.size()); });
    for (PendingCopy& copy : pending) {
        if (copy.done || entry(u.after, copy.stream) < copy.operation) continue;
        if (touched(copy.to, copy.bytes) || touched(copy.from, copy.bytes)) perform(&copy);
    }
}

// A turn for the operation; whether it has ended.
bool give_turn(Unfinished* u) {
    DeviceAccess open;
    if (!u->begun) begin(*u);
    u->begun = true;
    stepping = u;
    bool ended = u->step();
    stepping = nullptr;
    return ended;
}

bool may_run(const Unfinished& u) {
    for (const Unfinished& other : unfinished) {
        if (&other == &u) return true;
        if (entry(u.after, other.stream) >= other.number) return false;
    }
    return true;
}

void sleep_ns(long ns) {
    timespec time = {0, ns};
    nanosleep(&time, nullptr);
}
constexpr long kShortestSleep_ns = 10'000, kLongestSleep_ns = 1'000'000;

// The thread in which unfinished operations go on while the host does something else. It takes no
// signals, but for its own faults: handlers are the program's threads' to run.
class Progress {
  public:
    Progress() {
        sigset_t all, old;
        sigfillset(&all);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, fault);
        pthread_sigmask(SIG_SETMASK, &all, &old);
        thread_ = std::thread([this] { work(); });
        pthread_sigmask(SIG_SETMASK, &old, nullptr);
    }
    ~Progress() {
        stop_ = true;
        if (getpid() == process_) thread_.join();
        else thread_.detach();  // a child has no such thread
    }

  private:
    void work() {
        use_fault_stack();
        for (long sleep = kShortestSleep_ns; !stop_; sleep_ns(sleep)) {
            std::lock_guard lock(runtime_lock);
            size_t before = unfinished.size();
            run_unfinished();
            sleep = unfinished.size() < before ? kShortestSleep_ns
                                               : std::min(2 * sleep, kLongestSleep_ns);
        }
    }

    pid_t process_ = getpid();
    std::atomic<bool> stop_ = false;
    std::thread thread_;
};

}  // namespace

cudaError_t enqueue(cudaStream_t handle, const char* name, const std::vector<Use>& uses, bool all,
                    Step step) {
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return remember(cudaErrorInvalidResourceHandle);
    run_unfinished();
    catch_up(stream);
    for (const Use& use : uses)
        if (!use.hidden) check_order(*stream, name, use);
    stream->seen.resize(std::max(stream->seen.size(), size_t(stream->id) + 1), 0);
    Unfinished u = {stream->id, 0, stream->seen, uses, all, false, std::move(step)};
    u.number = ++stream->seen[size_t(stream->id)];
    for (const Use& use : uses)
        past[stream->id][{use.begin, use.bytes, use.writes}] = {u.number, name};
    if (may_run(u) && give_turn(&u)) return cudaSuccess;
    unfinished.push_back(std::move(u));
    static Progress progress;
    return cudaSuccess;
}

void write_late(char* to, std::vector<char> bytes) {
    late_writes.push_back({stepping->stream, stepping->number, to, std::move(bytes)});
}

bool join_streams(const std::vector<cudaStream_t>& handles) {
    Clock all;
    for (cudaStream_t handle : handles) {
        Stream* stream = find_stream(handle);
        if (stream == nullptr) return false;
        catch_up(stream);
        merge(&all, stream->seen);
    }
    for (cudaStream_t handle : handles) merge(&find_stream(handle)->seen, all);
    return true;
}

void run_unfinished() {
    for (auto u = unfinished.begin(); u != unfinished.end();) {
        bool ended = may_run(*u) && give_turn(&*u);
        u = ended ? unfinished.erase(u) : std::next(u);
    }
}

void host_blocks(const std::function<bool()>& done) {
    for (long sleep = kShortestSleep_ns; !done(); sleep = std::min(2 * sleep, kLongestSleep_ns)) {
        run_unfinished();
        if (done()) return;
        runtime_lock.unlock();
        sleep_ns(sleep);
        runtime_lock.lock();
    }
}

bool explain_pinned_fault(const void* address) {
    const char* at = static_cast<const char*>(address);
    for (const PendingCopy& copy : pending) {
        if (at < copy.host() || at >= copy.host() + copy.bytes) continue;
        if (copy.to_device)
            die("writes pinned memory that a copy of %zu bytes to the device on stream %d still "
                "reads: synchronise first",
                copy.bytes, copy.stream);
        die("touches pinned memory that a copy of %zu bytes from the device on stream %d still "
            "writes: synchronise first",
            copy.bytes, copy.stream);
    }
    uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    uintptr_t begin = reinterpret_cast<uintptr_t>(at) / page * page;
    return mprotect(reinterpret_cast<void*>(begin), page, PROT_READ | PROT_WRITE) != 0;
}

// ==== the card and errors ========================================================================

long long setting(const char* name, long long otherwise) {
    const char* text = getenv(name);
    return text != nullptr && *text != '\0' ? atoll(text) : otherwise;
}

cudaError_t remember(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
}

namespace {

bool no_driver() {
    const char* devices = getenv("EMU_DEVICES");
    return devices != nullptr && strcmp(devices, "none") == 0;
}

int device_count() { return int(setting("EMU_DEVICES", 1)); }
int driver_version() { return no_driver() ? 0 : int(setting("EMU_DRIVER", CUDART_VERSION)); }
size_t card_bytes() { return size_t(setting("EMU_MEMORY", 4ll << 30)); }
int multiprocessors() { return int(setting("EMU_MULTIPROCESSORS", 2)); }

void capability(int* major, int* minor) {
    const char* text = getenv("EMU_CAPABILITY");
    *major = 8, *minor = 0;
    if (text != nullptr) sscanf(text, "%d.%d", major, minor);
}

// Shared memory of a multiprocessor [CUDA C++ Programming Guide, technical specifications per
// compute capability], and the most that a block of it gets.
int shared_processor() {
    int major, minor;
    capability(&major, &minor);
    if (major == 8) return (minor == 0 || minor == 7 ? 164 : 100) << 10;
    return (major == 12 ? 100 : 228) << 10;
}
int shared_most() { return shared_processor() - kSharedReserved; }

}  // namespace

cudaError_t card() {
    if (driver_version() / 1000 < CUDART_VERSION / 1000) return cudaErrorInsufficientDriver;
    return device_count() == 0 ? cudaErrorNoDevice : cudaSuccess;
}

// ==== launches ===================================================================================

namespace {

// Says why a GPU would refuse the launch.
__attribute__((format(printf, 3, 4))) cudaError_t refuse(const Launch& launch, cudaError_t status,
                                                         const char* pattern, ...) {
    va_list args;
    va_start(args, pattern);
    fprintf(stderr, "emu: launch of %s refused: ", launch.name);
    vfprintf(stderr, pattern, args);
    fputc('\n', stderr);
    va_end(args);
    return remember(status);
}

cudaError_t check_limits(const Launch& launch) {
    const dim3 &grid = launch.grid, &block = launch.block;
    if (cudaError_t status = card(); status != cudaSuccess)
        return refuse(launch, status, "no card that can run it");
    int major, minor;
    capability(&major, &minor);
    if (major < 8)
        return refuse(launch, cudaErrorNoKernelImageForDevice,
                      "compiled for compute capability 8.0, the card has %d.%d", major, minor);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0)
        return refuse(launch, cudaErrorInvalidConfiguration,
                      "grid (%u,%u,%u) of blocks (%u,%u,%u) has a zero", grid.x, grid.y, grid.z,
                      block.x, block.y, block.z);
    if (uint64_t(block.x) * block.y * block.z > kThreadsMost || block.x > kThreadsMost ||
        block.y > kThreadsMost || block.z > 64)
        return refuse(launch, cudaErrorInvalidConfiguration,
                      "blocks of (%u,%u,%u) threads; the limit is %d together, 64 in z", block.x,
                      block.y, block.z, kThreadsMost);
    if (grid.x > unsigned(INT_MAX) || grid.y > kGridMost || grid.z > kGridMost)
        return refuse(launch, cudaErrorInvalidConfiguration,
                      "grid (%u,%u,%u); the limit in y and z is %u", grid.x, grid.y, grid.z,
                      kGridMost);
    auto found = shared_limits.find(launch.kernel);
    size_t limit = size_t(found == shared_limits.end() ? kSharedDefault : found->second);
    if (launch.shared_bytes > limit)
        return refuse(
            launch, cudaErrorInvalidValue,
            "%zu bytes of shared memory; its limit is %zu (cudaFuncSetAttribute raises it "
            "up to %d)",
            launch.shared_bytes, limit, shared_most());
    return cudaSuccess;
}

// Device memory that words of a structure name. It is taken to be read.
void add_hidden_uses(std::vector<Use>* uses, const char* structure, size_t bytes) {
    for (size_t at = 0; at + sizeof(void*) <= bytes; at += sizeof(void*)) {
        const char* word;
        memcpy(&word, structure + at, sizeof(word));
        const Allocation* found = find(word);
        if (found != nullptr && !found->pinned) uses->push_back({word, 1, false, true});
    }
}

// A pointer that the kernel is given must be null, of the device, or of pinned memory, which a
// card reaches too. Only device memory has an order to keep.
std::vector<Use> uses_of(const Launch& launch) {
    std::vector<Use> uses;
    for (int i = 0; i < launch.argument_count; i++) {
        const Argument& argument = launch.arguments[i];
        if (argument.pointer == nullptr) continue;
        if (argument.bytes != 0) {
            add_hidden_uses(&uses, static_cast<const char*>(argument.pointer), argument.bytes);
            continue;
        }
        const Allocation* found = find(argument.pointer);
        if (found == nullptr) {
            // One past the last byte is where an empty range may begin.
            const char* at = static_cast<const char*>(argument.pointer);
            if (find(at - 1) != nullptr) continue;
            die("launches kernel %s, whose argument %d points outside device memory (%p)",
                launch.name, i + 1, argument.pointer);
        }
        if (!found->pinned)
            uses.push_back({static_cast<const char*>(argument.pointer), 1, !argument.constant});
    }
    return uses;
}

}  // namespace

void run(const Launch& launch) {
    std::lock_guard lock(runtime_lock);
    if (check_limits(launch) != cudaSuccess) return;
    std::string name = std::string("kernel ") + launch.name;
    long long wish = setting("EMU_ORDER", 0);
    Order order = wish == 1 ? Order::reverse : wish == 2 ? Order::random : Order::forward;
    static uint64_t launches = 0;
    uint64_t seed = uint64_t(setting("EMU_SEED", 1)) * 1000003 + launches++;
    std::shared_ptr<void> values = launch.keep(launch.values);
    Launch kept = launch;
    kept.values = values.get();
    kept.arguments = nullptr;
    enqueue(launch.stream, name.c_str(), uses_of(launch), true, [=] {
        (void)values;  // `kept` points there
        run_grid(kept, order, seed);
        check_surroundings(("after kernel " + std::string(kept.name)).c_str());
        return true;
    });
}

// ==== copies =====================================================================================

namespace {

// Whether [p, p + bytes) is device memory; says so where it runs out of its allocation.
enum class Place { host, pinned, device, wrong };
Place place_of(const void* p, size_t bytes, const char* what) {
    const Allocation* found = find(p);
    if (found == nullptr) return Place::host;
    size_t offset = size_t(static_cast<const char*>(p) - found->begin);
    if (offset + bytes > found->bytes) {
        fprintf(stderr, "emu: %s of %zu bytes at byte %zu of an allocation of %zu bytes\n", what,
                bytes, offset, found->bytes);
        return Place::wrong;
    }
    return found->pinned ? Place::pinned : Place::device;
}

bool matches(cudaMemcpyKind kind, bool to_device, bool from_device) {
    switch (kind) {
        case cudaMemcpyHostToHost:
            return !to_device && !from_device;
        case cudaMemcpyHostToDevice:
            return to_device && !from_device;
        case cudaMemcpyDeviceToHost:
            return !to_device && from_device;
        case cudaMemcpyDeviceToDevice:
            return to_device && from_device;
        default:
            return true;
    }
}

// What a copy does in its turn. To the device from pinned memory it lands later; from memory that
// the program may change after the call it takes the bytes along where it has to wait.
Step copy_step(void* to, const void* from, size_t bytes, bool in_flight, bool from_device) {
    if (in_flight)
        return [=] {
            memset(to, 0xff, bytes);
            return true;
        };
    if (from_device || unfinished.empty())
        return [=] {
            memmove(to, from, bytes);
            return true;
        };
    const char* begin = static_cast<const char*>(from);
    return [to, staged = std::vector<char>(begin, begin + bytes)] {
        memcpy(to, staged.data(), staged.size());
        return true;
    };
}

// A synchronous copy to the device from pageable memory returns once the bytes are staged; they are
// written later, in the order of its stream [CUDA Runtime API, API synchronization behavior].
Step staged_step(void* to, const void* from, size_t bytes) {
    const char* begin = static_cast<const char*>(from);
    return [to, staged = std::vector<char>(begin, begin + bytes)] {
        memset(to, 0xff, staged.size());
        write_late(static_cast<char*>(to), staged);
        return true;
    };
}

// One between pinned and device memory stays in flight; every other happens at the call or in its
// turn, and one to pageable memory makes the host wait, as documented.
cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t handle,
                 bool synchronous) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (bytes == 0) return cudaSuccess;
    if (to == nullptr || from == nullptr) return remember(cudaErrorInvalidValue);
    Place target = place_of(to, bytes, "copy to"), source = place_of(from, bytes, "copy from");
    if (target == Place::wrong || source == Place::wrong) return remember(cudaErrorInvalidValue);
    bool to_device = target == Place::device, from_device = source == Place::device;
    if (!matches(kind, to_device, from_device)) {
        fprintf(stderr, "emu: a copy of kind %d to %s memory from %s memory\n", int(kind),
                to_device ? "device" : "host", from_device ? "device" : "host");
        return remember(cudaErrorInvalidValue);
    }
    std::vector<Use> uses;
    if (to_device) uses.push_back({static_cast<char*>(to), bytes, true});
    if (from_device) uses.push_back({static_cast<const char*>(from), bytes, false});
    if (synchronous && to_device && source == Place::host) {
        Stream* stream = find_stream(handle);
        catch_up(stream);
        host_waits(stream->seen);
        return enqueue(handle, "a copy", uses, false, staged_step(to, from, bytes));
    }
    bool in_flight = !synchronous && ((to_device && source == Place::pinned) ||
                                      (from_device && target == Place::pinned));
    bool at_once = synchronous || !to_device;  // when it is on the stream, the host goes on
    Step nothing = [] { return true; };
    cudaError_t status =
        enqueue(handle, "a copy", uses, false,
                at_once ? nothing : copy_step(to, from, bytes, in_flight, from_device));
    if (status != cudaSuccess) return status;
    Stream* stream = find_stream(handle);
    if (!in_flight && !at_once) return cudaSuccess;
    if (!in_flight && has_unfinished(stream->seen)) host_waits(stream->seen);
    DeviceAccess open;
    if (in_flight) {
        const Allocation& pinned = *find(to_device ? from : to);
        if (!to_device) {
            open_pinned(pinned);
            memset(to, 0xff, bytes);
        }
        pending.push_back({static_cast<char*>(to),
                           static_cast<const char*>(from),
                           bytes,
                           stream->id,
                           entry(stream->seen, stream->id),
                           to_device,
                           false,
                           {}});
        protect_pinned(pinned);
        return cudaSuccess;
    }
    if (synchronous && !to_device) host_waits(stream->seen);
    memmove(to, from, bytes);
    host_waits(stream->seen);
    return cudaSuccess;
}

cudaError_t copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                      size_t height, cudaMemcpyKind kind, cudaStream_t stream, bool synchronous) {
    if (width > to_pitch || width > from_pitch) return remember(cudaErrorInvalidValue);
    for (size_t row = 0; row < height; row++) {
        cudaError_t status = copy(static_cast<char*>(to) + row * to_pitch,
                                  static_cast<const char*>(from) + row * from_pitch, width, kind,
                                  stream, synchronous);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

cudaError_t set(void* to, int value, size_t bytes, cudaStream_t stream) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (bytes == 0) return cudaSuccess;
    if (place_of(to, bytes, "cudaMemset") != Place::device) return remember(cudaErrorInvalidValue);
    return enqueue(stream, "a cudaMemset", {{static_cast<char*>(to), bytes, true}}, false, [=] {
        memset(to, value, bytes);
        return true;
    });
}

}  // namespace

}  // namespace emu

using namespace emu;

extern "C" {

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return copy(to, from, bytes, kind, nullptr, true);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return copy(to, from, bytes, kind, stream, false);
}

cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width, size_t height, cudaMemcpyKind kind) {
    return copy_rows(to, to_pitch, from, from_pitch, width, height, kind, nullptr, true);
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
    return copy_rows(to, to_pitch, from, from_pitch, width, height, kind, stream, false);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) { return set(to, value, bytes, nullptr); }

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
    return set(to, value, bytes, stream);
}

// ==== the card ===================================================================================

cudaError_t cudaGetDeviceCount(int* count) {
    cudaError_t status = card();
    *count = status == cudaSuccess ? device_count() : 0;
    return remember(status);
}

cudaError_t cudaGetDevice(int* device) {
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (device < 0 || device >= device_count()) return remember(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (device < 0 || device >= device_count()) return remember(cudaErrorInvalidDevice);
    *properties = {};
    const char* name = getenv("EMU_NAME");
    snprintf(properties->name, sizeof(properties->name), "%s",
             name != nullptr ? name : "Emulated GPU");
    capability(&properties->major, &properties->minor);
    properties->totalGlobalMem = card_bytes();
    properties->multiProcessorCount = multiprocessors();
    properties->sharedMemPerBlock = kSharedDefault;
    properties->sharedMemPerBlockOptin = size_t(shared_most());
    properties->sharedMemPerMultiprocessor = size_t(shared_processor());
    properties->reservedSharedMemPerBlock = kSharedReserved;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = kThreadsMost;
    properties->maxThreadsPerMultiProcessor = kThreadsProcessor;
    properties->maxBlocksPerMultiProcessor = kBlocksProcessor;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = kThreadsMost;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = INT_MAX;
    properties->maxGridSize[1] = properties->maxGridSize[2] = int(kGridMost);
    properties->l2CacheSize = 40 << 20;
    properties->memoryBusWidth = 5120;
    properties->concurrentKernels = properties->unifiedAddressing = 1;
    properties->asyncEngineCount = 2;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp properties;
    cudaError_t status = cudaGetDeviceProperties(&properties, device);
    if (status != cudaSuccess) return status;
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
            *value = kThreadsMost;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlock:
            *value = kSharedDefault;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = shared_most();
            break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = shared_processor();
            break;
        case cudaDevAttrReservedSharedMemoryPerBlock:
            *value = kSharedReserved;
            break;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor:
            *value = 65536;
            break;
        case cudaDevAttrMaxThreadsPerMultiProcessor:
            *value = kThreadsProcessor;
            break;
        case cudaDevAttrMaxBlocksPerMultiprocessor:
            *value = kBlocksProcessor;
            break;
        case cudaDevAttrWarpSize:
            *value = 32;
            break;
        case cudaDevAttrMultiProcessorCount:
            *value = multiprocessors();
            break;
        case cudaDevAttrClockRate:
            *value = int(setting("EMU_CLOCK_KHZ", 1410000));
            break;
        case cudaDevAttrMemoryClockRate:
            *value = 1215000;
            break;
        case cudaDevAttrGlobalMemoryBusWidth:
            *value = properties.memoryBusWidth;
            break;
        case cudaDevAttrL2CacheSize:
            *value = properties.l2CacheSize;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = properties.major;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = properties.minor;
            break;
        default:
            return remember(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

// A variable of the device is one of the host here.
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                 cudaMemcpyKind) {
    memcpy(to, static_cast<const char*>(symbol) + offset, bytes);
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = driver_version();
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    host_waits_for_all();
    return cudaSuccess;
}

// Waits, and forgets the last error; what was allocated stays, unlike on a card.
cudaError_t cudaDeviceReset() {
    cudaError_t status = cudaDeviceSynchronize();
    last_error = cudaSuccess;
    return status;
}

cudaError_t cudaGetLastError() {
    cudaError_t status = last_error;
    last_error = cudaSuccess;
    return status;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

#define EMU_ERRORS(X)                                                                              \
    X(cudaSuccess, "no error")                                                                     \
    X(cudaErrorInvalidValue, "invalid argument")                                                   \
    X(cudaErrorMemoryAllocation, "out of memory")                                                  \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument")                             \
    X(cudaErrorInvalidDevicePointer, "invalid device pointer")                                     \
    X(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version") \
    X(cudaErrorInvalidDeviceFunction, "invalid device function")                                   \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected")                                     \
    X(cudaErrorInvalidDevice, "invalid device ordinal")                                            \
    X(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device") \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                   \
    X(cudaErrorNotReady, "device not ready")                                                       \
    X(cudaErrorNotSupported, "operation not supported")

const char* cudaGetErrorString(cudaError_t status) {
#define EMU_TEXT(name, text) \
    if (status == name) return text;
    EMU_ERRORS(EMU_TEXT)
#undef EMU_TEXT
    return "unknown error";
}

const char* cudaGetErrorName(cudaError_t status) {
#define EMU_NAME(name, text) \
    if (status == name) return #name;
    EMU_ERRORS(EMU_NAME)
#undef EMU_NAME
    return "cudaErrorUnknown";
}

// ==== memory =====================================================================================

// Whether this is the n-th cudaMalloc since EMU_FAIL_MALLOC was set to n.
static bool asked_to_fail() {
    static long long last = 0, count = 0;
    long long n = setting("EMU_FAIL_MALLOC", 0);
    if (n != last) last = n, count = 0;
    return ++count == n;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (pointer == nullptr) return remember(cudaErrorInvalidValue);
    *pointer = nullptr;
    if (asked_to_fail()) return remember(cudaErrorMemoryAllocation);
    if (bytes == 0) return cudaSuccess;
    if (bytes > card_bytes() || device_bytes_in_use() > card_bytes() - bytes)
        return remember(cudaErrorMemoryAllocation);
    *pointer = allocate(bytes, false);
    return *pointer == nullptr ? remember(cudaErrorMemoryAllocation) : cudaSuccess;
}

// Waits for everything first, as the real one does.
cudaError_t cudaFree(void* pointer) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (pointer == nullptr) return cudaSuccess;
    host_waits_for_all();
    return release(pointer, false) ? cudaSuccess : remember(cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (pointer == nullptr) return remember(cudaErrorInvalidValue);
    *pointer = bytes == 0 ? nullptr : allocate(bytes, true);
    return bytes != 0 && *pointer == nullptr ? remember(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
    return cudaHostAlloc(pointer, bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void* pointer) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (pointer == nullptr) return cudaSuccess;
    host_waits_for_all();
    return release(pointer, true) ? cudaSuccess : remember(cudaErrorInvalidValue);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    *total = card_bytes();
    *free = *total - std::min(*total, device_bytes_in_use());
    return cudaSuccess;
}

// ==== streams and events =========================================================================

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (least != nullptr) *least = kLeastPriority;
    if (greatest != nullptr) *greatest = kGreatestPriority;
    return cudaSuccess;
}

// A priority outside the range is taken to its nearest end, as documented.
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (handle == nullptr || (flags & ~unsigned(cudaStreamNonBlocking)) != 0)
        return remember(cudaErrorInvalidValue);
    default_stream();
    int id = int(streams.size());
    streams.push_back(std::make_unique<Stream>(
        Stream{id, (flags & cudaStreamNonBlocking) == 0, Clock(size_t(id) + 1, 0),
               std::clamp(priority, kGreatestPriority, kLeastPriority)}));
    *handle = reinterpret_cast<cudaStream_t>(streams.back().get());
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
    std::lock_guard lock(runtime_lock);
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return remember(cudaErrorInvalidResourceHandle);
    *priority = stream->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, kLeastPriority);
}

cudaError_t cudaStreamCreate(cudaStream_t* handle) {
    return cudaStreamCreateWithFlags(handle, cudaStreamDefault);
}

// Returns at once; what is on the stream still happens.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    std::lock_guard lock(runtime_lock);
    Stream* stream = find_stream(handle);
    if (stream == nullptr || stream->id == 0) return remember(cudaErrorInvalidResourceHandle);
    streams[size_t(stream->id)].reset();
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    std::lock_guard lock(runtime_lock);
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return remember(cudaErrorInvalidResourceHandle);
    catch_up(stream);
    host_waits(stream->seen);
    return cudaSuccess;
}

// The first question about work that the host has not waited for is answered with no.
cudaError_t cudaStreamQuery(cudaStream_t handle) {
    std::lock_guard lock(runtime_lock);
    Stream* stream = find_stream(handle);
    if (stream == nullptr) return remember(cudaErrorInvalidResourceHandle);
    run_unfinished();
    if (has_unfinished(stream->seen)) return cudaErrorNotReady;
    stream->asked = !stream->asked && !covers(host_seen, stream->seen);
    if (stream->asked) return cudaErrorNotReady;
    host_waits(stream->seen);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
    std::lock_guard lock(runtime_lock);
    Stream* stream = find_stream(handle);
    Event* event = reinterpret_cast<Event*>(event_handle);
    if (stream == nullptr || !events.contains(event))
        return remember(cudaErrorInvalidResourceHandle);
    merge(&stream->seen, event->at);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (handle == nullptr) return remember(cudaErrorInvalidValue);
    Event* event = new Event;
    event->timed = (flags & cudaEventDisableTiming) == 0;
    events.insert(event);
    *handle = reinterpret_cast<cudaEvent_t>(event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) {
    return cudaEventCreateWithFlags(handle, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    std::lock_guard lock(runtime_lock);
    Event* event = reinterpret_cast<Event*>(handle);
    if (events.erase(event) == 0) return remember(cudaErrorInvalidResourceHandle);
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
    std::lock_guard lock(runtime_lock);
    Stream* stream = find_stream(stream_handle);
    Event* event = reinterpret_cast<Event*>(handle);
    if (stream == nullptr || !events.contains(event))
        return remember(cudaErrorInvalidResourceHandle);
    catch_up(stream);
    event->at = stream->seen;
    event->recorded = true;
    event->asked = false;
    event->time = std::chrono::steady_clock::now();
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    std::lock_guard lock(runtime_lock);
    Event* event = reinterpret_cast<Event*>(handle);
    if (!events.contains(event)) return remember(cudaErrorInvalidResourceHandle);
    host_waits(event->at);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    std::lock_guard lock(runtime_lock);
    Event* event = reinterpret_cast<Event*>(handle);
    if (!events.contains(event)) return remember(cudaErrorInvalidResourceHandle);
    run_unfinished();
    if (has_unfinished(event->at)) return cudaErrorNotReady;
    event->asked = !event->asked && !covers(host_seen, event->at);
    if (event->asked) return cudaErrorNotReady;
    host_waits(event->at);
    return cudaSuccess;
}

// The time that the host took between the two records. Not ready: the host has not waited for both.
cudaError_t cudaEventElapsedTime(float* time_ms, cudaEvent_t start_handle, cudaEvent_t end_handle) {
    std::lock_guard lock(runtime_lock);
    Event* start = reinterpret_cast<Event*>(start_handle);
    Event* end = reinterpret_cast<Event*>(end_handle);
    if (!events.contains(start) || !events.contains(end) || !start->recorded || !end->recorded ||
        !start->timed || !end->timed)
        return remember(cudaErrorInvalidResourceHandle);
    if (!covers(host_seen, start->at) || !covers(host_seen, end->at))
        return remember(cudaErrorNotReady);
    *time_ms = std::chrono::duration<float, std::milli>(end->time - start->time).count();
    return cudaSuccess;
}

// ==== kernels ====================================================================================

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (kernel == nullptr) return remember(cudaErrorInvalidDeviceFunction);
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
        value > shared_most())
        return remember(cudaErrorInvalidValue);
    shared_limits[kernel] = std::max(value, kSharedDefault);
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    std::lock_guard lock(runtime_lock);
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (kernel == nullptr) return remember(cudaErrorInvalidDeviceFunction);
    int major, minor;
    capability(&major, &minor);
    if (major < 8) return remember(cudaErrorNoKernelImageForDevice);
    *attributes = {};
    attributes->maxThreadsPerBlock = kThreadsMost;
    attributes->numRegs = 64;
    attributes->ptxVersion = attributes->binaryVersion = 80;
    auto found = shared_limits.find(kernel);
    attributes->maxDynamicSharedSizeBytes =
        found == shared_limits.end() ? kSharedDefault : found->second;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel,
                                                                   int threads, size_t shared_bytes,
                                                                   unsigned) {
    if (cudaError_t status = card(); status != cudaSuccess) return remember(status);
    if (kernel == nullptr || threads < 1) return remember(cudaErrorInvalidValue);
    int by_threads = kThreadsProcessor / ((threads + 31) / 32 * 32);
    int by_shared = int(size_t(shared_processor()) / (shared_bytes + kSharedReserved));
    *blocks = threads > kThreadsMost ? 0 : std::min({by_threads, by_shared, kBlocksProcessor});
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared_bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads,
                                                                  shared_bytes, 0);
}

}  // extern "C"
