// Models from and to other programs: llm.c's files (a model, the state of its optimizer), folders
// for the Hugging Face hub and what reads them, and what a file or a folder of any kind is. Files
// of strangers are checked against their own size before memory is taken on their word; what is
// written appears whole, after it was read back.
#pragma once

#include "checkpoint.h"
#include "dataloader.h"
#include "hellaswag.h"

// ==== llm.c: files ===============================================================================

// Every file of llm.c's begins with 256 int32: a magic number that is a date, a version, and what
// the kind of file needs; the rest is zero [github.com/karpathy/llm.c].
constexpr int32_t kLlmcModel = 20240326, kLlmcDebugState = 20240327, kLlmcTokenizer = 20240328;
constexpr int32_t kLlmcState = 20240527;
constexpr size_t kLlmcHeaderInts = 256, kLlmcHeaderBytes = 4 * kLlmcHeaderInts;
constexpr int32_t kLlmcFloat32 = 3, kLlmcBfloat16 = 5;  // versions of model files

template <typename T>
T load_bytes(const char* at) {
    T value;
    memcpy(&value, at, sizeof(T));
    return value;
}

// The number that a file begins with; 0 for a file that is shorter.
inline int32_t first_word(const MappedFile& file) {
    return file.size() < 4 ? 0 : load_bytes<int32_t>(file.data());
}

inline int32_t header_word(const MappedFile& file, size_t index) {
    return load_bytes<int32_t>(file.data() + 4 * index);
}

// Refuses a file that does not begin with a whole header of this kind, whose words are zero from
// `rest` on.
inline void check_llmc_header(const MappedFile& file, int32_t magic, const char* kind) {
    const char* path = file.path().c_str();
    if (file.size() < kLlmcHeaderBytes)
        fail_input("%s: %zu bytes; %s begins with a header of %zu; cut?", path, file.size(), kind,
                   kLlmcHeaderBytes);
    if (first_word(file) != magic)
        fail_input("%s: byte 0: magic is %d; %s has %d", path, first_word(file), kind, magic);
}

// What no version known here uses is zero: anything else is a variant, or damage.
inline void check_unused_words(const MappedFile& file, size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++)
        if (header_word(file, i) != 0)
            fail_input("%s: byte %zu: %d in a place of the header that llm.c leaves zero",
                       file.path().c_str(), 4 * i, header_word(file, i));
}

// Where each row of the tensor table begins in the parameters of llm.c, in numbers, and where the
// last one ends: the order is the table's, layers follow one another in a row, matrices are as they
// are here. `rows` is the padded vocabulary.
using LlmcOffsets = std::array<size_t, kParameterRows + 1>;
inline LlmcOffsets llmc_offsets(const GPT2Config& config, size_t rows) {
    ParameterTable table = parameter_table(config);
    LlmcOffsets offsets{};
    for (size_t i = 0; i < kParameterRows; i++) {
        size_t size = table[i].file_size();
        if (i == k_wte) size = rows * table[i].cols;
        offsets[i + 1] = offsets[i] + (table[i].present ? size * table[i].count : 0);
    }
    return offsets;
}

// The rows that pad the vocabulary, `count` numbers of 2 or 4 bytes, must be zero, of either sign.
inline void check_zeros(const MappedFile& file, const char* at, size_t count, size_t width) {
    for (size_t i = 0; i < count; i++, at += width) {
        bool zero = width == 4 ? load_bytes<uint32_t>(at) << 1 == 0
                               : uint16_t(load_bytes<uint16_t>(at) << 1) == 0;
        if (!zero)
            fail_input(
                "%s: byte %zu: not zero, in a row that is beyond the vocabulary; is the vocabulary "
                "of the header too small?",
                file.path().c_str(), size_t(at - file.data()));
    }
}

// ==== llm.c: models, reading =====================================================================

// A model file of llm.c's: float32 (version 3) or bfloat16 (version 5). It has biases, a tied head,
// a hidden width of 4 C and an epsilon of 1e-5, and no tokenizer. Opening maps it, and throws with
// exit code 2 unless its header describes a model and exactly the bytes that follow.
class LlmcModel {
  public:
    explicit LlmcModel(const std::string& path) : file_(path) {
        check_llmc_header(file_, kLlmcModel, "a model of llm.c");
        check_unused_words(file_, 8, kLlmcHeaderInts);
        int32_t version = header_word(file_, 1);
        if (version != kLlmcFloat32 && version != kLlmcBfloat16)
            fail_input("%s: byte 4: version %d; %d (float32) and %d (bfloat16) are read",
                       path.c_str(), version, kLlmcFloat32, kLlmcBfloat16);
        width_ = version == kLlmcFloat32 ? 4 : 2;
        read_config();
        offsets_ = llmc_offsets(config_, padded_vocab_);
        size_t expected = kLlmcHeaderBytes + numbers() * width_, held = file_.size();
        if (held != expected)
            fail_input("%s: byte %zu: the header describes %zu bytes, the file has %zu; %s",
                       path.c_str(), std::min(held, expected), expected, held,
                       held < expected ? "cut?" : "something follows");
    }

    const std::string& path() const { return file_.path(); }
    const GPT2Config& config() const { return config_; }
    const LlmcOffsets& offsets() const { return offsets_; }
    size_t numbers() const { return offsets_.back(); }  // with the padded vocabulary
    const char* dtype() const { return width_ == 4 ? "F32" : "BF16"; }

    // Writes one row of the tensor table, of one layer, as gpt2_copy_out does. Numbers that are not
    // finite throw with exit code 2, and so do rows beyond the vocabulary that are not zero: llm.c
    // needs zeros there, so that anything else shows a wrong size of the vocabulary.
    void read(int index, int layer, real* host) const {
        const ParameterRow row = parameter_table(config_)[size_t(index)];
        size_t count = row.file_size();
        size_t offset = offsets_[size_t(index)] + size_t(layer) * count;
        const char* at = file_.data() + kLlmcHeaderBytes + offset * width_;
        auto same = [](float value) { return value; };
        if (width_ == 4) convert_numbers<float>(host, at, count, same);
        else convert_numbers<uint16_t>(host, at, count, bfloat16_to_float);
        if (!all_finite(host, count))
            fail_input("%s: %s: holds numbers that are not finite", path().c_str(),
                       hf_name(row, layer).c_str());
        if (index == k_wte)
            check_zeros(file_, at + count * width_, offsets_[k_wpe] - count, width_);
    }

