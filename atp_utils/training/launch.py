"""Several processes for one training: `accelerate launch`, watched from the process that asked for it.

A launcher is one of accelerate's configuration files, ``profiles/accelerate/NAME.yaml``. The launched processes share
one pipe for what they print: progress comes through it as marked lines, all else is kept in a log. A launched process
whose reader is gone fails at its next line of progress, so none outlives the notebook by more than a step.
"""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from tqdm.std import tqdm

from atp_utils import ROOT, shown
from atp_utils.support import files

CONFIGURATIONS = Path("profiles/accelerate")
SHOWN_LINES = 25
GRACE_SECONDS = 30
_STEP = re.compile(r"\[progress\] (\d+)$")


def processes(launcher: str) -> tuple[Path, int]:
    """A launcher's configuration, and how many processes it starts here: its own, or one for each visible GPU.

    Raises FileNotFoundError, or ValueError for a file that accelerate doesn't take or this machine can't serve.
    """
    path = files.named_file("launcher", CONFIGURATIONS, launcher)
    files.read_yaml(path, dict[str, Any])
    try:
        config = ClusterConfig.from_yaml_file(str(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shown(path)}: {error}") from None
    gpus = torch.cuda.device_count()
    count = gpus if config.num_processes == -1 else config.num_processes
    if config.num_machines != 1:
        raise ValueError(f"{shown(path)}: num_machines must be 1, a notebook starts processes on its own machine only")
    if not config.use_cpu and not 1 <= count <= gpus:
        raise ValueError(f"{shown(path)}: asks for {count} processes with a GPU each; GPUs visible here: {gpus}")
    if config.distributed_type == DistributedType.DEEPSPEED and not importlib.util.find_spec("deepspeed"):
        raise ValueError(f"{shown(path)}: needs DeepSpeed, which isn't installed: pip install deepspeed")
    return path, count


def run(launcher: str, module: str, arguments: Sequence[str], log: Path, bar: tqdm) -> None:
    """Run ``python -m module arguments`` in a launcher's processes to the end; their output goes to ``log``.

    What they `report` moves the ``bar``.

    Raises RuntimeError with the last lines of the output when a process dies; the others are then ended too.
    """
    path, count = processes(launcher)
    options = ["--config_file", str(path), "--num_processes", str(count), "--quiet"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--module", module, *arguments]
    # Give back GPU memory that this process holds and no longer uses (a model that wrote the pairs, say).
    clear_device_cache(garbage_collection=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # so that the launcher and what it starts can be ended together
    )
    with started, log.open("w", encoding="utf-8") as kept:
        try:
            for line in started.stdout:
                _show(line, bar, kept)
            status = started.wait()
        except BaseException:
            _end(started)
            raise
    if status:
        raise RuntimeError(f"the training launched by {shown(path)} failed (exit status {status}).\n{_why(log)}")


def _show(line: str, bar: tqdm, log: TextIO) -> None:
    if step := _STEP.match(line):
        bar.update(int(step[1]) - bar.n)
    else:
        log.write(line)
        log.flush()


def report(done: int) -> None:
    """Tell the process that launched this one how many steps are done."""
    print(f"[progress] {done}", flush=True)


def _why(log: Path) -> str:
    """Torchrun's summary of the processes that failed, or else the end of the output.

    All of them: where one is killed, another that misses it may be told of as the first.
    """
    lines = log.read_text(encoding="utf-8").rstrip().splitlines()
    summary = next((place for place, line in enumerate(lines) if line == "Failures:"), None)
    said = lines[-SHOWN_LINES:] if summary is None else lines[summary:]
    if any("SIGKILL" in line for line in said):
        said.append("SIGKILL is what the system sends when memory runs out.")
    return "\n".join([*said, f"All of its output: {shown(log)}"])


def _end(started: subprocess.Popen) -> None:
    """End the launcher, which ends the processes it started; what doesn't listen is killed."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(started.pid, sent)
            started.wait(GRACE_SECONDS)
            return
