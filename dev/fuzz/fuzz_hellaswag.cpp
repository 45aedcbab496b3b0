// HellaSwag, as JSON lines and as llm.c's file. What is accepted is complete, is written and read
// as the same examples, and is scored.
#include "../../hellaswag.h"
#include "fuzz.h"

namespace {

constexpr int kVocabulary = 300;

void put_word(std::string* file, size_t word) {
    auto narrow = uint16_t(word);
    file->append(reinterpret_cast<const char*>(&narrow), sizeof narrow);
}

// llm.c's file; "" where an example is too long for it.
std::string file_of(const std::vector<ChoiceExample>& examples) {
    std::string stream;
    size_t longest = 0;
    for (size_t i = 0; i < examples.size(); i++) {
        size_t words = 6 + examples[i].context.size();
        for (const std::vector<int>& ending : examples[i].endings) words += 1 + ending.size();
        if (2 * words > UINT16_MAX) return "";
        longest = std::max(longest, 2 * words);
        for (size_t word : {size_t(65535), 2 * words, i, size_t(examples[i].label), size_t(4),
                            examples[i].context.size()})
            put_word(&stream, word);
        for (int id : examples[i].context) put_word(&stream, size_t(id));
        for (const std::vector<int>& ending : examples[i].endings) {
            put_word(&stream, ending.size());
            for (int id : ending) put_word(&stream, size_t(id));
        }
    }
    int32_t header[kChoiceHeaderInts] = {kChoiceMagic, kChoiceVersion, int32_t(examples.size()),
                                         int32_t(longest)};
    return std::string(reinterpret_cast<char*>(header), sizeof header) + stream;
}

bool same(const std::vector<ChoiceExample>& a, const std::vector<ChoiceExample>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
        return x.context == y.context && x.endings == y.endings && x.label == y.label;
    });
}

void check(const std::vector<ChoiceExample>& examples) {
    for (const ChoiceExample& example : examples) {
        fuzz::require(!example.context.empty() && example.label >= 0 && example.label < 4,
                      "an example has a context and a label");
        for (const std::vector<int>& ending : example.endings) {
            fuzz::require(!ending.empty(), "an ending has tokens");
            for (int id : ending) fuzz::require(id >= 0 && id < kVocabulary, "a token");
        }
    }
    auto flat = [](const int*, const int* targets, int rows, int T, double* losses) {
        for (int i = 0; i < rows * T; i++) {
            fuzz::require(targets[i] >= kIgnore && targets[i] < kVocabulary, "a target");
            losses[i] = 1;
        }
    };
    int T = int(std::min<size_t>(longest_choice(examples), 16));
    std::vector<ChoiceScore> scores = score_choices(examples, 3, T, flat);
    ChoiceResult result = count_choices(examples, scores);
    fuzz::require(result.examples == examples.size() && result.loss == 1, "each loss counts once");
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    std::string file = fuzz::text_of(data, size);
    if (file.empty() || fuzz::below(random, 5) == 0) return LLVMFuzzerMutate(data, size, limit);
    if (file[0] == '{') {
        size_t begin = fuzz::below(random, 2) == 0 ? 0 : file.rfind('\n', file.size() - 2) + 1;
        size_t end = std::min(file.find('\n', begin), file.size());
        std::string line = fuzz::change_json_text(file.substr(begin, end - begin), random);
        std::erase(line, '\n');
        file.replace(begin, end - begin, line);
    } else if (file.size() > 1024) {
        bool header = fuzz::below(random, 4) == 0;
        size_t at =
            header ? fuzz::below(random, 16) : 1024 + fuzz::below(random, file.size() - 1024);
        file[at & ~size_t(1)] = char(fuzz::below(random, 2) == 0 ? random() : random() % 5);
        if (fuzz::below(random, 4) == 0)
            file.resize(1024 + fuzz::below(random, file.size() - 1023));
    }
    return fuzz::give_back(file, data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const Tokenizer bytes = Tokenizer::bytes();
    std::string file = fuzz::text_of(data, size);
    fuzz::put("a", file);
    std::vector<ChoiceExample> examples;
    if (!fuzz::accepts([&] { examples = read_hellaswag(fuzz::path("a"), &bytes, kVocabulary); }))
        return 0;
    check(examples);
    std::string again = file_of(examples);
    if (is_choice_file(MappedFile(fuzz::path("a"))))
        fuzz::require(again == file, "a file of llm.c's is the one that its examples make");
    if (again.empty()) return 0;
    fuzz::put("b.bin", again);
    fuzz::require(same(read_hellaswag(fuzz::path("b.bin"), nullptr, kVocabulary), examples),
                  "written, they are the same");
    return 0;
}
