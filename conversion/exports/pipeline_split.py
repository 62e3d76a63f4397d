# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""How Megatron-LM splits the layers of a model over pipeline stages, and over the chunks that a stage has: evenly, or
as its options say, of which there are three kinds.

    first=16,last=16        --decoder-first-pipeline-num-layers 16 --decoder-last-pipeline-num-layers 16
    embedding,loss          --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split
    Et*17|(t*18|)*6t*15L    --pipeline-model-parallel-layout 'Et*17|(t*18|)*6t*15L'

In the last, E is the embedding, t a layer, L the head with the loss, and | lies between chunks. Chunks follow each
other over the stages first, then over the chunks of a stage.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..checkpoint.errors import CheckpointError

_AT_ENDS = re.compile(r"(?P<end>first|last)=(?P<layers>[0-9]{1,6})")
_COUNTED = ("embedding", "loss")
# Where Megatron's own parser takes more (a factor of a factor, groups in groups), it means what nobody would expect.
_TIMES = r"\*[0-9]{1,6}"
_ITEM = rf"[EtL|](?:{_TIMES})?"
_STRING = re.compile(rf"(?:{_ITEM}|\((?:{_ITEM})+\){_TIMES})+")
_PART = re.compile(rf"\((?P<group>[^)]+)\)\*(?P<times>[0-9]+)|(?P<item>{_ITEM})")


