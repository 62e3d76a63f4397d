# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm grow`."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    Seed,
    VerifySource,
    Workers,
    WorldSize,
    print_table,
)

if TYPE_CHECKING:
    from conversion.checkpoint.execute import WriteOptions
    from growth.grow import GrowthResult
    from growth.upcycle import Upcycling

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Folder of a Tele-FLM or a Llama; or OWNER/NAME, a URL; a preset with --dry-run."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
To = Annotated[str | None, typer.Option(metavar="PRESET|CONFIG.json", help="What to grow into.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field of the target; repeatable.")]
Method = Annotated[
    str,
    typer.Option(
        help="New features: zero, tile (they repeat the old ones), mask (silent at first); random and rms (random, "
        "activations keep their scale) do not preserve the function."
    ),
]
Noise = Annotated[
    float | None,
    typer.Option(
        help="What tells copies apart, of a weight's spread. tile: else 0.3. --experts: else 0, and more does not "
        "preserve the function."
    ),
]
MaskSteps = Annotated[int | None, typer.Option(help="mask: steps over which the masks rise; else 5000.", min=1)]
Optimizer = Annotated[Path | None, typer.Option(metavar="DIR", help="Trainer checkpoint whose optimizer.pt grows too.")]
Layers = Annotated[
    str,
    typer.Option(help="Layers to copy: interleave, stack, top, middle, upper, distance, or a list like 3,7,11."),
]
NewLayers = Annotated[
    str,
    typer.Option(
        help="Additional layers: silent; or active (whole copies) or random, which do not preserve the function."
    ),
]
Calibration = Annotated[Path | None, typer.Option(metavar="TEXTFILE", help="distance: the text to measure on.")]
Multipliers = Annotated[str, typer.Option(help="preserve the logit factor, or take the target's and rescale lm_head.")]

NumExperts = Annotated[
    int | None,
    typer.Option(
        "--experts",
        metavar="N",
        help="Make a GraniteMoE with N experts in each layer, copies of its feed-forward layer; with --top-k.",
    ),
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="--experts: experts that compute a token.")]
_FIRST = "grow first, then make experts of the result"


