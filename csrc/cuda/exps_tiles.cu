// Tiles that write exponentials relative to a row's pivot, in forward and again in backward, from products that stay in
// registers.
//
// A pivot must be known before the products. It begins at the target's logit, or at another one where the target lies
// elsewhere, and stays unless a tile's maximum exceeds it by kPivotRoom. Such a tile is written relative to its own maximum,
// and the kernel that joins the tiles rescales the row, as `exps_forward` does.
#include "packs.h"
#include "tile_logits.h"

namespace windkern {
namespace cuda {
namespace {

// Sets one entry of a row, by its column's number in the tile.
__device__ __forceinline__ void set_at(float (&acc)[128], int h, int column, float value) {
#pragma unroll
  for (int k = 0; k < 64; ++k) {
    float& held = acc[4 * (k / 2) + 2 * h + k % 2];
    if (column == 8 * (k / 2) + 2 * (int(threadIdx.x) % 4) + k % 2) held = value;
  }
}

// Writes one row of a tile. Two lanes exchange halves of two chunks of eight columns, so that each writes 8 bytes and four
// of them 32 that are adjacent.
__device__ __forceinline__ void store_row(const float (&acc)[128], int h, const HeldColumns& columns, BFloat16* row,
                                          bool inside) {
  if (columns.cut()) {
    if (!inside) return;
#pragma unroll
    for (int k = 0; k < 64; ++k) {
      const int column = columns.at(k / 2, k % 2);
      if (column < columns.width) row[column] = narrowed<BFloat16>(acc[4 * (k / 2) + 2 * h + k % 2]);
    }
    return;
  }
  const bool odd = threadIdx.x % 2 == 1;
#pragma unroll
  for (int j = 0; j < 32; j += 2) {
    const uint32_t here = pair_word(acc[4 * j + 2 * h], acc[4 * j + 2 * h + 1], BFloat16{});
    const uint32_t next = pair_word(acc[4 * j + 4 + 2 * h], acc[4 * j + 5 + 2 * h], BFloat16{});
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? here : next, 1);
    const Aligned<uint32_t, 2> words = odd ? Aligned<uint32_t, 2>{{other, next}} : Aligned<uint32_t, 2>{{here, other}};
    const int column = columns.at(odd ? j + 1 : j, 0) - (odd ? 2 : 0);
    if (inside) *reinterpret_cast<Aligned<uint32_t, 2>*>(row + column) = words;
  }
}

// The larger of a tile and a row pivot, as the pivot rule wants it.
__device__ __forceinline__ float offset_of(float pivot, float most) {
  return pivot == minus_infinity<float>() || most > pivot + float(kPivotRoom) ? most : pivot;
}

struct ExpsTile {
  Slab slab;
  Transform<float> t;
  TileParts parts;
  float* offsets;  // (column tiles, rows)
  BFloat16* values;
  int64_t stride;
  const float* pivots;  // (rows,)
  float* target;        // (rows,)

  struct Looked {
    int64_t targets[2];
    float pivots[2];
  };

  __device__ __forceinline__ Looked look(int row) const {
    Looked looked{{-1, -1}, {0.0f, 0.0f}};
    for (int h = 0; h < 2; ++h) {
      if (row + 8 * h < slab.rows) looked.targets[h] = slab.targets[row + 8 * h], looked.pivots[h] = pivots[row + 8 * h];
    }
    return looked;
  }

