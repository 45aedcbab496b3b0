// The tests of trainer.h: schedules, options, plans, runs and their evaluation; and the program
// that holds these and the tests of what is saved and of the command line.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <limits>
#include <optional>
#include <random>
#include <set>
#include <thread>

#include "../../commands.h"
#include "models.h"
#include "tools.h"

namespace {

// English enough for a tokenizer to find something in it, and no period that a window could see.
std::string some_text(size_t words) {
    constexpr const char* kWords[] = {"the ",  "model ",  "reads ", "tokens ",  "and ",
                                      "then ", "writes ", "them, ", "again.\n", "Two "};
    std::string text;
    uint32_t state = 12345;
    for (size_t i = 0; i < words; i++) {
        state = state * 1664525 + 1013904223;
        text += kWords[(state >> 16) % std::size(kWords)];
    }
    return text;
}

// A run of a model so small that a step takes a millisecond, on one thread, seen by nobody.
struct SmallRun {
    std::string folder = test_folder();
    TrainOptions options;

    SmallRun() {
        write_file_atomic(folder + "/text.txt", some_text(700));
        options.data = {folder + "/text.txt"};
        options.tokenizer = "bpe:270";
        options.model.layers = 2, options.model.heads = 2, options.model.channels = 12;
        options.model.context = 9;
        options.batch_size = 4, options.steps = 6, options.warmup = 2;
        options.eval_every = 2, options.eval_batches = 2;
        options.sample_every = 0, options.save_every = 3, options.keep = 0;
        options.compute.threads = 1, options.compute.dtype = dtype_name(test_dtype());
        options.peak = {1e9, "given"};
        options.out = folder + "/run";
        static FILE* const nobody = fopen("/dev/null", "w");
        options.screen = nobody;
    }
    int train() const {
        return train_command(options, now_s(), std::string(gpt2_program()) + " train");
    }
    // What people see of it.
    std::string train_and_read(int code = 0) {
        FILE* file = fopen((folder + "/screen").c_str(), "w");
        std::swap(file, options.screen);
        EXPECT_EQ(train(), code);
        std::swap(file, options.screen);
        fclose(file);
        return read_file(folder + "/screen");
    }

    // Lets every run do one step more and stop, as if a signal had come, until one finishes.
    int train_step_by_step() {
        int code = 0, parts = 0;
        do {
            stop_signal() = SIGINT;
            code = train();
            parts++;
        } while (code == 130 && parts < 100);
        stop_signal() = 0;
        EXPECT_EQ(parts, int(options.steps));
        return code;
    }
    std::string out(const std::string& name) const { return options.out + "/" + name; }
    std::vector<json> log() const {
        std::vector<json> records;
        std::string text = read_file(out("log.jsonl"));
        for (size_t begin = 0; begin < text.size();) {
            size_t end = text.find('\n', begin);
            json record = json::parse(text.substr(begin, end - begin));
            if (!record.contains("event")) records.push_back(record);
            begin = end + 1;
        }
        return records;
    }
    json state() const { return json::parse(read_file(out("last/trainer.json"))); }
    // Lets one step be made, and what was saved say something else.
    void stop_after_one_step() const {
        stop_signal() = SIGINT;
        EXPECT_EQ(train(), 130);
        stop_signal() = 0;
    }
    template <typename F>
    void change_state(const std::string& checkpoint, F change) const {
        std::string path = out(checkpoint + "/trainer.json");
        ordered_json state = ordered_json::parse(read_file(path));
        uint64_t step = state.at("step");
        for (const char* key : {"step", "files", "checksum"}) state.erase(key);
        change(state);
        fs::remove(path);
        write_trainer_json(out(checkpoint), step, state, {});
    }
};

// The working folder, for as long as it lives.
struct InFolder {
    fs::path before = fs::current_path();
    explicit InFolder(const std::string& folder) { fs::current_path(folder); }
    InFolder(const InFolder&) = delete;
    InFolder& operator=(const InFolder&) = delete;
    ~InFolder() { fs::current_path(before); }
};

void expect_same_file(const std::string& a, const std::string& b) {
    EXPECT_EQ(hash_text(hash_bytes(read_file(a).data(), read_file(a).size())),
              hash_text(hash_bytes(read_file(b).data(), read_file(b).size())))
        << a << " and " << b;
}

double largest_difference(const std::string& a, const std::string& b) {
    SafetensorsFile first(a), second(b);
    double largest = 0;
    for (const auto& [name, entry] : first.entries()) {
        std::vector<double> x(entry.count()), y(entry.count());
        first.read(name, x.data());
        second.read(name, y.data());
        for (size_t i = 0; i < x.size(); i++) largest = std::max(largest, std::abs(x[i] - y[i]));
    }
    return largest;
}

TrainOptions schedule_options(const std::string& schedule) {
    TrainOptions o;
    o.schedule = schedule, o.learning_rate = 1, o.warmup = 4, o.final_lr_fraction = 0.2;
    return o;
}

// The rate of update `step` in a run of 14 steps, 10 of them after the warm-up.
double rate_of(const std::string& schedule, size_t step) {
    Goal goal{14, 0};
    return learning_rate(schedule_options(schedule), goal, step, run_progress(goal, step, 0, 0, 0));
}

TEST(Schedule, WarmUpRisesLinearlyToTheHighestRate) {
    for (const char* schedule : {"cosine", "linear", "constant", "wsd"}) {
        EXPECT_DOUBLE_EQ(rate_of(schedule, 0), 0.25);
        EXPECT_DOUBLE_EQ(rate_of(schedule, 1), 0.50);
        EXPECT_DOUBLE_EQ(rate_of(schedule, 3), 1.00);
        EXPECT_DOUBLE_EQ(rate_of(schedule, 4), 1.00) << schedule;
    }
}

TEST(Schedule, FallsAsItsNameSaysAndIsHeldAfterTheEnd) {
    EXPECT_DOUBLE_EQ(rate_of("cosine", 9), 0.6);
    EXPECT_DOUBLE_EQ(rate_of("cosine", 6), 0.2 + 0.8 * 0.5 * (1 + std::cos(M_PI * 0.2)));
    EXPECT_DOUBLE_EQ(rate_of("linear", 9), 0.6);
    EXPECT_DOUBLE_EQ(rate_of("linear", 6), 0.84);
    EXPECT_DOUBLE_EQ(rate_of("constant", 9), 1.0);
    EXPECT_DOUBLE_EQ(rate_of("wsd", 12), 1.0);
    EXPECT_NEAR(rate_of("wsd", 13), 0.6, 1e-12);
    for (const char* schedule : {"cosine", "linear", "wsd"})
        for (size_t step : {14, 15, 1000}) EXPECT_DOUBLE_EQ(rate_of(schedule, step), 0.2);
    EXPECT_DOUBLE_EQ(rate_of("constant", 1000), 1.0);
}

TEST(Schedule, NoWarmUpStartsAtTheHighestRate) {
    TrainOptions o = schedule_options("linear");
    o.warmup = 0;
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{10, 0}, 0, 0), 1.0);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{10, 0}, 5, 0.5), 0.6);
}

TEST(Schedule, TheWarmUpIsATenthOfTheRunUnlessItIsGiven) {
    TrainOptions o = schedule_options("linear");
    o.warmup = -1;
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{40, 0}, 1, 0.025), 0.5);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{40, 0}, 4, 0.1), 1.0);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{40, 0}, 22, 0.55), 0.6);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{5, 0}, 0, 0), 1.0);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{0, 60}, 1000, 0.05), 0.5);
    EXPECT_DOUBLE_EQ(learning_rate(o, Goal{0, 60}, 1000, 0.55), 0.6);
    EXPECT_GT(learning_rate(o, Goal{0, 60}, 0, 0), 0);
}

TEST(Schedule, FollowsTheClockWhenOnlyTimeIsLimited) {
    Goal goal{0, 100};
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 0, 20, 0), 0.0);
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 40, 20, 0), 0.5);
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 90, 20, 0), 1.0);
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 1, 200, 0), 1.0);
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 40, 20, 40), 0.0);
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 60, 20, 40), 0.5);
    EXPECT_DOUBLE_EQ(run_progress(goal, 7, 80, 20, 80), 1.0);
    EXPECT_DOUBLE_EQ(learning_rate(schedule_options("linear"), goal, 7, 0.5), 0.6);
    Goal both{10, 100};
    EXPECT_DOUBLE_EQ(run_progress(both, 5, 90, 20, 0), 0.5) << "steps decide where they are given";
}

TEST(Options, NumbersOutsideTheirRangeAreRefused) {
    auto refused = [](const CLI::Validator& check, std::string word) { return check(word) != ""; };
    CLI::Validator whole = in_range<int>(1, 100), number = in_range<double>(0, 10);
    for (const char* word : {"1", "100", "+7"}) EXPECT_FALSE(refused(whole, word)) << word;
    for (const char* word : {"0", "101", "-1", "1.5", "1e1", "0x10", "", "abc", "7a", "nan", "inf",
                             "99999999999999999999"})
        EXPECT_TRUE(refused(whole, word)) << word;
    for (const char* word : {"0", "10", "2e-3", ".5"}) EXPECT_FALSE(refused(number, word)) << word;
    for (const char* word : {"-0.1", "10.1", "nan", "NaN", "inf", "-inf", "1e999", "0x1p2", ""})
        EXPECT_TRUE(refused(number, word)) << word;
}

TEST(Options, TheNearestWordIsSuggested) {
    EXPECT_EQ(edit_distance("batch", "batch"), 0u);
    EXPECT_EQ(edit_distance("bacth", "batch"), 1u);
    EXPECT_EQ(edit_distance("", "abc"), 3u);
    EXPECT_EQ(nearest("--bacth-size", {"--steps", "--batch-size", "--beta1"}), "--batch-size");
}

TEST(Options, AccumulationFollowsFromTheTokensOfAStep) {
    TrainOptions o;
    o.batch_size = 4;
    EXPECT_EQ(accumulation(o, 8, 1), 1);
    o.total_batch_tokens = 128;
    EXPECT_EQ(accumulation(o, 8, 1), 4);
    EXPECT_EQ(accumulation(o, 8, 2), 2);
    o.total_batch_tokens = 100;
    std::string error = error_of([&] { accumulation(o, 8, 1); });
    EXPECT_NE(error.find("96 or 128"), std::string::npos) << error;
    o.batch_size = 1 << 24;
    EXPECT_EQ(error_of([&] { accumulation(o, 1 << 20, 1); }).substr(0, 2), "2 ");
}

TEST(Options, ModelSizesOverrideTheNamedModelAndMustFit) {
    ModelOptions o;
    o.model = "tiny", o.layers = 3;
    GPT2Config config = choose_model(o).config;
    EXPECT_EQ(config.layers, 3);
    EXPECT_EQ(config.channels, 128);
    o.heads = 5, o.channels = 64;
    EXPECT_EQ(error_of([&] { choose_model(o); }),
              "2 --heads 5 --channels 64: heads must divide channels; 4 or 8 heads would fit, or "
              "60 or 65 channels");
    o.model = "gpt3";
    EXPECT_EQ(error_of([&] { choose_model(o); }).substr(0, 22), "2 --model gpt3: no suc");
    EXPECT_EQ(choose_sequence_length(0, config), 128);
    EXPECT_EQ(choose_sequence_length(5, config), 5);
    EXPECT_EQ(error_of([&] { choose_sequence_length(129, config); }).substr(0, 2), "2 ");
}

TEST(Plan, AddsUpToWhatTheTwinAllocates) {
    enum { kTrains, kGenerates, kGeneratesInInt8 };
    for (int use : {kTrains, kGenerates, kGeneratesInInt8}) {
        bool training = use == kTrains;
        for (int generate : {0, 1, 3}) {
            GPT2Config config = default_config();
            config.vocab_size = 1000;
            GPT2Shape shape = test_shape(3, 17, training, generate);
            shape.int8 = use == kGeneratesInInt8;
            TwinSizes sizes = gpt2_sizes(config, shape);
            size_t parameters = sizes.parameters, narrow = 0, exact = 0;
            auto count = [&](Dtype dtype) {
                shape.dtype = dtype, narrow = 0, exact = 0;
                for (const ActivationRow& row : activation_table(config, shape))
                    (row.narrow ? narrow : exact) += row.allocated();
            };
            count(Dtype::fp32);
            exact += parameters * (training ? 4 : 1);
            size_t bytes = (narrow + exact) * sizeof(real) + sizes.int8_bytes;
            EXPECT_EQ(total_bytes(tensor_memory(config, shape)), bytes);
            EXPECT_LE(bytes, total_bytes(gpt2_memory(config, shape)));
            count(Dtype::bf16);
            if (training) exact += parameters * 4;  // sampling needs a copy in bf16 alone
            EXPECT_EQ(total_bytes(tensor_memory(config, shape)),
                      2 * (narrow + parameters) + exact * sizeof(real) + sizes.int8_bytes);
        }
    }
}

// A level keeps what its name says for one layer in place of all.
TEST(Plan, EachLevelOfRecomputingSavesItsRows) {
    GPT2Config config = default_config();
    config.layers = 5;
    GPT2Shape shape = training_shape(3, 17);
    ActivationTable all = activation_table(config, shape);
    const std::set<int> gelu = {a_fch_gelu}, norms = {a_ln1, a_ln2};
    for (int level = 1; level < kRecomputeLevels; level++) {
        shape.recompute = level;
        ActivationTable table = activation_table(config, shape);
        for (int i = 0; i < kActivationRows; i++) {
            bool saved = all[size_t(i)].count == 5;
            bool once = gelu.count(i) > 0 || (level >= 2 && norms.count(i) > 0) ||
                        (level == 3 && i != a_residual3);
            EXPECT_EQ(table[size_t(i)].count, saved && once ? 1 : all[size_t(i)].count)
                << all[size_t(i)].name << ", level " << level;
        }
    }
    shape.training = false;
    for (const ActivationRow& row : activation_table(config, shape)) EXPECT_LE(row.count, 1u);
}

