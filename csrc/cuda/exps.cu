// Backward's work with exponentials, apart from its products: recomputing them, sums of columns, and factors of rows.
#include "add_tiles.h"
#include "launchers.h"
#include "packs.h"

namespace windkern {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// One block for each row and each span of kThreads packs.
template <class S, class E, bool wide>
__global__ void __launch_bounds__(kThreads)
    again(const Slab slab, const Transform<S> t, const ExpsInputs in, int spans) {
  constexpr int size = kPack<E, wide>;
  const int64_t row = blockIdx.x / spans, target = slab.targets[row];
  const int span = int(blockIdx.x % spans);
  const Columns<wide, size> columns{int(threadIdx.x), int(blockDim.x), int(slab.width)};
  const S pivot = ((const S*)in.pivot)[row], entry = ((const S*)in.entry)[row];
  const int64_t column = target - slab.start;
  S y[size];
  load_pack((const S*)slab.logits + row * slab.stride, columns, span, minus_infinity<S>(), y);
  if (slab.bias != nullptr || !t.identity()) transform_pack((const S*)slab.bias, columns, span, t, y);
#pragma unroll
  for (int k = 0; k < size; ++k) {
    y[k] = columns.at(span, k) == column ? entry : lane_exp(y[k] - pivot);
    if (target < 0) y[k] = S(0);  // an ignored row can hold anything
  }
  store_pack((E*)in.values + row * in.stride, columns, span, y);
}

template <class S, class E>
void run_again(const Slab& slab, const ExpsInputs& in, Stream stream) {
  const bool wide = kMayBeWide<S> && aligned_rows<S>(slab.logits, slab.stride) &&
                    aligned_rows<E>(in.values, in.stride) && aligned16(slab.bias) && slab.width % kPack<E, true> == 0;
  const Spans spans = spans_of(slab.width, wide ? kPack<E, true> : kPack<E, false>, kThreads);
  WK_RUN("exps_backward", wide ? again<S, E, kMayBeWide<S>> : again<S, E, false>, slab.rows * spans.count,
         dim3(spans.threads), cudaStream_t(stream), slab, Transform<S>(slab), in, spans.count);
}

// One thread for each column of a tile of rows; its sum is added to those of the other tiles below.
template <class S, class E>
__global__ void __launch_bounds__(kThreads)
    sum_tiles(const ColumnSums in, int column_blocks, int64_t tile_rows, S* partial) {
  const int64_t tile = blockIdx.x / column_blocks;
  const int64_t column = int64_t(blockIdx.x % column_blocks) * blockDim.x + threadIdx.x;
  if (column >= in.width) return;
  const int64_t first = tile * tile_rows, last = first + tile_rows < in.rows ? first + tile_rows : in.rows;
  const E* values = (const E*)in.values + column;
  S sum = S(0);
#pragma unroll 4
  for (int64_t row = first; row < last; ++row) sum += widened(values[row * in.stride]) * ((const S*)in.weights)[row];
  partial[tile * in.width + column] = sum;
}

template <class S, class E>
void run_sums(const ColumnSums& in, void* partial, int64_t row_tiles, Stream stream) {
  const int column_blocks = int(ceil_div(checked_width(in.width), kThreads));
  const int64_t tile_rows = ceil_div(in.rows, row_tiles > 0 ? row_tiles : 1);
  const int64_t tiles = in.rows == 0 ? 0 : ceil_div(in.rows, tile_rows);
  WK_RUN("column_sums", sum_tiles<S, E>, tiles * column_blocks, dim3(kThreads), cudaStream_t(stream), in,
         column_blocks, tile_rows, (S*)partial);
  run_add_tiles("column_sums (tiles)", (const S*)partial, tiles, in.width, (S*)in.sums, stream);
}

template <class S, class E>
__global__ void __launch_bounds__(kThreads)
    rescale(E* sums, int64_t stride, const S* factors, int64_t columns) {
  const S factor = factors[blockIdx.x];
  if (factor == S(1)) return;
  E* row = sums + blockIdx.x * stride;
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) row[i] = narrowed<E>(widened(row[i]) * factor);
}

template <class S, class E>
void run_rescale(void* sums, int64_t stride, const void* factor, int64_t rows, int64_t columns, Stream stream) {
  WK_RUN("rescale_rows", rescale<S, E>, rows, dim3(kThreads), cudaStream_t(stream), (E*)sums, stride,
         (const S*)factor, columns);
}

}  // namespace

void exps_backward(const Slab& slab, const ExpsInputs& in, Stream stream) {
  WK_FOR_DTYPE(slab.operand, run_again, slab, in, stream)
}

void column_sums(const ColumnSums& in, void* partial, int64_t row_tiles, Stream stream) {
  WK_FOR_DTYPE(in.dtype, run_sums, in, partial, row_tiles, stream)
}

void rescale_rows(DType dtype, void* sums, int64_t stride, const void* factor, int64_t rows, int64_t columns,
                  Stream stream) {
  WK_FOR_DTYPE(dtype, run_rescale, sums, stride, factor, rows, columns, stream)
}

}  // namespace cuda
}  // namespace windkern
