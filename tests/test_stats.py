import math

import numpy as np
import pandas as pd
import pytest

from atp_utils.analysis import stats


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


def test_the_bootstrap_resamples_clusters():
    # Two clusters of 50 equal rows: a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4, so the 95 %
    # percentile interval is all of [0, 1]. Resampling the 100 rows would give about [0.4, 0.6].
    assert stats.cluster_interval([50, 0], [50, 50]) == (0, 1)


def test_the_bootstrap_by_hand_with_three_clusters():
    # 27 equally likely resamples of clusters with rates 0, .5, 1 and equal size; the mean is 0 or 1 in one of 27
    # each (3.7 % > 2.5 %), so both ends are reached.
    assert stats.cluster_interval([0, 1, 2], [2, 2, 2]) == (0, 1)
    # Unequal sizes weigh: all mass in the large cluster.
    low, high = stats.cluster_interval([0, 90], [10, 90], proportion=True)
    assert (low, high) == (0, 1)


def test_sixteen_clusters_agree_with_the_normal_interval():
    rates = np.linspace(0.3, 0.7, 16)
    low, high = stats.cluster_interval(rates * 4, np.full(16, 4))
    half = 1.96 * rates.std() / 4
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.01), pytest.approx(0.5 + half, abs=0.01))


def test_unanimous_clusters_get_the_exact_interval():
    # Clopper-Pearson, 0 of 16: 1 - 0.025^(1/16).
    assert stats.cluster_interval([0] * 16, [4] * 16) == (0, pytest.approx(1 - 0.025 ** (1 / 16)))
    assert stats.cluster_interval([4] * 16, [4] * 16) == (pytest.approx(0.025 ** (1 / 16)), 1)


def test_one_cluster_has_no_interval():
    assert all(math.isnan(end) for end in stats.cluster_interval([3], [4]))
    assert all(math.isnan(end) for end in stats.cluster_interval([3, 0], [4, 0]))


def test_equal_differences_have_no_interval():
    # Every resample of sixteen zeros is zero; "[0, 0]" would claim to know what other environments do.
    assert all(math.isnan(end) for end in stats.cluster_interval([0] * 16, [1] * 16, proportion=False))


def test_drift_is_paired_by_environment():
    rows = [("a", 1, False), ("a", 2, True), ("b", 1, True), ("b", 2, True), ("a", 3, True), ("b", 3, True)]
    drift = stats.drift_table(frame(*rows)).iloc[0]
    # Environment a moves by 1, b by 0; the resamples' means are 0, 1/2, 1.
    assert (drift["drift"], drift["low"], drift["high"]) == (0.5, 0, 1)


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
    assert table[["arm", "benefit", "low", "high"]].values.tolist() == [["dpo", -0.5, -1.0, 0.0]]
    assert stats.benefit_table(base).empty


def test_percent_texts():
    assert stats.percent(0.4219) == "42.2"
    assert stats.percent(-0.0001, -0.0002, 0.1) == "0.0 [0.0, 10.0]"
    assert stats.percent(0.5, 0.25, 0.75) == "50.0 [25.0, 75.0]"
    assert stats.percent(float("nan"), 0, 1) == "–"
    assert stats.percent(0.5, float("nan"), float("nan")) == "50.0"


def test_round_columns_has_the_papers_layout():
    wide = stats.round_columns(stats.rate_table(frame(("a", 1, True), ("b", 1, True), ("a", 2, False), ("b", 2, None))))
    assert list(wide.columns) == ["n a round", "invalid %", "r=1", "r=2"]
    assert wide.iloc[0].tolist() == [1, 25.0, "100.0 [15.8, 100.0]", "0.0"]
