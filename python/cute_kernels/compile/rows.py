"""What rows of a table of tiles are made of, and what a multiprocessor of sm_90 has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """A column of the table, and the constant of the C++ Tile that carries it, if any does."""

    name: str
    type: type
    default: Any = REQUIRED
    constant: str | None = None


@dataclass(frozen=True)
class Pass:
    """A kind of rows. `cpp` names it in C++: "Forward" for ForwardTraits, ForwardProblem,
    ForwardKernel, forward_kernels and launch_forward."""

    name: str  # of the table, and "pass" in tile_configs.json
    cpp: str
    launch_header: str
    table_header: str
    fields: tuple[Field, ...]
    dtypes: Mapping[str, tuple[str, str]]  # name: (C++ element, the kernel table's enumerator)
    element: str  # what Tile calls the C++ element
    config: tuple[str, ...]  # the columns that its C++ config has beside RowConfig's, in its order
    shared_memory: Callable[[Row], dict[str, int]]  # bytes by part, as SharedStorage has them
    registers: Callable[[Row], dict[str, int]]  # 32-bit registers of a consumer thread by use
    problems: Callable[[Row], list[str]]  # what is wrong with a row of this pass alone
    swizzle: int = 64  # what head dims are multiples of: the elements of a swizzled row
    workspace: bool = False  # whether a launch needs memory of the caller's
    variants: bool = False  # whether the C++ Tile names a Variant
    output_slices: int = 1  # in which warpgroups have columns of O, each at most WGMMA's N
    # Of rows with `grouped`: launch_header, and what Traits and functions are called after.
    of_groups: tuple[str, str] | None = None

    @property
    def function(self) -> str:
        return function_name(self.cpp)

    def source_of(self, row: Row) -> tuple[str, str]:
        """The launch header of a row, and what its Traits and functions are called after."""
        if self.of_groups is not None and row["grouped"]:
            return self.of_groups
        return self.launch_header, self.cpp


def function_name(cpp: str) -> str:
    return re.sub(r"(?<=.)([A-Z])", r"_\1", cpp).lower()


DTYPES = {
    "bf16": ("cutlass::bfloat16_t", "ElementType::kBFloat16"),
    "fp16": ("cutlass::half_t", "ElementType::kFloat16"),
}
ELEMENT_BYTES = 2
WARPGROUP_M = 64
WARPGROUP_THREADS = 128
SHARED_BYTES = 227 * 1024  # what a block of sm_90 can have
SHARED_BYTES_OF_ALL = 228 * 1024  # and all blocks of a multiprocessor,
SHARED_BYTES_RESERVED = 1024  # with what each of them has beside its own
SWIZZLE_BYTES = 1024  # every buffer, and so the whole, is aligned to the 128-byte swizzle's period
# Row maxima and sums, addresses, barrier phases, loop counters: what no kernel does without.
WORKING_REGISTERS = 16


# A new column is a new line here and a constant that the pass's traits read.
HEAD = (
    Field("name", str),
    Field("dtypes", list),
    Field("head_dim", int, REQUIRED, "kHeadDim"),
)


def aligned(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: -(-size // SWIZZLE_BYTES) * SWIZZLE_BYTES for name, size in parts.items()}
