"""FlashAttention-2's dropout and ALiBi, as variants of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.variants import dropout
from cute_kernels.variants.variant import BoundVariant, Variant

# Farther is less on both sides of the diagonal, which `cute_kernels.variants.alibi` leaves to a
# causal mask.
_ALIBI = Variant(
    "symmetric_alibi",
    score="return score - slopes[batch][head] * abs(float(position - key));",
    score_python=lambda score, batch, head, position, key, slopes: (
        score - slopes[batch, head] * (position - key).abs()
    ),
    tensors={"slopes": ("float32", "batch", "head")},
)


def variant_of(q: Tensor, dropout_p: float, alibi_slopes: Tensor | None) -> BoundVariant | None:
    """For ``variant=`` of a call; each has random numbers of its own, of PyTorch's generator."""
    if alibi_slopes is not None:
        if dropout_p != 0:
            raise NotImplementedError(
                f"dropout_p is {dropout_p}, must be 0 with alibi_slopes: define a variant with both"
            )
        if alibi_slopes.dim() not in (1, 2):
            raise ValueError(
                f"alibi_slopes has shape {tuple(alibi_slopes.shape)}, must be (heads,) or "
                "(batch, heads)"
            )
        return _ALIBI(slopes=alibi_slopes.detach().view(-1, alibi_slopes.shape[-1]))
    if dropout_p == 0:
        return None
    state = torch.randint(2**62, (2,), dtype=torch.int64, device=q.device)
    return dropout(dropout_p, state)
