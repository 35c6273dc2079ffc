#pragma once

#include <cutlass/cutlass.h>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/variant/arguments.hpp"

namespace cute_kernels::attention {

/// Whether a call has them, for kernels that need them; without queries or keys they are empty.
template <class Problem>
bool has_block_lists(Problem const& problem) {
  CallSizes const& sizes = problem.call.sizes;
  return sizes.seqlen_q == 0 || sizes.seqlen_k == 0 || problem.variant->blocks.counts != nullptr;
}

/// An entry of BlockLists.
struct BlockEntry {
  int packed;

  CUTLASS_DEVICE int unit() const { return packed >> 1; }
  CUTLASS_DEVICE bool is_full() const { return packed & 1; }
};

/// A row of BlockLists: what is not hidden from a unit of queries or of keys. Nobody writes there.
class BlockRow {
 public:
  CUTLASS_DEVICE BlockRow(BlockLists const& lists, int batch, int head, int unit)
      : lists_(lists), row_(lists.rows_of_batch * batch + lists.rows_of_head * head + unit) {}

  /// Of the row, among all lists.
  CUTLASS_DEVICE int number() const { return row_; }
  CUTLASS_DEVICE int count() const { return __ldg(lists_.counts + row_); }
  CUTLASS_DEVICE BlockEntry entry(int i) const { return {__ldg(lists_.entries + at(i))}; }
  /// Backward: how many smaller units of keys the queries of an entry see.
  CUTLASS_DEVICE int turn(int i) const { return __ldg(lists_.turns + at(i)); }

 private:
  CUTLASS_DEVICE int at(int i) const { return row_ * lists_.capacity + i; }

  BlockLists const& lists_;  // a kernel's parameter
  int row_;
};

}  // namespace cute_kernels::attention
