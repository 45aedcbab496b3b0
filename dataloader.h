// Tokens to batches: where training and evaluation data comes from.
//
// Text is tokenized once into a shard, a flat file of token ids; shards are memory-mapped and
// checked when they are opened, so that nothing can go wrong in the middle of a run. DataLoader
// deals windows of them, the same sequence of windows however they are spread over ranks and
// micro-batches, from a position that two numbers describe; PrefetchLoader has a thread do so while
// the step before runs. EvalLoader goes through a set in order and predicts every token once.
#pragma once

#include <glob.h>

#include <algorithm>
#include <bit>
#include <cassert>
#include <cctype>
#include <climits>
#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "files.h"
#include "tokenizer.h"

static_assert(std::endian::native == std::endian::little,
              "shards and .npy files are read in place");

constexpr int kIgnore = -1;  // a target that takes no part in the loss

// ==== .npy files =================================================================================

// An array of integers as NumPy saves it; values are in C order (the last index runs fastest).
struct NpyArray {
    std::vector<size_t> shape;
    std::vector<int> values;
};

// What the header of a .npy file says: items of `width` bytes, `count` of them from byte `offset`
// to the end.
struct NpyHeader {
    std::vector<size_t> shape;
    size_t width = 0, count = 1, offset = 0;
    bool is_signed = false;
};

// Reads the Python dictionary at the head of a .npy file: {'descr': '<i4', 'fortran_order': False,
// 'shape': (2, 3), }, its three keys in any order and each exactly once. `base` is the byte of the
// file at which the text begins, for messages.
class NpyHeaderParser {
  public:
    NpyHeaderParser(std::string_view text, size_t base, const std::string& path)
        : text_(text), base_(base), path_(path) {}

    NpyHeader parse() {
        NpyHeader header;
        int keys_seen = 0;
        expect('{');
        while (!accept('}')) {
            std::string_view key = quoted();
            expect(':');
            if (key == "descr") keys_seen += 1, item_type(quoted(), &header);
            else if (key == "fortran_order") keys_seen += 10, c_order();
            else if (key == "shape") keys_seen += 100, read_shape(&header);
            else fail("an unknown key");
            if (!accept(',') && peek() != '}') fail("',' or '}' expected");
        }
        if (keys_seen != 111) fail("'descr', 'fortran_order' and 'shape' are expected once each");
        while (at_ < text_.size() && isspace(static_cast<unsigned char>(text_[at_]))) at_++;
        if (at_ != text_.size()) fail("something follows the dictionary");
        return header;
    }

  private:
    [[noreturn]] void fail(const char* what) const {
        fail_input("%s: byte %zu: not a NumPy header: %s", path_.c_str(), base_ + at_, what);
    }
    char peek() {
        while (at_ < text_.size() && text_[at_] == ' ') at_++;
        return at_ < text_.size() ? text_[at_] : '\0';
    }
    bool accept(char c) {
        if (peek() != c || at_ == text_.size()) return false;
        at_++;
        return true;
    }
    void expect(char c) {
        if (!accept(c)) fail(format("'%c' expected", c).c_str());
    }
    std::string_view quoted() {
        char quote = peek();
        if (quote != '\'' && quote != '"') fail("a quoted string expected");
        size_t begin = ++at_;
        at_ = std::min(text_.find(quote, begin), text_.size());
        if (at_ == text_.size()) fail("a string without an end");
        return text_.substr(begin, at_++ - begin);
    }
    void item_type(std::string_view type, NpyHeader* header) {
        header->is_signed = type == "<i4" || type == "<i8";
        if (type == "<u2") header->width = 2;
        else if (type == "<i4" || type == "<u4") header->width = 4;
        else if (type == "<i8") header->width = 8;
        else
            fail_input(
                "%s: byte %zu: items are neither <i4 nor <i8 nor <u2 nor <u4; save the array with "
                ".astype('<i4')",
                path_.c_str(), base_ + at_);
    }
    void c_order() {
        peek();
        if (text_.substr(at_, 4) == "True")
            fail_input("%s: byte %zu: Fortran order; save numpy.ascontiguousarray of it",
                       path_.c_str(), base_ + at_);
        if (text_.substr(at_, 5) != "False") fail("True or False expected");
        at_ += 5;
    }
    size_t number() {
        if (!isdigit(static_cast<unsigned char>(peek()))) fail("a number expected");
        size_t value = 0;
        for (; at_ < text_.size() && isdigit(static_cast<unsigned char>(text_[at_])); at_++)
            if (__builtin_mul_overflow(value, size_t(10), &value) ||
                __builtin_add_overflow(value, size_t(text_[at_] - '0'), &value))
                fail("a number too large");
        return value;
    }
    void read_shape(NpyHeader* header) {
        expect('(');
        while (!accept(')')) {
            header->shape.push_back(number());
            if (__builtin_mul_overflow(header->count, header->shape.back(), &header->count))
                fail("a shape too large");
            if (!accept(',') && peek() != ')') fail("',' or ')' expected");
        }
    }

    std::string_view text_;
    size_t base_, at_ = 0;
    const std::string& path_;
};

constexpr std::string_view kNpyMagic = "\x93NUMPY";

// Checks the header of a mapped .npy file, format versions 1 to 3, against the size of the file.
// Anything that is not a whole C-ordered array of a type that we read is fail_input.
inline NpyHeader read_npy_header(const MappedFile& file) {
    const char* path = file.path().c_str();
    std::string_view bytes = file.view();
    if (bytes.substr(0, kNpyMagic.size()) != kNpyMagic)
        fail_input("%s: byte 0: not a NumPy .npy file", path);
    if (bytes.size() < 12) fail_input("%s: %zu bytes, cut short in its header", path, bytes.size());
    int version = static_cast<unsigned char>(bytes[6]);
    if (version < 1 || version > 3 || bytes[7] != 0)
        fail_input("%s: byte 6: .npy version %d.%d; 1.0, 2.0 and 3.0 are known", path, version,
                   static_cast<unsigned char>(bytes[7]));
    uint32_t length = 0;
    size_t length_bytes = version == 1 ? 2 : 4, begin = 8 + length_bytes;
    memcpy(&length, bytes.data() + 8, length_bytes);
    if (length > bytes.size() - begin)
        fail_input("%s: byte 8: the header is said to take %u bytes, the file has %zu more", path,
                   length, bytes.size() - begin);
    NpyHeader header = NpyHeaderParser(bytes.substr(begin, length), begin, file.path()).parse();
    header.offset = begin + length;
    size_t held = bytes.size() - header.offset, expected = 0;
    if (__builtin_mul_overflow(header.count, header.width, &expected) || held != expected)
        fail_input(
            "%s: byte %zu: the shape needs %zu items of %zu bytes, the file has %zu bytes for them",
            path, header.offset, header.count, header.width, held);
    return header;
}

// Reads integers of type <i4, <i8, <u2 or <u4; a value that is no int32 is fail_input, as is a
// damaged file.
inline NpyArray read_npy(const std::string& path) {
    MappedFile file(path);
    NpyHeader header = read_npy_header(file);
    NpyArray array{header.shape, std::vector<int>(header.count)};
    const char* items = file.data() + header.offset;
    for (size_t i = 0; i < header.count; i++) {
        int64_t value = 0;
        memcpy(&value, items + i * header.width, header.width);
        if (header.width == 4 && header.is_signed) value = int32_t(value);
        if (value < INT_MIN || value > INT_MAX)
            fail_input("%s: byte %zu: %lld is not a 32-bit integer", path.c_str(),
                       header.offset + i * header.width, static_cast<long long>(value));
        array.values[i] = int(value);
    }
    return array;
}

