// Injects faults into a program that knows nothing of it, by standing between it and the C library:
// LD_PRELOAD=faults.so. README.md describes the variables that say which fault falls where.
//
// Calls that touch paths below FAULTS_ROOT are counted, in all threads, by one counter; from the
// beginning of main(), because nobody can handle a failure before. Streams (fopen) are made of
// calls that are seen, since those inside the C library are not. Nothing here is taken from the
// program's heap.
#include "hooks.h"
// (in this order)
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include "journal.h"
#include "status.h"

// ==== what was asked for =========================================================================

enum class Mode {
    count,
    fail,
    fail_from,
    shorten,
    short_fail,
    die,
    die_half,
    power,
    power_zeros,
    power_some,
    delay
};

struct Settings {
    Mode mode;
    int error;         // of fail and fail_from
    unsigned us;       // of delay
    uint64_t seed;     // of power-some
    uint64_t at;       // the call that it happens at, from 1; 0: none, or for delay every sync
    bool allocations;  // these are counted, and not files
    char root[kPathSize], working_folder[kPathSize];
    size_t root_length;
    int trace;  // a file that gets a line a call; -1: none
    FaultStatus* status;
};

static Settings settings;
static FaultStatus no_status;
static std::atomic<bool> armed;                                         // inside main()
static __thread int inside __attribute__((tls_model("initial-exec")));  // > 0: our own calls

static const struct {
    const char* name;
    int value;
} kErrors[] = {{"EACCES", EACCES}, {"EDQUOT", EDQUOT}, {"EINTR", EINTR},
               {"EIO", EIO},       {"EMFILE", EMFILE}, {"ENOLCK", ENOLCK},
               {"ENOMEM", ENOMEM}, {"ENOSPC", ENOSPC}, {"EROFS", EROFS}};

[[noreturn]] static void refuse(const char* what) {
    fprintf(stderr, "faults: cannot use %s\n", what);
    _exit(125);
}

// MODE[:ERROR or :MICROSECONDS]
static void read_mode(const char* text) {
    static const struct {
        const char* name;
        Mode mode;
    } modes[] = {{"count", Mode::count},
                 {"fail", Mode::fail},
                 {"fail-from", Mode::fail_from},
                 {"short", Mode::shorten},
                 {"short-fail", Mode::short_fail},
                 {"die", Mode::die},
                 {"die-half", Mode::die_half},
                 {"power", Mode::power},
                 {"power-zeros", Mode::power_zeros},
                 {"power-some", Mode::power_some},
                 {"delay", Mode::delay}};
    const char* colon = strchrnul(text, ':');
    const char* value = *colon == ':' ? colon + 1 : "";
    bool known = false;
    for (const auto& row : modes) {
        if (strlen(row.name) != size_t(colon - text) ||
            strncmp(row.name, text, size_t(colon - text)))
            continue;
        settings.mode = row.mode;
        known = true;
    }
    if (!known) refuse("FAULTS_MODE");
    if (settings.mode == Mode::power_some) settings.seed = strtoull(value, nullptr, 10);
    if (settings.mode == Mode::delay) settings.us = unsigned(atoi(value));
    if (settings.mode != Mode::fail && settings.mode != Mode::fail_from &&
        settings.mode != Mode::short_fail)
        return;
    for (const auto& row : kErrors)
        if (strcmp(row.name, value) == 0) settings.error = row.value;
    if (settings.error == 0) refuse("the error of FAULTS_MODE");
}

static bool cuts_power() {
    return settings.mode == Mode::power || settings.mode == Mode::power_zeros ||
           settings.mode == Mode::power_some;
}

[[noreturn]] static void cut_power_now() {
    Cut cut = Cut::all;
    if (settings.mode == Mode::power_zeros) cut = Cut::zeros;
    if (settings.mode == Mode::power_some) cut = Cut::some;
    cut_power(cut, settings.at + (settings.seed << 32));
}

