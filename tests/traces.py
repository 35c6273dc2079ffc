"""What the profiler sees of a call on the GPU."""

import json
import math
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

# Of gradients: the kernel that does all the work, and the one that repeats it with care
PLAIN, CAREFUL = r"\bbackward_kernel<.*, false, ", r"\bbackward_kernel<.*, true, "


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
