"""SGLang's backend: its plugin, registry, metadata and layers' calls, with the real package where
that is installed; the calls that it makes, recorded, everywhere.

    CUTE_KERNELS_RECORD=1 python -m pytest tests/test_integrations_sglang.py   records them anew
"""

import functools
import importlib.metadata
import os
import random
import sys
import types

import engine_calls
import pytest
import torch
from engine_calls import assert_output_right, assert_replayed

E4M3 = torch.float8_e4m3fn
RECORDED = engine_calls.load("sglang")["calls"]


@pytest.mark.parametrize("call", RECORDED, ids=range(len(RECORDED)))
def test_recorded_calls(device, call):
    assert_replayed(call, device)


def test_sglang_finds_the_plugin():
    (found,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="cute_kernels")
    from cute_kernels.integrations import sglang

    assert found.load() is sglang.register


@pytest.fixture(scope="module")
def sglang():
    """The package, with the plugin loaded as its own processes do."""
    if not torch.cuda.is_available():  # its kernels do not load, and are not needed
        kernels = types.ModuleType("sgl_kernel")
        kernels.merge_state_v2 = None
        kernels.flash_attn = attention = types.ModuleType("sgl_kernel.flash_attn")
        for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata"):
            setattr(attention, name, None)
        sys.modules.setdefault("sgl_kernel", kernels)
        sys.modules.setdefault("sgl_kernel.flash_attn", attention)
    plugins = pytest.importorskip("sglang.srt.plugins", reason="needs SGLang 0.5.23 or newer")
    from cute_kernels.integrations.sglang import unregister

    plugins.load_plugins()
    yield
    unregister()


def test_registration_is_undone(sglang):
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from cute_kernels.integrations.sglang import NAME, register, unregister

    def state():
        return list(ATTENTION_BACKENDS), list(ATTENTION_BACKEND_CHOICES)

    assert NAME in state()[0] and NAME in state()[1]
    unregister()
    unregister()
    before = state()
    assert NAME not in before[0] and NAME not in before[1]
    for _ in range(2):
        register()
        register()
        assert state() == tuple([*x, NAME] for x in before)
        unregister()
        assert state() == before
    register()


@pytest.fixture(scope="module")
def recorded():
    """All calls of this module, which replace the recorded ones if the environment asks for it."""
    calls = []
    yield calls
    if os.environ.get("CUTE_KERNELS_RECORD") == "1":
        version = importlib.metadata.version("sglang")
        engine_calls.save("sglang", version, calls)


@pytest.fixture
def configured(sglang, monkeypatch):
    """What SGLang's server would have set, of what the backend asks for."""
    from sglang.srt.layers.attention import flashattention_backend as module

    values = {
        "get_parallel": {
            "attn_cp_size": 1,
            "attn_tp_size": 1,
            "enable_prefill_cp": False,
            "attn_dp_enabled": False,
        },
        "get_spec": {
            "speculative_eagle_topk": 0,
            "speculative_num_draft_tokens": None,
            "speculative_algorithm": None,
        },
        "get_exec": {"deterministic": types.SimpleNamespace(enable_deterministic_inference=False)},
        "get_model": {"is_embedding": False},
        "get_schedule": {"chunked_prefill_size": 8192},
        "get_memory": {"disable_radix_cache": False},
    }
    for name, of_name in values.items():
        answer = types.SimpleNamespace(**of_name)
        monkeypatch.setattr(module, name, functools.partial(lambda x: x, answer))
    monkeypatch.setattr(module, "get_device_capability", lambda: (9, 0))


