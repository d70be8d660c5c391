// What the row kernels of every native back end take: see windkern/kernels/contract.py.
#pragma once

#include <cstdint>

namespace windkern {

enum class DType : int { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

// Shapes: rows x width, row-major and contiguous. Statistics and logits are float32 (float64 for float64 operands).
struct Slab {
  DType operand;  // of kept, dz and unit
  int64_t rows, width;
  int64_t start;           // first vocabulary column
  void* logits;            // (rows, width), overwritten
  const void* bias;        // (width,) or null
  const int64_t* targets;  // (rows,), negative where ignored
  double scale, softcap, temperature;  // softcap 0: none
  int threads;                         // of a CPU
};

struct ForwardState {
  void *max, *sum, *target, *entropy;  // (rows,); entropy may be null
};

struct ForwardOutputs {
  void* kept;    // (rows, width) operand dtype, or null: exp(y - offset) * slope of the transform over that at zero
  void* offset;  // (rows,)
};

struct UnitOutputs {
  void* unit;          // (rows, width) operand dtype; may be Slab::logits
  void* unit_entropy;  // the same, or null
  void* rescale;       // (rows,)
  void* max_step;      // (rows,) or null
};

struct BackwardInputs {
  const void* kept;    // (rows, width) operand dtype, without c_ent; or null: then Slab::logits holds the logits
  const void* offset;  // (rows,)
  const void *max, *log_sum, *target, *entropy;  // (rows,)
  const void *c_logp, *c_lse, *c_ent;            // (rows,) or null
  const void* row_scale;                         // (rows,) or null
  void* dz;                                      // (rows, width) operand dtype; may be Slab::logits
  void* dbias;                                   // (width,) or null, out
};

// All ordered pairs i != j of each group; prefs (groups, n, n) or rewards (groups, n).
struct Pairs {
  DType dtype;  // float32 or float64
  int64_t groups, n;
  const void *scores, *prefs, *rewards;
  const bool* where;  // (groups, n) or null
  int link, loss;
  int threads;  // of a CPU
};

}  // namespace windkern
