// .npy files. What is accepted is written and read as the same array; as token ids it is a shard.
#include "../../dataloader.h"
#include "fuzz.h"

// Half of the changes are inside the text of the header, where most bytes mean something.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    std::string file = fuzz::text_of(data, size);
    size_t end = std::min(file.find('\n'), file.size());
    if (end == 0 || fuzz::below(random, 2) == 0) return LLVMFuzzerMutate(data, size, limit);
    static constexpr std::string_view kPieces[] = {"'descr'", "'shape'", "'fortran_order'",
                                                   "'<i4'",   "'<i8'",   "'<u2'",
                                                   "False",   "True",    "(",
                                                   ")",       ",",       ":",
                                                   "{",       "}",       "4294967296",
                                                   "2"};
    size_t at = fuzz::below(random, end);
    std::string_view piece = kPieces[fuzz::below(random, std::size(kPieces))];
    file.replace(at, fuzz::below(random, 2) == 0 ? std::min(piece.size(), end - at) : 0, piece);
    return fuzz::give_back(file, data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz::put("a.npy", fuzz::text_of(data, size));
    std::string path = fuzz::path("a.npy");
    fuzz::accepts([&] {
        Shard shard(path, 65536);
        fuzz::require(shard.size() > 0, "a shard has tokens");
        for (size_t i : {size_t(0), shard.size() / 2, shard.size() - 1})
            fuzz::require(shard[i] >= 0 && shard[i] < 65536, "an id is below the vocabulary");
    });
    NpyArray array;
    if (!fuzz::accepts([&] { array = read_npy(path); })) return 0;
    size_t count = 1;
    for (size_t extent : array.shape) count *= extent;
    fuzz::require(count == array.values.size(), "the shape is that of the values");
    if (array.shape.size() > 100) return 0;  // a header of more than 65,535 bytes is not written
    write_npy(fuzz::path("b.npy"), array.values, array.shape);
    NpyArray again = read_npy(fuzz::path("b.npy"));
    fuzz::require(again.shape == array.shape && again.values == array.values, "the same array");
    return 0;
}
