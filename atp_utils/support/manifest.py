"""What made a result: ``manifest.json``, written last, whose presence says that a folder is whole."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from atp_utils import ROOT
from atp_utils.support import files

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in ``folder``; raises what `files.read_json` does."""
    return files.read_json(folder / MANIFEST)


PACKAGES = ("torch", "transformers", "trl", "peft", "openai", "pandas", "pydantic")


def made_by() -> dict[str, Any]:
    """What makes results now: installed packages, machine, commit and the time."""
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def processor() -> str:
    """The processor's name, where the system tells one."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    """The commit that the code came from, ``-dirty`` where tracked files differ; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
