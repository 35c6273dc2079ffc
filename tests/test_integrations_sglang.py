"""SGLang's backend: its plugin, registry, metadata and layers' calls, with the real package where
that is installed; the calls that it makes, recorded, everywhere.

    CUTE_KERNELS_RECORD=1 python -m pytest tests/test_integrations_sglang.py   records them anew
"""

import importlib.metadata

import engine_calls
import pytest
import sglang_engine
import torch
from engine_calls import assert_output_right, assert_replayed
from sglang_engine import make_runner

E4M3 = torch.float8_e4m3fn
RECORDED = engine_calls.load("sglang")


@pytest.mark.parametrize("call", RECORDED, ids=range(len(RECORDED)))
def test_recorded_calls(device, call):
    assert_replayed(call, device)


def test_sglang_finds_the_plugin():
    (found,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="cute_kernels")
    from cute_kernels.integrations import sglang

    assert found.load() is sglang.register


@pytest.fixture(scope="module")
def sglang():
    yield from sglang_engine.loaded()


def test_registration_is_undone(sglang):
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from cute_kernels.integrations.sglang import NAME, register, unregister

    def state():
        of_prompts = choices.CHUNKED_PREFIX_CACHE_SUPPORTED_ATTENTION_BACKENDS
        names = (ATTENTION_BACKENDS, choices.ATTENTION_BACKEND_CHOICES, of_prompts)
        return tuple(map(list, names))

    assert all(NAME in names for names in state())
    unregister()
    unregister()
    before = state()
    assert not any(NAME in names for names in before)
    for _ in range(2):
        register()
        register()
        assert state() == tuple([*x, NAME] for x in before)
        unregister()
        assert state() == before
    register()


@pytest.fixture(scope="module")
def recorded():
    yield from engine_calls.recorded("sglang", "sglang")


@pytest.fixture
def configured(sglang, monkeypatch):
    sglang_engine.configure(monkeypatch)


class Batch:
    """Requests' tokens, in a runner's pools but for the new ones."""

    def __init__(self, runner, queries, keys, key_heads, scales=(None, None)):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(torch.bfloat16)

        self.q = normal(sum(queries), 4 * 64)
        self.k, self.v = ([normal(n, key_heads, 64) for n in keys] for _ in "kv")
        dtype, factors = runner.kv_cache_dtype, [1.0 if x is None else float(x) for x in scales]
        for of_requests, factor in zip((self.k, self.v), factors, strict=True):
            of_requests[:] = [
                ((x / factor).to(dtype).float() * factor).bfloat16() for x in of_requests
            ]
        pool = runner.token_to_kv_pool
        self.forward, slots = sglang_engine.make_batch(runner, queries, keys)
        for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
            old = key - query
            written = zip((pool.k_buffer, pool.v_buffer), (self.k, self.v), factors, strict=True)
            for buffers, of_requests, factor in written:
                old_rows = (of_requests[i][:old].float() / factor).to(dtype)
                buffers[1].view(dtype)[slots[i][:old]] = old_rows

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

    for dtype, name in ((torch.float8_e5m2, "fp8_e5m2"), (E4M3, "mxfp8")):
        runner = make_runner(16, kv_cache_dtype=dtype, kv_cache_dtype_str=name)
        with pytest.raises(NotImplementedError, match=f"--kv-cache-dtype is {name}, of {dtype}, "):
            module.CuteKernelsBackend(runner)
    for name in ("score_mod", "mask_mod", "rel_bias"):
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
