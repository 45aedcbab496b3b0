// Ids to text: two bytes an id. Those of the vocabulary give their bytes in a row, others are
// refused; what comes out is encoded and decoded as itself.
#include "../../tokenizer.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const Tokenizer tokenizer = [] {
        std::string text;
        for (int i = 0; i < 300; i++) text += "to be, or not to be " + std::to_string(i);
        return Tokenizer::train_bpe(text, 300);
    }();
    std::vector<int> ids;
    std::string expected;
    bool known = true;
    for (size_t i = 0; i + 1 < size; i += 2) {
        int id = data[i] | data[i + 1] << 8;
        if (id == 0xffff) id = -1;
        ids.push_back(id);
        known = known && id >= 0 && id < tokenizer.vocab_size();
        if (known) expected += tokenizer.token_bytes(id);
    }
    std::string text;
    bool accepted = fuzz::accepts([&] { text = tokenizer.decode(ids); });
    fuzz::require(accepted == known, "ids of the vocabulary alone are decoded");
    if (!accepted) return 0;
    fuzz::require(text == expected, "a token is its bytes");
    fuzz::require(tokenizer.decode(tokenizer.encode(text)) == text, "encoded, it comes back");
    return 0;
}
