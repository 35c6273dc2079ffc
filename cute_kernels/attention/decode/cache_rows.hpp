#pragma once

#include <cutlass/array.h>
#include <cutlass/fast_math.h>

#include "cute_kernels/attention/decode/work.hpp"

namespace cute_kernels::attention {

/// What the producer is told at run time.
struct CacheSource {
  CachePages pages;
  cutlass::FastDivmod page_size;
  cutlass::FastDivmod group;  // query heads of a key head
  TensorView q;
  CacheView k;
  CacheView v;
};

/// A row that a lane has found for its warp: major and minor are multiples of strides.
struct FoundRow {
  int major;  // no page of the cache: the row is not there
  int minor;

  /// The same, where major is -1 if the row is not there. Waits for what major was read from.
  CUTLASS_DEVICE FoundRow among(int pages) const {
    bool const there = static_cast<uint32_t>(major) < static_cast<uint32_t>(pages);
    return {there ? major : -1, minor};
  }
};

/// Where key `key` of a sequence is in the cache. `major` is as the table has it.
CUTLASS_DEVICE FoundRow row_of_key(CacheSource const& source, int entry, int key) {
  CachePages const& pages = source.pages;
  FoundRow row{entry, key};
  if (pages.table != nullptr) {
    int page;
    source.page_size(page, row.minor, key);
    row.major = __ldg(pages.table + entry * pages.table_stride + page);
  } else if (pages.entries != nullptr) {
    row.major = __ldg(pages.entries + entry);
  }
  return row;
}

/// A row begins a multiple of 16 bytes behind its cache: so many times as 32 bits hold, in caches
/// of up to 64 GiB, which the host has checked. kNowhere: it is not there.
inline constexpr uint32_t kNowhere = 0xffffffff;

/// What lanes first, first + step and so on have found, for each of the passes of a copy. Callers
/// wait for the copy's place behind it: otherwise each pass would wait for its own shuffle.
template <int kPasses>
CUTLASS_DEVICE cutlass::Array<uint32_t, kPasses> found_by_lanes(uint32_t found, int first,
                                                                int step) {
  cutlass::Array<uint32_t, kPasses> rows;
  CUTLASS_PRAGMA_UNROLL
  for (int pass = 0; pass < kPasses; ++pass) {
    rows[pass] = __shfl_sync(0xffffffff, found, first + pass * step);
  }
  return rows;
}

/// Copies blocks from `begin` up to before `end`: copy(row), where find(block) has found the row of
/// a lane, among `pages` pages or nowhere. prepare() stands between the first look-ups and the
/// first copy. Nothing depends on what find() reads until kAhead more blocks are on their way: it
/// may queue behind all copies before.
template <int kAhead, class Find, class Prepare, class Copy>
CUTLASS_DEVICE void copy_blocks(int begin, int end, int pages, Find const& find,
                                Prepare const& prepare, Copy const& copy) {
  FoundRow found[kAhead];
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kAhead; ++i) found[i] = find(begin + i);
  prepare();
  CUTLASS_PRAGMA_NO_UNROLL
  for (int block = begin;; block += kAhead) {
    // Unrolled: a move from register to register would wait for what is being read.
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (block + i >= end) return;
      FoundRow const row = found[i].among(pages);
      found[i] = find(block + i + kAhead);
      copy(row);
    }
  }
}

}  // namespace cute_kernels::attention