  __device__ __forceinline__ void end(float (&acc)[128], int row, int column_tile, const Looked& looked) const {
    const HeldColumns columns{column_tile * kTileColumns, int(slab.width)};
    transform_tile(acc, columns, slab, t);
    float most[2];
    largest_of_rows(acc, most);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      const int column = held_target(looked.targets[h], slab, columns);
      if (column >= 0) target[r] = value_at(acc, h, column);
      const float offset = offset_of(looked.pivots[h], most[h]);
      const ExpsFrom exps(finite_shift(offset));
      float sums[4] = {};
#pragma unroll
      for (int k = 0; k < 64; ++k) {
        float& y = acc[4 * (k / 2) + 2 * h + k % 2];
        y = exps(y);
        sums[k % 4] += y;
      }
      const float sum = sum_of_four((sums[0] + sums[1]) + (sums[2] + sums[3]));
      if (threadIdx.x % 4 == 0 && r < slab.rows) {
        const int64_t place = int64_t(column_tile) * slab.rows + r;
        // Entries more than 80 below the pivot count for nothing, and the sum must not overflow. The largest one is 1, so
        // that a row which is sure of its target has no positive log-prob.
        const bool masked = most[h] == minus_infinity<float>();
        const float apart = masked ? 0.0f : offset - most[h];
        const float relative = sum * lane_exp(apart < 80.0f ? apart : 80.0f);
        parts.max[place] = most[h];
        parts.sum[place] = !masked && relative < 1.0f ? 1.0f : relative;
        offsets[place] = offset;
      }
      // Reason: W_y - sum P W cancels where the model is sure of the target, so the target's entry is set later.
      if (column >= 0) set_at(acc, h, column, 0.0f);
      if (looked.targets[h] < 0) {  // an ignored row can hold NaN
#pragma unroll
        for (int k = 0; k < 64; ++k) acc[4 * (k / 2) + 2 * h + k % 2] = 0.0f;
      }
      store_row(acc, h, columns, values + r * stride, r < slab.rows);
    }
  }
};

// A warp for each row whose pivot is not known: the logit of its target, or of the first column where that lies elsewhere.
template <class E>
__global__ void __launch_bounds__(256)
    guess_pivots(const TileOperands in, const Slab slab, const Transform<float> t, float* pivots, float* targets,
                 bool fresh) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= slab.rows) return;
  const float lowest = minus_infinity<float>();
  if (fresh && threadIdx.x == 0) pivots[row] = targets[row] = lowest;
  if (slab.targets[row] < 0 || (!fresh && pivots[row] != lowest)) return;
  const int64_t target = slab.targets[row] - slab.start, column = target >= 0 && target < slab.width ? target : 0;
  const E* const hidden = (const E*)in.hidden + row * in.hidden_stride;
  const E* const head = (const E*)in.head + column * in.head_stride;
  float dot = 0.0f;
  for (int64_t k = 8 * threadIdx.x; k < in.inner; k += 8 * kWarp) {
    float a[8], b[8];
    load_wide(hidden + k, a);
    load_wide(head + k, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) dot += a[i] * b[i];
  }
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, apart);
  const float bias = slab.bias == nullptr ? 0.0f : ((const float*)slab.bias)[column];
  if (threadIdx.x == 0 && bias != lowest) pivots[row] = transform_logit(dot + bias, t);
}

// Joins the tiles of each row, moves its pivot where that is due, and rescales what was written relative to others.
__global__ void __launch_bounds__(kJoinRows* kJoinRuns)
    settle(const ForwardState state, const TileParts parts, const float* offsets, const int64_t* targets,
           const ExpsOutputs out, int rows, int width, bool fresh) {
  __shared__ Pivot<float> next[kJoinRows];
  __shared__ bool rescaled[kJoinRows];
  const int first = int(blockIdx.x) * kJoinRows, row = first + int(threadIdx.x);
  const OnlineSoftmax<float> slab = join_tiles(parts, row, rows, (width + kTileColumns - 1) / kTileColumns);
  if (threadIdx.y == 0) {
    rescaled[threadIdx.x] = false;
    if (row < rows) {
      OnlineSoftmax<float> running = begin_state(state, row, fresh);
      merge(running, slab);
      store_state(state, row, running);
      float& pivot = ((float*)out.pivot)[row];
      next[threadIdx.x] = next_pivot(pivot, slab.max);
      // The zeros of an ignored row stay, whose pivots can be NaN or infinite.
      const bool moves = next[threadIdx.x].value != pivot && slab.max != minus_infinity<float>();
      rescaled[threadIdx.x] = moves && targets[row] >= 0;
      pivot = next[threadIdx.x].value;
      if (out.moved != nullptr) ((float*)out.moved)[row] = next[threadIdx.x].factor;
    }
  }
  __syncthreads();
  for (int r = int(threadIdx.y); r < kJoinRows; r += kJoinRuns) {
    if (!rescaled[r]) continue;
    BFloat16* const values = (BFloat16*)out.values + (first + r) * out.stride;
    for (int64_t c = int64_t(threadIdx.x) - out.earlier; c < width; c += kJoinRows) {
      const float factor =
          c < 0 ? next[r].factor : lane_exp(offsets[c / kTileColumns * rows + first + r] - next[r].value);
      if (factor != 1.0f) values[c] = narrowed<BFloat16>(widened(values[c]) * factor);
    }
  }
}

