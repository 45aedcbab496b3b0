// The tests of the command line: they start the program at $GPT2_BINARY (else the one of its name
// in this folder), and read what it says, its exit code and what it leaves.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <regex>
#include <sstream>

#include "../../commands.h"
#include "calls.h"
#include "models.h"
#include "saved.h"
#include "tools.h"

// ==== the command line ===========================================================================

namespace {

TEST_F(Cli, EveryCommandHasHelp) {
    std::vector<std::vector<std::string>> commands = {{},
                                                      {"train"},
                                                      {"sample"},
                                                      {"evaluate"},
                                                      {"shard"},
                                                      {"dump"},
                                                      {"export"},
                                                      {"plan"},
                                                      {"info"},
                                                      {"tokenizer"},
                                                      {"tokenizer", "train"},
                                                      {"tokenizer", "encode"},
                                                      {"tokenizer", "decode"}};
    for (std::vector<std::string> words : commands) {
        words.push_back("--help");
        Outcome help = call(words);
        EXPECT_EQ(help.code, 0) << words[0];
        EXPECT_EQ(help.err, "");
        EXPECT_NE(help.out.find("--help"), std::string::npos);
    }
    std::string help = call({"train", "--help"}).out;
    EXPECT_NE(help.find("--batch-size N "), std::string::npos);
    EXPECT_NE(help.find("[0.1]"), std::string::npos) << "defaults are shown";
    for (size_t begin = 0, end; (end = help.find('\n', begin)) != std::string::npos;
         begin = end + 1)
        EXPECT_LE(end - begin, 100u) << help.substr(begin, end - begin);
}

TEST_F(Cli, MisspeltWordsGetTheNearest) {
    expect_error(call({}), 2, "no command");
    expect_error(call({"tokenizer"}), 2, "no command");
    expect_error(call({"trian"}), 2, "did you mean train?");
    expect_error(call({"train", "--bacth-size", "4"}), 2,
                 "unknown option --bacth-size: did you mean --batch-size?");
    expect_error(call({"train", "--data", "text.txt", "--lerning-rate=1"}), 2,
                 "--lerning-rate: did you mean --learning-rate?");
    expect_error(call({"tokenizer", "encode", "--tokeniser", "x"}), 2, "--tokenizer?");
    expect_error(call({"train", "--data", "text.txt", "-x"}), 2, "unknown option -x");
    expect_error(call({"train", "text.txt"}), 2, "text.txt");
    expect_error(call({"train", "--data"}), 2, "--data");
    expect_error(call({"train"}), 2, "--data");
    expect_error(call({"train", "--data", "text.txt", "--steps", "2", "--steps", "3"}), 2,
                 "--steps");
}

TEST_F(Cli, ValuesOutOfRangeAreRefused) {
    const char* cases[][2] = {{"--batch-size", "0"},
                              {"--batch-size", "-3"},
                              {"--batch-size", "two"},
                              {"--batch-size", "1.5"},
                              {"--steps", "0"},
                              {"--steps", "010"},
                              {"--seed", "+07"},
                              {"--learning-rate", "nan"},
                              {"--learning-rate", "NaN"},
                              {"--learning-rate", "inf"},
                              {"--learning-rate", "-inf"},
                              {"--learning-rate", "-1"},
                              {"--dropout", "1"},
                              {"--beta2", "1"},
                              {"--epsilon", "0"},
                              {"--schedule", "sine"},
                              {"--dtype", "fp8"},
                              {"--recompute", "4"},
                              {"--tf32", "1"},
                              {"--deterministic", "yes"},
                              {"--time-limit", "nan"},
                              {"--seed", "-1"},
                              {"--keep", "-1"},
                              {"--threads", "0"},
                              {"--tokenizer", "bpe:5"},
                              {"--tokenizer", "bpe:x"},
                              {"--tokenizer", "nothing"},
                              {"--sequence-length", "17"},
                              {"--total-batch-tokens", "33"}};
    for (auto [option, value] : cases) {
        std::vector<std::string> words = {"train", "--data", "text.txt", "--context",
                                          "16",    option,   value};
        std::string part = std::string(value) == "nothing" ? "nothing" : option;
        expect_error(call(words), 2, part);
    }
    expect_error(call({"train", "--data", "text.txt", "--heads", "5", "--channels", "64"}), 2,
                 "--heads 5 --channels 64: heads must divide channels");
    expect_error(call({"train", "--data", "text.txt", "--steps", "1", "--epochs", "1"}), 2,
                 "--steps and --epochs");
    EXPECT_FALSE(fs::exists(path("runs/text"))) << "nothing was begun";
}

// A program that is always one process does not pass over what is about several.
TEST_F(Cli, WhatIsAboutSeveralRanksIsRefusedByAProgramThatIsOne) {
    if (gpt2_alone().empty()) GTEST_SKIP() << "this program may be several";
    for (auto [option, value] : std::vector<std::pair<std::string, std::string>>{
             {"--zero", "1"}, {"--reduce", "bf16"}, {"--deterministic", "ranks"}})
        expect_error(call({"train", "--data", "text.txt", option, value}), 2,
                     option + " " + value + ": " + gpt2_alone());
    EXPECT_FALSE(fs::exists(path("runs/text"))) << "nothing was begun";
}

// In float32 and in bf16, and a run goes on from one to the other, which a line says; a word that
// names no precision is refused.
TEST_F(Cli, EveryCommandComputesInEitherPrecision) {
    make_model();
    std::vector<double> losses;
    for (std::string dtype : {"fp32", "bf16"}) {
        for (std::vector<std::string> words :
             {std::vector<std::string>{"plan"},
              {"sample", "--model", "run"},
              {"evaluate", "--model", "run", "--data", "text.txt", "--json"}}) {
            words.insert(words.end(), {"--threads", "1", "--dtype", dtype});
            if (words[0] == "sample") words.insert(words.end(), {"--max-new-tokens", "3"});
            Outcome outcome = call(words);
            EXPECT_EQ(outcome.code, 0) << words[0] << ": " << outcome.err;
            if (words[0] == "evaluate")
                losses.push_back(json::parse(outcome.out).at("loss").get<double>());
        }
    }
    EXPECT_NEAR(losses.at(0), losses.at(1), 0.05) << "logits of a few units, rounded by 2^-9";
    EXPECT_NE(losses.at(0), losses.at(1)) << "one precision, whatever --dtype says";
    std::string before = dtype_name(test_dtype());
    for (auto [steps, dtype] : {std::pair("3", "fp32"), {"4", "bf16"}, {"5", "fp32"}}) {
        std::vector<std::string> words = train_words(
            {"--data", "text.txt", "--tokenizer", "chars", "--steps", steps, "--out", "run"});
        *(std::find(words.begin(), words.end(), "--dtype") + 1) = dtype;
        Outcome trained = call(words);
        EXPECT_EQ(trained.code, 0) << trained.err;
        std::string note = format("goes on with %s", dtype);
        bool noted = (trained.out + trained.err).find(note) != std::string::npos;
        EXPECT_EQ(noted, before != dtype) << trained.out;
        before = dtype;
    }
    expect_error(call({"plan", "--dtype", "fp16"}), 2, "--dtype");
}

// Weights in bf16 and fp32 are --dtype by another name; in int8 they are other numbers, near ones,
// and what evaluates says which it took. The CUDA program has no int8.
TEST_F(Cli, WeightsAreRoundedAsAsked) {
    make_model();
    auto evaluate = [&](const std::vector<std::string>& more) {
        std::vector<std::string> words = {"evaluate", "--model", "run",       "--data",
                                          "text.txt", "--json",  "--threads", "1"};
        words.insert(words.end(), more.begin(), more.end());
        return call(words);
    };
    auto loss = [&](const std::vector<std::string>& more, const std::string& weights) {
        Outcome outcome = evaluate(more);
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        json root = json::parse(outcome.out);
        EXPECT_EQ(root.at("weights"), weights);
        double nats = root.at("loss").get<double>();
        EXPECT_NEAR(root.at("perplexity").get<double>(), std::exp(nats), 1e-6 * std::exp(nats));
        return nats;
    };
    for (std::string weights : {"fp32", "bf16"}) {
        double as_dtype = loss({"--dtype", weights}, weights);
        EXPECT_EQ(loss({"--weights", weights}, weights), as_dtype);
        EXPECT_EQ(loss({"--weights", weights, "--dtype", weights}, weights), as_dtype);
    }
    expect_error(evaluate({"--weights", "bf16", "--dtype", "fp32"}), 2,
                 "--weights bf16 --dtype fp32");
    expect_error(evaluate({"--weights", "int4"}), 2, "--weights");
    expect_error(call({"sample", "--model", "run", "--weights", "float"}), 2, "--weights");
    expect_error(call({"train", "--data", "text.txt", "--weights", "int8"}), 2, "--weights");
    if (std::string(gpt2_program()) != "train_gpt2") {
        expect_error(evaluate({"--weights", "int8"}), 2, "--weights int8");
        return expect_error(call({"sample", "--model", "run", "--weights", "int8"}), 2,
                            "--weights int8");
    }
    double exact = loss({"--dtype", "fp32"}, "fp32");
    for (std::string dtype : {"fp32", "bf16"}) {
        double rounded = loss({"--weights", "int8", "--dtype", dtype}, "int8");
        EXPECT_NEAR(rounded, exact, 0.05) << "logits of a few units, weights rounded by 2^-8";
        EXPECT_NE(rounded, loss({"--dtype", dtype}, dtype));
    }
    Outcome said = call({"evaluate", "--model", "run", "--data", "text.txt", "--weights", "int8"});
    EXPECT_NE(said.out.find("weights in int8"), std::string::npos) << said.out;
}

// Several samples at once are, one behind the other, those that each seed makes alone.
TEST_F(Cli, SamplesTogetherAreThoseOfTheirSeeds) {
    make_model();
    std::vector<std::vector<std::string>> ways = {{}, {"--temperature", "0"}};
    if (std::string(gpt2_program()) == "train_gpt2") ways.push_back({"--weights", "int8"});
    for (const std::vector<std::string>& way : ways) {
        auto sample = [&](int seed, int samples) {
            std::vector<std::string> words = {"sample",
                                              "--threads",
                                              "1",
                                              "--model",
                                              "run",
                                              "--seed",
                                              format("%d", seed),
                                              "--num-samples",
                                              format("%d", samples),
                                              "--max-new-tokens",
                                              "40"};
            words.insert(words.end(), way.begin(), way.end());
            Outcome outcome = call(words);
            EXPECT_EQ(outcome.code, 0) << outcome.err;
            return outcome.out;
        };
        std::string expected;
        constexpr int kSamples = kFewRows + 2;  // more than go together
        for (int i = 0; i < kSamples; i++)
            expected += format("== sample %d of %d, seed %d ==\n", i + 1, kSamples, 7 + i) +
                        sample(7 + i, 1);
        EXPECT_EQ(sample(7, kSamples), expected);
    }
}

// auto is what a run was begun in, so that it goes on to the same bits wherever it goes on; and for
// a new one what was found once, which a file keeps.
TEST_F(Cli, ThePrecisionOfARunStays) {
    auto train = [&](const std::string& out, const char* steps, const std::string& dtype) {
        std::vector<std::string> words = train_words(
            {"--data", "text.txt", "--tokenizer", "chars", "--steps", steps, "--out", out});
        *(std::find(words.begin(), words.end(), "--dtype") + 1) = dtype;
        Outcome outcome = call(words);
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_EQ(outcome.out.find("goes on with"), std::string::npos) << outcome.out;
        return verify_checkpoint(path(out + "/last"))["dtype"].get<std::string>();
    };
    for (std::string dtype : {"fp32", "bf16"}) {
        EXPECT_EQ(train(dtype, "2", dtype), dtype);
        EXPECT_EQ(train(dtype, "4", "auto"), dtype);
    }
    const char* before = getenv("XDG_CACHE_HOME");
    std::string kept = before != nullptr ? before : "";
    setenv("XDG_CACHE_HOME", path("cache").c_str(), 1);
    std::string found = train("new", "1", "auto");
    std::error_code ignored;  // a processor that leaves no choice keeps none
    for (const auto& entry : fs::directory_iterator(path("cache/train_gpt2"), ignored)) {
        std::string name = entry.path().string();
        if (name.find("dtype of ") == std::string::npos) continue;
        EXPECT_EQ(read_file(name), found + "\n");
        for (std::string dtype : {"fp32", "bf16"}) {
            write_file_atomic(name, dtype + "\n");
            EXPECT_EQ(train("by_" + dtype, "1", "auto"), dtype);
        }
        write_file_atomic(name, "x");
        train("anew", "1", "auto");
        EXPECT_NE(read_file(name), "x") << "what is damaged is found anew";
    }
    before != nullptr ? setenv("XDG_CACHE_HOME", kept.c_str(), 1) : unsetenv("XDG_CACHE_HOME");
}

// Weights of another format are converted, and one line says so.
TEST_F(Cli, ConvertedWeightsAreSaid) {
    make_model("bytes");
    std::string file = path("run/last/model.safetensors");
    RawTensors tensors = read_raw(file);
    for (auto& [name, tensor] : tensors) {
        std::string halves;
        for (size_t i = 2; i < tensor.bytes.size(); i += 4) halves += tensor.bytes.substr(i, 2);
        tensor.dtype = "BF16", tensor.bytes = halves;
    }
    fs::create_directories(path("half"));
    for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json"})
        fs::copy_file(path(std::string("run/last/") + name), path(std::string("half/") + name));
    write_raw(path("half/model.safetensors"), tensors);
    const std::string note = "weights are BF16 in half/model.safetensors: converted to float32\n";
    std::vector<std::string> words = {"sample", "--threads", "1", "--max-new-tokens", "3"};
    words.insert(words.end(), {"--model", "half"});
    Outcome sampled = call(words);
    EXPECT_EQ(sampled.code, 0) << sampled.err;
    EXPECT_EQ(sampled.err, "note: " + note);
    words.back() = "run";
    EXPECT_EQ(call(words).err, "");
    Outcome tuned = call({"train", "--threads", "1", "--data", "text.txt", "--model", "half",
                          "--steps", "1", "--out", "tuned"});
    EXPECT_EQ(tuned.code, 0) << tuned.err;
    EXPECT_NE(tuned.out.find("note       " + note), std::string::npos) << tuned.out;
}

TEST_F(Cli, DataThatIsNoDataIsRefused) {
    expect_train_error({"--data", "missing.txt"}, 2, "missing.txt");
    expect_train_error({"--data", "*.nothing"}, 2, "*.nothing");
    write("empty.txt", "");
    expect_train_error({"--data", "empty.txt"}, 2, "empty.txt");
    write("short.txt", "Too short.");
    expect_train_error({"--data", "short.txt", "--tokenizer", "bytes"}, 2, "--sequence-length");
    write("one.txt", "a");
    expect_train_error({"--data", "one.txt"}, 2, "one.txt");
    fs::create_directories(path("nothing/.hidden"));
    write("nothing/.hidden/text.txt", "text");
    expect_train_error({"--data", "nothing"}, 2, "nothing");
    expect_train_error({"--data", "/dev/null"}, 2, "/dev/null");
    expect_train_error({"--data", "text.txt", "--val", "missing.txt"}, 2, "missing.txt");
}

TEST_F(Cli, TextThatIsNotUtf8IsKeptAsBytes) {
    std::string bytes;
    for (int i = 0; i < 2000; i++) bytes += char(i * 7 + i / 256);
    write("bytes.txt", bytes);
    Outcome trained = call(train_words({"--data", "bytes.txt", "--steps", "2", "--out", "run"}));
    ASSERT_EQ(trained.code, 0) << trained.err;
    Outcome ids = call({"tokenizer", "encode", "--tokenizer", "run/last", "--in", "bytes.txt"});
    EXPECT_EQ(ids.code, 0) << ids.err;
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "run/last"}, ids.out).out, bytes);
    call({"tokenizer", "encode", "--tokenizer", "run", "--in", "bytes.txt", "--out", "x.npy"});
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "run/last", "--in", "x.npy"}).out, bytes);
}

