// tokenizer.json, of every kind of vocabulary.
#include "tokenizers.h"

FUZZ_JSON_MUTATOR

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz::put("tokenizer.json", fuzz::text_of(data, size));
    fuzz::check_tokenizer("tokenizer.json");
    return 0;
}
