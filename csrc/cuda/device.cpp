// Checks that a device can run this build.
#include "check.h"
#include "launchers.h"

namespace windkern {
namespace cuda {

constexpr int kOldest = 8;  // compute capability 8.0

std::string device_problem(int device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    return std::string("the CUDA driver is missing or cannot be used (") + cudaGetErrorString(status) + ")";
  }
  if (device >= count) {
    return "there is no GPU number " + std::to_string(device) + ", the driver sees " + std::to_string(count);
  }
  int major = 0, minor = 0;
  WK_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  WK_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major < kOldest) {
    return "it is built for compute capability 8.0 and newer, this GPU has " + std::to_string(major) + "." +
           std::to_string(minor);
  }
  return "";
}

void use_device(int device) {
  if (device >= 0) WK_CHECK(cudaSetDevice(device));
}

}  // namespace cuda
}  // namespace windkern
