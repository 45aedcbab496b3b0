// The matrix products with their epilogues (bias, GELU and its gradient, bias gradient): checked
// against the CPU twin in both ways that the program knows, fused by the library and as a product
// and a kernel, and timed beside each other.
#include "bench.cuh"

// ==== check ======================================================================================

struct ProductShape {
    int BT, C, OC;
};

struct ProductInputs {
    Numbers inp, weight, bias, pre, dout;
};

// bias and pre as asked for: empty ones are null.
template <class Float>
static ProductInputs inputs_of(const ProductShape& shape, bool bias) {
    size_t BT = size_t(shape.BT), C = size_t(shape.C), OC = size_t(shape.OC);
    return {random_numbers<Float>(BT * C, 1), random_numbers<Float>(OC * C, 2),
            random_numbers<Float>(bias ? OC : 0, 3), random_numbers<Float>(BT * C, 4, 3),
            random_numbers<Float>(BT * OC, 5)};
}

static std::string label_of(const char* what, const char* type, const ProductShape& shape,
                            bool bias) {
    return format("%s %s BT=%d C=%d OC=%d%s", what, type, shape.BT, shape.C, shape.OC,
                  bias ? "" : " no bias");
}

// Products that take the library's first proposal; nothing is timed.
static Products& products() {
    static Products only(ProductOptions{}, stream());
    return only;
}

// out and what goes into GELU; the second is empty where there is none
template <class Real>
static std::array<Numbers, 2> twin_forward(const ProductInputs& in, const ProductShape& shape,
                                           bool gelu) {
    auto [BT, C, OC] = shape;
    std::vector<Real> out(size_t(BT) * OC), pre(gelu ? out.size() : 0), bias = as<Real>(in.bias);
    if (gelu)
        matmul_gelu_forward(out.data(), pre.data(), as<Real>(in.inp).data(),
                            as<Real>(in.weight).data(), or_null(bias), BT, C, OC);
    else
        matmul_forward(out.data(), as<Real>(in.inp).data(), as<Real>(in.weight).data(),
                       or_null(bias), BT, C, OC);
    return {wide(out), wide(pre)};
}

template <class Float>
static void check_forward(const ProductShape& shape, bool has_bias) {
    auto [BT, C, OC] = shape;
    checks.label = label_of("matmul_forward", type_name<Float>(), shape, has_bias);
    ProductInputs in = inputs_of<Float>(shape, has_bias);
    Device<Float> out(size_t(BT) * OC), inp(in.inp), weight(in.weight), bias(in.bias);
    matmul_forward<Float>(out, inp, weight, bias, BT, C, OC, products());
    expect_close<Float>("out", out.download(), twin_forward<double>(in, shape, false)[0],
                        twin_forward<float>(in, shape, false)[0]);
}

// The way that the program takes when nothing was timed, and the library's epilogue where it has
// one for this shape; in float32, where the epilogue is less exact, the program knows none.
template <class Float>
static void check_gelu_forward(const ProductShape& shape, bool has_bias) {
    auto [BT, C, OC] = shape;
    ProductInputs in = inputs_of<Float>(shape, has_bias);
    Device<Float> inp(in.inp), weight(in.weight), bias(in.bias);
    auto reference = twin_forward<double>(in, shape, true);
    auto twin = twin_forward<float>(in, shape, true);
    Product fused = forward_product<Float>(
        BT, C, OC, has_bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX);
    for (bool epilogue : {false, true}) {
        checks.label = label_of("matmul_gelu_forward", type_name<Float>(), shape, has_bias) +
                       (epilogue ? " epilogue" : "");
        if (epilogue && (sizeof(Float) == 4 || !products().supports(fused))) continue;
        Device<Float> out(size_t(BT) * OC), pre(size_t(BT) * OC);
        if (epilogue)
            products().run(fused, static_cast<Float*>(out), static_cast<Float*>(weight),
                           static_cast<Float*>(inp), static_cast<Float*>(bias),
                           static_cast<Float*>(pre));
        else matmul_gelu_forward<Float>(out, pre, inp, weight, bias, BT, C, OC, products());
        expect_close<Float>("out", out.download(), reference[0], twin[0]);
        expect_close<Float>("pre", pre.download(), reference[1], twin[1]);
    }
}

// Gradients of one product: dinp, or dpre where its input came from GELU.
struct ProductGradients {
    Numbers dinp, dweight, dbias;
};

