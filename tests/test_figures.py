"""Whatever a profile can leave out or make odd, tables and figures show the rest, each under its model's name."""

import json
import shutil
from itertools import combinations, product

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import papermill
import pytest

from atp_utils import ROOT, resolve
from atp_utils.analysis import (
    drawing,
    figures,
    gallery,
    plots,
    positions,
    reading,
    stats,
    study,
    study_figure,
    tables,
    tipping,
    tool_use_tables,
)
from atp_utils.evolution.decisions import Decision, to_frame

RESULTS = resolve("data/results/quick/evolution")
MODELS = ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct")
SCENARIOS = ("role_play", "tool_use", "collusion")
# The figures of the paper's own condition; test_response_figures.py has the others.
FIGURES = {name: draw for name, draw in drawing.FIGURES.items() if drawing.CONDITIONS[name] == ("standard",)}
SCENARIO = {"role_play": "role_play", "role_play_environments": "role_play", "tool_use": "tool_use"}


def subsets(names):
    return [chosen for size in range(1, len(names) + 1) for chosen in combinations(names, size)]


def run(scenario, *, exact=True, rounds=2, items=4, thresholds=(2, 4), ratios=(0.5, 1.0), agents=2, valid=True,
        games=("information_sharing", "auction_bidding")):  # fmt: skip
    """Decisions of one arm, some of each outcome; every field as the scenario records it."""
    rows, exact_columns = [], ("p_deviate", "p_first", "p_second", "mass")

    def add(item, environment, agent, number, **more):
        deviated = (len(rows) + number) % 3 == 0 if valid else None
        choice = None if not valid else "direct" if deviated else "tool"
        rows.append(
            Decision(
                scenario=scenario, seed=0, item=item, environment=environment, agent=agent, round=number,
                choice=choice, deviated=deviated, valid=valid, attempts=1, reward=-1.0 if valid else None, capital=1.0,
                prompt_tokens=1, completion_tokens=1, reply=f"{item}-{agent}-{number}",
                replies="",
                **(dict.fromkeys(exact_columns, 0.1 + 0.7 * bool(deviated)) if exact else {}) | more,
            )
        )  # fmt: skip

    for number in range(1, rounds + 1):
        if scenario == "role_play":
            for item in range(items):
                add(f"i{item}", f"e{item % 2}", 0, number)
        elif scenario == "tool_use":
            for item in range(items):
                add(f"complex-{item}", f"f{item % 2}", 0, number, correct=[True, False, None][item % 3])
            add("simple-0", "s", 0, number, correct=valid, **dict.fromkeys(("p_deviate", "p_first", "p_second")))
        else:
            for game, k, ratio, agent in product(games, thresholds, ratios, range(agents)):
                succeeded = number > 1 and valid
                add(f"{game}-{k}-{ratio}", game, agent, number, threshold=k, incentive_ratio=ratio, succeeded=succeeded)
    return rows


def record(scenarios=SCENARIOS, arms=("base",), models=MODELS[:1], **odd):
    parts = [to_frame(run(name, **odd), model=m, arm=a) for name, m, a in product(scenarios, models, arms)]
    return pd.concat(parts, ignore_index=True)


def all_tables(decisions):
    """Every table of the notebooks and the report, by name, with the scenario that it is about."""
    role_play, tool_use, games = (decisions[decisions["scenario"] == name] for name in SCENARIOS)
    return {
        ("role_play", "table 1"): stats.round_columns(stats.rate_table(role_play)),
        ("role_play", "drift"): tables.drift(role_play),
        ("role_play", "benefit"): tables.benefit(role_play),
        ("role_play", "position"): positions.position_table(role_play),
        ("tool_use", "table 2"): tool_use_tables.table2(tool_use),
        ("tool_use", "drift"): tool_use_tables.drift_columns(tool_use),
        ("tool_use", "spread"): tool_use_tables.agent_spread(tool_use),
        ("tool_use", "spread of P"): tool_use_tables.agent_spread(tool_use, "P(tool)"),
        ("tool_use", "position"): positions.position_table(tool_use),
        ("collusion", "rates"): tables.collusion(games),
        ("collusion", "spread"): tables.largest_differences(games),
        ("collusion", "cascades"): tipping.cascade_table(games).set_index(["model", "arm", "threshold"]),
        ("collusion", "position"): positions.position_table(games),
    }


def rows_of(decisions, name):
    return decisions[decisions["scenario"] == SCENARIO.get(name, "collusion")]


