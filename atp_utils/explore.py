"""Widgets of notebook 11: recorded episodes, chat by chat, and role-play's P(deviate), asked of a model as one looks.

All text that models wrote is escaped before it is shown.
"""

import html
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display

from atp_utils import resolve
from atp_utils.analysis.plots import STYLES
from atp_utils.evolution import journal
from atp_utils.evolution.protocol import Choice, Protocol, decide
from atp_utils.evolution.record import Record
from atp_utils.evolution.requests import Engine, Message
from atp_utils.scenarios.role_play.episodes import Evolution, written_question
from atp_utils.scenarios.role_play.items import Item
from atp_utils.support.text import inert

ROUNDS = 4  # written rounds that the explorer has room for
COLOURS = {"system": "#eef1f4", "user": "#f7f3e8", "assistant": "#e6f2ea"}
ACTS = {"complied": False, "deviated": True}


def chat_html(messages: Sequence[Message]) -> str:
    """A chat as boxes, one a message; nothing in it is markup, a formula or a control character."""
    look = "background:{};padding:.4em .7em;margin:.25em 0;white-space:pre-wrap"
    box = f"<div class='tex2jax_ignore mathjax_ignore' style='{look}'><b>{{}}</b><br>{{}}</div>"
    return "".join(box.format(COLOURS[m["role"]], m["role"], html.escape(inert(m["content"]))) for m in messages)


# --- Recorded episodes -------------------------------------------------------------------------------------


def recorded(results: str) -> widgets.Widget:
    """Step through the episodes of recorded runs: what an agent read, what it answered, and what that was worth.

    Raises FileNotFoundError where ``results`` holds no complete run.
    """
    root = resolve(results)
    paths = journal.complete_runs(root)
    if not paths:
        raise FileNotFoundError(f"{results} holds no complete run")
    run = widgets.Dropdown(options=[path.relative_to(root).as_posix() for path in paths], description="run")
    item, agent = widgets.Dropdown(description="item"), widgets.Dropdown(description="agent")
    number, view = widgets.SelectionSlider(options=[1], description="round"), widgets.HTML()

    def follow(_: object = None) -> None:
        """Offer what there is of the run, the item and the agent that are chosen, and show the decision."""
        # Each offer may change what is chosen, and then comes here again, before it goes on.
        table, record = _run(root / run.value)
        for widget, column in ((item, "item"), (agent, "agent"), (number, "round")):
            offered = tuple(sorted(table[column].unique().tolist()))
            if tuple(widget.options) != offered:
                widget.options = offered
            if widget.value not in offered:
                widget.value = offered[0]
            table = table[table[column] == widget.value]
            if table.empty:  # between two choices
                return
        view.value = decision_html(table.iloc[0], record)

    for widget in (run, item, agent, number):
        widget.observe(follow, "value")
    follow()
    return widgets.VBox([run, widgets.HBox([item, agent, number]), view])


@lru_cache(maxsize=4)
def _run(folder: Path) -> tuple[pd.DataFrame, Record]:
    """Decisions and record of a run, read once: every choice of a reader comes by here."""
    return journal.read_table(folder), journal.record_of(folder)


def decision_html(row: pd.Series, record: Record) -> str:
    """A decision of the table: its chat, the reply, and its numbers."""
    asked, reply = record.request(row["reply"]), record.replies[row["reply"]]
    said = reply.text or f'{{"choice": "{row["choice"]}"}}'
    names = {"choice": "choice", "deviated": "deviated", "p_deviate": "P(deviate)", "p_first": "named first",
             "p_second": "named second", "mass": "mass", "reward": "reward", "capital": "in all"}  # fmt: skip
    known = {name: row[column] for column, name in names.items() if pd.notna(row[column])}
    facts = [f"{name} <b>{html.escape(_short(value))}</b>" for name, value in known.items()]
    return chat_html([*asked.messages, {"role": "assistant", "content": said}]) + "<p>" + " · ".join(facts) + "</p>"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- A model, asked live -----------------------------------------------------------------------------------