template <class Real>
static ProductGradients twin_backward(const ProductGradients& before, const ProductInputs& in,
                                      const ProductShape& shape, bool gelu) {
    auto [BT, C, OC] = shape;
    std::vector<Real> dinp(in.inp.size()), dweight = as<Real>(before.dweight),
                                           dbias = as<Real>(before.dbias);
    std::vector<Real> scratch(twin_scratch(OC));
    if (gelu)
        gelu_matmul_backward(dinp.data(), dweight.data(), or_null(dbias), as<Real>(in.dout).data(),
                             as<Real>(in.inp).data(), as<Real>(in.pre).data(),
                             as<Real>(in.weight).data(), scratch.data(), BT, C, OC);
    else
        matmul_backward(dinp.data(), dweight.data(), or_null(dbias), as<Real>(in.dout).data(),
                        as<Real>(in.inp).data(), as<Real>(in.weight).data(), scratch.data(), BT, C,
                        OC);
    return {wide(dinp), wide(dweight), wide(dbias)};
}

template <class Float>
static ProductGradients kernel_backward(const ProductGradients& before, const ProductInputs& in,
                                        const ProductShape& shape, bool gelu) {
    auto [BT, C, OC] = shape;
    Device<Float> dinp(in.inp.size()), dout(in.dout), inp(in.inp), weight(in.weight), pre(in.pre);
    Device<float> dweight(before.dweight), dbias(before.dbias);
    Device<float> scratch(size_t(kReduceRows) * OC);
    if (gelu)
        gelu_matmul_backward<Float>(dinp, dweight, dbias, dout, inp, pre, weight, scratch, BT, C,
                                    OC, products());
    else
        matmul_backward<Float>(dinp, dweight, dbias, dout, inp, weight, scratch, BT, C, OC,
                               products());
    return {dinp.download(), dweight.download(), dbias.download()};
}

// Tensor cores cut the running sum of a product off after each step of 8 terms or so, where the
// twin rounds to nearest [Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"]: up to a
// unit in the last place of the largest sum each time. It shows where the sum of bf16 products
// stays float.
template <class Float>
static double tensor_core_floor(int terms, const Numbers& reference) {
#ifdef __CUDACC__
    double largest = 0;
    for (double value : reference) largest = std::max(largest, std::fabs(value));
    return sizeof(Float) == 2 ? divide_up(terms, 8) * 0x1p-23 * largest : 0;
#else
    (void)terms, (void)reference;
    return 0;
#endif
}

// What the twin gives where the product is rounded before it is multiplied by GELU's derivative, as
// in two kernels.
template <class Float>
static Numbers dpre_in_two_roundings(const ProductGradients& before, const ProductInputs& in,
                                     const ProductShape& shape) {
    auto dpre = as<float>(rounded<Float>(twin_backward<float>(before, in, shape, false).dinp));
    gelu_backward(dpre.data(), dpre.data(), as<float>(in.pre).data(), dpre.size());
    return wide(dpre);
}

template <class Float>
static void check_backward(const ProductShape& shape, bool has_bias, bool gelu) {
    checks.label = label_of(gelu ? "gelu_matmul_backward" : "matmul_backward", type_name<Float>(),
                            shape, has_bias);
    ProductInputs in = inputs_of<Float>(shape, has_bias);
    ProductGradients before = {
        {}, random_numbers<float>(in.weight.size(), 6), random_numbers<float>(in.bias.size(), 7)};
    auto got = kernel_backward<Float>(before, in, shape, gelu);
    auto again = kernel_backward<Float>(before, in, shape, gelu);
    auto reference = twin_backward<double>(before, in, shape, gelu);
    auto twin = twin_backward<float>(before, in, shape, gelu);
    if (gelu && sizeof(Float) == 2) twin.dinp = dpre_in_two_roundings<Float>(before, in, shape);
    expect_close<Float>(gelu ? "dpre" : "dinp", got.dinp, reference.dinp, twin.dinp);
    expect_close<float>("dweight", got.dweight, reference.dweight, twin.dweight,
                        tensor_core_floor<Float>(shape.BT, reference.dweight));
    expect_close<float>("dbias", got.dbias, reference.dbias, twin.dbias);
    expect_equal("dinp, a second time", again.dinp, got.dinp);
    expect_equal("dweight, a second time", again.dweight, got.dweight);
    expect_equal("dbias, a second time", again.dbias, got.dbias);
}

