# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Kernels that a run asks for are used, or the run is refused before a model is loaded."""

import types
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import is_kernels_available

from growth.training import kernels
from growth.training.errors import RunError
from growth.training.kernels import check_kernels, check_kernels_are_used
from tests.fixtures.tiny import tiny_model


def arguments(device: str = "cuda", **keys):
    """What a machine with accelerators would say; there may be none here."""
    return SimpleNamespace(
        device=torch.device(device), **{"use_liger_kernel": False, "liger_kernel_config": None, **keys}
    )


@pytest.mark.parametrize(
    ("args", "is_there", "message"),
    [
        (arguments(use_liger_kernel=True), True, "use_liger_kernel has no effect here; Liger Kernel knows no Tele-FLM"),
        (arguments(liger_kernel_config={"rope": True}), True, "liger_kernel_config has no effect here"),
        (arguments("cpu"), True, "this run is on CPUs, for which no layer of the model has a kernel"),
        (arguments(), False, r"the package kernels is not there .*: pip install 'kernels>=\d\S+,<\d\S+'"),
        (arguments(), True, None),
    ],
)
def test_kernels_that_cannot_be_had_are_refused(args, is_there, message, monkeypatch):
    monkeypatch.setattr(kernels, "is_kernels_available", lambda: is_there)
    if message is None:
        check_kernels(args, use_kernels=True)
        return
    with pytest.raises(RunError, match=message) as error:
        check_kernels(args, use_kernels=True)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(is_kernels_available(), reason="the package is here")
def test_it_is_what_transformers_would_refuse_after_loading():
    with pytest.raises(ValueError, match="Kernels are not available"):
        tiny_model().set_use_kernels(True)


def test_a_model_on_which_no_kernel_was_put_is_noticed():
    """The package kernels binds a kernel's forward to the module, and leaves it alone where it has none."""
    model = tiny_model()
    with pytest.raises(RunError, match="no layer has a kernel"):
        check_kernels_are_used(model)
    norm = model.model.norm
    norm.forward = types.MethodType(type(norm).forward, norm)
    check_kernels_are_used(model)
