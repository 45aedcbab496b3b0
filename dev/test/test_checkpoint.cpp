// The tests of checkpoint.h: safetensors, config.json, model folders and the checkpoints of a run.

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <limits>
#include <random>

#include "../../convert.h"
#include "models.h"
#include "saved.h"
#include "tools.h"

namespace {

using Strings = std::vector<std::string>;

// What Python's safetensors 0.8.0 wrote for tensors of six formats, a scalar and an empty one.
const char* const kReferenceHeader =
    R"({"__metadata__":{"format":"pt","note":"a \"quoted\" line"},)"
    R"("i64":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},)"
    R"("f64":{"dtype":"F64","shape":[2,2],"data_offsets":[16,48]},)"
    R"("empty":{"dtype":"F32","shape":[2,0],"data_offsets":[48,48]},)"
    R"("f32":{"dtype":"F32","shape":[4],"data_offsets":[48,64]},)"
    R"("scalar":{"dtype":"F32","shape":[],"data_offsets":[64,68]},)"
    R"("i32":{"dtype":"I32","shape":[2],"data_offsets":[68,76]},)"
    R"("bf16":{"dtype":"BF16","shape":[5],"data_offsets":[76,86]},)"
    R"("f16":{"dtype":"F16","shape":[6],"data_offsets":[86,98]}}    )";
const char* const kReferenceData =
    "ffffff7f0000000000000080ffffffff000000000000f83f9a9999999999b9bf9c7500883ce4377e010000000000"
    "0000cdcccc3d0000008001000000ffff7f7f000020400000008007000000803f01007f7f80ffcd3d003c0100ff7b"
    "007c0080662e";

std::string from_hex(const std::string& hex) {
    std::string bytes;
    for (size_t i = 0; i < hex.size(); i += 2)
        bytes += char(std::stoi(hex.substr(i, 2), nullptr, 16));
    return bytes;
}

std::string with_length(const std::string& header, const std::string& data) {
    std::string length(8, '\0');
    for (int i = 0; i < 8; i++) length[size_t(i)] = char(uint64_t(header.size()) >> 8 * i);
    return length + header + data;
}

std::string reference_file() { return with_length(kReferenceHeader, from_hex(kReferenceData)); }

template <typename To>
std::vector<To> read_all(const SafetensorsFile& file, const std::string& name) {
    std::vector<To> values(file.entry(name).count());
    file.read(name, values.data());
    return values;
}

std::string reference_path() {
    std::string path = join_path(test_folder(), "reference.safetensors");
    put_file(path, reference_file());
    return path;
}

TEST(Safetensors, ReadsWhatTheReferenceImplementationWrote) {
    SafetensorsFile file(reference_path());
    double infinity = std::numeric_limits<double>::infinity();
    EXPECT_EQ(read_all<double>(file, "f64"),
              (std::vector<double>{1.5, -0.1, 0x1.7e43c8800759cp+996, 0x1p-1074}));
    EXPECT_EQ(read_all<double>(file, "f32"),
              (std::vector<double>{0x1.99999ap-4, -0.0, 0x1p-149, 0x1.fffffep+127}));
    EXPECT_EQ(read_all<double>(file, "f16"),
              (std::vector<double>{1, 0x1p-24, 0x1.ffcp+15, infinity, -0.0, 0x1.998p-4}));
    EXPECT_EQ(read_all<double>(file, "bf16"),
              (std::vector<double>{1, 0x1p-133, 0x1.fep+127, -infinity, 0x1.9ap-4}));
    EXPECT_EQ(read_all<float>(file, "bf16")[1], 0x1p-133f);
    EXPECT_EQ(read_all<float>(file, "f64")[1], -0.1f);
    EXPECT_TRUE(std::signbit(read_all<float>(file, "f32")[1]));
    EXPECT_TRUE(std::signbit(read_all<float>(file, "f16")[4]));
    EXPECT_EQ(read_all<int>(file, "i32"), (std::vector<int>{INT_MIN, 7}));
    EXPECT_EQ(read_all<int>(file, "i64"), (std::vector<int>{INT_MAX, INT_MIN}));
    EXPECT_EQ(read_all<float>(file, "scalar"), std::vector<float>{2.5});
    EXPECT_EQ(file.entry("scalar").shape, std::vector<size_t>{});
    EXPECT_EQ(read_all<float>(file, "empty"), std::vector<float>{});
    EXPECT_EQ(file.entry("f64").shape, (std::vector<size_t>{2, 2}));
    EXPECT_EQ(file.metadata().at("note"), "a \"quoted\" line");
    EXPECT_EQ(file.entries().size(), 8u);
    EXPECT_FALSE(file.has("__metadata__"));
}

TEST(Safetensors, WritesTheBytesThatTheReferenceImplementationWrites) {
    std::string path = join_path(test_folder(), "ours.safetensors"),
                data = from_hex(kReferenceData);
    SafetensorsWriter writer(path, {{"note", "a \"quoted\" line"}, {"format", "pt"}});
    writer.add("i64", "I64", {2}, data.data());
    writer.add("empty", "F32", {2, 0}, nullptr);
    writer.add("f32", "F32", {4}, data.data() + 48);
    writer.add("bf16", "BF16", {5}, data.data() + 76);
    writer.add("f16", "F16", {6}, [&] { return static_cast<const void*>(data.data() + 86); });
    writer.add("f64", "F64", {2, 2}, data.data() + 16);
    writer.add("scalar", "F32", {}, data.data() + 64);
    writer.add("i32", "I32", {2}, data.data() + 68);
    FileDigest digest = writer.commit();
    EXPECT_EQ(read_file(path), reference_file());
    EXPECT_EQ(digest, digest_file(path));
    EXPECT_EQ(digest.bytes, reference_file().size());
}

// Files of no part, of one, and of several that are read at a time, whole or not.
TEST(FileDigest, IsThatOfTheWholeFileAtEverySize) {
    std::string path = join_path(test_folder(), "file");
    std::mt19937 random(3);
    constexpr size_t kPart = 1 << 20;
    std::string content(9 * kPart + 1, 0);
    for (char& c : content) c = char(random());
    for (size_t size : {size_t(0), size_t(1), size_t(4095), size_t(4096), kPart - 1, kPart,
                        kPart + 1, 4 * kPart - 1, 4 * kPart, 4 * kPart + 1, 5 * kPart, 8 * kPart,
                        8 * kPart + 1, 9 * kPart + 1}) {
        put_file(path, std::string_view(content).substr(0, size));
        EXPECT_EQ(digest_file(path), (FileDigest{size, hash_bytes(content.data(), size)})) << size;
    }
}

