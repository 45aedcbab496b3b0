// The tests of corpus.h: packed text, lines of JSON, the cleaner, and folders of shards, which are
// the same bytes for any number of threads and after any interruption.

#include "../../corpus.h"

#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <map>

#include "tools.h"

// In place of the C library's: while it is set, no file system has locks.
static bool corpus_no_locks = false;
extern "C" int flock(int fd, int operation) noexcept {
    if (!corpus_no_locks) return int(syscall(SYS_flock, fd, operation));
    errno = ENOSYS;
    return -1;
}

namespace {

std::string corpus_put(const std::string& path, std::string_view content) {
    std::ofstream(path, std::ios::binary) << content;
    return path;
}

// Sentences of words that are drawn, with characters of several lengths and runs without a space.
std::string corpus_text(size_t bytes, unsigned seed) {
    const char* words[] = {"the",   "tree", "went", "to",   "Ärger", "élan",  "日本語", "naïve",
                           "don't", "1984", "snow", "over", "...",   "river", "🙂",   "and"};
    std::mt19937 generator(seed);
    std::string text;
    while (text.size() < bytes) {
        text += words[generator() % 16];
        text += generator() % 12 == 0 ? ".\n" : " ";
        if (generator() % 2000 == 0) text += std::string(3000, char('a' + generator() % 26)) + "\n";
    }
    return text;
}

std::string corpus_json(const std::vector<std::string>& documents) {
    std::string lines;
    for (const std::string& text : documents)
        lines +=
            json{{"id", lines.size()}, {"text", text}, {"meta", {{"text", "not this"}}}}.dump() +
            "\n";
    return lines;
}

#ifdef GPT2_ZLIB
std::string corpus_gzip(std::string_view text) {
    z_stream stream{};
    deflateInit2(&stream, 6, Z_DEFLATED, MAX_WBITS + 16, 8, Z_DEFAULT_STRATEGY);
    std::string out(deflateBound(&stream, uLong(text.size())) + 64, '\0');
    stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
    stream.avail_in = uInt(text.size());
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = uInt(out.size());
    EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
    out.resize(stream.total_out);
    deflateEnd(&stream);
    return out;
}
#else
std::string corpus_gzip(std::string_view) { return ""; }
#endif

#ifdef GPT2_ZSTD
std::string corpus_zstd(std::string_view text) {
    std::unique_ptr<ZSTD_CCtx, size_t (*)(ZSTD_CCtx*)> context(ZSTD_createCCtx(), ZSTD_freeCCtx);
    ZSTD_CCtx_setParameter(context.get(), ZSTD_c_checksumFlag, 1);
    std::string out(ZSTD_compressBound(text.size()), '\0');
    out.resize(ZSTD_compress2(context.get(), out.data(), out.size(), text.data(), text.size()));
    return out;
}
#else
std::string corpus_zstd(std::string_view) { return ""; }
#endif

// How a file of each packing is made; the empty string where this program was built without it.
struct CorpusPacker {
    const char* extension;
    std::string (*pack)(std::string_view);
};
const CorpusPacker kCorpusPackers[] = {{".gz", corpus_gzip}, {".zst", corpus_zstd}};

std::string corpus_read_error(const std::string& path) {
    return error_of([&] { read_text({path}); });
}

std::vector<int> corpus_ids(const std::string& folder, int vocab_size) {
    std::vector<int> ids;
    for (const std::string& pattern : {folder + "/train_*.bin", folder + "/val*.bin"}) {
        glob_t found{};
        if (glob(pattern.c_str(), 0, nullptr, &found) == 0)
            for (size_t i = 0; i < found.gl_pathc; i++) {
                Shard shard(found.gl_pathv[i], vocab_size);
                size_t before = ids.size();
                ids.resize(before + shard.size());
                shard.copy(0, shard.size(), ids.data() + before);
            }
        globfree(&found);
    }
    return ids;
}

std::string corpus_hash(const std::string& path) {
    MappedFile file(path);
    return format("%zu bytes, ", file.size()) + hex_text(hash_bytes(file.data(), file.size()));
}

// Every file of a folder by its name: its size and hash.
std::map<std::string, std::string> corpus_folder(const std::string& folder) {
    std::map<std::string, std::string> files;
    for (const auto& entry : fs::directory_iterator(folder))
        files[entry.path().filename().string()] = corpus_hash(entry.path().string());
    return files;
}

// A corpus of every kind of file, and a tokenizer trained on a part of it.
struct CorpusFiles {
    std::string folder = test_folder();
    Tokenizer tokenizer = Tokenizer::train_bpe(corpus_text(50000, 1), 400);
    ShardRequest request;

    explicit CorpusFiles(size_t scale = 1) {
        fs::create_directories(folder + "/data");
        corpus_put(folder + "/data/1.txt", corpus_text(scale * 700000, 2));
        std::vector<std::string> documents;
        for (unsigned i = 0; i < 300 * scale; i++)
            documents.push_back(corpus_text(i * 7 % 5000, i));
        documents.push_back(documents[7]);
        corpus_put(folder + "/data/2.jsonl", corpus_json(documents));
        corpus_put(folder + "/data/3.txt", "");
        corpus_put(folder + "/data/4.txt", "The end.");
        for (const CorpusPacker& packer : kCorpusPackers) {
            std::string text = packer.pack(corpus_text(scale * 500000, 3));
            std::string lines = packer.pack(corpus_json({documents[3], "", "One more."}));
            if (text.empty()) continue;
            corpus_put(folder + "/data/5.txt" + packer.extension, text);
            corpus_put(folder + "/data/6.jsonl" + packer.extension, lines);
        }
        request.data = {folder + "/data"};
        request.tokenizer_name = "bpe";
        request.shard_tokens = 100000;
    }
    ShardReport build(const std::string& name, int threads = 2) {
        ShardRequest r = request;
        r.out = folder + "/" + name, r.threads = threads;
        return build_shards(r, tokenizer);
    }
    std::string error(const std::string& name) {
        return error_of([&] { build(name); });
    }
    std::map<std::string, std::string> files(const std::string& name) {
        return corpus_folder(folder + "/" + name);
    }
};

}  // namespace

