// Forward that keeps exp(y - offset) for backward.
#pragma once

#include "launchers.h"

namespace windkern {
namespace cuda {

void slab_forward_kept(const Slab& slab, const ForwardState& state, const ForwardOutputs& out, Stream stream);

}  // namespace cuda
}  // namespace windkern
