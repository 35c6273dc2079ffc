"""Who attends to a cache: ours, FlashAttention-3 and FlashMLA of vLLM; and what only reads it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import vllm_library
from bench.cache_cells import FLASHMLA, LATENT, SUM, VLLM, CacheCell
from bench.cache_inputs import ROTATED, CacheReference, Caches, Round, rows_of
from bench.providers import OURS, Provider, Unavailable, library_of

INT8 = f"{OURS}:int8"
SEED = 1


class CacheProvider(Provider):
    """`function` gives for a cell what makes, of its queries and caches, a round of calls."""

    def bind(self, cell: CacheCell, *inputs: Any) -> Round:
        return self.function(cell)(*inputs)

    def output(self, result: object) -> torch.Tensor:
        """Packed."""
        out = super().output(result)
        return out.flatten(0, 1) if out.dim() == 4 else out


def parts(cell: CacheCell, copy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (rope columns of latent attention) and values of a copy."""
    if cell.latent:
        values, keys = copy.split([LATENT, cell.head_dim], -1)
        return keys, values
    return copy[0], copy[1]


def _of_queries(cell: CacheCell, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries of the keys, and of the values of latent attention. Dense, as a model's two products
    leave them."""
    if not cell.latent:
        return q, None
    of_values, of_keys = q.split([LATENT, cell.head_dim], -1)
    return of_keys.contiguous(), of_values.contiguous()


def _our_options(cell: CacheCell, caches: Caches) -> dict[str, Any]:
    return {
        "cache_seqlens": caches.lengths,
        "page_table": caches.table,
        "cu_seqlens_q": caches.starts,
        "max_seqlen_q": cell.seqlen,
        "softmax_scale": cell.key_columns**-0.5,
        "causal": True,
        "window_size": cell.window_size,
        "sinks": None if caches.sinks is None else caches.sinks.float(),
    }


def ours() -> CacheProvider:
    import cute_kernels

    def function(cell: CacheCell):
        def calls(q: torch.Tensor, caches: Caches) -> Round:
            of_keys, of_values = _of_queries(cell, q)
            attend = partial(
                cute_kernels.flash_attn_with_kvcache,
                of_keys,
                qv=of_values,
                **_our_options(cell, caches),
            )
            return Round([partial(attend, *parts(cell, copy)) for copy in caches.copies])

        return calls

    version = f"cute_kernels {cute_kernels.__version__}"
    return CacheProvider(OURS, "cute_kernels", version, function)


def ours_int8() -> CacheProvider:
    """A cache of rotated keys in int8, each row with a factor, of the same keys and values."""
    import cute_kernels
    from cute_kernels.fp8.rotation import rotate_back

    rotation = {"incoherent": True, "seed": SEED}

    def appended(cell: CacheCell, q: torch.Tensor, caches: Caches, copy: torch.Tensor):
        numbers = torch.zeros_like(copy, dtype=torch.int8)
        scales = torch.zeros(copy.shape[:-1], device=copy.device)
        rows = [
            torch.stack([rows_of(x, caches, i, n) for i, n in enumerate(cell.lengths)]).to(q.dtype)
            for x in copy
        ]
        factors = {"k_scales": scales[0], "v_scales": scales[1], **rotation}
        empty = torch.zeros_like(caches.lengths)
        cute_kernels.append_kv(*numbers, *rows, empty, page_table=caches.table, **factors)
        return numbers, scales, factors

    def function(cell: CacheCell):
        def calls(q: torch.Tensor, caches: Caches) -> Round:
            options = _our_options(cell, caches)
            stored = [appended(cell, q, caches, copy) for copy in caches.copies]
            attend = partial(cute_kernels.flash_attn_with_kvcache, q)
            numbers, scales, _ = stored[-1]

            def read(sequence: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
                length = cell.lengths[sequence]
                k, v = (
                    rows_of(x, caches, sequence, length)[:, head].float()
                    * rows_of(factor, caches, sequence, length)[:, head, None]
                    for x, factor in zip(numbers, scales, strict=True)
                )
                return rotate_back(k, SEED), v

            return Round(
                [partial(attend, *x, **factors, **options) for x, _, factors in stored],
                CacheReference(cell, q, caches, read, **ROTATED),
            )

        return calls

    version = f"cute_kernels {cute_kernels.__version__}"
    return CacheProvider(
        INT8,
        "cute_kernels, int8, rotated",
        version,
        function,
        takes=lambda cell: cell.element == "e4m3",
    )


def vllm(path: Path | None) -> CacheProvider:
    """FlashAttention-3; to a cache of e4m3 it has queries of e4m3 only."""
    operators, name = library_of(
        path, vllm_library.VARIABLE, vllm_library.HOW_TO_GET, vllm_library.load_attention
    )

    def function(cell: CacheCell):
        def calls(q: torch.Tensor, caches: Caches) -> Round:
            of_keys, of_values = _of_queries(cell, q.to(caches.copies[0].dtype))
            left, right = cell.window_size
            window = {"window_size_left": left, "window_size_right": right}
            most = {"max_seqlen_q": cell.seqlen, "max_seqlen_k": cell.seqlen_k}
            factors = {}
            if cell.element == "e4m3":
                one = torch.ones(cell.batch, cell.heads_kv, device=q.device)
                factors = {"q_descale": one, "k_descale": one, "v_descale": one}
            metadata = vllm_library.scheduler_metadata(
                operators,
                caches.lengths,
                caches.starts,
                of_keys.dtype,
                batch_size=cell.batch,
                num_heads=cell.heads,
                num_heads_k=cell.heads_kv,
                headdim=cell.head_dim,
                headdim_v=cell.head_dim_v,
                page_size=cell.page_size,
                **most,
                **window,
            )
            attend = partial(
                vllm_library.attention,
                operators,
                of_keys,
                q_v=of_values,
                cu_seqlens_q=caches.starts,
                seqused_k=caches.lengths,
                page_table=caches.table,
                softmax_scale=cell.key_columns**-0.5,
                scheduler_metadata=metadata,
                s_aux=caches.sinks,
                **most,
                **window,
                **factors,
            )

            def call(copy: torch.Tensor) -> object:
                k, v = parts(cell, copy)
                return attend(k=k, v=v)

            return Round([partial(call, copy) for copy in caches.copies])

        return calls

    return CacheProvider(VLLM, "FA3 (vLLM)", f"_vllm_fa3_C of {name}", function)


def flashmla(path: Path | None) -> CacheProvider:
    operators, name = library_of(
        path,
        vllm_library.FLASHMLA_VARIABLE,
        vllm_library.HOW_TO_GET_FLASHMLA,
        vllm_library.load_flashmla,
    )

    def function(cell: CacheCell):
        def calls(q: torch.Tensor, caches: Caches) -> Round:
            dense = q.view(cell.batch, cell.seqlen, *q.shape[1:])
            places = (caches.lengths, caches.table)
            attend = partial(vllm_library.latent, operators, dense, LATENT, *places)
            plan = attend(caches.copies[0])[1:]  # made once a step for all layers
            return Round([partial(attend, copy, plan) for copy in caches.copies])

        return calls

    return CacheProvider(
        FLASHMLA,
        "FlashMLA (vLLM)",
        f"_flashmla_C of {name}",
        function,
        takes=lambda cell: cell.latent and cell.page_size == 64 and len(set(cell.queries)) == 1,
    )


class SumReference:
    """Of the sum of a copy's bytes as float32."""

    tolerance = 1.0

    def __init__(self, words: torch.Tensor):
        self._exact = words.sum(dtype=torch.float64)
        self._allowed = 2.0**-12 * words.double().abs().sum()

    def error(self, out: torch.Tensor) -> float:
        off = (out.double() - self._exact).abs() / self._allowed
        return off.nan_to_num(nan=float("inf")).item()

    def rmse(self, out: torch.Tensor) -> float:
        return (out.double() - self._exact).abs().item()


def only_sums() -> CacheProvider:
    """The limit: as many bytes as the queries see, read once, by PyTorch's sum of float32."""

    def function(cell: CacheCell):
        def calls(q: torch.Tensor, caches: Caches) -> Round:
            words = [x.view(-1).view(torch.float32)[: cell.bytes // 4] for x in caches.copies]
            return Round([partial(torch.sum, x) for x in words], SumReference(words[-1]))

        return calls

    return CacheProvider(SUM, "a sum of as many bytes", f"torch {torch.__version__}", function)


def load(
    vllm_path: Path | None, flashmla_path: Path | None
) -> tuple[list[CacheProvider], dict[str, str]]:
    """All that can run here, and why others cannot."""
    loaded, missing = [ours(), ours_int8(), only_sums()], {}
    loaders: dict[str, Callable[[], CacheProvider]] = {
        VLLM: lambda: vllm(vllm_path),
        FLASHMLA: lambda: flashmla(flashmla_path),
    }
    for name, loader in loaders.items():
        try:
            loaded.append(loader())
        except Unavailable as error:
            missing[name] = str(error)
    return loaded, missing