// dbias + the sum over rows of dout, one row after the other in float: the yardstick for a sum of
// the library's, which does not work in as many parts as the twin does.
static Numbers sum_of_rows(const Numbers& dbias, const Numbers& dout) {
    std::vector<float> sum(dbias.size());
    for (size_t i = 0; i < dout.size(); i++) sum[i % sum.size()] += float(dout[i]);
    Numbers result(dbias.size());
    for (size_t i = 0; i < sum.size(); i++) result[i] = double(sum[i] + float(dbias[i]));
    return result;
}

// The library's epilogues of backward, which the program takes only where they proved faster:
// GELU's gradient, in bf16, and the bias's beside the weight's.
template <class Float>
static void check_backward_epilogues(const ProductShape& shape) {
    auto [BT, C, OC] = shape;
    ProductInputs in = inputs_of<Float>(shape, true);
    ProductGradients before = {
        {}, random_numbers<float>(in.weight.size(), 6), random_numbers<float>(in.bias.size(), 7)};
    auto reference = twin_backward<double>(before, in, shape, true);
    auto twin = twin_backward<float>(before, in, shape, true);
    Device<Float> dpre(in.inp.size()), dout(in.dout), inp(in.inp), weight(in.weight), pre(in.pre);
    Device<float> dweight(before.dweight), dbias(in.bias.size());
    Product data = {C,
                    BT,
                    OC,
                    false,
                    false,
                    kDataType<Float>,
                    kDataType<Float>,
                    false,
                    CUBLASLT_EPILOGUE_DGELU};
    checks.label = label_of("dgelu epilogue", type_name<Float>(), shape, true);
    if (sizeof(Float) == 2 && products().supports(data)) {
        products().run(data, static_cast<Float*>(dpre), static_cast<Float*>(weight),
                       static_cast<Float*>(dout), nullptr, static_cast<Float*>(pre));
        expect_close<Float>("dpre", dpre.download(), reference.dinp, twin.dinp);
    }
    Product weights = {
        C, OC, BT, false, true, kDataType<Float>, CUDA_R_32F, true, CUBLASLT_EPILOGUE_BGRADB};
    checks.label = label_of("bgrad epilogue", type_name<Float>(), shape, true);
    if (products().supports(weights)) {
        products().run(weights, static_cast<float*>(dweight), static_cast<Float*>(inp),
                       static_cast<Float*>(dout), static_cast<float*>(dbias), nullptr);
        expect_close<float>("dweight", dweight.download(), reference.dweight, twin.dweight,
                            tensor_core_floor<Float>(BT, reference.dweight));
        Numbers sum = dbias.download();  // written, where the contract adds
        for (size_t i = 0; i < sum.size(); i++) sum[i] += before.dbias[i];
        expect_close<float>("dbias", rounded<float>(sum), reference.dbias,
                            sum_of_rows(before.dbias, in.dout));
    }
}

template <class Float>
static void check_bias_backward(const ProductShape& shape) {
    auto [BT, C, OC] = shape;
    checks.label = label_of("bias_backward", type_name<Float>(), shape, true);
    ProductInputs in = inputs_of<Float>(shape, true);
    Numbers before = random_numbers<float>(in.bias.size(), 7), got[2];
    for (Numbers& result : got) {
        Device<Float> dout(in.dout);
        Device<float> dbias(before), scratch(size_t(kReduceRows) * OC);
        bias_backward<Float>(dbias, dout, scratch, BT, OC, stream());
        result = dbias.download();
    }
    ProductGradients all = {{}, Numbers(in.weight.size()), before};
    expect_close<float>("dbias", got[0], twin_backward<double>(all, in, shape, false).dbias,
                        twin_backward<float>(all, in, shape, false).dbias);
    expect_equal("dbias, a second time", got[1], got[0]);
}

// What a product shares with GELU or with a bias's gradient: forward and backward of one layer.
template <class Float>
struct Joints {
    ProductShape shape;
    ProductInputs in;
    ProductGradients before;
    Device<Float> out, pre, dpre, inp, weight, bias, dout, pre_in;
    Device<float> dweight, dbias, scratch;

