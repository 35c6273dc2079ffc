#pragma once

#include <atomic>
#include <mutex>
#include <string_view>

namespace cute_kernels::attention {

/// A pass's kernels: those of the build in the order of tile_configs.json, then those that were
/// added, in the order in which they came. What was once in the table stays, at its address;
/// readers need no lock.
template <class Kernel>
class KernelTable {
  struct Block {
    Kernel const* kernels;
    int count;
    std::atomic<Block const*> next{nullptr};
  };

 public:
  class Iterator {
   public:
    explicit Iterator(Block const* block) : block_(block) { skip_ended(); }

    Kernel const& operator*() const { return block_->kernels[index_]; }
    Iterator& operator++() {
      ++index_;
      skip_ended();
      return *this;
    }
    bool operator!=(Iterator const& other) const {
      return block_ != other.block_ || index_ != other.index_;
    }

   private:
    void skip_ended() {
      while (block_ != nullptr && index_ == block_->count) {
        block_ = block_->next.load(std::memory_order_acquire);
        index_ = 0;
      }
    }

    Block const* block_;
    int index_ = 0;
  };

  constexpr KernelTable(Kernel const* built, int count) : built_{built, count} {}

  Iterator begin() const { return Iterator(&built_); }
  Iterator end() const { return Iterator(nullptr); }

  /// Whether the build has kernels of the pass.
  bool is_built() const { return built_.count > 0; }

  /// Adds a kernel that lives as long as the process. False if there is one of its name.
  bool add(Kernel const& kernel) {
    std::lock_guard const lock(mutex_);
    for (Kernel const& there : *this) {
      if (std::string_view(there.config.name) == kernel.config.name) return false;
    }
    Block* const block = new Block{&kernel, 1};  // never freed: a reader may be there
    last_->next.store(block, std::memory_order_release);
    last_ = block;
    return true;
  }

 private:
  Block built_;
  Block* last_ = &built_;
  std::mutex mutex_;
};

}  // namespace cute_kernels::attention