struct AgainTile {
  Slab slab;
  Transform<float> t;
  const float *pivots, *entries;  // (rows,)
  BFloat16* values;
  int64_t stride;

  struct Looked {
    int64_t targets[2];
    float pivots[2], entries[2];
  };

  __device__ __forceinline__ Looked look(int row) const {
    Looked looked{{-1, -1}, {0.0f, 0.0f}, {0.0f, 0.0f}};
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      if (r < slab.rows) {
        looked.targets[h] = slab.targets[r], looked.pivots[h] = pivots[r], looked.entries[h] = entries[r];
      }
    }
    return looked;
  }

  __device__ __forceinline__ void end(float (&acc)[128], int row, int column_tile, const Looked& looked) const {
    const HeldColumns columns{column_tile * kTileColumns, int(slab.width)};
    transform_tile(acc, columns, slab, t);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h, column = held_target(looked.targets[h], slab, columns);
      const ExpsFrom exps(looked.pivots[h]);
#pragma unroll
      for (int k = 0; k < 64; ++k) {
        float& y = acc[4 * (k / 2) + 2 * h + k % 2];
        y = looked.targets[h] < 0 ? 0.0f : exps(y);
      }
      if (column >= 0) set_at(acc, h, column, looked.entries[h]);
      store_row(acc, h, columns, values + r * stride, r < slab.rows);
    }
  }
};

void check_values(const char* name, const Slab& slab, const void* values, int64_t stride) {
  if (slab.operand != DType::bfloat16 || reinterpret_cast<uintptr_t>(values) % 8 != 0 || stride % 4 != 0) {
    throw std::invalid_argument(std::string(name) + ": values must be bfloat16, with rows a multiple of 8 bytes apart");
  }
}

}  // namespace

void exps_tiles_forward(const TileOperands& in, const Slab& slab, const ForwardState& state, const ExpsOutputs& out,
                        float* scratch, bool fresh, Stream stream) {
  check_values("exps_tiles_forward", slab, out.values, out.stride);
  const TileParts parts(slab, false, scratch);
  const Transform<float> t(slab);
  float* const offsets = scratch + 2 * TileParts::part(slab);
  WK_RUN("guess_pivots", guess_pivots<BFloat16>, ceil_div(slab.rows, 8), dim3(kWarp, 8), cudaStream_t(stream), in, slab, t,
         (float*)out.pivot, (float*)state.target, fresh);
  const ExpsTile end{slab, t, parts, offsets, (BFloat16*)out.values, out.stride, (const float*)out.pivot,
                     (float*)state.target};
  run_tiles<BFloat16>("exps_tiles_forward", in, slab, end, stream);
  WK_RUN("settle_tiles", settle, ceil_div(slab.rows, kJoinRows), dim3(kJoinRows, kJoinRuns), cudaStream_t(stream), state,
         parts, offsets, slab.targets, out, int(slab.rows), int(slab.width), fresh);
}

void exps_tiles_backward(const TileOperands& in, const Slab& slab, const ExpsInputs& out, Stream stream) {
  check_values("exps_tiles_backward", slab, out.values, out.stride);
  const AgainTile end{slab, Transform<float>(slab), (const float*)out.pivot, (const float*)out.entry,
                      (BFloat16*)out.values, out.stride};
  run_tiles<BFloat16>("exps_tiles_backward", in, slab, end, stream);
}

}  // namespace cuda
}  // namespace windkern
