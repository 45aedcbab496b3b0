// Files of token ids: llm.c's, .npy, nanoGPT's with and without its meta.pkl. The first byte says
// which; what is accepted has ids of the vocabulary only, and is read again as the same.
#include "fuzz.h"

namespace {

// A header of llm.c's that fits the bytes behind it, so that these are looked at.
std::string with_header(const std::string& ids, bool wide) {
    size_t width = wide ? 4 : 2;
    int32_t words[kShardHeaderInts] = {wide ? kWideShardMagic : kShardMagic,
                                       wide ? kWideShardVersion : kShardVersion,
                                       int32_t(ids.size() / width)};
    std::string file(reinterpret_cast<const char*>(words), sizeof words);
    return file + ids.substr(0, ids.size() / width * width);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    constexpr int kVocabulary = 50257;
    std::string rest = fuzz::text_of(data + 1, size - 1), name = "ids.bin";
    unlink(fuzz::path("meta.pkl").c_str());
    RawTokens raw = RawTokens::no;
    switch (data[0] % 7) {
        case 0:
            break;
        case 1:
            rest = with_header(rest, false);
            break;
        case 2:
            rest = with_header(rest, true);
            break;
        case 3:
            name = "ids.npy";
            break;
        case 4:
            raw = RawTokens::uint16;
            break;
        case 5:
            raw = RawTokens::uint32;
            break;
        case 6:
            fuzz::put("meta.pkl", rest);
            rest = std::string("\1\0\2\0", 4);
    }
    fuzz::put(name, rest);
    std::string path = fuzz::path(name);
    std::vector<int> ids;
    if (data[0] % 7 == 6) fuzz::accepts([&] { tokenizer_beside(path); });
    bool accepted = fuzz::accepts([&] {
        Shard shard(path, kVocabulary, raw);
        ids.resize(shard.size());
        shard.copy(0, ids.size(), ids.data());
        fuzz::require(shard.slice(ids.size() / 2, ids.size())[0] == ids[ids.size() / 2], "slices");
    });
    if (!accepted) return 0;
    for (int id : ids) fuzz::require(id >= 0 && id < kVocabulary, "ids are of the vocabulary");
    std::string again = fuzz::path("again.bin");
    for (int width : {2, 4}) {
        write_shard(again, ids, true, width);
        Shard shard(again, kVocabulary);
        for (size_t i = 0; i < ids.size(); i++)
            fuzz::require(shard[i] == ids[i], "written, it is the same");
    }
    return 0;
}