static void read_settings() {
    settings.status = &no_status;
    settings.trace = -1;
    const char* root = getenv("FAULTS_ROOT");
    if (root == nullptr) return;
    const char* mode = getenv("FAULTS_MODE");
    const char* at = getenv("FAULTS_AT");
    const char* what = getenv("FAULTS_WHAT");
    const char* status = getenv("FAULTS_STATUS");
    const char* trace = getenv("FAULTS_TRACE");
    const char* aside = getenv("FAULTS_ASIDE");
    read_mode(mode != nullptr ? mode : "count");
    settings.at = at != nullptr ? strtoull(at, nullptr, 10) : 0;
    settings.allocations = what != nullptr && strcmp(what, "allocations") == 0;
    if (getcwd(settings.working_folder, kPathSize) == nullptr) refuse("the working folder");
    settings.root_length = size_t(snprintf(settings.root, kPathSize, "%s", root));
    if (trace != nullptr) {
        int fd = REAL(open)(trace, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        settings.trace = fcntl(fd, F_DUPFD_CLOEXEC, kFirstOwnFd);
        REAL(close)(fd);
    }
    if (status != nullptr) {
        int fd = REAL(open)(status, O_RDWR | O_CLOEXEC);
        void* page =
            REAL(mmap)(nullptr, sizeof(FaultStatus), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (page == MAP_FAILED) refuse("FAULTS_STATUS");
        settings.status = static_cast<FaultStatus*>(page);
        REAL(close)(fd);
    }
    if (!cuts_power()) return;
    int fd = REAL(open)(aside != nullptr ? aside : "", O_PATH | O_DIRECTORY | O_CLOEXEC);
    journal.aside = fcntl(fd, F_DUPFD_CLOEXEC, kFirstOwnFd);
    if (journal.aside < 0) refuse("FAULTS_ASIDE");
    REAL(close)(fd);
}

// ==== what is watched ============================================================================

// Of each descriptor below the root, its path from there; "" elsewhere.
constexpr int kMostFds = 512;
static char watched[kMostFds][128];

static const char* watched_fd(int fd) {
    return fd >= 0 && fd < kMostFds && watched[fd][0] != '\0' ? watched[fd] : nullptr;
}

// The part of `path` behind the root, or nullptr where it is not below it. `full` gets the whole.
static const char* watched_path(int folder, const char* path, char* full) {
    if (settings.root_length == 0 || path == nullptr) return nullptr;
    if (path[0] == '/') {
        snprintf(full, kPathSize, "%s", path);
    } else if (folder == AT_FDCWD) {
        snprintf(full, kPathSize, "%s/%s", settings.working_folder, path);
    } else if (const char* name = watched_fd(folder)) {
        snprintf(full, kPathSize, "%s/%s/%s", settings.root, name, path);
    } else {
        return nullptr;
    }
    if (strncmp(full, settings.root, settings.root_length) != 0) return nullptr;
    const char* rest = full + settings.root_length;
    if (*rest != '/' && *rest != '\0') return nullptr;
    while (*rest == '/') rest++;
    return *rest == '\0' ? "." : rest;
}

static void watch(int fd, const char* name) {
    if (fd < 0 || fd >= kMostFds) return;
    snprintf(watched[fd], sizeof watched[fd], "%s", name != nullptr ? name : "");
}

// ==== a call =====================================================================================

// What becomes of one that is counted.
enum class Fate { pass, fail, half, half_and_die };

// A disk that is full stays so for all that needs room, one that is read-only for all that changes
// it, and one that is broken for everything.
static bool stays(FaultKind kind, FaultKind first) {
    bool grows = kind == FaultKind::create || kind == FaultKind::write ||
                 kind == FaultKind::rename || kind == FaultKind::mkdir || kind == FaultKind::link;
    bool changes = grows || kind == FaultKind::unlink || kind == FaultKind::truncate;
    if (settings.error == EIO) return true;
    if (settings.error == ENOSPC || settings.error == EDQUOT) return grows;
    if (settings.error == EROFS) return changes;
    return kind == first;
}

static void inject(FaultKind kind, const char* name) {
    FaultStatus& status = *settings.status;
    if (status.injected.fetch_add(1) > 0) return;
    status.kind = int(kind);
    snprintf(status.path, sizeof status.path, "%s", name);
}

static void trace(uint64_t number, FaultKind kind, const char* name) {
    char line[300];
    int size = snprintf(line, sizeof line, "%llu %s %s\n", static_cast<unsigned long long>(number),
                        kFaultKindNames[int(kind)], name);
    if (REAL(write)(settings.trace, line, size_t(size)) != size) refuse("FAULTS_TRACE");
}

static Fate count(FaultKind kind, const char* name) {
    FaultStatus& status = *settings.status;
    uint64_t number = status.calls.fetch_add(1) + 1;
    status.by_kind[int(kind)].fetch_add(1);
    if (settings.trace >= 0) trace(number, kind, name);
    bool now = number == settings.at;
    switch (settings.mode) {
        case Mode::count:
            return Fate::pass;
        case Mode::delay:
            if (settings.at == 0 ? kind == FaultKind::sync : now) usleep(settings.us);
            return Fate::pass;
        case Mode::fail_from: {
            static std::atomic<int> first{-1};
            if (now) first = int(kind);
            if (!now && (first < 0 || !stays(kind, FaultKind(first.load())))) return Fate::pass;
            inject(kind, name);
            return Fate::fail;
        }
        case Mode::short_fail: {
            static std::atomic<bool> next_fails;
            if (now) next_fails = true;
            else if (kind == FaultKind::write && next_fails.exchange(false)) return Fate::fail;
            break;
        }
        default:
            break;
    }
    if (!now) return Fate::pass;
    inject(kind, name);
    if (settings.mode == Mode::fail) return Fate::fail;
    if (settings.mode == Mode::shorten || settings.mode == Mode::short_fail) return Fate::half;
    if (settings.mode == Mode::die_half) return Fate::half_and_die;
    if (cuts_power()) cut_power_now();
    die();
}

// With a power cut in view, calls are made one after the other, so that the journal is true.
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

class Call {
  public:
    Call(FaultKind kind, const char* name) {
        if (cuts_power()) pthread_mutex_lock(&one_at_a_time);
        if (armed && !settings.allocations && inside == 0) fate_ = count(kind, name);
        inside++;
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() {
        inside--;
        int error = errno;
        if (cuts_power()) pthread_mutex_unlock(&one_at_a_time);
        errno = error;
    }
    bool fails() const {
        if (fate_ == Fate::fail) errno = settings.error;
        return fate_ == Fate::fail;
    }
    // Of a write: what is left of `size`.
    size_t part(size_t size) const { return fate_ == Fate::pass ? size : (size + 1) / 2; }
    void written() const {
        if (fate_ == Fate::half_and_die) die();
    }

  private:
    Fate fate_ = Fate::pass;
};

// Whether the call is one to count, and then as what: `name` and `full` are set.
#define WATCHED(folder, path) \
    char full[kPathSize];     \
    const char* name = watched_path(folder, path, full)

// ==== hooks: opening and closing =================================================================

static bool exists(const char* full) {
    struct stat info;
    return REAL(lstat)(full, &info) == 0;
}

static int open_watched(int folder, const char* path, int flags, mode_t mode) {
    WATCHED(folder, path);
    if (name == nullptr) {
        int fd = REAL(openat)(folder, path, flags, mode);
        watch(fd, nullptr);
        return fd;
    }
    bool writes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)) != 0;
    Call call(writes ? FaultKind::create : FaultKind::open, name);
    if (call.fails()) return -1;
    bool made = cuts_power() && (flags & O_CREAT) != 0 && !exists(full);
    int fd = REAL(openat)(folder, path, flags, mode);
    watch(fd, name);
    if (fd < 0 || !cuts_power()) return fd;
    if (made) journal_made(full);
    if ((flags & O_TRUNC) != 0) journal_write(fd, 0);
    return fd;
}

#define OPEN_MODE(flags)                            \
    mode_t mode = 0;                                \
    if (((flags) & (O_CREAT | __O_TMPFILE)) != 0) { \
        va_list rest;                               \
        va_start(rest, flags);                      \
        mode = va_arg(rest, mode_t);                \
        va_end(rest);                               \
    }

HOOK(int, open, const char* path, int flags, ...) {
    OPEN_MODE(flags)
    return open_watched(AT_FDCWD, path, flags, mode);
}
HOOK(int, open64, const char* path, int flags, ...) {
    OPEN_MODE(flags)
    return open_watched(AT_FDCWD, path, flags, mode);
}
HOOK(int, openat, int folder, const char* path, int flags, ...) {
    OPEN_MODE(flags)
    return open_watched(folder, path, flags, mode);
}
HOOK(int, openat64, int folder, const char* path, int flags, ...) {
    OPEN_MODE(flags)
    return open_watched(folder, path, flags, mode);
}
HOOK(int, creat, const char* path, mode_t mode) {
    return open_watched(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);
}
HOOK(int, creat64, const char* path, mode_t mode) {
    return open_watched(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);
}

// A descriptor is gone even when close says that something failed.
static int close_watched(int fd) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return REAL(close)(fd);
    Call call(FaultKind::close, name);
    watch(fd, nullptr);
    int status = REAL(close)(fd);
    return call.fails() ? -1 : status;
}
HOOK(int, close, int fd) { return close_watched(fd); }