TEST_F(Cli, ShardsAreCheckedWhenTheyAreOpened) {
    write_shard(path("good.bin"), std::vector<int>(200, 7));
    std::string good = read_file(path("good.bin"));
    EXPECT_EQ(call(train_words({"--data", "good.bin", "--steps", "1", "--out", "run"})).code, 0);
    for (size_t size : {0, 1, 3, 4, 11, 12, 1023, 1024, 1025, 1200, 1423}) {
        write("cut.bin", good.substr(0, size));
        expect_train_error({"--data", "cut.bin"}, 2, "cut.bin");
    }
    write("long.bin", good + "x");
    expect_train_error({"--data", "long.bin"}, 2, "long.bin");
    write_shard(path("past.bin"), std::vector<int>(200, 60000));
    expect_train_error({"--data", "past.bin"}, 2, "60000");
    expect_train_error({"--data", "good.bin", "text.txt"}, 2, "not both");
    expect_train_error({"--data", "text.txt", "good.bin"}, 2, "not both");
}

TEST_F(Cli, PlacesThatCannotBeWrittenAreTheMachinesFault) {
    for (const char* out : {"/proc/nothing/run", "/dev/null/run", "text.txt/run"})
        expect_train_error({"--data", "text.txt", "--steps", "1", "--out", out}, 1, "cannot");
    expect_error(call({"tokenizer", "train", "--data", "text.txt", "--out", "/proc/nothing"}), 1,
                 "/proc/nothing");
}

#if defined(__has_feature)
#    if __has_feature(thread_sanitizer)
#        define GPT2_THREAD_SANITIZER
#    endif
#endif
#ifdef GPT2_THREAD_SANITIZER
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
const char* const kDiesOfTheLimit =
    "the thread sanitizer writes files of its own and dies of the limit";

TEST_F(Cli, AFullDiskEndsTheRunWithOneLine) {
    if (kThreadSanitizer) GTEST_SKIP() << kDiesOfTheLimit;
    // From 6,000 bytes up: libomp makes a small file of shared memory when it starts, and needs it.
    for (rlim_t limit : {6000, 9000, 20000}) {
        Call full{folder_, train_words({"--data", "text.txt", "--tokenizer", "bytes", "--steps",
                                        "30", "--save-retry", "0", "--out", "run"})};
        full.file_limit = limit;
        Outcome outcome = full.run();
        std::string error = std::string(gpt2_program()) + ": error: ";
        size_t at = outcome.err.find(error);  // warnings come before
        ASSERT_NE(at, std::string::npos) << outcome.err;
        outcome.err.erase(0, at);
        expect_error(outcome, 1, "File too large");
        fs::remove_all(path("run"));
    }
    make_model();
    Call full{folder_, {"sample", "--threads", "1", "--model", "run"}};
    full.out_fd = open("/dev/full", O_WRONLY);
    expect_error(full.run(), 1, "standard output");
    close(full.out_fd);
}

// As a daemon may be started: what is said goes nowhere, and not into the files of the run.
TEST_F(Cli, ClosedStandardStreamsAreNoFiles) {
    std::string line = "cd '" + folder_ + "' && '" + binary() + "'";
    for (const std::string& word : train_words(
             {"--data", "text.txt", "--tokenizer", "bytes", "--steps", "2", "--out", "run"}))
        line += " " + word;
    ASSERT_EQ(system((line + " <&- >&- 2>&-").c_str()), 0);
    std::stringstream log(read_file(path("run/log.jsonl")));
    size_t records = 0;
    for (std::string text; std::getline(log, text); records++)
        EXPECT_TRUE(json::accept(text)) << text;
    EXPECT_EQ(records, 3u);
    EXPECT_EQ(read_file(path("run/lock")).rfind("process ", 0), 0u);
    EXPECT_EQ(read_file(path("run/lock")).find('\n'), std::string::npos);
}