// The largest batch fits and the next does not; of the levels, the lowest that fits is taken.
TEST(Plan, WhatFitsIsFoundExactly) {
    GPT2Config config = default_config();
    config.layers = 6, config.context = 512;
    GPT2Shape shape = training_shape(1, 512);
    auto bytes = [&](int batch, int level) {
        shape.B = batch, shape.recompute = level;
        return total_bytes(gpt2_memory(config, shape));
    };
    for (int batch : {1, 2, 3, 64, 65, 1000}) {
        for (int level = 0; level < kRecomputeLevels; level++) {
            size_t free = bytes(batch, level);
            EXPECT_EQ(largest_batch(config, shape, free), batch);
            EXPECT_EQ(largest_batch(config, shape, free - 1), batch - 1);
            EXPECT_EQ(choose_recompute("auto", config, shape, free), level);
            EXPECT_EQ(choose_recompute("2", config, shape, free), 2);
        }
    }
    EXPECT_EQ(choose_recompute("auto", config, shape, 0), 0) << "nobody knows what is free";
    EXPECT_EQ(choose_recompute("auto", config, shape, 1), 3) << "nothing fits";

    size_t free = bytes(8, 3);
    bytes(8, 1);
    EXPECT_EQ(what_would_fit(config, shape, free), "--recompute 3 would fit");
    int batch = largest_batch(config, shape, free);
    bytes(100, 1);
    EXPECT_EQ(what_would_fit(config, shape, free), format("--batch-size %d would fit", batch));
    size_t least = bytes(1, 3);
    bytes(100, 1);
    EXPECT_EQ(what_would_fit(config, shape, least), "--batch-size 1 --recompute 3 would fit");
    EXPECT_EQ(what_would_fit(config, shape, least - 1), "a smaller --sequence-length would fit");
    EXPECT_EQ(what_would_fit(config, shape, 1000), "a smaller --model would fit");
}

TEST(Plan, SaysWhatFitsAndWhetherTheRunDoes) {
    GPT2Config config = default_config();
    config.layers = 6, config.context = 512;
    GPT2Shape shape = training_shape(8, 512);
    size_t needed = total_bytes(gpt2_memory(config, shape));
    std::string size = readable_bytes(double(needed));
    std::vector<std::string> lines = fit_report(config, shape, needed);
    ASSERT_EQ(lines.size(), 2u);
    EXPECT_EQ(lines[0], "fits       --batch-size 8 --recompute 0 at most; as asked: " + size +
                            " of " + size + " (--recompute 0)");
    std::string above = "           --batch-size ";
    for (int level = 1; level < kRecomputeLevels; level++) {
        shape.recompute = level;
        above += format(level == 1 ? "%d with --recompute %d" : ", %d with %d",
                        largest_batch(config, shape, needed), level);
    }
    EXPECT_EQ(lines[1], above);
    shape.recompute = 0;
    lines = fit_report(config, shape, needed - 1);
    EXPECT_EQ(lines[0].find("fits       --batch-size 7 --recompute 0 at most; as asked"), 0u);
    EXPECT_NE(lines[0].find(" (--recompute 0), too much"), std::string::npos) << lines[0];
    lines = fit_report(config, shape, 1000);
    ASSERT_EQ(lines.size(), 1u);
    EXPECT_EQ(lines[0].find("fits       no batch; as asked"), 0u) << lines[0];
    EXPECT_EQ(fit_report(config, shape, 0)[0].find("fits       unknown"), 0u);
}

TEST(Plan, NumbersForPeopleAreReadable) {
    EXPECT_EQ(with_commas(0), "0");
    EXPECT_EQ(with_commas(999), "999");
    EXPECT_EQ(with_commas(1234567), "1,234,567");
    EXPECT_EQ(readable_bytes(1536), "1.5 KiB");
    EXPECT_EQ(readable_time(3723), "1:02:03");
    EXPECT_EQ(readable_time(INFINITY), "years");
    EXPECT_EQ(readable_rate(23456), "23.5k");
}

TEST(Data, TheLastTenthOfShardsIsForValidation) {
    std::string folder = test_folder();
    std::vector<int> ids(100);
    for (int i = 0; i < 100; i++) ids[size_t(i)] = i;
    write_shard(folder + "/a.bin", ids);
    write_shard(folder + "/b.bin", std::vector<int>(ids.begin(), ids.begin() + 5));
    TrainOptions o;
    o.data = {folder + "/*.bin"};
    TrainingData data = read_data(o, choose_model(o.model), folder);
    EXPECT_EQ(count_tokens(data.train), 94u);
    EXPECT_EQ(count_tokens(data.val), 11u);
    ASSERT_EQ(data.val.size(), 2u);
    EXPECT_EQ(data.train.back()[93], 93);
    EXPECT_EQ(data.val[0][0], 94);
    EXPECT_EQ(data.val[1][4], 4);
}

TEST(Data, TextShorterThanAWindowSaysWhatWouldFit) {
    SmallRun run;
    write_file_atomic(run.options.data[0], "ab");
    std::string error = error_of([&] { run.train(); });
    EXPECT_EQ(error.substr(0, 2), "2 ");
    EXPECT_NE(error.find("text.txt"), std::string::npos) << error;
    write_file_atomic(run.options.data[0], "abcdefghijk");
    run.options.tokenizer = "bytes";
    run.options.model.context = 64;
    error = error_of([&] { run.train(); });
    EXPECT_NE(error.find("--sequence-length 8"), std::string::npos) << error;
}

TEST(Data, ATrainedTokenizerIsKeptAndADamagedOneMadeAnew) {
    std::string folder = test_folder(), text = some_text(300);
    uint64_t first = train_bpe_cached(text, 280, folder).fingerprint();
    std::string file;
    for (const auto& entry : fs::recursive_directory_iterator(folder))
        if (entry.path().filename() == "tokenizer.json") file = entry.path().string();
    ASSERT_NE(file, "");
    Tokenizer::train_bpe(text, 270).save(fs::path(file).parent_path().string());
    EXPECT_NE(train_bpe_cached(text, 280, folder).fingerprint(), first) << "taken from the cache";
    write_file_atomic(file, "{");
    EXPECT_EQ(train_bpe_cached(text, 280, folder).fingerprint(), first);
    std::vector<size_t> whole = {text.size(), text.size() + 5}, each(text.size());
    std::iota(each.begin(), each.end(), 1);
    EXPECT_EQ(train_bpe_cached(text, 280, folder, whole).fingerprint(), first);
    EXPECT_EQ(train_bpe_cached(text, 280, folder, each).vocab_size(), 257);
}

TEST(Data, WordsEndWhereDocumentsDo) {
    std::string folder = test_folder(), lines;
    for (int i = 0; i < 10; i++) lines += "{\"text\": \"one two\"}\n";
    write_file_atomic(folder + "/t.jsonl", lines);
    TrainOptions o;
    o.data = {folder + "/t.jsonl"};
    for (const char* tokenizer : {"words", "words:unk"}) {
        o.tokenizer = tokenizer;
        TrainingData data = read_text_data(o, ModelChoice(), folder + "/cache");
        EXPECT_EQ(data.tokenizer->encode("one two").size(), 2u);
        EXPECT_EQ(data.train_bytes, 63u);
        EXPECT_EQ(data.val_bytes, 7u) << "the last of ten documents";
    }
}

TEST(Run, WritesOneRecordAStepAndAModelThatLoads) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    std::vector<json> log = run.log();
    ASSERT_EQ(log.size(), 6u);
    for (size_t i = 0; i < log.size(); i++) {
        EXPECT_EQ(log[i].at("step"), i + 1);
        for (const char* key :
             {"train_loss", "learning_rate", "grad_norm", "tokens_per_s", "step_ms", "epoch"})
            EXPECT_TRUE(log[i].at(key).is_number()) << key;
        bool evaluated = i % 2 == 1;
        EXPECT_EQ(log[i].contains("val_loss"), evaluated);
        EXPECT_EQ(log[i].contains("val_bits_per_byte"), evaluated);
    }
    EXPECT_EQ(log[3].at("val_windows"), 8u) << "two batches on the way";
    EXPECT_GT(log[5].at("val_windows").get<size_t>(), 8u) << "and all of them at the end";
    EXPECT_NEAR(log[0].at("train_loss").get<double>(), std::log(270), 0.1);
    EXPECT_DOUBLE_EQ(log[0].at("learning_rate"), 1e-3);
    EXPECT_EQ(run.state().at("step"), 6u);
    EXPECT_TRUE(run.state().at("finished"));
    EXPECT_TRUE(describe_path(run.options.out).intact);
    EXPECT_TRUE(path_exists(run.out("step_00000003/model.safetensors")));
}

TEST(Run, ResumedAtEveryStepItEndsWithTheSameBits) {
    SmallRun whole, parts;
    for (SmallRun* run : {&whole, &parts}) {
        run->options.model.dropout = 0.2;
        run->options.total_batch_tokens = 72;
    }
    EXPECT_EQ(whole.train(), 0);
    EXPECT_EQ(parts.train_step_by_step(), 0);
    expect_same_file(whole.out("last/model.safetensors"), parts.out("last/model.safetensors"));
    expect_same_file(whole.out("last/optimizer.safetensors"),
                     parts.out("last/optimizer.safetensors"));
    std::vector<json> a = whole.log(), b = parts.log();
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); i++) {
        for (const char* key : {"step", "train_loss", "learning_rate", "grad_norm", "epoch"})
            EXPECT_EQ(a[i].at(key), b[i].at(key)) << key << " of record " << i;
        EXPECT_EQ(a[i].value("val_loss", 0.0), b[i].value("val_loss", 0.0));
    }
    for (const char* key : {"best_val_loss", "best_step", "evaluations_without_gain", "loader",
                            "tokens", "loss_trend", "bad_steps_in_a_row"})
        EXPECT_EQ(whole.state().at(key), parts.state().at(key)) << key;
}

TEST(Run, AStateIsReadAsItWasWritten) {
    RunState state;
    state.step = 1, state.tokens = 2, state.position = {3, 4}, state.elapsed_s = 5.5;
    state.best_loss = 6.5, state.best_step = 7, state.stale = 8, state.finished = true;
    state.evaluated_step = 19, state.begun_s = 21.5,
    state.owed = {{"event", "evaluation"}, {"step", 1}};
    state.dtype = "bf16", state.goal = {9, 10.5}, state.bad_steps = 11;
    state.trend = {12.5, 13.5, 14}, state.skipped = {{15, 16}, {17, 18}}, state.rollbacks = 20;
    json written = json::parse(to_json(state, {}, {}, 1).dump());
    written["step"] = 1u;
    RunState read = read_state(written, "a state");
    EXPECT_EQ(to_json(read, {}, {}, 1).dump(), to_json(state, {}, {}, 1).dump());
    EXPECT_EQ(read.step, 1u);
}

// What a run has used of its time and of its patience, and what was best, outlives a stop.
TEST(Run, TimePatienceAndTheBestOutliveAStop) {
    SmallRun patient;
    patient.options.learning_rate = 0;  // so that no evaluation is better than the first
    patient.options.steps = 50, patient.options.early_stop = 2;
    for (int i = 0; i < 5; i++) patient.stop_after_one_step();
    EXPECT_EQ(patient.train(), 0);
    EXPECT_EQ(patient.state().at("step"), 6u);
    EXPECT_EQ(patient.state().at("best_step"), 2u);
    EXPECT_EQ(linked_step(patient.options.out, "best"), "step_00000002");

    SmallRun ended;  // by its patience, in the step that a signal would have stopped it in
    ended.options.learning_rate = 0, ended.options.steps = 50, ended.options.early_stop = 1;
    for (int i = 0; i < 3; i++) ended.stop_after_one_step();
    stop_signal() = SIGINT;
    EXPECT_EQ(ended.train(), 0);
    stop_signal() = 0;
    EXPECT_EQ(ended.state().at("finished"), true);

    SmallRun timed;
    timed.stop_after_one_step();
    timed.change_state("step_00000001", [](ordered_json& state) { state["elapsed_s"] = 1000; });
    timed.options.time_limit_s = 500;
    EXPECT_EQ(timed.train(), 0);
    EXPECT_EQ(timed.state().at("step"), 2u) << "its time was over";
    EXPECT_GT(timed.log().back().at("elapsed_s").get<double>(), 1000);
    EXPECT_GT(timed.state().at("elapsed_s").get<double>(), 1000);
}

TEST(Run, TheSameCommandTwiceGivesTheSameBitsAndAnotherSeedOthers) {
    SmallRun a, b, c;
    c.options.seed = 7;
    for (SmallRun* run : {&a, &b, &c}) EXPECT_EQ(run->train(), 0);
    expect_same_file(a.out("last/model.safetensors"), b.out("last/model.safetensors"));
    EXPECT_GT(largest_difference(a.out("last/model.safetensors"), c.out("last/model.safetensors")),
              1e-3);
}

TEST(Run, FourMicroBatchesOfOneEqualOneOfFour) {
    SmallRun one, four;
    four.options.batch_size = 1;
    four.options.total_batch_tokens = 4 * 9;
    for (SmallRun* run : {&one, &four}) {
        run->options.model.dropout = 0.1;
        run->options.compute.dtype = "fp32";
        run->options.epsilon = 1e-4;  // where a gradient is nearly 0, Adam makes its rounding count
        EXPECT_EQ(run->train(), 0);
    }
    EXPECT_LT(
        largest_difference(one.out("last/model.safetensors"), four.out("last/model.safetensors")),
        2e-6);
    for (size_t i = 0; i < 6; i++)
        EXPECT_NEAR(one.log()[i].at("train_loss").get<double>(),
                    four.log()[i].at("train_loss").get<double>(), 1e-5);
}

// A step is looked at while the next one is at work, unless something needs it done: evaluating
// after every step waits for each, and changes neither the records nor the checkpoints.
TEST(Run, LookingAtStepsLaterChangesNoRecordAndNoCheckpoint) {
    SmallRun later, at_once;
    at_once.options.eval_every = 1;
    later.options.eval_every = 4, later.options.sample_every = 6, later.options.save_every = 5;
    for (SmallRun* run : {&later, &at_once}) {
        run->options.steps = 23, run->options.total_batch_tokens = 72;
        EXPECT_EQ(run->train(), 0);
    }
    std::vector<json> log = later.log(), expected = at_once.log();
    ASSERT_EQ(log.size(), 23u);
    ASSERT_EQ(expected.size(), 23u);
    for (size_t i = 0; i < 23; i++) {
        EXPECT_EQ(log[i].at("step"), i + 1);
        for (const char* key :
             {"step", "train_loss", "learning_rate", "grad_norm", "epoch", "tokens"})
            EXPECT_EQ(log[i].at(key), expected[i].at(key)) << key << " of record " << i;
        bool evaluated = i % 4 == 3 || i == 22;
        EXPECT_EQ(log[i].contains("val_loss"), evaluated) << i;
        if (evaluated) { EXPECT_EQ(log[i].at("val_loss"), expected[i].at("val_loss")) << i; }
        EXPECT_GT(log[i].at("step_ms").get<double>(), 0) << i;
        EXPECT_GE(log[i].at("elapsed_s").get<double>(),
                  i > 0 ? log[i - 1].at("elapsed_s").get<double>() : 0.0);
    }
    for (size_t step : {5, 10, 15, 20, 23}) {
        std::string name = step_name(step);
        RunState state = read_state(later.out(name), nullptr);
        EXPECT_EQ(state.step, step);
        EXPECT_EQ(state.tokens, step * 72);
        if (!path_exists(at_once.out(name))) continue;  // kept there as the best only
        RunState other = read_state(at_once.out(name), nullptr);
        EXPECT_EQ(state.position.epoch, other.position.epoch) << name;
        EXPECT_EQ(state.position.window, other.position.window) << name;
        expect_same_file(later.out(name) + "/model.safetensors",
                         at_once.out(name) + "/model.safetensors");
    }
    expect_same_file(later.out("last/optimizer.safetensors"),
                     at_once.out("last/optimizer.safetensors"));
}

