"""Compiles the extension's host sources against the headers of several releases of PyTorch.

    python tests/torch_headers.py [RELEASE ...]

Without arguments: the oldest release that is promised, one between, and the newest that pip finds.
Of a release only the headers are fetched, by ranges of the wheel's bytes where it lies on a server
(some 4 MB of 500), and kept in $CUTE_KERNELS_TORCH_HEADERS, by default ~/.cache/cute_kernels/
torch_headers. Ends with status 1 if a source does not compile, and if headers cannot be had.
"""

import argparse
import importlib.util
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from configure import ROOT, configure, missing_tool

NEWEST = "newest"
RELEASES = ("2.10.0", "2.11.0", NEWEST)
# All that libtorch's stable ABI consists of
FOLDERS = tuple(
    f"torch/include/torch/{folder}/" for folder in ("headeronly", "csrc/stable", "csrc/inductor")
)
INSTALLED = Path(importlib.util.find_spec("torch").origin).parent / "include"
TIMEOUT = 60  # seconds without an answer


class RemoteFile(io.RawIOBase):
    """A file on a server, read by HTTP ranges: what is not read is not fetched."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.position = 0
        _, content_range = self._fetch(0, 1)
        self.size = int(content_range.rpartition("/")[2])

    def _fetch(self, start: int, count: int) -> tuple[bytes, str]:
        asked = f"bytes={start}-{start + count - 1}"
        request = urllib.request.Request(self.url, headers={"Range": asked})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.status != 206:
                raise OSError(f"the server sends no ranges of {self.url} (status {answer.status})")
            return answer.read(), answer.headers["Content-Range"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer) -> int:
        count = min(len(buffer), self.size - self.position)
        if count <= 0:
            return 0
        data, _ = self._fetch(self.position, count)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def wheel_of(release: str) -> tuple[str, str]:
    """The version and the address of PyTorch's wheel for this Python, as pip would install it."""
    requirement = "torch" if release == NEWEST else f"torch=={release}"
    # Where the index has the metadata apart, as PyPI has, this downloads no wheel.
    options = ["--dry-run", "--report=-", "--no-deps", "--ignore-installed", "--only-binary=:all:"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *options, requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise OSError(f"pip finds no wheel of {requirement}:\n{done.stderr}")
    (item,) = json.loads(done.stdout)["install"]
    return item["metadata"]["version"], item["download_info"]["url"]


def extract_headers(url: str, folder: Path) -> None:
    """Lays the wheel's headers into `folder`, which appears only when it is complete."""
    address = urllib.parse.urlsplit(url)
    if address.scheme == "file":
        wheel = open(urllib.request.url2pathname(address.path), "rb")  # noqa: SIM115
    else:
        wheel = io.BufferedReader(RemoteFile(url), buffer_size=1 << 20)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        wheel,
        zipfile.ZipFile(wheel) as archive,
        tempfile.TemporaryDirectory(dir=folder.parent) as unpacked,
    ):
        wanted = [info for info in archive.infolist() if info.filename.startswith(FOLDERS)]
        if not wanted:
            raise OSError(f"{url} holds none of {', '.join(FOLDERS)}")
        for info in sorted(wanted, key=lambda info: info.header_offset):
            archive.extract(info, unpacked)
        (Path(unpacked) / "torch" / "include").rename(folder)


def headers(release: str, cache: Path) -> tuple[str, Path]:
    """The version that `release` stands for and its folder of headers, fetched if need be."""
    folder = cache / release
    if not folder.is_dir():  # the newest one has no folder of that name: pip is asked each time
        release, url = wheel_of(release)
        folder = cache / release
        if not folder.is_dir():
            extract_headers(url, folder)
    return release, folder


class Source(NamedTuple):
    """A source of the extension and the compiler's arguments for it."""

    name: str
    arguments: list[str]


def host_sources(build: Path) -> list[Source]:
    """The sources that include PyTorch's headers, and how CMake compiles them."""
    if tool := missing_tool():
        raise OSError(f"needs {tool}: python -m pip install --group build")
    done = configure(
        build,
        CMAKE_EXPORT_COMPILE_COMMANDS="ON",
        CUTE_KERNELS_HEAD_DIMS="64",
        CUTE_KERNELS_DTYPES="bf16",
    )
    if done.returncode != 0:
        raise OSError(f"CMake does not configure the project:\n{done.stderr}")
    commands = json.loads((build / "compile_commands.json").read_text())
    folder = ROOT / "cute_kernels" / "torch"
    sources = [
        Source(Path(command["file"]).name, shlex.split(command["command"]))
        for command in commands
        if Path(command["file"]).parent == folder
    ]
    expected = {path.name for path in folder.glob("*.cpp")}
    if {source.name for source in sources} != expected:
        raise OSError(f"CMake compiles {[s.name for s in sources]}, not {sorted(expected)}")
    return sources


def check_source(source: Source, include: Path, build: Path) -> str:
    """What the compiler says with PyTorch's headers from `include`; "" if it is content."""
    arguments = [str(include) if a == str(INSTALLED) else a for a in source.arguments]
    if arguments.count(str(include)) != 1:
        raise OSError(
            f"{INSTALLED} is not among the compiler's arguments: {shlex.join(source.arguments)}"
        )
    done = subprocess.run(
        [*arguments, "-fsyntax-only"], cwd=build, capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stderr or f"status {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("releases", nargs="*", default=RELEASES, metavar="RELEASE")
    releases = parser.parse_args().releases
    cache = os.environ.get("CUTE_KERNELS_TORCH_HEADERS", "~/.cache/cute_kernels/torch_headers")
    refused = 0
    try:
        found = [headers(release, Path(cache).expanduser()) for release in releases]
        with tempfile.TemporaryDirectory() as build, ThreadPoolExecutor(os.cpu_count()) as pool:
            sources = host_sources(Path(build))
            for version, include in found:
                said = pool.map(check_source, sources, repeat(include), repeat(Path(build)))
                texts = [text for text in said if text]
                print("".join(texts), end="", file=sys.stderr)
                print(f"torch {version}: {len(sources)} sources, {len(texts)} refused", flush=True)
                refused += len(texts)
    except (OSError, zipfile.BadZipFile) as error:
        print(f"torch_headers: {error}", file=sys.stderr)
        return 1
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
