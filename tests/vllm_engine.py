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
