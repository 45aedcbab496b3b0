// .tiktoken: a line a token, its bytes in base64 and its rank.
#include "tokenizers.h"

// Lines change places, or a number or a letter of base64 does.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    std::string text = fuzz::text_of(data, size);
    if (text.empty() || fuzz::below(random, 3) == 0) return LLVMFuzzerMutate(data, size, limit);
    size_t at = fuzz::below(random, text.size());
    const char* const kAlphabet = "ABCabc019+/= \n";
    switch (fuzz::below(random, 3)) {
        case 0:
            text[at] = kAlphabet[fuzz::below(random, strlen(kAlphabet))];
            break;
        case 1:
            text.resize(at);
            break;
        default: {
            size_t begin = text.rfind('\n', at), end = text.find('\n', at);
            if (begin == text.npos || end == text.npos) break;
            std::string line = text.substr(begin, end - begin);
            if (fuzz::below(random, 2) == 0) text.erase(begin, end - begin);
            else text.insert(begin, line);
        }
    }
    return fuzz::give_back(text, data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz::put("in.tiktoken", fuzz::text_of(data, size));
    fuzz::check_tokenizer("in.tiktoken");
    return 0;
}
