// llm.c's tokenizer.bin: a header, and each token as a length and its bytes.
#include "tokenizers.h"

// Beside bytes at random: fields of the header, and lengths that fit the file or do not.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    std::string text = fuzz::text_of(data, size);
    if (text.size() < 16 || fuzz::below(random, 3) == 0) return LLVMFuzzerMutate(data, size, limit);
    switch (fuzz::below(random, 3)) {
        case 0:
            text[4 + fuzz::below(random, 12)] = char(random() % 5);
            break;
        case 1:
            text[fuzz::below(random, text.size())] = char(random());
            break;
        default:
            if (text.size() > 1024) text.resize(1024 + fuzz::below(random, text.size() - 1023));
    }
    return fuzz::give_back(text, data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz::put("tokenizer.bin", fuzz::text_of(data, size));
    fuzz::check_tokenizer("tokenizer.bin");
    return 0;
}
