// Text <-> tokens: byte-level BPE (trained here, or GPT-2's own), byte and character vocabularies.
//
// Byte-level BPE [Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019] cuts text into
// pieces with the GPT-2 split pattern, writes each piece as bytes, and joins adjacent tokens by a
// ranked list of merges. A byte vocabulary has one token a byte, a character vocabulary one a
// Unicode character. All three are kept as Hugging Face tokenizer.json, which the `tokenizers`
// library reads and agrees with on any valid UTF-8.
//
// Text is bytes. Those that are not UTF-8 are kept: each is a character of its own, neither letter,
// number nor space. decode(encode(text)) == text for every text, where a character vocabulary lacks
// no character.
#pragma once

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "files.h"

constexpr int kMaxVocabulary = 65536;  // shards hold ids as uint16
constexpr std::string_view kEndOfText = "<|endoftext|>";
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// ==== characters =================================================================================

// A character of text: a Unicode code point, or kInvalidByte + b for a byte b that is not part of
// UTF-8.
constexpr int kInvalidByte = 0x110000;

struct Character {
    int symbol;
    size_t length;  // in bytes
};

// The character at byte i < text.size(). Overlong forms and surrogates are not UTF-8.
inline Character character_at(std::string_view text, size_t i) {
    uint8_t first = uint8_t(text[i]);
    if (first < 0x80) return {first, 1};
    utf8proc_int32_t code_point = -1;
    auto bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + i;
    auto limit = utf8proc_ssize_t(std::min<size_t>(text.size() - i, 4));
    auto length = utf8proc_iterate(bytes, limit, &code_point);
    if (length <= 0) return {kInvalidByte + first, 1};
    return {code_point, size_t(length)};
}

// The classes that the split pattern tells apart: \p{L}, \p{N}, \s (Unicode White_Space), and the
// rest.
enum class CharacterClass : uint8_t { other, letter, number, space };

// Letters and numbers that Unicode 15.1 and 16 added. utf8proc 2.8 (Debian 12) stops at
// Unicode 15.0, tiktoken and tokenizers know these; asked only where utf8proc says `unassigned`, so
// a newer one is not contradicted.
inline CharacterClass class_of_recent(int code_point) {
    struct Range {
        int first, last;
        CharacterClass kind;
    };
    constexpr auto L = CharacterClass::letter, N = CharacterClass::number;
    static constexpr Range kRecent[] = {
        {0x1c89, 0x1c8a, L},   {0xa7cb, 0xa7cd, L},   {0xa7da, 0xa7dc, L},   {0x105c0, 0x105f3, L},
        {0x10d40, 0x10d49, N}, {0x10d4a, 0x10d65, L}, {0x10d6f, 0x10d85, L}, {0x10ec2, 0x10ec4, L},
        {0x11380, 0x11389, L}, {0x1138b, 0x1138b, L}, {0x1138e, 0x1138e, L}, {0x11390, 0x113b5, L},
        {0x113b7, 0x113b7, L}, {0x113d1, 0x113d1, L}, {0x113d3, 0x113d3, L}, {0x116d0, 0x116e3, N},
        {0x11bc0, 0x11be0, L}, {0x11bf0, 0x11bf9, N}, {0x13460, 0x143fa, L}, {0x16100, 0x1611d, L},
        {0x16130, 0x16139, N}, {0x16d40, 0x16d6c, L}, {0x16d70, 0x16d79, N}, {0x18cff, 0x18cff, L},
        {0x1ccf0, 0x1ccf9, N}, {0x1e5d0, 0x1e5ed, L}, {0x1e5f0, 0x1e5f0, L}, {0x1e5f1, 0x1e5fa, N},
        {0x2ebf0, 0x2ee5d, L}};
    for (const Range& range : kRecent)
        if (code_point >= range.first && code_point <= range.last) return range.kind;
    return CharacterClass::other;
}

// The class of a code point beyond ASCII.
inline CharacterClass class_of_code_point(int code_point) {
    switch (utf8proc_category(code_point)) {
        case UTF8PROC_CATEGORY_LU:
        case UTF8PROC_CATEGORY_LL:
        case UTF8PROC_CATEGORY_LT:
        case UTF8PROC_CATEGORY_LM:
        case UTF8PROC_CATEGORY_LO:
            return CharacterClass::letter;
        case UTF8PROC_CATEGORY_ND:
        case UTF8PROC_CATEGORY_NL:
        case UTF8PROC_CATEGORY_NO:
            return CharacterClass::number;
        case UTF8PROC_CATEGORY_ZS:
        case UTF8PROC_CATEGORY_ZL:
        case UTF8PROC_CATEGORY_ZP:
            return CharacterClass::space;
        case UTF8PROC_CATEGORY_CN:
            return class_of_recent(code_point);
        // White_Space is the Z categories and the controls U+0009 to U+000D and U+0085.
        default:
            return code_point == 0x85 ? CharacterClass::space : CharacterClass::other;
    }
}

struct ClassifiedCharacter {
    CharacterClass kind;
    size_t length;  // in bytes
};

// The class and length of the character at byte i < text.size().
inline ClassifiedCharacter classify_at(std::string_view text, size_t i) {
    static constexpr auto kAscii = [] {
        std::array<CharacterClass, 128> table{};
        for (int c = 0; c < 128; c++) {
            bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
            bool space = c == ' ' || (c >= '\t' && c <= '\r');
            if (letter) table[size_t(c)] = CharacterClass::letter;
            if (space) table[size_t(c)] = CharacterClass::space;
            if (c >= '0' && c <= '9') table[size_t(c)] = CharacterClass::number;
        }
        return table;
    }();
    uint8_t first = uint8_t(text[i]);
    if (first < 0x80) return {kAscii[first], 1};
    Character character = character_at(text, i);
    if (character.symbol >= kInvalidByte) return {CharacterClass::other, 1};
    return {class_of_code_point(character.symbol), character.length};
}

