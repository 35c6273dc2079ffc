#pragma once

#include <cute/tensor.hpp>

#include "cute_kernels/attention/latent/source.hpp"
#include "cute_kernels/attention/latent/traits.hpp"
#include "cute_kernels/sm90/gather.hpp"

namespace cute_kernels::attention {

/// The producer warpgroup: brings a part's queries and keys to shared memory. Keys come by TMA in
/// boxes of rows of a page where there are such, by one warp; otherwise all warps gather them, row
/// by row. Rows that are no keys of the tile's then become 0, whatever the cache holds there; a box
/// brings what it finds behind the last key, which consumers clear. Of a pair of CTAs, which have
/// the same keys, each loads one half of a block for both.
template <class Traits>
class LatentLoader {
  using Element = typename Traits::Element;
  using Rows = typename Traits::Rows;
  using SharedStorage = typename Traits::SharedStorage;
  using Barrier = typename SharedStorage::Barrier;
  using Walk = WorkWalk<Traits>;

  static constexpr int kLanes = cutlass::NumThreadsPerWarp;
  static constexpr int kWarps = cutlass::NumWarpsPerWarpGroup;
  static constexpr int kVector = kVectorBytes / sizeof(Element);
  static constexpr int kRowsOfWarp = Traits::kTileN / kWarps;
  static constexpr int kPiece = Traits::kPiece;
  static constexpr int kChunk = Traits::kChunk;

 public:
  CUTLASS_DEVICE LatentLoader(CachedCall const& call, LatentSource const& source,
                              SharedStorage& shared)
      : call_(call), source_(source), shared_(shared) {}

  /// Issues every load of one part.
  CUTLASS_DEVICE void load(Walk const& walk) {
    if (walk.begin_block() == walk.end_block()) return;
    if (source_.box_rows > 0 && warp() > 0) return load_queries(walk);
    bool has_queries = false;
    auto const copy = [&](FoundRow const& found) {
      source_.box_rows > 0 ? copy_boxes(found, walk.head()) : copy_rows(found, walk.head());
      stage_.advance();
      // The first block's stage is free before the queries' place is, mostly, and the second's
      // behind it.
      if (!has_queries) load_queries(walk);
      has_queries = true;
    };
    copy_blocks<Traits::kLookAhead>(
        walk.begin_block(), walk.end_block(), source_.cache.pages.pages,
        [&](int block) { return find(walk, block); }, false, [] {}, copy);
  }

  /// Shared memory must outlive all copies.
  CUTLASS_DEVICE static void drain() { sm90::wait_until_gathered(); }

 private:
  /// Of the rows that the lanes have found, those whose vectors this lane copies, where a row of
  /// kColumns columns is as many lanes'.
  template <int kColumns>
  struct Share {
    static constexpr int kLanesOfRow = kColumns / kVector;
    static constexpr int kRowsAtOnce = kLanes / kLanesOfRow;  // of a warp
    static constexpr int kPasses = kRowsOfWarp / kRowsAtOnce;
    static_assert(kRowsAtOnce * kWarps % 8 == 0, "a period of the swizzle: its place is the same");

    CUTLASS_DEVICE explicit Share(uint32_t found)
        : places(found_by_lanes<kPasses>(found, lane() / kLanesOfRow, kRowsAtOnce)) {}

    cutlass::Array<uint32_t, kPasses> places;
  };

  CUTLASS_DEVICE static int lane() { return threadIdx.x % kLanes; }
  CUTLASS_DEVICE static int warp() { return threadIdx.x / kLanes % kWarps; }
  /// Rows go round the warps: lane i of a warp finds its i-th.
  CUTLASS_DEVICE static int row_of(int lane) { return lane * kWarps + warp(); }

  /// The row that a lane finds in a block: the first one of a box, or one of its warp's.
  CUTLASS_DEVICE FoundRow find(Walk const& walk, int block) const {
    KeySpan const keys = walk.tile().keys;
    int const row = source_.box_rows > 0 ? lane() * source_.box_rows : row_of(lane());
    int const key = keys.begin + block * Traits::kTileN + row;
    bool const there = row < Traits::kTileN && key < keys.end;
    return there ? row_of_key(source_.cache, walk.entry(), key) : FoundRow{-1, 0};
  }

