"""Functions run by several processes of one group, on the CPU, or each on a GPU of its own."""

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 240


def run(ranks, function, *arguments, backend="gloo", results=True, environment=None, seconds=60):
    """What ``function(rank, *arguments)``, of a module of the tests, returns on each rank, unless
    there are to be no results. `backend`: "" names none, as where a DeviceMesh begins the group.
    `environment`: variables beside those of this process; `seconds`: until a message that does not
    come is an error.

    A process of its own imports everything once, and forks: the one that runs the tests may hold
    what does not survive a fork.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, f"{folder}/arguments.pt")
        variables = {**os.environ, **(environment or {})}
        command = [sys.executable, __file__, folder, str(ranks), backend]
        command += [function.__module__, function.__qualname__, str(seconds)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, env=variables
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if not results:
            return None
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]


def start(folder, ranks, rank, backend="gloo", *, seconds):
    if backend == "nccl" or (not backend and torch.cuda.is_available()):
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend or None,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )


def work(folder, ranks, rank, backend, seconds, function, arguments):
    torch.set_num_threads(1)
    start(folder, ranks, rank, backend, seconds=seconds)
    try:
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # without waiting for the others


def main(folder, ranks, backend, module, name, seconds):
    sys.path.insert(0, str(Path(__file__).parent))
    function = getattr(importlib.import_module(module), name)
    arguments = torch.load(f"{folder}/arguments.pt", weights_only=False)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=work,
            args=(folder, int(ranks), rank, backend, float(seconds), function, arguments),
        )
        for rank in range(int(ranks))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode) for process in processes)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
