import json
import shutil

import pandas as pd
import pytest

from atp_utils import ROOT, resolve
from atp_utils.analysis import report
from atp_utils.evolution import journal

RESULTS = resolve("data/results")


def test_the_readme_shows_the_recorded_run():
    text = (ROOT / "README.md").read_text()
    for name, table in report.readme_tables(RESULTS).items():
        assert table in text, name


def test_recorded_decisions_have_their_raw_replies():
    for manifest in RESULTS.glob("*/evolution/**/manifest.json"):
        replies = journal.read_record(manifest.parent / journal.PACKED).replies
        decisions = pd.read_parquet(manifest.parent / "decisions.parquet")
        assert len(decisions) and set(decisions["reply"]) <= set(replies)


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete run"):
        report.report(tmp_path)


def test_a_report_on_one_arm_of_one_scenario(tmp_path):
    for arm in ("role_play/smollm2-135m/standard/dpo-0", "collusion/smollm2-135m/standard/base"):
        shutil.copytree(RESULTS / "quick/evolution" / arm, tmp_path / "evolution" / arm)
    text = report.report(tmp_path)
    assert "smollm2-135m base" in text and "smollm2-135m dpo" in text and "tool_use" not in text
    assert text.startswith(report.PRIMARY) and "no control" in text
    assert "P(deviate), deviant option first" in text


def test_costs_say_which_runs_tell_no_time(tmp_path):
    parts = {
        "standard/base": {"seconds": 90, "processor": "Xeon"},
        "standard/dpo-0": {"seconds": 30, "processor": "EPYC"},
        "caught/base": {},
    }
    for name, told in parts.items():
        run = tmp_path / "quick/evolution/role_play/m" / name
        run.mkdir(parents=True)
        pd.DataFrame({"x": [1]}).to_parquet(run / "decisions.parquet")
        facts = {"settings": {"model": "m"}, "counts": {"decisions": 10}}
        (run / "manifest.json").write_text(json.dumps(facts | told))
    [(key, row)] = report.costs(tmp_path).iterrows()
    assert key == ("`make reproduce PROFILE=quick MODEL=m`", "role_play")
    assert row.tolist() == [3, 30, 2, 2.0, "EPYC, Xeon"]
