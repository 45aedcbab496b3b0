// The harness of this folder. Each source here is a program about one layer of train_gpt2.cu:
//
//   LAYER check [-v] [--factor N] [--wgmma]    holds its kernels against the CPU twin; attention's
//                                              for Hopper alone
//   LAYER bench [--tokens N] [--tiny]          times them at the sizes of GPT-2 124M and 1558M
//
// The yardstick of `check`: the reference is the CPU twin in double, on inputs rounded to the type
// of the kernel. A kernel may be at most twice as far from it as the twin in float is, whose
// outputs are rounded to that type: in norm, and in the largest element, for each tensor. Outputs
// are full of NaN before a kernel writes them, and lie between guard zones. The last line is `N
// passed, N failed, N skipped`; exit code 0 when nothing failed, 1 when something did.
//
// The program is linked with train_gpt2.cpp twice, compiled as float and as double, both made weak
// (objcopy --weaken): only their layer functions are called.
#pragma once

#define GPT2_LAYERS_ONLY  // without the model; of the layers, what a program calls is compiled
#include <algorithm>
#include <cmath>
#include <functional>

#include "../../train_gpt2.cu"

// ==== the twin in double =========================================================================

// gpt2.h declares the layer functions for `real`, which is float here. These are the same, of the
// object that was compiled with -DGPT2_REAL=double.
void encoder_forward(double* out, const int* inputs, const double* wte, const double* wpe, int B,
                     int T, int C);
void encoder_backward(double* dwte, double* dwpe, const double* dout, const int* inputs, int B,
                      int T, int C);
void layernorm_forward(double* out, double* mean, double* rstd, const double* inp,
                       const double* weight, const double* bias, double epsilon, int B, int T,
                       int C);
void layernorm_backward(double* dinp, double* dweight, double* dbias, const double* dout,
                        const double* inp, const double* weight, const double* mean,
                        const double* rstd, double* scratch, int B, int T, int C);
void matmul_forward(double* out, const double* inp, const double* weight, const double* bias,
                    int BT, int C, int OC);
void matmul_backward(double* dinp, double* dweight, double* dbias, const double* dout,
                     const double* inp, const double* weight, double* scratch, int BT, int C,
                     int OC);
void attention_forward(double* out, double* logsumexp, const double* qkv, double* scratch,
                       const Dropout& dropout, int B, int T, int C, int NH);
void attention_backward(double* dqkv, const double* dout, const double* qkv, const double* out,
                        const double* logsumexp, double* scratch, const Dropout& dropout, int B,
                        int T, int C, int NH);
void gelu_forward(double* out, const double* inp, size_t N);
void gelu_backward(double* dinp, const double* dout, const double* inp, size_t N);
void dropout_forward(double* out, const double* inp, const Dropout& dropout, int B, int T, int C);
void residual_layernorm_forward(double* residual, double* out, double* mean, double* rstd,
                                const double* inp, const double* branch, const double* weight,
                                const double* bias, double epsilon, const Dropout& dropout, int B,
                                int T, int C);
void matmul_gelu_forward(double* out, double* pre, const double* inp, const double* weight,
                         const double* bias, int BT, int C, int OC);
void gelu_matmul_backward(double* dpre, double* dweight, double* dbias, const double* dout,
                          const double* inp, const double* pre, const double* weight,
                          double* scratch, int BT, int C, int OC);
void classifier_forward(double* losses, double* logits, const int* targets, double loss_scale,
                        bool gradient, int BT, int V, int Vp);
double global_norm(const double* gradients, size_t N);
void adamw_update(double* params, double* m, double* v, const double* grads, size_t N,
                  const AdamW& adamw, double weight_decay, double grad_scale);

// ==== numbers on the host ========================================================================

// Host tensors are in double whatever the type of the kernel, and hold values of that type.
using Numbers = std::vector<double>;

inline double rounded_to(float, double value) { return double(float(value)); }
inline double rounded_to(bf16, double value) {
    return double(__bfloat162float(__float2bfloat16_rn(float(value))));
}

