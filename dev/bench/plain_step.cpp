// GPT-2's training step as anyone would write it from the equations: a loop nest for each layer,
// parallel over the rows of its output, with the innermost loop over contiguous memory and in
// vector code. No blocking, no packing, no fused layers, no library: what is missing here is what
// the program does beyond that. It is compiled with the same flags, and it computes the same
// numbers to rounding, which `make bench` checks.
//
// It knows no dropout, no ignored targets and only a tied head with biases: GPT-2's own shape.
#include "plain_step.h"

#include <cmath>
#include <vector>

// ==== layers =====================================================================================

// Rows of (b,t) everywhere: BT = B * T.

static void encoder_plain(float* out, const int* inputs, const float* wte, const float* wpe, int BT,
                          int T, int C) {
#pragma omp parallel for
    for (int bt = 0; bt < BT; bt++) {
        const float *token = wte + size_t(inputs[bt]) * C, *position = wpe + size_t(bt % T) * C;
        for (int c = 0; c < C; c++) out[size_t(bt) * C + c] = token[c] + position[c];
    }
}

static void encoder_plain_backward(float* dwte, float* dwpe, const float* dout, const int* inputs,
                                   int BT, int T, int C) {
    for (int bt = 0; bt < BT; bt++) {  // not parallel: two rows may hold the same token
        float *dtoken = dwte + size_t(inputs[bt]) * C, *dposition = dwpe + size_t(bt % T) * C;
        for (int c = 0; c < C; c++) dtoken[c] += dout[size_t(bt) * C + c];
        for (int c = 0; c < C; c++) dposition[c] += dout[size_t(bt) * C + c];
    }
}

static void layernorm_plain(float* out, float* mean, float* rstd, const float* inp,
                            const float* weight, const float* bias, float epsilon, int BT, int C) {
#pragma omp parallel for
    for (int bt = 0; bt < BT; bt++) {
        const float* x = inp + size_t(bt) * C;
        float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += x[c];
        float m = sum / float(C);
#pragma omp simd reduction(+ : squares)
        for (int c = 0; c < C; c++) squares += (x[c] - m) * (x[c] - m);
        float r = 1 / std::sqrt(squares / float(C) + epsilon);
        for (int c = 0; c < C; c++) out[size_t(bt) * C + c] = (x[c] - m) * r * weight[c] + bias[c];
        mean[bt] = m;
        rstd[bt] = r;
    }
}

// dinp accumulates, for the residual stream's sake, like the parameters' gradients.
static void layernorm_plain_backward(float* dinp, float* dweight, float* dbias, const float* dout,
                                     const float* inp, const float* weight, const float* mean,
                                     const float* rstd, int BT, int C) {
#pragma omp parallel for
    for (int bt = 0; bt < BT; bt++) {
        const float *x = inp + size_t(bt) * C, *dy = dout + size_t(bt) * C;
        float m = mean[bt], r = rstd[bt], sum = 0, sum_n = 0;
#pragma omp simd reduction(+ : sum, sum_n)
        for (int c = 0; c < C; c++) {
            sum += dy[c] * weight[c];
            sum_n += dy[c] * weight[c] * (x[c] - m) * r;
        }
        for (int c = 0; c < C; c++)
            dinp[size_t(bt) * C + c] +=
                r * (dy[c] * weight[c] - sum / float(C) - (x[c] - m) * r * sum_n / float(C));
    }
    for (int bt = 0; bt < BT; bt++) {
        const float *x = inp + size_t(bt) * C, *dy = dout + size_t(bt) * C;
        for (int c = 0; c < C; c++) dweight[c] += dy[c] * (x[c] - mean[bt]) * rstd[bt];
        for (int c = 0; c < C; c++) dbias[c] += dy[c];
    }
}

// out (BT,OC) = inp (BT,C) weight (OC,C)^T + bias (OC) or null
static void matmul_plain(float* out, const float* inp, const float* weight, const float* bias,
                         int BT, int C, int OC) {
#pragma omp parallel for
    for (int bt = 0; bt < BT; bt++) {
        const float* x = inp + size_t(bt) * C;
        for (int o = 0; o < OC; o++) {
            const float* w = weight + size_t(o) * C;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < C; i++) sum += x[i] * w[i];
            out[size_t(bt) * OC + o] = bias != nullptr ? sum + bias[o] : sum;
        }
    }
}

