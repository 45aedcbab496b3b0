// Errors and files: the one way in which every part of the program fails, reads and writes.
//
// Everything that a user, a file or a machine can do wrong ends as one line on stderr and an exit
// code: fail_input (2) for bad usage and bad files, fail_machine (1) for disks, memory and numbers.
// Files are read through a read-only mapping, and written beside their target, flushed, synced and
// renamed, so that a reader finds the old content or the new, never a part.
#pragma once

#include <fcntl.h>
#include <omp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// The library asserts that its values are whole, which one is not whose memory was refused while it
// was made: thrown out of a destructor, bad_alloc ends the program as it does elsewhere.
inline void json_is_broken(const char* condition) {
    if (std::uncaught_exceptions() > 0) throw std::bad_alloc();
    fprintf(stderr, "nlohmann/json: does not hold: %s\n", condition);
    abort();
}
#define JSON_ASSERT(condition) ((condition) ? void() : json_is_broken(#condition))
#include <nlohmann/json.hpp>

namespace fs = std::filesystem;
using json = nlohmann::json;                  // for reading: finds a key among many quickly
using ordered_json = nlohmann::ordered_json;  // for writing what people read: keeps the order given

// ==== errors =====================================================================================

constexpr int kExitMachine = 1;  // a disk, memory, or a loss that is not a number
constexpr int kExitInput = 2;    // bad usage or a bad file

struct Error : std::runtime_error {
    int exit_code;
    Error(int code, const std::string& message) : std::runtime_error(message), exit_code(code) {}
};

// printf into a string.
inline std::string vformat(const char* pattern, va_list args) {
    va_list again;
    va_copy(again, args);
    int length = vsnprintf(nullptr, 0, pattern, again);
    va_end(again);
    std::string text(length > 0 ? size_t(length) : 0, '\0');
    vsnprintf(text.data(), text.size() + 1, pattern, args);
    return text;
}

__attribute__((format(printf, 1, 2))) inline std::string format(const char* pattern, ...) {
    va_list args;
    va_start(args, pattern);
    std::string text = vformat(pattern, args);
    va_end(args);
    return text;
}

// Text from a stranger, fit for an error message: one line, not without end.
inline std::string one_line(std::string_view text) {
    constexpr size_t kLongest = 120;
    size_t length = std::min(text.size(), kLongest);
    while (length > 0 && length < text.size() && (text[length] & 0xC0) == 0x80) length--;
    std::string line(text.substr(0, length));
    for (char& c : line)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
    return length < text.size() ? line + "..." : line;
}

// A word as a shell reads it back.
inline std::string shell_quoted(const std::string& word) {
    const char* plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=+,@%";
    if (!word.empty() && word.find_first_not_of(plain) == std::string::npos) return word;
    std::string quoted = "'";
    for (char c : word) quoted += c == '\'' ? "'\\''" : std::string(1, c);
    return quoted + "'";
}

// The user or a file is wrong: throws an Error with exit code 2. The line says where and what would
// help.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail_input(const char* pattern,
                                                                          ...) {
    va_list args;
    va_start(args, pattern);
    std::string text = vformat(pattern, args);
    va_end(args);
    throw Error(kExitInput, text);
}

// The machine failed: throws an Error with exit code 1.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail_machine(const char* pattern,
                                                                            ...) {
    va_list args;
    va_start(args, pattern);
    std::string text = vformat(pattern, args);
    va_end(args);
    throw Error(kExitMachine, text);
}

// A system call on `path` failed with errno: what does not exist is bad input, a refusal is the
// machine's.
[[noreturn]] inline void fail_errno(const std::string& path, const char* action) {
    int code = errno;
    if (code == ENOENT || code == ENOTDIR || code == EISDIR)
        fail_input("%s: cannot %s: %s", path.c_str(), action, strerror(code));
    fail_machine("%s: cannot %s: %s", path.c_str(), action, strerror(code));
}

// Calls f, which does not know from where what it reads came: what it throws gets place(), file and
// place, in front.
template <typename Place, typename F>
void with_place(Place place, F f) {
    try {
        f();
    } catch (const Error& error) { throw Error(error.exit_code, place() + ": " + error.what()); }
}

inline std::string first_line(const std::string& path) {
    std::string line;
    std::ifstream file(path);
    std::getline(file, line);
    return line;
}

