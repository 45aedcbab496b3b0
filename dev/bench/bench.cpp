// `make bench`: how long a training step of GPT-2 124M takes beside the plain loop nests of
// plain_step.cpp, and then one table: each layer, forward and backward, whole steps in each
// precision, and generation, each as a share of what the machine was just measured to do at best,
// and beside PyTorch, where $PYTHON has it.
//
// Times drift by the minute on a shared machine, ratios of what takes turns (A B A B ...) do not:
// steps take turns with the plain ones and with PyTorch's, and what counts is the ratio of their
// medians. Layers do not: Google Benchmark times them, and its options choose them, for example
//   make bench BENCH="--benchmark_filter=matmul"      BENCH="--benchmark_filter=none": no layers
// --json=FILE keeps the table; --no-plain leaves the plain step out, --no-steps all but layers.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <omp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <thread>
#include <vector>

#include "../../gpt2.h"
#include "plain_step.h"

namespace {

// ==== sizes ======================================================================================

constexpr int B = 4, T = 64, C = 768, NH = 12, F = 3072, V = 50257, Vp = 50304;
constexpr int BT = B * T;

int threads() {
    int count = 1;
#pragma omp parallel
#pragma omp single
    count = omp_get_num_threads();
    return count;
}

// Memory as a model has it: it asks for huge pages.
template <class T>
struct HugePages {
    using value_type = T;
    static constexpr size_t kHuge = 1 << 21;