// dinp is written, dweight and dbias (or null) accumulate.
static void matmul_plain_backward(float* dinp, float* dweight, float* dbias, const float* dout,
                                  const float* inp, const float* weight, int BT, int C, int OC) {
#pragma omp parallel for
    for (int bt = 0; bt < BT; bt++) {
        float* dx = dinp + size_t(bt) * C;
        std::fill(dx, dx + C, 0.f);
        for (int o = 0; o < OC; o++) {
            const float* w = weight + size_t(o) * C;
            float d = dout[size_t(bt) * OC + o];
            for (int i = 0; i < C; i++) dx[i] += d * w[i];
        }
    }
#pragma omp parallel for
    for (int o = 0; o < OC; o++) {
        float* dw = dweight + size_t(o) * C;
        for (int bt = 0; bt < BT; bt++) {
            const float* x = inp + size_t(bt) * C;
            float d = dout[size_t(bt) * OC + o];
            if (dbias != nullptr) dbias[o] += d;
            for (int i = 0; i < C; i++) dw[i] += d * x[i];
        }
    }
}

// out (B,T,C); att (B,NH,T,T) holds the weights for backward; qkv (B,T,3C)
static void attention_plain(float* out, float* att, const float* qkv, int B, int T, int C, int NH) {
    int HS = C / NH;
    float scale = 1 / std::sqrt(float(HS));
#pragma omp parallel for collapse(3)
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < NH; h++) {
            for (int t = 0; t < T; t++) {
                const float* q = qkv + (size_t(b) * T + t) * 3 * C + h * HS;
                float* p = att + ((size_t(b) * NH + h) * T + t) * T;
                float* y = out + (size_t(b) * T + t) * C + h * HS;
                float largest = -INFINITY, total = 0;
                for (int t2 = 0; t2 <= t; t2++) {
                    const float* k = qkv + (size_t(b) * T + t2) * 3 * C + C + h * HS;
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int i = 0; i < HS; i++) sum += q[i] * k[i];
                    p[t2] = sum * scale;
                    largest = std::max(largest, p[t2]);
                }
                for (int t2 = 0; t2 <= t; t2++) total += p[t2] = std::exp(p[t2] - largest);
                std::fill(y, y + HS, 0.f);
                for (int t2 = 0; t2 <= t; t2++) {
                    const float* v = qkv + (size_t(b) * T + t2) * 3 * C + 2 * C + h * HS;
                    p[t2] /= total;
                    for (int i = 0; i < HS; i++) y[i] += p[t2] * v[i];
                }
            }
        }
    }
}

// dqkv is written. Parallel over heads, because the queries of one add to the same dk and dv.
static void attention_plain_backward(float* dqkv, const float* dout, const float* att,
                                     const float* qkv, int B, int T, int C, int NH) {
    int HS = C / NH;
    float scale = 1 / std::sqrt(float(HS));
    std::fill(dqkv, dqkv + size_t(B) * T * 3 * C, 0.f);
#pragma omp parallel for collapse(2)
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < NH; h++) {
            std::vector<float> dp(size_t(T), 0.f);
            for (int t = 0; t < T; t++) {
                size_t row = (size_t(b) * T + t) * 3 * C + h * HS;
                const float* p = att + ((size_t(b) * NH + h) * T + t) * T;
                const float* dy = dout + (size_t(b) * T + t) * C + h * HS;
                float weighted = 0;
                for (int t2 = 0; t2 <= t; t2++) {
                    size_t other = (size_t(b) * T + t2) * 3 * C + h * HS;
                    const float* v = qkv + other + 2 * C;
                    float* dv = dqkv + other + 2 * C;
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int i = 0; i < HS; i++) sum += dy[i] * v[i];
                    for (int i = 0; i < HS; i++) dv[i] += p[t2] * dy[i];
                    dp[size_t(t2)] = sum;
                    weighted += p[t2] * sum;
                }
                for (int t2 = 0; t2 <= t; t2++) {
                    size_t other = (size_t(b) * T + t2) * 3 * C + h * HS;
                    float ds = p[t2] * (dp[size_t(t2)] - weighted) * scale;
                    for (int i = 0; i < HS; i++) dqkv[row + i] += ds * qkv[other + C + i];
                    for (int i = 0; i < HS; i++) dqkv[other + C + i] += ds * qkv[row + i];
                }
            }
        }
    }
}

