// Code shared by the products of bfloat16 operands: B in panels of pairs, rounding, and the loop over blocks of C.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>

#include "products.h"

namespace windkern {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

__mmask16 mask_of(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// Transposes 16 rows of 16 numbers of 32 bits.
void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      t[8 * i + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0x88);
      t[8 * i + 4 + j] = _mm512_shuffle_i32x4(r[8 * i + j], r[8 * i + 4 + j], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// Packs one panel of B stored as (columns, inner): out[pair][column], with zeros beyond both ends.
void pack_transposed(const Product& p, int64_t first, uint32_t* out) {
  const int64_t pairs = padded_pairs(p.inner);
  for (int64_t group = 0; group < kPanel; group += 16) {
    for (int64_t k = 0; k < pairs; k += 16) {
      const int64_t left = smaller(32, p.inner - 2 * k);  // at least 1
      const __mmask32 mask = left == 32 ? 0xffffffffu : (1u << left) - 1;
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t column = first + group + i;
        rows[i] = column < p.columns ? _mm512_maskz_loadu_epi16(mask, p.b + column * p.b_stride + 2 * k)
                                     : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(out + (k + i) * kPanel + group, rows[i]);
    }
  }
}

// 16 pairs from two adjacent rows; `odd` is null at the end of an odd `inner`.
__m512i interleave(const uint16_t* even, const uint16_t* odd, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
  if (odd == nullptr) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd)), 16));
}

// The same for B stored as (inner, columns).
void pack_plain(const Product& p, int64_t first, uint32_t* out) {
  const int64_t pairs = (p.inner + 1) / 2;
  memset(out + pairs * kPanel, 0, (padded_pairs(p.inner) - pairs) * kPanel * sizeof(uint32_t));
  for (int64_t k = 0; k < pairs; ++k) {
    const uint16_t* even = p.b + 2 * k * p.b_stride + first;
    const uint16_t* odd = 2 * k + 1 < p.inner ? even + p.b_stride : nullptr;
    for (int64_t j = 0; j < kPanel; j += 16) {
      const __m512i pairs = interleave(even + j, odd == nullptr ? nullptr : odd + j, mask_of(p.columns - first - j));
      _mm512_store_si512(out + k * kPanel + j, pairs);
    }
  }
}

void pack_panel(const Product& p, int64_t panel) {
  uint32_t* out = p.packed + panel * padded_pairs(p.inner) * kPanel;
  p.b_transposed ? pack_transposed(p, panel * kPanel, out) : pack_plain(p, panel * kPanel, out);
}

void round_rows(const float* from, int64_t rows, int64_t width, uint16_t* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < width; j += 16) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(from + r * kPanel + j));
      _mm256_mask_storeu_epi16(to + r * stride + j, mask_of(width - j), rounded);
    }
  }
}

void* scratch_memory(int64_t bytes) {
  void* memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory == nullptr) abort();
  return memory;
}

// Packs B, then calls body(scratch, first row, count of rows, first panel, last panel) for blocks that cover C. Each
// thread has its own `scratch_bytes`, and calls enter() and leave() around its work. Few blocks of rows are split into
// parts of the panels, so that a thread has `tasks` or more.
template <class Enter, class Body, class Leave>
void over_blocks(const Product& p, int64_t block_rows, int64_t tasks, int64_t scratch_bytes, Enter enter, Body body,
                 Leave leave) {
  if (p.rows == 0 || p.columns == 0) return;
  const int64_t panels = (p.columns + kPanel - 1) / kPanel, blocks = (p.rows + block_rows - 1) / block_rows;
  const int64_t parts = smaller(panels, (tasks * p.threads + blocks - 1) / blocks);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) pack_panel(p, panel);
    void* scratch = scratch_bytes > 0 ? scratch_memory(scratch_bytes) : nullptr;
    enter();
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < blocks * parts; ++task) {
      const int64_t first = task / parts * block_rows, part = task % parts;
      body(scratch, first, smaller(block_rows, p.rows - first), panels * part / parts, panels * (part + 1) / parts);
    }
    leave();
    free(scratch);
  }
}

}  // namespace
}  // namespace windkern
