"""train.py, or $SCRIPT.py, with FSDP2 on CPU processes, in the environment that `accelerate launch --config_file
recipes/accelerate_fsdp2.yaml` makes.

accelerate shards on GPUs only, so it is told that it has some. Everything else is its own and the script's.
"""

import importlib
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.run import program

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
program(importlib.import_module(os.environ.get("SCRIPT", "train")).main)
