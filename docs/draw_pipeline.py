"""Draws docs/pipeline.svg: the warps of one forward CTA over time, from a row of the tile table.

    python docs/draw_pipeline.py [--row NAME] [--output FILE]

The picture is schematic, not measured: which step waits for which is simulated from the row's
constants and the rates of an H100 SM. docs/pipeline.md says the same in words.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "python" / "cute_kernels"))  # without what is compiled

from compile.table import read_table  # noqa: E402

TABLE = ROOT / "cute_kernels" / "attention" / "tile_configs.toml"

KEY_BLOCKS = 4  # key blocks of the drawn tile
WGMMA_FLOP_PER_CLOCK = 4096
EXP_PER_CLOCK = 16
SOFTMAX_OVER_EXP = 1.55  # maximum, scaling, sum and conversion beside the exponentials
WARPGROUP_M = 64


@dataclass
class Bar:
    lane: str
    start: float
    end: float
    kind: str
    text: str = ""


@dataclass
class Arrow:
    """From one lane to another, where one side of a barrier arrives and the other stops waiting."""

    lane_from: str
    start: float
    lane_to: str
    end: float
    kind: str
    mark: str = ""
    mark_at: float = 0.5  # 0: at the tail, 1: at the head


@dataclass
class Frame:
    """A dashed box around what runs at the same time."""

    lanes: tuple[str, str]
    start: float
    end: float
    mark: str


@dataclass
class Timeline:
    lanes: list[tuple[str, str]]  # (key, title)
    bars: list[Bar] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)

    @property
    def end(self) -> float:
        return max(bar.end for bar in self.bars)


def load_row(name: str | None, table: Path = TABLE) -> dict:
    """The named kernel, or the first one of head dim 128 with pingpong and overlap."""
    for row in read_table(table.read_text(encoding="utf-8")):
        if name is not None and row["name"] == name:
            return row
        if name is None and row["head_dim"] == 128 and row["pingpong"] and row["overlap"]:
            return row
    raise SystemExit(f"{table} has no such row")


class Simulation:
    """One tile of queries through one CTA, with what every warp waits for."""

    def __init__(self, tile_n: int, stages: int, consumers: int, head_dim: int):
        self.stages, self.consumers = stages, consumers
        clocks = WARPGROUP_M * tile_n * head_dim * 2 / WGMMA_FLOP_PER_CLOCK
        self.gemm = 1.0  # one product of one warpgroup is the unit of time
        self.softmax = SOFTMAX_OVER_EXP * WARPGROUP_M * tile_n / EXP_PER_CLOCK / clocks
        self.rescale = 0.22
        self.load = 0.62
        self.load_q = 0.5
        self.store = 0.8
        self.timeline = Timeline(lanes=self._lanes())
        self.producer_free = 0.0
        self.tensor_free = 0.0
        self.full: dict[tuple[str, int], float] = {}
        self.load_start: dict[tuple[str, int], float] = {}
        self.empty: dict[tuple[str, int], float] = {}

    def _lanes(self) -> list[tuple[str, str]]:
        lanes = [("tma", "TMA loads")]
        for operand in "KV":
            lanes += [(f"{operand}{s}", f"{operand} stage {s}") for s in range(self.stages)]
        for wg in range(self.consumers):
            lanes += [(f"mma{wg}", "WGMMA"), (f"alu{wg}", "softmax, rescale")]
        return lanes

    def bar(self, lane: str, start: float, end: float, kind: str, text: str = "") -> None:
        if end > start:
            self.timeline.bars.append(Bar(lane, start, end, kind, text))

    def ensure_loaded(self, operand: str, block: int) -> float:
        """When the block has landed. The producer loads in a fixed order into empty stages."""
        while (operand, block) not in self.full:
            self._load(*self.load_order.pop(0))
        return self.full[operand, block]

    def _load(self, operand: str, block: int) -> None:
        start = self.producer_free
        if block >= self.stages:
            start = max(start, self.empty[operand, block - self.stages])
        end = start + self.load
        self.bar("tma", start, end, f"load{operand}", f"{operand}{sub(block)}")
        self.producer_free = end
        self.load_start[operand, block] = start
        self.full[operand, block] = end

    def run(self, blocks: int) -> Timeline:
        self.load_order = [("K", 0)]
        for block in range(blocks):
            self.load_order += [("K", block + 1)] * (block + 1 < blocks) + [("V", block)]
        self.ensure_loaded("K", 0)
        ready = []
        for wg in range(self.consumers):
            start, self.producer_free = self.producer_free, self.producer_free + self.load_q
            self.bar("tma", start, self.producer_free, "loadQ", f"Q{sub(wg)}")
            ready.append(self.producer_free)
        turn = 0.0
        for step in range(blocks + 1):
            turn = self._step(step, blocks, ready, turn)
        self._epilogue(ready)
        self._stage_bars()
        self._annotate()
        return self.timeline

    def _find(self, lane: str, text: str) -> Bar:
        return next(bar for bar in self.timeline.bars if (bar.lane, bar.text) == (lane, text))

    def _annotate(self) -> None:
        """The barriers of one steady-state step, and what overlaps in it."""
        last = self.consumers - 1
        block, stage = self.stages, 0
        load = self._find("tma", f"K{sub(block)}")
        first_use = self._find("mma0", f"QK{sub(block)}")
        last_use = self._find(f"mma{last}", "QK₀")
        arrows = self.timeline.arrows
        arrows.append(Arrow(f"mma{last}", last_use.end, "tma", load.start, "empty", "2", 0.14))
        arrows.append(Arrow(f"K{stage}", load.end, "mma0", first_use.start, "full", "1", 0.55))
        for step in (1, 2, 3):
            for wg in range(self.consumers):
                group_end = self._find(f"mma{wg}", f"PV{sub(step - 1)}").end
                after = (wg + 1) % self.consumers
                if wg < last or step < 3:
                    mark = "3" if (step, wg) == (1, 0) else ""
                    lane_from, lane_to = f"mma{wg}", f"mma{after}"
                    arrows.append(
                        Arrow(lane_from, group_end, lane_to, group_end, "turn", mark, 0.8)
                    )
        overlap = self._find("mma0", "PV₁"), self._find("alu0", "softmax 2")
        end = max(bar.end for bar in overlap)
        self.timeline.frames.append(Frame(("mma0", "alu0"), overlap[0].start, end, "4"))

    def _step(self, step: int, blocks: int, ready: list[float], turn: float) -> float:
        """Each consumer warpgroup in turn issues QK of block `step` and PV of the one before."""
        qk_ends, pv_ends = [], []
        for wg in range(self.consumers):
            issue = max(ready[wg], turn)
            self.bar(f"alu{wg}", ready[wg], max(issue, self.tensor_free), "wait")
            turn = issue
            start = max(issue, self.tensor_free)
            softmax_end = start
            if step < blocks:
                start = max(start, self.ensure_loaded("K", step))
                self.bar(f"mma{wg}", start, start + self.gemm, "qk", f"QK{sub(step)}")
                start += self.gemm
                qk_ends.append(start)
                softmax_end = start + self.softmax
                self.bar(f"alu{wg}", start, softmax_end, "softmax", f"softmax {step}")
            done = start
            if step > 0:
                start = max(start, self.ensure_loaded("V", step - 1))
                done = start + self.gemm
                self.bar(f"mma{wg}", start, done, "pv", f"PV{sub(step - 1)}")
                pv_ends.append(done)
            self.tensor_free = done
            begin = max(softmax_end, done)
            rescales = 0 < step < blocks
            self.bar(f"alu{wg}", begin, begin + self.rescale * rescales, "rescale")
            ready[wg] = begin + self.rescale * rescales
        if qk_ends:
            self.empty["K", step] = max(qk_ends)
        if pv_ends:
            self.empty["V", step - 1] = max(pv_ends)
        return turn

    def _epilogue(self, ready: list[float]) -> None:
        for wg, start in enumerate(ready):
            self.bar(f"alu{wg}", start, start + 0.9, "epilogue", "O / sum")
            self.bar(f"mma{wg}", start + 0.9, start + 0.9 + self.store, "store", "O out")

    def _stage_bars(self) -> None:
        for (operand, block), start in self.load_start.items():
            lane = f"{operand}{block % self.stages}"
            full, empty = self.full[operand, block], self.empty[operand, block]
            self.bar(lane, start, full, f"fill{operand}")
            self.bar(lane, full, empty, f"hold{operand}", f"{operand}{sub(block)}")


def sub(number: int) -> str:
    return "".join("₀₁₂₃₄₅₆₇₈₉"[int(digit)] for digit in str(number))


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
