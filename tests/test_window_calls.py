"""Calls with a window: its forms, what is refused, and PyTorch's machinery around them."""

import pytest
import torch
from parity import random_qkv, skip_unless_answered
from torch import func
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from cute_kernels import flash_attn_func, tile_configs
from cute_kernels.autograd import dense
from cute_kernels.operators import flash_attn_backward, flash_attn_forward

OPCHECK = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


class Numbers:
    """As an array of NumPy's, which a user need not have: compared with what has not as many
    elements, it has no answer."""

    def __init__(self, *values):
        self.values = values

    def tolist(self):
        return list(self.values)

    def __eq__(self, other):
        raise ValueError("ambiguous")

    __hash__ = None


def test_forms_of_a_window(device):
    skip_unless_answered(device, torch.bfloat16)
    q, k, v = random_qkv(device, torch.bfloat16, 1, 100, 150, 2)
    expected = flash_attn_func(q, k, v, window_size=(7, 5))
    tensors = torch.tensor([7, 5]), torch.tensor([7, 5], dtype=torch.int32)
    for form in ([7, 5], *tensors, Numbers(7, 5)):
        assert torch.equal(flash_attn_func(q, k, v, window_size=form), expected)
    full = flash_attn_func(q, k, v)
    for none in (None, (None, None), [-1, -1], (2**40, -1), (-1, 2**31), (1000, 1000)):
        assert torch.equal(flash_attn_func(q, k, v, window_size=none), full)
    causal = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_func(q, k, v, window_size=(-1, 0)), causal)
    for right in (-1, 0, 9):
        assert torch.equal(flash_attn_func(q, k, v, causal=True, window_size=(-1, right)), causal)
    left = flash_attn_func(q, k, v, window_size=(7, 0))
    assert torch.equal(flash_attn_func(q, k, v, causal=True, window_size=(7, 9)), left)


def test_a_default_device_has_no_part():
    q, k, v = random_qkv("cpu", torch.bfloat16, 1, 300, 300, 2)
    with torch.device("meta"):
        out = flash_attn_func(q, k, v, window_size=(7, 5))
    assert torch.equal(out, flash_attn_func(q, k, v, window_size=(7, 5)))


BAD = {
    "a word": ("wide", TypeError),
    "one number": (7, TypeError),
    "one in a list": ([7], ValueError),
    "three": ((1, 2, 3), ValueError),
    "below -1": ((-2, 0), ValueError),
    "a fraction": ((1.5, 0), TypeError),
    "a tensor of floats": (torch.tensor([1.0, 2.0]), TypeError),
    "a scalar tensor": (torch.tensor(3), TypeError),
    "an array of floats": (Numbers(1.5, 2.0), TypeError),
    "no order": ({7, 5}, TypeError),
    "keys": ({7: 0, 5: 0}, TypeError),
}


@pytest.mark.parametrize("bad", BAD)
def test_refused_windows(bad):
    window_size, error = BAD[bad]
    q, k, v = random_qkv("cpu", torch.bfloat16)
    with pytest.raises(error, match=r"window_size is .*, must be two ints \(left, right\)"):
        flash_attn_func(q, k, v, window_size=window_size)


BAD_HINTS = {
    "num_splits": [(-1, ValueError, "at least 0"), ("2", TypeError, "an int")],
    "pack_gqa": [(1, TypeError, "True, False or None"), ("yes", TypeError, "True, False or None")],
    "sm_margin": [(-1, ValueError, "at least 0"), (1.5, TypeError, "an int")],
}


@pytest.mark.parametrize("name", BAD_HINTS)
def test_refused_hints(name):
    q, k, v = random_qkv("cpu", torch.bfloat16)
    for value, error, words in BAD_HINTS[name]:
        with pytest.raises(error, match=rf"^{name} is {value!r}, must be .*{words}"):
            flash_attn_func(q, k, v, **{name: value})


SEVERAL = [torch.tensor([0, 0]), Numbers(0, 0)]


@pytest.mark.parametrize("several", SEVERAL, ids=["tensor", "array"])
@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("num_splits", TypeError, "num_splits is .*, must be an int"),
        ("sm_margin", TypeError, "sm_margin is .*, must be an int"),
        ("pack_gqa", TypeError, "pack_gqa is .*, must be True, False or None"),
        ("causal", TypeError, "causal is .*, must be True or False"),
        ("deterministic", TypeError, "deterministic is .*, must be True or False"),
        ("attention_chunk", TypeError, "attention_chunk is .*, must be an int"),
        ("softcap", TypeError, "softcap is .*, must be a number"),
        ("qv", NotImplementedError, "flash_attn_func: qv is not there yet"),
    ],
)
def test_several_numbers_where_there_is_one(name, error, words, several):
    q, k, v = random_qkv("cpu", torch.bfloat16)
    with pytest.raises(error, match=f"^{words}"):
        flash_attn_func(q, k, v, **{name: several})


@pytest.mark.parametrize("window_size", [(-1, -1), (5, 0), (5, 5)], ids=str)
@pytest.mark.parametrize("value", ["", [], torch.tensor([1, 0])], ids=["word", "list", "tensor"])
@pytest.mark.parametrize("name", ["causal", "deterministic"])
def test_flags_beside_a_window(name, value, window_size):
    q, k, v = random_qkv("cpu", torch.bfloat16)
    with pytest.raises(TypeError, match=f"^{name} is .*, must be True or False"):
        flash_attn_func(q, k, v, window_size=window_size, **{name: value})


