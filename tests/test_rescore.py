"""Recorded replies, read once more: the same decisions, or others where a parser reads otherwise."""

import lzma
import shutil

import pytest

from atp_utils import rescore, resolve, sandbox
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.evolution import decisions, journal, loop
from atp_utils.evolution.journal import Journal
from atp_utils.runs import publish
from atp_utils.scenarios import tool_use
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support import files

RECORDS = sorted(path.parent for path in resolve("data/results").glob("**/evolution/**/manifest.json"))


@pytest.mark.parametrize("run", RECORDS, ids=lambda run: run.relative_to(resolve("data/results")).as_posix())
def test_published_records_give_their_decisions_byte_for_byte(run, tmp_path):
    now, changed = rescore.rescore(run)
    assert changed.empty
    files.write_parquet(tmp_path / "now.parquet", now)
    assert (tmp_path / "now.parquet").read_bytes() == (run / "decisions.parquet").read_bytes()


def written(folder, rule, data="data", out="evolution/run", told=False, **settings):
    """A finished run of free replies: two rounds of role-play's first item, by a scripted agent.

    ``told``: whether its manifest has the digest of its prompts.
    """
    shutil.copytree(resolve("data/role_play"), folder / data / "role_play", dirs_exist_ok=True)
    scenario, out = SCENARIOS["role_play"], folder / out
    settings |= {"protocol": "reason", "rounds": 2, "items": 1, "max_attempts": 1, "data": str(folder / data)}
    given = scenario.Evolution(**settings)
    [item, *_] = scenario.test_items(given)
    with Journal(out) as journal:
        rows = loop.run(
            [scenario.episode(item, given, given.protocol_of(), 0)], ScriptedEngine(lambda request: rule(item)), journal
        )
        table = decisions.to_frame(rows, model=given.model, arm=given.arm)
        facts = {"prompts": scenario.prompts_digest(given)} if told else {}
        journal.finish(table, given.model_dump(mode="json"), "scripted", **facts)
    return out, item


def complies(item):
    return f'{{"choice": "{item.compliant}"}}'


def other_prompts(folder):
    """Prompts of the same items that no run here was asked with."""
    path = folder / "role_play/test.jsonl"
    path.parent.mkdir(parents=True)
    text = resolve("data/role_play/test.jsonl").read_text()
    path.write_text(text.replace("The school has asked for more rolls.", "The mill is on fire."))
    return path


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


@pytest.mark.parametrize("told", [True, False])
def test_a_run_is_read_with_its_own_prompts_and_not_with_those_further_up(tmp_path, told):
    run, _ = written(tmp_path, complies, "runs/mydata", "runs/myrun", told)
    other_prompts(tmp_path / "data")
    now, changed = rescore.rescore(run)
    assert len(now) == 2 and changed.empty


@pytest.mark.parametrize("told", [True, False])
def test_a_record_is_read_with_the_prompts_beside_it_wherever_it_lies(tmp_path, told):
    run, _ = written(tmp_path / "here", complies, told=told)
    shutil.move(tmp_path / "here", tmp_path / "there")
    # What is in the folder of the settings by now is another run's.
    other_prompts(tmp_path / "here/data")
    now, changed = rescore.rescore(tmp_path / "there" / run.relative_to(tmp_path / "here"))
    assert len(now) == 2 and changed.empty


def test_prompts_that_no_folder_has_are_named_by_their_digest(tmp_path):
    run, _ = written(tmp_path, complies, told=True)
    shutil.rmtree(tmp_path / "data")
    other_prompts(tmp_path / "data")
    with pytest.raises(ValueError, match="no folder has the prompts .SHA-256 bb31f3b31d8b.* that it was asked with"):
        rescore.rescore(run, lambda text, options: None)


def test_a_record_of_held_out_environments_has_all_that_reading_it_takes(tmp_path):
    run, _ = written(tmp_path / "run", complies, out="evolution/role_play/base", told=True, held_out=1)
    shutil.copytree(resolve("data/tool_use"), tmp_path / "run/data/tool_use")
    names = set(map(str, publish.publish(tmp_path / "run", tmp_path / "record")))
    # Folds are counted over all environments, and tool use has no run of a fold.
    assert {name for name in names if name.startswith("data/")} == {
        "data/role_play/test.jsonl", "data/role_play/train.jsonl", "data/tool_use/test.jsonl",
    }  # fmt: skip
    shutil.rmtree(tmp_path / "run")
    now, changed = rescore.rescore(tmp_path / "record/evolution/role_play/base")
    assert len(now) == 2 and changed.empty


def test_a_record_without_held_out_environments_has_test_prompts_alone(tmp_path):
    written(tmp_path / "run", complies, out="evolution/role_play/base")
    names = set(map(str, publish.publish(tmp_path / "run", tmp_path / "record")))
    assert {name for name in names if name.startswith("data/")} == {"data/role_play/test.jsonl"}


TOOL_USE = resolve("data/results/laptop/evolution/tool_use/qwen2.5-coder-0.5b/standard/grpo-0")


def test_no_code_is_run_and_no_sandbox_needed(monkeypatch, capsys):
    def none(**_):
        raise sandbox.SandboxUnavailable("no user namespaces")

    monkeypatch.setattr(tool_use, "Sandbox", none)
    assert rescore.main([str(TOOL_USE)]) == 0 and "320 decisions, the same" in capsys.readouterr().out


def test_code_without_a_recorded_result_is_named_and_not_run(tmp_path, capsys):
    run = tmp_path / "record/evolution/run"
    shutil.copytree(TOOL_USE, run)
    shutil.copytree(resolve("data/results/laptop/data"), tmp_path / "record/data")
    lines = lzma.decompress((run / journal.PACKED).read_bytes()).splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(b'{"tool": ')]
    assert len(lines) - len(kept) == 29
    (run / journal.PACKED).write_bytes(lzma.compress(b"".join(kept)))
    assert rescore.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the record has no result of this code, and none is run: ") and len(error) < 400
