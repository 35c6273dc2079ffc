"""PyTorch's flash attention operators on this package's kernels: what they are given and give back,
on the CPU, and the dispatcher, whose CPU key stands in for CUDA's. The GPU has a file of its own:
test_integrations_torch_gpu.py."""

import dataclasses
import random

import pytest
import torch
from packed import Packed, assert_packed_right, random_grads, random_packed
from parity import assert_gradients_right, assert_right, random_qkv
from ring import run_ring
from torch.nn import attention

from cute_kernels.integrations import aten, torch_choice
from cute_kernels.integrations import torch as integration

if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
    pytest.skip("needs the registry of torch 2.11 or newer", allow_module_level=True)

SDPA = torch.ops.aten._scaled_dot_product_flash_attention
SDPA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
FLASH = torch.ops.aten._flash_attention_forward
FLASH_BACKWARD = torch.ops.aten._flash_attention_backward


@pytest.fixture
def overridden():
    """The operators have this package's kernels on the CPU, where PyTorch has none."""
    overrides = integration.Overrides("CPU")
    yield
    overrides.remove()


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def layouts(x):
    """(batch, heads, seqlen, head_dim) of other strides: from the sequence outside of the heads, of
    heads outside of the sequence, and of one tensor with something else."""
    wide = torch.stack([x, x], dim=3).transpose(1, 2)
    return {"views": x, "contiguous": x.contiguous(), "parts": wide[:, :, :, 0].transpose(1, 2)}


def form(tensor):
    if not isinstance(tensor, torch.Tensor):
        return tensor
    empty = tensor.numel() == 0  # then, and of a size of 1, nothing uses a stride
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    strides = [] if empty else [stride for size, stride in strides if size > 1]
    return tensor.shape, tensor.dtype, strides


