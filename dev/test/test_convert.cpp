// The tests of convert.h: models in other numbers, in shards and in llm.c's files, files that were
// damaged, and what is said of a path.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>
#include <random>

#include "../../convert.h"
#include "models.h"
#include "saved.h"
#include "tools.h"

namespace {

uint64_t parameter_bits(const GPT2* model) { return bits_of(model, {Group::parameters}); }

// Models that every form can hold: of two layers with a prime vocabulary, of one channel, and of a
// vocabulary that needs no padding.
std::vector<GPT2Config> plain_configs() {
    std::vector<GPT2Config> configs = {odd_configs()[0], odd_configs()[3], odd_configs()[0]};
    configs[2].vocab_size = 128, configs[2].heads = 5, configs[2].layers = 1;
    return configs;
}

// Numbers of a trained model's size, which fp16 holds too.
GPT2Ptr mild_model(const GPT2Config& config, unsigned seed) {
    GPT2Ptr model = model_of(config);
    for (Group group : kStored)
        each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
            Buffer host(row.file_size());
            host.normal(seed++, index % 3 == 0 ? 3e-6 : 0.3);
            if (group == Group::second_moments)
                for (real& value : host) value = std::abs(value);
            gpt2_copy_in(model.get(), group, index, layer, host);
        });
    return model;
}

std::string saved(const GPT2* model, const Tokenizer* tokenizer = nullptr) {
    std::string folder = test_folder();
    save_model(model, tokenizer, folder);
    return folder;
}

void save_step(const std::string& run, uint64_t step, const GPT2* model,
               const Tokenizer* tokenizer = nullptr, const ordered_json& state = {}) {
    Checkpoint content = {step, gpt2_config(model), view_of(model), tokenizer, state, true};
    EXPECT_EQ(save_checkpoint(run, content, {}), "");
}

struct Wish {
    std::string dtype = "fp32";
    size_t limit = 0;
    const Tokenizer* tokenizer = nullptr;
};

void export_to(const std::string& out, const std::string& model, const Wish& wish = {}) {
    ExportRequest request;
    request.model = open_model(resolve_model(model));
    request.out = out, request.tokenizer = wish.tokenizer;
    request.format = export_format(wish.dtype), request.max_shard_bytes = wish.limit;
    export_model(request);
}

// What is at `path`, loaded into a new model.
GPT2Ptr loaded(const std::string& path) {
    GPT2Ptr model = model_of(read_any_config(resolve_model(path)));
    load_any_model(model.get(), path);
    return model;
}

std::vector<std::string> names_in(const std::string& folder) {
    std::vector<std::string> names;
    for (const auto& item : fs::directory_iterator(folder))
        names.push_back(item.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
}

// ---- numbers

// Of all halves (or bfloat16s) the nearest to a value, and of two equally near the even one.
template <typename Widen>
uint16_t nearest_of_all(double value, uint16_t infinity, Widen widen) {
    auto value_of = [&](int i) {  // infinity stands where the next number would be
        if (i < infinity) return double(widen(uint16_t(i)));
        return 2 * double(widen(uint16_t(i - 1))) - double(widen(uint16_t(i - 2)));
    };
    int sign = std::signbit(value) ? 0x8000 : 0, low = 0, high = infinity;
    double magnitude = std::fabs(value);
    if (magnitude >= value_of(infinity)) return uint16_t(infinity | sign);
    while (high - low > 1) {  // low: the last one that is not above the value
        int middle = (low + high) / 2;
        (value_of(middle) <= magnitude ? low : high) = middle;
    }
    double below = magnitude - value_of(low), above = value_of(high) - magnitude;
    return uint16_t((below < above || (below == above && low % 2 == 0) ? low : high) | sign);
}

TEST(Convert, RoundsToTheNearestAndTiesToEven) {
    std::mt19937_64 generator(1);
    auto check = [](double value) {
        float odd = to_odd_float(value);
        EXPECT_EQ(float_to_half(odd), nearest_of_all(value, 0x7c00, half_to_float)) << value;
        EXPECT_EQ(float_to_bfloat16(odd), nearest_of_all(value, 0x7f80, bfloat16_to_float))
            << value;
    };
    for (int i = 0; i < 20000; i++) {
        uint64_t bits = generator();
        float value;
        memcpy(&value, &bits, sizeof(value));
        if (std::isfinite(value)) check(value);
        check(std::ldexp(double(bits), -64 + int(generator() % 48) - 30));  // where halves are
        double near = half_to_float(uint16_t(bits & 0x7bff));  // ties, and what is beside them
        double next = half_to_float(uint16_t((bits & 0x7bff) + 1));
        if (!std::isfinite(next)) next = 65536;
        double tie = (near + next) / 2;
        for (double beside : {near, -tie, std::nextafter(tie, 0), std::nextafter(tie, 1e9)})
            check(beside);
    }
    EXPECT_EQ(float_to_half(65519.996f), 0x7bff);
    EXPECT_EQ(float_to_half(65520), 0x7c00);
    EXPECT_EQ(float_to_half(-0.0f), 0x8000);
    EXPECT_EQ(float_to_bfloat16(-0.0f), 0x8000);
    EXPECT_TRUE(std::isnan(half_to_float(float_to_half(std::nanf("")))));
    EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(std::nanf("")))));
    for (int i = 0; i < 1 << 16; i++) {
        float half = half_to_float(uint16_t(i)), wide = bfloat16_to_float(uint16_t(i));
        if (std::isfinite(half)) { EXPECT_EQ(float_to_half(half), i); }
        if (std::isfinite(wide)) { EXPECT_EQ(float_to_bfloat16(wide), i); }
    }
}

TEST(Convert, SizesAreBytesWithOrWithoutAUnit) {
    EXPECT_EQ(parse_size("1"), 1u);
    EXPECT_EQ(parse_size("5GB"), 5000000000u);
    EXPECT_EQ(parse_size("500MB"), 500000000u);
    EXPECT_EQ(parse_size("20KB"), 20000u);
    EXPECT_EQ(parse_size("2KiB"), 2048u);
    EXPECT_EQ(parse_size("1GiB"), size_t(1) << 30);
    for (const char* wrong : {"", "0", "GB", "-1", "5 GB", "5gb", "1.5GB", "5GBB", "999999999999TB",
                              "99999999999999999999"})
        EXPECT_EQ(parse_size(wrong), 0u) << wrong;
}

// ---- folders

