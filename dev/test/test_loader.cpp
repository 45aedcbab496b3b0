// The tests of what deals batches: orders of windows, ranks, positions, documents kept apart, the
// thread that works ahead, and files that change under it.

#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <set>

#include "../../dataloader.h"
#include "tools.h"

namespace {

using Row = std::vector<int>;  // T inputs, then T targets
using Rows = std::vector<Row>;

std::string loader_shard(const std::string& folder, const std::string& name, int count,
                         int first = 0) {
    std::vector<int> ids(static_cast<size_t>(count));
    std::iota(ids.begin(), ids.end(), first);
    write_shard(folder + "/" + name, ids);
    return folder + "/" + name;
}

std::vector<Shard> loader_open(const std::vector<std::string>& paths) {
    std::vector<Shard> shards;
    for (const std::string& path : paths) shards.emplace_back(path, 65536);
    return shards;
}

WindowOptions order_of(WindowOrder order, size_t stride = 0) {
    WindowOptions options;
    options.order = order, options.stride = stride;
    return options;
}

const WindowOptions kOrders[] = {order_of(WindowOrder::shuffled), order_of(WindowOrder::sliding),
                                 order_of(WindowOrder::sliding, 3), order_of(WindowOrder::random)};

void add_rows(const std::vector<int>& inputs, const std::vector<int>& targets, int T, Rows* rows) {
    for (size_t begin = 0; begin < inputs.size(); begin += size_t(T)) {
        Row row(inputs.begin() + ptrdiff_t(begin), inputs.begin() + ptrdiff_t(begin) + T);
        row.insert(row.end(), targets.begin() + ptrdiff_t(begin),
                   targets.begin() + ptrdiff_t(begin) + T);
        rows->push_back(row);
    }
}

Rows take(DataLoader& loader, int batches) {
    Rows rows;
    std::vector<int> inputs(loader.B() * loader.T(), -7), targets(inputs);
    for (int k = 0; k < batches; k++) {
        loader.next_batch(inputs.data(), targets.data());
        add_rows(inputs, targets, int(loader.T()), &rows);
    }
    return rows;
}

std::vector<int> starts_of(const Rows& rows) {
    std::vector<int> starts;
    for (const Row& row : rows) starts.push_back(row[0]);
    return starts;
}

}  // namespace

// ---- orders ----

// What a run that was begun by an older program goes on with.
TEST(WindowOrders, TheDefaultIsTheOneThatItEverWas) {
    std::string folder = test_folder();
    std::vector<std::string> paths = {loader_shard(folder, "a.bin", 40),
                                      loader_shard(folder, "b.bin", 23, 1000)};
    DataLoader loader(loader_open(paths), 1, 5, 0, 1, 42);
    EXPECT_EQ(starts_of(take(loader, 24)),
              (std::vector<int>{1,  1009, 1014, 31, 1004, 11, 16, 21,   26,   6,  1003, 17,
                                22, 1013, 2,    32, 27,   12, 7,  1008, 1002, 10, 20,   25}));
    EXPECT_EQ(loader.position(), (DataLoader::Position{2, 4}));
}

TEST(WindowOrders, SlidingWindowsBeginAtEveryStrideOnceAnEpoch) {
    std::string folder = test_folder();
    std::vector<std::string> paths = {
        loader_shard(folder, "a.bin", 50), loader_shard(folder, "short.bin", 7, 1000),
        loader_shard(folder, "least.bin", 8, 2000), loader_shard(folder, "b.bin", 29, 3000)};
    constexpr int T = 7;
    const int sizes[] = {50, 7, 8, 29};
    for (size_t stride : {1, 2, 3, 7, 0}) {
        DataLoader loader(loader_open(paths), 1, T, 0, 1, 5,
                          order_of(WindowOrder::sliding, stride));
        std::vector<int> expected;
        for (int s = 0; s < 4; s++)
            for (int start = 0; start + T<sizes[s]; start += stride> 0 ? int(stride) : T)
                expected.push_back(1000 * s + start);
        std::set<std::vector<int>> orders;
        for (int epoch = 0; epoch < 5; epoch++) {
            ASSERT_EQ(loader.windows_per_epoch(), expected.size());
            Rows rows = take(loader, int(expected.size()));
            for (const Row& row : rows)
                for (int t = 0; t < T; t++) {
                    ASSERT_EQ(row[size_t(t)], row[0] + t);
                    ASSERT_EQ(row[size_t(T + t)], row[0] + t + 1);
                }
            std::vector<int> starts = starts_of(rows);
            orders.insert(starts);
            std::sort(starts.begin(), starts.end());
            ASSERT_EQ(starts, expected) << "stride " << stride;
        }
        EXPECT_EQ(orders.size(), 5u) << "every epoch has an order of its own";
    }
}