// ==== hooks: reading and writing =================================================================

HOOK(ssize_t, read, int fd, void* data, size_t size) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return REAL(read)(fd, data, size);
    Call call(FaultKind::read, name);
    return call.fails() ? -1 : REAL(read)(fd, data, call.part(size));
}
HOOK(ssize_t, pread, int fd, void* data, size_t size, off_t offset) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return REAL(pread)(fd, data, size, offset);
    Call call(FaultKind::read, name);
    return call.fails() ? -1 : REAL(pread)(fd, data, call.part(size), offset);
}
HOOK(ssize_t, pread64, int fd, void* data, size_t size, off64_t offset) {
    return hook_pread(fd, data, size, offset);
}

// Where a write will begin: what is before that stays as it is.
static off_t write_offset(int fd) {
    if ((fcntl(fd, F_GETFL) & O_APPEND) != 0) return LONG_MAX;  // the end, whatever it is
    return lseek(fd, 0, SEEK_CUR);
}

static ssize_t write_watched(int fd, const void* data, size_t size) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return REAL(write)(fd, data, size);
    Call call(FaultKind::write, name);
    if (call.fails()) return -1;
    if (cuts_power()) journal_write(fd, write_offset(fd));
    ssize_t written = REAL(write)(fd, data, call.part(size));
    call.written();
    return written;
}
HOOK(ssize_t, write, int fd, const void* data, size_t size) {
    return write_watched(fd, data, size);
}

