"""SGLang's backend where a model has latent attention: layers' calls, with the real package where
that is installed; the calls that it makes, recorded, everywhere.

    CUTE_KERNELS_RECORD=1 python -m pytest tests/test_integrations_sglang_latent.py   records them
"""

import itertools

import engine_calls
import pytest
import sglang_engine
import torch
from caches import assert_attention_right
from engine_calls import assert_replayed

RECORDED = engine_calls.load("sglang_latent")
HEADS, LATENT, ROPE = 16, 512, 64
BATCHES = {  # queries and keys of each request
    "prefill": ([33, 1, 80], [33, 1, 80]),
    "decode": ([1, 1, 1, 1], [1, 63, 64, 200]),
    "mixed": ([1, 40, 1, 7], [90, 40, 17, 130]),
}


@pytest.mark.parametrize("call", RECORDED, ids=range(len(RECORDED)))
def test_recorded_calls(device, call):
    assert_replayed(call, device)


@pytest.fixture(scope="module")
def sglang():
    yield from sglang_engine.loaded()


@pytest.fixture(scope="module")
def recorded():
    yield from engine_calls.recorded("sglang_latent", "sglang")


@pytest.fixture
def configured(sglang, monkeypatch):
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    sglang_engine.configure(monkeypatch)
    monkeypatch.setattr(MLATokenToKVPool, "set_mla_kv_buffer", write_to_slots)


def write_to_slots(pool, layer, places, latents, ropes):
    """What SGLang's kernel of this purpose does, which is not there on the CPU."""
    pool.kv_buffer[layer.layer_id][places.loc] = torch.cat([latents, ropes], -1)


def make_runner(page_size, **changed):
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    runner = sglang_engine.make_runner(page_size, use_mla_backend=True, **changed)
    runner.model_config.attention_arch = AttentionArch.MLA
    pool = MLATokenToKVPool(1024, page_size, torch.bfloat16, LATENT, ROPE, 2, "cpu", False)
    for buffer in pool.kv_buffer:
        buffer.fill_(torch.nan)
    runner.token_to_kv_pool = pool
    return runner


def make_backend(runner, batch):
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    backend = ATTENTION_BACKENDS["cute_kernels"](runner)
    backend.init_forward_metadata(batch)
    return backend


def normal(*shape):
    return torch.randn(shape).to(torch.bfloat16)


def starts_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_layer(configured, recorded, monkeypatch, batch, page_size):
    from sglang.srt.layers.radix_attention import RadixAttention

    from cute_kernels.integrations.sglang import backend as module

    torch.manual_seed(0)
    calls = engine_calls.record(module, monkeypatch)
    queries, keys = BATCHES[batch]
    runner = make_runner(page_size)
    forward, slots = sglang_engine.make_batch(runner, queries, keys)
    rows = [normal(n, 1, LATENT + ROPE) for n in keys]
    old = [key - query for query, key in zip(queries, keys, strict=True)]
    for of_request, places, n in zip(rows, slots, old, strict=True):
        runner.token_to_kv_pool.kv_buffer[1][places[:n]] = of_request[:n]
    new = torch.cat([x[n:] for x, n in zip(rows, old, strict=True)])
    latents, ropes = new.split([LATENT, ROPE], -1)
    q, q_rope = normal(sum(queries), HEADS, LATENT), normal(sum(queries), HEADS, ROPE)
    layer = RadixAttention(HEADS, LATENT + ROPE, 0.06, 1, layer_id=1, v_head_dim=LATENT)
    backend = make_backend(runner, forward)
    with torch.inference_mode():
        out = backend.forward(
            q.flatten(1), latents, latents, layer, forward, q_rope=q_rope, k_rope=ropes
        )
    (call,) = calls
    recorded.append(call)
    values = [x[..., :LATENT] for x in rows]
    whole, starts = torch.cat([q, q_rope], -1), starts_of(queries)
    lse = lse_of(whole, starts, rows)
    out = out.view(-1, HEADS, LATENT)
    assert_attention_right(out, lse, whole, starts, rows, values, softmax_scale=0.06, causal=True)


def lse_of(q, starts, rows):
    """What SGLang does not ask for."""
    lses = []
    for (first, last), keys in zip(itertools.pairwise(starts.tolist()), rows, strict=True):
        scores = 0.06 * torch.einsum("qhd,kd->hqk", q[first:last].double(), keys[:, 0].double())
        hidden = torch.ones(scores.shape[1:]).triu(scores.shape[2] - scores.shape[1] + 1).bool()
        lses.append(scores.masked_fill(hidden, -torch.inf).logsumexp(-1))
    return torch.cat(lses, 1).float()


def test_a_prompt(configured, recorded, monkeypatch):
    """Its tokens among each other, then attending to a part of those before them."""
    from sglang.srt.layers.radix_attention import RadixAttention

    from cute_kernels.integrations.sglang import backend as module

    torch.manual_seed(0)
    calls = engine_calls.record(module, monkeypatch)
    queries, before = [33, 80], [50, 17]
    keys = [a + b for a, b in zip(queries, before, strict=True)]
    runner = make_runner(64)
    forward, _ = sglang_engine.make_batch(runner, queries, keys)
    backend = make_backend(runner, forward)
    layer = RadixAttention(HEADS, 192, 0.07, HEADS, layer_id=1, v_head_dim=128)
    forward.mha_return_lse, forward.mha_one_shot = True, False
    forward.prefix_chunk_idx, forward.prefix_chunk_cu_seq_lens = 0, [starts_of(before)]
    forward.prefix_chunk_max_seq_lens = [max(before)]
    q, starts = normal(sum(queries), HEADS, 192), starts_of(queries)
    for to_prefix, lengths in ((False, queries), (True, before)):
        forward.attn_attend_prefix_cache = to_prefix
        k, v = (normal(sum(lengths), HEADS, n) for n in (192, 128))
        with torch.inference_mode():
            out, lse = backend.forward(
                q.flatten(1), k.flatten(1), v.flatten(1), layer, forward, save_kv_cache=False
            )
        out = out.view(-1, HEADS, 128)
        of_requests = [x.split(lengths) for x in (k, v)]
        options = {"softmax_scale": 0.07, "causal": not to_prefix}
        assert_attention_right(out, lse.T, q, starts, *of_requests, **options)
    assert [call["function"] for call in calls] == 2 * ["flash_attn_varlen_func"]
    recorded.extend(calls)


def test_models_are_told(configured):
    """Models ask for a backend's name, whether q and its rope columns are to be apart."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers
    from sglang.srt.models.deepseek_common import utils

    runner = make_runner(64)
    for _ in range(2):
        make_backend(runner, sglang_engine.make_batch(runner, [1], [9])[0])
    handler = handlers.AttentionBackendRegistry.get_handler("cute_kernels")
    assert handler is handlers.handle_attention_fa3
    assert utils.FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.count("cute_kernels") == 1


def test_caches_of_8_bits_are_refused(configured):
    from cute_kernels.integrations.sglang.backend import CuteKernelsBackend

    for dtype, name in (
        (sglang_engine.E4M3, "fp8_e4m3"),
        (sglang_engine.E4M3, "mxfp8"),
        (torch.float8_e5m2, "fp8_e5m2"),
    ):
        runner = make_runner(64, kv_cache_dtype=dtype, kv_cache_dtype_str=name)
        message = f"{name}, of {dtype}, must be auto or bfloat16 with latent attention"
        with pytest.raises(NotImplementedError, match=message):
            CuteKernelsBackend(runner)
