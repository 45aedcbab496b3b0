// Proves that a run cannot be lost: starts the program many times with a fault at a chosen call,
// kills it at random moments, fills its disk, and sees each time that what is on the disk is whole
// and that the run goes on to the same bits. README.md says what is injected and what is asked.
//
//   run_faults PROGRAM [PART...] [--soak] [--seed N] [--jobs N] [--kills N] [--only TEXT]
//
// Parts: files, allocations, kills, signals, disks; all of them when none is named. The library
// faults.so is expected beside this program.
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>

#include <random>

#include "harness.h"

// ==== the runs ===================================================================================

// A model that takes a moment, with everything on that has a state: dropout, accumulation,
// evaluations. The rate is so high that some evaluations are better than the one before and some
// are not, so that best and last part.
static Words train_words(const Settings& settings, const Words& more) {
    Words words = {"train", "--data",       "text.txt", "--tokenizer",
                   "bytes", "--layers",     "1",        "--heads",
                   "1",     "--channels",   "8",        "--context",
                   "16",    "--batch-size", "2",        "--total-batch-tokens",
                   "64",    "--dropout",    "0.1",      "--threads",
                   "1",     "--schedule",   "constant", "--learning-rate",
                   "2",     "--keep",       "1",        "--sample-every",
                   "0",     "--out",        "run",      "--eval-batches",
                   "1"};
    if (settings.newer) words.insert(words.end(), {"--save-retry", "0"});
    words.insert(words.end(), {"--dtype", settings.dtype});
    words.insert(words.end(), more.begin(), more.end());
    return words;
}

static Words short_run(const Settings& settings) {
    return train_words(settings, {"--steps", "6", "--eval-every", "2", "--save-every", "3"});
}
static Words shorter_run(const Settings& settings) {
    return train_words(settings, {"--steps", "3", "--eval-every", "2", "--save-every", "2"});
}
static Words long_run(const Settings& settings, uint64_t seed) {
    return train_words(settings, {"--steps", "60", "--eval-every", "6", "--save-every", "4",
                                  "--seed", std::to_string(seed)});
}

static void write_text(const std::string& folder) {
    std::string text;
    for (int i = 0; i < 60; i++) text += "The cat sat on mat " + std::to_string(i * i) + ".\n";
    fs::create_directories(folder);
    write_file_atomic(folder + "/text.txt", text);
}

// Runs to the end without faults, and keeps the run folder as BASE/NAME.
static std::string make_reference(const Settings& settings, const std::string& name,
                                  const Words& words) {
    Place place(settings.folder + "/making_" + name);
    write_text(place.root());
    Outcome outcome = run_program(settings, place, words);
    if (outcome.code != 0)
        fail_machine("%s: without faults: %s: %s", name.c_str(), outcome.text().c_str(),
                     outcome.err.c_str());
    std::string kept = settings.folder + "/" + name;
    fs::rename(place.out(), kept);
    return kept;
}

// ==== a fault at every call ======================================================================

struct TracedCall {
    std::string kind, path;
};

struct Scenario {
    std::string name;
    Words words;
    std::string start, reference;
    int64_t start_step = -1;  // of the newest checkpoint in `start`
    std::vector<TracedCall> calls;
    uint64_t allocations = 0;
};

static std::vector<TracedCall> read_trace(const std::string& path) {
    std::vector<TracedCall> calls;
    std::istringstream lines(read_file(path));
    size_t number;
    for (TracedCall call;
         lines >> number >> call.kind && std::getline(lines >> std::ws, call.path);)
        calls.push_back(call);
    return calls;
}

// Counts the calls of the run, and sees that counting changes nothing.
static void count_calls(const Settings& settings, Scenario& scenario) {
    Place place(settings.folder + "/counting_" + scenario.name);
    place.fill(scenario.start);
    scenario.start_step = newest_step(place.out());
    Fault counting;
    counting.trace = place.path("trace");
    Outcome outcome = run_program(settings, place, scenario.words, &counting);
    std::string problem = compare_end(place.out(), scenario.reference);
    if (outcome.code != 0 || !problem.empty())
        fail_machine("%s, counted: %s: %s%s", scenario.name.c_str(), outcome.text().c_str(),
                     outcome.err.c_str(), problem.c_str());
    scenario.calls = read_trace(counting.trace);
    fs::remove_all(place.root());
    place.fill(scenario.start);
    Fault allocations;
    allocations.allocations = true;
    run_program(settings, place, scenario.words, &allocations);
    scenario.allocations = place.status().calls;
}

