// The tests of tokenizer.h: splitting, encoding, training, and every file a tokenizer can be.
// Tests that read ../shared/data skip, counted, where it is missing.

#include "../../tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "tools.h"

namespace tokenizer_test {

using namespace std::string_view_literals;
using Kind = Tokenizer::Kind;

const char* const kShakespeare = "../shared/data/tinyshakespeare.txt";
const char* const kGpt2Merges = "../shared/data/gpt2_vocab.bpe";
const char* const kGpt2Ids = "../shared/data/gpt2_encoder.json";

std::string every_byte() {
    std::string text;
    for (int byte = 0; byte < 256; byte++) text.push_back(char(byte));
    return text;
}

std::string random_bytes(std::mt19937& random, size_t size) {
    std::string text(size, '\0');
    for (char& c : text) c = char(random() & 0xff);
    return text;
}

// Text drawn from strings that meet the cases of the split pattern and make many equal counts.
std::string random_text(std::mt19937& random, size_t strings) {
    static const std::vector<std::string_view> kStrings = {"a"sv,
                                                           "a"sv,
                                                           "b"sv,
                                                           "ab"sv,
                                                           "aa"sv,
                                                           " "sv,
                                                           " "sv,
                                                           "  "sv,
                                                           "\n"sv,
                                                           "'s"sv,
                                                           "'"sv,
                                                           "ll"sv,
                                                           "1"sv,
                                                           "."sv,
                                                           "!!"sv,
                                                           "\303\251"sv,
                                                           "\346\227\245"sv,
                                                           "\314\201"sv,
                                                           "\302\240"sv,
                                                           "\302\205"sv,
                                                           "\360\237\230\200"sv,
                                                           "\200"sv,
                                                           "\377"sv,
                                                           "\340\200"sv,
                                                           "\000"sv};
    std::string text;
    for (size_t i = 0; i < strings; i++) text += kStrings[random() % kStrings.size()];
    return text;
}

constexpr Pattern kAllPatterns[] = {Pattern::gpt2, Pattern::cl100k, Pattern::o200k,
                                    Pattern::cl100k_json};

std::vector<std::string> pieces_of(std::string_view text, Pattern pattern = Pattern::gpt2) {
    std::vector<std::string> pieces;
    for (size_t begin = 0; begin < text.size();) {
        size_t end =
            with_pattern(pattern, [&](auto known) { return piece_end<known()>(text, begin); });
        EXPECT_GT(end, begin);
        EXPECT_LE(end, text.size());
        pieces.emplace_back(text.substr(begin, end - begin));
        begin = end;
    }
    return pieces;
}

// A regular expression over classes of characters, matched as it is defined: alternatives in their
// order, repetitions greedy, giving back one by one. What the hand-written patterns must equal.
struct PlainAtom {
    enum class Test { classes, characters, no_non_space, end } test;
    unsigned classes;               // of CharacterClass
    std::string_view with = "";     // also (characters: only) these ASCII characters
    std::string_view without = "";  // but not these
    size_t least = 1, most = 1;
    bool any_case = false;
};
using PlainAlternative = std::vector<PlainAtom>;

bool plain_fits(const PlainAtom& atom, std::string_view text, size_t at, size_t* length) {
    if (at >= text.size()) return false;
    ClassifiedCharacter c = classify_at(text, at);
    *length = c.length;
    char byte = text[at];
    bool is_in = c.length == 1 && uint8_t(byte) < 0x80 && atom.with.find(byte) != atom.with.npos;
    bool is_out = c.length == 1 && atom.without.find(byte) != atom.without.npos;
    if (atom.test == PlainAtom::Test::classes) return (c.kind & atom.classes || is_in) && !is_out;
    if (!atom.any_case) return is_in;
    std::string_view character = text.substr(at, c.length);
    bool folded = c.length == 1 && uint8_t(byte) < 0x80 &&
                  atom.with.find(char(byte | 0x20)) != atom.with.npos;
    return folded || (character == "\305\277" && atom.with.find('s') != atom.with.npos);
}

// Where a match of atoms[k...] from `at` ends; npos where there is none.
size_t plain_match(const PlainAlternative& atoms, size_t k, std::string_view text, size_t at) {
    constexpr size_t kNo = std::string_view::npos;
    if (k == atoms.size()) return at;
    const PlainAtom& atom = atoms[k];
    size_t length = 0;
    if (atom.test == PlainAtom::Test::end)
        return at == text.size() ? plain_match(atoms, k + 1, text, at) : kNo;
    if (atom.test == PlainAtom::Test::no_non_space) {
        bool space = at == text.size() || classify_at(text, at).kind == kSpace;
        return space ? plain_match(atoms, k + 1, text, at) : kNo;
    }
    std::vector<size_t> ends = {at};
    while (ends.size() <= atom.most && plain_fits(atom, text, ends.back(), &length))
        ends.push_back(ends.back() + length);
    for (; ends.size() > atom.least; ends.pop_back())
        if (size_t end = plain_match(atoms, k + 1, text, ends.back()); end != kNo) return end;
    return kNo;
}

std::vector<PlainAlternative> plain_pattern(Pattern pattern) {
    using Test = PlainAtom::Test;
    constexpr size_t kMany = ~size_t(0) - 1;
    constexpr unsigned kOther = kMark | kRest, kWord = kUpper | kLower | kOtherLetter;
    bool gpt2 = pattern == Pattern::gpt2, o200k = pattern == Pattern::o200k;
    auto spelt = [&](std::string_view letters) {
        PlainAlternative atoms = {{Test::characters, 0, "'"}};
        for (size_t i = 0; i < letters.size(); i++)
            atoms.push_back({Test::characters, 0, letters.substr(i, 1), "", 1, 1, !gpt2});
        return atoms;
    };
    std::vector<PlainAlternative> contractions, all;
    for (const char* letters : {"s", "t", "re", "ve", "m", "ll", "d"})
        contractions.push_back(spelt(letters));
    PlainAtom space = {Test::characters, 0, " ", "", 0, 1};
    PlainAtom before = {Test::classes, kOther | kSpace, "", "\r\n", 0, 1};
    if (!o200k) all = contractions;
    if (gpt2) {
        for (unsigned classes : {kWord, unsigned(kNumber), kOther})
            all.push_back({space, {Test::classes, classes, "", "", 1, kMany}});
    } else if (o200k) {
        constexpr unsigned kFirst = kUpper | kOtherLetter | kMark;
        constexpr unsigned kSecond = kLower | kOtherLetter | kMark;
        for (size_t least : {0, 1}) {
            PlainAlternative word = {before,
                                     {Test::classes, kFirst, "", "", least, kMany},
                                     {Test::classes, kSecond, "", "", 1 - least, kMany}};
            // (...)? around the contractions: each of them behind the word, then none.
            for (const PlainAlternative& end : contractions) {
                all.push_back(word);
                all.back().insert(all.back().end(), end.begin(), end.end());
            }
            all.push_back(word);
        }
    } else {
        all.push_back({before, {Test::classes, kWord, "", "", 1, kMany}});
    }
    if (!gpt2) {
        all.push_back({{Test::classes, kNumber, "", "", 1, 3}});
        all.push_back({space,
                       {Test::classes, kOther, "", "", 1, kMany},
                       {Test::characters, 0, o200k ? "\r\n/" : "\r\n", "", 0, kMany}});
    }
    PlainAtom spaces = {Test::classes, kSpace, "", "", 1, kMany};
    if (pattern == Pattern::cl100k) all.push_back({spaces, {Test::end, 0}});
    if (!gpt2)
        all.push_back({{Test::classes, kSpace, "", "", 0, kMany},
                       {Test::characters, 0, "\r\n", "", 1, kMany}});
    all.push_back({spaces, {Test::no_non_space, 0}});
    all.push_back({spaces});
    return all;
}

std::vector<std::string> plain_pieces(std::string_view text, Pattern pattern) {
    std::vector<PlainAlternative> alternatives = plain_pattern(pattern);
    std::vector<std::string> pieces;
    for (size_t begin = 0; begin < text.size();) {
        size_t end = std::string_view::npos;
        for (const PlainAlternative& atoms : alternatives) {
            end = plain_match(atoms, 0, text, begin);
            if (end != std::string_view::npos) break;
        }
        if (end == std::string_view::npos) return {};  // the patterns match every character
        pieces.emplace_back(text.substr(begin, end - begin));
        begin = end;
    }
    return pieces;
}

// Text from strings that meet the cases of all patterns, invalid UTF-8 and capitals among them.
std::string pattern_text(std::mt19937& random, size_t strings) {
    static const std::vector<std::string_view> kStrings = {"a"sv,
                                                           "B"sv,
                                                           "xY"sv,
                                                           "\303\251"sv,
                                                           "\303\211"sv,
                                                           "\307\205"sv,
                                                           "\346\227\245"sv,
                                                           "\312\260"sv,
                                                           "\314\201"sv,
                                                           "\340\244\203"sv,
                                                           "1"sv,
                                                           "23"sv,
                                                           "4567"sv,
                                                           "\331\243"sv,
                                                           "\302\262"sv,
                                                           " "sv,
                                                           " "sv,
                                                           "  "sv,
                                                           "\n"sv,
                                                           "\r\n"sv,
                                                           "\t"sv,
                                                           "\302\205"sv,
                                                           "\302\240"sv,
                                                           "\343\200\200"sv,
                                                           "'s"sv,
                                                           "'S"sv,
                                                           "'re"sv,
                                                           "'lL"sv,
                                                           "'\305\277"sv,
                                                           "'"sv,
                                                           "'v"sv,
                                                           "ll"sv,
                                                           "."sv,
                                                           "!/"sv,
                                                           "/"sv,
                                                           "\360\237\230\200"sv,
                                                           "\200"sv,
                                                           "\303"sv,
                                                           "\342\202"sv,
                                                           "\355\240\200"sv,
                                                           "\377"sv,
                                                           "\000"sv};
    std::string text;
    for (size_t i = 0; i < strings; i++) text += kStrings[random() % kStrings.size()];
    return text;
}

// Byte-pair encoding as it is defined, on strings, without an index: what the fast ways must equal.
using PlainMerge = std::pair<std::string, std::string>;
using PlainPiece = std::vector<std::string>;

PlainPiece plain_bytes(const std::string& piece) {
    PlainPiece symbols;
    for (char c : piece) symbols.emplace_back(1, c);
    return symbols;
}

void plain_join(PlainPiece& symbols, const PlainMerge& merge) {
    PlainPiece joined;
    for (size_t i = 0; i < symbols.size(); i++) {
        bool hit =
            i + 1 < symbols.size() && symbols[i] == merge.first && symbols[i + 1] == merge.second;
        joined.push_back(hit ? symbols[i] + symbols[i + 1] : symbols[i]);
        if (hit) i++;
    }
    symbols = joined;
}

struct PlainTraining {
    std::vector<PlainMerge> merges;
    std::vector<PlainPiece> pieces;  // of the text, as they are cut at the end
};

PlainTraining plain_train(std::string_view text, size_t most_merges, const BpeTraining& how = {}) {
    PlainTraining training;
    for (const std::string& piece : pieces_of(text, how.pattern))
        training.pieces.push_back(plain_bytes(piece));
    while (training.merges.size() < most_merges) {
        std::map<PlainMerge, size_t> count;
        std::vector<PlainMerge> order_seen;
        for (const PlainPiece& piece : training.pieces)
            for (size_t i = 0; i + 1 < piece.size(); i++)
                if (count[{piece[i], piece[i + 1]}]++ == 0)
                    order_seen.emplace_back(piece[i], piece[i + 1]);
        if (order_seen.empty()) break;
        PlainMerge best = order_seen[0];
        for (const PlainMerge& pair : order_seen)
            if (count[pair] > count[best]) best = pair;
        if (count[best] < how.min_frequency) break;
        for (PlainPiece& piece : training.pieces) plain_join(piece, best);
        training.merges.push_back(best);
    }
    return training;
}

std::vector<std::string> bytes_of(const Tokenizer& tokenizer, const std::vector<int>& ids) {
    std::vector<std::string> tokens;
    for (int id : ids) tokens.emplace_back(tokenizer.token_bytes(id));
    return tokens;
}

// Trains both ways and compares the merges and what the text becomes; returns the number of merges.
size_t compare_training(const std::string& text, int vocab_size, const BpeTraining& how = {}) {
    Tokenizer tokenizer = Tokenizer::train_bpe(text, vocab_size, how);
    PlainTraining plain = plain_train(text, size_t(vocab_size) - 257, how);
    EXPECT_EQ(size_t(tokenizer.vocab_size()), 257 + plain.merges.size());
    for (size_t i = 0; i < plain.merges.size() && 257 + i < size_t(tokenizer.vocab_size()); i++)
        EXPECT_EQ(tokenizer.token_bytes(256 + int(i)),
                  plain.merges[i].first + plain.merges[i].second)
            << "merge " << i;
    std::vector<std::string> tokens;
    for (const PlainPiece& piece : plain.pieces)
        tokens.insert(tokens.end(), piece.begin(), piece.end());
    EXPECT_EQ(bytes_of(tokenizer, tokenizer.encode(text)), tokens);
    return plain.merges.size();
}

// A copy that went through files.
Tokenizer reloaded(const Tokenizer& tokenizer) {
    std::string folder = test_folder();
    tokenizer.save(folder);
    return Tokenizer::load(folder);
}

void expect_same(const Tokenizer& a, const Tokenizer& b) {
    ASSERT_EQ(a.kind(), b.kind());
    ASSERT_EQ(a.vocab_size(), b.vocab_size());
    EXPECT_EQ(a.end_of_text(), b.end_of_text());
    EXPECT_EQ(a.fingerprint(), b.fingerprint());
    for (int id = 0; id < a.vocab_size(); id++)
        ASSERT_EQ(a.token_bytes(id), b.token_bytes(id)) << id;
    std::mt19937 random(7);
    for (int i = 0; i < 20; i++) {
        std::string text = random_text(random, 200);
        ASSERT_EQ(a.encode(text), b.encode(text));
    }
}

// A tokenizer.json as other programs write it: byte-level BPE with two merges.
json small_json() {
    ByteAlphabet alphabet;
    json vocabulary, merges = json::array({"h e", json::array({"he", "y"})});
    for (int rank = 0; rank < 256; rank++) {
        char byte = char(alphabet.byte_of_rank[size_t(rank)]);
        vocabulary[alphabet.spell({&byte, 1})] = rank;
    }
    vocabulary["he"] = 256;
    vocabulary["hey"] = 257;
    json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}};
    return {{"version", "1.0"},
            {"added_tokens", {{{"id", 258}, {"content", "<|endoftext|>"}, {"special", true}}}},
            {"pre_tokenizer", byte_level},
            {"post_processor", byte_level},
            {"decoder", byte_level},
            {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", merges}}}};
}

void expect_start(const std::string& text, std::string_view start) {
    EXPECT_EQ(text.substr(0, start.size()), start);
}

// Written without the syncs that files worth keeping get.
void write_plainly(const std::string& path, std::string_view content) {
    std::ofstream(path, std::ios::binary) << content;
}

// What load says of a file with this content, without the file's name.
std::string load_error(std::string_view content) {
    std::string path = test_folder() + "/tokenizer.json";
    write_plainly(path, content);
    std::string error = error_of([&] { Tokenizer::load(path); });
    size_t at = error.find(path);
    EXPECT_TRUE(error.empty() || at != std::string::npos) << "does not name the file: " << error;
    EXPECT_EQ(error.find('\n'), std::string::npos) << "more than one line: " << error;
    return at == std::string::npos ? error : error.erase(at, path.size() + 2);
}

}  // namespace tokenizer_test

