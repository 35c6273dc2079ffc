"""What is timed: one cell is one attention problem, a grid is a list of cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

MASKS = ("full", "causal")
DTYPES = ("bf16", "fp16")
PAPER_HEAD_DIMS = (64, 128, 256)
PAPER_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
PAPER_TOKENS = 16384
PAPER_HIDDEN = 2048


@dataclass(frozen=True)
class Cell:
    """Self-attention with as many key heads as query heads and seqlen_q == seqlen_k."""

    dtype: str
    mask: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    @property
    def flops(self) -> int:
        """The field's count: two matrix products over the scores, half of it under causal."""
        full = 4 * self.batch * self.heads * self.seqlen * self.seqlen * self.head_dim
        return full // 2 if self.causal else full

    def tflops(self, milliseconds: float) -> float:
        return self.flops / milliseconds / 1e9

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "flops": self.flops}

    def __str__(self) -> str:
        return f"{self.dtype} D={self.head_dim} {self.mask} S={self.seqlen}"


def paper_cell(dtype: str, head_dim: int, mask: str, seqlen: int) -> Cell:
    """A cell of the FlashAttention-3 paper's grid: 16k tokens in all, heads * head_dim = 2048."""
    return Cell(
        dtype=dtype,
        mask=mask,
        batch=max(1, PAPER_TOKENS // seqlen),
        seqlen=seqlen,
        heads=max(1, PAPER_HIDDEN // head_dim),
        head_dim=head_dim,
    )


def paper_grid(
    dtype: str,
    head_dims: Iterable[int] = PAPER_HEAD_DIMS,
    masks: Iterable[str] = MASKS,
    seqlens: Iterable[int] = PAPER_SEQLENS,
) -> list[Cell]:
    seqlens = tuple(seqlens)
    masks = tuple(masks)
    return [paper_cell(dtype, d, mask, s) for d in head_dims for mask in masks for s in seqlens]
