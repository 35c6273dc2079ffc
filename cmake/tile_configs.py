"""Turns the table of tiles into kernels to compile: one .cu per kernel, registries, a JSON copy.

    python cmake/tile_configs.py --table FILE --out FOLDER [--head-dims "64;128"] [--dtypes bf16]

Prints the written sources, separated by semicolons. A row that cannot fit ends it with status 1 and
the arithmetic on stderr. CMake runs this when it configures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tile_passes import (
    CONSUMER_REGISTERS,
    CONSUMER_WARPGROUPS,
    DTYPES,
    FP8_DTYPES,
    MASKS,
    PASSES,
    REQUIRED,
    SHARED_BYTES,
    WARPGROUP_M,
    Field,
    Pass,
    Row,
)


class TableError(ValueError):
    """A row, or the table, cannot become kernels; the message says why."""


def sum_of(parts: Mapping[str, int]) -> str:
    terms = " + ".join(f"{count} {name}" for name, count in parts.items() if count)
    return f"{terms} = {sum(parts.values())}"


def complete(raw: Mapping[str, Any], number: int, pass_: Pass) -> Row:
    """A row with its defaults filled in and the types of its fields checked."""
    where = f"{pass_.name} row {number} ({raw.get('name', 'no name')})"
    known = {field.name for field in pass_.fields}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise TableError(
            f"{where}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    row: Row = {}
    for field in pass_.fields:
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
    row.setdefault(CONSUMER_WARPGROUPS.name, row["tile_m"] // WARPGROUP_M)
    return row


def problems(row: Row, pass_: Pass) -> list[str]:
    """Why the row cannot become a kernel; empty if it can."""
    found = []
    if not re.fullmatch(r"[a-z][a-z0-9_]*", row["name"]):
        found.append(f"name {row['name']!r} must be lower case letters, digits and _")
    if not row["dtypes"] or len(set(row["dtypes"])) != len(row["dtypes"]):
        found.append(f"dtypes {row['dtypes']} must name each dtype once, and at least one")
    for dtype in row["dtypes"]:
        if dtype not in pass_.dtypes:
            found.append(f"dtype {dtype!r} is none of {', '.join(pass_.dtypes)}")
    if row.get("mask", "any") not in MASKS:
        found.append(f"mask {row['mask']!r} is none of {', '.join(MASKS)}")
    if not row["why"].strip():
        found.append("why is empty: say what was measured")
    for name in ("head_dim", "head_dim_v"):
        size = row[name] if name in row else row["head_dim"]
        if size % 64 or not 64 <= size <= 256:
            found.append(
                f"{name} = {size} must be a multiple of 64 up to 256: the 128-byte swizzle is "
                f"64 elements wide, WGMMA's N at most 256"
            )
    if row["stages"] < 1:
        found.append(f"stages = {row['stages']} must be at least 1")
    found += pass_.problems(row)
    if found:  # the sums below would only repeat it
        return found
    consumers = row["consumer_warpgroups"]
    budget, parts = CONSUMER_REGISTERS[consumers], pass_.registers(row)
    if sum(parts.values()) > budget:
        found.append(
            f"registers of a consumer thread: {sum_of(parts)} > {budget} with {consumers} consumer "
            f"warpgroups"
        )
    bytes_by_part = pass_.shared_memory(row)
    if sum(bytes_by_part.values()) > SHARED_BYTES:
        found.append(f"shared memory: {sum_of(bytes_by_part)} > {SHARED_BYTES} bytes")
    return found


def read_table(text: str) -> list[Row]:
    """The rows of a table, one for each kernel, checked. Raises TableError with every reason."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"not TOML: {error}") from error
    unknown = sorted(set(table) - set(PASSES))
    if unknown:
        raise TableError(f"unknown table {', '.join(unknown)}; known are {', '.join(PASSES)}")
    rows = [
        (complete(raw, number, pass_), pass_)
        for pass_ in PASSES.values()
        for number, raw in enumerate(table.get(pass_.name, []), 1)
    ]
    found = [
        f"{pass_.name} row {row['name']}: {problem}"
        for row, pass_ in rows
        for problem in problems(row, pass_)
    ]
    names = [row["name"] for row, _ in rows]
    for name in sorted({name for name in names if names.count(name) > 1}):
        found.append(f"row {name}: the name stands {names.count(name)} times")
    if found:
        raise TableError("\n".join(found))
    return [kernel_row(row, dtype, pass_) for row, pass_ in rows for dtype in row["dtypes"]]


def kernel_row(row: Row, dtype: str, pass_: Pass) -> Row:
    """The row of one dtype, as tile_configs.json shows it."""
    rest = {key: value for key, value in row.items() if key not in ("name", "dtypes")}
    return {"name": f"{dtype}_{row['name']}", "pass": pass_.name, "dtype": dtype, **rest}


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
        and (not dtypes or row["dtype"] in (*dtypes, *FP8_DTYPES))
    ]
    if not chosen:
        raise TableError("no row is left to compile")
    return chosen


def literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def constants(pass_: Pass) -> list[Field]:
    """The columns that the C++ Tile carries."""
    fields = {field.name: field for field in (*pass_.fields, CONSUMER_WARPGROUPS)}
    return [field for field in fields.values() if field.constant]


def kernel_source(row: Row, pass_: Pass) -> str:
    """One kernel's .cu."""
    tile = [f"  using {pass_.element} = {pass_.dtypes[row['dtype']][0]};"]
    for field in constants(pass_):
        value = literal(row[field.name])
        tile.append(f"  static constexpr {field.type.__name__} {field.constant} = {value};")
    lines = "\n".join(tile)
    workspace = f"""
int64_t workspace_bytes({pass_.cpp}Problem const& problem) {{
  return {pass_.function}_workspace_bytes<Tile>(problem);
}}
"""
    return f"""\
// Written by cmake/tile_configs.py from row {row["name"]}.
#include <cutlass/numeric_types.h>

#include "cute_kernels/attention/{pass_.launch_header}"

namespace cute_kernels::attention::tiles::{row["name"]} {{

struct Tile {{
{lines}
}};

static_assert(sizeof({pass_.cpp}Traits<Tile>::SharedStorage) == \
{sum(pass_.shared_memory(row).values())},
              "{pass_.shared_memory.__name__}() in cmake/tile_passes.py must count what \
SharedStorage has");
{workspace if pass_.workspace else ""}
cudaError_t launch({pass_.cpp}Problem const& problem, cudaStream_t stream) {{
  return launch_{pass_.function}<Tile>(problem, stream);
}}

}}  // namespace cute_kernels::attention::tiles::{row["name"]}
"""


def registry_source(rows: list[Row], pass_: Pass) -> str:
    problem = f"{pass_.cpp}Problem const&"
    functions = {"launch": f"cudaError_t launch({problem}, cudaStream_t);"}
    if pass_.workspace:
        functions = {"workspace_bytes": f"int64_t workspace_bytes({problem});", **functions}
    declarations = "\n".join(
        f"namespace {row['name']} {{\n" + "\n".join(functions.values()) + "\n}" for row in rows
    )
    entries = "\n".join(
        f'    {{{{"{row["name"]}", {pass_.dtypes[row["dtype"]][1]}, '
        + ", ".join(map(str, pass_.config(row)))
        + "}, "
        + ", ".join(f"tiles::{row['name']}::{function}" for function in functions)
        + "},"
        for row in rows
    )
    array = f"{pass_.cpp}Kernel const kKernels[] = {{\n{entries}\n}};" if rows else ""
    return f"""\
// Written by cmake/tile_configs.py.
#include "cute_kernels/attention/{pass_.registry_header}"

namespace cute_kernels::attention {{

namespace tiles {{
{declarations}
}}  // namespace tiles

namespace {{
{array}
}}  // namespace

Registry<{pass_.cpp}Kernel> const k{pass_.cpp}Registry{{{"kKernels" if rows else "nullptr"}, \
{len(rows)}}};

}}  // namespace cute_kernels::attention
"""


def write_sources(rows: list[Row], out: Path, passes: Iterable[str] = PASSES) -> list[Path]:
    """Writes all files but those that are right already: only what changed is compiled again."""
    out.mkdir(parents=True, exist_ok=True)
    files = {out / f"{row['name']}.cu": kernel_source(row, PASSES[row["pass"]]) for row in rows}
    for name in passes:
        of_pass = [row for row in rows if row["pass"] == name]
        files[out / f"{name}_registry.cpp"] = registry_source(of_pass, PASSES[name])
    sources = list(files)
    files[out / "tile_configs.json"] = json.dumps(rows, indent=1) + "\n"
    for path in (*out.glob("*.cu"), *out.glob("*.cpp")):
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
    parser.add_argument(
        "--passes", default="forward;backward", help=f"of {', '.join(PASSES)}; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        head_dims = split_list(options.head_dims)
        if not all(item.isdecimal() for item in head_dims):
            raise TableError(f"CUTE_KERNELS_HEAD_DIMS: {options.head_dims!r} is no list of numbers")
        rows = read_table(options.table.read_text(encoding="utf-8"))
        passes = split_list(options.passes)
        rows = [row for row in rows if row["pass"] in passes]
        rows = select(rows, map(int, head_dims), split_list(options.dtypes))
        sources = write_sources(rows, options.out, passes)
    except (TableError, OSError) as error:
        print(f"{options.table}: {error}", file=sys.stderr)
        return 1
    print(";".join(path.as_posix() for path in sources), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
