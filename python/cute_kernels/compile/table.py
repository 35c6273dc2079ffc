"""Reads the table of tiles and refuses rows that cannot become kernels, with the arithmetic."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from .passes import CONSUMER_REGISTERS, CONSUMER_WARPGROUPS, MASKS, PASSES
from .rows import DTYPES, REQUIRED, SHARED_BYTES, WARPGROUP_M, Pass, Row

MAX_WGMMA_N = 256


class TableError(ValueError):
    """A row, or the table, cannot become kernels; the message says why."""


def sum_of(parts: Mapping[str, int]) -> str:
    terms = " + ".join(f"{count} {name}" for name, count in parts.items() if count)
    return f"{terms} = {sum(parts.values())}"


def complete(raw: Mapping[str, Any], where: str, pass_: Pass) -> Row:
    """A row with its defaults filled in and the types of its fields checked."""
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
    if row.get("any_call") and row["mask"] != "any":
        found.append(f"any_call needs mask = 'any', but it is {row['mask']!r}")
    if row.get("softcap") and not row["any_call"]:
        found.append("softcap needs any_call = true: one row answers all calls with a softcap")
    if not row["why"].strip():
        found.append("why is empty: say what was measured")
    for name in ("head_dim", "head_dim_v"):
        size = row[name] if name in row else row["head_dim"]
        most = MAX_WGMMA_N * (pass_.output_slices if name == "head_dim_v" else 1)
        if size % pass_.swizzle or not pass_.swizzle <= size <= most:
            found.append(
                f"{name} = {size} must be a multiple of {pass_.swizzle} up to {most}: the "
                f"{pass_.swizzle * 2}-byte swizzle is {pass_.swizzle} elements wide, WGMMA's N at "
                f"most {MAX_WGMMA_N}"
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
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"not TOML: {error}") from error
    unknown = sorted(set(table) - set(PASSES))
    if unknown:
        raise TableError(f"unknown table {', '.join(unknown)}; known are {', '.join(PASSES)}")
    rows = [
        (
            complete(raw, f"{pass_.name} row {number} ({raw.get('name', 'no name')})", pass_),
            pass_,
        )
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
        and (not dtypes or row["dtype"] in dtypes or row["dtype"] not in DTYPES)
    ]
    if not chosen:
        raise TableError("no row is left to compile")
    return chosen
