// NCCL's prototypes, defined on the CPU, between real processes of this machine.
//
// A call is announced to the other ranks at once and put on its stream like a kernel; the host call
// returns. When all that the stream has waited for has ended, its turn comes: what it sends is
// copied into memory that the ranks share, and what it receives into holds 0xFF. It ends when every
// rank's turn has come, even where the real one would not wait for all; its result is written when
// something ordered after it begins (runtime.cpp). The calls of one communicator have their turns
// in the order of the calls, one group at a time, whatever their streams.
//
// Ranks that call different things would wait for ever, or read nonsense: here both end with a
// sentence. A rank that dies makes those who need it report ncclRemoteError; their streams are busy
// until ncclCommAbort, as a real kernel that spins is.
//
// Sums go round the ring, as they do in the real library [Patarasuk and Yuan 2009], and each hop
// rounds: the part for rank c begins with rank c + 1 and ends with rank c. ncclAllReduce deals
// parts of kPart elements to the ranks in turn, so that its bits are not those of ncclReduceScatter
// (where there are three ranks and more); ncclReduce ends with the root. EMU_NCCL_ORDER=plain:
// every sum goes from rank 0 up.

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <string>

#include "nccl_internal.h"

using namespace emu;

namespace {

// One call as its own rank knows it.
struct Part {
    Kind kind;
    const char* send;
    char* recv;
    size_t count;
    ncclDataType_t type;
    ncclRedOp_t op;
    int root;         // or the peer of a send or receive
    uint64_t number;  // in its channel
    long long call;   // of all of the communicator's
    bool posted, over;
};

}  // namespace

struct ncclComm {
    Ranks ranks;
    ncclUniqueId id;
    int device = 0;
    bool blocking = true, ready = false, aborted = false, finalized = false;
    ncclResult_t error = ncclSuccess;  // asynchronous
    int busy_answers = 0;              // ncclInProgress to give before it is ready for more
    long long calls = 0;
    uint64_t groups = 0, groups_over = 0;
    timespec looked = {};  // when the other ranks' health was last looked at
    int me() const { return ranks.me(); }
    int count() const { return ranks.count(); }
};