constexpr float kScale = 0.7978845608f;  // sqrt(2 / pi)

static void gelu_plain(float* out, const float* inp, size_t N) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        float x = inp[i];
        out[i] = 0.5f * x * (1 + std::tanh(kScale * (x + 0.044715f * x * x * x)));
    }
}

static void gelu_plain_backward(float* dinp, const float* dout, const float* inp, size_t N) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        float x = inp[i], t = std::tanh(kScale * (x + 0.044715f * x * x * x));
        float slope = kScale * (1 + 3 * 0.044715f * x * x);
        dinp[i] = dout[i] * (0.5f * (1 + t) + 0.5f * x * (1 - t * t) * slope);
    }
}

static void residual_plain(float* out, const float* inp1, const float* inp2, size_t N) {
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) out[i] = inp1[i] + inp2[i];
}

// Returns the mean loss; logits (BT,V) become the mean's gradient.
static double classifier_plain(float* logits, const int* targets, int BT, int V) {
    double loss = 0;
#pragma omp parallel for reduction(+ : loss)
    for (int bt = 0; bt < BT; bt++) {
        float* row = logits + size_t(bt) * V;
        float largest = -INFINITY, total = 0;
        for (int v = 0; v < V; v++) largest = std::max(largest, row[v]);
        loss += largest - row[targets[bt]];
        for (int v = 0; v < V; v++) total += row[v] = std::exp(row[v] - largest);
        loss += std::log(total);
        for (int v = 0; v < V; v++) row[v] /= total * float(BT);
        row[targets[bt]] -= 1.f / float(BT);
    }
    return loss / BT;
}

static void adamw_plain(float* w, float* m, float* v, const float* g, size_t N, const AdamW& adamw,
                        double weight_decay, float grad_scale) {
    float beta1 = float(adamw.beta1), beta2 = float(adamw.beta2), rate = float(adamw.learning_rate);
    float correction1 = float(1 - std::pow(adamw.beta1, double(adamw.step)));
    float correction2 = float(1 - std::pow(adamw.beta2, double(adamw.step)));
    float epsilon = float(adamw.epsilon), decay = float(weight_decay);
#pragma omp parallel for
    for (size_t i = 0; i < N; i++) {
        float gradient = g[i] * grad_scale;
        m[i] = beta1 * m[i] + (1 - beta1) * gradient;
        v[i] = beta2 * v[i] + (1 - beta2) * gradient * gradient;
        float step = m[i] / correction1 / (std::sqrt(v[i] / correction2) + epsilon);
        w[i] -= rate * (step + decay * w[i]);
    }
}

// ==== model ======================================================================================

struct Layer {
    std::vector<float> ln1, mean1, rstd1, qkv, att, atty, residual2, ln2, mean2, rstd2, fch, gelu,
        residual3;
};

struct PlainModel::State {
    GPT2Config config;
    int B, T;
    ParameterTable table;
    std::vector<float> params, grads, m, v;
    std::vector<Layer> layers;
    std::vector<float> encoded, lnf, meanf, rstdf, logits, branch;
    std::vector<float> dresidual, dnorm, dhidden, dqkv;

    // The first number of a tensor of the table, in params or grads; no row is padded here.
    float* tensor(std::vector<float>& group, int row, int layer = 0) {
        size_t offset = 0;
        for (int i = 0; i < row; i++)
            if (table[size_t(i)].present)
                offset += table[size_t(i)].file_size() * table[size_t(i)].count;
        return group.data() + offset + table[size_t(row)].file_size() * size_t(layer);
    }
    float* w(int row, int layer = 0) { return tensor(params, row, layer); }
    float* d(int row, int layer = 0) { return tensor(grads, row, layer); }
    void block_forward(const float* inp, int l);
    void block_backward(const float* inp, int l);
    double forward_head(const int* targets);
};

