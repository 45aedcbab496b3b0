// The contract between the twins: what a GPT-2 is (GPT2Config), which tensors it has (two tables),
// and the functions that each twin, train_gpt2.cpp and train_gpt2.cu, defines. Everything else in
// the program (trainer, checkpoint, sampler, tests) is written once against this file.
//
// The model is the decoder of [Radford et al. 2019, "Language Models are Unsupervised Multitask
// Learners"]:
//   x = wte[token] + wpe[position]
//   for each of L layers:  x = x + attproj(attention(ln1(x)));  x = x + fcproj(gelu(fc(ln2(x))))
//   logits = lnf(x) wte^T      (or an output matrix of its own, when the head is not tied)
//
// Letters: B batch, T time, C channels, NH heads, HS = C/NH head size, L layers, F hidden width
// (4C), V vocabulary, Vp the vocabulary padded to a multiple of 128. Only memory is padded: padded
// logits take no part in the softmax, padded rows stay zero, and no file holds them.
#pragma once

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <memory>

#include "files.h"

#ifndef GPT2_REAL
#    define GPT2_REAL float
#endif
using real = GPT2_REAL;  // the tests also build the CPU twin in double, for central differences

// ==== configuration ==============================================================================

struct GPT2Config {
    int vocab_size = 50257;
    int context = 1024;  // positions
    int layers = 12;
    int heads = 12;
    int channels = 768;
    int hidden = 0;      // width between the two products of the MLP; 0 stands for 4 * channels
    double dropout = 0;  // probability, at all four places
    bool tied = true;    // the classifier is the token embedding
    bool bias = true;    // additive terms in products and layer norms
    double layer_norm_epsilon = 1e-5;

    int head_size() const { return channels / heads; }
    int hidden_size() const { return hidden > 0 ? hidden : 4 * channels; }
    int padded_vocab() const { return (vocab_size + 127) / 128 * 128; }
    bool operator==(const GPT2Config&) const = default;
};

inline void check_range(const char* option, double value, double low, double high) {
    if (!(value >= low && value <= high))
        fail_input("%s %.10g: must be from %.10g to %.10g", option, value, low, high);
}

// Refuses what no GPT-2 can be, with what would fit: exit code 2.
inline void validate(const GPT2Config& config) {
    check_range("vocabulary size", config.vocab_size, 1, 1 << 20);
    check_range("--context", config.context, 1, 1 << 20);
    check_range("--layers", config.layers, 1, 1000);
    check_range("--heads", config.heads, 1, 1000);
    check_range("--channels", config.channels, 1, 1 << 16);
    check_range("hidden width", config.hidden_size(), 1, 1 << 18);
    if (!(config.dropout >= 0 && config.dropout < 1))
        fail_input("--dropout %g: must be at least 0 and less than 1", config.dropout);
    if (!(config.layer_norm_epsilon > 0 && config.layer_norm_epsilon < 1))
        fail_input("layer_norm_epsilon %g: must be between 0 and 1", config.layer_norm_epsilon);
    if (config.channels % config.heads == 0) return;
    int below = config.heads, above = config.heads;
    while (config.channels % below != 0) below--;
    while (above <= config.channels && config.channels % above != 0) above++;
    std::string heads = format("%d", below);
    if (above <= config.channels) heads += format(" or %d", above);
    int narrower = config.channels / config.heads * config.heads;
    std::string channels = format("%d", narrower + config.heads);
    if (narrower > 0) channels = format("%d or ", narrower) + channels;
    fail_input(
        "--heads %d --channels %d: heads must divide channels; %s heads would fit, or %s channels",
        config.heads, config.channels, heads.c_str(), channels.c_str());
}

// The channels of a GPT-2 with `layers` layers: 64 a layer up to the smallest of the family (12
// layers), then on the line between its neighbours in the family, rounded to whole heads of 64.
inline int family_channels(int layers) {
    constexpr int kFamily[4][2] = {{12, 768}, {24, 1024}, {36, 1280}, {48, 1600}};
    if (layers <= 12) return 64 * layers;
    int i = std::min((layers - 12) / 12, 2);  // beyond the largest, the last line goes on
    double slope = (kFamily[i + 1][1] - kFamily[i][1]) / 12.0;
    return 64 * int(std::lround((kFamily[i][1] + slope * (layers - kFamily[i][0])) / 64));
}