TEST(Safetensors, EveryHalfAndEveryBfloat16HasItsValue) {
    for (int bits = 0; bits < 65536; bits++) {
        int sign = bits & 0x8000 ? -1 : 1;
        auto expected = [&](int exponent_bits, int fraction_bits, int bias) -> double {
            int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
            int fraction = bits & ((1 << fraction_bits) - 1);
            if (exponent == (1 << exponent_bits) - 1) return fraction != 0 ? NAN : sign * INFINITY;
            int whole = exponent == 0 ? 0 : 1 << fraction_bits;
            return sign *
                   std::ldexp(whole + fraction, std::max(exponent, 1) - bias - fraction_bits);
        };
        auto check = [&](float value, double expect) {
            if (std::isnan(expect)) EXPECT_TRUE(std::isnan(value)) << bits;
            else EXPECT_TRUE(double(value) == expect && std::signbit(value) == (sign < 0)) << bits;
        };
        check(half_to_float(uint16_t(bits)), expected(5, 10, 15));
        check(bfloat16_to_float(uint16_t(bits)), expected(8, 7, 127));
    }
}

TEST(Safetensors, NumbersOfTheWrongKindAreRefused) {
    SafetensorsFile file(reference_path());
    std::vector<double> floats(8);
    std::vector<int> ints(8);
    expect_failure([&] { file.read("f32", ints.data()); }, 2, "f32: dtype F32 where I32 or I64");
    expect_failure([&] { file.read("i32", floats.data()); }, 2, "i32: dtype I32 where F64");
    expect_failure([&] { file.read("nothing", ints.data()); }, 2, "nothing: no such tensor");
    std::string path = join_path(test_folder(), "long.safetensors");
    for (int64_t value : {int64_t(1) << 31, -(int64_t(1) << 31) - 1, INT64_MIN}) {
        SafetensorsWriter writer(path);
        writer.add("x", "I64", {1}, &value);
        writer.commit();
        SafetensorsFile wide(path);
        expect_failure([&] { wide.read("x", ints.data()); }, 2, "does not fit 32 bits");
    }
}

TEST(Safetensors, EveryTruncationAndAnExtraByteAreRefused) {
    std::string path = join_path(test_folder(), "cut.safetensors"), whole = reference_file();
    for (size_t size = 0; size < whole.size(); size++) {
        put_file(path, whole.substr(0, size));
        expect_failure([&] { SafetensorsFile file(path); }, 2, path + ": ");
    }
    put_file(path, whole + 'x');
    expect_failure([&] { SafetensorsFile file(path); }, 2, "1 bytes after the last tensor");
    expect_failure([&] { SafetensorsFile file(test_folder()); }, 2, "not a regular file");
    expect_failure([&] { SafetensorsFile file(path + "x"); }, 2, "No such file");
}

TEST(Safetensors, AWrongHeaderLengthIsRefused) {
    std::string path = join_path(test_folder(), "length.safetensors"), whole = reference_file();
    uint64_t right = strlen(kReferenceHeader), beyond = whole.size() - 7;
    for (uint64_t length : {uint64_t(0), uint64_t(1), right - 5, right + 1, beyond - 1, beyond,
                            uint64_t(100'000'000), uint64_t(1) << 63, ~uint64_t(0), ~uint64_t(7)}) {
        for (int i = 0; i < 8; i++) whole[size_t(i)] = char(length >> 8 * i);
        put_file(path, whole);
        expect_failure([&] { SafetensorsFile file(path); }, 2, path + ": ");
    }
    put_file(path, with_length("", "").replace(0, 4, "\x01\xe1\xf5\x05", 4));  // 100,000,001
    fs::resize_file(path, 200'000'000);                                        // sparse
    expect_failure([&] { SafetensorsFile file(path); }, 2, "at most 100000000 are read");
}

// Headers over 8 bytes of data, and what the refusal says. The first is right, and accepted.
TEST(Safetensors, HostileHeadersAreRefused) {
    auto entry = [](const char* dtype, const char* shape, const char* offsets) {
        return format(R"({"a":{"dtype":%s,"shape":%s,"data_offsets":%s}})", dtype, shape, offsets);
    };
    const std::pair<std::string, const char*> kCases[] = {
        {entry(R"("F32")", "[2]", "[0,8]"), ""},
        {entry(R"("F32")", "[2]", "[0,7]"), "7 bytes, its shape and dtype need 8"},
        {entry(R"("F32")", "[2]", "[8,0]"), "at bytes 8 to 0"},
        {entry(R"("F32")", "[2]", "[1,9]"), "at bytes 1 to 9 of the data, which has 8"},
        {entry(R"("F32")", "[2]", "[-8,0]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[0.0,8.0]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[0,8,8]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[0]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "8"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[0,18446744073709551616]"), "data_offsets"},
        {entry(R"("F32")", "[2]", "[18446744073709551608,8]"), "at bytes"},
        {entry(R"("F32")", "[-2]", "[0,8]"), "-2 in its shape"},
        {entry(R"("F32")", "[2.0]", "[0,8]"), "2.0 in its shape"},
        {entry(R"("F32")", R"(["2"])", "[0,8]"), "in its shape"},
        {entry(R"("F32")", "[null]", "[0,8]"), "in its shape"},
        {entry(R"("F32")", "2", "[0,8]"), "shape is not an array"},
        {entry(R"("F32")", "[4611686018427387904,2]", "[0,8]"), "overflows"},
        {entry(R"("F32")", "[4294967296,4294967296]", "[0,8]"), "overflows"},
        {entry(R"("F32")", "[4611686018427387904]", "[0,8]"), "overflows"},
        {entry(R"("F99")", "[2]", "[0,8]"), "dtype \"F99\" is not known"},
        {entry("\"\"", "[2]", "[0,8]"), "is not known"},
        {entry("32", "[2]", "[0,8]"), "dtype 32 is not known"},
        {R"({"a":{"dtype":"F32","shape":[2]}})", "not described by"},
        {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}})", "not described by"},
        {R"({"a":7})", "not described by"},
        {R"({})", "8 bytes after the last tensor"},
        {R"({"__metadata__":{"format":1}})", "not an object of texts"},
        {R"({"__metadata__":"pt"})", "not an object of texts"},
        {R"({"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}})", "twice"},
        {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
         R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
         "\"a\" is there twice"},
        {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
         R"("b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
         "overlap"},
        {R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},)"
         R"("b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
         "overlap"},
        {R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
         R"("b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
         "gaps"},
        {R"({"a":{"dtype":"U8","shape":[7],"data_offsets":[1,8]}})", "gaps"},
        {R"({"a":{"dtype":"U8","shape":[7],"data_offsets":[0,7]}})", "1 bytes after"},
        {R"({"a\n\u0000b":7})", "a??b: not described"},
        {R"({"a":1e999})", "too large"},
        {R"([])", "no JSON object"},
        {R"( {})", "no JSON object"},
        {R"({"a":)", "not valid JSON"},
        {"{\"\xff\":1}", "not valid JSON"},
        {R"({"a":)" + std::string(100000, '['), "nested deeper"},
        {R"({")" + std::string(100000, 'n') + R"(":1})", "not described by"},
    };
    std::string path = join_path(test_folder(), "hostile.safetensors");
    for (const auto& [header, part] : kCases) {
        put_file(path, with_length(header, std::string(8, '\0')));
        if (*part == '\0') EXPECT_EQ(error_of([&] { SafetensorsFile file(path); }), "");
        else expect_failure([&] { SafetensorsFile file(path); }, 2, part);
    }
}

// ---- config.json

