#pragma once

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

namespace cute_kernels::sm90 {

/// One arrival if `condition`. The address is not behind a branch, and so stays what is the same in
/// all threads where the barrier is.
CUTLASS_DEVICE void arrive_if(bool condition, cutlass::arch::ClusterBarrier const& barrier) {
  asm volatile(
      "{\n"
      ".reg .pred condition;\n"
      "setp.ne.b32 condition, %1, 0;\n"
      "@condition mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}"
      :
      : "r"(cute::cast_smem_ptr_to_uint(&barrier)), "r"(static_cast<int>(condition))
      : "memory");
}

/// CUTLASS's pipeline of TMA loads within one CTA. Its own consumer_release, told of no cluster,
/// speaks to the cluster's first CTA, whichever CTA it is called in.
template <int kStages>
class TmaPipeline : public cutlass::PipelineTmaAsync<kStages> {
  using Base = cutlass::PipelineTmaAsync<kStages>;

 public:
  CUTLASS_DEVICE TmaPipeline(typename Base::SharedStorage& storage,
                             typename Base::Params const& params)
      : Base(storage, params, cute::Shape<cute::_1, cute::_1, cute::_1>{}),
        empty_(storage.empty_barrier_) {}

  CUTLASS_DEVICE void consumer_release(typename Base::PipelineState const& state) {
    empty_[state.index()].arrive();
  }

 private:
  typename Base::EmptyBarrier* empty_;
};

}  // namespace cute_kernels::sm90
