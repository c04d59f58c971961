"""How the C library treats the memory that the tensors of a command free."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them


def keep_freed_memory() -> None:
    """Let a step have the memory that the one before it freed, instead of new pages.

    glibc gives blocks of 32 MiB back to the system as they are freed, and smaller ones as soon as
    the end of the heap is free: nearly all activations, whose pages the system fills with zeros
    again in the next step. Here it keeps blocks of less than 1 GiB and up to 2 GiB at the end of
    the heap. What the user has set in the environment counts more; other C libraries have their
    own ways.
    """
    settings = (
        os.environ.get("GLIBC_TUNABLES"),
        os.environ.get("MALLOC_TRIM_THRESHOLD_"),
        os.environ.get("MALLOC_MMAP_THRESHOLD_"),
    )
    if any(settings) or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    # Either setting ends the thresholds' own growth; older versions take no more than 32 MiB.
    if not mallopt(_MMAP_THRESHOLD, 2**30):
        mallopt(_MMAP_THRESHOLD, 2**25)
