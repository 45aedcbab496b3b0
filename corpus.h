// Files to documents to shards: how text that no memory could hold becomes tokens.
//
// Text comes as plain files (each one document), as JSON lines (a document a line), and as either
// of them packed by gzip or zstd. A reader goes through the files in order and hands out units of
// about a megabyte; threads clean and encode units apart; one consumer takes their results in order
// and fills shards. Where a unit begins depends on the files alone, and documents are encoded apart
// or cut where that changes nothing, so that the shards are the same bytes for any number of
// threads, and after any number of interruptions: see ShardBuilder.
#pragma once

#include <sys/file.h>
#include <utf8proc.h>

#include <array>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <set>
#include <thread>

#include "dataloader.h"

#ifdef GPT2_ZLIB
#    include <zlib.h>
#endif
#ifdef GPT2_ZSTD
#    include <zstd.h>
#endif

// ==== unpacking ==================================================================================

enum class Packing { none, gzip, zstd };

inline Packing packing_of(const std::string& path) {
    std::string extension = fs::path(path).extension().string();
    if (extension == ".gz") return Packing::gzip;
    return extension == ".zst" ? Packing::zstd : Packing::none;
}

// A packed file holds frames (members, in gzip's words), one behind the other. run() takes what it
// can of `in` and writes to `out`; *used and *made say how much. It returns whether it now stands
// between two frames, and throws what is wrong as text.
struct Unpacker {
    virtual ~Unpacker() = default;
    virtual bool run(std::string_view in, char* out, size_t room, size_t* used, size_t* made) = 0;
};

#ifdef GPT2_ZLIB
struct GzipUnpacker : Unpacker {
    GzipUnpacker() {
        constexpr int kGzip = 16;  // added to the window's bits: this format and no other
        if (inflateInit2(&stream_, MAX_WBITS + kGzip) != Z_OK) throw std::bad_alloc();
    }
    ~GzipUnpacker() override { inflateEnd(&stream_); }
    bool run(std::string_view in, char* out, size_t room, size_t* used, size_t* made) override {
        if (ended_) inflateReset(&stream_);
        stream_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(in.data()));
        stream_.avail_in = uInt(std::min<size_t>(in.size(), 1 << 30));
        stream_.next_out = reinterpret_cast<Bytef*>(out);
        stream_.avail_out = uInt(std::min<size_t>(room, 1 << 30));
        uInt had_in = stream_.avail_in, had_out = stream_.avail_out;
        int status = inflate(&stream_, Z_NO_FLUSH);
        if (status == Z_MEM_ERROR) throw std::bad_alloc();
        if (status != Z_OK && status != Z_STREAM_END && status != Z_BUF_ERROR)
            throw std::string(stream_.msg != nullptr ? stream_.msg : "damaged");
        *used = had_in - stream_.avail_in, *made = had_out - stream_.avail_out;
        return ended_ = status == Z_STREAM_END;
    }
    z_stream stream_{};
    bool ended_ = false;
};
#endif

#ifdef GPT2_ZSTD
struct ZstdUnpacker : Unpacker {
    ZstdUnpacker() : stream_(ZSTD_createDStream(), ZSTD_freeDStream) {
        if (!stream_) throw std::bad_alloc();
    }
    bool run(std::string_view in, char* out, size_t room, size_t* used, size_t* made) override {
        ZSTD_inBuffer from = {in.data(), in.size(), 0};
        ZSTD_outBuffer to = {out, room, 0};
        size_t status = ZSTD_decompressStream(stream_.get(), &to, &from);
        if (ZSTD_isError(status)) throw std::string(ZSTD_getErrorName(status));
        *used = from.pos, *made = to.pos;
        return status == 0;
    }
    std::unique_ptr<ZSTD_DStream, size_t (*)(ZSTD_DStream*)> stream_;
};
#endif

inline std::unique_ptr<Unpacker> make_unpacker(Packing packing, const std::string& path) {
#ifdef GPT2_ZLIB
    if (packing == Packing::gzip) return std::make_unique<GzipUnpacker>();
#endif
#ifdef GPT2_ZSTD
    if (packing == Packing::zstd) return std::make_unique<ZstdUnpacker>();
#endif
    bool gzip = packing == Packing::gzip;
    fail_input(
        "%s: this program was built without %s; unpack the file (%s -d), or build again with "
        "it: scripts/install_deps.sh",
        path.c_str(), gzip ? "zlib (zlib1g-dev)" : "zstd (libzstd-dev)", gzip ? "gzip" : "zstd");
}

// The text of a file from its beginning to its end, unpacked. Nothing is read before it is asked
// for. A file that is damaged, cut short or goes on behind its end is fail_input.
class TextFile {
  public:
    explicit TextFile(const std::string& path)
        : file_(std::make_shared<const MappedFile>(path)), packing_(packing_of(path)) {
        file_->advise(0, file_->size(), MADV_SEQUENTIAL);
        if (packing_ != Packing::none) unpacker_ = make_unpacker(packing_, path);
    }

    // Makes the first `want` bytes of what is left available, or all where that is less.
    void fill(size_t want) {
        while (packing_ != Packing::none && !ended_ && buffer_.size() < want) unpack();
    }
    // What is available of what is left; at_end(): it is all.
    std::string_view window() const {
        if (packing_ == Packing::none) return file_->view().substr(at_);
        return buffer_;
    }
    bool at_end() const { return packing_ == Packing::none || ended_; }

    // Goes forward.
    void consume(size_t count) {
        if (packing_ == Packing::none) {
            hash_.add(file_->data() + at_, count);
            at_ += count;
        } else {
            buffer_.erase(0, count);
        }
    }

    const std::string& path() const { return file_->path(); }
    const std::shared_ptr<const MappedFile>& file() const { return file_; }
    Packing packing() const { return packing_; }

    // xxHash of the bytes of the file that were used so far: at the end, of the file.
    uint64_t hash() const { return hash_.digest().hash; }

  private:
    void unpack() {
        constexpr size_t kStep = 1 << 18;
        std::string_view in = file_->view().substr(at_, kStep);
        size_t before = buffer_.size(), used = 0, made = 0;
        buffer_.resize(before + kStep);
        try {
            between_ = unpacker_->run(in, buffer_.data() + before, kStep, &used, &made);
        } catch (const std::string& what) {
            fail_input("%s: byte %zu: cannot unpack: %s; fetch it again", path().c_str(), at_,
                       what.c_str());
        }
        buffer_.resize(before + made);
        hash_.add(in.data(), used);
        at_ += used;
        bool all_read = at_ == file_->size();
        if (all_read && between_) ended_ = true;  // behind a frame no text of it is held back
        else if (used == 0 && made == 0)
            fail_input("%s: byte %zu: the packed text is cut short; fetch it again", path().c_str(),
                       at_);
    }

    std::shared_ptr<const MappedFile> file_;
    Packing packing_;
    std::unique_ptr<Unpacker> unpacker_;
    size_t at_ = 0;  // in the file
    bool between_ = true, ended_ = false;
    std::string buffer_;
    StreamingHash hash_;
};

// ==== documents ==================================================================================

// Whether a file of JSON lines; its name says so, below that of the packing.
inline bool is_json_lines(const std::string& path) {
    fs::path name = path;
    if (packing_of(path) != Packing::none) name = name.stem();
    return name.extension() == ".jsonl" || name.extension() == ".ndjson";
}

// Takes the text of one field of the outermost object; everything else is passed over. (Its base
// names the events of nlohmann's parser; nothing is built of what is not wanted.)
class FieldReader : public json::json_sax_t {
  public:
    explicit FieldReader(const std::string& field) : field_(field) {}
    std::string text;
    int times = 0;          // that the field is there
    bool is_text = true;    // it is a string
    bool is_object = true;  // the line is an object
    size_t error_byte = 0;

