// Python module windkern._cpp. It takes pointers, sizes and dtype codes, without torch headers: one build serves every
// torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"
#include "cpu/openmp.h"

namespace py = pybind11;
using windkern::DType;
using windkern::KernelTable;
using Address = uintptr_t;  // 0 is null

namespace {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

const KernelTable& table_named(const std::string& name) {
  for (const KernelTable* table : windkern::runnable_kernels()) {
    if (name == table->name) return *table;
  }
  throw std::invalid_argument("this CPU or build has no kernels named " + name);
}

windkern::MultiplyBf16 product_named(const std::string& name) {
  for (const windkern::NamedProduct& product : windkern::runnable_products()) {
    if (name == product.name) return product.multiply;
  }
  throw std::invalid_argument("this CPU or build has no products named " + name);
}

windkern::ForwardState state_of(Address max, Address sum, Address target, Address entropy) {
  return {pointer<void>(max), pointer<void>(sum), pointer<void>(target), pointer<void>(entropy)};
}

struct Kernels {
  const KernelTable& table;

  explicit Kernels(const std::string& name) : table(table_named(name)) {}

  static windkern::Slab slab(int operand, int64_t rows, int64_t width, int64_t start, Address logits, int64_t stride,
                             Address bias, Address targets, double scale, double softcap, double temperature,
                             int threads) {
    return {DType(operand),      rows,  width,   start,       pointer<void>(logits), stride, pointer<void>(bias),
            pointer<int64_t>(targets), scale, softcap, temperature, threads};
  }
};

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  m.doc() = "CPU row kernels of windkern";
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const KernelTable* table : windkern::runnable_kernels()) names.push_back(table->name);
    return names;
  });
  py::class_<windkern::Slab>(m, "Slab").def(py::init(&Kernels::slab));
  py::class_<Kernels>(m, "Kernels")
      .def(py::init<const std::string&>())
      .def("slab_forward",
           [](const Kernels& k, const windkern::Slab& slab, Address max, Address sum, Address target, Address entropy,
              Address kept, int64_t stride, Address offset) {
             py::gil_scoped_release release;
             k.table.slab_forward(slab, state_of(max, sum, target, entropy),
                                  {pointer<void>(kept), stride, pointer<void>(offset)});
           })
      .def("slab_forward_unit",
           [](const Kernels& k, const windkern::Slab& slab, Address max, Address sum, Address target, Address entropy,
              Address unit, int64_t unit_stride, Address unit_entropy, int64_t entropy_stride, Address rescale,
              Address max_step) {
             py::gil_scoped_release release;
             k.table.slab_forward_unit(slab, state_of(max, sum, target, entropy),
                                       {pointer<void>(unit), unit_stride, pointer<void>(unit_entropy), entropy_stride,
                                        pointer<void>(rescale), pointer<void>(max_step)});
           })
      .def("exps_forward",
           [](const Kernels& k, const windkern::Slab& slab, Address max, Address sum, Address target, Address entropy,
              Address values, int64_t stride, Address pivot, int64_t earlier, Address moved) {
             py::gil_scoped_release release;
             k.table.exps_forward(slab, state_of(max, sum, target, entropy),
                                  {pointer<void>(values), stride, pointer<void>(pivot), earlier, pointer<void>(moved)});
           })
      .def("exps_backward",
           [](const Kernels& k, const windkern::Slab& slab, Address pivot, Address entry, Address values,
              int64_t stride) {
             py::gil_scoped_release release;
             k.table.exps_backward(slab, {pointer<void>(pivot), pointer<void>(entry), pointer<void>(values), stride});
           })
      .def("column_sums",
           [](const Kernels& k, int dtype, int64_t rows, int64_t width, Address values, int64_t stride, Address weights,
              Address sums, int threads) {
             py::gil_scoped_release release;
             k.table.column_sums({DType(dtype), rows, width, pointer<void>(values), stride, pointer<void>(weights),
                                  pointer<void>(sums), threads});
           })
      .def("slab_backward",
           [](const Kernels& k, const windkern::Slab& slab, Address kept, int64_t kept_stride, Address offset,
              Address max, Address log_sum, Address target, Address entropy, Address c_logp, Address c_lse,
              Address c_ent, Address row_scale, Address dz, int64_t dz_stride, bool dz_is_wide, Address dbias) {
             py::gil_scoped_release release;
             k.table.slab_backward(slab, {pointer<void>(kept), kept_stride, pointer<void>(offset), pointer<void>(max),
                                          pointer<void>(log_sum), pointer<void>(target), pointer<void>(entropy),
                                          pointer<void>(c_logp), pointer<void>(c_lse), pointer<void>(c_ent),
                                          pointer<void>(row_scale), pointer<void>(dz), dz_stride, dz_is_wide,
                                          pointer<void>(dbias)});
           })
      .def("segment_sum",
           [](const Kernels& k, int dtype, Address values, Address bounds, int64_t segments, Address sums, int threads) {
             py::gil_scoped_release release;
             k.table.segment_sum(DType(dtype), pointer<void>(values), pointer<int64_t>(bounds), segments,
                                 pointer<void>(sums), threads);
           })
      .def("pair_terms",
           [](const Kernels& k, int dtype, int64_t groups, int64_t n, Address scores, Address prefs, Address rewards,
              Address where, int link, int loss, Address value, Address slope, int threads) {
             py::gil_scoped_release release;
             k.table.pair_terms({DType(dtype), groups, n, pointer<void>(scores), pointer<void>(prefs),
                                 pointer<void>(rewards), pointer<bool>(where), link, loss, threads},
                                pointer<void>(value), pointer<void>(slope));
           })
      .def("win_rates",
           [](const Kernels& k, int dtype, int64_t groups, int64_t n, Address prefs, Address rewards, Address where,
              int link, Address rates, int threads) {
             py::gil_scoped_release release;
             k.table.win_rates({DType(dtype), groups, n, nullptr, pointer<void>(prefs), pointer<void>(rewards),
                                pointer<bool>(where), link, 0, threads},
                               pointer<void>(rates));
           });
  m.def("openmp_team_is_exact", &windkern::openmp_team_is_exact);
  m.def("set_num_threads", &windkern::set_num_threads);
  m.def("bf16_products", [] {
    std::vector<std::string> names;
    for (const windkern::NamedProduct& product : windkern::runnable_products()) names.push_back(product.name);
    return names;
  });
  m.def("multiply_bf16",
        [](const std::string& name, int64_t rows, int64_t columns, int64_t inner, Address a, int64_t a_stride,
           bool a_transposed, Address b, int64_t b_stride, bool b_transposed, Address c, int64_t c_stride,
           bool c_is_float, bool accumulate, Address packed, int threads) {
          py::gil_scoped_release release;
          product_named(name)({rows, columns, inner, pointer<uint16_t>(a), a_stride, a_transposed, pointer<uint16_t>(b),
                               b_stride, b_transposed, pointer<void>(c), c_stride, c_is_float, accumulate,
                               pointer<uint32_t>(packed), threads});
        });
}
