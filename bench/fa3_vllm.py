"""FlashAttention-3 as vLLM builds it: the forward pass, of packed sequences, with softcap and
sinks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "CUTE_KERNELS_FA3_VLLM_LIBRARY"
HOW_TO_GET = (
    f"--fa3-library PATH or {VARIABLE} names it: vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so of "
    "`python -m pip download --no-deps vllm==0.33.0`"
)


def load(path: Path | None) -> Any:
    """The operator.

    Raises:
        OSError: it is not named, not there, or does not load.
    """
    import torch

    named = path or os.environ.get(VARIABLE)
    if not named:
        raise FileNotFoundError(f"no library is given; {HOW_TO_GET}")
    library = Path(named)
    if not library.is_file():
        raise FileNotFoundError(f"there is no file {library}; {HOW_TO_GET}")
    torch.ops.load_library(str(library.resolve()))
    if not hasattr(torch.ops._vllm_fa3_C, "fwd"):
        raise OSError(f"{library} has no operator _vllm_fa3_C.fwd")
    return torch.ops._vllm_fa3_C.fwd


def attention(
    operator: Any,
    starts: Tensor,
    longest: int,
    window_size: tuple[int, int],
    softcap: float,
    sinks: Tensor | None,
) -> Callable[..., Tensor]:
    """Dense q, k and v under a causal mask -> the output. The operator wants all of its arguments,
    of which most are None."""
    import torch

    names = [argument.name for argument in operator.default._schema.arguments]
    given = {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
        "is_causal": True,
        "window_size_left": window_size[0],
        "window_size_right": window_size[1],
        "softcap": softcap,
        "is_rotary_interleaved": True,
        "num_splits": 0,
        "sm_margin": 0,
        "s_aux": None if sinks is None else sinks.to(torch.bfloat16),
        "cp_world_size": 1,
        "cp_rank": 0,
    }
    options = dict.fromkeys(names) | given

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = {name: x.flatten(0, 1) for name, x in zip("qkv", (q, k, v), strict=True)}
        scale = {"softmax_scale": q.shape[-1] ** -0.5}
        return operator(**(options | rows | scale))[0].unflatten(0, q.shape[:2])

    return call
