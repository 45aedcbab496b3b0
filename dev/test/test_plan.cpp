// The tests of planning: the cost model of scaling.h, `plan` for a cluster, and the scripts that
// begin with it, scripts/run_gpt2_*.sh and scripts/multi_node. None of them needs a GPU.

#include "../../scaling.h"
#include "calls.h"

// ==== the machine ================================================================================

namespace {

// What a container may use, by control groups of either version, of its own or of those above.
TEST(Machine, LimitsOfControlGroupsHold) {
    std::string system = test_folder(), groups = system + "/sys/fs/cgroup";
    auto write = [&](const std::string& path, const std::string& text) {
        fs::create_directories(fs::path(system + path).parent_path());
        std::ofstream(system + path) << text;
    };
    write("/proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\nBuffers: 1 kB\n");
    EXPECT_EQ(machine_memory_free(system), 8000u * 1024) << "no control group";
    EXPECT_EQ(group_threads(system), 0);

    write("/proc/self/cgroup", "0::/jobs/mine\n");
    write("/sys/fs/cgroup/jobs/mine/memory.max", "max\n");
    write("/sys/fs/cgroup/jobs/mine/cpu.max", "max 100000\n");
    EXPECT_EQ(machine_memory_free(system), 8000u * 1024);
    EXPECT_EQ(group_threads(system), 0);
    write("/sys/fs/cgroup/jobs/memory.max", "4000000\n");
    write("/sys/fs/cgroup/jobs/memory.current", "1000000\n");
    write("/sys/fs/cgroup/jobs/memory.stat", "active_file 5\ninactive_file 300000\n");
    write("/sys/fs/cgroup/jobs/cpu.max", "300000 100000\n");
    EXPECT_EQ(machine_memory_free(system), 4000000u - 1000000 + 300000);
    EXPECT_EQ(group_threads(system), 3);
    write("/sys/fs/cgroup/jobs/mine/memory.max", "2000000\n");
    write("/sys/fs/cgroup/jobs/mine/memory.current", "2000001\n");
    write("/sys/fs/cgroup/cpu.max", "200000 100000\n");
    EXPECT_EQ(machine_memory_free(system), 1u) << "nothing is left, which is not unknown";
    EXPECT_EQ(group_threads(system), 2);

    fs::remove_all(groups);
    write("/proc/self/cgroup", "7:name=systemd:/\n4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n");
    write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "6000000\n");  // a container's own root
    write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "1500000\n");
    write("/sys/fs/cgroup/memory/memory.stat", "inactive_file 7\ntotal_inactive_file 500000\n");
    write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
    write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
    EXPECT_EQ(machine_memory_free(system), 5000000u);
    EXPECT_EQ(group_threads(system), 0);
    write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "250000\n");
    EXPECT_EQ(group_threads(system), 2);
    write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    EXPECT_EQ(machine_memory_free(system), 8000u * 1024);
}

}  // namespace

// ==== the cost model =============================================================================

