// What one rank hears from another. The first byte says in parts of which size the rest comes; what
// is taken for a message is written again as the same bytes, however it was cut.
#include "../../ranks.h"
#include "fuzz.h"

namespace {

template <typename T>
void check_body(const std::string& body) {
    std::optional<T> message;
    if (!fuzz::accepts([&] { message = read_body<T>(body); })) return;
    fuzz::require(body_of(*message) == body, "it is written as it was read");
}

void check(const ReceivedMessage& message) {
    switch (message.kind) {
        case RankMessage::hello:
            return check_body<RankHello>(message.body);
        case RankMessage::welcome:
        case RankMessage::confirm:
            return check_body<RankWelcome>(message.body);
        case RankMessage::refuse:
            return check_body<RankRefusal>(message.body);
        case RankMessage::roster:
            return check_body<RankRoster>(message.body);
        case RankMessage::part:
            check_body<NamedTexts>(message.body);
            return check_body<RankPart>(message.body);
        case RankMessage::whole:
            return check_body<RankWhole>(message.body);
        case RankMessage::pulse:
            return check_body<RankPulse>(message.body);
        case RankMessage::fail:
            return check_body<RankFailure>(message.body);
    }
    fuzz::require(false, "its kind is known");
}

// All messages until the bytes are none, as they would be sent.
std::string messages_of(std::string_view bytes, size_t step, bool look) {
    MessageReader reader;
    reader.allow(4096);
    std::string again;
    fuzz::accepts([&] {
        for (size_t at = 0; at < bytes.size(); at += step) {
            reader.add(bytes.substr(at, step));
            while (auto message = reader.next()) {
                if (look) check(*message);
                again += frame_of(message->kind, message->body);
            }
        }
    });
    return again;
}

}  // namespace

// Lengths are fitted to what follows them, or numbers changed, where they are.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t limit, unsigned seed) {
    fuzz::Random random(seed);
    std::string file = fuzz::text_of(data, size);
    if (file.size() < 7 || fuzz::below(random, 3) == 0) return LLVMFuzzerMutate(data, size, limit);
    if (fuzz::below(random, 2) == 0) {
        const uint64_t kValues[] = {0, 1, 2, 16, 24, 255, 256, 4096, UINT64_MAX, uint64_t(1) << 61};
        uint64_t value = kValues[fuzz::below(random, std::size(kValues))];
        size_t at = 6 + 8 * fuzz::below(random, (file.size() - 6) / 8 + 1);
        memcpy(&file[at], &value, std::min<size_t>(8, file.size() - at));
    } else {
        file.insert(6 + fuzz::below(random, file.size() - 6), 8 * fuzz::below(random, 4), '\0');
    }
    auto length = uint32_t(file.size() - 6);
    if (fuzz::below(random, 4) != 0) memcpy(&file[1], &length, sizeof length);
    return fuzz::give_back(file, data, limit);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size == 0) return 0;
    std::string bytes = fuzz::text_of(data + 1, size - 1);
    std::string whole = messages_of(bytes, std::max<size_t>(bytes.size(), 1), true);
    fuzz::require(bytes.compare(0, whole.size(), whole) == 0, "messages are the bytes that came");
    fuzz::require(messages_of(bytes, size_t(data[0]) + 1, false) == whole, "however they were cut");

    fuzz::accepts([&] { parse_rendezvous(bytes, std::make_unique<Meeting>().get()); });
    first_slurm_host(bytes);
    fuzz::require(slurm_tasks_of_node(bytes, data[0]) >= 0, "a node has no less than no task");
    return 0;
}
