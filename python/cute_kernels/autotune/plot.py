"""Draws what searches tried: for each a panel, in it a bar for each row that was timed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from cute_kernels.autotune.tuned import Tuned

INK, FAINT = "#24292f", "#6a737d"
WINNER, AUTOMATIC, BUILT, TRIED = "#2f6f4f", "#e3b778", "#b7c4d1", "#dfe5ea"
LEGEND = {
    "the fastest": WINNER,
    "the automatic choice": AUTOMATIC,
    "other rows of the build": BUILT,
    "rows of the search": TRIED,
}
WIDTH, MARGIN = 860, 16
LABEL, NUMBERS = 290, 150  # of a row's name, and of its figures
BAR, LINE = 13, 20
FONT = "font-family='ui-monospace, Menlo, Consolas, monospace'"
REASONS = 4  # that are named; the others are counted


def draw(runs: Sequence[Tuned]) -> str:
    """An SVG. Bars are speeds relative to the automatic choice's, whiskers the quartiles."""
    parts, y = list(_legend()), 56.0
    for run in runs:
        panel, y = _panel(run, y)
        parts += panel
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{y:.0f}' "
            f"viewBox='0 0 {WIDTH} {y:.0f}' font-size='12' {FONT} fill='{INK}'>",
            "<rect width='100%' height='100%' fill='white'/>",
            *parts,
            "</svg>\n",
        ]
    )


def _legend() -> Iterator[str]:
    x = float(MARGIN)
    for text, color in LEGEND.items():
        yield _box(x, 18, 12, color)
        yield _text(x + 18, 28, text)
        x += 40 + 7.3 * len(text)


def _panel(run: Tuned, y: float) -> tuple[list[str], float]:
    seconds = run.seconds
    reference = seconds[run.automatic]
    best = max(reference / min(samples) for samples in run.samples.values())
    left = MARGIN + LABEL
    scale = (WIDTH - MARGIN - NUMBERS - left) / best
    parts = [_text(MARGIN, y, title(run), "font-weight='bold'")]
    parts.append(_text(WIDTH - MARGIN - 86, y, "speed", "text-anchor='end'", FAINT))
    parts.append(_text(WIDTH - MARGIN, y, "µs", "text-anchor='end'", FAINT))
    top = y = y + 12
    for name, median in seconds.items():
        speed, middle = reference / median, y + BAR / 2
        samples = run.samples[name]
        low, high = (reference / x * scale for x in _quartiles(samples))
        parts += [
            _text(left - 8, y + 11, _shown(name), "text-anchor='end'"),
            _box(left, y, speed * scale, _color(run, name)),
            f"<path d='M{left + high:.1f} {middle:.1f}H{left + low:.1f}' stroke='{INK}'/>",
            _text(WIDTH - MARGIN - 86, y + 11, f"{speed:.3f}", "text-anchor='end'"),
            _text(WIDTH - MARGIN, y + 11, f"{median * 1e6:.1f}", "text-anchor='end'"),
        ]
        y += LINE
    x = left + scale
    parts.append(
        f"<path d='M{x:.1f} {top - 3:.1f}V{y:.1f}' stroke='{FAINT}' stroke-dasharray='3'/>"
    )
    for line in _left_out(run):
        y += 14
        parts.append(_text(MARGIN, y, line, "font-size='11'", FAINT))
    return parts, y + 34


def title(run: Tuned) -> str:
    """The calls of a search."""
    sizes = run.kind["sizes"]
    return (
        f"{run.kind['pass']} {run.kind['dtype']}, head dim {sizes['head_dim']}, "
        f"{'causal' if sizes['causal'] else 'full'}, {sizes['batch']} x {sizes['heads']} heads of "
        f"{sizes['seqlen_q']} queries and {sizes['seqlen_k']} keys, {run.kind['gpu']}"
    )


def _left_out(run: Tuned) -> list[str]:
    lines = []
    if run.failed:
        wrong = sum(why.startswith("wrong") for why in run.failed.values())
        lines.append(
            f"{len(run.failed) - wrong} rows did not compile or launch, {wrong} gave wrong results"
        )
    named = sorted(run.refused.items(), key=lambda item: -item[1])
    if named:
        lines.append("rows that cannot become a kernel, by reason:")
        lines += [f"  {count:4}  {_cut(why, 110)}" for why, count in named[:REASONS]]
        if others := named[REASONS:]:
            lines.append(
                f"  {sum(count for _, count in others):4}  for {len(others)} other reasons"
            )
    return lines


def _color(run: Tuned, name: str) -> str:
    if name == run.name:
        return WINNER
    if name == run.automatic:
        return AUTOMATIC
    return TRIED if run.rows[name]["mask"] == "none" else BUILT


def _quartiles(samples: list[float]) -> tuple[float, float]:
    if len(samples) == 1:
        return samples[0], samples[0]
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return lower, upper


def _shown(name: str) -> str:
    return _cut(name, 38)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _text(x: float, y: float, text: str, style: str = "", color: str = INK) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' fill='{color}' xml:space='preserve' {style}>"
        f"{escape(text)}</text>"
    )


def _box(x: float, y: float, width: float, color: str) -> str:
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{BAR}' rx='2' fill='{color}'/>"
    )
