import pytest
import torch
from transformers import AutoConfig

from atp_utils import models
from atp_utils.models import weights_memory


def test_too_little_memory_is_said_before_anything_is_loaded(tiny, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded")

    folder = tiny["qwen3"]
    parameters = models.load_weights(folder).num_parameters()
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", never)
    monkeypatch.setattr(weights_memory, "free_bytes", lambda all_gpus: (4 * parameters - 1, "the GPU"))
    with pytest.raises(MemoryError, match=r"needs 0.0 GiB for its weights alone .*float32.*, the GPU has 0.0 GiB"):
        models.load_weights(folder, torch.float32)
    # Half of the bytes a parameter, one byte more, or shares on several processes, and it may fit.
    with pytest.raises(AssertionError, match="loaded"):
        models.load_weights(folder, torch.bfloat16)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(AssertionError, match="loaded"):
        models.load_weights(folder, torch.float32)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setattr(weights_memory, "free_bytes", lambda all_gpus: (4 * parameters, "the GPU"))
    with pytest.raises(AssertionError, match="loaded"):
        models.load_weights(folder, torch.float32)


def test_asking_draws_no_random_number_and_takes_a_quantised_model_as_it_comes(tiny, monkeypatch):
    config = AutoConfig.from_pretrained(tiny["llama3_1"])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    weights_memory.check("m", config, torch.float32, all_gpus=True)
    assert torch.rand(1) == expected
    monkeypatch.setattr(weights_memory, "free_bytes", lambda all_gpus: (0, "the GPU"))
    with pytest.raises(MemoryError):
        weights_memory.check("m", config, torch.float32, all_gpus=True)
    config.quantization_config = {"quant_method": "awq"}
    weights_memory.check("m", config, torch.float32, all_gpus=True)


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
