// Runs CUDA kernels on a CPU: each thread of a block is a fibre, blocks run one after the other. Barriers and warp
// operations are strict: all threads of the block (of the warp) must meet at the same line, else the launch throws.
//
// CUDA_EMULATOR_ORDER=reverse runs the threads of a block from the last to the first, random:SEED in an order that changes
// from barrier to barrier: what depends on the order then shows as a different result.
//
// CUDA_EMULATOR_SKIP=team.h:53 leaves out the __syncthreads() of that line: tests plant faults so.
//
// Compiled with -fsanitize=thread,alignment and linked with shared_memory.cpp, a launch throws where two threads race for
// shared memory whatever the order, where a thread reads shared memory that its block has not written, and where an
// address is not aligned as its type wants.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "shared_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
// tests/cuda_tools.py puts the bound into the kernel's body, as a call of check_bound.
#define __launch_bounds__(...)
// Reason: thread-local storage is one piece of memory in each module, whose place can be found; there is one thread.
// AddressSanitizer guards what is static and not thread-local.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;

enum class State { ready, at_block, at_warp, done };

// Reason: swapcontext saves signal masks, two system calls a switch; it only starts a fibre, the rest are jumps.
struct Fibre {
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false;
  dim3 thread;
  State state;
  int line;               // where it waits
  unsigned barriers, warp_barriers;  // that it has passed in its block
  unsigned char sent[8];  // what it gives to the other lanes of its warp
  void* sanitizer = nullptr;
};

struct Machine {
  std::vector<std::unique_ptr<Fibre>> fibres;
  jmp_buf scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  Fibre* running = nullptr;
  unsigned index = 0, threads = 0;
  std::function<void()> body;
  std::exception_ptr error;
  uint32_t random = 0;  // state of the order, 0: none
  std::string skipped;  // file:line of a barrier
};

inline Machine machine;

// AddressSanitizer is told of every change of stack.
inline void leaving([[maybe_unused]] void** save, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, size);
#endif
}

inline void arrived([[maybe_unused]] void* saved, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, stack, size);
#endif
}

// Back to the scheduler; returns when the fibre is resumed.
inline void wait(State state, int line) {
  Fibre* const self = machine.running;
  self->state = state;
  self->line = line;
  leaving(&self->sanitizer, machine.scheduler_stack, machine.scheduler_size);
  if (_setjmp(self->place) == 0) _longjmp(machine.scheduler, 1);
  arrived(self->sanitizer, &machine.scheduler_stack, &machine.scheduler_size);
}

// Tells the watcher of shared memory who runs.
inline void show_thread() {
#if defined(__SANITIZE_THREAD__)
  watch.thread = machine.index;
  watch.barriers = machine.running->barriers;
  watch.warp_barriers = machine.running->warp_barriers;
#endif
}

inline void wait_for_block(const char* path, int line) {
  if (!machine.skipped.empty()) {
    const std::string file = path;
    if (file.substr(file.rfind('/') + 1) + ":" + std::to_string(line) == machine.skipped) return;
  }
  wait(State::at_block, line);
  ++machine.running->barriers;
  show_thread();
}

inline void wait_for_warp(int line) {
  wait(State::at_warp, line);
  ++machine.running->warp_barriers;
  show_thread();
}