def on_meta(inputs):
    """Of other strides than meta's own `to` would keep."""

    def moved(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    return [moved(x) if isinstance(x, torch.Tensor) else x for x in inputs]


def assert_form_inferred(operator, inputs, results, **options):
    """Shapes, dtypes and strides are those that PyTorch tells compilers."""
    inferred = operator(*on_meta(inputs), **options)
    assert [form(x) for x in results] == [form(x) for x in inferred]


@pytest.mark.parametrize("layout", ["views", "contiguous", "parts"])
@pytest.mark.parametrize(
    ("seqlens", "heads", "head_dim", "causal"),
    [
        ((70, 70), (4, 2), 64, True),
        ((33, 129), (2, 2), 40, False),
        ((33, 129), (4, 1), 16, True),  # bottom-right, as CausalBias asks for it
        ((129, 33), (2, 1), 8, True),
        ((1, 1), (2, 2), 16, True),
        ((1, 90), (3, 3), 256, False),
    ],
)
def test_dense(seqlens, heads, head_dim, causal, layout):
    q, k, v = random_qkv("cpu", torch.float32, 2, *seqlens, *heads, head_dim)
    inputs = [layouts(x)[layout] for x in heads_first(q, k, v)]
    arguments = (*inputs, 0.0, causal, False)
    results = aten.scaled_dot_product_flash_attention(*arguments, scale=0.3)
    assert_form_inferred(SDPA, arguments, results, scale=0.3)
    out, lse, cum_q, cum_k, max_q, max_k, *placeholders = results
    assert (cum_q, cum_k, max_q, max_k) == (None, None, *seqlens)
    assert_right(out.transpose(1, 2), lse, q, k, v, 0.3, causal)

    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    lengths = (None, None, max_q, max_k, 0.0, causal, *placeholders[:2])
    arguments = (layouts(grad_out.transpose(1, 2))[layout], *inputs, out, lse, *lengths)
    grads = aten.scaled_dot_product_flash_attention_backward(*arguments, scale=0.3)
    assert_form_inferred(SDPA_BACKWARD, arguments, grads, scale=0.3)
    assert_gradients_right(heads_first(*grads), grad_out, None, q, k, v, 0.3, causal)


@pytest.mark.parametrize("expanded", [(1, 1, 1, 1), (2, 4, 9, 1)], ids=str)
def test_gradients_of_sums(expanded):
    """They are expanded: the last dimension has stride 0."""
    q, k, v = random_qkv("cpu", torch.float32, 2, 9, 9, 4, head_dim=16)
    inputs = heads_first(q, k, v)
    grad_out = torch.randn(expanded).expand(2, 4, 9, 16)
    results = aten.scaled_dot_product_flash_attention(*inputs)
    grads = aten.scaled_dot_product_flash_attention_backward(
        grad_out, *inputs, *results[:6], 0.0, False, *results[6:8]
    )
    right = grad_out.transpose(1, 2)
    assert_gradients_right(heads_first(*grads), right, None, q, k, v, 0.25, False)


@pytest.mark.parametrize(("seqlens", "batch"), [((5, 0), 2), ((0, 5), 2), ((5, 5), 0)], ids=str)
def test_nothing(seqlens, batch):
    q, k, v = random_qkv("cpu", torch.float32, batch, *seqlens, 2, head_dim=16)
    inputs = heads_first(q, k, v)
    results = aten.scaled_dot_product_flash_attention(*inputs)
    assert_form_inferred(SDPA, inputs, results)
    assert not results[0].any() and (results[1] == -torch.inf).all()
    arguments = (torch.ones_like(results[0]), *inputs, *results[:6], 0.0, False, *results[6:8])
    grads = aten.scaled_dot_product_flash_attention_backward(*arguments)
    assert_form_inferred(SDPA_BACKWARD, arguments, grads)
    assert not any(grad.any() for grad in grads)


def test_the_default_scale_is_that_of_the_head_dim():
    q, k, v = random_qkv("cpu", torch.float32, 1, 20, 20, 2, head_dim=40)
    results = aten.scaled_dot_product_flash_attention(*heads_first(q, k, v))
    assert_right(results[0].transpose(1, 2), results[1], q, k, v, 40**-0.5, False)


def packed_call(packed):
    lengths = packed.lengths()
    longest = [max(slots, default=0) for slots in (packed.slots_q, packed.slots_k)]
    cumulative = (lengths["cu_seqlens_q"], lengths["cu_seqlens_k"])
    return (*packed.qkv, *cumulative, *longest, 0.0), lengths["seqused_k"]


@pytest.mark.parametrize(
    ("causal", "window"),
    [(False, (None, None)), (True, (-1, 0)), (False, (7, 0)), (False, (3, 5)), (True, (9, -1))],
)
def test_packed(causal, window):
    chance = random.Random(3)
    packed = random_packed(
        chance, "cpu", torch.float32, [5, 0, 31, 1], [9, 4, 31, 0], (16, 16), (4, 2), True, 2
    )
    packed = dataclasses.replace(packed, used_q=None)
    arguments, seqused_k = packed_call(packed)
    options = {"window_size_left": window[0], "window_size_right": window[1]}
    results = aten.flash_attention_forward(
        *arguments, causal, False, seqused_k=seqused_k, num_splits=1, **options
    )
    assert_form_inferred(FLASH, (*arguments, causal, False), results, **options)
    mask = {"causal": causal, "window_size": [-1 if n is None else n for n in window]}
    assert_packed_right(results[:2], packed, **mask)

    packed = dataclasses.replace(packed, used_k=None)
    arguments, _ = packed_call(packed)
    out, lse, *placeholders = aten.flash_attention_forward(*arguments, causal, False, **options)
    grad_out, _ = random_grads(packed)
    arguments = (grad_out, *packed.qkv, out, lse, *arguments[3:], causal, *placeholders[:2])
    grads = aten.flash_attention_backward(*arguments, **options)
    assert_form_inferred(FLASH_BACKWARD, arguments, grads, **options)
    assert_packed_right((out, lse, *grads), packed, (grad_out, None), **mask)


@pytest.mark.parametrize("window", [(None, None), (4, 2)])
def test_dense_without_transposes(window):
    q, k, v = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, 16)
    options = {"window_size_left": window[0], "window_size_right": window[1]}
    arguments = (q, k, v, None, None, 20, 30, 0.0, False)
    results = aten.flash_attention_forward(*arguments, False, **options)
    assert_form_inferred(FLASH, (*arguments, False), results, **options)
    sides = [-1 if n is None else n for n in window]
    assert_right(*results[:2], q, k, v, 0.25, False, window_size=sides)
    grad_out = torch.randn_like(q)
    grads = aten.flash_attention_backward(
        grad_out, q, k, v, *results[:2], *arguments[3:], *results[2:4], **options
    )
    assert_gradients_right(grads, grad_out, None, q, k, v, 0.25, False, window_size=sides)


