// Vocabularies on disk: Tokenizer::save, save_as and load (declared, with what they promise, in
// tokenizer.h, which includes this file).
//
// Byte-level BPE comes in five formats. Hugging Face's tokenizer.json says everything. Its older
// vocab.json and merges.txt, and encoder.json and vocab.bpe of GPT-2's publication, hold ids and
// merges, spelt in byte-level characters. OpenAI's .tiktoken and llm.c's tokenizer.bin hold the
// tokens' bytes alone: there a token's id is its rank, and the merges follow from it (see
// recover_merges). Vocabularies of bytes, characters and words are kept as tokenizer.json only.
#pragma once

#include "tokenizer.h"

// ==== base64 =====================================================================================

inline std::string to_base64(std::string_view bytes) {
    constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string text;
    for (size_t i = 0; i < bytes.size(); i += 3) {
        size_t left = std::min<size_t>(bytes.size() - i, 3);
        uint32_t bits = 0;
        for (size_t k = 0; k < 3; k++) bits = bits << 8 | (k < left ? uint8_t(bytes[i + k]) : 0);
        for (size_t k = 0; k < 4; k++)
            text.push_back(k <= left ? kDigits[bits >> (18 - 6 * k) & 63] : '=');
    }
    return text;
}

// The bytes that `text` spells, into `bytes`; false where it is not what to_base64 gives for any.
inline bool from_base64(std::string_view text, std::string& bytes) {
    bytes.clear();
    for (size_t i = 0; i < text.size() && text[i] != '='; i++) {
        auto digit = [](char c) {
            if (c >= 'A' && c <= 'Z') return c - 'A';
            if (c >= 'a' && c <= 'z') return c - 'a' + 26;
            if (c >= '0' && c <= '9') return c - '0' + 52;
            return c == '+' ? 62 : c == '/' ? 63 : -1;
        };
        int value = digit(text[i]);
        if (value < 0) return false;
        if (i % 4 != 0) bytes.back() = char(uint8_t(bytes.back()) | value >> (6 - 2 * (i % 4)));
        if (i % 4 != 3) bytes.push_back(char(value << (2 + 2 * (i % 4))));
    }
    if (text.ends_with('=') && !bytes.empty()) bytes.pop_back();
    return to_base64(bytes) == text;
}

// ==== saving =====================================================================================

// Of the split into words what tokenizer.json calls a pattern; WhitespaceSplit does the rest.
constexpr const char* kWordsAlone = R"([,.:;?_!"()']|--)";

// A token as tokenizer.json spells it.
inline std::string Tokenizer::spell(int id, const ByteAlphabet& alphabet) const {
    std::string_view bytes = token_bytes(id);
    if (is_special(id)) return std::string(bytes);
    if (kind_ == Kind::words) return std::string(bytes.substr(bytes.starts_with(' ') ? 1 : 0));
    if (kind_ != Kind::chars) return alphabet.spell(bytes);
    int symbol = character_at(bytes, 0).symbol;
    if (symbol < kInvalidByte) return std::string(bytes);
    return format("<0x%02X>", unsigned(symbol - kInvalidByte));
}

inline void Tokenizer::save(const std::string& folder, int context) const {
    ByteAlphabet alphabet;
    std::vector<std::string> spelling;
    for (int id = 0; id < vocab_size(); id++) spelling.push_back(spell(id, alphabet));
    ordered_json::object_t vocabulary;
    for (int id = 0; id < vocab_size(); id++)  // emplace_back: the keys are known to differ
        vocabulary.emplace_back(spelling[size_t(id)], id);
    ordered_json merges = ordered_json::array();
    for (const Merge& m : merges_)
        merges.push_back(spelling[size_t(m.left)] + " " + spelling[size_t(m.right)]);
    ordered_json specials = ordered_json::array();
    for (int id : specials_)
        specials.push_back({{"id", id},
                            {"content", spelling[size_t(id)]},
                            {"single_word", false},
                            {"lstrip", false},
                            {"rstrip", false},
                            {"normalized", false},
                            {"special", true}});

    bool has_bytes = id_of_character_.size() > size_t(kInvalidByte);
    ordered_json splitter, decoder;
    if (kind_ == Kind::chars) {
        decoder = {{"type", "Fuse"}};
        if (has_bytes)
            decoder = {{"type", "Sequence"},
                       {"decoders", {{{"type", "ByteFallback"}}, {{"type", "Fuse"}}}}};
    } else if (kind_ == Kind::words) {  // transformers joins words without a decoder by spaces
        ordered_json split = {{"type", "Split"},
                              {"pattern", {{"Regex", kWordsAlone}}},
                              {"behavior", "Isolated"},
                              {"invert", false}};
        splitter = {{"type", "Sequence"},
                    {"pretokenizers", {split, {{"type", "WhitespaceSplit"}}}}};
    } else {
        splitter = {{"type", "ByteLevel"},
                    {"add_prefix_space", false},
                    {"trim_offsets", false},
                    {"use_regex", kind_ == Kind::bpe}};
        decoder = splitter;
        if (kind_ == Kind::bpe && pattern_ != Pattern::gpt2) {
            splitter["use_regex"] = false;
            ordered_json split = {{"type", "Split"},
                                  {"pattern", {{"Regex", name_of(pattern_).regex}}},
                                  {"behavior", "Isolated"},
                                  {"invert", false}};
            splitter = {{"type", "Sequence"}, {"pretokenizers", {split, splitter}}};
        }
    }
    ordered_json model = {{"type", "BPE"},
                          {"dropout", nullptr},
                          {"unk_token", nullptr},
                          {"continuing_subword_prefix", nullptr},
                          {"end_of_word_suffix", nullptr},
                          {"fuse_unk", false},
                          {"byte_fallback", kind_ == Kind::chars && has_bytes},
                          {"ignore_merges", false},
                          {"vocab", std::move(vocabulary)},
                          {"merges", std::move(merges)}};
    if (kind_ == Kind::words)
        model = {
            {"type", "WordLevel"}, {"vocab", std::move(model["vocab"])}, {"unk_token", kUnknown}};
    ordered_json file = {{"version", "1.0"},          {"truncation", nullptr},
                         {"padding", nullptr},        {"added_tokens", std::move(specials)},
                         {"normalizer", nullptr},     {"pre_tokenizer", std::move(splitter)},
                         {"post_processor", nullptr}, {"decoder", std::move(decoder)},
                         {"model", std::move(model)}};
    ordered_json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                           {"add_prefix_space", false},
                           {"clean_up_tokenization_spaces", false}};
    if (end_of_text_ >= 0) {
        config["bos_token"] = kEndOfText;
        config["eos_token"] = kEndOfText;
    }
    if (kind_ == Kind::words && !specials_.empty()) config["unk_token"] = kUnknown;
    if (context > 0) config["model_max_length"] = context;
    make_folder(folder);
    write_file_atomic(folder + "/tokenizer.json", file.dump(2) + "\n");
    write_file_atomic(folder + "/tokenizer_config.json", config.dump(2) + "\n");
}

