// Instructions of Hopper GPUs (sm_90a): the tensor copy engine, barriers it completes, and products by warpgroups.
//
// Sources: the PTX ISA's sections on cp.async.bulk.tensor, mbarrier, wgmma and setmaxnreg. The emulator of the tests has
// its own version of this file's functions, and defines WK_HOPPER as its path.
#pragma once

#include "../include/windkern/storage.h"
#include "launch.h"
#include "launchers.h"

#ifdef WK_HOPPER
#include WK_HOPPER
#else

#include <cuda.h>

namespace windkern {
namespace cuda {
namespace hopper {

using TileMap = CUtensorMap;

constexpr bool kClusters = true;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}

// A barrier in shared memory that arrivals, and the bytes of copies, complete phase after phase.
struct Barrier {
  uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)), "r"(arrivals));
  }
  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state)) : "memory");
  }
  // The same barrier of another block of the cluster.
  __device__ __forceinline__ void arrive_at(int block) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
                         "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(&state)), "r"(block)
                         : "memory");
  }
  // Waits until the phase of this parity is complete.
  __device__ __forceinline__ void wait(int parity) {
    asm volatile("{\n.reg .pred complete;\nagain:\n"
                         "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n@complete bra done;\n"
                         "bra again;\ndone:\n}" ::"r"(shared_address(&state)), "r"(parity)
                         : "memory");
  }
};

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ int block_in_cluster() {
  uint32_t rank = 0;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

// Waits for all threads of all blocks of the cluster.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const TileMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// Copies the box at (row, column) of a matrix into shared memory, swizzled; what lies outside reads as 0.
__device__ __forceinline__ void copy_box(void* to, const TileMap& map, int row, int column, Barrier& barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                       ::"r"(shared_address(to)), "l"(reinterpret_cast<uint64_t>(&map)),
                       "r"(shared_address(&barrier.state)), "r"(column), "r"(row)
                       : "memory");
}

// The same into the same place of every block of `blocks`, whose barriers each learn of the bytes.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, void* to, const TileMap& map, int row, int column,
                                            Barrier& barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                       "[%0], [%1, {%4, %5}], [%2], %3;"
                       ::"r"(shared_address(to)), "l"(reinterpret_cast<uint64_t>(&map)),
                       "r"(shared_address(&barrier.state)), "h"(blocks), "r"(column), "r"(row)
                       : "memory");
}

// The describing word of an operand with rows of 128 bytes in shared memory, as copy_box leaves it: groups of eight rows
// are 1024 bytes apart, 16-byte pieces are swizzled within them.
__device__ __forceinline__ uint64_t describe(const void* operand) {
  return uint64_t((shared_address(operand) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}

// The word of the same operand `bytes` further along its rows.
__device__ __forceinline__ uint64_t along(uint64_t word, int bytes) { return word + uint64_t(bytes >> 4); }

// Orders registers and shared memory before products that read them.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `running` committed groups of products still run.
template <int running>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(running) : "memory");
}
// Keeps the compiler from moving accesses to the sums over a product.
__device__ __forceinline__ void fence_sums(float (&acc)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

#define WK_SUMS_8(i)                                                                                  \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define WK_SUMS_32(i) WK_SUMS_8(i), WK_SUMS_8(i + 8), WK_SUMS_8(i + 16), WK_SUMS_8(i + 24)
#define WK_MULTIPLY(type)                                                                                   \
  asm volatile(                                                                                             \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                                     \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                              \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                    \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                    \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                    \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "        \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, add, 1, 1, 0, 0;\n}"\
      : WK_SUMS_32(0), WK_SUMS_32(32), WK_SUMS_32(64), WK_SUMS_32(96)                                       \
      : "l"(a), "l"(b), "r"(int(add)))

// sums (64, 256) of a warpgroup = or += a (64, 16) @ b (256, 16).T. Of lane l in warp w of the warpgroup, acc[4 j + 2 h + i]
// belongs to row 16 w + l / 4 + 8 h and column 8 j + 2 (l % 4) + i.
template <class E>
__device__ __forceinline__ void multiply(float (&acc)[128], uint64_t a, uint64_t b, bool add) {
  if constexpr (SameType<E, BFloat16>::value) {
    WK_MULTIPLY("bf16");
  } else {
    WK_MULTIPLY("f16");
  }
}

#undef WK_MULTIPLY
#undef WK_SUMS_32
#undef WK_SUMS_8

// The registers of each thread of a warpgroup from here on.
template <int count>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// The map of a matrix with rows of 16-bit numbers, whose boxes have `box_rows` rows of 128 bytes.
inline TileMap map_of(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // Reason: the runtime finds the driver's function, so the extension imports where there is no driver.
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    WK_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
    if (found == nullptr) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; it is older than 12.0");
    return reinterpret_cast<Encode>(found);
  }();
  TileMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  // The bits of bfloat16 and float16 are copied alike.
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)) + " for a matrix of " +
                             std::to_string(rows) + " x " + std::to_string(columns) + " with stride " +
                             std::to_string(stride));
  }
  return map;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  WK_CHECK(cudaGetDevice(&device));
  WK_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Runs `blocks` blocks, in clusters of `cluster`, with `bytes` of shared memory each.
template <class... Args>
void launch_clusters(const char* name, void (*kernel)(Args...), int blocks, int threads, int cluster, int bytes,
                     Stream stream, typename Same<Args>::type... args) {
  WK_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = cudaStream_t(stream);
  cudaLaunchAttribute shape;
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = unsigned(cluster);
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  config.attrs = &shape;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, args...), __FILE__, __LINE__, name);
}

}  // namespace hopper
}  // namespace cuda
}  // namespace windkern

#endif