GPT2Config config_of(const std::string& text) {
    std::string folder = test_folder();
    put_file(join_path(folder, "config.json"), text);
    return read_config(folder);
}

TEST(Config, WhatIsWrittenIsRead) {
    for (GPT2Config config : odd_configs()) {
        config.layer_norm_epsilon = 1.0 / 3e5;
        std::string folder = test_folder();
        write_config(config, 36, folder);
        EXPECT_TRUE(read_config(folder) == config);
        EXPECT_TRUE(read_config(join_path(folder, "config.json")) == config);
        json root = read_json_object(join_path(folder, "config.json"));
        EXPECT_EQ(root["eos_token_id"], 36);
        EXPECT_EQ(root["architectures"][0], "GPT2LMHeadModel");
        write_config(config, -1, folder);
        EXPECT_TRUE(read_json_object(join_path(folder, "config.json"))["eos_token_id"].is_null());
    }
}

TEST(Config, MissingKeysHaveTheDefaultsOfTransformers) {
    GPT2Config expected;
    expected.dropout = 0.1;
    EXPECT_TRUE(config_of(R"({"model_type":"gpt2"})") == expected);
    EXPECT_TRUE(config_of(R"({"model_type":"gpt2","n_inner":3072,"unknown":[{}]})") == expected);
    expected.context = 64, expected.dropout = 0, expected.layers = 3, expected.hidden = 10;
    EXPECT_TRUE(config_of(R"({"model_type":"gpt2","n_ctx":64,"resid_pdrop":0,"n_inner":10,)"
                          R"("num_hidden_layers":3,"activation_function":"gelu_pytorch_tanh",)"
                          R"("reorder_and_upcast_attn":true})") == expected);
    EXPECT_EQ(config_of(R"({"model_type":"gpt2","n_ctx":64,"n_positions":32})").context, 32);
}

TEST(Config, WhatIsNoGpt2OrCannotBeIsRefused) {
    const std::pair<const char*, const char*> kCases[] = {
        {R"("model_type":"llama")", "/config.json: model_type \"llama\": this program reads gpt2"},
        {R"("model_type":7)", "model_type 7"},
        {R"("model_type":"ll\nama")", "model_type \"ll\\nama\""},
        {R"("n_layer":"12")", "n_layer: \"12\" is not a positive whole number"},
        {R"("n_layer":2.5)", "n_layer: 2.5 is not"},
        {R"("n_layer":12.0)", "n_layer: 12.0 is not"},
        {R"("n_layer":-3)", "n_layer: -3 is not"},
        {R"("n_layer":0)", "n_layer: 0 is not from 1"},
        {R"("n_layer":null)", "n_layer: null is not"},
        {R"("n_layer":[1])", "n_layer: [1] is not"},
        {R"("n_layer":true)", "n_layer: true is not"},
        {R"("n_layer":1e99)", "n_layer: 1e+99 is not"},
        {R"("n_layer":1e999)", "too large"},
        {R"("n_layer":4294967297)", "n_layer: 4294967297 is not from 1"},
        {R"("n_layer":18446744073709551617)", "n_layer: "},
        {R"("n_layer":2000)", "/config.json: --layers 2000"},
        {R"("n_head":5)", "heads must divide channels"},
        {R"("num_attention_heads":"x")", "num_attention_heads: \"x\""},
        {R"("n_embd":2147483647)", "--channels"},
        {R"("n_inner":0)", "n_inner: 0"},
        {R"("n_inner":"x")", "n_inner: \"x\""},
        {R"("n_positions":-1)", "n_positions: -1"},
        {R"("n_ctx":-1)", "n_ctx: -1"},
        {R"("vocab_size":0)", "vocab_size: 0"},
        {R"("vocab_size":2000000000)", "vocabulary size"},
        {R"("activation_function":"gelu")", "activation_function: \"gelu\" is not the tanh GELU"},
        {R"("activation_function":null)", "activation_function: null"},
        {R"("resid_pdrop":1)", "--dropout 1"},
        {R"("resid_pdrop":-0.5)", "--dropout -0.5"},
        {R"("resid_pdrop":"0")", "resid_pdrop: \"0\" is not a number"},
        {R"("layer_norm_epsilon":0)", "layer_norm_epsilon 0"},
        {R"("layer_norm_epsilon":-1e-5)", "layer_norm_epsilon -1e-05"},
        {R"("layer_norm_epsilon":null)", "layer_norm_epsilon: null"},
        {R"("layer_norm_epsilon":NaN)", "not valid JSON"},
        {R"("tie_word_embeddings":"yes")", "tie_word_embeddings: \"yes\""},
        {R"("tie_word_embeddings":1)", "tie_word_embeddings: 1"},
        {R"("bias":0)", "bias: 0 is neither true nor false"},
        {R"("scale_attn_weights":false)", "scale_attn_weights: false is a variant"},
        {R"("scale_attn_by_inverse_layer_idx":true)", "scale_attn_by_inverse_layer_idx: true"},
        {R"("add_cross_attention":true)", "add_cross_attention: true"},
        {R"("n_layer":2,"n_layer":3)", "\"n_layer\" is there twice"},
    };
    for (const auto& [keys, part] : kCases) {
        bool typed = strstr(keys, "model_type") != nullptr;
        std::string text = (typed ? "{" : R"({"model_type":"gpt2",)") + std::string(keys) + "}";
        expect_failure([&] { config_of(text); }, 2, part);
    }
    expect_failure([] { config_of("{}"); }, 2, "no model_type");
    expect_failure([] { config_of("[]"); }, 2, "no JSON object");
    expect_failure([] { config_of(""); }, 2, "not valid JSON");
    expect_failure([] { read_config(test_folder()); }, 2, "config.json: cannot open");
}

// ---- model folders

std::string model_path(const std::string& folder) { return join_path(folder, "model.safetensors"); }

TEST(ModelFolder, KeepsEveryBit) {
    for (const GPT2Config& config : odd_configs()) {
        std::string folder = test_folder();
        GPT2Ptr model = filled_model(config, 1), other = filled_model(config, 2);
        save_model(model.get(), nullptr, folder);
        EXPECT_TRUE(read_model_config(folder) == config);
        load_model(other.get(), folder);
        EXPECT_EQ(bits_of(model.get(), {Group::parameters}),
                  bits_of(other.get(), {Group::parameters}));
    }
}