TEST(Tokenizer, SplitsAsGpt2) {
    using namespace tokenizer_test;
    // From tokenizers' Split and Python's regex, which agree.
    const std::vector<std::vector<std::string_view>> expected = {
        {"Hello"sv, " world"sv},
        {"it"sv, "'s"sv, " don"sv, "'t"sv, " we"sv, "'re"sv, " I"sv, "'ve"sv, " I"sv, "'m"sv,
         " we"sv, "'ll"sv, " he"sv, "'d"sv},
        {"IT"sv, "'"sv, "S"sv, " DON"sv, "'"sv, "T"sv, " WE"sv, "'"sv, "RE"sv},
        {"''"sv, "s"sv, " '"sv, "s"sv, "'"sv},
        {"'"sv},
        {"x"sv, "'"sv},
        {"x"sv, "'re"sv},
        {"x"sv, "'"sv, "r"sv},
        {"x"sv, "'"sv, "l"sv, " ll"sv, "'"sv, "l"sv},
        {" '"sv, "s"sv},
        {"s"sv, "'s"sv, "'s"sv},
        {"'ve"sv, "'ve"sv, "x"sv},
        {"a"sv, " "sv, " b"sv},
        {"a"sv, "  "sv, " b"sv},
        {"a"sv, " \n"sv, " b"sv},
        {"a"sv, "\n"sv, "\n"sv, "b"sv},
        {"a"sv, "\n"sv},
        {"a"sv, " "sv},
        {"a"sv, "  "sv},
        {"  "sv},
        {" "sv},
        {"\n"sv},
        {"\t"sv, "\t"sv, "x"sv},
        {" "sv, "\t"sv, "x"sv},
        {"\t"sv, " x"sv},
        {"a"sv, "\r"sv, "\n"sv, "b"sv},
        {"x"sv, "\013"sv, "\014"sv, "y"sv},
        {"a"sv, "\034"sv, "b"sv, "\037"sv},
        {"a"sv, "\302\240"sv, "b"sv},
        {"a"sv, " \302\240"sv, " b"sv},
        {"\302\240"sv, "\302\240"sv, "b"sv},
        {"a"sv, "\302\205"sv, "\302\205"sv, "b"sv},
        {"a"sv, "\302\205"sv, "b"sv},
        {"a"sv, "\342\200\213"sv, "b"sv},
        {"a"sv, " \342\200\213"sv},
        {"a"sv, "\341\240\216"sv, "b"sv},
        {"a"sv, "\342\200\250"sv, "b"sv, " \342\200\251"sv},
        {"a"sv, "\343\200\200"sv, "\343\200\200"sv, "b"sv},
        {"\341\232\200"sv, "x"sv},
        {"a"sv, "\342\200\257"sv, "b"sv, "\342\201\237"sv, "c"sv},
        {"\357\273\277"sv, "a"sv},
        {"abc"sv, "123"sv, "def"sv},
        {"12"sv, " 345"sv},
        {" 12"sv},
        {"3"sv, "."sv, "14"sv},
        {"x"sv, "\302\262"sv},
        {"\302\275"sv, " \342\205\247"sv, " \331\243\331\244"sv, " \340\271\221\340\271\222"sv},
        {"\346\227\245\346\234\254\350\252\236"sv, " \343\203\206\343\202\271\343\203\210"sv},
        {"\346\227\245\346\234\254"sv, " \350\252\236"sv, "\343\200\202"sv},
        {"\320\277\321\200\320\270\320\262\320\265\321\202"sv, " \320\274\320\270\321\200"sv},
        {"a"sv, "\314\201"sv, " e"sv, "\314\201"sv, "x"sv},
        {"\314\201"sv},
        {" \314\201"sv, "a"sv},
        {"\340\244\250\340\244\256\340\244\270"sv, "\340\245\215"sv, "\340\244\244"sv,
         "\340\245\207"sv, " \340\244\246"sv, "\340\245\201"sv, "\340\244\250"sv, "\340\244\277"sv,
         "\340\244\257"sv, "\340\244\276"sv},
        {"\327\251\327\234\327\225\327\235"sv},
        {"\360\237\230\200"sv, " \360\237\230\200\360\237\230\200"sv},
        {"a"sv, "\360\237\230\200"sv, "b"sv},
        {"\360\237\221\251\342\200\215\360\237\222\273"sv, " x"sv},
        {"a"sv, "_"sv, "b"sv},
        {"foo"sv, "("sv, "bar"sv, ","sv, " baz"sv, ");"sv},
        {" "sv, " int"sv, " x"sv, " ="sv, " 0"sv, ";"sv, "\n\n   "sv, " return"sv, " x"sv, ";"sv,
         "\n"sv},
        {"$"sv, "5"sv, "."sv, "00"sv, " \342\202\254"sv, "7"sv},
        {"\342\200\246\342\200\224\342\200\234"sv, "x"sv, "\342\200\235"sv},
        {"don"sv, "\342\200\231"sv, "t"sv},
        {"l"sv, "'"sv, "\303\251t\303\251"sv},
        {"\307\205"sv, " \312\260"sv, " \302\252"sv, " \302\272"sv},
        {"\000"sv, "a"sv, "\000"sv},
        {"\177"sv},
        {"\355\237\277\356\200\200"sv, " \357\277\277\364\217\277\277"sv},
        {"\360\235\237\216"sv, "\360\235\220\200"sv},
        {"\360\240\200\200"sv, " \360\256\257\260"sv},
        {"\341\262\211"sv, " \360\220\265\200"sv},
        {"<|"sv, "endoftext"sv, "|>"sv},
        {"a"sv, " <|"sv, "endoftext"sv, "|>"sv, " b"sv},
        {" "sv, " <|"sv, "endoftext"sv, "|>"sv, "  "sv}};
    for (const auto& pieces : expected) {
        std::string text;
        for (std::string_view piece : pieces) text += piece;
        std::vector<std::string> want(pieces.begin(), pieces.end());
        EXPECT_EQ(pieces_of(text), want) << "in \"" << text << "\"";
    }
    EXPECT_TRUE(pieces_of("").empty());
}

TEST(Tokenizer, SplitsInvalidUtf8AsNeitherLetterNorNumberNorSpace) {
    using namespace tokenizer_test;
    using Pieces = std::vector<std::string>;
    EXPECT_EQ(pieces_of("a\200b"), (Pieces{"a", "\200", "b"}));
    EXPECT_EQ(pieces_of("a \200\377.1"), (Pieces{"a", " \200\377.", "1"}));
    EXPECT_EQ(pieces_of("\303"), (Pieces{"\303"}));                      // cut short
    EXPECT_EQ(pieces_of("a\303 \251"), (Pieces{"a", "\303", " \251"}));  // cut by a space
    EXPECT_EQ(pieces_of("x\300\240y"), (Pieces{"x", "\300\240", "y"}));  // an overlong space
    EXPECT_EQ(pieces_of("x\355\240\200y"), (Pieces{"x", "\355\240\200", "y"}));  // a surrogate
    EXPECT_EQ(pieces_of("x\364\220\200\200y"), (Pieces{"x", "\364\220\200\200", "y"}));  // U+110000
}

TEST(Tokenizer, LettersAreCountedUpToTheFirstOther) {
    for (size_t place = 0; place < 8; place++) {
        for (int byte = 0; byte < 256; byte++) {
            std::string text = "aZzAmMkK";
            text[place] = char(byte);
            bool letter = kClassOfByte[size_t(byte)] & kLetter;
            EXPECT_EQ(leading_letters(text.data()), letter ? 8 : place) << place << ' ' << byte;
            // What follows the first other changes nothing.
            if (place < 7) text[place + 1] = char(255 - byte);
            if (letter) continue;
            EXPECT_EQ(leading_letters(text.data()), place) << place << ' ' << byte;
        }
    }
}

TEST(Tokenizer, WhiteSpaceIsTheUnicodeProperty) {
    std::set<int> expected = {0x9,    0xa,    0xb,    0xc,    0xd,    0x20,   0x85,
                              0xa0,   0x1680, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000,
                              0x2000, 0x2001, 0x2002, 0x2003, 0x2004, 0x2005, 0x2006,
                              0x2007, 0x2008, 0x2009, 0x200a};
    std::set<int> found;
    size_t letters = 0, numbers = 0, marks = 0, capitals = 0, small_letters = 0;
    for (int code_point = 0; code_point < 0x110000; code_point++) {
        if (code_point >= 0xd800 && code_point < 0xe000) continue;
        utf8proc_uint8_t utf8[4];
        auto length = utf8proc_encode_char(code_point, utf8);
        auto [kind, size] = classify_at({reinterpret_cast<char*>(utf8), size_t(length)}, 0);
        ASSERT_EQ(size, size_t(length));
        if (kind == kSpace) found.insert(code_point);
        letters += (kind & kLetter) != 0;
        numbers += kind == kNumber;
        marks += kind == kMark;
        capitals += kind == kUpper;
        small_letters += kind == kLower;
    }
    EXPECT_EQ(found, expected);
    // Unicode 16.0, counted through tiktoken; a library that knows a later Unicode finds more.
    EXPECT_GE(letters, 141028u);
    EXPECT_GE(numbers, 1911u);
    EXPECT_GE(marks, 2501u);
    EXPECT_GE(capitals, 1889u);
    EXPECT_GE(small_letters, 2257u);
}

