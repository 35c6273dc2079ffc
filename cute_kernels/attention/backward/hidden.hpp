#pragma once

#include <type_traits>

#include <cute/tensor.hpp>

#include "cute_kernels/attention/backward/key_blocks.hpp"
#include "cute_kernels/attention/backward/places.hpp"
#include "cute_kernels/attention/backward/statistics.hpp"
#include "cute_kernels/attention/backward/steps.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/sm90/finite.hpp"
#include "cute_kernels/sm90/named_barrier.hpp"
#include "cute_kernels/sm90/warpgroup_gemm.hpp"

// Keeps NaN and infinities out of gradients of what a mask hides them from. P and dS are 0 there,
// but 0 times NaN is NaN: so the other factor, K of dQ, Q of dK, dO of dV, is cleared where it is
// not finite. Who does see it has NaN in P or dS by then, from lse or delta; but for dV, to which
// dO is restored in the end. All of it only in calls in which an lse, a delta or a key is not
// finite, or an lse too large (is_alarming()): a NaN that a query sees shows in its lse or delta,
// and the last query sees every key. What shows nowhere before shows in dK (check_gradient()).
namespace cute_kernels::attention {

/// A warp's 16 rows of a (rows, channels) tile of swizzled columns of kColumn channels, in vectors
/// of 16 bytes, two lanes a row. A swizzle keeps rows together.
template <int kRows, int kChannels, int kColumn, class Element>
class WarpRows {
 public:
  CUTLASS_DEVICE WarpRows(Element* tile, int first_row) : tile_(tile + first_row * kColumn) {}

  /// Two bits for each row, set if it is not finite. Of a whole warp.
  CUTLASS_DEVICE uint32_t nonfinite() const {
    bool finite = true;
    for_each([&](Element const* vector) { finite &= sm90::all_finite<1, kVector>(vector, 0); });
    uint32_t const lanes = __ballot_sync(0xffffffff, !finite);
    return lanes | (lanes & 0x55555555u) << 1 | (lanes & 0xaaaaaaaau) >> 1;
  }

  /// Makes what is not finite 0.
  CUTLASS_DEVICE void clear() const {
    for_each([](Element* vector) { sm90::clear_nonfinite<1, kVector>(vector, 0); });
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
  }

 private:
  static constexpr int kVector = 8;
  static constexpr int kLanesOfRow = 2;
  static constexpr int kTurns = kColumn / kVector / kLanesOfRow;

  template <class Function>
  CUTLASS_DEVICE void for_each(Function const& function) const {
    int const lane = threadIdx.x % cutlass::NumThreadsPerWarp;
    int const row = lane / kLanesOfRow;
    CUTLASS_PRAGMA_UNROLL
    for (int column = 0; column < kChannels / kColumn; ++column) {
      CUTLASS_PRAGMA_UNROLL
      for (int turn = 0; turn < kTurns; ++turn) {
        int const at =
            lane % kLanesOfRow * kTurns + (turn + row) % kTurns;  // spread over the banks
        function(tile_ + (column * kRows + row) * kColumn + at * kVector);
      }
    }
  }

