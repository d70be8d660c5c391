// Python module windkern._cuda. It takes pointers, sizes, dtype codes, a device and a stream, without torch headers:
// one build serves every torch.
#include <pybind11/pybind11.h>

#include "launchers.h"

namespace py = pybind11;
using windkern::DType;
using windkern::Slab;
using windkern::TileOperands;
using Address = uintptr_t;  // 0 is null

namespace {

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The number of the device and the stream on which a kernel runs.
struct Queue {
  int device;
  Address stream;

  windkern::cuda::Stream enter() const {
    windkern::cuda::use_device(device);
    return pointer(stream);
  }
};

Slab make_slab(int operand, int64_t rows, int64_t width, int64_t start, Address logits, int64_t stride, Address bias,
               Address targets, double scale, double softcap, double temperature) {
  return {DType(operand),           rows,  width,   start,       pointer(logits), stride, pointer(bias),
          pointer<int64_t>(targets), scale, softcap, temperature, 0};
}

TileOperands make_operands(Address hidden, int64_t hidden_stride, Address head, int64_t head_stride, int64_t inner) {
  return {pointer(hidden), hidden_stride, pointer(head), head_stride, inner};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA row kernels of windkern";
  // module_local: windkern._cpp has the same C++ type.
  py::class_<Slab>(m, "Slab", py::module_local()).def(py::init(&make_slab));
  py::class_<Queue>(m, "Queue", py::module_local()).def(py::init([](int device, Address stream) {
    return Queue{device, stream};
  }));
  py::class_<TileOperands>(m, "TileOperands", py::module_local()).def(py::init(&make_operands));
  m.def("tiles_problem", &windkern::cuda::tiles_problem);
  m.def("tile_columns", &windkern::cuda::tile_columns);
  m.def("device_problem", &windkern::cuda::device_problem);
  m.def("pair_tiles", &windkern::cuda::pair_tiles);
  m.def("slab_forward", [](const Queue& queue, const Slab& slab, Address max, Address sum, Address target,
                           Address entropy, Address kept, int64_t stride, Address offset) {
    py::gil_scoped_release release;
    windkern::cuda::slab_forward(slab, {pointer(max), pointer(sum), pointer(target), pointer(entropy)},
                                 {pointer(kept), stride, pointer(offset)}, queue.enter());
  });
  m.def("slab_forward_unit", [](const Queue& queue, const Slab& slab, Address max, Address sum, Address target,
                                Address entropy, Address unit, int64_t unit_stride, Address unit_entropy,
                                int64_t entropy_stride, Address rescale, Address max_step) {
    py::gil_scoped_release release;
    windkern::cuda::slab_forward_unit(slab, {pointer(max), pointer(sum), pointer(target), pointer(entropy)},
                                      {pointer(unit), unit_stride, pointer(unit_entropy), entropy_stride,
                                       pointer(rescale), pointer(max_step)},
                                      queue.enter());
  });
  m.def("exps_forward", [](const Queue& queue, const Slab& slab, Address max, Address sum, Address target,
                           Address entropy, Address values, int64_t stride, Address pivot, int64_t earlier,
                           Address moved) {
    py::gil_scoped_release release;
    windkern::cuda::exps_forward(slab, {pointer(max), pointer(sum), pointer(target), pointer(entropy)},
                                 {pointer(values), stride, pointer(pivot), earlier, pointer(moved)}, queue.enter());
  });
  m.def("exps_backward", [](const Queue& queue, const Slab& slab, Address pivot, Address entry, Address values,
                            int64_t stride) {
    py::gil_scoped_release release;
    windkern::cuda::exps_backward(slab, {pointer(pivot), pointer(entry), pointer(values), stride}, queue.enter());
  });
  m.def("find_scored", [](const Queue& queue, Address targets, int64_t ignored, int64_t rows, Address positions,
                          Address count) {
    py::gil_scoped_release release;
    return windkern::cuda::find_scored(pointer<int64_t>(targets), ignored, rows, pointer<int64_t>(positions),
                                       pointer<int64_t>(count), queue.enter());
  });
  m.def("score_tiles", [](const Queue& queue, const TileOperands& in, const Slab& slab, Address max, Address sum,
                          Address target, Address entropy, Address parts, bool fresh) {
    py::gil_scoped_release release;
    windkern::cuda::score_tiles(in, slab, {pointer(max), pointer(sum), pointer(target), pointer(entropy)},
                                pointer<float>(parts), fresh, queue.enter());
  });
  m.def("exps_tiles_forward", [](const Queue& queue, const TileOperands& in, const Slab& slab, Address max, Address sum,
                                 Address target, Address entropy, Address values, int64_t stride, Address pivot,
                                 int64_t earlier, Address moved, Address parts, bool fresh) {
    py::gil_scoped_release release;
    windkern::cuda::exps_tiles_forward(in, slab, {pointer(max), pointer(sum), pointer(target), pointer(entropy)},
                                       {pointer(values), stride, pointer(pivot), earlier, pointer(moved)},
                                       pointer<float>(parts), fresh, queue.enter());
  });
  m.def("exps_tiles_backward", [](const Queue& queue, const TileOperands& in, const Slab& slab, Address pivot,
                                  Address entry, Address values, int64_t stride) {
    py::gil_scoped_release release;
    windkern::cuda::exps_tiles_backward(in, slab, {pointer(pivot), pointer(entry), pointer(values), stride},
                                        queue.enter());
  });
  m.def("column_sums", [](const Queue& queue, int dtype, int64_t rows, int64_t width, Address values, int64_t stride,
                          Address weights, Address sums, Address partial, int64_t row_tiles) {
    py::gil_scoped_release release;
    windkern::cuda::column_sums(
        {DType(dtype), rows, width, pointer(values), stride, pointer(weights), pointer(sums), 0}, pointer(partial),
        row_tiles, queue.enter());
  });
  m.def("rescale_rows", [](const Queue& queue, int dtype, Address sums, int64_t stride, Address factor, int64_t rows,
                           int64_t columns) {
    py::gil_scoped_release release;
    windkern::cuda::rescale_rows(DType(dtype), pointer(sums), stride, pointer(factor), rows, columns, queue.enter());
  });
  m.def("finish_rows", [](const Queue& queue, int dtype, int64_t rows, Address max, Address sum, Address target,
                          Address targets, Address log_sum, Address logps, Address lse, Address kept, int64_t stride,
                          int64_t columns, Address pivot, Address total, Address entry, bool moves) {
    py::gil_scoped_release release;
    windkern::cuda::finish_rows(
        {DType(dtype), rows, pointer(max), pointer(sum), pointer(target), pointer<int64_t>(targets), pointer(log_sum),
         pointer(logps), pointer(lse), pointer(kept), stride, columns, pointer(pivot), pointer(total), pointer(entry),
         moves},
        queue.enter());
  });
  m.def("row_factors", [](const Queue& queue, bool is_double, int64_t rows, int64_t columns, Address upstream,
                          Address total, Address targets, double slope, Address factor, int hidden_dtype,
                          Address hidden, int64_t hidden_stride, int scaled_dtype, Address scaled,
                          int64_t scaled_stride) {
    py::gil_scoped_release release;
    windkern::cuda::row_factors(
        {is_double, rows, columns, pointer(upstream), pointer(total), pointer<int64_t>(targets), slope,
         pointer(factor), DType(hidden_dtype), pointer(hidden), hidden_stride, DType(scaled_dtype), pointer(scaled),
         scaled_stride},
        queue.enter());
  });
  m.def("write_hidden_grad", [](const Queue& queue, bool is_double, int64_t rows, int64_t columns, Address total,
                                int64_t total_stride, Address factor, Address at_target, int rounded, int head_dtype,
                                Address head, int64_t head_stride, Address targets, Address places, int out_dtype,
                                Address out, int64_t out_stride) {
    py::gil_scoped_release release;
    windkern::cuda::write_hidden_grad(
        {is_double, rows, columns, pointer(total), total_stride, pointer(factor), pointer(at_target),
         DType(rounded), DType(head_dtype), pointer(head), head_stride, pointer<int64_t>(targets),
         pointer<int64_t>(places), DType(out_dtype), pointer(out), out_stride},
        queue.enter());
  });
  m.def("slab_backward",
        [](const Queue& queue, const Slab& slab, Address kept, int64_t kept_stride, Address offset, Address max,
           Address log_sum, Address target, Address entropy, Address c_logp, Address c_lse, Address c_ent,
           Address row_scale, Address dz, int64_t dz_stride, Address dbias, Address partial, int64_t row_tiles) {
          py::gil_scoped_release release;
          windkern::cuda::slab_backward(
              slab,
              {pointer(kept), kept_stride, pointer(offset), pointer(max), pointer(log_sum), pointer(target),
               pointer(entropy), pointer(c_logp), pointer(c_lse), pointer(c_ent), pointer(row_scale), pointer(dz),
               dz_stride, false, pointer(dbias)},
              pointer(partial), row_tiles, queue.enter());
        });
  m.def("segment_sum",
        [](const Queue& queue, int dtype, Address values, Address bounds, int64_t segments, Address sums) {
          py::gil_scoped_release release;
          windkern::cuda::segment_sum(DType(dtype), pointer(values), pointer<int64_t>(bounds), segments, pointer(sums),
                                      queue.enter());
        });
  m.def("pair_terms", [](const Queue& queue, int dtype, int64_t groups, int64_t n, Address scores, Address prefs,
                         Address rewards, Address where, int link, int loss, Address value, Address slope,
                         Address scratch) {
    py::gil_scoped_release release;
    windkern::cuda::pair_terms({DType(dtype), groups, n, pointer(scores), pointer(prefs), pointer(rewards),
                                pointer<bool>(where), link, loss, 0},
                               pointer(value), pointer(slope), pointer<double>(scratch), queue.enter());
  });
  m.def("win_rates", [](const Queue& queue, int dtype, int64_t groups, int64_t n, Address prefs, Address rewards,
                        Address where, int link, Address rates) {
    py::gil_scoped_release release;
    windkern::cuda::win_rates({DType(dtype), groups, n, nullptr, pointer(prefs), pointer(rewards),
                               pointer<bool>(where), link, 0, 0},
                              pointer(rates), queue.enter());
  });
}
