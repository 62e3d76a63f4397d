# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The files of a planned run: its recipe, the file for accelerate launch, and the command.

What the user leaves open is chosen so that it fits: replicas before shards, no recomputation before some, and then the
largest micro-batch. The file for accelerate is the shipped one with the numbers of the plan.
"""

import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from conversion.architecture import Architecture, preset_names
from conversion.checkpoint.sizes import format_bytes
from sft.data.labels import Labelling
from sft.data.prepare import is_prepared, require_made_for
from sft.plan import Plan, PlanError, Setup, Strategy, plan_training
from sft.shipped import find_shipped
from sft.tokenizer import load_tokenizer
from sft.yaml_text import load_yaml

RECIPE, ACCELERATE, LAUNCH = "recipe.yaml", "accelerate.yaml", "launch.sh"
GLOBAL_BATCH_SIZE = 128
_DISTRIBUTED = {"fsdp2": "FSDP", "zero3": "DEEPSPEED", "ddp": "MULTI_GPU"}
_SHIPPED = {"fsdp2": "fsdp2", "zero3": "zero3", "ddp": "multi-gpu"}
_BYTES = {2: "bfloat16", 4: "float32"}
_SHOWN = 3  # ways out


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a recipe says beside the plan.

    Args:
        model: a folder, or the name of a preset, of which the recipe then names no model.
        data_files: conversations to train on; none are named unless given.
        output_dir: of the run; `run` beside the recipe unless given.
        global_batch_size: rows of a step, over all GPUs.
        nodes: machines with as many GPUs each.
    """

    model: str
    data_files: Sequence[str] = ()
    output_dir: str | None = None
    global_batch_size: int = GLOBAL_BATCH_SIZE
    nodes: int = 1


def choose_setup(
    model: Architecture,
    wanted: Setup,
    gpu_memory: int,
    *,
    global_batch_size: int = GLOBAL_BATCH_SIZE,
    strategy: Strategy | None = None,
    micro_batch_size: int | None = None,
    activation_checkpointing: bool | None = None,
    weight_bytes: int | None = None,
) -> Plan:
    """The plan of a run that fits, with what is left open chosen.

    Args:
        model: its sizes.
        wanted: everything else of the run.
        gpu_memory: bytes of each GPU.
        global_batch_size: rows of a step; micro-batches of all GPUs have to divide it.
        strategy, micro_batch_size, activation_checkpointing, weight_bytes: as the user wants them; None: chosen.

    Raises:
        PlanError: nothing fits, with what would; or the batch cannot be divided.
    """
    if global_batch_size % wanted.gpus:
        raise PlanError(
            f"global_batch_size is {global_batch_size} and gpus is {wanted.gpus}; each GPU has to have as many "
            "rows: give a multiple."
        )
    rows = global_batch_size // wanted.gpus
    if micro_batch_size is not None and rows % micro_batch_size:
        raise PlanError(
            f"global_batch_size is {global_batch_size}: {rows} rows on each of {wanted.gpus} GPUs, which micro-batches "
            f"of {micro_batch_size} do not divide."
        )
    last = None
    for setup in _candidates(wanted, strategy, micro_batch_size, activation_checkpointing, weight_bytes):
        last = plan_training(model, setup, gpu_memory)
        if last.fits:
            return last if micro_batch_size else _widest(model, last, rows)
    assert last is not None
    ways = [f"{change} ({format_bytes(memory.total)} on each)" for change, _, memory in last.alternatives]
    out = f"What would fit: {'; '.join(ways[:_SHOWN])}." if ways else "Nothing that was tried would fit."
    raise PlanError(
        f"{last.setup.method} on {wanted.gpus} GPUs needs {format_bytes(last.memory.total)} on each at least, which "
        f"have {format_bytes(gpu_memory)}; nothing was written. {out}"
    )