def grow(
    source: Source,
    out: Out,
    to: To = None,
    overrides: Set = None,
    method: Method = "zero",
    noise: Noise = None,
    mask_steps: MaskSteps = None,
    optimizer: Optimizer = None,
    layers: Layers = "interleave",
    new_layers: NewLayers = "silent",
    calibration: Calibration = None,
    multipliers: Multipliers = "preserve",
    experts: NumExperts = None,
    top_k: TopK = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    allow_nonfinite: AllowNonfinite = False,
    workers: Workers = DEFAULT_WORKERS,
    memory: Memory = DEFAULT_MEMORY,
    max_shard_size: MaxShardSize = "5GB",
    rank: Rank = None,
    world_size: WorldSize = None,
    overwrite: Overwrite = False,
    no_digest: NoDigest = False,
    verify_source: VerifySource = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Grow a checkpoint into a larger one that computes the same function: wider, deeper, or with experts.

    The methods random and rms, --new-layers active and random, and --experts with --noise are the exceptions: notes,
    card and record say so.
    """
    from conversion.hollow import hollow_checkpoint, is_preset
    from growth.grow import grow_checkpoint
    from growth.method import make_method
    from growth.upcycle import upcycle_checkpoint
    from teleflm.plan_report import run_and_report

    def write(options: "WriteOptions") -> "GrowthResult | Upcycling":
        check_experts()
        if experts is None and to is None and not overrides:
            raise ValueError("nothing to grow into: give --to PRESET|CONFIG.json, --set KEY=VALUE, or both.")
        make = grow_from if experts is None else upcycle
        if not is_preset(source):
            return make(source, options)
        refuse_preset(source)
        with hollow_checkpoint(source) as folder:
            result = make(folder, options)
        note = f"{source} is a preset: nothing was read, and what depends on values of its weights is not known."
        return replace(result, notes=[note, *result.notes])

    def check_experts() -> None:
        """Raise what does not go with --experts, or is for it alone."""
        if experts is None:
            if top_k is not None:
                raise ValueError(f"--top-k {top_k} is for --experts N, which is not given.")
            return
        grown = {
            "--to": to is not None,
            "--set": bool(overrides),
            "--method": method != "zero",
            "--mask-steps": mask_steps is not None,
            "--layers": layers != "interleave",
            "--new-layers": new_layers != "silent",
            "--calibration": calibration is not None,
            "--multipliers": multipliers != "preserve",
        }
        asked = [option for option, is_asked in grown.items() if is_asked]
        if asked:
            raise ValueError(f"--experts does not go with {', '.join(asked)}: {_FIRST}.")
        if optimizer is not None:
            raise ValueError(
                "--experts does not go with --optimizer: experts begin with fresh moments, as the model that they were "
                "copied from had one feed-forward layer; leave it out."
            )
        if top_k is None:
            raise ValueError(f"--experts {experts} needs --top-k K: how many of them compute a token.")

    def refuse_preset(name: str) -> None:
        """Raise what a preset, which has no weights, cannot be used for."""
        needs = {"--layers distance": layers == "distance", "--verify-source": verify_source, "--optimizer": optimizer}
        asked = [option for option, is_asked in needs.items() if is_asked] if dry_run else ["writing"]
        if asked:
            raise ValueError(
                f"{name} is a preset, and {asked[0]} needs weights: give a folder or OWNER/NAME; --dry-run needs none."
            )

    def grow_from(source: str | Path, options: "WriteOptions") -> "GrowthResult":
        return grow_checkpoint(
            source,
            out,
            to,
            overrides=dict(parse_override(text) for text in overrides or ()),
            method=make_method(method, noise=noise, steps=mask_steps),
            optimizer=optimizer,
            layers=layers,
            new_layers=new_layers,
            calibration=calibration,
            multipliers=multipliers,
            dtype=dtype,
            seed=seed,
            options=options,
            dry_run=dry_run,
        )

    def upcycle(source: str | Path, options: "WriteOptions") -> "Upcycling":
        return upcycle_checkpoint(
            source,
            out,
            experts or 0,
            top_k or 0,
            noise=noise or 0.0,
            dtype=dtype,
            seed=seed,
            options=options,
            dry_run=dry_run,
        )

    run_and_report(
        "growing",
        out,
        write,
        workers=workers,
        memory=memory,
        max_shard_size=max_shard_size,
        rank=rank,
        world_size=world_size,
        dry_run=dry_run,
        overwrite=overwrite,
        no_digest=no_digest,
        verify_source=verify_source,
        as_json=as_json,
        debug=debug,
        allow_nonfinite=allow_nonfinite,
        describe=describe if experts is None else describe_experts,
        show=print_growth if experts is None else print_experts,
    )


def parse_override(text: str) -> tuple[str, int | float | bool | str]:
    """Read `key=value`; the value is JSON, or text where it is none.

    Raises:
        ValueError: there is no `=` or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {text!r} is not KEY=VALUE, for example hidden_size=10240.")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def describe(result: "GrowthResult", out: Path, options: "WriteOptions") -> dict[str, Any]:
    """The growth as one JSON object; a dry run's has every tensor."""
    from teleflm.plan_report import describe_result

    return {
        "source": asdict(result.growth.source),
        "target": asdict(result.growth.target),
        "parameters": result.growth.target.num_parameters,
        "layers": [{"source": origin.source, "copy": origin.is_copy} for origin in result.growth.layers],
        "preserves_function": not result.growth.departures,
        "layer_distances": [asdict(distance) for distance in result.distances],
        **describe_result(result, out, options),
    }


def describe_experts(result: "Upcycling", out: Path, options: "WriteOptions") -> dict[str, Any]:
    """The experts as one JSON object; a dry run's has every tensor."""
    from teleflm.plan_report import describe_result

    return {
        "source": asdict(result.source),
        "num_local_experts": result.experts.num_local_experts,
        "num_experts_per_tok": result.experts.num_experts_per_tok,
        "noise": result.noise,
        "parameters": result.experts.num_parameters,
        "active_parameters": result.experts.num_active_parameters,
        "preserves_function": not result.noise,
        **describe_result(result, out, options),
    }


def print_experts(result: "Upcycling", out: Path, options: "WriteOptions") -> None:
    """A summary for people: what became of how much, then the plan or what was written."""
    from rich.table import Table

    from teleflm.plan_report import print_result

    made, source = result.experts, result.source.num_parameters
    fields = Table("", "source", "target", title="Experts", title_justify="left")
    fields.add_row("num_local_experts", "none", f"{made.num_local_experts:,}")
    fields.add_row("num_experts_per_tok", "none", f"{made.num_experts_per_tok:,}")
    fields.add_row("parameters", f"{source:,}", f"{made.num_parameters:,}")
    fields.add_row("active for a token", f"{source:,}", f"{made.num_active_parameters:,}")
    print_table(fields)
    print_result(result, out, options)


def print_growth(result: "GrowthResult", out: Path, options: "WriteOptions") -> None:
    """A summary for people: what grows, then the plan or what was written."""
    from rich.table import Table

    from teleflm.plan_report import print_result

    fields = Table("", "source", "target", title="Growth", title_justify="left")
    old, new = asdict(result.growth.source), asdict(result.growth.target)
    for field in old:
        if old[field] != new[field]:
            fields.add_row(field, f"{old[field]:,}", f"{new[field]:,}")
    fields.add_row("parameters", f"{result.growth.source.num_parameters:,}", f"{result.growth.target.num_parameters:,}")
    print_table(fields)
    if result.distances:
        distances = Table("layer", "1 - cos", "moved by", title="Layer distances", title_justify="left")
        for distance in result.distances:
            distances.add_row(str(distance.layer), f"{distance.cosine:.4f}", f"{distance.relative:.4f}")
        print_table(distances)
    print_result(result, out, options)
