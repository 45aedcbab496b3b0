// The processes of one job: who they are, how they find each other, and small exchanges among them.
//
// A launcher (mpirun, srun, torchrun, or --gpus here) starts the same program many times and tells
// each process its rank in environment variables; MPI itself is never linked. The ranks meet at
// rank 0, over TCP, and keep that connection: a star. Bytes, checks and barriers go through it, and
// so does bad news: a rank that dies, hangs or reports an error ends all others within a second,
// with one and the same line. Nothing here knows of a GPU.
//
// The order: ranks from the environment; where to meet; --gpus; messages; sockets; meeting; the
// link.
#pragma once

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#ifdef __linux__
#    include <sys/prctl.h>
#endif

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <functional>
#include <mutex>
#include <optional>
#include <random>
#include <thread>

#include "files.h"

// Seconds of a clock that never goes back.
inline double steady_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// ==== ranks from the environment =================================================================

constexpr int kMostRanks = 16384;

struct Ranks {
    int rank = 0, world = 1, local_rank = 0, local_world = 1;  // local: among those of this node
    std::string source;  // who started the processes; empty: nobody did, and this is the only one
    std::string job;     // the same on every rank and, as far as can be known, in no other job
    std::string parent = {};  // tells jobs of one node apart as well, where no place to meet does
};

// How variables are looked up: getenv, but in tests.
using Environment = std::function<const char*(const char*)>;
inline const char* own_environment(const char* name) { return getenv(name); }

// "" where it is not set.
inline std::string variable(const Environment& environment, const char* name) {
    const char* value = environment(name);
    return value == nullptr ? "" : value;
}

// A whole number from `least` to `most`; fail_input names the variable.
inline int rank_variable(const Environment& environment, const char* name, const char* source,
                         int least, int most) {
    std::string text = variable(environment, name);
    if (text.empty())
        fail_input("%s is not set, though others of %s are: all or none must be", name, source);
    bool digits = text.size() <= 9 && text.find_first_not_of("0123456789") == std::string::npos;
    int value = digits ? atoi(text.c_str()) : -1;
    if (value < least || value > most)
        fail_input("%s=%.40s: must be a whole number from %d to %d", name, one_line(text).c_str(),
                   least, most);
    return value;
}

// What the launchers call their four numbers.
struct RankVariables {
    const char *source, *rank, *world, *local_rank, *local_world;
};
constexpr RankVariables kOwnVariables = {"--gpus", "GPT2_RANK", "GPT2_WORLD", "GPT2_LOCAL_RANK",
                                         "GPT2_LOCAL_WORLD"};
constexpr RankVariables kTorchVariables = {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK",
                                           "LOCAL_WORLD_SIZE"};