TEST(WindowOrders, RandomWindowsReachEveryPlaceEquallyOften) {
    std::string folder = test_folder();
    std::vector<std::string> paths = {loader_shard(folder, "a.bin", 20),
                                      loader_shard(folder, "short.bin", 4, 1000),
                                      loader_shard(folder, "b.bin", 9, 2000)};
    constexpr int T = 4, kWindows = 42000;
    DataLoader loader(loader_open(paths), 1, T, 0, 1, 3, order_of(WindowOrder::random));
    EXPECT_EQ(loader.windows_per_epoch(), 6u) << "as many as would follow one another";
    EXPECT_EQ(loader.windows_in_epoch(7), 6u);
    std::map<int, int> hits;
    std::set<std::vector<int>> epochs;
    for (int epoch = 0; epoch < kWindows / 6; epoch++) {
        std::vector<int> starts = starts_of(take(loader, 6));
        for (int start : starts) hits[start]++;
        epochs.insert(starts);
    }
    ASSERT_EQ(hits.size(), size_t(16 + 5)) << "every place where a window and its target fit";
    EXPECT_EQ(hits.begin()->first, 0);
    EXPECT_EQ(hits.rbegin()->first, 2004);
    for (auto [start, count] : hits) EXPECT_NEAR(count, 2000, 225) << start;
    EXPECT_GT(epochs.size(), 6990u);
}

TEST(WindowOrders, RefuseAStrideThatLeavesTokensOut) {
    std::string path = loader_shard(test_folder(), "a.bin", 50);
    auto error = [&](const WindowOptions& options) {
        return error_of([&] { DataLoader(loader_open({path}), 1, 8, 0, 1, 0, options); });
    };
    EXPECT_EQ(error(order_of(WindowOrder::sliding, 8)), "");
    expect_refused(error(order_of(WindowOrder::sliding, 9)), "--stride 9: more than the 8 tokens");
    expect_refused(error(order_of(WindowOrder::shuffled, 2)), "--stride 2: is for --windows");
    expect_refused(error(order_of(WindowOrder::random, 2)), "--stride 2: is for --windows");
}

// More windows than 32 bits count: one shard without content, many times over.
TEST(WindowOrders, CountPastTwoToTheThirtyTwo) {
    std::string path = test_folder() + "/a.bin";
    constexpr size_t kTokens = size_t(1) << 26, kCopies = 70;
    write_shard(path, {1});
    std::string header = read_file(path).substr(0, kShardHeaderBytes);
    int32_t count = kTokens;
    memcpy(&header[8], &count, sizeof count);
    std::ofstream(path, std::ios::binary) << header;
    fs::resize_file(path, kShardHeaderBytes + 2 * kTokens);
    std::vector<Shard> shards(kCopies, Shard(path, 10));
    for (WindowOptions options : {order_of(WindowOrder::shuffled), order_of(WindowOrder::random)}) {
        DataLoader loader(shards, 2, 1, 0, 1, 9, options);
        EXPECT_EQ(loader.total_tokens(), kCopies * kTokens);
        ASSERT_EQ(loader.windows_in_epoch(0), kCopies * (kTokens - 1));
        ASSERT_GT(loader.windows_per_epoch(), size_t(UINT32_MAX));
        uint64_t last = loader.windows_per_epoch() - 1;
        loader.seek({0, last});
        EXPECT_EQ(loader.position().window, last);
        EXPECT_EQ(take(loader, 1), (Rows{{0, 0}, {0, 0}}));
        EXPECT_EQ(loader.position(), (DataLoader::Position{1, 1}));
    }
}

// ---- ranks and positions ----

TEST(WindowOrders, AreTheSameOverRanksAndMicroBatches) {
    std::string path = loader_shard(test_folder(), "a.bin", 100);
    constexpr int T = 9, kSequences = 240;
    for (const WindowOptions& options : kOrders) {
        DataLoader plain(loader_open({path}), 1, T, 0, 1, 3, options);
        Rows expected = take(plain, kSequences);
        for (int world : {2, 3})
            for (int B : {1, 4, 5}) {
                Rows rows(kSequences);
                int batches = kSequences / (B * world);
                for (int rank = 0; rank < world; rank++) {
                    DataLoader loader(loader_open({path}), B, T, rank, world, 3, options);
                    Rows own = take(loader, batches);
                    for (int k = 0; k < batches; k++)
                        for (int b = 0; b < B; b++)
                            rows[size_t((k * world + rank) * B + b)] = own[size_t(k * B + b)];
                }
                EXPECT_EQ(rows, expected) << "world " << world << ", B " << B;
            }
    }
}