def _candidates(
    wanted: Setup,
    strategy: Strategy | None,
    micro_batch_size: int | None,
    activation_checkpointing: bool | None,
    weight_bytes: int | None,
) -> Iterator[Setup]:
    """What costs least first: replicas exchange nothing but gradients, and recomputing costs a third of a step."""
    both: tuple[Strategy, ...] = ("ddp",) if wanted.gpus == 1 or wanted.method == "qlora" else ("ddp", "fsdp2")
    for spread in (strategy,) if strategy else both:
        for checkpointing in (False, True) if activation_checkpointing is None else (activation_checkpointing,):
            # Steps of fine-tuning vanish where bfloat16 weights are updated in place; shards have float32 masters.
            in_place = wanted.method == "full" and (spread == "ddp" or wanted.gpus == 1)
            yield replace(
                wanted,
                strategy=spread,
                micro_batch_size=micro_batch_size or 1,
                activation_checkpointing=checkpointing,
                weight_bytes=weight_bytes or (4 if in_place else 2),
            )


def _widest(model: Architecture, plan: Plan, rows: int) -> Plan:
    """The same with the largest micro-batch that fits, of the powers of two that divide the rows of a GPU."""
    size = 2
    while rows % size == 0:
        wider = plan_training(model, replace(plan.setup, micro_batch_size=size), plan.gpu_memory)
        if not wider.fits:
            break
        plan, size = wider, size * 2
    return plan


