"""Times the forward pass against the peers that are installed, all in one run on one GPU."""

from __future__ import annotations

import sys
from typing import Any

from bench import report, session
from bench.cells import Cell, latency_grid, llama_grid, paper_grid

PEER_NAMES = ("sdpa-cudnn", "sdpa-flash", "fa3-fwd", "fa3", "fa4")
QUICK = {"head_dims": [128], "seqlens": [2048, 16384]}


def host_cell(dtype: str) -> Cell:
    return Cell(dtype=dtype, mask="full", batch=1, seqlen=128, heads=16, head_dim=128)


def parse(arguments: list[str] | None = None):
    parser = session.parser(__doc__, "forward")
    session.add_grid_options(parser)
    parser.add_argument(
        "--grid",
        choices=["paper", "latency", "llama"],
        default="paper",
        help="the paper's; one sequence of 16 heads; 64/8 heads of 128 with chunked prefill",
    )
    parser.add_argument("--peers", nargs="*", choices=PEER_NAMES, default=list(PEER_NAMES))
    parser.add_argument(
        "--tile-config",
        action="append",
        default=[],
        metavar="NAME",
        help="also time this row of our table (repeatable)",
    )
    parser.add_argument(
        "--fa4-seqlens",
        type=int,
        nargs="+",
        default=[],
        metavar="S",
        help="time FA4 at these lengths only (it compiles once for each head dim and mask)",
    )
    parser.add_argument(
        "--host-batches", type=int, default=40, help="batches of 100 calls; 0: no host time"
    )
    parser.add_argument("--quick", action="store_true", help="D=128 at S=2k and 16k, ten rounds")
    parser.add_argument(
        "--only-host", action="store_true", help="host time of a small call and nothing else"
    )
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.head_dims, chosen.seqlens, chosen.rounds = QUICK["head_dims"], QUICK["seqlens"], 10
    return chosen


def load_providers(arguments) -> tuple[list, dict[str, dict[str, Any]]]:
    """Ours, its named rows, the peers; and what the record says of each."""
    from bench import providers

    loaded = [providers.ours()]
    loaded += [providers.ours(name, f"{report.OURS}:{name}") for name in arguments.tile_config]
    peers, missing = providers.load_peers(arguments.peers, arguments.fa4_seqlens)
    loaded += peers
    described: dict[str, dict[str, Any]] = {
        p.name: {"label": p.label, "version": p.version} for p in loaded
    }
    for name, reason in missing.items():
        described[name] = {"label": name, "missing": reason}
    return loaded, described


def progress(number: int, total: int, entry: dict[str, Any], cell: Cell, peers: list[str]) -> None:
    best = report.best_peer(entry, peers)
    against = "no peer" if best is None else f"best peer {best[0]} {best[1]:.0f}"
    mine, ratio = report.tflops(entry, report.OURS), report.ratio(entry, peers)
    session.say(
        f"[{number}/{total}] {cell}: ours {report.show(mine)} TFLOP/s, {against}, "
        f"ratio {report.show(ratio, 2)}"
    )


def cells(arguments) -> list[Cell]:
    if arguments.only_host:
        return []
    if arguments.grid == "latency":
        return latency_grid(arguments.dtype, arguments.head_dims, arguments.masks)
    if arguments.grid == "llama":
        return llama_grid(arguments.dtype, arguments.masks)
    return paper_grid(arguments.dtype, arguments.head_dims, arguments.masks, arguments.seqlens)


def run(arguments) -> dict[str, Any]:
    from bench import measure

    providers, described = load_providers(arguments)
    suffix = "" if arguments.grid == "paper" else f"_{arguments.grid}"
    name = f"forward_{arguments.dtype}{suffix}.json"
    record = session.Record("forward", arguments.out / name, arguments)
    data = record.data
    data["providers"] = described
    data["cells"] = []
    data["machine"]["cublas_bf16"] = measure.time_cublas(session.query_gpu)
    if arguments.host_batches:
        cell = host_cell(arguments.dtype)
        session.say("host time of one small call")
        timed = measure.time_host(cell, providers, arguments.host_batches)
        data["host"] = {**cell.as_dict(), "results": timed}
        record.save()
    grid = cells(arguments)
    for number, cell in enumerate(grid, start=1):
        timed = measure.time_cell(cell, providers, arguments.rounds, arguments.target_ms)
        entry = {**cell.as_dict(), "results": timed}
        data["cells"].append(entry)
        record.save()
        progress(number, len(grid), entry, cell, report.peers_of(data))
    record.save()
    session.say(f"wrote {record.path}")
    return data


def print_summary(data: dict[str, Any]) -> None:
    machine = data["machine"]
    print(
        f"{machine['gpu']}, torch {machine['torch']}, "
        f"cuBLAS bf16 8192^3 {machine['cublas_bf16']['tflops']:.0f} TFLOP/s"
    )
    if data["cells"]:
        print("\nTFLOP/s, forward, " + data["settings"]["dtype"])
        print(report.text_table(*report.forward_rows(data)))
        print("\nours / best peer, geometric mean")
        print(
            "  ".join(f"{key}: {report.show(mean, 3)}" for key, mean in report.forward_means(data))
        )
    if "host" in data:
        print("\nhost time of one call (1, 128, 16, 128), us")
        print(report.text_table(*report.host_row(data)))
    for line in report.failures(data):
        print(line)


def main() -> int:
    arguments = parse()
    session.require_gpu()
    data = run(arguments)
    print_summary(data)
    cells = [*data["cells"], *([data["host"]] if "host" in data else [])]
    failed = any("error" in entry["results"].get(report.OURS, {}) for entry in cells)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
