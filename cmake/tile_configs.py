"""Turns the table of tiles into kernels to compile: one .cu per kernel, a registry, a JSON copy.

    python cmake/tile_configs.py --table FILE --out FOLDER [--head-dims "64;128"] [--dtypes bf16]

Prints the written sources, separated by semicolons. A row that cannot fit ends it with status 1 and
the arithmetic on stderr. CMake runs this when it configures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Row = dict[str, Any]

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """A column of the table, and the constant of the C++ Tile that carries it, if any does."""

    name: str
    type: type
    default: Any = REQUIRED
    constant: str | None = None


# A new column is a new line here and a constant that ForwardTraits reads.
FIELDS = (
    Field("name", str),
    Field("dtypes", list),
    Field("head_dim", int, REQUIRED, "kHeadDim"),
    Field("head_dim_v", int, None, "kHeadDimV"),  # None: head_dim
    Field("mask", str, "any"),
    Field("tile_m", int),
    Field("tile_n", int, REQUIRED, "kTileN"),
    Field("stages", int, 2, "kStages"),
    Field("pingpong", bool, True, "kPingpong"),
    Field("overlap", bool, True, "kOverlap"),
    Field("separate_output", bool, False, "kSeparateOutput"),
    Field("speed", float, 1.0),
    Field("overhead", int, 0),
    Field("why", str),
)
# Rows of FP8 kernels (forward/fp8_traits.hpp).
FP8_FIELDS = (
    Field("name", str),
    Field("dtypes", list),
    Field("head_dim", int, REQUIRED, "kHeadDim"),
    Field("tile_m", int),
    Field("tile_n", int, REQUIRED, "kTileN"),
    Field("stages", int, 2, "kStages"),
    Field("pingpong", bool, True, "kPingpong"),
    Field("overlap", bool, True, "kOverlap"),
    Field("sum_by_mma", bool, False, "kSumByMma"),
    Field("why", str),
)
DERIVED = (Field("consumer_warpgroups", int, REQUIRED, "kConsumerWarpgroups"),)

DTYPES = {  # name: (C++ element, registry's enumerator)
    "bf16": ("cutlass::bfloat16_t", "kBFloat16"),
    "fp16": ("cutlass::half_t", "kFloat16"),
}
FP8_DTYPES = {  # of Q and K: (C++ element, registry's enumerator)
    "e4m3": ("cutlass::float_e4m3_t", "kE4m3"),
    "int8": ("int8_t", "kInt8"),
}
SCALE_ROWS = 64  # keys that share a scale
MASKS = {"any": "kAny", "full": "kFull", "causal": "kCausal"}

ELEMENT_BYTES = 2
WARPGROUP_M = 64
WARPGROUP_THREADS = 128
SHARED_BYTES = 227 * 1024  # what a block of sm_90 can have
SWIZZLE_BYTES = 1024  # every buffer, and so the whole, is aligned to the 128-byte swizzle's period
# What setmaxnreg leaves a consumer thread (forward/traits.hpp); one consumer warpgroup keeps the
# compiler's limit.
CONSUMER_REGISTERS = {1: 255, 2: 240, 3: 160, 4: 112}
# Row maxima and sums, addresses, barrier phases, loop counters: what no kernel does without.
WORKING_REGISTERS = 16


class TableError(ValueError):
    """A row, or the table, cannot become kernels; the message says why."""


def shared_memory(row: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of shared memory by part, as ForwardTraits::SharedStorage lays them out."""
    stages, consumers = row["stages"], row["consumer_warpgroups"]
    k = stages * row["tile_n"] * row["head_dim"] * ELEMENT_BYTES
    v = stages * row["tile_n"] * row["head_dim_v"] * ELEMENT_BYTES
    q = consumers * WARPGROUP_M * row["head_dim"] * ELEMENT_BYTES
    o = consumers * WARPGROUP_M * row["head_dim_v"] * ELEMENT_BYTES if row["separate_output"] else 0
    # full and empty, 8 bytes each: for every stage of K and V, and for every warpgroup's Q
    barriers = 2 * 8 * (2 * stages + consumers)
    barriers = -(-barriers // SWIZZLE_BYTES) * SWIZZLE_BYTES
    return {"K": k, "V": v, "Q": q, "O": o, "barriers": barriers}


def registers(row: Mapping[str, Any]) -> dict[str, int]:
    """32-bit registers of a consumer thread by use."""
    scores = WARPGROUP_M * row["tile_n"] // WARPGROUP_THREADS
    return {
        "scores": scores,
        "output": WARPGROUP_M * row["head_dim_v"] // WARPGROUP_THREADS,
        "packed P": scores * ELEMENT_BYTES // 4,
        "working": WORKING_REGISTERS,
    }


def fp8_shared_memory(row: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of shared memory by part, as Fp8ForwardTraits::SharedStorage lays them out."""
    stages, consumers = row["stages"], row["consumer_warpgroups"]
    channels = row["head_dim"] + (8 if row["sum_by_mma"] else 0)
    queries = consumers * WARPGROUP_M * row["head_dim"]
    barriers = 2 * 8 * (2 * stages + consumers)
    parts = {
        "K": stages * row["tile_n"] * row["head_dim"],
        "V": stages * row["tile_n"] * channels,
        "Q": queries,
        "O": queries * ELEMENT_BYTES,
        "barriers": barriers,
    }
    return {name: -(-size // SWIZZLE_BYTES) * SWIZZLE_BYTES for name, size in parts.items()}


def fp8_registers(row: Mapping[str, Any]) -> dict[str, int]:
    """32-bit registers of a consumer thread by use."""
    scores = WARPGROUP_M * row["tile_n"] // WARPGROUP_THREADS
    channels = row["head_dim"] + (8 if row["sum_by_mma"] else 0)
    return {
        "scores": scores,
        "output": WARPGROUP_M * channels // WARPGROUP_THREADS,
        "packed P": scores // 4 if row["overlap"] else 0,
        "working": WORKING_REGISTERS,
    }


def sum_of(parts: Mapping[str, int]) -> str:
    terms = " + ".join(f"{count} {name}" for name, count in parts.items() if count)
    return f"{terms} = {sum(parts.values())}"


def complete(
    raw: Mapping[str, Any], number: int, fields: tuple[Field, ...] = FIELDS, table: str = "forward"
) -> Row:
    """A row with its defaults filled in and the types of its fields checked."""
    where = f"{table} row {number} ({raw.get('name', 'no name')})"
    known = {field.name for field in fields}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise TableError(
            f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    row: Row = {}
    for field in fields:
        if field.name not in raw:
            if field.default is REQUIRED:
                raise TableError(f"{where}: {field.name} is missing")
            row[field.name] = field.default
            continue
        value = raw[field.name]
        if type(value) is not field.type:  # bool is an int to isinstance
            raise TableError(f"{where}: {field.name} is {value!r}, expected {field.type.__name__}")
        row[field.name] = value
    if row.get("head_dim_v", 0) is None:
        row["head_dim_v"] = row["head_dim"]
    row["consumer_warpgroups"] = row["tile_m"] // WARPGROUP_M
    return row


def problems(row: Mapping[str, Any]) -> list[str]:
    """Why the row cannot become a kernel; empty if it can."""
    found = []
    if not re.fullmatch(r"[a-z][a-z0-9_]*", row["name"]):
        found.append(f"name {row['name']!r} must be lower case letters, digits and _")
    if not row["dtypes"] or len(set(row["dtypes"])) != len(row["dtypes"]):
        found.append(f"dtypes {row['dtypes']} must name each dtype once, and at least one")
    for dtype in row["dtypes"]:
        if dtype not in DTYPES:
            found.append(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if row["mask"] not in MASKS:
        found.append(f"mask {row['mask']!r} is none of {', '.join(MASKS)}")
    if not row["why"].strip():
        found.append("why is empty: say what was measured")
    for name in ("head_dim", "head_dim_v"):
        if row[name] % 64 or not 64 <= row[name] <= 256:
            found.append(
                f"{name} = {row[name]} must be a multiple of 64 up to 256: the 128-byte swizzle is "
                f"64 elements wide, WGMMA's N at most 256"
            )
    if row["head_dim_v"] > row["head_dim"] and not row["separate_output"]:
        found.append(
            f"head_dim_v = {row['head_dim_v']} > head_dim = {row['head_dim']}: O does not fit in "
            f"Q's shared memory; set separate_output = true"
        )
    if row["tile_n"] % 16 or not 16 <= row["tile_n"] <= 256:
        found.append(
            f"tile_n = {row['tile_n']} must be a multiple of 16 up to 256: it is N of the WGMMA "
            f"Q K^T (at most 256) and K of P V (steps of 16)"
        )
    if row["stages"] < 1:
        found.append(f"stages = {row['stages']} must be at least 1")
    if row["speed"] <= 0 or row["overhead"] < 0:
        found.append(
            f"speed = {row['speed']} must be above 0, overhead = {row['overhead']} at least 0"
        )
    consumers = row["consumer_warpgroups"]
    if row["tile_m"] % WARPGROUP_M or not 1 <= consumers <= 4:
        found.append(
            f"tile_m = {row['tile_m']} must be 64, 128, 192 or 256: WGMMA's M is 64 for each of "
            f"one to four consumer warpgroups"
        )
    elif consumers == 1 and row["pingpong"]:
        found.append(
            f"pingpong needs two or more consumer warpgroups to take turns; "
            f"tile_m = {row['tile_m']} has one"
        )
    if found:  # the sums below would only repeat it
        return found
    budget, parts = CONSUMER_REGISTERS[consumers], registers(row)
    if sum(parts.values()) > budget:
        found.append(
            f"registers of a consumer thread: {sum_of(parts)} > {budget} with {consumers} consumer "
            f"warpgroups"
        )
    bytes_by_part = shared_memory(row)
    if sum(bytes_by_part.values()) > SHARED_BYTES:
        found.append(f"shared memory: {sum_of(bytes_by_part)} > {SHARED_BYTES} bytes")
    return found


def fp8_problems(row: Mapping[str, Any]) -> list[str]:
    """Why an FP8 row cannot become a kernel; empty if it can."""
    found = []
    if not re.fullmatch(r"[a-z][a-z0-9_]*", row["name"]):
        found.append(f"name {row['name']!r} must be lower case letters, digits and _")
    if not row["dtypes"] or len(set(row["dtypes"])) != len(row["dtypes"]):
        found.append(f"dtypes {row['dtypes']} must name each dtype once, and at least one")
    for dtype in row["dtypes"]:
        if dtype not in FP8_DTYPES:
            found.append(f"dtype {dtype!r} is none of {', '.join(FP8_DTYPES)}")
    if not row["why"].strip():
        found.append("why is empty: say what was measured")
    if row["head_dim"] not in (64, 128, 192, 256):
        found.append(f"head_dim = {row['head_dim']} must be a multiple of 64 up to 256")
    if row["tile_n"] % SCALE_ROWS or not SCALE_ROWS <= row["tile_n"] <= 256:
        found.append(
            f"tile_n = {row['tile_n']} must be a multiple of {SCALE_ROWS}, the keys that share a "
            f"scale, up to 256"
        )
    if row["sum_by_mma"] and (row["tile_n"] > 128 or row["head_dim"] == 256):
        found.append(
            "sum_by_mma needs tile_n of 64 or 128 (one swizzled column) and head_dim + 8 <= 256"
        )
    if row["stages"] < 1:
        found.append(f"stages = {row['stages']} must be at least 1")
    consumers = row["consumer_warpgroups"]
    if row["tile_m"] % WARPGROUP_M or not 1 <= consumers <= 4:
        found.append(f"tile_m = {row['tile_m']} must be 64, 128, 192 or 256")
    elif consumers == 1 and row["pingpong"]:
        found.append("pingpong needs two or more consumer warpgroups to take turns")
    if found:
        return found
    budget, parts = CONSUMER_REGISTERS[consumers], fp8_registers(row)
    if sum(parts.values()) > budget:
        found.append(
            f"registers of a consumer thread: {sum_of(parts)} > {budget} with {consumers} consumer "
            f"warpgroups"
        )
    bytes_by_part = fp8_shared_memory(row)
    if sum(bytes_by_part.values()) > SHARED_BYTES:
        found.append(f"shared memory: {sum_of(bytes_by_part)} > {SHARED_BYTES} bytes")
    return found


def read_table(text: str) -> list[Row]:
    """The rows of a table, one for each kernel, checked. Raises TableError with every reason."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"not TOML: {error}") from error
    unknown = sorted(set(table) - {"forward", "forward_fp8"})
    if unknown:
        raise TableError(f"unknown table {', '.join(unknown)}; known are forward and forward_fp8")
    rows = [complete(raw, number) for number, raw in enumerate(table.get("forward", []), 1)]
    found = [f"forward row {row['name']}: {problem}" for row in rows for problem in problems(row)]
    fp8_rows = [
        complete(raw, number, FP8_FIELDS, "forward_fp8")
        for number, raw in enumerate(table.get("forward_fp8", []), 1)
    ]
    for row in fp8_rows:
        found += [f"forward_fp8 row {row['name']}: {problem}" for problem in fp8_problems(row)]
    names = [row["name"] for row in (*rows, *fp8_rows)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(f"forward row {name}: the name stands {names.count(name)} times")
    if found:
        raise TableError("\n".join(found))
    return [kernel_row(row, dtype) for row in rows for dtype in row["dtypes"]] + [
        fp8_kernel_row(row, dtype, out)
        for row in fp8_rows
        for dtype in row["dtypes"]
        for out in DTYPES
    ]


def kernel_row(row: Mapping[str, Any], dtype: str) -> Row:
    """The row of one dtype, as tile_configs.json shows it."""
    rest = {key: value for key, value in row.items() if key not in ("name", "dtypes")}
    return {"name": f"{dtype}_{row['name']}", "pass": "forward", "dtype": dtype, **rest}


def fp8_kernel_row(row: Mapping[str, Any], dtype: str, out: str) -> Row:
    """The row of one dtype of Q and K and one dtype of the output."""
    rest = {key: value for key, value in row.items() if key not in ("name", "dtypes")}
    name = f"{dtype}_{out}_{row['name']}"
    return {"name": name, "pass": "forward_fp8", "dtype": dtype, "out": out, **rest}


def select(rows: Iterable[Row], head_dims: Iterable[int], dtypes: Iterable[str]) -> list[Row]:
    """The rows of a build that was asked for these head dims and dtypes; empty means all."""
    rows, head_dims, dtypes = list(rows), list(head_dims), list(dtypes)
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise TableError(f"CUTE_KERNELS_DTYPES: {dtype!r} is none of {', '.join(DTYPES)}")
    for head_dim in head_dims:
        if all(row["head_dim"] != head_dim for row in rows):
            there = sorted({row["head_dim"] for row in rows})
            raise TableError(
                f"CUTE_KERNELS_HEAD_DIMS: no row has head_dim {head_dim}; the table has {there}"
            )
    chosen = [
        row
        for row in rows
        if (not head_dims or row["head_dim"] in head_dims)
        and (not dtypes or row.get("out", row["dtype"]) in dtypes)
    ]
    if not chosen:
        raise TableError("no row is left to compile")
    return chosen


def literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def kernel_source(row: Row) -> str:
    elements = f"  using Element = {DTYPES[row['dtype']][0]};"
    return tile_source(row, "forward", FIELDS, elements, shared_memory)


def fp8_kernel_source(row: Row) -> str:
    elements = (
        f"  using ElementQk = {FP8_DTYPES[row['dtype']][0]};\n"
        f"  using Output = {DTYPES[row['out']][0]};"
    )
    return tile_source(row, "fp8_forward", FP8_FIELDS, elements, fp8_shared_memory)


def tile_source(
    row: Row,
    kind: str,
    fields: Iterable[Field],
    elements: str,
    shared: Callable[[Mapping[str, Any]], dict[str, int]],
) -> str:
    """One kernel's .cu. `kind` names the pass in C++: "forward" or "fp8_forward"."""
    problem = "".join(word.capitalize() for word in kind.split("_"))
    header = "launch.hpp" if kind == "forward" else "fp8_launch.hpp"
    constants = "\n".join(
        f"  static constexpr {field.type.__name__} {field.constant} = {literal(row[field.name])};"
        for field in (*fields, *DERIVED)
        if field.constant
    )
    return f"""\
// Written by cmake/tile_configs.py from row {row["name"]}.
#include <cutlass/numeric_types.h>

#include "cute_kernels/attention/forward/{header}"

namespace cute_kernels::attention::tiles::{row["name"]} {{

struct Tile {{
{elements}
{constants}
}};

static_assert(sizeof({problem}Traits<Tile>::SharedStorage) == {sum(shared(row).values())},
              "{shared.__name__}() in cmake/tile_configs.py must count what SharedStorage has");

cudaError_t launch({problem}Problem const& problem, cudaStream_t stream) {{
  return launch_{kind}<Tile>(problem, stream);
}}

}}  // namespace cute_kernels::attention::tiles::{row["name"]}
"""


def fp8_registry_source(rows: list[Row]) -> str:
    declarations = "\n".join(
        f"namespace {row['name']} {{ cudaError_t launch(Fp8ForwardProblem const&, cudaStream_t); }}"
        for row in rows
    )
    entries = "\n".join(
        f'    {{{{"{row["name"]}", ScoreType::{FP8_DTYPES[row["dtype"]][1]}, '
        f"ElementType::{DTYPES[row['out']][1]}, {row['head_dim']}, {row['tile_m']}}}, "
        f"tiles::{row['name']}::launch}},"
        for row in rows
    )
    array = f"Fp8ForwardKernel const kKernels[] = {{\n{entries}\n}};" if rows else ""
    return f"""\
// Written by cmake/tile_configs.py.
#include "cute_kernels/attention/fp8_tile_config.hpp"

namespace cute_kernels::attention {{

namespace tiles {{
{declarations}
}}  // namespace tiles

namespace {{
{array}
}}  // namespace

Fp8ForwardRegistry const kFp8ForwardRegistry{{{"kKernels" if rows else "nullptr"}, {len(rows)}}};

}}  // namespace cute_kernels::attention
"""


def registry_source(rows: list[Row]) -> str:
    declarations = "\n".join(
        f"namespace {row['name']} {{ cudaError_t launch(ForwardProblem const&, cudaStream_t); }}"
        for row in rows
    )
    entries = "\n".join(
        f'    {{{{"{row["name"]}", ElementType::{DTYPES[row["dtype"]][1]}, {row["head_dim"]}, '
        f"{row['head_dim_v']}, MaskClass::{MASKS[row['mask']]}, {row['tile_m']}, "
        f"{row['speed']}, {row['overhead']}}}, tiles::{row['name']}::launch}},"
        for row in rows
    )
    return f"""\
// Written by cmake/tile_configs.py.
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {{

namespace tiles {{
{declarations}
}}  // namespace tiles

namespace {{
ForwardKernel const kKernels[] = {{
{entries}
}};
}}  // namespace

ForwardRegistry const kForwardRegistry{{kKernels, {len(rows)}}};

}}  // namespace cute_kernels::attention
"""


def write_sources(rows: list[Row], out: Path) -> list[Path]:
    """Writes all files but those that are right already: only what changed is compiled again."""
    out.mkdir(parents=True, exist_ok=True)
    fp8_rows = [row for row in rows if row["pass"] == "forward_fp8"]
    rows = [row for row in rows if row["pass"] == "forward"]
    files = {out / f"{row['name']}.cu": kernel_source(row) for row in rows}
    files |= {out / f"{row['name']}.cu": fp8_kernel_source(row) for row in fp8_rows}
    files[out / "registry.cpp"] = registry_source(rows)
    files[out / "fp8_registry.cpp"] = fp8_registry_source(fp8_rows)
    sources = list(files)
    files[out / "tile_configs.json"] = json.dumps(rows, indent=1) + "\n"
    for path in out.glob("*.cu"):
        if path not in files:
            path.unlink()
    for path, text in files.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return sources


def split_list(text: str) -> list[str]:
    return [item for item in re.split(r"[;,\s]+", text) if item]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--head-dims", default="", help="only these, as in 64;128")
    parser.add_argument("--dtypes", default="", help="only these, as in bf16;fp16")
    parser.add_argument("--passes", default="forward", help="as in forward;forward_fp8")
    options = parser.parse_args(arguments)
    try:
        head_dims = split_list(options.head_dims)
        if not all(item.isdecimal() for item in head_dims):
            raise TableError(f"CUTE_KERNELS_HEAD_DIMS: {options.head_dims!r} is no list of numbers")
        rows = read_table(options.table.read_text(encoding="utf-8"))
        passes = split_list(options.passes)
        rows = [row for row in rows if row["pass"] in passes]
        rows = select(rows, map(int, head_dims), split_list(options.dtypes))
    except (TableError, OSError) as error:
        print(f"{options.table}: {error}", file=sys.stderr)
        return 1
    print(";".join(path.as_posix() for path in write_sources(rows, options.out)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
