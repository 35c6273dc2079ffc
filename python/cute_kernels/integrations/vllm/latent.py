"""What vLLM asks of a backend of latent attention (MLA), and of one for the prompts of such models.

vLLM's own classes split a batch: requests with few new tokens attend to the cache of latents, their
projections absorbed; of others, keys and values are projected out of the latents first.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend

from cute_kernels.cache import flash_attn_with_kvcache
from cute_kernels.checks import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from cute_kernels.integrations.vllm import LATENT_NAME, NAME
from cute_kernels.varlen import flash_attn_varlen_func

_DTYPES = [torch.float16, torch.bfloat16]
_CACHE_DTYPES = ("auto", "float16", "bfloat16")
_HEAD_SIZES = [320, 576]  # latents of 256 and 512, and 64 rope columns
_REFUSED = ("alibi_slopes", "sliding_window", "logits_soft_cap")


class CuteKernelsMLABackend(MLACommonBackend):
    """Caches of latents of 16 bits, in any of vLLM's layouts."""

    supported_dtypes: ClassVar[list[torch.dtype]] = _DTYPES
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        return LATENT_NAME

    @staticmethod
    def get_impl_cls() -> type[CuteKernelsMLAImpl]:
        return CuteKernelsMLAImpl

    @staticmethod
    def get_builder_cls() -> type[CuteKernelsMLABuilder]:
        return CuteKernelsMLABuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return _HEAD_SIZES

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) == (9, 0)

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *_: Any
    ) -> str | None:
        """Why not, for a message."""
        if kv_cache_dtype is None or kv_cache_dtype in _CACHE_DTYPES:
            return None
        return f"there is no latent attention to caches of {kv_cache_dtype} yet"


@dataclasses.dataclass
class CuteKernelsMLADecodeMetadata(MLACommonDecodeMetadata):
    """Of the requests that attend to latents. All that changes is on the device."""

    query_start_loc: Tensor  # (requests + 1,), int32
    max_query_len: int


class CuteKernelsMLABuilder(MLACommonMetadataBuilder[MLACommonMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN
    supports_non_causal_multi_token_decode: ClassVar[bool] = True
    # A key costs a head 2 * (576 + 512) operations a query as a latent, 2 * (192 + 128) projected
    # and 2 * 512 * 256 once for the projection: as many with 171 queries.
    reorder_batch_threshold: int = 128

    def _build_decode(
        self,
        block_table_tensor: Tensor,
        seq_lens_device: Tensor,
        max_seq_len: int,
        query_start_loc_cpu: Tensor,
        query_start_loc_device: Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: Tensor | None,
    ) -> CuteKernelsMLADecodeMetadata:
        return CuteKernelsMLADecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            query_start_loc=query_start_loc_device,
            max_query_len=max_query_len,
        )


class CuteKernelsMLAImpl(MLACommonImpl[MLACommonMetadata]):
    """The attention of one layer."""

    can_return_lse_for_decode = True
    supports_dcp = True  # of single tokens: vLLM keeps it to these by itself
    supports_pcp = False

    def __init__(self, *, kv_cache_dtype: str, attn_type: str, **options: Any) -> None:
        if kv_cache_dtype not in _CACHE_DTYPES:
            raise NotImplementedError(
                f"{LATENT_NAME}: kv_cache_dtype is {kv_cache_dtype!r}, must be one of "
                f"{_CACHE_DTYPES}"
            )
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"{LATENT_NAME}: attn_type is {attn_type!r}, must be {AttentionType.DECODER!r}"
            )
        for name in _REFUSED:
            if options.get(name) is not None:
                raise NotImplementedError(
                    f"{LATENT_NAME}: {name} is given: choose another backend for this model"
                )
        super().__init__(kv_cache_dtype=kv_cache_dtype, attn_type=attn_type, **options)

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: Any,
        layer: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to latents.

        Args:
            q: (tokens, heads, latent and rope columns), or these two apart.
            kv_c_and_k_pe_cache: (blocks, block_size, latent and rope columns), any strides.

        Returns:
            (tokens, heads, latent columns), and (tokens, heads) natural logarithms where ranks have
            parts of the keys.
        """
        sizes = (self.kv_lora_rank, self.qk_rope_head_dim)
        q_latent, q_rope = q.split_with_sizes(sizes, -1) if isinstance(q, Tensor) else q
        latents, ropes = kv_c_and_k_pe_cache.unsqueeze(2).split_with_sizes(sizes, -1)
        batch = attn_metadata.decode
        out, lse = flash_attn_with_kvcache(
            q_rope,
            ropes,
            latents,
            qv=q_latent,
            cache_seqlens=batch.seq_lens,
            page_table=batch.block_table,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=batch.max_query_len,
            softmax_scale=self.scale,
            causal=attn_metadata.causal,
            return_softmax_lse=True,
        )
        return out, lse.transpose(0, 1) if self.need_to_return_lse_for_decode else None


class CuteKernelsMLAPrefill(MLAPrefillBackend):
    """Prompts' tokens among each other, and to keys and values projected from latents."""

    supported_dtypes: ClassVar[list[torch.dtype]] = _DTYPES

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def supports_compute_capability(cls, device_capability: Any) -> bool:
        capability = device_capability
        return capability is not None and (capability.major, capability.minor) == (9, 0)

    @classmethod
    def supports_mla_dimensions(cls, mla_dimensions: Any) -> bool:
        keys = mla_dimensions.qk_nope_head_dim + mla_dimensions.qk_rope_head_dim
        sizes = (keys, mla_dimensions.v_head_dim)
        return all(x % HEAD_DIM_MULTIPLE == 0 and 0 < x <= MAX_HEAD_DIM for x in sizes)

    def run_prefill_new_tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        return_softmax_lse: bool,
        out: Tensor | None = None,
        output_scale: Tensor | None = None,
    ) -> Any:
        """Causal attention of (tokens, heads, head_dim); vLLM gives no `out` and no `output_scale`
        to a backend that does not say that it takes them.

        Returns:
            (tokens, heads, head_dim of v), and (heads, tokens) natural logarithms if asked for.
        """
        batch = self._prefill_metadata
        starts, longest = batch.query_start_loc, batch.max_query_len
        return flash_attn_varlen_func(
            *(q, k, v, starts, starts, longest, longest),
            softmax_scale=self.scale,
            causal=True,
            return_lse=return_softmax_lse,
        )

    def run_prefill_context_chunk(
        self, chunk: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None
    ) -> Any:
        """Likewise, to all of a part of the keys before; always with the logarithms."""
        return flash_attn_varlen_func(
            *(q, k, v, chunk.query_start_loc, chunk.cu_seq_lens),
            *(chunk.max_query_len, chunk.max_seq_len),
            softmax_scale=self.scale,
            return_lse=True,
        )
