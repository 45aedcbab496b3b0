// The run: everything between the command line and the model.
//
// Options are defined once, in a table from which --help, the range checks and the suggestions for
// misspelt words follow. A command turns its options into data, a configuration and a model, and
// works on them through gpt2.h alone, so that the same file serves both twins. run() is the
// program: it parses, calls the command, and turns whatever goes wrong into one line and an exit
// code.
#pragma once

#include <omp.h>
#include <poll.h>
#include <sys/ioctl.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <chrono>
#include <climits>
#include <csignal>
#include <iostream>
#include <limits>
#include <optional>

#include "checkpoint.h"
#include "dataloader.h"
#include "gpt2.h"
#include "sampler.h"
#include "tokenizer.h"

// ==== numbers for people =========================================================================

// 1234567 -> 1,234,567
inline std::string with_commas(size_t value) {
    std::string text = std::to_string(value);
    for (size_t i = text.size(); i > 3; i -= 3) text.insert(i - 3, 1, ',');
    return text;
}

// 1300000 bytes -> 1.24 MiB
inline std::string readable_bytes(double bytes) {
    constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    size_t unit = 0;
    while (bytes >= 1024 && unit + 1 < std::size(kUnits)) bytes /= 1024, unit++;
    return format("%.4g %s", bytes, kUnits[unit]);
}

// 3723 s -> 1:02:03, 125 s -> 2:05
inline std::string readable_time(double seconds) {
    if (!(seconds < 1e9)) return "years";
    auto s = static_cast<long long>(std::max(0.0, seconds) + 0.5);
    if (s >= 48 * 3600) return format("%.1f days", double(s) / 86400);
    if (s >= 3600) return format("%lld:%02lld:%02lld", s / 3600, s / 60 % 60, s % 60);
    return format("%lld:%02lld", s / 60, s % 60);
}

// 23456.7 -> 23.5k
inline std::string readable_rate(double value) {
    constexpr const char* kUnits[] = {"", "k", "M", "G", "T", "P", "E"};
    size_t unit = 0;
    while (value >= 1000 && unit + 1 < std::size(kUnits)) value /= 1000, unit++;
    return format(value < 100 && unit > 0 ? "%.1f%s" : "%.0f%s", value, kUnits[unit]);
}

// Seconds of a clock that never goes back.
inline double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// ==== options ====================================================================================

// What decides how a model is computed; choose_shape() makes a shape of it.
struct ComputeOptions {
    std::string dtype = "auto", tf32 = "off", deterministic = "on";
    int threads = 0;  // 0: all cores
};

// What decides the model. 0 stands for "as --model says".
struct ModelOptions {
    std::string model;
    int layers = 0, heads = 0, channels = 0, context = 0;
    double dropout = 0;
};

// The model of `train` when --model is not given: what trained best on 1 MB of text in two minutes.
inline GPT2Config default_config() {
    GPT2Config config;
    config.layers = 2, config.heads = 4, config.channels = 256, config.context = 64;
    return config;
}

struct TrainOptions {
    std::vector<std::string> data, val;
    std::string tokenizer = "auto";
    ModelOptions model;

    int batch_size = 16;            // sequences a rank
    int sequence_length = 0;        // tokens; 0: the context
    size_t total_batch_tokens = 0;  // of a step, over micro-batches and ranks; 0: one micro-batch
    size_t steps = 0;               // 0: not limited by steps
    double epochs = 0;              // 0: not limited by epochs
    double time_limit_s = 0;        // 0: not limited by time

    double learning_rate = 2e-3;
    std::string schedule = "cosine";
    int64_t warmup = -1;  // steps; below 0: the first tenth of the run
    double final_lr_fraction = 0.1;
    double weight_decay = 0.1, beta1 = 0.9, beta2 = 0.99, epsilon = 1e-8, grad_clip = 1;
    uint64_t seed = 42;
    ComputeOptions compute;
    std::string recompute = "auto";

    size_t eval_every = 250;    // steps; 0: only at the end
    size_t eval_batches = 20;   // of an evaluation on the way; 0: all
    size_t sample_every = 500;  // steps; 0: never
    size_t save_every = 1000;   // steps; 0: only at the end and when the run is stopped
    int keep = 2;               // checkpoints, beside the best; 0: all
    size_t early_stop = 0;      // evaluations without gain; 0: never
    bool overfit_one_batch = false;
    std::string out, resume = "auto";
    FILE* screen = stdout;  // where progress is shown
    PeakRate peak;          // of this machine; 0: to be asked for
};

struct SampleOptions {
    std::string model, tokenizer, prompt = "\n", out;
    size_t max_new_tokens = 200, num_samples = 1;
    uint64_t seed = 42;
    SamplerOptions sampler;
    ComputeOptions compute;
};

struct EvaluateOptions {
    std::string model, tokenizer;
    std::vector<std::string> data;
    int sequence_length = 0, batch_size = 8;
    ComputeOptions compute;
    bool as_json = false;
};

struct TokenizerOptions {
    std::string tokenizer, in, out, pattern = "gpt2";
    std::vector<std::string> data;
    int vocab_size = 1024;
};

struct ShardOptions {
    std::vector<std::string> data;
    std::string tokenizer = "gpt2", out;
    size_t shard_tokens = 100000000;
    double val_fraction = 0.1;
};

struct DumpOptions {
    std::string model, tokens, out;
    size_t steps = 0;
    AdamW adamw;
    ComputeOptions compute;
};

struct PlanOptions {
    TrainOptions train;
    int vocab_size = 50257;
};

// Every command's options, and which command was called.
struct Options {
    TrainOptions train;
    SampleOptions sample;
    EvaluateOptions evaluate;
    TokenizerOptions tokenizer;
    ShardOptions shard;
    DumpOptions dump;
    PlanOptions plan;
    std::vector<std::string> info_paths;
};

// ==== the table of options =======================================================================

// Accepts numbers of [low, high] spelt in decimal; NaN and infinities are in no range.
template <typename T>
CLI::Validator in_range(double low, double high) {
    auto check = [low, high](std::string& word) {
        char* end = nullptr;
        double value = std::strtod(word.c_str(), &end);
        bool whole = word.find_first_not_of("0123456789+-") == std::string::npos;
        bool decimal = word.find_first_of("xXpP") == std::string::npos;
        bool number = !word.empty() && *end == '\0' && decimal && (whole || !std::is_integral_v<T>);
        if (number && value >= low && value <= high) return std::string();
        const char* kind = std::is_integral_v<T> ? "a whole number" : "a number";
        return format("%s: must be %s from %.10g to %.10g", word.c_str(), kind, low, high);
    };
    return CLI::Validator(check, "");
}

// One option with a number for its value: `unit` stands for the value in --help.
template <typename T>
CLI::Option* add_number(CLI::App* app, const std::string& name, T& value, double low, double high,
                        const std::string& unit, const std::string& help) {
    CLI::Option* option = app->add_option(name, value, help)->type_name(unit);
    return option->check(in_range<T>(low, high))->capture_default_str();
}

inline CLI::Option* add_text(CLI::App* app, const std::string& name, std::string& value,
                             const std::string& unit, const std::string& help) {
    return app->add_option(name, value, help)->type_name(unit)->capture_default_str();
}

inline CLI::Option* add_choice(CLI::App* app, const std::string& name, std::string& value,
                               const std::vector<std::string>& choices, const std::string& help) {
    std::string all;
    for (const std::string& choice : choices) all += (all.empty() ? "" : "|") + choice;
    auto check = [choices, all](std::string& word) {
        bool known = std::find(choices.begin(), choices.end(), word) != choices.end();
        return known ? std::string() : format("%s: must be %s", word.c_str(), all.c_str());
    };
    CLI::Option* option = app->add_option(name, value, help)->type_name(all);
    return option->check(CLI::Validator(check, ""))->capture_default_str();
}

inline CLI::Option* add_paths(CLI::App* app, const std::string& name,
                              std::vector<std::string>& paths, const std::string& help) {
    return app->add_option(name, paths, help)->type_name("PATH");
}

constexpr double kMaxSteps = 1e12, kMaxSeed = 9007199254740992;  // what a double counts exactly

inline void add_compute_options(CLI::App* app, ComputeOptions& o) {
    add_choice(app, "--dtype", o.dtype, {"auto", "fp32", "bf16"},
               "precision of products; auto: the fastest that this program has for the device");
    add_choice(app, "--tf32", o.tf32, {"on", "off"},
               "float32 products of numbers rounded to 10 bits, on the tensor cores of a card "
               "(CUDA only)");
    add_choice(app, "--deterministic", o.deterministic, {"on", "off"},
               "only algorithms that give the same bits every time; off allows faster ones "
               "(CUDA only)");
    add_number(app, "--threads", o.threads, 1, 4096, "N", "threads of the processor")
        ->default_str("all cores");
}

inline void add_model_options(CLI::App* app, ModelOptions& o) {
    app->option_defaults()->group("Model");
    const char* names =
        "tiny, small, medium, gpt2, gpt2-medium, gpt2-large, gpt2-xl, dN (a GPT-2 of N layers), "
        "a model FOLDER to go on from, or a config.json";
    add_text(app, "--model", o.model, "NAME|FOLDER", names)
        ->default_str("2 layers, 4 heads, 256 channels, context 64");
    add_number(app, "--layers", o.layers, 1, 1000, "N", "layers")->default_str("of --model");
    add_number(app, "--heads", o.heads, 1, 1000, "N", "attention heads; they divide the channels")
        ->default_str("of --model");
    add_number(app, "--channels", o.channels, 1, 1 << 16, "N", "width of the residual stream")
        ->default_str("of --model");
    add_number(app, "--context", o.context, 1, 1 << 20, "TOKENS", "positions of the model")
        ->default_str("of --model");
    add_number(app, "--dropout", o.dropout, 0, 0.99, "P", "probability of dropping a value");
}

inline void add_length_options(CLI::App* app, TrainOptions& o) {
    app->option_defaults()->group("Length");
    add_number(app, "--batch-size", o.batch_size, 1, 1 << 24, "N",
               "sequences in a batch, on each rank");
    add_number(app, "--sequence-length", o.sequence_length, 1, 1 << 20, "TOKENS",
               "tokens in a sequence")
        ->default_str("the context");
    add_number(app, "--total-batch-tokens", o.total_batch_tokens, 1, 1e12, "TOKENS",
               "tokens in a step; gradients accumulate over batches until it is full")
        ->default_str("one batch");
    add_number(app, "--steps", o.steps, 1, kMaxSteps, "N",
               "stop after N steps; such runs are repeatable bit by bit");
    add_number(app, "--epochs", o.epochs, 1e-9, 1e9, "X", "stop after X times the training data");
    add_number(app, "--time-limit", o.time_limit_s, 1, 1e9, "SECONDS",
               "stop by then, from start to the last save; without --steps or --epochs "
               "the schedule follows the clock, so that no two runs are alike bit by bit");
    for (const char* name : {"--steps", "--epochs"}) app->get_option(name)->default_str("");
    app->get_option("--time-limit")->default_str("120 for text under 10 MB, else one epoch");
}

inline void add_optimizer_options(CLI::App* app, TrainOptions& o) {
    app->option_defaults()->group("Optimizer");
    add_number(app, "--learning-rate", o.learning_rate, 0, 10, "X", "highest rate");
    add_choice(app, "--schedule", o.schedule, {"cosine", "linear", "constant", "wsd"},
               "how the rate falls after the warm-up; wsd: stays, falls in the last 20%");
    add_number(app, "--warmup", o.warmup, 0, kMaxSteps, "STEPS", "linear warm-up")
        ->default_str("the first tenth of the run");
    add_number(app, "--final-lr-fraction", o.final_lr_fraction, 0, 1, "X",
               "rate at the end and after it, as a part of the highest");
    add_number(app, "--weight-decay", o.weight_decay, 0, 100, "X",
               "decoupled, on matrices and embeddings");
    add_number(app, "--beta1", o.beta1, 0, 0.999999, "X", "of AdamW");
    add_number(app, "--beta2", o.beta2, 0, 0.999999, "X", "of AdamW");
    add_number(app, "--epsilon", o.epsilon, 1e-30, 1, "X", "of AdamW");
    add_number(app, "--grad-clip", o.grad_clip, 0, 1e9, "X",
               "largest norm of the gradient; 0: no limit");
    add_number(app, "--seed", o.seed, 0, kMaxSeed, "N", "of weights, order of data and dropout");
}

inline void add_watch_options(CLI::App* app, TrainOptions& o) {
    app->option_defaults()->group("On the way");
    add_number(app, "--eval-every", o.eval_every, 0, kMaxSteps, "STEPS",
               "evaluate on the validation data; 0: only at the end");
    add_number(app, "--eval-batches", o.eval_batches, 0, kMaxSteps, "N",
               "batches of an evaluation on the way; 0: all, as at the end");
    add_number(app, "--sample-every", o.sample_every, 0, kMaxSteps, "STEPS",
               "print a sample; 0: never");
    add_number(app, "--save-every", o.save_every, 0, kMaxSteps, "STEPS",
               "save a checkpoint; 0: only the best, at the end and when stopped");
    add_number(app, "--keep", o.keep, 0, 1000000, "N",
               "checkpoints to keep beside the best; 0: all");
    add_number(app, "--early-stop", o.early_stop, 0, kMaxSteps, "N",
               "stop after N evaluations without gain; 0: never");
    app->add_flag("--overfit-one-batch", o.overfit_one_batch,
                  "train on the first batch only, a check of the whole machinery");
    add_text(app, "--out", o.out, "FOLDER", "the run folder")
        ->default_str("runs/NAME, of the data's name");
    add_text(app, "--resume", o.resume, "auto|never|FOLDER",
             "auto goes on with the run in --out, never sets it aside, FOLDER goes on "
             "with the run there");
}

