"""The copies between GPUs of one host, with files that processes share in place of their memory."""

import contextlib
import time

import ranks as processes
import torch
import torch.distributed as dist
from context import random_cases, run_cases
from test_context import assert_case_right

from cute_kernels.distributed import exchange
from cute_kernels.distributed.copies import Copier

LIMIT = 60  # seconds


class SharedFiles:
    """What `copies.Gpu` is, without a GPU: everything happens in the order of the program, as if a
    GPU had one queue for all of its streams."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def allocate(self, number_of_bytes):
        self.count += 1
        memory = [
            torch.from_file(
                f"{self.folder}/{self.count}-{rank}",
                shared=True,
                size=number_of_bytes,
                dtype=torch.uint8,
            )
            for rank in range(dist.get_world_size())
        ]
        memory[dist.get_rank()].fill_(0x7F)  # no number that anyone expects
        return memory, None

    def settle(self):
        dist.barrier()

    def beside(self):
        return contextlib.nullcontext()

    def mark(self):
        return None

    def wait_for(self, _):
        pass

    def write(self, flag, value):
        flag.fill_(value)

    def wait(self, flag, value):
        begin = time.monotonic()
        while value > 0 and flag.item() < value:
            assert time.monotonic() - begin < LIMIT, "nobody writes the flag"
            time.sleep(0)


def run_by_copies(rank, folder, cases):
    copier = Copier(dist.group.WORLD, torch.device("cpu"), SharedFiles(folder))

    def copier_of(ranks, device):
        return copier if ranks.size == dist.get_world_size() else None

    exchange.copier_of = copier_of
    return run_cases(rank, cases), [arena.exchanges for arena in copier._arenas.values()]


def check(folder, ranks, count):
    cases = [c for c in random_cases(ranks, count, seed=3) if c.form in ("ring", "all_gather")]
    by_rank = processes.run(ranks, run_by_copies, folder, cases)
    for case, results in zip(cases, by_rank[0][0], strict=True):
        assert_case_right(case, results)
    for _, exchanges in by_rank:
        assert exchanges == by_rank[0][1] and min(exchanges) > len(cases) / 2


def test_two_ranks(tmp_path):
    check(tmp_path, 2, 25)


def test_four_ranks(tmp_path):
    check(tmp_path, 4, 15)
