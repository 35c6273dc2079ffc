"""Writes what was measured between the markers of two pages, from the results files: geometric
means into README.md, every cell into docs/benchmarks.md."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import ablation, caches, decode_step, fp8, packed, report, train_step, variants
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


def title(data: dict[str, Any]) -> str:
    what = GRIDS[data["settings"].get("grid", "paper")]
    gpu = data["machine"]["gpu"].removeprefix("NVIDIA ").split()[0]
    return f"{KINDS[data['kind']]}, {data['settings']['dtype']}, {what}, {gpu}"


def timed_peers(data: dict[str, Any]) -> list[str]:
    return [
        name
        for name in report.peers_of(data)
        if any(report.tflops(cell, name) for cell in data["cells"])
    ]


def means_block(results: Iterable[Path]) -> str:
    """README's table: a line for each comparison, and what it was measured on."""
    comparisons = [data for _, data in load_all(results) if data["kind"] in KINDS]
    means = [
        {key: mean for key, mean in report.ratio_means(data) if mean is not None}
        for data in comparisons
    ]
    keys = list(dict.fromkeys(key for line in means for key in line if key != "all"))
    others = [report.other_data(data["cells"]) for data in comparisons]
    kinds = list(dict.fromkeys(kind for other in others for kind in other))
    rows = []
    for data, mean, other in zip(comparisons, means, others, strict=True):
        peers = report.peers_of(data)
        cells = [report.normal_cells(data), *(other.get(kind, []) for kind in kinds)]
        rows.append(
            [
                title(data),
                ", ".join(timed_peers(data)) or "-",
                *(report.show(mean.get(key), 2) for key in [*keys, "all"]),
                *(report.show_lowest(report.lowest(of_kind, peers)) for of_kind in cells),
            ]
        )
    lowest = ["lowest cell", *(f"lowest on {kind}" for kind in kinds)]
    header = ["ours / best peer", "peers", *keys, "all", *lowest]
    gpus = ", ".join(dict.fromkeys(data["machine"]["gpu"] for data in comparisons))
    dates = sorted(data["date"].split()[0] for data in comparisons)
    if not comparisons:
        return ""
    days = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    commits = ", ".join(dict.fromkeys(str(data["commit"] or "unknown") for data in comparisons))
    return f"{report.markdown_table(header, rows)}\n\n{gpus}; {days}; of commits {commits}."


def comparison_section(path: Path, data: dict[str, Any], folder: Path) -> str:
    """One comparison's results for a page in `folder`: each cell, the means, host time, the
    plot."""
    peers = report.peers_of(data)
    problems = report.problems(data)
    timed = timed_peers(data)
    other = report.other_data(data["cells"])
    lines = [f"## {title(data)}", "", provenance(data), ""]
    plot = path.with_suffix(".svg")
    if plot.exists():
        relative = Path(os.path.relpath(plot, folder)).as_posix()
        lines += [f"![{title(data)}, TFLOP/s by sequence length]({relative})", ""]
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
    lines += ["TFLOP/s of every cell:", "", table]
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


def ablation_section(data: dict[str, Any]) -> str:
    header, rows = ablation.table(data)
    dtype = data["settings"]["dtype"]
    return "\n".join(
        [
            "## What the switches are worth",
            "",
            f"TFLOP/s, forward, {dtype}, head dim {data['settings']['head_dim']} (columns: mask, "
            f"batch x sequence length): {provenance(data)}",
            "",
            report.markdown_table(header, rows),
        ]
    )


def backward(data: dict[str, Any]) -> bool:
    return data["settings"].get("backward", False)


def packed_section(data: dict[str, Any]) -> str:
    of_pass = "backward" if backward(data) else "forward"
    only = data["settings"].get("only")
    subject = f"Packed sequences, {only}" if only else "Packed sequences, windows, other head dims"
    return section(
        data,
        f"{subject}, {of_pass}",
        "Causal. TFLOP/s of the pairs that are seen, and speed over the best peer's; ours:dense "
        "is the dense kernel, where all lengths are equal.",
        packed.table(data),
    )


def caches_section(data: dict[str, Any]) -> str:
    latent = data["grid"] == "latent"
    names = {"decode": "a few queries", "latent": "latent attention", "eight-bits": "8 bits"}
    what = names.get(data["grid"], data["grid"])
    if only := data["settings"].get("only"):
        what = f"{what}, {only}"
    rows = (
        "latents of 512 beside D columns of rope"
        if latent
        else "64 query and 8 key heads of 128 and pages of 64 where nothing else is said; 8 bits "
        "are e4m3, queries too, and with ours:int8 rotated keys with factors of rows"
    )
    return section(
        data,
        f"Caches, {what}",
        f"Causal; {rows}; keys and values cold. The sum is PyTorch's, of as many bytes.",
        caches.table(data),
    )