inline void add_train_options(CLI::App* app, TrainOptions& o) {
    app->option_defaults()->group("Data");
    add_paths(app, "--data", o.data, "text (files, folders) or token shards (.bin, .npy, a glob)");
    add_paths(app, "--val", o.val, "validation data; without it, the last tenth of --data");
    add_text(app, "--tokenizer", o.tokenizer, "gpt2|bytes|chars|bpe:SIZE|FILE",
             "for text; auto: that of a model FOLDER, else a bpe of a size that suits the text");
    add_model_options(app, o.model);
    add_length_options(app, o);
    add_optimizer_options(app, o);
    app->option_defaults()->group("Computing");
    add_compute_options(app, o.compute);
    add_choice(app, "--recompute", o.recompute, {"auto", "0", "1", "2", "3"},
               "what backward computes again to save memory: 0 nothing, 1 GELU, 2 also layer "
               "norms, 3 the whole block; auto: the least that makes the run fit");
    add_watch_options(app, o);
}

inline void add_sample_options(CLI::App* app, SampleOptions& o) {
    add_text(app, "--model", o.model, "FOLDER", "a run or a model folder");
    add_text(app, "--tokenizer", o.tokenizer, "gpt2|bytes|FILE", "in place of the folder's own");
    add_text(app, "--prompt", o.prompt, "TEXT",
             "what the text begins with; empty: the token <|endoftext|>")
        ->default_str("a new line");
    add_number(app, "--max-new-tokens", o.max_new_tokens, 1, 1e9, "N", "tokens to add");
    add_number(app, "--temperature", o.sampler.temperature, 0, 1000, "X",
               "divides the logits; 0: always the likeliest token");
    add_number(app, "--top-k", o.sampler.top_k, 0, 1 << 20, "N",
               "choose among the N likeliest; 0: all");
    add_number(app, "--top-p", o.sampler.top_p, 1e-9, 1, "P",
               "choose among the likeliest that together have probability P");
    add_number(app, "--seed", o.seed, 0, kMaxSeed, "N", "of the choice; sample i has seed + i");
    add_number(app, "--num-samples", o.num_samples, 1, 1e6, "N", "samples to make");
    add_text(app, "--out", o.out, "FILE", "write there")->default_str("standard output");
    add_compute_options(app, o.compute);
}

inline void add_evaluate_options(CLI::App* app, EvaluateOptions& o) {
    add_text(app, "--model", o.model, "FOLDER", "a run or a model folder");
    add_paths(app, "--data", o.data, "text or token shards; all of it is evaluated");
    add_text(app, "--tokenizer", o.tokenizer, "gpt2|bytes|FILE", "in place of the folder's own");
    add_number(app, "--sequence-length", o.sequence_length, 1, 1 << 20, "TOKENS",
               "tokens in a window")
        ->default_str("the context");
    add_number(app, "--batch-size", o.batch_size, 1, 1 << 24, "N", "windows at a time");
    app->add_flag("--json", o.as_json, "one JSON object in place of text");
    add_compute_options(app, o.compute);
}

inline void add_tokenizer_commands(CLI::App* app, TokenizerOptions& o) {
    CLI::App* train = app->add_subcommand("train", "trains a byte-level BPE");
    add_paths(train, "--data", o.data, "text to train on");
    add_number(train, "--vocab-size", o.vocab_size, 257, 65536, "N", "tokens of the vocabulary");
    add_choice(train, "--pattern", o.pattern, {"gpt2"}, "how text is split before it is merged");
    add_text(train, "--out", o.out, "FOLDER", "gets tokenizer.json and tokenizer_config.json");
    const char* names = "gpt2, bytes, tokenizer.json, a folder that holds one, or GPT-2 merges";
    CLI::App* encode = app->add_subcommand("encode", "text to token ids");
    add_text(encode, "--tokenizer", o.tokenizer, "T", names);
    add_text(encode, "--in", o.in, "FILE", "text")->default_str("standard input");
    add_text(encode, "--out", o.out, "FILE.npy", "int32 ids")
        ->default_str("standard output, ids with spaces between");
    CLI::App* decode = app->add_subcommand("decode", "token ids to text");
    add_text(decode, "--tokenizer", o.tokenizer, "T", names);
    add_text(decode, "--in", o.in, "FILE", "ids: .npy, or numbers with spaces between")
        ->default_str("standard input");
    add_text(decode, "--out", o.out, "FILE", "text")->default_str("standard output");
    CLI::App* convert = app->add_subcommand("convert", "any known form to tokenizer.json");
    add_text(convert, "--tokenizer", o.tokenizer, "T", names);
    add_text(convert, "--out", o.out, "FOLDER", "gets tokenizer.json and tokenizer_config.json");
}

inline void add_shard_options(CLI::App* app, ShardOptions& o) {
    add_paths(app, "--data", o.data, "text: files or folders");
    add_text(app, "--tokenizer", o.tokenizer, "gpt2|bytes|FILE", "made before");
    add_text(app, "--out", o.out, "FOLDER", "gets train_NNNNNN.bin and val.bin");
    add_number(app, "--shard-tokens", o.shard_tokens, 1, INT_MAX, "TOKENS", "tokens in a shard");
    add_number(app, "--val-fraction", o.val_fraction, 0, 0.999, "X",
               "part of the tokens, at the end, that goes to val.bin");
}

inline void add_dump_options(CLI::App* app, DumpOptions& o) {
    add_text(app, "--model", o.model, "FOLDER", "a run or a model folder");
    add_text(app, "--tokens", o.tokens, "IDS.npy", "int32 (B, T+1); a target of -1 is ignored");
    add_text(app, "--out", o.out, "FILE.safetensors", "gets loss, logits, grad.NAME, ...");
    add_number(app, "--steps", o.steps, 0, 1e6, "N", "steps of AdamW on the batch, dumped too");
    add_number(app, "--learning-rate", o.adamw.learning_rate, 0, 10, "X", "constant");
    add_number(app, "--weight-decay", o.adamw.weight_decay, 0, 100, "X", "on matrices");
    add_number(app, "--grad-clip", o.adamw.grad_clip, 0, 1e9, "X", "0: no limit");
    add_number(app, "--beta1", o.adamw.beta1, 0, 0.999999, "X", "of AdamW");
    add_number(app, "--beta2", o.adamw.beta2, 0, 0.999999, "X", "of AdamW");
    add_number(app, "--epsilon", o.adamw.epsilon, 1e-30, 1, "X", "of AdamW");
    add_compute_options(app, o.compute);
}

inline void add_commands(CLI::App* app, Options& o) {
    add_train_options(
        app->add_subcommand("train", "text or shards in, a model folder out; resumes by itself"),
        o.train);
    add_sample_options(app->add_subcommand("sample", "continues a prompt"), o.sample);
    add_evaluate_options(
        app->add_subcommand("evaluate", "loss, perplexity and bits per byte of a model on data"),
        o.evaluate);
    add_tokenizer_commands(
        app->add_subcommand("tokenizer", "trains, applies and converts tokenizers"), o.tokenizer);
    add_shard_options(app->add_subcommand("shard", "text files to token shards"), o.shard);
    add_dump_options(app->add_subcommand("dump",
                                         "one batch through a model: loss, logits, gradients, "
                                         "steps of the optimizer"),
                     o.dump);
    CLI::App* plan = app->add_subcommand("plan",
                                         "parameters, memory and time, before anything "
                                         "is allocated");
    add_train_options(plan, o.plan.train);
    add_number(plan, "--vocab-size", o.plan.vocab_size, 1, 1 << 20, "N", "tokens")->group("Model");
    CLI::App* info = app->add_subcommand("info",
                                         "what a file or folder is, and whether it is "
                                         "intact");
    info->add_option("PATH", o.info_paths, "files and folders")->type_name("");
}

// --help: an option and what stands for its value on the left; on the right, in lines that fit 100
// columns, what it does and its default in brackets.
class HelpFormatter : public CLI::Formatter {
  public:
    HelpFormatter() { column_width(kLeft); }
    std::string make_option_opts(const CLI::Option* option) const override {
        return option->get_items_expected_max() == 0 ? "" : " " + option->get_type_name();
    }
    std::string make_option_desc(const CLI::Option* option) const override {
        std::string text = option->get_description();
        if (!option->get_default_str().empty()) text += " [" + option->get_default_str() + "]";
        constexpr size_t kRight = 99 - kLeft;
        for (size_t begin = 0; text.size() - begin > kRight;) {
            size_t space = text.rfind(' ', begin + kRight);
            if (space == std::string::npos || space <= begin) break;
            text[space] = '\n';
            begin = space + 1;
        }
        return text;
    }

  private:
    static constexpr size_t kLeft = 34;
};

