// The tests of dataloader.h: files of numbers, shards, the cache of tokens, and the batches made of
// them; and the program that holds these and the tokenizer's tests.

#include "../../dataloader.h"

#include <gtest/gtest.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

#include <fstream>
#include <iterator>
#include <map>
#include <numeric>
#include <set>

#include "../../corpus.h"
#include "tools.h"

namespace {

// A shard of `count` tokens that count up from `first`: a token tells where it came from.
std::string data_counting_shard(const std::string& folder, const std::string& name, int count,
                                int first = 0) {
    std::vector<int> ids(static_cast<size_t>(count));
    std::iota(ids.begin(), ids.end(), first);
    std::string path = folder + "/" + name;
    write_shard(path, ids);
    return path;
}

std::vector<Shard> data_open(const std::vector<std::string>& paths) {
    std::vector<Shard> shards;
    for (const std::string& path : paths) shards.emplace_back(path, 65536);
    return shards;
}

// Lays out the file that a test damages.
std::string data_put(const std::string& path, std::string_view content) {
    std::ofstream(path, std::ios::binary) << content;
    return path;
}

std::string data_with_int32(std::string bytes, size_t at, int32_t value) {
    memcpy(bytes.data() + at, &value, sizeof value);
    return bytes;
}

// The next `batches` batches as rows: T inputs and after them T targets.
using DataRows = std::vector<std::vector<int>>;
DataRows data_rows(DataLoader& loader, int batches, int B, int T) {
    DataRows rows;
    std::vector<int> inputs(size_t(B) * size_t(T)), targets(inputs.size());
    for (int k = 0; k < batches; k++) {
        loader.next_batch(inputs.data(), targets.data());
        for (int b = 0; b < B; b++) {
            std::vector<int> row(inputs.begin() + b * T, inputs.begin() + (b + 1) * T);
            row.insert(row.end(), targets.begin() + b * T, targets.begin() + (b + 1) * T);
            rows.push_back(row);
        }
    }
    return rows;
}

}  // namespace

// ---- files that are written ----

// As in two containers, whose programs may have one number.
TEST(AtomicFile, TwoThatWriteOneFileDoNotShareWhatTheyWrite) {
    std::string folder = test_folder(), path = folder + "/a";
    {
        AtomicFile first(path), second(path), third(path);
        first.write("first", 5);
        second.write("second", 6);
        first.commit();
        EXPECT_EQ(read_file(path), "first");
        second.commit();
    }
    EXPECT_EQ(read_file(path), "second");
    EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 1) << "something is left";
}

TEST(AtomicFile, ALinkStaysAndSoDoesTheModeOfWhatItLeadsTo) {
    std::string folder = test_folder(), path = data_put(folder + "/a", "old");
    fs::permissions(path, fs::perms::owner_read | fs::perms::owner_write);
    fs::create_directory(folder + "/links");
    fs::create_symlink("../a", folder + "/links/b");
    fs::create_symlink(folder + "/links/b", folder + "/c");
    write_file_atomic(folder + "/c", "new");
    EXPECT_EQ(fs::read_symlink(folder + "/c"), folder + "/links/b");
    EXPECT_EQ(fs::read_symlink(folder + "/links/b"), "../a");
    EXPECT_EQ(read_file(path), "new");
    EXPECT_EQ(fs::status(path).permissions(), fs::perms::owner_read | fs::perms::owner_write);
    fs::create_symlink("none", folder + "/links/to_nothing");
    write_file_atomic(folder + "/links/to_nothing", "there");
    EXPECT_EQ(read_file(folder + "/links/none"), "there");
    fs::create_symlink("round", folder + "/round");
    EXPECT_NE(error_of([&] { write_file_atomic(folder + "/round", "x"); }), "");
    EXPECT_TRUE(fs::is_symlink(folder + "/round"));
}

// What the handler of a signal does: files that are not finished go, and so do folders with all
// files in them; what is finished stays.
TEST(AtomicFile, WhatIsNotFinishedGoesWithASignal) {
    std::string folder = test_folder();
    AtomicFile unfinished(folder + "/a");
    write_file_atomic(folder + "/b", "whole");
    fs::create_directory(folder + "/c");
    for (int i = 0; i < 500; i++) data_put(folder + "/c/file" + std::to_string(i), "x");
    Leftover meanwhile(folder + "/c"), gone(folder + "/none");
    AtomicFile inside(folder + "/c/d");
    { Leftover finished(folder + "/b"); }
    Leftovers::remove_all();
    std::vector<std::string> there;
    for (const auto& entry : fs::directory_iterator(folder))
        there.push_back(entry.path().filename().string());
    EXPECT_EQ(there, std::vector<std::string>{"b"});
}

