"""What vLLM asks of an attention backend."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from cute_kernels.cache import flash_attn_with_kvcache
from cute_kernels.cache.eight_bits import E4M3
from cute_kernels.cache.eight_bits import HEAD_DIM_MULTIPLE as EIGHT_BITS_MULTIPLE
from cute_kernels.checks import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from cute_kernels.integrations.vllm import NAME
from cute_kernels.tiles import tile_configs
from cute_kernels.varlen import flash_attn_varlen_func

_WITHOUT_CACHE = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
_EIGHT_BITS = ("fp8", "fp8_e4m3")
_CACHE_DTYPES = ("auto", "float16", "bfloat16", *_EIGHT_BITS)


class CuteKernelsBackend(AttentionBackend):
    """Caches of 16 bits and of e4m3 in any of vLLM's layouts, and encoders without one."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(_CACHE_DTYPES)
    forward_includes_kv_cache_update = False
    supports_kv_cache_update_bypass = True

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[CuteKernelsImpl]:
        return CuteKernelsImpl

    @staticmethod
    def get_builder_cls() -> type[CuteKernelsBuilder]:
        return CuteKernelsBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]  # smaller ones are right, but slow

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % HEAD_DIM_MULTIPLE == 0 and 0 < head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return (capability.major, capability.minor) == (9, 0)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in list(AttentionType)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *_: Any
    ) -> str | None:
        """Why not, for a message."""
        if kv_cache_dtype not in _EIGHT_BITS:
            return None
        if head_size % EIGHT_BITS_MULTIPLE != 0:
            return f"caches of fp8 have a head_size that is a multiple of {EIGHT_BITS_MULTIPLE}"
        if not any(row["head_dim"] >= head_size for row in tile_configs("decode_fp8")):
            return f"this build has no kernel for caches of fp8 with head_size {head_size}"
        return None


@dataclasses.dataclass
class CuteKernelsMetadata:
    """Of a batch, for all layers of a group. Kernels read tensors on the device, so that a CUDA
    graph goes on to be right when what they hold changes."""

    num_actual_tokens: int  # without padding behind them
    max_query_len: int
    query_start_loc: Tensor  # (requests + 1,), int32
    seq_lens: Tensor  # (requests,), int32: keys, those of this batch's tokens included
    block_table: Tensor  # (requests, blocks), int32
    slot_mapping: Tensor  # (tokens,), int64
    causal: bool | Tensor  # or of each request, (requests,)


class CuteKernelsBuilder(AttentionMetadataBuilder[CuteKernelsMetadata]):
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_update_block_table = True
    supports_draft_decode_metadata_update = True  # there is nothing to update

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CuteKernelsMetadata:
        common = common_attn_metadata
        return CuteKernelsMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
        )

    def update_block_table(
        self, metadata: CuteKernelsMetadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> CuteKernelsMetadata:
        return dataclasses.replace(metadata, block_table=blk_table, slot_mapping=slot_mapping)


class CuteKernelsImpl(AttentionImpl[CuteKernelsMetadata]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise NotImplementedError(
                f"{NAME}: alibi_slopes are given: attention to caches has no ALiBi here, choose "
                "another backend for this model"
            )
        if kv_cache_dtype not in _CACHE_DTYPES:
            raise NotImplementedError(
                f"{NAME}: kv_cache_dtype is {kv_cache_dtype!r}, must be one of {_CACHE_DTYPES}"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self._left = -1 if sliding_window is None else sliding_window - 1  # itself is in vLLM's
        self._softcap = logits_soft_cap or 0.0

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CuteKernelsMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention to the cache, in which the batch's keys and values are already.

        Args:
            query: (tokens, heads, head_size), tokens as many as there are or more.
            key, value: (tokens, key heads, head_size), looked at only where there is no cache.
            kv_cache: (blocks, key heads, block_size, 2 * head_size), any strides.
            output: (tokens, heads, head_size), what is written and returned.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                f"{NAME}: output_scale is given: outputs have 16 bits, to be quantised afterwards"
            )
        batch = attn_metadata
        if batch is None:  # vLLM looks how much memory a run takes
            return output.fill_(0)
        tokens = slice(batch.num_actual_tokens)
        if self.attn_type in _WITHOUT_CACHE:
            output[tokens] = self._attend_without_cache(
                query[tokens], key[tokens], value[tokens], batch
            )
            return output
        causal = batch.causal
        if not isinstance(causal, Tensor):
            self._attend(layer, query, kv_cache, batch, batch.seq_lens, causal, output[tokens])
            return output
        # A request without keys gets 0.
        chosen = causal.bool()
        for of_causal, out in ((True, output[tokens]), (False, torch.empty_like(output[tokens]))):
            lengths = batch.seq_lens.masked_fill(chosen != of_causal, 0)
            self._attend(layer, query, kv_cache, batch, lengths, of_causal, out)
        output[tokens] += out
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes keys and values to their slots, by vLLM's own kernel."""
        if self.attn_type in _WITHOUT_CACHE:
            return
        _custom_ops.reshape_and_cache_flash(
            key,
            value,
            *self._parts(kv_cache),
            slot_mapping,
            self.kv_cache_dtype,
            layer._k_scale,
            layer._v_scale,
        )

    def _attend(
        self,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        batch: CuteKernelsMetadata,
        seq_lens: Tensor,
        causal: bool,
        out: Tensor,
    ) -> None:
        """Writes to out, which is dense, (tokens, heads, head_size)."""
        options = self._options()
        if self.kv_cache_dtype in _EIGHT_BITS:
            kv_cache = kv_cache.view(E4M3)
            shape = (seq_lens.shape[0], self.num_kv_heads)
            options["k_descale"] = layer._k_scale.expand(shape)
            options["v_descale"] = layer._v_scale.expand(shape)
        flash_attn_with_kvcache(
            query[: batch.num_actual_tokens],
            *self._parts(kv_cache),
            cache_seqlens=seq_lens,
            page_table=batch.block_table,
            cu_seqlens_q=batch.query_start_loc,
            max_seqlen_q=batch.max_query_len,
            causal=causal,
            window_size=self._window(causal),
            out=out,
            **options,
        )

    def _parts(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys and of values, (blocks, block_size, key heads, head_size); of fp8 as bytes."""
        # `split` is Python, and takes twice the time.
        sizes = (self.head_size, self.head_size)
        keys, values = kv_cache.transpose(1, 2).split_with_sizes(sizes, -1)
        return keys, values

    def _options(self) -> dict[str, Any]:
        return {"softmax_scale": self.scale, "softcap": self._softcap, "sinks": self.sinks}

    def _attend_without_cache(
        self, query: Tensor, key: Tensor, value: Tensor, batch: CuteKernelsMetadata
    ) -> Any:
        starts, longest = batch.query_start_loc, batch.max_query_len
        lengths = (starts, starts, longest, longest)
        options = {"causal": False, "window_size": self._window(False), **self._options()}
        return flash_attn_varlen_func(query, key, value, *lengths, **options)

    def _window(self, causal: bool) -> tuple[int, int]:
        return (self._left, 0) if causal and self._left >= 0 else (self._left, self._left)
