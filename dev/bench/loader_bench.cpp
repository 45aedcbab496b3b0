// `make bench`: how long 10 GB of tokens take to open, and how fast tokens come out of a shard,
// beside memcpy of the same bytes in the same run.
//   loader_bench [FOLDER]      where the files go; a new folder in the system's temporary one
#include <unistd.h>

#include <chrono>

#include "../../dataloader.h"

namespace {

constexpr size_t kBatch = 1 << 16;  // tokens at a time
constexpr int kVocabulary = 50257, kRounds = 5;

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// Five thousand million zeros, which take no room on the disk.
void time_opening(const std::string& path) {
    constexpr size_t kTokens = 5000000000;
    write_file_atomic(path, "");
    fs::resize_file(path, kTokens * sizeof(uint16_t));
    double best_s = 1e9;
    for (int round = 0; round < kRounds; round++) {
        double begin_s = now_s();
        Shard shard(path, kVocabulary, RawTokens::uint16);
        best_s = std::min(best_s, now_s() - begin_s);
    }
    fs::remove(path);
    printf("opening a file of %.0f GB: %.2f ms\n", kTokens * sizeof(uint16_t) / 1e9, 1e3 * best_s);
}

// The rate of the best round, in GB/s of `bytes` that f reads kBatch ids at a time.
template <typename F>
double rate(size_t tokens, F f) {
    double best_s = 1e9;
    for (int round = 0; round < kRounds; round++) {
        double begin_s = now_s();
        for (size_t begin = 0; begin + kBatch <= tokens; begin += kBatch) f(begin);
        best_s = std::min(best_s, now_s() - begin_s);
    }
    return double(tokens * sizeof(uint16_t)) / 1e9 / best_s;
}

void time_loading(const std::string& path) {
    constexpr size_t kTokens = size_t(1) << 28;
    std::vector<int> ids(kBatch);
    ShardWriter writer(path, sizeof(uint16_t), false);
    for (size_t i = 0; i < kTokens; i++) {
        ids[i % kBatch] = int(uint32_t(i * 2654435761u) % uint32_t(kVocabulary));
        if ((i + 1) % kBatch == 0) writer.add(ids.data(), kBatch);
    }
    writer.commit();
    Shard shard(path, kVocabulary);
    double own = rate(kTokens, [&](size_t begin) { shard.copy(begin, kBatch, ids.data()); });
    const char* bytes = shard.file().data() + kShardHeaderBytes;
    double floor = rate(kTokens, [&](size_t begin) {
        memcpy(ids.data(), bytes + begin * sizeof(uint16_t), kBatch * sizeof(uint16_t));
        asm volatile("" : : "r"(ids.data()) : "memory");  // nobody reads what was copied
    });
    fs::remove(path);
    printf("checked ids from a shard: %.1f GB/s of the file, one core; memcpy of it: %.1f GB/s\n",
           own, floor);
}

}  // namespace

int main(int argc, char** argv) {
    std::string pattern = (fs::temp_directory_path() / "loader_bench_XXXXXX").string();
    std::string folder = argc > 1 ? argv[1] : mkdtemp(pattern.data()) != nullptr ? pattern : "";
    int code = 0;
    try {
        printf("\nToken shards\n");
        time_opening(folder + "/sparse.bin");
        time_loading(folder + "/shard.bin");
    } catch (const std::exception& error) {
        fprintf(stderr, "loader_bench: error: %s\n", error.what());
        code = 1;
    }
    std::error_code ignored;
    if (argc <= 1) fs::remove_all(folder, ignored);
    return code;
}
