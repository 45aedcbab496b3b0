// Model <-> disk. A model is kept as a Hugging Face folder (config.json, model.safetensors and the
// tokenizer's files), so that what is written here loads with from_pretrained and what they wrote
// loads here; a checkpoint of a run is such a folder and what resuming needs besides
// (optimizer.safetensors, trainer.json). Nothing is seen half written: files and folders are made
// beside their place, synced, read back against their hashes, and renamed.
#pragma once

#include <sys/statvfs.h>

#include <array>
#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <future>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <set>
#include <thread>
#include <tuple>
#include <type_traits>

#include "files.h"
#include "gpt2.h"
#include "tokenizer.h"

// ==== names from files ===========================================================================

inline std::string join_path(const std::string& folder, const std::string& name) {
    return (fs::path(folder) / name).string();
}

inline bool path_exists(const std::string& path) {
    std::error_code error;
    return fs::exists(path, error);
}

inline bool is_folder(const std::string& path) {
    std::error_code error;
    return fs::is_directory(path, error);
}

// Whether a folder has a tokenizer: as tokenizer.json, or in the older form of two files.
inline bool holds_tokenizer(const std::string& folder) {
    auto has = [&](const char* name) { return path_exists(join_path(folder, name)); };
    return !folder.empty() && (has("tokenizer.json") || (has("vocab.json") && has("merges.txt")));
}

// JSON whose objects have each key once: of two equal keys, readers disagree on which one counts.
inline json parse_unique_json(std::string_view text, const std::string& where) {
    parse_json(text, where);  // which bounds the depth and says where the text is wrong
    std::vector<std::set<std::string>> open;
    auto visit = [&](int, json::parse_event_t event, json& parsed) {
        if (event == json::parse_event_t::object_start) open.emplace_back();
        if (event == json::parse_event_t::object_end) open.pop_back();
        if (event == json::parse_event_t::key) {
            std::string key = parsed.get<std::string>();
            if (!open.back().insert(key).second)
                fail_input("%s: \"%s\" is there twice", where.c_str(), one_line(key).c_str());
        }
        return true;
    };
    return json::parse(text.begin(), text.end(), visit);
}

// The object in a small JSON file (config.json, trainer.json).
inline json read_json_object(const std::string& path) {
    constexpr size_t kLargest = 16 << 20;
    MappedFile file(path);
    if (file.size() > kLargest)
        fail_input("%s: %zu bytes are too many for such a file", path.c_str(), file.size());
    json value = parse_unique_json(file.view(), path);
    if (!value.is_object()) fail_input("%s: holds no JSON object", path.c_str());
    return value;
}

// Text for a JSON file. What is not UTF-8 (a file name, say) is replaced rather than refused.
template <typename Json>
std::string json_text(const Json& value, int indent) {
    return value.dump(indent, ' ', false, Json::error_handler_t::replace);
}

// ==== number formats =============================================================================

// Bytes of one number; 0 for a format that is not known.
inline size_t dtype_size(std::string_view dtype) {
    constexpr std::pair<std::string_view, size_t> kSizes[] = {
        {"F64", 8},  {"F32", 4}, {"F16", 2},     {"BF16", 2},    {"I64", 8},    {"I32", 4},
        {"I16", 2},  {"I8", 1},  {"U64", 8},     {"U32", 4},     {"U16", 2},    {"U8", 1},
        {"BOOL", 1}, {"C64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}};
    for (const auto& [name, size] : kSizes)
        if (name == dtype) return size;
    return 0;
}

constexpr const char* kRealDtype = sizeof(real) == 8 ? "F64" : "F32";
constexpr const char* kRealName = sizeof(real) == 8 ? "float64" : "float32";

// IEEE 754 binary16, exactly: its exponent and fraction moved to where a float has them are the
// value times 2^-112 (the difference of the biases), subnormal or not; infinity and NaN keep an
// exponent of ones.
inline float half_to_float(uint16_t half) {
    uint32_t bits = uint32_t(half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, sizeof(value));
    value *= 0x1p112f;
    memcpy(&bits, &value, sizeof(bits));
    if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= uint32_t(half & 0x8000) << 16;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// bfloat16 is the upper half of a float.
inline float bfloat16_to_float(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// The float nearest to `value`, but with an odd last bit where that is not exact: rounding it once
// more, to a format with at least two bits fewer, then gives what rounding `value` itself would
// [Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums"].
inline float to_odd_float(float value) { return value; }
inline float to_odd_float(double value) {
    float near = float(value);
    if (double(near) == value || std::isnan(value) || std::isinf(near)) return near;
    uint32_t bits;
    memcpy(&bits, &near, sizeof(bits));
    if (std::fabs(double(near)) > std::fabs(value)) bits--;  // towards zero
    bits |= 1;
    memcpy(&near, &bits, sizeof(near));
    return near;
}

// To the nearest half, of two equally near ones to that with an even last bit; from 65520 on,
// infinity. A value below the smallest normal one is added to a float whose last bit has the worth
// of a subnormal's, so that the processor rounds.
inline uint16_t float_to_half(float value) {
    uint32_t bits, magnitude;
    memcpy(&bits, &value, sizeof(bits));
    uint32_t sign = bits >> 16 & 0x8000;
    magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);  // NaN
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        float sum = std::fabs(value) + 0.5f;
        memcpy(&bits, &sum, sizeof(bits));
        return uint16_t(sign | (bits - 0x3f000000));
    }
    uint32_t rounded = magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1);
    return uint16_t(sign | rounded >> 13);
}

// To the nearest bfloat16, of two equally near ones to that with an even last bit.
inline uint16_t float_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// out[i] = convert(number i of `data`), which may lie at any address.
template <typename From, typename To, typename Convert>
void convert_numbers(To* out, const char* data, size_t count, Convert convert) {
    for (size_t i = 0; i < count; i++) {
        From value;
        memcpy(&value, data + i * sizeof(From), sizeof(From));
        out[i] = To(convert(value));
    }
}

// ==== safetensors: reading =======================================================================

inline std::string shape_text(const std::vector<size_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); i++) text += format(i == 0 ? "%zu" : ", %zu", shape[i]);
    return text + ")";
}

// A safetensors file, memory-mapped: the header's length (8 bytes, little-endian), a JSON header
// {name: {dtype, shape, data_offsets}, "__metadata__": {text: text}}, and the numbers
// [huggingface.co/docs/safetensors, "Format"]. Opening checks everything: the tensors must fill
// the data without a gap or an overlap, each with the bytes that its shape and format need.
// Anything else throws with exit code 2 and names the tensor.
class SafetensorsFile {
  public:
    struct Entry {
        std::string dtype;
        std::vector<size_t> shape;
        size_t begin, end;  // bytes, from where the data starts

        size_t count() const { return (end - begin) / dtype_size(dtype); }
    };

    explicit SafetensorsFile(const std::string& path) : file_(path) {
        size_t length = header_length();
        data_ = file_.data() + 8 + length;
        size_t data_size = file_.size() - 8 - length;
        json header = parse_unique_json(file_.view().substr(8, length), path + ": header");
        for (const auto& [name, value] : header.items()) {
            if (name == "__metadata__") read_metadata(value);
            else entries_.emplace(name, read_entry(name, value, data_size));
        }
        check_coverage(data_size);
    }

    const std::string& path() const { return file_.path(); }
    size_t size() const { return file_.size(); }
    const std::map<std::string, Entry>& entries() const { return entries_; }
    const std::map<std::string, std::string>& metadata() const { return metadata_; }
    bool has(const std::string& name) const { return entries_.count(name) > 0; }

    const Entry& entry(const std::string& name) const {
        auto found = entries_.find(name);
        if (found == entries_.end())
            fail_input("%s: %s: no such tensor", path().c_str(), one_line(name).c_str());
        return found->second;
    }

    // Writes the tensor's entry(name).count() numbers to `out`. float and double take F64, F32, F16
    // and BF16, exactly but for F64 to float, which rounds; int takes I32, and I64 where every
    // value fits. Any other format throws with exit code 2.
    template <typename To>
    void read(const std::string& name, To* out) const {
        const Entry& tensor = entry(name);
        const char* data = data_ + tensor.begin;
        auto same = [](auto value) { return value; };
        if constexpr (std::is_floating_point_v<To>) {
            if (tensor.dtype == "F32")
                return convert_numbers<float>(out, data, tensor.count(), same);
            if (tensor.dtype == "F64")
                return convert_numbers<double>(out, data, tensor.count(), same);
            if (tensor.dtype == "F16")
                return convert_numbers<uint16_t>(out, data, tensor.count(), half_to_float);
            if (tensor.dtype == "BF16")
                return convert_numbers<uint16_t>(out, data, tensor.count(), bfloat16_to_float);
        } else {
            auto narrow = [&](int64_t value) {
                if (value < INT_MIN || value > INT_MAX)
                    fail(name, format("%lld does not fit 32 bits", static_cast<long long>(value)));
                return value;
            };
            if (tensor.dtype == "I32")
                return convert_numbers<int32_t>(out, data, tensor.count(), same);
            if (tensor.dtype == "I64")
                return convert_numbers<int64_t>(out, data, tensor.count(), narrow);
        }
        bool whole = std::is_integral_v<To>;
        fail(name, "dtype " + tensor.dtype + " where " +
                       (whole ? "I32 or I64" : "F64, F32, F16 or BF16") + " is read");
    }

