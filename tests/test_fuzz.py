"""Whatever a model, a server or a file says: the documented errors and no others, in bounded time.

Each case has a short form here and a long one in `make soak` (the hypothesis profile of that name).
"""

import json
import lzma
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai._models import construct_type
from openai.types import Completion
from openai.types.chat import ChatCompletion

from atp_utils import parameters, profiles, resolve
from atp_utils.analysis import page
from atp_utils.engines import Servers, openai_wire
from atp_utils.engines.openai_servers import MALFORMED
from atp_utils.evolution import journal, parsing
from atp_utils.evolution.record import Record, pack
from atp_utils.evolution.requests import Reply, Request, Sampling
from atp_utils.problems import answers
from atp_utils.runs import adapters
from atp_utils.scenarios.role_play.items import Item
from atp_utils.scenarios.tool_use import calls
from atp_utils.support import files, folders
from atp_utils.support.text import inert

OPTIONS = ("Green Gate", "Red Gate")
QUICK = resolve("profiles/quick.yaml").read_text(encoding="utf-8")
RECORD = resolve("data/results/quick/evolution/tool_use/smollm2-135m/standard/base")
ITEMS = resolve("data/role_play/test.jsonl")

ANY = st.text(st.characters(exclude_categories=()), max_size=12)  # lone surrogates and control characters too
MARKS = """{"choice": " } { \\ \\" , [ ] "A" "Green Gate" <think> </think> [THINK] <|channel|> final<|message|>
<channel|> <tool> </tool> <tool ```python <|im_end|> <| |> < > \\boxed{ \\boxed 10^ \\frac{1}{ #### answer\\ is Answer:
1,000 -3/4 % $ ** = 5 or \u200b \ud83d ◁think▷ </s> <a:think> … .. \x1b[2J \x00 \u2028 ９ ² {,} \\text{""".split(" ")
REPLY = st.lists(st.sampled_from(MARKS) | ANY, max_size=30).map("".join)
WORDS = """models: arms: scenarios: notebooks: - : [ ] { } & * &a *a << ! !!int !!float !!timestamp !!bool !!binary
!!python/object:os.system ? | > # ' " % @ 0_ 0b ._ 1:30 2001-99-99 .inf 9e999 ~ base role_play rounds
04_evolve_role_play""".split()
SPACES = ["\n", "\n  ", "\n    ", " ", "\t", "\x00", "99999999999" * 500]
YAML = st.lists(st.sampled_from(WORDS) | st.sampled_from(SPACES) | ANY, max_size=25).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([-(10**400), 1e999, "x", "stop"]) | ANY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3),
    max_leaves=6,
)


def edited(text: str) -> st.SearchStrategy[bytes]:
    """``text`` with a piece taken out and something put in its place."""
    whole = text.encode()
    cut = st.tuples(st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=8) | YAML.map(_bytes))
    return cut.map(lambda it: whole[: it[0]] + it[2] + whole[it[0] + it[1] :])


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def replaced(entry: dict) -> st.SearchStrategy[dict]:
    """``entry`` with another value in the place of one, at any depth."""
    names = list(entry)

    def at(name):
        inner = entry[name]
        other = replaced(inner) | JSON if isinstance(inner, dict) and inner else JSON
        return other.map(lambda value: entry | {name: value})

    return st.sampled_from(names).flatmap(at) | st.sampled_from(names).map(
        lambda name: {key: value for key, value in entry.items() if key != name}
    )


# --- What is checked ---------------------------------------------------------------------------------------


def reads_a_reply(text, _):
    assert parsing.parse_choice(text, OPTIONS) in (*OPTIONS, None)
    parsing.split_thinking(text), parsing.prompted_thinking(text)
    call = calls.read_call(text)
    assert call.code is None or call.code.strip()
    for number in (answers.extract_answer(text), answers.parse_number(text), calls.read_answer(text, True)):
        assert number is None or abs(number) >= 0
    safe = parsing.defuse(text)
    assert parsing.defuse(safe) == safe and safe.replace("\u200b", "") == text.replace("\u200b", "")
    assert not parsing.control(frozenset()).search(safe)
    shown = inert(text)
    assert (
        inert(shown) == shown
        and all(char.isprintable() or char in "\n\t" or char.isspace() for char in shown)
        or ("\x1b" not in shown and "\x00" not in shown)
    )
    tally = calls.Tally()
    tally.note("simple", "event", text)
    assert json.dumps(tally.rows())