TEST(ModelFolder, HoldsTheTensorsOfTransformersInTheirShapes) {
    for (const GPT2Config& config : odd_configs()) {
        std::string folder = test_folder();
        GPT2Ptr model = filled_model(config, 3);
        save_model(model.get(), nullptr, folder);
        SafetensorsFile file(model_path(folder));
        EXPECT_EQ(file.metadata().at("format"), "pt");
        size_t V = size_t(config.vocab_size), C = size_t(config.channels);
        EXPECT_EQ(file.entry("transformer.wte.weight").shape, (std::vector<size_t>{V, C}));
        EXPECT_EQ(file.entry("transformer.h.0.attn.c_attn.weight").shape,
                  (std::vector<size_t>{C, 3 * C}));
        EXPECT_EQ(file.entry("transformer.h.0.mlp.c_proj.weight").shape,
                  (std::vector<size_t>{size_t(config.hidden_size()), C}));
        EXPECT_EQ(file.entry("transformer.h.0.mlp.c_fc.bias").shape,
                  std::vector<size_t>{size_t(config.hidden_size())});
        EXPECT_EQ(file.has("lm_head.weight"), !config.tied);
        EXPECT_EQ(file.entries().size(), size_t(4 + 12 * config.layers + !config.tied));
        if (!config.bias) {
            EXPECT_EQ(read_all<double>(file, "transformer.ln_f.bias"), std::vector<double>(C, 0));
        }

        std::vector<real> host(3 * C * C);
        gpt2_copy_out(model.get(), Group::parameters, k_qkvw, config.layers - 1, host.data());
        std::string name = format("transformer.h.%d.attn.c_attn.weight", config.layers - 1);
        std::vector<real> stored = read_all<real>(file, name);
        for (size_t out = 0; out < 3 * C; out++)
            for (size_t in = 0; in < C; in++)
                ASSERT_EQ(stored[in * 3 * C + out], host[out * C + in]) << name;
    }
}

TEST(ModelFolder, LoadsWithoutThePrefixWithMasksAndWithATiedHead) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 4), other = filled_model(config, 5);
    save_model(model.get(), nullptr, folder);
    RawTensors bare;
    for (const auto& [name, tensor] : read_raw(model_path(folder)))
        bare[name.substr(strlen("transformer."))] = tensor;
    bare["lm_head.weight"] = bare["wte.weight"];
    for (int layer = 0; layer < config.layers; layer++) {
        bare[format("h.%d.attn.bias", layer)] = {"BOOL", {1, 1, 5, 5}, std::string(25, '\1')};
        bare[format("transformer.h.%d.attn.masked_bias", layer)] = {
            "F16", {}, std::string(2, '\0')};
    }
    write_raw(model_path(folder), bare);
    load_model(other.get(), folder);
    EXPECT_EQ(bits_of(model.get(), {Group::parameters}), bits_of(other.get(), {Group::parameters}));

    bare["lm_head.weight"].bytes[0] ^= 1;
    write_raw(model_path(folder), bare);
    expect_failure([&] { load_model(other.get(), folder); }, 2,
                   "lm_head.weight: differs from wte.weight, but the head is tied; set "
                   "\"tie_word_embeddings\": false");
}

TEST(ModelFolder, LoadsHalfBfloat16AndDouble) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = model_of(config);
    save_model(model.get(), nullptr, folder);
    for (const char* dtype : {"F16", "BF16", "F32", "F64"}) {
        RawTensors tensors = read_raw(model_path(folder));
        size_t size = dtype_size(dtype);
        double one = 1.5;
        float single = 1.5f;
        uint16_t half = strcmp(dtype, "F16") == 0 ? 0x3e00 : 0x3fc0;
        const void* pattern = size == 8   ? static_cast<void*>(&one)
                              : size == 4 ? static_cast<void*>(&single)
                                          : &half;
        for (auto& [name, tensor] : tensors) {
            size_t count = tensor.bytes.size() / dtype_size(tensor.dtype);
            tensor.dtype = dtype, tensor.bytes.clear();
            for (size_t i = 0; i < count; i++)
                tensor.bytes.append(static_cast<const char*>(pattern), size);
        }
        write_raw(model_path(folder), tensors);
        GPT2Ptr other = model_of(config);
        load_model(other.get(), folder);
        each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
            std::vector<real> host(row.file_size());
            gpt2_copy_out(other.get(), Group::parameters, index, layer, host.data());
            EXPECT_EQ(host, std::vector<real>(host.size(), real(1.5))) << row.name << dtype;
        });
    }
}

TEST(ModelFolder, RefusesTensorsThatDoNotFitAndNamesThem) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 6);
    save_model(model.get(), nullptr, folder);
    const RawTensors good = read_raw(model_path(folder));
    const std::string qkv = "transformer.h.1.attn.c_attn.weight";
    uint64_t before = bits_of(model.get());
    auto expect = [&](auto edit, const std::string& part) {
        RawTensors tensors = good;
        edit(tensors);
        write_raw(model_path(folder), tensors);
        expect_failure([&] { load_model(model.get(), folder); }, 2,
                       model_path(folder) + ": " + part);
        expect_failure([&] { read_model_config(folder); }, 2, model_path(folder) + ": " + part);
        EXPECT_EQ(bits_of(model.get()), before);
    };
    expect([&](RawTensors& t) { t.erase(qkv); }, qkv +
                                                     ": missing; the configuration asks for shape "
                                                     "(15, 45)");
    expect([&](RawTensors& t) { std::swap(t[qkv].shape[0], t[qkv].shape[1]); },
           qkv + ": shape (45, 15), the configuration says (15, 45)");
    expect([&](RawTensors& t) { t[qkv].shape = {675}; },
           qkv + ": shape (675), the configuration says (15, 45)");
    expect(
        [&](RawTensors& t) { t["transformer.h.2.ln_1.weight"] = good.at("transformer.ln_f.bias"); },
        "transformer.h.2.ln_1.weight: a GPT-2 of 2 layers has no such tensor");
    expect([&](RawTensors& t) { t["score\n.weight"] = good.at("transformer.ln_f.bias"); },
           "score?.weight: a GPT-2 of 2 layers");
    expect([&](RawTensors& t) { t[qkv.substr(12)] = good.at(qkv); },
           "h.1.attn.c_attn.weight: a GPT-2 of 2 layers has no such tensor, or has it already");
    expect(
        [&](RawTensors& t) { t["transformer.h.2.attn.bias"] = good.at("transformer.ln_f.bias"); },
        "transformer.h.2.attn.bias: ");
}

TEST(ModelFolder, RefusesNumbersThatAreNotFiniteOrNotNumbersAtAll) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 7);
    save_model(model.get(), nullptr, folder);
    const std::string name = "transformer.h.1.mlp.c_fc.weight";
    RawTensors tensors = read_raw(model_path(folder));
    std::string last = tensors[name].bytes;
    for (real value : {real(NAN), real(INFINITY), real(-INFINITY)}) {
        memcpy(tensors[name].bytes.data() + last.size() - sizeof(real), &value, sizeof(real));
        write_raw(model_path(folder), tensors);
        expect_failure([&] { load_model(model.get(), folder); }, 2,
                       name + ": holds numbers that are");
    }
    tensors[name].bytes = last;
    tensors[name].dtype = sizeof(real) == 8 ? "I64" : "I32";
    write_raw(model_path(folder), tensors);
    expect_failure([&] { load_model(model.get(), folder); }, 2, name + ": dtype I");

    std::vector<real> host(size_t(config.channels), real(NAN));
    gpt2_copy_in(model.get(), Group::parameters, k_lnfw, 0, host.data());
    std::string other = test_folder();
    expect_failure([&] { save_model(model.get(), nullptr, other); }, 1,
                   "transformer.ln_f.weight: holds numbers that are not finite; not saved");
    EXPECT_FALSE(path_exists(model_path(other)));
}

