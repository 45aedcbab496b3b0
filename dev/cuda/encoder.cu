// The encoder, out = wte[token] + wpe[t], and its gradient: checked against the CPU twin, and
// timed.
#include "bench.cuh"

// ==== check ======================================================================================

struct EncoderShape {
    int B, T, C, V;
};

static std::string label_of(const char* what, const char* type, const EncoderShape& shape) {
    return format("%s %s B=%d T=%d C=%d V=%d", what, type, shape.B, shape.T, shape.C, shape.V);
}

template <class Real>
static Numbers twin_forward(const std::vector<int>& inputs, const Numbers& wte, const Numbers& wpe,
                            int B, int T, int C) {
    std::vector<Real> out(size_t(B) * T * C);
    encoder_forward(out.data(), inputs.data(), as<Real>(wte).data(), as<Real>(wpe).data(), B, T, C);
    return wide(out);
}

template <class Float>
static void check_forward(const EncoderShape& shape) {
    auto [B, T, C, V] = shape;
    checks.label = label_of("encoder_forward", type_name<Float>(), shape);
    std::vector<int> inputs = random_ids(size_t(B) * T, 1, V);
    Numbers wte = random_numbers<Float>(size_t(V) * C, 2);
    Numbers wpe = random_numbers<Float>(size_t(T) * C, 3);
    Device<Float> out(size_t(B) * T * C), device_wte(wte), device_wpe(wpe);
    Device<int> device_inputs(inputs);
    encoder_forward<Float>(out, device_inputs, device_wte, device_wpe, B, T, C, stream());
    expect_close<Float>("out", out.download(), twin_forward<double>(inputs, wte, wpe, B, T, C),
                        twin_forward<float>(inputs, wte, wpe, B, T, C));
}

// A batch's tokens by place, on the host and on the device.
struct Buckets {
    std::vector<int> tokens, starts, places;
    TokenCounts count;
    Device<int> device_tokens, device_starts, device_places;

    Buckets(const std::vector<int>& inputs, int V)
        : tokens(inputs.size()),
          starts(inputs.size() + 1),
          places(inputs.size()),
          count(sort(inputs, V)),
          device_tokens(tokens),
          device_starts(starts),
          device_places(places) {}
    TokenBuckets on_device() const { return {device_tokens, device_starts, device_places, count}; }

  private:
    TokenCounts sort(const std::vector<int>& inputs, int V) {
        std::vector<int> counts(static_cast<size_t>(V), -1);  // scratch may hold anything
        return sort_tokens(tokens.data(), starts.data(), places.data(), counts.data(),
                           inputs.data(), int(inputs.size()), V);
    }
};

// Every place once, under its own token, in order; frequent tokens first.
static void check_buckets(const std::vector<int>& inputs, int V) {
    checks.label = format("sort_tokens of %zu, V=%d", inputs.size(), V);
    Buckets buckets(inputs, V);
    auto [all, frequent] = buckets.count;
    bool ordered = buckets.starts[0] == 0 && all >= 1;
    size_t seen = 0;
    for (int i = 0; ordered && i < all; i++) {
        int begin = buckets.starts[size_t(i)], end = buckets.starts[size_t(i) + 1];
        ordered =
            begin < end && (end - begin > kFewPlaces) == (i < frequent) &&
            (i == 0 || i == frequent || buckets.tokens[size_t(i) - 1] < buckets.tokens[size_t(i)]);
        for (int j = begin; ordered && j < end; j++, seen++) {
            int place = buckets.places[size_t(j)];
            ordered = inputs[size_t(place)] == buckets.tokens[size_t(i)] &&
                      (j == begin || buckets.places[size_t(j) - 1] < place);
        }
    }
    checks.count(ordered && seen == inputs.size(), "every place once, in order of token and place");
}

template <class Real>
static std::array<Numbers, 2> twin_backward(const Numbers& dwte, const Numbers& dwpe,
                                            const Numbers& dout, const std::vector<int>& inputs,
                                            int B, int T, int C) {
    std::vector<Real> tokens = as<Real>(dwte), positions = as<Real>(dwpe);
    encoder_backward(tokens.data(), positions.data(), as<Real>(dout).data(), inputs.data(), B, T,
                     C);
    return {wide(tokens), wide(positions)};
}

