"""Times the backward pass against the peers that are installed, all in one run on one GPU.

The forward pass is not timed; the host time is that of forward and backward through autograd.
"""

from __future__ import annotations

import sys
from typing import Any

from bench import comparison, report, session
from bench.cells import BackwardCell, paper_grid

PEER_NAMES = ("sdpa-cudnn", "sdpa-flash", "fa3", "fa3-xformers", "fa4")
DETERMINISTIC = f"{report.OURS}:deterministic"


def parse(arguments: list[str] | None = None):
    parser = comparison.parser(__doc__, "backward", PEER_NAMES)
    return comparison.apply_quick(parser.parse_args(arguments))


def run(arguments) -> dict[str, Any]:
    from bench import measure, providers

    peers, host_peers, missing = comparison.load_peers(arguments)
    forwards = [
        providers.ours(),
        providers.ours(name=DETERMINISTIC, deterministic=True),
        *peers,
    ]
    rows = [providers.backward_row(name, f"{report.OURS}:{name}") for name in arguments.tile_config]
    timed = [*(providers.backward_of(provider) for provider in forwards), *rows]
    on_host = [providers.training_step_of(provider) for provider in (*forwards, *host_peers)]
    path = arguments.out / f"backward_{arguments.dtype}.json"
    record = session.Record("backward", path, arguments)
    grid = paper_grid(
        arguments.dtype, arguments.head_dims, arguments.masks, arguments.seqlens, BackwardCell
    )
    return comparison.run(record, arguments, grid, timed, on_host, missing, measure.BACKWARD)


def main() -> int:
    arguments = parse()
    session.require_gpu()
    data = run(arguments)
    comparison.print_summary(data)
    return int(comparison.failed(data))


if __name__ == "__main__":
    sys.exit(main())
