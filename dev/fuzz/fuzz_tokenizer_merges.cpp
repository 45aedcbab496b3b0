// vocab.json and merges.txt (encoder.json and vocab.bpe are the same under other names): the merges
// begin where the input says `#version`.
#include "tokenizers.h"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    std::string text = fuzz::text_of(data, size);
    size_t merges = std::min(text.find("#version"), text.size());
    if (fuzz::below(random, 3) == 0) return LLVMFuzzerMutate(data, size, limit);
    if (fuzz::below(random, 2) == 0)
        return fuzz::give_back(
            fuzz::change_json_text(text.substr(0, merges), random) + text.substr(merges), data,
            limit);
    // A line of the merges is doubled, removed or put somewhere else.
    size_t begin = text.find('\n', merges + fuzz::below(random, text.size() - merges + 1));
    if (begin == text.npos) return fuzz::give_back(text, data, limit);
    size_t end = std::min(text.find('\n', begin + 1), text.size());
    std::string line = text.substr(begin, end - begin);
    if (fuzz::below(random, 2) == 0) text.erase(begin, end - begin);
    size_t place = text.find('\n', merges + fuzz::below(random, text.size() - merges + 1));
    if (place != text.npos && fuzz::below(random, 3) != 0) text.insert(place, line);
    return fuzz::give_back(text, data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    std::string text = fuzz::text_of(data, size);
    size_t merges = std::min(text.find("#version"), text.size());
    fuzz::put("vocab.json", text.substr(0, merges));
    fuzz::put("merges.txt", text.substr(merges));
    fuzz::check_tokenizer("vocab.json");
    fuzz::check_tokenizer("merges.txt");
    return 0;
}
