"""What is no argument is refused, by every function, in the same words and by the name that it has
there; no gradient is dropped in silence. On the CPU."""

import pytest
import torch

from cute_kernels import (
    append_kv,
    flash_attn_combine,
    flash_attn_fp8_func,
    flash_attn_fp8_varlen_func,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    quantize_fp8,
)

E4M3 = torch.float8_e4m3fn


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


STARTS_Q, STARTS_K = ints(0, 4, 10), ints(0, 5, 12)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def of_packed(dtype=torch.float32):
    return [normal(rows, heads, 16, dtype=dtype) for rows, heads in ((10, 4), (12, 2), (12, 2))]


def of_batch(dtype=torch.float32):
    return [normal(2, rows, heads, 16, dtype=dtype) for rows, heads in ((5, 4), (7, 2), (7, 2))]


def dense(dtype=torch.float32, **options):
    return flash_attn_func(*of_batch(dtype), **options)


def packed(dtype=torch.float32, **options):
    return flash_attn_varlen_func(*of_packed(dtype), STARTS_Q, STARTS_K, **options)


def pages(**options):
    k = normal(6, 4, 2, 16)
    places = {"seqused_k": ints(5, 12), "page_table": torch.arange(6).int().view(2, 3)}
    given = {"q": of_packed()[0], "k": k, "v": k, "cu_seqlens_q": STARTS_Q, **places, **options}
    return flash_attn_varlen_func(**given)


def cache(dtype=torch.float32, **options):
    q = normal(2, 3, 4, 16, dtype=torch.bfloat16 if dtype in (E4M3, torch.int8) else dtype)
    caches = {"k_cache": normal(2, 20, 2, 16).to(dtype), "v_cache": normal(2, 20, 2, 16).to(dtype)}
    return flash_attn_with_kvcache(**{"q": q, **caches, "cache_seqlens": ints(5, 12), **options})


def new_rows(**options):
    k, v = normal(2, 2, 3, 2, 16)
    return cache(**{"k": k, "v": v, **options})


def qkv_packed(**options):
    given = {"qkv": normal(10, 3, 4, 16), "cu_seqlens": STARTS_Q, **options}
    return flash_attn_varlen_qkvpacked_func(**given)