    T* allocate(size_t count) {
        size_t bytes = (count * sizeof(T) + kHuge - 1) / kHuge * kHuge;
        void* memory = aligned_alloc(kHuge, bytes);
        if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(memory, bytes, MADV_HUGEPAGE);
#endif
        return static_cast<T*>(memory);
    }
    void deallocate(T* memory, size_t) { free(memory); }
    bool operator==(const HugePages&) const { return true; }
};
using Numbers = std::vector<real, HugePages<real>>;
using NumbersBf16 = std::vector<uint16_t, HugePages<uint16_t>>;

// N numbers of either sign, of the size that activations have.
Numbers numbers(size_t N, uint64_t seed) {
    Numbers values(N);
    for (size_t i = 0; i < N; i++)
        values[i] = real(philox(seed, uint32_t(i), 0, 0, 0).word[0] / 2147483648.0 - 1);
    return values;
}

// Memory that layers work in, at the sizes above.
Numbers attention_scratch(int length) {
    GPT2Shape shape;
    shape.T = length, shape.threads = threads();
    return Numbers(gpt2_sizes(GPT2Config{}, shape).attention_scratch);
}

Numbers reduce_scratch(size_t columns) {
    return Numbers(gpt2_sizes(GPT2Config{}, GPT2Shape{}).reduce_rows * columns);
}

// What one call does at least, for its floor.
void count_operations(benchmark::State& state, double operations) {
    state.counters["operations"] = operations;
}

void count_bytes(benchmark::State& state, size_t numbers_moved) {
    state.counters["bytes"] = double(numbers_moved * sizeof(real));
}

// ==== layers =====================================================================================

void encoder_forward_124m(benchmark::State& state) {
    Numbers wte = numbers(size_t(V) * C, 1), wpe = numbers(size_t(T) * C, 2);
    Numbers out(size_t(BT) * C);
    std::vector<int> inputs(BT);
    for (int i = 0; i < BT; i++) inputs[size_t(i)] = int(size_t(i) * 7919 % V);
    for (auto _ : state)
        encoder_forward(out.data(), inputs.data(), wte.data(), wpe.data(), B, T, C);
    count_bytes(state, 3 * out.size());
}

void encoder_backward_124m(benchmark::State& state) {
    Numbers dwte(size_t(V) * C), dwpe(size_t(T) * C), dout = numbers(size_t(BT) * C, 1);
    std::vector<int> inputs(BT);
    for (int i = 0; i < BT; i++) inputs[size_t(i)] = int(size_t(i) * 7919 % V);
    for (auto _ : state)
        encoder_backward(dwte.data(), dwpe.data(), dout.data(), inputs.data(), B, T, C);
    count_bytes(state, 4 * dout.size());
}

void layernorm_forward_124m(benchmark::State& state) {
    Numbers inp = numbers(size_t(BT) * C, 1), weight = numbers(C, 2), bias = numbers(C, 3);
    Numbers out(inp.size()), mean(BT), rstd(BT);
    for (auto _ : state)
        layernorm_forward(out.data(), mean.data(), rstd.data(), inp.data(), weight.data(),
                          bias.data(), 1e-5, B, T, C);
    count_bytes(state, 2 * inp.size());
}

void layernorm_backward_124m(benchmark::State& state) {
    Numbers inp = numbers(size_t(BT) * C, 1), weight = numbers(C, 2), mean(BT), rstd(BT);
    Numbers dout = numbers(inp.size(), 3), dinp(inp.size()), dweight(C), dbias(C);
    Numbers scratch = reduce_scratch(2 * C), out(inp.size());
    layernorm_forward(out.data(), mean.data(), rstd.data(), inp.data(), weight.data(), nullptr,
                      1e-5, B, T, C);
    for (auto _ : state)
        layernorm_backward(dinp.data(), dweight.data(), dbias.data(), dout.data(), inp.data(),
                           weight.data(), mean.data(), rstd.data(), scratch.data(), B, T, C);
    count_bytes(state, 4 * inp.size());
}

// The products of a block, and the classifier's, for a batch of BT rows: (inputs, outputs).
void product_sizes(benchmark::internal::Benchmark* layer) {
    layer->ArgNames({"C", "OC"});
    for (auto [in, out] : {std::pair(C, 3 * C), {C, C}, {C, F}, {F, C}, {C, Vp}})
        layer->Args({in, out});
}

void matmul_forward_124m(benchmark::State& state) {
    int in = int(state.range(0)), out = int(state.range(1));
    Numbers inp = numbers(size_t(BT) * in, 1), weight = numbers(size_t(out) * in, 2);
    Numbers bias = numbers(size_t(out), 3), result(size_t(BT) * out);
    for (auto _ : state)
        matmul_forward(result.data(), inp.data(), weight.data(), bias.data(), BT, in, out);
    count_operations(state, 2.0 * BT * in * out);
}

void matmul_backward_124m(benchmark::State& state) {
    int in = int(state.range(0)), out = int(state.range(1));
    Numbers inp = numbers(size_t(BT) * in, 1), weight = numbers(size_t(out) * in, 2);
    Numbers dout = numbers(size_t(BT) * out, 3), dinp(inp.size()), dweight(weight.size());
    Numbers dbias(out), scratch = reduce_scratch(size_t(out));
    for (auto _ : state)
        matmul_backward(dinp.data(), dweight.data(), dbias.data(), dout.data(), inp.data(),
                        weight.data(), scratch.data(), BT, in, out);
    count_operations(state, 4.0 * BT * in * out);
}

// Their products in bf16 alone, summed in float32.
constexpr const char* kBf16 = "bf16";  // the label of such a benchmark

NumbersBf16 numbers_bf16(size_t N) { return NumbersBf16(N, 0x3f80); }

void matmul_forward_bf16_124m(benchmark::State& state) {
    int in = int(state.range(0)), out = int(state.range(1));
    NumbersBf16 inp = numbers_bf16(size_t(BT) * in), weight = numbers_bf16(size_t(out) * in);
    Numbers result(size_t(BT) * out);
    for (auto _ : state)
        gemm_bf16(false, false, true, BT, out, in, inp.data(), in, weight.data(), in, 0,
                  result.data(), out);
    count_operations(state, 2.0 * BT * in * out);
    state.SetLabel(kBf16);
}

void matmul_backward_bf16_124m(benchmark::State& state) {
    int in = int(state.range(0)), out = int(state.range(1));
    NumbersBf16 inp = numbers_bf16(size_t(BT) * in), weight = numbers_bf16(size_t(out) * in);
    NumbersBf16 dout = numbers_bf16(size_t(BT) * out);
    Numbers dinp(inp.size()), dweight(weight.size());
    for (auto _ : state) {
        gemm_bf16(false, false, false, BT, in, out, dout.data(), out, weight.data(), in, 0,
                  dinp.data(), in);
        gemm_bf16(false, true, false, out, in, BT, dout.data(), out, inp.data(), in, 0,
                  dweight.data(), in);
    }
    count_operations(state, 4.0 * BT * in * out);
    state.SetLabel(kBf16);
}

// The same number of tokens in sequences of 64 and 1,024: attention alone is quadratic in them.
void sequence_lengths(benchmark::internal::Benchmark* layer) {
    layer->ArgName("T")->Arg(T)->Arg(1024);
}

void attention_forward_124m(benchmark::State& state) {
    int length = int(state.range(0)), batch = std::max(1, BT / length);
    size_t rows = size_t(batch) * length;
    Numbers qkv = numbers(rows * 3 * C, 1), out(rows * C), logsumexp(rows * NH);
    Numbers scratch = attention_scratch(length);
    for (auto _ : state)
        attention_forward(out.data(), logsumexp.data(), qkv.data(), scratch.data(), Dropout(),
                          batch, length, C, NH);
    count_operations(state, 2.0 * double(rows) * (length + 1) * C);  // of the causal half
}

void attention_backward_124m(benchmark::State& state) {
    int length = int(state.range(0)), batch = std::max(1, BT / length);
    size_t rows = size_t(batch) * length;
    Numbers qkv = numbers(rows * 3 * C, 1), out(rows * C), logsumexp(rows * NH);
    Numbers dout = numbers(rows * C, 2), dqkv(qkv.size());
    Numbers scratch = attention_scratch(length);
    attention_forward(out.data(), logsumexp.data(), qkv.data(), scratch.data(), Dropout(), batch,
                      length, C, NH);
    for (auto _ : state)
        attention_backward(dqkv.data(), dout.data(), qkv.data(), out.data(), logsumexp.data(),
                           scratch.data(), Dropout(), batch, length, C, NH);
    count_operations(state, 4.0 * double(rows) * (length + 1) * C);
}

void gelu_forward_124m(benchmark::State& state) {
    Numbers inp = numbers(size_t(BT) * F, 1), out(inp.size());
    for (auto _ : state) gelu_forward(out.data(), inp.data(), inp.size());
    count_bytes(state, 2 * inp.size());
}

void gelu_backward_124m(benchmark::State& state) {
    Numbers inp = numbers(size_t(BT) * F, 1), dout = numbers(inp.size(), 2);
    Numbers dinp(inp.size());
    for (auto _ : state) gelu_backward(dinp.data(), dout.data(), inp.data(), inp.size());
    count_bytes(state, 3 * inp.size());
}

void dropout_forward_124m(benchmark::State& state) {
    Numbers inp = numbers(size_t(BT) * C, 1), out(inp.size());
    Dropout dropout;
    dropout.probability = 0.1;
    for (auto _ : state) dropout_forward(out.data(), inp.data(), dropout, B, T, C);
    count_bytes(state, 2 * inp.size());
}

void residual_layernorm_forward_124m(benchmark::State& state) {
    Numbers inp = numbers(size_t(BT) * C, 1), branch = numbers(inp.size(), 2);
    Numbers weight = numbers(C, 3), bias = numbers(C, 4), mean(BT), rstd(BT);
    Numbers residual(inp.size()), out(inp.size());
    for (auto _ : state)
        residual_layernorm_forward(residual.data(), out.data(), mean.data(), rstd.data(),
                                   inp.data(), branch.data(), weight.data(), bias.data(), 1e-5,
                                   Dropout(), B, T, C);
    count_bytes(state, 4 * inp.size());
}

// Loss and gradient over the logits of BT tokens, which the gradient replaces: each round reads the
// last one's, whose values cost the same.
void classifier_124m(benchmark::State& state) {
    Numbers logits = numbers(size_t(BT) * Vp, 1), losses(BT);
    std::vector<int> targets(BT, 17);
    for (auto _ : state)
        classifier_forward(losses.data(), logits.data(), targets.data(), 1.0 / BT, true, BT, V, Vp);
    count_bytes(state, 2 * logits.size());
}

constexpr size_t kUpdated = size_t(1) << 24;  // more than any cache holds

void global_norm_16m(benchmark::State& state) {
    Numbers gradients = numbers(kUpdated, 1);
    for (auto _ : state) benchmark::DoNotOptimize(global_norm(gradients.data(), kUpdated));
    count_bytes(state, kUpdated);
}

void adamw_update_16m(benchmark::State& state) {
    Numbers params = numbers(kUpdated, 1), grads = numbers(kUpdated, 2);
    Numbers m(kUpdated), v(kUpdated);
    AdamW adamw;
    for (auto _ : state)
        adamw_update(params.data(), m.data(), v.data(), grads.data(), kUpdated, adamw, 0.1, 1);
    count_bytes(state, 7 * kUpdated);
}

void register_layers() {
    auto add = [](const char* name, void (*layer)(benchmark::State&)) {
        return benchmark::RegisterBenchmark(name, layer)->UseRealTime()->MeasureProcessCPUTime();
    };
    add("encoder_forward", encoder_forward_124m);
    add("encoder_backward", encoder_backward_124m);
    add("layernorm_forward", layernorm_forward_124m);
    add("layernorm_backward", layernorm_backward_124m);
    add("matmul_forward", matmul_forward_124m)->Apply(product_sizes);
    add("matmul_backward", matmul_backward_124m)->Apply(product_sizes);
    if (gpt2_dtype("auto") == Dtype::bf16) {
        add("matmul_forward", matmul_forward_bf16_124m)->Apply(product_sizes);
        add("matmul_backward", matmul_backward_bf16_124m)->Apply(product_sizes);
    }
    add("attention_forward", attention_forward_124m)->Apply(sequence_lengths);
    add("attention_backward", attention_backward_124m)->Apply(sequence_lengths);
    add("gelu_forward", gelu_forward_124m);
    add("gelu_backward", gelu_backward_124m);
    add("dropout_forward", dropout_forward_124m);
    add("residual_layernorm_forward", residual_layernorm_forward_124m);
    add("classifier_forward", classifier_124m);
    add("global_norm", global_norm_16m);
    add("adamw_update", adamw_update_16m);
}

// ==== the whole step =============================================================================

template <typename F>
double seconds_of(F work) {
    auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

double own_step(GPT2* model, const int* inputs, const int* targets, const AdamW& adamw) {
    const GPT2Shape& shape = gpt2_shape(model);
    GPT2Pass pass;
    pass.training = true;
    pass.loss_scale = 1.0 / (shape.B * shape.T);
    gpt2_zero_gradients(model);
    gpt2_forward(model, inputs, targets, shape.B, shape.T, pass);
    gpt2_backward(model);
    gpt2_update(model, adamw);
    return gpt2_stats(model).loss;
}

std::vector<int> random_tokens(size_t count) {
    std::vector<int> tokens(count);
    for (size_t i = 0; i < count; i++) tokens[i] = int(philox(2, uint32_t(i), 0, 0, 0).word[0] % V);
    return tokens;
}

// A step of each in turn, from the same parameters and on the same batch, so that their losses must
// agree all along. Returns false when they do not.
bool compare_steps() {
    constexpr int kRounds = 5;
    GPT2Config config;
    GPT2Shape shape;
    shape.B = B, shape.T = T, shape.training = true, shape.threads = threads();
    GPT2Ptr own(gpt2_create(config, shape));
    gpt2_initialise(own.get(), 1);
    PlainModel plain(config, B, T);
    plain.copy_parameters(own.get());
    std::vector<int> tokens = random_tokens(BT + 1);

    printf("\nGPT-2 124M, B=%d, T=%d, float32, %s\n", B, T, gpt2_device().c_str());
    printf("%6s %14s %14s %8s %12s %12s\n", "step", "train_gpt2, s", "plain, s", "ratio", "loss",
           "plain loss");
    std::vector<double> own_times, plain_times;
    bool agree = true;
    for (int round = 0; round <= kRounds; round++) {  // round 0 touches the memory
        AdamW adamw;
        adamw.learning_rate = 1e-4;
        adamw.step = uint64_t(round) + 1;
        double own_loss = 0, plain_loss = 0;
        double own_time = seconds_of(
            [&] { own_loss = own_step(own.get(), tokens.data(), tokens.data() + 1, adamw); });
        double plain_time =
            seconds_of([&] { plain_loss = plain.step(tokens.data(), tokens.data() + 1, adamw); });
        printf("%6d %14.3f %14.3f %8.2f %12.5f %12.5f%s\n", round, own_time, plain_time,
               plain_time / own_time, own_loss, plain_loss, round == 0 ? "   (not counted)" : "");
        agree = agree && std::abs(own_loss - plain_loss) <= 1e-3 * plain_loss;
        if (round == 0) continue;
        own_times.push_back(own_time);
        plain_times.push_back(plain_time);
    }
    double own_median = median(own_times), plain_median = median(plain_times);
    double rate = operations_per_token(config, T) * BT / own_median;
    printf("median %14.3f %14.3f %8.2f   train_gpt2: %.0f tokens/s, %.0f GFLOP/s\n", own_median,
           plain_median, plain_median / own_median, BT / own_median, rate / 1e9);
    if (!agree) fprintf(stderr, "bench: error: the two steps disagree about the loss\n");
    return agree;
}

// ==== shares of the floors, and PyTorch ==========================================================

// What this machine can do at best, measured in this run.
struct Floors {
    double fp32_flops, bf16_flops, bytes_per_s, read_bytes_per_s;
    double flops(Dtype dtype) const { return dtype == Dtype::bf16 ? bf16_flops : fp32_flops; }
};

// Bytes that all threads read and write in place in a second, of more than a cache holds: what
// AdamW does with most of its own.
double memory_bandwidth() {
    constexpr size_t kCount = size_t(1) << 26;
    Numbers values(kCount, 1);
    double best = 0;
    for (int i = 0; i < 6; i++) {
        double seconds = seconds_of([&] {
#pragma omp parallel for simd schedule(static)
            for (size_t j = 0; j < kCount; j++) values[j] = values[j] * 0.5f + 0.5f;
        });
        best = std::max(best, 2 * sizeof(real) * double(kCount) / seconds);
    }
    return best;
}

// Bytes that all threads read in a second, of more than a cache holds: what a generated token does.
double read_bandwidth(int tries) {
    constexpr size_t kParts = 1 << 14, kPart = 1 << 13, kSums = 64;
    constexpr size_t kBytes = kParts * kPart * sizeof(real);
    static const Numbers values(kParts * kPart, 1);
    double best = 0;
    for (int i = 0; i < tries; i++) {
        float total = 0;
        double seconds = seconds_of([&] {
#pragma omp parallel for schedule(static) reduction(+ : total)
            for (size_t part = 0; part < kParts; part++) {
                float sums[kSums] = {};
                for (size_t j = 0; j < kPart; j += kSums)
                    for (size_t k = 0; k < kSums; k++) sums[k] += values[part * kPart + j + k];
                for (float sum : sums) total += sum;
            }
        });
        benchmark::DoNotOptimize(total);
        best = std::max(best, double(kBytes) / seconds);
    }
    return best;
}

Floors measure_floors() {
    GPT2Shape shape;
    shape.threads = threads();
    Floors floors = {};
    for (int i = 0; i < 3; i++) {
        shape.dtype = Dtype::fp32;
        floors.fp32_flops = std::max(floors.fp32_flops, gpt2_peak(shape).flops);
        shape.dtype = Dtype::bf16;
        floors.bf16_flops = std::max(floors.bf16_flops, gpt2_peak(shape).flops);
    }
    floors.bytes_per_s = memory_bandwidth();
    floors.read_bytes_per_s = read_bandwidth(6);
    return floors;
}

struct Row {
    std::string name;
    Dtype dtype;
    double ms, cpu_ms, floor_ms;  // wall clock; processor time of all threads; what it cannot beat
    double torch_ms = 0, torch_cpu_ms = 0;  // 0: not measured
};

// What Google Benchmark measured, as rows. (A layer's numbers are in cache where they fit, and it
// may then be faster than its floor.)
class LayerRows : public benchmark::BenchmarkReporter {
  public:
    LayerRows(std::vector<Row>& rows, const Floors& floors) : rows_(rows), floors_(floors) {}

    bool ReportContext(const Context&) override { return true; }
    void ReportRuns(const std::vector<Run>& runs) override {
        for (const Run& run : runs) {
            Dtype dtype = run.report_label == kBf16 ? Dtype::bf16 : Dtype::fp32;
            auto count = [&](const char* counter) {
                auto found = run.counters.find(counter);
                return found == run.counters.end() ? 0 : double(found->second);
            };
            double floor_s = std::max(count("operations") / floors_.flops(dtype),
                                      count("bytes") / floors_.bytes_per_s);
            const std::string& args = run.run_name.args;
            std::string name = run.run_name.function_name + (args.empty() ? "" : "/") + args;
            double calls = double(run.iterations);
            rows_.push_back({name, dtype, run.real_accumulated_time / calls * 1e3,
                             run.cpu_accumulated_time / calls * 1e3, floor_s * 1e3});
        }
    }

  private:
    std::vector<Row>& rows_;
    const Floors& floors_;
};

// PyTorch, where the Python that $PYTHON names (python3) has it, at its best: with jemalloc, where
// that is, and huge pages. A shell command, or nothing, which is said once.
const std::string& torch_command() {
    static const std::string command = [] {
        std::string python = getenv("PYTHON") != nullptr ? getenv("PYTHON") : "python3";
        if (system((python + " -c 'import torch' 2>/dev/null").c_str()) != 0) {
            printf("(no PyTorch for %s: nothing to put beside; PYTHON names another)\n",
                   python.c_str());
            return std::string();
        }
        return "LD_PRELOAD=$(ls /usr/lib/*/libjemalloc.so.2 2>/dev/null | head -n 1) "
               "MALLOC_CONF=thp:always,metadata_thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1 "
               "exec " +
               python + " dev/bench/torch_step.py ";
    }();
    return command;
}

// Steps or tokens of PyTorch's: `torch_step.py --turns WORK`, which is told how many, and answers
// with their milliseconds.
class TorchTurns {
  public:
    explicit TorchTurns(const std::string& work) {
        int to[2], from[2];
        if (work.empty() || torch_command().empty() || pipe2(to, O_CLOEXEC) != 0 ||
            pipe2(from, O_CLOEXEC) != 0)
            return;
        std::string command = torch_command() + "--turns " + work + " 2>/dev/null";
        fflush(nullptr);
        child_ = fork();
        if (child_ == 0) {
            dup2(to[0], STDIN_FILENO), dup2(from[1], STDOUT_FILENO);
            execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
            _exit(1);
        }
        close(to[0]), close(from[1]);
        to_ = fdopen(to[1], "w"), from_ = fdopen(from[0], "r");
        char line[64];
        ready_ = fgets(line, sizeof(line), from_) != nullptr;
        if (!ready_) printf("(no answer of PyTorch to %s)\n", work.c_str());
    }
    ~TorchTurns() {
        if (to_ != nullptr) fclose(to_), fclose(from_);
        if (child_ > 0) waitpid(child_, nullptr, 0);
    }
    TorchTurns(const TorchTurns&) = delete;

    // Adds the milliseconds of `calls` calls, by the clock and of all threads, if it gets them.
    void operator()(int calls, std::vector<double>& ms, std::vector<double>& processor_ms) {
        char line[64];
        double numbers[2];
        ready_ = ready_ && fprintf(to_, "%d\n", calls) > 0 && fflush(to_) == 0 &&
                 fgets(line, sizeof(line), from_) != nullptr &&
                 sscanf(line, "%lf %lf", &numbers[0], &numbers[1]) == 2;
        if (ready_) ms.push_back(numbers[0]), processor_ms.push_back(numbers[1]);
    }

  private:
    pid_t child_ = -1;
    FILE *to_ = nullptr, *from_ = nullptr;
    bool ready_ = false;
};

double processor_s() {
    timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

// Medians of `turns` turns of `calls` calls of `work`, taken with PyTorch's `torch_work`, and of
// the floor, floor_s(), at each. Calls that come before are not counted: those of a first turn, and
// one in each of several. Threads that have worked spin for some milliseconds before they sleep:
// each turn begins after that.
template <typename Floor, typename F>
Row timed_row(const std::string& name, Dtype dtype, int turns, int calls, Floor floor_s,
              const std::string& torch_work, F work) {
    constexpr auto kSpinning = std::chrono::milliseconds(20);
    std::vector<double> wall, processor, floor, torch_wall, torch_processor;
    TorchTurns torch(torch_work);
    for (int turn = 0; turn <= turns; turn++) {
        std::this_thread::sleep_for(kSpinning);
        floor.push_back(floor_s() * 1e3);
        for (int call = calls > 1 ? -1 : 0; call < calls; call++) {
            double before = processor_s(), seconds = seconds_of(work);
            if (turn == 0 || call < 0) continue;
            wall.push_back(seconds * 1e3), processor.push_back((processor_s() - before) * 1e3);
        }
        std::this_thread::sleep_for(kSpinning);
        if (turn > 0) torch(calls, torch_wall, torch_processor);
    }
    Row row = {name, dtype, median(wall), median(processor), median(floor)};
    if (int(torch_wall.size()) == turns)
        row.torch_ms = median(torch_wall), row.torch_cpu_ms = median(torch_processor);
    return row;
}

const char* torch_way(Dtype dtype) { return dtype == Dtype::bf16 ? "autocast" : "fp32"; }

// A step cannot overlap its products with what only moves memory: AdamW reads parameters, gradients
// and moments and writes all but gradients, and bf16 parameters too; the norm reads the gradients,
// which were zeroed. Its floor is the sum of both.
Row step_row(int batch, int length, Dtype dtype, const Floors& floors) {
    GPT2Config config;
    GPT2Shape shape;
    shape.B = batch, shape.T = length, shape.training = true, shape.threads = threads();
    shape.dtype = dtype;
    GPT2Ptr model(gpt2_create(config, shape));
    gpt2_initialise(model.get(), 1);
    size_t tokens = size_t(batch) * size_t(length);
    std::vector<int> ids = random_tokens(tokens + 1);
    double bytes = double(allocated_parameters(config)) * (dtype == Dtype::bf16 ? 38 : 36);
    double floor_s = operations_per_token(config, length) * double(tokens) / floors.flops(dtype) +
                     bytes / floors.bytes_per_s;
    AdamW adamw;
    adamw.learning_rate = 1e-4, adamw.step = 0;
    return timed_row(
        format("step %dx%d", batch, length), dtype, tokens > 256 ? 5 : 9, 1,
        [&] { return floor_s; }, format("step %s %dx%d", torch_way(dtype), batch, length),
        [&] {
            adamw.step++;
            own_step(model.get(), ids.data(), ids.data() + 1, adamw);
        });
}

// One token after another, of as many sequences as are made together: every weight of a product is
// read once. Its floor is measured with it, for memory that others use too has another speed every
// few seconds.
Row generation_row(Dtype dtype, bool int8, int together) {
    GPT2Config config;
    GPT2Shape shape;
    shape.T = 64, shape.generate = together, shape.threads = threads(), shape.dtype = dtype;
    shape.int8 = int8;
    GPT2Ptr model(gpt2_create(config, shape));
    gpt2_initialise(model.get(), 1);
    double bytes = double(allocated_parameters(config) - size_t(config.context) * C) *
                   (dtype == Dtype::bf16 ? 2 : 4);
    if (int8) bytes = double(gpt2_sizes(config, shape).int8_bytes);
    Numbers logits(size_t(together) * V);
    std::vector<int> tokens(size_t(together), 0);
    int position = 0;
    std::string name = together > 1 ? format("%d generated tokens", together) : "generated token";
    return timed_row(
        name + (int8 ? ", int8" : ""), dtype, 6, 8, [&] { return bytes / read_bandwidth(1); },
        int8 ? "" : format("token %s %d", torch_way(dtype), together),
        [&] {
            for (int b = 0; b < together; b++) tokens[size_t(b)] = (position * 7919 + b) % V;
            gpt2_generate(model.get(), tokens.data(), together, 1, position++, logits.data());
        });
}

// Layers by PyTorch, of which torch_step.py prints `layer WAY NAME ms processor-ms`.
void add_torch_layers(std::vector<Row>& rows) {
    if (rows.empty() || torch_command().empty()) return;
    FILE* pipe = popen((torch_command() + "--cpu 2>/dev/null").c_str(), "r");
    if (pipe == nullptr) return;
    char line[256], way[32], layer[64];
    double ms, cpu_ms;
    while (fgets(line, sizeof(line), pipe) != nullptr) {
        if (sscanf(line, "layer %31s %63s %lf %lf", way, layer, &ms, &cpu_ms) != 4) continue;
        for (Row& row : rows)
            if (row.name == layer && strcmp(way, torch_way(row.dtype)) == 0)
                row.torch_ms = ms, row.torch_cpu_ms = cpu_ms;
    }
    pclose(pipe);
}

void print_rows(const std::vector<Row>& rows, const Floors& floors, const std::string& json_path) {
    printf(
        "\nGPT-2 124M, %s\nfloors: %.0f GFLOP/s in fp32, %.0f in bf16, %.1f GB/s in place, %.1f "
        "read\n",
        gpt2_device().c_str(), floors.fp32_flops / 1e9, floors.bf16_flops / 1e9,
        floors.bytes_per_s / 1e9, floors.read_bytes_per_s / 1e9);
    printf("%-32s %5s %10s %10s %7s %11s %7s %13s\n", "", "dtype", "ms", "floor, ms", "share",
           "PyTorch, ms", "ratio", "ratio of CPU");
    std::string json = format(
        "{\"device\": \"%s\", \"fp32_flops\": %.4g, \"bf16_flops\": %.4g, "
        "\"bytes_per_s\": %.4g, \"read_bytes_per_s\": %.4g, \"rows\": [",
        gpt2_device().c_str(), floors.fp32_flops, floors.bf16_flops, floors.bytes_per_s,
        floors.read_bytes_per_s);
    for (const Row& row : rows) {
        const char* dtype = row.dtype == Dtype::bf16 ? "bf16" : "fp32";
        printf("%-32s %5s %10.3f %10.3f %6.0f%%", row.name.c_str(), dtype, row.ms, row.floor_ms,
               100 * row.floor_ms / row.ms);
        if (row.torch_ms > 0)
            printf(" %11.3f %7.2f %13.2f", row.torch_ms, row.ms / row.torch_ms,
                   row.cpu_ms / row.torch_cpu_ms);
        printf("\n");
        json += format(
            "%s\n {\"name\": \"%s\", \"dtype\": \"%s\", \"ms\": %.4g, \"cpu_ms\": "
            "%.4g, \"floor_ms\": %.4g, \"torch_ms\": %.4g, \"torch_cpu_ms\": %.4g}",
            &row == &rows[0] ? "" : ",", row.name.c_str(), dtype, row.ms, row.cpu_ms, row.floor_ms,
            row.torch_ms, row.torch_cpu_ms);
    }
    if (!json_path.empty()) write_file_atomic(json_path, json + "]}\n");
}

void compare_with_floors(bool steps, const std::string& json_path) {
    Floors floors = measure_floors();
    std::vector<Row> rows;
    LayerRows layers(rows, floors);
    register_layers();
    benchmark::RunSpecifiedBenchmarks(&layers);
    add_torch_layers(rows);
    for (Dtype dtype : {Dtype::fp32, Dtype::bf16}) {
        bool made_for_it = dtype == Dtype::fp32 || gpt2_dtype("auto") == Dtype::bf16;
        if (!steps || !made_for_it) continue;
        for (auto [batch, length] : {std::pair(4, 64), {4, 256}, {1, 1024}})
            rows.push_back(step_row(batch, length, dtype, floors));
        for (int together : {1, 8})
            for (bool int8 : {false, true}) rows.push_back(generation_row(dtype, int8, together));
    }
    print_rows(rows, floors, json_path);
}

}  // namespace

// --json=FILE, --no-plain, --no-steps: this program's own; the others are Google Benchmark's.
int main(int argc, char** argv) {
    std::string json_path;
    bool plain = true, steps = true;
    int kept = 1;
    for (int i = 1; i < argc; i++) {
        std::string word = argv[i];
        if (word.rfind("--json=", 0) == 0) json_path = word.substr(7);
        else if (word == "--no-plain") plain = false;
        else if (word == "--no-steps") steps = plain = false;
        else argv[kept++] = argv[i];
    }
    argc = kept;
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return kExitInput;
    signal(SIGPIPE, SIG_IGN);  // a PyTorch that died has no answer
    try {
        bool agree = !plain || compare_steps();
        compare_with_floors(steps, json_path);
        benchmark::Shutdown();
        return agree ? 0 : kExitMachine;
    } catch (const Error& error) {
        fprintf(stderr, "bench: error: %s\n", error.what());
        return error.exit_code;
    }
}