TEST(Export, AFolderInFp32HoldsTheSameBits) {
    for (const GPT2Config& config : odd_configs()) {
        GPT2Ptr model = filled_model(config, 31);
        std::string from = saved(model.get()), out = test_folder() + "/deep/new/";
        export_to(out, from);
        EXPECT_TRUE(read_model_config(out) == config);
        EXPECT_EQ(parameter_bits(loaded(out).get()), parameter_bits(model.get()));
        std::vector<std::string> names = {"README.md", "config.json", "generation_config.json",
                                          "model.safetensors"};
        EXPECT_EQ(names_in(out), names);
        auto written = read_raw(join_path(out, "model.safetensors"));
        auto expected = read_raw(join_path(from, "model.safetensors"));
        ASSERT_EQ(written.size(), expected.size());
        for (const auto& [name, tensor] : expected) {
            EXPECT_EQ(written[name].bytes, tensor.bytes) << name;
            EXPECT_EQ(written[name].shape, tensor.shape) << name;
        }
    }
}

TEST(Export, NarrowFormatsAreReadAsTheRoundedNumbers) {
    for (const GPT2Config& config : odd_configs())
        for (const char* dtype : {"bf16", "fp16"}) {
            GPT2Ptr model = mild_model(config, 5);
            std::string out = test_folder() + "/new";
            export_to(out, saved(model.get()), {dtype, 0, nullptr});
            EXPECT_EQ(read_json_object(join_path(out, "config.json"))["torch_dtype"],
                      export_format(dtype).torch_name);
            GPT2Ptr other = loaded(out);
            bool half = *dtype == 'f';
            each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
                std::vector<real> before(row.file_size()), after(row.file_size());
                gpt2_copy_out(model.get(), Group::parameters, index, layer, before.data());
                gpt2_copy_out(other.get(), Group::parameters, index, layer, after.data());
                for (size_t i = 0; i < before.size(); i++) {
                    uint16_t bits = half ? nearest_of_all(before[i], 0x7c00, half_to_float)
                                         : nearest_of_all(before[i], 0x7f80, bfloat16_to_float);
                    EXPECT_EQ(after[i], half ? half_to_float(bits) : bfloat16_to_float(bits));
                }
            });
        }
}

TEST(Export, ANumberThatWouldBecomeInfiniteIsRefusedByName) {
    GPT2Config config = odd_configs()[0];
    GPT2Ptr model = mild_model(config, 6);
    std::vector<real> bias(size_t(config.channels), 65520);
    gpt2_copy_in(model.get(), Group::parameters, k_fcprojb, 1, bias.data());
    std::string from = saved(model.get()), out = test_folder() + "/new";
    expect_failure(
        [&] {
            export_to(out, from, {"fp16", 0, nullptr});
        },
        2,
        join_path(from, "model.safetensors") +
            ": transformer.h.1.mlp.c_proj.bias: holds 65520, and fp16 ends at 65504");
    EXPECT_FALSE(fs::exists(out));
    export_to(out, from, {"bf16", 0, nullptr});
    bias[3] = real(3.4e38);
    gpt2_copy_in(model.get(), Group::parameters, k_fcprojb, 1, bias.data());
    from = saved(model.get()), out = test_folder() + "/new.bin";
    expect_failure(
        [&] {
            export_to(out, from, {"bf16", 0, nullptr});
        },
        2, "c_proj.bias: holds 3.4e+38");
    EXPECT_EQ(names_in(fs::path(out).parent_path()), std::vector<std::string>());
    export_to(out, from);
}

TEST(Export, ShardsOfAnySizeHoldTheSameBits) {
    for (const GPT2Config& config : odd_configs())
        for (size_t limit : {1, 500, 3000, 1 << 20}) {
            if (limit < 3000 && config.layers > 2) continue;  // hundreds of files, each synced
            GPT2Ptr model = filled_model(config, 32);
            std::string out = test_folder() + "/new";
            export_to(out, saved(model.get()), {"fp32", limit, nullptr});
            EXPECT_TRUE(read_model_config(out) == config);
            EXPECT_EQ(parameter_bits(loaded(out).get()), parameter_bits(model.get()));
            ModelFiles files(out);
            bool small = limit == 1 << 20 || (config.channels == 1 && limit > 1);
            EXPECT_EQ(files.files().size() == 1, small);
            size_t total = 0;
            for (const SafetensorsFile& file : files.files()) {
                size_t bytes = 0;
                for (const auto& [name, entry] : file.entries()) bytes += entry.end - entry.begin;
                EXPECT_TRUE(bytes <= limit || file.entries().size() == 1);
                total += bytes;
            }
            if (small) continue;
            json index = read_json_object(join_path(out, "model.safetensors.index.json"));
            EXPECT_EQ(index["metadata"]["total_size"], total);
            std::string again = test_folder() + "/again";
            export_to(again, out);
            EXPECT_EQ(parameter_bits(loaded(again).get()), parameter_bits(model.get()));
        }
}

// A model in three shards; edit(change) changes model.safetensors.index.json.
struct ShardedModel {
    std::string folder = test_folder() + "/sharded";
    std::string index = join_path(folder, "model.safetensors.index.json");
    ShardedModel() {
        GPT2Ptr model = filled_model(odd_configs()[0], 33);
        export_to(folder, saved(model.get()), {"fp32", 9500, nullptr});
    }
    template <typename Edit>
    void edit(Edit change) const {
        json root = read_json_object(index);
        change(root);
        put_file(index, root.dump());
    }
    std::string shard(int i) const {
        return join_path(folder, format("model-%05d-of-00003.safetensors", i));
    }
    void expect_refused(const std::string& part) const {
        expect_failure([&] { read_model_config(folder); }, 2, part);
        expect_failure([&] { loaded(folder); }, 2, part);
        EXPECT_FALSE(describe_path(folder).intact);
    }
};

