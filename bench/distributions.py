"""What the numbers of a cell are like: kernels whose work depends on the scores are fast on some.

Scores here are those of a softmax scale of head_dim ** -0.5. Kernels walk over the keys from the
last one to the first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.cells import NORMAL, Cell

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 64  # keys of one level: no kernel's block has fewer
STEP = 32.0  # in scores, from level to level: far beyond what a softmax takes without a new maximum
LARGE_CHANNELS, LARGE_FACTOR = 4, 30.0
LOCAL_PAIRS, LOCAL_SIZE = 8, 4.0
SINK_SCORE = 16.0
SPIKE_SCORE = 64.0

Change = Callable[[Cell, "Tensor", "Tensor", "Tensor"], None]


@dataclass(frozen=True)
class Distribution:
    """`change` makes it, in place, of q, k and v ~ N(0, 1).

    `adversarial`: made to be slow, where the others are as models have them.
    """

    meaning: str
    change: Change
    adversarial: bool = False


def _queries_times(factor: float) -> Change:
    def change(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> None:
        q.mul_(factor)

    return change


def _large_channels(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> None:
    k[..., :LARGE_CHANNELS].mul_(LARGE_FACTOR)


def _sink_and_local(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> None:
    import torch

    q.mul_(3)
    for x, first in ((q, cell.seqlen_k - cell.seqlen), (k, 0)):  # the last query is at the last key
        position = torch.arange(first, first + x.shape[1], device=x.device, dtype=torch.float32)
        for pair in range(min(LOCAL_PAIRS, cell.head_dim // 4)):
            angle = 0.3 * 0.5**pair * position[:, None]
            x[..., 2 * pair] = (LOCAL_SIZE * angle.cos()).to(x.dtype)
            x[..., 2 * pair + 1] = (LOCAL_SIZE * angle.sin()).to(x.dtype)
    _one_key(cell, q, k, SINK_SCORE)


def _one_key(cell: Cell, q: Tensor, k: Tensor, score: float) -> None:
    """Gives the first key, which is the last of every walk and in sight of every query, `score` in
    the last channel, and the other keys nothing there."""
    size = 8.0
    q[..., -1] = size
    k[..., -1] = 0
    k[:, 0, :, -1] = score * math.sqrt(cell.head_dim) / size


def _levels(order: Callable[[int], Iterable[int]]) -> Change:
    """Adds STEP times the block's level to each score; `order(n)` has the n levels, 0 to n - 1, of
    the blocks from the first keys to the last."""

    def change(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> None:
        import torch

        blocks = -(-cell.seqlen_k // BLOCK)
        # About 0, so that 16 bits hold them up to 512 blocks
        levels = torch.tensor(list(order(blocks))) - blocks // 2
        q[..., 0] = STEP * math.sqrt(cell.head_dim)
        k[..., 0] = levels.repeat_interleave(BLOCK)[: cell.seqlen_k, None].to(k)

    return change


def _alibi(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Score and slope * key: what is missing to slope * (key - query) is the same in all of a row.

    Two channels, since 16 bits do not hold a key's number: its block and its place there.
    """
    import torch

    slopes = alibi_slopes(cell.heads).to(q) * math.sqrt(cell.head_dim)
    key = torch.arange(cell.seqlen_k, device=k.device)
    size = 128
    q[..., 0], q[..., 1] = size * slopes, slopes
    k[..., 0] = (key // size - cell.seqlen_k // size // 2)[:, None].to(k)
    k[..., 1] = (key % size - size // 2)[:, None].to(k)


def alibi_slopes(heads: int) -> Tensor:
    """From 2^(-8 / heads) to 2^-8, geometric (Press et al., 2022)."""
    import torch

    return torch.exp2(-8.0 * torch.arange(1, heads + 1) / heads)


def _values_with_a_mean(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> None:
    v.add_(1)


def _values_that_drift(cell: Cell, q: Tensor, k: Tensor, v: Tensor) -> None:
    import torch

    mean = torch.linspace(0.5, 1.5, cell.head_dim).to(v)
    half = cell.seqlen_k // 2
    v[:, :half].add_(2 * mean)
    v[:, half:].sub_(mean)


DISTRIBUTIONS = {
    NORMAL: Distribution("q, k, v ~ N(0, 1), as benchmarks have it", lambda cell, q, k, v: None),
    "sd3": Distribution("scores of deviation 3: heads of a trained model", _queries_times(3)),
    "sd6": Distribution("scores of deviation 6: its peaked heads", _queries_times(6)),
    "channels": Distribution(
        "4 of K's channels times 30: outlier channels of language models", _large_channels
    ),
    "sink+local": Distribution(
        "deviation 3, a first key that all rows look at, and scores that fall with distance as "
        "rotary embeddings make them",
        _sink_and_local,
    ),
    "v-mean": Distribution("V = 1 + N(0, 1): activations with a mean", _values_with_a_mean),
    "v-drift": Distribution(
        "a mean of V by channel, c in [0.5, 1.5], 2c in the first half of the keys and -c in the "
        "second: activations whose mean drifts",
        _values_that_drift,
    ),
    "rising": Distribution(
        "scores rise by 32 from 64 keys to the next in the order of the walk: every block has a "
        "new maximum",
        _levels(lambda blocks: reversed(range(blocks))),
        adversarial=True,
    ),
    "falling": Distribution(
        "the same steps in the other direction: all but the first block underflow",
        _levels(range),
        adversarial=True,
    ),
    "shuffled": Distribution(
        "the same steps in random order of the blocks: new maxima now and then",
        _levels(lambda blocks: random.Random(0).sample(range(blocks), blocks)),
        adversarial=True,
    ),
    "alibi": Distribution(
        "N(0, 1) and ALiBi's slopes, another for each head: scores fall along the walk, in some "
        "heads steeply",
        _alibi,
        adversarial=True,
    ),
    "spike": Distribution(
        "N(0, 1), and 64 for the first key, the last of the walk: a maximum when all is done",
        lambda cell, q, k, v: _one_key(cell, q, k, SPIKE_SCORE),
        adversarial=True,
    ),
}
ALL = "all"


def chosen(names: list[str]) -> list[str]:
    """The distributions that an option names, each once."""
    return list(DISTRIBUTIONS) if ALL in names else list(dict.fromkeys(names))


def is_adversarial(name: str) -> bool:
    return DISTRIBUTIONS[name].adversarial


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[name]


def draw(cell: Cell, device: str = "cuda", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The cell's q (batch, seqlen, heads, head_dim) and k, v (batch, seqlen_k, heads_kv, head_dim),
    in its dtype, distributed as its `data` says; the same for the same seed."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch_dtype(cell.dtype)
    queries = (cell.batch, cell.seqlen, cell.heads, cell.head_dim)
    keys = (cell.batch, cell.seqlen_k, cell.heads_kv, cell.head_dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in (queries, keys, keys)
    )
    DISTRIBUTIONS[cell.data].change(cell, q, k, v)
    return q, k, v