def test_into_an_output():
    q, k, v = random_qkv("cpu", torch.float32, 1, 8, 8, 2, head_dim=16)
    out = torch.full_like(q, torch.nan)
    arguments = (q, k, v, None, None, 8, 8, 0.0, True, False)
    lse = aten.flash_attention_forward_no_dropout_inplace(out, *arguments)
    assert_right(out, lse, q, k, v, 0.25, True)


def dense_call(**changes):
    """Keyword arguments of SDPA's operator."""
    names = ("query", "key", "value")
    tensors = heads_first(*random_qkv("cpu", torch.float32, 1, 8, 8, 2, head_dim=16))
    return {**dict(zip(names, tensors, strict=True)), **changes}


UNANSWERED = {
    "dropout": {"dropout_p": 0.1},
    "debug mask": {"return_debug_mask": True},
    "head dim": dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 8, 12)),
    "large head dim": dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 8, 264)),
    "no head dim": dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 8, 0)),
    "v's head dim": {"value": torch.zeros(1, 2, 8, 8)},
    "dtype": dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 8, 16, dtype=torch.int32)),
    "dtypes": {"value": torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16)},
    "heads": {"query": torch.zeros(1, 3, 8, 16)},
    "batch": {"query": torch.zeros(2, 2, 8, 16)},
    "rank": dict.fromkeys(("query", "key", "value"), torch.zeros(2, 8, 16)),
    "strides": {"query": torch.zeros(1, 2, 16, 8).mT},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -1.0},
    "infinite scale": {"scale": torch.inf},
    "a later argument": {"softcap": 30.0},
}


@pytest.mark.parametrize("changes", UNANSWERED.values(), ids=UNANSWERED)
def test_what_is_not_answered(changes):
    assert aten.scaled_dot_product_flash_attention(**dense_call(**changes)) is NotImplemented


def test_what_asks_for_nothing_is_answered():
    results = aten.scaled_dot_product_flash_attention(**dense_call(softcap=None))
    assert torch.equal(results[0], aten.scaled_dot_product_flash_attention(**dense_call())[0])