TEST(Sharded, HostileIndexesAreRefused) {
    const std::string wte = "transformer.wte.weight", lnf = "transformer.ln_f.weight";
    struct Case {
        const char* part;
        std::function<void(json&)> change;
    };
    auto place = [&](const std::string& tensor, json value) {
        return [=](json& root) { root["weight_map"][tensor] = value; };
    };
    const Case cases[] = {
        {"weight_map: transformer.wte.weight: \"/etc/passwd\" is no", place(wte, "/etc/passwd")},
        {"is no safetensors file", place(wte, "/tmp/x.safetensors")},
        {"is no safetensors file", place(wte, "../x.safetensors")},
        {"is no safetensors file", place(wte, "..")},
        {"is no safetensors file", place(wte, ".hidden.safetensors")},
        {"is no safetensors file", place(wte, "a/b.safetensors")},
        {"is no safetensors file", place(wte, "a\\b.safetensors")},
        {"is no safetensors file", place(wte, std::string("a\0.safetensors", 14))},
        {"is no safetensors file", place(wte, "a\n.safetensors")},
        {"is no safetensors file", place(wte, "model.bin")},
        {"is no safetensors file", place(wte, "")},
        {"is no safetensors file", place(wte, 7)},
        {"is no safetensors file", place(wte, nullptr)},
        {"is no safetensors file", place(wte, json::array({"x.safetensors"}))},
        {"the index says that it is in nothing.safetensors", place(wte, "nothing.safetensors")},
        {"transformer.wte.weight: the index says that it is in model-00003",
         place(wte, "model-00003-of-00003.safetensors")},
        {"a.safetensors: cannot open", place("more", "a.safetensors")},
        {"missing; the index says that it is here",
         place("more", "model-00001-of-00003.safetensors")},
        {"the index says that it is not there", [&](json& root) { root["weight_map"].erase(lnf); }},
        {"weight_map: no object", [](json& root) { root.erase("weight_map"); }},
        {"weight_map: no object", [](json& root) { root["weight_map"] = json::object(); }},
        {"weight_map: no object", [](json& root) { root["weight_map"] = json::array(); }},
        {"weight_map: no object", [](json& root) { root["weight_map"] = "x"; }},
        {"holds no JSON object", [](json& root) { root = json::array(); }},
        {"total_size 1, the tensors have", [](json& root) { root["metadata"]["total_size"] = 1; }},
        {"total_size \"1\" is not a number",
         [](json& root) { root["metadata"]["total_size"] = "1"; }},
    };
    ShardedModel model;
    std::string intact = read_file(model.index);
    for (const Case& hostile : cases) {
        put_file(model.index, intact);
        model.edit(hostile.change);
        model.expect_refused(hostile.part);
    }
    put_file(model.index, intact);
    model.edit([](json& root) { root.erase("metadata"); });
    EXPECT_TRUE(describe_path(model.folder).intact) << describe_path(model.folder).text;
    put_file(model.index, "{\"weight_map\":{}," + intact.substr(1));
    model.expect_refused("\"weight_map\" is there twice");
    put_file(model.index, std::string(70, '[') + std::string(70, ']'));
    model.expect_refused("nested deeper");
}

TEST(Sharded, WrongFilesBesideARightIndexAreRefused) {
    {
        ShardedModel model;
        fs::remove(model.shard(2));
        model.expect_refused("model-00002-of-00003.safetensors: cannot open");
        fs::copy_file(model.shard(1), model.shard(2));
        model.expect_refused("the index says that it is in model-00001");
    }
    {
        ShardedModel model;  // one tensor under two names, each in a file of its own
        auto tensors = read_raw(model.shard(3));
        tensors["ln_f.weight"] = tensors["transformer.ln_f.weight"];
        write_raw(model.shard(3), tensors);
        model.edit([&](json& root) {
            root.erase("metadata");
            root["weight_map"]["ln_f.weight"] = fs::path(model.shard(3)).filename().string();
        });
        model.expect_refused("has no such tensor, or has it already");
    }
    ShardedModel model;
    for (int i = 1; i <= 3; i++) {  // as the cache of the hub has it
        std::string blob = join_path(test_folder(), "blob");
        fs::rename(model.shard(i), blob);
        fs::create_symlink(blob, model.shard(i));
    }
    loaded(model.folder);
    std::string content = read_file(model.shard(2));
    for (size_t size = 0; size<content.size(); size += size> 3000 ? 97 : 1) {
        put_file(model.shard(2), content.substr(0, size));
        EXPECT_EQ(error_of([&] { ModelFiles files(model.folder); }).substr(0, 2), "2 ") << size;
    }
    put_file(model.shard(2), content + "x");
    model.expect_refused("1 bytes after the last tensor");
}

TEST(Export, AFolderHasWhatOtherProgramsAskFor) {
    std::string text;
    for (int i = 0; i < 200; i++) text += "the cat sat on mat " + std::to_string(i * i) + ".\n";
    Tokenizer bpe = Tokenizer::train_bpe(text, 290), bytes = Tokenizer::bytes();
    Tokenizer chars = Tokenizer::chars(text);
    for (const Tokenizer* tokenizer : {&bpe, &bytes, &chars}) {
        GPT2Config config = odd_configs()[0];
        config.vocab_size = tokenizer->vocab_size() + 3;
        std::string out = test_folder() + "/new";
        export_to(out, saved(mild_model(config, 7).get()), {"bf16", 0, tokenizer});
        EXPECT_EQ(Tokenizer::load(out).fingerprint(), tokenizer->fingerprint());
        int end = tokenizer->end_of_text();
        for (const char* name : {"config.json", "generation_config.json"}) {
            EXPECT_EQ(read_json_object(join_path(out, name))["eos_token_id"], end) << name;
            EXPECT_EQ(read_json_object(join_path(out, name))["bos_token_id"], end) << name;
        }
        json specials = read_json_object(join_path(out, "special_tokens_map.json"));
        EXPECT_EQ(specials["eos_token"], "<|endoftext|>");
        EXPECT_EQ(read_json_object(join_path(out, "tokenizer_config.json"))["model_max_length"],
                  config.context);
        EXPECT_EQ(fs::exists(join_path(out, "merges.txt")), tokenizer == &bpe);
        EXPECT_EQ(fs::exists(join_path(out, "vocab.json")), tokenizer == &bpe);
        PathDescription description = describe_path(out);
        EXPECT_TRUE(description.intact) << description.text;
        if (tokenizer != &bpe) continue;
        Tokenizer merges = Tokenizer::load(join_path(out, "merges.txt"));
        EXPECT_EQ(merges.encode(text), bpe.encode(text));
        json vocabulary = read_json_object(join_path(out, "vocab.json"));
        EXPECT_EQ(vocabulary.size(), size_t(bpe.vocab_size()));
        EXPECT_EQ(vocabulary["<|endoftext|>"], end);
        EXPECT_EQ(vocabulary["\xC4\xA0"], bpe.encode(" ").at(0));  // a space is spelt so
        EXPECT_EQ(vocabulary["at"], bpe.encode("at").at(0));
    }
}