  private:
    void read_config() {
        config_.context = header_word(file_, 2);
        config_.vocab_size = header_word(file_, 3);
        config_.layers = header_word(file_, 4);
        config_.heads = header_word(file_, 5);
        config_.channels = header_word(file_, 6);
        int32_t padded = header_word(file_, 7);
        try {
            // Before heads divide anything: these have to be numbers that could be a model's.
            check_range("channels", config_.channels, 1, 1 << 16);
            check_range("heads", config_.heads, 1, 1000);
            validate(config_);
        } catch (const Error& error) { fail_input("%s: header: %s", path().c_str(), error.what()); }
        if (padded < config_.vocab_size || padded > 2 << 20)
            fail_input("%s: byte 28: a vocabulary of %d, padded to %d", path().c_str(),
                       config_.vocab_size, padded);
        padded_vocab_ = size_t(padded);
    }

    MappedFile file_;
    GPT2Config config_;
    size_t padded_vocab_ = 0, width_ = 0;
    LlmcOffsets offsets_{};
};

// ==== llm.c: state ===============================================================================

// The state file that llm.c saves beside a model: steps, AdamW's moments and, where the model is
// trained in bfloat16, its float32 weights. Opening maps it, and throws with exit code 2 unless it
// is whole, of a run of one process, and of a model of these sizes. Where the run's data was
// shuffled, the state of that follows: it is measured, and not read.
class LlmcState {
  public:
    LlmcState(const std::string& path, const LlmcModel& model)
        : file_(path), config_(model.config()), offsets_(model.offsets()) {
        check_llmc_header(file_, kLlmcState, "a state of llm.c");
        if (header_word(file_, 1) != 1)
            fail_input("%s: byte 4: version %d; 1 is read", path.c_str(), header_word(file_, 1));
        if (header_word(file_, 2) != 1 || header_word(file_, 3) != 0)
            fail_input(
                "%s: byte 8: process %d of %d; the state of a run of one process can be read",
                path.c_str(), header_word(file_, 3), header_word(file_, 2));
        for (size_t i : {size_t(4), size_t(5)})
            if (header_word(file_, i) != 0 && header_word(file_, i) != 1)
                fail_input("%s: byte %zu: %d is neither 0 nor 1", path.c_str(), 4 * i,
                           header_word(file_, i));
        if (header_word(file_, 10) < 0)
            fail_input("%s: byte 40: step %d", path.c_str(), header_word(file_, 10));
        for (auto [begin, end] : {std::pair<size_t, size_t>{6, 10}, {11, 20}, {24, 30}, {34, 256}})
            check_unused_words(file_, begin, end);
        check_size();
    }

    const std::string& path() const { return file_.path(); }
    int step() const { return header_word(file_, 10); }
    bool has_weights() const { return header_word(file_, 4) == 1; }
    bool shuffles() const { return header_word(file_, 5) == 1; }

    // As LlmcModel::read: parameters are the float32 weights, which has_weights() has. A second
    // moment below zero is refused as well.
    void read(Group group, int index, int layer, real* host) const {
        const ParameterRow row = parameter_table(config_)[size_t(index)];
        size_t part = group == Group::first_moments ? 0 : group == Group::second_moments ? 1 : 2;
        size_t count = row.file_size();
        size_t offset = part * offsets_.back() + offsets_[size_t(index)] + size_t(layer) * count;
        const char* at = file_.data() + kLlmcHeaderBytes + 4 * offset;
        convert_numbers<float>(host, at, count, [](float value) { return value; });
        if (index == k_wte) check_zeros(file_, at + 4 * count, offsets_[k_wpe] - count, 4);
        bool negative = group == Group::second_moments &&
                        std::any_of(host, host + count, [](real value) { return value < 0; });
        if (negative || !all_finite(host, count))
            fail_input("%s: %s: holds %s", path().c_str(), hf_name(row, layer).c_str(),
                       negative ? "second moments below zero" : "numbers that are not finite");
    }

  private:
    // What follows the moments of a run that shuffles: the number of shards (8 bytes) and their
    // order (4 each), the number of windows (8) and their order (4 each), a generator (2520).
    void check_size() const {
        constexpr size_t kGenerator = 8 + 4 + 4 + 624 * 4 + 8;
        size_t moments = kLlmcHeaderBytes + 4 * offsets_.back() * (has_weights() ? 3 : 2);
        size_t at = moments;
        bool whole = at <= file_.size();
        for (int i = 0; whole && shuffles() && i < 2; i++) {
            size_t left = file_.size() - at;
            uint64_t count = left < 8 ? 0 : load_bytes<uint64_t>(file_.data() + at);
            whole = left >= 8 && count <= (left - 8) / 4;
            if (whole) at += 8 + 4 * size_t(count);
        }
        if (shuffles()) at += kGenerator;
        if (!whole || at != file_.size())
            fail_input(
                "%s: %zu bytes; moments of this model end at byte %zu, and what follows them is "
                "not what the header says; cut, or the state of another model?",
                path().c_str(), file_.size(), moments);
    }

    MappedFile file_;
    GPT2Config config_;
    LlmcOffsets offsets_;
};

// ==== models of any form =========================================================================

// A model on disk, opened: a folder, or a file of llm.c's. Nothing of it is in memory.
struct StoredModel {
    std::string path;  // the folder or the file
    std::string file;  // that holds the numbers, for messages
    GPT2Config config;
    std::set<std::string> dtypes;
    TensorReader tensors;  // of Group::parameters; bad numbers throw with exit code 2
    std::function<void()> check_redundant;  // what the file holds and the model does not; or null
};

inline StoredModel open_model_folder(const std::string& folder) {
    auto files = std::make_shared<ModelFiles>(folder);
    GPT2Config config = read_config(folder);
    auto placed = std::make_shared<std::vector<PlacedTensor>>(place_tensors(*files, config));
    StoredModel model{folder, files->path(), config, {}, nullptr, nullptr};
    auto names = std::make_shared<std::map<std::pair<int, int>, std::string>>();
    for (const PlacedTensor& tensor : *placed) {
        model.dtypes.insert(files->dtype_of(tensor.name));
        (*names)[{tensor.row, tensor.layer}] = tensor.name;
    }
    ParameterTable table = parameter_table(config);
    model.tensors = [=](Group, int index, int layer, real* host) {
        const std::string& name = names->at({index, layer});
        std::vector<real> values;
        read_finite(files->file_of(name), name, values);
        const ParameterRow& row = table[size_t(index)];
        if (row.transposed) transpose(host, values.data(), row.cols, row.file_rows);
        else std::copy(values.begin(), values.end(), host);
    };
    model.check_redundant = [=] {
        std::vector<real> values;
        for (const PlacedTensor& tensor : *placed) {
            if (table[size_t(tensor.row)].present) continue;
            read_finite(files->file_of(tensor.name), tensor.name, values);
            check_redundant(*files, tensor, (*placed)[0].name, values);
        }
    };
    return model;
}

