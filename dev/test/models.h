// What tests of models use, in both programs: numbers between guard bytes, and the sizes of small
// models.
#pragma once

#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "../../gpt2.h"

constexpr bool kDouble = sizeof(real) == 8;
constexpr real kNaN = std::numeric_limits<real>::quiet_NaN();

// Numbers between guard bytes, full of NaN at first; a write outside fails the test when the buffer
// goes.
class Buffer {
  public:
    explicit Buffer(size_t size) : bytes_(size * sizeof(real) + 2 * kGuard, kMark), size_(size) {
        std::fill(begin(), end(), kNaN);
    }
    explicit Buffer(int size) : Buffer(size_t(size)) {}
    Buffer(const Buffer& other) = default;
    ~Buffer() {
        auto intact = [](uint8_t byte) { return byte == kMark; };
        EXPECT_TRUE(std::all_of(bytes_.begin(), bytes_.begin() + kGuard, intact))
            << "written before its start";
        EXPECT_TRUE(std::all_of(bytes_.end() - kGuard, bytes_.end(), intact))
            << "written behind its end";
    }
    Buffer& operator=(const Buffer&) = delete;

    real* begin() { return reinterpret_cast<real*>(bytes_.data() + kGuard); }
    real* end() { return begin() + size_; }
    const real* begin() const { return reinterpret_cast<const real*>(bytes_.data() + kGuard); }
    const real* end() const { return begin() + size_; }
    operator real*() { return begin(); }
    operator const real*() const { return begin(); }
    real& operator[](size_t i) { return begin()[i]; }
    real operator[](size_t i) const { return begin()[i]; }
    real& operator[](int i) { return begin()[i]; }
    real operator[](int i) const { return begin()[i]; }
    size_t size() const { return size_; }

    Buffer& fill(real value) {
        std::fill(begin(), end(), value);
        return *this;
    }
    Buffer& normal(unsigned seed, double scale = 1) {
        std::mt19937 generator(seed);
        std::normal_distribution<double> draw(0, scale);
        for (real& value : *this) value = real(draw(generator));
        return *this;
    }

  private:
    static constexpr size_t kGuard = 64;
    static constexpr uint8_t kMark = 0xA5;
    std::vector<uint8_t> bytes_;
    size_t size_;
};

// eps of `real`; a sum of n products of numbers near 1 is within about sqrt(n) to n of it.
constexpr double kEps = std::numeric_limits<real>::epsilon();

// What models compute in.
inline Dtype test_dtype() {
    static const char* const name = getenv("GPT2_TEST_DTYPE");
    static const Dtype dtype = gpt2_dtype(name != nullptr ? name : "fp32");
    return dtype;
}

// A tolerance, as a part of the largest number: `exact` where float32 (or double) computes it in
// another order, `narrow` where numbers on the way are rounded to bf16 and an order that rounds one
// of them to its neighbour moves it by 2^-8.
inline double tolerance(double exact, double narrow) {
    return test_dtype() == Dtype::bf16 ? narrow * 0x1p-8 : exact * kEps;
}

inline GPT2Shape test_shape(int B, int T, bool training = false, int generate = 0) {
    GPT2Shape shape;
    shape.B = B, shape.T = T, shape.training = training, shape.generate = generate;
    shape.threads = omp_get_max_threads(), shape.dtype = test_dtype();
    return shape;
}

inline GPT2Shape training_shape(int B, int T, int generate = 0) {
    return test_shape(B, T, true, generate);
}

inline GPT2Config odd_config() {
    GPT2Config config;
    config.vocab_size = 61, config.context = 19, config.layers = 2, config.heads = 3,
    config.channels = 15;
    return config;
}
