"""The C++ of a user's variant: what a kernel does to scores, which keys it hides, how it weighs P.

The bodies of the hooks are the user's. What stands around them is written here; the headers in
cute_kernels/attention/variant explain it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

COORDINATES = {  # as hooks know them, and as axes of captured tensors
    "batch": "kBatch",
    "head": "kHead",
    "query": "kQuery",
    "key": "kKey",
    "query_row": "kQueryRow",
    "key_row": "kKeyRow",
}
CPP_TYPES = {
    "float32": "float",
    "float16": "cutlass::half_t",
    "bfloat16": "cutlass::bfloat16_t",
    "int64": "int64_t",
    "int32": "int32_t",
    "int16": "int16_t",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "bool": "bool",
}
# What hooks know beside them, as ints.
FACTS = ("position", "seqlen_q", "seqlen_k")
FLOATING = ("float32", "float16", "bfloat16")
NUMBER_FIELDS = {"float32": "as_float", "int32": "as_int"}
MOST_CAPTURED = 8  # kMostCaptured and kMostAxes
MOST_AXES = 4

# Of a captured tensor: a coordinate, a size of its own, or None for any size.
Axes = tuple["str | int | None", ...]

# Words that no captured value may be called: of C++, of the hooks' own arguments and functions.
_WORDS = """
    alignas alignof and asm auto bool break case catch char class const constexpr const_cast
    continue decltype default delete do double dynamic_cast else enum explicit export extern false
    float for friend goto if inline int long mutable namespace new noexcept not nullptr operator or
    private protected public register reinterpret_cast return short signed sizeof static
    static_assert static_cast struct switch template this throw true try typedef typeid typename
    union unsigned using virtual void volatile wchar_t while xor score mask weight here captured_
    captured Score Plain Variable Axis std cutlass
    and_eq bitand bitor char8_t char16_t char32_t compl concept consteval constinit co_await
    co_return co_yield not_eq or_eq requires thread_local xor_eq NAN INFINITY NULL
    uniform exp exp2 log log2 sqrt rsqrt sin cos tanh sigmoid abs max min
"""
RESERVED = {*_WORDS.split(), *COORDINATES, *FACTS}


class Tensor(NamedTuple):
    """A captured tensor."""

    name: str
    dtype: str
    axes: Axes

    @property
    def is_of_rows(self) -> bool:
        """Whether its gradient is a sum over queries and keys."""
        return set(self.axes) <= {"batch", "head"}


class Hooks(NamedTuple):
    """All of a variant that decides about its kernels."""

    name: str
    score: str | None
    mask: str | None
    weight: str | None
    score_gradient: str | None
    tensors: tuple[Tensor, ...]
    numbers: tuple[tuple[str, str], ...]
    block_mask: bool = False  # for calls with one

    @property
    def key(self) -> str:
        """The name and a hash of the rest: another variant of the same name has another key."""
        name = f"{self.name}_blocks" if self.block_mask else self.name
        return f"{name}_{hashlib.sha256(repr(self).encode()).hexdigest()[:8]}"

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)


# By key: what rows with the column "variant" are compiled from.
KNOWN: dict[str, Hooks] = {}


def hooks_source(hooks: Hooks, gradients: Sequence[str]) -> str:
    """A struct `Hooks` for HookedVariant, with gradients of these captured tensors."""
    axes = {axis for tensor in hooks.tensors for axis in tensor.axes}
    flags = {
        "kScore": hooks.score is not None,
        "kMask": hooks.mask is not None,
        "kWeight": hooks.weight is not None,
        "kScoreGradient": hooks.score_gradient is not None,
        # What heads or batch entries share: the same for all that the mask does not ask for.
        "kMaskAsksHead": hooks.mask is not None and _may_ask("head", hooks.mask),
        "kMaskAsksBatch": hooks.mask is not None and _may_ask("batch", hooks.mask),
        "kIndexesQueries": bool(axes & {"query", "query_row"}),
        "kIndexesKeys": bool(axes & {"key", "key_row"}),
        "kHasBlockMask": hooks.block_mask,
    }
    kinds = ", ".join(
        "Gradient::kOfHeads" if hooks.tensor(name).is_of_rows else "Gradient::kOfScores"
        for name in gradients
    )
    lines = [
        *(f"  static constexpr bool {name} = {str(on).lower()};" for name, on in flags.items()),
        f"  static constexpr int kGradients = {len(gradients)};",
        f"  static constexpr Gradient kKinds[] = {{{kinds or 'Gradient::kNone'}}};",
    ]
    parts = []
    if hooks.score is not None:
        parts.append(_function(hooks, "score", hooks.score, gradients))
    if hooks.score_gradient is not None:
        parts.append(_function(hooks, "score_gradient", hooks.score_gradient, ()))
    if hooks.mask is not None:
        parts.append(_function(hooks, "mask", hooks.mask, ()))
    if hooks.weight is not None:
        parts.append(_function(hooks, "weight", hooks.weight, ()))
    return "struct Hooks {\n" + "\n".join(lines) + "\n\n" + "\n".join(parts) + "};\n"


def _function(hooks: Hooks, hook: str, body: str, gradients: Sequence[str]) -> str:
    """A hook as a static member function. The user's body begins at line 1 of a file of its
    own, so that the compiler's messages name its lines."""
    values = [f"    auto const {name} = here.{name};" for name in (*COORDINATES, *FACTS)]
    for i, tensor in enumerate(hooks.tensors):
        reading = "Plain"
        if tensor.name in gradients:
            slope = 1 + list(gradients).index(tensor.name)
            reading = (
                f"std::conditional_t<std::is_same_v<Score, float>, Plain, "
                f"Variable<{1 + len(gradients)}, {slope}>>"
            )
        axes = "".join(
            f", Axis::{COORDINATES.get(axis, 'kFree') if isinstance(axis, str) else 'kFree'}"
            for axis in tensor.axes
        )
        values.append(
            f"    auto const {tensor.name} = captured<{CPP_TYPES[tensor.dtype]}, {reading}{axes}>"
            f"(captured_.tensors[{i}]);"
        )
    for i, (name, dtype) in enumerate(hooks.numbers):
        values.append(f"    auto const {name} = captured_.numbers[{i}].{NUMBER_FIELDS[dtype]};")
    used = [line for line in values if _is_used(line.split()[2], body)]
    template, result, arguments = "", {"mask": "bool"}.get(hook, "float"), ""
    if hook == "score":
        template, result, arguments = "  template <class Score>\n", "Score", "Score score, "
    elif hook == "score_gradient":
        arguments = "float score, "
    declarations = "".join(f"{line}\n" for line in used)
    return (
        f"{template}  CUTLASS_DEVICE static {result} {hook}({arguments}"
        "[[maybe_unused]] Place const& here,\n"
        "      [[maybe_unused]] VariantArguments const& captured_) {\n"
        f"{declarations}"
        f'#line 1 "{hook} of variant {hooks.name}"\n'
        f"{body.rstrip()}\n"
        '#line 1 "hooks.py"\n'
        "  }\n"
    )


def _may_ask(coordinate: str, body: str) -> bool:
    """By its name, or of the place as a whole: `auto [b, h, q, k, ...] = here;`."""
    return _is_used(coordinate, body) or _is_used("here", body)


def _is_used(name: str, body: str) -> bool:
    return re.search(rf"\b{name}\b", body) is not None
