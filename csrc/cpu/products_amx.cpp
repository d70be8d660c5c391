// bfloat16 products with AMX: a step multiplies 16 rows by 16 columns over 32 numbers of `inner`, with float32 sums.
// A row is summed in one fixed order, independent of the other rows, so results do not depend on the row count.
#include "products.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "pack_bf16.h"

namespace windkern {
namespace {

constexpr int64_t kTile = 16;                  // rows of a tile, and its columns of 32 bits
constexpr int64_t kPair = 2 * kTile;           // rows and columns of C that a step adds to: four tiles
constexpr int64_t kStep = kTile * 2 * kTile;   // numbers in a tile of A
constexpr int64_t kBlockRows = 4 * kPair;      // rows of A that pass over all of B together
constexpr int64_t kTasks = 4;                  // of a thread, at least, where rows allow it: each packs its rows of A
constexpr int64_t kChunkSteps = 32;            // of 32 numbers of `inner` at a time: A and B stay in the second-level cache

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Address of the 16 rows of tile `half` (0, 1) of a pair of row tiles, for one step.
uint16_t* tile_of(uint16_t* packed, int64_t pair, int64_t half, int64_t step, int64_t steps) {
  return packed + ((pair * steps + step) * 2 + half) * kStep;
}

// Packs rows first .. first + count of A: out[pair of tiles][step][tile][row][32 of inner], zeros beyond both ends.
void pack_a(const Product& p, int64_t first, int64_t count, uint16_t* out) {
  const int64_t steps = padded_pairs(p.inner) / 16;
  for (int64_t row = 0; row < (count + kPair - 1) / kPair * kPair; row += kTile) {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t k = 2 * kTile * step, left = smaller(2 * kTile, p.inner - k);
      __m512i rows[16];
      if (p.a_transposed) {
        for (int64_t i = 0; i < 16; ++i) {
          const uint16_t* even = p.a + (k + 2 * i) * p.a_stride + first + row;
          const uint16_t* odd = 2 * i + 1 < left ? even + p.a_stride : nullptr;
          rows[i] = 2 * i < left ? interleave(even, odd, mask_of(count - row)) : _mm512_setzero_si512();
        }
        transpose(rows);
      } else {
        const __mmask32 mask = left == 32 ? 0xffffffffu : (1u << left) - 1;
        for (int64_t i = 0; i < 16; ++i) {
          rows[i] = row + i < count ? _mm512_maskz_loadu_epi16(mask, p.a + (first + row + i) * p.a_stride + k)
                                    : _mm512_setzero_si512();
        }
      }
      uint16_t* tile = tile_of(out, row / kPair, row / kTile % 2, step, steps);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(tile + 2 * kTile * i, rows[i]);
    }
  }
}

// c (32, 32) = a b over some steps, or c += a b. Tiles 0 to 3 hold c, 4 and 5 rows of a, 6 and 7 columns of b.
void multiply_pair(const uint16_t* a, const uint32_t* b, int64_t steps, float* c, int64_t stride, bool add) {
  const int64_t row_bytes = stride * sizeof(float);
  if (add) {
    _tile_loadd(0, c, row_bytes);
    _tile_loadd(1, c + kTile, row_bytes);
    _tile_loadd(2, c + kTile * stride, row_bytes);
    _tile_loadd(3, c + kTile * stride + kTile, row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a + 2 * step * kStep, 64);
    _tile_loadd(5, a + (2 * step + 1) * kStep, 64);
    _tile_loadd(6, b + step * kTile * kPanel, kPanel * sizeof(uint32_t));
    _tile_loadd(7, b + step * kTile * kPanel + kTile, kPanel * sizeof(uint32_t));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, row_bytes);
  _tile_stored(1, c + kTile, row_bytes);
  _tile_stored(2, c + kTile * stride, row_bytes);
  _tile_stored(3, c + kTile * stride + kTile, row_bytes);
}

// Copies (rows, width) numbers between C and sums (rows, panel).
void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) memcpy(to + row * to_stride, from + row * from_stride, width * sizeof(float));
}

// Computes rows first .. first + count of C over the panels begin .. end.
void multiply_block(const Product& p, int64_t first, int64_t count, int64_t begin, int64_t end, uint16_t* packed_a,
                    float* sums) {
  const int64_t steps = padded_pairs(p.inner) / 16;
  pack_a(p, first, count, packed_a);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * kPanel, width = smaller(kPanel, p.columns - column);
    float* target = (float*)p.c + first * p.c_stride + column;
    const bool direct = p.c_is_float && width == kPanel && count % kPair == 0;
    float* c = direct ? target : sums;
    const int64_t stride = direct ? p.c_stride : kPanel;
    if (!direct && p.accumulate) copy_rows(target, p.c_stride, sums, kPanel, count, width);
    int64_t step = 0;
    do {  // at least once: an empty sum is 0
      const int64_t chunk = smaller(kChunkSteps, steps - step);
      const uint32_t* b = p.packed + (panel * steps + step) * kTile * kPanel;
      for (int64_t pair = 0; pair < (count + kPair - 1) / kPair; ++pair) {
        const uint16_t* a = tile_of(packed_a, pair, 0, step, steps);
        for (int64_t j = 0; j < width; j += kPair) {
          multiply_pair(a, b + j, chunk, c + pair * kPair * stride + j, stride, step > 0 || p.accumulate);
        }
      }
      step += kChunkSteps;
    } while (step < steps);
    if (!p.c_is_float) {
      round_rows(sums, count, width, (uint16_t*)p.c + first * p.c_stride + column, p.c_stride);
    } else if (!direct) {
      copy_rows(sums, kPanel, target, p.c_stride, count, width);
    }
  }
}

void multiply(const Product& p) {
  const int64_t sum_bytes = kBlockRows * kPanel * sizeof(float);
  const int64_t packed_bytes = kBlockRows * 2 * padded_pairs(p.inner) * sizeof(uint16_t);
  over_blocks(
      p, kBlockRows, kTasks, sum_bytes + packed_bytes,
      [] {
        const TileConfig config;
        _tile_loadconfig(&config);
      },
      [&](void* scratch, int64_t first, int64_t count, int64_t begin, int64_t end) {
        multiply_block(p, first, count, begin, end, (uint16_t*)((char*)scratch + sum_bytes), (float*)scratch);
      },
      [] { _tile_release(); });
}

}  // namespace

MultiplyBf16 amx_product() { return multiply; }

}  // namespace windkern
#else  // built for another kind of CPU, or by an older compiler

namespace windkern {
MultiplyBf16 amx_product() { return nullptr; }
}  // namespace windkern
#endif
