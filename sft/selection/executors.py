# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Where the tasks of a selection run: in this process, in several, or on the machines of a Ray cluster.

Each of them gives the results in the order of the items, and at most a few items a worker are in flight.
"""

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sft import SFTError

from .stages import Executor, SelectionError

_IN_FLIGHT = 2  # items a worker, one running and one waiting
_RAY_WAVE = 1024


class SerialExecutor:
    """Runs every task in this process."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """See [`Executor`]."""
        return map(function, items)


class ProcessExecutor:
    """Runs tasks in processes of this machine.

    Args:
        workers: how many.
        pool: of as many processes.
        folder: private to this run. Functions lie there for the workers to fetch once: with their word vectors or
            evaluation sets, some are too large to send along with every item.
    """

    def __init__(self, workers: int, pool: ProcessPoolExecutor, folder: Path) -> None:
        self._workers, self._pool, self._folder = workers, pool, folder
        self._numbers = count()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """See [`Executor`]."""
        file = self._folder / f"function-{next(self._numbers)}"
        file.write_bytes(pickle.dumps(function))
        waiting: deque[Future[Any]] = deque()
        items = iter(items)
        for item in islice(items, _IN_FLIGHT * self._workers):
            waiting.append(self._pool.submit(_call, file, item))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(self._pool.submit(_call, file, item) for item in islice(items, 1))


def _call(file: Path, item: Any) -> Any:
    return _load_function(file)(item)


@lru_cache(maxsize=1)
def _load_function(file: Path) -> Callable[[Any], Any]:
    return pickle.loads(file.read_bytes())


class RayExecutor:
    """Runs tasks with Ray Data, on the cluster that `ray.init` finds. OUT has to be on a disk that all nodes share."""

    def __init__(self) -> None:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise SelectionError("ray is not installed; pip install 'teleflm[ray]', or leave out --ray.") from error
        self._data = ray.data

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """See [`Executor`]."""
        items = iter(items)
        while wave := list(islice(items, _RAY_WAVE)):
            numbered = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(wave)]
            dataset = self._data.from_items(numbered, override_num_blocks=len(numbered))
            done = dataset.map(partial(_run_row, function=function)).take_all()
            for row in sorted(done, key=lambda row: row["number"]):
                result = pickle.loads(row["result"])
                if isinstance(result, SFTError):
                    raise result
                yield result


def _run_row(row: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """One task as a row of Ray Data. Results, and our own errors, are pickled: Arrow would make other types of them."""
    try:
        result = function(pickle.loads(row["item"]))
    except SFTError as error:
        result = error
    return {"number": row["number"], "result": pickle.dumps(result)}


@contextmanager
def open_executor(workers: int, *, use_ray: bool = False) -> Iterator[Executor]:
    """Something to run tasks on, for as long as the context lasts.

    Args:
        workers: processes of this machine; 1 is this process itself.
        use_ray: Ray Data instead.

    Raises:
        SelectionError: Ray is not installed, or a worker died.
    """
    if use_ray:
        yield RayExecutor()
    elif workers == 1:
        yield SerialExecutor()
    else:
        # Not forked: the libraries have threads by now.
        context = multiprocessing.get_context("spawn")
        with (
            TemporaryDirectory(prefix="teleflm-") as folder,
            ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool,
        ):
            try:
                yield ProcessExecutor(workers, pool, Path(folder))
            except BrokenProcessPool as error:
                why = "a worker ended without a word, perhaps for want of memory"
                raise SelectionError(f"{why}; the same command with fewer --workers goes on from here.") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _prepare_worker() -> None:
    """The cores are shared out to processes; threads inside of them would only get into each other's way."""
    from threadpoolctl import threadpool_limits

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, cleans up
    threadpool_limits(1)
    os.environ["RAYON_NUM_THREADS"] = "1"  # of rensa, which is not loaded yet


__all__ = ["ProcessExecutor", "RayExecutor", "SerialExecutor", "open_executor"]