TEST(Run, EveryLevelOfRecomputingTrainsToTheSameBits) {
    SmallRun plain;
    plain.options.model.dropout = 0.1;
    plain.options.recompute = "0";
    EXPECT_EQ(plain.train(), 0);
    for (const char* level : {"1", "2", "3"}) {
        SmallRun run;
        run.options.model.dropout = 0.1;
        run.options.recompute = level;
        std::string said = run.train_and_read();
        EXPECT_NE(said.find(std::string("recompute level ") + level), std::string::npos) << said;
        expect_same_file(plain.out("last/model.safetensors"), run.out("last/model.safetensors"));
    }
}

TEST(Run, OverfitsOneBatchToNearlyNothing) {
    SmallRun run;
    run.options.overfit_one_batch = true;
    run.options.model.channels = 32;
    run.options.steps = 250, run.options.learning_rate = 1e-2, run.options.weight_decay = 0;
    run.options.save_every = 0;
    EXPECT_EQ(run.train(), 0);
    EXPECT_LT(run.log().back().at("train_loss").get<double>(), 0.01);
    EXPECT_FALSE(run.log().back().contains("val_loss"));
}

TEST(Run, StopsEarlyWhenEvaluationsDoNotGain) {
    SmallRun run;
    run.options.learning_rate = 0;  // so that no evaluation is better than the first
    run.options.steps = 50, run.options.early_stop = 2;
    EXPECT_EQ(run.train(), 0);
    EXPECT_EQ(run.state().at("step"), 6u);
    EXPECT_EQ(run.state().at("best_step"), 2u);
    EXPECT_EQ(linked_step(run.options.out, "best"), "step_00000002");
    EXPECT_EQ(linked_step(run.options.out, "last"), "step_00000006");
}

TEST(Run, KeepsTheBestBesideTheNewest) {
    SmallRun run;
    run.options.learning_rate = 0, run.options.keep = 1, run.options.save_every = 1;
    EXPECT_EQ(run.train(), 0);
    EXPECT_TRUE(path_exists(run.out("step_00000002")));
    EXPECT_FALSE(path_exists(run.out("step_00000005")));
    EXPECT_TRUE(path_exists(run.out("step_00000006")));
}

TEST(Run, AFinishedRunIsNotTrainedOnUnlessMoreIsAskedFor) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    std::string error = error_of([&] { run.train(); });
    EXPECT_EQ(error.substr(0, 2), "2 ");
    EXPECT_NE(error.find("finished run of 6 steps"), std::string::npos) << error;
    run.options.steps = 8;
    EXPECT_EQ(run.train(), 0);
    EXPECT_EQ(run.log().size(), 8u);
    run.options.resume = "never";
    EXPECT_EQ(run.train(), 0);
    EXPECT_TRUE(path_exists(run.options.out + ".1/step_00000008")) << "set aside, not lost";
    EXPECT_EQ(run.log().size(), 8u);
}

// An evaluation counts once, however often a finished run is asked for no more than it has.
TEST(Run, AFinishedRunThatIsNamedAgainLosesNoPatience) {
    SmallRun run;
    run.options.learning_rate = 0;  // so that no evaluation is better than the first
    EXPECT_EQ(run.train(), 0);
    json before = run.state();
    EXPECT_EQ(before.at("evaluations_without_gain"), 2u);
    run.options.resume = run.options.out;
    for (int i = 0; i < 2; i++) {
        EXPECT_EQ(run.train(), 0);
        for (const char* key : {"step", "finished", "best_step", "evaluations_without_gain"})
            EXPECT_EQ(run.state().at(key), before.at(key)) << key;
        EXPECT_EQ(linked_step(run.options.out, "best"), "step_00000002");
    }
}

// A run that could not evaluate, or was killed while it did, does so when it goes on, and is then
// like one that was left alone.
TEST(Run, AnEvaluationThatIsOwedIsMadeUpFor) {
    SmallRun whole;
    EXPECT_EQ(whole.train(), 0);
    for (bool logged : {true, false}) {
        SmallRun run;
        for (int i = 0; i < 2; i++) run.stop_after_one_step();
        json record = run.log().back();
        EXPECT_EQ(record.at("step"), 2u);
        run.change_state("step_00000002", [&](ordered_json& state) {
            for (const char* key : {"best_step", "evaluated_step"}) state[key] = 0u;
            state["best_val_loss"] = nullptr;
            state["owed_evaluation"] = {{"event", "evaluation"}, {"step", 2u}};
            if (!logged) state["owed_evaluation"] = ordered_json::parse(record.dump());
        });
        EXPECT_EQ(run.train(), 0);
        ASSERT_EQ(run.log().size(), 6u) << "each step once";
        for (size_t i = 0; i < 6; i++)
            for (const char* key : {"train_loss", "val_loss"})
                EXPECT_EQ(run.log()[i].value(key, 0.0), whole.log()[i].value(key, 0.0)) << i;
        bool event = read_file(run.out("log.jsonl"))
                         .find(
                             "{\"event\":\"evaluation\",\"step\":2,"
                             "\"val_loss\":") != std::string::npos;
        EXPECT_EQ(event, logged);
        for (const char* key : {"best_val_loss", "best_step", "evaluations_without_gain"})
            EXPECT_EQ(run.state().at(key), whole.state().at(key)) << key;
        EXPECT_TRUE(run.state().at("owed_evaluation").is_null());
        EXPECT_EQ(linked_step(run.options.out, "best"), linked_step(whole.options.out, "best"));
    }
}

TEST(Run, AnotherModelSeedOrTextIsRefusedWithBothValues) {
    SmallRun run;
    stop_signal() = SIGINT;
    EXPECT_EQ(run.train(), 130);
    stop_signal() = 0;
    TrainOptions first = run.options;
    auto expect_refusal = [&](const std::string& what) {
        std::string error = error_of([&] { run.train(); });
        EXPECT_NE(error.find(what), std::string::npos) << error;
        run.options = first;
    };
    run.options.model.layers = 3;
    expect_refusal("layers is 2 there and 3 here");
    run.options.seed = 1;
    expect_refusal("seed is 42 there and 1 here");
    run.options.sequence_length = 5;
    expect_refusal("sequence length is 9 there and 5 here");
    run.options.tokenizer = "bytes";
    expect_refusal("vocabulary is 270 there and 257 here");
    run.options.windows = "random";
    expect_refusal("windows is \"shuffled\" there and \"random\" here");
    run.options.windows = "sliding";
    expect_refusal("windows is \"shuffled\" there and \"sliding\" here");
    run.options.separate_documents = true;
    expect_refusal("separate documents is false there and true here");
    run.options.batch_size = 8;
    expect_refusal("sequences a step is 4 there and 8 here");
    run.options.overfit_one_batch = true;
    expect_refusal("overfit one batch is false there and true here");
    run.options.model = {};
    run.options.model.model = run.out("last"), run.options.tokenizer = "auto";
    expect_refusal("started from is \"\" there and \"" + run.out("last"));
    write_file_atomic(run.options.data[0], some_text(701));
    expect_refusal("data is ");
}

TEST(Run, AnotherTokenizerOrStrideIsRefused) {
    SmallRun run;
    run.options.data = {run.folder + "/a.bin"};
    write_shard(run.options.data[0], random_ids(2000, 270, 1));
    Tokenizer::train_bpe(some_text(700), 270).save(run.folder);
    Tokenizer::train_bpe("others have other pairs, and so on, on and on", 270)
        .save(run.folder + "/run");
    run.options.tokenizer = run.folder + "/tokenizer.json";
    run.options.windows = "sliding";
    run.stop_after_one_step();
    run.options.stride = 4;
    std::string error = error_of([&] { run.train(); });
    EXPECT_NE(error.find("stride is 9 there and 4 here"), std::string::npos) << error;
    run.options.stride = 0;
    run.options.tokenizer = run.folder + "/run/tokenizer.json";
    error = error_of([&] { run.train(); });
    EXPECT_NE(error.find("tokenizer is "), std::string::npos) << error;
}

// Runs of before there were orders to choose from.
TEST(Run, AnOlderIdentityIsThatOfTheDefaultOrder) {
    ordered_json mine = {{"seed", 42}, {"windows", "shuffled"}, {"stride", 0}};
    mine["separate documents"] = false;
    json older = {{"seed", 42}};
    EXPECT_EQ(identity_difference(older, mine), "");
    mine["windows"] = "random";
    EXPECT_EQ(identity_difference(older, mine),
              "windows is \"shuffled\" there and \"random\" here");
    mine["windows"] = "shuffled", mine["separate documents"] = true;
    EXPECT_EQ(identity_difference(older, mine), "separate documents is false there and true here");
    mine = {{"layers", 2}};
    EXPECT_EQ(identity_difference(older, mine), "layers is nothing there and 2 here");
}

TEST(Run, TheModelThatItStartedFromMayBeSpelledInAnotherWay) {
    SmallRun run, tuned;
    run.options.steps = 2;
    EXPECT_EQ(run.train(), 0);
    InFolder inside(run.folder);
    tuned.options.model = {}, tuned.options.tokenizer = "auto", tuned.options.learning_rate = 0;
    tuned.options.model.model = "run/last";
    tuned.stop_after_one_step();
    EXPECT_EQ(tuned.state().at("run").at("started from"), "run/last");
    for (const std::string& path :
         {std::string("run/last/"), std::string("./run/last"), run.out("step_00000002")}) {
        tuned.options.model.model = path;
        tuned.stop_after_one_step();
    }
    EXPECT_EQ(tuned.log().size(), 4u);
    fs::copy("run/last/", "other");
    tuned.options.model.model = "other";
    std::string error = error_of([&] { tuned.train(); });
    EXPECT_NE(error.find("started from is "), std::string::npos) << error;
}

TEST(Run, EveryOrderOfWindowsIsResumedToTheSameBits) {
    for (const char* order : {"sliding", "random"})
        for (bool apart : {false, true}) {
            SmallRun whole, parts;
            for (SmallRun* run : {&whole, &parts}) {
                run->options.windows = order;
                run->options.stride = std::string(order) == "sliding" ? 4 : 0;
                run->options.separate_documents = apart;
                run->options.total_batch_tokens = 72;
                run->options.steps = 4;
                run->options.data.clear();
                for (int i = 0; i < 9; i++) {
                    run->options.data.push_back(run->folder + format("/%d.txt", i));
                    write_file_atomic(run->options.data.back(), some_text(90 + i));
                }
            }
            EXPECT_EQ(whole.train(), 0);
            EXPECT_EQ(parts.train_step_by_step(), 0);
            for (const char* file : {"last/model.safetensors", "last/optimizer.safetensors"})
                expect_same_file(whole.out(file), parts.out(file));
            json start = json::parse(read_file(whole.out("log.jsonl"))
                                         .substr(0, read_file(whole.out("log.jsonl")).find('\n')));
            EXPECT_EQ(start["run"]["windows"], order);
            EXPECT_EQ(start["run"]["separate documents"], apart);
        }
}

// Documents that are kept apart: the loss is the mean over the other targets, and so is the
// gradient, whatever stands where the loss is not.
TEST(Run, TargetsAcrossDocumentsHaveNoLossAndNoGradient) {
    constexpr int V = 23, T = 9, kEnd = 22;
    GPT2Config config;
    config.vocab_size = V, config.context = T;
    config.layers = 1, config.heads = 2, config.channels = 8;
    GPT2Shape shape{2, T};
    shape.training = true, shape.dtype = test_dtype();
    std::vector<int> inputs = random_ids(2 * T, V - 1, 5), targets = random_ids(2 * T, V - 1, 6);
    inputs[3] = inputs[8] = inputs[9] = kEnd;
    auto gradient = [&](std::vector<int> of, double* loss) {
        for (size_t b = 0; b < 2; b++) separate_documents(&inputs[b * T], &of[b * T], T, kEnd);
        EXPECT_EQ(std::count(of.begin(), of.end(), kIgnore), 3);
        GPT2Ptr model(gpt2_create(config, shape));
        gpt2_initialise(model.get(), 1);
        GPT2Pass pass;
        pass.training = true, pass.loss_scale = 1.0 / (2 * T - 3);
        gpt2_zero_gradients(model.get());
        gpt2_forward(model.get(), inputs.data(), of.data(), 2, T, pass);
        gpt2_backward(model.get());
        *loss = gpt2_stats(model.get()).loss;
        std::vector<real> host(parameter_table(config)[k_wte].file_size());
        gpt2_copy_out(model.get(), Group::gradients, k_wte, 0, host.data());
        return host;
    };
    double loss = 0, other_loss = 0;
    std::vector<real> first = gradient(targets, &loss);
    for (size_t i : {3, 8, 9}) targets[i] = (targets[i] + 7) % (V - 1);
    EXPECT_EQ(gradient(targets, &other_loss), first);
    EXPECT_EQ(loss, other_loss);
    EXPECT_NEAR(loss, std::log(V), 0.1);
}

