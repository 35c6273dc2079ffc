"""From rows to shared libraries, each compiled once and kept in a cache.

An entry of the cache is a folder that appears by one rename when it is complete:
    <name>-<hash of source, headers and options>-<hash of the compiler's version>/
        kernel.cu, kernel.so, kernel.sha256
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .headers import digest
from .nvcc import OPTIONS, PLUGIN_OPTIONS, CompilerError, Toolchain
from .rows import Row
from .source import plugin_source

# Of nvcc for a row, about
SECONDS = {
    "forward": 70,
    "backward": 150,
    "forward_fp8": 90,
    "decode": 60,
    "decode_fp8": 70,
    "prefill": 70,
    "latent": 60,
}
BYTES_PER_JOB = 4 << 30  # of memory


class CacheError(RuntimeError):
    """The cache cannot be written; the message says where and why."""


def cache_folder() -> Path:
    """CUTE_KERNELS_CACHE, else cute_kernels in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("CUTE_KERNELS_CACHE"):
        return Path(named).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "cute_kernels"


def jobs_that_fit() -> int:
    """How many kernels can be compiled at a time: as many as cores and memory allow."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(limit.read_text()))
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB))


def short_hash(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def is_whole(entry: Path) -> bool:
    """Whether the library of an entry is there and is the one that was compiled into it."""
    try:
        content = (entry / "kernel.so").read_bytes()
        return (entry / "kernel.sha256").read_text() == hashlib.sha256(content).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def say(text: str) -> None:
    # At once: threads that compile beside one another say so, too.
    print(f"cute_kernels: {text}\n", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """One process at a time. The kernel lets go of the lock when its holder dies."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process, which compiles {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Recipe:
    """How a row becomes a library in the cache `root`, with the headers in `include`. Without a
    compiler (`toolchain` is why there is none) the library can only be found."""

    def __init__(
        self, row: Row, include: Path, root: Path, toolchain: Toolchain | CompilerError
    ) -> None:
        self.name, self.seconds = str(row["name"]), SECONDS[row["pass"]]
        self.include, self.root, self.toolchain = include, root, toolchain
        self.source = plugin_source(row, digest(include))
        options = " ".join((*PLUGIN_OPTIONS, *OPTIONS))
        self.stem = f"{self.name[:40]}-{short_hash(options + self.source, 16)}"

    def entry(self, toolchain: Toolchain) -> Path:
        return self.root / f"{self.stem}-{short_hash(toolchain.version, 8)}"

    def find(self) -> Path | None:
        """The library, if it is in the cache: that of any compiler's version, where there is no
        compiler or nothing can be written."""
        if isinstance(self.toolchain, Toolchain):
            entry = self.entry(self.toolchain)
            if is_whole(entry):
                return entry / "kernel.so"
            if os.access(self.root, os.W_OK, effective_ids=True):
                return None
        try:
            entries = sorted(self.root.glob(f"{self.stem}-*"))
        except OSError:  # a folder that may not be read
            return None
        return next((entry / "kernel.so" for entry in entries if is_whole(entry)), None)

    def make(self, progress: str) -> Path:
        """The library, compiled if another process has not done so meanwhile."""
        if isinstance(self.toolchain, CompilerError):
            raise self.toolchain
        try:
            return self._make(self.toolchain, progress)
        except OSError as error:
            raise CacheError(
                f"cannot keep the kernel {self.name} in the cache {self.root}: {error}. "
                "CUTE_KERNELS_CACHE names another folder"
            ) from error

    def _make(self, toolchain: Toolchain, progress: str) -> Path:
        entry = self.entry(toolchain)
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(self.root / f".{entry.name}.lock", self.name):
            if is_whole(entry):
                return entry / "kernel.so"
            prefix, suffix = f".{entry.name}.", ".part"
            for left in self.root.glob(f"{prefix}*{suffix}"):  # by one that was killed
                shutil.rmtree(left)
            part = Path(tempfile.mkdtemp(suffix, prefix, self.root))
            try:
                self._compile(toolchain, part, progress)
                if entry.exists():
                    shutil.rmtree(entry)
                part.rename(entry)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return entry / "kernel.so"

    def _compile(self, toolchain: Toolchain, folder: Path, progress: str) -> None:
        source, library, temporary = folder / "kernel.cu", folder / "kernel.so", folder / "tmp"
        source.write_text(self.source, "utf-8")
        temporary.mkdir()
        say(f"compiling {self.name} {progress}, about {self.seconds} s")
        start = time.monotonic()
        command = toolchain.command(self.include, source, library)
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        if done.returncode != 0 or not library.exists():
            said = "\n".join(_errors((done.stderr + done.stdout).splitlines()))
            raise CompilerError(
                f"nvcc does not compile {self.name} (status {done.returncode}):\n{said}\n"
                f"The command was: {' '.join(command)}"
            )
        shutil.rmtree(temporary)
        library_digest = hashlib.sha256(library.read_bytes()).hexdigest()
        (folder / "kernel.sha256").write_text(library_digest)
        say(f"compiled {self.name} in {time.monotonic() - start:.0f} s")


def _errors(lines: list[str]) -> list[str]:
    """From the first error on, of which the others often are consequences, as far as one reads."""
    first = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line)), 0)
    return lines[first : first + 40]


def build(
    rows: Sequence[Row], include: Path, root: Path | None = None, jobs: int | None = None
) -> list[Path]:
    """The rows' libraries, from the cache `root` or compiled into it, `jobs` at a time; by default
    the user's cache and `jobs_that_fit()`. Raises CompilerError or CacheError."""
    return list(_build(rows, include, root, jobs, None).values())


def build_what_compiles(
    rows: Sequence[Row], include: Path, root: Path | None = None, jobs: int | None = None
) -> tuple[dict[str, Path], dict[str, CompilerError]]:
    """As `build`, by name, but a row that does not compile stops no other."""
    failed: dict[str, CompilerError] = {}
    return _build(rows, include, root, jobs, failed), failed


def _build(
    rows: Sequence[Row],
    include: Path,
    root: Path | None,
    jobs: int | None,
    failed: dict[str, CompilerError] | None,
) -> dict[str, Path]:
    toolchain: Toolchain | CompilerError
    try:
        toolchain = Toolchain.find()
    except CompilerError as error:
        toolchain = error
    recipes = [Recipe(row, include, root or cache_folder(), toolchain) for row in rows]
    libraries = {recipe.name: recipe.find() for recipe in recipes}
    missing = [recipe for recipe in recipes if libraries[recipe.name] is None]
    with ThreadPoolExecutor(max_workers=jobs or jobs_that_fit()) as pool:
        making = {
            recipe.name: pool.submit(recipe.make, f"({number} of {len(missing)})")
            for number, recipe in enumerate(missing, 1)
        }
        try:
            for name, future in making.items():
                try:
                    libraries[name] = future.result()
                except CompilerError as error:
                    if failed is None:
                        raise
                    failed[name] = error
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: library for name, library in libraries.items() if library is not None}
