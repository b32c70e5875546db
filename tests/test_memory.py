"""The allocator keeps freed blocks while a run is under way, and gives them back afterwards."""

import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from omnilora.training.memory import kept_blocks


def faults(rounds=20):
    """Page faults of blocks of 8 MiB that are made, written and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        blocks = [torch.empty(2 << 20).fill_(1.0) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def compared():
    outside = faults()
    with kept_blocks() as listens:
        faults(2)
        return listens, outside, faults()


def test_freed_blocks_are_used_again_inside():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a new process: the C library learns from blocks freed before
        listens, outside, inside = pool.submit(compared).result()
    if not listens:
        pytest.skip("another C library")
    assert inside < outside / 5


def test_free_memory_goes_back_afterwards():
    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()

    with kept_blocks() as listens:
        if not listens:
            pytest.skip("another C library")
        blocks = [torch.empty(2 << 20).fill_(1.0) for _ in range(16)]
        del blocks
        kept = resident()
    assert resident() < kept - (64 << 20)
