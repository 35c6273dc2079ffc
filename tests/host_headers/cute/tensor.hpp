#pragma once

namespace cute {

/// Of the tests' fragments, which have one element.
template <int, class Fragment>
constexpr int size(Fragment const&) {
  return 1;
}

}  // namespace cute