// encoder.json and vocab.json: one object, from token to id.
inline std::string Tokenizer::vocabulary_json() const {
    ByteAlphabet alphabet;
    ordered_json::object_t vocabulary;
    for (int id = 0; id < vocab_size(); id++) vocabulary.emplace_back(spell(id, alphabet), id);
    return ordered_json(std::move(vocabulary)).dump() + "\n";
}

// merges.txt and vocab.bpe: a line of version, then a line a merge in the order of their rank.
inline std::string Tokenizer::merges_text() const {
    ByteAlphabet alphabet;
    std::string text = "#version: 0.2\n";
    for (const Merge& m : merges_)
        text += spell(m.left, alphabet) + " " + spell(m.right, alphabet) + "\n";
    return text;
}

// .tiktoken: a line a token, its bytes in base64 and its id.
inline std::string Tokenizer::ranks_text() const {
    std::string text;
    for (int id = 0; id < vocab_size() && !is_special(id); id++)
        text += to_base64(token_bytes(id)) + format(" %d\n", id);
    return text;
}

constexpr uint32_t kLlmcMagic = 20240328;
constexpr size_t kLlmcHeader = 256;  // uint32 each: magic, version, tokens, end of text, zeros

// tokenizer.bin, version 2: the header, then a byte of length and the bytes of every token.
inline std::string Tokenizer::llmc_bytes() const {
    std::vector<uint32_t> header(kLlmcHeader);
    header[0] = kLlmcMagic, header[1] = 2, header[2] = uint32_t(vocab_size());
    header[3] = uint32_t(end_of_text_);
    std::string bytes(reinterpret_cast<const char*>(header.data()), kLlmcHeader * sizeof header[0]);
    for (int id = 0; id < vocab_size(); id++) {
        bytes.push_back(char(token_bytes(id).size()));
        bytes += token_bytes(id);
    }
    return bytes;
}

// Whether the format can hold this tokenizer at all; fails if not.
inline void Tokenizer::check_format(TokenizerFormat format_to, const std::string& path) const {
    auto refuse = [&](const std::string& why) {
        fail_input("%s: this format %s; write tokenizer.json (--format json)", path.c_str(),
                   why.c_str());
    };
    if (kind_ != Kind::bpe) refuse("holds byte-level BPE only");
    bool ranks = format_to == TokenizerFormat::tiktoken || format_to == TokenizerFormat::llmc;
    for (size_t i = 0; ranks && i < merges_.size(); i++)
        if (i > 0 && merges_[i].result <= merges_[i - 1].result)
            refuse(
                format("takes the order of ids for that of merges, and merge %zu makes the id "
                       "%d after %d",
                       i, merges_[i].result, merges_[i - 1].result));
    if (format_to == TokenizerFormat::tiktoken)
        for (size_t i = 0; i < specials_.size(); i++)
            if (specials_[specials_.size() - 1 - i] != vocab_size() - 1 - int(i))
                refuse("holds no special tokens, so they must have the last ids");
    if (format_to != TokenizerFormat::llmc) return;
    if (end_of_text_ < 0) refuse("needs an " + std::string(kEndOfText));
    for (int id = 0; id < vocab_size(); id++)
        if (token_bytes(id).size() > 255)
            refuse(format("holds tokens of at most 255 bytes, and %d has %zu", id,
                          token_bytes(id).size()));
}

inline std::vector<std::string> Tokenizer::notes_on(TokenizerFormat format_to) const {
    std::vector<std::string> notes;
    if (format_to == TokenizerFormat::json) return notes;
    if (pattern_ != Pattern::gpt2)
        notes.push_back(
            format("the format does not say by what text is split: read it with "
                   "--pattern %s",
                   name_of(pattern_).name));
    if (format_to == TokenizerFormat::tiktoken)
        for (int id : specials_)
            notes.push_back("the format holds no special tokens: " + std::string(token_bytes(id)) +
                            format(" has the id %d", id));
    return notes;
}