// Opens what resolve_model gave. Throws with exit code 2 for anything that is not a whole model.
inline StoredModel open_model(const std::string& path) {
    if (is_folder(path)) return open_model_folder(path);
    auto file = std::make_shared<LlmcModel>(path);
    auto tensors = [file](Group, int index, int layer, real* host) {
        file->read(index, layer, host);
    };
    return {path, path, file->config(), {file->dtype()}, tensors, nullptr};
}

// What --model names: the folder of a model, that of a run's last checkpoint, or a file of llm.c's.
// Throws with exit code 2, saying what was expected, for anything else.
inline std::string resolve_model(const std::string& path) {
    std::error_code ignored;
    if (!fs::is_regular_file(path, ignored)) return resolve_model_folder(path);
    MappedFile file(path);
    if (first_word(file) == kLlmcState)
        fail_input("%s: a state of llm.c; the model is in the file model_*.bin beside it",
                   path.c_str());
    if (first_word(file) != kLlmcModel)
        fail_input(
            "%s: a file, and no model of llm.c; expected one, a model folder (config.json, "
            "model.safetensors) or a run folder",
            path.c_str());
    return path;
}

// The configuration of what resolve_model gave: see read_model_config.
inline GPT2Config read_any_config(const std::string& path) {
    return is_folder(path) ? read_model_config(path) : LlmcModel(path).config();
}

// Fills the parameters from what resolve_model gave: see load_model.
inline void load_any_model(GPT2* model, const std::string& path) {
    if (is_folder(path)) return load_model(model, path);
    LlmcModel file(path);
    GPT2Config config = gpt2_config(model), stored = file.config();
    config.dropout = stored.dropout;
    if (!(config == stored))
        fail_input("%s: a model of other sizes than the one to be filled", path.c_str());
    ParameterTable table = parameter_table(config);
    std::vector<real> host;
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        if (!row.present) continue;
        host.resize(row.file_size());
        for (int layer = 0; layer < int(row.count); layer++) {
            file.read(index, layer, host.data());
            gpt2_copy_in(model, Group::parameters, index, layer, host.data());
        }
    }
}

// For people: see conversion_note.
inline std::string any_conversion_note(const std::string& path) {
    if (is_folder(path)) return conversion_note(path);
    std::string dtype = LlmcModel(path).dtype();
    if (dtype == kRealDtype) return "";
    return format("weights are %s in %s: converted to %s", dtype.c_str(), path.c_str(), kRealName);
}

// ==== export: numbers ============================================================================

struct ExportFormat {
    const char *option, *dtype, *torch_name;  // here, in safetensors, in PyTorch
    size_t width;
    double largest;
};

constexpr ExportFormat kExportFormats[] = {
    {"fp32", "F32", "float32", 4, 3.4028234663852886e38},
    {"bf16", "BF16", "bfloat16", 2, 3.3895313892515355e38},
    {"fp16", "F16", "float16", 2, 65504},
};

inline const ExportFormat& export_format(const std::string& option) {
    for (const ExportFormat& format : kExportFormats)
        if (option == format.option) return format;
    fail_input("--export-dtype %s: must be fp32, bf16 or fp16", option.c_str());
}

// Writes `count` numbers to `out` in a format, each rounded to the nearest, ties to even. One that
// would become infinite throws with exit code 2 and the name of its tensor.
inline void round_numbers(std::string& out, const real* values, size_t count,
                          const ExportFormat& to, const std::string& name) {
    out.resize(count * to.width);
    bool finite = true;
    for (size_t i = 0; i < count; i++) {
        char* at = out.data() + i * to.width;
        if (to.width == 4) {
            float value = float(values[i]);
            finite &= std::isfinite(value);
            memcpy(at, &value, sizeof(value));
            continue;
        }
        bool half = to.dtype[0] == 'F';
        float odd = to_odd_float(values[i]);
        uint16_t value = half ? float_to_half(odd) : float_to_bfloat16(odd);
        uint16_t ones = half ? 0x7c00 : 0x7f80;  // the exponent of what is not finite
        finite &= (value & ones) != ones;
        memcpy(at, &value, sizeof(value));
    }
    if (finite) return;
    double largest = 0;
    for (size_t i = 0; i < count; i++) largest = std::max(largest, std::fabs(double(values[i])));
    fail_input("%s: holds %g, and %s ends at %g; export to bf16 or fp32", name.c_str(), largest,
               to.option, to.largest);
}

// ==== export: a folder for the hub ===============================================================

// One tensor of the file: a row of the table and a layer, in their shape. A row that the model does
// not have is a bias of zeros, which transformers expects.
struct HubTensor {
    std::string name;
    int row, layer;
    size_t count;
};

inline std::vector<HubTensor> hub_tensors(const GPT2Config& config) {
    std::vector<HubTensor> tensors;
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        if (!row.present && row.cols > 0) continue;  // a tied head
        for (int layer = 0; layer < int(row.count); layer++)
            tensors.push_back({hf_name(row, layer), index, layer, row.file_size()});
    }
    return tensors;
}

// Cuts the list into files of at most `limit` bytes of tensors (0: one file), in its order; a
// tensor that is larger has a file of its own.
inline std::vector<std::vector<HubTensor>> split_shards(const std::vector<HubTensor>& tensors,
                                                        size_t width, size_t limit) {
    std::vector<std::vector<HubTensor>> shards(1);
    size_t bytes = 0;
    for (const HubTensor& tensor : tensors) {
        size_t more = tensor.count * width;
        if (limit > 0 && !shards.back().empty() && (more > limit || bytes > limit - more)) {
            shards.emplace_back();
            bytes = 0;
        }
        shards.back().push_back(tensor);
        bytes += more;
    }
    return shards;
}

inline FileDigest write_hub_file(const std::string& path, const std::vector<HubTensor>& list,
                                 const StoredModel& model, const ExportFormat& to) {
    SafetensorsWriter writer(path, {{"format", "pt"}});
    ParameterTable table = parameter_table(model.config);
    auto values = std::make_shared<std::vector<real>>();
    auto bytes = std::make_shared<std::string>();
    for (const HubTensor& tensor : list) {
        const ParameterRow& row = table[size_t(tensor.row)];
        bool present = row.present;
        auto source = [=, &model, &to]() -> const void* {
            values->assign(tensor.count, 0);
            if (present)
                read_hf_tensor(*values, model.config, model.tensors, Group::parameters, tensor.row,
                               tensor.layer);
            round_numbers(*bytes, values->data(), values->size(), to,
                          model.file + ": " + tensor.name);
            return bytes->data();
        };
        writer.add(tensor.name, to.dtype, hf_shape(row), source);
    }
    return writer.commit();
}