@pytest.fixture(autouse=True)
def style():
    plots.set_style()
    yield
    plt.close("all")


@pytest.mark.parametrize("exact", [True, False], ids=["choose", "reason"])
@pytest.mark.parametrize("models", [MODELS[:1], MODELS], ids=len)
@pytest.mark.parametrize("arms", subsets(stats.ARMS), ids="-".join)
def test_any_arms_of_any_models(arms, models, exact):
    decisions = record(arms=arms, models=models, exact=exact)
    for (_, name), table in all_tables(decisions).items():
        shown = {row[:2] for row in table.index}
        expected = set(product(models, arms))
        if name == "benefit":
            expected = {pair for pair in expected if pair[1] != "base" and "base" in arms}
        if not exact and name in ("position", "spread of P"):
            expected = set()
        assert shown == expected, name
    for name, model in product(FIGURES, models):
        rows = rows_of(decisions, name)
        figure = FIGURES[name](rows[rows["model"] == model])
        if name == "role_play_environments" and not exact:
            assert figure is None
            continue
        assert model in figure.get_suptitle().replace("\n", "")
        said = {text.get_text() for text in figure.findobj(matplotlib.text.Text)}
        named = {plots.NAMES[arm] for arm in (arms[-1:] if name == "case_study" else arms)}
        assert all(any(text.startswith(arm) for text in said) for arm in named), name
        plt.close(figure)


@pytest.mark.parametrize("scenarios", subsets(SCENARIOS), ids="-".join)
def test_any_scenarios(scenarios, tmp_path):
    decisions = record(scenarios)
    for (scenario, name), table in all_tables(decisions).items():
        expected = scenario in scenarios and name != "benefit"
        assert bool(len(table)) == expected, (scenario, name)
    drawn = [path for name in FIGURES for path in gallery.draw(rows_of(decisions, name), name, tmp_path)]
    expected = {name for name in FIGURES if SCENARIO.get(name, "collusion") in scenarios}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}_Qwen--Qwen3-8B.{kind}" for name in expected for kind in ("png", "svg", "csv")
    }
    assert len(drawn) == 2 * len(expected)
    for path in tmp_path.glob("*.csv"):
        assert len(pd.read_csv(path)), path


ODD = {
    "one round": {"rounds": 1},
    "many rounds": {"rounds": 12, "thresholds": (2,), "ratios": (1.0,), "agents": 1},
    "one item": {"items": 1},
    "one threshold": {"thresholds": (3,)},
    "nine thresholds": {"thresholds": range(1, 10)},
    "one payoff": {"ratios": (4.0,)},
    "no ratio of 1": {"ratios": (0.25, 2.0)},
    "no information sharing": {"games": ("auction_bidding",)},
    "nothing valid": {"valid": False, "exact": False},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_odd_settings(name):
    decisions = record(arms=("base", "grpo"), **ODD[name])
    every = all_tables(decisions)
    missing = {"position", "spread of P"} if name == "nothing valid" else set()
    # Without a policy there is no usage to spread, without a valid decision no mean of a factor.
    missing |= {"spread"} if name == "nothing valid" else set()
    assert {key[1] for key, table in every.items() if not len(table)} == missing
    none = {"one round": {"role_play_environments", "recollusion"}, "no information sharing": {"case_study"}}
    none["nothing valid"] = {"role_play_environments"}
    for drawn, function in FIGURES.items():
        figure = function(rows_of(decisions, drawn))
        assert (figure is None) == (drawn in none.get(name, set())), drawn
        if figure is not None:
            figure.draw_without_rendering()


@pytest.mark.parametrize(("ratios", "drawn"), [((0.5, 1.0), 1), ((0.25, 2.0, 8.0), 2)])
def test_figure_3_says_which_incentive_it_shows(ratios, drawn):
    figure = figures.collusion(rows_of(record(ratios=ratios), "collusion"))
    assert figure.get_suptitle().startswith(f"Collusion at incentive ratio {drawn}:")


def test_one_round_has_no_drift():
    assert tables.drift(rows_of(record(rounds=1), "role_play")).to_numpy().tolist() == [["–", "–"]]
    assert set(tool_use_tables.drift_columns(rows_of(record(rounds=1), "tool_use")).to_numpy().flat) == {"–"}


def test_rounds_are_in_order_in_every_table():
    for key, table in all_tables(record(rounds=11)).items():
        rounds = [int(name[2:]) for name in map(str, table.columns) if name.startswith("r=")]
        assert rounds == sorted(rounds), key


def test_arms_of_unequal_length():
    # A model's own entry in a profile may give it other rounds; none is dropped, none pooled with another.
    short = record(("role_play", "collusion"), arms=("base",), rounds=1)
    decisions = pd.concat([short, record(("role_play", "collusion"), arms=("dpo",), rounds=3)])
    role_play = rows_of(decisions, "role_play")
    table = stats.round_columns(stats.rate_table(role_play))
    assert table.loc[(MODELS[0], "base"), ["r=2", "r=3"]].tolist() == ["–", "–"]
    drift = tables.drift(role_play)["P(deviate)"]
    assert drift[(MODELS[0], "base")] == "–" and drift[(MODELS[0], "dpo")] != "–"
    assert figures.collusion_grid(rows_of(decisions, "collusion")) is not None


@pytest.mark.parametrize("model", [*MODELS, "/home/someone/$models/a_long/path_to_a_model/that/goes_on/checkpoint-12"])
@pytest.mark.parametrize("arms", [("base",), stats.ARMS], ids=len)
def test_titles_fit_and_do_not_overlap(arms, model):
    decisions = record(arms=arms, models=(model,))
    for name, function in FIGURES.items():
        figure = function(rows_of(decisions, name))
        figure.canvas.draw()
        seen = [ax for ax in figure.axes if ax.axison]
        words = [figure._suptitle, *(word for ax in seen for word in (ax.title, ax.xaxis.label, ax.yaxis.label))]
        boxes = [word.get_window_extent() for word in words if word.get_text()]
        page = figure.bbox.padded(1)
        assert all(page.contains(*corner) for box in boxes for corner in (box.min, box.max)), name
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2)), name
        plt.close(figure)