PlainModel::PlainModel(const GPT2Config& config, int B, int T) : state_(new State) {
    State& s = *state_;
    s.config = config, s.B = B, s.T = T;
    s.table = parameter_table(config);
    size_t BT = size_t(B) * size_t(T), C = size_t(config.channels),
           F = size_t(config.hidden_size());
    for (std::vector<float>* group : {&s.params, &s.grads, &s.m, &s.v})
        group->resize(count_parameters(config));
    s.layers.resize(size_t(config.layers));
    for (Layer& a : s.layers) {
        for (std::vector<float>* stat : {&a.mean1, &a.rstd1, &a.mean2, &a.rstd2}) stat->resize(BT);
        for (std::vector<float>* row : {&a.ln1, &a.atty, &a.residual2, &a.ln2, &a.residual3})
            row->resize(BT * C);
        for (std::vector<float>* row : {&a.fch, &a.gelu}) row->resize(BT * F);
        a.qkv.resize(BT * 3 * C);
        a.att.resize(BT * size_t(config.heads) * size_t(T));
    }
    for (std::vector<float>* row : {&s.encoded, &s.lnf, &s.branch, &s.dresidual, &s.dnorm})
        row->resize(BT * C);
    for (std::vector<float>* stat : {&s.meanf, &s.rstdf}) stat->resize(BT);
    s.dhidden.resize(BT * F);
    s.dqkv.resize(BT * 3 * C);
    s.logits.resize(BT * size_t(config.vocab_size));
}

PlainModel::~PlainModel() = default;

void PlainModel::copy_parameters(const GPT2* model) {
    for (int row = 0; row < kParameterRows; row++) {
        const ParameterRow& tensor = state_->table[size_t(row)];
        for (int layer = 0; tensor.present && layer < int(tensor.count); layer++)
            gpt2_copy_out(model, Group::parameters, row, layer, state_->w(row, layer));
    }
}

void PlainModel::State::block_forward(const float* inp, int l) {
    int BT = B * T, C = config.channels, F = config.hidden_size();
    float epsilon = float(config.layer_norm_epsilon);
    Layer& a = layers[size_t(l)];
    layernorm_plain(a.ln1.data(), a.mean1.data(), a.rstd1.data(), inp, w(k_ln1w, l), w(k_ln1b, l),
                    epsilon, BT, C);
    matmul_plain(a.qkv.data(), a.ln1.data(), w(k_qkvw, l), w(k_qkvb, l), BT, C, 3 * C);
    attention_plain(a.atty.data(), a.att.data(), a.qkv.data(), B, T, C, config.heads);
    matmul_plain(branch.data(), a.atty.data(), w(k_attprojw, l), w(k_attprojb, l), BT, C, C);
    residual_plain(a.residual2.data(), inp, branch.data(), size_t(BT) * C);
    layernorm_plain(a.ln2.data(), a.mean2.data(), a.rstd2.data(), a.residual2.data(), w(k_ln2w, l),
                    w(k_ln2b, l), epsilon, BT, C);
    matmul_plain(a.fch.data(), a.ln2.data(), w(k_fcw, l), w(k_fcb, l), BT, C, F);
    gelu_plain(a.gelu.data(), a.fch.data(), size_t(BT) * F);
    matmul_plain(branch.data(), a.gelu.data(), w(k_fcprojw, l), w(k_fcprojb, l), BT, F, C);
    residual_plain(a.residual3.data(), a.residual2.data(), branch.data(), size_t(BT) * C);
}

