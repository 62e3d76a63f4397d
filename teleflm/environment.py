# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What this machine has, and which commands can run on it: packages, accelerator, memory, disk, system."""

import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from conversion.checkpoint.errors import CheckpointError, one_line
from conversion.checkpoint.kernel_copy import available_memory
from conversion.checkpoint.limits import default_workers
from conversion.extras import install_line

# What each extra of the package is for, by the command lines that need it; whatever is not named needs no extra.
NEEDED_BY = {
    "report": ("verify --text --report", "grow-plan --plot"),
    "model": ("chat", "eval --loaded", "verify --forward loaded", "publish, to try the folder", "modeling_teleflm"),
    "train": ("train",),
    "sft": ("sft validate --model, select, prepare, preview, train", "sft export --merge", "chat --adapter"),
    "eval": ("eval --harness",),
    "sentence": ("sft select --embedder MODEL",),
    "ray": ("sft select --ray",),
    "fp8": ("loading 8-bit floats in transformers",),
    "qlora": ("sft train, with load_in_4bit",),
    "flash": ("attn_implementation: flash_attention_2",),
    "remote": ("s3://, gs:// and https:// as a source",),
    "tensorboard": ("report_to: tensorboard",),
    "wandb": ("report_to: wandb",),
    "mlflow": ("report_to: mlflow",),
    "trackio": ("report_to: trackio",),
    "swanlab": ("report_to: swanlab",),
}
_DISTRIBUTION = "teleflm"


@dataclass(frozen=True)
class Package:
    """A package that something needs.

    Args:
        requirement: its name and the versions that do, as in the package's own metadata.
        installed: its version here, None without it.
        fits: whether that is one of those.
    """

    requirement: str
    installed: str | None
    fits: bool


@dataclass(frozen=True)
class Need:
    """What some command lines need of packages.

    Args:
        extra: the extra that installs them; None for what the package itself needs.
        commands: the command lines; empty for those that need nothing more.
        packages: what they need.
    """

    extra: str | None
    commands: tuple[str, ...]
    packages: tuple[Package, ...]

    @property
    def missing(self) -> tuple[Package, ...]:
        """Those that are not here, or not in a version that does."""
        return tuple(package for package in self.packages if not package.fits)

    @property
    def way_out(self) -> str:
        """The command that installs what is missing."""
        return install_line(self.extra) if self.extra else f"pip install {_DISTRIBUTION}"


@dataclass(frozen=True)
class Environment:
    """The machine, as commands find it.

    Args:
        python: version of the interpreter.
        system: operating system and machine.
        versions: of the package and of torch and transformers, None where not installed.
        needs: packages of the package itself, then of each extra.
        accelerators: names of the devices that torch computes on, with their memory in bytes.
        accelerator_note: why there is none, as far as that is known.
        processors: how many this process may use, as `--workers` counts them.
        memory: bytes that this process may use.
        disk: free bytes where the current folder lies.
        cache: folder where the Hub's client keeps downloads, and its free bytes.
    """

    python: str
    system: str
    versions: dict[str, str | None]
    needs: tuple[Need, ...]
    accelerators: tuple[tuple[str, int], ...]
    accelerator_note: str
    processors: int
    memory: int
    disk: int
    cache: tuple[str, int]

    @cached_property
    def problems(self) -> list[str]:
        """What keeps every command from working, a sentence each."""
        base = self.needs[0]
        found = [f"{shown(package)}; {base.way_out}." for package in base.missing]
        if not hasattr(os, "pread"):
            found.append(f"{self.system} has no os.pread, by which checkpoints are read: use Linux, macOS or WSL.")
        return found

    @cached_property
    def notes(self) -> list[str]:
        """What is worth knowing and keeps nothing from working, a sentence each."""
        if self.system.startswith("Linux"):
            return []
        return [f"{self.system} is not Linux, on which alone the tests run; calls that only Linux has are replaced."]


def shown(package: Package) -> str:
    """A package that does not do, in words."""
    if package.installed is None:
        return f"{package.requirement} is not installed"
    return f"{package.requirement} is needed, and {package.installed} is installed"


def examine_environment() -> Environment:
    """Look at the machine.

    Nothing is imported but torch, which alone knows its devices, and the Hub's client's constants, as several variables
    of the environment move its cache.

    Raises:
        CheckpointError: the package runs from its files, without having been installed.
    """
    accelerators, note = _accelerators()
    cache = _hub_cache()
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        versions={name: _version(name) for name in (_DISTRIBUTION, "torch", "transformers")},
        needs=tuple(needs()),
        accelerators=accelerators,
        accelerator_note=note,
        processors=default_workers(),
        memory=available_memory(),
        disk=shutil.disk_usage(".").free,
        cache=(str(cache), shutil.disk_usage(_existing(cache)).free),
    )


def needs() -> list[Need]:
    """What the package itself and each extra that users choose needs, held against what is installed.

    The versions are those of the installed package's metadata, so that there is one place that states them.

    Raises:
        CheckpointError: the package runs from its files, without having been installed.
    """
    try:
        stated = [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:
        raise CheckpointError(f"{_DISTRIBUTION} is not installed, only its files are here: pip install it.") from None
    return [
        Need(extra, NEEDED_BY.get(extra or "", ()), tuple(_examine(_of_extra(stated, extra))))
        for extra in (None, *NEEDED_BY)
    ]


def _of_extra(stated: Iterable[Requirement], extra: str | None) -> list[Requirement]:
    if extra is None:
        return [item for item in stated if item.marker is None or item.marker.evaluate({"extra": ""})]
    return [
        item
        for item in stated
        if item.marker and item.marker.evaluate({"extra": extra}) and not item.marker.evaluate({"extra": ""})
    ]


def _examine(requirements: Iterable[Requirement]) -> Iterable[Package]:
    for requirement in requirements:
        installed = _version(requirement.name)
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        yield Package(f"{requirement.name}{requirement.specifier}", installed, fits)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _accelerators() -> tuple[tuple[tuple[str, int], ...], str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA's that does not load
        return (), f"torch cannot be imported: {one_line(error)}"
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return tuple((device.name, device.total_memory) for device in devices), ""
    if torch.backends.mps.is_available():
        return (("Apple GPU", 0),), "its memory is the machine's"
    built = torch.version.cuda or torch.version.hip
    return (), f"torch {torch.__version__} {'finds no device' if built else 'is built for the CPU alone'}"


def _hub_cache() -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:  # which is said as a problem; this is where it would be
        return Path("~/.cache/huggingface/hub").expanduser()
    return Path(HF_HUB_CACHE)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())