HOOK(ssize_t, pwrite, int fd, const void* data, size_t size, off_t offset) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return REAL(pwrite)(fd, data, size, offset);
    Call call(FaultKind::write, name);
    if (call.fails()) return -1;
    if (cuts_power()) journal_write(fd, offset);
    ssize_t written = REAL(pwrite)(fd, data, call.part(size), offset);
    call.written();
    return written;
}
HOOK(ssize_t, pwrite64, int fd, const void* data, size_t size, off64_t offset) {
    return hook_pwrite(fd, data, size, offset);
}

// A write of several parts that is cut short writes the first of them, or half of a single one.
HOOK(ssize_t, writev, int fd, const struct iovec* parts, int count) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return REAL(writev)(fd, parts, count);
    if (count == 1) return write_watched(fd, parts[0].iov_base, parts[0].iov_len);
    Call call(FaultKind::write, name);
    if (call.fails()) return -1;
    if (cuts_power()) journal_write(fd, write_offset(fd));
    ssize_t written = REAL(writev)(fd, parts, int(call.part(size_t(count))));
    call.written();
    return written;
}

static int truncate_watched(int fd, off_t size) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return REAL(ftruncate)(fd, size);
    Call call(FaultKind::truncate, name);
    if (call.fails()) return -1;
    int status = REAL(ftruncate)(fd, size);
    if (status == 0 && cuts_power()) journal_write(fd, size);
    return status;
}
HOOK(int, ftruncate, int fd, off_t size) { return truncate_watched(fd, size); }
HOOK(int, ftruncate64, int fd, off64_t size) { return truncate_watched(fd, size); }

static int truncate_path(const char* path, off_t size) {
    int fd = hook_open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return -1;
    int status = truncate_watched(fd, size), error = errno;
    hook_close(fd);
    errno = error;
    return status;
}
HOOK(int, truncate, const char* path, off_t size) { return truncate_path(path, size); }
HOOK(int, truncate64, const char* path, off64_t size) { return truncate_path(path, size); }