constexpr RankVariables kOpenMpiVariables = {"OpenMPI", "OMPI_COMM_WORLD_RANK",
                                             "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                                             "OMPI_COMM_WORLD_LOCAL_SIZE"};
constexpr RankVariables kHydraVariables = {"MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID",
                                           "MPI_LOCALNRANKS"};

inline Ranks read_launcher_ranks(const Environment& environment, const RankVariables& names) {
    Ranks r;
    r.source = names.source;
    r.world = rank_variable(environment, names.world, names.source, 1, kMostRanks);
    r.rank = rank_variable(environment, names.rank, names.source, 0, r.world - 1);
    r.local_world = rank_variable(environment, names.local_world, names.source, 1, r.world);
    r.local_rank = rank_variable(environment, names.local_rank, names.source, 0, r.local_world - 1);
    return r;
}

// The entry of node `node` in Slurm's list of tasks by node: "4(x2),3" is 4, 4, 3. 0 where the list
// does not say.
inline int slurm_tasks_of_node(const std::string& list, int node) {
    size_t at = 0;
    for (int first = 0; at < list.size();) {
        int tasks = 0, times = 1, read = 0, more = 0;
        if (sscanf(list.c_str() + at, "%6d%n", &tasks, &read) != 1 || tasks < 1) return 0;
        at += size_t(read);
        if (sscanf(list.c_str() + at, "(x%6d)%n", &times, &more) == 1 && more > 0)
            at += size_t(more);
        else times = 1;
        if (times < 1 || (at < list.size() && list[at++] != ',')) return 0;
        if (node < first + times) return tasks;
        first += times;
    }
    return 0;
}

// The first host of a Slurm list: "gnode[007,9-12],x3" is gnode007; "r[1-2]n[3-4]" is r1n3.
inline std::string first_slurm_host(const std::string& list) {
    std::string host;
    for (size_t at = 0; at < list.size() && list[at] != ','; at++) {
        if (list[at] != '[') {
            host += list[at];
            continue;
        }
        size_t end = list.find_first_of(",-]", at + 1), close = list.find(']', at);
        if (end == std::string::npos || close == std::string::npos) return "";
        host += list.substr(at + 1, end - at - 1);
        at = close;
    }
    return host;
}

// Whether srun started this process. A batch script and a shell that salloc opens have most of the
// variables too, but are no step: slurmstepd leaves SLURM_STEP_ID out for those (older ones give
// the reserved numbers at the end of 32 bits).
inline bool in_slurm_step(const Environment& environment) {
    constexpr unsigned long kReserved = 0xfffffff0;
    std::string step = variable(environment, "SLURM_STEP_ID");
    return !step.empty() && step[0] != '-' && strtoul(step.c_str(), nullptr, 10) < kReserved;
}

inline Ranks read_slurm_ranks(const Environment& environment) {
    Ranks r;
    r.source = "Slurm";
    // What sbatch was given can differ from what this srun was, so that the step's own words count.
    auto step_or_job = [&](const char* step, const char* job) {
        return variable(environment, step).empty() ? job : step;
    };
    r.world = rank_variable(environment, step_or_job("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
                            "srun", 1, kMostRanks);
    r.rank = rank_variable(environment, "SLURM_PROCID", "srun", 0, r.world - 1);
    r.local_rank = rank_variable(environment, "SLURM_LOCALID", "srun", 0, r.world - 1);
    const char* by_node = step_or_job("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE");
    std::string list = variable(environment, by_node);
    if (list.empty() && r.world > 1)
        fail_input("SLURM_STEP_TASKS_PER_NODE is not set, though others of srun are");
    int node = 0;
    if (r.world > 1) node = rank_variable(environment, "SLURM_NODEID", "srun", 0, r.world - 1);
    r.local_world = r.world == 1 ? 1 : slurm_tasks_of_node(list, node);
    if (r.local_world < 1 || r.local_world > r.world)
        fail_input("%s=%.80s: does not say how many of the %d tasks node %d has", by_node,
                   one_line(list).c_str(), r.world, node);
    if (r.local_rank >= r.local_world)
        fail_input("SLURM_LOCALID=%d contradicts %s=%.80s: node %d has %d tasks", r.local_rank,
                   by_node, one_line(list).c_str(), node, r.local_world);
    return r;
}

// A name of the job that every rank can tell without asking another. What is empty must be told
// apart by where the ranks meet.
inline std::string job_name(const Ranks& r, const Environment& environment) {
    auto of = [&](const char* name) { return variable(environment, name); };
    if (r.source == "--gpus") return of("GPT2_JOB");
    if (r.source == "torchrun")
        return of("TORCHELASTIC_RUN_ID") + " " + of("TORCHELASTIC_RESTART_COUNT") + " " +
               of("MASTER_ADDR") + " " + of("MASTER_PORT");
    if (r.source == "Slurm")
        return of("SLURM_JOB_ID") + "." + of("SLURM_STEP_ID") + " " + of("SLURM_RESTART_COUNT");
    if (r.source == "OpenMPI")
        for (const char* name :
             {"PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_ess_base_jobid"})
            if (!of(name).empty()) return of(name);
    return of("SLURM_JOB_ID");
}

// A batch script may export WORLD_SIZE and RANK for torchrun's sake while another launcher counts.
inline void check_contradiction(const Environment& environment, const Ranks& r) {
    const std::pair<const char*, int> kNumbers[] = {{"RANK", r.rank}, {"WORLD_SIZE", r.world}};
    for (auto [name, value] : kNumbers) {
        std::string text = variable(environment, name);
        if (!text.empty() && text != std::to_string(value))
            fail_input("%s=%.40s contradicts %s, by which it is %d: unset it", name,
                       one_line(text).c_str(), r.source.c_str(), value);
    }
}

// Who this process is, by the variables of the innermost launcher; {} where there is none.
// fail_input where they are malformed, incomplete or contradict each other, with the variable's
// name.
inline Ranks find_ranks(const Environment& environment = own_environment) {
    auto has = [&](const char* name) { return !variable(environment, name).empty(); };
    Ranks r;
    if (has(kOwnVariables.rank) || has(kOwnVariables.world)) {
        r = read_launcher_ranks(environment, kOwnVariables);
    } else if (has("TORCHELASTIC_RUN_ID")) {  // which mpirun or srun may have started, once a node
        r = read_launcher_ranks(environment, kTorchVariables);
    } else if (has(kOpenMpiVariables.rank) || has(kOpenMpiVariables.world)) {
        r = read_launcher_ranks(environment, kOpenMpiVariables);
        check_contradiction(environment, r);
    } else if ((has(kHydraVariables.rank) || has(kHydraVariables.world)) &&
               // srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE as well, and no more than those
               (has(kHydraVariables.local_rank) || !in_slurm_step(environment))) {
        r = read_launcher_ranks(environment, kHydraVariables);
        check_contradiction(environment, r);
    } else if (in_slurm_step(environment)) {
        r = read_slurm_ranks(environment);
        check_contradiction(environment, r);
    } else if (has(kTorchVariables.rank) || has(kTorchVariables.world)) {
        r = read_launcher_ranks(environment, kTorchVariables);
    } else {
        return r;
    }
    r.job = job_name(r, environment);
    // All processes of a node have one parent, unless each was wrapped in a script of its own.
    if (r.local_world == r.world && r.job == variable(environment, "SLURM_JOB_ID"))
        r.parent = format(" parent %d", int(getppid()));
    return r;
}

// ==== where to meet ==============================================================================

// Where rank 0 listens, and how the others learn of it.
struct Meeting {
    std::string host;        // of rank 0
    std::vector<int> ports;  // rank 0 takes the first that is free, and the others try them all
    std::string file;        // instead of both: a file in which rank 0 writes where it listens
    bool one_node = false;   // nobody else needs to reach rank 0
    uint64_t token = 0;      // by which ranks of this job know each other
    std::string said;        // for messages: the option, or what it was derived from
};

inline int parse_port(const std::string& text) {
    bool digits = !text.empty() && text.size() <= 5 &&
                  text.find_first_not_of("0123456789") == std::string::npos;
    int port = digits ? atoi(text.c_str()) : 0;
    return port <= 65535 ? port : 0;
}

// host:port, [address]:port or file:PATH; fail_input for anything else.
inline void parse_rendezvous(const std::string& option, Meeting* meeting) {
    auto refuse = [&](const char* why) {
        fail_input("--rendezvous %.200s: %s: must be host:port, [address]:port or file:PATH",
                   one_line(option).c_str(), why);
    };
    if (option.rfind("file:", 0) == 0) {
        meeting->file = option.substr(5);
        if (meeting->file.empty()) refuse("names no file");
        return;
    }
    size_t colon = option.rfind(':');
    if (colon == std::string::npos) refuse("has no port");
    meeting->host = option.substr(0, colon);
    int port = parse_port(option.substr(colon + 1));
    if (port == 0) refuse("the port is no number from 1 to 65535");
    meeting->ports = {port};
    std::string& host = meeting->host;
    if (host.size() > 2 && host.front() == '[' && host.back() == ']')
        host = host.substr(1, host.size() - 2);
    else if (host.find_first_of(":[]") != std::string::npos)
        refuse("an address with colons stands in brackets");
    if (host.empty()) refuse("names no host");
    if (host.find_first_of(" \t\n/") != std::string::npos) refuse("that is no host");
}

// Ports by the name of a job: eight, since others may hold some, below those that the kernel gives
// to connections of its own choice.
inline std::vector<int> derived_ports(uint64_t token) {
    std::vector<int> ports;
    for (uint64_t k = 0; k < 8; k++)
        ports.push_back(20000 + int(hash_bytes(&k, sizeof k, token) % 12000));
    return ports;
}

inline Meeting choose_default_meeting(const Ranks& r, const Environment& environment,
                                      Meeting meeting) {
    std::string address = variable(environment, "MASTER_ADDR"),
                port = variable(environment, "MASTER_PORT");
    if (r.source == "torchrun" && address.empty() != port.empty())
        fail_input("MASTER_%s is not set, though MASTER_%s is", port.empty() ? "PORT" : "ADDR",
                   port.empty() ? "ADDR" : "PORT");
    meeting.ports = derived_ports(meeting.token);
    if (r.source != "--gpus" && !address.empty() && !port.empty()) {
        meeting.host = address;
        meeting.said = format("MASTER_ADDR=%.200s MASTER_PORT=%.20s", one_line(address).c_str(),
                              one_line(port).c_str());
        if (parse_port(port) == 0)
            fail_input("MASTER_PORT=%.40s: must be a whole number from 1 to 65535",
                       one_line(port).c_str());
        // torchrun itself listens at that port, unless it says that it does not.
        if (variable(environment, "TORCHELASTIC_USE_AGENT_STORE") != "True")
            meeting.ports = {parse_port(port)};
    } else if (meeting.one_node) {
        meeting.host = "127.0.0.1";
        meeting.said = "one node, a port by the job's name; --rendezvous host:port says another";
    } else if (r.source == "Slurm") {
        std::string list = variable(environment, "SLURM_STEP_NODELIST");
        if (list.empty()) list = variable(environment, "SLURM_JOB_NODELIST");
        meeting.host = first_slurm_host(list);
        meeting.said =
            format("the first host of SLURM_STEP_NODELIST=%.200s", one_line(list).c_str());
        if (meeting.host.empty())
            fail_input("SLURM_STEP_NODELIST=%.200s: names no host: give --rendezvous host:port",
                       one_line(list).c_str());
        std::string own = variable(environment, "SLURMD_NODENAME");
        if (r.rank == 0 && !own.empty() && own != meeting.host)
            fail_input(
                "SLURM_STEP_NODELIST=%.200s: begins with %s, but rank 0 is on %s: give "
                "--rendezvous host:port",
                one_line(list).c_str(), meeting.host.c_str(), own.c_str());
    } else {
        fail_input(
            "%s started %d processes on several nodes and does not say where they can meet: "
            "give --rendezvous host:port, a free port on the node of rank 0, or "
            "--rendezvous file:FOLDER, on a file system that all share",
            r.source.c_str(), r.world);
    }
    return meeting;
}

// Where the ranks of a job meet: as --rendezvous says, or, where `option` is empty, at MASTER_ADDR
// and MASTER_PORT, on this node, or on Slurm's first one. fail_input where that is malformed or
// nothing says it.
inline Meeting choose_meeting(const Ranks& r, const std::string& option,
                              const Environment& environment = own_environment) {
    Meeting meeting;
    meeting.one_node = r.local_world == r.world;
    // A port that was named is of one job; a folder, and a port by the job's name, may be of many.
    bool own_place = !option.empty() && option.rfind("file:", 0) != 0;
    std::string job = own_place ? r.job : r.job + r.parent;
    std::string name =
        format("%s\n%d\n%s", job.empty() ? option.c_str() : job.c_str(), r.world, r.source.c_str());
    meeting.token = hash_bytes(name.data(), name.size());
    if (r.world == 1) return meeting;
    if (option.empty()) return choose_default_meeting(r, environment, meeting);
    parse_rendezvous(option, &meeting);
    meeting.said = "--rendezvous " + one_line(option);
    std::error_code ignored;
    bool folder = !meeting.file.empty() &&
                  (meeting.file.back() == '/' || fs::is_directory(meeting.file, ignored));
    if (folder)  // which many jobs may share
        meeting.file = (fs::path(meeting.file) /
                        format("rendezvous-%016llx.json", (unsigned long long)meeting.token))
                           .string();
    return meeting;
}

// ==== --gpus N ===================================================================================

// Those that ask a run to save and end.
constexpr int kStopSignals[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU};

// How run_ranks ended: the first process that failed, or 0.
struct RanksEnd {
    int exit_code = 0, rank = -1;
    std::string text;  // what to print, where no process could: it was killed, or did not start
};

struct RunRanksOptions {
    double settle_s = 2;  // from the first failure to SIGTERM: the others are told of it anyway
    double grace_s = 3;   // from then to SIGKILL
};

// Whether this process is to start the ranks of --gpus N itself: also where it is all that a
// launcher started, such as the shell of `srun --pty`. fail_input where one has already started
// several, and another number of them here.
inline bool must_start_ranks(const Ranks& r, int gpus) {
    if (r.source.empty() || r.world == 1) return gpus > 1;
    if (gpus > 0 && r.local_world != gpus)
        fail_input(
            "--gpus %d: %s started %d processes here already: it must start one for each GPU; "
            "leave --gpus out",
            gpus, r.source.c_str(), r.local_world);
    return false;
}

// The file that this process runs.
inline std::string own_program(const char* argv0) {
    std::error_code error;
    fs::path path = fs::read_symlink("/proc/self/exe", error);
    return error ? argv0 : path.string();
}

// The processes of --gpus N, and the one that waits for them.
class RankProcesses {
  public:
    explicit RankProcesses(const RunRanksOptions& options) : options_(options) {
        sigemptyset(&watched_), sigemptyset(&forwarded_);
        for (int signal : {SIGCHLD, SIGALRM}) sigaddset(&watched_, signal);
        for (int signal : kStopSignals) sigaddset(&watched_, signal);
        // A signal to a blocked mask waits to be fetched: no handler, and none is lost.
        pthread_sigmask(SIG_BLOCK, &watched_, &mask_before_);
        struct sigaction action = {};
        action.sa_handler = SIG_DFL;  // where children are not waited for, their codes are lost
        sigaction(SIGCHLD, &action, &child_before_);
    }
    RankProcesses(const RankProcesses&) = delete;
    RankProcesses& operator=(const RankProcesses&) = delete;
    ~RankProcesses() {
        alarm_after(0);
        for (pid_t pid : pids_)
            if (pid > 0) kill(pid, SIGKILL), waitpid(pid, nullptr, 0);
        sigaction(SIGCHLD, &child_before_, nullptr);
        pthread_sigmask(SIG_SETMASK, &mask_before_, nullptr);
    }

    void start(int count, const std::string& program, char* const* argv) {
        std::random_device random;
        std::string job = format("%08x%08x%08x", random(), random(), unsigned(getpid()));
        pid_t parent = getpid();
        for (int rank = 0; rank < count; rank++) {
            pid_t pid = fork();
            if (pid < 0)
                fail_machine("--gpus %d: cannot start rank %d: %s", count, rank, strerror(errno));
            if (pid == 0) run(rank, count, program, argv, job, parent);
            pids_.push_back(pid);
        }
    }

    RanksEnd wait() {
        while (alive() > 0) {
            int signal = 0;
            if (sigwait(&watched_, &signal) != 0) continue;
            if (signal == SIGCHLD) reap();
            else if (signal == SIGALRM) press_on();
            else forward(signal);
        }
        return end_;
    }

  private:
    [[noreturn]] void run(int rank, int count, const std::string& program, char* const* argv,
                          const std::string& job, pid_t parent) {
        // A group of its own: Ctrl-C reaches the parent alone, which passes it on once.
        setpgid(0, 0);
#ifdef __linux__
        prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
        if (getppid() != parent) _exit(kExitMachine);  // it died in between
        const std::pair<const char*, int> kNumbers[] = {{kOwnVariables.rank, rank},
                                                        {kOwnVariables.world, count},
                                                        {kOwnVariables.local_rank, rank},
                                                        {kOwnVariables.local_world, count}};
        for (auto [name, value] : kNumbers) setenv(name, std::to_string(value).c_str(), 1);
        setenv("GPT2_JOB", job.c_str(), 1);
        int threads = std::max(int(std::thread::hardware_concurrency()) / count, 1);
        setenv("OMP_NUM_THREADS", std::to_string(threads).c_str(), 0);
        sigaction(SIGCHLD, &child_before_, nullptr);
        pthread_sigmask(SIG_SETMASK, &mask_before_, nullptr);
        execv(program.c_str(), argv);
        fprintf(stderr, "%s: cannot be started: %s\n", program.c_str(), strerror(errno));
        _exit(kExitMachine);
    }

    size_t alive() const {
        return size_t(std::count_if(pids_.begin(), pids_.end(), [](pid_t pid) { return pid > 0; }));
    }

    void forward(int signal) {
        sigaddset(&forwarded_, signal);
        for (pid_t pid : pids_)
            if (pid > 0) kill(pid, signal);
    }

    void reap() {
        for (size_t rank = 0; rank < pids_.size(); rank++) {
            int status = 0;
            if (pids_[rank] <= 0 || waitpid(pids_[rank], &status, WNOHANG) != pids_[rank]) continue;
            pids_[rank] = 0;
            int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            if (code == 0 || failed_) continue;
            // Asked to end, and saved: the others are still at it, and are left alone.
            bool orderly = code > 128 && sigismember(&forwarded_, code - 128) == 1;
            end_.exit_code = code, end_.rank = int(rank), end_.text.clear();
            if (orderly) continue;
            failed_ = true;
            if (WIFSIGNALED(status))
                end_.text = format("rank %zu of %zu was killed by signal %d (%s)%s", rank,
                                   pids_.size(), WTERMSIG(status), strsignal(WTERMSIG(status)),
                                   WTERMSIG(status) == SIGKILL ? ": out of memory?" : "");
            alarm_after(options_.settle_s);
        }
    }

    // Some are there still, after the time that they had.
    void press_on() {
        int signal = pressed_ ? SIGKILL : SIGTERM;
        for (pid_t pid : pids_)
            if (pid > 0) kill(pid, signal);
        if (!pressed_) alarm_after(options_.grace_s);
        pressed_ = true;
    }

    static void alarm_after(double seconds) {
        struct itimerval timer = {};
        if (seconds > 0) {
            timer.it_value.tv_sec = time_t(seconds);
            timer.it_value.tv_usec = suseconds_t((seconds - double(time_t(seconds))) * 1e6) + 1;
            if (timer.it_value.tv_usec >= 1000000) timer.it_value.tv_usec = 999999;
        }
        setitimer(ITIMER_REAL, &timer, nullptr);
    }

    RunRanksOptions options_;
    sigset_t watched_, mask_before_;
    struct sigaction child_before_;
    std::vector<pid_t> pids_;  // by rank; 0: has ended
    sigset_t forwarded_;
    bool failed_ = false, pressed_ = false;
    RanksEnd end_;
};

// Runs `count` copies of `program` with `argv`, each with its rank in GPT2_RANK and so on and its
// share of the processor's threads, unless OMP_NUM_THREADS is set, and waits for them. To be called
// before there is a thread or a GPU is touched. The signals that ask a run to stop go to all; when
// one fails, the others get SIGTERM and then SIGKILL; when this process dies, so do they (on
// Linux). Returns the exit code of the first that failed, 128 + the signal where that killed it.
// fail_machine where one cannot be started.
inline RanksEnd run_ranks(int count, const std::string& program, char* const* argv,
                          const RunRanksOptions& options = {}) {
    if (count < 1 || count > 1024) fail_input("--gpus %d: must be from 1 to 1024", count);
    RankProcesses processes(options);
    processes.start(count, program, argv);
    return processes.wait();
}

// ==== messages ===================================================================================
//
// A message is its length (4 bytes, of what follows the kind), its kind (1 byte) and its fields:
// numbers of 8 bytes, lowest first, and texts with their length before them. What comes from the
// other end is not believed: no length beyond what is allowed there and then, and nothing is
// allocated for bytes that have not come.

constexpr uint64_t kRankMagic = 0x4b4e415232545047;  // "GPT2RANK"
constexpr uint64_t kRankProtocol = 1;
constexpr size_t kLongestPayload = size_t(1) << 20;
constexpr size_t kLongestGreeting = 1024;  // before it is known who speaks
constexpr size_t kLongestName = 255, kLongestText = 2000;
constexpr size_t kLongestMessage =
    kLongestPayload + 4096 + size_t(kMostRanks) * (24 + kLongestName);

enum class RankMessage : uint8_t {
    hello = 1,
    welcome,
    refuse,
    confirm,
    roster,
    part,
    whole,
    pulse,
    fail
};
enum class LinkOperation : uint8_t { barrier, broadcast, gather, all_equal, finish };
constexpr const char* kOperationNames[] = {"barrier", "broadcast", "gather", "check of", "end"};

class BodyWriter {
  public:
    void number(uint64_t value) {
        for (int shift = 0; shift < 64; shift += 8) out_ += char(value >> shift & 255);
    }
    void field(uint64_t& value, uint64_t) { number(value); }
    void field(std::string& text, size_t) { number(text.size()), out_ += text; }
    template <typename T>
    void list(std::vector<T>& items, size_t) {
        number(items.size());
        for (T& item : items) item.fields(*this);
    }
    std::string take() { return std::move(out_); }

  private:
    std::string out_;
};

// Fails with fail_input at the first field that is not as it must be.
class BodyReader {
  public:
    explicit BodyReader(std::string_view bytes) : bytes_(bytes) {}
    void field(uint64_t& value, uint64_t most) {
        value = number();
        if (value > most) fail_input("a number in a message is too large");
    }
    void field(std::string& text, size_t longest) {
        uint64_t size = number();
        if (size > bytes_.size() || size > longest) fail_input("a text in a message is too long");
        text = bytes_.substr(0, size);
        bytes_.remove_prefix(size);
    }
    template <typename T>
    void list(std::vector<T>& items, size_t most) {
        uint64_t count = number();
        if (count > most || count > bytes_.size() / T::kLeastBytes)
            fail_input("a list in a message is too long");
        for (uint64_t i = 0; i < count; i++) items.emplace_back().fields(*this);
    }
    void end() const {
        if (!bytes_.empty()) fail_input("a message is longer than its fields");
    }

  private:
    uint64_t number() {
        if (bytes_.size() < 8) fail_input("a message is shorter than its fields");
        uint64_t value = 0;
        for (int k = 7; k >= 0; k--) value = value << 8 | uint8_t(bytes_[size_t(k)]);
        bytes_.remove_prefix(8);
        return value;
    }
    std::string_view bytes_;
};

// Each message lists its fields once, for writing and for reading.
struct RankHello {  // the first two fields stay as they are in every version
    uint64_t magic = kRankMagic, protocol = kRankProtocol, token = 0;
    uint64_t rank = 0, world = 1, local_rank = 0, pid = 0;
    std::string host;
    template <typename Io>
    void fields(Io& io) {
        io.field(magic, UINT64_MAX), io.field(protocol, UINT64_MAX), io.field(token, UINT64_MAX);
        io.field(rank, kMostRanks), io.field(world, kMostRanks), io.field(local_rank, kMostRanks);
        io.field(pid, UINT64_MAX), io.field(host, kLongestName);
    }
};
struct RankWelcome {  // from rank 0, and the answer to it
    uint64_t proof = 0;
    template <typename Io>
    void fields(Io& io) {
        io.field(proof, UINT64_MAX);
    }
};
struct RankRefusal {
    uint64_t final = 0;  // whether it is of no use to come again
    std::string text;
    template <typename Io>
    void fields(Io& io) {
        io.field(final, 1), io.field(text, kLongestText);
    }
};
struct RankMember {
    uint64_t local_rank = 0, pid = 0;
    std::string host;
    static constexpr size_t kLeastBytes = 24;
    template <typename Io>
    void fields(Io& io) {
        io.field(local_rank, kMostRanks), io.field(pid, UINT64_MAX), io.field(host, kLongestName);
    }
};
struct RankRoster {  // who is there, by rank
    std::vector<RankMember> members;
    template <typename Io>
    void fields(Io& io) {
        io.list(members, kMostRanks);
    }
};
struct RankPart {  // what one rank brings to an operation of all
    uint64_t sequence = 0, operation = 0, limit_ms = 0;
    std::string name, payload;
    template <typename Io>
    void fields(Io& io) {
        io.field(sequence, UINT64_MAX), io.field(operation, uint64_t(LinkOperation::finish));
        io.field(limit_ms, UINT64_MAX), io.field(name, kLongestName);
        io.field(payload, kLongestPayload);
    }
};
struct RankWhole {  // what rank 0 made of them
    uint64_t sequence = 0;
    std::string payload;
    template <typename Io>
    void fields(Io& io) {
        io.field(sequence, UINT64_MAX), io.field(payload, kLongestPayload);
    }
};
struct RankPulse {  // the process lives; how long its work has not gone on
    uint64_t idle_ms = 0, progress = 0;
    template <typename Io>
    void fields(Io& io) {
        io.field(idle_ms, UINT64_MAX), io.field(progress, UINT64_MAX);
    }
};
struct RankFailure {  // what ends the job
    uint64_t exit_code = kExitMachine;
    std::string text;
    bool told = false;  // by rank 0, which also says it to people; not a field
    template <typename Io>
    void fields(Io& io) {
        io.field(exit_code, 255), io.field(text, kLongestText);
    }
};
struct NamedText {
    std::string name, text;
    static constexpr size_t kLeastBytes = 16;
    template <typename Io>
    void fields(Io& io) {
        io.field(name, kLongestName), io.field(text, kLongestPayload);
    }
};
struct NamedTexts {
    std::vector<NamedText> list;
    template <typename Io>
    void fields(Io& io) {
        io.list(list, kLongestPayload / NamedText::kLeastBytes);
    }
};

template <typename T>
std::string body_of(T message) {
    BodyWriter writer;
    message.fields(writer);
    return writer.take();
}

// fail_input where the bytes are no such message.
template <typename T>
T read_body(std::string_view body) {
    BodyReader reader(body);
    T message;
    message.fields(reader);
    reader.end();
    return message;
}

inline std::string frame_of(RankMessage kind, const std::string& body) {
    std::string frame;
    for (int shift = 0; shift < 32; shift += 8) frame += char(body.size() >> shift & 255);
    return frame + char(kind) + body;
}

struct ReceivedMessage {
    RankMessage kind;
    std::string body;
};

// Messages out of bytes that come in parts. It holds no more than what has come.
class MessageReader {
  public:
    void allow(size_t longest) { longest_ = longest; }
    void add(std::string_view bytes) { bytes_ += bytes; }
    bool empty() const { return bytes_.empty(); }

    // The next message, once it is whole; fail_input where the bytes are none.
    std::optional<ReceivedMessage> next() {
        constexpr size_t kHead = 5;
        size_t size = 0;
        for (size_t k = 0; k < std::min<size_t>(4, bytes_.size()); k++)
            size |= size_t(uint8_t(bytes_[k])) << 8 * k;
        if (bytes_.size() >= 4 && size > longest_) fail_input("a message is too long");
        if (bytes_.size() < kHead) return {};
        auto kind = uint8_t(bytes_[4]);
        if (kind < uint8_t(RankMessage::hello) || kind > uint8_t(RankMessage::fail))
            fail_input("a message is of no known kind");
        if (bytes_.size() < kHead + size) return {};
        ReceivedMessage message = {RankMessage(kind), bytes_.substr(kHead, size)};
        bytes_.erase(0, kHead + size);
        return message;
    }

  private:
    std::string bytes_;
    size_t longest_ = kLongestGreeting;
};

// ==== sockets ====================================================================================

// A file descriptor that is closed with its owner. Move-only.
class Descriptor {
  public:
    Descriptor() = default;
    explicit Descriptor(int fd) : fd_(fd) {}
    Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Descriptor& operator=(Descriptor&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Descriptor() { reset(); }
    void reset() {
        if (fd_ >= 0) close(fd_);
        fd_ = -1;
    }
    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }

  private:
    int fd_ = -1;
};

// Not inherited by what this program starts, and never waited in.
inline void prepare_descriptor(int fd) {
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, O_NONBLOCK);
}

inline Descriptor make_socket(int family) {
#ifdef SOCK_CLOEXEC
    Descriptor made(socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
#else
    Descriptor made(socket(family, SOCK_STREAM, 0));
#endif
    if (!made) return made;
    prepare_descriptor(made.get());
    int on = 1;
    setsockopt(made.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
#ifdef SO_NOSIGPIPE
    setsockopt(made.get(), SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
    return made;
}

// poll for one descriptor; false when `seconds` pass first.
inline bool wait_for(int fd, short events, double seconds) {
    double until = steady_s() + seconds;
    for (;;) {
        struct pollfd one = {fd, events, 0};
        double left = std::max(0.0, until - steady_s());
        int ready = poll(&one, 1, int(std::min(left, 1000.0) * 1000) + (left > 0));
        if (ready > 0) return true;
        if (ready == 0 && steady_s() >= until) return false;
        if (ready < 0 && errno != EINTR) return false;
    }
}

inline std::string host_name() {
    char name[256] = "";
    if (gethostname(name, sizeof name - 1) != 0 || name[0] == '\0') return "unknown";
    return one_line(name);
}

struct SocketAddress {
    sockaddr_storage storage = {};
    socklen_t size = 0;
    const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
    int family() const { return storage.ss_family; }
};

// 10.0.0.3 or ::1
inline std::string address_text(const SocketAddress& address) {
    char text[NI_MAXHOST] = "";
    if (getnameinfo(address.get(), address.size, text, sizeof text, nullptr, 0, NI_NUMERICHOST) !=
        0)
        return "an unknown address";
    return text;
}

// All addresses of a host; none, and why, where it has none.
inline std::vector<SocketAddress> resolve(const std::string& host, int port, std::string* why) {
    addrinfo hints = {}, *found = nullptr;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV;
    int status = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
    std::vector<SocketAddress> addresses;
    if (status != 0) {
        *why = format("%s: %s", one_line(host).c_str(),
                      status == EAI_SYSTEM ? strerror(errno) : gai_strerror(status));
        return addresses;
    }
    for (addrinfo* at = found; at != nullptr; at = at->ai_next) {
        SocketAddress address;
        memcpy(&address.storage, at->ai_addr, at->ai_addrlen);
        address.size = at->ai_addrlen;
        addresses.push_back(address);
    }
    freeaddrinfo(found);
    return addresses;
}

// A connected socket, or none, and why.
inline Descriptor connect_to(const SocketAddress& address, double limit_s, std::string* why) {
    Descriptor made = make_socket(address.family());
    int status = made ? connect(made.get(), address.get(), address.size) : -1;
    if (status != 0 && made && (errno == EINPROGRESS || errno == EINTR)) {
        if (!wait_for(made.get(), POLLOUT, limit_s)) {
            *why = address_text(address) + ": no answer";
            return Descriptor();
        }
        socklen_t size = sizeof errno;
        int code = 0;
        getsockopt(made.get(), SOL_SOCKET, SO_ERROR, &code, &size);
        errno = code, status = code == 0 ? 0 : -1;
    }
    if (status == 0) return made;
    *why = address_text(address) + ": " + strerror(errno);
    return Descriptor();
}

// Listens at every address of this host, or at its loopback one alone; port 0: any that is free.
// Returns none, with errno, where that cannot be.
inline Descriptor listen_at(int family, bool loopback, int port) {
    Descriptor made = make_socket(family);
    if (!made) return made;
    int on = 1, off = 0;
    setsockopt(made.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    SocketAddress address;
    if (family == AF_INET6) {
        setsockopt(made.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);  // IPv4 as well
        auto* v6 = reinterpret_cast<sockaddr_in6*>(&address.storage);
        v6->sin6_family = AF_INET6, v6->sin6_port = htons(uint16_t(port));
        v6->sin6_addr = loopback ? in6addr_loopback : in6addr_any;
        address.size = sizeof *v6;
    } else {
        auto* v4 = reinterpret_cast<sockaddr_in*>(&address.storage);
        v4->sin_family = AF_INET, v4->sin_port = htons(uint16_t(port));
        v4->sin_addr.s_addr = htonl(loopback ? INADDR_LOOPBACK : INADDR_ANY);
        address.size = sizeof *v4;
    }
    if (bind(made.get(), address.get(), address.size) == 0 && listen(made.get(), SOMAXCONN) == 0)
        return made;
    int code = errno;
    made.reset();
    errno = code;
    return made;
}

inline int port_of(int fd) {
    SocketAddress address;
    address.size = sizeof address.storage;
    getsockname(fd, reinterpret_cast<sockaddr*>(&address.storage), &address.size);
    return ntohs(address.family() == AF_INET6
                     ? reinterpret_cast<sockaddr_in6*>(&address.storage)->sin6_port
                     : reinterpret_cast<sockaddr_in*>(&address.storage)->sin_port);
}

// The addresses by which others can reach this host.
inline std::vector<std::string> own_addresses(bool loopback) {
    std::vector<std::string> addresses;
    ifaddrs* list = nullptr;
    if (getifaddrs(&list) != 0) return addresses;
    for (ifaddrs* at = list; at != nullptr; at = at->ifa_next) {
        if (at->ifa_addr == nullptr || (at->ifa_flags & IFF_UP) == 0) continue;
        if (((at->ifa_flags & IFF_LOOPBACK) != 0) != loopback) continue;
        SocketAddress address;
        if (at->ifa_addr->sa_family == AF_INET) address.size = sizeof(sockaddr_in);
        else if (at->ifa_addr->sa_family == AF_INET6) address.size = sizeof(sockaddr_in6);
        else continue;
        memcpy(&address.storage, at->ifa_addr, address.size);
        std::string text = address_text(address);
        if (text.find('%') == std::string::npos) addresses.push_back(text);  // of a link alone
    }
    freeifaddrs(list);
    return addresses;
}

// A socket, with what came that is no whole message yet and what is still to be sent. Nothing of it
// waits.
class Connection {
  public:
    Connection() = default;
    Connection(Descriptor fd, std::string address)
        : fd_(std::move(fd)), address_(std::move(address)), since_s_(steady_s()) {}

    int fd() const { return fd_.get(); }
    bool open() const { return bool(fd_); }
    void close() { fd_.reset(); }
    const std::string& address() const { return address_; }
    double since_s() const { return since_s_; }
    MessageReader& reader() { return reader_; }
    bool sending() const { return open() && sent_ < out_.size(); }
    void stop_sending() {
        if (open()) shutdown(fd_.get(), SHUT_WR);
    }

    template <typename T>
    void send(RankMessage kind, const T& message) {
        out_ += frame_of(kind, body_of(message));
        flush();
    }

    // Sends what the system takes. A connection that broke is seen by receive().
    void flush() {
        while (sending()) {
#ifdef MSG_NOSIGNAL
            ssize_t count = ::send(fd(), out_.data() + sent_, out_.size() - sent_, MSG_NOSIGNAL);
#else
            ssize_t count = ::send(fd(), out_.data() + sent_, out_.size() - sent_, 0);
#endif
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) return;
            sent_ += size_t(count);
        }
        out_.clear(), sent_ = 0;
    }

    // Takes what has come, into reader(); false when the other end is closed.
    bool receive() {
        char bytes[65536];
        for (;;) {
            ssize_t count = recv(fd(), bytes, sizeof bytes, 0);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) return errno == EAGAIN || errno == EWOULDBLOCK;
            if (count == 0) return false;
            reader_.add({bytes, size_t(count)});
            return true;
        }
    }

  private:
    Descriptor fd_;
    std::string address_;
    double since_s_ = 0;
    MessageReader reader_;
    std::string out_;
    size_t sent_ = 0;
};

// ==== meeting ====================================================================================

// "rank 3 of 4, local 1, host b"
inline std::string describe_rank(size_t rank, size_t world, const RankMember& member) {
    return format("rank %zu of %zu, local %d, host %s", rank, world, int(member.local_rank),
                  one_line(member.host).c_str());
}

// Short enough for a message, and one line.
inline std::string failure_text(const std::string& text) {
    std::string line = text.substr(0, kLongestText);
    for (char& c : line)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
    return line;
}

// An error that rank 0 has told this rank, and says to people itself.
struct ToldError : Error {
    using Error::Error;
};

// What rank 0 answers to a greeting, which shows that it has the token as well.
inline uint64_t proof_of(uint64_t token) { return hash_bytes(&token, sizeof token, kRankMagic); }

// Everybody's connections: rank 0's by rank, those of others to rank 0 alone.
struct Met {
    std::vector<Connection> connections;
    std::vector<RankMember> members;
};

// "rank 2, rank 5 to rank 7"
inline std::string rank_list(const std::vector<size_t>& ranks) {
    std::string text;
    for (size_t i = 0; i < ranks.size(); i++) {
        size_t last = i;
        while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) last++;
        if (text.size() > 200) return text + ", ...";
        text += format("%srank %zu", text.empty() ? "" : ", ", ranks[i]);
        if (last > i + 1) text += format(" to rank %zu", ranks[i = last]);
    }
    return text;
}

// Rank 0's side: takes every connection, keeps those of its own job, and turns others away. A
// stranger costs a place among the waiting for a few seconds, and no more.
class Gathering {
  public:
    Gathering(const Ranks& r, const Meeting& meeting, const RankMember& own)
        : r_(r), meeting_(meeting), token_(meeting.token), peers_(size_t(r.world)) {
        met_.connections.resize(size_t(r.world));
        met_.members.resize(size_t(r.world));
        met_.members[0] = own;
        start_listening();
        if (!meeting_.file.empty()) write_meeting_file();
    }
    ~Gathering() {
        if (content_.empty()) return;
        std::error_code ignored;
        if (read_meeting_file(meeting_.file) == content_) fs::remove(meeting_.file, ignored);
    }

    // fail_machine when some are not there after `limit_s`, and names them; fail_input where a rank
    // is of another job after all. Those that came are told.
    Met run(double limit_s) {
        double until = steady_s() + limit_s;
        try {
            while (!missing().empty()) {
                double left = until - steady_s();
                if (left <= 0) fail_missing(limit_s);
                poll_all(std::min(left, 0.25));
                drop_slow();
            }
        } catch (const Error& error) {
            tell_all(error);
            throw;
        }
        RankRoster roster = {met_.members};
        for (size_t rank = 1; rank < peers_.size(); rank++) {
            met_.connections[rank].reader().allow(kLongestMessage);
            met_.connections[rank].send(RankMessage::roster, roster);
        }
        return std::move(met_);
    }

    // "" where there is none that can be read.
    static std::string read_meeting_file(const std::string& path) {
        Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
        char bytes[16384];
        ssize_t count = file ? read(file.get(), bytes, sizeof bytes) : -1;
        return count > 0 ? std::string(bytes, size_t(count)) : "";
    }

  private:
    static constexpr double kGreetingLimit_s = 3;
    static constexpr size_t kMostStrangers = 256;
    struct RankPeer {
        bool confirmed = false;  // it knows that it was let in
    };

    void start_listening() {
        bool loopback = meeting_.one_node, v6 = false;
        if (!meeting_.host.empty()) {
            std::string why;
            std::vector<SocketAddress> addresses = resolve(meeting_.host, 1, &why);
            if (loopback && !addresses.empty()) {
                // Names such as localhost stay inside this host; any other may be reached.
                std::string first = address_text(addresses[0]);
                loopback = first == "::1" || first.rfind("127.", 0) == 0;
                v6 = first == "::1";
            }
        }
        std::vector<int> ports = meeting_.ports.empty() ? std::vector<int>{0} : meeting_.ports;
        for (int port : ports) {
            listener_ = listen_at(loopback && !v6 ? AF_INET : AF_INET6, loopback, port);
            if (!listener_ && !loopback && errno != EADDRINUSE)
                listener_ = listen_at(AF_INET, loopback, port);  // a machine without IPv6
            if (listener_) return;
        }
        if (errno == EADDRINUSE)
            fail_machine("%s: port %d of %s is in use by another program: give another port",
                         meeting_.said.c_str(), ports.back(), host_name().c_str());
        fail_machine("%s: cannot listen at port %d: %s", meeting_.said.c_str(), ports.back(),
                     strerror(errno));
    }

    void write_meeting_file() {
        ordered_json root;
        root["token"] = format("%016llx", (unsigned long long)token_);
        root["host"] = met_.members[0].host;
        root["port"] = port_of(listener_.get());
        root["addresses"] = own_addresses(meeting_.one_node);
        std::string folder = fs::path(meeting_.file).parent_path().string();
        if (!folder.empty()) make_folder(folder);
        content_ = root.dump(-1, ' ', true, ordered_json::error_handler_t::replace) + "\n";
        write_file_atomic(meeting_.file, content_);
    }

    std::vector<size_t> missing() const {
        std::vector<size_t> ranks;
        for (size_t rank = 1; rank < peers_.size(); rank++)
            if (!peers_[rank].confirmed) ranks.push_back(rank);
        return ranks;
    }

    [[noreturn]] void fail_missing(double limit_s) {
        std::string hosts;
        for (size_t rank = 0; rank < peers_.size() && hosts.size() < 400; rank++)
            if (rank == 0 || peers_[rank].confirmed)
                hosts += format("%srank %zu on %s", hosts.empty() ? "" : ", ", rank,
                                one_line(met_.members[rank].host).c_str());
        fail_machine("%s of %d did not come within %.4g s to rank 0 on %s (%s); there are %s%s",
                     rank_list(missing()).c_str(), r_.world, limit_s, met_.members[0].host.c_str(),
                     meeting_.said.c_str(), hosts.c_str(),
                     turned_away_.empty() ? "" : ("; turned away: " + turned_away_).c_str());
    }

    void poll_all(double seconds) {
        std::vector<struct pollfd> list = {{listener_.get(), POLLIN, 0}};
        for (Connection& stranger : strangers_) list.push_back({stranger.fd(), POLLIN, 0});
        for (Connection& peer : met_.connections)
            list.push_back({peer.fd(), short(POLLIN | (peer.sending() ? POLLOUT : 0)), 0});
        if (poll(list.data(), nfds_t(list.size()), int(seconds * 1000) + 1) <= 0) return;
        size_t at = 1;
        std::vector<Connection> strangers = std::move(strangers_);
        strangers_.clear();
        for (Connection& stranger : strangers)
            if (list[at++].revents == 0 || hear_stranger(stranger))
                if (stranger.open()) strangers_.push_back(std::move(stranger));
        for (size_t rank = 0; rank < peers_.size(); rank++)
            if (list[at++].revents != 0 && met_.connections[rank].open()) hear_peer(rank);
        if (list[0].revents != 0) accept_one();
    }

    void accept_one() {
        SocketAddress from;
        from.size = sizeof from.storage;
        Descriptor fd(
            accept(listener_.get(), reinterpret_cast<sockaddr*>(&from.storage), &from.size));
        if (!fd && (errno == EMFILE || errno == ENFILE))
            fail_machine("cannot hold the connections of %d ranks: %s: raise `ulimit -n`", r_.world,
                         strerror(errno));
        if (!fd) return;  // it went away again
        prepare_descriptor(fd.get());
        int on = 1;
        setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
#ifdef SO_NOSIGPIPE
        setsockopt(fd.get(), SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
        if (strangers_.size() >= kMostStrangers) strangers_.erase(strangers_.begin());
        strangers_.emplace_back(std::move(fd), address_text(from));
    }

    void drop_slow() {
        std::erase_if(strangers_, [](const Connection& stranger) {
            return steady_s() > stranger.since_s() + kGreetingLimit_s;
        });
    }

    // False when the connection is to be closed.
    bool hear_stranger(Connection& stranger) {
        bool more = stranger.receive();
        try {
            std::optional<ReceivedMessage> message = stranger.reader().next();
            if (!message) return more;
            if (message->kind != RankMessage::hello) return false;
            // Later versions may say more, but begin with the same two numbers.
            BodyReader start(message->body);
            uint64_t magic = 0, protocol = 0;
            start.field(magic, UINT64_MAX), start.field(protocol, UINT64_MAX);
            if (magic != kRankMagic) return false;
            if (protocol != kRankProtocol) {
                turn_away(stranger, 1,
                          format("it speaks protocol %llu, rank 0 %llu: the same "
                                 "program must run on every rank",
                                 (unsigned long long)protocol, (unsigned long long)kRankProtocol));
                return false;
            }
            return greet(stranger, read_body<RankHello>(message->body));
        } catch (const Error& error) {
            if (refused_) throw;
            return false;  // rubbish
        }
    }

    void turn_away(Connection& stranger, uint64_t final, const std::string& why) {
        turned_away_ = stranger.address() + ": " + why;
        stranger.send(RankMessage::refuse, RankRefusal{final, failure_text(why)});
    }

    // Whether this rank is there already, and not as the same process, which gave up waiting and
    // came again.
    bool is_another(size_t rank, uint64_t pid, const std::string& host) const {
        const RankMember& there = met_.members[rank];
        bool same = there.pid == pid && there.host == host;
        return peers_[rank].confirmed || (met_.connections[rank].open() && !same);
    }

    // Someone who speaks as we do. True where the connection stays among the strangers.
    bool greet(Connection& stranger, const RankHello& hello) {
        if (hello.token != token_) {
            turn_away(stranger, 0, "it is of another job");
            return false;
        }
        std::string host = one_line(hello.host);
        std::string wrong;
        size_t rank = hello.rank;
        if (hello.world != uint64_t(r_.world))
            wrong = format("rank %zu on %s is of %d ranks, and rank 0 on %s of %d", rank,
                           host.c_str(), int(hello.world), met_.members[0].host.c_str(), r_.world);
        else if (rank >= peers_.size())
            wrong = format("rank %zu on %s, of %d", rank, host.c_str(), r_.world);
        else if (rank == 0 || is_another(rank, hello.pid, host))
            wrong = format(
                "two processes are rank %zu: one on %s (process %llu), one on %s "
                "(process %llu)",
                rank, one_line(met_.members[rank].host).c_str(),
                (unsigned long long)met_.members[rank].pid, host.c_str(),
                (unsigned long long)hello.pid);
        if (!wrong.empty()) {
            turn_away(stranger, 1, wrong);
            refused_ = true;
            fail_input("%s", wrong.c_str());
        }
        stranger.send(RankMessage::welcome, RankWelcome{proof_of(token_)});
        met_.members[rank] = {hello.local_rank, hello.pid, host};
        met_.connections[rank] = std::move(stranger);
        return true;
    }

    void hear_peer(size_t rank) {
        Connection& peer = met_.connections[rank];
        peer.flush();
        bool more = peer.receive();
        std::optional<ReceivedMessage> message;
        try {
            message = peer.reader().next();
            if (message && message->kind == RankMessage::confirm) peers_[rank].confirmed = true;
        } catch (const Error&) { more = false; }
        std::string where = format("rank %zu of %d on %s", rank, r_.world,
                                   one_line(met_.members[rank].host).c_str());
        if (message && message->kind == RankMessage::fail) {
            auto failure = read_body<RankFailure>(message->body);
            throw Error(int(failure.exit_code), failure_text(failure.text));
        }
        if (more) return;
        if (peers_[rank].confirmed)
            fail_machine("%s ended while others had yet to come", where.c_str());
        peer.close();
    }

    void tell_all(const Error& error) {
        for (size_t rank = 1; rank < peers_.size(); rank++) {
            Connection& peer = met_.connections[rank];
            if (!peer.open()) continue;
            peer.send(RankMessage::fail,
                      RankFailure{uint64_t(error.exit_code), failure_text(error.what())});
            peer.stop_sending();
        }
        double until =
            steady_s() + 0.3;  // what is closed with unread bytes may take the line along
        for (size_t rank = 1; rank < peers_.size(); rank++)
            while (met_.connections[rank].open() && steady_s() < until &&
                   wait_for(met_.connections[rank].fd(), POLLIN, until - steady_s()))
                if (!met_.connections[rank].receive()) met_.connections[rank].close();
    }

    Ranks r_;
    Meeting meeting_;
    uint64_t token_;
    std::vector<RankPeer> peers_;
    Met met_;
    Descriptor listener_;
    std::vector<Connection> strangers_;
    std::string content_;  // of the file
    std::string turned_away_;
    bool refused_ = false;
};

// The other ranks' side: tries every address of rank 0 until one of them answers as it must.
class Joining {
  public:
    Joining(const Ranks& r, const Meeting& meeting, const RankMember& own)
        : r_(r), meeting_(meeting), own_(own) {}

    // fail_machine where rank 0 is not found within `limit_s`, or ends; what rank 0 says is wrong
    // is thrown as it says it.
    Met run(double limit_s) {
        until_ = steady_s() + limit_s;
        double pause = 0.02;
        while (!try_all()) {
            double left = until_ - steady_s();
            if (left <= 0)
                fail_machine("rank %d of %d on %s could not reach rank 0 within %.4g s (%s): %s",
                             r_.rank, r_.world, own_.host.c_str(), limit_s, meeting_.said.c_str(),
                             last_.c_str());
            std::this_thread::sleep_for(std::chrono::duration<double>(std::min(left, pause)));
            pause = std::min(0.3, pause * 1.5);
        }
        return wait_for_roster(limit_s);
    }

  private:
    static constexpr double kTry_s = 3;

    bool try_all() {
        if (meeting_.file.empty()) {
            for (int port : meeting_.ports)
                if (try_host(meeting_.host, port)) return true;
            return false;
        }
        std::string content = Gathering::read_meeting_file(meeting_.file);
        last_ = meeting_.file + (content.empty() ? ": is not there" : ": is of another job");
        try {
            json root = parse_json(content, meeting_.file);
            if (root.value("token", "") != format("%016llx", (unsigned long long)meeting_.token))
                return false;
            int port = root.value("port", 0);
            if (port < 1 || port > 65535) return false;
            for (const json& address : root.at("addresses"))
                if (try_host(address.get<std::string>(), port)) return true;
        } catch (const json::exception&) {
            last_ = meeting_.file + ": is no file of a rendezvous";
        } catch (const Error& error) {
            if (final_) throw;
        }
        return false;
    }

    bool try_host(const std::string& host, int port) {
        for (const SocketAddress& address : resolve(host, port, &last_)) {
            double left = until_ - steady_s();
            if (left <= 0) return false;
            Descriptor fd = connect_to(address, std::min(left, kTry_s), &last_);
            if (!fd) continue;
            Connection connection(std::move(fd), address_text(address));
            if (greet(connection)) {
                rank0_ = std::move(connection);
                return true;
            }
        }
        return false;
    }

    bool greet(Connection& connection) {
        RankHello hello;
        hello.token = meeting_.token;
        hello.rank = uint64_t(r_.rank), hello.world = uint64_t(r_.world);
        hello.local_rank = own_.local_rank, hello.pid = own_.pid, hello.host = own_.host;
        connection.send(RankMessage::hello, hello);
        connection.reader().allow(kLongestText + 64);
        last_ = connection.address() + ": what listens there is not rank 0 of this job";
        double until = std::min(until_, steady_s() + kTry_s);
        try {
            std::optional<ReceivedMessage> message = next_message(connection, until);
            if (!message) return false;
            if (message->kind == RankMessage::refuse) {
                auto refusal = read_body<RankRefusal>(message->body);
                last_ = failure_text(refusal.text);
                final_ = refusal.final != 0;
                if (final_) fail_input("%s", last_.c_str());
                return false;
            }
            if (message->kind != RankMessage::welcome ||
                read_body<RankWelcome>(message->body).proof != proof_of(meeting_.token))
                return false;
        } catch (const Error&) {
            if (final_) throw;
            return false;  // rubbish
        }
        connection.send(RankMessage::confirm, RankWelcome{meeting_.token});
        return true;
    }

    // Nothing when `until` passes or the other end closes first.
    static std::optional<ReceivedMessage> next_message(Connection& connection, double until) {
        for (;;) {
            std::optional<ReceivedMessage> message = connection.reader().next();
            if (message) return message;
            connection.flush();
            short events = connection.sending() ? POLLIN | POLLOUT : POLLIN;
            if (!wait_for(connection.fd(), events, until - steady_s())) return {};
            if (!connection.receive()) return connection.reader().next();
        }
    }

    // Rank 0 knows who is missing, and says so when its own limit has passed.
    Met wait_for_roster(double limit_s) {
        rank0_.reader().allow(kLongestMessage);
        double until = steady_s() + limit_s + 5;
        std::optional<ReceivedMessage> message = next_message(rank0_, until);
        if (!message && steady_s() < until)
            fail_machine("rank 0 of %d ended while the ranks gathered (%s)", r_.world,
                         meeting_.said.c_str());
        if (!message)
            fail_machine("rank 0 of %d has not said for %.4g s that all ranks are there (%s)",
                         r_.world, limit_s + 5, meeting_.said.c_str());
        if (message->kind == RankMessage::fail) {
            auto failure = read_body<RankFailure>(message->body);
            throw ToldError(int(failure.exit_code), failure_text(failure.text));
        }
        Met met;
        if (message->kind == RankMessage::roster)
            met.members = read_body<RankRoster>(message->body).members;
        if (met.members.size() != size_t(r_.world))
            fail_machine("rank 0 of %d does not say who is there", r_.world);
        met.connections.push_back(std::move(rank0_));
        return met;
    }

    Ranks r_;
    Meeting meeting_;
    RankMember own_;
    double until_ = 0;
    Connection rank0_;
    std::string last_ = "nothing was tried";  // why the last try came to nothing
    bool final_ = false;
};

// ==== the link ===================================================================================

struct LinkOptions {
    double limit_s = 60;    // to meet, and for an operation after its first rank has come
    double timeout_s = 60;  // without a sign of life or progress, a rank hangs; 0: never
    double grace_s = 0.5;  // from a failure to `on_failure`: so long may this process end by itself
    std::string host;      // the name of this one; empty: as the system says
    std::string program = "train_gpt2cu";  // begins the line that is printed
    // Called from another thread, when the job has failed and this process has not ended by itself;
    // empty: prints "PROGRAM: error: TEXT" and ends the process with the exit code.
    std::function<void(const RankFailure&)> on_failure;
};

// This process's link to the others. The operations are called by one thread, by every rank and in
// the same order; each returns when all have come. When the job fails anywhere, they throw the
// first failure as an Error, the same on every rank, and so does alive(). A thread of its own
// answers the others and watches them meanwhile. A world of one needs no link and does all alone.
class RankLink {
  public:
    // Meets the others. fail_machine where one does not come within the limit, with its rank;
    // fail_input where one is of another world or of a rank that is there already.
    RankLink(const Ranks& ranks, const Meeting& meeting, LinkOptions options = {})
        : ranks_(ranks), options_(std::move(options)), size_(size_t(ranks.world)) {
        RankMember own = {uint64_t(ranks.local_rank), uint64_t(getpid()),
                          one_line(options_.host.empty() ? host_name() : options_.host)};
        if (ranks.world == 1) {
            members_ = {own};
            return;
        }
        Met met = ranks.rank == 0 ? Gathering(ranks, meeting, own).run(options_.limit_s)
                                  : Joining(ranks, meeting, own).run(options_.limit_s);
        members_ = std::move(met.members);
        for (Connection& connection : met.connections) peers_.emplace_back(std::move(connection));
        int ends[2];
        if (pipe(ends) != 0) fail_machine("cannot open a pipe: %s", strerror(errno));
        for (int k : {0, 1}) prepare_descriptor(ends[k]), wake_[k] = Descriptor(ends[k]);
        parts_.resize(size_);
        start_thread();
    }
    RankLink(const RankLink&) = delete;
    RankLink& operator=(const RankLink&) = delete;
    // Without finish() before it, and without a failure, the others take this rank for dead.
    ~RankLink() {
        if (!thread_.joinable()) return;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true, stopped_s_ = steady_s();
        }
        wake();
        changed_.notify_all();
        thread_.join();
    }

    const Ranks& ranks() const { return ranks_; }
    const std::vector<RankMember>& members() const { return members_; }  // by rank
    std::string describe(int rank) const {
        return describe_rank(size_t(rank), size_, members_[size_t(rank)]);
    }

    // `limit_s` of each: how long the last may come after the first; 0: as the options say. `name`
    // says in messages what it is about, and is compared.

    // The bytes of rank 0, at most 1 MiB; those of others are not looked at.
    std::string broadcast(const std::string& name, const std::string& bytes, double limit_s = 0) {
        if (size_ == 1) return bytes;
        return exchange(LinkOperation::broadcast, name, ranks_.rank == 0 ? bytes : "", limit_s);
    }

    // On rank 0 the bytes of every rank, by rank; nothing on others. At most 1 MiB each.
    std::vector<std::string> gather(const std::string& name, const std::string& bytes,
                                    double limit_s = 0) {
        if (size_ == 1) return {bytes};
        exchange(LinkOperation::gather, name, bytes, limit_s);
        return std::exchange(gathered_, {});
    }

    // Nothing where every rank brings the same; otherwise fail_input on every rank, with the first
    // name whose texts differ, two ranks and what each of them has.
    void all_equal(const std::string& name, std::vector<NamedText> list, double limit_s = 0) {
        if (size_ == 1) return;
        exchange(LinkOperation::all_equal, name, body_of(NamedTexts{std::move(list)}), limit_s);
    }
    void all_equal(const std::string& name, const std::string& text, double limit_s = 0) {
        all_equal(name, std::vector<NamedText>{{name, text}}, limit_s);
    }

    void barrier(const std::string& name, double limit_s = 0) {
        if (size_ > 1) exchange(LinkOperation::barrier, name, "", limit_s);
    }

    // The last operation: after it, ranks may leave.
    void finish(double limit_s = 0) {
        if (size_ > 1) exchange(LinkOperation::finish, "the run", "", limit_s);
    }

    // The work of this rank has come as far as `progress` (a step). From the first call on it must
    // be called again within --timeout, until rest(); waiting in an operation here counts as work.
    // Of several ranks that hang, the one that is least far is named. Throws when the job has
    // failed.
    void alive(uint64_t progress) {
        std::lock_guard<std::mutex> lock(mutex_);
        throw_failure();
        progress_ = progress, worked_s_ = steady_s(), watched_ = true;
    }
    // The same, about work that brings it no further.
    void at_work() {
        std::lock_guard<std::mutex> lock(mutex_);
        throw_failure();
        worked_s_ = steady_s(), watched_ = true;
    }
    // Whether the job has failed. Any thread may ask.
    bool has_failed() {
        std::lock_guard<std::mutex> lock(mutex_);
        return failure_.has_value();
    }
    // Whether rank 0 has told this rank of the failure, and says it to people itself.
    bool was_told() {
        std::lock_guard<std::mutex> lock(mutex_);
        return failure_ && failure_->told;
    }
    // What follows may take long, and nobody is to take this rank for hung.
    void rest() {
        std::lock_guard<std::mutex> lock(mutex_);
        watched_ = false;
    }

    // This rank must end because of `text`. Every other ends within a second; returned is the Error
    // that all end with, here too: the first that rank 0 heard of, which need not be this one.
    Error report_failure(int exit_code, const std::string& text) {
        if (size_ == 1) return Error(exit_code, text);
        constexpr double kAnswer_s = 1;
        std::unique_lock<std::mutex> lock(mutex_);
        RankFailure own = {uint64_t(exit_code & 255), failure_text(who(rank()) + ": " + text)};
        if (!failure_) {
            reported_ = own;  // taken up by the thread, after what has come from others by now
            wake();
            changed_.wait_for(lock, std::chrono::duration<double>(kAnswer_s),
                              [&] { return failure_.has_value(); });
            if (!failure_) fail(own);  // rank 0 cannot be reached
        }
        return Error(int(failure_->exit_code), failure_->text);
    }

  private:
    struct RankPeer {
        Connection connection;
        double heard_s = steady_s();
        double idle_s = 0;
        uint64_t progress = 0;
        explicit RankPeer(Connection made) : connection(std::move(made)) {}
    };

    size_t rank() const { return size_t(ranks_.rank); }
    std::string who(size_t rank) const {
        return format("rank %zu of %zu on %s", rank, size_, one_line(members_[rank].host).c_str());
    }
    void throw_failure() const {
        if (failure_) throw Error(int(failure_->exit_code), failure_->text);
    }
    void wake() {
        ssize_t written = write(wake_[1].get(), "", 1);  // a full pipe wakes as well
        (void)written;
    }

    // ---- operations: the calling thread ----

    std::string exchange(LinkOperation operation, const std::string& name, std::string payload,
                         double limit_s) {
        if (payload.size() > kLongestPayload)
            fail_machine("%s %s: %zu bytes are more than ranks exchange",
                         kOperationNames[int(operation)], name.c_str(), payload.size());
        RankPart part;
        part.operation = uint64_t(operation), part.name = one_line(name);
        part.limit_ms = uint64_t((limit_s > 0 ? limit_s : options_.limit_s) * 1000);
        part.payload = std::move(payload);
        std::unique_lock<std::mutex> lock(mutex_);
        throw_failure();
        part.sequence = ++sequence_;
        waiting_ = true, finishing_ = operation == LinkOperation::finish;
        if (rank() == 0) take_part(0, std::move(part));
        else peers_[0].connection.send(RankMessage::part, part);
        wake();
        changed_.wait(lock, [&] { return failure_ || whole_.has_value(); });
        waiting_ = false;
        worked_s_ = steady_s();
        throw_failure();
        std::string result = std::move(whole_->payload);
        whole_.reset();
        return result;
    }

    // ---- operations: rank 0, with the lock held ----

    void take_part(size_t rank, RankPart part) {
        if (parts_[rank]) {
            fail_of(rank, "sent twice for one operation");
            return;
        }
        auto title = [](const RankPart& p) {
            return format("%s %s", kOperationNames[p.operation], one_line(p.name).c_str());
        };
        auto lead = std::find_if(parts_.begin(), parts_.end(), [](auto& p) { return bool(p); });
        if (lead == parts_.end()) begun_s_ = steady_s(), limit_s_ = 0;
        else if (part.operation != (*lead)->operation || part.name != (*lead)->name ||
                 part.sequence != (*lead)->sequence) {
            size_t other = size_t(lead - parts_.begin());
            fail({kExitMachine,
                  format("%s is at the %s, and %s at the %s", who(rank).c_str(),
                         title(part).c_str(), who(other).c_str(), title(**lead).c_str())});
            return;
        }
        limit_s_ = std::max(limit_s_, double(part.limit_ms) / 1000);
        parts_[rank] = std::move(part);
        if (std::all_of(parts_.begin(), parts_.end(), [](auto& p) { return bool(p); })) complete();
    }

    void complete() {
        auto operation = LinkOperation(parts_[0]->operation);
        RankWhole whole;
        whole.sequence = parts_[0]->sequence;
        if (operation == LinkOperation::broadcast) whole.payload = parts_[0]->payload;
        if (operation == LinkOperation::all_equal && !compare()) return;
        gathered_.clear();
        if (operation == LinkOperation::gather)
            for (auto& part : parts_) gathered_.push_back(std::move(part->payload));
        for (auto& part : parts_) part.reset();
        for (size_t rank = 1; rank < size_; rank++)
            peers_[rank].connection.send(RankMessage::whole, whole);
        whole_ = std::move(whole);
        finished_ = operation == LinkOperation::finish;
        changed_.notify_all();
    }

    // Whether all parts are equal; the job has failed where they are not.
    bool compare() {
        auto shown = [](const std::string& text) {
            return text.empty() ? std::string("nothing") : one_line(text);
        };
        for (size_t rank = 1; rank < size_; rank++) {
            if (parts_[rank]->payload == parts_[0]->payload) continue;
            std::vector<NamedText> first, other;
            try {
                first = read_body<NamedTexts>(parts_[0]->payload).list;
                other = read_body<NamedTexts>(parts_[rank]->payload).list;
            } catch (const Error&) {
                fail_of(rank, "sent what is no list of names");
                return false;
            }
            size_t at = 0;
            while (at < first.size() && at < other.size() && first[at].name == other[at].name &&
                   first[at].text == other[at].text)
                at++;
            NamedText none = {"nothing", ""};
            const NamedText& a = at < first.size() ? first[at] : none;
            const NamedText& b = at < other.size() ? other[at] : none;
            std::string text =
                a.name == b.name
                    ? format("%s differs: %s on %s, %s on %s: it must be the same on every rank",
                             one_line(a.name).c_str(), shown(a.text).c_str(), who(0).c_str(),
                             shown(b.text).c_str(), who(rank).c_str())
                    : format(
                          "%s has %s where %s has %s: the same program and options must run on "
                          "every rank",
                          who(0).c_str(), one_line(a.name).c_str(), who(rank).c_str(),
                          one_line(b.name).c_str());
            fail({kExitInput, text});
            return false;
        }
        return true;
    }

    // ---- failures, with the lock held ----

    void fail_of(size_t rank, const std::string& what) {
        fail({kExitMachine, who(rank) + " " + what});
    }

    // The first counts, and rank 0 passes it on.
    void fail(RankFailure failure) {
        if (failure_ || finished_) return;
        failure.text = failure_text(failure.text);
        failure_ = failure, failed_s_ = steady_s();
        if (rank() == 0)
            for (size_t rank = 1; rank < size_; rank++)
                if (peers_[rank].connection.open())
                    peers_[rank].connection.send(RankMessage::fail, failure);
        changed_.notify_all();
    }

    // ---- the thread ----

    void start_thread() {
        // A signal goes to the main thread, which is prepared for it.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        thread_ = std::thread([this] { serve(); });
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    double pulse_s() const {
        double timeout_s = options_.timeout_s > 0 ? options_.timeout_s : 4;
        return std::min(1.0, std::max(0.02, timeout_s / 5));
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        double pulsed_s = 0, looked_s = steady_s();
        bool told = false;
        while (!is_over()) {
            poll_peers(lock);
            for (size_t i = 0; i < peers_.size(); i++) hear(i);
            if (reported_ && !failure_) report();
            double now = steady_s(), passed_s = now - looked_s;
            bool stopped = passed_s >= 3 * pulse_s();
            if (stopped) pass_over(passed_s, now);
            if (now - pulsed_s >= pulse_s()) send_pulses(now), pulsed_s = now;
            // After a stop of this very process, what the others sent meanwhile is read first.
            if (!stopped && !failure_ && !finished_) judge(now);
            looked_s = now;
            if (failure_ && !told && !stop_ && now >= failed_s_ + options_.grace_s) {
                told = true;
                RankFailure failure = *failure_;
                lock.unlock();
                end_process(failure);
                lock.lock();
            }
        }
        part_from_peers(lock);
    }

    // The owner is gone, and what was to be sent is.
    bool is_over() const {
        if (!stop_) return false;
        bool sending = std::any_of(peers_.begin(), peers_.end(),
                                   [](const RankPeer& peer) { return peer.connection.sending(); });
        return !sending || steady_s() > stopped_s_ + (finished_ ? options_.limit_s : 0.3);
    }

    void poll_peers(std::unique_lock<std::mutex>& lock) {
        std::vector<struct pollfd> list = {{wake_[0].get(), POLLIN, 0}};
        for (RankPeer& peer : peers_) {
            short events = peer.connection.sending() ? POLLIN | POLLOUT : POLLIN;
            list.push_back({peer.connection.fd(), events, 0});
        }
        bool urgent = failure_ || stop_ || reported_;
        int wait_ms = urgent ? 10 : std::max(1, int(pulse_s() * 500));
        lock.unlock();
        poll(list.data(), nfds_t(list.size()), wait_ms);
        char bytes[64];
        while (read(wake_[0].get(), bytes, sizeof bytes) > 0) {}
        lock.lock();
        for (RankPeer& peer : peers_)
            if (peer.connection.open()) peer.connection.flush();
    }

    // All that has come from a peer: by rank on rank 0, and rank 0 alone on others.
    void hear(size_t from) {
        RankPeer& peer = peers_[from];
        while (peer.connection.open()) {
            size_t rank = this->rank() == 0 ? from : 0;
            bool more = false;
            try {
                struct pollfd one = {peer.connection.fd(), POLLIN, 0};
                if (poll(&one, 1, 0) <= 0) return;
                more = peer.connection.receive();
                peer.heard_s = steady_s();
                while (auto message = peer.connection.reader().next()) take(rank, peer, *message);
            } catch (const Error& error) {
                fail_of(rank, std::string("sent rubbish: ") + error.what());
                more = false;
            }
            if (more) continue;
            peer.connection.close();
            fail_of(rank, "ended without a word: killed, or its machine went down");
        }
    }

    void take(size_t rank, RankPeer& peer, const ReceivedMessage& message) {
        if (message.kind == RankMessage::pulse) {
            auto pulse = read_body<RankPulse>(message.body);
            peer.idle_s = double(pulse.idle_ms) / 1000, peer.progress = pulse.progress;
        } else if (message.kind == RankMessage::fail) {
            auto failure = read_body<RankFailure>(message.body);
            failure.told = this->rank() > 0;
            fail(failure);
        } else if (message.kind == RankMessage::part && this->rank() == 0) {
            if (!failure_) take_part(rank, read_body<RankPart>(message.body));
        } else if (message.kind == RankMessage::whole && this->rank() != 0) {
            whole_ = read_body<RankWhole>(message.body);
            if (whole_->sequence != sequence_ || !waiting_) fail_input("for another operation");
            // Only finish() is the last; the others may go on.
            finished_ = finishing_;
            changed_.notify_all();
        } else {
            fail_input("a message that is not due");
        }
    }

    void report() {
        if (rank() == 0) fail(*reported_);
        else peers_[0].connection.send(RankMessage::fail, *reported_);
        reported_.reset();
    }

    double own_idle_s(double now) const { return watched_ && !waiting_ ? now - worked_s_ : 0; }

    void send_pulses(double now) {
        RankPulse pulse = {uint64_t(own_idle_s(now) * 1000), progress_};
        for (RankPeer& peer : peers_)
            // Where the last ones wait to be sent, another tells nothing.
            if (peer.connection.open() && !peer.connection.sending())
                peer.connection.send(RankMessage::pulse, pulse);
    }

    // This process was stopped and goes on. Where that was done to the whole job, as by a scheduler
    // that suspends it, nobody is to be blamed for that time, nor for going on a little later.
    void pass_over(double seconds, double now) {
        auto later = [&](double* since_s) { *since_s = std::min(now, *since_s + seconds); };
        for (RankPeer& peer : peers_) later(&peer.heard_s);
        later(&worked_s_), later(&begun_s_);
    }

    // Has everybody been heard of, does everybody work, has everybody come?
    void judge(double now) {
        if (options_.timeout_s > 0)
            for (size_t i = 0; i < peers_.size(); i++)
                if (peers_[i].connection.open() && now - peers_[i].heard_s > options_.timeout_s) {
                    fail_of(rank() == 0 ? i : 0,
                            format("has not been heard of for %.3g s: it is stopped, or cut off",
                                   options_.timeout_s));
                    return;
                }
        if (rank() != 0) return;
        if (options_.timeout_s > 0) judge_work(now);
        std::vector<size_t> missing;
        for (size_t rank = 0; rank < size_; rank++)
            if (!parts_[rank]) missing.push_back(rank);
        if (failure_ || missing.size() == size_ || now < begun_s_ + limit_s_) return;
        auto lead = std::find_if(parts_.begin(), parts_.end(), [](auto& p) { return bool(p); });
        std::string name = one_line((*lead)->name);
        const char* kind = kOperationNames[(*lead)->operation];
        std::string first = one_line(members_[missing[0]].host);
        fail({kExitMachine,
              format("%s (host %s%s) did not come within %.4g s to the %s %s",
                     rank_list(missing).c_str(), first.c_str(),
                     missing.size() > 1 ? " and others" : "", limit_s_, kind, name.c_str())});
    }

    // When one hangs, the others soon wait for it on their GPUs, and look hung as well.
    void judge_work(double now) {
        size_t last = size_;
        double longest = 0;
        uint64_t least = 0, most = 0;
        for (size_t rank = 0; rank < size_; rank++) {
            double idle = rank == 0 ? own_idle_s(now) : peers_[rank].idle_s;
            uint64_t progress = rank == 0 ? progress_ : peers_[rank].progress;
            longest = std::max(longest, idle), most = std::max(most, progress);
            if (idle < options_.timeout_s / 2 || (last < size_ && progress >= least)) continue;
            last = rank, least = progress;
        }
        if (longest <= options_.timeout_s || last == size_) return;
        fail_of(last,
                format("hangs: its work has not gone on for %.3g s (it is at %llu, the "
                       "furthest rank at %llu); a larger --timeout waits for longer",
                       options_.timeout_s, (unsigned long long)least, (unsigned long long)most));
    }

    void end_process(const RankFailure& failure) const {
        if (options_.on_failure) {
            options_.on_failure(failure);
            return;
        }
        std::string line = options_.program + ": error: " + failure.text + "\n";
        ssize_t written = write(STDERR_FILENO, line.data(), line.size());
        (void)written;
        _exit(int(failure.exit_code));
    }

    // What is closed with bytes unread may take along what was sent: first the others have read it.
    void part_from_peers(std::unique_lock<std::mutex>& lock) {
        constexpr double kLongest_s = 0.3;
        lock.unlock();
        for (RankPeer& peer : peers_) peer.connection.stop_sending();
        double until = steady_s() + kLongest_s;
        if (failure_ || finished_)
            for (RankPeer& peer : peers_)
                while (peer.connection.open() &&
                       wait_for(peer.connection.fd(), POLLIN, until - steady_s()))
                    if (!peer.connection.receive()) peer.connection.close();
        lock.lock();
    }

    Ranks ranks_;
    LinkOptions options_;
    size_t size_;
    std::vector<RankMember> members_;
    Descriptor wake_[2];  // a pipe: the thread polls one end
    std::thread thread_;

    std::mutex mutex_;  // of all that follows
    std::condition_variable changed_;
    std::vector<RankPeer>
        peers_;  // on rank 0 by rank, the first without a connection; on others rank 0
    bool stop_ = false, finished_ = false, finishing_ = false;
    bool waiting_ = false;  // in an operation
    uint64_t sequence_ = 0;
    std::optional<RankWhole> whole_;
    std::vector<std::string> gathered_;
    std::vector<std::optional<RankPart>> parts_;  // on rank 0, of the operation under way
    double begun_s_ = 0, limit_s_ = 0;
    std::optional<RankFailure> failure_, reported_;
    double failed_s_ = 0, stopped_s_ = 0;
    bool watched_ = false;
    double worked_s_ = 0;
    uint64_t progress_ = 0;
};

// gather() of however many bytes, `piece` at a time.
inline std::vector<std::string> gather_long(RankLink& link, const std::string& name,
                                            const std::string& bytes, double limit_s = 0,
                                            size_t piece = 1 << 19) {
    if (link.ranks().world == 1) return {bytes};
    size_t pieces = 0;
    for (const std::string& size : link.gather(name, std::to_string(bytes.size()), limit_s))
        pieces = std::max(pieces, std::stoul(size) / piece + 1);
    pieces = std::stoul(link.broadcast(name, std::to_string(pieces), limit_s));
    std::vector<std::string> all;
    for (size_t i = 0; i < pieces; i++) {
        size_t begin = std::min(i * piece, bytes.size());
        std::vector<std::string> parts = link.gather(name, bytes.substr(begin, piece), limit_s);
        all.resize(parts.size());
        for (size_t rank = 0; rank < parts.size(); rank++) all[rank] += parts[rank];
    }
    return all;
}