namespace {

constexpr const char* kSizes[] = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"};

GPT2Config config_of(const std::string& name) {
    GPT2Config config;
    EXPECT_TRUE(named_config(name, &config)) << name;
    return config;
}

GPT2Shape shape_of(int B, int T, int recompute = 0) {
    GPT2Shape shape;
    shape.B = B, shape.T = T, shape.training = true, shape.recompute = recompute;
    return shape;
}

Cluster h100(int gpus, int nodes, double link_gb_s = 50) {
    const Card* card = find_card("H100");
    Cluster c;
    c.gpus = gpus, c.nodes = nodes, c.share = card->share;
    c.flops = 1e12 * card->tflops, c.memory = 1e9 * card->memory_gb_s;
    c.node_link = 1e9 * card->node_link_gb_s, c.link = 1e9 * link_gb_s;
    return c;
}

TEST(Scaling, ACardIsFoundByWhatTheDriverCallsIt) {
    for (const Card& card : kCards) {
        const Card* found = find_card(std::string("NVIDIA ") + card.name + " 0");
        ASSERT_NE(found, nullptr) << card.name;
        EXPECT_STREQ(found->name, card.name) << "an earlier row hides it";
        EXPECT_GT(card.memory_gb_s, 0);
        EXPECT_GT(card.node_link_gb_s, 0);
    }
    EXPECT_STREQ(find_card("NVIDIA H100 80GB HBM3")->name, "H100");
    EXPECT_EQ(find_card("NVIDIA A100-SXM4-40GB")->memory_gb_s, 1555);
    EXPECT_STREQ(find_card("NVIDIA A100-SXM4-80GB")->name, "A100");
    EXPECT_EQ(find_card("an abacus"), nullptr);
}

TEST(Scaling, OneGpuIsItsOwnMeasure) {
    for (const char* size : kSizes) {
        Cluster c = h100(1, 1);
        StepCost cost = step_cost(config_of(size), shape_of(8, 1024), 4, c);
        EXPECT_DOUBLE_EQ(efficiency(cost, c), 1) << size;
        EXPECT_EQ(cost.communication_s, 0);
        EXPECT_NEAR(cost.exposed_s, 0, 1e-15);  // a difference of what may be rounded apart
        EXPECT_EQ(cost.tokens, 4 * 8 * 1024);
    }
}

// Over sizes, GPUs, machines, links, batches and recomputation: efficiency is between 0 and 1, and
// what is exposed is a part of what is sent.
TEST(Scaling, NothingIsMoreEfficientThanOneGpu) {
    size_t count = 0;
    for (const char* size : kSizes)
        for (int zero = 0; zero < kZeroStages; zero++)
            for (int gpus : {1, 2, 3, 8})
                for (int nodes : {1, 2, 5, 128})
                    for (double link : {0.01, 1.0, 50.0, 1e6})
                        for (int batch : {1, 64})
                            for (int recompute : {0, 3}) {
                                Cluster c = h100(gpus, nodes, link);
                                GPT2Shape shape = shape_of(batch, 1024, recompute);
                                shape.zero = zero;
                                StepCost cost = step_cost(config_of(size), shape, 2, c);
                                EXPECT_LE(efficiency(cost, c), 1 + 1e-12) << size;
                                EXPECT_GT(efficiency(cost, c), 0) << size;
                                EXPECT_GE(cost.exposed_s, 0);
                                EXPECT_LE(cost.exposed_s, cost.communication_s + 1e-12);
                                count++;
                            }
    EXPECT_EQ(count, 3u * 4 * 4 * 4 * 4 * 2 * 2);
}

TEST(Scaling, InfiniteLinksExposeNothing) {
    for (const char* size : kSizes)
        for (int nodes : {1, 4}) {
            Cluster c = h100(8, nodes);
            c.link = c.node_link = std::numeric_limits<double>::infinity();
            c.call_s = c.node_hop_s = c.hop_s = 0;
            for (int zero = 0; zero < kZeroStages; zero++) {
                GPT2Shape shape = shape_of(4, 1024);
                shape.zero = zero;
                StepCost cost = step_cost(config_of(size), shape, 3, c);
                EXPECT_NEAR(cost.exposed_s, 0, 1e-15) << size;
                EXPECT_EQ(cost.communication_s, 0) << size;
            }
        }
}

TEST(Scaling, ASlowerLinkIsNeverFaster) {
    for (const char* size : kSizes)
        for (bool within : {false, true}) {
            double before_s = 0, first_s = 0;
            for (double gb_s = 1e4; gb_s > 0.01; gb_s /= 2) {
                Cluster c = h100(8, 4);
                (within ? c.node_link : c.link) = 1e9 * gb_s;
                double step_s = step_cost(config_of(size), shape_of(4, 1024), 1, c).step_s();
                EXPECT_GE(step_s, before_s) << size << " " << gb_s;
                before_s = step_s;
                if (first_s == 0) first_s = step_s;
            }
            EXPECT_GT(before_s, 2 * first_s) << "in the end the link is what counts";
        }
}

TEST(Scaling, MoreNodesNeverMakeAStepShorter) {
    for (const char* size : kSizes) {
        double before_s = 0, before = 2;
        for (int nodes = 1; nodes <= 300; nodes++) {
            Cluster c = h100(8, nodes, 5);
            StepCost cost = step_cost(config_of(size), shape_of(4, 1024), 1, c);
            EXPECT_GE(cost.step_s(), before_s) << size << " " << nodes;
            EXPECT_LE(efficiency(cost, c), before) << size << " " << nodes;
            before_s = cost.step_s(), before = efficiency(cost, c);
        }
    }
}

// Two blocks of 8 channels, and two machines of two GPUs whose calls cost nothing.
std::pair<GPT2Config, Cluster> small_case() {
    GPT2Config config;
    config.vocab_size = 128, config.context = 8, config.layers = 2, config.heads = 1;
    config.channels = 8;
    Cluster c;
    c.gpus = c.nodes = 2;
    c.flops = 2e6, c.share = 0.5, c.memory = 1e6, c.node_link = 1e6, c.link = 1e5;
    c.call_s = c.node_hop_s = c.hop_s = 0;
    return {config, c};
}

// Two blocks of 8 channels, 3 micro-batches of 2 sequences of 4 tokens, 2 machines of 2 GPUs. A
// token needs 3 * 2 * 128 * 8 = 6,144 operations in the classifier and 4,848 in a block; a block
// has 872 parameters, and 1,104 exist once.
TEST(Scaling, ASmallCaseIsAsComputedByHand) {
    auto [config, c] = small_case();
    StepCost cost = step_cost(config, shape_of(2, 4), 3, c);
    EXPECT_NEAR(cost.passes_s, 3 * 8 * (6144 + 2 * 4848) / 1e6, 1e-12);
    EXPECT_NEAR(cost.passes_s, 0.38016, 1e-12);
    EXPECT_NEAR(cost.update_s, 38 * 3968 / 0.9e6, 1e-12);  // 3,968: rows begin at multiples of 128
    // A bucket crosses between machines at 0.8 * 1e5 bytes/s, half of its bytes for each GPU.
    double block_s = 4 * 872 / 2 / 0.8e5, last_s = 4 * 1104 / 2 / 0.8e5;
    EXPECT_NEAR(cost.communication_s, 2 * block_s + last_s, 1e-12);
    // Sums of a block take 0.0218 s, its backward pass 0.025856 s: the first is hidden.
    EXPECT_NEAR(cost.exposed_s, block_s + last_s, 1e-12);
    EXPECT_EQ(cost.tokens, 96);
    EXPECT_NEAR(efficiency(cost, c), (4 * 0.38016 + cost.update_s) / (4 * cost.step_s()), 1e-12);
    EXPECT_STREQ(bound_by(cost, c), "operations");
    // With slower links the second bucket waits for the first.
    c.link = 5e4;
    cost = step_cost(config, shape_of(2, 4), 3, c);
    EXPECT_NEAR(cost.exposed_s, 0.025856 + 2 * (2 * block_s + last_s) - 2 * 0.025856, 1e-12);
    // Within a machine, where links between them are fast; and what each call costs.
    c.link = 1e9;
    EXPECT_NEAR(all_reduce_s(c, 800), 2 * 0.5 * 800 / 0.8e6, 1e-12);
    c.call_s = 1, c.node_hop_s = 0.1, c.hop_s = 0.01, c.nodes = 5;
    EXPECT_NEAR(all_reduce_s(c, 0), 1 + 2 * 0.1 + 2 * 3 * 0.01, 1e-12);
    c.gpus = c.nodes = 1;
    EXPECT_EQ(all_reduce_s(c, 800), 0);
    // Recomputing blocks is a forward pass of theirs, a third of their operations.
    EXPECT_NEAR(step_cost(config, shape_of(2, 4, 3), 3, c).passes_s,
                0.38016 + 3 * 8 * 2 * 4848 / 3e6, 1e-12);
}

// The same with sharded states: half of each sum, then the updated parameters, of 2 bytes, of which
// those of the second block come while the first computes (4,848 * 8 / 3 operations); and with
// sharded gradients, whose second block is hidden by no pass.
TEST(Scaling, ShardsAreAsComputedByHand) {
    auto [config, c] = small_case();
    GPT2Shape shape = shape_of(2, 4);
    double whole_s = step_cost(config, shape, 3, c).update_s;
    shape.zero = 1;
    StepCost cost = step_cost(config, shape, 3, c);
    double block_s = 2 * 872 / 2 / 0.8e5, last_s = 2 * 1104 / 2 / 0.8e5;
    EXPECT_NEAR(cost.update_s, whole_s / 4, 1e-12);
    EXPECT_NEAR(cost.communication_s, 1.5 * (2 * block_s + last_s), 1e-12);
    EXPECT_NEAR(cost.exposed_s, 1.5 * (block_s + last_s), 1e-12);
    shape.zero = 2;
    EXPECT_NEAR(step_cost(config, shape, 3, c).exposed_s, cost.exposed_s + 2 * block_s, 1e-12);
    shape.zero = 0, shape.reduce = Dtype::bf16;
    EXPECT_NEAR(step_cost(config, shape, 3, c).exposed_s, block_s + last_s, 1e-12);
    // A link so slow that the forward pass waits for every block.
    EXPECT_NEAR(exposed_gathers_s(3, 0.1, 1, 2), 2 + 3 - 2 * 0.1, 1e-12);
    EXPECT_NEAR(exposed_gathers_s(3, 10, 1, 2), 3, 1e-12);
}

TEST(Scaling, WhatBoundsAStepIsNamed) {
    auto bound = [](const Cluster& c) {
        return std::string(bound_by(step_cost(config_of("gpt2"), shape_of(4, 1024), 1, c), c));
    };
    EXPECT_EQ(bound(h100(8, 4)), "operations");
    EXPECT_EQ(bound(h100(8, 4, 0.1)), "links between nodes");
    Cluster slow = h100(8, 4);
    slow.node_link = 1e8;
    EXPECT_EQ(bound(slow), "links within a node");
    slow = h100(1, 1);
    slow.memory = 1e9;
    EXPECT_EQ(bound(slow), "memory, in the update");
}

// ==== plan =======================================================================================

// The number after `before` in a line of what a plan says.
double number_after(const std::string& text, const std::string& before) {
    size_t at = text.find(before);
    EXPECT_NE(at, std::string::npos) << before << " is not in:\n" << text;
    if (at == std::string::npos) return -1;
    std::string number;
    for (at += before.size(); at < text.size() && strchr("0123456789.,e+-", text[at]); at++)
        if (text[at] != ',') number += text[at];
    return atof(number.c_str());
}

TEST_F(Cli, APlanOfAClusterNeedsNoCard) {
    for (const char* size : kSizes) {
        Outcome plan = call({"plan", "--model", size, "--card", "H100", "--gpus", "8", "--nodes",
                             "4", "--link", "25", "--batch-size", "8", "--total-batch-tokens",
                             "524288", "--steps", "100", "--recompute", "0"});
        ASSERT_EQ(plan.code, 0) << plan.err;
        EXPECT_EQ(plan.err, "");
        Cluster c = h100(8, 4, 25);
        StepCost cost = step_cost(config_of(size), shape_of(8, 1024), 2, c);
        EXPECT_NEAR(number_after(plan.out, "\nstep       "), 1e3 * cost.step_s(),
                    1e-3 * 1e3 * cost.step_s());
        EXPECT_NEAR(number_after(plan.out, "\nrate       "), 524288 / cost.step_s(), 1.01);
        EXPECT_NEAR(number_after(plan.out, "efficiency "), 100 * efficiency(cost, c), 0.051);
        EXPECT_NEAR(number_after(plan.out, "exposed communication "), 1e3 * cost.exposed_s,
                    0.01 * 1e3 * cost.exposed_s);
        for (const char* part :
             {"4 nodes x 8 H100", "25 GB/s a GPU between nodes", "bf16", "parameters, bf16",
              "bound by   ", "passes at 48% of the peak", "a step of 524,288 tokens",
              "of 74.51 GiB", "run        100 steps"})
            EXPECT_NE(plan.out.find(part), std::string::npos) << part << "\n" << plan.out;
    }
}

TEST_F(Cli, APlanRecomputesWhatTheCardsMemoryAsksFor) {
    for (auto [card, level] :
         {std::pair("H100", "level 0"), std::pair("A100-SXM4-40GB", "level 3")}) {
        Outcome plan = call({"plan", "--model", "gpt2-xl", "--batch-size", "16", "--card", card});
        EXPECT_NE(plan.out.find(level), std::string::npos) << plan.out;
        EXPECT_EQ(plan.out.find("between nodes"), std::string::npos) << plan.out;
    }
}

TEST_F(Cli, RatesOfAPlanCanBeOverridden) {
    auto step_ms = [&](std::vector<std::string> more) {
        std::vector<std::string> words = {"plan",   "--model", "gpt2",    "--card", "A100",
                                          "--gpus", "8",       "--nodes", "2"};
        words.insert(words.end(), more.begin(), more.end());
        Outcome plan = call(words);
        EXPECT_EQ(plan.code, 0) << plan.err;
        return number_after(plan.out, "\nstep       ");
    };
    double usual = step_ms({});
    EXPECT_GT(step_ms({"--link", "0.1"}), 2 * usual);
    EXPECT_GT(step_ms({"--node-link", "0.1"}), 2 * usual);
    EXPECT_GT(step_ms({"--share", "0.1"}), 2 * usual);
    EXPECT_EQ(step_ms({"--share", "0.6"}), usual) << "as published for the card";
}

TEST_F(Cli, AClusterThatCannotBeIsRefused) {
    const char* cases[][2] = {{"--card", "abacus"}, {"--nodes", "0"},     {"--nodes", "x"},
                              {"--link", "0"},      {"--link", "nan"},    {"--link", "inf"},
                              {"--link", "-1"},     {"--node-link", "0"}, {"--share", "0"},
                              {"--share", "1.5"},   {"--gpus", "0"},      {"--gpus", "1025"},
                              {"--nodes", "16385"}, {"--lnik", "3"}};
    for (auto [option, value] : cases) {
        std::vector<std::string> words = {"plan", option, value};
        if (std::string(option) != "--card") words.insert(words.end(), {"--card", "H100"});
        expect_error(call(words), 2, option);
    }
    expect_error(call({"plan", "--card", "H100", "--gpus", "8", "--nodes", "4000"}), 2,
                 "--nodes 4000: of 8 GPUs each");
    expect_error(call({"plan", "--card", "H100", "--gpus", "3", "--total-batch-tokens", "65536"}),
                 2, "--total-batch-tokens 65536: not a multiple");
    expect_error(call({"plan", "--card", "H100", "--dtype", "fp32"}), 2, "--dtype fp32");
    if (std::string(gpt2_program()) == "train_gpt2")
        expect_error(call({"plan", "--gpus", "2"}), 2, "--card is missing: must be one of H100");
}

// ==== the scripts ================================================================================

// A script of this project, called in its folder with further variables; without any of a launcher.
class PlanScripts : public Cli {
  protected:
    void SetUp() override {
        Cli::SetUp();
        if (!fs::exists("scripts/recipe.sh")) GTEST_SKIP() << "scripts/ is not in this folder";
    }

