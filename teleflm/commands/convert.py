# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from conversion.checkpoint.errors import CheckpointError
from conversion.checkpoint.limits import DEFAULT_MEMORY
from teleflm.terminal import (
    DEFAULT_WORKERS,
    AllowNonfinite,
    Debug,
    DryRun,
    Dtype,
    Json,
    MaxShardSize,
    Memory,
    NoDigest,
    Overwrite,
    Rank,
    VerifySource,
    Workers,
    WorldSize,
    exit_codes,
)

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Folder of a Hugging Face checkpoint or of a run; or a URL.")
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder to write, or hf://OWNER/NAME with --low-disk.")]
LowDisk = Annotated[str | None, typer.Option(help="Of OUT on the Hub: at most so much of it lies on this disk.")]
Work = Annotated[Path | None, typer.Option(help="Of --low-disk: where; teleflm-OWNER-NAME here unless given.")]
Private = Annotated[bool, typer.Option("--private", help="Of OUT on the Hub: only for its owner.")]
License = Annotated[str | None, typer.Option(help="Of OUT on the Hub: its identifier; that of SRC unless given.")]
Card = Annotated[str | None, typer.Option(help="Of OUT on the Hub: whose words count, here (SRC's) or there.")]
Revision = Annotated[str | None, typer.Option(help="Of OUT on the Hub: branch.")]
Format = Annotated[str, typer.Option(help="Of SRC: auto, hf, megatron, torch_dist, fsdp_dtensor, dcp or deepspeed.")]
Iteration = Annotated[int | None, typer.Option(help="Of a run; its latest unless given.", min=0)]
Config = Annotated[str | None, typer.Option(help="Preset or config.json with what the run itself does not say.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of the tokenizer that goes with a run.")]
VocabSize = Annotated[int | None, typer.Option(help="Of a run: rows of the vocabulary without padding.", min=1)]
Multipliers = Annotated[
    str | None, typer.Option(help="Of a run that does not say them: none, or input_mult=16,output_mult=0.5,...")
]
Mapping = Annotated[Path | None, typer.Option(help="YAML file with the tensor names of a fork of Megatron.")]
Fp32Master = Annotated[
    bool, typer.Option("--fp32-master", help="Of DeepSpeed and Megatron: the optimizer's float32 weights.")
]
Optimizer = Annotated[
    bool, typer.Option("--optimizer", help="Of a training run: write Adam's moments too, as optimizer.pt.")
]
FoldInputMult = Annotated[
    bool, typer.Option("--fold-input-mult", help="Multiply input_mult into the embeddings, so that it is 1.")
]
Quantize = Annotated[
    str | None, typer.Option(help="Of a Tele-FLM: fp8, linear layers in 8-bit floats (compressed-tensors FP8_DYNAMIC).")
]
AllowUnequalReplicas = Annotated[
    bool, typer.Option("--allow-unequal-replicas", help="Take rank 0's where a run's copies of one tensor differ.")
]


def convert(
    source: Source,
    out: Out,
    format: Format = "auto",
    iteration: Iteration = None,
    config: Config = None,
    tokenizer: Tokenizer = None,
    vocab_size: VocabSize = None,
    multipliers: Multipliers = None,
    mapping: Mapping = None,
    fp32_master: Fp32Master = False,
    optimizer: Optimizer = False,
    allow_unequal_replicas: AllowUnequalReplicas = False,
    fold_input_mult: FoldInputMult = False,
    dtype: Dtype = None,
    quantize: Quantize = None,
    allow_nonfinite: AllowNonfinite = False,
    workers: Workers = DEFAULT_WORKERS,
    memory: Memory = DEFAULT_MEMORY,
    max_shard_size: MaxShardSize = "5GB",
    low_disk: LowDisk = None,
    work: Work = None,
    private: Private = False,
    revision: Revision = None,
    license: License = None,
    card: Card = None,
    rank: Rank = None,
    world_size: WorldSize = None,
    overwrite: Overwrite = False,
    no_digest: NoDigest = False,
    verify_source: VerifySource = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a Hub folder of safetensors from a training checkpoint, or from .bin files."""
    from conversion.convert import convert_checkpoint, convert_to_hub

    from ..plan_report import print_stream, run_and_report

    how: dict[str, Any] = {"format": format, "iteration": iteration, "config": config, "tokenizer": tokenizer}
    how |= {"vocab_size": vocab_size, "multipliers": multipliers, "mapping": mapping, "fp32_master": fp32_master}
    how |= {"optimizer": optimizer, "quantize": quantize, "fold_input_mult": fold_input_mult}
    how |= {"allow_unequal_replicas": allow_unequal_replicas, "allow_nonfinite": allow_nonfinite, "dtype": dtype}
    settings: dict[str, Any] = {"workers": workers, "memory": memory, "max_shard_size": max_shard_size}
    settings |= {"overwrite": overwrite, "no_digest": no_digest, "verify_source": verify_source, "as_json": as_json}
    settings |= {"rank": rank, "world_size": world_size, "debug": debug}
    settings |= {"allow_nonfinite": allow_nonfinite}
    with exit_codes(debug=debug):
        repo_id = hub_target(out)
        there: dict[str, Any] = {"--work": work, "--private": private or None, "--revision": revision}
        _check_target(out, repo_id, low_disk, {**there, "--license": license, "--card": card})
    if repo_id is None:
        run_and_report(
            "converting",
            Path(out),
            lambda options: convert_checkpoint(source, out, options=options, dry_run=dry_run, **how),
            dry_run=dry_run,
            **settings,
        )
        return
    from conversion.hub.published_card import CardOptions

    said = CardOptions(license=license, words=card)  # type: ignore[arg-type]  # checked there, with a line of its own
    to: dict[str, Any] = {"work": work, "private": private, "revision": revision, "card": said}
    print_stream(
        "converting and sending",
        lambda options: convert_to_hub(source, repo_id, low_disk or "", options=options, dry_run=dry_run, **to, **how),
        **settings,
    )


def hub_target(out: str) -> str | None:
    """The repository that an output is, if it is one of the Hub."""
    scheme, colon, rest = out.partition("://")
    if colon and scheme.lower() != "hf":
        raise CheckpointError(f"{scheme}://: an output may be a folder, or hf://OWNER/NAME with --low-disk.")
    return rest.rstrip("/") if colon else None


def _check_target(out: str, repo_id: str | None, low_disk: str | None, only_there: dict[str, Any]) -> None:
    if repo_id and not low_disk:
        raise CheckpointError(
            f"{out}: is on the Hub; --low-disk 50GB streams to it with so much on this disk, or convert to a folder "
            "and `teleflm publish` that."
        )
    given = {"--low-disk": low_disk, **only_there}
    name = next((name for name, value in given.items() if value is not None), None)
    if repo_id is None and name:
        raise CheckpointError(f"{out}: {name} is for an output on the Hub, hf://OWNER/NAME; leave it out.")


__all__ = ["convert"]
