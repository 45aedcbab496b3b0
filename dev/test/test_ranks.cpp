// The tests of the processes of a job: what launchers say, where ranks meet, --gpus, and the link
// among real processes, with ranks that do not come, die, hang, differ, and strangers at the door.

#include <gtest/gtest.h>

#include <map>

#include "../../ranks.h"
#include "tools.h"

namespace {

// ---- processes ----

struct Outcome {
    int status = -1;     // exit code, 128 + signal, or -1: it had to be killed by the test
    double seconds = 0;  // that it took
    std::string said;
};

struct Child {
    pid_t pid = 0;
    Descriptor out;
    double begun_s = 0;
};

using Say = std::function<void(const std::string&)>;

// A process of its own; an Error ends it with its code, and "CODE TEXT" said.
Child start_child(const std::function<void(const Say&)>& body) {
    int ends[2];
    if (pipe(ends) != 0) return Child();
    fflush(stdout);
    Child child;
    child.begun_s = steady_s();
    child.pid = fork();
    if (child.pid == 0) {
        close(ends[0]);
        dup2(ends[1], STDERR_FILENO);
        auto say = [&](const std::string& text) {
            if (write(ends[1], text.data(), text.size()) < 0) _exit(99);
        };
        int code = 0;
        try {
            body(say);
        } catch (const Error& error) {
            say(std::to_string(error.exit_code) + " " + error.what());
            code = error.exit_code;
        }
        _exit(code);
    }
    close(ends[1]);
    fcntl(ends[0], F_SETFD, FD_CLOEXEC);
    child.out = Descriptor(ends[0]);
    return child;
}

// Waits for its end, 20 s at most.
Outcome end_child(Child child) {
    Outcome outcome;
    double until = child.begun_s + 20;
    char bytes[4096];
    bool in_time = true;
    for (;;) {
        if (!(in_time = wait_for(child.out.get(), POLLIN, until - steady_s()))) break;
        ssize_t count = read(child.out.get(), bytes, sizeof bytes);
        if (count <= 0) break;
        outcome.said.append(bytes, size_t(count));
    }
    if (!in_time) kill(child.pid, SIGKILL);
    int status = 0;
    waitpid(child.pid, &status, 0);
    outcome.seconds = steady_s() - child.begun_s;
    if (in_time) outcome.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return outcome;
}

std::vector<Outcome> end_all(std::vector<Child> children) {
    std::vector<Outcome> outcomes;
    for (Child& child : children) outcomes.push_back(end_child(std::move(child)));
    return outcomes;
}

Ranks rank_of(int rank, int world) {
    Ranks r;
    r.rank = r.local_rank = rank, r.world = r.local_world = world;
    r.source = "the test", r.job = "a job of the test";
    return r;
}

// A port that was free a moment ago.
int free_port() { return port_of(listen_at(AF_INET, true, 0).get()); }

Meeting meeting_at(int port, const std::string& host = "127.0.0.1") {
    Ranks r = rank_of(0, 2);
    return choose_meeting(r, host + ":" + std::to_string(port));
}

LinkOptions quick(double limit_s = 8) {
    LinkOptions options;
    options.limit_s = limit_s, options.timeout_s = 8;
    return options;
}

using Work = std::function<void(RankLink&, const Say&)>;

Child start_rank(int rank, int world, const Meeting& meeting, const LinkOptions& options,
                 const Work& work) {
    return start_child([=](const Say& say) {
        Ranks r = rank_of(rank, world);
        LinkOptions own = options;
        if (own.host.empty()) own.host = std::string("host") + char('a' + rank / 2);
        RankLink link(r, meeting, own);
        work(link, say);
    });
}

std::vector<Outcome> run_job(int world, const Meeting& meeting, const LinkOptions& options,
                             const Work& work) {
    std::vector<Child> children;
    for (int rank = 0; rank < world; rank++)
        children.push_back(start_rank(rank, world, meeting, options, work));
    return end_all(std::move(children));
}

std::string all_that_was_said(const std::vector<Outcome>& outcomes) {
    std::string text;
    for (const Outcome& outcome : outcomes)
        text += format("[%d, %.2f s] ", outcome.status, outcome.seconds) + outcome.said + "\n";
    return text;
}

void expect_all(const std::vector<Outcome>& outcomes, int status, const std::string& said) {
    for (const Outcome& outcome : outcomes) {
        EXPECT_EQ(outcome.status, status) << all_that_was_said(outcomes);
        EXPECT_NE(outcome.said.find(said), std::string::npos)
            << all_that_was_said(outcomes) << "lacks: " << said;
        EXPECT_EQ(outcome.said.find('\n'), std::string::npos) << all_that_was_said(outcomes);
    }
}

void sleep_s(double seconds) {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

// Every operation once.
void work_through(RankLink& link, const Say& say) {
    int rank = link.ranks().rank;
    link.all_equal("--batch-size", "8");
    std::string id = link.broadcast("the id", rank == 0 ? std::string("\0id\n", 4) : "not this");
    if (id != std::string("\0id\n", 4)) say("wrong id;");
    std::vector<std::string> all = link.gather("sizes", std::string(size_t(rank), 'x'));
    if (all.size() != (rank == 0 ? link.members().size() : 0)) say("wrong number;");
    for (size_t i = 0; i < all.size(); i++)
        if (all[i] != std::string(i, 'x')) say("wrong part;");
    link.barrier("step 1");
    link.alive(1);
    link.barrier("step 2");
    link.finish();
    say("done");
}

// ---- variables ----

using Variables = std::map<std::string, std::string>;

Environment environment_of(const Variables& variables) {
    return [variables](const char* name) -> const char* {
        static thread_local std::string value;
        auto found = variables.find(name);
        if (found == variables.end()) return nullptr;
        value = found->second;
        return value.c_str();
    };
}

Variables with(Variables variables, const Variables& more) {
    for (const auto& [name, value] : more) variables[name] = value;
    return variables;
}

Variables without(Variables variables, const std::string& name) {
    variables.erase(name);
    return variables;
}

std::string numbers(const Ranks& r) {
    return format("%d/%d %d/%d %s", r.rank, r.world, r.local_rank, r.local_world, r.source.c_str());
}

std::string found(const Variables& variables) {
    return numbers(find_ranks(environment_of(variables)));
}

void expect_variable(const Variables& variables, const std::string& expected) {
    expect_refused(error_of([&] { found(variables); }), expected);
}

const Variables kOwn = {{"GPT2_RANK", "1"},
                        {"GPT2_WORLD", "4"},
                        {"GPT2_LOCAL_RANK", "1"},
                        {"GPT2_LOCAL_WORLD", "4"},
                        {"GPT2_JOB", "j"}};
const Variables kOpenMpi = {{"OMPI_COMM_WORLD_RANK", "5"},
                            {"OMPI_COMM_WORLD_SIZE", "8"},
                            {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                            {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                            {"PMIX_NAMESPACE", "731"}};
const Variables kHydra = {
    {"PMI_RANK", "5"}, {"PMI_SIZE", "8"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "4"}};
const Variables kTorch = {{"RANK", "5"},
                          {"WORLD_SIZE", "8"},
                          {"LOCAL_RANK", "1"},
                          {"LOCAL_WORLD_SIZE", "4"},
                          {"MASTER_ADDR", "node1"},
                          {"MASTER_PORT", "29500"},
                          {"TORCHELASTIC_RUN_ID", "none"}};
const Variables kSlurm = {{"SLURM_JOB_ID", "77"},
                          {"SLURM_STEP_ID", "0"},
                          {"SLURM_PROCID", "5"},
                          {"SLURM_NTASKS", "7"},
                          {"SLURM_LOCALID", "1"},
                          {"SLURM_NODEID", "1"},
                          {"SLURM_STEP_TASKS_PER_NODE", "4,3"},
                          {"SLURM_STEP_NODELIST", "gpu[07-08]"}};

}  // namespace

TEST(Ranks, AreThoseOfEveryLauncher) {
    EXPECT_EQ(found({}), "0/1 0/1 ");
    EXPECT_EQ(found({{"OMPI_COMM_WORLD_LOCAL_RANK", "1"}}), "0/1 0/1 ") << "no rank, no launcher";
    EXPECT_EQ(found(kOwn), "1/4 1/4 --gpus");
    EXPECT_EQ(found(kOpenMpi), "5/8 1/4 OpenMPI");
    EXPECT_EQ(found(kHydra), "5/8 1/4 MPICH");
    EXPECT_EQ(found(kTorch), "5/8 1/4 torchrun");
    EXPECT_EQ(found(without(kTorch, "TORCHELASTIC_RUN_ID")), "5/8 1/4 torchrun");
    EXPECT_EQ(found(kSlurm), "5/7 1/3 Slurm");
    EXPECT_EQ(found(with(kSlurm,
                         {{"SLURM_STEP_NUM_TASKS", "6"}, {"SLURM_STEP_TASKS_PER_NODE", "3(x2)"}})),
              "5/6 1/3 Slurm")
        << "the step's word, not the job's";
}

TEST(Ranks, TheInnermostLauncherCounts) {
    EXPECT_EQ(found(with(kSlurm, kOpenMpi)), "5/8 1/4 OpenMPI") << "mpirun in a Slurm job";
    EXPECT_EQ(found(with(kSlurm, kHydra)), "5/8 1/4 MPICH");
    EXPECT_EQ(found(with(kSlurm, kTorch)), "5/8 1/4 torchrun");
    EXPECT_EQ(found(with(with(kOpenMpi, kTorch), {{"RANK", "2"}})), "2/8 1/4 torchrun");
    EXPECT_EQ(found(with(kSlurm, kOwn)), "1/4 1/4 --gpus");
    EXPECT_EQ(found(with(kSlurm, {{"PMI_RANK", "5"}, {"PMI_SIZE", "7"}})), "5/7 1/3 Slurm")
        << "srun --mpi=pmi2";
}

// A batch script has SLURM_PROCID 0 and the tasks of the whole job, and is one process.
TEST(Ranks, ABatchScriptIsNoStep) {
    EXPECT_EQ(found(without(kSlurm, "SLURM_STEP_ID")), "0/1 0/1 ");
    for (const char* step : {"4294967291", "4294967290", "-5"})
        EXPECT_EQ(found(with(kSlurm, {{"SLURM_STEP_ID", step}})), "0/1 0/1 ") << step;
}

TEST(Ranks, RefusesVariablesThatAreMalformedOrIncomplete) {
    const std::pair<Variables, RankVariables> kSets[] = {{kOwn, kOwnVariables},
                                                         {kOpenMpi, kOpenMpiVariables},
                                                         {kHydra, kHydraVariables},
                                                         {kTorch, kTorchVariables}};
    for (const auto& [variables, names] : kSets) {
        for (const char* name : {names.rank, names.world, names.local_rank, names.local_world}) {
            expect_variable(without(variables, name), std::string(name) + " is not set");
            for (const char* wrong : {"-1", "x", "1 ", "0x1", "99999999999", "1\n2", "9"})
                if (std::string(wrong) != "9" || name != names.world)
                    expect_variable(with(variables, {{name, wrong}}), std::string(name) + "=");
        }
        expect_variable(with(variables, {{names.world, "0"}}), names.world);
        expect_variable(with(variables, {{names.world, "16385"}}), names.world);
    }
    for (const char* name : {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID",
                             "SLURM_STEP_TASKS_PER_NODE"})
        expect_variable(without(kSlurm, name), name);
    for (const char* list : {"4", "4,", "4(x1)", "x", "4(x0),3", "0(x2),3", "4;3", "4,1", "4,8"})
        expect_variable(with(kSlurm, {{"SLURM_STEP_TASKS_PER_NODE", list}}),
                        std::string("SLURM_STEP_TASKS_PER_NODE=") + list);
}

TEST(Ranks, RefusesContradictions) {
    expect_variable(with(kOpenMpi, {{"WORLD_SIZE", "16"}}),
                    "WORLD_SIZE=16 contradicts OpenMPI, by which it is 8: unset it");
    expect_variable(with(kSlurm, {{"RANK", "0"}}), "RANK=0 contradicts Slurm, by which it is 5");
    EXPECT_EQ(found(with(kSlurm, {{"WORLD_SIZE", "7"}})), "5/7 1/3 Slurm");
}

TEST(Ranks, ReadSlurmsLists) {
    const std::pair<const char*, const char*> kLists[] = {{"a", "a"},
                                                          {"a,b", "a"},
                                                          {"gnode[007,9-12],x3", "gnode007"},
                                                          {"r[1-2]n[3-4]-ib,q", "r1n3-ib"},
                                                          {"n[5]", "n5"},
                                                          {"n[5", ""},
                                                          {"", ""},
                                                          {"[", ""},
                                                          {"n[]x", "nx"}};
    for (auto [list, host] : kLists) EXPECT_EQ(first_slurm_host(list), host) << list;
    EXPECT_EQ(slurm_tasks_of_node("4(x2),3", 0), 4);
    EXPECT_EQ(slurm_tasks_of_node("4(x2),3", 1), 4);
    EXPECT_EQ(slurm_tasks_of_node("4(x2),3", 2), 3);
    EXPECT_EQ(slurm_tasks_of_node("4(x2),3", 3), 0);
}

// ---- where to meet ----

TEST(Rendezvous, ReadsTheOption) {
    Ranks r = rank_of(1, 2);
    auto where = [&](const std::string& option) {
        Meeting m = choose_meeting(r, option);
        return m.file.empty() ? m.host + " " + std::to_string(m.ports.at(0)) : m.file;
    };
    EXPECT_EQ(where("a.b-c:65535"), "a.b-c 65535");
    EXPECT_EQ(where("[::1]:5"), "::1 5");
    EXPECT_EQ(where("file:/x/y"), "/x/y");
    std::string folder = test_folder();
    EXPECT_EQ(where("file:" + folder).rfind(folder + "/rendezvous-", 0), 0u);
    EXPECT_EQ(where("file:/x/").rfind("/x/rendezvous-", 0), 0u);
    for (const char* wrong : {"a", "a:", "a:0", "a:65536", ":5", "::1:5", "[::1]", "a:5x", "a b:5",
                              "file:", "a:-1", "[]:5", "a/b:5", "http://a:5"})
        expect_refused(error_of([&] { where(wrong); }),
                       std::string("--rendezvous ") + wrong + ": ");
    EXPECT_EQ(error_of([&] { choose_meeting(rank_of(0, 1), ""); }), "") << "one needs none";
}

TEST(Rendezvous, HasADefaultWhereTheLauncherSaysEnough) {
    auto meet = [](const Variables& variables) {
        Environment environment = environment_of(variables);
        return choose_meeting(find_ranks(environment), "", environment);
    };
    Meeting torch = meet(kTorch);
    EXPECT_EQ(torch.host, "node1");
    EXPECT_EQ(torch.ports, std::vector<int>{29500});
    // The agent listens there itself.
    Meeting agent = meet(with(kTorch, {{"TORCHELASTIC_USE_AGENT_STORE", "True"}}));
    EXPECT_EQ(agent.host, "node1");
    EXPECT_EQ(agent.ports.size(), 8u);
    EXPECT_EQ(std::count(agent.ports.begin(), agent.ports.end(), 29500), 0);
    Meeting slurm = meet(kSlurm);
    EXPECT_EQ(slurm.host, "gpu07");
    EXPECT_EQ(slurm.ports.size(), 8u);
    EXPECT_FALSE(slurm.one_node);
    Variables other = with(kSlurm, {{"SLURM_PROCID", "0"}, {"SLURM_LOCALID", "0"}});
    EXPECT_EQ(meet(other).ports, slurm.ports) << "the same on every rank";
    EXPECT_EQ(meet(other).token, slurm.token);
    EXPECT_NE(meet(with(kSlurm, {{"SLURM_STEP_ID", "1"}})).token, slurm.token);
    EXPECT_NE(meet(with(kSlurm, {{"SLURM_RESTART_COUNT", "1"}})).token, slurm.token);
    Variables one = {{"OMPI_COMM_WORLD_LOCAL_SIZE", "8"}};
    EXPECT_EQ(meet(with(kOpenMpi, one)).host, "127.0.0.1");
    EXPECT_NE(meet(with(kOpenMpi, one)).token,
              meet(with(with(kOpenMpi, one), {{"PMIX_NAMESPACE", "732"}})).token);
    EXPECT_EQ(meet(with(kHydra, {{"MPI_LOCALNRANKS", "8"}})).host, "127.0.0.1");
    EXPECT_EQ(meet(kOwn).host, "127.0.0.1");
    for (int port : meet(kOwn).ports) EXPECT_TRUE(port >= 20000 && port < 32768) << port;

    // Where a launcher says no name of the job, ranks of one parent are of one job, unless a place
    // is named that no other has: each may have been wrapped in a script of its own.
    Ranks bare = find_ranks(environment_of(with(kHydra, {{"MPI_LOCALNRANKS", "8"}})));
    Ranks wrapped = bare;
    wrapped.parent += "1";
    for (auto [option, apart] : {std::pair("", true), {"file:/x/", true}, {"a:5", false}})
        EXPECT_EQ(choose_meeting(bare, option).token != choose_meeting(wrapped, option).token,
                  apart)
            << option;
    auto error = [&](const Variables& variables) { return error_of([&] { meet(variables); }); };
    expect_refused(error(kOpenMpi), "OpenMPI started 8 processes on several nodes");
    expect_refused(error(kHydra), "give --rendezvous host:port");
    expect_refused(error(without(kTorch, "MASTER_PORT")), "MASTER_PORT is not set");
    expect_refused(error(without(kTorch, "MASTER_ADDR")), "MASTER_ADDR is not set");
    expect_refused(error(with(kTorch, {{"MASTER_PORT", "x"}})), "MASTER_PORT=x");
    expect_refused(error(with(kSlurm, {{"SLURM_STEP_NODELIST", "["}})), "SLURM_STEP_NODELIST=[");
    expect_refused(error(with(other, {{"SLURMD_NODENAME", "gpu08"}})), "rank 0 is on gpu08");
    EXPECT_EQ(error(with(kSlurm, {{"SLURMD_NODENAME", "gpu08"}})), "") << "that is rank 0's matter";
}

// ---- --gpus ----

namespace {

RanksEnd run_script(int count, const std::string& script, RunRanksOptions options = {0.1, 0.3}) {
    std::string copy = script;
    char name[] = "sh", option[] = "-c";
    char* argv[] = {name, option, copy.data(), nullptr};
    return run_ranks(count, "/bin/sh", argv, options);
}

}  // namespace

TEST(Gpus, StartsEveryRankOnceAndWaits) {
    std::string folder = test_folder();
    RanksEnd end = run_script(3,
                              "echo $GPT2_RANK $GPT2_WORLD $GPT2_LOCAL_RANK $GPT2_LOCAL_WORLD "
                              "$GPT2_JOB >" +
                                  folder + "/$GPT2_RANK");
    EXPECT_EQ(end.exit_code, 0) << end.text;
    std::string job;
    for (int rank = 0; rank < 3; rank++) {
        std::string said = read_file(folder + "/" + std::to_string(rank));
        std::string expected = format("%d 3 %d 3 ", rank, rank);
        EXPECT_EQ(said.substr(0, expected.size()), expected);
        if (rank > 0) { EXPECT_EQ(said.substr(expected.size()), job); }
        job = said.substr(expected.size());
    }
    EXPECT_GT(job.size(), 16u);
    EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1) << "none is left";
    std::string threads_before = getenv("OMP_NUM_THREADS") ? getenv("OMP_NUM_THREADS") : "";
    auto threads = [&](const char* own) {
        own == nullptr ? unsetenv("OMP_NUM_THREADS") : setenv("OMP_NUM_THREADS", own, 1);
        EXPECT_EQ(run_script(2, "echo $OMP_NUM_THREADS >" + folder + "/$GPT2_RANK").exit_code, 0);
        return std::stoi(read_file(folder + "/1"));
    };
    EXPECT_EQ(threads(nullptr), std::max(int(std::thread::hardware_concurrency()) / 2, 1));
    EXPECT_EQ(threads("5"), 5);
    unsetenv("OMP_NUM_THREADS");
    if (!threads_before.empty()) setenv("OMP_NUM_THREADS", threads_before.c_str(), 1);
}

TEST(Gpus, OneThatFailsEndsAllWithItsCode) {
    double begun_s = steady_s();
    RanksEnd end = run_script(3, "[ $GPT2_RANK = 1 ] && exit 7; exec sleep 15");
    EXPECT_EQ(end.exit_code, 7);
    EXPECT_EQ(end.rank, 1);
    EXPECT_EQ(end.text, "") << "it said for itself why";
    EXPECT_LT(steady_s() - begun_s, 5);
    EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1);
}

TEST(Gpus, OneThatIsKilledIsNamed) {
    RanksEnd end = run_script(2, "[ $GPT2_RANK = 1 ] && kill -9 $$; exec sleep 15");
    EXPECT_EQ(end.exit_code, 137);
    EXPECT_EQ(end.rank, 1);
    EXPECT_NE(end.text.find("rank 1 of 2 was killed by signal 9 (Killed)"), std::string::npos)
        << end.text;
}

TEST(Gpus, WhoDoesNotListenIsKilled) {
    std::string ready = test_folder() + "/ready";
    Outcome outcome = end_child(start_child([&](const Say& say) {
        RanksEnd end = run_script(2, "trap '' TERM; if [ $GPT2_RANK = 0 ]; then while [ ! -e " +
                                         ready + " ]; do sleep 0.02; done; exit 3; fi; touch " +
                                         ready + "; while :; do sleep 1; done");
        say(std::to_string(end.exit_code));
    }));
    EXPECT_EQ(outcome.said, "3");
    EXPECT_GT(outcome.seconds, 0.35) << "after SIGTERM and the time to follow it";
}

#ifdef __linux__
// Ctrl-C goes to every process of the terminal's group: to the ranks through their parent alone.
TEST(Gpus, RanksAreInGroupsOfTheirOwn) {
    std::string folder = test_folder();
    EXPECT_EQ(run_script(2, "read a b c d group rest </proc/$$/stat; echo $$ $group >" + folder +
                                "/$GPT2_RANK")
                  .exit_code,
              0);
    for (const char* rank : {"/0", "/1"}) {
        int pid = 0, group = 1;
        std::ifstream(folder + rank) >> pid >> group;
        EXPECT_EQ(pid, group);
    }
}
#endif

TEST(Gpus, SignalsGoToAllAndSavingIsNotDisturbed) {
    for (int signal : kStopSignals) {
        std::string folder = test_folder();
        // Rank 0 saves for longer than the others would be given after a failure.
        std::string script = format(
            "trap 'echo %d >>%s/$GPT2_RANK; [ $GPT2_RANK = 0 ] && sleep 0.8; "
            "echo saved >>%s/$GPT2_RANK; exit %d' %d; "
            "touch %s/ready$GPT2_RANK; while :; do sleep 0.05; done",
            signal, folder.c_str(), folder.c_str(), 128 + signal, signal, folder.c_str());
        Child child = start_child([&](const Say& say) {
            // Where the tests run in the background of a shell it may be ignored, and no script
            // can trap it.
            ::signal(signal, SIG_DFL);
            RanksEnd end = run_script(2, script);
            say(std::to_string(end.exit_code) + end.text);
        });
        while (!fs::exists(folder + "/ready0") || !fs::exists(folder + "/ready1")) sleep_s(0.01);
        kill(child.pid, signal);
        Outcome outcome = end_child(std::move(child));
        EXPECT_EQ(outcome.said, std::to_string(128 + signal));
        for (const char* rank : {"/0", "/1"})
            EXPECT_EQ(read_file(folder + rank), std::to_string(signal) + "\nsaved\n") << "once";
    }
}

// A terminal that goes away, or a scheduler, sends another one while rank 0 still saves, and the
// others have ended by the first.
TEST(Gpus, SignalsThatFollowDoNotDisturbSaving) {
    std::string folder = test_folder();
    std::string script = format(
        "trap '' TERM; trap 'touch %s/saves$GPT2_RANK; [ $GPT2_RANK = 0 ] && sleep 0.8; "
        "echo saved >%s/$GPT2_RANK; exit 129' HUP; "
        "touch %s/ready$GPT2_RANK; while :; do sleep 0.05; done",
        folder.c_str(), folder.c_str(), folder.c_str());
    Child child = start_child([&](const Say& say) {
        for (int signal : {SIGHUP, SIGTERM}) ::signal(signal, SIG_DFL);
        RanksEnd end = run_script(2, script);
        say(std::to_string(end.exit_code) + end.text);
    });
    auto await = [&](const char* name) {
        while (!fs::exists(folder + name + "0") || !fs::exists(folder + name + "1")) sleep_s(0.01);
    };
    await("/ready");
    kill(child.pid, SIGHUP);
    await("/saves");
    kill(child.pid, SIGTERM);
    EXPECT_EQ(end_child(std::move(child)).said, "129");
    for (const char* rank : {"/0", "/1"}) {
        ASSERT_TRUE(fs::exists(folder + rank));
        EXPECT_EQ(read_file(folder + rank), "saved\n");
    }
}

TEST(Gpus, RanksDieWithTheirParent) {
#ifndef __linux__
    GTEST_SKIP() << "only Linux tells a process of its parent's death";
#endif
    std::string folder = test_folder();
    Child child = start_child([&](const Say&) {
        run_script(2, "echo $$ >" + folder + "/$GPT2_RANK.tmp; mv " + folder + "/$GPT2_RANK.tmp " +
                          folder + "/$GPT2_RANK; exec sleep 15");
    });
    while (!fs::exists(folder + "/0") || !fs::exists(folder + "/1")) sleep_s(0.01);
    kill(child.pid, SIGKILL);
    // The pipe is the ranks' as well: its end is theirs.
    EXPECT_LT(end_child(std::move(child)).seconds, 5);
    for (const char* rank : {"/0", "/1"}) {
        std::string status = "R";  // whoever adopted it may not have fetched it yet
        for (int i = 0; i < 300 && status == "R"; i++, sleep_s(0.01)) {
            std::string pid = std::to_string(atoi(read_file(folder + rank).c_str()));
            std::ifstream stat("/proc/" + pid + "/stat");
            status.clear();
            stat >> status >> status >> status;
        }
        EXPECT_TRUE(status.empty() || status == "Z" || status == "X") << status;
    }
}

TEST(Gpus, RefusesWhatCannotBe) {
    expect_refused(error_of([&] { run_script(0, "exit 0"); }), "--gpus 0");
    expect_refused(error_of([&] { run_script(5000, "exit 0"); }), "--gpus 5000");
    char name[] = "x";
    char* argv[] = {name, nullptr};
    EXPECT_EQ(run_ranks(2, test_folder() + "/missing", argv, {0.05, 0.1}).exit_code, 1);
    EXPECT_FALSE(must_start_ranks({}, 0));
    EXPECT_FALSE(must_start_ranks({}, 1));
    EXPECT_TRUE(must_start_ranks({}, 2));
    EXPECT_FALSE(must_start_ranks(rank_of(0, 4), 4)) << "the copies see the option as well";
    EXPECT_FALSE(must_start_ranks(rank_of(0, 4), 0));
    for (int gpus : {0, 1, 2})  // all of a launcher's, such as the shell of `srun --pty`
        EXPECT_EQ(must_start_ranks(rank_of(0, 1), gpus), gpus == 2);
    expect_refused(error_of([&] { must_start_ranks(rank_of(0, 4), 2); }),
                   "--gpus 2: the test started 4 processes here already");
}

// ---- messages ----

TEST(RankMessages, ComeWholeWhateverThePartsAndAreRefusedWhenTheyAreNone) {
    RankPart part;
    part.sequence = 7, part.operation = 2, part.name = "a", part.payload = std::string("\0\n", 2);
    std::string frame = frame_of(RankMessage::part, body_of(part));
    for (size_t step = 1; step <= 2 * frame.size(); step++) {
        MessageReader reader;
        std::string twice = frame + frame;
        int count = 0;
        for (size_t at = 0; at < twice.size(); at += step) {
            reader.add(std::string_view(twice).substr(at, step));
            while (auto message = reader.next()) {
                RankPart again = read_body<RankPart>(message->body);
                EXPECT_EQ(body_of(again), body_of(part));
                count++;
            }
        }
        EXPECT_EQ(count, 2);
        EXPECT_TRUE(reader.empty());
    }
    std::string body = body_of(part);
    for (size_t length = 0; length < body.size(); length++)
        expect_refused(error_of([&] { read_body<RankPart>(body.substr(0, length)); }), "message");
    expect_refused(error_of([&] { read_body<RankPart>(body + "x"); }), "longer");
    part.operation = 5;
    expect_refused(error_of([&] { read_body<RankPart>(body_of(part)); }), "too large");
    // A list of more than there can be is not made room for.
    std::string list(8, '\377');
    expect_refused(error_of([&] { read_body<RankRoster>(list); }), "too long");
    auto first = [](const std::string& bytes, size_t allowed) {
        MessageReader reader;
        reader.allow(allowed);
        reader.add(bytes);
        return error_of([&] { reader.next(); });
    };
    EXPECT_EQ(first(std::string("\20\0\0", 3), 16), "");
    EXPECT_EQ(first(std::string("\20\0\0\0\1", 5), 16), "");
    expect_refused(first(std::string("\21\0\0\0", 4), 16), "too long");
    expect_refused(first(std::string("\1\0\0\0\0", 5), 16), "no known kind");
    expect_refused(first(std::string("\1\0\0\0\12", 5), 16), "no known kind");
    expect_refused(first("GET / HTTP/1.1\r\n", 1024), "too long");
}

// ---- the link ----

TEST(RankLink, WorksInWorldsOfOneToFive) {
    for (int world = 1; world <= 5; world++) {
        expect_all(run_job(world, meeting_at(free_port()), quick(), work_through), 0, "done");
        std::string file = test_folder() + "/meet";
        Meeting meeting = choose_meeting(rank_of(0, 2), "file:" + file);
        expect_all(run_job(world, meeting, quick(), work_through), 0, "done");
        EXPECT_FALSE(fs::exists(file)) << "it is removed once all have come";
    }
}

TEST(RankLink, WorksByNameAndByIPv6) {
    expect_all(run_job(3, meeting_at(free_port(), "localhost"), quick(), work_through), 0, "done");
    if (!listen_at(AF_INET6, true, 0)) GTEST_SKIP() << "no IPv6 here";
    expect_all(run_job(3, meeting_at(free_port(), "[::1]"), quick(), work_through), 0, "done");
}

TEST(RankLink, KnowsTheHostOfEveryRank) {
    auto outcomes =
        run_job(4, meeting_at(free_port()), quick(), [](RankLink& link, const Say& say) {
            for (int rank = 0; rank < 4; rank++) say(link.describe(rank) + "; ");
            link.finish();
        });
    expect_all(outcomes, 0, "rank 3 of 4, local 3, host hostb; ");
    expect_all(outcomes, 0, "rank 0 of 4, local 0, host hosta; ");
}

TEST(RankLink, CarriesUpToAMebibyte) {
    auto outcomes =
        run_job(3, meeting_at(free_port()), quick(), [](RankLink& link, const Say& say) {
            std::string most(kLongestPayload, char('a' + link.ranks().rank));
            if (link.broadcast("most", most) != std::string(kLongestPayload, 'a')) say("wrong;");
            size_t size = 0;
            for (const std::string& part : link.gather("most", most)) size += part.size();
            if (size != (link.ranks().rank == 0 ? 3 * kLongestPayload : 0)) say("wrong size;");
            std::string error = error_of([&] { link.gather("more", most + "x"); });
            if (error.find("gather more: 1048577 bytes") == std::string::npos) say(error);
            link.finish();
            say("done");
        });
    expect_all(outcomes, 0, "done");
    for (const Outcome& outcome : outcomes) EXPECT_EQ(outcome.said, "done");
}

TEST(RankLink, GathersMoreThanThatInPieces) {
    auto outcomes =
        run_job(3, meeting_at(free_port()), quick(), [](RankLink& link, const Say& say) {
            auto own = [](int rank) { return std::string(size_t(rank) * 5, char('a' + rank)); };
            for (size_t piece : {size_t(1), size_t(5), size_t(7), size_t(100)}) {
                std::vector<std::string> all =
                    gather_long(link, "all", own(link.ranks().rank), 0, piece);
                std::vector<std::string> expected = {own(0), own(1), own(2)};
                if (link.ranks().rank > 0) expected.clear();
                if (all != expected) say("wrong;");
            }
            std::string most(3 * kLongestPayload, char('a' + link.ranks().rank));
            std::vector<std::string> all = gather_long(link, "most", most);
            if (link.ranks().rank == 0 && all[2] != std::string(3 * kLongestPayload, 'c'))
                say("wrong;");
            link.finish();
            say("done");
        });
    expect_all(outcomes, 0, "done");
    for (const Outcome& outcome : outcomes) EXPECT_EQ(outcome.said, "done");
}

TEST(RankLink, NamesTheRankThatNeverComes) {
    Meeting meeting = meeting_at(free_port());
    std::vector<Child> children;
    for (int rank : {0, 1, 4})
        children.push_back(start_rank(rank, 5, meeting, quick(0.5), work_through));
    expect_all(end_all(std::move(children)), 1,
               "1 rank 2, rank 3 of 5 did not come within 0.5 s to rank 0 on hosta");
    children.clear();
    children.push_back(start_rank(1, 2, meeting, quick(0.3), work_through));
    std::vector<Outcome> outcomes = end_all(std::move(children));
    expect_all(outcomes, 1, "rank 1 of 2 on hosta could not reach rank 0 within 0.3 s");
    expect_all(outcomes, 1, "Connection refused");
    children.clear();
    children.push_back(
        start_rank(1, 2, meeting_at(5, "no-such-host.invalid"), quick(0.3), work_through));
    expect_all(end_all(std::move(children)), 1, "no-such-host.invalid: ");
}

TEST(RankLink, NoticesARankThatDiesWhileOthersCome) {
    Meeting meeting = meeting_at(free_port());
    std::vector<Child> children;
    children.push_back(start_rank(0, 3, meeting, quick(), work_through));
    Child dying = start_child([&](const Say&) {
        struct itimerval timer = {{0, 0}, {0, 300000}};
        setitimer(ITIMER_REAL, &timer, nullptr);
        LinkOptions options = quick();
        options.host = "hostx";
        RankLink link(rank_of(1, 3), meeting, options);
    });
    std::vector<Outcome> outcomes = end_all(std::move(children));
    EXPECT_EQ(end_child(std::move(dying)).status, 128 + SIGALRM);
    expect_all(outcomes, 1, "rank 1 of 3 on hostx ended while others had yet to come");
    EXPECT_LT(outcomes[0].seconds, 5);
}

TEST(RankLink, NoticesThatRank0Dies) {
    Meeting meeting = meeting_at(free_port());
    Child rank0 = start_child([&](const Say&) {
        struct itimerval timer = {{0, 0}, {0, 300000}};
        setitimer(ITIMER_REAL, &timer, nullptr);
        RankLink link(rank_of(0, 3), meeting, quick());
    });
    std::vector<Child> children;
    children.push_back(start_rank(1, 3, meeting, quick(), work_through));
    expect_all(end_all(std::move(children)), 1, "rank 0 of 3 ended while the ranks gathered");
    EXPECT_EQ(end_child(std::move(rank0)).status, 128 + SIGALRM);
}

TEST(RankLink, ADeathEndsAllAtOnceWhereverTheyAre) {
    for (int dying : {0, 1, 3})
        for (bool waiting : {false, true}) {
            auto outcomes =
                run_job(4, meeting_at(free_port()), quick(), [=](RankLink& link, const Say&) {
                    link.barrier("begin");
                    if (link.ranks().rank == dying) raise(SIGKILL);
                    if (waiting) link.barrier("end");
                    sleep_s(15);  // in a kernel, say
                });
            EXPECT_EQ(outcomes[size_t(dying)].status, 137);
            outcomes.erase(outcomes.begin() + dying);
            std::string line =
                format("rank %d of 4 on host%c ended without a word", dying, 'a' + dying / 2);
            for (const Outcome& outcome : outcomes) {
                EXPECT_EQ(outcome.status, 1) << all_that_was_said(outcomes);
                EXPECT_NE(outcome.said.find(line), std::string::npos)
                    << all_that_was_said(outcomes);
                EXPECT_LT(outcome.seconds, 5) << all_that_was_said(outcomes);
            }
        }
}

TEST(RankLink, LeavingWithoutAWordIsADeath) {
    auto outcomes = run_job(2, meeting_at(free_port()), quick(), [](RankLink& link, const Say&) {
        link.barrier("begin");
        if (link.ranks().rank == 0) link.barrier("end");
    });
    EXPECT_EQ(outcomes[1].status, 0);
    outcomes.pop_back();
    expect_all(outcomes, 1, "rank 1 of 2 on hosta ended without a word");
}

TEST(RankLink, TheFirstErrorIsWhatEveryRankEndsWith) {
    for (int first : {0, 2}) {
        auto outcomes =
            run_job(4, meeting_at(free_port()), quick(), [=](RankLink& link, const Say&) {
                link.barrier("begin");
                int rank = link.ranks().rank;
                if (rank == first) throw link.report_failure(2, "shard.bin: byte 8:\nbad");
                if (rank == 1) {  // which fails as well, since that one did
                    sleep_s(0.3);
                    throw link.report_failure(1, "NCCL: remote error");
                }
                if (rank == 3) {
                    for (uint64_t step = 0;; step++) link.alive(step), sleep_s(0.01);
                }
                sleep_s(15);
            });
        for (const Outcome& outcome : outcomes) {
            EXPECT_EQ(outcome.status, 2) << all_that_was_said(outcomes);
            EXPECT_NE(outcome.said.find(format("rank %d of 4 on host%c: shard.bin: byte 8: bad",
                                               first, 'a' + first / 2)),
                      std::string::npos)
                << all_that_was_said(outcomes);
            EXPECT_EQ(outcome.said.find("NCCL"), std::string::npos);
            EXPECT_LT(outcome.seconds, 4) << all_that_was_said(outcomes);
        }
    }
}

TEST(RankLink, NamesTheRankThatHangsNotThoseThatWaitForIt) {
    LinkOptions options = quick();
    options.timeout_s = 0.8, options.grace_s = 0.05;
    for (int hanging : {0, 2}) {
        auto outcomes =
            run_job(3, meeting_at(free_port()), options, [=](RankLink& link, const Say&) {
                link.alive(4);
                link.barrier("step 4");
                if (link.ranks().rank != hanging) link.alive(5);
                sleep_s(15);  // all of them: on their GPUs they wait for one another
            });
        for (const Outcome& outcome : outcomes) {
            EXPECT_EQ(outcome.status, 1) << all_that_was_said(outcomes);
            EXPECT_NE(
                outcome.said.find(format("train_gpt2cu: error: rank %d of 3 on host%c hangs: "
                                         "its work has not gone on for 0.8 s (it is at 4, the "
                                         "furthest rank at 5); a larger --timeout waits for "
                                         "longer\n",
                                         hanging, 'a' + hanging / 2)),
                std::string::npos)
                << all_that_was_said(outcomes);
        }
    }
}

TEST(RankLink, WhoStopsWorkingAfterARestHangs) {
    LinkOptions options = quick();
    options.timeout_s = 0.8, options.grace_s = 0.05;
    auto outcomes = run_job(2, meeting_at(free_port()), options, [](RankLink& link, const Say&) {
        link.alive(4);
        link.rest();
        link.at_work();
        if (link.ranks().rank == 1) sleep_s(15);
        link.barrier("the validation loss", 15);
    });
    for (const Outcome& outcome : outcomes) {
        EXPECT_EQ(outcome.status, 1) << all_that_was_said(outcomes);
        EXPECT_NE(outcome.said.find("rank 1 of 2 on hosta hangs: its work has not gone on for 0.8 "
                                    "s (it is at 4, the furthest rank at 4)"),
                  std::string::npos)
            << all_that_was_said(outcomes);
    }
}

TEST(RankLink, WhoRestsOrWaitsHereDoesNotHang) {
    LinkOptions options = quick();
    options.timeout_s = 0.4;
    auto outcomes =
        run_job(3, meeting_at(free_port()), options, [](RankLink& link, const Say& say) {
            link.alive(1);
            if (link.ranks().rank == 1) {
                link.rest();
                sleep_s(1.2);
            }
            link.barrier("a long save");
            link.finish();
            say("done");
        });
    expect_all(outcomes, 0, "done");
}

TEST(RankLink, NoticesAProcessThatIsStopped) {
    LinkOptions options = quick();
    options.timeout_s = 0.6;
    for (int stopped : {0, 1}) {
        Meeting meeting = meeting_at(free_port());
        std::vector<Child> children;
        for (int rank : {0, 1, 2})
            children.push_back(
                start_rank(rank, 3, meeting, options, [=](RankLink& link, const Say&) {
                    link.barrier("begin");
                    if (link.ranks().rank == stopped) raise(SIGSTOP);
                    link.barrier("end");  // which rank 0 may find complete, when it goes on
                    link.barrier("after");
                }));
        Child child = std::move(children[size_t(stopped)]);
        children.erase(children.begin() + stopped);
        expect_all(end_all(std::move(children)), 1,
                   format("rank %d of 3 on hosta has not been heard of for 0.6 s", stopped));
        kill(child.pid, SIGCONT);
        EXPECT_EQ(end_child(std::move(child)).status, 1) << "and ends as well, when it goes on";
    }
}

// As a scheduler suspends a job: for longer than a rank may be silent or hang, and not all
// processes go on at the same moment.
TEST(RankLink, AJobThatIsSuspendedGoesOn) {
    LinkOptions options = quick();
    options.timeout_s = 1.5;
    Meeting meeting = meeting_at(free_port());
    std::string folder = test_folder();
    std::vector<Child> children;
    for (int rank : {0, 1, 2})
        children.push_back(
            start_rank(rank, 3, meeting, options, [&](RankLink& link, const Say& say) {
                link.barrier("begin");
                link.alive(1);
                std::ofstream(folder + "/" + std::to_string(link.ranks().rank));
                while (!fs::exists(folder + "/go")) sleep_s(0.02);  // in a step
                link.alive(2);
                link.barrier("end");
                link.finish();
                say("done");
            }));
    auto ready = [&](int rank) { return fs::exists(folder + "/" + std::to_string(rank)); };
    for (int i = 0; i < 500 && !(ready(0) && ready(1) && ready(2)); i++) sleep_s(0.01);
    for (const Child& child : children) kill(child.pid, SIGSTOP);
    sleep_s(2.5);
    for (const Child& child : children) kill(child.pid, SIGCONT), sleep_s(0.2);
    sleep_s(0.4);
    std::ofstream(folder + "/go");
    expect_all(end_all(std::move(children)), 0, "done");
}

TEST(RankLink, NamesWhoDoesNotComeToAnOperation) {
    auto outcomes = run_job(3, meeting_at(free_port()), quick(), [](RankLink& link, const Say&) {
        if (link.ranks().rank == 2) sleep_s(15);
        link.barrier("the save", 0.3);
    });
    for (const Outcome& outcome : outcomes) {
        EXPECT_EQ(outcome.status, 1);
        EXPECT_NE(outcome.said.find("rank 2 (host hostb) did not come within 0.3 s to the barrier "
                                    "the save"),
                  std::string::npos)
            << all_that_was_said(outcomes);
    }
    // Rank 0 itself, and a limit that the slowest asked for.
    outcomes = run_job(3, meeting_at(free_port()), quick(), [](RankLink& link, const Say&) {
        if (link.ranks().rank == 0) sleep_s(15);
        link.barrier("the save", 0.3);
    });
    for (const Outcome& outcome : outcomes)
        EXPECT_NE(outcome.said.find("rank 0 (host hosta) did not come"), std::string::npos)
            << all_that_was_said(outcomes);
}

TEST(RankLink, RefusesWhatDiffersOnEveryRank) {
    auto differ = [](const std::function<std::vector<NamedText>(int)>& list) {
        return run_job(3, meeting_at(free_port()), quick(), [=](RankLink& link, const Say&) {
            link.all_equal("options", list(link.ranks().rank));
        });
    };
    expect_all(differ([](int rank) {
                   return std::vector<NamedText>{{"version", "v1"},
                                                 {"--batch-size", rank == 2 ? "4" : "8"}};
               }),
               2,
               "2 --batch-size differs: 8 on rank 0 of 3 on hosta, 4 on rank 2 of 3 on hostb: it "
               "must be the same on every rank");
    expect_all(differ([](int rank) {
                   return std::vector<NamedText>{{rank == 1 ? "--seed" : "--steps", "1"}};
               }),
               2, "rank 0 of 3 on hosta has --steps where rank 1 of 3 on hosta has --seed");
    expect_all(differ([](int rank) {
                   return std::vector<NamedText>(size_t(rank == 2), {"--seed", ""});
               }),
               2, "rank 0 of 3 on hosta has nothing where rank 2 of 3 on hostb has --seed");
}

TEST(RankLink, RefusesDifferentOperations) {
    expect_all(run_job(2, meeting_at(free_port()), quick(),
                       [](RankLink& link, const Say&) {
                           if (link.ranks().rank == 0) link.barrier("the save");
                           else link.gather("times", "");
                       }),
               1, "the barrier the save");
    expect_all(run_job(2, meeting_at(free_port()), quick(),
                       [](RankLink& link, const Say&) {
                           link.barrier(link.ranks().rank == 0 ? "step 1" : "step 2");
                       }),
               1, "step 2");
}

// ---- others at the door ----

TEST(RankLink, RefusesAnotherWorldAndASecondOfARank) {
    Meeting meeting = meeting_at(free_port());
    std::vector<Child> children;
    children.push_back(start_rank(0, 3, meeting, quick(), work_through));
    children.push_back(start_rank(1, 4, meeting, quick(), work_through));
    expect_all(end_all(std::move(children)), 2,
               "2 rank 1 on hosta is of 4 ranks, and rank 0 on hosta of 3");
    meeting = meeting_at(free_port());
    children.clear();
    for (int rank : {0, 1, 1})
        children.push_back(start_rank(rank, 3, meeting, quick(), work_through));
    std::vector<Outcome> outcomes = end_all(std::move(children));
    expect_all(outcomes, 2, "2 two processes are rank 1: one on hosta (process ");
}

TEST(RankLink, SaysThatThePortIsInUse) {
    Descriptor other = listen_at(AF_INET, true, 0);
    Meeting meeting = meeting_at(port_of(other.get()));
    std::vector<Child> children;
    children.push_back(start_rank(0, 2, meeting, quick(0.5), work_through));
    expect_all(end_all(std::move(children)), 1,
               format("port %d of %s is in use by another program: give another port",
                      meeting.ports[0], host_name().c_str()));
}

// Jobs whose names lead to the same ports, one of which another program holds.
TEST(RankLink, TwoJobsAtOnceDoNotMix) {
    Descriptor other = listen_at(AF_INET, true, 0);
    Meeting one = meeting_at(port_of(other.get()));
    for (int i = 0; i < 3; i++) one.ports.push_back(free_port());
    Meeting two = one;
    two.token++;
    std::string folder = test_folder();
    Ranks a = rank_of(0, 2), b = a;
    b.job = "another";
    Meeting three = choose_meeting(a, "file:" + folder), four = choose_meeting(b, "file:" + folder);
    EXPECT_NE(three.file, four.file);
    std::vector<Child> children;
    for (int rank = 2; rank >= 0; rank--)
        for (const Meeting& meeting : {one, two, three, four})
            children.push_back(start_rank(rank, 3, meeting, quick(), work_through));
    expect_all(end_all(std::move(children)), 0, "done");
}

TEST(RankLink, AnOldFileIsNotTakenForThisJobs) {
    Ranks r = rank_of(0, 2);
    const std::string token =
        format("%016llx", (unsigned long long)choose_meeting(r, "file:/x").token);
    int dead = free_port();
    Descriptor silent = listen_at(AF_INET, true, 0);  // took the port since
    const std::string kOld[] = {
        format(R"({"token":"%s","port":%d,"addresses":["127.0.0.1"]})", token.c_str(), dead),
        format(R"({"token":"0","port":%d,"addresses":["127.0.0.1"]})", port_of(silent.get())),
        format(R"({"token":"%s","port":"x","addresses":3})", token.c_str()),
        "[]",
        "{",
        "",
        "\1\2"};
    for (const std::string& old : kOld) {
        std::string file = test_folder() + "/meet";
        std::ofstream(file) << old;
        Meeting meeting = choose_meeting(r, "file:" + file);
        ASSERT_EQ(format("%016llx", (unsigned long long)meeting.token), token);
        std::vector<Child> children;
        children.push_back(start_rank(1, 2, meeting, quick(), work_through));
        sleep_s(0.1);
        children.push_back(start_rank(0, 2, meeting, quick(), work_through));
        expect_all(end_all(std::move(children)), 0, "done");
    }
    std::string file = test_folder() + "/meet";
    std::ofstream(file) << kOld[1];
    std::vector<Child> children;
    children.push_back(
        start_rank(1, 2, choose_meeting(r, "file:" + file), quick(0.3), work_through));
    expect_all(end_all(std::move(children)), 1, "is of another job");
}

TEST(RankLink, StrangersAreTurnedAwayAndDoNotHoldItUp) {
    Meeting meeting = meeting_at(free_port());
    std::vector<Child> children;
    children.push_back(start_rank(0, 3, meeting, quick(), work_through));
    RankHello hello;
    hello.token = meeting.token + 1, hello.rank = 1, hello.world = 3;
    std::string another = frame_of(RankMessage::hello, body_of(hello));
    hello.token = meeting.token, hello.protocol = 9;
    std::string version = frame_of(RankMessage::hello, body_of(hello));
    hello.protocol = kRankProtocol, hello.magic = 1;
    const std::string kRubbish[] = {"",
                                    "G",
                                    "GET / HTTP/1.1\r\n\r\n",
                                    std::string(100000, '\0'),
                                    std::string(5, '\377'),
                                    another,
                                    version,
                                    frame_of(RankMessage::hello, body_of(hello)),
                                    frame_of(RankMessage::hello, "short"),
                                    frame_of(RankMessage::part, body_of(RankPart{})),
                                    another.substr(0, 20)};
    std::vector<Descriptor> open;
    for (const std::string& rubbish : kRubbish) {
        std::string why;
        Descriptor fd;
        for (int i = 0; i < 500 && !fd; i++, sleep_s(0.01))
            fd = connect_to(resolve(meeting.host, meeting.ports[0], &why)[0], 1, &why);
        ASSERT_TRUE(fd) << why;
        ASSERT_GE(::send(fd.get(), rubbish.data(), rubbish.size(), MSG_NOSIGNAL), 0);
        open.push_back(std::move(fd));  // and says no more
    }
    for (int rank : {1, 2}) children.push_back(start_rank(rank, 3, meeting, quick(), work_through));
    expect_all(end_all(std::move(children)), 0, "done");
}

TEST(RankLink, WhatListensInRank0sPlaceIsNotBelieved) {
    // One that is silent, one that sends rubbish to whoever comes, one that sends back what it
    // hears, and one that welcomes everybody.
    Descriptor silent = listen_at(AF_INET, true, 0);
    int rubbish_port = 0, echo_port = 0, eager_port = 0;
    std::vector<Child> others;
    for (int* port : {&rubbish_port, &echo_port, &eager_port}) {
        Descriptor listener = listen_at(AF_INET, true, 0);
        *port = port_of(listener.get());
        bool echo = port == &echo_port, eager = port == &eager_port;
        others.push_back(start_child([&](const Say&) {
            for (;;) {
                if (!wait_for(listener.get(), POLLIN, 20)) return;
                Descriptor fd(accept(listener.get(), nullptr, nullptr));
                char bytes[1000];
                ssize_t count = recv(fd.get(), bytes, sizeof bytes, 0);
                std::string answer = echo ? std::string(bytes, size_t(std::max<ssize_t>(count, 0)))
                                          : "220 mail.example ESMTP\r\n";
                if (eager) answer = frame_of(RankMessage::welcome, body_of(RankWelcome{1}));
                ::send(fd.get(), answer.data(), answer.size(), MSG_NOSIGNAL);
            }
        }));
    }
    Meeting meeting = meeting_at(free_port());
    meeting.ports = {rubbish_port, echo_port, eager_port, port_of(silent.get()), meeting.ports[0]};
    expect_all(run_job(2, meeting, quick(), work_through), 0, "done");
    meeting.ports = {rubbish_port};
    std::vector<Child> children;
    children.push_back(start_rank(1, 2, meeting, quick(0.3), work_through));
    expect_all(end_all(std::move(children)), 1, "what listens there is not rank 0 of this job");
    for (Child& other : others) {
        kill(other.pid, SIGKILL);
        end_child(std::move(other));
    }
}

// ---- hosts ----

#ifdef __linux__
namespace {

int command(const std::string& text) { return system((text + " >/dev/null 2>&1").c_str()); }

// Two hosts, gpt2_PIDa and gpt2_PIDb, with a link between them.
struct TwoHosts {
    std::string a = format("gpt2_%da", int(getpid())), b = format("gpt2_%db", int(getpid()));
    bool there = false;
    TwoHosts() {
        auto in = [](const std::string& host, const std::string& text) {
            return command("ip -n " + host + " " + text) == 0;
        };
        there = command("ip netns add " + a) == 0 && command("ip netns add " + b) == 0 &&
                in(a, "link add v0 type veth peer name v0 netns " + b);
        for (const std::string& host : {a, b}) {
            std::string last = host == a ? "1" : "2";
            there = there && in(host, "address add 10.213.77." + last + "/24 dev v0") &&
                    in(host, "link set v0 up") && in(host, "link set lo up");
        }
    }
    ~TwoHosts() {
        for (const std::string& host : {a, b}) command("ip netns delete " + host);
    }
    void enter(const std::string& host) const {
        Descriptor fd(open(("/run/netns/" + host).c_str(), O_RDONLY | O_CLOEXEC));
        if (setns(fd.get(), CLONE_NEWNET) != 0) fail_machine("setns: %s", strerror(errno));
    }
};

Child start_on(const TwoHosts& hosts, int rank, const Meeting& meeting, const Work& work) {
    return start_child([&, rank](const Say& say) {
        hosts.enter(rank < 2 ? hosts.a : hosts.b);
        Ranks r = rank_of(rank, 4);
        r.local_rank = rank % 2, r.local_world = 2;
        LinkOptions options = quick();
        options.timeout_s = 1, options.host = rank < 2 ? "a" : "b";
        RankLink link(r, meeting, options);
        work(link, say);
    });
}

}  // namespace

TEST(RankLink, WorksOverHostsAndNoticesACutLink) {
    TwoHosts hosts;
    if (!hosts.there) GTEST_SKIP() << "network namespaces are not permitted here, or no ip";
    Ranks r = rank_of(0, 4);
    r.local_world = 2;
    for (const std::string& option : {std::string("10.213.77.1:5000"), "file:" + test_folder()}) {
        Meeting meeting = choose_meeting(r, option);
        std::vector<Child> children;
        for (int rank = 0; rank < 4; rank++)
            children.push_back(start_on(hosts, rank, meeting, work_through));
        expect_all(end_all(std::move(children)), 0, "done");
    }
    Meeting meeting = choose_meeting(r, "10.213.77.1:5001");
    std::string folder = test_folder();
    std::vector<Child> children;
    for (int rank = 0; rank < 4; rank++)
        children.push_back(start_on(hosts, rank, meeting, [&](RankLink& link, const Say&) {
            link.barrier("begin");
            std::ofstream(folder + "/" + std::to_string(link.ranks().rank));
            sleep_s(15);
        }));
    for (int i = 0; i < 500 && !fs::exists(folder + "/3"); i++) sleep_s(0.02);
    command("ip -n " + hosts.a + " link set v0 down");
    std::vector<Outcome> outcomes = end_all(std::move(children));
    for (int rank = 0; rank < 4; rank++) {
        EXPECT_EQ(outcomes[size_t(rank)].status, 1) << all_that_was_said(outcomes);
        EXPECT_LT(outcomes[size_t(rank)].seconds, 8) << all_that_was_said(outcomes);
        const char* who = rank < 2 ? "on b has not been heard of" : "rank 0 of 4 on a has not been";
        EXPECT_NE(outcomes[size_t(rank)].said.find(who), std::string::npos)
            << all_that_was_said(outcomes);
    }
    // Cut while they meet.
    children.clear();
    for (int rank : {0, 1, 2})
        children.push_back(start_child([&, rank](const Say&) {
            hosts.enter(rank < 2 ? hosts.a : hosts.b);
            Ranks own = r;
            own.rank = rank, own.local_rank = rank % 2, own.world = 3;
            LinkOptions options = quick(0.6);
            options.host = rank < 2 ? "a" : "b";
            RankLink link(own, meeting, options);
        }));
    outcomes = end_all(std::move(children));
    EXPECT_NE(outcomes[0].said.find("rank 2 of 3 did not come"), std::string::npos)
        << all_that_was_said(outcomes);
    EXPECT_EQ(outcomes[0].said, outcomes[1].said);
    EXPECT_NE(outcomes[2].said.find("could not reach rank 0 within 0.6 s (--rendezvous"),
              std::string::npos)
        << all_that_was_said(outcomes);
}
#endif
