"""What `cute_kernels` has, to type checkers: what a call returns depends on `return_lse`. To them
arguments that a signature here does not name in front of ``*`` are by keyword."""

from collections.abc import Sequence
from typing import Literal, TypedDict, overload

from torch import Tensor, dtype
from typing_extensions import Unpack

from cute_kernels.autotune import Tuned as Tuned
from cute_kernels.autotune import tune as tune
from cute_kernels.autotune import use_tuned as use_tuned
from cute_kernels.cache import append_kv as append_kv
from cute_kernels.cache import flash_attn_combine as flash_attn_combine
from cute_kernels.cache import get_scheduler_metadata as get_scheduler_metadata
from cute_kernels.compile.config import TileConfig as TileConfig
from cute_kernels.fp8 import FP8Tensor as FP8Tensor
from cute_kernels.fp8 import quantize_fp8 as quantize_fp8
from cute_kernels.plugins import add_tile_config as add_tile_config
from cute_kernels.plugins import compile_tile_config as compile_tile_config
from cute_kernels.plugins import load_tile_configs as load_tile_configs
from cute_kernels.tiles import get_include as get_include
from cute_kernels.tiles import tile_configs as tile_configs
from cute_kernels.variants import BlockMask as BlockMask
from cute_kernels.variants import Variant as Variant
from cute_kernels.variants.variant import BoundVariant

__version__: str
__all__: list[str]

class _Mask(TypedDict, total=False):
    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None
    window_size: Sequence[int | None] | Tensor | None
    attention_chunk: int
    softcap: float
    sinks: Tensor | None
    sm_margin: int

class _QKVPacked(_Mask, total=False):
    deterministic: bool
    num_heads_q: int | None
    tile_config: str | None

class _Dense(_Mask, total=False):
    qv: Tensor | None
    num_splits: int
    pack_gqa: bool | None
    deterministic: bool
    tile_config: str | None
    variant: Variant | BoundVariant | None

class _OfBlocks(_Dense, total=False):
    block_mask: BlockMask | None

class _Varlen(_Dense, total=False):
    softmax_scale: float | None
    causal: bool
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    page_table: Tensor | None
    tree_mask: Tensor | None

class _Cache(_Mask, total=False):
    softmax_scale: float | None
    causal: bool
    qv: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    cache_seqlens: int | Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    page_table: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k_new: Tensor | None
    max_seqlen_q: int | None
    rotary_seqlens: Tensor | None
    rotary_interleaved: bool
    scheduler_metadata: Tensor | None
    num_splits: int
    pack_gqa: bool | None
    out: Tensor | None
    k_scales: Tensor | None
    v_scales: Tensor | None
    incoherent: bool
    seed: int
    tree_mask: Tensor | None

class _FP8(TypedDict, total=False):
    window_size: Sequence[int | None] | Tensor | None
    sinks: Tensor | None
    incoherent: bool
    seed: int
    smooth_k: bool
    qk_dtype: dtype
    out_dtype: dtype | None
    tile_config: str | None

class _FP8Varlen(_FP8, total=False):
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    softmax_scale: float | None
    causal: bool
    attention_chunk: int

@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: Literal[True],
    return_attn_probs: bool = False,
    **options: Unpack[_OfBlocks],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_attn_probs: Literal[True],
    return_lse: bool = False,
    **options: Unpack[_OfBlocks],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: Literal[False] = False,
    return_attn_probs: Literal[False] = False,
    **options: Unpack[_OfBlocks],
) -> Tensor: ...
@overload
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    **options: Unpack[_OfBlocks],
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    return_attn_probs: bool = False,
    **options: Unpack[_Varlen],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_attn_probs: Literal[True],
    return_lse: bool = False,
    **options: Unpack[_Varlen],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    return_attn_probs: Literal[False] = False,
    **options: Unpack[_Varlen],
) -> Tensor: ...
@overload
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    **options: Unpack[_Varlen],
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: Literal[True],
    return_attn_probs: bool = False,
    **options: Unpack[_QKVPacked],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_attn_probs: Literal[True],
    return_lse: bool = False,
    **options: Unpack[_QKVPacked],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: Literal[False] = False,
    return_attn_probs: Literal[False] = False,
    **options: Unpack[_QKVPacked],
) -> Tensor: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    **options: Unpack[_QKVPacked],
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: Literal[True],
    return_attn_probs: bool = False,
    **options: Unpack[_QKVPacked],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_attn_probs: Literal[True],
    return_lse: bool = False,
    **options: Unpack[_QKVPacked],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: Literal[False] = False,
    return_attn_probs: Literal[False] = False,
    **options: Unpack[_QKVPacked],
) -> Tensor: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    **options: Unpack[_QKVPacked],
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    return_softmax_lse: Literal[True],
    **options: Unpack[_Cache],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    return_softmax_lse: Literal[False] = False,
    **options: Unpack[_Cache],
) -> Tensor: ...
@overload
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    return_softmax_lse: bool = False,
    **options: Unpack[_Cache],
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def flash_attn_fp8_func(
    q: Tensor | FP8Tensor,
    k: Tensor | FP8Tensor,
    v: Tensor | FP8Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: Literal[True],
    **options: Unpack[_FP8],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_fp8_func(
    q: Tensor | FP8Tensor,
    k: Tensor | FP8Tensor,
    v: Tensor | FP8Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_FP8],
) -> Tensor: ...
@overload
def flash_attn_fp8_func(
    q: Tensor | FP8Tensor,
    k: Tensor | FP8Tensor,
    v: Tensor | FP8Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    return_lse: bool = False,
    **options: Unpack[_FP8],
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
def flash_attn_fp8_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[_FP8Varlen],
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attn_fp8_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[_FP8Varlen],
) -> Tensor: ...
@overload
def flash_attn_fp8_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool = False,
    **options: Unpack[_FP8Varlen],
) -> Tensor | tuple[Tensor, Tensor]: ...