TEST(Export, TheModelCardSaysHowItWasTrainedAndMarksUpNothing) {
    std::string run = test_folder();
    GPT2Ptr model = mild_model(odd_configs()[0], 8);
    ordered_json state = {{"tokens", 12345},
                          {"best_val_loss", 9.5},
                          {"settings", {{"schedule", "wsd"}, {"steps", 99}}},
                          {"run", {{"seed", 7}, {"data", "ab`|<b>\n# x"}, {"layers", 99}}}};
    save_step(run, 40, model.get(), nullptr, state);
    put_file(join_path(run, "log.jsonl"),
             "{\"step\":20,\"val_loss\":1}\n{\"step\":40,\"val_loss\":2.5}\n"
             "{\"step\":40}\nno record \"val_loss\"\n" +
                 std::string(100, '[') + "\"val_loss\"\n{\"step\":40,\"val_lo");
    std::string out = test_folder() + "/new";
    export_to(out, join_path(run, "last"));
    std::string card = read_file(join_path(out, "README.md"));
    for (const char* line : {"library_name: transformers\n", "pipeline_tag: text-generation\n",
                             "| steps | 40 |\n", "| tokens seen | 12345 |\n", "| seed | 7 |\n",
                             "| validation loss, nats a token | 2.5000 |\n", "| layers | 2 |\n",
                             "| schedule | wsd |\n", "| parameters | 6450 |\n",
                             "| hash of the data | ab\\`\\|\\<b\\>?\\# x |\n"})
        EXPECT_NE(card.find(line), std::string::npos) << line << card;
    EXPECT_EQ(card.find("99"), std::string::npos) << card;
    fs::remove(join_path(run, "log.jsonl"));
    export_to(out + "2", run);
    card = read_file(join_path(out + "2", "README.md"));
    EXPECT_NE(card.find("best validation loss, nats a token | 9.5 |"), std::string::npos) << card;
}

TEST(Export, AnOutThatIsInUseIsRefusedAndStays) {
    std::string from = saved(mild_model(odd_configs()[0], 9).get()), folder = test_folder();
    put_file(folder + "/note", "mine");
    expect_failure([&] { export_to(folder, from); }, 2,
                   "is there already; give another name, or remove it first");
    expect_failure([&] { export_to(from, from); }, 2, "is there already");
    put_file(folder + "/x.bin", "mine");
    expect_failure([&] { export_to(folder + "/x.bin", from); }, 2, "is there already");
    expect_failure([&] { export_to(folder + "/note", from); }, 2, "is a file; FILE.bin is written");
    fs::create_directory(folder + "/y.bin");
    expect_failure([&] { export_to(folder + "/y.bin", from); }, 2, "is a folder");
    EXPECT_EQ(read_file(folder + "/x.bin") + read_file(folder + "/note"), "minemine");
    fs::create_directory(folder + "/empty");
    put_file(folder + "/z.bin", "");
    export_to(folder + "/empty", from);
    export_to(folder + "/z.bin", from);
    std::vector<std::string> names = {"empty", "note", "x.bin", "y.bin", "z.bin"};
    EXPECT_EQ(names_in(folder), names);
    expect_failure([&] { export_to("/proc/none/new", from); }, 1, "cannot create");
}

TEST(Export, RedundantTensorsThatSaySomethingNewAreRefused) {
    std::string from = saved(mild_model(odd_configs()[0], 10).get());
    auto tensors = read_raw(join_path(from, "model.safetensors"));
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"];
    write_raw(join_path(from, "model.safetensors"), tensors);
    export_to(test_folder() + "/new", from);
    tensors["lm_head.weight"].bytes[5] ^= 1;
    write_raw(join_path(from, "model.safetensors"), tensors);
    expect_failure([&] { export_to(test_folder() + "/new", from); }, 2, "the head is tied");
}

// ---- llm.c

// The file as its format is described: header, then every tensor of all layers, as float32.
std::string llmc_bytes(const GPT2* model) {
    const GPT2Config& c = gpt2_config(model);
    std::vector<int32_t> header(256);
    int padded = (c.vocab_size + 127) / 128 * 128;
    int32_t words[] = {20240326, 3, c.context, c.vocab_size, c.layers, c.heads, c.channels, padded};
    std::copy(std::begin(words), std::end(words), header.begin());
    std::string bytes(reinterpret_cast<char*>(header.data()), 1024);
    for (int index : {k_wte, k_wpe, k_ln1w, k_ln1b, k_qkvw, k_qkvb, k_attprojw, k_attprojb, k_ln2w,
                      k_ln2b, k_fcw, k_fcb, k_fcprojw, k_fcprojb, k_lnfw, k_lnfb}) {
        ParameterRow row = parameter_table(c)[size_t(index)];
        for (int layer = 0; layer < int(row.count); layer++) {
            std::vector<real> host(row.file_size());
            if (row.present) gpt2_copy_out(model, Group::parameters, index, layer, host.data());
            std::vector<float> values(host.begin(), host.end());
            if (index == k_wte) values.resize(size_t(padded) * size_t(c.channels));
            bytes.append(reinterpret_cast<char*>(values.data()), values.size() * 4);
        }
    }
    return bytes;
}

std::string put_llmc(const GPT2* model) {
    std::string path = join_path(test_folder(), "model.bin");
    put_file(path, llmc_bytes(model));
    return path;
}

void set_word(std::string* bytes, size_t index, int32_t value) {
    memcpy(bytes->data() + 4 * index, &value, 4);
}

TEST(Llmc, ModelsInFloat32KeepEveryBitBothWays) {
    for (const GPT2Config& config : plain_configs()) {
        GPT2Ptr model = filled_model(config, 41);
        std::string path = put_llmc(model.get()), out = test_folder() + "/new.bin";
        EXPECT_TRUE(read_any_config(resolve_model(path)) == config);
        EXPECT_EQ(parameter_bits(loaded(path).get()), parameter_bits(model.get()));
        EXPECT_EQ(any_conversion_note(path), "");
        export_to(out, saved(model.get()));
        EXPECT_TRUE(read_file(out) == read_file(path));
        export_to(out + "-folder", path);
        EXPECT_EQ(parameter_bits(loaded(out + "-folder").get()), parameter_bits(model.get()));
        export_to(out + ".again.bin", path);
        EXPECT_TRUE(read_file(out + ".again.bin") == read_file(path));
    }
}

