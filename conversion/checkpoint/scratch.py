# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Memory that a thread uses again and again.

The C library gives an array of more than 128 KiB back to the kernel when it is freed, and the next one costs a page
fault for every 4 KiB of it: half of the time of a run that fills tensors, before arrays were kept.
"""

import math
import threading

import numpy as np

_arrays = threading.local()


def scratch(purpose: str, shape: int | tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array with anything in it, which the thread's next call for the same purpose takes away."""
    sizes = (shape,) if isinstance(shape, int) else shape
    nbytes = math.prod(sizes) * dtype.itemsize
    kept = getattr(_arrays, purpose, None)
    if kept is None or kept.nbytes < nbytes:
        kept = np.empty(nbytes, np.uint8)
        setattr(_arrays, purpose, kept)
    return kept[:nbytes].view(dtype).reshape(sizes)
