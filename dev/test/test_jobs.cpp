// Several ranks that train one model: that they come to what one rank comes to, from whatever
// starts them, that a run goes on with any number of them, and that none is left when one is lost.
// The processes are real; between them are the emulator's NCCL and the program's own link.

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "../../commands.h"
#include "calls.h"

namespace {

using Variables = std::vector<std::pair<std::string, std::string>>;

// Variables of the environment, while it lives.
class Surroundings {
  public:
    explicit Surroundings(const Variables& variables) : variables_(variables) {
        for (const auto& [name, value] : variables_) setenv(name.c_str(), value.c_str(), 1);
    }
    ~Surroundings() {
        for (const auto& variable : variables_) unsetenv(variable.first.c_str());
    }

  private:
    Variables variables_;
};

// The variables of a rank that mpirun would start.
Variables own_variables(int rank, int world) {
    return {{"OMPI_COMM_WORLD_RANK", std::to_string(rank)},
            {"OMPI_COMM_WORLD_SIZE", std::to_string(world)},
            {"OMPI_COMM_WORLD_LOCAL_RANK", std::to_string(rank)},
            {"OMPI_COMM_WORLD_LOCAL_SIZE", std::to_string(world)}};
}

class Jobs : public Cli {
  protected:
    void SetUp() override {
        Cli::SetUp();
        if (!gpt2_alone().empty()) GTEST_SKIP() << gpt2_alone();
        setenv("EMU_DEVICES", "4", 1);
    }
    void TearDown() override { unsetenv("EMU_DEVICES"); }

    // A step of 12 sequences, whoever takes them.
    static std::vector<std::string> job(int ranks, const std::string& out, int steps,
                                        const std::vector<std::string>& more = {}) {
        std::vector<std::string> words = {
            "train",    "--data",       "text.txt", "--layers",     "2",  "--heads",
            "2",        "--channels",   "16",       "--context",    "16", "--total-batch-tokens",
            "192",      "--threads",    "1",        "--dtype",      "",   "--schedule",
            "constant", "--eval-every", "3",        "--save-every", "2",  "--sample-every",
            "0",        "--dropout",    "0.1",      "--batch-size", "",   "--out",
            out,        "--steps",      ""};
        words[16] = dtype_name(test_dtype());
        words[28] = std::to_string(ranks == 1 ? 12 : ranks == 2 ? 6 : 1);
        words[32] = std::to_string(steps);
        words.insert(words.end(), more.begin(), more.end());
        return words;
    }
    static std::vector<std::string> gpus(int ranks, const std::string& out, int steps,
                                         std::vector<std::string> more = {}) {
        if (ranks > 1) more.insert(more.end(), {"--gpus", std::to_string(ranks)});
        return job(ranks, out, steps, more);
    }

    // A rank that a launcher would start, with its words and variables, in a folder of its own for
    // what it says.
    struct Rank {
        Call call;
        pid_t process = 0;
    };
    Rank start_rank(int rank, const std::vector<std::string>& words,
                    const Variables& variables) const {
        std::string folder = path(format("rank%d", rank));
        fs::create_directories(folder);
        fs::copy(path("text.txt"), folder + "/text.txt", fs::copy_options::overwrite_existing);
        Surroundings surroundings(variables);
        Rank started{Call{folder, words}};
        started.process = started.call.start();
        return started;
    }

    static Outcome end_of(const Rank& rank) { return rank.call.finish(rank.process); }

    // The losses of two runs, of training and where both have them of validation, differ by less
    // than `bound` of them.
    void expect_close(const std::string& first, const std::string& second, double bound) const {
        auto a = losses_by_step(path(first)), b = losses_by_step(path(second));
        ASSERT_EQ(a.size(), b.size());
        ASSERT_FALSE(a.empty());
        for (const auto& [step, losses] : a) {
            auto compare = [&, step = step](const json& x, const json& y) {
                if (!x.is_number() || !y.is_number()) return;
                double difference = std::abs(x.get<double>() - y.get<double>());
                EXPECT_FALSE(!(difference <= bound * x.get<double>()))
                    << "step " << step << ": " << x << " and " << y;
            };
            ASSERT_TRUE(losses.first.is_number() && b[step].first.is_number()) << "step " << step;
            compare(losses.first, b[step].first);
            compare(losses.second, b[step].second);
        }
    }

    // What rounding makes of another order of summing, in eight steps: a few units of the last
    // place in float32; in bf16 a parameter may round to its neighbour.
    static double rounding() { return test_dtype() == Dtype::bf16 ? 2e-4 : 1e-6; }

    void wait_for_step(const std::string& out, size_t step) const {
        for (int i = 0; i < 6000; i++) {
            std::error_code ignored;
            if (fs::exists(path(out + "/log.jsonl"), ignored)) {
                auto losses = losses_by_step(path(out));
                if (!losses.empty() && losses.rbegin()->first >= step) return;
            }
            usleep(5000);
        }
        ADD_FAILURE() << out << " does not come to step " << step;
    }