// tiny, small, medium, gpt2 .. gpt2-xl, or dN; false when the name is none of these.
inline bool named_config(const std::string& name, GPT2Config* config) {
    struct Named {
        const char* name;
        int layers, heads, channels, context;
    };
    constexpr Named kNamed[] = {
        {"tiny", 2, 2, 128, 128},
        {"small", 4, 4, 256, 256},
        {"medium", 6, 6, 384, 256},
        {"gpt2", 12, 12, 768, 1024},
        {"gpt2-medium", 24, 16, 1024, 1024},
        {"gpt2-large", 36, 20, 1280, 1024},
        {"gpt2-xl", 48, 25, 1600, 1024},
    };
    for (const Named& row : kNamed) {
        if (name != row.name) continue;
        config->layers = row.layers, config->heads = row.heads;
        config->channels = row.channels, config->context = row.context;
        return true;
    }
    bool digits =
        name.size() >= 2 && name.size() <= 4 && name[0] == 'd' &&
        std::all_of(name.begin() + 1, name.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (!digits) return false;
    config->layers = std::stoi(name.substr(1));
    config->channels = family_channels(config->layers);
    config->heads = config->channels / 64;
    config->context = 1024;
    return config->layers >= 1;
}

// ==== the tensor table: parameters ===============================================================

enum class Init {
    zeros,
    ones,
    normal,
    residual
};  // residual: normal / sqrt(2L) [Radford et al. 2019]

// One row a tensor. Allocation, initialisation, decay groups, names, import, export, dump, the
// memory report and the tests follow from it; nothing else lists the tensors.
//   name, rows, columns (0: a vector), how many (1 or L), present when, decays, initialiser,
//   Hugging Face name (%d: the layer), and whether their file holds the transpose: a matrix here is
//   (outputs, inputs), so that a row makes one output; theirs of a block's four products are
//   (inputs, outputs).
#define GPT2_PARAMETER_TABLE(X)                                                 \
    X(wte, Vp, C, 1, true, true, normal, "wte.weight", false)                   \
    X(wpe, context, C, 1, true, true, normal, "wpe.weight", false)              \
    X(ln1w, C, 0, L, true, false, ones, "h.%d.ln_1.weight", false)              \
    X(ln1b, C, 0, L, bias, false, zeros, "h.%d.ln_1.bias", false)               \
    X(qkvw, 3 * C, C, L, true, true, normal, "h.%d.attn.c_attn.weight", true)   \
    X(qkvb, 3 * C, 0, L, bias, false, zeros, "h.%d.attn.c_attn.bias", false)    \
    X(attprojw, C, C, L, true, true, residual, "h.%d.attn.c_proj.weight", true) \
    X(attprojb, C, 0, L, bias, false, zeros, "h.%d.attn.c_proj.bias", false)    \
    X(ln2w, C, 0, L, true, false, ones, "h.%d.ln_2.weight", false)              \
    X(ln2b, C, 0, L, bias, false, zeros, "h.%d.ln_2.bias", false)               \
    X(fcw, F, C, L, true, true, normal, "h.%d.mlp.c_fc.weight", true)           \
    X(fcb, F, 0, L, bias, false, zeros, "h.%d.mlp.c_fc.bias", false)            \
    X(fcprojw, C, F, L, true, true, residual, "h.%d.mlp.c_proj.weight", true)   \
    X(fcprojb, C, 0, L, bias, false, zeros, "h.%d.mlp.c_proj.bias", false)      \
    X(lnfw, C, 0, 1, true, false, ones, "ln_f.weight", false)                   \
    X(lnfb, C, 0, 1, bias, false, zeros, "ln_f.bias", false)                    \
    X(headw, Vp, C, 1, !tied, true, normal, "lm_head.weight", false)

// A pointer to each tensor, of numbers of a twin's type.
template <class Number>
struct ParameterPointers {
#define X(name, ...) Number* name = nullptr;
    GPT2_PARAMETER_TABLE(X)
#undef X
};

enum class Group { parameters, gradients, first_moments, second_moments };

// Rows of the table follow each other in memory, each from a multiple of this many numbers on, so
// that the widest loads of a processor or a card find every row aligned.
constexpr size_t kRowAlignment = 128;
constexpr size_t aligned(size_t numbers) {
    return (numbers + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

struct ParameterRow {
    const char* name;     // here
    const char* hf_name;  // in a Hugging Face state dict, without the prefix `transformer.`
    size_t rows, cols;    // in memory, of one layer; cols 0 for a vector
    size_t file_rows;     // without the padding
    size_t count;         // how many of it: 1, or L
    bool present, decays, transposed;
    Init init;

    bool per_layer() const { return strstr(hf_name, "%d") != nullptr; }
    size_t size() const { return present ? rows * std::max<size_t>(cols, 1) : 0; }  // of one layer
    size_t file_size() const { return file_rows * std::max<size_t>(cols, 1); }      // of one layer
    size_t allocated() const { return aligned(size() * count); }                    // of all layers
};

#define X(name, ...) k_##name,
enum ParameterIndex { GPT2_PARAMETER_TABLE(X) kParameterRows };
#undef X

using ParameterTable = std::array<ParameterRow, kParameterRows>;

inline ParameterTable parameter_table(const GPT2Config& config) {
    size_t V = size_t(config.vocab_size), Vp = size_t(config.padded_vocab()),
           C = size_t(config.channels);
    size_t L = size_t(config.layers), F = size_t(config.hidden_size()),
           context = size_t(config.context);
    bool bias = config.bias, tied = config.tied;
#define X(name, rows, cols, count, present, decays, init, hf_name, transposed)     \
    ParameterRow{#name,         hf_name, size_t(rows), size_t(cols), size_t(rows), \
                 size_t(count), present, decays,       transposed,   Init::init},
    ParameterTable table = {{GPT2_PARAMETER_TABLE(X)}};
#undef X
    table[k_wte].file_rows = table[k_headw].file_rows = V;
    return table;
}

// Whether products read the rows of this tensor as their weights; every other one is looked up in,
// added or multiplied with, number by number.
inline bool is_product_weight(const GPT2Config& config, int row) {
    return row == k_qkvw || row == k_attprojw || row == k_fcw || row == k_fcprojw ||
           row == (config.tied ? k_wte : k_headw);
}

// A tensor's name in the state dict of transformers' GPT2LMHeadModel.
inline std::string hf_name(const ParameterRow& row, int layer) {
    bool head = strcmp(row.name, "headw") == 0;
    char name[64];
    snprintf(name, sizeof(name), row.hf_name, layer);
    return (head ? "" : "transformer.") + std::string(name);
}

// Numbers in memory (padded, aligned) and numbers that a file holds and a person counts (not
// padded).
inline size_t allocated_parameters(const GPT2Config& config) {
    size_t total = 0;
    for (const ParameterRow& row : parameter_table(config)) total += row.allocated();
    return total;
}

inline size_t count_parameters(const GPT2Config& config) {
    size_t total = 0;
    for (const ParameterRow& row : parameter_table(config))
        if (row.present) total += row.file_size() * row.count;
    return total;
}

// ==== the tensor table: activations ==============================================================

// The type of activations and of the parameters that products read. With bf16, parameters, their
// moments, gradients, statistics and losses exist in float32 too.
enum class Dtype { fp32, bf16 };

// What a model is made for: the largest batch it takes, whether it trains, how many sequences it
// generates at once, and how it computes.
struct GPT2Shape {
    int B = 1, T = 1;
    bool training = false;
    int generate = 0;  // sequences in the key-value cache; 0: it will not generate
    int threads = 1;   // of the CPU twin
    Dtype dtype = Dtype::fp32;
    bool int8 = false;          // the weights of products in 8 bits; not where it trains (CPU)
    int recompute = 0;          // what backward computes again instead of forward keeping it:
                                // 0 nothing, 1 GELU, 2 also layer norms, 3 the whole block
    bool tf32 = false;          // float32 products round what they multiply to 10 bits (CUDA)
    bool deterministic = true;  // only algorithms that give the same bits every time
    bool snapshot = false;      // it can be copied while it trains: see gpt2_snapshot_begin
    bool saves_parts = false;   // every rank saves and reads the part that it holds of moments
    int world = 1;              // ranks that train it together
    int zero = 0;               // what each of them holds but a part of: 0 nothing, 1 the states of
                                // the optimizer, 2 also the gradients
    Dtype reduce = Dtype::fp32;  // what gradients are rounded to on their way to other ranks
    bool sums_exactly = false;   // what comes in bf16 is added up in float32
    int leaves = 0;  // batches of a step, over all ranks, whose gradients are added up in one tree,
                     // whoever made them; 0: in whatever order is fastest (CUDA)
};
constexpr int kRecomputeLevels = 4;  // of GPT2Shape::recompute
constexpr int kZeroStages = 3;       // of GPT2Shape::zero

// Sequences that are best generated together, at most: for so few rows a product of the CPU twin
// takes the time that its weights take to arrive, and gives a row the same bits whatever the
// others.
constexpr int kFewRows = 16;

// Sizes that the twins choose for themselves.
struct TwinSizes {
    size_t classifier_rows;     // rows of logits that exist at a time, at most
    size_t attention_scratch;   // numbers that attention works in
    size_t reduce_rows;         // partial sums of a bias or layer norm gradient
    size_t parameters;          // numbers of the parameters that products read,
    size_t masters;             // of their float32 copy where those are bf16,
    size_t gradients;           // of the gradients that it holds,
    size_t moments;             // and of each moment
    bool exact_stream = false;  // the residual stream is in float32 whatever products read
    size_t int8_bytes = 0;      // of weights in int8 and their scales,
    size_t expanded = 0;        // and numbers of them that products of many rows expand at a time
};
TwinSizes gpt2_sizes(const GPT2Config& config, const GPT2Shape& shape);

// One row a buffer: name, type, numbers in one layer, how many.
//   type  narrow: the shape's dtype; exact: float32 whatever that is; stream: the residual stream,
//   to which every block adds, and its gradient: as the twin has it
//   L or 1: `saved`, kept by forward for backward; `block`, `norms` and `gelus` the same unless
//   backward computes the block, its layer norms or GELU again; a model that does not train uses
//   one layer's for all. train: backward's own; int8: of weights in 8 bits; cache: the key-value
//   cache of generation
#define GPT2_ACTIVATION_TABLE(X)                         \
    X(encoded, stream, B* T* C, 1)                       \
    X(ln1, narrow, B* T* C, norms)                       \
    X(ln1_mean, exact, B* T, block)                      \
    X(ln1_rstd, exact, B* T, block)                      \
    X(qkv, narrow, B* T * 3 * C, block)                  \
    X(logsumexp, exact, B* NH* T, block)                 \
    X(atty, narrow, B* T* C, block)                      \
    X(residual2, stream, B* T* C, block)                 \
    X(ln2, narrow, B* T* C, norms)                       \
    X(ln2_mean, exact, B* T, block)                      \
    X(ln2_rstd, exact, B* T, block)                      \
    X(fch, narrow, B* T* F, block)                       \
    X(fch_gelu, narrow, B* T* F, gelus)                  \
    X(residual3, stream, B* T* C, saved)                 \
    X(lnf, narrow, B* T* C, 1)                           \
    X(lnf_mean, exact, B* T, 1)                          \
    X(lnf_rstd, exact, B* T, 1)                          \
    X(branch, narrow, B* T* C, 1)                        \
    X(expanded, narrow, expanded, int8)                  \
    X(logits, narrow, classifier_rows* Vp, 1)            \
    X(losses, exact, B* T, 1)                            \
    X(att_scratch, exact, attention_scratch, 1)          \
    X(dresidual, stream, B* T* C, train)                 \
    X(dbranch, narrow, B* T* C, train)                   \
    X(dnorm, narrow, B* T* C, train)                     \
    X(dqkv, narrow, B* T * 3 * C, train)                 \
    X(datty, narrow, B* T* C, train)                     \
    X(dfch, narrow, B* T* F, train)                      \
    X(reduce_scratch, exact, reduce_rows* widest, train) \
    X(key_cache, narrow, generate* context* C, cache)    \
    X(value_cache, narrow, generate* context* C, cache)

// A pointer to each buffer: narrow ones of the type that products read, exact ones and those of the
// residual stream of types of their own.
template <class Narrow, class Exact, class Stream = Narrow>
struct ActivationPointers {
    using narrow = Narrow;
    using exact = Exact;
    using stream = Stream;
#define X(name, type, ...) type* name = nullptr;
    GPT2_ACTIVATION_TABLE(X)
#undef X
};

struct ActivationRow {
    const char* name;
    bool narrow;   // in the shape's dtype; false: float32
    size_t size;   // numbers of one layer
    size_t count;  // 0: this model has none of it

    size_t allocated() const { return aligned(size * count); }  // numbers of all layers
    size_t bytes(Dtype dtype) const {
        return allocated() * (narrow && dtype == Dtype::bf16 ? 2 : sizeof(real));
    }
};

#define X(name, ...) a_##name,
enum ActivationIndex { GPT2_ACTIVATION_TABLE(X) kActivationRows };
#undef X

using ActivationTable = std::array<ActivationRow, kActivationRows>;

inline ActivationTable activation_table(const GPT2Config& config, const GPT2Shape& shape) {
    constexpr bool narrow = true, exact = false;
    size_t B = size_t(shape.B), T = size_t(shape.T), C = size_t(config.channels);
    size_t L = size_t(config.layers), NH = size_t(config.heads), F = size_t(config.hidden_size());
    size_t Vp = size_t(config.padded_vocab()), context = size_t(config.context);
    size_t generate = size_t(shape.generate), widest = std::max(3 * C, F);
    TwinSizes twin = gpt2_sizes(config, shape);
    bool stream = twin.exact_stream ? exact : narrow;
    // of two in bf16 the CPU twin makes one of `real`
    size_t classifier_rows = std::min(std::max({B * T, generate, size_t(2)}), twin.classifier_rows);
    size_t attention_scratch = twin.attention_scratch, reduce_rows = twin.reduce_rows;
    size_t expanded = twin.expanded, int8 = shape.int8 ? 1 : 0;
    auto kept = [&](int below) { return shape.training && shape.recompute < below ? L : 1; };
    size_t saved = kept(4), block = kept(3), norms = kept(2), gelus = kept(1);
    size_t train = shape.training ? 1 : 0, cache = shape.generate > 0 ? L : 0;
#define X(name, type, size, count) ActivationRow{#name, type, size_t(size), size_t(count)},
    return {{GPT2_ACTIVATION_TABLE(X)}};
#undef X
}

// ==== memory and operations ======================================================================

struct MemoryRow {
    std::string group;
    size_t bytes;
};

// A snapshot holds the groups that a checkpoint does, one after the other.
constexpr std::array<Group, 3> kSnapshotGroups = {Group::parameters, Group::first_moments,
                                                  Group::second_moments};

// Of groups of so many numbers each.
inline size_t snapshot_bytes(size_t numbers) {
    return kSnapshotGroups.size() * sizeof(real) * numbers;
}

// The place of a group among those of a snapshot.
inline size_t snapshot_index(Group group) {
    auto place = std::find(kSnapshotGroups.begin(), kSnapshotGroups.end(), group);
    assert(place != kSnapshotGroups.end());
    return size_t(place - kSnapshotGroups.begin());
}

inline size_t total_bytes(const std::vector<MemoryRow>& rows) {
    size_t total = 0;
    for (const MemoryRow& row : rows) total += row.bytes;
    return total;
}

inline const char* activation_group(int index) {
    if (index < a_logits) return "activations";
    if (index < a_att_scratch) return "classifier";
    if (index < a_dresidual) return "attention scratch";
    return index < a_key_cache ? "backward" : "key-value cache";
}

// What the tensors of both tables take, by group: what a twin allocates for them.
inline std::vector<MemoryRow> tensor_memory(const GPT2Config& config, const GPT2Shape& shape) {
    TwinSizes twin = gpt2_sizes(config, shape);
    std::vector<MemoryRow> rows;
    if (shape.dtype == Dtype::bf16) rows.push_back({"parameters, bf16", 2 * twin.parameters});
    size_t exact = shape.dtype == Dtype::fp32 ? twin.parameters : twin.masters;
    if (shape.dtype == Dtype::fp32 || shape.training)
        rows.push_back({"parameters", sizeof(real) * exact});
    if (shape.int8) rows.push_back({"parameters, int8", twin.int8_bytes});
    if (shape.training) {
        rows.push_back({"gradients", sizeof(real) * twin.gradients});
        rows.push_back({"first moments", sizeof(real) * twin.moments});
        rows.push_back({"second moments", sizeof(real) * twin.moments});
    }
    ActivationTable table = activation_table(config, shape);
    for (int i = 0; i < kActivationRows; i++) {
        size_t bytes = table[size_t(i)].bytes(shape.dtype);
        if (bytes == 0) continue;
        if (rows.back().group != activation_group(i)) rows.push_back({activation_group(i), 0});
        rows.back().bytes += bytes;
    }
    return rows;
}

// Multiplications and additions that one token of a training step needs (forward, and twice that
// backward): 2 for each weight of a product, and attention over the (T+1)/2 keys that a query sees
// on average.
inline double operations_per_token(const GPT2Config& config, int T) {
    double C = config.channels, F = config.hidden_size(), L = config.layers, V = config.vocab_size;
    return 3 * (2 * (L * (4 * C * C + 2 * C * F) + V * C) + L * 2 * C * (T + 1));
}

// ==== random numbers =============================================================================

// Philox4x32-10 [Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"]: four words
// that depend on a key and a counter alone, so that any thread, rank or twin draws the same number
// for the same element.
struct Philox {
    uint32_t word[4];
};

constexpr int kPhiloxRounds = 10;

// One of its rounds, on the words of a counter. In a Word of 64 bits, the lane in which a processor
// multiplies them, the upper half means nothing.
template <class Word>
constexpr void philox_round(uint64_t key, int round, Word& c0, Word& c1, Word& c2, Word& c3) {
    uint32_t k0 = uint32_t(key) + uint32_t(round) * 0x9E3779B9u;
    uint32_t k1 = uint32_t(key >> 32) + uint32_t(round) * 0xBB67AE85u;
    uint64_t p0 = uint64_t(0xD2511F53u) * uint32_t(c0), p1 = uint64_t(0xCD9E8D57u) * uint32_t(c2);
    c0 = Word(p1 >> 32) ^ c1 ^ k0, c2 = Word(p0 >> 32) ^ c3 ^ k1;
    c1 = Word(p1), c3 = Word(p0);
}

constexpr Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    for (int round = 0; round < kPhiloxRounds; round++) philox_round(key, round, c0, c1, c2, c3);
    return {{c0, c1, c2, c3}};
}

// What a number is drawn for. A dropout site's numbers are counted by (element / 4, sequence, layer
// and site, step).
enum class RandomUse : uint32_t {
    initialise,
    encoder,
    attention,
    attention_projection,
    mlp_projection
};

constexpr uint32_t random_stream(RandomUse use, int layer) {
    return uint32_t(layer) * 8 + uint32_t(use);
}

// ==== what a twin provides =======================================================================

struct GPT2;  // parameters, gradients, moments and activations, in the twin's own memory

// One forward pass. loss_scale is 1 / (targets that count in the whole step, over micro-batches and
// ranks), so that gradients and losses summed over the passes of a step are those of the mean.
// Dropout (training only) is decided by seed, step and the sequence's place in the step,
// first_sequence + b. Of several ranks, one takes the first B sequences, the next the B behind
// them, and so on round.
struct GPT2Pass {
    bool training = false;
    double loss_scale = 1;
    uint64_t seed = 0, step = 0, first_sequence = 0;
    real* logits = nullptr;  // host (B,T,V), written when given
    bool completes = true;   // the last of its step: its backward pass adds up gradients over ranks
    bool alone = false;      // of this rank only: nothing is added up over ranks
};

// Decoupled weight decay [Loshchilov & Hutter 2017, arXiv:1711.05101]; step counts from 1.
struct AdamW {
    double learning_rate = 1e-3, beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
    double grad_clip = 1;  // largest global norm; 0: no clipping
    uint64_t step = 1;
};

struct GPT2Stats {
    double loss;       // of the forward passes since gpt2_zero_gradients, each times its loss_scale
    double grad_norm;  // of the last update, before clipping
    // When that update was done, in seconds of the steady clock; 0: when the stats were asked for.
    double finished_s = 0;
    // What the device took for its own share of the passes before that update, which others of a
    // job do not delay; 0: not measured.
    double compute_s = 0;
};

// Operations/s of products that the device can do at best: measured, or published for it, as
// `source` says. 0 where nothing is known of it.
struct PeakRate {
    double flops = 0;
    std::string source;
};

const char* gpt2_program();  // the name of this program
const char* gpt2_version();  // the state of its source, as git describes it
std::string gpt2_device();   // what computes: a line for people
PeakRate gpt2_peak(const GPT2Shape& shape);
Dtype gpt2_dtype(const std::string& option);  // of --dtype auto|fp32|bf16; refuses what cannot be

// Everything that a model will take, by group, before anything is allocated; and the bytes that
// this machine or card could still give (0: it does not say).
std::vector<MemoryRow> gpt2_memory(const GPT2Config& config, const GPT2Shape& shape);
size_t gpt2_memory_free();
// What a model on a card takes of the machine's own memory beside that; nothing on the CPU.
std::vector<MemoryRow> gpt2_host_memory(const GPT2Config& config, const GPT2Shape& shape);

// Allocates everything, zeroed; throws Error (exit code 1) naming the group and bytes that memory
// lacked. Of a job of several ranks each creates a model of its own share of the batch, and joins.
GPT2* gpt2_create(const GPT2Config& config, const GPT2Shape& shape, int rank = 0);
void gpt2_destroy(GPT2* model);

// Several ranks, each with a model of the same configuration, train as one: loss and gradients of a
// step are summed over all of them by the pass that completes it, so that every rank makes the same
// update, or, where the shape shards them, its part of it [Rajbhandari et al. 2020, "ZeRO: Memory
// Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054]. gpt2_alone says why
// this program cannot be one of several, or nothing. Each rank selects the device that is its own
// before anything else asks for one: that of its number or, unless it sees the devices of all ranks
// of its machine, the only one that it sees. Rank 0 makes an id, which all give to gpt2_join. join
// and share are called by every rank, and return when all have; share gives the parameters and
// moments that rank 0 was given by copy_in to all. They fail with exit code 1 where a rank is lost.
std::string gpt2_alone();
void gpt2_select_device(int local_rank, bool sees_all);
std::string gpt2_job_id();
void gpt2_join(GPT2* model, const std::string& id);
void gpt2_share(GPT2* model);
const GPT2Config& gpt2_config(const GPT2* model);
const GPT2Shape& gpt2_shape(const GPT2* model);

// inputs and targets: host (B,T), B and T at most the shape's; a target of -1 takes no part;
// targets may be null, with training false. A training pass also takes the classifier's gradient,
// while the logits are at hand. inputs stay as they are until gpt2_backward of the pass returns.
void gpt2_forward(GPT2* model, const int* inputs, const int* targets, int B, int T,
                  const GPT2Pass& pass);
void gpt2_backward(GPT2* model);  // of the last forward, which was a training pass; gradients +=
void gpt2_zero_gradients(GPT2* model);  // where there are any; and the loss
void gpt2_update(GPT2* model,
                 const AdamW& adamw);  // nothing changes when loss or norm is not finite
GPT2Stats gpt2_stats(GPT2* model);     // waits for the device

// The stats of the update before the last one. It waits for that update alone, so that a training
// loop learns of a step while the device works on the next.
GPT2Stats gpt2_previous_stats(GPT2* model);

// Appends n tokens a sequence, tokens (B,n), to the key-value cache at `position` (what was there
// and after is forgotten) and writes the logits (B,V) that follow the last of them. position + n is
// at most the context. In the CPU twin the logits of a sequence have the same bits for every B up
// to kFewRows, wherever it stands among the others.
void gpt2_generate(GPT2* model, const int* tokens, int B, int n, int position, real* logits);

// Copies the first n keys and values of one sequence of the cache, in every layer, over those of
// another: a prompt that several samples continue is computed once.
void gpt2_copy_cache(GPT2* model, int from, int to, int n);

// One row of the tensor table, of one layer, to and from host memory (file_rows, cols), in this
// program's orientation, without padding. A row that is not present cannot be copied. Where the
// shape shards a group, copy_in is for rank 0, before gpt2_share, or for every rank where it saves
// parts, which takes its part of the moments; copy_out writes zeros for what other ranks hold, and
// rounded parameters where the float32 ones are elsewhere. With int8 copy_in quantises the weights
// of products, and copy_out writes them as products read them.
void gpt2_copy_out(const GPT2* model, Group group, int row, int layer, real* host);
void gpt2_copy_in(GPT2* model, Group group, int row, int layer, const real* host);

// Of one row of one layer, the numbers that a rank saves: all of them, or its part.
struct TensorPart {
    size_t begin = 0, end = 0;
    const real* numbers = nullptr;  // from begin on
};

// Copies parameters and moments, as the last update left them, to the snapshot that the shape asked
// for. begin returns at once: passes of the next step run beside the copy, and the update after
// them waits for its end, as wait does. Where the shape shards a group every rank calls begin, and
// the snapshot, which rank 0 has, is of all; where ranks save parts, each has one of its moments,
// and rank 0 of the parameters too. A snapshot stays as it is until the next begin; snapshot_tensor
// is where one row of one layer of it lies, in host memory, as gpt2_copy_out would write it; any
// thread may read it.
void gpt2_snapshot_begin(GPT2* model);
void gpt2_snapshot_wait(GPT2* model);
TensorPart gpt2_snapshot_tensor(const GPT2* model, Group group, int row, int layer);

// One buffer of the activation table, of one layer, as the last passes left it, to host memory
// (size). For looking into what went wrong, and for nothing that must be fast.
void gpt2_activation_out(const GPT2* model, int row, int layer, real* host);

struct GPT2Deleter {
    void operator()(GPT2* model) const { gpt2_destroy(model); }
};
using GPT2Ptr = std::unique_ptr<GPT2, GPT2Deleter>;

// ==== the layers of the CPU twin =================================================================

// Each is described where it is defined. The CUDA launchers bear the same names and append a
// stream.
struct Dropout {
    double probability = 0;
    uint64_t seed = 0, step = 0, first_sequence = 0;
    RandomUse use = RandomUse::encoder;
    int layer = 0;
};

void encoder_forward(real* out, const int* inputs, const real* wte, const real* wpe, int B, int T,
                     int C);
void encoder_backward(real* dwte, real* dwpe, const real* dout, const int* inputs, int B, int T,
                      int C);
void layernorm_forward(real* out, real* mean, real* rstd, const real* inp, const real* weight,
                       const real* bias, double epsilon, int B, int T, int C);
void layernorm_backward(real* dinp, real* dweight, real* dbias, const real* dout, const real* inp,
                        const real* weight, const real* mean, const real* rstd, real* scratch,
                        int B, int T, int C);
void matmul_forward(real* out, const real* inp, const real* weight, const real* bias, int BT, int C,
                    int OC);
void matmul_backward(real* dinp, real* dweight, real* dbias, const real* dout, const real* inp,
                     const real* weight, real* scratch, int BT, int C, int OC);
void attention_forward(real* out, real* logsumexp, const real* qkv, real* scratch,
                       const Dropout& dropout, int B, int T, int C, int NH);
void attention_backward(real* dqkv, const real* dout, const real* qkv, const real* out,
                        const real* logsumexp, real* scratch, const Dropout& dropout, int B, int T,
                        int C, int NH);
void gelu_forward(real* out, const real* inp, size_t N);
void gelu_backward(real* dinp, const real* dout, const real* inp, size_t N);
void dropout_forward(real* out, const real* inp, const Dropout& dropout, int B, int T, int C);
void residual_layernorm_forward(real* residual, real* out, real* mean, real* rstd, const real* inp,
                                const real* branch, const real* weight, const real* bias,
                                double epsilon, const Dropout& dropout, int B, int T, int C);
void matmul_gelu_forward(real* out, real* pre, const real* inp, const real* weight,
                         const real* bias, int BT, int C, int OC);
void gelu_matmul_backward(real* dpre, real* dweight, real* dbias, const real* dout, const real* inp,
                          const real* pre, const real* weight, real* scratch, int BT, int C,
                          int OC);
void classifier_forward(real* losses, real* logits, const int* targets, double loss_scale,
                        bool gradient, int BT, int V, int Vp);
double global_norm(const real* gradients, size_t N);
void adamw_update(real* params, real* m, real* v, const real* grads, size_t N, const AdamW& adamw,
                  double weight_decay, double grad_scale);

// C (M,N) = A' B' + beta C, row-major, where ' transposes when asked and beta is 0 or 1: as layers
// make it, by oneDNN where it was built in, and by the loop nests that need no library and that the
// tests hold it against. gemm_bf16 takes numbers in bf16, by their bits, and sums in float32.
void gemm(bool trans_a, bool trans_b, int M, int N, int K, const real* A, int lda, const real* B,
          int ldb, real beta, real* C, int ldc);
void gemm_plain(bool trans_a, bool trans_b, int M, int N, int K, const real* A, int lda,
                const real* B, int ldb, real beta, real* C, int ldc);
void gemm_bf16(bool plain, bool trans_a, bool trans_b, int M, int N, int K, const uint16_t* A,
               int lda, const uint16_t* B, int ldb, real beta, real* C, int ldc);

// A matrix in int8, a scale to each row: W(o,c) = scale_o q(o,c), with q from -127 to 127 and the
// largest |W(o,c)| of a row at 127. quantise_rows writes q (rows,cols) and scales (rows) for
// weights (rows,cols); |W - scale q| is at most half a scale, beside rounding. A row with a number
// that is not finite gets a scale of NaN, so that whatever is made of it is NaN too. gemm_int8: C
// (M,N) = A W' + bias, as layers make it for M rows: A (M,K), W (N,K), bias (N) or null; `expanded`
// is scratch, as many numbers as TwinSizes says.
void quantise_rows(int8_t* q, real* scales, const real* weights, size_t rows, size_t cols);
void gemm_int8(int M, int N, int K, const real* A, const int8_t* q, const real* scales,
               const real* bias, real* expanded, real* C);

// ==== initialisation =============================================================================

// Fills one tensor as the table says: normal numbers of standard deviation 0.02 by Box-Muller from
// Philox, a pair for each pair of elements, so that the values do not depend on who computes them.
inline void initialise_tensor(real* host, const ParameterRow& row, int index, int layer, int layers,
                              uint64_t seed) {
    size_t N = row.file_size();
    if (row.init == Init::zeros || row.init == Init::ones) {
        std::fill(host, host + N, row.init == Init::ones ? real(1) : real(0));
        return;
    }
    double deviation = row.init == Init::residual ? 0.02 / std::sqrt(2.0 * layers) : 0.02;
    uint32_t stream = random_stream(RandomUse::initialise, layer);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < N; i += 2) {
        Philox random =
            philox(seed, uint32_t(i / 2), uint32_t((i / 2) >> 32), stream, uint32_t(index));
        double radius =
            std::sqrt(-2 * std::log((random.word[0] + 1.0) / 4294967296.0));  // of (0, 1]
        double angle = 2 * M_PI * (random.word[1] / 4294967296.0);
        host[i] = real(float(deviation * radius * std::cos(angle)));
        if (i + 1 < N) host[i + 1] = real(float(deviation * radius * std::sin(angle)));
    }
}

inline void gpt2_initialise(GPT2* model, uint64_t seed) {
    const GPT2Config& config = gpt2_config(model);
    ParameterTable table = parameter_table(config);
    std::vector<real> host;
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        if (!row.present) continue;
        host.resize(row.file_size());
        for (int layer = 0; layer < int(row.count); layer++) {
            initialise_tensor(host.data(), row, index, layer, config.layers, seed);
            gpt2_copy_in(model, Group::parameters, index, layer, host.data());
        }
    }
}
