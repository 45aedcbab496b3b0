// What a power cut would take back: the journal of changes in the watched folder that no sync has
// made durable yet. See README.md for the model. Every call is made with the library's lock held.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "hooks.h"

// ==== files whose content is not synced ==========================================================

struct DirtyFile {
    dev_t device;
    ino_t inode;
    int fd;  // of our own: the program may have closed its own, or renamed the file
    off_t synced;
};

// Folders are held open, so that a name in one is found whatever the folder is called by now.
struct HeldFolder {
    dev_t device;
    ino_t inode;
    int fd;
};

// A name that appeared: made anew, or by a rename, over an old file of that name or not, or changed
// with another.
struct NewName {
    bool renamed;
    unsigned flags;  // RENAME_EXCHANGE
    int from, to;    // folders
    char from_name[128], to_name[128];
    int replaced;  // the old file is kept aside under this number; -1: there was none
};

struct Journal {
    static constexpr int kMost = 4096;
    DirtyFile files[kMost];
    HeldFolder folders[kMost];
    NewName names[kMost];
    int file_count, folder_count, name_count;
    int aside;        // the folder for what is replaced and undone, on the same file system
    int aside_names;  // used in it
};

inline Journal journal;

[[noreturn]] inline void journal_is_full() {
    static const char message[] = "faults: the journal is full\n";
    REAL(write)(2, message, sizeof message - 1);
    die();
}

// To be called before the write, while the size is still the one that was there.
inline void journal_write(int fd, off_t synced) {
    struct stat info;
    if (REAL(fstat)(fd, &info) != 0 || !S_ISREG(info.st_mode)) return;
    for (int i = 0; i < journal.file_count; i++) {
        DirtyFile& file = journal.files[i];
        if (file.device != info.st_dev || file.inode != info.st_ino) continue;
        if (synced < file.synced) file.synced = synced;
        return;
    }
    if (journal.file_count == Journal::kMost) journal_is_full();
    int own = fcntl(fd, F_DUPFD_CLOEXEC, kFirstOwnFd);
    if (synced > info.st_size) synced = info.st_size;
    journal.files[journal.file_count++] = {info.st_dev, info.st_ino, own, synced};
}

inline void journal_sync_file(const struct stat& info) {
    for (int i = 0; i < journal.file_count; i++) {
        DirtyFile& file = journal.files[i];
        if (file.device != info.st_dev || file.inode != info.st_ino) continue;
        REAL(close)(file.fd);
        file = journal.files[--journal.file_count];
        return;
    }
}

// ==== names whose folder is not synced ===========================================================

// The number of the folder that holds `path`, and the name in it.
inline int hold_folder(const char* path, char* name) {
    char folder[kPathSize];
    snprintf(folder, sizeof folder, "%s", path);
    size_t length = strlen(folder);
    while (length > 1 && folder[length - 1] == '/') folder[--length] = '\0';
    char* slash = strrchr(folder, '/');
    snprintf(name, sizeof NewName::to_name, "%s", slash + 1);
    *slash = '\0';
    int fd = REAL(open)(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || REAL(fstat)(fd, &info) != 0) return -1;
    for (int i = 0; i < journal.folder_count; i++) {
        if (journal.folders[i].device != info.st_dev || journal.folders[i].inode != info.st_ino)
            continue;
        REAL(close)(fd);
        return i;
    }
    if (journal.folder_count == Journal::kMost) journal_is_full();
    int own = fcntl(fd, F_DUPFD_CLOEXEC, kFirstOwnFd);
    REAL(close)(fd);
    journal.folders[journal.folder_count] = {info.st_dev, info.st_ino, own};
    return journal.folder_count++;
}

inline NewName& journal_add() {
    if (journal.name_count == Journal::kMost) journal_is_full();
    return journal.names[journal.name_count++];
}

// `path` was not there, and is now.
inline void journal_made(const char* path) {
    NewName made = {};
    made.replaced = -1;
    made.to = hold_folder(path, made.to_name);
    if (made.to >= 0) journal_add() = made;
}