// What a user names with /dev/stdout, /dev/null or >(...): a link to standard output here, since
// the program that would replace the machine's own is not to be tried on it.
TEST_F(Cli, WhatIsWrittenGoesThroughStandardOutputAndPipes) {
    make_model("bytes");
    std::vector<std::string> words = {"sample",  "--model",   "run", "--prompt",
                                      "The cat", "--threads", "1",   "--max-new-tokens",
                                      "3",       "--out",     "out"};
    Outcome plain = call(std::vector<std::string>(words.begin(), words.end() - 2));
    fs::create_symlink("/proc/self/fd/1", path("out"));
    Outcome out = call(words);
    EXPECT_EQ(out.code, 0) << out.err;
    EXPECT_EQ(out.out, plain.out);
    EXPECT_TRUE(fs::is_symlink(path("out")));
    words.back() = "pipe";
    ASSERT_EQ(mkfifo(path("pipe").c_str(), 0600), 0);
    int reader = open(path("pipe").c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    EXPECT_EQ(call(words).code, 0);
    std::string text(4096, 0);
    text.resize(size_t(std::max<ssize_t>(0, read(reader, text.data(), text.size()))));
    close(reader);
    EXPECT_EQ(text, plain.out);
    EXPECT_TRUE(fs::is_fifo(path("pipe")));
    words.back() = "run";
    expect_error(call(words), 1, "run: not a regular file");
}

TEST_F(Cli, AReaderThatGoesAwayIsNoError) {
    make_model();
    int ends[2];
    ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
    Call broken{folder_, {"sample", "--threads", "1", "--model", "run", "--num-samples", "50"}};
    broken.out_fd = ends[1];
    close(ends[0]);
    Outcome outcome = broken.run();
    close(ends[1]);
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_EQ(outcome.err, "");
}

// Numbers without end, as from a program that generates them.
TEST_F(Cli, DecodingEndsWithItsReaderAndOnAFullDisk) {
    auto decode = [&](const std::string& output) {
        std::string line = "cd '" + folder_ + "' && (yes 65 | timeout 20 '" + binary() +
                           "' tokenizer decode --tokenizer bytes 2>errors" + output;
        EXPECT_EQ(system(line.c_str()), 0) << line;
        return Outcome{std::stoi(read_file(path("code"))), "", read_file(path("errors"))};
    };
    Outcome unread = decode("; echo $? >code) | head -c 1 >first");
    EXPECT_EQ(unread.code, 0) << unread.err;
    EXPECT_EQ(unread.err, "");
    EXPECT_EQ(read_file(path("first")), "A");
    expect_error(decode(" >/dev/full; echo $? >code)"), 1, "standard output: cannot write");
}

TEST_F(Cli, APromptIsCroppedAndItsUnknownCharactersDropped) {
    make_model();
    Outcome long_prompt = call({"sample", "--threads", "1", "--model", "run", "--max-new-tokens",
                                "5", "--prompt", "The cat sat on mat 1. The cat sat"});
    EXPECT_EQ(long_prompt.code, 0);
    EXPECT_EQ(long_prompt.error_lines(), 1u) << long_prompt.err;
    EXPECT_NE(long_prompt.err.find("the context 16: its last 15"), std::string::npos)
        << long_prompt.err;
    Outcome unknown =
        call({"sample", "--threads", "1", "--model", "run", "--prompt", "The \xE2\x82\xAC cat"});
    EXPECT_EQ(unknown.code, 0);
    EXPECT_EQ(unknown.error_lines(), 1u);
    EXPECT_NE(unknown.err.find("\xE2\x82\xAC"), std::string::npos) << unknown.err;
    Outcome empty = call({"sample", "--threads", "1", "--model", "run", "--prompt", ""});
    EXPECT_EQ(empty.code, 0);
    EXPECT_EQ(empty.err, "");
}

// The word behind `--prompt=` is no prompt.
TEST_F(Cli, AnEmptyValueMayStandBehindAnEqualsSign) {
    make_model();
    std::vector<std::string> words = {"sample",    "--model",          "run",
                                      "--prompt=", "--max-new-tokens", "3"};
    Outcome equals = call(words);
    EXPECT_EQ(equals.code, 0) << equals.err;
    words[3] = "--prompt";
    words.insert(words.begin() + 4, "");
    EXPECT_EQ(equals.out, call(words).out);
    EXPECT_EQ(call({"sample", "--model", "run", "--max-new-tokens", "3", "--prompt="}).out,
              equals.out);
    words[4] = "mat=";
    EXPECT_EQ(call(words).out.rfind("mat=", 0), 0u) << "a value of its own";
    expect_error(call({"sample", "--model", "run", "--seed="}), 2, "--seed");
}

TEST_F(Cli, SamplesAreRepeatableAndTheirOptionsChecked) {
    make_model();
    std::vector<std::string> words = {"sample",           "--model", "run",    "--prompt", "The",
                                      "--max-new-tokens", "30",      "--seed", "3"};
    Outcome first = call(words);
    EXPECT_EQ(first.out.rfind("The", 0), 0u);
    EXPECT_EQ(first.out, call(words).out);
    words.insert(words.end(), {"--out", "sample.txt"});
    EXPECT_EQ(call(words).out, "");
    EXPECT_EQ(read_file(path("sample.txt")), first.out);
    const char* cases[][2] = {{"--temperature", "-1"},  {"--temperature", "nan"},
                              {"--top-p", "0"},         {"--top-p", "1.5"},
                              {"--top-k", "-1"},        {"--num-samples", "0"},
                              {"--max-new-tokens", "0"}};
    for (auto [option, value] : cases)
        expect_error(call({"sample", "--threads", "1", "--model", "run", option, value}), 2,
                     option);
}

// As GPT-2's vocabulary is put into gpt2/.
TEST_F(Cli, AFolderOfAVocabularyHidesNoModelOfItsName) {
    write("small/vocab.bpe", "#version: 0.2\n");
    Outcome plan = call({"plan", "--model", "small"});
    EXPECT_EQ(plan.code, 0) << plan.err;
    EXPECT_NE(plan.out.find("4 layers"), std::string::npos) << plan.out;
    write("small/config.json", "{}");
    expect_error(call({"plan", "--model", "small"}), 2, "small/config.json");
    write("other/vocab.bpe", "#version: 0.2\n");
    expect_error(call({"plan", "--model", "other"}), 2, "other: neither a model folder");
}

TEST_F(Cli, AFolderNeedNotBeNamedInUtf8) {
    make_model("bytes");
    fs::copy(fs::canonical(path("run/last")), path("caf\351"));
    std::vector<std::string> words = {"train",     "--model",  "caf\351",
                                      "--data",    "text.txt", "--out",
                                      "on",        "--dtype",  dtype_name(test_dtype()),
                                      "--threads", "1",        "--steps",
                                      "1"};
    Outcome first = call(words);
    EXPECT_EQ(first.code, 0) << first.err;
    words.back() = "2";
    Outcome second = call(words);
    EXPECT_EQ(second.code, 0) << second.err;
    EXPECT_NE(second.out.find("going on with on/step_00000001"), std::string::npos) << second.out;
}

TEST_F(Cli, ModelFoldersOfOtherKindsAreRefused) {
    expect_error(call({"sample", "--model", "missing"}), 2, "missing");
    expect_error(call({"sample", "--model", "text.txt"}), 2, "text.txt");
    expect_error(call({"sample", "--model", "."}), 2, "neither");
    write("llama/config.json", "{\"model_type\": \"llama\", \"vocab_size\": 10}");
    for (const char* command : {"sample", "evaluate"})
        expect_error(call({command, "--model", "llama", "--data", "text.txt"}), 2,
                     std::string(command) == "sample" ? "--data" : "llama");
    expect_error(call({"sample", "--model", "llama"}), 2, "model_type");
    expect_error(call({"train", "--data", "text.txt", "--model", "llama"}), 2, "model_type");
    write("broken/config.json", "{\"model_type\": ");
    expect_error(call({"sample", "--model", "broken"}), 2, "broken/config.json");
    make_model();
    fs::resize_file(path("run/last/model.safetensors"), 500);
    expect_error(call({"sample", "--threads", "1", "--model", "run"}), 2, "model.safetensors");
    EXPECT_EQ(call({"info", "run"}).code, 2);
    EXPECT_EQ(call({"info", "text.txt"}).code, 0);
    expect_error(call({"info", "missing"}), 2, "missing");
    expect_error(call({"info"}), 2, "PATH");
}

TEST_F(Cli, ModelsGoToOtherProgramsAndComeBack) {
    make_model();
    Outcome made = call({"export", "--model", "run", "--out", "hub", "--max-shard-size", "1KB"});
    EXPECT_EQ(made.code, 0) << made.err;
    EXPECT_EQ(made.err, "");
    made = call({"export", "--model", "hub", "--out", "model.bin"});
    EXPECT_EQ(made.code, 0) << made.err;
    auto same = [&](std::vector<std::string> words) {
        words.insert(words.end(),
                     {"--threads", "1", "--dtype", dtype_name(test_dtype()), "--model"});
        std::vector<std::string> out;
        for (const char* model : {"run", "hub", "model.bin"}) {
            std::vector<std::string> all = words;
            all.push_back(model);
            if (std::string(model) == "model.bin" && words[0] != "dump")
                all.insert(all.end(), {"--tokenizer", "hub"});
            Outcome outcome = call(all);
            EXPECT_EQ(outcome.code, 0) << outcome.err;
            if (words[0] == "evaluate") outcome.out = outcome.out.substr(0, outcome.out.find(','));
            out.push_back(words[0] == "dump" ? read_file(path("dump.safetensors")) : outcome.out);
        }
        EXPECT_EQ(out[0], out[1]);
        EXPECT_EQ(out[0], out[2]);
    };
    write_npy(path("ids.npy"), {1, 2, 3, 4}, {1, 4});
    same({"sample", "--max-new-tokens", "20", "--temperature", "0"});
    same({"evaluate", "--data", "text.txt", "--json"});
    same({"dump", "--tokens", "ids.npy", "--out", "dump.safetensors"});
    Outcome tuned = call({"train", "--data", "text.txt", "--model", "model.bin", "--tokenizer",
                          "hub", "--steps", "1", "--batch-size", "2", "--threads", "1", "--dtype",
                          dtype_name(test_dtype()), "--out", "tuned"});
    EXPECT_EQ(tuned.code, 0) << tuned.err;
    Outcome info = call({"info", "hub", "model.bin", "run"});
    EXPECT_EQ(info.code, 0) << info.out;
    EXPECT_NE(info.out.find("model.bin: model of llm.c"), std::string::npos) << info.out;
}

// Folders that were saved before there was tokenizer.json have vocab.json and merges.txt.
TEST_F(Cli, ATokenizerIsFoundInItsOlderForm) {
    make_model("bpe:300");
    ASSERT_EQ(call({"export", "--model", "run", "--out", "older"}).code, 0);
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"})
        fs::remove(path("older/") + name);
    auto sample = [&](const char* model) {
        Outcome outcome = call({"sample", "--model", model, "--threads", "1"});
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        return outcome.out;
    };
    EXPECT_EQ(sample("older"), sample("run"));
    Outcome info = call({"info", "older"});
    EXPECT_NE(info.out.find("; tokenizer of 300 tokens"), std::string::npos) << info.out;
    fs::remove(path("older/merges.txt"));
    expect_error(call({"sample", "--model", "older"}), 2, "older: there is no tokenizer");
}

TEST_F(Cli, ExportRefusesWhatItCannotDo) {
    make_model();
    expect_error(call({"export", "--out", "x"}), 2, "--model is missing");
    expect_error(call({"export", "--model", "run"}), 2, "--out is missing");
    expect_error(call({"export", "--model", "run", "--out", "run"}), 2,
                 "is there already; give another name, or remove it first");
    expect_error(call({"export", "--model", "run", "--out", "."}), 2, "is where the program runs");
    fs::create_symlink("nothing", path("link"));
    expect_error(call({"export", "--model", "run", "--out", "link"}), 2,
                 "is a link to what is not");
    expect_error(call({"export", "--model", "none", "--out", "x"}), 2, "none: no such");
    expect_error(call({"export", "--model", "text.txt", "--out", "x"}), 2, "no model of llm.c");
    expect_error(call({"export", "--model", "run", "--out", "x", "--export-dtype", "int8"}), 2,
                 "must be fp32|bf16|fp16");
    expect_error(call({"export", "--model", "run", "--out", "x", "--max-shard-size", "5 G"}), 2,
                 "must be bytes, such as 5GB");
    expect_error(call({"export", "--model", "run", "--out", "x", "--max-shard", "5GB"}), 2,
                 "did you mean --max-shard-size?");
    expect_error(call({"exprot"}), 2, "did you mean export?");
    expect_error(call({"export", "--model", "run", "--out", "x.bin", "--export-dtype", "fp16"}), 2,
                 "llm.c has none");
    expect_error(call({"export", "--model", "run", "--out", "x", "--state", "text.txt"}), 2,
                 "goes from llm.c to a folder");
    EXPECT_EQ(call({"export", "--model", "run", "--out", "m.bin"}).code, 0);
    expect_error(call({"export", "--model", "m.bin", "--out", "x", "--state", "m.bin"}), 2,
                 "a state of llm.c has 20240527");
    expect_error(call({"sample", "--model", "m.bin"}), 2, "there is no tokenizer; name one with");
    expect_error(call({"train", "--data", "text.txt", "--model", "m.bin"}), 2,
                 "m.bin: has no tokenizer; name the one it was trained with");
    expect_error(call({"train", "--data", "text.txt", "--model", "gone.bin"}), 2, "gone.bin");
    Outcome bare = call({"export", "--model", "m.bin", "--out", "bare"});
    EXPECT_EQ(bare.code, 0);
    EXPECT_NE(bare.err.find("note: m.bin has no tokenizer"), std::string::npos) << bare.err;
    fs::resize_file(path("run/last/optimizer.safetensors"), 500);  // its hashes are verified
    expect_error(call({"export", "--model", "run", "--out", "x"}), 2, "optimizer.safetensors");
    fs::resize_file(path("m.bin"), 5000);
    expect_error(call({"export", "--model", "m.bin", "--out", "x"}), 2, "cut?");
    EXPECT_FALSE(fs::exists(path("x")));
    EXPECT_FALSE(fs::exists(path("x.bin")));
}

TEST_F(Cli, AFullDiskLeavesNothingOfAnExport) {
    if (kThreadSanitizer) GTEST_SKIP() << kDiesOfTheLimit;
    make_model();
    for (const char* out : {"new", "new.bin"}) {
        std::vector<std::string> words = {"export", "--model", "run", "--out", out};
        Outcome full = Call{folder_, words, "", 4096, -1}.run();
        expect_error(full, 1, "File too large");
        for (const auto& item : fs::directory_iterator(folder_))
            EXPECT_EQ(item.path().filename().string().find("new"), std::string::npos);
    }
}

// A program that writes until it is stopped, and one that is stopped over a folder.
TEST_F(Cli, ASignalLeavesNothingOfWhatIsNotFinished) {
    make_model();
    auto is_begun = [&] {
        for (const auto& item : fs::directory_iterator(folder_))
            if (item.path().filename().string().starts_with("new")) return true;
        return false;
    };
    // A model of zeros, large enough to be seen while it is written; the file has no blocks.
    int32_t header[kLlmcHeaderInts] = {kLlmcModel, kLlmcFloat32, 1024,   1 << 14, 1,
                                       1,          1024,         1 << 14};
    write("zeros.bin", std::string(reinterpret_cast<char*>(header), sizeof header));
    GPT2Config config;
    config.context = 1024, config.vocab_size = 1 << 14, config.layers = 1, config.heads = 1,
    config.channels = 1024;
    fs::resize_file(path("zeros.bin"), sizeof header + 4 * llmc_offsets(config, 1 << 14).back());
    const std::vector<std::string> kWords[] = {
        {"sample", "--model", "run", "--num-samples", "1000000", "--out", "new"},
        {"export", "--model", "zeros.bin", "--out", "new"},
        {"export", "--model", "zeros.bin", "--out", "new.bin"}};
    for (int signal : {SIGINT, SIGTERM, SIGHUP})
        for (const std::vector<std::string>& words : kWords) {
            Call long_call{folder_, words};
            pid_t child = long_call.start();
            for (int i = 0; i < 30000 && !is_begun(); i++) usleep(1000);
            EXPECT_TRUE(is_begun());
            kill(child, signal);
            EXPECT_EQ(long_call.finish(child).code, 128 + signal) << words[0];
            EXPECT_FALSE(is_begun()) << words[0] << ": something is left";
        }
}

TEST_F(Cli, ASignalSavesAndTheRunGoesOn) {
    for (int signal : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU}) {
        std::string out = format("run%d", signal);
        std::vector<std::string> words =
            train_words({"--data", "text.txt", "--out", out, "--steps"});
        words.push_back("100000000");
        Call long_run{folder_, words};
        pid_t child = long_run.start();
        std::error_code ignored;
        for (int i = 0; i < 3000; i++) {  // until it trains
            usleep(10000);
            if (fs::file_size(path(out + "/log.jsonl"), ignored) > 200 && !ignored) break;
        }
        kill(child, signal);
        Outcome stopped = long_run.finish(child);
        EXPECT_EQ(stopped.code, 128 + signal) << stopped.err;
        EXPECT_NE(stopped.out.find("go on with: "), std::string::npos);
        json trainer = json::parse(read_file(path(out + "/last/trainer.json")));
        size_t step = trainer.at("step");
        words.back() = std::to_string(step + 2);
        Outcome rest = call(words);
        EXPECT_EQ(rest.code, 0) << rest.err;
        EXPECT_NE(rest.out.find("going on with"), std::string::npos);
        trainer = json::parse(read_file(path(out + "/last/trainer.json")));
        EXPECT_EQ(trainer.at("step"), step + 2);
    }
}