// ==== loading ====================================================================================

// Reads the files of strangers. What it does not know it refuses: a tokenizer that is almost the
// right one would train and continue text wrongly, without a sign.
struct TokenizerReader {
    const std::string& path;
    Tokenizer tokenizer;
    std::unordered_map<std::string, int> id_of;  // as the file spells the tokens
    ByteAlphabet alphabet;

    [[noreturn]] void refuse(const std::string& place, const std::string& why) const {
        fail_input("%s: %s: %s", path.c_str(), place.c_str(), why.c_str());
    }

    // A string from the file for a message: quoted, in ASCII, on one line, not too long.
    static std::string quoted(const std::string& text) {
        constexpr size_t kLongest = 60;
        std::string cut = text.size() <= kLongest ? text : text.substr(0, kLongest) + "...";
        return json(cut).dump(-1, ' ', true, json::error_handler_t::replace);
    }

    // object[key]; nullptr where that is missing or null, or `object` is not an object.
    static const json* field(const json& object, const char* key) {
        if (!object.is_object()) return nullptr;
        auto found = object.find(key);
        return found == object.end() || found->is_null() ? nullptr : &*found;
    }

    static std::string type_of(const json& object) {
        const json* type = field(object, "type");
        return type != nullptr && type->is_string() ? type->get<std::string>() : "";
    }

    bool flag(const json& object, const std::string& place, const char* key, bool otherwise) const {
        const json* value = field(object, key);
        if (value == nullptr) return otherwise;
        if (!value->is_boolean()) refuse(place + "." + key, "is not true or false");
        return value->get<bool>();
    }

    [[noreturn]] void refuse_type(const std::string& place, const json& object) const {
        refuse(place, "type " + quoted(type_of(object)) +
                          " is not supported; this program reads byte-level BPE in GPT-2's form");
    }

    bool read_split(const json& split, Pattern* pattern) const;
    Tokenizer::Kind read_pre_tokenizer(const json& root, Pattern* pattern) const;
    void read_decoder(const json& root, Tokenizer::Kind kind) const;
    void check_post_processor(const json& root) const;
    void check_model(const json& model, Tokenizer::Kind kind) const;
    int read_id(const json& value, const std::string& place) const;
    void read_vocabulary(const json& root, const json& model);
    std::string bytes_of(const std::string& spelling, bool byte_fallback) const;
    void check_bytes() const;
    void read_merges(const json& model);
    void read_merge(const std::string& left, const std::string& right, const std::string& place);
    void read_json(const json& root);
    template <typename F>
    void for_each_merge(std::string_view text, F f);
    void read_merges_file(std::string_view text);
    void read_vocabulary_and_merges(const json& vocabulary, const std::string& merges_path);
    void recover_merges();
    void read_ranks(std::string_view text, std::optional<Pattern> pattern);
    void read_llmc(std::string_view text, std::optional<Pattern> pattern);
    void read(std::string_view text, std::optional<Pattern> pattern);
};

// Whether a Split cuts by one of kPatterns, which then is *pattern. The patterns match every
// character, so that to keep what is matched is to keep all.
inline bool TokenizerReader::read_split(const json& split, Pattern* pattern) const {
    const json* object = field(split, "pattern");
    const json* regex = object != nullptr ? field(*object, "Regex") : nullptr;
    const json* behavior = field(split, "behavior");
    if (type_of(split) != "Split" || regex == nullptr || behavior == nullptr) return false;
    bool invert = flag(split, "pre_tokenizer.pretokenizers[0]", "invert", false);
    if (*behavior != (invert ? "Removed" : "Isolated")) return false;
    for (const PatternName& known : kPatterns) {
        if (*regex != known.regex) continue;
        *pattern = known.pattern;
        return true;
    }
    return false;
}

// How the file cuts text decides the kind: by a pattern (bpe), not at all but into bytes (bytes),
// not at all (chars).
inline Tokenizer::Kind TokenizerReader::read_pre_tokenizer(const json& root,
                                                           Pattern* pattern) const {
    const std::string place = "pre_tokenizer";
    const json* whole = field(root, "pre_tokenizer");
    if (whole == nullptr) return Tokenizer::Kind::chars;
    const json* byte_level = whole;
    bool split = false;  // a Split with the pattern stands before
    if (type_of(*whole) == "Sequence") {
        const json* list = field(*whole, "pretokenizers");
        bool fits = list != nullptr && list->is_array() && (list->size() == 1 || list->size() == 2);
        if (!fits) refuse_type(place, *whole);
        byte_level = &list->back();
        split = list->size() == 2;
    }
    if (split && type_of(*byte_level) == "WhitespaceSplit") {
        const json& words = whole->at("pretokenizers").front();
        const json* regex = field(words, "pattern");
        if (type_of(words) != "Split" || regex == nullptr ||
            *regex != json{{"Regex", kWordsAlone}} ||
            words.value("behavior", json()) != "Isolated" ||
            flag(words, place + ".pretokenizers[0]", "invert", false))
            refuse(place, "is a WhitespaceSplit without the Split that belongs to words here");
        return Tokenizer::Kind::words;
    }
    if (split && !read_split(whole->at("pretokenizers").front(), pattern))
        refuse(place + ".pretokenizers[0]",
               "is not a Split by the pattern of GPT-2, cl100k or o200k");
    if (type_of(*byte_level) != "ByteLevel") refuse_type(place, *byte_level);
    if (flag(*byte_level, place, "add_prefix_space", true))
        refuse(place + ".add_prefix_space", "true is not supported; false is");
    bool use_regex = flag(*byte_level, place, "use_regex", true);
    if (split && use_regex) refuse(place, "splits twice, by Split and by ByteLevel.use_regex");
    return split || use_regex ? Tokenizer::Kind::bpe : Tokenizer::Kind::bytes;
}