    explicit Joints(const ProductShape& s)
        : shape(s),
          in(inputs_of<Float>(s, true)),
          before{{},
                 random_numbers<float>(in.weight.size(), 6),
                 random_numbers<float>(in.bias.size(), 7)},
          out(in.dout.size()),
          pre(in.dout.size()),
          dpre(in.inp.size()),
          inp(in.inp),
          weight(in.weight),
          bias(in.bias),
          dout(in.dout),
          pre_in(in.pre),
          dweight(before.dweight),
          dbias(before.dbias),
          scratch(size_t(kReduceRows) * size_t(s.OC)) {}

    void run(Products& settled) {
        auto [BT, C, OC] = shape;
        matmul_gelu_forward<Float>(out, pre, inp, weight, bias, BT, C, OC, settled);
        gelu_matmul_backward<Float>(dpre, dweight, dbias, dout, inp, pre_in, weight, scratch, BT, C,
                                    OC, settled);
    }

    void check_results(const char* way) {
        auto forward = twin_forward<double>(in, shape, true);
        auto twin_out = twin_forward<float>(in, shape, true);
        auto reference = twin_backward<double>(before, in, shape, true);
        auto twin = twin_backward<float>(before, in, shape, true);
        if (sizeof(Float) == 2) twin.dinp = dpre_in_two_roundings<Float>(before, in, shape);
        checks.label = label_of("joints", type_name<Float>(), shape, true) + ", " + way;
        expect_close<Float>("out", out.download(), forward[0], twin_out[0]);
        expect_close<Float>("pre", pre.download(), forward[1], twin_out[1]);
        expect_close<Float>("dpre", dpre.download(), reference.dinp, twin.dinp);
        expect_close<float>("dweight", dweight.download(), reference.dweight, twin.dweight,
                            tensor_core_floor<Float>(shape.BT, reference.dweight));
        expect_close<float>("dbias", dbias.download(), reference.dbias,
                            sum_of_rows(before.dbias, in.dout));
    }
};

