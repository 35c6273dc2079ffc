"""What is refused of packed sequences, and where."""

import contextlib
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from packed import random_packed
from parity import changed, skip_unless_answered
from torch._subclasses import FakeTensorMode

import cute_kernels.varlen
from cute_kernels import flash_attn_varlen_func
from cute_kernels.autograd import varlen


def good_call(device="cpu"):
    """Keyword arguments: 3 sequences in 24 rows of q and 32 of k, not all of them used."""
    packed = random_packed(
        random.Random(0), device, torch.bfloat16, [8, 0, 12], [10, 5, 15], (64, 64), (4, 2), tail=4
    )
    packed.k, packed.v = packed.k[:-2], packed.v[:-2]
    packed.used_q, packed.used_k = [8, 0, 3], [10, 1, 0]
    call = dict(zip("qkv", packed.qkv, strict=True))
    return {**call, **packed.lengths(), "max_seqlen_q": 12, "max_seqlen_k": None}


def ints(*values):
    return lambda x: x.new_tensor(values)


# What is changed about a good call, the kind of error, and the message.
BAD = {
    "q of rank 4": (
        {"q": lambda x: x[None]},
        ValueError,
        "q has shape (1, 24, 4, 64), must have 3 dimensions: (total, heads, head_dim)",
    ),
    "v of another total": ({"v": lambda x: x[1:]}, ValueError, "v has total 31, must be 32 like k"),
    "v of other heads": (
        {"v": lambda x: x[:, :1]},
        ValueError,
        "v has 1 heads, must have 2 like k",
    ),
    "k of another head_dim": (
        {"k": lambda x: x[..., :32]},
        ValueError,
        "k has head_dim 32, must be 64 like q",
    ),
    "v's head_dim 12": (
        {"v": lambda x: x[..., :12]},
        ValueError,
        "v has head_dim 12, must be a multiple of 8 from 8 to 256",
    ),
    "k of another dtype": (
        {"k": lambda x: x.half()},
        TypeError,
        "k has dtype torch.float16, must be torch.bfloat16 like q",
    ),
    "heads that do not divide": (
        {"q": lambda x: x[:, :3]},
        ValueError,
        "q has 3 heads, must be a multiple of k's 2",
    ),
    "q not a tensor": (
        {"q": lambda x: x.tolist()},
        TypeError,
        "q is a list, must be a torch.Tensor",
    ),
    "q sparse": (
        {"q": lambda x: x.to_sparse()},
        TypeError,
        "q has layout torch.sparse_coo, must be torch.strided",
    ),
    "cu_seqlens_q sparse": (
        {"cu_seqlens_q": lambda x: x.to_sparse()},
        TypeError,
        "cu_seqlens_q has layout torch.sparse_coo, must be torch.strided",
    ),
    "q a string": ({"q": lambda x: "q"}, TypeError, "q is a str, must be a torch.Tensor"),
    "v strided": (
        {"v": lambda x: x.repeat(1, 1, 2)[..., ::2]},
        ValueError,
        "v has strides (256, 128, 2), its last dimension",
    ),
    "scale 0": (
        {"softmax_scale": lambda x: 0.0},
        ValueError,
        "softmax_scale is 0.0, must be finite and greater than 0",
    ),
    "causal a word": (
        {"causal": lambda x: "yes"},
        TypeError,
        "causal is 'yes', must be True or False",
    ),
    "no such tile": (
        {"tile_config": lambda x: "no such"},
        ValueError,
        "tile_config is 'no such', must be None (automatic) or the name of a forward row",
    ),
    "cu_seqlens_q int64": (
        {"cu_seqlens_q": lambda x: x.long()},
        TypeError,
        "cu_seqlens_q has dtype torch.int64, must be torch.int32",
    ),
    "cu_seqlens_k a list": (
        {"cu_seqlens_k": lambda x: x.tolist()},
        TypeError,
        "cu_seqlens_k is a list, must be a torch.Tensor",
    ),
    "cu_seqlens_k None": (
        {"cu_seqlens_k": lambda x: None},
        TypeError,
        "cu_seqlens_k is a NoneType, must be a torch.Tensor",
    ),
    "cu_seqlens_q of rank 2": (
        {"cu_seqlens_q": lambda x: x[None]},
        ValueError,
        "cu_seqlens_q has shape (1, 4), must have 1 dimension",
    ),
    "cu_seqlens_q empty": (
        {"cu_seqlens_q": lambda x: x[:0]},
        ValueError,
        "cu_seqlens_q has shape (0,), must be (batch + 1,)",
    ),
    "cu_seqlens_q strided": (
        {"cu_seqlens_q": lambda x: x.repeat_interleave(2)[::2]},
        ValueError,
        "cu_seqlens_q has stride 2, must be contiguous (stride 1)",
    ),
    "another batch": (
        {"cu_seqlens_k": lambda x: x[:-1]},
        ValueError,
        "cu_seqlens_k has shape (3,), must be (4,) like cu_seqlens_q",
    ),
    "seqused_q of another batch": (
        {"seqused_q": lambda x: x[1:]},
        ValueError,
        "seqused_q has shape (2,), must be (batch,) = (3,)",
    ),
    "seqused_k of a float": (
        {"seqused_k": lambda x: x.float()},
        TypeError,
        "seqused_k has dtype torch.float32, must be torch.int32",
    ),
    "max_seqlen_q a tensor": (
        {"max_seqlen_q": lambda x: torch.tensor(12)},
        TypeError,
        "max_seqlen_q is tensor(12), must be an int or None",
    ),
    "max_seqlen_k negative": (
        {"max_seqlen_k": lambda x: -1},
        ValueError,
        "max_seqlen_k is -1, must be at least 0 or None",
    ),
}
# Of contents, which shape inference does not see.
BAD_CONTENTS = {
    "not from 0": ({"cu_seqlens_q": ints(1, 8, 8, 20)}, "cu_seqlens_q[0] is 1, must be 0"),
    "decreasing": (
        {"cu_seqlens_k": ints(0, 15, 10, 30)},
        "cu_seqlens_k[2] is 10, must be at least cu_seqlens_k[1] = 15",
    ),
    "negative": (
        {"cu_seqlens_k": ints(0, -1, 10, 30)},
        "cu_seqlens_k[1] is -1, must be at least cu_seqlens_k[0] = 0",
    ),
    "beyond q": (
        {"cu_seqlens_q": ints(0, 8, 8, 25)},
        "cu_seqlens_q[3] is 25, must be at most 24, the rows of q",
    ),
    "beyond k": (
        {"cu_seqlens_k": ints(0, 10, 15, 33)},
        "cu_seqlens_k[3] is 33, must be at most 32, the rows of k",
    ),
    "used beyond its slot": (
        {"seqused_q": ints(8, 1, 3)},
        "seqused_q[1] is 1, must be from 0 to 0, the rows from cu_seqlens_q[1] to cu_seqlens_q[2]",
    ),
    "used below 0": ({"seqused_k": ints(10, 1, -1)}, "seqused_k[2] is -1, must be from 0 to 15"),
    "longer than max_seqlen_q": (
        {"max_seqlen_q": lambda x: 7},
        "max_seqlen_q is 7, must be at least 8, the rows that sequence 0 uses",
    ),
    "longer than max_seqlen_k": (
        {"max_seqlen_k": lambda x: 0},
        "max_seqlen_k is 0, must be at least 10, the rows that sequence 0 uses",
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("fake", [False, True])
def test_refused(bad, fake):
    changes, error, message = BAD[bad]
    call = good_call()
    assert flash_attn_varlen_func(**call).isfinite().all()
    call = changed(call, changes)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode, pytest.raises(error, match=f"^{re.escape(message)}"):
        flash_attn_varlen_func(**call)


@pytest.mark.parametrize("bad", BAD_CONTENTS)
def test_refused_contents(bad):
    changes, message = BAD_CONTENTS[bad]
    call = changed(good_call(), changes)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        flash_attn_varlen_func(**call)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert flash_attn_varlen_func(**call).shape == (24, 4, 64)


@pytest.mark.parametrize("bad", BAD_CONTENTS)
def test_contents_are_checked_on_a_gpu_if_asked_for(hopper, monkeypatch, bad):
    changes, message = BAD_CONTENTS[bad]
    monkeypatch.setattr(cute_kernels.varlen, "_CHECK_CONTENTS", True)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        flash_attn_varlen_func(**changed(good_call(hopper), changes))


@pytest.mark.parametrize(
    ("value", "checks"), [("1", True), ("0", False), ("", False), (None, False)]
)
def test_how_checks_are_asked_for(value, checks):
    environment = {k: v for k, v in os.environ.items() if k != "CUTE_KERNELS_CHECK"}
    if value is not None:
        environment["CUTE_KERNELS_CHECK"] = value
    script = "import cute_kernels.varlen as varlen; print(varlen._CHECK_CONTENTS)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{checks}\n", done.stderr


def test_refused_by_the_backward_operator():
    call = good_call()
    q, k, v = (call[name] for name in "qkv")
    lengths = [call[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")]
    inputs = (q, k, v, *lengths, None, 0.1, False, None, 12, None, None, None, False, None)
    out, lse = varlen.without_gradient(*inputs)
    good = (out, None, q, k, v, out, lse, *inputs[3:])
    assert all(grad.isfinite().all() for grad in varlen.backward_without_gradient(*good))
    bad = [
        (0, out[1:], ValueError, "grad_out has shape (23, 4, 64), must be (24, 4, 64) like q"),
        (1, lse.double(), TypeError, "grad_lse has dtype torch.float64, must be torch.float32"),
        (6, lse.mT, ValueError, "lse has shape (24, 4), must be (heads, total_q) = (4, 24)"),
        (7, lengths[1], ValueError, "cu_seqlens_q[3] is 30, must be at most 24, the rows of q"),
        (15, 7, ValueError, "max_seqlen_q is 7, must be at least 8, the rows that sequence 0"),
        (17, -1, ValueError, "window_left is -1, must be at least 0 or None"),
        (
            20,
            "no",
            ValueError,
            "tile_config is 'no', must be None (automatic) or the name of a back",
        ),
    ]
    for place, value, error, message in bad:
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            varlen.backward_without_gradient(*good[:place], value, *good[place + 1 :])


@pytest.mark.parametrize("numbers", [1, 2])
def test_later_arguments_are_named(numbers):
    with pytest.raises(NotImplementedError, match=r"^flash_attn_varlen_func: qv is not there yet"):
        flash_attn_varlen_func(**good_call(), qv=torch.zeros(numbers))


@pytest.mark.parametrize("numbers", [1, 2])
@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_descales_are_of_e4m3(name, numbers):
    with pytest.raises(TypeError, match=r"^q has dtype torch.bfloat16, must be"):
        flash_attn_varlen_func(**good_call(), **{name: torch.zeros(numbers)})


def test_jagged_tensors_are_named():
    """Packed sequences in PyTorch's own form."""
    call = good_call()
    for name in "qkv":
        lengths = torch.tensor([0, 4, call[name].shape[0]])
        call[name] = torch.nested.nested_tensor_from_jagged(call[name], lengths)
    with pytest.raises(TypeError, match=r"^q has layout torch\.jagged, must be torch\.strided$"):
        flash_attn_varlen_func(**call)


def test_hints_change_nothing():
    expected = flash_attn_varlen_func(**good_call())
    for hints in ({"num_splits": 0, "pack_gqa": True}, {"num_splits": 8, "sm_margin": 4}):
        assert torch.equal(flash_attn_varlen_func(**good_call(), **hints), expected)
    with pytest.raises(ValueError, match="num_splits is -1, must be at least 0"):
        flash_attn_varlen_func(**good_call(), num_splits=-1)


def on_cuda(call):
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
        if isinstance(x, torch.Tensor)
        else x
        for name, x in call.items()
    }


def test_shape_inference_on_cuda():
    call = good_call()
    with FakeTensorMode():
        call = on_cuda(call)
        out, lse = flash_attn_varlen_func(**call, return_lse=True)
        assert (out.shape, lse.shape) == ((24, 4, 64), (4, 24))
        with pytest.raises(TypeError, match=r"cu_seqlens_q has dtype torch\.int64"):
            flash_attn_varlen_func(**{**call, "cu_seqlens_q": call["cu_seqlens_q"].long()})
        cpu = torch.empty(4, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens_k is on cpu, must be on cuda:0 like q"):
            flash_attn_varlen_func(**{**call, "cu_seqlens_k": cpu})


@pytest.mark.parametrize("bad", BAD)
def test_refused_on_a_gpu(hopper, bad):
    skip_unless_answered(hopper, torch.bfloat16)
    changes, error, message = BAD[bad]
    call = good_call(hopper)
    assert flash_attn_varlen_func(**call).isfinite().all()
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        flash_attn_varlen_func(**changed(call, changes))


@pytest.mark.parametrize("bad", BAD_CONTENTS)
def test_wrong_contents_on_a_gpu_do_no_harm(hopper, bad):
    """They are not looked at: results are any, but of this call alone."""
    skip_unless_answered(hopper, torch.bfloat16)
    changes, _ = BAD_CONTENTS[bad]
    right = flash_attn_varlen_func(**good_call(hopper))
    assert flash_attn_varlen_func(**changed(good_call(hopper), changes)).shape == right.shape
    assert torch.equal(flash_attn_varlen_func(**good_call(hopper)), right)


def test_inputs_are_not_written(device):
    skip_unless_answered(device, torch.bfloat16)
    call = good_call(device)
    copies = {name: x.clone() for name, x in call.items() if isinstance(x, torch.Tensor)}
    for name in "qkv":
        call[name].requires_grad_()
    flash_attn_varlen_func(**call, causal=True).sum().backward()
    assert all(torch.equal(call[name], copy) for name, copy in copies.items())