  private:
    [[noreturn]] void fail(const std::string& name, const std::string& wrong) const {
        fail_input("%s: %s: %s", path().c_str(), one_line(name).c_str(), wrong.c_str());
    }

    size_t header_length() const {
        constexpr uint64_t kLongest = 100'000'000;  // the reference implementation's limit
        const char* name = path().c_str();
        if (file_.size() < 8)
            fail_input("%s: byte %zu: ends before the header; cut, or no safetensors file", name,
                       file_.size());
        uint64_t length = 0;
        for (int i = 7; i >= 0; i--) length = length << 8 | uint8_t(file_.data()[i]);
        if (length > file_.size() - 8)
            fail_input(
                "%s: byte 0: a header of %llu bytes, the file has %zu; cut, or no "
                "safetensors file",
                name, static_cast<unsigned long long>(length), file_.size());
        if (length > kLongest)
            fail_input("%s: byte 0: a header of %llu bytes; at most %llu are read", name,
                       static_cast<unsigned long long>(length),
                       static_cast<unsigned long long>(kLongest));
        if (length == 0 || file_.data()[8] != '{')
            fail_input("%s: byte 8: no JSON object; no safetensors file", name);
        return size_t(length);
    }

    void read_metadata(const json& value) {
        if (!value.is_object()) fail("__metadata__", "not an object of texts");
        for (const auto& [key, text] : value.items()) {
            if (!text.is_string()) fail("__metadata__", "not an object of texts");
            metadata_[key] = text.get<std::string>();
        }
    }

    Entry read_entry(const std::string& name, const json& value, size_t data_size) const {
        bool complete = value.is_object() && value.size() == 3 && value.contains("dtype") &&
                        value.contains("shape") && value.contains("data_offsets");
        if (!complete) fail(name, "not described by dtype, shape and data_offsets");
        const json &dtype = value["dtype"], &shape = value["shape"];
        const json& offsets = value["data_offsets"];
        Entry entry;
        if (dtype.is_string()) entry.dtype = dtype.get<std::string>();
        size_t bytes = dtype_size(entry.dtype);
        if (bytes == 0) fail(name, "dtype " + one_line(dtype.dump()) + " is not known");
        if (!shape.is_array()) fail(name, "its shape is not an array");
        for (const json& length : shape) {
            if (!length.is_number_unsigned())
                fail(name, one_line(length.dump()) + " in its shape is not a length");
            entry.shape.push_back(length.get<size_t>());
            if (__builtin_mul_overflow(bytes, entry.shape.back(), &bytes))
                fail(name, "its shape overflows 64 bits");
        }
        bool pair = offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() &&
                    offsets[1].is_number_unsigned();
        if (!pair) fail(name, "its data_offsets are not two positions");
        entry.begin = offsets[0].get<size_t>(), entry.end = offsets[1].get<size_t>();
        if (entry.begin > entry.end || entry.end > data_size)
            fail(name, format("at bytes %zu to %zu of the data, which has %zu; cut or damaged",
                              entry.begin, entry.end, data_size));
        if (entry.end - entry.begin != bytes)
            fail(name,
                 format("%zu bytes, its shape and dtype need %zu", entry.end - entry.begin, bytes));
        return entry;
    }

    // The tensors, in the order of their bytes, follow one another from the first to the last.
    void check_coverage(size_t data_size) const {
        std::set<std::tuple<size_t, size_t, std::string>> order;
        for (const auto& [name, entry] : entries_) order.emplace(entry.begin, entry.end, name);
        size_t covered = 0;
        for (const auto& [begin, end, name] : order) {
            if (begin != covered)
                fail(name, format("at byte %zu of the data, where %zu is due; tensors may neither "
                                  "overlap nor leave gaps",
                                  begin, covered));
            covered = end;
        }
        if (covered != data_size)
            fail_input("%s: %zu bytes after the last tensor", path().c_str(), data_size - covered);
    }

    MappedFile file_;
    const char* data_ = nullptr;
    std::map<std::string, Entry> entries_;
    std::map<std::string, std::string> metadata_;
};

// ==== safetensors: writing =======================================================================

// Writes a safetensors file. Tensors are announced with add(), and commit() writes the header and
// then asks each source for its numbers in turn, so that no more than one tensor is in memory
// twice. As in the reference implementation, the data starts at a multiple of 8 bytes (spaces
// after the header) and wider formats come first, which aligns every tensor.
class SafetensorsWriter {
  public:
    using Source = std::function<const void*()>;  // the numbers; valid until the next source's call

    explicit SafetensorsWriter(const std::string& path,
                               const std::map<std::string, std::string>& metadata = {})
        : path_(path), metadata_(metadata) {}

    void add(const std::string& name, const std::string& dtype, const std::vector<size_t>& shape,
             Source source) {
        size_t bytes = std::accumulate(shape.begin(), shape.end(), dtype_size(dtype),
                                       std::multiplies<size_t>());
        tensors_.push_back({name, dtype, shape, bytes, std::move(source)});
    }
    void add(const std::string& name, const std::string& dtype, const std::vector<size_t>& shape,
             const void* data) {
        add(name, dtype, shape, [data] { return data; });
    }

    // The file appears whole or not at all; its digest is of what was meant, for reading back.
    // Throws with exit code 1 when the disk refuses.
    FileDigest commit() {
        std::stable_sort(tensors_.begin(), tensors_.end(), [](const Tensor& a, const Tensor& b) {
            return dtype_size(a.dtype) > dtype_size(b.dtype);
        });
        std::string header = header_text();
        std::string length(8, '\0');
        for (int i = 0; i < 8; i++) length[size_t(i)] = char(uint64_t(header.size()) >> 8 * i);

        AtomicFile file(path_);
        StreamingHash hash;
        auto write = [&](const void* data, size_t size) {
            constexpr size_t kPart = 1 << 18;  // stays in a core's cache from one use to the other
            const char* bytes = static_cast<const char*>(data);
            for (size_t at = 0; at < size; at += kPart) {
                size_t part = std::min(kPart, size - at);
                hash.add(bytes + at, part);
                file.write(bytes + at, part);
            }
        };
        write(length.data(), length.size());
        write(header.data(), header.size());
        for (const Tensor& tensor : tensors_)
            if (tensor.bytes > 0) write(tensor.source(), tensor.bytes);
        file.commit();
        return hash.digest();
    }

  private:
    struct Tensor {
        std::string name, dtype;
        std::vector<size_t> shape;
        size_t bytes;
        Source source;
    };

    std::string header_text() const {
        ordered_json header = ordered_json::object();
        if (!metadata_.empty()) header["__metadata__"] = metadata_;
        size_t begin = 0;
        for (const Tensor& tensor : tensors_) {
            header[tensor.name] = {{"dtype", tensor.dtype},
                                   {"shape", tensor.shape},
                                   {"data_offsets", {begin, begin + tensor.bytes}}};
            begin += tensor.bytes;
        }
        std::string text = json_text(header, -1);
        text.resize((text.size() + 7) / 8 * 8, ' ');
        return text;
    }

    std::string path_;
    std::map<std::string, std::string> metadata_;
    std::vector<Tensor> tensors_;
};

// ==== config.json ================================================================================

// The keys of one config.json, with their types checked: a wrong one throws with exit code 2,
// naming file, key and value. Of several names for one thing, the first that is there counts.
class ConfigReader {
  public:
    using Names = std::initializer_list<const char*>;

    explicit ConfigReader(const std::string& path) : path_(path), object_(read_json_object(path)) {}

