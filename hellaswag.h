// HellaSwag [Zellers et al. 2019, arXiv:1905.07830]: which of four endings does a model find the
// least surprising?
//
// Each ending is a row: the context's tokens, and those of a space and the ending, encoded apart.
// Its loss is the sum over the ending's tokens alone. `acc` is the share of examples whose right
// ending has the lowest loss, `acc_norm` that of the lowest loss a token, as llm.c reports them.
// (The figures of EleutherAI's harness are others: it rewrites the texts, puts the activity before
// them, and divides by characters.)
//
// The model is a function that gives the loss of every target of a batch, so that this file needs
// no twin.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "dataloader.h"
#include "files.h"
#include "tokenizer.h"

constexpr size_t kChoices = 4;

// One question: what comes before, four endings, and which is right. No part is empty.
struct ChoiceExample {
    std::vector<int> context;
    std::array<std::vector<int>, kChoices> endings;
    int label = 0;
};

// ==== files ======================================================================================

constexpr int32_t kChoiceMagic = 20240522;  // llm.c's files of multiple choice
constexpr int32_t kChoiceVersion = 1;
constexpr size_t kChoiceHeaderInts = 256;
constexpr uint16_t kChoiceStart = 65535;  // before each example
constexpr size_t kMostChoiceExamples = 65535;

// Reads llm.c's file: a header of 256 int32 (magic, version, examples, bytes of the longest one,
// then zeros), and for each example as uint16: kChoiceStart, its bytes, its number, label, number
// of endings; then the context and each ending, tokens after their count. Every field is checked,
// the tokens against the vocabulary; anything else is fail_input.
class ChoiceFileReader {
  public:
    ChoiceFileReader(const MappedFile& file, int vocab_size)
        : file_(file), vocab_size_(vocab_size) {}

    std::vector<ChoiceExample> read() {
        read_header();
        std::vector<ChoiceExample> examples;
        uint16_t longest = 0;
        for (size_t i = 0; i < examples_; i++) {
            examples.push_back(read_example(i));
            longest = std::max(longest, bytes_);
        }
        if (at_ != file_.size())
            fail(at_, format("%zu bytes more than the %zu examples take", file_.size() - at_,
                             examples_));
        if (longest != longest_)
            fail(12, format("the longest example is said to have %d bytes, it has %d", longest_,
                            int(longest)));
        return examples;
    }

  private:
    [[noreturn]] void fail(size_t byte, const std::string& what) const {
        fail_input("%s: byte %zu: %s; is this a whole hellaswag_val.bin of llm.c's?",
                   file_.path().c_str(), byte, what.c_str());
    }

    int32_t header_word(size_t i) const {
        int32_t word;
        memcpy(&word, file_.data() + 4 * i, sizeof word);
        return word;
    }

    void read_header() {
        size_t header = kChoiceHeaderInts * sizeof(int32_t);
        if (file_.size() < header)
            fail(file_.size(), format("the file ends; its header has %zu bytes", header));
        if (header_word(0) != kChoiceMagic)
            fail(0, format("magic is %d; such a file has %d", header_word(0), kChoiceMagic));
        if (header_word(1) != kChoiceVersion)
            fail(4, format("version %d; only %d is known", header_word(1), kChoiceVersion));
        if (header_word(2) < 1 || header_word(2) > int32_t(kMostChoiceExamples))
            fail(8, format("%d examples; there are 1 to %zu", header_word(2), kMostChoiceExamples));
        examples_ = size_t(header_word(2));
        longest_ = header_word(3);
        for (size_t i = 4; i < kChoiceHeaderInts; i++)
            if (header_word(i) != 0) fail(4 * i, "a word of the header that is not 0");
        at_ = header;
    }

    uint16_t next(const char* what) {
        if (file_.size() - at_ < 2) fail(at_, format("the file ends before %s", what));
        uint16_t value;
        memcpy(&value, file_.data() + at_, sizeof value);
        at_ += sizeof value;
        return value;
    }

