#pragma once

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

namespace cute_kernels::sm90 {

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
