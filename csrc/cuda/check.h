// Raises an error for a failed call of the runtime or a failed launch of a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace windkern {
namespace cuda {

inline void check(cudaError_t status, const char* path, int line, const char* what) {
  if (status == cudaSuccess) return;
  const std::string file = path;
  throw std::runtime_error(file.substr(file.rfind('/') + 1) + ":" + std::to_string(line) + ": " + what + ": " +
                           cudaGetErrorString(status));
}

#define WK_CHECK(call) ::windkern::cuda::check(call, __FILE__, __LINE__, #call)

}  // namespace cuda
}  // namespace windkern
