"""Which headers a build has: a plug-in that was compiled against others is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

DIGEST_FILE = "headers_digest.hpp"
# The one source beside the headers that is part of every plug-in
TENSOR_MAP = Path("cute_kernels") / "sm90" / "tensor_map.cpp"


def shipped(include: Path) -> list[Path]:
    """The sources in the folder `include` that a plug-in may be compiled from; also in the
    repository, whose binding to PyTorch no plug-in sees."""
    root = include / "cute_kernels"
    headers = [path for path in root.rglob("*.hpp") if (root / "torch") not in path.parents]
    return sorted([*headers, include / TENSOR_MAP])


def digest(include: Path) -> str:
    """Of the names and contents of these sources: 16 hexadecimal digits."""
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(include).as_posix()}\n"
        for path in shipped(include)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def digest_source(include: Path) -> str:
    """What tells the extension of its own headers."""
    return f"""\
// Written by cute_kernels/compile/headers.py.
#pragma once

namespace cute_kernels {{

inline constexpr char const* kHeadersDigest = "{digest(include)}";

}}  // namespace cute_kernels
"""