  /// A block by TMA. The boxes of a page that does not exist lie outside of the tensor: they are 0.
  /// A CTA of a pair begins with what it loads for both.
  CUTLASS_DEVICE void copy_boxes(FoundRow const& found, int head) {
    bool const leader = cute::elect_one_sync();
    int const own_half = source_.pairs ? blockIdx.y % 2 : 0;
    Rows& keys = shared_.keys[stage_.index];
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = 0; i < Traits::kPieces; ++i) {
      int const piece = (own_half * Traits::kPiecesOfHalf + i) % Traits::kPieces;
      wait_for_piece(piece);
      Barrier& full = shared_.full[stage_.index][piece];
      int const columns = kPiece + (has_ropes(piece) ? Traits::kRopeDim : 0);
      if (leader) full.arrive_and_expect_tx(Traits::kTileN * columns * sizeof(Element));
      if (source_.pairs && Traits::half_of(piece) != own_half) continue;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int row = 0, box = 0; row < Traits::kTileN; row += source_.box_rows, ++box) {
        int const page = __shfl_sync(0xffffffff, found.major, box);
        int const slot = __shfl_sync(0xffffffff, found.minor, box);
        if (!leader) continue;
        auto const copy = [&](cute::TmaDescriptor const& boxes, int to_column, int column) {
          copy_box(boxes, full, keys.columns_from(to_column) + row * kChunk,
                   {column, slot, head, page});
        };
        CUTLASS_PRAGMA_UNROLL
        for (int chunk = 0; chunk < kPiece; chunk += kChunk) {
          copy(source_.boxes_v, piece * kPiece + chunk, piece * kPiece + chunk);
        }
        if (has_ropes(piece)) copy(source_.boxes_k, Traits::kHeadDim, 0);
      }
    }
  }

  /// For both CTAs of a pair, and each of them is told of it.
  CUTLASS_DEVICE void copy_box(cute::TmaDescriptor const& boxes, Barrier& full, Element* to,
                               int const (&at)[4]) const {
    constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
    constexpr uint16_t kBoth = 3;
    auto* const landed = reinterpret_cast<uint64_t*>(&full);
    if (source_.pairs) {
      cute::SM90_TMA_LOAD_MULTICAST_4D::copy(&boxes, landed, kBoth, kHint, to, at[0], at[1], at[2],
                                             at[3]);
    } else {
      cute::SM90_TMA_LOAD_4D::copy(&boxes, landed, kHint, to, at[0], at[1], at[2], at[3]);
    }
  }

  /// A block, gathered.
  CUTLASS_DEVICE void copy_rows(FoundRow const& found, int head) {
    CacheView const& v = source_.cache.v;
    CacheView const& k = source_.cache.k;
    Share<kPiece> const latents(row_place<kVector>(found, v, head));
    Share<kChunk> const ropes(row_place<kVector>(found, k, head));
    Rows& keys = shared_.keys[stage_.index];
    CUTLASS_PRAGMA_UNROLL
    for (int piece = 0; piece < Traits::kPieces; ++piece) {
      wait_for_piece(piece);
      copy_piece(keys, piece, v.data, latents);
      if (has_ropes(piece)) copy_ropes(keys, k.data, ropes);
      sm90::arrive_when_gathered(shared_.full[stage_.index][piece]);
    }
  }

  CUTLASS_DEVICE bool has_ropes(int piece) const {
    return piece == Traits::piece_of_ropes(stage_.index);
  }

  /// Of the stage, when those who had its values, and P, are done with them.
  CUTLASS_DEVICE void wait_for_piece(int piece) const {
    shared_.empty[stage_.index][piece].wait(stage_.phase ^ 1);
  }

  CUTLASS_DEVICE void load_queries(Walk const& walk) {
    shared_.q_empty.wait(q_phase_ ^ 1);
    FoundRow row{-1, 0};
    if (lane() < kRowsOfWarp && row_of(lane()) < walk.tile().rows) {
      source_.cache.group(row.major, row.minor, walk.tile().first_row + row_of(lane()));
      row.major += walk.sequence().row_q;
      row.minor += (walk.head() * gridDim.y + blockIdx.y) * walk.sequence().group;
    }
    auto const place_in = [&](TensorView const& view) {
      return row_place<kVector>(row, view.seqlen_stride, view.head_stride);
    };
    Share<kPiece> const latents(place_in(source_.qv));
    Share<kChunk> const ropes(place_in(source_.cache.q));
    CUTLASS_PRAGMA_UNROLL
    for (int piece = 0; piece < Traits::kPieces; ++piece) {
      copy_piece(shared_.queries, piece, source_.qv.data, latents);
    }
    copy_ropes(shared_.queries, source_.cache.q.data, ropes);
    sm90::arrive_when_gathered(shared_.q_full);
    q_phase_ ^= 1;
  }

  CUTLASS_DEVICE void copy_piece(Rows& to, int piece, void const* latents,
                                 Share<kPiece> const& share) const {
    copy_columns(to.columns_from(piece * kPiece), latents, piece * kPiece, call_.head_dim_v, share);
  }
  CUTLASS_DEVICE void copy_ropes(Rows& to, void const* ropes, Share<kChunk> const& share) const {
    copy_columns(to.columns_from(Traits::kHeadDim), ropes, 0, call_.head_dim, share);
  }

  /// Copies kColumns columns of rows, from `from` on, of which there are `columns`: others are 0.
  template <int kColumns>
  CUTLASS_DEVICE static void copy_columns(Element* shared, void const* global, int from,
                                          int columns, Share<kColumns> const& share) {
    using Of = Share<kColumns>;
    int const column = lane() % Of::kLanesOfRow * kVector;
    auto const layout = cute::as_position_independent_swizzle_layout(
        typename Traits::template LayoutRows<kColumns>{});
    uint32_t const to =
        cute::cast_smem_ptr_to_uint(shared) +
        layout(row_of(lane() / Of::kLanesOfRow), column) * static_cast<int>(sizeof(Element));
    auto const first = reinterpret_cast<uint64_t>(global) + (from + column) * sizeof(Element);
    bool const has_column = from + column < columns;
    CUTLASS_PRAGMA_UNROLL
    for (int pass = 0; pass < Of::kPasses; ++pass) {
      bool const there = share.places[pass] != kNowhere && has_column;
      sm90::gather_or_clear(to + pass * Of::kRowsAtOnce * kWarps * Traits::kSwizzleBytes,
                            vector_at(first, share.places[pass]), there);
    }
  }

  CachedCall const& call_;
  LatentSource const& source_;
  SharedStorage& shared_;
  RingStage<Traits::kStages> stage_;
  uint32_t q_phase_ = 0;
};

}  // namespace cute_kernels::attention
