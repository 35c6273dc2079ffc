"""What was built and installed: its machine code, its binary interface, its headers. No GPU."""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from configure import failing_configure

import cute_kernels
from cute_kernels import _C
from cute_kernels.compile import headers

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = Path(_C.__file__)
INCLUDE = Path(cute_kernels.get_include())
KERNELS = {
    row["name"]: "window_kernel" if row["grouped"] else "forward_kernel"
    for row in cute_kernels.tile_configs("forward")
}
ANY_CALL = {row["name"]: row for row in cute_kernels.tile_configs("forward") if row["any_call"]}
BACKWARD_KERNELS = [row["name"] for row in cute_kernels.tile_configs("backward")]


def cuda_tools() -> str:
    """PATH with the folders of NVIDIA's wheels before the toolkit's."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [f"{path}/cu13/bin" for path in spec.submodule_search_locations] if spec else []
    return os.pathsep.join([*wheels, os.environ.get("PATH", ""), "/usr/local/cuda/bin"])


@pytest.fixture(scope="module")
def sass() -> dict[str, str]:
    """The machine code of every function in the extension, by mangled name."""
    path = cuda_tools()
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"needs {tool}: python -m pip install --group test")
    done = subprocess.run(
        [shutil.which("cuobjdump", path=path), "-sass", EXTENSION],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path},
    )
    assert set(re.findall(r"arch = (\w+)", done.stdout)) == {"sm_90a"}
    parts = re.split(r"^\s*Function : (\S+)$", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def of_kernel(sass: dict[str, str], name: str, kernel: str = "forward_kernel") -> str:
    """Of a backward row's two the usual one, which is not careful."""
    mangled = f"{len(name)}{name}"  # the row's name is the namespace of its Tile
    found = [
        code
        for function, code in sass.items()
        if mangled in function
        and kernel in function
        and (kernel != "backward_kernel" or "Lb0E" in function)
    ]
    assert len(found) == 1, f"{len(found)} functions for {name} among {list(sass)}"
    return found[0]


def instructions(code: str, pattern: str) -> list[str]:
    return re.findall(rf"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?({pattern}\S*)", code, re.MULTILINE)


def test_no_kernel_has_a_trap(sass):
    """nvcc leaves one where what a kernel does is undefined, and of the rest nothing; it may not
    say a word of it."""
    assert [function for function, code in sass.items() if instructions(code, "BPT")] == []


@pytest.mark.performance
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_uses_hoppers_own_instructions(sass, name):
    code = of_kernel(sass, name, KERNELS[name])
    dtype = "F32.BF16" if name.startswith("bf16") else "F32"
    products = instructions(code, "HGMMA")
    assert products
    assert all(product.endswith(dtype) for product in products), set(products)
    assert instructions(code, "UTMALDG"), "TMA loads"
    assert instructions(code, "UTMASTG"), "TMA stores"
    assert instructions(code, "MUFU.EX2"), "exponentials in base 2"


@pytest.mark.performance
@pytest.mark.parametrize("name", BACKWARD_KERNELS)
def test_backward_kernel_uses_hoppers_own_instructions(sass, name):
    code = of_kernel(sass, name, "backward_kernel")
    assert instructions(code, "HGMMA")
    assert instructions(code, "UTMALDG"), "TMA loads"
    assert instructions(code, "UTMASTG"), "TMA stores"
    assert instructions(code, "(?:UBLKRED|REDG?[.])"), "dQ is added in global memory"


def loops(code: str, predicate: str) -> list[str]:
    """The bodies of loops: from where a branch with such a predicate leads back to."""
    branch = re.compile(rf"/\*([0-9a-f]+)\*/\s+{predicate}BRA\s.*?0x([0-9a-f]+)")
    bodies = []
    for match in branch.finditer(code):
        at, target = (int(address, 16) for address in match.groups())
        if target < at:
            bodies.append(code[code.index(f"/*{target:04x}*/") : match.end()])
    return bodies


def loops_of_products(code: str) -> list[str]:
    """The innermost loops with products that end with a condition."""
    bodies = [body for body in loops(code, r"@!?U?P\d\s+") if "HGMMA" in body]
    return [b for b in bodies if not any(other != b and other in b for other in bodies)]


def shortest_loop(code: str, products: int) -> str:
    """The shortest loop with that many products or more."""
    bodies = loops(code, r"(?:@!?U?P\d\s+)?")
    bodies = [body for body in bodies if len(instructions(body, "HGMMA")) >= products]
    assert bodies, "no loop was read"
    return min(bodies, key=len)


@pytest.mark.performance
@pytest.mark.parametrize("name", BACKWARD_KERNELS)
def test_backward_kernel_keeps_its_products_in_registers(sass, name):
    """Outside of the steps a kernel may use local memory: no product waits there."""
    bodies = loops_of_products(of_kernel(sass, name, "backward_kernel"))
    assert bodies, "no loop was read"
    for body in bodies:
        assert instructions(body, "(?:STL|LDL)") == [], "registers spilled to local memory"


