// Logits to the next token: temperature, top-k, top-p, softmax and a draw, in that order.
//
// All arithmetic is in double, candidates are ordered by logit with the lower id first among
// equals, and the random numbers are counted rather than chained: the same logits, options, seed
// and count give the same token with every compiler, and a saved state is two integers.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "files.h"

// ==== options ====================================================================================

struct SamplerOptions {
    double temperature = 1;  // divides the logits; 0 takes the most probable token
    int top_k = 0;           // only the k most probable tokens; 0 is off
    double top_p = 1;  // only the fewest most probable tokens that reach probability p; 1 is off
};

// Refuses (fail_input) what is not a number and what is out of range, naming the option.
inline void check_sampler_options(const SamplerOptions& options) {
    if (!(options.temperature >= 0) || std::isinf(options.temperature))
        fail_input("--temperature %g: must be a number from 0 (greedy) up", options.temperature);
    if (options.top_k < 0) fail_input("--top-k %d: must be 0 (off) or more", options.top_k);
    if (!(options.top_p >= 0 && options.top_p <= 1))
        fail_input("--top-p %g: must be between 0 and 1 (off)", options.top_p);
}

// ==== sampler ====================================================================================

struct SampledToken {
    int token;
    double probability;  // of the token, in the distribution that it was drawn from
    double entropy;      // of that distribution, in nats: ln N when N tokens are equally probable
};

// Draws tokens from logits. Not for several threads at once: it keeps its scratch memory between
// calls.
class Sampler {
  public:
    struct State {
        uint64_t seed = 0, draws = 0;
    };

    Sampler(SamplerOptions options, uint64_t seed) : options_(options), state_{seed, 0} {
        check_sampler_options(options_);
    }

    // p = softmax(logits / temperature), cut to the top k tokens, renormalised, cut to the fewest
    // tokens that reach top_p (the one that crosses it is kept, so at least one stays) [Holtzman et
    // al. 2019, arXiv:1904.09751], renormalised; the token is drawn from p. Temperature 0 gives the
    // largest logit, the lowest id among equals, with probability 1 and entropy 0, and draws no
    // random number.
    //
    // logits (V), V >= 1; -inf is probability 0. NaN, +inf, or nothing but -inf is fail_machine.
    template <typename R>
    SampledToken sample(const R* logits, int V) {
        int best = largest(logits, V);
        if (options_.temperature == 0) return {best, 1, 0};
        candidates_.clear();
        for (int token = 0; token < V; token++) {
            double exponent = (double(logits[token]) - double(logits[best])) / options_.temperature;
            candidates_.push_back({exponent, 0, token});
        }
        keep_top_k();
        for (Candidate& candidate : candidates_) candidate.weight = std::exp(candidate.exponent);
        keep_top_p();
        return draw();
    }

    State state() const { return state_; }
    void restore(State state) { state_ = state; }

  private:
    struct Candidate {
        double exponent;  // (logit - largest logit) / temperature, so at most 0
        double weight;    // exp(exponent): the probability before normalisation
        int token;
    };

    // A total order, so that no two libraries sort differently.
    static bool more_probable(const Candidate& a, const Candidate& b) {
        return a.exponent > b.exponent || (a.exponent == b.exponent && a.token < b.token);
    }
    static bool less_probable(const Candidate& a, const Candidate& b) {
        return more_probable(b, a);
    }

    template <typename R>
    static int largest(const R* logits, int V) {
        assert(V >= 1);
        int best = 0;
        for (int token = 0; token < V; token++) {
            if (!(logits[token] <= std::numeric_limits<R>::max()))
                fail_machine("token %d of %d has logit %g; the model has diverged", token, V,
                             double(logits[token]));
            if (logits[token] > logits[best]) best = token;
        }
        if (std::isinf(logits[best]))
            fail_machine("all %d logits are -inf; the model has diverged", V);
        return best;
    }

    void keep_top_k() {
        size_t k = size_t(options_.top_k);
        if (k == 0 || k >= candidates_.size()) return;
        auto kept_end = candidates_.begin() + std::ptrdiff_t(k);
        std::nth_element(candidates_.begin(), kept_end, candidates_.end(), more_probable);
        candidates_.erase(kept_end, candidates_.end());
        // nth_element leaves them in an order of its own, and sums depend on it in the last bit.
        std::sort(candidates_.begin(), candidates_.end(), more_probable);
    }

    // A heap gives the most probable tokens one by one, which is cheaper than sorting a vocabulary
    // of which few are kept. Most never come into it: those whose weight is below the mean of what
    // is to be cut weigh less than that all together, so that the others reach top_p without them.
    void keep_top_p() {
        if (options_.top_p >= 1) return;
        double total = total_weight(), needed = options_.top_p * total, reached = 0;
        constexpr double kRounding = 0.5;  // far more than the sums are off by
        double least = kRounding * (1 - options_.top_p) * total / double(candidates_.size());
        std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < least; });
        auto heap_end = candidates_.end();
        std::make_heap(candidates_.begin(), heap_end, less_probable);
        do {
            std::pop_heap(candidates_.begin(), heap_end, less_probable);
            heap_end--;  // now at the token that was taken out
            reached += heap_end->weight;
        } while (reached < needed && heap_end != candidates_.begin());
        candidates_.erase(candidates_.begin(), heap_end);
    }

    double total_weight() const {
        double total = 0;
        for (const Candidate& candidate : candidates_) total += candidate.weight;
        return total;
    }

    // With Z the sum of weights exp(x): p = exp(x) / Z, so the entropy -sum p ln p is ln Z - sum x
    // exp(x) / Z.
    SampledToken draw() {
        double total = total_weight(), weighted_exponents = 0;
        for (const Candidate& candidate : candidates_)
            if (candidate.weight > 0) weighted_exponents += candidate.exponent * candidate.weight;
        double entropy = std::log(total) - weighted_exponents / total;

        double target = next_uniform() * total, passed = 0;
        const Candidate* drawn = nullptr;
        for (const Candidate& candidate : candidates_) {
            if (candidate.weight == 0) continue;
            drawn = &candidate;  // the last one stays if rounding puts the target at the very end
            passed += candidate.weight;
            if (target < passed) break;
        }
        return {drawn->token, drawn->weight / total, entropy};
    }

    // SplitMix64's output function [Steele, Lea and Flood 2014].
    static uint64_t mix(uint64_t bits) {
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
        return bits ^ (bits >> 31);
    }

    // Uniform in [0, 1) with 53 bits. The seed is mixed first, so that near seeds give unrelated
    // streams.
    double next_uniform() {
        constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
        uint64_t bits = mix(mix(state_.seed + kStep) + ++state_.draws * kStep);
        return double(bits >> 11) * 0x1p-53;
    }

    SamplerOptions options_;
    State state_;
    std::vector<Candidate> candidates_;
};
