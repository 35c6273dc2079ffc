"""FlashAttention-2's dropout, ALiBi and softcap, alone or together, as variants of attention."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cute_kernels.arguments import renamed
from cute_kernels.checks import check_device, check_softcap
from cute_kernels.variants import dropout
from cute_kernels.variants.variant import BoundVariant, Variant

# Farther is less on both sides of the diagonal, which `cute_kernels.variants.alibi` leaves to a
# causal mask.


def _alibi(
    score: Tensor, batch: Tensor, head: Tensor, position: Tensor, key: Tensor, slopes: Tensor
) -> Tensor:
    return score - slopes[batch, head] * (position - key).abs()


def _cap(score: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(score / cap)


def _capped_alibi(
    score: Tensor,
    batch: Tensor,
    head: Tensor,
    position: Tensor,
    key: Tensor,
    cap: float,
    slopes: Tensor,
) -> Tensor:
    return _alibi(_cap(score, cap), batch, head, position, key, slopes)


_SCORES: dict[tuple[bool, bool], Callable[..., Tensor] | None] = {
    (False, False): None,
    (True, False): _cap,
    (False, True): _alibi,
    (True, True): _capped_alibi,
}


@functools.cache
def _variant(is_capped: bool, has_slopes: bool, weights: Variant | None) -> Variant:
    """A cap of the scores before what ALiBi adds, and the weights of another variant."""
    score = "cap * tanh(score / cap)" if is_capped else "score"
    if has_slopes:
        score += " - slopes[batch][head] * abs(float(position - key))"
    parts = {"capped": is_capped, "symmetric_alibi": has_slopes, "dropped": weights is not None}
    return Variant(
        "_".join(name for name, is_there in parts.items() if is_there),
        score=f"return {score};",
        score_python=_SCORES[is_capped, has_slopes],
        weight=weights.hooks.weight if weights else None,
        weight_python=weights.python["weight"] if weights else None,
        tensors={
            **({"slopes": ("float32", "batch", "head")} if has_slopes else {}),
            **({"state": ("int64", 2)} if weights else {}),
        },
        numbers={
            **({"cap": float} if is_capped else {}),
            **({"rate": float, "kept": float} if weights else {}),
        },
    )


def variant_of(
    q: Tensor, dropout_p: float, alibi_slopes: Tensor | None, softcap: float
) -> BoundVariant | None:
    """For ``variant=`` of a call, in place of its softcap; None where a softcap is all there is.
    Each has random numbers of its own, of PyTorch's generator."""
    if dropout_p == 0 and alibi_slopes is None:
        return None
    check_softcap(softcap)
    captured: dict[str, Tensor | float] = {}
    weights = None
    if dropout_p != 0:
        state = torch.randint(2**62, (2,), dtype=torch.int64, device=q.device)
        try:
            weights = dropout(dropout_p, state)
        except (TypeError, ValueError) as error:
            raise renamed(error, {"rate": "dropout_p"}) from None
        captured |= weights.captured()
    if alibi_slopes is not None:
        check_device("alibi_slopes", alibi_slopes, q)
        if alibi_slopes.dtype != torch.float32:
            raise TypeError(f"alibi_slopes has dtype {alibi_slopes.dtype}, must be torch.float32")
        heads = q.shape[-2]
        if alibi_slopes.dim() not in (1, 2) or alibi_slopes.shape[-1] != heads:
            raise ValueError(
                f"alibi_slopes has shape {tuple(alibi_slopes.shape)}, must be (heads,) or "
                f"(batch, heads), of {heads} heads"
            )
        captured["slopes"] = alibi_slopes.detach().view(-1, alibi_slopes.shape[-1])
    if softcap > 0:
        captured["cap"] = max(float(softcap), torch.finfo(torch.float32).tiny)
    elif weights is not None and alibi_slopes is None:
        return weights
    of_weights = weights.variant if weights else None
    return _variant(softcap > 0, alibi_slopes is not None, of_weights)(**captured)
