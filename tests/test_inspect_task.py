"""The tasks of Inspect AI, on its mock model and on a server that fails, and what its logs turn into."""

import json
import math
import os
import re
import shutil
import stat
import sys
from pathlib import Path

import anyio
import pandas as pd
import pytest
from click.testing import CliRunner
from fault_server import chat, choice, running

inspect_ai = pytest.importorskip("inspect_ai")

from inspect_ai._cli.main import inspect as command  # noqa: E402
from inspect_ai.model import ModelOutput, ModelUsage, get_model  # noqa: E402
from inspect_ai.model._providers.mockllm import MockLLM  # noqa: E402

from atp_utils import ROOT, inspect_log, inspect_task, rescore, resolve  # noqa: E402
from atp_utils.analysis import report, scoreboard, study, tables  # noqa: E402
from atp_utils.engines.scripted import ScriptedEngine  # noqa: E402
from atp_utils.evolution import journal, loop  # noqa: E402
from atp_utils.evolution.decisions import to_frame  # noqa: E402
from atp_utils.inspect_log import read_inspect, write_run  # noqa: E402
from atp_utils.inspect_task import parameters_of, task_of, tokens  # noqa: E402
from atp_utils.sandbox import Sandbox, SandboxUnavailable  # noqa: E402
from atp_utils.scenarios.registry import SCENARIOS  # noqa: E402

MOCK = "mockllm/model"
SMALL = {
    "role_play": {"items": 4, "rounds": 3, "seeds": [0, 1], "supervision": ["supervised", "unsupervised"]},
    "collusion": {"rounds": 2, "thresholds": [2], "agents": 3, "max_attempts": 2},
    "tool_use": {"rounds": 2, "simple_per_round": 1, "complex_per_round": 2, "agents_per_seed": 2},
}
ANSWER = re.compile(r'\{"choice": "(.*?)"\}')


def output(text, stop_reason="stop", spent=0):
    made = ModelOutput.from_content(MOCK, text, stop_reason)
    # The mock would fetch a tokenizer to count what it wasn't told.
    made.usage = ModelUsage(input_tokens=spent, total_tokens=spent)
    return made


def mock(rule):
    """A model that answers by ``rule(messages, seed)``, messages as ours."""

    def answer(input, tools, tool_choice, config):
        told = rule([{"role": message.role, "content": message.text} for message in input], config.seed)
        return told if isinstance(told, ModelOutput) else output(told)

    return get_model(MOCK, custom_outputs=answer)


def run(folder, task, model, **ways):
    [log] = inspect_ai.eval(task, model=model, display="none", log_dir=str(folder), **ways)
    return log


def wavering(messages, seed):
    """Some option by the seed, one reply in five none; calls the tool, and repeats what it printed."""
    last = messages[-1]["content"]
    if printed := re.match(r"The tool printed:\n(.*)", last):
        return rf"So it is \boxed{{{printed[1]}}}."
    if "Problem:" in last:
        return "<tool>6 * 7</tool>" if seed % 2 else r"I see: \boxed{5}"
    return f"Well, {ANSWER.findall(last)[-1 - seed % 2]}" if seed % 5 == 0 else choice(messages, seed)


def ours(folder, name, given, rule):
    """The table of the same evolution, played by the project's own loop."""
    own = SCENARIOS[name]
    engine = ScriptedEngine(lambda request: rule(request.messages, request.seed % 2**31), f"inspect|{given.model}")
    with journal.Journal(folder) as record:
        with own.episodes(own.test_items(given), given, given.protocol_of(), record) as (episodes, _):
            return to_frame(loop.run(episodes, engine, record), model=given.model, arm=given.arm)


@pytest.fixture
def isolation():
    try:
        with Sandbox(wall_seconds=1):
            pass
    except SandboxUnavailable as why:
        pytest.skip(f"no isolation here: {why}")


@pytest.fixture
def start(monkeypatch):
    with running(monkeypatch) as make:
        yield make


# --- the same episodes, and Inspect's numbers ---------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_decisions_are_those_of_the_projects_own_loop(name, tmp_path, request):
    if name == "tool_use":
        request.getfixturevalue("isolation")
    log = run(tmp_path, task_of(name, **SMALL[name]), mock(wavering))
    given = parameters_of(name, SMALL[name]).model_copy(update={"model": MOCK})
    expected = ours(tmp_path / "ours", name, given, wavering)
    assert expected["valid"].any() and expected["deviated"].nunique() == 2
    pd.testing.assert_frame_equal(read_inspect(log), expected)
    pd.testing.assert_frame_equal(read_inspect(log.location), expected)


