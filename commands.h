// The command line: options, commands, and the program.
//
// Options are defined once, in a table from which --help, the range checks and the suggestions for
// misspelt words follow. run() is the program: it parses, calls the command, and turns whatever
// goes wrong into one line and an exit code.
#pragma once

#include <cxxabi.h>
#include <execinfo.h>
#include <poll.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <exception>

#include "hellaswag.h"
#include "scaling.h"
#include "trainer.h"

// ==== options ====================================================================================

struct SampleOptions {
    std::string model, tokenizer, prompt = "\n", weights, out;
    size_t max_new_tokens = 200, num_samples = 1;
    uint64_t seed = 42;
    SamplerOptions sampler;
    ComputeOptions compute;
    RankOptions ranks;
};

struct EvaluateOptions {
    std::string model, tokenizer, hellaswag, weights, out, raw_tokens = "no";
    std::string jsonl_field = kJsonlField;
    std::vector<std::string> data;
    int sequence_length = 0, batch_size = 8;
    ComputeOptions compute;
    RankOptions ranks;
    bool as_json = false, separate_documents = false;
};

struct TokenizerOptions {
    std::string tokenizer, in, out, pattern = "gpt2", file_pattern, format = "json";
    std::string special = "text", raw_tokens = "no";
    bool stats = false;
    std::string jsonl_field = kJsonlField;
    std::vector<std::string> data, documents;
    int vocab_size = 1024, threads = 0;
    uint64_t min_frequency = 1;
};

struct ShardOptions {
    ShardRequest request;
    std::string tokenizer = "gpt2";
    bool stats = false;
};

struct DumpOptions {
    std::string model, tokens, out;
    size_t steps = 0;
    AdamW adamw;
    ComputeOptions compute;
};

struct ExportOptions {
    std::string model, state, tokenizer, out, dtype = "fp32", max_shard_size;
};

struct PlanOptions {
    TrainOptions train;
    int vocab_size = 50257;
    std::string card;
    int nodes = 1;
    double link_gb_s = 50, node_link_gb_s = 0, share = 0;  // 0: as published for the card
};