template <class Float>
double rounded(double value) {
    return rounded_to(Float(), value);
}

template <class Float>
Numbers rounded(Numbers values) {
    for (double& value : values) value = rounded<Float>(value);
    return values;
}

// n numbers in [centre - spread, centre + spread), rounded to Float; the same for the same seed.
template <class Float>
Numbers random_numbers(size_t n, uint64_t seed, double spread = 1, double centre = 0) {
    Numbers values(n);
    for (size_t i = 0; i < n; i++) {
        double unit = philox(seed, uint32_t(i), 0, 0, 0).word[0] / 2147483648.0 - 1;
        values[i] = rounded<Float>(centre + spread * unit);
    }
    return values;
}

inline std::vector<int> random_ids(size_t n, uint64_t seed, int limit) {
    std::vector<int> ids(n);
    for (size_t i = 0; i < n; i++)
        ids[i] = int(philox(seed, uint32_t(i), 1, 0, 0).word[0] % uint32_t(limit));
    return ids;
}

// The same numbers in the twin's type, and back.
template <class Real>
std::vector<Real> as(const Numbers& values) {
    return std::vector<Real>(values.begin(), values.end());
}

template <class Real>
Numbers wide(const std::vector<Real>& values) {
    return Numbers(values.begin(), values.end());
}

// Numbers that the twin's sums over rows work in, for rows of `columns`.
inline size_t twin_scratch(int columns) {
    return 2 * gpt2_sizes(GPT2Config(), GPT2Shape()).reduce_rows * size_t(columns);
}

// What a twin's optional argument takes: null for an empty tensor.
template <class Real>
Real* or_null(std::vector<Real>& values) {
    return values.empty() ? nullptr : values.data();
}

// ==== checks =====================================================================================

struct Checks {
    int passed = 0, failed = 0, skipped = 0;
    bool verbose = false;
    double factor = 2;   // how many times the twin's error a kernel's may be
    std::string label;   // of the case that runs
    bool wgmma = false;  // what a card computes by wgmma, alone

    void count(bool good, const std::string& what) {
        (good ? passed : failed)++;
        if (!good || verbose)
            printf("%s %s: %s\n", good ? "passed" : "FAILED", label.c_str(), what.c_str());
        fflush(stdout);
    }
};

inline Checks checks;

// How far a tensor is from the reference: the norm of the difference, and its largest element.
struct Distance {
    double norm = 0, largest = 0;
};

inline Distance distance(const Numbers& values, const Numbers& reference) {
    if (values.size() != reference.size())
        fail_machine("a tensor of %zu numbers beside a reference of %zu", values.size(),
                     reference.size());
    Distance result;
    bool finite = true;  // std::max would pass over NaN
    for (size_t i = 0; i < values.size(); i++) {
        double difference = std::fabs(values[i] - reference[i]);
        finite = finite && std::isfinite(values[i]);
        result.norm += difference * difference;
        result.largest = std::max(result.largest, difference);
    }
    result.norm = finite ? std::sqrt(result.norm) : NAN;
    result.largest = finite ? result.largest : NAN;
    return result;
}

// The yardstick. `floor` is an error of one element that is allowed whatever the twin's is, for
// tensors in which the twin makes none; each use says where it comes from.
template <class Float>
void expect_close(const char* name, const Numbers& got, const Numbers& reference,
                  const Numbers& twin, double floor = 0) {
    Distance error = distance(got, reference), allowed = distance(rounded<Float>(twin), reference);
    double norm = checks.factor * allowed.norm + floor * std::sqrt(double(got.size()));
    double largest = checks.factor * allowed.largest + floor;
    bool good = error.norm <= norm && error.largest <= largest;  // false for NaN
    checks.count(good, format("%s: off by %.3g in norm (allowed %.3g) and %.3g in one element "
                              "(allowed %.3g)",
                              name, error.norm, norm, error.largest, largest));
}

