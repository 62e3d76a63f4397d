# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Fine-tune a model on conversations, and make a plain Hub folder of the run.

python examples/fine_tune.py MODEL DATA.jsonl RUN OUT [STEPS]
"""

import sys

from sft.export import export_model
from sft.training.recipe import Recipe
from sft.training.train import train


def main(model: str, data: str, run: str, out: str, steps: str = "10") -> None:
    """Only what the assistant says is trained on; keys are TRL's own."""
    recipe = Recipe.from_dict(
        {
            "model_name_or_path": model,
            "data_files": data,
            "output_dir": run,
            "max_steps": int(steps),
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 2,
            "max_length": 256,
            "dtype": "float32",
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": "none",
        }
    )
    train(recipe)
    exported = export_model(run, out)
    print(f"{exported.folder}: teleflm chat {exported.folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
