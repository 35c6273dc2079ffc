"""Calls that serving engines make of this package, as data: recorded where the engine is installed,
run again where it is not.

A tensor is recorded by shape, strides, offset and the storage that it is a part of; what integers
and descales hold is recorded too, the rest is random.
"""

import importlib.metadata
import inspect
import itertools
import json
import math
import os
from pathlib import Path

import eight_bits
import latent
import torch
from caches import assert_attention_right

from cute_kernels import flash_attn_varlen_func, flash_attn_with_kvcache

DATA = Path(__file__).resolve().parent / "data"
FUNCTIONS = {f.__name__: f for f in (flash_attn_with_kvcache, flash_attn_varlen_func)}


def load(name):
    return json.loads((DATA / f"{name}_calls.json").read_text())["calls"]


def recorded(name, package):
    """All calls of a module of tests, which replace the recorded ones if the environment asks for
    it."""
    calls = []
    yield calls
    if os.environ.get("CUTE_KERNELS_RECORD") == "1":
        version = importlib.metadata.version(package)
        lines = ",\n".join(map(json.dumps, calls))
        text = f'{{"version": {json.dumps(version)}, "calls": [\n{lines}\n]}}\n'
        (DATA / f"{name}_calls.json").write_text(text)


def record(module, monkeypatch):
    """What a module calls from now on is done, and put into the list that is returned."""
    calls = []

    def recorded(function):
        def call(*inputs, **options):
            given = inspect.signature(function).bind(*inputs, **options).arguments
            storages = {}
            arguments = {name: describe(name, x, storages) for name, x in given.items()}
            calls.append({"function": function.__name__, "arguments": arguments})
            return function(*inputs, **options)

        return call

    for name, function in FUNCTIONS.items():
        monkeypatch.setattr(module, name, recorded(function))
    return calls


def describe(name, value, storages):
    if not isinstance(value, torch.Tensor):
        return list(value) if isinstance(value, tuple) else value
    storage = value.untyped_storage()
    number = storages.setdefault(storage.data_ptr(), len(storages))
    tensor = {
        "shape": list(value.shape),
        "strides": list(value.stride()),
        "offset": value.storage_offset(),
        "dtype": str(value.dtype).removeprefix("torch."),
        "storage": [number, storage.nbytes() // value.element_size()],
    }
    if not value.dtype.is_floating_point or name.endswith("_descale"):
        tensor["values"] = value.tolist()
    return {"tensor": tensor}


def arguments_of(call, device):
    """A recorded call's, with what floats hold made anew."""
    generator = torch.Generator(device).manual_seed(0)
    storages = {}

    def made(value):
        if not isinstance(value, dict):
            return tuple(value) if isinstance(value, list) else value
        tensor = value["tensor"]
        dtype = getattr(torch, tensor["dtype"])
        number, size = tensor["storage"]
        if number not in storages:
            data = torch.zeros(size, dtype=dtype, device=device)
            if dtype.is_floating_point:
                data = torch.randn(size, generator=generator, device=device).to(dtype)
            storages[number] = data
        whole = storages[number]
        view = whole.as_strided(tensor["shape"], tensor["strides"], tensor["offset"])
        if "values" in tensor:
            values = torch.tensor(tensor["values"], dtype=dtype).view(tensor["shape"])
            once = tuple(slice(None if stride else 1) for stride in view.stride())
            view[once].copy_(values[once])
        return view

    return {name: made(value) for name, value in call["arguments"].items()}


def assert_replayed(call, device):
    """Runs a recorded call: every row against fp64, what it should not read being NaN."""
    given = arguments_of(call, device)
    paged = call["function"] == "flash_attn_with_kvcache"
    if paged and given["k_cache"].dtype == eight_bits.E4M3:
        eight_bits.skip_unless_built(device, given["q"].shape[-1:])
    if "qv" in given:
        latent.skip_unless_built(device, given["q"].dtype)
    out, starts = given.get("out"), given["cu_seqlens_q"]
    if paged:
        k, v = of_sequences(given)
    else:
        ends = given["cu_seqlens_k"].tolist()
        rows = [slice(*pair) for pair in itertools.pairwise(ends)]
        k, v = ([given[name][part].clone() for part in rows] for name in "kv")
    options = {
        name: given[name]
        for name in ("softmax_scale", "causal", "window_size", "softcap", "sinks")
        if name in given
    }
    with_lse = {"return_softmax_lse" if paged else "return_lse": True}
    result, lse = FUNCTIONS[call["function"]](**{**given, **with_lse})
    if out is not None:
        assert result.data_ptr() == out.data_ptr() and result.shape == out.shape
        assert torch.equal(result, out)
    q = given["q"]
    if "qv" in given:  # values are keys too
        q = torch.cat([q, given["qv"]], -1)
        k = [torch.cat(pair, -1) for pair in zip(k, v, strict=True)]

    def descale(which):
        found = given.get(f"{which}_descale")
        return torch.ones(len(k), 1, device=q.device) if found is None else found

    if paged and given["k_cache"].dtype == eight_bits.E4M3:
        k, v = (
            [x.double() * factor[:, None] for x, factor in zip(numbers, factors, strict=True)]
            for numbers, factors in ((k, descale("k")), (v, descale("v")))
        )
        problem = eight_bits.Problem(None, q, starts, {}, k, v, q.double())
        problem.assert_right(result, lse, **options)
    else:
        assert_attention_right(result, lse, q, starts, k, v, **options)


def of_sequences(given):
    """Each sequence's keys and values; all else in the caches is made NaN."""
    k_cache, v_cache = given["k_cache"], given["v_cache"]
    size, places = k_cache.shape[1], []
    for table, length in zip(given["page_table"], given["cache_seqlens"].tolist(), strict=True):
        rows = torch.arange(length, device=table.device)
        places.append((table[rows // size].long(), rows % size))
    found = [[cache[place].clone() for place in places] for cache in (k_cache, v_cache)]
    for cache, of_cache in zip((k_cache, v_cache), found, strict=True):
        cache.fill_(math.nan)
        for place, rows in zip(places, of_cache, strict=True):
            cache[place] = rows
    return found


def assert_output_right(out, q, cu_seqlens_q, k, v, **options):
    """An engine's output against fp64; of a call that asked for no LSE."""
    ends = torch.tensor([0, *(len(x) for x in k)]).cumsum(0).int()
    packed = [torch.cat(x) for x in (k, v)]
    _, lse = flash_attn_varlen_func(q, *packed, cu_seqlens_q, ends, **options, return_lse=True)
    assert_attention_right(out, lse, q, cu_seqlens_q, k, v, **options)
