// dz from kept exp(y - offset) * slope or from recomputed logits. A block owns a tile of columns and walks down its
// rows, so a thread's columns, bias and share of dbias stay in registers, and the terms of a row are computed once for
// the whole tile.
#include "add_tiles.h"
#include "launchers.h"
#include "packs.h"

namespace windkern {
namespace cuda {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kBatch = 32;      // rows whose terms are in shared memory together: one for each lane of the first warp
constexpr int kRowsAtOnce = 2;  // rows a thread loads before it uses the first
constexpr int kTileRows = 16;
// Blocks per multiprocessor: 64 registers per thread, more where float64 would spill.
template <class S>
constexpr int kBlocks = sizeof(S) == 8 ? 1 : 4;

constexpr int kElsewhere = -1, kIgnored = -2;

// The terms of one row, from its statistics and upstream gradients.
template <class S>
struct alignas(sizeof(S) * 8) RowTerms {
  S max, log_sum;
  S factor, entropy_factor;  // of P, or of kept values, and of P log P
  S entry;                   // d loss / d logit at the target
  S row_scale;
  int column;  // of the target in this slab, kElsewhere, or kIgnored
};

template <class S>
__device__ __forceinline__ S at_or(const void* values, int64_t row, S absent) {
  return values == nullptr ? absent : ((const S*)values)[row];
}

template <class S, bool from_kept>
__device__ RowTerms<S> terms_of(const Slab& slab, const BackwardInputs& in, const Transform<S>& t, int64_t row) {
  const RowStats<S> stats{((const S*)in.max)[row], ((const S*)in.log_sum)[row], ((const S*)in.target)[row],
                          at_or(in.entropy, row, S(0))};
  const Upstream<S> c{at_or(in.c_logp, row, S(0)), at_or(in.c_lse, row, S(0)), at_or(in.c_ent, row, S(0)),
                      in.c_ent != nullptr};
  RowTerms<S> terms;
  terms.max = stats.max;
  terms.log_sum = stats.log_sum;
  terms.factor = other_factor(stats, c, t);
  if constexpr (from_kept) terms.factor *= lane_exp((((const S*)in.offset)[row] - stats.max) - stats.log_sum);
  terms.entropy_factor = c.entropy * t.slope_at_zero();
  const int64_t target = slab.targets[row], column = target - slab.start;
  terms.column = target < 0 ? kIgnored : column >= 0 && column < slab.width ? int(column) : kElsewhere;
  terms.entry = terms.column < 0 ? S(0) : target_slope(stats, c, t);
  terms.row_scale = at_or(in.row_scale, row, S(1));
  return terms;
}

// dz of one entry: `x` is the kept value, or the transformed logit y.
template <class S, bool from_kept>
__device__ __forceinline__ S slope_of(S x, const RowTerms<S>& row, const Transform<S>& t, bool has_entropy) {
  if constexpr (from_kept) return x * row.factor;
  // Reason: max and log(sum) are subtracted one after the other because their rounded sum would cost digits.
  const S logp = (x - row.max) - row.log_sum, p = lane_exp(logp);
  S d = p * row.factor;
  // Hazard: 0 * -inf where P is 0. Remedy: only entries above 0 have the term.
  if (has_entropy) d -= p > S(0) ? p * logp * row.entropy_factor : S(0);
  if (t.capped()) d *= relative_slope(x, t);
  return d;
}

template <class S, class E, bool from_kept, bool wide>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<S>)
    backward(const Slab slab, const Transform<S> t, const BackwardInputs in, int column_tiles, int64_t tile_rows,
             S* partial) {
  constexpr int size = kPack<E, wide>, at_once = kRowsAtOnce;
  __shared__ RowTerms<S> terms[kBatch];
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int64_t width = slab.width, tile = blockIdx.x / column_tiles;
  const int column_tile = int(blockIdx.x % column_tiles);
  const int64_t first_row = tile * tile_rows;
  const int64_t last_row = first_row + tile_rows < slab.rows ? first_row + tile_rows : slab.rows;
  const Columns<wide, size> columns{thread, threads, int(width)};
  const bool plain = slab.bias == nullptr && t.identity(), has_entropy = in.c_ent != nullptr;
  E* const dz = (E*)in.dz;
  S sums[size];
#pragma unroll
  for (int k = 0; k < size; ++k) sums[k] = S(0);

  for (int64_t batch = first_row; batch < last_row; batch += kBatch) {
    const int count = int(last_row - batch < kBatch ? last_row - batch : kBatch);
    __syncthreads();
    if (thread < count) terms[thread] = terms_of<S, from_kept>(slab, in, t, batch + thread);
    __syncthreads();
    for (int first = 0; first < count; first += at_once) {
      // Hazard: dz may be the slab, so no load can move above an earlier store. Remedy: load several rows, then store.
      S x[at_once][size];
#pragma unroll
      for (int r = 0; r < at_once; ++r) {
        if (first + r >= count) continue;
        if constexpr (from_kept) {
          load_pack((const E*)in.kept + (batch + first + r) * in.kept_stride, columns, column_tile, S(0), x[r]);
        } else {
          load_pack((const S*)slab.logits + (batch + first + r) * slab.stride, columns, column_tile,
                    minus_infinity<S>(), x[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < at_once; ++r) {
        if (first + r >= count) continue;
        if (!from_kept && !plain) transform_pack((const S*)slab.bias, columns, column_tile, t, x[r]);
        const RowTerms<S>& row = terms[first + r];
#pragma unroll
        for (int k = 0; k < size; ++k) {
          S d = slope_of<S, from_kept>(x[r][k], row, t, has_entropy);
          if (row.column == columns.at(column_tile, k)) d = row.entry;
          // Hazard: an ignored row can hold NaN, and 0 * NaN is NaN. Remedy: select.
          if (row.column == kIgnored) d = S(0);
          x[r][k] = d;
          sums[k] += d * row.row_scale;
        }
        store_pack(dz + (batch + first + r) * in.dz_stride, columns, column_tile, x[r]);
      }
    }
  }
  if (partial != nullptr) store_pack(partial + tile * width, columns, column_tile, sums);
}

template <class S, class E>
void run(const Slab& slab, const BackwardInputs& in, void* partial, int64_t row_tiles, Stream stream) {
  const int width = checked_width(slab.width);
  const bool wide = kMayBeWide<S> && aligned_rows<S>(slab.logits, slab.stride) &&
                    aligned_rows<E>(in.kept, in.kept_stride) && aligned_rows<E>(in.dz, in.dz_stride) &&
                    aligned16(slab.bias) && aligned16(partial) && width % kPack<E, true> == 0;
  const int size = wide ? kPack<E, true> : kPack<E, false>;
  int threads = 32;
  while (threads < kMaxThreads && threads * size < width) threads *= 2;
  const int column_tiles = int(ceil_div(width, threads * size));
  // dbias uses as many row tiles as its scratch allows.
  const int64_t tile_rows = in.dbias == nullptr ? kTileRows : ceil_div(slab.rows, row_tiles > 0 ? row_tiles : 1);
  const int64_t tiles = slab.rows == 0 ? 0 : ceil_div(slab.rows, tile_rows);
  S* const scratch = in.dbias == nullptr ? nullptr : (S*)partial;
  constexpr bool may = kMayBeWide<S>;
  const auto kernel = in.kept != nullptr ? (wide ? backward<S, E, true, may> : backward<S, E, true, false>)
                                         : (wide ? backward<S, E, false, may> : backward<S, E, false, false>);
  WK_RUN("slab_backward", kernel, tiles * column_tiles, dim3(threads), cudaStream_t(stream), slab, Transform<S>(slab),
         in, column_tiles, tile_rows, scratch);
  if (in.dbias != nullptr) {
    run_add_tiles("slab_backward (dbias)", (const S*)scratch, tiles, width, (S*)in.dbias, stream);
  }
}

}  // namespace

void slab_backward(const Slab& slab, const BackwardInputs& in, void* partial, int64_t row_tiles, Stream stream) {
  WK_FOR_DTYPE(slab.operand, run, slab, in, partial, row_tiles, stream)
}

}  // namespace cuda
}  // namespace windkern
