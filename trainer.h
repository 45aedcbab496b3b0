// The run: everything between a command's options and the model.
//
// A run turns its options into data, a configuration and a model, and works on them through gpt2.h
// alone, so that the same file serves both twins. The order is that of a run: schedules, memory,
// model, data; what a step shows and leaves behind; the training loop.
#pragma once

#include <omp.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/statfs.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <csignal>
#include <future>
#include <mutex>
#include <numeric>
#include <optional>
#include <span>
#include <thread>

#include "checkpoint.h"
#include "convert.h"
#include "corpus.h"
#include "dataloader.h"
#include "gpt2.h"
#include "ranks.h"
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
    double dropout = -1;  // below 0: choose_dropout() decides

    bool is_default() const {
        return model.empty() && layers == 0 && heads == 0 && channels == 0 && context == 0;
    }
};

// How the processes of a job start and meet.
struct RankOptions {
    int gpus = 0;  // processes to start on this machine; 0: only this one, or a launcher's
    std::string rendezvous;
    double timeout_s = 60;  // until a rank without progress is taken for lost
};

// The model of `train` when --model is not given: what trained best on 1 MB of text in two minutes.
inline GPT2Config default_config() {
    GPT2Config config;
    config.layers = 2, config.heads = 4, config.channels = 256, config.context = 64;
    return config;
}

struct TrainOptions {
    std::vector<std::string> data, val;
    std::string windows = "shuffled";
    int stride = 0;  // tokens between sliding windows; 0: the sequence length
    bool separate_documents = false;
    std::string tokenizer = "auto", raw_tokens = "no", jsonl_field = kJsonlField;
    ModelOptions model;

    int batch_size = 16;            // sequences a rank
    int sequence_length = 0;        // tokens; 0: the context
    size_t total_batch_tokens = 0;  // of a step, over micro-batches and ranks; 0: one micro-batch
    size_t steps = 0;               // 0: not limited by steps
    double epochs = 0;              // 0: not limited by epochs
    double time_limit_s = 0;        // 0: not limited by time

    double learning_rate = 2e-3;
    std::string schedule = "linear";
    int64_t warmup = -1;  // steps; below 0: the first tenth of the run
    double final_lr_fraction = 0;
    double weight_decay = 0.1, beta1 = 0.9, beta2 = 0.99, epsilon = 1e-8, grad_clip = 1;
    uint64_t seed = 42;
    ComputeOptions compute;
    std::string recompute = "auto";

    size_t eval_every = 250;    // steps; 0: only at the end
    size_t eval_batches = 20;   // of an evaluation on the way; 0: all
    size_t sample_every = 500;  // steps; 0: never
    size_t save_every = 1000;   // steps; 0: only at the end and when the run is stopped
    int keep = 2;               // checkpoints, beside the best; 0: all
    uint64_t keep_every = 0;    // steps; their multiples stay as well
    std::string background_save = "auto";
    double save_retry_s = 30;    // after a save that failed
    size_t max_bad_steps = 3;    // in a row, before the run ends; 0: no limit
    double spike_threshold = 6;  // deviations of the loss above its mean; 0: none is a spike
    std::string on_spike = "report";
    size_t early_stop = 0;  // evaluations without gain; 0: never
    bool overfit_one_batch = false;
    std::string out, resume = "auto", repeat;
    RankOptions ranks;
    size_t log_every = 100;  // steps, of the times of every rank; 0: never
    int zero = 0;            // what each rank holds but a part of: see GPT2Shape
    std::string reduce = "fp32";
    std::string program = gpt2_program();  // as it was called, for a shell
    std::vector<std::string> arguments;    // as they were typed, for the log
    FILE* screen = stdout;                 // where progress is shown
    PeakRate peak;                         // of this machine; 0: to be asked for
};

constexpr double kMostDropout = 0.99;
constexpr double kMaxSteps = 1e12, kMaxSeed = 9007199254740992;  // what a double counts exactly

// The part of a shape that says how to compute, as the options ask for it; fail_input where this
// program cannot.
inline GPT2Shape choose_shape(const ComputeOptions& o) {
    GPT2Shape shape;
    shape.dtype = gpt2_dtype(o.dtype);
    shape.tf32 = o.tf32 == "on";
    shape.deterministic = o.deterministic != "off";
    shape.threads = o.threads > 0 ? o.threads : machine_threads();
    return shape;
}

// The same for a model that does not train, by --weights: fp32 and bf16 are --dtype by another
// name, and int8 stands beside any.
inline GPT2Shape choose_shape(ComputeOptions o, const std::string& weights) {
    bool int8 = weights == "int8";
    if (!weights.empty() && !int8) {
        if (o.dtype != "auto" && o.dtype != weights)
            fail_input("--weights %s --dtype %s: one says what the other does; give one of them",
                       weights.c_str(), o.dtype.c_str());
        o.dtype = weights;
    }
    GPT2Shape shape = choose_shape(o);
    shape.int8 = int8;
    return shape;
}

inline const char* dtype_name(Dtype dtype) { return dtype == Dtype::bf16 ? "bf16" : "fp32"; }

// What the weights of products are stored in.
inline const char* weights_name(const GPT2Shape& shape) {
    return shape.int8 ? "int8" : dtype_name(shape.dtype);
}

// ==== schedules ==================================================================================

// When a run ends. A limit of 0 is none; with steps the schedule follows them, otherwise the clock.
struct Goal {
    size_t steps = 0;
    double time_limit_s = 0;
};

// Part of the run that lies behind, 0 to 1, when `step` updates are done and `elapsed_s` of the
// limit are used, of which the first `begun_s` went before the training did, and the last
// `reserve_s` are for the final evaluation and save.
inline double run_progress(const Goal& goal, size_t step, double elapsed_s, double reserve_s,
                           double begun_s) {
    if (goal.steps > 0) return std::min(1.0, double(step) / double(goal.steps));
    double end_s = goal.time_limit_s - reserve_s;
    if (elapsed_s >= end_s) return 1;
    return std::clamp((elapsed_s - begun_s) / (end_s - begun_s), 0.0, 1.0);
}

// The rate of the update that follows `step` updates. It rises linearly over the warm-up, then
// falls from the highest rate to final_lr_fraction of it with `progress`, where it is held:
//   cosine  fraction + (1 - fraction) (1 + cos(pi t)) / 2
//                                              [Loshchilov & Hutter 2016, arXiv:1608.03983]
//   linear  1 - (1 - fraction) t               [to 0: Bergsma et al. 2025, arXiv:2502.15938]
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
    for (const MemoryRow& row : gpt2_host_memory(config, shape)) rows.push_back(row);
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
    std::string folder;        // or the file of llm.c's; "" where weights are drawn anew
    bool fixed_vocab = false;  // the configuration came from a file, with its vocabulary
};

inline void override_size(const char* option, int given, int* size, const std::string& folder) {
    if (given == 0 || given == *size) return;
    if (!folder.empty())
        fail_input("%s %d: the model in %s has %d; leave the option out", option, given,
                   folder.c_str(), *size);
    *size = given;
}

// Whether a folder holds a model, or checkpoints of one.
inline bool holds_model(const std::string& folder) {
    return path_exists(join_path(folder, "config.json")) || !list_steps(folder, "").empty();
}

