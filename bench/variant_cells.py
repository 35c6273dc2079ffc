"""The cases of bench.variants: what users change of attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from bench.cells import Cell, cell_name

FORWARD, BACKWARD = "forward", "backward"
SEQLEN = 8192
WHOLE = (-1, -1)


@dataclass(frozen=True)
class VariantCell(Cell):
    """`mask` is the name of the case, `pairs` how many pairs of query and key its heads see, all
    batch entries together."""

    of_pass: str = FORWARD
    pairs: int = 0

    @property
    def flops(self) -> int:
        """The field's count, of the pairs that are seen."""
        flops = 4 * self.heads * self.head_dim * self.pairs
        return flops * 5 // 2 if self.of_pass == BACKWARD else flops

    def __str__(self) -> str:
        return f"{self.dtype} {cell_name(asdict(self))} {self.of_pass}"


@dataclass(frozen=True)
class Case:
    """`rule`: a function of variant_rules, whose peer is FlexAttention; without one the case is
    arguments of a call under a causal mask, and the peer FlashAttention-3."""

    name: str
    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    rule: str = ""
    window_size: tuple[int, int] = WHOLE
    softcap: float = 0.0
    sinks: bool = False

    def cell(self, dtype: str, seqlen: int, pairs: int, of_pass: str) -> VariantCell:
        return VariantCell(
            dtype=dtype,
            mask=self.name,
            batch=self.batch,
            seqlen=seqlen,
            heads=self.heads,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            of_pass=of_pass,
            pairs=pairs,
        )


def _flexible(name: str) -> Case:
    return Case(name, batch=2, heads=16, heads_kv=16, head_dim=128, rule=name.replace("-", "_"))


def _gemma(name: str, head_dim: int, window_size: tuple[int, int] = WHOLE) -> Case:
    """Gemma 2 has a head dim of 256, and every other layer a window of 4096."""
    heads = 4096 // head_dim
    shape = {"batch": 4, "heads": heads, "heads_kv": heads // 2, "head_dim": head_dim}
    return Case(name, **shape, window_size=window_size, softcap=50.0)


def _gpt_oss(name: str, window_size: tuple[int, int] = WHOLE) -> Case:
    """Every other layer of gpt-oss has a window of 128."""
    shape = {"batch": 4, "heads": 64, "heads_kv": 8, "head_dim": 64}
    return Case(name, **shape, window_size=window_size, sinks=True)


CASES = {
    case.name: case
    for case in (
        *map(_flexible, ("alibi", "document", "prefix-lm", "window")),
        *(_gemma(f"softcap-{head_dim}", head_dim) for head_dim in (64, 128, 256)),
        _gemma("softcap-256-window", 256, (4095, 0)),
        _gpt_oss("sinks"),
        _gpt_oss("sinks-window", (127, 0)),
    )
}
