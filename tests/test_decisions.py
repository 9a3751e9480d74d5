import pandas as pd

from atp_utils.evolution.decisions import Decision, to_frame


def test_missing_values_stay_apart_from_false_and_zero():
    row = Decision(
        scenario="role_play", seed=0, item="i", environment="e", agent=0, round=1, choice=None, deviated=None,
        valid=False, attempts=3, reward=None, capital=0, prompt_tokens=1, completion_tokens=2, reply="d",
        replies="d",
    )  # fmt: skip
    frame = to_frame([row], model="m", arm="base")
    assert list(frame.columns[:3]) == ["model", "arm", "scenario"]
    assert frame["deviated"].isna().all() and frame["deviated"].dtype == "boolean"
    assert pd.isna(frame["reward"].iloc[0]) and not frame["valid"].iloc[0]
    assert len(to_frame([], model="m", arm="base")) == 0
