# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The methods of growth: how what is new is kept from being heard, each with the settings it has and no other.

Two do not keep it from being heard. They are for comparison, and for who trains long enough afterwards that what the
growth broke does not matter (arXiv 2605.13405).
"""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from conversion.checkpoint.errors import CheckpointError


@dataclass(frozen=True)
class Zero:
    """New entries that write the residual stream are zero."""

    name: ClassVar[str] = "zero"
    silences: ClassVar[bool] = True


@dataclass(frozen=True)
class Tile:
    """Features, heads and neurons are repeated; for a hidden_size that is a multiple of the old one.

    Args:
        noise: what tells copies apart, as a fraction of a weight's own standard deviation; 0 for none.

    Raises:
        CheckpointError: noise is not from 0 to below 1.
    """

    noise: float = 0.3
    name: ClassVar[str] = "tile"
    silences: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise CheckpointError(f"noise is {self.noise}, expected a number from 0 to below 1.")


@dataclass(frozen=True)
class Mask:
    """New entries are random everywhere, in a checkpoint for training whose masks silence them at first.

    Args:
        steps: over how many optimizer steps the masks rise from 0 to 1.

    Raises:
        CheckpointError: steps is below 1.
    """

    steps: int = 5000
    name: ClassVar[str] = "mask"
    silences: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise CheckpointError(f"mask_steps is {self.steps}, expected at least 1.")


@dataclass(frozen=True)
class Random:
    """New entries are random everywhere and heard at once; the function is not preserved.

    What reads a wider axis adds up more, so activations grow: by sqrt(new / old) where the inputs are independent.
    """

    name: ClassVar[str] = "random"
    silences: ClassVar[bool] = False


@dataclass(frozen=True)
class Rms:
    """As `Random`, with every activation at the scale it had; the function is not preserved.

    A matrix that reads an axis which grows from n to N entries is multiplied by sqrt(n / N), its old entries too: the
    variance of a sum of N independent terms is then that of n. The principle, that a wider model should begin with the
    activations' root mean squares of the old one, is SPARKLING's (arXiv 2602.02472); it initialises copies, and this
    draws new entries, so it is not that paper's method. Its other half, that only what is new loses its moments and is
    warmed up again, is what `grow --optimizer` and `rewarm_new_steps` do.
    """

    name: ClassVar[str] = "rms"
    silences: ClassVar[bool] = False


Method: TypeAlias = Zero | Tile | Mask | Random | Rms
METHODS = ("zero", "tile", "mask", "random", "rms")


def make_method(name: str, *, noise: float | None = None, steps: int | None = None) -> Method:
    """A method by its name, as the command line has it.

    Args:
        name: `zero`, `tile`, `mask`, `random` or `rms`.
        noise: of `tile`.
        steps: of `mask`.

    Raises:
        CheckpointError: there is no such method, or it has no such setting.
    """
    for option, value, owner in (("--noise", noise, "tile"), ("--mask-steps", steps, "mask")):
        if value is not None and name != owner:
            raise CheckpointError(f"{option} is for --method {owner}, not {name}.")
    match name:
        case "zero":
            return Zero()
        case "tile":
            return Tile() if noise is None else Tile(noise)
        case "mask":
            return Mask() if steps is None else Mask(steps)
        case "random":
            return Random()
        case "rms":
            return Rms()
    raise CheckpointError(f"method is {name!r}, expected one of {', '.join(METHODS)}.")
