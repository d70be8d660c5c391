// Both ends of backward: the factors of the rows, and the rows of dhidden in their final dtype.
#include "launchers.h"
#include "packs.h"

namespace windkern {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// Reason: the dtypes of what is read and written do not depend on each other. A branch that all threads take alike is
// free beside memory, so kernels get them as arguments.
int item_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Whether 16-byte accesses are built and possible.
bool wide_rows(DType dtype, const void* matrix, int64_t stride) {
  return dtype != DType::float64 && aligned16(matrix) && stride * item_size(dtype) % 16 == 0;
}

// A pack of the row that begins `first` numbers into a matrix; 0 outside the row.
template <class S, bool wide, int size>
__device__ __forceinline__ void load_any(DType dtype, const void* matrix, int64_t first,
                                         const Columns<wide, size>& columns, int span, S (&to)[size]) {
  switch (dtype) {
    case DType::float64:
      if constexpr (!wide) load_pack((const double*)matrix + first, columns, span, S(0), to);
      break;
    case DType::float32: load_pack((const float*)matrix + first, columns, span, S(0), to); break;
    case DType::bfloat16: load_pack((const BFloat16*)matrix + first, columns, span, S(0), to); break;
    case DType::float16: load_pack((const Half*)matrix + first, columns, span, S(0), to); break;
  }
}

template <class S, bool wide, int size>
__device__ __forceinline__ void store_any(DType dtype, void* matrix, int64_t first, const Columns<wide, size>& columns,
                                          int span, const S (&from)[size]) {
  switch (dtype) {
    case DType::float64:
      if constexpr (!wide) store_pack((double*)matrix + first, columns, span, from);
      break;
    case DType::float32: store_pack((float*)matrix + first, columns, span, from); break;
    case DType::bfloat16: store_pack((BFloat16*)matrix + first, columns, span, from); break;
    case DType::float16: store_pack((Half*)matrix + first, columns, span, from); break;
  }
}

template <class E, class S, int size>
__device__ __forceinline__ void round_all(S (&values)[size]) {
#pragma unroll
  for (int k = 0; k < size; ++k) values[k] = S(widened(narrowed<E>(values[k])));
}

template <class S, int size>
__device__ __forceinline__ void round_to(DType dtype, S (&values)[size]) {
  switch (dtype) {
    case DType::float64: break;
    case DType::float32: round_all<float>(values); break;
    case DType::bfloat16: round_all<BFloat16>(values); break;
    case DType::float16: round_all<Half>(values); break;
  }
}

// One block for each row and each span of kThreads packs.
template <class S, bool wide, int size>
__global__ void __launch_bounds__(kThreads) factor_rows(const RowFactors in, int spans) {
  const int64_t row = blockIdx.x / spans;
  const int span = int(blockIdx.x % spans);
  const bool ignored = in.targets[row] < 0;
  const S factor = ignored ? S(0) : S(-in.slope) * (((const S*)in.upstream)[row] / ((const S*)in.total)[row]);
  if (span == 0 && threadIdx.x == 0) ((S*)in.factor)[row] = factor;
  if (in.scaled == nullptr) return;
  const Columns<wide, size> columns{int(threadIdx.x), int(blockDim.x), int(in.columns)};
  S values[size] = {};
  // Hazard: an ignored row can hold NaN, and 0 * NaN is NaN. Remedy: do not read it.
  if (!ignored) load_any(in.hidden_dtype, in.hidden, row * in.hidden_stride, columns, span, values);
#pragma unroll
  for (int k = 0; k < size; ++k) values[k] *= factor;
  store_any(in.scaled_dtype, in.scaled, row * in.scaled_stride, columns, span, values);
}

template <class S, bool wide, int size>
__global__ void __launch_bounds__(kThreads) end_grad(const HiddenGrad in, int spans) {
  const int64_t row = blockIdx.x / spans, target = in.targets[row];
  const int span = int(blockIdx.x % spans);
  if (target < 0 && in.places != nullptr) return;
  const Columns<wide, size> columns{int(threadIdx.x), int(blockDim.x), int(in.columns)};
  S values[size] = {};
  if (target >= 0) {  // an ignored row can hold anything
    load_pack((const S*)in.total + row * in.total_stride, columns, span, S(0), values);
    const S factor = in.factor == nullptr ? S(1) : ((const S*)in.factor)[row];
#pragma unroll
    for (int k = 0; k < size; ++k) values[k] *= factor;
    if (in.head != nullptr) {
      const S at_target = ((const S*)in.at_target)[row];
      S found[size];
      load_any(in.head_dtype, in.head, target * in.head_stride, columns, span, found);
      round_to(in.rounded, found);
#pragma unroll
      for (int k = 0; k < size; ++k) values[k] += at_target * found[k];
    }
  }
  const int64_t place = in.places == nullptr ? row : in.places[row];
  store_any(in.out_dtype, in.out, place * in.out_stride, columns, span, values);
}

template <class S, bool wide, int size>
void run_factors(const RowFactors& in, Stream stream) {
  const Spans spans = spans_of(in.columns == 0 ? 1 : in.columns, size, kThreads);
  WK_RUN("row_factors", (factor_rows<S, wide, size>), in.rows * spans.count, dim3(spans.threads), cudaStream_t(stream),
         in, spans.count);
}

template <class S, bool wide, int size>
void run_grad(const HiddenGrad& in, Stream stream) {
  const Spans spans = spans_of(in.columns == 0 ? 1 : in.columns, size, kThreads);
  WK_RUN("write_hidden_grad", (end_grad<S, wide, size>), in.columns == 0 ? 0 : in.rows * spans.count,
         dim3(spans.threads), cudaStream_t(stream), in, spans.count);
}

// Calls function<scalar, wide, columns of a thread>(...): 16 bytes of `dtype`, in which results are written.
#define WK_FOR_WIDTH(is_double, wide, dtype, function, ...)                              \
  if (is_double) return function<double, false, kPack<double, false>>(__VA_ARGS__);      \
  if (!(wide)) return function<float, false, kPack<float, false>>(__VA_ARGS__);          \
  if (item_size(dtype) == 4) return function<float, true, kPack<float, true>>(__VA_ARGS__); \
  function<float, true, kPack<BFloat16, true>>(__VA_ARGS__);

}  // namespace

void row_factors(const RowFactors& in, Stream stream) {
  const bool wide = wide_rows(in.hidden_dtype, in.hidden, in.hidden_stride) &&
                    wide_rows(in.scaled_dtype, in.scaled, in.scaled_stride) &&
                    in.columns * item_size(in.scaled_dtype) % 16 == 0;
  WK_FOR_WIDTH(in.is_double, wide, in.scaled_dtype, run_factors, in, stream)
}

void write_hidden_grad(const HiddenGrad& in, Stream stream) {
  const bool wide = wide_rows(DType::float32, in.total, in.total_stride) &&
                    wide_rows(in.head_dtype, in.head, in.head_stride) &&
                    wide_rows(in.out_dtype, in.out, in.out_stride) && in.columns * item_size(in.out_dtype) % 16 == 0;
  WK_FOR_WIDTH(in.is_double, wide, in.out_dtype, run_grad, in, stream)
}

}  // namespace cuda
}  // namespace windkern
