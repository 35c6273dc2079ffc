"""Draws docs/pipeline.svg: the warps of one forward CTA over time, from a row of the tile table.

    python docs/draw_pipeline.py [--row NAME] [--output FILE]

The picture is schematic, not measured: which step waits for which is simulated from the row's
constants and the rates of an H100 SM. docs/pipeline.md says the same in words.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "python" / "cute_kernels"))  # without what is compiled

from compile.table import read_table  # noqa: E402
from pipeline_timeline import Arrow, Bar, Frame, Simulation, Timeline  # noqa: E402

TABLE = ROOT / "cute_kernels" / "attention" / "tile_configs.toml"

KEY_BLOCKS = 4  # key blocks of the drawn tile


def load_row(name: str | None, table: Path = TABLE) -> dict:
    """The named kernel, or the first one of head dim 128 with pingpong and overlap."""
    for row in read_table(table.read_text(encoding="utf-8")):
        if name is not None and row["name"] == name:
            return row
        if name is None and row["head_dim"] == 128 and row["pingpong"] and row["overlap"]:
            return row
    raise SystemExit(f"{table} has no such row")


FONT = "'Inter', 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
INK, FAINT, RULE = "#1f2933", "#5b6875", "#d9dee4"
STYLE = {  # kind -> (fill, stroke)
    "loadQ": ("#d5dde6", "#8896a5"),
    "loadK": ("#bfe0dc", "#4c9a92"),
    "loadV": ("#c9dcf2", "#5b8cc4"),
    "fillK": ("url(#fillK)", "#4c9a92"),
    "fillV": ("url(#fillV)", "#5b8cc4"),
    "holdK": ("#bfe0dc", "#4c9a92"),
    "holdV": ("#c9dcf2", "#5b8cc4"),
    "qk": ("#f7c59f", "#d07f33"),
    "pv": ("#f3a0a0", "#c25454"),
    "softmax": ("#d9c8ec", "#8a66b8"),
    "rescale": ("#f0e6a8", "#b39b2d"),
    "epilogue": ("#cfe3bb", "#6d9a45"),
    "store": ("#cfe3bb", "#6d9a45"),
    "wait": ("url(#wait)", "none"),
}
ARROWS = {"full": "#23756c", "empty": "#b3541e", "turn": "#3a4a9f"}
UNIT = 50.0  # pixels a unit of time
LEFT, TOP, ROW, BAR = 240, 92, 34, 26
GAP_AFTER = 16  # between groups of lanes


class Canvas:
    """Places a timeline's lanes and bars; one method an element."""

    def __init__(self, timeline: Timeline, groups: list[tuple[str, int]]):
        self.timeline = timeline
        self.groups = groups
        self.y: dict[str, float] = {}
        y, lanes = float(TOP), iter(timeline.lanes)
        self.group_boxes = []
        for title, count in groups:
            top = y
            for _ in range(count):
                self.y[next(lanes)[0]] = y
                y += ROW
            self.group_boxes.append((title, top, y))
            y += GAP_AFTER
        self.bottom = y
        self.width = LEFT + timeline.end * UNIT + 34
        self.parts: list[str] = []

    def x(self, time: float) -> float:
        return LEFT + time * UNIT

    def middle(self, lane: str) -> float:
        return self.y[lane] + ROW / 2

    def text(self, x, y, content, size=12.0, anchor="start", fill=INK, weight="400") -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{fill}" font-weight="{weight}">{escape(content)}</text>'
        )

    def draw_bar(self, bar: Bar) -> None:
        fill, stroke = STYLE[bar.kind]
        x, width = self.x(bar.start), (bar.end - bar.start) * UNIT
        y = self.y[bar.lane] + (ROW - BAR) / 2
        height = float(BAR)
        if bar.kind == "wait":
            y, height = y + BAR / 2 - 4, 8.0
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="3" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def label_bar(self, bar: Bar) -> None:
        """The bar's text, over the arrows, with a rim in the bar's colour."""
        if not bar.text:
            return
        fill, _ = STYLE[bar.kind]
        x = self.x((bar.start + bar.end) / 2)
        self.parts.append(
            f'<text x="{x:.1f}" y="{self.middle(bar.lane) + 4.2:.1f}" font-size="12" '
            f'text-anchor="middle" fill="{INK}" stroke="{fill}" stroke-width="3" '
            f'paint-order="stroke">{escape(bar.text)}</text>'
        )

    def draw_arrow(self, arrow: Arrow) -> None:
        color = ARROWS[arrow.kind]
        x0, x1 = self.x(arrow.start), self.x(arrow.end)
        down = self.y[arrow.lane_to] > self.y[arrow.lane_from]
        y0 = self.y[arrow.lane_from] + (ROW - 4 if down else 4)
        y1 = self.y[arrow.lane_to] + (3 if down else ROW - 3)
        bend = (y1 - y0) * 0.5
        self.parts.append(
            f'<path d="M{x0:.1f},{y0:.1f} C{x0:.1f},{y0 + bend:.1f} {x1:.1f},{y1 - bend:.1f} '
            f'{x1:.1f},{y1:.1f}" fill="none" stroke="{color}" stroke-width="1.7" '
            f'marker-end="url(#head-{arrow.kind})"/>'
        )
        if arrow.mark:
            self.draw_mark(*between(x0, x1, y0, y1, arrow.mark_at), arrow.mark, color)

    def draw_mark(self, x: float, y: float, mark: str, color: str = INK) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8.5" fill="{color}"/>')
        self.text(x, y + 3.9, mark, 11, "middle", "#ffffff", "700")

    def draw_frame(self, frame: Frame) -> None:
        x0, x1 = self.x(frame.start) - 4, self.x(frame.end) + 4
        y0, y1 = self.y[frame.lanes[0]] - 1, self.y[frame.lanes[1]] + ROW + 1
        self.parts.append(
            f'<rect x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" rx="6" '
            f'fill="none" stroke="{INK}" stroke-width="1.5" stroke-dasharray="5 3"/>'
        )
        self.draw_mark(x1, y1, frame.mark)

    def draw_lanes(self) -> None:
        titles = dict(self.timeline.lanes)
        for title, top, bottom in self.group_boxes:
            self.parts.append(
                f'<rect x="14" y="{top - 4:.1f}" width="{self.width - 28:.1f}" '
                f'height="{bottom - top + 8:.1f}" rx="7" fill="#f5f7f9" stroke="{RULE}"/>'
            )
            lines = title.split("\n")
            y = (top + bottom) / 2 + 4.5 - 8 * (len(lines) - 1)
            for i, line in enumerate(lines):
                size, fill = (13, INK) if i == 0 else (11, FAINT)
                self.text(26, y + 16 * i, line, size, fill=fill, weight="600" if i == 0 else "400")
        for lane, y in self.y.items():
            self.text(LEFT - 10, y + ROW / 2 + 4, titles[lane], 11, "end", FAINT)