static void* map_watched(void* at, size_t size, int access, int flags, int fd, off_t offset) {
    const char* name = (flags & MAP_ANONYMOUS) == 0 ? watched_fd(fd) : nullptr;
    if (name == nullptr) return REAL(mmap)(at, size, access, flags, fd, offset);
    Call call(FaultKind::map, name);
    return call.fails() ? MAP_FAILED : REAL(mmap)(at, size, access, flags, fd, offset);
}
HOOK(void*, mmap, void* at, size_t size, int access, int flags, int fd, off_t offset) {
    return map_watched(at, size, access, flags, fd, offset);
}
HOOK(void*, mmap64, void* at, size_t size, int access, int flags, int fd, off64_t offset) {
    return map_watched(at, size, access, flags, fd, offset);
}

// ==== hooks: syncing =============================================================================

// Set when OUT/last is switched: the save is completed once the folder is synced.
static std::atomic<ino_t> switched_folder;

static void note_sync(int fd) {
    ino_t folder = switched_folder;
    struct stat info;
    if (folder == 0 || REAL(fstat)(fd, &info) != 0 || info.st_ino != folder) return;
    switched_folder = 0;
    settings.status->completed_step = settings.status->last_step.load();
    settings.status->saves_completed = settings.status->saves_begun.load();
}

static int sync_watched(int fd, decltype(&::fsync) original) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return original(fd);
    Call call(FaultKind::sync, name);
    if (call.fails()) return -1;
    int status = original(fd);
    if (status != 0) return status;
    if (cuts_power()) journal_sync(fd);
    note_sync(fd);
    return status;
}
HOOK(int, fsync, int fd) { return sync_watched(fd, REAL(fsync)); }
HOOK(int, fdatasync, int fd) { return sync_watched(fd, REAL(fdatasync)); }

// ==== hooks: names ===============================================================================

// step_N, as the link OUT/last has it.
static void note_last(const char* full) {
    char target[64], folder[kPathSize];
    ssize_t size = REAL(readlink)(full, target, sizeof target - 1);
    if (size < 0) return;
    target[size] = '\0';
    long long step = -1;
    if (sscanf(target, "step_%lld", &step) != 1) return;
    snprintf(folder, sizeof folder, "%s", full);
    *strrchr(folder, '/') = '\0';
    struct stat info;
    if (REAL(stat)(folder, &info) != 0) return;
    settings.status->last_step = step;
    switched_folder = info.st_ino;
}

static const char* last_part(const char* name) {
    const char* slash = strrchr(name, '/');
    return slash != nullptr ? slash + 1 : name;
}

static int rename_watched(int from_folder, const char* from, int to_folder, const char* to,
                          unsigned flags) {
    char from_full[kPathSize];
    const char* from_name = watched_path(from_folder, from, from_full);
    WATCHED(to_folder, to);
    if (name == nullptr || from_name == nullptr)
        return REAL(renameat2)(from_folder, from, to_folder, to, flags);
    Call call(FaultKind::rename, name);
    if (call.fails()) return -1;
    bool replaces = cuts_power() && (flags & RENAME_EXCHANGE) == 0;
    int replaced = replaces ? journal_keep_replaced(full) : -1;
    int status = REAL(renameat2)(from_folder, from, to_folder, to, flags);
    if (status != 0) return status;
    if (cuts_power()) journal_renamed(from_full, full, replaced, flags);
    if (strcmp(last_part(name), "last") == 0) note_last(full);
    return 0;
}
HOOK(int, rename, const char* from, const char* to) {
    return rename_watched(AT_FDCWD, from, AT_FDCWD, to, 0);
}
HOOK(int, renameat, int from_folder, const char* from, int to_folder, const char* to) {
    return rename_watched(from_folder, from, to_folder, to, 0);
}
HOOK(int, renameat2, int from_folder, const char* from, int to_folder, const char* to,
     unsigned flags) {
    return rename_watched(from_folder, from, to_folder, to, flags);
}

static int unlink_watched(int folder, const char* path, int flags) {
    WATCHED(folder, path);
    if (name == nullptr) return REAL(unlinkat)(folder, path, flags);
    Call call(FaultKind::unlink, name);
    return call.fails() ? -1 : REAL(unlinkat)(folder, path, flags);
}
HOOK(int, unlink, const char* path) { return unlink_watched(AT_FDCWD, path, 0); }
HOOK(int, unlinkat, int folder, const char* path, int flags) {
    return unlink_watched(folder, path, flags);
}
HOOK(int, rmdir, const char* path) { return unlink_watched(AT_FDCWD, path, AT_REMOVEDIR); }
HOOK(int, remove, const char* path) {
    struct stat info;
    bool folder = REAL(lstat)(path, &info) == 0 && S_ISDIR(info.st_mode);
    return unlink_watched(AT_FDCWD, path, folder ? AT_REMOVEDIR : 0);
}

