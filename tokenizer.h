// Text <-> tokens: byte-level BPE (trained here, or GPT-2's own), and vocabularies of bytes, of
// characters and of words.
//
// Byte-level BPE [Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019] cuts text into
// pieces with the split pattern of GPT-2, GPT-4 or GPT-4o, writes each piece as bytes, and joins
// adjacent tokens by a ranked list of merges. A byte vocabulary has one token a byte, a character
// vocabulary one a Unicode character, one of words each word of a text (see for_each_word). All
// four are kept as Hugging Face tokenizer.json, which the `tokenizers` library reads and agrees
// with on any valid UTF-8.
//
// Text is bytes. Those that are not UTF-8 are kept: each is a character of its own, neither letter,
// number nor space. decode(encode(text)) == text for every text, where a character vocabulary lacks
// no character; words alone lose the white space between them.
#pragma once

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <optional>
#include <queue>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

#include "files.h"

constexpr int kMaxVocabulary = 65536;      // of what is made here: shards hold ids as uint16
constexpr int kMaxTokens = (1 << 20) - 1;  // of what files bring along
constexpr std::string_view kEndOfText = "<|endoftext|>";
constexpr std::string_view kUnknown = "<|unk|>";

// ==== characters =================================================================================

// A character of text: a Unicode code point, or kInvalidByte + b for a byte b that is not part of
// UTF-8.
constexpr int kInvalidByte = 0x110000;

struct Character {
    int symbol;
    size_t length;  // in bytes
};

// The character at byte i < text.size(). Overlong forms, surrogates and numbers past U+10FFFF are
// not UTF-8: where no character starts, one byte is a symbol of its own, and the next is looked at.
inline Character character_at(std::string_view text, size_t i) {
    auto byte = [&](size_t k) { return unsigned(uint8_t(text[i + k])); };
    auto continues = [&](size_t k) { return (byte(k) & 0xc0) == 0x80; };
    unsigned first = byte(0);
    size_t left = text.size() - i;
    if (first < 0x80) return {int(first), 1};
    if (first >= 0xc2 && first <= 0xdf && left > 1 && continues(1))
        return {int((first & 0x1f) << 6 | (byte(1) & 0x3f)), 2};
    if ((first & 0xf0) == 0xe0 && left > 2 && continues(1) && continues(2)) {
        unsigned symbol = (first & 0xf) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f);
        if (symbol >= 0x800 && (symbol < 0xd800 || symbol > 0xdfff)) return {int(symbol), 3};
    }
    if ((first & 0xf8) == 0xf0 && left > 3 && continues(1) && continues(2) && continues(3)) {
        unsigned symbol = (first & 0x7) << 18 | (byte(1) & 0x3f) << 12;
        symbol |= (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f);
        if (symbol >= 0x10000 && symbol <= 0x10ffff) return {int(symbol), 4};
    }
    return {kInvalidByte + int(first), 1};
}

// The first byte that is not part of UTF-8; npos if there is none.
inline size_t first_invalid_byte(std::string_view text) {
    for (size_t i = 0; i < text.size();) {
        Character character = character_at(text, i);
        if (character.symbol >= kInvalidByte) return i;
        i += character.length;
    }
    return text.npos;
}

// ==== categories =================================================================================

// What the split patterns tell apart, one bit each, so that a set of them is a mask. \p{L} is
// kLetter, \s is kSpace (Unicode White_Space).
enum CharacterClass : uint8_t {
    kUpper = 1,        // Lu, Lt
    kLower = 2,        // Ll
    kOtherLetter = 4,  // Lm, Lo
    kMark = 8,         // Mn, Mc, Me
    kNumber = 16,      // Nd, Nl, No
    kSpace = 32,
    kRest = 64,       // what is left, bytes that are not UTF-8 among it
    kNotAscii = 128,  // of a byte: ask for the whole character
};
constexpr unsigned kLetter = kUpper | kLower | kOtherLetter;

// The class of a byte that is a character; kNotAscii for all others.
inline constexpr auto kClassOfByte = [] {
    std::array<uint8_t, 256> table{};
    for (unsigned c = 0; c < 256; c++) {
        bool space = c == ' ' || (c >= '\t' && c <= '\r');
        table[c] = c >= 0x80 ? kNotAscii : space ? kSpace : kRest;
        if (c >= 'A' && c <= 'Z') table[c] = kUpper;
        if (c >= 'a' && c <= 'z') table[c] = kLower;
        if (c >= '0' && c <= '9') table[c] = kNumber;
    }
    return table;
}();

// What Unicode 15.1 and 16 added. utf8proc 2.8 (Debian 12) stops at Unicode 15.0, tiktoken and
// tokenizers know these; asked only where utf8proc says `unassigned`, so a newer one is not
// contradicted.
inline uint8_t class_of_recent(int code_point) {
    struct Range {
        int first, last;
        uint8_t kind;
    };
    constexpr uint8_t U = kUpper, W = kLower, O = kOtherLetter, M = kMark, N = kNumber;
    static constexpr Range kRecent[] = {
        {0x897, 0x897, M},     {0x1c89, 0x1c89, U},   {0x1c8a, 0x1c8a, W},   {0xa7cb, 0xa7cc, U},
        {0xa7cd, 0xa7cd, W},   {0xa7da, 0xa7da, U},   {0xa7db, 0xa7db, W},   {0xa7dc, 0xa7dc, U},
        {0x105c0, 0x105f3, O}, {0x10d40, 0x10d49, N}, {0x10d4a, 0x10d4f, O}, {0x10d50, 0x10d65, U},
        {0x10d69, 0x10d6d, M}, {0x10d6f, 0x10d6f, O}, {0x10d70, 0x10d85, W}, {0x10ec2, 0x10ec4, O},
        {0x10efc, 0x10efc, M}, {0x11380, 0x11389, O}, {0x1138b, 0x1138b, O}, {0x1138e, 0x1138e, O},
        {0x11390, 0x113b5, O}, {0x113b7, 0x113b7, O}, {0x113b8, 0x113c0, M}, {0x113c2, 0x113c2, M},
        {0x113c5, 0x113c5, M}, {0x113c7, 0x113ca, M}, {0x113cc, 0x113d0, M}, {0x113d1, 0x113d1, O},
        {0x113d2, 0x113d2, M}, {0x113d3, 0x113d3, O}, {0x113e1, 0x113e2, M}, {0x116d0, 0x116e3, N},
        {0x11bc0, 0x11be0, O}, {0x11bf0, 0x11bf9, N}, {0x11f5a, 0x11f5a, M}, {0x13460, 0x143fa, O},
        {0x16100, 0x1611d, O}, {0x1611e, 0x1612f, M}, {0x16130, 0x16139, N}, {0x16d40, 0x16d6c, O},
        {0x16d70, 0x16d79, N}, {0x18cff, 0x18cff, O}, {0x1ccf0, 0x1ccf9, N}, {0x1e5d0, 0x1e5ed, O},
        {0x1e5ee, 0x1e5ef, M}, {0x1e5f0, 0x1e5f0, O}, {0x1e5f1, 0x1e5fa, N}, {0x2ebf0, 0x2ee5d, O}};
    for (const Range& range : kRecent)
        if (code_point >= range.first && code_point <= range.last) return range.kind;
    return kRest;
}

// The class of a code point, as utf8proc knows it.
inline uint8_t class_of_code_point(int code_point) {
    switch (utf8proc_category(code_point)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LT:
            return kUpper;
        case UTF8PROC_CATEGORY_LL:
            return kLower;
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
            return kOtherLetter;
        case UTF8PROC_CATEGORY_MN:
        case UTF8PROC_CATEGORY_MC:
        case UTF8PROC_CATEGORY_ME:
            return kMark;
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_NO:
            return kNumber;
        case UTF8PROC_CATEGORY_ZS:
        case UTF8PROC_CATEGORY_ZL:
        case UTF8PROC_CATEGORY_ZP:
            return kSpace;
        case UTF8PROC_CATEGORY_CN:
            return class_of_recent(code_point);
        // White_Space is the Z categories and the controls U+0009 to U+000D and U+0085.
        default:
            return code_point == 0x85 || (code_point >= 9 && code_point <= 13) ? kSpace : kRest;
    }
}

// The classes of all symbols, bytes that are not UTF-8 among them: a byte each, asked of utf8proc
// once. Text touches only the few pages that hold its scripts.
inline const uint8_t* class_table() {
    static const std::vector<uint8_t> table = [] {
        std::vector<uint8_t> classes(kInvalidByte + 256, kRest);
        for (int c = 0; c < kInvalidByte; c++) classes[size_t(c)] = class_of_code_point(c);
        return classes;
    }();
    return table.data();
}

struct ClassifiedCharacter {
    uint8_t kind;   // one CharacterClass
    size_t length;  // in bytes
};

// The class and length of the character at byte i < text.size().
inline ClassifiedCharacter classify_at(std::string_view text, size_t i) {
    uint8_t kind = kClassOfByte[uint8_t(text[i])];
    if (kind != kNotAscii) return {kind, 1};
    Character character = character_at(text, i);
    return {class_table()[character.symbol], character.length};
}

// ==== the split patterns =========================================================================

// Regular expressions cut text into the pieces inside which tokens are merged. Each is written out
// by hand as what it does at one place: which alternative matches there first, and how far.
// cl100k (GPT-4) and o200k (GPT-4o) are those of the tiktoken library. cl100k_json is the older
// spelling of cl100k that tokenizer.json files hold; the two differ only in white space that ends
// the text and has a line break in it.
enum class Pattern { gpt2, cl100k, o200k, cl100k_json };

struct PatternName {
    Pattern pattern;
    const char* name;
    // For Oniguruma, which the tokenizers library matches with; as published where that will do.
    std::string_view regex;
};

inline constexpr PatternName kPatterns[] = {
    {Pattern::gpt2, "gpt2",
     R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)"},
    {Pattern::cl100k, "cl100k",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
     R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]+|\s+(?!\S)|\s+)"},
    {Pattern::o200k, "o200k",
     R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
     R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
     R"(\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)"},
    {Pattern::cl100k_json, "cl100k-json",
     R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
     R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}};

// How many of the eight bytes at `bytes`, from the first on, are ASCII letters. All are looked at
// in one number, without a branch: where a word ends is not to be guessed. Small and capital
// letters differ in the bit 0x20 only; what is added carries into the highest bit of those bytes
// that are at least `a`, or past `z`.
inline size_t leading_letters(const char* bytes) {
    static_assert(std::endian::native == std::endian::little);
    constexpr uint64_t kEach = 0x0101010101010101, kHighest = 0x80 * kEach;
    uint64_t eight;
    memcpy(&eight, bytes, 8);
    uint64_t small = (eight | 0x20 * kEach) & ~kHighest;
    uint64_t from_a = small + (0x80 - 'a') * kEach, past_z = small + (0x7f - 'z') * kEach;
    uint64_t others = ~(from_a & ~past_z & ~eight) & kHighest;
    return size_t(std::countr_zero(others)) / 8;
}