// Writes values as little-endian int32 in C order, atomically. The product of `shape` is
// values.size().
inline void write_npy(const std::string& path, const std::vector<int>& values,
                      const std::vector<size_t>& shape) {
    std::string header = "{'descr': '<i4', 'fortran_order': False, 'shape': (";
    [[maybe_unused]] size_t count = 1;
    for (size_t i = 0; i < shape.size(); i++) {
        count *= shape[i];
        header += format(i == 0 ? "%zu," : i + 1 < shape.size() ? " %zu," : " %zu", shape[i]);
    }
    assert(count == values.size());
    header += "), }";
    constexpr size_t kPrefix = 10,
                     kAlignment = 64;  // NumPy aligns the data, so that it can be mapped
    header.append(kAlignment - (kPrefix + header.size() + 1) % kAlignment, ' ');
    header += '\n';
    assert(header.size() <= UINT16_MAX);
    uint16_t length = uint16_t(header.size());

    AtomicFile file(path);
    file.write(kNpyMagic.data(), kNpyMagic.size());
    file.write("\x01\x00", 2);
    file.write(&length, sizeof length);
    file.write(header.data(), header.size());
    file.write(values.data(), values.size() * sizeof values[0]);
    file.commit();
}

// ==== nanoGPT's meta.pkl =========================================================================

// What meta.pkl says that nanoGPT's character data sets have beside their tokens.
struct NanoMeta {
    int vocab_size = 0;
    std::vector<std::string> tokens;  // the text of each id, if the file has itos
};

// Reads the pickle of {'vocab_size': 65, 'itos': {0: '\n', ...}, 'stoi': {'\n': 0, ...}}, protocols
// 2 to 5 (Python's pickletools describes the opcodes). Only what builds dictionaries of strings
// and integers is known: nothing in it can be called, and whatever else stands there is fail_input.
class NanoMetaReader {
  public:
    explicit NanoMetaReader(const std::string& path) : file_(path), text_(file_.view()) {}

    NanoMeta read() {
        constexpr size_t kMost = 1 << 24;
        if (text_.size() > kMost) fail("larger than any vocabulary");
        while (!done_) step();
        if (at_ != text_.size()) fail("something follows the end of the pickle");
        if (stack_.size() != 1 || stack_[0].kind != Value::dict) fail("it is no dictionary");
        return meta_of(stack_[0].items);
    }

  private:
    struct Value {
        enum Kind { number, string, dict, mark } kind;
        int64_t value = 0;
        std::string text = {};
        std::vector<Value> items = {};  // of a dictionary: key, value, key, value, ...
        bool nested = false;            // a dictionary that holds one
    };

    [[noreturn]] void fail(const char* what) const {
        fail_input(
            "%s: byte %zu: not a meta.pkl of nanoGPT's: %s; remove it, and say what the "
            "tokens are with --raw-tokens uint16",
            file_.path().c_str(), begin_, what);
    }
    std::string_view take(size_t count) {
        if (count > text_.size() - at_) fail("it is cut short");
        at_ += count;
        return text_.substr(at_ - count, count);
    }
    // A little-endian integer of so many bytes, at most 8.
    uint64_t take_number(size_t bytes) {
        uint64_t value = 0;
        memcpy(&value, take(bytes).data(), bytes);
        return value;
    }
    void push(Value value) {
        constexpr size_t kMost = 1 << 19;  // of 65,536 tokens in two dictionaries, twice over
        if (++pushed_ > kMost) fail("more than any vocabulary takes");
        stack_.push_back(std::move(value));
    }
    void push_number(int64_t value) { push({Value::number, value}); }
    void push_string(size_t size) {
        if (size > 256) fail("a token longer than 256 bytes");
        push({Value::string, 0, std::string(take(size))});
    }

    void remember(uint64_t slot) {
        if (stack_.empty() || stack_.back().kind == Value::mark) fail("nothing to remember");
        if (slot != memo_.size()) fail("its memory is out of order");
        // A dictionary is not looked up again; it would not be the one that is filled meanwhile.
        bool whole = stack_.back().kind == Value::string || stack_.back().kind == Value::number;
        memo_.push_back(whole ? stack_.back() : Value{Value::mark});
    }
    void recall(uint64_t slot) {
        if (slot >= memo_.size() || memo_[slot].kind == Value::mark) fail("nothing to recall");
        push(memo_[slot]);
    }
    // Moves what stands from `begin` on into the dictionary below, which is `below` values deeper.
    void set_items(size_t begin, size_t below) {
        if (begin < below || (stack_.size() - begin) % 2 != 0) fail("a key without its value");
        Value& to = stack_[begin - below];
        if (to.kind != Value::dict) fail("items of no dictionary");
        for (size_t i = begin; i < stack_.size(); i++) {
            Value::Kind kind = stack_[i].kind;
            bool is_key = (i - begin) % 2 == 0;
            if (kind == Value::mark || (is_key && kind == Value::dict)) fail("no such key");
            if (stack_[i].nested) fail("dictionaries three deep");
            if (kind == Value::dict) to.nested = true;
            to.items.push_back(std::move(stack_[i]));
        }
        stack_.resize(begin - below + 1);
    }
    void step() {
        begin_ = at_;
        switch (uint8_t(take(1)[0])) {
            case 0x80: {  // PROTO
                uint64_t protocol = take_number(1);
                if (begin_ != 0 || protocol < 2 || protocol > 5) fail("its protocol is not 2 to 5");
                return;
            }
            case 0x95:
                return void(take(8));  // FRAME
            case '}':
                return push({Value::dict});  // EMPTY_DICT
            case '(':
                return push({Value::mark});  // MARK
            case 'K':
                return push_number(int64_t(take_number(1)));  // BININT1
            case 'M':
                return push_number(int64_t(take_number(2)));  // BININT2
            case 'J':
                return push_number(int32_t(take_number(4)));  // BININT
            case 0x8c:
                return push_string(take_number(1));  // SHORT_BINUNICODE
            case 'X':
                return push_string(take_number(4));  // BINUNICODE
            case 0x94:
                return remember(memo_.size());  // MEMOIZE
            case 'q':
                return remember(take_number(1));  // BINPUT
            case 'r':
                return remember(take_number(4));  // LONG_BINPUT
            case 'h':
                return recall(take_number(1));  // BINGET
            case 'j':
                return recall(take_number(4));  // LONG_BINGET
            case 's':
                return set_items(stack_.size() < 2 ? 0 : stack_.size() - 2, 1);  // SETITEM
            case 'u': {                                                          // SETITEMS
                size_t mark = stack_.size();
                while (mark > 0 && stack_[mark - 1].kind != Value::mark) mark--;
                if (mark == 0) fail("items without a mark");
                return set_items(mark, 2);
            }
            case '.':
                done_ = true;
                return;  // STOP
        }
        fail("it holds more than strings, integers and dictionaries");
    }

    NanoMeta meta_of(const std::vector<Value>& items) {
        NanoMeta meta;
        const Value *size = nullptr, *itos = nullptr, *stoi = nullptr;
        for (size_t i = 0; i < items.size(); i += 2) {
            const Value*& to = items[i].text == "vocab_size" ? size
                               : items[i].text == "itos"     ? itos
                                                             : stoi;
            if (items[i].kind != Value::string || (&to == &stoi && items[i].text != "stoi"))
                fail("a key that is none of vocab_size, itos and stoi");
            if (to != nullptr) fail("a key that is there twice");
            to = &items[i + 1];
        }
        constexpr int kMost = 1 << 16;
        if (size == nullptr || size->kind != Value::number || size->value < 1 ||
            size->value > kMost)
            fail("it has no vocab_size from 1 to 65536");
        meta.vocab_size = int(size->value);
        if (itos != nullptr) meta.tokens = tokens_of(*itos, meta.vocab_size);
        if (stoi != nullptr) check_ids(*stoi, meta);
        return meta;
    }
    std::vector<std::string> tokens_of(const Value& itos, int vocab_size) {
        if (itos.kind != Value::dict || itos.items.size() != 2 * size_t(vocab_size))
            fail("itos does not have vocab_size entries");
        std::vector<std::string> tokens(static_cast<size_t>(vocab_size));
        for (size_t i = 0; i < itos.items.size(); i += 2) {
            const Value &id = itos.items[i], &text = itos.items[i + 1];
            bool fits = id.kind == Value::number && id.value >= 0 && id.value < vocab_size &&
                        text.kind == Value::string && !text.text.empty();
            if (!fits || !tokens[size_t(id.value)].empty()) fail("itos has an entry that is wrong");
            tokens[size_t(id.value)] = text.text;
        }
        return tokens;
    }
    void check_ids(const Value& stoi, const NanoMeta& meta) {
        if (stoi.kind != Value::dict || stoi.items.size() != 2 * size_t(meta.vocab_size))
            fail("stoi does not have vocab_size entries");
        for (size_t i = 0; i < stoi.items.size(); i += 2) {
            const Value &text = stoi.items[i], &id = stoi.items[i + 1];
            bool fits = text.kind == Value::string && id.kind == Value::number && id.value >= 0 &&
                        id.value < meta.vocab_size;
            if (fits && !meta.tokens.empty()) fits = meta.tokens[size_t(id.value)] == text.text;
            if (!fits) fail("stoi has an entry that does not fit itos or vocab_size");
        }
    }

