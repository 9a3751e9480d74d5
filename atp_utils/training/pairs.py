"""The rows that an adapter is trained on: preference pairs for DPO, prompts for GRPO (Appendix A.1)."""

from collections.abc import Sequence
from typing import Any

from atp_utils import models
from atp_utils.engines import open_engine
from atp_utils.evolution import loop
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.parsing import prompted_thinking
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Message, Sampling
from atp_utils.models.chat_template import as_reply, render
from atp_utils.runs import Run
from atp_utils.scenarios import preferences
from atp_utils.support import progress


def training_items(run: Run, method: str) -> list:
    """The training prompts of the run's scenario that ``method`` ("dpo" or "grpo") trains on."""
    items = run.scenario.read_items("train", run.parameters.data)
    return run.scenario.training_items(run.scenario.fold(items, run.parameters, inside=False), method)


def _opening(run: Run) -> preferences.Opening:
    def opening(item: Any, protocol: Protocol, turned: bool) -> list[Message]:
        return run.scenario.after_compliance(item, protocol, run.parameters.history_pairs, turned)

    return opening


def preference_rows(run: Run, items: Sequence) -> tuple[list[dict[str, str]], dict[str, int]]:
    """DPO rows (prompt, chosen, rejected) of training ``items``, and counts of what was kept or left out, by reason.

    As the run's ``pairs`` says: "answers" are the two bare JSON answers, behind the prompt that names the options in
    either order, "written" what the base model writes for the
    scenario's sampler. Written replies are journalled beside the run's folder, so that they outlive a change of the
    training. With ``thinking`` they keep it, and the prompt lets the model think, as an evolution's does.
    """
    given, scenario = run.parameters, run.scenario
    tokenizer = models.load_tokenizer(given.model)
    sampling = Sampling(given.max_new_tokens, given.temperature)
    how = Protocol(given.protocol, given.max_attempts, sampling, keep_thinking=given.thinking)
    if given.pairs == "answers":
        pairs = [pair for item in items for pair in preferences.answer_pairs(item, _opening(run), how)]
        counts = {"kept": len(pairs)}
    else:
        folder = run.beside("written")
        engine = open_engine(given.model, scenario.name, "base", "", given.servers, folder, dtype=given.dtype)
        with Journal(folder) as record, scenario.sampler(record) as sample, progress.bar(None, "pairs") as bar:
            ways = (_opening(run), how, given.seed, given.samples_per_problem)
            found = loop.run_all([sample(item, *ways) for item in items], engine, record, bar)
        pairs, counts = scenario.pairs(found, given.max_pairs)
    rows = []
    for pair in pairs:
        prompt = render(tokenizer, pair["messages"], given.thinking)
        # A template may open the block of thinking itself, and the engine then puts its mark in front of the reply.
        opened = prompted_thinking(prompt) if given.thinking else ""
        answers = {side: as_reply(tokenizer, pair[side].removeprefix(opened)) for side in ("chosen", "rejected")}
        rows.append({"prompt": prompt, **answers})
    return rows, dict(counts)


def reward_rows(run: Run, items: Sequence) -> list[dict[str, Any]]:
    """GRPO rows of training ``items``: the prompt in either order of its options, and what the reward reads.

    ``prefill`` is the beginning of the answer, given to the model as if it had written it. A model that seldom answers
    in JSON by itself gets hardly any reward above 0 and learns nothing; with the prefill ``{"choice": "`` it is trained
    on just what the `choose` protocol later asks of it.
    """
    given, scenario = run.parameters, run.scenario
    tokenizer, how = models.load_tokenizer(given.model), Protocol(given.protocol)
    thinking = given.protocol == "reason" and given.thinking
    common, opening = {"protocol": given.protocol, "prefill": given.prefill}, _opening(run)
    return [
        {"prompt": render(tokenizer, opening(item, how, turned), thinking) + given.prefill}
        | scenario.reward_columns(item)
        | common
        for item in items
        for turned in (False, True)
    ]
