// The kernels that multiply themselves, under the emulator and sanitizers like those of sanitize.cpp: every array is
// exactly as large as the contract says. Prints "clean" at the end.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/launchers.h"

using namespace windkern;

// Rows of 16-bit numbers, of which the last ends where its array does.
struct Matrix {
  int64_t stride;
  std::vector<uint16_t> values;

  Matrix(int64_t rows, int64_t columns, int64_t stride) : stride(stride), values((rows - 1) * stride + columns) {
    for (size_t k = 0; k < values.size(); ++k) values[k] = uint16_t(0x3d80 + k * 7 % 256);  // 0.06 to 0.25
  }
};

static void run(DType operand, int64_t rows, int64_t width, int64_t inner, bool bias) {
  Matrix hidden(rows, inner, inner + 8), head(width, inner, inner);
  std::vector<float> b(width, 0.5f);
  if (width > 1) b[1] = -INFINITY;
  std::vector<int64_t> targets(rows);
  for (int64_t i = 0; i < rows; ++i) targets[i] = i % 3 == 2 ? -1 : 7 + i * 5 % (width + 2);
  const Slab slab{operand, rows, width, 7, nullptr, 0, bias ? b.data() : nullptr, targets.data(), 1.3, 0.0, 0.7, 0};
  const TileOperands in{hidden.values.data(), hidden.stride, head.values.data(), head.stride, inner};
  const int64_t tiles = (width + cuda::tile_columns() - 1) / cuda::tile_columns();
  std::vector<float> max(rows, -INFINITY), sum(rows), target(rows, -INFINITY), entropy(rows);
  for (bool wants : {false, true}) {
    std::vector<float> parts((wants ? 3 : 2) * tiles * rows);
    cuda::score_tiles(in, slab, {max.data(), sum.data(), target.data(), wants ? entropy.data() : nullptr}, parts.data(),
                      wants, nullptr);
  }
  if (operand != DType::bfloat16) return;
  // Two slabs side by side; pivots far below move in the second.
  const int64_t earlier = (width + 3) / 4 * 4;
  Matrix exps(rows, earlier + width, 2 * earlier);
  std::vector<float> pivot(rows, -INFINITY), moved(rows), parts(3 * tiles * rows), entry(rows, 2.0f);
  for (int64_t side = 0; side < 2; ++side) {
    if (side == 1) pivot.assign(rows, -90.0f);
    cuda::exps_tiles_forward(in, slab, {max.data(), sum.data(), target.data(), nullptr},
                             {exps.values.data() + side * earlier, exps.stride, pivot.data(), side * earlier,
                              side == 1 ? moved.data() : nullptr},
                             parts.data(), side == 0, nullptr);
  }
  cuda::exps_tiles_backward(in, slab, {pivot.data(), entry.data(), exps.values.data() + earlier, exps.stride}, nullptr);
}

int main() {
  for (DType operand : {DType::bfloat16, DType::float16}) {
    for (int64_t rows : {1, 5, 130}) {
      for (int64_t width : {1, 255, 256, 300}) run(operand, rows, width, rows == 5 ? 72 : 8, rows != 1);
    }
  }
  std::puts("clean");
}