    MappedFile file_;
    std::string_view text_;
    size_t at_ = 0, begin_ = 0, pushed_ = 0;  // begin_: of the opcode
    bool done_ = false;
    std::vector<Value> stack_, memo_;
};

// ==== shards =====================================================================================

// llm.c's data files: a header of 256 int32 (magic, version, number of ids, then zeros), and the
// ids: of the first kind as uint16, as its GPT-2 data has them, of the second, which it has for the
// larger vocabulary of Llama 3, as uint32.
constexpr int32_t kShardMagic = 20240520, kWideShardMagic = 20240801;
constexpr int32_t kShardVersion = 1, kWideShardVersion = 7;
constexpr size_t kShardHeaderInts = 256;
constexpr size_t kShardHeaderBytes = kShardHeaderInts * sizeof(int32_t);

// Writes a shard id by id, so that it need not fit into memory. `width` is the bytes of an id: 2
// writes the first format, 4 the second. commit() makes the file appear, whole, under its name; no
// ids, an id that does not fit the width, and more ids than the header can count are fail_input.
// With `checksummed`, words 3 and 4 of the header hold the xxHash of the ids, which other readers
// of the format pass over.
class ShardWriter {
  public:
    ShardWriter(const std::string& path, int width, bool checksummed)
        : path_(path), width_(width), checksummed_(checksummed), file_(path) {
        assert(width == 2 || width == 4);
        char header[kShardHeaderBytes] = {};
        file_.write(header, sizeof header);
    }

    void add(const int* ids, size_t count) {
        if (count > size_t(INT32_MAX) - count_)
            fail_input("%s: %zu tokens; a shard holds at most %d", path_.c_str(), count_ + count,
                       INT32_MAX);
        constexpr size_t kBlock = 1 << 14;
        for (; count > 0; ids += std::min(count, kBlock), count -= std::min(count, kBlock)) {
            if (width_ == 2) add_block<uint16_t>(ids, std::min(count, kBlock));
            else add_block<uint32_t>(ids, std::min(count, kBlock));
        }
    }

    size_t size() const { return count_; }
    int largest() const { return largest_; }               // id; -1: there is none
    uint64_t hash() const { return hash_.digest().hash; }  // of the ids so far

    void commit() {
        if (count_ == 0) fail_input("%s: there are no tokens to write", path_.c_str());
        int32_t header[5] = {width_ == 2 ? kShardMagic : kWideShardMagic,
                             width_ == 2 ? kShardVersion : kWideShardVersion, int32_t(count_)};
        uint64_t checksum = checksummed_ ? hash() : 0;
        memcpy(&header[3], &checksum, sizeof checksum);
        file_.rewrite(header, sizeof header, 0);
        file_.commit();
    }

  private:
    template <typename T>
    void add_block(const int* ids, size_t count) {
        constexpr int kLast = sizeof(T) == 2 ? UINT16_MAX : INT_MAX;
        items_.resize(count * sizeof(T));
        for (size_t i = 0; i < count; i++) {
            if (ids[i] < 0 || ids[i] > kLast)
                fail_input("%s: token %zu has id %d; a shard holds ids from 0 to %d", path_.c_str(),
                           count_ + i, ids[i], kLast);
            largest_ = std::max(largest_, ids[i]);
            T item = T(ids[i]);
            memcpy(items_.data() + i * sizeof(T), &item, sizeof(T));
        }
        hash_.add(items_.data(), items_.size());
        file_.write(items_.data(), items_.size());
        count_ += count;
    }

    std::string path_;
    int width_;
    bool checksummed_;
    AtomicFile file_;
    StreamingHash hash_;
    std::vector<char> items_;
    size_t count_ = 0;
    int largest_ = -1;
};

// The bytes of an id in a shard of so large a vocabulary.
inline int shard_width(int vocab_size) { return vocab_size <= UINT16_MAX + 1 ? 2 : 4; }

// Writes a shard of the ids in one go; see ShardWriter.
inline void write_shard(const std::string& path, const std::vector<int>& ids,
                        bool checksummed = false, int width = 2) {
    if (ids.empty()) fail_input("%s: there are no tokens to write", path.c_str());
    ShardWriter writer(path, width, checksummed);
    writer.add(ids.data(), ids.size());
    writer.commit();
}

// How to read a .bin file that begins with no magic number: no such file is read unless something
// says that it is one.
enum class RawTokens { no, uint16, uint32 };
inline RawTokens raw_tokens(const std::string& name) {
    return name == "uint16"   ? RawTokens::uint16
           : name == "uint32" ? RawTokens::uint32
                              : RawTokens::no;
}

// A file of token ids, memory-mapped. What it is follows from its content:
//
// - a shard of llm.c's, with ids of 16 or 32 bits, as ShardWriter writes it;
// - a .npy file of one dimension (uint16, uint32, int32 or int64), as FineWeb-Edu is cut into;
// - a `.bin` of ids and nothing else, as nanoGPT writes it. Nothing in such a file says so: it is
//   read as that only with `raw`, or where a meta.pkl of nanoGPT's lies beside it, whose vocabulary
//   then bounds the ids. One whose third word counts its ids is refused all the same: it is a shard
//   whose magic is damaged.
//
// Magic, version, that the size is exactly what the header says, the ids, and their hash where the
// header has one are checked when it is opened, and fail_input says what is wrong: file, byte,
// remedy. Of a file with more than kReadWhole ids, which would take long to read, parts that are
// spread over it are looked at, so that what another tokenizer made is found at once; copy() looks
// at every id again and fails with the same line, before a model can see it, and verify() reads
// all. Copies and slices share the mapping.
class Shard {
  public:
    static constexpr size_t kReadWhole = 1 << 24;

    Shard(const std::string& path, int vocab_size, RawTokens raw = RawTokens::no)
        : file_(std::make_shared<const MappedFile>(path)), vocab_size_(vocab_size) {
        assert(vocab_size > 0);
        if (file_->view().substr(0, kNpyMagic.size()) == kNpyMagic) open_npy();
        else if (is_raw(&raw)) open_raw(raw);
        else open_shard();
        if (count_ == 0) fail_input("%s: holds no tokens", path.c_str());
        // Windows come in any order: what is read around them would push out what was read before
        // where memory cannot hold the file.
        constexpr size_t kLarge = 1 << 28;
        if (file_->size() > kLarge && file_->size() > machine_memory_free() / 2)
            file_->advise(0, file_->size(), MADV_RANDOM);
        check_ids();
    }

    size_t size() const { return count_; }
    const std::string& path() const { return file_->path(); }
    const MappedFile& file() const { return *file_; }
    const char* format_name() const { return format_name_; }
    int operator[](size_t i) const {
        int id;
        copy(i, 1, &id);
        return id;
    }

    // Writes ids [begin, begin + count) to out (count). One that is not below the vocabulary is
    // fail_input.
    void copy(size_t begin, size_t count, int* out) const {
        assert(begin <= count_ && count <= count_ - begin);
        if (width_ == 2) copy_as<uint16_t>(begin, count, out);
        else if (width_ == 4) copy_as<uint32_t>(begin, count, out);
        else copy_as<uint64_t>(begin, count, out);
    }

    // Asks the kernel to read ids [begin, begin + count) ahead; returns at once.
    void will_need(size_t begin, size_t count) const {
        assert(begin <= count_ && count <= count_ - begin);
        file_->advise(size_t(ids_ - file_->data()) + begin * width_, count * width_, MADV_WILLNEED);
    }