// Only a decoder that puts the tokens' bytes in a row is what decode does.
inline void TokenizerReader::read_decoder(const json& root, Tokenizer::Kind kind) const {
    const json* decoder = field(root, "decoder");
    std::string type = decoder == nullptr ? "" : type_of(*decoder);
    if (kind == Tokenizer::Kind::words) {
        if (decoder != nullptr) refuse("decoder", "is not supported for words; null is");
        return;
    }
    if (kind != Tokenizer::Kind::chars) {
        if (type != "ByteLevel") refuse("decoder", "is not ByteLevel");
        return;
    }
    if (type == "Sequence") {
        const json* list = field(*decoder, "decoders");
        if (list != nullptr && list->is_array() && list->size() == 2 &&
            type_of(list->front()) == "ByteFallback" && type_of(list->back()) == "Fuse")
            return;
    }
    if (type != "Fuse") refuse("decoder", "is neither Fuse nor ByteFallback and Fuse");
}

// ByteLevel only moves offsets. A template must add nothing: encode adds nothing.
inline void TokenizerReader::check_post_processor(const json& root) const {
    const json* post = field(root, "post_processor");
    if (post == nullptr || type_of(*post) == "ByteLevel") return;
    if (type_of(*post) != "TemplateProcessing") refuse_type("post_processor", *post);
    const json* single = field(*post, "single");
    bool plain = single != nullptr && single->is_array() && single->size() == 1 &&
                 field(single->front(), "Sequence") != nullptr;
    if (!plain) refuse("post_processor.single", "adds tokens to the text, which is not supported");
}

// The settings of the model that change what encoding gives.
inline void TokenizerReader::check_model(const json& model, Tokenizer::Kind kind) const {
    if (const json* dropout = field(model, "dropout"); dropout != nullptr && *dropout != 0.0)
        refuse("model.dropout", "is not supported; null is");
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
        if (const json* affix = field(model, key); affix != nullptr && *affix != "")
            refuse(std::string("model.") + key, "is not supported; null is");
    if (flag(model, "model", "ignore_merges", false))
        refuse("model.ignore_merges", "true is not supported; false is");
    if (kind == Tokenizer::Kind::words && field(model, "unk_token") != nullptr &&
        *field(model, "unk_token") != kUnknown)
        refuse("model.unk_token", "is not supported for words; <|unk|> is");
    // With a token for each byte nothing is ever unknown.
    if (kind == Tokenizer::Kind::chars && field(model, "unk_token") != nullptr)
        refuse("model.unk_token", "is not supported for characters; null is");
}

inline int TokenizerReader::read_id(const json& value, const std::string& place) const {
    if (!value.is_number_integer()) refuse(place, "the id is not an integer");
    bool fits = value.is_number_unsigned() && value.get<uint64_t>() < uint64_t(kMaxTokens);
    if (!fits)
        refuse(place,
               "id " + value.dump() + " is not within 0 to " + std::to_string(kMaxTokens - 1));
    return value.get<int>();
}

// The bytes of a token that is not special; empty where it stands for none of its kind.
inline std::string TokenizerReader::bytes_of(const std::string& spelling,
                                             bool byte_fallback) const {
    std::string bytes;
    if (tokenizer.kind_ == Tokenizer::Kind::words) {
        size_t words = 0, characters = 0;
        for_each_word(spelling, [&](std::string_view word) { words++, characters = word.size(); });
        return words == 1 && characters == spelling.size()
                   ? (is_word_punctuation(spelling) ? "" : " ") + spelling
                   : bytes;
    }
    if (tokenizer.kind_ != Tokenizer::Kind::chars)
        return alphabet.read(spelling, bytes) ? bytes : std::string();
    if (!spelling.empty() && character_at(spelling, 0).length == spelling.size()) return spelling;
    for (int byte = 0x80; byte < 0x100 && byte_fallback; byte++)
        if (spelling == format("<0x%02X>", unsigned(byte))) return std::string(1, char(byte));
    return bytes;
}

