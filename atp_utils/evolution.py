"""What notebooks 4 to 6 begin with: the run, who answers, and how a decision is taken."""

import json
from collections.abc import Mapping
from typing import Any

from atp_utils import folders, runs, shown
from atp_utils.engine import Engine, Sampling
from atp_utils.engines import Servers, open_engine
from atp_utils.journal import MANIFEST, Journal, remove_derived
from atp_utils.parameters import EVOLVE
from atp_utils.protocol import Protocol
from atp_utils.runs import Run


def begin(notebook: str, namespace: Mapping[str, Any]) -> tuple[Run, Engine, Protocol]:
    """``(run, engine, protocol)`` of an evolution notebook whose parameters are in ``namespace``.

    The run's folder is claimed. Replies of other parameters stay in it; a finished run of others is replaced only by
    one that may ``overwrite``. Raises what `runs.start`, `folders.claim` and `open_engine` raise, before any work.
    """
    [scenario] = [scenario for scenario, name in EVOLVE.items() if name == notebook]
    run = runs.start(notebook, namespace, "evolution", scenario, namespace["model"], namespace["arm"])
    given = run.parameters
    if folders.check(run.out, run.marker, overwrite=given["overwrite"]) != run.marker:
        folders.claim(run.out, run.marker, overwrite=True, append=True)
        remove_derived(run.out)
    servers = Servers(*(given[name] for name in ("urls", "served_name", "tokenizer", "key_variable", "concurrency")))
    engine = open_engine(given["model"], scenario, given["arm"], given["adapter"], servers, run.out)
    sampling = Sampling(*(given[name] for name in ("max_new_tokens", "temperature", "top_p", "top_k", "thinking")))
    return run, engine, Protocol(given["protocol"], given["max_attempts"], sampling, given["keep_thinking"])


def record(run: Run, identity: str) -> Journal:
    """The journal in the run's folder; ``identity`` is the engine's.

    Replies lie beside each other whatever asked for them, but a finished run has one identity. That of another is
    replaced if the run may ``overwrite``; else FileExistsError, before anything is asked.
    """
    manifest = run.out / MANIFEST
    before = json.loads(manifest.read_text(encoding="utf-8"))["identity"] if manifest.is_file() else identity
    if before != identity and not run.parameters["overwrite"]:
        raise FileExistsError(
            f"{shown(run.out)} holds a finished run of {before!r}, asked was {identity!r}: name another folder by out, "
            "or set overwrite to true"
        )
    if before != identity:
        remove_derived(run.out)
    return Journal(run.out)