    // The processes of a job, by the folder that they train into, without the one that waits.
    static std::vector<pid_t> ranks_of(pid_t parent) {
        std::vector<pid_t> found;
        for (const auto& entry : fs::directory_iterator("/proc")) {
            std::string name = entry.path().filename().string();
            if (name.find_first_not_of("0123456789") != std::string::npos) continue;
            std::ifstream file(entry.path() / "stat");
            std::string text((std::istreambuf_iterator<char>(file)), {});
            size_t behind = text.rfind(") ");
            int its_parent = 0;
            if (behind != std::string::npos &&
                sscanf(text.c_str() + behind, ") %*c %d", &its_parent) == 1 && its_parent == parent)
                found.push_back(std::stoi(name));
        }
        std::sort(found.begin(), found.end());
        return found;
    }
};

TEST_F(Jobs, AnyNumberOfRanksTrainsTheSame) {
    Outcome one = call(gpus(1, "one", 8));
    ASSERT_EQ(one.code, 0) << one.err;
    for (int ranks : {2, 3, 4}) {
        std::string out = format("ranks%d", ranks);
        Outcome many = call(gpus(ranks, out, 8));
        ASSERT_EQ(many.code, 0) << many.err;
        EXPECT_EQ(many.err, "");
        expect_close("one", out, rounding());
        EXPECT_EQ(verify_checkpoint(path(out + "/last"))["step"], 8);
    }
}

TEST_F(Jobs, TheSameCommandGivesTheSameBits) {
    ASSERT_EQ(call(gpus(3, "first", 5)).code, 0);
    ASSERT_EQ(call(gpus(3, "second", 5)).code, 0);
    EXPECT_EQ(losses_by_step(path("first")), losses_by_step(path("second")));
    EXPECT_EQ(verify_checkpoint(path("first/last"))["files"]["model.safetensors"],
              verify_checkpoint(path("second/last"))["files"]["model.safetensors"]);
}

// Targets that do not count are not the same number on every rank.
TEST_F(Jobs, TargetsAreCountedOverAllRanks) {
    call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "260", "--out", "tok"});
    std::vector<std::string> more = {"--separate-documents", "--tokenizer", "tok"};
    std::string documents;
    for (int i = 0; i < 40; i++)
        documents += json({{"text", "cat " + std::string(size_t(i % 5) * 9, 'a')}}).dump() + "\n";
    write("text.jsonl", documents);
    auto words = [&](int ranks, const std::string& out) {
        std::vector<std::string> all = gpus(ranks, out, 4, more);
        all[2] = "text.jsonl";
        return all;
    };
    Outcome one = call(words(1, "one"));
    ASSERT_EQ(one.code, 0) << one.err;
    Outcome two = call(words(2, "two"));
    ASSERT_EQ(two.code, 0) << two.err;
    expect_close("one", "two", rounding());
}

TEST_F(Jobs, ARunGoesOnWithAnotherNumberOfRanks) {
    ASSERT_EQ(call(gpus(1, "whole", 8)).code, 0);
    int steps = 0;
    for (int ranks : {4, 2, 1}) {
        Outcome part = call(gpus(ranks, "parts", steps += 2));
        ASSERT_EQ(part.code, 0) << part.err;
    }
    const char* other = getenv("GPT2_OTHER_BINARY");
    if (other != nullptr && test_dtype() == Dtype::fp32) {
        std::string own = binary();
        setenv("GPT2_BINARY", other, 1);
        Outcome part = call(gpus(1, "parts", 8));
        setenv("GPT2_BINARY", own.c_str(), 1);
        ASSERT_EQ(part.code, 0) << part.err;
    } else {
        ASSERT_EQ(call(gpus(3, "parts", 8)).code, 0);
    }
    // (The programs themselves differ by float32's rounding.)
    expect_close("whole", "parts", std::max(rounding(), 1e-5));
}

// ---- sharded ----

// The parameters and moments of a checkpoint, in one file or in parts.
std::vector<std::vector<real>> states_of(const std::string& folder) {
    GPT2Shape shape = test_shape(1, 1, true);
    shape.dtype = Dtype::fp32;
    GPT2Ptr model(gpt2_create(read_config(folder), shape));
    load_checkpoint(model.get(), folder);
    ParameterTable table = parameter_table(gpt2_config(model.get()));
    std::vector<std::vector<real>> states;
    for (Group group : kSnapshotGroups)
        for (int row = 0; row < kParameterRows; row++)
            for (int layer = 0; table[size_t(row)].present && layer < int(table[size_t(row)].count);
                 layer++) {
                states.emplace_back(table[size_t(row)].file_size());
                gpt2_copy_out(model.get(), group, row, layer, states.back().data());
            }
    return states;
}

// Two runs end with the same parameters and moments, to the bit.
void expect_same_states(const std::string& first, const std::string& second) {
    EXPECT_TRUE(states_of(first) == states_of(second)) << first << " and " << second;
}

// Sharded states are updated from the same sums, where those are made in the same order. Parts that
// were sent too early, or read before they came, or summed twice would be others: what a collective
// has not yet written is no number here.
TEST_F(Jobs, TheShardedUpdateWaitsForTheGradientsAndForwardForTheUpdate) {
    Surroundings surroundings(Variables{{"EMU_NCCL_ORDER", "plain"}});
    for (int ranks : {2, 3, 4}) {
        std::string whole = format("whole%d", ranks), parts = format("parts%d", ranks);
        ASSERT_EQ(call(gpus(ranks, whole, 5, {"--zero", "0"})).code, 0);
        Outcome sharded = call(gpus(ranks, parts, 5, {"--zero", "1"}));
        ASSERT_EQ(sharded.code, 0) << sharded.err;
        EXPECT_NE(sharded.out.find(format("optimizer states sharded over %d ranks", ranks)),
                  std::string::npos);
        EXPECT_EQ(losses_by_step(path(parts)), losses_by_step(path(whole)));
        expect_same_states(path(whole + "/last"), path(parts + "/last"));
    }
}

// Sharded gradients are summed over ranks before they are over micro-batches.
TEST_F(Jobs, ShardedGradientsTrainTheSame) {
    ASSERT_EQ(call(gpus(1, "one", 8)).code, 0);
    for (int ranks : {1, 2, 3, 4}) {
        std::string out = format("ranks%d", ranks);
        Outcome many = call(gpus(ranks, out, 8, {"--zero", "2"}));
        ASSERT_EQ(many.code, 0) << many.err;
        EXPECT_EQ(many.err, "");
        expect_close("one", out, rounding());
    }
}

// Every rank saves what it holds, in the one folder of the checkpoint.
TEST_F(Jobs, EveryRankSavesItsPart) {
    ASSERT_EQ(call(gpus(3, "run", 4, {"--zero", "1"})).code, 0);
    json files = verify_checkpoint(path("run/last"))["files"];
    double all = double(2 * sizeof(real) * count_parameters(read_config(path("run/last"))));
    for (int rank = 0; rank < 3; rank++)  // with a header of some kilobytes
        EXPECT_LT(files.at(moments_file(rank, 3))["bytes"].get<double>(), all / 3 + 12e3);
    EXPECT_EQ(files.count("optimizer.safetensors") + files.count("attempt"), 0u) << files;
    ASSERT_EQ(call(gpus(3, "at_once", 4, {"--zero", "1", "--background-save", "off"})).code, 0);
    expect_same_states(path("run/last"), path("at_once/last"));
}