// Fills the tokens, the special tokens, and id_of, from model.vocab and added_tokens: together they
// must use each id from 0 on once.
inline void TokenizerReader::read_vocabulary(const json& root, const json& model) {
    const json* vocabulary = field(model, "vocab");
    if (vocabulary == nullptr || !vocabulary->is_object())
        refuse("model.vocab", "is missing or not an object");
    if (vocabulary->size() > size_t(kMaxTokens))
        refuse("model.vocab",
               format("%zu tokens; at most %d are supported", vocabulary->size(), kMaxTokens));
    for (const auto& [spelling, id] : vocabulary->items())
        id_of[spelling] = read_id(id, "model.vocab: token " + quoted(spelling));

    const json* added = field(root, "added_tokens");
    if (added != nullptr && !added->is_array()) refuse("added_tokens", "is not a list");
    for (size_t i = 0; added != nullptr && i < added->size(); i++) {
        std::string place = format("added_tokens[%zu]", i);
        const json& token = (*added)[i];
        const json *content = field(token, "content"), *id_field = field(token, "id");
        if (content == nullptr || !content->is_string() || *content == "" || id_field == nullptr)
            refuse(place, "has no content or no id");
        if (!flag(token, place, "special", false))
            refuse(place + ".special", "false is not supported: only special tokens may be added");
        for (const char* key : {"lstrip", "rstrip", "single_word"})
            if (flag(token, place, key, false))
                refuse(place + "." + key, "true is not supported; false is");
        int id = read_id(*id_field, place);
        int known = id_of.try_emplace(content->get<std::string>(), id).first->second;
        if (known != id)
            refuse(place, format("id %d, but model.vocab gives the token id %d", id, known));
        tokenizer.specials_.push_back(id);
    }
    if (id_of.empty()) refuse("model.vocab", "holds no token");
    std::vector<int>& specials = tokenizer.specials_;
    std::sort(specials.begin(), specials.end());
    specials.erase(std::unique(specials.begin(), specials.end()), specials.end());

    std::vector<const std::string*> spelling_of(id_of.size());
    for (const auto& [spelling, id] : id_of) {
        if (size_t(id) >= id_of.size())
            refuse("model.vocab", format("id %d in a vocabulary of %zu tokens; ids must be dense",
                                         id, id_of.size()));
        if (spelling_of[size_t(id)] != nullptr)
            refuse("model.vocab", format("two tokens have the id %d", id));
        spelling_of[size_t(id)] = &spelling;
    }
    bool byte_fallback = flag(model, "model", "byte_fallback", false);
    for (int id = 0; id < int(spelling_of.size()); id++) {
        const std::string& spelling = *spelling_of[size_t(id)];
        std::string bytes = bytes_of(spelling, byte_fallback);
        bool special = tokenizer.is_special(id);
        if (bytes.empty() && !special)
            refuse("model.vocab",
                   "token " + quoted(spelling) + " is not of this kind of vocabulary");
        tokenizer.add_token(special ? spelling : bytes);
        if (tokenizer.kind_ == Tokenizer::Kind::words) tokenizer.id_of_word_[spelling] = id;
        // A special token of one character is that character too, as in tokenizers.
        bool in_model = vocabulary->contains(spelling);
        bool encodable = special ? in_model && bytes == spelling : true;
        if (tokenizer.kind_ == Tokenizer::Kind::chars && encodable)
            tokenizer.index_character(character_at(bytes, 0).symbol, id);
    }
    auto end = id_of.find(std::string(kEndOfText));
    tokenizer.end_of_text_ = end == id_of.end() ? -1 : end->second;
}

// Any text can be encoded only with a token for every byte.
inline void TokenizerReader::check_bytes() const {
    for (unsigned byte = 0; byte < 256; byte++)
        if (tokenizer.id_of_byte_[byte] < 0)
            refuse("model.vocab", format("no token for the byte 0x%02X; all 256 are needed", byte));
}

inline void TokenizerReader::read_merge(const std::string& left, const std::string& right,
                                        const std::string& place) {
    auto find = [&](const std::string& spelling) {
        auto found = id_of.find(spelling);
        if (found == id_of.end())
            refuse(place, "token " + quoted(spelling) + " is not in the vocabulary");
        if (tokenizer.is_special(found->second))
            refuse(place,
                   "token " + quoted(spelling) + " is special and cannot be part of a merge");
        return found->second;
    };
    int left_id = find(left), right_id = find(right), result = find(left + right);
    if (tokenizer.merge_ranks_.find(uint32_t(left_id), uint32_t(right_id)) != MergeTable::kNone)
        refuse(place, "the pair " + quoted(left + " " + right) + " stands there twice");
    tokenizer.add_merge(left_id, right_id, result);
}

// model.merges: a list of "left right", or of ["left", "right"].
inline void TokenizerReader::read_merges(const json& model) {
    const json* merges = field(model, "merges");
    if (merges == nullptr || !merges->is_array())
        refuse("model.merges", "is missing or not a list");
    if (merges->size() >= MergeTable::kNone)
        refuse("model.merges", format("%zu merges; fewer than %u are supported", merges->size(),
                                      MergeTable::kNone));
    if (!merges->empty() && tokenizer.kind_ != Tokenizer::Kind::bpe)
        refuse("model.merges", "is not empty, but the pre_tokenizer splits by no pattern");
    for (size_t i = 0; i < merges->size(); i++) {
        const json& merge = (*merges)[i];
        std::string place = format("model.merges[%zu]", i);
        if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
            read_merge(merge[0].get<std::string>(), merge[1].get<std::string>(), place);
            continue;
        }
        std::string text = merge.is_string() ? merge.get<std::string>() : "";
        size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos)
            refuse(place, "is not two tokens");
        read_merge(text.substr(0, space), text.substr(space + 1), place);
    }
}

inline void TokenizerReader::read_json(const json& root) {
    for (const char* key : {"normalizer", "truncation", "padding"})
        if (field(root, key) != nullptr) refuse(key, "is not supported; null is");
    const json* model = field(root, "model");
    if (model == nullptr || !model->is_object()) refuse("model", "is missing or not an object");
    tokenizer.kind_ = read_pre_tokenizer(root, &tokenizer.pattern_);
    bool words = tokenizer.kind_ == Tokenizer::Kind::words;
    if (words || field(*model, "type") != nullptr)
        if (type_of(*model) != (words ? "WordLevel" : "BPE")) refuse_type("model", *model);
    read_decoder(root, tokenizer.kind_);
    check_post_processor(root);
    check_model(*model, tokenizer.kind_);
    read_vocabulary(root, *model);
    if (words) return;
    if (tokenizer.kind_ != Tokenizer::Kind::chars) {
        tokenizer.index_bytes();
        check_bytes();
    }
    read_merges(*model);
}