// ==== the split pattern ==========================================================================

// The length of the contraction 's 't 're 've 'm 'll 'd that starts at byte i, where text[i] is the
// apostrophe; 0 if there is none.
inline size_t contraction_length(std::string_view text, size_t i) {
    if (i + 1 >= text.size()) return 0;
    char first = text[i + 1];
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    if (i + 2 >= text.size()) return 0;
    char second = text[i + 2];
    bool two = (first == 'r' && second == 'e') || (first == 'v' && second == 'e') ||
               (first == 'l' && second == 'l');
    return two ? 3 : 0;
}

// Where the first piece of text[begin, ...) ends by the GPT-2 split pattern (kGpt2Pattern); begin
// must be below text.size(). The alternatives of the pattern, tried in order: a contraction;
// letters, numbers, or others, each with at most one U+0020 before; white space up to the end of
// the text, or up to but without its last character, which goes with the word that follows; one
// white-space character.
inline size_t gpt2_piece_end(std::string_view text, size_t begin) {
    if (text[begin] == '\'')
        if (size_t length = contraction_length(text, begin)) return begin + length;
    ClassifiedCharacter first = classify_at(text, begin);
    size_t end = begin + first.length;
    CharacterClass kind = first.kind;
    if (text[begin] == ' ' && end < text.size()) {
        ClassifiedCharacter second = classify_at(text, end);
        if (second.kind != CharacterClass::space) {
            kind = second.kind;
            end += second.length;
        }
    }
    size_t last = begin;  // where the last character of the run starts
    while (end < text.size()) {
        ClassifiedCharacter next = classify_at(text, end);
        if (next.kind != kind) return kind == CharacterClass::space && last > begin ? last : end;
        last = end;
        end += next.length;
    }
    return end;
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

// ==== pairs of tokens ============================================================================

// A map from pairs of token ids (each below kMaxVocabulary) to a number: open addressing with
// linear probing, at most half full, 8 bytes a slot, because encoding asks it once or more for
// every byte.
class PairTable {
  public:
    static constexpr uint32_t kNone = 0xffffffff;

    uint32_t find(int left, int right) const {
        uint32_t key = key_of(left, right);
        for (size_t i = slot_of(key);; i = (i + 1) & (slots_.size() - 1)) {
            if (slots_[i].value == kNone || slots_[i].key == key) return slots_[i].value;
        }
    }

    // The pair's number; a pair that has none is given `value` (not kNone) first.
    uint32_t find_or_insert(int left, int right, uint32_t value) {
        if (2 * (used_ + 1) > slots_.size()) grow();
        return place(key_of(left, right), value);
    }

  private:
    struct Slot {
        uint32_t key = 0, value = kNone;
    };

    static uint32_t key_of(int left, int right) { return uint32_t(left) << 16 | uint32_t(right); }
    // Fibonacci hashing: the high bits of a product with 2^64 / golden ratio.
    size_t slot_of(uint32_t key) const { return size_t(key * 0x9e3779b97f4a7c15u >> shift_); }

    uint32_t place(uint32_t key, uint32_t value) {
        size_t i = slot_of(key);
        while (slots_[i].value != kNone && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
        if (slots_[i].value == kNone) {
            slots_[i] = {key, value};
            used_++;
        }
        return slots_[i].value;
    }

    void grow() {
        std::vector<Slot> old(2 * slots_.size());
        old.swap(slots_);
        shift_--;
        used_ = 0;
        for (const Slot& slot : old)
            if (slot.value != kNone) place(slot.key, slot.value);
    }

    std::vector<Slot> slots_ = std::vector<Slot>(256);
    int shift_ = 64 - 8;  // slots_.size() == 1 << (64 - shift_)
    size_t used_ = 0;
};

// ==== the tokenizer ==============================================================================

// A vocabulary and what turns text into its ids. A value: copies are independent. Its const
// functions share nothing that they change, so several threads may use one Tokenizer at once.
struct Tokenizer {
    enum class Kind { bpe, bytes, chars };

    // 256 bytes, each with its own value as id, and <|endoftext|> with id 256.
    static Tokenizer bytes();

    // The distinct characters of `text` in the order of their code points, then its bytes that are
    // not UTF-8, then <|endoftext|>. Fails on an empty text and on more than kMaxVocabulary tokens.
    static Tokenizer chars(std::string_view text);

    // Byte-level BPE learned from `text`: the 256 bytes in GPT-2's order, merges in the order they
    // were learned, <|endoftext|> last. Each merge takes the most frequent pair of adjacent tokens,
    // counted over the pieces of the text; of equally frequent pairs, that whose first occurrence
    // in the text, as it is cut at that step, comes first. Where no pair is left the vocabulary
    // stays smaller than asked: see vocab_size(). Fails on an empty text and on a vocab_size
    // outside 257 to kMaxVocabulary.
    static Tokenizer train_bpe(std::string_view text, int vocab_size);

    // From a tokenizer.json, a folder that holds one, or GPT-2's merges (vocab.bpe, merges.txt: the
    // first line starts with `#version`; ids follow from the order of the lines). Fails, naming the
    // file and the field, on everything that would make this tokenizer differ from what the file
    // describes.
    static Tokenizer load(const std::string& path);

    // Writes tokenizer.json and tokenizer_config.json into `folder`, each atomically. A context
    // above 0 is noted as model_max_length. Fails where the machine does.
    void save(const std::string& folder, int context = 0) const;

    Kind kind() const { return kind_; }
    int vocab_size() const { return int(token_ends_.size()); }  // special tokens included
    int end_of_text() const { return end_of_text_; }            // the id of <|endoftext|>, or -1

    // Appends the ids of `text`. Special tokens spelt out in the text are plain text. Characters
    // that a character vocabulary lacks are dropped, unless it holds their bytes as invalid bytes;
    // then it is those.
    void encode(std::string_view text, std::vector<int>& ids) const { encode(text, ids, nullptr); }
    std::vector<int> encode(std::string_view text) const { return encode(text, nullptr); }

    // The same; the distinct characters that were dropped are appended to *missing in the order
    // met, fit for a message: ASCII controls and bytes that are not UTF-8 are spelt <0x0A>.
    std::vector<int> encode(std::string_view text, std::string* missing) const {
        std::vector<int> ids;
        encode(text, ids, missing);
        return ids;
    }
    void encode(std::string_view text, std::vector<int>& ids, std::string* missing) const;

    // The bytes that a token stands for; a special token gives its text. Fails on an id outside the
    // vocabulary. The view is valid while the Tokenizer is neither changed nor destroyed.
    std::string_view token_bytes(int id) const;

    // The bytes of all tokens in a row. Fails on an id outside the vocabulary.
    std::string decode(const std::vector<int>& ids) const;

    // A hash of everything that decides what encode returns, and of end_of_text(): equal for equal
    // tokenizers, also after save and load. It keys the cache of tokenized text.
    uint64_t fingerprint() const;

  private:
    struct Merge {
        int left, right, result;
    };
    struct PieceMerger;
    friend struct TokenizerReader;

    int add_token(std::string_view bytes);
    void add_merge(int left, int right, int result);
    void add_end_of_text();
    void index_bytes();
    void index_character(int symbol, int id);
    int id_of_character(int symbol) const;
    void encode_chars(std::string_view text, std::vector<int>& ids, std::string* missing) const;
    void encode_bpe(std::string_view text, std::vector<int>& ids) const;
    std::string spell(int id, const ByteAlphabet& alphabet) const;
    bool is_special(int id) const;

    Kind kind_ = Kind::bytes;
    std::string token_bytes_;  // the tokens' bytes, one after the other in the order of their ids
    std::vector<size_t> token_ends_;  // where each ends in it
    std::vector<int> specials_;       // ids, ascending
    int end_of_text_ = -1;
    std::array<int, 256> id_of_byte_{};  // bpe and bytes
    std::vector<Merge> merges_;          // bpe: in the order of their rank
    PairTable merge_ranks_;              // bpe: (left, right) -> index into merges_
    std::vector<int> id_of_character_;   // chars: by Character::symbol, -1 where there is none
};

inline int Tokenizer::add_token(std::string_view bytes) {
    token_bytes_ += bytes;
    token_ends_.push_back(token_bytes_.size());
    return vocab_size() - 1;
}

inline void Tokenizer::add_merge(int left, int right, int result) {
    merge_ranks_.find_or_insert(left, right, uint32_t(merges_.size()));
    merges_.push_back({left, right, result});
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
    size_t begin = id == 0 ? 0 : token_ends_[size_t(id) - 1];
    return std::string_view(token_bytes_).substr(begin, token_ends_[size_t(id)] - begin);
}

inline std::string Tokenizer::decode(const std::vector<int>& ids) const {
    std::string text;
    for (int id : ids) text += token_bytes(id);
    return text;
}

inline uint64_t Tokenizer::fingerprint() const {
    constexpr int kVersion =
        1;  // of the encoding; raised when encode changes for the same vocabulary
    int header[] = {kVersion, int(kind_), end_of_text_};
    uint64_t hash = hash_bytes(header, sizeof header);
    hash = hash_bytes(token_bytes_.data(), token_bytes_.size(), hash);
    hash = hash_bytes(token_ends_.data(), token_ends_.size() * sizeof(size_t), hash);
    hash = hash_bytes(specials_.data(), specials_.size() * sizeof(int), hash);
    hash = hash_bytes(merges_.data(), merges_.size() * sizeof(Merge), hash);
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

// ==== encoding ===================================================================================

inline void Tokenizer::encode(std::string_view text, std::vector<int>& ids,
                              std::string* missing) const {
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
        case Kind::bpe:
            encode_bpe(text, ids);
            break;
    }
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

// Merges the bytes of one piece: as long as adjacent tokens form a pair of the list, that of the
// lowest rank is joined, the leftmost of several. Owns the scratch memory, so that a text allocates
// it once.
struct Tokenizer::PieceMerger {
    // Up to this many bytes the quadratic way is the faster one: it looks at few cache lines.
    static constexpr size_t kShort = 64;
    static constexpr size_t kEnd = ~size_t(0);

    struct Candidate {
        uint32_t rank;
        size_t position;
        // The heap brings up its greatest, which is to be the lowest rank, then the leftmost.
        bool operator<(const Candidate& other) const {
            return rank != other.rank ? rank > other.rank : position > other.position;
        }
    };

    const Tokenizer& tokenizer;
    std::vector<int> symbols;            // the long way: the token that starts at a byte, or -1
    std::vector<size_t> next, previous;  // the tokens before and after it
    std::vector<Candidate> heap;

    // Appends the ids of `piece`.
    void merge(std::string_view piece, std::vector<int>& ids) {
        if (piece.size() <= kShort) merge_short(piece, ids);
        else merge_long(piece, ids);
    }

    // O(n^2) for n bytes: finds the lowest rank by looking at all, and moves the rest up.
    void merge_short(std::string_view piece, std::vector<int>& ids) const {
        const PairTable& ranks_of = tokenizer.merge_ranks_;
        int token[kShort];
        uint32_t rank[kShort];  // rank[i] of the pair (token[i], token[i + 1]); the last is kNone
        size_t n = piece.size();
        for (size_t i = 0; i < n; i++) token[i] = tokenizer.id_of_byte_[uint8_t(piece[i])];
        for (size_t i = 0; i + 1 < n; i++) rank[i] = ranks_of.find(token[i], token[i + 1]);
        rank[n - 1] = PairTable::kNone;
        for (;;) {
            size_t best = size_t(std::min_element(rank, rank + n) - rank);
            if (rank[best] == PairTable::kNone) break;
            token[best] = tokenizer.merges_[rank[best]].result;
            n--;
            std::copy(token + best + 2, token + n + 1, token + best + 1);
            std::copy(rank + best + 1, rank + n + 1, rank + best);
            if (best + 1 < n) rank[best] = ranks_of.find(token[best], token[best + 1]);
            if (best > 0) rank[best - 1] = ranks_of.find(token[best - 1], token[best]);
        }
        ids.insert(ids.end(), token, token + n);
    }

    // O(n log n): a linked list of tokens and a heap of candidates, where those that an earlier
    // merge made void are recognised when they come up.
    void merge_long(std::string_view piece, std::vector<int>& ids) {
        size_t n = piece.size();
        symbols.resize(n);
        next.resize(n);
        previous.resize(n);
        for (size_t i = 0; i < n; i++) {
            symbols[i] = tokenizer.id_of_byte_[uint8_t(piece[i])];
            next[i] = i + 1 < n ? i + 1 : kEnd;
            previous[i] = i > 0 ? i - 1 : kEnd;
        }
        heap.clear();
        for (size_t i = 0; i + 1 < n; i++)
            if (uint32_t rank = rank_at(i); rank != PairTable::kNone) heap.push_back({rank, i});
        std::make_heap(heap.begin(), heap.end());
        while (!heap.empty()) {
            std::pop_heap(heap.begin(), heap.end());
            auto [rank, i] = heap.back();
            heap.pop_back();
            if (symbols[i] < 0 || rank_at(i) != rank) continue;
            size_t gone = next[i];
            symbols[i] = tokenizer.merges_[rank].result;
            symbols[gone] = -1;
            next[i] = next[gone];
            if (next[i] != kEnd) previous[next[i]] = i;
            add_candidate(i);
            if (previous[i] != kEnd) add_candidate(previous[i]);
        }
        for (size_t i = 0; i != kEnd; i = next[i]) ids.push_back(symbols[i]);
    }

    void add_candidate(size_t i) {
        uint32_t rank = rank_at(i);
        if (rank == PairTable::kNone) return;
        heap.push_back({rank, i});
        std::push_heap(heap.begin(), heap.end());
    }

    // The rank of the token at i with the one after it.
    uint32_t rank_at(size_t i) const {
        if (next[i] == kEnd) return PairTable::kNone;
        return tokenizer.merge_ranks_.find(symbols[i], symbols[next[i]]);
    }
};

// Most pieces of a text were met before: a direct-mapped cache remembers where in the text a piece
// stood and where its ids stand in the output. It lives for one call, and a piece that hashes to a
// taken slot takes it over.
inline void Tokenizer::encode_bpe(std::string_view text, std::vector<int>& ids) const {
    struct Slot {
        size_t begin = 0, length = 0;  // of the piece in the text; length 0: empty
        size_t first_id = 0, id_count = 0;
    };
    constexpr size_t kMostSlots = 1 << 16;  // 2 MiB
    std::vector<Slot> cache(std::bit_ceil(std::min(text.size() / 4 + 1, kMostSlots)));
    PieceMerger merger{*this, {}, {}, {}, {}};
    for (size_t begin = 0; begin < text.size();) {
        size_t end = gpt2_piece_end(text, begin);
        std::string_view piece = text.substr(begin, end - begin);
        size_t first_id = ids.size();
        Slot& slot = cache[hash_bytes(piece.data(), piece.size()) & (cache.size() - 1)];
        if (text.substr(slot.begin, slot.length) == piece) {
            ids.resize(first_id + slot.id_count);
            std::copy_n(ids.begin() + ptrdiff_t(slot.first_id), slot.id_count,
                        ids.begin() + ptrdiff_t(first_id));
        } else {
            merger.merge(piece, ids);
            slot = {begin, piece.size(), first_id, ids.size() - first_id};
        }
        begin = end;
    }
}

// ==== training ===================================================================================

// Learns merges. The distinct pieces of the text are laid out one after the other in the order of
// their first appearance, one symbol a byte, so that `first in the text` is `lowest position`. A
// merge touches only the places where its pair occurs. Occurrences of a pair all come to be in one
// step, that which made the newer of its tokens, and from then on only disappear: a pair's count
// only falls and its first position only rises. A heap may therefore hold old values: what comes up
// is compared with the truth and put back if it is worse by now. Time: O(n log n) for n bytes of
// distinct pieces.
class BpeTrainer {
  public:
    explicit BpeTrainer(std::string_view text, const std::array<int, 256>& id_of_byte) {
        std::vector<std::string_view> words = count_words(text);
        lay_out(words, id_of_byte);
        for (uint32_t position = 0; position < symbols_.size(); position++)
            if (uint32_t next = symbols_[position].next; next != kEnd)
                add(symbols_[position].id, symbols_[next].id, position, weight_of(position));
        push_fresh();
    }

    // Joins the best pair everywhere as `new_id`; returns its two ids, {-1, -1} if none is left.
    std::pair<int, int> merge_best(int new_id) {
        uint32_t best = pop_best();
        if (best == kEnd) return {-1, -1};
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

    // The distinct pieces of the text in the order of their first appearance; fills weights_.
    std::vector<std::string_view> count_words(std::string_view text) {
        struct Hash {
            size_t operator()(std::string_view word) const {
                return hash_bytes(word.data(), word.size());
            }
        };
        std::vector<std::string_view> words;
        std::unordered_map<std::string_view, uint32_t, Hash> index;
        for (size_t begin = 0; begin < text.size();) {
            size_t end = gpt2_piece_end(text, begin);
            std::string_view word = text.substr(begin, end - begin);
            auto [found, fresh] = index.try_emplace(word, uint32_t(words.size()));
            if (fresh) {
                words.push_back(word);
                weights_.push_back(0);
            }
            weights_[found->second]++;
            begin = end;
        }
        return words;
    }

    void lay_out(const std::vector<std::string_view>& words,
                 const std::array<int, 256>& id_of_byte) {
        size_t total = 0;
        for (std::string_view word : words) total += word.size();
        if (total >= kEnd)
            fail_input(
                "the text has %zu bytes of distinct words: BPE training takes less than 4 GiB",
                total);
        symbols_.reserve(total);
        for (uint32_t w = 0; w < words.size(); w++) {
            for (size_t i = 0; i < words[w].size(); i++) {
                uint32_t position = uint32_t(symbols_.size());
                uint32_t previous = i > 0 ? position - 1 : kEnd;
                uint32_t next = i + 1 < words[w].size() ? position + 1 : kEnd;
                symbols_.push_back({id_of_byte[uint8_t(words[w][i])], previous, next, w});
            }
        }
    }

    uint64_t weight_of(uint32_t position) const { return weights_[symbols_[position].word]; }

    bool occurs(int left, int right, uint32_t position) const {
        const Symbol& symbol = symbols_[position];
        return symbol.id == left && symbol.next != kEnd && symbols_[symbol.next].id == right;
    }

    void add(int left, int right, uint32_t position, uint64_t weight) {
        uint32_t index = index_.find_or_insert(left, right, uint32_t(pairs_.size()));
        if (index == pairs_.size()) {
            pairs_.push_back({left, right, 0, 0, {}});
            fresh_.push_back(index);
        }
        pairs_[index].count += weight;
        pairs_[index].positions.push_back(position);
    }

    void subtract(int left, int right, uint64_t weight) {
        pairs_[index_.find(left, right)].count -= weight;
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

    std::vector<uint64_t> weights_;  // word -> how often it is in the text
    std::vector<Symbol> symbols_;
    std::vector<Pair> pairs_;
    PairTable index_;  // (left, right) -> index into pairs_
    std::vector<uint32_t> fresh_;
    std::priority_queue<Candidate> heap_;
};

inline Tokenizer Tokenizer::train_bpe(std::string_view text, int vocab_size) {
    if (vocab_size < 257 || vocab_size > kMaxVocabulary)
        fail_input("a BPE vocabulary of %d tokens: it takes 257 (256 bytes and %s) to %d",
                   vocab_size, kEndOfText.data(), kMaxVocabulary);
    if (text.empty()) fail_input("the text is empty: a BPE vocabulary needs text to learn from");
    Tokenizer tokenizer;
    tokenizer.kind_ = Kind::bpe;
    for (uint8_t byte : ByteAlphabet().byte_of_rank) {
        char c = char(byte);
        tokenizer.add_token({&c, 1});
    }
    tokenizer.index_bytes();
    BpeTrainer trainer(text, tokenizer.id_of_byte_);
    while (tokenizer.vocab_size() + 1 < vocab_size) {
        // No two merges spell the same token: where its two ends are borders of tokens now they
        // always were, so equal bytes between them have been cut in the same way at every step.
        auto [left, right] = trainer.merge_best(tokenizer.vocab_size());
        if (left < 0) break;
        std::string joined(tokenizer.token_bytes(left));
        joined += tokenizer.token_bytes(right);
        tokenizer.add_merge(left, right, tokenizer.add_token(joined));
    }
    tokenizer.add_end_of_text();
    return tokenizer;
}

// ==== saving =====================================================================================

// A token as tokenizer.json spells it.
inline std::string Tokenizer::spell(int id, const ByteAlphabet& alphabet) const {
    std::string_view bytes = token_bytes(id);
    if (is_special(id)) return std::string(bytes);
    if (kind_ != Kind::chars) return alphabet.spell(bytes);
    int symbol = character_at(bytes, 0).symbol;
    if (symbol < kInvalidByte) return std::string(bytes);
    return format("<0x%02X>", unsigned(symbol - kInvalidByte));
}

inline void Tokenizer::save(const std::string& folder, int context) const {
    ByteAlphabet alphabet;
    std::vector<std::string> spelling;
    for (int id = 0; id < vocab_size(); id++) spelling.push_back(spell(id, alphabet));
    ordered_json::object_t vocabulary;
    for (int id = 0; id < vocab_size(); id++)  // emplace_back: the keys are known to differ
        vocabulary.emplace_back(spelling[size_t(id)], id);
    ordered_json merges = ordered_json::array();
    for (const Merge& m : merges_)
        merges.push_back(spelling[size_t(m.left)] + " " + spelling[size_t(m.right)]);
    ordered_json specials = ordered_json::array();
    for (int id : specials_)
        specials.push_back({{"id", id},
                            {"content", spelling[size_t(id)]},
                            {"single_word", false},
                            {"lstrip", false},
                            {"rstrip", false},
                            {"normalized", false},
                            {"special", true}});

    bool has_bytes = id_of_character_.size() > size_t(kInvalidByte);
    ordered_json splitter, decoder;
    if (kind_ == Kind::chars) {
        decoder = {{"type", "Fuse"}};
        if (has_bytes)
            decoder = {{"type", "Sequence"},
                       {"decoders", {{{"type", "ByteFallback"}}, {{"type", "Fuse"}}}}};
    } else {
        splitter = {{"type", "ByteLevel"},
                    {"add_prefix_space", false},
                    {"trim_offsets", false},
                    {"use_regex", kind_ == Kind::bpe}};
        decoder = splitter;
    }
    ordered_json model = {{"type", "BPE"},
                          {"dropout", nullptr},
                          {"unk_token", nullptr},
                          {"continuing_subword_prefix", nullptr},
                          {"end_of_word_suffix", nullptr},
                          {"fuse_unk", false},
                          {"byte_fallback", kind_ == Kind::chars && has_bytes},
                          {"ignore_merges", false},
                          {"vocab", std::move(vocabulary)},
                          {"merges", std::move(merges)}};
    ordered_json file = {{"version", "1.0"},          {"truncation", nullptr},
                         {"padding", nullptr},        {"added_tokens", std::move(specials)},
                         {"normalizer", nullptr},     {"pre_tokenizer", std::move(splitter)},
                         {"post_processor", nullptr}, {"decoder", std::move(decoder)},
                         {"model", std::move(model)}};
    ordered_json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                           {"add_prefix_space", false},
                           {"clean_up_tokenization_spaces", false}};
    if (end_of_text_ >= 0) {
        config["bos_token"] = kEndOfText;
        config["eos_token"] = kEndOfText;
    }
    if (context > 0) config["model_max_length"] = context;
    make_folder(folder);
    write_file_atomic(folder + "/tokenizer.json", file.dump(2) + "\n");
    write_file_atomic(folder + "/tokenizer_config.json", config.dump(2) + "\n");
}

// ==== loading ====================================================================================

// Reads the files of strangers. What it does not know it refuses: a tokenizer that is almost the
// right one would train and continue text wrongly, without a sign.
struct TokenizerReader {
    const std::string& path;
    Tokenizer tokenizer;
    std::unordered_map<std::string, int> id_of;  // as the file spells the tokens
    ByteAlphabet alphabet;

    [[noreturn]] void refuse(const std::string& place, const std::string& why) const {
        fail_input("%s: %s: %s", path.c_str(), place.c_str(), why.c_str());
    }

    // A string from the file for a message: quoted, in ASCII, on one line, not too long.
    static std::string quoted(const std::string& text) {
        constexpr size_t kLongest = 60;
        std::string cut = text.size() <= kLongest ? text : text.substr(0, kLongest) + "...";
        return json(cut).dump(-1, ' ', true, json::error_handler_t::replace);
    }

    // object[key]; nullptr where that is missing or null, or `object` is not an object.
    static const json* field(const json& object, const char* key) {
        if (!object.is_object()) return nullptr;
        auto found = object.find(key);
        return found == object.end() || found->is_null() ? nullptr : &*found;
    }

    static std::string type_of(const json& object) {
        const json* type = field(object, "type");
        return type != nullptr && type->is_string() ? type->get<std::string>() : "";
    }

    bool flag(const json& object, const std::string& place, const char* key, bool otherwise) const {
        const json* value = field(object, key);
        if (value == nullptr) return otherwise;
        if (!value->is_boolean()) refuse(place + "." + key, "is not true or false");
        return value->get<bool>();
    }

    [[noreturn]] void refuse_type(const std::string& place, const json& object) const {
        refuse(place, "type " + quoted(type_of(object)) +
                          " is not supported; this program reads byte-level BPE in GPT-2's form");
    }

    Tokenizer::Kind read_pre_tokenizer(const json& root) const;
    void read_decoder(const json& root, Tokenizer::Kind kind) const;
    void check_post_processor(const json& root) const;
    void check_model(const json& model, Tokenizer::Kind kind) const;
    int read_id(const json& value, const std::string& place) const;
    void read_vocabulary(const json& root, const json& model);
    std::string bytes_of(const std::string& spelling, bool byte_fallback) const;
    void check_bytes() const;
    void read_merges(const json& model);
    void read_merge(const std::string& left, const std::string& right, const std::string& place);
    void read_json(std::string_view text);
    void read_merges_file(std::string_view text);
};

// How the file cuts text decides the kind: GPT-2's pattern (bpe), not at all but into bytes
// (bytes), not at all (chars).
inline Tokenizer::Kind TokenizerReader::read_pre_tokenizer(const json& root) const {
    const std::string place = "pre_tokenizer";
    const json* whole = field(root, "pre_tokenizer");
    if (whole == nullptr) return Tokenizer::Kind::chars;
    const json* byte_level = whole;
    bool split = false;  // a Split with the pattern stands before
    if (type_of(*whole) == "Sequence") {
        const json* list = field(*whole, "pretokenizers");
        bool fits = list != nullptr && list->is_array() && (list->size() == 1 || list->size() == 2);
        if (!fits) refuse_type(place, *whole);
        byte_level = &list->back();
        split = list->size() == 2;
    }
    if (split) {
        const json& first = whole->at("pretokenizers").front();
        const json* pattern = field(first, "pattern");
        const json* regex = pattern != nullptr ? field(*pattern, "Regex") : nullptr;
        const json* behavior = field(first, "behavior");
        bool known = type_of(first) == "Split" && regex != nullptr && *regex == kGpt2Pattern &&
                     behavior != nullptr && *behavior == "Isolated" &&
                     !flag(first, place + ".pretokenizers[0]", "invert", false);
        if (!known) refuse(place + ".pretokenizers[0]", "is not a Split by GPT-2's pattern");
    }
    if (type_of(*byte_level) != "ByteLevel") refuse_type(place, *byte_level);
    if (flag(*byte_level, place, "add_prefix_space", true))
        refuse(place + ".add_prefix_space", "true is not supported; false is");
    bool use_regex = flag(*byte_level, place, "use_regex", true);
    if (split && use_regex) refuse(place, "splits twice, by Split and by ByteLevel.use_regex");
    return split || use_regex ? Tokenizer::Kind::bpe : Tokenizer::Kind::bytes;
}

// Only a decoder that puts the tokens' bytes in a row is what decode does.
inline void TokenizerReader::read_decoder(const json& root, Tokenizer::Kind kind) const {
    const json* decoder = field(root, "decoder");
    std::string type = decoder == nullptr ? "" : type_of(*decoder);
    if (kind != Tokenizer::Kind::chars) {
        if (type != "ByteLevel") refuse("decoder", "is not ByteLevel");
        return;
    }
    if (type == "Sequence") {
        const json* list = field(*decoder, "decoders");
        if (list != nullptr && list->is_array() && list->size() == 2 &&
            type_of(list->front()) == "ByteFallback" && type_of(list->back()) == "Fuse")
            return;
    }
    if (type != "Fuse") refuse("decoder", "is neither Fuse nor ByteFallback and Fuse");
}

// ByteLevel only moves offsets. A template must add nothing: encode adds nothing.
inline void TokenizerReader::check_post_processor(const json& root) const {
    const json* post = field(root, "post_processor");
    if (post == nullptr || type_of(*post) == "ByteLevel") return;
    if (type_of(*post) != "TemplateProcessing") refuse_type("post_processor", *post);
    const json* single = field(*post, "single");
    bool plain = single != nullptr && single->is_array() && single->size() == 1 &&
                 field(single->front(), "Sequence") != nullptr;
    if (!plain) refuse("post_processor.single", "adds tokens to the text, which is not supported");
}

// The settings of the model that change what encoding gives.
inline void TokenizerReader::check_model(const json& model, Tokenizer::Kind kind) const {
    if (const json* dropout = field(model, "dropout"); dropout != nullptr && *dropout != 0.0)
        refuse("model.dropout", "is not supported; null is");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
        if (const json* affix = field(model, key); affix != nullptr && *affix != "")
            refuse(std::string("model.") + key, "is not supported; null is");
    if (flag(model, "model", "ignore_merges", false))
        refuse("model.ignore_merges", "true is not supported; false is");
    // With a token for each byte nothing is ever unknown.
    if (kind == Tokenizer::Kind::chars && field(model, "unk_token") != nullptr)
        refuse("model.unk_token", "is not supported for characters; null is");
}

inline int TokenizerReader::read_id(const json& value, const std::string& place) const {
    if (!value.is_number_integer()) refuse(place, "the id is not an integer");
    bool fits = value.is_number_unsigned() && value.get<uint64_t>() < uint64_t(kMaxVocabulary);
    if (!fits)
        refuse(place,
               "id " + value.dump() + " is not within 0 to " + std::to_string(kMaxVocabulary - 1));
    return value.get<int>();
}

// The bytes of a token that is not special; empty where it stands for none of its kind.
inline std::string TokenizerReader::bytes_of(const std::string& spelling,
                                             bool byte_fallback) const {
    std::string bytes;
    if (tokenizer.kind_ != Tokenizer::Kind::chars)
        return alphabet.read(spelling, bytes) ? bytes : std::string();
    if (!spelling.empty() && character_at(spelling, 0).length == spelling.size()) return spelling;
    for (int byte = 0x80; byte < 0x100 && byte_fallback; byte++)
        if (spelling == format("<0x%02X>", unsigned(byte))) return std::string(1, char(byte));
    return bytes;
}

// Fills the tokens, the special tokens, and id_of, from model.vocab and added_tokens: together they
// must use each id from 0 on once.
inline void TokenizerReader::read_vocabulary(const json& root, const json& model) {
    const json* vocabulary = field(model, "vocab");
    if (vocabulary == nullptr || !vocabulary->is_object())
        refuse("model.vocab", "is missing or not an object");
    if (vocabulary->size() > size_t(kMaxVocabulary))
        refuse("model.vocab",
               format("%zu tokens; at most %d are supported", vocabulary->size(), kMaxVocabulary));
    for (const auto& [spelling, id] : vocabulary->items())
        id_of[spelling] = read_id(id, "model.vocab: token " + quoted(spelling));

    const json* added = field(root, "added_tokens");
    if (added != nullptr && !added->is_array()) refuse("added_tokens", "is not a list");
    for (size_t i = 0; added != nullptr && i < added->size(); i++) {
        std::string place = format("added_tokens[%zu]", i);
        const json& token = (*added)[i];
        const json *content = field(token, "content"), *id_field = field(token, "id");
        if (content == nullptr || !content->is_string() || *content == "" || id_field == nullptr)
            refuse(place, "has no content or no id");
        if (!flag(token, place, "special", false))
            refuse(place + ".special", "false is not supported: only special tokens may be added");
        int id = read_id(*id_field, place);
        int known = id_of.try_emplace(content->get<std::string>(), id).first->second;
        if (known != id)
            refuse(place, format("id %d, but model.vocab gives the token id %d", id, known));
        tokenizer.specials_.push_back(id);
    }
    std::vector<int>& specials = tokenizer.specials_;
    std::sort(specials.begin(), specials.end());
    specials.erase(std::unique(specials.begin(), specials.end()), specials.end());

    std::vector<const std::string*> spelling_of(id_of.size());
    for (const auto& [spelling, id] : id_of) {
        if (size_t(id) >= id_of.size())
            refuse("model.vocab", format("id %d in a vocabulary of %zu tokens; ids must be dense",
                                         id, id_of.size()));
        if (spelling_of[size_t(id)] != nullptr)
            refuse("model.vocab", format("two tokens have the id %d", id));
        spelling_of[size_t(id)] = &spelling;
    }
    bool byte_fallback = flag(model, "model", "byte_fallback", false);
    for (int id = 0; id < int(spelling_of.size()); id++) {
        const std::string& spelling = *spelling_of[size_t(id)];
        std::string bytes = bytes_of(spelling, byte_fallback);
        bool special = tokenizer.is_special(id);
        if (bytes.empty() && !special)
            refuse("model.vocab",
                   "token " + quoted(spelling) + " is not of this kind of vocabulary");
        tokenizer.add_token(special ? spelling : bytes);
        // A special token of one character is that character too, as in tokenizers.
        bool in_model = vocabulary->contains(spelling);
        bool encodable = special ? in_model && bytes == spelling : true;
        if (tokenizer.kind_ == Tokenizer::Kind::chars && encodable)
            tokenizer.index_character(character_at(bytes, 0).symbol, id);
    }
    auto end = id_of.find(std::string(kEndOfText));
    tokenizer.end_of_text_ = end == id_of.end() ? -1 : end->second;
}

// Any text can be encoded only with a token for every byte.
inline void TokenizerReader::check_bytes() const {
    for (unsigned byte = 0; byte < 256; byte++)
        if (tokenizer.id_of_byte_[byte] < 0)
            refuse("model.vocab", format("no token for the byte 0x%02X; all 256 are needed", byte));
}

inline void TokenizerReader::read_merge(const std::string& left, const std::string& right,
                                        const std::string& place) {
    auto find = [&](const std::string& spelling) {
        auto found = id_of.find(spelling);
        if (found == id_of.end())
            refuse(place, "token " + quoted(spelling) + " is not in the vocabulary");
        if (tokenizer.is_special(found->second))
            refuse(place,
                   "token " + quoted(spelling) + " is special and cannot be part of a merge");
        return found->second;
    };
    int left_id = find(left), right_id = find(right), result = find(left + right);
    if (tokenizer.merge_ranks_.find(left_id, right_id) != PairTable::kNone)
        refuse(place, "the pair " + quoted(left + " " + right) + " stands there twice");
    tokenizer.add_merge(left_id, right_id, result);
}

// model.merges: a list of "left right", or of ["left", "right"].
inline void TokenizerReader::read_merges(const json& model) {
    const json* merges = field(model, "merges");
    if (merges == nullptr || !merges->is_array())
        refuse("model.merges", "is missing or not a list");
    if (!merges->empty() && tokenizer.kind_ != Tokenizer::Kind::bpe)
        refuse("model.merges", "is not empty, but the pre_tokenizer is not GPT-2's");
    for (size_t i = 0; i < merges->size(); i++) {
        const json& merge = (*merges)[i];
        std::string place = format("model.merges[%zu]", i);
        if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
            read_merge(merge[0].get<std::string>(), merge[1].get<std::string>(), place);
            continue;
        }
        std::string text = merge.is_string() ? merge.get<std::string>() : "";
        size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos)
            refuse(place, "is not two tokens");
        read_merge(text.substr(0, space), text.substr(space + 1), place);
    }
}

inline void TokenizerReader::read_json(std::string_view text) {
    json root = parse_json(text, path);
    for (const char* key : {"normalizer", "truncation", "padding"})
        if (field(root, key) != nullptr) refuse(key, "is not supported; null is");
    const json* model = field(root, "model");
    if (model == nullptr || !model->is_object()) refuse("model", "is missing or not an object");
    if (field(*model, "type") != nullptr && type_of(*model) != "BPE") refuse_type("model", *model);
    tokenizer.kind_ = read_pre_tokenizer(root);
    read_decoder(root, tokenizer.kind_);
    check_post_processor(root);
    check_model(*model, tokenizer.kind_);
    read_vocabulary(root, *model);
    if (tokenizer.kind_ != Tokenizer::Kind::chars) {
        tokenizer.index_bytes();
        check_bytes();
    }
    read_merges(*model);
}

// GPT-2's merges: a line "#version: ...", then a line "left right" a merge, in the order of their
// rank.
inline void TokenizerReader::read_merges_file(std::string_view text) {
    tokenizer.kind_ = Tokenizer::Kind::bpe;
    for (uint8_t byte : alphabet.byte_of_rank) {
        std::string bytes(1, char(byte));
        id_of[alphabet.spell(bytes)] = tokenizer.add_token(bytes);
    }
    tokenizer.index_bytes();
    size_t line_number = 1;
    for (size_t begin = text.find('\n'); begin < text.size() - 1;) {
        size_t end = std::min(text.find('\n', begin + 1), text.size());
        std::string line(text.substr(begin + 1, end - begin - 1));
        std::string place = format("line %zu", ++line_number);
        size_t space = line.find(' ');
        if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos)
            refuse(place, "is not two tokens with a space between them");
        std::string left = line.substr(0, space), right = line.substr(space + 1), bytes;
        if (!alphabet.read(left + right, bytes))
            refuse(place, "is not spelt in byte-level characters");
        if (tokenizer.vocab_size() + 2 > kMaxVocabulary)
            refuse(place, format("makes more than %d tokens", kMaxVocabulary));
        if (!id_of.try_emplace(left + right, tokenizer.vocab_size()).second)
            refuse(place, "makes the token " + quoted(left + right) + " a second time");
        tokenizer.add_token(bytes);
        read_merge(left, right, place);
        begin = end;
    }
    tokenizer.add_end_of_text();
}

inline Tokenizer Tokenizer::load(const std::string& path) {
    std::string file_path = path;
    std::error_code ignored;
    if (fs::is_directory(path, ignored)) {
        file_path = path + "/tokenizer.json";
        if (!fs::exists(file_path, ignored))
            fail_input("%s: the folder holds no tokenizer.json", path.c_str());
    }
    MappedFile file(file_path);
    TokenizerReader reader{file_path, {}, {}, {}};
    std::string_view text = file.view();
    size_t first = text.find_first_not_of(" \t\r\n");
    if (text.starts_with("#version")) reader.read_merges_file(text);
    else if (first != std::string_view::npos && text[first] == '{') reader.read_json(text);
    else
        fail_input("%s: neither a tokenizer.json nor GPT-2 merges (first line `#version`)",
                   file_path.c_str());
    return std::move(reader.tokenizer);
}
