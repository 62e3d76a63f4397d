# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Memory that a thread uses again and again.

The C library gives an array of more than 128 KiB back to the kernel when it is freed, and the next one costs a page
fault for every 4 KiB of it: half of the time of a run that fills tensors, before arrays were kept. What it does not
give back stays in a heap of the thread's own, so these come from the kernel, and go with the thread.
"""

import math
import mmap
import threading

import numpy as np

_arrays = threading.local()


def anonymous_memory(nbytes: int) -> mmap.mmap:
    """Memory of the kernel's, zeros until it is written to; given back when nothing refers to it."""
    return mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def scratch(purpose: str, shape: int | tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array with anything in it, which the thread's next call for the same purpose takes away."""
    sizes = (shape,) if isinstance(shape, int) else shape
    nbytes = math.prod(sizes) * dtype.itemsize
    kept = getattr(_arrays, purpose, None)
    if kept is None or kept.nbytes < nbytes:
        setattr(_arrays, purpose, None)  # before the next, so that there are never two
        kept = np.frombuffer(anonymous_memory(nbytes), np.uint8)
        setattr(_arrays, purpose, kept)
    return kept[:nbytes].view(dtype).reshape(sizes)
