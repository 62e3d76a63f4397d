# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What a person reads of a model: its card."""

from ..architecture import Architecture
from ..checkpoint.manifest import MANIFEST


def model_card(architecture: Architecture, dtype: str, lineage: list[str], *, own_code: bool = True) -> str:
    """A README.md with the facts that follow from the configuration.

    Args:
        architecture: the model's numbers.
        dtype: of its weights.
        lineage: one sentence a step of what it was made from.
        own_code: whether it loads with our model code; the tokenizer always does.
    """
    a = architecture
    rows = {
        "Parameters": f"{a.num_parameters:,}",
        "Layers": a.num_hidden_layers,
        "Hidden size": f"{a.hidden_size:,}",
        "Attention heads (key/value)": f"{a.num_attention_heads} ({a.num_key_value_heads})",
        "Feed-forward size": f"{a.intermediate_size:,}",
        "Vocabulary rows": f"{a.vocab_size:,}",
        "Factor on the logits": f"{a.logit_scale:g}",
        "Weights": dtype,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    steps = "\n".join(f"{i}. {step}" for i, step in enumerate(lineage, 1))
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- TeleFLM
---
# A Tele-FLM model

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("."{", trust_remote_code=True" if own_code else ""})
```

With the `teleflm` package installed, `import modeling_teleflm` replaces `trust_remote_code=True`.

## Made from

{steps}

`{MANIFEST}` has the full record and the digest of every tensor.
"""
