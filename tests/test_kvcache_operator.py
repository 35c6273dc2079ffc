"""The operators of KV caches in PyTorch's machinery: schema, shapes, compile, transforms."""

import copy
import random

import pytest
import torch
from caches import attend, random_cache, random_problem, random_queries
from torch import func
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from cute_kernels import append_kv, flash_attn_with_kvcache

attention = torch.ops.cute_kernels.flash_attn_kvcache_forward.default
attention_out = torch.ops.cute_kernels.flash_attn_kvcache_forward_out.default
append = torch.ops.cute_kernels.append_kv.default


def angles(positions=60, pairs=8):
    table = torch.outer(torch.arange(float(positions)), torch.arange(float(pairs)))
    return table.cos(), table.sin()


def small(seed=0, page_size=16):
    """A cache in which nothing is NaN, packed queries, and their starts."""
    chance = random.Random(seed)
    cache = random_cache(chance, "cpu", torch.float32, [20, 3], page_size, 2, [32, 16], room=4)
    for x in (cache.k_cache, cache.v_cache):
        x.nan_to_num_(0.0)
    return cache, *random_queries(chance, "cpu", torch.float32, [4, 2], 4, 32)


def opcheck(operator, *inputs, **options):
    done = torch.library.opcheck(operator, inputs, options)
    assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize("page_size", [None, 16])
def test_attention_operator(page_size):
    cache, q, starts = small(page_size=page_size)
    places = (cache.places.get(name) for name in ("page_table", "cache_batch_idx", "cache_leftpad"))
    inputs = (q, cache.k_cache, cache.v_cache, starts, cache.seqlens(), *places)
    opcheck(attention, *inputs, None, 0.3, True, max_seqlen_q=4)
    opcheck(attention, *inputs, torch.zeros(4), 0.3, False, window_left=9, num_splits=3)
    out = torch.empty(6, 4, 16)
    opcheck(attention_out, out, *inputs, None, 0.3, True, max_seqlen_q=4, num_splits=3)


@pytest.mark.parametrize("page_size", [None, 16])
def test_append_operator(page_size):
    cache, *_ = small(page_size=page_size)
    table = cache.places.get("page_table")
    k, v = torch.randn(2, 4, 2, 32), torch.randn(2, 4, 2, 16)
    caches = (cache.k_cache, cache.v_cache)
    opcheck(append, *caches, k, v, cache.seqlens(), None, table, None, *angles(), None, True)
    ends = torch.tensor([0, 3, 4], dtype=torch.int32)
    packed = (k[0], v[0], cache.seqlens(), ends)
    opcheck(append, *caches, *packed, table, None, None, None, None, False)


def test_append_operator_with_queries():
    cache, *_ = small()
    k, v = torch.randn(2, 4, 2, 32), torch.randn(2, 4, 2, 16)
    q = torch.randn(2, 4, 3, 32).transpose(1, 2).contiguous().transpose(1, 2)
    table = cache.places["page_table"]
    inputs = (cache.k_cache, cache.v_cache, k, v, cache.seqlens(), None, table, None, *angles())
    opcheck(append, *inputs, None, True, q)
    ends = torch.tensor([0, 3, 4], dtype=torch.int32)
    opcheck(append, *inputs, None, False, q[0], ends, False)


def form(x):
    return x.shape, x.stride(), x.dtype, x.device


@pytest.mark.parametrize("seqlen_q", [0, 1, 5])
def test_shape_inference_is_what_is_allocated(seqlen_q):
    cache, *_ = small()
    q = torch.randn(2, seqlen_q, 4, 32)
    real = attend(q, None, cache)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = attend(q, None, cache)
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [
        (x.shape, x.stride(), x.dtype) for x in real
    ]


