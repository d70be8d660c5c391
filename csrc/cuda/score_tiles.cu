// Forward of tiles that only scores: each tile writes statistics of its rows, and a second kernel merges those of a row.
#include "tile_logits.h"

namespace windkern {
namespace cuda {
namespace {

struct ScoreTile {
  Slab slab;
  Transform<float> t;
  TileParts parts;
  float* target;  // (rows,)
  bool fresh;

  struct Looked {
    int64_t targets[2];
  };

  __device__ __forceinline__ Looked look(int row) const {
    return {{row < slab.rows ? slab.targets[row] : -1, row + 8 < slab.rows ? slab.targets[row + 8] : -1}};
  }

  __device__ __forceinline__ void end(float (&acc)[128], int row, int column_tile, const Looked& looked) const {
    const HeldColumns columns{column_tile * kTileColumns, int(slab.width)};
    transform_tile(acc, columns, slab, t);
    float most[2], sums[2][2] = {}, entropies[2] = {};
    largest_of_rows(acc, most);
    const ExpsFrom exps[2] = {ExpsFrom(finite_shift(most[0])), ExpsFrom(finite_shift(most[1]))};
    // One loop for each case: the compiler would keep all exponentials for a second one.
    if (parts.entropy == nullptr) {
#pragma unroll
      for (int k = 0; k < 128; ++k) sums[k / 2 % 2][k % 2] += exps[k / 2 % 2](acc[k]);
    } else {
#pragma unroll
      for (int k = 0; k < 128; ++k) {
        const int h = k / 2 % 2;
        const float e = exps[h](acc[k]);
        sums[h][k % 2] += e;
        entropies[h] += e > 0.0f ? e * (acc[k] - most[h]) : 0.0f;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      const float sum = sum_of_four(sums[h][0] + sums[h][1]);
      const float entropy = parts.entropy == nullptr ? 0.0f : sum_of_four(entropies[h]);
      if (threadIdx.x % 4 == 0 && r < slab.rows) {
        const int64_t place = int64_t(column_tile) * slab.rows + r;
        parts.max[place] = most[h];
        parts.sum[place] = sum;
        if (parts.entropy != nullptr) parts.entropy[place] = entropy;
      }
      const int column = held_target(looked.targets[h], slab, columns);
      if (column >= 0) target[r] = value_at(acc, h, column);
      const int64_t place_of_target = looked.targets[h] - slab.start;
      const bool elsewhere = looked.targets[h] < 0 || place_of_target < 0 || place_of_target >= slab.width;
      if (fresh && elsewhere && column_tile == 0 && r < slab.rows) target[r] = minus_infinity<float>();
    }
  }
};

__global__ void __launch_bounds__(kJoinRows* kJoinRuns)
    join(const ForwardState state, const TileParts parts, int rows, int count, bool fresh) {
  const int row = int(blockIdx.x) * kJoinRows + int(threadIdx.x);
  const OnlineSoftmax<float> slab = join_tiles(parts, row, rows, count);
  if (threadIdx.y > 0 || row >= rows) return;
  OnlineSoftmax<float> running = begin_state(state, row, fresh);
  merge(running, slab);
  store_state(state, row, running);
}

template <class E>
void run(const TileOperands& in, const Slab& slab, const ForwardState& state, float* scratch, bool fresh,
         Stream stream) {
  const TileParts parts(slab, state.entropy != nullptr, scratch);
  const ScoreTile end{slab, Transform<float>(slab), parts, (float*)state.target, fresh};
  run_tiles<E>("score_tiles", in, slab, end, stream);
  WK_RUN("join_tiles", join, ceil_div(slab.rows, kJoinRows), dim3(kJoinRows, kJoinRuns), cudaStream_t(stream), state,
         parts, int(slab.rows), column_tiles(slab), fresh);
}

}  // namespace

std::string tiles_problem(int device) {
  int major = 0, minor = 0;
  WK_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  WK_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major == 9 && minor == 0) return "";
  return "they are built for compute capability 9.0, this GPU has " + std::to_string(major) + "." +
         std::to_string(minor);
}

int tile_columns() { return kTileColumns; }

void score_tiles(const TileOperands& in, const Slab& slab, const ForwardState& state, float* parts, bool fresh,
                 Stream stream) {
  if (slab.operand == DType::bfloat16) return run<BFloat16>(in, slab, state, parts, fresh, stream);
  run<Half>(in, slab, state, parts, fresh, stream);
}

}  // namespace cuda
}  // namespace windkern
