"""What the cost model of context parallelism says, beside what was measured, and for more GPUs.

Prints tables of Markdown from a file of bench.context_parallel, and draws its profiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from cute_kernels.distributed import H100, Machine, choose

FUNCTIONS = {
    "ring": ("ring_attn_func", "zigzag"),
    "all-gather": ("all_gather_attn_func", "zigzag"),
    "heads": ("ulysses_attn_func", "contiguous"),
}
TOKENS = {"128k": 1 << 17, "1M": 1 << 20, "8M": 1 << 23}
COLOURS = {"attention": "#4878a8", "exchange": "#d08040", "merge": "#6aa06a", "other": "#a0a0a0"}


def machine_of(cell: dict[str, Any], data: dict[str, Any]) -> Machine:
    """What this GPU does in a second: attention from one GPU's time in this cell, messages from the
    largest that were timed."""
    results = cell["results"]
    forward = results["one GPU, forward"]["median_ms"]
    largest = max(data["exchange"], key=lambda sent: sent["bytes"])
    machine = dataclasses.replace(
        H100,
        forward=cell["flops"] / forward * 1e3,
        link=largest["bytes"] / largest["median_ms"] * 1e3,
    )
    if "one GPU, both" in results:
        backward = results["one GPU, both"]["median_ms"] - forward
        machine = dataclasses.replace(machine, backward=2.5 * cell["flops"] / backward * 1e3)
    return machine


def compared(data: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Of each form and cell what it is, and the milliseconds: measured and predicted."""
    rows = []
    for cell in data["cells"]:
        if "median_ms" not in cell["results"].get("one GPU, forward", {}):
            continue
        machine = machine_of(cell, data)
        for of_pass in ("forward", "both"):
            found = choose(
                cell["seqlen"],
                data["ranks"],
                cell["heads"],
                cell["heads_kv"],
                cell["head_dim"],
                causal=cell["mask"] == "causal",
                backward=of_pass == "both",
                machine=machine,
            )
            predicted = {(p.function, p.layout): 1e3 * p.seconds for p in found}
            for form, key in FUNCTIONS.items():
                result = cell["results"].get(f"{form}, {of_pass}", {})
                if "median_ms" in result and key in predicted:
                    heads = f"{cell['heads']}/{cell['heads_kv']} heads"
                    name = f"{cell['seqlen']} tokens, {heads}, {cell['mask']}: {form}, {of_pass}"
                    rows.append((name, result["median_ms"], predicted[key]))
    return rows


def print_compared(data: dict[str, Any]) -> None:
    print("| | measured, ms | model, ms | off by |\n| --- | --: | --: | --: |")
    for name, measured, predicted in compared(data):
        print(f"| {name} | {measured:.2f} | {predicted:.2f} | {predicted / measured - 1:+.1%} |")


def print_predictions(heads: int, key_heads: int) -> None:
    """The fastest form of each, and the share of as many single GPUs' speed."""
    print(f"\n{heads} query and {key_heads} key heads of 128, causal, forward and backward\n")
    print("| GPUs | " + " | ".join(TOKENS) + " |\n| --: | " + "--- | " * len(TOKENS))
    for ranks in (2, 4, 8, 16, 32, 64):
        cells = []
        for tokens in TOKENS.values():
            best = choose(tokens, ranks, heads, key_heads, causal=True)[0]
            mesh = f" {best.mesh[0]}x{best.mesh[1]}" if best.mesh[1] > 1 else ""
            name = best.function.removesuffix("_attn_func").replace("_", "-")
            cells.append(f"{best.efficiency:.0%} ({name}{mesh})")
        print(f"| {ranks} | " + " | ".join(cells) + " |")


def print_forms(ranks: int, heads: int, key_heads: int, backward: bool) -> None:
    """What to expect of each form, before it is measured."""
    passes = "forward and backward" if backward else "forward"
    print(f"\n{ranks} GPUs of a node, {heads} query and {key_heads} key heads of 128, {passes}\n")
    columns = {
        "ring": ("ring_attn_func", "zigzag", (ranks, 1)),
        "all-gather": ("all_gather_attn_func", "zigzag", (ranks, 1)),
        "heads": ("ulysses_attn_func", "contiguous", (1, ranks)),
        **{
            f"{ranks // shared} x {shared}": (
                "ulysses_attn_func",
                "zigzag",
                (ranks // shared, shared),
            )
            for shared in (2, 4)
            if shared < ranks
        },
    }
    print("| tokens | " + " | ".join(columns) + " |\n| --- |" + " --: |" * len(columns))
    for tokens in (1 << 16, 1 << 18, 1 << 20):
        for causal in (True, False):
            found = choose(tokens, ranks, heads, key_heads, causal=causal, backward=backward)
            shares = {(p.function, p.layout, p.mesh): p.efficiency for p in found}
            cells = [f"{shares[key]:.0%}" if key in shares else "-" for key in columns.values()]
            mask = "causal" if causal else "full"
            print(f"| {tokens >> 10}k, {mask} | " + " | ".join(cells) + " |")


def draw(profiles: list[dict[str, Any]], path: Path) -> None:
    """One row of bars a profile and kind: when kernels and messages ran."""
    width, height, left = 900, 22, 230
    lines, y = [], 10
    for profile in profiles:
        end = max(span["to_us"] for span in profile["spans"])
        title = f"{profile['tokens']} tokens, {profile['form']}: {end / 1e3:.1f} ms"
        lines.append(f'<text x="4" y="{y + 14}" font-weight="bold">{title}</text>')
        for kind in (k for k in COLOURS if any(s["kind"] == k for s in profile["spans"])):
            y += height
            lines.append(f'<text x="{left - 90}" y="{y + 14}">{kind}</text>')
            for span in profile["spans"]:
                if span["kind"] == kind:
                    x = left + span["from_us"] / end * (width - left - 10)
                    bar = max(0.6, (span["to_us"] - span["from_us"]) / end * (width - left - 10))
                    lines.append(
                        f'<rect x="{x:.1f}" y="{y + 2}" width="{bar:.1f}" height="{height - 6}" '
                        f'fill="{COLOURS[kind]}"/>'
                    )
        y += height + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" '
    head += 'font-family="sans-serif" font-size="12">\n'
    lines.insert(0, '<rect width="100%" height="100%" fill="#fff"/>')
    path.write_text(head + "\n".join(lines) + "\n</svg>\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.context_model", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="of bench.context_parallel")
    parser.add_argument("--draw", type=Path, help="file of SVG for its profiles")
    chosen = parser.parse_args(arguments)
    if chosen.results is not None:
        data = json.loads(chosen.results.read_text())
        print_compared(data)
        if chosen.draw is not None:
            ring = [p for p in data["profiles"] if p["form"].startswith("ring")]
            draw([p for p in ring if p["heads"] == ring[0]["heads"]], chosen.draw)
    for heads, key_heads in ((16, 16), (32, 8)):
        print_predictions(heads, key_heads)
    for heads, key_heads in ((32, 32), (32, 8)):
        for backward in (False, True):
            print_forms(8, heads, key_heads, backward)
    return 0


if __name__ == "__main__":
    sys.exit(main())