    const json* find(Names names) {
        for (const char* name : names) {
            auto found = object_.find(name);
            name_ = name;
            if (found != object_.end()) return &*found;
        }
        return nullptr;
    }
    // A whole number of at least 1; `otherwise` where there is none.
    int integer(Names names, int otherwise, bool nullable = false) {
        const json* value = find(names);
        if (value == nullptr || (nullable && value->is_null())) return otherwise;
        if (!value->is_number_unsigned()) fail(*value, "is not a positive whole number");
        uint64_t number = value->get<uint64_t>();
        if (number < 1 || number > INT_MAX) fail(*value, "is not from 1 to 2147483647");
        return int(number);
    }
    double number(Names names, double otherwise) {
        const json* value = find(names);
        if (value == nullptr) return otherwise;
        if (!value->is_number()) fail(*value, "is not a number");
        return value->get<double>();
    }
    bool flag(Names names, bool otherwise) {
        const json* value = find(names);
        if (value == nullptr) return otherwise;
        if (!value->is_boolean()) fail(*value, "is neither true nor false");
        return value->get<bool>();
    }
    void require_flag(const char* name, bool required) {
        if (flag({name}, required) != required)
            fail(object_[name], "is a variant of GPT-2 that this program does not compute");
    }
    [[noreturn]] void fail(const json& value, const char* wrong) const {
        fail_input("%s: %s: %s %s", path_.c_str(), name_, one_line(json_text(value, -1)).c_str(),
                   wrong);
    }

  private:
    std::string path_;
    json object_;
    const char* name_ = "";
};

// Reads a model's configuration from config.json, or from the folder that holds one. Keys that are
// missing have the value that transformers' GPT2Config gives them. A key of our own, "bias", says
// that the additive terms are all zero and stay so; transformers passes it over. Throws with exit
// code 2 for what is no GPT-2, or a variant that is not computed here.
inline GPT2Config read_config(const std::string& path) {
    std::string file = is_folder(path) ? join_path(path, "config.json") : path;
    ConfigReader reader(file);
    const json* type = reader.find({"model_type"});
    if (type == nullptr) fail_input("%s: no model_type; this program reads gpt2", file.c_str());
    if (*type != "gpt2")
        fail_input("%s: model_type %s: this program reads gpt2", file.c_str(),
                   one_line(json_text(*type, -1)).c_str());
    const json* activation = reader.find({"activation_function"});
    if (activation != nullptr && *activation != "gelu_new" && *activation != "gelu_pytorch_tanh")
        reader.fail(*activation,
                    "is not the tanh GELU of GPT-2, \"gelu_new\" or \"gelu_pytorch_tanh\"");
    reader.require_flag("scale_attn_weights", true);
    reader.require_flag("scale_attn_by_inverse_layer_idx", false);
    reader.require_flag("add_cross_attention", false);

    GPT2Config config;
    config.vocab_size = reader.integer({"vocab_size"}, 50257);
    config.context = reader.integer({"n_positions", "max_position_embeddings", "n_ctx"}, 1024);
    config.layers = reader.integer({"n_layer", "num_hidden_layers"}, 12);
    config.heads = reader.integer({"n_head", "num_attention_heads"}, 12);
    config.channels = reader.integer({"n_embd", "hidden_size"}, 768);
    int hidden = reader.integer({"n_inner"}, 0, true);
    config.hidden = hidden == 4LL * config.channels ? 0 : hidden;
    // Theirs may differ by place, ours is one: that of the two projections, half of the places.
    config.dropout = reader.number({"resid_pdrop"}, 0.1);
    config.tied = reader.flag({"tie_word_embeddings"}, true);
    config.bias = reader.flag({"bias"}, true);
    config.layer_norm_epsilon = reader.number({"layer_norm_epsilon"}, 1e-5);
    try {
        validate(config);
    } catch (const Error& error) { fail_input("%s: %s", file.c_str(), error.what()); }
    return config;
}

// Writes FOLDER/config.json. end_of_text, below 0 where there is none, becomes bos and eos; `dtype`
// is what PyTorch calls the format of the weights.
inline void write_config(const GPT2Config& config, int end_of_text, const std::string& folder,
                         const char* dtype = kRealName) {
    ordered_json id = end_of_text < 0 ? ordered_json(nullptr) : ordered_json(end_of_text);
    ordered_json root;
    root["architectures"] = {"GPT2LMHeadModel"};
    root["model_type"] = "gpt2";
    root["vocab_size"] = config.vocab_size;
    root["n_positions"] = config.context;
    root["n_ctx"] = config.context;
    root["n_embd"] = config.channels;
    root["n_layer"] = config.layers;
    root["n_head"] = config.heads;
    root["n_inner"] = config.hidden_size() == 4 * config.channels
                          ? ordered_json(nullptr)
                          : ordered_json(config.hidden_size());
    root["activation_function"] = "gelu_new";
    for (const char* name : {"resid_pdrop", "embd_pdrop", "attn_pdrop"})
        root[name] = config.dropout;
    root["layer_norm_epsilon"] = config.layer_norm_epsilon;
    root["initializer_range"] = 0.02;
    root["tie_word_embeddings"] = config.tied;
    root["bias"] = config.bias;
    root["bos_token_id"] = id;
    root["eos_token_id"] = id;
    root["torch_dtype"] = dtype;
    root["use_cache"] = true;
    write_file_atomic(join_path(folder, "config.json"), json_text(root, 2) + "\n");
}

// ==== model folders: writing =====================================================================

// Their shape of one row of the tensor table.
inline std::vector<size_t> hf_shape(const ParameterRow& row) {
    if (row.cols == 0) return {row.file_rows};
    if (row.transposed) return {row.cols, row.file_rows};
    return {row.file_rows, row.cols};
}

// out (cols,rows) = inp (rows,cols) transposed. By panels that stay in the cache and leave in whole
// runs, since a column of a weight falls on few lines of a cache; and within these by blocks.
inline void transpose(real* out, const real* inp, size_t rows, size_t cols) {
    constexpr size_t kRows = 256, kCols = 64, kBlock = 8;
#pragma omp parallel for collapse(2) schedule(static)
    for (size_t r0 = 0; r0 < rows; r0 += kRows)
        for (size_t c0 = 0; c0 < cols; c0 += kCols) {
            real panel[kCols][kRows];
            size_t height = std::min(kRows, rows - r0), width = std::min(kCols, cols - c0);
            const real* from = inp + r0 * cols + c0;
            for (size_t r = 0; r < height; r += kBlock)
                for (size_t c = 0; c < width; c += kBlock)
                    for (size_t i = r; i < std::min(r + kBlock, height); i++)
                        for (size_t j = c; j < std::min(c + kBlock, width); j++)
                            panel[j][i] = from[i * cols + j];
            for (size_t c = 0; c < width; c++)
                std::copy(panel[c], panel[c] + height, out + (c0 + c) * rows + r0);
        }
}

inline bool all_finite(const real* values, size_t count) {
    bool finite = true;
    for (size_t i = 0; i < count; i++)
        finite &= std::fabs(values[i]) <= std::numeric_limits<real>::max();
    return finite;
}

// Where the numbers of a model are read from, the model itself or a copy of it: writes one row of
// the tensor table, of one layer, to `host` as gpt2_copy_out does.
using TensorReader = std::function<void(Group group, int row, int layer, real* host)>;

inline TensorReader tensors_of(const GPT2* model) {
    return [model](Group group, int row, int layer, real* host) {
        gpt2_copy_out(model, group, row, layer, host);
    };
}

// The same where they lie, in host memory: the numbers of one row, valid until the next call.
using TensorView = std::function<const real*(Group group, int row, int layer)>;

inline TensorView view_of(const GPT2Config& config, const TensorReader& tensors) {
    auto host = std::make_shared<std::vector<real>>();
    return [=, table = parameter_table(config)](Group group, int row, int layer) {
        host->resize(std::max(host->size(), table[size_t(row)].file_size()));
        tensors(group, row, layer, host->data());
        return host->data();
    };
}

inline TensorView view_of(const GPT2* model) {
    return view_of(gpt2_config(model), tensors_of(model));
}

// One row of the tensor table, of one layer, as a Hugging Face file holds it: where it lies or, if
// it lies there the other way round, in `scratch`, which is made large enough.
inline const real* hf_tensor(std::vector<real>& scratch, const GPT2Config& config,
                             const TensorView& tensors, Group group, int index, int layer) {
    const ParameterRow row = parameter_table(config)[size_t(index)];
    const real* numbers = tensors(group, index, layer);
    if (!row.transposed) return numbers;
    scratch.resize(std::max(scratch.size(), row.file_size()));
    transpose(scratch.data(), numbers, row.file_rows, row.cols);
    return scratch.data();
}

// The same into memory of one's own. `out` is resized.
inline void read_hf_tensor(std::vector<real>& out, const GPT2Config& config,
                           const TensorReader& tensors, Group group, int index, int layer) {
    std::vector<real> scratch;
    TensorView view = view_of(config, tensors);  // holds the numbers
    const real* numbers = hf_tensor(scratch, config, view, group, index, layer);
    out.assign(numbers, numbers + parameter_table(config)[size_t(index)].file_size());
}