  Element* tile_;
};

/// The warp of a consumer warpgroup that calls, counted over all of them from `warpgroup` on.
CUTLASS_DEVICE int consumer_warp(int warpgroup) {
  return warpgroup * cutlass::NumWarpsPerWarpGroup +
         threadIdx.x % cutlass::NumThreadsPerWarpGroup / cutlass::NumThreadsPerWarp;
}

/// Whether some query does not see some key.
template <class Traits, class Params>
CUTLASS_DEVICE bool hides_values(Params const& params, typename Traits::KeyBlock const& coord) {
  return Traits::Variant::kHides || coord.hides_values(params);
}

/// The keys whose scores are the warp's.
template <class Traits>
CUTLASS_DEVICE auto own_keys(typename Traits::SharedStorage& shared, int warpgroup) {
  return WarpRows<Traits::kTileN, Traits::kHeadDim, Traits::kKeyColumns, typename Traits::Element>(
      shared.k.data(), consumer_warp(warpgroup) * 16);
}

/// Raises the alarm if one of the warp's keys is not finite: an infinite key may show in no lse,
/// where all that see it have a score of -inf.
template <class Traits, class Params>
CUTLASS_DEVICE void check_own_keys(Params const& params, typename Traits::KeyBlock const& coord,
                                   typename Traits::SharedStorage& shared, int warpgroup) {
  if (!hides_values<Traits>(params, coord)) return;
  if (own_keys<Traits>(shared, warpgroup).nonfinite() != 0) {
    *params.workspace.alarm = params.call_number;
  }
}

/// The same of a warpgroup's V, where some keys may be seen by no query: then V shows in no delta.
template <class Traits, class Params>
CUTLASS_DEVICE void check_own_values(Params const& params, typename Traits::KeyBlock const& coord,
                                     typename Traits::Element* values) {
  if (!hides_values<Traits>(params, coord)) return;
  WarpRows<Traits::kWarpgroupN, Traits::kHeadDimV, Traits::kValueColumns,
           typename Traits::Element> const own(values, consumer_warp(0) * 16);
  if (own.nonfinite() != 0) *params.workspace.alarm = params.call_number;
}

/// Raises the alarm if dK of the thread's keys is NaN. dP is infinite of huge dO and V, which are
/// finite, also where a query does not see the key: times P, which is 0, it is NaN, and so is then
/// all of the key's dK. Where scores are changed, an infinite query may have a finite lse, as
/// tanh's is, and makes one channel NaN.
template <class Traits, class Params, class Gradient>
CUTLASS_DEVICE void check_gradient(Params const& params, Gradient const& gradient) {
  using namespace cute;
  auto const dk = make_tensor(gradient.data(), sm90::accumulator_rows_cols(gradient.layout()));
  bool spoilt = false;
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < size<0>(dk); ++row) {
    CUTLASS_PRAGMA_UNROLL
    for (int col = 0; col < (Traits::kChanges ? size<1>(dk) : 1); ++col) {
      spoilt |= isnan(dk(row, col));
    }
  }
  if (spoilt) *params.workspace.alarm = params.call_number;
}

/// Of a whole warp.
template <class Traits>
CUTLASS_DEVICE void note_spoilt_keys(typename Traits::SharedStorage& shared, int warpgroup,
                                     uint32_t spoilt) {
  if (threadIdx.x % cutlass::NumThreadsPerWarp == 0) {
    shared.spoilt_keys[consumer_warp(warpgroup)] = spoilt;
  }
  __syncwarp();
}

/// Clears what is not finite in the warp's keys, and notes which they are for HiddenStep. No warp
/// waits for another: S of the others is not looked at, and dQ waits for everyone's dS anyway.
template <class Traits, class Params>
CUTLASS_DEVICE void clear_own_keys(Params const& params, typename Traits::KeyBlock const& coord,
                                   typename Traits::SharedStorage& shared, int warpgroup) {
  if (!hides_values<Traits>(params, coord)) {
    if constexpr (Traits::kAnyCall) note_spoilt_keys<Traits>(shared, warpgroup, 0);
    return;
  }
  auto const keys = own_keys<Traits>(shared, warpgroup);
  uint32_t const spoilt = keys.nonfinite();
  if (spoilt != 0) keys.clear();
  note_spoilt_keys<Traits>(shared, warpgroup, spoilt);
}

/// P, or what P is 2 to the power of: the largest value there is, what is too much of it, and the
/// value of what is not seen. A little more than the largest is what the usual kernel has, too, and
/// calls that raise no alarm have no more: so both have the same bits. At the largest lse of these,
/// and head dim 256, rounding takes an exponent to 0.0053.
struct Probability {
  static constexpr float kLargest = 1.f;
  static constexpr float kTooLarge = 1.f + 0x1p-8f;
  static constexpr float kHidden = 0.f;
};
struct Exponent {
  static constexpr float kLargest = 0.f;
  static constexpr float kTooLarge = 0.0056245f;  // log2(1 + 2^-8): in bfloat16, P is 1
  static constexpr float kHidden = -INFINITY;
};

/// A value, which times `unit` is of Values, or the largest where it is too much.
template <class Values>
CUTLASS_DEVICE float not_too_large(float value, float unit = 1.f) {
  return value * unit > Values::kTooLarge ? Values::kLargest : value;
}

/// What a careful step does.
template <class Traits>
class HiddenStep {
  using SharedStorage = typename Traits::SharedStorage;

 public:
  CUTLASS_DEVICE HiddenStep(SharedStorage const& shared, bool masked, int warpgroup)
      : masked_(masked), spoilt_keys_(shared.spoilt_keys[consumer_warp(warpgroup)]) {}

