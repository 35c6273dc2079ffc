"""Calls with caches of 8 bits in PyTorch's machinery, and which are refused."""

import re

import pytest
import torch
from eight_bits import E4M3

from cute_kernels import flash_attn_with_kvcache


def small(dtype=E4M3):
    """Tensors of a call with pages of 16, in which nothing is NaN."""
    caches = torch.randn(2, 5, 16, 2, 64).to(dtype)
    table = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
    lengths = torch.tensor([20, 3], dtype=torch.int32)
    q = torch.randn(2, 4, 4, 64).bfloat16()
    new = torch.randn(2, 2, 4, 2, 64).bfloat16()
    return q, caches, new, lengths, table


def test_operators_say_what_they_do():
    """opcheck: schemas, shape inference and what is written."""
    q, caches, new, lengths, table = small(torch.int8)
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    operators = torch.ops.cute_kernels
    scales = torch.rand(2, 5, 16, 2)
    places = (lengths, table, None, None, None, 0.1, True)
    tree = torch.full((8,), 15)
    calls = [
        (
            operators.flash_attn_kvcache_forward.default,
            (
                q.flatten(0, 1),
                *caches,
                starts,
                *places,
                torch.ones(2, 2),
                *scales,
                tree,
            ),
            {"rotation_seed": 3, "attention_chunk": 9},
        ),
        (
            operators.append_kv.default,
            (
                *caches,
                *new,
                lengths,
                None,
                table,
                *[None] * 4,
                True,
                None,
                None,
                True,
                None,
                None,
                *scales,
                5,
            ),
            {},
        ),
    ]
    for operator, inputs, options in calls:
        done = torch.library.opcheck(operator, inputs, options)
        assert set(done.values()) == {"SUCCESS"}


def test_compiled_calls_are_the_same():
    """Append and attention in one graph; the scales are written there, too."""
    q, caches, new, lengths, table = small(torch.int8)

    def step(q, k_cache, v_cache, k, v, k_scales, v_scales):
        return flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=lengths,
            page_table=table,
            causal=True,
            k_scales=k_scales,
            v_scales=v_scales,
            incoherent=True,
        )

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        written = [*caches.clone(), *torch.ones(2, 5, 16, 2)]
        out = run(q, *written[:2], *new, *written[2:])
        found.append([out, *written])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


ONES = torch.ones(2, 2)
BAD = {
    "a descale of float64": (
        {"k_descale": ONES.double()},
        TypeError,
        "k_descale has dtype torch.float64, must be torch.float32",
    ),
    "a descale for each query head": (
        {"v_descale": torch.ones(2, 4)},
        ValueError,
        "v_descale has shape (2, 4), must be (batch, key heads) = (2, 2), or of pages' rows "
        "(5, 16, 2) or (5, 1, 2)",
    ),
    "rows of queries": (
        {"q_descale": torch.ones(5, 16, 2)},
        ValueError,
        "q_descale has shape (5, 16, 2), must be (batch, key heads) = (2, 2)",
    ),
    "a descale on another device": (
        {"q_descale": ONES.to("meta")},
        ValueError,
        "q_descale is on meta, must be on cpu like k_cache",
    ),
    "descale and scales": (
        {"k_descale": ONES, "k_scales": torch.ones(5, 16, 2)},
        ValueError,
        "k_scales is given, must be None with k_descale",
    ),
    "scales of pages": (
        {"v_scales": torch.ones(5, 1, 2), "k": torch.ones(2, 4, 2, 64).bfloat16()},
        ValueError,
        "v_scales has shape (5, 1, 2), must be (5, 16, 2) like the cache but for head_dim",
    ),
    "float32 queries": (
        {"q": torch.ones(2, 4, 4, 64)},
        TypeError,
        "q has dtype torch.float32, must be float16, bfloat16 or float8_e4m3fn for a cache of",
    ),
    "e4m3 queries of a cache of 16 bits": (
        {
            "q": torch.ones(2, 4, 4, 64).to(E4M3),
            "k_cache": torch.ones(5, 16, 2, 64).bfloat16(),
            "v_cache": torch.ones(5, 16, 2, 64).bfloat16(),
        },
        TypeError,
        "q has dtype torch.float8_e4m3fn, must be float16 or bfloat16",
    ),
    "another head dim of V": (
        {"v_cache": torch.ones(5, 16, 2, 24).to(E4M3)},
        ValueError,
        "v_cache has head_dim 24, must be a multiple of 16 for torch.float8_e4m3fn",
    ),
    "out of another dtype": (
        {"out": torch.empty(2, 4, 4, 64).half()},
        TypeError,
        "out has dtype torch.float16, must be torch.bfloat16",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_refused(bad):
    q, caches, new, lengths, table = small()
    changes, error, message = BAD[bad]
    call = {
        "q": q,
        "k_cache": caches[0],
        "v_cache": caches[1],
        "cache_seqlens": lengths,
        "page_table": table,
    }
    assert flash_attn_with_kvcache(**call).isfinite().all()
    if "k" in changes:
        changes = {**changes, "v": new[1]}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        flash_attn_with_kvcache(**{**call, **changes})


def test_rotation_needs_a_power_of_2():
    cache = torch.ones(1, 9, 1, 48).to(torch.int8)
    with pytest.raises(ValueError, match="k_cache has head_dim 48, must be a power of 2 with inc"):
        flash_attn_with_kvcache(torch.ones(1, 1, 1, 48).half(), cache, cache, incoherent=True)
