#pragma once

#include <cstdint>

#include "cute_kernels/attention/call.hpp"
#include "cute_kernels/attention/variant/arguments.hpp"

// Plain structs that the framework binding fills and the launch code reads. Nothing here needs a
// CUDA compiler.
namespace cute_kernels::attention {

/// A (batch, seqlen, heads, head_dim) tensor in device memory. Strides count elements; the last
/// dimension is contiguous. Packed sequences are one batch entry.
struct TensorView {
  void* data;
  int64_t batch_stride;
  int64_t seqlen_stride;
  int64_t head_stride;
};

/// A sequence's rows of a head, from first_row of the batch entry on.
template <class Element>
constexpr Element* rows_of(TensorView const& view, int batch, int head, int first_row) {
  return static_cast<Element*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         first_row * view.seqlen_stride;
}

/// The facts about a GPU that shape a launch.
struct Device {
  int index;
  int multiprocessors;     // that the call's kernels may keep to themselves
  bool is_shared = false;  // the GPU has more, which the call leaves alone
};

/// The GPU for a call that leaves `margin` of its multiprocessors alone. One is always left to the
/// call.
constexpr Device leaving(Device device, int64_t margin) {
  if (margin <= 0) return device;
  bool const is_most = margin >= device.multiprocessors;
  return {device.index, is_most ? 1 : device.multiprocessors - static_cast<int>(margin), true};
}

/// Whether kernels that wait for what is before them may start early: they would take, and keep
/// until then, the multiprocessors that a call before them leaves alone.
constexpr bool may_start_early(Device const& device) { return !device.is_shared; }

/// One call of exact attention, forward. Requires heads_q % heads_kv == 0, every pointer and byte
/// stride a multiple of 16, batch, heads and seqlen_q at least 1, a row that can_take() the call;
/// seqlen_k may be 0.
struct ForwardProblem {
  AttentionCall call;
  TensorView q;
  TensorView k;
  TensorView v;
  TensorView out;
  float* lse;       // (batch, heads_q, seqlen_q), packed (heads_q, total_q), natural logarithm
  void* workspace;  // 16-byte aligned, contents undefined on entry
  Device device;
  VariantArguments const* variant;  // what the row's hooks are told, or null
};

/// The gradients of one call of exact attention. Requires what ForwardProblem does.
struct BackwardProblem {
  AttentionCall call;
  bool deterministic;   // the same bits from run to run: dQ is summed in a fixed order
  bool float_grads;     // grad_q, grad_k and grad_v are of float, not of the inputs' type
  bool adds_to_grad_q;  // what is there stays, and is added to; of float only
  TensorView q;
  TensorView k;
  TensorView v;
  TensorView out;
  TensorView grad_out;
  float const* lse;       // as forward wrote it; -inf where a row sees nothing
  float const* grad_lse;  // the gradient of lse, or null
  float const* sinks;     // (heads_q), what forward's call had, or null
  TensorView grad_q;
  TensorView grad_k;
  TensorView grad_v;
  float* grad_sinks;  // (batch, heads_q), packed (1, heads_q): of each batch entry's rows; or null
  void* workspace;    // 256-byte aligned, contents undefined on entry
  Device device;
  VariantArguments const* variant;  // as forward's, with the gradients of captured tensors
};

}  // namespace cute_kernels::attention
