"""What the tensors of a variant may look like in a call."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

import torch
from torch import Tensor

from cute_kernels.checks import check_device, check_tensor
from cute_kernels.compile.hooks import COORDINATES, FLOATING
from cute_kernels.compile.hooks import Tensor as Declared
from cute_kernels.tiles import ROWS
from cute_kernels.variants.variant import DTYPES, BoundVariant

_LIMIT = 2**31  # of what CapturedTensor of attention/variant/arguments.hpp counts in


class Sizes(NamedTuple):
    """How many there are of each coordinate in a call; of packed sequences query and key are at
    least those of the longest."""

    batch: int
    head: int
    query: int
    key: int
    query_row: int
    key_row: int


def sizes_of(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Sizes:
    if cu_seqlens_q is None:
        return Sizes(q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.shape[1], k.shape[1])
    rows_q, rows_k = q.shape[0], k.shape[0]
    # At least 1 of each, which kernels may read whatever cu_seqlens holds.
    longest_q = rows_q if max_seqlen_q is None else min(max(1, max_seqlen_q), rows_q)
    longest_k = rows_k if max_seqlen_k is None else min(max(1, max_seqlen_k), rows_k)
    return Sizes(cu_seqlens_q.shape[0] - 1, q.shape[1], longest_q, longest_k, rows_q, rows_k)


def expanded(variant: BoundVariant, sizes: Sizes) -> list[Tensor]:
    """The captured tensors; a size of 1 of what a coordinate indexes is the same for all of it.
    Raises TypeError if one is not strided."""
    tensors = []
    for declared, tensor in zip(variant.variant.hooks.tensors, variant.tensors, strict=True):
        check_tensor(declared.name, tensor)
        shape = [
            getattr(sizes, axis) if size == 1 and axis in COORDINATES else size
            for axis, size in zip(declared.axes, tensor.shape, strict=False)
        ]
        tensors.append(tensor.expand(shape) if len(shape) == tensor.dim() else tensor)
    return tensors


def check_captured(variant: BoundVariant, q: Tensor, sizes: Sizes) -> None:
    """Raises ValueError or TypeError unless hooks may read the tensors in a call of these sizes."""
    for declared, tensor in zip(variant.variant.hooks.tensors, variant.tensors, strict=True):
        _check_tensor(declared, tensor, q, sizes)


def _check_tensor(declared: Declared, tensor: Tensor, q: Tensor, sizes: Sizes) -> None:
    name = declared.name
    check_device(name, tensor, q)
    if DTYPES.get(tensor.dtype) != declared.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, must be torch.{declared.dtype}")
    if tensor.dim() != len(declared.axes):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, must have {len(declared.axes)} dimensions: "
            f"({', '.join(str(axis) for axis in declared.axes)})"
        )
    # Nothing is read by the stride of a size of 1.
    strides = (stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n != 1)
    if tensor.device.type == "cuda" and any(
        isinstance(n, int) and n >= _LIMIT for n in (*tensor.shape, *strides)
    ):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, each must be "
            "below 2^31 on CUDA"
        )
    for axis, (of, size) in enumerate(zip(declared.axes, tensor.shape, strict=True)):
        if of in ("batch", "head"):
            wrong, allowed = size != getattr(sizes, of), f"{getattr(sizes, of)}"
        elif of in COORDINATES:
            least = getattr(sizes, str(of))
            wrong, allowed = size < least, f"at least {least}"
        elif of is None:
            wrong, allowed = size == 0, "at least 1"
        else:
            wrong, allowed = size != of, f"{of}"
        if wrong:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, dimension {axis} ({of}) must be {allowed}"
            )


def with_gradient(variant: BoundVariant, on_cuda: bool = True) -> list[str]:
    """The captured tensors whose gradients a call is to have: that require one, and are read by
    the score or the weight. On the CPU all that are read: what is mapped (`torch.func.vmap`) does
    not say that it requires one."""
    hooks, python = variant.variant.hooks, variant.variant.python
    if not torch.is_grad_enabled():
        return []

    def is_read(name: str) -> bool:
        if on_cuda:
            return any(re.search(rf"\b{name}\b", x or "") for x in (hooks.score, hooks.weight))
        functions = (python["score"], python["weight"])
        return any(f is not None and name in inspect.signature(f).parameters for f in functions)

    return [
        declared.name
        for declared, tensor in zip(hooks.tensors, variant.tensors, strict=True)
        if (tensor.requires_grad or not on_cuda) and is_read(declared.name)
    ]


def without_other_gradients(variant: BoundVariant, names: list[str]) -> BoundVariant:
    """Of captured tensors only these have a gradient: a mask that reads one has none."""
    of_each = zip(variant.variant.hooks.tensors, variant.tensors, strict=True)
    return variant.with_tensors([x if of.name in names else x.detach() for of, x in of_each])


def check_gradients(variant: BoundVariant, names: list[str], packed: bool) -> None:
    """Raises NotImplementedError if the kernels have no gradient of one of them."""
    hooks = variant.variant.hooks
    for name in names:
        declared, why = hooks.tensor(name), None
        axes = set(declared.axes)
        if hooks.score_gradient is not None:
            why = "score_gradient says nothing of it"
        elif hooks.weight is not None:
            why = "there are none in variants with weights"
        elif not axes <= {"batch", "head", "query", "key"}:
            why = f"only of the axes batch, head, query and key, and it has {declared.axes}"
        elif packed and axes != {"head"}:
            why = "packed sequences have only gradients of the axis head"
        if why is not None:
            raise NotImplementedError(
                f"variant {hooks.name} has no gradient of {name} on CUDA: {why}; call it with "
                f"{name}.detach(), or on the CPU"
            )
    assert all(hooks.tensor(name).dtype in FLOATING for name in names)


def check_tile(variant: BoundVariant, tile_config: str | None, block_mask: bool) -> None:
    """Raises ValueError or TypeError unless it is None or a forward kernel of the variant, with or
    without a block mask."""
    if tile_config is None:
        return
    if not isinstance(tile_config, str):
        raise TypeError(f"tile_config is {tile_config!r}, must be a str or None")
    key = variant.variant.key_of(block_mask)
    own = [row["name"] for row in ROWS["forward"].values() if row.get("variant") == key]
    if tile_config not in own:
        beside = " with a block mask" if block_mask else ""
        raise ValueError(
            f"tile_config is {tile_config!r}, must be None (automatic) or a forward kernel of "
            f"variant {variant.variant.name}{beside} that was added: "
            f"{', '.join(own) or 'there is none'}"
        )
