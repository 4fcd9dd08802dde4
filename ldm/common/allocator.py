"""Memory settings for training on the CPU: keep freed memory, and take it in huge pages.

A training step frees and takes the same large blocks again and again. glibc gives blocks above 128 KiB back to the system
each time, which then clears every page anew.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
TOP_PAD, MMAP_THRESHOLD = 256 << 20, 1 << 30  # bytes


def keep_memory() -> bool:
    """Settings of this process for glibc's malloc and torch's CPU allocator; before torch is imported. -> whether done.

    A setting that the user made himself in the environment (MALLOC_*, GLIBC_TUNABLES, THP_MEM_ALLOC_ENABLE) stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first large allocation
    if not sys.platform.startswith("linux") or any(k.startswith(("MALLOC_", "GLIBC_TUNABLES")) for k in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD), (M_MMAP_THRESHOLD, MMAP_THRESHOLD))
    return all([mallopt(name, value) == 1 for name, value in settings])
