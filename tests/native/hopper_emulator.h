// The functions of csrc/cuda/hopper.h for the emulator, with clusters of one block.
//
// Copies happen at once, products not before they are waited for: a stage that is left too early, or sums that are read too
// early, give wrong results. A thread that waits for a barrier lets the others run.
#pragma once

#include <deque>

#define __grid_constant__

namespace windkern {
namespace cuda {
namespace hopper {

constexpr bool kClusters = false;

struct TileMap {
  const uint16_t* matrix;
  int64_t rows, columns, stride;
  int box_rows;
};

inline uintptr_t shared_address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

constexpr size_t kSharedBytes = 227 << 10;

inline unsigned char* dynamic_shared() {
  alignas(1024) static unsigned char bytes[kSharedBytes];
  return bytes;
}

struct Barrier {
  int expected, missing, bytes, parity;

  void init(int arrivals) { expected = missing = arrivals, bytes = parity = 0; }
  void arrive() {
    if (missing <= 0) throw std::logic_error("CUDA emulator: an arrival too many at a barrier");
    --missing;
    end_phase();
  }
  void expect(int more) {
    bytes += more;
    arrive();
  }
  void arrive_at(int) { throw std::logic_error("CUDA emulator: a cluster has one block"); }
  void copied(int count) {
    bytes -= count;
    end_phase();
  }
  void wait(int of) {
    for (int turns = 0; parity == of; ++turns) {
      if (turns > 1000) throw std::logic_error("CUDA emulator: a thread waits for a barrier for ever");
      cuda_emulator::wait(cuda_emulator::State::ready, __LINE__);
    }
  }

 private:
  void end_phase() {
    if (missing == 0 && bytes == 0) parity ^= 1, missing = expected;
  }
};

inline void publish_barriers() {}
inline int block_in_cluster() { return 0; }
inline void meet_cluster() {}
inline void prefetch_map(const TileMap&) {}

// The place of number `column` of `row` in an operand with rows of 64 numbers.
inline size_t swizzled(int row, int column) { return size_t(row) * 64 + ((column / 8) ^ (row % 8)) * 8 + column % 8; }

inline void copy_box(void* to, const TileMap& map, int row, int column, Barrier& barrier) {
  if (shared_address(to) % 1024 != 0) throw std::logic_error("CUDA emulator: a box must be copied to a multiple of 1024 bytes");
  uint16_t* const box = static_cast<uint16_t*>(to);
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const bool inside = row + r < map.rows && column + c < map.columns;
      box[swizzled(r, c)] = inside ? map.matrix[(row + r) * map.stride + column + c] : uint16_t(0);
    }
  }
  barrier.copied(map.box_rows * 128);
}
inline void copy_box_to(uint16_t, void*, const TileMap&, int, int, Barrier&) {
  throw std::logic_error("CUDA emulator: a cluster has one block");
}

inline uint64_t describe(const void* operand) { return shared_address(operand); }
inline uint64_t along(uint64_t word, int bytes) { return word + uint64_t(bytes); }

// Products of one thread that nobody has waited for, in groups.
struct Product {
  float* acc;
  uint64_t a, b;
  bool add, brain;
};
inline std::deque<std::vector<Product>> running[1024];

// 16 numbers of one row of an operand.
__attribute__((no_sanitize("thread"))) inline void read_row(uint64_t word, int row, bool brain, float (&to)[16]) {
  const uint16_t* const at = reinterpret_cast<const uint16_t*>(word & ~uint64_t(1023));
  const int first = int(word % 1024) / 2;
  for (int k = 0; k < 16; ++k) {
    const uint16_t bits = at[swizzled(row, first + k)];
    to[k] = brain ? bfloat16_value(bits) : half_value(bits);
  }
}

// Nobody watches its accesses, which take most of the time and are none of shared variables.
__attribute__((no_sanitize("thread"))) inline void run_product(const Product& p) {
  const unsigned lane = cuda_emulator::machine.index % 32, warp = cuda_emulator::machine.index / 32 % 4;
  float left[2][16], right[16];
  for (int h = 0; h < 2; ++h) read_row(p.a, int(16 * warp + lane / 4) + 8 * h, p.brain, left[h]);
  for (int j = 0; j < 32; ++j) {
    for (int i = 0; i < 2; ++i) {
      read_row(p.b, 8 * j + 2 * int(lane % 4) + i, p.brain, right);
      for (int h = 0; h < 2; ++h) {
        float& sum = p.acc[4 * j + 2 * h + i];
        float total = p.add ? sum : 0.0f;
        for (int k = 0; k < 16; ++k) total += left[h][k] * right[k];
        sum = total;
      }
    }
  }
}

inline void begin_products() { running[cuda_emulator::machine.index].emplace_back(); }
inline void commit_products() {}
template <int most>
void wait_products() {
  auto& groups = running[cuda_emulator::machine.index];
  while (groups.size() > most) {
    for (const Product& product : groups.front()) run_product(product);
    groups.pop_front();
  }
}
inline void fence_sums(float (&)[128]) {}

template <class E>
void multiply(float (&acc)[128], uint64_t a, uint64_t b, bool add) {
  running[cuda_emulator::machine.index].back().push_back({acc, a, b, add, SameType<E, BFloat16>::value});
}

template <int>
void shrink_registers() {}
template <int>
void grow_registers() {}

inline TileMap map_of(const void* matrix, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  if (shared_address(matrix) % 16 != 0 || stride % 8 != 0) {
    throw std::logic_error("CUDA emulator: rows of a map must be multiples of 16 bytes apart");
  }
  return {static_cast<const uint16_t*>(matrix), rows, columns, stride, box_rows};
}

// Few, so that blocks have several tiles.
inline int multiprocessors() { return 3; }

template <class... Args>
void launch_clusters(const char*, void (*kernel)(Args...), int blocks, int threads, int cluster, int bytes, Stream,
                     typename Same<Args>::type... args) {
  if (cluster != 1) throw std::logic_error("CUDA emulator: a cluster has one block");
  if (bytes > int(kSharedBytes)) throw std::logic_error("CUDA emulator: a block has 227 KiB of shared memory");
  std::memset(dynamic_shared(), 0xff, kSharedBytes);
  for (auto& groups : running) groups.clear();
  cuda_emulator::launch_of(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)))(args...);
}

}  // namespace hopper
}  // namespace cuda
}  // namespace windkern
