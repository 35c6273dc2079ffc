#pragma once

#include <type_traits>

namespace cute {

/// Of a mode of the tests' fragments, which have one element, or of all.
template <int, class Fragment>
constexpr std::integral_constant<int, 1> size(Fragment const&) {
  return {};
}
template <class Fragment>
constexpr std::integral_constant<int, 1> size(Fragment const&) {
  return {};
}

}  // namespace cute