    bool null() override { return other(); }
    bool boolean(bool) override { return other(); }
    bool number_integer(number_integer_t) override { return other(); }
    bool number_unsigned(number_unsigned_t) override { return other(); }
    bool number_float(number_float_t, const string_t&) override { return other(); }
    bool binary(binary_t&) override { return other(); }
    bool string(string_t& value) override {
        if (!wanted_) return other();
        text = std::move(value);
        wanted_ = false;
        return true;
    }
    bool start_object(size_t) override {
        if (depth_ > 0) other();
        depth_++;
        return true;
    }
    bool end_object() override { return depth_--, true; }
    bool start_array(size_t) override {
        other();
        depth_++;
        return true;
    }
    bool end_array() override { return depth_--, true; }
    bool key(string_t& name) override {
        wanted_ = depth_ == 1 && name == field_;
        times += wanted_;
        return true;
    }
    bool parse_error(size_t byte, const std::string&, const json::exception&) override {
        error_byte = std::max<size_t>(byte, 1);
        return false;
    }

  private:
    bool other() {  // a value that is not the text
        if (depth_ == 0) is_object = false;
        if (wanted_) is_text = false;
        wanted_ = false;
        return true;
    }
    const std::string& field_;
    int depth_ = 0;
    bool wanted_ = false;
};

// The text of a field of one line of JSON. `path` and `line` are for the message.
inline std::string field_text(std::string_view json_line, const std::string& field,
                              const std::string& path, size_t line) {
    FieldReader reader(field);
    const char *at = path.c_str(), *name = field.c_str();
    // A zero byte is the end to the library, which would pass over what is behind it.
    size_t zero = json_line.find('\0');
    bool parsed = json::sax_parse(json_line.begin(), json_line.end(), &reader);
    if (!parsed || zero != json_line.npos)
        fail_input("%s: line %zu: byte %zu: not valid JSON; mend or remove the line", at, line,
                   parsed ? zero + 1 : reader.error_byte);
    if (!reader.is_object) fail_input("%s: line %zu: no JSON object; remove the line", at, line);
    if (reader.times == 0)
        fail_input("%s: line %zu: no field \"%s\"; name the one with the text with --jsonl-field",
                   at, line, name);
    if (reader.times > 1) fail_input("%s: line %zu: \"%s\" is there twice", at, line, name);
    if (!reader.is_text)
        fail_input(
            "%s: line %zu: \"%s\" is no string; name the field with the text with "
            "--jsonl-field",
            at, line, name);
    return std::move(reader.text);
}

// A part of a file that can be worked on alone: whole lines of JSON, or a stretch of a plain
// document, which need not begin or end in it.
struct Unit {
    uint64_t number = 0;                     // in the order of the corpus
    size_t source = 0;                       // index of the file
    std::shared_ptr<const MappedFile> file;  // keeps `text` alive, where `unpacked` does not
    std::string unpacked;
    std::string_view text;
    bool json_lines = false, begins = true, ends = true;
    size_t first_line = 1;
    uint64_t digest = 0;  // of everything that was read of all files up to the end of this
};

struct Source {
    std::string path;
    size_t bytes = 0;
    uint64_t hash = 0;  // once it was read
};

// Goes through files in order, a unit at a time. Documents are cut only with `whole_documents` off.
// A line, or a whole document that is packed, of more than kMostWhole bytes is fail_input: it would
// have to be in memory.
class CorpusReader {
  public:
    static constexpr size_t kUnitBytes = 1 << 20, kMostWhole = size_t(1) << 30;

    CorpusReader(const std::vector<std::string>& files, const std::string& jsonl_field,
                 bool whole_documents)
        : field_(jsonl_field), whole_documents_(whole_documents) {
        for (const std::string& path : files) {
            check_kind(path);
            sources_.push_back({path, MappedFile(path).size(), 0});
        }
    }

    // False at the end of the corpus.
    bool next(Unit* unit) {
        while (!file_ && source_ < sources_.size()) open_next();
        if (!file_) return false;
        size_t size = json_lines_ ? cut_of_lines() : cut_of_document();
        fill_unit(unit, size);
        return true;
    }

    const std::vector<Source>& sources() const { return sources_; }

  private:
    static void check_kind(const std::string& path) {
        if (fs::path(path).extension() == ".parquet")
            fail_input(
                "%s: Parquet is not read; make JSON lines of it: duckdb -c \"COPY (SELECT "
                "text FROM '%s') TO 'text.jsonl'\"",
                path.c_str(), path.c_str());
        if (is_shard(path))
            fail_input("%s: a token shard among text files; give shards or text, not both",
                       path.c_str());
    }
    void open_next() {
        const std::string& path = sources_[source_].path;
        file_.emplace(path);
        if (file_->file()->size() != sources_[source_].bytes)
            fail_input("%s: has changed while the corpus was read; start again", path.c_str());
        json_lines_ = !field_.empty() && is_json_lines(path);
        begins_ = true, line_ = 1;
        file_->fill(1);
        if (file_->window().empty()) close();  // no document
    }
    void close() {
        sources_[source_++].hash = file_->hash();
        file_.reset();
    }
    void need_more(size_t* want) {
        if (*want > kMostWhole)
            fail_input(
                "%s: %s of more than %zu bytes; cut it, or unpack the file", file_->path().c_str(),
                json_lines_ ? format("line %zu: a line", line_).c_str() : "a document", kMostWhole);
        *want *= 2;
    }
    // The bytes of the next unit: whole lines.
    size_t cut_of_lines() {
        for (size_t want = 2 * kUnitBytes;; need_more(&want)) {
            file_->fill(want);
            std::string_view text = file_->window();
            size_t newline = text.find('\n', std::min(kUnitBytes, text.size()) - 1);
            if (newline != std::string_view::npos) return newline + 1;
            if (file_->at_end()) return text.size();
        }
    }
    // All that is left, or a stretch after which the tokens of the rest are as if it were before.
    size_t cut_of_document() {
        constexpr size_t kCharacter = 4;  // bytes; the cut must not be before half a one
        for (size_t want = 2 * kUnitBytes;; need_more(&want)) {
            file_->fill(want);
            std::string_view text = file_->window();
            if (whole_documents_ || text.size() <= kUnitBytes) {
                if (file_->at_end()) return text.size();
                continue;
            }
            size_t cut = safe_cut(text, kUnitBytes);
            if (file_->at_end() || cut + kCharacter <= text.size()) return cut;
        }
    }
    void fill_unit(Unit* unit, size_t size) {
        *unit = Unit();
        unit->number = number_++;
        unit->source = source_;
        unit->json_lines = json_lines_;
        unit->first_line = line_;
        unit->begins = begins_;
        begins_ = false;
        if (file_->packing() == Packing::none) {
            unit->file = file_->file();
            unit->text = file_->window().substr(0, size);
        } else {
            unit->unpacked = file_->window().substr(0, size);
        }
        if (json_lines_)
            line_ += size_t(std::count(file_->window().begin(),
                                       file_->window().begin() + ptrdiff_t(size), '\n'));
        file_->consume(size);
        file_->fill(1);
        unit->ends = file_->at_end() && file_->window().empty();
        uint64_t words[] = {digest_, source_, file_->hash()};
        unit->digest = digest_ = hash_bytes(words, sizeof words);
        if (unit->ends) close();
    }

    std::vector<Source> sources_;
    std::string field_;
    bool whole_documents_, json_lines_ = false, begins_ = true;
    std::optional<TextFile> file_;  // sources_[source_], when it is open
    size_t source_ = 0, line_ = 1;
    uint64_t number_ = 0, digest_ = 0;
};