// A run that stops on some ranks and goes on with others: steps of 12 sequences, whoever takes
// them.
TEST(WindowOrders, GoOnWithAnotherNumberOfRanks) {
    std::string path = loader_shard(test_folder(), "a.bin", 130);
    constexpr int T = 5, kStep = 12, kSteps = 9;
    struct Split {
        int world, B;
    };
    const Split splits[] = {{1, 12}, {1, 3}, {2, 6}, {2, 1}, {3, 2}, {4, 3}, {12, 1}};
    // One step of a world from a position: its rows in the order of sequences, and where it ends.
    auto step = [&](const WindowOptions& options, Split split, DataLoader::Position* position) {
        int micro_batches = kStep / (split.world * split.B);
        Rows rows(kStep);
        DataLoader::Position end;
        for (int rank = 0; rank < split.world; rank++) {
            DataLoader loader(loader_open({path}), split.B, T, rank, split.world, 3, options);
            loader.seek(*position);
            Rows own = take(loader, micro_batches);
            for (int m = 0; m < micro_batches; m++)
                for (int b = 0; b < split.B; b++)
                    rows[size_t((m * split.world + rank) * split.B + b)] =
                        own[size_t(m * split.B + b)];
            if (rank > 0) { EXPECT_EQ(loader.position(), end) << "equal on every rank"; }
            end = loader.position();
        }
        *position = end;
        return rows;
    };
    for (const WindowOptions& options : kOrders) {
        DataLoader whole(loader_open({path}), kStep, T, 0, 1, 3, options);
        DataLoader::Position position;
        for (int k = 0; k < kSteps; k++) {
            Rows rows = step(options, splits[size_t(k) % std::size(splits)], &position);
            ASSERT_EQ(rows, take(whole, 1)) << "step " << k;
            ASSERT_EQ(position, whole.position()) << "step " << k;
        }
        EXPECT_GT(whole.epoch(), 0u);
    }
}

TEST(WindowOrders, GoOnFromAnyPosition) {
    std::string path = loader_shard(test_folder(), "a.bin", 120);
    for (const WindowOptions& options : kOrders) {
        DataLoader whole(loader_open({path}), 3, 5, 1, 2, 11, options);
        std::vector<DataLoader::Position> positions;
        Rows rows;
        for (int k = 0; k < 20; k++) {
            positions.push_back(whole.position());
            for (Row& row : take(whole, 1)) rows.push_back(row);
        }
        for (int k = 0; k < 20; k++) {
            DataLoader resumed(loader_open({path}), 3, 5, 1, 2, 11, options);
            take(resumed, k % 3);  // wherever it stands
            resumed.seek(positions[size_t(k)]);
            ASSERT_EQ(take(resumed, 20 - k), Rows(rows.begin() + k * 3, rows.end())) << k;
        }
    }
}

// ---- documents ----

TEST(Documents, TheFirstTokenOfTheNextIsNoTarget) {
    std::string path = test_folder() + "/a.bin";
    constexpr int kEnd = 9, T = 6;
    std::vector<int> ids = random_ids(500, 10, 4);  // a tenth are ends, some beside each other
    ids[0] = ids[1] = ids[498] = ids[499] = kEnd;
    write_shard(path, ids);
    for (WindowOptions options : kOrders) {
        DataLoader plain(loader_open({path}), 2, T, 0, 1, 1, options);
        options.separator = kEnd;
        DataLoader apart(loader_open({path}), 2, T, 0, 1, 1, options);
        Rows a = take(plain, 60), b = take(apart, 60);
        size_t masked = 0;
        for (size_t r = 0; r < a.size(); r++)
            for (size_t t = 0; t < T; t++) {
                ASSERT_EQ(b[r][t], a[r][t]) << "inputs stay";
                bool crosses = a[r][t] == kEnd;
                masked += crosses;
                ASSERT_EQ(b[r][T + t], crosses ? kIgnore : a[r][T + t]);
            }
        EXPECT_GT(masked, 30u);
    }
    std::vector<Shard> shards = loader_open({path});
    EvalLoader loader(shards, 3, T, 0, kEnd);
    std::vector<int> inputs(3 * T), targets(3 * T);
    size_t counted = 0;
    while (loader.next_batch(inputs.data(), targets.data()))
        for (size_t i = 0; i < inputs.size(); i++) {
            if (targets[i] == kIgnore) continue;
            counted++;
            EXPECT_NE(inputs[i], kEnd);
        }
    EXPECT_EQ(counted, size_t(499 - std::count(ids.begin(), ids.end() - 1, kEnd)));
}

