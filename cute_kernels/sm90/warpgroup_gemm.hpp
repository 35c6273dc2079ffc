#pragma once

#include <cutlass/numeric_conversion.h>
#include <cute/tensor.hpp>

#include "cute_kernels/sm90/uniform.hpp"

// Helpers around WGMMA for one warpgroup: issue without waiting, and the register layouts of its
// fragments.
namespace cute_kernels::sm90 {

enum class Accumulate : bool { kNo = false, kYes = true };

/// The compiler keeps what the fragment has, and reads of it, on this side.
template <class Fragment>
CUTLASS_DEVICE void fence_read_operand(Fragment const& fragment) {
  cute::warpgroup_fence_operand(const_cast<Fragment&>(fragment));
}

inline constexpr int kAllBlocks = 1 << 30;

/// C (+)= A * B over the k-blocks of the fragments from kFirstBlock up to before kEndBlock, as part
/// of the group of WGMMAs that is being issued.
template <Accumulate kAccumulate, int kFirstBlock = 0, int kEndBlock = kAllBlocks, class TiledMma,
          class FragmentA, class FragmentB, class FragmentC>
CUTLASS_DEVICE void add_gemm(TiledMma mma, FragmentA const& a, FragmentB const& b, FragmentC& c) {
  mma.accumulate_ =
      kAccumulate == Accumulate::kYes ? cute::GMMA::ScaleOut::One : cute::GMMA::ScaleOut::Zero;
  CUTLASS_PRAGMA_UNROLL
  for (int k = kFirstBlock; k < cute::size<2>(a) && k < kEndBlock; ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), c);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
}

/// The same operand in shared memory, whose descriptors are made where they are used: of those that
/// do not change in a loop the compiler would keep one in uniform registers for each k-block, and
/// there are not enough of them.
template <class Fragment>
CUTLASS_DEVICE auto described_here(Fragment const& fragment) {
  auto descriptor = fragment.data();
  asm volatile("" : "+r"(descriptor.desc_.reg32_[0]));
  return cute::make_tensor(descriptor, fragment.layout());
}

/// The same operand in shared memory, of which the compiler knows that all threads of a warp have
/// it at the same place: it may stand in uniform registers.
template <class Fragment>
CUTLASS_DEVICE auto uniform_operand(Fragment const& fragment) {
  auto descriptor = fragment.data();
  descriptor.desc_.reg32_[0] = uniform(descriptor.desc_.reg32_[0]);
  return cute::make_tensor(descriptor, fragment.layout());
}

/// The operand that stands so many bytes behind another one, a multiple of its swizzle's period.
template <class Fragment>
CUTLASS_DEVICE auto moved(Fragment const& fragment, int bytes) {
  auto descriptor = fragment.data();
  descriptor.desc_.reg32_[0] += bytes / 16;  // a descriptor counts 16 bytes
  return cute::make_tensor(descriptor, fragment.layout());
}

/// Issues C (+)= A * B as one committed group of asynchronous WGMMAs over the k-blocks of the
/// fragments, all or those from kFirstBlock up to before kEndBlock. The caller waits with
/// cute::warpgroup_wait<N>() before it touches C, or A when A lives in registers.
template <Accumulate kAccumulate, int kFirstBlock = 0, int kEndBlock = kAllBlocks, class TiledMma,
          class FragmentA, class FragmentB, class FragmentC>
CUTLASS_DEVICE void issue_gemm(TiledMma mma, FragmentA const& a, FragmentB const& b, FragmentC& c) {
  constexpr bool kAInRegisters =
      !cute::is_base_of<cute::GMMA::DescriptorIterator, typename TiledMma::FrgTypeA>::value;
  if constexpr (kAInRegisters) fence_read_operand(a);
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_arrive();
  add_gemm<kAccumulate, kFirstBlock, kEndBlock>(mma, a, b, c);
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(c);
  if constexpr (kAInRegisters) fence_read_operand(a);
}

/// Two of them, one behind the other, as issue_gemm twice: C = A * B with A in shared memory, then
/// E += D * F with D in registers. What registers hold is fenced once for both.
template <class TiledMma1, class TiledMma2, class A, class B, class C, class D, class F, class E>
CUTLASS_DEVICE void issue_gemms(TiledMma1 first, A const& a, B const& b, C& c, TiledMma2 second,
                                D const& d, F const& f, E& e) {
  fence_read_operand(d);
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_fence_operand(e);
  cute::warpgroup_arrive();
  add_gemm<Accumulate::kNo>(first, a, b, c);
  cute::warpgroup_commit_batch();
  add_gemm<Accumulate::kYes>(second, d, f, e);
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(c);
  cute::warpgroup_fence_operand(e);
  fence_read_operand(d);
}

/// cute::warpgroup_wait<0>() in other words, which the compiler cannot merge with one on another
/// path.
CUTLASS_DEVICE void warpgroup_wait_all() {
  asm volatile("wgmma.wait_group.sync.aligned 0; // told apart by this text" ::: "memory");
}

/// Views a 64 x N accumulator fragment ((2, 2, N/8), 1, 1) as (row, column): each thread owns 2
/// rows, 8 apart, and pairs of adjacent columns every 8.
template <class Layout>
CUTLASS_DEVICE constexpr auto accumulator_rows_cols(Layout const& layout) {
  using namespace cute;
  static_assert(rank(Layout{}) == 3 && rank(get<0>(Layout{})) == 3);
  return make_layout(make_layout(get<0, 1>(layout), get<1>(layout)),
                     make_layout(get<0, 0>(layout), get<0, 2>(layout), get<2>(layout)));
}

template <class Fragment>
CUTLASS_DEVICE auto rows_cols(Fragment& fragment) {
  return cute::make_tensor(fragment.data(), accumulator_rows_cols(fragment.layout()));
}

/// Views a 64 x N accumulator fragment as the A operand of a 16-bit WGMMA whose k is that N: 16
/// columns, which are two runs of 8 in the accumulator, make one k-block.
template <class Layout>
CUTLASS_DEVICE constexpr auto accumulator_as_operand_a(Layout const& layout) {
  using namespace cute;
  static_assert(rank(Layout{}) == 3 && rank(get<0>(Layout{})) == 3);
  auto halves = logical_divide(get<0, 2>(layout), _2{});  // (2, N/16)
  return make_layout(make_layout(get<0, 0>(layout), get<0, 1>(layout), get<0>(halves)),
                     get<1>(layout), make_layout(get<1>(halves), get<2>(layout)));
}

/// Rounds a fragment of floats to `To`, keeping the order of its registers.
template <class To, class FragmentIn, class FragmentOut>
CUTLASS_DEVICE void convert_fragment(FragmentIn const& in, FragmentOut& out) {
  constexpr int kCount = decltype(cute::size(in))::value;
  static_assert(decltype(cute::size(out))::value == kCount);
  cutlass::NumericArrayConverter<To, typename FragmentIn::value_type, kCount> convert;
  *reinterpret_cast<cutlass::Array<To, kCount>*>(out.data()) = convert(
      *reinterpret_cast<cutlass::Array<typename FragmentIn::value_type, kCount> const*>(in.data()));
}

}  // namespace cute_kernels::sm90