def make_runner(page_size, key_heads=2, dtype=torch.bfloat16, **changed):
    """What the backend reads of SGLang's model runner, with its own pools."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool

    config = types.SimpleNamespace(
        is_encoder_decoder=False,
        context_len=256,
        attention_arch=AttentionArch.MHA,
        is_local_attention_model=False,
        head_dim=64,
        hf_text_config=types.SimpleNamespace(num_attention_heads=4),
        get_num_kv_heads=lambda _: key_heads,
    )
    pool = MHATokenToKVPool(1024, page_size, dtype, key_heads, 64, 2, "cpu", False)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.view(dtype).fill_(torch.nan)
    return types.SimpleNamespace(
        **{
            "use_mla_backend": False,
            "sliding_window_size": None,
            "model_config": config,
            "device": "cpu",
            "req_to_token_pool": ReqToTokenPool(8, 256, "cpu", False),
            "token_to_kv_pool": pool,
            "kv_cache_dtype": dtype,
            "kv_cache_dtype_str": "fp8_e4m3" if dtype == E4M3 else "auto",
            "page_size": page_size,
            "kv_index_translator": types.SimpleNamespace(is_translating=False),
            "is_draft_worker": False,
            **changed,
        }
    )


class Batch:
    """Requests' tokens, in a runner's pools but for the new ones."""

    def __init__(self, runner, queries, keys, key_heads, scales=(None, None)):
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        chance = random.Random(len(keys))
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(torch.bfloat16)

        tokens, size = sum(queries), runner.page_size
        self.q = normal(tokens, 4 * 64)
        self.k, self.v = ([normal(n, key_heads, 64) for n in keys] for _ in "kv")
        dtype, factors = runner.kv_cache_dtype, [1.0 if x is None else float(x) for x in scales]
        for of_requests, factor in zip((self.k, self.v), factors, strict=True):
            of_requests[:] = [
                ((x / factor).to(dtype).float() * factor).bfloat16() for x in of_requests
            ]
        pages = iter(chance.sample(range(1, 1024 // size), 1024 // size - 1))
        pool, new = runner.token_to_kv_pool, []
        indices = torch.arange(1, len(keys) + 1)
        for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
            own = torch.tensor([next(pages) for _ in range(-(-key // size))])
            rows = torch.arange(key)
            slots = own[rows // size] * size + rows % size
            runner.req_to_token_pool.req_to_token[indices[i], :key] = slots.int()
            old = key - query
            written = zip((pool.k_buffer, pool.v_buffer), (self.k, self.v), factors, strict=True)
            for buffers, of_requests, factor in written:
                old_rows = (of_requests[i][:old].float() / factor).to(dtype)
                buffers[1].view(dtype)[slots[:old]] = old_rows
            new.append(slots[old:])
        decode = all(query == 1 for query in queries)
        lengths, extended = torch.tensor(keys), torch.tensor(queries)
        self.forward = ForwardBatch(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            batch_size=len(keys),
            input_ids=torch.zeros(tokens, dtype=torch.int64),
            req_pool_indices=indices,
            seq_lens=lengths,
            out_cache_loc=torch.cat(new),
            seq_lens_sum=sum(keys),
            seq_lens_cpu=lengths,
            extend_num_tokens=tokens,
            extend_seq_lens=extended,
            extend_prefix_lens=lengths - extended,
            extend_seq_lens_cpu=queries,
            extend_prefix_lens_cpu=[a - b for a, b in zip(keys, queries, strict=True)],
        )

    def new(self, of_requests, queries):
        ends = zip(of_requests, queries, strict=True)
        return torch.cat([x[len(x) - query :] for x, query in ends])


BATCHES = {  # queries and keys of each request
    "prefill": ([33, 1, 80], [33, 1, 80]),
    "decode": ([1, 1, 1, 1], [1, 63, 64, 200]),
    "mixed": ([1, 40, 1, 7], [90, 40, 17, 130]),
}
LAYERS = {
    "plain": {},
    "window": {"sliding_window_size": 23},
    "softcap": {"logit_cap": 5.0},
    "sinks": {},
    "one key head": {"num_kv_heads": 1},
    "fp8": {},
    "fp8 without scales": {"sliding_window_size": 23},
}
SCALES = {"fp8": (torch.tensor(0.5), torch.tensor(2.0))}  # powers of 2, so that nothing is rounded
CASES = [(batch, "plain", size) for batch in BATCHES for size in (1, 16)]
CASES += [(batch, layer, 16) for batch in ("decode", "mixed") for layer in list(LAYERS)[1:]]


@pytest.mark.parametrize(("batch", "layer", "page_size"), CASES)
def test_a_layer(configured, recorded, monkeypatch, batch, layer, page_size):
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.radix_attention import RadixAttention

    from cute_kernels.integrations.sglang import backend as module

    calls = engine_calls.record(module, monkeypatch)
    options = {"num_kv_heads": 2, **LAYERS[layer]}
    key_heads = options["num_kv_heads"]
    runner = make_runner(page_size, key_heads, E4M3 if "fp8" in layer else torch.bfloat16)
    queries, keys = BATCHES[batch]
    scales = SCALES.get(layer, (None, None))
    problem = Batch(runner, queries, keys, key_heads, scales)
    backend = ATTENTION_BACKENDS["cute_kernels"](runner)
    backend.init_forward_metadata(problem.forward)
    attention = RadixAttention(4, 64, 0.1, layer_id=1, **options)
    attention.k_scale, attention.v_scale = scales
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if layer == "sinks" else None
    new = [problem.new(x, queries) for x in (problem.k, problem.v)]
    with torch.inference_mode():
        given = {} if sinks is None else {"sinks": sinks}
        out = backend.forward(problem.q, *new, attention, problem.forward, **given)
    (call,) = calls
    recorded.append(call)
    assert_output_right(
        out.view(-1, 4, 64),
        problem.q.view(-1, 4, 64),
        torch.tensor([0, *queries]).cumsum(0).int(),
        problem.k,
        problem.v,
        softmax_scale=0.1,
        causal=True,
        window_size=(options.get("sliding_window_size", -1), 0),
        softcap=options.get("logit_cap", 0.0),
        sinks=sinks,
    )


def test_what_the_backend_lacks_is_refused(configured):
    from cute_kernels.integrations.sglang import backend as module

    with pytest.raises(NotImplementedError, match="absorbed latent attention"):
        module.CuteKernelsBackend(make_runner(16, use_mla_backend=True))
    for dtype, name in ((torch.float8_e5m2, "fp8_e5m2"), (E4M3, "mxfp8")):
        runner = make_runner(16, kv_cache_dtype=dtype, kv_cache_dtype_str=name)
        with pytest.raises(NotImplementedError, match=f"--kv-cache-dtype is {name}, of {dtype}, "):
            module.CuteKernelsBackend(runner)
    for name in ("qv", "score_mod", "mask_mod", "rel_bias"):
        with pytest.raises(NotImplementedError, match=f"{name} is given: caches have none here"):
            module.attend_to_cache(
                *[None] * 3,
                page_table=None,
                cache_seqlens=None,
                cu_seqlens_q=None,
                max_seqlen_q=1,
                **{name: torch.ones(1)},
            )


def test_a_function_that_calls_another_way_is_noticed(sglang):
    from cute_kernels.integrations.sglang import backend as module

    def forward():
        return elsewhere()  # noqa: F821

    assert module._with(forward, elsewhere=lambda: 3)() == 3
    with pytest.raises(RuntimeError, match=r"forward calls no \{'attend'\}"):
        module._with(forward, attend=lambda: 3)
