import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_utils.analysis import positions, stats


def frame(*rows):
    """Rows (environment, round, deviated or None), one arm of one model."""
    table = pd.DataFrame(rows, columns=["environment", "round", "deviated"])
    table["deviated"] = table["deviated"].astype("boolean")
    return table.assign(model="m", arm="base", valid=table["deviated"].notna())


def test_rates_leave_invalid_decisions_out_and_count_them():
    table = stats.rate_table(
        frame(("a", 1, True), ("a", 1, False), ("b", 1, True), ("b", 1, None), ("c", 1, None), ("a", 2, None))
    )
    first = table[table["round"] == 1].iloc[0]
    assert (first["n"], first["invalid"], first["rate"]) == (3, pytest.approx(2 / 5), pytest.approx(2 / 3))
    second = table[table["round"] == 2].iloc[0]
    assert (second["n"], second["invalid"]) == (0, 1) and math.isnan(second["rate"])


def test_replies_cut_before_their_answer_are_counted_apart_where_there_are_any():
    rows = frame(("a", 1, True), ("a", 1, None), ("b", 1, None), ("b", 1, None), ("b", 2, True)).assign(fault=None)
    assert "cut" not in stats.rate_table(rows)
    rows["fault"] = pd.Series([None, "cut", "unreadable", "cut", None], dtype="string")
    table = stats.rate_table(rows)
    assert table["invalid"].tolist() == [0.75, 0] and table["cut"].tolist() == [0.5, 0]
    wide = stats.round_columns(table)
    assert wide.loc[("m", "base"), ["invalid %", "cut %"]].tolist() == [37.5, 25]
    assert list(wide.columns)[:3] == ["n a round", "invalid %", "cut %"]
    rows = rows.assign(scenario="s", condition="standard", item="i", seed=0, p_deviate=None)
    counts = positions.contents(rows).loc[("s", "standard", "m", "base")]
    assert counts[["decisions", "invalid", "cut"]].tolist() == [5, 3, 2]
    assert "cut" not in positions.contents(rows.assign(fault=None))


def grouped(rates, rows):
    """Values and units of clusters with these numbers of ones among so many rows each."""
    values = [float(n < ones) for ones, size in zip(rates, rows, strict=True) for n in range(size)]
    return values, [place for place, size in enumerate(rows) for _ in range(size)]


def test_the_interval_of_a_mean_change_is_students():
    # Changes 1, 2, 3, 6: mean 3, variance 14 / 3, so se = sqrt(14 / 12); t with 3 degrees of freedom is 3.1824.
    half = 3.1824 * math.sqrt(14 / 12)
    found = stats.interval([1, 2, 3, 6], range(4), proportion=False)
    assert found == (pytest.approx(3 - half, abs=1e-3), pytest.approx(3 + half, abs=1e-3))


def test_rows_of_one_cluster_count_once():
    # Rates .25, .5, .75 of four rows each: mean .5, se = sqrt(.0625 / 3) = .1443, t(2) = 4.3027; on the logit scale
    # half = 4.3027 * .1443 / .25 = 2.484, and 1 / (1 + exp(2.484)) = .0770. Twelve independent rows would give .23.
    low, high = stats.interval(*grouped([1, 2, 3], [4, 4, 4]))
    assert (low, high) == (pytest.approx(0.0770, abs=1e-3), pytest.approx(0.9230, abs=1e-3))
    many = stats.interval(*grouped([10, 20, 30], [40, 40, 40]))
    assert many == (pytest.approx(low), pytest.approx(high))


def test_two_kinds_of_units_by_hand():
    # A 2 x 2 layout: rows a: 1 1, b: 0 1, so the mean is 3/4 and the residuals are 1/4, 1/4, -3/4, 1/4 (over 4).
    # Families: sums 1/2 and -1/2, variance 2 * (1/4 + 1/4) / 16 = 1/16. Agents: sums -1/2 and 1/2, the same.
    # Crossing: 4/3 * (3/16 + 9/16) / 16 = 1/16. In all 1/16; t(1) = 12.706.
    values, family, agent = [1, 1, 0, 1], "aabb", "xyxy"
    half = 12.706 / 4
    found = stats.interval(values, family, agent, proportion=False)
    assert found == (pytest.approx(0.75 - half, abs=1e-3), pytest.approx(0.75 + half, abs=1e-3))
    # Never less than one kind's alone: here all variance is between agents.
    values, family, agent = [0, 1, 0, 1, 0, 1], "aabbcc", "xyxyxy"
    one = stats.interval(values, agent, proportion=False)
    two = stats.interval(values, family, agent, proportion=False)
    assert two == pytest.approx(one)