// Calls f(text) for each document or stretch of one in a unit; none is empty.
template <typename F>
void for_each_document(const Unit& unit, const std::string& path, const std::string& field, F f) {
    std::string_view text = unit.file ? unit.text : std::string_view(unit.unpacked);
    if (!unit.json_lines) {
        f(text);
        return;
    }
    size_t line = unit.first_line;
    for (size_t begin = 0; begin < text.size(); line++) {
        size_t end = std::min(text.find('\n', begin), text.size());
        std::string_view bytes = text.substr(begin, end - begin);
        begin = end + 1;
        if (bytes.find_first_not_of(" \t\r") == std::string_view::npos) continue;
        std::string document = field_text(bytes, field, path, line);
        if (!document.empty()) f(std::string_view(document));
    }
}

constexpr const char* kJsonlField = "text";

// Reads text (paths as expand_paths takes them) into memory, byte for byte: plain files, a document
// each, and lines of JSON, where the field `jsonl_field` of each is one (empty: such files are
// plain text too); packed or not. No files, only empty ones, and token shards among them are
// fail_input.
inline TextCorpus read_text(const std::vector<std::string>& paths,
                            const std::string& jsonl_field = kJsonlField) {
    std::vector<std::string> names = expand_paths(paths);
    if (names.empty()) fail_input("no text files were given");
    CorpusReader reader(names, jsonl_field, true);
    size_t size = 0;
    for (const Source& source : reader.sources()) size += source.bytes;
    TextCorpus corpus;
    corpus.text.reserve(size);
    for (Unit unit; reader.next(&unit);) {
        if (unit.begins) corpus.files.emplace_back(corpus.document_ends.size(), names[unit.source]);
        for_each_document(unit, names[unit.source], jsonl_field, [&](std::string_view text) {
            corpus.text.append(text);
            corpus.document_ends.push_back(corpus.text.size());
        });
    }
    if (corpus.text.empty() && names.size() > 1)
        fail_input("%s: empty, and so are the other %zu files", names[0].c_str(), names.size() - 1);
    if (corpus.text.empty()) fail_input("%s: empty", names[0].c_str());
    return corpus;
}

// ==== cleaning ===================================================================================

// What cleaning takes away, by kind.
enum RemovedKind {
    kLicenceHeaders,  // a book's text up to the line `*** START OF THE PROJECT GUTENBERG ...`
    kLicenceFooters,  // and from the line `*** END OF ...` on
    kRepeatedLines,   // a line that stands more than kLongestRun times in a row, all but the first
    kControlCharacters,   // but tabs and line ends; byte order marks
    kCarriageReturns,     // line ends of other systems, which become new lines
    kComposedLines,       // lines that were not in normal form C: nothing is removed, only composed
    kDuplicateDocuments,  // that are, cleaned, equal to an earlier one
    kEmptyDocuments,      // nothing is left of them
    kRemovedKinds
};

struct RemovedName {
    const char *key, *text;
};
constexpr std::array<RemovedName, kRemovedKinds> kRemovedNames = {{
    {"licence_headers", "licence headers"},
    {"licence_footers", "licence footers"},
    {"repeated_lines", "lines that repeat the one before more than 8 times"},
    {"control_characters", "control characters"},
    {"carriage_returns", "carriage returns made new lines"},
    {"composed_lines", "lines brought into Unicode's normal form C"},
    {"duplicate_documents", "documents that were there before"},
    {"empty_documents", "documents of which nothing is left"},
}};

// Of each kind, how many and how many bytes (of composed lines those that they lost, which may be
// fewer than none).
struct Removed {
    std::array<int64_t, kRemovedKinds> count{}, bytes{};

    void add(RemovedKind kind, int64_t what_bytes, int64_t times = 1) {
        count[kind] += times, bytes[kind] += what_bytes;
    }
    void add(const Removed& other) {
        for (size_t kind = 0; kind < kRemovedKinds; kind++)
            count[kind] += other.count[kind], bytes[kind] += other.bytes[kind];
    }
};

// The line that begins at `begin`, without its end, and where the next begins. A line ends on "\n",
// "\r\n" or "\r".
inline std::string_view line_at(std::string_view text, size_t begin, size_t* next) {
    size_t end = std::min(text.find_first_of("\r\n", begin), text.size());
    bool two = end + 1 < text.size() && text[end] == '\r' && text[end + 1] == '\n';
    *next = std::min(end + (two ? 2 : 1), text.size());
    return text.substr(begin, end - begin);
}

// Whether a line says, behind stars and spaces, one of `words` (upper case) in any case.
inline bool line_says(std::string_view line, std::initializer_list<std::string_view> words) {
    size_t at = std::min(line.find_first_not_of("* \t"), line.size());
    for (std::string_view word : words) {
        if (line.size() - at < word.size()) continue;
        bool same = std::equal(word.begin(), word.end(), line.begin() + ptrdiff_t(at),
                               [](char a, char b) { return a == toupper(uint8_t(b)); });
        if (same) return true;
    }
    return false;
}

// The lines by which Project Gutenberg bounds the text of a book, in order: `from` and `to` are the
// bytes of the line (of the lines, where a title wraps), and an end's takes in the line `End of
// Project Gutenberg's ...` above it.
struct BookMark {
    bool start;
    size_t from, to;
};

inline std::vector<BookMark> book_marks(std::string_view text) {
    constexpr int kMostWrapped = 3;
    std::vector<BookMark> marks;
    size_t notice = SIZE_MAX;  // where the last line that is not blank begins, if it is a notice
    for (size_t begin = 0, next; begin < text.size(); begin = next) {
        std::string_view line = line_at(text, begin, &next);
        if (line.find_first_not_of(" \t") == std::string_view::npos) continue;
        bool starred = line.starts_with("*");
        bool start = starred && line_says(line, {"START OF THE PROJECT GUTENBERG",
                                                 "START OF THIS PROJECT GUTENBERG",
                                                 "END*THE SMALL PRINT", "END THE SMALL PRINT"});
        bool end = starred && line_says(line, {"END OF THE PROJECT GUTENBERG",
                                               "END OF THIS PROJECT GUTENBERG"});
        if (start || end) {
            size_t after = next;
            for (int i = 0; i < kMostWrapped && !line.ends_with("*") && after < text.size(); i++)
                line = line_at(text, after, &after);
            if (line.ends_with("*")) next = after;
            marks.push_back({start, end && notice != SIZE_MAX ? notice : begin, next});
        }
        bool is_notice = !starred && line_says(line, {"END OF THE PROJECT GUTENBERG",
                                                      "END OF PROJECT GUTENBERG"});
        notice = is_notice ? begin : SIZE_MAX;
    }
    return marks;
}

// The parts of a text between the headers and footers of Project Gutenberg's books; a file may hold
// several. A mark counts only where what it would take away is no longer than such a licence is:
// text that quotes one in its middle keeps all that is around it.
inline std::vector<std::string_view> without_licences(std::string_view text, Removed* removed) {
    constexpr size_t kLongest = 1 << 15;  // bytes; they are about 1,000 and 19,000
    std::vector<std::string_view> kept;
    bool possible = text.find("GUTENBERG") != text.npos || text.find("SMALL PRINT") != text.npos ||
                    text.find("Gutenberg") != text.npos;
    std::vector<BookMark> marks;
    if (possible) marks = book_marks(text);
    size_t begin = 0;     // of the part that is open
    bool outside = true;  // no start was seen since the last end, or since the beginning
    for (size_t i = 0; i < marks.size(); i++) {
        const BookMark& mark = marks[i];
        if (mark.start && outside && mark.to - begin <= kLongest) {
            removed->add(kLicenceHeaders, int64_t(mark.to - begin));
            begin = mark.to;
            outside = false;
        } else if (!mark.start && mark.from >= begin) {
            bool another = i + 1 < marks.size() && marks[i + 1].start;
            size_t next = another ? marks[i + 1].to : text.size();
            if (next - mark.from > kLongest) continue;
            kept.push_back(text.substr(begin, mark.from - begin));
            begin = another ? marks[i + 1].from : text.size();
            removed->add(kLicenceFooters, int64_t(begin - mark.from));
            outside = true;
        }
    }
    if (begin < text.size()) kept.push_back(text.substr(begin));
    return kept;
}