    // Ids [begin, end) as a shard of their own; end - begin is at least 1.
    Shard slice(size_t begin, size_t end) const {
        assert(begin < end && end <= count_);
        Shard part = *this;
        part.ids_ = ids_ + begin * width_;
        part.count_ = end - begin;
        part.checksum_ = 0;
        return part;
    }

    // xxHash of the ids as the file holds them; reads the whole file.
    uint64_t hash() const { return hash_bytes(ids_, count_ * width_); }

    // Reads everything that opening a large file left out, and fails as opening does.
    void verify() const {
        for (size_t begin = 0; begin < count_; begin += kBlock) check_block(begin);
        check_hash();
    }

    // What a checksummed shard says that hash() is; 0 in others.
    uint64_t checksum() const { return checksum_; }

    // What tells the shard from others: what it says that its hash is, or else its hash.
    uint64_t identity() const { return checksum_ != 0 ? checksum_ : hash(); }

  private:
    static constexpr size_t kBlock = 4096;

    template <typename T>
    static T load(const char* at) {
        T value;  // a .npy file may hold its items at any address
        memcpy(&value, at, sizeof value);
        return value;
    }
    // T is unsigned, so that a negative id is past every vocabulary too. The maximum comes first: a
    // loop without branches, which compilers vectorise.
    template <typename T>
    void copy_as(size_t begin, size_t count, int* out) const {
        const char* from = ids_ + begin * sizeof(T);
        T largest = 0;
        for (size_t i = 0; i < count; i++) {
            T item = load<T>(from + i * sizeof(T));
            largest = std::max(largest, item);
            out[i] = int(item);
        }
        if (uint64_t(largest) >= uint64_t(vocab_size_)) fail_id<T>(begin);
    }
    template <typename T>
    void check_block(size_t begin, size_t count) const {
        T largest = 0;
        for (size_t i = begin; i < begin + count; i++)
            largest = std::max(largest, load<T>(ids_ + i * sizeof(T)));
        if (uint64_t(largest) >= uint64_t(vocab_size_)) fail_id<T>(begin);
    }
    // The first id from `begin` on that is past the vocabulary; there is one.
    template <typename T>
    [[noreturn]] void fail_id(size_t begin) const {
        size_t i = begin;
        while (uint64_t(load<T>(ids_ + i * sizeof(T))) < uint64_t(vocab_size_)) i++;
        T item = load<T>(ids_ + i * sizeof(T));
        auto id = is_signed_ ? int64_t(std::make_signed_t<T>(item)) : int64_t(item);
        fail_input(
            "%s: byte %zu: token id %lld, the vocabulary has %d; was it made with another "
            "tokenizer?",
            path().c_str(), size_t(ids_ - file_->data()) + i * sizeof(T),
            static_cast<long long>(id), vocab_size_);
    }
    void check_block(size_t begin) const {
        size_t count = std::min(kBlock, count_ - begin);
        if (width_ == 2) check_block<uint16_t>(begin, count);
        else if (width_ == 4) check_block<uint32_t>(begin, count);
        else check_block<uint64_t>(begin, count);
    }
    void check_ids() const {
        constexpr size_t kProbes = 64;
        if (count_ <= kReadWhole) return verify();
        size_t last = count_ - kBlock;
        for (size_t i = 0; i < kProbes; i++) check_block(last * i / (kProbes - 1));
    }
    void check_hash() const {
        if (checksum_ != 0 && checksum_ != hash())
            fail_input(
                "%s: byte 12: the ids do not match the hash in the header; make or fetch it "
                "again",
                path().c_str());
    }

    int32_t word(size_t i) const { return load<int32_t>(file_->data() + i * sizeof(int32_t)); }

    // Whether this is to be read as ids and nothing else; *raw then says of what width.
    bool is_raw(RawTokens* raw) {
        size_t size = file_->size();
        if (size >= 4 && (word(0) == kShardMagic || word(0) == kWideShardMagic)) return false;
        fs::path meta = fs::path(path()).parent_path() / "meta.pkl";
        std::error_code ignored;
        bool beside = fs::path(path()).extension() == ".bin" && fs::exists(meta, ignored);
        if (*raw == RawTokens::no && !beside) return false;
        if (size >= kShardHeaderBytes && word(2) > 0) {
            size_t held = size - kShardHeaderBytes, count = size_t(word(2));
            if (held == 2 * count || held == 4 * count) return false;
        }
        if (*raw != RawTokens::no) return true;
        *raw = RawTokens::uint16;
        int vocab_size = NanoMetaReader(meta.string()).read().vocab_size;
        if (vocab_size > vocab_size_)
            fail_input("%s: a vocabulary of %d for the tokens beside it, the model's has %d",
                       meta.c_str(), vocab_size, vocab_size_);
        vocab_size_ = vocab_size;
        return true;
    }

    void open_raw(RawTokens raw) {
        width_ = raw == RawTokens::uint16 ? 2 : 4;
        format_name_ = width_ == 2 ? "raw uint16" : "raw uint32";
        if (file_->size() % width_ != 0)
            fail_input("%s: %zu bytes are no whole number of ids of %zu bytes; fetch it again",
                       path().c_str(), file_->size(), width_);
        ids_ = file_->data();
        count_ = file_->size() / width_;
    }

    void open_shard() {
        const char* path = file_->path().c_str();
        if (file_->size() < kShardHeaderBytes)
            fail_input("%s: %zu bytes; a token shard begins with a header of %zu", path,
                       file_->size(), kShardHeaderBytes);
        int32_t magic = word(0), version = word(1), count = word(2);
        if (magic != kShardMagic && magic != kWideShardMagic)
            fail_input(
                "%s: byte 0: magic is %d; a token shard has %d or %d; for ids without a "
                "header use --raw-tokens",
                path, magic, kShardMagic, kWideShardMagic);
        bool wide = magic == kWideShardMagic;
        int32_t known = wide ? kWideShardVersion : kShardVersion;
        if (version != known)
            fail_input("%s: byte 4: version %d; with magic %d only %d is known; fetch it again",
                       path, version, magic, known);
        width_ = wide ? 4 : 2;
        size_t held = file_->size() - kShardHeaderBytes, rest = held % width_;
        if (count < 0 || rest != 0 || held / width_ != size_t(count))
            fail_input(
                "%s: byte 8: header says %d tokens, the file holds %zu%s; fetch it again", path,
                count, held / width_,
                rest == 0 ? "" : format(" and %zu byte%s", rest, rest > 1 ? "s" : "").c_str());
        for (size_t i = 5; i < kShardHeaderInts; i++)
            if (word(i) != 0)
                fail_input("%s: byte %zu: %d where the header has 0; fetch it again", path, 4 * i,
                           word(i));
        checksum_ = load<uint64_t>(file_->data() + 12);
        ids_ = file_->data() + kShardHeaderBytes;
        count_ = size_t(count);
        format_name_ = wide ? "uint32" : "uint16";
    }

    void open_npy() {
        NpyHeader header = read_npy_header(*file_);
        if (header.shape.size() != 1)
            fail_input("%s: an array of %zu dimensions; token ids have one: save its .ravel()",
                       path().c_str(), header.shape.size());
        ids_ = file_->data() + header.offset;
        count_ = header.count;
        width_ = header.width;
        is_signed_ = header.is_signed;
        format_name_ = width_ == 2   ? ".npy of uint16"
                       : width_ == 8 ? ".npy of int64"
                       : is_signed_  ? ".npy of int32"
                                     : ".npy of uint32";
    }

    std::shared_ptr<const MappedFile> file_;
    const char* format_name_ = "";
    const char* ids_ = nullptr;  // inside the mapping
    size_t count_ = 0, width_ = 2;
    int vocab_size_;
    bool is_signed_ = false;
    uint64_t checksum_ = 0;
};

// Whether a file is to be opened as a Shard: its content begins like one, or its name ends in .bin
// or .npy (a damaged shard must be refused as a shard, not be read as text).
inline bool is_shard(const std::string& path) {
    std::string extension = fs::path(path).extension().string();
    if (extension == ".bin" || extension == ".npy") return true;
    MappedFile file(path);
    for (const int32_t& magic : {kShardMagic, kWideShardMagic})
        if (file.view().starts_with(std::string_view(reinterpret_cast<const char*>(&magic), 4)))
            return true;
    return file.view().starts_with(kNpyMagic);
}

