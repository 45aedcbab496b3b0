// The processes of a communicator: how they meet, what they share, and who is alive.
//
// All map one file, whose name comes from the unique id: a header, a part for each rank, the rings
// of calls, and an arena for each rank, which takes memory only where it was used. The last to join
// removes the name. Where not all do, it stays for those who come late to learn why, and goes with
// the last process that knows it. Locks of the file (fcntl) end with the process that holds them,
// however it ends, and are not inherited: a rank whose byte is not locked is dead. One more byte is
// held while somebody joins.

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <set>

#include "nccl_internal.h"

namespace emu {

namespace {

constexpr char kMagic[8] = {'E', 'M', 'U', 'N', 'C', 'C', 'L', '1'};
constexpr char kPrefix[] = "emu_nccl_";
constexpr off_t kDoor =
    off_t(1) << 50;  // the byte that is held while somebody joins; then the ranks'
constexpr size_t kPage = 64 << 10;

std::set<std::string>& own_names = *new std::set<std::string>;  // of files that are open here

struct IdParts {
    char magic[8];
    uint32_t pid;
    uint32_t random[4];
};
static_assert(sizeof(IdParts) <= sizeof(ncclUniqueId));

std::string folder() {
    const char* wish = getenv("EMU_NCCL_DIR");
    return wish != nullptr && *wish != '\0' ? wish : "/dev/shm";
}

int64_t now_ms() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000 + t.tv_nsec / 1'000'000;
}

size_t round_up(size_t a, size_t b) { return (a + b - 1) / b * b; }

struct flock lock_of(short type, off_t from, off_t bytes) {
    struct flock lock = {};
    lock.l_type = type;
    lock.l_whence = SEEK_SET;
    lock.l_start = from;
    lock.l_len = bytes;
    return lock;
}

// False where another process holds the bytes, which is found out at once unless `wait`.
bool lock_bytes(int file, off_t from, off_t bytes, bool wait) {
    struct flock lock = lock_of(F_WRLCK, from, bytes);
    int status;
    do status = fcntl(file, wait ? F_SETLKW : F_SETLK, &lock);
    while (status != 0 && errno == EINTR);
    return status == 0;
}

void unlock_bytes(int file, off_t from, off_t bytes) {
    struct flock lock = lock_of(F_UNLCK, from, bytes);
    fcntl(file, F_SETLK, &lock);
}

bool allocate_file(int file, size_t from, size_t bytes) {
    int status;
    do status = posix_fallocate(file, off_t(from), off_t(bytes));
    while (status == EINTR);
    errno = status;
    return status == 0;
}

bool has_name(int file) {
    struct stat status;
    return fstat(file, &status) == 0 && status.st_nlink > 0;
}

// Under the door's lock.
void remove_name(int file, const std::string& name) {
    struct stat mine, there;
    if (fstat(file, &mine) == 0 && stat(name.c_str(), &there) == 0 && mine.st_ino == there.st_ino &&
        mine.st_dev == there.st_dev)
        unlink(name.c_str());
}

size_t ranks_at() { return round_up(sizeof(Header), kPage); }
size_t channels_at(int ranks) { return ranks_at() + round_up(size_t(ranks) * sizeof(Rank), kPage); }
size_t arenas_at(int ranks) {
    size_t channels = size_t(ranks) + 2 * size_t(ranks) * size_t(ranks);
    return channels_at(ranks) + round_up(channels * sizeof(Channel), kPage);
}
size_t bytes_for(int ranks) { return arenas_at(ranks) + size_t(ranks) * kArena; }

std::string say(const char* pattern, auto... values) {
    char text[400];
    snprintf(text, sizeof(text), pattern, values...);
    return text;
}

// The files of communicators that failed before all had met, kept until this process ends.
class Farewell {
  public:
    ~Farewell() {
        ended_ = true;
        for (const auto& [file, name] : kept_) leave(file, name);
    }
    void keep(int file, const std::string& name) {
        if (ended_) leave(file, name);
        else kept_.push_back({file, name});
    }

  private:
    // Removes the name, unless another process holds a place.
    static void leave(int file, const std::string& name) {
        unlock_bytes(file, kDoor, kMostRanks + 1);
        lock_bytes(file, kDoor, 1, true);
        if (lock_bytes(file, kDoor + 1, kMostRanks, false)) remove_name(file, name);
        close(file);
    }

    bool ended_ = false;
    std::vector<std::pair<int, std::string>>& kept_ = *new std::vector<std::pair<int, std::string>>;
} farewell;

// Files that no process holds a byte of, under the prefix.
void remove_leftovers() {
    std::string in = folder();
    DIR* entries = opendir(in.c_str());
    if (entries == nullptr) return;
    while (dirent* entry = readdir(entries)) {
        if (strncmp(entry->d_name, kPrefix, strlen(kPrefix)) != 0) continue;
        std::string path = in + "/" + entry->d_name;
        // To close a file gives up all locks of this process on it.
        if (own_names.contains(path)) continue;
        int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
        if (file < 0) continue;
        // Who opens it meanwhile waits at the door, and finds that it has no name.
        if (lock_bytes(file, kDoor, kMostRanks + 1, false)) unlink(path.c_str());
        close(file);
    }
    closedir(entries);
}

}  // namespace