namespace {

constexpr size_t kPart = 1024;
constexpr long kLook_ns = 5'000'000;

std::set<std::shared_ptr<ncclComm>> communicators;
std::string last_error;

struct Group {
    int depth = 0;
    ncclResult_t error = ncclSuccess;
    std::vector<std::pair<std::shared_ptr<ncclComm>, std::pair<Part, cudaStream_t>>> calls;
    std::vector<std::shared_ptr<ncclComm>> joining;
};
thread_local Group group;

__attribute__((format(printf, 1, 2))) std::string say(const char* pattern, ...) {
    char text[600];
    va_list args;
    va_start(args, pattern);
    vsnprintf(text, sizeof(text), pattern, args);
    va_end(args);
    return text;
}

// Says on stderr why a call is refused, and keeps it for ncclGetLastError().
ncclResult_t refuse(const char* function, ncclResult_t status, const std::string& why) {
    last_error = say("%s refuses %s", function, why.c_str());
    fprintf(stderr, "emu: %s\n", last_error.c_str());
    return status;
}

std::shared_ptr<ncclComm> find_comm(ncclComm_t handle) {
    for (const auto& comm : communicators)
        if (comm.get() == handle) return comm;
    return nullptr;
}

// An error that no call returns.
void report(ncclComm* comm, ncclResult_t status, const std::string& why) {
    if (comm->error != ncclSuccess) return;
    comm->error = status;
    last_error = why;
    fprintf(stderr, "emu: rank %d: %s\n", comm->me(), why.c_str());
}

// ==== what is called =============================================================================

bool reduces(Kind kind) {
    return kind == Kind::all_reduce || kind == Kind::reduce_scatter || kind == Kind::reduce;
}
bool has_root(Kind kind) { return kind == Kind::broadcast || kind == Kind::reduce; }
bool is_pair(Kind kind) { return kind == Kind::send || kind == Kind::receive; }

const char* function_of(Kind kind) {
    static const char* const kNames[] = {"ncclAllReduce", "ncclReduceScatter", "ncclAllGather",
                                         "ncclBroadcast", "ncclReduce",        "ncclSend",
                                         "ncclRecv"};
    return kNames[int(kind)];
}

std::string describe(Kind kind, uint64_t count, ncclDataType_t type, ncclRedOp_t op, int root) {
    std::string text = say("%s of %llu %s", function_of(kind),
                           static_cast<unsigned long long>(count), name_of(type));
    if (reduces(kind)) text += say(", %s", name_of(op));
    if (has_root(kind)) text += say(", root %d", root);
    return text;
}
std::string describe(const Call& c) {
    std::string text = describe(c.kind, c.count, c.type, c.op, c.root);
    if (!is_pair(c.kind) && c.group > 1) text += say(", %u of a group of %u", c.part + 1, c.group);
    return text;
}

// Elements that this rank sends and receives.
size_t sends(const ncclComm& comm, const Part& p) {
    if (p.kind == Kind::receive || (p.kind == Kind::broadcast && p.root != comm.me())) return 0;
    return p.kind == Kind::reduce_scatter ? p.count * size_t(comm.count()) : p.count;
}
size_t receives(const ncclComm& comm, const Part& p) {
    if (p.kind == Kind::send || (p.kind == Kind::reduce && p.root != comm.me())) return 0;
    return p.kind == Kind::all_gather ? p.count * size_t(comm.count()) : p.count;
}

Channel& channel_of(const ncclComm& comm, const Part& p) {
    if (p.kind == Kind::send) return comm.ranks.sends(comm.me(), p.root);
    if (p.kind == Kind::receive) return comm.ranks.receives(p.root, comm.me());
    return comm.ranks.collectives(comm.me());
}

// ==== both sides, held against each other ========================================================

// Ends the program where call `number` of two ranks cannot meet.
void compare_collective(const ncclComm& comm, uint64_t number, int peer) {
    const Call& mine = comm.ranks.collectives(comm.me()).ring[number % kRing];
    const Call& other = comm.ranks.collectives(peer).ring[number % kRing];
    bool same = mine.kind == other.kind && mine.type == other.type && mine.count == other.count &&
                (!reduces(mine.kind) || mine.op == other.op) && mine.root == other.root &&
                mine.group == other.group && mine.part == other.part;
    if (!same)
        die("calls on rank %d as collective %llu %s, where rank %d calls %s", comm.me(),
            static_cast<unsigned long long>(number + 1), describe(mine).c_str(), peer,
            describe(other).c_str());
}

void compare_pair(const ncclComm& comm, uint64_t number, const Channel& a, const Channel& b,
                  int peer) {
    const Call &mine = a.ring[number % kRing], &other = b.ring[number % kRing];
    if (mine.type != other.type || mine.count != other.count)
        die("calls on rank %d as number %llu to or from rank %d %s, where rank %d calls %s",
            comm.me(), static_cast<unsigned long long>(number + 1), peer, describe(mine).c_str(),
            peer, describe(other).c_str());
}

template <class F>
void compare_new(std::atomic<uint64_t>* done, const Channel& a, const Channel& b, F compare) {
    uint64_t known = std::min(a.announced.load(), b.announced.load());
    for (uint64_t k = done->load(); k < known; k++) {
        compare(k);
        done->store(k + 1);
    }
}

// All calls that have become known on both sides.
void compare_all(const ncclComm& comm) {
    int me = comm.me();
    Rank& mine = comm.ranks.rank(me);
    for (int r = 0; r < comm.count(); r++) {
        const Channel &a = comm.ranks.collectives(me), &b = comm.ranks.collectives(r);
        compare_new(&mine.compared[r], a, b, [&](uint64_t k) { compare_collective(comm, k, r); });
        const Channel &in = comm.ranks.receives(r, me), &from = comm.ranks.sends(r, me);
        compare_new(&mine.compared_pair[r], in, from,
                    [&](uint64_t k) { compare_pair(comm, k, in, from, r); });
        const Channel &out = comm.ranks.sends(me, r), &to = comm.ranks.receives(me, r);
        compare_new(&mine.compared_back[r], out, to,
                    [&](uint64_t k) { compare_pair(comm, k, out, to, r); });
    }
}

// Whether the place of call `number` in its ring is free: all are done with what it held.
bool has_place(const ncclComm& comm, const Part& p, uint64_t number) {
    if (number < kRing) return true;
    uint64_t old = number - kRing;
    int me = comm.me();
    // Both sides read both places to compare them.
    auto free = [old](const Channel& other, const std::atomic<uint64_t>& theirs,
                      const std::atomic<uint64_t>& mine) {
        return other.ended.load() > old && theirs.load() > old && mine.load() > old;
    };
    if (channel_of(comm, p).ended.load() <= old) return false;
    const Rank &mine = comm.ranks.rank(me), &peer = comm.ranks.rank(is_pair(p.kind) ? p.root : me);
    if (p.kind == Kind::send)
        return free(comm.ranks.receives(me, p.root), peer.compared_pair[me],
                    mine.compared_back[p.root]);
    if (p.kind == Kind::receive)
        return free(comm.ranks.sends(p.root, me), peer.compared_back[me],
                    mine.compared_pair[p.root]);
    for (int r = 0; r < comm.count(); r++)
        if (!free(comm.ranks.collectives(r), comm.ranks.rank(r).compared[me], mine.compared[r]))
            return false;
    return true;
}

// ==== the health of the others ===================================================================

// The ranks whose turn must come before the part is over.
std::vector<int> awaited(const ncclComm& comm, const Part& p) {
    std::vector<int> ranks;
    for (int r = 0; r < comm.count(); r++) {
        if (r == comm.me() || (is_pair(p.kind) && r != p.root)) continue;
        const Channel& channel = p.kind == Kind::send      ? comm.ranks.receives(comm.me(), r)
                                 : p.kind == Kind::receive ? comm.ranks.sends(r, comm.me())
                                                           : comm.ranks.collectives(r);
        if (channel.ring[p.number % kRing].posted.load() < p.number + 1) ranks.push_back(r);
    }
    return ranks;
}

// Whether the time has come to look again.
bool looks(ncclComm* comm) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long passed =
        (now.tv_sec - comm->looked.tv_sec) * 1'000'000'000 + now.tv_nsec - comm->looked.tv_nsec;
    if (comm->looked.tv_sec != 0 && passed < kLook_ns) return false;
    comm->looked = now;
    return true;
}