TEST(Llmc, ModelsInBfloat16AreTheRoundedNumbers) {
    for (const GPT2Config& config : plain_configs()) {
        GPT2Ptr model = mild_model(config, 42);
        std::string from = saved(model.get()), out = test_folder() + "/new.bin";
        export_to(out, from, {"bf16", 0, nullptr});
        export_to(out + "-folder", from, {"bf16", 0, nullptr});
        EXPECT_EQ(parameter_bits(loaded(out).get()), parameter_bits(loaded(out + "-folder").get()));
        std::string wide = llmc_bytes(model.get()), narrow = read_file(out);
        EXPECT_EQ(narrow.size() - 1024, (wide.size() - 1024) / 2);
        EXPECT_NE(any_conversion_note(out).find("BF16"), std::string::npos);
        export_to(out + ".again.bin", out, {"bf16", 0, nullptr});
        EXPECT_TRUE(read_file(out + ".again.bin") == narrow);
    }
}

TEST(Llmc, AModelWithoutBiasesHasZerosThere) {
    GPT2Config config = odd_configs()[0];
    config.bias = false;
    GPT2Ptr model = mild_model(config, 43);
    std::string out = test_folder() + "/new.bin";
    export_to(out, saved(model.get()));
    EXPECT_TRUE(read_file(out) == llmc_bytes(model.get()));
    config.bias = true;
    EXPECT_TRUE(LlmcModel(out).config() == config);
    std::vector<real> bias(size_t(config.channels), 1);
    gpt2_copy_out(loaded(out).get(), Group::parameters, k_fcprojb, 1, bias.data());
    EXPECT_EQ(bias, std::vector<real>(bias.size(), 0));
}

TEST(Llmc, WhatItsModelsCannotBeIsRefusedWithTheReason) {
    std::pair<void (*)(GPT2Config&), const char*> cases[] = {
        {[](GPT2Config& c) { c.tied = false; }, "its head is not tied"},
        {[](GPT2Config& c) { c.hidden = 7; }, "its hidden width is 7, not 60"},
        {[](GPT2Config& c) { c.layer_norm_epsilon = 1e-6; }, "layer_norm_epsilon is 1e-06"}};
    std::string out = test_folder() + "/new.bin";
    for (const auto& [change, part] : cases) {
        GPT2Config config = odd_configs()[0];
        change(config);
        std::string from = saved(mild_model(config, 44).get());
        expect_failure([&] { export_to(out, from); }, 2, part);
        EXPECT_FALSE(fs::exists(out));
    }
    std::string from = saved(mild_model(odd_configs()[0], 45).get());
    expect_failure([&] { export_to(out, from, {"fp16", 0, nullptr}); }, 2, "llm.c has none");
    expect_failure([&] { export_to(out, from, {"fp32", 5, nullptr}); }, 2, "--max-shard-size");
    GPT2Config other = odd_configs()[0];
    other.heads = 5;
    export_to(out, from);
    expect_failure([&] { load_any_model(model_of(other).get(), out); }, 2, "of other sizes");
}

TEST(Llmc, EveryTruncationAndAnExtraByteAreRefused) {
    std::string path = put_llmc(filled_model(plain_configs()[0], 46).get());
    std::string bytes = read_file(path);
    for (size_t size = 0; size < bytes.size(); size += size < 1100 ? 1 : 61) {
        put_file(path, bytes.substr(0, size));
        expect_failure([&] { LlmcModel file(path); }, 2, path);
    }
    put_file(path, bytes.substr(0, bytes.size() - 1));
    expect_failure([&] { open_model(resolve_model(path)); }, 2, "cut?");
    put_file(path, bytes + "x");
    expect_failure([&] { open_model(resolve_model(path)); }, 2, "something follows");
    put_file(path, "GGUF");
    expect_failure([&] { resolve_model(path); }, 2, "a file, and no model of llm.c");
}

// A vocabulary may be larger than it was, up to the padding, and heads may be any that fit: nothing
// else in the file depends on either.
TEST(Llmc, EveryFieldOfTheHeaderIsChecked) {
    std::string path = put_llmc(filled_model(plain_configs()[0], 47).get());
    std::string bytes = read_file(path);
    for (size_t word = 0; word < 256; word++)
        for (int32_t value : {0, -1, 1, 2, 7, 16, 36, 1 << 15, 1 << 20, INT_MAX, INT_MIN}) {
            std::string changed = bytes;
            set_word(&changed, word, value);
            if (changed == bytes || (word == 5 && value == 1)) continue;
            put_file(path, changed);
            expect_failure([&] { loaded(path); }, 2, path);
        }
    for (int version : {1, 2, 4, 5, 6}) {
        set_word(&bytes, 1, version);
        put_file(path, bytes);
        expect_failure([&] { LlmcModel file(path); }, 2,
                       version == 5 ? "the header describes" : "byte 4: version");
    }
}

TEST(Llmc, NumbersThatAreNotFiniteAreNamedAndPaddingMustBeZero) {
    GPT2Ptr model = mild_model(plain_configs()[0], 48);
    std::string path = put_llmc(model.get()), bytes = read_file(path);
    float nan = std::nanf("");
    memcpy(bytes.data() + bytes.size() - 4, &nan, 4);
    put_file(path, bytes);
    expect_failure([&] { loaded(path); }, 2, "transformer.ln_f.bias: holds numbers");
    expect_failure([&] { export_to(test_folder() + "/new", path); }, 2, "transformer.ln_f.bias");
    EXPECT_FALSE(describe_path(path).intact);
    for (const char* dtype : {"fp32", "bf16"})
        for (int at : {37 * 15, 128 * 15 - 1}) {  // the first and the last number of the padding
            std::string out = test_folder() + "/model.bin";
            export_to(out, saved(model.get()), {dtype, 0, nullptr});
            size_t width = *dtype == 'f' ? 4 : 2;
            bytes = read_file(out);
            char& top = bytes[1024 + size_t(at + 1) * width - 1];
            top = char(0x80);  // -0
            put_file(out, bytes);
            loaded(out);
            top = 1;
            put_file(out, bytes);
            expect_failure([&] { loaded(out); }, 2,
                           format("byte %zu: not zero", 1024 + size_t(at) * width));
        }
}

