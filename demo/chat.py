# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Chat with a model of the Hub as somebody does who has transformers, and nothing of this project.

    python -I chat.py MODEL < chats.json

MODEL is a folder, or a name on the Hub.

The input is a list of chats, each a list of what the user says in turn. Each answer is one line of JSON on stdout.
"""

import json
import sys
from typing import Any

PROJECT = ("teleflm", "modeling_teleflm", "conversion", "evaluation", "growth", "sft", "demo", "tests")


def main(name: str) -> None:
    """Answer the chats on stdin."""
    hide_project()
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    for chat in json.load(sys.stdin):
        messages = []
        for question in chat:
            messages.append({"role": "user", "content": question})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
            output = model.generate(**prompt, max_new_tokens=80, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            messages.append({"role": "assistant", "content": answer})
            print(json.dumps({"question": question, "answer": answer, "code": type(model).__module__}), flush=True)


def hide_project() -> None:
    """Make sure that nothing of this project can be imported.

    `python -I` keeps its folder off the path, but it may be installed: None in `sys.modules` makes an import fail.
    """
    sys.modules.update(dict.fromkeys(PROJECT))  # type: ignore[arg-type]
    try:
        import modeling_teleflm  # noqa: F401
    except ModuleNotFoundError:
        return
    sys.exit("modeling_teleflm can be imported: what follows would prove nothing.")


if __name__ == "__main__":
    main(sys.argv[1])