// Where the run of characters of these classes (a mask) that starts at byte i ends; i if there is
// none.
inline size_t run_end(std::string_view text, size_t i, unsigned classes) {
    while (i < text.size()) {
        uint8_t kind = kClassOfByte[uint8_t(text[i])];
        if (kind & classes) {
            bool eight = classes == kLetter && i + 8 <= text.size();
            i += eight ? leading_letters(text.data() + i) : 1;
            continue;
        }
        if (kind != kNotAscii) return i;
        ClassifiedCharacter next = classify_at(text, i);
        if (!(next.kind & classes)) return i;
        i += next.length;
    }
    return i;
}

// The length of the contraction 's 't 're 've 'm 'll 'd that starts at byte i; 0 if there is none.
// In any case, the long s (U+017F) is an s too: it is so to a regular expression.
inline size_t contraction_length(std::string_view text, size_t i, bool any_case) {
    if (i + 1 >= text.size() || text[i] != '\'') return 0;
    auto letter = [&](size_t k) { return any_case ? char(text[k] | 0x20) : text[k]; };
    char first = letter(i + 1);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if (i + 2 >= text.size()) return 0;
    if (any_case && text[i + 1] == '\xc5' && text[i + 2] == '\xbf') return 3;
    char second = letter(i + 2);
    bool two = (first == 'r' && second == 'e') || (first == 'v' && second == 'e') ||
               (first == 'l' && second == 'l');
    return two ? 3 : 0;
}

// How white space that starts at `begin` and meets no other alternative is cut: `\s+(?!\S)|\s+`,
// all of it at the end of the text, else all but its last character, which goes with the word that
// follows. `end` is where the run of white space ends.
inline size_t space_end(std::string_view text, size_t begin, size_t end) {
    if (end == text.size()) return end;
    size_t last = end - 1;
    while ((text[last] & 0xc0) == 0x80) last--;
    return last > begin ? last : end;
}

// `\s*[\r\n]+|\s+(?!\S)|\s+`: white space up to the last line break in it, if there is one.
inline size_t line_end(std::string_view text, size_t begin, size_t end) {
    for (size_t i = end; i > begin; i--)
        if (text[i - 1] == '\n' || text[i - 1] == '\r') return i;
    return space_end(text, begin, end);
}

// The end of at most three numbers, the first of which is before byte i.
inline size_t digits_end(std::string_view text, size_t i) {
    for (int count = 1; count < 3 && i < text.size(); count++) {
        ClassifiedCharacter next = classify_at(text, i);
        if (next.kind != kNumber) break;
        i += next.length;
    }
    return i;
}

// ` ?[^\s\p{L}\p{N}]+[...]*` at `begin`, where `ends` are the characters of the last bracket; 0 if
// it does not match.
inline size_t symbols_end(std::string_view text, size_t begin, std::string_view ends) {
    size_t start = begin + (text[begin] == ' ');
    size_t end = run_end(text, start, kMark | kRest);
    if (end == start) return 0;
    while (end < text.size() && ends.find(text[end]) != ends.npos) end++;
    return end;
}

// Where the first piece of text[begin, ...) ends by the GPT-2 pattern; begin must be below
// text.size(). Letters, numbers, or the rest, each with at most one U+0020 before.
inline size_t gpt2_piece_end(std::string_view text, size_t begin) {
    if (size_t length = contraction_length(text, begin, false)) return begin + length;
    size_t start = begin + (text[begin] == ' ');
    if (start < text.size()) {
        ClassifiedCharacter first = classify_at(text, start);
        unsigned run = first.kind & kLetter ? kLetter : unsigned(first.kind);
        if (run & (kMark | kRest)) run = kMark | kRest;
        if (run != kSpace) return run_end(text, start + first.length, run);
    }
    return space_end(text, begin, run_end(text, begin, kSpace));
}

// The same by cl100k. Letters may have one character before them that is neither a line break nor
// a number; numbers come three at a time; line breaks go with the symbols before them.
// whole_at_end: `\s+\z` stands before `\s*[\r\n]+`.
inline size_t cl100k_piece_end(std::string_view text, size_t begin, bool whole_at_end) {
    if (size_t length = contraction_length(text, begin, true)) return begin + length;
    ClassifiedCharacter first = classify_at(text, begin);
    size_t second = begin + first.length;
    if (first.kind & kLetter) return run_end(text, second, kLetter);
    if (first.kind == kNumber) return digits_end(text, second);
    if (text[begin] != '\r' && text[begin] != '\n')
        if (size_t end = run_end(text, second, kLetter); end > second) return end;
    if (size_t end = symbols_end(text, begin, "\r\n")) return end;
    size_t end = run_end(text, second, kSpace);
    if (whole_at_end && end == text.size()) return end;
    return line_end(text, begin, end);
}

// The longest `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+` at byte i as a
// regular expression finds it: the first bracket takes all it can and gives back, from its end, up
// to a character that is in the second one too. 0 if there is none.
inline size_t cased_word_end(std::string_view text, size_t i) {
    constexpr unsigned kFirst = kUpper | kOtherLetter | kMark;
    constexpr unsigned kSecond = kLower | kOtherLetter | kMark;
    size_t given_back = 0;
    while (i < text.size()) {
        ClassifiedCharacter next = classify_at(text, i);
        if (!(next.kind & kFirst)) break;
        i += next.length;
        if (next.kind & kSecond) given_back = i;
    }
    size_t end = run_end(text, i, kSecond);
    return end > i ? end : given_back;
}

// The same by o200k. A word is capitals, then small letters; letters without case and marks are
// both. It may have one character before it that is neither a line break nor a letter nor a number
// (a mark is such a character too), and takes a contraction along. Its alternatives in their order:
// with small letters, the character before it taken or, if that fails, not; capitals alone.
inline size_t o200k_piece_end(std::string_view text, size_t begin) {
    ClassifiedCharacter first = classify_at(text, begin);
    size_t second = begin + first.length;
    bool before =
        first.kind & (kMark | kRest | kSpace) && text[begin] != '\r' && text[begin] != '\n';
    size_t word = 0;
    if (before) word = cased_word_end(text, second);
    if (word == 0 && first.kind & (kLetter | kMark)) word = cased_word_end(text, begin);
    if (word == 0 && (before || first.kind == kUpper)) {
        size_t start = before ? second : begin, capitals = run_end(text, start, kUpper);
        if (capitals > start) word = capitals;
    }
    if (word > 0) return word + contraction_length(text, word, true);
    if (first.kind == kNumber) return digits_end(text, second);
    if (size_t end = symbols_end(text, begin, "\r\n/")) return end;
    return line_end(text, begin, run_end(text, second, kSpace));
}

// Where the first piece of text[begin, ...) ends; begin must be below text.size().
template <Pattern pattern>
inline size_t piece_end(std::string_view text, size_t begin) {
    if constexpr (pattern == Pattern::gpt2) return gpt2_piece_end(text, begin);
    if constexpr (pattern == Pattern::cl100k) return cl100k_piece_end(text, begin, true);
    if constexpr (pattern == Pattern::cl100k_json) return cl100k_piece_end(text, begin, false);
    if constexpr (pattern == Pattern::o200k) return o200k_piece_end(text, begin);
}

inline const PatternName& name_of(Pattern pattern) {
    for (const PatternName& name : kPatterns)
        if (name.pattern == pattern) return name;
    return kPatterns[0];
}

// The pattern of a name of kPatterns; fails on any other.
inline Pattern pattern_of(const std::string& name) {
    for (const PatternName& known : kPatterns)
        if (name == known.name) return known.pattern;
    fail_input("pattern %s: there are gpt2, cl100k, o200k and cl100k-json", name.c_str());
}

// Calls f(std::integral_constant<Pattern, p>()) for a pattern known only now, so that what f does
// with it is compiled for each.
template <typename F>
auto with_pattern(Pattern pattern, F f) {
    switch (pattern) {
        case Pattern::gpt2:
            return f(std::integral_constant<Pattern, Pattern::gpt2>());
        case Pattern::cl100k:
            return f(std::integral_constant<Pattern, Pattern::cl100k>());
        case Pattern::o200k:
            return f(std::integral_constant<Pattern, Pattern::o200k>());
        default:
            return f(std::integral_constant<Pattern, Pattern::cl100k_json>());
    }
}

// Where a long text may be cut so that its parts, split one by one, give the pieces of the whole:
// the first such place at byte `from` or behind it, text.size() if there is none. It is before a
// character that is white space or of the rest, but no apostrophe, and behind a letter.
//
// Why that is right, for each pattern. No alternative has such a character behind a letter: letters
// are followed by letters, marks or a contraction, and all else that may stand in a piece of theirs
// (a space, one character) stands before them. So a piece ends there. The pieces before it
// come out the same when the text ends there: what they look at beyond their end is whether the
// next character is a letter, a mark, or the apostrophe of a contraction, which neither the
// character nor the end is, or whether a run of white space ends the text, and none ends behind a
// letter. The pieces behind it are found from there on, and never look back.
inline size_t safe_cut(std::string_view text, size_t from) {
    for (size_t i = std::max<size_t>(from, 1); i < text.size(); i++) {
        if ((text[i] & 0xc0) == 0x80 || text[i] == '\'') continue;
        if (!(classify_at(text, i).kind & (kSpace | kRest))) continue;
        size_t before = i - 1;
        while (before > 0 && i - before < 4 && (text[before] & 0xc0) == 0x80) before--;
        ClassifiedCharacter letter = classify_at(text, before);
        if (letter.kind & kLetter && before + letter.length == i) return i;
    }
    return text.size();
}

// ==== words ======================================================================================

// Whether no space comes before a word when words are written: s/\s+([,.:;?!"()'])/\1/.
inline bool is_word_punctuation(std::string_view word) {
    return word.size() == 1 && std::string_view(",.:;?!\"()'").find(word[0]) != word.npos;
}

// Calls f with each word of a text, split by ([,.:;?_!"()']|--|\s) as the book does of whose small
// tokenizers these are [Raschka 2024, Build a Large Language Model (From Scratch), chapter 2]:
// punctuation and double hyphens are words of their own, and so is what stands between them and
// white space, which is dropped. As in Python, U+001C to U+001F are white space too.
template <typename F>
void for_each_word(std::string_view text, F f) {
    auto length_of_space = [&](size_t i) -> size_t {
        if (text[i] >= 0x1c && text[i] <= 0x1f) return 1;
        ClassifiedCharacter c = classify_at(text, i);
        return c.kind == kSpace ? c.length : 0;
    };
    auto alone = [&](size_t i) -> size_t {
        if (text.substr(i, 2) == "--") return 2;
        return text[i] == '_' || is_word_punctuation(text.substr(i, 1)) ? 1 : 0;
    };
    for (size_t i = 0; i < text.size();) {
        if (size_t space = length_of_space(i); space > 0) {
            i += space;
            continue;
        }
        size_t end = i + alone(i);
        if (end == i)
            while (end < text.size() && alone(end) == 0 && length_of_space(end) == 0)
                end += character_at(text, end).length;
        f(text.substr(i, end - i));
        i = end;
    }
}