// Every command's options, and which command was called.
struct Options {
    TrainOptions train;
    SampleOptions sample;
    EvaluateOptions evaluate;
    TokenizerOptions tokenizer;
    ShardOptions shard;
    DumpOptions dump;
    ExportOptions exporting;  // export is a keyword
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
        size_t first = word.find_first_not_of("+-");
        if (number && std::is_integral_v<T> && word[first] == '0' && first + 1 < word.size())
            return format("%s: leave out the 0 in front, which some read as octal", word.c_str());
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

inline void add_compute_options(CLI::App* app, ComputeOptions& o) {
    add_choice(
        app, "--dtype", o.dtype, {"auto", "fp32", "bf16"},
        "precision of products and of what they read and write; auto: bf16 where this machine "
        "has fast products for it, else fp32");
    add_choice(app, "--tf32", o.tf32, {"on", "off"},
               "float32 products of numbers rounded to 10 bits, on the tensor cores of a card "
               "(CUDA only)");
    add_choice(app, "--deterministic", o.deterministic, {"on", "off", "ranks"},
               "on: the same bits every time; ranks: for any number of GPUs too, at the same "
               "--batch-size and --total-batch-tokens, for more memory and messages; off: whatever "
               "is fastest (CUDA only)");
    add_number(app, "--threads", o.threads, 1, 4096, "N", "threads of the processor")
        ->default_str("all cores");
}

inline void add_model_options(CLI::App* app, ModelOptions& o) {
    app->option_defaults()->group("Model");
    const char* names =
        "tiny, small, medium, gpt2, gpt2-medium, gpt2-large, gpt2-xl, dN (a GPT-2 of N layers), "
        "a model FOLDER or an llm.c FILE.bin to go on from, or a config.json";
    add_text(app, "--model", o.model, "NAME|FOLDER|FILE", names)
        ->default_str("2 layers, 4 heads, 256 channels, context 64");
    add_number(app, "--layers", o.layers, 1, 1000, "N", "layers")->default_str("of --model");
    add_number(app, "--heads", o.heads, 1, 1000, "N", "attention heads; they divide the channels")
        ->default_str("of --model");
    add_number(app, "--channels", o.channels, 1, 1 << 16, "N", "width of the residual stream")
        ->default_str("of --model");
    add_number(app, "--context", o.context, 1, 1 << 20, "TOKENS", "positions of the model")
        ->default_str("of --model");
    add_number(app, "--dropout", o.dropout, 0, kMostDropout, "P", "probability of dropping a value")
        ->default_str(
            "0; up to 0.1 where the model is not given and goes over its text many times");
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

inline void add_rank_options(CLI::App* app, RankOptions& o) {
    app->option_defaults()->group("Several GPUs");
    add_number(app, "--gpus", o.gpus, 1, 1024, "N",
               "start N processes on this machine, one for each GPU; mpirun, srun and torchrun "
               "start them themselves")
        ->default_str("one process");
    add_text(app, "--rendezvous", o.rendezvous, "WHERE",
             "where the processes meet: host:port, on which rank 0 listens, or file:PATH, a folder "
             "that all see")
        ->default_str("as the launcher says");
    add_number(app, "--timeout", o.timeout_s, 1, 1e6, "SECONDS",
               "the job ends when a rank neither comes nor goes on for so long");
}

inline void add_sharding_options(CLI::App* app, TrainOptions& o) {
    add_number(app, "--zero", o.zero, 0, kZeroStages - 1, "STAGE",
               "what each process holds but a part of: 0 nothing, 1 the states of the optimizer, "
               "2 also the gradients, which are then sent for every batch");
    add_number(app, "--log-every", o.log_every, 0, kMaxSteps, "STEPS",
               "log how long each process computes in a step and waits for data, and say which "
               "holds up the others; 0: never");
    add_choice(app, "--reduce", o.reduce, {"fp32", "mixed", "bf16"},
               "how gradients are summed over the processes: in fp32 or bf16, or, mixed, sent in "
               "bf16 and added up in fp32");
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
    add_number(app, "--keep-every", o.keep_every, 0, kMaxSteps, "STEPS",
               "keep the checkpoints of these steps as well, for good; 0: none");
    add_choice(app, "--background-save", o.background_save, {"auto", "on", "off"},
               "save from a copy while training goes on; auto: where there is memory for it");
    add_number(app, "--save-retry", o.save_retry_s, 0, 86400, "SECONDS",
               "after a save that failed; the third failure in a row ends the run");
    add_number(app, "--max-bad-steps", o.max_bad_steps, 0, kMaxSteps, "N",
               "end after N steps in a row whose loss or gradient is not finite; each is skipped; "
               "0: go on for ever");
    add_number(app, "--spike-threshold", o.spike_threshold, 0, 1e9, "X",
               "report a loss X deviations above the mean of about 20 steps; 0: never");
    add_choice(app, "--on-spike", o.on_spike, {"report", "rollback"},
               format("rollback: go back to the last checkpoint and past the data of the spike, "
                      "%zu times in a run at most",
                      kMostRollbacks));
    add_number(app, "--early-stop", o.early_stop, 0, kMaxSteps, "N",
               "stop after N evaluations without gain; 0: never");
    app->add_flag("--overfit-one-batch", o.overfit_one_batch,
                  "train on the first batch only, a check of the whole machinery");
    add_text(app, "--out", o.out, "FOLDER", "the run folder")
        ->default_str("runs/NAME, of the data's name");
    add_text(app, "--resume", o.resume, "auto|never|FOLDER",
             "auto goes on with the run in --out, never sets it aside, FOLDER goes on "
             "with the run there");
    add_text(app, "--repeat", o.repeat, "FOLDER",
             "does the run in FOLDER again, into --out, and compares every loss; --resume auto "
             "goes on with one that was interrupted; no other option goes with it")
        ->default_str("");
}

inline void add_jsonl_field(CLI::App* app, std::string& field) {
    add_text(app, "--jsonl-field", field, "NAME",
             "of the text in lines of JSON; empty: .jsonl files are plain text");
}

inline void add_raw_tokens(CLI::App* app, std::string& raw) {
    add_choice(app, "--raw-tokens", raw, {"no", "uint16", "uint32"},
               "what .bin files without a header hold, such as nanoGPT's");
}

inline void add_train_options(CLI::App* app, TrainOptions& o) {
    app->option_defaults()->group("Data");
    add_paths(
        app, "--data", o.data,
        "text (files, folders) or token shards (.bin, .npy, a glob, a folder that `shard` made)");
    add_paths(
        app, "--val", o.val,
        "validation data; without it, that of a folder that `shard` made, or the last tenth of "
        "--data");
    add_text(app, "--tokenizer", o.tokenizer, "gpt2|bytes|chars|words|words:unk|bpe:SIZE|FILE",
             "for text; auto: that of a model FOLDER or of shards, else a bpe of a size that suits "
             "the text");
    add_choice(app, "--windows", o.windows, {"shuffled", "sliding", "random"},
               "what an epoch is made of: windows that follow one another, from another offset in "
               "each; one at every --stride; or as many at random places")
        ->default_str("shuffled");
    add_number(app, "--stride", o.stride, 1, 1 << 20, "TOKENS", "between sliding windows")
        ->default_str("the sequence length");
    app->add_flag("--separate-documents", o.separate_documents,
                  "leave the first token after each <|endoftext|> out of the loss, in training and "
                  "validation");
    add_raw_tokens(app, o.raw_tokens);
    add_jsonl_field(app, o.jsonl_field);
    add_model_options(app, o.model);
    add_length_options(app, o);
    add_rank_options(app, o.ranks);
    add_sharding_options(app, o);
    add_optimizer_options(app, o);
    app->option_defaults()->group("Computing");
    add_compute_options(app, o.compute);
    add_choice(app, "--recompute", o.recompute, {"auto", "0", "1", "2", "3"},
               "what backward computes again to save memory: 0 nothing, 1 GELU, 2 also layer "
               "norms, 3 the whole block; auto: the least that makes the run fit");
    add_watch_options(app, o);
}

inline void add_plan_options(CLI::App* app, PlanOptions& o) {
    add_train_options(app, o.train);
    add_number(app, "--vocab-size", o.vocab_size, 1, 1 << 20, "N", "tokens")->group("Model");
    app->get_option("--gpus")->description("GPUs of a node, as many processes");
    app->option_defaults()->group("A cluster, which need not be here");
    add_text(app, "--card", o.card, "NAME", "H100, A100, ...: its published rates and memory")
        ->default_str("what computes here");
    add_number(app, "--nodes", o.nodes, 1, kMostRanks, "N", "machines of --gpus GPUs each");
    add_number(app, "--link", o.link_gb_s, 1e-3, 1e6, "GB/S",
               "between nodes, for each GPU, in one direction; 50: an adapter of 400 Gb/s");
    add_number(app, "--node-link", o.node_link_gb_s, 1e-3, 1e6, "GB/S",
               "between GPUs of a node, in one direction")
        ->default_str("as published for the card");
    add_number(app, "--share", o.share, 1e-3, 1, "X",
               "part of the card's peak that forward and backward passes reach")
        ->default_str("as published for the card, else 0.6");
}

// Of commands that train nothing.
inline void add_weights_option(CLI::App* app, std::string& weights) {
    add_choice(app, "--weights", weights, {"fp32", "bf16", "int8"},
               "what the weights of products are rounded to: fp32 and bf16 as --dtype says, int8 a "
               "byte each and a scale for each row of them, which takes the least memory and time "
               "for a token (int8: CPU only)")
        ->default_str("as --dtype");
}

constexpr const char* kModelHelp = "a run or a model folder, or a model of llm.c";

inline void add_sample_options(CLI::App* app, SampleOptions& o) {
    add_text(app, "--model", o.model, "FOLDER|FILE.bin", kModelHelp);
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
    add_number(app, "--num-samples", o.num_samples, 1, 1e6, "N",
               format("samples to make, %d at a time where there is memory", kFewRows));
    add_text(app, "--out", o.out, "FILE", "write there")->default_str("standard output");
    add_weights_option(app, o.weights);
    add_compute_options(app, o.compute);
    add_rank_options(app, o.ranks);
}

inline void add_evaluate_options(CLI::App* app, EvaluateOptions& o) {
    add_text(app, "--model", o.model, "FOLDER|FILE.bin", kModelHelp);
    add_paths(app, "--data", o.data,
              "text or token shards; all of it is evaluated, of a folder that "
              "`shard` made the validation part");
    add_text(app, "--hellaswag", o.hellaswag, "FILE",
             "in place of --data: the share of HellaSwag's examples whose right ending has the "
             "lowest loss; its JSON lines, or llm.c's .bin of them");
    add_text(app, "--out", o.out, "FILE.jsonl",
             "with --hellaswag: gets the losses and predictions of every example, a line each");
    add_raw_tokens(app, o.raw_tokens);
    add_jsonl_field(app, o.jsonl_field);
    add_text(app, "--tokenizer", o.tokenizer, "gpt2|bytes|FILE", "in place of the folder's own");
    add_number(app, "--sequence-length", o.sequence_length, 1, 1 << 20, "TOKENS",
               "tokens in a window")
        ->default_str("the context");
    add_number(app, "--batch-size", o.batch_size, 1, 1 << 24, "N", "windows at a time, or endings");
    app->add_flag("--separate-documents", o.separate_documents,
                  "leave the first token after each <|endoftext|> out");
    app->add_flag("--json", o.as_json, "one JSON object in place of text");
    add_weights_option(app, o.weights);
    add_compute_options(app, o.compute);
    add_rank_options(app, o.ranks);
}

inline void add_tokenizer_file(CLI::App* app, TokenizerOptions& o) {
    add_text(app, "--tokenizer", o.tokenizer, "T",
             "gpt2, bytes, or a file: tokenizer.json, vocab.json, encoder.json, merges, .tiktoken, "
             "llm.c's tokenizer.bin, or a folder that holds one");
    add_choice(app, "--pattern", o.file_pattern, {"gpt2", "cl100k", "o200k", "cl100k-json"},
               "how text is split, for files that do not say it")
        ->default_str("of the file");
}

inline void add_tokenizer_commands(CLI::App* app, TokenizerOptions& o) {
    CLI::App* train = app->add_subcommand("train", "trains a byte-level BPE");
    add_paths(train, "--data", o.data, "text to train on");
    add_jsonl_field(train, o.jsonl_field);
    add_number(train, "--vocab-size", o.vocab_size, 257, 65536, "N", "tokens of the vocabulary");
    add_choice(train, "--pattern", o.pattern, {"gpt2", "cl100k", "o200k"},
               "how text is split before it is merged: as by GPT-2, GPT-4 or GPT-4o");
    add_number(train, "--min-frequency", o.min_frequency, 1, 1e15, "N",
               "pairs that are rarer in the text are not joined");
    add_number(train, "--threads", o.threads, 1, 4096, "N", "that count words")
        ->default_str("all cores");
    add_text(train, "--out", o.out, "FOLDER", "gets tokenizer.json and tokenizer_config.json");
    CLI::App* encode = app->add_subcommand("encode", "text to token ids");
    add_tokenizer_file(encode, o);
    add_paths(encode, "--in", o.documents,
              "text: a file, or several and folders, with <|endoftext|> between them")
        ->default_str("standard input");
    add_jsonl_field(encode, o.jsonl_field);
    add_text(encode, "--out", o.out, "FILE",
             "IDS.npy (int32) or SHARD.bin (uint16; uint32 for more than 65,536 tokens)")
        ->default_str("standard output, ids with spaces between");
    add_text(encode, "--special", o.special, "text|forbid|allow|NAME,...",
             "special tokens that the text spells: text, an error, or tokens; with names, these "
             "are tokens");
    add_number(encode, "--threads", o.threads, 1, 4096, "N", "for large texts")
        ->default_str("all cores");
    encode->add_flag("--stats", o.stats, "what the tokens are like, in place of them");
    CLI::App* decode = app->add_subcommand("decode", "token ids to text");
    add_tokenizer_file(decode, o);
    add_text(decode, "--in", o.in, "FILE", "ids: .npy, .bin, or numbers with spaces between")
        ->default_str("standard input");
    add_raw_tokens(decode, o.raw_tokens);
    add_text(decode, "--out", o.out, "FILE", "text")->default_str("standard output");
    CLI::App* convert = app->add_subcommand("convert", "from any known format to another");
    add_tokenizer_file(convert, o);
    add_choice(convert, "--format", o.format, {"json", "merges", "openai", "tiktoken", "llmc"},
               "json: tokenizer.json; merges: vocab.json and merges.txt; openai: encoder.json and "
               "vocab.bpe; tiktoken; llmc: its tokenizer.bin");
    add_text(convert, "--out", o.out, "PATH", "a FILE for tiktoken and llmc, else a FOLDER");
}

inline void add_shard_options(CLI::App* app, ShardOptions& o) {
    ShardRequest& r = o.request;
    add_paths(
        app, "--data", r.data,
        "text: plain files (a document each), .jsonl (a document a line), both also as .gz or "
        ".zst; folders of them");
    add_text(app, "--tokenizer", o.tokenizer, "gpt2|bytes|FILE", "made before");
    add_text(app, "--out", r.out, "FOLDER",
             "gets train_NNNNNN.bin, val.bin, the tokenizer and manifest.json; the same command "
             "goes on with what was interrupted");
    add_number(app, "--shard-tokens", r.shard_tokens, 1, INT_MAX, "TOKENS", "tokens in a shard");
    add_number(app, "--val-fraction", r.val_fraction, 0, 0.999, "X",
               "part of the tokens, at the end, that goes to val.bin");
    add_jsonl_field(app, r.jsonl_field);
    app->add_flag("--clean", r.clean,
                  "remove licences of Project Gutenberg, lines repeated more than 8 times, control "
                  "characters, and documents that were there before; compose characters (NFC)");
    app->add_flag("--stats", o.stats, "how long the documents are");
    add_number(app, "--threads", r.threads, 1, 4096, "N", "that read and encode")
        ->default_str("all cores");
}

inline void add_dump_options(CLI::App* app, DumpOptions& o) {
    add_text(app, "--model", o.model, "FOLDER|FILE.bin", kModelHelp);
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

inline void add_export_options(CLI::App* app, ExportOptions& o) {
    add_text(app, "--model", o.model, "FOLDER|FILE.bin", kModelHelp);
    add_text(app, "--state", o.state, "FILE.bin",
             "the state that llm.c saved beside its model: its moments are written as "
             "optimizer.safetensors, its float32 weights are taken");
    add_text(app, "--tokenizer", o.tokenizer, "gpt2|bytes|FILE", "in place of the model's own");
    add_text(app, "--out", o.out, "FOLDER|FILE.bin",
             "a new folder for the Hugging Face hub, or a new file for llm.c");
    add_choice(app, "--export-dtype", o.dtype, {"fp32", "bf16", "fp16"},
               "format of the weights; each is rounded to the nearest");
    auto size = [](std::string& word) {
        return parse_size(word) > 0 ? "" : format("%s: must be bytes, such as 5GB", word.c_str());
    };
    add_text(app, "--max-shard-size", o.max_shard_size, "SIZE",
             "most bytes in a file, such as 5GB or 500MB; above it, files and an index of them")
        ->check(CLI::Validator(size, ""))
        ->default_str("one file");
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
    add_export_options(app->add_subcommand("export",
                                           "a model in the form that other programs read: a "
                                           "folder for the hub, a file for llm.c"),
                       o.exporting);
    CLI::App* plan = app->add_subcommand("plan",
                                         "parameters, memory and time, before anything "
                                         "is allocated");
    add_plan_options(plan, o.plan);
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
// fail_input with the nearest one. Makes two words of `--option=`, for whose value the parser would
// take the next one.
inline void check_words(const CLI::App* app, std::vector<std::string>& words) {
    const CLI::App* command = app;
    for (size_t i = 0; i < words.size(); i++) {
        const std::string word = words[i];
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
        if (option->get_items_expected_max() == 0) continue;
        if (equals == word.size() - 1) {
            words[i] = name;
            words.insert(words.begin() + ptrdiff_t(i) + 1, "");
            equals = std::string::npos;
        }
        if (equals == std::string::npos) i++;  // its value
    }
    if (!command->get_subcommands({}).empty()) fail_unknown_command(command, "");
}

// The value of an option that a command cannot do without.
inline void require(const char* option, bool given) {
    if (!given) fail_input("%s is missing; --help says what it takes", option);
}

// ==== commands: train, plan ======================================================================

// The first record with which a run began, from its log.
inline json first_start(const std::string& folder) {
    std::string path = join_path(folder, "log.jsonl"), text = read_file(path);
    json record = json::parse(text.substr(0, text.find('\n')), nullptr, false);
    bool starts = record.is_object() && record.value("event", json()) == "start" &&
                  record.value("arguments", json()).is_array();
    if (!starts || record.value("step", json()) != 0)
        fail_input("%s: does not begin with the record of a run's start; it cannot be repeated",
                   path.c_str());
    return record;
}

// The losses of a log by step: those of training, and of validation where there are any.
inline std::map<size_t, std::pair<json, json>> losses_by_step(const std::string& folder) {
    std::map<size_t, std::pair<json, json>> losses;
    std::stringstream lines(read_file(join_path(folder, "log.jsonl")));
    for (std::string line; std::getline(lines, line);) {
        json record = json::parse(line, nullptr, false);
        if (!record.is_object() || record.contains("event")) continue;
        if (!record.value("step", json()).is_number_unsigned()) continue;
        losses[record["step"].get<size_t>()] = {record.value("train_loss", json()),
                                                record.value("val_loss", json())};
    }
    return losses;
}

// Says how far the logs of two runs agree; exit code 1 where they do not.
inline int compare_runs(const std::string& first, const std::string& second) {
    auto a = losses_by_step(first), b = losses_by_step(second);
    size_t same = 0;
    for (const auto& [step, losses] : a) {
        auto found = b.find(step);
        if (found == b.end())
            fail_machine("%s: has no step %zu, %s does; %zu steps are equal", second.c_str(), step,
                         first.c_str(), same);
        for (auto [x, y] : {std::pair(losses.first, found->second.first),
                            std::pair(losses.second, found->second.second)})
            if (x.dump() != y.dump())
                fail_machine("%s: step %zu: loss %s, and %s in %s; %zu steps before are equal",
                             second.c_str(), step, y.dump().c_str(), x.dump().c_str(),
                             first.c_str(), same);
        same++;
    }
    printf("repeated   all %zu steps have the same losses, to the last bit\n", same);
    return 0;
}

// What is given beside --repeat would be lost: a run is done again with its own options.
inline void check_repeat_options(const CLI::App& command, const TrainOptions& o) {
    for (const CLI::Option* option : command.get_options()) {
        std::string name = option->get_name();
        bool taken = name == "--repeat" || name == "--out" || name == "--resume";
        if (option->count() > 0 && !taken)
            fail_input(
                "%s: a run is repeated with its own options; only --out and --resume go "
                "with --repeat",
                name.c_str());
    }
    if (o.resume != "auto" && o.resume != "never")
        fail_input("--resume %s: with --repeat, auto or never", o.resume.c_str());
}

// The options with which the run in `folder` began, by the first record of its log, and what they
// leave to the machine as it was. fail_input where one process cannot do the same again.
inline TrainOptions repeated_options(const std::string& folder, const json& start) {
    Options options;
    CLI::App app;
    add_train_options(app.add_subcommand("train"), options.train);
    std::vector<std::string> words = {"train"};
    try {
        for (const json& word : start["arguments"]) words.push_back(word.get<std::string>());
        check_words(&app, words);
        std::reverse(words.begin(), words.end());  // as the parser takes them
        app.parse(words);
    } catch (const std::exception& error) {
        fail_input("%s: the arguments in its log: %s", folder.c_str(), error.what());
    }
    json settings = start.value("settings", json::object());
    if (settings.value("steps", json()) == 0)
        fail_input("%s: a run by the clock, whose rates follow the time; it cannot be repeated",
                   folder.c_str());
    if (start.contains("ranks"))
        fail_input("%s: a run of %zu ranks; one of a single process can be repeated",
                   folder.c_str(), start["ranks"].size());
    TrainOptions& o = options.train;
    std::string computing = start.value("computing", "");
    std::string dtype = computing.substr(0, computing.find_first_of(" ,"));
    if (!dtype.empty() && dtype != "fp32" && dtype != "bf16")
        fail_input("%s: a run in %s, in which this program does not compute", folder.c_str(),
                   one_line(dtype).c_str());
    if (!dtype.empty()) o.compute.dtype = dtype;
    o.compute.threads = settings.value("threads", 0);
    o.arguments = start["arguments"].get<std::vector<std::string>>();
    return options.train;
}

// Refuses a run that went on otherwise than it began, whose losses the options of its beginning do
// not give.
inline void check_went_on_alike(const std::string& folder, const json& start) {
    json began = start.value("settings", json::object());
    std::stringstream lines(read_file(join_path(folder, "log.jsonl")));
    for (std::string line; std::getline(lines, line);) {
        json record = json::parse(line, nullptr, false);
        if (!record.is_object() || record.value("event", json()) != "start") continue;
        auto changes = setting_changes(began, record.value("settings", json::object()));
        if (record.contains("ranks")) changes.push_back("several ranks went on with it");
        if (!changes.empty())
            fail_input("%s: went on otherwise than it began, and cannot be repeated: %s",
                       folder.c_str(), changes[0].c_str());
    }
}

// `train --repeat FOLDER`: the run there with the options with which it began, into another folder.
inline int repeat_command(const TrainOptions& asked, double start_s,
                          const std::string& how_to_go_on) {
    std::string first = without_slashes(fs::path(asked.repeat).lexically_normal().string());
    json start = first_start(first);
    TrainOptions o = repeated_options(first, start);
    check_went_on_alike(first, start);
    o.out = asked.out.empty() ? first + ".repeat" : asked.out;
    o.resume = asked.resume, o.repeat = "", o.program = asked.program;
    if (fs::weakly_canonical(fs::absolute(o.out)) == fs::weakly_canonical(fs::absolute(first)))
        fail_input("--out %s: holds the run that is to be repeated; give another folder",
                   o.out.c_str());
    for (auto [key, own] : {std::pair("program", gpt2_program()), {"version", gpt2_version()}})
        if (start.value(key, "") != own)
            fprintf(stderr, "note: that was %s %s, this is %s\n", key,
                    one_line(start.value(key, "unknown")).c_str(), own);
    {
        RankLink alone({}, {});
        Training training(o, start_s, how_to_go_on, alone);
        if (int code = training.run(); code != 0) return code;
    }
    return compare_runs(first, o.out);
}

constexpr const char* kOutOfMemory = "out of memory; a smaller model or batch needs less";

inline int print_error(const char* message, int code);

// Whether a rank says what ended the job: rank 0 does and, of what that cannot tell because it is
// lost itself, the rank behind it and the first of every machine.
inline bool says_failure(const Ranks& ranks, bool told) {
    return ranks.rank == 0 || (!told && (ranks.rank == 1 || ranks.local_rank == 0));
}

// How this rank meets the others and watches them. A rank that waits for the GPU when the job fails
// is ended from outside.
inline LinkOptions link_options(const RankOptions& o, const Ranks& ranks) {
    LinkOptions options;
    options.limit_s = options.timeout_s = o.timeout_s;
    options.program = gpt2_program();
    options.on_failure = [ranks](const RankFailure& failure) {
        if (says_failure(ranks, failure.told))
            print_error(failure.text.c_str(), int(failure.exit_code));
        _exit(int(failure.exit_code));
    };
    return options;
}

// What `command` returns or, where it fails on any rank, the first failure: thrown by who says it,
// and on the others the exit code.
inline int end_as_all(RankLink& link, const std::function<int(RankLink&)>& command) {
    const Ranks& ranks = link.ranks();
    auto fail = [&](int exit_code, const char* text) {
        Error first = link.report_failure(exit_code, text);
        if (says_failure(ranks, link.was_told())) throw first;
        return first.exit_code;
    };
    try {
        int code = command(link);
        link.finish(kPatience_s);  // rank 0 may be saving
        return code;
    } catch (const Error& error) {
        return fail(error.exit_code, error.what());
    } catch (const std::bad_alloc&) {
        if (ranks.world == 1) throw;
        return fail(kExitMachine, kOutOfMemory);
    } catch (const std::exception& error) {
        if (ranks.world == 1) throw;
        return fail(kExitMachine, error.what());
    }
}

// Runs `command` as one rank of a job, or alone. An error on any rank is an error of all.
inline int run_as_rank(const RankOptions& o, const Ranks& ranks,
                       const std::function<int(RankLink&)>& command) {
    if (std::string why = gpt2_alone(); ranks.world > 1 && !why.empty())
        fail_input("%d ranks, by %s: %s", ranks.world, ranks.source.c_str(), why.c_str());
    std::optional<RankLink> link;
    try {
        link.emplace(ranks, choose_meeting(ranks, o.rendezvous), link_options(o, ranks));
    } catch (const ToldError& error) { return error.exit_code; }
    // Other launchers can show a rank its own card alone, as srun --gpus-per-task=1 does.
    bool sees_all = ranks.source == kOwnVariables.source;
    return end_as_all(*link, [&](RankLink& own) {
        if (ranks.world > 1) gpt2_select_device(ranks.local_rank, sees_all);
        return command(own);
    });
}

// The same on every rank, which --gpus starts with the words `argv` of this command.
inline int run_on_ranks(const RankOptions& o, char** argv,
                        const std::function<int(RankLink&)>& command) {
    Ranks ranks = find_ranks();
    if (!must_start_ranks(ranks, o.gpus)) return run_as_rank(o, ranks, command);
    if (std::string why = gpt2_alone(); !why.empty())
        fail_input("--gpus %d: %s", o.gpus, why.c_str());
    RanksEnd end = run_ranks(o.gpus, own_program(argv[0]), argv);
    return end.text.empty() ? end.exit_code : print_error(end.text.c_str(), end.exit_code);
}

// `argv`: the words of this command.
inline int train_command(TrainOptions o, double start_s, const std::string& how_to_go_on,
                         char** argv = nullptr) {
    if (!o.repeat.empty()) return repeat_command(o, start_s, how_to_go_on);
    require("--data", !o.data.empty());
    return run_on_ranks(o.ranks, argv, [&](RankLink& link) {
        std::unique_ptr<FILE, int (*)(FILE*)> nowhere(nullptr, fclose);
        if (link.ranks().rank > 0) {
            nowhere.reset(fopen("/dev/null", "w"));
            o.screen = nowhere.get();
        }
        return Training(o, start_s, how_to_go_on, link).run();
    });
}

// How long a run takes, or how far it gets, where a step takes step_s.
inline void print_run_time(const Goal& goal, double step_s) {
    if (goal.steps > 0)
        printf("run        %s steps, about %s\n", with_commas(goal.steps).c_str(),
               readable_time(step_s * double(goal.steps)).c_str());
    if (goal.time_limit_s > 0)
        printf("run        %s, about %s steps\n", readable_time(goal.time_limit_s).c_str(),
               with_commas(size_t(goal.time_limit_s / step_s)).c_str());
}

// Time of a run on what computes here; none where nothing is known of its rate.
inline void print_time_plan(double step_operations, const Goal& goal, const PeakRate& peak) {
    printf("machine    %s\n", describe_machine(peak).c_str());
    if (peak.flops == 0) {
        printf("time       unknown, as the rate of this device is\n");
        return;
    }
    double step_s = step_operations / (kAssumedShare * peak.flops);
    printf("time       %.3g s a step at the peak (%s), about %.3g s at %.0f%% of it\n",
           step_operations / peak.flops, peak.source.c_str(), step_s, 100 * kAssumedShare);
    print_run_time(goal, step_s);
}

// Whether a plan is of cards by their published figures, and not of what computes here.
inline bool plans_cluster(const PlanOptions& p) {
    return !p.card.empty() || p.nodes > 1 || p.train.ranks.gpus > 1;
}

// The card that --card names or, without it, that is here; fail_input where neither is known.
inline const Card& choose_card(const PlanOptions& p) {
    const Card* card = find_card(p.card.empty() ? gpt2_device() : p.card);
    if (card != nullptr) return *card;
    std::string all;
    for (const Card& known : kCards) all += std::string(all.empty() ? "" : ", ") + known.name;
    fail_input("--card %s: must be one of %s",
               p.card.empty() ? "is missing" : one_line(p.card).c_str(), all.c_str());
}

inline Cluster choose_cluster(const PlanOptions& p, const Card& card) {
    constexpr double kGiga = 1e9, kTera = 1e12;
    Cluster c;
    c.gpus = std::max(p.train.ranks.gpus, 1), c.nodes = p.nodes;
    if (c.world() > kMostRanks)
        fail_input("--nodes %d: of %d GPUs each are more than the %d ranks that a job can have",
                   c.nodes, c.gpus, kMostRanks);
    c.flops = kTera * card.tflops, c.memory = kGiga * card.memory_gb_s;
    c.share = p.share > 0 ? p.share : card.share > 0 ? card.share : kAssumedShare;
    c.node_link = kGiga * (p.node_link_gb_s > 0 ? p.node_link_gb_s : card.node_link_gb_s);
    c.link = kGiga * p.link_gb_s;
    return c;
}

// The shape with which train_gpt2cu trains on a card that is not here, whichever program plans: in
// bf16, of which the rates are.
inline GPT2Shape card_shape(const TrainOptions& o, const GPT2Config& config, int T,
                            const Card& card, int world) {
    if (o.compute.dtype == "fp32")
        fail_input("--dtype fp32: a plan of %s is of its rates in bf16", card.name);
    GPT2Shape shape;
    shape.dtype = Dtype::bf16;
    shape.deterministic = o.compute.deterministic != "off";
    shape.B = o.batch_size, shape.T = T, shape.training = true;
    shape.generate = o.sample_every > 0 ? 1 : 0;
    shard(o, T, world, &shape);
    shape.recompute = choose_recompute(o.recompute, config, shape, size_t(1e9 * card.memory_gb));
    return shape;
}

// Time and rate of a step on a cluster, what bounds it, and what more GPUs lose.
inline void print_cluster_plan(const Card& card, const Cluster& c, const StepCost& cost,
                               const Goal& goal) {
    printf("cluster    %d node%s x %d %s of %.4g TFLOP/s and %s GB/s\n", c.nodes,
           c.nodes > 1 ? "s" : "", c.gpus, card.name, c.flops / 1e12,
           with_commas(size_t(c.memory / 1e9)).c_str());
    printf("links      %.4g GB/s a GPU within a node", c.node_link / 1e9);
    if (c.nodes > 1) printf(", %.4g GB/s a GPU between nodes", c.link / 1e9);
    printf("\n");
    printf(
        "assumed    passes at %.0f%% of the peak, updates at %.0f%% of memory's rate, sums at "
        "%.0f%% of a link's\n",
        100 * c.share, 100 * kMemoryShare, 100 * kLinkShare);
    printf("step       %.4g ms: passes %.4g, update %.3g, exposed communication %.3g (of %.3g)\n",
           1e3 * cost.step_s(), 1e3 * cost.passes_s, 1e3 * cost.update_s, 1e3 * cost.exposed_s,
           1e3 * cost.communication_s);
    printf("rate       %s tokens/s, %s a GPU; efficiency %.1f%% of one GPU\n",
           with_commas(size_t(cost.tokens_per_s())).c_str(),
           with_commas(size_t(cost.tokens_per_s() / c.world())).c_str(), 100 * efficiency(cost, c));
    printf("bound by   %s\n", bound_by(cost, c));
    print_run_time(goal, cost.step_s());
}

// Sizes, operations and time of a run, from its options alone: no memory is taken for the model.
inline int plan_command(const PlanOptions& p) {
    const TrainOptions& o = p.train;
    refuse_contradictions(o);
    bool elsewhere = plans_cluster(p);
    const Card* card = elsewhere ? &choose_card(p) : nullptr;
    Cluster cluster = elsewhere ? choose_cluster(p, *card) : Cluster();
    ModelChoice choice = choose_model(o.model);
    int T = choose_sequence_length(o.sequence_length, choice.config);
    if (!choice.fixed_vocab) choice.config.vocab_size = p.vocab_size;
    Goal goal{o.steps, o.time_limit_s};
    int micro_batches = accumulation(o, T, int(cluster.world()));
    size_t sequences = size_t(o.batch_size) * size_t(micro_batches) * size_t(cluster.world());
    if (!o.data.empty()) {
        TrainingData data = read_data(o, choice, cache_folder(o));
        check_length(o, data, T);
        choose_vocabulary(data, &choice);
        bool strides = o.windows == "sliding" && o.stride > 0;
        size_t windows = count_tokens(data.train) / size_t(strides ? o.stride : T);
        goal = choose_goal(o, data, windows, sequences);
        printf("data       %s\n", data.description.c_str());
    }
    if (o.data.empty() && o.epochs > 0)
        fprintf(stderr, "note: how many steps --epochs %g are shows with --data only\n", o.epochs);
    const GPT2Config& c = choice.config;
    GPT2Shape shape = elsewhere ? card_shape(o, c, T, *card, int(cluster.world()))
                                : training_shape(o, c, T, true, 1);
    size_t free = elsewhere ? size_t(1e9 * card->memory_gb) : gpt2_memory_free();
    printf("model      %d layers, %d heads, %d channels, context %d, vocabulary %s\n", c.layers,
           c.heads, c.channels, c.context, with_commas(size_t(c.vocab_size)).c_str());
    for (const std::string& line : size_report(c, shape)) printf("%s\n", line.c_str());
    for (const std::string& line : fit_report(c, shape, free)) printf("%s\n", line.c_str());
    printf("computing  %s\n", describe_computing(shape).c_str());
    double operations = operations_per_token(c, T), tokens = double(sequences) * T;
    printf("operations %s a token, %s a step of %s tokens\n", readable_rate(operations).c_str(),
           readable_rate(operations * tokens).c_str(), with_commas(size_t(tokens)).c_str());
    if (elsewhere)
        print_cluster_plan(*card, cluster, step_cost(c, shape, micro_batches, cluster), goal);
    else print_time_plan(operations * tokens, goal, gpt2_peak(shape));
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
    else tokenizer = tokenizer_of(folder, config);
    if (tokenizer && tokenizer->vocab_size() > config.vocab_size)
        fail_input("%s: a tokenizer of %d tokens, the model has a vocabulary of %d",
                   name.empty() ? folder.c_str() : name.c_str(), tokenizer->vocab_size(),
                   config.vocab_size);
    return tokenizer;
}

// Fills a model from a folder's weights; rank 0 says on stderr when they are of another precision.
inline void load_model_noted(GPT2* model, const std::string& folder, int rank = 0) {
    load_any_model(model, folder);
    std::string note = any_conversion_note(folder);
    if (!note.empty() && rank == 0) fprintf(stderr, "note: %s\n", note.c_str());
}

inline LoadedModel load_for_inference(const std::string& path, const std::string& tokenizer,
                                      GPT2Shape shape, int rank = 0) {
    std::string folder = resolve_model(path);
    GPT2Config config = read_any_config(folder);
    config.dropout = 0;
    LoadedModel loaded{nullptr, model_tokenizer(tokenizer, folder, config)};
    shape.T = std::min(shape.T, config.context);
    loaded.model.reset(gpt2_create(config, shape, rank));
    load_model_noted(loaded.model.get(), folder, rank);
    return loaded;
}

// The prompt as tokens; rank 0 says on stderr what cannot be kept of it.
inline std::vector<int> prompt_tokens(const std::string& prompt, const Tokenizer& tokenizer,
                                      int context, int rank) {
    std::string missing;
    std::vector<int> ids;
    with_place([] { return std::string("--prompt"); },
               [&] { tokenizer.encode(prompt, ids, &missing); });
    if (!missing.empty() && rank == 0)
        fprintf(stderr,
                "note: characters of the prompt that the vocabulary lacks are dropped: %s\n",
                one_line(missing).c_str());
    std::vector<int> tokens = starting_tokens(ids, tokenizer, context);
    if (ids.size() > tokens.size() && rank == 0)
        fprintf(stderr, "note: the prompt has %zu tokens, the context %d: its last %zu are used\n",
                ids.size(), context, tokens.size());
    return tokens;
}

// Where samples go: a file, or standard output as they come. False: nobody reads any more.
class SampleOutput {
  public:
    explicit SampleOutput(const std::string& path) {
        if (!path.empty()) file_.emplace(path);
    }
    bool emit(std::string_view bytes) {
        if (file_) return file_->write(bytes.data(), bytes.size()), true;
        return fwrite(bytes.data(), 1, bytes.size(), stdout) == bytes.size() && fflush(stdout) == 0;
    }
    void commit() {
        if (file_) file_->commit();
    }

  private:
    std::optional<AtomicFile> file_;
};

// Texts that grow side by side, put out in order: the first that is not whole as its bytes come,
// and those behind it when their turn is there. emit says whether anybody reads.
class SamplesInOrder {
  public:
    SamplesInOrder(size_t samples, std::function<bool(std::string_view)> emit)
        : texts_(samples), whole_(samples), emit_(std::move(emit)) {}

    bool add(size_t i, std::string_view bytes, bool last) {
        texts_[i] += bytes;
        whole_[i] = last;
        for (; turn_ < texts_.size(); turn_++) {
            if (!texts_[turn_].empty() && !emit_(texts_[turn_])) return false;
            texts_[turn_].clear();
            if (!whole_[turn_]) break;
        }
        return true;
    }

  private:
    std::vector<std::string> texts_;  // what waits of each
    std::vector<bool> whole_;
    size_t turn_ = 0;
    std::function<bool(std::string_view)> emit_;
};

// How many samples are made at a time: as many as are asked for, up to kFewRows, as activations of
// the shape hold and as fit into memory.
inline int samples_together(const GPT2Config& config, GPT2Shape shape, size_t wanted) {
    shape.T = std::min(shape.T, config.context);
    shape.generate = int(std::min({wanted, size_t(kFewRows), size_t(shape.T)}));
    size_t free = shape.generate > 1 ? gpt2_memory_free() : 0;
    while (shape.generate > 1 && free > 0 && !fits(config, shape, free)) shape.generate--;
    return shape.generate;
}

// Makes samples [first, last) of those that were asked for together; false: nobody reads any more.
inline bool make_samples(const SampleOptions& o, const LoadedModel& loaded,
                         const std::vector<int>& prompt, size_t first, size_t last,
                         const std::function<bool(std::string_view)>& emit) {
    SamplesInOrder texts(last - first, emit);
    std::vector<Sampler> samplers;
    for (size_t i = first; i < last; i++) {
        std::string heading =
            format("== sample %zu of %zu, seed %zu ==\n", i + 1, o.num_samples, size_t(o.seed + i));
        samplers.emplace_back(o.sampler, o.seed + i);
        if (!texts.add(i - first, (o.num_samples > 1 ? heading : "") + o.prompt, false))
            return false;
    }
    bool read = true;
    generate_texts(loaded.model.get(), *loaded.tokenizer, prompt, o.max_new_tokens, samplers,
                   [&](size_t i, std::string_view bytes, bool ends) {
                       return read = texts.add(i, std::string(bytes) + (ends ? "\n" : ""), ends);
                   });
    return read;
}

// Samples in turns, each rank some of them: rank 0 writes its own as their tokens come, and the
// others' behind them.
inline int sample_on_rank(const SampleOptions& o, RankLink& link) {
    int rank = link.ranks().rank, world = link.ranks().world;
    GPT2Config config = read_any_config(resolve_model(o.model));
    GPT2Shape shape = choose_shape(o.compute, o.weights);
    shape.T = 128;  // a longer prompt goes in by parts
    size_t turn = std::min((o.num_samples + size_t(world) - 1) / size_t(world), size_t(kFewRows));
    shape.generate = samples_together(config, shape, turn);
    LoadedModel loaded = load_for_inference(o.model, o.tokenizer, shape, rank);
    if (!loaded.tokenizer)
        fail_input("%s: there is no tokenizer; name one with --tokenizer", o.model.c_str());
    std::vector<int> tokens = prompt_tokens(o.prompt, *loaded.tokenizer, config.context, rank);
    SampleOutput output(rank == 0 ? o.out : "");
    bool read = true;
    for (size_t round = 0; round < o.num_samples && read; round += turn * size_t(world)) {
        std::string own;
        size_t begin = std::min(o.num_samples, round + turn * size_t(rank));
        size_t end = std::min(o.num_samples, begin + turn);
        auto emit = [&](std::string_view bytes) {
            return rank == 0 ? output.emit(bytes) : (own += bytes, true);
        };
        size_t together = size_t(shape.generate);
        for (size_t first = begin; first < end && read; first += together)
            read = make_samples(o, loaded, tokens, first, std::min(end, first + together), emit);
        if (world == 1) continue;
        for (const std::string& text : gather_long(link, "samples", own, kPatience_s))
            read = read && output.emit(text);
        read = link.broadcast("samples", read ? "on" : "", kPatience_s) == "on";
    }
    output.commit();
    return 0;
}

inline int sample_command(const SampleOptions& o, char** argv) {
    require("--model", !o.model.empty());
    check_sampler_options(o.sampler);
    return run_on_ranks(o.ranks, argv, [&](RankLink& link) { return sample_on_rank(o, link); });
}

// --data of `evaluate`, all of it.
inline std::vector<Shard> evaluation_shards(const EvaluateOptions& o, const LoadedModel& loaded) {
    std::vector<std::string> paths = expand_paths(o.data, ShardPart::val);
    std::vector<Shard> shards;
    if (are_shards(paths)) {
        if (loaded.tokenizer) check_manifest_tokenizer(paths, *loaded.tokenizer);
        for (const std::string& path : paths)
            shards.emplace_back(path, gpt2_config(loaded.model.get()).vocab_size,
                                raw_tokens(o.raw_tokens));
        return shards;
    }
    if (!loaded.tokenizer)
        fail_input("%s: there is no tokenizer; name one with --tokenizer", o.model.c_str());
    std::error_code error;
    std::string meanwhile = fs::temp_directory_path(error).string();
    if (error)
        fail_machine("TMPDIR: %s; set it to a folder that can be written to",
                     error.message().c_str());
    // A shard outlives its file, so that nothing of this stays behind.
    TemporaryFolder folder(temporary_name(join_path(meanwhile, gpt2_program())));
    TextCorpus corpus = read_text(o.data, o.jsonl_field);
    shards.push_back(text_shard(corpus, 0, corpus.text.size(), *loaded.tokenizer, folder.path()));
    if (shards[0].size() < 2)
        fail_input("%s: a single token leaves nothing to predict; give more text",
                   o.data[0].c_str());
    return shards;
}

// The loss of every target of a batch, for score_choices.
inline TargetLosses target_losses(GPT2* model) {
    const GPT2Shape& shape = gpt2_shape(model);
    std::vector<real> host(size_t(shape.B) * size_t(shape.T));
    return [model, host](const int* inputs, const int* targets, int rows, int T,
                         double* losses) mutable {
        gpt2_forward(model, inputs, targets, rows, T, GPT2Pass{});
        gpt2_activation_out(model, a_losses, 0, host.data());
        std::copy(host.begin(), host.begin() + ptrdiff_t(size_t(rows) * size_t(T)), losses);
    };
}

// A line for each example: its label, the loss of each ending (a sum over `tokens` targets), and
// what was predicted from the sums and from the means.
inline void write_choice_lines(AtomicFile* file, const std::vector<ChoiceExample>& examples,
                               const std::vector<ChoiceScore>& scores) {
    for (size_t i = 0; i < scores.size(); i++) {
        ordered_json line;
        line["example"] = i;
        line["label"] = examples[i].label;
        line["losses"] = scores[i].loss;
        line["tokens"] = scores[i].tokens;
        line["prediction"] = scores[i].prediction();
        line["prediction_norm"] = scores[i].prediction_norm();
        std::string text = json_text(line, -1) + "\n";
        file->write(text.data(), text.size());
    }
    file->commit();
}

// The scores of all examples, on rank 0, from the ranks that made them.
inline void gather_scores(std::vector<ChoiceScore>* scores, RankLink& link) {
    static_assert(std::is_trivially_copyable_v<ChoiceScore>);
    int rank = link.ranks().rank, world = link.ranks().world;
    if (world == 1) return;
    auto [first, last] = part_of_rank(scores->size(), rank, world);
    std::string own(reinterpret_cast<const char*>(scores->data() + first),
                    (last - first) * sizeof(ChoiceScore));
    std::vector<std::string> all = gather_long(link, "the scores", own, kPatience_s);
    for (int r = 0; r < int(all.size()); r++) {
        auto [begin, end] = part_of_rank(scores->size(), r, world);
        if (all[size_t(r)].size() != (end - begin) * sizeof(ChoiceScore))
            fail_machine("rank %d: scores of %zu bytes", r, all[size_t(r)].size());
        memcpy(static_cast<void*>(scores->data() + begin), all[size_t(r)].data(),
               all[size_t(r)].size());
    }
}

// `evaluate --hellaswag`: see hellaswag.h for what is computed.
inline int hellaswag_on_rank(const EvaluateOptions& o, RankLink& link) {
    double start_s = now_s();
    int rank = link.ranks().rank, world = link.ranks().world;
    std::string folder = resolve_model(o.model);
    GPT2Config config = read_any_config(folder);
    std::optional<Tokenizer> tokenizer = model_tokenizer(o.tokenizer, folder, config);
    std::optional<AtomicFile> out;  // opened before what takes long
    if (rank == 0 && !o.out.empty()) out.emplace(o.out);
    std::vector<ChoiceExample> examples =
        read_hellaswag(o.hellaswag, tokenizer ? &*tokenizer : nullptr, config.vocab_size);
    GPT2Shape shape = choose_shape(o.compute, o.weights);
    int context = choose_sequence_length(o.sequence_length, config);
    shape.B = o.batch_size;
    shape.T = int(std::min(size_t(context), longest_choice(examples)));
    LoadedModel loaded = load_for_inference(o.model, o.tokenizer, shape, rank);
    std::vector<ChoiceScore> scores =
        score_choices(examples, shape.B, shape.T, target_losses(loaded.model.get()), rank, world);
    gather_scores(&scores, link);
    if (rank > 0) return 0;
    ChoiceResult result = count_choices(examples, scores);
    if (result.rows_cut > 0)
        fprintf(stderr,
                "note: %s of %s endings are longer than %d tokens with their context, and were cut "
                "from the left\n",
                with_commas(result.rows_cut).c_str(), with_commas(4 * result.examples).c_str(),
                context);
    if (out) write_choice_lines(&*out, examples, scores);
    if (!o.as_json) {
        printf("acc_norm %.4f (%s of %s), acc %.4f (%s), give or take %.4f\n", result.acc_norm(),
               with_commas(result.correct_norm).c_str(), with_commas(result.examples).c_str(),
               result.acc(), with_commas(result.correct).c_str(), result.standard_error());
        printf("the right endings: %.4f nats a token, weights in %s\n", result.loss,
               weights_name(shape));
        return 0;
    }
    ordered_json root;
    root["hellaswag"] = o.hellaswag;
    root["examples"] = result.examples;
    root["acc"] = result.acc();
    root["acc_norm"] = result.acc_norm();
    root["correct"] = result.correct;
    root["correct_norm"] = result.correct_norm;
    root["standard_error"] = result.standard_error();
    root["loss"] = result.loss;
    root["rows_cut"] = result.rows_cut;
    root["weights"] = weights_name(shape);
    root["sequence_length"] = context;
    root["seconds"] = now_s() - start_s;
    printf("%s\n", json_text(root, -1).c_str());
    return 0;
}

// `evaluate --data`, whose batches the ranks take in turns.
inline int evaluate_on_rank(const EvaluateOptions& o, RankLink& link) {
    GPT2Config config = read_any_config(resolve_model(o.model));
    GPT2Shape shape = choose_shape(o.compute, o.weights);
    shape.B = o.batch_size, shape.T = choose_sequence_length(o.sequence_length, config);
    LoadedModel loaded = load_for_inference(o.model, o.tokenizer, shape, link.ranks().rank);
    std::vector<Shard> shards = evaluation_shards(o, loaded);
    std::vector<int> bytes;
    if (loaded.tokenizer) bytes = bytes_per_token(*loaded.tokenizer);
    int separator = o.separate_documents ? document_separator(loaded.tokenizer) : -1;
    Evaluation e =
        evaluate_model(loaded.model.get(), shards, bytes, shape.B, shape.T, 0, separator, &link);
    if (link.ranks().rank > 0) return 0;
    if (!o.as_json) {
        printf("%s\n%s tokens in %s windows of %d, weights in %s, %.1f s\n",
               describe_evaluation(e).c_str(), with_commas(e.tokens).c_str(),
               with_commas(e.windows).c_str(), shape.T, weights_name(shape), e.seconds);
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
    root["weights"] = weights_name(shape);
    root["seconds"] = e.seconds;
    printf("%s\n", json_text(root, -1).c_str());
    return 0;
}

inline int evaluate_command(const EvaluateOptions& o, char** argv) {
    require("--model", !o.model.empty());
    bool choices = !o.hellaswag.empty();
    if (choices && !o.data.empty()) fail_input("--data and --hellaswag: give one of them");
    if (!choices && !o.out.empty()) fail_input("--out: is for --hellaswag");
    std::error_code ignored;
    if (choices && fs::equivalent(o.hellaswag, o.out, ignored))
        fail_input("--out %s: is the file of --hellaswag; give another", o.out.c_str());
    require("--data", choices || !o.data.empty());
    return run_on_ranks(o.ranks, argv, [&](RankLink& link) {
        return choices ? hellaswag_on_rank(o, link) : evaluate_on_rank(o, link);
    });
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

// A line that is drawn over and over where `file` is a terminal; nothing elsewhere.
inline std::function<void(int, int)> training_bar(FILE* file) {
    if (!isatty(fileno(file))) return nullptr;
    return [file](int done, int most) {
        constexpr int kWidth = 30;
        int full = most > 0 ? int(int64_t(kWidth) * done / most) : kWidth;
        std::string bar = std::string(size_t(full), '#') + std::string(size_t(kWidth - full), '.');
        fprintf(file, "\r%s %s of %s merges", bar.c_str(), with_commas(size_t(done)).c_str(),
                with_commas(size_t(most)).c_str());
        if (done == most) fprintf(file, "\r\033[K");
        fflush(file);
    };
}

inline int tokenizer_train_command(const TokenizerOptions& o) {
    require("--data", !o.data.empty());
    require("--out", !o.out.empty());
    TextCorpus corpus = read_text(o.data, o.jsonl_field);
    double start_s = now_s();
    BpeTraining training;
    training.pattern = pattern_of(o.pattern);
    training.min_frequency = o.min_frequency;
    training.threads = o.threads;
    training.document_ends = corpus.document_ends;
    training.progress = training_bar(stderr);
    Tokenizer tokenizer = Tokenizer::train_bpe(corpus.text, o.vocab_size, training);
    make_folder(o.out);
    tokenizer.save(o.out);
    printf("%s: %d tokens from %s bytes in %.1f s\n", o.out.c_str(), tokenizer.vocab_size(),
           with_commas(corpus.text.size()).c_str(), now_s() - start_s);
    return 0;
}

inline Tokenizer given_tokenizer(const TokenizerOptions& o) {
    require("--tokenizer", !o.tokenizer.empty());
    std::error_code ignored;
    if (o.file_pattern.empty() || !fs::exists(o.tokenizer, ignored))
        return load_tokenizer(o.tokenizer);
    return Tokenizer::load(o.tokenizer, pattern_of(o.file_pattern));
}

// Encodes every document as --special says, with the end of text between them.
inline std::vector<int> encode_corpus(const TokenizerOptions& o, const TextCorpus& corpus,
                                      const Tokenizer& tokenizer, std::string* missing) {
    bool plain = o.special == "text", forbid = o.special == "forbid";
    std::vector<std::string> names;
    for (size_t begin = 0; !plain && begin <= o.special.size();) {
        size_t end = std::min(o.special.find(',', begin), o.special.size());
        names.push_back(o.special.substr(begin, end - begin));
        begin = end + 1;
    }
    if (forbid || o.special == "allow") names = {"all"};
    std::vector<int> specials, ids;
    if (!plain) specials = tokenizer.special_tokens(names);
    size_t begin = 0;
    for (size_t i = 0; i < corpus.document_ends.size(); begin = corpus.document_ends[i++]) {
        std::string_view text(corpus.text);
        text = text.substr(begin, corpus.document_ends[i] - begin);
        if (begin > 0 && tokenizer.end_of_text() >= 0) ids.push_back(tokenizer.end_of_text());
        with_place([&] { return corpus.place(i, 0); },
                   [&] {
                       if (plain) tokenizer.encode(text, ids, missing, o.threads);
                       else tokenizer.encode_specials(text, specials, forbid, ids, missing);
                   });
    }
    return ids;
}

// What a reader wants to know of a tokenizer on a text: how far it compresses, which ids are never
// used, and how long documents are, which says what context would hold them.
inline void print_token_stats(const std::vector<int>& ids, size_t bytes,
                              const Tokenizer& tokenizer) {
    std::vector<size_t> count(size_t(tokenizer.vocab_size())), lengths = {0};
    for (int id : ids) {
        count[size_t(id)]++;
        if (id == tokenizer.end_of_text()) lengths.push_back(0);
        else lengths.back()++;
    }
    size_t unused = size_t(std::count(count.begin(), count.end(), size_t(0)));
    double entropy = 0, total = std::max(1.0, double(ids.size()));
    for (size_t n : count)
        if (n > 0) entropy -= double(n) / total * std::log2(double(n) / total);
    printf("bytes        %s\n", with_commas(bytes).c_str());
    printf("tokens       %s, %.3f bytes each\n", with_commas(ids.size()).c_str(),
           double(bytes) / total);
    printf("entropy      %.3f bits a token, %.3f bits a byte, taking each token alone\n", entropy,
           entropy * double(ids.size()) / std::max(1.0, double(bytes)));
    printf("ids          %s of %s never used\n", with_commas(unused).c_str(),
           with_commas(count.size()).c_str());
    std::vector<int> order(count.size());
    std::iota(order.begin(), order.end(), 0);
    size_t shown = std::min<size_t>(order.size() - unused, 10);
    std::partial_sort(order.begin(), order.begin() + ptrdiff_t(shown), order.end(),
                      [&](int a, int b) {
                          return std::pair(count[size_t(b)], a) < std::pair(count[size_t(a)], b);
                      });
    for (size_t i = 0; i < shown; i++)
        printf("  %8d   %5.2f%%  %s\n", order[i], 100 * double(count[size_t(order[i])]) / total,
               json(std::string(tokenizer.token_bytes(order[i])))
                   .dump(-1, ' ', true, json::error_handler_t::replace)
                   .c_str());
    if (lengths.size() > 1 && lengths.back() == 0) lengths.pop_back();  // ids end on one
    Lengths documents;
    for (size_t length : lengths) documents.add(length);
    size_t context = documents.suggested_context(), most = documents.quantile(0.9);
    printf(
        "documents    %s, of %s to %s tokens; half have at most %s, nine in ten %s, 99 in 100 "
        "%s\n",
        with_commas(documents.documents()).c_str(), with_commas(documents.least()).c_str(),
        with_commas(documents.most()).c_str(), with_commas(documents.quantile(0.5)).c_str(),
        with_commas(most).c_str(), with_commas(documents.quantile(0.99)).c_str());
    printf("context      %s holds nine in ten documents whole%s\n", with_commas(context).c_str(),
           most >= context ? ", or as much as is supported" : "");
}

inline int encode_command(const TokenizerOptions& o) {
    bool shard = o.out.ends_with(".bin");
    if (!o.out.empty() && o.stats) fail_input("--stats: in place of ids; leave out --out");
    if (!o.out.empty() && !shard && !o.out.ends_with(".npy"))
        fail_input(
            "--out %s: must end in .npy or .bin; numbers go to standard output, without "
            "--out",
            o.out.c_str());
    Tokenizer tokenizer = given_tokenizer(o);
    TextCorpus corpus;
    std::error_code ignored;
    bool one = o.documents.size() == 1 && fs::is_regular_file(o.documents[0], ignored) &&
               !is_json_lines(o.documents[0]) && packing_of(o.documents[0]) == Packing::none;
    if (o.documents.empty() || one) {
        corpus.text = read_input(o.documents.empty() ? "" : o.documents[0]);
        corpus.document_ends = {corpus.text.size()};
        corpus.files = {{0, o.documents.empty() ? "standard input" : o.documents[0]}};
    } else {
        corpus = read_text(o.documents, o.jsonl_field);
    }
    std::string missing;
    std::vector<int> ids = encode_corpus(o, corpus, tokenizer, &missing);
    if (!missing.empty())
        fprintf(stderr, "note: characters that the vocabulary lacks are dropped: %s\n",
                one_line(missing).c_str());
    if (o.stats) {
        print_token_stats(ids, corpus.text.size(), tokenizer);
        return 0;
    }
    if (shard) write_shard(o.out, ids, false, shard_width(tokenizer.vocab_size()));
    else if (!o.out.empty()) write_npy(o.out, ids, {ids.size()});
    if (!o.out.empty()) return 0;
    std::string line;
    for (size_t i = 0; i < ids.size(); i++) line += (i == 0 ? "" : " ") + std::to_string(ids[i]);
    line += "\n";
    fwrite(line.data(), 1, line.size(), stdout);
    return 0;
}

// Ids as encode writes them: a .npy file, or numbers with white space between. `offset` is where
// the text begins in the file.
inline std::vector<int> parse_ids(const std::string& text, const std::string& path,
                                  size_t offset = 0) {
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
                       path.empty() ? "standard input" : path.c_str(),
                       offset + size_t(at - text.c_str()));
        ids.push_back(int(id));
        at = end;
    }
}

// Fails on ids that the vocabulary lacks; `before`: how many come before them in `path`.
inline void check_ids(const std::vector<int>& ids, const Tokenizer& tokenizer,
                      const std::string& path, size_t before = 0) {
    for (size_t i = 0; i < ids.size(); i++)
        if (ids[i] < 0 || ids[i] >= tokenizer.vocab_size())
            fail_input(
                "%s: number %zu is %d, the vocabulary has ids 0 to %d; give the --tokenizer "
                "that they are from",
                path.empty() ? "standard input" : path.c_str(), before + i + 1, ids[i],
                tokenizer.vocab_size() - 1);
}

// Decodes numbers from standard input as they come, so that what another program generates can be
// read while it does; a character is written when its last byte is there. Ends early where nobody
// reads, or the disk is full: run() says which.
inline void decode_stream(const Tokenizer& tokenizer) {
    std::string word, held;
    size_t at = 0, words = 0;
    auto take_word = [&] {
        if (word.empty()) return;
        std::vector<int> id = parse_ids(word, "", at - word.size());
        check_ids(id, tokenizer, "", words);
        held += tokenizer.decode_next(id.at(0), words++ == 0);
        word.clear();
        size_t whole = held.size() - unfinished_bytes(held);
        fwrite(held.data(), 1, whole, stdout);
        held.erase(0, whole);
    };
    char buffer[1 << 16];
    for (ssize_t size; (size = read(STDIN_FILENO, buffer, sizeof buffer)) != 0;) {
        if (size < 0 && errno == EINTR) continue;
        if (size < 0) fail_machine("standard input: cannot read: %s", strerror(errno));
        if (at == 0 && std::string_view(buffer, size_t(size)).starts_with("\x93NUMPY"))
            fail_input("standard input: a .npy file; name it with --in");
        for (ssize_t i = 0; i < size; i++, at++) {
            if (strchr(" \t\r\n", buffer[i]) != nullptr && buffer[i] != '\0') take_word();
            else word += buffer[i];
        }
        if (fflush(stdout) != 0 || ferror(stdout)) return;
    }
    take_word();
    fwrite(held.data(), 1, held.size(), stdout);
}

inline int decode_command(const TokenizerOptions& o) {
    Tokenizer tokenizer = given_tokenizer(o);
    if (o.in.empty() && o.out.empty()) {
        decode_stream(tokenizer);
        return 0;
    }
    std::vector<int> ids;
    if (fs::path(o.in).extension() == ".bin") {
        Shard shard(o.in, tokenizer.vocab_size(), raw_tokens(o.raw_tokens));
        ids.resize(shard.size());
        shard.copy(0, ids.size(), ids.data());
    } else {
        ids = parse_ids(read_input(o.in), o.in);
    }
    check_ids(ids, tokenizer, o.in);
    std::string text = tokenizer.decode(ids);
    if (!o.out.empty()) write_file_atomic(o.out, text);
    else fwrite(text.data(), 1, text.size(), stdout);
    return 0;
}

inline int convert_command(const TokenizerOptions& o) {
    require("--out", !o.out.empty());
    Tokenizer tokenizer = given_tokenizer(o);
    const std::pair<const char*, TokenizerFormat> formats[] = {
        {"json", TokenizerFormat::json},
        {"merges", TokenizerFormat::merges},
        {"openai", TokenizerFormat::openai},
        {"tiktoken", TokenizerFormat::tiktoken},
        {"llmc", TokenizerFormat::llmc}};
    for (auto [name, format_to] : formats)
        if (o.format == name)
            for (const std::string& note : tokenizer.save_as(format_to, o.out))
                fprintf(stderr, "note: %s: %s\n", o.out.c_str(), note.c_str());
    printf("%s: %d tokens\n", o.out.c_str(), tokenizer.vocab_size());
    return 0;
}

// What `shard` did: what was taken away, how long documents are, and how much there is.
inline void print_shard_report(const ShardOptions& o, const ShardReport& report) {
    const CorpusTotals& totals = report.totals;
    const char* out = o.request.out.c_str();
    for (size_t kind = 0; o.request.clean && kind < kRemovedKinds; kind++)
        if (totals.removed.count[kind] > 0)
            printf("cleaned    %s %s, %lld bytes\n",
                   with_commas(size_t(totals.removed.count[kind])).c_str(),
                   kRemovedNames[kind].text, static_cast<long long>(totals.removed.bytes[kind]));
    if (totals.lost_bytes > 0)
        fprintf(stderr, "note: %s bytes are characters that the vocabulary lacks; dropped\n",
                with_commas(totals.lost_bytes).c_str());
    if (o.stats) {
        auto length = [&](const char* key) {
            return with_commas(report.document_tokens.value(key, size_t(0)));
        };
        printf(
            "documents  %s, of %s to %s tokens; half have at most %s, nine in ten %s, 99 in 100 "
            "%s\n",
            with_commas(totals.documents).c_str(), length("min").c_str(), length("max").c_str(),
            length("median").c_str(), length("p90").c_str(), length("p99").c_str());
        bool less = report.document_tokens.value("p90", size_t(0)) >=
                    report.document_tokens.value("context", size_t(0));
        printf("context    %s holds nine in ten documents whole%s\n", length("context").c_str(),
               less ? ", or as much as is supported" : "");
    }
    printf("%s: %s training and %s validation tokens in %s files, of %s documents, %s bytes%s\n",
           out, with_commas(report.train_tokens).c_str(), with_commas(report.val_tokens).c_str(),
           with_commas(report.files).c_str(), with_commas(totals.documents).c_str(),
           with_commas(totals.bytes).c_str(), report.was_complete ? "; it was ready already" : "");
}

inline int shard_command(ShardOptions o) {
    require("--data", !o.request.data.empty());
    require("--out", !o.request.out.empty());
    Tokenizer tokenizer = load_tokenizer(o.tokenizer);
    o.request.tokenizer_name = o.tokenizer;
    double start_s = now_s();
    size_t first = SIZE_MAX;
    o.request.on_file = [&](const std::string& path, size_t tokens, size_t so_far) {
        if (first == SIZE_MAX) first = so_far - tokens;
        printf("%s: %s tokens, %s a second\n", path.c_str(), with_commas(tokens).c_str(),
               with_commas(size_t(double(so_far - first) / (now_s() - start_s))).c_str());
        fflush(stdout);
    };
    ShardReport report = build_shards(o.request, tokenizer);
    if (report.resumed_tokens > 0 && !report.was_complete)
        printf("resumed    %s tokens were there\n", with_commas(report.resumed_tokens).c_str());
    print_shard_report(o, report);
    return 0;
}

// ==== commands: dump, export, info ===============================================================

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
            read_hf_tensor(*host, gpt2_config(model), tensors_of(model), group, index, layer);
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
    std::string folder = resolve_model(o.model);
    GPT2Config config = read_any_config(folder);
    config.dropout = 0;
    DumpBatch batch = read_dump_batch(o.tokens, config);
    shape.B = batch.B, shape.T = batch.T, shape.training = true;
    GPT2Ptr model(gpt2_create(config, shape));
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

// What an imported state cannot say, for people.
inline void print_state_note(const LlmcState& state) {
    fprintf(stderr,
            "note: %s: step %d, its moments are in optimizer.safetensors; the place in the data%s "
            "and the random numbers of llm.c have no counterpart here, so that `train --model` "
            "starts from the weights with new moments, and --resume cannot\n",
            state.path().c_str(), state.step(), state.shuffles() ? ", its shuffled order" : "");
}

// Writes a model in another form; see export_model.
inline int export_command(const ExportOptions& o) {
    require("--model", !o.model.empty());
    require("--out", !o.out.empty());
    check_out_is_free(o.out);
    std::string path = resolve_model(o.model);
    if (path_exists(join_path(path, "trainer.json"))) verify_checkpoint(path);
    ExportRequest request;
    request.model = open_model(path);
    request.out = o.out;
    request.format = export_format(o.dtype);
    request.max_shard_bytes = parse_size(o.max_shard_size);
    std::optional<Tokenizer> tokenizer;
    bool to_llmc = o.out.ends_with(".bin");
    if (!to_llmc) tokenizer = model_tokenizer(o.tokenizer, path, request.model.config);
    if (tokenizer) request.tokenizer = &*tokenizer;
    std::optional<LlmcState> state;
    if (!o.state.empty()) {
        if (is_folder(path) || to_llmc)
            fail_input(
                "--state %s: goes from llm.c to a folder: with --model FILE.bin, and --out "
                "FOLDER",
                o.state.c_str());
        state.emplace(o.state, LlmcModel(path));
        request.state = &*state;
    }
    export_model(request);
    if (state) print_state_note(*state);
    if (!tokenizer && !to_llmc)
        fprintf(stderr,
                "note: %s has no tokenizer, and neither has what was written; --tokenizer names "
                "one\n",
                path.c_str());
    size_t parameters = count_parameters(request.model.config);
    printf("%s: %s parameters in %s\n", o.out.c_str(), with_commas(parameters).c_str(),
           o.dtype.c_str());
    return 0;
}

// Says what each path is; exit code 2 when one is damaged.
inline int info_command(const std::vector<std::string>& paths) {
    require("PATH", !paths.empty());
    int code = 0;
    for (const std::string& path : paths) {
        PathDescription description = describe_path(path);
        printf("%s: %s\n", path.c_str(), description.text.c_str());
        if (!description.intact) code = kExitInput;
    }
    return code;
}

// ==== the program ================================================================================

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

// The one line that an error is: without control characters, whatever a file or path held. It takes
// no memory, of which there may be none.
inline int print_error(const char* message, int code) {
    fflush(stdout);
    flockfile(stderr);
    fprintf(stderr, "%s: error: ", gpt2_program());
    for (const char* c = message; *c != '\0'; c++)
        fputc(static_cast<unsigned char>(*c) < 0x20 || *c == 0x7f ? '?' : *c, stderr);
    fputc('\n', stderr);
    funlockfile(stderr);
    return code;
}

// Says it once, whichever threads run out of memory together: the others wait for the end.
inline int say_out_of_memory() {
    static std::atomic_flag said;
    while (said.test_and_set()) pause();
    return print_error(kOutOfMemory, kExitMachine);
}

// Memory may run out where no exception can pass: in destructors and noexcept functions of
// libraries. The language then ends the program, and what is on the disk is whole at any moment:
// all that is left to do is to say so.
inline void end_without_memory() {
    std::set_terminate([] {
        const std::type_info* type = abi::__cxa_current_exception_type();
        bool memory = type != nullptr && *type == typeid(std::bad_alloc);
        if (memory) _exit(say_out_of_memory());
        _exit(print_error("a mistake of the program's own", kExitMachine));
    });
    // The C library loads what unwinds its own frames when it first needs it, and aborts if it has
    // no memory then. This is a first time.
    void* frame;
    backtrace(&frame, 1);
}

inline int call_command(const CLI::App& app, const Options& o, double start_s, int argc,
                        char** argv) {
    const CLI::App* command = app.get_subcommands().at(0);
    std::string name = command->get_name();
    if (name == "train") {
        TrainOptions train = o.train;
        train.program = shell_quoted(argv[0]);
        train.arguments.assign(argv + 2, argv + argc);
        std::string how_to_go_on = command_to_go_on(argc, argv);
        if (!train.repeat.empty()) {
            check_repeat_options(*command, train);
            if (command->count("--resume") == 0) train.resume = "never";
            how_to_go_on += " --resume auto";
        }
        return train_command(train, start_s, how_to_go_on, argv);
    }
    if (name == "plan") return plan_command(o.plan);
    if (name == "sample") return sample_command(o.sample, argv);
    if (name == "evaluate") return evaluate_command(o.evaluate, argv);
    if (name == "shard") return shard_command(o.shard);
    if (name == "dump") return dump_command(o.dump);
    if (name == "export") return export_command(o.exporting);
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
    std::vector<std::string> words(argv + std::min(argc, 1), argv + argc);
    check_words(&app, words);
    std::reverse(words.begin(), words.end());  // as the parser takes them
    try {
        app.parse(words);
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

// A file that is mapped may be cut short by another program while it is read. What has something to
// lose then notices (CutWatch); for the others this is the last resort: a line and exit code 1.
inline void end_on_cut_file() {
    struct sigaction action = {};
    action.sa_flags = SA_SIGINFO;
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
        if (CutWatch::mend(info->si_addr)) return;
        constexpr std::string_view kLine =
            ": error: a file was cut short while it was read; do not write to files in use\n";
        Leftovers::remove_all();
        const char* program = gpt2_program();
        bool said = ::write(STDERR_FILENO, program, strlen(program)) > 0 &&
                    ::write(STDERR_FILENO, kLine.data(), kLine.size()) > 0;
        (void)said;  // to nobody, perhaps
        _exit(kExitMachine);
    };
    sigaction(SIGBUS, &action, nullptr);
}

// A signal that ends the program leaves nothing of what it was writing; while it trains, it saves
// instead (StopOnSignal). The handler has a stack of its own, for the reason given there. What is
// ignored, as behind nohup, stays ignored.
inline void end_without_leftovers() {
    static char memory[1 << 16];
    stack_t stack = {};
    stack.ss_sp = memory, stack.ss_size = sizeof memory;
    sigaltstack(&stack, nullptr);
    struct sigaction action = {}, before;
    action.sa_handler = [](int signal) {
        Leftovers::remove_all();
        raise(signal);  // once more, without a handler, when this one returns
    };
    action.sa_flags = int(SA_RESETHAND) | SA_ONSTACK;
    sigfillset(&action.sa_mask);
    for (int signal : kStopSignals)
        if (sigaction(signal, nullptr, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(signal, &action, nullptr);
}

// A standard stream that is closed would be the next file that is opened, and what is said would go
// into that.
inline void open_standard_streams() {
    for (int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) != fd) _exit(kExitMachine);
}

// The whole program. Returns the exit code: 0 done, 1 the machine failed, 2 the input was wrong,
// 130 and 143 stopped by a signal after a clean save. Errors are one line on stderr.
inline int run(int argc, char** argv) {
    double start_s = now_s();
    open_standard_streams();
    end_without_memory();
    end_on_cut_file();
    end_without_leftovers();
    signal(SIGPIPE, SIG_IGN);  // a reader that goes away is seen when writing
    signal(SIGXFSZ, SIG_IGN);  // and so is a limit on the size of files
    int code = 0;
    try {
        code = parse_and_call(argc, argv, start_s);
    } catch (const Error& error) {
        return print_error(error.what(), error.exit_code);
    } catch (const std::bad_alloc&) {
        return say_out_of_memory();
    } catch (const std::exception& error) { return print_error(error.what(), kExitMachine); }
    bool lost = fflush(stdout) != 0 || ferror(stdout);
    if (lost && code == 0 && !reader_is_gone())
        return print_error("standard output: cannot write; is the disk full?", kExitMachine);
    return code;
}