// ---- working ahead ----

TEST(Prefetch, DealsTheSameBatchesAndPositions) {
    std::string folder = test_folder();
    std::vector<std::string> paths = {loader_shard(folder, "a.bin", 90),
                                      loader_shard(folder, "b.bin", 60, 1000)};
    constexpr int B = 2, T = 5, kMicro = 3;
    for (const WindowOptions& options : kOrders) {
        DataLoader plain(loader_open(paths), B, T, 0, 1, 8, options);
        PrefetchLoader ahead(DataLoader(loader_open(paths), B, T, 0, 1, 8, options), kMicro);
        std::vector<int> inputs(kMicro * B * T), targets(inputs);
        for (int step = 0; step < 200; step++) {
            ASSERT_EQ(ahead.position(), plain.position()) << "of what was dealt, step " << step;
            ASSERT_EQ(ahead.epoch_fraction(), plain.epoch_fraction());
            ASSERT_EQ(ahead.windows_per_epoch(), plain.windows_per_epoch());
            ahead.next_batches(inputs.data(), targets.data());
            Rows rows;
            add_rows(inputs, targets, T, &rows);
            ASSERT_EQ(rows, take(plain, kMicro)) << step;
        }
    }
}

TEST(Prefetch, GoesWhereItIsSent) {
    std::string path = loader_shard(test_folder(), "a.bin", 90);
    auto open = [&] { return DataLoader(loader_open({path}), 2, 5, 0, 1, 8); };
    DataLoader plain = open();
    PrefetchLoader ahead(open(), 2);
    std::vector<int> inputs(20), targets(20);
    auto next = [&] {
        ahead.next_batches(inputs.data(), targets.data());
        Rows rows;
        add_rows(inputs, targets, 5, &rows);
        return rows;
    };
    for (uint64_t turn = 0; turn < 40; turn++) {
        DataLoader::Position to{turn % 3, turn * 7 % 17};
        ahead.seek(to), plain.seek(to);
        if (turn % 4 == 1) ahead.seek(to);
        ASSERT_EQ(ahead.position(), to);
        ASSERT_EQ(ahead.epoch_fraction(), plain.epoch_fraction());
        for (uint64_t k = 0; k < turn % 3; k++) ASSERT_EQ(next(), take(plain, 2)) << turn;
        if (turn % 5 == 0) { ASSERT_EQ(ahead.shard_hashes(), plain.shard_hashes()); }
    }
    ahead.seek({4, 3}), plain.seek({4, 3});
    ahead.seek({5, 3}), plain.seek({5, 3});
    ASSERT_EQ(next(), take(plain, 2)) << "the same window of another epoch";
    DataLoader::Position here = ahead.position();
    expect_refused(error_of([&] { ahead.seek({3, 1000}); }), "window 1000 of epoch 3");
    EXPECT_EQ(ahead.position(), here) << "a refusal changes nothing";
    plain.seek(here);
    EXPECT_EQ(next(), take(plain, 2));
}

TEST(Prefetch, EndsWhateverTheThreadDoes) {
    std::string path = loader_shard(test_folder(), "a.bin", 3000);
    std::vector<int> inputs(64 * 40), targets(inputs);
    for (int turn = 0; turn < 50; turn++) {
        PrefetchLoader ahead(DataLoader(loader_open({path}), 64, 40, 0, 1, 8), 1);
        for (int k = 0; k < turn % 3; k++) ahead.next_batches(inputs.data(), targets.data());
    }
}