// Which of the two ways is taken is a matter of timing, and so of chance here: each in turn, by a
// file of winners that says so.
template <class Float>
static void check_both_ways(const ProductShape& shape) {
    std::string pattern = (std::filesystem::temp_directory_path() / "matmul_XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) fail_machine("no folder for a file of winners");
    ProductOptions options;
    options.cache_folder = pattern;
    {
        Products timed(options, stream());
        timed.tune([&] { Joints<Float>(shape).run(timed); });
    }
    for (const char* way : {"first", "second"}) {
        [[maybe_unused]] int decided = 0;
        for (const auto& file : std::filesystem::directory_iterator(options.cache_folder)) {
            std::string path = file.path().string();
            json root = parse_json(read_file(path), path);
            for (auto& [key, value] : root.at("winners").items())
                if (value == "first" || value == "second") value = way, decided++;
            write_file_atomic(path, root.dump());
        }
        Products settled(options, stream());
        Joints<Float> joints(shape);
        joints.run(settled);
        joints.check_results(strcmp(way, "first") == 0 ? "by an epilogue" : "by a kernel");
#ifndef __CUDACC__  // a card's library may lack an epilogue
        constexpr int kJoints = sizeof(Float) == 2 ? 3 : 1;  // in float32, the bias alone
        checks.count(decided == kJoints, "the file has decided on all joints");
#endif
    }
    std::filesystem::remove_all(options.cache_folder);
}

static Numbers twice(const Numbers& values) {
    Numbers both = values;
    both.insert(both.end(), values.begin(), values.end());
    return both;
}

static Numbers second_half(const Numbers& values) {
    return Numbers(values.begin() + ptrdiff_t(values.size() / 2), values.end());
}

// Operands that start where a second layer's do: at a multiple of their size, which for odd sizes
// is less aligned than what the library's fastest algorithms ask for.
template <class Float>
static void check_second_layer(const ProductShape& shape) {
    auto [BT, C, OC] = shape;
    checks.label = label_of("matmul of a second layer", type_name<Float>(), shape, true);
    ProductInputs in = inputs_of<Float>(shape, true);
    ProductGradients before = {
        {}, random_numbers<float>(in.weight.size(), 6), random_numbers<float>(in.bias.size(), 7)};
    Device<Float> inp(twice(in.inp)), weight(twice(in.weight)), bias(twice(in.bias));
    Device<Float> dout(twice(in.dout)), out(2 * in.dout.size()), dinp(2 * in.inp.size());
    Device<float> dweight(twice(before.dweight)), dbias(twice(before.dbias));
    Device<float> scratch(size_t(kReduceRows) * OC);
    size_t in_inp = in.inp.size(), in_weight = in.weight.size(), in_out = in.dout.size();
    matmul_forward<Float>(out + in_out, inp + in_inp, weight + in_weight, bias + size_t(OC), BT, C,
                          OC, products());
    matmul_backward<Float>(dinp + in_inp, dweight + in_weight, dbias + size_t(OC), dout + in_out,
                           inp + in_inp, weight + in_weight, scratch, BT, C, OC, products());
    expect_close<Float>("out", second_half(out.download()),
                        twin_forward<double>(in, shape, false)[0],
                        twin_forward<float>(in, shape, false)[0]);
    auto reference = twin_backward<double>(before, in, shape, false);
    auto twin = twin_backward<float>(before, in, shape, false);
    expect_close<Float>("dinp", second_half(dinp.download()), reference.dinp, twin.dinp);
    expect_close<float>("dweight", second_half(dweight.download()), reference.dweight, twin.dweight,
                        tensor_core_floor<Float>(BT, reference.dweight));
    expect_close<float>("dbias", second_half(dbias.download()), reference.dbias, twin.dbias);
}

template <class Float>
static void check_type() {
    for (ProductShape shape : {ProductShape{51, 48, 144},
                               {195, 64, 256},
                               {387, 20, 33},
                               {17, 33, 97},
                               {64, 256, 64},
                               {3, 768, 128},
                               {1, 8, 256}}) {
        for (bool bias : {true, false}) {
            check_forward<Float>(shape, bias);
            check_gelu_forward<Float>(shape, bias);
            check_backward<Float>(shape, bias, false);
            check_backward<Float>(shape, bias, true);
        }
        check_backward_epilogues<Float>(shape);
        check_bias_backward<Float>(shape);
        check_second_layer<Float>(shape);
    }
    check_both_ways<Float>({51, 48, 144});
}

static void run_checks() {
    check_type<float>();
    check_type<bf16>();
}

// ==== bench ======================================================================================

// Operations/s of a large square product: the roof of the products below.
template <class Float>
static double product_roof(Products& tuned) {
    int n = bench_options.tiny ? 64 : sizeof(Float) == 2 ? 8192 : 4096;
    size_t N = size_t(n) * n;
    Device<Float> out(N), inp(N), weight(N);
    fill_random(inp, 1), fill_random(weight, 2);
    auto product = [&] { matmul_forward<Float>(out, inp, weight, nullptr, n, n, n, tuned); };
    tuned.tune(product);
    double ms = time_ms(product);
    table_operations("a large product", type_name<Float>(), format("%d x %d x %d", n, n, n),
                     2. * n * n * n, 2e3 * n * n * n / ms, ms);
    return 2e3 * n * n * n / ms;
}

template <class Float>
struct ProductTensors {
    Device<Float> out, inp, weight, bias, pre, dinp;
    Device<float> dweight, dbias, scratch;

    ProductTensors(int BT, int C, int OC)
        : out(size_t(BT) * OC),
          inp(size_t(BT) * C),
          weight(size_t(OC) * C),
          bias{size_t(OC)},
          pre(std::max(out.size(), inp.size())),
          dinp(inp.size()),
          dweight(weight.size()),
          dbias{size_t(OC)},
          scratch(size_t(kReduceRows) * OC) {
        fill_random(out, 1), fill_random(inp, 2), fill_random(weight, 3), fill_random(bias, 4);
        fill_random(pre, 5), fill_random(dweight, 6), fill_random(dbias, 7);
    }
};

// A product of a block, forward and backward. Beside each: what its kernels take when nothing is
// fused, or without the bias.
template <class Float>
static void bench_product(Products& tuned, double roof, const char* name, int BT, int C, int OC) {
    ProductTensors<Float> t(BT, C, OC);
    double operations = 2. * BT * C * OC;
    std::string size = format("%s, %d x %d x %d", name, BT, C, OC);
    auto row = [&](const char* kernel, double count, const std::function<void()>& work,
                   const std::string& beside = "") {
        tuned.tune(work);
        table_operations(kernel, type_name<Float>(), size, count, roof, time_ms(work), beside);
    };
    auto plain = [&] { matmul_forward<Float>(t.out, t.inp, t.weight, nullptr, BT, C, OC, tuned); };
    auto gelu = [&] { gelu_forward<Float>(t.pre, t.out, size_t(BT) * OC, stream()); };
    tuned.tune(plain);
    double plain_ms = time_ms(plain), gelu_ms = time_ms(gelu);
    row(
        "matmul_forward", operations,
        [&] { matmul_forward<Float>(t.out, t.inp, t.weight, t.bias, BT, C, OC, tuned); },
        format("without bias %.1f us", plain_ms * 1e3));
    row(
        "matmul_gelu_forward", operations,
        [&] {
            matmul_gelu_forward<Float>(t.out, t.pre, t.inp, t.weight, t.bias, BT, C, OC, tuned);
        },
        format("product and GELU apart %.1f us", (plain_ms + gelu_ms) * 1e3));
    row("matmul_backward", 2 * operations, [&] {
        matmul_backward<Float>(t.dinp, t.dweight, nullptr, t.out, t.inp, t.weight, t.scratch, BT, C,
                               OC, tuned);
    });
    double bias_ms =
        time_ms([&] { bias_backward<Float>(t.dbias, t.out, t.scratch, BT, OC, stream()); });
    row(
        "matmul_backward with bias", 2 * operations,
        [&] {
            matmul_backward<Float>(t.dinp, t.dweight, t.dbias, t.out, t.inp, t.weight, t.scratch,
                                   BT, C, OC, tuned);
        },
        format("bias_backward alone %.1f us", bias_ms * 1e3));
    row("gelu_matmul_backward", 2 * operations, [&] {
        gelu_matmul_backward<Float>(t.dinp, t.dweight, t.dbias, t.out, t.inp, t.pre, t.weight,
                                    t.scratch, BT, C, OC, tuned);
    });
    table_bytes("bias_backward", type_name<Float>(), format("%s, %d x %d", name, BT, OC),
                sizeof(Float) * double(BT) * OC, bias_ms);
}

// The sum over rows with other numbers of blocks for each multiprocessor, up to what it runs at
// once.
template <class Float>
static void bench_bias_blocks(int BT, int OC) {
    constexpr int Width = kWide<Float>, kThreads = kBiasWarps * kWarp;
    auto kernel = bias_backward_kernel<Float, Width>;
    Device<Float> dout(size_t(BT) * OC);
    Device<float> scratch(size_t(kReduceRows) * OC);
    fill_random(dout, 1);
    size_t shared = size_t(kThreads) * Width * sizeof(float);
    int columns = divide_up(OC, kWarp * Width);
    int all = resident_blocks(kernel, kThreads, shared) / multiprocessors();
    for (int each = all; each > 0; each = each == 1 ? 0 : divide_up(each, 2)) {
        int rows = std::min({std::max(1, each * multiprocessors() / columns),
                             divide_up(BT, kBiasWarps), kReduceRows});
        double ms = time_ms([&] {
            launch("bias_backward", kernel, dim3(unsigned(columns), unsigned(rows)), kThreads,
                   shared, stream(), static_cast<float*>(scratch), static_cast<const Float*>(dout),
                   BT, OC);
        });
        table_bytes(format("bias_backward alone, %d blocks a multiprocessor", each),
                    type_name<Float>(), format("%d x %d", BT, OC),
                    sizeof(Float) * double(dout.size()), ms);
    }
}

template <class Float>
static void bench_type() {
    ProductOptions options;
    options.deterministic = false;  // so that shapes are timed without a file to keep them in
    Products tuned(options, stream());
    double roof = product_roof<Float>(tuned);
    int C = bench_models()[0].C;
    for (int OC : {C, 3 * C, 4 * C}) bench_bias_blocks<Float>(bench_options.tokens, OC);
    for (const BenchModel& model : bench_models()) {
        if (sizeof(Float) == 4 && model.C > 1024) continue;  // nobody trains it so, and it is slow
        int BT = bench_options.tokens, C = model.C, Vp = (model.V + 127) / 128 * 128;
        bench_product<Float>(tuned, roof, model.name, BT, C, 3 * C);
        bench_product<Float>(tuned, roof, model.name, BT, C, C);
        bench_product<Float>(tuned, roof, model.name, BT, C, 4 * C);
        bench_product<Float>(tuned, roof, model.name, BT, 4 * C, C);
        bench_product<Float>(tuned, roof, model.name, std::min(BT, kClassifierRows), C, Vp);
    }
}

static void run_bench() {
    bench_type<bf16>();
    bench_type<float>();
}

int main(int argc, char** argv) { return bench_main(argc, argv, run_checks, run_bench); }
