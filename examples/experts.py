# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Make experts of a dense model, and have somebody else say whether they compute the same.

python examples/experts.py SOURCE OUT
"""

import sys

from growth import upcycle_checkpoint, verify_checkpoints


def main(source: str, out: str) -> bool:
    """Whether the experts are certified; what makes them and the certificate share no code."""
    result = upcycle_checkpoint(source, out, num_experts=4, top_k=2)
    print(*result.notes, sep="\n")
    verification = verify_checkpoints(source, out)
    print(verification.sentence)
    return bool(verification.same)


if __name__ == "__main__":
    sys.exit(not main(*sys.argv[1:]))
