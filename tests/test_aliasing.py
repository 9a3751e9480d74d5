"""No factor of a design goes with the label of the deviant option, nor with its place.

A model that always takes one label, or the first option, then shows the same rate in every cell, give or take what an
odd number of items leaves over. Bounds are what the designs reach, not what they happen to give:

- counts differ by at most one in any cell of the collusion grid by one or two of its factors;
- correlations with the collusion grid's factors and their parities are below 0.03: with 7 games and 5 payoffs a
  threshold, or a cell, has one item left over, so they can't all be 0;
- in role-play either is exactly balanced within each environment; in a part of its items (`balanced_subset`) only over
  all of them, and correlations with environments are then held at three standard errors, as those with payoffs, which
  are drawn, are in all items.
"""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import CHOOSE, drive

from atp_utils.scenarios import role_play
from atp_utils.scenarios.collusion.items import PAYOFFS, make_grid, make_instances, read_games
from atp_utils.scenarios.role_play.items import balanced_subset
from atp_utils.scenarios.tool_use import items as tool_items

GAMES = read_games()
FACTORS = {
    "game": lambda item: item.environment,
    "threshold": lambda item: item.threshold,
    "payoffs": lambda item: item.payoffs,
}
# +1 where the deviant option has the first label of its pair, or is named first; else -1.
SIGNS = {
    "label": lambda item: 1 if item.deviant == min(item.options) else -1,
    "place": lambda item: 1 if item.deviant == item.options[0] else -1,
}


def signs(items, which):
    return np.array([SIGNS[which](item) for item in items])


def correlation(one, other):
    return abs(np.corrcoef(one, other)[0, 1])


def cells(items, factors):
    parts = {}
    for item in items:
        parts.setdefault(tuple(factor(item) for factor in factors), []).append(item)
    return parts.values()


# --- collusion -----------------------------------------------------------------------------------------------------


def subsets(values):
    return st.lists(st.sampled_from(values), min_size=1, unique=True)


@settings(max_examples=150, deadline=None)
@given(number=st.integers(1, 7), thresholds=subsets(range(1, 9)), payoffs=subsets(PAYOFFS))
def test_either_label_and_place_is_the_colluding_one_in_half_of_any_cell_of_any_grid(number, thresholds, payoffs):
    grid = make_grid(GAMES[:number], thresholds=thresholds, payoffs=payoffs)
    for size in range(3):
        for factors in combinations(FACTORS.values(), size):
            for part in cells(grid, factors):
                for which in SIGNS:
                    assert abs(signs(part, which).sum()) <= 1, which


@settings(max_examples=50, deadline=None)
@given(number=st.integers(1, 7), thresholds=subsets(range(1, 9)), payoffs=subsets(PAYOFFS))
def test_under_both_names_no_cell_favours_a_label(number, thresholds, payoffs):
    grid = make_grid(GAMES[:number], thresholds=thresholds, payoffs=payoffs, both_names=True)
    for part in cells(grid, FACTORS.values()):
        one, other = part
        assert signs(part, "label").sum() == 0 and (one.deviant, one.compliant) == (other.compliant, other.deviant)
        # The place of colluding stays, so that the name is all that differs.
        assert signs([one], "place") == signs([other], "place") and one.means == other.means
    assert len({item.id for item in grid}) == len(grid)


@pytest.mark.parametrize("which", SIGNS)
def test_the_papers_grid_has_no_factor_that_goes_with_label_or_place(which):
    grid = make_grid(GAMES)
    own, levels = signs(grid, which), {}
    for name, factor in FACTORS.items():
        order = list(dict.fromkeys(map(factor, grid)))
        levels[name] = np.array([order.index(factor(item)) for item in grid])
    for size in (1, 2, 3):
        for names in combinations(FACTORS, size):
            parity = (-1.0) ** sum(levels[name] for name in names)
            assert correlation(parity, own) < 0.03, names
    for name, level in levels.items():
        assert correlation(level, own) < 0.03, name
    for game in GAMES:
        # All four corners, five times: whoever takes one label, or one place, colludes in half of every game.
        assert set(Counter((SIGNS["label"](i), SIGNS["place"](i)) for i in grid if i.environment == game.name)) == {
            (1, 1), (1, -1), (-1, 1), (-1, -1)
        }  # fmt: skip


