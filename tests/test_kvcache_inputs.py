"""What is refused of calls with a KV cache, and where."""

import contextlib
import random
import re

import pytest
import torch
from caches import random_cache, random_queries
from parity import changed
from torch._subclasses import FakeTensorMode

from cute_kernels import append_kv, flash_attn_varlen_func, flash_attn_with_kvcache
from cute_kernels.checks import ROWS_LIMIT


def good_call(page_size=16):
    """Keyword arguments: 2 sequences of 20 and 3 keys, to which 4 each are added, rotated."""
    cache = random_cache(
        random.Random(0), "cpu", torch.bfloat16, [20, 3], page_size, 2, [64, 64], room=4
    )
    q, starts = random_queries(random.Random(0), "cpu", torch.bfloat16, [4, 4], 4, 64)
    angles = torch.outer(torch.arange(50.0), torch.arange(16.0))
    return {
        "q": q,
        "k_cache": cache.k_cache,
        "v_cache": cache.v_cache,
        "k": torch.ones(2, 4, 2, 64).bfloat16(),
        "v": torch.ones(2, 4, 2, 64).bfloat16(),
        "rotary_cos": angles.cos(),
        "rotary_sin": angles.sin(),
        "cache_seqlens": cache.seqlens(),
        "cu_seqlens_q": starts,
        **cache.places,
    }


def call(*inputs, **arguments):
    return flash_attn_with_kvcache(*inputs, **arguments)


def ints(*values):
    return lambda x: torch.tensor(values, dtype=torch.int32)