    // `program` stands for train_gpt2cu.
    Outcome script(const std::string& words, const std::string& variables = "") const {
        std::string clean = "env -u GPUS -u NODES -u DATA -u OUT -u CARD -u PORT -u RENDEZVOUS";
        for (const char* name : {"GPT2_WORLD", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_ID",
                                 "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "NCCL_DEBUG"})
            clean += std::string(" -u ") + name;
        std::string command = clean + " TRAIN_GPT2=" + shell_quoted(program_) + " " + variables +
                              " scripts/" + words + " >" + shell_quoted(path("stdout")) + " 2>" +
                              shell_quoted(path("stderr"));
        int status = system(command.c_str());
        return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(path("stdout")),
                read_file(path("stderr"))};
    }

    // The contract of every error: exit code 2, one line, and in it what matters.
    static void expect_bad(const Outcome& outcome, const std::string& part) {
        EXPECT_EQ(outcome.code, 2) << outcome.err;
        EXPECT_EQ(outcome.error_lines(), 1u) << outcome.err;
        EXPECT_NE(outcome.err.find(part), std::string::npos) << outcome.err << "lacks " << part;
    }
    static void expect_has(const std::string& text, const std::string& part) {
        EXPECT_NE(text.find(part), std::string::npos) << text << "\nlacks " << part;
    }
    static void expect_lacks(const std::string& text, const std::string& part) {
        EXPECT_EQ(text.find(part), std::string::npos) << text << "\nhas " << part;
    }

    // A program that says with what words it was called.
    void pretend() {
        program_ = path("train_gpt2cu");
        write("train_gpt2cu", "#!/bin/sh\necho called \"$@\"\n");
        fs::permissions(program_, fs::perms::owner_all);
    }
    std::string program_ = binary();
};

struct Recipe {
    const char *size, *model, *batch, *total, *steps, *rate, *run_time_on_8_h100;
};
constexpr Recipe kRecipes[] = {
    {"124M", "gpt2", "64", "524288", "18865", "6e-4", "35:27"},
    {"350M", "gpt2-medium", "64", "524288", "60000", "3e-4", "5:19:29"},
    {"774M", "gpt2-large", "32", "524288", "286102", "2.5e-4", "2.3 days"},
    {"1558M", "gpt2-xl", "16", "1048576", "32000", "6e-4", "24:15:07"},
};

TEST_F(PlanScripts, DryRunsPrintThePlanAndTheCommand) {
    for (const Recipe& r : kRecipes) {
        std::string size = r.size;
        Outcome dry = script("run_gpt2_" + size + ".sh --dry-run", "GPUS=8");
        ASSERT_EQ(dry.code, 0) << dry.err;
        EXPECT_EQ(dry.err, "");
        expect_has(dry.out, "1 node x 8 H100");
        expect_has(dry.out, std::string("steps, about ") + r.run_time_on_8_h100 + "\n");
        expect_has(dry.out, "\ncommand    " + program_ + " train ");
        std::string command = dry.out.substr(dry.out.find("\ncommand"));
        for (std::string part :
             {std::string("--model ") + r.model, std::string("--batch-size ") + r.batch,
              std::string("--total-batch-tokens ") + r.total, std::string("--steps ") + r.steps,
              std::string("--learning-rate ") + r.rate, "--out runs/gpt2_" + size,
              std::string("--gpus 8"), std::string("'dev/data/fineweb_edu/train_*.bin'")})
            expect_has(command, part);
    }
}

TEST_F(PlanScripts, WordsOfTheCommandLineComeBeforeTheRecipe) {
    Outcome dry =
        script("run_gpt2_124M.sh --steps 7 --dry-run --out 'my run' --gpus 2", "CARD=A100");
    ASSERT_EQ(dry.code, 0) << dry.err;
    expect_has(dry.out, "1 node x 2 A100");
    expect_has(dry.out, "run        7 steps");
    std::string command = dry.out.substr(dry.out.find("\ncommand"));
    expect_has(command, " --steps 7 --out 'my run' --gpus 2 ");
    for (const char* once : {"18865", "--gpus 8", "runs/gpt2", "--dry-run"})
        expect_lacks(command, once);
    // Whole batches make up a step on any number of GPUs that allows it.
    dry = script("run_gpt2_124M.sh --dry-run", "GPUS=8 NODES=4");
    expect_has(dry.out, "4 nodes x 8 H100");
    expect_has(dry.out, "--batch-size 16 ");
    expect_lacks(dry.out, "--gpus");
    EXPECT_EQ(script("run_gpt2_350M.sh --help").out.rfind("GPT-2 350M", 0), 0u);
}

TEST_F(PlanScripts, TheGpusOfThisMachineAreCounted) {
    auto with_smi = [&](const std::string& body, const std::string& words) {
        write("nvidia-smi", "#!/bin/sh\n" + body + "\n");
        fs::permissions(path("nvidia-smi"), fs::perms::owner_all);
        return script("run_gpt2_124M.sh " + words, "PATH='" + folder_ + "':\"$PATH\"");
    };
    expect_has(with_smi("echo GPU 0: A; echo GPU 1: B", "--dry-run").out, " --gpus 2\n");
    Outcome none = with_smi("exit 9", "--dry-run");
    expect_has(none.out, " --gpus 8\n");
    expect_bad(with_smi("exit 9", ""), "no GPU found here; GPUS=N");
}

TEST_F(PlanScripts, BadUsageOfARecipeIsOneLine) {
    expect_bad(script("run_gpt2_124M.sh --dry-run", "GPUS=x"), "GPUS x: must be a whole number");
    expect_bad(script("run_gpt2_124M.sh --dry-run --gpus 0"), "GPUS 0");
    expect_bad(script("run_gpt2_124M.sh --dry-run", "NODES=0"), "NODES 0");
    expect_bad(script("run_gpt2_124M.sh", "GPUS=2 NODES=2"), "scripts/multi_node");
    expect_bad(script("run_gpt2_124M.sh --dry-run --lerning-rate 1"), "--learning-rate?");
    expect_bad(script("run_gpt2_124M.sh --dry-run words"), "words");
    expect_bad(script("run_gpt2_124M.sh --dry-run", "CARD=abacus"), "abacus");
    expect_bad(script("run_gpt2_1558M.sh --dry-run", "GPUS=3"), "--total-batch-tokens");
    expect_bad(script("run_gpt2_124M.sh", "GPUS=1 DATA=" + shell_quoted(path("nowhere"))),
               "val_000000.bin: is not there");
    program_ = path("no_program");
    expect_bad(script("run_gpt2_124M.sh", "GPUS=1"), "make builds it");
    program_ = path("train_gpt2cu");
    expect_bad(script("run_gpt2_124M.sh", "GPUS=1"), "make cuda builds it");
}

TEST_F(PlanScripts, ARecipeRunsOnceForEachRankOfALauncher) {
    pretend();
    for (const char* name : {"val_000000.bin", "train_000100.bin"}) write(name, "tokens");
    std::string data = "DATA=" + shell_quoted(folder_) + " ";
    Outcome alone = script("run_gpt2_124M.sh --seed 3", data + "GPUS=8");
    ASSERT_EQ(alone.code, 0) << alone.err;
    expect_has(alone.out, "called train ");
    expect_has(alone.out, "--seed 3");
    expect_has(alone.out, " --gpus 8");
    for (const char* variables :
         {"OMPI_COMM_WORLD_SIZE=16", "PMI_SIZE=16", "TORCHELASTIC_RUN_ID=x WORLD_SIZE=16",
          "SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=16"}) {
        Outcome rank = script("run_gpt2_124M.sh", data + variables);
        ASSERT_EQ(rank.code, 0) << rank.err;
        expect_lacks(rank.out, "--gpus");
        expect_has(rank.out, "--batch-size 32 ");
    }
    // A batch script is no step, and starts the processes itself.
    Outcome batch =
        script("run_gpt2_124M.sh", data + "SLURM_STEP_ID=4294967291 SLURM_NTASKS=16 GPUS=4");
    expect_has(batch.out, " --gpus 4");
    // Nor does the shell of `srun --pty` stand for GPUs that it is asked to use.
    const std::string shell = data + "SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1 ";
    expect_has(script("run_gpt2_124M.sh", shell + "GPUS=16").out, " --gpus 16");
    expect_has(script("run_gpt2_124M.sh --gpus 16", shell).out, "--batch-size 32 ");
    expect_lacks(script("run_gpt2_124M.sh", shell).out, "--gpus");
}

TEST_F(PlanScripts, SeveralNodesAreStartedByEachLauncher) {
    Outcome mpi = script("multi_node/mpirun.sh --dry-run node1:8,node2:8 124M --save-every 9",
                         "NCCL_SOCKET_IFNAME=eth0 LD_LIBRARY_PATH=/opt/nccl/lib");
    ASSERT_EQ(mpi.code, 0) << mpi.err;
    expect_has(mpi.out, "mpirun -np 16 --host node1:8,node2:8 ");
    expect_has(mpi.out, "-x NCCL_SOCKET_IFNAME ");
    expect_has(mpi.out, "-x LD_LIBRARY_PATH ");
    expect_has(mpi.out, "run_gpt2_124M.sh --rendezvous node1:29500 --save-every 9\n");
    Outcome torch =
        script("multi_node/torchrun.sh --dry-run 4 3 node1 774M --out 'my run'", "GPUS=4");
    ASSERT_EQ(torch.code, 0) << torch.err;
    expect_has(torch.out, "torchrun --nnodes 4 --node-rank 3 --nproc-per-node 4 ");
    expect_has(torch.out, "run_gpt2_774M.sh --rendezvous node1:29501 --out 'my run'\n");
    Outcome slurm = script("multi_node/slurm.sbatch --dry-run 1558M --seed 2");
    ASSERT_EQ(slurm.code, 0) << slurm.err;
    EXPECT_EQ(slurm.out.rfind("srun ", 0), 0u) << slurm.out;
    expect_has(slurm.out, "run_gpt2_1558M.sh --seed 2\n");
    slurm = script("multi_node/slurm.sbatch --dry-run 350M", "RENDEZVOUS=file:/shared");
    expect_has(slurm.out, "run_gpt2_350M.sh --rendezvous file:/shared\n");
    slurm = script("multi_node/slurm.sbatch --dry-run 124M", "SLURM_CPUS_PER_TASK=4");
    expect_has(slurm.out, "srun --kill-on-bad-exit=1 --cpus-per-task=4 ");
    // With CDPATH, `cd` may say where it went.
    for (const char* words : {"mpirun.sh --dry-run node1:8 124M", "slurm.sbatch --dry-run 124M",
                              "torchrun.sh --dry-run 1 0 node1 124M"}) {
        Outcome outcome = script(std::string("multi_node/") + words, "CDPATH=.");
        EXPECT_EQ(outcome.code, 0) << outcome.err;
    }
}

TEST_F(PlanScripts, BadUsageOfALauncherIsOneLine) {
    const char* cases[][2] = {{"mpirun.sh", "usage: mpirun.sh"},
                              {"mpirun.sh --dry-run node1 124M", "must be HOST:GPUS"},
                              {"mpirun.sh --dry-run node1:8,node2:x 124M", "GPUs of node2"},
                              {"mpirun.sh --dry-run node1:8,node2:0 124M", "GPUs of node2"},
                              {"mpirun.sh --dry-run node1:8 125M", "size '125M'"},
                              {"torchrun.sh --dry-run 2 1 node1", "usage: torchrun.sh"},
                              {"torchrun.sh --dry-run 2 2 node1 124M", "NODE 2"},
                              {"torchrun.sh --dry-run 0 0 node1 124M", "NODES 0"},
                              {"torchrun.sh --dry-run 2 0 node1 huge", "size 'huge'"},
                              {"slurm.sbatch --dry-run", "usage: sbatch"},
                              {"slurm.sbatch --dry-run 7M", "size '7M'"},
                              {"slurm.sbatch 124M", "is for sbatch"}};
    for (auto [words, part] : cases) expect_bad(script(std::string("multi_node/") + words), part);
    expect_bad(script("multi_node/mpirun.sh --dry-run node1:8 124M", "PORT=x"), "PORT x");
    expect_bad(script("multi_node/torchrun.sh --dry-run 1 0 node1 124M", "GPUS=none"), "GPUS none");
}

}  // namespace