def test_refused_by_the_operators():
    q, k, v = random_qkv("cpu", torch.bfloat16)
    out, lse = flash_attn_forward(q, k, v, 0.1, True, window_left=3)
    for name in ("window_left", "window_right"):
        with pytest.raises(ValueError, match=rf"{name} is -1, must be at least 0 or None"):
            flash_attn_forward(q, k, v, 0.1, True, **{name: -1})
        with pytest.raises(ValueError, match=rf"{name} is -1, must be at least 0 or None"):
            flash_attn_backward(out, None, q, k, v, out, lse, 0.1, True, False, **{name: -1})


@pytest.mark.parametrize(
    "arguments",
    [{"window_size": (-1, 0)}, {"causal": True, "window_size": (-1, 9)}, {"window_size": None}],
    ids=str,
)
def test_calls_that_need_no_window_are_those_without(arguments):
    """So that the kernels there are answer them."""
    with FakeTensorMode():
        q = torch.empty(1, 20, 2, 64, device="cuda", dtype=torch.half)
        assert flash_attn_func(q, q, q, **arguments).device.type == "cuda"


# What CUDA has the output of, and no gradient.
@pytest.mark.parametrize("name", ["window_left", "window_right"])
def test_limits_below_0_on_a_gpu(hopper, name):
    q, k, v = random_qkv(hopper, torch.bfloat16)
    limits = (-1, None) if name == "window_left" else (None, -1)
    with pytest.raises(ValueError, match=rf"{name} is -1, must be at least 0 or None"):
        dense.without_gradient(q, k, v, 0.1, False, None, False, None, *limits)


@pytest.mark.parametrize("window_size", [(5, 5), (-1, 0), (500, 500)], ids=str)
def test_rows_for_dense_calls_take_no_window(hopper, window_size):
    """But one that is no window."""
    names = [
        row["name"]
        for row in tile_configs("forward")
        if not (row["any_call"] or row["grouped"])
        and (row["mask"], row["dtype"]) == ("any", "bf16")
    ]
    q, k, v = random_qkv(hopper, torch.bfloat16)
    if window_size != (5, 5):
        flash_attn_func(q, k, v, window_size=window_size, tile_config=names[0])
        return
    message = (
        f"^tile_config '{names[0]}' takes no window, no diagonal, no sinks and no packed sequences"
    )
    with pytest.raises(ValueError, match=message):
        flash_attn_func(q, k, v, window_size=window_size, tile_config=names[0])


# PyTorch's machinery


def test_gradcheck():
    torch.manual_seed(0)
    shapes = [(1, 7, 4, 8), (1, 9, 2, 8), (1, 9, 2, 16)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def windowed(q, k, v):
        return flash_attn_func(q, k, v, 0.5, window_size=(3, 2), return_lse=True)

    assert torch.autograd.gradcheck(windowed, inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [{"window_left": 5}, {"window_right": 3}, {"diagonal": 4}, {"window_left": 2, "diagonal": -3}],
    ids=str,
)
def test_opcheck(keywords, requires_grad):
    q, k, _ = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, head_dim=16)
    _, _, v = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, head_dim=24)
    inputs = [x.requires_grad_(requires_grad) for x in (q, k, v)]
    result = torch.library.opcheck(
        flash_attn_forward, (*inputs, 0.3, False), keywords, test_utils=OPCHECK
    )
    assert set(result.values()) == {"SUCCESS"}
    if not requires_grad:
        out, lse = flash_attn_forward(*inputs, 0.3, False, **keywords)
        backward = (torch.randn_like(out), lse, *inputs, out, lse, 0.3, False, False)
        result = torch.library.opcheck(flash_attn_backward, backward, keywords, test_utils=OPCHECK)
        assert set(result.values()) == {"SUCCESS"}


def attention(q, k, v, window_size=(6, 2)):
    out, lse = flash_attn_func(q, k, v, window_size=window_size, return_lse=True)
    return out.square().sum() + lse.clamp(min=-9).sin().sum()


def gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = function(*inputs)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def test_compiles_with_dynamic_shapes_and_windows():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=True)
    compilations = set()
    for seqlen_q, seqlen_k, window_size in [(20, 30, (6, 2)), (25, 31, (7, 3)), (300, 40, (9, 4))]:
        inputs = random_qkv("cpu", torch.float32, 2, seqlen_q, seqlen_k, 4, 2, head_dim=16)
        actual = gradients(lambda *qkv, w=window_size: compiled(*qkv, w), *inputs)
        expected = gradients(lambda *qkv, w=window_size: attention(*qkv, w), *inputs)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1  # those of the first call


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    inputs = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, head_dim=16)
    expected = gradients(attention, *inputs)
    inputs = [x.requires_grad_() for x in inputs]
    checkpoint(attention, *inputs, use_reentrant=reentrant).backward()
    for x, right in zip(inputs, expected[1:], strict=True):
        torch.testing.assert_close(x.grad, right)


def test_transforms():
    inputs = random_qkv("cpu", torch.float64, 3, 20, 30, 4, 2, head_dim=16)
    _, *right = gradients(attention, *inputs)
    for a, b in zip(func.grad(attention, (0, 1, 2))(*inputs), right, strict=True):
        torch.testing.assert_close(a, b)
    samples = [x[:, None] for x in inputs]
    for a, b in zip(func.vmap(func.grad(attention, (0, 1, 2)))(*samples), right, strict=True):
        torch.testing.assert_close(a[:, 0], b)
    mapped = func.vmap(lambda *qkv: flash_attn_forward(*qkv, 0.1, True, window_left=3))(*samples)
    for a, b in zip(mapped, flash_attn_forward(*inputs, 0.1, True, window_left=3), strict=True):
        torch.testing.assert_close(a[:, 0], b)
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        func.jvp(attention, tuple(inputs), tuple(inputs))
    with pytest.raises(NotImplementedError, match="second derivative"):
        func.grad(lambda q: func.grad(attention)(q, *inputs[1:]).sum())(inputs[0])