// Announces every tensor of one group as PREFIX + its name in transformers' state dict. They are
// read when the writer commits; parameters that are not finite stop it then.
inline void add_tensors(SafetensorsWriter& writer, const GPT2Config& config,
                        const TensorView& tensors, Group group, const std::string& prefix) {
    ParameterTable table = parameter_table(config);
    auto scratch = std::make_shared<std::vector<real>>();
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        if (!row.present) continue;
        for (int layer = 0; layer < int(row.count); layer++) {
            std::string name = hf_name(row, layer);
            auto source = [=, count = row.file_size()]() -> const void* {
                const real* numbers = hf_tensor(*scratch, config, tensors, group, index, layer);
                if (group == Group::parameters && !all_finite(numbers, count))
                    fail_machine("%s: holds numbers that are not finite; not saved", name.c_str());
                return numbers;
            };
            writer.add(prefix + name, kRealDtype, hf_shape(row), source);
        }
    }
}

// Writes FOLDER/model.safetensors. A model without biases gets zeros for them, because
// transformers has no GPT-2 without; a tied head is not written, because transformers ties it.
inline FileDigest write_model_file(const GPT2Config& config, const TensorView& tensors,
                                   const std::string& folder) {
    SafetensorsWriter writer(join_path(folder, "model.safetensors"), {{"format", "pt"}});
    add_tensors(writer, config, tensors, Group::parameters, "");
    std::vector<real> zeros;
    for (const ParameterRow& row : parameter_table(config)) {
        if (row.present || row.cols > 0) continue;
        zeros.resize(std::max(zeros.size(), row.file_rows));
        for (int layer = 0; layer < int(row.count); layer++)
            writer.add(hf_name(row, layer), kRealDtype, hf_shape(row),
                       [&zeros] { return static_cast<const void*>(zeros.data()); });
    }
    return writer.commit();
}

// Writes a model folder: config.json, model.safetensors and, when a tokenizer is given, its files.
// `tokenizer` may be null. Throws with exit code 1 when the disk refuses.
inline void save_model(const GPT2* model, const Tokenizer* tokenizer, const std::string& folder) {
    const GPT2Config& config = gpt2_config(model);
    make_folder(folder);
    if (tokenizer != nullptr) tokenizer->save(folder, config.context);
    write_model_file(config, view_of(model), folder);
    write_config(config, tokenizer != nullptr ? tokenizer->end_of_text() : -1, folder);
}

// ==== model folders: reading =====================================================================

// A name from a file that may be opened in the file's own folder: no path, nothing hidden.
inline bool is_plain_name(const std::string& name) {
    bool printable = std::all_of(name.begin(), name.end(),
                                 [](char c) { return static_cast<unsigned char>(c) >= 0x20; });
    return !name.empty() && name[0] != '.' && name.find_first_of("/\\") == std::string::npos &&
           printable;
}

// What model.safetensors.index.json says: the file of each tensor, and the bytes of all of them.
struct ShardIndex {
    std::map<std::string, std::string> file_of;  // by the tensor's name
    std::optional<double> total_size;
};

// Reads an index. Throws with exit code 2 where it is no index, or names anything but a safetensors
// file beside it.
inline ShardIndex read_shard_index(const std::string& path) {
    json root = read_json_object(path);
    json map = root.value("weight_map", json());
    if (!map.is_object() || map.empty())
        fail_input("%s: weight_map: no object that says where tensors are", path.c_str());
    ShardIndex index;
    for (const auto& [tensor, file] : map.items()) {
        std::string name = file.is_string() ? file.get<std::string>() : "";
        if (!is_plain_name(name) || !name.ends_with(".safetensors"))
            fail_input("%s: weight_map: %s: %s is no safetensors file of this folder", path.c_str(),
                       one_line(tensor).c_str(), one_line(json_text(file, -1)).c_str());
        index.file_of[tensor] = name;
    }
    json metadata = root.value("metadata", json());
    if (metadata.is_object() && metadata.contains("total_size")) {
        if (!metadata["total_size"].is_number())
            fail_input("%s: metadata: total_size %s is not a number", path.c_str(),
                       one_line(json_text(metadata["total_size"], -1)).c_str());
        index.total_size = metadata["total_size"].get<double>();
    }
    return index;
}

// The tensors of a model folder, whichever files they are in: model.safetensors or, where there is
// none, what model.safetensors.index.json lists. Files are mapped, not read. Opening throws with
// exit code 2 unless every shard holds exactly the tensors that the index says are in it.
class ModelFiles {
  public:
    explicit ModelFiles(const std::string& folder) : path_(join_path(folder, "model.safetensors")) {
        std::string index = path_ + ".index.json";
        if (path_exists(path_) || !path_exists(index)) {
            fail_for_pytorch(folder);
            SafetensorsFile& file = files_.emplace_back(path_);
            for (const auto& [name, entry] : file.entries()) place_[name] = 0;
        } else {
            path_ = index;
            open_shards(folder);
        }
    }

    const std::string& path() const { return path_; }  // of the one file, or of the index
    const std::vector<SafetensorsFile>& files() const { return files_; }
    bool has(const std::string& name) const { return place_.count(name) > 0; }

    // The file that holds a tensor which is there.
    const SafetensorsFile& file_of(const std::string& name) const {
        return files_.at(place_.at(name));
    }
    const std::string& dtype_of(const std::string& name) const {
        return file_of(name).entry(name).dtype;
    }
    std::vector<std::string> names() const {
        std::vector<std::string> names;
        for (const auto& [name, place] : place_) names.push_back(name);
        return names;
    }

  private:
    void fail_for_pytorch(const std::string& folder) const {
        if (path_exists(path_)) return;
        for (const char* name : {"pytorch_model.bin", "pytorch_model.bin.index.json"})
            if (path_exists(join_path(folder, name)))
                fail_input(
                    "%s: this program reads model.safetensors; write it in Python with "
                    "save_pretrained(FOLDER, safe_serialization=True)",
                    join_path(folder, name).c_str());
    }

    void open_shards(const std::string& folder) {
        ShardIndex index = read_shard_index(path_);
        std::map<std::string, size_t> opened;
        for (const auto& [tensor, name] : index.file_of) opened.emplace(name, 0);
        constexpr size_t kMostShards = 10000;  // each takes a mapping, of which there are 65,530
        if (opened.size() > kMostShards)
            fail_input("%s: names %zu files; at most %zu are read", path_.c_str(), opened.size(),
                       kMostShards);
        size_t bytes = 0;
        for (auto& [name, place] : opened) {
            place = files_.size();
            const SafetensorsFile& file = files_.emplace_back(join_path(folder, name));
            for (const auto& [tensor, entry] : file.entries()) {
                auto listed = index.file_of.find(tensor);
                if (listed == index.file_of.end() || listed->second != name)
                    fail_input("%s: %s: the index says that it is %s", file.path().c_str(),
                               one_line(tensor).c_str(),
                               listed == index.file_of.end()
                                   ? "not there"
                                   : ("in " + one_line(listed->second)).c_str());
                place_[tensor] = place;
                bytes += entry.end - entry.begin;
            }
        }
        for (const auto& [tensor, name] : index.file_of)
            if (place_.count(tensor) == 0)
                fail_input("%s: %s: missing; the index says that it is here",
                           join_path(folder, name).c_str(), one_line(tensor).c_str());
        if (index.total_size && *index.total_size != double(bytes))
            fail_input("%s: metadata: total_size %.17g, the tensors have %zu bytes", path_.c_str(),
                       *index.total_size, bytes);
    }

    std::string path_;
    std::vector<SafetensorsFile> files_;
    std::map<std::string, size_t> place_;  // by the tensor's name: which of the files
};

struct PlacedTensor {
    std::string name;  // in the file
    int row, layer;
};

inline void check_shape(const SafetensorsFile& file, const std::string& name,
                        const ParameterRow& row) {
    const std::vector<size_t>& shape = file.entry(name).shape;
    if (shape != hf_shape(row))
        fail_input("%s: %s: shape %s, the configuration says %s", file.path().c_str(), name.c_str(),
                   shape_text(shape).c_str(), shape_text(hf_shape(row)).c_str());
}

// Finds each tensor of the table in the file, with or without the prefix `transformer.`, and checks
// its shape. Rows that the configuration has not (a tied head, biases) are placed where the file
// has them, for the reader to look into. The causal masks that old files hold are passed over.
// Throws with exit code 2 on a tensor that is missing, unknown, or of another shape.
inline std::vector<PlacedTensor> place_tensors(const ModelFiles& files, const GPT2Config& config) {
    const std::string prefix = "transformer.";
    auto without_prefix = [&](const std::string& name) {
        return name.compare(0, prefix.size(), prefix) == 0 ? name.substr(prefix.size()) : name;
    };
    std::vector<PlacedTensor> placed;
    std::set<std::string> known;
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        for (int layer = 0; layer < int(row.count); layer++) {
            std::string full = hf_name(row, layer), bare = without_prefix(full);
            std::string name = files.has(full) ? full : bare;
            if (!files.has(name)) {
                if (!row.present) continue;
                fail_input("%s: %s: missing; the configuration asks for shape %s",
                           files.path().c_str(), full.c_str(), shape_text(hf_shape(row)).c_str());
            }
            check_shape(files.file_of(name), name, row);
            placed.push_back({name, index, layer});
            known.insert(name);
        }
    }
    for (int layer = 0; layer < config.layers; layer++)
        for (const char* mask : {".attn.bias", ".attn.masked_bias"}) {
            std::string bare = "h." + std::to_string(layer) + mask;
            known.insert(bare);
            known.insert(prefix + bare);
        }
    for (const std::string& name : files.names())
        if (known.count(name) == 0)
            fail_input("%s: %s: a GPT-2 of %d layers has no such tensor, or has it already",
                       files.file_of(name).path().c_str(), one_line(name).c_str(), config.layers);
    return placed;
}