// From nothing.
static Scenario fresh_scenario(const Settings& settings, const std::string& name,
                               const Words& words) {
    Scenario scenario{name, words, settings.folder + "/start_" + name, {}, -1, {}, 0};
    write_text(scenario.start);
    scenario.reference = make_reference(settings, "reference_" + name, words);
    count_calls(settings, scenario);
    return scenario;
}

// From a run that died in its third save, just before the checkpoint got its name: there is an
// unfinished folder, and the log is ahead of the checkpoint.
static Scenario resumed_scenario(const Settings& settings, const Scenario& fresh) {
    size_t at = 0, renames = 0;
    for (size_t i = 0; i < fresh.calls.size() && at == 0; i++) {
        const std::string& path = fresh.calls[i].path;
        bool names_checkpoint = fresh.calls[i].kind == "rename" &&
                                step_of(fs::path(path).filename().string()).has_value();
        if (names_checkpoint && ++renames == 3) at = i + 1;
    }
    if (at == 0) fail_machine("the run does not save three times");
    Scenario scenario{
        "resumed", fresh.words, settings.folder + "/start_resumed", fresh.reference, -1, {}, 0};
    Place place(settings.folder + "/preparing");
    place.fill(fresh.start);
    Fault die{"die", at, false, ""};
    if (!run_program(settings, place, fresh.words, &die).killed())
        fail_machine("the run does not die at call %zu", at);
    fs::rename(place.root(), scenario.start);
    count_calls(settings, scenario);
    return scenario;
}

static bool is_among(const std::string& kind, const Words& kinds) {
    return std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
}

// One mode, the calls that it makes sense at, and every how manieth of them is tried in a short
// test. What a dead process leaves depends only on the calls that change something.
struct ModePlan {
    const char* mode;
    Words kinds;
    size_t every;
};

static std::vector<ModePlan> mode_plans() {
    const Words grows = {"create", "write", "rename", "mkdir", "link"};
    const Words changes = {"create", "write", "rename", "mkdir", "link", "unlink", "truncate"};
    Words durable = changes, room = grows;
    durable.push_back("sync");
    room.push_back("sync");
    return {
        {"die", changes, 3},
        {"die-half", {"write"}, 1},
        {"power", durable, 4},
        {"power-some", durable, 1},
        {"power-zeros", durable, 6},
        {"fail:EIO", durable, 4},
        {"fail:EIO", {"open", "read", "close", "map", "list", "stat", "lock"}, 12},
        {"fail:ENOSPC", room, 5},
        {"fail:EACCES", {"open", "create", "rename", "mkdir", "unlink"}, 12},
        {"fail:EINTR", {"open", "create", "read", "write", "sync", "lock"}, 12},
        {"fail:EMFILE", {"open", "create"}, 12},
        {"fail-from:ENOSPC", grows, 4},
        {"fail-from:EDQUOT", {"write"}, 4},
        {"fail-from:EROFS", changes, 8},
        {"fail-from:EIO", {"open", "create", "read", "write", "sync", "stat", "list"}, 16},
        {"short", {"read", "write"}, 4},
        {"short-fail:ENOSPC", {"write"}, 2},
    };
}