std::string read_if_there(const std::string& path) {
    return path_exists(path) ? read_file(path) : "";
}

// The first signal asks for a save, which fails here and waits for an hour. What the same event may
// send with it does not disturb that; a second one of a person ends it.
TEST_F(Cli, ASecondSignalEndsARunAtOnce) {
    if (kThreadSanitizer) GTEST_SKIP() << kDiesOfTheLimit;
    Call run{folder_, train_words({"--data", "text.txt", "--tokenizer", "bytes", "--steps",
                                   "100000000", "--time-limit", "60", "--eval-every", "0",
                                   "--save-retry", "3600", "--out", "run"})};
    run.file_limit = 9000;
    pid_t child = run.start();
    auto await = [&](auto done) {
        for (int i = 0; i < 3000 && !done(); i++) usleep(10000);
        return done();
    };
    EXPECT_TRUE(await([&] { return read_if_there(path("run/log.jsonl")).size() > 200; }));
    kill(child, SIGINT);
    kill(child, SIGTERM);
    double asked_s = now_s();
    EXPECT_TRUE(await(
        [&] { return read_if_there(path("stderr")).find("in 3600 s") != std::string::npos; }));
    while (now_s() < asked_s + 1.1) usleep(10000);
    for (int signal : {SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU}) kill(child, signal);
    usleep(50000);
    siginfo_t ended = {};
    EXPECT_EQ(waitid(P_PID, id_t(child), &ended, WEXITED | WNOHANG | WNOWAIT), 0);
    EXPECT_EQ(ended.si_pid, 0) << "it waits";
    kill(child, SIGTERM);
    await([&] {
        waitid(P_PID, id_t(child), &ended, WEXITED | WNOHANG | WNOWAIT);
        return ended.si_pid == child;
    });
    kill(child, SIGKILL);
    Outcome outcome = run.finish(child);
    EXPECT_EQ(outcome.code, 128 + SIGTERM);
    EXPECT_NE(outcome.err.find("warning: a second signal ends the program: "), std::string::npos)
        << outcome.err;
}

// A folder that was removed, or moved, and in which another program trains by now.
TEST_F(Cli, ARunWhoseFolderAnotherHasTakenEnds) {
    make_folder(path("other"));
    RunLock theirs(path("other"));
    ASSERT_TRUE(theirs.taken());
    Call run{folder_, train_words({"--data", "text.txt", "--steps", "100000000", "--time-limit",
                                   "60", "--eval-every", "0", "--save-every", "20", "--save-retry",
                                   "0", "--out", "run"})};
    pid_t child = run.start();
    for (int i = 0; i < 3000 && !fs::exists(path("run/last")); i++) usleep(10000);
    ASSERT_TRUE(exchange_paths(path("run"), path("other")));
    Outcome outcome = run.finish(child);
    EXPECT_EQ(outcome.code, 1);
    EXPECT_NE(outcome.err.find("trains there now"), std::string::npos) << outcome.err;
    EXPECT_FALSE(fs::exists(path("run/last"))) << "nothing is put into their folder";
}

// The first step takes many times what others do, and says nothing of how long an evaluation takes.
// Twice what a run of one step takes, and two seconds more, are enough for others.
TEST_F(Cli, ATimeLimitIsNotGivenUpForTheFirstStep) {
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    write_shard(path("val.bin"), random_ids(30000, 257, 2));
    auto train = [&](const char* out, const char* goal, const std::string& value) {
        Outcome outcome = call(
            train_words({"--data", "a.bin", "--val", "val.bin", "--tokenizer", "bytes",
                         "--eval-every", "0", "--save-every", "0", "--out", out, goal, value}));
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        return losses_by_step(path(out)).size();
    };
    double begin_s = now_s();
    EXPECT_EQ(train("once", "--steps", "1"), 1u);
    double once_s = now_s() - begin_s;
    EXPECT_GT(train("run", "--time-limit", format("%.3f", 2 + 2 * once_s)), 3u);
}

// A kill leaves no time for anything: the run goes on from its last checkpoint and ends with the
// same bits and the same log as one that was left alone. The pipe holds few lines, so that the
// program waits for its reader and dies in the middle.
TEST_F(Cli, AKilledRunGoesOnAndEndsWithTheSameBits) {
    auto words = [](const std::string& out) {
        return train_words({"--data", "text.txt", "--steps", "80", "--save-every", "7",
                            "--eval-every", "5", "--eval-batches", "1", "--sample-every", "0",
                            "--out", out});
    };
    int ends[2];
    ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
    fcntl(ends[1], F_SETPIPE_SZ, 4096);
    Call killed{folder_, words("killed")};
    killed.out_fd = ends[1];
    pid_t child = killed.start();
    close(ends[1]);
    std::string seen;
    char part[256];
    while (seen.find("step 16/80") == std::string::npos) {
        ssize_t size = read(ends[0], part, sizeof part);
        ASSERT_GT(size, 0) << seen;
        seen.append(part, size_t(size));
    }
    kill(child, SIGKILL);
    EXPECT_EQ(killed.finish(child).code, 128 + SIGKILL);
    close(ends[0]);
    ASSERT_EQ(latest_checkpoint(path("killed")) == "", false);
    Outcome rest = call(words("killed"));
    EXPECT_EQ(rest.code, 0) << rest.err;
    EXPECT_NE(rest.out.find("going on with killed/step_"), std::string::npos) << rest.out;
    EXPECT_EQ(call(words("whole")).code, 0);
    for (const char* name : {"model.safetensors", "optimizer.safetensors"})
        EXPECT_TRUE(read_file(path(std::string("killed/last/") + name)) ==
                    read_file(path(std::string("whole/last/") + name)))
            << name;
    auto records = [&](const std::string& out) {
        std::vector<json> log;
        std::stringstream lines(read_file(path(out + "/log.jsonl")));
        for (std::string line; std::getline(lines, line);) {
            log.push_back(json::parse(line));
            if (log.back().contains("event")) log.pop_back();
            else
                for (const char* key : {"step_ms", "tokens_per_s", "elapsed_s"})
                    log.back().erase(key);
        }
        return log;
    };
    EXPECT_EQ(records("killed"), records("whole"));
    EXPECT_EQ(records("whole").size(), 80u);
}

TEST_F(Cli, ARunIsRepeatedFromItsLog) {
    ASSERT_EQ(call(train_words({"--data", "text.txt", "--tokenizer", "bytes", "--steps", "5",
                                "--eval-every", "2", "--dropout", "0.1", "--out", "run"}))
                  .code,
              0);
    Outcome again = call({"train", "--repeat", "run"});
    EXPECT_EQ(again.code, 0) << again.err;
    EXPECT_NE(again.out.find("repeated   all 5 steps have the same losses, to the last bit"),
              std::string::npos)
        << again.out;
    std::string hint = "try        " + shell_quoted(binary()) + " sample --model run.repeat ";
    EXPECT_NE(again.out.find(hint), std::string::npos) << again.out << "lacks " << hint;
    std::string log = read_file(path("run/log.jsonl"));
    size_t at = log.find("\"train_loss\":", log.find("\"step\":4")) + 13;
    log[at + 3] = log[at + 3] == '1' ? '2' : '1';
    write("run/log.jsonl", log);
    expect_error(call({"train", "--repeat", "run", "--out", "other"}), 1, "other: step 4: loss ");
    write("run/log.jsonl", "{}\n");
    expect_error(call({"train", "--repeat", "run"}), 2, "it cannot be repeated");
}

// In the precision that --dtype auto came to, whatever it comes to here.
TEST_F(Cli, ARunIsRepeatedInItsPrecision) {
    for (std::string dtype : {"fp32", "bf16"}) {
        std::vector<std::string> words = train_words(
            {"--data", "text.txt", "--tokenizer", "bytes", "--steps", "3", "--out", dtype});
        *(std::find(words.begin(), words.end(), "--dtype") + 1) = dtype;
        ASSERT_EQ(call(words).code, 0);
        std::string log = read_file(path(dtype + "/log.jsonl"));
        std::string said = "\"--dtype\",\"" + dtype + "\"";
        ASSERT_NE(log.find(said), std::string::npos) << log;
        write(dtype + "/log.jsonl",
              log.replace(log.find(said), said.size(), "\"--dtype\",\"auto\""));
        Outcome again = call({"train", "--repeat", dtype + "/"});
        EXPECT_EQ(again.code, 0) << again.err;
        EXPECT_TRUE(fs::exists(path(dtype + ".repeat/last"))) << "named by a folder with a slash";
        EXPECT_NE(again.out.find("computing  " + dtype), std::string::npos) << again.out;
    }
}

TEST_F(Cli, WhatCannotBeRepeatedIsRefused) {
    ASSERT_EQ(call(train_words({"--data", "text.txt", "--tokenizer", "bytes", "--steps", "2",
                                "--out", "run"}))
                  .code,
              0);
    expect_error(call({"train", "--repeat", "run", "--steps", "3"}), 2,
                 "--steps: a run is repeated with its own options");
    expect_error(call({"train", "--repeat", "run", "--resume", "run"}), 2, "--resume run");
    for (const char* out : {"run", "./run/", "other/../run"})
        expect_error(call({"train", "--repeat", "run", "--out", out}), 2, "holds the run that is");
    std::string log = read_file(path("run/log.jsonl"));
    auto changed = [&](const std::string& part, const std::string& other) {
        std::string text = log;
        write("run/log.jsonl", text.replace(text.find(part), part.size(), other));
        return call({"train", "--repeat", "run"});
    };
    expect_error(changed("\"steps\":2", "\"steps\":0"), 2, "run: a run by the clock");
    expect_error(changed("\"run\":{", "\"ranks\":[\"a\",\"b\"],\"run\":{"), 2, "a run of 2 ranks");
    expect_error(changed("\"computing\":\"", "\"computing\":\"fp8, "), 2, "a run in fp8");
    write("run/log.jsonl", log);
    ASSERT_EQ(call(train_words({"--data", "text.txt", "--tokenizer", "bytes", "--steps", "3",
                                "--out", "run"}))
                  .code,
              0);
    expect_error(
        call({"train", "--repeat", "run"}), 2,
        "run: went on otherwise than it began, and cannot be repeated: steps was 2 so far");
    EXPECT_FALSE(fs::exists(path("run.repeat"))) << "nothing was begun";
}