// A tensor that the model has no memory for must say nothing new: a tied head equals the token
// embedding, the biases of a model without are zero.
inline void check_redundant(const ModelFiles& files, const PlacedTensor& tensor,
                            const std::string& embedding, const std::vector<real>& values) {
    const std::string& path = files.file_of(tensor.name).path();
    if (tensor.row == k_headw) {
        std::vector<real> wte(values.size());
        files.file_of(embedding).read(embedding, wte.data());
        if (values != wte)
            fail_input(
                "%s: %s: differs from %s, but the head is tied; set "
                "\"tie_word_embeddings\": false in config.json",
                path.c_str(), tensor.name.c_str(), embedding.c_str());
    } else if (std::any_of(values.begin(), values.end(), [](real value) { return value != 0; })) {
        fail_input("%s: %s: not zero, but config.json says \"bias\": false", path.c_str(),
                   tensor.name.c_str());
    }
}

// Reads one tensor as the file holds it; numbers that are not finite throw with exit code 2.
inline void read_finite(const SafetensorsFile& file, const std::string& name,
                        std::vector<real>& values) {
    values.resize(file.entry(name).count());
    file.read(name, values.data());
    if (!all_finite(values.data(), values.size()))
        fail_input("%s: %s: holds numbers that are not finite", file.path().c_str(), name.c_str());
}

// Moments go on with the same numbers, or not at all.
inline void require_own_dtype(const SafetensorsFile& file, const std::string& name) {
    const std::string& dtype = file.entry(name).dtype;
    if (dtype != kRealDtype)
        fail_input(
            "%s: %s: is %s, this program keeps it in %s; it would not go on with the same numbers",
            file.path().c_str(), one_line(name).c_str(), dtype.c_str(), kRealDtype);
}

// Copies what a file holds of one row and layer into the model. `scratch` is of no meaning after.
inline void write_hf_tensor(GPT2* model, Group group, int index, int layer,
                            const std::vector<real>& values, std::vector<real>& scratch) {
    const ParameterRow row = parameter_table(gpt2_config(model))[size_t(index)];
    const real* host = values.data();
    if (row.transposed) {
        scratch.resize(values.size());
        transpose(scratch.data(), host, row.cols, row.file_rows);
        host = scratch.data();
    }
    gpt2_copy_in(model, group, index, layer, host);
}

// A model folder's configuration, after a look at its tensors: every one is there and has its
// shape, so that memory for the model may be taken on the configuration's word.
inline GPT2Config read_model_config(const std::string& folder) {
    GPT2Config config = read_config(folder);
    place_tensors(ModelFiles(folder), config);
    return config;
}

// Fills the model's parameters from a model folder (F64, F32, F16 or BF16). The model
// must be of the folder's configuration, but for dropout. Throws with exit code 2 for a file that
// does not fit; the parameters are then partly those of the file when a tensor in it holds numbers
// that it may not, and untouched otherwise.
inline void load_model(GPT2* model, const std::string& folder) {
    const GPT2Config& config = gpt2_config(model);
    ModelFiles files(folder);
    std::vector<PlacedTensor> placed = place_tensors(files, config);
    GPT2Config stored = read_config(folder);  // shapes do not show these two
    if (stored.heads != config.heads || stored.layer_norm_epsilon != config.layer_norm_epsilon)
        fail_input("%s: %d heads and layer_norm_epsilon %g, the model has %d and %g",
                   join_path(folder, "config.json").c_str(), stored.heads,
                   stored.layer_norm_epsilon, config.heads, config.layer_norm_epsilon);
    ParameterTable table = parameter_table(config);
    std::vector<real> values, scratch;
    for (const PlacedTensor& tensor : placed) {
        read_finite(files.file_of(tensor.name), tensor.name, values);
        if (table[size_t(tensor.row)].present)
            write_hf_tensor(model, Group::parameters, tensor.row, tensor.layer, values, scratch);
        else check_redundant(files, tensor, placed[0].name, values);  // row 0 is wte
    }
}

// For people: that the weights of a folder are kept in another format than the program's own, which
// load_model converts; "" where they are not. The folder is one that load_model has read.
inline std::string conversion_note(const std::string& folder) {
    ModelFiles files(folder);
    std::set<std::string> dtypes;
    for (const PlacedTensor& tensor : place_tensors(files, read_config(folder)))
        if (files.dtype_of(tensor.name) != kRealDtype) dtypes.insert(files.dtype_of(tensor.name));
    if (dtypes.empty()) return "";
    std::string text;
    for (const std::string& dtype : dtypes) text += (text.empty() ? "" : " and ") + dtype;
    return format("weights are %s in %s: converted to %s", text.c_str(), files.path().c_str(),
                  kRealName);
}

// ==== checkpoints: names =========================================================================

inline std::string step_name(uint64_t step) {
    return format("step_%08llu", static_cast<unsigned long long>(step));
}

// The step that a checkpoint folder's name says; none for any other name.
inline std::optional<uint64_t> step_of(const std::string& name) {
    if (name.compare(0, 5, "step_") != 0) return {};
    uint64_t step = strtoull(name.c_str() + 5, nullptr, 10);
    if (step_name(step) != name) return {};
    return step;
}

struct StepFolder {
    uint64_t step;
    std::string name;
};

// The folders OUT/step_N + suffix that are there, newest first; links are not followed.
inline std::vector<StepFolder> list_steps(const std::string& out, const std::string& suffix) {
    std::vector<StepFolder> steps;
    std::error_code error;
    for (fs::directory_iterator at(out, error), end; !error && at != end; at.increment(error)) {
        std::string name = at->path().filename().string();
        std::error_code unknown;
        if (at->symlink_status(unknown).type() != fs::file_type::directory) continue;
        if (name.size() <= suffix.size() ||
            name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0)
            continue;
        std::optional<uint64_t> step = step_of(name.substr(0, name.size() - suffix.size()));
        if (step) steps.push_back({*step, name});
    }
    std::sort(steps.begin(), steps.end(),
              [](const StepFolder& a, const StepFolder& b) { return a.step > b.step; });
    return steps;
}

// The name of the step folder that OUT/last or OUT/best points to; "" when it points elsewhere.
// With `strict`, a link that cannot be read is not taken for one that is not there: exit code 1.
inline std::string linked_step(const std::string& out, const std::string& link,
                               bool strict = false) {
    std::error_code error;
    std::string target = fs::read_symlink(join_path(out, link), error).string();
    bool absent = error == std::errc::no_such_file_or_directory ||
                  error == std::errc::not_a_directory || error == std::errc::invalid_argument;
    if (strict && error && !absent)
        fail_machine("%s: cannot read: %s", join_path(out, link).c_str(), error.message().c_str());
    return !error && step_of(target) ? target : "";
}

// ==== checkpoints: verifying =====================================================================

inline std::string hash_text(uint64_t hash) {
    return format("%016llx", static_cast<unsigned long long>(hash));
}