    std::vector<int> tokens(const char* what) {
        size_t at = at_, count = next(what);
        if (count == 0) fail(at, format("%s has no tokens", what));
        if ((end_ - std::min(end_, at_)) / 2 < count)
            fail(at, format("%s has %zu tokens, more than its example has room for", what, count));
        std::vector<int> ids(count);
        for (int& id : ids) {
            id = next(what);
            if (id >= vocab_size_)
                fail(at_ - 2, format("token id %d, the vocabulary has %d", id, vocab_size_));
        }
        return ids;
    }

    ChoiceExample read_example(size_t number) {
        size_t begin = at_;
        if (uint16_t start = next("an example"); start != kChoiceStart)
            fail(begin, format("example %zu begins with %d in place of %d", number, int(start),
                               int(kChoiceStart)));
        bytes_ = next("the size of an example");
        if (bytes_ % 2 != 0 || bytes_ > file_.size() - begin)
            fail(begin + 2, format("example %zu is said to take %d bytes, the file has %zu", number,
                                   int(bytes_), file_.size() - begin));
        end_ = begin + bytes_;
        if (size_t index = next("the number of an example"); index != number)
            fail(at_ - 2, format("example %zu has the number %zu", number, index));
        ChoiceExample example;
        example.label = next("a label");
        if (example.label >= int(kChoices)) fail(at_ - 2, format("label %d", example.label));
        if (size_t endings = next("a number of endings"); endings != kChoices)
            fail(at_ - 2, format("%zu endings; only %zu are known", endings, kChoices));
        example.context = tokens("a context");
        for (std::vector<int>& ending : example.endings) ending = tokens("an ending");
        if (at_ != end_)
            fail(begin + 2, format("example %zu is said to take %d bytes, and takes %zu", number,
                                   int(bytes_), at_ - begin));
        return example;
    }

    const MappedFile& file_;
    int vocab_size_;
    size_t examples_ = 0, at_ = 0;
    size_t end_ = 0;      // of the present example
    uint16_t bytes_ = 0;  // of it
    int32_t longest_ = 0;
};

// One line of the published file: ctx, or ctx_a and ctx_b; endings; label, a number or, as in the
// hub's copy, its digit. `where` names the line.
inline ChoiceExample read_choice_line(std::string_view line, const std::string& where,
                                      const Tokenizer& tokenizer, std::string* missing) {
    json root = parse_json(line, where);
    const char* place = where.c_str();
    if (!root.is_object()) fail_input("%s: not a JSON object", place);
    auto text = [&](const char* key) {
        if (!root.contains(key) || !root[key].is_string())
            fail_input("%s: has no string \"%s\"", place, key);
        return root[key].get<std::string>();
    };
    std::string context = root.contains("ctx") ? text("ctx") : text("ctx_a");
    if (!root.contains("ctx") && root.contains("ctx_b") && !text("ctx_b").empty())
        context += " " + text("ctx_b");
    if (!root.contains("label") || root["label"] == "")
        fail_input("%s: has no label, as in the test split; take hellaswag_val.jsonl", place);
    json label = root["label"];
    if (label.is_string() && label.get<std::string>().size() == 1)
        label = uint64_t(static_cast<unsigned char>(label.get<std::string>()[0] - '0'));
    if (!label.is_number_unsigned() || label.get<uint64_t>() >= kChoices)
        fail_input("%s: the label must be 0, 1, 2 or 3", place);
    json endings = root.value("endings", json());
    if (!endings.is_array() || endings.size() != kChoices)
        fail_input("%s: \"endings\" must be an array of 4", place);
    ChoiceExample example;
    example.label = label.get<int>();
    auto encode = [&](const std::string& words, std::vector<int>& ids) {
        with_place([&] { return where; }, [&] { tokenizer.encode(words, ids, missing); });
    };
    encode(context, example.context);
    if (example.context.empty()) fail_input("%s: the context has no tokens", place);
    for (size_t i = 0; i < kChoices; i++) {
        if (!endings[i].is_string()) fail_input("%s: ending %zu is no string", place, i);
        encode(" " + endings[i].get<std::string>(), example.endings[i]);
        if (example.endings[i].empty()) fail_input("%s: ending %zu has no tokens", place, i);
    }
    return example;
}

