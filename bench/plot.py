"""Draws a comparison's results on N(0, 1): one panel for each head dim and mask, ours beside the
peers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import report
from bench.comparison import KINDS

COLORS = {
    report.OURS: "#2f6f4f",
    f"{report.OURS}:deterministic": "#8fbfa3",
    "sdpa-cudnn": "#b7c4d1",
    "sdpa-flash": "#dfe5ea",
    "fa3-fwd": "#e3b778",
    "fa3": "#c98f42",
    "fa3-xformers": "#a5652e",
    "fa4": "#8f9fc4",
}
FALLBACK = "#c9b7d1"
INK = "#24292f"


def shown_seqlen(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def panels(data: dict[str, Any]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for entry in report.normal_cells(data):
        groups.setdefault((entry["head_dim"], entry["mask"]), []).append(entry)
    return groups


def draw_panel(axes, entries: list[dict[str, Any]], providers: list[str], labels: dict[str, str]):
    width = 0.84 / len(providers)
    for i, name in enumerate(providers):
        speeds = [report.tflops(entry, name) or 0.0 for entry in entries]
        left = [x - 0.42 + (i + 0.5) * width for x in range(len(entries))]
        color = COLORS.get(name, FALLBACK)
        axes.bar(left, speeds, width=width * 0.94, color=color, label=labels[name], zorder=2)
        if name == report.OURS:
            for x, speed in zip(left, speeds, strict=True):
                axes.annotate(
                    f"{speed:.0f}",
                    (x, speed),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    color=INK,
                    weight="bold",
                )
    axes.set_xticks(range(len(entries)), [shown_seqlen(entry["seqlen"]) for entry in entries])
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8, zorder=0)
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9aa3ad")


def draw(data: dict[str, Any]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "cute_kernels"  # the same data draw the same file
    providers = [
        name
        for name in data["providers"]
        if any(report.tflops(entry, name) is not None for entry in report.normal_cells(data))
    ]
    labels = {name: data["providers"][name]["label"] for name in providers}
    groups = panels(data)
    head_dims = list(dict.fromkeys(head_dim for head_dim, _ in groups))
    masks = list(dict.fromkeys(mask for _, mask in groups))
    figure, grid = plt.subplots(
        len(head_dims),
        len(masks),
        figsize=(6.2 * len(masks), 2.7 * len(head_dims) + 0.9),
        squeeze=False,
        sharey="row",
        facecolor="white",
    )
    for row, head_dim in enumerate(head_dims):
        for column, mask in enumerate(masks):
            axes = grid[row][column]
            if (head_dim, mask) not in groups:
                axes.set_visible(False)
                continue
            draw_panel(axes, groups[head_dim, mask], providers, labels)
            axes.set_title(f"head dim {head_dim}, {mask}", fontsize=10, color=INK, loc="left")
            if column == 0:
                axes.set_ylabel("TFLOP/s", fontsize=9, color=INK)
            if row == len(head_dims) - 1:
                axes.set_xlabel("sequence length", fontsize=9, color=INK)
    machine = data["machine"]
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.suptitle(
        f"Attention {data['kind']}, {data['settings']['dtype']}, {machine['gpu']}",
        fontsize=12,
        color=INK,
        weight="bold",
    )
    figure.legend(
        handles,
        names,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.42 / figure.get_figheight()),
        ncol=len(names),
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.62 / figure.get_figheight()))
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument(
        "results", type=Path, help="a JSON file written by bench.forward or bench.backward"
    )
    parser.add_argument("--formats", nargs="+", default=["svg", "png"])
    chosen = parser.parse_args()
    data = report.load(chosen.results)
    if data.get("kind") not in KINDS or not report.normal_cells(data):
        print(f"bench: {chosen.results} holds no cells of a comparison on N(0, 1)", file=sys.stderr)
        return 2
    figure = draw(data)
    for kind in chosen.formats:
        path = chosen.results.with_suffix(f".{kind}")
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