def test_shape_inference_on_cuda():
    with FakeTensorMode():
        how = {"device": "cuda", "dtype": torch.bfloat16}
        q = torch.empty(3, 1, 8, 128, **how)
        cache = torch.empty(40, 64, 2, 256, **how)
        k_cache, v_cache = cache.split(128, -1)
        new = torch.empty(3, 1, 2, 128, **how)
        lengths = torch.empty(3, dtype=torch.int32, device="cuda")
        table = torch.empty(3, 9, dtype=torch.int32, device="cuda")
        cos, sin = (torch.empty(1000, 64, device="cuda") for _ in range(2))
        out, lse = flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            new,
            new,
            rotary_cos=cos,
            rotary_sin=sin,
            cache_seqlens=lengths,
            page_table=table,
            causal=True,
            return_softmax_lse=True,
        )
        assert form(out) == ((3, 1, 8, 128), (1024, 1024, 128, 1), q.dtype, q.device)
        assert (lse.shape, lse.device) == ((3, 8, 1), q.device)
        odd = torch.empty(40, 64, 2, 129, **how).narrow(-1, 0, 128)
        message = r"^v_cache has strides \(16512, 258, 129, 1\) and offset 0, must be mul"
        with pytest.raises(ValueError, match=message):
            flash_attn_with_kvcache(q, k_cache, odd, cache_seqlens=lengths, page_table=table)


def decode(q, k, v, caches, lengths, table, cos, sin):
    """A step of a model: everything in one call, and work around it. `caches`: both, or one tensor
    that both are parts of."""
    k_cache, v_cache = caches.chunk(2, -1) if isinstance(caches, torch.Tensor) else caches
    return 2 * flash_attn_with_kvcache(
        q.sin(),
        k_cache,
        v_cache,
        k + 1,
        v,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=lengths,
        page_table=table,
        causal=True,
    )


@pytest.mark.parametrize("in_one", [False, True])
def test_compile(in_one):
    """Caches are written in place inside of a graph too; one compilation serves all lengths and
    batches."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode, backend=counter, fullgraph=True, dynamic=True)
    compilations = set()
    for lengths in ([20, 3, 30, 1], [5, 9, 0, 1, 2, 3], [1, 2, 3, 17, 4, 20, 38, 2, 1]):
        batch, pages = len(lengths), 3 * len(lengths)
        q, k, v = (torch.randn(batch, 7, heads, 32) for heads in (8, 2, 2))
        caches = torch.randn(pages, 16, 2, 64)
        caches = caches if in_one else tuple(x.contiguous() for x in caches.chunk(2, -1))
        table = torch.randperm(pages, dtype=torch.int32).view(batch, 3)
        rest = (torch.tensor(lengths, dtype=torch.int32), table, *angles())
        right_caches = copy.deepcopy(caches)
        right = decode(q, k, v, right_caches, *rest)
        assert (right[0] != 0).any()
        torch.testing.assert_close(compiled(q, k, v, caches, *rest), right)
        torch.testing.assert_close(caches, right_caches)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


def test_saved_caches_are_known_to_have_changed():
    """A gradient through what a cache held before is refused, as of other work in place."""
    cache, *_ = small()
    weight = torch.ones(32, requires_grad=True)
    loss = (cache.k_cache * weight).sum()
    k, v = torch.randn(2, 1, 2, 32), torch.randn(2, 1, 2, 16)
    append_kv(cache.k_cache, cache.v_cache, k, v, cache.seqlens(), **cache.places)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode():
    with torch.inference_mode():
        cache, q, starts = small()
        k, v = torch.randn(2, 1, 2, 32), torch.randn(2, 1, 2, 16)
        append_kv(cache.k_cache, cache.v_cache, k, v, cache.seqlens(), **cache.places)
        assert attend(q, starts, cache)[0].isfinite().all()


def test_no_gradient_and_no_transforms():
    cache, q, starts = small()
    inputs = (q.requires_grad_(), cache.k_cache, cache.v_cache, starts, cache.seqlens())
    out, _ = attention(*inputs, cache.places["page_table"], None, None, None, 0.3, True)
    with pytest.raises(NotImplementedError, match="flash_attn_kvcache_forward has no gradient"):
        out.sum().backward()
    q = q.detach()
    with pytest.raises(NotImplementedError, match=r"has no torch\.func transforms"):
        func.vmap(lambda x: attend(x, starts, cache)[0])(q[None])
    with pytest.raises(NotImplementedError, match=r"has no rule for torch\.func\.vmap"):
        func.vmap(
            lambda x: attention(
                x, *inputs[1:], cache.places["page_table"], None, None, None, 1, True
            )
        )(q[None])


def test_autocast_changes_nothing():
    _, cache, q, starts, options = random_problem(5, "cpu", torch.float32)
    right = attend(q, starts, cache, **options)
    with torch.autocast("cpu", torch.bfloat16):
        results = attend(q, starts, cache, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, right, strict=True))
