"""Writes the measured tables into README.md, between the markers, from the results files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import ablation, report
from bench.cells import NORMAL, cell_name, data_of
from bench.comparison import HOST_CALL, KINDS

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- benchmark: begin (written by python -m bench.readme_table) -->"
END = "<!-- benchmark: end -->"


def replace_block(text: str, block: str) -> str:
    """The text with everything between the markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the markers {BEGIN!r} and {END!r} are not there")
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{after}"


def provenance(data: dict[str, Any]) -> str:
    machine = data["machine"]
    clocks = machine.get("cublas_bf16", {})
    parts = [
        machine["gpu"],
        f"driver {machine.get('nvidia_smi_idle', {}).get('driver_version', 'unknown')}",
        f"torch {machine['torch']}",
        f"CUDA {machine['cuda']}",
        f"commit {data['commit'] or 'unknown'}",
        data["date"],
    ]
    if "tflops" in clocks:
        parts.append(f"cuBLAS bf16 8192³ on the same card {clocks['tflops']:.0f} TFLOP/s")
    return ", ".join(parts) + "."


GRIDS = {
    "paper": "the paper's grid",
    "latency": "one sequence of 16 heads",
    "llama": "64 query and 8 key heads of 128",
}


def comparison_section(path: Path, root: Path) -> str:
    """Tables of one comparison's results: each cell, the means, host time, and the plot."""
    data = report.load(path)
    kind = KINDS[data["kind"]]
    peers = report.peers_of(data)
    problems = report.problems(data)
    timed = [p for p in peers if any(report.tflops(cell, p) for cell in data["cells"])]
    other = report.other_data(data["cells"])
    dtype = data["settings"]["dtype"]
    what = GRIDS[data["settings"].get("grid", "paper")]
    lines = [f"**{kind}, {dtype}, {what}**: {provenance(data)}", ""]
    plot = path.with_suffix(".svg")
    if plot.exists():
        relative = plot.relative_to(root).as_posix()
        lines += [f"![{kind}, {dtype}, TFLOP/s by sequence length]({relative})", ""]
    header = [
        "cell",
        "cute_kernels",
        *timed,
        "ours / best peer",
        *(f"lowest on {x}" for x in other),
    ]
    rows = []
    for name, cells in problems.items():
        normal = cells.get(NORMAL, {"results": {}})
        elsewhere = report.other_data(cells.values())
        rows.append(
            [
                name,
                report.show(report.tflops(normal, report.OURS)),
                *(report.show(report.tflops(normal, peer)) for peer in timed),
                report.show(report.ratio(normal, peers), 2),
                *(
                    report.show_lowest(report.lowest(elsewhere.get(x, []), peers), data_of)
                    for x in other
                ),
            ]
        )
    means = [pair for pair in report.ratio_means(data) if pair[1]]
    table = report.markdown_table(header, rows)
    lines += [f"Geometric mean of ours / best peer: {shown_means(means)}.", ""] if means else []
    if other:
        by_data = report.markdown_table(*report.lowest_rows(data, peers))
        lines += [lowest_line(data, peers, other), "", by_data, ""]
    for name, variant in report.variant_means(data).items():
        label = data["providers"][name]["label"]
        lines += [f"Time of {label} / ours, geometric mean: {shown_means(variant)}.", ""]
    lines += [
        "<details><summary>TFLOP/s of every cell</summary>",
        "",
        table,
        "",
        "</details>",
    ]
    if "host" in data:
        names, rows = report.host_row(data)
        shown = ", ".join(f"{name} {us} µs" for name, us in zip(names, rows[0], strict=True))
        lines += ["", f"Host time of {HOST_CALL[data['kind']]} (1, 128, 16, 128): {shown}."]
    return "\n".join(lines)


def lowest_line(
    data: dict[str, Any], peers: list[str], other: dict[str, list[dict[str, Any]]]
) -> str:
    """The worst of all cells, beside the means on N(0, 1)."""
    kinds = {"N(0, 1)": report.normal_cells(data), **other}
    shown = (
        f"on {kind} {report.show_lowest(report.lowest(cells, peers), cell_name)}"
        for kind, cells in kinds.items()
    )
    return f"Lowest ours / best peer of any cell: {', '.join(shown)}."


def shown_means(means: Iterable[tuple[str, float | None]]) -> str:
    return ", ".join(f"{key} {report.show(mean, 2)}" for key, mean in means)


def ablation_section(path: Path) -> str:
    data = report.load(path)
    header, rows = ablation.table(data)
    dtype = data["settings"]["dtype"]
    return "\n".join(
        [
            f"**What the switches are worth**, TFLOP/s, forward, {dtype}, head dim "
            f"{data['settings']['head_dim']} (columns: mask, batch x sequence length): "
            f"{provenance(data)}",
            "",
            report.markdown_table(header, rows),
        ]
    )


def block(results: Iterable[Path], root: Path) -> str:
    """What stands between the markers for these results files."""
    sections: dict[str, list[str]] = {**{kind: [] for kind in KINDS}, "ablation": []}
    for path in sorted(results):
        kind = report.load(path).get("kind")
        if kind in KINDS:
            sections[kind].append(comparison_section(path, root))
        elif kind == "ablation":
            sections[kind].append(ablation_section(path))
    return "\n\n".join(section for of_kind in sections.values() for section in of_kind)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_table", description=__doc__)
    parser.add_argument(
        "results",
        type=Path,
        nargs="*",
        help="results files (default: all in bench/results)",
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    chosen = parser.parse_args()
    files = chosen.results or sorted((ROOT / "bench" / "results").glob("*.json"))
    written = block([path.resolve() for path in files], ROOT)
    if not written:
        print("bench: no results of a comparison or ablation to write", file=sys.stderr)
        return 2
    chosen.readme.write_text(replace_block(chosen.readme.read_text(), written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
