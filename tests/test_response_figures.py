"""Figures of controls, doses and responses: drawn from agents of known habits, in full and with parts left out."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import scripted_agents as agents

from atp_utils.analysis import gallery, plots, report, response_figures, verdicts

DRAWN = {
    "role_play": ("conditions", "role_play_paths", "survival", "dose"),
    "collusion": ("collusion_paths", "response", "chain", "group_size"),
}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Three arms of role-play and two of collusion, in several conditions."""
    plots.set_style()
    folder, parts = tmp_path_factory.mktemp("scripted"), []
    for arm, habit in (("base", agents.follows_payoff), ("dpo", agents.copies_itself), ("grpo", agents.never)):
        for condition in ("standard", "equal_payoffs", "forced_history"):
            given = {"condition": condition, "items": 8, "rounds": 3, "told": ["own", "other", "unrelated"]}
            parts.append(agents.evolve("role_play", habit, folder / arm / condition, arm=arm, **given))
    for arm, habit in (("base", agents.follows_majority), ("dpo", agents.copies_itself)):
        # The base arm has no control.
        for condition in ("standard", *(["equal_payoffs"] if arm == "dpo" else []), "forced_history"):
            given = {"condition": condition, "thresholds": [2, 6], "rounds": 2}
            parts.append(agents.evolve("collusion", habit, folder / "games" / arm / condition, arm=arm, **given))
    return pd.concat(parts, ignore_index=True)


def of(record, scenario):
    return record[record["scenario"] == scenario]


@pytest.mark.parametrize(("scenario", "name"), [(s, name) for s, names in DRAWN.items() for name in names])
def test_every_figure_is_drawn_and_nothing_overlaps(record, scenario, name):
    figure = getattr(response_figures, name)(of(record, scenario))
    figure.canvas.draw()
    page = figure.bbox.padded(1)
    words = [figure._suptitle, *(word for ax in figure.axes for word in (ax.title, ax.xaxis.label, ax.yaxis.label))]
    boxes = [
        word.get_window_extent() for word in [*words, *figure.legends] if word in figure.legends or word.get_text()
    ]
    assert all(page.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    assert all(ax.lines or ax.collections for ax in figure.axes)
    plt.close(figure)


@pytest.mark.parametrize("name", [name for names in DRAWN.values() for name in names])
def test_what_a_run_lacks_is_no_figure(record, name):
    lived = record[record["condition"] == "standard"]
    lived = lived[
        (lived["round"] == 1) & (lived["scenario"] == ("role_play" if name in DRAWN["role_play"] else "collusion"))
    ]
    assert getattr(response_figures, name)(lived) is None


def test_a_figure_that_wants_all_conditions_gets_them(record, tmp_path):
    assert len(gallery.draw(of(record, "role_play"), "dose", tmp_path)) == 2
    # Figures of the paper see its own condition alone.
    assert len(gallery.draw(of(record, "role_play"), "role_play", tmp_path)) == 2
    forced = record[(record["scenario"] == "role_play") & (record["condition"] == "forced_history")]
    assert gallery.draw(forced, "role_play", tmp_path) == []


def test_survival_shows_every_round_and_hides_nothing(record):
    decisions = of(record, "role_play")
    table = verdicts.time_to_tip(decisions)
    figure = response_figures.survival(decisions)
    figure.canvas.draw()
    drawn = table[(table["arm"] == "base") & (table["condition"] == "standard")]
    line, base = figure.axes[0].lines[0], figure.axes[0]
    # Each of the three rounds is as wide as the others, around its tick.
    assert line.get_xdata().tolist() == [0.5, 1.5, 2.5, 3.5] and base.get_xticks().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == [*(100 * drawn["rate"]), 100 * drawn["rate"].iloc[-1]]
    band = base.collections[0].get_datalim(base.transData)
    assert (band.x0, band.x1) == (1.5, 3.5)
    [legend] = figure.legends
    assert not any(ax.get_legend() or ax.get_window_extent().overlaps(legend.get_window_extent()) for ax in figure.axes)
    assert [text.get_text() for text in legend.get_texts()] == ["standard", "equal payoffs"]
    plt.close(figure)


def test_conditions_of_unlike_items_say_so(record):
    lived = of(record, "role_play")
    labels = [text.get_text() for text in response_figures.conditions(lived).axes[0].get_yticklabels()]
    assert labels == ["standard", "equal payoffs"]
    few = lived[(lived["condition"] == "standard") | lived["item"].isin(lived["item"].unique()[:2])]
    labels = [text.get_text() for text in response_figures.conditions(few).axes[0].get_yticklabels()]
    assert labels == ["standard, 8 items", "equal payoffs, 2 items"]
    plt.close("all")


def test_a_title_warns_of_what_is_drawn_only(record, tmp_path):
    shaky = of(record, "role_play")
    shaky = shaky.assign(mass=shaky["mass"].where(shaky["condition"] != "forced_history", 0.1))
    gallery.draw(shaky, "survival", tmp_path)
    assert plt.gcf()._suptitle.get_text() == "Still compliant: scripted"
    gallery.draw(shaky, "dose", tmp_path)
    assert "in forced_history" in plt.gcf()._suptitle.get_text().replace("\n", " ")
    plt.close("all")


def test_a_report_begins_with_the_verdicts(record):
    found = {f"{scenario}: {title}" if scenario else title: table for scenario, title, table in report.parts(record)}
    titles = list(found)
    assert titles[0] == report.PRIMARY and {f"role_play: {report.SLOPES}", f"collusion: {report.MASS}"} <= set(titles)
    table = found[report.PRIMARY]
    assert table.loc[("role_play", "scripted", "grpo"), "verdict"] == "no tipping"
    assert table.loc[("collusion", "scripted", "base"), "verdict"] == "no control"
    assert table.loc[("collusion", "scripted", "dpo"), "verdict"] == "no tipping"