// Appends a line without control characters: those of ASCII but the tab, DEL, and U+0080 to U+009F
// but U+0085, which ends a line.
inline void append_printable(std::string_view line, std::string* out, Removed* removed) {
    for (size_t i = 0; i < line.size(); i++) {
        uint8_t byte = uint8_t(line[i]), next = i + 1 < line.size() ? uint8_t(line[i + 1]) : 0;
        bool ascii = (byte < 0x20 && byte != '\t') || byte == 0x7f;
        bool latin = byte == 0xc2 && next >= 0x80 && next <= 0x9f && next != 0x85;
        if (ascii || latin) {
            removed->add(kControlCharacters, 1 + latin);
            i += latin;
        } else {
            *out += line[i];
        }
    }
}

// Whether text may not be in normal form C: it has a character above U+02FF that decomposes or
// takes part in a composition. Characters below compose only with such.
inline bool may_compose(std::string_view text) {
    for (size_t i = 0; i < text.size();) {
        if (uint8_t(text[i]) < 0xcc) {  // below U+0300
            i++;
            continue;
        }
        utf8proc_int32_t c;
        auto length = utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data()) + i,
                                       utf8proc_ssize_t(text.size() - i), &c);
        if (length <= 0) {  // no UTF-8
            i++;
            continue;
        }
        i += size_t(length);
        const utf8proc_property_t* p = utf8proc_get_property(c);
        bool jamo = c >= 0x1100 && c <= 0x11ff;
        if (jamo || p->combining_class != 0 || p->decomp_seqindex != UINT16_MAX ||
            p->comb_index != UINT16_MAX)
            return true;
    }
    return false;
}

