"""From recorded results to ratios and tables: no GPU and no torch needed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.cells import NORMAL, cell_name, data_of
from bench.distributions import DISTRIBUTIONS

OURS = "ours"


def load(path: Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def tflops(entry: dict[str, Any], provider: str) -> float | None:
    """A provider's TFLOP/s in a cell's entry; None where it was not timed."""
    return entry["results"].get(provider, {}).get("tflops")


def peers_of(data: dict[str, Any]) -> list[str]:
    return [name for name in data["providers"] if not name.startswith(OURS)]


def best_peer(entry: dict[str, Any], peers: Iterable[str]) -> tuple[str, float] | None:
    timed = [(name, speed) for name in peers if (speed := tflops(entry, name)) is not None]
    return max(timed, key=lambda pair: pair[1], default=None)


def ratio(entry: dict[str, Any], peers: Iterable[str], candidate: str = OURS) -> float | None:
    """The candidate's speed over the best peer's in the same cell."""
    mine, best = tflops(entry, candidate), best_peer(entry, peers)
    return None if mine is None or best is None else mine / best[1]


def lowest(
    entries: Iterable[dict[str, Any]], peers: Iterable[str], candidate: str = OURS
) -> tuple[float, dict[str, Any]] | None:
    """The candidate's lowest ratio in any of the cells, and the cell: 0 where it failed."""
    peers = tuple(peers)
    ratios = []
    for entry in entries:
        failed = "error" in entry["results"].get(candidate, {})
        known = 0.0 if failed else ratio(entry, peers, candidate)
        if known is not None:
            ratios.append((known, entry))
    return min(ratios, key=lambda pair: pair[0], default=None)


def problems(data: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The cells of each problem, by name and then by their data."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in data["cells"]:
        found.setdefault(cell_name({**entry, "data": NORMAL}), {})[data_of(entry)] = entry
    return found


def on_data(entries: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [entry for entry in entries if data_of(entry) == name]


def normal_cells(data: dict[str, Any]) -> list[dict[str, Any]]:
    return on_data(data["cells"], NORMAL)


def other_data(entries: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cells of other data than N(0, 1), those as models have them and adversarial ones apart."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        if data_of(entry) != NORMAL:
            adversarial = DISTRIBUTIONS[data_of(entry)].adversarial
            kinds.setdefault("adversarial data" if adversarial else "other data", []).append(entry)
    return kinds


def geometric_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return math.exp(sum(math.log(value) for value in known) / len(known))


def show(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show_means(means: Iterable[tuple[str, float | None]], digits: int, between: str = "  ") -> str:
    return between.join(f"{key}: {show(mean, digits)}" for key, mean in means)


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned for a terminal; the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *("--:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def cell_rows(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One line a cell: TFLOP/s of every provider timed anywhere, and ours over the best peer."""
    peers = peers_of(data)
    timed = [
        name
        for name in data["providers"]
        if any(tflops(entry, name) is not None for entry in data["cells"])
    ]
    header = ["cell", *timed, "ours/best"]
    rows = [
        [
            cell_name(entry),
            *(shown(entry, name) for name in timed),
            show(ratio(entry, peers), 2),
        ]
        for entry in data["cells"]
    ]
    return header, rows


def shown(entry: dict[str, Any], provider: str) -> str:
    """TFLOP/s, or that there are none."""
    if "error" in entry["results"].get(provider, {}):
        return "failed"
    return show(tflops(entry, provider))


def shown_us(entry: dict[str, Any], provider: str) -> str:
    """Microseconds, or that there are none."""
    result = entry["results"].get(provider, {})
    if "error" in result:
        return "failed"
    time = result.get("median_ms")
    return "-" if time is None else show(1e3 * time, 1)


def ratio_means(data: dict[str, Any]) -> list[tuple[str, float | None]]:
    """Geometric means of the ratio on N(0, 1): of each head dim and mask, then of all cells."""
    peers = peers_of(data)
    entries = normal_cells(data)
    means = [
        (key, geometric_mean(ratio(entry, peers) for entry in group))
        for key, group in _by_head_dim_and_mask(entries).items()
    ]
    return [*means, ("all", geometric_mean(ratio(entry, peers) for entry in entries))]


def _by_head_dim_and_mask(entries: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(f"D={entry['head_dim']} {entry['mask']}", []).append(entry)
    return groups


def lowest_rows(data: dict[str, Any], peers: list[str]) -> tuple[list[str], list[list[str]]]:
    """The lowest ratio of any length: one line for each head dim and mask, one column for each
    distribution."""
    names = [name for name in DISTRIBUTIONS if on_data(data["cells"], name)]
    rows = [
        [key, *(show_lowest(lowest(on_data(group, name), peers)) for name in names)]
        for key, group in _by_head_dim_and_mask(data["cells"]).items()
    ]
    return ["lowest of any length", *names], rows


def show_lowest(
    found: tuple[float, dict[str, Any]] | None, name: Callable[[dict[str, Any]], str] | None = None
) -> str:
    """A ratio, with the name of its cell if that is asked for."""
    if found is None:
        return "-"
    value, entry = found
    shown = show(value, 2) if value else "failed"
    return shown if name is None else f"{shown} {name(entry)}"


def variant_means(data: dict[str, Any]) -> dict[str, list[tuple[str, float | None]]]:
    """Of each of our other candidates: geometric means by head dim of its time over ours,
    on N(0, 1)."""
    variants = [name for name in data["providers"] if name.startswith(f"{OURS}:")]
    result = {}
    for name in variants:
        groups: dict[str, list[float | None]] = {}
        for entry in normal_cells(data):
            of_variant = ratio(entry, [OURS], name)
            key = f"D={entry['head_dim']}"
            groups.setdefault(key, []).append(None if of_variant is None else 1 / of_variant)
        result[name] = [(key, geometric_mean(values)) for key, values in groups.items()]
    return result


def host_row(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Host time in microseconds of every provider that was timed."""
    timed = data["host"]["results"]
    names = [name for name in data["providers"] if "median_us" in timed.get(name, {})]
    return names, [[show(timed[name]["median_us"], 1) for name in names]]


def failures(data: dict[str, Any]) -> list[str]:
    """One line for every provider and kind of error: the first message of each kind."""
    seen: dict[tuple[str, str], list[str]] = {}
    messages: dict[tuple[str, str], str] = {}

    def note(name: str, message: str, where: str) -> None:
        key = (name, re.sub(r"[0-9.e+-]+", "#", message))
        messages.setdefault(key, message)
        seen.setdefault(key, []).append(where)

    for name, provider in data.get("providers", {}).items():
        if "missing" in provider:
            note(name, provider["missing"], "not run")
    for entry in data["cells"]:
        for name, result in entry["results"].items():
            if "error" in result:
                note(name, result["error"], cell_name(entry))
    for name, result in data.get("host", {}).get("results", {}).items():
        if "error" in result:
            note(name, result["error"], "host time")
    lines = []
    for key, cells in seen.items():
        where = ", ".join(cells[:3]) + (f" and {len(cells) - 3} more" if len(cells) > 3 else "")
        lines.append(f"{key[0]} [{where}]: {messages[key]}")
    return lines
