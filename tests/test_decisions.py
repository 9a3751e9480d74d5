import pandas as pd
import pytest

from atp_utils.evolution.decisions import Decision, to_frame
from atp_utils.evolution.protocol import Choice


def test_missing_values_stay_apart_from_false_and_zero():
    row = Decision(
        scenario="role_play", seed=0, item="i", environment="e", agent=0, round=1, choice=None, deviated=None,
        valid=False, attempts=3, reward=None, capital=0, prompt_tokens=1, completion_tokens=2, reply="d",
        replies="d",
    )  # fmt: skip
    frame = to_frame([row], model="m", arm="base")
    assert list(frame.columns[:3]) == ["model", "arm", "training_seed"]
    assert frame["deviated"].isna().all() and frame["deviated"].dtype == "boolean"
    assert pd.isna(frame["reward"].iloc[0]) and not frame["valid"].iloc[0]
    assert len(to_frame([], model="m", arm="base")) == 0


@pytest.mark.parametrize(
    ("options", "by_place", "expected"),
    [
        # The item names its compliant option first; the chat that goes on may be turned.
        ("item", ((0.7, 0.4), (0.6, 0.3)), (0.6, 0.3, False)),
        ("turned", ((0.6, 0.3), (0.7, 0.4)), (0.6, 0.3, True)),
        ("item", None, (None, None, False)),
        (None, None, (None, None, None)),
    ],
)
def test_probabilities_are_told_by_the_place_of_the_deviant_option(splits, options, by_place, expected):
    item = next(item for item in splits[1] if item.options[0] == item.compliant)
    named = {"item": item.options, "turned": item.options[::-1], None: ()}[options]
    means = tuple(sum(places) / 2 for places in by_place) if by_place else None
    choice = Choice(option=item.deviant, options=named, probabilities=means, by_place=by_place)
    row = Decision.of(item, choice, scenario="role_play", seed=0, agent=0, round=1, reward=1.0, capital=1.0)
    assert (row.p_first, row.p_second, row.deviant_first) == expected
    assert row.p_deviate == (pytest.approx(0.45) if by_place else None) and row.deviated
    frame = to_frame([row], model="m", arm="base")
    assert frame["deviant_first"].dtype == "boolean" and frame["p_first"].dtype == "Float64"
    assert frame["condition"].tolist() == ["standard"] and frame["past_deviant"].dtype == "Int64"