static std::vector<Fault> choose_faults(const Settings& settings, const Scenario& scenario) {
    std::mt19937_64 random(settings.seed);
    std::vector<Fault> faults;
    for (const ModePlan& plan : mode_plans()) {
        size_t every = settings.soak ? 1 : plan.every, next = random() % every;
        for (size_t i = 0; i < scenario.calls.size(); i++) {
            if (!is_among(scenario.calls[i].kind, plan.kinds) || next-- > 0) continue;
            next = every - 1;
            faults.push_back({plan.mode, i + 1, false, ""});
        }
        if (std::string(plan.mode).starts_with("power"))
            faults.push_back({plan.mode, 0, false, ""});
    }
    // Where the run folder is synced, names hang on it that were made by different parts of the
    // program: any of them may have become durable before the others.
    for (size_t i = 0; i < scenario.calls.size(); i++)
        for (int seed = 1; seed <= 6; seed++)
            if (scenario.calls[i].kind == "sync" && scenario.calls[i].path == "run")
                faults.push_back({format("power-some:%d", seed), i + 1, false, ""});
    std::erase_if(faults, [&](const Fault& fault) {
        return (scenario.name + ", " + fault.text()).find(settings.only) == std::string::npos;
    });
    return faults;
}

// Whether the program must end well in spite of the fault: reads and writes that do half are no
// errors, and a save that fails once is tried again.
static bool must_succeed(const Settings& settings, const Fault& fault, const FaultStatus& status) {
    if (status.injected == 0) return false;
    if (fault.mode == "short") return true;
    std::string kind = kFaultKindNames[status.kind], path = status.path;
    bool of_save = path.starts_with("run/step_") || path.starts_with("run/last") ||
                   path.starts_with("run/best");
    bool once = fault.mode.starts_with("fail:") || fault.mode.starts_with("short-fail:");
    return settings.newer && once && of_save &&
           is_among(kind, {"create", "write", "sync", "rename", "mkdir", "link", "unlink"});
}

// What a fault left, and what became of the run. "" when all is well.
static std::string try_fault(const Settings& settings, Place& place, const Scenario& scenario,
                             const Fault& fault, bool* injected, std::string* where) {
    place.fill(scenario.start);
    Outcome outcome = run_program(settings, place, scenario.words, &fault);
    FaultStatus& status = place.status();
    *injected = status.injected > 0;
    *where = format("%s %s", kFaultKindNames[status.kind], status.path);
    bool may_die = fault.mode.starts_with("die") || fault.mode.starts_with("power");
    std::string problem = judge_outcome(settings, outcome, may_die);
    if (problem.empty() && outcome.code != 0 && must_succeed(settings, fault, status))
        problem = "nothing that should end a run: " + outcome.err;
    if (!problem.empty()) return problem;
    int64_t completed = std::max(scenario.start_step, status.completed_step.load());
    problem = judge_folder(place.out(), completed);
    if (!problem.empty()) return problem + " [" + outcome.text() + "] " + outcome.err;
    if (outcome.code == 0 && !is_finished(place.out())) return "exit code 0, and not finished";
    problem = resume_and_compare(settings, place, scenario.words, scenario.reference);
    return problem.empty() ? "" : "after " + outcome.text() + ": " + problem + " " + outcome.err;
}

static void try_faults(const Settings& settings, Tally& tally, const Scenario& scenario,
                       const std::vector<Fault>& faults) {
    double begin_s = seconds();
    std::atomic<size_t> missed{0};
    in_parallel(faults.size(), settings.jobs, [&](size_t i, int worker) {
        const Fault& fault = faults[i];
        std::string what = scenario.name + ", " + fault.text(), where, problem;
        bool injected = false;
        Place place(format("%s/worker%d", settings.folder.c_str(), worker));
        try {
            problem = try_fault(settings, place, scenario, fault, &injected, &where);
        } catch (const std::exception& error) { problem = error.what(); }
        if (injected) tally.faults++, what += " (" + where + ")";
        else missed++;
        if (!problem.empty() && settings.verbose) {
            std::error_code ignored;
            fs::rename(place.base(), settings.folder + format("/failed_%zu", i), ignored);
        }
        tally.add(what, problem);
    });
    tally.say(format("%s: %zu faults, %zu of them at calls that were not reached, %.1f s",
                     scenario.name.c_str(), faults.size(), missed.load(), seconds() - begin_s));
}

static void say_calls(Tally& tally, const Scenario& scenario) {
    std::map<std::string, size_t> kinds;
    for (const TracedCall& call : scenario.calls) kinds[call.kind]++;
    std::string text;
    for (const auto& [kind, count] : kinds) text += format(" %zu %s", count, kind.c_str());
    tally.say(format("%s: %zu calls (%s ), %llu allocations", scenario.name.c_str(),
                     scenario.calls.size(), text.c_str() + 1,
                     static_cast<unsigned long long>(scenario.allocations)));
}

