// Text to tokens and back, with every split pattern. The first byte chooses one and how the text is
// cut: what is encoded in parts between safe cuts, or with special tokens, are the same bytes.
#include "../../tokenizer.h"
#include "fuzz.h"

namespace {

// Learned once from text that has words, spaces and other scripts, for each pattern.
const Tokenizer& tokenizer_of(Pattern pattern) {
    static const std::vector<Tokenizer> all = [] {
        std::vector<Tokenizer> made;
        std::string text;
        for (int i = 0; i < 200; i++)
            text +=
                "the cat's 12345 hats\r\n\n  WE'LL go -- \303\251t\303\251 \346\227\245\346\234"
                "\254 " +
                std::to_string(i * i) + "aaaaaaaaaaaaaaaa\t";
        for (const PatternName& name : kPatterns) {
            BpeTraining training;
            training.pattern = name.pattern, training.threads = 1;
            made.push_back(Tokenizer::train_bpe(text, 400, training));
        }
        return made;
    }();
    for (const Tokenizer& tokenizer : all)
        if (tokenizer.pattern() == pattern) return tokenizer;
    abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    const Tokenizer& tokenizer = tokenizer_of(kPatterns[data[0] % std::size(kPatterns)].pattern);
    std::string text = fuzz::text_of(data + 1, size - 1);
    std::vector<int> ids = tokenizer.encode(text);
    fuzz::require(tokenizer.decode(ids) == text, "decoded, it is the text");
    size_t cut = safe_cut(text, size_t(data[0]) % (text.size() + 1));
    std::vector<int> parts;
    tokenizer.encode(std::string_view(text).substr(0, cut), parts);
    tokenizer.encode(std::string_view(text).substr(cut), parts);
    fuzz::require(parts == ids, "encoded in two parts, it is the same");
    std::vector<int> with_specials;
    tokenizer.encode_specials(text, {tokenizer.end_of_text()}, false, with_specials);
    fuzz::require(tokenizer.decode(with_specials) == text, "and with special tokens");
    return 0;
}
