// The columns of a row that belong to a thread, and their loads and stores: 16 bytes of the operand dtype at a time.
#pragma once

#include <cuda_runtime.h>

#include "../include/windkern/logprob.h"
#include "../include/windkern/storage.h"
#include "launch.h"

namespace windkern {
namespace cuda {

template <class T, int n>
struct alignas(sizeof(T) * n) Aligned {
  T v[n];
};

// Numbers in a pack: 16 bytes of them, or few enough single ones that their addresses fit in registers.
template <class E, bool wide>
constexpr int kPack = wide ? 16 / int(sizeof(E)) : sizeof(E) == 8 ? 2 : 4;

// Reason: float64 is for gradient checks, for which 8-byte accesses suffice; its wide kernels are not built.
template <class S>
constexpr bool kMayBeWide = sizeof(S) == 4;

// Pack p of thread `thread` has `size` adjacent columns if pointers and width allow 16-byte accesses (wide), else
// `size` columns that are a team apart, so that each is one coalesced access of a warp.
template <bool wide, int size>
struct Columns {
  int thread, team, width;

  __device__ int at(int p, int k) const {
    return wide ? (p * team + thread) * size + k : (p * size + k) * team + thread;
  }
  // A wide row has whole packs: either all columns of a pack are inside, or none.
  __device__ bool has(int p, int k) const { return at(p, wide ? 0 : k) < width; }
  __device__ int packs() const { return (width + team * size - 1) / (team * size); }
  __device__ bool owns(int column) const { return (wide ? column / size : column) % team == thread; }
};

// The threads of a block, `most` at the most, and the blocks of a row in which each thread has one pack.
struct Spans {
  int threads, count;
};

inline Spans spans_of(int64_t columns, int size, int most) {
  const int width = checked_width(columns);
  int threads = 32;
  while (threads < most && threads * size < width) threads *= 2;
  return {threads, int(ceil_div(width, threads * size))};
}

// Whether every row of a matrix allows 16-byte accesses.
template <class E>
bool aligned_rows(const void* matrix, int64_t stride) {
  return aligned16(matrix) && stride * int64_t(sizeof(E)) % 16 == 0;
}

template <class S, int size>
__device__ __forceinline__ void load_wide(const S* from, S (&to)[size]) {
  constexpr int n = 16 / int(sizeof(S));
#pragma unroll
  for (int first = 0; first < size; first += n) {
    const Aligned<S, n> part = *reinterpret_cast<const Aligned<S, n>*>(from + first);
#pragma unroll
    for (int k = 0; k < n; ++k) to[first + k] = part.v[k];
  }
}

// 8 numbers of 16 bits are 16 bytes; 4 are read and written beside 4 of 32 bits.
template <class E, int size>
__device__ __forceinline__ void load_wide_halves(const E* from, float (&to)[size]) {
  const Aligned<uint32_t, size / 2> words = *reinterpret_cast<const Aligned<uint32_t, size / 2>*>(from);
#pragma unroll
  for (int k = 0; k < size / 2; ++k) {
    to[2 * k] = low_value(words.v[k], E{});
    to[2 * k + 1] = high_value(words.v[k], E{});
  }
}

template <int size>
__device__ __forceinline__ void load_wide(const BFloat16* from, float (&to)[size]) {
  load_wide_halves(from, to);
}
template <int size>
__device__ __forceinline__ void load_wide(const Half* from, float (&to)[size]) {
  load_wide_halves(from, to);
}

template <class S, int size>
__device__ __forceinline__ void store_wide(S* to, const S (&from)[size]) {
  constexpr int n = 16 / int(sizeof(S));
#pragma unroll
  for (int first = 0; first < size; first += n) {
    Aligned<S, n> part;
#pragma unroll
    for (int k = 0; k < n; ++k) part.v[k] = from[first + k];
    *reinterpret_cast<Aligned<S, n>*>(to + first) = part;
  }
}

template <class E, int size>
__device__ __forceinline__ void store_wide_halves(E* to, const float (&from)[size]) {
  Aligned<uint32_t, size / 2> words;
#pragma unroll
  for (int k = 0; k < size / 2; ++k) words.v[k] = pair_word(from[2 * k], from[2 * k + 1], E{});
  *reinterpret_cast<Aligned<uint32_t, size / 2>*>(to) = words;
}

template <int size>
__device__ __forceinline__ void store_wide(BFloat16* to, const float (&from)[size]) {
  store_wide_halves(to, from);
}
template <int size>
__device__ __forceinline__ void store_wide(Half* to, const float (&from)[size]) {
  store_wide_halves(to, from);
}

// Columns outside the row read as `fill`.
template <class S, class E, bool wide, int size>
__device__ __forceinline__ void load_pack(const E* row, const Columns<wide, size>& columns, int p, S fill,
                                          S (&to)[size]) {
  if constexpr (wide) {
#pragma unroll
    for (int k = 0; k < size; ++k) to[k] = fill;
    if (columns.has(p, 0)) load_wide(row + columns.at(p, 0), to);
  } else {
#pragma unroll
    for (int k = 0; k < size; ++k) to[k] = columns.has(p, k) ? widened(row[columns.at(p, k)]) : fill;
  }
}

template <class S, class E, bool wide, int size>
__device__ __forceinline__ void store_pack(E* row, const Columns<wide, size>& columns, int p, const S (&from)[size]) {
  if constexpr (wide) {
    if (columns.has(p, 0)) store_wide(row + columns.at(p, 0), from);
  } else {
#pragma unroll
    for (int k = 0; k < size; ++k) {
      if (columns.has(p, k)) row[columns.at(p, k)] = narrowed<E>(from[k]);
    }
  }
}

// Transforms logits in place; -inf where the bias is -inf, and outside the row.
template <class S, bool wide, int size>
__device__ __forceinline__ void transform_pack(const S* bias, const Columns<wide, size>& columns, int p,
                                               const Transform<S>& t, S (&y)[size]) {
  S b[size];
  if (bias != nullptr) {
    load_pack(bias, columns, p, minus_infinity<S>(), b);
  } else {
#pragma unroll
    for (int k = 0; k < size; ++k) b[k] = columns.has(p, k) ? S(0) : minus_infinity<S>();
  }
#pragma unroll
  for (int k = 0; k < size; ++k) {
    const S shifted = transform_logit(y[k] + b[k], t);
    y[k] = b[k] == minus_infinity<S>() ? b[k] : shifted;
  }
}

// The transformed logit of one column.
template <class S>
__device__ __forceinline__ S logit_at(const S* z, const S* bias, int column, const Transform<S>& t) {
  if (bias == nullptr) return t.identity() ? z[column] : transform_logit(z[column], t);
  const S b = bias[column], shifted = transform_logit(z[column] + b, t);
  return b == minus_infinity<S>() ? b : shifted;
}

}  // namespace cuda
}  // namespace windkern