// Whether a file is llm.c's: by its first bytes, or its name (a damaged one must be refused as such
// a file and not be read as text).
inline bool is_choice_file(const MappedFile& file) {
    std::string_view magic(reinterpret_cast<const char*>(&kChoiceMagic), sizeof kChoiceMagic);
    return file.view().starts_with(magic) || file.path().ends_with(".bin");
}

// Reads HellaSwag in either form; JSON lines need a tokenizer. Nothing to read, a line that is no
// example, and a damaged file are fail_input. Says on stderr what a vocabulary lacks.
inline std::vector<ChoiceExample> read_hellaswag(const std::string& path,
                                                 const Tokenizer* tokenizer, int vocab_size) {
    MappedFile file(path);
    if (is_choice_file(file)) return ChoiceFileReader(file, vocab_size).read();
    if (tokenizer == nullptr)
        fail_input("%s: is text, and the model has no tokenizer; name one with --tokenizer",
                   path.c_str());
    std::vector<ChoiceExample> examples;
    std::string missing;
    std::string_view text = file.view();
    for (size_t begin = 0, number = 1; begin < text.size(); number++) {
        size_t end = std::min(text.find('\n', begin), text.size());
        std::string_view line = text.substr(begin, end - begin);
        begin = end + 1;
        if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
        examples.push_back(read_choice_line(line, format("%s: line %zu", path.c_str(), number),
                                            *tokenizer, &missing));
    }
    if (examples.empty()) fail_input("%s: holds no examples", path.c_str());
    if (!missing.empty())
        fprintf(stderr, "note: characters that the vocabulary lacks are dropped: %s\n",
                missing.substr(0, 80).c_str());
    return examples;
}

// ==== scores =====================================================================================

// Writes the loss of each target of a batch, inputs and targets (rows,T), to losses (rows,T); what
// it writes where the target is kIgnore does not matter.
using TargetLosses =
    std::function<void(const int* inputs, const int* targets, int rows, int T, double* losses)>;

// What a model makes of an example.
struct ChoiceScore {
    std::array<double, kChoices> loss{};  // of each ending, in nats, summed over its tokens
    std::array<int, kChoices> tokens{};   // over how many
    size_t rows_cut = 0;                  // that were too long for the model

    // The ending of the lowest loss, and of the lowest loss a token; the first of several.
    size_t prediction() const {
        return size_t(std::min_element(loss.begin(), loss.end()) - loss.begin());
    }
    size_t prediction_norm() const {
        size_t best = 0;
        for (size_t i = 1; i < kChoices; i++)
            if (loss[i] / tokens[i] < loss[best] / tokens[best]) best = i;
        return best;
    }
};

struct ChoiceResult {
    size_t examples = 0, correct = 0, correct_norm = 0, rows_cut = 0;
    double loss = 0;  // a token, over the right endings

    double acc() const { return double(correct) / double(examples); }
    double acc_norm() const { return double(correct_norm) / double(examples); }
    // Of acc_norm, were the examples drawn anew.
    double standard_error() const {
        return std::sqrt(acc_norm() * (1 - acc_norm()) / double(examples));
    }
};

// The inputs of the longest row: all its tokens but the last.
inline size_t longest_choice(const std::vector<ChoiceExample>& examples) {
    size_t longest = 1;
    for (const ChoiceExample& example : examples)
        for (const std::vector<int>& ending : example.endings)
            longest = std::max(longest, example.context.size() + ending.size() - 1);
    return longest;
}

// The part of `count` examples that a rank takes: [first, second), one after the other.
inline std::pair<size_t, size_t> part_of_rank(size_t count, int rank, int world) {
    assert(world >= 1 && rank >= 0 && rank < world);
    auto bound = [&](int r) {
        return size_t(static_cast<unsigned __int128>(count) * unsigned(r) / unsigned(world));
    };
    return {bound(rank), bound(rank + 1)};
}