void make_unique_id(ncclUniqueId* id) {
    remove_leftovers();
    std::random_device random;
    IdParts parts = {};
    memcpy(parts.magic, kMagic, sizeof(kMagic));
    parts.pid = uint32_t(getpid());
    for (uint32_t& word : parts.random) word = random();
    *id = {};
    memcpy(id->internal, &parts, sizeof(parts));
}

// ==== layout =====================================================================================

Rank& Ranks::rank(int r) const { return reinterpret_cast<Rank*>(base_ + ranks_at())[r]; }
Channel& Ranks::channel(int i) const {
    return reinterpret_cast<Channel*>(base_ + channels_at(count_))[i];
}
const char* Ranks::arena(int r) const { return base_ + arenas_at(count_) + size_t(r) * kArena; }

Ranks::~Ranks() {
    bool met = base_ != nullptr && header().complete.load() != 0;
    if (base_ != nullptr) munmap(base_, bytes_);
    if (file_ < 0) return;
    if (met) {
        close(file_);
        own_names.erase(name_);
    } else {
        farewell.keep(file_, name_);
    }
}

// ==== joining ====================================================================================

// Opens the file and waits at its door.
ncclResult_t Ranks::enter(const ncclUniqueId& id, std::string* why) {
    IdParts parts;
    memcpy(&parts, id.internal, sizeof(parts));
    if (memcmp(parts.magic, kMagic, sizeof(kMagic)) != 0) {
        *why = "a unique id that ncclGetUniqueId did not make";
        return ncclInvalidArgument;
    }
    name_ = folder() + say("/%s%u_%08x%08x%08x%08x", kPrefix, parts.pid, parts.random[0],
                           parts.random[1], parts.random[2], parts.random[3]);
    own_names.insert(name_);
    for (;;) {
        file_ = open(name_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (file_ < 0 || !lock_bytes(file_, kDoor, 1, true)) {
            *why = say("%s: %s", name_.c_str(), strerror(errno));
            return ncclSystemError;
        }
        if (has_name(file_)) return ncclSuccess;
        close(file_);
    }
}

// Why this rank cannot join those who are there; the door is held.
ncclResult_t Ranks::find_faults(std::string* why) {
    Header& h = header();
    if (h.failed.load() == 2) {
        *why = h.why;
        return ncclResult_t(h.status);
    }
    Rank& mine = rank(me_);
    if (!lock_bytes(file_, kDoor + 1 + me_, 1, false))
        *why = say("rank %d twice: processes %d and %d", me_, mine.pid, int(getpid()));
    else if (mine.joined.load() != 0)
        *why = say("rank %d in the place of process %d, which was that rank and has ended", me_,
                   mine.pid);
    bool plain = h.plain_order != 0;
    const char* order = getenv("EMU_NCCL_ORDER");
    if (plain != (order != nullptr && strcmp(order, "plain") == 0))
        *why = say("rank %d with another EMU_NCCL_ORDER than the ranks before it", me_);
    const char* duplicate = getenv("EMU_NCCL_DUPLICATE");
    bool refuses = duplicate != nullptr && strcmp(duplicate, "refuse") == 0;
    for (int r = 0; refuses && r < count_; r++) {
        const Rank& other = rank(r);
        if (r == me_ || other.joined.load() == 0 || other.device != mine.device) continue;
        if (strcmp(other.host, mine.host) == 0)
            *why = say("Duplicate GPU detected: rank %d and rank %d both on CUDA device %d of %s",
                       std::min(r, me_), std::max(r, me_), mine.device, mine.host);
    }
    return why->empty() ? ncclSuccess : ncclInvalidUsage;
}

// Under the door's lock.
ncclResult_t Ranks::take_place(int device, std::string* why) {
    Header first = {};
    struct stat status;
    bool fresh = fstat(file_, &status) == 0 && status.st_size == 0;
    bytes_ = bytes_for(count_);
    if (!fresh && pread(file_, static_cast<void*>(&first), sizeof(first), 0) != sizeof(first)) {
        *why = say("%s: %s", name_.c_str(), strerror(errno));
        return ncclSystemError;
    }
    int said = fresh ? count_ : first.ranks;
    if (!fresh) bytes_ = bytes_for(said);
    // What few ranks share is small, and taken at once: a full file system is an error here, and a
    // signal where it is found out by writing.
    constexpr int kFew = 16;
    if (fresh && (ftruncate(file_, off_t(bytes_)) != 0 ||
                  (count_ <= kFew && !allocate_file(file_, 0, arenas_at(count_))))) {
        *why = say("%s: %s", name_.c_str(), strerror(errno));
        remove_name(file_, name_);
        return ncclSystemError;
    }
    void* mapped =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file_, 0);
    if (mapped == MAP_FAILED) {
        *why = say("%s: %s", name_.c_str(), strerror(errno));
        return ncclSystemError;
    }
    base_ = static_cast<char*>(mapped);
    if (fresh) {
        const char* order = getenv("EMU_NCCL_ORDER");
        header().ranks = count_;
        header().plain_order = order != nullptr && strcmp(order, "plain") == 0;
        memcpy(header().magic, kMagic, sizeof(kMagic));
    }
    if (said != count_) {
        int other = 0;
        while (other < said && rank(other).joined.load() == 0) other++;
        *why = say("%d ranks on rank %d, where rank %d says %d", count_, me_, other, said);
        return ncclInvalidUsage;
    }
    char host[sizeof(Rank::host)] = {};
    gethostname(host, sizeof(host) - 1);
    Rank& mine = rank(me_);
    if (mine.joined.load() == 0) {
        mine.device = device;
        memcpy(mine.host, host, sizeof(host));
    }
    if (ncclResult_t found = find_faults(why); found != ncclSuccess) return found;
    mine.pid = int32_t(getpid());
    mine.joined.store(1);
    return ncclSuccess;
}

