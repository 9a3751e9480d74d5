"""What made a result: ``manifest.json``, written last, whose presence says that a folder is whole."""

import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil

from atp_utils import ROOT
from atp_utils.support import files

MANIFEST = "manifest.json"
PACKAGE = "atp-utils"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in ``folder``; raises what `files.read_json` does."""
    return files.read_json(folder / MANIFEST)


def now() -> str:
    """The time as manifests have it, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def made_by() -> dict[str, Any]:
    """What makes results now: installed packages, machine, commit and the time."""
    return {
        "packages": packages(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "gpus": _gpus(),
        "commit": _commit(),
        "finished": now(),
    }


def packages() -> dict[str, str]:
    """Versions of all packages that the project asks for, as they are installed."""
    asked = (text for text in requires(PACKAGE) or () if "extra ==" not in text)
    found = {}
    for name in sorted(re.match(r"[\w.-]+", text)[0] for text in asked):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # one for another system
            continue
    return found


def _gpus() -> list[str]:
    # Not imported for this: a run that was answered by servers does without.
    torch = sys.modules.get("torch")
    return [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())] if torch else []


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
