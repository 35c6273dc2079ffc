"""FlashAttention's modules on our kernels: public functions of version 3, names and order of their
arguments, and what is refused."""

import inspect

import pytest
import torch
from flash_attention_calls import inputs_of

import cute_kernels
from cute_kernels import compat
from cute_kernels.compat import flash_attn as fa2
from cute_kernels.compat import flash_attn_interface as fa3


def test_flash_attention_3_has_our_names():
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        theirs, ours = (
            inspect.signature(getattr(module, name)).parameters for module in (fa3, cute_kernels)
        )
        assert [p for p in theirs if p != "s_aux"] == list(ours)
        assert theirs["s_aux"].default is None
    assert set(fa3.__all__) <= set(vars(fa3))


def test_the_positional_order_is_flash_attention_3s():
    """As its callers rely on it."""
    expected = {
        "flash_attn_func": "q k v softmax_scale causal qv q_descale k_descale v_descale "
        "window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin "
        "return_attn_probs",
        "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
        "seqused_q seqused_k softmax_scale causal qv q_descale k_descale v_descale window_size "
        "attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
        "_flash_attn_backward": "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q "
        "sequed_k max_seqlen_q max_seqlen_k dq dk dv softmax_scale is_causal window_size_left "
        "window_size_right softcap deterministic sm_margin",
        "_flash_attn_forward": "q k v k_new v_new qv out_ cu_seqlens_q cu_seqlens_k "
        "cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k page_table kv_batch_idx "
        "leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale "
        "softmax_scale causal window_size_left window_size_right attention_chunk softcap "
        "rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin",
    }
    for name, order in expected.items():
        parameters = inspect.signature(getattr(fa3, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == order.split()


def test_tensors_without_a_contiguous_last_dimension(device):
    q, k, v = inputs_of(device)
    apart = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in apart)
    for function in (fa3.flash_attn_func, fa2.flash_attn_func):
        assert torch.equal(function(*apart), cute_kernels.flash_attn_func(q, k, v))
        named = dict(zip("qkv", apart, strict=True))
        assert torch.equal(function(**named), cute_kernels.flash_attn_func(q, k, v))
    with pytest.raises(TypeError, match="k is a int"):
        fa3.flash_attn_func(q, 3, v)


def strided(x):
    """The same numbers, no two of a row side by side."""
    return torch.stack([x, x + 1], -1)[..., 0]


@pytest.mark.parametrize("module", [fa2, fa3])
def test_all_but_caches_may_be_strided(module):
    q, k, v = inputs_of("cpu", batch=2, seqlen_q=1, seqlen_k=1)
    lengths, table = (torch.tensor(x, dtype=torch.int32) for x in ([3, 18], [[1, 0], [2, 3]]))
    rotary = torch.ones(40, 16)
    results = []
    for change in (lambda x: x, strided):
        caches = torch.zeros(2, 4, 16, *k.shape[2:])
        named = {"cache_seqlens": lengths, "page_table": table}
        if module is fa2:
            named["block_table"] = named.pop("page_table")
        else:
            named.update(rotary_cos=rotary, rotary_sin=rotary)
        named = {name: change(x) for name, x in named.items()}
        given = (change(q), *caches, change(k), change(v))
        results.append((module.flash_attn_with_kvcache(*given, **named), caches))
    for plain, apart in zip(*results, strict=True):
        assert plain.any()
        assert torch.equal(plain, apart)


@pytest.mark.parametrize("module", [fa2, fa3])
def test_what_a_cache_has_no_gradient_of_is_told_of_in_the_backward_pass(module):
    """FlashAttention's own tests call so, and never go back."""
    q = torch.randn(2, 3, 4, 16, requires_grad=True)
    cache = torch.randn(2, 8, 2, 16)
    lengths, table, starts, of_keys = (
        torch.tensor(x, dtype=torch.int32) for x in ([5, 8], [[0], [1]], [0, 3, 6], [0, 5, 13])
    )
    calls = [lambda: module.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths)]
    if module is fa2:
        packed = (q.flatten(0, 1), cache, cache, starts, of_keys, 3, 8)
        calls.append(lambda: fa2.flash_attn_varlen_func(*packed, block_table=table))
    else:
        options = {"seqused_k": lengths, "page_table": table}
        calls.append(lambda: fa3._flash_attn_forward(q, cache, cache, **options)[0])
    for call in calls:
        with torch.no_grad():
            right = call()
        out = call()
        assert torch.equal(out, right)
        with pytest.raises(NotImplementedError, match="no gradient of a call with a cache"):
            out.sum().backward()