TEST(ModelFolder, AModelWithoutBiasesTakesZerosOrNone) {
    GPT2Config config = odd_configs()[2];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 8), other = filled_model(config, 9);
    save_model(model.get(), nullptr, folder);
    RawTensors tensors = read_raw(model_path(folder)), fewer;
    for (const auto& [name, tensor] : tensors)
        if (name.find("bias") == std::string::npos) fewer[name] = tensor;
    EXPECT_LT(fewer.size(), tensors.size());
    write_raw(model_path(folder), fewer);
    load_model(other.get(), folder);
    EXPECT_EQ(bits_of(model.get(), {Group::parameters}), bits_of(other.get(), {Group::parameters}));
    tensors["transformer.h.1.mlp.c_fc.bias"].bytes.back() = 1;
    write_raw(model_path(folder), tensors);
    expect_failure([&] { load_model(other.get(), folder); }, 2,
                   "transformer.h.1.mlp.c_fc.bias: not zero, but config.json says \"bias\": false");
}

TEST(ModelFolder, RefusesOtherContainersHeadsAndFolders) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 10);
    save_model(model.get(), nullptr, folder);
    GPT2Config other = config;
    other.heads = 5;
    write_config(other, -1, folder);
    expect_failure([&] { load_model(model.get(), folder); }, 2, "config.json: 5 heads");
    other = config;
    other.layer_norm_epsilon = 1e-6;
    write_config(other, -1, folder);
    expect_failure([&] { load_model(model.get(), folder); }, 2, "layer_norm_epsilon 1e-06");
    fs::remove(model_path(folder));
    expect_failure([&] { load_model(model.get(), folder); }, 2, "model.safetensors: cannot open");
    for (const char* name : {"pytorch_model.bin.index.json", "pytorch_model.bin"}) {
        put_file(join_path(folder, name), "{}");
        expect_failure([&] { load_model(model.get(), folder); }, 2,
                       std::string(name) + ": this program reads model.safetensors");
    }
}

TEST(ModelFolder, AFailedWriteLeavesTheOldFile) {
    GPT2Config config = odd_configs()[0];
    std::string folder = test_folder();
    GPT2Ptr model = filled_model(config, 11), other = filled_model(config, 12);
    save_model(model.get(), nullptr, folder);
    std::string before = read_file(model_path(folder));
    rlimit old_limit;
    getrlimit(RLIMIT_FSIZE, &old_limit);
    auto old_action = signal(SIGXFSZ, SIG_IGN);
    rlimit small = {before.size() / 2, old_limit.rlim_max};
    setrlimit(RLIMIT_FSIZE, &small);
    expect_failure([&] { save_model(other.get(), nullptr, folder); }, 1, "File too large");
    setrlimit(RLIMIT_FSIZE, &old_limit);
    signal(SIGXFSZ, old_action);
    EXPECT_EQ(read_file(model_path(folder)), before);
    for (const auto& item : fs::directory_iterator(folder))
        EXPECT_NE(item.path().extension(), ".tmp") << item.path();
    expect_failure([&] { save_model(other.get(), nullptr, "/proc/no_such_folder"); }, 1,
                   "/proc/no_such_folder: cannot create");
}

// ---- checkpoints

struct SavedRun {
    std::string out = join_path(test_folder(), "run");
    GPT2Ptr model = filled_model(odd_configs()[0], 20);

    Checkpoint checkpoint(uint64_t step, bool best = false) const {
        ordered_json state = {{"epoch", 0.1}, {"seed", ~uint64_t(0)}, {"data", "\xff text"}};
        return {step, gpt2_config(model.get()), view_of(model.get()), nullptr, state, best};
    }
    void save(uint64_t step, bool best = false, int keep = 0, uint64_t keep_every = 0) {
        EXPECT_EQ(save_checkpoint(out, checkpoint(step, best), {keep, keep_every}), "");
    }
    std::string path(const std::string& name) const { return join_path(out, name); }
    std::string link(const char* name) const { return fs::read_symlink(path(name)).string(); }
    Strings names() const {
        Strings names;
        for (const auto& item : fs::directory_iterator(out))
            names.push_back(item.path().filename().string());
        std::sort(names.begin(), names.end());
        return names;
    }
};

void flip_byte(const std::string& path, size_t at) {
    std::string content = read_file(path);
    content[at] ^= 1;
    put_file(path, content);
}

TEST(Checkpoint, TransposesAnyShape) {
    for (auto [rows, cols] : {std::pair(1, 1),
                              {3, 5},
                              {8, 8},
                              {16, 9},
                              {7, 24},
                              {257, 65},
                              {264, 72},
                              {300, 130},
                              {64, 512}}) {
        size_t N = size_t(rows) * size_t(cols);
        Buffer inp(N), out(N);
        inp.normal(1);
        transpose(out, inp, size_t(rows), size_t(cols));
        size_t wrong = 0;
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++) wrong += !(out[c * rows + r] == inp[r * cols + c]);
        EXPECT_EQ(wrong, 0u) << rows << " x " << cols;
    }
}

TEST(Checkpoint, KeepsEveryBitOfParametersMomentsAndState) {
    for (const GPT2Config& config : odd_configs()) {
        std::string out = test_folder();
        GPT2Ptr model = filled_model(config, 21), other = filled_model(config, 22);
        ordered_json state = {{"step", 7}, {"rate", 0.1 + 0.2}, {"loader", {{"window", 3}}}};
        Tokenizer tokenizer = Tokenizer::bytes();
        Checkpoint checkpoint{1234567890123, config, view_of(model.get()), &tokenizer, state, true};
        save_checkpoint(out, checkpoint, {1});
        std::string folder = latest_checkpoint(out);
        EXPECT_EQ(folder, join_path(out, "step_1234567890123"));
        json trainer = load_checkpoint(other.get(), folder);
        EXPECT_EQ(bits_of(model.get()), bits_of(other.get()));
        EXPECT_EQ(trainer["step"], 1234567890123);
        EXPECT_EQ(trainer["rate"], 0.1 + 0.2);
        EXPECT_EQ(trainer["loader"]["window"], 3);
        EXPECT_EQ(Tokenizer::load(folder).fingerprint(), tokenizer.fingerprint());
        EXPECT_EQ(read_json_object(join_path(folder, "config.json"))["eos_token_id"],
                  tokenizer.end_of_text());
    }
}

TEST(Checkpoint, LinksPointToTheLastAndTheBestAndOldOnesGo) {
    SavedRun run;
    run.save(1, true, 2);
    EXPECT_EQ(run.names(), (Strings{"best", "last", "step_00000001"}));
    run.save(2, true, 2);
    run.save(3, false, 2);
    EXPECT_EQ(run.names(), (Strings{"best", "last", "step_00000002", "step_00000003"}));
    run.save(4, false, 1);
    EXPECT_EQ(run.names(), (Strings{"best", "last", "step_00000002", "step_00000004"}));
    EXPECT_EQ(run.link("last"), "step_00000004");
    EXPECT_EQ(run.link("best"), "step_00000002");
    run.save(3, false, 1);  // a run that was resumed further back
    EXPECT_EQ(run.names(),
              (Strings{"best", "last", "step_00000002", "step_00000003", "step_00000004"}));
    EXPECT_EQ(run.link("last"), "step_00000003");
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000003"));
    run.save(1, false, 2);
    run.save(3, false, 3);
    EXPECT_TRUE(path_exists(run.path("step_00000001"))) << "those behind the last do not count";
    fs::remove_all(run.path("step_00000001"));
    run.save(5, false, 0);
    EXPECT_EQ(run.names().size(), 6u);
}

