// The tests of hellaswag.h: both forms of the file, damaged in every way; and scores, against a
// plain computation of one ending at a time.

#include "../../hellaswag.h"

#include <gtest/gtest.h>

#include <fstream>
#include <random>

#include "tools.h"

namespace {

void choice_put(std::string* bytes, int word) {
    auto narrow = uint16_t(word);
    bytes->append(reinterpret_cast<const char*>(&narrow), sizeof narrow);
}

// llm.c's file, written from its description and from nothing in hellaswag.h.
std::string choice_bin(const std::vector<ChoiceExample>& examples) {
    std::string stream;
    size_t longest = 0;
    for (size_t i = 0; i < examples.size(); i++) {
        std::string body;
        choice_put(&body, int(i));
        choice_put(&body, examples[i].label);
        choice_put(&body, 4);
        choice_put(&body, int(examples[i].context.size()));
        for (int id : examples[i].context) choice_put(&body, id);
        for (const std::vector<int>& ending : examples[i].endings) {
            choice_put(&body, int(ending.size()));
            for (int id : ending) choice_put(&body, id);
        }
        choice_put(&stream, 65535);
        choice_put(&stream, int(body.size() + 4));
        stream += body;
        longest = std::max(longest, body.size() + 4);
    }
    int32_t header[256] = {20240522, 1, int32_t(examples.size()), int32_t(longest)};
    return std::string(reinterpret_cast<char*>(header), sizeof header) + stream;
}

std::vector<ChoiceExample> random_choices(size_t count, int vocab_size, unsigned seed,
                                          int longest = 12) {
    std::mt19937 random(seed);
    auto ids = [&] { return random_ids(1 + random() % unsigned(longest), vocab_size, random()); };
    std::vector<ChoiceExample> examples(count);
    for (ChoiceExample& example : examples) {
        example.context = ids();
        for (std::vector<int>& ending : example.endings) ending = ids();
        example.label = int(random() % 4);
    }
    return examples;
}

bool same(const std::vector<ChoiceExample>& a, const std::vector<ChoiceExample>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
        return x.context == y.context && x.endings == y.endings && x.label == y.label;
    });
}

std::string choice_file(const std::string& content, const std::string& name = "hs.bin") {
    std::string path = test_folder() + "/" + name;
    std::ofstream(path, std::ios::binary) << content;
    return path;
}

std::vector<ChoiceExample> read_choices(const std::string& path, int vocab_size = 100) {
    Tokenizer bytes = Tokenizer::bytes();
    return read_hellaswag(path, &bytes, path.ends_with(".bin") ? vocab_size : 257);
}

void set_word(std::string* bytes, size_t at, int word) {
    auto narrow = uint16_t(word);
    memcpy(bytes->data() + at, &narrow, sizeof narrow);
}

}  // namespace

// ---- llm.c's file ----

TEST(HellaSwagBin, IsReadAsItWasWritten) {
    std::vector<ChoiceExample> examples = random_choices(9, 100, 1);
    examples[3].endings[2][0] = 99;
    EXPECT_TRUE(same(read_choices(choice_file(choice_bin(examples))), examples));
    std::string named_otherwise = choice_file(choice_bin(examples), "no_extension");
    EXPECT_TRUE(same(read_hellaswag(named_otherwise, nullptr, 100), examples))
        << "known by its content, and needs no tokenizer";
}

TEST(HellaSwagBin, IsRefusedCutAtAnyByteOrLonger) {
    std::string whole = choice_bin(random_choices(3, 100, 2));
    std::string path = choice_file(whole);
    for (size_t size = 0; size < whole.size(); size++) {
        fs::resize_file(path, size);
        std::string error = error_of([&] { read_choices(path); });
        ASSERT_EQ(error.substr(0, 2 + path.size()), "2 " + path) << size << ": " << error;
        std::ofstream(path, std::ios::binary) << whole;
    }
    for (size_t more : {1, 2, 100}) {
        std::string error =
            error_of([&] { read_choices(choice_file(whole + std::string(more, '\0'))); });
        expect_refused(error, format("%zu bytes more than the 3 examples take", more));
    }
}

