"""What the profiler sees of a call on the GPU."""

import json
import math
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cute_kernels import tile_configs

# Whose launches are looked at
GRADIENTS = [
    pytest.param(row, id=row["name"])
    for row in tile_configs("backward")
    if not row["softcap"] and row["dtype"] == "bf16"
]
# Of gradients: the kernel that does all the work, and the one that repeats it with care. Names that
# are too long for the profiler stay mangled.
PLAIN, CAREFUL = (
    rf"[^a-z_]backward_kernel(<.*, {word}, |I.*TileEEELb{bit}E)"
    for word, bit in (("false", 0), ("true", 1))
)


def launches(call, folder):
    """Of a call: name, CTAs and microseconds of each kernel, in their order."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        call()
        torch.cuda.synchronize()
    traced.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        pytest.skip("the profiler sees no kernels here")
    return [(e["name"], math.prod(e["args"]["grid"]), e["dur"]) for e in kernels]


def grids(call, kernel, folder):
    """The CTAs of each launch of a kernel, whose name is a pattern."""
    return [ctas for name, ctas, _ in launches(call, folder) if re.search(kernel, name)]