// ---- packed text ----

TEST(Packed, TextIsTheTextThatWasPacked) {
    std::string folder = test_folder(), text = corpus_text(3000000, 5);
    for (const CorpusPacker& packer : kCorpusPackers) {
        if (packer.pack("x").empty()) GTEST_SKIP() << "built without " << packer.extension;
        std::string path = corpus_put(folder + "/a.txt" + packer.extension, packer.pack(text));
        EXPECT_EQ(read_text({path}).text, text);
        std::string half = text.substr(0, 1500000), rest = text.substr(1500000);
        corpus_put(path, packer.pack(half) + packer.pack("") + packer.pack(rest));
        EXPECT_EQ(read_text({path}).text, text) << "of several frames";
        for (size_t size : {1 << 17, 1 << 18, 1 << 19, 3 << 18, 1 << 20, 1 << 21})
            for (size_t more : {size_t(0), size_t(1)}) {  // of bytes that a buffer may have
                corpus_put(path, packer.pack(text.substr(0, size + more)));
                EXPECT_EQ(read_text({path}).text, text.substr(0, size + more));
            }
        corpus_put(path, packer.pack(""));
        expect_refused(corpus_read_error(path), path + ": empty");
        std::string lines = folder + "/b.jsonl" + packer.extension;
        corpus_put(lines, packer.pack(corpus_json({"one", "two\n"})));
        EXPECT_EQ(read_text({lines}).document_ends, (std::vector<size_t>{3, 7}));
    }
}

TEST(Packed, TextThatIsDamagedIsRefused) {
    std::string folder = test_folder(), text = corpus_text(400, 6);
    for (const CorpusPacker& packer : kCorpusPackers) {
        std::string whole = packer.pack(text);
        if (whole.empty()) GTEST_SKIP() << "built without " << packer.extension;
        std::string path = folder + "/a.txt" + packer.extension;
        for (size_t size = 1; size < whole.size(); size++) {
            corpus_put(path, whole.substr(0, size));
            expect_refused(corpus_read_error(path), "cut short; fetch it again");
        }
        corpus_put(path, whole + "x");
        expect_refused(corpus_read_error(path), path + ": byte ");
        corpus_put(path, text);
        expect_refused(corpus_read_error(path), path + ": byte 0: cannot unpack");
        size_t refused = 0;
        for (size_t at = 0; at < whole.size(); at++) {
            std::string other = whole;
            other[at] = char(other[at] ^ 1 << at % 8);
            corpus_put(path, other);
            try {  // gzip's header has bytes that say nothing of the text
                EXPECT_EQ(read_text({path}).text, text) << at;
            } catch (const Error& error) {
                EXPECT_EQ(error.exit_code, kExitInput);
                refused++;
            }
        }
        EXPECT_GE(refused, whole.size() - 10);
    }
}

TEST(Packed, TextIsRefusedWhereNothingUnpacksIt) {
    const std::pair<CorpusPacker, const char*> kinds[] = {
        {kCorpusPackers[0], "built without zlib (zlib1g-dev); unpack the file (gzip -d)"},
        {kCorpusPackers[1], "built without zstd (libzstd-dev); unpack the file (zstd -d)"}};
    for (const auto& [packer, line] : kinds) {
        if (!packer.pack("x").empty()) continue;  // it does
        std::string path = corpus_put(test_folder() + "/a.txt" + packer.extension, "x");
        expect_refused(corpus_read_error(path), line);
    }
}

TEST(Packed, TextOfAKindThatIsNotReadIsRefusedByName) {
    std::string path = corpus_put(test_folder() + "/a.parquet", "PAR1....PAR1");
    expect_refused(corpus_read_error(path),
                   "a.parquet: Parquet is not read; make JSON lines of it: duckdb");
    std::string folder = test_folder();
    corpus_put(folder + "/a.tar.gz", std::string("\x1f\x8b\0\0", 4));
    corpus_put(folder + "/b.txt", "text");
    EXPECT_EQ(expand_paths({folder}), std::vector<std::string>{folder + "/b.txt"});
}

// ---- lines of JSON ----

TEST(JsonLines, AreADocumentEach) {
    std::string path = test_folder() + "/a.jsonl";
    corpus_put(path,
               "{\"text\": \"a\\n\\u00e9\\ud83d\\ude42\"}\r\n\n  \n{\"x\": {\"text\": 1}, "
               "\"text\": \"b\"}\n"
               "{\"text\": \"\"}\n{\"list\": [{\"text\": 2}], \"text\": \"c\", \"n\": 1.5}");
    TextCorpus corpus = read_text({path});
    EXPECT_EQ(corpus.text, "a\né🙂bc");
    EXPECT_EQ(corpus.document_ends, (std::vector<size_t>{8, 9, 10}));
    EXPECT_EQ(read_text({path}, "").text, read_file(path)) << "as plain text";
    corpus_put(path, "{\"content\": \"x\"}\n");
    EXPECT_EQ(read_text({path}, "content").text, "x");
}

