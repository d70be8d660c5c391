// Products of tiles whose sums stay in registers: logits = hidden @ head.T, 128 rows and 256 vocabulary entries at a time,
// for kernels that end each tile themselves. Runs on Hopper GPUs.
//
// A block has a warpgroup that only starts copies, and two that multiply 64 rows each. A ring of stages in shared memory
// holds the 64 hidden columns being multiplied and those that follow. Blocks are persistent: the copies of the next tile
// run while a tile is ended. Two blocks of a cluster work on adjacent rows and the same vocabulary entries: each copies half
// of the head's rows into both.
#pragma once

#include "hopper.h"

namespace windkern {
namespace cuda {

constexpr int kTileRows = 128, kTileColumns = 256, kTileInner = 64;
constexpr int kTileStages = 4;
constexpr int kTileThreads = 384;
constexpr int kCopiers = 128;  // the first threads
// Row tiles of a cluster's blocks that go through the vocabulary together: their hidden states, and what they read of the
// head, stay in the second-level cache.
constexpr int kTileGroup = 16;

// Of a walk over all tiles; columns are those of the head's rows given.
struct TileGrid {
  int rows, width, inner;
  int row_sets, column_tiles;  // a set: as many row tiles as a cluster has blocks
  int group;                   // row sets that go through the vocabulary together

  TileGrid(int64_t rows, int64_t width, int64_t inner, int cluster)
      : rows(int(rows)),
        width(checked_width(width)),
        inner(int(inner)),
        row_sets(int(ceil_div(rows, kTileRows * cluster))),
        column_tiles(int(ceil_div(width, kTileColumns))),
        group(kTileGroup / cluster) {}

  WK_FN int tiles() const { return row_sets * column_tiles; }
  WK_FN int steps() const { return (inner + kTileInner - 1) / kTileInner; }

  struct Tile {
    int row_set, column_tile;
  };

  WK_FN Tile tile(int index) const {
    const int first = index / (group * column_tiles) * group, within = index % (group * column_tiles);
    const int members = row_sets - first < group ? row_sets - first : group;
    return {first + within % members, within / members};
  }
};

// The stage of a ring, and the parity of its phase.
struct RingPlace {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage == kTileStages) stage = 0, parity ^= 1;
  }
};

struct TileStages {
  BFloat16 hidden[kTileStages][kTileRows * kTileInner];
  BFloat16 head[kTileStages][kTileColumns * kTileInner];
  hopper::Barrier full[kTileStages], empty[kTileStages];
};
// Reason: the copies' places must be multiples of 1024 bytes.
constexpr int kTileBytes = int(sizeof(TileStages)) + 1024;