TEST(Tokenizer, CharactersAreThoseThatTheLibraryReads) {
    using namespace tokenizer_test;
    auto compare = [](std::string_view text) {
        auto bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
        utf8proc_int32_t code_point = -1;
        auto length = utf8proc_iterate(bytes, utf8proc_ssize_t(text.size()), &code_point);
        Character character = character_at(text, 0);
        if (length <= 0) {
            EXPECT_EQ(character.symbol, kInvalidByte + uint8_t(text[0]));
            EXPECT_EQ(character.length, 1u);
        } else {
            EXPECT_EQ(character.symbol, code_point);
            EXPECT_EQ(character.length, size_t(length));
        }
    };
    std::string text(4, ' ');
    const unsigned seconds[] = {0x00, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xff};
    for (unsigned first = 0; first < 256; first++)
        for (unsigned second : seconds)
            for (unsigned third : seconds)
                for (unsigned fourth : seconds) {
                    text = {char(first), char(second), char(third), char(fourth)};
                    for (size_t size = 1; size <= 4; size++)
                        compare(std::string_view(text).substr(0, size));
                }
}

TEST(Tokenizer, PiecesAreThoseOfTheRegularExpressions) {
    using namespace tokenizer_test;
    std::mt19937 random(21);
    for (Pattern pattern : kAllPatterns) {
        for (int round = 0; round < 4000; round++) {
            std::string text = pattern_text(random, 1 + size_t(round) % 14);
            ASSERT_EQ(pieces_of(text, pattern), plain_pieces(text, pattern))
                << name_of(pattern).name << " in "
                << json(text).dump(-1, ' ', true, json::error_handler_t::replace);
        }
        for (int round = 0; round < 300; round++) {
            std::string text = random_bytes(random, 40);
            ASSERT_EQ(pieces_of(text, pattern), plain_pieces(text, pattern));
        }
    }
}

TEST(Tokenizer, TextMayBeCutWhereSafeCutSays) {
    using namespace tokenizer_test;
    std::mt19937 random(22);
    for (Pattern pattern : kAllPatterns) {
        size_t cuts = 0;
        for (int round = 0; round < 1500; round++) {
            std::string text = pattern_text(random, 30);
            std::vector<std::string> whole = pieces_of(text, pattern);
            for (size_t from = 0; from <= text.size(); from++) {
                size_t cut = safe_cut(text, from);
                ASSERT_TRUE(cut >= from && cut <= text.size() && (cut > 0 || text.empty()));
                if (cut == text.size()) break;
                cuts++;
                std::string_view view = text;
                std::vector<std::string> parts = pieces_of(view.substr(0, cut), pattern);
                for (std::string& piece : pieces_of(view.substr(cut), pattern))
                    parts.push_back(std::move(piece));
                ASSERT_EQ(parts, whole) << name_of(pattern).name << " at " << cut;
                from = cut;
            }
        }
        EXPECT_GT(cuts, 4000u);
    }
    EXPECT_EQ(safe_cut("", 0), 0u);
    EXPECT_EQ(safe_cut("aaaa", 1), 4u);
    EXPECT_EQ(safe_cut("aa bb", 1), 2u);
    EXPECT_EQ(safe_cut("aa's", 1), 4u);
}

TEST(Tokenizer, SplitsAsThePeersDo) {
    using namespace tokenizer_test;
    const char* path = "dev/reference/fixtures/tokenizer_splits.json";
    json fixture = parse_json(read_file(path), path);
    ASSERT_GT(fixture["texts"].size(), 300u);
    for (Pattern pattern : kAllPatterns) {
        const json& expected = fixture["lengths"][name_of(pattern).name];
        ASSERT_EQ(expected.size(), fixture["texts"].size());
        for (size_t i = 0; i < expected.size(); i++) {
            std::vector<size_t> lengths;
            std::string text = fixture["texts"][i];
            for (const std::string& piece : pieces_of(text, pattern))
                lengths.push_back(piece.size());
            EXPECT_EQ(json(lengths), expected[i]) << name_of(pattern).name << ": " << text;
        }
    }
}

TEST(Tokenizer, ThreadsChangeNoId) {
    using namespace tokenizer_test;
    std::mt19937 random(23);
    for (Pattern pattern : kAllPatterns) {
        std::string text = pattern_text(random, 1000000);
        BpeTraining training;
        training.pattern = pattern;
        Tokenizer tokenizer = Tokenizer::train_bpe(text.substr(0, 50000), 400, training);
        std::vector<int> alone, together = {5};
        tokenizer.encode(text, alone, 1);
        tokenizer.encode(text, together, 3);
        ASSERT_EQ(together.size(), alone.size() + 1);
        EXPECT_TRUE(std::equal(alone.begin(), alone.end(), together.begin() + 1));
        EXPECT_EQ(together[0], 5);
        EXPECT_EQ(tokenizer.decode(alone), text);
        // And both are what the pieces give one by one.
        std::vector<int> singly;
        for (const std::string& piece : pieces_of(text.substr(0, 60000), pattern))
            tokenizer.encode(piece, singly);
        singly.resize(singly.size() - 4);  // the last piece may be cut
        EXPECT_TRUE(std::equal(singly.begin(), singly.end(), alone.begin()));
    }
    std::string run(1 << 21, 'x');  // nowhere to cut
    Tokenizer tokenizer = Tokenizer::train_bpe("xx xxx xxxx", 300);
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(run)), run);
}

TEST(Tokenizer, MergesInAnyOrderGoByRankThenPlace) {
    using namespace tokenizer_test;
    std::mt19937 random(24);
    std::string learned, letters = "aaabbc";
    for (int i = 0; i < 2000; i++) learned += i % 9 == 0 ? ' ' : letters[random() % letters.size()];
    std::vector<PlainMerge> merges = plain_train(learned, 60).merges;
    std::string folder = test_folder();
    Tokenizer::train_bpe(learned, 257 + 60).save(folder);
    json file = parse_json(read_file(folder + "/tokenizer.json"), "file");
    std::shuffle(merges.begin(), merges.end(), random);
    ByteAlphabet alphabet;
    file["model"]["merges"] = json::array();
    for (const PlainMerge& merge : merges)
        file["model"]["merges"].push_back(
            {alphabet.spell(merge.first), alphabet.spell(merge.second)});
    write_plainly(folder + "/tokenizer.json", file.dump());
    Tokenizer tokenizer = Tokenizer::load(folder);
    std::map<PlainMerge, size_t> rank_of;
    for (size_t i = 0; i < merges.size(); i++) rank_of[merges[i]] = i;
    for (size_t size = 1; size < 700; size += 1 + size / 12) {
        std::string text;
        for (size_t i = 0; i < size; i++) text += letters[random() % letters.size()];
        if (size % 5 == 0) text.assign(size, 'a');
        PlainPiece plain = plain_bytes(text);
        for (;;) {
            size_t best = plain.size(), best_rank = merges.size();
            for (size_t i = 0; i + 1 < plain.size(); i++) {
                auto found = rank_of.find({plain[i], plain[i + 1]});
                if (found != rank_of.end() && found->second < best_rank)
                    best = i, best_rank = found->second;
            }
            if (best == plain.size()) break;
            plain[best] += plain[best + 1];
            plain.erase(plain.begin() + ptrdiff_t(best) + 1);
        }
        EXPECT_EQ(bytes_of(tokenizer, tokenizer.encode(text)), plain) << text;
    }
}

TEST(Tokenizer, AnyBytesComeBack) {
    using namespace tokenizer_test;
    std::mt19937 random(1);
    std::string learned = random_text(random, 3000) + random_bytes(random, 500) + every_byte();
    const Tokenizer all[] = {Tokenizer::bytes(), Tokenizer::chars(learned),
                             Tokenizer::train_bpe(learned, 257),
                             Tokenizer::train_bpe(learned, 700)};
    for (const Tokenizer& tokenizer : all) {
        EXPECT_EQ(tokenizer.decode(tokenizer.encode("")), "");
        EXPECT_EQ(tokenizer.decode(tokenizer.encode(learned)), learned);
        for (int byte = 0; byte < 256; byte++) {
            std::string text(1, char(byte));
            EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text) << byte;
        }
        for (size_t size = 0; size < 300; size++) {
            std::string text = random_bytes(random, size) + random_text(random, size);
            // With a token for every byte, a character vocabulary spells unknown characters in
            // bytes.
            ASSERT_EQ(tokenizer.decode(tokenizer.encode(text)), text) << size;
        }
    }
}

TEST(Tokenizer, BytesHaveTheirValueAsId) {
    using namespace tokenizer_test;
    Tokenizer tokenizer = Tokenizer::bytes();
    EXPECT_EQ(tokenizer.kind(), Kind::bytes);
    EXPECT_EQ(tokenizer.vocab_size(), 257);
    EXPECT_EQ(tokenizer.end_of_text(), 256);
    EXPECT_EQ(tokenizer.token_bytes(256), "<|endoftext|>");
    std::vector<int> ids = tokenizer.encode(every_byte());
    for (int byte = 0; byte < 256; byte++) EXPECT_EQ(ids[size_t(byte)], byte);
}

TEST(Tokenizer, CharactersAreSortedByCodePoint) {
    using namespace tokenizer_test;
    Tokenizer tokenizer = Tokenizer::chars("b\360\237\230\200a\377\303\251b\n\200");
    std::vector<std::string_view> expected = {
        "\n", "a", "b", "\303\251", "\360\237\230\200", "\200", "\377", "<|endoftext|>"};
    ASSERT_EQ(tokenizer.vocab_size(), int(expected.size()));
    EXPECT_EQ(tokenizer.end_of_text(), 7);
    for (int id = 0; id < 8; id++) EXPECT_EQ(tokenizer.token_bytes(id), expected[size_t(id)]);
    EXPECT_EQ(tokenizer.encode("ab\303\251\377"), (std::vector<int>{1, 2, 3, 6}));
}

TEST(Tokenizer, WordsAreThoseOfTheSplit) {
    // Python: [w for w in re.split(r'([,.:;?_!"()\']|--|\s)', text) if w.strip()], ids in sorted
    // order, and re.sub(r'\s+([,.:;?!"()\'])', r'\1', " ".join(words)).
    const std::string text =
        "Hello, do you like tea?\011In the \"sunlit_terraces\"  of--the---palace;\302\240it's "
        "(caf\303\251)\034\346\227\245\346\234\254\343\200\200ok...";
    const std::vector<int> expected = {10, 4, 14, 24, 16, 21, 9,  11, 23, 0, 20, 12, 22, 0, 17, 5,
                                       23, 5, 6,  8,  15, 1,  19, 2,  13, 3, 25, 18, 7,  7, 7};
    const std::string written =
        "Hello, do you like tea? In the\" sunlit _ terraces\" of -- the -- -palace; it' s( "
        "caf\303\251) \346\227\245\346\234\254 ok...";
    Tokenizer known = Tokenizer::words(text, false), unknown = Tokenizer::words(text, true);
    EXPECT_EQ(known.vocab_size(), 26);
    EXPECT_EQ(known.encode(text), expected);
    EXPECT_EQ(unknown.encode(text), expected);
    EXPECT_EQ(known.decode(expected), written);
    EXPECT_EQ(known.end_of_text(), -1);
    EXPECT_EQ(unknown.vocab_size(), 28);
    EXPECT_EQ(unknown.end_of_text(), 26);
    std::vector<int> ids = unknown.encode("tea, milk <|endoftext|> tea");
    EXPECT_EQ(unknown.decode(ids), "tea, <|unk|> <|endoftext|> tea");
    EXPECT_EQ(error_of([&] {
                  known.encode("tea, milk");
              }).find("2 byte 5: the vocabulary lacks the word \"milk\""),
              0u);
}