TEST(JsonLines, ThatAreNoneAreRefusedByTheirNumber) {
    std::string path = test_folder() + "/a.jsonl";
    auto error = [&](std::string line) {
        corpus_put(path, "{\"text\": \"good\"}\n\n" + line + "\n{\"text\": \"good\"}\n");
        return corpus_read_error(path);
    };
    std::string at = path + ": line 3: ";
    expect_refused(error("{\"text\": \"x\""), at + "byte");
    for (const char* line :
         {"{", "{\"text\"", "x", "{\"text\": \"x\"} {}", "{\"text\": \"\\ud800\"}",
          "{\"text\": \"\xff\"}", "{'text': 'x'}", "{\"text\": \"x\",}", "{\"n\": 1e999}"})
        expect_refused(error(line), "not valid JSON; mend or remove the line");
    std::string holes("\0\0", 2);  // as a disk leaves them where the power was cut
    expect_refused(error("{\"text\": \"x\"}" + holes + "{\"text\": \"y\"}"), at + "byte 14: not");
    expect_refused(error("{\"text\": \"x\"}" + holes), at + "byte 14: not valid JSON");
    expect_refused(error(holes + "{\"text\": \"x\"}"), at + "byte 1: not valid JSON");
    for (const char* line : {"1", "null", "\"text\"", "[]", "[{\"text\": \"x\"}]"})
        expect_refused(error(line), at + "no JSON object");
    expect_refused(error("{}"), at + "no field \"text\"; name the one");
    expect_refused(error("{\"a\": {\"text\": \"x\"}}"), at + "no field \"text\"");
    expect_refused(error("{\"Text\": \"x\"}"), at + "no field \"text\"");
    for (const char* value : {"1", "null", "true", "[\"x\"]", "{\"x\": 1}", "1.5", "-1"})
        expect_refused(error(format("{\"text\": %s}", value)), at + "\"text\" is no string");
    expect_refused(error("{\"text\": \"a\", \"text\": \"b\"}"), at + "\"text\" is there twice");
    EXPECT_EQ(error("{\"text\": \"x\", \"y\": " + std::string(1000000, '[') +
                    std::string(1000000, ']') + "}"),
              "")
        << "depth costs nothing";
    std::string whole = corpus_json({"some text", "more"});
    for (size_t size = 1; size < whole.size(); size++) {
        corpus_put(path, whole.substr(0, size));
        std::string said = corpus_read_error(path);
        size_t first = whole.find('\n');
        bool complete = size == first || size == first + 1 || size + 1 == whole.size();
        EXPECT_EQ(said.empty(), complete) << size << said;
    }
}

// ---- the order of units ----

// A text of many units gives the tokens that it gives as a whole, packed or not.
TEST(Corpus, UnitsOfADocumentHaveTheTokensOfTheWhole) {
    std::string folder = test_folder(), text = corpus_text(5000000, 8);
    text.insert(2500000, std::string(2500000, 'x'));  // no place to cut for more than a unit
    Tokenizer tokenizer = Tokenizer::train_bpe(text.substr(0, 50000), 400);
    std::vector<int> whole = tokenizer.encode(text);
    std::vector<std::string> paths = {corpus_put(folder + "/a.txt", text)};
    for (const CorpusPacker& packer : kCorpusPackers)
        if (std::string packed = packer.pack(text); !packed.empty())
            paths.push_back(corpus_put(folder + "/a.txt" + packer.extension, packed));
    for (const std::string& path : paths) {
        CorpusReader reader({path}, "text", false);
        std::vector<int> ids;
        size_t units = 0;
        bool ended = false;
        for (Unit unit; reader.next(&unit); units++) {
            EXPECT_EQ(unit.begins, units == 0);
            EXPECT_FALSE(ended);
            ended = unit.ends;
            for_each_document(unit, path, "text",
                              [&](std::string_view part) { tokenizer.encode(part, ids, 1); });
        }
        EXPECT_TRUE(ended);
        EXPECT_GE(units, 4u);
        EXPECT_EQ(ids, whole) << path;
        EXPECT_EQ(reader.sources()[0].hash,
                  hash_bytes(read_file(path).data(), read_file(path).size()));
    }
}

// Texts that are encoded together have the ids that each has alone, wherever they end: inside
// words, characters and runs of spaces.
TEST(Corpus, DocumentsThatAreEncodedTogetherDoNotKnowOfEachOther) {
    std::string text = corpus_text(300000, 9);
    std::mt19937 generator(4);
    for (const Tokenizer& tokenizer :
         {Tokenizer::train_bpe(text.substr(0, 50000), 500), Tokenizer::bytes(),
          Tokenizer::chars(text.substr(0, 1000))}) {
        std::vector<size_t> ends, id_ends;
        for (size_t end = 0; end < text.size();)
            ends.push_back(end = std::min(end + generator() % 300, text.size()));
        std::vector<int> ids, expected;
        tokenizer.encode_each(text, ends, ids, id_ends);
        ASSERT_EQ(id_ends.size(), ends.size());
        size_t begin = 0;
        for (size_t i = 0; i < ends.size(); begin = ends[i++]) {
            tokenizer.encode(std::string_view(text).substr(begin, ends[i] - begin), expected, 1);
            ASSERT_EQ(id_ends[i], expected.size()) << i;
        }
        EXPECT_EQ(ids, expected);
    }
}

// ---- cleaning ----

namespace {

std::string corpus_clean(std::string_view text, Removed* removed = nullptr) {
    Removed unused;
    return clean_document(text, removed != nullptr ? removed : &unused);
}

}  // namespace

