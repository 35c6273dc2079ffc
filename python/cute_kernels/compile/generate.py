"""Writes the sources of a build from the table of tiles: one .cu per kernel, a table of each pass.

    python -m compile.generate --table FILE --include FOLDER --out FOLDER [--head-dims "64;128"]

Prints the written sources, separated by semicolons. A row that cannot fit ends it with status 1 and
the arithmetic on stderr. CMake runs this when it configures, in the folder above and without
importing cute_kernels, which is not built then.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from .passes import PASSES
from .source import write_sources
from .table import TableError, read_table, select


def split_list(text: str) -> list[str]:
    return [item for item in re.split(r"[;,\s]+", text) if item]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--include", type=Path, required=True, help="folder of the headers")
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
        sources = write_sources(rows, options.out, options.include, passes)
    except (TableError, OSError) as error:
        print(f"{options.table}: {error}", file=sys.stderr)
        return 1
    print(";".join(path.as_posix() for path in sources), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