def write_run(plan: Plan, run: Run, folder: Path, *, overwrite: bool = False) -> tuple[Path, Path, Path]:
    """Write the recipe, the file for accelerate launch and the command of a plan that fits.

    Args:
        plan: of the run.
        run: what else the recipe says.
        folder: where to; made if absent.
        overwrite: replace files of these names.

    Returns:
        the three files.

    Raises:
        PlanError: there is such a file already, or a folder of its name; a data file is missing; the nodes do not
            divide the GPUs; the folder cannot be written.
        DataError: the data are a prepared folder that the recipe would refuse.
    """
    if plan.setup.gpus % run.nodes:
        raise PlanError(f"nodes is {run.nodes}, and gpus {plan.setup.gpus}; each machine has to have as many.")
    if missing := [name for name in run.data_files if not Path(name).exists()]:
        raise PlanError(f"{missing[0]}: no such file of data.")
    folder = Path(os.path.abspath(folder))
    if os.path.lexists(folder) and not folder.is_dir():
        raise PlanError(f"{folder} is no folder.")
    _require_made_for(plan.setup, run)
    contents = {
        RECIPE: recipe_text(plan, run, folder),
        ACCELERATE: accelerate_text(plan.setup, run.nodes),
        LAUNCH: launch_text(plan.setup, run),
    }
    present = [name for name in contents if os.path.lexists(folder / name)]  # a link that leads nowhere is somebody's
    for name in present:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise PlanError(f"{folder / name} is a folder; choose another folder, or move it away.")
    if present and not overwrite:
        raise PlanError(f"{folder / present[0]} exists; choose another folder, or add --overwrite.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".plan-") as place:
            for name, text in contents.items():
                path = Path(place) / name
                path.write_text(text, encoding="utf-8")
                path.chmod(0o755 if name == LAUNCH else 0o644)
            for name in contents:
                (Path(place) / name).replace(folder / name)
    except OSError as error:
        raise PlanError(f"{folder} cannot be written ({error.strerror or error}); choose another folder.") from error
    return folder / RECIPE, folder / ACCELERATE, folder / LAUNCH


def _require_made_for(setup: Setup, run: Run) -> None:
    """Refuse a prepared folder that the recipe would refuse; of a preset's model no tokenizer is known."""
    if not any(map(is_prepared, run.data_files)):
        return
    own = run.model not in preset_names() and Path(run.model).is_dir()
    # Nothing else of the labelling is said by the recipe, and its packing leaves rows as they are cut.
    require_made_for(run.data_files, load_tokenizer(run.model)[0] if own else None, Labelling(setup.max_length))


def recipe_text(plan: Plan, run: Run, folder: Path) -> str:
    """The recipe of a plan: the shipped one of its method, with the numbers of the plan."""
    setup = plan.setup
    shipped = f"flm-2-52b-{setup.method}"
    keys: dict[str, Any] = load_yaml(find_shipped(shipped, "recipe").read_text(encoding="utf-8"))
    places: dict[str, Any] = {}
    if run.model not in preset_names() and Path(run.model).is_dir():
        places["model_name_or_path"] = os.path.abspath(run.model)
    if run.data_files:
        places["data_files"] = [os.path.abspath(name) for name in run.data_files]
    places["output_dir"] = os.path.abspath(run.output_dir) if run.output_dir else str(folder / "run")
    keys |= {
        "dtype": _BYTES[setup.weight_bytes],
        "max_length": setup.max_length,
        "num_processes": setup.gpus,
        "distributed_type": "NO" if setup.gpus == 1 else _DISTRIBUTED[setup.strategy],
        "per_device_train_batch_size": setup.micro_batch_size,
        "gradient_accumulation_steps": run.global_batch_size // (setup.gpus * setup.micro_batch_size),
        "activation_checkpointing": setup.activation_checkpointing,
        "optim": "adamw_torch_fused",
    }
    if setup.method != "full":
        keys |= {"lora_r": setup.lora_rank, "lora_alpha": 2 * setup.lora_rank}
    head = (
        f"# Written by `teleflm sft plan`: {setup.method} on {setup.gpus} GPUs, {format_bytes(plan.memory.total)} of "
        f"{format_bytes(plan.gpu_memory)} on each.\n# An estimate. Learning rate, epochs and schedule are those of the "
        f"recipe {shipped}; change them freely.\n"
    )
    open_keys = [key for key in ("model_name_or_path", "data_files") if key not in places]
    if open_keys:
        head += f"# Add {' and '.join(open_keys)}, here or on the command line.\n"
    return head + yaml.safe_dump({**places, **keys}, sort_keys=False, allow_unicode=True, width=1000)


def accelerate_text(setup: Setup, nodes: int = 1) -> str:
    """The shipped file of a strategy, for as many GPUs and machines."""
    text = find_shipped(_SHIPPED[setup.strategy], "accelerate").read_text(encoding="utf-8")
    values = {"num_machines": str(nodes), "num_processes": str(setup.gpus)}
    if setup.gpus == 1:
        values["distributed_type"] = "'NO'"
    if setup.strategy == "fsdp2":
        values["fsdp_activation_checkpointing"] = str(setup.activation_checkpointing).lower()
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    for key, value in values.items():
        body, found = re.subn(rf"(?m)^(\s*{key}:).*$", rf"\g<1> {value}", body)
        if found != 1:
            raise PlanError(f"the shipped file of {setup.strategy} says {key} {found} times, expected once.")
    return "# Written by `teleflm sft plan`, for `accelerate launch --config_file`.\n" + body


def launch_text(setup: Setup, run: Run) -> str:
    """The command, as a shell script that hands its arguments on; on several machines it has to be told which is it."""
    several, options = "", ""
    if run.nodes > 1:
        several = (
            '# On each machine, with its number from 0, and the address of number 0.\n: "${MACHINE_RANK:?0 to '
            f'{run.nodes - 1}}}" "${{MAIN_PROCESS_IP:?of machine 0}}"\n'
        )
        options = (
            ' --machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_PROCESS_IP" '
            '--main_process_port "${MAIN_PROCESS_PORT:-29500}"'
        )
    return (
        "#!/bin/sh\n# Written by `teleflm sft plan`. Arguments are keys of the recipe: --key value.\nset -eu\n"
        f'{several}here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)\n'
        f'exec accelerate launch --config_file "$here/{ACCELERATE}"{options} \\\n'
        f'    --no_python teleflm sft train --config "$here/{RECIPE}" "$@"\n'
    )


def command_of(launch: Path) -> str:
    """What to type to start it."""
    return shlex.join(["sh", str(launch)])


__all__ = [
    "ACCELERATE",
    "GLOBAL_BATCH_SIZE",
    "LAUNCH",
    "RECIPE",
    "Run",
    "accelerate_text",
    "choose_setup",
    "command_of",
    "launch_text",
    "recipe_text",
    "write_run",
]
