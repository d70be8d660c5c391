// Arguments of the row kernels of all native back ends: see windkern/kernels/contract.py.
#pragma once

#include <cstdint>

namespace windkern {

enum class DType : int { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };

// Matrices are rows x width, row-major; a stride is the number of elements from one row to the next. Statistics and
// logits are float32 (float64 for float64 operands).
struct Slab {
  DType operand;  // dtype of kept values, dz, units and exponentials
  int64_t rows, width;
  int64_t start;           // first vocabulary column
  void* logits;            // (rows, width), overwritten
  int64_t stride;          // of logits
  const void* bias;        // (width,) or null
  const int64_t* targets;  // (rows,), negative if ignored
  double scale, softcap, temperature;  // softcap 0: none
  int threads;                         // of a CPU
};

// Operands of a kernel that multiplies: of 16-bit numbers, rows a multiple of 16 bytes apart.
struct TileOperands {
  const void* hidden;  // (Slab::rows, inner)
  int64_t hidden_stride;
  const void* head;  // (Slab::width, inner)
  int64_t head_stride;
  int64_t inner;
};

struct ForwardState {
  void *max, *sum, *target, *entropy;  // (rows,); entropy may be null
};

struct ForwardOutputs {
  void* kept;    // (rows, width) operand dtype, or null: exp(y - offset) * slope of the transform over that at zero
  int64_t stride;
  void* offset;  // (rows,)
};

// Exponentials that are operands of backward's products: see `Exps` in contract.py.
struct ExpsOutputs {
  void* values;  // (rows, width) operand dtype; may be Slab::logits
  int64_t stride;
  void* pivot;      // (rows,)
  int64_t earlier;  // columns before `values` in the same rows
  void* moved;      // (rows,) or null
};

// The pivot of a row moves to a slab's maximum that exceeds it by more than this.
constexpr int kPivotRoom = 40;

// The same at the end of forward.
constexpr int kSettledRoom = 20;

struct ExpsInputs {
  const void *pivot, *entry;  // (rows,)
  void* values;               // (rows, width) operand dtype, out; may be Slab::logits
  int64_t stride;
};

struct ColumnSums {
  DType dtype;  // of values
  int64_t rows, width;
  const void* values;
  int64_t stride;
  const void* weights;  // (rows,)
  void* sums;           // (width,)
  int threads;          // of a CPU
};

// The end of forward: see `finish_rows` in contract.py.
struct Finish {
  DType dtype;  // of kept; that of the statistics where nothing is kept
  int64_t rows;
  const void *max, *sum, *target;  // (rows,)
  const int64_t* targets;          // (rows,)
  void *log_sum, *logps, *lse;     // (rows,), out
  void* kept;                      // (rows, columns)
  int64_t stride, columns;
  void* pivot;          // (rows,), in and out; null: nothing is settled
  void *total, *entry;  // (rows,), out
  bool moves;
};

// See `row_factors` in contract.py. Statistics are float64 or float32; hidden and scaled can have any dtype.
struct RowFactors {
  bool is_double;
  int64_t rows, columns;         // columns 0: only factors are wanted
  const void *upstream, *total;  // (rows,)
  const int64_t* targets;        // (rows,)
  double slope;
  void* factor;        // (rows,), out
  DType hidden_dtype;
  const void* hidden;  // (rows, columns)
  int64_t hidden_stride;
  DType scaled_dtype;
  void* scaled;  // (rows, columns), out
  int64_t scaled_stride;
};

// See `HiddenGrad` and `write_hidden_grad` in contract.py. Sums are float64 or float32; head and out can have any
// dtype.
struct HiddenGrad {
  bool is_double;
  int64_t rows, columns;
  const void* total;  // (rows, columns)
  int64_t total_stride;
  const void *factor, *at_target;  // (rows,) or null; at_target with head
  DType rounded;                   // to which a number of head is rounded first
  DType head_dtype;
  const void* head;                // (entries, columns) or null
  int64_t head_stride;
  const int64_t *targets, *places;  // (rows,); places: rows of out, or null
  DType out_dtype;
  void* out;  // (any, columns); may be total
  int64_t out_stride;
};

struct UnitOutputs {
  void* unit;  // (rows, width) operand dtype; may be Slab::logits
  int64_t unit_stride;
  void* unit_entropy;  // the same, or null
  int64_t entropy_stride;
  void* rescale;       // (rows,)
  void* max_step;      // (rows,) or null
};

struct BackwardInputs {
  const void* kept;  // (rows, width) operand dtype, without c_ent; or null: then Slab::logits holds the logits
  int64_t kept_stride;
  const void* offset;  // (rows,)
  const void *max, *log_sum, *target, *entropy;  // (rows,)
  const void *c_logp, *c_lse, *c_ent;            // (rows,) or null
  const void* row_scale;                         // (rows,) or null
  void* dz;                                      // (rows, width) operand dtype; may be Slab::logits
  int64_t dz_stride;
  bool dz_is_wide;  // of a CPU: dz has the dtype of the logits
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
