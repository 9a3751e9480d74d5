"""Hashes of a local model's folder and of an adapter: everything in them that a reply depends on."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import CHAT_TEMPLATE_DIR

from atp_utils.support import files
from atp_utils.support.files import sha256

# What a folder holds beside a model: papers about it, other libraries' weights, what a training leaves behind. A file
# that is none of these counts: answering anew is dear, but old answers under a changed model are wrong.
NO_PART = {".md", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".png", ".jpg", ".pdf", ".log", ".csv"}
NO_PART_NAMES = {"LICENSE", "NOTICE", "USE_POLICY", "trainer_state.json", "all_results.json", "train_results.json"}
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# Who wrote a configuration, where it lay, and what loading is told anyway.
NO_SETTINGS = {"transformers_version", "peft_version", "_name_or_path", "dtype", "torch_dtype"}


def folder_digest(folder: Path) -> str:
    """SHA-256 (hexadecimal) over the files of a model's ``folder``: weights, configuration, tokenizer and templates.

    Names count and paths don't, so that a copy is the same model.
    """
    return _joined((str(path.relative_to(folder)), _content(path)) for path in _parts(folder))


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hexadecimal) over an adapter's weights and its configuration, which scales them.

    Of a model all of whose weights were trained likewise: its tokenizer is its base's, the rest is about its training.
    """
    names = [name for name in ADAPTER if (folder / name).is_file()]
    names = names or ["config.json", "generation_config.json", *(path.name for path in folder.glob("*.safetensors"))]
    return _joined((name, _content(folder / name)) for name in names if (folder / name).is_file())


def _joined(parts: Iterator[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()


def _parts(folder: Path) -> Iterator[Path]:
    # Any other folder inside is another model, such as a training's checkpoint.
    for path in [*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*.jinja")]:
        no_part = path.name.startswith(".") or path.suffix in NO_PART or {path.name, path.stem} & NO_PART_NAMES
        if path.is_file() and not no_part:
            yield path


def _content(path: Path) -> str:
    if path.name == "generation_config.json":
        # The engine takes from it which tokens end a reply, and nothing else.
        return json.dumps(files.read_json(path).get("eos_token_id"))
    if path.name in ("config.json", "adapter_config.json"):
        return json.dumps(_settings(files.read_json(path)), sort_keys=True)
    return sha256(path)


def _settings(value):
    """A configuration without `NO_SETTINGS`; PEFT writes sets as lists in no certain order."""
    if isinstance(value, dict):
        return {
            key: sorted(inner) if key == "target_modules" and isinstance(inner, list) else _settings(inner)
            for key, inner in value.items()
            if key not in NO_SETTINGS
        }
    return value
