"""The preference pairs of a DPO run: bare answers, or replies that the base model is asked for (Appendix A.1)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from atp_utils import align, evolve, models, progress, tool_pairs
from atp_utils.chat_template import render
from atp_utils.engine import Sampling
from atp_utils.engines import Servers, open_engine
from atp_utils.journal import Journal
from atp_utils.protocol import Protocol
from atp_utils.runs import Run
from atp_utils.sandbox import Sandbox
from atp_utils.scenarios import SCENARIOS
from atp_utils.tool_calls import RecordedTool


def make(run: Run, items: Sequence) -> tuple[list[dict[str, str]], dict[str, int]]:
    """DPO rows of training ``items`` as the run's ``pairs`` says, and counts of what was kept or left out, by reason.

    "answers": the two bare JSON answers. "elicited": the model's own words for either. "solutions" (tool use): a
    tool-assisted solution, run and found right, against the model's own sample. Replies are journalled beside the run's
    folder, so that they outlive a change of the training.
    """
    given = run.parameters
    opening, tokenizer = SCENARIOS[given["scenario"]].opening, models.load_tokenizer(given["model"])
    how = Protocol(given["protocol"], given["max_attempts"], Sampling(given["max_new_tokens"], given["temperature"]))
    if given["pairs"] == "answers":
        rows = align.answer_pairs(items, opening, tokenizer, how)
        return rows, {"kept": len(rows)}
    if given["pairs"] == "elicited":
        found = _ask(run, "elicited", items, lambda item, _: align.elicitation(item, opening, how, given["seed"]))
        rows = align.elicited_pairs(found, tokenizer)
        return rows, {"kept": len(rows), "without both replies": len(items) - len(rows)}
    with Sandbox() as box:

        def sample(item: Any, record: Journal) -> Any:
            ways = {"seed": given["seed"], "count": given["samples_per_problem"]}
            return tool_pairs.sampling(item, how, run_tool=RecordedTool(box.run, record, "sandbox, 5 s"), **ways)

        found = _ask(run, "samples", items, sample)
    rows, counts = tool_pairs.solution_pairs(found, partial(render, tokenizer), given["max_pairs"])
    return rows, dict(counts)


def _ask(run: Run, name: str, items: Sequence, episode: Callable[[Any, Journal], Any]) -> list[dict]:
    """What the items' episodes return, their requests answered by the base model."""
    given, folder = run.parameters, run.beside(name)
    servers = Servers(given["urls"], given["served_name"], "", given["key_variable"], given["concurrency"])
    engine = open_engine(given["model"], given["scenario"], "base", "", servers, folder)
    with Journal(folder) as record, progress.bar(None, name) as bar:
        return evolve.run_all([episode(item, record) for item in items], engine, record, bar)
