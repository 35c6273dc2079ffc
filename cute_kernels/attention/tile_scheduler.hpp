#pragma once

#include <algorithm>
#include <cstdint>

#include <cutlass/fast_math.h>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/ranges.hpp"

namespace cute_kernels::attention {

/// The work of one CTA at a time: kTileM queries of one head of one batch entry.
struct TileCoord {
  int m_block;
  int head;
  int batch;
};

/// A CTA's places in an order, of a persistent grid without any communication: CTA c takes the
/// places c, 2G-1-c, 2G+c, 4G-1-c, ... (G = CTAs; every second round runs backwards, so that a CTA
/// that got the longest tile of one round gets the shortest of the next).
class CtaRounds {
 public:
  /// The phase of a barrier with one use a tile, over both passes.
  template <class Passes>
  CUTLASS_DEVICE uint32_t phase(Passes const& passes) const {
    return round_ % 2 ^ passes.first_tile;
  }

  /// How many tiles the CTA has done.
  CUTLASS_DEVICE uint32_t round() const { return round_; }

 protected:
  CUTLASS_DEVICE CtaRounds() : round_(0), turn_(blockIdx.x) {}

  /// After every two rounds CTAs move on `shift` places.
  CUTLASS_DEVICE void next_round(int shift) {
    ++round_;
    turn_ = gridDim.x - 1 - turn_;
    if (round_ % 2 == 0) {  // forwards again
      turn_ += shift;
      if (turn_ >= gridDim.x) turn_ -= gridDim.x;
    }
  }

  /// Of the tile in the order.
  CUTLASS_DEVICE int number() const { return round_ * gridDim.x + turn_; }

 private:
  uint32_t round_;
  int turn_;
};

/// The order of a dense call's tiles. After every two rounds CTAs move on some places: a quarter of
/// them where there are several bands, since a band ends in the same places each time; one without
/// a causal mask, since the short tiles, where seqlen_q is no multiple of kTileM, stand in the same
/// places each time.
///
/// The order takes `band` query blocks at a time, from the last ones to the first (under a causal
/// mask that is longest first), and inside a band walks the (batch, head) pairs, with all of the
/// band's blocks for each. A band is one pass over all of K and V; the CTAs that work on the same
/// pair at the same time share what they read in L2. A wide band saves memory traffic, a narrow one
/// balances a causal mask.
class TileScheduler : public CtaRounds {
 public:
  struct Params {
    int tiles;
    int m_blocks;
    int full_bands;
    int shift;                       // places that a CTA moves on after every two rounds
    cutlass::FastDivmod band_tiles;  // tiles of a full band
    cutlass::FastDivmod band;        // query blocks of a full band
    cutlass::FastDivmod last_band;
    cutlass::FastDivmod heads;
  };

  /// kv_bytes: all of K and V.
  static Params make_params(CallSizes const& sizes, bool causal, int tile_m, int64_t kv_bytes,
                            int ctas) {
    int const m_blocks = (sizes.seqlen_q + tile_m - 1) / tile_m;
    int const heads = sizes.heads_q, batch = sizes.batch;
    int band = m_blocks;
    if (causal) {
      int const narrow = narrow_band(tile_m, heads * batch, ctas);
      if (kv_bytes <= kCachedBytes) {
        band = 1;
      } else if (m_blocks > kShortOrder * narrow) {
        band = narrow;
      }
    }
    Params params;
    params.tiles = m_blocks * heads * batch;
    params.m_blocks = m_blocks;
    params.full_bands = m_blocks / band;
    params.shift = !causal ? 1 : params.full_bands > 1 ? ctas / 4 : 0;
    params.band_tiles = cutlass::FastDivmod(band * heads * batch);
    params.band = cutlass::FastDivmod(band);
    params.last_band = cutlass::FastDivmod(std::max(1, m_blocks % band));
    params.heads = cutlass::FastDivmod(heads);
    return params;
  }

  CUTLASS_DEVICE explicit TileScheduler(Params const& params) : params_(params) {}

  CUTLASS_DEVICE bool valid() const { return number() < params_.tiles; }

  CUTLASS_DEVICE void advance() { next_round(params_.shift); }

  CUTLASS_DEVICE TileCoord coord() const {
    int band, in_band, pair, m_index;
    params_.band_tiles(band, in_band, number());
    auto const& width = band < params_.full_bands ? params_.band : params_.last_band;
    width(pair, m_index, in_band);
    TileCoord coord;
    params_.heads(coord.batch, coord.head, pair);
    coord.m_block = params_.m_blocks - 1 - band * params_.band.divisor - m_index;
    return coord;
  }

 private:
  /// The narrowest band that pays, of tiles of tile_m queries: enough of them must share a load of
  /// K and V, be it as one band or because there are more CTAs than (batch, head) pairs.
  static int narrow_band(int tile_m, int pairs, int ctas) {
    return tile_m * std::max(2, ctas / pairs) >= kQueriesForALoad ? 2 : 4;
  }

  // K and V that stay in L2 (50 MB) whatever the order.
  static constexpr int64_t kCachedBytes = 32 << 20;
  // In orders of no more than four bands, too, memory traffic costs more than balance gains.
  static constexpr int kShortOrder = 4;

  Params const& params_;
};

}  // namespace cute_kernels::attention
