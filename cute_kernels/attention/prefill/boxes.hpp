#pragma once

#include <cstdint>
#include <numeric>

#include "cute_kernels/attention/decode/problem.hpp"

// Which loads of K and V by TMA there are. Nothing here needs a CUDA compiler.
namespace cute_kernels::attention {

/// The largest boxes of a TMA descriptor that hold rows of one page alone, of tile_n keys or a part
/// of these; 0 where there are none: rows would have to be gathered.
inline int rows_of_boxes(DecodeProblem const& problem, int tile_n) {
  constexpr int kLeastRows = 8;  // the swizzle's period
  constexpr int64_t kMostBytes = int64_t{1} << 40;
  CachePages const& pages = problem.pages;
  if (pages.pages == 0 || problem.call.most_keys == 0) return 0;
  auto is_described = [&](CacheView const& view) {
    auto fits = [](int64_t size, int64_t stride) {
      return size == 1 || (stride > 0 && stride < kMostBytes / 2);
    };
    return fits(pages.pages, view.page_stride) && fits(pages.page_size, view.slot_stride) &&
           fits(problem.call.heads_kv, view.head_stride);
  };
  if (!is_described(problem.k) || !is_described(problem.v)) return 0;
  if (pages.table == nullptr) return tile_n;  // no tile leaves its page
  if (problem.call.lengths.leftpad != nullptr) return 0;
  int const rows = std::gcd(pages.page_size, tile_n);
  return rows % kLeastRows == 0 ? rows : 0;
}

}  // namespace cute_kernels::attention