static void file_faults(const Settings& settings, Tally& tally) {
    Scenario fresh = fresh_scenario(settings, "fresh", short_run(settings));
    Scenario resumed = resumed_scenario(settings, fresh);
    for (const Scenario* scenario : {&fresh, &resumed}) {
        say_calls(tally, *scenario);
        try_faults(settings, tally, *scenario, choose_faults(settings, *scenario));
    }
}

// ==== every allocation ===========================================================================

static void allocation_faults(const Settings& settings, Tally& tally) {
    Scenario scenario = fresh_scenario(settings, "memory", shorter_run(settings));
    say_calls(tally, scenario);
    std::mt19937_64 random(settings.seed);
    size_t count = settings.allocations > 0 ? settings.allocations : 100;
    if (settings.soak && settings.allocations == 0) count = scenario.allocations;
    double every = std::max(1.0, double(scenario.allocations) / double(count));
    std::vector<Fault> faults;
    for (double at = every > 1 ? double(random() % uint64_t(every)) : 0;
         at < double(scenario.allocations); at += every) {
        bool stays = faults.size() % 4 == 3;  // none of those after it is granted either
        faults.push_back({stays ? "fail-from:ENOMEM" : "fail:ENOMEM", uint64_t(at) + 1, true, ""});
    }
    try_faults(settings, tally, scenario, faults);
}

// ==== kills ======================================================================================

// Delays every sync, so that a save takes a good part of the time.
static Fault slow_saves(unsigned us) { return {"delay:" + std::to_string(us), 0, false, ""}; }

struct Campaign {
    Words words;
    std::string reference;
    // How long the run takes with slow saves when it is left alone, and one of its saves.
    double whole_s, save_s;
};

static Campaign plan_campaign(const Settings& settings, int worker, uint64_t seed) {
    std::string name = format("reference_kills%d", worker);
    fs::remove_all(settings.folder + "/" + name);
    Campaign campaign{long_run(settings, seed), "", 0, 0};
    campaign.reference = make_reference(settings, name, campaign.words);
    Place place(format("%s/timing%d", settings.folder.c_str(), worker));
    write_text(place.root());
    Fault slow = slow_saves(500);
    double begin_s = seconds();
    Process process(settings, place, campaign.words, &slow);
    FaultStatus& status = place.status();
    size_t looks = 0, looks_in_saves = 0;
    auto look = [&] {
        looks++;
        if (status.saves_begun > status.saves_completed) looks_in_saves++;
        return false;
    };
    process.wait_for(look, 60);
    campaign.whole_s = seconds() - begin_s;
    double share = double(looks_in_saves) / double(std::max<size_t>(looks, 1));
    campaign.save_s = share * campaign.whole_s / double(std::max<uint64_t>(status.saves_begun, 1));
    return campaign;
}

// One kill: a third of them anywhere from the start of the process to the end of the run, the
// others inside a save. Returns false when the program had ended before.
static bool kill_once(const Settings& settings, Tally& tally, Place& place,
                      const Campaign& campaign, std::mt19937_64& random, int64_t* completed,
                      std::string* problem) {
    Fault slow = slow_saves(500);
    Process process(settings, place, campaign.words, &slow);
    FaultStatus& status = place.status();
    auto uniform = [&] { return double(random() >> 11) * 0x1p-53; };
    if (random() % 3 == 0) {
        sleep_seconds(uniform() * campaign.whole_s);
    } else {
        uint64_t save = 1 + random() % 3;
        process.wait_for([&] { return status.saves_begun >= save; }, 60);
        sleep_seconds(uniform() * campaign.save_s);
    }
    process.kill_now();
    Outcome outcome = process.finish();
    *completed = std::max(*completed, status.completed_step.load());
    if (!outcome.killed()) {
        *problem = judge_outcome(settings, outcome, false);
        return false;
    }
    tally.kills++;
    if (status.saves_begun > status.saves_completed) tally.kills_in_saves++;
    *problem = judge_folder(place.out(), *completed);
    return true;
}