// --model and what overrides it. A folder's weights fix its sizes: fail_input where they differ.
inline ModelChoice choose_model(const ModelOptions& o) {
    ModelChoice choice{default_config(), "", false};
    bool named = named_config(o.model, &choice.config);
    // A folder gpt2/ may hold no more than GPT-2's vocabulary: see find_gpt2_tokenizer.
    if (is_folder(o.model) ? !named || holds_model(o.model) : o.model.ends_with(".bin")) {
        choice.folder = resolve_model(o.model);
        choice.config = read_any_config(choice.folder);
        choice.fixed_vocab = true;
    } else if (o.model.ends_with(".json")) {
        choice.config = read_config(o.model);
        choice.fixed_vocab = true;
    } else if (!o.model.empty() && !named) {
        fail_input(
            "--model %s: no such folder, and none of tiny, small, medium, gpt2, gpt2-medium, "
            "gpt2-large, gpt2-xl, dN, a config.json, or a FILE.bin of llm.c",
            o.model.c_str());
    }
    override_size("--layers", o.layers, &choice.config.layers, choice.folder);
    override_size("--heads", o.heads, &choice.config.heads, choice.folder);
    override_size("--channels", o.channels, &choice.config.channels, choice.folder);
    override_size("--context", o.context, &choice.config.context, choice.folder);
    choice.config.dropout = std::max(0.0, o.dropout);
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
    std::vector<int> token_bytes;  // bytes of text by the tokenizer's ids; empty without one
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

// GPT-2's own vocabulary, which this program does not contain: where it is put; "" where it is not.
inline std::string find_gpt2_tokenizer() {
    for (const char* folder : {"gpt2", "dev/data/gpt2"})
        for (const char* name : {"tokenizer.json", "vocab.bpe", "merges.txt"}) {
            std::string path = join_path(folder, name);
            if (path_exists(path)) return path;
        }
    return "";
}

inline Tokenizer load_gpt2_tokenizer() {
    std::string path = find_gpt2_tokenizer();
    if (!path.empty()) return Tokenizer::load(path);
    fail_input(
        "--tokenizer gpt2: put GPT-2's vocab.bpe or tokenizer.json into the folder gpt2/ or "
        "dev/data/gpt2/, or give its path");
}

// A tokenizer that needs no text to be made: a named one, a file's, or that of a folder's model or
// run.
inline Tokenizer load_tokenizer(const std::string& name) {
    if (name == "gpt2") return load_gpt2_tokenizer();
    if (name == "bytes") return Tokenizer::bytes();
    if (name == "chars" || name == "words" || name == "words:unk" || name == "auto" ||
        name.starts_with("bpe:"))
        fail_input("--tokenizer %s: is made from training text; give gpt2, bytes or a file here",
                   name.c_str());
    std::string last = join_path(name, "last");
    return Tokenizer::load(!holds_tokenizer(name) && holds_tokenizer(last) ? last : name);
}

// Trains a BPE on text, or takes the one of the same text and size that CACHE_FOLDER keeps. One
// there that is damaged is made anew. Of `ends`, of documents, those within the text count.
inline Tokenizer train_bpe_cached(std::string_view text, int vocab_size,
                                  const std::string& cache_folder,
                                  std::span<const size_t> ends = {}) {
    BpeTraining training;
    auto last = std::lower_bound(ends.begin(), ends.end(), text.size());
    training.document_ends = ends.first(size_t(last - ends.begin()));
    uint64_t key = hash_bytes(text.data(), text.size());
    if (!training.document_ends.empty())
        key = hash_bytes(training.document_ends.data(), training.document_ends.size_bytes(), key);
    std::string hash = hash_text(key);
    fs::path folder = fs::path(cache_folder) / format("bpe-%d-%s", vocab_size, hash.c_str());
    std::error_code ignored;
    if (fs::exists(folder / "tokenizer.json", ignored)) {
        try {
            return Tokenizer::load(folder.string());
        } catch (const Error&) { fs::remove_all(folder, ignored); }
    }
    Tokenizer tokenizer = Tokenizer::train_bpe(text, vocab_size, training);
    make_folder(folder.string());
    remove_leftovers(folder.string());
    tokenizer.save(folder.string());
    return tokenizer;
}

// The tokenizer that --tokenizer names, learned from the training text where it is learned. Its
// documents end at `ends`, of which some may lie behind the text.
inline Tokenizer make_tokenizer(const std::string& name, std::string_view text,
                                std::span<const size_t> ends, const std::string& cache_folder) {
    if (name == "chars") return Tokenizer::chars(text);
    if (name == "words" || name == "words:unk")
        return Tokenizer::words(text, name != "words", ends);
    if (name == "auto")
        return train_bpe_cached(text, default_vocab_size(text.size()), cache_folder, ends);
    if (!name.starts_with("bpe:")) return load_tokenizer(name);
    std::string digits = name.substr(4);
    bool number = !digits.empty() && digits.size() < 7 &&
                  digits.find_first_not_of("0123456789") == std::string::npos;
    int size = number ? std::stoi(digits) : 0;
    if (size < 257 || size > 65536)
        fail_input("--tokenizer %s: the size must be a whole number from 257 to 65536",
                   name.c_str());
    return train_bpe_cached(text, size, cache_folder, ends);
}

// The tokenizer of a model on disk: its folder's own or, where a model of 50257 tokens has none
// (a file of llm.c's never has), GPT-2's where that is found.
inline std::optional<Tokenizer> tokenizer_of(const std::string& path, const GPT2Config& config) {
    if (holds_tokenizer(path)) return Tokenizer::load(path);
    std::string gpt2 = path.empty() || config.vocab_size != 50257 ? "" : find_gpt2_tokenizer();
    if (gpt2.empty()) return {};
    return Tokenizer::load(gpt2);
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

// Text: the tokenizer is learned from the training part alone, but for words without one for those
// that are unknown. Words are not cut.
inline TrainingData read_text_data(const TrainOptions& o, const ModelChoice& model,
                                   const std::string& cache_folder) {
    TextCorpus corpus = read_text(o.data, o.jsonl_field);
    size_t size = corpus.text.size(), begin = o.val.empty() ? validation_start(corpus.text) : size;
    if (begin == 0)
        fail_input("%s: %zu bytes are too few to train on; give more text", o.data[0].c_str(),
                   size);
    size_t whole = begin;  // where no word is cut
    const std::vector<size_t>& ends = corpus.document_ends;
    while (!std::binary_search(ends.begin(), ends.end(), whole) && corpus.text[whole] != ' ' &&
           corpus.text[whole] != '\n')
        whole++;
    TrainingData data;
    size_t learned = o.tokenizer == "words" ? size : o.tokenizer == "words:unk" ? whole : begin;
    std::string_view text = std::string_view(corpus.text).substr(0, learned);
    if (o.tokenizer == "auto") data.tokenizer = tokenizer_of(model.folder, model.config);
    if (!data.tokenizer && o.tokenizer == "auto" && !model.folder.empty())
        fail_input("%s: has no tokenizer; name the one it was trained with, with --tokenizer",
                   model.folder.c_str());
    if (!data.tokenizer) data.tokenizer = make_tokenizer(o.tokenizer, text, ends, cache_folder);
    if (data.tokenizer->kind() == Tokenizer::Kind::words) begin = whole;
    data.token_bytes = bytes_per_token(*data.tokenizer);
    data.train.push_back(text_shard(corpus, 0, begin, *data.tokenizer, cache_folder));
    data.train_bytes = begin;
    if (o.val.empty()) {
        data.val_bytes = size - begin;
        if (data.val_bytes > 0)
            data.val.push_back(text_shard(corpus, begin, size, *data.tokenizer, cache_folder));
        return data;
    }
    TextCorpus val = read_text(o.val, o.jsonl_field);
    data.val_bytes = val.text.size();
    data.val.push_back(text_shard(val, 0, val.text.size(), *data.tokenizer, cache_folder));
    return data;
}

// Of the folders among `paths` those that `shard` made with a validation part.
inline std::vector<std::string> manifest_val(const std::vector<std::string>& paths) {
    std::vector<std::string> folders;
    for (const std::string& path : paths) {
        json root = json::parse(path_exists(join_path(path, "manifest.json"))
                                    ? read_file(join_path(path, "manifest.json"))
                                    : "",
                                nullptr, false);
        if (root.is_object() && root.value("val_tokens", json(0)) != 0) folders.push_back(path);
    }
    return folders;
}

// Shards that `shard` made with another tokenizer than this would train a model on nonsense.
inline void check_manifest_tokenizer(const std::vector<std::string>& paths,
                                     const Tokenizer& tokenizer) {
    for (const std::string& path : paths) {
        std::string manifest = (fs::path(path).parent_path() / "manifest.json").string();
        if (!path_exists(manifest)) continue;
        json root = json::parse(read_file(manifest), nullptr, false);
        if (!root.is_object() || root.value("format", json()) != "llm.c token shards") continue;
        json facts = root.value("tokenizer", json::object());
        if (facts.is_object() && facts.value("hash", json()) != hash_text(tokenizer.fingerprint()))
            fail_input("%s: made with another tokenizer, %s; give it with --tokenizer",
                       path.c_str(), facts.value("name", json("unknown")).dump().c_str());
    }
}

// Shards: where no validation data is given, that of the folders that `shard` made, or else the
// last tenth of all tokens, in their order.
inline TrainingData read_shard_data(const TrainOptions& o, const ModelChoice& model,
                                    const std::vector<std::string>& paths) {
    TrainingData data;
    if (o.tokenizer != "auto") data.tokenizer = load_tokenizer(o.tokenizer);
    else data.tokenizer = tokenizer_of(model.folder, model.config);
    std::string folder = fs::path(paths[0]).parent_path().string();
    bool ask = !data.tokenizer && model.folder.empty();  // the data for it
    if (ask && path_exists(join_path(folder, "manifest.json")) && holds_tokenizer(folder))
        data.tokenizer = Tokenizer::load(folder);
    else if (ask && o.raw_tokens == "no") data.tokenizer = tokenizer_beside(paths[0]);
    if (data.tokenizer) data.token_bytes = bytes_per_token(*data.tokenizer);
    if (data.tokenizer) check_manifest_tokenizer(paths, *data.tokenizer);
    int vocab_size = model.config.vocab_size;
    if (!model.fixed_vocab && data.tokenizer) vocab_size = data.tokenizer->vocab_size();
    RawTokens raw = raw_tokens(o.raw_tokens);
    for (const std::string& path : paths) data.train.emplace_back(path, vocab_size, raw);
    std::vector<std::string> val = o.val.empty() ? manifest_val(o.data) : o.val;
    if (!val.empty()) val = expand_paths(val, ShardPart::val);
    if (data.tokenizer) check_manifest_tokenizer(val, *data.tokenizer);
    for (const std::string& path : val) {
        if (!is_shard(path))
            fail_input("%s: text among token shards; give shards for --val too", path.c_str());
        data.val.emplace_back(path, vocab_size, raw);
    }
    if (!val.empty()) return data;
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
    const char* name = "";
    switch (tokenizer->kind()) {
        case Tokenizer::Kind::bpe:
            name = "BPE";
            break;
        case Tokenizer::Kind::bytes:
            name = "bytes";
            break;
        case Tokenizer::Kind::chars:
            name = "characters";
            break;
        case Tokenizer::Kind::words:
            name = "words";
            break;
    }
    return format("%s, %s tokens", name, with_commas(size_t(tokenizer->vocab_size())).c_str());
}

// Whether files are token shards, or text; fail_input where some are the one and some the other.
inline bool are_shards(const std::vector<std::string>& paths) {
    bool shards = !paths.empty() && is_shard(paths[0]);
    for (const std::string& path : paths)
        if (is_shard(path) != shards)
            fail_input("%s: %s; give text or token shards, not both", path.c_str(),
                       shards ? "text among token shards" : "a token shard among text");
    return shards;
}

// --data and --val, whatever they are, as shards; fail_input says what is wrong with them.
inline TrainingData read_data(const TrainOptions& o, const ModelChoice& model,
                              const std::string& cache_folder) {
    std::vector<std::string> paths = expand_paths(o.data);
    bool shards = are_shards(paths);
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

// The id that stands between documents; fail_input where there is none.
inline int document_separator(const std::optional<Tokenizer>& tokenizer) {
    if (!tokenizer)
        fail_input(
            "--separate-documents: which id stands between documents is not known; name the "
            "tokenizer of the shards with --tokenizer");
    if (tokenizer->end_of_text() < 0)
        fail_input("--separate-documents: this vocabulary has no <|endoftext|>");
    return tokenizer->end_of_text();
}

// --windows, --stride and --separate-documents. Shards that were made from text are the program's
// own: the files of the cache may come and go.
inline WindowOptions window_options(const TrainOptions& o, const TrainingData& data) {
    WindowOptions options;
    if (o.windows == "sliding") options.order = WindowOrder::sliding;
    if (o.windows == "random") options.order = WindowOrder::random;
    options.stride = size_t(o.stride);
    if (o.separate_documents) options.separator = document_separator(data.tokenizer);
    options.watch = data.train_bytes == 0;
    return options;
}

// ==== evaluation =================================================================================

struct Evaluation {
    double loss = 0;           // nats a token
    double bits_per_byte = 0;  // NaN where the bytes behind the tokens are not known
    size_t tokens = 0, windows = 0;
    double seconds = 0;

    double perplexity() const { return std::exp(loss); }
};

// How long a rank waits for what another does that may take long: to read or save a large model, to
// tokenize a corpus. One that dies or hangs meanwhile is noticed all the same.
constexpr double kPatience_s = 86400;

// A number of each rank's, summed in the order of ranks, so that all have the same sum. `name` says
// in messages what it is.
inline double sum_over_ranks(RankLink& link, const std::string& name, double value) {
    if (link.ranks().world == 1) return value;
    std::string bytes(sizeof value, 0);
    memcpy(bytes.data(), &value, sizeof value);
    double sum = 0;
    for (const std::string& part : link.gather(name, bytes, kPatience_s)) {
        double theirs = 0;
        if (part.size() == sizeof theirs) memcpy(&theirs, part.data(), sizeof theirs);
        sum += theirs;
    }
    memcpy(bytes.data(), &sum, sizeof sum);
    bytes = link.broadcast(name, bytes, kPatience_s);
    if (bytes.size() == sizeof sum) memcpy(&sum, bytes.data(), sizeof sum);
    return sum;
}

// The mean loss over `max_windows` windows spread over the shards, or over all of them (0), in
// batches of B sequences of T tokens, which the ranks of a job share. bits_per_byte = loss * tokens
// / (ln 2 * bytes of text); ids of the model's that `token_bytes` lacks stand for no text. What
// follows a `separator` (below 0: none) is not predicted.
inline Evaluation evaluate_model(GPT2* model, const std::vector<Shard>& shards,
                                 const std::vector<int>& token_bytes, int B, int T,
                                 size_t max_windows, int separator = -1, RankLink* link = nullptr) {
    size_t rank = link == nullptr ? 0 : size_t(link->ranks().rank);
    size_t world = link == nullptr ? 1 : size_t(link->ranks().world);
    double start_s = now_s();
    EvalLoader loader(shards, B, T, max_windows, separator);
    std::vector<int> inputs(size_t(B) * size_t(T)), targets(inputs.size());
    Evaluation result;
    result.windows = loader.windows();
    size_t bytes = 0;
    gpt2_zero_gradients(model);  // and the sum of losses
    int rows = 0;
    std::exception_ptr lost;  // thrown when the other ranks, who wait for the sum, have it
    try {
        for (size_t batch = 0; loader.next_batch(inputs.data(), targets.data(), &rows); batch++) {
            if (link != nullptr) link->at_work();
            if (batch % world == rank)
                gpt2_forward(model, inputs.data(), targets.data(), rows, T, GPT2Pass{});
            for (int target : targets) {
                if (target == kIgnore) continue;
                result.tokens++;
                bool known = size_t(target) < token_bytes.size();
                if (known) bytes += size_t(token_bytes[size_t(target)]);
            }
        }
        if (result.tokens == 0)
            fail_input("%s: nothing but ends of documents, whose targets are left out",
                       shards[0].path().c_str());
    } catch (const Error&) { lost = std::current_exception(); }
    double nats = gpt2_stats(model).loss;
    if (link != nullptr) {
        nats = sum_over_ranks(*link, "the validation loss", nats);
        link->rest();
    }
    if (lost) std::rethrow_exception(lost);
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

// A sample that is being made: its number, the tokens that the model sees, and the bytes of a
// character that is not complete.
struct GrowingSample {
    size_t number;
    std::vector<int> tokens;
    std::string held = {};
};

// The logits (samples,V) of each sample's next token. All have as many tokens, of which the cache
// holds `cached`. What is in no cache yet is the prompt of all: computed once.
inline void next_logits(GPT2* model, const std::vector<GrowingSample>& samples, size_t cached,
                        bool prompt, std::vector<real>& logits) {
    size_t V = size_t(gpt2_config(model).vocab_size), size = samples[0].tokens.size();
    if (prompt) {
        gpt2_generate(model, samples[0].tokens.data(), 1, int(size), 0, logits.data());
        for (size_t i = 1; i < samples.size(); i++) {
            gpt2_copy_cache(model, 0, int(i), int(size));
            std::copy_n(logits.begin(), V, logits.begin() + ptrdiff_t(i * V));
        }
        return;
    }
    std::vector<int> tokens;
    for (const GrowingSample& sample : samples)
        tokens.insert(tokens.end(), sample.tokens.begin() + ptrdiff_t(cached), sample.tokens.end());
    gpt2_generate(model, tokens.data(), int(samples.size()), int(size - cached), int(cached),
                  logits.data());
}

// The next token of each sample, by its own sampler from its logits (samples,V): a vocabulary's
// worth of exponentials each, which threads share by samples. Fails as the first that does.
inline std::vector<int> draw_tokens(const std::vector<GrowingSample>& samples,
                                    std::span<Sampler> samplers, const std::vector<real>& logits,
                                    int choices) {
    size_t V = logits.size() / samplers.size();
    std::vector<int> tokens(samples.size());
    std::vector<std::exception_ptr> errors(samples.size());
#pragma omp parallel for schedule(static)
    for (size_t row = 0; row < samples.size(); row++) {
        try {
            tokens[row] = samplers[samples[row].number].sample(&logits[row * V], choices).token;
        } catch (...) { errors[row] = std::current_exception(); }  // none may leave the loop
    }
    for (const std::exception_ptr& error : errors)
        if (error) std::rethrow_exception(error);
    return tokens;
}

// Continues `prompt` (1 to context tokens) by up to max_new_tokens, once for each sampler, all of
// them together, as many as the model generates at most: a token of each is one pass of the
// network. emit(number, bytes, last) gets whole UTF-8 characters of a sample as they come, if only
// none at its end; a sample ends early at the end of text, and all when emit returns false. When
// the context is full, generation goes on from its last half, which is computed anew. In the CPU
// program a sample is the same whichever others are made with it, up to kFewRows.
template <typename Emit>
void generate_texts(GPT2* model, const Tokenizer& tokenizer, const std::vector<int>& prompt,
                    size_t max_new_tokens, std::span<Sampler> samplers, Emit emit) {
    const GPT2Config& config = gpt2_config(model);
    size_t context = size_t(config.context), V = size_t(config.vocab_size);
    int choices = std::min(config.vocab_size, tokenizer.vocab_size());
    std::vector<GrowingSample> samples;  // the row of each in the cache is its place here
    for (size_t i = 0; i < samplers.size(); i++) samples.push_back({i, prompt});
    std::vector<real> logits(samples.size() * V);
    size_t cached = 0;
    for (size_t made = 0; made < max_new_tokens && !samples.empty(); made++) {
        bool full = samples[0].tokens.size() > context;
        for (GrowingSample& sample : samples)
            if (full)
                sample.tokens.erase(
                    sample.tokens.begin(),
                    sample.tokens.end() - ptrdiff_t(std::max<size_t>(1, context / 2)));
        next_logits(model, samples, full ? 0 : cached, made == 0, logits);
        cached = samples[0].tokens.size();
        std::vector<int> tokens = draw_tokens(samples, samplers, logits, choices);
        for (size_t row = samples.size(); row-- > 0;) {
            GrowingSample& sample = samples[row];
            int token = tokens[row];
            bool ends = token == tokenizer.end_of_text(), last = ends || made + 1 == max_new_tokens;
            sample.tokens.push_back(token);
            if (!ends) sample.held += tokenizer.decode_next(token, false);
            size_t ready = sample.held.size() - (last ? 0 : unfinished_bytes(sample.held));
            if ((ready > 0 || last) &&
                !emit(sample.number, std::string_view(sample.held).substr(0, ready), last))
                return;
            sample.held.erase(0, ready);
            if (!last) continue;
            if (row + 1 < samples.size()) {  // the last one, which has its token, takes its place
                gpt2_copy_cache(model, int(samples.size()) - 1, int(row), int(cached));
                sample = std::move(samples.back());
            }
            samples.pop_back();
        }
    }
}

// The same for one sample: emit(bytes).
template <typename Emit>
void generate_text(GPT2* model, const Tokenizer& tokenizer, const std::vector<int>& prompt,
                   size_t max_new_tokens, Sampler& sampler, Emit emit) {
    generate_texts(
        model, tokenizer, prompt, max_new_tokens, std::span(&sampler, 1),
        [&](size_t, std::string_view bytes, bool) { return bytes.empty() || emit(bytes); });
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

// While it lives, the first signal that asks a program to end is noted in stop_signal(): from a
// terminal, from a person, from a terminal that goes away, and from schedulers that warn of a limit
// (SIGUSR1 and SIGUSR2 as Slurm's --signal sends them, SIGXCPU from others). One event may send
// several: a terminal that goes away two hang-ups, systemd SIGTERM and SIGHUP. So what comes within
// a second of the first is taken for a part of it, and later ones end the program at once where a
// person may have sent them: SIGINT and SIGTERM. A hang-up that nohup ignores stays ignored. The
// handler has a stack of its own: kernels that oneDNN makes at run time may use the stack pointer
// as they like, and what the system puts there for a handler then falls on the heap. A signal to
// the process goes to the main thread, whose stack this is.
class StopOnSignal {
  public:
    // `says`: whether this process says what a second signal does; of a job's, one is enough.
    explicit StopOnSignal(bool says = true) : stack_(kStackBytes) {
        StopOnSignal::says() = says;
        stack_t stack = {};
        stack.ss_sp = stack_.data(), stack.ss_size = stack_.size();
        sigaltstack(&stack, &outer_stack_);
        struct sigaction action = {};
        action.sa_handler = note;
        action.sa_flags = SA_RESTART | SA_ONSTACK;
        sigfillset(&action.sa_mask);
        for (size_t i = 0; i < std::size(kStopSignals); i++) {
            sigaction(kStopSignals[i], &action, &before_[i]);
            if (kStopSignals[i] == SIGHUP && before_[i].sa_handler == SIG_IGN)
                signal(SIGHUP, SIG_IGN);
        }
    }
    StopOnSignal(const StopOnSignal&) = delete;
    StopOnSignal& operator=(const StopOnSignal&) = delete;
    ~StopOnSignal() {
        for (size_t i = 0; i < std::size(kStopSignals); i++)
            sigaction(kStopSignals[i], &before_[i], nullptr);
        sigaltstack(&outer_stack_, nullptr);
    }

  private:
    static bool& says() {
        static bool value = true;
        return value;
    }

    // Only what POSIX allows in a handler.
    static void note(int signal) {
        constexpr time_t kTogether_s = 1;
        static struct timespec first;
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (stop_signal() == 0) {
            first = now;
            stop_signal() = signal;
            return;
        }
        time_t since_s = now.tv_sec - first.tv_sec - (now.tv_nsec < first.tv_nsec ? 1 : 0);
        if ((signal != SIGINT && signal != SIGTERM) || since_s < kTogether_s) return;
        const char* words[] = {gpt2_program(),
                               ": warning: a second signal ends the program: steps after the last "
                               "checkpoint are not saved, the checkpoints stay\n"};
        for (const char* word : words)
            if (says() && write(STDERR_FILENO, word, strlen(word)) < 0) break;
        _exit(128 + signal);
    }

    static constexpr size_t kStackBytes =
        1 << 16;  // several times what AVX-512 and AMX registers take
    std::vector<char> stack_;
    stack_t outer_stack_;
    struct sigaction before_[std::size(kStopSignals)];
};

// ==== the run folder: state ======================================================================

// By which a spike of the training loss is told from noise: its mean over about the last 20 steps,
// which follows a falling loss, and how far single steps lay from that over about the last 50.
struct LossTrend {
    double mean = 0, variance = 0;
    size_t steps = 0;

    // How many deviations `loss` lies above the mean; 0 while too little is known.
    double deviations(double loss) const {
        constexpr size_t kEnough = 50;
        if (steps < kEnough || !(variance > 0)) return 0;
        return (loss - mean) / std::sqrt(variance);
    }
    void add(double loss) {
        constexpr double kMeanSteps = 20, kVarianceSteps = 50;
        double count = double(++steps), delta = loss - mean;
        if (steps > 1) variance += (delta * delta - variance) / std::min(kVarianceSteps, count - 1);
        mean += delta / std::min(kMeanSteps, count);
    }
};

// How often a run goes back to before a spike.
constexpr size_t kMostRollbacks = 10;

// Where a run stands. Random numbers are counted from seed and step, so there is no other state of
// a generator to keep.
struct RunState {
    size_t step = 0, tokens = 0;
    DataLoader::Position position;
    double elapsed_s = 0;             // of all its parts
    double best_loss = INFINITY;      // of the evaluations on the way
    size_t best_step = 0, stale = 0;  // evaluations since the best
    size_t evaluated_step = 0;        // the last one whose evaluation is in these
    double begun_s = 0;               // where a schedule by the clock begins, as elapsed_s counts
    ordered_json owed;  // the record that an evaluation is yet to be made for; null: none is
    bool finished = false;
    std::string dtype = "fp32";  // of the steps since the run was last started
    Goal goal;
    size_t bad_steps = 0;  // in a row, up to this step
    LossTrend trend;
    std::vector<DataLoader::Position> skipped;  // where steps began whose data is passed over
    size_t rollbacks = 0;
};

inline ordered_json to_json(const DataLoader::Position& position) {
    return {{"epoch", position.epoch}, {"window", position.window}};
}

// A whole number of at least 0; of any other kind of value, a json::type_error. (get<size_t>()
// converts: of 1e308, to whatever the processor makes of it.)
inline uint64_t count_of(const json& value) {
    return value.get_ref<const json::number_unsigned_t&>();
}

inline DataLoader::Position read_position(const json& value) {
    return {count_of(value.at("epoch")), count_of(value.at("window"))};
}

// The content of trainer.json; save_checkpoint adds step, files and checksum. `identity` must be
// the same for the run to go on, `settings` may change.
inline ordered_json to_json(const RunState& state, const ordered_json& identity,
                            const ordered_json& settings, uint64_t seed) {
    ordered_json root;
    root["format"] = 1;
    root["tokens"] = state.tokens;
    root["loader"] = to_json(state.position);
    root["random"] = {{"seed", seed}, {"step", state.step}};
    root["elapsed_s"] = state.elapsed_s;
    root["best_val_loss"] = nullptr;
    if (std::isfinite(state.best_loss)) root["best_val_loss"] = state.best_loss;
    root["best_step"] = state.best_step;
    root["evaluations_without_gain"] = state.stale;
    root["evaluated_step"] = state.evaluated_step;
    root["begun_s"] = state.begun_s;
    root["owed_evaluation"] = state.owed;
    root["finished"] = state.finished;
    root["dtype"] = state.dtype;
    root["goal"] = {{"steps", state.goal.steps}, {"time_limit_s", state.goal.time_limit_s}};
    root["bad_steps_in_a_row"] = state.bad_steps;
    root["loss_trend"] = {{"mean", state.trend.mean},
                          {"variance", state.trend.variance},
                          {"steps", state.trend.steps}};
    root["skipped_data"] = ordered_json::array();
    for (const DataLoader::Position& position : state.skipped)
        root["skipped_data"].push_back(to_json(position));
    root["rollbacks"] = state.rollbacks;
    root["run"] = identity;
    root["settings"] = settings;
    return root;
}

// The parts of trainer.json that came later than its format: a file without them is an older one.
inline void read_later_state(const json& root, RunState* state) {
    state->dtype = root.value("dtype", state->dtype);
    if (root.contains("evaluated_step")) state->evaluated_step = count_of(root["evaluated_step"]);
    state->begun_s = root.value("begun_s", 0.0);
    json owed = root.value("owed_evaluation", json());
    if (owed.is_object()) state->owed = ordered_json::parse(owed.dump());
    if (root.contains("bad_steps_in_a_row"))
        state->bad_steps = count_of(root["bad_steps_in_a_row"]);
    if (root.contains("loss_trend")) {
        const json& trend = root["loss_trend"];
        state->trend = {trend.at("mean").get<double>(), trend.at("variance").get<double>(),
                        count_of(trend.at("steps"))};
    }
    for (const json& position : root.value("skipped_data", json::array()))
        state->skipped.push_back(read_position(position));
    state->rollbacks = state->skipped.size();  // one each
    if (root.contains("rollbacks")) state->rollbacks = count_of(root["rollbacks"]);
}

// Reads it back; `path` names it in errors.
inline RunState read_state(const json& root, const std::string& path) {
    RunState state;
    try {
        if (root.at("format") != 1)
            fail_input("%s: format %s; this program reads 1", path.c_str(),
                       one_line(root.at("format").dump()).c_str());
        state.step = count_of(root.at("step"));
        state.tokens = count_of(root.at("tokens"));
        state.position = read_position(root.at("loader"));
        state.elapsed_s = root.at("elapsed_s").get<double>();
        if (!root.at("best_val_loss").is_null())
            state.best_loss = root.at("best_val_loss").get<double>();
        state.best_step = count_of(root.at("best_step"));
        state.stale = count_of(root.at("evaluations_without_gain"));
        state.finished = root.at("finished").get<bool>();
        state.goal.steps = count_of(root.at("goal").at("steps"));
        state.goal.time_limit_s = root.at("goal").at("time_limit_s").get<double>();
        read_later_state(root, &state);
    } catch (const json::exception&) {
        fail_input("%s: not the state of a run of this program", path.c_str());
    }
    return state;
}

// That of a checkpoint folder, with `identity` and `settings` written when they are not null.
inline RunState read_state(const std::string& folder, json* identity, json* settings = nullptr) {
    std::string path = join_path(folder, "trainer.json");
    json root = read_json_object(path);
    RunState state = read_state(root, path);
    if (identity != nullptr && !root.contains("run"))
        fail_input("%s: not the state of a run of this program", path.c_str());
    if (identity != nullptr) *identity = root["run"];
    if (settings != nullptr) *settings = root.value("settings", json::object());
    return state;
}

// What two runs must share for one to go on where the other stopped.
inline ordered_json run_identity(const TrainOptions& o, const ModelChoice& model,
                                 const TrainingData& data, uint64_t hash, int T, int micro_batches,
                                 int world = 1) {
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
    run["data"] = hash_text(hash);
    run["tokenizer"] = data.tokenizer ? hash_text(data.tokenizer->fingerprint()) : "none";
    run["seed"] = o.seed;
    run["sequence length"] = T;
    run["sequences a step"] = o.batch_size * int64_t(micro_batches) * world;
    run["overfit one batch"] = o.overfit_one_batch;
    run["windows"] = o.windows;
    run["stride"] = o.windows != "sliding" ? 0 : o.stride > 0 ? o.stride : T;
    run["separate documents"] = o.separate_documents;
    return run;
}

// What runs had for the entries that came later, before there was a choice.
inline const json& first_identity() {
    static const json entries = {
        {"windows", "shuffled"}, {"stride", 0}, {"separate documents", false}};
    return entries;
}

// What a run may change where it goes on. Those that decide about bits are all here.
inline ordered_json run_settings(const TrainOptions& o, const Goal& goal, const GPT2Shape& shape) {
    ordered_json settings;
    settings["steps"] = goal.steps;
    settings["time limit"] = goal.time_limit_s;
    settings["learning rate"] = o.learning_rate;
    settings["schedule"] = o.schedule;
    settings["warm-up"] = o.warmup < 0 ? ordered_json("a tenth") : ordered_json(o.warmup);
    settings["final rate fraction"] = o.final_lr_fraction;
    settings["weight decay"] = o.weight_decay;
    settings["beta1"] = o.beta1;
    settings["beta2"] = o.beta2;
    settings["epsilon"] = o.epsilon;
    settings["gradient clip"] = o.grad_clip;
    settings["dropout"] = o.model.dropout;
    settings["batch size"] = o.batch_size;
    settings["threads"] = shape.threads;
    settings["tf32"] = shape.tf32;
    settings["deterministic"] = shape.deterministic;
    if (shape.leaves > 0) settings["deterministic"] = "for any number of ranks";
    return settings;
}

// A line for each setting that was another one so far.
inline std::vector<std::string> setting_changes(const json& stored, const ordered_json& mine) {
    std::vector<std::string> lines;
    for (const auto& [key, value] : mine.items()) {
        if (!stored.contains(key) || stored[key].dump() == value.dump()) continue;
        lines.push_back(format("%s was %s so far and is %s from here on", key.c_str(),
                               one_line(stored[key].dump()).c_str(), value.dump().c_str()));
    }
    return lines;
}

// Whether losses of evaluations so far compare with those from here on: not where they were of
// other data, or of other windows of it.
inline bool evaluates_alike(const json& stored, const ordered_json& mine) {
    for (const char* key : {"validation data", "windows of an evaluation"})
        if (stored.contains(key) && mine.contains(key) && stored[key].dump() != mine[key].dump())
            return false;
    return true;
}

// What is best, and how long nothing was better, is for the next evaluation to say.
inline void forget_best(RunState* state) {
    RunState fresh;
    state->best_loss = fresh.best_loss;
    state->best_step = fresh.best_step, state->stale = fresh.stale;
}

// Whether two entries name one folder, each in its own way.
inline bool leads_to_the_same(const json& stored, const ordered_json& mine) {
    if (!stored.is_string() || !mine.is_string() || mine == "" || stored == "") return false;
    std::error_code error;
    return fs::equivalent(stored.get<std::string>(), mine.get<std::string>(), error);
}

// The first entry in which a stored identity differs, for people; "" when there is none.
inline std::string identity_difference(const json& stored, const ordered_json& mine) {
    for (const auto& [key, value] : mine.items()) {
        std::string theirs = "nothing";
        if (stored.contains(key)) theirs = stored[key].dump();
        else if (first_identity().contains(key)) theirs = first_identity()[key].dump();
        std::string ours = json_text(value, -1);
        bool same =
            key == "started from" && stored.contains(key) && leads_to_the_same(stored[key], value);
        if (!same && theirs != ours)
            return format("%s is %s there and %s here", key.c_str(), one_line(theirs).c_str(),
                          one_line(ours).c_str());
    }
    return "";
}

// ==== the run folder: one program at a time ======================================================

// While it lives, no other program trains in the folder: an flock on OUT/lock, which the system
// takes back however the program ends. The file stays, because removing it would let two programs
// lock two files of one name.
class RunLock {
  public:
    // taken() is false where another program has the folder; owner() is then who. Throws with exit
    // code 1 where the file cannot be made. A file system without locks is passed over.
    explicit RunLock(const std::string& out) : path_(join_path(out, "lock")) { take(); }
    RunLock(const RunLock&) = delete;
    RunLock& operator=(const RunLock&) = delete;
    ~RunLock() {
        if (fd_ >= 0) close(fd_);
    }

    bool taken() const { return taken_; }
    const std::string& owner() const { return owner_; }

    // The folder may have been removed under the run, or moved: locks the one that is there now.
    // Throws with exit code 1 where another program has that. Any thread may call.
    void renew() {
        std::lock_guard<std::mutex> guard(mutex_);
        if (taken_ && is_still_there(fd_, path_)) return;
        if (fd_ >= 0) close(fd_);
        take();
        if (!taken_) fail_machine("%s: %s trains there now", path_.c_str(), owner_.c_str());
    }

  private:
    void take() {
        taken_ = false;
        fd_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (fd_ < 0) fail_machine("%s: cannot create: %s", path_.c_str(), strerror(errno));
        taken_ = flock(fd_, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
        char text[256] = "";
        if (!taken_) {
            ssize_t size = pread(fd_, text, sizeof text - 1, 0);
            owner_ = one_line(std::string_view(text, size_t(std::max<ssize_t>(size, 0))));
            if (owner_.empty()) owner_ = "another program";
            return;
        }
        gethostname(text, sizeof text - 1);
        std::string mine = format("process %d on %s", int(getpid()), text);
        // For people alone: what cannot be written is no loss.
        if (ftruncate(fd_, 0) != 0 || pwrite(fd_, mine.data(), mine.size(), 0) < 0) return;
    }

    std::string path_, owner_;
    int fd_ = -1;
    bool taken_ = false;
    std::mutex mutex_;
};

// ==== the run folder: which one ==================================================================

struct RunFolder {
    std::string out;
    std::string checkpoint;  // to go on from, verified; "": a new run
    std::string note;        // for people
    std::unique_ptr<RunLock> lock = nullptr;
};

// A folder without the slashes that a shell's completion leaves behind its name.
inline std::string without_slashes(std::string folder) {
    while (folder.size() > 1 && folder.ends_with('/')) folder.pop_back();
    return folder;
}

inline bool holds_checkpoint(const std::string& out) {
    return !list_steps(out, "").empty() || !list_steps(out, ".old").empty();
}

inline bool holds_run(const std::string& out) {
    return path_exists(join_path(out, "log.jsonl")) || holds_checkpoint(out);
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

// Whether a path leads into a folder, or to it, through whatever links.
inline bool lies_in(const std::string& path, const std::string& folder) {
    std::error_code error;
    fs::path whole = fs::weakly_canonical(folder, error), at = fs::weakly_canonical(path, error);
    auto [end, differs] = std::mismatch(whole.begin(), whole.end(), at.begin(), at.end());
    return !error && end == whole.end();
}

// What the run reads must still be there when --out was set aside.
inline void refuse_to_move_inputs(const TrainOptions& o, const std::string& out) {
    std::vector<std::pair<const char*, std::string>> inputs;
    for (const std::string& path : o.data) inputs.push_back({"--data", path});
    for (const std::string& path : o.val) inputs.push_back({"--val", path});
    if (path_exists(o.model.model)) inputs.push_back({"--model", o.model.model});
    if (path_exists(o.tokenizer)) inputs.push_back({"--tokenizer", o.tokenizer});
    for (const auto& [option, path] : inputs)
        if (lies_in(path, out))
            fail_input("%s %s: lies in %s, which --resume never sets aside; give another --out",
                       option, path.c_str(), out.c_str());
}

// The folder of a model is no run folder: that of a checkpoint goes, with all that is in it, when
// its run no longer keeps it.
inline void refuse_model_folder(const std::string& out) {
    for (const char* name : {"trainer.json", "model.safetensors"})
        if (path_exists(join_path(out, name)))
            fail_input("%s: holds a model (%s), and cannot be a run folder; give another --out",
                       out.c_str(), name);
    std::error_code ignored;
    for (fs::path at = fs::weakly_canonical(out, ignored); at.has_relative_path();
         at = at.parent_path())
        if (step_of(at.filename().string()) && path_exists((at / "trainer.json").string()))
            fail_input("%s: lies in a checkpoint of another run; give another --out", out.c_str());
}

// The folder, made where it is not there, for this program alone.
inline std::unique_ptr<RunLock> lock_folder(const std::string& out) {
    make_folder(out);
    auto lock = std::make_unique<RunLock>(out);
    if (!lock->taken())
        fail_input("%s: %s trains in this folder; wait for it, or give another --out", out.c_str(),
                   lock->owner().c_str());
    return lock;
}

// The checkpoint to go on from in a folder, and in `damage` the first that was passed over; ""
// where there is none. fail_input where there are some and none is intact; `remedy` says what would
// help.
inline std::string intact_checkpoint(const std::string& out, std::string* damage,
                                     const char* remedy) {
    std::string checkpoint = latest_checkpoint(out, damage);
    *damage = damage->substr(0, damage->find('\n'));
    if (checkpoint.empty() && !damage->empty())
        fail_input("%s: no checkpoint is intact: %s; %s", out.c_str(), damage->c_str(), remedy);
    return checkpoint;
}

inline std::string going_on_note(const std::string& checkpoint, const std::string& damage) {
    return "going on with " + checkpoint + (damage.empty() ? "" : "; passed over: " + damage);
}

// --out was given: goes on with the run there, or refuses and says what would help.
inline RunFolder open_run_folder(const TrainOptions& o, const std::string& out, const Goal& goal,
                                 const ordered_json& identity) {
    std::unique_ptr<RunLock> lock = lock_folder(out);
    if (!holds_run(out)) return {out, "", "", std::move(lock)};
    if (o.resume == "never") {
        refuse_to_move_inputs(o, out);
        std::string aside = set_aside(out);
        return {out, "", "the run that was there is now " + aside, lock_folder(out)};
    }
    std::string damage;
    std::string checkpoint =
        intact_checkpoint(out, &damage, "give another --out, or --resume never");
    if (checkpoint.empty()) return {out, "", "", std::move(lock)};
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
    return {out, checkpoint, going_on_note(checkpoint, damage), std::move(lock)};
}

// What --resume FOLDER names: a checkpoint by the name of its step, where a link such as OUT/best
// led to it.
inline std::string resumed_path(const std::string& resume) {
    fs::path path = without_slashes(fs::path(resume).lexically_normal().string());
    bool checkpoint = path_exists(join_path(path.string(), "trainer.json"));
    if (!checkpoint || step_of(path.filename().string())) return path.string();
    std::error_code error;
    fs::path whole = fs::canonical(path, error), beside = path.parent_path() / whole.filename();
    return (fs::equivalent(beside, whole, error) ? beside : whole).string();
}

// Makes the checkpoint of `state` the newest of the run in OUT: `last` names it, `best` the one
// that was best by then, and those of later steps are set aside, where they are lost to nobody.
// Returns what that was, for people.
inline std::string go_back(const std::string& out, const RunState& state) {
    std::string name = step_name(state.step), best = step_name(state.best_step);
    if (linked_step(out, "last") != name) point_link(out, "last", name);
    if (state.best_step == 0 || !path_exists(join_path(out, best)))
        unlink(join_path(out, "best").c_str());
    else if (linked_step(out, "best") != best) point_link(out, "best", best);
    std::vector<std::string> aside = abandon_later_checkpoints(out, state.step);
    sync_folder(out);
    if (aside.empty()) return "";
    std::string note = "; later checkpoints are set aside: " + aside.back();
    return aside.size() == 1 ? note : note + format(" and %zu more", aside.size() - 1);
}

// --resume FOLDER: a run folder or one of its checkpoints; --out defaults to the run folder. What
// follows a named checkpoint there is the run from now on, and what goes back to the last
// checkpoint, or on from it, must find that. The folder is locked before it is looked at: a run
// that is at work there may end meanwhile.
inline RunFolder open_resumed_folder(const TrainOptions& o, const std::string& given_out,
                                     const ordered_json& identity) {
    std::string from = resumed_path(o.resume), home = from, damage;
    bool named = path_exists(join_path(from, "trainer.json"));
    if (named) home = fs::path(from).parent_path().string();
    if (home.empty()) home = ".";
    if (!named && !holds_checkpoint(home))
        fail_input("--resume %s: no run is there; give a run folder, auto or never",
                   o.resume.c_str());
    std::string out = given_out.empty() ? home : given_out;
    std::error_code ignored;
    bool there = fs::equivalent(out, home, ignored);
    std::unique_ptr<RunLock> lock = there ? lock_folder(out) : nullptr;
    if (named) verify_checkpoint(from);
    else from = intact_checkpoint(home, &damage, "give another run folder, or --resume never");
    json stored;
    RunState state = read_state(from, &stored);
    std::string difference = identity_difference(stored, identity);
    if (!difference.empty())
        fail_input("--resume %s: is another run: %s", o.resume.c_str(), difference.c_str());
    std::string note = going_on_note(from, damage);
    if (there && named && step_of(fs::path(from).filename().string()) == state.step)
        note += go_back(out, state);
    if (!there) lock = lock_folder(out);
    if (!there && holds_run(out))
        fail_input("%s: holds another run; give another --out", out.c_str());
    return {out, from, note, std::move(lock)};
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

// Whether a folder may hold this very run: what its newest checkpoint that can be asked says, and
// where none can, that it may.
inline bool may_hold(const std::string& out, const ordered_json& identity) {
    for (const StepFolder& folder : list_steps(out, "")) {
        try {
            json stored;
            read_state(join_path(out, folder.name), &stored);
            return identity_difference(stored, identity).empty();
        } catch (const Error&) {}  // the one before may say
    }
    return true;
}

// The checkpoint from which this very run would go on in a folder, and in `damage` what was passed
// over; "" where that holds another one, or this one finished. fail_input where it may be this one
// and no checkpoint is intact: to begin anew elsewhere would hide the loss.
inline std::string unfinished_checkpoint(const std::string& out, const ordered_json& identity,
                                         std::string* damage) {
    if (!may_hold(out, identity)) return "";
    std::string checkpoint = intact_checkpoint(out, damage, "give --out, or --resume never");
    if (checkpoint.empty()) return "";
    json stored;
    RunState state = read_state(checkpoint, &stored);
    return state.finished || !identity_difference(stored, identity).empty() ? "" : checkpoint;
}

// Whether a folder holds no more than the log of this very run, which ended before its first
// checkpoint.
inline bool only_began(const std::string& out, const ordered_json& identity) {
    if (holds_checkpoint(out)) return false;
    std::ifstream file(join_path(out, "log.jsonl"));
    json started;
    bool empty = true;
    for (std::string line; std::getline(file, line); empty = false) {
        if (line.find("\"event\"") == std::string::npos) continue;
        json record = json::parse(line, nullptr, false);
        if (record.is_object() && record.value("event", json()) == "start")
            started = record.value("run", json());
    }
    return empty || (started.is_object() && identity_difference(started, identity).empty());
}

// No --out: the first of runs/NAME, runs/NAME-2, ... that is free, or that holds this very run,
// unfinished. One in which another program trains is not free.
inline RunFolder find_run_folder(const TrainOptions& o, const ordered_json& identity) {
    std::string base = default_out(o.data);
    for (int number = 1;; number++) {
        std::string out = number == 1 ? base : format("%s-%d", base.c_str(), number);
        if (holds_run(out) && o.resume == "never") continue;
        make_folder(out);
        auto lock = std::make_unique<RunLock>(out);
        if (!lock->taken()) continue;
        if (!holds_run(out) || only_began(out, identity)) return {out, "", "", std::move(lock)};
        std::string damage, checkpoint = unfinished_checkpoint(out, identity, &damage);
        if (checkpoint.empty()) continue;
        return {out, checkpoint, going_on_note(checkpoint, damage), std::move(lock)};
    }
}

inline RunFolder choose_run_folder(const TrainOptions& o, const Goal& goal,
                                   const ordered_json& identity) {
    std::string out = without_slashes(o.out);
    if (!out.empty()) refuse_model_folder(out);
    if (o.resume != "auto" && o.resume != "never") return open_resumed_folder(o, out, identity);
    if (!out.empty()) return open_run_folder(o, out, goal, identity);
    return find_run_folder(o, identity);
}

// Where tokenized text and trained tokenizers are kept: beside the run folder.
inline std::string cache_folder(const TrainOptions& o) {
    std::string out = o.out.empty() ? default_out(o.data) : o.out;
    bool resumed = o.resume != "auto" && o.resume != "never";
    if (o.out.empty() && resumed) {
        out = resumed_path(o.resume);
        if (path_exists(join_path(out, "trainer.json"))) out += "/..";
    }
    return (fs::path(out) / ".." / "cache").lexically_normal().string();
}

// ==== the run folder: log ========================================================================

// OUT/log.jsonl: JSON objects, a line each; those of steps, and those with "event" of what happened
// to the run. Each is written whole, or not at all; what a disk refuses is kept and written before
// the next one. Opening it for a run that goes on from `step` drops what was written after that
// step, and will be again. Any thread may call.
class RunLog {
  public:
    // `lock` is that of the folder, and outlives the log.
    RunLog(const std::string& out, size_t step, RunLock* lock)
        : out_(out), path_(join_path(out, "log.jsonl")), lock_(lock) {
        open_file();
        cut(step);
    }
    RunLog(const RunLog&) = delete;
    RunLog& operator=(const RunLog&) = delete;
    ~RunLog() { close(fd_); }

    // Returns what went wrong, once for a row of failures; "" otherwise.
    std::string write(const ordered_json& record) {
        std::lock_guard<std::mutex> guard(mutex_);
        pending_ += json_text(record, -1) + "\n";
        std::string wrong = write_pending(), said = failing_ ? "" : wrong;
        failing_ = !wrong.empty();
        return said;
    }

    // Makes every record durable; throws with exit code 1 where the disk refuses.
    void sync() {
        std::lock_guard<std::mutex> guard(mutex_);
        std::string wrong = write_pending();
        if (wrong.empty() && fsync(fd_) != 0) wrong = strerror(errno);
        if (!wrong.empty()) fail_machine("%s: cannot write: %s", path_.c_str(), wrong.c_str());
    }

    // Drops the records after `step`, and whatever at the end is no record, such as one that a
    // crash cut short.
    void cut(size_t step) {
        std::lock_guard<std::mutex> guard(mutex_);
        pending_.clear();
        MappedFile file(path_);
        std::string_view text = file.view();
        size_t end = text.size();
        while (end > 0) {
            size_t before = end == 1 ? std::string_view::npos : text.rfind('\n', end - 2);
            size_t begin = before == std::string_view::npos ? 0 : before + 1;
            if (text[end - 1] == '\n' && is_record(text.substr(begin, end - begin), step)) break;
            end = begin;
        }
        if (end < text.size() && ftruncate(fd_, off_t(end)) != 0)
            fail_machine("%s: cannot cut: %s", path_.c_str(), strerror(errno));
    }

  private:
    static bool is_record(std::string_view line, size_t last_step) {
        json record = json::parse(line, nullptr, false);
        bool whole = record.is_object() && record.value("step", json()).is_number_unsigned();
        return whole && record["step"].get<size_t>() <= last_step;
    }

    void open_file() {
        int fd = open(path_.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (fd < 0) fail_errno(path_, "open");  // the old file is kept, to be tried with again
        fd_ = fd;
    }

    // The folder may have been removed under the run: what the old file held, which lives on while
    // it is open, begins the new one. Throws where another program trains in the folder by now.
    void follow_folder() {
        if (is_still_there(fd_, path_)) return;
        struct stat held = {};
        fstat(fd_, &held);
        std::string content(size_t(held.st_size), '\0');
        ssize_t size = pread(fd_, content.data(), content.size(), 0);
        make_folder(out_);
        lock_->renew();
        int old = fd_;
        open_file();
        close(old);
        if (size > 0) pending_.insert(0, content, 0, size_t(size));
    }

    // Appends what is pending; where less than all of it fits, nothing of it stays in the file.
    std::string write_pending() {
        try {
            follow_folder();
        } catch (const Error& error) { return error.what(); }
        if (pending_.empty()) return "";
        off_t size = lseek(fd_, 0, SEEK_END);
        size_t done = 0;
        while (done < pending_.size()) {
            ssize_t written = ::write(fd_, pending_.data() + done, pending_.size() - done);
            if (written < 0 && errno == EINTR) continue;
            if (written <= 0) {
                std::string wrong = strerror(errno);
                if (ftruncate(fd_, size) != 0) wrong += "; a part of a record is at its end";
                return wrong;
            }
            done += size_t(written);
        }
        pending_.clear();
        return "";
    }

    std::string out_, path_, pending_;
    RunLock* lock_;
    int fd_ = -1;
    bool failing_ = false;
    std::mutex mutex_;
};

// ==== saving =====================================================================================

// A warning in one line, beside whatever the screen shows.
inline void warn(const std::string& text) {
    fprintf(stderr, "%s: warning: %s\n", gpt2_program(), text.c_str());
}

// Saves the checkpoints of a run, so that training goes on meanwhile: begin() starts a snapshot of
// the model, hand_over(), called when the device has its next step, gives it to a thread that
// writes, syncs and verifies it. There is one such thread at a time; who comes second waits. A save
// that fails is a warning and is tried again; the third failure in a row ends the run with exit
// code 1 and the checkpoints before as they were.
//
// Of ranks that save parts each has one, and rank 0's saves as that of one process does. Those of
// the others serve it, each with its part, until wait(): rank 0's has come to an end by then.
class Saver {
  public:
    struct Options {
        std::string out;
        Retention retention;
        bool background = true;
        double retry_s = 30;  // after a failure
        SavingRank ranks = {};
    };

    Saver(const Options& options, GPT2* model, const std::function<void()>& before_publishing)
        : o_(options), model_(model), before_publishing_(before_publishing) {}
    ~Saver() { is_over_ = true; }

    double last_save_s() const { return last_save_s_; }
    bool idle() const { return !content_; }  // nothing is being saved, or to be tried again

    // Saves the model as it is now.
    void begin(Checkpoint checkpoint) {
        replace_content(std::move(checkpoint));
        handed_over_ = !in_background_;
        if (in_background_) return;
        gpt2_snapshot_wait(model_);
        if (serves()) start();
        else save_now();
    }

    // To be called when the step after begin() was launched.
    void hand_over() {
        if (!content_ || handed_over_) return;
        gpt2_snapshot_wait(model_);
        handed_over_ = true;
        start();
    }

    // Looks after the thread, and tries again what failed when it is time. Returns true where the
    // caller must begin() again, because there is no snapshot to try with.
    bool poll() {
        if (running_.valid() &&
            running_.wait_for(std::chrono::seconds(0)) == std::future_status::ready)
            wait();
        if (running_.valid() || failures_ == 0 || now_s() < retry_at_s_) return false;
        if (!in_background_) return true;
        if (content_ && handed_over_) start();
        return false;
    }

    // Saves the model as it is now, and returns when that is done, after as many tries as there
    // may be: the run is about to end.
    void finish(Checkpoint checkpoint) {
        replace_content(std::move(checkpoint));
        gpt2_snapshot_wait(model_);
        if (serves()) return start();
        for (save_now(); failures_ > 0 && !is_over(); save_now())
            std::this_thread::sleep_for(std::chrono::duration<double>(o_.retry_s));
    }

    // Until no save is at work, nor one of a snapshot to be tried again: the run is about to end,
    // with a model that is not to be saved.
    void settle() {
        for (wait(); failures_ > 0 && in_background_ && !is_over(); save_now())
            std::this_thread::sleep_for(std::chrono::duration<double>(o_.retry_s));
    }

    // Forgets a save that failed: the run goes back to before it.
    void give_up() {
        wait();
        content_.reset();
        failures_ = 0;
    }

    // Until no save is at work.
    void wait() {
        if (!running_.valid()) return;
        is_over_ = serves();
        std::string note;
        try {
            note = running_.get();
        } catch (const Error& error) {
            return failed(error.what());
        } catch (const std::bad_alloc&) { return failed("out of memory"); }
        succeeded(note);
    }

  private:
    static constexpr int kTries = 3;

    bool serves() const { return o_.ranks.rank > 0; }
    bool is_over() const { return is_over_ || o_.ranks.is_over(); }

    // What was the best and could not be saved leaves that to what is saved in its place.
    void replace_content(Checkpoint checkpoint) {
        wait();
        checkpoint.best |= content_ && content_->best;
        content_ = std::move(checkpoint);
        in_background_ = take_snapshot() && o_.background;
    }

    // The content is the snapshot's, where the model has one. False where it is the model's.
    bool take_snapshot() {
        if (!gpt2_shape(model_).snapshot) return false;
        try {
            gpt2_snapshot_begin(model_);
        } catch (const std::system_error&) { return false; }  // no thread can be made
        content_->parts = [model = model_](Group group, int row, int layer) {
            return gpt2_snapshot_tensor(model, group, row, layer);
        };
        content_->tensors = [parts = content_->parts](Group group, int row, int layer) {
            return parts(group, row, layer).numbers;
        };
        content_->saving = o_.ranks;
        content_->saving.is_over = [this] { return is_over(); };
        return true;
    }

    std::string save() {
        if (serves()) {
            serve_part(o_.out, *content_);
            return "";
        }
        double begin_s = now_s();
        std::string note = save_checkpoint(o_.out, *content_, o_.retention, before_publishing_);
        last_save_s_ = now_s() - begin_s;
        return note;
    }

    // The thread takes no signals, whose handler's stack is the main thread's, and no threads of
    // its own, which would be taken from training. Where no core is free it takes a thirtieth of
    // one: the passes of training wait for their slowest thread, and lose what any of them loses.
    // Where no thread can be made, the caller saves; what serves rank 0's save cannot, because it
    // does so until training goes on.
    void start() {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        is_over_ = false;
        std::string wrong;
        try {
            running_ = std::async(std::launch::async, [this] {
                omp_set_num_threads(1);
#ifdef __linux__
                setpriority(PRIO_PROCESS, 0, 15);  // there it is of this thread alone
#endif
                return save();
            });
        } catch (const std::exception& error) { wrong = error.what(); }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        if (!wrong.empty() && serves()) fail_machine("cannot start a thread: %s", wrong.c_str());
        if (!wrong.empty()) save_now();
    }

    void save_now() {
        try {
            succeeded(save());
        } catch (const Error& error) { failed(error.what()); } catch (const std::bad_alloc&) {
            failed("out of memory");
        }
    }

    void succeeded(const std::string& note) {
        if (!note.empty()) warn("old checkpoints stay: " + note);
        failures_ = 0;
        content_.reset();
    }

    void failed(const std::string& reason) {
        failures_++;
        if (is_over()) return;  // other ranks' end, of which there is more to say elsewhere
        retry_at_s_ = now_s() + o_.retry_s;
        std::string name = step_name(content_->step);
        if (failures_ < kTries)
            return warn(format("%s was not saved: %s; trying again in %g s (%d of %d)",
                               name.c_str(), reason.c_str(), o_.retry_s, failures_, kTries - 1));
        std::string last = linked_step(o_.out, "last");
        std::string left = "there is no checkpoint yet";
        if (!last.empty())
            left = join_path(o_.out, last) +
                   " is the last good state, from which the same command goes on";
        fail_machine("%s was not saved, %d times in a row: %s; %s", name.c_str(), kTries,
                     reason.c_str(), left.c_str());
    }

    Options o_;
    GPT2* model_;
    std::function<void()> before_publishing_;
    std::optional<Checkpoint> content_;  // of the save at work, or of the one that failed
    bool in_background_ = false;         // that is a snapshot, which a thread saves
    bool handed_over_ = false;
    int failures_ = 0;  // in a row
    double retry_at_s_ = 0;
    std::atomic<double> last_save_s_ = 0;
    std::atomic<bool> is_over_ = false;  // the thread need not wait for other ranks
    std::future<std::string> running_;   // last: it is waited for before the rest goes
};

// What a file system is known for that puts checkpoints at risk; "" for the others.
inline std::string file_system_note(const std::string& folder) {
    struct statfs system;
    if (statfs(folder.c_str(), &system) != 0) return "";
    constexpr std::pair<long, const char*> kKinds[] = {
        {0x6969, "NFS"},    {0xFF534D42, "CIFS"}, {0xFE534D42, "SMB"},   {0x517B, "SMB"},
        {0x01021997, "9p"}, {0x65735546, "FUSE"}, {0x0BD00BD0, "Lustre"}};
    for (const auto& [kind, name] : kKinds)
        if (long(system.f_type) == kind)
            return format(
                "%s is on %s, where synced data may still be lost with the server, and a "
                "lock may not hold between machines",
                folder.c_str(), name);
    return "";
}

// How many checkpoints a run leaves: the newest, the best, and those that stay for good. A run by
// the clock saves nobody knows how often: it is taken for often enough to have all that --keep
// keeps.
inline size_t checkpoints_kept(const TrainOptions& o, const Goal& goal) {
    bool counted = goal.steps > 0, saves_often = o.save_every > 0 && (counted || o.keep > 0);
    size_t saves = 1;
    if (saves_often) saves = counted ? goal.steps / o.save_every + 1 : size_t(o.keep);
    if (o.keep == 0) return saves;
    size_t newest = std::min(saves, size_t(o.keep)), for_good = 0;
    if (o.keep_every > 0)  // of the older saves, those whose step it divides
        for_good = (saves - newest) * std::gcd(o.save_every, o.keep_every) / o.keep_every;
    return newest + 1 + for_good;
}

// Refuses a disk that the run's checkpoints will not fit on, before anything is computed.
inline void check_disk(const TrainOptions& o, const std::string& out, const GPT2Config& config,
                       const Goal& goal) {
    std::optional<size_t> free = disk_free(out);
    if (!free) return;
    size_t kept = checkpoints_kept(o, goal);
    size_t one = checkpoint_bytes(config), there = list_steps(out, "").size();
    size_t needed = (std::max(kept, there) - there + 1) * one;  // one is written beside the others
    if (needed <= *free) return;
    fail_machine(
        "%s: %zu checkpoints of %s need %s more, the disk has %s free; another --out, %sa smaller "
        "--keep or a larger --save-every would fit",
        out.c_str(), kept, readable_bytes(double(one)).c_str(),
        readable_bytes(double(needed)).c_str(), readable_bytes(double(*free)).c_str(),
        o.keep > 0 && o.keep_every > 0 ? "a larger --keep-every, " : "");
}

// ==== bad numbers ================================================================================

// The first tensor that holds a number that is not finite, looked for in the order in which they
// are computed: what a diagnosis says.
struct BadTensor {
    std::string name;
    size_t bad = 0, size = 0;
};

inline std::optional<BadTensor> bad_numbers(const std::string& name,
                                            const std::vector<real>& host) {
    auto finite = [](real value) { return std::isfinite(value); };
    size_t good = size_t(std::count_if(host.begin(), host.end(), finite));
    if (good == host.size()) return {};
    return BadTensor{name, host.size() - good, host.size()};
}

inline std::string layer_name(int layer, const char* name) {
    return format("layer %d: %s", layer, name);
}

inline std::optional<BadTensor> bad_parameter(const GPT2* model, Group group, int row, int layer) {
    const ParameterRow entry = parameter_table(gpt2_config(model))[size_t(row)];
    if (!entry.present) return {};
    std::vector<real> host(entry.file_size());
    gpt2_copy_out(model, group, row, layer, host.data());
    std::string name = entry.per_layer() ? layer_name(layer, entry.name) : entry.name;
    return bad_numbers((group == Group::gradients ? "gradient of " : "") + name, host);
}

inline std::optional<BadTensor> first_bad_parameter(const GPT2* model) {
    ParameterTable table = parameter_table(gpt2_config(model));
    for (int row = 0; row < kParameterRows; row++)
        for (int layer = 0; layer < int(table[size_t(row)].count); layer++)
            if (auto bad = bad_parameter(model, Group::parameters, row, layer)) return bad;
    return {};
}

// After a forward pass. Of buffers that all layers share, the last layer's content is there.
inline std::optional<BadTensor> first_bad_activation(const GPT2* model) {
    ActivationTable table = activation_table(gpt2_config(model), gpt2_shape(model));
    int layers = gpt2_config(model).layers;
    auto look = [&](int row, int layer, int place) -> std::optional<BadTensor> {
        const ActivationRow& buffer = table[size_t(row)];
        if (buffer.size == 0 || buffer.count == 0) return {};
        std::vector<real> host(buffer.size);
        gpt2_activation_out(model, row, place, host.data());
        return bad_numbers(layer < 0 ? buffer.name : layer_name(layer, buffer.name), host);
    };
    if (auto bad = look(a_encoded, -1, 0)) return bad;
    for (int layer = 0; layer < layers; layer++) {
        for (int row = a_ln1; row <= a_residual3; row++) {
            size_t count = table[size_t(row)].count;
            if (count <= 1 && layer + 1 < layers) continue;
            if (auto bad = look(row, layer, count > 1 ? layer : 0)) return bad;
        }
    }
    for (int row : {a_lnf, a_lnf_mean, a_lnf_rstd, a_logits, a_losses})
        if (auto bad = look(row, -1, 0)) return bad;
    return {};
}

// After a backward pass, which goes from the last layer to the first.
inline std::optional<BadTensor> first_bad_gradient(const GPT2* model) {
    const GPT2Config& config = gpt2_config(model);
    for (int row : {k_headw, k_lnfb, k_lnfw})
        if (auto bad = bad_parameter(model, Group::gradients, row, 0)) return bad;
    for (int layer = config.layers - 1; layer >= 0; layer--)
        for (int row = k_fcprojb; row >= k_ln1w; row--)
            if (auto bad = bad_parameter(model, Group::gradients, row, layer)) return bad;
    for (int row : {k_wpe, k_wte})
        if (auto bad = bad_parameter(model, Group::gradients, row, 0)) return bad;
    return {};
}

// ==== the training loop ==========================================================================

// Whether checkpoints are saved in the background: where memory for the snapshot is to spare,
// unless the options say.
inline bool chooses_snapshot(const TrainOptions& o, const GPT2Config& config, GPT2Shape shape) {
    if (o.background_save != "auto") return o.background_save == "on";
    shape.snapshot = true;
    size_t card = gpt2_memory_free(), machine = machine_memory_free();
    return (card == 0 || fits(config, shape, card)) &&
           (machine == 0 || total_bytes(gpt2_host_memory(config, shape)) <= machine);
}

// What a shape that trains on one of `world` ranks says of them.
inline void shard(const TrainOptions& o, int T, int world, GPT2Shape* shape) {
    shape->world = world, shape->zero = o.zero;
    if (o.compute.deterministic == "ranks") shape->leaves = accumulation(o, T, world) * world;
    bool sent = world > 1 || shape->zero > 0 || shape->leaves > 0;
    if (sent && o.reduce != "fp32") shape->reduce = Dtype::bf16;
    shape->sums_exactly = sent && o.reduce == "mixed";
}

// Refuses what is about several ranks in a program that can only be one.
inline void refuse_ranks(const TrainOptions& o) {
    std::string why = gpt2_alone();
    if (why.empty()) return;
    if (o.zero > 0) fail_input("--zero %d: %s", o.zero, why.c_str());
    if (o.reduce != "fp32") fail_input("--reduce %s: %s", o.reduce.c_str(), why.c_str());
    if (o.compute.deterministic == "ranks") fail_input("--deterministic ranks: %s", why.c_str());
}

// Refuses options of which one takes away what the other is about.
inline void refuse_contradictions(const TrainOptions& o) {
    if (o.steps > 0 && o.epochs > 0) fail_input("--steps and --epochs: give one of them");
    if (o.early_stop > 0 && o.eval_every == 0)
        fail_input(
            "--early-stop %zu: counts evaluations on the way, and --eval-every 0 makes none; give "
            "how many steps lie between them",
            o.early_stop);
}

// The shape of the model that trains on one of `world` ranks: with a cache for one sequence when it
// also samples. Where states are sharded the snapshot is what they are saved from.
inline GPT2Shape training_shape(const TrainOptions& o, const GPT2Config& config, int T,
                                bool samples, int world) {
    GPT2Shape shape = choose_shape(o.compute);
    shape.world = world;
    if (gpt2_alone().empty()) shard(o, T, world, &shape);
    shape.B = o.batch_size, shape.T = T, shape.training = true;
    shape.generate = samples && o.sample_every > 0 ? 1 : 0;
    shape.recompute = choose_recompute(o.recompute, config, shape, gpt2_memory_free());
    shape.snapshot = shape.zero > 0 || chooses_snapshot(o, config, shape);
    return shape;
}

// The part of the device's rate of large products that a step is assumed to reach, for estimates.
constexpr double kAssumedShare = 0.6;

// --dropout where it is not given, of a run that will go over its training data so many times: none
// but for the default model on a text so small that it would be learned by heart, and the more the
// surer it would.
inline double choose_dropout(const ModelOptions& o, double passes) {
    constexpr double kFewPasses = 5.5, kManyPasses = 8, kDropout = 0.1;
    if (!o.is_default()) return 0;
    double share = std::clamp((passes - kFewPasses) / (kManyPasses - kFewPasses), 0.0, 1.0);
    return std::round(100 * kDropout * share) / 100;
}

// --steps or --epochs as steps, and --time-limit. With none of them, two minutes for a text that
// they are enough for, and an epoch of anything larger.
inline Goal choose_goal(const TrainOptions& o, const TrainingData& data, size_t windows,
                        size_t sequences_a_step) {
    constexpr size_t kSmallText = 10000000;
    constexpr double kSmallTime_s = 120;
    Goal goal{o.steps, o.time_limit_s};
    double epochs = o.epochs;
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
    size_t step = 0;  // counts from 1
    double learning_rate = 0;
    DataLoader::Position begin;     // of the data, before its batches
    DataLoader::Position position;  // and behind them
    double epoch = 0;               // the same in epochs
    double begin_s = 0;
};

// What decisions about the length of a run are made by.
struct Times {
    double elapsed_s = 0, step_s = 0, window_s = 0, save_s = 0;
};

// One run, from data to the last checkpoint. Members are what a step needs; each is made once,
// before step 0.
class Training {
  public:
    // Reads the data, makes or loads the model and finds the place to go on from. `start_s` is when
    // the command began, from which the time limit counts.
    // Every rank of a job makes one, with the same options. Rank 0 leads: it alone has the log and
    // the screen and decides about the run folder, into which others at most put their parts, and
    // whatever depends on the time or on a signal is as it says.
    Training(const TrainOptions& options, double start_s, const std::string& how_to_go_on,
             RankLink& link)
        : o_(options),
          screen_(options.screen),
          start_s_(start_s),
          how_to_go_on_(how_to_go_on),
          link_(link),
          rank_(link.ranks().rank),
          world_(link.ranks().world) {
        choose_shape(o_.compute);  // refuses early what this program cannot
        refuse_ranks(o_);
        refuse_contradictions(o_);
        choice_ = choose_model(o_.model);
        T_ = choose_sequence_length(o_.sequence_length, choice_.config);
        micro_batches_ = accumulation(o_, T_, world_);
        leader_first("the data", [&] { data_ = read_data(o_, choice_, cache_folder(o_)); });
        check_length(o_, data_, T_);
        choose_vocabulary(data_, &choice_);
        validate(choice_.config);
        train_tokens_ = count_tokens(data_.train);
        WindowOptions windows = window_options(o_, data_);
        separator_ = windows.separator;
        loader_.emplace(
            DataLoader(std::move(data_.train), o_.batch_size, T_, rank_, world_, o_.seed, windows),
            size_t(micro_batches_));
        goal_ = choose_goal(o_, data_, loader_->windows_per_epoch(), sequences_a_step());
        shard_hashes_ = loader_->shard_hashes();
        for (const Shard& shard : data_.val) {
            val_known_.push_back(shard.file().identity());
            val_hashes_.push_back(shard.identity());
        }
        watches_val_ = windows.watch && evaluates();
        identity_ =
            run_identity(o_, choice_, data_, data_hash(shard_hashes_), T_, micro_batches_, world_);
        compare_ranks();
        if (leads()) {
            folder_ = choose_run_folder(o_, goal_, identity_);
            check_disk(o_, folder_.out, choice_.config, goal_);
        }
        if (world_ > 1 && o_.zero > 0) find_shared_folder();
        prepare_model();
        // The record that is owed is written with its evaluation, and may have been already.
        bool owes_record = !state_.owed.is_null() && !state_.owed.contains("event");
        size_t logged = state_.step - (owes_record ? 1 : 0);
        if (leads()) log_.emplace(folder_.out, logged, folder_.lock.get());
        bool saves_parts = gpt2_shape(model_.get()).saves_parts;
        if (leads() || saves_parts) {
            Saver::Options saving = {
                leads() ? folder_.out : shared_out_,
                {o_.keep, o_.keep_every},
                gpt2_shape(model_.get()).snapshot && o_.background_save != "off",
                o_.save_retry_s};
            if (saves_parts) {
                saving.ranks.rank = rank_, saving.ranks.world = world_, saving.ranks.job = job_;
                saving.ranks.is_over = [this] { return link_.has_failed(); };
            }
            saver_.emplace(saving, model_.get(), [this] {
                folder_.lock->renew();
                log_->sync();
            });
        }
        size_t tokens = size_t(o_.batch_size) * size_t(T_) * size_t(micro_batches_);
        inputs_.resize(tokens);
        targets_.resize(tokens);
    }

    // Trains to the goal. Returns 0, or 128 + the signal that stopped it after a save.
    //
    // A step is launched before the one before it is looked at, so that the device always has work;
    // only where something must see the result of a step does the loop wait for it.
    int run() {
        report();
        StopOnSignal signals(leads());
        write_record(start_record());
        std::optional<LaunchedStep> before;
        agree();
        if (std::optional<int> code = make_up()) return *code;
        fetch_batches();
        for (bool last = false; !last;) {
            LaunchedStep now = launch();
            if (saver_) saver_->hand_over();
            if (before) write_record(finish(*before, gpt2_previous_stats(model_.get())));
            before = now;
            look_for_stop_file();
            bool save_again = agree(saver_ && saver_->poll());
            if (!save_again && !is_awaited(now)) continue;
            before.reset();
            ordered_json record = finish(now, gpt2_stats(model_.get()));
            if (rolls_back_ && roll_back()) {
                own_error_ = data_error_ = nullptr;
                continue;
            }
            agree();
            time_windows();
            last = is_over();
            if ((signal() != 0 || data_error_) && !last) return stop(&record);
            bool best = false;
            bool due = is_due(o_.eval_every, now.step) || last;
            if (due && !evaluate(&record, &best, &last)) return leave(record, best);
            write_record(record);
            if (is_due(o_.sample_every, now.step) && !last) sample();
            owes_save_ |= best || save_again || is_due(o_.save_every, now.step);
            if (last || best || (owes_save_ && state_.bad_steps == 0)) save(best, last);
        }
        conclude();
        return 0;
    }

  private:
    size_t sequences_a_step() const {
        return size_t(o_.batch_size) * size_t(micro_batches_) * size_t(world_);
    }
    size_t tokens_a_step() const { return sequences_a_step() * size_t(T_); }
    bool leads() const { return rank_ == 0; }
    // A model whose states are sharded is one of several, even where it is the only one.
    bool joins() const { return world_ > 1 || gpt2_shape(model_.get()).zero > 0; }
    double elapsed_s() const { return elapsed_before_s_ + now_s() - start_s_; }
    // Of one rank they are as they are now; several go by what they have agreed on.
    Times times() const {
        if (world_ > 1) return agreed_;
        return {elapsed_s(), step_s_, window_s_, saver_->last_save_s()};
    }
    int signal() const { return world_ > 1 ? agreed_signal_ : int(stop_signal()); }

    // `f` on rank 0, and then on the others, which find what that left on the disk.
    template <typename F>
    void leader_first(const char* name, F f) {
        if (!leads()) link_.barrier(name, kPatience_s);
        f();
        if (leads()) link_.barrier(name, kPatience_s);
    }
    static bool is_due(size_t interval, size_t step) {
        return interval > 0 && step % interval == 0;
    }
    // Of an evaluation whose step has its record already.
    ordered_json evaluation_record() const {
        return {{"event", "evaluation"}, {"step", state_.step}};
    }
    bool evaluates() const { return !data_.val.empty() && !o_.overfit_one_batch; }
    size_t subset_windows() const { return o_.eval_batches * size_t(o_.batch_size); }
    size_t all_windows() const { return count_tokens(data_.val) / size_t(T_) + 1; }
    size_t windows_on_the_way() const {
        return subset_windows() > 0 ? std::min(subset_windows(), all_windows()) : all_windows();
    }

    // The settings of this run, and what its evaluations are of.
    ordered_json settings_of(const TrainOptions& o, const GPT2Shape& shape) const {
        ordered_json settings = run_settings(o, goal_, shape);
        if (!evaluates()) return settings;
        EvalLoader loader(data_.val, o.batch_size, T_, subset_windows(), separator_);
        settings["validation data"] = hash_text(data_hash(val_hashes_));
        settings["windows of an evaluation"] = loader.windows();
        return settings;
    }

    // Seconds that the end of the run will take, from what the same has taken so far.
    double reserve_s() const {
        if (goal_.time_limit_s == 0) return 0;
        size_t windows = 0;
        if (evaluates())
            windows = all_windows() + (subset_windows() > 0 ? windows_on_the_way() : 0);
        Times t = times();
        double save_s = t.save_s;
        if (save_s == 0) save_s = 12.0 * double(count_parameters(choice_.config)) / 3e8;
        int saves = evaluates() ? 2 : 1;
        return 1.1 * (double(windows) * t.window_s + saves * save_s) + 0.15;
    }

    // Whether the goal is reached, or too near for another step, and for an evaluation that is due
    // before it. At least one step is made.
    bool is_over() const {
        if (goal_.steps > 0 && state_.step >= goal_.steps) return true;
        Times t = times();
        double next_s = t.elapsed_s + t.step_s + reserve_s();
        if (evaluates() && is_due(o_.eval_every, state_.step))
            next_s += double(windows_on_the_way()) * t.window_s;
        return goal_.time_limit_s > 0 && t.step_s > 0 && next_s >= goal_.time_limit_s;
    }

    // Whether the step that was launched last must be done before anything else happens: it may be
    // the last one, something is due after it, or nothing is known yet of how long a step takes.
    bool is_awaited(const LaunchedStep& now) const {
        if (signal() != 0 || data_error_) return true;
        Times t = times();
        if (t.step_s == 0 || now.step == goal_.steps) return true;
        bool may_end = o_.max_bad_steps > 0 && state_.bad_steps + 1 >= o_.max_bad_steps;
        if (may_end || rolls_back_ || owes_save_) return true;
        if (is_due(o_.eval_every, now.step) || is_due(o_.sample_every, now.step) ||
            is_due(o_.save_every, now.step))
            return true;
        double after_next_s = t.elapsed_s + 2 * t.step_s + reserve_s();
        return goal_.time_limit_s > 0 && after_next_s >= goal_.time_limit_s;
    }

    // --dtype, of which auto is, for a run that goes on, what it was so far.
    std::string precision() const {
        if (o_.compute.dtype != "auto" || folder_.checkpoint.empty()) return o_.compute.dtype;
        std::string so_far = read_state(folder_.checkpoint, nullptr).dtype;
        return so_far == "fp32" || so_far == "bf16" ? so_far : "auto";
    }

    // Seconds of a step, from its operations alone; 0 where the device's rate is not known.
    double estimated_step_s() const {
        if (peak_.flops == 0) return 0;
        double operations = operations_per_token(choice_.config, T_) * double(tokens_a_step());
        return operations / (kAssumedShare * peak_.flops);
    }

    // How many times the run will go over its training data, by that where its length is a time.
    double expected_passes() const {
        double steps = double(goal_.steps), step_s = estimated_step_s();
        if (goal_.steps == 0) steps = step_s > 0 ? goal_.time_limit_s / step_s : 0;
        return steps * double(tokens_a_step()) / double(train_tokens_);
    }

    // --dropout, which for a run that goes on is what it was so far, unless it is given.
    double dropout() const {
        if (o_.model.dropout >= 0) return o_.model.dropout;
        if (folder_.checkpoint.empty() && o_.overfit_one_batch) return 0;
        if (folder_.checkpoint.empty()) return choose_dropout(o_.model, expected_passes());
        json settings;
        read_state(folder_.checkpoint, nullptr, &settings);
        json so_far = settings.value("dropout", json());
        return so_far.is_number() ? std::clamp(so_far.get<double>(), 0.0, kMostDropout) : 0;
    }

    void prepare_model() {
        bool samples = data_.tokenizer.has_value();
        TrainOptions options = o_;
        options.compute.dtype = link_.broadcast("the precision", precision(), kPatience_s);
        GPT2Shape shape = training_shape(options, choice_.config, T_, samples, world_);
        peak_ = o_.peak.flops > 0 ? o_.peak : gpt2_peak(shape);
        options.model.dropout =
            std::stod(link_.broadcast("the dropout", format("%.17g", dropout()), kPatience_s));
        choice_.config.dropout = options.model.dropout;
        shape.saves_parts = !shared_out_.empty();
        shape.snapshot = shape.snapshot && (leads() || shape.saves_parts);
        const char* dtype = dtype_name(shape.dtype);
        settings_ = settings_of(options, shape);
        leader_first("the model", [&] {  // the others find the products that it has timed
            model_.reset(gpt2_create(choice_.config, shape, rank_));
        });
        std::string checkpoint = folder_.checkpoint;
        if (shape.saves_parts)
            checkpoint = link_.broadcast("the checkpoint", checkpoint, kPatience_s);
        if (!leads()) {
            // the rest of what rank 0 has comes below
            if (shape.saves_parts && !checkpoint.empty()) read_moments(model_.get(), checkpoint);
        } else if (!folder_.checkpoint.empty()) {
            json settings;
            read_checkpoint(model_.get(), folder_.checkpoint);
            state_ = read_state(folder_.checkpoint, nullptr, &settings);
            for (const std::string& change : setting_changes(settings, settings_)) add_note(change);
            if (!evaluates_alike(settings, settings_)) {
                forget_best(&state_);
                add_note("the best loss and --early-stop count anew: losses before do not compare");
            }
            elapsed_before_s_ = state_.elapsed_s;
            loader_->seek(state_.position);
            if (state_.dtype != dtype)
                add_note(format("the run used --dtype %s so far and goes on with %s",
                                one_line(state_.dtype).c_str(), dtype));
        } else if (!choice_.folder.empty()) {
            load_any_model(model_.get(), choice_.folder);
        } else {
            gpt2_initialise(model_.get(), o_.seed);
        }
        if (leads()) {
            // one that came too late for the run before
            if (unlink(stop_file().c_str()) == 0) add_note("removed an old " + stop_file());
            std::string from = folder_.checkpoint.empty() ? choice_.folder : folder_.checkpoint;
            if (!from.empty()) add_note(any_conversion_note(from));
            add_note(file_system_note(folder_.out));
        }
        join_ranks();
        state_.finished = false;
        state_.dtype = dtype;
        state_.goal = goal_;
        launched_ = saved_step_ = state_.step;
    }
    void add_note(const std::string& note) {
        if (!note.empty()) notes_.push_back(note);
    }

    void write_record(const ordered_json& record) {
        if (!log_) return;
        std::string wrong = log_->write(record);
        if (!wrong.empty())
            warn(format("%s: cannot write: %s; its records are kept until it can",
                        join_path(folder_.out, "log.jsonl").c_str(), wrong.c_str()));
    }

    // A warning about the run, which concerns all ranks alike.
    void note_trouble(const std::string& text) {
        if (leads()) warn(text);
    }

    void compare_ranks();
    void find_shared_folder();
    void join_ranks();
    void share_state();
    bool agree(bool wish = false);
    ordered_json diagnosis_of_ranks(const ordered_json& own);
    void report_ranks();
    void report();
    void report_goal();
    ordered_json start_record();
    std::string stop_file() const { return join_path(folder_.out, "stop"); }
    void look_for_stop_file();
    [[noreturn]] void end_with_diagnosis(const LaunchedStep& bad, const GPT2Stats& stats);
    ordered_json diagnose(const LaunchedStep& bad);
    double time_step(const LaunchedStep& launched, const GPT2Stats& stats);
    ordered_json skip(const LaunchedStep& bad, const GPT2Stats& stats);
    void look_for_spike(const LaunchedStep& launched, double loss, ordered_json* record);
    bool roll_back();
    void fetch_batches();
    LaunchedStep launch();
    ordered_json finish(const LaunchedStep& launched, const GPT2Stats& stats);
    void show_progress(double loss, double rate, double grad_norm);
    void await_save(bool ends);
    bool validation_is_intact();
    std::optional<Evaluation> evaluate_windows(size_t windows);
    void time_windows();
    bool evaluate(ordered_json* record, bool* best, bool* last);
    void sample();
    void save(bool best, bool last);
    void save_ahead();
    int stop(ordered_json* record);
    int leave(const ordered_json& record, bool best);
    std::optional<int> make_up();
    void conclude();

    const TrainOptions& o_;
    Screen screen_;
    double start_s_;
    std::string how_to_go_on_;
    ModelChoice choice_;
    int T_ = 0, micro_batches_ = 1;
    TrainingData data_;
    size_t train_tokens_ = 0;
    std::optional<PrefetchLoader> loader_;
    int separator_ = -1;        // between documents that are kept apart
    bool watches_val_ = false;  // the files of the validation data
    std::vector<FileIdentity> val_known_;
    std::vector<uint64_t> val_hashes_;
    Goal goal_;
    ordered_json identity_;
    std::vector<uint64_t> shard_hashes_;
    ordered_json settings_;
    RunFolder folder_;
    std::vector<std::string> notes_;  // for people
    GPT2Ptr model_;
    RunState state_;                 // after the last step that is known to be done
    size_t launched_ = 0;            // steps, of which the last may not be done
    std::exception_ptr data_error_;  // what was thrown where data were to be read, on any rank
    std::exception_ptr own_error_;   // the same, here, until the ranks have agreed on it
    std::optional<RunLog> log_;      // of rank 0, as the saver is
    double stop_file_s_ = 0;         // when it was last looked for
    LaunchedStep spike_;             // the last one
    bool owes_save_ = false;         // once the steps are good again
    bool rolls_back_ = false;        // to before it
    size_t saved_step_ = 0;
    std::vector<int> inputs_, targets_;             // of the next step: (micro-batches, B, T)
    DataLoader::Position fetched_from_;             // where their data begins
    double elapsed_before_s_ = 0, finished_s_ = 0;  // finished_s_: when the last step was done
    PeakRate peak_;
    double step_s_ = 0, window_s_ = 0;   // how long each took, lately
    size_t steps_done_ = 0;              // by this program
    double compute_s_ = 0, data_s_ = 0;  // of this rank, for passes and for data, since reported
    size_t timed_steps_ = 0;
    RankLink& link_;
    int rank_, world_;
    std::string job_, shared_out_;  // the run folder, where all ranks see it and save parts there
    Times agreed_;
    int agreed_signal_ = 0;
    Evaluation final_;
    std::optional<Saver> saver_;  // last: what it reads outlives it
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
    if (shape.leaves > 0) text += format(", sums in one tree over %d batches", shape.leaves);
    if (shape.reduce == Dtype::bf16)
        text += shape.sums_exactly ? ", gradients sent in bf16" : ", gradients summed in bf16";
    if (shape.zero > 0)
        text += format(", %s sharded over %d rank%s",
                       shape.zero == 2 ? "gradients and optimizer states" : "optimizer states",
                       shape.world, shape.world > 1 ? "s" : "");
    return text + format(", recompute level %d", shape.recompute);
}

// What is about to happen: configuration, sizes, memory, the length of the run.
inline void Training::report() {
    const GPT2Config& c = choice_.config;
    GPT2Shape shape = gpt2_shape(model_.get());
    screen_.line("machine    " + describe_machine(peak_));
    for (int rank = 0; world_ > 1 && rank < world_; rank++)
        screen_.line((rank == 0 ? "ranks      " : "           ") + link_.describe(rank));
    screen_.line("computing  " + describe_computing(shape));
    screen_.line("data       " + data_.description);
    screen_.line("tokenizer  " + describe_tokenizer(data_.tokenizer));
    screen_.line(
        format("model      %d layers, %d heads, %d channels, context %d, vocabulary %s%s%s%s",
               c.layers, c.heads, c.channels, c.context, with_commas(size_t(c.vocab_size)).c_str(),
               c.dropout > 0 ? format(", dropout %g", c.dropout).c_str() : "",
               choice_.folder.empty() ? "" : ", from ", choice_.folder.c_str()));
    for (const std::string& line : size_report(c, shape)) screen_.line(line);
    std::string ranks = world_ > 1 ? format("%d ranks x ", world_) : "";
    screen_.line(format(
        "step       %s tokens: %s%d x %d sequences of %d; an epoch is %s steps",
        with_commas(tokens_a_step()).c_str(), ranks.c_str(), micro_batches_, o_.batch_size, T_,
        with_commas(
            size_t(std::ceil(double(loader_->windows_per_epoch()) / double(sequences_a_step()))))
            .c_str()));
    report_goal();
    screen_.line("out        " + folder_.out);
    if (!folder_.note.empty()) screen_.line("note       " + folder_.note);
    for (const std::string& note : notes_) screen_.line("note       " + note);
    if (goal_.steps > 0 && o_.warmup > int64_t(goal_.steps))
        screen_.line(
            format("note       the warm-up is longer than the run, which ends at a rate of %.3g",
                   learning_rate(o_, goal_, goal_.steps - 1, 1)));
    if (data_.val.empty() && !o_.overfit_one_batch)
        screen_.line(
            "note       too little data for validation: the last checkpoint is the result");
}

// The length of the run, in steps and in time; one from the other where the device's rate is known.
inline void Training::report_goal() {
    double step_s = estimated_step_s();
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

// What is needed to do the run again: options, versions, machine, data.
inline ordered_json Training::start_record() {
    char now[32];
    time_t seconds = time(nullptr);
    struct tm parts;
    strftime(now, sizeof now, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&seconds, &parts));
    ordered_json record;
    record["event"] = "start";
    record["step"] = state_.step;
    record["time"] = now;
    record["program"] = gpt2_program();
    record["version"] = gpt2_version();
    record["compiler"] = __VERSION__;
    record["device"] = gpt2_device();
    record["arguments"] = o_.arguments;
    record["settings"] = settings_;
    record["computing"] = describe_computing(gpt2_shape(model_.get()));
    if (world_ > 1) {
        record["ranks"] = ordered_json::array();
        for (int rank = 0; rank < world_; rank++) record["ranks"].push_back(link_.describe(rank));
    }
    record["run"] = identity_;
    record["data"] = ordered_json::array();
    const std::vector<Shard>& shards = loader_->shards();
    for (size_t i = 0; i < shards.size(); i++)
        record["data"].push_back({{"file", shards[i].path()},
                                  {"tokens", shards[i].size()},
                                  {"xxh3", hash_text(shard_hashes_[i])}});
    return record;
}

// A file OUT/stop does what SIGTERM does; it is looked for ten times a second at most.
inline void Training::look_for_stop_file() {
    constexpr double kInterval_s = 0.1;
    if (!leads() || stop_signal() != 0 || now_s() < stop_file_s_ + kInterval_s) return;
    stop_file_s_ = now_s();
    if (unlink(stop_file().c_str()) == 0) stop_signal() = SIGTERM;
}

// ---- several ranks ----

// That every rank trains the same model on the same data in the same way.
inline void Training::compare_ranks() {
    std::vector<NamedText> list = {{"the program", std::string(gpt2_program())},
                                   {"its version", gpt2_version()}};
    for (const auto& [key, value] : identity_.items()) list.push_back({key, json_text(value, -1)});
    GPT2Shape shape = training_shape(o_, choice_.config, T_, data_.tokenizer.has_value(), world_);
    shape.recompute = 0;  // each rank as much as its memory asks for
    ordered_json settings = settings_of(o_, shape);
    for (const auto& [key, value] : settings.items()) list.push_back({key, value.dump()});
    list.push_back({"evaluation", format("every %zu steps, %zu batches, %zu windows", o_.eval_every,
                                         o_.eval_batches, count_tokens(data_.val))});
    list.push_back(
        {"what is sharded", format("--zero %d, --reduce %s", o_.zero, o_.reduce.c_str())});
    list.push_back(
        {"samples, saves and times of ranks",
         format("every %zu, %zu and %zu steps", o_.sample_every, o_.save_every, o_.log_every)});
    list.push_back(
        {"what ends or turns the run early",
         format("--early-stop %zu, --max-bad-steps %zu, --spike-threshold %g, --on-spike %s",
                o_.early_stop, o_.max_bad_steps, o_.spike_threshold, o_.on_spike.c_str())});
    link_.all_equal("the options", std::move(list), kPatience_s);
}

// Whether every rank sees rank 0's run folder, by its name. Then each saves its part of the
// optimizer's states there; otherwise rank 0 collects them all.
inline void Training::find_shared_folder() {
    std::string probe = join_path(folder_.out, format("ranks.%d", int(getpid())));
    if (leads()) job_ = format("%d %.6f", int(getpid()), now_s());
    job_ = link_.broadcast("the job", job_, kPatience_s);
    if (leads()) write_file_atomic(probe, job_);
    probe = link_.broadcast("a file of the run folder", probe, kPatience_s);
    bool sees = read_message(probe) == job_;
    bool all = sum_over_ranks(link_, "who sees the run folder", sees) == world_;
    if (leads()) unlink(probe.c_str());
    if (all) shared_out_ = fs::path(probe).parent_path().string();
    else add_note("not all ranks see " + folder_.out + ": rank 0 collects what they save");
}

// Meets the other ranks' models, and gives them what rank 0 has read.
inline void Training::join_ranks() {
    if (!joins()) return;
    gpt2_join(model_.get(),
              link_.broadcast("the id of NCCL", leads() ? gpt2_job_id() : "", kPatience_s));
    share_state();
}

// The parameters, the moments and the state of the run, from rank 0.
inline void Training::share_state() {
    if (!joins()) return;
    ordered_json root = to_json(state_, identity_, settings_, o_.seed);
    root["step"] = state_.step;
    root["elapsed_before_s"] = elapsed_before_s_;
    json theirs = parse_json(
        link_.broadcast("the state of the run", json_text(root, -1), kPatience_s), "rank 0");
    if (!leads()) {
        state_ = read_state(theirs, "rank 0");
        elapsed_before_s_ = theirs.value("elapsed_before_s", 0.0);
        loader_->seek(state_.position);
    }
    gpt2_share(model_.get());
}

// How long each rank's device computed in a step, and how long the rank waited for data.
struct RankTimes {
    std::vector<double> compute_ms, data_ms;
};

// A line for each rank that holds up the others: one that computes for longer than they do, by more
// than a tenth of the median of theirs, or waits for data for more than a tenth of a step.
inline std::vector<std::string> find_stragglers(const RankTimes& times, double step_ms,
                                                const std::function<std::string(int)>& describe) {
    constexpr double kTolerated = 0.1;
    std::vector<std::string> lines;
    for (size_t rank = 0; rank < times.compute_ms.size(); rank++) {
        std::vector<double> others = times.compute_ms;
        others.erase(others.begin() + ptrdiff_t(rank));
        auto middle = others.begin() + ptrdiff_t(others.size() / 2);
        std::nth_element(others.begin(), middle, others.end());
        if (times.compute_ms[rank] > (1 + kTolerated) * *middle)
            lines.push_back(format("%s computes for %.1f ms a step, the others for %.1f",
                                   describe(int(rank)).c_str(), times.compute_ms[rank], *middle));
        if (times.data_ms[rank] > kTolerated * step_ms)
            lines.push_back(format("%s waits %.1f ms a step for its data",
                                   describe(int(rank)).c_str(), times.data_ms[rank]));
    }
    return lines;
}

// The times of all ranks since the last such record, to the log, and who is slow to the screen.
inline void Training::report_ranks() {
    double steps = double(std::max<size_t>(timed_steps_, 1));
    json mine = {1000 * compute_s_ / steps, 1000 * data_s_ / steps};
    compute_s_ = data_s_ = 0, timed_steps_ = 0;
    RankTimes times;
    for (const std::string& text : link_.gather("times", mine.dump(), kPatience_s)) {
        json theirs = parse_json(text, "times");
        times.compute_ms.push_back(theirs.at(0).get<double>());
        times.data_ms.push_back(theirs.at(1).get<double>());
    }
    if (!leads()) return;
    write_record({{"event", "ranks"},
                  {"step", state_.step},
                  {"compute_ms", times.compute_ms},
                  {"data_ms", times.data_ms}});
    auto describe = [this](int rank) { return link_.describe(rank); };
    for (const std::string& line : find_stragglers(times, 1000 * step_s_, describe))
        screen_.line(format("step %-7zu %s", state_.step, line.c_str()));
}

// What may differ between ranks, and must not where they decide how to go on: the clock, signals,
// and whether data can be had. All take rank 0's times, the first signal and the first error.
// Returns whether any of them wishes for what this exchange is about.
inline bool Training::agree(bool wish) {
    if (world_ == 1) {
        data_error_ = own_error_;
        return wish;
    }
    link_.alive(launched_);
    ordered_json mine = {{"signal", int(stop_signal())}, {"wish", wish}};
    try {
        if (own_error_) std::rethrow_exception(own_error_);
    } catch (const Error& error) {
        mine["error"] = error.what(), mine["exit_code"] = error.exit_code;
    }
    std::vector<std::string> all = link_.gather("step", json_text(mine, -1), kPatience_s);
    ordered_json agreed;
    if (leads()) {
        double save_s = saver_ ? saver_->last_save_s() : 0;
        agreed = {{"elapsed_s", elapsed_s()}, {"step_s", step_s_}, {"window_s", window_s_},
                  {"save_s", save_s},         {"wish", false},     {"signal", 0}};
        for (size_t rank = 0; rank < all.size(); rank++) {
            json theirs = parse_json(all[rank], format("rank %zu", rank));
            if (theirs.value("wish", false)) agreed["wish"] = true;
            if (agreed["signal"] == 0) agreed["signal"] = theirs.value("signal", 0);
            if (agreed.contains("error") || !theirs.contains("error")) continue;
            agreed["error"] = theirs["error"], agreed["exit_code"] = theirs["exit_code"];
        }
    }
    json common = parse_json(link_.broadcast("step", json_text(agreed, -1), kPatience_s), "rank 0");
    agreed_ = {common.value("elapsed_s", 0.0), common.value("step_s", 0.0),
               common.value("window_s", 0.0), common.value("save_s", 0.0)};
    agreed_signal_ = common.value("signal", 0);
    if (common.contains("error"))
        data_error_ = std::make_exception_ptr(
            Error(common.value("exit_code", kExitMachine), common.value("error", "")));
    return common.value("wish", false);
}

// The batches of the next step. Data that a roll-back passes over is taken and not used.
inline void Training::fetch_batches() {
    if (o_.overfit_one_batch) loader_->seek({});
    auto skipped = [&] {
        return std::find(state_.skipped.begin(), state_.skipped.end(), loader_->position()) !=
               state_.skipped.end();
    };
    for (bool again = true; again;) {
        again = skipped() && !o_.overfit_one_batch;
        fetched_from_ = loader_->position();
        loader_->next_batches(inputs_.data(), targets_.data());
    }
    if (o_.overfit_one_batch) loader_->seek({});
}

// Gives one step to the device: rate, zero, forward and backward of each micro-batch, clip and
// update; then fetches the batches of the next one, while the device works: an error of the data is
// kept for when this step is done. All batches of a step are there before its first forward pass,
// because loss and gradient are means over the targets that count in the whole step.
inline LaunchedStep Training::launch() {
    // Reading data is no training yet, nor are the first step, which is slow, and what follows it.
    if (launched_ < 2) state_.begun_s = times().elapsed_s;
    double progress =
        run_progress(goal_, launched_, times().elapsed_s, reserve_s(), state_.begun_s);
    LaunchedStep now{launched_ + 1,
                     learning_rate(o_, goal_, launched_, progress),
                     fetched_from_,
                     loader_->position(),
                     loader_->epoch_fraction(),
                     now_s()};
    AdamW adamw{now.learning_rate, o_.beta1,     o_.beta2, o_.epsilon,
                o_.weight_decay,   o_.grad_clip, now.step};
    size_t batch = size_t(o_.batch_size) * size_t(T_);
    auto count =
        double(targets_.size()) - double(std::count(targets_.begin(), targets_.end(), kIgnore));
    if (separator_ >= 0) count = sum_over_ranks(link_, "targets", count);
    else count *= world_;
    GPT2Pass pass;
    pass.training = true, pass.seed = o_.seed, pass.step = launched_;
    pass.loss_scale = 1 / std::max(count, 1.0);
    gpt2_zero_gradients(model_.get());
    for (int m = 0; m < micro_batches_; m++) {
        link_.at_work();  // a step of many batches may take longer than a rank may hang
        pass.completes = m == micro_batches_ - 1;
        pass.first_sequence = uint64_t(m * world_ + rank_) * uint64_t(o_.batch_size);
        gpt2_forward(model_.get(), &inputs_[size_t(m) * batch], &targets_[size_t(m) * batch],
                     o_.batch_size, T_, pass);
        gpt2_backward(model_.get());
    }
    gpt2_update(model_.get(), adamw);
    launched_++;
    double fetch_s = now_s();
    try {
        fetch_batches();
    } catch (const Error&) { own_error_ = std::current_exception(); }
    data_s_ += now_s() - fetch_s;
    return now;
}

// A loss or norm for people: printf has two NaNs.
inline std::string number_text(double value) {
    return std::isnan(value) ? "nan" : format("%g", value);
}

inline std::string numbers_of(const GPT2Stats& stats) {
    return "loss " + number_text(stats.loss) + ", gradient norm " + number_text(stats.grad_norm);
}

// How long a step took that is done, and with it how long one takes lately. The first step, which
// also waits for memory and for kernels to be made, counts until there is a second.
inline double Training::time_step(const LaunchedStep& launched, const GPT2Stats& stats) {
    double done_s = stats.finished_s > 0 ? stats.finished_s : now_s();
    double took_s = std::max(1e-9, done_s - std::max(finished_s_, launched.begin_s));
    finished_s_ = done_s;
    step_s_ = steps_done_++ < 2 ? took_s : 0.9 * step_s_ + 0.1 * took_s;
    return took_s;
}

// Says of a step whose loss or gradient is not finite that it was skipped: the device has not
// applied it. As many in a row as the options allow end the run.
inline ordered_json Training::skip(const LaunchedStep& bad, const GPT2Stats& stats) {
    state_.bad_steps++;
    state_.step = bad.step;
    state_.position = bad.position;
    if (o_.max_bad_steps > 0 && state_.bad_steps >= o_.max_bad_steps)
        end_with_diagnosis(bad, stats);
    note_trouble(format("step %zu is skipped: %s, over the data from window %llu of epoch %llu on",
                        bad.step, numbers_of(stats).c_str(),
                        static_cast<unsigned long long>(bad.begin.window),
                        static_cast<unsigned long long>(bad.begin.epoch)));
    ordered_json record;
    record["step"] = bad.step;
    record["train_loss"] = nullptr;
    record["learning_rate"] = bad.learning_rate;
    record["grad_norm"] = nullptr;
    record["skipped"] = numbers_of(stats);
    record["data"] = to_json(bad.begin);
    record["epoch"] = bad.epoch;
    record["tokens"] = state_.tokens;
    return record;
}

// Does the passes of a bad step again, from the same weights over the same data, and says which
// tensor is the first that is not finite.
inline ordered_json Training::diagnose(const LaunchedStep& bad) {
    if (auto found = first_bad_parameter(model_.get()))
        return {{"first", found->name}, {"not_finite", found->bad}, {"of", found->size}};
    loader_->seek(bad.begin);
    state_.skipped.clear();
    fetch_batches();
    size_t batch = size_t(o_.batch_size) * size_t(T_);
    GPT2Pass pass;
    pass.training = true, pass.alone = true, pass.seed = o_.seed, pass.step = bad.step - 1;
    pass.loss_scale = 1 / double(targets_.size());
    gpt2_zero_gradients(model_.get());
    for (int m = 0; m < micro_batches_; m++) {
        auto described = [&](const BadTensor& found) -> ordered_json {
            return {{"first", found.name},
                    {"not_finite", found.bad},
                    {"of", found.size},
                    {"micro_batch", m}};
        };
        pass.first_sequence = uint64_t(m * world_ + rank_) * uint64_t(o_.batch_size);
        gpt2_forward(model_.get(), &inputs_[size_t(m) * batch], &targets_[size_t(m) * batch],
                     o_.batch_size, T_, pass);
        if (auto found = first_bad_activation(model_.get())) return described(*found);
        gpt2_backward(model_.get());
        if (auto found = first_bad_gradient(model_.get())) return described(*found);
    }
    return {{"first", nullptr}};  // each pass is finite: the sum of them was not
}

// The diagnosis of the first rank that found something.
inline ordered_json Training::diagnosis_of_ranks(const ordered_json& own) {
    if (world_ == 1) return own;
    std::vector<std::string> all = link_.gather("diagnosis", own.dump(), kPatience_s);
    for (size_t rank = 0; rank < all.size(); rank++) {
        ordered_json theirs = ordered_json::parse(all[rank]);
        theirs["rank"] = rank;
        if (theirs["first"].is_string()) return theirs;
    }
    return own;
}

// OUT/diagnosis.json and the end. Weights and checkpoints stay as they are.
inline void Training::end_with_diagnosis(const LaunchedStep& bad, const GPT2Stats& stats) {
    link_.rest();
    await_save(true);
    ordered_json root;
    root["step"] = bad.step;
    root["bad_steps_in_a_row"] = state_.bad_steps;
    root["loss"] = number_text(stats.loss);
    root["grad_norm"] = number_text(stats.grad_norm);
    root["learning_rate"] = bad.learning_rate;
    root["data"] = to_json(bad.begin);
    ordered_json diagnosis = diagnosis_of_ranks(diagnose(bad));
    if (!leads()) link_.barrier("the end, which rank 0 says", kPatience_s);
    for (const auto& [key, value] : diagnosis.items()) root[key] = value;
    std::string path = join_path(folder_.out, "diagnosis.json");
    write_file_atomic(path, json_text(root, 2) + "\n");
    size_t first = bad.step + 1 - state_.bad_steps;
    std::string steps = format("step %zu", first);
    if (state_.bad_steps > 1) steps += format(" and the %zu after it", state_.bad_steps - 1);
    fail_machine(
        "%s: %s: %s, first in %s; none was applied, and the checkpoints before are intact; a lower "
        "--learning-rate or a longer --warmup may help; %s says more",
        folder_.out.c_str(), steps.c_str(), numbers_of(stats).c_str(),
        root["first"].is_string() ? root["first"].get<std::string>().c_str() : "no single pass",
        path.c_str());
}

// Notes a loss far above those before it, and that the run goes back where it is to.
inline void Training::look_for_spike(const LaunchedStep& launched, double loss,
                                     ordered_json* record) {
    double deviations = state_.trend.deviations(loss);
    bool spike = o_.spike_threshold > 0 && deviations > o_.spike_threshold;
    if (!spike) return state_.trend.add(loss);
    (*record)["spike"] = deviations;
    std::string what = format("step %zu: loss %.4f is %.1f deviations above the mean of %.4f",
                              launched.step, loss, deviations, state_.trend.mean);
    bool back = o_.on_spike == "rollback" && state_.rollbacks < kMostRollbacks;
    if (!back || rolls_back_) {
        note_trouble(what);
        return state_.trend.add(loss);
    }
    spike_ = launched;
    rolls_back_ = true;
    note_trouble(what + "; going back to the last checkpoint, past this data");
}

// Goes back to the last checkpoint, and from there on past the data of the spike. False where there
// is none, and the run goes on as it is.
inline bool Training::roll_back() {
    rolls_back_ = false;
    link_.rest();
    std::string checkpoint;
    if (leads()) {
        saver_->wait();
        checkpoint = latest_checkpoint(folder_.out);
    }
    checkpoint = link_.broadcast("the checkpoint to go back to", checkpoint, kPatience_s);
    if (checkpoint.empty()) {
        note_trouble("there is no checkpoint yet to go back to");
        return false;
    }
    if (saver_) saver_->give_up();
    std::vector<DataLoader::Position> skipped = state_.skipped;
    size_t rollbacks = state_.rollbacks + 1;
    std::string dtype = state_.dtype;
    if (leads()) {
        json settings;
        read_checkpoint(model_.get(), checkpoint);
        state_ = read_state(checkpoint, nullptr, &settings);
        if (!evaluates_alike(settings, settings_)) forget_best(&state_);
    } else if (gpt2_shape(model_.get()).saves_parts) {
        read_moments(model_.get(), checkpoint);
    }
    share_state();
    state_.finished = false, state_.goal = goal_, state_.dtype = dtype;
    state_.rollbacks = rollbacks;
    for (const DataLoader::Position& position : skipped)
        if (std::find(state_.skipped.begin(), state_.skipped.end(), position) ==
            state_.skipped.end())
            state_.skipped.push_back(position);
    state_.skipped.push_back(spike_.begin);
    state_.owed = nullptr;
    launched_ = saved_step_ = state_.step;
    loader_->seek(state_.position);
    fetch_batches();
    if (log_) log_->cut(state_.step);
    ordered_json record;
    record["event"] = "rollback";
    record["step"] = state_.step;
    record["from_step"] = spike_.step;
    record["skipped_data"] = to_json(spike_.begin);
    write_record(record);
    screen_.line(format("back at    step %zu", state_.step));
    if (rollbacks == kMostRollbacks)
        note_trouble(
            format("the run has gone back %zu times, the most that it may: spikes are only "
                   "reported from here on",
                   kMostRollbacks));
    return true;
}

// Takes note of a step that is done, and makes its record.
inline ordered_json Training::finish(const LaunchedStep& launched, const GPT2Stats& stats) {
    double took_s = time_step(launched, stats);
    if (!std::isfinite(stats.loss) || !std::isfinite(stats.grad_norm)) return skip(launched, stats);
    state_.bad_steps = 0;
    state_.step = launched.step;
    state_.tokens += tokens_a_step();
    state_.position = launched.position;
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
    record["elapsed_s"] = elapsed_before_s_ + finished_s_ - start_s_;
    look_for_spike(launched, stats.loss, &record);
    compute_s_ += stats.compute_s;
    timed_steps_++;
    if (world_ > 1 && is_due(o_.log_every, state_.step)) report_ranks();
    return record;
}

inline void Training::show_progress(double loss, double rate, double grad_norm) {
    Progress p;
    p.step = state_.step, p.steps = goal_.steps;
    p.loss = loss, p.learning_rate = rate, p.grad_norm = grad_norm;
    p.tokens_per_s = double(tokens_a_step()) / step_s_;
    if (peak_.flops > 0)
        p.peak_share = operations_per_token(choice_.config, T_) * p.tokens_per_s / peak_.flops;
    if (p.peak_share > 1) p.peak_share = 0;  // it was measured while others had a part of it
    p.fraction = run_progress(goal_, state_.step, elapsed_s(), reserve_s(), state_.begun_s);
    p.eta_s = INFINITY;
    if (goal_.steps > 0) p.eta_s = double(goal_.steps - state_.step) * step_s_ + reserve_s();
    if (goal_.time_limit_s > 0) {
        p.eta_s = std::min(p.eta_s, goal_.time_limit_s - elapsed_s());
        p.fraction = std::max(p.fraction, std::min(1.0, elapsed_s() / goal_.time_limit_s));
    }
    screen_.progress(p);
}

// Whether the files of the validation data are what they were when they were opened, on every
// rank; if not, data_error_ says what happened.
inline bool Training::validation_is_intact() {
    bool lost = false;
    try {
        for (size_t s = 0; watches_val_ && s < data_.val.size(); s++)
            val_known_[s] = check_unchanged(data_.val[s], val_known_[s], val_hashes_[s]);
    } catch (const Error&) {
        own_error_ = std::current_exception();
        lost = true;
    }
    return !agree(lost);
}

// Evaluates on so many windows (0: all). None where the validation data cannot be read on some
// rank: data_error_ says what happened.
inline std::optional<Evaluation> Training::evaluate_windows(size_t windows) {
    std::optional<Evaluation> e;
    try {
        e = evaluate_model(model_.get(), data_.val, data_.token_bytes, o_.batch_size, T_, windows,
                           separator_, &link_);
        window_s_ = e->seconds / double(e->windows);
    } catch (const Error&) { own_error_ = std::current_exception(); }
    if (agree(!e)) e.reset();
    return e;
}

// What the end of a run with a time limit will take is measured after the first step: on as many
// windows as take long enough for that, the first of which warm up.
inline void Training::time_windows() {
    constexpr double kShare = 0.002;  // of the time limit
    if (goal_.time_limit_s == 0 || !evaluates() || times().window_s > 0) return;
    if (signal() != 0 || data_error_) return;
    link_.rest();
    const size_t first = size_t(o_.batch_size) * size_t(world_), all = all_windows();
    for (size_t windows = first;; windows *= 2) {
        if (!evaluate_windows(windows) || windows >= all) return;
        double took_s = double(windows) * times().window_s;
        if (windows > first && took_s > kShare * goal_.time_limit_s) return;
    }
}

// Evaluates on the part of the validation data that all evaluations on the way share, which decides
// about *best and patience, and at the end on all of it, which is what the record then says. Sets
// *last when patience is at its end. Returns false where the data is lost: data_error_ says how,
// and the evaluation is owed.
inline bool Training::evaluate(ordered_json* record, bool* best, bool* last) {
    if (!evaluates()) return true;
    state_.owed = *record;
    link_.rest();
    if (!validation_is_intact()) return false;
    if (*last || signal() != 0 || data_error_) save_ahead();
    std::optional<Evaluation> subset = evaluate_windows(subset_windows());
    if (!subset) return false;
    Evaluation now = *subset;
    if (state_.evaluated_step != state_.step) {  // else it counts already
        *best = now.loss < state_.best_loss;
        state_.stale = *best ? 0 : state_.stale + 1;
        if (*best) state_.best_loss = now.loss, state_.best_step = state_.step;
        state_.evaluated_step = state_.step;
    }
    bool patience_ends = o_.early_stop > 0 && state_.stale >= o_.early_stop;
    if (patience_ends && !*last) {
        *last = true;
        screen_.line(format("early stop: %zu evaluations without gain", state_.stale));
        save_ahead();
    }
    if (*last && subset_windows() > 0) {
        std::optional<Evaluation> all = evaluate_windows(0);
        if (!all) return false;
        now = *all;
    }
    state_.owed = nullptr;
    if (*last) final_ = now;
    if (!*last)
        screen_.line(format("step %-7zu validation: %s%s", state_.step,
                            describe_evaluation(now).c_str(), *best ? ", best so far" : ""));
    (*record)["val_loss"] = now.loss;
    (*record)["val_perplexity"] = now.perplexity();
    if (std::isfinite(now.bits_per_byte)) (*record)["val_bits_per_byte"] = now.bits_per_byte;
    (*record)["val_windows"] = now.windows;
    return true;
}

inline void Training::sample() {
    link_.rest();
    if (!data_.tokenizer || !leads()) return;
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

// Until no save is at work, and where the run `ends` none is to be tried again. Ranks that save
// parts serve rank 0's until that is done with it.
inline void Training::await_save(bool ends) {
    if (!saver_) return;
    if (leads() && ends) saver_->settle();
    if (leads()) saver_->wait();
    if (gpt2_shape(model_.get()).saves_parts) link_.barrier("the save before", kPatience_s);
    saver_->wait();
}

inline void Training::save(bool best, bool last) {
    owes_save_ = false;
    saved_step_ = state_.step;
    link_.rest();
    await_save(false);
    if (!saver_ && gpt2_shape(model_.get()).zero > 0) gpt2_snapshot_begin(model_.get());
    if (!saver_) return;
    state_.elapsed_s = elapsed_s();
    state_.finished = last;
    Checkpoint checkpoint{state_.step,
                          choice_.config,
                          view_of(model_.get()),
                          data_.tokenizer ? &*data_.tokenizer : nullptr,
                          to_json(state_, identity_, settings_, o_.seed),
                          best};
    bool ends = last || signal() != 0 || data_error_;
    if (!ends) return saver_->begin(std::move(checkpoint));
    saver_->finish(std::move(checkpoint));
    await_save(false);
}

// Saves before an evaluation with which the run ends, and which may take long: whatever ends the
// program meanwhile, no step is lost, and the record is written when the evaluation is made up for.
inline void Training::save_ahead() {
    if (saved_step_ == state_.step) return;
    save(false, false);
    if (saver_) saver_->hand_over();
}

// A signal came, or the data of the next step cannot be had: this step is done, and an evaluation
// that was due is made, so that the run goes on as if nothing had been; where patience ends with
// it, the run is done. Throws the data's error.
inline int Training::stop(ordered_json* record) {
    bool last = false, best = false;
    bool evaluated = !is_due(o_.eval_every, state_.step) || evaluate(record, &best, &last);
    if (!last || !evaluated) return leave(*record, best);
    write_record(*record);
    save(best, last);
    conclude();
    return 0;
}

// Saves, and ends a run that a signal stopped or, throwing it, an error of its data.
inline int Training::leave(const ordered_json& record, bool best) {
    write_record(record);
    if (!state_.owed.is_null()) state_.owed = evaluation_record();
    save(best, false);
    std::string cause = data_error_ ? "stopped" : format("stopped by signal %d", signal());
    screen_.line(format("%s at step %zu; saved %s", cause.c_str(), state_.step,
                        join_path(folder_.out, step_name(state_.step)).c_str()));
    if (data_error_) std::rethrow_exception(data_error_);
    screen_.line("go on with: " + how_to_go_on_ + " --out " + shell_quoted(folder_.out));
    return 128 + signal();
}

// What a run owes when it goes on: an evaluation that was not possible, or that did not come to its
// end; and the last one, where it is asked for no more steps than it has. Returns the exit code of
// a run that ends with it.
inline std::optional<int> Training::make_up() {
    bool best = false, last = is_over();
    if (!last && state_.owed.is_null()) return {};
    ordered_json record = std::exchange(state_.owed, nullptr);
    if (record.is_null()) record = evaluation_record();
    if (!evaluate(&record, &best, &last)) return leave(record, best);
    if (evaluates() || !record.contains("event")) write_record(record);
    save(best, last);
    if (!last) return {};
    conclude();
    return 0;
}

inline void Training::conclude() {
    screen_.line(format("done       %s steps, %s tokens, %s", with_commas(state_.step).c_str(),
                        with_commas(state_.tokens).c_str(), readable_time(elapsed_s()).c_str()));
    if (final_.windows > 0)
        screen_.line(format("validation %s, over all %s windows",
                            describe_evaluation(final_).c_str(),
                            with_commas(final_.windows).c_str()));
    bool best = linked_step(folder_.out, "best") == step_name(state_.best_step);
    if (best && state_.best_step != state_.step)
        screen_.line(format("best       at step %s: %s", with_commas(state_.best_step).c_str(),
                            join_path(folder_.out, "best").c_str()));
    screen_.line("saved      " + join_path(folder_.out, step_name(state_.step)));
    if (data_.tokenizer)
        screen_.line(format("try        %s sample --model %s --prompt TEXT", o_.program.c_str(),
                            shell_quoted(folder_.out).c_str()));
}