// Ranks that do not see rank 0's folder give it what they hold.
TEST_F(Jobs, RankZeroSavesForRanksThatDoNotSeeItsFolder) {
    ASSERT_EQ(call(gpus(2, "known", 4, {"--zero", "1"})).code, 0);
    for (int steps : {2, 4}) {
        std::vector<Rank> ranks;
        for (int rank : {0, 1})
            ranks.push_back(start_rank(rank,
                                       job(2, "run", steps,
                                           {"--zero", "1", "--timeout", "20", "--rendezvous",
                                            "file:" + path(format("meet%d", steps))}),
                                       own_variables(rank, 2)));
        Outcome first = end_of(ranks[0]);
        ASSERT_EQ(first.code, 0) << first.err;
        EXPECT_EQ(end_of(ranks[1]).code, 0);
        EXPECT_NE(first.out.find("not all ranks see run"), std::string::npos) << first.out;
    }
    EXPECT_FALSE(fs::exists(path("rank1/run")));
    EXPECT_TRUE(fs::exists(path("rank0/run/last/optimizer.safetensors")));
    expect_same_states(path("known/last"), path("rank0/run/last"));
}

// A checkpoint is whole, whoever held what.
TEST_F(Jobs, ARunGoesOnWithOtherShards) {
    ASSERT_EQ(call(gpus(1, "whole", 12)).code, 0);
    const std::vector<std::pair<int, const char*>> parts = {{4, "2"}, {2, "1"}, {3, "0"},
                                                            {2, "2"}, {1, "0"}, {2, "1"}};
    int steps = 0;
    for (const auto& [ranks, zero] : parts) {
        Outcome part = call(gpus(ranks, "parts", steps += 2, {"--zero", zero}));
        ASSERT_EQ(part.code, 0) << part.err;
    }
    expect_close("whole", "parts", rounding());
    if (const char* other = getenv("GPT2_OTHER_BINARY")) {  // the CPU program, from parts
        std::string own = binary();
        setenv("GPT2_BINARY", other, 1);
        Outcome part = call(gpus(1, "parts", 14));
        setenv("GPT2_BINARY", own.c_str(), 1);
        ASSERT_EQ(part.code, 0) << part.err;
        EXPECT_EQ(verify_checkpoint(path("parts/last"))["step"], 14);
    }
    // Saved in the foreground, and by a run that a signal stops.
    Outcome saved = call(gpus(2, "front", 4, {"--zero", "1", "--background-save", "off"}));
    ASSERT_EQ(saved.code, 0) << saved.err;
    Call job{folder_, gpus(2, "stopped", 1000000, {"--zero", "2"})};
    pid_t parent = job.start();
    wait_for_step("stopped", 3);
    ::kill(parent, SIGTERM);
    EXPECT_EQ(job.finish(parent).code, 143);
    EXPECT_EQ(verify_checkpoint(path("stopped/last"))["step"],
              losses_by_step(path("stopped")).rbegin()->first);
}

// Going back to a checkpoint gives every rank its parts again.
TEST_F(Jobs, ARunGoesBackWithItsShards) {
    Surroundings surroundings(Variables{{"EMU_NCCL_ORDER", "plain"}});
    std::string text;  // stretches that are easy and that cannot be learnt: losses go up and down
    for (int id : random_ids(3000, 26, 7)) {
        text += char('a' + id);
        if (text.size() % 500 == 0)
            for (int i = 0; i < 100; i++) text += "abcd ";
    }
    write("text.txt", text);
    for (std::string zero : {"0", "2"}) {  // no loss is a spike before their mean is known
        std::vector<std::string> words =
            gpus(2, zero, 80,
                 {"--zero", zero, "--on-spike", "rollback", "--spike-threshold", "0.01",
                  "--tokenizer", "bytes", "--learning-rate", "0.01"});
        auto every = std::find(words.begin(), words.end(), "--eval-every");
        every[1] = "0";
        Outcome outcome = call(words);
        ASSERT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_NE(read_file(path(zero + "/log.jsonl")).find("\"event\":\"rollback\""),
                  std::string::npos)
            << "nothing was tested";
        EXPECT_EQ(losses_by_step(path(zero)), losses_by_step(path("0")));
        expect_same_states(path("0/last"), path(zero + "/last"));
    }
}

// Gradients that are rounded to bf16 are wrong by 2^-9 of themselves, and each hop of the ring
// rounds again, so the norm is by less than ranks * 2^-9; the loss after eight steps follows the
// sum of the updates, of which AdamW makes each about as long as before.
TEST_F(Jobs, GradientsMayTravelInBf16) {
    for (std::string zero : {"0", "1", "2"}) {
        ASSERT_EQ(call(gpus(3, "exact" + zero, 8, {"--zero", zero})).code, 0);
        for (std::string how : {"bf16", "mixed"}) {
            Outcome outcome = call(gpus(3, how + zero, 8, {"--zero", zero, "--reduce", how}));
            ASSERT_EQ(outcome.code, 0) << outcome.err;
            EXPECT_NE(outcome.out.find(how == "bf16" ? "gradients summed in bf16"
                                                     : "gradients sent in bf16"),
                      std::string::npos);
            expect_close("exact" + zero, how + zero, 2e-3);
            EXPECT_NE(losses_by_step(path("exact" + zero)), losses_by_step(path(how + zero)));
        }
        EXPECT_NE(losses_by_step(path("bf16" + zero)), losses_by_step(path("mixed" + zero)));
    }
    // Added up in the order of ranks, whoever updates what.
    EXPECT_EQ(losses_by_step(path("mixed1")), losses_by_step(path("mixed0")));
    expect_same_states(path("mixed0/last"), path("mixed1/last"));
}