// An error is that of the batches which the caller asks for, not of those that the thread makes.
TEST(Prefetch, ThrowsTheErrorsOfTheThreadWhereTheyBelong) {
    std::string folder = test_folder(), path = loader_shard(folder, "a.bin", 90);
    std::string whole = read_file(path);
    PrefetchLoader ahead(DataLoader(loader_open({path}), 2, 5, 0, 1, 8), 1);
    DataLoader plain(loader_open({path}), 2, 5, 0, 1, 8, {WindowOrder::shuffled, 0, -1, false});
    std::vector<int> inputs(10), targets(10);
    auto next = [&] {
        return error_of([&] { ahead.next_batches(inputs.data(), targets.data()); });
    };
    ahead.shard_hashes();
    EXPECT_EQ(next(), "");
    fs::rename(path, path + ".away");
    DataLoader::Position here;
    std::string error;
    for (int k = 0; k < 2 && error.empty(); k++) {  // the first may have been made before
        here = ahead.position();
        error = next();
    }
    EXPECT_EQ(error.substr(0, 2 + path.size()), "1 " + path);
    EXPECT_NE(error.find("was removed while"), std::string::npos) << error;
    EXPECT_EQ(ahead.position(), here);
    EXPECT_EQ(next().substr(0, 2), "1 ") << "and again";
    fs::rename(path + ".away", path);
    EXPECT_EQ(next(), "") << "it is back";
    Rows rows;
    ahead.seek(here), plain.seek(here);
    EXPECT_EQ(next(), "");
    add_rows(inputs, targets, 5, &rows);
    EXPECT_EQ(rows, take(plain, 1)) << "nothing was skipped";
    EXPECT_EQ(read_file(path), whole);
}

// An error in the middle of a step: what was made of it before is made again.
TEST(Prefetch, TakesAStepThatFailedFromItsBeginning) {
    std::string folder = test_folder();
    std::vector<std::string> paths = {loader_shard(folder, "a.bin", 200),
                                      loader_shard(folder, "b.bin", 40, 1000)};
    DataLoader plain(loader_open(paths), 1, 5, 0, 1, 2, {WindowOrder::shuffled, 0, -1, false});
    PrefetchLoader ahead(DataLoader(loader_open(paths), 1, 5, 0, 1, 2), 40);
    std::vector<int> inputs(200), targets(200);
    for (int turn = 0; turn < 4; turn++) {
        fs::rename(paths[1], paths[1] + ".away");
        std::string error;
        for (int k = 0; k < 3 && error.empty(); k++) {
            error = error_of([&] { ahead.next_batches(inputs.data(), targets.data()); });
            if (error.empty()) take(plain, 40);
        }
        EXPECT_EQ(error.substr(0, 2 + paths[1].size()), "1 " + paths[1]);
        fs::rename(paths[1] + ".away", paths[1]);
        ASSERT_EQ(ahead.position(), plain.position());
        ahead.next_batches(inputs.data(), targets.data());
        Rows rows;
        add_rows(inputs, targets, 5, &rows);
        ASSERT_EQ(rows, take(plain, 40));
    }
}

// ---- files that change ----

namespace {

// What a loader says after `change` has been done to the file of one of its two shards.
template <typename F>
std::string after_change(F change, bool hashed = true, bool watch = true) {
    std::string folder = test_folder();
    std::string path = loader_shard(folder, "a.bin", 3000);
    std::string other = loader_shard(folder, "b.bin", 3000, 3000);
    WindowOptions options;
    options.watch = watch;
    DataLoader loader(loader_open({path, other}), 4, 100, 0, 1, 8, options);
    if (hashed) loader.shard_hashes();
    take(loader, 30);
    change(path);
    std::string error = error_of([&] { take(loader, 30); });
    if (!error.empty()) {
        EXPECT_EQ(error.substr(0, 2 + path.size()), "1 " + path) << error;
        EXPECT_EQ(error.find('\n'), std::string::npos);
    }
    return error;
}

void overwrite(const std::string& path, size_t at, const std::string& bytes) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(std::streamoff(at));
    file << bytes;
}

}  // namespace

TEST(Watching, AFileThatIsNoLongerTheSameIsNamed) {
    auto contains = [](const std::string& error, const std::string& part) {
        EXPECT_NE(error.find(part), std::string::npos) << error << "\nlacks: " << part;
    };
    contains(after_change([](auto path) { fs::remove(path); }), "was removed while");
    contains(after_change([](auto path) { fs::resize_file(path, 1024); }),
             "had 7024 bytes and has 1024 since");
    contains(after_change([](auto path) { fs::resize_file(path, 0); }), "has 0 since");
    contains(after_change([](auto path) { fs::resize_file(path, 8000); }), "has 8000 since");
    contains(after_change([](auto path) { overwrite(path, 2000, "xy"); }), "was changed while");
    contains(after_change([](auto path) {
                 loader_shard(fs::path(path).parent_path().string(), "new", 3000, 7);
                 fs::rename(fs::path(path).parent_path() / "new", path);
             }),
             "was changed while");
    contains(after_change([](auto path) {
                 fs::remove(path);
                 fs::create_directory(path);
             }),
             "since, while");
}