// The same numbers, bit for bit (NaN matches nothing).
inline void expect_equal(const char* name, const Numbers& got, const Numbers& expected) {
    size_t differ = 0, first = 0;
    for (size_t i = got.size(); i-- > 0;)
        if (!(got[i] == expected[i])) differ++, first = i;
    std::string text = format("%s: %zu of %zu differ", name, differ, got.size());
    if (differ > 0)
        text += format(", the first at %zu: %.9g for %.9g", first, got[first], expected[first]);
    checks.count(differ == 0, text);
}

// ==== memory on the device =======================================================================

// The stream that everything here runs on: not the default one, which would wait for all others and
// hide a kernel launched on the wrong stream.
inline cudaStream_t stream() {
    static cudaStream_t only = [] {
        cudaStream_t made;
        check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "a stream");
        return made;
    }();
    return only;
}

// A tensor on the device, between two guard zones; all of it is NaN (ones in every bit) until it is
// written. An empty one is a null pointer. In the emulator the tensor ends where its allocation
// does, because reading past that is an error there and reading a guard zone is none.
template <class Number>
class Device {
  public:
    explicit Device(size_t size) : size_(size) {
        if (size_ == 0) return;
        check(cudaMalloc(&memory_, bytes()), "device memory");
        check(cudaMemsetAsync(memory_, 0xFF, bytes(), stream()), "filling device memory");
    }
    explicit Device(const std::vector<Number>& values) : Device(values.size()) { copy_in(values); }
    explicit Device(const Numbers& values) requires(!std::is_same_v<Number, double>)
        : Device(values.size()) {
        upload(values);
    }
    Device(const Device&) = delete;
    ~Device() { cudaFree(memory_); }

    operator Number*() const {
        return size_ == 0 ? nullptr : reinterpret_cast<Number*>(memory_ + kFront);
    }
    size_t size() const { return size_; }

    void upload(const Numbers& values) {
        std::vector<Number> narrow(values.size());
        for (size_t i = 0; i < values.size(); i++) narrow[i] = Number(float(values[i]));
        copy_in(narrow);
    }

    // The values, once the stream is done; counts a failure when a guard zone was written.
    Numbers download() const {
        Numbers values;
        for (Number number : copy_out()) values.push_back(double(float(number)));
        return values;
    }

    std::vector<Number> copy_out() const {
        check(cudaStreamSynchronize(stream()), "the kernels of a check");
        std::vector<Number> values(size_);
        if (size_ == 0) return values;
        std::vector<unsigned char> all(bytes());
        check(cudaMemcpy(all.data(), memory_, bytes(), cudaMemcpyDeviceToHost), "a copy");
        size_t end = kFront + size_ * sizeof(Number);
        for (size_t i = 0; i < all.size(); i++)
            if ((i < kFront || i >= end) && all[i] != 0xFF) {
                checks.count(false, format("byte %td of a tensor of %zu bytes was written",
                                           ptrdiff_t(i) - ptrdiff_t(kFront), end - kFront));
                break;
            }
        memcpy(values.data(), all.data() + kFront, end - kFront);
        return values;
    }

  private:
    static constexpr size_t kFront = 256;  // keeps the alignment that cudaMalloc gives
#ifdef __CUDACC__
    static constexpr size_t kBehind = 256;
#else
    static constexpr size_t kBehind = 0;
#endif
    size_t bytes() const { return kFront + size_ * sizeof(Number) + kBehind; }

    void copy_in(const std::vector<Number>& values) {
        if (values.size() != size_)
            fail_machine("%zu numbers for a tensor of %zu", values.size(), size_);
        if (size_ == 0) return;
        check(cudaMemcpyAsync(static_cast<Number*>(*this), values.data(), size_ * sizeof(Number),
                              cudaMemcpyHostToDevice, stream()),
              "a copy");
    }

    size_t size_;
    unsigned char* memory_ = nullptr;
};

// ==== time =======================================================================================

