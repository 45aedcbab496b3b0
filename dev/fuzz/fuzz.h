// What the fuzz targets share: a folder in memory, the one way in which input may be refused, and
// changes to JSON that leave it JSON.
//
// A target calls what reads the files of strangers. Its property: the input is refused by an Error
// with exit code 2, or it is read within bounds, and what was read is written and read again as the
// same. Anything else (another exception, a sanitizer's report, memory beyond the limit) ends the
// program, which keeps the input.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <random>

#include "../../convert.h"

namespace fuzz {

// Ends the program unless `holds`.
inline void require(bool holds, const char* property) {
    if (holds) return;
    fprintf(stderr, "fuzz: does not hold: %s\n", property);
    abort();
}

// A folder of this process, $FUZZ_FOLDER/PID, which whoever set that removes.
inline const std::string& folder() {
    static const std::string path = [] {
        const char* root = getenv("FUZZ_FOLDER");
        std::string made = format("%s/%d", root != nullptr ? root : "/dev/shm", int(getpid()));
        make_folder(made);
        return made;
    }();
    return path;
}

// Without the syncs of write_file_atomic, of which there would be millions.
inline void put(const std::string& name, std::string_view content) {
    int fd = open(join_path(folder(), name).c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    require(fd >= 0 && write(fd, content.data(), content.size()) == ssize_t(content.size()),
            "the folder takes files");
    close(fd);
}

inline std::string path(const std::string& name) { return join_path(folder(), name); }

// Whether `action` does without an Error; one that is not the input's fault ends the program.
template <typename F>
bool accepts(F action) {
    try {
        action();
        return true;
    } catch (const Error& error) {
        require(error.exit_code == kExitInput, error.what());
        std::string line = error.what();
        require(!line.empty() && line.find('\n') == std::string::npos, "an error is one line");
        return false;
    }
}

inline std::string text_of(const uint8_t* data, size_t size) {
    return std::string(reinterpret_cast<const char*>(data), size);
}

// ==== changes ====================================================================================

using Random = std::minstd_rand;

inline size_t below(Random& random, size_t count) { return count == 0 ? 0 : random() % count; }

// Values at which readers have gone wrong before.
inline ordered_json strange_value(Random& random) {
    const ordered_json kValues[] = {nullptr,
                                    true,
                                    false,
                                    0,
                                    1,
                                    -1,
                                    2,
                                    7,
                                    128,
                                    255,
                                    65536,
                                    1048576,
                                    INT_MAX,
                                    2147483648u,
                                    INT64_MAX,
                                    INT64_MIN,
                                    UINT64_MAX,
                                    4611686018427387904u,
                                    0.5,
                                    -0.0,
                                    1e-320,
                                    1e308,
                                    1e-5,
                                    "",
                                    "F32",
                                    "BF16",
                                    "F16",
                                    "I64",
                                    "F8_E4M3",
                                    "gpt2",
                                    "../x.safetensors",
                                    "/etc/passwd",
                                    std::string(1, '\0'),
                                    std::string(300, 'x'),
                                    "a\nb",
                                    ordered_json::array(),
                                    ordered_json::object(),
                                    {1, 2},
                                    {0, 0},
                                    {4294967296u, 4294967296u}};
    return kValues[below(random, std::size(kValues))];
}

// Every value inside `root`, itself first.
inline void collect(ordered_json& root, std::vector<ordered_json*>* nodes) {
    nodes->push_back(&root);
    if (root.is_structured())
        for (ordered_json& child : root) collect(child, nodes);
}

// Changes one value, name or number of `root`, in one of seven ways.
inline void change_json(ordered_json& root, Random& random) {
    std::vector<ordered_json*> nodes;
    collect(root, &nodes);
    ordered_json& node = *nodes[below(random, nodes.size())];
    ordered_json copy = *nodes[below(random, nodes.size())];
    switch (below(random, 7)) {
        case 0:
            node = strange_value(random);
            return;
        case 1:
            node = copy;
            return;
        case 2:  // a number, or those in it, by a little
            for (ordered_json& item : node.is_array() ? node : root)
                if (item.is_number_integer())
                    item = int64_t(item.get<uint64_t>() + below(random, 9) - 4);
            if (node.is_number_integer())
                node = int64_t(node.get<uint64_t>() + below(random, 9) - 4);
            return;
        case 3:
            if (node.is_object() && !node.empty())
                node.erase(std::next(node.begin(), long(below(random, node.size()))));
            else if (node.is_array() && !node.empty()) node.erase(below(random, node.size()));
            return;
        case 4:
            if (node.is_object()) node["name" + std::to_string(below(random, 4))] = copy;
            else if (node.is_array()) node.push_back(copy);
            return;
        case 5:
            if (node.is_array() || node.is_object()) {
                if (node.size() < 2) return;
                auto other = std::next(node.begin(), long(below(random, node.size())));
                std::swap(*node.begin(), *other);
            }
            return;
        default:
            if (node.is_string()) {
                std::string text = node;
                if (!text.empty()) text[below(random, text.size())] = char(random() % 128);
                node = text;
            }
    }
}

// Text that is JSON stays JSON with something changed; any other is returned as it is.
inline std::string change_json_text(const std::string& text, Random& random) {
    ordered_json root = ordered_json::parse(text, nullptr, false);
    if (root.is_discarded() || text.size() > 1 << 16) return text;
    for (size_t i = 0; i <= below(random, 3); i++) change_json(root, random);
    return json_text(root, below(random, 2) == 0 ? -1 : 1);
}

// For LLVMFuzzerCustomMutator: copies what fits.
inline size_t give_back(const std::string& text, uint8_t* data, size_t limit) {
    size_t size = std::min(text.size(), limit);
    memcpy(data, text.data(), size);
    return size;
}

}  // namespace fuzz

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t limit);

// The mutator of a target whose whole input is JSON.
#define FUZZ_JSON_MUTATOR                                                               \
    extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, \
                                              unsigned seed) {                          \
        fuzz::Random random(seed);                                                      \
        if (fuzz::below(random, 4) == 0) return LLVMFuzzerMutate(data, size, limit);    \
        std::string text = fuzz::change_json_text(fuzz::text_of(data, size), random);   \
        return fuzz::give_back(text, data, limit);                                      \
    }
