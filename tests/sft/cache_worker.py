# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""`sft.train`, with a note of every conversation that is tokenized, and slowly: `FILE SECONDS FAIL ARGUMENTS...`.

FILE gets the number of the process for each; the first takes SECONDS, and then fails if FAIL is `fail`. Collective
operations time out after 12 seconds (`ddp_timeout` has no effect on CPUs).
"""

import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

from torch import distributed

from sft.data import labels
from sft.data.formats import DataError
from sft.training.train import main

if __name__ == "__main__":
    path, seconds, fail, *arguments = sys.argv[1:]
    tokenize, tokenized = labels.tokenize, []

    def tokenize_slowly(*args):
        if not tokenized:
            time.sleep(float(seconds))
            if fail == "fail":
                raise DataError("planted: this conversation cannot be read")
        tokenized.append(1)
        with Path(path).open("a") as file:
            file.write(f"{os.environ['RANK']}\n")
        return tokenize(*args)

    labels.tokenize = tokenize_slowly
    distributed.init_process_group = partial(distributed.init_process_group, timeout=timedelta(seconds=12))
    sys.exit(main(arguments))
