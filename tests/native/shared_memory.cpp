// Compiled without sanitizers: what they call on behalf of the kernels. Nothing of the C++ library is used, whose inline
// functions might be the instrumented ones.
#define WK_WATCHER
#include "shared_memory.h"

#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cuda_emulator {

Watch watch;

namespace {

constexpr unsigned kWarp = 32;

// One byte between two barriers of the block.
struct Cell {
  uint64_t block;     // that wrote it last
  uint64_t stamp;     // block and barriers that the rest is about
  int writer;         // thread, or -1
  unsigned writer_warp_barriers;
  uint32_t warps;     // that read it
  struct {
    uint32_t lanes;
    unsigned barriers;  // of the warp, passed by those lanes
  } readers[kWarp];
};

Cell* cells = nullptr;
size_t num_cells = 0, lowest = 0, highest = 0;  // bytes the block wrote

void report(const char* what, size_t place, int other) {
  if (watch.fault[0] != 0) return;
  char beside[32] = "";
  if (other >= 0) std::snprintf(beside, sizeof(beside), " and thread %d", other);
  std::snprintf(watch.fault, sizeof(watch.fault), "%s (byte %zu of shared memory, thread %u%s, after %u barriers)", what,
                place, watch.thread, beside, watch.barriers);
}

// Whether an access of another thread since the last barrier may come before or after one of this thread.
bool unordered(int other, unsigned warp_barriers) {
  if (other < 0 || unsigned(other) == watch.thread) return false;
  return unsigned(other) / kWarp != watch.thread / kWarp || warp_barriers == watch.warp_barriers;
}

int unordered_reader(const Cell& cell) {
  const unsigned own = watch.thread / kWarp;
  for (unsigned warp = 0; warp < kWarp; ++warp) {
    if (!(cell.warps >> warp & 1)) continue;
    uint32_t lanes = cell.readers[warp].lanes;
    if (warp == own) lanes = cell.readers[warp].barriers == watch.warp_barriers ? lanes & ~(1u << watch.thread % kWarp) : 0;
    if (lanes != 0) return int(warp * kWarp) + __builtin_ctz(lanes);
  }
  return -1;
}

void access_byte(size_t place, bool writes) {
  Cell& cell = cells[place];
  const uint64_t stamp = watch.block << 20 | watch.barriers;
  if (!writes && cell.block != watch.block) report("a thread reads what no thread of its block wrote", place, -1);
  if (cell.stamp != stamp) {
    cell.stamp = stamp;
    cell.writer = -1;
    cell.warps = 0;
  }
  if (unordered(cell.writer, cell.writer_warp_barriers)) {
    report(writes ? "two threads write without a barrier between"
                  : "a thread reads what another writes without a barrier between",
           place, cell.writer);
  }
  if (writes) {
    const int reader = unordered_reader(cell);
    if (reader >= 0) report("a thread writes what another reads without a barrier between", place, reader);
    cell.block = watch.block;
    cell.writer = int(watch.thread);
    cell.writer_warp_barriers = watch.warp_barriers;
    return;
  }
  const unsigned warp = watch.thread / kWarp;
  auto& readers = cell.readers[warp];
  if (!(cell.warps >> warp & 1) || readers.barriers != watch.warp_barriers) {
    readers.lanes = 0;
    readers.barriers = watch.warp_barriers;
    cell.warps |= 1u << warp;
  }
  readers.lanes |= 1u << watch.thread % kWarp;
}

inline void access(const void* address, size_t size, bool writes) {
  const size_t place = size_t((const char*)address - watch.first);
  if (place >= watch.size) return;
  for (size_t k = 0; k < size; ++k) access_byte(place + k, writes);
  if (!writes) return;
  if (highest == lowest) lowest = place, highest = place;
  if (place < lowest) lowest = place;
  if (place + size > highest) highest = place + size;
}

int find_module(dl_phdr_info* module, size_t, void* code) {
  const uintptr_t wanted = (uintptr_t)code;
  bool is_it = false;
  size_t size = 0;
  for (int k = 0; k < module->dlpi_phnum; ++k) {
    const auto& part = module->dlpi_phdr[k];
    const uintptr_t start = module->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD && wanted >= start && wanted < start + part.p_memsz) is_it = true;
    if (part.p_type == PT_TLS) size = part.p_memsz;
  }
  if (!is_it) return 0;
  watch.first = (const char*)module->dlpi_tls_data;
  watch.size = watch.first == nullptr ? 0 : size;
  return 1;
}

thread_local char touched = 0;  // makes the storage of this thread

}  // namespace

void find_shared_memory(const void* code) {
  *(volatile char*)&touched = 1;
  dl_iterate_phdr(find_module, const_cast<void*>(code));
  if (num_cells < watch.size) {
    std::free(cells);
    num_cells = watch.size;
    cells = (Cell*)std::calloc(num_cells, sizeof(Cell));
  }
}

void begin_block() {
  ++watch.block;
  // NaN of any format: who looks at it in spite of all sees it in the results.
  if (highest > lowest) std::memset(const_cast<char*>(watch.first) + lowest, 0xff, highest - lowest);
  lowest = highest = 0;
}

}  // namespace cuda_emulator

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define WK_ACCESS(size)                                                                                    \
  void __tsan_read##size(void* address) { cuda_emulator::access(address, size, false); }                  \
  void __tsan_write##size(void* address) { cuda_emulator::access(address, size, true); }                  \
  void __tsan_unaligned_read##size(void* address) { cuda_emulator::access(address, size, false); }        \
  void __tsan_unaligned_write##size(void* address) { cuda_emulator::access(address, size, true); }

WK_ACCESS(1)
WK_ACCESS(2)
WK_ACCESS(4)
WK_ACCESS(8)
WK_ACCESS(16)

void __tsan_read_range(void* address, size_t size) { cuda_emulator::access(address, size, false); }
void __tsan_write_range(void* address, size_t size) { cuda_emulator::access(address, size, true); }
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}

// What g++ hands to a failed check of alignment.
struct Mismatch {
  struct {
    const char* file;
    unsigned line, column;
  } at;
  void* type;
  unsigned char log_alignment, kind;
};

void __ubsan_handle_type_mismatch_v1(Mismatch* data, void* address) {
  if (cuda_emulator::watch.fault[0] != 0) return;
  std::snprintf(cuda_emulator::watch.fault, sizeof(cuda_emulator::watch.fault), "%s:%u: address %p is not a multiple of %u",
                data->at.file, data->at.line, address, 1u << data->log_alignment);
}
}
