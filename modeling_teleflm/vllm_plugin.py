# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Tele-FLM for vLLM, which calls [`register`] in each of its processes (entry point `vllm.general_plugins`).

Configuration and tokenizer are then this package's, so that no code of a repository is executed; and so is the class of
the model, in the place of vLLM's own, which leaves out the factor on the embeddings. Nothing here imports vLLM before
it asks for the class.
"""


def register() -> None:
    """Make TeleFLM known to vLLM."""
    from vllm import ModelRegistry  # configuration and tokenizer are known by the import of this package

    ModelRegistry.register_model("TeleFLMForCausalLM", "modeling_teleflm.vllm_model:TeleFLMForCausalLM")


__all__ = ["register"]