// Calls f(left, right, place) for each merge of a file of them: a line "#version: ...", then a line
// "left right" a merge, in the order of their rank.
template <typename F>
void TokenizerReader::for_each_merge(std::string_view text, F f) {
    if (!text.starts_with("#version")) refuse("line 1", "does not start with #version");
    size_t line_number = 1;
    for (size_t begin = text.find('\n'); begin < text.size() - 1;) {
        size_t end = std::min(text.find('\n', begin + 1), text.size());
        std::string line(text.substr(begin + 1, end - begin - 1));
        std::string place = format("line %zu", ++line_number);
        size_t space = line.find(' ');
        if (space == std::string::npos || space == 0 || space + 1 == line.size() ||
            line.find(' ', space + 1) != std::string::npos)
            refuse(place, "is not two tokens with a space between them");
        f(line.substr(0, space), line.substr(space + 1), place);
        begin = end;
    }
}

// Merges alone: the bytes in GPT-2's order, then what each merge makes, then <|endoftext|>.
inline void TokenizerReader::read_merges_file(std::string_view text) {
    tokenizer.kind_ = Tokenizer::Kind::bpe;
    for (uint8_t byte : alphabet.byte_of_rank) {
        std::string bytes(1, char(byte));
        id_of[alphabet.spell(bytes)] = tokenizer.add_token(bytes);
    }
    tokenizer.index_bytes();
    for_each_merge(
        text, [&](const std::string& left, const std::string& right, const std::string& place) {
            std::string bytes;
            if (!alphabet.read(left + right, bytes))
                refuse(place, "is not spelt in byte-level characters");
            if (tokenizer.vocab_size() + 2 > kMaxTokens)
                refuse(place, format("makes more than %d tokens", kMaxTokens));
            if (!id_of.try_emplace(left + right, tokenizer.vocab_size()).second)
                refuse(place, "makes the token " + quoted(left + right) + " a second time");
            tokenizer.add_token(bytes);
            read_merge(left, right, place);
        });
    tokenizer.add_end_of_text();
}

// vocab.json and encoder.json, an object from token to id, with the merges beside it. Tokens that
// no merge makes, and that are no bytes, are special if they are spelt <|...|>.
inline void TokenizerReader::read_vocabulary_and_merges(const json& vocabulary,
                                                        const std::string& merges_path) {
    json merges = json::array(), added = json::array();
    std::unordered_set<std::string> made;
    MappedFile file(merges_path);
    TokenizerReader lines{merges_path, {}, {}, {}};
    lines.for_each_merge(file.view(), [&](const std::string& left, const std::string& right,
                                          const std::string& place) {
        std::string token = left + right;
        if (!vocabulary.contains(token))
            lines.refuse(place, "makes the token " + quoted(token) + ", which " + path + " lacks");
        made.insert(token);
        merges.push_back({left, right});
    });
    for (const auto& [token, id] : vocabulary.items()) {
        std::string bytes;
        bool plain = alphabet.read(token, bytes) && bytes.size() == 1;
        if (plain || made.contains(token)) continue;
        if (!token.starts_with("<|") || !token.ends_with("|>"))
            refuse("token " + quoted(token), "no merge of " + merges_path +
                                                 " makes it, and it is not spelt <|...|> as "
                                                 "special tokens are");
        added.push_back({{"content", token}, {"id", id}, {"special", true}});
    }
    tokenizer.kind_ = Tokenizer::Kind::bpe;
    json model = {{"vocab", vocabulary}, {"merges", std::move(merges)}};
    read_vocabulary({{"added_tokens", std::move(added)}}, model);
    tokenizer.index_bytes();
    check_bytes();
    read_merges(model);
}

// Finds the merge that makes each token where ids are ranks: the bytes of the token, merged by the
// merges of lower rank, must come to two tokens, and these are the pair. No other pair of tokens
// that spells it can ever stand side by side when its turn comes: whatever is around it, its bytes
// have been merged by the same lower ranks into the same two. (tiktoken looks for any two that
// spell a token, so it finds these.)
inline void TokenizerReader::recover_merges() {
    Tokenizer::PieceMerger merger{tokenizer, {}, {}, {}, {}, {}};
    std::vector<int> parts;
    for (int id = 0; id < tokenizer.vocab_size(); id++) {
        if (tokenizer.is_special(id)) continue;
        std::string bytes(tokenizer.token_bytes(id));
        if (bytes.size() == 1) continue;
        parts.resize(bytes.size());
        size_t count = merger.merge(bytes, parts.data());
        if (count != 2)
            refuse(format("token %d", id),
                   format("%zu tokens of lower id spell %s; two must, since ids are the order of "
                          "merges here",
                          count, quoted(alphabet.spell(bytes)).c_str()));
        tokenizer.add_merge(parts[0], parts[1], id);
    }
}

// What ranks alone do not say of OpenAI's encodings: their split pattern, the id of <|endoftext|>,
// and how many ids there are.
struct KnownRanks {
    int ranks, end_of_text, tokens;
    Pattern pattern;
};
inline constexpr KnownRanks kKnownRanks[] = {{50256, 50256, 50257, Pattern::gpt2},
                                             {100256, 100257, 100277, Pattern::cl100k},
                                             {199998, 199999, 200019, Pattern::o200k}};

