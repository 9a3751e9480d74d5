"""Who answers a notebook: the choice of engine, and notebook 4 against servers that refuse, die and come back."""

import json
from collections import Counter

import pandas as pd
import pytest
import yaml
from fault_server import KEY, chat, choice, running

from atp_utils import engines, run
from atp_utils.engines import Servers, open_engine, openai_engine
from atp_utils.evolution import journal
from atp_utils.evolution.requests import Reply, Request
from atp_utils.support import folders
from atp_utils.support.manifest import MANIFEST

ITEMS, ROUNDS = 3, 2
NOBODY = "http://127.0.0.1:9/v1"


@pytest.fixture
def start(monkeypatch):
    with running(monkeypatch) as serve:

        def make(rule=lambda body: chat(choice(body["messages"], body["seed"])), names=("toy",)):
            server = serve(rule)
            server.models = {"data": [{"id": name, "root": f"/weights/{name}"} for name in names]}
            return server

        yield make


@pytest.mark.parametrize(
    ("arm", "adapter", "servers", "message"),
    [
        ("base", "runs/a", "", "base takes no adapter"),
        ("dpo", "", "", "dpo and grpo need one, or servers"),
        ("dpo", "runs/a", NOBODY, "together with servers.*--lora-modules role_play-dpo=runs/a"),
        ("grpo", "runs/a", NOBODY, "a whole model: vllm serve runs/a --served-model-name role_play-grpo"),
    ],
)
def test_arm_adapter_and_servers_must_fit(tmp_path, arm, adapter, servers, message):
    with pytest.raises(ValueError, match=message):
        open_engine("toy", "role_play", arm, adapter, servers, tmp_path)
    assert not list(tmp_path.iterdir())


def test_servers_are_addresses_or_a_file(tmp_path):
    assert Servers.of("") is None and Servers.of(f"{NOBODY}, http://h:1/v1/").urls == [NOBODY, "http://h:1/v1"]
    path = tmp_path / "mine.yaml"
    path.write_text(f"urls: [{NOBODY}]\nnames: {{base: b, role_play-dpo: mine}}\nconcurrency: 3\n")
    served = Servers.of(str(path))
    assert served.concurrency == 3 and served.key_variable == ""
    names = [served.name_of("m", "role_play", arm) for arm in ("base", "dpo", "grpo")]
    assert names == ["b", "mine", "role_play-grpo"]
    for wrong, message in (
        ("urls: []", "urls: List should have"),
        ("urls: [localhost:8000]", "expected a server's address, such as http://127.0.0.1:8000/v1"),
        (f"urls: [{NOBODY}]\ntimeout: 0", "timeout"),
        (f"urls: [{NOBODY}]\narms: {{role_play-grpo: [there]}}", "arms.role_play-grpo.0: .*a server's address"),
        (f"urls: [{NOBODY}]\nkey: {KEY}", "key: Extra"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=rf"mine\.yaml: .*{message}") as error:
            Servers.of(str(path))
        assert KEY not in str(error.value)
    with pytest.raises(FileNotFoundError, match="there.yaml"):
        Servers.of("not/there.yaml")


@pytest.mark.parametrize(("arm", "asked"), [("base", "toy"), ("dpo", "role_play-dpo")])
def test_an_arm_is_asked_for_by_name(start, tmp_path, arm, asked):
    server = start(names=[asked, "other"])
    engine = open_engine("toy", "role_play", arm, "", server.url, tmp_path)
    assert (engine.model, engine.identity) == (asked, f"{asked}|root=weights/{asked}|{openai_engine.sent('')}")
    server.models["data"].pop(0)
    with pytest.raises(ValueError, match=f"serves 'other', not '{asked}'"):
        open_engine("toy", "role_play", arm, "", server.url, tmp_path / "new")


def test_an_arm_may_have_servers_of_its_own(start, tmp_path):
    """As a model trained whole has, which is no adapter of the base model; here it is served under its folder."""
    folder = "runs/paper/adapters/role_play/m/grpo-0"
    base, whole = start(names=["toy"]), start(names=[folder])
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"urls: [{base.url}]\narms: {{role_play-grpo: [{whole.url}]}}\nnames: {{role_play-grpo: {folder}}}\n"
    )
    for arm, server in (("base", base), ("grpo", whole)):
        engine = open_engine("toy", "role_play", arm, "", str(path), tmp_path / arm)
        assert [found.url for found in engine._servers] == [server.url]
    assert Servers.of(str(path)).of_arm("collusion", "grpo").urls == [base.url]


def test_a_record_of_the_same_model_is_opened_without_its_servers(start, embedded, tmp_path, monkeypatch):
    servers = start(names=["toy", "other"]).url
    engine = open_engine("toy", "role_play", "base", "", servers, tmp_path)
    with pytest.raises(ConnectionError):  # no reply came of it yet
        open_engine("toy", "role_play", "base", "", NOBODY, tmp_path)
    with journal.Journal(tmp_path) as record:
        record.put(Request("k", [], 0), engine.identity, Reply("x"))
    moved = open_engine("toy", "role_play", "base", "", NOBODY, tmp_path)
    assert moved.identity == engine.identity
    for number, other in enumerate(("names: {base: other}", "tokenizer: smollm2-135m")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"urls: [{NOBODY}]\n{other}\n")
        with pytest.raises(ConnectionError):
            open_engine("toy", "role_play", "base", "", str(path), tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):  # they were asked in another way
        patch.setattr(openai_engine, "sent", lambda tokenizer: "other")
        open_engine("toy", "role_play", "base", "", NOBODY, tmp_path)
    (tmp_path / engines.SERVED).write_text("{")
    with pytest.raises(ValueError, match=r"served\.json: not valid"):
        open_engine("toy", "role_play", "base", "", servers, tmp_path)