// Reports a rank that the part waits for and that will not come.
void check_health(ncclComm* comm, const Part& p) {
    bool sees = setting("EMU_NCCL_DETECT", 1) != 0;
    for (int r : awaited(*comm, p)) {
        const Rank& rank = comm->ranks.rank(r);
        std::string what = describe(p.kind, p.count, p.type, p.op, p.root);
        Left left = rank.left.load();
        bool dead = left == Left::no && !comm->ranks.alive(r);
        // What it did before it went is known by now.
        compare_all(*comm);
        std::vector<int> still = awaited(*comm, p);
        if (std::find(still.begin(), still.end(), r) == still.end()) continue;
        if (left == Left::destroyed)
            die("waits on rank %d in %s for rank %d, which has destroyed its communicator",
                comm->me(), what.c_str(), r);
        if (!sees) continue;
        const char* why = rank.failed.load() != 0 ? "has reported an error"
                          : left == Left::aborted ? "has aborted its communicator"
                          : dead                  ? "has ended"
                                                  : nullptr;
        if (why != nullptr)
            report(comm, ncclRemoteError,
                   say("waits in %s for rank %d (process %d), which %s", what.c_str(), r, rank.pid,
                       why));
    }
}

// ==== faults on demand ===========================================================================

// What EMU_NCCL_FAULT says about this call; empty: nothing. rank:call:what, more after commas.
std::string fault_at(int rank, long long call) {
    const char* text = getenv("EMU_NCCL_FAULT");
    std::string all = text != nullptr ? text : "";
    for (size_t at = 0; at < all.size();) {
        size_t end = std::min(all.find(',', at), all.size());
        int r = -1, used = 0;
        long long c = -1;
        std::string one = all.substr(at, end - at);
        if (sscanf(one.c_str(), "%d:%lld:%n", &r, &c, &used) != 2 || used == 0)
            die("cannot read EMU_NCCL_FAULT=%s: it is rank:call:die, stop, hang or error",
                all.c_str());
        std::string what = one.substr(size_t(used));
        if (what != "die" && what != "stop" && what != "hang" && what != "error")
            die("does not know the fault %s of EMU_NCCL_FAULT", what.c_str());
        if (r == rank && c == call) return what;
        at = end + 1;
    }
    return "";
}

// False: the call never happens.
bool survives(ncclComm* comm, long long call) {
    std::string fault = fault_at(comm->me(), call);
    if (fault == "die") kill(getpid(), SIGKILL);
    if (fault == "stop") kill(getpid(), SIGSTOP);
    if (fault == "error") {
        report(comm, ncclSystemError, "an error that EMU_NCCL_FAULT asked for");
        comm->ranks.rank(comm->me()).failed.store(1);
    }
    return fault.empty();
}

// ==== turns ======================================================================================

