// Launches a kernel, and checks the limits of a launch.
#pragma once

#include "check.h"

#ifndef WK_LAUNCH
#define WK_LAUNCH(kernel, grid, block, stream) kernel<<<grid, block, 0, stream>>>
#endif

namespace windkern {
namespace cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
struct Same {
  using type = T;
};

// Nothing runs for 0 blocks. `name` is the kernel's name in an error.
template <class... Args>
void launch(const char* file, int line, const char* name, void (*kernel)(Args...), int64_t blocks, dim3 block,
            cudaStream_t stream, typename Same<Args>::type... args) {
  if (blocks == 0) return;
  if (blocks > 2147483647) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(blocks) + " blocks are more than a grid has");
  }
  WK_LAUNCH(kernel, dim3(unsigned(blocks)), block, stream)(args...);
  check(cudaGetLastError(), file, line, name);
}

#define WK_RUN(name, ...) ::windkern::cuda::launch(__FILE__, __LINE__, name, __VA_ARGS__)

// Columns of a row are counted in 32 bits, with room for a team's last step; rows * width needs 64 bits.
inline int checked_width(int64_t width) {
  if (width < 1 || width > (int64_t(1) << 30)) {
    throw std::invalid_argument("a slab must have 1 to 2^30 columns, got " + std::to_string(width));
  }
  return int(width);
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Calls function<scalar, storage>(...) for an operand dtype.
#define WK_FOR_DTYPE(dtype, function, ...)                               \
  switch (dtype) {                                                       \
    case DType::float64: return function<double, double>(__VA_ARGS__);   \
    case DType::float32: return function<float, float>(__VA_ARGS__);     \
    case DType::bfloat16: return function<float, BFloat16>(__VA_ARGS__); \
    case DType::float16: return function<float, Half>(__VA_ARGS__);      \
  }

}  // namespace cuda
}  // namespace windkern