ncclResult_t Ranks::join(const ncclUniqueId& id, int ranks, int rank, int device,
                         std::string* why) {
    count_ = ranks;
    me_ = rank;
    began_ms_ = now_ms();
    ncclResult_t status = enter(id, why);
    if (status != ncclSuccess) return status;
    status = take_place(device, why);
    unlock_bytes(file_, kDoor, 1);
    if (status != ncclSuccess && base_ != nullptr) fail(status, *why);
    return status;
}

void Ranks::arrive() {
    lock_bytes(file_, kDoor, 1, true);
    rank(me_).joined.store(2);
    if (header().arrived.fetch_add(1) + 1 == uint32_t(count_) && header().failed.load() == 0) {
        remove_name(file_, name_);
        header().complete.store(1);
    }
    unlock_bytes(file_, kDoor, 1);
}

void Ranks::fail(ncclResult_t status, const std::string& why) {
    lock_bytes(file_, kDoor, 1, true);
    Header& h = header();
    uint32_t nobody = 0;
    if (h.complete.load() == 0 && h.failed.compare_exchange_strong(nobody, 1)) {
        h.status = int32_t(status);
        snprintf(h.why, sizeof(h.why), "%s", why.c_str());
        h.failed.store(2);
    }
    unlock_bytes(file_, kDoor, 1);
}

bool Ranks::alive(int r) const {
    if (r == me_) return true;
    struct flock lock = lock_of(F_WRLCK, kDoor + 1 + r, 1);
    return fcntl(file_, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

ncclResult_t Ranks::wait(std::string* why) {
    Header& h = header();
    if (h.failed.load() == 2) {
        *why = h.why;
        return ncclResult_t(h.status);
    }
    if (h.complete.load() != 0) return ncclSuccess;
    std::string missing;
    for (int r = 0; r < count_; r++) {
        uint32_t joined = rank(r).joined.load();
        if (joined < 2) missing += (missing.empty() ? "" : ", ") + std::to_string(r);
        if (joined == 0 || alive(r) || h.complete.load() != 0) continue;
        fail(ncclRemoteError,
             say("rank %d (process %d), which has ended before all ranks met", r, rank(r).pid));
        return ncclInProgress;
    }
    long long limit = setting("EMU_NCCL_TIMEOUT", 60);
    if (now_ms() - began_ms_ > limit * 1000 && !missing.empty())
        fail(ncclSystemError,
             say("ranks that are missing after %lld s: %s of %d", limit, missing.c_str(), count_));
    return ncclInProgress;
}

// ==== what a rank sends ==========================================================================

// Takes the memory now, so that a full file system is an error and not a signal.
bool Ranks::reserve(uint64_t end) {
    if (end <= reserved_) return true;
    uint64_t to = std::min<uint64_t>(round_up(end, 1 << 20), kArena);
    size_t from = arenas_at(count_) + size_t(me_) * kArena + reserved_;
    bool done = allocate_file(file_, from, to - reserved_);
    if (done) reserved_ = to;
    return done;
}

char* Ranks::deposit(size_t bytes, const std::vector<const Channel*>& over, uint64_t number,
                     uint64_t* offset) {
    auto consumed = [](const Deposit& d) {
        return std::all_of(d.over.begin(), d.over.end(),
                           [&d](const Channel* c) { return c->ended.load() > d.number; });
    };
    while (!deposits_.empty() && consumed(deposits_.front())) deposits_.pop_front();
    bytes = round_up(bytes, 64);
    *offset = kRefused;
    if (bytes > kArena) return nullptr;
    uint64_t at = 0;
    if (!deposits_.empty()) {
        uint64_t head = deposits_.front().begin, tail = deposits_.back().end;
        bool behind = tail > head;  // else it has gone round
        if (behind && tail + bytes <= kArena) at = tail;
        else if (behind && bytes < head) at = 0;
        else if (!behind && tail + bytes < head) at = tail;
        else return *offset = 0, nullptr;
    }
    if (!reserve(at + bytes)) return nullptr;
    deposits_.push_back({at, at + bytes, over, number});
    *offset = at;
    return const_cast<char*>(arena(me_)) + at;
}

}  // namespace emu
