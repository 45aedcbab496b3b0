// Text as `shard` reads it: a line of JSON, packed files, and the cleaner. The first byte says
// which.
#include "../../corpus.h"
#include "fuzz.h"

namespace {

void try_json(const std::string& line) {
    std::string text;
    bool accepted = fuzz::accepts([&] { text = field_text(line, "text", "x.jsonl", 1); });
    json root = json::parse(line, nullptr, false);
    bool has = root.is_object() && root.contains("text") && root["text"].is_string();
    if (accepted) fuzz::require(has && root["text"] == text, "the field is what the library reads");
    size_t times = 0;
    for (size_t at = 0; (at = line.find("te", at)) != line.npos; at++) times++;
    bool escaped = line.find('\\') != line.npos;
    if (has && times == 1 && !escaped) fuzz::require(accepted, "a field that is there is read");
}

void try_clean(const std::string& text) {
    Removed removed;
    std::string clean = clean_document(text, &removed);
    for (char c : clean)
        fuzz::require(uint8_t(c) >= 0x20 || c == '\n' || c == '\t', "no control characters");
    utf8proc_int32_t c;
    auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    for (size_t at = 0; at < text.size();) {
        auto length = utf8proc_iterate(bytes + at, utf8proc_ssize_t(text.size() - at), &c);
        if (length <= 0 || c == 0xfeff) return;  // what is removed may join what then is removed
        at += size_t(length);
    }
    if (!book_marks(text).empty() || !book_marks(clean).empty()) return;
    fuzz::require(clean_document(clean, &removed) == clean, "clean text is clean");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    std::string rest = fuzz::text_of(data + 1, size - 1);
    switch (data[0] % 4) {
        case 0:
            try_json(rest);
            return 0;
        case 1:
            try_clean(rest);
            return 0;
    }
    std::string name = data[0] % 4 == 2 ? "x.txt.gz" : "x.jsonl.zst";
    fuzz::put(name, rest);
    fuzz::accepts([&] {
        TextCorpus corpus = read_text({fuzz::path(name)});
        fuzz::require(corpus.document_ends.back() == corpus.text.size(),
                      "documents cover the text");
    });
    return 0;
}