// A rename to such a name is the first step of a removal, which is taken to be durable at once.
inline bool is_removal(const char* to) {
    size_t length = strlen(to);
    return length > 4 &&
           (strcmp(to + length - 4, ".tmp") == 0 || strcmp(to + length - 4, ".old") == 0);
}

// To be called before a rename: holds on to the file that it would replace, under a second name.
// Returns what journal_renamed takes.
inline int journal_keep_replaced(const char* to) {
    struct stat info;
    if (REAL(lstat)(to, &info) != 0 || S_ISDIR(info.st_mode)) return -1;
    char name[32];
    snprintf(name, sizeof name, "%d", journal.aside_names);
    if (REAL(linkat)(AT_FDCWD, to, journal.aside, name, 0) != 0) return -1;
    return journal.aside_names++;
}

inline void journal_renamed(const char* from, const char* to, int replaced, unsigned flags) {
    bool exchanged = (flags & RENAME_EXCHANGE) != 0;
    if (is_removal(to) && !exchanged) return;
    NewName entry = {};
    entry.renamed = true;
    entry.flags = flags & RENAME_EXCHANGE;
    entry.replaced = replaced;
    entry.from = hold_folder(from, entry.from_name);
    entry.to = hold_folder(to, entry.to_name);
    if (entry.from >= 0 && entry.to >= 0) journal_add() = entry;
}

inline void journal_sync_folder(const struct stat& info) {
    int kept = 0;
    for (int i = 0; i < journal.name_count; i++) {
        const HeldFolder& folder = journal.folders[journal.names[i].to];
        if (folder.device == info.st_dev && folder.inode == info.st_ino) continue;
        journal.names[kept++] = journal.names[i];
    }
    journal.name_count = kept;
}

inline void journal_sync(int fd) {
    struct stat info;
    if (REAL(fstat)(fd, &info) != 0) return;
    if (S_ISDIR(info.st_mode)) journal_sync_folder(info);
    else journal_sync_file(info);
}

// ==== the power cut ==============================================================================

// Undone names go to the folder aside, with all that is in them.
inline void undo(const NewName& entry) {
    int to = journal.folders[entry.to].fd;
    char name[32];
    if (!entry.renamed) {
        snprintf(name, sizeof name, "%d", journal.aside_names++);
        REAL(renameat)(to, entry.to_name, journal.aside, name);
        return;
    }
    int from = journal.folders[entry.from].fd;
    if (REAL(renameat2)(to, entry.to_name, from, entry.from_name, entry.flags) != 0) return;
    if (entry.replaced < 0) return;
    snprintf(name, sizeof name, "%d", entry.replaced);
    REAL(renameat)(journal.aside, name, to, entry.to_name);
}

// What becomes of the changes that no sync made durable.
enum class Cut {
    all,    // none of them is there
    zeros,  // the same, but of content the size is there and the bytes are zero, as journaling file
            // systems leave it
    some,   // some are there and some are not, in no order
};

// A coin for the i-th change that falls the same way in every run with the same seed.
inline bool is_spared(uint64_t seed, int i) {
    uint64_t bits = (seed * 1000 + uint64_t(i) + 1) * 0x9E3779B97F4A7C15;
    return (bits ^ bits >> 29) >> 32 & 1;
}

// Leaves the folder as the disk would hold it, and ends the process.
[[noreturn]] inline void cut_power(Cut cut, uint64_t seed) {
    for (int i = 0; i < journal.file_count; i++) {
        const DirtyFile& file = journal.files[i];
        struct stat info;
        if (REAL(fstat)(file.fd, &info) != 0 || info.st_size <= file.synced) continue;
        bool zeros = cut == Cut::zeros || (cut == Cut::some && is_spared(seed, -i - 2));
        if (REAL(ftruncate)(file.fd, file.synced) != 0) continue;
        if (zeros && REAL(ftruncate)(file.fd, info.st_size) != 0) continue;
    }
    for (int i = journal.name_count; i-- > 0;)
        if (cut != Cut::some || !is_spared(seed, i)) undo(journal.names[i]);
    die();
}
