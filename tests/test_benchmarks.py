"""The benchmark's arithmetic by hand, its parts at the smallest size, and the README's table beside the record."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from atp_utils import resolve
from atp_utils.evolution.requests import Request, Sampling
from benchmarks import bench, evolution, gpu, limits

HERE = {"processor": "A", "cores": 2, "threads": 2, "flags": ["avx2"], "torch": "1", "precision": "float32"}
FOUND = {
    "settings": {"items": 8, "rounds": 2},
    "kinds": {"plain loop": {"seconds": [9.0, 8.0, 40.0]}, "ours": {"seconds": [2.0, 4.0, 3.0], "memory_gib": 1.26}},
    "limits": {"gflops": 1.0, "gb_s": 1.0, "least_seconds": 1.5},
    "calls": [{"tokens": 500, "seconds": [1.0, 3.0, 2.0]}, {"tokens": 2000, "seconds": [8.0, 8.0, 8.0]}],
}


def test_the_readme_shows_the_recorded_benchmark():
    recorded = json.loads(resolve(bench.RECORDED / "smollm2-135m.json").read_text())
    assert bench.readme(recorded) in resolve("README.md").read_text()


def test_medians_ratios_and_shares():
    results = bench.merged(None, HERE, "choose", FOUND)
    [slow, fast] = bench.table(results).to_dict("records")
    assert slow["what"] == "evolution, `choose`: 8 agents, 2 rounds" and slow["seconds"] == "9.0"
    assert (fast["seconds"], fast["times faster"], fast["of the limit"], fast["peak memory, GiB"]) == (
        "3.0", "3.0", "50%", "1.3",
    )  # fmt: skip
    assert bench.calls(results) == {"choose": [4.0, 4.0]}


def test_parts_of_one_machine_are_kept_together():
    both = bench.merged(bench.merged(None, HERE, "reason", FOUND), HERE | {"commit": "b"}, "choose", FOUND)
    assert list(both["parts"]) == ["choose", "reason"] and both["machine"]["commit"] == "b"
    assert list(bench.merged(both, HERE | {"cores": 4}, "choose", FOUND)["parts"]) == ["choose"]


def test_the_readmes_table_is_replaced_and_nothing_else(tmp_path):
    page, results = tmp_path / "page.md", bench.merged(None, HERE, "choose", FOUND)
    page.write_text("Before.\n\n| A | way | seconds |\n|---|---|---|\n| x | y | z |\n\nAfter | way.\n\n")
    bench.record(results, page)
    assert page.read_text() == f"Before.\n\n{bench.readme(results)}\n\nAfter | way.\n\n"
    page.write_text("No table.\n")
    with pytest.raises(ValueError, match="expected one table with the column 'way', found 0"):
        bench.record(results, page)


def test_what_a_pass_takes_at_least():
    model = torch.nn.Module()
    model.base_model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(10, 20)])})
    model.base_model["embed"] = torch.nn.Embedding(100, 10)
    found = limits.measure(model, {"gflops": 1e9, "gb_s": 0, "weights": 0, "bytes": 0}, repeats=1)
    assert (found["weights"], found["bytes"], found["gflops"]) == (200, 800, 1e9)
    assert 0 < found["gb_s"] < math.inf
    # 400 operations a token.
    assert limits.least(found | {"gflops": 400e-9, "gb_s": 1}, tokens=3) == pytest.approx(3)
    assert limits.least(found | {"gflops": 1, "gb_s": 800e-9}, tokens=3, passes=5) == pytest.approx(5)


def test_vllm_is_asked_the_same_chats(embedded, monkeypatch):
    asked = []

    class Fake:
        def __init__(self, model, tokenizer, load_format, **_):
            assert json.loads((Path(model) / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
            assert Path(tokenizer).is_dir() and load_format == "dummy"

        def chat(self, chats, sampling, use_tqdm):
            asked.append((chats, sampling))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2, 3])]) for _ in chats]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Fake, SamplingParams=lambda **given: given))
    chats, sampling = [({"role": "user", "content": text},) for text in ("Hi.", "Ho.")], Sampling(max_new_tokens=7)
    requests = [Request("key", chat, 0, sampling=sampling) for chat in chats]
    found = gpu.vllm(gpu.config(tiny=True), requests)
    assert asked[1] == ([[{"role": "user", "content": "Hi."}], [{"role": "user", "content": "Ho."}]], {"max_tokens": 7})
    assert found["written tokens a second"] == pytest.approx(3 * found["decisions a second"])


@pytest.mark.parametrize("case", ["choose", "reason"])
def test_an_evolution_is_timed_against_the_plain_loop(case, tiny, monkeypatch):
    monkeypatch.setattr(limits, "BUFFER", 2**16)
    found = evolution.measure(case, tiny["qwen3"], "float32", turns=2, items=2, rounds=2)
    assert found["replies"] == 2 * 2 * (2 if case == "choose" else 1)
    assert sum(call["tokens"] for call in found["calls"]) == found["tokens"] and len(found["calls"]) == 2
    assert all(len(way["seconds"]) == 2 for way in found["kinds"].values())
    assert 0 < found["limits"]["least_seconds"] < min(found["kinds"]["ours"]["seconds"])
    assert json.loads(json.dumps(bench.rounded(found))) == bench.rounded(found)


def test_the_gpu_benchmark_at_tiny_size(embedded, capsys, monkeypatch):
    monkeypatch.setattr(limits, "BUFFER", 2**16)
    small = "--tiny --items 2 --rounds 2 --new-tokens 3 --steps 1".split()
    found = gpu.main(small)
    assert json.loads(capsys.readouterr().out) == found
    assert {"machine", "choose", "reason", "dpo", "grpo"} == set(found)
    for part in ("choose", "reason", "dpo", "grpo"):
        assert 0 < found[part]["share of the limit"] < 1, part
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main(["--items", "2"])
