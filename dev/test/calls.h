// What tests of the command line use: calls of the program at $GPT2_BINARY (else the one of its
// name in this folder), what it says, and its exit code.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../gpt2.h"
#include "../../trainer.h"
#include "models.h"
#include "tools.h"

inline std::string binary() {
    const char* path = getenv("GPT2_BINARY");
    return fs::absolute(path != nullptr ? path : gpt2_program()).string();
}

struct Outcome {
    int code = -1;  // 128 + the signal when one ended it
    std::string out, err;

    size_t error_lines() const { return size_t(std::count(err.begin(), err.end(), '\n')); }
};

// One call of the program in a working folder of its own. `file_limit` is the most bytes that a
// file may have, which stands in for a full disk.
struct Call {
    std::string folder;
    std::vector<std::string> words;
    std::string input = {};
    rlim_t file_limit = RLIM_INFINITY;
    int out_fd = -1;  // in place of a file

    pid_t start() const {
        write_file_atomic(folder + "/stdin", input);
        std::vector<std::string> all = {binary()};
        all.insert(all.end(), words.begin(), words.end());
        std::vector<char*> argv;
        for (std::string& word : all) argv.push_back(word.data());
        argv.push_back(nullptr);
        pid_t child = fork();
        if (child != 0) return child;
        int in = open((folder + "/stdin").c_str(), O_RDONLY);
        int out = out_fd >= 0
                      ? out_fd
                      : open((folder + "/stdout").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
        int err = open((folder + "/stderr").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
        dup2(in, 0), dup2(out, 1), dup2(err, 2);
        struct rlimit limit = {file_limit, file_limit};
        setrlimit(RLIMIT_FSIZE, &limit);
        signal(SIGXFSZ, SIG_IGN);  // a write beyond the limit fails instead
        // Where the tests run in the background of a shell, it has left these ignored.
        for (int stops : {SIGINT, SIGHUP, SIGTERM}) signal(stops, SIG_DFL);
        if (chdir(folder.c_str()) != 0) _exit(126);
        execv(argv[0], argv.data());
        _exit(127);
    }
    Outcome finish(pid_t child) const {
        Outcome outcome;
        int status = 0;
        waitpid(child, &status, 0);
        outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (out_fd < 0) outcome.out = read_file(folder + "/stdout");
        outcome.err = read_file(folder + "/stderr");
        return outcome;
    }
    Outcome run() const { return finish(start()); }
};

class Cli : public testing::Test {
  protected:
    void SetUp() override {
        if (!fs::exists(binary())) GTEST_SKIP() << "there is no program at " << binary();
        folder_ = test_folder();
        std::string text;
        for (int i = 0; i < 60; i++) text += "The cat sat on mat " + std::to_string(i * i) + ".\n";
        write_file_atomic(folder_ + "/text.txt", text);
    }

    Outcome call(std::vector<std::string> words, const std::string& input = "") const {
        return Call{folder_, std::move(words), input}.run();
    }

    // `train` of a model that takes a moment; later words override nothing and must be new.
    static std::vector<std::string> train_words(const std::vector<std::string>& more) {
        std::vector<std::string> words = {
            "train",      "--layers",  "1",         "--heads", "1",
            "--channels", "8",         "--context", "16",      "--batch-size",
            "2",          "--threads", "1",         "--dtype", dtype_name(test_dtype())};
        words.insert(words.end(), more.begin(), more.end());
        return words;
    }

    // A trained model in folder_/run, with a character vocabulary.
    void make_model(const std::string& tokenizer = "chars") {
        Outcome made = call(train_words(
            {"--data", "text.txt", "--tokenizer", tokenizer, "--steps", "2", "--out", "run"}));
        ASSERT_EQ(made.code, 0) << made.err;
    }

    // The contract of every error: the code, one line, and in it what matters.
    static void expect_error(const Outcome& outcome, int code, const std::string& part) {
        EXPECT_EQ(outcome.code, code) << outcome.err;
        EXPECT_EQ(outcome.error_lines(), 1u) << outcome.err;
        std::string name = gpt2_program();
        EXPECT_EQ(outcome.err.rfind(name + ": error: ", 0), 0u) << outcome.err;
        EXPECT_NE(outcome.err.find(part), std::string::npos) << outcome.err << "lacks " << part;
    }
    void expect_train_error(const std::vector<std::string>& more, int code,
                            const std::string& part) const {
        expect_error(call(train_words(more)), code, part);
    }

    void write(const std::string& name, const std::string& content) const {
        fs::create_directories(fs::path(folder_ + "/" + name).parent_path());
        write_file_atomic(folder_ + "/" + name, content);
    }
    std::string path(const std::string& name) const { return folder_ + "/" + name; }

    std::string folder_;
};