TEST(Tokenizer, WordsAreSavedAndLoaded) {
    for (bool unknown : {false, true}) {
        std::string folder = test_folder();
        Tokenizer words = Tokenizer::words("a -- b, caf\303\251 _ 'c' <|endoftext|>", unknown);
        words.save(folder);
        Tokenizer again = Tokenizer::load(folder);
        EXPECT_EQ(again.fingerprint(), words.fingerprint());
        EXPECT_EQ(again.encode("b, a"), words.encode("b, a"));
        EXPECT_EQ(again.kind(), Tokenizer::Kind::words);
        expect_refused(error_of([&] { words.save_as(TokenizerFormat::merges, folder + "/x"); }),
                       "holds byte-level BPE only");
        std::string text = read_file(folder + "/tokenizer.json");
        auto changed = [&](const std::string& from, const std::string& to) {
            std::string hostile = text;
            size_t at = hostile.find(from);
            EXPECT_NE(at, std::string::npos) << from;
            write_file_atomic(folder + "/tokenizer.json", hostile.replace(at, from.size(), to));
            return error_of([&] { Tokenizer::load(folder); });
        };
        expect_refused(changed("WhitespaceSplit", "Whitespace"), "is not a Split by the pattern");
        expect_refused(changed("|--", "|-"), "without the Split that belongs to words");
        expect_refused(changed("WordLevel", "BPE"), "model: type \"BPE\" is not supported");
        expect_refused(changed("\"a\": ", "\"a b\": "), "\"a b\" is not of this kind");
        expect_refused(changed("\"decoder\": null", "\"decoder\": {\"type\": \"Fuse\"}"),
                       "decoder:");
        expect_refused(changed("\"unk_token\": \"<|unk|>\"", "\"unk_token\": \"b\""),
                       "model.unk_token");
    }
    expect_refused(error_of([] { Tokenizer::words(" \n", true); }), "has no words");
    expect_refused(error_of([] { Tokenizer::words("ab\377", true); }),
                   "byte 2: the text is not UTF-8");
}

TEST(Tokenizer, CharactersThatAreLackingAreDroppedAndSaid) {
    Tokenizer tokenizer = Tokenizer::chars("abcd");
    std::string missing;
    std::vector<int> ids = tokenizer.encode("aXb\303\251YXc\200<\303\251\200", &missing);
    EXPECT_EQ(ids, (std::vector<int>{0, 1, 2}));
    EXPECT_EQ(missing, "X\303\251Y<0x80><");
    missing.clear();
    tokenizer.encode("a\n\x7f", &missing);
    EXPECT_EQ(missing, "<0x0A><0x7F>");
    missing.clear();
    tokenizer.encode("abcabc", &missing);
    EXPECT_EQ(missing, "");
    EXPECT_EQ(tokenizer.encode("<|endoftext|>"),
              (std::vector<int>{3}));  // plain text: the letter d
    Tokenizer::bytes().encode("any \377", &missing);
    Tokenizer::train_bpe("x", 300).encode("any \377", &missing);
    EXPECT_EQ(missing, "");
}

TEST(Tokenizer, CharactersThatAreLackingAreSpeltInBytesWhereAllAreThere) {
    Tokenizer tokenizer = Tokenizer::chars("a\251\200\303");
    std::string missing;
    std::vector<int> ids = tokenizer.encode("\303\251a\303\252", &missing);
    EXPECT_EQ(tokenizer.decode(ids), "\303\251a");
    EXPECT_EQ(missing, "\303\252");
}

TEST(Tokenizer, EncodeAppends) {
    Tokenizer tokenizer = Tokenizer::train_bpe("ab ab ab", 259);
    std::vector<int> ids = {7}, second = tokenizer.encode("ab ab ab");
    tokenizer.encode("ab ab ab", ids);
    second.insert(second.begin(), 7);
    EXPECT_EQ(ids, second);
}

TEST(Tokenizer, SpecialTokensAreTextTokensOrForbidden) {
    using namespace tokenizer_test;
    json file = small_json();
    file["added_tokens"].push_back({{"id", 259}, {"content", "<|endoftext|>!"}, {"special", true}});
    file["added_tokens"].push_back({{"id", 260}, {"content", "<|a|>"}, {"special", true}});
    std::string path = test_folder() + "/tokenizer.json";
    write_plainly(path, file.dump());
    Tokenizer tokenizer = Tokenizer::load(path);
    auto encode = [&](std::string_view text, const std::vector<std::string>& names) {
        std::vector<int> ids = {7};
        tokenizer.encode_specials(text, tokenizer.special_tokens(names), false, ids);
        EXPECT_EQ(ids[0], 7);
        ids.erase(ids.begin());
        EXPECT_EQ(tokenizer.decode(ids), text);
        return ids;
    };
    using Ids = std::vector<int>;
    std::string_view text = "hey<|endoftext|>!<|a|><|endoftext|> hey <|a"sv;
    EXPECT_EQ(encode(text, {}), tokenizer.encode(text));
    Ids plain_end = tokenizer.encode(" hey <|a"), expected = {257, 259, 260, 258};
    expected.insert(expected.end(), plain_end.begin(), plain_end.end());
    EXPECT_EQ(encode(text, {"all"}), expected);
    expected = {257, 258};
    for (std::string_view part : {"!<|a|>"sv, " hey <|a"sv}) {
        if (part[0] == ' ') expected.push_back(258);
        for (int id : tokenizer.encode(part)) expected.push_back(id);
    }
    EXPECT_EQ(encode(text, {"<|endoftext|>"}), expected);
    EXPECT_EQ(encode("<|endoftext|>", {"<|endoftext|>"}), (Ids{258}));
    EXPECT_EQ(encode("", {"all"}), Ids());
    // What stands on either side of a token is encoded apart: h and ey here, not hey.
    EXPECT_EQ(encode("he<|a|>y", {"all"}), (Ids{256, 260, 88}));
    EXPECT_EQ(tokenizer.special_tokens({"<|a|>", "<|endoftext|>", "<|a|>"}), (Ids{258, 260}));
    EXPECT_EQ(error_of([&] { tokenizer.special_tokens({"<|b|>"}); }),
              "2 special token <|b|>: this tokenizer has <|endoftext|>, <|endoftext|>!, <|a|>");
    Ids ids;
    EXPECT_EQ(error_of([&] {
                  tokenizer.encode_specials(text, tokenizer.special_tokens({"<|a|>"}), true, ids);
              }),
              "2 byte 17: the text holds the special token <|a|>; allow it, or have it taken as "
              "text (--special allow, --special text)");
    tokenizer.encode_specials("hey <|endoftext|>", tokenizer.special_tokens({"<|a|>"}), true, ids);
    EXPECT_EQ(ids, tokenizer.encode("hey <|endoftext|>"));
}

TEST(Tokenizer, SeveralThreadsMayEncodeAtOnce) {
    using namespace tokenizer_test;
    std::mt19937 random(3);
    std::string text = random_text(random, 5000);
    const Tokenizer tokenizer = Tokenizer::train_bpe(text, 400);
    std::vector<int> expected = tokenizer.encode(text), ids[3];
    std::vector<std::thread> threads;
    for (auto& out : ids) threads.emplace_back([&] { out = tokenizer.encode(text); });
    for (auto& thread : threads) thread.join();
    for (auto& out : ids) EXPECT_EQ(out, expected);
}

TEST(Tokenizer, LearnsTheMostFrequentPairAndOfEqualsTheFirst) {
    using namespace tokenizer_test;
    // ab 3, bc 2; then (ab, c) 2 before ( , d) 1 ...
    Tokenizer tokenizer = Tokenizer::train_bpe("abc abc ab d", 261);
    EXPECT_EQ(tokenizer.vocab_size(), 261);
    EXPECT_EQ(tokenizer.end_of_text(), 260);
    EXPECT_EQ(tokenizer.token_bytes(256), "ab");
    EXPECT_EQ(tokenizer.token_bytes(257),
              "abc");  // (ab, c) and ( , ab) both 2: the former is first
    EXPECT_EQ(tokenizer.token_bytes(258), " abc");
    EXPECT_EQ(tokenizer.token_bytes(259), " ab");
    // xy and zw both twice: the order in the text decides.
    EXPECT_EQ(Tokenizer::train_bpe("zw xy zw xy", 258).token_bytes(256), "zw");
    EXPECT_EQ(Tokenizer::train_bpe("xy zw xy zw", 258).token_bytes(256), "xy");
    // All adjacent pairs count, overlapping ones too: aa 3 times in aaaa against bc twice.
    EXPECT_EQ(Tokenizer::train_bpe("bc.bc.aaaa", 258).token_bytes(256), "aa");
}

TEST(Tokenizer, StopsWhereNoPairIsLeft) {
    Tokenizer tokenizer = Tokenizer::train_bpe("abab ab", 1000);
    // ab (3); then, each once: abab, " " + ab.
    EXPECT_EQ(tokenizer.vocab_size(), 256 + 3 + 1);
    EXPECT_EQ(tokenizer.end_of_text(), 259);
    EXPECT_EQ(tokenizer.encode("abab ab"), (std::vector<int>{257, 258}));
    EXPECT_EQ(Tokenizer::train_bpe("a", 1000).vocab_size(), 257);
}

TEST(Tokenizer, TrainingEqualsThePlainDefinition) {
    using namespace tokenizer_test;
    for (const char* text :
         {"aaaaaaa", "aaa aaaa aaaaa aa", "abababab ababab", "abcabcabc bcabca cab",
          "low low low lower lower newest newest newest widest widest",
          "aabaab baabaa aabb bbaa abba baab", "mississippi missing sip"})
        EXPECT_GT(compare_training(text, 400), 0u) << text;
    std::mt19937 random(11);
    for (int round = 0; round < 60; round++) {
        std::string text = random_text(random, 20 + size_t(round) * 4);
        EXPECT_GT(compare_training(text, 257 + 80), 0u) << "round " << round;
    }
    for (int round = 0; round < 60;
         round++) {  // words without a space, of few letters: overlaps and ties
        std::string text;
        for (size_t i = 0; i < 150; i++) text += "aaabbc  "[random() % 8];
        EXPECT_GT(compare_training(text, 257 + 60), 0u) << "round " << round;
    }
    EXPECT_GT(compare_training(random_bytes(random, 400), 257 + 60), 0u);
    for (Pattern pattern : kAllPatterns)
        for (uint64_t least : {1, 2, 3, 7}) {
            BpeTraining how;
            how.pattern = pattern, how.min_frequency = least;
            std::string text = pattern_text(random, 250) + random_text(random, 250);
            size_t merges = compare_training(text, 257 + 120, how);
            EXPECT_TRUE(least == 1 ? merges == 120 : least < 7 || merges < 120) << least;
        }
}

TEST(Tokenizer, TrainingIsTheSameOnAnyNumberOfThreads) {
    using namespace tokenizer_test;
    std::mt19937 random(25);
    std::string text;
    for (int word = 0; text.size() < 1 << 21; word++) {
        // Rare words of equal counts, whose order is that of their first appearance in the text.
        text += format("%c%c%x ", 'a' + int(random() % 26), 'a' + int(random() % 26),
                       unsigned(random() % 3000));
    }
    BpeTraining how;
    how.threads = 1;
    Tokenizer alone = Tokenizer::train_bpe(text, 1500, how);
    EXPECT_EQ(alone.vocab_size(), 1500);
    std::vector<int> steps;
    for (int threads : {2, 3}) {
        how.threads = threads;
        how.progress = [&](int done, int most) {
            EXPECT_EQ(most, 1500 - 257);
            steps.push_back(done);
        };
        expect_same(Tokenizer::train_bpe(text, 1500, how), alone);
    }
    EXPECT_EQ(steps,
              (std::vector<int>{0, 256, 512, 768, 1024, 1243, 0, 256, 512, 768, 1024, 1243}));
}

