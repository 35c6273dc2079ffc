"""What surrounds a call in PyTorch and may not change what it gives: default dtype and device,
autocast, meta tensors, compilers whose numbers are symbols, another process. On the CPU."""

import contextlib
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cute_kernels import (
    BlockMask,
    Variant,
    append_kv,
    flash_attn_combine,
    flash_attn_fp8_func,
    flash_attn_fp8_varlen_func,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    parts,
    quantize_fp8,
    variants,
)
from cute_kernels.fp8 import GPU_BUILT, rotate
from cute_kernels.fp8.rotation import norm_of

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, KEY_HEADS, HEAD_DIM = 2, 10, 12, 4, 2, 16
E4M3 = torch.float8_e4m3fn


def tensors() -> dict[str, torch.Tensor]:
    """Of all calls below, the same every time, whatever the default dtype and device are."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float32, device="cpu")

    def ints(*numbers):
        return torch.tensor(numbers, dtype=torch.int32, device="cpu")

    k_cache, v_cache = normal(2, BATCH, 32, KEY_HEADS, HEAD_DIM)
    return {
        "q": normal(BATCH, SEQLEN_Q, HEADS, HEAD_DIM),
        "k": normal(BATCH, SEQLEN_K, KEY_HEADS, HEAD_DIM),
        "v": normal(BATCH, SEQLEN_K, KEY_HEADS, HEAD_DIM),
        "cu_q": ints(0, 7, 20),
        "cu_k": ints(0, 12, 24),
        "lengths": ints(3, 9),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "table": ints(0, 1, 2, 3).view(2, 2),
        "cos": normal(60, 8),
        "sin": normal(60, 8),
        "sinks": normal(HEADS),
        "slopes": normal(HEADS),
        "state": torch.tensor([3, 5], device="cpu"),
    }


def packed(x):
    return tuple(x[name].flatten(0, 1) for name in "qkv")


def eight_bits(x):
    return tuple(x[name].to(E4M3) for name in "qkv")


def from_cache(x, dtype, **options):
    q, k, v = (x[name][:, :2].to(torch.bfloat16) for name in "qkv")
    k_cache, v_cache = (x[name].to(dtype) for name in ("k_cache", "v_cache"))
    if dtype != torch.bfloat16:
        scales = torch.zeros(2, *k_cache.shape[:-1], dtype=torch.float32, device=q.device)
        options |= {"k_scales": scales[0], "v_scales": scales[1], "incoherent": True}
    rotary = {"rotary_cos": x["cos"], "rotary_sin": x["sin"]}
    new = {"k": k, "v": v, "cache_seqlens": x["lengths"]}
    return flash_attn_with_kvcache(q, k_cache, v_cache, **new, **rotary, causal=True, **options)


def from_pages(x):
    q = x["q"].flatten(0, 1)
    k, v = (x[name].reshape(4, 16, KEY_HEADS, HEAD_DIM) for name in ("k_cache", "v_cache"))
    places = {"seqused_k": x["lengths"], "page_table": x["table"]}
    return flash_attn_varlen_func(q, k, v, x["cu_q"], **places, causal=True, attention_chunk=4)


def latent(x):
    q, qv = x["q"], x["q"].repeat(1, 1, 1, 4)
    k_cache, v_cache = x["k_cache"], x["v_cache"].repeat(1, 1, 1, 4)
    return flash_attn_with_kvcache(q, k_cache, v_cache, qv=qv, cache_seqlens=x["lengths"])


def in_blocks(x):
    variant = variants.dilated(3, 2)
    sizes = (BATCH, HEADS, SEQLEN_Q, SEQLEN_K)
    block_mask = BlockMask.from_mask(variant, *sizes, device=x["q"].device)
    call = (x["q"], x["k"], x["v"])
    return flash_attn_func(*call, variant=variant, block_mask=block_mask, return_lse=True)


def appended(x):
    caches = x["k_cache"].clone(), x["v_cache"].clone()
    return append_kv(*caches, x["k"], x["v"], x["lengths"]), *caches


def quantised(x):
    q = quantize_fp8(x["q"], incoherent=True)
    k = quantize_fp8(x["k"], incoherent=True, smooth=True)
    return flash_attn_fp8_func(q, k, quantize_fp8(x["v"], block=None))


DENSE = {
    "dense": {"window_size": (5, 0), "softcap": 3.0},
    "chunks": {"causal": True, "attention_chunk": 4},
}
CALLS = {
    **{
        name: lambda x, options=options: flash_attn_func(
            x["q"], x["k"], x["v"], sinks=x["sinks"], return_lse=True, **options
        )
        for name, options in DENSE.items()
    },
    **{
        f"packed {name}": lambda x, options=options: flash_attn_varlen_func(
            *packed(x), x["cu_q"], x["cu_k"], return_lse=True, **options
        )
        for name, options in DENSE.items()
    },
    "alibi": lambda x: flash_attn_func(
        x["q"], x["k"], x["v"], causal=True, variant=variants.alibi(x["slopes"])
    ),
    "dropout": lambda x: flash_attn_func(
        x["q"], x["k"], x["v"], variant=variants.dropout(0.3, x["state"])
    ),
    "packed alibi": lambda x: flash_attn_varlen_func(
        *packed(x), x["cu_q"], x["cu_k"], variant=variants.alibi(x["slopes"])
    ),
    "cache": lambda x: from_cache(x, torch.bfloat16),
    "cache of int8": lambda x: from_cache(x, torch.int8),
    "cache of e4m3": lambda x: from_cache(x, E4M3, attention_chunk=8),
    "pages": from_pages,
    "latent": latent,
    "block mask": in_blocks,
    "append": appended,
    "8 bits": lambda x: flash_attn_fp8_func(x["q"], x["k"], x["v"], return_lse=True),
    "packed 8 bits": lambda x: flash_attn_fp8_varlen_func(
        *(y.bfloat16() for y in packed(x)), x["cu_q"], x["cu_k"], causal=True, attention_chunk=4
    ),
    "quantised": quantised,
    "e4m3": lambda x: flash_attn_func(*eight_bits(x), causal=True, return_lse=True),
    "packed e4m3": lambda x: flash_attn_varlen_func(
        *(y.flatten(0, 1) for y in eight_bits(x)), x["cu_q"], x["cu_k"], attention_chunk=4
    ),
    "combine": lambda x: flash_attn_combine(x["q"][None], x["q"][None, ..., 0].contiguous()),
    "part": lambda x: parts.attend_part(x["q"], x["k"], x["v"], 0.3, parts.Mask(4, 0, 1)),
}


def results(call, x, gradients=True):
    """Those of a call, and the gradients of q, k and v if it has them."""
    x = {name: y.detach().clone() for name, y in x.items()}
    with_gradients = gradients and call in (CALLS[name] for name in DIFFERENTIABLE)
    of = [x[name].requires_grad_(with_gradients) for name in "qkv"]
    given = call(x)
    given = given if isinstance(given, tuple) else (given,)
    if not with_gradients:
        return given
    return *given, *torch.autograd.grad(given[0].sum(), of)


DIFFERENTIABLE = [name for name in CALLS if name.startswith(("dense", "chunks", "packed d"))]
DIFFERENTIABLE += ["packed chunks", "alibi", "dropout", "packed alibi", "block mask"]


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on(name, surroundings):
    expected = results(CALLS[name], tensors())
    x = tensors()
    with SURROUNDINGS[surroundings]():
        given = results(CALLS[name], x)
    for a, b in zip(given, expected, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_have_shapes(name):
    expected = results(CALLS[name], tensors())
    given = results(CALLS[name], {key: x.to("meta") for key, x in tensors().items()})
    for a, b in zip(given, expected, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "meta")


@pytest.mark.parametrize(
    "name",
    ["dense", "chunks", "packed chunks", "alibi", "cache of e4m3", "pages", "e4m3", "packed e4m3"],
)
def test_compilers_may_have_symbols_for_sizes(name):
    """All of them, as `dynamic=True` has it, the defaults that are made of them included."""
    if name == "packed e4m3" and not GPU_BUILT:
        pytest.skip("this build has no FP8 operators, without which lengths are read in the graph")
    torch.compiler.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=True, backend="eager")
    x = tensors()
    expected = results(CALLS[name], x, gradients=False)
    for a, b in zip(results(compiled, x, gradients=False), expected, strict=True):
        assert torch.equal(a, b)


def test_a_rotation_may_have_a_symbol_for_its_head_dim():
    """Of which the norm is made: AOTAutograd turns floats made of symbols into tensors."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: rotate(x, 3), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    x = tensors()["q"]
    torch.testing.assert_close(compiled(x), rotate(x, 3), rtol=1e-6, atol=1e-6)
    assert [norm_of(n) for n in (16, 48, 256)] == [0.25, 0.25, 0.0625]


