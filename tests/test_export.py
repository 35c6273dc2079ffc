"""torch.export and AOTInductor of models that call this package: one program for all lengths."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from cute_kernels import flash_attn_func, flash_attn_varlen_func
from cute_kernels.parts import merge_parts


class Block(nn.Module):
    """Attention of equal lengths with a window, then of packed sequences."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.qkv = nn.Linear(24, 96, dtype=dtype)
        self.out = nn.Linear(32, 24, dtype=dtype)

    def forward(self, x, cu_seqlens):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        out, lse = flash_attn_func(q, k, v, causal=True, window_size=(5, 0), return_lse=True)
        q, k, v = (
            self.qkv(self.out(out.flatten(2))).flatten(0, 1).unflatten(-1, (3, 2, 16)).unbind(1)
        )
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True)
        return self.out(out.flatten(1)), lse


def call(batch, seqlen, device="cpu", dtype=torch.float32):
    torch.manual_seed(batch)
    x = torch.randn(batch, seqlen, 24, device=device, dtype=dtype)
    half = batch * seqlen // 2
    return x, torch.tensor([0, half, batch * seqlen], dtype=torch.int32, device=device)


def export(model, *inputs, strict=False):
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("seqlen", max=4096)}
    return torch.export.export(
        model, inputs, dynamic_shapes={"x": sizes, "cu_seqlens": None}, strict=strict
    )


def assert_same(program, model, *shapes, **form):
    for shape in shapes:
        inputs = call(*shape, **form)
        results = zip(program(*inputs), model(*inputs), strict=True)
        assert all(torch.equal(a, b) for a, b in results), shape


SHAPES = [(2, 9), (3, 1), (5, 130)]


@pytest.mark.parametrize("strict", [False, True])
def test_export(tmp_path, strict):
    model = Block().eval()
    program = export(model, *call(2, 9), strict=strict)
    called = {str(node.target) for node in program.graph.nodes}
    names = {"flash_attn_forward", "flash_attn_varlen_forward"}
    assert called >= {f"cute_kernels.{name}.default" for name in names}
    assert_same(program.module(), model, *SHAPES)
    torch.export.save(program, tmp_path / "block.pt2")
    assert_same(torch.export.load(tmp_path / "block.pt2").module(), model, *SHAPES)


class Merged(nn.Module):
    def forward(self, *parts):
        return merge_parts(*parts)


def test_a_program_needs_no_more_than_the_package(tmp_path):
    """Of what another process runs that imports nothing else: parts that are merged."""
    out, lse = torch.randn(1, 2, 4, 8), torch.randn(1, 4, 2)
    program = torch.export.export(Merged(), (out, lse, out, lse))
    torch.export.save(program, tmp_path / "merged.pt2")
    run = (
        "import sys, torch, cute_kernels\n"
        "out, lse = torch.randn(1, 2, 4, 8), torch.randn(1, 4, 2)\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "assert torch.allclose(program(out, lse, out, lse)[0], out, atol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-c", run, tmp_path / "merged.pt2"], check=True)


def test_an_exported_program_can_be_trained():
    model = Block()
    program = export(model, *call(2, 9)).module()
    inputs = call(3, 20)
    for module in (model, program):
        module(*inputs)[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(program.get_parameter(name).grad, parameter.grad), name


def compiled_ahead(program, folder):
    options = {"aot_inductor.precompile_headers": False}  # as slow as all else
    file = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "block.pt2"), inductor_configs=options
    )
    return torch._inductor.aoti_load_package(file)


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs a C++ compiler: there is no g++ here"
)


# A package for a GPU in which nothing is ours.
PYTORCH_ALONE = """
import torch
model = torch.nn.Linear(8, 8, device="cuda").eval()
x = torch.randn(4, 8, device="cuda")
with torch.no_grad():
    program = torch.export.export(model, (x,))
    file = torch._inductor.aoti_compile_and_package(program, package_path="linear.pt2")
    out = torch._inductor.aoti_load_package(file)(x)
assert torch.allclose(out, model(x), atol=1e-3)
"""


@needs_compiler
@torch.no_grad()
def test_aot_inductor(tmp_path):
    model = Block().eval()
    program = export(model, *call(2, 9))
    assert_close(compiled_ahead(program, tmp_path), model, 1e-6, *SHAPES)


@needs_compiler
@torch.no_grad()
def test_aot_inductor_on_a_gpu(tmp_path, hopper):
    without_us = subprocess.run(
        [sys.executable, "-c", PYTORCH_ALONE], cwd=tmp_path, capture_output=True, text=True
    )
    if without_us.returncode != 0:
        end = without_us.stderr.strip().splitlines()[-1:]
        pytest.skip(f"PyTorch cannot load a package of its own here: {without_us.returncode} {end}")
    form = {"device": hopper, "dtype": torch.bfloat16}
    model = Block(torch.bfloat16).to(hopper).eval()
    program = export(model, *call(2, 9, **form))
    assert_close(compiled_ahead(program, tmp_path), model, 2e-2, *SHAPES, **form)


def assert_close(program, model, tolerance, *shapes, **form):
    """The matrix products around attention are Inductor's."""
    for shape in shapes:
        inputs = call(*shape, **form)
        for a, b in zip(program(*inputs), model(*inputs), strict=True):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), shape
