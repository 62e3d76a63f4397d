# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Train a grown model on, on plain text: packed, with the learning rate of the grown matrices scaled as muP has it.

python examples/train_on.py GROWN TEXT.jsonl OUT SOURCE_HIDDEN_SIZE [STEPS]
"""

import sys

from transformers import TrainingArguments

from growth.training.train import GrowthArguments, train


def main(grown: str, text: str, out: str, source_hidden_size: str, steps: str = "20") -> dict[str, float]:
    """The metrics of the run."""
    data = GrowthArguments(
        model_name_or_path=grown, train_files=[text], block_size=64, mup_base_width=int(source_hidden_size)
    )
    args = TrainingArguments(
        output_dir=out,
        max_steps=int(steps),
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        warmup_steps=5,  # moments are fresh, and new entries are heard for the first time
        logging_steps=5,
        report_to="none",
    )
    return train(data, args)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