// Copies what the part sends to where all see it. False: no room yet.
bool post(ncclComm* comm, Part* p) {
    Channel& channel = channel_of(*comm, *p);
    Call& call = channel.ring[p->number % kRing];
    size_t bytes = sends(*comm, *p) * bytes_of(p->type);
    if (bytes > 0) {
        std::vector<const Channel*> over;
        if (p->kind == Kind::send) over = {&comm->ranks.receives(comm->me(), p->root)};
        for (int r = 0; p->kind != Kind::send && r < comm->count(); r++)
            over.push_back(&comm->ranks.collectives(r));
        char* to = comm->ranks.deposit(bytes, over, p->number, &call.offset);
        if (to == nullptr && call.offset == kRefused)
            report(comm, ncclSystemError,
                   say("no room for the %zu bytes that %s sends: set EMU_NCCL_DIR", bytes,
                       function_of(p->kind)));
        if (to == nullptr) return false;
        memcpy(to, p->send, bytes);
    }
    call.posted.store(p->number + 1);
    return p->posted = true;
}

// The inputs of all ranks' same call.
std::vector<const char*> inputs_of(const ncclComm& comm, const Part& p) {
    std::vector<const char*> inputs;
    for (int r = 0; r < comm.count(); r++) {
        const Call& call = comm.ranks.collectives(r).ring[p.number % kRing];
        inputs.push_back(comm.ranks.arena(r) + call.offset);
    }
    return inputs;
}

// Where the sum of the part for rank c begins.
int first_rank(const ncclComm& comm, size_t c) {
    bool plain = comm.ranks.header().plain_order != 0;
    return plain ? 0 : int((c + 1) % size_t(comm.count()));
}

void all_reduce(const ncclComm& comm, const Part& p, char* out) {
    std::vector<const char*> inputs = inputs_of(comm, p);
    size_t ranks = size_t(comm.count()), size = bytes_of(p.type);
    for (size_t turn = 0; turn < p.count; turn += kPart * ranks) {
        // The last turn is dealt in equal parts.
        size_t part = std::min(kPart, (p.count - turn + ranks - 1) / ranks);
        for (size_t c = 0; c < ranks && turn + c * part < p.count; c++) {
            size_t begin = turn + c * part, count = std::min(part, p.count - begin);
            reduce(out + begin * size, inputs.data(), int(ranks), first_rank(comm, c), begin, count,
                   p.type, p.op);
        }
    }
}

std::vector<char> result_of(const ncclComm& comm, const Part& p) {
    size_t size = bytes_of(p.type), bytes = p.count * size;
    std::vector<char> out(receives(comm, p) * size);
    if (p.kind == Kind::receive) {
        const Call& call = comm.ranks.sends(p.root, comm.me()).ring[p.number % kRing];
        memcpy(out.data(), comm.ranks.arena(p.root) + call.offset, bytes);
        return out;
    }
    std::vector<const char*> inputs = inputs_of(comm, p);
    if (p.kind == Kind::all_reduce) all_reduce(comm, p, out.data());
    if (p.kind == Kind::all_gather)
        for (size_t r = 0; r < inputs.size(); r++) memcpy(&out[r * bytes], inputs[r], bytes);
    if (p.kind == Kind::broadcast) memcpy(out.data(), inputs[size_t(p.root)], bytes);
    size_t mine = size_t(p.kind == Kind::reduce ? p.root : comm.me());
    size_t begin = p.kind == Kind::reduce ? 0 : mine * p.count;
    if (p.kind == Kind::reduce_scatter || p.kind == Kind::reduce)
        reduce(out.data(), inputs.data(), comm.count(), first_rank(comm, mine), begin, p.count,
               p.type, p.op);
    return out;
}

// What is received has not come yet, or never will.
void spoil(const ncclComm& comm, const std::vector<Part>& parts) {
    for (const Part& p : parts)
        if (size_t bytes = receives(comm, p) * bytes_of(p.type)) memset(p.recv, 0xff, bytes);
}

// Their turn has come: everything is read before anything is overwritten.
bool begin_parts(ncclComm* comm, std::vector<Part>* parts) {
    for (Part& p : *parts)
        if (!p.posted && (!survives(comm, p.call) || !post(comm, &p))) return false;
    spoil(*comm, *parts);
    return true;
}

struct Turn {
    std::shared_ptr<ncclComm> comm;
    std::vector<Part> parts;
    uint64_t number;
    bool begun = false;
};

// Whether the group is over.
bool take_turn(Turn* turn) {
    ncclComm* comm = turn->comm.get();
    if (comm->aborted) {
        if (!turn->begun) spoil(*comm, turn->parts);
        return true;
    }
    compare_all(*comm);
    if (comm->error != ncclSuccess || comm->groups_over != turn->number) return false;
    if (!turn->begun && !begin_parts(comm, &turn->parts)) return false;
    turn->begun = true;
    bool all = true, look = looks(comm);
    for (Part& p : turn->parts) {
        if (p.over) continue;
        p.over = p.count == 0 || awaited(*comm, p).empty();
        all &= p.over;
        if (!p.over && look) check_health(comm, p);
        if (p.over) compare_all(*comm);  // the last may have called only now
        if (p.over && receives(*comm, p) > 0) write_late(p.recv, result_of(*comm, p));
    }
    if (!all) return false;
    for (const Part& p : turn->parts) channel_of(*comm, p).ended.store(p.number + 1);
    comm->groups_over++;
    return true;
}