// ==== bytes as printable characters ==============================================================

// Byte-level files spell each byte as one printable character: bytes that are printable in Latin-1
// as themselves, the other 68 as U+0100, U+0101, ... in their order (a space becomes U+0120).
struct ByteAlphabet {
    std::array<uint8_t, 256> byte_of_rank;    // in the order of GPT-2's ids: the printable first
    std::array<int, 256> code_point_of_byte;  // byte -> the character that spells it
    std::array<int, 324> byte_of_code_point;  // and back; -1 for characters that spell none

    ByteAlphabet() {
        byte_of_code_point.fill(-1);
        int rank = 0, other = 0;
        for (bool want_printable : {true, false}) {
            for (int byte = 0; byte < 256; byte++) {
                bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte != 0xad);
                if (printable != want_printable) continue;
                int code_point = printable ? byte : 256 + other++;
                byte_of_rank[size_t(rank++)] = uint8_t(byte);
                code_point_of_byte[size_t(byte)] = code_point;
                byte_of_code_point[size_t(code_point)] = byte;
            }
        }
    }

    // Any bytes as printable UTF-8.
    std::string spell(std::string_view bytes) const {
        std::string text;
        for (char c : bytes) {
            utf8proc_uint8_t utf8[4];
            auto length = utf8proc_encode_char(code_point_of_byte[uint8_t(c)], utf8);
            text.append(reinterpret_cast<const char*>(utf8), size_t(length));
        }
        return text;
    }

    // The bytes that `text` spells, into `bytes`; false if a character of it spells none.
    bool read(std::string_view text, std::string& bytes) const {
        bytes.clear();
        for (size_t i = 0; i < text.size();) {
            Character character = character_at(text, i);
            if (character.symbol >= int(byte_of_code_point.size())) return false;
            int byte = byte_of_code_point[size_t(character.symbol)];
            if (byte < 0) return false;
            bytes.push_back(char(byte));
            i += character.length;
        }
        return true;
    }
};

// ==== threads ====================================================================================

// Calls work(0) to work(count - 1), each on a thread of its own, the first on this one, and waits
// for all. What one of them throws is thrown here.
template <typename F>
void run_threads(size_t count, F work) {
    std::vector<std::exception_ptr> failures(count);
    auto guarded = [&](size_t i) {
        try {
            work(i);
        } catch (...) { failures[i] = std::current_exception(); }
    };
    std::vector<std::thread> threads;
    for (size_t i = 1; i < count; i++) threads.emplace_back(guarded, i);
    guarded(0);
    for (std::thread& thread : threads) thread.join();
    for (const std::exception_ptr& failure : failures)
        if (failure) std::rethrow_exception(failure);
}

// ==== pairs of tokens ============================================================================

// A map from pairs of token ids of kIdBits bits to a number of the 64 - 2 * kIdBits bits that are
// left. Buckets of four slots of 8 bytes; a pair stands in the bucket that it hashes to or, if that
// was full, in the next. Encoding asks for two pairs a merge, most of which are not there: a
// filter, with a bit for every pair, is small enough to stay near and knows nine in ten of them;
// behind it all four slots are compared at once, without a branch that would be guessed wrong.
template <int kIdBits>
class PairTable {
  public:
    static constexpr int kValueBits = 64 - 2 * kIdBits;
    static constexpr uint32_t kNone = uint32_t((uint64_t(1) << kValueBits) - 1);

    uint32_t find(uint32_t left, uint32_t right) const {
        uint64_t key = key_of(left, right);
        return passes_filter(key) ? find_key(key) : kNone;
    }

    // The steps of find, for who looks for many pairs at a time: the buckets of those that pass the
    // filter can be on their way before the first is read.
    static uint64_t key_of(uint32_t left, uint32_t right) {
        return uint64_t(left) << kIdBits | right;
    }
    bool passes_filter(uint64_t key) const {
        size_t bit = bit_of(key);
        return filter_[bit / 64] >> bit % 64 & 1;
    }
    void prefetch(uint64_t key) const { __builtin_prefetch(&buckets_[bucket_of(key)]); }
    uint32_t find_key(uint64_t key) const {
        for (size_t i = bucket_of(key);; i = (i + 1) & (buckets_.size() - 1)) {
            const Bucket& bucket = buckets_[i];
            uint32_t value = kNone;
            for (uint64_t slot : bucket.slots)
                if (slot >> kValueBits == key) value = uint32_t(slot) & kNone;
            if (value != kNone || bucket.slots[kSlots - 1] == kFree) [[likely]]
                return value;
        }
    }

    // The pair's number; a pair that has none is given `value` (below kNone) first.
    uint32_t find_or_insert(uint32_t left, uint32_t right, uint32_t value) {
        if (2 * (used_ + 1) > buckets_.size() * kSlots) grow();
        return place(key_of(left, right), value);
    }

  private:
    static constexpr uint64_t kFree = ~uint64_t(0);  // its number is kNone
    static constexpr size_t kSlots = 4;

    struct alignas(kSlots * sizeof(uint64_t)) Bucket {
        uint64_t slots[kSlots] = {kFree, kFree, kFree, kFree};  // the used ones first
    };

    // Fibonacci hashing: the high bits of a product with 2^64 / golden ratio.
    static uint64_t hash(uint64_t key) { return key * 0x9e3779b97f4a7c15u; }
    size_t bucket_of(uint64_t key) const { return size_t(hash(key) >> shift_); }
    size_t bit_of(uint64_t key) const { return size_t(hash(key) >> (shift_ - 5)); }

    uint32_t place(uint64_t key, uint32_t value) {
        for (size_t i = bucket_of(key);; i = (i + 1) & (buckets_.size() - 1)) {
            for (uint64_t& slot : buckets_[i].slots) {
                if (slot == kFree) {
                    slot = key << kValueBits | value;
                    used_++;
                    filter_[bit_of(key) / 64] |= uint64_t(1) << bit_of(key) % 64;
                }
                if (slot >> kValueBits == key) return uint32_t(slot) & kNone;
            }
        }
    }

    void grow() {
        std::vector<Bucket> old(2 * buckets_.size());
        old.swap(buckets_);
        shift_--;
        used_ = 0;
        filter_.assign(buckets_.size() / 2, 0);
        for (const Bucket& bucket : old)
            for (uint64_t slot : bucket.slots)
                if (slot != kFree) place(slot >> kValueBits, uint32_t(slot) & kNone);
    }

    std::vector<Bucket> buckets_ = std::vector<Bucket>(64);
    std::vector<uint64_t> filter_ = std::vector<uint64_t>(32);  // 32 bits a bucket
    int shift_ = 64 - 6;  // buckets_.size() == 1 << (64 - shift_)
    size_t used_ = 0;
};

using MergeTable = PairTable<20>;  // of kMaxTokens
static_assert(kMaxTokens == (1 << 20) - 1 && kMaxVocabulary == 1 << 16);

// ==== the tokenizer ==============================================================================

// How a BPE is trained.
struct BpeTraining {
    Pattern pattern = Pattern::gpt2;
    uint64_t min_frequency = 1;  // pairs that are rarer in the text are not joined
    int threads = 0;             // that count words; 0: as many as there are cores
    // Where the documents end that the text is joined of, ascending: a piece lies in one of them.
    std::span<const size_t> document_ends;
    // Told now and then how many merges have been learned, of how many at most; at the end all.
    std::function<void(int done, int most)> progress;
};

// The files that hold a vocabulary.
enum class TokenizerFormat {
    json,      // tokenizer.json, Hugging Face: everything
    merges,    // vocab.json and merges.txt, Hugging Face
    openai,    // encoder.json and vocab.bpe, as GPT-2 was published
    tiktoken,  // a line a token: its bytes in base64, and its rank
    llmc,      // tokenizer.bin of llm.c: the bytes of every token; versions 1 and 2 are read
};

// A vocabulary and what turns text into its ids. A value: copies are independent. Its const
// functions share nothing that they change, so several threads may use one Tokenizer at once.
struct Tokenizer {
    enum class Kind { bpe, bytes, chars, words };

    // 256 bytes, each with its own value as id, and <|endoftext|> with id 256.
    static Tokenizer bytes();

    // The distinct characters of `text` in the order of their code points, then its bytes that are
    // not UTF-8, then <|endoftext|>. Fails on an empty text and on more than kMaxVocabulary tokens.
    static Tokenizer chars(std::string_view text);

    // The distinct words of `text` (see for_each_word) in the order of their bytes. With `unknown`
    // also <|endoftext|> and <|unk|>, which stands for all other words; without, encode fails on
    // one. Text comes back with one space between words and none before punctuation. Fails on text
    // that is empty or not UTF-8, and on more than kMaxVocabulary tokens. A word ends where one of
    // the documents does that the text is joined of.
    static Tokenizer words(std::string_view text, bool unknown,
                           std::span<const size_t> document_ends = {});

    // Byte-level BPE learned from `text`: the 256 bytes in GPT-2's order, merges in the order they
    // were learned, <|endoftext|> last. Each merge takes the most frequent pair of adjacent tokens,
    // counted over the pieces of the text; of equally frequent pairs, that whose first occurrence
    // in the text, as it is cut at that step, comes first. Where no pair is left that is frequent
    // enough the vocabulary stays smaller than asked: see vocab_size(). Memory grows with the bytes
    // of distinct pieces. Fails on an empty text and on a vocab_size outside 257 to
    // kMaxVocabulary.
    static Tokenizer train_bpe(std::string_view text, int vocab_size,
                               const BpeTraining& training = {});

    // From a file of one of the kinds that TokenizerFormat lists, told apart by what is in it, or
    // from a folder that holds tokenizer.json, vocab.json or encoder.json. vocab.json needs
    // merges.txt beside it, encoder.json vocab.bpe; of merges alone the ids follow from the order.
    // `pattern` is for files that do not say by what text is split: without it GPT-2's for merges,
    // and for ranks and tokenizer.bin that of the encoding of OpenAI's which has so many. Fails,
    // naming the file, the place in it and what would help, on everything that would make this
    // tokenizer differ from what the file describes.
    static Tokenizer load(const std::string& path, std::optional<Pattern> pattern = std::nullopt);

    // Writes tokenizer.json and tokenizer_config.json into `folder`, each atomically. A context
    // above 0 is noted as model_max_length. Fails where the machine does.
    void save(const std::string& folder, int context = 0) const;

    // Writes another format: to the file `path`, or into the folder `path` where it takes two
    // files. Returns what the format cannot hold and a reader has to be told, a line each. Fails,
    // before anything is written, where reading the file back would give other ids for any text.
    std::vector<std::string> save_as(TokenizerFormat format, const std::string& path) const;