// Writes model.safetensors or, where it would have more than `limit` bytes of tensors, its parts
// and the index of them. Returns the digests of the safetensors files by name.
inline std::map<std::string, FileDigest> write_hub_tensors(const std::string& folder,
                                                           const StoredModel& model,
                                                           const ExportFormat& to, size_t limit) {
    std::vector<std::vector<HubTensor>> shards =
        split_shards(hub_tensors(model.config), to.width, limit);
    std::map<std::string, FileDigest> digests;
    ordered_json map = ordered_json::object();
    size_t total = 0;
    for (size_t i = 0; i < shards.size(); i++) {
        std::string name = "model.safetensors";
        if (shards.size() > 1)
            name = format("model-%05zu-of-%05zu.safetensors", i + 1, shards.size());
        digests[name] = write_hub_file(join_path(folder, name), shards[i], model, to);
        for (const HubTensor& tensor : shards[i]) {
            map[tensor.name] = name;
            total += tensor.count * to.width;
        }
    }
    if (shards.size() == 1) return digests;
    ordered_json index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
    write_file_atomic(join_path(folder, "model.safetensors.index.json"),
                      json_text(index, 2) + "\n");
    return digests;
}

// vocab.json and merges.txt, the older form of a byte-level BPE that splits as GPT-2 does, made of
// the tokenizer.json that is in the folder. Any other tokenizer has no such form.
inline void write_bpe_files(const std::string& folder) {
    json root = parse_json(read_file(join_path(folder, "tokenizer.json")), folder);
    const json splitter = root.value("pre_tokenizer", json()), model = root.at("model");
    bool gpt2 = splitter.is_object() && splitter.value("type", "") == "ByteLevel" &&
                splitter.value("use_regex", false) && !model.at("merges").empty();
    if (!gpt2) return;
    std::vector<std::pair<int, std::string>> tokens;
    for (const auto& [token, id] : model.at("vocab").items())
        tokens.emplace_back(id.get<int>(), token);
    for (const json& token : root.at("added_tokens"))
        tokens.emplace_back(token.at("id").get<int>(), token.at("content").get<std::string>());
    std::sort(tokens.begin(), tokens.end());
    ordered_json::object_t vocabulary;  // emplace_back: the keys of a tokenizer differ
    for (size_t i = 0; i < tokens.size(); i++)
        if (i == 0 || tokens[i] != tokens[i - 1])
            vocabulary.emplace_back(tokens[i].second, tokens[i].first);
    std::string merges = "#version: 0.2\n";
    for (const json& merge : model.at("merges")) {
        if (merge.is_string()) merges += merge.get<std::string>();
        else merges += merge.at(0).get<std::string>() + " " + merge.at(1).get<std::string>();
        merges += "\n";
    }
    write_file_atomic(join_path(folder, "vocab.json"),
                      json_text(ordered_json(std::move(vocabulary)), -1) + "\n");
    write_file_atomic(join_path(folder, "merges.txt"), merges);
}

// What says where a text ends: generation_config.json and, with a tokenizer,
// special_tokens_map.json.
inline void write_generation_files(const std::string& folder, int end_of_text,
                                   const Tokenizer* tokenizer) {
    ordered_json generation = {{"_from_model_config", true}};
    if (end_of_text >= 0) {
        generation["bos_token_id"] = end_of_text;
        generation["eos_token_id"] = end_of_text;
    }
    write_file_atomic(join_path(folder, "generation_config.json"), json_text(generation, 2) + "\n");
    if (tokenizer == nullptr) return;
    ordered_json specials = ordered_json::object();
    if (tokenizer->end_of_text() >= 0) {
        std::string text(tokenizer->token_bytes(tokenizer->end_of_text()));
        specials = {{"bos_token", text}, {"eos_token", text}};
    }
    write_file_atomic(join_path(folder, "special_tokens_map.json"), json_text(specials, 2) + "\n");
}

// ==== export: the model card =====================================================================

using Facts = std::vector<std::pair<std::string, std::string>>;

// A text from a file as a cell of a Markdown table: one line that marks up nothing.
inline std::string card_cell(const std::string& text) {
    std::string cell;
    for (char c : one_line(text)) {
        if (strchr("\\`*_{}[]<>|#&", c) != nullptr) cell += '\\';
        cell += c;
    }
    return cell;
}

// A line of a log that this program wrote is shorter.
constexpr size_t kLongestLine = 1 << 20;

// The validation loss that a run's log has for a step; none where there is no such line.
inline std::optional<double> logged_loss(const std::string& path, uint64_t step) {
    std::optional<double> loss;
    if (!path_exists(path)) return loss;
    MappedFile file(path);
    std::string_view text = file.view();
    for (size_t begin = 0; begin < text.size();) {
        size_t end = std::min(text.find('\n', begin), text.size());
        std::string_view line = text.substr(begin, end - begin);
        begin = end + 1;
        if (line.size() > kLongestLine || line.find("\"val_loss\"") == std::string_view::npos)
            continue;
        try {
            json record = parse_json(line, path);
            if (record.is_object() && record.value("step", json()) == step &&
                record.value("val_loss", json()).is_number())
                loss = record["val_loss"].get<double>();
        } catch (const Error&) {}  // a line that a crash cut short
    }
    return loss;
}

// What a checkpoint's trainer.json and its run's log say of the training; nothing for a folder that
// is no checkpoint. The checkpoint has been verified.
inline Facts training_facts(const std::string& folder) {
    Facts facts;
    std::string path = join_path(folder, "trainer.json");
    if (!is_folder(folder) || !path_exists(path)) return facts;
    json root = read_json_object(path);
    auto add = [&](const std::string& name, const json& value) {
        if (value.is_string()) facts.emplace_back(name, value.get<std::string>());
        else if (value.is_primitive() && !value.is_null())
            facts.emplace_back(name, json_text(value, -1));
    };
    json step = root.value("step", json());
    add("steps", step);
    add("tokens seen", root.value("tokens", json()));
    std::error_code ignored;
    fs::path home = fs::canonical(folder, ignored).parent_path();
    std::optional<double> loss;
    if (step.is_number_unsigned())
        loss = logged_loss((home / "log.jsonl").string(), step.get<uint64_t>());
    if (loss) add("validation loss, nats a token", format("%.4f", *loss));
    else add("best validation loss, nats a token", root.value("best_val_loss", json()));
    add("precision of training", root.value("dtype", json()));
    for (const char* part : {"run", "settings"}) {
        json values = root.value(part, json());
        if (!values.is_object()) continue;
        for (const auto& [name, value] : values.items())
            if (name != "started from") add(name == "data" ? "hash of the data" : name, value);
    }
    return facts;
}