// Reads `size` bytes of a file from `offset` on, or as many as it has; returns their number, or
// -errno.
inline ssize_t read_part(int fd, char* memory, size_t size, size_t offset) {
    size_t done = 0;
    for (bool plain = false; done < size;) {
        ssize_t got = pread(fd, memory + done, size - done, off_t(offset + done));
        if (got == 0) break;
        if (got > 0) {
            done += size_t(got);
        } else if (errno == EINVAL && !plain) {
            go_direct(fd, false);  // it was no block, or there is no such way
            plain = true;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return ssize_t(done);
}

// Size and hash of a file as the disk has it: the kernel is first asked to drop its copy, and a
// large file is read past it, several parts at a time, so that neither the disk waits for the hash
// nor the hash for the disk. Read in parts, so that verifying a large model takes no memory.
inline FileDigest digest_file(const std::string& path) {
    constexpr size_t kPart = 1 << 20, kParts = 4;
    int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) fail_errno(path, "open");
    std::unique_ptr<int, void (*)(int*)> closer(&fd, [](int* open_fd) { close(*open_fd); });
    struct stat info;  // a pipe or a device may have no end
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
        fail_input("%s: not a regular file", path.c_str());
#ifdef POSIX_FADV_DONTNEED
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
    size_t file_size = size_t(info.st_size), part = kPart;
    if (file_size < kPart) part = (file_size / 4096 + 1) * 4096;  // small files are many
    size_t parts = file_size < kParts * kPart ? 1 : kParts, offset = 0;
    if (parts > 1) go_direct(fd, true);

    auto memory = aligned_memory(parts * part);
    std::array<std::future<ssize_t>, kParts> reads;  // each waited for before memory and fd go
    auto begin = [&](size_t i) {
        auto policy =
            parts > 1 ? std::launch::async | std::launch::deferred : std::launch::deferred;
        reads[i] = std::async(policy, read_part, fd, memory.get() + i * part, part, offset);
        offset += part;
    };
    StreamingHash hash;
    for (size_t i = 0; i < parts; i++) begin(i);
    for (size_t i = 0;; i = (i + 1) % parts) {
        ssize_t size = reads[i].get();
        if (size < 0) {
            errno = int(-size);
            fail_errno(path, "read");
        }
        hash.add(memory.get() + i * part, size_t(size));
        if (size_t(size) < part) return hash.digest();
        begin(i);
    }
}

// The hash of trainer.json's content but for the hash itself.
inline std::string json_checksum(json root) {
    root.erase("checksum");
    std::string text = json_text(root, -1);
    return hash_text(hash_bytes(text.data(), text.size()));
}

// The file of the moments that one rank of `world` saves; of one rank it has them all.
inline std::string moments_file(int rank = 0, int world = 1) {
    if (world == 1) return "optimizer.safetensors";
    return format("optimizer-%05d-of-%05d.safetensors", rank + 1, world);
}

// Of the files that a trainer.json lists, those of the moments: one, or the parts of several ranks,
// of which all must be there. `path` is for messages, with exit code 2.
inline std::vector<std::string> moments_files(const json& files, const std::string& path) {
    std::vector<std::string> names;
    for (const auto& [name, recorded] : files.items())
        if (name.starts_with("optimizer")) names.push_back(name);
    for (size_t rank = 0; rank < names.size(); rank++)
        if (names[rank] != moments_file(int(rank), int(names.size()))) names.clear();
    if (names.empty())
        fail_input("%s: files: %s is not listed, nor are all parts of it", path.c_str(),
                   moments_file().c_str());
    return names;
}

// Holds every file of a checkpoint against the size and hash that its trainer.json recorded, and
// returns trainer.json. Throws with exit code 2, naming the file that differs. Of files in `read`,
// whose content was verified before, only the size.
inline json verify_checkpoint(const std::string& folder, const std::set<std::string>& read = {}) {
    std::string path = join_path(folder, "trainer.json");
    json root = read_json_object(path);
    if (!root.contains("checksum") || root["checksum"] != json_checksum(root))
        fail_input("%s: its content does not match its checksum; the file is damaged",
                   path.c_str());
    json files = root.value("files", json());
    for (const char* name : {"config.json", "model.safetensors"})
        if (!files.is_object() || !files.contains(name))
            fail_input("%s: files: %s is not listed", path.c_str(), name);
    moments_files(files, path);
    for (const auto& [name, recorded] : files.items()) {
        if (!is_plain_name(name) || !recorded.is_object() || !recorded.contains("bytes") ||
            !recorded.contains("xxh3"))
            fail_input("%s: files: \"%s\" is no file with bytes and xxh3", path.c_str(),
                       one_line(name).c_str());
        std::string file = join_path(folder, name);
        bool known = read.count(name) > 0;
        FileDigest digest = known ? FileDigest{MappedFile(file).size(), 0} : digest_file(file);
        if (recorded["bytes"] != digest.bytes)
            fail_input("%s: %zu bytes, trainer.json recorded %s; the checkpoint is damaged",
                       file.c_str(), digest.bytes, one_line(recorded["bytes"].dump()).c_str());
        if (!known && recorded["xxh3"] != hash_text(digest.hash))
            fail_input(
                "%s: its content does not match the hash in trainer.json; the checkpoint is "
                "damaged",
                file.c_str());
    }
    return root;
}

// ==== checkpoints: saving ========================================================================

// A folder with all that it holds, also what another rank puts there meanwhile. A link is removed,
// not followed.
inline std::error_code try_to_remove(const std::string& path) {
    std::error_code error;
    for (int tries = 0; tries < 10; tries++) {
        fs::remove_all(path, error);
        if (error != std::errc::directory_not_empty) break;
    }
    return error;
}

inline void remove_folder(const std::string& path) {
    std::error_code error = try_to_remove(path);
    if (error) fail_machine("%s: cannot remove: %s", path.c_str(), error.message().c_str());
}

inline void rename_path(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()) != 0)
        fail_machine("%s: cannot rename to %s: %s", from.c_str(), to.c_str(), strerror(errno));
}

// Swaps two names in one step; false where the file system cannot.
inline bool exchange_paths(const std::string& a, const std::string& b) {
#ifdef RENAME_EXCHANGE
    return renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0;
#else
    return a.empty() && b.empty();
#endif
}

// A new, empty folder that is removed with all it holds unless it was renamed.
class TemporaryFolder {
  public:
    explicit TemporaryFolder(const std::string& path)
        : path_(path), leftover_(std::in_place, path) {
        remove_folder(path);
        make_folder(path);
    }
    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;
    ~TemporaryFolder() {
        if (!path_.empty()) try_to_remove(path_);
    }
    const std::string& path() const { return path_; }

    // Puts the folder in the place of `target`. One that is there already changes places with it,
    // so that there is a whole one of that name at any moment; where the file system has no such
    // exchange, it is kept as `target`.old between two renames. What was replaced stays, under
    // another name, for the caller to remove when the renames are durable.
    void rename_to(const std::string& target) {
        if (!path_exists(target)) {
            rename_path(path_, target);
        } else if (!exchange_paths(path_, target)) {
            remove_folder(target + ".old");
            rename_path(target, target + ".old");
            rename_path(path_, target);
        }
        path_.clear();
        leftover_.reset();
    }

  private:
    std::string path_;
    std::optional<Leftover> leftover_;
};

// OUT/link -> name, in one step: a reader finds the old target or the new one.
inline void point_link(const std::string& out, const std::string& link, const std::string& name) {
    std::string path = join_path(out, link), temporary = path + ".tmp";
    unlink(temporary.c_str());
    if (symlink(name.c_str(), temporary.c_str()) != 0)
        fail_machine("%s: cannot create the link: %s", path.c_str(), strerror(errno));
    rename_path(temporary, path);
}

// Which checkpoints stay when a newer one is there: the newest `keep` (0: all) up to the last,
// those of every step that `keep_every` divides (0: none for that), and those that last and best
// point to.
struct Retention {
    int keep = 0;
    uint64_t keep_every = 0;
};

// Removes what earlier saves left unfinished or replaced, and the checkpoints that need not stay.
// Each is renamed away first, so that a half-removed folder is never taken for a checkpoint.
inline void remove_old_checkpoints(const std::string& out, const Retention& retention) {
    std::string last = linked_step(out, "last", true), best = linked_step(out, "best", true);
    int newer = 0;
    for (const StepFolder& folder : list_steps(out, "")) {
        if (step_of(last) && folder.step > *step_of(last)) continue;  // fallen back from
        bool kept = retention.keep <= 0 || newer++ < retention.keep;
        kept |= retention.keep_every > 0 && folder.step % retention.keep_every == 0;
        if (kept || folder.name == last || folder.name == best) continue;
        std::string path = join_path(out, folder.name);
        remove_folder(path + ".tmp");
        rename_path(path, path + ".tmp");
    }
    for (const char* suffix : {".tmp", ".old"})
        for (const StepFolder& folder : list_steps(out, suffix))
            remove_folder(join_path(out, folder.name));
    for (const char* link : {"last.tmp", "best.tmp"}) unlink(join_path(out, link).c_str());
}

// For a run that goes on from an older checkpoint: those of later steps get names under which
// neither retention nor latest_checkpoint looks for them. Returns the names, newest first.
inline std::vector<std::string> abandon_later_checkpoints(const std::string& out, uint64_t step) {
    std::vector<std::string> names;
    for (const StepFolder& folder : list_steps(out, "")) {
        if (folder.step <= step) break;
        std::string name = folder.name + ".abandoned";
        for (int number = 2; path_exists(join_path(out, name)); number++)
            name = format("%s.abandoned.%d", folder.name.c_str(), number);
        rename_path(join_path(out, folder.name), join_path(out, name));
        names.push_back(name);
    }
    return names;
}

