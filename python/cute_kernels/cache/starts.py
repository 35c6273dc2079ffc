"""cu_seqlens of dense queries: of sequences of one length.

On a GPU to make them costs each call a kernel. Those of few queries are kept, which decoding asks
for in each layer of each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_KEPT_SEQLEN = 64  # longest
_LEAST = 256  # sequences

# Nothing here is ever freed: a captured CUDA graph goes on to read it.
_kept: dict[tuple[torch.device, int], list[Tensor]] = {}


def starts_of(batch: int, seqlen: int, like: Tensor) -> Tensor:
    """(batch + 1,), int32, on like's device. Nothing waits for a GPU but the first call with a
    length, or with a batch beyond all before."""
    if torch.compiler.is_compiling() or type(like) is not Tensor or seqlen > _KEPT_SEQLEN:
        return _make(batch, seqlen, like.device)
    kept = _kept.setdefault((like.device, seqlen), [])
    if not kept or kept[-1].shape[0] <= batch:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return _make(batch, seqlen, like.device)  # a part of the graph
        # Through the host, so that other streams find it written.
        most = max(_LEAST, 2 * batch)
        with torch.inference_mode(False):
            made = _make(most, seqlen, torch.device("cpu")).to(like.device)
        if type(made) is not Tensor:  # somebody traces
            return made[: batch + 1]
        kept.append(made)
        return made[: batch + 1]
    return kept[-1][: batch + 1]


def _make(batch: int, seqlen: int, device: torch.device) -> Tensor:
    how: Any = {"dtype": torch.int32, "device": device}
    if seqlen == 0:
        return torch.zeros(batch + 1, **how)
    return torch.arange(0, (batch + 1) * seqlen, seqlen, **how)
