# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Run by a Python that has vLLM: a folder, prompts as JSON on stdin; what vLLM computes as JSON in a file.

    {"folder": ..., "prompts": [[ids], ...] or [text, ...], "remote_code": bool, "new_tokens": int, "out": path}
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    asked = json.load(sys.stdin)
    llm = LLM(
        asked["folder"],
        dtype="float32",
        enforce_eager=asked.get("eager", True),
        max_model_len=128,
        max_num_seqs=8,
        trust_remote_code=asked["remote_code"],
        **asked.get("engine", {}),
    )
    prompts = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["new_tokens"], logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    rows = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        (answer,) = output.outputs
        ids = [*output.prompt_token_ids, *answer.token_ids]
        steps = [*output.prompt_logprobs[1:], *answer.logprobs]
        logprobs = [step[token].logprob for token, step in zip(ids[1:], steps, strict=True)]
        rows.append({"prompt": list(output.prompt_token_ids), "ids": ids, "logprobs": logprobs, "text": answer.text})
    model = llm.llm_engine.model_config
    Path(asked["out"]).write_text(json.dumps({"rows": rows, "architecture": model.architecture}))


if __name__ == "__main__":
    main()
