#pragma once

namespace cute {

/// Of a mode of the tests' fragments, which have one element, or of all.
template <int, class Fragment>
constexpr int size(Fragment const&) {
  return 1;
}
template <class Fragment>
constexpr int size(Fragment const&) {
  return 1;
}

}  // namespace cute