// As if something stood between them that is no part of any other piece.
TEST(Tokenizer, PiecesAndWordsEndWhereDocumentsDo) {
    using namespace tokenizer_test;
    std::mt19937 random(27);
    std::string text, apart;
    std::vector<size_t> ends;
    while (text.size() < 1 << 21) {
        std::string document;
        for (size_t words = 1 + random() % 3; words > 0; words--)
            document += format("%x%s", unsigned(random() % 3000), words > 1 ? " " : "zz");
        text += document, apart += document + "\n";
        ends.push_back(text.size());
    }
    for (Pattern pattern : kAllPatterns) {
        BpeTraining how;
        how.pattern = pattern, how.threads = 1;
        Tokenizer expected = Tokenizer::train_bpe(apart, 700, how);
        how.document_ends = ends;
        for (int threads : {1, 3}) {
            how.threads = threads;
            expect_same(Tokenizer::train_bpe(text, 700, how), expected);
        }
    }
    std::vector<size_t> behind = {3, 6, 9};  // the last is not of the text
    EXPECT_EQ(Tokenizer::words("onetwo", false, behind).encode("one two"),
              (std::vector<int>{0, 1}));
}

TEST(Tokenizer, MinimumFrequencyEndsTraining) {
    BpeTraining how;
    how.min_frequency = 3;  // ab 3 times; then " ab" and "abc" twice each
    Tokenizer tokenizer = Tokenizer::train_bpe("abc abc ab d", 300, how);
    EXPECT_EQ(tokenizer.vocab_size(), 258);
    EXPECT_EQ(tokenizer.token_bytes(256), "ab");
    how.min_frequency = 4;
    EXPECT_EQ(Tokenizer::train_bpe("abc abc ab d", 300, how).vocab_size(), 257);
}

TEST(Tokenizer, LongPiecesAreMergedAsTheDefinitionSays) {
    using namespace tokenizer_test;
    std::mt19937 random(5);
    std::string learned, letters = "aaabbc";
    for (int i = 0; i < 3000; i++) learned += i % 9 == 0 ? ' ' : letters[random() % letters.size()];
    Tokenizer tokenizer = Tokenizer::train_bpe(learned, 400);
    std::vector<PlainMerge> merges = plain_train(learned, 400 - 257).merges;
    for (size_t size = 1; size < 300; size += 1 + size / 20) {
        std::string text;
        for (size_t i = 0; i < size; i++) text += letters[random() % letters.size()];
        if (size % 3 == 0) text.assign(size, 'a');
        PlainPiece plain = plain_bytes(text);
        for (const PlainMerge& merge : merges) plain_join(plain, merge);
        EXPECT_EQ(bytes_of(tokenizer, tokenizer.encode(text)), plain) << text;
    }
    std::string run(1 << 18, 'a');  // would not end in a minute if it were quadratic
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(run)), run);
}

// Words are merged in blocks, side by side: here of all lengths at all places of a block, fresh and
// met before, in blocks that end anywhere and with so few slots that words of one block share them.
TEST(Tokenizer, WordsOfABlockAreMergedAsTheDefinitionSays) {
    using namespace tokenizer_test;
    std::mt19937 random(26);
    std::string learned, letters = "aaabbc";
    for (int i = 0; i < 3000; i++) learned += i % 9 == 0 ? ' ' : letters[random() % letters.size()];
    Tokenizer tokenizer = Tokenizer::train_bpe(learned, 400);
    std::vector<PlainMerge> merges = plain_train(learned, 400 - 257).merges;
    std::map<std::string, PlainPiece> known;
    auto plain_of = [&](const std::string& piece) {
        auto [at, fresh] = known.try_emplace(piece);
        if (fresh) at->second = plain_bytes(piece);
        if (fresh)
            for (const PlainMerge& merge : merges) plain_join(at->second, merge);
        return at->second;
    };
    auto word = [&](size_t length) {
        std::string letters_of_it = " ";
        while (letters_of_it.size() < length) letters_of_it += letters[random() % letters.size()];
        return letters_of_it;
    };
    std::vector<std::string> usual;
    for (size_t length = 2; length < 46; length++) usual.push_back(word(length));
    for (size_t words = 1; words < 400; words += 1 + words / 40) {
        std::string text;
        for (size_t i = 0; i < words; i++) {
            bool fresh = random() % 4 == 0;
            text += fresh ? word(2 + random() % 44) : usual[random() % usual.size()];
        }
        PlainPiece plain;
        for (const std::string& piece : pieces_of(text))
            for (const std::string& token : plain_of(piece)) plain.push_back(token);
        ASSERT_EQ(bytes_of(tokenizer, tokenizer.encode(text)), plain) << text;
    }
    // Words behind which others stand that they would be merged with.
    std::string texts;
    std::vector<size_t> ends, id_ends;
    std::vector<int> ids;
    PlainPiece plain;
    for (const std::string& piece : usual) {
        texts += piece.substr(1);
        ends.push_back(texts.size());
        for (const std::string& token : plain_of(piece.substr(1))) plain.push_back(token);
    }
    tokenizer.encode_each(texts, ends, ids, id_ends);
    EXPECT_EQ(bytes_of(tokenizer, ids), plain);
}

TEST(Tokenizer, ManyDifferentPiecesDoNotConfuseTheCache) {
    using namespace tokenizer_test;
    // More words than the cache has slots, twice over: the ids of the halves are equal, and so are
    // those of each word alone.
    std::string half;
    for (int i = 0; i < 90000; i++)
        half += " w" + std::string(1, char('a' + i % 26)) + format("x%d", i);
    Tokenizer tokenizer = Tokenizer::train_bpe(half.substr(0, 20000), 400);
    std::vector<int> once = tokenizer.encode(half), twice = tokenizer.encode(half + half);
    ASSERT_EQ(twice.size(), 2 * once.size());
    EXPECT_TRUE(std::equal(once.begin(), once.end(), twice.begin()));
    EXPECT_TRUE(std::equal(once.begin(), once.end(), twice.begin() + ptrdiff_t(once.size())));
    std::vector<int> singly;
    for (const std::string& piece : pieces_of(half)) tokenizer.encode(piece, singly);
    EXPECT_EQ(singly, once);
}

TEST(Tokenizer, TrainingRefusesWhatItCannotDo) {
    EXPECT_EQ(
        error_of([] { Tokenizer::train_bpe("abc", 256); }),
        "2 a BPE vocabulary of 256 tokens: it takes 257 (256 bytes and <|endoftext|>) to 65536");
    EXPECT_NE(error_of([] { Tokenizer::train_bpe("abc", -1); }), "");
    EXPECT_NE(error_of([] { Tokenizer::train_bpe("abc", 65537); }), "");
    EXPECT_EQ(error_of([] { Tokenizer::train_bpe("", 300); }),
              "2 the text is empty: a BPE vocabulary needs text to learn from");
    EXPECT_EQ(error_of([] { Tokenizer::chars(""); }),
              "2 the text is empty: a character vocabulary needs at least one");
    std::string everything;
    for (int code_point = 0x4000; code_point < 0x4000 + 0x18000; code_point++) {
        utf8proc_uint8_t utf8[4];
        if (code_point >= 0xd800 && code_point < 0xe000) continue;
        auto length = utf8proc_encode_char(code_point, utf8);
        everything.append(reinterpret_cast<char*>(utf8), size_t(length));
    }
    EXPECT_NE(error_of([&] { Tokenizer::chars(everything); }).find("use a BPE"), std::string::npos);
}

TEST(Tokenizer, UnknownIdsAreNamed) {
    Tokenizer tokenizer = Tokenizer::bytes();
    EXPECT_EQ(error_of([&] {
                  tokenizer.decode({65, 257});
              }),
              "2 token id 257: the vocabulary has ids 0 to 256");
    EXPECT_EQ(error_of([&] { tokenizer.token_bytes(-1); }),
              "2 token id -1: the vocabulary has ids 0 to 256");
}

TEST(Tokenizer, SavedAndLoadedItIsTheSame) {
    using namespace tokenizer_test;
    std::mt19937 random(9);
    std::string text = random_text(random, 4000);
    std::string ascii = "the quick brown fox jumps over the lazy dog";
    const Tokenizer all[] = {Tokenizer::bytes(),
                             Tokenizer::chars(text),
                             Tokenizer::chars(ascii),
                             Tokenizer::chars(every_byte()),
                             Tokenizer::train_bpe(text, 257),
                             Tokenizer::train_bpe(text, 600),
                             Tokenizer::train_bpe(ascii, 300)};
    std::set<uint64_t> fingerprints;
    for (const Tokenizer& tokenizer : all) {
        expect_same(tokenizer, reloaded(tokenizer));
        Tokenizer copy = tokenizer;
        expect_same(tokenizer, copy);
        fingerprints.insert(tokenizer.fingerprint());
    }
    EXPECT_EQ(fingerprints.size(), std::size(all));
    EXPECT_NE(Tokenizer::train_bpe("ab ab cd", 258).fingerprint(),
              Tokenizer::train_bpe("cd cd ab", 258).fingerprint());
}

TEST(Tokenizer, SavedFilesSayWhatTransformersAsks) {
    using namespace tokenizer_test;
    std::string folder = test_folder();
    Tokenizer::train_bpe("ab ab ab", 259).save(folder + "/new/folder", 128);
    json config = parse_json(read_file(folder + "/new/folder/tokenizer_config.json"), "config");
    EXPECT_EQ(config["tokenizer_class"], "PreTrainedTokenizerFast");
    EXPECT_EQ(config["eos_token"], "<|endoftext|>");
    EXPECT_EQ(config["bos_token"], "<|endoftext|>");
    EXPECT_EQ(config["model_max_length"], 128);
    EXPECT_EQ(config["add_prefix_space"], false);
    EXPECT_EQ(config["clean_up_tokenization_spaces"], false);
    json file = parse_json(read_file(folder + "/new/folder/tokenizer.json"), "tokenizer");
    EXPECT_EQ(file["model"]["merges"], json({"a b", "\304\240 ab"}));
    EXPECT_EQ(file["added_tokens"][0]["id"], 258);
    EXPECT_EQ(file["pre_tokenizer"]["use_regex"], true);
    Tokenizer::bytes().save(folder);
    config = parse_json(read_file(folder + "/tokenizer_config.json"), "config");
    EXPECT_FALSE(config.contains("model_max_length"));
    write_file_atomic(folder + "/file", "x");
    std::string error = error_of([&] { Tokenizer::bytes().save(folder + "/file/below"); });
    expect_start(error, "1 ");
}

