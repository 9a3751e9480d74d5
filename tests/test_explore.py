"""The explorer's widgets, moved as a reader would move them, with agents of known habits and recorded runs."""

import ipywidgets as widgets
import pandas as pd
import pytest

from atp_utils import explore, resolve
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.record import Record
from atp_utils.scenarios.registry import SCENARIOS

ITEMS = SCENARIOS["role_play"].read_items("test", "data")


def by_history(item):
    """Deviates with 0.2 at first and 0.3 more for each deviation it reads of, 0.1 more where its option is first."""

    def rule(request):
        said = " ".join(message["content"] for message in request.messages)
        p = 0.2 + 0.3 * said.count("broke the rule") + 0.1 * (request.options[0] == answer_json(item.deviant))
        return (p, 1 - p) if request.options[0] == answer_json(item.deviant) else (1 - p, p)

    return ScriptedEngine(rule)


def find(widget, kind, description):
    """The widget of a description, anywhere in a box."""
    children = getattr(widget, "children", ())
    own = [child for child in children if isinstance(child, kind) and child.description == description]
    return next(filter(None, [*own, *(find(child, kind, description) for child in children)]), None)


def test_a_history_is_asked_in_both_orders():
    engine = by_history(ITEMS[0])
    messages, choice = explore.ask(engine, ITEMS[0], [True, False], ratio=2)
    found = explore.chances(choice, ITEMS[0])
    assert found == pytest.approx({"P(deviate)": 0.55, "first": 0.6, "second": 0.5, "mass": 1.0})
    assert [message["role"] for message in messages] == ["system", "user", *["assistant", "user"] * 2]


def test_doses_are_of_rounds_that_were_all_alike():
    table = explore.doses(by_history(ITEMS[0]), ITEMS[0])
    assert table.index.tolist() == ["none", "1 complied", "1 deviated", "2 complied", "2 deviated"]
    assert table["pays 2 times"].tolist() == pytest.approx([0.25, 0.25, 0.55, 0.25, 0.85])
    assert table["pays 1 times"].tolist() == table["pays 2 times"].tolist()


def test_the_model_is_asked_anew_when_a_history_is_edited():
    shown = explore.live(by_history(ITEMS[0]), ITEMS[:2])
    result = next(child for child in shown.children if isinstance(child, widgets.HTML))
    assert "P(deviate) <b>0.25</b>" in result.value
    find(shown, widgets.Dropdown, "round 1").value = "deviated"
    assert "P(deviate) <b>0.55</b>" in result.value
    find(shown, widgets.FloatSlider, "pays, times").value = 4
    chat = shown.children[-1].value
    assert f"{4 * ITEMS[0].payoff_compliant:g}" in chat and "broke the rule" in chat


def test_recorded_episodes_are_stepped_through():
    shown = explore.recorded("data/results/quick")
    run = find(shown, widgets.Dropdown, "run")
    for name in run.options:
        run.value = name
        number = find(shown, widgets.SelectionSlider, "round")
        number.value = number.options[-1]
        view = shown.children[-1].value
        assert "P(deviate)" in view or "choice" in view
    run.value = next(name for name in run.options if "role_play" in name and "standard/base" in name)
    folder = resolve("data/results/quick") / run.value
    row = pd.read_parquet(folder / "decisions.parquet").query("round == 6").iloc[0]
    find(shown, widgets.Dropdown, "item").value = row["item"]
    find(shown, widgets.SelectionSlider, "round").value = 6
    view = shown.children[-1].value
    assert view.count("<b>assistant</b>") == 6 and f"P(deviate) <b>{row['p_deviate']:.3g}</b>" in view


def test_what_a_model_wrote_is_no_markup():
    row = pd.Series({"reply": "r", "choice": "<b>x</b>", "deviated": True, "p_deviate": None})
    record = Record()
    for line in (b'{"message": "m", "before": "", "role": "user", "content": "<script>alert(1)</script>"}',
                 b'{"text": "<img src=x onerror=y>", "digest": "r", "key": "k", "seed": 1, "chat": "m"}'):  # fmt: skip
        record.add(line)
    shown = explore.decision_html(row.reindex([*row.index, "p_first", "p_second", "mass", "reward", "capital"]), record)
    assert "<script" not in shown and "<img" not in shown and "<b>x" not in shown


def test_results_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete run"):
        explore.recorded(str(tmp_path))
