"""compat.install: FlashAttention's names are found, by transformers too, until compat.uninstall."""

import importlib
import importlib.metadata
import subprocess
import sys
import types

import pytest

import cute_kernels
from cute_kernels import compat
from cute_kernels.compat import flash_attn as fa2
from cute_kernels.compat import flash_attn_interface as fa3
from cute_kernels.compat.flash_attn import bert_padding
from cute_kernels.compat.flash_attn import flash_attn_interface as fa2_interface

NAMES = ("flash_attn", "flash_attn.bert_padding", "flash_attn_2_cuda", "flash_attn_interface")


@pytest.fixture
def installed():
    before = {name: module for name, module in sys.modules.items() if "flash_attn" in name}
    finders = list(sys.meta_path)
    compat.install()
    yield
    compat.uninstall()
    after = {name: module for name, module in sys.modules.items() if "flash_attn" in name}
    assert after == before and sys.meta_path == finders


def test_install(installed):
    from flash_attn import flash_attn_func as second
    from flash_attn.bert_padding import pad_input
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
    from flash_attn_3.flash_attn_interface import _flash_attn_forward
    from flash_attn_interface import flash_attn_func as third

    assert second is fa2.flash_attn_func and third is fa3.flash_attn_func
    assert pad_input is bert_padding.pad_input
    assert _flash_attn_forward is fa3._flash_attn_forward
    assert _flash_attn_varlen_forward is fa2_interface._flash_attn_varlen_forward
    for name in NAMES:
        assert importlib.util.find_spec(name) is not None
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn.ops")
    assert importlib.metadata.version("flash-attn-3") == "3.0.0"
    assert importlib.metadata.version("flash_attn") == fa2.__version__
    owners = importlib.metadata.packages_distributions()
    assert owners["flash_attn_interface"] == ["flash-attn-3"] == owners["flash_attn_3"]
    assert owners["flash_attn"] == ["flash-attn"] == owners["flash_attn_2_cuda"]
    assert importlib.metadata.version("cute-kernels") == cute_kernels.__version__


def test_uninstall_leaves_nothing_behind(installed):
    compat.install([3])  # instead of the one before
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")
    compat.uninstall()
    compat.uninstall()
    with pytest.raises(TypeError, match="versions is 3, must be several"):
        compat.install(3)
    for name in NAMES:
        assert name not in sys.modules
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn-3")


def test_names_that_other_libraries_import(installed, monkeypatch):
    """Transformer Engine and xformers are not imported without the compiled module, diffusers falls
    back to PyTorch's attention without the operators' names, verl does not start without
    einops'."""
    import flash_attn_2_cuda
    from flash_attn.flash_attn_interface import (
        _wrapped_flash_attn_backward,
        _wrapped_flash_attn_forward,
        _wrapped_flash_attn_varlen_backward,
        _wrapped_flash_attn_varlen_forward,
    )

    assert flash_attn_2_cuda is fa2_interface.flash_attn_gpu
    assert (
        flash_attn_2_cuda.varlen_bwd.__module__ == "cute_kernels.compat.flash_attn.flash_attn_gpu"
    )
    assert _wrapped_flash_attn_forward is fa2_interface._flash_attn_forward
    assert _wrapped_flash_attn_backward is fa2_interface._flash_attn_backward
    assert _wrapped_flash_attn_varlen_forward is fa2_interface._flash_attn_varlen_forward
    assert _wrapped_flash_attn_varlen_backward is fa2_interface._flash_attn_varlen_backward
    einops = types.ModuleType("einops")
    einops.rearrange, einops.repeat = object(), object()
    monkeypatch.setitem(sys.modules, "einops", einops)
    from flash_attn.bert_padding import rearrange, repeat

    assert rearrange is einops.rearrange and repeat is einops.repeat
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ImportError, match="einops"):
        getattr(bert_padding, "repeat")  # noqa: B009
    assert not hasattr(bert_padding, "reduce")


TRANSFORMERS = """
from cute_kernels import compat
compat.install()
from transformers.utils import import_utils
import torch, transformers.modeling_flash_attention_utils as utils
import_utils.is_torch_cuda_available = lambda: True
assert import_utils.is_flash_attn_3_available() and import_utils.is_flash_attn_2_available()
(dense, packed, *_), (process, _) = utils.lazy_import_flash_attention("flash_attention_3")
from cute_kernels.compat import flash_attn_interface
assert dense is flash_attn_interface.flash_attn_func
q = torch.randn(2, 9, 4, 16)
mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
found = utils._flash_attention_forward(
    q, q, q, mask, 9, True, attn_implementation="flash_attention_3", sliding_window=3
)
right = dense(q[:1, 4:], q[:1, 4:], q[:1, 4:], causal=True, window_size=(2, 0))
torch.testing.assert_close(found[:1, 4:], right)
assert process(query_length=9, key_length=9, is_causal=True, s_aux=q)["s_aux"] is q
step = torch.randn(2, 1, 4, 16)
right = dense(step[:1], q[:1, 4:], q[:1, 4:], causal=True)
for name in ("flash_attention_2", "flash_attention_3"):
    found = utils._flash_attention_forward(step, q, q, mask, 1, True, attn_implementation=name)
    torch.testing.assert_close(found[:1], right)
print("right")
"""


def test_transformers_finds_it():
    pytest.importorskip("transformers", reason="needs transformers")
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS], capture_output=True, text=True, check=False
    )
    assert done.stdout == "right\n", done.stderr


DIFFUSERS = """
from cute_kernels import compat
compat.install()
import torch
from diffusers.models import attention_dispatch
q, k, v = torch.randn(3, 2, 9, 4, 16)
heads_first = (x.transpose(1, 2) for x in (q, k, v))
right = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
for name in ("flash", "flash_varlen", "_flash_varlen_3"):
    found = attention_dispatch.dispatch_attention_fn(q, k, v, backend=name)
    torch.testing.assert_close(found, right)
    attention_dispatch._check_attention_backend_requirements(name)
attention_dispatch._check_attention_backend_requirements("_flash_3")
print("right")
"""


def test_diffusers_finds_it():
    """Its own backends for FlashAttention; those of ours are of test_integrations_diffusers.py."""
    pytest.importorskip("diffusers", "0.38", reason="needs diffusers")
    done = subprocess.run(
        [sys.executable, "-c", DIFFUSERS], capture_output=True, text=True, check=False
    )
    assert done.stdout == "right\n", done.stderr
