"""cu_seqlens of dense queries, which are kept from call to call."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cute_kernels import flash_attn_with_kvcache
from cute_kernels.cache import starts


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(starts, "_kept", {})


def right(batch, seqlen):
    return [i * seqlen for i in range(batch + 1)]


@pytest.mark.parametrize("seqlen", [0, 1, 3, 64, 65, 4096])
def test_they_are_right_for_growing_batches(device, seqlen):
    like = torch.empty(1, device=device)
    for batch in (1, 0, 255, 256, 3, 1000, 999):
        found = starts.starts_of(batch, seqlen, like)
        assert found.dtype == torch.int32 and found.is_contiguous() and found.device == like.device
        assert found.tolist() == right(batch, seqlen)


def test_few_are_made_and_none_is_freed():
    like = torch.empty(1)
    seen = [starts.starts_of(batch, 2, like) for batch in range(1, 700)]
    assert len(starts._kept[like.device, 2]) == 3
    assert len({x.data_ptr() for x in seen}) == 3
    starts.starts_of(4, 1000, like)  # a prompt's
    assert list(starts._kept) == [(like.device, 2)]


def test_another_thread_may_keep_fewer_meanwhile():
    like = torch.empty(1)

    class Kept(list):
        def append(self, made):
            super().append(made)
            super().append(made[:2])

    starts._kept[like.device, 2] = Kept()
    assert starts.starts_of(9, 2, like).tolist() == right(9, 2)
    assert starts.starts_of(9, 2, like).tolist() == right(9, 2)


def test_what_traces_leaves_nothing_behind():
    like = torch.empty(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        starts.starts_of(3, 1, like)
        starts.starts_of(3, 1, torch.empty(1))
    with torch.inference_mode():
        starts.starts_of(3, 1, like)
    found = starts.starts_of(3, 1, like)
    assert type(found) is torch.Tensor and found.tolist() == right(3, 1)
    assert not found.is_inference()


def test_a_graph_captured_by_the_first_call(hopper):
    q = torch.randn(3, 1, 4, 64, device=hopper).bfloat16()
    caches = torch.randn(2, 3, 128, 2, 64, device=hopper).bfloat16()
    lengths = torch.tensor([5, 100, 1], dtype=torch.int32, device=hopper)
    places = torch.arange(3, dtype=torch.int32, device=hopper)
    call = {"cache_seqlens": lengths, "cache_batch_idx": places}
    flash_attn_with_kvcache(q.repeat(1, 2, 1, 1), *caches, **call)  # kernels are loaded
    starts._kept.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_with_kvcache(q, *caches, **call)
    assert not any(starts._kept.values())
    graph.replay()
    assert torch.equal(out, flash_attn_with_kvcache(q, *caches, **call))
    assert any(starts._kept.values())
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again):  # reads what is kept
        out = flash_attn_with_kvcache(q, *caches, **call)
    for batch in (1000, 3000):
        starts.starts_of(batch, 1, q)
    again.replay()
    assert torch.equal(out, flash_attn_with_kvcache(q, *caches, **call))