    Kind kind() const { return kind_; }
    Pattern pattern() const { return pattern_; }                      // bpe
    int vocab_size() const { return int(token_begins_.size()) - 1; }  // special tokens included
    int end_of_text() const { return end_of_text_; }  // the id of <|endoftext|>, or -1

    // Appends the ids of `text`. Special tokens spelt out in the text are plain text. Characters
    // that a character vocabulary lacks are dropped, unless it holds their bytes as invalid bytes;
    // then it is those. A vocabulary of words fails on one that it lacks, naming it, unless it has
    // <|unk|>; <|endoftext|> is a word of it.
    // Large texts are encoded on `threads` threads (0: as many as there are cores), with the same
    // ids for any number.
    void encode(std::string_view text, std::vector<int>& ids, int threads = 0) const {
        encode(text, ids, nullptr, threads);
    }
    std::vector<int> encode(std::string_view text) const { return encode(text, nullptr); }

    // The same; the distinct characters that were dropped are appended to *missing in the order
    // met, fit for a message: ASCII controls and bytes that are not UTF-8 are spelt <0x0A>.
    std::vector<int> encode(std::string_view text, std::string* missing) const {
        std::vector<int> ids;
        encode(text, ids, missing);
        return ids;
    }
    void encode(std::string_view text, std::vector<int>& ids, std::string* missing,
                int threads = 0) const;

    // The same for texts that lie one behind the other and end before the bytes ends[i], on one
    // thread: ids.size() behind those of text i is appended to id_ends. What was found out about a
    // word of one text is remembered for the next, which makes short texts several times as fast.
    void encode_each(std::string_view texts, const std::vector<size_t>& ends, std::vector<int>& ids,
                     std::vector<size_t>& id_ends) const;

    // The ids of the special tokens with these names, ascending; of all where the only name is
    // "all". Fails on a name that is none of them, and lists those that are known.
    std::vector<int> special_tokens(const std::vector<std::string>& names) const;

    // encode, but where the text spells one of `specials` (ids) its id is appended, and what is
    // before and behind it is encoded apart; of several that start at one place the longest is
    // taken. With `forbidden` such a text is refused instead: fails naming the token and the byte.
    void encode_specials(std::string_view text, const std::vector<int>& specials, bool forbidden,
                         std::vector<int>& ids, std::string* missing = nullptr) const;

    // The bytes that a token stands for, a word with the space before it; a special token gives its
    // text. Fails on an id outside the vocabulary. The view is valid while the Tokenizer is neither
    // changed nor destroyed.
    std::string_view token_bytes(int id) const;

    // The bytes of all tokens in a row; words without a space before the first. Fails on an id
    // outside the vocabulary.
    std::string decode(const std::vector<int>& ids) const;

    // What a token adds to the text of those before it; `first`: there are none.
    std::string decode_next(int id, bool first) const;

    // A hash of everything that decides what encode returns, and of end_of_text(): equal for equal
    // tokenizers, also after save and load. It keys the cache of tokenized text.
    uint64_t fingerprint() const;

  private:
    struct Merge {
        int left, right, result;
        bool operator==(const Merge&) const = default;
    };
    struct PieceMerger;
    template <size_t kPlaces>
    class WordMerger;
    class Encoder;
    friend struct TokenizerReader;

    int add_token(std::string_view bytes);
    void add_merge(int left, int right, int result);
    void add_end_of_text();
    void index_bytes();
    void index_character(int symbol, int id);
    int id_of_character(int symbol) const;
    void add_word(std::string_view word);
    void encode_words(std::string_view text, std::vector<int>& ids) const;
    void encode_chars(std::string_view text, std::vector<int>& ids, std::string* missing) const;
    void encode_bpe(std::string_view text, std::vector<int>& ids, int threads) const;
    std::string spell(int id, const ByteAlphabet& alphabet) const;
    std::string vocabulary_json() const;
    std::string merges_text() const;
    std::string ranks_text() const;
    std::string llmc_bytes() const;
    void check_format(TokenizerFormat format, const std::string& path) const;
    std::vector<std::string> notes_on(TokenizerFormat format) const;
    bool is_special(int id) const;
    uint32_t result_of(uint32_t rank) const;

    Kind kind_ = Kind::bytes;
    Pattern pattern_ = Pattern::gpt2;
    std::string token_bytes_;  // the tokens' bytes, one after the other in the order of their ids
    std::vector<size_t> token_begins_ = {0};  // where each begins in it, and where the last ends
    std::vector<int> specials_;               // ids, ascending
    int end_of_text_ = -1;
    std::array<int, 256> id_of_byte_{};    // bpe and bytes
    std::vector<Merge> merges_;            // bpe: in the order of their rank
    MergeTable merge_ranks_;               // bpe: (left, right) -> index into merges_
    std::vector<uint32_t> merge_results_;  // bpe: of merges_
    int first_result_ = -1;                // bpe: that of merge r is this + r; -1: not for all r
    // bpe: of the tokens of the bytes 256 * left + right
    std::vector<uint32_t> byte_pair_ranks_ = std::vector<uint32_t>(1 << 16, MergeTable::kNone);
    // bpe: 1 where a merge joins a token that ends in one byte and one that begins with the other
    std::vector<uint8_t> byte_pair_joins_ = std::vector<uint8_t>(1 << 16);
    std::vector<int> id_of_character_;  // chars: by Character::symbol, -1: there is none
    std::map<std::string, int, std::less<>> id_of_word_;  // words
};

inline int Tokenizer::add_token(std::string_view bytes) {
    token_bytes_ += bytes;
    token_begins_.push_back(token_bytes_.size());
    return vocab_size() - 1;
}

// Both tokens and their result are there already; what encode looks up is kept up to date.
inline void Tokenizer::add_merge(int left, int right, int result) {
    uint32_t rank = uint32_t(merges_.size());
    if (rank == 0) first_result_ = result;
    if (result != first_result_ + int(rank)) first_result_ = -1;
    merge_ranks_.find_or_insert(uint32_t(left), uint32_t(right), rank);
    merge_results_.push_back(uint32_t(result));
    merges_.push_back({left, right, result});
    std::string_view a = token_bytes(left), b = token_bytes(right);
    size_t pair = size_t(uint8_t(a.back())) << 8 | uint8_t(b.front());
    byte_pair_joins_[pair] = 1;
    if (a.size() == 1 && b.size() == 1) byte_pair_ranks_[pair] = rank;
}

inline uint32_t Tokenizer::result_of(uint32_t rank) const {
    return first_result_ >= 0 ? uint32_t(first_result_) + rank : merge_results_[rank];
}

inline void Tokenizer::add_end_of_text() {
    end_of_text_ = add_token(kEndOfText);
    specials_.push_back(end_of_text_);
}

// Fills id_of_byte_ from the tokens of one byte; a byte without a token gets -1.
inline void Tokenizer::index_bytes() {
    id_of_byte_.fill(-1);
    for (int id = 0; id < vocab_size(); id++) {
        std::string_view bytes = token_bytes(id);
        if (bytes.size() == 1 && !is_special(id)) id_of_byte_[uint8_t(bytes[0])] = id;
    }
}

inline void Tokenizer::index_character(int symbol, int id) {
    if (size_t(symbol) >= id_of_character_.size()) id_of_character_.resize(size_t(symbol) + 1, -1);
    id_of_character_[size_t(symbol)] = id;
}

inline int Tokenizer::id_of_character(int symbol) const {
    return size_t(symbol) < id_of_character_.size() ? id_of_character_[size_t(symbol)] : -1;
}

inline bool Tokenizer::is_special(int id) const {
    return std::binary_search(specials_.begin(), specials_.end(), id);
}

inline std::string_view Tokenizer::token_bytes(int id) const {
    if (id < 0 || id >= vocab_size())
        fail_input("token id %d: the vocabulary has ids 0 to %d", id, vocab_size() - 1);
    size_t begin = token_begins_[size_t(id)], end = token_begins_[size_t(id) + 1];
    return {token_bytes_.data() + begin, end - begin};
}

// Most tokens are shorter than kStep: that many bytes are moved whatever the length, and what was
// too much is written over by the next. Ids are taken some thousands at a time, so that they are
// still near when their tokens are copied.
inline std::string Tokenizer::decode(const std::vector<int>& ids) const {
    constexpr size_t kStep = 16, kBlock = 4096;
    std::string text;
    if (kind_ == Kind::words) {
        for (int id : ids) text += decode_next(id, text.empty());
        return text;
    }
    const char *source = token_bytes_.data(), *source_end = source + token_bytes_.size();
    for (size_t first = 0; first < ids.size(); first += kBlock) {
        size_t last = std::min(ids.size(), first + kBlock), size = 0, old_size = text.size();
        for (size_t i = first; i < last; i++) size += token_bytes(ids[i]).size();
        if (text.capacity() < old_size + size)
            text.reserve(std::max(2 * text.capacity(), (old_size + size) / last * ids.size()));
        text.resize(old_size + size);
        char *to = text.data() + old_size, *end = to + size;
        for (size_t i = first; i < last; i++) {
            size_t begin = token_begins_[size_t(ids[i])];
            size_t length = token_begins_[size_t(ids[i]) + 1] - begin;
            const char* from = source + begin;
            bool room = size_t(end - to) >= kStep && size_t(source_end - from) >= kStep;
            if (length <= kStep && room) memcpy(to, from, kStep);
            else memcpy(to, from, length);
            to += length;
        }
    }
    return text;
}

inline std::string Tokenizer::decode_next(int id, bool first) const {
    std::string bytes(token_bytes(id));
    if (kind_ != Kind::words) return bytes;
    if (is_special(id)) bytes.insert(0, 1, ' ');
    return first && bytes.starts_with(' ') ? bytes.substr(1) : bytes;
}

inline uint64_t Tokenizer::fingerprint() const {
    constexpr int kVersion =
        1;  // of the encoding; raised when encode changes for the same vocabulary
    int header[] = {kVersion, int(kind_), end_of_text_};
    uint64_t hash = hash_bytes(header, sizeof header);
    hash = hash_bytes(token_bytes_.data(), token_bytes_.size(), hash);
    hash = hash_bytes(token_begins_.data() + 1, size_t(vocab_size()) * sizeof(size_t), hash);
    hash = hash_bytes(specials_.data(), specials_.size() * sizeof(int), hash);
    hash = hash_bytes(merges_.data(), merges_.size() * sizeof(Merge), hash);
    if (kind_ == Kind::bpe && pattern_ != Pattern::gpt2)
        hash = hash_bytes(&pattern_, sizeof pattern_, hash);
    if (kind_ == Kind::bpe) {  // where the text is cut depends on what the library knows of Unicode
        const char* unicode = utf8proc_unicode_version();
        hash = hash_bytes(unicode, strlen(unicode), hash);
    }
    return hash;
}