template <class Float>
static std::array<Numbers, 2> kernel_backward(const Numbers& dwte, const Numbers& dwpe,
                                              const Numbers& dout, const Buckets& buckets, int B,
                                              int T, int C) {
    Device<float> tokens(dwte), positions(dwpe);
    encoder_backward<Float>(tokens, positions, Device<Float>(dout), buckets.on_device(), B, T, C,
                            stream());
    return {tokens.download(), positions.download()};
}

template <class Float>
static void check_backward(const EncoderShape& shape) {
    auto [B, T, C, V] = shape;
    std::vector<int> inputs = random_ids(size_t(B) * T, 1, V);
    check_buckets(inputs, V);
    checks.label = label_of("encoder_backward", type_name<Float>(), shape);
    Buckets buckets(inputs, V);
    Numbers dwte = random_numbers<float>(size_t(V) * C, 2);  // gradients add to what is there
    Numbers dwpe = random_numbers<float>(size_t(T) * C, 3);
    Numbers dout = random_numbers<Float>(size_t(B) * T * C, 4);
    auto got = kernel_backward<Float>(dwte, dwpe, dout, buckets, B, T, C);
    auto again = kernel_backward<Float>(dwte, dwpe, dout, buckets, B, T, C);
    auto reference = twin_backward<double>(dwte, dwpe, dout, inputs, B, T, C);
    auto twin = twin_backward<float>(dwte, dwpe, dout, inputs, B, T, C);
    expect_close<float>("dwte", got[0], reference[0], twin[0]);
    expect_close<float>("dwpe", got[1], reference[1], twin[1]);
    expect_equal("dwte, a second time", again[0], got[0]);
    expect_equal("dwpe, a second time", again[1], got[1]);
}

template <class Float>
static void check_type() {
    for (EncoderShape shape : {EncoderShape{3, 17, 48, 97},
                               {3, 65, 64, 251},
                               {3, 129, 20, 7},
                               {3, 129, 64, 24},
                               {1, 64, 33, 1031},
                               {2, 17, 768, 97},
                               {1, 1, 8, 1}}) {
        check_forward<Float>(shape);
        check_backward<Float>(shape);
    }
}

static void run_checks() {
    check_type<float>();
    check_type<bf16>();
}

// ==== bench ======================================================================================

template <class Float>
static void bench_type(const BenchModel& model) {
    int C = model.C, V = model.V, T = model.T, B = std::max(1, bench_options.tokens / T);
    size_t N = size_t(B) * T * C, rows = size_t(B) * T;
    std::string size = format("%s, B=%d, T=%d", model.name, B, T);
    // Text repeats some tokens often: ids of falling frequency, about as Zipf's law has it.
    std::vector<int> inputs = random_ids(rows, 1, V);
    for (size_t i = 0; i < rows; i += 2)
        inputs[i] = int(std::pow(double(V), inputs[i] / double(V))) % V;
    Buckets buckets(inputs, V);
    Device<int> device_inputs(inputs);
    Device<Float> out(N), wte(size_t(V) * C), wpe(size_t(T) * C);
    Device<float> dwte(size_t(V) * C), dwpe(size_t(T) * C);
    fill_random(wte, 2), fill_random(wpe, 3), fill_random(dwte, 4), fill_random(dwpe, 5);
    double used = double(buckets.count.all) * C;
    double ms =
        time_ms([&] { encoder_forward<Float>(out, device_inputs, wte, wpe, B, T, C, stream()); });
    table_bytes("encoder_forward", type_name<Float>(), size,
                sizeof(Float) * (double(N) + used + double(T) * C) + 4. * double(rows), ms);
    ms = time_ms(
        [&] { encoder_backward<Float>(dwte, dwpe, out, buckets.on_device(), B, T, C, stream()); });
    table_bytes("encoder_backward", type_name<Float>(), size,
                2 * sizeof(Float) * double(N) + 8 * (used + double(T) * C), ms);
}

static void run_bench() {
    for (const BenchModel& model : bench_models()) {
        bench_type<bf16>(model);
        bench_type<float>(model);
    }
}

int main(int argc, char** argv) { return bench_main(argc, argv, run_checks, run_bench); }
