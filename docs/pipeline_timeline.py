"""What the warps of one forward CTA do over time: simulated, for draw_pipeline.py."""

from __future__ import annotations

from dataclasses import dataclass, field

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
