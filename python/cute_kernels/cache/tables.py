"""The rows of a page table that `cache_batch_idx` names."""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import check_tensor
from cute_kernels.varlen_checks import check_int32

_NO_PAGE = -1


def table_of_batch(
    page_table: Tensor, cache_batch_idx: Tensor, k_cache: Tensor, batch: int | None = None
) -> Tensor:
    """Row ``cache_batch_idx[b]`` for sequence b. On CUDA a row that there is not has no pages."""
    check_tensor("k_cache", k_cache)
    check_int32("page_table", page_table, k_cache, dims=2, like="k_cache")
    check_int32("cache_batch_idx", cache_batch_idx, k_cache, like="k_cache")
    if batch is not None and cache_batch_idx.shape[0] != batch:
        raise ValueError(
            f"cache_batch_idx has shape ({cache_batch_idx.shape[0]},), must be (batch,) = "
            f"({batch},)"
        )
    rows = page_table.shape[0]
    if cache_batch_idx.device.type == "cpu" and type(cache_batch_idx) is Tensor:
        _check_contents(cache_batch_idx, rows)
    if rows == 0:
        return page_table.new_full((cache_batch_idx.shape[0], page_table.shape[1]), _NO_PAGE)
    known = cache_batch_idx.clamp(0, rows - 1)
    table = page_table.index_select(0, known)
    return table.masked_fill_((known != cache_batch_idx)[:, None], _NO_PAGE)


def _check_contents(cache_batch_idx: Tensor, rows: int) -> None:
    if torch.compiler.is_compiling():
        return
    for i, row in enumerate(cache_batch_idx.tolist()):
        if not 0 <= row < rows:
            raise ValueError(
                f"cache_batch_idx[{i}] is {row}, must be from 0 to below {rows}, page_table's batch"
            )
