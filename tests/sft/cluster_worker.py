# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""One process of test_cluster.py: runs of `teleflm sft train`, on CPUs that accelerate takes for accelerators.

accelerate shards on accelerators alone, so it is told that these are some; all else is its own code. The arguments name
a file with the runs: the arguments of each, and what else its launcher's file would have set.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType

import sft.training.train as module

read_recipe = module.read_recipe


def read_and_pretend(*args, **kwargs):
    recipe = read_recipe(*args, **kwargs)  # which makes the settings, and with them accelerate's state
    if "ACCELERATE_USE_DEEPSPEED" not in os.environ:  # which runs on CPUs too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return recipe


def main(file: str) -> int:
    leave = module.leave_processes
    runs = json.loads(Path(file).read_text())
    for number, (arguments, environment) in enumerate(runs):
        os.environ.update(environment)
        is_last = number == len(runs) - 1
        module.leave_processes = leave if is_last else lambda together: dist.barrier()
        if status := module.main(arguments):
            return status
        if "ACCELERATE_USE_DEEPSPEED" not in os.environ:
            AcceleratorState._reset_state()
            GradientState._reset_state()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    module.read_recipe = read_and_pretend
    sys.exit(main(sys.argv[1]))
