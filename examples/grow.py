# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Grow a model by a quarter in width and by two layers, and have somebody else say whether it computes the same.

python examples/grow.py SOURCE OUT
"""

import sys
from pathlib import Path

from conversion.architecture import Architecture, load_config
from growth import grow_checkpoint, verify_checkpoints


def main(source: str, out: str) -> bool:
    """Whether the grown model is certified; growth and certificate share no code."""
    old = Architecture.from_config(load_config(Path(source, "config.json")))
    target = {
        "hidden_size": old.hidden_size * 5 // 4,
        "num_attention_heads": old.num_attention_heads * 5 // 4,
        "num_key_value_heads": old.num_key_value_heads * 5 // 4,
        "num_hidden_layers": old.num_hidden_layers + 2,
    }
    result = grow_checkpoint(source, out, target)
    print(*result.notes, sep="\n")
    verification = verify_checkpoints(source, out)
    print(verification.sentence)
    return bool(verification.same)


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:]))
