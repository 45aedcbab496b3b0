// What tests of saved models use: models that are full of different numbers, what holds of their
// bits, and their files as they are.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "../../checkpoint.h"
#include "tools.h"

// One line, exit code `code`, and `part` in it.
template <typename F>
void expect_failure(F action, int code, const std::string& part) {
    std::string error = error_of(action);
    EXPECT_EQ(error.substr(0, 2), std::to_string(code) + " ") << error << "\nexpected: " << part;
    EXPECT_NE(error.find(part), std::string::npos) << error << "\nexpected: " << part;
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
    EXPECT_LT(error.size(), 1000u) << error;
}

// Without the syncs of write_file_atomic, of which there would be thousands (and a file that is cut
// to nothing and written again is synced by some file systems too, hence the removal).
inline void put_file(const std::string& path, std::string_view content) {
    fs::remove(path);
    FILE* file = fopen(path.c_str(), "wb");
    ASSERT_NE(file, nullptr) << path;
    EXPECT_EQ(fwrite(content.data(), 1, content.size(), file), content.size());
    EXPECT_EQ(fclose(file), 0);
}

inline std::vector<GPT2Config> odd_configs() {
    std::vector<GPT2Config> configs(5);
    for (GPT2Config& config : configs) {
        config.vocab_size = 37, config.context = 5, config.layers = 2;
        config.heads = 3, config.channels = 15;
    }
    configs[1].tied = false, configs[1].vocab_size = 131, configs[1].dropout = 0.1;
    configs[2].bias = false, configs[2].hidden = 7, configs[2].layer_norm_epsilon = 1e-6;
    configs[3].layers = 1, configs[3].heads = 1, configs[3].channels = 1, configs[3].context = 1;
    configs[3].vocab_size = 1;
    configs[4].bias = false, configs[4].tied = false, configs[4].vocab_size = 128;
    configs[4].layers = 11;
    return configs;
}

constexpr Group kStored[] = {Group::parameters, Group::first_moments, Group::second_moments};

inline GPT2Ptr model_of(const GPT2Config& config) {
    GPT2Shape shape;
    shape.training = true;
    return GPT2Ptr(gpt2_create(config, shape));
}

// Visits every tensor that a model has: visit(row's index, row, layer).
template <typename Visit>
void each_tensor(const GPT2Config& config, Visit visit) {
    ParameterTable table = parameter_table(config);
    for (int index = 0; index < kParameterRows; index++)
        for (int layer = 0; layer < int(table[size_t(index)].count); layer++)
            if (table[size_t(index)].present) visit(index, table[size_t(index)], layer);
}

// Different numbers everywhere, tiny and large ones among them.
inline GPT2Ptr filled_model(const GPT2Config& config, uint64_t seed) {
    GPT2Ptr model = model_of(config);
    std::vector<real> host;
    uint32_t drawn = 0;
    for (Group group : kStored)
        each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
            host.resize(row.file_size());
            for (real& value : host) {
                Philox random = philox(seed, drawn++, 0, 0, 0);
                value = real(std::ldexp(int32_t(random.word[0]), int(random.word[1] % 64) - 80));
                if (random.word[2] % 50 == 0) value = real(-0.0);
                if (random.word[2] % 50 == 1) value = std::numeric_limits<real>::denorm_min();
                if (random.word[2] % 50 == 2) value = std::numeric_limits<real>::max();
            }
            gpt2_copy_in(model.get(), group, index, layer, host.data());
        });
    return model;
}

// The hash of the bits of some groups; of everything that a checkpoint keeps.
inline uint64_t bits_of(const GPT2* model, std::initializer_list<Group> groups) {
    uint64_t hash = 0;
    std::vector<real> host;
    for (Group group : groups)
        each_tensor(gpt2_config(model), [&](int index, const ParameterRow& row, int layer) {
            host.resize(row.file_size());
            gpt2_copy_out(model, group, index, layer, host.data());
            hash = hash_bytes(host.data(), host.size() * sizeof(real), hash);
        });
    return hash;
}

inline uint64_t bits_of(const GPT2* model) {
    return bits_of(model, {Group::parameters, Group::first_moments, Group::second_moments});
}

struct RawTensor {
    std::string dtype;
    std::vector<size_t> shape;
    std::string bytes;
};
using RawTensors = std::map<std::string, RawTensor>;

inline RawTensors read_raw(const std::string& path) {
    SafetensorsFile file(path);
    std::string content = read_file(path);
    size_t data = 0;
    for (const auto& [name, entry] : file.entries()) data = std::max(data, entry.end);
    data = content.size() - data;
    RawTensors tensors;
    for (const auto& [name, entry] : file.entries())
        tensors[name] = {entry.dtype, entry.shape,
                         content.substr(data + entry.begin, entry.end - entry.begin)};
    return tensors;
}

inline void write_raw(const std::string& path, const RawTensors& tensors) {
    SafetensorsWriter writer(path);
    for (const auto& [name, tensor] : tensors)
        writer.add(name, tensor.dtype, tensor.shape, tensor.bytes.data());
    writer.commit();
}