@dataclass(frozen=True)
class PipelineSplit:
    """A model's layers over stages and chunks.

    Args:
        layers: how many there are.
        stages: pipeline-parallel ranks.
        chunks: of layers in each stage.
        layout: one of the three kinds above; evenly if none is given.
    """

    layers: int
    stages: int
    chunks: int = 1
    layout: str | None = None

    @property
    def places(self) -> int:
        """Chunks of all stages."""
        return self.stages * self.chunks

    def ranges(self) -> dict[tuple[int, int], range]:
        """The layers of each (stage, chunk).

        Raises:
            CheckpointError: Megatron-LM cannot split them like that; names the numbers, and what it could do.
        """
        ends = [*accumulate(self._sizes(), initial=0)]
        return {
            (place % self.stages, place // self.stages): range(ends[place], ends[place + 1])
            for place in range(self.places)
        }

    def arguments(self) -> dict[str, Any]:
        """What a run that is split like that has among its arguments, beside the numbers of stages and chunks."""
        ends, counted = _at_ends(self.layout), _counted(self.layout)
        several = self.chunks > 1
        split: dict[str, Any] = {}
        if ends:
            split = {f"decoder_{end}_pipeline_num_layers": layers for end, layers in ends.items()}
            split["num_virtual_stages_per_pipeline_rank"] = self.chunks if several else None
        elif counted:
            split = {f"account_for_{what}_in_pipeline_split": True for what in counted}
        elif self.layout:
            split = {"pipeline_model_parallel_layout": self.layout}
        per_chunk = not ends and (counted or not self.layout) and several  # else Megatron-LM wants it unsaid
        split["num_layers_per_virtual_pipeline_stage"] = (
            (self.layers + len(counted)) // self.places if per_chunk else None
        )
        return split

    def options(self) -> str:
        """Those of Megatron-LM's command line that it does not take from a checkpoint, with a space before each."""
        said = {name: value for name, value in self.arguments().items() if value is not None}
        said.pop("num_layers_per_virtual_pipeline_stage", None)
        return "".join(
            f" --{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
            for name, value in said.items()
        )

    def _sizes(self) -> Sequence[int]:
        """Layers of each chunk, in the order of the layers."""
        if self.layout is None:
            return self._even(0)
        if self.stages == 1:
            raise CheckpointError(
                f"--pipeline-layout is {self.layout}, --pp is 1; it splits layers over several stages."
            )
        if ends := _at_ends(self.layout):
            return self._with_ends(ends.get("first"), ends.get("last"))
        if counted := _counted(self.layout):
            sizes = [*self._even(len(counted))]
            sizes[0] -= "embedding" in counted
            sizes[-1] -= "loss" in counted
            return sizes
        return self._as_listed(self.layout)

    def _even(self, further: int) -> Sequence[int]:
        """As many layers in each chunk, with embedding and loss as further ones."""
        count = self.layers + further
        if count % self.places:
            what = f"num_hidden_layers {self.layers}" + (f" + {further} for {self.layout}" if further else "")
            raise CheckpointError(
                f"{what} is not a multiple of --pp {self.stages} x --vpp {self.chunks}; --pipeline-layout "
                f"{shlex.quote(self._balanced())} is as even as it gets."
            )
        return [count // self.places] * self.places

    def _with_ends(self, first: int | None, last: int | None) -> Sequence[int]:
        """So many layers in the first stage and in the last, as many in each of the others."""
        others = self.stages - sum(end is not None for end in (first, last))
        left = self.layers - (first or 0) - (last or 0)
        each = left // others if others else 0
        if first == 0 or last == 0 or left < 0 or each * others != left or (others and not each):
            raise CheckpointError(
                f"--pipeline-layout {self.layout} leaves {left} of {self.layers} layers for the other {others} of --pp "
                f"{self.stages} stages; every stage has to have some, and each of these as many as the next."
            )
        if not others and self.chunks > 1:  # where megatron-core (0.16 to 0.20) divides by the number of the others
            raise CheckpointError(
                f"--pipeline-layout {self.layout}: megatron-core knows no first and last of --pp 2 x --vpp "
                f"{self.chunks}; first={first} alone is the same split."
            )
        of_stages = [each if first is None else first, *[each] * (self.stages - 2), each if last is None else last]
        for stage, size in enumerate(of_stages):
            if size % self.chunks:
                raise CheckpointError(
                    f"--pipeline-layout {self.layout} gives stage {stage} {size} layers, which is not a multiple of "
                    f"--vpp {self.chunks}."
                )
        return [size // self.chunks for size in of_stages] * self.chunks

    def _as_listed(self, layout: str) -> Sequence[int]:
        """As many as there are in each chunk of Megatron's string."""
        text = layout.replace(",", "")  # which Megatron takes for ornaments
        if not _STRING.fullmatch(text):
            why = "; Tele-FLM has no layers m (of multi-token prediction)" if "m" in text else ""
            raise CheckpointError(
                f"--pipeline-layout is {layout!r}, expected first=N,last=N, or embedding,loss, or Megatron's string of "
                f"E, t, L and |, such as {self._balanced()}{why}."
            )
        places, layers = _length(text, "|") + 1, _length(text, "t")
        if places != self.places:
            raise CheckpointError(
                f"--pipeline-layout {layout} has {places} chunks, --pp {self.stages} x --vpp {self.chunks} makes "
                f"{self.places}."
            )
        if layers != self.layers:
            raise CheckpointError(
                f"--pipeline-layout {layout} has {layers} layers, num_hidden_layers is {self.layers}."
            )
        if _length(text, "E") != 1 or _length(text, "L") != 1:
            raise CheckpointError(f"--pipeline-layout {layout}: expected one E and one L.")
        chunks = _expand(text).split("|")
        if "".join(chunks) != f"E{'t' * layers}L" or not chunks[0] or not chunks[-1]:
            raise CheckpointError(
                f"--pipeline-layout {layout}: expected E at the begin of the first chunk, L at the end of the last."
            )
        return [chunk.count("t") for chunk in chunks]

    def _balanced(self) -> str:
        """Megatron's string of chunks that differ by one layer at most, the larger ones away from the embedding."""
        size, more = divmod(self.layers, self.places)
        larger = min(more, self.places - 2)
        ends = _run("t", size), _run("t", size + (more > larger))
        middle = _run(f"({_run('t', size + 1)}|)", larger) + _run(f"({_run('t', size)}|)", self.places - 2 - larger)
        return f"E{ends[0]}|{middle}{ends[1]}L"


def _at_ends(layout: str | None) -> dict[str, int]:
    """`first=16,last=16` as numbers; nothing of another kind."""
    found = [_AT_ENDS.fullmatch(part) for part in (layout or "").split(",")]
    ends = {match["end"]: int(match["layers"]) for match in found if match}
    return ends if len(ends) == len(found) else {}


def _counted(layout: str | None) -> list[str]:
    """What of `embedding,loss` counts as a layer; nothing of another kind."""
    parts = (layout or "").split(",")
    return parts if set(parts) <= {*_COUNTED} and len({*parts}) == len(parts) else []


def _length(text: str, symbol: str) -> int:
    """How often a string has a symbol once its factors are multiplied out, which they are not."""
    return sum(
        (_length(part["group"], symbol) * int(part["times"]))
        if part["group"]
        else (part["item"][0] == symbol) * int(part["item"][2:] or 1)
        for part in _PART.finditer(text)
    )


def _expand(text: str) -> str:
    return "".join(
        _expand(part["group"]) * int(part["times"]) if part["group"] else part["item"][0] * int(part["item"][2:] or 1)
        for part in _PART.finditer(text)
    )


def _run(symbol: str, times: int) -> str:
    """A symbol, or a group, so many times, as short as Megatron's string has it."""
    plain = symbol.strip("()")
    return "" if not times or not plain else plain if times == 1 else f"{symbol}*{times}"