READY = {
    "alibi": lambda x: variants.alibi(x["slopes"]),
    "bias": lambda x: variants.bias(x["k"][0, :10, 0, :12]),
    "document": lambda x: variants.document(
        torch.arange(12, dtype=torch.int32).div(5).int().expand(2, 12)
    ),
    "prefix_lm": lambda x: variants.prefix_lm(x["lengths"]),
    "dilated": lambda x: variants.dilated(3, 2),
    "softcap": lambda x: variants.softcap(2.0),
    "dropout": lambda x: variants.dropout(0.3, x["state"]),
}


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_variants_can_be_copied(name, copied):
    """Models that hold one are, and are sent to other processes."""
    x = tensors()
    variant = READY[name](x)
    expected = flash_attn_func(x["q"], x["k"], x["v"], variant=variant)
    assert not torch.equal(expected, flash_attn_func(x["q"], x["k"], x["v"]))
    assert torch.equal(flash_attn_func(x["q"], x["k"], x["v"], variant=copied(variant)), expected)


def half(score):
    return score * 0.5


def test_another_process_knows_the_hooks_of_a_variant_that_it_is_sent():
    sent = pickle.dumps(Variant("halved", score="return 0.5f * score;", score_python=half))
    code = (
        "import pickle, sys\n"
        "from cute_kernels.compile.hooks import KNOWN\n"
        "variant = pickle.loads(sys.stdin.buffer.read())\n"
        "for block_mask in (False, True):\n"
        "    hooks = KNOWN[variant.hooks_of(block_mask).key]\n"
        "    assert hooks.score == 'return 0.5f * score;' and hooks.block_mask == block_mask\n"
    )
    subprocess.run([sys.executable, "-c", code], input=sent, check=True, cwd=Path(__file__).parent)


