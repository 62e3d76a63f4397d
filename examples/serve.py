# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Make what an engine loads that knows no Tele-FLM, and say the command that serves it.

python examples/serve.py MODEL OUT [granite|llama|gguf]
"""

import sys

from conversion import export_checkpoint

COMMANDS = {
    "granite": "vllm serve {out}",
    "llama": "vllm serve {out}",
    "gguf": "llama-server --jinja -m {out}/{file}",  # the first of several names the others
}


def main(model: str, out: str, to: str = "granite") -> str:
    """The command."""
    result = export_checkpoint(model, out, to=to)
    print(*result.notes, sep="\n")
    command = COMMANDS[to].format(out=out, file=result.shards[0].filename)
    print(command)
    return command


if __name__ == "__main__":
    main(*sys.argv[1:])
