import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from atp_utils import models
from atp_utils.models import chat_template, digests


@pytest.fixture(scope="module")
def adapter(embedded, tmp_path_factory):
    """A LoRA adapter of the embedded model whose weights are not all zero."""
    folder = tmp_path_factory.mktemp("adapter")
    base = models.load_weights(embedded)
    base.name_or_path = base.config._name_or_path = embedded
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(folder)
    return folder


def test_the_embedded_model_is_the_one_that_published_runs_and_adapters_name(embedded):
    assert models.identity(embedded, dtype="bfloat16") == "smollm2-135m|2e5e48d6ff1abfa1|bfloat16|73c3aa174fb65ead"


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        models.locate(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no model \(config.json and"):
        models.locate(str(tmp_path))


def test_a_hub_id_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="model 'nobody/nothing' can't be loaded"):
        models.load_weights("nobody/nothing")


@pytest.mark.parametrize("load", [models.load_weights, models.load_tokenizer, models.identity])
def test_what_the_hub_refuses_names_the_model(load, monkeypatch):
    def refuse(*_, **__):
        raise OSError("You are trying to access a gated repo.\nVisit its page.")

    for kind in (models.AutoModelForCausalLM, models.AutoTokenizer, models.AutoConfig):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    with pytest.raises(OSError, match=r"(?s)model 'some/model' can't be loaded: You are .*gated repo.*Visit its page"):
        load("some/model")


def test_damaged_weights_name_the_model(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match=f"model '{copied}' can't be loaded: .*not fully covered"):
        models.load_weights(str(copied))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_only_inference_spreads_a_model_over_the_gpus(on_gpu, tmp_path, monkeypatch):
    maps = []

    def load(source, device_map, **_):
        maps.append(device_map)
        model = torch.nn.Linear(1, 1)
        model.get_output_embeddings = lambda: model
        return model

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(models, "read_config", lambda name: SimpleNamespace(quantization_config={"bits": 4}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    models.load("some/model")
    models.load_weights("some/model")
    assert maps == ["auto" if on_gpu else None, None]


def test_the_head_reads_the_last_tokens_in_one_piece(embedded):
    # Of a slice PyTorch copies the head's weights once for each row, in bfloat16.
    model, pieces = models.load(embedded), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, out: pieces.append(given[0].is_contiguous()))
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3], [4, 5, 6]]), logits_to_keep=2).logits
    assert pieces == [True] and logits.shape[:2] == (2, 2)


def test_a_local_folder_works_in_its_place(embedded, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(models.locate(embedded), copy)
    assert models.load_tokenizer(str(copy)).chat_template
    assert models.identity(str(copy)).split("|")[1:] == models.identity(embedded).split("|")[1:]


@pytest.fixture
def copied(tiny, tmp_path):
    """A copy of a tiny model whose files look old."""
    folder = tmp_path / "model"
    shutil.copytree(tiny["qwen3"], folder)
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
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


def test_a_file_is_hashed_once_in_a_process_until_it_changes(copied, monkeypatch):
    hashed, digest = [], digests.hashlib.file_digest

    def noted(file, kind):
        hashed.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(digests.hashlib, "file_digest", noted)
    first = digests.folder_digest(copied)
    assert digests.folder_digest(copied) == first and hashed.count("model.safetensors") == 1
    noise(copied)
    for _ in range(2):
        assert digests.folder_digest(copied) != first
    assert hashed.count("model.safetensors") == 2


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