TEST(Clean, TakesLicencesOfBooksAway) {
    std::string head = "The Project Gutenberg eBook of Verse\n\nTitle: Verse\n\n";
    std::string start = "*** START OF THE PROJECT GUTENBERG EBOOK VERSE ***\n";
    std::string book = "\nFirst line,\n  second line.\n\nTHE END\n";
    std::string end = "*** END OF THE PROJECT GUTENBERG EBOOK VERSE ***\n";
    std::string licence =
        "Updated editions will replace the previous one.\n" + std::string(18000, 'l') + "\n";
    Removed removed;
    EXPECT_EQ(corpus_clean(head + start + book + end + licence, &removed), book);
    EXPECT_EQ(removed.count[kLicenceHeaders], 1);
    EXPECT_EQ(removed.bytes[kLicenceHeaders], int64_t(head.size() + start.size()));
    EXPECT_EQ(removed.bytes[kLicenceFooters], int64_t(end.size() + licence.size()));
    EXPECT_EQ(corpus_clean(book + end + licence), book);
    EXPECT_EQ(corpus_clean(head + start + book), book);
    std::string two = head + start + book + end + licence;
    EXPECT_EQ(corpus_clean(two + two), book + book) << "two books in a file";
    EXPECT_EQ(
        corpus_clean("\xef\xbb\xbf" + head +
                     "***START OF THIS PROJECT GUTENBERG EBOOK A LONG\n"
                     "TITLE, IN TWO LINES***\n" +
                     book + "End of the Project Gutenberg EBook of Verse\n\n" + end + licence),
        book);
    EXPECT_EQ(
        corpus_clean("Header\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n" +
                     book),
        book);
    // What only speaks of it stays.
    for (const std::string& text :
         {std::string("He wrote *** START OF THE PROJECT GUTENBERG EBOOK *** on the wall.\n"),
          std::string("Project Gutenberg is a library.\n"),
          std::string("End of Project Gutenberg's first year.\nMore.\n"),
          std::string(40000, 'a') + "\n" + start + std::string(40000, 'b') + "\n",
          std::string(40000, 'a') + "\n" + end + std::string(40000, 'b') + "\n"})
        EXPECT_EQ(corpus_clean(text), text);
}

TEST(Clean, ShortensRunsOfOneLineOnly) {
    std::string line = "page header\n", run;
    for (int i = 0; i < 8; i++) run += line;
    EXPECT_EQ(corpus_clean("a\n" + run + "b\n"), "a\n" + run + "b\n") << "8 are no run";
    Removed removed;
    EXPECT_EQ(corpus_clean("a\n" + run + line + "b\n", &removed), "a\n" + line + "b\n");
    EXPECT_EQ(removed.count[kRepeatedLines], 8);
    EXPECT_EQ(removed.bytes[kRepeatedLines], int64_t(run.size()));
    EXPECT_EQ(corpus_clean(run + line), line) << "at the end";
    EXPECT_EQ(corpus_clean(std::string(100, '\n')), std::string(100, '\n')) << "blank lines stay";
    std::string refrain;
    for (int i = 0; i < 100; i++) refrain += "With a hey, ho, the wind and the rain,\n\n";
    EXPECT_EQ(corpus_clean(refrain), refrain);
}

TEST(Clean, TakesControlCharactersAwayAndComposes) {
    Removed removed;
    EXPECT_EQ(corpus_clean(std::string("a\0b\x01\tc\x7f\x1b[1md\f\n\xc2\x80\xc2\x9f\xc2\x85"
                                       "e",
                                       21),
                           &removed),
              "ab\tc[1md\n\xc2\x85"
              "e");
    EXPECT_EQ(removed.count[kControlCharacters], 7);
    EXPECT_EQ(removed.bytes[kControlCharacters], 9);
    EXPECT_EQ(corpus_clean("a\r\nb\rc\n\r\n", &removed), "a\nb\nc\n\n");
    EXPECT_EQ(removed.count[kCarriageReturns], 3);
    EXPECT_EQ(removed.bytes[kCarriageReturns], 2);
    EXPECT_EQ(corpus_clean("e\xcc\x81t\xc3\xa9\n", &removed), "\xc3\xa9t\xc3\xa9\n");
    EXPECT_EQ(removed.count[kComposedLines], 1);
    EXPECT_EQ(removed.bytes[kComposedLines], 1);
    EXPECT_EQ(corpus_clean("\xff"
                           "e\xcc\x81\xe2\x84\xab\xc3"),
              "\xff\xc3\xa9\xc3\x85\xc3")
        << "not UTF-8";
    // A nukta, Hangul by letters, and one whose form C is longer.
    EXPECT_EQ(corpus_clean("\u1112\u1161\u11ab"), "\ud55c");
    EXPECT_EQ(corpus_clean("\u0958"), "\u0915\u093c");
    EXPECT_EQ(corpus_clean("\u05d0\u05b1\u05b0"), "\u05d0\u05b0\u05b1") << "only put in order";
    for (const char* text : {"日本語 ｶﾅ ﬁ ½ 🙂👨‍👩‍👧 ế Ω\n", "ﷺ ﻻ\n",
                             "\u200f\u202e\ufeff\n"})
        EXPECT_EQ(corpus_clean(text), text);
}

TEST(Clean, SortsNoEndOfMarks) {
    std::string marks, sorted;  // an acute above and a grave below, which goes first
    for (int i = 0; i < 128; i++) marks += "\u0301\u0316";
    for (int i = 0; i < 128; i++) sorted += "\u0316";
    for (int i = 0; i < 128; i++) sorted += "\u0301";
    EXPECT_EQ(corpus_clean("x" + marks + "e\u0301"), "x" + sorted + "\u00e9");
    EXPECT_EQ(corpus_clean("x" + marks + marks + "\xff\xff"), "x" + sorted + sorted + "\xff\xff");
    std::string line = "x";  // would not end in a minute if it were quadratic
    for (int i = 0; i < 2000; i++) line += marks;
    EXPECT_EQ(corpus_clean(line).size(), line.size());
}

// Whether a character needs work at all is asked of a table; without asking, the result is the
// same.
TEST(Clean, KnowsWhichTextIsComposedAlready) {
    for (utf8proc_int32_t c = 1; c < 0x110000; c++) {
        if (c >= 0xd800 && c < 0xe000) continue;
        utf8proc_uint8_t bytes[4];
        std::string character(reinterpret_cast<char*>(bytes), 0);
        character.assign(reinterpret_cast<char*>(bytes), size_t(utf8proc_encode_char(c, bytes)));
        if (may_compose(character)) continue;
        for (const char* before : {"a", "\u0915", "\u1112", "\u1100\u1161", "\u0928"}) {
            std::string text = before + character, composed;
            if (may_compose(text)) continue;
            append_composed(text, &composed);
            ASSERT_EQ(composed, text) << "U+" << std::hex << c;
        }
    }
}

