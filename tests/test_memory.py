import json

import pytest
import torch
from safetensors.torch import save_file

from atp_utils import models
from atp_utils.models import weights_memory


@pytest.fixture
def folder(tmp_path):
    """A model's folder with weights of 6 + 4 parameters in two files, and the same ones a second time in a third."""
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_parameters_are_counted_once(folder):
    assert weights_memory.parameters(str(folder)) == 10
    (folder / "model.safetensors.index.json").unlink()
    assert weights_memory.parameters(str(folder)) == 20
    save_file({"a": torch.zeros(7)}, folder / "model.safetensors")
    assert weights_memory.parameters(str(folder)) == 7


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        weights_memory.parameters(str(tmp_path))


def test_a_model_of_unknown_size_is_left_to_loading(monkeypatch):
    def fails(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(weights_memory, "get_safetensors_metadata", fails)
    weights_memory.check("nobody/nothing", "nobody/nothing", torch.float32, all_gpus=True)


def test_too_little_memory_is_said_before_anything_is_loaded(folder, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", never)
    monkeypatch.setattr(weights_memory, "free_bytes", lambda all_gpus: (39, "the GPU"))
    with pytest.raises(MemoryError, match=r"needs 0.0 GiB for its weights alone .*float32.*, the GPU has 0.0 GiB"):
        models.load_weights(str(folder), torch.float32)
    # Half of the bytes a parameter, or half of the parameters a process, and it fits.
    with pytest.raises(AssertionError, match="loaded"):
        models.load_weights(str(folder), torch.bfloat16)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssertionError, match="loaded"):
        models.load_weights(str(folder), torch.float32)


def test_free_memory_is_the_machines_or_that_of_the_gpus_in_use(monkeypatch):
    free, where = weights_memory.free_bytes(all_gpus=True)
    if not torch.cuda.is_available():
        assert free > 0 and where == "this machine"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**device, 1000))
    assert weights_memory.free_bytes(all_gpus=True)[0] == 111
    assert weights_memory.free_bytes(all_gpus=False)[0] == 100


def test_a_full_gpu_ends_with_what_to_do():
    with pytest.raises(MemoryError, match=r"memory is full \(CUDA out of memory. Tried.*\) in training: lower it"):
        with weights_memory.advice("in training: lower it"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")
