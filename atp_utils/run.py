"""``python -m atp_utils.run NOTEBOOK OUT [-p NAME VALUE ...]``: run one notebook headless, by papermill.

Without OUT the notebook's parameters are listed. Names and types are checked before anything starts. The executed
notebook appears at OUT also when a cell fails. Progress bars are drawn on this terminal and kept out of the notebook.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import papermill
from filelock import FileLock, Timeout
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from atp_utils import ROOT, parameters, profiles, resolve, shown

DEAD = "its kernel died: it crashed, or was killed, as the system does where memory runs out"


def run(notebook: str | Path, out: str | Path, values: dict) -> None:
    """Execute ``notebook`` with ``values`` into ``out``; raises PapermillExecutionError where a cell does.

    Raises ValueError for wrong values, and FileExistsError for an ``out`` that is no executed notebook.
    """
    source, target = resolve(notebook), resolve(out)
    checked = parameters.check(source.stem, values)
    check_target(source, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ATP_PROGRESS", progress_file())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("papermill").setLevel(logging.WARNING)
    # Sockets in a folder of this user's own: TCP ports on a shared machine are anybody's. The system limits a socket's
    # path to about a hundred bytes, which a TMPDIR may exceed.
    with tempfile.TemporaryDirectory(prefix="atp-", dir="/tmp") as sockets:
        transport = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        papermill.execute_notebook(
            str(source),
            str(target),
            {name: getattr(checked, name) for name in values},
            progress_bar=False,
            cwd=str(ROOT),
            config=transport,
        )


@contextlib.contextmanager
def one_of(gpus: int) -> Iterator[str]:
    """Hide all but one of this machine's ``gpus``, one that no other run of this user holds; waits for it.

    Yields its number. The lock ends with the process, however that ends.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = (given or ",".join(map(str, range(gpus)))).split(",")[:gpus]
    for name in itertools.cycle(visible):
        try:
            held = FileLock(f"/tmp/atp-{os.getuid()}-gpu-{name}", blocking=False).acquire()
        except Timeout:
            time.sleep(1 / len(visible))
            continue
        with held:
            os.environ["CUDA_VISIBLE_DEVICES"] = name
            try:
                yield name
            finally:
                del os.environ["CUDA_VISIBLE_DEVICES"]
                os.environ |= {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
        return


def of_profile(name: str, notebook: str, given: dict[str, Any]) -> dict[str, Any]:
    """``given`` over what the profile ``name`` says of a run with these values: of its scenario or condition and model.

    Where they aren't given these are the notebook's own and the profile's one model; raises ValueError where it has
    several.
    """
    profile, fields = profiles.read_profile(name), parameters.model_of(notebook).model_fields
    if "model" in fields and "model" not in given:
        if len(profile.models) > 1:
            models = ", ".join(profile.models)
            raise ValueError(f"the profile {name} has several models, name one by -p model: {models}")
        given = {"model": next(iter(profile.models))} | given
    part = next((given.get(key, fields[key].default) for key in ("scenario", "condition") if key in fields), None)
    return profile.given(notebook, part, given.get("model")) | given


def check_target(source: Path, target: Path) -> None:
    """Raise FileExistsError where ``target`` holds anything but what papermill once wrote there, whole or cut off."""
    if target.is_dir():
        raise FileExistsError(f"{shown(target)} is a folder; the executed notebook needs the name of a file")
    if not target.is_file() or not target.stat().st_size:
        return
    if target.samefile(source) or '"papermill": {' not in target.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{shown(target)} is no executed notebook and stays: name another file, or remove it")


def begun_cell(executed: Path) -> tuple[int, str]:
    """Number, from 0, and source of the cell of an executed notebook that was begun last; its first where none was."""
    begun = 0, ""
    with contextlib.suppress(OSError, ValueError, KeyError):  # an end before papermill's first words
        for number, cell in enumerate(json.loads(executed.read_text(encoding="utf-8"))["cells"]):
            if cell["metadata"]["papermill"]["start_time"]:
                begun = number, "".join(cell["source"])
    return begun


def progress_file() -> str:
    """This process's stderr as a path that the notebook's kernel can open: a terminal, a log file or a pipe.

    A socket, as ssh without a terminal and service managers have it, can't be opened: no progress is shown then.
    """
    path = f"/proc/{os.getpid()}/fd/2"
    try:
        with open(path, "a"):
            return path
    except OSError:
        return os.devnull


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 for bad arguments, 1 for a notebook that failed, 130 for one that was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("notebook", help="e.g. notebooks/04_evolve_role_play.ipynb")
    parser.add_argument("out", nargs="?", help="where the executed notebook goes; left out: list the parameters")
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="values",
        help="a parameter; lists and booleans as JSON",
    )
    parser.add_argument("--profile", help="take the notebook's parameters from profiles/PROFILE.yaml; -p wins")
    parser.add_argument("--gpus", type=int, help="of so many GPUs hide all but one that no other run holds")
    options = parser.parse_args(arguments)
    name = Path(options.notebook).stem
    try:
        if not options.out:
            print(parameters.table(name))
            return 0
        values = {key: parameters.from_text(name, key, value) for key, value in options.values}
        if options.profile:
            values = of_profile(options.profile, name, values)
        with one_of(options.gpus) if options.gpus else contextlib.nullcontext():
            run(options.notebook, options.out, values)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {shown(options.notebook)}, written to {shown(options.out)}: {error}", file=sys.stderr)
        return 1
    except PapermillExecutionError as error:
        cell, what, why = (error.cell_index, error.source), "failed", f"{error.ename}: {error.evalue}"
    except DeadKernelError:
        cell, what, why = begun_cell(resolve(options.out)), "failed", DEAD
    except KeyboardInterrupt:
        cell, what, why = begun_cell(resolve(options.out)), "was interrupted", "the next call goes on"
    else:
        return 0
    line = next(filter(None, map(str.strip, cell[1].splitlines())), "")
    print(
        f"error: {shown(options.notebook)} {what} in cell {cell[0]} ({line[:60]}): {why}\n"
        f"the notebook as far as it came: {shown(options.out)}",
        file=sys.stderr,
    )
    return 1 if what == "failed" else 130


if __name__ == "__main__":
    # What ends a job of a cluster is told and tidied up after as Ctrl-C is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
