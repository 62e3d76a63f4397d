# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Run by a Python that has vLLM: folders and prompts as JSON on stdin; what vLLM computes as JSON in a file.

    {"remote_code": bool, "new_tokens": int, "out": path, "folders": {name: {"folder": path, "prompts": [...]}}}

A prompt is a list of token ids or a text. One process serves them all, one after the other: importing vLLM takes longer
than any of them.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def served(folder: str, prompts: list, remote_code: bool, new_tokens: int) -> list[dict]:
    """For each prompt the ids with their greedy continuation, log-probabilities of all but the first, and the text."""
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        trust_remote_code=remote_code,
    )
    asked = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    rows = []
    for output in llm.generate(asked, sampling, use_tqdm=False):
        (answer,) = output.outputs
        ids = [*output.prompt_token_ids, *answer.token_ids]
        steps = [*output.prompt_logprobs[1:], *answer.logprobs]
        logprobs = [step[token].logprob for token, step in zip(ids[1:], steps, strict=True)]
        rows.append({"prompt": list(output.prompt_token_ids), "ids": ids, "logprobs": logprobs, "text": answer.text})
    return rows


def main() -> None:
    asked = json.load(sys.stdin)
    found = {}
    for name, one in asked["folders"].items():
        try:
            found[name] = served(one["folder"], one["prompts"], asked["remote_code"], asked["new_tokens"])
        except Exception as error:  # the others are judged all the same
            found[name] = f"{type(error).__name__}: {error}"
        gc.collect()
        cleanup_dist_env_and_memory()
        Path(asked["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