// Every bit of every field, one at a time (of the zeros of the header, some): what is not refused
// is another token or label.
TEST(HellaSwagBin, IsRefusedWithAnyFieldFlipped) {
    std::vector<ChoiceExample> examples = random_choices(2, 100, 3, 4);
    std::string whole = choice_bin(examples);
    std::string path = choice_file(whole);
    size_t read = 0;
    for (size_t at = 0; at < whole.size(); at += at < 16 || at >= 1020 ? 1 : 251)
        for (int bit = 0; bit < 8; bit++) {
            std::string damaged = whole;
            damaged[at] = char(damaged[at] ^ (1 << bit));
            std::ofstream(path, std::ios::binary) << damaged;
            std::vector<ChoiceExample> other;
            std::string error = error_of([&] { other = read_choices(path); });
            if (!error.empty()) {
                ASSERT_EQ(error.substr(0, 2 + path.size()), "2 " + path) << error;
                continue;
            }
            read++;
            ASSERT_GE(at, 1024u) << "every word of the header is checked";
            ASSERT_FALSE(same(other, examples));
            ASSERT_EQ(choice_bin(other), damaged) << "byte " << at << ", bit " << bit;
        }
    EXPECT_GT(read, 20u);
}

TEST(HellaSwagBin, SaysWhichFieldIsWrong) {
    std::string whole = choice_bin(random_choices(3, 100, 4));
    auto error = [&](size_t at, int word) {
        std::string damaged = whole;
        set_word(&damaged, at, word);
        return error_of([&] { read_choices(choice_file(damaged)); });
    };
    expect_refused(error(0, 1), "byte 0: magic is");
    expect_refused(error(4, 2), "byte 4: version 2");
    expect_refused(error(8, 0), "byte 8: 0 examples");
    expect_refused(error(8, 4), "the file ends before an example");
    expect_refused(error(10, 0x8000), "byte 8: -2147483645 examples");
    expect_refused(error(12, 65534), "byte 12: the longest example is said to have 65534 bytes");
    expect_refused(error(1022, 1), "byte 1020: a word of the header that is not 0");
    expect_refused(error(1024, 65534), "byte 1024: example 0 begins with 65534");
    expect_refused(error(1026, 65534), "byte 1026: example 0 is said to take 65534 bytes");
    expect_refused(error(1026, 8), "more than its example has room for");
    expect_refused(error(1026, 2), "more than its example has room for");
    expect_refused(error(1028, 1), "byte 1028: example 0 has the number 1");
    expect_refused(error(1030, 4), "byte 1030: label 4");
    expect_refused(error(1032, 3), "byte 1032: 3 endings");
    expect_refused(error(1034, 0), "byte 1034: a context has no tokens");
    expect_refused(error(1034, 65535), "byte 1034: a context has 65535 tokens, more than");
    expect_refused(error(1036, 100), "byte 1036: token id 100, the vocabulary has 100");

    std::vector<ChoiceExample> examples = random_choices(2, 100, 4, 3);
    examples[1].context = std::vector<int>(40, 7);  // the longest
    whole = choice_bin(examples);
    uint16_t size;
    memcpy(&size, &whole[1026], sizeof size);
    expect_refused(error(1026, size + 2),
                   format("example 0 is said to take %d bytes, and takes %d", size + 2, int(size)));
}

// ---- JSON lines ----

namespace {

const char* const kLine =
    R"({"ind": 24, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", )"
    R"("ctx": "A man sits. he", "label": 3, "endings": ["is.", "a b", "caf\u00e9", "x"]})";

std::string line_error(const std::string& line) {
    return error_of([&] { read_choices(choice_file("\n" + line + "\n", "hs.jsonl")); });
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
    size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, from.size(), to);
}

}  // namespace

TEST(HellaSwagLines, GiveContextSpaceAndEnding) {
    Tokenizer bytes = Tokenizer::bytes();
    std::string line = kLine;
    std::string no_ctx = replaced(line, "\"ctx\"", "\"other\"");
    std::string no_b = replaced(no_ctx, "\"he\"", "\"\"");
    std::string text_label = replaced(line, "\"label\": 3", "\"label\": \"2\"");
    std::vector<ChoiceExample> read = read_choices(
        choice_file(line + "\r\n\n" + no_ctx + "\n" + no_b + "\n" + text_label, "hs.jsonl"));
    ASSERT_EQ(read.size(), 4u);
    for (size_t i : {0, 1, 3}) EXPECT_EQ(read[i].context, bytes.encode("A man sits. he")) << i;
    EXPECT_EQ(read[2].context, bytes.encode("A man sits."));
    EXPECT_EQ(read[0].label, 3);
    EXPECT_EQ(read[3].label, 2);
    EXPECT_EQ(read[0].endings[0], bytes.encode(" is."));
    EXPECT_EQ(read[0].endings[2], bytes.encode(" caf\xc3\xa9"));
}

