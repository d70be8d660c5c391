// In the place of score_tiles.cu and exps_tiles.cu where nvcc is too old to compile them.
#include <stdexcept>

#include "launchers.h"

namespace windkern {
namespace cuda {
namespace {

constexpr const char* kReason = "windkern was built by an nvcc older than 12.5, which lacks what they need";

}  // namespace

std::string tiles_problem(int) { return kReason; }
int tile_columns() { return 0; }

void score_tiles(const TileOperands&, const Slab&, const ForwardState&, float*, bool, Stream) {
  throw std::runtime_error(kReason);
}

void exps_tiles_forward(const TileOperands&, const Slab&, const ForwardState&, const ExpsOutputs&, float*, bool, Stream) {
  throw std::runtime_error(kReason);
}

void exps_tiles_backward(const TileOperands&, const Slab&, const ExpsInputs&, Stream) {
  throw std::runtime_error(kReason);
}

}  // namespace cuda
}  // namespace windkern