// The number behind a word in a file of words and numbers; 0 where there is none.
inline size_t number_behind(const std::string& path, const std::string& wanted) {
    std::ifstream file(path);
    std::string word;
    size_t number = 0;
    while (file >> word)
        if (word == wanted && file >> number) return number;
    return 0;
}

// The folders of the control groups whose limits of `controller` hold for this process: its own and
// those above. `system` stands before /proc and /sys, for tests.
inline std::vector<std::string> control_groups(const std::string& controller,
                                               const std::string& system = "") {
    std::vector<std::string> folders;
    std::ifstream file(system + "/proc/self/cgroup");  // "0::/path", or "3:cpu,cpuacct:/path"
    std::string line;
    while (std::getline(file, line)) {
        size_t first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        std::string names = line.substr(first + 1, second - first - 1);
        if (!names.empty() && ("," + names + ",").find("," + controller + ",") == std::string::npos)
            continue;
        std::string root = system + "/sys/fs/cgroup" + (names.empty() ? "" : "/" + controller);
        std::string path = line.substr(second + 1);
        for (; path.size() > 1; path.resize(path.rfind('/'))) folders.push_back(root + path);
        folders.push_back(root);
    }
    return folders;
}

// The bytes of memory that this machine, or the container, could still give; 0 when it does not
// say.
inline size_t machine_memory_free(const std::string& system = "") {
    size_t free = number_behind(system + "/proc/meminfo", "MemAvailable:") * 1024;
    for (const std::string& folder : control_groups("memory", system)) {
        auto number = [&](const char* file) {
            return size_t(strtoull(first_line(folder + file).c_str(), nullptr, 10));
        };
        size_t limit = number("/memory.max"), used = number("/memory.current");
        size_t kept = number_behind(folder + "/memory.stat", "inactive_file");
        if (limit == 0) {  // "max", or version 1
            limit = number("/memory.limit_in_bytes"), used = number("/memory.usage_in_bytes");
            kept = number_behind(folder + "/memory.stat", "total_inactive_file");
        }
        if (limit == 0) continue;
        used -= std::min(used, kept);  // what files keep is given back when asked for
        free = std::min(free, std::max(limit - std::min(limit, used), size_t(1)));
    }
    return free;
}

// Threads that a quota of processor time feeds, in the words of a control group ("150000 100000":
// microseconds that may be used in a period; "max ..." for all); at least 1, and 0 without a quota.
inline int quota_threads(const std::string& words) {
    double used_us = 0, period_us = 0;
    if (sscanf(words.c_str(), "%lf %lf", &used_us, &period_us) != 2) return 0;
    if (!(used_us > 0 && period_us > 0)) return 0;
    return int(std::clamp(used_us / period_us, 1.0, 4096.0));
}

// The least that the control groups of this process allow it; 0 without a quota.
inline int group_threads(const std::string& system = "") {
    int least = 0;
    for (const std::string& folder : control_groups("cpu", system)) {
        int quota = quota_threads(first_line(folder + "/cpu.max"));
        if (quota == 0)  // version 1
            quota = quota_threads(first_line(folder + "/cpu.cfs_quota_us") + " " +
                                  first_line(folder + "/cpu.cfs_period_us"));
        if (quota > 0) least = least > 0 ? std::min(least, quota) : quota;
    }
    return least;
}

// How many threads compute best here: as many as OMP_NUM_THREADS asks for, else one a core (two
// that share a core's arithmetic units gain nothing from each other) of those that this process may
// run on (taskset), at most what its container may use.
inline int machine_threads() {
#ifdef __linux__
    cpu_set_t allowed;
    if (getenv("OMP_NUM_THREADS") != nullptr ||
        sched_getaffinity(0, sizeof(allowed), &allowed) != 0)
        return omp_get_max_threads();
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed)) continue;
        std::string topology = format("/sys/devices/system/cpu/cpu%d/topology/", cpu);
        std::string package = first_line(topology + "physical_package_id");
        std::string core = first_line(topology + "core_id");
        cores.insert(core.empty() ? std::to_string(cpu) + " itself" : package + " " + core);
    }
    int threads = std::max(1, int(cores.size()));
    int quota = group_threads();
    return quota > 0 ? std::min(threads, quota) : threads;
#else
    return omp_get_max_threads();
#endif
}

// Where what was measured of this machine is kept: XDG_CACHE_HOME, or .cache in the home folder; ""
// where there is neither.
inline std::string user_cache_folder() {
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (cache != nullptr && *cache != 0) return std::string(cache) + "/train_gpt2";
    if (home != nullptr && *home != 0) return std::string(home) + "/.cache/train_gpt2";
    return "";
}