inline Tokenizer Tokenizer::bytes() {
    Tokenizer tokenizer;
    tokenizer.kind_ = Kind::bytes;
    for (int byte = 0; byte < 256; byte++) {
        char c = char(byte);
        tokenizer.add_token({&c, 1});
    }
    tokenizer.add_end_of_text();
    tokenizer.index_bytes();
    return tokenizer;
}

inline Tokenizer Tokenizer::chars(std::string_view text) {
    if (text.empty()) fail_input("the text is empty: a character vocabulary needs at least one");
    std::vector<bool> seen(kInvalidByte + 256);
    std::vector<std::pair<int, std::string_view>> distinct;  // symbol and bytes
    for (size_t i = 0; i < text.size();) {
        auto [symbol, length] = character_at(text, i);
        if (!seen[size_t(symbol)]) distinct.emplace_back(symbol, text.substr(i, length));
        seen[size_t(symbol)] = true;
        i += length;
    }
    if (distinct.size() + 1 > size_t(kMaxVocabulary))
        fail_input(
            "the text has %zu distinct characters, a vocabulary at most %d tokens; use a BPE",
            distinct.size(), kMaxVocabulary);
    std::sort(distinct.begin(), distinct.end());
    Tokenizer tokenizer;
    tokenizer.kind_ = Kind::chars;
    for (auto [symbol, spelling] : distinct)
        tokenizer.index_character(symbol, tokenizer.add_token(spelling));
    tokenizer.add_end_of_text();
    return tokenizer;
}

inline void Tokenizer::add_word(std::string_view word) {
    std::string bytes = is_word_punctuation(word) ? "" : " ";
    id_of_word_[std::string(word)] = add_token(bytes.append(word));
}

inline Tokenizer Tokenizer::words(std::string_view text, bool unknown,
                                  std::span<const size_t> document_ends) {
    if (size_t i = first_invalid_byte(text); i != text.npos)
        fail_input("byte %zu: the text is not UTF-8, of which words are made; use a BPE", i);
    std::set<std::string_view> distinct;
    size_t begin = 0;
    auto add_up_to = [&](size_t end) {
        for_each_word(text.substr(begin, end - begin),
                      [&](std::string_view word) { distinct.insert(word); });
        begin = end;
    };
    for (size_t end : document_ends) add_up_to(std::min(end, text.size()));
    add_up_to(text.size());
    for (std::string_view special : {kEndOfText, kUnknown})
        if (unknown) distinct.erase(special);
    if (distinct.empty()) fail_input("the text has no words: a vocabulary needs at least one");
    if (distinct.size() + 2 > size_t(kMaxVocabulary))
        fail_input("the text has %zu distinct words, a vocabulary at most %d tokens; use a BPE",
                   distinct.size(), kMaxVocabulary);
    Tokenizer tokenizer;
    tokenizer.kind_ = Kind::words;
    for (std::string_view word : distinct) tokenizer.add_word(word);
    if (auto end = tokenizer.id_of_word_.find(kEndOfText); end != tokenizer.id_of_word_.end())
        tokenizer.end_of_text_ = end->second;  // a word as others: unless `unknown`
    if (!unknown) return tokenizer;
    tokenizer.add_end_of_text();
    tokenizer.specials_.push_back(tokenizer.add_token(kUnknown));
    for (int id : tokenizer.specials_)
        tokenizer.id_of_word_[std::string(tokenizer.token_bytes(id))] = id;
    return tokenizer;
}

// ==== encoding ===================================================================================

inline void Tokenizer::encode(std::string_view text, std::vector<int>& ids, std::string* missing,
                              int threads) const {
    switch (kind_) {
        case Kind::bytes: {
            size_t begin = ids.size();
            ids.resize(begin + text.size());
            for (size_t i = 0; i < text.size(); i++) ids[begin + i] = id_of_byte_[uint8_t(text[i])];
            break;
        }
        case Kind::chars:
            encode_chars(text, ids, missing);
            break;
        case Kind::words:
            encode_words(text, ids);
            break;
        case Kind::bpe:
            encode_bpe(text, ids, threads);
            break;
    }
}

inline void Tokenizer::encode_words(std::string_view text, std::vector<int>& ids) const {
    auto unknown = id_of_word_.find(kUnknown);
    for_each_word(text, [&](std::string_view word) {
        auto known = id_of_word_.find(word);
        if (known == id_of_word_.end()) known = unknown;
        if (known == id_of_word_.end())
            fail_input(
                "byte %zu: the vocabulary lacks the word %s, and has no <|unk|> for such; one of "
                "--tokenizer words:unk has",
                size_t(word.data() - text.data()),
                json(std::string(word.substr(0, 60)))
                    .dump(-1, ' ', false, json::error_handler_t::replace)
                    .c_str());
        ids.push_back(known->second);
    });
}

inline void Tokenizer::encode_chars(std::string_view text, std::vector<int>& ids,
                                    std::string* missing) const {
    std::unordered_set<int> reported;
    for (size_t i = 0; i < text.size();) {
        Character character = character_at(text, i);
        std::string_view bytes = text.substr(i, character.length);
        i += character.length;
        int id = id_of_character(character.symbol);
        if (id >= 0) {
            ids.push_back(id);
            continue;
        }
        auto has_byte = [&](char c) { return id_of_character(kInvalidByte + uint8_t(c)) >= 0; };
        if (std::all_of(bytes.begin(), bytes.end(), has_byte)) {
            for (char c : bytes) ids.push_back(id_of_character(kInvalidByte + uint8_t(c)));
            continue;
        }
        if (missing == nullptr || !reported.insert(character.symbol).second) continue;
        bool printable =
            character.symbol >= 0x20 && character.symbol != 0x7f && character.symbol < kInvalidByte;
        if (printable) *missing += bytes;
        else *missing += format("<0x%02X>", unsigned(uint8_t(bytes[0])));
    }
}

// Ids at the end of a vector, written without asking for room one by one.
class IdWriter {
  public:
    explicit IdWriter(std::vector<int>& ids) : ids_(ids), used_(ids.size()) {}
    ~IdWriter() { ids_.resize(used_); }

    // Where `count` more ids may be written; add() says how many were.
    int* room(size_t count) {
        if (ids_.size() - used_ < count) {
            ids_.resize(used_ + count + step_);
            step_ = std::min<size_t>(2 * step_, 1 << 16);
        }
        return ids_.data() + used_;
    }
    int* next() { return ids_.data() + used_; }
    void add(size_t count) { used_ += count; }
    size_t used() const { return used_; }
    const int* at(size_t index) const { return ids_.data() + index; }

  private:
    std::vector<int>& ids_;
    size_t used_, step_ = 16;  // how much more than is asked for, so that a short text pays little
};

// Merges the bytes of one piece: as long as adjacent tokens form a pair of the list, that of the
// lowest rank is joined, the leftmost of several. Owns the scratch memory, so that a text allocates
// it once.
struct Tokenizer::PieceMerger {
    static constexpr uint32_t kNone = MergeTable::kNone;
    static constexpr size_t kLane = 16, kMostLanes = 15, kShort = kMostLanes * kLane - 2;
    static constexpr uint32_t kEnd = ~uint32_t(0), kOutside = kMaxTokens;

    const Tokenizer& tokenizer;
    // The long way: the token that starts at a byte (kEnd where none does), and the places of the
    // tokens before and after it.
    std::vector<uint32_t> token, next, previous;
    std::vector<std::vector<uint32_t>> places;  // by rank: where its pair was seen
    std::priority_queue<uint32_t, std::vector<uint32_t>, std::greater<>> ranks;  // that have places

    // Writes the ids of a piece of at least one byte to `out`, which has room for one a byte;
    // returns how many there are.
    size_t merge(std::string_view piece, int* out) {
        if (piece.size() <= kShort) return merge_short(piece, out);
        if (piece.size() >= kEnd)
            fail_input("%zu bytes of text without a break; at most 4 GiB are merged at a time",
                       piece.size());
        return merge_long(piece, out);
    }

    uint32_t byte_pair_rank(char left, char right) const {
        return tokenizer.byte_pair_ranks_[size_t(uint8_t(left)) << 8 | uint8_t(right)];
    }

    // The keys are read one by one: a vector of them would have to wait until the last ones written
    // have left for the cache.
    static uint32_t least(const volatile uint32_t* keys) {
        uint32_t least[4] = {keys[0], keys[1], keys[2], keys[3]};
        for (size_t i = 4; i < kLane; i += 4)
            for (size_t j = 0; j < 4; j++) least[j] = std::min(least[j], uint32_t(keys[i + j]));
        return std::min(std::min(least[0], least[1]), std::min(least[2], least[3]));
    }

    // Finds the lowest rank by looking at all, in lanes: a key is the rank of the pair that starts
    // at a place, and the place, so that the least key is the leftmost of the lowest rank. Places
    // are counted from 1; at 0 and behind the last stands kOutside, which is in no pair.
    size_t merge_short(std::string_view bytes, int* out) const {
        constexpr size_t kPlaces = kMostLanes * kLane;
        uint32_t key[kPlaces], lane_least[kMostLanes], symbol[kPlaces + 1];
        uint8_t after[kPlaces + 1], before[kPlaces + 1];
        const MergeTable& ranks_of = tokenizer.merge_ranks_;
        const size_t n = bytes.size(), lanes = n / kLane + 1;
        for (size_t i = 1; i <= n; i++) {
            symbol[i] = uint32_t(tokenizer.id_of_byte_[uint8_t(bytes[i - 1])]);
            after[i] = uint8_t(i + 1), before[i] = uint8_t(i - 1);
        }
        symbol[0] = symbol[n + 1] = kOutside;
        key[0] = kNone << 8;
        for (size_t i = 1; i < n; i++)
            key[i] = byte_pair_rank(bytes[i - 1], bytes[i]) << 8 | uint32_t(i);
        for (size_t i = n; i < lanes * kLane; i++) key[i] = kNone << 8;
        for (size_t lane = 0; lane < lanes; lane++) lane_least[lane] = least(key + lane * kLane);
        uint32_t best = *std::min_element(lane_least, lane_least + lanes);
        while (best < kNone << 8) {
            size_t i = best & 0xff, gone = after[i], right = after[gone], left = before[i];
            uint32_t joined = tokenizer.result_of(best >> 8);
            symbol[i] = joined;
            after[i] = uint8_t(right);
            before[right] = uint8_t(i);
            uint32_t with_right = ranks_of.find(joined, symbol[right]) << 8 | uint32_t(i);
            uint32_t with_left = ranks_of.find(symbol[left], joined) << 8 | uint32_t(left);
            // While the two are looked up, the least of all others.
            key[left] = key[i] = key[gone] = kNone << 8;
            auto look_again = [&](size_t lane) { lane_least[lane] = least(key + lane * kLane); };
            look_again(i / kLane);
            if (left / kLane != i / kLane) look_again(left / kLane);
            if (gone / kLane != i / kLane) look_again(gone / kLane);
            uint32_t others = *std::min_element(lane_least, lane_least + lanes);
            lane_least[left / kLane] = std::min(lane_least[left / kLane], with_left);
            lane_least[i / kLane] = std::min(lane_least[i / kLane], with_right);
            key[i] = with_right;
            key[left] = with_left;
            best = std::min(others, std::min(with_left, with_right));
        }
        size_t count = 0;
        for (size_t i = 1; i <= n; i = after[i]) out[count++] = int(symbol[i]);
        return count;
    }

