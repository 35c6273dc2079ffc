#pragma once

#include <cutlass/array.h>
#include <cutlass/fast_math.h>

#include "cute_kernels/attention/decode/work.hpp"
#include "cute_kernels/sm90/gather.hpp"

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

/// Rows are found and copied in vectors of as many bytes.
inline constexpr int kVectorBytes = 16;

/// How many vectors behind its cache a row begins: so many as 32 bits hold, in caches of up to 64
/// GiB, which the host has checked. kNowhere: it is not there.
inline constexpr uint32_t kNowhere = 0xffffffff;

/// Of `found`. Strides count elements, of which a vector has kVector. Modulo 2^32: half of the
/// instructions of 64 bits, and there is nothing that these would keep.
template <int kVector>
CUTLASS_DEVICE uint32_t row_place(FoundRow const& found, int64_t major_stride, int64_t minor_stride,
                                  uint32_t behind = 0) {
  auto vectors = [](int64_t stride) {
    return static_cast<uint32_t>(static_cast<uint64_t>(stride) / kVector);
  };
  uint32_t const place =
      found.major * vectors(major_stride) + found.minor * vectors(minor_stride) + behind;
  return found.major < 0 ? kNowhere : place;
}

/// Of the row of head `head`.
template <int kVector>
CUTLASS_DEVICE uint32_t row_place(FoundRow const& found, CacheView const& view, int head) {
  uint32_t const of_head = static_cast<uint32_t>(static_cast<uint64_t>(view.head_stride) / kVector);
  return row_place<kVector>(found, view.page_stride, view.slot_stride, head * of_head);
}

/// Whether a row's place in one of them is that in the other.
CUTLASS_DEVICE bool have_same_places(CacheView const& a, CacheView const& b) {
  return a.page_stride == b.page_stride && a.slot_stride == b.slot_stride &&
         a.head_stride == b.head_stride;
}

/// The address of a thread's vector of a row, whose first row's is `first`. Of a row that is
/// nowhere one from which nothing is to be read.
CUTLASS_DEVICE void const* vector_at(uint64_t first, uint32_t place) {
  return reinterpret_cast<void const*>(sm90::multiply_add(place, kVectorBytes, first));
}

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

/// Copies blocks from `begin` up to before `end`, some: copy(row), where find(block) has found the
/// row of a lane, among `pages` pages or nowhere. prepare() stands between the first look-ups and
/// the first copy, or where it is `late` behind the first kAhead blocks, if there are more. Nothing
/// depends on what find() reads until kAhead more blocks are on their way: it may queue behind all
/// copies before.
template <int kAhead, class Find, class Prepare, class Copy>
CUTLASS_DEVICE void copy_blocks(int begin, int end, int pages, Find const& find, bool late,
                                Prepare const& prepare, Copy const& copy) {
  FoundRow found[kAhead];
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kAhead; ++i) found[i] = find(begin + i);
  int const prepared = late && end - begin > kAhead ? begin + kAhead : begin;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int block = begin;; block += kAhead) {
    if (block == prepared) prepare();
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
