"""What is timed: one cell is one attention problem, a grid is a list of cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

MASKS = ("full", "causal")
DTYPES = ("bf16", "fp16")
PAPER_HEAD_DIMS = (64, 128, 256)
PAPER_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
PAPER_TOKENS = 16384
PAPER_HIDDEN = 2048
LATENCY_SEQLENS = (128, 256, 512, 1024, 2048)
LLAMA_SEQLENS = (2048, 4096, 8192, 16384, 32768)
PREFILL_CHUNKS = (512, 2048)
NORMAL = "normal"
DIFFUSION = {  # tokens of one image or video, heads; head dim 128, every token sees all
    "Flux, 1024 x 1024": (4608, 24),
    "Wan, 81 frames of 480p": (32760, 40),
    "Wan, 81 frames of 720p": (75600, 40),
    "HunyuanVideo, 129 frames of 720p": (118800, 24),
}


@dataclass(frozen=True)
class Cell:
    """`seqlen` queries; where nothing else is said, as many keys, and a key head for each head.

    `data`: which of `distributions.DISTRIBUTIONS` the numbers have.
    """

    dtype: str
    mask: str
    batch: int
    seqlen: int
    heads: int
    head_dim: int
    seqlen_k: int = 0
    heads_kv: int = 0
    data: str = NORMAL

    def __post_init__(self):
        object.__setattr__(self, "seqlen_k", self.seqlen_k or self.seqlen)
        object.__setattr__(self, "heads_kv", self.heads_kv or self.heads)

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    @property
    def flops(self) -> int:
        """The field's count: two matrix products over the scores; under a causal mask of the last
        queries on all keys, the triangle above the diagonal off."""
        scores = self.seqlen * self.seqlen_k
        if self.causal:
            scores -= self.seqlen * self.seqlen // 2
        return 4 * self.batch * self.heads * self.head_dim * scores

    def tflops(self, milliseconds: float) -> float:
        return self.flops / milliseconds / 1e9

    def as_dict(self) -> dict[str, object]:
        """As it is recorded: `data` only where it is not normal."""
        fields = asdict(self)
        if self.data == NORMAL:
            del fields["data"]
        return {**fields, "flops": self.flops}

    def __str__(self) -> str:
        return f"{self.dtype} {cell_name(asdict(self))}"


@dataclass(frozen=True)
class NamedCell(Cell):
    """A problem of some model's, called after it."""

    name: str = ""


class BackwardCell(Cell):
    """The same problem's gradients."""

    @property
    def flops(self) -> int:
        """The field's count: five matrix products to forward's two."""
        return super().flops * 5 // 2


def cell_name(cell: dict) -> str:
    """Short and unique within a grid; takes a recorded cell too. A cell may have a name of its
    own."""
    name = cell.get("name") or _described(cell)
    return name if data_of(cell) == NORMAL else f"{name} {data_of(cell)}"


def _described(cell: dict) -> str:
    name = f"D={cell['head_dim']} {cell['mask']} S={cell['seqlen']}"
    if cell.get("seqlen_k", cell["seqlen"]) != cell["seqlen"]:
        name += f" on {cell['seqlen_k']} keys"
    if cell.get("heads_kv", cell.get("heads")) != cell.get("heads"):
        name += f" {cell['heads']}/{cell['heads_kv']} heads"
    return name


def data_of(cell: dict) -> str:
    """The distribution of a recorded cell's numbers."""
    return cell.get("data", NORMAL)


def on_data(grid: Iterable[Cell], names: Iterable[str]) -> list[Cell]:
    """Every cell with each of the distributions."""
    names = tuple(names)
    return [replace(cell, data=name) for cell in grid for name in names]


def paper_cell(dtype: str, head_dim: int, mask: str, seqlen: int, kind: type[Cell] = Cell) -> Cell:
    """A cell of the FlashAttention-3 paper's grid: 16k tokens in all, heads * head_dim = 2048."""
    return kind(
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
    kind: type[Cell] = Cell,
) -> list[Cell]:
    seqlens = tuple(seqlens)
    masks = tuple(masks)
    return [
        paper_cell(dtype, d, mask, s, kind) for d in head_dims for mask in masks for s in seqlens
    ]


def latency_grid(dtype: str, head_dims: Iterable[int], masks: Iterable[str]) -> list[Cell]:
    """One sequence, 16 heads: a few tiles, fewer than multiprocessors."""
    masks = tuple(masks)
    return [
        Cell(dtype=dtype, mask=mask, batch=1, seqlen=seqlen, heads=16, head_dim=head_dim)
        for head_dim in head_dims
        for mask in masks
        for seqlen in LATENCY_SEQLENS
    ]


def llama_grid(dtype: str, masks: Iterable[str]) -> list[Cell]:
    """64 query and 8 key heads of 128 (Llama-3-70B): whole sequences, then chunked prefill."""
    shape = {"dtype": dtype, "heads": 64, "heads_kv": 8, "head_dim": 128}
    masks = tuple(masks)
    whole = [
        Cell(mask=mask, batch=max(1, PAPER_TOKENS // seqlen), seqlen=seqlen, **shape)
        for mask in masks
        for seqlen in LLAMA_SEQLENS
    ]
    chunks = [
        Cell(mask=mask, batch=1, seqlen=seqlen, seqlen_k=LLAMA_SEQLENS[-1], **shape)
        for mask in masks
        for seqlen in PREFILL_CHUNKS
    ]
    return whole + chunks


def diffusion_grid(dtype: str) -> list[Cell]:
    """Self-attention of diffusion transformers, at the sizes that they are published with."""
    return [
        NamedCell(dtype, "full", 1, tokens, heads, 128, name=name)
        for name, (tokens, heads) in DIFFUSION.items()
    ]