// ==== calls ======================================================================================

// Ends the program where the memory of the call is none that it can use.
void check_memory(const ncclComm& comm, const Part& p) {
    size_t size = bytes_of(p.type);
    size_t send_bytes = sends(comm, p) * size, recv_bytes = receives(comm, p) * size;
    struct {
        const char* name;
        const char* begin;
        size_t bytes;
    } ranges[] = {{"a send buffer", p.send, send_bytes}, {"a receive buffer", p.recv, recv_bytes}};
    for (const auto& r : ranges) {
        if (r.bytes == 0) continue;
        const Allocation* found = find(r.begin);
        if (found == nullptr || found->pinned)
            die("gives %s %s at %p, which is no device memory", function_of(p.kind), r.name,
                static_cast<const void*>(r.begin));
        size_t offset = size_t(r.begin - found->begin);
        if (offset + r.bytes > found->bytes)
            die("gives %s %s of %zu bytes at byte %zu of an allocation of %zu bytes",
                function_of(p.kind), r.name, r.bytes, offset, found->bytes);
        if (reinterpret_cast<uintptr_t>(r.begin) % size != 0)
            die("gives %s %s at %p, which is not aligned to its elements of %zu bytes",
                function_of(p.kind), r.name, static_cast<const void*>(r.begin), size);
    }
    if (send_bytes == 0 || recv_bytes == 0) return;
    size_t mine = size_t(comm.me()) * p.count * size;
    const char* in_place = p.kind == Kind::reduce_scatter ? p.send + mine : p.send;
    const char* recv = p.kind == Kind::all_gather ? p.recv + mine : p.recv;
    bool overlaps = p.send < p.recv + recv_bytes && p.recv < p.send + send_bytes;
    if (overlaps && recv != in_place)
        die("gives %s buffers that overlap and are not in place: it sends %zu bytes at %p and "
            "receives %zu at %p",
            function_of(p.kind), send_bytes, static_cast<const void*>(p.send), recv_bytes,
            static_cast<const void*>(p.recv));
}

// Tells the other ranks; waits where one of them is kRing calls behind.
void announce(ncclComm* comm, Part* p, uint32_t group_size, uint32_t index) {
    Channel& channel = channel_of(*comm, *p);
    p->number = channel.announced.load();
    host_blocks([&] {
        compare_all(*comm);
        return comm->aborted || comm->error != ncclSuccess || has_place(*comm, *p, p->number);
    });
    if (!has_place(*comm, *p, p->number)) return;  // nobody will take part any more
    Call& call = channel.ring[p->number % kRing];
    call.kind = p->kind;
    call.type = p->type;
    call.op = p->op;
    call.root = has_root(p->kind) ? p->root : -1;
    call.group = group_size;
    call.part = index;
    call.count = p->count;
    call.offset = 0;
    channel.announced.store(p->number + 1);
}

// Puts calls on their streams as one operation.
ncclResult_t submit(const std::shared_ptr<ncclComm>& comm, std::vector<Part> parts,
                    const std::vector<cudaStream_t>& streams) {
    uint32_t collectives = 0, index = 0;
    for (const Part& p : parts) collectives += !is_pair(p.kind);
    for (Part& p : parts) {
        p.call = ++comm->calls;
        announce(comm.get(), &p, collectives, is_pair(p.kind) ? 0 : index++);
    }
    compare_all(*comm);
    std::vector<Use> uses;
    for (const Part& p : parts) {
        size_t size = bytes_of(p.type);
        if (size_t bytes = sends(*comm, p) * size) uses.push_back({p.send, bytes, false});
        if (size_t bytes = receives(*comm, p) * size) uses.push_back({p.recv, bytes, true});
    }
    const char* name = parts.size() == 1 ? function_of(parts[0].kind) : "a group of NCCL calls";
    auto turn = std::make_shared<Turn>(Turn{comm, std::move(parts), comm->groups++});
    join_streams(streams);
    if (enqueue(streams[0], name, uses, false, [turn] { return take_turn(turn.get()); }) !=
        cudaSuccess)
        return ncclUnhandledCudaError;
    join_streams(streams);
    comm->busy_answers = comm->blocking ? 0 : 1;
    return comm->blocking ? ncclSuccess : ncclInProgress;
}