    // For n bytes, n places to look at and two more a merge: the places of a rank are taken
    // together, from left to right. As a rule a merge brings up pairs of higher ranks only, since
    // a pair is learned later than its parts; where it does not, the lower rank goes first.
    size_t merge_long(std::string_view piece, int* out) {
        const uint32_t n = uint32_t(piece.size());
        places.resize(tokenizer.merges_.size());
        token.resize(n), next.resize(n), previous.resize(n);
        for (uint32_t i = 0; i < n; i++) {
            token[i] = uint32_t(tokenizer.id_of_byte_[uint8_t(piece[i])]);
            next[i] = i + 1, previous[i] = i - 1;
            if (i + 1 < n) add_place(byte_pair_rank(piece[i], piece[i + 1]), i);
        }
        std::vector<uint32_t> taken;
        while (!ranks.empty()) {
            uint32_t rank = ranks.top();
            ranks.pop();
            taken.clear();
            taken.swap(places[rank]);
            if (!std::is_sorted(taken.begin(), taken.end())) std::sort(taken.begin(), taken.end());
            for (size_t k = 0; k < taken.size(); k++) {
                uint32_t i = taken[k];
                if (rank_at(i) != rank) continue;  // a merge before this one took a part of it
                join(i, rank);
                if (ranks.empty() || ranks.top() > rank || k + 1 == taken.size()) continue;
                for (k++; k < taken.size(); k++) add_place(rank, taken[k]);
            }
        }
        size_t count = 0;
        for (uint32_t i = 0; i < n; i = next[i]) out[count++] = int(token[i]);
        return count;
    }

    // The rank of the token at i with the one after it.
    uint32_t rank_at(uint32_t i) const {
        if (token[i] == kEnd || next[i] == token.size()) return kNone;
        return tokenizer.merge_ranks_.find(token[i], token[next[i]]);
    }

    void add_place(uint32_t rank, uint32_t i) {
        if (rank == kNone) return;
        if (places[rank].empty()) ranks.push(rank);
        places[rank].push_back(i);
    }

    void join(uint32_t i, uint32_t rank) {
        uint32_t gone = next[i];
        token[i] = tokenizer.result_of(rank);
        token[gone] = kEnd;
        next[i] = next[gone];
        if (next[i] < token.size()) previous[next[i]] = i;
        add_place(rank_at(i), i);
        if (i > 0) add_place(rank_at(previous[i]), previous[i]);
    }
};

// Merges many short words at a time, each as PieceMerger does, in rounds: in every round each word
// that is not done is merged once. What one word waits for passes while others are worked on, and
// no branch depends on how many merges a word takes, or on whether a pair is there. A word has at
// most kPlaces - 2 bytes; keys and places are those of PieceMerger::merge_short.
template <size_t kPlaces>
class Tokenizer::WordMerger {
  public:
    static constexpr size_t kMostWords = 128, kLongest = kPlaces - 2;

    explicit WordMerger(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

    void clear() { count_ = 0; }

    // Takes up text[begin, begin + length), of 1 to kLongest bytes, as word number `count so far`.
    void add(std::string_view text, size_t begin, size_t length) {
        char bytes[kPlaces] = {};  // those behind the word are in no pair, so that any will do
        if (begin + kPlaces <= text.size()) memcpy(bytes, text.data() + begin, kPlaces);
        else memcpy(bytes, text.data() + begin, length);
        Word& word = words_[count_];
        for (size_t i = 1; i < kPlaces; i++) {
            word.symbol[i] = uint32_t(tokenizer_.id_of_byte_[uint8_t(bytes[i - 1])]);
            size_t pair = size_t(uint8_t(bytes[i - 1])) << 8 | uint8_t(bytes[i]);
            uint32_t behind = i < length ? 0 : kNone;
            word.key[i] = (tokenizer_.byte_pair_ranks_[pair] | behind) << 8 | uint32_t(i);
        }
        word.key[0] = kDone;
        word.symbol[0] = word.symbol[length + 1] = PieceMerger::kOutside;
        starts_[count_] = (uint64_t(4) << length) - 1;
        active_[count_] = uint8_t(count_);
        count_++;
    }

    void merge() {
        for (size_t active = choose(count_); active > 0; active = choose(active)) {
            size_t wanted = 0;
            for (size_t k = 0; k < active; k++) wanted = join(active_[k], best_[k], wanted);
            look_up(wanted);
        }
    }

    // The ids of a word that has been merged; to be asked for once. They stand until the next
    // word is added, and may be read up to the fourth whatever their number.
    std::span<const int> ids(size_t number) {
        uint32_t* symbol = words_[number].symbol;
        uint64_t starts = starts_[number] & (starts_[number] - 1);  // without place 0
        size_t count = size_t(std::popcount(starts)) - 1;           // and without the end
        for (size_t k = 0; k < count; k++) {
            symbol[k] = symbol[std::countr_zero(starts)];
            starts &= starts - 1;
        }
        return {reinterpret_cast<const int*>(symbol), count};
    }

  private:
    static constexpr uint32_t kNone = MergeTable::kNone, kDone = kNone << 8;

    struct Word {
        alignas(64) uint32_t key[kPlaces];
        uint32_t symbol[kPlaces];
    };
    struct Wanted {
        uint64_t pair;  // as MergeTable::key_of has it
        uint32_t* key;  // where its rank goes
    };

    // All keys are halved into one: written when the word was last looked at, they have long left
    // for the cache and are read as vectors.
    static uint32_t least(const uint32_t* keys) {
        uint32_t least[kPlaces];
        std::copy_n(keys, kPlaces, least);
        halve<kPlaces / 2>(least);
        return least[0];
    }
    template <size_t kHalf>
    static void halve(uint32_t* least) {
        for (size_t i = 0; i < kHalf; i++) least[i] = std::min(least[i], least[i + kHalf]);
        if constexpr (kHalf > 1) halve<kHalf / 2>(least);
    }

    // Finds the least key of each active word, and drops those that have no pair left.
    size_t choose(size_t active) {
        size_t left = 0;
        for (size_t k = 0; k < active; k++) {
            active_[left] = active_[k];
            best_[left] = least(words_[active_[k]].key);
            left += best_[left] < kDone;
        }
        return left;
    }

    // Joins the best pair of a word. Of the two pairs that it comes to stand in, those that may
    // have a rank are noted behind the `wanted` others; returns how many there are then.
    size_t join(size_t number, uint32_t best, size_t wanted) {
        Word& word = words_[number];
        uint64_t starts = starts_[number];
        uint32_t i = best & 0xff, rank = best >> 8;
        uint64_t behind = starts & (~uint64_t(1) << i);
        uint64_t before = starts & ((uint64_t(1) << i) - 1);
        uint32_t gone = uint32_t(std::countr_zero(behind));
        uint32_t right = uint32_t(std::countr_zero(behind & (behind - 1)));
        uint32_t left = uint32_t(std::bit_width(before)) - 1;
        uint32_t joined = tokenizer_.result_of(rank);
        starts_[number] = starts ^ uint64_t(1) << gone;
        word.symbol[i] = joined;
        word.key[gone] = kDone;
        word.key[i] = kDone | i;
        word.key[left] = kDone | left;
        const MergeTable& ranks = tokenizer_.merge_ranks_;
        uint64_t with_left = ranks.key_of(word.symbol[left], joined);
        uint64_t with_right = ranks.key_of(joined, word.symbol[right]);
        wanted_[wanted] = {with_left, &word.key[left]};
        wanted += ranks.passes_filter(with_left);
        wanted_[wanted] = {with_right, &word.key[i]};
        wanted += ranks.passes_filter(with_right);
        return wanted;
    }

    void look_up(size_t wanted) {
        const MergeTable& ranks = tokenizer_.merge_ranks_;
        for (size_t k = 0; k < wanted; k++) ranks.prefetch(wanted_[k].pair);
        for (size_t k = 0; k < wanted; k++) {
            auto [pair, key] = wanted_[k];
            *key = (*key & 0xff) | ranks.find_key(pair) << 8;
        }
    }

    const Tokenizer& tokenizer_;
    size_t count_ = 0;
    std::array<uint8_t, kMostWords> active_;   // the numbers of words that may have a pair left
    std::array<uint32_t, kMostWords> best_;    // their least keys
    std::array<uint64_t, kMostWords> starts_;  // bit i: a token starts at place i, or the end is
    std::array<Wanted, 2 * kMostWords> wanted_;
    std::array<Word, kMostWords> words_;
};

// Cuts text into pieces and merges them, remembering the words that it met in two direct-mapped
// caches of a fixed size: of short words the bytes and the ids themselves, of longer ones where
// they stood in the text and their ids in the output. A word that falls on a taken slot takes it
// over. A long piece, of a script without spaces as a rule, is taken in parts that merge apart from
// each other. It works on a block of pieces at a time: all are cut, all are looked up, those that
// the caches lack are merged together, and the ids are written in the order of the text. One
// Encoder works for one thread, on one text, into one vector.
class Tokenizer::Encoder {
  public:
    Encoder(const Tokenizer& tokenizer, std::string_view text, size_t share)
        : text_(text),
          merger_{tokenizer, {}, {}, {}, {}, {}},
          word_merger_(tokenizer),
          long_word_merger_(tokenizer) {
        size_t words = std::bit_ceil(std::clamp<size_t>(share / 8, 64, 1 << 14));
        words_.resize(words);
        long_words_.resize(words / 8);
        word_shift_ = 64 - std::bit_width(words - 1);
    }

    // Appends the ids of bytes [begin, end) of the text, as if there were no others.
    template <Pattern pattern>
    void encode(size_t begin, size_t end, std::vector<int>& ids) {
        IdWriter out(ids);
        std::string_view text = text_.substr(0, end);
        size_t stop = begin;  // of the piece that is being taken up
        bool by_parts = false;
        while (begin < end) {
            size_t count = 0, block_begin = begin;
            for (; begin < end && count < kBlock; count++) {
                if (begin == stop) {
                    stop = piece_end<pattern>(text, begin);
                    by_parts = stop - begin > LongMerger::kLongest;
                }
                size_t after = by_parts ? part_end(begin, stop) : stop;
                pieces_[count].begin = begin, pieces_[count].length = after - begin;
                begin = after;
            }
            out.room(begin - block_begin + kMostIds);
            encode_block(count, out);
        }
    }