// The line that says how to go on is a command, and in the end all losses are compared.
TEST_F(Cli, ARepeatedRunThatWasStoppedGoesOn) {
    ASSERT_EQ(call(train_words({"--data", "text.txt", "--tokenizer", "bytes", "--steps", "3000",
                                "--out", "run"}))
                  .code,
              0);
    Call again{folder_, {"train", "--repeat", "run", "--out", "an other"}};
    pid_t child = again.start();
    std::error_code none_yet;
    for (int i = 0; i < 30000; i++) {  // until it trains
        usleep(1000);
        if (fs::file_size(path("an other/log.jsonl"), none_yet) > 200 && !none_yet) break;
    }
    kill(child, SIGTERM);
    Outcome stopped = again.finish(child);
    EXPECT_EQ(stopped.code, 143) << stopped.err;
    std::string begin = "go on with: ", line = stopped.out;
    ASSERT_NE(line.find(begin), std::string::npos) << stopped.out;
    line.erase(0, line.find(begin) + begin.size());
    EXPECT_EQ(
        system(("cd '" + folder_ + "' && " + line.substr(0, line.find('\n')) + " >said").c_str()),
        0)
        << line;
    std::string said = read_file(path("said"));
    EXPECT_NE(said.find("going on with an other/step_0000"), std::string::npos) << said;
    EXPECT_NE(said.find("repeated   all 3000 steps"), std::string::npos) << said;
}

TEST_F(Cli, WithoutOutEveryFinishedRunKeepsItsFolder) {
    std::vector<std::string> words =
        train_words({"--data", "text.txt", "--steps", "2", "--tokenizer", "bytes"});
    for (const char* out : {"runs/text", "runs/text-2"}) {
        EXPECT_EQ(call(words).code, 0);
        EXPECT_TRUE(fs::exists(path(std::string(out) + "/last/model.safetensors"))) << out;
    }
    {
        fs::create_directories(path("runs/text-3"));
        RunLock other(path("runs/text-3"));
        EXPECT_EQ(call(words).code, 0);
        EXPECT_FALSE(fs::exists(path("runs/text-3/log.jsonl"))) << "another program trains there";
        EXPECT_TRUE(fs::exists(path("runs/text-4/last/model.safetensors")));
    }
    expect_train_error(
        {"--data", "text.txt", "--steps", "2", "--tokenizer", "bytes", "--out", "runs/text"}, 2,
        "finished run");
}

TEST_F(Cli, EvaluateSaysTheSameAsTheEndOfTheRun) {
    write("val.txt", "The cat sat on mat 16.\nThe cat sat on mat 25.\n");
    ASSERT_EQ(call(train_words({"--data", "text.txt", "--val", "val.txt", "--tokenizer", "bytes",
                                "--steps", "3", "--out", "run"}))
                  .code,
              0);
    std::string log = read_file(path("run/log.jsonl"));
    log.pop_back();
    json last = json::parse(log.substr(log.rfind('\n') + 1));
    Outcome outcome = call({"evaluate", "--model", "run", "--data", "val.txt", "--json", "--dtype",
                            dtype_name(test_dtype())});
    double bound = 1e-6 + tolerance(0, 1);  // the batch is another
    ASSERT_EQ(outcome.code, 0) << outcome.err;
    json result = json::parse(outcome.out);
    EXPECT_NEAR(result.at("loss").get<double>(), last.at("val_loss").get<double>(), bound);
    EXPECT_NEAR(result.at("bits_per_byte").get<double>(),
                last.at("val_bits_per_byte").get<double>(), bound);
    EXPECT_EQ(result.at("tokens"), 45);
    EXPECT_EQ(call({"evaluate", "--model", "run", "--data", "val.txt"}).code, 0);
    std::string temporary = fs::temp_directory_path().string();
    setenv("TMPDIR", path("none").c_str(), 1);
    outcome = call({"evaluate", "--model", "run", "--data", "val.txt"});
    setenv("TMPDIR", temporary.c_str(), 1);
    expect_error(outcome, 1, "TMPDIR: No such file or directory; set it to a folder");
    write_shard(path("ids.bin"), {1, 2, 3});
    expect_error(call({"evaluate", "--model", "run", "--data", "ids.bin", "val.txt"}), 2,
                 "val.txt: text among token shards; give text or token shards, not both");
    expect_error(call({"evaluate", "--model", "run", "--data", "val.txt", "ids.bin"}), 2,
                 "ids.bin: a token shard among text; give text or token shards, not both");
}

TEST_F(Cli, ShardsMadeFromTextTrain) {
    std::vector<std::string> words = {"shard", "--data",  "text.txt", "--tokenizer",
                                      "bytes", "--out",   "shards",   "--shard-tokens",
                                      "500",   "--stats", "--clean"};
    Outcome made = call(words);
    ASSERT_EQ(made.code, 0) << made.err;
    EXPECT_NE(made.out.find("shards/val.bin: "), std::string::npos) << made.out;
    EXPECT_NE(made.out.find("documents  1, of "), std::string::npos) << made.out;
    size_t tokens = 0, files = 0;
    for (const auto& entry : fs::directory_iterator(path("shards"))) {
        if (entry.path().extension() != ".bin") continue;
        tokens += Shard(entry.path().string(), 257).size(), files++;
    }
    EXPECT_EQ(tokens, read_file(path("text.txt")).size());
    EXPECT_EQ(json::parse(read_file(path("shards/manifest.json"))).at("tokens"), tokens);
    EXPECT_NE(made.out.find(" holds nine in ten documents whole\n"), std::string::npos) << made.out;
    EXPECT_NE(call(words).out.find("it was ready already"), std::string::npos);
    write("long.txt", std::string(65536, 'a'));
    Outcome stats =
        call({"shard", "--data", "long.txt", "--tokenizer", "bytes", "--out", "long", "--stats"});
    EXPECT_NE(
        stats.out.find("65,536 holds nine in ten documents whole, or as much as is supported"),
        std::string::npos)
        << stats.out;
    words[8] = "501";
    expect_error(call(words), 2, "was begun with --shard-tokens 500, and this is 501");
    Outcome trained = call(train_words({"--data", "shards/train_*.bin", "--val", "shards/val.bin",
                                        "--tokenizer", "bytes", "--steps", "2", "--out", "run"}));
    EXPECT_EQ(trained.code, 0) << trained.err;
    trained = call(train_words({"--data", "shards", "--steps", "2", "--out", "parts"}));
    EXPECT_EQ(trained.code, 0) << trained.err;
    EXPECT_EQ(losses_by_step(path("run")), losses_by_step(path("parts")));
    Outcome part = call({"evaluate", "--model", "run", "--data", "shards"});
    EXPECT_EQ(part.out.substr(0, 30),
              call({"evaluate", "--model", "run", "--data", "shards/val.bin"}).out.substr(0, 30));
    call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "260", "--out", "tok"});
    expect_train_error({"--data", "shards", "--tokenizer", "tok"}, 2,
                       "made with another tokenizer, \"bytes\"");
    call({"shard", "--data", "text.txt", "--tokenizer", "tok", "--out", "other"});
    expect_train_error({"--data", "shards", "--val", "other/val.bin", "--steps", "1"}, 2,
                       "other/val.bin: made with another tokenizer, \"tok\"");
    expect_error(call({"evaluate", "--model", "run", "--data", "other"}), 2,
                 "other/val.bin: made with another tokenizer, \"tok\"");
    EXPECT_NE(call({"info", "shards/val.bin"}).out.find("token shard"), std::string::npos);
    expect_error(call({"shard", "--data", "text.txt", "--tokenizer", "chars", "--out", "x"}), 2,
                 "--tokenizer chars");
}

// A vocabulary of words, by name or from a file, cuts no word between training and validation.
TEST_F(Cli, WordsAreNotCutForValidation) {
    std::string text;
    for (int i = 0; i < 401; i++) text += "antidisestablishmentarianism, incomprehensibilities ";
    ASSERT_NE(text[validation_start(text) - 1], ' ') << "a word would be cut";
    write("words.txt", text);
    auto train = [&](const std::string& tokenizer, const std::string& out) {
        Outcome outcome = call(train_words(
            {"--data", "words.txt", "--tokenizer", tokenizer, "--steps", "1", "--out", out}));
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_NE(outcome.out.find("words, "), std::string::npos) << outcome.out;
        return read_config(path(out + "/last/config.json")).vocab_size;
    };
    EXPECT_EQ(train("words", "known"), 3);
    EXPECT_EQ(train("words:unk", "unknown"), 5);
    EXPECT_EQ(train("known/last", "again"), 3);
}

TEST_F(Cli, AWordThatTheVocabularyLacksIsNamedWithItsFile) {
    make_model("words");
    std::string lacks = "the vocabulary lacks the word \"zebra\"";
    write("a.txt", "The cat");
    write("b.txt", "sat on zebra");
    write("c.jsonl", "{\"text\": \"The cat\"}\n{\"text\": \"sat zebra\"}\n");
    write("d.jsonl",
          "{\"ctx\": \"The cat\", \"label\": 0, "
          "\"endings\": [\"sat\", \"on\", \"mat\", \"zebra\"]}\n");
    std::vector<std::string> evaluate = {"evaluate", "--model", "run", "--data"};
    auto on = [&](std::vector<std::string> words, const std::vector<std::string>& more) {
        words.insert(words.end(), more.begin(), more.end());
        return call(words);
    };
    expect_error(on(evaluate, {"b.txt"}), 2, "error: b.txt: byte 7: " + lacks);
    expect_error(on(evaluate, {"a.txt", "b.txt"}), 2, "error: b.txt: byte 7: " + lacks);
    expect_error(on(evaluate, {"a.txt", "c.jsonl"}), 2,
                 "error: c.jsonl: document 2: byte 4: " + lacks);
    expect_train_error({"--data", "text.txt", "--val", "b.txt", "--tokenizer", "run/last"}, 2,
                       "error: b.txt: byte 7: " + lacks);
    expect_error(call({"evaluate", "--model", "run", "--hellaswag", "d.jsonl"}), 2,
                 "error: d.jsonl: line 1: byte 1: " + lacks);
    expect_error(call({"sample", "--model", "run", "--prompt", "The zebra"}), 2,
                 "error: --prompt: byte 4: " + lacks);
    std::vector<std::string> encode = {"tokenizer", "encode", "--tokenizer", "run/last"};
    expect_error(on(encode, {"--in", "b.txt"}), 2, "error: b.txt: byte 7: " + lacks);
    expect_error(on(encode, {"--in", "a.txt", "b.txt"}), 2, "error: b.txt: byte 7: " + lacks);
    expect_error(call(encode, "zebra"), 2, "error: standard input: byte 0: " + lacks);
    std::vector<std::string> shard = {"shard", "--tokenizer", "run/last", "--out", "s", "--data"};
    expect_error(on(shard, {"b.txt"}), 2, "error: b.txt: byte 7: " + lacks);
    shard[4] = "t";
    expect_error(on(shard, {"c.jsonl"}), 2,
                 "error: c.jsonl: a document from line 1 on: byte 4: " + lacks);
}

// The step of the last record.
uint64_t newest_logged(const std::string& log) {
    uint64_t step = 0;
    std::stringstream lines(read_file(log));
    for (std::string line; std::getline(lines, line);)
        step = std::max(step, json::parse(line).value("step", uint64_t(0)));
    return step;
}