def reads_a_command_line(text, _):
    for name in ("rounds", "seeds", "model", "thinking"):
        parameters.from_text("04_evolve_role_play", name, text)


def names_a_folder(text, folder):
    try:
        name = files.as_folder(text)
    except ValueError:
        return
    assert (folder / name).parent == folder and (folder / name).resolve().parent == folder.resolve()
    (folder / name).mkdir(exist_ok=True)
    assert (folder / name).is_dir()
    place = adapters.folder(text, text, "dpo", 0, folder)
    assert place.is_relative_to(folder) and ".." not in place.parts


def names_servers(text, _):
    try:
        Servers.of(text)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)


def reads_yaml(content, folder):
    path = folder / "profile.yaml"
    path.write_bytes(content)
    for read in (lambda: profiles.read_profile(str(path)), lambda: files.read_yaml(path, dict[str, str])):
        try:
            read()
        except ValueError as error:
            assert "profile.yaml" in str(error) and len(str(error)) < 20_000


def reads_items(content, folder):
    path = folder / "test.jsonl"
    path.write_bytes(content)
    try:
        files.read_jsonl(path, Item)
    except ValueError as error:
        assert "test.jsonl, line" in str(error)


def reads_a_journal(lines, folder):
    path = folder / journal.REPLIES
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    try:
        record = journal.read_record(path)
    except ValueError as error:
        assert f"{journal.REPLIES}, line" in str(error)
        return
    for digest in record.replies:
        try:
            assert isinstance(record.request(digest), Request)
        except ValueError as error:
            assert "reply" in str(error)


def reads_a_packed_journal(content, folder):
    path = folder / journal.PACKED
    path.write_bytes(content)
    try:
        journal.read_record(path)
    except ValueError as error:
        assert journal.REPLIES in str(error)


def reads_a_manifest(content, folder):
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / journal.DECISIONS).write_bytes((RECORD / journal.DECISIONS).read_bytes())
    (run / "manifest.json").write_bytes(content)
    try:
        list(page._runs(folder))
        adapters.published("m", "s", "dpo", 0, {}, {}, folder)
    except ValueError as error:
        assert "manifest.json" in str(error)
    (run / "manifest.json").rename(run / folders.MARKER)
    try:
        folders.holds(run)
    except ValueError as error:
        assert folders.MARKER in str(error)


def reads_a_table(content, folder):
    (folder / "manifest.json").write_text("{}")
    (folder / journal.DECISIONS).write_bytes(content)
    try:
        journal.read_decisions(folder)
    except ValueError as error:
        assert journal.DECISIONS in str(error)


def reads_a_server(told, folder):
    for kind, read in (
        (ChatCompletion, lambda answer: openai_wire.chat_reply(Request("k", (), 0), answer)),
        (ChatCompletion, lambda answer: openai_wire.chat_reply(Request("k", (), 0, ('{"choice": "A"}', "B")), answer)),
        (Completion, lambda answer: openai_wire.echoed_reply([1], [[2, 3], [2, 4]], answer)),
    ):
        try:
            reply = read(construct_type(type_=kind, value=told))
        except (*MALFORMED, NotImplementedError):
            continue
        # What is taken is kept, and can be read again.
        line = json.dumps({**vars(reply), "digest": "d", "key": "k"}).encode()
        record = Record()
        record.add(line)
        assert isinstance(record.replies["d"], Reply)


CHAT = {
    "choices": [{"finish_reason": "stop", "message": {"content": '{"choice": "A"}', "reasoning": "hm"}, "logprobs": {
        "content": [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "B", "logprob": -2.0}]}]}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2}, "model": "m",
}  # fmt: skip
ECHO = {"choices": [{"index": i, "logprobs": {"token_logprobs": [None, -1.0, -2.0]}} for i in (0, 1)]}


