"""From a model's name to weights, tokenizer and identity.

A model is an embedded one (`embedded.registry`; no hub is needed), any Hugging Face id, or a local folder. Weights are
read from safetensors only, and code that comes with a model is never run.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from atp_utils import resolve, shown
from atp_utils.models import chat_template, embedded, precisions, weights_memory
from atp_utils.models.digests import ADAPTER, adapter_digest, folder_digest
from atp_utils.support import files
from atp_utils.support.manifest import MANIFEST

EMBEDDED = "smollm2-135m"


def quiet() -> None:
    """Keep the libraries' own progress bars, deprecations and advice out of notebooks."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # PEFT looks for the base model's configuration on the hub when it saves an adapter; it can do without.
    warnings.filterwarnings("ignore", message="Unable to fetch remote file", category=UserWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)


def locate(name: str) -> str:
    """What transformers can load for ``name``: a folder or a hub id; an embedded model is made first.

    Raises FileNotFoundError for a folder without a model, ValueError for a name that is neither, and what
    `embedded.prepare` raises.
    """
    folder = embedded.prepare(name) if name in embedded.registry() else resolve(name)
    if folder.is_dir():
        if not is_model(folder):
            raise FileNotFoundError(f"{shown(folder)} holds no model (config.json and *.safetensors expected)")
        return str(folder)
    if name.count("/") != 1 or not all(part.strip(".") for part in name.split("/")):
        raise ValueError(
            f"model {name!r} is none of the embedded ones ({', '.join(embedded.registry())}), no Hugging Face id "
            "(owner/name) and no existing folder"
        )
    return name


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, padding on the left; raises ValueError when it has no chat template."""
    source = locate(name)
    # A local folder may have changed since.
    states = sorted((path.name, path.stat()) for path in Path(source).iterdir()) if Path(source).is_dir() else []
    return _tokenizer(name, source, tuple((file, state.st_size, state.st_mtime_ns) for file, state in states))


@lru_cache(maxsize=16)
def _tokenizer(name: str, source: str, _: tuple) -> Any:
    with _naming(name):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ValueError(f"{name}: its tokenizer has no chat template; an instruct model is needed")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_weights(name: str, dtype: str | torch.dtype = "auto", device_map: str | None = None) -> Any:
    """The causal language model ``name``; without a ``device_map`` in main memory, where a trainer takes it from.

    "cpu": it stays there. "auto", for inference: on the current GPU where its weights fit it, else its layers on all
    GPUs; each process of a launched training has one GPU only. Raises OSError where the model can't be had, and
    MemoryError where it is larger than what is free.
    """
    quiet()
    source, dtype, config = locate(name), precisions.precision(dtype), read_config(name)
    if device_map == "auto" and weights_memory.fits_one_gpu(config, dtype):
        device_map = {"": torch.cuda.current_device()}
    else:
        weights_memory.check(name, config, dtype, all_gpus={"cpu": None, "auto": True}.get(device_map, False))
    advice = "while the model was loaded: end what else uses the GPU, or take a smaller model"
    with _naming(name), weights_memory.advice(advice):
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, device_map=device_map, use_safetensors=True, trust_remote_code=False
        )
    model.get_output_embeddings().register_forward_pre_hook(_in_one_piece)
    return model


def load(
    name: str,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | None = "auto",
) -> Any:
    """Model ``name`` for inference, with the LoRA adapter in the folder ``adapter`` merged into its weights.

    Where that folder holds a whole model, trained from ``name``, it is this one. Raises what `check_adapter` does.
    """
    whole = adapter is not None and not check_adapter(resolve(adapter), name)
    source = str(resolve(adapter)) if whole else name
    model = load_weights(source, dtype, device_map if torch.cuda.is_available() else None)
    if adapter is not None and not whole:
        from peft import PeftModel  # takes seconds to import, and the base arm does without

        model = PeftModel.from_pretrained(model, resolve(adapter)).merge_and_unload()
    return model.eval()


def _in_one_piece(_: Any, given: tuple) -> tuple:
    """The last tokens of a batch are no block of memory, and for such the head's weights would be copied for each row.

    With a vocabulary of 150,000 that took 37 seconds for 24 rows in bfloat16, and takes 0.4.
    """
    hidden, *rest = given
    return (hidden.contiguous(), *rest)


def made_of(name: str, adapter: str | Path | None = None, dtype: str | torch.dtype = "auto") -> dict[str, str]:
    """What a reply depends on besides its request, without loading weights: full hashes by part.

    The model's files (a hub model's revision), the precision, the chat template with what it makes of a chat, and the
    adapter or the weights trained from it.
    """
    source = locate(name)
    revision = folder_digest(Path(source)) if Path(source).is_dir() else read_config(name)._commit_hash
    parts = {
        "name": name,
        "weights": str(revision),
        "precision": precisions.name_of(dtype),
        "template": chat_template.fingerprint(load_tokenizer(name)),
    }
    if adapter is not None:
        check_adapter(resolve(adapter), name)
        parts["adapter"] = adapter_digest(resolve(adapter))
    return parts


def short(parts: Mapping[str, str]) -> str:
    """An identity that people can read, of what `made_of` says: 16 characters a SHA-256."""
    return "|".join(value[:16] if len(value) == 64 and name != "name" else value for name, value in parts.items())


def identity(name: str, adapter: str | Path | None = None, dtype: str | torch.dtype = "auto") -> str:
    """What `made_of` says, `short`."""
    return short(made_of(name, adapter, dtype))


def read_config(name: str) -> Any:
    """The configuration of a model; raises OSError where it can't be had."""
    with _naming(name):
        return AutoConfig.from_pretrained(locate(name), trust_remote_code=False)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let what transformers raises in the block say which model is meant."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"model {name!r} can't be loaded: {error}") from error


def check_adapter(folder: Path, base: str) -> bool:
    """Whether ``folder`` holds a PEFT adapter of ``base`` (adapter_config.json), or else a whole model trained from it.

    Raises FileNotFoundError where it holds neither, and ValueError where its base is another.
    """
    adapter = (folder / ADAPTER[0]).is_file()
    if not all((folder / name).is_file() for name in ADAPTER) and (adapter or not is_model(folder)):
        raise FileNotFoundError(
            f"{shown(folder)} is no LoRA adapter (adapter_config.json and adapter_model.safetensors expected) and no "
            "model (config.json and *.safetensors)"
        )
    if adapter:
        trained_on = files.read_json(folder / ADAPTER[0]).get("base_model_name_or_path")
    else:
        # Only its training's manifest names the base.
        manifest = folder / MANIFEST
        trained_on = files.read_json(manifest)["settings"]["model"] if manifest.is_file() else base
        shapes = [(config.model_type, config.vocab_size) for config in map(read_config, (str(folder), base))]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{shown(folder)} is a model of {shapes[0]}, and {base!r} one of {shapes[1]}")
    if trained_on != base:
        what = "an adapter of" if adapter else "a model trained from"
        raise ValueError(f"{shown(folder)} is {what} {trained_on!r}, not of {base!r}")
    return adapter


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model's configuration and weights."""
    return any(folder.glob("*.safetensors")) and (folder / "config.json").is_file()