// What is wrong with the arguments; null: nothing.
const char* find_mistake(const ncclComm& comm, const Part& p) {
    if (bytes_of(p.type) == 0) return "a data type that is not emulated, or none";
    if (reduces(p.kind) && (p.op < 0 || p.op >= ncclNumOps)) return "an operation that is none";
    bool names_rank = has_root(p.kind) || is_pair(p.kind);
    if (names_rank && (p.root < 0 || p.root >= comm.count())) return "a root or peer that is none";
    if (sends(comm, p) > 0 && p.send == nullptr) return "a send buffer that is null";
    if (receives(comm, p) > 0 && p.recv == nullptr) return "a receive buffer that is null";
    return nullptr;
}

ncclResult_t check_call(const ncclComm* comm, const Part& p, cudaStream_t stream) {
    const char* function = function_of(p.kind);
    if (comm == nullptr) return refuse(function, ncclInvalidArgument, "no communicator");
    if (!comm->ready || comm->busy_answers > 0)
        return refuse(function, ncclInvalidArgument,
                      "a communicator that has said ncclInProgress, and not yet ncclSuccess to "
                      "ncclCommGetAsyncError");
    if (comm->finalized) return refuse(function, ncclInvalidArgument, "a finalized communicator");
    if (comm->error != ncclSuccess) return comm->error;
    if (const char* mistake = find_mistake(*comm, p))
        return refuse(function, ncclInvalidArgument, mistake);
    if (!join_streams({stream})) return refuse(function, ncclInvalidArgument, "no such stream");
    check_memory(*comm, p);
    return ncclSuccess;
}

// Every collective's, send's and receive's call.
ncclResult_t call(Kind kind, const void* send, void* recv, size_t count, ncclDataType_t type,
                  ncclRedOp_t op, int root, ncclComm_t handle, cudaStream_t stream) {
    std::lock_guard lock(runtime_lock);
    std::shared_ptr<ncclComm> comm = find_comm(handle);
    Part part = {kind,
                 static_cast<const char*>(send),
                 static_cast<char*>(recv),
                 count,
                 type,
                 op,
                 root,
                 0,
                 0,
                 false,
                 false};
    ncclResult_t status = check_call(comm.get(), part, stream);
    if (group.depth > 0) {
        if (status != ncclSuccess && group.error == ncclSuccess) group.error = status;
        if (status == ncclSuccess) group.calls.push_back({comm, {part, stream}});
        return status;
    }
    if (status != ncclSuccess) return status;
    return submit(comm, {part}, {stream});
}

// ==== communicators ==============================================================================

// ncclInProgress until all ranks are there.
ncclResult_t advance_init(ncclComm* comm) {
    if (comm->ready || comm->error != ncclSuccess) return comm->error;
    std::string why;
    ncclResult_t status = comm->ranks.wait(&why);
    comm->ready = status == ncclSuccess;
    if (status == ncclSuccess || status == ncclInProgress) return status;
    comm->error = status;
    return refuse("ncclCommInitRank", status, why);
}

// Blocks until all ranks are there; a communicator that fails is gone.
ncclResult_t finish_init(const std::shared_ptr<ncclComm>& comm, ncclComm_t* out) {
    host_blocks([&comm] { return advance_init(comm.get()) != ncclInProgress; });
    if (comm->error == ncclSuccess) return ncclSuccess;
    if (out != nullptr) *out = nullptr;
    communicators.erase(comm);
    return comm->error;
}

bool is_member(const ncclUniqueId& id) {
    for (const auto& comm : communicators)
        if (!comm->ready && memcmp(&comm->id, &id, sizeof(id)) == 0) return true;
    return false;
}