TEST(Tokenizer, ReadsHuggingFaceFiles) {
    using namespace tokenizer_test;
    json file = small_json();
    std::string path = test_folder() + "/tokenizer.json";
    auto load = [&] {
        write_plainly(path, file.dump());
        return Tokenizer::load(path);
    };
    Tokenizer plain = load();
    EXPECT_EQ(plain.kind(), Kind::bpe);
    EXPECT_EQ(plain.vocab_size(), 259);
    EXPECT_EQ(plain.end_of_text(), 258);
    EXPECT_EQ(plain.encode("hey he"), (std::vector<int>{257, 220, 256}));

    file["model"].erase("type");  // as older files have it
    file["model"]["unk_token"] = "<|endoftext|>";
    file["model"]["continuing_subword_prefix"] = "";
    for (const char* key : {"lstrip", "rstrip", "single_word"})
        file["added_tokens"][0][key] = false;
    file["post_processor"] = nullptr;
    expect_same(load(), plain);
    file["post_processor"] = {{"type", "TemplateProcessing"},
                              {"single", {{{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}}};
    expect_same(load(), plain);
    json split = {{"type", "Split"},
                  {"pattern", {{"Regex", name_of(Pattern::gpt2).regex}}},
                  {"behavior", "Isolated"},
                  {"invert", false}};
    json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
    file["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {split, bytes}}};
    expect_same(load(), plain);

    // A special token inside the vocabulary, others beside it; spelt as text, not in byte-level
    // characters.
    file["model"]["vocab"]["<|endoftext|>"] = 258;
    file["added_tokens"].push_back({{"id", 259}, {"content", "\303\251 x"}, {"special", true}});
    Tokenizer more = load();
    EXPECT_EQ(more.vocab_size(), 260);
    EXPECT_EQ(more.end_of_text(), 258);
    EXPECT_EQ(more.decode({259, 257}), "\303\251 xhey");
    EXPECT_NE(more.fingerprint(), plain.fingerprint());
    expect_same(more, reloaded(more));

    file["added_tokens"] = json::array();
    file["model"]["vocab"].erase("<|endoftext|>");
    EXPECT_EQ(load().end_of_text(), -1);
    expect_same(load(), reloaded(load()));
}

TEST(Tokenizer, TwoWaysToOneTokenAreKept) {
    using namespace tokenizer_test;
    json file = small_json();  // "y" after "he", and "ey" after "h"
    file["model"]["vocab"]["ey"] = 258;
    file["model"]["merges"] = {"e y", "h ey", "h e", "he y"};
    file["added_tokens"] = json::array();
    std::string path = test_folder() + "/tokenizer.json";
    write_plainly(path, file.dump());
    Tokenizer tokenizer = Tokenizer::load(path);
    EXPECT_EQ(tokenizer.encode("hey"), (std::vector<int>{257}));
    expect_same(tokenizer, reloaded(tokenizer));
}

TEST(Tokenizer, RefusesWhatItDoesNotSupport) {
    using namespace tokenizer_test;
    struct Case {
        const char* pointer;
        json value;
        const char* expected;
    };
    const Case cases[] = {
        {"/normalizer", {{"type", "NFC"}}, "2 normalizer: is not supported"},
        {"/truncation", {{"max_length", 5}}, "2 truncation: is not supported"},
        {"/padding", {{"length", 5}}, "2 padding: is not supported"},
        {"/model", nullptr, "2 model: is missing"},
        {"/model", "BPE", "2 model: is missing or not an object"},
        {"/model/type", "WordPiece", "2 model: type \"WordPiece\" is not supported"},
        {"/model/type", "Unigram", "2 model: type \"Unigram\" is not supported"},
        {"/model/type", 5, "2 model: type \"\" is not supported"},
        {"/model/dropout", 0.1, "2 model.dropout: is not supported"},
        {"/model/ignore_merges", true, "2 model.ignore_merges: true is not supported"},
        {"/model/ignore_merges", "no", "2 model.ignore_merges: is not true or false"},
        {"/model/continuing_subword_prefix", "##", "2 model.continuing_subword_prefix"},
        {"/model/end_of_word_suffix", "</w>", "2 model.end_of_word_suffix"},
        {"/pre_tokenizer/type", "Whitespace",
         "2 pre_tokenizer: type \"Whitespace\" is not supported"},
        {"/pre_tokenizer/add_prefix_space", true, "2 pre_tokenizer.add_prefix_space: true"},
        {"/pre_tokenizer/use_regex", false, "2 model.merges: is not empty"},
        {"/pre_tokenizer/use_regex", 1, "2 pre_tokenizer.use_regex: is not true or false"},
        {"/pre_tokenizer", {{"type", "Sequence"}}, "2 pre_tokenizer: type \"Sequence\""},
        {"/pre_tokenizer",
         {{"type", "Sequence"}, {"pretokenizers", {1, 2}}},
         "2 pre_tokenizer.pretok"},
        {"/pre_tokenizer", nullptr, "2 decoder: is neither Fuse nor"},
        {"/pre_tokenizer", 3, "2 pre_tokenizer: type \"\""},
        {"/post_processor/type", "BertProcessing", "2 post_processor: type \"BertProcessing\""},
        {"/post_processor",
         {{"type", "TemplateProcessing"}, {"single", {1, 2}}},
         "2 post_processor.single: adds tokens"},
        {"/decoder", nullptr, "2 decoder: is not ByteLevel"},
        {"/decoder/type", "WordPiece", "2 decoder: is not ByteLevel"},
        {"/added_tokens", 1, "2 added_tokens: is not a list"},
        {"/added_tokens/0", 1, "2 added_tokens[0]: has no content or no id"},
        {"/added_tokens/0/content", "", "2 added_tokens[0]: has no content"},
        {"/added_tokens/0/special", false, "2 added_tokens[0].special: false is not supported"},
        {"/added_tokens/0/lstrip", true, "2 added_tokens[0].lstrip: true is not supported"},
        {"/added_tokens/0/rstrip", true, "2 added_tokens[0].rstrip: true is not supported"},
        {"/added_tokens/0/single_word", true, "2 added_tokens[0].single_word: true is not"},
        {"/added_tokens/0/id", 259, "2 model.vocab: id 259 in a vocabulary of 259 tokens"},
        {"/added_tokens/0/id", 7, "2 model.vocab: two tokens have the id 7"},
        {"/added_tokens/0/content", "he", "2 added_tokens[0]: id 258, but model.vocab gives"},
        {"/model/vocab", nullptr, "2 model.vocab: is missing or not an object"},
        {"/model/vocab", json::array(), "2 model.vocab: is missing or not an object"},
        {"/model/vocab", json::object(), "2 model.vocab: id 258 in a vocabulary of 1 tokens"},
        {"/model/vocab/he", 255, "2 model.vocab: two tokens have the id 255"},
        {"/model/vocab/he", -1, "2 model.vocab: token \"he\": id -1 is not within 0 to 1048574"},
        {"/model/vocab/he", 1048575, "2 model.vocab: token \"he\": id 1048575 is not within"},
        {"/model/vocab/he", 18446744073709551615u,
         "2 model.vocab: token \"he\": id 18446744073709551615"},
        {"/model/vocab/he", 1.5, "2 model.vocab: token \"he\": the id is not an integer"},
        {"/model/vocab/he", "5", "2 model.vocab: token \"he\": the id is not an integer"},
        {"/model/vocab/h\n", 259, "2 model.vocab: token \"h\\n\" is not of this kind"},
        {"/model/vocab/", 259, "2 model.vocab: token \"\" is not of this kind"},
        {"/model/merges", nullptr, "2 model.merges: is missing or not a list"},
        {"/model/merges/1", "he z", "2 model.merges[1]: token \"hez\" is not in the vocabulary"},
        {"/model/merges/1", "hey y", "2 model.merges[1]: token \"heyy\" is not in the vocabulary"},
        {"/model/merges/1", "h e", "2 model.merges[1]: the pair \"h e\" stands there twice"},
        {"/model/merges/1", "hey", "2 model.merges[1]: is not two tokens"},
        {"/model/merges/1", "h e y", "2 model.merges[1]: is not two tokens"},
        {"/model/merges/1", " hey", "2 model.merges[1]: token \"\" is not in the vocabulary"},
        {"/model/merges/1", json::array({"h"}), "2 model.merges[1]: is not two tokens"},
        {"/model/merges/1", json::array({"h", 1}), "2 model.merges[1]: is not two tokens"},
        {"/model/merges/1", 1, "2 model.merges[1]: is not two tokens"},
    };
    ASSERT_EQ(load_error(small_json().dump()), "");
    for (const Case& c : cases) {
        json file = small_json();
        json::json_pointer pointer(c.pointer);
        if (pointer.back().empty()) file["model"]["vocab"][""] = c.value;
        else file[pointer] = c.value;
        std::string error = load_error(file.dump());
        EXPECT_EQ(error.substr(0, strlen(c.expected)), c.expected) << c.pointer << " = " << c.value;
    }
}

TEST(Tokenizer, RefusesVocabulariesThatAreNotWhole) {
    using namespace tokenizer_test;
    json file = small_json();  // the byte 'A' is no longer there
    file["model"]["vocab"].erase("A");
    file["model"]["vocab"]["AA"] = 32;
    expect_start(load_error(file.dump()), "2 model.vocab: no token for the byte 0x41; a");
    file = small_json();
    file["model"]["vocab"]["a"] = 1048575;
    expect_start(load_error(file.dump()), "2 model.vocab: token \"a\": id 1048575 is not");
    std::string many = small_json().dump(), tokens;
    for (int id = 0; id <= 1048575; id++) tokens += format("\"=%d\":1,", id);
    many.insert(many.find("\"he\":"), tokens);
    EXPECT_EQ(load_error(many), "2 model.vocab: 1048834 tokens; at most 1048575 are supported");
    file = small_json();  // a merge that would turn plain text into a special token
    file["added_tokens"].push_back({{"id", 257}, {"content", "hey"}, {"special", true}});
    expect_start(load_error(file.dump()), "2 model.merges[1]: token \"hey\" is special");
}

TEST(Tokenizer, RefusesCharacterFilesItDoesNotSupport) {
    using namespace tokenizer_test;
    std::string folder = test_folder();
    Tokenizer::chars("ab\200").save(folder);
    const json good = parse_json(read_file(folder + "/tokenizer.json"), "good");
    auto error_with = [&](const char* pointer, const json& value) {
        json file = good;
        file[json::json_pointer(pointer)] = value;
        return load_error(file.dump());
    };
    EXPECT_EQ(error_with("/version", "1.0"), "");
    json file = good;  // special tokens: one character, and one that looks like a byte
    file["added_tokens"].push_back({{"id", 0}, {"content", "a"}, {"special", true}});
    file["added_tokens"].push_back({{"id", 2}, {"content", "<0x80>"}, {"special", true}});
    write_plainly(folder + "/tokenizer.json", file.dump());
    std::string missing;
    Tokenizer special = Tokenizer::load(folder);
    EXPECT_EQ(special.encode("ab\200", &missing), (std::vector<int>{0, 1}));
    EXPECT_EQ(missing, "<0x80>");
    EXPECT_EQ(special.token_bytes(2), "<0x80>");
    expect_start(error_with("/model/unk_token", "a"), "2 model.unk_token:");
    expect_start(error_with("/model/byte_fallback", false), "2 model.vocab: token \"<0x80>\" ");
    expect_start(error_with("/model/vocab/ab", 4), "2 model.vocab: token \"ab\" ");
    file = good;
    file["model"]["vocab"] = json::object(), file["added_tokens"] = json::array();
    EXPECT_EQ(load_error(file.dump()), "2 model.vocab: holds no token");
    expect_start(error_with("/model/merges", {"a b"}), "2 model.merges:");
    expect_start(error_with("/decoder", {{"type", "ByteLevel"}}), "2 decoder:");
    expect_start(error_with("/decoder", {{"type", "Sequence"}, {"decoders", {1}}}), "2 decoder:");
}

TEST(Tokenizer, RefusesEveryTruncation) {
    using namespace tokenizer_test;
    std::string folder = test_folder();
    Tokenizer::chars("ab\200").save(folder);
    std::string whole = read_file(folder + "/tokenizer.json"), path = folder + "/cut.json";
    ASSERT_EQ(whole.substr(whole.size() - 2), "}\n");
    write_plainly(path, whole);
    for (size_t size = whole.size() - 2; size != size_t(-1); size--) {
        fs::resize_file(path, size);
        std::string error = error_of([&] { Tokenizer::load(path); });
        ASSERT_EQ(error.substr(0, 2 + path.size()), "2 " + path) << size;
    }
}

TEST(Tokenizer, RefusesFilesThatAreSomethingElse) {
    using namespace tokenizer_test;
    for (std::string_view content :
         {""sv, "hello"sv, "[1]"sv, "\000\000"sv, "version: 0.2\na b\n"sv})
        EXPECT_EQ(load_error(content),
                  "2 no tokenizer: neither tokenizer.json, vocab.json, merges (first line "
                  "`#version`), .tiktoken nor llm.c's tokenizer.bin");
    expect_start(load_error("{}"), "2 model:");
    EXPECT_EQ(load_error("{}\000{}"sv), "2 byte 3: not valid JSON");
    std::string folder = test_folder();
    EXPECT_EQ(error_of([&] { Tokenizer::load(folder); }),
              "2 " + folder + ": the folder holds no tokenizer.json, vocab.json or encoder.json");
    EXPECT_EQ(error_of([&] { Tokenizer::load(folder + "/none"); }).substr(0, 2), "2 ");
}

TEST(Tokenizer, ReadsAndRefusesMergesFiles) {
    using namespace tokenizer_test;
    std::string path = test_folder() + "/merges.txt";
    write_plainly(path, "#version: 0.2\nh e\nhe y\n\304\240 hey");
    Tokenizer tokenizer = Tokenizer::load(path);
    EXPECT_EQ(tokenizer.vocab_size(), 260);
    EXPECT_EQ(tokenizer.end_of_text(), 259);
    EXPECT_EQ(tokenizer.encode("hey hey he"), (std::vector<int>{257, 258, 220, 256}));
    expect_same(tokenizer, reloaded(tokenizer));
    for (const char* empty : {"#version: 0.2", "#version: 0.2\n"}) {
        write_plainly(path, empty);
        EXPECT_EQ(Tokenizer::load(path).vocab_size(), 257);
    }
    auto error = [&](const std::string& lines) { return load_error("#version: 0.2\n" + lines); };
    expect_start(error("h e\n\nhe y\n"), "2 line 3: is not two tok");
    expect_start(error("h e y\n"), "2 line 2: is not two tok");
    EXPECT_EQ(error("he y\n"), "2 line 2: token \"he\" is not in the vocabulary");
    EXPECT_EQ(error("h e\nh e\n"), "2 line 3: makes the token \"he\" a second time");
    for (const char* empty : {"h e\nh \n", "h e\n h\n", "h e\n \n"})
        expect_start(error(empty), "2 line 3: is not two tok");
    EXPECT_EQ(error("h\t e\n"), "2 line 2: is not spelt in byte-level characters");
    EXPECT_EQ(error("h \200\n"), "2 line 2: is not spelt in byte-level characters");
    std::string many;
    for (int i = 0; i < 1000000; i++) {
        std::string digits = format("%06d", i);
        for (size_t n = 1; n < 6; n++)
            if (i % int(pow(10, double(6 - n - 1))) == 0)
                many += digits.substr(0, n) + " " + digits.substr(n, 1) + "\n";
    }
    expect_start(error(many), "2 line 1048320: makes more than 1048575 t");
}

namespace tokenizer_test {

struct FormatName {
    TokenizerFormat format;
    const char* file;  // below a folder, what save_as writes and load takes
};
constexpr FormatName kFormats[] = {{TokenizerFormat::json, ""},
                                   {TokenizerFormat::merges, "vocab.json"},
                                   {TokenizerFormat::openai, "encoder.json"},
                                   {TokenizerFormat::tiktoken, "x.tiktoken"},
                                   {TokenizerFormat::llmc, "tokenizer.bin"}};

// Writes a format into a new folder; returns the path to load.
std::string saved_as(const Tokenizer& tokenizer, const FormatName& name) {
    std::string folder = test_folder(), path = folder + "/" + name.file;
    bool file = name.format == TokenizerFormat::tiktoken || name.format == TokenizerFormat::llmc;
    std::vector<std::string> notes = tokenizer.save_as(name.format, file ? path : folder);
    EXPECT_EQ(notes.empty(),
              name.format == TokenizerFormat::json || (name.format != TokenizerFormat::tiktoken &&
                                                       tokenizer.pattern() == Pattern::gpt2));
    return path;
}

Tokenizer small_tokenizer(Pattern pattern = Pattern::gpt2, int vocab_size = 300) {
    std::mt19937 random(31);
    BpeTraining training;
    training.pattern = pattern;
    return Tokenizer::train_bpe(pattern_text(random, 3000), vocab_size, training);
}

// What load says of a file with this content, named in the folder of an intact one.
std::string error_of_file(const std::string& path, std::string_view content,
                          std::optional<Pattern> pattern = Pattern::gpt2) {
    write_plainly(path, content);
    std::string error = error_of([&] { Tokenizer::load(path, pattern); });
    EXPECT_EQ(error.find('\n'), std::string::npos) << "more than one line: " << error;
    return error;
}

}  // namespace tokenizer_test

TEST(Tokenizer, EveryFormatGivesTheSameTokenizer) {
    using namespace tokenizer_test;
    for (Pattern pattern : kAllPatterns)
        for (int size : {257, 258, 1500}) {
            Tokenizer tokenizer = small_tokenizer(pattern, size);
            for (const FormatName& name : kFormats) {
                std::string path = saved_as(tokenizer, name);
                expect_same(Tokenizer::load(path, pattern), tokenizer);
            }
        }
}

TEST(Tokenizer, Gpt2sFilesAreOneTokenizer) {
    using namespace tokenizer_test;
    if (!fs::exists(kGpt2Merges) || !fs::exists(kGpt2Ids))
        GTEST_SKIP() << kGpt2Merges << " or " << kGpt2Ids << " is missing";
    Tokenizer merges = Tokenizer::load(kGpt2Merges), ids = Tokenizer::load(kGpt2Ids);
    expect_same(merges, ids);
    for (const FormatName& name : kFormats)  // the pattern follows from the number of tokens
        expect_same(Tokenizer::load(saved_as(ids, name)), ids);
    std::string folder = test_folder();
    ids.save_as(TokenizerFormat::openai, folder);
    EXPECT_EQ(parse_json(read_file(folder + "/encoder.json"), "written"),
              parse_json(read_file(kGpt2Ids), "published"));
    std::string published = read_file(kGpt2Merges);
    EXPECT_EQ(read_file(folder + "/vocab.bpe"), published);
}

TEST(Tokenizer, FormatsHaveTheBytesThatTheirReadersExpect) {
    using namespace tokenizer_test;
    Tokenizer tokenizer = Tokenizer::train_bpe("ab ab ab", 258);
    std::string folder = test_folder(), ranks = folder + "/x.tiktoken", bin = folder + "/t.bin";
    tokenizer.save_as(TokenizerFormat::tiktoken, ranks);
    std::string text = read_file(ranks);
    expect_start(text, "IQ== 0\nIg== 1\n");
    EXPECT_TRUE(text.ends_with("\nrQ== 255\nYWI= 256\n")) << text;
    tokenizer.save_as(TokenizerFormat::llmc, bin);
    std::string bytes = read_file(bin);
    EXPECT_EQ(bytes.substr(0, 20), "\xc8\xd7\x34\x01\x02\0\0\0\x02\x01\0\0\x01\x01\0\0\0\0\0\0"sv);
    EXPECT_EQ(bytes.substr(1024, 4), "\1!\1\"");
    EXPECT_TRUE(bytes.ends_with("\2ab\15<|endoftext|>"));
    EXPECT_EQ(bytes.size(), 1024u + 2 * 256 + 3 + 14);
    tokenizer.save_as(TokenizerFormat::merges, folder);
    EXPECT_EQ(read_file(folder + "/merges.txt"), "#version: 0.2\na b\n");
    json vocabulary = parse_json(read_file(folder + "/vocab.json"), "vocab");
    EXPECT_EQ(vocabulary.size(), 258u);
    EXPECT_EQ(vocabulary["\304\240"], 220);
    EXPECT_EQ(vocabulary["ab"], 256);
    EXPECT_EQ(vocabulary["<|endoftext|>"], 257);
}

TEST(Tokenizer, RanksOfUnknownNumberNeedAPattern) {
    using namespace tokenizer_test;
    Tokenizer tokenizer = small_tokenizer(Pattern::o200k);
    std::string ranks = saved_as(tokenizer, kFormats[3]), bin = saved_as(tokenizer, kFormats[4]);
    EXPECT_EQ(error_of([&] { Tokenizer::load(ranks); }),
              "2 " + ranks +
                  ": the end: 299 ranks do not tell by what text is split; name it with "
                  "`tokenizer convert` and --pattern gpt2, cl100k or o200k");
    EXPECT_EQ(error_of([&] { Tokenizer::load(bin); }),
              "2 " + bin +
                  ": byte 8: 300 tokens do not tell by what text is split; name it with "
                  "`tokenizer convert` and --pattern gpt2, cl100k or o200k");
    std::vector<std::string> notes =
        tokenizer.save_as(TokenizerFormat::tiktoken, test_folder() + "/x");
    EXPECT_EQ(notes, (std::vector<std::string>{
                         "the format does not say by what text is split: read it with --pattern "
                         "o200k",
                         "the format holds no special tokens: <|endoftext|> has the id 299"}));
    // A file that says it is not overruled.
    std::string folder = test_folder();
    tokenizer.save(folder);
    expect_same(Tokenizer::load(folder, Pattern::o200k), tokenizer);
    EXPECT_EQ(error_of([&] { Tokenizer::load(folder, Pattern::gpt2); }),
              "2 " + folder +
                  "/tokenizer.json: pre_tokenizer: splits by o200k; leave out "
                  "--pattern gpt2");
}

TEST(Tokenizer, KnownNumbersOfRanksHaveTheirSpecialTokens) {
    using namespace tokenizer_test;
    // As many ranks as cl100k_base has: the bytes, pairs of bytes, and what makes threes of them.
    std::string text;
    int rank = 0;
    auto add = [&](const std::string& bytes) {
        text += to_base64(bytes) + format(" %d\n", rank++);
    };
    for (int a = 0; a < 256; a++) add({char(a)});
    for (int a = 0; a < 256; a++)
        for (int b = 0; b < 256; b++) add({char(a), char(b)});
    for (int a = 0; a < 256 && rank < 100256; a++)
        for (int b = 0; b < 256 && rank < 100256; b++) add({'x', char(a), char(b)});
    std::string path = test_folder() + "/cl100k_base.tiktoken";
    write_plainly(path, text);
    Tokenizer tokenizer = Tokenizer::load(path);
    EXPECT_EQ(tokenizer.pattern(), Pattern::cl100k);
    EXPECT_EQ(tokenizer.vocab_size(), 100277);
    EXPECT_EQ(tokenizer.end_of_text(), 100257);
    EXPECT_EQ(tokenizer.token_bytes(100256), "<|unused_100256|>");
    EXPECT_EQ(tokenizer.token_bytes(100276), "<|unused_100276|>");
    expect_same(tokenizer, reloaded(tokenizer));
    for (const FormatName& name : kFormats)
        expect_same(Tokenizer::load(saved_as(tokenizer, name), Pattern::cl100k), tokenizer);
}

TEST(Tokenizer, DamagedRanksAreRefused) {
    using namespace tokenizer_test;
    std::string path = saved_as(small_tokenizer(), kFormats[3]), whole = read_file(path);
    // Behind a line end a cut cannot be seen but by the number of ranks.
    for (size_t size = 0; size < whole.size(); size++) {
        if (size > 0 && whole[size - 1] == '\n') continue;
        std::string error = error_of_file(path, whole.substr(0, size));
        ASSERT_EQ(error.substr(0, 2 + path.size()), "2 " + path) << size;
    }
    auto error_with = [&](const std::string& from, const std::string& to) {
        std::string damaged = whole;
        size_t at = damaged.find(from);
        EXPECT_NE(at, damaged.npos);
        return error_of_file(path, damaged.replace(at, from.size(), to));
    };
    auto after = [&](const std::string& what) { return "2 " + path + ": " + what; };
    EXPECT_EQ(error_with("IQ== 0\n", "IQ== 0\n\n"),
              after("line 2: is not a token in base64, a space and a rank"));
    EXPECT_EQ(error_with("Ig== 1\n", "IQ== 1\n"), after("line 2: the token stands there twice"));
    EXPECT_EQ(error_with("Ig== 1\n", "Ig== 2\n"),
              after("line 2: the rank is not 1; ranks count up from 0"));
    EXPECT_EQ(error_with("Ig== 1\n", "Ig== 01\n"),
              after("line 2: the rank is not 1; ranks count up from 0"));
    EXPECT_EQ(error_with("Ig== 1\n", "Ih== 1\n"),
              after("line 2: is not a token in base64, a space and a rank"));
    EXPECT_EQ(error_with("Ig== 1\n", "Ig==  1\n"),
              after("line 2: the rank is not 1; ranks count up from 0"));
    EXPECT_EQ(error_with("Ig== 1\n", "IiI= 1\n"),
              after("model.vocab: no token for the byte 0x22; all 256 are needed"));
    EXPECT_EQ(error_of_file(path, whole + to_base64("\"#$%") + " 299\n"),
              after("token 299: 4 tokens of lower id spell \"\\\"#$%\"; two must, since ids are "
                    "the order of merges here"));
    EXPECT_EQ(error_of_file(path, whole + "x"), after("line 300: does not end; the file is cut "
                                                      "short"));
}

TEST(Tokenizer, DamagedLlmcFilesAreRefused) {
    using namespace tokenizer_test;
    std::string path = saved_as(small_tokenizer(), kFormats[4]), whole = read_file(path);
    for (size_t size = 0; size < whole.size(); size++) {
        std::string error = error_of_file(path, whole.substr(0, size));
        ASSERT_EQ(error.substr(0, 2 + path.size()), "2 " + path) << size;
    }
    auto after = [&](const std::string& what) { return "2 " + path + ": " + what; };
    EXPECT_EQ(
        error_of_file(path, whole + '\0'),
        after(format("byte %zu: 1 bytes behind the last token; byte 8 says 300", whole.size())));
    for (size_t field = 0; field < 256; field++)
        for (uint32_t flip : {1u, 0x100u, 0x80000000u}) {
            std::string damaged = whole;
            uint32_t value;
            memcpy(&value, damaged.data() + 4 * field, 4);
            value ^= flip;
            memcpy(damaged.data() + 4 * field, &value, 4);
            std::string error = error_of_file(path, damaged);
            ASSERT_EQ(error.substr(0, 2 + path.size()), "2 " + path) << field << " " << flip;
        }
    std::string version_1 = whole;  // its end of text is 50256
    version_1[4] = 1;
    EXPECT_EQ(error_of_file(path, version_1), after("byte 12: is not zero, as the header is here"));
    version_1[12] = version_1[13] = 0;
    EXPECT_EQ(error_of_file(path, version_1),
              after("byte 4: the end of text is 50256, and that token is not <|endoftext|>"));
    std::string empty = whole;
    empty[1024] = 0;
    EXPECT_EQ(error_of_file(path, empty), after("byte 1024: token 0 has no bytes"));
    auto with_token = [&](const std::string& bytes) {
        std::string more = whole + char(bytes.size()) + bytes;
        uint32_t tokens = 301;
        memcpy(more.data() + 8, &tokens, 4);
        return more;
    };
    std::string twice = after("token 300: stands there twice");
    EXPECT_EQ(error_of_file(path, with_token("a")), twice);
    EXPECT_EQ(error_of_file(path, with_token("<|endoftext|>")), twice);
    EXPECT_EQ(error_of_file(path, with_token("<|\377|>")),
              after("token 300: is special by its <|...|>, and not UTF-8"));
    if (!fs::exists(kGpt2Merges)) GTEST_SKIP() << kGpt2Merges << " is missing";
    Tokenizer gpt2 = Tokenizer::load(kGpt2Merges);
    gpt2.save_as(TokenizerFormat::llmc, path);
    version_1 = read_file(path);
    version_1[4] = 1;
    version_1[12] = version_1[13] = 0;
    write_plainly(path, version_1);
    expect_same(Tokenizer::load(path), gpt2);
}

TEST(Tokenizer, VocabulariesAndMergesThatDoNotFitAreRefused) {
    using namespace tokenizer_test;
    std::string path = saved_as(small_tokenizer(), kFormats[1]);
    std::string merges_path = fs::path(path).replace_filename("merges.txt");
    const std::string vocabulary = read_file(path), merges = read_file(merges_path);
    for (size_t size = 0; size < merges.size() - 1; size++) {
        write_plainly(merges_path, merges.substr(0, size));
        std::string error = error_of([&] { Tokenizer::load(path); });
        ASSERT_EQ(error.substr(0, 2), "2 ") << size;
    }
    write_plainly(merges_path, merges);
    for (size_t size = 0; size < vocabulary.size() - 1; size += 7)
        ASSERT_EQ(error_of_file(path, vocabulary.substr(0, size)).substr(0, 2), "2 ") << size;
    auto error_without = [&](const char* token, const json& id) {
        json damaged = parse_json(vocabulary, "vocabulary");
        if (id.is_null()) damaged.erase(token);
        else damaged[token] = id;
        return error_of_file(path, damaged.dump());
    };
    EXPECT_EQ(error_without("A", nullptr),
              "2 " + path +
                  ": model.vocab: id 299 in a vocabulary of 299 tokens; ids must be "
                  "dense");
    EXPECT_EQ(error_without("zz", 300),
              "2 " + path + ": token \"zz\": no merge of " + merges_path +
                  " makes it, and it is not spelt <|...|> as special tokens are");
    std::string first = merges.substr(14, merges.find('\n', 14) - 14);
    first.erase(first.find(' '), 1);
    EXPECT_EQ(error_without(first.c_str(), nullptr),
              "2 " + merges_path + ": line 2: makes the token " + json(first).dump(-1, ' ', true) +
                  ", which " + path + " lacks");
    write_plainly(path, vocabulary);
    fs::remove(merges_path);
    expect_start(error_of([&] { Tokenizer::load(path); }), "2 " + merges_path + ": cannot open");
    std::string other = test_folder() + "/words.json";
    EXPECT_EQ(error_of_file(other, vocabulary),
              "2 " + other +
                  ": a vocabulary without merges, which are looked for beside "
                  "vocab.json and encoder.json; rename it to one of these");
}

TEST(Tokenizer, WhatAFormatCannotHoldIsNotWritten) {
    using namespace tokenizer_test;
    std::string folder = test_folder(), path = folder + "/file";
    auto error = [&](const Tokenizer& tokenizer, TokenizerFormat format) {
        std::string message = error_of([&] { tokenizer.save_as(format, path); });
        EXPECT_FALSE(fs::exists(path));
        expect_start(message, "2 " + path + ": this format ");
        EXPECT_TRUE(message.ends_with("; write tokenizer.json (--format json)")) << message;
        return message.substr(0, message.rfind(';')).substr(path.size() + 16);
    };
    for (const FormatName& name : kFormats) {
        if (name.format == TokenizerFormat::json) continue;
        EXPECT_EQ(error(Tokenizer::bytes(), name.format), "holds byte-level BPE only");
        EXPECT_EQ(error(Tokenizer::chars("abc"), name.format), "holds byte-level BPE only");
    }
    json file = small_json();
    auto load = [&] {
        write_plainly(folder + "/tokenizer.json", file.dump());
        return Tokenizer::load(folder);
    };
    file["model"]["vocab"]["ey"] = 258;  // two ways to one token
    file["model"]["merges"] = {"e y", "h ey", "h e", "he y"};
    file["added_tokens"][0]["id"] = 259;
    EXPECT_EQ(error(load(), TokenizerFormat::tiktoken),
              "takes the order of ids for that of merges, and merge 1 makes the id 257 after 258");
    file = small_json();
    file["added_tokens"][0]["content"] = "[END]";
    EXPECT_EQ(error(load(), TokenizerFormat::llmc), "needs an <|endoftext|>");
    EXPECT_EQ(error(load(), TokenizerFormat::merges),
              "knows special tokens by <|...|>, and 258 is [END]");
    file = small_json();  // a token that is never used
    file["model"]["vocab"]["yh"] = 259;
    for (size_t pair : {1, 2})
        EXPECT_EQ(error(load(), kFormats[pair].format),
                  "has no tokens but bytes, those of merges and <|...|>, and no merge makes 259");
    file = small_json();  // a special token among the others
    file["added_tokens"][0]["id"] = 256;
    file["model"]["vocab"]["he"] = 258;
    file["model"]["merges"] = json::array({"e y"});
    file["model"]["vocab"].erase("he");
    file["model"]["vocab"].erase("hey");
    file["model"]["vocab"]["ey"] = 257;
    EXPECT_EQ(error(load(), TokenizerFormat::tiktoken),
              "holds no special tokens, so they must have the last ids");
    std::string folder_path = saved_as(load(), kFormats[4]);  // which the bytes of tokens can hold
    expect_same(Tokenizer::load(folder_path, Pattern::gpt2), load());
    file = small_json();  // a token of two merges that this order of ids does not give
    file["model"]["vocab"] = small_json()["model"]["vocab"];
    file["model"]["merges"] = {"h e"};
    file["model"]["vocab"].erase("hey");
    file["model"]["vocab"]["ee"] = 257;
    file["model"]["merges"].push_back("e e");
    expect_same(Tokenizer::load(saved_as(load(), kFormats[3]), Pattern::gpt2), load());
}

TEST(Tokenizer, GivesGpt2Ids) {
    using namespace tokenizer_test;
    if (!fs::exists(kGpt2Merges)) GTEST_SKIP() << kGpt2Merges << " is missing";
    Tokenizer tokenizer = Tokenizer::load(kGpt2Merges);
    EXPECT_EQ(tokenizer.vocab_size(), 50257);
    EXPECT_EQ(tokenizer.end_of_text(), 50256);
    struct Case {
        std::string_view text;
        std::vector<int> ids;
    };
    const Case cases[] = {
        // from tokenizers and tiktoken, which agree
        {"Hello, world! It's 2024."sv, {15496, 11, 995, 0, 632, 338, 48609, 13}},
        {"The quick brown fox jumps over the lazy dog.\n"sv,
         {464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13, 198}},
        {"    def f(x):\n        return x * 2\n"sv,
         {220, 220, 220, 825, 277, 7,    87,   2599, 198, 220, 220,
          220, 220, 220, 220, 220, 1441, 2124, 1635, 362, 198}},
        {"na\303\257ve caf\303\251 \342\200\224 \342\200\234quotes\342\200\235\342\200\246"sv,
         {2616, 38776, 40304, 851, 564, 250, 421, 6421, 447, 251, 1399}},
        {"\346\227\245\346\234\254\350\252\236\343\201\256"
         "\343\203\206\343\202\255\343\202\271\343\203\210"sv,
         {33768, 98, 17312, 105, 45739, 252, 5641, 24336, 25084, 43302}},
        {"\320\277\321\200\320\270\320\262\320\265\321\202, \320\274\320\270\321\200"sv,
         {140, 123, 21169, 18849, 38857, 16843, 20375, 11, 12466, 120, 18849, 21169}},
        {"\360\237\230\200\360\237\221\251\342\200\215\360\237\222\273"sv,
         {47249, 222, 41840, 102, 447, 235, 8582, 240, 119}},
        {"antidisestablishmentarianism"sv, {415, 29207, 44390, 3699, 1042}},
        {"SolidGoldMagikarp petertodd"sv, {46933, 42202, 37444}},
        {"\302\240\343\200\200\342\200\213 \342\200\250x"sv,
         {1849, 5099, 222, 9525, 220, 447, 101, 87}},
        {"                                        x"sv,
         {220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220,
          220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220,
          220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 220, 2124}},
        {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"sv,
         {24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794, 24794,
          24794, 24794, 24794, 24794, 64, 397}},
        {"1234567890 3.14159"sv, {10163, 2231, 30924, 3829, 513, 13, 1415, 19707}},
        {"<|endoftext|>"sv, {27, 91, 437, 1659, 5239, 91, 29}},
        {"https://example.com/?q=a%20b&c=d#e"sv,
         {5450, 1378, 20688, 13, 785, 20924, 80, 28, 64, 4, 1238, 65, 5, 66, 28, 67, 2, 68}},
        {"\r\n\t\000\177"sv, {201, 198, 197, 188, 221}}};
    for (const Case& c : cases) {
        EXPECT_EQ(tokenizer.encode(c.text), c.ids) << c.text;
        EXPECT_EQ(tokenizer.decode(c.ids), c.text);
    }
    if (!fs::exists(kGpt2Ids)) GTEST_SKIP() << kGpt2Ids << " is missing";
    json ids = parse_json(read_file(kGpt2Ids), kGpt2Ids);
    ByteAlphabet alphabet;
    ASSERT_EQ(ids.size(), 50257u);
    for (const auto& [spelling, id] : ids.items()) {
        if (id == 50256) continue;
        ASSERT_EQ(alphabet.spell(tokenizer.token_bytes(id.get<int>())), spelling);
    }
    expect_same(tokenizer, reloaded(tokenizer));
}

TEST(Tokenizer, ShakespeareComesBack) {
    using namespace tokenizer_test;
    if (!fs::exists(kShakespeare)) GTEST_SKIP() << kShakespeare << " is missing";
    std::string text = read_file(kShakespeare);
    Tokenizer bpe = Tokenizer::train_bpe(text, 1024), chars = Tokenizer::chars(text);
    EXPECT_EQ(bpe.vocab_size(), 1024);
    EXPECT_EQ(chars.vocab_size(), 66);
    EXPECT_EQ(bpe.decode(bpe.encode(text)), text);
    EXPECT_EQ(chars.decode(chars.encode(text)), text);
    EXPECT_EQ(bpe.encode(text).size(), 459881u);  // as the plain definition gives it
}
