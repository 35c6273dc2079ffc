"""What is installed, what of it works, and what is wrong."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import cute_kernels
from cute_kernels.compile.build import cache_folder, is_whole
from cute_kernels.compile.nvcc import CompilerError, Toolchain
from cute_kernels.plugins import wrong_headers

_DRIVER = Path("/sys/module/nvidia/version")


def report() -> tuple[dict[str, str], list[str]]:
    """Facts by name, and what is wrong with the installation in words."""
    facts = {
        "cute_kernels": f"{cute_kernels.__version__} in {Path(cute_kernels.__file__).parent}",
        "Python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "driver": _DRIVER.read_text().strip() if _DRIVER.exists() else "not seen",
    }
    wrong: list[str] = []
    for part in (_gpu, _rows, _headers, _cache, _compiler):
        facts |= part(wrong)
    return facts, wrong


def _gpu(wrong: list[str]) -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"GPU": "PyTorch sees none: calls run on the CPU"}
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
        row = next(iter(cute_kernels.tile_configs("forward")))
        dtype = torch.bfloat16 if row["dtype"] == "bf16" else torch.float16
        x = torch.zeros(1, 1, 1, row["head_dim"], dtype=dtype, device=f"cuda:{index}")
        try:
            cute_kernels.flash_attn_func(x, x, x)
            torch.cuda.synchronize(index)
        except RuntimeError as error:
            wrong.append(f"cuda:{index}: {error}")
    return {"GPU": "; ".join(names)}


def _rows(_: list[str]) -> dict[str, str]:
    return {
        f"{of_pass} rows": ", ".join(row["name"] for row in cute_kernels.tile_configs(of_pass))
        or "none"
        for of_pass in cute_kernels.tiles.ROWS
    }


def _headers(wrong: list[str]) -> dict[str, str]:
    if problem := wrong_headers():
        wrong.append(problem)
    abi, headers = torch.ops.cute_kernels.plugin_requirements()
    return {"plug-ins": f"ABI {abi}, headers {headers}"}


def _cache(wrong: list[str]) -> dict[str, str]:
    folder = cache_folder()
    kernels = [entry for entry in folder.glob("[!.]*-*-*") if entry.is_dir()]
    whole = sum(map(is_whole, kernels))
    broken = f", {len(kernels) - whole} that will be compiled again" if whole < len(kernels) else ""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK)):
        wrong.append(f"the cache {folder} cannot be written: {there} does not allow it")
    return {"cache": f"{folder}, {whole} kernels{broken}"}


def _compiler(wrong: list[str]) -> dict[str, str]:
    try:
        found = Toolchain.find()
    except CompilerError as error:
        wrong.append(f"rows can only be added from the cache: {error}")
        return {"compiler": "none"}
    return {"compiler": f"{found.nvcc} with {found.host} ({found.version})"}