struct BenchOptions {
    int tokens = 65536;  // B * T of the activations
    bool tiny = false;   // the flow alone, at sizes whose times mean nothing
};

inline BenchOptions bench_options;

// The sizes that are timed.
struct BenchModel {
    const char* name;
    int C, NH, V, T;
};

inline std::vector<BenchModel> bench_models() {
    if (bench_options.tiny) return {{"tiny", 64, 2, 251, 32}};
    return {{"124M", 768, 12, 50257, 1024}, {"1558M", 1600, 25, 50257, 1024}};
}

template <class Float>
__global__ void random_fill_kernel(Float* out, size_t N, uint64_t seed) {
    size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= N) return;
    float unit = float(philox(seed, uint32_t(i), uint32_t(i >> 32), 0, 0).word[0]) * 0x1p-31f;
    out[i] = from_float<Float>(unit - 1.f);
}

// A tensor of random numbers in [-1, 1) for a benchmark: zeros would make products faster than real
// numbers do.
template <class Float>
void fill_random(const Device<Float>& out, uint64_t seed) {
    constexpr int kThreads = 256;
    size_t blocks = (out.size() + kThreads - 1) / kThreads;
    launch("random_fill", random_fill_kernel<Float>, dim3(unsigned(blocks)), dim3(kThreads), 0,
           stream(), static_cast<Float*>(out), out.size(), seed);
}

class Stopwatch {
  public:
    Stopwatch() {
        check(cudaEventCreate(&start_), "an event");
        check(cudaEventCreate(&end_), "an event");
    }
    Stopwatch(const Stopwatch&) = delete;
    ~Stopwatch() {
        cudaEventDestroy(start_);
        cudaEventDestroy(end_);
    }
    double ms(const std::function<void()>& work) {
        check(cudaEventRecord(start_, stream()), "an event");
        work();
        check(cudaEventRecord(end_, stream()), "an event");
        check(cudaEventSynchronize(end_), "what is timed");
        float time_ms = 0;
        check(cudaEventElapsedTime(&time_ms, start_, end_), "a time");
        return double(time_ms);
    }

  private:
    cudaEvent_t start_, end_;
};

inline int l2_bytes() {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "the device");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "the size of its cache");
    return bytes;
}

// The median time of `work`, by events: after a warm-up, and with the level-2 cache overwritten
// before each sample, so that what a sample reads comes from memory, as it does within a step.
inline double time_ms(const std::function<void()>& work) {
    constexpr size_t kSamples = 31;
    constexpr double kBudgetMs = 100;
    static Device<unsigned char> other(size_t(bench_options.tiny ? 1 : 2 * l2_bytes()));
    Stopwatch stopwatch;
    std::vector<double> samples;
    double spent = 0;
    size_t warmups = bench_options.tiny ? 0 : 3, most = bench_options.tiny ? 1 : kSamples;
    for (size_t i = 0; i < warmups; i++) work();
    while (samples.size() < most && (samples.size() < 5 || spent < kBudgetMs)) {
        check(cudaMemsetAsync(other, 0, other.size(), stream()), "the cache");
        samples.push_back(stopwatch.ms(work));
        spent += samples.back();
    }
    std::nth_element(samples.begin(), samples.begin() + ptrdiff_t(samples.size() / 2),
                     samples.end());
    return samples[samples.size() / 2];
}

// ==== the table ==================================================================================

// What the card can do, measured here: bytes/s of a copy between two places of its memory, read and
// written both counted, and operations/s of a large product.
inline double copy_roof() {
    static double bytes_per_s = [] {
        size_t bytes = bench_options.tiny ? 4096 : size_t(1) << 30;
        Device<unsigned char> from(bytes), to(bytes);
        double ms = time_ms([&] {
            check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream()), "a copy");
        });
        return 2e3 * double(bytes) / ms;
    }();
    return bytes_per_s;
}

template <class Float>
const char* type_name() {
    return sizeof(Float) == 2 ? "bf16" : "fp32";
}