// A state as llm.c writes it: header, moments and weights in the order of the model's file.
std::string llmc_state(const GPT2* model, bool weights, bool shuffle) {
    std::vector<int32_t> header(256);
    header[0] = 20240527, header[1] = 1, header[2] = 1, header[4] = weights, header[5] = shuffle;
    header[10] = 321, header[20] = 77, header[22] = 78, header[30] = 2, header[32] = 9;
    std::string bytes(reinterpret_cast<char*>(header.data()), 1024);
    GPT2Config config = gpt2_config(model);
    for (Group group : {Group::first_moments, Group::second_moments, Group::parameters}) {
        if (group == Group::parameters && !weights) continue;
        GPT2Ptr part = model_of(config);  // whose parameters are this part
        each_tensor(config, [&](int index, const ParameterRow& row, int layer) {
            std::vector<real> host(row.file_size());
            gpt2_copy_out(model, group, index, layer, host.data());
            gpt2_copy_in(part.get(), Group::parameters, index, layer, host.data());
        });
        bytes += llmc_bytes(part.get()).substr(1024);
    }
    if (!shuffle) return bytes;
    uint64_t shards = 3, windows = 5;
    bytes.append(reinterpret_cast<char*>(&shards), 8).append(12, 'a');
    bytes.append(reinterpret_cast<char*>(&windows), 8).append(20, 'b').append(2520, 'c');
    return bytes;
}

void export_with_state(const std::string& out, const std::string& model, const LlmcState& state) {
    ExportRequest request;
    request.model = open_model(model), request.state = &state, request.out = out;
    export_model(request);
}

TEST(Llmc, AStateGivesItsMomentsAndItsWeights) {
    for (int kind = 0; kind < 4; kind++) {
        bool weights = kind % 2 == 1, shuffle = kind >= 2;
        GPT2Ptr model = mild_model(plain_configs()[0], 50);
        std::string folder = test_folder(), path = folder + "/model.bin", out = folder + "/new";
        export_to(path, saved(model.get()), {weights ? "bf16" : "fp32", 0, nullptr});
        put_file(folder + "/state.bin", llmc_state(model.get(), weights, shuffle));
        LlmcState state(folder + "/state.bin", LlmcModel(path));
        EXPECT_EQ(state.step(), 321);
        EXPECT_EQ(state.shuffles(), shuffle);
        export_with_state(out, path, state);
        EXPECT_EQ(parameter_bits(loaded(out).get()), parameter_bits(model.get()));
        EXPECT_EQ(SafetensorsFile(out + "/optimizer.safetensors").metadata().at("step"), "321");
        save_step(folder, 1, model.get());
        auto expected = read_raw(folder + "/step_00000001/optimizer.safetensors");
        auto written = read_raw(out + "/optimizer.safetensors");
        ASSERT_EQ(written.size(), expected.size());
        for (const auto& [name, tensor] : expected)
            EXPECT_TRUE(written[name].bytes == tensor.bytes) << name;
        EXPECT_TRUE(describe_path(out).intact);
        EXPECT_NE(read_file(out + "/README.md").find("| steps | 321 |"), std::string::npos);
    }
}

TEST(Llmc, AStateThatIsDamagedOrOfAnotherModelIsRefused) {
    GPT2Ptr model = mild_model(plain_configs()[0], 51), other = mild_model(plain_configs()[0], 151);
    std::string folder = test_folder(), path = folder + "/state.bin", out = folder + "/new";
    export_to(folder + "/model.bin", saved(model.get()), {"bf16", 0, nullptr});
    LlmcModel file(folder + "/model.bin");
    auto expect_refused = [&](const std::string& bytes, const std::string& part) {
        put_file(path, bytes);
        expect_failure([&] { LlmcState state(path, file); }, 2, part);
    };
    for (bool shuffle : {false, true}) {
        std::string bytes = llmc_state(model.get(), true, shuffle);
        for (size_t size = 0; size < bytes.size(); size += size < 1100 ? 1 : 611)
            expect_refused(bytes.substr(0, size), path);
        for (size_t cut : {1, 2519, 2520, 2521, 2539, 2541, 2549, 2560, 2569})
            expect_refused(bytes.substr(0, bytes.size() - cut), "cut, or");
        expect_refused(bytes + "x", "cut, or the state of another");
        for (size_t word = 0; word < 256; word++) {
            bool free = (word >= 20 && word < 24) || (word >= 30 && word < 34) || word == 10;
            for (int32_t value : {0, -1, 1, 2, INT_MAX}) {
                std::string changed = bytes;
                set_word(&changed, word, value);
                if (changed == bytes || (free && (word != 10 || value >= 0))) continue;
                expect_refused(changed, path);
            }
        }
    }
    std::string bytes = llmc_state(model.get(), true, true);
    uint64_t huge = ~uint64_t(0);
    for (size_t behind : {2520 + 20 + 8, 2520 + 20 + 8 + 12 + 8}) {
        std::string changed = bytes;
        memcpy(changed.data() + bytes.size() - behind, &huge, 8);
        expect_refused(changed, "cut, or");
    }
    auto refuse_export = [&](const std::string& state_bytes, const char* part) {
        put_file(path, state_bytes);
        LlmcState state(path, file);
        expect_failure([&] { export_with_state(out, file.path(), state); }, 2, part);
        EXPECT_FALSE(fs::exists(out));
    };
    refuse_export(llmc_state(other.get(), true, false), "is it of another step?");
    bytes = llmc_state(model.get(), true, false);
    size_t numbers = (bytes.size() - 1024) / 3;
    std::string negative = bytes;
    negative[1024 + 2 * numbers - 1] ^= char(0x80);  // the sign of the last second moment
    refuse_export(negative, "ln_f.bias: holds second moments below zero");
    bytes[1024 + 37 * 15 * 4 + 3] = 1;  // the moment of a row that pads the vocabulary
    refuse_export(bytes, "not zero");
}

// ---- damage

// A folder in memory where there is one: verifying asks the kernel to drop what it holds of a file,
// which on a disk writes each of many thousand changes out.
struct MemoryFolder {
    std::string path;
    MemoryFolder() {
        std::string pattern = "/dev/shm/test_gpt2_XXXXXX";
        path = mkdtemp(pattern.data()) != nullptr ? pattern : test_folder();
    }
    ~MemoryFolder() {
        std::error_code ignored;
        fs::remove_all(path, ignored);
    }
};

