"""The package's command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cute_kernels.compile.build import cache_folder
from cute_kernels.info import report
from cute_kernels.plugins import compile_rows, read_rows


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cute_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compile_ = commands.add_parser(
        "compile",
        help="compile the rows of a table ahead of time",
        description="Compiles the rows of a table that the cache does not have, and prints the "
        "libraries. CUTE_KERNELS_CACHE=FOLDER then finds them, also in a copy of the folder.",
    )
    compile_.add_argument("table", type=Path, metavar="rows.toml")
    compile_.add_argument("--out", type=Path, metavar="FOLDER", help="instead of the user's cache")
    compile_.add_argument(
        "-j", "--jobs", type=positive, help="kernels at a time; default: what cores and memory fit"
    )
    commands.add_parser(
        "info", help="versions, GPU, driver, rows, cache, compiler, and what is wrong"
    )
    return parser.parse_args(arguments)


def compile_table(table: Path, out: Path | None, jobs: int | None) -> int:
    try:
        libraries = compile_rows(read_rows(table), out, jobs)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"cute_kernels: {error}", file=sys.stderr)
        return 1
    for library in libraries:
        print(library)
    print(f"{len(libraries)} kernels in {out or cache_folder()}", file=sys.stderr)
    return 0


def print_info() -> int:
    facts, wrong = report()
    for name, fact in facts.items():
        print(f"{name:>17}  {fact}")
    for problem in wrong or ["nothing"]:
        print(f"{'wrong':>17}  {problem}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.command == "info":
        return print_info()
    return compile_table(options.table, options.out, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