TEST_F(Cli, AShardThatChangesUnderARunEndsIt) {
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    auto run_until = [&](const char* out, auto change) {
        Call call{folder_,
                  train_words({"--data", "a.bin", "--tokenizer", "bytes", "--steps", "100000000",
                               "--time-limit", "60", "--eval-every", "0", "--out", out})};
        pid_t child = call.start();
        std::string log = path(std::string(out) + "/log.jsonl");
        auto logged = [&] { return fs::exists(log) && fs::file_size(log) > 3000; };
        for (int i = 0; i < 3000 && !logged(); i++)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        change();
        return call.finish(child);
    };
    expect_error(run_until("run1", [&] { fs::resize_file(path("a.bin"), 1100); }), 1,
                 "a.bin: had 11024 bytes and has 1100 since, while the program reads it");
    EXPECT_EQ(verify_checkpoint(path("run1/last"))["step"], newest_logged(path("run1/log.jsonl")));
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    expect_error(run_until("run2", [&] { fs::remove(path("a.bin")); }), 1,
                 "a.bin: was removed while the program reads it");
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    write_shard(path("val.bin"), random_ids(500, 257, 2));
    Call call{folder_, train_words({"--data", "a.bin", "--val", "val.bin", "--tokenizer", "bytes",
                                    "--steps", "100000000", "--eval-every", "50", "--time-limit",
                                    "60", "--out", "run3"})};
    pid_t child = call.start();
    for (int i = 0; i < 3000 && !fs::exists(path("run3/best")); i++)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    fs::resize_file(path("val.bin"), 1100);
    expect_error(call.finish(child), 1, "val.bin: had 2024 bytes and has 1100 since");
    json lost = verify_checkpoint(path("run3/last"));
    EXPECT_EQ(lost["step"], newest_logged(path("run3/log.jsonl")));
    EXPECT_EQ(lost["owed_evaluation"]["step"], lost["step"]);
    write_shard(path("val.bin"), random_ids(500, 257, 2));
    *std::find(call.words.begin(), call.words.end(), "100000000") =
        std::to_string(lost["step"].get<size_t>() + 1);
    EXPECT_EQ(call.run().code, 0);
    EXPECT_NE(
        read_file(path("run3/log.jsonl"))
            .find("{\"event\":\"evaluation\",\"step\":" + lost["step"].dump() + ",\"val_loss\":"),
        std::string::npos);
}

// Text goes through shards of the program's own, which it does not look at again; where one is cut
// all the same, the run ends with a checkpoint of its last step.
TEST_F(Cli, AFileThatIsCutUnderARunEndsItWithACheckpoint) {
    std::string text;
    for (int id : random_ids(60000, 26, 1)) text += char('a' + id);
    write_file_atomic(path("text.txt"), text);
    for (bool evaluates : {false, true}) {
        std::string out = evaluates ? "run_val" : "run_train";
        Call call{folder_, train_words({"--data", "text.txt", "--tokenizer", "bytes", "--steps",
                                        "100000000", "--time-limit", "60", "--save-every", "50",
                                        "--eval-every", evaluates ? "10" : "0", "--out", out})};
        pid_t child = call.start();
        for (int i = 0; i < 3000 && !fs::exists(path(out + "/last")); i++)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
        std::vector<fs::path> shards;
        for (const auto& entry : fs::directory_iterator(path("cache")))
            if (fs::is_regular_file(entry)) shards.push_back(entry.path());
        ASSERT_EQ(shards.size(), 2u);
        bool first = fs::file_size(shards[0]) < fs::file_size(shards[1]);
        fs::path cut = shards[first == evaluates ? 0 : 1];
        fs::resize_file(cut, 1024);
        expect_error(call.finish(child), 1, "was cut short while the program reads it");
        EXPECT_EQ(verify_checkpoint(path(out + "/last"))["step"],
                  newest_logged(path(out + "/log.jsonl")));
        fs::remove(cut);
    }
}

// The last evaluation may take long, and the steps before it are saved by then.
TEST_F(Cli, AKillInTheLastEvaluationLosesNoStep) {
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    write_shard(path("val.bin"), random_ids(1000000, 257, 2));
    Call call{folder_, train_words({"--data", "a.bin", "--val", "val.bin", "--tokenizer", "bytes",
                                    "--steps", "3", "--eval-every", "0", "--eval-batches", "1",
                                    "--save-every", "0", "--out", "run"})};
    pid_t child = call.start();
    for (int i = 0; i < 3000 && !fs::exists(path("run/last")); i++)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    kill(child, SIGKILL);
    EXPECT_EQ(call.finish(child).code, 128 + SIGKILL);
    json saved = verify_checkpoint(path("run/last"));
    EXPECT_EQ(saved["step"], 3);
    EXPECT_EQ(saved["finished"], false);
    write_shard(path("val.bin"), random_ids(500, 257, 2));  // the rest is not to take as long
    Outcome outcome = call.run();
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_EQ(verify_checkpoint(path("run/last"))["finished"], true);
    auto losses = losses_by_step(path("run"));
    ASSERT_EQ(losses.size(), 3u);
    EXPECT_TRUE(losses[3].first.is_number());
    EXPECT_TRUE(losses[3].second.is_number());
}

// The last evaluation is made up for by the same command, once its data is back.
TEST_F(Cli, ARunThatLostItsLastEvaluationGoesOnToIt) {
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    write_shard(path("val.bin"), random_ids(500, 257, 2));
    std::vector<std::string> words =
        train_words({"--data", "a.bin", "--val", "val.bin", "--tokenizer", "bytes", "--steps",
                     "400", "--eval-every", "0", "--out", "run"});
    Call call{folder_, words};
    pid_t child = call.start();
    for (int i = 0; i < 3000 && !fs::exists(path("run/log.jsonl")); i++)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    fs::rename(path("val.bin"), path("away.bin"));
    expect_error(call.finish(child), 1, "val.bin: was removed while the program reads it");
    EXPECT_EQ(verify_checkpoint(path("run/last"))["step"], 400);
    fs::rename(path("away.bin"), path("val.bin"));
    Call again{folder_, words};
    Outcome outcome = again.finish(again.start());
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_NE(outcome.out.find("validation "), std::string::npos) << outcome.out;
    EXPECT_EQ(verify_checkpoint(path("run/last"))["step"], 400);
    EXPECT_EQ(verify_checkpoint(path("run/last"))["finished"], true);
    json last;
    std::stringstream lines(read_file(path("run/log.jsonl")));
    for (std::string line; std::getline(lines, line);) last = json::parse(line);
    EXPECT_EQ(last["event"], "evaluation");
    EXPECT_TRUE(last["val_loss"].is_number()) << last;
}

TEST_F(Cli, OptionsThatTakeEachOtherAwayAreRefused) {
    expect_train_error({"--data", "text.txt", "--steps", "9", "--epochs", "1"}, 2,
                       "--steps and --epochs: give one of them");
    expect_error(call({"plan", "--steps", "9", "--epochs", "1"}), 2, "give one of them");
    std::vector<std::string> words = {"--data",       "text.txt", "--early-stop", "3",
                                      "--eval-every", "0",        "--steps",      "2"};
    expect_train_error(words, 2,
                       "--early-stop 3: counts evaluations on the way, and --eval-every 0 makes "
                       "none; give how many steps lie between them");
    EXPECT_FALSE(fs::exists(path("runs")));
    words = {"plan", "--early-stop", "3", "--eval-every", "0"};
    expect_error(call(words), 2, "--early-stop 3: counts evaluations");
}

TEST_F(Cli, AWarmUpThatDoesNotEndIsSaid) {
    auto said = [&](const char* warmup, const char* out) {
        Outcome made =
            call(train_words({"--data", "text.txt", "--tokenizer", "chars", "--steps", "2",
                              "--learning-rate", "0.01", "--warmup", warmup, "--out", out}));
        EXPECT_EQ(made.code, 0) << made.err;
        return made.out.find(
                   "note       the warm-up is longer than the run, which ends at a rate "
                   "of 0.005\n") != std::string::npos;
    };
    EXPECT_FALSE(said("2", "whole"));
    EXPECT_TRUE(said("4", "cut"));
}

TEST_F(Cli, OrdersOfDataAreChecked) {
    write_shard(path("a.bin"), random_ids(5000, 257, 1));
    auto error = [&](const std::vector<std::string>& more, const std::string& part) {
        std::vector<std::string> words = {"--data", "a.bin", "--steps", "1", "--out", "run"};
        words.insert(words.end(), more.begin(), more.end());
        expect_train_error(words, 2, part);
    };
    error({"--stride", "4"}, "--stride 4: is for --windows sliding");
    error({"--windows", "sliding", "--stride", "17"}, "--stride 17: more than the 16 tokens");
    error({"--windows", "sideways"}, "must be shuffled|sliding|random");
    error({"--separate-documents"}, "name the tokenizer of the shards with --tokenizer");
    EXPECT_EQ(call(train_words({"--data", "a.bin", "--tokenizer", "bytes", "--steps", "1", "--out",
                                "run", "--separate-documents", "--windows", "random"}))
                  .code,
              0);
}

TEST_F(Cli, HellaSwagIsScored) {
    make_model("bytes");
    std::string lines, line;
    for (int i = 0; i < 5; i++) {
        line = format(R"({"ctx": "The cat %d", "label": %d, "endings": [)", i, i % 4);
        lines += line + R"("sat", "on the mat", "was a very long cat indeed", "."]})" + "\n";
    }
    write("hs.jsonl", lines);
    std::vector<std::string> words = {"evaluate", "--model", "run", "--hellaswag", "hs.jsonl"};
    Outcome people = call(words);
    EXPECT_EQ(people.code, 0) << people.err;
    EXPECT_EQ(people.out.rfind("acc_norm 0.", 0), 0u) << people.out;
    EXPECT_NE(people.err.find("of 20 endings are longer than 16 tokens"), std::string::npos);
    words.insert(words.end(), {"--json", "--out", "out.jsonl", "--batch-size", "3"});
    json root = json::parse(call(words).out);
    EXPECT_EQ(root["examples"], 5);
    EXPECT_EQ(root["rows_cut"], 10);
    size_t correct = 0, correct_norm = 0, records = 0;
    std::stringstream out(read_file(path("out.jsonl")));
    for (std::string text; std::getline(out, text); records++) {
        json record = json::parse(text);
        EXPECT_EQ(record["example"], records);
        correct += record["prediction"] == record["label"];
        correct_norm += record["prediction_norm"] == record["label"];
    }
    EXPECT_EQ(records, 5u);
    EXPECT_EQ(root["correct"], correct);
    EXPECT_EQ(root["correct_norm"], correct_norm);
    // The same four words as llm.c's file: a start, 30 bytes, number 0, label 2, ...
    int32_t header[256] = {20240522, 1, 1, 30};
    const uint16_t example[] = {65535, 30, 0, 2, 4, 1, 84, 1, 104, 1, 101, 1, 32, 1, 99};
    write("hs.bin", std::string(reinterpret_cast<const char*>(header), sizeof header) +
                        std::string(reinterpret_cast<const char*>(example), sizeof example));
    EXPECT_EQ(call({"info", "hs.bin"}).out,
              "hs.bin: HellaSwag of llm.c; examples: 1, tokens of the longest row: 1\n");
    Outcome packed = call({"evaluate", "--model", "run", "--hellaswag", "hs.bin", "--json"});
    EXPECT_EQ(packed.err, "");
    EXPECT_EQ(json::parse(packed.out)["examples"], 1);
    words = {"evaluate", "--model", "run"};
    auto error = [&](const std::vector<std::string>& more, const std::string& part) {
        std::vector<std::string> all = words;
        all.insert(all.end(), more.begin(), more.end());
        expect_error(call(all), 2, part);
    };
    write("bad.jsonl", lines + "{}\n");
    error({"--hellaswag", "bad.jsonl"}, "bad.jsonl: line 6: has no string \"ctx_a\"");
    error({"--hellaswag", "hs.jsonl", "--data", "text.txt"}, "--data and --hellaswag");
    error({"--data", "text.txt", "--out", "x"}, "--out: is for --hellaswag");
    error({"--hellaswag", "none.jsonl"}, "none.jsonl: cannot open");
    error({"--hellaswag", "hs.jsonl", "--out", "./hs.jsonl"}, "is the file of --hellaswag");
    EXPECT_EQ(read_file(path("hs.jsonl")), lines);
    expect_error(call({"evaluate", "--model", "run", "--hellaswag", "bad.jsonl", "--out", "run"}),
                 1, "run: not a regular file");
}