def test_a_ratio_weighs_its_units():
    # 3 solved of 6 units of cost and 1 of 2: both 1/2, so nothing varies.
    assert all(math.isnan(end) for end in stats.interval([3, 1], "ab", weights=[6, 2], proportion=False))
    low, high = stats.interval([3, 0], "ab", weights=[6, 2], proportion=False)
    # Rate 3/8, residuals 3/4 and -3/4 over 8: variance 2 * 2 * (3/32)^2.
    half = 12.706 * math.sqrt(4 * (3 / 32) ** 2)
    assert (low, high) == (pytest.approx(3 / 8 - half, abs=1e-3), pytest.approx(3 / 8 + half, abs=1e-3))


def test_unanimous_clusters_get_the_exact_interval():
    # Clopper-Pearson, 0 of 16: 1 - 0.025^(1/16).
    assert stats.interval(*grouped([0] * 16, [4] * 16)) == (0, pytest.approx(1 - 0.025 ** (1 / 16)))
    assert stats.interval(*grouped([4] * 16, [4] * 16)) == (pytest.approx(0.025 ** (1 / 16)), 1)


def test_values_that_round_to_0_or_1_are_unanimous():
    # 0 of 8 and 8 of 8: 0.025^(1/8) is .631.
    tiny = stats.interval([1e-9] * 8, range(8))
    assert tiny == (0, pytest.approx(1 - 0.025 ** (1 / 8)))
    assert stats.interval([1 - 1e-9] * 8, range(8)) == (pytest.approx(0.025 ** (1 / 8)), 1)
    assert stats.interval([2e-9] * 8, range(8), weights=[2] * 8) == tiny
    assert stats.interval([2] * 8, range(8), weights=[2] * 8) == (pytest.approx(0.025 ** (1 / 8)), 1)


def test_one_unit_of_a_kind_has_no_interval():
    assert all(math.isnan(end) for end in stats.interval([1, 0, 1], "aaa"))
    assert all(math.isnan(end) for end in stats.interval([1, 0, 1], "abc", "xxx"))
    assert all(math.isnan(end) for end in stats.interval([], [])) and stats.LEVEL == 0.95


def test_equal_differences_have_no_interval():
    # "[0, 0]" would claim to know what other environments do.
    assert all(math.isnan(end) for end in stats.interval([0] * 16, range(16), proportion=False))
    assert all(math.isnan(end) for end in stats.interval([0.5] * 16, range(16)))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=16))
def test_an_interval_of_a_rate_holds_it_and_stays_within_bounds(ones):
    values, units = grouped(ones, [5] * len(ones))
    low, high = stats.interval(values, units)
    assert math.isnan(low) or 0 <= low <= np.mean(values) <= high <= 1


def test_drift_is_paired_by_environment():
    rows = [("a", 1, False), ("a", 2, True), ("b", 1, True), ("b", 2, True), ("a", 3, True), ("b", 3, True)]
    drift = stats.drift_table(frame(*rows)).iloc[0]
    # Environment a moves by 1, b by 0: standard error 1/2, and t with one degree of freedom is 12.7: nothing is known.
    assert (drift["drift"], drift["low"], drift["high"]) == (0.5, -1, 1)
    four = [(name, number, number == 2 and name != "a") for name in "abcd" for number in (1, 2)]
    drift = stats.drift_table(frame(*four)).iloc[0]
    # Changes 0, 1, 1, 1: standard error 1/4, t(3) is 3.1824.
    assert (drift["drift"], drift["low"], drift["high"]) == (0.75, pytest.approx(0.75 - 3.1824 / 4, abs=1e-4), 1)


