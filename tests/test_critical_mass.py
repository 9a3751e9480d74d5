"""Responses to others, and what follows from them, against values worked out by hand and agents of known habits."""

import numpy as np
import pandas as pd
import pytest
import scripted_agents as agents

from atp_utils.analysis import critical_mass


def test_a_chain_of_two_by_hand():
    # Abstainers join with .1 alone and .6 beside a colluder; colluders stay with .5 alone and .9 beside another.
    chain = critical_mass.transitions(np.array([0.1, 0.6]), np.array([0.5, 0.9]))
    assert chain[0] == pytest.approx([0.81, 0.18, 0.01])
    assert chain[1] == pytest.approx([0.5 * 0.4, 0.5 * 0.6 + 0.5 * 0.4, 0.5 * 0.6])
    assert chain[2] == pytest.approx([0.01, 0.18, 0.81])
    # From .5 each: 1/4, 1/2, 1/4 at first.
    first, second = critical_mass.predicted(0.5, chain, 2)
    expected = np.array([0.25, 0.5, 0.25]) @ chain @ [0, 0.5, 1]
    assert (first, second) == pytest.approx((0.5, expected))


def test_fixed_agents_stay():
    chain = critical_mass.transitions(np.full(4, 0.0), np.full(4, 0.0), fixed=2)
    assert np.allclose(chain[2:, 2], 1) and np.allclose(chain.sum(axis=1), 1)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_rows_of_a_chain_are_distributions(size):
    rng = np.random.default_rng(size)
    for fixed in range(size):
        chain = critical_mass.transitions(rng.random(size), rng.random(size), fixed)
        assert np.allclose(chain.sum(axis=1), 1) and (chain >= 0).all()


def test_fixed_points_of_a_step():
    # Nobody joins below a half of the others, all above: 0 and 1 are stable, the middle is the critical mass.
    x, f = critical_mass.mean_map(np.array([0, 0, 0, 1, 1, 1.0]), np.array([0, 0, 0, 1, 1, 1.0]))
    inner = [(share, stable) for share, stable in critical_mass.fixed_points(x, f) if 0.01 < share < 0.99]
    assert [(pytest.approx(0.5, abs=0.01), False)] == inner


def test_a_line_has_one_stable_point():
    x, f = critical_mass.mean_map(np.linspace(0.2, 0.6, 8), np.linspace(0.2, 0.6, 8))
    # f = .2 + .4 x crosses at 1/3.
    assert critical_mass.fixed_points(x, f) == [(pytest.approx(1 / 3, abs=1e-3), True)]


def test_the_past_decides_above_and_below_the_critical_mass():
    steep = np.array([0.02, 0.02, 0.02, 0.02, 0.98, 0.98, 0.98, 0.98])
    low, high = critical_mass.hysteresis(critical_mass.transitions(steep, steep), rounds=5)
    assert low < 0.1 and high > 0.9
    big = [critical_mass.simulate(steep, steep, 1_000_000, share) for share in (0.3, 0.7)]
    assert big == pytest.approx([0.02, 0.98], abs=0.005)


def test_a_committed_minority_by_hand():
    # Nobody joins without two others: one committed agent changes nothing, two carry the other two.
    rows = [("m", "base", 3, 1.0, "start", 0, 0.0)]
    for own in ("abstained", "colluded"):
        rows += [("m", "base", 3, 1.0, own, others, float(others >= 2)) for others in range(4)]
    table = pd.DataFrame(rows, columns=[*critical_mass.KEYS, "own", "others", "rate"])
    assert critical_mass.committed(table).iloc[0].tolist() == [0, 0, 1, 1]


def test_majority_followers_have_a_critical_mass_and_others_have_none(tmp_path):
    ways = {"condition": "forced_history", "thresholds": [4], "payoffs": [[1.2, 1.0, 0.8]]}
    found = {
        habit: critical_mass.dynamics(
            critical_mass.response(agents.evolve("collusion", habit, tmp_path / habit.__name__, **ways))
        ).iloc[0]
        for habit in (agents.follows_majority, agents.follows_position, agents.never)
    }
    majority = found[agents.follows_majority]
    assert float(majority["critical"]) == pytest.approx(0.5, abs=0.06)
    assert majority["from_all"] - majority["from_none"] > 0.5
    for habit in (agents.follows_position, agents.never):
        assert found[habit]["critical"] == "–"
        assert found[habit]["from_all"] == pytest.approx(found[habit]["from_none"], abs=1e-6)


def test_the_chain_predicts_agents_that_remember_one_round(tmp_path):
    ways = {"thresholds": [4], "payoffs": [[1.2, 1.0, 0.8]]}
    written, played = (
        agents.evolve("collusion", agents.follows_majority, tmp_path / name, condition=name, seeds=range(8), **ways)
        for name in ("forced_history", "standard")
    )
    table = critical_mass.beside(critical_mass.response(written), played)
    assert table["round"].tolist() == [1, 2, 3]
    assert table["predicted"].to_numpy() == pytest.approx(table["played"].to_numpy(dtype=float), abs=0.12)
