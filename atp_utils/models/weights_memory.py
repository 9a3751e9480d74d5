"""Whether a model fits into memory, asked before it is loaded, and what to do where memory ran out midway."""

import gc
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from accelerate.utils import get_max_memory
from huggingface_hub import get_safetensors_metadata, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

GIB = 1 << 30


def check(name: str, source: str, dtype: torch.dtype, all_gpus: bool) -> None:
    """Raise MemoryError, with both sizes, where the weights of ``name`` alone are more than the memory that is free.

    ``source`` is a local folder or a hub id. ``all_gpus`` says that the layers may lie on all visible GPUs
    (inference); in training they lie on this process's own, whole or, under FSDP and ZeRO-3, in equal shares.
    A model whose size can't be known before its files are fetched passes.
    """
    count = parameters(source)
    if count is None:
        return
    needed, (free, where) = count * dtype.itemsize / _shares(), free_bytes(all_gpus)
    if needed > free:
        raise MemoryError(
            f"model {name!r} needs {needed / GIB:.1f} GiB for its weights alone ({dtype}), {where} has "
            f"{free / GIB:.1f} GiB free: end what else uses it, take a smaller model or a larger machine"
        )


def parameters(source: str) -> int | None:
    """Number of parameters of a local folder or hub id, from the weights' headers; None if they can't be read.

    Raises ValueError for a file that is no safetensors.
    """
    if Path(source).is_dir():
        return sum(_elements(path) for path in weights(Path(source)))
    config = try_to_load_from_cache(source, "config.json")
    if isinstance(config, str) and (cached := weights(Path(config).parent)):
        return sum(_elements(path) for path in cached)
    try:
        return sum(get_safetensors_metadata(source).parameter_count.values())
    except Exception:
        # Gated, offline, no such model, no network: loading says so, in words made for it.
        return None


def free_bytes(all_gpus: bool) -> tuple[int, str]:
    """Bytes that a model could take, and of what: of all GPUs or the current one; without a GPU, of the machine."""
    if not torch.cuda.is_available():
        return next(iter(get_max_memory().values())), "this machine"
    # What this process holds and no longer uses counts as free.
    gc.collect()
    torch.cuda.empty_cache()
    devices = range(torch.cuda.device_count()) if all_gpus else [torch.cuda.current_device()]
    return sum(torch.cuda.mem_get_info(device)[0] for device in devices), f"the GPU ({len(devices)} of them)"


@contextmanager
def advice(text: str) -> Iterator[None]:
    """Turn CUDA's out-of-memory error in the block into a MemoryError that ends with ``text``: what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU's memory is full ({str(error).splitlines()[0]}) {text}") from error


def _shares() -> int:
    """Into how many shares the launched processes cut the weights; 1 where each has all of them."""
    sharded = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    return int(os.environ.get("WORLD_SIZE", 1)) if sharded else 1


def weights(folder: Path) -> list[Path]:
    """The files that are loaded: a folder may hold the same weights a second time under other names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        return sorted(path for path in named if path.is_file())
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _elements(path: Path) -> int:
    try:
        with safe_open(path, "pt") as file:
            return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.name}: not a whole safetensors file ({error})") from None
