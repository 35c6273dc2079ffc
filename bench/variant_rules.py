"""Variants in three forms: hooks of ours, functions of FlexAttention, changes of fp64 attention."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.check import Changes
from bench.distributions import alibi_slopes
from cute_kernels import Variant, flash_attn_func, flash_attn_varlen_func, variants
from cute_kernels.variants.variant import BoundVariant

DOCUMENTS = 12
PREFIX = 4  # one of so many keys
WINDOW = 1024  # keys, the query's own with them

_WINDOW = Variant(
    "window",
    mask="int const distance = position - key;\nreturn distance >= 0 && distance < width;",
    mask_python=lambda key, position, width: (key <= position) & (position - key < width),
    numbers={"width": int},
)


@dataclass(frozen=True)
class Rule:
    """`mask` says all that is seen, of batch, head, query and key, which are numbers in
    FlexAttention and tensors that broadcast in fp64; `score` the same of scores. Queries and keys
    are as many.

    `causal`: what a call has beside the hooks, so that those need not say it.
    `tensors`: those that the hooks read, each once.
    `library`: the same attention, or where that needs hooks nothing; `without`: the same pairs
    without the hooks, another attention.
    """

    bound: BoundVariant
    mask: Callable[..., Tensor]
    causal: bool = False
    of_batch: bool = False
    score: Callable[..., Tensor] | None = None
    exact_score: Callable[..., Tensor] | None = None
    tensors: tuple[Tensor, ...] = ()
    library: Callable[..., Tensor] | None = None
    without: Callable[..., Tensor] | None = None

    def options(self, batches: slice, heads: slice, score: bool = True) -> dict[str, Any]:
        """Of the oracle's Attention, for some batch entries and heads; without the score, too."""
        first = (batches.start or 0, heads.start or 0)
        changed = self.exact_score if score else None
        changes = Changes(
            changed and (lambda s, b, h, i, j: changed(s, b + first[0], h + first[1], i, j)),
            lambda b, h, i, j: self.mask(b + first[0], h + first[1], i, j),
        )
        return {"causal": False, "changes": changes}

    def pairs(self, batch: int, seqlen: int, device: str) -> int:
        """How many a head sees in all batch entries."""
        number = torch.arange(seqlen, device=device)
        entries = torch.arange(batch, device=device)[:, None, None]
        seen = self.mask(entries, torch.zeros_like(entries), number[:, None], number)
        return int(seen.expand(batch, seqlen, seqlen).sum())


def alibi(batch: int, heads: int, seqlen: int, device: str) -> Rule:
    slopes = alibi_slopes(heads).to(device)
    exact = slopes.double()
    return Rule(
        variants.alibi(slopes),
        mask=lambda b, h, i, j: j <= i,
        causal=True,
        score=lambda score, b, h, i, j: score + slopes[h] * (j - i),
        exact_score=lambda score, b, h, i, j: score + exact[h] * (j - i),
        tensors=(slopes,),
        without=partial(flash_attn_func, causal=True),
    )


def document_starts(seqlen: int, seed: int) -> list[int]:
    """Where documents begin that fill a sequence, and its end; they are of random lengths."""
    inner = random.Random(seed).sample(range(1, seqlen), DOCUMENTS - 1)
    return [0, *sorted(inner), seqlen]


def document(batch: int, heads: int, seqlen: int, device: str) -> Rule:
    starts = torch.tensor([document_starts(seqlen, seed) for seed in range(batch)])
    lengths = starts.diff()
    numbers = torch.arange(DOCUMENTS, dtype=torch.int32)
    of_token = torch.stack([numbers.repeat_interleave(n) for n in lengths]).to(device)
    packed = torch.cat([torch.zeros(1), lengths.flatten().cumsum(0)]).int().to(device)
    return Rule(
        variants.document(of_token),
        mask=lambda b, h, i, j: (j <= i) & (of_token[b, i] == of_token[b, j]),
        causal=True,
        of_batch=True,
        tensors=(of_token,),
        library=packed_call(packed, int(lengths.max()), causal=True),
    )


def prefix_lm(batch: int, heads: int, seqlen: int, device: str) -> Rule:
    prefix = torch.full((batch,), seqlen // PREFIX, dtype=torch.int32, device=device)
    return Rule(
        variants.prefix_lm(prefix),
        mask=lambda b, h, i, j: (j <= i) | (j < prefix[b]),
        of_batch=True,
        tensors=(prefix,),
    )


def window(batch: int, heads: int, seqlen: int, device: str) -> Rule:
    return Rule(
        _WINDOW(width=WINDOW),
        mask=lambda b, h, i, j: (j <= i) & (i - j < WINDOW),
        library=partial(flash_attn_func, window_size=(WINDOW - 1, 0)),
    )


def packed_call(starts: Tensor, longest: int, **options: Any) -> Callable[..., Tensor]:
    """A call of dense q, k and v as packed sequences that lie end to end."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn_varlen_func(*rows, starts, starts, longest, longest, **options)
        return out.unflatten(0, q.shape[:2])

    return call


def rule_of(name: str, batch: int, heads: int, seqlen: int, device: str) -> Rule:
    rules = {rule.__name__: rule for rule in (alibi, document, prefix_lm, window)}
    return rules[name](batch, heads, seqlen, device)