TEST(Run, ResumesFromANamedCheckpointAndCutsTheLog) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    std::string whole = read_file(run.out("last/model.safetensors"));
    run.options.resume = run.out("step_00000003");
    run.options.out = "";
    EXPECT_EQ(run.train(), 0);
    run.options.out = run.folder + "/run";
    EXPECT_EQ(run.log().size(), 6u);
    EXPECT_TRUE(read_file(run.out("last/model.safetensors")) == whole);
    run.options.resume = run.out("step_00000003");
    choose_run_folder(run.options, {}, ordered_json::parse(run.state().dump()).at("run"));
    EXPECT_EQ(linked_step(run.options.out, "last"), "step_00000003") << "where it goes on";
    run.options.resume = run.folder + "/nothing";
    EXPECT_EQ(error_of([&] { run.train(); }).substr(0, 11), "2 --resume ");
    SmallRun other;
    EXPECT_EQ(other.train(), 0);
    other.options.resume = run.out("step_00000003");
    std::string error = error_of([&] { other.train(); });
    EXPECT_EQ(error.substr(0, 2), "2 ");
    EXPECT_NE(error.find("holds another run; give another --out"), std::string::npos) << error;
    fs::resize_file(run.out("step_00000003/optimizer.safetensors"), 1000);
    run.options.resume = run.out("step_00000003");
    error = error_of([&] { run.train(); });
    EXPECT_NE(error.find("the checkpoint is damaged"), std::string::npos) << error;
}

TEST(Run, WhatItReadsIsNotSetAside) {
    SmallRun run;
    run.options.steps = 2;
    EXPECT_EQ(run.train(), 0);
    fs::copy(run.options.data[0], run.out("text.txt"));
    fs::create_directory_symlink("run", run.folder + "/link");
    TrainOptions first = run.options;
    auto expect_refusal = [&](const std::string& what) {
        run.options.resume = "never", run.options.model = {}, run.options.tokenizer = "auto";
        if (what == "--data") run.options.data = {run.out("*.txt")};
        if (what == "--val") run.options.val = {run.folder + "/link/text.txt"};
        if (what == "--model") run.options.model.model = run.folder + "/link";
        if (what == "--tokenizer") run.options.tokenizer = run.out("last/tokenizer.json");
        std::string error = error_of([&] { run.train(); });
        EXPECT_EQ(error.rfind("2 " + what + " " + run.folder, 0), 0u) << error;
        EXPECT_NE(error.find("which --resume never sets aside; give another --out"),
                  std::string::npos)
            << error;
        EXPECT_FALSE(path_exists(run.options.out + ".1"));
        run.options = first;
    };
    for (const char* what : {"--data", "--val", "--model", "--tokenizer"}) expect_refusal(what);
    run.options.resume = "never", run.options.out += "//";
    EXPECT_EQ(run.train(), 0);
    EXPECT_TRUE(path_exists(first.out + ".1/step_00000002")) << "whatever slashes are behind it";
}

TEST(Run, AFolderOfAModelIsNoRunFolder) {
    SmallRun run;
    run.options.steps = 2;
    EXPECT_EQ(run.train(), 0);
    TrainOptions first = run.options;
    for (const char* out : {"last", "step_00000002/", "last/inner"}) {
        run.options.out = first.out + "/" + out;
        std::string error = error_of([&] { run.train(); });
        EXPECT_EQ(error.substr(0, 2), "2 ") << error;
        EXPECT_NE(error.find("; give another --out"), std::string::npos) << error;
    }
    EXPECT_NO_THROW(verify_checkpoint(join_path(first.out, "last")));
    EXPECT_FALSE(path_exists(join_path(first.out, "last/lock")));
}

// The branch that is left keeps its files, and no part in what stays, what is best and what a later
// command goes on with.
TEST(Run, GoingBackSetsTheLaterCheckpointsAside) {
    SmallRun run;
    run.options.learning_rate = 0, run.options.save_every = 1;  // the first evaluation is the best
    run.options.steps = 5;
    EXPECT_EQ(run.train(), 0);
    for (const char* step : {"step_00000003", "step_00000005"})
        run.change_state(step, [](ordered_json& state) { state["finished"] = false; });
    fs::remove(run.out("best"));
    fs::create_symlink("step_00000004", run.out("best"));
    TrainOptions back = run.options;
    back.resume = run.out("best");
    ordered_json identity = ordered_json::parse(run.state().at("run").dump());
    std::string note = choose_run_folder(back, {}, identity).note;
    EXPECT_EQ(note, "going on with " + run.out("step_00000004") +
                        "; later checkpoints are set aside: step_00000005.abandoned");
    EXPECT_EQ(linked_step(run.options.out, "last"), "step_00000004") << "what the link led to";
    EXPECT_EQ(linked_step(run.options.out, "best"), "step_00000002");
    back.resume = run.out("step_00000001/");
    note = choose_run_folder(back, {}, identity).note;
    EXPECT_NE(note.find("set aside: step_00000002.abandoned and 2 more"), std::string::npos)
        << note;
    EXPECT_EQ(linked_step(run.options.out, "last"), "step_00000001");
    EXPECT_EQ(linked_step(run.options.out, "best"), "") << "none was evaluated by then";
    EXPECT_EQ(list_steps(run.options.out, "").size(), 1u);
    run.options.keep = 2, run.options.steps = 4, run.options.eval_every = 0;
    EXPECT_EQ(run.train(), 0);
    EXPECT_EQ(run.log().size(), 4u);
    EXPECT_TRUE(path_exists(run.out("step_00000003"))) << "the two newest of this branch";
    fs::resize_file(run.out("step_00000004/model.safetensors"), 10);
    EXPECT_EQ(latest_checkpoint(run.options.out), run.out("step_00000003"));
    back.resume = run.out("step_00000003"), back.out = "";
    choose_run_folder(back, {}, identity);
    EXPECT_TRUE(path_exists(run.out("step_00000004.abandoned.2/trainer.json")))
        << "nothing is lost";
    EXPECT_TRUE(verify_checkpoint(run.out("step_00000004.abandoned")).is_object());
}

TEST(Run, TheBestIsNamedAtTheEndWhereItIs) {
    SmallRun run;
    run.options.learning_rate = 0;  // so that no evaluation is better than the first
    std::string best = "best       at step 2: ";
    EXPECT_NE(run.train_and_read().find(best + run.out("best")), std::string::npos);
    run.options.resume = run.out("step_00000003"), run.options.out += "-2";
    std::string said = run.train_and_read();
    EXPECT_EQ(said.find(best), std::string::npos) << said;
    EXPECT_EQ(run.state().at("best_step"), 2u);
}

// By a path that has no folder in it, and by those of a run's own folder.
TEST(Run, ResumesFromTheFolderThatOneIsIn) {
    SmallRun run;
    run.options.steps = 3;
    EXPECT_EQ(run.train(), 0);
    ordered_json identity = ordered_json::parse(run.state().at("run").dump());
    TrainOptions o = run.options;
    o.out = "";
    auto resume = [&](const std::string& from, const std::string& in) {
        InFolder inside(in);
        o.resume = from;
        EXPECT_EQ(fs::weakly_canonical(cache_folder(o)),
                  fs::weakly_canonical(run.folder + "/cache"));
        RunFolder folder = choose_run_folder(o, {}, identity);
        return std::pair(folder.out, folder.checkpoint);
    };
    std::string run_folder = run.options.out;
    EXPECT_EQ(resume(".", run_folder), std::pair(std::string("."), std::string("./step_00000003")));
    EXPECT_EQ(resume("last", run_folder),
              std::pair(std::string("."), std::string("step_00000003")));
    auto [out, checkpoint] = resume(".", run.out("step_00000003"));
    EXPECT_TRUE(fs::equivalent(out, run_folder)) << out;
    EXPECT_TRUE(fs::equivalent(checkpoint, run.out("last"))) << checkpoint;
}

// A run that ends after the checkpoint was named and before the folder is free keeps its `last`.
TEST(Run, AFolderIsLockedBeforeWhatItHoldsIsRead) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    run.options.resume = run.out("step_00000003");
    fs::resize_file(run.out("step_00000003/model.safetensors"), 1000);
    std::string error;
    {
        RunLock other(run.options.out);
        error = error_of([&] { run.train(); });
    }
    EXPECT_NE(error.find("trains in this folder"), std::string::npos) << error;
    EXPECT_EQ(linked_step(run.options.out, "last"), "step_00000006");
    EXPECT_NE(error_of([&] { run.train(); }).find("is damaged"), std::string::npos);
    run.options.resume = run.folder;
    EXPECT_NE(error_of([&] { run.train(); }).find("no run is there"), std::string::npos);
    EXPECT_FALSE(path_exists(run.folder + "/lock"));
}