// Pieces that are rounded once have a norm that is wrong by no more than 2^-9 of it. (The norm of
// the first step, before anything else differs.)
TEST_F(Jobs, WhatTravelsInBf16IsAddedUpInFloat32) {
    auto norm = [&](const std::string& how) {
        std::string out = "norm_" + how;
        EXPECT_EQ(call(gpus(4, out, 1, {"--reduce", how})).code, 0);
        std::stringstream log(read_file(path(out + "/log.jsonl")));
        for (std::string line; std::getline(log, line);)
            if (json record = json::parse(line); record.contains("grad_norm"))
                return record["grad_norm"].get<double>();
        return 0.0;
    };
    double exact = norm("fp32"), mixed = norm("mixed");
    EXPECT_NE(mixed, exact);
    EXPECT_NEAR(mixed, exact, 0x1p-9 * exact);
}

// With --deterministic ranks the same batches are added up in the same tree, whoever made them:
// also by more ranks than rows of a tensor, and when a run goes on with others.
TEST_F(Jobs, OneTreeGivesAnyNumberOfRanksTheSameBits) {
    auto words = [](int ranks, const std::string& out, int steps, const char* zero,
                    const char* reduce) {
        std::vector<std::string> all = gpus(
            ranks, out, steps, {"--deterministic", "ranks", "--zero", zero, "--reduce", reduce});
        all[28] = "2";  // six batches a step
        return all;
    };
    Surroundings surroundings(Variables{{"EMU_DEVICES", "6"}});
    ASSERT_EQ(call(gpus(1, "in_order", 6)).code, 0);
    for (const char* reduce : {"fp32", "bf16"}) {
        std::string one = format("one_%s", reduce);
        Outcome alone = call(words(1, one, 6, "0", reduce));
        ASSERT_EQ(alone.code, 0) << alone.err;
        EXPECT_NE(alone.out.find("sums in one tree over 6 batches"), std::string::npos);
        expect_close("in_order", one, reduce == std::string("bf16") ? 2e-3 : rounding());
        const std::vector<std::pair<int, const char*>> jobs = {
            {2, "0"}, {2, "2"}, {3, "1"}, {6, "0"}, {6, "2"}};
        for (const auto& [ranks, zero] : jobs) {
            std::string out = format("%s_%d_%s", reduce, ranks, zero);
            Outcome many = call(words(ranks, out, 6, zero, reduce));
            ASSERT_EQ(many.code, 0) << many.err;
            EXPECT_EQ(losses_by_step(path(out)), losses_by_step(path(one))) << out;
            expect_same_states(path(one + "/last"), path(out + "/last"));
        }
    }
    ASSERT_EQ(call(words(3, "parts", 2, "2", "fp32")).code, 0);
    ASSERT_EQ(call(words(1, "parts", 4, "0", "fp32")).code, 0);
    ASSERT_EQ(call(words(2, "parts", 6, "1", "fp32")).code, 0);
    expect_same_states(path("one_fp32/last"), path("parts/last"));
}

// What one of eight cards of 24 GB holds of the largest GPT-2 in each stage.
TEST_F(Jobs, ThePlanShardsByStage) {
    GPT2Config config;
    ASSERT_TRUE(named_config("gpt2-xl", &config));
    GPT2Shape shape = test_shape(1, 1024);
    shape.training = true, shape.dtype = Dtype::bf16, shape.recompute = 3, shape.world = 8;
    auto bytes = [&](int zero, const char* group) {
        shape.zero = zero;
        for (const MemoryRow& row : gpt2_memory(config, shape))
            if (row.group == group) return double(row.bytes);
        return 0.0;
    };
    auto all = [&](int zero) {
        shape.zero = zero;
        return double(total_bytes(gpt2_memory(config, shape)));
    };
    double whole = bytes(0, "parameters");
    EXPECT_NEAR(whole, 4.0 * double(count_parameters(config)), 0.001 * whole);
    for (int zero : {1, 2})
        for (const char* group : {"parameters", "first moments", "second moments"})
            EXPECT_EQ(bytes(zero, group), bytes(0, group) / 8) << group;
    EXPECT_EQ(bytes(1, "gradients"), bytes(0, "gradients"));
    // An eighth of the layers', the embeddings', and two layers' as a whole.
    double C = config.channels, once = 4 * (double(config.padded_vocab()) + 1024 + 2) * C;
    double layer = (whole - once) / config.layers;
    EXPECT_NEAR(bytes(2, "gradients"), once + (config.layers / 8.0 + 2) * layer, 1e-3 * whole);
    EXPECT_GT(all(0), 24e9);
    EXPECT_LT(all(1), 24e9 - 2e9);
    EXPECT_LT(all(2), all(1) - 4e9);
}

TEST_F(Jobs, WhoHoldsUpTheOthersIsSaid) {
    auto describe = [](int rank) { return format("rank %d", rank); };
    auto lines = [&](const RankTimes& times) { return find_stragglers(times, 100, describe); };
    using Lines = std::vector<std::string>;
    EXPECT_EQ(lines({{80, 82, 87}, {0, 1, 9}}), Lines());
    EXPECT_EQ(lines({{80, 95, 82}, {0, 0, 11}}),
              (Lines{"rank 1 computes for 95.0 ms a step, the others for 82.0",
                     "rank 2 waits 11.0 ms a step for its data"}));
    ASSERT_EQ(call(gpus(3, "run", 6, {"--log-every", "4"})).code, 0);
    std::stringstream log(read_file(path("run/log.jsonl")));
    std::vector<json> records;
    for (std::string line; std::getline(log, line);)
        if (json record = json::parse(line); record.value("event", "") == "ranks")
            records.push_back(record);
    ASSERT_EQ(records.size(), 1u);
    EXPECT_EQ(records[0]["step"], 4);
    ASSERT_EQ(records[0]["compute_ms"].size(), 3u);
    ASSERT_EQ(records[0]["data_ms"].size(), 3u);
    for (const json& ms : records[0]["compute_ms"]) EXPECT_GT(ms.get<double>(), 0);
}