TEST(Clean, LeavesVerseAndSpeakersAlone) {
    std::string path = "../shared/data/tinyshakespeare.txt";
    std::error_code ignored;
    if (!fs::exists(path, ignored)) GTEST_SKIP() << "no " << path;
    std::string text = read_file(path);
    Removed removed;
    EXPECT_EQ(corpus_clean(text, &removed), text);
    for (size_t kind = 0; kind < kRemovedKinds; kind++) EXPECT_EQ(removed.count[kind], 0) << kind;
}

// ---- lengths ----

TEST(Lengths, AreExactToASixtyFourth) {
    Lengths lengths;
    EXPECT_EQ(lengths.quantile(0.5), 0u);
    for (size_t i = 1; i <= 100000; i++) lengths.add(i);
    for (double p : {0.0001, 0.001, 0.01, 0.5, 0.9, 0.99, 1.0}) {
        double exact = p * 100000, about = double(lengths.quantile(p));
        EXPECT_GE(about, exact);
        EXPECT_LE(about, exact * (1 + 1.0 / 64));
    }
    EXPECT_EQ(lengths.least(), 1u);
    EXPECT_EQ(lengths.most(), 100000u);
    EXPECT_EQ(lengths.suggested_context(), 65536u);
    Lengths again;
    again.restore(json::parse(lengths.state().dump()));
    EXPECT_EQ(again.summary(), lengths.summary());
    for (size_t length : {size_t(127), size_t(128), size_t(1) << 40, SIZE_MAX}) {
        Lengths one;
        one.add(length);
        EXPECT_EQ(one.quantile(0.5), length);
    }
}

// ---- folders of shards ----

TEST(ShardFolder, HoldsTheTokensOfTheText) {
    CorpusFiles files;
    ShardReport report = files.build("out");
    TextCorpus corpus = read_text({files.folder + "/data"});
    std::vector<int> expected = encode_documents(corpus, 0, corpus.text.size(), files.tokenizer);
    std::string out = files.folder + "/out";
    EXPECT_EQ(corpus_ids(out, 400), expected);
    EXPECT_EQ(report.val_tokens, expected.size() / 10);
    EXPECT_EQ(report.totals.documents, corpus.document_ends.size());
    EXPECT_EQ(report.totals.bytes, corpus.text.size());
    Shard first(out + "/train_000000.bin", 400), val(out + "/val.bin", 400);
    EXPECT_EQ(first.size(), 100000u);
    EXPECT_EQ(first.checksum(), first.hash());
    EXPECT_EQ(val.size(), report.val_tokens);
    json manifest = json::parse(read_file(out + "/manifest.json"));
    EXPECT_EQ(manifest.at("tokens"), expected.size());
    EXPECT_EQ(manifest.at("sources").size(), expand_paths({files.folder + "/data"}).size());
    EXPECT_EQ(manifest.at("sources")[0].at("xxh3"),
              hex_text(hash_bytes(read_file(files.folder + "/data/1.txt").data(),
                                  fs::file_size(files.folder + "/data/1.txt"))));
    EXPECT_EQ(manifest.at("sources")[1].at("documents"), 300);
    EXPECT_EQ(manifest.at("train")[0].at("xxh3"), hex_text(first.hash()));
    EXPECT_EQ(manifest.at("tokenizer").at("hash"), hex_text(files.tokenizer.fingerprint()));
    for (const auto& [name, content] : files.files("out"))
        EXPECT_TRUE(name == "manifest.json" || name.starts_with("tokenizer") ||
                    name.ends_with(".bin"))
            << name << " was left behind";
    EXPECT_EQ(Tokenizer::load(out).fingerprint(), files.tokenizer.fingerprint());
}

// A document of more than a unit has a hyphen wherever it might be cut.
TEST(ShardFolder, HoldsWordsWhole) {
    CorpusFiles files;
    std::string text;
    while (text.size() < 5 * CorpusReader::kUnitBytes / 2) text += "well-known ";
    files.tokenizer = Tokenizer::words("well-known", false);
    files.request.data = {corpus_put(files.folder + "/t.txt", text)};
    ASSERT_EQ(files.error("out"), "");
    EXPECT_EQ(corpus_ids(files.folder + "/out", 1), files.tokenizer.encode(text));
    corpus_put(files.folder + "/t.txt", "well-known unknown");
    expect_refused(files.error("lacks"), "/t.txt: byte 11: the vocabulary lacks the word");
    files.request.data = {corpus_put(files.folder + "/t.jsonl", "\n{\"text\": \"unknown\"}\n")};
    expect_refused(files.error("lacks2"),
                   "/t.jsonl: a document from line 1 on: byte 0: the vocabulary lacks");
}

TEST(ShardFolder, StandsForItsPartsAmongPaths) {
    CorpusFiles files;
    files.build("out");
    std::string out = files.folder + "/out", manifest = out + "/manifest.json";
    std::vector<std::string> train = expand_paths({out});
    EXPECT_EQ(train.front(), out + "/train_000000.bin");
    EXPECT_EQ(train.size(), files.files("out").size() - 4);
    EXPECT_EQ(expand_paths({out}, ShardPart::val), std::vector<std::string>{out + "/val.bin"});
    json root = json::parse(read_file(manifest));
    root["val"] = json::array();
    root["train"][0]["file"] = "../x.bin";
    corpus_put(manifest, root.dump());
    expect_refused(error_of([&] { expand_paths({out}); }), "lists what is no file");
    expect_refused(error_of([&] { expand_paths({out}, ShardPart::val); }), "no validation part");
    fs::rename(manifest, out + "/progress.json");
    expect_refused(error_of([&] { expand_paths({out}); }), "these shards are not finished");
    // Any other manifest.json is a file of a folder.
    std::string folder = test_folder();
    corpus_put(folder + "/manifest.json", "{\"name\": 1}");
    EXPECT_EQ(expand_paths({folder}), std::vector<std::string>{folder + "/manifest.json"});
}