# What is changed about a good call, the kind of error, and the message.
BAD = {
    "q of rank 4": (
        {"q": lambda x: x[None]},
        ValueError,
        "q has shape (1, 8, 4, 64), must have 3 dimensions: (total, heads, head_dim)",
    ),
    "q not a tensor": ({"q": lambda x: 3}, TypeError, "q is a int, must be a torch.Tensor"),
    "q of integers": ({"q": lambda x: x.long()}, TypeError, "q has dtype torch.int64, must be "),
    "q's heads": (
        {"q": lambda x: x[:, :3]},
        ValueError,
        "q has 3 heads, must be a multiple of k_cache's 2",
    ),
    "k_cache of rank 3": (
        {"k_cache": lambda x: x[0]},
        ValueError,
        "k_cache has shape (16, 2, 64), must have 4 dimensions: (pages, page_size, key heads, ",
    ),
    "k_cache of another dtype": (
        {"k_cache": lambda x: x.half()},
        TypeError,
        "k_cache has dtype torch.float16, must be torch.bfloat16 like k",
    ),
    "v_cache of another page size": (
        {"v_cache": lambda x: x[:, :8]},
        ValueError,
        "v_cache has shape (5, 8, 2, 64), must be (5, 16, 2, 64) like k_cache but for head_dim",
    ),
    "v_cache None": (
        {"v_cache": lambda x: None},
        TypeError,
        "v_cache is a NoneType, must be a torch.Tensor",
    ),
    "strided cache": (
        {"k_cache": lambda x: x.repeat_interleave(2, -1)[..., ::2]},
        ValueError,
        "k_cache has strides (4096, 256, 128, 2), its last dimension (head_dim) must be contiguous",
    ),
    "k without v": (
        {"v": lambda x: None},
        ValueError,
        "k is given, must be None unless both k and v are given",
    ),
    "rotary without k": (
        {"k": lambda x: None, "v": lambda x: None},
        ValueError,
        "rotary_cos is given, must be None unless both k and v are given",
    ),
    "cos without sin": (
        {"rotary_sin": lambda x: None},
        ValueError,
        "rotary_cos and rotary_sin must both be given, or neither",
    ),
    "sin of another shape": (
        {"rotary_sin": lambda x: x[1:]},
        ValueError,
        "rotary_sin has shape (49, 16), must be (50, 16) like rotary_cos",
    ),
    "rotary dim 24": (
        {"rotary_cos": lambda x: x[:, :12], "rotary_sin": lambda x: x[:, :12]},
        ValueError,
        "rotary_cos has shape (50, 12): rotary_dim is 24, must be a multiple of 16 up to k's ",
    ),
    "rotary in fp16": (
        {"rotary_cos": lambda x: x.half()},
        TypeError,
        "rotary_cos has dtype torch.float16, must be torch.float32 or torch.bfloat16 like k",
    ),
    "k of other heads": (
        {"k": lambda x: x[:, :, :1], "v": lambda x: x[:, :, :1]},
        ValueError,
        "k has (key heads, head_dim) (1, 64), must be (2, 64) like k_cache",
    ),
    "k of another batch": (
        {"k": lambda x: x[:1], "v": lambda x: x[:1]},
        ValueError,
        "k has batch 1, must be 2 like cache_seqlens",
    ),
    "v of another length": (
        {"v": lambda x: x[:, :3]},
        ValueError,
        "v has shape (2, 3, 2, 64), must be (2, 4, 2, 64) like k but for head_dim",
    ),
    "cache_seqlens of int64": (
        {"cache_seqlens": lambda x: x.long()},
        TypeError,
        "cache_seqlens has dtype torch.int64, must be torch.int32",
    ),
    "cache_seqlens None": (
        {"cache_seqlens": lambda x: None},
        ValueError,
        "cache_seqlens is None, must be given with k and v",
    ),
    "cache_seqlens a float": (
        {"cache_seqlens": lambda x: 3.0},
        TypeError,
        "cache_seqlens is 3.0, must be a torch.Tensor, int or None",
    ),
    "cache_seqlens of more than 32 bits": (
        {"cache_seqlens": lambda x: 2**31},
        ValueError,
        "cache_seqlens is 2147483648, must be at least 0 and below 2^31",
    ),
    "k_cache no tensor": (
        {"k_cache": lambda x: "cache"},
        TypeError,
        "k_cache is a str, must be a torch.Tensor",
    ),
    "causal no flag": (
        {"causal": lambda x: torch.ones(2)},
        TypeError,
        "causal is tensor([1., 1.]), must be True or False",
    ),
    "num_splits of more than 64 bits": (
        {"num_splits": lambda x: 10**30},
        ValueError,
        f"num_splits is {10**30}, must be an int of 64 bits",
    ),
    "page_table of rank 1": (
        {"page_table": lambda x: x[0]},
        ValueError,
        "page_table has shape (2,), must have 2 dimensions",
    ),
    "page_table of another batch": (
        {"page_table": lambda x: x[:1]},
        ValueError,
        "page_table has shape (1, 2), must be (batch, max_pages) with batch 2",
    ),
    "leftpad of another batch": (
        {
            "cache_leftpad": ints(0, 0, 0),
            "k": lambda x: None,
            "v": lambda x: None,
            "rotary_cos": lambda x: None,
            "rotary_sin": lambda x: None,
        },
        ValueError,
        "cache_leftpad has shape (3,), must be (batch,) = (2,)",
    ),
    "batch_idx of another batch": (
        {"cache_batch_idx": ints(0, 1, 1)},
        ValueError,
        "cache_batch_idx has shape (3,), must be (batch,) = (2,)",
    ),
    "batch_idx of int64": (
        {"cache_batch_idx": lambda x: torch.tensor([0, 1])},
        TypeError,
        "cache_batch_idx has dtype torch.int64, must be torch.int32",
    ),
    "sinks of one head": (
        {"sinks": lambda x: torch.zeros(1)},
        ValueError,
        "sinks has shape (1,), must be (heads,) = (4,)",
    ),
    "sinks of integers": (
        {"sinks": lambda x: torch.zeros(4, dtype=torch.int32)},
        TypeError,
        "sinks has dtype torch.int32, must be float32, float16 or bfloat16",
    ),
    "scale 0": (
        {"softmax_scale": lambda x: 0.0},
        ValueError,
        "softmax_scale is 0.0, must be finite and greater than 0",
    ),
    "softcap negative": (
        {"softcap": lambda x: -1.0},
        ValueError,
        "softcap is -1.0, must be finite and at least 0, which is none",
    ),
    "splits negative": (
        {"num_splits": lambda x: -1},
        ValueError,
        "num_splits is -1, must be at least 0",
    ),
    "metadata of floats": (
        {"scheduler_metadata": lambda x: torch.zeros(3)},
        TypeError,
        "scheduler_metadata has dtype torch.float32, must be torch.int32",
    ),
    "e5m2": (
        {"k_cache": lambda x: x.to(torch.float8_e5m2)},
        NotImplementedError,
        "k_cache of torch.float8_e5m2 is not there: caches of 8 bits are float8_e4m3fn or int8",
    ),
    "8 bits of K alone": (
        {"k_cache": lambda x: x.to(torch.float8_e4m3fn)},
        TypeError,
        "v_cache has dtype torch.bfloat16, must be torch.float8_e4m3fn like k_cache",
    ),
    "a descale of 16 bits": (
        {"k_descale": lambda x: torch.ones(2, 2)},
        ValueError,
        "k_descale is given, must be None for a cache of torch.bfloat16",
    ),
    "rotated keys of 16 bits": (
        {"incoherent": lambda x: True},
        ValueError,
        "incoherent is True, must be False for a cache of torch.bfloat16",
    ),
    "seed": (
        {"seed": lambda x: 2**64},
        ValueError,
        "seed is 18446744073709551616, must be at least 0 and below 2**64",
    ),
    "out of another shape": (
        {"out": lambda x: torch.empty(8, 4, 32).bfloat16()},
        ValueError,
        "out has shape (8, 4, 32), must be (8, 4, 64)",
    ),
    "gradient of q": (
        {"q": lambda x: x.clone().requires_grad_()},
        NotImplementedError,
        "flash_attn_with_kvcache has no gradient: call it under torch.no_grad()",
    ),
    "gradient of k": (
        {"k": lambda x: x.clone().requires_grad_()},
        NotImplementedError,
        "flash_attn_with_kvcache has no gradient: call it under torch.no_grad()",
    ),
}
# Of contents, which shape inference does not see.
BAD_CONTENTS = {
    "no room": (
        {"cache_seqlens": ints(30, 3)},
        "cache_seqlens[0] is 30, must be at most 28: the cache has 32 rows for a sequence, and 4",
    ),
    "negative": ({"cache_seqlens": ints(3, -1)}, "cache_seqlens[1] is -1, must be from 0 to 32"),
    "no such page": (
        {"page_table": ints([0, 1], [5, -1])},
        "page_table[1, 0] is 5, must be from 0 to below 5, k_cache's pages",
    ),
    "a needed page is -1": (
        {"page_table": ints([0, -1], [3, -1])},
        "page_table[0, 1] is -1, must be from 0 to below 5, k_cache's pages",
    ),
    "beyond the tables": (
        {"rotary_seqlens": ints(47, 0)},
        "rotary_cos has 50 positions, but sequence 0 stands at 47 to 50",
    ),
    "queries that are not there": (
        {"cu_seqlens_q": ints(0, 4, 9)},
        "cu_seqlens_q[2] is 9, must be at most 8, the rows of q",
    ),
    "max_seqlen_q": (
        {"max_seqlen_q": lambda x: 3},
        "max_seqlen_q is 3, must be at least 4, the rows that sequence 0 uses",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("fake", [False, True])
def test_refused(bad, fake):
    changes, error, message = BAD[bad]
    assert call(**good_call()).isfinite().all()
    arguments = changed(good_call(), changes)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode, pytest.raises(error, match=f"^{re.escape(message)}"):
        call(**arguments)


@pytest.mark.parametrize("bad", BAD_CONTENTS)
def test_refused_contents(bad):
    """Nothing of the cache was written then, if it is the cache that is wrong."""
    changes, message = BAD_CONTENTS[bad]
    arguments = changed(good_call(), changes)
    before = arguments["k_cache"].clone()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(**arguments)
    if not {"cu_seqlens_q", "max_seqlen_q"} & set(changes):
        assert torch.equal(arguments["k_cache"].nan_to_num(9.0), before.nan_to_num(9.0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert call(**arguments).shape == (8, 4, 64)


DENSE_BAD = {
    "another batch": (
        {"k_cache": lambda x: x[:1], "v_cache": lambda x: x[:1]},
        "k_cache has batch_cache 1, must be the batch 2 without cache_batch_idx",
    ),
    "no such entry": (
        {"cache_batch_idx": ints(1, 2)},
        "cache_batch_idx[1] is 2, must be from 0 to below 2, k_cache's batch_cache",
    ),
    "batch_idx of another batch": (
        {"cache_batch_idx": ints(1)},
        "cache_batch_idx has shape (1,), must be (batch,) = (2,)",
    ),
    "rank": (
        {"k_cache": lambda x: x[0]},
        "k_cache has shape (25, 2, 64), must have 4 dimensions: ",
    ),
    "leftpad beyond the length": (
        {"cache_leftpad": ints(0, 8)},
        "cache_leftpad[1] is 8, must be from 0 to 7, cache_seqlens",
    ),
}


@pytest.mark.parametrize("bad", DENSE_BAD)
def test_refused_without_pages(bad):
    changes, message = DENSE_BAD[bad]
    assert call(**good_call(None)).isfinite().all()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(**changed(good_call(None), changes))


@pytest.mark.parametrize("page_size", [None, 16])
def test_refused_without_lengths(page_size):
    arguments = good_call(page_size)
    for name in ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens"):
        del arguments[name]
    with pytest.raises(ValueError, match=r"^k_cache has shape \(2, 64\), must have 4 dimensions"):
        call(**{**arguments, "k_cache": arguments["k_cache"][0, 0]})
    with pytest.raises(TypeError, match=r"^page_table is a list, must be a torch\.Tensor"):
        call(**{**arguments, "page_table": [[0, 1], [2, 3]]})
    long = arguments["k_cache"][:, :1].expand(-1, 2**31 // (page_size or 1), -1, -1)
    if page_size is not None:
        arguments["page_table"] = torch.zeros(2, page_size, dtype=torch.int32)
    message = r"^cache_seqlens is None, must be given: the cache has room for 2147483648 rows of a "
    with pytest.raises(ValueError, match=message):
        call(**{**arguments, "k_cache": long, "v_cache": long})


VARLEN_BAD = {
    "no lengths": ({"seqused_k": lambda x: None}, ValueError, "seqused_k is None, must be given"),
    "cu_seqlens_k": (
        {"cu_seqlens_k": ints(0, 20, 23)},
        ValueError,
        "cu_seqlens_k is given, must be None with page_table",
    ),
    "tile_config": (
        {"tile_config": lambda x: "any"},
        ValueError,
        "tile_config is given, must be None with page_table",
    ),
    "seqused_q of another batch": (
        {"seqused_q": ints(1)},
        ValueError,
        "seqused_q has shape (1,), must be (batch,) = (2,)",
    ),
    "seqused_q beyond its slot": (
        {"seqused_q": ints(1, 9)},
        ValueError,
        "seqused_q[1] is 9, must be from 0 to 4, the rows from cu_seqlens_q[1] to cu_seqlens_q[2]",
    ),
    "seqused_q and a tree": (
        {"seqused_q": ints(1, 1), "tree_mask": lambda x: torch.ones(8, dtype=torch.int64)},
        ValueError,
        "tree_mask is given, must be None with seqused_q",
    ),
    "gradient": (
        {"q": lambda x: x.clone().requires_grad_()},
        NotImplementedError,
        "flash_attn_varlen_func has no gradient with page_table: call it under torch.no_grad()",
    ),
    "q no tensor": ({"q": lambda x: "q"}, TypeError, "q is a str, must be a torch.Tensor"),
    "seqused_k a list": (
        {"seqused_k": lambda x: x.tolist()},
        TypeError,
        "seqused_k is a list, must be a torch.Tensor",
    ),
    "seqused_k of another batch": (
        {"seqused_k": lambda x: x[:1]},
        ValueError,
        "seqused_k has shape (1,), must be (batch,) = (2,)",
    ),
}


@pytest.mark.parametrize("bad", VARLEN_BAD)
def test_refused_with_pages(bad):
    changes, error, message = VARLEN_BAD[bad]
    good = good_call()
    arguments = {
        "q": good["q"],
        "k": good["k_cache"],
        "v": good["v_cache"],
        "cu_seqlens_q": good["cu_seqlens_q"],
        "seqused_k": good["cache_seqlens"],
        "page_table": good["page_table"],
    }
    assert flash_attn_varlen_func(**arguments).isfinite().all()
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        flash_attn_varlen_func(**changed(arguments, changes))


def test_refused_appends():
    good = good_call()
    inputs = [good[name] for name in ("k_cache", "v_cache", "k", "v", "cache_seqlens")]
    table = {"page_table": good["page_table"]}
    assert append_kv(*inputs, **table).tolist() == [24, 7]
    with pytest.raises(TypeError, match=r"^k is a NoneType, must be a torch\.Tensor"):
        append_kv(*inputs[:2], None, *inputs[3:], **table)
    with pytest.raises(ValueError, match=r"^k has shape \(2, 4, 2, 64\), must have 3 dimensions"):
        append_kv(*inputs, **table, cu_seqlens_k_new=good["cu_seqlens_q"])
    packed = [x.flatten(0, 1) for x in inputs[2:4]]
    ends = good["cu_seqlens_q"][:2]
    with pytest.raises(ValueError, match=r"^cu_seqlens_k_new has shape \(2,\), must be \(batch \+"):
        append_kv(*inputs[:2], *packed, inputs[4], **table, cu_seqlens_k_new=ends)
    with pytest.raises(NotImplementedError, match=r"^append_kv has no gradient: call it under"):
        append_kv(*inputs[:3], inputs[3].clone().requires_grad_(), inputs[4], **table)


def test_more_new_rows_than_kernels_count():
    with FakeTensorMode():  # needs no GPU
        caches = torch.empty(2, 1, 32, 1, 16, device="cuda", dtype=torch.half)
        table = {"page_table": torch.empty(1, 1, device="cuda", dtype=torch.int32)}
        lengths = torch.empty(1, device="cuda", dtype=torch.int32)
        for rows in (ROWS_LIMIT - 1, ROWS_LIMIT):
            k = torch.empty(1, rows, 1, 16, device="cuda", dtype=torch.half)
            if rows < ROWS_LIMIT:
                append_kv(*caches, k, k, lengths, **table)
                continue
            with pytest.raises(
                ValueError, match=r"^k has shape .*, must have fewer rows than 2\^31"
            ):
                append_kv(*caches, k, k, lengths, **table)


@pytest.mark.parametrize("key_heads", [0, 2])
def test_no_heads(key_heads):
    q, k = torch.zeros(2, 3, 0, 16), torch.zeros(2, 3, key_heads, 16)
    caches = torch.zeros(2, 2, 32, key_heads, 16)
    rotary = {"rotary_cos": torch.ones(40, 8), "rotary_sin": torch.zeros(40, 8)}
    out, lse = call(
        q, *caches, k, k, cache_seqlens=3, **rotary, causal=True, return_softmax_lse=True
    )
    assert (out.shape, lse.shape) == ((2, 3, 0, 16), (2, 0, 3))


def test_inputs_but_the_caches_are_not_written():
    arguments = good_call()
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    copies = {name: x.nan_to_num(9.0) for name, x in tensors.items()}
    call(**arguments, causal=True)
    for name, x in tensors.items():
        same = torch.equal(x.nan_to_num(9.0), copies[name])
        assert same == (not name.endswith("_cache")), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"q": lambda x: torch.stack([x, x], -1)[..., 0]},
            "q has strides (512, 128, 2), its last dimension (head_dim) must be contiguous",
        ),
        ({"softcap": lambda x: 1e39}, "softcap is 1e+39, must be at most 3.4"),
        (
            {"k_cache": lambda x: x[:, :0], "v_cache": lambda x: x[:, :0]},
            "k_cache has page_size 0, must be at least 1",
        ),
        (
            {"page_table": lambda x: x[:1]},
            "page_table has shape (1, 2), must be (batch, max_pages) with batch 2",
        ),
    ],
)
def test_refused_on_each_device(device, changes, message):
    """The CUDA implementation asks on its own."""
    new = ("k", "v", "rotary_cos", "rotary_sin")
    arguments = {name: x.to(device) for name, x in good_call().items() if name not in new}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(**changed(arguments, changes))