// Insertions, deletions, substitutions and swaps of neighbours that make one word the other
// [Damerau 1964].
inline size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
    for (size_t i = 0; i <= a.size(); i++) d[i][0] = i;
    for (size_t j = 0; j <= b.size(); j++) d[0][j] = j;
    for (size_t i = 1; i <= a.size(); i++) {
        for (size_t j = 1; j <= b.size(); j++) {
            d[i][j] = std::min(
                {d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
            bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if (swapped) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
        }
    }
    return d[a.size()][b.size()];
}

inline std::string nearest(const std::string& word, const std::vector<std::string>& known) {
    std::string best;
    size_t best_distance = SIZE_MAX;
    for (const std::string& candidate : known) {
        size_t distance = edit_distance(word.substr(0, 64), candidate);
        if (distance < best_distance) best_distance = distance, best = candidate;
    }
    return best;
}

[[noreturn]] inline void fail_unknown_option(const CLI::App* command, const std::string& name) {
    std::vector<std::string> known;
    for (const CLI::Option* option : command->get_options())
        if (!option->get_lnames().empty()) known.push_back("--" + option->get_lnames()[0]);
    fail_input("unknown option %s: did you mean %s?", name.c_str(), nearest(name, known).c_str());
}

[[noreturn]] inline void fail_unknown_command(const CLI::App* app, const std::string& word) {
    std::vector<std::string> known;
    for (const CLI::App* command : app->get_subcommands({})) known.push_back(command->get_name());
    if (word.empty()) {
        std::string all;
        for (const std::string& name : known) all += (all.empty() ? "" : ", ") + name;
        fail_input("no command: one of %s; --help says more", all.c_str());
    }
    fail_input("unknown command %s: did you mean %s?", word.c_str(), nearest(word, known).c_str());
}

// Finds the first word that is no command and no option of its command, before the parser sees it:
// fail_input with the nearest one.
inline void check_words(const CLI::App* app, const std::vector<std::string>& words) {
    const CLI::App* command = app;
    for (size_t i = 0; i < words.size(); i++) {
        const std::string& word = words[i];
        bool commands = !command->get_subcommands({}).empty();
        bool is_option = word.size() >= 2 && word[0] == '-' && (word[1] < '0' || word[1] > '9');
        if (!is_option) {
            if (!commands) continue;
            const CLI::App* next = nullptr;
            for (const CLI::App* sub : command->get_subcommands({}))
                if (sub->get_name() == word) next = sub;
            if (next == nullptr) fail_unknown_command(command, word);
            command = next;
            continue;
        }
        size_t equals = word.find('=');
        std::string name = word.substr(0, equals);
        if (name == "--help" || name == "-h") return;
        const CLI::Option* option = command->get_option_no_throw(name);
        if (option == nullptr) fail_unknown_option(command, name);
        if (option->get_items_expected_max() > 0 && equals == std::string::npos) i++;  // its value
    }
    if (!command->get_subcommands({}).empty()) fail_unknown_command(command, "");
}

// The value of an option that a command cannot do without.
inline void require(const char* option, bool given) {
    if (!given) fail_input("%s is missing; --help says what it takes", option);
}

// The part of a shape that says how to compute, as the options ask for it; fail_input where this
// program cannot.
inline GPT2Shape choose_shape(const ComputeOptions& o) {
    GPT2Shape shape;
    shape.dtype = gpt2_dtype(o.dtype);
    shape.tf32 = o.tf32 == "on";
    shape.deterministic = o.deterministic == "on";
    shape.threads = o.threads > 0 ? o.threads : omp_get_max_threads();
    return shape;
}

inline const char* dtype_name(Dtype dtype) { return dtype == Dtype::bf16 ? "bf16" : "fp32"; }

// ==== schedules ==================================================================================

// When a run ends. A limit of 0 is none; with steps the schedule follows them, otherwise the clock.
struct Goal {
    size_t steps = 0;
    double time_limit_s = 0;
};

// Part of the run that lies behind, 0 to 1, when `step` updates are done and `elapsed_s` of the
// limit are used, of which the last `reserve_s` are for the final evaluation and save.
inline double run_progress(const Goal& goal, size_t step, double elapsed_s, double reserve_s) {
    if (goal.steps > 0) return std::min(1.0, double(step) / double(goal.steps));
    double usable = goal.time_limit_s - reserve_s;
    return usable > elapsed_s ? std::max(0.0, elapsed_s / usable) : 1.0;
}

// The rate of the update that follows `step` updates. It rises linearly over the warm-up, then
// falls from the highest rate to final_lr_fraction of it with `progress`, where it is held:
//   cosine  fraction + (1 - fraction) (1 + cos(pi t)) / 2   [Loshchilov & Hutter 2016, 1608.03983]
//   linear  1 - (1 - fraction) t
//   wsd     1 until t = 0.8, then linear                    [Hu et al. 2024, arXiv:2404.06395]
// t counts from the end of the warm-up; where the clock is followed and the warm-up is given in
// steps, from the start.
inline double learning_rate(const TrainOptions& o, const Goal& goal, size_t step, double progress) {
    constexpr double kWarmupShare = 0.1;  // of the run, where no other warm-up was asked for
    bool by_clock = o.warmup < 0 && goal.steps == 0;
    double warmup =
        o.warmup >= 0 ? double(o.warmup) : std::floor(kWarmupShare * double(goal.steps));
    if (double(step) < warmup) return o.learning_rate * double(step + 1) / warmup;
    if (by_clock && progress < kWarmupShare)
        return o.learning_rate * std::max(progress, 1e-3) / kWarmupShare;
    double t = by_clock ? (progress - kWarmupShare) / (1 - kWarmupShare) : progress;
    if (double(goal.steps) > warmup) t = (double(step) - warmup) / (double(goal.steps) - warmup);
    t = std::clamp(t, 0.0, 1.0);
    constexpr double kStable = 0.8;  // of a wsd run is spent at the highest rate
    double share = 1;                // of the way from the final rate up to the highest
    if (o.schedule == "cosine") share = 0.5 * (1 + std::cos(M_PI * t));
    else if (o.schedule == "linear") share = 1 - t;
    else if (o.schedule == "wsd") share = std::min(1.0, (1 - t) / (1 - kStable));
    return o.learning_rate * (o.final_lr_fraction + (1 - o.final_lr_fraction) * share);
}

// ==== memory plan ================================================================================

constexpr int kRecomputeLevels = 4;

inline bool fits(const GPT2Config& config, const GPT2Shape& shape, size_t free) {
    return total_bytes(gpt2_memory(config, shape)) <= free;
}

// The largest micro-batch that fits into `free` bytes with all else as the shape says, found by
// doubling and bisection; 0 where a single sequence does not fit.
inline int largest_batch(const GPT2Config& config, GPT2Shape shape, size_t free) {
    int limit = INT_MAX / shape.T, fitting = 0, step = 1;
    auto grow = [&] {
        shape.B = fitting + step;
        if (step > limit - fitting || !fits(config, shape, free)) return false;
        fitting += step;
        return true;
    };
    while (grow()) step *= 2;
    while ((step /= 2) > 0) grow();
    return fitting;
}

// --recompute as a level. auto is the lowest that fits into `free` bytes: 0 where nobody knows how
// many there are, and 3, which gpt2_create will refuse, where none does.
inline int choose_recompute(const std::string& option, const GPT2Config& config, GPT2Shape shape,
                            size_t free) {
    if (option != "auto") return option[0] - '0';
    if (free == 0) return 0;
    for (shape.recompute = 0; shape.recompute + 1 < kRecomputeLevels; shape.recompute++)
        if (fits(config, shape, free)) break;
    return shape.recompute;
}

// What to change so that a model that does not fit into `free` bytes does, for an error message.
inline std::string what_would_fit(const GPT2Config& config, GPT2Shape shape, size_t free) {
    int levels = shape.training ? kRecomputeLevels : 1, level = shape.recompute;
    for (shape.recompute = level; shape.recompute < levels; shape.recompute++)
        if (fits(config, shape, free)) return format("--recompute %d would fit", shape.recompute);
    shape.recompute = level;
    int batch = largest_batch(config, shape, free);
    if (batch > 0) return format("--batch-size %d would fit", batch);
    shape.recompute = levels - 1;
    batch = largest_batch(config, shape, free);
    if (batch > 0) return format("--batch-size %d --recompute %d would fit", batch, levels - 1);
    shape.B = shape.T = 1;
    bool shorter = fits(config, shape, free);
    return shorter ? "a smaller --sequence-length would fit" : "a smaller --model would fit";
}

// For `plan`: the largest batch and the lowest level for it, what the levels above allow, and what
// the shape itself takes.
inline std::vector<std::string> fit_report(const GPT2Config& config, GPT2Shape shape, size_t free) {
    size_t needed = total_bytes(gpt2_memory(config, shape));
    std::string asked = "as asked: " + readable_bytes(double(needed));
    if (free > 0) asked += " of " + readable_bytes(double(free));
    asked += format(" (--recompute %d)", shape.recompute);
    if (free == 0) return {"fits       unknown: nothing says how much memory is free; " + asked};
    if (needed > free) asked += ", too much";
    std::string most, above;
    for (shape.recompute = 0; shape.recompute < kRecomputeLevels; shape.recompute++) {
        int batch = largest_batch(config, shape, free);
        if (batch == 0) continue;
        if (most.empty())
            most = format("--batch-size %d --recompute %d at most; ", batch, shape.recompute);
        else if (above.empty())
            above = format("--batch-size %d with --recompute %d", batch, shape.recompute);
        else above += format(", %d with %d", batch, shape.recompute);
    }
    std::vector<std::string> lines = {"fits       " + (most.empty() ? "no batch; " : most) + asked};
    if (!above.empty()) lines.push_back("           " + above);
    return lines;
}

// Two tables side by side, a line each: parameters by tensor, memory by group.
inline std::vector<std::string> size_report(const GPT2Config& config, const GPT2Shape& shape) {
    std::vector<std::string> left, right, lines;
    for (const ParameterRow& row : parameter_table(config)) {
        if (!row.present) continue;
        std::string size = row.cols > 0 ? format("%zu x %zu", row.file_rows, row.cols)
                                        : format("%zu", row.file_rows);
        if (row.count > 1) size = format("%zu x ", row.count) + size;
        left.push_back(format("  %-9s%18s%14s", row.name, size.c_str(),
                              with_commas(row.file_size() * row.count).c_str()));
    }
    left.push_back(
        format("  %-9s%18s%14s", "total", "", with_commas(count_parameters(config)).c_str()));
    std::vector<MemoryRow> rows = gpt2_memory(config, shape);
    rows.push_back({"total", total_bytes(rows)});
    for (const MemoryRow& row : rows)
        right.push_back(
            format("%-18s%11s", row.group.c_str(), readable_bytes(double(row.bytes)).c_str()));
    lines.push_back(format("  %-41s    %s", "parameters", "memory"));
    for (size_t i = 0; i < std::max(left.size(), right.size()); i++) {
        std::string line = format("%-43s", i < left.size() ? left[i].c_str() : "");
        if (i < right.size()) line += "    " + right[i];
        lines.push_back(line.substr(0, line.find_last_not_of(' ') + 1));
    }
    return lines;
}

// ==== model options to a configuration ===========================================================

// A model on disk, or the start of one: the configuration, and the folder that holds its weights.
struct ModelChoice {
    GPT2Config config;
    std::string folder;        // "" where weights are drawn anew
    bool fixed_vocab = false;  // the configuration came from a file, with its vocabulary
};

inline void override_size(const char* option, int given, int* size, const std::string& folder) {
    if (given == 0 || given == *size) return;
    if (!folder.empty())
        fail_input("%s %d: the model in %s has %d; leave the option out", option, given,
                   folder.c_str(), *size);
    *size = given;
}

// --model and what overrides it. A folder's weights fix its sizes: fail_input where they differ.
inline ModelChoice choose_model(const ModelOptions& o) {
    ModelChoice choice{default_config(), "", false};
    std::error_code ignored;
    if (fs::is_directory(o.model, ignored)) {
        choice.folder = resolve_model_folder(o.model);
        choice.config = read_model_config(choice.folder);
        choice.fixed_vocab = true;
    } else if (o.model.ends_with(".json")) {
        choice.config = read_config(o.model);
        choice.fixed_vocab = true;
    } else if (!o.model.empty() && !named_config(o.model, &choice.config)) {
        fail_input(
            "--model %s: no such folder, and none of tiny, small, medium, gpt2, gpt2-medium, "
            "gpt2-large, gpt2-xl, dN, or a config.json",
            o.model.c_str());
    }
    override_size("--layers", o.layers, &choice.config.layers, choice.folder);
    override_size("--heads", o.heads, &choice.config.heads, choice.folder);
    override_size("--channels", o.channels, &choice.config.channels, choice.folder);
    override_size("--context", o.context, &choice.config.context, choice.folder);
    choice.config.dropout = o.dropout;
    validate(choice.config);
    return choice;
}

// --sequence-length within the context; 0 stands for the context.
inline int choose_sequence_length(int given, const GPT2Config& config) {
    if (given > config.context)
        fail_input("--sequence-length %d: the model has %d positions; give at most %d", given,
                   config.context, config.context);
    return given > 0 ? given : config.context;
}

// Micro-batches in a step of total_batch_tokens; fail_input names the nearest that would fit.
inline int accumulation(const TrainOptions& o, int T, int world) {
    size_t batch = size_t(o.batch_size) * size_t(T) * size_t(world);
    if (batch > size_t(INT_MAX))
        fail_input("--batch-size %d with sequences of %d tokens is %zu tokens; at most %d fit",
                   o.batch_size, T, batch, INT_MAX);
    if (o.total_batch_tokens == 0) return 1;
    size_t below = o.total_batch_tokens / batch;
    if (o.total_batch_tokens % batch == 0 && below <= 1000000) return int(below);
    std::string fits = std::to_string((below + 1) * batch);
    if (below > 0) fits = std::to_string(below * batch) + " or " + fits;
    fail_input("--total-batch-tokens %zu: not a multiple of %d sequences of %d tokens; %s would be",
               o.total_batch_tokens, o.batch_size, T, fits.c_str());
}

// ==== data =======================================================================================

// Where files of text are read, the sizes of what was made of them; where shards are, no more than
// the shards.
struct TrainingData {
    std::optional<Tokenizer> tokenizer;
    std::vector<Shard> train, val;
    std::vector<int> token_bytes;  // bytes of text by token id; empty when it is not known
    size_t train_bytes = 0, val_bytes = 0;
    std::string description;
};

// A vocabulary that suits so much text: a larger one makes fewer tokens, but rarer ones.
inline int default_vocab_size(size_t bytes) {
    constexpr std::pair<size_t, int> kSizes[] = {
        {5000, 300}, {100000, 512}, {4000000, 1024}, {20000000, 2048}, {100000000, 4096}};
    for (auto [limit, size] : kSizes)
        if (bytes < limit) return size;
    return 8192;
}

// GPT-2's own vocabulary, which this program does not contain: from the places where it is put.
inline Tokenizer load_gpt2_tokenizer() {
    for (const char* folder : {"gpt2", "dev/data/gpt2"}) {
        for (const char* name : {"tokenizer.json", "vocab.bpe", "merges.txt"}) {
            fs::path path = fs::path(folder) / name;
            std::error_code ignored;
            if (fs::exists(path, ignored)) return Tokenizer::load(path.string());
        }
    }
    fail_input(
        "--tokenizer gpt2: put GPT-2's vocab.bpe or tokenizer.json into the folder gpt2/ or "
        "dev/data/gpt2/, or give its path");
}

// A tokenizer that needs no text to be made.
inline Tokenizer load_tokenizer(const std::string& name) {
    std::error_code ignored;
    if (name == "gpt2" && !fs::is_directory(name, ignored)) return load_gpt2_tokenizer();
    if (name == "gpt2") return load_gpt2_tokenizer();
    if (name == "bytes") return Tokenizer::bytes();
    if (name == "chars" || name == "auto" || name.starts_with("bpe:"))
        fail_input("--tokenizer %s: is made from training text; give gpt2, bytes or a file here",
                   name.c_str());
    return Tokenizer::load(name);
}

// Trains a BPE on text, or takes the one of the same text and size that CACHE_FOLDER keeps. One
// there that is damaged is made anew.
inline Tokenizer train_bpe_cached(std::string_view text, int vocab_size,
                                  const std::string& cache_folder) {
    std::string hash = hash_text(hash_bytes(text.data(), text.size()));
    fs::path folder = fs::path(cache_folder) / format("bpe-%d-%s", vocab_size, hash.c_str());
    std::error_code ignored;
    if (fs::exists(folder / "tokenizer.json", ignored)) {
        try {
            return Tokenizer::load(folder.string());
        } catch (const Error&) { fs::remove_all(folder, ignored); }
    }
    Tokenizer tokenizer = Tokenizer::train_bpe(text, vocab_size);
    make_folder(folder.string());
    tokenizer.save(folder.string());
    return tokenizer;
}

// The tokenizer that --tokenizer names, learned from the training text where it is learned.
inline Tokenizer make_tokenizer(const std::string& name, std::string_view text,
                                const std::string& cache_folder) {
    if (name == "chars") return Tokenizer::chars(text);
    if (name == "auto")
        return train_bpe_cached(text, default_vocab_size(text.size()), cache_folder);
    if (!name.starts_with("bpe:")) return load_tokenizer(name);
    std::string digits = name.substr(4);
    bool number = !digits.empty() && digits.size() < 7 &&
                  digits.find_first_not_of("0123456789") == std::string::npos;
    int size = number ? std::stoi(digits) : 0;
    if (size < 257 || size > 65536)
        fail_input("--tokenizer %s: the size must be a whole number from 257 to 65536",
                   name.c_str());
    return train_bpe_cached(text, size, cache_folder);
}

inline bool holds_tokenizer(const std::string& folder) {
    std::error_code ignored;
    return !folder.empty() && fs::exists(fs::path(folder) / "tokenizer.json", ignored);
}

// The tokens of text [begin, end): from the cache or put there. Says what a character vocabulary
// dropped.
inline Shard text_shard(const TextCorpus& corpus, size_t begin, size_t end,
                        const Tokenizer& tokenizer, const std::string& cache_folder) {
    TokenizedText made = tokenize_cached(corpus, begin, end, tokenizer, cache_folder);
    if (made.bytes < end - begin)
        fprintf(stderr, "note: %s bytes are characters that the vocabulary lacks; dropped\n",
                with_commas(end - begin - made.bytes).c_str());
    return Shard(made.path, tokenizer.vocab_size());
}

// Text: the tokenizer is learned from the training part alone.
inline TrainingData read_text_data(const TrainOptions& o, const ModelChoice& model,
                                   const std::string& cache_folder) {
    TextCorpus corpus = read_text(o.data);
    size_t size = corpus.text.size(), begin = o.val.empty() ? validation_start(corpus.text) : size;
    if (begin == 0)
        fail_input("%s: %zu bytes are too few to train on; give more text", o.data[0].c_str(),
                   size);
    TrainingData data;
    std::string_view text = std::string_view(corpus.text).substr(0, begin);
    if (o.tokenizer == "auto" && holds_tokenizer(model.folder))
        data.tokenizer = Tokenizer::load(model.folder);
    else data.tokenizer = make_tokenizer(o.tokenizer, text, cache_folder);
    data.token_bytes = bytes_per_token(*data.tokenizer);
    data.train.push_back(text_shard(corpus, 0, begin, *data.tokenizer, cache_folder));
    data.train_bytes = begin;
    if (o.val.empty()) {
        data.val_bytes = size - begin;
        if (data.val_bytes > 0)
            data.val.push_back(text_shard(corpus, begin, size, *data.tokenizer, cache_folder));
        return data;
    }
    TextCorpus val = read_text(o.val);
    data.val_bytes = val.text.size();
    data.val.push_back(text_shard(val, 0, val.text.size(), *data.tokenizer, cache_folder));
    return data;
}

// Shards: where no validation data is given, the last tenth of all their tokens, in their order.
inline TrainingData read_shard_data(const TrainOptions& o, const ModelChoice& model,
                                    const std::vector<std::string>& paths) {
    TrainingData data;
    if (o.tokenizer != "auto") data.tokenizer = load_tokenizer(o.tokenizer);
    else if (holds_tokenizer(model.folder)) data.tokenizer = Tokenizer::load(model.folder);
    if (data.tokenizer) data.token_bytes = bytes_per_token(*data.tokenizer);
    int vocab_size = model.config.vocab_size;
    if (!model.fixed_vocab && data.tokenizer) vocab_size = data.tokenizer->vocab_size();
    for (const std::string& path : paths) data.train.emplace_back(path, vocab_size);
    for (const std::string& path : o.val.empty() ? o.val : expand_paths(o.val)) {
        if (!is_shard(path))
            fail_input("%s: text among token shards; give shards for --val too", path.c_str());
        data.val.emplace_back(path, vocab_size);
    }
    if (!o.val.empty()) return data;
    size_t tokens = 0;
    for (const Shard& shard : data.train) tokens += shard.size();
    size_t val_tokens = tokens - (tokens / 10 * 9 + tokens % 10 * 9 / 10);
    while (val_tokens > 0 && data.train.back().size() <= val_tokens) {
        val_tokens -= data.train.back().size();
        data.val.insert(data.val.begin(), std::move(data.train.back()));
        data.train.pop_back();
    }
    if (val_tokens > 0) {
        Shard& last = data.train.back();
        size_t size = last.size();
        data.val.insert(data.val.begin(), last.slice(size - val_tokens, size));
        last = last.slice(0, size - val_tokens);
    }
    return data;
}

inline size_t count_tokens(const std::vector<Shard>& shards) {
    size_t tokens = 0;
    for (const Shard& shard : shards) tokens += shard.size();
    return tokens;
}

inline std::string describe_tokenizer(const std::optional<Tokenizer>& tokenizer) {
    if (!tokenizer) return "no tokenizer: no text, no bits per byte";
    constexpr const char* kNames[] = {"BPE", "bytes", "characters"};
    return format("%s, %s tokens", kNames[size_t(tokenizer->kind())],
                  with_commas(size_t(tokenizer->vocab_size())).c_str());
}

// --data and --val, whatever they are, as shards; fail_input says what is wrong with them.
inline TrainingData read_data(const TrainOptions& o, const ModelChoice& model,
                              const std::string& cache_folder) {
    std::vector<std::string> paths = expand_paths(o.data);
    bool shards = !paths.empty() && is_shard(paths[0]);
    for (const std::string& path : paths)
        if (is_shard(path) != shards)
            fail_input("%s: %s; give text or token shards, not both", path.c_str(),
                       shards ? "text among token shards" : "a token shard among text");
    TrainingData data =
        shards ? read_shard_data(o, model, paths) : read_text_data(o, model, cache_folder);
    if (data.val.size() == 1 && data.val[0].size() < 2) data.val.clear();  // nothing to predict
    std::string train = with_commas(count_tokens(data.train)), val = "no";
    if (!data.val.empty()) val = with_commas(count_tokens(data.val));
    data.description = train + " training and " + val + " validation tokens";
    if (data.train_bytes > 0) {
        double bytes_per_token = double(data.train_bytes) / double(count_tokens(data.train));
        data.description = format("%s bytes, %s, %.2f bytes a token",
                                  with_commas(data.train_bytes + data.val_bytes).c_str(),
                                  data.description.c_str(), bytes_per_token);
    }
    return data;
}

// The vocabulary follows the data, unless the model came with one.
inline void choose_vocabulary(const TrainingData& data, ModelChoice* model) {
    if (!data.tokenizer) return;
    int tokens = data.tokenizer->vocab_size();
    if (model->fixed_vocab && tokens > model->config.vocab_size)
        fail_input("--tokenizer: %d tokens, the model has a vocabulary of %d; give its own", tokens,
                   model->config.vocab_size);
    if (!model->fixed_vocab) model->config.vocab_size = tokens;
}

// A window that is longer than the text is refused here, where the user's name for it is known.
inline void check_length(const TrainOptions& o, const TrainingData& data, int T) {
    size_t longest = 0;
    for (const Shard& shard : data.train) longest = std::max(longest, shard.size());
    if (longest > size_t(T)) return;
    std::string remedy = "give more";
    if (longest > 1) remedy += format(", or --sequence-length %zu", longest - 1);
    fail_input("%s: %zu training tokens are fewer than a window of %d and its target; %s",
               o.data[0].c_str(), longest, T, remedy.c_str());
}

// ==== evaluation =================================================================================

struct Evaluation {
    double loss = 0;           // nats a token
    double bits_per_byte = 0;  // NaN where the bytes behind the tokens are not known
    size_t tokens = 0, windows = 0;
    double seconds = 0;

    double perplexity() const { return std::exp(loss); }
};

// The mean loss over `max_windows` windows spread over the shards, or over all of them (0), in
// batches of B sequences of T tokens. bits_per_byte = loss * tokens / (ln 2 * bytes of text).
inline Evaluation evaluate_model(GPT2* model, const std::vector<Shard>& shards,
                                 const std::vector<int>& token_bytes, int B, int T,
                                 size_t max_windows) {
    double start_s = now_s();
    EvalLoader loader(shards, B, T, max_windows);
    std::vector<int> inputs(size_t(B) * size_t(T)), targets(inputs.size());
    Evaluation result;
    result.windows = loader.windows();
    size_t bytes = 0;
    gpt2_zero_gradients(model);  // and the sum of losses
    int rows = 0;
    while (loader.next_batch(inputs.data(), targets.data(), &rows)) {
        gpt2_forward(model, inputs.data(), targets.data(), rows, T, GPT2Pass{});
        for (int target : targets) {
            if (target == kIgnore) continue;
            result.tokens++;
            if (!token_bytes.empty()) bytes += size_t(token_bytes[size_t(target)]);
        }
    }
    double nats = gpt2_stats(model).loss;
    result.loss = nats / double(result.tokens);
    result.bits_per_byte = bytes > 0 ? nats / (M_LN2 * double(bytes)) : NAN;
    result.seconds = now_s() - start_s;
    return result;
}

inline std::string describe_evaluation(const Evaluation& e) {
    std::string text = format("%.4f nats a token, perplexity %.2f", e.loss, e.perplexity());
    if (std::isfinite(e.bits_per_byte)) text += format(", %.4f bits a byte", e.bits_per_byte);
    return text;
}

// ==== sampling ===================================================================================

// How many bytes at the end of `text` begin a UTF-8 character whose other bytes are still to come.
inline size_t unfinished_bytes(std::string_view text) {
    for (size_t back = 1; back <= std::min<size_t>(3, text.size()); back++) {
        auto byte = static_cast<unsigned char>(text[text.size() - back]);
        if ((byte & 0xC0) == 0x80) continue;
        size_t length = byte >= 0xF0 && byte < 0xF8 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC2 ? 2 : 1;
        return byte < 0xF8 && length > back ? back : 0;
    }
    return 0;
}

// What generation starts from: the last context - 1 tokens of the prompt, or the end of text, or
// token 0 where the vocabulary has none.
inline std::vector<int> starting_tokens(std::vector<int> prompt, const Tokenizer& tokenizer,
                                        int context) {
    size_t most = size_t(std::max(1, context - 1));
    if (prompt.size() > most) prompt.erase(prompt.begin(), prompt.end() - ptrdiff_t(most));
    if (prompt.empty()) prompt.push_back(std::max(0, tokenizer.end_of_text()));
    return prompt;
}

// Draws up to max_new_tokens after `tokens` (1 to context of them), calling emit(bytes) with whole
// UTF-8 characters as they come; ends early at the end of text, or when emit returns false. When
// the context is full, generation goes on from its last half, which is computed anew.
template <typename Emit>
void generate_text(GPT2* model, const Tokenizer& tokenizer, std::vector<int> tokens,
                   size_t max_new_tokens, Sampler& sampler, Emit emit) {
    const GPT2Config& config = gpt2_config(model);
    size_t context = size_t(config.context);
    int choices = std::min(config.vocab_size, tokenizer.vocab_size());
    std::vector<real> logits(size_t(config.vocab_size));
    std::string held;   // bytes of a character that is not complete
    size_t cached = 0;  // of the tokens, how many the key-value cache holds
    for (size_t i = 0; i < max_new_tokens; i++) {
        if (tokens.size() > context) {
            tokens.erase(tokens.begin(),
                         tokens.end() - ptrdiff_t(std::max<size_t>(1, context / 2)));
            cached = 0;
        }
        gpt2_generate(model, tokens.data() + cached, 1, int(tokens.size() - cached), int(cached),
                      logits.data());
        cached = tokens.size();
        int token = sampler.sample(logits.data(), choices).token;
        if (token == tokenizer.end_of_text()) break;
        tokens.push_back(token);
        held += tokenizer.token_bytes(token);
        size_t ready = held.size() - unfinished_bytes(held);
        if (ready > 0 && !emit(std::string_view(held).substr(0, ready))) return;
        held.erase(0, ready);
    }
    if (!held.empty()) emit(std::string_view(held));
}

// ==== progress ===================================================================================

struct Progress {
    double fraction = 0;  // of the run, 0 to 1
    size_t step = 0, steps = 0;
    double loss = 0, learning_rate = 0, grad_norm = 0;
    double tokens_per_s = 0, eta_s = 0;
    double peak_share = 0;  // operations/s over those that the device can do; 0: not known
};

// Shows a run on `file`: on a terminal the last line is redrawn, elsewhere a line is printed for
// each hundredth of the run. NO_COLOR (no-color.org) and TERM=dumb are respected. Nothing here
// fails: a run goes on when nobody can see it.
class Screen {
  public:
    explicit Screen(FILE* file) : file_(file) {
        const char* term = getenv("TERM");
        bool dumb = term == nullptr || strcmp(term, "dumb") == 0;
        terminal_ = isatty(fileno(file)) && !dumb;
        const char* no_color = getenv("NO_COLOR");
        color_ = terminal_ && (no_color == nullptr || *no_color == '\0');
    }
    Screen(const Screen&) = delete;
    Screen& operator=(const Screen&) = delete;
    ~Screen() {
        if (drawn_) fputc('\n', file_);
        fflush(file_);
    }

    // A line that stays.
    void line(const std::string& text) {
        clear();
        fprintf(file_, "%s\n", text.c_str());
        fflush(file_);
    }

    void heading(const std::string& text) { line(color_ ? "\033[1m" + text + "\033[0m" : text); }

    void progress(const Progress& p) {
        if (terminal_) return redraw(p);
        constexpr double kLines = 100;
        if (p.step > 1 && p.fraction < 1 && p.fraction < shown_ + 1 / kLines) return;
        shown_ = p.fraction;
        line(text(p, false));
    }

  private:
    static std::string bar(double fraction) {
        constexpr int kWidth = 20;
        int full = int(fraction * kWidth + 0.5);
        return "[" + std::string(size_t(full), '#') + std::string(size_t(kWidth - full), '.') + "]";
    }

    // The fields in the order of their importance, as many as the terminal has room for.
    std::string text(const Progress& p, bool fit) const {
        std::string steps = format("step %zu", p.step);
        if (p.steps > 0) steps += format("/%zu", p.steps);
        std::string line = format("%3.0f%%  ", 100 * p.fraction) + steps;
        const std::string fields[] = {
            format("loss %.4f", p.loss),
            "ETA " + readable_time(p.eta_s),
            readable_rate(p.tokens_per_s) + " tokens/s",
            format("rate %.2e", p.learning_rate),
            format("norm %.2f", p.grad_norm),
            p.peak_share > 0 ? format("%.0f%% of peak", 100 * p.peak_share) : "",
        };
        size_t width = fit ? columns() : 1000;
        for (const std::string& field : fields)
            if (!field.empty() && line.size() + 2 + field.size() < width) line += "  " + field;
        return line;
    }

    void redraw(const Progress& p) {
        constexpr double kInterval_s = 0.1;
        if (now_s() < drawn_s_ + kInterval_s && p.fraction < 1) return;
        drawn_s_ = now_s();
        std::string shown = text(p, true), bar_text = bar(p.fraction) + " ";
        if (shown.size() + bar_text.size() < columns())
            shown = (color_ ? "\033[36m" + bar_text + "\033[0m" : bar_text) + shown;
        fprintf(file_, "\r\033[K%s", shown.c_str());
        fflush(file_);
        drawn_ = true;
    }

    void clear() {
        if (drawn_) fputs("\r\033[K", file_);
        drawn_ = false;
    }

    size_t columns() const {
        struct winsize size;
        bool known = ioctl(fileno(file_), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
        return known ? size.ws_col : 80;
    }

    FILE* file_;
    bool terminal_ = false, color_ = false, drawn_ = false;
    double drawn_s_ = 0, shown_ = -1;
};

// ==== stopping ===================================================================================

// The signal that asked the run to stop, or 0.
inline volatile std::sig_atomic_t& stop_signal() {
    static volatile std::sig_atomic_t signal = 0;
    return signal;
}

// While it lives, the first SIGINT or SIGTERM is noted in stop_signal() and the second one ends the
// program at once. The handler has a stack of its own: kernels that oneDNN makes at run time may
// use the stack pointer as they like, and what the system puts there for a handler then falls on
// the heap. A signal to the process goes to the main thread, whose stack this is.
class StopOnSignal {
  public:
    StopOnSignal() : stack_(kStackBytes) {
        stack_t stack = {};
        stack.ss_sp = stack_.data(), stack.ss_size = stack_.size();
        sigaltstack(&stack, &outer_stack_);
        struct sigaction action = {};
        action.sa_handler = [](int signal) {
            if (stop_signal() != 0) _exit(128 + signal);
            stop_signal() = signal;
        };
        action.sa_flags = SA_RESTART | SA_ONSTACK;
        sigaction(SIGINT, &action, &interrupt_);
        sigaction(SIGTERM, &action, &terminate_);
    }
    StopOnSignal(const StopOnSignal&) = delete;
    StopOnSignal& operator=(const StopOnSignal&) = delete;
    ~StopOnSignal() {
        sigaction(SIGINT, &interrupt_, nullptr);
        sigaction(SIGTERM, &terminate_, nullptr);
        sigaltstack(&outer_stack_, nullptr);
    }

  private:
    static constexpr size_t kStackBytes =
        1 << 16;  // several times what AVX-512 and AMX registers take
    std::vector<char> stack_;
    stack_t outer_stack_;
    struct sigaction interrupt_, terminate_;
};

// ==== the run folder: state ======================================================================

// Where a run stands. Random numbers are counted from seed and step, so there is no other state of
// a generator to keep.
struct RunState {
    size_t step = 0, tokens = 0;
    DataLoader::Position position;
    double elapsed_s = 0;             // of all its parts
    double best_loss = INFINITY;      // of the evaluations on the way
    size_t best_step = 0, stale = 0;  // evaluations since the best
    bool finished = false;
    std::string dtype = "fp32";  // of the steps since the run was last started
    Goal goal;
};

// The content of trainer.json; save_checkpoint adds step, files and checksum.
inline ordered_json to_json(const RunState& state, const ordered_json& identity, uint64_t seed) {
    ordered_json root;
    root["format"] = 1;
    root["tokens"] = state.tokens;
    root["loader"] = {{"epoch", state.position.epoch}, {"window", state.position.window}};
    root["random"] = {{"seed", seed}, {"step", state.step}};
    root["elapsed_s"] = state.elapsed_s;
    root["best_val_loss"] = nullptr;
    if (std::isfinite(state.best_loss)) root["best_val_loss"] = state.best_loss;
    root["best_step"] = state.best_step;
    root["evaluations_without_gain"] = state.stale;
    root["finished"] = state.finished;
    root["dtype"] = state.dtype;
    root["goal"] = {{"steps", state.goal.steps}, {"time_limit_s", state.goal.time_limit_s}};
    root["run"] = identity;
    return root;
}

// Reads it back from a checkpoint folder, with `identity` written when it is not null.
inline RunState read_state(const std::string& folder, json* identity) {
    std::string path = join_path(folder, "trainer.json");
    json root = read_json_object(path);
    RunState state;
    try {
        if (root.at("format") != 1)
            fail_input("%s: format %s; this program reads 1", path.c_str(),
                       one_line(root.at("format").dump()).c_str());
        state.step = root.at("step").get<size_t>();
        state.tokens = root.at("tokens").get<size_t>();
        state.position.epoch = root.at("loader").at("epoch").get<uint64_t>();
        state.position.window = root.at("loader").at("window").get<uint64_t>();
        state.elapsed_s = root.at("elapsed_s").get<double>();
        if (!root.at("best_val_loss").is_null())
            state.best_loss = root.at("best_val_loss").get<double>();
        state.best_step = root.at("best_step").get<size_t>();
        state.stale = root.at("evaluations_without_gain").get<size_t>();
        state.finished = root.at("finished").get<bool>();
        state.dtype = root.value("dtype", state.dtype);
        state.goal.steps = root.at("goal").at("steps").get<size_t>();
        state.goal.time_limit_s = root.at("goal").at("time_limit_s").get<double>();
        if (identity != nullptr) *identity = root.at("run");
    } catch (const json::exception&) {
        fail_input("%s: not the state of a run of this program", path.c_str());
    }
    return state;
}

// What two runs must share for one to go on where the other stopped.
inline ordered_json run_identity(const TrainOptions& o, const ModelChoice& model,
                                 const TrainingData& data, const DataLoader& loader, int T,
                                 int micro_batches) {
    const GPT2Config& c = model.config;
    ordered_json run;
    run["vocabulary"] = c.vocab_size;
    run["layers"] = c.layers;
    run["heads"] = c.heads;
    run["channels"] = c.channels;
    run["hidden"] = c.hidden_size();
    run["context"] = c.context;
    run["tied"] = c.tied;
    run["bias"] = c.bias;
    run["started from"] = model.folder;
    run["data"] = hash_text(loader.data_hash());
    run["tokenizer"] = data.tokenizer ? hash_text(data.tokenizer->fingerprint()) : "none";
    run["seed"] = o.seed;
    run["sequence length"] = T;
    run["sequences a step"] = o.batch_size * int64_t(micro_batches);
    run["overfit one batch"] = o.overfit_one_batch;
    return run;
}

// The first entry in which a stored identity differs, for people; "" when there is none.
inline std::string identity_difference(const json& stored, const ordered_json& mine) {
    for (const auto& [key, value] : mine.items()) {
        std::string theirs = stored.contains(key) ? stored[key].dump() : "nothing";
        if (theirs != value.dump())
            return format("%s is %s there and %s here", key.c_str(), one_line(theirs).c_str(),
                          one_line(value.dump()).c_str());
    }
    return "";
}

// ==== the run folder: which one ==================================================================

struct RunFolder {
    std::string out;
    std::string checkpoint;  // to go on from; "": a new run
    std::string note;        // for people
};

inline bool holds_run(const std::string& out) {
    return path_exists(join_path(out, "log.jsonl")) || !list_steps(out, "").empty();
}

// Whether this command asks for more than a finished run was asked for.
inline bool asks_for_more(const Goal& goal, const Goal& done) {
    return goal.steps > done.steps || goal.time_limit_s > done.time_limit_s;
}

// OUT -> OUT.1, or the first number that is free: nothing is lost.
inline std::string set_aside(const std::string& out) {
    for (int number = 1;; number++) {
        std::string aside = format("%s.%d", out.c_str(), number);
        if (path_exists(aside)) continue;
        std::error_code error;
        fs::rename(out, aside, error);
        if (error) fail_machine("%s: cannot set aside: %s", out.c_str(), error.message().c_str());
        return aside;
    }
}

// --out was given: goes on with the run there, or refuses and says what would help.
inline RunFolder open_run_folder(const TrainOptions& o, const std::string& out, const Goal& goal,
                                 const ordered_json& identity) {
    if (!holds_run(out)) return {out, "", ""};
    if (o.resume == "never")
        return {out, "", format("the run that was there is now %s", set_aside(out).c_str())};
    std::string damage, checkpoint = latest_checkpoint(out, &damage);
    if (checkpoint.empty() && list_steps(out, "").empty()) return {out, "", ""};
    damage = damage.substr(0, damage.find('\n'));
    if (checkpoint.empty())
        fail_input("%s: no checkpoint is intact: %s; give another --out, or --resume never",
                   out.c_str(), damage.c_str());
    json stored;
    RunState state = read_state(checkpoint, &stored);
    std::string difference = identity_difference(stored, identity);
    if (!difference.empty())
        fail_input("%s: holds another run: %s; give another --out, or --resume never", out.c_str(),
                   difference.c_str());
    if (state.finished && !asks_for_more(goal, state.goal))
        fail_input(
            "%s: holds a finished run of %zu steps; give more --steps or --time-limit, another "
            "--out, or --resume never",
            out.c_str(), state.step);
    std::string note = format("going on with %s", checkpoint.c_str());
    if (!damage.empty()) note += "; passed over: " + damage;
    return {out, checkpoint, note};
}

// --resume FOLDER: a run folder or one of its checkpoints; --out defaults to the run folder.
inline RunFolder open_resumed_folder(const TrainOptions& o, const ordered_json& identity) {
    std::string from = o.resume, damage;
    bool is_checkpoint = path_exists(join_path(from, "trainer.json"));
    if (!is_checkpoint) from = latest_checkpoint(o.resume, &damage);
    if (from.empty())
        fail_input("--resume %s: %s", o.resume.c_str(),
                   damage.empty() ? "no run is there; give a run folder, auto or never"
                                  : damage.substr(0, damage.find('\n')).c_str());
    from = fs::path(from).lexically_normal().string();
    if (from.ends_with('/')) from.pop_back();
    std::string home = fs::path(from).parent_path().string();
    std::string out = o.out.empty() ? home : o.out;
    json stored;
    read_state(from, &stored);
    std::string difference = identity_difference(stored, identity);
    if (!difference.empty())
        fail_input("--resume %s: is another run: %s", o.resume.c_str(), difference.c_str());
    std::error_code ignored;
    if (holds_run(out) && !fs::equivalent(out, home, ignored))
        fail_input("%s: holds another run; give another --out", out.c_str());
    return {out, from, format("going on with %s", from.c_str())};
}

// runs/NAME, of the name of the data.
inline std::string default_out(const std::vector<std::string>& data) {
    fs::path path = fs::path(data.at(0)).lexically_normal();
    if (!path.has_filename()) path = path.parent_path();
    std::string name = path.stem().string();
    if (name.find_first_of("*?[") != std::string::npos) name = path.parent_path().stem().string();
    if (name.empty() || name == "." || name == ".." || name == "/") name = "text";
    return "runs/" + name;
}

// No --out: the first of runs/NAME, runs/NAME-2, ... that is free, or that holds this very run,
// unfinished.
inline RunFolder find_run_folder(const TrainOptions& o, const ordered_json& identity) {
    std::string base = default_out(o.data);
    for (int number = 1;; number++) {
        std::string out = number == 1 ? base : format("%s-%d", base.c_str(), number);
        if (!holds_run(out)) return {out, "", ""};
        if (o.resume == "never") continue;
        std::string checkpoint = latest_checkpoint(out);
        if (checkpoint.empty()) continue;
        json stored;
        RunState state = read_state(checkpoint, &stored);
        if (state.finished || !identity_difference(stored, identity).empty()) continue;
        return {out, checkpoint, format("going on with %s", checkpoint.c_str())};
    }
}

inline RunFolder choose_run_folder(const TrainOptions& o, const Goal& goal,
                                   const ordered_json& identity) {
    if (o.resume != "auto" && o.resume != "never") return open_resumed_folder(o, identity);
    if (!o.out.empty()) return open_run_folder(o, o.out, goal, identity);
    return find_run_folder(o, identity);
}

// Where tokenized text and trained tokenizers are kept: beside the run folder.
inline std::string cache_folder(const TrainOptions& o) {
    std::string out = o.out.empty() ? default_out(o.data) : o.out;
    bool resumed = o.resume != "auto" && o.resume != "never";
    if (o.out.empty() && resumed) {
        out = fs::path(o.resume).lexically_normal().string();
        if (out.ends_with('/')) out.pop_back();
        if (path_exists(join_path(out, "trainer.json"))) out = fs::path(out).parent_path().string();
    }
    fs::path path = fs::path(out).lexically_normal();
    if (!path.has_filename()) path = path.parent_path();
    return (path.parent_path() / "cache").string();
}

// ==== the run folder: log ========================================================================

// OUT/log.jsonl, a line a step, on disk as soon as it is written. Opening it for a run that goes on
// from `step` drops the lines after that step, which will be written again.
class RunLog {
  public:
    RunLog(const std::string& out, size_t step) : path_(join_path(out, "log.jsonl")) {
        cut(step);
        file_ = fopen(path_.c_str(), "ae");
        if (file_ == nullptr) fail_errno(path_, "open");
    }
    RunLog(const RunLog&) = delete;
    RunLog& operator=(const RunLog&) = delete;
    ~RunLog() { fclose(file_); }

    void write(const ordered_json& record) {
        std::string text = json_text(record, -1) + "\n";
        if (fwrite(text.data(), 1, text.size(), file_) != text.size() || fflush(file_) != 0)
            fail_machine("%s: cannot write: %s", path_.c_str(), strerror(errno));
    }

  private:
    // A line that is no record, such as one that a crash cut short, is dropped as well.
    void cut(size_t step) {
        if (!path_exists(path_)) return;
        std::string text = read_file(path_), kept;
        for (size_t begin = 0; begin < text.size();) {
            size_t end = std::min(text.find('\n', begin), text.size());
            std::string line = text.substr(begin, end - begin);
            json record = json::parse(line, nullptr, false);
            bool whole = record.is_object() && record.value("step", json()).is_number_unsigned();
            if (whole && record["step"].get<size_t>() <= step) kept += line + "\n";
            begin = end + 1;
        }
        if (kept != text) write_file_atomic(path_, kept);
    }

    std::string path_;
    FILE* file_ = nullptr;
};

// ==== the training loop ==========================================================================

// The shape of the model that trains: with a cache for one sequence when it also samples.
inline GPT2Shape training_shape(const TrainOptions& o, const GPT2Config& config, int T,
                                bool samples) {
    GPT2Shape shape = choose_shape(o.compute);
    shape.B = o.batch_size, shape.T = T, shape.training = true;
    shape.generate = samples && o.sample_every > 0 ? 1 : 0;
    shape.recompute = choose_recompute(o.recompute, config, shape, gpt2_memory_free());
    return shape;
}

// The part of the device's rate of large products that a step is assumed to reach, for estimates.
constexpr double kAssumedShare = 0.6;

// --steps or --epochs as steps, and --time-limit. With none of them, two minutes for a text that
// they are enough for, and an epoch of anything larger.
inline Goal choose_goal(const TrainOptions& o, const TrainingData& data, size_t windows,
                        size_t sequences_a_step) {
    constexpr size_t kSmallText = 10000000;
    constexpr double kSmallTime_s = 120;
    Goal goal{o.steps, o.time_limit_s};
    double epochs = o.epochs;
    if (o.steps > 0 && epochs > 0) fail_input("--steps and --epochs: give one of them");
    bool none = o.steps == 0 && epochs == 0 && o.time_limit_s == 0;
    bool small = data.train_bytes > 0 && data.train_bytes < kSmallText;
    if (none && small) goal.time_limit_s = kSmallTime_s;
    if (none && !small) epochs = 1;
    if (epochs > 0) {
        double steps = std::ceil(epochs * double(windows) / double(sequences_a_step));
        goal.steps = size_t(std::clamp(steps, 1.0, kMaxSteps));
    }
    return goal;
}

// A step that was given to the device, and what its record will say.
struct LaunchedStep {
    size_t step;  // counts from 1
    double learning_rate;
    DataLoader::Position position;  // of the data, behind its batches
    double epoch;                   // the same in epochs
    double begin_s;
};

// One run, from data to the last checkpoint. Members are what a step needs; each is made once,
// before step 0.
class Training {
  public:
    // Reads the data, makes or loads the model and finds the place to go on from. `start_s` is when
    // the command began, from which the time limit counts.
    Training(const TrainOptions& options, double start_s, const std::string& how_to_go_on)
        : o_(options), screen_(options.screen), start_s_(start_s), how_to_go_on_(how_to_go_on) {
        choose_shape(o_.compute);  // refuses early what this program cannot
        choice_ = choose_model(o_.model);
        T_ = choose_sequence_length(o_.sequence_length, choice_.config);
        micro_batches_ = accumulation(o_, T_, world_);
        data_ = read_data(o_, choice_, cache_folder(o_));
        check_length(o_, data_, T_);
        choose_vocabulary(data_, &choice_);
        validate(choice_.config);
        train_tokens_ = count_tokens(data_.train);
        loader_.emplace(std::move(data_.train), o_.batch_size, T_, rank_, world_, o_.seed);
        goal_ = choose_goal(o_, data_, loader_->windows_per_epoch(), sequences_a_step());
        identity_ = run_identity(o_, choice_, data_, *loader_, T_, micro_batches_);
        folder_ = choose_run_folder(o_, goal_, identity_);
        make_folder(folder_.out);
        prepare_model();
        log_.emplace(folder_.out, state_.step);
        size_t tokens = size_t(o_.batch_size) * size_t(T_) * size_t(micro_batches_);
        inputs_.resize(tokens);
        targets_.resize(tokens);
    }

    // Trains to the goal. Returns 0, or 128 + the signal that stopped it after a save.
    //
    // A step is launched before the one before it is looked at, so that the device always has work;
    // only where something must see the result of a step does the loop wait for it.
    int run() {
        peak_ = o_.peak.flops > 0 ? o_.peak : gpt2_peak(gpt2_shape(model_.get()));
        report();
        StopOnSignal signals;
        std::optional<LaunchedStep> before;
        if (!is_over()) fetch_batches();
        for (bool last = is_over(); !last;) {
            LaunchedStep now = launch();
            if (before) log_->write(finish(*before, gpt2_previous_stats(model_.get())));
            before = now;
            if (!is_awaited(now)) continue;
            before.reset();
            ordered_json record = finish(now, gpt2_stats(model_.get()));
            last = is_over();
            if (stop_signal() != 0 && !last) return stop(&record);
            bool best = false;
            if (is_due(o_.eval_every, now.step) || last) best = evaluate(&record, &last);
            log_->write(record);
            if (is_due(o_.sample_every, now.step) && !last) sample();
            if (last || best || is_due(o_.save_every, now.step)) save(best, last);
        }
        conclude();
        return 0;
    }

  private:
    size_t sequences_a_step() const {
        return size_t(o_.batch_size) * size_t(micro_batches_) * size_t(world_);
    }
    size_t tokens_a_step() const { return sequences_a_step() * size_t(T_); }
    double elapsed_s() const { return elapsed_before_s_ + now_s() - start_s_; }
    static bool is_due(size_t interval, size_t step) {
        return interval > 0 && step % interval == 0;
    }
    bool evaluates() const { return !data_.val.empty() && !o_.overfit_one_batch; }
    size_t subset_windows() const { return o_.eval_batches * size_t(o_.batch_size); }

    // Seconds that the end of the run will take, from what the same has taken so far; before that,
    // a forward pass is taken for a third of a step.
    double reserve_s() const {
        if (goal_.time_limit_s == 0) return 0;
        double windows = 0;
        if (evaluates()) {
            double all = double(count_tokens(data_.val)) / T_ + 1;
            double subset = std::min(all, double(subset_windows()));
            windows = all + (o_.eval_batches > 0 && subset < all ? subset : 0);
        }
        double window_s = window_s_;
        if (window_s == 0) window_s = step_s_ / (3 * double(sequences_a_step()));
        double save_s =
            save_s_ > 0 ? save_s_ : 12.0 * double(count_parameters(choice_.config)) / 3e8;
        return 1.1 * (windows * window_s + save_s) + 0.15;
    }

    // Whether the goal is reached, or too near for another step. At least one step is made.
    bool is_over() const {
        if (goal_.steps > 0 && state_.step >= goal_.steps) return true;
        double next_s = elapsed_s() + step_s_ + reserve_s();
        return goal_.time_limit_s > 0 && step_s_ > 0 && next_s >= goal_.time_limit_s;
    }

    // Whether the step that was launched last must be done before anything else happens: it may be
    // the last one, something is due after it, or nothing is known yet of how long a step takes.
    bool is_awaited(const LaunchedStep& now) const {
        if (stop_signal() != 0 || step_s_ == 0 || now.step == goal_.steps) return true;
        if (is_due(o_.eval_every, now.step) || is_due(o_.sample_every, now.step) ||
            is_due(o_.save_every, now.step))
            return true;
        double after_next_s = elapsed_s() + 2 * step_s_ + reserve_s();
        return goal_.time_limit_s > 0 && after_next_s >= goal_.time_limit_s;
    }

    void prepare_model() {
        bool samples = data_.tokenizer.has_value();
        GPT2Shape shape = training_shape(o_, choice_.config, T_, samples);
        const char* dtype = dtype_name(shape.dtype);
        model_.reset(gpt2_create(choice_.config, shape, rank_, world_));
        if (!folder_.checkpoint.empty()) {
            load_checkpoint(model_.get(), folder_.checkpoint);
            state_ = read_state(folder_.checkpoint, nullptr);
            elapsed_before_s_ = state_.elapsed_s;
            loader_->seek(state_.position);
            if (state_.dtype != dtype)
                add_note(format("the run used --dtype %s so far and goes on with %s",
                                one_line(state_.dtype).c_str(), dtype));
        } else if (!choice_.folder.empty()) {
            load_model(model_.get(), choice_.folder);
        } else {
            gpt2_initialise(model_.get(), o_.seed);
        }
        std::string from = folder_.checkpoint.empty() ? choice_.folder : folder_.checkpoint;
        if (!from.empty()) add_note(conversion_note(from));
        state_.finished = false;
        state_.dtype = dtype;
        state_.goal = goal_;
        launched_ = state_.step;
    }
    void add_note(const std::string& note) {
        if (!note.empty()) notes_.push_back(note);
    }

    void report();
    void report_goal();
    void fetch_batches();
    LaunchedStep launch();
    ordered_json finish(const LaunchedStep& launched, const GPT2Stats& stats);
    void show_progress(double loss, double rate, double grad_norm);
    bool evaluate(ordered_json* record, bool* last);
    void sample();
    void save(bool best, bool last);
    int stop(ordered_json* record);
    void conclude();

    static constexpr int rank_ = 0, world_ = 1;
    const TrainOptions& o_;
    Screen screen_;
    double start_s_;
    std::string how_to_go_on_;
    ModelChoice choice_;
    int T_ = 0, micro_batches_ = 1;
    TrainingData data_;
    size_t train_tokens_ = 0;
    std::optional<DataLoader> loader_;
    Goal goal_;
    ordered_json identity_;
    RunFolder folder_;
    std::vector<std::string> notes_;  // for people
    GPT2Ptr model_;
    RunState state_;       // after the last step that is known to be done
    size_t launched_ = 0;  // steps, of which the last may not be done
    std::optional<RunLog> log_;
    std::vector<int> inputs_, targets_;             // of the next step: (micro-batches, B, T)
    double elapsed_before_s_ = 0, finished_s_ = 0;  // finished_s_: when the last step was done
    PeakRate peak_;
    double step_s_ = 0, window_s_ = 0, save_s_ = 0;  // how long each took, lately
    Evaluation final_;
};

// The device, and how fast it is where that is known.
inline std::string describe_machine(const PeakRate& peak) {
    if (peak.flops == 0) return gpt2_device();
    return gpt2_device() + ", " + readable_rate(peak.flops) + "FLOP/s " + peak.source;
}

// The precision and whatever else was asked for, as a run will compute.
inline std::string describe_computing(const GPT2Shape& shape) {
    std::string text = dtype_name(shape.dtype);
    if (shape.tf32 && shape.dtype == Dtype::fp32) text += " with tf32 products";
    if (!shape.deterministic) text += ", not deterministic";
    return text + format(", recompute level %d", shape.recompute);
}

// What is about to happen: configuration, sizes, memory, the length of the run.
inline void Training::report() {
    const GPT2Config& c = choice_.config;
    GPT2Shape shape = gpt2_shape(model_.get());
    screen_.line("machine    " + describe_machine(peak_));
    screen_.line("computing  " + describe_computing(shape));
    screen_.line("data       " + data_.description);
    screen_.line("tokenizer  " + describe_tokenizer(data_.tokenizer));
    screen_.line(
        format("model      %d layers, %d heads, %d channels, context %d, vocabulary %s%s%s",
               c.layers, c.heads, c.channels, c.context, with_commas(size_t(c.vocab_size)).c_str(),
               choice_.folder.empty() ? "" : ", from ", choice_.folder.c_str()));
    for (const std::string& line : size_report(c, shape)) screen_.line(line);
    screen_.line(format("step       %s tokens: %d x %d sequences of %d; an epoch is %s steps",
                        with_commas(tokens_a_step()).c_str(), micro_batches_, o_.batch_size, T_,
                        with_commas(size_t(std::ceil(double(loader_->windows_per_epoch()) /
                                                     double(sequences_a_step()))))
                            .c_str()));
    report_goal();
    screen_.line("out        " + folder_.out);
    if (!folder_.note.empty()) screen_.line("note       " + folder_.note);
    for (const std::string& note : notes_) screen_.line("note       " + note);
    if (data_.val.empty() && !o_.overfit_one_batch)
        screen_.line(
            "note       too little data for validation: the last checkpoint is the result");
}

// The length of the run, in steps and in time; one from the other where the device's rate is known.
inline void Training::report_goal() {
    double operations = operations_per_token(choice_.config, T_) * double(tokens_a_step());
    double step_s = peak_.flops > 0 ? operations / (kAssumedShare * peak_.flops) : 0;
    std::string goal;
    if (goal_.steps > 0) {
        double left = double(goal_.steps - std::min(goal_.steps, state_.step));
        goal = with_commas(goal_.steps) + " steps";
        if (step_s > 0) goal += ", about " + readable_time(left * step_s);
    }
    if (goal_.time_limit_s > 0) {
        goal += (goal.empty() ? "" : "; ") + readable_time(goal_.time_limit_s) + " of time";
        if (goal_.steps == 0 && step_s > 0)
            goal += format(", about %s steps",
                           with_commas(size_t(goal_.time_limit_s / step_s)).c_str());
    }
    screen_.line("goal       " + goal);
}

inline void Training::fetch_batches() {
    if (o_.overfit_one_batch) loader_->seek({});
    size_t batch = size_t(o_.batch_size) * size_t(T_);
    for (int m = 0; m < micro_batches_; m++)
        loader_->next_batch(&inputs_[size_t(m) * batch], &targets_[size_t(m) * batch]);
    if (o_.overfit_one_batch) loader_->seek({});
}

// Gives one step to the device: rate, zero, forward and backward of each micro-batch, clip and
// update; then fetches the batches of the next one, while the device works. All batches of a step
// are there before its first forward pass, because loss and gradient are means over the targets
// that count in the whole step.
inline LaunchedStep Training::launch() {
    double progress = run_progress(goal_, launched_, elapsed_s(), reserve_s());
    LaunchedStep now{launched_ + 1, learning_rate(o_, goal_, launched_, progress),
                     loader_->position(), loader_->epoch_fraction(), now_s()};
    AdamW adamw{now.learning_rate, o_.beta1,     o_.beta2, o_.epsilon,
                o_.weight_decay,   o_.grad_clip, now.step};
    size_t batch = size_t(o_.batch_size) * size_t(T_);
    auto count = targets_.size() - size_t(std::count(targets_.begin(), targets_.end(), kIgnore));
    GPT2Pass pass;
    pass.training = true, pass.seed = o_.seed, pass.step = launched_;
    pass.loss_scale = 1 / (double(std::max<size_t>(count, 1)) * world_);
    gpt2_zero_gradients(model_.get());
    for (int m = 0; m < micro_batches_; m++) {
        pass.first_sequence = uint64_t(m * world_ + rank_) * uint64_t(o_.batch_size);
        gpt2_forward(model_.get(), &inputs_[size_t(m) * batch], &targets_[size_t(m) * batch],
                     o_.batch_size, T_, pass);
        gpt2_backward(model_.get());
    }
    gpt2_update(model_.get(), adamw);
    launched_++;
    fetch_batches();
    return now;
}

// Takes note of a step that is done, and makes its record. fail_machine where its loss or gradient
// is not finite; a step that was launched after it is lost with it.
inline ordered_json Training::finish(const LaunchedStep& launched, const GPT2Stats& stats) {
    if (!std::isfinite(stats.loss) || !std::isfinite(stats.grad_norm))
        fail_machine(
            "%s: step %zu: loss %g, gradient norm %g; the checkpoints before it are intact; a "
            "lower --learning-rate or a longer --warmup may help",
            folder_.out.c_str(), launched.step, stats.loss, stats.grad_norm);

    state_.step = launched.step;
    state_.tokens += tokens_a_step();
    state_.position = launched.position;
    double done_s = stats.finished_s > 0 ? stats.finished_s : now_s();
    double took_s = std::max(1e-9, done_s - std::max(finished_s_, launched.begin_s));
    finished_s_ = done_s;
    step_s_ = step_s_ == 0 ? took_s : 0.9 * step_s_ + 0.1 * took_s;
    if (state_.step == 1)
        screen_.line(format("first loss %.4f; a uniform guess has ln(%d) = %.4f", stats.loss,
                            choice_.config.vocab_size, std::log(choice_.config.vocab_size)));
    show_progress(stats.loss, launched.learning_rate, stats.grad_norm);
    ordered_json record;
    record["step"] = state_.step;
    record["train_loss"] = stats.loss;
    record["learning_rate"] = launched.learning_rate;
    record["grad_norm"] = stats.grad_norm;
    record["tokens_per_s"] = double(tokens_a_step()) / took_s;
    record["step_ms"] = 1000 * took_s;
    record["epoch"] = launched.epoch;
    record["tokens"] = state_.tokens;
    record["elapsed_s"] = elapsed_before_s_ + done_s - start_s_;
    return record;
}

inline void Training::show_progress(double loss, double rate, double grad_norm) {
    Progress p;
    p.step = state_.step, p.steps = goal_.steps;
    p.loss = loss, p.learning_rate = rate, p.grad_norm = grad_norm;
    p.tokens_per_s = double(tokens_a_step()) / step_s_;
    if (peak_.flops > 0)
        p.peak_share = operations_per_token(choice_.config, T_) * p.tokens_per_s / peak_.flops;
    p.fraction = run_progress(goal_, state_.step, elapsed_s(), reserve_s());
    p.eta_s = INFINITY;
    if (goal_.steps > 0) p.eta_s = double(goal_.steps - state_.step) * step_s_ + reserve_s();
    if (goal_.time_limit_s > 0) {
        p.eta_s = std::min(p.eta_s, goal_.time_limit_s - elapsed_s());
        p.fraction = std::max(p.fraction, std::min(1.0, elapsed_s() / goal_.time_limit_s));
    }
    screen_.progress(p);
}

// Evaluates on the part of the validation data that all evaluations on the way share, which decides
// about best and patience, and at the end on all of it, which is what the record then says. Returns
// whether the model is the best so far; sets *last when patience is at its end.
inline bool Training::evaluate(ordered_json* record, bool* last) {
    if (!evaluates()) return false;
    auto over = [&](size_t windows) {
        Evaluation e =
            evaluate_model(model_.get(), data_.val, data_.token_bytes, o_.batch_size, T_, windows);
        window_s_ = e.seconds / double(e.windows);
        return e;
    };
    Evaluation now = over(subset_windows());
    bool best = now.loss < state_.best_loss;
    state_.stale = best ? 0 : state_.stale + 1;
    if (best) state_.best_loss = now.loss, state_.best_step = state_.step;
    bool patience_ends = o_.early_stop > 0 && state_.stale >= o_.early_stop;
    if (patience_ends && !*last) {
        *last = true;
        screen_.line(format("early stop: %zu evaluations without gain", state_.stale));
    }
    if (*last && subset_windows() > 0) now = over(0);
    if (*last) final_ = now;
    if (!*last)
        screen_.line(format("step %-7zu validation: %s%s", state_.step,
                            describe_evaluation(now).c_str(), best ? ", best so far" : ""));
    (*record)["val_loss"] = now.loss;
    (*record)["val_perplexity"] = now.perplexity();
    if (std::isfinite(now.bits_per_byte)) (*record)["val_bits_per_byte"] = now.bits_per_byte;
    (*record)["val_windows"] = now.windows;
    return best;
}

inline void Training::sample() {
    if (!data_.tokenizer) return;
    constexpr size_t kTokens = 100;
    int context = choice_.config.context;
    Sampler sampler({0.8, 0, 1.0}, o_.seed + state_.step);
    std::string text;
    generate_text(model_.get(), *data_.tokenizer,
                  starting_tokens(data_.tokenizer->encode("\n"), *data_.tokenizer, context),
                  kTokens, sampler, [&](std::string_view bytes) { return text += bytes, true; });
    screen_.heading(format("-- sample at step %zu --", state_.step));
    screen_.line(text);
}

inline void Training::save(bool best, bool last) {
    double begin_s = now_s();
    state_.elapsed_s = elapsed_s();
    state_.finished = last;
    save_checkpoint(folder_.out, state_.step, model_.get(),
                    data_.tokenizer ? &*data_.tokenizer : nullptr,
                    to_json(state_, identity_, o_.seed), best, o_.keep);
    save_s_ = now_s() - begin_s;
}

// A signal came: this step is done, and an evaluation that was due is made, so that the run goes on
// as if nothing had been.
inline int Training::stop(ordered_json* record) {
    int signal = stop_signal();
    bool last = false, best = false;
    if (is_due(o_.eval_every, state_.step)) best = evaluate(record, &last);
    log_->write(*record);
    save(best, last);
    screen_.line(format("stopped by signal %d at step %zu; saved %s", signal, state_.step,
                        join_path(folder_.out, step_name(state_.step)).c_str()));
    screen_.line("go on with: " + how_to_go_on_ + " --out " + folder_.out);
    return 128 + signal;
}

inline void Training::conclude() {
    screen_.line(format("done       %s steps, %s tokens, %s", with_commas(state_.step).c_str(),
                        with_commas(state_.tokens).c_str(), readable_time(elapsed_s()).c_str()));
    if (final_.windows > 0)
        screen_.line(format("validation %s, over all %s windows",
                            describe_evaluation(final_).c_str(),
                            with_commas(final_.windows).c_str()));
    if (state_.best_step > 0 && state_.best_step != state_.step)
        screen_.line(format("best       at step %s: %s", with_commas(state_.best_step).c_str(),
                            join_path(folder_.out, "best").c_str()));
    screen_.line("saved      " + join_path(folder_.out, step_name(state_.step)));
    if (data_.tokenizer)
        screen_.line(format("try        %s sample --model %s --prompt TEXT", gpt2_program(),
                            folder_.out.c_str()));
}

// ==== commands: train, plan ======================================================================

inline int train_command(const TrainOptions& o, double start_s, const std::string& how_to_go_on) {
    require("--data", !o.data.empty());
    Training training(o, start_s, how_to_go_on);
    return training.run();
}

// Operations and time of a run; no time where nothing is known of the device's rate.
inline void print_time_plan(double operations, size_t tokens_a_step, const Goal& goal,
                            const PeakRate& peak) {
    double step = operations * double(tokens_a_step);
    printf("operations %s a token, %s a step of %s tokens\n", readable_rate(operations).c_str(),
           readable_rate(step).c_str(), with_commas(tokens_a_step).c_str());
    printf("machine    %s\n", describe_machine(peak).c_str());
    if (peak.flops == 0) {
        printf("time       unknown, as the rate of this device is\n");
        return;
    }
    double step_s = step / (kAssumedShare * peak.flops);
    printf("time       %.3g s a step at the peak (%s), about %.3g s at %.0f%% of it\n",
           step / peak.flops, peak.source.c_str(), step_s, 100 * kAssumedShare);
    if (goal.steps > 0)
        printf("run        %s steps, about %s\n", with_commas(goal.steps).c_str(),
               readable_time(step_s * double(goal.steps)).c_str());
    if (goal.time_limit_s > 0)
        printf("run        %s, about %s steps\n", readable_time(goal.time_limit_s).c_str(),
               with_commas(size_t(goal.time_limit_s / step_s)).c_str());
}

// Sizes, operations and time of a run, from its options alone: no memory is taken for the model.
inline int plan_command(const PlanOptions& p) {
    const TrainOptions& o = p.train;
    ModelChoice choice = choose_model(o.model);
    int T = choose_sequence_length(o.sequence_length, choice.config);
    if (!choice.fixed_vocab) choice.config.vocab_size = p.vocab_size;
    Goal goal{o.steps, o.time_limit_s};
    size_t sequences = size_t(o.batch_size) * size_t(accumulation(o, T, 1));
    if (!o.data.empty()) {
        TrainingData data = read_data(o, choice, cache_folder(o));
        check_length(o, data, T);
        choose_vocabulary(data, &choice);
        size_t windows = count_tokens(data.train) / size_t(T);
        goal = choose_goal(o, data, windows, sequences);
        printf("data       %s\n", data.description.c_str());
    }
    const GPT2Config& c = choice.config;
    GPT2Shape shape = training_shape(o, c, T, true);
    printf("model      %d layers, %d heads, %d channels, context %d, vocabulary %s\n", c.layers,
           c.heads, c.channels, c.context, with_commas(size_t(c.vocab_size)).c_str());
    for (const std::string& line : size_report(c, shape)) printf("%s\n", line.c_str());
    for (const std::string& line : fit_report(c, shape, gpt2_memory_free()))
        printf("%s\n", line.c_str());
    printf("computing  %s\n", describe_computing(shape).c_str());
    print_time_plan(operations_per_token(c, T), sequences * size_t(T), goal, gpt2_peak(shape));
    return 0;
}

// ==== commands: sample, evaluate =================================================================

// A model from disk, for everything but training; its tokenizer is the folder's own, or the one
// that was named.
struct LoadedModel {
    GPT2Ptr model;
    std::optional<Tokenizer> tokenizer;
};

inline std::optional<Tokenizer> model_tokenizer(const std::string& name, const std::string& folder,
                                                const GPT2Config& config) {
    std::optional<Tokenizer> tokenizer;
    if (!name.empty()) tokenizer = load_tokenizer(name);
    else if (holds_tokenizer(folder)) tokenizer = Tokenizer::load(folder);
    if (tokenizer && tokenizer->vocab_size() > config.vocab_size)
        fail_input("%s: a tokenizer of %d tokens, the model has a vocabulary of %d",
                   name.empty() ? folder.c_str() : name.c_str(), tokenizer->vocab_size(),
                   config.vocab_size);
    return tokenizer;
}

// Fills a model from a folder's weights; says on stderr when they are of another precision.
inline void load_model_noted(GPT2* model, const std::string& folder) {
    load_model(model, folder);
    std::string note = conversion_note(folder);
    if (!note.empty()) fprintf(stderr, "note: %s\n", note.c_str());
}

inline LoadedModel load_for_inference(const std::string& path, const std::string& tokenizer,
                                      GPT2Shape shape) {
    std::string folder = resolve_model_folder(path);
    GPT2Config config = read_model_config(folder);
    config.dropout = 0;
    LoadedModel loaded{nullptr, model_tokenizer(tokenizer, folder, config)};
    shape.T = std::min(shape.T, config.context);
    loaded.model.reset(gpt2_create(config, shape, 0, 1));
    load_model_noted(loaded.model.get(), folder);
    return loaded;
}

// The prompt as tokens; what cannot be kept of it is said on stderr.
inline std::vector<int> prompt_tokens(const std::string& prompt, const Tokenizer& tokenizer,
                                      int context) {
    std::string missing;
    std::vector<int> ids = tokenizer.encode(prompt, &missing);
    if (!missing.empty())
        fprintf(stderr,
                "note: characters of the prompt that the vocabulary lacks are dropped: %s\n",
                one_line(missing).c_str());
    std::vector<int> tokens = starting_tokens(ids, tokenizer, context);
    if (ids.size() > tokens.size())
        fprintf(stderr, "note: the prompt has %zu tokens, the context %d: its last %zu are used\n",
                ids.size(), context, tokens.size());
    return tokens;
}

inline int sample_command(const SampleOptions& o) {
    require("--model", !o.model.empty());
    check_sampler_options(o.sampler);
    GPT2Shape shape = choose_shape(o.compute);
    shape.T = 128, shape.generate = 1;  // a longer prompt goes in by parts
    LoadedModel loaded = load_for_inference(o.model, o.tokenizer, shape);
    if (!loaded.tokenizer)
        fail_input("%s: there is no tokenizer.json; name one with --tokenizer", o.model.c_str());
    int context = gpt2_config(loaded.model.get()).context;
    std::vector<int> tokens = prompt_tokens(o.prompt, *loaded.tokenizer, context);
    std::optional<AtomicFile> file;
    if (!o.out.empty()) file.emplace(o.out);
    auto emit = [&](std::string_view bytes) {
        if (file) return file->write(bytes.data(), bytes.size()), true;
        return fwrite(bytes.data(), 1, bytes.size(), stdout) == bytes.size() && fflush(stdout) == 0;
    };
    for (size_t i = 0; i < o.num_samples; i++) {
        if (o.num_samples > 1)
            emit(format("== sample %zu of %zu, seed %zu ==\n", i + 1, o.num_samples,
                        size_t(o.seed + i)));
        Sampler sampler(o.sampler, o.seed + i);
        if (!emit(o.prompt)) break;
        generate_text(loaded.model.get(), *loaded.tokenizer, tokens, o.max_new_tokens, sampler,
                      emit);
        if (!emit("\n")) break;
    }
    if (file) file->commit();
    return 0;
}

// --data of `evaluate`, all of it.
inline std::vector<Shard> evaluation_shards(const EvaluateOptions& o, const LoadedModel& loaded) {
    std::vector<std::string> paths = expand_paths(o.data);
    std::vector<Shard> shards;
    if (!paths.empty() && is_shard(paths[0])) {
        for (const std::string& path : paths)
            shards.emplace_back(path, gpt2_config(loaded.model.get()).vocab_size);
        return shards;
    }
    if (!loaded.tokenizer)
        fail_input("%s: there is no tokenizer.json; name one with --tokenizer", o.model.c_str());
    // A shard outlives its file, so that nothing of this stays behind.
    TemporaryFolder folder(join_path(fs::temp_directory_path().string(),
                                     format("%s-%d", gpt2_program(), int(getpid()))));
    TextCorpus corpus = read_text(o.data);
    shards.push_back(text_shard(corpus, 0, corpus.text.size(), *loaded.tokenizer, folder.path()));
    if (shards[0].size() < 2)
        fail_input("%s: a single token leaves nothing to predict; give more text",
                   o.data[0].c_str());
    return shards;
}

inline int evaluate_command(const EvaluateOptions& o) {
    require("--model", !o.model.empty());
    require("--data", !o.data.empty());
    GPT2Config config = read_model_config(resolve_model_folder(o.model));
    GPT2Shape shape = choose_shape(o.compute);
    shape.B = o.batch_size, shape.T = choose_sequence_length(o.sequence_length, config);
    LoadedModel loaded = load_for_inference(o.model, o.tokenizer, shape);
    std::vector<Shard> shards = evaluation_shards(o, loaded);
    std::vector<int> bytes;
    if (loaded.tokenizer) {
        bytes = bytes_per_token(*loaded.tokenizer);
        bytes.resize(size_t(config.vocab_size));  // ids beyond the tokenizer stand for no text
    }
    Evaluation e = evaluate_model(loaded.model.get(), shards, bytes, shape.B, shape.T, 0);
    if (!o.as_json) {
        printf("%s\n%s tokens in %s windows of %d, %.1f s\n", describe_evaluation(e).c_str(),
               with_commas(e.tokens).c_str(), with_commas(e.windows).c_str(), shape.T, e.seconds);
        return 0;
    }
    ordered_json root;
    root["loss"] = e.loss;
    root["perplexity"] = e.perplexity();
    root["bits_per_byte"] = nullptr;
    if (std::isfinite(e.bits_per_byte)) root["bits_per_byte"] = e.bits_per_byte;
    root["tokens"] = e.tokens;
    root["windows"] = e.windows;
    root["sequence_length"] = shape.T;
    root["seconds"] = e.seconds;
    printf("%s\n", json_text(root, -1).c_str());
    return 0;
}

// ==== commands: tokenizer, shard =================================================================

inline std::string read_input(const std::string& path) {
    if (!path.empty()) return read_file(path);
    std::string text;
    char buffer[1 << 16];
    while (size_t size = fread(buffer, 1, sizeof buffer, stdin)) text.append(buffer, size);
    if (ferror(stdin)) fail_machine("standard input: cannot read: %s", strerror(errno));
    return text;
}

inline int tokenizer_train_command(const TokenizerOptions& o) {
    require("--data", !o.data.empty());
    require("--out", !o.out.empty());
    TextCorpus corpus = read_text(o.data);
    double start_s = now_s();
    Tokenizer tokenizer = Tokenizer::train_bpe(corpus.text, o.vocab_size);
    make_folder(o.out);
    tokenizer.save(o.out);
    printf("%s: %d tokens from %s bytes in %.1f s\n", o.out.c_str(), tokenizer.vocab_size(),
           with_commas(corpus.text.size()).c_str(), now_s() - start_s);
    return 0;
}

inline int encode_command(const TokenizerOptions& o) {
    require("--tokenizer", !o.tokenizer.empty());
    Tokenizer tokenizer = load_tokenizer(o.tokenizer);
    std::string missing;
    std::vector<int> ids = tokenizer.encode(read_input(o.in), &missing);
    if (!missing.empty())
        fprintf(stderr, "note: characters that the vocabulary lacks are dropped: %s\n",
                one_line(missing).c_str());
    if (!o.out.empty()) {
        write_npy(o.out, ids, {ids.size()});
        return 0;
    }
    for (size_t i = 0; i < ids.size(); i++) printf(i == 0 ? "%d" : " %d", ids[i]);
    printf("\n");
    return 0;
}

// Ids as encode writes them: a .npy file, or numbers with white space between.
inline std::vector<int> parse_ids(const std::string& text, const std::string& path) {
    if (text.starts_with("\x93NUMPY")) {
        if (path.empty()) fail_input("standard input: a .npy file; name it with --in");
        return read_npy(path).values;
    }
    std::vector<int> ids;
    const char* at = text.c_str();
    for (;;) {
        at += strspn(at, " \t\r\n");
        if (at == text.c_str() + text.size()) return ids;
        char* end = nullptr;
        long id = strtol(at, &end, 10);
        bool number = end != at && (*end == '\0' || strchr(" \t\r\n", *end) != nullptr);
        if (!number || id < 0 || id > INT_MAX)
            fail_input("%s: byte %zu: not a token id",
                       path.empty() ? "standard input" : path.c_str(), size_t(at - text.c_str()));
        ids.push_back(int(id));
        at = end;
    }
}

inline int decode_command(const TokenizerOptions& o) {
    require("--tokenizer", !o.tokenizer.empty());
    Tokenizer tokenizer = load_tokenizer(o.tokenizer);
    std::string text = tokenizer.decode(parse_ids(read_input(o.in), o.in));
    if (!o.out.empty()) write_file_atomic(o.out, text);
    else fwrite(text.data(), 1, text.size(), stdout);
    return 0;
}

inline int convert_command(const TokenizerOptions& o) {
    require("--tokenizer", !o.tokenizer.empty());
    require("--out", !o.out.empty());
    Tokenizer tokenizer = load_tokenizer(o.tokenizer);
    make_folder(o.out);
    tokenizer.save(o.out);
    printf("%s: %d tokens\n", o.out.c_str(), tokenizer.vocab_size());
    return 0;
}

inline int shard_command(const ShardOptions& o) {
    require("--data", !o.data.empty());
    require("--out", !o.out.empty());
    Tokenizer tokenizer = load_tokenizer(o.tokenizer);
    TextCorpus corpus = read_text(o.data);
    std::vector<int> ids = encode_documents(corpus, 0, corpus.text.size(), tokenizer);
    size_t val_tokens = size_t(double(ids.size()) * o.val_fraction), end = ids.size() - val_tokens;
    if (end == 0) fail_input("%s: no tokens to train on; give more text", o.data[0].c_str());
    make_folder(o.out);
    auto write_part = [&](const std::string& name, size_t from, size_t to) {
        std::string path = join_path(o.out, name);
        write_shard(path,
                    std::vector<int>(ids.begin() + ptrdiff_t(from), ids.begin() + ptrdiff_t(to)));
        printf("%s: %s tokens\n", path.c_str(), with_commas(to - from).c_str());
    };
    int number = 0;
    for (size_t begin = 0; begin < end; begin += o.shard_tokens)
        write_part(format("train_%06d.bin", number++), begin,
                   std::min<size_t>(end, begin + o.shard_tokens));
    if (val_tokens > 0) write_part("val.bin", end, ids.size());
    return 0;
}

// ==== commands: dump, info =======================================================================

// The batch of IDS.npy: inputs and targets (B,T), ids checked against the vocabulary. An id of -1
// is a target that is ignored; as an input it is read as 0.
struct DumpBatch {
    int B, T;
    std::vector<int> inputs, targets;
    size_t count;  // targets that count
};

inline DumpBatch read_dump_batch(const std::string& path, const GPT2Config& config) {
    NpyArray ids = read_npy(path);
    if (ids.shape.size() != 2 || ids.shape[0] < 1 || ids.shape[1] < 2)
        fail_input("%s: must be of shape (B, T+1), with B and T at least 1", path.c_str());
    size_t B = ids.shape[0], T = ids.shape[1] - 1;
    if (T > size_t(config.context))
        fail_input("%s: %zu tokens and their targets; the model has %d positions", path.c_str(), T,
                   config.context);
    if (B > size_t(INT_MAX) / T)
        fail_input("%s: %zu sequences of %zu tokens are too many", path.c_str(), B, T);
    DumpBatch batch{int(B), int(T), {}, {}, 0};
    for (size_t b = 0; b < B; b++) {
        for (size_t t = 0; t <= T; t++) {
            int id = ids.values[b * (T + 1) + t];
            if (id < kIgnore || id >= config.vocab_size)
                fail_input("%s: id %d at (%zu, %zu); the vocabulary has %d", path.c_str(), id, b, t,
                           config.vocab_size);
            if (t < T) batch.inputs.push_back(std::max(id, 0));
            if (t > 0) batch.targets.push_back(id);
            if (t > 0 && id != kIgnore) batch.count++;
        }
    }
    if (batch.count == 0) fail_input("%s: every target is -1", path.c_str());
    return batch;
}

// Copies a group of tensors, so that later steps do not change them, and adds them to a file as
// PREFIX + the name in transformers' state dict.
inline void keep_tensors(SafetensorsWriter& writer, const GPT2* model, Group group,
                         const std::string& prefix) {
    ParameterTable table = parameter_table(gpt2_config(model));
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        if (!row.present) continue;
        for (int layer = 0; layer < int(row.count); layer++) {
            auto host = std::make_shared<std::vector<real>>();
            read_hf_tensor(*host, model, group, index, layer);
            writer.add(prefix + hf_name(row, layer), kRealDtype, hf_shape(row),
                       [host] { return static_cast<const void*>(host->data()); });
        }
    }
}

// See the design: loss, logits (B,T,V), grad.NAME, and with --steps losses (N) and param.NAME.
// Dropout is off.
inline int dump_command(const DumpOptions& o) {
    require("--model", !o.model.empty());
    require("--tokens", !o.tokens.empty());
    require("--out", !o.out.empty());
    GPT2Shape shape = choose_shape(o.compute);
    std::string folder = resolve_model_folder(o.model);
    GPT2Config config = read_model_config(folder);
    config.dropout = 0;
    DumpBatch batch = read_dump_batch(o.tokens, config);
    shape.B = batch.B, shape.T = batch.T, shape.training = true;
    GPT2Ptr model(gpt2_create(config, shape, 0, 1));
    load_model_noted(model.get(), folder);
    size_t rows = batch.inputs.size();
    std::vector<real> logits(rows * size_t(config.vocab_size));
    std::vector<real> losses;
    AdamW adamw = o.adamw;
    SafetensorsWriter writer(o.out);
    for (size_t step = 0; step < std::max<size_t>(o.steps, 1); step++) {
        GPT2Pass pass;
        pass.training = true, pass.loss_scale = 1 / double(batch.count), pass.step = step;
        pass.logits = step == 0 ? logits.data() : nullptr;
        gpt2_zero_gradients(model.get());
        gpt2_forward(model.get(), batch.inputs.data(), batch.targets.data(), batch.B, batch.T,
                     pass);
        gpt2_backward(model.get());
        losses.push_back(real(gpt2_stats(model.get()).loss));
        if (step == 0) keep_tensors(writer, model.get(), Group::gradients, "grad.");
        adamw.step = step + 1;
        if (o.steps > 0) gpt2_update(model.get(), adamw);
    }
    writer.add("loss", kRealDtype, {}, &losses[0]);
    writer.add("logits", kRealDtype, {size_t(batch.B), size_t(batch.T), size_t(config.vocab_size)},
               logits.data());
    if (o.steps > 0) {
        writer.add("losses", kRealDtype, {losses.size()}, losses.data());
        keep_tensors(writer, model.get(), Group::parameters, "param.");
    }
    writer.commit();
    return 0;
}

inline PathDescription describe_any(const std::string& path) {
    std::error_code ignored;
    if (!fs::is_regular_file(path, ignored) || !is_shard(path)) return describe_path(path);
    try {
        Shard shard(path, INT_MAX);
        int largest = 0;
        for (size_t i = 0; i < shard.size(); i++) largest = std::max(largest, shard[i]);
        return {format("token shard, %zu tokens, largest id %d", shard.size(), largest)};
    } catch (const Error& error) { return {std::string("damaged: ") + error.what(), false}; }
}

// Says what each path is; exit code 2 when one is damaged.
inline int info_command(const std::vector<std::string>& paths) {
    require("PATH", !paths.empty());
    int code = 0;
    for (const std::string& path : paths) {
        PathDescription description = describe_any(path);
        printf("%s: %s\n", path.c_str(), description.text.c_str());
        if (!description.intact) code = kExitInput;
    }
    return code;
}

// ==== the program ================================================================================

// A word as a shell reads it back.
inline std::string shell_quoted(const std::string& word) {
    const char* plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=+,@%";
    if (!word.empty() && word.find_first_not_of(plain) == std::string::npos) return word;
    std::string quoted = "'";
    for (char c : word) quoted += c == '\'' ? "'\\''" : std::string(1, c);
    return quoted + "'";
}

// The command line without --out and --resume, to which the folder of the run will be added.
inline std::string command_to_go_on(int argc, char** argv) {
    std::string line = shell_quoted(argv[0]);
    for (int i = 1; i < argc; i++) {
        std::string word = argv[i];
        if (word == "--out" || word == "--resume") i++;
        else if (!word.starts_with("--out=") && !word.starts_with("--resume="))
            line += " " + shell_quoted(word);
    }
    return line;
}

// The one line that an error is: without control characters, whatever a file or path held.
inline int print_error(const std::string& message, int code) {
    std::string line = message;
    for (char& c : line)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
    fflush(stdout);
    fprintf(stderr, "%s: error: %s\n", gpt2_program(), line.c_str());
    return code;
}

inline int call_command(const CLI::App& app, const Options& o, double start_s, int argc,
                        char** argv) {
    const CLI::App* command = app.get_subcommands().at(0);
    std::string name = command->get_name();
    if (name == "train") return train_command(o.train, start_s, command_to_go_on(argc, argv));
    if (name == "plan") return plan_command(o.plan);
    if (name == "sample") return sample_command(o.sample);
    if (name == "evaluate") return evaluate_command(o.evaluate);
    if (name == "shard") return shard_command(o.shard);
    if (name == "dump") return dump_command(o.dump);
    if (name == "info") return info_command(o.info_paths);
    std::string action = command->get_subcommands().at(0)->get_name();
    if (action == "train") return tokenizer_train_command(o.tokenizer);
    if (action == "encode") return encode_command(o.tokenizer);
    if (action == "decode") return decode_command(o.tokenizer);
    return convert_command(o.tokenizer);
}

inline int parse_and_call(int argc, char** argv, double start_s) {
    Options options;
    CLI::App app("Trains GPT-2 models: text in, a model folder out.", gpt2_program());
    app.formatter(std::make_shared<HelpFormatter>());
    app.require_subcommand(1);
    add_commands(&app, options);
    check_words(&app, std::vector<std::string>(argv + std::min(argc, 1), argv + argc));
    try {
        app.parse(argc, argv);
    } catch (const CLI::CallForHelp&) {
        printf("%s", app.help().c_str());
        return 0;
    } catch (const CLI::ParseError& error) { fail_input("%s", error.what()); }
    return call_command(app, options, start_s, argc, argv);
}

// Whether standard output is a pipe that nobody reads any more, as behind `| head`.
inline bool reader_is_gone() {
    struct pollfd output = {STDOUT_FILENO, POLLOUT, 0};
    return poll(&output, 1, 0) > 0 && (output.revents & POLLERR) != 0;
}

// The whole program. Returns the exit code: 0 done, 1 the machine failed, 2 the input was wrong,
// 130 and 143 stopped by a signal after a clean save. Errors are one line on stderr.
inline int run(int argc, char** argv) {
    double start_s = now_s();
    signal(SIGPIPE, SIG_IGN);  // a reader that goes away is seen when writing
    signal(SIGXFSZ, SIG_IGN);  // and so is a limit on the size of files
    int code = 0;
    try {
        code = parse_and_call(argc, argv, start_s);
    } catch (const Error& error) {
        return print_error(error.what(), error.exit_code);
    } catch (const std::bad_alloc&) {
        return print_error("out of memory; a smaller model or batch needs less", kExitMachine);
    } catch (const std::exception& error) { return print_error(error.what(), kExitMachine); }
    bool lost = fflush(stdout) != 0 || ferror(stdout);
    if (lost && code == 0 && !reader_is_gone())
        return print_error("standard output: cannot write; is the disk full?", kExitMachine);
    return code;
}