// README.md as the hub shows it: front matter for machines, then a table.
inline void write_model_card(const std::string& folder, const GPT2Config& config,
                             const std::string& dtype, bool has_tokenizer, const Facts& training) {
    Facts facts = {{"parameters", std::to_string(count_parameters(config))},
                   {"format of the weights", dtype},
                   {"layers", std::to_string(config.layers)},
                   {"heads", std::to_string(config.heads)},
                   {"channels", std::to_string(config.channels)},
                   {"context", std::to_string(config.context)},
                   {"vocabulary", std::to_string(config.vocab_size)}};
    std::set<std::string> named;
    for (const auto& [name, value] : facts) named.insert(name);
    for (const auto& fact : training)
        if (named.insert(fact.first).second) facts.push_back(fact);
    std::string text =
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- gpt2\n"
        "- text-generation\n---\n\n# A GPT-2 language model\n\nWritten by train_gpt2.\n\n"
        "| | |\n| --- | --- |\n";
    for (const auto& [name, value] : facts)
        text += "| " + card_cell(name) + " | " + card_cell(value) + " |\n";
    text += "\n```python\nfrom transformers import ";
    text += has_tokenizer ? "AutoTokenizer, GPT2LMHeadModel\n" : "GPT2LMHeadModel\n";
    text += "\nmodel = GPT2LMHeadModel.from_pretrained(\"FOLDER\")\n";
    if (has_tokenizer) text += "tokenizer = AutoTokenizer.from_pretrained(\"FOLDER\")\n";
    text += "```\n";
    write_file_atomic(join_path(folder, "README.md"), text);
}

// ==== export =====================================================================================

struct ExportRequest {
    StoredModel model;
    const Tokenizer* tokenizer = nullptr;  // null: none is written
    const LlmcState* state = nullptr;      // null: no moments are written
    std::string out;                       // a folder, or FILE.bin for llm.c
    ExportFormat format = kExportFormats[0];
    size_t max_shard_bytes = 0;  // of tensors in a file; 0: one file
};

// "5GB", "500MB", "1GiB" or bytes, as a number of bytes; 0 for what is no size.
inline size_t parse_size(const std::string& text) {
    constexpr std::pair<const char*, size_t> kUnits[] = {
        {"", 1},          {"B", 1},           {"KB", 1000},
        {"MB", 1000000},  {"GB", 1000000000}, {"KiB", 1 << 10},
        {"MiB", 1 << 20}, {"GiB", 1 << 30},   {"TB", 1000000000000}};
    size_t digits = std::min(text.find_first_not_of("0123456789"), text.size()), bytes = 0;
    if (digits == 0 || digits > 15) return 0;
    for (const auto& [unit, worth] : kUnits)
        if (text.substr(digits) == unit)
            if (!__builtin_mul_overflow(std::stoull(text.substr(0, digits)), worth, &bytes))
                return bytes;
    return 0;
}

// --out must not be in use: an export replaces nothing.
inline void check_out_is_free(const std::string& out) {
    std::error_code error;
    if (out.empty()) return;
    if (fs::is_symlink(out, error) && !path_exists(out))
        fail_input("--out %s: is a link to what is not there; give another name, or remove it",
                   out.c_str());
    if (!path_exists(out)) return;
    if (fs::equivalent(out, ".", error))
        fail_input("--out %s: is where the program runs, and cannot be replaced; give a new name",
                   out.c_str());
    if (is_folder(out) != !out.ends_with(".bin"))
        fail_input("--out %s: is %s; FILE.bin is written for llm.c, a folder for anything else",
                   out.c_str(), is_folder(out) ? "a folder" : "a file");
    bool empty = fs::is_empty(out, error);
    if (error) fail_machine("--out %s: %s", out.c_str(), error.message().c_str());
    if (!empty)
        fail_input("--out %s: is there already; give another name, or remove it first",
                   out.c_str());
}

// The end of text of a model without a tokenizer: as its config.json says, or GPT-2's.
inline int stored_end_of_text(const StoredModel& model) {
    if (!is_folder(model.path)) return model.config.vocab_size == 50257 ? 50256 : -1;
    json id = read_json_object(join_path(model.path, "config.json")).value("eos_token_id", json());
    bool known = id.is_number_unsigned() && id.get<uint64_t>() < uint64_t(model.config.vocab_size);
    return known ? id.get<int>() : -1;
}

// Holds what was written against what was meant, as a reader will find it.
inline void verify_export(const std::string& folder, const GPT2Config& config,
                          const std::map<std::string, FileDigest>& digests,
                          const Tokenizer* tokenizer) {
    const char* lost = "the disk did not keep what was written";
    for (const auto& [name, digest] : digests)
        if (!(digest_file(join_path(folder, name)) == digest))
            fail_machine("%s: %s", join_path(folder, name).c_str(), lost);
    try {
        bool same = read_model_config(folder) == config;
        if (tokenizer != nullptr)
            same &= Tokenizer::load(folder).fingerprint() == tokenizer->fingerprint();
        if (!same) fail_machine("%s: %s", folder.c_str(), lost);
    } catch (const Error& error) { fail_machine("%s; %s", error.what(), lost); }
}

// Writes FOLDER/optimizer.safetensors: m.NAME and v.NAME in float32, as a checkpoint has them, and
// the number of steps in its metadata.
inline FileDigest write_moments(const std::string& folder, const GPT2Config& config,
                                const LlmcState& state) {
    SafetensorsWriter writer(join_path(folder, "optimizer.safetensors"),
                             {{"step", std::to_string(state.step())}});
    TensorView tensors = view_of(config, [&](Group group, int index, int layer, real* host) {
        state.read(group, index, layer, host);
    });
    add_tensors(writer, config, tensors, Group::first_moments, "m.");
    add_tensors(writer, config, tensors, Group::second_moments, "v.");
    return writer.commit();
}

inline void sync_parent(const std::string& path) {
    sync_folder(fs::path(path).parent_path().string());
}