TEST_F(Cli, LinesOfJsonAndRawTokensTrain) {
    std::string text = read_file(path("text.txt")), lines, ids;
    for (size_t begin = 0; begin < text.size(); begin += 100)
        lines += json{{"body", text.substr(begin, 100)}}.dump() + "\n";
    write("text.jsonl", lines);
    std::vector<std::string> more = {"--steps", "1", "--tokenizer", "bytes", "--out", "lines"};
    more.insert(more.end(), {"--data", "text.jsonl", "--jsonl-field", "body"});
    EXPECT_EQ(call(train_words(more)).code, 0);
    expect_train_error({"--data", "text.jsonl", "--steps", "1"}, 2, "line 1: no field \"text\"");
    std::vector<std::string> evaluate = {"evaluate", "--model", "lines", "--data", "text.jsonl"};
    expect_error(call(evaluate), 2, "--jsonl-field");
    evaluate.insert(evaluate.end(), {"--jsonl-field", "body"});
    EXPECT_EQ(call(evaluate).code, 0);
    std::vector<std::string> encode = {"tokenizer", "encode", "--tokenizer",
                                       "bytes",     "--in",   "text.jsonl"};
    expect_error(call(encode), 2, "--jsonl-field");
    encode.insert(encode.end(), {"--jsonl-field", "body"});
    std::string ids_of_text = call(encode).out;
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "bytes"}, ids_of_text).out.substr(0, 10),
              text.substr(0, 10));
    for (char c : text) ids += c, ids += '\0';
    write("raw.bin", ids);
    Outcome raw = call(train_words({"--data", "raw.bin", "--raw-tokens", "uint16", "--tokenizer",
                                    "bytes", "--steps", "1", "--out", "raw"}));
    EXPECT_EQ(raw.code, 0) << raw.err;
    expect_train_error({"--data", "raw.bin", "--steps", "1"}, 2, "use --raw-tokens");
    EXPECT_EQ(
        call({"evaluate", "--model", "raw", "--data", "raw.bin", "--raw-tokens", "uint16"}).code,
        0);
}

TEST_F(Cli, DumpRefusesIdsThatDoNotFit) {
    make_model("bytes");
    auto dump = [&](const std::vector<int>& ids, std::vector<size_t> shape) {
        write_npy(path("ids.npy"), ids, shape);
        return call({"dump", "--model", "run", "--tokens", "ids.npy", "--out", "d.safetensors"});
    };
    EXPECT_EQ(dump({1, 2, 3, 4, 5, -1}, {2, 3}).code, 0);
    EXPECT_TRUE(fs::exists(path("d.safetensors")));
    expect_error(dump({1, 2, 257}, {1, 3}), 2, "id 257 at (0, 2)");
    expect_error(dump({1, 2, -2}, {1, 3}), 2, "id -2");
    expect_error(dump({1, -1, -1}, {1, 3}), 2, "every target");
    expect_error(dump({1, 2, 3}, {3}), 2, "(B, T+1)");
    expect_error(dump(std::vector<int>(18, 1), {1, 18}), 2, "16 positions");
}

TEST_F(Cli, PlanTakesNoMemoryForTheModel) {
    Outcome plan = call({"plan", "--model", "gpt2-xl", "--batch-size", "64"});
    EXPECT_EQ(plan.code, 0) << plan.err;
    EXPECT_NE(plan.out.find("1,557,611,200"), std::string::npos) << plan.out;
    EXPECT_NE(plan.out.find("\nfits       "), std::string::npos) << plan.out;
    EXPECT_NE(plan.out.find("as asked: "), std::string::npos) << plan.out;
    plan = call({"plan", "--model", "tiny", "--recompute", "2", "--dtype", "fp32"});
    EXPECT_NE(plan.out.find("computing  fp32, recompute level 2"), std::string::npos) << plan.out;
}

TEST_F(Cli, TokenizersAreTrainedAndIdsChecked) {
    ASSERT_EQ(
        call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "280", "--out", "tok"})
            .code,
        0);
    Outcome ids = call({"tokenizer", "encode", "--tokenizer", "tok"}, "The cat");
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok"}, ids.out).out, "The cat");
    EXPECT_EQ(call({"tokenizer", "encode", "--tokenizer", "bytes"}, "").out, "\n");
    expect_error(call({"tokenizer", "decode", "--tokenizer", "tok"}, "1 2 x"), 2, "byte 4");
    expect_error(call({"tokenizer", "decode", "--tokenizer", "tok"}, "1 2 99999"), 2,
                 "standard input: number 3 is 99999, the vocabulary has ids 0 to 279; give the "
                 "--tokenizer");
    write_npy(path("other.npy"), {5, -1}, {2});
    expect_error(call({"tokenizer", "decode", "--tokenizer", "tok", "--in", "other.npy"}), 2,
                 "other.npy: number 2 is -1, the vocabulary");
    expect_error(call({"tokenizer", "encode", "--tokenizer", "chars"}, "x"), 2, "chars");
    expect_error(
        call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "256", "--out", "t"}), 2,
        "--vocab-size");
    expect_error(call({"tokenizer", "encode", "--tokenizer", "gpt2"}, "x"), 2, "vocab.bpe");
    expect_error(call({"tokenizer", "decode", "--tokenizer", "tok"}, "1 2 -3"), 2, "byte 4");
}

TEST_F(Cli, TokenizersAreConvertedAndReadAgain) {
    ASSERT_EQ(call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "300", "--pattern",
                    "o200k", "--min-frequency", "2", "--threads", "1", "--out", "tok"})
                  .code,
              0);
    std::string text = "The CAT's 12345\n\n  end";
    std::string ids = call({"tokenizer", "encode", "--tokenizer", "tok"}, text).out;
    const std::pair<const char*, const char*> formats[] = {{"json", "json"},
                                                           {"merges", "merges"},
                                                           {"openai", "openai"},
                                                           {"tiktoken", "t.tiktoken"},
                                                           {"llmc", "t.bin"}};
    for (auto [format, path] : formats) {
        Outcome made =
            call({"tokenizer", "convert", "--tokenizer", "tok", "--format", format, "--out", path});
        ASSERT_EQ(made.code, 0) << made.err;
        bool says = std::string(format) != "json";
        EXPECT_EQ(made.err.find("--pattern o200k") != std::string::npos, says) << made.err;
        Outcome again =
            call({"tokenizer", "encode", "--tokenizer", path, "--pattern", "o200k"}, text);
        EXPECT_EQ(again.out, ids) << format << again.err;
    }
    expect_error(call({"tokenizer", "encode", "--tokenizer", "t.bin"}, text), 2, "--pattern");
    expect_error(call({"tokenizer", "convert", "--tokenizer", "bytes", "--format", "llmc", "--out",
                       "x.bin"}),
                 2, "byte-level BPE");
}

TEST_F(Cli, EncodingGoesToArraysShardsAndNumbersAndBack) {
    ASSERT_EQ(
        call({"tokenizer", "train", "--data", "text.txt", "--vocab-size", "300", "--out", "tok"})
            .code,
        0);
    std::string text = "One caf\303\251 <|endoftext|> and \360\237\230\200\377 bytes";
    write("in.txt", text);
    for (const char* out : {"ids.npy", "ids.bin"}) {
        Outcome made =
            call({"tokenizer", "encode", "--tokenizer", "tok", "--in", "in.txt", "--out", out});
        ASSERT_EQ(made.code, 0) << made.err;
        EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok", "--in", out}).out, text);
        EXPECT_EQ(
            call({"tokenizer", "decode", "--tokenizer", "tok", "--in", out, "--out", "t"}).code, 0);
        EXPECT_EQ(read_file(path("t")), text);
    }
    std::string plain = call({"tokenizer", "encode", "--tokenizer", "tok"}, text).out;
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok"}, plain).out, text);
    std::string end = " " + std::to_string(Tokenizer::load(path("tok")).end_of_text()) + " ";
    EXPECT_EQ(plain.find(end), std::string::npos);
    for (const char* special : {"allow", "<|endoftext|>"}) {
        std::string ids =
            call({"tokenizer", "encode", "--tokenizer", "tok", "--special", special}, text).out;
        EXPECT_NE(ids.find(end), std::string::npos) << ids;
        EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok"}, ids).out, text);
    }
    expect_error(call({"tokenizer", "encode", "--tokenizer", "tok", "--out", "ids.txt"}, text), 2,
                 "--out ids.txt: must end in .npy or .bin");
    expect_error(
        call({"tokenizer", "encode", "--tokenizer", "tok", "--stats", "--out", "ids.npy"}, text), 2,
        "--stats");
    expect_error(call({"tokenizer", "encode", "--tokenizer", "tok", "--special", "forbid"}, text),
                 2, "standard input: byte 10: the text holds");
    expect_error(call({"tokenizer", "encode", "--tokenizer", "tok", "--special", "<|x|>"}, text), 2,
                 "this tokenizer has <|endoftext|>");
    write("more.txt", "more");
    std::vector<std::string> forbid = {"tokenizer", "encode", "--tokenizer", "tok",
                                       "--special", "forbid", "--in",        "in.txt"};
    expect_error(call(forbid), 2, "in.txt: byte 10: the text holds");
    forbid.insert(forbid.end() - 1, "more.txt");
    expect_error(call(forbid), 2, "in.txt: byte 10: the text holds");
    std::string two =
        call({"tokenizer", "encode", "--tokenizer", "tok", "--in", "in.txt", "more.txt"}).out;
    EXPECT_EQ(call({"tokenizer", "decode", "--tokenizer", "tok"}, two).out,
              text + "<|endoftext|>more");
    Outcome stats = call(
        {"tokenizer", "encode", "--tokenizer", "tok", "--in", "in.txt", "more.txt", "--stats"});
    EXPECT_EQ(stats.code, 0);
    for (const char* part :
         {"bytes        43\n", "bytes each", "never used", "context      64 ",
          "documents    2, of 4 to 38 tokens; half have at most 4, nine in ten 38, 99 in 100 "
          "38\n"})
        EXPECT_NE(stats.out.find(part), std::string::npos) << part << " in " << stats.out;
}

// Where one rank runs out of memory, rank 0 says so, and not that it ended without a word.
TEST_F(Cli, ARankWithoutMemoryIsAnErrorOfAll) {
    pid_t children[2];
    for (int rank : {0, 1}) {
        children[rank] = fork();
        if (children[rank] != 0) continue;
        Ranks ranks{rank, 2, rank, 2, "the test", "a job of the test"};
        std::string said = error_of([&] {
            RankLink link(ranks, choose_meeting(ranks, "file:" + path("meet")));
            int code = end_as_all(link, [](RankLink& own) {
                if (own.ranks().rank == 1) throw std::bad_alloc();
                own.barrier("what rank 1 does not come to", 20);
                return 0;
            });
            fail_machine("the exit code %d", code);
        });
        write_file_atomic(path(format("said%d", rank)), said);
        _exit(0);
    }
    for (pid_t child : children) {
        int status = -1;
        waitpid(child, &status, 0);
        EXPECT_EQ(status, 0);
    }
    std::string said = read_file(path("said0"));
    EXPECT_EQ(said.rfind("1 rank 1 ", 0), 0u) << said;
    EXPECT_NE(said.find(kOutOfMemory), std::string::npos) << said;
    EXPECT_EQ(read_file(path("said1")), "1 the exit code 1");
}

// ==== the CUDA program alone =====================================================================

// These run where the program is train_gpt2cu, on the emulator or on a card: what it says of
// machines that it cannot run on, of memory, and of its file of timed products. The emulator's card
// is described by the environment (dev/emu/README.md).
class Cuda : public Cli {
  protected:
    void SetUp() override {
        Cli::SetUp();
        if (!fs::exists(binary()) || !emulated()) GTEST_SKIP() << "the program has a real card";
    }
    static bool emulated() { return binary().find("_emu") != std::string::npos; }

