// What every part of the harness does: start the program with a fault, judge the folder that it
// left, go on without faults, and compare the end with that of a run that was left alone.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include <functional>
#include <mutex>
#include <sstream>
#include <thread>

#include "../../checkpoint.h"
#include "status.h"

using Words = std::vector<std::string>;

inline double seconds() {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

inline void sleep_seconds(double s) {
    if (s > 0) usleep(useconds_t(s * 1e6));
}

struct Settings {
    std::string program, name, library, folder;
    bool soak = false, verbose = false;
    uint64_t seed = 1;
    int jobs = 2;
    size_t kills = 0, allocations = 0;
    std::string only;
    std::string dtype = "fp32";  // --dtype
    bool newer = false;          // the program tries a failed save again, and knows OUT/stop
};

// ==== counting ===================================================================================

class Tally {
  public:
    // One check of what a fault left; `problem` is empty when there is none.
    void add(const std::string& what, const std::string& problem) {
        std::lock_guard<std::mutex> lock(mutex_);
        (problem.empty() ? passed_ : failed_)++;
        if (problem.empty()) return;
        std::string kind;  // without numbers, which are all that many of them differ in
        for (char c : problem.substr(0, 50))
            if (!isdigit(c)) kind += c;
        constexpr size_t kShown = 5;
        if (++kinds_[kind] > kShown) return;
        printf("-- FAILED: %s: %s\n", what.c_str(), problem.c_str());
        if (kinds_[kind] == kShown) printf("   (more of this kind are counted, and not shown)\n");
        fflush(stdout);
    }
    void skip(const std::string& why) {
        std::lock_guard<std::mutex> lock(mutex_);
        printf("-- skipped: %s\n", why.c_str());
        skipped_++;
    }
    void say(const std::string& line) {
        std::lock_guard<std::mutex> lock(mutex_);
        printf("%s\n", line.c_str());
        fflush(stdout);
    }
    int finish() const {
        printf("faults injected: %zu\n", faults.load());
        printf("kills survived: %zu, of them %zu during a save\n", kills.load(),
               kills_in_saves.load());
        printf("%zu passed, %zu failed, %zu skipped\n", passed_, failed_, skipped_);
        return failed_ == 0 ? 0 : 1;
    }

    std::atomic<size_t> faults{0}, kills{0}, kills_in_saves{0};

  private:
    std::mutex mutex_;
    size_t passed_ = 0, failed_ = 0, skipped_ = 0;
    std::map<std::string, size_t> kinds_;
};

// Runs work(i, worker) for i in [0, count), `jobs` at a time.
inline void in_parallel(size_t count, int jobs, const std::function<void(size_t, int)>& work) {
    std::atomic<size_t> next{0};
    std::vector<std::thread> threads;
    for (int worker = 0; worker < jobs; worker++)
        threads.emplace_back([&, worker] {
            for (size_t i; (i = next++) < count;) work(i, worker);
        });
    for (std::thread& thread : threads) thread.join();
}

// ==== a place to run in ==========================================================================

// BASE/root is watched, and the working folder of the program; what is undone by a power cut goes
// to BASE/aside; outputs are beside them.
class Place {
  public:
    explicit Place(const std::string& base) : base_(base) {
        fs::remove_all(base);
        fs::create_directories(aside());
        fs::create_directories(root());
        int fd = open(status_path().c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (fd < 0 || ftruncate(fd, sizeof(FaultStatus)) != 0) fail_errno(status_path(), "create");
        fchmod(fd, 0666);  // also for a program that runs as another user
        void* page = mmap(nullptr, sizeof(FaultStatus), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
        if (page == MAP_FAILED) fail_errno(status_path(), "map");
        status_ = static_cast<FaultStatus*>(page);
    }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;
    ~Place() {
        munmap(status_, sizeof(FaultStatus));
        std::error_code ignored;
        if (!kept_) fs::remove_all(base_, ignored);
    }

    const std::string& base() const { return base_; }
    std::string root() const { return base_ + "/root"; }
    std::string aside() const { return base_ + "/aside"; }
    std::string out() const { return root() + "/run"; }
    std::string status_path() const { return base_ + "/status"; }
    std::string path(const std::string& name) const { return base_ + "/" + name; }
    FaultStatus& status() { return *status_; }
    void keep() { kept_ = true; }

    // The state to begin from; links stay links.
    void fill(const std::string& start) {
        fs::copy(start, root(), fs::copy_options::recursive | fs::copy_options::copy_symlinks);
    }
    void clear_status() {
        memset(static_cast<void*>(status_), 0, sizeof(FaultStatus));
        status_->last_step = status_->completed_step = -1;
    }

  private:
    std::string base_;
    FaultStatus* status_ = nullptr;
    bool kept_ = false;
};

// ==== the program ================================================================================

struct Fault {
    std::string mode = "count";
    uint64_t at = 0;
    bool allocations = false;
    std::string trace;

    std::string text() const {
        return mode + (allocations ? " at allocation " : " at call ") + std::to_string(at);
    }
};

struct Outcome {
    int code = -1, signal = 0;  // one of them
    bool hung = false;
    std::string out, err;

    bool killed() const { return signal == SIGKILL; }
    std::string text() const {
        if (hung) return "did not end";
        return signal != 0 ? format("signal %d", signal) : format("exit code %d", code);
    }
};

// One call of the program. Everything that a child needs is made before the fork: the harness has
// threads.
class Process {
  public:
    Process(const Settings& settings, Place& place, const Words& words, const Fault* fault,
            uid_t user = 0)
        : place_(place) {
        words_ = {settings.program};
        words_.insert(words_.end(), words.begin(), words.end());
        for (char** entry = environ; *entry != nullptr; entry++) environment_.push_back(*entry);
        if (fault != nullptr) {
            place.clear_status();
            environment_.push_back("LD_PRELOAD=" + settings.library);
            environment_.push_back("FAULTS_ROOT=" + place.root());
            environment_.push_back("FAULTS_MODE=" + fault->mode);
            environment_.push_back("FAULTS_AT=" + std::to_string(fault->at));
            environment_.push_back("FAULTS_STATUS=" + place.status_path());
            environment_.push_back("FAULTS_ASIDE=" + place.aside());
            if (fault->allocations) environment_.push_back("FAULTS_WHAT=allocations");
            if (!fault->trace.empty()) environment_.push_back("FAULTS_TRACE=" + fault->trace);
        }
        start(pointers(words_), pointers(environment_), user);
    }
    ~Process() {
        if (!reaped_) kill_now(), finish(10);
    }
    Process(const Process&) = delete;
    Process& operator=(const Process&) = delete;

    pid_t id() const { return child_; }
    void kill_now() const { kill(child_, SIGKILL); }
    void send(int signal) const { kill(child_, signal); }

    bool ended() {
        if (!reaped_) reaped_ = waitpid(child_, &status_, WNOHANG) == child_;
        return reaped_;
    }
    // Waits for `condition`, the end of the process or the time: true for the first.
    bool wait_for(const std::function<bool()>& condition, double limit_s) {
        for (double end_s = seconds() + limit_s; !condition(); usleep(100))
            if (ended() || seconds() > end_s) return false;
        return true;
    }
    Outcome finish(double limit_s = 60) {
        Outcome outcome;
        for (double end_s = seconds() + limit_s; !ended(); usleep(300)) {
            if (seconds() < end_s) continue;
            outcome.hung = true;
            kill_now();
            end_s += 1000;
        }
        if (WIFEXITED(status_)) outcome.code = WEXITSTATUS(status_);
        else outcome.signal = WTERMSIG(status_);
        outcome.out = read_file(place_.path("stdout"));
        outcome.err = read_file(place_.path("stderr"));
        return outcome;
    }

  private:
    static std::vector<char*> pointers(Words& words) {
        std::vector<char*> all;
        for (std::string& word : words) all.push_back(word.data());
        all.push_back(nullptr);
        return all;
    }
    void start(const std::vector<char*>& argv, const std::vector<char*>& environment, uid_t user) {
        std::string out = place_.path("stdout"), err = place_.path("stderr"), root = place_.root();
        int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC;
        int fds[3] = {open("/dev/null", O_RDONLY | O_CLOEXEC), open(out.c_str(), flags, 0644),
                      open(err.c_str(), flags, 0644)};
        child_ = fork();
        if (child_ == 0) {
            for (int i = 0; i < 3; i++) dup2(fds[i], i);
            if (user != 0 && (setgid(user) != 0 || setuid(user) != 0)) _exit(126);
            if (chdir(root.c_str()) != 0) _exit(126);
            execve(argv[0], argv.data(), environment.data());
            _exit(127);
        }
        for (int fd : fds) close(fd);
    }

    Place& place_;
    Words words_, environment_;
    pid_t child_ = -1;
    int status_ = 0;
    bool reaped_ = false;
};

inline Outcome run_program(const Settings& settings, Place& place, const Words& words,
                           const Fault* fault = nullptr) {
    return Process(settings, place, words, fault).finish();
}

// ==== judging ====================================================================================

// Exit codes are those of the README, and what is on stderr are lines of the program: one error
// where it failed, and none where it did not. (libgomp ends the program itself when memory for its
// threads is missing, in a line of each thread's, whatever the program says meanwhile.)
inline std::string judge_outcome(const Settings& settings, const Outcome& outcome, bool may_die) {
    if (outcome.killed() && may_die && !outcome.hung) return "";
    bool stopped = outcome.code == 128 + SIGINT || outcome.code == 128 + SIGTERM ||
                   outcome.code == 128 + SIGHUP || outcome.code == 128 + SIGUSR1;
    if (outcome.hung || outcome.signal != 0 || (outcome.code > 2 && !stopped))
        return outcome.text() + ": " + outcome.err;
    size_t errors = 0;
    std::istringstream lines(outcome.err);
    // (Another thread may end the program before the rest of libgomp's line.)
    bool of_libgomp = outcome.code == 1 && outcome.err.find("\nlibgomp: ") != std::string::npos;
    for (std::string line; std::getline(lines, line);) {
        if (of_libgomp && line.empty()) continue;
        bool error = line.starts_with(settings.name + ": error: ") ||
                     (of_libgomp && line.starts_with("libgomp: "));
        if (!error && !line.starts_with(settings.name + ": warning: "))
            return "not a line of the program on stderr: " + line;
        errors += error;
    }
    bool failed = outcome.code == 1 || outcome.code == 2;
    if (of_libgomp && errors > 1) errors = 1;
    if (errors != size_t(failed))
        return format("%s, and %zu errors on stderr: ", outcome.text().c_str(), errors) +
               outcome.err;
    return "";
}

// The step of the newest checkpoint that verifies, or -1.
inline int64_t newest_step(const std::string& out) {
    std::vector<StepFolder> all = list_steps(out, "");
    for (const StepFolder& replaced : list_steps(out, ".old")) all.push_back(replaced);
    int64_t newest = -1;
    for (const StepFolder& folder : all) {
        if (int64_t(folder.step) <= newest) continue;
        try {
            verify_checkpoint(join_path(out, folder.name));
            newest = int64_t(folder.step);
        } catch (const Error&) {}
    }
    return newest;
}

// A folder whenever the program or the machine has stopped: what the links name is whole, and no
// save that had been completed is lost.
inline std::string judge_folder(const std::string& out, int64_t completed_step) {
    for (const char* link : {"last", "best"}) {
        std::string path = join_path(out, link);
        std::error_code ignored;
        if (!fs::exists(fs::symlink_status(path, ignored))) {
            if (completed_step >= 0 && link == std::string("last")) return "last is gone";
            continue;
        }
        std::string target = linked_step(out, link);
        if (target.empty()) return std::string(link) + " is no link to a checkpoint";
        try {
            verify_checkpoint(join_path(out, target));
        } catch (const Error& error) { return format("%s names ", link) + error.what(); }
    }
    int64_t newest = newest_step(out);
    if (newest < completed_step)
        return format("the save of step %lld is lost: the newest is of step %lld",
                      static_cast<long long>(completed_step), static_cast<long long>(newest));
    return "";
}

// ==== comparing ==================================================================================

// What must be the same in the log of a run that was interrupted.
struct LogRecords {
    std::vector<std::string> steps;
    std::string problem;
};

inline LogRecords read_log(const std::string& path) {
    LogRecords log;
    std::string text;
    try {
        text = read_file(path);
    } catch (const Error& error) {
        log.problem = error.what();
        return log;
    }
    if (!text.empty() && text.back() != '\n') log.problem = "the log's last record is cut";
    std::istringstream lines(text);
    size_t number = 0, headers = 0;
    for (std::string line; std::getline(lines, line); number++) {
        json record = json::parse(line, nullptr, false);
        if (!record.is_object()) {
            log.problem = format("line %zu of the log is no record: ", number + 1) + line;
        } else if (record.contains("step") && record.contains("train_loss")) {
            ordered_json kept;
            for (const char* key : {"step", "train_loss", "val_loss", "grad_norm", "learning_rate",
                                    "tokens", "epoch"})
                if (record.contains(key)) kept[key] = record[key];
            log.steps.push_back(kept.dump());
        } else if (!record.contains("event") && (headers++ > 0 || number > 0)) {
            log.problem = format("line %zu of the log is no record of a step: ", number + 1) + line;
        }
    }
    return log;
}

// Whether a run ended as the one that was left alone did, to the last bit.
inline std::string compare_end(const std::string& out, const std::string& reference,
                               bool whole_log = true) {
    for (const char* name : {"last/model.safetensors", "last/optimizer.safetensors"}) {
        std::string path = join_path(out, name);
        if (!path_exists(path)) return std::string(name) + " is not there at the end";
        if (read_file(path) != read_file(join_path(reference, name)))
            return std::string(name) + " differs at the end";
    }
    if (!whole_log) return "";
    LogRecords mine = read_log(join_path(out, "log.jsonl"));
    LogRecords theirs = read_log(join_path(reference, "log.jsonl"));
    if (!mine.problem.empty()) return mine.problem;
    for (size_t i = 0; i < std::max(mine.steps.size(), theirs.steps.size()); i++) {
        if (i >= mine.steps.size() || i >= theirs.steps.size())
            return format("the log has %zu steps in place of %zu", mine.steps.size(),
                          theirs.steps.size());
        if (mine.steps[i] != theirs.steps[i])
            return "the log has " + mine.steps[i] + " in place of " + theirs.steps[i];
    }
    return "";
}

inline std::string leftovers(const std::string& out) {
    for (const auto& entry : fs::recursive_directory_iterator(out)) {
        std::string name = entry.path().filename().string();
        if (name.ends_with(".tmp") || name.ends_with(".old")) return name + " was left";
    }
    return "";
}

inline bool is_finished(const std::string& out) {
    try {
        return read_json_object(join_path(out, "last/trainer.json")).value("finished", false);
    } catch (const Error&) { return false; }
}

// After any end: goes on without faults until the run is done, and compares.
inline std::string resume_and_compare(const Settings& settings, Place& place, const Words& words,
                                      const std::string& reference) {
    if (!is_finished(place.out())) {
        Outcome outcome = run_program(settings, place, words);
        if (outcome.code != 0) return "going on: " + outcome.text() + ": " + outcome.err;
        std::string problem = leftovers(place.out());
        if (!problem.empty()) return problem;
    }
    std::string problem = judge_folder(place.out(), 0);
    return problem.empty() ? compare_end(place.out(), reference) : problem;
}