TEST(ShardFolder, IsTheSameForAnyNumberOfThreads) {
    CorpusFiles files(3);
    for (bool clean : {false, true}) {
        files.request.clean = clean;
        std::string mode = clean ? "clean" : "plain";
        files.build(mode + "1", 1);
        auto expected = files.files(mode + "1");
        EXPECT_GE(expected.size(), 8u);
        for (int threads : {2, 3, 8}) {
            std::string name = mode + std::to_string(threads);
            files.build(name, threads);
            EXPECT_EQ(files.files(name), expected) << threads;
        }
    }
}

TEST(ShardFolder, HasNoEmptyShardAtItsEnd) {
    CorpusFiles files;
    corpus_put(files.folder + "/t.txt", std::string(60, 'a'));
    files.tokenizer = Tokenizer::bytes();
    files.request.data = {files.folder + "/t.txt"};
    for (size_t shard : {7, 10, 60, 500}) {
        for (double val : {0.0, 0.1, 0.25, 0.99}) {
            files.request.shard_tokens = shard, files.request.val_fraction = val;
            std::string name = format("%zu-%g", shard, val);
            ShardReport report = files.build(name);
            EXPECT_EQ(report.val_tokens, size_t(60 * val));
            EXPECT_EQ(report.files, (60 - report.val_tokens + shard - 1) / shard + (val > 0))
                << name;
            EXPECT_EQ(corpus_ids(files.folder + "/" + name, 257), std::vector<int>(60, 'a'));
        }
    }
}

// The program ends, without a word, when it has finished a file for the first time.
TEST(ShardFolder, IsTheSameAfterBeingCutOffAtAnyFile) {
    CorpusFiles files;
    for (bool clean : {false, true}) {
        files.request.clean = clean;
        std::string whole = clean ? "clean" : "plain", cut = whole + "-cut";
        files.build(whole);
        int runs = 0;
        for (bool done = false; !done; runs++) {
            pid_t child = fork();
            if (child == 0) {
                std::string seen = files.folder + "/seen-" + whole;
                files.request.on_file = [&](const std::string& path, size_t, size_t) {
                    std::string mark = seen + fs::path(path).filename().string();
                    if (fs::exists(mark)) return;
                    corpus_put(mark, "");
                    kill(getpid(), SIGKILL);
                };
                files.request.threads = 1 + runs % 3;
                _exit(files.error(cut).empty() ? 0 : 1);
            }
            int status = 0;
            waitpid(child, &status, 0);
            done = status == 0;
            ASSERT_TRUE(done || WIFSIGNALED(status)) << files.error(cut);
        }
        EXPECT_GE(runs, 5);
        EXPECT_EQ(files.files(cut), files.files(whole));
    }
}

// The last shard is cut and those behind it are gone when the manifest cannot be written.
TEST(ShardFolder, IsTheSameAfterAFailureAtItsVeryEnd) {
    CorpusFiles files;
    files.request.val_fraction = 0.35;
    files.build("whole");
    std::string in_the_way = files.folder + "/out/manifest.json";
    files.request.on_file = [&](const std::string& path, size_t, size_t) {
        if (path.ends_with("val.bin")) fs::create_directories(in_the_way + "/x");
    };
    EXPECT_EQ(files.error("out").substr(0, 2), "1 ");
    fs::remove_all(in_the_way);
    files.request.on_file = nullptr;
    EXPECT_EQ(files.error("out"), "");
    EXPECT_EQ(files.files("out"), files.files("whole"));
}

TEST(ShardFolder, IsTheSameAfterKillsAtAnyMoment) {
    CorpusFiles files(2);
    files.request.shard_tokens = 80000;
    std::mt19937 generator(3);
    for (bool clean : {false, true}) {
        files.request.clean = clean;
        std::string whole = clean ? "clean" : "plain";
        files.build(whole);
        auto expected = files.files(whole);
        for (int trial = 0; trial < 3; trial++) {
            std::string name = format("%s%d", whole.c_str(), trial);
            int kills = 0;
            for (useconds_t most = 20000;; most = most * 5 / 4) {
                pid_t child = fork();
                if (child == 0) {
                    files.request.threads = 1 + trial % 3;
                    _exit(files.error(name).empty() ? 0 : 1);
                }
                usleep(useconds_t(generator() % most));
                kill(child, SIGKILL);
                int status = 0;
                waitpid(child, &status, 0);
                if (WIFEXITED(status)) {
                    ASSERT_EQ(WEXITSTATUS(status), 0) << files.error(name);
                    break;
                }
                kills++;
            }
            EXPECT_GE(kills, 1);
            EXPECT_EQ(files.files(name), expected) << kills << " kills";
        }
    }
}

