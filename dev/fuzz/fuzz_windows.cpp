// Token shards. What is accepted is within its vocabulary, is written and read as the same ids, and
// is dealt in windows by every order.
#include "../../dataloader.h"
#include "fuzz.h"

namespace {

constexpr int kVocabulary = 1000;

std::vector<int> ids_of(const Shard& shard) {
    std::vector<int> ids(shard.size());
    shard.copy(0, ids.size(), ids.data());
    return ids;
}

void deal(const Shard& shard, WindowOrder order, int T) {
    WindowOptions options;
    options.order = order, options.watch = false;
    if (order == WindowOrder::sliding) options.stride = size_t(T + 1) / 2;
    DataLoader loader({shard}, 2, T, 0, 1, 7, options);
    std::vector<int> inputs(2 * size_t(T)), targets(inputs);
    for (int k = 0; k < 3; k++) {
        loader.next_batch(inputs.data(), targets.data());
        for (int target : targets)
            fuzz::require(target >= 0 && target < kVocabulary, "a target is a token");
    }
}

}  // namespace

// The size in the header and the size of the file are changed together, or apart.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    std::string file = fuzz::text_of(data, size);
    if (file.size() < kShardHeaderBytes || fuzz::below(random, 3) == 0)
        return LLVMFuzzerMutate(data, size, limit);
    size_t word = fuzz::below(random, 8);
    if (word < 6) {
        auto value = int32_t(random() * 3);
        if (fuzz::below(random, 2) == 0) value = int32_t(fuzz::below(random, 9));
        memcpy(&file[4 * word], &value, sizeof value);
    } else {
        auto count = int32_t(fuzz::below(random, 64));
        memcpy(&file[8], &count, sizeof count);
        file.resize(kShardHeaderBytes + 2 * size_t(count) + (fuzz::below(random, 8) == 0), '\1');
    }
    if (file.size() > kShardHeaderBytes && fuzz::below(random, 2) == 0) {
        size_t items = file.size() - kShardHeaderBytes;
        file[kShardHeaderBytes + fuzz::below(random, items)] = char(random());
    }
    return fuzz::give_back(file, data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz::put("a.bin", fuzz::text_of(data, size));
    std::optional<Shard> shard;
    if (!fuzz::accepts([&] { shard.emplace(fuzz::path("a.bin"), kVocabulary); })) return 0;
    std::vector<int> ids = ids_of(*shard);
    fuzz::require(!ids.empty(), "a shard has tokens");
    for (int id : ids) fuzz::require(id >= 0 && id < kVocabulary, "an id is in the vocabulary");
    write_shard(fuzz::path("b.bin"), ids);
    fuzz::require(ids_of(Shard(fuzz::path("b.bin"), kVocabulary)) == ids, "the same ids");
    int T = int(std::min<size_t>(1 + ids[0] % 8, ids.size() - 1));
    if (T < 1) return 0;
    for (WindowOrder order : {WindowOrder::shuffled, WindowOrder::sliding, WindowOrder::random})
        deal(*shard, order, T);
    return 0;
}