// Writes OUT, a folder that loads with from_pretrained and holds what other runtimes ask for.
inline void export_folder(const ExportRequest& request) {
    const StoredModel& model = request.model;
    std::string out = fs::path(request.out).lexically_normal().string();
    if (out.ends_with('/')) out.pop_back();
    TemporaryFolder folder(temporary_name(out));
    std::map<std::string, FileDigest> digests =
        write_hub_tensors(folder.path(), model, request.format, request.max_shard_bytes);
    if (request.state != nullptr)
        digests["optimizer.safetensors"] =
            write_moments(folder.path(), model.config, *request.state);
    int end_of_text = stored_end_of_text(model);
    if (request.tokenizer != nullptr) {
        request.tokenizer->save(folder.path(), model.config.context);
        end_of_text = request.tokenizer->end_of_text();
        write_bpe_files(folder.path());
    }
    write_config(model.config, end_of_text, folder.path(), request.format.torch_name);
    write_generation_files(folder.path(), end_of_text, request.tokenizer);
    Facts facts = training_facts(model.path);
    if (request.state != nullptr)
        facts.emplace_back("steps", std::to_string(request.state->step()));
    write_model_card(folder.path(), model.config, request.format.torch_name,
                     request.tokenizer != nullptr, facts);
    verify_export(folder.path(), model.config, digests, request.tokenizer);
    std::error_code error;
    if (path_exists(out) && !fs::remove(out, error))  // an empty folder: no other can be removed
        fail_machine("--out %s: cannot replace: %s", out.c_str(), error.message().c_str());
    folder.rename_to(out);
    sync_parent(out);
}

// Why llm.c cannot compute a model; "" when it can.
inline std::string llmc_obstacle(const GPT2Config& config) {
    if (!config.tied) return "its head is not tied to the token embedding";
    if (config.hidden_size() != 4 * config.channels)
        return format("its hidden width is %d, not %d", config.hidden_size(), 4 * config.channels);
    if (config.layer_norm_epsilon != 1e-5)
        return format("its layer_norm_epsilon is %g, not 1e-05", config.layer_norm_epsilon);
    return "";
}

// Writes a model file of llm.c's. A model without biases gets zeros, rows that pad the vocabulary
// are zero.
inline FileDigest write_llmc_model(const std::string& path, const GPT2Config& config,
                                   const TensorReader& tensors, const ExportFormat& to) {
    int32_t header[kLlmcHeaderInts] = {
        kLlmcModel,      to.width == 4 ? kLlmcFloat32 : kLlmcBfloat16,
        config.context,  config.vocab_size,
        config.layers,   config.heads,
        config.channels, config.padded_vocab()};
    AtomicFile file(path);
    StreamingHash hash;
    auto write = [&](const void* data, size_t size) {
        file.write(data, size);
        hash.add(data, size);
    };
    write(header, sizeof header);
    std::vector<real> host;
    std::string bytes;
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < k_headw; index++) {
        const ParameterRow& row = table[size_t(index)];
        for (int layer = 0; layer < int(row.count); layer++) {
            host.assign(index == k_wte ? row.rows * row.cols : row.file_size(), 0);
            if (row.present) tensors(Group::parameters, index, layer, host.data());
            round_numbers(bytes, host.data(), host.size(), to, hf_name(row, layer));
            write(bytes.data(), bytes.size());
        }
    }
    file.commit();
    return hash.digest();
}

// Writes OUT, a file for llm.c. Throws with exit code 2 for a model that llm.c does not have.
inline void export_llmc(const ExportRequest& request) {
    const GPT2Config& config = request.model.config;
    std::string obstacle = llmc_obstacle(config);
    if (!obstacle.empty())
        fail_input("%s: llm.c has no such model: %s; export to a folder",
                   request.model.path.c_str(), obstacle.c_str());
    if (strcmp(request.format.option, "fp16") == 0)
        fail_input("--export-dtype fp16: llm.c has none; give fp32 or bf16");
    const char* lost = "the disk did not keep what was written";
    TemporaryFolder folder(temporary_name(request.out));
    std::string path = join_path(folder.path(), "model.bin");
    FileDigest digest = write_llmc_model(path, config, request.model.tensors, request.format);
    if (!(digest_file(path) == digest)) fail_machine("%s: %s", request.out.c_str(), lost);
    try {
        LlmcModel written(path);
    } catch (const Error& error) { fail_machine("%s; %s", error.what(), lost); }
    rename_path(path, request.out);
    sync_parent(request.out);
}

// Takes the float32 weights of a state in place of the model's own. These must be those, rounded up
// or down to bfloat16: exit code 2 where a state belongs to another model or step.
inline void use_state_weights(StoredModel* model, const LlmcState& state) {
    if (!state.has_weights()) return;
    TensorReader rounded = model->tensors;
    GPT2Config config = model->config;
    std::string file = model->file;
    model->tensors = [=, &state](Group group, int index, int layer, real* host) {
        const ParameterRow row = parameter_table(config)[size_t(index)];
        std::vector<real> narrow(row.file_size());
        rounded(group, index, layer, narrow.data());
        state.read(Group::parameters, index, layer, host);
        for (size_t i = 0; i < narrow.size(); i++)
            if (!(std::fabs(narrow[i] - host[i]) <= std::fabs(host[i]) * real(0x1p-7) + 1e-37))
                fail_input("%s: %s: number %zu is %g, in %s it is %g; is it of another step?",
                           state.path().c_str(), hf_name(row, layer).c_str(), i, double(host[i]),
                           file.c_str(), double(narrow[i]));
    };
    model->dtypes = {"F32"};
}

// Writes a model in another form: see export_folder and export_llmc. Nothing is at --out unless it
// is whole. Throws with exit code 2 where --out is in use, or the form cannot hold the model; with
// exit code 1 when the disk refuses.
inline void export_model(ExportRequest request) {
    check_out_is_free(request.out);
    bool to_llmc = request.out.ends_with(".bin");
    if (to_llmc && request.max_shard_bytes > 0)
        fail_input("--max-shard-size: a file for llm.c is one file; leave the option out");
    if (request.model.check_redundant) request.model.check_redundant();
    if (request.state != nullptr) use_state_weights(&request.model, *request.state);
    to_llmc ? export_llmc(request) : export_folder(request);
}

// ==== what a path is =============================================================================

struct PathDescription {
    std::string text;  // for people; more lines than one for a folder
    bool intact = true;
};

inline std::string describe_config(const GPT2Config& config) {
    return format(
        "GPT-2 of %d layers, %d heads, %d channels, context %d, vocabulary %d: %zu "
        "parameters",
        config.layers, config.heads, config.channels, config.context, config.vocab_size,
        count_parameters(config));
}

