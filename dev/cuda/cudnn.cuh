// cuDNN's causal attention in bf16, forward and backward, for attention.cu to hold beside ours. It
// is described to cuDNN as a graph of operations (its backend API, cudnn_graph.h), which one of its
// engines knows as a whole and runs as one fused kernel, or a few:
//
//   S = scale Q K^T, -inf above the diagonal      P = exp(S - max) / sum      out = P V
//   P = exp(S - logsumexp)   dV = P^T dout   dS = scale P (dout V^T - rowsum(dout out))
//   dK = dS^T Q              dQ = dS K
//
// The library is opened when the program runs, because the program must start where it is not, and
// is then said to be missing. Every failure is an Error with cuDNN's own words in it.
#pragma once

#include <cudnn.h>
#include <dlfcn.h>

#include <array>
#include <deque>
#include <limits>

#include "bench.cuh"

// ==== the library ================================================================================

#define CUDNN_FUNCTIONS(f)                                                                   \
    f(cudnnGetVersion) f(cudnnGetErrorString) f(cudnnCreate) f(cudnnDestroy)                 \
    f(cudnnSetStream) f(cudnnBackendCreateDescriptor) f(cudnnBackendDestroyDescriptor)       \
    f(cudnnBackendFinalize) f(cudnnBackendSetAttribute) f(cudnnBackendGetAttribute)          \
    f(cudnnBackendExecute)

// cuDNN's functions, under their own names, and a handle on the stream of the benchmarks.
struct Cudnn {
#define CUDNN_MEMBER(name) decltype(&::name) name = nullptr;
    CUDNN_FUNCTIONS(CUDNN_MEMBER)
#undef CUDNN_MEMBER
    void (*last_error)(char*, size_t) = nullptr;  // cudnnGetLastErrorString, since 9.0
    cudnnHandle_t handle = nullptr;

    Cudnn() {
        std::string file = format("libcudnn.so.%d", CUDNN_MAJOR);
        void* library = dlopen(file.c_str(), RTLD_NOW);
        if (library == nullptr) fail_machine("%s", dlerror());
        auto find = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(
                dlsym(library, name));
            return function != nullptr;
        };
#define CUDNN_FIND(name) \
    if (!find(this->name, #name)) fail_machine("%s lacks " #name, file.c_str());
        CUDNN_FUNCTIONS(CUDNN_FIND)
#undef CUDNN_FIND
        find(last_error, "cudnnGetLastErrorString");
        check(cudnnCreate(&handle), "a handle");
        check(cudnnSetStream(handle, stream()), "its stream");
    }
    Cudnn(const Cudnn&) = delete;
    ~Cudnn() {
        if (handle != nullptr) cudnnDestroy(handle);
    }

    void check(cudnnStatus_t status, const char* what) const {
        if (status == CUDNN_STATUS_SUCCESS) return;
        char text[512] = "";
        if (last_error != nullptr) last_error(text, sizeof text);
        text[strcspn(text, "\n")] = 0;
        fail_machine("%s: %s%s%s", what, cudnnGetErrorString(status), *text ? ": " : "", text);
    }
};

// ==== a graph ====================================================================================

// Operations, each from tensors to a tensor, and what runs them. A tensor is named by the number
// that tensor(), between() or scalar() returns.
class CudnnGraph {
  public:
    using Sizes = std::array<int64_t, 4>;  // of B, NH and two more dimensions

    explicit CudnnGraph(const Cudnn& cudnn) : cudnn_(cudnn) {}
    CudnnGraph(const CudnnGraph&) = delete;
    ~CudnnGraph() {
        for (size_t i = descriptors_.size(); i-- > 0;)
            cudnn_.cudnnBackendDestroyDescriptor(descriptors_[i]);
    }