  /// P hardly above 1, as rounding of a large lse would have it; NaN for a key that is not finite;
  /// 0 where a query does not see the key. Values is Probability or Exponent; `values` times
  /// `unit` are of that.
  template <class Values, class Fragment, class Mask>
  CUTLASS_DEVICE void restrict(Fragment& values, Mask const& mask, int key, int query,
                               float unit = 1.f) const {
    using namespace cute;
    int const row_in_warp = threadIdx.x % 32 / 4;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < size<0>(values); ++row) {
      bool const spoilt = spoilt_keys_ >> 2 * (row_in_warp + 8 * row) & 1;
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(values); ++col) {
        values(row, col) = spoilt ? NAN : not_too_large<Values>(values(row, col), unit);
      }
    }
    if (masked_) mask.apply_transposed(values, key, query, Values::kHidden);
  }

  /// dP - delta: NaN where it is infinite; 0 where a query does not see the key.
  template <class Gradients, class Mask>
  CUTLASS_DEVICE void clear(Gradients&& gradients, Mask const& mask, int key, int query) const {
    using namespace cute;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(gradients); ++i) gradients(i) += gradients(i) - gradients(i);
    if (masked_) mask.apply_transposed(gradients, key, query, 0.f);
  }

  /// The step's Q and dO, of all consumer threads, between everyone's S and dP, and the products
  /// that take them as the other factor.
  CUTLASS_DEVICE void clear_queries(SharedStorage& shared, int stage) const {
    if (!masked_) return;
    constexpr int kThreads = Traits::kConsumers * cutlass::NumThreadsPerWarpGroup;
    constexpr int kElements = Traits::kTileM * Traits::kHeadDim;
    constexpr int kElementsV = Traits::kTileM * Traits::kHeadDimV;
    auto meet = [] { sm90::barrier_sync(sm90::NamedBarrier::kQueriesCleared, 0, kThreads); };
    int const thread = threadIdx.x - cutlass::NumThreadsPerWarpGroup;
    meet();
    sm90::clear_nonfinite<kThreads, kElements>(shared.q.data() + stage * kElements, thread);
    sm90::clear_nonfinite<kThreads, kElementsV>(shared.grad_out.data() + stage * kElementsV,
                                                thread);
    cutlass::arch::fence_view_async_shared();
    if (thread % 32 == 0) shared.queries_cleared[thread / 32] = true;
    meet();
  }

 private:
  bool masked_;
  uint32_t spoilt_keys_;
};

/// Adds what was cleared of dO in a key block's steps to dV of the keys that see it, as P would.
template <class Traits, class Params, class Gradient>
CUTLASS_DEVICE void restore_dv(Params const& params, typename Traits::SharedStorage& shared,
                               typename Traits::KeyBlock const& coord, int key, int column,
                               Gradient& gradient) {
  using namespace cute;
  using Element = typename Traits::Element;
  bool& cleared = shared.queries_cleared[threadIdx.x / 32 - cutlass::NumWarpsPerWarpGroup];
  if (!cleared) return;
  __syncwarp();
  cleared = false;
  auto dv = make_tensor(gradient.data(), sm90::accumulator_rows_cols(gradient.layout()));
  auto const& mask = coord.mask(params);
  int const first[2] = {mask.first_query(key), mask.first_query(key + 8)};
  auto const of_sequence = places_of<Traits, Caller::kThread>(params, coord);
  auto is_seen = [&](int head, int query, int i, bool is_full) {
    if constexpr (Traits::Variant::kHides) {
      auto const places = of_sequence.of_head(head);
      Place const here = places.template at<typename Traits::Variant>(query, key + 8 * i);
      if (!is_full && !Traits::Variant::Hooks::mask(here, params.variant)) return false;
    }
    if constexpr (std::decay_t<decltype(mask)>::kHasLeftEnd) {
      if (query >= mask.end_query(key + 8 * i)) return false;
    }
    return query >= first[i];
  };
  TensorView const& view = params.grad_out;
  for (QuerySteps<Traits, Params> step(params, coord); step.valid(); step.advance()) {
    if (!step.hides_some()) continue;
    int const end = min((step.block() + 1) * Traits::kTileM, mask.seqlen_q);
    auto const* grad_out = static_cast<Element const*>(view.data) + coord.first_of_q(view) +
                           step.head() * view.head_stride + column;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int query = step.block() * Traits::kTileM; query < end; ++query) {
      CUTLASS_PRAGMA_UNROLL
      for (int col = 0; col < size<1>(dv); ++col) {
        int const offset = 8 * (col / 2) + col % 2;
        if (column + offset >= params.head_dim_v) continue;
        Element const value = grad_out[query * view.seqlen_stride + offset];
        if (sm90::is_finite(value)) continue;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (is_seen(step.head(), query, i, step.is_full()))
            dv(i, col) += static_cast<float>(value);
        }
      }
    }
  }
}

}  // namespace cute_kernels::attention