static bool is_new_save(const char* name) {
    const char* last = last_part(name);
    size_t length = strlen(last);
    return strncmp(last, "step_", 5) == 0 && length > 4 && strcmp(last + length - 4, ".tmp") == 0;
}

static int mkdir_watched(int folder, const char* path, mode_t mode) {
    WATCHED(folder, path);
    if (name == nullptr) return REAL(mkdirat)(folder, path, mode);
    Call call(FaultKind::mkdir, name);
    if (call.fails()) return -1;
    int status = REAL(mkdirat)(folder, path, mode);
    if (status != 0) return status;
    if (cuts_power()) journal_made(full);
    if (is_new_save(name)) settings.status->saves_begun++;
    return 0;
}
HOOK(int, mkdir, const char* path, mode_t mode) { return mkdir_watched(AT_FDCWD, path, mode); }
HOOK(int, mkdirat, int folder, const char* path, mode_t mode) {
    return mkdir_watched(folder, path, mode);
}

static int symlink_watched(const char* target, int folder, const char* path) {
    WATCHED(folder, path);
    if (name == nullptr) return REAL(symlinkat)(target, folder, path);
    Call call(FaultKind::link, name);
    if (call.fails()) return -1;
    int status = REAL(symlinkat)(target, folder, path);
    if (status == 0 && cuts_power()) journal_made(full);
    return status;
}
HOOK(int, symlink, const char* target, const char* path) {
    return symlink_watched(target, AT_FDCWD, path);
}
HOOK(int, symlinkat, const char* target, int folder, const char* path) {
    return symlink_watched(target, folder, path);
}

static int link_watched(int from_folder, const char* from, int folder, const char* path,
                        int flags) {
    WATCHED(folder, path);
    if (name == nullptr) return REAL(linkat)(from_folder, from, folder, path, flags);
    Call call(FaultKind::link, name);
    if (call.fails()) return -1;
    int status = REAL(linkat)(from_folder, from, folder, path, flags);
    if (status == 0 && cuts_power()) journal_made(full);
    return status;
}
HOOK(int, link, const char* from, const char* path) {
    return link_watched(AT_FDCWD, from, AT_FDCWD, path, 0);
}
HOOK(int, linkat, int from_folder, const char* from, int folder, const char* path, int flags) {
    return link_watched(from_folder, from, folder, path, flags);
}

// ==== hooks: looking =============================================================================

// A call that only looks at a path.
#define HOOK_LOOK(type, function, failure, ...)                            \
    {                                                                      \
        WATCHED(AT_FDCWD, path);                                           \
        if (name == nullptr) return REAL(function)(__VA_ARGS__);           \
        Call call(FaultKind::stat, name);                                  \
        return call.fails() ? type(failure) : REAL(function)(__VA_ARGS__); \
    }

HOOK(int, stat, const char* path, struct stat* info)
HOOK_LOOK(int, stat, -1, path, info)
HOOK(int, stat64, const char* path, struct stat64* info)
HOOK_LOOK(int, stat64, -1, path, info)
HOOK(int, lstat, const char* path, struct stat* info)
HOOK_LOOK(int, lstat, -1, path, info)
HOOK(int, lstat64, const char* path, struct stat64* info)
HOOK_LOOK(int, lstat64, -1, path, info)
HOOK(int, access, const char* path, int mode)
HOOK_LOOK(int, access, -1, path, mode)
HOOK(int, statvfs, const char* path, struct statvfs* info)
HOOK_LOOK(int, statvfs, -1, path, info)
HOOK(int, statvfs64, const char* path, struct statvfs64* info)
HOOK_LOOK(int, statvfs64, -1, path, info)
HOOK(ssize_t, readlink, const char* path, char* target, size_t size)
HOOK_LOOK(ssize_t, readlink, -1, path, target, size)
#define HOOK_LOOK_FD(function, ...)                              \
    {                                                            \
        const char* name = watched_fd(fd);                       \
        if (name == nullptr) return REAL(function)(__VA_ARGS__); \
        Call call(FaultKind::stat, name);                        \
        return call.fails() ? -1 : REAL(function)(__VA_ARGS__);  \
    }