TEST(AtomicFile, DevicesAndPipesAreWrittenToAndFoldersRefused) {
    std::string folder = test_folder(), pipe = folder + "/pipe", device = folder + "/device";
    EXPECT_EQ(error_of([&] { write_file_atomic(folder, "x"); }),
              "1 " + folder + ": not a regular file");
    ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
    int reader = open(pipe.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    write_file_atomic(pipe, "through");
    char text[16];
    EXPECT_EQ(read(reader, text, sizeof text), 7);
    close(reader);
    EXPECT_TRUE(fs::is_fifo(pipe));
    if (mknod(device.c_str(), S_IFCHR | 0600, makedev(1, 7)) != 0)
        GTEST_SKIP() << "no devices can be made here";
    std::string error = error_of([&] { write_file_atomic(device, "x"); });
    bool opened = error.find("cannot open") == std::string::npos;  // some volumes allow no devices
    EXPECT_EQ(error, opened ? "1 " + device + ": cannot write: No space left on device" : error);
    EXPECT_TRUE(fs::is_character_file(device));
}

// ---- .npy ----

namespace {

std::string data_npy(const std::string& header, std::string_view items, int version = 1) {
    std::string bytes = "\x93NUMPY";
    bytes += char(version);
    bytes += '\0';
    uint32_t length = uint32_t(header.size());
    bytes.append(reinterpret_cast<const char*>(&length), version == 1 ? 2 : 4);
    return bytes + header + std::string(items);
}

std::string data_npy_error(const std::string& bytes) {
    std::string path = data_put(test_folder() + "/a.npy", bytes);
    return error_of([&] { read_npy(path); });
}

}  // namespace

TEST(Npy, RoundTripsEveryShape) {
    std::string folder = test_folder();
    std::vector<std::vector<size_t>> shapes = {{}, {1}, {7}, {2, 3}, {3, 1, 2}, {0}, {4, 0}};
    for (const std::vector<size_t>& shape : shapes) {
        size_t count = 1;
        for (size_t extent : shape) count *= extent;
        std::vector<int> values(count);
        for (size_t i = 0; i < count; i++)
            values[i] = i % 2 == 0 ? INT_MAX - int(i) : INT_MIN + int(i);
        write_npy(folder + "/a.npy", values, shape);
        NpyArray read = read_npy(folder + "/a.npy");
        EXPECT_EQ(read.shape, shape);
        EXPECT_EQ(read.values, values);
    }
}

TEST(Npy, WritesTheBytesThatNumPyWrites) {
    std::string path = test_folder() + "/a.npy";
    write_npy(path, {1, 2, 3, 4, 5, -6}, {2, 3});
    std::string header = "{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }";
    header.resize(117, ' ');
    header += '\n';
    std::string items("\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0\5\0\0\0\xfa\xff\xff\xff", 24);
    EXPECT_EQ(read_file(path), data_npy(header, items));
    for (size_t count :
         {1, 10, 1000, 100000}) {  // headers of several lengths keep the data aligned
        write_npy(path, std::vector<int>(count), {count});
        EXPECT_EQ((read_file(path).size() - count * 4) % 64, 0u);
    }
}

TEST(Npy, ReadsOtherTypesVersionsAndSpellings) {
    std::string folder = test_folder();
    std::string u2 = "{'descr': '<u2', 'fortran_order': False, 'shape': (2,), }\n";
    std::string i8 = "{\"shape\":(1,2),\"fortran_order\":False,\"descr\":\"<i8\"}";
    for (int version : {1, 2, 3}) {
        data_put(folder + "/a.npy", data_npy(u2, std::string_view("\1\0\xff\xff", 4), version));
        EXPECT_EQ(read_npy(folder + "/a.npy").values, (std::vector<int>{1, 65535}));
    }
    int64_t fits[] = {INT_MIN, INT_MAX};
    data_put(folder + "/a.npy", data_npy(i8, {reinterpret_cast<char*>(fits), sizeof fits}));
    NpyArray array = read_npy(folder + "/a.npy");
    EXPECT_EQ(array.values, (std::vector<int>{INT_MIN, INT_MAX}));
    EXPECT_EQ(array.shape, (std::vector<size_t>{1, 2}));
    for (int64_t large : {int64_t(INT_MAX) + 1, int64_t(INT_MIN) - 1, INT64_MAX, INT64_MIN}) {
        int64_t values[] = {0, large};
        std::string bytes = data_npy(i8, {reinterpret_cast<char*>(values), sizeof values});
        expect_refused(data_npy_error(bytes), std::to_string(large) + " is not a 32-bit integer");
    }
}

TEST(Npy, RefusesHostileHeaders) {
    auto error = [](const std::string& header) {
        return data_npy_error(data_npy(header, "12345678"));
    };
    std::string tail = "'fortran_order': False, 'shape': (2,)}";
    ASSERT_EQ(error("{'descr': '<i4', " + tail), "");
    expect_refused(error("{'descr': '>i4', " + tail), "neither <i4");
    expect_refused(error("{'descr': '<f4', " + tail), "neither <i4");
    expect_refused(error("{'descr': [('a', '<i4')], " + tail), "quoted string expected");
    std::string head = "{'descr': '<i4', 'fortran_order': ";
    expect_refused(error(head + "True, 'shape': (2,)}"), "Fortran order");
    expect_refused(error(head + "Maybe, 'shape': (2,)}"), "True or False");
    for (const char* shape : {"(3,)", "(1,)", "(0,)", "(2, 2)", "()"})
        expect_refused(error(head + "False, 'shape': " + shape + "}"), "the shape needs");
    for (const char* shape : {"(-2,)", "(2.0,)", "2", "(2", "(,)", "(2 2)", "((2,),)"})
        expect_refused(error(head + "False, 'shape': " + shape + "}"), "not a NumPy header");
    // 2^62 items of 4 bytes are 0 bytes modulo 2^64, and 2^32 * 2^32 items are none.
    expect_refused(error(head + "False, 'shape': (4611686018427387906,)}"), "the shape needs");
    expect_refused(error(head + "False, 'shape': (4294967296, 4294967296)}"), "too large");
    expect_refused(error(head + "False, 'shape': (18446744073709551618,)}"), "too large");
    expect_refused(error(head + "False}"), "expected once each");
    expect_refused(error("{'descr': '<i4', 'descr': '<i4', " + tail), "expected once each");
    expect_refused(error("{'order': 'C', " + tail), "unknown key");
    expect_refused(error("{'descr': '<i4', " + tail + "}"), "follows the dictionary");
    for (const char* text : {"", "{", "{}", "[]", "{'descr", "{'descr'", "{'descr':", "{'a': 1}"})
        expect_refused(error(text), "not a NumPy header");
    std::string nul = "{'descr': '<i4', " + tail;
    nul[9] = '\0';
    expect_refused(error(nul), "not a NumPy header");
}

TEST(Npy, RefusesEveryTruncationAndAnExtraByte) {
    std::string path = test_folder() + "/a.npy";
    write_npy(path, {1, 2, 3}, {3});
    std::string whole = read_file(path);
    for (size_t size = 0; size < whole.size(); size++) {
        data_put(path, whole.substr(0, size));
        ASSERT_EQ(error_of([&] { read_npy(path); }).substr(0, 2), "2 ") << size;
        ASSERT_EQ(error_of([&] { Shard(path, 10); }).substr(0, 2), "2 ") << size;
    }
    expect_refused(data_npy_error(whole + "x"), "the file has 13 bytes");
    for (int version : {0, 4, 255}) {
        std::string other = whole;
        other[6] = char(version);
        expect_refused(data_npy_error(other), ".npy version");
    }
    std::string long_header = whole;
    long_header[8] = long_header[9] = '\xff';
    expect_refused(data_npy_error(long_header), "said to take 65535 bytes");
    expect_refused(error_of([&] { read_npy(path + "x"); }), "No such file");
}

// ---- shards ----

TEST(Shards, RoundTrip) {
    std::string path = test_folder() + "/a.bin";
    std::vector<int> ids = {0, 65535, 1, 256, 50256};
    for (int i = 0; i < 10000; i++) ids.push_back(i * 7919 % 65536);
    for (bool checksummed : {false, true}) {
        write_shard(path, ids, checksummed);
        Shard shard(path, 65536);
        ASSERT_EQ(shard.size(), ids.size());
        for (size_t i = 0; i < ids.size(); i++) ASSERT_EQ(shard[i], ids[i]);
        std::vector<int> part(100, -7);
        shard.copy(50, 99, part.data());
        EXPECT_TRUE(std::equal(part.begin(), part.end() - 1, ids.begin() + 50));
        EXPECT_EQ(part.back(), -7) << "copy wrote past its end";
        EXPECT_EQ(shard.checksum(), checksummed ? shard.hash() : 0);
        EXPECT_EQ(shard.path(), path);
    }
}

TEST(Shards, HaveTheBytesOfTheFormat) {
    std::string path = test_folder() + "/a.bin";
    write_shard(path, {1, 513, 65535});
    std::string expected(1024, '\0');
    expected = data_with_int32(expected, 0, 20240520);
    expected = data_with_int32(expected, 4, 1);
    expected = data_with_int32(expected, 8, 3);
    EXPECT_EQ(read_file(path), expected + std::string("\1\0\1\2\xff\xff", 6));
    for (const auto& entry : fs::directory_iterator(fs::path(path).parent_path()))
        EXPECT_EQ(entry.path(), path) << "left behind";
}

// Two programs that fill one cache: each writes a temporary file of its own.
TEST(Shards, WrittenByTwoProcessesAtOnceAreWhole) {
    std::string path = test_folder() + "/a.bin";
    std::vector<int> ids = random_ids(100000, 60000, 1);
    std::vector<pid_t> children(8);
    for (pid_t& child : children) {
        child = fork();
        if (child != 0) continue;
        bool failed = false;
        for (int i = 0; i < 20; i++) failed |= !error_of([&] { write_shard(path, ids); }).empty();
        _exit(failed);
    }
    for (pid_t child : children) {
        int status = -1;
        waitpid(child, &status, 0);
        EXPECT_EQ(status, 0);
    }
    EXPECT_EQ(Shard(path, 60000).size(), ids.size());
}

TEST(Shards, AreNotWrittenFromWhatDoesNotFit) {
    std::string path = test_folder() + "/a.bin";
    expect_refused(error_of([&] { write_shard(path, {}); }), "no tokens");
    expect_refused(error_of([&] { write_shard(path, {1, 65536}); }), "token 1 has id 65536");
    expect_refused(error_of([&] { write_shard(path, {-1}); }), "token 0 has id -1");
    EXPECT_FALSE(fs::exists(path));
}

TEST(Shards, AreRefusedCutAtAnyByte) {
    std::string path = data_counting_shard(test_folder(), "a.bin", 9);
    std::string whole = read_file(path);
    ASSERT_EQ(whole.size(), 1024u + 18);
    for (size_t size = 0; size < whole.size(); size++) {
        data_put(path, whole.substr(0, size));
        std::string error = error_of([&] { Shard(path, 9); });
        ASSERT_EQ(error.substr(0, 2 + path.size()), "2 " + path) << size;
    }
    expect_refused(error_of([&] { Shard(path, 9); }), "says 9 tokens, the file holds 8 and 1 byte");
    data_put(path, whole + "x");
    expect_refused(error_of([&] { Shard(path, 9); }), "says 9 tokens, the file holds 9 and 1 byte");
    data_put(path, whole + "xy");
    expect_refused(error_of([&] { Shard(path, 9); }),
                   "byte 8: header says 9 tokens, the file holds 10");
    data_put(path, whole);
    EXPECT_EQ(error_of([&] { Shard(path, 9); }), "");
}

TEST(Shards, AreRefusedWithAWrongHeader) {
    std::string path = data_counting_shard(test_folder(), "a.bin", 9);
    std::string whole = read_file(path);
    auto error = [&](size_t at, int32_t value) {
        data_put(path, data_with_int32(whole, at, value));
        return error_of([&] { Shard(path, 9); });
    };
    expect_refused(error(0, 20240522), "byte 0: magic is 20240522; a token shard has 20240520");
    expect_refused(error(0, 20240801), "byte 4: version 1; with magic 20240801 only 7");
    expect_refused(error(4, 2), "byte 4: version 2; with magic 20240520 only 1");
    for (size_t i = 3; i < 256; i++)
        expect_refused(error(4 * i, 1), format("byte %zu: ", i < 5 ? 12 : 4 * i));
    for (int32_t count : {0, 8, 10, -1, -9, INT32_MAX, INT32_MIN, INT32_MIN + 9, 9 << 16})
        expect_refused(error(8, count), format("byte 8: header says %d tokens", count));
    data_put(path, data_with_int32(whole, 8, 0).substr(0, 1024));
    expect_refused(error_of([&] { Shard(path, 9); }), "holds no tokens");
    expect_refused(error_of([&] { Shard(path + "x", 9); }), "No such file");
    expect_refused(error_of([&] { Shard(test_folder(), 9); }), "not a regular file");
}

TEST(Shards, HaveEveryByteOfAChecksummedFileChecked) {
    std::string path = test_folder() + "/a.bin";
    for (int width : {2, 4}) {
        write_shard(path, {3, 1, 2}, true, width);
        std::string whole = read_file(path);
        for (size_t at = 0; at < whole.size(); at++) {
            std::string other = whole;
            other[at] = char(other[at] ^ 1 << at % 8);
            data_put(path, other);
            ASSERT_EQ(error_of([&] { Shard(path, 65536); }).substr(0, 2), "2 ") << at;
        }
        data_put(path, whole);
        EXPECT_EQ(Shard(path, 4)[0], 3);
    }
}

TEST(Shards, OfLargeVocabulariesHaveWiderIds) {
    std::string path = test_folder() + "/a.bin";
    std::vector<int> ids = {0, 65536, 128255, INT_MAX - 1};
    write_shard(path, ids, false, 4);
    std::string expected(1024, '\0'), whole = read_file(path);
    expected = data_with_int32(expected, 0, 20240801);
    expected = data_with_int32(expected, 4, 7);
    expected = data_with_int32(expected, 8, 4);
    expected.append(reinterpret_cast<const char*>(ids.data()), 16);
    EXPECT_EQ(whole, expected);
    Shard shard(path, INT_MAX);
    EXPECT_STREQ(shard.format_name(), "uint32");
    for (size_t i = 0; i < ids.size(); i++) EXPECT_EQ(shard[i], ids[i]);
    expect_refused(error_of([&] { Shard(path, 128255); }), "byte 1032: token id 128255,");
    for (size_t size = 0; size < whole.size(); size++) {
        data_put(path, whole.substr(0, size));
        ASSERT_EQ(error_of([&] { Shard(path, INT_MAX); }).substr(0, 2), "2 ") << size;
    }
    data_put(path, whole.substr(0, 1039));
    expect_refused(error_of([&] { Shard(path, INT_MAX); }), "holds 3 and 3 bytes");
    data_put(path, whole + "x");
    expect_refused(error_of([&] { Shard(path, INT_MAX); }), "holds 4 and 1 byte;");
    data_put(path, data_with_int32(whole, 4, 1));
    expect_refused(error_of([&] { Shard(path, INT_MAX); }), "byte 4: version 1");
    data_put(path, data_with_int32(data_with_int32(whole, 0, 20240520), 4, 1));
    expect_refused(error_of([&] { Shard(path, INT_MAX); }), "says 4 tokens, the file holds 8");
    data_put(path, data_with_int32(whole, 1028, -2));
    expect_refused(error_of([&] { Shard(path, INT_MAX); }), "token id 4294967294,");
    EXPECT_TRUE(is_shard(path));
}

// 10 GB of tokens without the disk for them: a file of holes, whose ids are 0 but for those that
// are put at both sides of 2^31 and 2^32.
TEST(Shards, OfTenGigabytesOpenAtOnceAndReadAtAnyPlace) {
    std::string path = test_folder() + "/large.npy";
    constexpr size_t kTokens = 5000000000;
    std::string header = "{'descr': '<u2', 'fortran_order': False, 'shape': (5000000000,), }";
    header.resize(117, ' ');
    data_put(path, data_npy(header + '\n', ""));
    std::error_code error;
    fs::resize_file(path, 128 + 2 * kTokens, error);
    if (error) GTEST_SKIP() << "no sparse file of 10 GB here: " << error.message();
    const size_t places[] = {
        0,          (size_t(1) << 31) - 1, size_t(1) << 31, (size_t(1) << 32) - 1, size_t(1) << 32,
        kTokens - 1};
    int fd = open(path.c_str(), O_WRONLY);
    for (size_t i = 0; i < std::size(places); i++) {
        uint16_t id = uint16_t(100 + i);
        ASSERT_EQ(pwrite(fd, &id, 2, off_t(128 + 2 * places[i])), 2);
    }
    close(fd);
    Shard shard(path, 50257);
    ASSERT_EQ(shard.size(), kTokens);
    for (size_t i = 0; i < std::size(places); i++) EXPECT_EQ(shard[places[i]], 100 + int(i));
    std::vector<int> window(3, -1);
    shard.will_need((size_t(1) << 32) - 1, 3);
    shard.copy((size_t(1) << 32) - 1, 3, window.data());
    EXPECT_EQ(window, (std::vector<int>{103, 104, 0}));
    EXPECT_EQ(shard.slice(size_t(1) << 32, kTokens)[0], 104);
    // Opening looks at both ends; the window that holds the others is refused when it is copied.
    expect_refused(error_of([&] { Shard(path, 105); }), "byte 10000000126: token id 105,");
    expect_refused(error_of([&] { Shard(path, 100); }), "byte 128: token id 100,");
    Shard part = shard.slice(0, kTokens);
    uint16_t past = 60000;
    fd = open(path.c_str(), O_WRONLY);
    ASSERT_EQ(pwrite(fd, &past, 2, off_t(128 + 2 * ((size_t(1) << 32) + 12345))), 2);
    close(fd);
    Shard again(path, 50257);
    again.copy(size_t(1) << 32, 3, window.data());
    expect_refused(error_of([&] { again.copy((size_t(1) << 32) + 12344, 3, window.data()); }),
                   path + ": byte 8589959410: token id 60000, the vocabulary has 50257");
}

// ---- nanoGPT ----

namespace {

// What pickle.dump writes of {'vocab_size': 3, 'itos': {...}, 'stoi': {...}} of "ab\n", in
// protocol 4; strings are remembered and taken up again.
std::string nano_meta() {
    std::string text = "\x80\x04\x95";
    text += std::string("\x43\0\0\0\0\0\0\0", 8);
    text += "}\x94(\x8c\x0avocab_size\x94K\x03\x8c\x04itos\x94}\x94(";
    text += std::string("K\0", 2) +
            "\x8c\x01\n\x94K\x01\x8c\x01"
            "a\x94K\x02\x8c\x01"
            "b\x94u";
    text += "\x8c\x04stoi\x94}\x94(h\x04" + std::string("K\0", 2) + "h\x05K\x01h\x06K\x02uu.";
    return text;
}

}  // namespace

TEST(Shards, OfNanoGptAreReadWhereSomethingSaysThatTheyAre) {
    std::string folder = test_folder(), path = folder + "/train.bin";
    data_put(path, std::string("\1\0\2\0\0\0\1\0", 8));
    expect_refused(error_of([&] { Shard(path, 3); }), "8 bytes; a token shard begins with");
    EXPECT_EQ(Shard(path, 3, RawTokens::uint16)[1], 2);
    EXPECT_EQ(Shard(path, INT_MAX, RawTokens::uint32)[0], 0x20001);
    expect_refused(error_of([&] { Shard(path, 2, RawTokens::uint16); }), "byte 2: token id 2,");
    data_put(path, std::string("\1\0\2", 3));
    expect_refused(error_of([&] { Shard(path, 3, RawTokens::uint16); }), "3 bytes are no whole");
    data_put(path, "");
    expect_refused(error_of([&] { Shard(path, 3, RawTokens::uint16); }), "holds no tokens");

    data_put(path, std::string("\1\0\2\0\0\0\1\0", 8));
    data_put(folder + "/meta.pkl", nano_meta());
    Shard shard(path, 50257);
    EXPECT_EQ(shard.size(), 4u);
    EXPECT_STREQ(shard.format_name(), "raw uint16");
    expect_refused(error_of([&] { Shard(path, 2); }), "a vocabulary of 3 for the tokens beside it");
    std::optional<Tokenizer> tokenizer = tokenizer_beside(path);
    ASSERT_TRUE(tokenizer);
    EXPECT_EQ(tokenizer->decode({1, 2, 0, 1}), "ab\na");
    data_put(path, std::string("\1\0\3\0", 4));
    expect_refused(error_of([&] { Shard(path, 50257); }),
                   "byte 2: token id 3, the vocabulary has 3");
    // A shard of llm.c's is one with any such file beside it, and so is what is left of one.
    write_shard(path, {9, 8, 7});
    EXPECT_EQ(Shard(path, 10)[0], 9);
    std::string damaged = data_with_int32(read_file(path), 0, 1);
    data_put(path, damaged);
    expect_refused(error_of([&] { Shard(path, 10); }), "byte 0: magic is 1;");
    expect_refused(error_of([&] { Shard(path, 10, RawTokens::uint16); }), "byte 0: magic is 1;");
}

TEST(Shards, TakeNoMetaThatIsNotOneOfNanoGpts) {
    std::string path = test_folder() + "/meta.pkl", whole = nano_meta();
    auto error = [&](const std::string& bytes) {
        data_put(path, bytes);
        return error_of([&] { NanoMetaReader(path).read(); });
    };
    ASSERT_EQ(error(whole), "");
    for (size_t size = 0; size < whole.size(); size++)
        expect_refused(error(whole.substr(0, size)), "it is cut short");
    expect_refused(error(whole + "."), "something follows");
    // os.system("id") as a pickle, which Python would run.
    expect_refused(error("\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R."),
                   "byte 14: not a meta.pkl of nanoGPT's: it holds more than");
    expect_refused(error("cos\nsystem\n(S'id'\ntR."), "byte 0: not a meta.pkl");
    std::string wrong = whole;
    wrong.replace(wrong.find("h\x05K\x01"), 4, "h\x05K\x02");
    expect_refused(error(wrong), "stoi has an entry that does not fit");
    wrong = whole;
    wrong.replace(wrong.find("K\x01\x8c"), 2, "K\x02");
    expect_refused(error(wrong), "itos has an entry that is wrong");
    expect_refused(error("\x80\x04\x80\x04" + whole.substr(2)), "its protocol is not");
    expect_refused(error("\x80\x01" + whole.substr(2)), "its protocol is not");
    expect_refused(error("\x80\x04}."), "no vocab_size");
    expect_refused(error("\x80\x04K\x03."), "no dictionary");
    expect_refused(error("\x80\x04}\x8c\x0avocab_sizeK" + std::string("\0s.", 3)), "no vocab_size");
    expect_refused(error("\x80\x04}\x8c\x01xK\x03s."), "a key that is none of");
    expect_refused(error("\x80\x04}u."), "without a mark");
    expect_refused(error("\x80\x04}s."), "a key without its value");
    expect_refused(error("\x80\x04(u."), "a key without its value");
    std::string deep = "\x80\x04";
    for (int i = 0; i < 100000; i++) deep += "}K\x01";
    expect_refused(error(deep + "K\x01" + std::string(100000, 's') + "."), "three deep");
    for (size_t at = 0; at < whole.size(); at++) {  // whatever a byte becomes, no crash
        for (int change : {1, 2, 4, 8, 16, 32, 64, 128, 255}) {
            std::string other = whole;
            other[at] = char(other[at] ^ change);
            std::string said = error(other);
            ASSERT_TRUE(said.empty() || said.starts_with("2 ")) << at << said;
        }
    }
}

TEST(Shards, AreRefusedWithIdsPastTheVocabulary) {
    std::string path = test_folder() + "/a.bin";
    for (size_t at : {size_t(0), size_t(4095), size_t(4096), size_t(9999)}) {
        std::vector<int> ids(10000, 99);
        ids[at] = 60000;
        write_shard(path, ids);
        EXPECT_EQ(error_of([&] { Shard(path, 60001); }), "");
        expect_refused(error_of([&] { Shard(path, 60000); }),
                       format("byte %zu: token id 60000, the vocabulary has 60000", 1024 + 2 * at));
        expect_refused(error_of([&] { Shard(path, 99); }), "byte 1024: token id");
    }
}

TEST(Shards, CanBeNpyFiles) {
    std::string path = test_folder() + "/a.npy";
    write_npy(path, {5, 70000, 3}, {3});
    Shard shard(path, 70001);
    EXPECT_EQ(shard.size(), 3u);
    EXPECT_EQ(shard[1], 70000);
    expect_refused(error_of([&] { Shard(path, 70000); }), "byte 132: token id 70000");
    write_npy(path, {5, -1, 3}, {3});
    expect_refused(error_of([&] { Shard(path, INT_MAX); }), "byte 132: token id -1,");
    write_npy(path, {5, 1, 3, 4}, {2, 2});
    expect_refused(error_of([&] { Shard(path, 10); }), "2 dimensions");
    write_npy(path, {}, {0});
    expect_refused(error_of([&] { Shard(path, 10); }), "holds no tokens");

    // Items of 2 and 8 bytes, at an address that is odd.
    std::string u2 = "{'descr': '<u2', 'fortran_order': False, 'shape': (2,)}";
    data_put(path,
             data_npy(u2 + (u2.size() % 2 == 0 ? " " : ""), std::string_view("\1\0\xff\xff", 4)));
    EXPECT_EQ(Shard(path, 65536)[1], 65535);
    int64_t large[] = {7, int64_t(1) << 32};
    std::string u4 = "{'descr': '<u4', 'fortran_order': False, 'shape': (2,)}";
    data_put(path, data_npy(u4, std::string_view("\1\0\0\0\xff\xff\xff\xff", 8)));
    expect_refused(error_of([&] { Shard(path, INT_MAX); }), "token id 4294967295,");
    expect_refused(error_of([&] { read_npy(path); }), "4294967295 is not a 32-bit integer");
    data_put(path, data_npy(u4, std::string_view("\1\0\0\0\xff\xff\1\0", 8)));
    EXPECT_EQ(Shard(path, 1 << 17)[1], 0x1ffff);
    std::string i8 = "{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}";
    data_put(path,
             data_npy(i8 + (i8.size() % 2 == 0 ? " " : ""), {reinterpret_cast<char*>(large), 16}));
    expect_refused(error_of([&] { Shard(path, 10); }), "token id 4294967296");
    large[1] = 9;
    data_put(path, data_npy(i8, {reinterpret_cast<char*>(large), 16}));
    EXPECT_EQ(Shard(path, 10)[1], 9);
}

TEST(Shards, SlicesShareTheFile) {
    std::string path = data_counting_shard(test_folder(), "a.bin", 100);
    std::vector<Shard> slices;
    {
        Shard whole(path, 100);
        slices.push_back(whole.slice(0, 90));
        slices.push_back(whole.slice(90, 100));
        slices.push_back(slices[1].slice(3, 4));
    }
    EXPECT_EQ(slices[0].size(), 90u);
    EXPECT_EQ(slices[0][89], 89);
    EXPECT_EQ(slices[1].size(), 10u);
    EXPECT_EQ(slices[1][0], 90);
    EXPECT_EQ(slices[2].size(), 1u);
    EXPECT_EQ(slices[2][0], 93);
    EXPECT_NE(slices[0].hash(), slices[1].hash());
}

// ---- paths ----

TEST(Paths, ExpandFilesFoldersAndPatterns) {
    std::string folder = test_folder();
    fs::create_directories(folder + "/in/b/c");
    fs::create_directories(folder + "/in/.hidden");
    for (const char* name :
         {"z.txt", "a.txt", "b/m.txt", "b/c/n.txt", "b.txt", ".secret", ".hidden/x.txt"})
        data_put(folder + "/in/" + name, "text");
    data_put(folder + "/in/picture", std::string_view("PNG\0\1", 5));
    data_counting_shard(folder + "/in", "s.bin", 3);
    data_counting_shard(folder + "/in", "shard_without_extension", 3);
    fs::create_symlink(folder + "/in", folder + "/in/b/loop");
    std::string in = folder + "/in/";

    std::vector<std::string> all = {in + "a.txt",   in + "b.txt", in + "b/c/n.txt",
                                    in + "b/m.txt", in + "s.bin", in + "shard_without_extension",
                                    in + "z.txt"};
    std::sort(all.begin(), all.end());
    EXPECT_EQ(expand_paths({folder + "/in"}), all);
    EXPECT_EQ(expand_paths({in + "z.txt", in + "a.txt"}),
              (std::vector<std::string>{in + "z.txt", in + "a.txt"}))
        << "files keep the order in which they were given";
    EXPECT_EQ(expand_paths({in + "?.txt"}),
              (std::vector<std::string>{in + "a.txt", in + "b.txt", in + "z.txt"}));
    EXPECT_EQ(expand_paths({in + "[b]"}),
              (std::vector<std::string>{in + "b/c/n.txt", in + "b/m.txt"}))
        << "a pattern may name folders";
    EXPECT_EQ(expand_paths({in + ".secret", in + "picture"}).size(), 2u)
        << "what is named outright is taken";
    EXPECT_EQ(expand_paths(expand_paths({folder + "/in"})), all);
    data_put(in + "*.txt", "a name that looks like a pattern");
    EXPECT_EQ(expand_paths({in + "*.txt"}), std::vector<std::string>{in + "*.txt"});
    EXPECT_TRUE(expand_paths({}).empty());
}

TEST(Paths, ThatStandForNothingAreRefused) {
    std::string folder = test_folder();
    auto error = [](const std::string& path) { return error_of([&] { expand_paths({path}); }); };
    expect_refused(error(folder + "/none"), folder + "/none: no such file or folder");
    expect_refused(error(""), "no such file or folder");
    expect_refused(error(folder + "/*.bin"), "no file matches this pattern");
    expect_refused(error("/dev/null"), "neither a file nor a folder");
    expect_refused(error(folder), "no files in this folder");
    data_put(folder + "/.hidden", "text");
    expect_refused(error(folder), "no files in this folder");
    data_put(folder + "/a.o", std::string_view("\x7f"
                                               "ELF\0",
                                               5));
    expect_refused(error(folder), "only 1 binary files");
}

TEST(Paths, ShardsAreKnownByContentOrName) {
    std::string folder = test_folder();
    std::string shard = data_counting_shard(folder, "a", 3);
    EXPECT_TRUE(is_shard(shard));
    write_npy(folder + "/b", {1}, {1});
    EXPECT_TRUE(is_shard(folder + "/b"));
    EXPECT_TRUE(is_shard(data_put(folder + "/cut.bin", "x"))) << "damaged, but no text";
    EXPECT_FALSE(is_shard(data_put(folder + "/empty", "")));
    EXPECT_FALSE(is_shard(data_put(folder + "/c.txt", "once upon a time")));
}

// ---- text ----

TEST(Text, IsReadByteForByte) {
    std::string folder = test_folder();
    std::string odd("\xff\xfe\0\r\n\xc3", 6);
    data_put(folder + "/1.txt", "first\n");
    data_put(folder + "/2.txt", "");
    data_put(folder + "/3.txt", odd);
    TextCorpus corpus = read_text({folder + "/1.txt", folder + "/2.txt", folder + "/3.txt"});
    EXPECT_EQ(corpus.text, "first\n" + odd);
    EXPECT_EQ(corpus.document_ends, (std::vector<size_t>{6, 12})) << "an empty file is no document";
}

TEST(Text, ThatIsNotThereIsRefused) {
    std::string folder = test_folder();
    expect_refused(error_of([&] { read_text({}); }), "no text files");
    std::string empty = data_put(folder + "/e.txt", "");
    expect_refused(error_of([&] { read_text({empty}); }), empty + ": empty");
    expect_refused(error_of([&] { read_text({empty, empty}); }), "so are the other 1 files");
    std::string shard = data_counting_shard(folder, "a.bin", 3);
    expect_refused(error_of([&] { read_text({shard}); }), shard + ": a token shard");
    expect_refused(error_of([&] { read_text({folder + "/none.txt"}); }), "no such file");
}

TEST(Text, LastTenthBeginsAtACharacter) {
    EXPECT_EQ(validation_start(""), 0u);
    EXPECT_EQ(validation_start("a"), 0u);
    EXPECT_EQ(validation_start(std::string(9, 'a')), 8u);
    EXPECT_EQ(validation_start(std::string(10, 'a')), 9u);
    EXPECT_EQ(validation_start(std::string(1115394, 'a')), 1003854u);
    for (std::string character :
         {"\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80"})  // 2, 3 and 4 bytes
        for (size_t before = 0; before < 8; before++) {
            std::string text(before, 'a');
            for (int i = 0; i < 40; i++) text += character;
            size_t start = validation_start(text), exact = text.size() * 9 / 10;
            EXPECT_GE(start, exact);
            EXPECT_LT(start, exact + character.size());
            EXPECT_EQ((start - before) % character.size(), 0u);
        }
    EXPECT_EQ(validation_start(std::string(100, '\x80')), 93u) << "invalid text is not eaten up";
}

// ---- token cache ----

namespace {

struct DataCacheTest {
    std::string folder = test_folder();
    Tokenizer tokenizer = Tokenizer::bytes();
    TextCorpus corpus;

    explicit DataCacheTest(const std::vector<std::string>& documents) {
        for (const std::string& document : documents) {
            corpus.text += document;
            corpus.document_ends.push_back(corpus.text.size());
        }
    }
    TokenizedText run(size_t begin, size_t end) {
        return tokenize_cached(corpus, begin, end, tokenizer, folder + "/cache");
    }
    TokenizedText run() { return run(0, corpus.text.size()); }
    std::vector<int> ids(const TokenizedText& result) {
        Shard shard(result.path, tokenizer.vocab_size());
        std::vector<int> ids(shard.size());
        shard.copy(0, ids.size(), ids.data());
        return ids;
    }
    // The text of a shard, with | for the end of text.
    std::string shown(const TokenizedText& result) {
        std::string text;
        for (int id : ids(result))
            text += id == tokenizer.end_of_text() ? "|" : std::string(tokenizer.token_bytes(id));
        return text;
    }
};

}  // namespace

TEST(TokenCache, GivesTheTokensOfTheText) {
    DataCacheTest test({"hello world\n"});
    TokenizedText result = test.run();
    EXPECT_FALSE(result.from_cache);
    EXPECT_EQ(test.ids(result), test.tokenizer.encode(test.corpus.text));
    EXPECT_EQ(result.tokens, 12u);
    EXPECT_EQ(result.bytes, 12u);
}

TEST(TokenCache, PutsTheEndOfTextBetweenDocuments) {
    DataCacheTest test({"one", "two", "three"});
    EXPECT_EQ(test.shown(test.run()), "one|two|three");
    EXPECT_EQ(test.shown(test.run(0, 6)), "one|two|") << "the third document follows elsewhere";
    EXPECT_EQ(test.shown(test.run(6, 11)), "three");
    EXPECT_EQ(test.shown(test.run(0, 5)), "one|tw") << "not inside a document";
    EXPECT_EQ(test.shown(test.run(5, 11)), "o|three");
    EXPECT_EQ(test.shown(test.run(4, 5)), "w");
    TokenizedText result = test.run();
    EXPECT_EQ(result.tokens, 13u);
    EXPECT_EQ(result.bytes, 11u) << "the end of text stands for no bytes";
}

TEST(TokenCache, IsUsedTheSecondTime) {
    DataCacheTest test({"one", "two"});
    TokenizedText first = test.run(), second = test.run();
    EXPECT_FALSE(first.from_cache);
    EXPECT_TRUE(second.from_cache);
    EXPECT_EQ(first.path, second.path);
    EXPECT_EQ(first.tokens, second.tokens);
    EXPECT_EQ(first.bytes, second.bytes);
}

TEST(TokenCache, IsNotUsedForAnythingElse) {
    DataCacheTest test({"one", "two"});
    std::set<std::string> paths = {test.run().path};
    auto expect_new = [&](const TokenizedText& result, const char* why) {
        EXPECT_FALSE(result.from_cache) << why;
        EXPECT_TRUE(paths.insert(result.path).second) << why;
    };
    expect_new(test.run(0, 5), "another end");
    expect_new(test.run(1, 6), "another beginning");
    test.corpus.text[4] = 'x';
    expect_new(test.run(), "a changed byte");
    test.corpus.document_ends = {2, 6};
    expect_new(test.run(), "documents that end elsewhere");
    test.tokenizer = Tokenizer::chars(test.corpus.text);
    expect_new(test.run(), "another tokenizer");

    DataCacheTest twice({"ab", "ab"});
    EXPECT_EQ(twice.shown(twice.run(0, 2)), "ab|");
    EXPECT_EQ(twice.shown(twice.run(2, 4)), "ab") << "the same bytes at the end of the text";
}

TEST(TokenCache, IsWrittenAnewWhenDamaged) {
    DataCacheTest test({"a text that is long enough", "and another"});
    TokenizedText first = test.run();
    std::string whole = read_file(first.path);
    std::vector<std::string> damaged = {"",
                                        "x",
                                        whole.substr(0, 1000),
                                        whole.substr(0, whole.size() - 1),
                                        whole.substr(0, whole.size() - 2),
                                        whole + "xx"};
    for (size_t at : {size_t(0), size_t(4), size_t(8), size_t(12), size_t(19), size_t(1024),
                      whole.size() - 2}) {
        damaged.push_back(whole);
        damaged.back()[at] ^= 1;  // the last two are ids that are still in the vocabulary
    }
    for (const std::string& content : damaged) {
        data_put(first.path, content);
        TokenizedText again = test.run();
        EXPECT_FALSE(again.from_cache);
        EXPECT_EQ(again.tokens, first.tokens);
        EXPECT_EQ(again.bytes, first.bytes);
        EXPECT_EQ(read_file(first.path), whole);
        EXPECT_TRUE(test.run().from_cache);
    }
}

// More tokens than 16 bits tell apart, as the vocabularies from GPT-4's on have.
TEST(TokenCache, HoldsTheIdsOfLargeVocabularies) {
    DataCacheTest test({"zz a"});
    std::string ranks;  // every byte, and every pair of bytes, those that begin with z last
    for (int id = 0; id < 256 + 65536; id++) {
        std::string token(1, char(id));
        if (id >= 256) token = {char((id >> 8) + 'z'), char(id)};
        ranks += to_base64(token) + " " + std::to_string(id) + "\n";
    }
    std::string path = data_put(test.folder + "/wide.tiktoken", ranks);
    test.tokenizer = Tokenizer::load(path, Pattern::cl100k);
    TokenizedText result = test.run();
    EXPECT_EQ(test.ids(result)[0], 65536 + 'z');
    EXPECT_EQ(test.shown(result), "zz a");
    EXPECT_TRUE(test.run().from_cache);
}

// What a killed program left goes when nobody can still be writing it, and nothing else does.
TEST(TokenCache, LosesWhatKilledProgramsLeft) {
    DataCacheTest test({"text"});
    std::string cache = test.folder + "/cache/";
    fs::create_directory(cache);
    auto put = [&](const std::string& name, int hours) {
        data_put(cache + name, "x");
        fs::last_write_time(cache + name,
                            fs::file_time_type::clock::now() - std::chrono::hours(hours));
    };
    std::set<std::string> stay = {
        "0123456789abcdef.bin", "a.bin.12.0123abcd.tmp.bin", "a.tmp",
        ".12.0123abcd.tmp",     "a.bin.12.0123abcg.tmp",     "a.bin.12.0123abc.tmp",
        "a.bin.x.0123abcd.tmp", "a.bin..0123abcd.tmp",       "a12.0123abcd.tmp"};
    for (const std::string& name : stay) put(name, 100);
    put("young.bin.12.0123abcd.tmp", 0);
    stay.insert("young.bin.12.0123abcd.tmp");
    put("old.bin.12.0123abcd.tmp", 2);
    put(fs::path(temporary_name("own.bin")).string(), 2);
    stay.insert(fs::path(test.run().path).filename().string());
    std::set<std::string> there;
    for (const auto& entry : fs::directory_iterator(cache))
        there.insert(entry.path().filename().string());
    EXPECT_EQ(there, stay);
}

TEST(TokenCache, CountsTheBytesThatAVocabularyLacks) {
    DataCacheTest test({"abc\xc3\xa9xyz"});
    test.tokenizer = Tokenizer::chars("abc\xc3\xa9");
    TokenizedText result = test.run();
    EXPECT_EQ(result.tokens, 4u);
    EXPECT_EQ(result.bytes, 5u);
    EXPECT_EQ(test.run().bytes, 5u) << "from the cache";
    expect_refused(error_of([&] { test.run(5, 8); }), "bytes 5 to 8 of the text hold no tokens");
    expect_refused(error_of([&] { test.run(3, 3); }), "no tokens");
}

TEST(TokenCache, ThatCannotBeWrittenIsTheMachinesFault) {
    DataCacheTest test({"text"});
    std::string file = data_put(test.folder + "/file", "in the way");
    std::string error =
        error_of([&] { tokenize_cached(test.corpus, 0, 4, test.tokenizer, file + "/cache"); });
    EXPECT_EQ(error.substr(0, 2), "1 ") << error;
}

TEST(TokenCache, KnowsTheBytesOfATokenFromItsId) {
    Tokenizer tokenizer = Tokenizer::chars("a\xe2\x82\xac");
    std::vector<int> bytes = bytes_per_token(tokenizer);
    ASSERT_EQ(int(bytes.size()), tokenizer.vocab_size());
    EXPECT_EQ(bytes[size_t(tokenizer.encode("a")[0])], 1);
    EXPECT_EQ(bytes[size_t(tokenizer.encode("\xe2\x82\xac")[0])], 3);
    EXPECT_EQ(bytes[size_t(tokenizer.end_of_text())], 0);
}

// ---- training batches ----

TEST(Permutation, GivesEveryNumberOnce) {
    std::vector<uint64_t> counts = {1,  2,  3,  4,   5,   15,  16,   17,
                                    63, 64, 65, 255, 256, 257, 1000, 4097};
    for (uint64_t count : counts)
        for (uint64_t key = 0; key < 5; key++) {
            Permutation order(count, key);
            std::vector<bool> seen(count);
            for (uint64_t i = 0; i < count; i++) {
                uint64_t to = order(i);
                ASSERT_LT(to, count);
                ASSERT_FALSE(seen[to]);
                seen[to] = true;
            }
        }
    Permutation huge(UINT64_MAX, 1);  // computed, so that size costs nothing
    EXPECT_NE(huge(0), huge(1));
    EXPECT_LT(huge(UINT64_MAX - 1), UINT64_MAX);
}

TEST(Permutation, PutsEachNumberInEachPlaceEquallyOften) {
    for (uint64_t count : {2u, 3u, 5u, 16u, 20u}) {
        constexpr int kKeys = 20000;
        std::vector<int> hits(count * count);
        for (uint64_t key = 0; key < kKeys; key++) {
            Permutation order(count, key);
            for (uint64_t i = 0; i < count; i++) hits[i * count + order(i)]++;
        }
        double expected = double(kKeys) / double(count);
        for (int hit : hits) EXPECT_NEAR(hit, expected, 5 * std::sqrt(expected));
    }
    // Neighbours: all orders of three numbers.
    std::map<std::vector<uint64_t>, int> orders;
    for (uint64_t key = 0; key < 6000; key++) {
        Permutation order(3, key);
        orders[{order(0), order(1), order(2)}]++;
    }
    EXPECT_EQ(orders.size(), 6u);
    for (const auto& [order, hits] : orders) EXPECT_NEAR(hits, 1000, 160);
}

TEST(DataLoader, DealsEveryWindowOnceAnEpoch) {
    std::string folder = test_folder();
    std::vector<std::string> paths = {data_counting_shard(folder, "a.bin", 100),
                                      data_counting_shard(folder, "short.bin", 7, 1000),
                                      data_counting_shard(folder, "least.bin", 8, 2000),
                                      data_counting_shard(folder, "b.bin", 59, 3000)};
    constexpr int T = 7;
    DataLoader loader(data_open(paths), 1, T, 0, 1, 5);
    EXPECT_EQ(loader.total_tokens(), 174u);
    std::set<std::vector<int>> orders, offsets;
    for (uint64_t epoch = 0; epoch < 20; epoch++) {
        ASSERT_EQ(loader.epoch(), epoch);
        size_t windows = loader.windows_per_epoch();
        ASSERT_EQ(windows, loader.windows_in_epoch(epoch));
        std::map<int, std::vector<int>> starts_of_shard;
        std::vector<int> order;
        for (const std::vector<int>& row : data_rows(loader, int(windows), 1, T)) {
            for (int t = 0; t < T; t++) {
                ASSERT_EQ(row[size_t(t)], row[0] + t);
                ASSERT_EQ(row[size_t(T + t)], row[0] + t + 1);
            }
            starts_of_shard[row[0] / 1000].push_back(row[0] % 1000);
            order.push_back(row[0]);
        }
        std::vector<int> offsets_now;
        std::map<int, int> tokens = {{0, 100}, {2, 8}, {3, 59}};
        ASSERT_EQ(starts_of_shard.size(), tokens.size());
        for (auto& [shard, starts] : starts_of_shard) {
            std::sort(starts.begin(), starts.end());
            ASSERT_LT(starts[0], T);
            for (size_t i = 1; i < starts.size(); i++) ASSERT_EQ(starts[i], starts[i - 1] + T);
            int end = starts.back() + T + 1;  // no room for one more
            ASSERT_LE(end, tokens[shard]);
            ASSERT_GT(end + T, tokens[shard]);
            offsets_now.push_back(starts[0]);
        }
        orders.insert(order);
        offsets.insert(offsets_now);
        ASSERT_EQ(loader.position().window, 0u);
    }
    EXPECT_EQ(orders.size(), 20u) << "every epoch has an order of its own";
    EXPECT_GT(offsets.size(), 12u) << "offsets differ between epochs";
}

TEST(DataLoader, ReachesEveryTokenOfAShortShard) {
    std::string path = data_counting_shard(test_folder(), "a.bin", 14);
    for (int T : {1, 5, 9, 13}) {
        DataLoader loader(data_open({path}), 1, T, 0, 1, 1);
        std::set<int> seen;
        for (const std::vector<int>& row : data_rows(loader, 400, 1, T))
            seen.insert(row.begin(), row.end());
        EXPECT_EQ(seen.size(), 14u) << T;
    }
}

TEST(DataLoader, SeedsGiveOtherOrders) {
    std::string path = data_counting_shard(test_folder(), "a.bin", 500);
    std::set<DataRows> runs;
    for (uint64_t seed : {0, 1, 2, 3}) {
        DataLoader one(data_open({path}), 2, 8, 0, 1, seed),
            two(data_open({path}), 2, 8, 0, 1, seed);
        DataRows rows = data_rows(one, 40, 2, 8);
        EXPECT_EQ(rows, data_rows(two, 40, 2, 8));
        runs.insert(rows);
    }
    EXPECT_EQ(runs.size(), 4u);
}

TEST(DataLoader, RanksAndMicroBatchesShareOneOrder) {
    std::string path = data_counting_shard(test_folder(), "a.bin", 300);
    constexpr int T = 9, kSequences = 240;  // more than seven epochs; batches lie across their ends
    DataLoader plain(data_open({path}), 1, T, 0, 1, 3);
    DataRows expected = data_rows(plain, kSequences, 1, T);
    for (int world : {1, 2, 3})
        for (int B : {1, 2, 4, 5}) {
            DataRows rows(kSequences);
            for (int rank = 0; rank < world; rank++) {
                DataLoader loader(data_open({path}), B, T, rank, world, 3);
                int batches = kSequences / (B * world);
                DataRows own = data_rows(loader, batches, B, T);
                for (int k = 0; k < batches; k++)
                    for (int b = 0; b < B; b++)
                        rows[size_t((k * world + rank) * B + b)] = own[size_t(k * B + b)];
                EXPECT_EQ(loader.epoch(), plain.epoch());
                EXPECT_EQ(loader.position().window, plain.position().window)
                    << "equal on every rank";
            }
            EXPECT_EQ(rows, expected) << "world " << world << ", B " << B;
        }
}

TEST(DataLoader, GoesOnFromAnyPosition) {
    std::string path = data_counting_shard(test_folder(), "a.bin", 120);
    constexpr int B = 3, T = 5, kBatches = 30;
    for (int rank : {0, 1}) {
        DataLoader whole(data_open({path}), B, T, rank, 2, 11);
        std::vector<DataLoader::Position> positions;
        DataRows rows;
        for (int k = 0; k < kBatches; k++) {
            positions.push_back(whole.position());
            for (std::vector<int>& row : data_rows(whole, 1, B, T)) rows.push_back(row);
        }
        EXPECT_GT(whole.epoch(), 5u);
        for (int k = 0; k < kBatches; k++) {
            DataLoader resumed(data_open({path}), B, T, rank, 2, 11);
            data_rows(resumed, k % 3, B, T);  // wherever it stands
            resumed.seek(positions[size_t(k)]);
            DataRows rest(rows.begin() + k * B, rows.end());
            ASSERT_EQ(data_rows(resumed, kBatches - k, B, T), rest) << k;
        }
    }
}

TEST(DataLoader, RefusesAPositionThatTheDataDoesNotHave) {
    std::string path = data_counting_shard(test_folder(), "a.bin", 101);
    DataLoader loader(data_open({path}), 1, 10, 0, 1, 0);
    loader.seek({0, loader.windows_per_epoch() - 1});
    EXPECT_NEAR(loader.epoch_fraction(), 1 - 1.0 / double(loader.windows_per_epoch()), 1e-12);
    size_t past = loader.windows_in_epoch(3);
    expect_refused(error_of([&] {
                       loader.seek({3, past});
                   }),
                   format("window %zu of epoch 3, which has only %zu here", past, past));
    expect_refused(error_of([&] { loader.seek({0, UINT64_MAX}); }), "has the data");
    loader.seek({UINT64_MAX - 1, 0});
    EXPECT_EQ(loader.epoch(), UINT64_MAX - 1);
}

TEST(DataLoader, RefusesTextShorterThanAWindow) {
    std::string folder = test_folder();
    std::string ten = data_counting_shard(folder, "ten.bin", 10);
    std::string nine = data_counting_shard(folder, "nine.bin", 9);
    std::string one = data_counting_shard(folder, "one.bin", 1);
    auto error = [](const std::vector<std::string>& paths, int B, int T) {
        return error_of([&] { DataLoader(data_open(paths), B, T, 0, 1, 0); });
    };
    EXPECT_EQ(error({ten}, 1, 9), "");
    expect_refused(error({ten}, 1, 10), ten + ": 10 tokens are less than a window of 10 + 1");
    expect_refused(error({nine, ten}, 1, INT_MAX), "--sequence-length 9");
    EXPECT_EQ(error({nine, ten}, 1, 9), "") << "the shard that is long enough is used";
    expect_refused(error({one}, 1, 1), one + ": 1 token");
    expect_refused(error({}, 1, 1), "no training data");
    expect_refused(error({ten}, 0, 1), "--batch-size 0");
    expect_refused(error({ten}, 1, 0), "--sequence-length 0");
    expect_refused(error({ten}, -1, 1), "--batch-size -1");
}

TEST(DataLoader, KnowsChangedData) {
    std::string folder = test_folder();
    std::string a = data_counting_shard(folder, "a.bin", 50),
                b = data_counting_shard(folder, "b.bin", 50, 1);
    auto hash = [](const std::vector<std::string>& paths) {
        return data_hash(DataLoader(data_open(paths), 1, 4, 0, 1, 0).shard_hashes());
    };
    EXPECT_EQ(hash({a, b}), hash({a, b}));
    std::set<uint64_t> hashes = {hash({a, b}), hash({b, a}), hash({a}), hash({b}), hash({a, a})};
    EXPECT_EQ(hashes.size(), 5u);
}

// ---- evaluation batches ----

TEST(EvalLoader, PredictsEveryTokenButTheFirstOnce) {
    std::string folder = test_folder();
    std::vector<int> sizes = {30, 1, 2, 31, 8, 9, 10};
    std::vector<std::string> paths;
    for (size_t s = 0; s < sizes.size(); s++)
        paths.push_back(data_counting_shard(folder, std::to_string(s), sizes[s], int(s) * 1000));
    std::vector<Shard> shards = data_open(paths);
    for (int T : {1, 3, 8, 29, 64})
        for (int B : {1, 2, 5, 100}) {
            EvalLoader loader(shards, B, T);
            for (int turn = 0; turn < 2; turn++, loader.reset()) {
                std::vector<int> inputs(size_t(B * T), -9), targets(size_t(B * T), -9), predicted;
                size_t windows = 0, batches = 0;
                for (int rows = -9; loader.next_batch(inputs.data(), targets.data(), &rows);
                     batches++) {
                    windows += size_t(rows);
                    for (int i = 0; i < B * T; i++) {
                        int input = inputs[size_t(i)], target = targets[size_t(i)];
                        if (target == kIgnore) {
                            ASSERT_EQ(input, 0);
                        } else {
                            ASSERT_LT(i / T, rows);
                            ASSERT_EQ(target, input + 1);
                            predicted.push_back(target);
                        }
                    }
                }
                std::vector<int> expected;
                for (size_t s = 0; s < sizes.size(); s++)
                    for (int i = 1; i < sizes[s]; i++) expected.push_back(int(s) * 1000 + i);
                ASSERT_EQ(predicted, expected) << "in order; T " << T << ", B " << B;
                ASSERT_EQ(windows, loader.windows());
                ASSERT_EQ(batches, loader.batches());
                int rows = -9;
                inputs.assign(inputs.size(), -9);
                EXPECT_FALSE(loader.next_batch(inputs.data(), targets.data(), &rows));
                EXPECT_EQ(rows, -9);
                EXPECT_EQ(inputs[0], -9);
            }
        }
}

TEST(EvalLoader, SpreadsALimitOverTheSet) {
    std::vector<Shard> shards = data_open({data_counting_shard(test_folder(), "a.bin", 101)});
    EXPECT_EQ(EvalLoader(shards, 2, 10).windows(), 10u);
    EXPECT_EQ(EvalLoader(shards, 2, 10, 1000).windows(), 10u);
    EvalLoader loader(shards, 2, 10, 4);
    EXPECT_EQ(loader.windows(), 4u);
    EXPECT_EQ(loader.batches(), 2u);
    std::vector<int> inputs(20), targets(20), starts;
    int rows = 0;
    while (loader.next_batch(inputs.data(), targets.data(), &rows))
        for (int row = 0; row < rows; row++) starts.push_back(inputs[size_t(row) * 10]);
    EXPECT_EQ(starts, (std::vector<int>{0, 20, 50, 70}));
}

TEST(EvalLoader, RefusesWhatHasNothingToPredict) {
    std::string one = data_counting_shard(test_folder(), "one.bin", 1);
    std::vector<Shard> shards = data_open({one}), none;
    expect_refused(error_of([&] { EvalLoader(shards, 1, 4); }), one + ": a single token");
    expect_refused(error_of([&] { EvalLoader(none, 1, 4); }), "no evaluation data");
    expect_refused(error_of([&] { EvalLoader(shards, 0, 4); }), "--batch-size 0");
    expect_refused(error_of([&] { EvalLoader(shards, 1, -4); }), "--sequence-length -4");
}

int main(int argc, char** argv) { return run_tests(argc, argv); }