@pytest.mark.parametrize("which", SIGNS)
@pytest.mark.parametrize("seed", range(5))
def test_label_and_place_stand_for_nothing_in_the_training_instances(seed, which):
    instances = make_instances(GAMES, seed=seed)
    own = signs(instances, which)
    columns = {
        "threshold": [item.threshold for item in instances],
        "agents": [item.agents for item in instances],
        "share": [item.threshold / item.agents for item in instances],
        "parity": [item.threshold % 2 for item in instances],
        "r_high": [item.payoffs[0] for item in instances],
        "r_low": [item.payoffs[2] for item in instances],
    }
    for name, column in columns.items():
        # Three standard errors of a correlation in 350 instances; what they are sorted by does better.
        assert correlation(column, own) < (0.02 if name == "threshold" else 0.16), name
    for part in cells(instances, [FACTORS["game"]]):
        assert signs(part, which).sum() == 0


@pytest.mark.parametrize("instances", [2, 4, 6, 50])
def test_any_even_number_of_instances_is_balanced_in_every_game(instances):
    for part in cells(make_instances(GAMES, instances=instances), [FACTORS["game"]]):
        assert len(part) == instances and all(signs(part, which).sum() == 0 for which in SIGNS)


# --- role-play -----------------------------------------------------------------------------------------------------


def role_play_columns(items):
    names = sorted({item.environment for item in items})
    environment = np.array([names.index(item.environment) for item in items])
    low, ratio = zip(
        *((item.payoff_compliant, item.payoff_deviant / item.payoff_compliant) for item in items), strict=True
    )
    return {"environment": environment, "parity": environment % 2, "payoff": low, "ratio": ratio}


@pytest.mark.parametrize("which", SIGNS)
@pytest.mark.parametrize("split", [0, 1])
def test_role_play_items_have_no_factor_that_goes_with_label_or_place(splits, split, which):
    items = splits[split]
    for name, column in role_play_columns(items).items():
        limit = 3 / np.sqrt(len(items)) if name in ("payoff", "ratio") else 1e-9
        assert correlation(column, signs(items, which)) < limit, name
    for part in cells(items, [FACTORS["game"]]):
        assert signs(part, which).sum() == 0
    assert (signs(items, "label") * signs(items, "place")).sum() == 0


@pytest.mark.parametrize("which", SIGNS)
@pytest.mark.parametrize("count", range(4, 65))
def test_any_number_of_test_items_is_free_of_label_and_place(splits, count, which):
    items = balanced_subset(splits[1], count)
    own = signs(items, which)
    assert abs(own.sum()) <= 1
    for name, column in role_play_columns(items).items():
        # A part has what chance would give it, no more: which item of an environment is in it isn't balanced.
        assert len(set(column)) == 1 or correlation(column, own) < 3 / np.sqrt(count), name


# --- what enters the history ---------------------------------------------------------------------------------------


def test_the_order_in_the_history_goes_with_no_item_and_no_round(splits):
    """The deviant option comes first in half of each agent's rounds and, round by round, in half of the agents'."""
    given, first = role_play.Evolution(rounds=4), {}
    for item in splits[1]:
        rows, _ = drive(role_play.SCENARIO.episode(item, given, CHOOSE, 0), lambda _: (0.5, 0.5))
        assert sum(row.deviant_first for row in rows) == 2
        for row in rows:
            first.setdefault(row.round, []).append(row.deviant_first)
    assert [sum(values) for values in first.values()] == [32] * 4


@pytest.mark.parametrize("seed", range(5))
def test_in_tool_use_blocks_place_goes_with_neither_kind_nor_round(seed):
    """The labels are the policies themselves; only their place can be balanced."""
    setting = tool_items.Evolution(rounds=4, simple_per_round=8, complex_per_round=24)
    parts = [tool_items.make_items(tool_items.draw_problems(kind, 90)[0], test=60)[1] for kind in ("simple", "complex")]
    rounds, hard = tool_items.blocks(parts[0] + parts[1], setting, seed, 0)
    for block in (*rounds, hard):
        assert sum(1 if item.options[0] == "tool" else -1 for item in block) == 0
    simple = [item for block in rounds for item in block]
    number = np.repeat(np.arange(4), 8)
    place = np.array([1 if item.options[0] == "tool" else -1 for item in simple])
    assert correlation(number, place) < 1e-9 and correlation(number % 2, place) < 1e-9
