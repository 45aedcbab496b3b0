// trainer.json and what it lists: a checkpoint that verifies has files of the recorded size and
// hash, all in the folder; the run's state in it is refused, or written and read as the same; a
// model card made of it marks up nothing.
#include "../../trainer.h"
#include "fuzz.h"

namespace {

// A changed trainer.json with the checksum that it should have, so that more than the checksum is
// reached.
std::string with_checksum(const std::string& text) {
    json root = json::parse(text, nullptr, false);
    if (!root.is_object()) return text;
    try {
        root["checksum"] = json_checksum(json::parse(json_text(root, -1)));
    } catch (const json::exception&) { return text; }
    return json_text(root, -1);
}

void check_state() {
    json identity, settings;
    RunState state;
    if (!fuzz::accepts([&] { state = read_state(fuzz::folder(), &identity, &settings); })) return;
    ordered_json written = to_json(state, identity, settings, 1);
    written["step"] = state.step;
    fuzz::put("trainer.json", json_text(written, -1));
    json again_identity, again_settings;
    RunState again = read_state(fuzz::folder(), &again_identity, &again_settings);
    ordered_json rewritten = to_json(again, again_identity, again_settings, 1);
    rewritten["step"] = again.step;
    fuzz::require(written == rewritten, "a state is written as it is");
}

void check_card() {
    Facts facts = training_facts(fuzz::folder());
    write_model_card(fuzz::folder(), GPT2Config(), "float32", true, facts);
    std::string card = read_file(fuzz::path("README.md"));
    fs::remove(fuzz::path("README.md"));
    size_t rows = 0;
    for (size_t at = 0; (at = card.find('\n', at)) != std::string::npos; at++)
        rows += card.compare(at, 3, "\n| ") == 0 ? 1 : 0;
    fuzz::require(rows <= facts.size() + 9, "a fact is one row of the card");
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    for (const char* name : {"config.json", "model.safetensors", "optimizer.safetensors"})
        fuzz::put(name, name);
    return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    if (fuzz::below(random, 6) == 0) return LLVMFuzzerMutate(data, size, limit);
    std::string text = fuzz::change_json_text(fuzz::text_of(data, size), random);
    if (fuzz::below(random, 6) != 0) text = with_checksum(text);
    return fuzz::give_back(text, data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz::put("trainer.json", fuzz::text_of(data, size));
    fuzz::accepts([] { describe_file(fuzz::path("trainer.json")); });
    json root;
    bool verified = fuzz::accepts([&] { root = verify_checkpoint(fuzz::folder()); });
    if (verified) {
        for (const auto& [name, recorded] : root.at("files").items()) {
            FileDigest digest = digest_file(fuzz::path(name));
            fuzz::require(name.find('/') == std::string::npos, "a file of the folder");
            fuzz::require(recorded.at("bytes") == digest.bytes, "of the recorded size");
            fuzz::require(recorded.at("xxh3") == hash_text(digest.hash), "of the recorded hash");
        }
        check_card();
    }
    check_state();
    return 0;
}
