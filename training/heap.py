"""This file is where the C library is told to keep the memory that is freed, instead of giving it back at once."""

import ctypes
import sys

# glibc's `mallopt`: blocks up to 1 GiB come from the heap, which is not trimmed and grows by 256 MiB
_OPTIONS = {
    "M_MMAP_THRESHOLD": (-3, 1 << 30),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 1 << 28),
}


def keep_freed_memory() -> None:
    """For a process that allocates the same large tensors again and again; without glibc nothing happens.

    Source:
        By default every tensor of more than 32 MiB, and on the way there smaller ones, is a mapping of its own whose
        pages the kernel clears at each step: 6,000 page faults and a sixth of the time of a bank of 8 slots of pocket.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for option, value in _OPTIONS.values():
            mallopt(option, value)
