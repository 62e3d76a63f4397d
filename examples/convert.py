# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Rewrite any checkpoint, a training run or pickled .bin files, as a Hub folder of safetensors, and check every byte.

python examples/convert.py SOURCE OUT [VOCAB_SIZE]
"""

import sys

from conversion import WriteOptions, convert_checkpoint, inspect_checkpoint


def main(source: str, out: str, vocab_size: str | None = None) -> None:
    """Plan it, do it, and read it again; a call that was killed goes on where it was."""
    size = int(vocab_size) if vocab_size else None
    plan = convert_checkpoint(source, out, vocab_size=size, dry_run=True)
    print(f"{plan.plan.nbytes / 1e9:.2f} GB in {len(plan.shards)} files", *plan.notes, sep="\n- ")
    convert_checkpoint(source, out, vocab_size=size, options=WriteOptions(memory="256MB"))
    found = inspect_checkpoint(out, check=True)
    print(f"{found.parameters:,} parameters; {len(found.damages or [])} differ from the record")


if __name__ == "__main__":
    main(*sys.argv[1:])