// Evaluating and sampling are shared out: the same numbers and texts come of it, once.
TEST_F(Jobs, EvaluatesAndSamplesOnAllRanks) {
    ASSERT_EQ(call(gpus(1, "run", 4, {"--tokenizer", "bytes"})).code, 0);
    auto on = [&](int ranks, std::vector<std::string> words) {
        if (ranks > 1) words.insert(words.end(), {"--gpus", std::to_string(ranks)});
        words.insert(words.end(), {"--dtype", dtype_name(test_dtype())});
        Outcome outcome = call(words);
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_EQ(outcome.err, "");
        return outcome.out;
    };
    std::string choices;
    for (int i = 0; i < 7; i++)
        choices += json({{"ind", i},
                         {"ctx", "Cat " + std::to_string(i)},
                         {"label", i % 4},
                         {"endings", {"sat", "ran off", "slept", "ate"}}})
                       .dump() +
                   "\n";
    write("choices.jsonl", choices);
    const std::vector<std::vector<std::string>> evaluations = {
        {"evaluate", "--model", "run", "--data", "text.txt", "--json"},
        {"evaluate", "--model", "run", "--hellaswag", "choices.jsonl", "--json"}};
    for (const std::vector<std::string>& words : evaluations) {
        json one = json::parse(on(1, words));
        for (int ranks : {2, 3}) {
            json many = json::parse(on(ranks, words));
            double loss = one["loss"];
            EXPECT_NEAR(many["loss"].get<double>(), loss, rounding() * loss) << words[3];
            for (json* root : {&one, &many}) root->erase("loss"), root->erase("seconds");
            for (const char* derived : {"perplexity", "bits_per_byte"})
                one.erase(derived), many.erase(derived);
            EXPECT_EQ(many, one);
            one["loss"] = loss;
        }
    }
    std::vector<std::string> sample = {"sample", "--model",          "run", "--num-samples",
                                       "5",      "--max-new-tokens", "9"};
    std::string one = on(1, sample);
    EXPECT_NE(one.find("== sample 5 of 5, seed 46 =="), std::string::npos) << one;
    for (int ranks : {2, 3}) EXPECT_EQ(on(ranks, sample), one);
    sample.insert(sample.end(), {"--out", "samples.txt"});
    EXPECT_EQ(on(2, sample), "");
    EXPECT_EQ(read_file(path("samples.txt")), one);
    Outcome missing = call({"evaluate", "--model", "none", "--data", "text.txt", "--gpus", "2"});
    EXPECT_EQ(missing.code, 2);
    EXPECT_NE(missing.err.find("none"), std::string::npos) << missing.err;
    EXPECT_EQ(std::count(missing.err.begin(), missing.err.end(), '\n'), 1) << missing.err;
}

