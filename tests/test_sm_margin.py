"""Multiprocessors that a call leaves alone."""

import pytest
import torch
from host_program import host_program, needs_cxx
from parity import DTYPES, common_head_dim, random_qkv, skip_unless_answered
from traces import GRADIENTS, PLAIN, grids

from cute_kernels import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    tile_configs,
)

SOURCE = """
#include <cstdint>
#include <cstdio>

#include "cute_kernels/attention/problem.hpp"

int main() {
  using namespace cute_kernels::attention;
  long long multiprocessors, margin;
  while (std::scanf("%lld %lld", &multiprocessors, &margin) == 2) {
    Device const device = leaving({3, static_cast<int>(multiprocessors)}, margin);
    std::printf("%d %d %d %d\\n", device.index, device.multiprocessors, device.is_shared,
                may_start_early(device));
  }
}
"""


@needs_cxx
def test_what_is_left(tmp_path):
    """One multiprocessor at least, whatever is asked for. What waits for the call before waits
    outside, where that may have left some alone."""
    run = host_program(tmp_path, SOURCE)
    cases = [(132, n) for n in (0, 1, 16, 131, 132, 133, 2**40, 2**63 - 1)] + [(1, 0), (1, 5)]
    right = [[3, max(1, n - margin), int(margin > 0), int(margin == 0)] for n, margin in cases]
    assert run(cases) == right


def calls(device, head_dim=64, seqlen=1024, dtype=torch.bfloat16):
    """Every function that takes a margin, with it in `hints`."""
    q, k, v = random_qkv(device, dtype, 4, seqlen, seqlen, 16, 8, head_dim)
    starts = torch.arange(5, dtype=torch.int32, device=device) * seqlen
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    used = torch.full((4,), seqlen, dtype=torch.int32, device=device)
    pages = torch.arange(4, dtype=torch.int32, device=device)[:, None]
    qkv = torch.cat([q, k, v], 2)
    of_packed = {"page_table": pages, "seqused_k": used}
    of_8_bits = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    packed_8_bits = [x.flatten(0, 1) for x in of_8_bits]
    return {
        "dense": lambda **hints: flash_attn_func(q, k, v, causal=True, **hints),
        "window": lambda **hints: flash_attn_func(q, k, v, window_size=(200, 0), **hints),
        "chunks": lambda **hints: flash_attn_func(q, k, v, attention_chunk=100, **hints),
        "packed": lambda **hints: flash_attn_varlen_func(*packed, starts, starts, **hints),
        "pages": lambda **hints: flash_attn_varlen_func(
            packed[0], k, v, starts, **of_packed, **hints
        ),
        "cache": lambda **hints: flash_attn_with_kvcache(q, k, v, cache_seqlens=used, **hints),
        "one tensor": lambda **hints: flash_attn_qkvpacked_func(qkv, num_heads_q=16, **hints),
        "one packed tensor": lambda **hints: flash_attn_varlen_qkvpacked_func(
            qkv.flatten(0, 1), starts, num_heads_q=16, **hints
        ),
        "8 bits": lambda **hints: flash_attn_func(*of_8_bits, **hints),
        "8 bits packed": lambda **hints: flash_attn_varlen_func(
            *packed_8_bits, starts, starts, **hints
        ),
    }


NAMES = list(calls("cpu", 16, 4))


def skip_unless_built(device, name):
    skip_unless_answered(device, torch.bfloat16)
    rows = [row for row in tile_configs("forward_fp8") if row["head_dim"] == 64]
    if device == "cuda" and "8 bits" in name and not any(row["any_call"] for row in rows):
        pytest.skip("this build has no FP8 kernel for all calls with head dim 64")


@pytest.mark.parametrize("name", NAMES)
def test_no_result_changes(device, name):
    """Also where more is asked for than there is."""
    skip_unless_built(device, name)
    call = calls(device, seqlen=1024 if device == "cuda" else 40)[name]
    right = call()
    for margin in (1, 30, 10**9):
        result = call(sm_margin=margin)
        if name in ("pages", "cache"):  # which parts are added up depends on it
            torch.testing.assert_close(result, right, rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(result, right)


@pytest.mark.parametrize("name", NAMES)
def test_refused(name):
    call = calls("cpu", 16, 4)[name]
    with pytest.raises(ValueError, match=r"^sm_margin is -1, must be at least 0$"):
        call(sm_margin=-1)
    with pytest.raises(TypeError, match=r"^sm_margin is 1\.5, must be an int$"):
        call(sm_margin=1.5)


@pytest.mark.parametrize("name", NAMES)
def test_grid(hopper, name, tmp_path):
    skip_unless_built(hopper, name)
    call = calls(hopper)[name]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    kernel = r"[^a-z_](forward|decode)_kernel[<I]"  # mangled where the name is too long
    for margin in (0, 4, 20):
        found = grids(lambda margin=margin: call(sm_margin=margin), kernel, tmp_path)
        # Of pages without a longest length both kernels are launched.
        assert len(found) == (2 if name == "pages" else 1)
        left = multiprocessors - margin
        assert all(ctas in (left, 2 * left) for ctas in found)  # decode's may share one


@pytest.mark.parametrize("row", GRADIENTS)
def test_grid_of_gradients(hopper, row, tmp_path):
    """None of the launches is larger than what is left; all of them together are the gradient."""
    head_dim, dtype = common_head_dim(row), DTYPES[row["dtype"]]
    inputs = random_qkv(hopper, dtype, 4, 1024, 1024, 16, 8, head_dim)
    inputs = [x.requires_grad_() for x in inputs]
    window = (300, 5) if row["any_call"] else (-1, -1)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    def gradients(margin=20):
        out = flash_attn_func(*inputs, window_size=window, deterministic=True, sm_margin=margin)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    whole = grids(lambda: gradients(0), PLAIN, tmp_path)
    left = grids(gradients, PLAIN, tmp_path)
    assert len(whole) == 1 and max(left) == multiprocessors - 20
    if len(left) > 1:  # CTAs that do not stay are launched some at a time
        assert sum(left) == sum(whole)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(0), strict=True))


@pytest.mark.parametrize("gradient", [False, True])
def test_others_need_not_wait(hopper, gradient):
    """Kernels that wait for those before them do so outside of what these leave alone: there a call
    on another stream is answered meanwhile."""
    skip_unless_answered(hopper, torch.bfloat16)
    inputs = random_qkv(hopper, torch.bfloat16, 1, 32768, 32768, 16, 16)
    inputs = [x.requires_grad_(gradient) for x in inputs]
    hints = {"window_size": (16383, 0), "sm_margin": 32}
    out = flash_attn_func(*inputs, **hints)

    def call():
        if gradient:
            torch.autograd.grad(out, inputs, out.detach(), retain_graph=True)
        else:
            flash_attn_func(*inputs, **hints)

    small = [x.detach()[:, :1024] for x in inputs]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    other = torch.cuda.Stream()
    start, end, answered = (torch.cuda.Event(enable_timing=True) for _ in range(3))

    def run(count):
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        with torch.cuda.stream(other):
            flash_attn_func(*small, sm_margin=multiprocessors - 16)
            answered.record()
        end.record()
        torch.cuda.synchronize()

    run(2)
    run(1)
    of_one = start.elapsed_time(end)
    run(2)
    assert start.elapsed_time(answered) < 0.5 * of_one
