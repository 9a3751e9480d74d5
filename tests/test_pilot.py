import pandas as pd
import pytest
import yaml
from trainings import a_run

from atp_utils import ROOT, pilot, profiles
from atp_utils.scenarios.registry import SCENARIOS


@pytest.fixture(scope="module")
def table(tiny, tmp_path_factory):
    """The pilot of all scenarios and arms of a tiny random model."""
    profile = yaml.safe_load((ROOT / "tests/profiles/smoke.yaml").read_text()) | {"models": {tiny["qwen3"]: {}}}
    # One method trains an adapter, the other all weights.
    profile["notebooks"]["03_align_grpo"] |= {"lora_rank": 0, "scheduler": "linear"}
    profile["training_seeds"] = {"role_play": [0, 1]}
    path = tmp_path_factory.mktemp("pilot") / "mine.yaml"
    path.write_text(yaml.safe_dump(profile))
    return pilot.pilot(profiles.read_profile(str(path)), path.parent / "scratch")


def test_every_kind_of_job_is_measured_and_its_units_counted(table):
    assert sorted(zip(table["scenario"], table["job"], strict=True)) == sorted(
        (name, job) for name in SCENARIOS for job in ("dpo", "grpo", "evolution")
    )
    counted = table.set_index(["scenario", "job"])[["jobs", "units"]]
    evolutions, trainings = counted.xs("evolution", level="job"), counted.drop("evolution", level="job")
    # Base and two trainings of two methods; three arms.
    assert evolutions["jobs"].to_dict() == {"role_play": 5, "collusion": 3, "tool_use": 3}
    # 4 items x 2 rounds; 7 games x 2 thresholds x 2 agents x 2 rounds; (1 + 2 problems) x 2 rounds.
    assert evolutions["units"].to_dict() == {"role_play": 5 * 8, "collusion": 168, "tool_use": 18}
    # The profile trains for one step.
    trained = {(name, job): 1 + (name == "role_play") for name in SCENARIOS for job in ("dpo", "grpo")}
    assert trainings["jobs"].to_dict() == trainings["units"].to_dict() == trained
    assert (table["seconds"] > 0).all() and (table["hours"] > 0).all() and (table["most_gb"] > 0.05).all()


def test_nothing_that_was_trained_is_left(table, tmp_path_factory):
    [scratch] = tmp_path_factory.getbasetemp().glob("pilot[0-9]*/scratch")
    assert not list(scratch.rglob("*.safetensors"))


def test_a_model_that_writes_no_pair_is_timed_on_the_longest(tiny, splits, tmp_path):
    run = a_run("dpo", tiny["qwen3"], tmp_path, pairs="written", protocol="reason", max_new_tokens=9, thinking=True)
    rows = pilot.longest_rows(run, splits[0][:2])
    assert [row["chosen"] for row in rows] == [" yes" * 9] * 2 and rows[0]["rejected"] == " no" * 9
    assert splits[0][0].prompt in rows[0]["prompt"] and rows[0]["prompt"].endswith("<|im_start|>assistant\n")


def test_the_bill_is_that_of_every_gpu():
    jobs = pd.DataFrame({"hours": [1.5, 10.0], "gpus": [8, 1]})
    assert pilot.bill(jobs, 3.0) == "22.0 GPU hours x $3 = $66"


def test_hours_are_units_times_seconds_and_what_is_done_once():
    found = pilot._extrapolated("step", 100, 18.0, 1800)
    assert found["hours"] == pytest.approx(1.0) and found["units"] == 100
    assert pd.Series(found)["unit"] == "step"


def test_a_profile_that_is_none_is_refused(capsys):
    assert pilot.main(["huge"]) == 2 and "no profile 'huge'" in capsys.readouterr().err
