# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""A penalty in the gradient is known also where the settings of a run's groups are lost."""

from types import SimpleNamespace

import pytest

from conversion.adam_state import AdamState, check_gradients_alone
from conversion.checkpoint.errors import CheckpointError
from conversion.native.megatron_optimizer import _groups, with_decay
from conversion.native.table import MEGATRON

GROUPS = [{"weight_decay": 0.1, "lr": 1.0}, {"weight_decay": 0.1, "lr": 2.0}]  # of which no rule tells the members


@pytest.mark.parametrize(("said", "found"), [(False, {"decoupled_weight_decay": False}), (True, {}), (None, {})])
def test_groups_that_are_left_out_leave_the_penalty(said, found):
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    weight = SimpleNamespace(shape=(4, 4))
    groups, notes = _groups(with_decay(GROUPS, {"decoupled_weight_decay": said}), None, {name: weight}, MEGATRON)
    assert groups[0][0] == found
    assert "were left out: they do not say which weights are in which" in notes[0]
    state = AdamState("optimizer.pt", groups, {}, {})
    if said is False:
        with pytest.raises(CheckpointError, match="group 0 has decoupled_weight_decay False and no weight_decay: Adam"):
            check_gradients_alone(state)
    else:
        check_gradients_alone(state)


@pytest.mark.parametrize("own", [False, True])
def test_a_groups_own_word_goes_first(own):
    group = {"decoupled_weight_decay": own}
    assert with_decay([group], {"decoupled_weight_decay": not own}) == [group]