// Writes one ending as a row of a batch: inputs and targets (T), which hold 0 and kIgnore. A row
// longer than T loses tokens on its left, first of the context. Returns how many targets count.
inline int write_choice_row(const ChoiceExample& example, size_t ending, int* inputs, int* targets,
                            size_t T) {
    const std::vector<int>&context = example.context, &tail = example.endings[ending];
    size_t length = context.size() + tail.size() - 1, cut = length > T ? length - T : 0;
    auto token = [&](size_t i) {
        return i < context.size() ? context[i] : tail[i - context.size()];
    };
    int count = 0;
    for (size_t i = cut; i < length; i++) {
        inputs[i - cut] = token(i);
        if (i + 1 < context.size()) continue;
        targets[i - cut] = token(i + 1);
        count++;
    }
    return count;
}

// Scores the examples of a rank: B rows at a time, rows of like length together, so that little is
// padding. Which rows share a batch depends on the examples and B alone. Result (examples); those
// of other ranks stay zero, and are theirs to score.
inline std::vector<ChoiceScore> score_choices(const std::vector<ChoiceExample>& examples, int B,
                                              int T, const TargetLosses& losses_of, int rank = 0,
                                              int world = 1) {
    auto [first, last] = part_of_rank(examples.size(), rank, world);
    auto length = [&](size_t row) {
        const ChoiceExample& example = examples[row / kChoices];
        return example.context.size() + example.endings[row % kChoices].size() - 1;
    };
    std::vector<size_t> rows((last - first) * kChoices);
    std::iota(rows.begin(), rows.end(), first * kChoices);
    std::stable_sort(rows.begin(), rows.end(),
                     [&](size_t a, size_t b) { return length(a) > length(b); });
    std::vector<ChoiceScore> scores(examples.size());
    std::vector<int> inputs(size_t(B) * size_t(T)), targets(inputs.size());
    std::vector<double> losses(inputs.size());
    for (size_t begin = 0; begin < rows.size(); begin += size_t(B)) {
        size_t count = std::min(size_t(B), rows.size() - begin);
        size_t width = std::min(size_t(T), length(rows[begin]));
        std::fill(inputs.begin(), inputs.end(), 0);
        std::fill(targets.begin(), targets.end(), kIgnore);
        for (size_t r = 0; r < count; r++) {
            size_t row = rows[begin + r], ending = row % kChoices;
            ChoiceScore& score = scores[row / kChoices];
            score.tokens[ending] = write_choice_row(examples[row / kChoices], ending,
                                                    &inputs[r * width], &targets[r * width], width);
            if (length(row) > size_t(T)) score.rows_cut++;
        }
        losses_of(inputs.data(), targets.data(), int(count), int(width), losses.data());
        for (size_t i = 0; i < count * width; i++)
            if (targets[i] != kIgnore) {
                size_t row = rows[begin + i / width];
                scores[row / kChoices].loss[row % kChoices] += losses[i];
            }
    }
    return scores;
}

// Sums over examples [first, last), of a rank or of all. A loss that is not a number is
// fail_machine: there is nothing to compare.
inline ChoiceResult count_choices(const std::vector<ChoiceExample>& examples,
                                  const std::vector<ChoiceScore>& scores, size_t first = 0,
                                  size_t last = SIZE_MAX) {
    ChoiceResult result;
    size_t tokens = 0;
    for (size_t i = first; i < std::min(last, examples.size()); i++) {
        for (double loss : scores[i].loss)
            if (!std::isfinite(loss))
                fail_machine(
                    "example %zu: the loss of an ending is not finite; is the model whole?", i);
        size_t label = size_t(examples[i].label);
        result.examples++;
        result.correct += scores[i].prediction() == label;
        result.correct_norm += scores[i].prediction_norm() == label;
        result.rows_cut += scores[i].rows_cut;
        result.loss += scores[i].loss[label];
        tokens += size_t(scores[i].tokens[label]);
    }
    if (tokens > 0) result.loss /= double(tokens);
    return result;
}