// ==== reading ====================================================================================

inline uint64_t hash_bytes(const void* data, size_t size, uint64_t seed = 0) {
    return XXH3_64bits_withSeed(data, size, seed);
}

// By which a file is known again: one that was written to since differs, and so does another that
// took its name.
struct FileIdentity {
    uint64_t device = 0, inode = 0, size = 0;
    int64_t written_s = 0, written_ns = 0;
    FileIdentity() = default;
    explicit FileIdentity(const struct stat& info)
        : device(info.st_dev),
          inode(info.st_ino),
          size(uint64_t(info.st_size)),
          written_s(info.st_mtim.tv_sec),
          written_ns(info.st_mtim.tv_nsec) {}
    bool operator==(const FileIdentity&) const = default;
};

struct FileDigest {
    size_t bytes = 0;
    uint64_t hash = 0;  // XXH3, 64 bits, of the whole file

    bool operator==(const FileDigest&) const = default;
};

// hash_bytes of bytes that come in parts. Move-only.
class StreamingHash {
  public:
    StreamingHash() : state_(XXH3_createState(), XXH3_freeState) {
        if (state_ == nullptr) throw std::bad_alloc();
        XXH3_64bits_reset(state_.get());
    }
    void add(const void* data, size_t size) {
        XXH3_64bits_update(state_.get(), data, size);
        bytes_ += size;
    }
    FileDigest digest() const { return {bytes_, XXH3_64bits_digest(state_.get())}; }

  private:
    std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> state_;
    size_t bytes_ = 0;
};

// A whole file, read-only, mapped into memory; an empty file has size 0. Move-only.
class MappedFile {
  public:
    MappedFile() = default;
    explicit MappedFile(const std::string& path) : path_(path) {
        // Not to wait for a writer where a pipe bears the name.
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd < 0) fail_errno(path, "open");
        struct stat info;
        if (fstat(fd, &info) != 0) {
            close(fd);
            fail_errno(path, "stat");
        }
        if (!S_ISREG(info.st_mode)) {
            close(fd);
            fail_input("%s: not a regular file", path.c_str());
        }
        size_ = size_t(info.st_size);
        identity_ = FileIdentity(info);
        void* address = size_ == 0 ? nullptr : mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
        close(fd);
        if (address == MAP_FAILED) fail_errno(path, "map");
        data_ = static_cast<const char*>(address);
    }
    MappedFile(MappedFile&& other) noexcept { swap(other); }
    MappedFile& operator=(MappedFile&& other) noexcept {
        swap(other);
        return *this;
    }
    ~MappedFile() {
        if (data_ != nullptr) munmap(const_cast<char*>(data_), size_);
    }

    const char* data() const { return data_; }
    size_t size() const { return size_; }
    std::string_view view() const { return {data_, size_}; }
    const std::string& path() const { return path_; }
    const FileIdentity& identity() const { return identity_; }  // as it was when it was mapped

    // Tells the kernel how `count` bytes from `begin` on will be read (MADV_WILLNEED, ...). It is
    // free not to listen, so that nothing can fail.
    void advise(size_t begin, size_t count, int advice) const {
        if (begin >= size_ || count == 0) return;
        size_t page = size_t(sysconf(_SC_PAGESIZE)), from = begin / page * page;
        size_t end = std::min(count, size_ - begin) + begin;
        madvise(const_cast<char*>(data_) + from, end - from, advice);
    }

  private:
    void swap(MappedFile& other) {
        std::swap(path_, other.path_);
        std::swap(identity_, other.identity_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
    }
    std::string path_;
    FileIdentity identity_;
    const char* data_ = nullptr;
    size_t size_ = 0;
};

inline std::string read_file(const std::string& path) {
    return std::string(MappedFile(path).view());
}

// While one lives, a file that this thread reads through its mapping may be cut short by another
// program: what is missing reads as zeros, and cut() says that it was. For whoever has something to
// lose; others end with a line (end_on_cut_file, which both need). One at a time.
class CutWatch {
  public:
    CutWatch() { state() = kWatching; }
    CutWatch(const CutWatch&) = delete;
    CutWatch& operator=(const CutWatch&) = delete;
    ~CutWatch() { state() = kNobody; }

    bool cut() const { return state() == kCut; }

