#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/latent/source.hpp"
#include "cute_kernels/attention/latent/traits.hpp"
#include "cute_kernels/sm90/gather.hpp"

namespace cute_kernels::attention {

/// The producer warpgroup: brings a part's queries and keys to shared memory, row by row. Rows that
/// are no keys of the tile's become 0, whatever the cache holds there.
template <class Traits>
class LatentLoader {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Walk = WorkWalk<Traits>;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  static constexpr int kVector = 16 / sizeof(Element);
  static constexpr int kRowsOfWarp = Traits::kTileN / kWarps;
  static constexpr int kLeft = Traits::kLeft;
  static constexpr int kRope = Traits::kRopeDim;

 public:
  CUTLASS_DEVICE LatentLoader(CachedCall const& call, LatentSource const& source,
                              SharedStorage& shared)
      : call_(call), source_(source), shared_(shared) {}

  /// Issues every load of one part.
  CUTLASS_DEVICE void load(Walk const& walk) {
    if (walk.begin_block() == walk.end_block()) return;
    int const head = walk.head() / source_.heads_of_key;
    auto const rows_of = [&](CacheView const& view, FoundRow const& found) {
      return Rows{
          static_cast<Element const*>(view.data) + head * view.head_stride,
          found.major < 0 ? -1 : found.major * view.page_stride + found.minor * view.slot_stride};
    };
    auto const find = [&](int block) { return key_row(walk, block); };
    auto const copy = [&](FoundRow const& row) {
      Rows const latents = rows_of(source_.cache.v, row);
      Rows const ropes = rows_of(source_.cache.k, row);
      int const stage = stage_.index;
      shared_.left_empty[stage].wait(stage_.phase ^ 1);
      copy_left(shared_.left[stage], latents);
      sm90::arrive_when_gathered(shared_.left_full[stage]);
      shared_.right_empty[stage].wait(stage_.phase ^ 1);
      copy_right(shared_.right[stage], latents, ropes);
      sm90::arrive_when_gathered(shared_.right_full[stage]);
      stage_.advance();
    };
    copy_blocks<Traits::kLookAhead>(
        walk.begin_block(), walk.end_block(), source_.cache.pages.pages, find,
        [&] { load_queries(walk); }, copy);
  }

  /// Shared memory must outlive all copies.
  CUTLASS_DEVICE static void drain() { sm90::wait_until_gathered(); }

 private:
  /// A row that this lane has found for its warp: `offset` elements behind `data`, -1 if it is not
  /// there.
  struct Rows {
    Element const* data;
    int64_t offset;
  };

  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int warp() { return threadIdx.x / kLanes % kWarps; }
  /// Rows go round the warps: lane i of a warp finds its i-th.
  CUTLASS_DEVICE static int row_of(int lane) { return lane * kWarps + warp(); }

  CUTLASS_DEVICE FoundRow key_row(Walk const& walk, int block) const {
    KeySpan const keys = walk.tile().keys;
    int const key = keys.begin + block * Traits::kTileN + row_of(lane());
    bool const there = lane() < kRowsOfWarp && key < keys.end;
    return there ? row_of_key(source_.cache, walk.entry(), key) : FoundRow{-1, 0};
  }

  CUTLASS_DEVICE void load_queries(Walk const& walk) {
    shared_.q_empty.wait(q_phase_ ^ 1);
    int query = 0, head = 0;
    bool const there = lane() < kRowsOfWarp && row_of(lane()) < walk.tile().rows;
    if (there) {
      source_.cache.group(query, head, walk.tile().first_row + row_of(lane()));
      query += walk.sequence().row_q;
      head += walk.head() * walk.sequence().group;
    }
    auto const rows_of = [&](TensorView const& view) {
      return Rows{static_cast<Element const*>(view.data),
                  there ? query * view.seqlen_stride + head * view.head_stride : -1};
    };
    Rows const latents = rows_of(source_.qv);
    copy_left(shared_.q_left, latents);
    copy_right(shared_.q_right, latents, rows_of(source_.cache.q));
    sm90::arrive_when_gathered(shared_.q_full);
    q_phase_ ^= 1;
  }

  CUTLASS_DEVICE void copy_left(typename Traits::template Rows<kLeft>& to, Rows const& latents) {
    copy_columns<Traits::kLeft, 0, kLeft>(to.data(), latents, 0, call_.head_dim_v);
  }
  CUTLASS_DEVICE void copy_right(typename Traits::template Rows<Traits::kRight>& to,
                                 Rows const& latents, Rows const& ropes) {
    copy_columns<Traits::kRight, 0, kLeft>(to.data(), latents, kLeft, call_.head_dim_v);
    copy_columns<Traits::kRight, kLeft, kRope>(to.data(), ropes, 0, call_.head_dim);
  }

  /// Copies kColumns columns of the rows that the lanes have found, from `from_column` on, behind
  /// kToColumn columns of rows of kAllColumns. Columns that rows of `columns` do not have are 0.
  template <int kAllColumns, int kToColumn, int kColumns>
  CUTLASS_DEVICE static void copy_columns(Element* shared, Rows const& rows, int from_column,
                                          int columns) {
    constexpr int kLanesOfRow = kColumns / kVector;
    constexpr int kRowsAtOnce = kLanes / kLanesOfRow;  // of a warp
    constexpr int kPasses = kRowsOfWarp / kRowsAtOnce;
    // The swizzle's period is 8 rows: a thread's places repeat after as many passes, further on.
    constexpr int kPeriod = kRowsAtOnce * kWarps < 8 ? 8 / (kRowsAtOnce * kWarps) : 1;
    constexpr int kPeriodBytes = kPeriod * kRowsAtOnce * kWarps * Traits::kSwizzleBytes;
    static_assert(kRowsAtOnce * kLanesOfRow == kLanes && kPasses * kRowsAtOnce == kRowsOfWarp);
    int const part = lane() / kLanesOfRow;
    int const column = lane() % kLanesOfRow * kVector;
    auto const layout = cute::as_position_independent_swizzle_layout(
        typename Traits::template LayoutRows<kAllColumns>{});
    uint32_t places[kPeriod];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kPeriod; ++i) {
      places[i] = cute::cast_smem_ptr_to_uint(shared) +
                  layout(row_of(i * kRowsAtOnce + part), kToColumn + column) *
                      static_cast<int>(sizeof(Element));
    }
    bool const has_column = from_column + column < columns;
    CUTLASS_PRAGMA_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      int64_t const row = __shfl_sync(0xffffffff, rows.offset, pass * kRowsAtOnce + part);
      bool const there = row >= 0 && has_column;
      uint32_t const to = places[pass % kPeriod] + pass / kPeriod * kPeriodBytes;
      sm90::gather_or_clear(to, rows.data + (there ? row + from_column + column : 0), there);
    }
  }

  CachedCall const& call_;
  LatentSource const& source_;
  SharedStorage& shared_;
  RingStage<Traits::kStages> stage_;
  uint32_t q_phase_ = 0;
};

}  // namespace cute_kernels::attention