static void kills(const Settings& settings, Tally& tally) {
    size_t wanted = settings.kills > 0 ? settings.kills : settings.soak ? 1000 : 200;
    size_t kills_a_run = std::min<size_t>(wanted, 20);
    size_t campaigns = (wanted + kills_a_run - 1) / kills_a_run;
    double begin_s = seconds();
    in_parallel(campaigns, settings.jobs, [&](size_t number, int worker) {
        std::mt19937_64 random(settings.seed * 1000003 + number);
        std::string what = format("kills, run %zu", number), problem;
        try {
            Campaign campaign = plan_campaign(settings, worker, settings.seed + number);
            for (size_t killed = 0; killed < kills_a_run && problem.empty();) {
                Place place(format("%s/worker%d", settings.folder.c_str(), worker));
                write_text(place.root());
                int64_t completed = -1;
                while (killed < kills_a_run && problem.empty() &&
                       kill_once(settings, tally, place, campaign, random, &completed, &problem))
                    tally.add(what + format(", kill %zu", ++killed), problem);
                if (problem.empty())
                    problem =
                        resume_and_compare(settings, place, campaign.words, campaign.reference);
            }
        } catch (const std::exception& error) { problem = error.what(); }
        tally.add(what, problem);
    });
    tally.say(format("kills: %zu runs, %.1f s", campaigns, seconds() - begin_s));
}

// ==== signals ====================================================================================

// A signal at a random moment: before the program listens it ends it, and later the run stops with
// 128 + the signal after a save. A second one ends it at once.
static std::string try_signal(const Settings& settings, Place& place, const Campaign& campaign,
                              std::mt19937_64& random, int signal, bool twice) {
    write_text(place.root());
    Fault slow = slow_saves(500);
    Outcome outcome;
    {
        Process process(settings, place, campaign.words, &slow);
        FaultStatus& status = place.status();
        sleep_seconds(double(random() % 1000) / 1000 * campaign.whole_s);
        uint64_t begun = status.saves_begun;
        process.send(signal);
        if (twice) {
            process.wait_for([&] { return status.saves_begun > begun; }, 10);
            sleep_seconds(double(random() % 1000) / 1000 * campaign.save_s);
            process.send(signal);
        }
        outcome = process.finish();
    }
    bool early = outcome.signal == signal;
    std::string problem = early ? "" : judge_outcome(settings, outcome, false);
    if (problem.empty() && !early && outcome.code != 0 && outcome.code != 128 + signal)
        problem = outcome.text() + " after signal " + std::to_string(signal);
    if (problem.empty()) problem = judge_folder(place.out(), place.status().completed_step);
    if (problem.empty() && outcome.code == 128 + signal && !twice && newest_step(place.out()) < 0)
        problem = "stopped without a save";
    if (problem.empty())
        problem = resume_and_compare(settings, place, campaign.words, campaign.reference);
    return problem;
}

// OUT/stop is there at a random moment after the first record: it acts as SIGTERM, and is removed.
static std::string try_stop_file(const Settings& settings, Place& place, const Campaign& campaign,
                                 std::mt19937_64& random) {
    write_text(place.root());
    Fault slow = slow_saves(500);
    Outcome outcome;
    {
        Process process(settings, place, campaign.words, &slow);
        FaultStatus& status = place.status();
        process.wait_for([&] { return status.saves_begun >= 1; }, 60);
        sleep_seconds(double(random() % 1000) / 1000 * campaign.whole_s / 2);
        write_file_atomic(place.out() + "/stop", "");
        outcome = process.finish();
    }
    std::string problem = judge_outcome(settings, outcome, false);
    if (problem.empty() && outcome.code != 0 && outcome.code != 128 + SIGTERM)
        problem = outcome.text() + " after OUT/stop";
    if (problem.empty() && outcome.code != 0 && path_exists(place.out() + "/stop"))
        problem = "OUT/stop was left";
    fs::remove(place.out() + "/stop");
    if (problem.empty()) problem = judge_folder(place.out(), place.status().completed_step);
    if (problem.empty())
        problem = resume_and_compare(settings, place, campaign.words, campaign.reference);
    return problem;
}