TEST_F(Jobs, EveryLauncherIsUnderstood) {
    ASSERT_EQ(call(gpus(2, "known", 3)).code, 0);
    using Launcher = std::function<Variables(int)>;
    auto text = [](int number) { return std::to_string(number); };
    const std::vector<std::pair<std::string, Launcher>> launchers = {
        {"mpirun",
         [&](int r) -> Variables {
             return {{"OMPI_COMM_WORLD_RANK", text(r)},
                     {"OMPI_COMM_WORLD_SIZE", "2"},
                     {"OMPI_COMM_WORLD_LOCAL_RANK", text(r)},
                     {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}};
         }},
        {"hydra",
         [&](int r) -> Variables {
             return {{"PMI_RANK", text(r)},
                     {"PMI_SIZE", "2"},
                     {"MPI_LOCALRANKID", text(r)},
                     {"MPI_LOCALNRANKS", "2"}};
         }},
        {"srun",
         [&](int r) -> Variables {
             return {{"SLURM_JOB_ID", "41"},        {"SLURM_STEP_ID", "0"},
                     {"SLURM_PROCID", text(r)},     {"SLURM_NTASKS", "2"},
                     {"SLURM_STEP_NUM_TASKS", "2"}, {"SLURM_LOCALID", text(r)},
                     {"SLURM_NODEID", "0"},         {"SLURM_STEP_TASKS_PER_NODE", "2"},
                     {"SLURM_TASKS_PER_NODE", "2"}};
         }},
        {"torchrun", [&](int r) -> Variables {
             return {
                 {"RANK", text(r)},         {"WORLD_SIZE", "2"},          {"LOCAL_RANK", text(r)},
                 {"LOCAL_WORLD_SIZE", "2"}, {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", "29431"}};
         }}};
    for (const auto& [name, variables] : launchers) {
        std::vector<std::string> more = {"--timeout", "20"};
        if (name != "torchrun") more.insert(more.end(), {"--rendezvous", "file:" + path(name)});
        std::vector<Rank> ranks;
        for (int rank : {0, 1})
            ranks.push_back(start_rank(rank, job(2, path("by_" + name), 3, more), variables(rank)));
        for (const Rank& rank : ranks) {
            Outcome end = end_of(rank);
            ASSERT_EQ(end.code, 0) << name << ": " << end.err;
        }
        EXPECT_EQ(losses_by_step(path("by_" + name)), losses_by_step(path("known"))) << name;
    }
}

// OpenMPI itself, from the distribution.
TEST_F(Jobs, MpirunStartsThem) {
    if (system("command -v mpirun >/dev/null 2>&1") != 0)
        GTEST_SKIP() << "no mpirun here (the package openmpi-bin)";
    for (int ranks : {2, 3, 4}) {
        std::string known = format("known%d", ranks), out = format("run%d", ranks);
        ASSERT_EQ(call(gpus(ranks, known, 3)).code, 0);
        std::string command = "cd " + folder_ +
                              " && mpirun --allow-run-as-root --oversubscribe -np " +
                              std::to_string(ranks) + " " + binary();
        for (const std::string& word : job(ranks, out, 3)) command += " " + word;
        ASSERT_EQ(system((command + " >out 2>err").c_str()), 0) << read_file(path("err"));
        EXPECT_EQ(losses_by_step(path(out)), losses_by_step(path(known)));
    }
}

TEST_F(Jobs, RanksThatDifferAreRefused) {
    const std::vector<std::pair<std::vector<std::string>, std::string>> differences = {
        {{"--learning-rate", "0.5"}, "learning rate differs"},
        {{"--layers", "3"}, "differs"},
        {{"--tokenizer", "chars"}, "differs"},
        {{"--steps", "9"}, "steps differs"},
        {{"--early-stop", "9"}, "what ends or turns the run early differs"}};
    for (const auto& [words, expected] : differences) {
        std::vector<Rank> ranks;
        for (int rank : {0, 1}) {
            std::vector<std::string> all =
                job(2, path("run"), 3,
                    {"--timeout", "20", "--rendezvous", "file:" + path("meet" + words[0])});
            auto same = std::find(all.begin(), all.end(), words[0]);
            if (rank == 1 && same != all.end()) same[1] = words[1];
            else if (rank == 1) all.insert(all.end(), words.begin(), words.end());
            ranks.push_back(start_rank(rank, all, own_variables(rank, 2)));
        }
        Outcome first = end_of(ranks[0]), second = end_of(ranks[1]);
        expect_error(first, 2, expected);
        EXPECT_EQ(second.code, 2);
        EXPECT_EQ(second.err, "") << "said twice";
        EXPECT_FALSE(fs::exists(path("run/log.jsonl")));
    }
}

TEST_F(Jobs, ARankThatDoesNotComeIsNamed) {
    Rank alone = start_rank(
        0, job(2, path("run"), 3, {"--timeout", "1", "--rendezvous", "file:" + path("meet")}),
        own_variables(0, 2));
    expect_error(end_of(alone), 1, "rank 1");
    std::vector<Rank> two;
    for (int rank : {0, 1})
        two.push_back(start_rank(
            rank,
            job(3, path("run"), 3, {"--timeout", "1", "--rendezvous", "file:" + path("meet")}),
            own_variables(rank, 3)));
    expect_error(end_of(two[0]), 1, "rank 2");
    Outcome second = end_of(two[1]);
    EXPECT_EQ(second.code, 1);
    EXPECT_EQ(second.err, "") << "said twice";
    EXPECT_FALSE(fs::exists(path("run/log.jsonl")));
}

// What rank 0 does not live to say is said once on its machine, wherever the others are then.
TEST_F(Jobs, TheEndOfRankZeroIsSaidOnce) {
    std::vector<Rank> ranks;
    for (int rank : {0, 1, 2})
        ranks.push_back(start_rank(rank,
                                   job(3, path("run"), 1000000,
                                       {"--timeout", "20", "--rendezvous", "file:" + path("meet")}),
                                   own_variables(rank, 3)));
    wait_for_step("run", 3);
    ::kill(ranks[0].process, SIGKILL);
    EXPECT_EQ(end_of(ranks[0]).code, 137);
    for (int rank : {1, 2}) {
        Outcome end = end_of(ranks[size_t(rank)]);
        EXPECT_EQ(end.code, 1) << end.err;
        bool said = end.err.find("error: rank 0 of 3 on ") != std::string::npos;
        EXPECT_EQ(said, rank == 1) << "rank " << rank << ": " << end.err;
    }
}

// The shell that `srun --pty` opens is the one process of a step.
TEST_F(Jobs, TheOnlyProcessOfALauncherStartsRanks) {
    Surroundings surroundings(Variables{{"SLURM_JOB_ID", "41"},
                                        {"SLURM_STEP_ID", "0"},
                                        {"SLURM_PROCID", "0"},
                                        {"SLURM_STEP_NUM_TASKS", "1"},
                                        {"SLURM_LOCALID", "0"}});
    Outcome outcome = call(gpus(2, "run", 2));
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_NE(outcome.out.find("2 ranks x "), std::string::npos) << outcome.out;
}

// ---- two machines ----

// Two network namespaces with a wire between them, each a machine as far as the program's own link
// can tell; gone when this is.
class TwoMachines {
  public:
    static constexpr const char* kAddress = "10.199.77.1";

    TwoMachines() {
        for (int i : {0, 1}) made_ = made_ && ip("netns add " + name(i));
        made_ = made_ && ip("link add " + wire(0) + " type veth peer name " + wire(1));
        for (int i : {0, 1}) {
            std::string in = "-n " + name(i) + " ";
            made_ = made_ && ip("link set " + wire(i) + " netns " + name(i)) &&
                    ip(in + format("addr add 10.199.77.%d/24 dev ", i + 1) + wire(i)) &&
                    ip(in + "link set " + wire(i) + " up") && ip(in + "link set lo up");
        }
    }
    TwoMachines(const TwoMachines&) = delete;
    TwoMachines& operator=(const TwoMachines&) = delete;
    ~TwoMachines() {
        for (int i : {0, 1}) ip("netns del " + name(i));
    }

    bool made() const { return made_; }
    void wire_is(const char* state) const {
        ip("-n " + name(0) + " link set " + wire(0) + " " + state);
    }

    // A program that runs `program` on one of them.
    std::string on(int machine, const std::string& program, const std::string& folder) const {
        std::string path = folder + "/on" + std::to_string(machine);
        write_file_atomic(
            path, "#!/bin/sh\nexec ip netns exec " + name(machine) + " '" + program + "' \"$@\"\n");
        fs::permissions(path, fs::perms::owner_all);
        return path;
    }

  private:
    static std::string name(int i) { return format("gpt2test%d_%d", int(getpid()), i); }
    static std::string wire(int i) { return format("gw%d_%d", int(getpid()) % 1000000, i); }
    static bool ip(const std::string& words) {
        return system(("ip " + words + " >/dev/null 2>&1").c_str()) == 0;
    }
    bool made_ = true;
};

class Machines : public Jobs {
  protected:
    void SetUp() override {
        Jobs::SetUp();
        if (IsSkipped()) return;
        machines_.emplace();
        if (!machines_->made())
            GTEST_SKIP() << "no network namespaces here (root and the package iproute2)";
    }

    std::vector<Rank> start_both(const std::string& out, int steps,
                                 const std::string& timeout) const {
        std::vector<std::string> words = job(
            2, path(out), steps,
            {"--timeout", timeout, "--rendezvous", std::string(TwoMachines::kAddress) + ":29500"});
        std::vector<Rank> ranks;
        for (int rank : {0, 1}) {
            std::string own = binary(), starter = machines_->on(rank, own, folder_);
            Variables variables = {{"OMPI_COMM_WORLD_RANK", std::to_string(rank)},
                                   {"OMPI_COMM_WORLD_SIZE", "2"},
                                   {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                                   {"OMPI_COMM_WORLD_LOCAL_SIZE", "1"},
                                   {"GPT2_BINARY", starter}};
            const char* before = getenv("GPT2_BINARY");
            std::string kept = before != nullptr ? before : "";
            ranks.push_back(start_rank(rank, words, variables));
            if (before != nullptr) setenv("GPT2_BINARY", kept.c_str(), 1);
        }
        return ranks;
    }

    std::optional<TwoMachines> machines_;
};

TEST_F(Machines, MeetAndTrainTheSame) {
    ASSERT_EQ(call(gpus(2, "known", 4)).code, 0);
    for (const Rank& rank : start_both("run", 4, "20")) {
        Outcome end = end_of(rank);
        ASSERT_EQ(end.code, 0) << end.err;
    }
    EXPECT_EQ(losses_by_step(path("run")), losses_by_step(path("known")));
}

// Without a wire they do not find each other, and say so within the time limit.
TEST_F(Machines, ACutWireIsNoticedWhereTheyMeet) {
    machines_->wire_is("down");
    double begin_s = now_s();
    std::vector<Rank> ranks = start_both("run", 4, "2");
    Outcome first = end_of(ranks[0]), second = end_of(ranks[1]);
    expect_error(first, 1, "rank 1");
    expect_error(second, 1, "rank 0");
    EXPECT_LT(now_s() - begin_s, 30);
    EXPECT_FALSE(fs::exists(path("run/log.jsonl")));
}

// The same in the middle of a run, whose last checkpoint is whole, and which goes on when the wire
// is there again.
TEST_F(Machines, ACutWireEndsARunThatGoesOnLater) {
    std::vector<Rank> ranks = start_both("run", 1000000, "2");
    wait_for_step("run", 4);
    machines_->wire_is("down");
    double cut_s = now_s();
    for (const Rank& rank : ranks) {
        Outcome end = end_of(rank);
        EXPECT_EQ(end.code, 1) << end.err;
    }
    EXPECT_LT(now_s() - cut_s, 60);
    size_t step = verify_checkpoint(path("run/last"))["step"];
    EXPECT_GE(step, 2u);
    machines_->wire_is("up");
    for (const Rank& rank : start_both("run", int(step) + 2, "20")) {
        Outcome end = end_of(rank);
        ASSERT_EQ(end.code, 0) << end.err;
    }
    EXPECT_EQ(losses_by_step(path("run")).rbegin()->first, step + 2);
}

TEST_F(Jobs, MoreRanksThanCardsAreRefused) {
    Surroundings surroundings(Variables{{"EMU_DEVICES", "1"}});
    Outcome outcome = call(gpus(2, "run", 3));
    EXPECT_EQ(outcome.code, 1);
    EXPECT_NE(outcome.err.find("rank 1 of this machine has no GPU: there are 1 here"),
              std::string::npos)
        << outcome.err;
}

// As srun --gpus-per-task=1 starts them. Where it is one card after all, NCCL refuses it.
TEST_F(Jobs, RanksThatSeeOneCardEachTakeIt) {
    ASSERT_EQ(call(gpus(2, "known", 3)).code, 0);
    for (bool same : {false, true}) {
        std::vector<Rank> ranks;
        for (int rank : {0, 1}) {
            Variables variables = own_variables(rank, 2);
            variables.push_back({"EMU_DEVICES", "1"});
            variables.push_back({"EMU_NCCL_DUPLICATE", same ? "refuse" : ""});
            std::string meet = "file:" + path(same ? "meet" : "meet_apart");
            ranks.push_back(
                start_rank(rank, job(2, path("run"), 3, {"--timeout", "20", "--rendezvous", meet}),
                           variables));
        }
        Outcome first = end_of(ranks[0]), second = end_of(ranks[1]);
        if (same) {
            EXPECT_EQ(first.code, 1) << first.err;
            EXPECT_EQ(second.code, 1) << second.err;
            EXPECT_NE(first.err.find("rank 0 and rank 1 both on CUDA device 0"), std::string::npos)
                << first.err;
            continue;
        }
        ASSERT_EQ(first.code, 0) << first.err;
        ASSERT_EQ(second.code, 0) << second.err;
        EXPECT_EQ(losses_by_step(path("run")), losses_by_step(path("known")));
        fs::remove_all(path("run"));
    }
}

// Killed at any moment, whichever rank it is: no process is left, the last checkpoint is whole, and
// the run goes on to the same bits.
TEST_F(Jobs, ARankThatIsKilledEndsTheJobAndNothingIsLost) {
    constexpr int kKills = 50, kSteps = 40;
    int killed = 0;
    const std::vector<std::string> sharded = {"--zero", "1", "--timeout", "20"};
    ASSERT_EQ(call(gpus(2, "whole", kSteps, sharded)).code, 0);
    auto expect_whole = [&] {
        EXPECT_EQ(losses_by_step(path("run")), losses_by_step(path("whole")));
        expect_same_states(path("run/last"), path("whole/last"));
        fs::remove_all(path("run"));
    };
    std::mt19937 random(7);
    for (int i = 0; i < 4 * kKills && killed < kKills; i++) {
        Call job{folder_, gpus(2, "run", kSteps, sharded)};
        pid_t parent = job.start();
        std::vector<pid_t> ranks;
        for (int i = 0; i < 2000 && ranks.size() < 2; i++) usleep(1000), ranks = ranks_of(parent);
        usleep(useconds_t(random() % 400000));
        if (ranks.size() == 2) ::kill(ranks[random() % 2], SIGKILL);
        Outcome end = job.finish(parent);
        for (pid_t rank : ranks) EXPECT_NE(::kill(rank, 0), 0) << "rank " << rank << " is left";
        if (end.code == 0) {  // it was done before
            expect_whole();
            continue;
        }
        killed++;
        std::string last = path("run/last");
        if (!fs::exists(last)) continue;
        EXPECT_NO_THROW(verify_checkpoint(last));
        if (verify_checkpoint(last)["finished"] == true) expect_whole();
    }
    printf("ranks killed: %d\n", killed);
    EXPECT_EQ(killed, kKills);
    Outcome rest = call(gpus(2, "run", kSteps, sharded));
    ASSERT_EQ(rest.code, 0) << rest.err;
    expect_whole();
}

TEST_F(Jobs, ASignalToAnyRankSavesAndStopsAll) {
    for (size_t rank : {0, 1}) {
        std::string out = format("run%zu", rank);
        Call job{folder_, gpus(2, out, 1000000)};
        pid_t parent = job.start();
        wait_for_step(out, 3);
        std::vector<pid_t> ranks = ranks_of(parent);
        ASSERT_EQ(ranks.size(), 2u);
        ::kill(ranks[rank], SIGTERM);
        Outcome end = job.finish(parent);
        EXPECT_EQ(end.code, 143) << end.err;
        EXPECT_EQ(verify_checkpoint(path(out + "/last"))["step"],
                  losses_by_step(path(out)).rbegin()->first);
    }
}

// A second signal, while one rank cannot follow the first.
TEST_F(Jobs, WhatASecondSignalDoesIsSaidOnce) {
    Call job{folder_, gpus(3, "run", 1000000, {"--timeout", "20"})};
    pid_t parent = job.start();
    wait_for_step("run", 3);
    std::vector<pid_t> ranks = ranks_of(parent);
    ASSERT_EQ(ranks.size(), 3u);
    ::kill(ranks[1], SIGSTOP);
    ::kill(parent, SIGTERM);
    usleep(1200000);
    ::kill(parent, SIGTERM);
    usleep(100000);
    ::kill(ranks[1], SIGCONT);
    std::string err = job.finish(parent).err, line = "a second signal ends the program";
    size_t first = err.find(line);
    ASSERT_NE(first, std::string::npos) << err;
    EXPECT_EQ(err.find(line, first + 1), std::string::npos) << err;
}

// Each of its batches is work that goes on.
TEST_F(Jobs, AStepMayTakeLongerThanARankMayHang) {
    std::vector<std::string> words = gpus(2, "run", 1, {"--timeout", "2"});
    words[12] = std::to_string(128 * 192);
    Outcome end = call(words);
    EXPECT_EQ(end.code, 0) << end.err;
}

// The error of one rank's data is all ranks', also where the name of a file is no UTF-8: the step
// before is saved.
TEST_F(Jobs, DataThatAreLostUnderAnyNameEndARunThatIsSaved) {
    make_folder(path("d\351a"));
    call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "260", "--out", "tok"});
    call(
        {"tokenizer", "encode", "--tokenizer", "tok", "--in", "text.txt", "--out", "d\351a/s.bin"});
    std::vector<std::string> words = gpus(2, "run", 1000000, {"--tokenizer", "tok"});
    words[2] = "d\351a/s.bin";
    Call job{folder_, words};
    pid_t parent = job.start();
    wait_for_step("run", 3);
    fs::resize_file(path("d\351a/s.bin"), 3000);
    Outcome end = job.finish(parent);
    EXPECT_EQ(end.code, 1) << end.err;
    EXPECT_NE(end.err.find("while the program reads it"), std::string::npos) << end.err;
    EXPECT_EQ(verify_checkpoint(path("run/last"))["step"],
              losses_by_step(path("run")).rbegin()->first);
}

// What NCCL says is what is said, and a rank that goes no further is named.
TEST_F(Jobs, ARankThatHangsOrFailsEndsTheJob) {
    const std::vector<std::pair<std::string, std::string>> faults = {
        {"1:40:error", ": NCCL: "}, {"0:40:error", ": NCCL: "}, {"1:40:stop", "rank 1 of 2"}};
    for (const auto& [fault, expected] : faults) {
        Surroundings surroundings(Variables{{"EMU_NCCL_FAULT", fault}});
        std::string out = "run" + fault.substr(0, 1) + fault.substr(5);
        Outcome end = call(gpus(2, out, 1000, {"--timeout", "3"}));
        EXPECT_EQ(end.code, 1) << fault << ": " << end.err;
        EXPECT_NE(end.err.find("train_gpt2cu: error: rank "), std::string::npos) << end.err;
        EXPECT_NE(end.err.find(expected), std::string::npos) << end.err;
    }
}

// A byte that is in every window has an embedding whose square is no number any more.
TEST_F(Jobs, BadNumbersEndAllRanksWithOneDiagnosis) {
    GPT2Config config;
    config.vocab_size = 257, config.context = 16, config.layers = 1, config.heads = 1;
    config.channels = 16;
    GPT2Ptr model(gpt2_create(config, test_shape(1, 1)));
    gpt2_initialise(model.get(), 5);
    std::vector<real> wte(257 * 16);
    gpt2_copy_out(model.get(), Group::parameters, k_wte, 0, wte.data());
    std::fill_n(wte.begin() + ' ' * 16, 16, real(3e38));
    gpt2_copy_in(model.get(), Group::parameters, k_wte, 0, wte.data());
    Tokenizer tokenizer = Tokenizer::bytes();
    save_model(model.get(), &tokenizer, path("model"));
    Outcome end =
        call({"train", "--model", "model", "--data", "text.txt", "--gpus", "2", "--steps", "50",
              "--batch-size", "2", "--out", "run", "--dtype", dtype_name(test_dtype())});
    EXPECT_EQ(end.code, 1) << end.err;
    EXPECT_NE(end.err.find("none was applied"), std::string::npos) << end.err;
    EXPECT_EQ(json::parse(read_file(path("run/diagnosis.json")))["bad_steps_in_a_row"], 3);
}

TEST_F(Jobs, TheClockOfRankZeroCounts) {
    Outcome end = call(gpus(2, "run", 1000000, {"--time-limit", "3"}));
    ASSERT_EQ(end.code, 0) << end.err;
    EXPECT_EQ(verify_checkpoint(path("run/last"))["finished"], true);
    end = call(gpus(2, "stopped", 1000000, {"--early-stop", "1", "--learning-rate", "0"}));
    ASSERT_EQ(end.code, 0) << end.err;
    EXPECT_NE(end.out.find("early stop"), std::string::npos) << end.out;
}

}  // namespace
