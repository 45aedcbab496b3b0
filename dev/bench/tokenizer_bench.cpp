// How fast the tokenizer is: one measurement a call, for tokenizer_bench.py, which takes turns with
// other libraries.
//
//   tokenizer_bench encode|decode TOKENIZER FILE THREADS ROUNDS     tokenizer_bench train SIZE FILE
//   THREADS ROUNDS
//
// Prints seconds a round: of the processor, or of the clock where THREADS is not 1; then the number
// of tokens. Reading files is not counted.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "../../tokenizer.h"

namespace {

double clock_s(bool processor) {
    if (!processor)
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
            .count();
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

size_t work(const std::string& action, const Tokenizer& tokenizer, const std::string& text,
            const std::vector<int>& ids, int threads, int size) {
    if (action == "encode") {
        std::vector<int> made;
        tokenizer.encode(text, made, threads);
        return made.size();
    }
    if (action == "decode") return tokenizer.decode(ids).size() == text.size() ? ids.size() : 0;
    BpeTraining training;
    training.threads = threads;
    return size_t(Tokenizer::train_bpe(text, size, training).vocab_size());
}

}  // namespace

int main(int count, char** words) {
    if (count != 6) {
        fprintf(stderr,
                "usage: tokenizer_bench encode|decode|train TOKENIZER|SIZE FILE THREADS ROUNDS\n");
        return 2;
    }
    std::string action = words[1], text = read_file(words[3]);
    int threads = atoi(words[4]), rounds = atoi(words[5]);
    bool train = action == "train";
    Tokenizer tokenizer = train ? Tokenizer::bytes() : Tokenizer::load(words[2]);
    std::vector<int> ids = action == "decode" ? tokenizer.encode(text) : std::vector<int>();
    size_t tokens = 0;
    for (int round = 0; round < rounds; round++) {
        double start_s = clock_s(threads == 1);
        tokens = work(action, tokenizer, text, ids, threads, atoi(words[2]));
        printf("%.6f\n", clock_s(threads == 1) - start_s);
    }
    printf("%zu\n", tokens);
    return 0;
}
