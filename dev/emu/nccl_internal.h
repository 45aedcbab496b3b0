// What the parts of the emulator's NCCL share: nccl_ranks.cpp keeps the memory that the processes
// of a communicator have in common, nccl_reduce.cpp adds up, nccl.cpp has the library's functions.
#pragma once

#include <nccl.h>

#include <atomic>
#include <deque>
#include <string>

#include "internal.h"

namespace emu {

// ==== nccl_reduce.cpp ============================================================================

// Bytes of an element; 0: a type that is not emulated.
size_t bytes_of(ncclDataType_t type);
const char* name_of(ncclDataType_t type);
const char* name_of(ncclRedOp_t op);

// What `count` elements from element `begin` on of inputs[0..ranks) come to, in the order
// first, first + 1, ... round the ring.
void reduce(char* out, const char* const* inputs, int ranks, int first, size_t begin, size_t count,
            ncclDataType_t type, ncclRedOp_t op);

// ==== nccl_ranks.cpp =============================================================================

constexpr int kMostRanks = 64;
constexpr size_t kRing = 512;                // calls that a rank may be ahead of another
constexpr size_t kArena = size_t(4) << 30;   // address space for what a rank sends; a sparse file
constexpr uint64_t kRefused = ~uint64_t(0);  // see Ranks::deposit

enum class Kind : uint32_t {
    all_reduce,
    reduce_scatter,
    all_gather,
    broadcast,
    reduce,
    send,
    receive,
};

// One call of one rank, for all to see: what it is at once, what it sends when its turn comes.
struct alignas(64) Call {
    Kind kind;
    ncclDataType_t type;
    ncclRedOp_t op;
    int32_t root;          // -1: has none
    uint32_t group, part;  // collectives in its group, and which of them it is
    uint64_t count;
    std::atomic<uint64_t> posted;  // its number + 1 when what it sends is there
    uint64_t offset;               // in its rank's arena
};

// Calls whose k-th on one side meets the k-th on the other.
struct alignas(64) Channel {
    std::atomic<uint64_t> announced, ended;  // numbers below have been called, are over
    Call ring[kRing];
};

enum class Left : uint32_t { no, destroyed, aborted };

struct alignas(64) Rank {
    std::atomic<uint32_t> joined;  // 1: has taken its place, 2: has arrived
    std::atomic<uint32_t> failed;
    std::atomic<Left> left;
    int32_t pid, device;
    char host[64];
    std::atomic<uint64_t> compared[kMostRanks];       // collectives held against those of each rank
    std::atomic<uint64_t> compared_pair[kMostRanks];  // receives from it, held against its sends
    std::atomic<uint64_t> compared_back[kMostRanks];  // sends to it, held against its receives
};

struct Header {
    char magic[8];
    int32_t ranks, plain_order;
    std::atomic<uint32_t> arrived, complete;
    std::atomic<uint32_t> failed;  // 1: `why` is being written, 2: it is there
    int32_t status;                // an ncclResult_t
    char why[400];
};

// The memory that the ranks of a communicator share, and who of them is alive. The file has no name
// any more once all have it. A rank holds a lock on its byte of the file for as long as its process
// lives.
class Ranks {
  public:
    ~Ranks();

    // Takes the place of `rank`. Not ncclSuccess: *why says why not.
    ncclResult_t join(const ncclUniqueId& id, int ranks, int rank, int device, std::string* why);

    // It will stay.
    void arrive();

    // ncclInProgress until all have arrived, or one says why that cannot be.
    ncclResult_t wait(std::string* why);

    // Nobody will join any more: all who wait get this answer.
    void fail(ncclResult_t status, const std::string& why);

    bool alive(int rank) const;
    int count() const { return count_; }
    int me() const { return me_; }
    Header& header() const { return *reinterpret_cast<Header*>(base_); }
    Rank& rank(int r) const;
    Channel& collectives(int r) const { return channel(r); }
    Channel& sends(int from, int to) const { return channel(count_ + from * count_ + to); }
    Channel& receives(int from, int to) const {
        return channel(count_ + (count_ + from) * count_ + to);
    }
    const char* arena(int r) const;

    // Room for bytes that this rank sends, until *over exceeds `number` for all `over`. Null: not
    // yet. *offset is kRefused where there never will be.
    char* deposit(size_t bytes, const std::vector<const Channel*>& over, uint64_t number,
                  uint64_t* offset);

  private:
    struct Deposit {
        uint64_t begin, end;
        std::vector<const Channel*> over;
        uint64_t number;
    };

    Channel& channel(int i) const;
    ncclResult_t enter(const ncclUniqueId& id, std::string* why);
    ncclResult_t take_place(int device, std::string* why);
    ncclResult_t find_faults(std::string* why);
    bool reserve(uint64_t end);

    int file_ = -1, count_ = 0, me_ = 0;
    std::string name_;
    char* base_ = nullptr;
    size_t bytes_ = 0;
    int64_t began_ms_ = 0;
    std::deque<Deposit> deposits_;
    uint64_t reserved_ = 0;
};

// Random, with this process's id. Also removes what communicators left behind all of whose
// processes were killed before they had met.
void make_unique_id(ncclUniqueId* id);

}  // namespace emu
