"""``python -m atp_utils.run NOTEBOOK OUT [-p NAME VALUE ...]``: run one notebook headless, by papermill.

Names and types are checked before anything starts. The executed notebook appears at OUT also when a cell
fails. Progress bars are drawn on this terminal and kept out of the notebook.
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from atp_utils import ROOT, parameters, resolve, shown


def run(notebook: str | Path, out: str | Path, values: dict) -> None:
    """Execute ``notebook`` with ``values`` into ``out``; raises PapermillExecutionError where a cell does."""
    source, target = resolve(notebook), resolve(out)
    checked = parameters.check(source.stem, values)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ATP_PROGRESS", progress_file())
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.getLogger("papermill").setLevel(logging.WARNING)
    # Sockets in a folder of this user's own; TCP ports on a shared machine are anybody's.
    with tempfile.TemporaryDirectory(prefix="atp-") as sockets:
        transport = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        papermill.execute_notebook(
            str(source), str(target), checked, progress_bar=False, cwd=str(ROOT), config=transport
        )


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
    """Command line; 2 for bad arguments, 1 for a notebook that failed."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("notebook", help="e.g. notebooks/04_evolve_role_play.ipynb")
    parser.add_argument("out", help="where the executed notebook goes")
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
    options = parser.parse_args(arguments)
    given = {name: parameters.from_text(value) for name, value in options.values}
    try:
        values = given
        if options.profile:
            profile = parameters.read_profile(options.profile)
            name = Path(options.notebook).stem
            values = profile.parameters(name, given.get("scenario"), given.get("model")) | given
        run(options.notebook, options.out, values)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PapermillExecutionError as error:
        print(
            f"error: {shown(options.notebook)} failed in cell {error.cell_index}: {error.ename}: {error.evalue}\n"
            f"the notebook with its traceback: {shown(options.out)}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