// The tokenizer of nanoGPT's character data: from the meta.pkl beside one of its files, where its
// tokens are characters in the order of our own; <|endoftext|> comes behind them.
inline std::optional<Tokenizer> tokenizer_beside(const std::string& path) {
    std::string meta = (fs::path(path).parent_path() / "meta.pkl").string(), text;
    std::error_code ignored;
    if (fs::path(path).extension() != ".bin" || !fs::exists(meta, ignored)) return {};
    std::vector<std::string> tokens = NanoMetaReader(meta).read().tokens;
    for (const std::string& token : tokens) text += token;
    if (text.empty()) return {};
    Tokenizer tokenizer = Tokenizer::chars(text);
    if (size_t(tokenizer.vocab_size()) != tokens.size() + 1) return {};
    for (size_t id = 0; id < tokens.size(); id++)
        if (tokenizer.token_bytes(int(id)) != tokens[id]) return {};
    return tokenizer;
}

// ==== paths ======================================================================================

// Whether the name is that of text which is packed; of archives of many files it is not.
inline bool is_packed_text(const fs::path& path) {
    std::string extension = path.extension().string();
    if (extension == ".parquet") return true;  // to be refused by name, and not to be passed over
    return (extension == ".gz" || extension == ".zst") && path.stem().extension() != ".tar";
}

// A folder that `shard` made holds a training and a validation part.
enum class ShardPart { train, val };

// Adds the shards of one part that the manifest of a folder lists, which `shard` has written there.
// False where it has no such manifest; a folder that is not finished is fail_input.
inline bool add_manifest_shards(const std::string& folder, ShardPart part,
                                std::vector<std::string>* files) {
    std::error_code ignored;
    std::string manifest = (fs::path(folder) / "manifest.json").string();
    const char* name = folder.c_str();
    bool there = fs::exists(manifest, ignored);
    if (!there && fs::exists(fs::path(folder) / "progress.json", ignored) &&
        fs::exists(fs::path(folder) / "train_000000.bin", ignored))
        fail_input("%s: these shards are not finished; give the command that makes them again",
                   name);
    if (!there) return false;
    json root = json::parse(read_file(manifest), nullptr, false);
    if (!root.is_object() || root.value("format", json()) != "llm.c token shards") return false;
    json list = root.value(part == ShardPart::train ? "train" : "val", json());
    if (!list.is_array()) fail_input("%s: lists no shards; make them again", manifest.c_str());
    for (const json& entry : list) {
        json file = entry.is_object() ? entry.value("file", json()) : json();
        bool plain = file.is_string() && file.get<std::string>().find('/') == std::string::npos;
        if (!plain) fail_input("%s: lists what is no file; make it again", manifest.c_str());
        files->push_back((fs::path(folder) / file.get<std::string>()).string());
    }
    if (list.empty())
        fail_input("%s: has no %s part; make it with another --val-fraction", name,
                   part == ShardPart::train ? "training" : "validation");
    return true;
}

// Adds the files of a folder and of the folders in it, sorted by path. Hidden ones are left out,
// and so are binaries: files that are no shards, nor packed text, and have a zero byte near their
// beginning.
inline void expand_folder(const std::string& folder, std::vector<std::string>* files) {
    constexpr size_t kLookAt = 8192;
    std::vector<std::string> found;
    size_t binaries = 0;
    try {
        for (auto it = fs::recursive_directory_iterator(folder); it != fs::end(it); ++it) {
            bool hidden = it->path().filename().string().starts_with('.');
            if (hidden) it.disable_recursion_pending();
            if (!hidden && it->is_regular_file()) found.push_back(it->path().string());
        }
    } catch (const fs::filesystem_error& error) {
        fail_machine("%s: cannot read folder: %s", error.path1().c_str(),
                     error.code().message().c_str());
    }
    std::sort(found.begin(), found.end());
    size_t before = files->size();
    for (std::string& path : found) {
        bool binary =
            !is_shard(path) && !is_packed_text(path) &&
            MappedFile(path).view().substr(0, kLookAt).find('\0') != std::string_view::npos;
        if (binary) binaries++;
        else files->push_back(std::move(path));
    }
    if (files->size() == before && binaries > 0)
        fail_input("%s: no text and no shards in this folder, only %zu binary files",
                   folder.c_str(), binaries);
    if (files->size() == before) fail_input("%s: no files in this folder", folder.c_str());
}

// The files that `paths` stand for: a file for itself, a folder that `shard` made for a part of its
// shards, any other for what expand_folder finds in it, a pattern (*.bin) for its matches, sorted.
// What exists under the very name of a pattern is taken as it is. A path or pattern that stands for
// nothing is fail_input.
inline std::vector<std::string> expand_paths(const std::vector<std::string>& paths,
                                             ShardPart part = ShardPart::train) {
    std::vector<std::string> files;
    for (const std::string& path : paths) {
        std::vector<std::string> matches = {path};
        std::error_code error;
        if (!fs::exists(path, error) && path.find_first_of("*?[") != std::string::npos) {
            glob_t found{};
            glob(path.c_str(), GLOB_NOSORT, nullptr, &found);
            matches.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
            globfree(&found);
            std::sort(matches.begin(), matches.end());
            if (matches.empty()) fail_input("%s: no file matches this pattern", path.c_str());
        }
        for (const std::string& match : matches) {
            fs::file_status status = fs::status(match, error);
            if (error == std::errc::permission_denied)
                fail_machine("%s: cannot read: %s", match.c_str(), error.message().c_str());
            if (!fs::exists(status)) fail_input("%s: no such file or folder", match.c_str());
            bool folder = fs::is_directory(status);
            if (folder && add_manifest_shards(match, part, &files)) continue;
            if (folder) expand_folder(match, &files);
            else if (fs::is_regular_file(status)) files.push_back(match);
            else fail_input("%s: neither a file nor a folder", match.c_str());
        }
    }
    return files;
}

// ==== text =======================================================================================

// The bytes of documents, joined (see read_text); document i ends before byte document_ends[i]. No
// document is empty.
struct TextCorpus {
    std::string text;
    std::vector<size_t> document_ends;
    // From which document on they are of which file; none where they are of no file.
    std::vector<std::pair<size_t, std::string>> files = {};

    // For messages: where byte `at` of a document is.
    std::string place(size_t document, size_t at) const {
        size_t next = 0;
        while (next < files.size() && files[next].first <= document) next++;
        std::string text_place = next == 0 ? "the text" : files[next - 1].second;
        size_t first = next == 0 ? 0 : files[next - 1].first;
        size_t last = next < files.size() ? files[next].first : document_ends.size();
        if (last - first > 1) text_place += format(": document %zu", document - first + 1);
        return at == 0 ? text_place : text_place + format(": from byte %zu on", at);
    }
};

// Where the last tenth of a text begins: floor(0.9 * size), moved forward to the beginning of a
// UTF-8 character.
inline size_t validation_start(std::string_view text) {
    size_t start = text.size() / 10 * 9 + text.size() % 10 * 9 / 10;
    for (int step = 0; step < 3 && start < text.size();
         step++) {  // a character has at most 4 bytes
        bool continues = (static_cast<unsigned char>(text[start]) & 0xC0) == 0x80;
        if (!continues) break;
        start++;
    }
    return start;
}

// How many bytes of text each token stands for, by id: its length, and 0 for the end of text, which
// stands between texts. The sum over the predicted targets makes nats a token into bits a byte.
inline std::vector<int> bytes_per_token(const Tokenizer& tokenizer) {
    std::vector<int> bytes(size_t(tokenizer.vocab_size()));
    for (int id = 0; id < tokenizer.vocab_size(); id++)
        bytes[size_t(id)] =
            id == tokenizer.end_of_text() ? 0 : int(tokenizer.token_bytes(id).size());
    return bytes;
}

// Text that was made into a shard: `bytes` of text are in its tokens, less than went in when a
// character vocabulary lacked some.
struct TokenizedText {
    std::string path;
    size_t tokens, bytes;
    bool from_cache;
};

