"""What a manifest says of a run, and that runs which disagree in what must agree stand in no figure together."""

import hashlib
import json
import re
import shutil

import pandas as pd
import pytest

from atp_utils import models, resolve
from atp_utils.analysis import gallery
from atp_utils.evolution import journal, loop
from atp_utils.evolution.protocol import Protocol, Question, decide
from atp_utils.evolution.requests import Reply
from atp_utils.parameters import model_of
from atp_utils.runs import evolving

RECORD = resolve("data/results/quick/evolution")


@pytest.fixture
def runs(tmp_path):
    """Role-play's recorded runs, of which a test may change manifests."""
    shutil.copytree(RECORD / "role_play", tmp_path / "role_play")
    return tmp_path


def change(run, settings=(), **facts):
    path = run / "manifest.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | facts | {"settings": known["settings"] | dict(settings)}))


STANDARD, OTHER = "role_play/smollm2-135m/standard/dpo-0", "role_play/smollm2-135m/forced_history/dpo-0"


def test_the_record_agrees_and_every_decision_has_its_run():
    decisions = journal.read_decisions(resolve("data/results"))
    assert decisions["run"].nunique() == len(journal.complete_runs(resolve("data/results"))) > 9
    assert decisions.groupby("run")[journal.RUN].nunique().eq(1).all(axis=None)


@pytest.mark.parametrize(
    ("run", "settings", "named"),
    [
        (STANDARD, {"protocol": "reason"}, "protocol"),
        (STANDARD, {"rounds": 9}, "rounds"),
        (OTHER, {"rounds": 9}, "rounds"),
        (STANDARD, {"history_window": 2}, "history_window"),
        (STANDARD, {"temperature": 0.5}, "temperature"),
        (OTHER, {"ratios": [1, 9]}, "ratios"),
    ],
)
def test_settings_that_disagree_are_named_with_both_runs(runs, run, settings, named):
    change(runs / run, settings)
    with pytest.raises(ValueError, match=rf"\S+ and \S+ can't stand in one figure: {named} is .* in the other"):
        journal.read_decisions(runs)


def test_weights_templates_and_prompts_must_agree(runs):
    known = json.loads((runs / STANDARD / "manifest.json").read_text())["identity"].split("|")
    for place, name in ((1, "weights"), (3, "chat template")):
        change(runs / STANDARD, identity="|".join([*known[:place], "0" * 16, *known[place + 1 :]]))
        with pytest.raises(ValueError, match=f"{name} is"):
            journal.read_decisions(runs)
    other = runs / STANDARD.replace("dpo-0", "base")
    change(other, prompts=None)  # as older manifests, which don't say
    change(runs / STANDARD, identity="|".join(known), prompts="a" * 64)
    journal.read_decisions(runs)
    change(other, prompts="b" * 64)
    with pytest.raises(ValueError, match="prompts is"):
        journal.read_decisions(runs)


@pytest.mark.parametrize("settings", [{"seeds": [0, 1]}, {"items": 4}, {"dtype": "float32"}, {"data": "elsewhere"}])
def test_sizes_and_places_may_differ(runs, settings):
    change(runs / STANDARD, settings)
    journal.read_decisions(runs)


def test_what_a_condition_has_for_itself_counts_in_it_alone(runs):
    for policy in ("base", "dpo-0"):
        change(runs / OTHER.replace("dpo-0", policy), {"forced_rounds": 1})
    journal.read_decisions(runs)


def test_a_figure_names_its_runs(runs, tmp_path):
    decisions = journal.read_decisions(runs)
    drawn = gallery.draw(decisions, "role_play", tmp_path / "figures")
    svg = (tmp_path / "figures/role_play_smollm2-135m.svg").read_text()
    assert len(drawn) == 2
    assert STANDARD in svg and OTHER not in svg
    assert gallery.source_of(pd.DataFrame({"run": ["b", "a", "b"]})) == " From the runs a, b."
    assert gallery.source_of(pd.DataFrame({"x": [1]})) == ""


def test_a_manifest_says_all_that_made_a_run(tiny, tmp_path):
    given = {"model": tiny["qwen3"], "items": 2, "rounds": 2, "seeds": [3], "out": str(tmp_path / "run")}
    table = evolving.begin("role_play", given).play()
    facts = journal.facts_of(tmp_path / "run").model_dump()
    made = facts["made_of"]
    assert all(re.fullmatch("[0-9a-f]{64}", made[name]) for name in ("weights", "template", "code"))
    assert made["precision"] in ("float32", "bfloat16") and made["precision"] in facts["identity"]
    assert facts["identity"] == f"{models.short({k: made[k] for k in made if k != 'code'})}|code={made['code'][:16]}"
    assert facts["settings"]["seeds"] == [3] and len(facts["settings"]) == len(
        model_of("04_evolve_role_play").model_fields
    )
    assert facts["prompts"] == hashlib.sha256(resolve("data/role_play/test.jsonl").read_bytes()).hexdigest()
    counts, tokens = facts["counts"], facts["tokens"]
    assert (counts["decisions"], counts["valid"], counts["invalid"], counts["retried"], counts["cut"]) == (
        4,
        4,
        0,
        0,
        0,
    )
    assert tokens == {"prompts": table["prompt_tokens"].sum(), "replies": table["completion_tokens"].sum()}
    assert facts["mass"] == pytest.approx({"mean": table["mass"].mean(), "least": table["mass"].min()})
    assert {"torch", "numpy", "transformers", "pandas"} <= facts["packages"].keys()
    assert facts["memory_gib"] > 0 and facts["cores"] > 0 and isinstance(facts["gpus"], list) and facts["python"]
    assert facts["started"] <= facts["finished"] and facts["seconds"] >= 0 and "commit" in facts


def test_retries_and_replies_that_were_cut_are_counted(tmp_path):
    """Of two decisions one is read at the second attempt, the other is cut off in both."""
    texts = iter(["?", '{"choice": "A"}'])

    class Writer:
        identity = "writer"

        def answer(self, requests):
            for index, request in enumerate(requests):
                cut = "cut" in request.key
                yield index, Reply("so" if cut else next(texts), 5, 2, "length" if cut else "stop")

    def episode(name):
        asked = Question((name,), ({"role": "user", "content": name},), ("A", "B"))
        return (yield from decide([asked], Protocol("reason", max_attempts=2)))

    with journal.Journal(tmp_path) as record:
        choices = [choice for [choice] in loop.run_all([episode("read"), episode("cut")], Writer(), record)]
        rows = [
            {"valid": c.option is not None, "attempts": c.attempts, "mass": c.mass, "fault": c.fault} for c in choices
        ]
        record.finish(pd.DataFrame(rows).astype({"fault": "string"}), {}, "writer")
    facts = json.loads((tmp_path / "manifest.json").read_text())
    expected = {
        "decisions": 2,
        "valid": 1,
        "invalid": 1,
        "retried": 2,
        "cut": 2,
        "replies_used": 4,
        "faults": {"cut": 1},
    }
    assert expected.items() <= facts["counts"].items()
    assert facts["tokens"] == {"prompts": 20, "replies": 8} and facts["mass"] is None