TEST(Checkpoint, MultiplesOfAStepStayForGood) {
    SavedRun run;
    for (uint64_t step = 1; step <= 7; step++) run.save(step, false, 1, 3);
    EXPECT_EQ(run.names(), (Strings{"last", "step_00000003", "step_00000006", "step_00000007"}));
}

TEST(Checkpoint, SavingAStepAgainReplacesIt) {
    SavedRun run;
    run.save(5);
    run.model = filled_model(odd_configs()[0], 23);
    run.save(5);
    GPT2Ptr other = model_of(odd_configs()[0]);
    load_checkpoint(other.get(), latest_checkpoint(run.out));
    EXPECT_EQ(bits_of(other.get()), bits_of(run.model.get()));
    EXPECT_EQ(run.names(), (Strings{"last", "step_00000005"}));
}

TEST(Checkpoint, WhatAnInterruptedSaveLeftIsPassedOverAndRemoved) {
    SavedRun run;
    run.save(5);
    for (const char* name : {"step_00000009.tmp", "step_00000005.tmp", "step_00000004.old"})
        fs::copy(run.path("step_00000005"), run.path(name));
    for (const char* name : {"step_1", "step_x", "step_00000006x", "notes.tmp", "step_000000006"})
        fs::create_directory(run.path(name));
    fs::create_symlink("step_00000005", run.path("last.tmp"));
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000005"));
    run.save(6, false, 2);  // names that are not quite a step's are somebody else's folders
    EXPECT_EQ(run.names(), (Strings{"last", "notes.tmp", "step_000000006", "step_00000005",
                                    "step_00000006", "step_00000006x", "step_1", "step_x"}));
    // Stopped between the two renames of a replacement: the replaced one is still found.
    fs::rename(run.path("step_00000006"), run.path("step_00000006.old"));
    fs::rename(run.path("step_00000005"), run.path("step_00000005.tmp"));
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000006.old"));
    fs::rename(run.path("step_00000005.tmp"), run.path("step_00000005"));
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000006.old")) << "the newer of the two";
    fs::copy(run.path("step_00000006.old"), run.path("step_00000006"));
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000006"));
    fs::remove(run.path("last"));
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000006"));
}

TEST(Checkpoint, ADamagedOneIsReportedAndTheOneBeforeIsTaken) {
    SavedRun run;
    run.save(1);
    run.save(2);
    std::string last = run.path("step_00000002"), kept = run.path("kept");
    fs::copy(last, kept);
    for (const char* name : {"config.json", "model.safetensors", "optimizer.safetensors"}) {
        std::string file = join_path(last, name), warning;
        size_t size = read_file(file).size();
        auto expect_fallback = [&](const char* part) {
            warning.clear();
            EXPECT_EQ(latest_checkpoint(run.out, &warning), run.path("step_00000001"));
            EXPECT_NE(warning.find(file + ": "), std::string::npos) << warning;
            EXPECT_NE(warning.find(part), std::string::npos) << warning;
            expect_failure([&] { load_checkpoint(run.model.get(), last); }, 2, part);
            fs::copy_file(join_path(kept, name), file, fs::copy_options::overwrite_existing);
            EXPECT_EQ(latest_checkpoint(run.out), last);
        };
        for (size_t at : {size_t(0), size / 2, size - 1}) {
            flip_byte(file, at);
            expect_fallback("does not match the hash");
        }
        fs::resize_file(file, size - 1);
        expect_fallback("bytes, trainer.json recorded");
        fs::resize_file(file, size + 1);
        expect_fallback("bytes, trainer.json recorded");
        fs::remove(file);
        expect_fallback("cannot open");
    }
    fs::remove_all(run.path("step_00000001"));
    fs::remove_all(last);
    EXPECT_EQ(latest_checkpoint(run.out), "");
    EXPECT_EQ(latest_checkpoint(run.out + "/none"), "");
}

TEST(Checkpoint, ADamagedTokenizerIsNoticed) {
    SavedRun run;
    Tokenizer tokenizer = Tokenizer::bytes();
    Checkpoint checkpoint = run.checkpoint(1);
    checkpoint.tokenizer = &tokenizer;
    save_checkpoint(run.out, checkpoint, {});
    flip_byte(run.path("step_00000001/tokenizer.json"), 10);
    expect_failure([&] { verify_checkpoint(run.path("step_00000001")); }, 2, "tokenizer.json: ");
}

// Of several that verify, the newest.
TEST(Checkpoint, WhereTheLastIsDamagedTheNewestOfTheOthersIsTaken) {
    SavedRun run;
    for (uint64_t step = 1; step <= 4; step++) run.save(step);
    flip_byte(run.path("step_00000004/model.safetensors"), 100);
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000003"));
    flip_byte(run.path("step_00000003/config.json"), 0);
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000002"));
}

// A disk that does not keep what it was given: the moments are asked for when the model's file is
// there, and lets a byte of that go bad.
TEST(Checkpoint, WhatTheDiskDidNotKeepIsNoticedBeforeItIsPublished) {
    SavedRun run;
    run.save(1);
    Checkpoint checkpoint = run.checkpoint(2);
    bool damaged = false;
    checkpoint.tensors = [&, whole = checkpoint.tensors](Group group, int row, int layer) {
        std::string file = run.path("step_00000002.tmp/model.safetensors");
        if (group == Group::first_moments && !damaged) flip_byte(file, 1000), damaged = true;
        return whole(group, row, layer);
    };
    expect_failure([&] { save_checkpoint(run.out, checkpoint, {}); }, 1,
                   "the disk did not keep what was written");
    EXPECT_TRUE(damaged);
    EXPECT_EQ(run.names(), (Strings{"last", "step_00000001"}));
    EXPECT_EQ(run.link("last"), "step_00000001");
}

TEST(Checkpoint, AnyByteOfTrainerJsonThatChangesIsNoticed) {
    SavedRun run;
    run.save(1);
    std::string folder = run.path("step_00000001"), path = join_path(folder, "trainer.json");
    std::string content = read_file(path);
    for (size_t at = 0; at + 1 < content.size(); at++) {  // a last line end more or less is nothing
        std::string changed = content;
        changed[at] ^= 1;
        put_file(path, changed);
        EXPECT_NE(error_of([&] { verify_checkpoint(folder); }), "") << at << changed;
    }
    for (size_t size = 0; size + 1 < content.size(); size++) {
        put_file(path, content.substr(0, size));
        EXPECT_NE(error_of([&] { verify_checkpoint(folder); }), "") << size;
    }
}

