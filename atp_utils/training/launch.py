"""Several processes for one training: `accelerate launch`, watched from the process that asked for it.

A launcher is one of accelerate's configuration files, ``profiles/accelerate/NAME.yaml``. The launched processes share
one pipe for what they print: progress comes through it as marked lines, all else is kept in a log. A launched process
whose reader is gone fails at its next line of progress, so none outlives the notebook by more than a step.
"""

import contextlib
import gc
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType

from atp_utils import ROOT, resolve, shown
from atp_utils.support import files, progress

CONFIGURATIONS = Path("profiles/accelerate")
SHOWN_LINES = 25
GRACE_SECONDS = 30
_STEP = re.compile(r"\[progress\] (\d+)/(\d+)")


def configuration(launcher: str) -> Path:
    """The file of a launcher: ``profiles/accelerate/<launcher>.yaml``, or ``launcher`` itself if it ends in .yaml."""
    path = resolve(launcher if launcher.endswith(".yaml") else CONFIGURATIONS / f"{launcher}.yaml")
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in resolve(CONFIGURATIONS).glob("*.yaml")))
        raise FileNotFoundError(f"no launcher {launcher!r} (there are: {known}; empty for this process)")
    return path


def processes(path: Path) -> int:
    """Number of processes that a configuration starts here: its own, or else one for each visible GPU.

    Raises ValueError for a file that accelerate doesn't take, or one that this machine can't serve.
    """
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
    return count


def run(launcher: str, module: str, arguments: Sequence[str], log: Path, label: str) -> None:
    """Run ``python -m module arguments`` in a launcher's processes to the end; their output goes to ``log``.

    Raises RuntimeError with the last lines of the output when a process dies; the others are then ended too.
    """
    path = configuration(launcher)
    options = ["--config_file", str(path), "--num_processes", str(processes(path)), "--quiet"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--module", module, *arguments]
    _free_gpu()
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
    with started, log.open("w", encoding="utf-8") as kept, progress.bar(None, label) as bar:
        try:
            for line in started.stdout:
                _show(line, bar, kept)
            status = started.wait()
        except BaseException:
            _end(started)
            raise
    if status:
        raise RuntimeError(f"{label}, launched by {shown(path)}, failed (exit status {status}).\n{_why(log)}")


def _show(line: str, bar: Any, log: Any) -> None:
    if step := _STEP.match(line):
        bar.total = int(step[2])
        bar.update(int(step[1]) - bar.n)
    else:
        log.write(line)
        log.flush()


@contextlib.contextmanager
def bar(total: int, label: str) -> Iterator["_Steps"]:
    """What `progress.bar` is in a launched process: the process that launched it draws it."""
    yield _Steps(total)


class _Steps:
    def __init__(self, total: int):
        self.done, self.total = 0, total

    def update(self, steps: int) -> None:
        self.done += steps
        print(f"[progress] {self.done}/{self.total}", flush=True)


def _why(log: Path) -> str:
    """The end of the output: torchrun's summary, which names the process that failed first, or else the last lines."""
    lines = log.read_text(encoding="utf-8").rstrip().splitlines()
    summary = next((place for place, line in enumerate(lines) if line.startswith("Root Cause")), None)
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


def _free_gpu() -> None:
    """Give back GPU memory that this process holds and no longer uses (a model that wrote the pairs, say)."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