TEST(HellaSwagLines, ThatAreNoExamplesAreRefusedByNumber) {
    std::string line = kLine;
    ASSERT_EQ(line_error(line), "");
    expect_refused(line_error("[]"), "hs.jsonl: line 2: not a JSON object");
    expect_refused(line_error(replaced(line, "\"label\": 3, ", "")), "line 2: has no label");
    expect_refused(line_error(replaced(line, ": 3,", ": \"\",")), "has no label");
    for (const char* label : {"4", "-1", "3.0", "\"4\"", "\"33\"", "\"/\"", "null", "[3]", "true"})
        expect_refused(line_error(replaced(line, ": 3,", std::string(": ") + label + ",")),
                       "label must be 0, 1, 2 or 3");
    expect_refused(line_error(replaced(line, "\"A man sits. he\"", "7")), "has no string \"ctx\"");
    expect_refused(line_error(replaced(line, "\"A man sits. he\"", "\"\"")), "the context has no");
    expect_refused(line_error(replaced(line, ", \"x\"]", "]")), "an array of 4");
    expect_refused(line_error(replaced(line, "\"x\"]", "\"x\", \"y\"]")), "an array of 4");
    expect_refused(line_error(replaced(line, "\"x\"]", "4]")), "ending 3 is no string");
    expect_refused(line_error(replaced(line, "\"endings\": [", "\"endings\": {}, \"e\": [")),
                   "an array of 4");
    expect_refused(line_error(replaced(line, "\"x\"", "\"\xff\"")), "line 2: byte");
    expect_refused(line_error(std::string(2000, '[')), "nested deeper");
    expect_refused(line_error(line + std::string(1, '\0') + line),
                   format("line 2: byte %zu: not valid JSON", line.size() + 1));
    expect_refused(error_of([] { read_choices(choice_file("\n \n", "hs.jsonl")); }),
                   "holds no examples");
    std::string path = choice_file(line, "hs.jsonl");
    Tokenizer words = Tokenizer::words("A man sits", false);
    expect_refused(error_of([&] { read_hellaswag(path, &words, 3); }),
                   path + ": line 1: byte 10: the vocabulary lacks the word \".\"");
    expect_refused(error_of([&] { read_hellaswag(path, nullptr, 257); }), "--tokenizer");
    for (size_t size = 1; size < line.size(); size++)
        ASSERT_EQ(line_error(line.substr(0, size)).substr(0, 2), "2 ") << size;
}

// ---- scores ----

namespace {

// A model that reads a row up to a token, and the next one: anything that depends on all of them.
double stand_in(const int* inputs, size_t count, int target) {
    uint64_t hash = hash_bytes(inputs, count * sizeof *inputs, uint64_t(target));
    return double(hash >> 40) / double(1 << 20);
}

TargetLosses stand_in_losses(std::vector<int>* rows_seen = nullptr) {
    return [rows_seen](const int* inputs, const int* targets, int rows, int T, double* losses) {
        if (rows_seen != nullptr) rows_seen->push_back(rows);
        for (size_t r = 0; r < size_t(rows); r++)
            for (size_t t = 0; t < size_t(T); t++) {
                size_t i = r * size_t(T) + t;
                losses[i] = targets[i] == kIgnore
                                ? 1e30
                                : stand_in(inputs + r * size_t(T), t + 1, targets[i]);
            }
    };
}

// The loss of one ending, alone: the last T tokens before each target, and the sum over the ending.
void plain_score(const ChoiceExample& example, size_t ending, size_t T, double* loss, int* count) {
    std::vector<int> row = example.context;
    row.insert(row.end(), example.endings[ending].begin(), example.endings[ending].end());
    size_t first = row.size() > T + 1 ? row.size() - T - 1 : 0;
    *loss = 0, *count = 0;
    for (size_t i = std::max(first + 1, example.context.size()); i < row.size(); i++, ++*count)
        *loss += stand_in(row.data() + first, i - first, row[i]);
}

}  // namespace