// .tiktoken: lines of a token's bytes in base64 and its rank, which counts up from 0. Behind the
// ranks comes <|endoftext|>, for OpenAI's encodings at their place; ids around it that have no
// token there are filled with special tokens <|unused_ID|>, so that ids are dense.
inline void TokenizerReader::read_ranks(std::string_view text, std::optional<Pattern> pattern) {
    tokenizer.kind_ = Tokenizer::Kind::bpe;
    std::unordered_set<std::string> seen;
    for (size_t begin = 0; begin < text.size();) {
        size_t end = text.find('\n', begin), space = text.find(' ', begin);
        int rank = tokenizer.vocab_size();
        std::string place = format("line %d", rank + 1), bytes;
        if (end == text.npos) refuse(place, "does not end; the file is cut short");
        bool fits = space < end && space > begin;
        if (!fits || !from_base64(text.substr(begin, space - begin), bytes))
            refuse(place, "is not a token in base64, a space and a rank");
        if (text.substr(space + 1, end - space - 1) != std::to_string(rank))
            refuse(place, format("the rank is not %d; ranks count up from 0", rank));
        if (!seen.insert(bytes).second) refuse(place, "the token stands there twice");
        if (rank >= kMaxTokens - 32) refuse(place, format("more than %d tokens", kMaxTokens - 32));
        tokenizer.add_token(bytes);
        begin = end + 1;
    }
    int ranks = tokenizer.vocab_size();
    KnownRanks known = {ranks, ranks, ranks + 1, Pattern::gpt2};
    bool is_known = false;
    for (const KnownRanks& encoding : kKnownRanks)
        if (encoding.ranks == ranks) known = encoding, is_known = true;
    if (!is_known && !pattern)
        refuse("the end", format("%d ranks do not tell by what text is split; name it with "
                                 "`tokenizer convert` and --pattern gpt2, cl100k or o200k",
                                 ranks));
    tokenizer.pattern_ = known.pattern;
    while (tokenizer.vocab_size() < known.tokens) {
        int id = tokenizer.vocab_size();
        if (id == known.end_of_text) tokenizer.add_end_of_text();
        else tokenizer.specials_.push_back(tokenizer.add_token(format("<|unused_%d|>", id)));
    }
    tokenizer.index_bytes();
    check_bytes();
    recover_merges();
}

// llm.c's tokenizer.bin. Version 1 has no field for the end of text: it is 50256. Tokens beside it
// that are spelt <|...|> are special.
inline void TokenizerReader::read_llmc(std::string_view text, std::optional<Pattern> pattern) {
    tokenizer.kind_ = Tokenizer::Kind::bpe;
    std::vector<uint32_t> header(kLlmcHeader);
    size_t at = kLlmcHeader * sizeof header[0];
    if (text.size() < at)
        refuse(format("byte %zu", text.size()), "the header of 1024 bytes is cut short");
    memcpy(header.data(), text.data(), at);
    uint32_t version = header[1], tokens = header[2], end_of_text = header[3];
    if (version != 1 && version != 2)
        refuse("byte 4", format("version %u; this program reads 1 and 2", version));
    if (tokens < 257 || tokens >= uint32_t(kMaxTokens))
        refuse("byte 8", format("%u tokens; there are 257 to %d", tokens, kMaxTokens - 1));
    for (size_t i = version == 1 ? 3 : 4; i < kLlmcHeader; i++)
        if (header[i] != 0) refuse(format("byte %zu", 4 * i), "is not zero, as the header is here");
    if (version == 1) end_of_text = 50256;
    for (uint32_t id = 0; id < tokens; id++) {
        size_t length = at < text.size() ? uint8_t(text[at]) : 0;
        if (length == 0 || text.size() - at - 1 < length)
            refuse(format("byte %zu", at), at < text.size() && length == 0
                                               ? format("token %u has no bytes", id)
                                               : format("token %u of %u is cut short", id, tokens));
        tokenizer.add_token(text.substr(at + 1, length));
        at += 1 + length;
    }
    if (at != text.size())
        refuse(format("byte %zu", at),
               format("%zu bytes behind the last token; byte 8 says %u", text.size() - at, tokens));
    if (end_of_text >= tokens || tokenizer.token_bytes(int(end_of_text)) != kEndOfText)
        refuse(version == 1 ? "byte 4" : "byte 12",
               format("the end of text is %u, and that token is not ", end_of_text) +
                   std::string(kEndOfText));
    if (!pattern && tokens != 50257)
        refuse("byte 8", format("%u tokens do not tell by what text is split; name it with "
                                "`tokenizer convert` and --pattern gpt2, cl100k or o200k",
                                tokens));
    tokenizer.end_of_text_ = int(end_of_text);
    std::unordered_set<std::string_view> seen;
    for (int id = 0; id < int(tokens); id++) {
        std::string_view bytes = tokenizer.token_bytes(id);
        if (!seen.insert(bytes).second) refuse(format("token %d", id), "stands there twice");
        if (!bytes.starts_with("<|") || !bytes.ends_with("|>") || bytes.size() <= 4) continue;
        if (first_invalid_byte(bytes) != bytes.npos)
            refuse(format("token %d", id), "is special by its <|...|>, and not UTF-8");
        tokenizer.specials_.push_back(id);
    }
    tokenizer.index_bytes();
    check_bytes();
    recover_merges();
}