def test_errors_are_clustered_by_environment_and_invalid_rounds_are_in_no_rate(tmp_path):
    def rule(messages, seed):
        rule, options = messages[1]["content"].partition("\n")[0], ANSWER.findall(messages[-1]["content"])
        kept = next(option for option in options if option in rule)
        who = messages[0]["content"]
        if "beekeeper" in who:
            return "It depends."
        return f'{{"choice": "{kept if "baker" not in who else next(o for o in options if o != kept)}"}}'

    log = run(tmp_path, task_of("role_play", items=0, rounds=1, max_attempts=1), mock(rule))
    first, valid = log.results.scores
    # Four items an environment: 16 environments, one always deviates, one says nothing. Mean 4/60. Sums of residuals by
    # environment: 56/15 once, 4/15 fourteen times; their squares add to 224/15, times 15/14 is 16, its root over 60.
    assert (first.name, first.scored_samples, first.unscored_samples) == ("round 1", 60, 4)
    assert math.isclose(first.metrics["mean"].value, 1 / 15) and math.isclose(first.metrics["stderr"].value, 1 / 15)
    assert valid.name == "valid" and valid.metrics["mean"].value == 60 / 64
    table = read_inspect(log)
    assert table["deviated"].sum() == 4 and (~table["valid"]).sum() == 4
    assert set(table.loc[~table["valid"], "environment"]) == {"beekeeper"}


def test_agents_of_a_game_are_asked_at_once(tmp_path):
    waiting, all_there = [], anyio.Event()

    async def answer(input, tools, tool_choice, config):
        waiting.append(config.seed)
        if len(waiting) == 8:
            all_there.set()
        with anyio.fail_after(60):
            await all_there.wait()
        return output(choice([{"content": message.text} for message in input], config.seed))

    model = get_model(MOCK, custom_outputs=answer)
    log = run(tmp_path, task_of("collusion", rounds=1), model, limit=1)
    assert log.status == "success" and len(set(waiting)) == 8 and len(read_inspect(log)) == 8


def test_rounds_can_be_read_in_the_log(tmp_path):
    log = run(tmp_path, task_of("role_play", items=1, rounds=2), mock(choice))
    [sample] = log.samples
    steps = [event.name for event in sample.events if event.event == "span_begin" and event.type == "step"]
    assert steps == ["round1 attempt0", "round2 attempt0"]
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    score = sample.scores["deviation"]
    assert score.answer == ", ".join(read_inspect(log)["choice"]) and score.explanation.count("\n") == 3


