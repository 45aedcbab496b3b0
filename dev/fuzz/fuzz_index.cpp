// model.safetensors.index.json beside four shards: what is accepted names files of the folder, and
// each tensor in the one that has it.
#include "fuzz.h"

FUZZ_JSON_MUTATOR

namespace {

void write_shards() {
    const std::vector<std::pair<const char*, std::vector<const char*>>> kShards = {
        {"a.safetensors", {"one", "two"}},
        {"b.safetensors", {"three"}},
        {"c.safetensors", {"one", "four"}},
        {"d.safetensors", {}}};
    const float numbers[] = {1, 2};
    for (const auto& [file, names] : kShards) {
        SafetensorsWriter writer(fuzz::path(file));
        for (const char* name : names) writer.add(name, "F32", {2}, numbers);
        writer.commit();
    }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    write_shards();
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    std::string index = fuzz::path("model.safetensors.index.json");
    fuzz::put("model.safetensors.index.json", fuzz::text_of(data, size));
    fuzz::accepts([&] { describe_json(MappedFile(index), "model.safetensors.index.json"); });
    std::optional<ModelFiles> files;
    if (!fuzz::accepts([&] { files.emplace(fuzz::folder()); })) return 0;
    ShardIndex read = read_shard_index(index);
    size_t tensors = 0;
    for (const SafetensorsFile& file : files->files()) {
        fuzz::require(fs::path(file.path()).parent_path() == fuzz::folder(), "in the folder");
        tensors += file.entries().size();
    }
    fuzz::require(tensors == read.file_of.size(), "no tensor is left over");
    ordered_json map = ordered_json::object();
    for (const auto& [name, file] : read.file_of) {
        fuzz::require(files->file_of(name).path() == fuzz::path(file), "where the index says");
        map[name] = file;
    }
    fuzz::put("model.safetensors.index.json", json_text(ordered_json{{"weight_map", map}}, -1));
    fuzz::require(ModelFiles(fuzz::folder()).names() == files->names(), "written, it is the same");
    fuzz::accepts([&] { place_tensors(*files, GPT2Config()); });
    return 0;
}