def decode_step_section(data: dict[str, Any]) -> str:
    return section(
        data,
        f"A step of generation, a model of {data['settings']['shape'].upper()}",
        "Ours on a paged cache, ours on transformers' static cache, and SDPA on that; logits "
        "are relative to SDPA's.",
        decode_step.table(data["cells"]),
    )


def train_step_section(data: dict[str, Any]) -> str:
    settings = data["settings"]
    how = [
        "packed documents" if settings["packed"] else "one sequence",
        *(["checkpointed activations"] if settings["checkpointing"] else []),
    ]
    return section(
        data,
        f"A training step of a model of {settings['shape'].upper()}, {', '.join(how)}",
        f"{settings['tokens']} tokens, compiled, AdamW.",
        train_step.table(data["results"]),
    )


def fp8_section(data: dict[str, Any]) -> str:
    return section(
        data,
        "Images and videos, 8 bits from tensors of 16",
        "Full attention of one sequence, head dim 128; in 8 bits with quantisation. Error: "
        "relative RMSE of the result.",
        fp8.whole_table(data),
    )


def variants_section(data: dict[str, Any]) -> str:
    arguments = [cell["mask"].startswith(("softcap", "sinks")) for cell in data["cells"]]
    subjects = ["variants", "block masks"] if not all(arguments) else []
    subjects += ["softcap", "sinks"] if any(arguments) else []
    settings = data["settings"]
    subjects += ["gradients"] if settings["backward"] and not settings["forward"] else []
    peer = " beside FlashAttention-4" if settings["peers"] == ["fa4"] else ""
    return section(
        data,
        ", ".join(subjects).capitalize() + peer,
        "TFLOP/s of the pairs that are seen; then the speed of ours over the peer's, and over "
        "others of ours: packed sequences (packed), without softcap, sinks or hook (without), no "
        "hook but the same attention (library), hooks with a block mask where the call needs none "
        "(blocks), without one where it saves work (no-blocks).",
        variants.table(data),
    )


def section(
    data: dict[str, Any], heading: str, text: str, table: tuple[list[str], list[list[str]]]
) -> str:
    heading = f"## {heading}, {data['settings']['dtype']}"
    return "\n\n".join([heading, f"{provenance(data)} {text}", report.markdown_table(*table)])


SECTIONS = {
    "packed": packed_section,
    "caches": caches_section,
    "variants": variants_section,
    "decode_step": decode_step_section,
    "train_step": train_step_section,
    "fp8": fp8_section,
    "ablation": ablation_section,
}


def load_all(results: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """The comparisons and then the others that the page has, among the results files."""
    order = [*KINDS, *SECTIONS]
    loaded = [(path, report.load(path)) for path in sorted(results)]
    known = [pair for pair in loaded if pair[1].get("kind") in order and not on_fp8_page(pair[1])]
    return sorted(known, key=lambda pair: (order.index(pair[1]["kind"]), backward(pair[1])))


def on_fp8_page(data: dict[str, Any]) -> bool:
    """docs/fp8.md has the paper's grid in 8 bits."""
    return data["kind"] == "fp8" and data["settings"].get("grid", "paper") == "paper"


def cells_block(results: Iterable[Path], folder: Path) -> str:
    """What docs/benchmarks.md has between the markers, with links from a page in `folder`."""
    return "\n\n".join(
        SECTIONS[data["kind"]](data)
        if data["kind"] in SECTIONS
        else comparison_section(path, data, folder)
        for path, data in load_all(results)
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme_table", description=__doc__)
    parser.add_argument(
        "results",
        type=Path,
        nargs="*",
        help="results files (default: all in bench/results)",
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--benchmarks", type=Path, default=ROOT / "docs" / "benchmarks.md")
    chosen = parser.parse_args()
    files = chosen.results or sorted((ROOT / "bench" / "results").glob("*.json"))
    files = [path.resolve() for path in files]
    means = means_block(files)
    if not means:
        print("bench: no results of a comparison to write", file=sys.stderr)
        return 2
    cells = cells_block(files, chosen.benchmarks.resolve().parent)
    for page, written in ((chosen.readme, means), (chosen.benchmarks, cells)):
        page.write_text(replace_block(page.read_text(), written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
