"""Ready-made variants: each function returns what ``variant=`` of a call takes."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from cute_kernels.checks import check_int, check_softcap
from cute_kernels.variants.philox import uniform
from cute_kernels.variants.variant import BoundVariant, Variant

# What a process gets from another one by pickle are the names of functions: none is a lambda.


def _alibi(score: Tensor, head: Tensor, key: Tensor, position: Tensor, slopes: Tensor) -> Tensor:
    return score + slopes[head] * (key - position)


def _cap(score: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(score / cap)


def _same_document(
    batch: Tensor, query: Tensor, key: Tensor, of_query: Tensor, of_key: Tensor
) -> Tensor:
    return of_query[batch, query] == of_key[batch, key]


def _prefix_or_causal(batch: Tensor, key: Tensor, position: Tensor, prefix: Tensor) -> Tensor:
    return (key <= position) | (key < prefix[batch])


def _every_step(key: Tensor, position: Tensor, count: int, step: int) -> Tensor:
    distance = position - key
    return (distance >= 0) & (distance < count * step) & (distance % step == 0)


def _add_bias(
    score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, bias: Tensor
) -> Tensor:
    return score + bias[batch, head, query, key]


def _kept(
    batch: Tensor, head: Tensor, query: Tensor, key: Tensor, rate: float, state: Tensor
) -> Tensor:
    kept = uniform(state[0], state[1], batch, head, query, key) >= rate
    return kept.double() / (1.0 - rate)


_ALIBI = Variant(
    "alibi",
    score="return score + slopes[head] * (key - position);",
    score_python=_alibi,
    tensors={"slopes": ("float32", "head")},
)
_CAP = Variant(
    "cap",
    score="return cap * tanh(score / cap);",
    score_python=_cap,
    numbers={"cap": float},
)
_DOCUMENT = Variant(
    "document",
    mask="return of_query[batch][query] == of_key[batch][key];",
    mask_python=_same_document,
    tensors={"of_query": ("int32", "batch", "query"), "of_key": ("int32", "batch", "key")},
)
_PREFIX_LM = Variant(
    "prefix_lm",
    mask="return key < max(position + 1, prefix[batch]);",
    mask_python=_prefix_or_causal,
    tensors={"prefix": ("int32", "batch")},
)
_DILATED = Variant(
    "dilated",
    mask="int const distance = position - key;\n"
    "return distance >= 0 && distance < count * step && distance % step == 0;",
    mask_python=_every_step,
    numbers={"count": int, "step": int},
)
_BIAS = {
    dtype: Variant(
        "bias",
        score="return score + bias[batch][head][query][key];",
        score_python=_add_bias,
        tensors={"bias": (dtype, "batch", "head", "query", "key")},
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
}
_DROPOUT = Variant(
    "dropout",
    weight="return uniform(state[0], state[1], batch, head, query, key) < rate ? 0.f : kept;",
    weight_python=_kept,
    tensors={"state": ("int64", 2)},
    numbers={"rate": float, "kept": float},
)


def alibi(slopes: Tensor) -> BoundVariant:
    """Scores fall with the distance of key and query (Press et al., arXiv 2108.12409).

    Args:
        slopes: (heads,), float32: what is added is ``slopes[head] * (key - position)``, where the
            last query stands at the last key. It may have a gradient.
    """
    return _ALIBI(slopes=slopes)


def bias(bias: Tensor) -> BoundVariant:
    """Something of its own is added to every score, such as a relative bias gathered from a table.

    Args:
        bias: (batch, heads, seqlen_q, seqlen_k), of which each size may be 1 and the first ones
            left out; float32, float16 or bfloat16. It may have a gradient, which in fp32 has all of
            that shape for a while.
    """
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias is a {type(bias).__name__}, must be a torch.Tensor")
    if bias.dtype not in _BIAS:
        raise TypeError(f"bias has dtype {bias.dtype}, must be float32, float16 or bfloat16")
    if not 1 <= bias.dim() <= 4:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must have 1 to 4 dimensions")
    return _BIAS[bias.dtype](bias=bias[(None,) * (4 - bias.dim())])


def document(of_query: Tensor, of_key: Tensor | None = None) -> BoundVariant:
    """A query sees the keys of its own document.

    Args:
        of_query: (batch, seqlen_q), int32, the number of each query's document.
        of_key: (batch, seqlen_k), the same of the keys; of_query if None.
    """
    return _DOCUMENT(of_query=of_query, of_key=of_query if of_key is None else of_key)


def prefix_lm(prefix: Tensor) -> BoundVariant:
    """All queries see a prefix of the keys, and what else a causal mask lets them; without
    ``causal=True``.

    Args:
        prefix: (batch,), int32, how many keys that are.
    """
    return _PREFIX_LM(prefix=prefix)


def dilated(count: int, step: int) -> BoundVariant:
    """A query sees the key at its position and every `step`-th one before it, `count` in all.

    Args:
        count: at least 1.
        step: at least 1; ``window_size=((count - 1) * step, 0)`` beside it saves the work on keys
            further away.
    """
    for name, number in (("count", count), ("step", step)):
        check_int(name, number, least=1, none="")
    return _DILATED(count=count, step=step)


def softcap(cap: float) -> BoundVariant:
    """Scores become ``cap * tanh(score / cap)``: ``softcap=`` of a call does the same faster."""
    check_softcap(cap)
    if cap == 0:
        raise ValueError("cap is 0, must be above 0")
    return _CAP(cap=max(cap, torch.finfo(torch.float32).tiny))  # a smaller one is 0 on a GPU


def dropout(rate: float, state: Tensor) -> BoundVariant:
    """Each P is dropped with probability `rate`, and what is left is divided by ``1 - rate``.

    Args:
        rate: from 0 to below 1.
        state: (2,), int64, on q's device: a seed and an offset, which together choose the random
            numbers, those of gradients included. Change the offset from call to call.
    """
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
        raise TypeError(f"rate is {rate!r}, must be a number")
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}, must be from 0 to below 1")
    return _DROPOUT(state=state, rate=float(rate), kept=1.0 / (1.0 - rate))