def test_numbers_may_be_numpys():
    """What lengths that were made with it have."""
    numpy = pytest.importorskip("numpy")
    x = tensors()
    n, lengths = numpy.int64, (x["cu_q"], x["cu_k"])
    q, k, v = (x[name] for name in "qkv")
    qkv = torch.cat([q, k[:, :10], v[:, :10]], 2)
    caches = (x["k_cache"], x["v_cache"])
    for call in (
        lambda n: flash_attn_func(q, k, v, window_size=(n(3), n(0))),
        lambda n: flash_attn_func(q, k, v, attention_chunk=n(4), sm_margin=n(2)),
        lambda n: flash_attn_func(q, k, v, variant=variants.dilated(n(3), n(2))),
        lambda n: flash_attn_varlen_func(*packed(x), *lengths, n(13), n(12), num_splits=n(2)),
        lambda n: flash_attn_qkvpacked_func(qkv, num_heads_q=n(4)),
        lambda n: flash_attn_with_kvcache(q, *caches, cache_seqlens=n(20), num_splits=n(2)),
        lambda n: flash_attn_fp8_func(q, k, v, seed=n(5)),
        lambda n: quantize_fp8(q, block=n(32)).data,
    ):
        assert torch.equal(call(n), call(int))
    assert variants.softcap(numpy.float32(2.0)).numbers == [2.0]
    with pytest.raises(ValueError, match=r"^attention_chunk is -1, must be at least 0$"):
        flash_attn_func(q, k, v, attention_chunk=n(-1))
