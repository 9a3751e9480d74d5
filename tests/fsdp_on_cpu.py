"""A launched training with FSDP over gloo: accelerate shards on accelerators only, PyTorch anywhere.

All that is replaced is accelerate's answer to "which kind of machine is this"; plugin, sharding, saving are its own.
"""

import os

import torch
from accelerate.state import DistributedType, PartialState

from atp_utils.training import trainer

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    trainer.main()