TEST(ShardFolder, GoesOnOnlyWithWhatItWasBegunWith) {
    CorpusFiles files;
    pid_t child = fork();
    if (child == 0) {
        files.request.on_file = [](const std::string&, size_t, size_t) { kill(getpid(), SIGKILL); };
        _exit(files.error("out").empty() ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status));
    ASSERT_TRUE(fs::exists(files.folder + "/out/progress.json"));
    auto refuse_all = [&](const std::string& file) {
        CorpusFiles other = files;
        other.request.shard_tokens = 7;
        expect_refused(other.error("out"),
                       file + ": the folder was begun with --shard-tokens 100000, and this is 7;");
        other = files, other.request.val_fraction = 0.2;
        expect_refused(other.error("out"), "--val-fraction 0.1, and this is 0.2;");
        other = files, other.request.clean = true;
        expect_refused(other.error("out"), "--clean false, and this is true;");
        other = files, other.request.jsonl_field = "body";
        expect_refused(other.error("out"), "--jsonl-field \"text\", and this is \"body\";");
        other = files, other.tokenizer = Tokenizer::bytes();
        expect_refused(other.error("out"), "another tokenizer, \"bpe\"");
        other = files, other.request.data = {files.folder + "/data/1.txt"};
        expect_refused(other.error("out"),
                       "file 2 was \"" + files.folder + "/data/2.jsonl\" and is none");
        other = files, other.request.data.push_back(files.folder + "/data/1.txt");
        expect_refused(other.error("out"), "was none and is");
    };
    refuse_all("progress.json");
    std::string source = files.folder + "/data/1.txt", text = read_file(source);
    corpus_put(source, text + "x");
    expect_refused(files.error("out"), source + ": has changed since the folder");
    corpus_put(source, text);
    expect_refused(files.error("out"), source + ": has changed since the folder");
    // Text of the same size and time, but other text: the hash of what was read before knows.
    json progress = json::parse(read_file(files.folder + "/out/progress.json"));
    text[5] = '!';
    corpus_put(source, text);
    struct stat info {};
    stat(source.c_str(), &info);
    progress["sources"][0]["modified_ns"] =
        int64_t(info.st_mtim.tv_sec) * 1000000000 + info.st_mtim.tv_nsec;
    progress["next"]["unit"] = 1;
    std::string changed = progress.dump();
    corpus_put(files.folder + "/out/progress.json", changed);
    expect_refused(files.error("out"), "the text has changed since the folder");

    fs::remove_all(files.folder + "/out");
    files.build("out");
    refuse_all("manifest.json");
    auto before = files.files("out");
    EXPECT_TRUE(files.build("out").was_complete);
    EXPECT_EQ(files.files("out"), before);
    std::string shard = files.folder + "/out/train_000001.bin", bytes = read_file(shard);
    corpus_put(shard, bytes.substr(0, bytes.size() - 2));
    expect_refused(files.error("out"), "train_000001.bin: byte 8: header says");
    fs::copy_file(files.folder + "/out/train_000002.bin", shard,
                  fs::copy_options::overwrite_existing);
    expect_refused(files.error("out"), "is not the shard that was written here");
}