# --- what isn't taken ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"protocol": "choose"}, "needs the options' probabilities"),
        ({"model": "openai/x"}, "model is no parameter of the task"),
        ({"round": 3}, "no parameter 'round'"),
        ({"items": "many"}, "parameter items"),
        ({"condition": "bribed"}, "parameter condition"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_asked(values, message):
    with pytest.raises(ValueError, match=message):
        inspect_task.role_play(**values)


def test_epochs_would_repeat_the_same_seeds(tmp_path):
    log = run(tmp_path, task_of("role_play", items=1, rounds=1), mock(choice), epochs=2)
    assert log.status == "error" and "seeds=[0,1]" in log.error.message
    with pytest.raises(ValueError, match="status 'error'"):
        read_inspect(log)


# --- faults: no decision that nobody took -------------------------------------------------------------------


def completion(body):
    """A server's answer: some option, with the fields that Inspect wants too."""
    facts = {"id": "1", "model": "toy", "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}
    return chat(choice(body["messages"], body["seed"])) | facts


def served(monkeypatch, server):
    monkeypatch.setenv("FAULT_BASE_URL", server.url)
    monkeypatch.setenv("FAULT_API_KEY", "none")
    # Inspect would take the model of the test before, with its server's address.
    return get_model("openai-api/fault/toy", memoize=False)


def test_a_server_is_asked_for_what_inspect_was_told(start, monkeypatch, tmp_path):
    server = start(completion)
    task = task_of("role_play", items=4, rounds=2, top_p=0.9)
    log = run(tmp_path, task, served(monkeypatch, server), temperature=0.25)
    given = parameters_of("role_play", {"items": 4, "rounds": 2, "top_p": 0.9, "temperature": 0.25})
    given = given.model_copy(update={"model": "openai-api/fault/toy"})
    expected = ours(tmp_path / "ours", "role_play", given, choice)
    pd.testing.assert_frame_equal(
        read_inspect(log), expected.assign(prompt_tokens=7, completion_tokens=2), check_dtype=False
    )
    assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in server.served} == {(0.25, 0.9, 2048)}
    assert all("top_k" not in body for body in server.served)


def test_a_provider_that_refuses_ends_the_sample(start, monkeypatch, tmp_path):
    server = start(completion)
    server.broken = "401"
    log = run(tmp_path, task_of("role_play", items=4, rounds=2), served(monkeypatch, server))
    assert log.status == "error" and any(sample.error for sample in log.samples)
    assert not any("decisions" in sample.store or sample.scores for sample in log.samples)
    with pytest.raises(ValueError, match="eval-retry"):
        read_inspect(log)


def test_a_retry_pays_for_what_is_missing_only(start, monkeypatch, tmp_path):
    def rule(body):
        asked.append(body["seed"])
        return {"status": 400, "error": {"message": "no"}} if len(asked) == 4 else completion(body)

    asked, server = [], start(rule)
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    ways = {"task_args": {"items": 1, "rounds": 6}, "cache": True}
    log = run(tmp_path, "atp_utils/inspect_task.py@role_play", served(monkeypatch, server), **ways)
    assert log.status == "error" and len(server.served) == 3
    [log] = inspect_ai.eval_retry(log.location, display="none", log_dir=str(tmp_path))
    assert log.status == "success" and len(server.served) == 6 and len(read_inspect(log)) == 6


def test_a_chat_that_is_too_long_is_invalid_whatever_the_error_says(start, monkeypatch, tmp_path):
    def rule(body):
        said = choice(body["messages"], body["seed"])
        told = {"code": "context_length_exceeded", "message": f"maximum context length exceeded: {said}"}
        return completion(body) if len(body["messages"]) == 2 else {"status": 400, "error": told}

    server = start(rule)
    table = read_inspect(run(tmp_path, task_of("role_play", items=2, rounds=3), served(monkeypatch, server)))
    assert table["fault"].fillna("").tolist() == ["", "context", "context"] * 2
    assert table["attempts"].tolist() == [1] * 6 and table["deviated"].isna().sum() == 4


@pytest.mark.parametrize("name", SMALL)
def test_a_filtered_reply_decides_nothing(name, tmp_path, request):
    if name == "tool_use":
        request.getfixturevalue("isolation")
    model = mock(
        lambda messages, seed: output(choice(messages, seed) if name != "tool_use" else "No.", "content_filter")
    )
    table = read_inspect(run(tmp_path, task_of(name, **SMALL[name]), model))
    assert not table["valid"].any() and table["deviated"].isna().all() and table["reward"].isna().all()
    assert set(table["attempts"]) == {parameters_of(name, SMALL[name]).max_attempts}


def test_an_episode_that_a_limit_ended_has_no_decisions(tmp_path):
    model = mock(
        lambda messages, seed: output(choice(messages, seed), spent=10 if "baker" in messages[0]["content"] else 1)
    )
    log = run(tmp_path, task_of("role_play", items=4, rounds=3), model, token_limit=15)
    [cut] = [sample for sample in log.samples if sample.limit]
    assert cut.id.startswith("baker") and math.isnan(cut.scores["deviation"].value)
    table = read_inspect(log)
    assert len(table) == 9 and "baker" not in set(table["environment"])
    out = write_run(log, tmp_path / "run")
    facts = json.loads((out / "manifest.json").read_text())["inspect"]
    assert (facts["samples"], facts["samples without decisions"]) == (3, 1)


# --- the tool -----------------------------------------------------------------------------------------------

TOOL = {"rounds": 1, "simple_per_round": 1, "complex_per_round": 1}


def caller(messages, seed):
    printed = re.match(r"The tool printed:\n(.*)", messages[-1]["content"])
    return rf"\boxed{{{printed[1]}}}" if printed else "<tool>\nx = sympy.Integer(6)\nprint(np.int64(1))\nx * 7\n</tool>"


def test_code_runs_in_the_sandbox_that_inspect_has(isolation, tmp_path, monkeypatch):
    given = parameters_of("tool_use", TOOL).model_copy(update={"model": MOCK})
    expected = ours(tmp_path / "ours", "tool_use", given, caller)

    def unused(*_):
        raise AssertionError("our sandbox was started")

    monkeypatch.setattr(Sandbox, "__enter__", unused)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    table = read_inspect(run(tmp_path, task_of("tool_use", **TOOL), mock(caller), sandbox="local"))
    assert table["tool_used"].all()
    pd.testing.assert_frame_equal(table, expected)


def test_a_sandbox_that_cannot_run_the_tool_is_an_error_and_no_result(tmp_path, monkeypatch):
    (tmp_path / "python3").write_text("#!/bin/sh\necho no sympy >&2\nexit 1\n")
    (tmp_path / "python3").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    log = run(tmp_path, task_of("tool_use", **TOOL), mock(caller), sandbox="local")
    assert log.status == "error" and "can't run the tool" in log.error.message and "no sympy" in log.error.message


# --- the command, and from its log to a run -----------------------------------------------------------------


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """The log of `inspect eval` on the mock model, which always says Willow."""

    async def counted(self, output, *_):
        output.usage = ModelUsage()

    monkeypatch.setattr(MockLLM, "_ensure_default_usage", counted)
    monkeypatch.setattr(MockLLM, "default_output", 'I take it. {"choice": "Willow"}')
    monkeypatch.chdir(ROOT)
    shutil.copytree(resolve("data/role_play"), tmp_path / "data/role_play")
    asked = ["eval", "atp_utils/inspect_task.py@role_play", "--model", MOCK, "--log-dir", str(tmp_path / "logs")]
    asked += [
        "-T",
        "items=4",
        "-T",
        "rounds=2",
        "-T",
        "seeds=[0,1]",
        "-T",
        "condition=caught",
        "-T",
        f"data={tmp_path}/data",
    ]
    done = CliRunner().invoke(command, [*asked, "--max-tokens", "99", "--display", "plain"])
    assert done.exit_code == 0, done.output
    [log] = (tmp_path / "logs").iterdir()
    return log


def test_a_log_becomes_a_run_beside_others(logged, tmp_path, capsys):
    table, out = read_inspect(logged), tmp_path / "results/evolution/mock"
    named = table["item"].str.startswith("baker")
    # Only the baker may choose Willow; the others' replies are unreadable.
    assert len(table) == 16 and named.any() and (table["valid"] == named).all() and set(table["seed"]) == {0, 1}
    assert inspect_log.main([str(logged), str(out)]) == 0
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["settings"]["model"] == MOCK and facts["settings"]["max_new_tokens"] == 99
    assert facts["inspect"]["options"] == {"max_tokens": 99, "temperature": 1.0}
    pd.testing.assert_frame_equal(pd.read_parquet(out / "decisions.parquet"), table)
    assert rescore.main([str(out)]) == 0 and "16 decisions, the same" in capsys.readouterr().out
    shutil.copytree(resolve("data/results/quick/evolution/role_play/smollm2-135m/standard/base"), out.with_name("base"))
    both = journal.with_words(journal.read_decisions(tmp_path / "results"), tmp_path / "results")
    assert (
        set(both["model"]) == {MOCK, "smollm2-135m"} and both["words"].str.startswith("I take it.").sum() == named.sum()
    )
    assert MOCK in report.report(tmp_path / "results")
    assert len(scoreboard.shown(scoreboard.scores(both))) and len(tables.answers(study.answers(both)))


def test_a_run_is_written_once_more_and_no_other_over_it(logged, tmp_path, capsys):
    out = tmp_path / "run"
    before = [write_run(logged, out) and (out / name).read_bytes() for name in (journal.REPLIES, journal.DECISIONS)]
    assert before == [
        write_run(logged, out) and (out / name).read_bytes() for name in (journal.REPLIES, journal.DECISIONS)
    ]
    other = run(tmp_path / "other", task_of("role_play", items=1, rounds=1), mock(choice))
    assert inspect_log.main([other.location, str(out)]) == 2 and "holds something else" in capsys.readouterr().err
    assert inspect_log.main([str(tmp_path / "none.eval"), str(out)]) == 2 and "none.eval" in capsys.readouterr().err


def test_a_log_of_another_task_is_refused(tmp_path):
    task = inspect_ai.Task([inspect_ai.dataset.Sample("Hello")])
    with pytest.raises(ValueError, match="no episode of ours"):
        read_inspect(run(tmp_path, task, mock(lambda *_: "Hello")))


# --- what it costs ------------------------------------------------------------------------------------------


def test_tokens_are_counted_from_the_chats_that_would_be_asked(capsys):
    given = parameters_of("role_play", {"items": 2, "rounds": 1, "max_new_tokens": 160})
    table = tokens("role_play", given)
    chats = [sample.input for sample in task_of("role_play", items=2, rounds=1).dataset]
    asked = sum(sum(len(message.text) for message in chat) // 4 + 5 * len(chat) for chat in chats)
    assert table["reply"].tolist() == [10, 40, 160] and table["requests"].tolist() == [2] * 3
    assert table["input"].tolist() == [asked] * 3 and table["output"].tolist() == [20, 80, 320]
    # Later rounds carry the replies before: two replies of 40 tokens more than those of 160 have of 10.
    longer = tokens("role_play", given.model_copy(update={"rounds": 2}))
    assert longer["requests"].tolist() == [4] * 3
    assert longer["input"].diff().tolist()[1:] == [2 * 30, 2 * 120]
    assert inspect_task.main(["role_play", "-p", "items", "2", "-p", "rounds", "1", "-p", "max_new_tokens", "160"]) == 0
    assert f" 160         2    {asked}" in capsys.readouterr().out
    assert inspect_task.main(["role_play", "-p", "protocol", "choose"]) == 2


@pytest.mark.parametrize(("name", "requests"), [("collusion", 7 * 8 * 3), ("tool_use", 4 * 6 * 2)])
def test_every_agent_and_every_call_is_counted(name, requests):
    assert tokens(name, parameters_of(name, {}))["requests"].tolist() == [requests] * 3
