# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What each parameter of a Tele-FLM is to an optimizer, by its name alone.

Not by its number of dimensions, which a sharded or flattened parameter does not keep.
"""

from collections.abc import Iterable
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["vector", "matrix", "norm"]

_KINDS: dict[str, Kind] = {
    "embed_tokens": "vector",
    "lm_head": "vector",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "matrix"),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), "norm"),
}
# In the order of the groups. The first group's rate is what Trainer logs: the one that the width does not change.
KINDS: tuple[Kind, ...] = ("vector", "matrix", "norm")


def parameter_kind(name: str) -> Kind:
    """What the parameter of a Tele-FLM is under muP; norms, vectors too, are apart because they take no weight decay.

    Raises:
        ValueError: no parameter of a Tele-FLM has that name, as with an adapter's.
    """
    owner, _, leaf = name.rpartition(".")
    kind = _KINDS.get(owner.rpartition(".")[-1])
    if leaf != "weight" or kind is None:
        raise ValueError(f"{name} is no weight of a Tele-FLM; muP has no rule for it, train with one learning rate.")
    return kind


def group_names(names: Iterable[str]) -> dict[Kind, list[str]]:
    """Names of parameters by kind, in the order of the groups; kinds without any are left out.

    Raises:
        ValueError: see `parameter_kind`.
    """
    kinds = {name: parameter_kind(name) for name in names}
    groups = {kind: [name for name, other in kinds.items() if other == kind] for kind in KINDS}
    return {kind: members for kind, members in groups.items() if members}


__all__ = ["KINDS", "Kind", "group_names", "parameter_kind"]