static void signals(const Settings& settings, Tally& tally) {
    std::vector<int> all = {SIGINT, SIGTERM, SIGHUP};
    if (settings.newer) all.push_back(SIGUSR1);
    Campaign campaign = plan_campaign(settings, 0, settings.seed);
    size_t each = settings.soak ? 60 : 6;
    double begin_s = seconds();
    size_t stops = settings.newer ? each : 0, count = all.size() * each + stops;
    in_parallel(count, settings.jobs, [&](size_t i, int worker) {
        std::mt19937_64 random(settings.seed * 7919 + i);
        Place place(format("%s/worker%d", settings.folder.c_str(), worker));
        std::string what, problem;
        try {
            if (i < all.size() * each) {
                int signal = all[i % all.size()];
                bool twice = i / all.size() % 3 == 2;
                what = format("signal %d%s, number %zu", signal, twice ? " twice" : "", i);
                problem = try_signal(settings, place, campaign, random, signal, twice);
            } else {
                what = format("OUT/stop, number %zu", i);
                problem = try_stop_file(settings, place, campaign, random);
            }
        } catch (const std::exception& error) { problem = error.what(); }
        tally.add(what, problem);
    });
    if (!settings.newer) tally.skip("OUT/stop: the program does not know it");
    tally.say(format("signals: %zu, %.1f s", count, seconds() - begin_s));
}

// ==== disks ======================================================================================

// In a mount namespace of our own nothing outside is touched, and what is mounted goes with us.
static bool own_mounts() {
    return unshare(CLONE_NEWNS) == 0 &&
           mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0;
}

static bool mount_small(const std::string& folder, size_t kib, bool again) {
    std::string size = format("size=%zuk", kib);
    return mount("faults", folder.c_str(), "tmpfs", again ? MS_REMOUNT : 0, size.c_str()) == 0;
}

// The disk is full, at a place that its size decides; then it has room, and the run goes on. With
// `again` the room comes while the program is still trying.
static std::string try_full_disk(const Settings& settings, Place& place, const Campaign& campaign,
                                 size_t kib, bool again) {
    if (!mount_small(place.root(), kib, false)) return "cannot mount";
    struct Mounted {
        std::string folder;
        ~Mounted() { umount2(folder.c_str(), MNT_DETACH); }
    } mounted{place.root()};
    write_text(place.root());
    Fault slow = slow_saves(500);
    Outcome outcome;
    {
        Process process(settings, place, campaign.words, &slow);
        if (again) {
            sleep_seconds(campaign.whole_s / 2);
            mount_small(place.root(), 4096, true);
        }
        outcome = process.finish();
    }
    std::string problem = judge_outcome(settings, outcome, false);
    if (problem.empty() && outcome.code != 0 && outcome.code != 1) problem = outcome.text();
    if (problem.empty()) problem = judge_folder(place.out(), place.status().completed_step);
    mount_small(place.root(), 4096, true);
    if (problem.empty())
        problem = resume_and_compare(settings, place, campaign.words, campaign.reference);
    return problem.empty() ? "" : problem + " [after " + outcome.text() + "] " + outcome.err;
}

// A file of the program may have no more than so many bytes: where nothing can be mounted.
static std::string try_small_files(const Settings& settings, Place& place, const Campaign& campaign,
                                   size_t kib) {
    write_text(place.root());
    Fault counting;
    struct rlimit before, limit;
    getrlimit(RLIMIT_FSIZE, &before);
    Outcome outcome;
    {
        Process process(settings, place, campaign.words, &counting);
        limit = {kib << 10, before.rlim_max};
        prlimit(process.id(), RLIMIT_FSIZE, &limit, nullptr);
        outcome = process.finish();
    }
    std::string problem = judge_outcome(settings, outcome, false);
    if (problem.empty()) problem = judge_folder(place.out(), place.status().completed_step);
    if (problem.empty())
        problem = resume_and_compare(settings, place, campaign.words, campaign.reference);
    return problem;
}

