# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The command `teleflm train`."""

import typer


def train(context: typer.Context) -> None:
    """Continue the pretraining of a model, grown or not: packed text, masks that rise, grown moments, muP groups, a
    learning rate that goes on from the run before (continue_schedule), what is new warmed up (rewarm_new_steps).

    Takes a YAML file, or --key value: the fields of growth.training.train.GrowthArguments and of transformers'
    TrainingArguments; model_name_or_path, train_files and output_dir are needed. On several devices: accelerate launch
    --no_python teleflm train, or torchrun --no-python teleflm train, with the same arguments.
    """
    from growth.training.train import main

    raise typer.Exit(main(context.args))