// Writes trainer.json: the trainer's own state, and the size and hash of every other file of the
// folder. `digests` has those of the files whose content was at hand when they were written.
inline void write_trainer_json(const std::string& folder, uint64_t step, const ordered_json& state,
                               std::map<std::string, FileDigest> digests) {
    std::error_code error;
    for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
        std::string name = at->path().filename().string();
        if (digests.count(name) == 0) digests[name] = digest_file(at->path().string());
    }
    if (error) fail_machine("%s: cannot list: %s", folder.c_str(), error.message().c_str());
    ordered_json root = state;
    root["step"] = step;
    root["files"] = ordered_json::object();
    for (const auto& [name, digest] : digests)
        root["files"][name] = {{"bytes", digest.bytes}, {"xxh3", hash_text(digest.hash)}};
    // The checksum is of what a reader will find: the text, parsed.
    root["checksum"] = json_checksum(json::parse(json_text(root, -1)));
    write_file_atomic(join_path(folder, "trainer.json"), json_text(root, 2) + "\n");
}

// What a rank saves of one row of one layer.
using PartView = std::function<TensorPart(Group group, int row, int layer)>;

// Who saves a checkpoint: one process, or several ranks that each save what they hold of the
// moments.
struct SavingRank {
    int rank = 0, world = 1;
    std::string job;          // this start of the ranks, which no other is called like
    double patience_s = 600;  // of rank 0, for the other ranks' parts
    std::function<bool()> is_over = [] { return false; };  // the run no longer wants the save
};

// What a checkpoint is made of. `tokenizer` may be null; `state` is the trainer's own; `parts` are
// the moments of a rank of several, which has `tensors` for the parameters alone, if it is rank 0.
struct Checkpoint {
    uint64_t step = 0;
    GPT2Config config;
    TensorView tensors;
    const Tokenizer* tokenizer = nullptr;
    ordered_json state;
    bool best = false;
    PartView parts = {};
    SavingRank saving = {};
};

// Bytes that a checkpoint takes on the disk, but for its tokenizer and headers.
inline size_t checkpoint_bytes(const GPT2Config& config) {
    return 3 * sizeof(real) * count_parameters(config);
}

// The bytes that the disk of an existing folder could still take; none where it does not say.
inline std::optional<size_t> disk_free(const std::string& folder) {
    struct statvfs disk;
    if (statvfs(folder.c_str(), &disk) != 0 || disk.f_blocks == 0) return {};
    return size_t(disk.f_bavail) * disk.f_frsize;
}

constexpr std::pair<Group, const char*> kMoments[] = {{Group::first_moments, "m."},
                                                      {Group::second_moments, "v."}};

// Writes the moments of this rank. Whole tensors have their names and shapes in transformers' state
// dict behind m. and v.; of a part, NAME[BEGIN:END] are the numbers from BEGIN to END of the tensor
// as the program holds it (which is the transpose of some of transformers').
inline FileDigest write_moments(const Checkpoint& checkpoint, const std::string& folder) {
    const SavingRank& saving = checkpoint.saving;
    SafetensorsWriter writer(join_path(folder, moments_file(saving.rank, saving.world)));
    for (const auto& [group, prefix] : kMoments) {
        if (saving.world == 1) {
            add_tensors(writer, checkpoint.config, checkpoint.tensors, group, prefix);
            continue;
        }
        ParameterTable table = parameter_table(checkpoint.config);
        for (int index = 0; index < kParameterRows; index++) {
            const ParameterRow& row = table[size_t(index)];
            for (int layer = 0; row.present && layer < int(row.count); layer++) {
                TensorPart part = checkpoint.parts(group, index, layer);
                if (part.begin == part.end) continue;
                std::string name = prefix + hf_name(row, layer);
                writer.add(name + format("[%zu:%zu]", part.begin, part.end), kRealDtype,
                           {part.end - part.begin}, part.numbers);
            }
        }
    }
    return writer.commit();
}

// ---- in parts ----

// Ranks that save parts write into one folder, which all of them must see: rank 0 makes it, and
// leaves in it a file that names this attempt. Every other rank waits for that, writes its file,
// reads it back, and leaves a note with its digest, or with what went wrong. Rank 0 waits for the
// notes, and removes them before it publishes the folder. The messages are files because ranks
// train meanwhile, and speak to each other of that.
inline std::string attempt_file(const std::string& folder) { return join_path(folder, "attempt"); }
inline std::string note_file(const std::string& folder, int rank) {
    return join_path(folder, format("part-%05d", rank + 1));
}

// The content of a small file; "" where there is none.
inline std::string read_message(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text(4096, 0);
    file.read(text.data(), std::streamsize(text.size()));
    text.resize(size_t(file.gcount()));
    return text;
}

inline std::string attempt_prefix(const Checkpoint& checkpoint) {
    return checkpoint.saving.job + " " + step_name(checkpoint.step) + " ";
}

// For a rank that is not the first: its part of every attempt of rank 0's to save this checkpoint,
// until the run no longer wants it. What goes wrong is for rank 0 to say.
inline void serve_part(const std::string& out, const Checkpoint& checkpoint) {
    constexpr auto kPause = std::chrono::milliseconds(10);
    const SavingRank& saving = checkpoint.saving;
    std::string folder = join_path(out, step_name(checkpoint.step) + ".tmp");
    std::string served, name = moments_file(saving.rank, saving.world);
    for (; !saving.is_over(); std::this_thread::sleep_for(kPause)) {
        std::string attempt = read_message(attempt_file(folder));
        if (attempt == served || !attempt.starts_with(attempt_prefix(checkpoint))) continue;
        ordered_json note = {{"attempt", attempt}};
        try {
            FileDigest digest = write_moments(checkpoint, folder);
            if (digest_file(join_path(folder, name)) != digest)
                fail_machine("%s: the disk did not keep what was written",
                             join_path(folder, name).c_str());
            note["bytes"] = digest.bytes, note["xxh3"] = digest.hash;
        } catch (const Error& error) {
            note["error"] = error.what();
        } catch (const std::bad_alloc&) { note["error"] = "out of memory"; }
        try {
            write_file_atomic(note_file(folder, saving.rank), json_text(note, -1));
            served = attempt;
        } catch (const Error&) {}  // rank 0 gave the attempt up, or will
    }
}

// Rank 0 waits for the parts of the others, and adds them to digests.
inline void await_parts(const Checkpoint& checkpoint, const std::string& folder,
                        const std::string& attempt, std::map<std::string, FileDigest>* digests) {
    using Clock = std::chrono::steady_clock;
    constexpr auto kPause = std::chrono::milliseconds(5);
    const SavingRank& saving = checkpoint.saving;
    auto end = Clock::now() + std::chrono::duration<double>(saving.patience_s);
    for (int rank = 1; rank < saving.world; rank++) {
        json note;
        while (!note.is_object() || note.value("attempt", "") != attempt) {
            if (saving.is_over()) fail_machine("the run ended before its parts were saved");
            if (Clock::now() > end)
                fail_machine("rank %d did not save its part within %g s", rank, saving.patience_s);
            std::this_thread::sleep_for(kPause);
            note = json::parse(read_message(note_file(folder, rank)), nullptr, false);
        }
        if (note.contains("error"))
            fail_machine("rank %d: %s", rank, note["error"].get<std::string>().c_str());
        (*digests)[moments_file(rank, saving.world)] = {note["bytes"].get<size_t>(),
                                                        note["xxh3"].get<uint64_t>()};
        unlink(note_file(folder, rank).c_str());
    }
    unlink(attempt_file(folder).c_str());
}

// Writes the files of a checkpoint into a folder and reads them back.
inline void write_checkpoint(const Checkpoint& checkpoint, const std::string& folder) {
    const Tokenizer* tokenizer = checkpoint.tokenizer;
    const GPT2Config& config = checkpoint.config;
    std::map<std::string, FileDigest> digests;
    std::set<std::string> verified;  // by the rank that wrote them
    std::string attempt;
    if (checkpoint.saving.world > 1) {
        static std::atomic<unsigned> attempts;
        attempt = attempt_prefix(checkpoint) + std::to_string(attempts++);
        write_file_atomic(attempt_file(folder), attempt);
    }
    if (tokenizer != nullptr) tokenizer->save(folder, config.context);
    write_config(config, tokenizer != nullptr ? tokenizer->end_of_text() : -1, folder);
    digests["model.safetensors"] = write_model_file(config, checkpoint.tensors, folder);
    digests[moments_file(0, checkpoint.saving.world)] = write_moments(checkpoint, folder);
    if (checkpoint.saving.world > 1) await_parts(checkpoint, folder, attempt, &digests);
    for (int rank = 1; rank < checkpoint.saving.world; rank++)
        verified.insert(moments_file(rank, checkpoint.saving.world));
    write_trainer_json(folder, checkpoint.step, checkpoint.state, digests);
    try {
        verify_checkpoint(folder, verified);
    } catch (const Error& error) {
        fail_machine("%s; the disk did not keep what was written", error.what());
    }
}