TEST(Checkpoint, TrainerJsonNamesNoFilesOutsideItsFolder) {
    SavedRun run;
    run.save(1);
    std::string folder = run.path("step_00000001"), path = join_path(folder, "trainer.json");
    for (const char* name :
         {"../run/step_00000001/config.json", "/etc/passwd", "..", "", ".hidden"}) {
        json root = json::parse(read_file(path));
        root["files"][name] = root["files"]["config.json"];
        root["checksum"] = json_checksum(root);
        put_file(path, root.dump());
        expect_failure([&] { verify_checkpoint(folder); }, 2, "is no file with bytes and xxh3");
        root["files"].erase(name);
        root["checksum"] = json_checksum(root);
        put_file(path, root.dump());
    }
    EXPECT_EQ(error_of([&] { verify_checkpoint(folder); }), "");
    for (json files : {json(), json(3), json::array(), json::object()}) {
        json root = json::parse(read_file(path));
        root["files"] = files;
        root["checksum"] = json_checksum(root);
        put_file(path, root.dump());
        expect_failure([&] { verify_checkpoint(folder); }, 2, "config.json is not listed");
    }
}

TEST(Checkpoint, LinksThatLeadElsewhereAreNotFollowed) {
    SavedRun run;
    run.save(1);
    run.save(2);
    std::string elsewhere = test_folder();
    fs::rename(run.path("step_00000002"), join_path(elsewhere, "step_00000002"));
    for (const std::string& target :
         Strings{elsewhere + "/step_00000002", "../x", "step_00000002"}) {
        fs::remove(run.path("last"));
        fs::create_symlink(target, run.path("last"));
        EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000001"));
        EXPECT_EQ(resolve_model_folder(run.out), run.path("step_00000001"));
    }
    fs::create_directory_symlink(elsewhere + "/step_00000002", run.path("step_00000002"));
    EXPECT_EQ(latest_checkpoint(run.out), run.path("step_00000001"));
    run.save(3, false, 1);  // removes the folder of step 1, and not what the link leads to
    EXPECT_TRUE(path_exists(join_path(elsewhere, "step_00000002/config.json")));
}

// A disk that takes no more than `limit` bytes a file.
TEST(Checkpoint, AFullDiskLeavesTheCheckpointBefore) {
    SavedRun run;
    run.save(1);
    uint64_t before = bits_of(run.model.get());
    rlimit old_limit;
    getrlimit(RLIMIT_FSIZE, &old_limit);
    auto old_action = signal(SIGXFSZ, SIG_IGN);
    for (rlim_t limit : {0, 1, 500, 1000, 5000, 20000, 40000, 50000}) {
        run.model = filled_model(odd_configs()[0], limit);
        rlimit small = {limit, old_limit.rlim_max};
        setrlimit(RLIMIT_FSIZE, &small);
        std::string error = error_of([&] { run.save(2, true, 1); });
        setrlimit(RLIMIT_FSIZE, &old_limit);
        EXPECT_EQ(error.substr(0, 2), "1 ") << limit << error;
        EXPECT_NE(error.find("cannot write: "), std::string::npos) << error;
        EXPECT_EQ(run.names(), (Strings{"last", "step_00000001"})) << limit;
        GPT2Ptr other = model_of(odd_configs()[0]);
        load_checkpoint(other.get(), latest_checkpoint(run.out));
        EXPECT_EQ(bits_of(other.get()), before);
    }
    signal(SIGXFSZ, old_action);
    expect_failure([&] { save_checkpoint("/proc/x/run", run.checkpoint(1), {}); }, 1,
                   "/proc/x/run: cannot create");
    std::string file = run.path("file");
    put_file(file, "x");
    expect_failure([&] { save_checkpoint(file, run.checkpoint(1), {}); }, 1, file);
}

TEST(Checkpoint, MomentsOfAnotherModelOrPrecisionAreRefused) {
    SavedRun run;
    run.save(1);
    std::string folder = run.path("step_00000001"),
                path = join_path(folder, "optimizer.safetensors");
    const RawTensors good = read_raw(path);
    EXPECT_EQ(good.size(), size_t(2 * (4 + 12 * 2)));
    auto expect = [&](auto edit, const char* part) {
        RawTensors tensors = good;
        edit(tensors);
        write_raw(path, tensors);
        fs::remove(join_path(folder, "trainer.json"));
        write_trainer_json(folder, 1, {}, {});
        expect_failure([&] { load_checkpoint(run.model.get(), folder); }, 2, part);
    };
    const std::string name = "v.transformer.h.1.ln_2.bias";
    expect([&](RawTensors& t) { t.erase(name); }, "v.transformer.h.1.ln_2.bias: no such tensor");
    expect([&](RawTensors& t) { t["extra"] = t[name]; }, "holds 57 tensors, the model has 56");
    expect(
        [&](RawTensors& t) {
            t[name].shape = {1, 15};
        },
        "shape (1, 15), the configuration says");
    expect([&](RawTensors& t) { t[name].dtype = "F16", t[name].bytes.resize(30); },
           "is F16, this program keeps it in");
}

// ---- in parts

// Ranks that hold equal parts of every tensor's moments, and save them into one folder.
struct RanksOfARun : SavedRun {
    static constexpr int kWorld = 3;
    std::map<std::tuple<Group, int, int>, std::vector<real>> moments;
    std::atomic<bool> over{false};
    std::vector<std::thread> others;

    RanksOfARun() {
        ParameterTable table = parameter_table(gpt2_config(model.get()));
        for (Group group : {Group::first_moments, Group::second_moments})
            for (int row = 0; row < kParameterRows; row++)
                for (int layer = 0;
                     table[size_t(row)].present && layer < int(table[size_t(row)].count); layer++) {
                    std::vector<real>& numbers = moments[{group, row, layer}];
                    numbers.resize(table[size_t(row)].file_size());
                    gpt2_copy_out(model.get(), group, row, layer, numbers.data());
                }
    }
    ~RanksOfARun() { end(); }
    void end() {
        over = true;
        for (std::thread& rank : others) rank.join();
        others.clear();
        over = false;
    }
    Checkpoint part_of(int rank, uint64_t step) const {
        Checkpoint content = checkpoint(step);
        content.saving = {rank, kWorld, "job", 20, [this] { return over.load(); }};
        content.parts = [this, rank](Group group, int row, int layer) {
            const std::vector<real>& numbers = moments.at({group, row, layer});
            size_t begin = numbers.size() * size_t(rank) / kWorld;
            size_t end = numbers.size() * size_t(rank + 1) / kWorld;
            return TensorPart{begin, end, numbers.data() + begin};
        };
        return content;
    }
    void serve(const Checkpoint& content) {
        others.emplace_back([out = out, content] { serve_part(out, content); });
    }
};