    // For the handler of SIGBUS: puts zeros where `address` is. False where nobody watches.
    static bool mend(void* address) {
        if (state() == kNobody) return false;
        auto page = uintptr_t(sysconf(_SC_PAGESIZE));
        auto begin = reinterpret_cast<uintptr_t>(address) / page * page;
        void* zeros = mmap(reinterpret_cast<void*>(begin), page, PROT_READ,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        state() = kCut;
        return zeros != MAP_FAILED;
    }

  private:
    enum { kNobody, kWatching, kCut };
    static volatile sig_atomic_t& state() {
        static thread_local volatile sig_atomic_t state = kNobody;
        return state;
    }
};

// Memory for reads and writes past the kernel's copy of a file, which ask for whole blocks of it.
inline std::unique_ptr<char, decltype(&free)> aligned_memory(size_t size) {
    constexpr size_t kBlock = 4096;
    std::unique_ptr<char, decltype(&free)> memory(static_cast<char*>(aligned_alloc(kBlock, size)),
                                                  free);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

// Whether reads and writes of a file go straight to the disk: for large files, which nobody reads
// soon, that takes no time of a core. Where a file system has no such way all goes through the
// kernel.
inline void go_direct([[maybe_unused]] int fd, [[maybe_unused]] bool direct) {
#ifdef O_DIRECT
    int flags = fcntl(fd, F_GETFL), saved_errno = errno;
    if (flags >= 0) fcntl(fd, F_SETFL, direct ? flags | O_DIRECT : flags & ~O_DIRECT);
    errno = saved_errno;
#endif
}

// Parses JSON text; `where` names it in the error. Text from strangers may nest without end, and
// the library would follow it down the stack, so depth is bounded first. It also takes a zero byte
// for the end, and would pass over what is behind it.
inline json parse_json(std::string_view text, const std::string& where) {
    constexpr int kDeepest = 64;
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < text.size(); i++) {
        char c = text[i];
        if (c == '\0') fail_input("%s: byte %zu: not valid JSON", where.c_str(), i + 1);
        if (quoted) {
            if (c == '\\') i++;
            else if (c == '"') quoted = false;
        } else if (c == '"') {
            quoted = true;
        } else if (c == '[' || c == '{') {
            if (++depth > kDeepest)
                fail_input("%s: byte %zu: JSON nested deeper than %d", where.c_str(), i, kDeepest);
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    try {
        return json::parse(text.begin(), text.end());
    } catch (const json::parse_error& error) {
        fail_input("%s: byte %zu: not valid JSON", where.c_str(), size_t(error.byte));
    } catch (const json::out_of_range&) {  // a number like 1e999
        fail_input("%s: a number in it is too large for JSON", where.c_str());
    }
}

// ==== writing ====================================================================================

// Makes a rename inside `folder` durable.
inline void sync_folder(const std::string& folder) {
    int fd = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) fail_errno(folder, "open");
    int status = fsync(fd);
    close(fd);
    if (status != 0 && errno != EINVAL)
        fail_errno(folder, "sync");  // EINVAL: it has no such operation
}

// Makes a folder, and those that it lies in, where they are not there; each is durable then.
inline void make_folder(const std::string& path) {
    std::vector<std::string> parents;  // of the new ones
    std::error_code error;
    for (fs::path at = path; !at.empty() && !fs::exists(at, error); at = at.parent_path())
        parents.push_back(at.parent_path().string());
    fs::create_directories(path, error);
    if (error) fail_machine("%s: cannot create: %s", path.c_str(), error.message().c_str());
    for (const std::string& parent : parents) sync_folder(parent);
}

// Whether the file that is open as `fd` is still the one that `path` names; true where the system
// cannot say.
inline bool is_still_there(int fd, const std::string& path) {
    struct stat held, there;
    if (fstat(fd, &held) != 0) return true;
    if (stat(path.c_str(), &there) != 0) return errno != ENOENT && errno != ENOTDIR;
    return held.st_ino == there.st_ino && held.st_dev == there.st_dev;
}

// What the links lead to that `path` may be, whether it is there or not.
inline std::string follow_links(const std::string& path) {
    constexpr int kMostLinks = 40;  // as the kernel follows
    std::error_code error;
    fs::path at = path;
    for (int links = 0; fs::is_symlink(at, error); links++) {
        if (links == kMostLinks) errno = ELOOP, fail_errno(path, "follow the link");
        at = at.parent_path() / fs::read_symlink(at, error);
        if (error)
            fail_machine("%s: cannot read the link: %s", path.c_str(), error.message().c_str());
    }
    return at.string();
}

// A name beside `path` for what is to be renamed to it. The number of the process alone would not
// do: in two containers it may be the same.
inline std::string temporary_name(const std::string& path) {
    static std::atomic<uint64_t> calls = 0;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t facts[] = {uint64_t(now.tv_sec), uint64_t(now.tv_nsec), calls++};
    auto number = uint32_t(hash_bytes(facts, sizeof facts, uint64_t(getpid())));
    return path + format(".%d.%08x.tmp", int(getpid()), unsigned(number));
}

// What a file of such a name was to be renamed to; "" where the name is no such.
inline std::string target_of_temporary(std::string name) {
    auto drop_end = [&](const char* digits, size_t least, size_t most) {  // a dot and so many
        size_t dot = name.find_last_not_of(digits), count = name.size() - dot - 1;
        bool there = dot != name.npos && name[dot] == '.' && count >= least && count <= most;
        name.resize(there ? dot : 0);
    };
    if (!name.ends_with(".tmp")) return "";
    name.resize(name.size() - strlen(".tmp"));
    drop_end("0123456789abcdef", 8, 8);
    drop_end("0123456789", 1, 10);
    return name;
}

// Removes from a folder of this program's own what others of it were killed over: the files of
// such names that nobody has written to for an hour. What cannot be removed does no harm.
inline void remove_leftovers(const std::string& folder) {
    std::error_code error, ignored;
    auto old = fs::file_time_type::clock::now() - std::chrono::hours(1);
    for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
        if (target_of_temporary(at->path().filename().string()).empty()) continue;
        auto written = at->last_write_time(ignored);
        if (!ignored && written < old) fs::remove(at->path(), ignored);
    }
}

// Files and folders that are there only until they are renamed or removed. A signal that ends the
// program removes them first (end_without_leftovers), in a handler, which may take no memory: so
// there are so many places of a fixed size, and what finds none is left behind by a signal.
class Leftovers {
  public:
    // The place that `path` has from now on; -1: none.
    static int add(const std::string& path) {
        if (path.size() >= sizeof Place::path) return -1;
        for (int i = 0; i < kPlaces; i++) {
            Place& place = places_[i];
            if (place.taken.exchange(true)) continue;
            memcpy(place.path, path.c_str(), path.size() + 1);
            place.whole = true;
            return i;
        }
        return -1;
    }
    static void forget(int place) {
        if (place < 0) return;
        places_[place].whole = false;
        places_[place].taken = false;
    }
    // Only what POSIX allows in a handler, and the system's call behind readdir.
    static void remove_all() {
        for (int i = 0; i < kPlaces; i++)
            if (places_[i].whole) remove(places_[i].path);
    }

