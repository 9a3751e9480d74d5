"""Whether a model fits into memory, asked before it is loaded, and what to do where memory ran out midway."""

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import get_max_memory
from transformers import AutoModelForCausalLM

GIB = 1 << 30


def check(name: str, config: Any, dtype: torch.dtype, all_gpus: bool) -> None:
    """Raise MemoryError, with both sizes, where the weights of ``name`` alone are more than the memory that is free.

    ``config`` is the model's. ``all_gpus`` says that the layers may lie on all visible GPUs (inference). What is cut
    into shares (FSDP, ZeRO-3) passes, and so does a quantised model, whose size its configuration doesn't tell.
    """
    cut = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    if cut or getattr(config, "quantization_config", None):
        return
    with torch.device("meta"):
        needed = AutoModelForCausalLM.from_config(config).num_parameters() * dtype.itemsize
    free, where = free_bytes(all_gpus)
    if needed > free:
        raise MemoryError(
            f"model {name!r} needs {needed / GIB:.1f} GiB for its weights alone ({dtype}), {where} has "
            f"{free / GIB:.1f} GiB free: end what else uses it, take a smaller model or a larger machine"
        )


def free_bytes(all_gpus: bool) -> tuple[int, str]:
    """Bytes that a model could take, and of what: of all GPUs or the current one; without a GPU, of the machine."""
    if not torch.cuda.is_available():
        return next(iter(get_max_memory().values())), "this machine"
    # What this process holds and no longer uses counts as free.
    gc.collect()
    torch.cuda.empty_cache()
    devices = range(torch.cuda.device_count()) if all_gpus else [torch.cuda.current_device()]
    return sum(torch.cuda.mem_get_info(device)[0] for device in devices), f"the GPU ({len(devices)} of them)"


def most_held() -> int:
    """Most bytes that this process has held: of the GPU's memory, or else of the machine's (Linux counts in KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def advice(text: str) -> Iterator[None]:
    """Turn CUDA's out-of-memory error in the block into a MemoryError that ends with ``text``: what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU's memory is full ({str(error).splitlines()[0]}) {text}") from error