// Encodes bytes [begin, end) of a corpus, document by document. The end of text goes between a
// document and the next one, so after one that ends in the range unless it is the last of the
// corpus.
inline std::vector<int> encode_documents(const TextCorpus& corpus, size_t begin, size_t end,
                                         const Tokenizer& tokenizer) {
    std::vector<int> ids;
    for (size_t i = 0; i < corpus.document_ends.size(); i++) {
        size_t document_begin = i == 0 ? 0 : corpus.document_ends[i - 1];
        size_t document_end = corpus.document_ends[i];
        size_t from = std::max(document_begin, begin), to = std::min(document_end, end);
        if (from >= to) continue;
        with_place(
            [&] { return corpus.place(i, from - document_begin); },
            [&] { tokenizer.encode(std::string_view(corpus.text).substr(from, to - from), ids); });
        bool followed = to == document_end && document_end < corpus.text.size();
        if (followed && tokenizer.end_of_text() >= 0) ids.push_back(tokenizer.end_of_text());
    }
    return ids;
}

// What decides the result of encode_documents, in a number.
inline uint64_t text_key(const TextCorpus& corpus, size_t begin, size_t end,
                         const Tokenizer& tokenizer) {
    const std::vector<size_t>& ends = corpus.document_ends;
    uint64_t range[] = {begin, end, corpus.text.size()};
    uint64_t key = hash_bytes(range, sizeof range, tokenizer.fingerprint());
    key = hash_bytes(ends.data(), ends.size() * sizeof ends[0], key);
    return hash_bytes(corpus.text.data() + begin, end - begin, key);
}

// Makes bytes [begin, end) of a corpus into a shard CACHE_FOLDER/HASH.bin, where HASH is the xxHash
// of those bytes, the bounds of documents and range, and the tokenizer's fingerprint. A shard that
// is there already and whose checksum is right is used as it is; any other is written anew. The
// folder is created. A range without tokens is fail_input, a folder that cannot be written
// fail_machine.
inline TokenizedText tokenize_cached(const TextCorpus& corpus, size_t begin, size_t end,
                                     const Tokenizer& tokenizer, const std::string& cache_folder) {
    assert(begin <= end && end <= corpus.text.size());
    uint64_t key = text_key(corpus, begin, end, tokenizer);
    std::string name = format("%016llx.bin", static_cast<unsigned long long>(key));
    TokenizedText result{(fs::path(cache_folder) / name).string(), 0, 0, false};
    std::vector<int> bytes = bytes_per_token(tokenizer);

    std::error_code ignored;
    if (fs::exists(result.path, ignored)) {
        try {
            Shard shard(result.path, tokenizer.vocab_size());
            result.from_cache = shard.checksum() == shard.hash();
            result.tokens = shard.size();
            for (size_t i = 0; i < shard.size(); i++)
                result.bytes += size_t(bytes[size_t(shard[i])]);
        } catch (const Error&) {
            result.from_cache = false;  // damaged
        }
        if (result.from_cache) return result;
    }

    std::vector<int> ids = encode_documents(corpus, begin, end, tokenizer);
    if (ids.empty())
        fail_input(
            "%s: bytes %zu to %zu of the text hold no tokens of this vocabulary; give more text",
            corpus.files.empty() ? "the text" : corpus.files[0].second.c_str(), begin, end);
    result.tokens = ids.size();
    result.bytes = 0;
    for (int id : ids) result.bytes += size_t(bytes[size_t(id)]);
    make_folder(cache_folder);
    remove_leftovers(cache_folder);
    write_shard(result.path, ids, true, shard_width(tokenizer.vocab_size()));
    return result;
}

// ==== training batches ===========================================================================

// A random order of 0..count-1 that is computed and not stored: order(i) is where the i-th step
// goes. A Feistel network [Luby and Rackoff 1988] permutes the numbers of an even number of bits;
// one that falls outside the range is sent through again until it falls inside, which keeps it a
// permutation ("cycle walking") [Black and Rogaway 2002].
class Permutation {
  public:
    Permutation(uint64_t count, uint64_t key) : count_(count), key_(key) {
        assert(count > 0);
        half_bits_ = std::max(2, (int(std::bit_width(count - 1)) + 1) / 2);
    }

    uint64_t operator()(uint64_t i) const {
        assert(i < count_);
        do i = scramble(i);
        while (i >= count_);
        return i;
    }

  private:
    uint64_t scramble(uint64_t i) const {
        constexpr uint64_t kRounds = 6;
        uint64_t mask = (uint64_t(1) << half_bits_) - 1;
        uint64_t left = i >> half_bits_, right = i & mask;
        for (uint64_t round = 0; round < kRounds; round++) {
            uint64_t words[] = {round, right};
            uint64_t next = left ^ (hash_bytes(words, sizeof words, key_) & mask);
            left = right;
            right = next;
        }
        return left << half_bits_ | right;
    }

    uint64_t count_, key_;
    int half_bits_;
};

// One hash for the data of a run, of those of its shards, by which a resumed run can tell that it
// is the same.
inline uint64_t data_hash(const std::vector<uint64_t>& shard_hashes) {
    uint64_t hash = 0;
    for (uint64_t part : shard_hashes) hash = hash_bytes(&part, sizeof part, hash);
    return hash;
}

// Which windows an epoch is made of.
enum class WindowOrder {
    shuffled,  // one after the other from a random offset, in random order
    sliding,   // one at every stride from the first token of a shard, in random order
    random     // as many as would follow one another, each at a random place
};

struct WindowOptions {
    WindowOrder order = WindowOrder::shuffled;
    size_t stride = 0;   // between sliding windows, 1 to T; 0: T, so that they do not overlap
    int separator = -1;  // the target after an input of this id is kIgnore; below 0: none is
    bool watch = true;   // whether a shard's file must stay as it is while the loader is used
};

// The targets that follow a separator are the first tokens of the next document, and are not to be
// predicted from the one before. inputs, targets (T); targets are changed.
inline void separate_documents(const int* inputs, int* targets, size_t T, int separator) {
    if (separator < 0) return;
    for (size_t t = 0; t < T; t++)
        if (inputs[t] == separator) targets[t] = kIgnore;
}

// What helps where a shard is lost while a run reads it.
constexpr const char* kPutBack =
    "; put it back, and the same command goes on from the last checkpoint";

// Throws with exit code 1 when the file of a shard is no longer what was mapped: shorter, gone, or
// of other content. A file that was touched, or copied to its place anew, is compared in full with
// what was mapped, whose hash was `hash` (0: not known, so that nothing can be compared). Returns
// what the file is known by now.
inline FileIdentity check_unchanged(const Shard& shard, const FileIdentity& known, uint64_t hash) {
    CutWatch watch;  // what it finds cut has another hash
    const char* path = shard.path().c_str();
    struct stat info;
    if (stat(path, &info) != 0)
        fail_machine("%s: %s while the program reads it%s", path,
                     errno == ENOENT ? "was removed" : strerror(errno), kPutBack);
    FileIdentity now(info);
    if (now == known) return now;
    if (now.size != known.size)
        fail_machine("%s: had %llu bytes and has %llu since, while the program reads it%s", path,
                     static_cast<unsigned long long>(known.size),
                     static_cast<unsigned long long>(now.size), kPutBack);
    bool same = hash != 0 && shard.hash() == hash;
    if (same && now.inode != shard.file().identity().inode)
        same = MappedFile(shard.path()).view() == shard.file().view();
    if (!same) fail_machine("%s: was changed while the program reads it%s", path, kPutBack);
    return now;
}

// A window of a shard: ids [begin, begin + count) to inputs, and the ones after each to targets
// (count). What follows a separator is no target. Throws with exit code 1 where the file is cut
// short meanwhile.
inline void copy_window(const Shard& shard, size_t begin, size_t count, int separator, int* inputs,
                        int* targets) {
    CutWatch watch;
    shard.copy(begin, count, inputs);
    shard.copy(begin + 1, count, targets);
    if (watch.cut())
        fail_machine("%s: was cut short while the program reads it%s", shard.path().c_str(),
                     kPutBack);
    separate_documents(inputs, targets, count, separator);
}