  private:
    static constexpr int kPlaces = 16;
    struct Place {
        std::atomic<bool> taken, whole;
        char path[4096];
    };
    static inline Place places_[kPlaces] = {};

    // A file, or a folder of files.
    static void remove(const char* path) {
        if (unlink(path) == 0 || errno == ENOENT) return;
        constexpr int kTries = 4;  // a file system may pass over names while others go
        for (int i = 0; i < kTries && rmdir(path) != 0; i++) empty(path);
    }
    static void empty([[maybe_unused]] const char* path) {
#ifdef SYS_getdents64
        int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        alignas(8) char entries[4096];  // each: 16 bytes, its length (2), a byte, its name
        for (long size; (size = syscall(SYS_getdents64, fd, entries, sizeof entries)) > 0;) {
            uint16_t length = 0;
            for (long at = 0; at < size; at += length) {
                memcpy(&length, entries + at + 16, sizeof length);
                unlinkat(fd, entries + at + 19, 0);
            }
        }
        close(fd);
#endif
    }
};

// A place among the leftovers, for as long as this lives.
class Leftover {
  public:
    explicit Leftover(const std::string& path) : place_(Leftovers::add(path)) {}
    Leftover(const Leftover&) = delete;
    Leftover& operator=(const Leftover&) = delete;
    ~Leftover() { Leftovers::forget(place_); }