  private:
    static constexpr size_t kBlock = 128, kMostIds = 4;
    using ShortMerger = WordMerger<16>;
    using LongMerger = WordMerger<32>;
    static_assert(ShortMerger::kMostWords == kBlock && LongMerger::kMostWords == kBlock);

    struct Word {
        uint64_t low = 0, high = 0;   // its bytes, zeros behind them, and its length in the last
        uint32_t ids[kMostIds] = {};  // the first has their number in its four highest bits
    };
    struct LongWord {
        size_t begin = 0, length = 0;  // in the text; length 0: none
        size_t first_id = 0, id_count = 0;
    };
    struct Piece {
        size_t begin, length;  // in the text
        const int* ids;        // the bits above kMaxTokens are to be cleared in the first
        size_t id_count;
        uint64_t low, high;   // of a short word
        Word* word;           // its slot
        LongWord* long_word;  // or that of a longer one
    };
    // Indices into pieces_, ascending. They are picked without a branch.
    struct Selection {
        uint8_t index[kBlock];
        size_t count = 0;

        void add_if(bool wanted, size_t k) {  // to be asked once for each k
            index[count] = uint8_t(k);
            count += wanted;
        }
        const uint8_t* begin() const { return index; }
        const uint8_t* end() const { return index + count; }
    };

    static bool is_short(size_t length) { return length <= ShortMerger::kLongest; }
    static bool is_long(size_t length) {
        return !is_short(length) && length <= LongMerger::kLongest;
    }

    // The first place behind `begin` at which a piece that ends at `end` can be cut without a
    // change to its ids: between two bytes that no merge joins, so that no token has them side by
    // side.
    size_t part_end(size_t begin, size_t end) const {
        const std::vector<uint8_t>& joins = merger_.tokenizer.byte_pair_joins_;
        for (size_t i = begin + 1; i < end; i++)
            if (joins[size_t(uint8_t(text_[i - 1])) << 8 | uint8_t(text_[i])] == 0) return i;
        return end;
    }

    void encode_block(size_t count, IdWriter& out) {
        Selection words, long_words, fresh, fresh_long;
        for (size_t k = 0; k < count; k++) {
            words.add_if(is_short(pieces_[k].length), k);
            long_words.add_if(is_long(pieces_[k].length), k);
        }
        for (size_t k : words) find_slot(pieces_[k]);
        for (size_t k : words) fresh.add_if(!look_up(pieces_[k]), k);
        for (size_t k : long_words) fresh_long.add_if(!look_up_long(pieces_[k], out), k);
        merge(word_merger_, fresh);
        merge(long_word_merger_, fresh_long);
        for (size_t k = 0; k < count; k++) write(pieces_[k], out);
        for (size_t k : fresh) remember(pieces_[k]);  // not before all ids of its slot are written
    }

    // Reads a short word, and has its slot on the way.
    void find_slot(Piece& piece) {
        static_assert(std::endian::native == std::endian::little);
        size_t begin = piece.begin, length = piece.length;
        char bytes[16] = {};
        if (begin + 16 <= text_.size()) memcpy(bytes, text_.data() + begin, 16);
        else memcpy(bytes, text_.data() + begin, length);
        uint64_t low, high;
        memcpy(&low, bytes, 8);
        memcpy(&high, bytes + 8, 8);
        if (length < 8) low &= (uint64_t(1) << 8 * length) - 1, high = 0;
        else high &= (uint64_t(1) << 8 * (length - 8)) - 1;
        high |= uint64_t(length) << 56;
        uint64_t mixed = (low ^ high * 0x9fb21c651e98df25u) * 0x9e3779b97f4a7c15u;
        piece.low = low, piece.high = high;
        piece.word = &words_[(mixed ^ mixed >> 32) * 0x9e3779b97f4a7c15u >> word_shift_];
        __builtin_prefetch(piece.word);
    }

    static bool look_up(Piece& piece) {
        const Word& word = *piece.word;
        piece.ids = reinterpret_cast<const int*>(word.ids);
        piece.id_count = word.ids[0] >> 28;
        return (word.low == piece.low) & (word.high == piece.high);
    }

    bool look_up_long(Piece& piece, const IdWriter& out) {
        std::string_view bytes = text_.substr(piece.begin, piece.length);
        uint64_t hash = hash_bytes(bytes.data(), bytes.size());
        piece.long_word = &long_words_[hash & (long_words_.size() - 1)];
        piece.ids = out.at(piece.long_word->first_id);
        piece.id_count = piece.long_word->id_count;
        return text_.substr(piece.long_word->begin, piece.long_word->length) == bytes;
    }

    template <typename Merger>
    void merge(Merger& merger, const Selection& fresh) {
        merger.clear();
        for (size_t k : fresh) merger.add(text_, pieces_[k].begin, pieces_[k].length);
        merger.merge();
        for (size_t number = 0; number < fresh.count; number++) {
            std::span<const int> ids = merger.ids(number);
            Piece& piece = pieces_[fresh.index[number]];
            piece.ids = ids.data(), piece.id_count = ids.size();
        }
    }

    // Appends the ids of a piece; kMostIds of them at once, since most have no more. One that is
    // too long for LongMerger is looked up and merged only here.
    void write(Piece& piece, IdWriter& out) {
        int* to = out.next();
        if (!is_short(piece.length)) {
            if (!is_long(piece.length) && !look_up_long(piece, out)) {
                piece.ids = to;
                piece.id_count = merger_.merge(text_.substr(piece.begin, piece.length), to);
            }
            *piece.long_word = {piece.begin, piece.length, out.used(), piece.id_count};
        }
        int first[kMostIds];
        memcpy(first, piece.ids, sizeof first);
        first[0] &= kMaxTokens;
        memcpy(to, first, sizeof first);
        if (piece.id_count > kMostIds && piece.ids != to)
            memcpy(to, piece.ids, piece.id_count * sizeof(int));
        out.add(piece.id_count);
    }

    static void remember(const Piece& piece) {
        if (piece.id_count > kMostIds) return;
        Word& word = *piece.word;
        word.low = piece.low, word.high = piece.high;
        memcpy(word.ids, piece.ids, sizeof word.ids);
        word.ids[0] |= uint32_t(piece.id_count) << 28;
    }

    std::string_view text_;
    PieceMerger merger_;
    ShortMerger word_merger_;
    LongMerger long_word_merger_;
    std::array<Piece, kBlock> pieces_;
    std::vector<Word> words_;
    std::vector<LongWord> long_words_;
    int word_shift_;  // words_.size() == 1 << (64 - word_shift_)
};

// How many threads so much text is worth. (To ask for the number of cores takes longer than to
// encode a line.)
inline size_t encoding_threads(size_t bytes, int threads) {
    constexpr size_t kLeast = 1 << 19;  // a thread starts in less than its caches take to fill
    if (bytes < 2 * kLeast || threads == 1) return 1;
    size_t most = threads > 0 ? size_t(threads) : std::max(1u, std::thread::hardware_concurrency());
    return std::min(bytes / kLeast, most);
}

// The bounds of parts for so many threads, several for each, so that all end at about the same
// time.
inline std::vector<size_t> safe_cuts(std::string_view text, size_t workers) {
    std::vector<size_t> cuts = {0};
    size_t size = workers == 1 ? text.size() : std::min<size_t>(text.size() / workers / 4, 1 << 22);
    while (cuts.back() < text.size()) cuts.push_back(safe_cut(text, cuts.back() + size));
    return cuts;
}

// Large texts are cut at safe places into more parts than threads, which take the next one as they
// get free; the ids are put together in the order of the parts.
inline void Tokenizer::encode_bpe(std::string_view text, std::vector<int>& ids, int threads) const {
    size_t workers = encoding_threads(text.size(), threads);
    with_pattern(pattern_, [&](auto pattern) {
        if (workers == 1) {
            Encoder(*this, text, text.size()).encode<pattern()>(0, text.size(), ids);
            return;
        }
        std::vector<size_t> cuts = safe_cuts(text, workers);
        struct Part {
            size_t worker, begin, end;  // where its ids are
        };
        std::vector<Part> parts(cuts.size() - 1);
        std::vector<std::vector<int>> outputs(workers);
        std::atomic<size_t> free_part = 0;
        auto work = [&](size_t worker) {
            Encoder encoder(*this, text, text.size() / workers);
            std::vector<int>& out = outputs[worker];
            for (size_t i; (i = free_part++) < parts.size();) {
                size_t begin = out.size();
                encoder.encode<pattern()>(cuts[i], cuts[i + 1], out);
                parts[i] = {worker, begin, out.size()};
            }
        };
        run_threads(workers, work);
        size_t total = ids.size();
        for (const auto& output : outputs) total += output.size();
        ids.reserve(total);
        for (auto [worker, begin, end] : parts)
            ids.insert(ids.end(), outputs[worker].begin() + ptrdiff_t(begin),
                       outputs[worker].begin() + ptrdiff_t(end));
    });
}

inline void Tokenizer::encode_each(std::string_view texts, const std::vector<size_t>& ends,
                                   std::vector<int>& ids, std::vector<size_t>& id_ends) const {
    with_pattern(pattern_, [&](auto pattern) {
        Encoder encoder(*this, texts, texts.size());
        size_t begin = 0;
        for (size_t end : ends) {
            if (kind_ == Kind::bpe) encoder.encode<pattern()>(begin, end, ids);
            else encode(texts.substr(begin, end - begin), ids, 1);
            id_ends.push_back(ids.size());
            begin = end;
        }
    });
}

inline std::vector<int> Tokenizer::special_tokens(const std::vector<std::string>& names) const {
    if (names == std::vector<std::string>{"all"}) return specials_;
    std::vector<int> found;
    std::string known;
    for (int id : specials_) known += (known.empty() ? "" : ", ") + std::string(token_bytes(id));
    for (const std::string& name : names) {
        size_t before = found.size();
        for (int id : specials_)
            if (token_bytes(id) == name) found.push_back(id);
        if (found.size() == before)
            fail_input("special token %s: this tokenizer has %s", name.c_str(),
                       known.empty() ? "none" : known.c_str());
    }
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
}

inline void Tokenizer::encode_specials(std::string_view text, const std::vector<int>& specials,
                                       bool forbidden, std::vector<int>& ids,
                                       std::string* missing) const {
    std::string first_bytes;
    for (int id : specials) first_bytes += token_bytes(id)[0];
    size_t begin = 0;
    for (size_t i = text.find_first_of(first_bytes); i < text.size();
         i = text.find_first_of(first_bytes, i)) {
        int best = -1;
        for (int id : specials) {
            bool longer = best < 0 || token_bytes(id).size() > token_bytes(best).size();
            if (longer && text.substr(i).starts_with(token_bytes(id))) best = id;
        }
        if (best < 0) {
            i++;
            continue;
        }
        if (forbidden)
            fail_input(
                "byte %zu: the text holds the special token %s; allow it, or have it taken "
                "as text (--special allow, --special text)",
                i, std::string(token_bytes(best)).c_str());
        encode(text.substr(begin, i - begin), ids, missing);
        ids.push_back(best);
        begin = i += token_bytes(best).size();
    }
    encode(text.substr(begin), ids, missing);
}

// ==== training ===================================================================================

struct CountedWord {
    std::string_view bytes;  // where the word stands first in the text
    uint64_t count = 0;
};

// How often each word was met: open addressing, at most half full.
class WordCounts {
  public:
    void add(std::string_view word, uint64_t count = 1) {
        if (2 * (used_ + 1) > slots_.size()) grow();
        size_t mask = slots_.size() - 1;
        size_t i = hash_bytes(word.data(), word.size()) & mask;
        while (slots_[i].count > 0 && slots_[i].bytes != word) i = (i + 1) & mask;
        used_ += slots_[i].count == 0;
        if (slots_[i].count == 0 || word.data() < slots_[i].bytes.data()) slots_[i].bytes = word;
        slots_[i].count += count;
    }