// Deals batches of windows, without end. A window is T+1 consecutive tokens of one shard: inputs
// are the first T, targets the last T. In an epoch of the default order the windows of a shard
// follow one another from a random offset below T and share only the token at which they meet; all
// windows of all shards come once, in random order, so that no token is a target twice, and every
// one is but those before the offset and behind the last whole window. Offsets and order are
// functions of seed and epoch alone. The ranks take turns in this one order, B windows each, so B=4
// on one rank, B=2 on two, and four micro-batches of B=1 see the same windows in the same order.
//
// A shard of T tokens or fewer gives no window; if none gives one, construction is fail_input. A
// shard whose file changes or vanishes is an error of exit code 1 in the batch that would read it.
class DataLoader {
  public:
    // What a checkpoint keeps: the epoch, and how many of its windows have been dealt to all ranks.
    struct Position {
        uint64_t epoch = 0, window = 0;
        bool operator==(const Position&) const = default;
    };

    DataLoader(std::vector<Shard> shards, int B, int T, int rank, int world, uint64_t seed,
               const WindowOptions& options = {})
        : shards_(std::move(shards)),
          B_(size_t(B)),
          T_(size_t(T)),
          rank_(size_t(rank)),
          world_(size_t(world)),
          seed_(seed),
          options_(options) {
        assert(world >= 1 && rank >= 0 && rank < world);
        if (B < 1) fail_input("--batch-size %d: must be at least 1", B);
        if (T < 1) fail_input("--sequence-length %d: must be at least 1", T);
        bool sliding = options_.order == WindowOrder::sliding;
        if (options_.stride > 0 && !sliding)
            fail_input("--stride %zu: is for --windows sliding", options_.stride);
        if (options_.stride > T_)
            fail_input(
                "--stride %zu: more than the %zu tokens of a window, so that some would be left "
                "out; give at most %zu",
                options_.stride, T_, T_);
        step_ = options_.stride > 0 ? options_.stride : T_;
        check_long_enough();
        for (const Shard& shard : shards_) identities_.push_back(shard.file().identity());
        watched_.resize(shards_.size());
        begin_epoch(0);
    }

    // Writes the next batch of this rank: inputs (B,T) and targets (B,T). The files that it comes
    // from are looked at before and after: what was read is what they held when the run began.
    void next_batch(int* inputs, int* targets) {
        batch_++;
        for (size_t i = 0; i < B_ * world_; i++) {
            if (i / B_ == rank_) {
                size_t row = i % B_ * T_;
                auto [s, begin] = place(position_.window);
                if (options_.watch && watched_[s] != batch_) look_at(s);
                copy_window(shards_[s], begin, T_, options_.separator, inputs + row, targets + row);
            }
            if (++position_.window == windows_per_epoch()) begin_epoch(position_.epoch + 1);
        }
        for (size_t s = 0; s < shards_.size(); s++)
            if (options_.watch && watched_[s] == batch_) look_at(s);
    }

    Position position() const { return position_; }
    size_t B() const { return B_; }
    size_t T() const { return T_; }

    // Goes on from a saved position, with bits equal to a loader that never stopped. A position
    // that these shards do not have is fail_input.
    void seek(Position position) {
        uint64_t windows = windows_in_epoch(position.epoch);
        if (position.window >= windows)
            fail_input(
                "the run stopped at window %llu of epoch %llu, which has only %llu here; has the "
                "data, the "
                "seed or --sequence-length changed?",
                static_cast<unsigned long long>(position.window),
                static_cast<unsigned long long>(position.epoch),
                static_cast<unsigned long long>(windows));
        begin_epoch(position.epoch);
        position_ = position;
    }

    // The number of windows of an epoch, over all ranks; offsets make it differ by one a shard
    // between epochs.
    size_t windows_in_epoch(uint64_t epoch) const {
        size_t windows = 0;
        for (size_t s = 0; s < shards_.size(); s++)
            windows += windows_of_shard(s, offset(s, epoch));
        return windows;
    }
    size_t windows_per_epoch() const { return first_window_.back(); }  // of the present one

    size_t epoch() const { return size_t(position_.epoch); }
    // Epochs done, with the part of the present one: 1.25 is a quarter into the second.
    double epoch_fraction() const {
        return double(position_.epoch) + double(position_.window) / double(windows_per_epoch());
    }

    size_t total_tokens() const {
        size_t tokens = 0;
        for (const Shard& shard : shards_) tokens += shard.size();
        return tokens;
    }

    // A hash of each shard's tokens; reads those that do not say what it is. It also lets a shard
    // that was touched be told from one that was changed.
    const std::vector<uint64_t>& shard_hashes() {
        if (!hashes_.empty()) return hashes_;
        for (const Shard& shard : shards_) hashes_.push_back(shard.identity());
        return hashes_;
    }

    const std::vector<Shard>& shards() const { return shards_; }

  private:
    struct Place {
        size_t shard, begin;  // the first token
    };

    void check_long_enough() const {
        if (shards_.empty()) fail_input("no training data was given");
        size_t longest = 0;
        for (size_t s = 1; s < shards_.size(); s++)
            if (shards_[s].size() > shards_[longest].size()) longest = s;
        size_t tokens = shards_[longest].size();
        if (tokens > T_) return;
        std::string others = shards_.size() == 1 ? "" : ", the most of the files given,";
        const char* path = shards_[longest].path().c_str();
        if (tokens < 2)
            fail_input("%s: 1 token%s cannot be trained on; give more text", path, others.c_str());
        fail_input(
            "%s: %zu tokens%s are less than a window of %zu + 1; give more text or "
            "--sequence-length %zu",
            path, tokens, others.c_str(), T_, tokens - 1);
    }

    // Random bits for one use (0 is the order of windows, 1 + s the offset of shard s) in one
    // epoch.
    uint64_t draw(uint64_t epoch, uint64_t use) const {
        uint64_t words[] = {epoch, use};
        return hash_bytes(words, sizeof words, seed_);
    }

    // The token at which the first window of shard s begins; at least one window fits behind it
    // where it can.
    size_t offset(size_t s, uint64_t epoch) const {
        size_t tokens = shards_[s].size();
        if (tokens <= T_ || options_.order != WindowOrder::shuffled) return 0;
        return size_t(draw(epoch, 1 + s) % std::min(T_, tokens - T_));
    }

    size_t windows_of_shard(size_t s, size_t offset) const {
        size_t targets = shards_[s].size() - 1 - offset;
        return targets < T_ ? 0 : (targets - T_) / step_ + 1;
    }

    void begin_epoch(uint64_t epoch) {
        position_ = {epoch, 0};
        offset_.clear();
        first_window_ = {0};
        first_start_ = {0};
        for (size_t s = 0; s < shards_.size(); s++) {
            offset_.push_back(offset(s, epoch));
            first_window_.push_back(first_window_.back() + windows_of_shard(s, offset_.back()));
            size_t tokens = shards_[s].size();
            first_start_.push_back(first_start_.back() + (tokens > T_ ? tokens - T_ : 0));
        }
        order_ = Permutation(windows_per_epoch(), draw(epoch, 0));
    }

    // In which range of `firsts` (one more than there are ranges) a number lies.
    static size_t range_of(const std::vector<size_t>& firsts, size_t number) {
        auto next = std::upper_bound(firsts.begin(), firsts.end(), number);
        return size_t(next - firsts.begin()) - 1;
    }

    // Where the window is that comes as the `turn`-th of the present epoch.
    Place place(uint64_t turn) const {
        if (options_.order == WindowOrder::random) {
            uint64_t words[] = {position_.epoch, 0, turn};
            size_t start = hash_bytes(words, sizeof words, seed_) % first_start_.back();
            size_t s = range_of(first_start_, start);
            return {s, start - first_start_[s]};
        }
        size_t window = order_(turn), s = range_of(first_window_, window);
        return {s, offset_[s] + (window - first_window_[s]) * step_};
    }

    // Looks whether the file of shard s is what it was.
    void look_at(size_t s) {
        identities_[s] =
            check_unchanged(shards_[s], identities_[s], hashes_.empty() ? 0 : hashes_[s]);
        watched_[s] = batch_;
    }