TEST(Checkpoint, RanksSaveItInParts) {
    RanksOfARun run;
    for (int rank : {1, 2}) run.serve(run.part_of(rank, 5));
    EXPECT_EQ(save_checkpoint(run.out, run.part_of(0, 5), {}), "");
    // An attempt after one that failed gets the parts again.
    EXPECT_EQ(save_checkpoint(run.out, run.part_of(0, 5), {}), "");
    run.end();
    GPT2Ptr other = filled_model(odd_configs()[0], 22);
    load_checkpoint(other.get(), run.path("last"));
    EXPECT_EQ(bits_of(run.model.get()), bits_of(other.get()));
    Strings names;
    for (const auto& file : fs::directory_iterator(run.path("last") + "/"))
        names.push_back(file.path().filename().string());
    std::sort(names.begin(), names.end());
    EXPECT_EQ(names, (Strings{"config.json", "model.safetensors", moments_file(0, 3),
                              moments_file(1, 3), moments_file(2, 3), "trainer.json"}));
}

TEST(Checkpoint, APartThatCannotBeSavedIsSaidByRankZero) {
    RanksOfARun run;
    run.save(4);
    Checkpoint broken = run.part_of(1, 5), slow = run.part_of(0, 5), old = run.part_of(2, 5);
    broken.parts = [](Group, int, int) -> TensorPart { fail_machine("no space on that disk"); };
    old.saving.job = "another job";
    run.serve(broken), run.serve(old);
    expect_failure([&] { save_checkpoint(run.out, run.part_of(0, 5), {}); }, 1,
                   "rank 1: no space on that disk");
    run.end();
    run.serve(run.part_of(1, 5)), run.serve(old);
    slow.saving.patience_s = 0.3;
    expect_failure([&] { save_checkpoint(run.out, slow, {}); }, 1,
                   "rank 2 did not save its part within 0.3 s");
    slow.saving.is_over = [] { return true; };
    expect_failure([&] { save_checkpoint(run.out, slow, {}); }, 1, "the run ended");
    EXPECT_EQ(run.names(), (Strings{"last", "step_00000004"}));
}

TEST(Checkpoint, PartsThatDoNotMakeTheMomentsAreRefused) {
    RanksOfARun run;
    for (int rank : {1, 2}) run.serve(run.part_of(rank, 5));
    save_checkpoint(run.out, run.part_of(0, 5), {});
    run.end();
    std::string folder = run.path("step_00000005"), name = moments_file(1, 3);
    const RawTensors good = read_raw(join_path(folder, name));
    auto expect = [&](auto edit, const char* part) {
        RawTensors tensors = good;
        edit(tensors);
        write_raw(join_path(folder, name), tensors);
        fs::remove(join_path(folder, "trainer.json"));
        write_trainer_json(folder, 5, {}, {});
        expect_failure([&] { load_checkpoint(run.model.get(), folder); }, 2, part);
    };
    const std::string part = "v.transformer.h.1.ln_2.bias[5:10]";
    ASSERT_EQ(good.count(part), 1u);
    auto renamed = [&](const char* to) {
        return [=](RawTensors& t) { t[to] = t[part], t.erase(part); };
    };
    expect([&](RawTensors& t) { t.erase(part); }, "its parts hold 5 numbers without a gap");
    expect(renamed("v.transformer.h.1.ln_2.bias[6:11]"), "its parts hold 5 numbers without a gap");
    expect(renamed("v.transformer.h.1.ln_2.bias[0:5]"), "another part begins there too");
    expect(renamed("v.transformer.h.1.ln_2.bias[5:11]"), "is no part NAME[BEGIN:END]");
    expect(renamed("v.transformer.h.1.ln_2.bias[ 5:10]"), "is no part NAME[BEGIN:END]");
    expect(renamed("v.transformer.h.1.ln_2.bias"), "is no part NAME[BEGIN:END]");
    expect([&](RawTensors& t) { t["extra[0:5]"] = t[part]; }, "holds 57 tensors, the model has 56");
    expect(
        [&](RawTensors& t) {
            t[part].dtype = "F16";
            t[part].bytes.resize(10);
        },
        "is F16, this program keeps it in");
    write_raw(join_path(folder, name), good);
    fs::remove(join_path(folder, moments_file(2, 3)));
    fs::remove(join_path(folder, "trainer.json"));
    write_trainer_json(folder, 5, {}, {});
    expect_failure([&] { load_checkpoint(run.model.get(), folder); }, 2,
                   "optimizer.safetensors is not listed, nor are all parts of it");
}

TEST(Checkpoint, APathIsResolvedToAModelFolder) {
    SavedRun run;
    expect_failure([&] { resolve_model_folder(run.out); }, 2, "no such folder; expected a model");
    run.save(1);
    run.save(2);
    EXPECT_EQ(resolve_model_folder(run.out), run.path("step_00000002"));
    EXPECT_EQ(resolve_model_folder(run.out + "/"), run.path("step_00000002"));
    EXPECT_EQ(resolve_model_folder(run.path("step_00000001")), run.path("step_00000001"));
    EXPECT_EQ(resolve_model_folder(run.path("last")), run.path("last"));
    fs::remove(run.path("last"));
    EXPECT_EQ(resolve_model_folder(run.out), run.path("step_00000002"));
    expect_failure([&] { resolve_model_folder(run.path("step_00000001/config.json")); }, 2,
                   "a file");
    expect_failure([] { resolve_model_folder(test_folder()); }, 2, "neither a model folder");
}

TEST(Checkpoint, APathIsDescribed) {
    SavedRun run;
    run.save(1, true);
    run.save(2);
    PathDescription whole = describe_path(run.out);
    EXPECT_TRUE(whole.intact);
    EXPECT_NE(whole.text.find("run folder, 2 checkpoints"), std::string::npos) << whole.text;
    EXPECT_NE(whole.text.find("step_00000001 (best): checkpoint, step 1, verified"),
              std::string::npos)
        << whole.text;
    flip_byte(run.path("step_00000002/model.safetensors"), 3000);
    PathDescription damaged = describe_path(run.out);
    EXPECT_FALSE(damaged.intact);
    EXPECT_NE(damaged.text.find("step_00000002 (last): cannot be used: "), std::string::npos);
    EXPECT_FALSE(describe_path(run.path("step_00000002")).intact);
    EXPECT_NE(describe_path(run.path("step_00000001")).text.find("37: 6450 parameters"),
              std::string::npos)
        << describe_path(run.path("step_00000001")).text;
    fs::remove(run.path("step_00000001/trainer.json"));
    EXPECT_EQ(describe_path(run.path("step_00000001")).text.substr(0, 13), "model folder:");
    std::string tensors = describe_path(run.path("step_00000001/model.safetensors")).text;
    EXPECT_NE(tensors.find("28 tensors, 6450 numbers"), std::string::npos) << tensors;
    put_file(run.path("cut.safetensors"), reference_file().substr(0, 100));
    EXPECT_FALSE(describe_path(run.path("cut.safetensors")).intact);
    put_file(run.path("text"), "words");
    EXPECT_EQ(describe_path(run.path("text")).text, "text, 5 bytes");
    put_file(run.path("empty"), "");
    EXPECT_EQ(describe_path(run.path("empty")).text, "empty file");
    EXPECT_EQ(describe_path(test_folder()).text, "folder, neither a model nor a run");
    expect_failure([&] { describe_path(run.path("nothing")); }, 2, "no such file or folder");
}

}  // namespace