TEST(HellaSwagScores, EqualThePlainComputation) {
    std::vector<ChoiceExample> examples = random_choices(23, 50, 5);
    EXPECT_GE(longest_choice(examples), 20u);
    for (int T : {1, 3, 9, 23, 40})
        for (int B : {1, 3, 4, 16, 1000}) {
            std::vector<ChoiceScore> scores = score_choices(examples, B, T, stand_in_losses());
            size_t cut = 0, correct = 0, correct_norm = 0;
            for (size_t i = 0; i < examples.size(); i++) {
                size_t best = 0, best_norm = 0;
                double loss[4];
                int count[4];
                for (size_t e = 0; e < 4; e++) {
                    plain_score(examples[i], e, size_t(T), &loss[e], &count[e]);
                    ASSERT_DOUBLE_EQ(scores[i].loss[e], loss[e]) << "T " << T << ", B " << B;
                    ASSERT_EQ(scores[i].tokens[e], count[e]);
                    size_t row = examples[i].context.size() + examples[i].endings[e].size();
                    cut += row > size_t(T) + 1;
                    if (loss[e] < loss[best]) best = e;
                    if (loss[e] / count[e] < loss[best_norm] / count[best_norm]) best_norm = e;
                }
                correct += best == size_t(examples[i].label);
                correct_norm += best_norm == size_t(examples[i].label);
            }
            ChoiceResult result = count_choices(examples, scores);
            EXPECT_EQ(result.rows_cut, cut);
            EXPECT_EQ(result.correct, correct);
            EXPECT_EQ(result.correct_norm, correct_norm);
            EXPECT_EQ(result.examples, 23u);
        }
}

TEST(HellaSwagScores, AreTheSameOnAnyNumberOfRanks) {
    std::vector<ChoiceExample> examples = random_choices(23, 50, 6);
    std::vector<ChoiceScore> whole = score_choices(examples, 8, 20, stand_in_losses());
    ChoiceResult all = count_choices(examples, whole);
    for (int world : {1, 2, 3, 7, 40}) {
        size_t next = 0, correct = 0, correct_norm = 0;
        for (int rank = 0; rank < world; rank++) {
            auto [first, last] = part_of_rank(examples.size(), rank, world);
            ASSERT_EQ(first, next) << "one after the other";
            ASSERT_LE(last - first, examples.size() / size_t(world) + 1);
            next = last;
            std::vector<ChoiceScore> own =
                score_choices(examples, 8, 20, stand_in_losses(), rank, world);
            for (size_t i = first; i < last; i++) ASSERT_EQ(own[i].loss, whole[i].loss);
            ChoiceResult part = count_choices(examples, own, first, last);
            correct += part.correct, correct_norm += part.correct_norm;
        }
        EXPECT_EQ(next, examples.size());
        EXPECT_EQ(correct, all.correct);
        EXPECT_EQ(correct_norm, all.correct_norm);
    }
    EXPECT_EQ(part_of_rank(SIZE_MAX, 6, 7).second, SIZE_MAX);
}

TEST(HellaSwagScores, FillTheirBatches) {
    std::vector<int> rows;
    score_choices(random_choices(5, 50, 7), 8, 20, stand_in_losses(&rows));
    EXPECT_EQ(rows, (std::vector<int>{8, 8, 4}));
}

TEST(HellaSwagScores, TheFirstOfEqualEndingsIsTaken) {
    ChoiceScore score;
    score.loss = {4, 2, 2, 3};
    score.tokens = {4, 1, 1, 3};
    EXPECT_EQ(score.prediction(), 1u);
    EXPECT_EQ(score.prediction_norm(), 0u);
    score.loss = {1, 1, 1, 1}, score.tokens = {1, 1, 1, 2};
    EXPECT_EQ(score.prediction(), 0u);
    EXPECT_EQ(score.prediction_norm(), 3u);
}

TEST(HellaSwagScores, ThatAreNoNumbersAreTheMachinesFault) {
    std::vector<ChoiceExample> examples = random_choices(2, 50, 8);
    std::vector<ChoiceScore> scores = score_choices(examples, 8, 20, stand_in_losses());
    scores[1].loss[2] = NAN;
    std::string error = error_of([&] { count_choices(examples, scores); });
    EXPECT_EQ(error.substr(0, 13), "1 example 1: ") << error;
}