// Every bit of every file of a checkpoint, changed, and every length that it may be cut to: refused
// or, where it only spells the same trainer.json in another way, harmless.
TEST(Damage, EveryBitAndEveryTruncationOfACheckpointIsNoticed) {
    GPT2Config config = odd_configs()[3];
    MemoryFolder memory;
    std::string run = memory.path, folder = run + "/step_00000007";
    Tokenizer tokenizer = Tokenizer::chars("a");
    config.vocab_size = tokenizer.vocab_size();
    GPT2Ptr model = filled_model(config, 60);
    ordered_json state = {{"loader", {{"epoch", 0.1}, {"window", 3}}}, {"finished", false}};
    save_step(run, 7, model.get(), &tokenizer, state);
    json intact = verify_checkpoint(folder);
    size_t refused = 0, harmless = 0;
    for (const std::string& name : names_in(folder)) {
        std::string path = join_path(folder, name), content = read_file(path);
        int fd = open(path.c_str(), O_WRONLY);
        ASSERT_GE(fd, 0);
        auto check = [&](size_t at, int bit) {
            try {
                json trainer = verify_checkpoint(folder);
                harmless++;
                EXPECT_TRUE(name == "trainer.json" && trainer == intact)
                    << name << ": byte " << at << ", bit " << bit;
            } catch (const Error& error) {
                refused++;
                EXPECT_EQ(error.exit_code, 2) << error.what();
            }
        };
        for (size_t at = 0; at < content.size(); at++)
            for (int bit = 0; bit < 8; bit++) {
                char changed = char(content[at] ^ (1 << bit));
                ASSERT_EQ(pwrite(fd, &changed, 1, off_t(at)), 1);
                check(at, bit);
                ASSERT_EQ(pwrite(fd, &content[at], 1, off_t(at)), 1);
            }
        for (size_t size = content.size(); size-- > 0;) {
            ASSERT_EQ(ftruncate(fd, off_t(size)), 0);
            check(size, -1);
        }
        ASSERT_EQ(pwrite(fd, content.data(), content.size(), 0), ssize_t(content.size()));
        close(fd);
        EXPECT_EQ(verify_checkpoint(folder), intact);
    }
    printf("files refused: %zu, of %zu that were damaged; %zu read as before\n", refused,
           refused + harmless, harmless);
    EXPECT_LT(harmless, 20u);
}

TEST(Damage, EveryTruncationOfAModelFolderIsRefused) {
    std::string text = "the cat sat on the mat. the dog sat on the cat.\n";
    Tokenizer tokenizer = Tokenizer::train_bpe(text, 262);
    GPT2Config config = odd_configs()[3];
    config.vocab_size = tokenizer.vocab_size();
    std::string out = test_folder() + "/new";
    export_to(out, saved(mild_model(config, 61).get()), {"fp32", 1000, &tokenizer});
    size_t refused = 0;
    for (const std::string& name : names_in(out)) {
        if (name.ends_with(".md") || name == "merges.txt") continue;  // any part of a text is one
        std::string path = join_path(out, name), content = read_file(path);
        bool weights = name.ends_with(".safetensors") || name == "config.json" ||
                       name == "model.safetensors.index.json";
        size_t stride = content.size() > 5000 ? 7 : 1;
        for (size_t size = 0; size + 2 < content.size(); size += stride) {
            put_file(path, content.substr(0, size));
            auto refuses = [](const std::string& error) { return error.substr(0, 2) == "2 "; };
            if (weights) {
                EXPECT_TRUE(refuses(error_of([&] { read_model_config(out); }))) << name << size;
            }
            if (size > 0) {
                EXPECT_TRUE(refuses(error_of([&] { describe_file(path); }))) << name << size;
            }
            refused++;
        }
        put_file(path, content);
    }
    EXPECT_GT(refused, 3000u);
    EXPECT_TRUE(describe_path(out).intact);
}

// Without hashes damage to numbers cannot be seen; damage to what says where they are can.
TEST(Damage, NoBitOfAHeaderMovesANumber) {
    GPT2Config config = odd_configs()[3];
    GPT2Ptr model = mild_model(config, 62), other = model_of(config);
    std::string folder = saved(model.get()), path = join_path(folder, "model.safetensors");
    std::string content = read_file(path);
    size_t header = 8 + size_t(load_bytes<uint64_t>(content.data())), same = 0;
    uint64_t bits = parameter_bits(model.get());
    int fd = open(path.c_str(), O_WRONLY);
    ASSERT_GE(fd, 0);
    for (size_t at = 0; at < header; at++)
        for (int bit = 0; bit < 8; bit++) {
            char changed = char(content[at] ^ (1 << bit));
            ASSERT_EQ(pwrite(fd, &changed, 1, off_t(at)), 1);
            std::string error = error_of([&] { load_model(other.get(), folder); });
            ASSERT_EQ(pwrite(fd, &content[at], 1, off_t(at)), 1);
            if (!error.empty()) {
                EXPECT_EQ(error.substr(0, 2), "2 ") << error;
                continue;
            }
            same++;
            EXPECT_EQ(parameter_bits(other.get()), bits) << "byte " << at << ", bit " << bit;
        }
    close(fd);
    printf("bits of a header: %zu refused, %zu without a meaning\n", 8 * header - same, same);
    EXPECT_LT(same, 400u);  // in __metadata__, which says nothing of the numbers
}

// ---- what a path is

struct DescribedFiles {
    std::string folder = test_folder();
    void expect(const std::string& name, const std::string& content, const std::string& part,
                bool intact = true) const {
        std::string path = join_path(folder, name);
        put_file(path, content);
        PathDescription description = describe_path(path);
        EXPECT_NE(description.text.find(part), std::string::npos)
            << description.text << "\nlacks " << part;
        EXPECT_EQ(description.intact, intact) << description.text;
        EXPECT_EQ(description.text.find('\n'), std::string::npos) << description.text;
    }
};

TEST(Info, KnowsTheFilesOfLlmc) {
    DescribedFiles files;
    GPT2Ptr model = mild_model(plain_configs()[0], 70);
    std::string bytes = llmc_bytes(model.get()), state = llmc_state(model.get(), true, false);
    files.expect("model.bin", bytes, "model of llm.c: GPT-2 of 2 layers, 3 heads");
    files.expect("model.bin", bytes.substr(1), "magic", false);
    files.expect("model.bin", bytes.substr(0, 2000), "cut?", false);
    files.expect("state.bin", state, "version 1: step 321, process 0 of 1, with float32 weights");
    files.expect("state.bin", state.substr(0, 500), "header", false);
    std::string head(1024, '\0');
    set_word(&head, 0, 20240328), set_word(&head, 1, 2), set_word(&head, 2, 2);
    files.expect("tok.bin", head + "\1a\2bc",
                 "tokenizer of llm.c, version 2: 2 tokens; it does not say how text is split");
    files.expect("tok.bin", head + "\1a\2b", "token 1 of 2 is cut", false);
    files.expect("tok.bin", head + "\1a\2bcd", "something follows", false);
    files.expect("tok.bin", head + std::string("\1a\0", 3), "token 1 of 2 is cut", false);
    set_word(&head, 0, 20240327);
    files.expect("debug.bin", head, "debug state of llm.c");
    write_shard(files.folder + "/l.bin", {1, 128000}, true, 4);
    std::string llama = read_file(files.folder + "/l.bin");
    files.expect("l.bin", llama, "token shard, uint32, 2 tokens, largest id 128000, as its hash");
    llama.back() ^= 1;
    files.expect("l.bin", llama, "byte 12: the ids do not match the hash", false);
    write_shard(files.folder + "/s.bin", {1, 2, 700});
    std::string shard = read_file(files.folder + "/s.bin");
    files.expect("s.bin", shard, "token shard, uint16, 3 tokens, largest id 700");
    files.expect("s.bin", shard.substr(0, 1027), "header says 3 tokens", false);
}