static void full_disks(const Settings& settings, Tally& tally, const Campaign& campaign) {
    for (size_t kib = 4; kib <= 44; kib += settings.soak ? 1 : 8) {
        Place place(settings.folder + "/worker0");
        tally.add(format("files of at most %zu KiB", kib),
                  try_small_files(settings, place, campaign, kib));
    }
    if (!own_mounts()) {
        tally.skip("a full disk: a file system cannot be mounted here (not root?)");
        return;
    }
    for (size_t kib = 12; kib <= 240; kib += settings.soak ? 4 : 16) {
        Place place(settings.folder + "/worker0");
        bool again = kib / 4 % 8 == 7;
        tally.add(format("a disk of %zu KiB%s", kib, again ? ", that grows" : ""),
                  try_full_disk(settings, place, campaign, kib, again));
    }
}

// The run folder may not be written any more, from a moment after the first save on. Root may write
// everywhere, so there the program runs as nobody.
static void read_only_folder(const Settings& settings, Tally& tally, const Campaign& campaign) {
    uid_t user = getuid() == 0 ? 65534 : 0;
    Place place(settings.folder + "/worker0");
    write_text(place.root());
    fs::permissions(place.root(), fs::perms::all);
    fs::permissions(place.base(), fs::perms::all);
    if (user != 0) {
        Outcome outcome = Process(settings, place, {"--help"}, nullptr, user).finish();
        if (outcome.code != 0) {
            tally.skip("a read-only folder: the program cannot be started as another user");
            return;
        }
    }
    Fault slow = slow_saves(500);
    Process process(settings, place, campaign.words, &slow, user);
    FaultStatus& status = place.status();
    process.wait_for([&] { return status.saves_completed >= 1; }, 60);
    std::error_code error;
    fs::permissions(place.out(), fs::perms(0555), error);
    Outcome outcome = process.finish();
    std::string problem = judge_outcome(settings, outcome, false);
    if (problem.empty() && outcome.code != 1) problem = outcome.text();
    if (problem.empty()) problem = judge_folder(place.out(), status.completed_step);
    fs::permissions(place.out(), fs::perms(0755));
    if (problem.empty()) {
        outcome = Process(settings, place, campaign.words, nullptr, user).finish();
        if (outcome.code != 0) problem = "going on: " + outcome.text() + ": " + outcome.err;
    }
    if (problem.empty()) problem = compare_end(place.out(), campaign.reference);
    tally.add("a folder that becomes read-only", problem);
}

// The run folder goes away under the program: nothing can save that run, and it must end, or make
// its folder anew; the same command then does what it says.
static void removed_folder(const Settings& settings, Tally& tally, const Campaign& campaign) {
    Place place(settings.folder + "/worker0");
    write_text(place.root());
    Fault slow = slow_saves(500);
    Process process(settings, place, campaign.words, &slow);
    FaultStatus& status = place.status();
    process.wait_for([&] { return status.saves_completed >= 2; }, 60);
    std::error_code error;
    for (int i = 0; i < 100; i++) {
        fs::remove_all(place.out(), error);
        if (!error) break;
    }
    Outcome outcome = process.finish();
    std::string problem = judge_outcome(settings, outcome, false);
    if (problem.empty()) problem = judge_folder(place.out(), -1);
    if (problem.empty() && !is_finished(place.out())) {
        outcome = run_program(settings, place, campaign.words);
        if (outcome.code != 0) problem = "going on: " + outcome.text() + ": " + outcome.err;
    }
    if (problem.empty()) problem = compare_end(place.out(), campaign.reference, false);
    tally.add("a folder that is removed under the run", problem);
}

