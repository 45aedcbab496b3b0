// The property of a file that holds a tokenizer: it is refused, or what it gives is saved as
// tokenizer.json and read again as the same, and so by each format that takes it.
#pragma once

#include "../../tokenizer.h"
#include "fuzz.h"

namespace fuzz {

inline void check_again(const Tokenizer& tokenizer, TokenizerFormat format,
                        const std::string& path) {
    if (!accepts([&] { tokenizer.save_as(format, path); })) return;
    std::optional<Tokenizer> again;
    bool read = accepts([&] { again.emplace(Tokenizer::load(path, tokenizer.pattern())); });
    require(read, "what was written can be read");
    const std::string text = "The cat's 123 <|endoftext|> \303\251\346\227\245\377 aab\r\n";
    require(again->encode(text) == tokenizer.encode(text), "it encodes as the one before");
}

// `name` is a file that the target left in the folder.
inline void check_tokenizer(const std::string& name) {
    std::optional<Tokenizer> tokenizer;
    if (!accepts([&] { tokenizer.emplace(Tokenizer::load(path(name))); })) return;
    require(tokenizer->vocab_size() > 0, "it has tokens");
    tokenizer->save(path("saved"));
    require(Tokenizer::load(path("saved")).fingerprint() == tokenizer->fingerprint(),
            "saved and read, it is the same");
    if (tokenizer->kind() != Tokenizer::Kind::bpe) return;
    check_again(*tokenizer, TokenizerFormat::merges, path("merges"));
    check_again(*tokenizer, TokenizerFormat::tiktoken, path("a.tiktoken"));
    check_again(*tokenizer, TokenizerFormat::llmc, path("a.bin"));
}

}  // namespace fuzz