// Appends text in Unicode's normal form C [Unicode Standard Annex 15]; bytes that are not UTF-8
// stay as they are. Of more than kMostMarks marks on one character, which no language writes, the
// others are taken apart from it: the library sorts them in the square of their number.
inline void append_composed(std::string_view text, std::string* out) {
    constexpr int kMostMarks = 256;
    auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    for (size_t begin = 0; begin < text.size();) {
        size_t end = begin;
        utf8proc_int32_t c;
        utf8proc_ssize_t length = 1;
        for (int marks = 0; end < text.size() && marks < kMostMarks; end += size_t(length)) {
            length = utf8proc_iterate(bytes + end, utf8proc_ssize_t(text.size() - end), &c);
            if (length <= 0) break;
            marks = utf8proc_get_property(c)->combining_class != 0 ? marks + 1 : 0;
        }
        utf8proc_uint8_t* made = nullptr;
        auto options = utf8proc_option_t(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        auto size = utf8proc_map(bytes + begin, utf8proc_ssize_t(end - begin), &made, options);
        if (size == UTF8PROC_ERROR_NOMEM) throw std::bad_alloc();
        if (size >= 0) out->append(reinterpret_cast<const char*>(made), size_t(size));
        else out->append(text.substr(begin, end - begin));
        free(made);
        if (length <= 0) *out += text[end++];
        begin = end;
    }
}

// A document without what RemovedKind lists, line by line. Lines stay lines, blank ones and those
// with one word too, so that verse and the names of speakers are left alone; refrains are, as they
// do not follow themselves so often.
inline std::string clean_document(std::string_view text, Removed* removed) {
    constexpr size_t kLongestRun = 8;
    constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
    std::string out, line;
    out.reserve(text.size());
    if (text.starts_with(kByteOrderMark)) {
        removed->add(kControlCharacters, 3);
        text.remove_prefix(3);
    }
    for (std::string_view part : without_licences(text, removed)) {
        size_t run = 0, run_begin = 0, run_end = 0;  // of equal lines; run_end: of the first
        auto end_run = [&] {
            if (run > kLongestRun) {
                removed->add(kRepeatedLines, int64_t(out.size() - run_end), int64_t(run - 1));
                out.resize(run_end);
            }
            run = 0;
        };
        for (size_t begin = 0, next; begin < part.size(); begin = next) {
            std::string_view raw = line_at(part, begin, &next);
            line.clear();
            append_printable(raw, &line, removed);
            size_t end = begin + raw.size(), ending = next - end;
            if (ending > 0 && part[end] == '\r')
                removed->add(kCarriageReturns, int64_t(ending - 1));
            if (may_compose(line)) {
                std::string composed;
                append_composed(line, &composed);
                if (composed != line)
                    removed->add(kComposedLines, int64_t(line.size()) - int64_t(composed.size()));
                line = std::move(composed);
            }
            if (ending > 0) line += '\n';
            bool blank = line.find_first_not_of(" \t\n") == std::string::npos;
            bool same =
                run > 0 && std::string_view(out).substr(run_begin, run_end - run_begin) == line;
            if (!same) end_run(), run_begin = out.size();
            out += line;
            if (!same) run_end = out.size();
            run = blank ? 0 : run + 1;
        }
        end_run();
    }
    return out;
}

// ==== lengths of documents =======================================================================

// How long documents are, in tokens: counts by length, exact below 128 and in steps of 1/64 above,
// so that its memory does not grow with their number.
class Lengths {
  public:
    void add(size_t length) {
        size_t bucket = bucket_of(length);
        if (bucket >= counts_.size()) counts_.resize(bucket + 1);
        counts_[bucket]++;
        least_ = documents_ == 0 ? length : std::min(least_, length);
        most_ = std::max(most_, length);
        documents_++;
    }
    size_t documents() const { return documents_; }
    size_t least() const { return least_; }
    size_t most() const { return most_; }

    // A length that a part p of the documents do not exceed, at most 1/64 above the smallest such.
    size_t quantile(double p) const {
        size_t wanted = size_t(std::ceil(p * double(documents_))), seen = 0;
        for (size_t bucket = 0; bucket < counts_.size(); bucket++) {
            seen += counts_[bucket];
            if (seen >= wanted && seen > 0) return std::min(last_of(bucket), most_);
        }
        return most_;
    }

    // The context that holds nine in ten documents whole, from 16 to 65,536.
    size_t suggested_context() const {
        return std::clamp<size_t>(std::bit_ceil(quantile(0.9) + 1), 16, 1 << 16);
    }

    ordered_json summary() const {
        return {{"min", least_},        {"median", quantile(0.5)},
                {"p90", quantile(0.9)}, {"p99", quantile(0.99)},
                {"max", most_},         {"context", suggested_context()}};
    }
    ordered_json state() const { return {least_, most_, counts_}; }
    void restore(const json& state) {
        least_ = state.at(0), most_ = state.at(1);
        counts_ = state.at(2).get<std::vector<size_t>>();
        documents_ = 0;
        for (size_t count : counts_) documents_ += count;
    }

  private:
    static size_t bucket_of(size_t length) {
        if (length < 128) return length;
        size_t shift = size_t(std::bit_width(length)) - 7;
        return 64 * shift + (length >> shift);
    }
    static size_t last_of(size_t bucket) {
        if (bucket < 128) return bucket;
        size_t shift = bucket / 64 - 1;
        return ((bucket - 64 * shift + 1) << shift) - 1;
    }
    std::vector<size_t> counts_;
    size_t least_ = 0, most_ = 0, documents_ = 0;
};

// ==== many threads, one order ====================================================================

// Applies `work` to the units of a reader on several threads and gives the results in the order of
// the units. At most kUnitsAThread of them a thread exist at a time. What the reader or `work`
// throws is thrown by next(), in its turn.
template <typename Result>
class OrderedPipeline {
  public:
    OrderedPipeline(CorpusReader& reader, size_t threads, std::function<Result(const Unit&)> work)
        : reader_(reader), work_(std::move(work)), slots_(kUnitsAThread * threads) {
        try {
            for (size_t i = 0; i < threads; i++) threads_.emplace_back([this] { run(); });
        } catch (const std::system_error& error) {
            stop();
            fail_machine("cannot start %zu threads: %s; give --threads", threads, error.what());
        }
    }
    OrderedPipeline(const OrderedPipeline&) = delete;
    OrderedPipeline& operator=(const OrderedPipeline&) = delete;
    ~OrderedPipeline() { stop(); }

    // The next result; false when there is none any more.
    bool next(Result* result) {
        std::unique_lock lock(mutex_);
        Slot& slot = slots_[taken_ % slots_.size()];
        changed_.wait(lock, [&] { return slot.full || (ended_ && taken_ == given_); });
        if (!slot.full) return false;
        Slot mine = std::exchange(slot, {});
        taken_++;
        lock.unlock();
        changed_.notify_all();
        if (mine.error) std::rethrow_exception(mine.error);
        *result = std::move(mine.result);
        return true;
    }

  private:
    static constexpr size_t kUnitsAThread = 4;
    struct Slot {
        bool full = false;
        Result result;
        std::exception_ptr error;
    };

    void stop() {
        {
            std::lock_guard lock(mutex_);
            stopped_ = true;
        }
        changed_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }
    void run() {
        Unit unit;
        for (size_t index; take_unit(&unit, &index);) {
            Slot slot{true, {}, nullptr};
            try {
                slot.result = work_(unit);
            } catch (...) { slot.error = std::current_exception(); }
            put(index, std::move(slot));
        }
    }
    void put(size_t index, Slot slot) {
        {
            std::lock_guard lock(mutex_);
            slots_[index % slots_.size()] = std::move(slot);
        }
        changed_.notify_all();
    }
    // One thread at a time reads, and waits for room with the reader's turn in its hand.
    bool take_unit(Unit* unit, size_t* index) {
        std::lock_guard turn(reader_mutex_);
        {
            std::unique_lock lock(mutex_);
            changed_.wait(lock, [&] { return stopped_ || given_ < taken_ + slots_.size(); });
            if (stopped_ || ended_) return false;
        }
        Slot failed{true, {}, nullptr};
        bool more = false;
        try {
            more = reader_.next(unit);
        } catch (...) { failed.error = std::current_exception(); }
        {
            std::lock_guard lock(mutex_);
            *index = given_;
            if (more || failed.error) given_++;
            if (!more) ended_ = true;
            if (failed.error) slots_[*index % slots_.size()] = std::move(failed);
        }
        if (!more) changed_.notify_all();
        return more;
    }

    CorpusReader& reader_;
    std::function<Result(const Unit&)> work_;
    std::mutex reader_mutex_, mutex_;  // mutex_: of all below
    std::condition_variable changed_;
    std::vector<Slot> slots_;       // unit i is in slot i modulo their number
    size_t given_ = 0, taken_ = 0;  // units read, and results taken
    bool ended_ = false, stopped_ = false;
    std::vector<std::thread> threads_;
};

// ==== a folder of shards =========================================================================

struct ShardRequest {
    std::vector<std::string> data;  // as expand_paths takes them; what lies in `out` is left out
    std::string out, tokenizer_name, jsonl_field = kJsonlField;
    size_t shard_tokens = 100000000;
    double val_fraction = 0.1;
    bool clean = false;
    int threads = 0;  // 0: as many as there are cores
    // Called with each file that was finished, its tokens, and those of the corpus so far.
    std::function<void(const std::string& path, size_t tokens, size_t so_far)> on_file;
};

// What was counted on the way through a corpus.
struct CorpusTotals {
    size_t documents = 0, bytes = 0, tokens = 0;  // tokens: <|endoftext|> included
    size_t lost_bytes = 0;                        // of characters that the vocabulary lacks
    size_t open_tokens = 0;                       // of a document that has begun and not ended
    std::vector<size_t> source_documents;
    Removed removed;
    Lengths lengths;
};

struct ShardReport {
    CorpusTotals totals;
    json document_tokens;  // see Lengths::summary
    size_t train_tokens = 0, val_tokens = 0, files = 0;
    size_t resumed_tokens = 0;  // that were in shards already when this began
    bool was_complete = false;
};

inline std::string hex_text(uint64_t value) {
    return format("%016llx", static_cast<unsigned long long>(value));
}

// Writes train_000000.bin, train_000001.bin, ..., val.bin and manifest.json into a folder, from
// text of any size in memory of one.
//
// The tokens of all documents in order, <|endoftext|> between one and the next, are cut every
// --shard-tokens into shards. When all are there, the last part `val_fraction` of the tokens is
// written as val.bin, the shard in which it begins is cut, and those behind it are removed.
//
// After each shard, progress.json records how to go on: the unit of the corpus in which the next
// shard begins, how many of its tokens are in shards already, what was counted before that unit,
// and a hash of all that was read before it, by which a corpus that has changed is noticed. The
// same command goes on there: it reads the text before that place again without encoding it (with
// `clean`, to know the documents that were there). What is left of a shard that a kill interrupted
// is removed. At the end manifest.json takes the place of progress.json. Both say by which options,
// tokenizer and sources the folder is made, and other ones are fail_input, by name.
class ShardBuilder {
  public:
    ShardBuilder(const ShardRequest& request, const Tokenizer& tokenizer)
        : request_(request), tokenizer_(tokenizer), width_(shard_width(tokenizer.vocab_size())) {
        if (tokenizer.kind() == Tokenizer::Kind::chars) token_bytes_ = bytes_per_token(tokenizer);
    }

    ShardReport run() {
        files_ = corpus_files();
        // Between `well` and `-known` no merge goes, but to a vocabulary of words that is a word.
        bool whole = request_.clean || tokenizer_.kind() == Tokenizer::Kind::words;
        reader_.emplace(files_, request_.jsonl_field, whole);
        make_folder(request_.out);
        lock_folder();
        remove_leftovers();
        origin_ = origin(true);
        totals_.source_documents.resize(files_.size());
        if (exists("manifest.json")) return complete_report();
        if (exists("progress.json")) resume();
        else begin();
        report_.resumed_tokens = written();
        if (!finishing_) encode_all();
        finish();
        report_.totals = totals_;
        report_.document_tokens = json::parse(text_of(totals_.lengths.summary()));
        return report_;
    }

  private:
    struct Entry {  // a shard that was written
        std::string file;
        size_t tokens;
        int largest_id;
        uint64_t hash;
    };
    struct Piece {  // a document, or a stretch of one
        size_t ids, bytes, lost_bytes;
        bool begins, ends;
        XXH128_hash_t hash;
    };
    struct EncodedUnit {
        uint64_t number = 0, digest = 0;
        size_t source = 0;
        std::vector<int> ids;
        std::vector<Piece> pieces;
        Removed removed;
    };

    std::string path(const std::string& name) const {
        return (fs::path(request_.out) / name).string();
    }
    bool exists(const std::string& name) const {
        std::error_code ignored;
        return fs::exists(path(name), ignored);
    }
    size_t written() const {
        size_t tokens = 0;
        for (const Entry& entry : entries_) tokens += entry.tokens;
        return tokens;
    }

    // ---- the folder and what it is made of ----

    // The files of the corpus, without those that this program writes into a folder of it.
    std::vector<std::string> corpus_files() const {
        std::error_code ignored;
        std::string out = fs::weakly_canonical(request_.out, ignored).string() + "/";
        std::vector<std::string> files;
        for (const std::string& file : expand_paths(request_.data))
            if (!fs::weakly_canonical(file, ignored).string().starts_with(out))
                files.push_back(file);
        if (files.empty()) fail_input("no text files were given");
        return files;
    }

    void lock_folder() {
        std::string name = path("lock");
        lock_.fd = open(name.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (lock_.fd < 0) fail_errno(name, "create");
        lock_.path = name;
        // A file system without locks is passed over.
        bool taken = flock(lock_.fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
        if (taken || !is_still_there(lock_.fd, name)) {
            lock_.path.clear();
            fail_input(
                "%s: another program makes shards in this folder; wait for it, or give "
                "another --out",
                request_.out.c_str());
        }
    }

    // What a kill left of files that were being written, and nothing else: the folder may have been
    // there before.
    void remove_leftovers() const {
        for (const auto& entry : fs::directory_iterator(request_.out)) {
            std::string name = target_of_temporary(entry.path().filename().string());
            bool shard =
                name.ends_with(".bin") && (name.starts_with("train_") || name.starts_with("val"));
            bool ours = shard || name == "manifest.json" || name == "progress.json" ||
                        name == "tokenizer.json" || name == "tokenizer_config.json";
            if (ours && entry.is_regular_file()) fs::remove(entry.path());
        }
    }

    ordered_json options() const {
        return {{"--shard-tokens", request_.shard_tokens},
                {"--val-fraction", request_.val_fraction},
                {"--clean", request_.clean},
                {"--jsonl-field", request_.jsonl_field}};
    }
    ordered_json tokenizer_facts() const {
        return {{"name", request_.tokenizer_name},
                {"hash", hex_text(tokenizer_.fingerprint())},
                {"vocab_size", tokenizer_.vocab_size()},
                {"end_of_text", tokenizer_.end_of_text()}};
    }
    // What the folder is made of, as both files say it; `modified` adds when the sources were.
    ordered_json origin(bool modified) const {
        ordered_json root;
        root["format"] = "llm.c token shards";
        root["version"] = 1;
        root["tokenizer"] = tokenizer_facts();
        root["options"] = options();
        root["sources"] = ordered_json::array();
        for (const Source& source : reader_->sources()) {
            ordered_json fact = {{"path", source.path}, {"bytes", source.bytes}};
            struct stat info {};
            if (modified && stat(source.path.c_str(), &info) == 0)
                fact["modified_ns"] =
                    int64_t(info.st_mtim.tv_sec) * 1000000000 + info.st_mtim.tv_nsec;
            root["sources"].push_back(fact);
        }
        return root;
    }

    static std::string text_of(const ordered_json& root, int indent = -1) {
        return root.dump(indent, ' ', true, json::error_handler_t::replace);
    }

    // Refuses to go on in a folder that is made otherwise, naming what differs.
    void check_origin(const json& there, const std::string& file, bool modified) const {
        const char* name = file.c_str();
        json here = json::parse(text_of(origin_));
        for (const auto& [option, value] : here.at("options").items()) {
            std::string was = there.at("options").at(option).dump();
            if (was != value.dump())
                fail_input(
                    "%s: the folder was begun with %s %s, and this is %s; give the same, or "
                    "another --out",
                    name, option.c_str(), was.c_str(), value.dump().c_str());
        }
        if (there.at("tokenizer").at("hash") != here.at("tokenizer").at("hash"))
            fail_input(
                "%s: the folder was begun with another tokenizer, %s; give the same "
                "--tokenizer, or another --out",
                name, there.at("tokenizer").at("name").dump().c_str());
        const json &was = there.at("sources"), &now = here.at("sources");
        for (size_t i = 0; i < std::max(was.size(), now.size()); i++) {
            if (i >= was.size() || i >= now.size() || was[i].at("path") != now[i].at("path"))
                fail_input(
                    "%s: the folder was begun with other --data: file %zu was %s and is %s; "
                    "give the same, or another --out",
                    name, i + 1, i < was.size() ? was[i].at("path").dump().c_str() : "none",
                    i < now.size() ? now[i].at("path").dump().c_str() : "none");
            bool same = was[i].at("bytes") == now[i].at("bytes");
            if (modified && now[i].contains("modified_ns"))
                same = same && was[i].at("modified_ns") == now[i].at("modified_ns");
            if (!same)
                fail_input("%s: has changed since the folder %s was begun; give another --out",
                           files_[i].c_str(), request_.out.c_str());
        }
    }

    // ---- progress ----

    static ordered_json entry_facts(const Entry& entry) {
        return {{"file", entry.file},
                {"tokens", entry.tokens},
                {"largest_id", entry.largest_id},
                {"xxh3", hex_text(entry.hash)}};
    }
    static Entry read_entry(const json& fact) {
        Entry entry{fact.at("file").get<std::string>(), fact.at("tokens").get<size_t>(),
                    fact.at("largest_id").get<int>(), hash_of(fact.at("xxh3"))};
        if (entry.file.find('/') != std::string::npos) throw std::invalid_argument("a path");
        return entry;
    }
    static uint64_t hash_of(const json& text) {
        return std::stoull(text.get<std::string>(), nullptr, 16);
    }
    // Fails unless a shard that was recorded is there, as it was. (Small ones are read.)
    void check_entry(const Entry& entry) const {
        Shard shard(path(entry.file), tokenizer_.vocab_size());
        if (shard.size() != entry.tokens || shard.checksum() != entry.hash)
            fail_input(
                "%s: is not the shard that was written here; remove the folder, or give "
                "another --out",
                shard.path().c_str());
    }

    void write_progress(const CorpusTotals& totals, uint64_t unit, uint64_t digest, size_t skip) {
        ordered_json root = origin_, removed = ordered_json::array();
        for (size_t kind = 0; kind < kRemovedKinds; kind++)
            removed.push_back({totals.removed.count[kind], totals.removed.bytes[kind]});
        root["shards"] = ordered_json::array();
        for (const Entry& entry : entries_) root["shards"].push_back(entry_facts(entry));
        root["val"] = ordered_json::array();
        for (const Entry& entry : val_) root["val"].push_back(entry_facts(entry));
        root["finishing"] = finishing_;
        root["next"] = {{"unit", unit}, {"digest", hex_text(digest)}, {"skip", skip}};
        root["totals"] = {{"documents", totals.documents},
                          {"bytes", totals.bytes},
                          {"tokens", totals.tokens},
                          {"lost_bytes", totals.lost_bytes},
                          {"open_tokens", totals.open_tokens},
                          {"source_documents", totals.source_documents},
                          {"removed", removed},
                          {"lengths", totals.lengths.state()}};
        if (finishing_) {
            root["source_hashes"] = ordered_json::array();
            for (uint64_t hash : source_hashes_) root["source_hashes"].push_back(hex_text(hash));
        }
        write_file_atomic(path("progress.json"), text_of(root));
    }

    void begin() {
        for (const auto& entry : fs::directory_iterator(request_.out)) {
            std::string name = entry.path().filename().string();
            if (name.ends_with(".bin") || name.ends_with(".npy"))
                fail_input(
                    "%s: has %s already, and no manifest.json says of what; give another "
                    "--out",
                    request_.out.c_str(), name.c_str());
        }
        write_progress(totals_, 0, 0, 0);
    }

    void resume() {
        std::string name = path("progress.json");
        json root = parse_json(read_file(name), name);
        try {
            check_origin(root, name, true);
            read_progress(root);
        } catch (const json::exception&) {
            fail_input("%s: not what this program writes; remove the folder, or give another --out",
                       name.c_str());
        } catch (const std::logic_error&) {
            fail_input("%s: is damaged; remove the folder, or give another --out", name.c_str());
        }
        if (!finishing_)
            for (const Entry& entry : entries_) check_entry(entry);
    }

    void read_progress(const json& root) {
        for (const json& fact : root.at("shards")) entries_.push_back(read_entry(fact));
        for (const json& fact : root.at("val")) val_.push_back(read_entry(fact));
        finishing_ = root.at("finishing");
        first_unit_ = root.at("next").at("unit");
        first_digest_ = hash_of(root.at("next").at("digest"));
        skip_ = root.at("next").at("skip");
        const json& facts = root.at("totals");
        totals_.documents = facts.at("documents"), totals_.bytes = facts.at("bytes");
        totals_.tokens = facts.at("tokens"), totals_.lost_bytes = facts.at("lost_bytes");
        totals_.open_tokens = facts.at("open_tokens");
        totals_.source_documents = facts.at("source_documents").get<std::vector<size_t>>();
        totals_.source_documents.resize(files_.size());
        for (size_t kind = 0; kind < kRemovedKinds; kind++) {
            totals_.removed.count[kind] = facts.at("removed").at(kind).at(0);
            totals_.removed.bytes[kind] = facts.at("removed").at(kind).at(1);
        }
        totals_.lengths.restore(facts.at("lengths"));
        if (finishing_)
            for (const json& hash : root.at("source_hashes"))
                source_hashes_.push_back(hash_of(hash));
        bool sound = written() == totals_.tokens + skip_;
        for (size_t i = 0; i < entries_.size(); i++) {
            bool whole = entries_[i].tokens == request_.shard_tokens;
            sound = sound && (whole || (finishing_ && i + 1 == entries_.size()));
        }
        if (!sound || (finishing_ && source_hashes_.size() != files_.size()))
            throw std::invalid_argument("counts that do not agree");
    }

    // ---- text to tokens ----

    // On any thread: nothing of this object is changed.
    EncodedUnit encode_unit(const Unit& unit) const {
        EncodedUnit result;
        result.number = unit.number, result.digest = unit.digest, result.source = unit.source;
        bool again = unit.number < first_unit_;  // its tokens are in shards already
        if (again && !request_.clean) return result;
        std::string joined, cleaned;  // joined: the documents, one behind the other
        std::vector<size_t> ends, id_ends;
        bool copied = unit.json_lines || request_.clean;
        auto take = [&](std::string_view text) {
            Piece piece{0, 0, 0, unit.json_lines || unit.begins, unit.json_lines || unit.ends, {}};
            if (request_.clean) {
                cleaned = clean_document(text, &result.removed);
                text = cleaned;
                if (text.find_first_not_of(" \t\n") == std::string_view::npos) {
                    result.removed.add(kEmptyDocuments, int64_t(text.size()));
                    return;
                }
                piece.hash = XXH3_128bits(text.data(), text.size());
            }
            piece.bytes = text.size();
            ends.push_back((ends.empty() ? 0 : ends.back()) + text.size());
            result.pieces.push_back(piece);
            if (copied && !again) joined += text;
            else if (!again) encode(unit, text, ends, &result, &id_ends);
        };
        for_each_document(unit, files_[unit.source], request_.jsonl_field, take);
        if (again) return result;
        if (copied) encode(unit, joined, ends, &result, &id_ends);
        count_ids(id_ends, &result);
        return result;
    }
    void encode(const Unit& unit, std::string_view texts, const std::vector<size_t>& ends,
                EncodedUnit* result, std::vector<size_t>* id_ends) const {
        auto place = [&] {
            const std::string& path = files_[unit.source];
            if (unit.json_lines)
                return format("%s: a document from line %zu on", path.c_str(), unit.first_line);
            return unit.begins ? path : path + ": behind its first part";
        };
        with_place(place, [&] { tokenizer_.encode_each(texts, ends, result->ids, *id_ends); });
    }
    // Of each piece the number of ids, and the bytes that are in none.
    void count_ids(const std::vector<size_t>& id_ends, EncodedUnit* unit) const {
        size_t begin = 0;
        for (size_t i = 0; i < id_ends.size(); begin = id_ends[i++]) {
            Piece& piece = unit->pieces[i];
            piece.ids = id_ends[i] - begin;
            if (token_bytes_.empty()) continue;
            piece.lost_bytes = piece.bytes;
            for (size_t j = begin; j < id_ends[i]; j++)
                piece.lost_bytes -= size_t(token_bytes_[size_t(unit->ids[j])]);
        }
    }

    void encode_all() {
        size_t threads = request_.threads > 0 ? size_t(request_.threads)
                                              : std::max(1u, std::thread::hardware_concurrency());
        OrderedPipeline<EncodedUnit> pipeline(
            *reader_, threads, [this](const Unit& unit) { return encode_unit(unit); });
        uint64_t digest = 0;  // of the unit before
        for (EncodedUnit unit; pipeline.next(&unit); digest = unit.digest) {
            if (unit.number < first_unit_) {
                for (const Piece& piece : unit.pieces) is_new(piece);
                continue;
            }
            if (unit.number == first_unit_ && digest != first_digest_) fail_changed();
            take_unit(unit, digest);
        }
        if (reader_ended_at_ < first_unit_) fail_changed();
        if (writer_) finish_shard();
        for (const Source& source : reader_->sources()) source_hashes_.push_back(source.hash);
        if (totals_.tokens == 0)
            fail_input("%s: no tokens of this vocabulary; give more text", files_[0].c_str());
        finishing_ = true;
        write_progress(totals_, 0, 0, 0);
    }
    [[noreturn]] void fail_changed() const {
        fail_input("%s: the text has changed since the folder %s was begun; give another --out",
                   files_[0].c_str(), request_.out.c_str());
    }

    // Whether no document before was the same; with `clean` only.
    bool is_new(const Piece& piece) {
        return !request_.clean || seen_.insert({piece.hash.low64, piece.hash.high64}).second;
    }

    // Writes and counts the documents of a unit.
    void take_unit(const EncodedUnit& unit, uint64_t digest_before) {
        unit_ = {unit.number, digest_before, 0, {}};
        size_t most = unit.ids.size() + unit.pieces.size();
        size_t in_shard = writer_ ? writer_->size() : 0;
        if (in_shard + most >= request_.shard_tokens) unit_.totals_before = totals_;
        totals_.removed.add(unit.removed);
        const int* ids = unit.ids.data();
        int end_of_text = tokenizer_.end_of_text();
        for (const Piece& piece : unit.pieces) {
            if (is_new(piece)) {
                if (piece.begins && totals_.documents > 0 && end_of_text >= 0) put(&end_of_text, 1);
                totals_.documents += piece.begins;
                totals_.source_documents[unit.source] += piece.begins;
                totals_.bytes += piece.bytes, totals_.lost_bytes += piece.lost_bytes;
                put(ids, piece.ids);
                totals_.open_tokens += piece.ids;
                if (piece.ends) totals_.lengths.add(std::exchange(totals_.open_tokens, 0));
            } else {
                totals_.removed.add(kDuplicateDocuments, int64_t(piece.bytes));
            }
            ids += piece.ids;
        }
        reader_ended_at_ = unit.number;
        if (unit.number == first_unit_ && skip_ > 0) fail_changed();
    }

    // Writes tokens to the shard that is open, those that are in shards already excepted.
    void put(const int* ids, size_t count) {
        totals_.tokens += count;
        size_t passed = std::min(skip_, count);
        skip_ -= passed, unit_.written += passed;
        ids += passed, count -= passed;
        while (count > 0) {
            if (!writer_)
                writer_.emplace(path(format("train_%06zu.bin", entries_.size())), width_, true);
            size_t part = std::min(count, request_.shard_tokens - writer_->size());
            writer_->add(ids, part);
            ids += part, count -= part, unit_.written += part;
            if (writer_->size() == request_.shard_tokens) finish_shard();
        }
    }

    void finish_shard() {
        writer_->commit();
        entries_.push_back({format("train_%06zu.bin", entries_.size()), writer_->size(),
                            writer_->largest(), writer_->hash()});
        bool last = writer_->size() < request_.shard_tokens;  // the corpus is at its end
        writer_.reset();
        if (!last) write_progress(unit_.totals_before, unit_.number, unit_.digest, unit_.written);
        announce(entries_.back(), written());
    }
    void announce(const Entry& entry, size_t so_far) const {
        if (request_.on_file) request_.on_file(path(entry.file), entry.tokens, so_far);
    }

    // ---- the validation part, and the end ----

    // Writes tokens [begin, end) of the shards that are there to a new one.
    Entry copy_tokens(const std::string& file, size_t begin, size_t end) const {
        constexpr size_t kBlock = 1 << 20;
        std::vector<int> ids(kBlock);
        ShardWriter writer(path(file), width_, true);
        size_t first = 0;  // token of the shard
        for (const Entry& entry : entries_) {
            size_t last = first + entry.tokens;
            if (last > begin && first < end) {
                Shard shard(path(entry.file), tokenizer_.vocab_size());
                size_t to = std::min(end, last) - first;
                for (size_t at = std::max(begin, first) - first; at < to; at += kBlock) {
                    size_t count = std::min(kBlock, to - at);
                    shard.copy(at, count, ids.data());
                    writer.add(ids.data(), count);
                }
            }
            first = last;
        }
        writer.commit();
        return {file, writer.size(), writer.largest(), writer.hash()};
    }

    // Moves the end of the tokens to the validation set. Each step can be done again after a kill:
    // the shards are changed only when progress.json says that val.bin is there.
    void finish() {
        size_t total = totals_.tokens, end = total - size_t(double(total) * request_.val_fraction);
        if (end == 0) fail_input("%s: no tokens to train on; give more text", files_[0].c_str());
        if (end < total && val_.empty()) {
            constexpr size_t kMost = INT32_MAX;  // that a header can count
            bool one = total - end <= kMost;
            for (size_t begin = end; begin < total; begin += kMost) {
                std::string file = one ? "val.bin" : format("val_%06zu.bin", val_.size());
                val_.push_back(copy_tokens(file, begin, std::min(total, begin + kMost)));
            }
            write_progress(totals_, 0, 0, 0);
        }
        for (const Entry& entry : val_) check_entry(entry), announce(entry, total);
        size_t kept = (end + request_.shard_tokens - 1) / request_.shard_tokens;
        Entry& last = entries_.at(kept - 1);
        size_t begin = (kept - 1) * request_.shard_tokens;
        if (last.tokens > end - begin) {
            // If it was cut before a kill, it is copied whole.
            Shard shard(path(last.file), tokenizer_.vocab_size());
            if (shard.size() != last.tokens && shard.size() != end - begin) check_entry(last);
            last = copy_tokens(last.file, begin, end);
        }
        std::error_code ignored;
        for (size_t i = kept; i < entries_.size(); i++) fs::remove(path(entries_[i].file), ignored);
        entries_.resize(kept);
        for (const Entry& entry : entries_) check_entry(entry);
        report_.train_tokens = end, report_.val_tokens = total - end;
        report_.files = entries_.size() + val_.size();
        tokenizer_.save(request_.out);
        write_manifest();
        fs::remove(path("progress.json"), ignored);
    }

    void write_manifest() const {
        ordered_json root = origin(false);
        for (size_t i = 0; i < files_.size(); i++) {
            root["sources"][i]["documents"] = totals_.source_documents[i];
            root["sources"][i]["xxh3"] = hex_text(source_hashes_.at(i));
        }
        root["documents"] = totals_.documents;
        root["bytes"] = totals_.bytes;
        root["tokens"] = totals_.tokens;
        root["train_tokens"] = report_.train_tokens, root["val_tokens"] = report_.val_tokens;
        root["lost_bytes"] = totals_.lost_bytes;
        root["document_tokens"] = totals_.lengths.summary();
        if (request_.clean)
            for (size_t kind = 0; kind < kRemovedKinds; kind++)
                root["removed"][kRemovedNames[kind].key] = {{"count", totals_.removed.count[kind]},
                                                            {"bytes", totals_.removed.bytes[kind]}};
        for (const std::vector<Entry>* part : {&entries_, &val_}) {
            const char* name = part == &val_ ? "val" : "train";
            root[name] = ordered_json::array();
            for (const Entry& entry : *part) root[name].push_back(entry_facts(entry));
        }
        write_file_atomic(path("manifest.json"), text_of(root, 1) + "\n");
    }

    // What a folder that is ready says of itself, after a look at its shards.
    ShardReport complete_report() {
        std::string name = path("manifest.json");
        json root = parse_json(read_file(name), name);
        try {
            check_origin(root, name, false);
            for (const char* part : {"train", "val"})
                for (const json& fact : root.at(part))
                    check_entry(read_entry(fact)), report_.files++;
            CorpusTotals& totals = report_.totals;
            totals.documents = root.at("documents"), totals.bytes = root.at("bytes");
            totals.tokens = root.at("tokens"), totals.lost_bytes = root.at("lost_bytes");
            report_.document_tokens = root.at("document_tokens");
            report_.train_tokens = root.at("train_tokens");
            report_.val_tokens = root.at("val_tokens");
            for (size_t kind = 0; request_.clean && kind < kRemovedKinds; kind++) {
                const json& fact = root.at("removed").at(kRemovedNames[kind].key);
                totals.removed.count[kind] = fact.at("count");
                totals.removed.bytes[kind] = fact.at("bytes");
            }
        } catch (const json::exception&) {
            fail_input("%s: not what this program writes; remove the folder, or give another --out",
                       name.c_str());
        } catch (const std::logic_error&) {
            fail_input("%s: is damaged; remove the folder, or give another --out", name.c_str());
        }
        report_.was_complete = true;
        report_.resumed_tokens = report_.totals.tokens;
        std::error_code ignored;
        fs::remove(path("progress.json"), ignored);
        return report_;
    }

    const ShardRequest& request_;
    const Tokenizer& tokenizer_;
    int width_;
    std::vector<int> token_bytes_;  // of a vocabulary that may lack characters
    std::vector<std::string> files_;
    std::optional<CorpusReader> reader_;
    ordered_json origin_;  // when this began
    struct Lock {
        int fd = -1;
        std::string path;  // to be removed
        ~Lock() {
            if (!path.empty()) unlink(path.c_str());
            if (fd >= 0) close(fd);
        }
    } lock_;

    // Where an interrupted run goes on: at this unit, behind so many of its tokens.
    uint64_t first_unit_ = 0, first_digest_ = 0, reader_ended_at_ = 0;
    size_t skip_ = 0;

    struct {
        uint64_t number = 0, digest = 0;  // digest: of what was read before it
        size_t written = 0;               // of its tokens, into any shard
        CorpusTotals totals_before;       // where a shard may end in it
    } unit_;
    CorpusTotals totals_;
    std::set<std::pair<uint64_t, uint64_t>> seen_;  // documents, by their hashes of 128 bits
    std::optional<ShardWriter> writer_;
    std::vector<Entry> entries_, val_;
    std::vector<uint64_t> source_hashes_;
    bool finishing_ = false;  // all text is in entries_
    ShardReport report_;
};

// See ShardBuilder.
inline ShardReport build_shards(const ShardRequest& request, const Tokenizer& tokenizer) {
    return ShardBuilder(request, tokenizer).run();
}
