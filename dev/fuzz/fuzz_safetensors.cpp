// Safetensors files: what is accepted has every byte in exactly one tensor, can be read as numbers
// or says why not, and is written and read as the same tensors.
#include "fuzz.h"

namespace {

// Header and data of a file, whatever its length field says.
struct Parts {
    std::string header, data;
};

Parts split(const std::string& text) {
    if (text.size() < 8) return {text, ""};
    size_t length = std::min<size_t>(load_bytes<uint64_t>(text.data()), text.size() - 8);
    return {text.substr(8, length), text.substr(8 + length)};
}

std::string join(const Parts& parts) {
    uint64_t length = parts.header.size();
    return std::string(reinterpret_cast<const char*>(&length), 8) + parts.header + parts.data;
}

// The data as long as the header asks for, if that is little.
void fit_data(Parts& parts) {
    json root = json::parse(parts.header, nullptr, false);
    if (!root.is_object()) return;
    uint64_t end = 0;
    for (const json& value : root) {
        json offsets = value.is_object() ? value.value("data_offsets", json()) : json();
        if (offsets.is_array() && offsets.size() == 2 && offsets[1].is_number_unsigned())
            end = std::max(end, offsets[1].get<uint64_t>());
    }
    if (end < 4096) parts.data.resize(end, 'x');
}

std::string mutated(std::string text, size_t limit) {
    size_t size = text.size();
    text.resize(std::max(limit, size));
    text.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(text.data()), size, text.size()));
    return text;
}

void check_read(const SafetensorsFile& file, const std::string& name) {
    size_t count = file.entry(name).count();
    std::vector<float> numbers(count);
    std::vector<int> integers(count);
    bool real_ones = fuzz::accepts([&] { file.read(name, numbers.data()); });
    bool whole_ones = fuzz::accepts([&] { file.read(name, integers.data()); });
    fuzz::require(!(real_ones && whole_ones), "a tensor has one kind of number");
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    Parts parts = split(fuzz::text_of(data, size));
    switch (fuzz::below(random, 6)) {
        case 0:
            return LLVMFuzzerMutate(data, size, limit);
        case 1:
            parts.header = mutated(parts.header, 2000);
            break;
        case 2:
            parts.data = mutated(parts.data, 2000);
            break;
        default:
            parts.header = fuzz::change_json_text(parts.header, random);
    }
    if (fuzz::below(random, 2) == 0) fit_data(parts);
    return fuzz::give_back(join(parts), data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    std::string text = fuzz::text_of(data, size);
    fuzz::put("a.safetensors", text);
    std::optional<SafetensorsFile> file;
    if (!fuzz::accepts([&] { file.emplace(fuzz::path("a.safetensors")); })) return 0;
    std::string bytes = split(text).data;
    SafetensorsWriter writer(fuzz::path("b.safetensors"), file->metadata());
    size_t covered = 0;
    for (const auto& [name, entry] : file->entries()) {
        check_read(*file, name);
        fuzz::require(entry.begin <= entry.end && entry.end <= bytes.size(), "inside the data");
        covered += entry.end - entry.begin;
        writer.add(name, entry.dtype, entry.shape, bytes.data() + entry.begin);
    }
    fuzz::require(covered == bytes.size(), "tensors cover the data");
    writer.commit();
    SafetensorsFile again(fuzz::path("b.safetensors"));
    std::string written = split(read_file(fuzz::path("b.safetensors"))).data;
    fuzz::require(again.metadata() == file->metadata(), "the metadata is the same");
    fuzz::require(again.entries().size() == file->entries().size(), "there are as many tensors");
    for (const auto& [name, entry] : file->entries()) {
        const SafetensorsFile::Entry& other = again.entry(name);
        fuzz::require(other.dtype == entry.dtype && other.shape == entry.shape, "of one shape");
        fuzz::require(bytes.compare(entry.begin, entry.end - entry.begin, written, other.begin,
                                    other.end - other.begin) == 0,
                      "of the same numbers");
    }
    return 0;
}