// `End` ends a tile: of this thread, acc[4 j + 2 h + i] is the logit of row + 8 h and column 256 column_tile + 8 j +
// 2 (lane % 4) + i. look(row) reads what it needs of the rows before the products, so that nothing waits for it after them.
template <class E, int cluster, class End>
__global__ void __launch_bounds__(kTileThreads, 1)
    tiles(const __grid_constant__ hopper::TileMap hidden, const __grid_constant__ hopper::TileMap head, const TileGrid grid,
          const End end) {
  using namespace hopper;
  unsigned char* const bytes = dynamic_shared();
  TileStages& ring = *reinterpret_cast<TileStages*>(bytes + (1024 - shared_address(bytes) % 1024) % 1024);
  const int rank = cluster > 1 ? block_in_cluster() : 0, thread = int(threadIdx.x);
  if (thread == 0) {
    prefetch_map(hidden);
    prefetch_map(head);
    for (int s = 0; s < kTileStages; ++s) {
      ring.full[s].init(1);
      ring.empty[s].init(2 * cluster);  // one arrival of each warpgroup that multiplies
    }
    publish_barriers();
  }
  if (cluster > 1) {
    meet_cluster();
  } else {
    __syncthreads();
  }
  const int first = int(blockIdx.x) / cluster, step = int(gridDim.x) / cluster, steps = grid.steps();
  RingPlace place;
  if (thread < kCopiers) {
    shrink_registers<40>();
    if (thread == 0) {
      for (int index = first; index < grid.tiles(); index += step) {
        const TileGrid::Tile tile = grid.tile(index);
        const int row = (tile.row_set * cluster + rank) * kTileRows, column = tile.column_tile * kTileColumns;
        constexpr int part = kTileColumns / cluster;
        for (int k = 0; k < steps; ++k) {
          ring.empty[place.stage].wait(place.parity ^ 1);
          Barrier& full = ring.full[place.stage];
          full.expect((kTileRows + kTileColumns) * kTileInner * 2);
          copy_box(ring.hidden[place.stage], hidden, row, k * kTileInner, full);
          BFloat16* const to = ring.head[place.stage] + rank * part * kTileInner;
          if (cluster > 1) {
            copy_box_to((1 << cluster) - 1, to, head, column + rank * part, k * kTileInner, full);
          } else {
            copy_box(to, head, column, k * kTileInner, full);
          }
          place.advance();
        }
      }
    }
  } else {
    grow_registers<232>();
    const int warpgroup = thread / kCopiers - 1, lane = thread % 32, warp = thread / 32 % 4;
    float acc[128];
    // One thread of a warpgroup tells every block of the cluster that it has read a stage.
    const auto leave = [&](int stage) {
      if (cluster > 1) {
        if (thread % kCopiers < cluster) ring.empty[stage].arrive_at(thread % kCopiers);
      } else if (thread % kCopiers == 0) {
        ring.empty[stage].arrive();
      }
    };
    for (int index = first; index < grid.tiles(); index += step) {
      const TileGrid::Tile tile = grid.tile(index);
      const int row = (tile.row_set * cluster + rank) * kTileRows + warpgroup * 64 + warp * 16 + lane / 4;
      const auto looked = end.look(row);
      int before = 0;
      for (int k = 0; k < steps; ++k) {
        ring.full[place.stage].wait(place.parity);
        const uint64_t a = describe(ring.hidden[place.stage] + warpgroup * 64 * kTileInner);
        const uint64_t b = describe(ring.head[place.stage]);
        fence_sums(acc);
        begin_products();
#pragma unroll
        for (int i = 0; i < kTileInner / 16; ++i) multiply<E>(acc, along(a, 32 * i), along(b, 32 * i), k > 0 || i > 0);
        commit_products();
        fence_sums(acc);
        if (k > 0) {
          wait_products<1>();
          leave(before);
        }
        before = place.stage;
        place.advance();
      }
      wait_products<0>();
      fence_sums(acc);
      leave(before);
      end.end(acc, row, tile.column_tile, looked);
    }
  }
  // A block must not end while others of its cluster copy into it or arrive at its barriers.
  if (cluster > 1) meet_cluster();
}

template <class E, int cluster, class End>
void run_tiles_in_clusters(const char* name, const TileOperands& in, const Slab& slab, const End& end, Stream stream) {
  const TileGrid grid(slab.rows, slab.width, in.inner, cluster);
  const auto hidden = hopper::map_of(in.hidden, slab.rows, in.inner, in.hidden_stride, kTileRows);
  const auto head = hopper::map_of(in.head, slab.width, in.inner, in.head_stride, kTileColumns / cluster);
  const int most = hopper::multiprocessors() / cluster;
  const int clusters = grid.tiles() < most ? grid.tiles() : most;
  hopper::launch_clusters(name, tiles<E, cluster, End>, clusters * cluster, kTileThreads, cluster, kTileBytes, stream,
                          hidden, head, grid, end);
}

// One row tile has nothing to share with another.
template <class E, class End>
void run_tiles(const char* name, const TileOperands& in, const Slab& slab, const End& end, Stream stream) {
  if (hopper::kClusters && slab.rows > kTileRows) {
    run_tiles_in_clusters<E, 2>(name, in, slab, end, stream);
  } else {
    run_tiles_in_clusters<E, 1>(name, in, slab, end, stream);
  }
}

// The tile columns of a slab.
inline int column_tiles(const Slab& slab) { return int(ceil_div(slab.width, kTileColumns)); }

}  // namespace cuda
}  // namespace windkern
