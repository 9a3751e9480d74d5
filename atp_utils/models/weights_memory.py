"""Whether a model fits into memory, asked before it is loaded, and what to do where memory ran out midway."""

import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

GIB = 1 << 30


def check(name: str, config: Any, dtype: torch.dtype, all_gpus: bool | None) -> None:
    """Raise MemoryError, with both sizes, where the weights of ``name`` alone are more than the memory that is free.

    ``config`` is the model's, ``all_gpus`` as for `free_bytes`. What is cut into shares (FSDP, ZeRO-3) passes, and so
    does a quantised model, whose size its configuration doesn't tell.
    """
    cut = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    if cut or (needed := _needed(config, dtype)) is None:
        return
    free, where = free_bytes(all_gpus)
    if needed > free:
        raise MemoryError(
            f"model {name!r} needs {needed / GIB:.1f} GiB for its weights alone ({dtype}), {where} has "
            f"{free / GIB:.1f} GiB free: end what else uses it, take a smaller model or a larger machine"
        )


def fits_one_gpu(config: Any, dtype: torch.dtype) -> bool:
    """Whether a model's weights fit the current GPU; false where its configuration doesn't tell their size."""
    needed = _needed(config, dtype)
    return needed is not None and needed <= free_bytes(all_gpus=False)[0]


def _needed(config: Any, dtype: torch.dtype) -> int | None:
    """Bytes of the weights, of which none are made; None for a quantised model."""
    if getattr(config, "quantization_config", None):
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters() * dtype.itemsize


def free_bytes(all_gpus: bool | None) -> tuple[int, str]:
    """Bytes that a model could take, and of what.

    Of all visible GPUs (its layers may lie on each of them), or of the current one; of the machine where there is no
    GPU, and for None, a model that stays in main memory.
    """
    if all_gpus is None or not torch.cuda.is_available():
        return machine_free(), "this machine"
    # What this process holds and no longer uses counts as free.
    gc.collect()
    torch.cuda.empty_cache()
    devices = range(torch.cuda.device_count()) if all_gpus else [torch.cuda.current_device()]
    return sum(torch.cuda.mem_get_info(device)[0] for device in devices), f"the GPU ({len(devices)} of them)"


def machine_free() -> int:
    """Bytes of main memory that this process can still take: what the machine has, or its control groups leave it."""
    return min([psutil.virtual_memory().available, *_left_by_groups()])


def _left_by_groups(member: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes left below the limit of each control group that holds this process (versions 1 and 2), as far as told."""
    lines = member.read_text(encoding="utf-8").splitlines() if member.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        version1 = "memory" in controllers.split(",")
        if controllers and not version1:
            continue
        top = root / "memory" if version1 else root
        names = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        names = names if version1 else ("max", "current", "inactive_file")
        # In a container the path may be the host's, and the top is the container's own group.
        own = top / path.lstrip("/")
        for group in {own, *own.parents, top}:
            if group.is_relative_to(top):
                yield from _left(group, *names)


def _left(group: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    try:
        most, taken = ((group / f"memory.{name}").read_text().strip() for name in (limit, used))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if most != "max":
            # Files that were read long ago give way to what is asked for.
            yield max(int(most) - int(taken) + int(stat.get(cached, 0)), 0)
    except (OSError, ValueError):  # no such group here, or one without limits
        return


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory, a GPU's or the machine's, had no room."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


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