ncclResult_t init(ncclComm_t* out, int ranks, const ncclUniqueId& id, int rank,
                  const ncclConfig_t* config) {
    constexpr const char* kFunction = "ncclCommInitRank";
    std::lock_guard lock(runtime_lock);
    if (card() != cudaSuccess) return refuse(kFunction, ncclUnhandledCudaError, "no card");
    if (out == nullptr) return refuse(kFunction, ncclInvalidArgument, "a null pointer");
    *out = nullptr;
    if (ranks < 1 || rank < 0 || rank >= ranks)
        return refuse(kFunction, ncclInvalidArgument, say("rank %d of %d", rank, ranks));
    if (ranks > kMostRanks)
        return refuse(kFunction, ncclInvalidArgument,
                      say("%d ranks: the emulator has at most %d", ranks, kMostRanks));
    if (is_member(id))
        return refuse(kFunction, ncclInvalidUsage, "a second rank in one process: start another");
    auto comm = std::make_shared<ncclComm>();
    comm->id = id;
    if (config != nullptr) {
        ncclConfig_t expected = NCCL_CONFIG_INITIALIZER;
        if (config->size != expected.size || config->magic != expected.magic ||
            config->version != expected.version ||
            (config->blocking != NCCL_CONFIG_UNDEF_INT && config->blocking != 0 &&
             config->blocking != 1))
            return refuse(kFunction, ncclInvalidArgument,
                          "a configuration that NCCL_CONFIG_INITIALIZER did not begin, or whose "
                          "blocking is neither 0 nor 1");
        comm->blocking = config->blocking != 0;
    }
    cudaGetDevice(&comm->device);
    std::string why;
    ncclResult_t status = comm->ranks.join(id, ranks, rank, comm->device, &why);
    if (status != ncclSuccess) return refuse(kFunction, status, why);
    survives(comm.get(), 0);
    comm->ranks.arrive();
    communicators.insert(comm);
    *out = comm.get();
    if (group.depth > 0) {
        group.joining.push_back(comm);
        return ncclSuccess;
    }
    if (!comm->blocking) return comm->busy_answers = 1, ncclInProgress;
    return finish_init(comm, out);
}

// Whether all that was called has ended.
bool is_quiet(const ncclComm& comm) { return comm.groups_over == comm.groups; }

// Nothing more will end on a communicator that has failed: only ncclCommAbort ends that.
void check_end(const char* function, const ncclComm& comm) {
    if (comm.error != ncclSuccess && !is_quiet(comm))
        die("calls %s on rank %d, whose communicator has failed, while its collectives wait: "
            "ncclCommAbort ends them",
            function, comm.me());
}

// Within a group the end of a communicator is put off until that of the group.
void check_outside_group(const char* function) {
    if (group.depth > 0) die("calls %s inside of a group that has begun, and not ended", function);
}

void leave(const std::shared_ptr<ncclComm>& comm, Left how) {
    comm->ranks.rank(comm->me()).left.store(how);
    communicators.erase(comm);
}

ncclResult_t end_group() {
    Group ended = std::move(group);
    group = {};
    if (ended.error != ncclSuccess) {
        for (const auto& comm : ended.joining) communicators.erase(comm);
        return ended.error;
    }
    ncclResult_t result = ncclSuccess;
    for (const auto& comm : ended.joining) {
        ncclResult_t status = ncclInProgress;
        if (comm->blocking) status = finish_init(comm, nullptr);
        else comm->busy_answers = 1;
        if (result == ncclSuccess) result = status;
    }
    std::vector<std::shared_ptr<ncclComm>> order;
    for (const auto& [comm, rest] : ended.calls)
        if (std::find(order.begin(), order.end(), comm) == order.end()) order.push_back(comm);
    for (const auto& comm : order) {
        std::vector<Part> parts;
        std::vector<cudaStream_t> streams;
        for (const auto& [other, rest] : ended.calls) {
            if (other != comm) continue;
            parts.push_back(rest.first);
            streams.push_back(rest.second);
        }
        ncclResult_t status = submit(comm, std::move(parts), streams);
        if (result == ncclSuccess) result = status;
    }
    return result;
}

}  // namespace

// ==== the library's functions ====================================================================

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
    if (version == nullptr) return ncclInvalidArgument;
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    std::lock_guard lock(runtime_lock);
    if (id == nullptr) return ncclInvalidArgument;
    make_unique_id(id);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    return init(comm, ranks, id, rank, nullptr);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
    return init(comm, ranks, id, rank, config);
}

// A communicator that does not block first says once that it is busy, as the real one may.
ncclResult_t ncclCommGetAsyncError(ncclComm_t handle, ncclResult_t* error) {
    std::lock_guard lock(runtime_lock);
    std::shared_ptr<ncclComm> comm = find_comm(handle);
    if (comm == nullptr || error == nullptr)
        return refuse("ncclCommGetAsyncError", ncclInvalidArgument, "a null pointer");
    run_unfinished();
    *error = advance_init(comm.get());
    if (*error != ncclSuccess) return ncclSuccess;
    if (comm->busy_answers > 0) {
        comm->busy_answers--;
        *error = ncclInProgress;
    } else if (comm->finalized && !is_quiet(*comm)) {
        *error = ncclInProgress;
    }
    return ncclSuccess;
}

