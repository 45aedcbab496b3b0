// config.json: what is read is written and read as the same configuration.
#include "fuzz.h"

FUZZ_JSON_MUTATOR

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz::put("config.json", fuzz::text_of(data, size));
    GPT2Config config;
    if (!fuzz::accepts([&] { config = read_config(fuzz::folder()); })) return 0;
    write_config(config, config.vocab_size - 1, fuzz::folder());
    fuzz::require(read_config(fuzz::folder()) == config, "a configuration is written as it is");
    describe_config(config);
    return 0;
}