HOOK(int, fstat, int fd, struct stat* info)
HOOK_LOOK_FD(fstat, fd, info) HOOK(int, fstat64, int fd, struct stat64* info)
    HOOK_LOOK_FD(fstat64, fd, info) HOOK(int, fstatvfs, int fd, struct statvfs* info)
        HOOK_LOOK_FD(fstatvfs, fd, info) HOOK(int, fstatvfs64, int fd, struct statvfs64* info)
            HOOK_LOOK_FD(fstatvfs64, fd, info)

                HOOK(int, fstatat, int folder, const char* path, struct stat* info, int flags) {
    WATCHED(folder, path);
    if (name == nullptr) return REAL(fstatat)(folder, path, info, flags);
    Call call(FaultKind::stat, name);
    return call.fails() ? -1 : REAL(fstatat)(folder, path, info, flags);
}
HOOK(int, flock, int fd, int operation) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return REAL(flock)(fd, operation);
    Call call(FaultKind::lock, name);
    return call.fails() ? -1 : REAL(flock)(fd, operation);
}

HOOK(DIR*, opendir, const char* path) {
    WATCHED(AT_FDCWD, path);
    if (name == nullptr) return REAL(opendir)(path);
    Call call(FaultKind::list, name);
    if (call.fails()) return nullptr;
    DIR* folder = REAL(opendir)(path);
    if (folder != nullptr) watch(dirfd(folder), name);
    return folder;
}
HOOK(DIR*, fdopendir, int fd) {
    const char* name = watched_fd(fd);
    if (name == nullptr) return REAL(fdopendir)(fd);
    Call call(FaultKind::list, name);
    return call.fails() ? nullptr : REAL(fdopendir)(fd);
}
HOOK(struct dirent*, readdir, DIR* folder) {
    const char* name = watched_fd(dirfd(folder));
    if (name == nullptr) return REAL(readdir)(folder);
    Call call(FaultKind::list, name);
    return call.fails() ? nullptr : REAL(readdir)(folder);
}
HOOK(struct dirent64*, readdir64, DIR* folder) {
    const char* name = watched_fd(dirfd(folder));
    if (name == nullptr) return REAL(readdir64)(folder);
    Call call(FaultKind::list, name);
    return call.fails() ? nullptr : REAL(readdir64)(folder);
}
HOOK(int, closedir, DIR* folder) {
    watch(dirfd(folder), nullptr);
    return REAL(closedir)(folder);
}

// ==== hooks: streams =============================================================================

// A stream over a watched file, of calls that are seen. Its descriptor is remembered, because such
// a stream has none of its own.
struct Stream {
    std::atomic<FILE*> file;
    int fd;
};
static Stream streams[64];

static ssize_t stream_read(void* cookie, char* data, size_t size) {
    return hook_read(static_cast<Stream*>(cookie)->fd, data, size);
}
// As the C library does, goes on where a write was short.
static ssize_t stream_write(void* cookie, const char* data, size_t size) {
    size_t done = 0;
    while (done < size) {
        ssize_t written = write_watched(static_cast<Stream*>(cookie)->fd, data + done, size - done);
        if (written < 0) break;
        done += size_t(written);
    }
    return ssize_t(done);
}
static int stream_seek(void* cookie, off64_t* offset, int whence) {
    off64_t at = lseek64(static_cast<Stream*>(cookie)->fd, *offset, whence);
    if (at < 0) return -1;
    *offset = at;
    return 0;
}
static int stream_close(void* cookie) {
    Stream* stream = static_cast<Stream*>(cookie);
    stream->file = nullptr;
    return close_watched(stream->fd);
}

static FILE* make_stream(int fd, const char* mode) {
    for (Stream& stream : streams) {
        FILE* none = nullptr;
        FILE* taken = reinterpret_cast<FILE*>(&stream);  // until there is one
        if (!stream.file.compare_exchange_strong(none, taken)) continue;
        stream.fd = fd;
        inside++;
        FILE* file =
            fopencookie(&stream, mode, {stream_read, stream_write, stream_seek, stream_close});
        inside--;
        stream.file = file;
        return file;
    }
    refuse("so many streams");
}

