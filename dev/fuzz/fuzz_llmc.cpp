// llm.c's files: a model and, behind it, a state. The input is the length of the model (8 bytes),
// the model and the state. A model that is accepted is written and read as the same numbers.
#include "fuzz.h"

namespace {

struct Parts {
    std::string model, state;
};

Parts split(const std::string& text) {
    if (text.size() < 8) return {text, ""};
    size_t length = std::min<size_t>(load_bytes<uint64_t>(text.data()), text.size() - 8);
    return {text.substr(8, length), text.substr(8 + length)};
}

std::string join(const Parts& parts) {
    uint64_t length = parts.model.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + parts.model + parts.state;
}

// A word of the header, of those that mean something; or numbers, or the length.
void change(std::string& file, size_t words, fuzz::Random& random) {
    const int32_t kStrange[] = {0,   1,   2,       3,       5,       -1,     127,
                                128, 256, 1 << 16, 1 << 20, INT_MAX, INT_MIN};
    size_t choice = fuzz::below(random, 8), at = 4 * fuzz::below(random, words);
    if (choice < 5 && file.size() >= kLlmcHeaderBytes) {
        int32_t value = kStrange[fuzz::below(random, std::size(kStrange))];
        if (choice < 2) value = int32_t(load_bytes<uint32_t>(&file[at]) + random() % 5 - 2);
        memcpy(&file[at], &value, 4);
    } else if (choice == 5) {
        file.resize(file.size() + fuzz::below(random, 9) * 4, '\0');
    } else if (choice == 6) {
        file.resize(file.size() - std::min(file.size(), fuzz::below(random, 9) * 2));
    } else if (file.size() > kLlmcHeaderBytes) {
        size_t place = kLlmcHeaderBytes + fuzz::below(random, file.size() - kLlmcHeaderBytes);
        file[place] = char(random());
    }
}

// The length that the header asks for, if that is little.
void fit_model(std::string& file) {
    if (file.size() < kLlmcHeaderBytes) return;
    auto word = [&](size_t i) {
        return uint64_t(std::clamp(load_bytes<int32_t>(&file[4 * i]), 0, 64));
    };
    uint64_t C = word(6), L = word(4), width = word(1) == 5 ? 2 : 4;
    uint64_t numbers = (word(7) + word(2)) * C + L * (12 * C * C + 13 * C) + 2 * C;
    if (numbers < 20000) file.resize(kLlmcHeaderBytes + numbers * width, '\0');
}

template <typename Visit>
void each_tensor(const GPT2Config& config, Visit visit) {
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < kParameterRows; index++)
        for (int layer = 0; layer < int(table[size_t(index)].count); layer++)
            if (table[size_t(index)].present) visit(index, layer, table[size_t(index)].file_size());
}

void check_model(const LlmcModel& model) {
    const GPT2Config& config = model.config();
    TensorReader tensors = [&](Group, int index, int layer, real* host) {
        model.read(index, layer, host);
    };
    const ExportFormat& format = kExportFormats[model.dtype()[0] == 'F' ? 0 : 1];
    write_llmc_model(fuzz::path("again.bin"), config, tensors, format);
    LlmcModel again(fuzz::path("again.bin"));
    fuzz::require(again.config() == config, "the configuration is the same");
    each_tensor(config, [&](int index, int layer, size_t count) {
        std::vector<real> before(count), after(count);
        model.read(index, layer, before.data());
        again.read(index, layer, after.data());
        fuzz::require(memcmp(before.data(), after.data(), count * sizeof(real)) == 0,
                      "the numbers are the same");
    });
}

void read_state(const LlmcState& state, const GPT2Config& config) {
    std::vector<Group> groups = {Group::first_moments, Group::second_moments};
    if (state.has_weights()) groups.push_back(Group::parameters);
    for (Group group : groups)
        each_tensor(config, [&](int index, int layer, size_t count) {
            std::vector<real> host(count);
            state.read(group, index, layer, host.data());
        });
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    if (fuzz::below(random, 6) == 0) return LLVMFuzzerMutate(data, size, limit);
    Parts parts = split(fuzz::text_of(data, size));
    bool model = fuzz::below(random, 2) == 0;
    change(model ? parts.model : parts.state, model ? 10 : 40, random);
    if (fuzz::below(random, 2) == 0) fit_model(parts.model);
    return fuzz::give_back(join(parts), data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Parts parts = split(fuzz::text_of(data, size));
    fuzz::put("model.bin", parts.model);
    fuzz::put("state.bin", parts.state);
    fuzz::accepts([&] { describe_file(fuzz::path("model.bin")); });
    fuzz::accepts([&] { describe_file(fuzz::path("state.bin")); });
    std::optional<LlmcModel> model;
    if (!fuzz::accepts([&] { model.emplace(fuzz::path("model.bin")); })) return 0;
    bool finite = fuzz::accepts([&] {
        each_tensor(model->config(), [&](int index, int layer, size_t count) {
            std::vector<real> host(count);
            model->read(index, layer, host.data());
        });
    });
    if (finite) check_model(*model);
    fuzz::accepts([&] {
        LlmcState state(fuzz::path("state.bin"), *model);
        read_state(state, model->config());
    });
    return 0;
}