def answered(told):
    """``told`` with another value somewhere; `replaced` goes into dictionaries alone, so the choices become one."""
    count, parts = len(told["choices"]), {str(i): entry for i, entry in enumerate(told["choices"])}
    other = replaced({"usage": told.get("usage", {"x": 1}), "model": "m", **parts})
    return other.map(lambda it: {**it, "choices": [it.get(str(place)) for place in range(count)]})


def _journal() -> tuple[list[bytes], bytes]:
    """The lines of a journal, two rounds of the record and a tool's result, and the same packed."""
    record = journal.read_record(RECORD / journal.PACKED)
    with tempfile.TemporaryDirectory() as folder, journal.Journal(Path(folder)) as kept:
        for digest in list(record.replies)[:2]:
            asked = record.request(digest)
            kept.put(replace(asked, options=(), sampling=Sampling()), "weights", record.replies[digest])
        kept.result("k", "1", lambda: {"status": "ok"})
        return kept.path.read_bytes().splitlines(), pack(kept.path, "weights")


def like(lines: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of the lines of JSON, as it is or with another value somewhere."""
    changed = st.sampled_from(lines).flatmap(lambda line: replaced(json.loads(line)))
    return st.sampled_from(lines) | changed.map(lambda entry: json.dumps(entry).encode())


LINES, PACKED = _journal()
LINE = like(LINES)
LINE |= JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30) | st.just(b"[" * 100_000)
MANIFEST = json.loads((RECORD / "manifest.json").read_text())
SHORT_LINE = like(lzma.decompress(PACKED).splitlines())
TABLE = (RECORD / journal.DECISIONS).read_bytes()


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """``content`` cut off, or with some bytes changed."""
    cut = st.integers(0, len(content)).map(lambda end: content[:end])
    changed = st.tuples(st.integers(0, len(content)), st.binary(min_size=1, max_size=8))
    return (
        cut | changed.map(lambda it: content[: it[0]] + it[1] + content[it[0] + len(it[1]) :]) | st.binary(max_size=99)
    )


CASES = {
    "reply": (REPLY, reads_a_reply),
    "command line": (YAML | JSON.map(json.dumps) | st.just("[" * 100_000) | st.just("1" * 5000), reads_a_command_line),
    "folder's name": (ANY | st.sampled_from(["..", "../..", "/", "a/../b", "x" * 300, "C:\\x"]), names_a_folder),
    "servers": (YAML | ANY.map("http://{}".format) | ANY.map("http://a/{}, http://b".format), names_servers),
    "profile": (edited(QUICK) | YAML.map(_bytes) | st.binary(max_size=40), reads_yaml),
    "items": (edited(ITEMS.read_text().splitlines()[0]) | st.binary(max_size=40), reads_items),
    "journal": (st.lists(LINE, max_size=8), reads_a_journal),
    "packed journal": (damaged(PACKED), reads_a_packed_journal),
    "packed journal's lines": (
        st.lists(SHORT_LINE | LINE, max_size=8).map(lambda lines: lzma.compress(b"\n".join(lines) + b"\n")),
        reads_a_packed_journal,
    ),
    "manifest": (
        replaced(MANIFEST).map(lambda facts: json.dumps(facts).encode())
        | JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30) | st.just(b"[" * 100_000),
        reads_a_manifest,
    ),
    "table": (damaged(TABLE), reads_a_table),
    "server": (JSON | answered(CHAT) | answered(ECHO), reads_a_server),
}  # fmt: skip


def fuzz(name: str, examples: int, folder: Path) -> None:
    strategy, check = CASES[name]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def each(value):
        check(value, folder)

    each()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CASES)
def test_only_documented_errors(name, tmp_path):
    fuzz(name, 60, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_only_documented_errors_at_length(name, tmp_path, record_property):
    examples = settings.get_profile("soak").max_examples
    fuzz(name, examples, tmp_path)
    record_property("examples", examples)


# --- A megabyte --------------------------------------------------------------------------------------------

SIZE = 10**6


def megabytes(seed: int, count: int) -> list[str]:
    """Texts of a megabyte: one mark again and again, a few in turn, nested ones, and many at random."""
    rng = random.Random(seed)
    groups = [[mark] for mark in MARKS if mark.strip()] + [
        rng.choices(MARKS, k=rng.randint(2, 5)) for _ in range(count)
    ]
    texts = [("".join(group) or " ") for group in groups]
    texts = [(text * (SIZE // len(text) + 1))[:SIZE] for text in texts]
    pairs = [("<tool>", "</tool>"), ("\\boxed{", "}"), ("<think>", "</think>"), ("<|", "|>"), ("{", "}"), ("[", "]")]
    texts += [left * (SIZE // 2 // len(left)) + right * (SIZE // 2 // len(right)) for left, right in pairs]
    texts.append("".join(rng.choices(MARKS, k=SIZE // 6))[:SIZE])
    return rng.sample(texts, min(count, len(texts)))


READERS = {
    "choice": lambda text: parsing.parse_choice(text, OPTIONS),
    "thinking": parsing.split_thinking,
    "control tokens": parsing.defuse,
    "tool call": calls.read_call,
    "answer": answers.extract_answer,
    "cut answer": lambda text: calls.read_answer(text, True),
    "number": answers.parse_number,
    "inert": inert,
    "command line": lambda text: parameters.from_text("04_evolve_role_play", "seeds", text),
}


def slowest(texts: list[str]) -> dict[str, float]:
    """The longest processor seconds of each reader on any of the texts."""
    found = dict.fromkeys(READERS, 0.0)
    for text in texts:
        for name, read in READERS.items():
            begin = time.process_time()
            read(text)
            found[name] = max(found[name], time.process_time() - begin)
    return found


@pytest.mark.timeout(600)
def test_a_megabyte_is_read_in_bounded_time():
    slowest(megabytes(0, 8))


def _items(path):
    return files.read_jsonl(path, Item)


def _yaml(path):
    return files.read_yaml(path, dict[str, int])


# name -> (file, content, reader)
ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(30))
SEEDS = f"conditions: {{role_play: [{', '.join(map(str, range(15_000)))}]}}"
LARGE = {
    "items": ("t.jsonl", b'{"id": "' + b"x" * SIZE + b'"}\n', _items),
    "items, many lines": ("t.jsonl", b"{}\n" * (SIZE // 3), _items),
    "journal": ("r.jsonl", (LINES[0] + b"\n") * (SIZE // len(LINES[0])), journal.read_record),
    "journal, deep": ("r.jsonl", b"[" * SIZE + b"\n", journal.read_record),
    "manifest": ("m.json", b'{"a": ' + b'{"a":' * (SIZE // 5), files.read_json),
    "profile": ("p.yaml", b"a: [1, 2]\n" * (SIZE // 10), _yaml),
    "largest profile": ("p.yaml", b"".join(b"k%d: {a: [1, 2]}\n" % i for i in range(6_500)), _yaml),
    "many aliases": ("p.yaml", ALIASES.encode(), _yaml),
    "many seeds": ("p.yaml", SEEDS.encode(), lambda path: profiles.read_profile(str(path))),
}


def read_large(name: str, folder: Path) -> float:
    file, content, read = LARGE[name]
    path = folder / file
    path.write_bytes(content)
    begin = time.process_time()
    try:
        read(path)
    except ValueError as error:
        assert path.name in str(error) and len(str(error)) < 10**7
    return time.process_time() - begin


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LARGE)
def test_a_large_file_is_read_or_refused_in_bounded_time(name, tmp_path):
    read_large(name, tmp_path)


@pytest.mark.soak
def test_how_long_a_megabyte_takes(tmp_path, record_property):
    """For the record; a stuck reader meets the time limit of the test."""
    times = slowest(megabytes(1, 100)) | {name: read_large(name, tmp_path) for name in LARGE}
    worst = max(times, key=times.get)
    record_property(f"of {len(times)} the longest, {worst}", f"{times[worst]:.2f} s")