def ask(engine: Engine, item: Item, acts: Sequence[bool], ratio: float, told: str = "own") -> tuple[list, Choice]:
    """The chat behind a written history of ``acts`` (deviant?) and what ``engine`` makes of it, in both orders."""
    protocol, turns = Protocol("choose"), [number % 2 == 1 for number in range(len(acts) + 1)]
    asked = written_question(item, Evolution(), protocol, 0, turns, told, ratio, tuple(acts))
    taking = decide([asked], protocol)
    requests = next(taking)
    replies = dict(engine.answer(requests))
    try:
        taking.send([replies[place] for place in range(len(requests))])
    except StopIteration as stop:
        [choice] = stop.value
    return list(requests[0].messages), choice


def chances(choice: Choice, item: Item) -> dict[str, float]:
    """P(deviate), with the deviant option named first and second, and the mass of both answers."""
    place = choice.options.index(item.deviant)
    first, second = choice.by_place[place]
    return {"P(deviate)": choice.probabilities[place], "first": first, "second": second, "mass": choice.mass}


def doses(engine: Engine, item: Item, ratios: Sequence[float] = (1, 2), rounds: int = 2) -> pd.DataFrame:
    """P(deviate) behind up to ``rounds`` rounds that all complied, or all deviated, by what deviating pays."""
    histories = [("none", ())]
    histories += [(f"{count} {name}", (act,) * count) for count in range(1, rounds + 1) for name, act in ACTS.items()]
    rows = {name: [chances(ask(engine, item, acts, ratio)[1], item)["P(deviate)"] for ratio in ratios]
            for name, acts in histories}  # fmt: skip
    return pd.DataFrame.from_dict(rows, "index", columns=[f"pays {ratio:g} times" for ratio in ratios])


def live(engine: Engine, items: Sequence[Item]) -> widgets.Widget:
    """Edit a role-play history, whose it is and what deviating pays, and see P(deviate) follow."""
    by_id = {item.id: item for item in items}
    item = widgets.Dropdown(options=list(by_id), description="item")
    ratio = widgets.FloatSlider(2, min=0.5, max=4, step=0.5, description="pays, times", continuous_update=False)
    told = widgets.Dropdown(options=["own", "other"], description="history of")
    acts = [
        widgets.Dropdown(options=["-", *ACTS], description=f"round {number}", layout={"width": "15em"})
        for number in range(1, ROUNDS + 1)
    ]
    result, view, drawn = widgets.HTML(), widgets.HTML(), widgets.Output()
    seen: list[tuple[int, float]] = []

    def show(_: object = None) -> None:
        own = [ACTS[act.value] for act in acts if act.value != "-"]
        messages, choice = ask(engine, by_id[item.value], own, ratio.value, told.value)
        found = chances(choice, by_id[item.value])
        result.value = " · ".join(f"{name} <b>{value:.2f}</b>" for name, value in found.items())
        view.value = chat_html(messages)
        seen.append((sum(own), found["P(deviate)"]))
        drawn.clear_output(wait=True)
        with drawn:
            display(_points(seen))

    for widget in (item, ratio, told, *acts):
        widget.observe(show, "value")
    show()
    return widgets.VBox([widgets.HBox([item, told, ratio]), widgets.HBox(acts), result, drawn, view])


def _points(seen: Sequence[tuple[int, float]]) -> plt.Figure:
    """All that was asked so far, by deviations in the history; the last in the arm's colour."""
    figure, ax = plt.subplots(figsize=(4.5, 2.6))
    ax.scatter(*zip(*seen, strict=True), color="0.7")
    ax.scatter(*seen[-1], color=STYLES["base"][0], s=80)
    ax.set(xlabel="deviations in the history", ylabel="P(deviate)", xlim=(-0.3, ROUNDS + 0.3), ylim=(-0.03, 1.03))
    plt.close(figure)
    return figure