  private:
    int place_;
};

// Writes `path` so that it appears whole or not at all: bytes go to a file beside it (two programs
// may write the same file, and the last one wins), commit() flushes, syncs and renames it, and
// destruction without commit() removes it. Where `path` is a link, what it leads to is replaced. A
// device of characters, a pipe, and what this program's standard output is are written to as they
// are; what else is no regular file is refused. Every failure throws with exit code 1.
class AtomicFile {
  public:
    explicit AtomicFile(const std::string& path) : path_(path) {
        struct stat there;
        bool exists = stat(path.c_str(), &there) == 0;
        if (exists && is_stream(there)) {
            open_stream(there);
            return;
        }
        if (exists && !S_ISREG(there.st_mode)) fail_machine("%s: not a regular file", path.c_str());
        target_ = follow_links(path);
        create();
        if (exists) fchmod(fd_, there.st_mode & 0777);
    }
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;
    ~AtomicFile() {
        if (fd_ < 0) return;
        close(fd_);
        if (!streams()) unlink(temporary_.c_str());
    }

    void write(const void* data, size_t size) {
        const char* bytes = static_cast<const char*>(data);
        while (size > 0) {
            size_t part = std::min(size, kBufferSize - buffered_);
            memcpy(buffer_.get() + buffered_, bytes, part);
            buffered_ += part, bytes += part, size -= part;
            if (buffered_ < kBufferSize) return;
            if (!streams()) go_direct(fd_, true);  // whole blocks so far
            flush();
        }
    }

    // Overwrites bytes [offset, offset + size) of what was written so far.
    void rewrite(const void* data, size_t size, size_t offset) {
        flush_rest();
        const char* from = static_cast<const char*>(data);
        while (size > 0) {
            ssize_t written = pwrite(fd_, from, size, off_t(offset));
            if (written < 0 && errno == EINTR) continue;
            if (written < 0) fail("write");
            from += written, offset += size_t(written), size -= size_t(written);
        }
    }

    void commit() {
        flush_rest();
        if (streams()) {
            if (close(std::exchange(fd_, -1)) != 0) fail("write");
            return;
        }
        if (fsync(fd_) != 0) fail("sync");
        int fd = std::exchange(fd_, -1);
        if (close(fd) != 0 || rename(temporary_.c_str(), target_.c_str()) != 0) {
            int code = errno;
            unlink(temporary_.c_str());
            errno = code;
            fail("write");
        }
        sync_folder(fs::path(target_).parent_path().string());
    }

  private:
    static constexpr size_t kBufferSize = 1 << 20;

    [[noreturn]] void fail(const char* action) {
        fail_machine("%s: cannot %s: %s", path_.c_str(), action, strerror(errno));
    }

    // The standard stream of this program that a file is; -1: none.
    static int standard_stream(const struct stat& file) {
        for (int fd : {STDOUT_FILENO, STDERR_FILENO}) {
            struct stat own;
            bool open = fstat(fd, &own) == 0;
            if (open && own.st_ino == file.st_ino && own.st_dev == file.st_dev) return fd;
        }
        return -1;
    }
    static bool is_stream(const struct stat& file) {
        return S_ISCHR(file.st_mode) || S_ISFIFO(file.st_mode) || standard_stream(file) >= 0;
    }
    // A standard stream goes on where it is: opened by its name it would begin again, if at all.
    void open_stream(const struct stat& file) {
        int fd = standard_stream(file);
        fd_ = fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1)
                      : open(path_.c_str(), O_WRONLY | O_NOCTTY | O_CLOEXEC);
        if (fd_ < 0) fail("open");
    }
    bool streams() const { return temporary_.empty(); }

    void create() {
        int tries = 100;
        do {
            temporary_ = temporary_name(target_);
            leftover_.emplace(temporary_);
            fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        } while (fd_ < 0 && errno == EEXIST && --tries > 0);
        if (fd_ < 0) fail("create");
    }

    void flush_rest() {
        if (!streams()) go_direct(fd_, false);
        flush();
    }
    void flush() {
        const char* data = buffer_.get();
        for (bool direct = true; buffered_ > 0;) {
            ssize_t written = ::write(fd_, data, buffered_);
            if (written < 0 && errno == EINTR) continue;
            if (written < 0 && errno == EINVAL && direct) {
                go_direct(fd_, direct = false);  // it was no block, or there is no such way
                continue;
            }
            if (written < 0) fail("write");
            data += written;
            buffered_ -= size_t(written);
        }
    }

    std::string path_;
    std::string target_, temporary_;  // behind the links, and what is renamed to that; no stream's
    std::optional<Leftover> leftover_;
    std::unique_ptr<char, decltype(&free)> buffer_ = aligned_memory(kBufferSize);
    size_t buffered_ = 0;
    int fd_ = -1;
};

inline void write_file_atomic(const std::string& path, std::string_view content) {
    AtomicFile file(path);
    file.write(content.data(), content.size());
    file.commit();
}