    // The words in the order in which they stand first in the text.
    std::vector<CountedWord> in_order() const {
        std::vector<CountedWord> words;
        for (const CountedWord& word : slots_)
            if (word.count > 0) words.push_back(word);
        std::sort(words.begin(), words.end(), [](const CountedWord& a, const CountedWord& b) {
            return a.bytes.data() < b.bytes.data();
        });
        return words;
    }

  private:
    void grow() {
        std::vector<CountedWord> old(2 * slots_.size());
        old.swap(slots_);
        used_ = 0;
        for (const CountedWord& word : old)
            if (word.count > 0) add(word.bytes, word.count);
    }

    std::vector<CountedWord> slots_ = std::vector<CountedWord>(1024);
    size_t used_ = 0;
};

// The distinct pieces of the text in the order of their first appearance. Each thread counts parts
// of the text, cut where that changes no piece, and the counts are added up.
template <Pattern pattern>
std::vector<CountedWord> count_words(std::string_view text, const BpeTraining& training) {
    std::span<const size_t> ends = training.document_ends;
    size_t workers = encoding_threads(text.size(), training.threads);
    std::vector<size_t> cuts = safe_cuts(text, workers);
    std::vector<WordCounts> counts(workers);
    std::atomic<size_t> free_part = 0;
    run_threads(workers, [&](size_t worker) {
        for (size_t i; (i = free_part++) + 1 < cuts.size();) {
            size_t begin = cuts[i];
            auto next = std::upper_bound(ends.begin(), ends.end(), begin);
            while (begin < cuts[i + 1]) {
                size_t stop = cuts[i + 1];
                if (next != ends.end()) stop = std::min(stop, *next++);
                std::string_view part = text.substr(0, stop);
                while (begin < stop) {
                    size_t end = piece_end<pattern>(part, begin);
                    counts[worker].add(part.substr(begin, end - begin));
                    begin = end;
                }
            }
        }
    });
    for (size_t worker = 1; worker < workers; worker++) {
        for (const CountedWord& word : counts[worker].in_order())
            counts[0].add(word.bytes, word.count);
        counts[worker] = WordCounts();
    }
    return counts[0].in_order();
}

// Learns merges. The distinct pieces of the text are laid out one after the other in the order of
// their first appearance, one symbol a byte, so that `first in the text` is `lowest position`. A
// merge touches only the places where its pair occurs. Occurrences of a pair all come to be in one
// step, that which made the newer of its tokens, and from then on only disappear: a pair's count
// only falls and its first position only rises. A heap may therefore hold old values: what comes up
// is compared with the truth and put back if it is worse by now. Time: O(n log n) for n bytes of
// distinct pieces.
class BpeTrainer {
  public:
    BpeTrainer(std::string_view text, const std::array<int, 256>& id_of_byte,
               const BpeTraining& training)
        : min_frequency_(std::max<uint64_t>(training.min_frequency, 1)) {
        lay_out(with_pattern(training.pattern,
                             [&](auto pattern) { return count_words<pattern()>(text, training); }),
                id_of_byte);
        for (uint32_t position = 0; position < symbols_.size(); position++)
            if (uint32_t next = symbols_[position].next; next != kEnd)
                add(symbols_[position].id, symbols_[next].id, position, weight_of(position));
        push_fresh();
    }

    // Joins the best pair everywhere as `new_id`; returns its two ids, {-1, -1} if none is left
    // that is frequent enough.
    std::pair<int, int> merge_best(int new_id) {
        uint32_t best = pop_best();
        if (best == kEnd || pairs_[best].count < min_frequency_) return {-1, -1};
        int left = pairs_[best].left, right = pairs_[best].right;
        std::vector<uint32_t> positions = std::move(pairs_[best].positions);
        for (uint32_t position : positions)  // ascending: of `aaa` the first two are joined
            if (occurs(left, right, position)) join(position, new_id);
        pairs_[best] = {left, right, 0, 0, {}};
        push_fresh();
        return {left, right};
    }

  private:
    static constexpr uint32_t kEnd = 0xffffffff;

    struct Symbol {
        int id;  // -1: joined with the one before
        uint32_t previous, next, word;
    };
    struct Pair {
        int left, right;
        uint64_t count;                   // of occurrences in the text
        size_t cursor;                    // positions before it no longer hold the pair
        std::vector<uint32_t> positions;  // of the left symbol, ascending
    };
    struct Candidate {
        uint64_t count;
        uint32_t position, pair;
        bool operator<(const Candidate& other) const {
            return count != other.count ? count < other.count : position > other.position;
        }
    };

    void lay_out(const std::vector<CountedWord>& words, const std::array<int, 256>& id_of_byte) {
        size_t total = 0;
        for (const CountedWord& word : words) total += word.bytes.size();
        if (total >= kEnd)
            fail_input(
                "the text has %zu bytes of distinct words: BPE training takes less than 4 GiB",
                total);
        symbols_.reserve(total);
        for (uint32_t w = 0; w < words.size(); w++) {
            std::string_view word = words[w].bytes;
            weights_.push_back(words[w].count);
            for (size_t i = 0; i < word.size(); i++) {
                uint32_t position = uint32_t(symbols_.size());
                uint32_t previous = i > 0 ? position - 1 : kEnd;
                uint32_t next = i + 1 < word.size() ? position + 1 : kEnd;
                symbols_.push_back({id_of_byte[uint8_t(word[i])], previous, next, w});
            }
        }
    }

    uint64_t weight_of(uint32_t position) const { return weights_[symbols_[position].word]; }

    bool occurs(int left, int right, uint32_t position) const {
        const Symbol& symbol = symbols_[position];
        return symbol.id == left && symbol.next != kEnd && symbols_[symbol.next].id == right;
    }

    void add(int left, int right, uint32_t position, uint64_t weight) {
        uint32_t index =
            index_.find_or_insert(uint32_t(left), uint32_t(right), uint32_t(pairs_.size()));
        if (index == pairs_.size()) {
            pairs_.push_back({left, right, 0, 0, {}});
            fresh_.push_back(index);
        }
        pairs_[index].count += weight;
        pairs_[index].positions.push_back(position);
    }

    void subtract(int left, int right, uint64_t weight) {
        pairs_[index_.find(uint32_t(left), uint32_t(right))].count -= weight;
    }

    // Joins the symbol at `position` with the next, and moves the counts of the pairs around them.
    void join(uint32_t position, int new_id) {
        Symbol& symbol = symbols_[position];
        Symbol& gone = symbols_[symbol.next];
        uint64_t weight = weights_[symbol.word];
        if (uint32_t before = symbol.previous; before != kEnd) {
            subtract(symbols_[before].id, symbol.id, weight);
            add(symbols_[before].id, new_id, before, weight);
        }
        if (uint32_t after = gone.next; after != kEnd) {
            subtract(gone.id, symbols_[after].id, weight);
            add(new_id, symbols_[after].id, position, weight);
            symbols_[after].previous = position;
        }
        symbol.id = new_id;
        symbol.next = gone.next;
        gone.id = -1;
    }

    // Pairs that this step brought into being become candidates.
    void push_fresh() {
        for (uint32_t pair : fresh_)
            if (pairs_[pair].count > 0)
                heap_.push({pairs_[pair].count, first_position(pair), pair});
        fresh_.clear();
    }

    // The lowest position that holds the pair; its count must not be 0.
    uint32_t first_position(uint32_t index) {
        Pair& pair = pairs_[index];
        while (!occurs(pair.left, pair.right, pair.positions[pair.cursor])) pair.cursor++;
        return pair.positions[pair.cursor];
    }

    // Takes the best pair off the heap; kEnd if there is none.
    uint32_t pop_best() {
        while (!heap_.empty()) {
            Candidate top = heap_.top();
            heap_.pop();
            uint64_t count = pairs_[top.pair].count;
            if (count == 0) continue;
            if (count == top.count) return top.pair;  // no occurrence lost: its position holds too
            heap_.push({count, first_position(top.pair), top.pair});
        }
        return kEnd;
    }

    uint64_t min_frequency_;
    std::vector<uint64_t> weights_;  // word -> how often it is in the text
    std::vector<Symbol> symbols_;
    std::vector<Pair> pairs_;
    PairTable<16> index_;  // (left, right) -> index into pairs_
    std::vector<uint32_t> fresh_;
    std::priority_queue<Candidate> heap_;
};

inline Tokenizer Tokenizer::train_bpe(std::string_view text, int vocab_size,
                                      const BpeTraining& training) {
    if (vocab_size < 257 || vocab_size > kMaxVocabulary)
        fail_input("a BPE vocabulary of %d tokens: it takes 257 (256 bytes and %s) to %d",
                   vocab_size, kEndOfText.data(), kMaxVocabulary);
    if (text.empty()) fail_input("the text is empty: a BPE vocabulary needs text to learn from");
    Tokenizer tokenizer;
    tokenizer.kind_ = Kind::bpe;
    tokenizer.pattern_ = training.pattern;
    for (uint8_t byte : ByteAlphabet().byte_of_rank) {
        char c = char(byte);
        tokenizer.add_token({&c, 1});
    }
    tokenizer.index_bytes();
    BpeTrainer trainer(text, tokenizer.id_of_byte_, training);
    const int most = vocab_size - 257;
    while (tokenizer.vocab_size() + 1 < vocab_size) {
        if (int done = tokenizer.vocab_size() - 256; training.progress && done % 256 == 0)
            training.progress(done, most);
        // No two merges spell the same token: where its two ends are borders of tokens now they
        // always were, so equal bytes between them have been cut in the same way at every step.
        auto [left, right] = trainer.merge_best(tokenizer.vocab_size());
        if (left < 0) break;
        std::string joined(tokenizer.token_bytes(left));
        joined += tokenizer.token_bytes(right);
        tokenizer.add_merge(left, right, tokenizer.add_token(joined));
    }
    if (training.progress) training.progress(most, most);
    tokenizer.add_end_of_text();
    return tokenizer;
}

#include "tokenizer_files.h"  // how a Tokenizer is saved and loaded
