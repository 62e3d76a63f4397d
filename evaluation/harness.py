# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tasks of lm-evaluation-harness, with this package's classes, and each text begun once.

The harness tokenizes a text with the beginning-of-sequence token that a Tele-FLM's tokenizer puts before it, and then,
where it measures whole texts (`loglikelihood_rolling`: perplexity, bits per byte), puts another one before that and
counts how badly the first is predicted after it. Here a whole text is tokenized without, so that the one that the
harness puts there is the only one. The context of a question keeps the tokenizer's own.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from conversion.architecture import MODEL_TYPE, Architecture
from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.limits import default_workers
from conversion.checkpoint.sources import Source, check_utf8, open_checkpoint
from conversion.extras import install_line
from conversion.family import is_llama
from conversion.hub.remote import is_remote, local_view
from conversion.llama import check_complete, why_only_copied
from conversion.mapping import check_tensors
from conversion.model_identity import ModelIdentity, model_identity, tensor_digests

from .held_files import HeldFiles
from .loaded_scores import check_model_type, name_and_revision, require_torch

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def measure_by_harness(
    model: str,
    tasks: Sequence[str],
    *,
    identify: bool = False,
    workers: int = default_workers(),
    progress: Progress = lambda what: nullcontext(lambda done, total: None),
    **options: Any,
) -> tuple[dict[str, Any], ModelIdentity | None]:
    """Run tasks of the harness on a model, and find that it was one and the same all the while.

    Args:
        model: a Hub folder, or the name of a model on the Hub.
        tasks: their names.
        identify: read all weights once more, for the digests by which results are known to be this model's.
        workers: threads.
        progress: makes a progress display, see `teleflm.terminal.byte_progress`.
        options: of `run_harness`.

    Returns:
        What the harness returns, and what the model is.

    Raises:
        CheckpointError: see `run_harness`.
        CorruptData: the model was changed while it was measured.
    """
    require_harness()
    checkpoint = _opened(model, required=identify)
    if checkpoint is None:
        return run_harness(model, tasks, **options), None
    held, digests = HeldFiles.of(checkpoint), {}
    if identify:
        with progress("hashing") as advance:
            digests = tensor_digests(checkpoint.tensors, workers=workers, progress=advance)
    name, revision = name_and_revision(model, checkpoint.folder)
    found = run_harness(name, tasks, revision=revision, **options)
    with progress("comparing the weights") as advance:
        held.require_same(digests, advance)
    identity = model_identity(checkpoint, known=digests, workers=workers) if identify else None
    held.require_small_same()
    return found, identity


def _opened(model: str, *, required: bool) -> Source | None:
    """The checkpoint, if it is here; one that only transformers can open is looked at where results are to name it."""
    if is_remote(model) and not required:
        return None
    try:
        checkpoint = open_checkpoint(local_view(model))
    except CheckpointError:
        if required:
            raise
        return None
    config = checkpoint.config or {}
    check_model_type(config, checkpoint.folder)
    if config.get("model_type") == MODEL_TYPE:
        where = f"{checkpoint.folder}/config.json"
        check_tensors(checkpoint.tensors, Architecture.from_config(config, where), checkpoint.folder)
    elif is_llama(config) and why_only_copied(checkpoint) is None:
        check_complete(checkpoint)
    return checkpoint


def require_harness() -> None:
    """Check that the harness is installed.

    Raises:
        CheckpointError: it is not, or torch is not.
    """
    require_torch()
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"--harness needs lm-evaluation-harness ({one_line(error)}); {install_line('eval')}."
        ) from None


def run_harness(
    model: str,
    tasks: Sequence[str],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    include_path: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a loaded model, on a GPU where there is one.

    No code of the model's folder is executed; that of a task is the harness's own, and a task of yours (a YAML file
    below `include_path`) may load code as the harness allows it to.

    Args:
        model: a Hub folder, or the name of a model on the Hub.
        tasks: their names.
        revision: of the model on the Hub, if it is there.
        dtype: of the weights, or `auto`: as they are.
        shots: examples before each question; as the task says unless given.
        limit: questions of each task, at most: a try, no result.
        batch_size: of requests.
        include_path: folder with tasks of your own.
        seed: of the examples and of the standard errors.

    Returns:
        What the harness returns.

    Raises:
        CheckpointError: the harness is not installed, knows no such task, or fails.
    """
    torch = require_torch()
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    import modeling_teleflm  # noqa: F401  (registers the architecture with the Auto classes)

    check_utf8(model)
    if include_path is not None and not Path(include_path).is_dir():
        raise CheckpointError(f"{include_path}: no such folder; it is to hold the YAML files of tasks.")

    class Model(HFLM):
        """The harness's own, but for the beginning of a text."""

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with mock.patch.object(self, "add_bos_token", False):
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    try:
        manager = TaskManager(include_path=str(include_path) if include_path else None)
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if unknown:
            raise CheckpointError(
                f"lm-evaluation-harness has no task {unknown[0]}; `lm_eval ls tasks` lists them, and --include-path "
                "names a folder with yours."
            )
        loaded = Model(
            pretrained=model,
            revision=revision or "main",
            dtype=dtype,
            device="cuda" if torch.cuda.is_available() else "cpu",
            parallelize=torch.cuda.device_count() > 1,
            batch_size=batch_size,
            trust_remote_code=False,
        )
        result = simple_evaluate(
            model=loaded,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except CheckpointError:
        raise
    except Exception as error:  # the harness, transformers and datasets have no family of errors between them
        raise CheckpointError(f"lm-evaluation-harness: {one_line(error)}") from error
    if not result:
        raise CheckpointError("lm-evaluation-harness returned no results.")
    return result


__all__ = ["measure_by_harness", "require_harness", "run_harness"]
