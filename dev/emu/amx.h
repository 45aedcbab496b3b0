// AMX as train_gpt2.cpp uses it, in plain C++, after <immintrin.h>: so that what multiplies on such
// a processor is tested on others. Tiles of 16 rows of 64 bytes, loaded, stored, cleared and
// multiplied as Intel's manual says [Software Developer's Manual, volume 2, TDPBF16PS]. A tile used
// outside a configuration, or beyond what that holds, ends the program here with a sentence.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

class EmulatedAmx {
  public:
    static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

    void configure(const void* memory) {
        memcpy(&config_, memory, sizeof(config_));
        must(config_.palette == 1, "a configuration of another palette than 1");
        for (int t = 0; t < kTiles; t++)
            must(config_.rows[t] <= kRows && config_.row_bytes[t] <= kRowBytes,
                 "a configuration of tiles larger than 16 rows of 64 bytes");
        memset(tiles_, 0xff, sizeof(tiles_));  // NaN, for what is read before it is written
    }
    void release() { config_.palette = 0; }

    void load(int tile, const void* memory, size_t stride) {
        check(tile);
        for (int r = 0; r < config_.rows[tile]; r++)
            memcpy(tiles_[tile][r], static_cast<const char*>(memory) + size_t(r) * stride,
                   config_.row_bytes[tile]);
    }
    void store(int tile, void* memory, size_t stride) {
        check(tile);
        for (int r = 0; r < config_.rows[tile]; r++)
            memcpy(static_cast<char*>(memory) + size_t(r) * stride, tiles_[tile][r],
                   config_.row_bytes[tile]);
    }
    void zero(int tile) {
        check(tile);
        memset(tiles_[tile], 0, sizeof(tiles_[tile]));
    }

    // Each sum gains the products of the first numbers of all pairs, and those of the second, each
    // added up on its own.
    void multiply(int c, int a, int b) {
        check(c), check(a), check(b);
        float a_numbers[kRows][2 * kRows], b_numbers[kRows][2 * kRows];
        widen(a_numbers, a), widen(b_numbers, b);
        for (int m = 0; m < config_.rows[c]; m++) {
            float sums[2 * kRows] = {};
            for (int k = 0; k < config_.row_bytes[a] / 4; k++)
                for (int n = 0; n < 2 * kRows; n++)
                    sums[n] += a_numbers[m][2 * k + n % 2] * b_numbers[k][n];
            float row[kRows];
            memcpy(row, tiles_[c][m], sizeof(row));
            for (int n = 0; n < config_.row_bytes[c] / 4; n++)
                row[n] += sums[2 * n] + sums[2 * n + 1];
            memcpy(tiles_[c][m], row, sizeof(row));
        }
    }

  private:
    struct Config {
        uint8_t palette = 0, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };

    static void must(bool holds, const char* what) {
        if (holds) return;
        fprintf(stderr, "emulated AMX: %s\n", what);
        abort();
    }
    void check(int tile) const {
        must(config_.palette == 1, "a tile without a configuration");
        must(tile >= 0 && tile < kTiles && config_.rows[tile] > 0, "a tile that is not configured");
    }
    void widen(float (&numbers)[kRows][2 * kRows], int tile) const {
        for (int r = 0; r < kRows; r++) {
            for (int i = 0; i < 2 * kRows; i++) {
                uint16_t upper;
                memcpy(&upper, tiles_[tile][r] + 2 * i, sizeof(upper));
                uint32_t bits = uint32_t(upper) << 16;
                memcpy(&numbers[r][i], &bits, sizeof(bits));
            }
        }
    }

    Config config_;
    unsigned char tiles_[kTiles][kRows][kRowBytes];
};
inline thread_local EmulatedAmx emulated_amx;

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(memory) emulated_amx.configure(memory)
#define _tile_release() emulated_amx.release()
#define _tile_loadd(tile, memory, stride) emulated_amx.load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) emulated_amx.store(tile, memory, stride)
#define _tile_zero(tile) emulated_amx.zero(tile)
#define _tile_dpbf16ps(c, a, b) emulated_amx.multiply(c, a, b)