def test_what_cannot_be_compared_is_kept_without_a_value():
    # One round only; an arm without a valid decision in the last round.
    one = stats.drift_table(frame(("a", 1, True), ("b", 1, False)))
    lost = stats.drift_table(frame(("a", 1, True), ("a", 2, None)))
    for table in (one, lost):
        assert table["arm"].tolist() == ["base"] and table[["drift", "low", "high"]].isna().all(axis=None)
    both = pd.concat([frame(("a", 1, True)), frame(("a", 1, None)).assign(arm="dpo")])
    table = stats.benefit_table(both)
    assert table["arm"].tolist() == ["dpo"] and table["benefit"].isna().all()
    assert stats.benefit_table(both.assign(arm="dpo")).empty


def test_models_and_arms_have_rounds_of_their_own():
    short = frame(("a", 1, False), ("a", 2, True), ("b", 1, False), ("b", 2, False))
    long = frame(*[("a", number, False) for number in (1, 2, 3)]).assign(model="n")
    table = stats.drift_table(pd.concat([short, long])).set_index("model")
    assert table["drift"].to_dict() == {"m": 0.5, "n": 0}


def test_rounds_are_columns_in_their_order():
    cells = pd.DataFrame({"arm": "a", "round": [10, 2, 1], "cell": ["x", "y", "z"]})
    wide = stats.by_round(pd.concat([cells, cells.iloc[:1].assign(arm="b")]), ["arm"])
    assert list(wide.columns) == ["r=1", "r=2", "r=10"] and wide.loc["b"].tolist() == ["–", "–", "x"]


def test_benefit_compares_the_first_round_with_the_base_arm():
    base = frame(("a", 1, True), ("b", 1, True), ("a", 2, False), ("b", 2, False))
    dpo = frame(("a", 1, False), ("b", 1, True), ("a", 2, True), ("b", 2, True)).assign(arm="dpo")
    table = stats.benefit_table(pd.concat([base, dpo]))
    assert table[["arm", "benefit"]].values.tolist() == [["dpo", -0.5]]
    assert (table["low"][0], table["high"][0]) == (-1, 1)
    assert stats.benefit_table(base).empty


def test_percent_texts():
    assert stats.percent(0.4219) == "42.2"
    assert stats.percent(-0.0001, -0.0002, 0.1) == "0.0 [0.0, 10.0]"
    assert stats.percent(0.5, 0.25, 0.75) == "50.0 [25.0, 75.0]"
    assert stats.percent(-0.000133, -0.000178, -0.000088) == "-0.013 [-0.018, -0.009]"
    assert stats.percent(6.8e-7, -1.6e-7, 1.2e-6) == "7e-05 [-2e-05, 1e-04]"
    assert stats.percent(0.0, 0.0, 0.0) == "0.0 [0.0, 0.0]"
    assert stats.percent(float("nan"), 0, 1) == "–"
    assert stats.percent(0.5, float("nan"), float("nan")) == "50.0"


def test_round_columns_has_the_papers_layout():
    wide = stats.round_columns(stats.rate_table(frame(("a", 1, True), ("b", 1, True), ("a", 2, False), ("b", 2, None))))
    assert list(wide.columns) == ["n a round", "invalid %", "r=1", "r=2"]
    assert wide.iloc[0].tolist() == [1, 25.0, "100.0 [15.8, 100.0]", "0.0"]


def test_choices_between_improbable_answers_are_named():
    rows = [("base", 1, 0.2), ("base", 1, 0.3), ("base", 2, 0.9), ("base", 3, 0.4), ("dpo", 1, 0.6), ("dpo", 2, None)]
    table = pd.DataFrame(rows, columns=["arm", "round", "mass"]).astype({"mass": "Float64"})
    standard, equal = table.assign(condition="standard"), table.assign(condition="equal_payoffs", mass=0.6)
    assert stats.low_mass(standard) == "both answers together below 50%: base r=1, 3"
    assert stats.low_mass(standard[standard["arm"] == "dpo"]) == ""
    # Another condition takes nothing away from it, and is named where it is the improbable one.
    assert stats.low_mass(pd.concat([standard, equal])) == stats.low_mass(standard)
    equal.loc[equal["arm"] == "dpo", "mass"] = 0.1
    assert stats.low_mass(equal) == "both answers together below 50%: dpo in equal_payoffs r=1, 2"