@pytest.mark.parametrize("form", ["apart", "by name", "packed", "qkv"])
def test_a_gradient_in_fp8_is_told_of_in_the_backward_pass(form):
    """As of a projection's output that is rounded: FlashAttention's own tests call so, too."""
    qkv = torch.randn(2, 5, 3, 4, 16).to(torch.float8_e4m3fn)
    ends = torch.tensor([0, 5, 10], dtype=torch.int32)
    calls = {
        "apart": lambda x: fa3.flash_attn_func(*x.unbind(2), causal=True),
        "by name": lambda x: fa3.flash_attn_func(**dict(zip("qkv", x.unbind(2), strict=True))),
        "packed": lambda x: fa3.flash_attn_varlen_func(
            *x.flatten(0, 1).unbind(1), ends, ends, 5, 5, softmax_scale=0.3
        ),
        "qkv": lambda x: fa3.flash_attn_qkvpacked_func(x, causal=True),
    }
    call = calls[form]
    right = call(qkv)
    assert right.dtype == torch.bfloat16 and right.any()
    out = call(qkv.requires_grad_())
    assert torch.equal(out, right)
    with pytest.raises(NotImplementedError, match=r"has no gradient of a call .* in FP8"):
        out.sum().backward()
    with torch.no_grad():
        assert not call(qkv).requires_grad


def test_packed_tensors_of_flash_attention_3_may_be_strided():
    qkv = torch.stack(inputs_of("cpu", seqlen_q=47, key_heads=4), 2)
    right = cute_kernels.flash_attn_qkvpacked_func(qkv)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(strided(qkv)), right)
    q, k, v = qkv[0].unbind(1)
    starts = torch.tensor([0, 9, 47], dtype=torch.int32)
    right = cute_kernels.flash_attn_varlen_func(q, k, v, starts, starts)
    assert torch.equal(fa3.flash_attn_varlen_func(q, k, v, *[strided(starts)] * 2, 47, 47), right)


def test_sinks_are_never_dropped():
    """transformers passes s_aux where a signature has it."""
    q, k, v = inputs_of("cpu")
    sinks = torch.randn(4)
    expected = cute_kernels.flash_attn_func(q, k, v, sinks=sinks)
    assert torch.equal(fa3.flash_attn_func(q, k, v, s_aux=sinks), expected)
    assert not torch.equal(expected, cute_kernels.flash_attn_func(q, k, v))


def test_lengths_of_the_longest_may_be_tensors():
    """As many callers have them, of a batch that is on the GPU: FlashAttention waits for it."""
    starts = torch.tensor([0, 7, 20], dtype=torch.int32)
    longest = starts.diff().max()
    q, k, v = torch.randn(3, 20, 2, 16)
    expected = cute_kernels.flash_attn_varlen_func(q, k, v, starts, starts, causal=True)
    call = (q, k, v, starts, starts)
    for module in (fa2, fa3):
        given = module.flash_attn_varlen_func(*call, longest, longest, causal=True)
        assert torch.equal(given, expected)
        by_name = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        assert torch.equal(module.flash_attn_varlen_func(*call, **by_name, causal=True), expected)
    qkv = torch.stack([q, k, v], 1)
    given = fa2.flash_attn_varlen_qkvpacked_func(qkv, starts, longest, causal=True)
    assert torch.equal(given, expected)
    caches, rotary = torch.randn(2, 2, 32, 2, 16), torch.ones(40, 8)
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    new = {"k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16), "rotary_seqlens": lengths}
    options = {"rotary_cos": rotary, "rotary_sin": rotary, "cu_seqlens_q": starts, **new}
    results = [
        fa3.flash_attn_with_kvcache(
            q, *caches.clone(), cache_seqlens=lengths, max_seqlen_q=number, **options
        )
        for number in (13, longest)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: fa2.flash_attn_interface._flash_attn_forward(x, x, x, 0.1, None, False),
            NotImplementedError,
            "dropout_p is 0.1, must be 0 here; flash_attn_func takes it",
        ),
        (
            lambda x: fa2.flash_attn_with_kvcache(x, x, x, alibi_slopes=torch.ones(4)),
            NotImplementedError,
            "alibi_slopes is given, must be None here",
        ),
        (
            lambda x: fa2.flash_attn_func(x, x, x, alibi_slopes=torch.ones(4), softcap=-1.0),
            ValueError,
            "softcap is -1.0, must be finite and at least 0",
        ),
        (
            lambda x: fa2.flash_attn_func(x, x, x, alibi_slopes=torch.ones(())),
            ValueError,
            r"alibi_slopes has shape \(\), must be \(heads,\) or \(batch, heads\)",
        ),
        (lambda x: fa2.flash_attn_qkvpacked_func(x), ValueError, r"qkv has shape .*3, heads"),
        (
            lambda x: fa3._flash_attn_backward(x, x, x, x, x, x[..., 0], dq=x, dk=x),
            ValueError,
            "dv is None",
        ),
        (
            lambda x: fa3._flash_attn_backward(x, x, x, x, x, x[..., 0], dq=x[:1], dk=x, dv=x),
            ValueError,
            r"dq has shape .*like q",
        ),
        (lambda x: compat.install([4]), ValueError, "versions has 4"),
        (
            lambda x: fa3._flash_attn_forward(x, x, x, x, x, seqused_q=torch.ones(1).int()),
            NotImplementedError,
            "seqused_q is given, must be None with a cache",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 8, 4, 64))
