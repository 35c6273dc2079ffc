#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>

#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::binding {

/// The kernels of a pass that were measured to be the fastest for a kind of calls: of a dtype, head
/// dims, a mask, and as many heads in all, queries and keys, in powers of two.
///
/// A map that readers may have found is never changed: they need no lock. Nor is it freed; there
/// are as many as there were measurements.
template <class Kernel>
class MeasuredChoice {
  using Kind = std::array<int, 7>;
  using Kinds = std::map<Kind, Kernel const*>;

 public:
  /// Null where nothing was measured.
  template <class Dtype>
  Kernel const* find(Dtype dtype, attention::AttentionCall const& call) const {
    Kinds const* const kinds = kinds_.load(std::memory_order_acquire);
    if (kinds == nullptr) return nullptr;
    auto const found = kinds->find(kind_of(dtype, call));
    if (found == kinds->end()) return nullptr;
    // A window is of a causal call's or a full one's kind, but not every kernel may take it.
    return attention::can_take(found->second->config, dtype, call) ? found->second : nullptr;
  }

  void set(attention::AttentionCall const& call, Kernel const& kernel) {
    std::lock_guard const lock(mutex_);
    Kinds const* const before = kinds_.load(std::memory_order_relaxed);
    Kinds* const kinds = before == nullptr ? new Kinds : new Kinds(*before);
    (*kinds)[kind_of(kernel.config.dtype, call)] = &kernel;
    kinds_.store(kinds, std::memory_order_release);
  }

 private:
  /// n is above 2^(result - 1) and at most 2^result.
  static int power_of_two(int64_t n) {
    int power = 0;
    while (int64_t{1} << power < n) ++power;
    return power;
  }

  template <class Dtype>
  static Kind kind_of(Dtype dtype, attention::AttentionCall const& call) {
    attention::CallSizes const& sizes = call.sizes;
    return {static_cast<int>(dtype),
            sizes.head_dim,
            sizes.head_dim_v,
            call.mask.right ? 1 : 0,
            power_of_two(int64_t{sizes.batch} * sizes.heads_q),
            power_of_two(sizes.seqlen_q),
            power_of_two(sizes.seqlen_k)};
  }

  std::atomic<Kinds const*> kinds_{nullptr};
  std::mutex mutex_;
};

template <class Kernel>
inline MeasuredChoice<Kernel> measured_choice;

/// The automatic choice: what was measured for such calls, else what the rows' columns say. Null
/// where no kernel may take the call.
inline attention::ForwardKernel const* automatic_choice(attention::ElementType dtype,
                                                        attention::AttentionCall const& call,
                                                        int multiprocessors) {
  auto const* const measured = measured_choice<attention::ForwardKernel>.find(dtype, call);
  return measured != nullptr ? measured : attention::choose_forward(dtype, call, multiprocessors);
}

/// The same of a pass whose rows have no estimate.
template <class Kernel, class Dtype>
Kernel const* automatic_choice(attention::KernelTable<Kernel> const& kernels, Dtype dtype,
                               attention::AttentionCall const& call) {
  Kernel const* const measured = measured_choice<Kernel>.find(dtype, call);
  return measured != nullptr ? measured : attention::choose_fitting(kernels, dtype, call);
}

}  // namespace cute_kernels::binding
