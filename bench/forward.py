"""Times the forward pass against the peers that are installed, all in one run on one GPU."""

from __future__ import annotations

import sys
from typing import Any

from bench import comparison, report, session
from bench.cells import Cell, latency_grid, llama_grid, paper_grid

PEER_NAMES = ("sdpa-cudnn", "sdpa-flash", "fa3-fwd", "fa3", "fa3-xformers", "fa4")


def parse(arguments: list[str] | None = None):
    parser = comparison.parser(__doc__, "forward", PEER_NAMES)
    parser.add_argument(
        "--grid",
        choices=["paper", "latency", "llama"],
        default="paper",
        help="the paper's; one sequence of 16 heads; 64/8 heads of 128 with chunked prefill",
    )
    return comparison.apply_quick(parser.parse_args(arguments))


def cells(arguments) -> list[Cell]:
    if arguments.grid == "latency":
        return latency_grid(arguments.dtype, arguments.head_dims, arguments.masks)
    if arguments.grid == "llama":
        return llama_grid(arguments.dtype, arguments.masks)
    return paper_grid(arguments.dtype, arguments.head_dims, arguments.masks, arguments.seqlens)


def run(arguments) -> dict[str, Any]:
    from bench import measure, providers

    peers, host_peers, missing = comparison.load_peers(arguments)
    rows = [providers.ours(name, f"{report.OURS}:{name}") for name in arguments.tile_config]
    loaded = [providers.ours(), *rows, *peers]
    suffix = "" if arguments.grid == "paper" else f"_{arguments.grid}"
    path = arguments.out / f"forward_{arguments.dtype}{suffix}.json"
    record = session.Record("forward", path, arguments)
    grid = cells(arguments)
    on_host = [*loaded, *host_peers]
    return comparison.run(record, arguments, grid, loaded, on_host, missing, measure.FORWARD)


def main() -> int:
    arguments = parse()
    session.require_gpu()
    data = run(arguments)
    comparison.print_summary(data)
    return int(comparison.failed(data))


if __name__ == "__main__":
    sys.exit(main())
