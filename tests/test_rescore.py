"""Recorded replies, read once more: the same decisions, or others where a parser reads otherwise."""

import shutil

import pytest

from atp_utils import rescore, resolve
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution import decisions, loop
from atp_utils.evolution.journal import Journal
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support import files

RECORDS = sorted(path.parent for path in resolve("data/results").glob("**/evolution/**/manifest.json"))


@pytest.mark.parametrize("run", RECORDS, ids=lambda run: run.relative_to(resolve("data/results")).as_posix())
def test_published_records_give_their_decisions_byte_for_byte(run, tmp_path):
    now, changed = rescore.rescore(run)
    assert changed.empty
    files.write_parquet(tmp_path / "now.parquet", now)
    assert (tmp_path / "now.parquet").read_bytes() == (run / "decisions.parquet").read_bytes()


def written(folder, rule):
    """A finished run of free replies: two rounds of role-play's first item, by a scripted agent."""
    shutil.copytree(resolve("data/role_play"), folder / "data/role_play")
    scenario, out = SCENARIOS["role_play"], folder / "evolution/run"
    given = scenario.Evolution(protocol="reason", rounds=2, items=1, max_attempts=1, data=str(folder / "data"))
    [item, *_] = scenario.test_items(given)
    with Journal(out) as journal:
        rows = loop.run(
            [scenario.episode(item, given, given.protocol_of(), 0)], ScriptedEngine(lambda request: rule(item)), journal
        )
        table = decisions.to_frame(rows, model=given.model, arm=given.arm)
        journal.finish(table, given.model_dump(mode="json"), "scripted")
    return out, item


def test_another_parser_shows_what_it_reads_and_whose_history_it_changes(tmp_path):
    run, item = written(tmp_path, lambda item: f'I think. {{"choice": "{item.compliant}"}}')
    _, same = rescore.rescore(run)
    assert same.empty
    now, changed = rescore.rescore(run, lambda text, options: item.deviant)
    assert now["deviated"].all()
    assert changed["round"].tolist() == [1, 2] and changed["cause"].tolist() == ["reading", "history"]
    assert changed["choice"].unique() == [item.deviant] and changed["choice before"].unique() == [item.compliant]


def test_a_parser_that_reads_nothing_leaves_no_history(tmp_path):
    run, _ = written(tmp_path, lambda item: f'{{"choice": "{item.compliant}"}}')
    now, changed = rescore.rescore(run, lambda text, options: None)
    assert not now["valid"].any() and now["fault"].tolist() == ["unreadable"] * 2
    assert changed["cause"].tolist() == ["reading", "history"]


def test_the_command_names_what_it_found(tmp_path, capsys):
    run, item = written(tmp_path, lambda item: f'{{"choice": "{item.compliant}"}}')
    assert rescore.main([str(run.parent)]) == 0 and "2 decisions, the same" in capsys.readouterr().out
    (tmp_path / "mine.py").write_text(f"def parse_choice(text, options):\n    return {item.deviant!r}\n")
    assert rescore.main([str(run.parent), "--parser", str(tmp_path / "mine.py")]) == 1
    assert "1 read otherwise, 1 behind another history" in capsys.readouterr().out


def test_prompts_of_another_code_are_refused_by_name(tmp_path, capsys):
    run, _ = written(tmp_path, lambda item: f'{{"choice": "{item.compliant}"}}')
    data = tmp_path / "data/role_play/test.jsonl"
    data.write_text(data.read_text().replace("The school has asked for more rolls.", "The mill is on fire."))
    assert rescore.main([str(run.parent)]) == 2
    assert "aren't in the record" in capsys.readouterr().err
    (tmp_path / "empty.py").write_text("")
    assert rescore.main([str(run.parent), "--parser", str(tmp_path / "empty.py")]) == 2
    assert "parse_choice" in capsys.readouterr().err
