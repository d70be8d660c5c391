// The CUDA launchers as a table of the CPU's kind, scratch exactly as large as the contract says: sanitize.cpp runs them
// under the emulator.
#include <vector>

#include "cpu/dispatch.h"
#include "cuda/launchers.h"

namespace windkern {
namespace {

constexpr int64_t kRowTiles = 2;

void forward(const Slab& slab, const ForwardState& state, const ForwardOutputs& out) {
  cuda::slab_forward(slab, state, out, nullptr);
  cuda::slab_forward(slab, state, {nullptr, nullptr}, nullptr);
}

void unit(const Slab& slab, const ForwardState& state, const UnitOutputs& out) {
  cuda::slab_forward_unit(slab, state, out, nullptr);
}

void backward(const Slab& slab, const BackwardInputs& in) {
  const size_t item = slab.operand == DType::float64 ? 8 : 4;
  std::vector<char> partial(in.dbias == nullptr ? 0 : kRowTiles * slab.width * item);
  cuda::slab_backward(slab, in, in.dbias == nullptr ? nullptr : partial.data(), in.dbias == nullptr ? 0 : kRowTiles,
                      nullptr);
}

void segments(DType dtype, const void* values, const int64_t* bounds, int64_t count, void* sums, int) {
  cuda::segment_sum(dtype, values, bounds, count, sums, nullptr);
}

void terms(const Pairs& in, void* value, void* slope) {
  std::vector<double> scratch(in.groups * cuda::pair_tiles(in.n));
  cuda::pair_terms(in, value, slope, scratch.data(), nullptr);
}

void rates(const Pairs& in, void* out) { cuda::win_rates(in, out, nullptr); }

}  // namespace

std::vector<NamedProduct> runnable_products() { return {}; }

std::vector<const KernelTable*> runnable_kernels() {
  static const KernelTable table{"emulated", forward, unit, backward, segments, terms, rates};
  return {&table};
}

}  // namespace windkern