def between(x0: float, x1: float, y0: float, y1: float, t: float) -> tuple[float, float]:
    """A point of an arrow's curve."""
    x = x0 + (x1 - x0) * t * t * (3 - 2 * t)
    y = y0 + (y1 - y0) * (1.5 * t * (1 - t) + t**3)
    return x, y


def legend(canvas: Canvas, y: float) -> float:
    """The numbered notes under the lanes; returns where they end."""
    notes = [
        (
            "1",
            ARROWS["full"],
            "full: TMA's bytes of K₂ have landed; the warpgroups may read the stage",
        ),
        (
            "2",
            ARROWS["empty"],
            "empty: every warpgroup has read K₀; the producer may overwrite its stage",
        ),
        (
            "3",
            ARROWS["turn"],
            "turn: one warpgroup's products are issued, the next one's go (pingpong)",
        ),
        ("4", INK, "overlap: softmax of block 2 runs while P V of block 1 is in flight"),
    ]
    column = (canvas.width - 40) / 2
    for i, (mark, color, note) in enumerate(notes):
        x, line = 30 + column * (i // 2), y + 12 + 24 * (i % 2)
        canvas.draw_mark(x, line, mark, color)
        canvas.text(x + 15, line + 4.2, note, 12.5)
    swatches = [
        ("fillK", "TMA fills the stage"),
        ("wait", "waits for its turn"),
        ("rescale", "rescales O if it must"),
    ]
    line, x = y + 62, 22.0
    for kind, note in swatches:
        fill, stroke = STYLE[kind]
        canvas.parts.append(
            f'<rect x="{x:.1f}" y="{line - 6:.1f}" width="22" height="12" rx="2" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )
        canvas.text(x + 28, line + 4, note, 11.5, fill=FAINT)
        x += 50 + 6.4 * len(note)
    canvas.text(
        canvas.width - 24,
        line + 4,
        "QK₁ = Q·K₁ᵀ, PV₀ = P₀·V₀. Schematic, not measured.",
        11.5,
        "end",
        FAINT,
    )
    return line + 22


DEFINITIONS = """<defs>
{patterns}
{heads}
</defs>"""


def definitions() -> str:
    hatch = (
        '<pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="6" height="6" fill="{light}"/>'
        '<line x1="0" y1="0" x2="0" y2="6" stroke="{dark}" stroke-width="2.4"/></pattern>'
    )
    patterns = [
        hatch.format(name="fillK", light="#eef8f6", dark="#bfe0dc"),
        hatch.format(name="fillV", light="#eff5fc", dark="#c9dcf2"),
        hatch.format(name="wait", light="#eef0f3", dark="#cdd3da"),
    ]
    heads = [
        f'<marker id="head-{kind}" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto-start-reverse"><path d="M0,0.5 L8,4 L0,7.5 z" '
        f'fill="{color}"/></marker>'
        for kind, color in ARROWS.items()
    ]
    return DEFINITIONS.format(patterns="\n".join(patterns), heads="\n".join(heads))


def draw(row: dict) -> str:
    """The whole SVG for a row of the tile table."""
    stages, consumers = row["stages"], row["consumer_warpgroups"]
    timeline = Simulation(row["tile_n"], stages, consumers, row["head_dim"]).run(KEY_BLOCKS)
    groups = [("Producer warp\nTMA only", 1), ("Shared memory\nring of stages", 2 * stages)]
    groups += [(f"Consumer\nwarpgroup {wg + 1}", 2) for wg in range(consumers)]
    canvas = Canvas(timeline, groups)
    canvas.draw_lanes()
    for bar in timeline.bars:
        canvas.draw_bar(bar)
    for arrow in timeline.arrows:
        canvas.draw_arrow(arrow)
    for bar in timeline.bars:
        canvas.label_bar(bar)
    for frame in timeline.frames:
        canvas.draw_frame(frame)
    canvas.text(22, 38, "One tile of queries through the forward kernel", 19, weight="700")
    canvas.text(
        22,
        60,
        f"head dim {row['head_dim']}: {row['tile_m']} queries x {row['tile_n']} keys a block, "
        f"{stages} stages, {consumers} consumer warpgroups of 64 queries",
        13,
        fill=FAINT,
    )
    canvas.text(canvas.width - 24, 60, "time →", 12, "end", FAINT)
    height = legend(canvas, canvas.bottom + 6)
    width = canvas.width
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'width="{width:.0f}" height="{height:.0f}" font-family="{FONT}">',
            "<title>Warp roles of the forward kernel over time</title>",
            definitions(),
            f'<rect width="{width:.0f}" height="{height:.0f}" rx="10" fill="#ffffff"/>',
            *canvas.parts,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--row", metavar="NAME", help="kernel of the table (default: the first of head dim 128)"
    )
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pipeline.svg")
    chosen = parser.parse_args()
    chosen.output.write_text(draw(load_row(chosen.row, chosen.table)), encoding="utf-8")


if __name__ == "__main__":
    main()