    // A call with variables of the environment set for it alone.
    Outcome call_with(const std::vector<std::pair<const char*, std::string>>& variables,
                      const std::vector<std::string>& words) const {
        for (const auto& [name, value] : variables) setenv(name, value.c_str(), 1);
        Outcome outcome = call(words);
        for (const auto& variable : variables) unsetenv(variable.first);
        return outcome;
    }
    std::vector<std::string> short_run(const std::vector<std::string>& more = {}) const {
        std::vector<std::string> words = {"--data",  "text.txt", "--tokenizer", "bytes",
                                          "--steps", "2",        "--out",       "run"};
        words.insert(words.end(), more.begin(), more.end());
        return train_words(words);
    }
};

TEST_F(Cuda, MachinesThatCannotRunItAreToldWhy) {
    expect_error(call_with({{"EMU_DEVICES", "none"}}, short_run()), 1, "no NVIDIA driver");
    expect_error(call_with({{"EMU_DEVICES", "0"}}, short_run()), 1, "no GPU here");
    expect_error(call_with({{"EMU_DRIVER", "12000"}}, short_run()), 1,
                 "the driver supports CUDA 12.0, and this program needs ");
    expect_error(call_with({{"EMU_CAPABILITY", "7.5"}, {"EMU_NAME", "Tesla T4"}}, short_run()), 1,
                 "Tesla T4 has compute capability 7.5; this program needs 8.0");
    // What needs no card does without one.
    Outcome help = call_with({{"EMU_DEVICES", "none"}}, {"train", "--help"});
    EXPECT_EQ(help.code, 0) << help.err;
}

TEST_F(Cuda, TooLittleMemoryNamesTheGroupTheBytesAndWhatWouldFit) {
    std::vector<std::string> words = {"train", "--data",      "text.txt", "--tokenizer",
                                      "bytes", "--model",     "small",    "--batch-size",
                                      "64",    "--recompute", "0",        "--steps",
                                      "1",     "--out",       "run"};
    Outcome outcome = call_with({{"EMU_MEMORY", "400000000"}}, words);
    expect_error(outcome, 1, "out of memory: activations need ");
    EXPECT_NE(outcome.err.find("MiB more than the"), std::string::npos) << outcome.err;
    std::smatch fit;
    ASSERT_TRUE(std::regex_search(outcome.err, fit, std::regex("(--[a-z-]+) (\\d+) would fit")))
        << outcome.err;
    // The plan of what it names does fit.
    words[0] = "plan";
    words.resize(words.size() - 4);
    auto option = std::find(words.begin(), words.end(), fit[1].str());
    ASSERT_NE(option, words.end());
    *(option + 1) = fit[2].str();
    Outcome plan = call_with({{"EMU_MEMORY", "400000000"}}, words);
    EXPECT_EQ(plan.code, 0) << plan.err;
    EXPECT_EQ(plan.out.find("does not fit"), std::string::npos) << plan.out;
}

TEST_F(Cuda, EveryAllocationMayFail) {
    for (int n = 1;; n++) {
        ASSERT_LT(n, 100) << "no allocation fails any more, and the run does not end";
        fs::remove_all(path("run"));
        Outcome outcome = call_with({{"EMU_FAIL_MALLOC", std::to_string(n)}}, short_run());
        if (outcome.code == 0) break;
        expect_error(outcome, 1, "out of memory");
    }
}

TEST_F(Cuda, SizesThatTheKernelsDoNotTakeAreRefused) {
    expect_error(
        call({"train", "--data", "text.txt", "--tokenizer", "bytes", "--layers", "1", "--heads",
              "1", "--channels", "136", "--context", "16", "--steps", "1", "--out", "run"}),
        2, "heads of 136; on a GPU at most 128, as with --heads 2");
    expect_error(
        call({"train", "--data", "text.txt", "--tokenizer", "bytes", "--layers", "1", "--heads",
              "33", "--channels", "4224", "--context", "16", "--steps", "1", "--out", "run"}),
        2, "--channels 4224: on a GPU at most 4096");
}

// The losses of a run's log, by step.
std::vector<double> logged_losses(const std::string& log) {
    std::vector<double> losses;
    std::istringstream lines(read_file(log));
    for (std::string line; std::getline(lines, line);) {
        json record = json::parse(line);
        if (!record.contains("event")) losses.push_back(record.at("train_loss"));
    }
    return losses;
}

TEST_F(Cuda, ThePlanIsWhatIsTaken) {
    GPT2Config config;
    named_config("tiny", &config);
    config.vocab_size = 1031;
    for (int recompute = 0; recompute < 4; recompute++) {
        GPT2Shape shape = training_shape(4, 128);
        shape.recompute = recompute, shape.generate = 1;
        size_t before = gpt2_memory_free(), planned = total_bytes(gpt2_memory(config, shape));
        GPT2Ptr model(gpt2_create(config, shape));
        size_t taken = before - gpt2_memory_free();
        EXPECT_NEAR(double(taken), double(planned), 0.002 * double(planned)) << recompute;
    }
}

// TF32 keeps 10 bits of what it multiplies: other numbers, and not far ones.
TEST_F(Cuda, Tf32RoundsProductsAndNothingElse) {
    auto loss = [&](const std::string& out, const std::vector<std::string>& more) {
        std::vector<std::string> words = {
            "train", "--data",       "text.txt", "--tokenizer", "bytes", "--layers",
            "1",     "--heads",      "2",        "--channels",  "64",    "--context",
            "32",    "--batch-size", "4",        "--steps",     "3",     "--dtype",
            "fp32",  "--out",        out};
        words.insert(words.end(), more.begin(), more.end());
        Outcome outcome = call(words);
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        return logged_losses(path(out + "/log.jsonl")).back();
    };
    double exact = loss("exact", {}), rounded = loss("rounded", {"--tf32", "on"});
    EXPECT_NE(exact, rounded);
    EXPECT_NEAR(exact, rounded, 0x1p-10 * exact);
}

// Runs of a model whose products are large enough to be timed.
class CudaProducts : public Cuda {
  protected:
    // One step in a new folder.
    Outcome run(const std::vector<std::pair<const char*, std::string>>& more = {}) const {
        fs::remove_all(path("run"));
        std::vector<std::pair<const char*, std::string>> variables = {{"XDG_CACHE_HOME", cache()}};
        variables.insert(variables.end(), more.begin(), more.end());
        return call_with(variables, words_);
    }
    std::string cache() const { return path("products"); }
    // The file of winners; "" where there is none.
    std::string file() const {
        std::vector<std::string> files;
        for (const auto& entry : fs::recursive_directory_iterator(cache()))
            if (entry.is_regular_file()) files.push_back(entry.path().string());
        EXPECT_LE(files.size(), 1u);
        return files.empty() ? "" : files[0];
    }
    static size_t winners(const std::string& text) {
        return json::parse(text).at("winners").size();
    }

    const std::vector<std::string> words_ = {
        "train", "--data",       "text.txt", "--tokenizer",       "bytes", "--layers",
        "1",     "--heads",      "2",        "--channels",        "128",   "--context",
        "64",    "--batch-size", "8",        "--sequence-length", "64",    "--steps",
        "1",     "--out",        "run"};
};

TEST_F(CudaProducts, AreTimedOnceAndABrokenFileIsMadeAnew) {
    EXPECT_EQ(run().code, 0);
    std::string first = read_file(file());
    EXPECT_GT(winners(first), 5u);
    std::vector<double> losses = logged_losses(path("run/log.jsonl"));
    EXPECT_EQ(run().code, 0);
    EXPECT_EQ(read_file(file()), first) << "nothing is timed a second time";
    EXPECT_EQ(logged_losses(path("run/log.jsonl")), losses) << "the same winners, the same bits";

    std::string wrong_value = first;
    wrong_value.replace(wrong_value.find("\": \"") + 4, 4, "zzzz");
    for (const std::string& broken : {std::string("{"), std::string("[]"), first.substr(0, 40),
                                      std::string("{\"winners\": {\"a\": 1}}")}) {
        write_file_atomic(file(), broken);
        Outcome outcome = run();
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_NE(outcome.err.find("not a file of timed products; made anew"), std::string::npos)
            << broken;
        EXPECT_EQ(outcome.error_lines(), 1u) << outcome.err;
        EXPECT_EQ(winners(read_file(file())), winners(first));
    }
    write_file_atomic(file(), wrong_value);
    EXPECT_EQ(run().err, "") << "an algorithm that the library refuses is replaced";

    Outcome outcome = run({{"XDG_CACHE_HOME", "/dev/null"}});
    EXPECT_EQ(outcome.code, 0) << "no cache can be written: " << outcome.err;
}

// What another program has timed meanwhile stays in the file, and is not timed again.
TEST_F(CudaProducts, WaitForAnotherProgramThatTimesThem) {
    EXPECT_EQ(run().code, 0);
    std::string name = file(), first = read_file(name);
    fs::remove(name);
    int folder = open(fs::path(name).parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    ASSERT_EQ(flock(folder, LOCK_EX), 0);
    Outcome outcome;
    std::thread program([&] { outcome = run(); });
    // It has taken its folder, and comes to its products now.
    while (!fs::exists(path("run/lock"))) usleep(10000);
    usleep(100000);
    EXPECT_FALSE(fs::exists(name));
    ordered_json more = ordered_json::parse(first);
    more["winners"]["of another"] = "00";
    write_file_atomic(name, more.dump(1) + "\n");
    close(folder);
    program.join();
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_EQ(read_file(name), more.dump(1) + "\n");
}

// Without memory to time a product in, the next run has the same algorithms all the same.
TEST_F(CudaProducts, ThatCannotBeTimedAreKeptToo) {
    EXPECT_EQ(run().code, 0);
    size_t all = winners(read_file(file()));
    bool seen = false;
    for (int n = 1; !seen; n++) {
        ASSERT_LT(n, 100) << "no product lacks memory";
        fs::remove_all(cache());
        Outcome outcome = run({{"EMU_FAIL_MALLOC", std::to_string(n)}});
        seen = outcome.err.find("has no memory left to time products") != std::string::npos;
        if (!seen) continue;
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_EQ(outcome.error_lines(), 1u) << outcome.err;
        EXPECT_EQ(winners(read_file(file())), all);
    }
    std::string kept = read_file(file());
    Outcome again = run();
    EXPECT_EQ(again.err, "");
    EXPECT_EQ(read_file(file()), kept);
}

// A run that one program begins, the other goes on with and the first ends has the losses of the
// run that nothing interrupted: the checkpoints are the same files, and dropout drops the same in
// both, of every layer, forward and backward. Five digits: AdamW divides each gradient by its own
// size, and so makes a step of what is left of a gradient that should be 0.
TEST_F(Cuda, RunsGoFromOneProgramToTheOther) {
    const char* given = getenv("GPT2_OTHER_BINARY");
    if (given == nullptr) GTEST_SKIP() << "GPT2_OTHER_BINARY, the CPU program, is not set";
    std::string other = fs::absolute(given).string();
    auto train = [&](const std::string& program, const std::string& out, int from) {
        std::string command = "cd " + folder_ + " && " + program +
                              " train --layers 2 --heads 2 --channels 16 --context 16"
                              " --batch-size 2 --threads 1 --dtype fp32 --dropout 0.2"
                              " --data text.txt --tokenizer bytes --steps 6 --save-every 2"
                              " --keep 0 --out " +
                              out;
        if (from > 0) command += format(" --resume %s/step_%08d", out.c_str(), from);
        return system((command + " >" + out + ".out 2>&1").c_str());
    };
    ASSERT_EQ(train(binary(), "whole", 0), 0) << read_file(path("whole.out"));
    fs::copy(path("whole"), path("run"),
             fs::copy_options::recursive | fs::copy_options::copy_symlinks);
    ASSERT_EQ(train(other, "run", 2), 0) << read_file(path("run.out"));
    ASSERT_EQ(train(binary(), "run", 4), 0) << read_file(path("run.out"));
    std::vector<double> whole = logged_losses(path("whole/log.jsonl"));
    std::vector<double> run = logged_losses(path("run/log.jsonl"));
    ASSERT_EQ(whole.size(), 6u);
    ASSERT_EQ(run.size(), 6u);
    for (size_t i = 0; i < 6; i++)
        EXPECT_NEAR(run[i], whole[i], 1e-5 * whole[i]) << "step " << i + 1;
}

}  // namespace
