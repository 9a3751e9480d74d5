import weakref
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from atp_utils import models
from atp_utils.engines.kv_cache import token_bytes
from atp_utils.engines.transformers_engine import HELD, TransformersEngine
from atp_utils.evolution.requests import Sampling
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


@pytest.mark.parametrize(
    ("free", "device_map", "loaded"),
    [
        # Free of each of three GPUs, in sizes of the model; main memory has room for one.
        (1.0, "auto", {"": 2}),
        (0.5, "auto", "auto"),
        (0.3, "auto", None),
        (1.0, None, "main memory"),
        (0.5, None, None),
        (0.3, "cpu", "cpu"),
    ],
)
def test_a_model_lies_on_one_gpu_where_it_fits(tiny, monkeypatch, free, device_map, loaded):
    folder = tiny["qwen3"]
    size = 4 * models.load_weights(folder).num_parameters()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * size, size))
    monkeypatch.setattr(weights_memory, "machine_free", lambda: size)

    def load(source, device_map, **_):
        raise LookupError(device_map or "main memory")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(LookupError if loaded else MemoryError) as found:
        models.load_weights(folder, torch.float32, device_map)
    assert not loaded or found.value.args == (loaded,)


def test_a_full_gpu_ends_with_what_to_do():
    with pytest.raises(MemoryError, match=r"memory is full \(CUDA out of memory. Tried.*\) in training: lower it"):
        with weights_memory.advice("in training: lower it"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")


GROUPS = {
    # Files of the groups, and bytes left: the tightest of those above counts, and files that were read give way.
    "version 2": ("0::/a/b\n", {"a/memory.max": 900, "a/memory.current": 600, "a/memory.stat": "inactive_file 50\n",
                  "a/b/memory.max": "max", "a/b/memory.current": 500, "a/b/memory.stat": "anon 1\n"}, [350]),
    "in a container": ("0::/host/path\n", {"memory.max": 900, "memory.current": 950, "memory.stat": "x 0\n"}, [0]),
    "version 1": ("9:cpu:/x\n4:memory:/c\n", {"memory/c/memory.limit_in_bytes": 800,
                  "memory/c/memory.usage_in_bytes": 500, "memory/c/memory.stat": "total_inactive_file 100\n"}, [400]),
    "without limits": ("4:memory:/\n0::/\n", {}, []),
    "damaged": ("0::/\n", {"memory.max": "much", "memory.current": 1, "memory.stat": ""}, []),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROUPS)
def test_limits_of_control_groups_count(tmp_path, monkeypatch, kind):
    member, told, left = GROUPS[kind]
    (tmp_path / "cgroup").write_text(member)
    for name, content in told.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    found = list(weights_memory._left_by_groups(tmp_path / "cgroup", tmp_path / "fs"))
    assert found == left
    assert list(weights_memory._left_by_groups(tmp_path / "none")) == []
    monkeypatch.setattr(weights_memory, "_left_by_groups", lambda: iter([7]))
    assert weights_memory.machine_free() == 7


FULL = {
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "main memory": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
}


def test_what_no_room_looks_like_here():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert weights_memory.ran_out(caught.value) and not weights_memory.ran_out(RuntimeError("shapes differ"))


def written(request):
    return replace(request, options=(), sampling=Sampling(max_new_tokens=5))


@pytest.mark.parametrize("kind", FULL)
def test_out_of_memory_splits_the_batch_and_goes_on(tiny, ask, monkeypatch, kind):
    requests = [ask(f"subject {number}", seed=number) for number in range(11)]
    requests += [written(request) for request in requests]
    expected = dict(TransformersEngine(tiny["qwen3"], dtype="float32").answer(requests))
    engine, sizes = TransformersEngine(tiny["qwen3"], dtype="float32"), []
    forward = engine._forward

    def cramped(ids, *rest):
        sizes.append(ids.shape[0])
        if ids.shape[0] > 3:
            raise FULL[kind]
        return forward(ids, *rest)

    monkeypatch.setattr(engine, "_forward", cramped)
    replies = dict(engine.answer(requests))
    assert max(sizes) == 11 and sum(size > 3 for size in sizes) < 6
    assert engine.answered == len(replies) == len(requests)
    for index, reply in replies.items():
        if reply.logprobs:
            assert reply.logprobs == pytest.approx(expected[index].logprobs, abs=1e-3)
        else:
            assert reply == expected[index]
    # What didn't fit isn't tried again.
    sizes.clear()
    list(engine.answer([ask(f"another {number}") for number in range(11)]))
    assert max(sizes) <= 3


def test_one_chat_without_room_forgets_the_others_and_then_says_so(tiny, ask, monkeypatch):
    engine = TransformersEngine(tiny["qwen3"], dtype="float32")
    [(_, first)] = engine.answer([ask("rain")])
    forward, kept = engine._forward, engine._kept

    def cramped(*given):
        if kept.chats:
            raise FULL["a GPU"]
        return forward(*given)

    monkeypatch.setattr(engine, "_forward", cramped)
    again = ask("rain", '{"choice": "Yes"}', "Really?")
    [(_, reply)] = engine.answer([replace(again, extended=False)])
    assert reply.logprobs and not kept.chats

    def full(*_):
        raise FULL["main memory"]

    monkeypatch.setattr(engine, "_forward", full)
    with pytest.raises(MemoryError, match="no room for a chat of .* tokens .*DefaultCPUAllocator.*history_window"):
        list(engine.answer([again]))

    def wrong(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(engine, "_forward", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(engine.answer([again]))


@pytest.mark.parametrize("agents", [64, 512])
def test_memory_has_a_bound_whatever_the_number_of_agents(tiny, ask, monkeypatch, agents):
    """docs/scale.md states it: keys and values of a batch, and of kept chats, in a round behind a round."""
    batch_tokens, cache_bytes = 512, 600_000
    engine = TransformersEngine(tiny["qwen3"], dtype="float32", batch_tokens=batch_tokens, cache_bytes=cache_bytes)
    each = token_bytes(engine.model.config, torch.float32)
    forward, make, batches, held, made = engine._forward, engine._row, [], [], []

    def noted(*given):
        row = make(*given)
        made.append(weakref.ref(row))
        return row

    def watched(ids, mask, cache, keep):
        out = forward(ids, mask, cache, keep)
        buffers = [buffer for layer in cache.layers for buffer in layer._buffers]
        batches.append((ids.shape[0], ids.numel(), sum(buffer.nbytes for buffer in buffers)))
        rows = [row.kept for row in (known() for known in made) if row is not None and row.kept is not None]
        chats = [*rows, *(values for _, values in engine._kept.chats.values())]
        kept = [layer.untyped_storage() for values in chats for layer in values]
        held.append(sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values()))
        return out

    monkeypatch.setattr(engine, "_forward", watched)
    monkeypatch.setattr(engine, "_row", noted)
    subjects = [f"number {number}, {'very ' * (number % 7)}much" for number in range(agents)]
    requests = [ask(subject) for subject in subjects]
    list(engine.answer(requests))
    heard = "Many did. " * 60
    list(engine.answer([ask(subject, '{"choice": "Yes"}', heard) for subject in subjects]))
    assert all(tokens <= batch_tokens or rows == 1 for rows, tokens, _ in batches)
    assert max(values for *_, values in batches) <= 9 / 8 * HELD * batch_tokens * each
    assert cache_bytes / 2 < max(held) <= 2 * cache_bytes
    assert max(rows for rows, *_ in batches) > 1


def test_what_is_left_of_memory_bounds_batches_and_kept_chats(tiny, monkeypatch):
    config = AutoConfig.from_pretrained(tiny["qwen3"])
    each = token_bytes(config, torch.float32)
    assert each == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    engine = TransformersEngine(tiny["qwen3"], dtype="float32")
    model = engine._load()
    monkeypatch.setattr(engine, "_load", lambda: model)
    monkeypatch.setattr(weights_memory, "free_bytes", lambda all_gpus: (2 * 18 * each * 100, "this machine"))
    assert engine.held_tokens == 1600 and engine.model is model and engine._kept.limit == 18 * each * 50
