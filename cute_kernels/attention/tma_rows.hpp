#pragma once

namespace cute_kernels::attention {

/// More rows than a tensor has.
inline constexpr int kManyRows = 1 << 30;

/// Where TMA has a sequence's rows: row i at coordinate `first` + i of the rows, `entry` of the
/// batch.
///
/// A packed sequence ends where its tensor does, so that TMA brings zeros for what is behind it,
/// and writes nothing there: its last row has the coordinate kManyRows - 1. What is too much the
/// other coordinates take back. The stride of `entry` is a row's, and that of `wrap`, s being a
/// row's in bytes, 2^34 - s, so that kManyRows of it are 2^64 - kManyRows s: addresses wrap around.
/// The tensor begins at its own first byte: where that of a descriptor is not mapped, an H100 calls
/// every access illegal, also of mapped rows.
struct TmaRows {
  int first;
  int entry;
  int wrap;
};

constexpr TmaRows dense_tma_rows(int entry) { return {0, entry, 0}; }

constexpr TmaRows packed_tma_rows(int first, int count) {
  return {kManyRows - count, first + count, kManyRows};
}

}  // namespace cute_kernels::attention