// The run folder gets another name: what it held is whole, and goes on under the new one.
static void renamed_folder(const Settings& settings, Tally& tally, const Campaign& campaign) {
    Place place(settings.folder + "/worker0");
    write_text(place.root());
    Fault slow = slow_saves(500);
    Process process(settings, place, campaign.words, &slow);
    FaultStatus& status = place.status();
    process.wait_for([&] { return status.saves_completed >= 2; }, 60);
    int64_t completed = status.completed_step;
    std::string moved = place.root() + "/moved";
    fs::rename(place.out(), moved);
    Outcome outcome = process.finish();
    std::string problem = judge_outcome(settings, outcome, false);
    if (problem.empty()) problem = judge_folder(moved, completed);
    if (problem.empty()) problem = judge_folder(place.out(), -1);
    if (problem.empty() && !is_finished(moved)) {
        Words words = campaign.words;
        *(std::find(words.begin(), words.end(), "--out") + 1) = "moved";
        outcome = run_program(settings, place, words);
        if (outcome.code != 0) problem = "going on: " + outcome.text() + ": " + outcome.err;
    }
    if (problem.empty()) problem = compare_end(moved, campaign.reference);
    tally.add("a folder that is renamed under the run", problem);
}

static void disks(const Settings& settings, Tally& tally) {
    double begin_s = seconds();
    Campaign campaign = plan_campaign(settings, 0, settings.seed);
    read_only_folder(settings, tally, campaign);
    removed_folder(settings, tally, campaign);
    renamed_folder(settings, tally, campaign);
    full_disks(settings, tally, campaign);
    tally.say(format("disks: %.1f s", seconds() - begin_s));
}

// ==== main =======================================================================================

struct Part {
    const char* name;
    void (*run)(const Settings&, Tally&);
};
// The last one changes what is mounted.
static const Part kParts[] = {{"files", file_faults},
                              {"allocations", allocation_faults},
                              {"kills", kills},
                              {"signals", signals},
                              {"disks", disks}};

static Words read_words(int argc, char** argv, Settings& settings) {
    Words parts;
    for (int i = 1; i < argc; i++) {
        std::string word = argv[i];
        auto value = [&] { return std::string(++i < argc ? argv[i] : ""); };
        if (word == "--soak") settings.soak = true;
        else if (word == "--verbose") settings.verbose = true;
        else if (word == "--seed") settings.seed = strtoull(value().c_str(), nullptr, 10);
        else if (word == "--jobs") settings.jobs = atoi(value().c_str());
        else if (word == "--kills") settings.kills = size_t(atoi(value().c_str()));
        else if (word == "--allocations") settings.allocations = size_t(atoi(value().c_str()));
        else if (word == "--dtype") settings.dtype = value();
        else if (word == "--only") settings.only = value();
        else if (settings.program.empty()) settings.program = fs::absolute(word).string();
        else parts.push_back(word);
    }
    return parts;
}

// In memory where that can be had: a fault costs no time of a disk's, and none of its life.
static std::string choose_folder() {
    const char* given = getenv("FAULTS_FOLDER");
    std::string base = given != nullptr                ? given
                       : access("/dev/shm", W_OK) == 0 ? "/dev/shm"
                                                       : fs::temp_directory_path().string();
    return base + format("/gpt2_faults_%d", int(getpid()));
}

static void prepare(Settings& settings, char** argv) {
    settings.library = fs::absolute(fs::path(argv[0]).parent_path() / "faults.so").string();
    settings.folder = choose_folder();
    fs::create_directories(settings.folder);
    Place place(settings.folder + "/asking");
    Outcome outcome = run_program(settings, place, {"train", "--help"});
    if (outcome.code != 0) fail_machine("%s: does not start", settings.program.c_str());
    settings.newer = outcome.out.find("--save-retry") != std::string::npos;
    outcome = run_program(settings, place, {"no-such-command"});
    settings.name = outcome.err.substr(0, outcome.err.find(':'));
}

int main(int argc, char** argv) {
    setenv("GOMP_SPINCOUNT", "3000", 0);  // without it the program starts itself once more
    Settings settings;
    Words parts = read_words(argc, argv, settings);
    if (settings.program.empty()) {
        fprintf(stderr, "usage: run_faults PROGRAM [PART...]\n");
        return 2;
    }
    Tally tally;
    try {
        prepare(settings, argv);
        for (const Part& part : kParts)
            if (parts.empty() || is_among(part.name, parts)) part.run(settings, tally);
    } catch (const std::exception& error) { tally.add("the harness", error.what()); }
    if (!settings.verbose) fs::remove_all(settings.folder);
    return tally.finish();
}
