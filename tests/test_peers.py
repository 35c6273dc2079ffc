"""FlashAttention-3 of a library as a peer of the benchmarks, with our operators in its place."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import backward, fa3_library, providers
from bench.cells import BackwardCell
from bench.check import Reference
from bench.check_backward import GradientReference
from bench.distributions import draw
from cute_kernels import flash_attn_func


def cpu_operators():
    """What a FlashAttention-3 library registers, by our own operators on the CPU."""

    def fwd(q, k, v, softmax_scale, is_causal):
        out, lse = flash_attn_func(
            q, k, v, softmax_scale=softmax_scale, causal=is_causal, return_lse=True
        )
        return out, lse, None, None

    def bwd(grad_out, q, k, v, out, lse, softmax_scale, is_causal):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            again = flash_attn_func(*leaves, softmax_scale=softmax_scale, causal=is_causal)
        assert torch.equal(again, out)  # what forward gave
        return *torch.autograd.grad(again, leaves, grad_out), None

    return SimpleNamespace(fwd=fwd, bwd=bwd)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_fa3_library_is_a_peer_of_both_passes(monkeypatch, tmp_path, mask):
    monkeypatch.setattr(fa3_library, "load", lambda path: cpu_operators())
    (peer,), missing = providers.load_peers(["fa3-xformers"], fa3_library=tmp_path / "_C.so")
    assert not missing and peer.name == "fa3-xformers"
    cell = BackwardCell(dtype="bf16", mask=mask, batch=1, seqlen=64, heads=2, head_dim=64)
    qkv = draw(cell, "cpu")
    grad_out = draw(cell, "cpu", 1)[0]
    reference = Reference(cell, *qkv)
    assert reference.error(peer.output(peer.bind(cell, *qkv)())) <= reference.tolerance
    gradients = GradientReference(cell, *qkv, grad_out)
    step = providers.training_step_of(peer)
    with step.context():
        grads = step.output(step.bind(cell, *qkv, grad_out)())
    assert gradients.error(grads) <= gradients.tolerance


def test_fa3_library_that_is_missing_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv(fa3_library.VARIABLE, raising=False)

    def reason(**options):
        loaded, missing = providers.load_peers(["fa3-xformers"], **options)
        assert not loaded
        return missing["fa3-xformers"]

    assert "no library is given" in reason() and "xformers==0.0.34" in reason()
    absent = tmp_path / "_C.so"
    assert f"no file {absent}" in reason(fa3_library=absent)
    absent.write_text("not a library")
    (tmp_path / fa3_library.CUDA_RUNTIME).write_text("neither")
    assert "xformers==0.0.34" in reason(fa3_library=absent)


def test_two_libraries_of_the_same_operators_are_not_loaded(monkeypatch, tmp_path):
    """The second one's registration would end the process."""
    monkeypatch.setattr(fa3_library, "registered", lambda: True)
    loaded, missing = providers.load_peers(["fa3", "fa3-xformers"], fa3_library=tmp_path / "_C.so")
    assert not loaded
    assert set(missing.values()) == {fa3_library.ONE_IN_A_PROCESS}


def test_fa3_library_may_be_named_by_the_environment(monkeypatch):
    def reason(*options):
        chosen = backward.parse(["--peers", "fa3-xformers", *options])
        _, missing = providers.load_peers(chosen.peers, fa3_library=chosen.fa3_library)
        return missing["fa3-xformers"]

    monkeypatch.setenv(fa3_library.VARIABLE, "no/such/_C.so")
    assert "no file no/such/_C.so" in reason()
    assert "no file other.so" in reason("--fa3-library", "other.so")
