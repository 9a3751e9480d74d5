"""Figures draw what they are given: checked on the artists, not on pixels."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from test_tipping import table

from atp_utils.analysis import plots


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_curves_show_percent_and_bands(ax):
    rates = pd.DataFrame({"arm": "dpo", "round": [1, 2], "rate": [0.25, 0.5], "low": [0.1, 0.4], "high": [0.3, 0.6]})
    plots.round_curves(ax, rates, title="t", label="%")
    [line] = ax.get_lines()
    assert line.get_xydata().tolist() == [[1, 25], [2, 50]] and len(ax.collections) == 1
    low, high = ax.get_ylim()
    assert low < 0 and high > 100


def test_a_single_round_has_its_interval(ax):
    rates = pd.DataFrame({"arm": ["base", "dpo"], "round": 1, "rate": 0.25, "low": 0.1, "high": 0.3})
    plots.round_curves(ax, rates, title="t", label="%")
    ends = [bar.get_segments()[0][:, 1].tolist() for bar in ax.collections]
    assert ends == [[10, 30], [10, 30]] and ax.get_xticks().tolist() == [1]


def test_no_valid_decision_is_said(ax):
    rates = pd.DataFrame({"arm": "dpo", "round": [1, 2], "rate": float("nan"), "low": None, "high": None}).astype(
        {"low": float, "high": float}
    )
    plots.round_curves(ax, rates, title="t", label="%")
    assert [text.get_text() for text in ax.texts] == ["no valid decision"] and ax.get_xlim() == (0.95, 2.05)


def test_an_empty_cell_is_hatched_and_never_coloured(ax):
    cells = pd.DataFrame(
        {"threshold": [2, 2, 4, 4], "incentive_ratio": [1.0, 4.0] * 2, "n": [8, 3, 5, 0], "rate": [0, 1, 0.5, None]}
    )
    plots.heatmap(ax, cells, title="t")
    mesh = ax.collections[0]
    assert mesh.get_array().mask.flatten().tolist() == [False, False, False, True]
    assert [patch.get_hatch() for patch in ax.patches] == ["////"]
    assert ax.patches[0].get_xy() == (1, 1)
    texts = {text.get_text() for text in ax.texts}
    assert {"0\nn=8", "100\nn=3", "50\nn=5", "n=0"} <= texts


def test_a_trace_has_a_cell_for_every_decision(ax):
    decisions = table([5, 7, 8]).assign(choice="x", capital=1.0)
    plots.trace(ax, decisions, title="t")
    filled = [patch for patch in ax.patches if patch.get_facecolor() != (1, 1, 1, 1)]
    assert len(ax.patches) == 24 and len(filled) == 20


def test_an_episode_is_shown_as_it_was_said(ax):
    words = "I weighed it for long. " * 20 + "All will share, so I do too."
    decisions = table([1, 8]).assign(words=words, p_deviate=pd.NA)
    decisions.loc[0, ["words", "valid"]] = [pd.NA, False]
    plots.spoken(ax, decisions, title="t", characters=40, lines=3)
    texts = [text.get_text() for text in ax.texts]
    assert texts[0] == "invalid" and len(texts) == 16
    assert texts[1].startswith("... ") and texts[1].endswith("so I do too.") and texts[1].count("\n") == 2


def test_the_same_data_give_the_same_files(tmp_path):
    plots.set_style()
    written = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        figure, ax = plt.subplots()
        plots.round_curves(ax, pd.DataFrame({"arm": "base", "round": [1, 2], "rate": [0, 1]}), title="t", label="l")
        paths = plots.save(figure, folder, "a")
        plt.close(figure)
        assert [path.split(".")[-1] for path in paths] == ["png", "svg"]
        written.append([(folder / name).read_bytes() for name in ("a.png", "a.svg")])
    assert written[0] == written[1]