def test_the_place_of_the_deviant_option_by_hand():
    # P(deviate) .9 and .6 with the deviant option first, .5 and .4 with it second; mass .8 and .6.
    decisions = record(("role_play",), rounds=1, items=2)
    decisions = decisions.assign(p_first=[0.9, 0.6], p_second=[0.5, 0.4], mass=[0.8, 0.6])
    table = positions.position_table(decisions).droplevel(["model", "arm"])
    assert [cell.split()[0] for cell in table["r=1"]] == ["75.0", "45.0", "30.0", "70.0"]
    assert table["n a round"].tolist() == [2, 2, 2, 2]
    # Differences .4 and .2 of two environments: .3 -+ 12.706 * .1.
    assert table.loc["first minus second", "r=1"] == "30.0 [-97.1, 100.0]"


def test_the_place_of_the_tool_is_over_families_and_agents():
    # Four complex problems of two families, in which places differ by .4 and .2; simple ones have no place.
    alone = record(("tool_use",), rounds=1)
    hard = alone["item"].str.startswith("complex-").to_numpy(dtype=bool)
    first, second = (alone["environment"].map({"f0": a, "f1": b, "s": None}) for a, b in ((0.6, 0.5), (0.2, 0.3)))
    alone = alone.assign(p_first=first.where(hard), p_second=second.where(hard))
    place = positions.position_table(alone).droplevel(["model", "arm"])
    assert place["n a round"].tolist() == [4] * 4 and place.loc["first minus second", "r=1"] == "30.0"
    two = pd.concat([alone, alone.assign(agent=1)])
    place = positions.position_table(two).droplevel(["model", "arm"])
    # Families' sums of residuals are .4 and -.4 over 8: variance 2 * 2 * .05^2, so .1 * 12.706 on either side.
    assert place.loc["first minus second", "r=1"] == "30.0 [-97.1, 100.0]"
    assert positions.position_table(alone.iloc[:0]).empty


