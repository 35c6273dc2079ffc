"""Latent attention: what a call may look like whose values are keys too."""

from __future__ import annotations

from torch import Tensor

from cute_kernels.cache.eight_bits import holds_eight_bits
from cute_kernels.checks import PACKED, check_layout, check_like

MAX_LATENT_DIM = 512  # of values that are keys too
MAX_ROPE_DIM = 64  # of the keys beside these


def check_latent(qv: Tensor, q: Tensor, v_cache: Tensor) -> None:
    """Raises unless qv may be the queries of such values, beside q."""
    if holds_eight_bits(v_cache):
        raise NotImplementedError(f"qv is not there yet for a cache of {v_cache.dtype}")
    if q.shape[2] > MAX_ROPE_DIM:
        raise NotImplementedError(
            f"qv is not there yet for q with head_dim {q.shape[2]}, only up to {MAX_ROPE_DIM}"
        )
    check_like("qv", qv, q)
    check_layout("qv", qv, PACKED)
    right = (*q.shape[:2], v_cache.shape[3])
    if qv.shape != right:
        raise ValueError(
            f"qv has shape {tuple(qv.shape)}, must be {right}: q's, with v_cache's head_dim"
        )
