#pragma once

#include <cstdint>
#include <type_traits>

#include <cutlass/fast_math.h>

#include "cute_kernels/attention/backward/slots.hpp"
#include "cute_kernels/attention/problem.hpp"
#include "cute_kernels/attention/variant/shared_mask.hpp"

namespace cute_kernels::attention {

/// More clusters of key blocks than any call has: who draws this ends. For lengths that make no
/// sense.
inline constexpr int kNoMoreKeyBlocks = 1 << 29;

/// What the three kernels of a backward call hand to one another. Rows are (batch, head of q), of
/// packed sequences heads; queries are padded to blocks of kTileM.
struct BackwardWorkspace {
  cutlass::FastDivmod m_blocks;  // numbers of them (slots.hpp)
  void* statistics;              // [rows][m_blocks] Traits::Statistics
  float* dq;                     // [rows][m_blocks][kDqSlices][kSliceFloats], not yet scaled
  int* turns;  // [rows][m_blocks][kCluster], contributions added to dq, or null: in no order
  int* careful_turns;  // the same of the careful kernel
  uint64_t* alarm;     // the call's number if a query is alarming, anything else if none is
  int* drawn;          // how many key blocks CTAs have drawn
  int* careful_drawn;
  int* cleared;           // of each group of heads, how many shares of dQ are cleared (clear.hpp)
  float* sinks;           // [rows][m_blocks], what the queries add to the sink's gradient, or null
  uint32_t* shared_mask;  // what a mask hook shows all heads (variant/shared_mask.hpp), or null
  int64_t bytes;
};

/// Threads of a row of so many vectors: a power of 2, so that no row is two warps'.
constexpr int lanes_of_row(int vectors) {
  int lanes = 1;
  while (lanes < vectors) lanes *= 2;
  return lanes;
}

/// Whether CTAs add to dQ in a fixed order: where it is asked for, and where it is faster. The
/// first to come writes, so that nobody clears dQ, which counts where few come; they hardly wait
/// where there are many heads.
template <class Traits>
bool adds_in_order(BackwardProblem const& problem) {
  constexpr int kFewTurns = 8;
  if (Traits::kAnyCall) return problem.deterministic;  // turns of other calls are not measured
  CallSizes const& sizes = problem.call.sizes;
  bool const few_turns = sizes.seqlen_k <= kFewTurns * Traits::kTileN * Traits::kCluster;
  bool const many_heads =
      int64_t{sizes.batch} * sizes.heads_kv * Traits::kCluster >= problem.device.multiprocessors;
  return problem.deterministic || (few_turns && many_heads);
}

template <class Traits>
BackwardWorkspace backward_workspace(BackwardProblem const& problem) {
  AttentionCall const& call = problem.call;
  BackwardWorkspace result;
  int const m_blocks = query_block_numbers(call, Traits::kTileM);
  result.m_blocks = cutlass::FastDivmod(m_blocks);
  int64_t const blocks = int64_t{tensor_batch(call)} * call.sizes.heads_q * m_blocks;
  char* next = static_cast<char*>(problem.workspace);
  auto carve = [&](auto*& pointer, int64_t count, int64_t item_bytes) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
    next += (count * item_bytes + 255) / 256 * 256;
  };
  carve(result.dq, blocks * Traits::kTileM * Traits::kHeadDim, sizeof(float));
  carve(result.statistics, blocks, sizeof(typename Traits::Statistics));
  carve(result.alarm, 1, sizeof(uint64_t));
  carve(result.drawn, 1, sizeof(int));
  carve(result.careful_drawn, 1, sizeof(int));
  carve(result.cleared, int64_t{tensor_batch(call)} * call.sizes.heads_q, sizeof(int));
  carve(result.careful_turns, blocks * Traits::kCluster, sizeof(int));
  result.turns = nullptr;
  if (adds_in_order<Traits>(problem)) carve(result.turns, blocks * Traits::kCluster, sizeof(int));
  result.sinks = nullptr;
  if (problem.sinks != nullptr) carve(result.sinks, blocks, sizeof(float));
  result.shared_mask = nullptr;
  if constexpr (Traits::kSharesMask) {
    int64_t const bytes =
        bytes_of_shared_mask<typename Traits::Variant, Traits::kTileM, MaskRows::kKeys>(
            call, problem.variant);
    if (bytes > 0) carve(result.shared_mask, bytes, 1);
  }
  result.bytes = next - static_cast<char*>(problem.workspace);
  return result;
}

}  // namespace cute_kernels::attention
