"""The C++ of rows: a build's kernels and tables of kernels, or a plug-in for a build."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .headers import DIGEST_FILE, digest_source
from .hooks import KNOWN, hooks_source
from .passes import CONSUMER_WARPGROUPS, PASSES, row_config
from .rows import Field, Pass, Row, function_name


def literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def constants(pass_: Pass) -> list[Field]:
    """The columns that the C++ Tile carries."""
    fields = {field.name: field for field in (*pass_.fields, CONSUMER_WARPGROUPS)}
    return [field for field in fields.values() if field.constant]


def namespace(row: Row) -> str:
    """The row's own, below cute_kernels::attention::tiles. A user's row may be called "new" or
    "std"; the dtype makes it a name of C++ that means nothing else."""
    name, dtype = str(row["name"]), str(row["dtype"])
    return name if name.startswith(f"{dtype}_") else f"{dtype}_{name}"


def functions(pass_: Pass) -> dict[str, str]:
    """The C++ functions of a kernel by name, in the order of the kernel's struct."""
    problem = f"{pass_.cpp}Problem const&"
    launch = {"launch": f"cudaError_t launch({problem}, cudaStream_t);"}
    if pass_.workspace:
        return {"workspace_bytes": f"int64_t workspace_bytes({problem});", **launch}
    return launch


def kernel_entry(row: Row, pass_: Pass) -> str:
    """The braced initialiser of a kernel's struct."""
    columns = (*row_config(row), *(row[column] for column in pass_.config))
    config = ", ".join([f'"{row["name"]}"', pass_.dtypes[row["dtype"]][1], *map(literal, columns)])
    found = ", ".join(f"tiles::{namespace(row)}::{function}" for function in functions(pass_))
    return f"{{{{{config}}}, {found}}}"


def variant_type(row: Row) -> str:
    """What the C++ Tile calls Variant."""
    if "variant" in row:
        return "HookedVariant<Hooks>"
    return "Softcap" if row["softcap"] else "NoVariant"


def kernel_source(row: Row, pass_: Pass) -> str:
    """One kernel's .cu."""
    tile = [f"  using {pass_.element} = {pass_.dtypes[row['dtype']][0]};"]
    for field in constants(pass_):
        value = literal(row[field.name])
        tile.append(f"  static constexpr {field.type.__name__} {field.constant} = {value};")
    hooks = ""
    if pass_.variants:
        tile.append(f"  using Variant = {variant_type(row)};")
        if "variant" in row:
            hooks = "\nusing namespace hook_math;\n\n" + hooks_source(
                KNOWN[row["variant"]], row.get("gradients", ())
            )
    lines = "\n".join(tile)
    header, cpp = pass_.source_of(row)
    workspace = f"""
int64_t workspace_bytes({pass_.cpp}Problem const& problem) {{
  return {function_name(cpp)}_workspace_bytes<Tile>(problem);
}}
"""
    return f"""\
// Written by cute_kernels/compile/source.py from row {row["name"]}.
#include <cutlass/numeric_types.h>

#include "cute_kernels/attention/{header}"
{'#include "cute_kernels/attention/variant/hooks.hpp"' if pass_.variants else ""}

namespace cute_kernels::attention::tiles::{namespace(row)} {{
{hooks}
struct Tile {{
{lines}
}};

static_assert(sizeof({cpp}Traits<Tile>::SharedStorage) == \
{sum(pass_.shared_memory(row).values())},
              "shared_memory of {pass_.name} rows in cute_kernels/compile must count what \
SharedStorage has");
{workspace if pass_.workspace else ""}
cudaError_t launch({pass_.cpp}Problem const& problem, cudaStream_t stream) {{
  return launch_{function_name(cpp)}<Tile>(problem, stream);
}}

}}  // namespace cute_kernels::attention::tiles::{namespace(row)}
"""


def table_source(rows: list[Row], pass_: Pass) -> str:
    """The build's kernels of a pass."""
    declarations = "\n".join(
        f"namespace {namespace(row)} {{\n" + "\n".join(functions(pass_).values()) + "\n}"
        for row in rows
    )
    entries = "".join(f"    {kernel_entry(row, pass_)},\n" for row in rows)
    array = f"{pass_.cpp}Kernel const kBuilt[] = {{\n{entries}}};" if rows else ""
    return f"""\
// Written by cute_kernels/compile/source.py.
#include "cute_kernels/attention/{pass_.table_header}"

namespace cute_kernels::attention {{

namespace tiles {{
{declarations}
}}  // namespace tiles

namespace {{
{array}
}}  // namespace

KernelTable<{pass_.cpp}Kernel> {pass_.function}_kernels{{{"kBuilt" if rows else "nullptr"}, \
{len(rows)}}};

}}  // namespace cute_kernels::attention
"""


def plugin_source(row: Row, headers: str) -> str:
    """A .cu that is a shared library of its own, with one kernel for a build whose headers have the
    digest `headers`."""
    pass_ = PASSES[row["pass"]]
    return f"""\
{kernel_source(row, pass_)}
#include "cute_kernels/attention/{pass_.table_header}"
#include "cute_kernels/attention/plugin.hpp"

extern "C" __attribute__((visibility("default"))) cute_kernels::attention::Plugin const*
cute_kernels_plugin() {{
  using namespace cute_kernels::attention;
  static {pass_.cpp}Kernel const kernel{kernel_entry(row, pass_)};
  static Plugin const plugin = plugin_of(kernel, "{headers}");
  return &plugin;
}}
"""


def write_sources(
    rows: list[Row], out: Path, include: Path, passes: Iterable[str] = PASSES
) -> list[Path]:
    """Writes all files of a build whose headers lie in `include`, but those that are right already:
    only what changed is compiled again."""
    out.mkdir(parents=True, exist_ok=True)
    files = {out / f"{row['name']}.cu": kernel_source(row, PASSES[row["pass"]]) for row in rows}
    for name in passes:
        of_pass = [row for row in rows if row["pass"] == name]
        files[out / f"{name}_table.cpp"] = table_source(of_pass, PASSES[name])
    sources = list(files)
    files[out / DIGEST_FILE] = digest_source(include)
    files[out / "tile_configs.json"] = json.dumps(rows, indent=1) + "\n"
    for path in (*out.glob("*.cu"), *out.glob("*.cpp")):
        if path not in files:
            path.unlink()
    for path, text in files.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return sources
