// The kernels over odd shapes under AddressSanitizer and UndefinedBehaviorSanitizer: every array is exactly as
// large as the contract says, so one element too far is an error. Prints "clean" at the end.
// Arguments: widths of slabs, the word pairs, sizes of groups; without any, those for a CPU.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/dispatch.h"

using namespace windkern;

static double noise(unsigned& state) {
  state = state * 1664525u + 1013904223u;
  return double(state >> 8) / double(1u << 24) - 0.5;
}

template <class S>
static std::vector<S> values(size_t count, unsigned seed) {
  std::vector<S> v(count);
  for (auto& x : v) x = S(4 * noise(seed));
  return v;
}

template <class S>
static void rows(const KernelTable& k, DType operand, size_t item, int64_t M, int64_t W, bool bias, double softcap,
                 bool entropy) {
  auto z = values<S>(M * W, 1), b = values<S>(W, 2);
  if (W > 1) b[1] = S(-INFINITY);
  std::vector<int64_t> targets(M);
  for (int64_t i = 0; i < M; ++i) targets[i] = i % 3 == 2 ? -1 : 7 + (i * 5) % W;
  const auto logits = z;
  Slab slab{operand, M, W, 7, z.data(), bias ? b.data() : nullptr, targets.data(), 1.3, softcap, 0.7, 2};
  std::vector<S> max(M, S(-INFINITY)), sum(M), target(M, S(-INFINITY)), ent(M), offset(M), rescale(M), step(M), log_sum(M);
  std::vector<char> kept(M * W * item), unit(M * W * item), logged(M * W * item), dz(M * W * item);
  ForwardState state{max.data(), sum.data(), target.data(), entropy ? ent.data() : nullptr};
  k.slab_forward(slab, state, {kept.data(), offset.data()});
  for (int64_t i = 0; i < M; ++i) log_sum[i] = std::log(sum[i]);
  auto c = values<S>(M, 3);
  std::vector<S> dbias(W), scale(M, S(2));
  for (bool from_kept : {true, false}) {
    z = logits;
    BackwardInputs in{from_kept ? kept.data() : nullptr, offset.data(), max.data(), log_sum.data(), target.data(),
                      ent.data(), c.data(), c.data(), entropy ? c.data() : nullptr, scale.data(), dz.data(), dbias.data()};
    k.slab_backward(slab, in);
    if (!from_kept && item == sizeof(S)) {
      z = logits;
      in.dz = z.data();  // in place
      in.dbias = nullptr;
      k.slab_backward(slab, in);
    }
  }
  z = logits;
  k.slab_forward_unit(slab, state, {unit.data(), entropy ? logged.data() : nullptr, rescale.data(), entropy ? step.data() : nullptr});
}

template <class S>
static void pairs(const KernelTable& k, DType dtype, int64_t groups, int64_t n) {
  auto scores = values<S>(groups * n, 4), rewards = values<S>(groups * n, 5), prefs = values<S>(groups * n * n, 6);
  std::unique_ptr<bool[]> where(new bool[groups * n]);
  for (int64_t i = 0; i < groups * n; ++i) where[i] = i % 3 != 0;
  std::vector<S> value(groups), slope(groups * n), rates(groups * n);
  for (int link : {0, 1}) {
    for (int loss : {0, 1, 2}) {
      for (bool masked : {false, true}) {
        Pairs in{dtype, groups, n, scores.data(), nullptr, rewards.data(), masked ? where.get() : nullptr, link, loss, 2};
        k.pair_terms(in, value.data(), slope.data());
        k.win_rates(in, rates.data());
        in.prefs = prefs.data();
        in.rewards = nullptr;
        k.pair_terms(in, value.data(), slope.data());
        k.win_rates(in, rates.data());
      }
    }
  }
}

// All layouts and outputs of one bfloat16 product of ones; false where a sum is wrong.
static bool product(MultiplyBf16 multiply, int64_t rows, int64_t columns, int64_t inner) {
  const std::vector<uint16_t> a(rows * inner, 0x3f80), b(inner * columns, 0x3f80);
  std::unique_ptr<uint32_t, decltype(&std::free)> packed(
      (uint32_t*)std::aligned_alloc(64, (packed_size(columns, inner) * 4 + 64) / 64 * 64), &std::free);
  for (int layout = 0; layout < 4; ++layout) {
    const bool at = layout & 1, bt = layout & 2;
    for (bool is_float : {true, false}) {
      std::vector<float> wide(is_float ? rows * columns : 0, 1.0f);
      std::vector<uint16_t> narrow(is_float ? 0 : rows * columns);
      void* c = is_float ? (void*)wide.data() : narrow.data();
      multiply({rows, columns, inner, a.data(), at ? rows : inner, at, b.data(), bt ? inner : columns, bt, c, columns,
                is_float, is_float, packed.get(), 2});
      for (float value : wide) {
        if (value != float(inner + 1)) return false;
      }
    }
  }
  return true;
}

int main(int count, char** arguments) {
  for (const NamedProduct& each : runnable_products()) {
    for (int64_t rows : {1, 5, 49}) {
      for (int64_t columns : {1, 63, 130}) {
        for (int64_t inner : {1, 2, 31, 67, 600}) {
          if (!product(each.multiply, rows, columns, inner)) return 1;
        }
      }
    }
  }
  std::vector<int64_t> widths, sizes;
  bool pairs_now = false;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "pairs") == 0) {
      pairs_now = true;
    } else {
      (pairs_now ? sizes : widths).push_back(std::atoll(arguments[i]));
    }
  }
  if (count == 1) {
    widths = {1, 3, 15, 16, 17, 33, 130};
    sizes = {1, 2, 17, 40};
  }
  for (const KernelTable* k : runnable_kernels()) {
    for (int64_t W : widths) {
      for (bool bias : {false, true}) {
        for (double softcap : {0.0, 3.0}) {
          for (bool entropy : {false, true}) {
            rows<double>(*k, DType::float64, 8, 5, W, bias, softcap, entropy);
            rows<float>(*k, DType::float32, 4, 5, W, bias, softcap, entropy);
            rows<float>(*k, DType::bfloat16, 2, 5, W, bias, softcap, entropy);
            rows<float>(*k, DType::float16, 2, 5, W, bias, softcap, entropy);
          }
        }
      }
    }
    rows<float>(*k, DType::float32, 4, 0, 16, true, 0.0, true);
    for (int64_t n : sizes) {
      pairs<double>(*k, DType::float64, 3, n);
      pairs<float>(*k, DType::float32, 3, n);
    }
    const std::vector<int64_t> bounds{0, 0, 3, 19};
    auto v = values<float>(19, 7);
    std::vector<float> sums(3);
    k->segment_sum(DType::float32, v.data(), bounds.data(), 3, sums.data(), 2);
  }
  std::puts("clean");
}