FUNCTIONS = {
    "dense": dense,
    "packed": packed,
    "pages": pages,
    "cache": cache,
    "qkvpacked": lambda **options: flash_attn_qkvpacked_func(normal(2, 5, 3, 4, 16), **options),
    "packed qkvpacked": qkv_packed,
    "8 bits": lambda **options: flash_attn_fp8_func(*of_batch(torch.bfloat16), **options),
    "packed 8 bits": lambda **options: flash_attn_fp8_varlen_func(
        *of_packed(torch.bfloat16), STARTS_Q, STARTS_K, **options
    ),
    "e4m3": lambda **options: dense(E4M3, **options),
    "packed e4m3": lambda **options: packed(E4M3, **options),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_flag_is_true_or_false(function):
    call = FUNCTIONS[function]
    for flag in (None, 1.0, "yes", torch.tensor(True)):
        with pytest.raises(TypeError, match=r"^causal is .*, must be True or False$"):
            call(causal=flag)
    assert torch.equal(call(causal=1), call(causal=True))
    numpy = pytest.importorskip("numpy")
    assert torch.equal(call(causal=numpy.bool_(True), window_size=(3, 3)), call(window_size=(3, 0)))


@pytest.mark.parametrize("call", [dense, packed, pages, qkv_packed])
def test_deterministic_is_true_or_false(call):
    with pytest.raises(TypeError, match=r"^deterministic is None, must be True or False$"):
        call(deterministic=None)


@pytest.mark.parametrize(
    "of_rotary", [{}, {"rotary_cos": normal(60, 8), "rotary_sin": normal(60, 8)}]
)
def test_rotary_interleaved_is_true_or_false(of_rotary):
    with pytest.raises(TypeError, match=r"^rotary_interleaved is None, must be True or False$"):
        new_rows(**of_rotary, rotary_interleaved=None)
    k, v = normal(2, 2, 20, 2, 16)
    with pytest.raises(TypeError, match=r"^rotary_interleaved is None, must be True or False$"):
        append_kv(k, v, k[:, :3], v[:, :3], ints(5, 12), **of_rotary, rotary_interleaved=None)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_number_is_no_tensor(function, requires_grad):
    """To read it would wait for a GPU, and drop its gradient."""
    scale = torch.tensor(0.5, requires_grad=requires_grad)
    with pytest.raises(TypeError, match=r"^softmax_scale is tensor\(.*\), must be a number$"):
        FUNCTIONS[function](softmax_scale=scale)


@pytest.mark.parametrize("call", [dense, packed, pages, cache])
def test_a_softcap_is_no_tensor(call):
    with pytest.raises(TypeError, match=r"^softcap is tensor\(.*\), must be a number$"):
        call(softcap=torch.tensor(3.0))


NO_GRADIENT = {
    "e4m3's q_descale": (dense, {"dtype": E4M3, "q_descale": torch.ones(2, 2)}),
    "packed e4m3's v_descale": (packed, {"dtype": E4M3, "v_descale": torch.ones(2, 2)}),
    "rotary_cos": (new_rows, {"rotary_cos": normal(60, 8), "rotary_sin": normal(60, 8)}),
    "a cache's k_descale": (cache, {"dtype": E4M3, "k_descale": torch.ones(2, 2)}),
    "a cache's k_scales": (cache, {"dtype": torch.int8, "k_scales": torch.ones(2, 20, 2)}),
    "a cache's out": (cache, {"out": torch.zeros(2, 3, 4, 16)}),
    "a combination's out": (
        lambda out: flash_attn_combine(normal(3, 2, 5, 4, 16), normal(3, 2, 5, 4), out),
        {"out": torch.zeros(2, 5, 4, 16)},
    ),
    "pages' k_descale": (pages, {"k_descale": torch.ones(2, 2)}),
    "k_descale of an append": (
        lambda **options: append_kv(
            *normal(2, 2, 20, 2, 16).to(torch.int8), *normal(2, 2, 3, 2, 16), ints(5, 12), **options
        ),
        {"k_descale": torch.ones(2, 2)},
    ),
}


@pytest.mark.parametrize("case", NO_GRADIENT)
def test_no_gradient_is_dropped(case):
    call, options = NO_GRADIENT[case]
    needing = {
        name: x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x
        for name, x in options.items()
    }
    with pytest.raises(NotImplementedError, match="has no gradient"):
        call(**needing)
    if "pages" not in case:  # whose caches have no factors here
        call(**options)
        with torch.no_grad():
            call(**needing)


NAMED = {
    "seqused_k too large": (pages, {"seqused_k": ints(5, 13)}, r"^seqused_k\[1\] is 13, "),
    "of unused rows": (
        pages,
        {"seqused_k": ints(5, 13), "seqused_q": ints(4, 6)},
        r"^seqused_k\[1\] is 13, ",
    ),
    "a page": (
        pages,
        {"page_table": ints(0, 1, 2, 3, 4, 6)[None].view(2, 3), "seqused_q": ints(4, 6)},
        r"^page_table\[1, 2\] is 6, must be from 0 to below 6, k's pages",
    ),
    "k of pages": (pages, {"k": normal(6, 4, 2, 8)}, "^k has head_dim 8, must be 16 like q"),
    "v of pages": (pages, {"v": normal(3, 4, 2, 16)}, r"^v has shape .* like k but for head_dim"),
    "cu_seqlens": (qkv_packed, {"cu_seqlens": STARTS_Q.long()}, "^cu_seqlens has dtype"),
    "no cu_seqlens": (qkv_packed, {"cu_seqlens": None}, "^cu_seqlens is a NoneType"),
    "cu_seqlens[0]": (qkv_packed, {"cu_seqlens": ints(1, 10)}, r"^cu_seqlens\[0\] is 1, "),
    "max_seqlen": (qkv_packed, {"max_seqlen": 5}, "^max_seqlen is 5, must be at least 6"),
    "cu_seqlens_k_new": (
        new_rows,
        {"k": normal(6, 2, 16), "v": normal(6, 2, 16), "cu_seqlens_k_new": ints(0, 3, 7)},
        r"^cu_seqlens_k_new\[2\] is 7, must be at most 6, the rows of k$",
    ),
    "k_scales": (cache, {"k_scales": torch.ones(2, 20, 2)}, "^k_scales is given, must be None for"),
    "v_scales": (
        cache,
        {"dtype": torch.int8, "v_scales": torch.ones(2, 2)},
        r"^v_scales has shape \(2, 2\), must be \(2, 20, 2\)",
    ),
    "out": (cache, {"out": torch.zeros(2, 3, 4, 8)}, r"^out has shape \(2, 3, 4, 8\), must be \(2"),
    "qv": (cache, {"qv": normal(2, 3, 4, 24)}, r"^qv has shape \(2, 3, 4, 24\), must be \(2, 3, 4"),
    "descale": (dense, {"dtype": E4M3, "q_descale": 1.0}, "^q_descale is a float, must be a torch"),
    "packed descale": (packed, {"dtype": E4M3, "v_descale": [1.0]}, "^v_descale is a list, must"),
    "k of 8 bits without heads": (
        lambda **given: flash_attn_fp8_func(normal(2, 5, 4, 16), **given),
        {"k": normal(2, 7, 0, 16), "v": normal(2, 7, 0, 16)},
        "^q has 4 heads, must be a multiple of k's 0",
    ),
    "a sparse q of 8 bits": (
        lambda **given: flash_attn_fp8_func(**given, k=normal(2, 5, 4, 16), v=normal(2, 5, 4, 16)),
        {"q": normal(2, 5, 4, 16).to_sparse()},
        "^q has layout torch.sparse_coo, must be",
    ),
    "chunks of a dense k of 8 bits": (
        lambda k: flash_attn_fp8_varlen_func(
            of_packed()[0], k, k, STARTS_Q, STARTS_K, attention_chunk=2
        ),
        {"k": normal(1, 12, 2, 16)},
        r"^k has shape \(1, 12, 2, 16\), must have 3 dimensions",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_the_callers_name(case):
    call, options, message = NAMED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call(**options)


def test_seeds_of_numpy_have_64_bits():
    numpy = pytest.importorskip("numpy")
    x = normal(1, 5, 2, 16)
    for seed in (2**63 + 5, 2**64 - 1):
        given = quantize_fp8(x, incoherent=True, seed=numpy.uint64(seed))
        assert torch.equal(
            given.data.float(), quantize_fp8(x, incoherent=True, seed=seed).data.float()
        )
