"""FlashAttention's modules, as libraries import them, on the kernels of this package.

    from cute_kernels import compat

    compat.install()
    from flash_attn_interface import flash_attn_func    # FlashAttention-3's
    from flash_attn import flash_attn_varlen_func       # FlashAttention-2's

`cute_kernels.compat.flash_attn_interface` and `cute_kernels.compat.flash_attn` can be imported as
they are, too: `install` only makes them known under the names that other libraries look for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType

from cute_kernels.compat.distributions import Finder

# By version: of which distribution, under which release, and which modules under which names.
_DISTRIBUTIONS = {2: ("flash-attn", "2.8.3"), 3: ("flash-attn-3", "3.0.0")}
_MODULES = {
    2: {
        "flash_attn": "flash_attn",
        "flash_attn.flash_attn_interface": "flash_attn.flash_attn_interface",
        "flash_attn.bert_padding": "flash_attn.bert_padding",
        "flash_attn_2_cuda": "flash_attn.flash_attn_gpu",
    },
    3: {
        "flash_attn_interface": "flash_attn_interface",
        "flash_attn_3.flash_attn_interface": "flash_attn_interface",
    },
}

_finder: Finder | None = None
_replaced: dict[str, ModuleType | None] = {}


def install(versions: Iterable[int] = (2, 3)) -> None:
    """Puts the modules into `sys.modules`, and makes `importlib.metadata` know the distributions
    that they stand for, until `uninstall`. To be called before the library that looks for them is
    imported: what has been imported already stays what it is.

    Args:
        versions: of FlashAttention, 2 (`flash_attn`, `flash_attn_2_cuda`, flash-attn) and 3
            (`flash_attn_interface`, `flash_attn_3.flash_attn_interface`, flash-attn-3).

    Raises:
        ValueError: a version is neither 2 nor 3.
    """
    global _finder
    if isinstance(versions, int):
        raise TypeError(f"versions is {versions}, must be several of 2 and 3, such as (2,)")
    versions = tuple(versions)
    for version in versions:
        if version not in _MODULES:
            raise ValueError(f"versions has {version!r}, must be of 2 and 3")
    uninstall()
    modules: dict[str, ModuleType] = {}
    owned: dict[str, tuple[str, list[str]]] = {}
    for version in versions:
        for name, own in _MODULES[version].items():
            modules[name] = importlib.import_module(f"{__name__}.{own}")
        if version == 3:
            modules["flash_attn_3"] = _package("flash_attn_3", modules["flash_attn_interface"])
        distribution, release = _DISTRIBUTIONS[version]
        tops = sorted({name.partition(".")[0] for name in _MODULES[version]})
        owned[distribution] = (release, tops)
    for name, module in modules.items():
        _replaced[name] = sys.modules.get(name)
        sys.modules[name] = module
    _finder = Finder(owned)
    sys.meta_path.insert(0, _finder)


def uninstall() -> None:
    """Undoes `install`; without one, nothing."""
    global _finder
    for name, module in _replaced.items():
        if module is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = module
    _replaced.clear()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    _finder = None


def _package(name: str, interface: ModuleType) -> ModuleType:
    """A package of that module alone."""
    package = ModuleType(name)
    package.__spec__ = ModuleSpec(name, None, is_package=True)
    package.__path__ = []
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    return package
