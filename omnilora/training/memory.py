"""How the C library's allocator treats the large blocks of a training step.

glibc gives blocks above a few megabytes back to the system as soon as they are free, and the next step pays for the pages again:
on a processor, more than for the arithmetic of an activation function. While a run is under way they are kept.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
KEPT = 256 << 20  # free bytes at the top of the heap that stay
LARGEST = 32 << 20  # blocks below this size come from the heap


@contextmanager
def kept_blocks() -> Iterator[bool]:
    """Freed memory stays with the process inside; afterwards what is free goes back. Yields whether the allocator listens."""
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    libc = ctypes.CDLL(None)
    done = libc.mallopt(M_MMAP_THRESHOLD, LARGEST) and libc.mallopt(M_TRIM_THRESHOLD, KEPT) and libc.mallopt(M_TOP_PAD, 16 << 20)
    try:
        yield bool(done)
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 128 << 10)
        libc.mallopt(M_TOP_PAD, 128 << 10)
        libc.malloc_trim(0)