// Reads a whole model, without memory for it: throws as load_any_model does.
inline std::string describe_model(const std::string& path) {
    StoredModel model = open_model(path);
    ParameterTable table = parameter_table(model.config);
    std::vector<real> host;
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        if (!row.present) continue;
        host.resize(row.file_size());
        for (int layer = 0; layer < int(row.count); layer++)
            model.tensors(Group::parameters, index, layer, host.data());
    }
    if (model.check_redundant) model.check_redundant();
    std::string text = describe_config(model.config) + " in";
    for (const std::string& dtype : model.dtypes) text += " " + dtype;
    if (!is_folder(path)) return text;
    if (!holds_tokenizer(path)) return text + "; no tokenizer";
    return text + format("; tokenizer of %d tokens", Tokenizer::load(path).vocab_size());
}

// The header of a state; whether its size is right can be said only beside its model.
inline std::string describe_llmc_state(const MappedFile& file) {
    check_llmc_header(file, kLlmcState, "a state of llm.c");
    return format(
        "state of llm.c, version %d: step %d, process %d of %d, %s float32 weights; `export "
        "--state` holds it against its model",
        header_word(file, 1), header_word(file, 10), header_word(file, 3), header_word(file, 2),
        header_word(file, 4) != 0 ? "with" : "without");
}

// A tokenizer of llm.c's: ids to bytes, each with its length before it; merges follow from them.
inline std::string describe_llmc_tokenizer(const MappedFile& file) {
    check_llmc_header(file, kLlmcTokenizer, "a tokenizer of llm.c");
    int32_t version = header_word(file, 1), tokens = header_word(file, 2);
    size_t at = kLlmcHeaderBytes;
    for (int32_t id = 0; id < tokens; id++) {
        size_t length = at < file.size() ? size_t(uint8_t(file.data()[at])) : 0;
        if (length == 0 || length > file.size() - at - 1)
            fail_input("%s: byte %zu: token %d of %d is cut", file.path().c_str(), at, id, tokens);
        at += 1 + length;
    }
    if (at != file.size())
        fail_input("%s: byte %zu: something follows the last of %d tokens", file.path().c_str(), at,
                   tokens);
    return format(
        "tokenizer of llm.c, version %d: %d tokens; it does not say how text is split (--pattern)",
        version, tokens);
}

// Reads all of it: every id, and the hash of a shard that has one in its header.
inline std::string describe_shard(const std::string& path) {
    constexpr size_t kBlock = 1 << 16;
    Shard shard(path, INT_MAX);
    std::vector<int> ids(kBlock);
    int largest = 0;
    for (size_t begin = 0; begin < shard.size(); begin += kBlock) {
        size_t count = std::min(kBlock, shard.size() - begin);
        shard.copy(begin, count, ids.data());
        largest = std::max(largest, *std::max_element(ids.begin(), ids.begin() + ptrdiff_t(count)));
    }
    shard.verify();
    return format("token shard, %s, %zu tokens, largest id %d%s", shard.format_name(), shard.size(),
                  largest, shard.checksum() != 0 ? ", as its hash says" : "");
}

inline std::string describe_choices(const MappedFile& file) {
    std::vector<ChoiceExample> examples = ChoiceFileReader(file, INT_MAX).read();
    return format("HellaSwag of llm.c; examples: %zu, tokens of the longest row: %zu",
                  examples.size(), longest_choice(examples));
}

// Files that begin with a number or a mark of their own; "" for any other.
inline std::string describe_marked_file(const MappedFile& file) {
    const std::string& path = file.path();
    switch (first_word(file)) {
        case kLlmcModel:
            return "model of llm.c: " + describe_model(path);
        case kLlmcState:
            return describe_llmc_state(file);
        case kLlmcTokenizer:
            return describe_llmc_tokenizer(file);
        case kLlmcDebugState:
            return "debug state of llm.c: a batch, its logits and gradients";
        case kShardMagic:
        case kWideShardMagic:
            return describe_shard(path);
        case kChoiceMagic:
            return describe_choices(file);
    }
    if (file.view().starts_with(kNpyMagic)) {
        NpyHeader header = read_npy_header(file);
        if (header.shape.size() == 1) return describe_shard(path);
        return format("NumPy array of integers, %zu bytes each, shape %s", header.width,
                      shape_text(header.shape).c_str());
    }
    constexpr std::pair<std::string_view, const char*> kForeign[] = {
        {"PK\x03\x04", "zip archive, such as PyTorch's .bin and .pt files or NumPy's .npz"},
        {"GGUF", "GGUF file, of llama.cpp"},
        {"\x1f\x8b", "gzip file"},
        {"\x80\x02", "Python pickle"},
        {"\x89HDF", "HDF5 file, such as Keras's .h5"},
        {"#version", nullptr}};
    for (const auto& [mark, kind] : kForeign) {
        if (!file.view().starts_with(mark)) continue;
        if (kind != nullptr) return std::string(kind) + ", which this program does not read";
        return format("merges of a BPE, %d tokens in all", Tokenizer::load(path).vocab_size());
    }
    return "";
}

// A log of a run: a JSON object with a step on each line, of a step or of an event. A last line
// that is cut short is what a crash leaves, and a run that goes on drops it.
inline std::string describe_log(const MappedFile& file) {
    size_t steps = 0, events = 0, line_number = 0;
    uint64_t last = 0;
    std::string_view text = file.view(), tail;
    for (size_t begin = 0; begin < text.size();) {
        size_t end = std::min(text.find('\n', begin), text.size());
        std::string_view line = text.substr(begin, end - begin);
        begin = end + 1;
        line_number++;
        if (end == text.size()) {
            tail = "; the last line is cut short";
            break;
        }
        std::string where = format("%s: line %zu", file.path().c_str(), line_number);
        if (line.size() > kLongestLine)
            fail_input("%s: %zu bytes are too many for a record", where.c_str(), line.size());
        json record = parse_json(line, where);
        if (!record.is_object() || !record.value("step", json()).is_number_unsigned())
            fail_input("%s: no record of a step", where.c_str());
        last = record["step"].get<uint64_t>();
        (record.contains("event") ? events : steps)++;
    }
    return format("log of a run, %zu steps and %zu events, the last of step %llu%s", steps, events,
                  static_cast<unsigned long long>(last), std::string(tail).c_str());
}

inline std::string describe_trainer_json(const std::string& path) {
    json root = read_json_object(path);
    if (!root.contains("checksum") || root["checksum"] != json_checksum(root))
        fail_input("%s: its content does not match its checksum; the file is damaged",
                   path.c_str());
    return format(
        "state of a run at step %s, its checksum is right; `info FOLDER` verifies the "
        "files that it lists",
        one_line(json_text(root.value("step", json()), -1)).c_str());
}

