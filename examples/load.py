# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Load a model and let it continue a text.

python examples/load.py MODEL ["The text that it continues"]
"""

import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_teleflm  # noqa: F401  (registers the architecture; no Python file of the folder is executed)


def main(model_name: str, text: str = "The capital of France is") -> str:
    """The text and what the model makes of it, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model: Any = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto", device_map="auto")
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