TEST(ShardFolder, TakesNoDamagedProgress) {
    CorpusFiles files;
    pid_t child = fork();
    if (child == 0) {
        files.request.on_file = [](const std::string&, size_t, size_t) { kill(getpid(), SIGKILL); };
        _exit(files.error("out").empty() ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    std::string path = files.folder + "/out/progress.json", whole = read_file(path);
    for (size_t size = 0; size < whole.size(); size += 1 + size / 50) {
        corpus_put(path, whole.substr(0, size));
        ASSERT_EQ(files.error("out").substr(0, 2), "2 ") << size;
    }
    auto edited = [&](auto edit) {
        json root = json::parse(whole);
        edit(root);
        corpus_put(path, root.dump());
        return files.error("out");
    };
    expect_refused(edited([](json& r) { r["shards"][0]["tokens"] = 5; }), "is damaged");
    expect_refused(edited([](json& r) { r["shards"][0]["file"] = "../x.bin"; }), "is damaged");
    expect_refused(edited([](json& r) { r["shards"][0]["xxh3"] = "zz"; }), "is damaged");
    expect_refused(edited([](json& r) { r["shards"][0]["xxh3"] = "0"; }), "not the shard");
    expect_refused(edited([](json& r) { r["finishing"] = true; }), "not what this program writes");
    expect_refused(edited([](json& r) { r["next"].erase("unit"); }),
                   "not what this program writes");
    expect_refused(edited([](json& r) { r["next"]["skip"] = 0; }), "is damaged");
    expect_refused(edited([](json& r) { r["next"]["unit"] = 1000000; }), "has changed since");
    expect_refused(edited([](json& r) { r["totals"]["removed"] = 1; }),
                   "not what this program writes");
    expect_refused(edited([](json& r) { r = json::array(); }), "not what this program writes");
    EXPECT_EQ(edited([](json&) {}), "");
}

TEST(ShardFolder, KeepsOutOfFoldersThatAreInUse) {
    CorpusFiles files;
    std::string out = files.folder + "/out";
    fs::create_directories(out);
    corpus_put(out + "/train_000007.bin", "x");
    expect_refused(files.error("out"), "has train_000007.bin already, and no manifest.json says");
    fs::remove(out + "/train_000007.bin");
    int fd = open((out + "/lock").c_str(), O_RDWR | O_CREAT, 0644);
    ASSERT_EQ(flock(fd, LOCK_EX), 0);
    expect_refused(files.error("out"), "another program makes shards in this folder");
    close(fd);
    // What a kill left goes, what others put there stays.
    const std::vector<std::string> others = {
        "train_notes.tmp",           "values.tmp",          "val.bin.tmp",
        "tokenizer.json.7.tmp",      "train_0.bin.7.x.tmp", "train_0.7.0a1b.tmp",
        "train_0.bin.7.0a1b.tmp.old"};
    for (const std::string& name : others) corpus_put(out + "/" + name, "mine");
    fs::create_directories(out + "/val.bin.8.0a1b2c3d.tmp/x");
    for (const char* name : {"train_000000.bin", "val.bin", "manifest.json", "tokenizer.json"})
        corpus_put(temporary_name(out + "/" + name), "cut");
    EXPECT_EQ(files.error("out"), "");
    for (const std::string& name : others) EXPECT_EQ(fs::remove(out + "/" + name), true) << name;
    EXPECT_EQ(fs::remove_all(out + "/val.bin.8.0a1b2c3d.tmp"), 2u);
    for (const auto& [name, content] : files.files("out"))
        EXPECT_FALSE(name.ends_with(".tmp")) << name;
    // In a folder of its own text, it does not take its shards for text.
    files.build("data/shards");
    EXPECT_EQ(files.files("data/shards").size(), files.files("out").size());
    EXPECT_TRUE(files.build("data/shards").was_complete);
    fs::remove_all(files.folder + "/data/shards");
    for (const char* place : {"/proc/nothing/x", "/dev/null/x"}) {
        ShardRequest r = files.request;
        r.out = place;
        EXPECT_EQ(error_of([&] { build_shards(r, files.tokenizer); }).substr(0, 2), "1 ");
    }
    files.request.data = {files.folder + "/out/val.bin"};
    expect_refused(files.error("x"), "a token shard among text files");
    files.request.data = {corpus_put(files.folder + "/empty.txt", "")};
    expect_refused(files.error("y"), "empty.txt: no tokens of this vocabulary");
    EXPECT_EQ(files.error("y"), files.error("y"));
}

// As Lustre has none unless it is asked for them.
TEST(ShardFolder, NeedsNoLocksOfTheFileSystem) {
    CorpusFiles files;
    corpus_no_locks = true;
    std::string error = files.error("out");
    corpus_no_locks = false;
    EXPECT_EQ(error, "");
}

TEST(ShardFolder, GoesOnWhenTheDiskHasRoomAgain) {
    CorpusFiles files;
    files.build("whole");
    rlimit old_limit;
    getrlimit(RLIMIT_FSIZE, &old_limit);
    auto old_action = signal(SIGXFSZ, SIG_IGN);
    for (rlim_t limit : {0, 100, 1000, 3000, 100000, 200000}) {
        rlimit small = {limit, old_limit.rlim_max};
        setrlimit(RLIMIT_FSIZE, &small);
        std::string error = files.error("full");
        setrlimit(RLIMIT_FSIZE, &old_limit);
        EXPECT_EQ(error.substr(0, 2), "1 ") << limit << error;
        EXPECT_NE(error.find("cannot write: "), std::string::npos) << error;
        for (const auto& [name, content] : files.files("full"))
            EXPECT_FALSE(name.ends_with(".tmp")) << name;
    }
    signal(SIGXFSZ, old_action);
    EXPECT_EQ(files.error("full"), "");
    EXPECT_EQ(files.files("full"), files.files("whole"));
}

TEST(ShardFolder, TellsWhatTheCleanerTook) {
    CorpusFiles files;
    std::string lines =
        corpus_json({"One.", "Two.\r\n", "One.", " \n\t", "Two.\n", "Thr\u0065\u0301e.\x01"});
    corpus_put(files.folder + "/c.jsonl", lines);
    files.request.data = {files.folder + "/c.jsonl", files.folder + "/data/4.txt",
                          files.folder + "/data/4.txt"};
    files.tokenizer = Tokenizer::bytes();
    files.request.clean = true, files.request.val_fraction = 0;
    ShardReport report = files.build("out");
    std::string text = files.tokenizer.decode(corpus_ids(files.folder + "/out", 257));
    std::string eot = "<|endoftext|>";
    EXPECT_EQ(text, "One." + eot + "Two.\n" + eot + "Thr\u00e9e." + eot + "The end.");
    json removed = json::parse(read_file(files.folder + "/out/manifest.json")).at("removed");
    EXPECT_EQ(removed.at("duplicate_documents").at("count"), 3);
    EXPECT_EQ(removed.at("duplicate_documents").at("bytes"), 4 + 5 + 8);
    EXPECT_EQ(removed.at("empty_documents").at("count"), 1);
    EXPECT_EQ(removed.at("control_characters").at("count"), 1);
    EXPECT_EQ(removed.at("carriage_returns").at("count"), 1);
    EXPECT_EQ(removed.at("composed_lines").at("count"), 1);
    EXPECT_EQ(report.totals.documents, 4u);
    EXPECT_EQ(report.document_tokens.at("max"), 8);
}

TEST(ShardFolder, OfALargeVocabularyHasWideIds) {
    std::string folder = test_folder(), ranks;
    const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int id = 0; id < 256 + 65536; id++) {  // every byte, and then every pair of bytes
        bool pair = id >= 256;
        uint32_t bits = pair ? uint32_t(id - 256) << 8 : uint32_t(id) << 16;
        for (int i = 0; i < 4; i++)
            ranks += i < (pair ? 3 : 2) ? digits[bits >> (18 - 6 * i) & 63] : '=';
        ranks += " " + std::to_string(id) + "\n";
    }
    corpus_put(folder + "/wide.tiktoken", ranks);
    CorpusFiles files;
    files.tokenizer = Tokenizer::load(folder + "/wide.tiktoken", Pattern::gpt2);
    corpus_put(files.folder + "/t.txt", "\xff\xff\xff\xff");
    files.request.data = {files.folder + "/t.txt"}, files.request.val_fraction = 0;
    files.build("out");
    Shard shard(files.folder + "/out/train_000000.bin", files.tokenizer.vocab_size());
    EXPECT_STREQ(shard.format_name(), "uint32");
    EXPECT_EQ(files.tokenizer.decode({shard[0], shard[1]}), "\xff\xff\xff\xff");
    EXPECT_GT(shard[0], 65535);
}

TEST(ShardFolder, SaysWhichLineOfWhichFileIsWrong) {
    CorpusFiles files;
    std::string path = files.folder + "/data/2.jsonl", lines = read_file(path);
    size_t line = size_t(std::count(lines.begin(), lines.end(), '\n')) + 1;
    corpus_put(path, lines + "{\"text\": \"cut");
    for (int threads : {1, 3}) {
        std::string error =
            error_of([&] { files.build("out" + std::to_string(threads), threads); });
        expect_refused(error, format("%s: line %zu: byte 14: not valid JSON", path.c_str(), line));
    }
    corpus_put(path, lines);
    EXPECT_EQ(files.error("other"), "");
}
