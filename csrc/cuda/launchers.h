// Launchers of the CUDA kernels, in plain C++ without CUDA, torch or Python headers. None allocates, and only
// find_scored synchronises.
#pragma once

#include <cstdint>
#include <string>

#include "../include/windkern/arguments.h"

namespace windkern {
namespace cuda {

using Stream = void*;  // a cudaStream_t

// Returns why no kernel of this build can run on a device, or an empty string.
std::string device_problem(int device);

// Makes `device` current in this module's runtime; a negative number leaves it alone.
void use_device(int device);

void slab_forward(const Slab& slab, const ForwardState& state, const ForwardOutputs& out, Stream stream);
void slab_forward_unit(const Slab& slab, const ForwardState& state, const UnitOutputs& out, Stream stream);
// `partial` is scratch (row_tiles, width) if dbias is wanted, else null with row_tiles 0.
void slab_backward(const Slab& slab, const BackwardInputs& in, void* partial, int64_t row_tiles, Stream stream);
void exps_forward(const Slab& slab, const ForwardState& state, const ExpsOutputs& out, Stream stream);
void exps_backward(const Slab& slab, const ExpsInputs& in, Stream stream);
// `partial` is scratch (row_tiles, width).
void column_sums(const ColumnSums& in, void* partial, int64_t row_tiles, Stream stream);
// sums (rows, columns) *= factor (rows,), without access to rows whose factor is 1; `dtype` is that of sums.
void rescale_rows(DType dtype, void* sums, int64_t stride, const void* factor, int64_t rows, int64_t columns,
                  Stream stream);
void finish_rows(const Finish& in, Stream stream);
void row_factors(const RowFactors& in, Stream stream);
void write_hidden_grad(const HiddenGrad& in, Stream stream);
// Writes the positions of targets other than `ignored`, in order, and returns their number, which the kernel writes to
// `count` in pinned memory of the host. Waits for the stream.
int64_t find_scored(const int64_t* targets, int64_t ignored, int64_t rows, int64_t* positions, int64_t* count,
                    Stream stream);
// On Hopper GPUs, without a softcap: the product of a slab's logits and the kernel that reads them as one. No logits are
// written; Slab::logits is null. `parts` is scratch (n, column tiles, rows): n is 2, and 3 with an entropy or in forward of
// the exponentials, of bfloat16, whose rows are a multiple of 8 bytes apart.
std::string tiles_problem(int device);
int tile_columns();
// `fresh`: the state, the pivots and the targets' logits are not read but begun.
void score_tiles(const TileOperands& in, const Slab& slab, const ForwardState& state, float* parts, bool fresh,
                 Stream stream);
void exps_tiles_forward(const TileOperands& in, const Slab& slab, const ForwardState& state, const ExpsOutputs& out,
                        float* parts, bool fresh, Stream stream);
void exps_tiles_backward(const TileOperands& in, const Slab& slab, const ExpsInputs& out, Stream stream);
void segment_sum(DType dtype, const void* values, const int64_t* bounds, int64_t segments, void* sums, Stream stream);
// Doubles of scratch that pair_terms needs for each group of n.
int64_t pair_tiles(int64_t n);
void pair_terms(const Pairs& in, void* value, void* slope, double* scratch, Stream stream);
void win_rates(const Pairs& in, void* rates, Stream stream);

}  // namespace cuda
}  // namespace windkern