// Between a look at the file and what is read of it: nothing of it is dealt.
TEST(Watching, AFileThatIsCutWhileABatchIsReadIsNamed) {
    struct sigaction before, action = {};
    action.sa_flags = SA_SIGINFO;
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
        if (!CutWatch::mend(info->si_addr)) abort();
    };
    sigaction(SIGBUS, &action, &before);
    std::string folder = test_folder();
    WindowOptions alone;
    alone.watch = false;
    for (bool evaluates : {false, true}) {
        std::string path = loader_shard(folder, "a.bin", 30000);
        std::vector<Shard> shards = loader_open({path});
        fs::resize_file(path, 1024);
        std::vector<int> inputs(400), targets(400);
        std::string error = error_of([&] {
            if (evaluates) EvalLoader(shards, 4, 100, 4).next_batch(inputs.data(), targets.data());
            else
                DataLoader(shards, 4, 100, 0, 1, 8, alone)
                    .next_batch(inputs.data(), targets.data());
        });
        EXPECT_EQ(error.substr(0, 2 + path.size()), "1 " + path) << error;
        EXPECT_NE(error.find("was cut short while the program reads it; put it back"),
                  std::string::npos)
            << error;
    }
    sigaction(SIGBUS, &before, nullptr);
}

namespace {

// Called when the second row of a batch is written: see RowsWithAMiddle.
std::function<void()> middle;

// Memory for the inputs of two rows of a page each, of which the second may not be written before
// `middle` was called.
struct RowsWithAMiddle {
    size_t page = size_t(sysconf(_SC_PAGESIZE));
    int* rows = static_cast<int*>(
        mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    struct sigaction before;

    explicit RowsWithAMiddle(const std::function<void()>& call) {
        char* second = reinterpret_cast<char*>(rows) + page;
        mprotect(second, page, PROT_NONE);
        middle = [=, size = page] {
            mprotect(second, size, PROT_READ | PROT_WRITE);
            call();
        };
        struct sigaction action = {};
        action.sa_handler = [](int) { middle(); };
        sigaction(SIGSEGV, &action, &before);
    }
    ~RowsWithAMiddle() {
        sigaction(SIGSEGV, &before, nullptr);
        munmap(rows, 2 * page);
    }
    int T() const { return int(page / sizeof(int)); }
};

}  // namespace

// A page that is cut within reads as zeros and raises nothing, and other bytes never do: the look
// behind a batch notices.
TEST(Watching, WhatChangesWhileABatchIsReadIsNoticedWithIt) {
    auto after = [](auto change) {
        std::string path = loader_shard(test_folder(), "a.bin", 30000);
        RowsWithAMiddle inputs([&] { change(path); });
        std::vector<int> targets(2 * size_t(inputs.T()));
        WindowOptions options;
        options.watch = true;
        DataLoader loader(loader_open({path}), 2, inputs.T(), 0, 1, 8, options);
        loader.shard_hashes();
        return error_of([&] { loader.next_batch(inputs.rows, targets.data()); });
    };
    EXPECT_EQ(after([](auto) {}), "");
    std::string error = after([](auto path) { overwrite(path, 50000, "xy"); });
    EXPECT_NE(error.find("was changed while"), std::string::npos) << error;
    error = after([](auto path) { fs::resize_file(path, 60500); });
    EXPECT_NE(error.find("had 61024 bytes and has 60500 since"), std::string::npos) << error;
}

TEST(Watching, AFileThatWasTouchedOrCopiedToItsPlaceIsTheSame) {
    auto touch = [](const std::string& path) {
        fs::last_write_time(path, fs::last_write_time(path) + std::chrono::hours(1));
    };
    auto copy = [](const std::string& path) {
        fs::copy_file(path, path + ".copy");
        fs::rename(path + ".copy", path);
    };
    EXPECT_EQ(after_change([](auto) {}), "");
    EXPECT_EQ(after_change(touch), "");
    EXPECT_EQ(after_change(copy), "");
    EXPECT_NE(after_change(touch, false), "") << "nothing is known to compare it with";
    EXPECT_EQ(after_change([](auto path) { fs::remove(path); }, true, false), "") << "not watched";
}