    std::vector<Shard> shards_;
    size_t B_, T_, rank_, world_;
    uint64_t seed_;
    WindowOptions options_;
    size_t step_ = 0;  // tokens between the windows of a shard
    Position position_;
    std::vector<size_t> offset_;  // (shards), of the present epoch
    std::vector<size_t>
        first_window_;  // (shards + 1): shard s has windows [first_window_[s], first_window_[s+1])
    std::vector<size_t> first_start_;  // (shards + 1), the same of the tokens where one can begin
    Permutation order_{1, 0};
    std::vector<FileIdentity> identities_;  // (shards), when they were last looked at
    std::vector<uint64_t> hashes_;          // (shards), or none while they are not known
    std::vector<uint64_t> watched_;         // (shards), the batch for which each was looked at
    uint64_t batch_ = 0;
};

// Deals what a DataLoader deals, `batches` of them at a time, made by a thread while the caller
// works with those before. position() is that of what was dealt, whatever the thread has made
// since; an error of the thread is thrown where its batches would have been dealt, and the call can
// be repeated. Where the machine has no thread to give, batches are made when they are asked for.
class PrefetchLoader {
  public:
    using Position = DataLoader::Position;

    PrefetchLoader(DataLoader loader, size_t batches)
        : loader_(std::move(loader)),
          batches_(batches),
          inputs_(batches * loader_.B() * loader_.T()),
          targets_(inputs_.size()),
          position_(loader_.position()),
          epoch_fraction_(loader_.epoch_fraction()) {
        assert(batches >= 1);
    }
    PrefetchLoader(const PrefetchLoader&) = delete;
    PrefetchLoader& operator=(const PrefetchLoader&) = delete;
    ~PrefetchLoader() {
        if (!thread_.joinable()) return;
        {
            std::lock_guard<std::mutex> guard(mutex_);
            state_ = State::ended;
        }
        changed_.notify_all();
        thread_.join();
    }

    // Writes the next batches of this rank: inputs and targets (batches,B,T).
    void next_batches(int* inputs, int* targets) {
        if (!asked_) ask();
        wait();
        if (error_) {
            loader_.seek(position_);
            std::rethrow_exception(std::exchange(error_, nullptr));
        }
        std::copy(inputs_.begin(), inputs_.end(), inputs);
        std::copy(targets_.begin(), targets_.end(), targets);
        position_ = loader_.position();
        epoch_fraction_ = loader_.epoch_fraction();
        ask();
    }

    Position position() const { return position_; }
    double epoch_fraction() const { return epoch_fraction_; }

    // As DataLoader does; batches that were made for another position are dropped.
    void seek(Position position) {
        if (position == position_) return;
        wait();
        error_ = nullptr;
        try {
            loader_.seek(position);
        } catch (const Error&) {
            loader_.seek(position_);
            throw;
        }
        position_ = position;
        epoch_fraction_ = loader_.epoch_fraction();
        ask();
    }

    // As above; what the thread has made is dropped.
    const std::vector<uint64_t>& shard_hashes() {
        wait();
        error_ = nullptr;
        loader_.seek(position_);
        return loader_.shard_hashes();
    }
    size_t windows_per_epoch() const { return loader_.windows_in_epoch(position_.epoch); }
    const std::vector<Shard>& shards() const { return loader_.shards(); }

  private:
    enum class State { idle, wanted, ended };

    void make() {
        try {
            size_t batch = loader_.B() * loader_.T();
            for (size_t m = 0; m < batches_; m++)
                loader_.next_batch(&inputs_[m * batch], &targets_[m * batch]);
        } catch (...) { error_ = std::current_exception(); }
    }

    // Lets the thread make the next batches. Signals are for the main thread, on whose stack their
    // handlers run.
    void ask() {
        asked_ = true;
        if (!started_) {
            started_ = true;
            sigset_t all, before;
            sigfillset(&all);
            sigdelset(&all, SIGBUS);  // of a file that is cut short; blocked, it kills
            pthread_sigmask(SIG_SETMASK, &all, &before);
            try {
                thread_ = std::thread([this] { work(); });
            } catch (const std::system_error&) { /* no thread: wait() does its work */
            }
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
        }
        if (!thread_.joinable()) return;
        {
            std::lock_guard<std::mutex> guard(mutex_);
            state_ = State::wanted;
        }
        changed_.notify_all();
    }

    // Until the thread has done what it was asked for: from here on all is the caller's.
    void wait() {
        if (!asked_) return;
        asked_ = false;
        if (!thread_.joinable()) return make();
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return state_ == State::idle; });
    }

    void work() {
        for (;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            changed_.wait(lock, [this] { return state_ != State::idle; });
            if (state_ == State::ended) return;
            lock.unlock();
            make();
            lock.lock();
            if (state_ == State::wanted) state_ = State::idle;
            lock.unlock();
            changed_.notify_all();
        }
    }

    DataLoader loader_;  // this one and the three below: of the thread while it is asked
    size_t batches_;
    std::vector<int> inputs_, targets_;  // (batches,B,T)
    std::exception_ptr error_;
    Position position_;
    double epoch_fraction_;
    bool asked_ = false, started_ = false;
    std::mutex mutex_;
    std::condition_variable changed_;
    State state_ = State::idle;  // with the lock
    std::thread thread_;
};

// ==== evaluation batches =========================================================================

// Goes once through a set, in order: every token of a shard but its first is a target exactly once.
// Windows of T follow one another without overlap; the last of a shard is short and padded, as are
// the rows that the last batch has too many, with input 0 and target kIgnore. With `max_windows`
// below their number, that many are taken, evenly spread over the set (0 takes all). Targets after
// a `separator` (below 0: none) are kIgnore too. The shards are referred to and must stay alive. A
// set with nothing to predict is fail_input.
class EvalLoader {
  public:
    EvalLoader(const std::vector<Shard>& shards, int B, int T, size_t max_windows = 0,
               int separator = -1)
        : shards_(shards), B_(size_t(B)), T_(size_t(T)), separator_(separator) {
        if (B < 1) fail_input("--batch-size %d: must be at least 1", B);
        if (T < 1) fail_input("--sequence-length %d: must be at least 1", T);
        if (shards.empty()) fail_input("no evaluation data was given");
        for (const Shard& shard : shards) {
            size_t targets = shard.size() - 1;
            first_window_.push_back(first_window_.back() + targets / T_ + (targets % T_ != 0));
        }
        size_t all = first_window_.back();
        if (all == 0)
            fail_input("%s: a single token leaves nothing to predict; give more text",
                       shards[0].path().c_str());
        windows_ = max_windows == 0 ? all : std::min(all, max_windows);
    }
    EvalLoader(std::vector<Shard>&&, int, int, size_t = 0, int = -1) = delete;

    size_t windows() const { return windows_; }
    size_t batches() const { return windows_ / B_ + (windows_ % B_ != 0); }

    // Writes the next batch, inputs (B,T) and targets (B,T), and in how many rows windows are.
    // False, with nothing written, when all have been given.
    bool next_batch(int* inputs, int* targets, int* rows_in_use = nullptr) {
        if (next_ == windows_) return false;
        std::fill_n(inputs, B_ * T_, 0);
        std::fill_n(targets, B_ * T_, kIgnore);
        size_t rows = std::min(B_, windows_ - next_);
        for (size_t row = 0; row < rows; row++, next_++) {
            // 128 bits hold the product of two 64-bit numbers.
            auto window = static_cast<unsigned __int128>(next_) * first_window_.back() / windows_;
            copy(size_t(window), inputs + row * T_, targets + row * T_);
        }
        if (rows_in_use != nullptr) *rows_in_use = int(rows);
        return true;
    }

    void reset() { next_ = 0; }

  private:
    void copy(size_t w, int* inputs, int* targets) const {
        auto next = std::upper_bound(first_window_.begin(), first_window_.end(), w);
        size_t s = size_t(next - first_window_.begin()) - 1;
        size_t begin = (w - first_window_[s]) * T_;
        size_t count = std::min(T_, shards_[s].size() - 1 - begin);
        copy_window(shards_[s], begin, count, separator_, inputs, targets);
    }

    const std::vector<Shard>& shards_;
    size_t B_, T_, windows_ = 0, next_ = 0;
    int separator_;
    std::vector<size_t> first_window_ = {0};  // (shards + 1), as in DataLoader
};
