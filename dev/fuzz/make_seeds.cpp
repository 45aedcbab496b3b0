// Writes the inputs that fuzzing starts from, small ones of each kind, as SEEDS/TARGET/N:
//   make_seeds SEEDS
#include "../../ranks.h"
#include "../../trainer.h"

namespace {

GPT2Config small_config() {
    GPT2Config config;
    config.vocab_size = 3, config.context = 2, config.layers = 1;
    config.heads = 2, config.channels = 2;
    return config;
}

// Numbers that are all different.
void count_up(Group, int index, int layer, real* host) {
    size_t count = parameter_table(small_config())[size_t(index)].file_size();
    for (size_t i = 0; i < count; i++) host[i] = real(index + layer) / 8 + real(i) / 64;
}

void put(const std::string& folder, const std::string& target, std::string_view content) {
    std::string home = join_path(folder, target);
    make_folder(home);
    std::error_code ignored;
    auto there = std::distance(fs::directory_iterator(home, ignored), fs::directory_iterator());
    write_file_atomic(join_path(home, std::to_string(there)), content);
}

void config_seeds(const std::string& out, const std::string& work) {
    GPT2Config config = small_config();
    for (int kind = 0; kind < 3; kind++) {
        config.tied = kind != 1, config.bias = kind != 2;
        if (kind == 1) config.hidden = 5, config.dropout = 0.1;
        write_config(config, kind - 1, work);
        put(out, "config", read_file(join_path(work, "config.json")));
    }
    put(out, "config", R"({"model_type":"gpt2"})");
    put(out, "config",
        R"({"model_type":"gpt2","max_position_embeddings":8,"num_hidden_layers":1,)"
        R"("num_attention_heads":1,"hidden_size":4,"activation_function":"gelu_new"})");
}

void safetensors_seeds(const std::string& out, const std::string& work) {
    write_model_file(small_config(), view_of(small_config(), count_up), work);
    put(out, "safetensors", read_file(join_path(work, "model.safetensors")));
    const char bytes[64] = {};
    std::string path = join_path(work, "kinds.safetensors");
    SafetensorsWriter writer(path, {{"format", "pt"}, {"note", "\"quoted\""}});
    for (const char* dtype : {"F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL"})
        writer.add(dtype, dtype, {2, 1}, bytes);
    writer.add("scalar", "F32", {}, bytes);
    writer.add("empty", "I32", {2, 0}, bytes);
    writer.commit();
    put(out, "safetensors", read_file(path));
    put(out, "safetensors", std::string("\2\0\0\0\0\0\0\0{}", 10));
}

void index_seeds(const std::string& out) {
    put(out, "index",
        R"({"metadata":{"total_size":24},"weight_map":{"one":"a.safetensors",)"
        R"("two":"a.safetensors","three":"b.safetensors"}})");
    put(out, "index", R"({"weight_map":{"one":"c.safetensors","four":"c.safetensors"}})");
    put(out, "index", R"({"metadata":{},"weight_map":{"three":"b.safetensors"}})");
}

void llmc_seeds(const std::string& out, const std::string& work) {
    std::string path = join_path(work, "model.bin");
    for (int kind = 0; kind < 4; kind++) {
        const ExportFormat& format = kExportFormats[kind % 2];
        write_llmc_model(path, small_config(), count_up, format);
        std::string model = read_file(path), state(kLlmcHeaderBytes, '\0');
        if (kind >= 2) {  // a vocabulary without padding
            int32_t rows = 4;
            memcpy(&model[28], &rows, 4);
            model.erase(kLlmcHeaderBytes + 4 * 2 * format.width, (128 - 4) * 2 * format.width);
        }
        int32_t words[] = {kLlmcState, 1, 1, 0, kind % 2, kind / 2};
        memcpy(state.data(), words, sizeof words);
        path = join_path(work, "model.bin");
        size_t numbers = (model.size() - kLlmcHeaderBytes) / format.width;
        state.append(numbers * 4 * size_t(2 + kind % 2), '\0');
        if (kind >= 2)
            state.append(std::string("\1\0\0\0\0\0\0\0abcd\0\0\0\0\0\0\0\0", 20)).append(2520, 'r');
        uint64_t length = model.size();
        put(out, "llmc", std::string(reinterpret_cast<char*>(&length), 8) + model + state);
    }
}

void checkpoint_seeds(const std::string& out, const std::string& work) {
    for (const char* name : {"config.json", "model.safetensors", "optimizer.safetensors"})
        write_file_atomic(join_path(work, name), name);  // as the target has them
    RunState state;
    state.step = 7, state.tokens = 1000, state.best_loss = 2.5, state.skipped = {{0, 3}};
    ordered_json identity = {{"layers", 2}, {"data", "0123456789abcdef"}, {"tied", true}};
    ordered_json settings = {{"learning rate", 1e-3}, {"schedule", "cosine"}};
    write_trainer_json(work, 7, to_json(state, identity, settings, 42), {});
    put(out, "checkpoint", read_file(join_path(work, "trainer.json")));
}

void npy_seeds(const std::string& out, const std::string& work) {
    std::string path = join_path(work, "a.npy");
    const std::vector<size_t> shapes[] = {{6}, {2, 3}, {}, {0}, {1, 2, 3, 1}};
    for (const std::vector<size_t>& shape : shapes) {
        size_t count = 1;
        for (size_t extent : shape) count *= extent;
        write_npy(path, std::vector<int>(count, 7), shape);
        put(out, "npy", read_file(path));
    }
    for (const char* type : {"<u2", "<i8"}) {
        std::string header = format("{'descr': '%s', 'fortran_order': False, 'shape': (2,)}", type);
        std::string file = std::string("\x93NUMPY\2\0", 8);
        uint32_t length = uint32_t(header.size());
        file.append(reinterpret_cast<char*>(&length), 4).append(header);
        put(out, "npy", file + std::string(std::string(type) == "<u2" ? 4 : 16, '\0'));
    }
}

void windows_seeds(const std::string& out, const std::string& work) {
    std::string path = join_path(work, "a.bin");
    for (size_t count : {1, 2, 9, 40}) {
        std::vector<int> ids(count);
        for (size_t i = 0; i < count; i++) ids[i] = int(i * 37 % 1000);
        write_shard(path, ids, count == 9);
        put(out, "windows", read_file(path));
    }
}

void hellaswag_seeds(const std::string& out) {
    put(out, "hellaswag",
        R"({"ctx":"A man sits. he","label":3,"endings":["is.","a b","x","y"]})"
        "\n"
        R"({"ctx_a":"A","ctx_b":"she","label":"0","endings":["a","b","c","d"]})"
        "\n");
    put(out, "hellaswag", R"({"ctx_a":"A","ctx_b":"","label":1,"endings":["a","","c","d"]})");
    for (int examples = 1; examples <= 2; examples++) {
        int32_t header[256] = {20240522, 1, examples, 30};
        std::string file(reinterpret_cast<char*>(header), sizeof header);
        for (int i = 0; i < examples; i++) {
            int words[] = {65535, 30, i, 2, 4, 1, 5, 1, 6, 1, 7, 1, 8, 1, 9};
            for (int word : words) {
                auto narrow = uint16_t(word);
                file.append(reinterpret_cast<char*>(&narrow), sizeof narrow);
            }
        }
        put(out, "hellaswag", file);
    }
}

// A vocabulary of each kind, small enough for changes to hit what matters.
Tokenizer small_bpe() { return Tokenizer::train_bpe("aaab aab ab\303\251 ab'll 12 12", 264); }

void tokenizer_seeds(const std::string& out, const std::string& work) {
    BpeTraining training;
    for (const PatternName& name : kPatterns) {
        training.pattern = name.pattern;
        Tokenizer::train_bpe("aab aab ab 12 12", 260, training).save(work);
        put(out, "tokenizer_json", read_file(join_path(work, "tokenizer.json")));
    }
    for (const Tokenizer& tokenizer : {Tokenizer::bytes(), Tokenizer::chars("a\303\251b \n"),
                                       Tokenizer::words("a, b -- c", true)}) {
        tokenizer.save(work);
        put(out, "tokenizer_json", read_file(join_path(work, "tokenizer.json")));
    }
    Tokenizer bpe = small_bpe();
    bpe.save_as(TokenizerFormat::merges, work);
    put(out, "tokenizer_merges",
        read_file(join_path(work, "vocab.json")) + read_file(join_path(work, "merges.txt")));
    put(out, "tokenizer_merges", "#version: 0.2\na a\naa b\n");
    std::string path = join_path(work, "a");
    bpe.save_as(TokenizerFormat::tiktoken, path);
    put(out, "tokenizer_ranks", read_file(path));
    bpe.save_as(TokenizerFormat::llmc, path);
    put(out, "tokenizer_llmc", read_file(path));
}

void text_seeds(const std::string& out) {
    for (const char* text : {"The cat's 12345 hats\r\n\n  WE'LL go", "  \t\n x\n",
                             "\303\251t\303\251\314\201 \346\227\245",
                             "\360\237\221\251\342\200\215\360\237\222\273\302\240\342\200\203",
                             "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "<|endoftext|>a<|endoftext",
                             "\377\300\200\355\240\200", "\331\243\331\2441\302\262"})
        for (int pattern = 0; pattern < 4; pattern++)
            put(out, "encode", std::string(1, char(16 + pattern)) + text);
    put(out, "decode", std::string("\x54\0\0\1\x10\1\x2b\1", 8));
    put(out, "decode", std::string("\x54\0\xff\xff", 4));
}

// The first byte says what the rest is; see the targets.
void shard_seeds(const std::string& out, const std::string& work) {
    std::string path = join_path(work, "ids.bin"), npy = join_path(work, "ids.npy");
    for (bool wide : {false, true}) {
        write_shard(path, {1, 2, 50000}, true, wide ? 4 : 2);
        put(out, "shard", std::string(1, '\0') + read_file(path));
    }
    write_npy(npy, {1, 2, 50000}, {3});
    put(out, "shard", "\3" + read_file(npy));
    for (int kind : {1, 2, 4, 5})
        put(out, "shard", char(kind) + std::string("\1\0\2\0\0\0\0\0", 8));
    const std::string_view kMetas[] = {
        // pickles of protocols 4 and 2
        {"\200\004\225\110\000\000\000\000\000\000\000\175\224\050\214\012\166\157\143\141"
         "\142\137\163\151\172\145\224\113\003\214\004\151\164\157\163\224\175\224\050\113"
         "\000\214\001\012\224\113\001\214\001\141\224\113\002\214\001\142\224\165\214\004"
         "\163\164\157\151\224\175\224\050\150\004\113\000\150\005\113\001\150\006\113\002"
         "\165\165\056",
         83},
        {"\200\002\175\161\000\050\130\012\000\000\000\166\157\143\141\142\137\163\151\172"
         "\145\161\001\113\003\130\004\000\000\000\151\164\157\163\161\002\175\161\003\050"
         "\113\000\130\001\000\000\000\012\161\004\113\001\130\001\000\000\000\141\161\005"
         "\113\002\130\001\000\000\000\142\161\006\165\130\004\000\000\000\163\164\157\151"
         "\161\007\175\161\010\050\150\004\113\000\150\005\113\001\150\006\113\002\165\165"
         "\056",
         101}};
    for (std::string_view meta : kMetas) put(out, "shard", "\6" + std::string(meta));
}

void corpus_seeds(const std::string& out) {
    const std::string_view kGzip = {
        "\037\213\010\000\000\000\000\000\002\003\163\124\050\111\255\050\321\121\050\110"
        "\114\316\116\115\321\343\162\044\300\007\000\373\265\114\122\060\000\000\000",
        39};
    const std::string_view kZstd = {
        "\050\265\057\375\004\130\335\000\000\250\173\042\164\145\170\164\042\072\042\157"
        "\156\145\042\175\012\164\167\157\042\175\012\001\000\122\314\072\220\342\337\356",
        40};
    put(out, "corpus",
        std::string(1, '\0') + R"({"id":1.5,"text":"a\n\u00e9","list":[{"text":2},null]})");
    put(out, "corpus",
        "\1Header\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\nVerse\r\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK X ***\nLicence\n");
    put(out, "corpus", "\1e\xcc\x81\n\n1\n1\n1\n1\n1\n1\n1\n1\n1\n1\n\xef\xbb\xbf\f");
    put(out, "corpus", "\2" + std::string(kGzip));
    put(out, "corpus", "\3" + std::string(kZstd));
}

// The first byte says in which parts they come.
void ranks_seeds(const std::string& out) {
    auto seed = [&](RankMessage kind, const std::string& body) {
        put(out, "ranks", "\3" + frame_of(kind, body));
    };
    RankMember member = {1, 2, "b"};
    RankPart part;
    part.name = "the save", part.payload = "bytes";
    seed(RankMessage::hello, body_of(RankHello{}));
    seed(RankMessage::welcome, body_of(RankWelcome{7}));
    seed(RankMessage::refuse, body_of(RankRefusal{1, "why"}));
    seed(RankMessage::roster, body_of(RankRoster{{member, member}}));
    seed(RankMessage::part, body_of(part));
    seed(RankMessage::part, body_of(NamedTexts{{{"--seed", "1"}, {"a", ""}}}));
    seed(RankMessage::whole, body_of(RankWhole{1, "bytes"}));
    seed(RankMessage::pulse, body_of(RankPulse{1, 2}));
    seed(RankMessage::fail, body_of(RankFailure{2, "why"}));
    put(out, "ranks",
        "\1" + frame_of(RankMessage::pulse, body_of(RankPulse{})) +
            frame_of(RankMessage::fail, body_of(RankFailure{})));
    for (const char* text : {"a:5", "[::1]:5", "file:a", "r[1-2]n[3,4],b", "4(x2),3"})
        put(out, "ranks", std::string("\1") + text);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: make_seeds FOLDER\n");
        return kExitInput;
    }
    try {
        std::string out = argv[1];
        auto with_folder = [&](auto make) {
            TemporaryFolder work(join_path(out, "work"));
            make(out, work.path());
        };
        with_folder(config_seeds);
        with_folder(safetensors_seeds);
        with_folder(llmc_seeds);
        with_folder(checkpoint_seeds);
        with_folder(npy_seeds);
        with_folder(shard_seeds);
        with_folder(windows_seeds);
        with_folder(tokenizer_seeds);
        text_seeds(out);
        index_seeds(out);
        corpus_seeds(out);
        hellaswag_seeds(out);
        ranks_seeds(out);
    } catch (const Error& error) {
        fprintf(stderr, "make_seeds: error: %s\n", error.what());
        return error.exit_code;
    }
    return 0;
}
