// `make bench`: what saving a checkpoint of GPT-2 124M with its moments costs, and what it costs
// the training that goes on meanwhile.
//
// Steps are timed alone and while the saving thread is at work. What a save takes from training is
// the time of the steps from the one that begins it to the one that sees it done, less as many
// times the median step: copying the snapshot, waiting, and what the thread takes of cores and
// memory.
//   save_bench [FOLDER]      where checkpoints go; a new folder in the system's temporary one
#include <unistd.h>

#include "../../trainer.h"

namespace {

constexpr int B = 4, T = 64, BT = B * T;
constexpr int kSteps = 6, kSaves = 3;

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

class Bench {
  public:
    explicit Bench(const std::string& out) : out_(out), tokens_(BT + 1) {
        shape_.B = B, shape_.T = T, shape_.training = true, shape_.snapshot = true;
        shape_.threads = omp_get_max_threads();
        model_.reset(gpt2_create(config_, shape_));
        gpt2_initialise(model_.get(), 1);
        for (size_t i = 0; i < tokens_.size(); i++)
            tokens_[i] =
                int(philox(2, uint32_t(i), 0, 0, 0).word[0] % uint32_t(config_.vocab_size));
    }

    void run() {
        printf("\nSaving GPT-2 124M with its moments, %.2f GB, while it trains: B=%d, T=%d, %s\n",
               gigabytes(), B, T, gpt2_device().c_str());
        auto begin = std::chrono::steady_clock::now();
        save_checkpoint(out_, checkpoint(view_of(model_.get())), {1, 0});
        double save_s = since(begin);
        begin = std::chrono::steady_clock::now();
        verify_checkpoint(join_path(out_, step_name(step_)));
        double verify_s = since(begin);
        printf(
            "a save that training waits for: %.2f s (%.2f GB/s), of which verifying %.2f s "
            "(%.2f GB/s)\n",
            save_s, gigabytes() / save_s, verify_s, gigabytes() / verify_s);
        printf("%-22s %9s %8s %8s %13s %8s %10s\n", "saves in background", "a step, s", "steps",
               "save, s", "longest step", "lost, s", "of a save");
        for (int save = 0; save <= kSaves; save++) in_background(save);
    }

  private:
    double gigabytes() const { return double(checkpoint_bytes(config_)) / 1e9; }

    static double since(std::chrono::steady_clock::time_point begin) {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }

    Checkpoint checkpoint(TensorView tensors) {
        Checkpoint content;
        content.step = step_, content.config = config_, content.tensors = std::move(tensors);
        content.state = ordered_json::object();
        return content;
    }

    double step(Saver* saver = nullptr) {
        auto begin = std::chrono::steady_clock::now();
        GPT2Pass pass;
        pass.training = true;
        pass.loss_scale = 1.0 / BT;
        AdamW adamw;
        adamw.learning_rate = 1e-5;
        adamw.step = ++step_;
        gpt2_zero_gradients(model_.get());
        gpt2_forward(model_.get(), tokens_.data(), tokens_.data() + 1, B, T, pass);
        gpt2_backward(model_.get());
        gpt2_update(model_.get(), adamw);
        if (saver != nullptr) saver->hand_over();
        return since(begin);
    }

    void add_steps(std::vector<double>* times) {
        for (int i = 0; i < kSteps; i++) times->push_back(step());
    }

    // Steps without a save are timed before and after it: machines drift.
    void in_background(int save) {
        std::vector<double> alone;
        add_steps(&alone);
        Saver saver({out_, {1, 0}, true, 30}, model_.get(), [] {});
        auto begin = std::chrono::steady_clock::now();
        saver.begin(checkpoint({}));
        std::vector<double> times;
        for (; !saver.idle(); saver.poll()) times.push_back(step(&saver));
        double all_s = since(begin);
        add_steps(&alone);
        double step_s = median(alone), lost_s = all_s - double(times.size()) * step_s;
        printf("%-22s %9.3f %8zu %8.2f %13.3f %8.2f %9.1f%%\n",
               save == 0 ? "(touches its memory)" : "", step_s, times.size(), saver.last_save_s(),
               *std::max_element(times.begin(), times.end()), lost_s,
               100 * lost_s / saver.last_save_s());
    }

    std::string out_;
    std::vector<int> tokens_;
    GPT2Config config_;
    GPT2Shape shape_;
    GPT2Ptr model_;
    uint64_t step_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
    std::string pattern = (fs::temp_directory_path() / "save_bench_XXXXXX").string();
    std::string out = argc > 1 ? argv[1] : mkdtemp(pattern.data()) != nullptr ? pattern : "";
    int code = 0;
    try {
        Bench(out).run();
    } catch (const Error& error) {
        fprintf(stderr, "save_bench: error: %s\n", error.what());
        code = error.exit_code;
    }
    std::error_code ignored;
    if (argc <= 1) fs::remove_all(out, ignored);
    return code;
}
