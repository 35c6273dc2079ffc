"""vLLM's backend: its plugin, registry, selector, metadata builder and layers' calls, with the real
package where it is installed; the calls that it makes, recorded, everywhere.

    CUTE_KERNELS_RECORD=1 python -m pytest tests/test_integrations_vllm.py     records them anew
"""

import importlib.metadata
import random
import types

import engine_calls
import pytest
import torch
import vllm_engine
from engine_calls import assert_output_right, assert_replayed

from cute_kernels import tile_configs

RECORDED = engine_calls.load("vllm")


@pytest.mark.parametrize("call", RECORDED, ids=range(len(RECORDED)))
def test_recorded_calls(device, call):
    assert_replayed(call, device)


def test_vllm_finds_the_plugin():
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="cute_kernels")
    from cute_kernels.integrations import vllm

    assert found.load() is vllm.register


@pytest.fixture(scope="module")
def vllm():
    yield from vllm_engine.loaded()


def names_of_backends():
    from vllm.v1.attention.backends import registry
    from vllm.v1.attention.backends.mla.prefill import registry as of_prompts

    state = []
    for names, overrides in (
        (registry.AttentionBackendEnum, registry._ATTN_OVERRIDES),
        (of_prompts.MLAPrefillBackendEnum, of_prompts._MLA_PREFILL_OVERRIDES),
    ):
        state.append((list(names.__members__), list(names._value2member_map_), list(overrides)))
    return state


def test_registration_is_undone(vllm):
    from cute_kernels.integrations.vllm import LATENT_NAME, NAME, register, unregister

    unregister()
    unregister()
    before = names_of_backends()
    assert NAME not in before[0][0]
    for _ in range(2):
        register()
        register()
        names = [of_registry[0] for of_registry in names_of_backends()]
        assert names == [[*before[0][0], NAME, LATENT_NAME], [*before[1][0], NAME]]
        unregister()
        assert names_of_backends() == before
    register()


def test_the_selector_takes_the_backend_or_says_why_not(vllm):
    from vllm.v1.attention.selector import AttentionSelectorConfig

    fits = AttentionSelectorConfig(128, torch.bfloat16, "auto", 16)
    taken = [
        {},
        {"dtype": torch.float16, "head_size": 72, "block_size": None},
        {"has_sink": True, "has_sliding_window": True},
        {"attn_type": "encoder_only"},
        {"use_non_causal": True},
    ]
    refused = []
    of_fp8 = [
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype": "fp8_e4m3", "use_per_head_quant_scales": True},
    ]
    if any(row["head_dim"] >= 128 for row in tile_configs("decode_fp8")):
        taken += of_fp8
    else:
        refused = [(changed, "this build has no kernel for caches of fp8") for changed in of_fp8]
    refused += [
        ({"head_size": 264}, "head_size"),
        ({"dtype": torch.float32}, "dtype"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "fp8_per_token_head"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "fp8", "head_size": 72}, "a head_size that is a multiple of 16"),
        ({"block_size": 8}, "block_size"),
        ({"use_mla": True}, "MLA"),
        ({"use_dcp": True}, "DCP"),
        ({"use_pcp": True}, "PCP"),
        ({"use_mm_prefix": True}, "partial multimodal"),
        ({"use_batch_invariant": True}, "batch invariance"),
    ]
    vllm_engine.assert_selected("CUTE_KERNELS", "backend.CuteKernelsBackend", fits, taken, refused)