static FILE* open_stream(const char* path, const char* mode) {
    bool more = strchr(mode, '+') != nullptr;
    int flags = O_RDONLY;
    if (mode[0] == 'w') flags = O_WRONLY | O_CREAT | O_TRUNC;
    if (mode[0] == 'a') flags = O_WRONLY | O_CREAT | O_APPEND;
    if (more) flags = (flags & ~O_ACCMODE) | O_RDWR;
    if (strchr(mode, 'e') != nullptr) flags |= O_CLOEXEC;
    if (strchr(mode, 'x') != nullptr) flags |= O_EXCL;
    int fd = open_watched(AT_FDCWD, path, flags, 0666);
    return fd < 0 ? nullptr : make_stream(fd, mode);
}
HOOK(FILE*, fopen, const char* path, const char* mode) {
    WATCHED(AT_FDCWD, path);
    return name == nullptr ? REAL(fopen)(path, mode) : open_stream(path, mode);
}
HOOK(FILE*, fopen64, const char* path, const char* mode) {
    WATCHED(AT_FDCWD, path);
    return name == nullptr ? REAL(fopen64)(path, mode) : open_stream(path, mode);
}
HOOK(FILE*, fdopen, int fd, const char* mode) {
    return watched_fd(fd) == nullptr ? REAL(fdopen)(fd, mode) : make_stream(fd, mode);
}
static int stream_fd(FILE* file) {
    for (const Stream& stream : streams)
        if (stream.file == file && file != nullptr) return stream.fd;
    return -1;
}
HOOK(int, fileno, FILE* file) {
    int fd = stream_fd(file);
    return fd >= 0 ? fd : REAL(fileno)(file);
}
HOOK(int, fileno_unlocked, FILE* file) {
    int fd = stream_fd(file);
    return fd >= 0 ? fd : REAL(fileno_unlocked)(file);
}

// ==== hooks: memory ==============================================================================

// The C library's own names for its allocator, which need no search.
extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* old, size_t size);
void* __libc_memalign(size_t alignment, size_t size);
}

static bool allocation_fails() {
    if (!armed || !settings.allocations || inside > 0) return false;
    inside++;
    bool fails = count(FaultKind::alloc, "memory") == Fate::fail;
    inside--;
    if (fails) errno = ENOMEM;
    return fails;
}
HOOK(void*, malloc, size_t size) { return allocation_fails() ? nullptr : __libc_malloc(size); }
HOOK(void*, calloc, size_t count, size_t size) {
    return allocation_fails() ? nullptr : __libc_calloc(count, size);
}
HOOK(void*, realloc, void* old, size_t size) {
    return size > 0 && allocation_fails() ? nullptr : __libc_realloc(old, size);
}
HOOK(void*, memalign, size_t alignment, size_t size) {
    return allocation_fails() ? nullptr : __libc_memalign(alignment, size);
}
HOOK(void*, aligned_alloc, size_t alignment, size_t size) {
    return allocation_fails() ? nullptr : __libc_memalign(alignment, size);
}
HOOK(int, posix_memalign, void** out, size_t alignment, size_t size) {
    if (allocation_fails()) return ENOMEM;
    *out = __libc_memalign(alignment, size);
    return *out != nullptr ? 0 : ENOMEM;
}

// ==== main =======================================================================================

using Main = int (*)(int, char**, char**);
static Main program_main;

// A power cut at call 0 is one after the end. (What the program leaves to exit handlers, such as
// the output that standard streams still hold, is no concern of a test of files.)
static int watched_main(int argc, char** argv, char** environment) {
    armed = true;
    int code = program_main(argc, argv, environment);
    armed = false;
    if (cuts_power() && settings.at == 0) {
        inject(FaultKind::close, "the end");
        cut_power_now();
    }
    return code;
}

HOOK(int, __libc_start_main, Main program, int argc, char** argv, void (*init)(), void (*fini)(),
     void (*loader_fini)(), void* stack_end) {
    read_settings();
    program_main = program;
    auto original =
        reinterpret_cast<decltype(&hook___libc_start_main)>(dlsym(RTLD_NEXT, "__libc_start_main"));
    return original(settings.root_length > 0 ? watched_main : program, argc, argv, init, fini,
                    loader_fini, stack_end);
}