// The merges that belong to vocab.json or encoder.json, beside it and under the name that goes with
// its own, whatever stands before that.
inline std::string merges_beside(const std::string& path) {
    for (auto [name, merges] :
         {std::pair{"vocab.json", "merges.txt"}, std::pair{"encoder.json", "vocab.bpe"}})
        if (path.ends_with(name)) return path.substr(0, path.size() - strlen(name)) + merges;
    fail_input(
        "%s: a vocabulary without merges, which are looked for beside vocab.json and "
        "encoder.json; rename it to one of these",
        path.c_str());
}

inline std::string tokenizer_in(const std::string& folder) {
    std::error_code ignored;
    for (const char* name : {"tokenizer.json", "vocab.json", "encoder.json"})
        if (fs::exists(folder + "/" + name, ignored)) return folder + "/" + name;
    fail_input("%s: the folder holds no tokenizer.json, vocab.json or encoder.json",
               folder.c_str());
}

// Reads what `text` is by its first bytes.
inline void TokenizerReader::read(std::string_view text, std::optional<Pattern> pattern) {
    size_t first = text.find_first_not_of(" \t\r\n");
    uint32_t magic = 0;
    if (text.size() >= sizeof magic) memcpy(&magic, text.data(), sizeof magic);
    std::string_view line = text.substr(0, text.find('\n')), word = line.substr(0, line.find(' '));
    std::string bytes;
    bool says_pattern = false;
    if (text.starts_with("#version")) {
        read_merges_file(text);
    } else if (magic == kLlmcMagic) {
        read_llmc(text, pattern);
    } else if (first != text.npos && text[first] == '{') {
        json root = parse_json(text, path);
        const json* model = field(root, "model");  // in vocab.json this may be a token
        bool ids =
            (model == nullptr || !model->is_object()) && !root.empty() && root.front().is_number();
        if (ids) read_vocabulary_and_merges(root, merges_beside(path));
        else read_json(root);
        says_pattern = !ids && tokenizer.kind_ == Tokenizer::Kind::bpe;
    } else if (word.size() < line.size() && !word.empty() && from_base64(word, bytes)) {
        read_ranks(text, pattern);
    } else {
        fail_input(
            "%s: no tokenizer: neither tokenizer.json, vocab.json, merges (first line "
            "`#version`), .tiktoken nor llm.c's tokenizer.bin",
            path.c_str());
    }
    if (!pattern || tokenizer.kind_ != Tokenizer::Kind::bpe) return;
    if (says_pattern && *pattern != tokenizer.pattern_)
        fail_input("%s: pre_tokenizer: splits by %s; leave out --pattern %s", path.c_str(),
                   name_of(tokenizer.pattern_).name, name_of(*pattern).name);
    tokenizer.pattern_ = *pattern;
}

inline Tokenizer Tokenizer::load(const std::string& path, std::optional<Pattern> pattern) {
    std::error_code ignored;
    std::string file_path = fs::is_directory(path, ignored) ? tokenizer_in(path) : path;
    MappedFile file(file_path);
    TokenizerReader reader{file_path, {}, {}, {}};
    reader.read(file.view(), pattern);
    return std::move(reader.tokenizer);
}

inline std::vector<std::string> Tokenizer::save_as(TokenizerFormat format_to,
                                                   const std::string& path) const {
    if (format_to == TokenizerFormat::json) {
        save(path);
        return {};
    }
    check_format(format_to, path);
    bool pair = format_to == TokenizerFormat::merges || format_to == TokenizerFormat::openai;
    if (!pair) {
        bool ranks = format_to == TokenizerFormat::tiktoken;
        std::string content = ranks ? ranks_text() : llmc_bytes();
        // What would be read: the same merges, or the ids would differ.
        TokenizerReader reader{path, {}, {}, {}};
        if (ranks) reader.read_ranks(content, pattern_);
        else reader.read_llmc(content, pattern_);
        bool same = reader.tokenizer.merges_ == merges_;
        if (!same)
            fail_input(
                "%s: this format keeps no merges, and those that follow from its tokens are "
                "not this tokenizer's; write tokenizer.json (--format json)",
                path.c_str());
        write_file_atomic(path, content);
        return notes_on(format_to);
    }
    for (int id : specials_)
        if (!token_bytes(id).starts_with("<|") || !token_bytes(id).ends_with("|>"))
            fail_input(
                "%s: this format knows special tokens by <|...|>, and %d is %s; write "
                "tokenizer.json (--format json)",
                path.c_str(), id, std::string(token_bytes(id)).c_str());
    std::unordered_set<int> made;
    for (const Merge& merge : merges_) made.insert(merge.result);
    for (int id = 0; id < vocab_size(); id++)
        if (token_bytes(id).size() > 1 && !is_special(id) && !made.contains(id))
            fail_input(
                "%s: this format has no tokens but bytes, those of merges and <|...|>, and no "
                "merge "
                "makes %d; write tokenizer.json (--format json)",
                path.c_str(), id);
    bool openai = format_to == TokenizerFormat::openai;
    make_folder(path);
    write_file_atomic(path + (openai ? "/vocab.bpe" : "/merges.txt"), merges_text());
    write_file_atomic(path + (openai ? "/encoder.json" : "/vocab.json"), vocabulary_json());
    return notes_on(format_to);
}