def write_to_slots(key, value, key_cache, value_cache, slot_mapping, dtype, k_scale, v_scale):
    """What vLLM's kernel of this purpose does, which is not there on the CPU."""
    size = key_cache.shape[1]
    for x, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        for row, slot in enumerate(slot_mapping.tolist()):
            if slot < 0:
                continue
            if dtype.startswith("fp8"):
                assert cache.dtype == torch.uint8
                numbers = (x[row].float() / scale.view(-1, 1)).to(torch.float8_e4m3fn)
                cache.view(torch.float8_e4m3fn)[slot // size, slot % size] = numbers
            else:
                cache[slot // size, slot % size] = x[row]


BATCHES = {  # queries and keys of each request
    "prefill": ([33, 1, 80], [33, 1, 80]),
    "decode": ([1, 1, 1, 1], [1, 63, 64, 200]),
    "mixed": ([1, 40, 1, 7], [90, 40, 17, 130]),
    "padded": ([1, 1, 0, 0], [70, 16, 0, 0]),
    "speculative": ([4, 4, 4], [50, 4, 129]),
}
LAYERS = {
    "plain": {},
    "window": {"sliding_window": 24},
    "softcap": {"logits_soft_cap": 5.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "one key head": {"num_kv_heads": 1},
    "fp8": {"kv_cache_dtype": "fp8"},
    "fp8 by heads": {"kv_cache_dtype": "fp8_e4m3", "sliding_window": 24},
}
SCALES = {"fp8": (torch.tensor(0.5), torch.tensor(2.0))}  # powers of 2, so that nothing is rounded
SCALES["fp8 by heads"] = tuple(torch.tensor(x) for x in ([0.25, 2.0], [0.5, 1.0]))
CASES = [(batch, "plain", "LBNHC") for batch in BATCHES]
CASES += [("mixed", layer, "LBNHC") for layer in list(LAYERS)[1:]]
CASES += [("decode", "sinks", "LBHNC"), ("decode", "fp8", "LBHNC"), ("prefill", "fp8", "BHLNC")]
CASES += [("mixed", "plain", layout) for layout in ("LBHNC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")]


@pytest.fixture(scope="module")
def recorded():
    yield from engine_calls.recorded("vllm", "vllm")


class Batch:
    """Requests' tokens, their metadata as vLLM's builder gets it, and a cache."""

    def __init__(self, chance, queries, keys, layout, key_heads=2, scales=None):
        head_size, block_size = 64, 16
        from vllm.v1.attention.backend import CommonAttentionMetadata
        from vllm.v1.kv_cache_layout import KVCacheLayout

        self.queries, self.keys = queries, keys
        requests, tokens = len(queries), sum(queries)
        generator = torch.Generator().manual_seed(chance.randrange(2**31))

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(torch.bfloat16)

        self.q = normal(tokens + 3, 4, head_size)  # with rows that no request has
        self.k, self.v = ([normal(n, key_heads, head_size) for n in keys] for _ in "kv")
        dtype = torch.bfloat16 if scales is None else torch.float8_e4m3fn
        factors = [torch.ones(1, 1) if scales is None else x.view(-1, 1) for x in scales or "kv"]
        for of_requests, factor in zip((self.k, self.v), factors, strict=True):
            of_requests[:] = [
                ((x.float() / factor).to(dtype).float() * factor).bfloat16() for x in of_requests
            ]
        blocks = -(-256 // block_size)
        table = torch.tensor(chance.sample(range(1, requests * blocks + 1), requests * blocks))
        table = table.int().view(requests, blocks)
        slots = [
            table[i, j // block_size] * block_size + j % block_size
            for i in range(requests)
            for j in range(keys[i] - queries[i], keys[i])
        ]
        starts = torch.tensor([0, *queries]).cumsum(0).int()
        self.common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(keys, dtype=torch.int32),
            num_reqs=requests,
            num_actual_tokens=tokens,
            max_query_len=max(queries),
            max_seq_len=max(keys),
            block_table_tensor=table,
            slot_mapping=torch.tensor(slots),
        )
        # Of two layers: this is the second.
        logical = (2, requests * blocks + 1, key_heads, block_size, 2 * head_size)
        order = KVCacheLayout[layout].stride_order
        whole = torch.full([logical[i] for i in order], torch.nan, dtype=dtype)
        cache = whole.permute([order.index(i) for i in range(5)])[1]
        parts = cache.transpose(1, 2).split(head_size, -1)
        for i, (query, key) in enumerate(zip(queries, keys, strict=True)):
            rows = torch.arange(key - query)  # those of this batch are written by the layer
            place = table[i, rows // block_size].long(), rows % block_size
            for part, of_requests, factor in zip(parts, (self.k, self.v), factors, strict=True):
                part[place] = (of_requests[i][: key - query].float() / factor).to(dtype)
        self.kv_cache = cache if scales is None else cache.view(torch.uint8)

    def new(self, of_requests):
        """Of keys or values, those of the batch's tokens, and some rows more."""
        ends = zip(of_requests, self.queries, strict=True)
        new = torch.cat([x[len(x) - query :] for x, query in ends])
        return torch.cat([new, new.new_full((3, *new.shape[1:]), torch.nan)])


@pytest.mark.parametrize(("batch", "layer", "layout"), CASES)
def test_a_layer(vllm, recorded, monkeypatch, batch, layer, layout):
    from vllm import _custom_ops
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from cute_kernels.integrations.vllm import backend

    monkeypatch.setattr(_custom_ops, "reshape_and_cache_flash", write_to_slots)
    calls = engine_calls.record(backend, monkeypatch)
    chosen = AttentionBackendEnum["CUTE_KERNELS"].get_class()
    options = {"num_kv_heads": 2, **LAYERS[layer]}
    key_heads = options["num_kv_heads"]
    scales = SCALES.get(layer)
    problem = Batch(random.Random(f"{batch} {layer}"), *BATCHES[batch], layout, key_heads, scales)
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=key_heads, head_size=64, dtype=torch.bfloat16
    )
    builder = chosen.get_builder_cls()(spec, ["layer"], None, torch.device("cpu"))
    metadata = builder.build(0, problem.common)
    impl = chosen.get_impl_cls()(num_heads=4, head_size=64, scale=0.1, **options)
    k_scale, v_scale = scales or (torch.ones(()), torch.ones(()))
    scales = types.SimpleNamespace(_k_scale=k_scale, _v_scale=v_scale)
    output = torch.full_like(problem.q, 7.0)
    key, value = problem.new(problem.k), problem.new(problem.v)
    with torch.inference_mode():
        impl.do_kv_cache_update(scales, key, value, problem.kv_cache, metadata.slot_mapping)
        returned = impl.forward(scales, problem.q, key, value, problem.kv_cache, metadata, output)
    assert returned is output and (output[metadata.num_actual_tokens :] == 7.0).all()
    (call,) = calls
    recorded.append(call)
    found = output[: metadata.num_actual_tokens]
    assert_output_right(
        found,
        problem.q[: metadata.num_actual_tokens],
        metadata.query_start_loc,
        problem.k,
        problem.v,
        softmax_scale=0.1,
        causal=True,
        window_size=(options.get("sliding_window", 0) - 1, 0),
        softcap=options.get("logits_soft_cap", 0.0),
        sinks=options.get("sinks"),
    )


@pytest.mark.parametrize("window", [None, 24])
def test_some_requests_are_causal(vllm, window):
    """A diffusion model's drafts see one another."""
    from cute_kernels.integrations.vllm import backend

    problem = Batch(random.Random(0), *BATCHES["mixed"], "LBNHC")
    causal = [True, False, False, True]
    common = problem.common.replace(causal=torch.tensor(causal, dtype=torch.int32))
    metadata = backend.CuteKernelsBuilder(None, [], None, None).build(0, common)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    impl = backend.CuteKernelsImpl(4, 64, 0.1, 2, sliding_window=window, sinks=sinks)
    key, value = problem.new(problem.k), problem.new(problem.v)
    parts = impl._parts(problem.kv_cache)
    write_to_slots(key, value, *parts, metadata.slot_mapping, "auto", None, None)
    output = torch.full_like(problem.q, 7.0)
    impl.forward(None, problem.q, key, value, problem.kv_cache, metadata, output)
    starts = metadata.query_start_loc
    assert (output[starts[-1] :] == 7.0).all()
    for i, is_causal in enumerate(causal):
        rows = slice(starts[i], starts[i + 1])
        left = -1 if window is None else window - 1
        assert_output_right(
            *(output[rows], problem.q[rows], starts[i : i + 2] - starts[i]),
            *([problem.k[i]], [problem.v[i]]),
            softmax_scale=0.1,
            causal=is_causal,
            window_size=(left, 0 if is_causal else left),
            sinks=sinks,
        )


@pytest.mark.parametrize("window", [None, 8])
def test_an_encoder_layer(vllm, recorded, monkeypatch, window):
    from cute_kernels.integrations.vllm import backend

    calls = engine_calls.record(backend, monkeypatch)
    problem = Batch(random.Random(0), *BATCHES["prefill"], "LBHNC")
    metadata = backend.CuteKernelsBuilder(None, [], None, None).build(0, problem.common)
    impl = backend.CuteKernelsImpl(4, 64, 0.1, 2, sliding_window=window, attn_type="encoder_only")
    output = torch.full_like(problem.q, 7.0)
    key, value = problem.new(problem.k), problem.new(problem.v)
    impl.do_kv_cache_update(None, key, value, problem.kv_cache, metadata.slot_mapping)
    impl.forward(None, problem.q, key, value, problem.kv_cache, metadata, output)
    assert problem.kv_cache.isnan().all() and (output[metadata.num_actual_tokens :] == 7.0).all()
    (call,) = calls
    recorded.append(call)
    limits = (-1, -1) if window is None else (window - 1, window - 1)
    starts = metadata.query_start_loc
    assert_output_right(
        *(output[: starts[-1]], problem.q[: starts[-1]], starts, problem.k, problem.v),
        softmax_scale=0.1,
        window_size=limits,
    )


def test_what_the_backend_lacks_is_refused(vllm):
    from cute_kernels.integrations.vllm import backend

    impl = backend.CuteKernelsImpl
    with pytest.raises(NotImplementedError, match="ALiBi here, choose another backend"):
        impl(4, 64, 0.1, alibi_slopes=[1.0] * 4)
    with pytest.raises(NotImplementedError, match="kv_cache_dtype is 'fp8_e5m2'"):
        impl(4, 64, 0.1, kv_cache_dtype="fp8_e5m2")
    output = torch.ones(5, 4, 64)
    layer = impl(4, 64, 0.1)
    assert not layer.forward(None, output, None, None, None, None, output).any()
    with pytest.raises(NotImplementedError, match="outputs have 16 bits"):
        layer.forward(*[None] * 6, output, output_scale=torch.ones(()))