TEST(Run, TheLogLosesWhatCameAfterTheCheckpointAndWhatACrashCutShort) {
    std::string folder = test_folder();
    write_file_atomic(folder + "/log.jsonl",
                      "{\"step\":1}\n{\"step\":2}\n[3]\nnoise\n{\"step\":3}\n{\"st");
    RunLock lock(folder);
    { RunLog log(folder, 2, &lock); }
    EXPECT_EQ(read_file(folder + "/log.jsonl"), "{\"step\":1}\n{\"step\":2}\n");
    {
        RunLog log(folder, 2, &lock);
        log.write({{"step", 3}});
    }
    EXPECT_EQ(read_file(folder + "/log.jsonl"), "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
}

// A disk that takes no more of the log: the records wait, none is there by half, and once there is
// room all are.
TEST(Run, TheLogKeepsWhatTheDiskRefuses) {
    std::string folder = test_folder(), path = folder + "/log.jsonl";
    RunLock lock(folder);
    RunLog log(folder, 0, &lock);
    EXPECT_EQ(log.write({{"step", 1}}), "");
    rlimit old_limit;
    getrlimit(RLIMIT_FSIZE, &old_limit);
    auto old_action = signal(SIGXFSZ, SIG_IGN);
    rlimit small = {15, old_limit.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    std::string first = log.write({{"step", 2}}), second = log.write({{"step", 3}});
    std::string error = error_of([&] { log.sync(); });
    setrlimit(RLIMIT_FSIZE, &old_limit);
    signal(SIGXFSZ, old_action);
    EXPECT_EQ(first, "File too large");
    EXPECT_EQ(second, "") << "said once";
    EXPECT_EQ(error.substr(0, 2), "1 ");
    EXPECT_EQ(read_file(path), "{\"step\":1}\n");
    EXPECT_EQ(log.write({{"step", 4}}), "");
    EXPECT_EQ(read_file(path), "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":4}\n");
}

// What the run goes back over is not written later, where it waits for a disk that refused it.
TEST(Run, TheLogForgetsWhatWaitsBehindACut) {
    std::string folder = test_folder(), path = folder + "/log.jsonl";
    RunLock lock(folder);
    RunLog log(folder, 0, &lock);
    EXPECT_EQ(log.write({{"step", 1}}), "");
    rlimit old_limit;
    getrlimit(RLIMIT_FSIZE, &old_limit);
    auto old_action = signal(SIGXFSZ, SIG_IGN);
    rlimit small = {15, old_limit.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    EXPECT_NE(log.write({{"step", 2}, {"train_loss", 1}}), "");
    setrlimit(RLIMIT_FSIZE, &old_limit);
    signal(SIGXFSZ, old_action);
    log.cut(1);
    EXPECT_EQ(log.write({{"step", 2}}), "");
    EXPECT_EQ(read_file(path), "{\"step\":1}\n{\"step\":2}\n");
}

TEST(Run, TheLogDoesNotFollowIntoAFolderThatAnotherProgramHas) {
    std::string folder = test_folder() + "/run", path = folder + "/log.jsonl";
    make_folder(folder);
    RunLock lock(folder);
    RunLog log(folder, 0, &lock);
    log.write({{"step", 1}});
    fs::remove_all(folder);
    make_folder(folder);
    {
        RunLock theirs(folder);
        write_file_atomic(path, "{\"step\":7}\n");
        std::string wrong = log.write({{"step", 2}});
        EXPECT_NE(wrong.find("trains there now"), std::string::npos) << wrong;
        EXPECT_EQ(read_file(path), "{\"step\":7}\n");
    }
    fs::remove_all(folder);
    EXPECT_EQ(log.write({{"step", 3}}), "");
    EXPECT_EQ(read_file(path), "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
}

TEST(Run, TheLogFollowsAFolderThatIsRemoved) {
    std::string folder = test_folder() + "/run", path = folder + "/log.jsonl";
    make_folder(folder);
    RunLock lock(folder);
    RunLog log(folder, 0, &lock);
    log.write({{"step", 1}});
    fs::remove_all(folder);
    EXPECT_EQ(log.write({{"step", 2}}), "");
    EXPECT_EQ(read_file(path), "{\"step\":1}\n{\"step\":2}\n");
    log.cut(1);
    EXPECT_EQ(read_file(path), "{\"step\":1}\n");
    fs::remove_all(folder);
    fs::create_directories(path);  // where the file cannot be made for a while
    EXPECT_NE(log.write({{"step", 2}}), "");
    fs::remove(path);
    EXPECT_EQ(log.write({{"step", 3}}), "");
    EXPECT_EQ(read_file(path), "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
}

TEST(Run, ADamagedStateIsRefused) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    json root = run.state();
    for (const char* key : {"format", "tokens", "loader", "elapsed_s", "finished", "goal", "run"}) {
        json damaged = root;
        damaged[key] = "x";
        write_file_atomic(run.folder + "/trainer.json", damaged.dump());
        json identity;
        bool any = std::string(key) == "run";  // compared, not interpreted
        EXPECT_EQ(error_of([&] { read_state(run.folder, &identity); }) == "", any) << key;
    }
    fs::resize_file(run.out("step_00000006/model.safetensors"), 1000);
    fs::resize_file(run.out("step_00000003/trainer.json"), 10);
    run.options.steps = 9;
    EXPECT_EQ(run.train(), 0) << "goes on from the newest checkpoint that is intact";
    EXPECT_EQ(run.log().size(), 9u);
    for (const StepFolder& folder : list_steps(run.options.out, ""))
        fs::resize_file(run.out(folder.name + "/optimizer.safetensors"), 1000);
    run.options.steps = 12;
    std::string error = error_of([&] { run.train(); });
    EXPECT_EQ(error.substr(0, 2), "2 ");
    EXPECT_NE(error.find("no checkpoint is intact"), std::string::npos) << error;
    EXPECT_EQ(run.log().size(), 9u);
}

// --out, --resume FOLDER and the default folder, one as the others: what is damaged is said, and
// where nothing is intact no run begins anew.
TEST(Run, DamagedCheckpointsAreSaidHoweverTheFolderWasFound) {
    SmallRun run;
    run.options.steps = 3;
    EXPECT_EQ(run.train(), 0);
    ordered_json identity = ordered_json::parse(run.state().at("run").dump());
    for (const StepFolder& folder : list_steps(run.options.out, ""))
        run.change_state(folder.name, [](ordered_json& state) { state["finished"] = false; });
    InFolder inside(run.folder);
    fs::create_directory("runs");
    fs::rename("run", "runs/text");
    std::string damaged = "runs/text/step_00000003/model.safetensors";
    fs::resize_file(damaged, 1000);
    TrainOptions given = run.options, named = run.options, found = run.options;
    given.out = "runs/text";
    named.out = "", named.resume = "runs/text";
    found.out = "", found.data = {"text.txt"};
    for (const TrainOptions* o : {&given, &named, &found}) {
        RunFolder folder = choose_run_folder(*o, {}, identity);
        EXPECT_EQ(folder.checkpoint, "runs/text/step_00000002");
        EXPECT_NE(folder.note.find("; passed over: " + damaged), std::string::npos) << folder.note;
    }
    fs::resize_file("runs/text/step_00000002/model.safetensors", 1000);
    for (const TrainOptions* o : {&given, &named, &found}) {
        std::string error = error_of([&] { choose_run_folder(*o, {}, identity); });
        EXPECT_EQ(error.rfind("2 runs/text: no checkpoint is intact: " + damaged, 0), 0u) << error;
        EXPECT_NE(error.find("; give "), std::string::npos) << error;
    }
    identity["seed"] = 7;
    EXPECT_EQ(choose_run_folder(found, {}, identity).out, "runs/text-2") << "that is another run";
}

// Killed before its first checkpoint it takes no new folder each time.
TEST(Run, ARunThatOnlyBeganLeavesItsFolderFree) {
    SmallRun run;
    EXPECT_EQ(run.train(), 0);
    ordered_json identity = ordered_json::parse(run.state().at("run").dump());
    for (const char* link : {"last", "best"}) fs::remove(run.out(link));
    for (const StepFolder& folder : list_steps(run.options.out, ""))
        fs::remove_all(run.out(folder.name));
    InFolder inside(run.folder);
    fs::create_directory("runs");
    fs::rename("run", "runs/text");
    TrainOptions o = run.options;
    o.out = "", o.data = {"text.txt"};
    {
        RunFolder folder = choose_run_folder(o, {}, identity);
        EXPECT_EQ(folder.out, "runs/text");
        EXPECT_EQ(folder.checkpoint + folder.note, "");
        EXPECT_EQ(choose_run_folder(o, {}, identity).out, "runs/text-2") << "it is at work there";
    }
    ordered_json other = identity;
    other["seed"] = 7;
    EXPECT_EQ(choose_run_folder(o, {}, other).out, "runs/text-2");
    write_file_atomic("runs/text/log.jsonl", "{\"step\":1}\n");
    EXPECT_EQ(choose_run_folder(o, {}, identity).out, "runs/text-2") << "nobody knows whose it is";
    fs::resize_file("runs/text/log.jsonl", 0);
    EXPECT_EQ(choose_run_folder(o, {}, identity).out, "runs/text");
}

TEST(Run, AFolderOfWeightsIsWhereFineTuningStarts) {
    SmallRun run, tuned;
    EXPECT_EQ(run.train(), 0);
    tuned.options.model = {};
    tuned.options.model.model = run.options.out;
    tuned.options.tokenizer = "auto";
    tuned.options.learning_rate = 0, tuned.options.steps = 1;
    EXPECT_EQ(tuned.train(), 0);
    expect_same_file(run.out("last/model.safetensors"), tuned.out("last/model.safetensors"));
    tuned.options.out += "-2";
    tuned.options.model.layers = 3;
    EXPECT_EQ(error_of([&] { tuned.train(); }).substr(0, 13), "2 --layers 3:");
}

TEST(Run, ALossThatIsNotANumberEndsIt) {
    SmallRun run, tuned;
    run.options.steps = 1;
    EXPECT_EQ(run.train(), 0);
    GPT2Config config = read_config(resolve_model_folder(run.options.out));
    GPT2Ptr model(gpt2_create(config, GPT2Shape{}));
    load_model(model.get(), resolve_model_folder(run.options.out));
    std::vector<real> huge(size_t(config.channels), std::numeric_limits<real>::max());
    gpt2_copy_in(model.get(), Group::parameters, k_lnfw, 0, huge.data());
    Tokenizer tokenizer = Tokenizer::load(resolve_model_folder(run.options.out));
    save_model(model.get(), &tokenizer, tuned.folder + "/huge");
    tuned.options.model = {};
    tuned.options.model.model = tuned.folder + "/huge";
    tuned.options.tokenizer = "auto";
    std::string error = error_of([&] { tuned.train(); });
    EXPECT_EQ(error.substr(0, 2), "1 ");
    EXPECT_NE(error.find("step 1 and the 2 after it: loss nan"), std::string::npos) << error;
    EXPECT_EQ(latest_checkpoint(tuned.options.out), "");
}

// A model of a folder, untied, whose embedding of the byte Q overflows in the first layer norm, and
// text in which that byte is there once.
struct RunWithOneBadWindow : SmallRun {
    RunWithOneBadWindow() {
        std::string text = some_text(400);
        text[text.size() / 2] = 'Q';
        write_file_atomic(folder + "/text.txt", text);
        GPT2Config config;
        config.vocab_size = 257, config.layers = 2, config.heads = 2, config.channels = 12;
        config.context = 9, config.tied = false;
        GPT2Ptr model(gpt2_create(config, test_shape(1, 9)));
        gpt2_initialise(model.get(), 5);
        std::vector<real> wte(257 * 12);
        gpt2_copy_out(model.get(), Group::parameters, k_wte, 0, wte.data());
        std::fill_n(wte.begin() + 'Q' * 12, 12, real(3e38));
        gpt2_copy_in(model.get(), Group::parameters, k_wte, 0, wte.data());
        Tokenizer tokenizer = Tokenizer::bytes();
        save_model(model.get(), &tokenizer, folder + "/model");
        options.model = {};
        options.model.model = folder + "/model";
        options.tokenizer = "auto", options.eval_every = 0, options.save_every = 10;
        options.steps = 60;  // more than an epoch
    }
    std::vector<size_t> skipped_steps() const {
        std::vector<size_t> steps;
        for (const json& record : log())
            if (record.contains("skipped")) steps.push_back(record.at("step"));
        return steps;
    }
};

TEST(Run, AStepThatIsNotFiniteIsSkippedAndItsDataNamed) {
    RunWithOneBadWindow run, parts;
    EXPECT_EQ(run.train(), 0);
    std::vector<json> log = run.log();
    ASSERT_EQ(log.size(), 60u);
    std::vector<size_t> skipped = run.skipped_steps();
    ASSERT_GE(skipped.size(), 1u);
    EXPECT_LE(skipped.size(), 3u);
    for (const json& record : log) {
        bool bad = record.contains("skipped");
        EXPECT_EQ(record.at("train_loss").is_number(), !bad) << record;
        if (bad) { EXPECT_TRUE(record.at("data").at("window").is_number_unsigned()) << record; }
    }
    EXPECT_LT(log.back().at("train_loss").get<double>(), 5.0);
    EXPECT_EQ(parts.train_step_by_step(), 0);
    EXPECT_EQ(parts.skipped_steps(), skipped);
    expect_same_file(run.out("last/model.safetensors"), parts.out("last/model.safetensors"));
}

TEST(Run, TooManyBadStepsEndItWithADiagnosis) {
    for (size_t limit : {1, 2}) {
        RunWithOneBadWindow run;
        run.options.max_bad_steps = limit;
        if (limit == 2) run.options.overfit_one_batch = true;  // a bad batch again and again
        if (limit == 2) write_file_atomic(run.folder + "/text.txt", std::string(3000, 'Q'));
        std::string error = error_of([&] { run.train(); });
        EXPECT_EQ(error.substr(0, 2), "1 ");
        EXPECT_NE(error.find("first in layer 0: ln1; none was applied"), std::string::npos)
            << error;
        if (limit == 2) { EXPECT_NE(error.find("step 1 and the 1 after it"), std::string::npos); }
        json diagnosis = json::parse(read_file(run.out("diagnosis.json")));
        EXPECT_EQ(diagnosis.at("first"), "layer 0: ln1");
        EXPECT_EQ(diagnosis.at("bad_steps_in_a_row"), limit);
        EXPECT_GE(diagnosis.at("not_finite").get<size_t>(), 12u);
        std::string checkpoint = latest_checkpoint(run.options.out);
        if (limit == 2) {
            EXPECT_EQ(checkpoint, "");
        } else {
            EXPECT_EQ(read_state(checkpoint, nullptr).step,
                      diagnosis.at("step").get<size_t>() / 10 * 10);
        }
    }
}

// A good step ends a row of bad ones; a save that is due at a bad one is made after the next good
// one.
TEST(Run, AGoodStepEndsTheRowAndThenWhatIsDueIsSaved) {
    RunWithOneBadWindow run, later;
    run.options.steps = later.options.steps = 130;  // several times over the text
    run.options.max_bad_steps = later.options.max_bad_steps = 2;
    EXPECT_EQ(run.train(), 0);
    std::vector<size_t> skipped = run.skipped_steps();
    ASSERT_GE(skipped.size(), 2u);
    EXPECT_EQ(run.state().at("bad_steps_in_a_row"), 0u);
    size_t bad = skipped[0];
    later.options.save_every = bad;
    EXPECT_EQ(later.train(), 0);
    EXPECT_FALSE(path_exists(later.out(step_name(bad))));
    EXPECT_TRUE(path_exists(later.out(step_name(bad + 1))));
    EXPECT_EQ(list_steps(later.options.out, "").size(), 130 / bad + (130 % bad != 0));
}

TEST(Run, ARowOfBadStepsGoesOnAfterAStop) {
    RunWithOneBadWindow run;
    run.options.max_bad_steps = 2, run.options.overfit_one_batch = true;
    write_file_atomic(run.folder + "/text.txt", std::string(3000, 'Q'));
    run.stop_after_one_step();
    EXPECT_EQ(run.state().at("bad_steps_in_a_row"), 1u);
    std::string error = error_of([&] { run.train(); });
    EXPECT_NE(error.find("step 1 and the 1 after it"), std::string::npos) << error;
}

// Text of one pattern, with a stretch that is like nothing before it.
struct RunWithSpikes : SmallRun {
    explicit RunWithSpikes(const char* on_spike) {
        std::string text, noise;
        for (int i = 0; i < 900; i++) text += "abcd ";
        for (int id : random_ids(30, 26, 7)) noise += char('A' + id);
        text.replace(2000, noise.size(), noise);
        write_file_atomic(folder + "/text.txt", text);
        options.tokenizer = "bytes", options.on_spike = on_spike, options.spike_threshold = 2;
        options.steps = 220, options.save_every = 10, options.eval_every = 0;
        options.schedule = "constant", options.learning_rate = 1e-2;
    }
    std::vector<json> rollbacks() const {
        std::vector<json> events;
        std::stringstream lines(read_file(out("log.jsonl")));
        for (std::string line; std::getline(lines, line);) {
            json record = json::parse(line);
            if (record.value("event", "") == "rollback") events.push_back(record);
        }
        return events;
    }
    size_t spikes() const {
        std::vector<json> records = log();
        return size_t(std::count_if(records.begin(), records.end(),
                                    [](const json& record) { return record.contains("spike"); }));
    }
};

TEST(Run, ASpikeIsReportedAndRolledBack) {
    RunWithSpikes report("report"), rollback("rollback"), again("rollback");
    EXPECT_EQ(report.train(), 0);
    EXPECT_GE(report.spikes(), 1u);
    EXPECT_EQ(report.rollbacks().size(), 0u);
    EXPECT_EQ(rollback.train(), 0);
    EXPECT_GE(rollback.rollbacks().size(), 1u);
    EXPECT_GE(rollback.state().at("skipped_data").size(), 1u);
    std::vector<json> log = rollback.log();
    ASSERT_EQ(log.size(), 220u) << "each step once";
    for (size_t i = 0; i < log.size(); i++) EXPECT_EQ(log[i].at("step"), i + 1);
    EXPECT_EQ(again.train(), 0);
    expect_same_file(again.out("last/model.safetensors"), rollback.out("last/model.safetensors"));
}

// A run that went back to a checkpoint is one that starts there and knows which data to pass over:
// parameters, moments, the place in the data and the state are those of the checkpoint.
TEST(Run, GoingBackRestoresAllThatTheCheckpointHas) {
    RunWithSpikes run("rollback");
    run.options.save_every = 90;
    EXPECT_EQ(run.train(), 0);
    std::vector<json> rollbacks = run.rollbacks();
    json skipped = run.state().at("skipped_data"), passed = json::array();
    for (const json& event : rollbacks) passed.push_back(event.at("skipped_data"));
    ASSERT_GE(rollbacks.size(), 2u) << "behind the same checkpoint";
    EXPECT_EQ(rollbacks[0].at("step"), rollbacks[1].at("step"));
    EXPECT_EQ(skipped, passed);
    for (size_t i = 1; i < skipped.size(); i++) EXPECT_NE(skipped[i], skipped[i - 1]);

    std::string model = read_file(run.out("last/model.safetensors"));
    std::string moments = read_file(run.out("last/optimizer.safetensors"));
    json state = run.state();
    std::string from = step_name(rollbacks.back().at("step"));
    run.change_state(from, [&](ordered_json& changed) { changed["skipped_data"] = skipped; });
    run.options.resume = run.out(from);
    EXPECT_EQ(run.train(), 0);
    EXPECT_TRUE(read_file(run.out("last/model.safetensors")) == model);
    EXPECT_TRUE(read_file(run.out("last/optimizer.safetensors")) == moments);
    for (const char* key : {"step", "tokens", "loader", "loss_trend", "skipped_data"})
        EXPECT_EQ(run.state().at(key), state.at(key)) << key;
    EXPECT_EQ(run.rollbacks().size(), rollbacks.size()) << "and does not go back again";
}

TEST(Run, GoesBackTenTimesAtMost) {
    RunWithSpikes run("rollback");
    run.options.spike_threshold = 0.1, run.options.learning_rate = 0;  // about every third step
    EXPECT_EQ(run.train(), 0);
    EXPECT_EQ(run.state().at("skipped_data").size(), 10u);
    EXPECT_EQ(run.log().size(), 220u);
    run.options.steps = 260;
    testing::internal::CaptureStderr();
    EXPECT_EQ(run.train(), 0);
    EXPECT_EQ(testing::internal::GetCapturedStderr().find("going back"), std::string::npos);
    EXPECT_EQ(run.rollbacks().size(), 10u) << "also when it goes on";
}

// What could not be done does not count: here there is nothing to go back to for long.
TEST(Run, GoesBackWhenThereIsACheckpoint) {
    RunWithSpikes run("rollback");
    run.options.spike_threshold = 0.1, run.options.learning_rate = 0;
    run.options.steps = 170, run.options.save_every = 130;
    testing::internal::CaptureStderr();
    EXPECT_EQ(run.train(), 0);
    std::string said = testing::internal::GetCapturedStderr();
    auto times = [&](const std::string& words) {
        size_t count = 0, at = 0;
        for (; (at = said.find(words, at)) != std::string::npos; at++) count++;
        return count;
    };
    EXPECT_GE(times("there is no checkpoint yet to go back to"), 10u);
    EXPECT_EQ(run.rollbacks().size(), 10u);
    EXPECT_EQ(times("the run has gone back 10 times, the most that it may"), 1u);
}

// A rate beyond all numbers makes the first update the last one that counts. Whether step 2 is
// waited for or step 3 is at work already, step 2 is named, and nothing of it is kept.
TEST(Run, TheStepThatFailsIsNamedAlsoWhenTheNextIsAtWork) {
    for (size_t eval_every : {0, 1, 2, 3}) {
        SmallRun run;
        run.options.schedule = "constant", run.options.warmup = 0;
        run.options.learning_rate = 1e20;
        run.options.eval_every = eval_every == 1 ? 0 : eval_every, run.options.eval_batches = 1;
        run.options.save_every = 1 + eval_every;
        std::string error = error_of([&] { run.train(); });
        EXPECT_EQ(error.substr(0, 2), "1 ");
        EXPECT_NE(error.find("step 2 and the 2 after it: loss nan"), std::string::npos) << error;
        std::vector<json> log = run.log();
        ASSERT_EQ(log.size(), 3u);
        EXPECT_TRUE(log[0].at("train_loss").is_number());
        for (size_t i : {1, 2}) EXPECT_EQ(log[i].at("skipped"), "loss nan, gradient norm nan");
        for (const StepFolder& folder : list_steps(run.options.out, "")) EXPECT_EQ(folder.step, 1u);
    }
}

TEST(Run, SavingInTheBackgroundChangesNothing) {
    SmallRun on, off;
    on.options.background_save = "on", off.options.background_save = "off";
    for (SmallRun* run : {&on, &off}) {
        run->options.steps = 20, run->options.save_every = 1;
        EXPECT_EQ(run->train(), 0);
    }
    for (uint64_t step = 1; step <= 20; step++)
        for (const char* file : {"/model.safetensors", "/optimizer.safetensors"})
            expect_same_file(on.out(step_name(step)) + file, off.out(step_name(step)) + file);
}

// A saver whose disk refuses the first `failures` times.
struct FailingSaver {
    std::string out = join_path(test_folder(), "run");
    GPT2Ptr model;
    int failures, tries = 0;
    std::optional<Saver> saver;

    FailingSaver(int count, bool background, double retry_s = 0) : failures(count) {
        GPT2Config config = odd_config();
        GPT2Shape shape = training_shape(1, 4);
        shape.snapshot = true;
        model.reset(gpt2_create(config, shape));
        gpt2_initialise(model.get(), 1);
        saver.emplace(Saver::Options{out, {0}, background, retry_s}, model.get(), [this] {
            if (tries++ < failures) fail_machine("no space");
        });
    }
    Checkpoint checkpoint(uint64_t step) const {
        return {step, gpt2_config(model.get()), view_of(model.get()), nullptr, {}, false};
    }
    void await() {
        for (int i = 0; i < 5000 && linked_step(out, "last").empty(); i++) {
            saver->poll();
            usleep(1000);
        }
    }
};

TEST(Saver, AFailedSaveIsTriedAgain) {
    FailingSaver failing(2, true);
    failing.saver->begin(failing.checkpoint(1));
    failing.saver->hand_over();
    failing.await();
    EXPECT_EQ(failing.tries, 3);
    EXPECT_EQ(latest_checkpoint(failing.out), join_path(failing.out, "step_00000001"));

    FailingSaver direct(1, false);
    direct.saver->begin(direct.checkpoint(1));
    EXPECT_EQ(latest_checkpoint(direct.out), "");
    EXPECT_TRUE(direct.saver->poll()) << "asks for the model as it is by then";
    direct.saver->begin(direct.checkpoint(2));
    EXPECT_FALSE(direct.saver->poll());
    EXPECT_EQ(linked_step(direct.out, "last"), "step_00000002");

    FailingSaver last(2, true);
    last.saver->finish(last.checkpoint(3));
    EXPECT_EQ(linked_step(last.out, "last"), "step_00000003");

    FailingSaver later(1, true, 3600);
    later.saver->begin(later.checkpoint(1));
    later.saver->hand_over();
    later.saver->wait();
    later.saver->poll();
    EXPECT_EQ(later.tries, 1) << "an hour has not passed";
}

// A run that ends without saving what it is now, as with a diagnosis, leaves what it meant to save.
TEST(Saver, AFailedSaveIsTriedAgainBeforeTheRunEnds) {
    FailingSaver failing(2, true);
    failing.saver->begin(failing.checkpoint(1));
    failing.saver->hand_over();
    failing.saver->settle();
    EXPECT_EQ(failing.tries, 3);
    EXPECT_EQ(latest_checkpoint(failing.out), join_path(failing.out, "step_00000001"));
    failing.saver->settle();
    EXPECT_EQ(failing.tries, 3) << "nothing is left to save";

    FailingSaver full(100, true);
    full.saver->begin(full.checkpoint(1));
    full.saver->hand_over();
    std::string error = error_of([&] { full.saver->settle(); });
    EXPECT_NE(error.find("step_00000001 was not saved, 3 times in a row"), std::string::npos)
        << error;

    FailingSaver direct(1, false);
    direct.saver->begin(direct.checkpoint(1));
    direct.saver->settle();
    EXPECT_EQ(direct.tries, 1) << "the model is another by now";
}

// What was the best is named so by what is saved in its place.
TEST(Saver, TheBestThatWasNotSavedIsNotForgotten) {
    for (bool background : {true, false}) {
        for (bool ends : {true, false}) {
            FailingSaver failing(1, background, 3600);
            Checkpoint best = failing.checkpoint(1);
            best.best = true;
            failing.saver->begin(best);
            failing.saver->hand_over();
            failing.saver->wait();
            EXPECT_EQ(linked_step(failing.out, "best"), "");
            if (ends) failing.saver->finish(failing.checkpoint(2));
            else failing.saver->begin(failing.checkpoint(2));
            failing.saver->hand_over();
            failing.saver->wait();
            EXPECT_EQ(linked_step(failing.out, "best"), "step_00000002");
            failing.saver->finish(failing.checkpoint(3));
            EXPECT_EQ(linked_step(failing.out, "best"), "step_00000002");
            EXPECT_EQ(linked_step(failing.out, "last"), "step_00000003");
        }
    }
}

// While it lives no thread can be made: none has a stack larger than all memory.
struct NoThreads {
    NoThreads() {
        pthread_getattr_default_np(&before);
        pthread_attr_t huge;
        pthread_attr_init(&huge);
        pthread_attr_setstacksize(&huge, size_t(1) << 60);
        pthread_setattr_default_np(&huge);
        pthread_attr_destroy(&huge);
    }
    ~NoThreads() {
        pthread_setattr_default_np(&before);
        pthread_attr_destroy(&before);
    }
    pthread_attr_t before;
};

TEST(Saver, SavesInTheForegroundWhereNoThreadCanBeMade) {
    // Where a thread makes the copy that is saved, there is none either.
    bool copies_in_a_thread = std::string(gpt2_program()) == "train_gpt2";
    FailingSaver failing(copies_in_a_thread ? 1 : 0, true);
    if (copies_in_a_thread) {
        NoThreads none;
        EXPECT_THROW(std::thread([] {}).join(), std::system_error);
        failing.saver->begin(failing.checkpoint(1));
        EXPECT_TRUE(failing.saver->poll()) << "asks for the model as it is by then";
        failing.saver->begin(failing.checkpoint(2));
        EXPECT_EQ(linked_step(failing.out, "last"), "step_00000002");
    }
    failing.saver->begin(failing.checkpoint(3));
    gpt2_snapshot_wait(failing.model.get());
    {
        NoThreads none;
        failing.saver->hand_over();
        EXPECT_EQ(linked_step(failing.out, "last"), "step_00000003");
    }
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    EXPECT_EQ(sigismember(&blocked, SIGTERM), 0);
}

TEST(Saver, TheThirdFailureInARowEndsTheRunAndLeavesWhatWas) {
    for (bool background : {true, false}) {
        FailingSaver failing(0, background);
        failing.saver->finish(failing.checkpoint(1));
        failing.failures = 100;
        std::string error = error_of([&] {
            for (uint64_t step = 2; step < 10; step++) {
                failing.saver->begin(failing.checkpoint(step));
                failing.saver->hand_over();
                failing.saver->wait();
            }
        });
        EXPECT_NE(error.find("step_00000004 was not saved, 3 times in a row: no space; "),
                  std::string::npos)
            << error;
        EXPECT_NE(error.find("step_00000001 is the last good state"), std::string::npos) << error;
        EXPECT_EQ(latest_checkpoint(failing.out), join_path(failing.out, "step_00000001"));
        EXPECT_EQ(list_steps(failing.out, "").size(), 1u);
    }
}

TEST(Saver, AFailedSaveThatIsGivenUpIsNotTriedAgain) {
    FailingSaver failing(1, true);
    failing.saver->begin(failing.checkpoint(1));
    failing.saver->hand_over();
    failing.saver->wait();
    failing.saver->give_up();
    EXPECT_TRUE(failing.saver->idle());
    EXPECT_FALSE(failing.saver->poll());
    failing.saver->wait();
    EXPECT_EQ(failing.tries, 1);
    EXPECT_EQ(latest_checkpoint(failing.out), "");
}

TEST(Run, TheLockFollowsAFolderThatIsRemoved) {
    std::string out = test_folder() + "/run";
    make_folder(out);
    RunLock mine(out);
    mine.renew();
    fs::remove_all(out);
    make_folder(out);
    mine.renew();
    EXPECT_FALSE(RunLock(out).taken());
    fs::rename(out, out + "_moved");
    make_folder(out);
    mine.renew();
    EXPECT_TRUE(RunLock(out + "_moved").taken()) << "the one that was moved is free";
    fs::remove_all(out);
    make_folder(out);
    RunLock theirs(out);
    EXPECT_TRUE(theirs.taken());
    std::string error = error_of([&] { mine.renew(); });
    EXPECT_EQ(error.substr(0, 2), "1 ");
    EXPECT_NE(error.find("trains there now"), std::string::npos) << error;
    EXPECT_EQ(error_of([&] { mine.renew(); }), error) << "also when it is asked again";
}

TEST(Run, TwoInOneFolderAreRefused) {
    SmallRun run;
    make_folder(run.options.out);
    {
        RunLock other(run.options.out);
        EXPECT_TRUE(other.taken());
        std::string error = error_of([&] { run.train(); });
        EXPECT_EQ(error.substr(0, 2), "2 ");
        EXPECT_NE(error.find(format("process %d on ", int(getpid()))), std::string::npos) << error;
        EXPECT_NE(error.find("trains in this folder; wait for it, or give another --out"),
                  std::string::npos)
            << error;
    }
    EXPECT_EQ(run.train(), 0) << "the file alone locks nobody out";
}

TEST(Run, AFileNamedStopStopsIt) {
    SmallRun run;
    run.options.steps = 1000000, run.options.save_every = 0;
    std::thread other([&] {
        while (!path_exists(run.out("best"))) usleep(1000);
        write_file_atomic(run.out("stop"), "");
    });
    std::string said = run.train_and_read(128 + SIGTERM);
    other.join();
    stop_signal() = 0;
    EXPECT_FALSE(path_exists(run.out("stop"))) << "the next command goes on";
    EXPECT_NE(latest_checkpoint(run.options.out), "") << said;
}

TEST(Run, AnOldFileNamedStopIsRemoved) {
    SmallRun run;
    make_folder(run.options.out);
    write_file_atomic(run.out("stop"), "");
    std::string said = run.train_and_read();
    EXPECT_NE(said.find("note       removed an old " + run.out("stop")), std::string::npos) << said;
    EXPECT_EQ(run.log().size(), 6u);
}

TEST(Run, AHangUpThatNohupIgnoresStaysIgnored) {
    for (bool ignored : {false, true}) {
        auto before = signal(SIGHUP, ignored ? SIG_IGN : SIG_DFL);
        {
            StopOnSignal signals;
            raise(SIGHUP);
        }
        EXPECT_EQ(stop_signal(), ignored ? 0 : SIGHUP);
        stop_signal() = 0;
        EXPECT_EQ(signal(SIGHUP, before), ignored ? SIG_IGN : SIG_DFL) << "as it was";
    }
}

TEST(Run, SettingsThatChangeAreSaidWithBothValues) {
    SmallRun run;
    stop_signal() = SIGINT;
    EXPECT_EQ(run.train(), 130);
    stop_signal() = 0;
    run.options.learning_rate = 1e-3, run.options.steps = 7, run.options.batch_size = 2;
    run.options.total_batch_tokens = 4 * 9;
    std::string said = run.train_and_read();
    for (const char* line : {"note       learning rate was 0.002 so far and is 0.001 from here on",
                             "note       steps was 6 so far and is 7 from here on",
                             "note       batch size was 4 so far and is 2 from here on"})
        EXPECT_NE(said.find(line), std::string::npos) << said;
    EXPECT_EQ(said.find("beta1"), std::string::npos) << said;
}

TEST(Run, EvaluationsOfOtherDataOrWindowsAreNotComparedWithThoseBefore) {
    SmallRun run;
    run.options.val = {run.folder + "/val.txt"};
    write_file_atomic(run.options.val[0], some_text(200));
    run.options.learning_rate = 0;  // so that no evaluation is better than the first
    run.options.steps = 3, run.options.save_every = 1;
    EXPECT_EQ(run.train(), 0);
    EXPECT_EQ(run.state().at("best_step"), 2u);
    EXPECT_EQ(run.state().at("evaluations_without_gain"), 1u);
    std::string anew = "note       the best loss and --early-stop count anew: ";
    auto go_on = [&] {
        run.options.steps += 1;
        run.change_state(step_name(run.options.steps - 1),
                         [](ordered_json& state) { state["best_val_loss"] = 0.5; });
        return run.train_and_read();
    };
    std::string said = go_on();
    EXPECT_EQ(said.find(anew), std::string::npos) << said;
    EXPECT_EQ(run.state().at("best_step"), 2u);
    write_file_atomic(run.options.val[0], some_text(201));
    said = go_on();
    EXPECT_NE(said.find("note       validation data was "), std::string::npos) << said;
    EXPECT_NE(said.find(anew), std::string::npos) << said;
    EXPECT_EQ(run.state().at("best_step"), 5u);
    EXPECT_GT(run.state().at("best_val_loss").get<double>(), 1);
    EXPECT_EQ(linked_step(run.options.out, "best"), "step_00000005");
    run.options.eval_batches = 1;
    said = go_on();
    EXPECT_NE(said.find("note       windows of an evaluation was 8 so far and is 4 from here on"),
              std::string::npos)
        << said;
    EXPECT_EQ(run.state().at("best_step"), 6u);
    EXPECT_EQ(run.state().at("evaluations_without_gain"), 0u);
}

TEST(Run, ADiskTooSmallForItsCheckpointsIsRefusedFirst) {
    SmallRun run;
    GPT2Config config;
    named_config("gpt2-xl", &config);
    make_folder(run.options.out);
    run.options.keep = 0, run.options.save_every = 1;
    std::string error = error_of([&] {
        check_disk(run.options, run.options.out, config, Goal{1000000000, 0});
    });
    EXPECT_EQ(error.substr(0, 2), "1 ");
    EXPECT_NE(error.find("a smaller --keep or a larger --save-every would fit"), std::string::npos)
        << error;
    run.options.steps = size_t(kMaxSteps);
    stop_signal() = SIGINT;
    EXPECT_EQ(error_of([&] { run.train(); }).substr(0, 2), "1 ");
    stop_signal() = 0;
    EXPECT_FALSE(path_exists(run.out("log.jsonl")));
}

TEST(Run, AllCheckpointsThatWillStayAreCounted) {
    TrainOptions o;
    auto kept = [&](size_t steps, size_t save_every, int keep, uint64_t keep_every) {
        o.save_every = save_every, o.keep = keep, o.keep_every = keep_every;
        return checkpoints_kept(o, {steps, steps > 0 ? 0.0 : 60.0});
    };
    EXPECT_EQ(kept(10000, 1000, 2, 0), 3u) << "and the best";
    EXPECT_EQ(kept(10000, 1000, 0, 0), 11u);
    EXPECT_EQ(kept(1000, 0, 2, 0), 2u);
    EXPECT_EQ(kept(10000, 1000, 2, 3000), 6u) << "3,000, 6,000 and 9,000 as well";
    EXPECT_EQ(kept(10000, 1000, 2, 1500), 6u) << "1,500 is not saved";
    EXPECT_EQ(kept(size_t(kMaxSteps), 1, 1, uint64_t(kMaxSteps)), 3u);
    EXPECT_EQ(kept(0, 1000, 2, 0), 3u) << "by the clock";
    EXPECT_EQ(kept(0, 1000, 0, 0), 1u);
    EXPECT_EQ(kept(0, 0, 2, 0), 2u);
}

TEST(Run, ResumingInAnotherPrecisionIsSaid) {
    SmallRun run;
    stop_signal() = SIGINT;
    EXPECT_EQ(run.train(), 130);
    stop_signal() = 0;
    EXPECT_EQ(run.state().at("dtype"), run.options.compute.dtype);
    ordered_json state = ordered_json::parse(read_file(run.out("last/trainer.json")));
    for (const char* key : {"step", "files", "checksum"}) state.erase(key);
    std::string folder = join_path(run.options.out, linked_step(run.options.out, "last"));
    for (bool known : {true, false}) {
        state["dtype"] = "fp8";
        if (!known) state.erase("dtype");  // as it was before there was a choice: fp32
        fs::remove(folder + "/trainer.json");
        write_trainer_json(folder, 1, state, {});
        RunState read = read_state(folder, nullptr);
        EXPECT_EQ(read.dtype, known ? "fp8" : "fp32");
    }
    state["dtype"] = "fp8";
    fs::remove(folder + "/trainer.json");
    write_trainer_json(folder, 1, state, {});
    std::string said = run.train_and_read();
    EXPECT_NE(said.find("note       the run used --dtype fp8 so far and goes on with " +
                        run.options.compute.dtype),
              std::string::npos)
        << said;
    EXPECT_EQ(run.state().at("dtype"), run.options.compute.dtype);
    EXPECT_EQ(run.log().size(), 6u);
}

TEST(Run, ATimeLimitFinishesTheRun) {
    SmallRun run;
    run.options.steps = 0, run.options.time_limit_s = 1;
    EXPECT_EQ(run.train(), 0);
    EXPECT_TRUE(run.state().at("finished"));
    EXPECT_GE(run.log().size(), 1u);
    EXPECT_TRUE(run.log().back().contains("val_loss"));
}

// An evaluation that is due before the next step counts: here one after every step takes most of
// the run.
TEST(Run, ATimeLimitCountsTheEvaluationsBeforeIt) {
    SmallRun once, timed;
    for (SmallRun* run : {&once, &timed}) {
        write_file_atomic(run->options.data[0], some_text(60000));
        run->options.eval_every = 1, run->options.eval_batches = 0;
    }
    once.options.steps = 1;
    EXPECT_EQ(once.train(), 0);
    double begin_s = once.log().back().at("elapsed_s"), all_s = once.state().at("elapsed_s");
    timed.options.steps = 0;
    timed.options.time_limit_s = begin_s + 1.4 * (all_s - begin_s) + 0.15;  // not enough for two
    EXPECT_EQ(timed.train(), 0);
    double elapsed_s = timed.state().at("elapsed_s");
    EXPECT_TRUE(timed.log().size() == 1 || elapsed_s <= timed.options.time_limit_s) << elapsed_s;
}

// What it took to read the data is not a part of the schedule: the warm-up is as long as ever. The
// run is three times as long as one of twenty steps, however fast the machine is.
TEST(Run, AScheduleByTheClockBeginsWithTheTraining) {
    SmallRun once, run;
    once.options.steps = 20, once.options.eval_every = 0;
    double begin_s = now_s();
    EXPECT_EQ(once.train(), 0);
    double once_s = now_s() - begin_s;
    run.options.steps = 0, run.options.time_limit_s = 1000.5 + 3 * once_s;
    run.options.warmup = -1, run.options.eval_every = 0;
    EXPECT_EQ(train_command(run.options, now_s() - 1000, ""), 0);
    std::vector<json> log = run.log();
    ASSERT_GT(log.size(), 10u);
    for (int i : {0, 1})
        EXPECT_LE(log[size_t(i)].at("learning_rate"), 0.011 * run.options.learning_rate);
    EXPECT_LE(log.back().at("learning_rate"), 0.1 * run.options.learning_rate);
    double highest = 0;
    for (const json& record : log) highest = std::max(highest, double(record.at("learning_rate")));
    EXPECT_GT(highest, 0.8 * run.options.learning_rate);
}

TEST(Run, BadStepsUseUpATimeLimitToo) {
    RunWithOneBadWindow run;
    write_file_atomic(run.folder + "/text.txt", std::string(3000, 'Q'));
    run.options.max_bad_steps = 0, run.options.overfit_one_batch = true;
    run.options.steps = 200, run.options.time_limit_s = 0.1;
    EXPECT_EQ(run.train(), 0);
    EXPECT_LT(run.log().size(), 10u);
    EXPECT_EQ(run.state().at("bad_steps_in_a_row"), run.log().size());
}

// The default model drops where it would learn its text by heart; a run that goes on stays at what
// it did.
TEST(Run, DropoutIsChosenByHowOftenTheDataIsSeen) {
    ModelOptions none, sized, named, asked;
    sized.layers = 2, named.model = "small", asked.dropout = 0.3;
    EXPECT_EQ(choose_dropout(none, 5.5), 0);
    EXPECT_EQ(choose_dropout(none, 6.72), 0.05);
    EXPECT_EQ(choose_dropout(none, 8), 0.1);
    EXPECT_EQ(choose_dropout(none, 100), 0.1);
    for (const ModelOptions& other : {sized, named}) EXPECT_EQ(choose_dropout(other, 100), 0);

    std::string folder = test_folder(), text = folder + "/text.txt";
    std::string bytes;
    for (int id : random_ids(100, 26, 1)) bytes += char('a' + id);
    write_file_atomic(text, bytes);
    bool overfit = false;
    auto train = [&](const std::string& out, size_t steps, double dropout) {
        TrainOptions options;
        options.overfit_one_batch = overfit;
        options.data = {text}, options.tokenizer = "bytes", options.out = folder + "/" + out;
        options.batch_size = 4, options.sequence_length = 16, options.steps = steps;
        options.sample_every = 0;
        options.screen = fopen("/dev/null", "w"), options.peak = {1e9, "given"};
        options.model.dropout = dropout;
        EXPECT_EQ(train_command(options, now_s(), ""), 0);
        fclose(options.screen);
        json settings;
        read_state(folder + "/" + out + "/last", nullptr, &settings);
        return settings["dropout"].get<double>();
    };
    EXPECT_EQ(train("few", 4, -1), 0);  // of 64 of its 90 tokens each
    EXPECT_EQ(train("many", 12, -1), 0.1);
    EXPECT_EQ(train("few", 13, -1), 0) << "as it was so far";
    EXPECT_EQ(train("few", 14, 0.2), 0.2);
    EXPECT_EQ(train("few", 15, -1), 0.2);
    overfit = true;
    EXPECT_EQ(train("one_batch", 11, -1), 0) << "to learn it by heart is the purpose";
}

TEST(Run, FolderNamesFollowTheData) {
    EXPECT_EQ(default_out({"some/where/text.txt"}), "runs/text");
    EXPECT_EQ(default_out({"some/where/"}), "runs/where");
    EXPECT_EQ(default_out({"some/shards/*.bin"}), "runs/shards");
    EXPECT_EQ(default_out({"."}), "runs/text");
    TrainOptions o;
    o.data = {"text.txt"};
    EXPECT_EQ(cache_folder(o), "runs/cache");
    o.out = "a/b/";
    EXPECT_EQ(cache_folder(o), "a/cache");
    o.out = "b";
    EXPECT_EQ(cache_folder(o), "cache");
}

TEST(Evaluate, CountsEveryTokenOnceWhateverTheBatch) {
    std::string folder = test_folder();
    GPT2Config config;
    config.vocab_size = 257, config.context = 8;
    config.layers = 1, config.heads = 2, config.channels = 8;
    GPT2Ptr model(gpt2_create(config, GPT2Shape{4, 8}));
    gpt2_initialise(model.get(), 1);
    std::string text = some_text(20);
    std::vector<int> ids = Tokenizer::bytes().encode(text);
    write_shard(folder + "/text.bin", ids);
    std::vector<Shard> shards{Shard(folder + "/text.bin", 257)};
    std::vector<int> bytes = bytes_per_token(Tokenizer::bytes());
    Evaluation one = evaluate_model(model.get(), shards, bytes, 1, 8, 0);
    Evaluation four = evaluate_model(model.get(), shards, bytes, 4, 8, 0);
    EXPECT_EQ(one.tokens, ids.size() - 1);
    EXPECT_EQ(four.tokens, ids.size() - 1);
    EXPECT_NEAR(one.loss, four.loss, 1e-5);
    EXPECT_NEAR(one.loss, std::log(257), 0.1);
    EXPECT_NEAR(one.bits_per_byte, one.loss / M_LN2, 1e-12) << "a token is a byte";
    EXPECT_NEAR(one.perplexity(), std::exp(one.loss), 1e-9);
    EXPECT_TRUE(std::isnan(evaluate_model(model.get(), shards, {}, 4, 8, 0).bits_per_byte));
    EXPECT_EQ(evaluate_model(model.get(), shards, bytes, 4, 8, 2).tokens, 16u);
}

TEST(Evaluate, IdsThatTheTokenizerLacksStandForNoText) {
    std::string path = test_folder() + "/a.bin";
    GPT2Config config;
    config.vocab_size = 60000, config.context = 8;
    config.layers = 1, config.heads = 1, config.channels = 4;
    GPT2Ptr model(gpt2_create(config, GPT2Shape{4, 8}));
    gpt2_initialise(model.get(), 1);
    std::vector<int> ids = random_ids(1000, config.vocab_size, 1);
    for (size_t i = 0; i < ids.size(); i += 10) ids[i] = 'a';
    write_shard(path, ids);
    size_t bytes =
        size_t(std::count_if(ids.begin() + 1, ids.end(), [](int id) { return id < 256; }));
    std::vector<Shard> shards{Shard(path, config.vocab_size)};
    Evaluation e =
        evaluate_model(model.get(), shards, bytes_per_token(Tokenizer::bytes()), 4, 8, 0);
    EXPECT_EQ(e.tokens, ids.size() - 1);
    EXPECT_NEAR(e.bits_per_byte, e.loss * double(e.tokens) / (M_LN2 * double(bytes)), 1e-9);
}

TEST(Evaluate, LeavesOutWhatFollowsTheEndOfADocument) {
    std::string path = test_folder() + "/a.bin";
    GPT2Config config;
    config.vocab_size = 30, config.context = 8;
    config.layers = 1, config.heads = 2, config.channels = 8;
    GPT2Ptr model(gpt2_create(config, GPT2Shape{4, 8}));
    gpt2_initialise(model.get(), 1);
    std::vector<int> ids = random_ids(101, 30, 3), bytes(30, 1);
    write_shard(path, ids);
    std::vector<Shard> shards{Shard(path, 30)};
    size_t ends = size_t(std::count(ids.begin(), ids.end() - 1, 7));
    ASSERT_GT(ends, 0u);
    EXPECT_EQ(evaluate_model(model.get(), shards, bytes, 4, 8, 0).tokens, 100u);
    EXPECT_EQ(evaluate_model(model.get(), shards, bytes, 4, 8, 0, 7).tokens, 100 - ends);
    write_shard(path, std::vector<int>(9, 7));
    shards = {Shard(path, 30)};
    EXPECT_EQ(error_of([&] { evaluate_model(model.get(), shards, bytes, 4, 8, 0, 7); }),
              "2 " + path + ": nothing but ends of documents, whose targets are left out");
}

// The losses of endings, from the logits of each row alone.
TEST(Evaluate, ScoresHellaSwagAsTheLogitsSay) {
    constexpr int V = 40, kContext = 14, B = 6;
    GPT2Config config;
    config.vocab_size = V, config.context = kContext;
    config.layers = 2, config.heads = 2, config.channels = 16;
    GPT2Shape shape{B, kContext};
    shape.dtype = test_dtype();
    GPT2Ptr model(gpt2_create(config, shape));
    gpt2_initialise(model.get(), 3);
    std::vector<ChoiceExample> examples(7);
    std::mt19937 random(4);
    for (ChoiceExample& example : examples) {
        example.context = random_ids(1 + random() % 12, V, random());
        for (std::vector<int>& ending : example.endings)
            ending = random_ids(1 + random() % 9, V, random());
    }
    auto scores = score_choices(examples, B, kContext, target_losses(model.get()));
    double most = test_dtype() == Dtype::bf16 ? 0.05 : 1e-4;
    for (size_t i = 0; i < examples.size(); i++)
        for (size_t e = 0; e < kChoices; e++) {
            std::vector<int> row = examples[i].context;
            row.insert(row.end(), examples[i].endings[e].begin(), examples[i].endings[e].end());
            size_t ending = examples[i].endings[e].size();
            if (row.size() > kContext + 1) row.erase(row.begin(), row.end() - kContext - 1);
            int T = int(row.size()) - 1;
            std::vector<real> logits(size_t(T) * V);
            GPT2Pass pass;
            pass.logits = logits.data();
            gpt2_forward(model.get(), row.data(), nullptr, 1, T, pass);
            double loss = 0;
            for (size_t t = row.size() - 1 - ending; t < size_t(T); t++) {
                double sum = 0;
                for (size_t v = 0; v < V; v++) sum += std::exp(double(logits[t * V + v]));
                loss += std::log(sum) - double(logits[t * V + size_t(row[t + 1])]);
            }
            EXPECT_NEAR(scores[i].loss[e], loss, most * double(ending)) << i << ", " << e;
            EXPECT_EQ(scores[i].tokens[e], int(ending));
        }
}

// In a process of its own, `read` after a file of 100,000 bytes was mapped and then cut; its exit
// code, and what it said.
static std::pair<int, std::string> read_cut_file(
    const std::function<int(const MappedFile&)>& read) {
    std::string folder = test_folder(), path = folder + "/a";
    write_file_atomic(path, std::string(100000, 'a'));
    pid_t child = fork();
    if (child == 0) {
        dup2(open((folder + "/err").c_str(), O_WRONLY | O_CREAT, 0644), 2);
        end_on_cut_file();
        MappedFile file(path);
        if (truncate(path.c_str(), 0) != 0) _exit(99);
        _exit(read(file));
    }
    int status = 0;
    waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(folder + "/err")};
}

// What is left when a file is cut at the wrong moment: a line, and not a signal.
TEST(Errors, AFileThatIsCutWhileItIsReadEndsTheProgramWithALine) {
    const std::string kLine = std::string(gpt2_program()) +
                              ": error: a file was cut short while it was read; do not write to "
                              "files in use\n";
    auto [code, error] = read_cut_file([](const MappedFile& file) {
        volatile char last = file.view().back();
        return last == 'a' ? 8 : 7;
    });
    EXPECT_EQ(code, 1);
    EXPECT_EQ(error, kLine);
    std::tie(code, error) = read_cut_file([](const MappedFile& file) {
        { CutWatch watch; }
        std::thread([] {
            CutWatch watch;
            pause();
        }).detach();
        usleep(100000);
        volatile char last = file.view().back();
        return last == 'a' ? 8 : 7;
    });
    EXPECT_EQ(code, 1) << "who watched before, or another thread, is of no help";
    EXPECT_EQ(error, kLine);
}

TEST(Errors, WhoWatchesAFileNoticesThatItIsCut) {
    auto [code, error] = read_cut_file([](const MappedFile& file) {
        CutWatch watch;
        if (watch.cut()) return 2;
        if (file.view().back() != 0 || !watch.cut()) return 3;
        std::string all(file.view());
        return all == std::string(100000, 0) ? 0 : 4;
    });
    EXPECT_EQ(code, 0);
    EXPECT_EQ(error, "");
}

TEST(Sampling, NeverCutsACharacter) {
    EXPECT_EQ(unfinished_bytes(""), 0u);
    EXPECT_EQ(unfinished_bytes("abc"), 0u);
    EXPECT_EQ(unfinished_bytes("ab\xC3"), 1u);
    EXPECT_EQ(unfinished_bytes("ab\xC3\xA9"), 0u);
    EXPECT_EQ(unfinished_bytes("\xE2\x82"), 2u);
    EXPECT_EQ(unfinished_bytes("\xE2\x82\xAC"), 0u);
    EXPECT_EQ(unfinished_bytes("\xF0\x9F\x98"), 3u);
    EXPECT_EQ(unfinished_bytes("\xF0\x9F\x98\x80"), 0u);
    EXPECT_EQ(unfinished_bytes("\x80\x80\x80\x80"), 0u) << "bytes that continue nothing";
    EXPECT_EQ(unfinished_bytes("\xFF"), 0u);
}

TEST(Sampling, GoesOnBeyondTheContextAndIsRepeatable) {
    GPT2Config config;
    config.vocab_size = 257, config.context = 6;
    config.layers = 1, config.heads = 2, config.channels = 8;
    GPT2Shape shape{1, 4, false, 1, 1};
    GPT2Ptr model(gpt2_create(config, shape));
    gpt2_initialise(model.get(), 3);
    Tokenizer tokenizer = Tokenizer::bytes();
    auto draw = [&](uint64_t seed, size_t tokens) {
        Sampler sampler({1, 0, 1}, seed);
        std::string text;
        generate_text(model.get(), tokenizer, starting_tokens({65, 66}, tokenizer, 6), tokens,
                      sampler, [&](std::string_view bytes) { return text += bytes, true; });
        return text;
    };
    std::string text = draw(5, 40);
    EXPECT_EQ(text, draw(5, 40));
    EXPECT_NE(text, draw(6, 40));
    size_t longest = 0;  // one may meet the end of text by chance
    for (uint64_t seed = 1; seed <= 5; seed++) longest = std::max(longest, draw(seed, 40).size());
    EXPECT_GT(longest, 30u);
    EXPECT_EQ(draw(5, 0), "");
}

// Samples that are made together are those that are made alone, greedy or drawn: ones that end
// early make room, and all go on beyond the context. One that nobody reads any more ends all.
TEST(Sampling, TogetherIsAsAlone) {
    if (std::string(gpt2_program()) != "train_gpt2") return;  // it is the CPU twin's contract
    GPT2Config config;
    config.vocab_size = 257, config.context = 20;
    config.layers = 1, config.heads = 2, config.channels = 8;
    Tokenizer tokenizer = Tokenizer::bytes();
    constexpr size_t kTokens = 120;
    std::vector<int> prompt = {65, 66, 67};
    for (bool int8 : {false, true}) {
        GPT2Shape shape = test_shape(1, 20, false, kFewRows);
        shape.int8 = int8;
        GPT2Ptr model(gpt2_create(config, shape));
        gpt2_initialise(model.get(), 3);
        for (double temperature : {0.0, 1.0}) {
            std::vector<Sampler> samplers;
            for (uint64_t i = 0; i < kFewRows; i++) samplers.push_back({{temperature, 0, 1}, i});
            std::vector<std::string> together(kFewRows);
            std::vector<int> ends(kFewRows);
            generate_texts(model.get(), tokenizer, prompt, kTokens, samplers,
                           [&](size_t i, std::string_view bytes, bool last) {
                               EXPECT_EQ(ends[i], 0) << "more after the end";
                               together[i] += bytes, ends[i] += last;
                               return true;
                           });
            EXPECT_EQ(ends, std::vector<int>(kFewRows, 1));
            size_t early = 0;
            for (uint64_t i = 0; i < kFewRows; i++) {
                Sampler sampler({temperature, 0, 1}, i);
                std::string alone;
                generate_text(model.get(), tokenizer, prompt, kTokens, sampler,
                              [&](std::string_view bytes) { return alone += bytes, true; });
                EXPECT_EQ(together[i], alone) << "sample " << i << " at " << temperature;
                early += alone.size() < kTokens / 2;
            }
            EXPECT_TRUE(temperature == 0 || (early > 0 && early < kFewRows)) << early;
            size_t calls = 0;
            generate_texts(model.get(), tokenizer, prompt, kTokens, samplers,
                           [&](size_t, std::string_view, bool) { return ++calls < 3; });
            EXPECT_EQ(calls, 3u);
        }
    }
}

// The cache saves work and nothing else: text is drawn from the logits of the whole window each
// time, which begins anew from its last half where it would be longer than the context.
TEST(Sampling, TextIsDrawnFromWholeWindows) {
    GPT2Config config;
    config.vocab_size = 257, config.context = 10;
    config.layers = 2, config.heads = 2, config.channels = 8;
    GPT2Shape shape = test_shape(1, 10, false, 1);
    shape.dtype = Dtype::fp32;  // with few digits, another order of sums makes another text
    GPT2Ptr model(gpt2_create(config, shape));
    gpt2_initialise(model.get(), 3);
    for (int index : {k_wpe, k_qkvw, k_attprojw, k_fcw, k_fcprojw}) {  // for a context to count
        const ParameterRow row = parameter_table(config)[size_t(index)];
        std::vector<real> values(row.file_size());
        for (int layer = 0; layer < int(row.count); layer++) {
            gpt2_copy_out(model.get(), Group::parameters, index, layer, values.data());
            for (real& value : values) value *= 10;
            gpt2_copy_in(model.get(), Group::parameters, index, layer, values.data());
        }
    }
    std::vector<int> window = {65, 66, 67}, made;
    std::vector<real> logits(257);
    Sampler reference({0.1, 0, 1}, 1), sampler = reference;
    for (int i = 0; i < 40; i++) {
        if (window.size() > 10) window.erase(window.begin(), window.end() - 5);
        gpt2_generate(model.get(), window.data(), 1, int(window.size()), 0, logits.data());
        int token = reference.sample(logits.data(), 257).token;
        if (token == 256) break;  // the end of text
        made.push_back(token), window.push_back(token);
    }
    EXPECT_GT(made.size(), 20u) << "it does not go beyond the context";
    Tokenizer tokenizer = Tokenizer::bytes();
    std::string expected, text;
    for (int token : made) expected += tokenizer.decode_next(token, false);
    generate_text(model.get(), tokenizer, {65, 66, 67}, made.size(), sampler,
                  [&](std::string_view bytes) { return text += bytes, true; });
    EXPECT_EQ(text, expected);
}

// A model that has diverged is said, whichever thread finds it.
TEST(Sampling, LogitsThatAreNoNumbersEndAll) {
    GPT2Config config;
    config.vocab_size = 257, config.context = 20;
    config.layers = 1, config.heads = 2, config.channels = 8;
    GPT2Ptr model(gpt2_create(config, test_shape(1, 20, false, 3)));
    gpt2_initialise(model.get(), 3);
    std::vector<real> bad(size_t(config.channels), std::numeric_limits<real>::quiet_NaN());
    gpt2_copy_in(model.get(), Group::parameters, k_lnfw, 0, bad.data());
    std::vector<Sampler> samplers(3, Sampler({1, 0, 1}, 1));
    std::string error = error_of([&] {
        generate_texts(model.get(), Tokenizer::bytes(), {65}, 5, samplers,
                       [](size_t, std::string_view, bool) { return true; });
    });
    EXPECT_EQ(error.rfind("1 token 0 of 257 has logit", 0), 0u) << error;
}

// The first that is not whole is put out as it comes, the others when their turn is there.
TEST(Sampling, TextsComeInOrder) {
    std::vector<std::string> out;
    SamplesInOrder texts(3, [&](std::string_view text) {
        out.emplace_back(text);
        return out.size() < 6;
    });
    EXPECT_TRUE(texts.add(1, "b1", false));
    EXPECT_TRUE(texts.add(0, "a1", false));
    EXPECT_TRUE(texts.add(1, "b2", true));
    EXPECT_TRUE(texts.add(0, "", false));
    EXPECT_TRUE(texts.add(0, "a2", false));
    EXPECT_TRUE(texts.add(2, "c1", false));
    EXPECT_EQ(out, std::vector<std::string>({"a1", "a2"}));
    EXPECT_TRUE(texts.add(0, "a3", true));
    EXPECT_EQ(out, std::vector<std::string>({"a1", "a2", "a3", "b1b2", "c1"}));
    EXPECT_FALSE(texts.add(2, "c2", true)) << "nobody reads";
}

TEST(Sampling, AsManyTogetherAsFit) {
    GPT2Config config = default_config();
    config.vocab_size = 1000;
    GPT2Shape shape = test_shape(1, 128);
    EXPECT_EQ(samples_together(config, shape, 1), 1);
    EXPECT_EQ(samples_together(config, shape, 5), 5);
    EXPECT_EQ(samples_together(config, shape, 1000), kFewRows);
    config.context = 3;
    EXPECT_EQ(samples_together(config, shape, 1000), 3) << "rows of activations";
}

TEST(Sampling, StartsFromTheEndOfThePromptOrTheEndOfText) {
    Tokenizer tokenizer = Tokenizer::bytes();
    EXPECT_EQ(starting_tokens({}, tokenizer, 4), std::vector<int>({256}));
    EXPECT_EQ(starting_tokens({1, 2, 3}, tokenizer, 4), std::vector<int>({1, 2, 3}));
    EXPECT_EQ(starting_tokens({1, 2, 3, 4, 5}, tokenizer, 4), std::vector<int>({3, 4, 5}));
    EXPECT_EQ(starting_tokens({1, 2}, tokenizer, 1), std::vector<int>({2}));
}

}  // namespace

// ==== main =======================================================================================

// What concerns the program that these tests were built for: what reads and writes files alone is
// tested once, with the CPU twin; several ranks need the CUDA program, and what they do about each
// other does not depend on the precision.
std::string tests_of_program() {
    if (std::string(gpt2_program()) == "train_gpt2") return "-Cuda*.*:Jobs.*:Machines.*";
    std::string tests =
        "Checkpoint.*:Saver.*:ModelFolder.*:Plan.*:Run.*:Evaluate.*:Sampling.*:Cli.*:Cuda*.*:Jobs."
        "*";
    if (test_dtype() == Dtype::fp32) return tests + ":Machines.*";
    return tests +
           "-Cuda.RunsGoFromOneProgramToTheOther:Jobs.*Lost:Jobs.*Launcher*:Jobs.*Hangs*:Jobs.*"
           "Clock*";
}

int main(int argc, char** argv) { return run_tests(argc, argv, tests_of_program()); }
