"""What is handed on: the wheel's metadata and notices, the sdist, what the extension asks of a
machine. No GPU."""

import http.server
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch_headers
from configure import PATH, ROOT

DISTRIBUTION = importlib.metadata.distribution("cute-kernels")
CXX = shutil.which("c++", path=PATH)
needs_compiler = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")


def installed_license(distribution: importlib.metadata.Distribution, name: str) -> str:
    (file,) = [file for file in distribution.files if file.as_posix().endswith(f"licenses/{name}")]
    return file.read_text()


def test_metadata_says_what_an_index_asks_for():
    metadata = DISTRIBUTION.metadata
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Author"] == "cute_kernels contributors"
    assert "attention" in metadata["Keywords"]
    assert metadata["Project-URL"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_license_and_notices_are_installed():
    notices = {path.relative_to(ROOT) for path in (ROOT / "licenses").iterdir()}
    assert {path.name for path in notices} == {"CUTLASS.txt", "NOTICE.txt", "PyTorch.txt"}
    for path in [Path("LICENSE"), *notices]:
        text = (ROOT / path).read_text()
        assert installed_license(DISTRIBUTION, path.as_posix()) == text
    notice = (ROOT / "licenses" / "NOTICE.txt").read_text()
    for part in ("CUTLASS.txt", "PyTorch.txt", "libcudart_static"):
        assert part in notice


def test_notice_of_cutlass_is_the_one_of_the_headers():
    try:
        cutlass = importlib.metadata.distribution("nvidia-cutlass")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs nvidia-cutlass: python -m pip install --group build")
    assert (
        installed_license(cutlass, "LICENSE.txt") == (ROOT / "licenses" / "CUTLASS.txt").read_text()
    )


def test_sdist_holds_all_sources(tmp_path, monkeypatch):
    backend = pytest.importorskip("scikit_build_core.build")
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as archive:
        held = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    folders = ("bench", "cmake", "cute_kernels", "docs", "examples", "licenses", "python", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".cu", ".cpp", ".hpp", ".cmake", ".toml", ".py"}
    sources = {path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts}
    sources |= {Path(name) for name in ("CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md")}
    assert sources - held == set()
    assert {path.parts[0] for path in held}.isdisjoint({"build", "dist", ".venv", ".git"})
    assert [path for path in held if path.suffix in {".so", ".o", ".whl", ".pyc"}] == []


def test_every_place_names_the_same_oldest_torch():
    def found(file: str, pattern: str) -> list[str]:
        return re.findall(pattern, (ROOT / file).read_text())

    libtorch = "cmake/Libtorch.cmake"
    ((major, minor),) = found(libtorch, r"CUTE_KERNELS_TORCH_FLOOR (\d+)\.(\d+)\)")
    assert set(found("pyproject.toml", r'"torch>=([\d.]+)"')) == {f"{major}.{minor}"}
    assert found(libtorch, "TORCH_TARGET_VERSION=(0x[0-9a-f]+)") == [
        f"{int(major) << 56 | int(minor) << 48:#018x}"
    ]
    assert f"torch {major}.{minor} and newer" in (ROOT / "README.md").read_text()
    assert found("python/cute_kernels/extension.py", r"needs torch ([\d.]+) or newer") == [
        f"{major}.{minor}"
    ]
    assert torch_headers.RELEASES[0] == f"{major}.{minor}.0"
    assert torch_headers.RELEASES[-1] == torch_headers.NEWEST


@pytest.fixture(scope="module")
def driver_refusal(tmp_path_factory):
    """The function of that name in C++."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "main.cpp").write_text("""
#include <cstdlib>
#include <iostream>
#include "cute_kernels/torch/driver.hpp"
int main(int, char** arguments) {
  std::cout << cute_kernels::binding::driver_refusal(
      std::atoi(arguments[1]), std::atoi(arguments[2]), arguments[3]);
}
""")
    command = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", ROOT, "-o", "main"]
    subprocess.run([*command, "main.cpp"], cwd=folder, check=True)

    def call(runtime: int, driver: int, release: str) -> str:
        arguments = [folder / "main", str(runtime), str(driver), release]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

    return call


@needs_compiler
@pytest.mark.parametrize(
    ("runtime", "driver", "release", "needed", "found"),
    [
        (13000, 12080, "570.86.10", "NVIDIA driver 580 or newer", "is 570.86.10 (CUDA 12.8)"),
        (13020, 12020, "", "NVIDIA driver 580 or newer", "is for CUDA 12.2"),
        (12040, 11080, "520.61.05", "NVIDIA driver 525 or newer", "is 520.61.05 (CUDA 11.8)"),
        (14010, 13000, "580.65.06", "an NVIDIA driver for CUDA 14", "is 580.65.06 (CUDA 13.0)"),
    ],
)
def test_an_old_driver_is_refused_in_words(driver_refusal, runtime, driver, release, needed, found):
    version = f"{runtime // 1000}.{runtime % 1000 // 10}"
    assert driver_refusal(runtime, driver, release) == (
        f"this build of cute_kernels (CUDA {version}) needs {needed}, but the driver {found}"
    )


@needs_compiler
def test_a_missing_driver_is_named(driver_refusal):
    assert driver_refusal(13000, 0, "").endswith("580 or newer, but there is no driver")


@needs_compiler
@pytest.mark.parametrize(
    ("runtime", "driver"), [(13000, 13000), (13020, 13000), (13000, 14000), (12080, 12000)]
)
def test_a_driver_of_the_same_major_version_is_taken(driver_refusal, runtime, driver):
    assert driver_refusal(runtime, driver, "580.65.06") == ""


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Answers with the range that is asked for, as servers of packages do."""

    def do_GET(self):
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = map(int, re.findall(r"\d+", self.headers["Range"]))
        part = content[first : last + 1]
        self.server.sent += len(part)
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


class NoRanges(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serves tmp_path with a handler; gives the server and its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), lambda *a: handler(*a, directory=tmp_path)
        )
        server.sent = 0
        threading.Thread(target=server.serve_forever).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def write_wheel(path: Path) -> None:
    """As PyTorch's: some headers among megabytes that nobody here wants."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch/include/torch/headeronly/version.h", "#define NINE 9\n")
        archive.writestr("torch/lib/libtorch_cpu.so", bytes(8 << 20))
        archive.writestr("torch/include/torch/csrc/stable/tensor.h", "#pragma once\n")
        archive.writestr("torch/include/ATen/ATen.h", "#error not of the stable ABI\n")


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_headers_come_out_of_a_wheel_without_the_rest_of_it(tmp_path, serve, scheme):
    write_wheel(tmp_path / "torch.whl")
    server, address = serve(Ranges)
    url = f"{address}/torch.whl" if scheme == "http" else (tmp_path / "torch.whl").as_uri()
    torch_headers.extract_headers(url, tmp_path / "cache" / "2.10.0")
    version, folder = torch_headers.headers("2.10.0", tmp_path / "cache")  # from the cache
    assert version == "2.10.0"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.h")}
    assert files == {"torch/headeronly/version.h", "torch/csrc/stable/tensor.h"}
    assert (folder / "torch/headeronly/version.h").read_text() == "#define NINE 9\n"
    assert [path.name for path in folder.parent.iterdir()] == ["2.10.0"]
    assert (0 < server.sent < 5 << 20) if scheme == "http" else server.sent == 0


def test_a_server_without_ranges_is_named(tmp_path, serve):
    write_wheel(tmp_path / "torch.whl")
    _, address = serve(NoRanges)
    with pytest.raises(OSError, match=f"sends no ranges of {address}/torch.whl"):
        torch_headers.extract_headers(f"{address}/torch.whl", tmp_path / "cache" / "2.10.0")
    assert not (tmp_path / "cache" / "2.10.0").exists()


def test_headers_that_cannot_be_had_are_an_error(tmp_path, monkeypatch):
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": "", "EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("CUTE_KERNELS_TORCH_HEADERS", str(tmp_path))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "torch_headers.py", "0.0.1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip finds no wheel of torch==0.0.1" in done.stderr
    assert done.stdout == ""


@needs_compiler
def test_a_source_that_asks_for_a_newer_header_is_refused(tmp_path):
    file = tmp_path / "source.cpp"
    file.write_text("#include <torch/headeronly/version.h>\nint nine = NINE;\n")
    installed = torch_headers.INSTALLED
    source = torch_headers.Source("source.cpp", [CXX, "-isystem", str(installed), "-c", str(file)])
    header = tmp_path / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define NINE 9\n")
    assert torch_headers.check_source(source, tmp_path / "include", tmp_path) == ""
    header.write_text("#define EIGHT 8\n")
    assert "NINE" in torch_headers.check_source(source, tmp_path / "include", tmp_path)
    plain = torch_headers.Source("source.cpp", [CXX, "-c", str(file)])
    with pytest.raises(OSError, match="is not among the compiler's arguments"):
        torch_headers.check_source(plain, tmp_path / "include", tmp_path)