inline void table_head() {
    printf(
        "\n| kernel | type | size | GB or GFLOP | us | GB/s or TFLOP/s | of the roof | beside it |"
        "\n| --- | --- | --- | --- | --- | --- | --- | --- |\n");
}

// One line: the bytes that a kernel must move. `beside` is the library's way, timed here too.
inline void table_bytes(const std::string& kernel, const char* type, const std::string& size,
                        double bytes, double ms, const std::string& beside = "") {
    printf("| `%s` | %s | %s | %.4g GB | %.1f | %.0f GB/s | %.0f%% | %s |\n", kernel.c_str(), type,
           size.c_str(), bytes / 1e9, ms * 1e3, bytes / ms / 1e6, bytes / ms * 1e5 / copy_roof(),
           beside.c_str());
    fflush(stdout);
}

// The same for operations, of which `roof` a second can be done.
inline void table_operations(const std::string& kernel, const char* type, const std::string& size,
                             double operations, double roof, double ms,
                             const std::string& beside = "") {
    printf("| `%s` | %s | %s | %.4g GFLOP | %.1f | %.1f TFLOP/s | %.0f%% | %s |\n", kernel.c_str(),
           type, size.c_str(), operations / 1e9, ms * 1e3, operations / ms / 1e9,
           operations / ms * 1e5 / roof, beside.c_str());
    fflush(stdout);
}

// ==== the program ================================================================================

inline int usage(const char* program) {
    fprintf(stderr,
            "usage: %s check [-v] [--factor N] [--wgmma]\n"
            "       %s bench [--tokens N] [--tiny]\n",
            program, program);
    return kExitInput;
}

inline std::string device_line() {
    cudaDeviceProp properties;
    int driver = 0, runtime = 0;
    check(cudaGetDeviceProperties(&properties, 0), "the device");
    check(cudaDriverGetVersion(&driver), "the driver");
    check(cudaRuntimeGetVersion(&runtime), "the runtime");
    return format("%s, %d multiprocessors, CUDA %d.%d, driver for %d.%d", properties.name,
                  properties.multiProcessorCount, runtime / 1000, runtime % 1000 / 10,
                  driver / 1000, driver % 1000 / 10);
}

// One line where there is no card, before a check has failed for the want of it.
inline void require_card() {
    int driver = 0, count = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) fail_machine("no NVIDIA driver here");
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) fail_machine("no GPU here: %s", cudaGetErrorString(status));
    if (count == 0) fail_machine("no GPU here");
}

// What main() of each program is; run_checks and run_bench are its own.
inline int bench_main(int argc, char** argv, void (*run_checks)(), void (*run_bench)()) {
    if (argc < 2) return usage(argv[0]);
    std::string mode = argv[1];
    for (int i = 2; i < argc; i++) {
        std::string word = argv[i];
        if (word == "-v") checks.verbose = true;
        else if (word == "--wgmma") checks.wgmma = true;
        else if (word == "--factor" && i + 1 < argc) checks.factor = atof(argv[++i]);
        else if (word == "--tiny") bench_options.tiny = true, bench_options.tokens = 64;
        else if (word == "--tokens" && i + 1 < argc) bench_options.tokens = atoi(argv[++i]);
        else return usage(argv[0]);
    }
    if ((mode != "check" && mode != "bench") || bench_options.tokens < 1) return usage(argv[0]);
    bool started = false;
    try {
        require_card();
        started = true;
        if (mode == "bench") {
            printf("%s\n", device_line().c_str());
            table_head();
            run_bench();
            return 0;
        }
        run_checks();
    } catch (const Error& error) {
        fprintf(stderr, "%s: error: %s\n", argv[0], error.what());
        if (mode == "bench" || !started) return error.exit_code;
        checks.count(false, error.what());
    }
    printf("%d passed, %d failed, %d skipped\n", checks.passed, checks.failed, checks.skipped);
    return checks.failed == 0 ? 0 : 1;
}