@pytest.mark.performance
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_keeps_its_products_in_registers(sass, name):
    """A few values of a tile may wait in local memory, no fragment of a product: the smallest, a
    row of P, would be more. Of a tile of any call there are more, its place and its lengths, but
    only outside of the steps."""
    code = of_kernel(sass, name, KERNELS[name])
    assert instructions(code, ".*"), "no instruction was read"
    if row := ANY_CALL.get(name):
        steps = shortest_loop(code, (row["head_dim"] + row["tile_n"]) // 16)  # Q K^T and P V
        assert instructions(steps, "(?:STL|LDL)") == [], "registers spilled in the steps"
    if KERNELS[name] == "window_kernel":
        assert instructions(shortest_loop(code, 10), "(?:STL|LDL)") == [], "registers spilled"
    allowed = 80 if name in ANY_CALL else 40
    assert len(instructions(code, "(?:STL|LDL)")) <= allowed, "registers spilled to local memory"


def test_every_kernel_is_a_row(sass):
    forward = [f for f in sass if "forward_kernel" in f and "Fp8ForwardMainloop" not in f]
    prefill = [f for f in forward if "PrefillTraits" in f]
    assert len(prefill) == len(cute_kernels.tile_configs("prefill"))
    of_windows = [f for f in sass if "window_kernel" in f]
    assert len(forward) - len(prefill) + len(of_windows) == len(KERNELS)
    for kernel, of_a_row in {"preprocess": 1, "backward": 2, "postprocess": 1}.items():
        found = [f for f in sass if f"{kernel}_kernel" in f]
        assert len(found) == of_a_row * len(BACKWARD_KERNELS)


@pytest.mark.performance
def test_fp8_kernels_multiply_bytes_and_keep_everything_in_registers(sass):
    for function, code in sass.items():
        if "Fp8ForwardMainloop" not in function:
            continue
        products = instructions(code, "[QI]GMMA")
        assert any(".E4M3.E4M3" in product for product in products), "P V"
        assert instructions(code, "F2FP.SATFINITE.E4M3|F2IP.U8.F32"), "P is packed"
        assert instructions(code, "(?:STL|LDL)") == [], "registers spilled to local memory"


def test_extension_serves_many_pythons():
    assert EXTENSION.name == "_C.abi3.so"
    assert ".abi3.so" in importlib.machinery.EXTENSION_SUFFIXES


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf (binutils)")
def test_extension_needs_no_cuda_library_and_no_fixed_path():
    text = subprocess.run(
        ["readelf", "--dynamic", "--wide", EXTENSION], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", text)
    assert "libtorch.so" in needed
    assert [name for name in needed if re.match(r"lib(cu|nv|python|c10|torch_)", name)] == []
    assert "RPATH" not in text
    assert "RUNPATH" not in text


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_extension_shows_nothing_but_its_init_function():
    text = subprocess.run(
        ["nm", "--dynamic", "--defined-only", EXTENSION], capture_output=True, text=True, check=True
    ).stdout
    symbols = {line.split()[-1] for line in text.splitlines()}
    assert "PyInit__C" in symbols
    # Another CUDA runtime in the process must not meet the one that is linked in.
    assert [symbol for symbol in symbols if re.match(r"(__)?cu(da|Tensor)|_ZN12cute", symbol)] == []


def test_extension_names_no_path_of_the_machine_that_built_it():
    data = EXTENSION.read_bytes()
    assert b"site-packages" not in data
    assert str(ROOT).encode() not in data


def test_package_has_the_headers():
    shipped = {path.relative_to(INCLUDE) for path in INCLUDE.rglob("*.hpp")}
    assert Path("cute_kernels/attention/forward/launch.hpp") in shipped
    sources = {
        path.relative_to(ROOT)
        for path in (ROOT / "cute_kernels").rglob("*.hpp")
        if path.parent.name != "torch"  # the binding is of no use to users' kernels
    }
    assert shipped == sources
    assert (INCLUDE / "cute_kernels/sm90/tensor_map.cpp").is_file()  # of every plug-in


def test_headers_are_those_that_the_extension_was_compiled_from():
    _, of_extension = torch.ops.cute_kernels.plugin_requirements()
    assert headers.digest(INCLUDE) == of_extension


def test_headers_include_only_headers_of_the_package():
    for header in INCLUDE.rglob("*.hpp"):
        for included in re.findall(r'#include "(.*)"', header.read_text()):
            assert (INCLUDE / included).is_file(), f"{header} includes {included}"


def test_package_holds_nothing_unexpected():
    folder = EXTENSION.parent
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".py", ".pyi", ".pyc", ".so", ".json", ".hpp", ".cpp", ".txt", ".typed"}


def test_an_old_compiler_is_refused_in_words(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.3, V12.3.107'\n")
    nvcc.chmod(0o755)
    message = failing_configure(tmp_path / "build", CMAKE_CUDA_COMPILER=nvcc)
    assert "is of CUDA 12.3: too old" in message
    assert "CUDA 12.4 or newer" in message
    assert "pip install --group build" in message


def test_a_missing_compiler_is_named(tmp_path):
    nvcc = tmp_path / "nowhere" / "nvcc"
    message = failing_configure(tmp_path / "build", CMAKE_CUDA_COMPILER=nvcc)
    assert f"{nvcc} does not run" in message
    assert "CUDACXX" in message
