"""What small calls must not do on the host, where it costs more than it looks."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cute_kernels import (
    append_kv,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    variants,
)

E4M3 = torch.float8_e4m3fn


class Compared(TorchFunctionMode):
    """How often tensors were asked whether they equal something that is none: each time PyTorch
    raises and catches an exception, which takes as long as four calls of attention."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("__eq__", "__ne__", "eq", "ne"):
            self.count += not all(isinstance(x, (torch.Tensor, int, float)) for x in args)
        return function(*args, **(kwargs or {}))


def calls():
    q, k, v = torch.randn(3, 2, 8, 4, 64).bfloat16()
    k, v = k[:, :, :2], v[:, :, :2]
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    starts = torch.tensor([0, 8, 16], dtype=torch.int32)
    caches = torch.zeros(2, 4, 16, 2, 64)
    wide, eight = caches.bfloat16(), caches.to(E4M3)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    lengths = torch.tensor([5, 9], dtype=torch.int32)
    sinks, descale = torch.zeros(4), torch.ones(2, 2)
    descales = {"k_descale": descale, "v_descale": descale}
    paged = {"cache_seqlens": lengths, "page_table": table}
    e4m3 = [x.to(E4M3) for x in (q, k, v)]
    return {
        "dense, sinks": lambda: flash_attn_func(q, k, v, sinks=sinks),
        "dense, e4m3": lambda: flash_attn_func(*e4m3, **descales, q_descale=descale),
        "dense, variant": lambda: flash_attn_func(q, k, v, variant=variants.alibi(sinks)),
        "packed, sinks": lambda: flash_attn_varlen_func(*packed, starts, starts, sinks=sinks),
        "packed, used": lambda: flash_attn_varlen_func(
            *packed, starts, starts, seqused_q=lengths.clamp(max=8), seqused_k=lengths.clamp(max=8)
        ),
        "pages": lambda: flash_attn_varlen_func(
            packed[0], *wide, starts, seqused_k=lengths, page_table=table
        ),
        "cache": lambda: flash_attn_with_kvcache(
            q, *wide, k[:, :2], v[:, :2], **paged, sinks=sinks, out=torch.empty_like(q)
        ),
        "cache of 8 bits": lambda: flash_attn_with_kvcache(
            q, *eight, k[:, :2], v[:, :2], **paged, **descales
        ),
        "append": lambda: append_kv(*eight, k, v, lengths, page_table=table, **descales),
    }


@pytest.mark.parametrize("name", calls())
def test_no_tensor_is_compared_with_none(name):
    call = calls()[name]
    with Compared() as compared:
        call()
    assert compared.count == 0


def test_comparisons_are_noticed():
    with Compared() as compared:
        assert (torch.ones(2), 1) != (None, 1)
    assert compared.count == 1