def test_the_study_in_one_look(tmp_path):
    nan = float("nan")
    rows = [
        ("payoff", "role_play", "a/x-2b", "base", "", 16, -0.01, -0.02, 0.01, 1.0, "not shown"),
        ("payoff", "role_play", "$y-135m", "dpo", "", 16, 0.20, 0.10, 0.30, 0.01, "shown"),
        ("payoff", "role_play", "$y-135m", "base", "", 1, 0.04, nan, nan, nan, "undecided"),
        ("easy success", "tool_use", "$y-135m", "base", "", 0, nan, nan, nan, nan, "no premise"),
    ]
    table = pd.DataFrame(rows, columns=[*study.KEYS, "n", "estimate", "low", "high", "p", "verdict"])
    figure = study_figure.questions(table)
    figure.canvas.draw()
    # The smallest model first, its base arm before what was trained from it.
    assert [ax.get_title() for ax in figure.axes] == ["$y-135m\nbase", "$y-135m\nDPO", "a/x-2b\nbase"]
    asked = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert asked == ["payoff, role-play", "easy success, tool-use"]
    marks = [[line.get_xydata().tolist() for line in ax.lines if line.get_marker() in "oD"] for ax in figure.axes]
    assert marks[0][-1] == [[4.0, 0.0]] and marks[1] == [[[20.0, 0.0]]] and marks[2] == [[[-1.0, 0.0]]]
    ends = [
        [path.vertices[:, 0].tolist() for lines in ax.collections for path in lines.get_paths()] for ax in figure.axes
    ]
    assert ends == [[], [pytest.approx([10, 30])], [pytest.approx([-2, 1])]]
    assert "no premise" in {text.get_text() for text in figure.axes[0].texts}
    assert [path.rpartition(".")[2] for path in gallery.draw_answers(table, tmp_path)] == ["png", "svg"]
    assert len(pd.read_csv(tmp_path / "questions.csv")) == 4


def test_a_record_that_answers_nothing_has_no_such_figure(tmp_path):
    answers = study.answers(record(("collusion",), exact=False))
    assert answers.empty and list(answers)[:5] == study.KEYS
    assert tables.answers(answers).empty and not gallery.draw_answers(answers, tmp_path)
    assert reading.verdicts_in_short(answers) == reading.NOTHING


def test_figures_of_other_results_are_not_mixed(tmp_path):
    folder = gallery.claim(tmp_path / "figures", tmp_path / "one")
    (folder / "old.png").touch()
    assert gallery.claim(folder, tmp_path / "one") == folder
    with pytest.raises(FileExistsError, match="figures"):
        gallery.claim(folder, tmp_path / "two/one")
    gallery.claim(folder, tmp_path / "two/one", overwrite=True)
    assert not (folder / "old.png").exists()


def test_a_drawing_says_what_it_shows(tmp_path):
    gallery.draw(rows_of(record(("role_play",)), "role_play"), "role_play", tmp_path)
    [drawing] = tmp_path.glob("*.svg")
    assert "Violation rate and, where recorded, mean P(deviate) by round" in drawing.read_text()
    assert "Model: Qwen/Qwen3-8B." in drawing.read_text()


def test_all_is_drawn_by_one_command_and_never_over_others(tmp_path, capsys, monkeypatch):
    shutil.copytree(RESULTS / "collusion", tmp_path / "results/collusion")
    monkeypatch.setattr("sys.argv", ["gallery", str(tmp_path / "results"), str(tmp_path / "figures")])
    assert gallery.main() == 0
    printed = capsys.readouterr().out.split()
    assert len(printed) == 2 * len(list((tmp_path / "figures").glob("*.csv"))) > 4
    monkeypatch.setattr("sys.argv", ["gallery", str(tmp_path / "none"), str(tmp_path / "figures")])
    assert gallery.main() == 2 and "no complete run" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    monkeypatch.setattr("sys.argv", ["gallery", str(tmp_path / "results"), str(tmp_path / "mine")])
    assert gallery.main() == 2 and "mine" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("book", ["07_heatmaps", "08_figures", "09_dose_response", "10_critical_mass"])
def test_the_notebooks_run_on_one_arm_of_one_scenario(tmp_path, book):
    results, folder = tmp_path / "evolution", tmp_path / "figures"
    arm = "role_play/smollm2-135m/standard/base"
    shutil.copytree(RESULTS / arm, results / arm)
    given = {"results": str(results), "figures": str(folder)}
    source, out = ROOT / f"notebooks/{book}.ipynb", tmp_path / "out.ipynb"
    papermill.execute_notebook(source, out, given, progress_bar=False, cwd=ROOT)
    cells = json.loads(out.read_text())["cells"]
    assert not [put for cell in cells for put in cell.get("outputs", []) if put.get("name") == "stderr"]
    drawn = {path.stem for path in folder.iterdir() if path.suffix == ".png"}
    own = {"08_figures": ("role_play", "role_play_environments"), "09_dose_response": ("conditions", "survival")}
    one_look = {"questions"} if book == "09_dose_response" else set()
    assert drawn == {f"{name}_smollm2-135m" for name in own.get(book, ())} | one_look