// A vocabulary {token: id}: each id once, from 0 on.
inline std::string describe_vocabulary(const std::string& path) {
    json root = read_json_object(path);
    std::vector<bool> seen(root.size());
    for (const auto& [token, id] : root.items()) {
        bool fits = id.is_number_unsigned() && id.get<uint64_t>() < seen.size();
        if (!fits || seen[id.get<size_t>()])
            fail_input("%s: %s: id %s; ids are from 0 to %zu, each once", path.c_str(),
                       one_line(token).c_str(), one_line(json_text(id, -1)).c_str(),
                       seen.size() - 1);
        seen[id.get<size_t>()] = true;
    }
    return format("vocabulary of a BPE, %zu tokens", root.size());
}

inline std::string describe_shard_index(const std::string& path) {
    ShardIndex index = read_shard_index(path);
    std::set<std::string> files;
    for (const auto& [tensor, file] : index.file_of) files.insert(file);
    return format("index of %zu tensors in %zu safetensors files; `info FOLDER` reads them",
                  index.file_of.size(), files.size());
}

// JSON by the file's name, and by its content where the name says nothing.
inline std::string describe_json(const MappedFile& file, const std::string& name) {
    const std::string& path = file.path();
    if (name == "config.json") return "configuration: " + describe_config(read_config(path));
    if (name == "tokenizer.json")
        return format("tokenizer of %d tokens", Tokenizer::load(path).vocab_size());
    if (name == "trainer.json") return describe_trainer_json(path);
    if (name == "vocab.json") return describe_vocabulary(path);
    if (name.ends_with(".safetensors.index.json")) return describe_shard_index(path);
    constexpr size_t kLargest = 16 << 20;  // parsed, text takes a multiple of its memory
    if (file.size() > kLargest) return format("JSON by its name, %zu bytes", file.size());
    json root = parse_unique_json(file.view(), path);
    constexpr std::pair<std::string_view, const char*> kNames[] = {
        {"tokenizer_config.json", "settings of a tokenizer"},
        {"special_tokens_map.json", "special tokens of a tokenizer"},
        {"added_tokens.json", "added tokens of a tokenizer"},
        {"generation_config.json", "settings for generating"}};
    for (const auto& [known, kind] : kNames)
        if (name == known && root.is_object()) return format("%s, %zu entries", kind, root.size());
    return format("JSON, %s of %zu entries", root.type_name(), root.size());
}

// Says what a file is. Throws with exit code 2 for one that is damaged or cannot be used.
inline std::string describe_file(const std::string& path) {
    MappedFile file(path);
    std::string name = fs::path(path).filename().string();
    if (file.size() == 0) return "empty file";
    if (name.ends_with(".safetensors")) {
        SafetensorsFile tensors(path);
        size_t numbers = 0;
        for (const auto& [tensor, entry] : tensors.entries()) numbers += entry.count();
        return format("safetensors file, %zu tensors, %zu numbers, %zu bytes",
                      tensors.entries().size(), numbers, tensors.size());
    }
    std::string marked = describe_marked_file(file);
    if (!marked.empty()) return marked;
    if (name.ends_with(".json")) return describe_json(file, name);
    if (name == "log.jsonl") return describe_log(file);
    if (is_shard(path)) return describe_shard(path);  // which says why it is none
    bool text = file.view().substr(0, 1 << 20).find('\0') == std::string_view::npos;
    return format("%s, %zu bytes", text ? "text" : "file of no kind that is known here",
                  file.size());
}

// The files of a folder, a line each, what they are or, in a checkpoint that was verified, that
// they are as it recorded. One that cannot be used makes the folder not intact.
inline void describe_content(const std::string& folder, const json& recorded,
                             PathDescription* description) {
    std::set<std::string> names;
    std::error_code error;
    for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error))
        names.insert(at->path().filename().string());
    if (error) fail_machine("%s: cannot list: %s", folder.c_str(), error.message().c_str());
    for (const std::string& name : names) {
        std::string path = join_path(folder, name), text = "a folder";
        if (recorded.is_object() && recorded.contains(name)) {
            text = format("%zu bytes, as recorded", size_t(fs::file_size(path, error)));
        } else if (!is_folder(path)) {
            try {
                text = describe_file(path);
            } catch (const Error& failure) {
                text = std::string("cannot be used: ") + failure.what();
                description->intact = false;
            }
        }
        description->text += "\n  " + one_line(name) + ": " + text;
    }
}

inline PathDescription describe_run(const std::string& path, const std::vector<StepFolder>& steps);

// A model, a checkpoint (whose hashes are verified), or a run. `content`: with its files.
inline PathDescription describe_folder(const std::string& path, bool content = true) {
    PathDescription description;
    json recorded;
    if (path_exists(join_path(path, "trainer.json"))) {
        json trainer = verify_checkpoint(path);
        recorded = trainer["files"];
        description.text =
            format("checkpoint, step %s, verified: ", one_line(trainer["step"].dump()).c_str()) +
            describe_model(path);
    } else if (path_exists(join_path(path, "config.json"))) {
        description.text = "model folder: " + describe_model(path);
    } else {
        std::vector<StepFolder> steps = list_steps(path, "");
        if (!steps.empty() || path_exists(join_path(path, "log.jsonl")))
            return describe_run(path, steps);
        if (!holds_tokenizer(path)) return {"folder, neither a model nor a run"};
        description.text = format("tokenizer of %d tokens", Tokenizer::load(path).vocab_size());
    }
    if (content) describe_content(path, recorded, &description);
    return description;
}

inline PathDescription describe_run(const std::string& path, const std::vector<StepFolder>& steps) {
    PathDescription description{format("run folder, %zu checkpoints", steps.size())};
    auto add = [&](const std::string& name, const std::function<std::string()>& describe) {
        description.text += "\n  " + name + ": ";
        try {
            description.text += describe();
        } catch (const Error& error) {
            description.text += "cannot be used: " + std::string(error.what());
            description.intact = false;
        }
    };
    for (const StepFolder& folder : steps) {
        std::string name = folder.name;
        for (const char* link : {"last", "best"})
            if (linked_step(path, link) == folder.name) name += std::string(" (") + link + ")";
        add(name, [&] { return describe_folder(join_path(path, folder.name), false).text; });
    }
    std::string log = join_path(path, "log.jsonl");
    if (path_exists(log)) add("log.jsonl", [&] { return describe_file(log); });
    return description;
}

// Says what a file or folder is and whether it is intact: models, checkpoints and runs are read
// whole. Throws with exit code 2 when there is nothing.
inline PathDescription describe_path(const std::string& path) {
    if (!path_exists(path)) fail_input("%s: no such file or folder", path.c_str());
    try {
        return is_folder(path) ? describe_folder(path) : PathDescription{describe_file(path)};
    } catch (const Error& error) { return {std::string("cannot be used: ") + error.what(), false}; }
}
