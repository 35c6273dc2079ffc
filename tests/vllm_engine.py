"""vLLM's package, where it is installed."""

import sys
import types

import pytest
import torch


def loaded():
    """A fixture: the plugin is loaded as vLLM's own processes do."""
    # Compiled for CUDA, and not needed here.
    if not torch.cuda.is_available():
        sys.modules.setdefault("vllm._C_stable_libtorch", types.ModuleType("vllm"))
    plugins = pytest.importorskip("vllm.plugins", reason="needs vLLM 0.33 or newer")
    from cute_kernels.integrations.vllm import register, unregister

    plugins.load_general_plugins()
    register()  # vLLM loads plugins once a process
    yield
    unregister()


def hopper():
    """The platform that selects backends, of a GPU that is not there."""
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Hopper(CudaPlatformBase):
        capability = DeviceCapability(9, 0)

        @classmethod
        def get_device_capability(cls, device_id=0):
            return cls.capability

    return Hopper


def assert_selected(name, path, fits, taken, refused):
    """The selector takes the backend for what `fits` with each of the changes `taken`, and says why
    not with those `refused`, (changes, reason), and on another GPU."""
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    platform, chosen = hopper(), AttentionBackendEnum[name]
    for changed in taken:
        found = platform.get_attn_backend_cls(chosen, fits._replace(**changed))
        assert found == f"cute_kernels.integrations.vllm.{path}"
    for changed, reason in refused:
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            platform.get_attn_backend_cls(chosen, fits._replace(**changed))
    platform.capability = DeviceCapability(10, 0)
    with pytest.raises(ValueError, match="compute capability"):
        platform.get_attn_backend_cls(chosen, fits)