// dresidual holds the gradient of the block's output on entry and of its input on exit.
void PlainModel::State::block_backward(const float* inp, int l) {
    int BT = B * T, C = config.channels, F = config.hidden_size();
    Layer& a = layers[size_t(l)];
    float *dx = dresidual.data(), *dn = dnorm.data(), *dh = dhidden.data();
    matmul_plain_backward(dh, d(k_fcprojw, l), d(k_fcprojb, l), dx, a.gelu.data(), w(k_fcprojw, l),
                          BT, F, C);
    gelu_plain_backward(dh, dh, a.fch.data(), size_t(BT) * F);
    matmul_plain_backward(dn, d(k_fcw, l), d(k_fcb, l), dh, a.ln2.data(), w(k_fcw, l), BT, C, F);
    layernorm_plain_backward(dx, d(k_ln2w, l), d(k_ln2b, l), dn, a.residual2.data(), w(k_ln2w, l),
                             a.mean2.data(), a.rstd2.data(), BT, C);
    matmul_plain_backward(dn, d(k_attprojw, l), d(k_attprojb, l), dx, a.atty.data(),
                          w(k_attprojw, l), BT, C, C);
    attention_plain_backward(dqkv.data(), dn, a.att.data(), a.qkv.data(), B, T, C, config.heads);
    matmul_plain_backward(dn, d(k_qkvw, l), d(k_qkvb, l), dqkv.data(), a.ln1.data(), w(k_qkvw, l),
                          BT, C, 3 * C);
    layernorm_plain_backward(dx, d(k_ln1w, l), d(k_ln1b, l), dn, inp, w(k_ln1w, l), a.mean1.data(),
                             a.rstd1.data(), BT, C);
}

// The final norm, the classifier, and both backward, into dresidual; returns the mean loss.
double PlainModel::State::forward_head(const int* targets) {
    int BT = B * T, C = config.channels, V = config.vocab_size;
    const float* last = layers.back().residual3.data();
    layernorm_plain(lnf.data(), meanf.data(), rstdf.data(), last, w(k_lnfw), w(k_lnfb),
                    float(config.layer_norm_epsilon), BT, C);
    matmul_plain(logits.data(), lnf.data(), w(k_wte), nullptr, BT, C, V);
    double loss = classifier_plain(logits.data(), targets, BT, V);
    matmul_plain_backward(dnorm.data(), d(k_wte), nullptr, logits.data(), lnf.data(), w(k_wte), BT,
                          C, V);
    std::fill(dresidual.begin(), dresidual.end(), 0.f);
    layernorm_plain_backward(dresidual.data(), d(k_lnfw), d(k_lnfb), dnorm.data(), last, w(k_lnfw),
                             meanf.data(), rstdf.data(), BT, C);
    return loss;
}

double PlainModel::step(const int* inputs, const int* targets, const AdamW& adamw) {
    State& s = *state_;
    int BT = s.B * s.T, C = s.config.channels, L = s.config.layers;
    std::fill(s.grads.begin(), s.grads.end(), 0.f);
    encoder_plain(s.encoded.data(), inputs, s.w(k_wte), s.w(k_wpe), BT, s.T, C);
    auto input_of = [&](int l) {
        return l == 0 ? s.encoded.data() : s.layers[size_t(l) - 1].residual3.data();
    };
    for (int l = 0; l < L; l++) s.block_forward(input_of(l), l);
    double loss = s.forward_head(targets);
    for (int l = L - 1; l >= 0; l--) s.block_backward(input_of(l), l);
    encoder_plain_backward(s.d(k_wte), s.d(k_wpe), s.dresidual.data(), inputs, BT, s.T, C);

    double squares = 0;
#pragma omp parallel for reduction(+ : squares)
    for (size_t i = 0; i < s.grads.size(); i++) squares += double(s.grads[i]) * s.grads[i];
    float grad_scale = float(std::min(1.0, adamw.grad_clip / (std::sqrt(squares) + 1e-6)));
    size_t offset = 0;
    for (const ParameterRow& row : s.table) {
        size_t N = row.present ? row.file_size() * row.count : 0;
        adamw_plain(&s.params[offset], &s.m[offset], &s.v[offset], &s.grads[offset], N, adamw,
                    row.decays ? adamw.weight_decay : 0, grad_scale);
        offset += N;
    }
    return loss;
}
