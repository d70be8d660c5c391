// Watches the shared memory of emulated kernels: which thread reads and writes which byte between which barriers.
//
// g++ -fsanitize=thread,alignment calls a function for every load and store, and where an address is less aligned than its
// type wants; those functions are in shared_memory.cpp, which stands in for the sanitizers' runtimes. Kernels stay as they
// are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_emulator {

// What the emulator says of the thread that runs, and the first fault found; plain data, for it is read at every access.
struct Watch {
  const char* first = nullptr;  // shared memory of this module
  size_t size = 0;
  uint64_t block = 0;  // counted over all launches
  unsigned thread = 0;
  unsigned barriers = 0, warp_barriers = 0;  // that the thread has passed in its block
  char fault[256] = "";
};

#if defined(__SANITIZE_THREAD__) || defined(WK_WATCHER)
extern Watch watch;

// The thread-local storage of the module `code` is in: what __shared__ variables are in the emulator.
void find_shared_memory(const void* code);

// A new block finds no value of the last one.
void begin_block();
#endif

}  // namespace cuda_emulator