def scores(body):
    """An echo with log P = -1 a token, and for the last token of an option what the server makes of all before it."""
    choices = []
    for index, ids in enumerate(body["prompt"]):
        row = [None] + [-1.0] * (len(ids) - 2) + [-(sum(ids) % 7) / 2, -5.0]
        choices.append({"index": index, "finish_reason": "length", "logprobs": {"token_logprobs": row}})
    return {"object": "text_completion", "choices": choices}


def play(folder, capfd, server, **values):
    """Run notebook 4 as the command line does: (exit status, what it printed)."""
    names = {"tokenizer", "key_variable"} & values.keys()
    served = {"urls": [server], "key_variable": "ATP_TEST_KEY", "concurrency": 1} | {n: values.pop(n) for n in names}
    (folder / "servers.yaml").write_text(yaml.safe_dump(served))
    values = {"model": "toy", "servers": str(folder / "servers.yaml")} | values
    values |= {"items": ITEMS, "rounds": ROUNDS, "out": str(folder / "run")}
    given = [word for name, value in values.items() for word in ("-p", name, json.dumps(value).strip('"'))]
    status = run.main(["notebooks/04_evolve_role_play.ipynb", str(folder / "executed.ipynb"), *given])
    output = capfd.readouterr()
    return status, output.out + output.err


WAYS = [
    ("reason", "", "/v1/chat/completions", lambda body: chat(choice(body["messages"], body["seed"])), "stop"),
    ("choose", "smollm2-135m", "/v1/completions", scores, "scored"),
]


@pytest.mark.parametrize(("protocol", "tokenizer", "path", "rule", "reason"), WAYS, ids=[way[-1] for way in WAYS])
def test_a_served_notebook_goes_on_where_its_server_died(
    start, embedded, tmp_path, monkeypatch, capfd, protocol, tokenizer, path, rule, reason
):
    monkeypatch.setenv("ATP_TEST_KEY", KEY)
    ways = {"protocol": protocol, "tokenizer": tokenizer}

    def dies(body):
        if len(server.served) == 3:
            server.broken = "500"
        return rule(body)

    server = start(dies)
    server.key = KEY
    status, first = play(tmp_path, capfd, server.url, **ways)
    assert status == 1 and "ConnectionError" in first and "run again to go on" in first, first
    kept = journal.read_record(tmp_path / "run" / journal.REPLIES).replies
    probes = 1 if tokenizer else 0
    assert len(kept) == len(server.served) - probes == 4 - probes
    assert not (tmp_path / "run" / MANIFEST).exists()

    server.broken, server.rule = None, rule
    assert play(tmp_path, capfd, server.url, **ways)[0] == 0
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    assert manifest["counts"]["replayed"] == len(kept)
    # A forced choice is asked in both orders.
    replies = ITEMS * ROUNDS * (2 if protocol == "choose" else 1)
    assert manifest["counts"]["answered_now"] == replies - len(kept)
    assert manifest["finish_reasons"] == {reason: replies} and manifest["identity"].startswith("toy|root=")
    asked = Counter(json.dumps(body, sort_keys=True) for body in server.served)
    assert sorted(asked.values())[:replies] == [1] * replies
    assert len(server.served) == replies + 2 * probes and {*server.posts} == {path}
    table = pd.read_parquet(tmp_path / "run" / journal.DECISIONS)
    assert len(table) == ITEMS * ROUNDS and table["valid"].all() and not table.duplicated(["item", "round"]).any()
    assert table["p_deviate"].notna().all() == (protocol == "choose")

    # A replay needs no server, no key, and no manifest.
    (tmp_path / "run" / MANIFEST).unlink()
    monkeypatch.delenv("ATP_TEST_KEY")
    assert play(tmp_path, capfd, NOBODY, **ways)[0] == 0
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "run" / journal.DECISIONS), table)
    # No file has the key: journal, manifest, executed notebooks, the failed one's traceback.
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if KEY.encode() in path.read_bytes()]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 8 and not any(KEY.encode() in file.read_bytes() for file in files)


def test_a_served_notebook_is_refused_before_a_token_is_paid_for(start, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WRONG_KEY", KEY[::-1])
    server = start()
    server.key = KEY
    status, output = play(tmp_path, capfd, server.url, key_variable="WRONG_KEY")
    assert status == 1 and "PermissionError" in output and "the key that the variable WRONG_KEY holds" in output
    executed = (tmp_path / "executed.ipynb").read_text()
    assert not any(secret in text for secret in (KEY, KEY[::-1]) for text in (output, executed))
    assert server.posts == [] and {file.name for file in (tmp_path / "run").iterdir()} == {folders.MARKER, ".lock"}


@pytest.mark.parametrize(
    "values",
    [
        {"key_variable": KEY},
        {"servers": f"http://me:{KEY}@127.0.0.1/v1"},
        {"servers": f"me:{KEY}@127.0.0.1"},
        {"servers": f"http://127.0.0.1/v1?key={KEY}"},
    ],
)
def test_a_key_among_the_parameters_is_refused_and_not_repeated(tmp_path, capfd, values):
    status, output = play(tmp_path, capfd, NOBODY, **values)
    assert status == 2 and "servers" in output and KEY not in output
    assert [path.name for path in tmp_path.iterdir()] == ["servers.yaml"]