TEST(Info, KnowsFilesOfOtherKinds) {
    DescribedFiles files;
    write_npy(files.folder + "/a.npy", {1, 2, 3, 4, 5, 6}, {2, 3});
    std::string array = read_file(files.folder + "/a.npy");
    files.expect("a.npy", array, "NumPy array of integers, 4 bytes each, shape (2, 3)");
    files.expect("a.npy", array.substr(0, 130), "the shape needs", false);
    write_npy(files.folder + "/b.npy", {1, 2}, {2});
    files.expect("b.npy", read_file(files.folder + "/b.npy"),
                 "token shard, .npy of int32, 2 tokens");
    files.expect("pytorch_model.bin", "PK\x03\x04....", "zip archive");
    files.expect("m.gguf", "GGUF....", "llama.cpp");
    files.expect("x.gz", "\x1f\x8b....", "gzip");
    files.expect("merges.txt", "#version: 0.2\na b\n", "merges of a BPE, 258 tokens");
    files.expect("merges.txt", "#version: 0.2\na b\na", "is not two tokens", false);
    files.expect("log.jsonl", "{\"step\":1}\n{\"step\":2}\n",
                 "2 steps and 0 events, the last of step 2");
    files.expect("log.jsonl", "{\"step\":1}\n{\"ste",
                 "1 steps and 0 events, the last of step 1; the last");
    files.expect("log.jsonl", "{\"event\":\"start\",\"step\":0}\n", "0 steps and 1 events");
    files.expect("log.jsonl", "{\"step\":1}\nx\n", "line 2: byte 1: not valid JSON", false);
    files.expect("log.jsonl", "{\"step\":-1}\n", "line 1: no record of a step", false);
    files.expect("noise", std::string("a\0b", 3), "file of no kind that is known here, 3 bytes");
    files.expect("words", "words", "text, 5 bytes");
}

TEST(Info, KnowsJsonByItsName) {
    DescribedFiles files;
    files.expect("vocab.json", R"({"a":0,"b":1})", "vocabulary of a BPE, 2 tokens");
    files.expect("vocab.json", R"({"a":0,"b":0})", "ids are from 0 to 1, each once", false);
    files.expect("vocab.json", R"({"a":0,"b":2})", "b: id 2", false);
    files.expect("vocab.json", R"({"a":0,"a":1})", "\"a\" is there twice", false);
    files.expect("vocab.json", "{}", "0 tokens");
    files.expect("tokenizer_config.json", R"({"x":0})", "settings of a tokenizer, 1 entries");
    files.expect("special_tokens_map.json", "{}", "special tokens of a tokenizer");
    files.expect("generation_config.json", "{}", "settings for generating");
    files.expect("generation_config.json", "{", "not valid JSON", false);
    files.expect("other.json", "[1,2]", "JSON, array of 2 entries");
    files.expect("config.json", R"({"model_type":"gpt2"})", "configuration: GPT-2 of 12 layers");
    files.expect("config.json", R"({"model_type":"llama"})", "this program reads gpt2", false);
    files.expect("trainer.json", R"({"step":1})", "does not match its checksum", false);
    files.expect("model.safetensors.index.json", R"({"weight_map":{"a":"b.safetensors"}})",
                 "index of 1 tensors in 1 safetensors files");
    files.expect("model.safetensors.index.json", R"({"weight_map":{"a":"../b.safetensors"}})",
                 "is no safetensors file", false);
}

// A pipe without a writer, and a device without an end.
TEST(Info, WaitsForNoPipeAndReadsNoDevice) {
    std::string run = test_folder(), step = run + "/step_00000001";
    GPT2Ptr model = mild_model(odd_configs()[3], 72);
    save_step(run, 1, model.get());
    for (const char* name : {"model.safetensors", "config.json", "trainer.json"}) {
        std::string path = join_path(step, name), kept = read_file(path);
        for (bool pipe : {true, false}) {
            fs::remove(path);
            if (!pipe) fs::create_symlink("/dev/zero", path);
            else if (mkfifo(path.c_str(), 0600) != 0) GTEST_SKIP() << "no pipes here";
            expect_failure([&] { describe_file(path); }, 2, "not a regular file");
            expect_failure([&] { verify_checkpoint(step); }, 2, "not a regular file");
            EXPECT_FALSE(describe_path(run).intact);
        }
        fs::remove(path);
        put_file(path, kept);
    }
    EXPECT_TRUE(describe_path(run).intact);
}

TEST(Info, PrintsWhatAFolderHolds) {
    std::string run = test_folder(), step = run + "/step_00000003";
    Tokenizer tokenizer = Tokenizer::chars("a b");
    GPT2Ptr model = mild_model(odd_configs()[0], 71);
    save_step(run, 3, model.get(), &tokenizer);
    put_file(step + "/note\n.txt", "x");
    std::string text = describe_path(step).text;
    for (const char* line :
         {"\n  config.json: ", "\n  model.safetensors: 28360 bytes, as recorded",
          "\n  trainer.json: state of a run at step 3", "\n  note?.txt: text, 1 bytes"})
        EXPECT_NE(text.find(line), std::string::npos) << text;
    put_file(run + "/log.jsonl", "{\"step\":1}\n");
    EXPECT_NE(describe_path(run).text.find("\n  log.jsonl: log of a run, 1 steps and 0 events"),
              std::string::npos);
    fs::remove(step + "/trainer.json");
    put_file(step + "/generation_config.json", "{");
    PathDescription broken = describe_path(step);
    EXPECT_FALSE(broken.intact);
    EXPECT_NE(broken.text.find("\n  generation_config.json: cannot be used: "), std::string::npos);
    std::string only = test_folder();
    tokenizer.save(only);
    EXPECT_EQ(describe_path(only).text.substr(0, 21), "tokenizer of 4 tokens");
}

}  // namespace