// A fibre serves one thread of block after block.
inline void fibre_main() {
  arrived(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
  for (;;) {
    try {
      machine.body();
    } catch (...) {
      machine.error = std::current_exception();
    }
    wait(State::done, 0);
  }
}

inline void resume(unsigned index) {
  Fibre* const fibre = machine.fibres[index].get();
  machine.running = fibre;
  machine.index = index;
  threadIdx = fibre->thread;
  show_thread();
  void* saved = nullptr;
  leaving(&saved, fibre->stack.get(), kStack);
  if (_setjmp(machine.scheduler) == 0) {
    if (fibre->started) _longjmp(fibre->place, 1);
    fibre->started = true;
    getcontext(&fibre->context);
    fibre->context.uc_stack.ss_sp = fibre->stack.get();
    fibre->context.uc_stack.ss_size = kStack;
    fibre->context.uc_link = nullptr;
    makecontext(&fibre->context, fibre_main, 0);
    setcontext(&fibre->context);
  }
  arrived(saved, nullptr, nullptr);
}

[[noreturn]] inline void diverged(const std::string& what, int line, int other) {
  throw std::logic_error("CUDA emulator, block " + std::to_string(blockIdx.x) + ": " + what + " (line " +
                         std::to_string(line) + " and line " + std::to_string(other) + ")");
}

// Sets the fibres first .. last free if all of them wait in `state`; false if some still run.
inline bool release(unsigned first, unsigned last, State state, const char* what) {
  for (unsigned i = first; i < last; ++i) {
    if (machine.fibres[i]->state != state) return false;
  }
  for (unsigned i = first; i < last; ++i) {
    Fibre& fibre = *machine.fibres[i];
    if (fibre.line != machine.fibres[first]->line) diverged(what, machine.fibres[first]->line, fibre.line);
  }
  for (unsigned i = first; i < last; ++i) machine.fibres[i]->state = State::ready;
  return true;
}

// The places 0 .. count - 1 (at most 32) in the order of this launch.
class Order {
 public:
  Order(unsigned count, bool reverse) {
    for (unsigned k = 0; k < count; ++k) places_[k] = static_cast<unsigned char>(reverse ? count - 1 - k : k);
    for (unsigned k = count; machine.random != 0 && k > 1; --k) {
      machine.random ^= machine.random << 13, machine.random ^= machine.random >> 17, machine.random ^= machine.random << 5;
      std::swap(places_[k - 1], places_[machine.random % k]);
    }
  }
  unsigned operator[](unsigned place) const { return places_[place]; }

 private:
  unsigned char places_[kWarp];
};

// What the watcher of shared memory found ends the launch.
inline void check_watch() {
#if defined(__SANITIZE_THREAD__)
  if (watch.fault[0] == 0) return;
  const std::string fault = watch.fault;
  watch.fault[0] = 0;
  throw std::logic_error("CUDA emulator, block " + std::to_string(blockIdx.x) + ": " + fault);
#endif
}

inline void run_block(bool reverse) {
#if defined(__SANITIZE_THREAD__)
  begin_block();
#endif
  const unsigned threads = machine.threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = *machine.fibres[i];
    fibre.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fibre.state = State::ready;
    fibre.barriers = fibre.warp_barriers = 0;
  }
  for (;;) {
    bool moved = false;
    // Warp by warp, as far as each gets without the others.
    const Order warps(threads / kWarp, reverse);
    for (unsigned w = 0; w < threads / kWarp; ++w) {
      const unsigned first = warps[w] * kWarp;
      do {
        const Order lanes(kWarp, reverse);
        for (unsigned k = 0; k < kWarp; ++k) {
          const unsigned i = first + lanes[k];
          if (machine.fibres[i]->state != State::ready) continue;
          resume(i);
          if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
          check_watch();
          moved = true;
        }
      } while (release(first, first + kWarp, State::at_warp, "lanes of a warp wait at different warp operations"));
    }
    if (release(0, threads, State::at_block, "threads wait at different barriers")) moved = true;
    if (moved) continue;
    int done = 0;
    const Fibre* waits = nullptr;
    for (unsigned i = 0; i < threads; ++i) {
      const Fibre& fibre = *machine.fibres[i];
      if (fibre.state == State::done) {
        ++done;
      } else if (waits == nullptr) {
        waits = &fibre;
      } else if (fibre.line != waits->line) {
        diverged("threads wait at different places", waits->line, fibre.line);
      }
    }
    if (waits == nullptr) return;
    diverged(std::to_string(done) + " threads ended while others wait", waits->line, waits->line);
  }
}

inline void run(dim3 grid, dim3 block, std::function<void()> body) {
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0) {
    throw std::logic_error("CUDA emulator: a block of " + std::to_string(threads) + " threads");
  }
  while (machine.fibres.size() < threads) machine.fibres.emplace_back(new Fibre);
  const char* order = std::getenv("CUDA_EMULATOR_ORDER");
  const bool shuffled = order != nullptr && std::strncmp(order, "random:", 7) == 0;
  machine.random = shuffled ? uint32_t(std::strtoul(order + 7, nullptr, 10)) * 2654435761u + 1 : 0;
  const char* skip = std::getenv("CUDA_EMULATOR_SKIP");
  machine.skipped = skip == nullptr ? "" : skip;
#if defined(__SANITIZE_THREAD__)
  find_shared_memory(reinterpret_cast<const void*>(&run_block));
#endif
  machine.threads = threads;
  machine.body = std::move(body);
  blockDim = block;
  gridDim = grid;
  try {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, 0, 0);
      run_block(order != nullptr && std::strcmp(order, "reverse") == 0);
    }
  } catch (...) {
    machine.fibres.clear();  // they stand in the middle of a block
    throw;
  }
}

// A block may have as many threads as the kernel's __launch_bounds__ say.
inline void check_bound(unsigned most) {
  const unsigned threads = machine.threads;
  if (threads > most) {
    throw std::logic_error("CUDA emulator: a block of " + std::to_string(threads) + " threads, the kernel's bound is " +
                           std::to_string(most));
  }
}

template <class Kernel>
struct Launch {
  Kernel kernel;
  dim3 grid, block;

  template <class... Args>
  void operator()(Args... args) const {
    run(grid, block, [&] { kernel(args...); });
  }
};

template <class Kernel>
Launch<Kernel> launch_of(Kernel kernel, dim3 grid, dim3 block) {
  return {kernel, grid, block};
}

// Value of another lane; all 32 take part.
template <class T>
T shuffle(unsigned mask, T value, unsigned from, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  if (mask != 0xffffffffu) throw std::logic_error("CUDA emulator: only full warps shuffle");
  const unsigned first = machine.index / kWarp * kWarp;
  std::memcpy(machine.running->sent, &value, sizeof(T));
  wait(State::at_warp, line);
  T received;
  std::memcpy(&received, machine.fibres[first + from % kWarp]->sent, sizeof(T));
  wait(State::at_warp, line);  // until all have read
  return received;
}

}  // namespace cuda_emulator

#define WK_LAUNCH(kernel, grid, block, stream) ((void)(stream), ::cuda_emulator::launch_of(kernel, grid, block))
#define __syncthreads() ::cuda_emulator::wait_for_block(__FILE__, __LINE__)
#define __syncwarp() ::cuda_emulator::wait_for_warp(__LINE__)
#define __shfl_xor_sync(mask, value, apart) \
  ::cuda_emulator::shuffle(mask, value, (::cuda_emulator::machine.index % 32) ^ unsigned(apart), __LINE__)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorNoDevice = 100 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  return cudaErrorNoDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 0;
  return cudaSuccess;
}