@pytest.mark.parametrize(
    "change",
    [
        {"block_table": torch.zeros(1, 1, dtype=torch.int32)},
        {"alibi_slopes": torch.zeros(2)},
        {"cum_seq_q": torch.tensor([0, 5])},  # int64
        {"cum_seq_k": None},
        {"cum_seq_q": None},
        {"dropout_p": 0.5},
        {"return_debug_mask": True},
        {"k_cache": torch.zeros(1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_of_packed_calls_is_not_answered(change):
    x = torch.zeros(5, 2, 16)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    call = {"query": x, "key": x, "value": x, "cum_seq_q": cu_seqlens, "cum_seq_k": cu_seqlens}
    call.update(max_q=5, max_k=5, dropout_p=0.0, is_causal=False, return_debug_mask=False)
    assert aten.flash_attention_forward(**call) is not NotImplemented
    assert aten.flash_attention_forward(**{**call, **change}) is NotImplemented


ROW = {"dtype": "bf16", "head_dim": 192, "head_dim_v": 128, "mask": "full", "any_call": False}


@pytest.mark.parametrize(
    ("asked", "row", "there"),
    [
        (("bf16", 128, False, False), {}, True),
        (("bf16", 40, False, False), {}, True),
        (("bf16", 136, False, False), {}, False),
        (("fp16", 128, False, False), {}, False),
        ((None, 128, False, False), {}, False),
        (("bf16", 128, True, False), {}, False),
        (("bf16", 128, True, False), {"mask": "causal"}, True),
        (("bf16", 128, False, False), {"mask": "causal"}, False),
        (("bf16", 128, True, False), {"mask": "any"}, True),
        (("bf16", 128, False, True), {"mask": "any"}, False),
        (("bf16", 128, False, True), {"mask": "any", "any_call": True}, True),
    ],
)
def test_whether_there_is_a_kernel(monkeypatch, asked, row, there):
    monkeypatch.setitem(aten.ROWS, "forward", {"row": {**ROW, **row}})
    assert aten._has_row.__wrapped__("forward", *asked, 1) == there
    assert not aten._has_row.__wrapped__("backward", *asked[:1], 264, *asked[2:], 1)


def attend(query, key, value, causal=True):
    return SDPA(query, key, value, 0.0, causal)[0]


def test_autograd_of_the_operator(overridden):
    q, k, v = random_qkv("cpu", torch.float32, 2, 17, 17, 4, 2, 16)
    inputs = [x.requires_grad_() for x in heads_first(q, k, v)]
    out = attend(*inputs)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    right = heads_first(grad_out, *(x.detach() for x in inputs))
    assert_gradients_right(heads_first(*grads), right[0], None, *right[1:], 0.25, True)
    assert_right(
        out.detach().transpose(1, 2), SDPA(*inputs, 0.0, True)[1].detach(), *right[1:], 0.25, True
    )


@pytest.mark.parametrize("layout", ["views", "contiguous"])
def test_compiled(overridden, layout):
    inputs = heads_first(*random_qkv("cpu", torch.float32, 2, 17, 17, 4, 2, 16))
    inputs = [layouts(x)[layout].detach().requires_grad_() for x in inputs]

    def block(query, key, value):
        return attend(query * 2, key, value).transpose(1, 2).flatten(2).sin()

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    results = []
    for function in (block, compiled):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_varlen_attn(overridden):
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    packed = random_packed(random.Random(1), "cpu", torch.float32, [5, 9], [5, 9], (16, 16), (2, 2))
    arguments, _ = packed_call(packed)
    q, k, v = (x.requires_grad_() for x in packed.qkv)
    request = AuxRequest(lse=True)
    out, lse = varlen_attn(q, k, v, *arguments[3:-1], window_size=(-1, 0), return_aux=request)
    grad_out, _ = random_grads(packed)
    grads = torch.autograd.grad(out, (q, k, v), grad_out)
    packed = Packed(q.detach(), k.detach(), v.detach(), packed.slots_q, packed.slots_k)
    results = (out.detach(), lse.detach(), *grads)
    assert_packed_right(results, packed, (grad_out, None), causal=True)


def test_varlen_attn_into_an_output(overridden):
    from torch.nn.attention import varlen

    if not hasattr(varlen, "varlen_attn_out"):
        pytest.skip(f"torch {torch.__version__} has no varlen_attn_out")
    packed = random_packed(
        random.Random(1), "cpu", torch.float32, [5, 9], [7, 9], (16, 16), (4, 2), True
    )
    packed = dataclasses.replace(packed, used_q=None)
    arguments, seqused_k = packed_call(packed)
    out = torch.full_like(packed.q, torch.nan)
    _, lse = varlen.varlen_attn_out(
        out,
        *arguments[:-1],
        seqused_k=seqused_k,
        enable_gqa=True,
        return_aux=varlen.AuxRequest(lse=True),
    )
    assert_packed_right((out, lse), packed)


def test_nested_tensors(overridden, monkeypatch):
    """On the CPU PyTorch's choice is always the math backend: here flash is chosen for it."""
    from torch.nested._internal import sdpa

    chosen = lambda *_: attention.SDPBackend.FLASH_ATTENTION  # noqa: E731
    monkeypatch.setattr(sdpa, "_select_sdp_backend", chosen)
    slots = [3, 0, 11]
    packed = random_packed(random.Random(2), "cpu", torch.float32, slots, slots, (16, 16), (2, 2))
    q, k, v = (
        torch.nested.nested_tensor(list(x.split(slots)), layout=torch.jagged).transpose(1, 2)
        for x in packed.qkv
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    values = out.transpose(1, 2).values()
    lse = FLASH(*packed_call(packed)[0], True, False)[1]
    assert_packed_right((values, lse), packed, causal=True)


def test_ring_attention(tmp_path):
    """Context parallelism: two processes, keys of half of the lengths, global outputs and LSEs."""
    q, k, v, grad_out, *results = run_ring(tmp_path)
    assert_right(results[0].transpose(1, 2), results[1], *heads_first(q, k, v), 0.25, True)
    grads = heads_first(*results[2:])
    assert_gradients_right(grads, grad_out.transpose(1, 2), None, *heads_first(q, k, v), 0.25, True)


@pytest.fixture
def another_kernel():
    """The operators' kernels on the CPU are those of another implementation, which notes calls."""
    calls = []
    library = torch.library.Library("aten", "IMPL")

    def forward(*inputs, **options):
        calls.append((inputs, options))
        query = inputs[0]
        empty = query.new_empty(0)
        lse = query.new_zeros(query.shape[:3])
        return torch.full_like(query, 7.0), lse, None, None, 8, 8, empty, empty, empty

    def backward(*inputs, **options):
        calls.append((inputs, options))
        return tuple(torch.full_like(x, 5.0) for x in inputs[1:4])

    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    yield calls
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_calls_share_what_nobody_reads(overridden, dtype):
    inputs = heads_first(*random_qkv("cpu", dtype, 2, 8, 8))
    inputs = [x.detach().requires_grad_() for x in inputs]
    alone = SDPA(*inputs)
    aten.keep_unread(torch.device("cpu"))
    try:
        calls = [SDPA(*inputs) for _ in range(2)]
        grads = [torch.autograd.grad(call[0].sum(), inputs) for call in calls]
    finally:
        aten.drop_unread()
    for call, grad in zip(calls, grads, strict=True):
        assert [form(x) for x in call] == [form(x) for x in alone]
        assert [x.data_ptr() for x in call[6:8]] == [x.data_ptr() for x in calls[0][6:8]]
        assert torch.equal(call[0], alone[0])
        right = torch.autograd.grad(alone[0].sum(), inputs, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(grad, right, strict=True))
    assert calls[0][6].data_ptr() != alone[6].data_ptr()


def test_what_is_not_answered_goes_on(another_kernel, overridden, recwarn):
    q, k, v = (x.requires_grad_() for x in heads_first(*random_qkv("cpu", torch.float32, 1, 8, 8)))
    out = SDPA(q, k, v, 0.0, True)[0]
    assert not another_kernel and not (out == 7).any()
    out = SDPA(q, k, v, 0.25, True, scale=0.5)[0]
    assert (out == 7).all()
    ((inputs, options),) = another_kernel
    assert inputs[3:] == (0.25, True) and options == {"scale": 0.5}
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(inputs, (q, k, v), strict=False))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert (grad == 5).all() and len(another_kernel) == 2
    assert not recwarn.list


def test_removal_gives_the_kernels_back(another_kernel):
    inputs = heads_first(*random_qkv("cpu", torch.float32, 1, 8, 8))
    before = state_of_dispatcher()
    overrides = integration.Overrides("CPU")
    assert state_of_dispatcher() != before
    assert not (SDPA(*inputs)[0] == 7).any()
    overrides.remove()
    assert state_of_dispatcher() == before
    assert (SDPA(*inputs)[0] == 7).all()


def state_of_dispatcher():
    names = [name for name in integration._ANSWERS if hasattr(torch.ops.aten, name)]
    return [torch._C._dispatch_dump(f"aten::{name}") for name in names]


def state():
    """What `activate` changes."""
    order = torch._C._get_sdp_priority_order()
    implementations = attention.list_flash_attention_impls()
    tag = torch.compiler.config.cache_key_tag
    return state_of_dispatcher(), order, implementations, integration.current(), tag


def test_activation_is_undone():
    before = state()
    assert integration.NAME not in before[2]
    for _ in range(2):
        integration.activate()
        integration.activate()
        assert integration.current() == integration.NAME
        overridden, _, implementations, _, tag = state()
        assert tag == before[-1] + "cute_kernels"
        assert all(
            "with_keyset" not in a and a != b for a, b in zip(overridden, before[0], strict=True)
        )
        assert integration.NAME in implementations
        integration.deactivate()
        integration.deactivate()
        assert state() == before


class Implementation:
    """Another, of the registry's kind."""

    active = False

    def __init__(self):
        Implementation.active = True

    def remove(self):
        Implementation.active = False


@pytest.fixture
def another():
    attention.register_flash_attention_impl("another", register_fn=Implementation)
    attention.activate_flash_attention_impl("another")
    yield "another"
    attention.restore_flash_attention_impl()
    torch_choice.forget_implementation("another")


def test_an_implementation_that_was_active_is_active_again(another):
    integration.activate()
    assert not Implementation.active
    integration.deactivate()
    assert Implementation.active and integration.current() == another


def test_an_implementation_that_came_later_stays(another):
    before = state_of_dispatcher()
    integration.activate()
    attention.activate_flash_attention_impl(another)
    assert state_of_dispatcher() == before
    integration.deactivate()
    assert Implementation.active and integration.current() == another


def test_flash_comes_before_cudnn_until_undone():
    given = torch._C._get_sdp_priority_order()
    flash, cudnn = (
        int(getattr(attention.SDPBackend, f"{name}_ATTENTION")) for name in ("FLASH", "CUDNN")
    )
    others = [n for n in given if n not in (flash, cudnn)]
    try:
        torch._C._set_sdp_priority_order([cudnn, flash, *others])
        undo = torch_choice.put_flash_before_cudnn()
        assert torch._C._get_sdp_priority_order() == [flash, cudnn, *others]
        undo()
        assert torch._C._get_sdp_priority_order() == [cudnn, flash, *others]
        undo = torch_choice.put_flash_before_cudnn()
        torch._C._set_sdp_priority_order([*others, flash, cudnn])  # the user's own
        undo()
        torch_choice.put_flash_before_cudnn()()
        assert torch._C._get_sdp_priority_order() == [*others, flash, cudnn]
    finally:
        torch._C._set_sdp_priority_order(given)


def test_caches_of_compilers_are_told_apart_until_undone():
    config = torch.compiler.config
    given = config.cache_key_tag
    try:  # not by monkeypatch, which deletes what such a module's own dictionary does not have
        config.cache_key_tag = "mine"
        undo = torch_choice.tag_caches("ours")
        assert config.cache_key_tag == "mineours"
        undo()
        assert config.cache_key_tag == "mine"
        undo = torch_choice.tag_caches("ours")
        config.cache_key_tag = "another"
        undo()
        assert config.cache_key_tag == "another"
    finally:
        config.cache_key_tag = given


def test_a_torch_without_a_registry_is_named(monkeypatch):
    monkeypatch.delattr(attention, "restore_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"needs torch 2\.11 or newer"):
        integration.activate()
    assert integration.current() is None