// Waits for what was called, unless the communicator does not block.
ncclResult_t ncclCommFinalize(ncclComm_t handle) {
    std::lock_guard lock(runtime_lock);
    std::shared_ptr<ncclComm> comm = find_comm(handle);
    if (comm == nullptr || !comm->ready || comm->finalized || comm->busy_answers > 0)
        return refuse("ncclCommFinalize", ncclInvalidArgument,
                      "a communicator that is none, not ready, or finalized");
    check_end("ncclCommFinalize", *comm);
    comm->finalized = true;
    if (!comm->blocking) return comm->busy_answers = 1, ncclInProgress;
    host_blocks([&comm] { return is_quiet(*comm) || comm->error != ncclSuccess; });
    return comm->error;
}

// Waits for what was called.
ncclResult_t ncclCommDestroy(ncclComm_t handle) {
    std::lock_guard lock(runtime_lock);
    std::shared_ptr<ncclComm> comm = find_comm(handle);
    if (comm == nullptr)
        return refuse("ncclCommDestroy", ncclInvalidArgument, "a communicator that is none");
    check_outside_group("ncclCommDestroy");
    if (!comm->ready) comm->ranks.fail(ncclRemoteError, say("rank %d, which left", comm->me()));
    host_blocks([&comm] {
        check_end("ncclCommDestroy", *comm);
        return is_quiet(*comm) || comm->aborted;
    });
    if (!comm->aborted) leave(comm, Left::destroyed);
    return ncclSuccess;
}

// What waits ends without a result, and so does the waiting of other threads.
ncclResult_t ncclCommAbort(ncclComm_t handle) {
    std::lock_guard lock(runtime_lock);
    std::shared_ptr<ncclComm> comm = find_comm(handle);
    if (comm == nullptr)
        return refuse("ncclCommAbort", ncclInvalidArgument, "a communicator that is none");
    check_outside_group("ncclCommAbort");
    comm->aborted = true;
    if (!comm->ready) comm->ranks.fail(ncclRemoteError, say("rank %d, which aborted", comm->me()));
    leave(comm, Left::aborted);
    run_unfinished();
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t handle, int* count) {
    std::lock_guard lock(runtime_lock);
    if (find_comm(handle) == nullptr || count == nullptr) return ncclInvalidArgument;
    *count = handle->count();
    return ncclSuccess;
}

ncclResult_t ncclCommCuDevice(const ncclComm_t handle, int* device) {
    std::lock_guard lock(runtime_lock);
    if (find_comm(handle) == nullptr || device == nullptr) return ncclInvalidArgument;
    *device = handle->device;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t handle, int* rank) {
    std::lock_guard lock(runtime_lock);
    if (find_comm(handle) == nullptr || rank == nullptr) return ncclInvalidArgument;
    *rank = handle->me();
    return ncclSuccess;
}

const char* ncclGetErrorString(ncclResult_t result) {
    switch (result) {
        case ncclSuccess:
            return "no error";
        case ncclUnhandledCudaError:
            return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
        case ncclSystemError:
            return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
        case ncclInternalError:
            return "internal error - please report this issue to the NCCL developers";
        case ncclInvalidArgument:
            return "invalid argument (run with NCCL_DEBUG=WARN for details)";
        case ncclInvalidUsage:
            return "invalid usage (run with NCCL_DEBUG=WARN for details)";
        case ncclRemoteError:
            return "remote process exited or there was a network error";
        case ncclInProgress:
            return "NCCL operation in progress";
        default:
            return "unknown result code";
    }
}

// Of any communicator; it holds until the next error.
const char* ncclGetLastError(ncclComm_t) {
    std::lock_guard lock(runtime_lock);
    static thread_local std::string mine;
    mine = last_error;
    return mine.c_str();
}

ncclResult_t ncclGroupStart() {
    group.depth++;
    return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
    std::lock_guard lock(runtime_lock);
    if (group.depth == 0)
        return refuse("ncclGroupEnd", ncclInvalidUsage, "an end of a group that nobody began");
    if (--group.depth > 0) return ncclSuccess;
    return end_group();
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return call(Kind::all_reduce, send, recv, count, type, op, 0, comm, stream);
}

ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return call(Kind::reduce_scatter, send, recv, count, type, op, 0, comm, stream);
}

ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
    return call(Kind::all_gather, send, recv, count, type, ncclSum, 0, comm, stream);
}

ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream) {
    return call(Kind::broadcast, send, recv, count, type, ncclSum, root, comm, stream);
}

ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
    return call(Kind::reduce, send, recv, count, type, op, root, comm, stream);
}

ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
    return call(Kind::send, send, nullptr, count, type, ncclSum, peer, comm, stream);
}

ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return call(Kind::receive, nullptr, recv, count, type, ncclSum, peer, comm, stream);
}

}  // extern "C"
