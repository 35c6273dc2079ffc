import fcntl
import os

import pytest
import torch

import cute_kernels

# From the repository's root an uninstalled package imports silently: as the C++ folder's empty
# namespace.
if getattr(cute_kernels, "__file__", None) is None:
    raise pytest.UsageError(
        "cute_kernels is not installed: python -m pip install . (see README.md)"
    )

# The CPU's problems are small: a second thread costs more than it gives, most of all beside others.
torch.set_num_threads(1)


def no_hopper() -> str | None:
    """Why this machine cannot run the kernels, or None."""
    if not torch.cuda.is_available():
        return "needs a Hopper GPU: PyTorch sees no GPU here"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        return f"needs a Hopper GPU (compute capability 9.0): this one has {major}.{minor}"
    return None


@pytest.fixture
def hopper() -> str:
    """The GPU that the kernels run on; the test is skipped where there is none."""
    reason = no_hopper()
    if reason is not None:
        pytest.skip(reason)
    return "cuda"


@pytest.fixture
def gpus() -> int:
    """How many Hopper GPUs a test of several uses: all, but no more than 4."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs 2 Hopper GPUs or more: PyTorch sees {count} here")
    if (reason := no_hopper()) is not None:
        pytest.skip(reason)
    return 4 if count >= 4 else 2


@pytest.fixture
def much_memory(hopper, tmp_path_factory):
    """For tests that take tens of GB of the GPU, called with how many; the test is skipped where
    they are not free. Of all processes of a run one such test runs at a time, and what the
    allocator holds back is given back before and after."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the one that all processes share

    def need(gigabytes):
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} are free")

    with open(folder / "much_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield need
        torch.cuda.empty_cache()


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    """Both devices that the operator runs on."""
    return request.getfixturevalue("hopper") if request.param == "cuda" else "cpu"


@pytest.fixture
def kernel(request):
    """One of `parity.FORWARD_KERNELS` or `BACKWARD_KERNELS`."""
    if request.param.device == "cuda":
        request.getfixturevalue("hopper")
    return request.param


@pytest.fixture
def in_transformers():
    """transformers knows the name "cute_kernels", and has not been warned."""
    from cute_kernels.integrations.transformers import fallback, register, unregister

    register()
    fallback._warned.clear()
    yield
    unregister()