// Saves a checkpoint of the run in `out` as OUT/step_N: a model folder, the moments as
// optimizer.safetensors (m.NAME and v.NAME, in the precision that they have in memory) or as the
// parts of several ranks, and trainer.json, which is the state and, under "step", "files" and
// "checksum", what was saved. It is built beside its place, synced, read back and held against the
// recorded hashes, and only then renamed; OUT/last (and OUT/best when it is the best) then point to
// it, and old checkpoints go. `before_publishing` makes durable what must not be older than the
// checkpoint. Throws with exit code 1 when the disk refuses; the checkpoints before are then as
// they were. What cannot be removed does no harm and is returned as a line for people.
inline std::string save_checkpoint(const std::string& out, const Checkpoint& checkpoint,
                                   const Retention& retention,
                                   const std::function<void()>& before_publishing = {}) {
    std::string name = step_name(checkpoint.step), target = join_path(out, name);
    make_folder(out);
    size_t needed = checkpoint_bytes(checkpoint.config);
    std::optional<size_t> free = disk_free(out);
    if (free && *free < needed)
        fail_machine("%s: a checkpoint takes %.1f MiB, the disk has %.1f MiB free", target.c_str(),
                     double(needed) / 1048576, double(*free) / 1048576);
    TemporaryFolder folder(target + ".tmp");
    write_checkpoint(checkpoint, folder.path());
    if (before_publishing) before_publishing();
    folder.rename_to(target);
    sync_folder(out);
    point_link(out, "last", name);
    if (checkpoint.best) point_link(out, "best", name);
    sync_folder(out);
    try {
        remove_old_checkpoints(out, retention);
    } catch (const Error& error) { return error.what(); }
    return "";
}

// ==== checkpoints: loading =======================================================================

// The folder of the checkpoint to resume from: the one that OUT/last points to or, where that is
// damaged, the newest that verifies; "" when there is none. What was passed over goes to `warning`,
// a line each.
inline std::string latest_checkpoint(const std::string& out, std::string* warning = nullptr) {
    std::vector<StepFolder> steps = list_steps(out, "");
    for (const StepFolder& replaced : list_steps(out, ".old")) steps.push_back(replaced);
    std::stable_sort(steps.begin(), steps.end(), [](const StepFolder& a, const StepFolder& b) {
        return a.step > b.step;  // of one step, what replaced the other comes first
    });
    std::string last = linked_step(out, "last");
    std::stable_partition(steps.begin(), steps.end(),
                          [&](const StepFolder& folder) { return folder.name == last; });
    for (const StepFolder& folder : steps) {
        std::string path = join_path(out, folder.name);
        try {
            verify_checkpoint(path);
            return path;
        } catch (const Error& error) {
            if (warning != nullptr) *warning += std::string(error.what()) + "\n";
        }
    }
    return "";
}

// The tensors of a checkpoint's moments that ranks saved in parts.
class MomentParts {
  public:
    MomentParts(const std::string& folder, const std::vector<std::string>& names) {
        for (const std::string& name : names) {
            files_.push_back(std::make_unique<SafetensorsFile>(join_path(folder, name)));
            for (const auto& [part, entry] : files_.back()->entries()) add(*files_.back(), part);
        }
    }
    size_t tensors() const { return parts_.size(); }
    const std::string& path() const { return files_.front()->path(); }

    // Of a tensor of `size` numbers those from begin to end, to their places in `out`. Throws with
    // exit code 2 unless the parts of the tensor are the whole of it, each number once.
    void read(const std::string& tensor, size_t size, size_t begin, size_t end, real* out) const {
        auto found = parts_.find(tensor);
        size_t covered = 0;
        std::vector<real> numbers;
        if (found != parts_.end()) {
            for (const auto& [from, part] : found->second) {
                if (from != covered) break;
                covered = part.end;
                if (covered > size || part.end <= begin || from >= end) continue;
                read_finite(*part.file, part.name, numbers);
                std::copy(numbers.begin(), numbers.end(), out + from);
            }
        }
        if (covered != size)
            fail_input("%s: %s: its parts hold %zu numbers without a gap, the tensor has %zu",
                       path().c_str(), one_line(tensor).c_str(), covered, size);
    }

  private:
    struct Part {
        size_t end;
        const SafetensorsFile* file;
        std::string name;
    };

    void add(const SafetensorsFile& file, const std::string& name) {
        size_t bracket = name.rfind('['), begin = 0, end = 0;
        const SafetensorsFile::Entry& entry = file.entry(name);
        std::string tensor = name.substr(0, bracket);
        bool fits = bracket != std::string::npos &&
                    sscanf(name.c_str() + bracket, "[%zu:%zu]", &begin, &end) == 2 &&
                    name == tensor + format("[%zu:%zu]", begin, end) && begin < end &&
                    entry.shape == std::vector<size_t>{end - begin};
        if (!fits)
            fail_input("%s: %s: is no part NAME[BEGIN:END] of a tensor, of END - BEGIN numbers",
                       file.path().c_str(), one_line(name).c_str());
        require_own_dtype(file, name);
        if (!parts_[tensor].emplace(begin, Part{end, &file, name}).second)
            fail_input("%s: %s: another part begins there too", file.path().c_str(),
                       one_line(name).c_str());
    }

    std::vector<std::unique_ptr<SafetensorsFile>> files_;
    std::map<std::string, std::map<size_t, Part>> parts_;  // by tensor, and by where they begin
};

// Fills the moments from a checkpoint that was verified; of a rank that saves parts, its own.
inline void read_moments(GPT2* model, const std::string& folder) {
    std::string path = join_path(folder, "trainer.json");
    std::vector<std::string> names =
        moments_files(read_json_object(path).value("files", json::object()), path);
    std::optional<SafetensorsFile> whole;
    std::optional<MomentParts> parts;
    if (names.size() == 1) whole.emplace(join_path(folder, names[0]));
    else parts.emplace(folder, names);
    ParameterTable table = parameter_table(gpt2_config(model));
    std::vector<real> values, scratch;
    size_t used = 0;
    for (int index = 0; index < kParameterRows; index++) {
        const ParameterRow& row = table[size_t(index)];
        if (!row.present) continue;
        for (int layer = 0; layer < int(row.count); layer++) {
            for (const auto& [group, prefix] : kMoments) {
                std::string name = prefix + hf_name(row, layer);
                used++;
                if (whole) {
                    check_shape(*whole, name, row);
                    require_own_dtype(*whole, name);
                    read_finite(*whole, name, values);
                    write_hf_tensor(model, group, index, layer, values, scratch);
                    continue;
                }
                TensorPart held{0, row.file_size()};
                if (gpt2_shape(model).saves_parts)
                    held = gpt2_snapshot_tensor(model, group, index, layer);
                values.resize(row.file_size());
                parts->read(name, values.size(), held.begin, held.end, values.data());
                gpt2_copy_in(model, group, index, layer, values.data());
            }
        }
    }
    size_t there = whole ? whole->entries().size() : parts->tensors();
    if (used != there)
        fail_input("%s: holds %zu tensors, the model has %zu",
                   whole ? whole->path().c_str() : parts->path().c_str(), there, used);
}

// Fills parameters and moments, bit for bit, from a checkpoint that was verified. Throws with exit
// code 2 for one of another model or precision.
inline void read_checkpoint(GPT2* model, const std::string& folder) {
    load_model(model, folder);
    read_moments(model, folder);
}

// The same for one that nobody looked at yet, whose every file is verified first; returns its
// trainer.json.
inline json load_checkpoint(GPT2* model, const std::string& folder) {
    json trainer = verify_checkpoint(folder);
    read_checkpoint(model, folder);
    return trainer;
}

// The model folder that `path` stands for: a model folder itself, or the last checkpoint of a run
// folder. Throws with exit code 2, saying what was expected, for anything else.
inline std::string resolve_model_folder(const std::string& path) {
    if (!path_exists(path))
        fail_input(
            "%s: no such folder; expected a model folder (config.json, model.safetensors) or "
            "a run folder",
            path.c_str());
    if (!is_folder(path))
        fail_input(
            "%s: a file; expected a model folder (config.json, model.safetensors) or a run "
            "folder",
            path.c_str());
    if (path_exists(join_path(path, "config.json"))) return path;
    std::vector<std::string> names = {linked_step(path, "last")};
    for (const StepFolder& folder : list_steps(path, "")) names.push_back(folder.name);
    for (const std::string& name : names) {
        std::string folder = join_path(path, name);
        if (!name.empty() && path_exists(join_path(folder, "config.json"))) return folder;
    }
    fail_input(
        "%s: neither a model folder (no config.json) nor a run folder (no checkpoint "
        "step_00000000)",
        path.c_str());
}
