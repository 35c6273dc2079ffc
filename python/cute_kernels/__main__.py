"""The package's command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from cute_kernels.autotune import plot, tune
from cute_kernels.autotune.trials import DTYPES, RESULTS
from cute_kernels.autotune.tuned import read_record
from cute_kernels.autotune.tuner import tune_rows
from cute_kernels.compile.build import cache_folder
from cute_kernels.info import report
from cute_kernels.plugins import compile_candidates, compile_rows, read_rows


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
    add_tune(
        commands.add_parser(
            "tune",
            help="find the fastest row for calls of a kind, on this GPU",
            description="Compiles rows that the build lacks, checks and times them beside its "
            "own, and keeps the fastest for cute_kernels.use_tuned().",
        )
    )
    plot_ = commands.add_parser("plot", help="draw what `tune --record` wrote, as an SVG")
    plot_.add_argument("records", type=Path, nargs="+", metavar="FILE", help="a panel for each")
    plot_.add_argument("--out", type=Path, default=Path("tuned.svg"), metavar="FILE")
    return parser.parse_args(arguments)


def add_tune(tune_: argparse.ArgumentParser) -> None:
    tune_.add_argument("--pass", dest="of_pass", choices=RESULTS, default="forward")
    tune_.add_argument("--head-dim", type=positive, required=True)
    tune_.add_argument("--seqlen", type=positive, required=True, help="queries, and keys")
    tune_.add_argument("--seqlen-k", type=positive, help="keys, if there are others")
    tune_.add_argument("--causal", action="store_true")
    tune_.add_argument("--batch", type=positive, default=1)
    tune_.add_argument("--heads", type=positive, default=16)
    tune_.add_argument("--key-heads", type=positive, help="default: as many as heads")
    tune_.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="of the tensors")
    tune_.add_argument(
        "--qk-dtype", choices=("int8", "e4m3"), default="int8", help="what FP8 makes of q and k"
    )
    tune_.add_argument("--candidates", type=positive, default=12, help="new rows to try")
    tune_.add_argument("-j", "--jobs", type=positive, help="kernels to compile at a time")
    tune_.add_argument("--record", type=Path, metavar="FILE", help="write all that was measured")
    tune_.add_argument(
        "--compile-only", action="store_true", help="fill the cache, here, for a GPU elsewhere"
    )


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


def tune_call(options: argparse.Namespace) -> int:
    try:
        if options.compile_only:
            return compile_candidates_of(options)
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no GPU to time kernels on; --compile-only needs none")
        lengths = options.seqlen, *2 * (options.seqlen_k or options.seqlen,)
        heads = options.heads, *2 * (options.key_heads or options.heads,)
        dtype, head_dim = DTYPES[options.dtype], options.head_dim
        q, k, v = (
            torch.randn(options.batch, seqlen, count, head_dim, dtype=dtype, device="cuda")
            for seqlen, count in zip(lengths, heads, strict=True)
        )
        found = tune(
            *(q, k, v),
            of_pass=options.of_pass,
            causal=options.causal,
            qk_dtype=DTYPES[options.qk_dtype],
            candidates=options.candidates,
            jobs=options.jobs,
            record=options.record,
        )
        print(found.table())
    except (OSError, ValueError, RuntimeError) as error:
        print(f"cute_kernels: {error}", file=sys.stderr)
        return 1
    return 0


def compile_candidates_of(options: argparse.Namespace) -> int:
    dtype = options.qk_dtype if options.of_pass == "forward_fp8" else options.dtype
    rows = tune_rows(options.of_pass, dtype, options.head_dim, options.candidates).rows
    libraries, errors = compile_candidates(rows, options.jobs)
    for name, error in errors.items():
        print(f"cute_kernels: {name}: {error}", file=sys.stderr)
    print(f"{len(libraries)} kernels in {cache_folder()}")
    return 1 if errors else 0


def draw_records(records: list[Path], out: Path) -> int:
    try:
        runs = [run for path in records for run in read_record(path)]
        out.write_text(plot.draw(runs), "utf-8")
    except (OSError, ValueError) as error:
        print(f"cute_kernels: {error}", file=sys.stderr)
        return 1
    print(out)
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
    if options.command == "tune":
        return tune_call(options)
    if options.command == "plot":
        return draw_records(options.records, options.out)
    return compile_table(options.table, options.out, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