    // One that lies in device memory.
    int tensor(cudnnDataType_t type, const Sizes& sizes, const Sizes& strides, void* memory) {
        return describe(type, sizes, strides, memory, false, false);
    }
    // What one operation hands to the next. It is in no memory: which operations are to be one
    // kernel follows from this.
    int between(cudnnDataType_t type, const Sizes& sizes) {
        int64_t row = sizes[3], matrix = sizes[2] * row;
        return between(type, sizes, {sizes[1] * matrix, matrix, row, 1});
    }
    int between(cudnnDataType_t type, const Sizes& sizes, const Sizes& strides) {
        return describe(type, sizes, strides, nullptr, true, false);
    }
    // A number, which the graph keeps on the host.
    int scalar(float value) {
        values_.push_back(value);
        return describe(CUDNN_DATA_FLOAT, {1, 1, 1, 1}, {1, 1, 1, 1}, &values_.back(), false, true);
    }

    void product(int c, int a, int b) {
        auto how = create(CUDNN_BACKEND_MATMUL_DESCRIPTOR);
        set(how, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
        finalize(how, "a product");
        auto op = create(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
        set(op, CUDNN_ATTR_OPERATION_MATMUL_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, how);
        use(op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a);
        use(op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b);
        use(op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c);
        add(op, "a product");
    }

    // y = x mode b; of a selection, x where the booleans t say so, else b.
    void pointwise(cudnnPointwiseMode_t mode, int y, int x, int b = -1, int t = -1,
                   cudnnDataType_t computed_in = CUDNN_DATA_FLOAT, int64_t axis = -1) {
        auto how = create(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
        set(how, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, mode);
        set(how, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, computed_in);
        if (axis >= 0) set(how, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, axis);
        finalize(how, "a pointwise operation");
        auto op = create(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
        set(op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, CUDNN_TYPE_BACKEND_DESCRIPTOR, how);
        use(op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x);
        if (b >= 0) use(op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b);
        if (t >= 0) use(op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t);
        use(op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y);
        add(op, "a pointwise operation");
    }

    // The number of each element along an axis.
    void index(int y, int x, int64_t axis) {
        pointwise(CUDNN_POINTWISE_GEN_INDEX, y, x, -1, -1, CUDNN_DATA_FLOAT, axis);
    }

    void reduction(cudnnReduceTensorOp_t mode, int y, int x) {
        auto how = create(CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
        set(how, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, mode);
        set(how, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, CUDNN_DATA_FLOAT);
        finalize(how, "a reduction");
        auto op = create(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
        set(op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, CUDNN_TYPE_BACKEND_DESCRIPTOR, how);
        use(op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x);
        use(op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y);
        add(op, "a reduction");
    }

    void reshape(int y, int x) {
        auto op = create(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
        use(op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x);
        use(op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y);
        add(op, "a reshape");
    }

    // Takes the first of the engines that cuDNN's heuristics propose and that can be used.
    void plan() {
        auto graph = create(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
        set(graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, cudnn_.handle);
        set_all(graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, operations_);
        finalize(graph, "the graph");
        auto heuristics = create(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
        set(heuristics, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR,
            graph);
        set(heuristics, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, CUDNN_HEUR_MODE_A);
        finalize(heuristics, "the heuristics");
        int64_t count = 0;
        auto results = [&](int64_t room, void* into) {
            cudnn_.check(cudnn_.cudnnBackendGetAttribute(
                             heuristics, CUDNN_ATTR_ENGINEHEUR_RESULTS,
                             CUDNN_TYPE_BACKEND_DESCRIPTOR, room, &count, into),
                         "the engines");
        };
        results(0, nullptr);
        std::vector<cudnnBackendDescriptor_t> engines;
        for (int64_t i = 0; i < count; i++)
            engines.push_back(create(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR));
        if (count > 0) results(count, engines.data());
        engines.resize(size_t(count));
        cudnnStatus_t status = CUDNN_STATUS_NOT_SUPPORTED;
        for (auto engine : engines)
            if ((status = use_engine(engine)) == CUDNN_STATUS_SUCCESS) return;
        cudnn_.check(status, format("no plan from %lld engines", (long long)count).c_str());
    }

    void run() const {
        cudnn_.check(cudnn_.cudnnBackendExecute(cudnn_.handle, plan_, memory_), "its kernels");
    }

  private:
    cudnnBackendDescriptor_t create(cudnnBackendDescriptorType_t type) {
        cudnnBackendDescriptor_t made = nullptr;
        cudnn_.check(cudnn_.cudnnBackendCreateDescriptor(type, &made), "a descriptor");
        descriptors_.push_back(made);
        return made;
    }

    template <class Value>
    void set(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
             cudnnBackendAttributeType_t type, const Value& value) {
        cudnn_.check(cudnn_.cudnnBackendSetAttribute(descriptor, name, type, 1, &value),
                     format("attribute %d", int(name)).c_str());
    }
    template <class Values>
    void set_all(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                 cudnnBackendAttributeType_t type, const Values& values) {
        cudnn_.check(cudnn_.cudnnBackendSetAttribute(descriptor, name, type,
                                                     int64_t(values.size()), values.data()),
                     format("attribute %d", int(name)).c_str());
    }
    void finalize(cudnnBackendDescriptor_t descriptor, const char* what) {
        cudnn_.check(cudnn_.cudnnBackendFinalize(descriptor), what);
    }

    // Tensor `number` as an operand; number i has the unique id i + 1.
    void use(cudnnBackendDescriptor_t op, cudnnBackendAttributeName_t name, int number) {
        set(op, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, tensors_.at(size_t(number)));
    }
    void add(cudnnBackendDescriptor_t op, const char* what) {
        finalize(op, what);
        operations_.push_back(op);
    }

    int describe(cudnnDataType_t type, const Sizes& sizes, const Sizes& strides, void* memory,
                 bool is_virtual, bool by_value) {
        int64_t id = int64_t(tensors_.size()) + 1, alignment = 16;
        auto made = create(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
        set(made, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, type);
        set_all(made, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, sizes);
        set_all(made, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, strides);
        set(made, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, id);
        set(made, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, alignment);
        set(made, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, is_virtual);
        set(made, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, by_value);
        finalize(made, "a tensor");
        tensors_.push_back(made);
        if (!is_virtual) ids_.push_back(id), pointers_.push_back(memory);
        return int(id - 1);
    }

    // Compiles an engine's kernels, and on success ties them to the tensors' memory.
    cudnnStatus_t use_engine(cudnnBackendDescriptor_t engine) {
        auto plan = create(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
        set(plan, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, cudnn_.handle);
        set(plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, CUDNN_TYPE_BACKEND_DESCRIPTOR, engine);
        cudnnStatus_t status = cudnn_.cudnnBackendFinalize(plan);
        if (status != CUDNN_STATUS_SUCCESS) return status;
        int64_t bytes = 0, count = 0;
        cudnn_.check(cudnn_.cudnnBackendGetAttribute(
                         plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1,
                         &count, &bytes),
                     "the size of its workspace");
        workspace_ = std::make_unique<Device<unsigned char>>(size_t(bytes));
        void* workspace = static_cast<unsigned char*>(*workspace_);
        memory_ = create(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
        set_all(memory_, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, ids_);
        set_all(memory_, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, pointers_);
        set(memory_, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, workspace);
        finalize(memory_, "the tensors' memory");
        plan_ = plan;
        return CUDNN_STATUS_SUCCESS;
    }

    const Cudnn& cudnn_;
    std::vector<cudnnBackendDescriptor_t> descriptors_, tensors_, operations_;
    std::vector<int64_t> ids_;
    std::vector<void*> pointers_;
    std::deque<float> values_;  // a deque, because their addresses must stay
    std::unique_ptr<Device<unsigned char>> workspace_;
    cudnnBackendDescriptor_t plan_ = nullptr, memory_ = nullptr;
};

// ==== attention ==================================================================================

// On our q, k and v, which are parts of one (B,T,3,NH,HS), and dout (B,T,NH,HS); its own results.
class CudnnAttention {
  public:
    Device<bf16> out, dqkv;
    Device<float> logsumexp;  // of the scaled scores, as ours is

    CudnnAttention(const Cudnn& cudnn, bf16* qkv, bf16* dout, int B, int T, int NH, int HS)
        : out(size_t(B) * T * NH * HS),
          dqkv(3 * out.size()),
          logsumexp(size_t(B) * NH * T),
          rows_(logsumexp.size()),
          dq_(out.size()),
          qkv_(qkv),
          dout_(dout),
          B_(B),
          T_(T),
          NH_(NH),
          HS_(HS),
          C_(NH_ * HS_),
          forward_(cudnn),
          backward_(cudnn) {
        size_t version = cudnn.cudnnGetVersion();
        // Earlier ones expect dq_ to be set to 0 for them.
        if (version < 90600) fail_machine("version %zu is older than 9.6", version);
        // Until 9.10 its softmax wanted the lowest number in place of -inf.
        masked_ = version < 91000 ? std::numeric_limits<float>::lowest()
                                   : -std::numeric_limits<float>::infinity();
        describe_forward();
        describe_backward();
    }

    void forward() { forward_.run(); }
    void backward() { backward_.run(); }  // takes out and logsumexp as forward() left them

  private:
    using Sizes = CudnnGraph::Sizes;
    static constexpr cudnnDataType_t kFloat = CUDNN_DATA_FLOAT, kBf16 = CUDNN_DATA_BFLOAT16;

    Sizes heads() const { return {B_, NH_, T_, HS_}; }
    Sizes scores() const { return {B_, NH_, T_, T_}; }
    Sizes one_a_row() const { return {B_, NH_, T_, 1}; }

    // The part of (B,T,3,NH,HS) that is q (0), k (1) or v (2), as it lies there, or transposed.
    Sizes in_qkv() const { return {T_ * 3 * C_, HS_, 3 * C_, 1}; }
    int part(CudnnGraph& g, bf16* qkv, int which) const {
        return g.tensor(kBf16, heads(), in_qkv(), qkv + which * C_);
    }
    int transposed_part(CudnnGraph& g, bf16* qkv, int which) const {
        return g.tensor(kBf16, {B_, NH_, HS_, T_}, {T_ * 3 * C_, HS_, 1, 3 * C_}, qkv + which * C_);
    }
    int of_out(CudnnGraph& g, bf16* values) const {
        return g.tensor(kBf16, heads(), {T_ * C_, HS_, C_, 1}, values);
    }
    int of_rows(CudnnGraph& g, float* values) const {
        return g.tensor(kFloat, one_a_row(), {NH_ * T_, T_, 1, 1}, values);
    }

    // scale Q K^T
    int scaled_scores(CudnnGraph& g, int q, int k_transposed, int scale) const {
        int product = g.between(kFloat, scores()), scaled = g.between(kFloat, scores());
        g.product(product, q, k_transposed);
        g.pointwise(CUDNN_POINTWISE_MUL, scaled, product, scale);
        return scaled;
    }

    // -inf in place of a score whose key comes after its query.
    int causal(CudnnGraph& g, int score) const {
        int row = g.between(CUDNN_DATA_INT32, scores());
        int column = g.between(CUDNN_DATA_INT32, scores());
        int seen = g.between(CUDNN_DATA_BOOLEAN, scores()), masked = g.between(kFloat, scores());
        g.index(row, score, 2);
        g.index(column, score, 3);
        g.pointwise(CUDNN_POINTWISE_CMP_GE, seen, row, column, -1, CUDNN_DATA_BOOLEAN);
        g.pointwise(CUDNN_POINTWISE_BINARY_SELECT, masked, score, g.scalar(masked_), seen);
        return masked;
    }

    float scale() const { return float(1 / std::sqrt(double(HS_))); }

    void describe_forward() {
        CudnnGraph& g = forward_;
        int q = part(g, qkv_, 0), k_transposed = transposed_part(g, qkv_, 1);
        int score = causal(g, scaled_scores(g, q, k_transposed, g.scalar(scale())));
        int largest = g.between(kFloat, one_a_row()), sum = g.between(kFloat, one_a_row());
        int below = g.between(kFloat, scores()), exponential = g.between(kFloat, scores());
        g.reduction(CUDNN_REDUCE_TENSOR_MAX, largest, score);
        g.pointwise(CUDNN_POINTWISE_SUB, below, score, largest);
        g.pointwise(CUDNN_POINTWISE_EXP, exponential, below);
        g.reduction(CUDNN_REDUCE_TENSOR_ADD, sum, exponential);
        int logarithm = g.between(kFloat, one_a_row());
        g.pointwise(CUDNN_POINTWISE_LOG, logarithm, sum);
        g.pointwise(CUDNN_POINTWISE_ADD, of_rows(g, logsumexp), largest, logarithm);
        int weight = g.between(kBf16, scores());
        g.pointwise(CUDNN_POINTWISE_DIV, weight, exponential, sum);
        g.product(of_out(g, out), weight, part(g, qkv_, 2));
        g.plan();
    }

    // rows_ = rowsum(dout out), and dQ as float32, in which it sums up, are in memory: the kernels
    // before and after the large one write and read them there. What is known as a whole is the
    // graph in this order, with the mask behind the subtraction.
    void describe_backward() {
        CudnnGraph& g = backward_;
        int scale = g.scalar(this->scale()), dout = of_out(g, dout_), sums = of_rows(g, rows_);
        int both = g.between(kFloat, heads()), added = g.between(kFloat, one_a_row());
        g.pointwise(CUDNN_POINTWISE_MUL, both, dout, of_out(g, out));
        g.reduction(CUDNN_REDUCE_TENSOR_ADD, added, both);
        g.pointwise(CUDNN_POINTWISE_MUL, sums, added, g.scalar(1));
        int q = part(g, qkv_, 0), k_transposed = transposed_part(g, qkv_, 1);
        int score = scaled_scores(g, q, k_transposed, scale);
        int below = g.between(kFloat, scores()), weight = g.between(kFloat, scores());
        g.pointwise(CUDNN_POINTWISE_SUB, below, score, of_rows(g, logsumexp));
        g.pointwise(CUDNN_POINTWISE_EXP, weight, causal(g, below));
        Sizes transposed = {NH_ * T_ * T_, T_ * T_, 1, T_};
        int weight_transposed = g.between(kBf16, scores(), transposed);
        g.reshape(weight_transposed, weight);
        g.product(part(g, dqkv, 2), weight_transposed, dout);
        int dweight = g.between(kFloat, scores()), less = g.between(kFloat, scores());
        g.product(dweight, dout, transposed_part(g, qkv_, 2));
        g.pointwise(CUDNN_POINTWISE_SUB, less, dweight, sums);
        int slope = g.between(kFloat, scores()), dscore = g.between(kFloat, scores());
        g.pointwise(CUDNN_POINTWISE_MUL, slope, less, weight);
        g.pointwise(CUDNN_POINTWISE_MUL, dscore, slope, scale);
        int dscore_transposed = g.between(kBf16, scores(), transposed);
        g.reshape(dscore_transposed, dscore);
        g.product(part(g, dqkv, 1), dscore_transposed, q);
        int k = g.between(kFloat, heads(), in_qkv());
        g.reshape(k, k_transposed);
        int dq = g.tensor(kFloat, heads(), {NH_ * T_ * HS_, T_ * HS_, HS_, 1}, dq_);
        g.product(dq, dscore, k);
        g.pointwise(CUDNN_POINTWISE_IDENTITY, part(g, dqkv, 0), dq);
        g.plan();
    }

    Device<float> rows_, dq_;
    bf16 *qkv_, *dout_;
    int64_t B_, T_, NH_, HS_, C_;
    float masked_;
    CudnnGraph forward_, backward_;
};
