"""Training in launched processes: two on the CPU (gloo), a tiny random model, real DPO, GRPO, FSDP and a real kill."""

import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from trainings import a_run
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from atp_utils import models, parameters, resolve
from atp_utils.training import launch, trainer

TWO = "tests/two_cpus.yaml"
SHIPPED = sorted(resolve(launch.CONFIGURATIONS).glob("*.yaml"))
STEPS, KILLED_AT = 16, 5
SETTINGS = {
    "learning_rate": 1e-3, "epochs": 1, "max_steps": STEPS, "batch_size": 1, "accumulation": 2, "beta": 0.1,
    "lora_rank": 2, "seed": 0, "save_steps": 4,
}  # fmt: skip
PAIRS = [
    {"prompt": f"Question {n}:", "chosen": " yes" * (1 + n % 3), "rejected": " no" * (1 + n % 2)} for n in range(6)
]
# The reply is complete before the model says a word: each prompt's score is known, and tells which prompts a step saw.
CALL = "<tool>\nprint(7)\n</tool>"
SCORES = {("tool", "7"): 2.0, ("tool", "8"): 1.0, ("direct", "7"): 1.1, ("direct", "8"): 0.1}
PROBLEMS = [
    {
        "prompt": f"Problem {place}: {CALL}", "item": str(place), "options": ["tool", "direct"], "compliant": policy,
        "answer": answer, "protocol": "reason", "prefill": CALL,
    }
    for place, (policy, answer) in enumerate(SCORES)
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(embedded, tmp_path_factory):
    """Folder of a random Llama with the embedded model's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(models.locate(embedded))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_both(method: str, tiny: str, out: Path, launcher: str = "", **changes):
    given = SETTINGS | {"launcher": launcher} | changes
    if method == "dpo":
        return trainer.adapter(a_run("dpo", tiny, out, **given | {"min_mass": 0}), "dpo", PAIRS)
    given |= {"scenario": "tool_use", "group_size": 2, "max_new_tokens": 2}
    return trainer.adapter(a_run("grpo", tiny, out, **given), "grpo", PROBLEMS)


@pytest.fixture
def kill_the_second(monkeypatch):
    """SIGKILL one of two launched processes once the other reports `KILLED_AT` steps."""
    show, killed = launch._show, []

    def watch(line, *rest):
        show(line, *rest)
        if line == f"[progress] {KILLED_AT}\n":
            workers = [p for p in psutil.Process().children(recursive=True) if p.environ().get("LOCAL_RANK") == "1"]
            killed.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "_show", watch)
        yield patch
    assert len(killed) == 1


@pytest.fixture
def fsdp(tmp_path, monkeypatch):
    """The shipped FSDP configuration, for two CPUs."""
    config = yaml.safe_load(resolve("profiles/accelerate/fsdp.yaml").read_text())
    path = tmp_path / "fsdp.yaml"
    path.write_text(yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"}))
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda name, _, *rest: run(name, "tests.fsdp_on_cpu", *rest))
    return str(path)


@pytest.mark.parametrize(("method", "layout"), [("dpo", "two_cpus"), ("grpo", "two_cpus"), ("dpo", "fsdp")])
def test_two_processes_train_what_one_does_also_after_a_kill(method, layout, tiny, tmp_path, request, kill_the_second):
    launcher = request.getfixturevalue("fsdp") if layout == "fsdp" else TWO
    alone = train_both(method, tiny, tmp_path / "alone")
    out = tmp_path / "launched"
    with pytest.raises(RuntimeError, match=r"(?s)yaml failed .*rank +: 1 .*SIGKILL.*memory runs out.*output.log"):
        train_both(method, tiny, out, launcher)
    assert not list(out.glob("*_log.csv")) and not (out / "manifest.json").exists()
    [checkpoint] = (out / "checkpoints" / layout).glob("checkpoint-*/trainer_state.json")
    assert KILLED_AT - 1 <= json.loads(checkpoint.read_text())["global_step"] < STEPS
    assert (checkpoint.parent / "pytorch_model_fsdp.bin").exists() == (layout == "fsdp")

    kill_the_second.undo()
    log = train_both(method, tiny, out, launcher)
    assert list(log["step"]) == list(range(1, STEPS + 1)) and list(log.columns) == list(alone.columns)
    # The same numbers are added in another order; the losses differ by rounding, and by 1e-2 if batches were others.
    assert log["loss"].tolist() == pytest.approx(alone["loss"].tolist(), abs=1e-4)
    if method == "grpo":
        # Before the kill the same prompts in the same steps. TRL shuffles anew where it resumes: an epoch of two steps
        # still sees each prompt once.
        assert log["score"].tolist()[:4] == pytest.approx(alone["score"].tolist()[:4])
        epochs = log["score"].to_numpy().reshape(-1, 2).sum(axis=1)
        assert epochs == pytest.approx(sum(SCORES.values()) / 2)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "alone", out)]
    assert len(weights[0]) == 2 * 7 * 2
    for name in weights[0] | weights[1]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=0, atol=1e-3)
    models.check_adapter(out, tiny)


def test_a_killed_process_is_named_also_where_another_one_missed_it_first(tmp_path):
    missed = tmp_path / "error.json"
    missed.write_text(json.dumps({"message": {"message": "closed by peer", "extraInfo": {"timestamp": "1"}}}))
    ends = {0: (-signal.SIGTERM, str(missed)), 1: (-signal.SIGKILL, str(tmp_path / "none"))}
    failures = {rank: ProcessFailure(rank, 100 + rank, code, file) for rank, (code, file) in ends.items()}
    log = tmp_path / "output.log"
    log.write_text(f"a step\nChildFailedError: {ChildFailedError('trainer', failures)}\n")
    told = launch._why(log)
    assert re.search(r"(?s)rank +: 1 .*SIGKILL.*Root Cause.*rank +: 0 .*closed by peer.*memory runs out", told)
    assert "a step" not in told


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_all_weights_are_trained_in_shares_and_saved_whole(method, tiny, tmp_path, fsdp):
    whole = {"lora_rank": 0, "max_steps": 2, "scheduler": "linear", "learning_rate": 1e-4}
    alone = train_both(method, tiny, tmp_path / "alone", **whole)
    log = train_both(method, tiny, tmp_path / "launched", fsdp, **whole)
    assert log["loss"].tolist() == pytest.approx(alone["loss"].tolist(), abs=1e-4)
    if method == "grpo":
        # The reference is whole in every process too: another one would be far from the policy.
        assert log["kl"].tolist() == pytest.approx(alone["kl"].tolist(), abs=1e-3)
        assert log["kl"][0] == pytest.approx(0, abs=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "launched")]
    # Shares don't know that two of the model's weights are one: it is saved under both names.
    torch.testing.assert_close(weights[1].pop("lm_head.weight"), weights[1]["model.embed_tokens.weight"])
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 18
    before = models.load_weights(tiny, "float32").state_dict()
    moved, apart = (
        sum((one[name].float() - other[name]).square().sum().item() for name in weights[0]) ** 0.5
        for one, other in ((before, weights[0]), (weights[1], weights[0]))
    )
    # Adam turns the sign of a gradient next to zero into a whole step, so that a few weights may differ. By GRPO a
    # model stays what it is where no group's replies differ in reward, alone and in shares.
    learns = method == "dpo" or alone["dead_groups"].min() < 1
    assert (moved > 0) == learns and apart <= 0.1 * moved
    assert models.check_adapter(tmp_path / "launched", tiny) is False


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_accelerates(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name)
    assert launch.processes(path.stem) == (path, 1 if path.stem == "one_gpu" else 4)
    # accelerate checks the names of the file itself; those of its sections it would take over unread.
    options = {action.dest for action in launch_command_parser()._actions}
    config = ClusterConfig.from_yaml_file(str(path))
    assert {*config.fsdp_config, *config.deepspeed_config} <= options
    assert config.mixed_precision == "bf16"


def test_launchers_that_cannot_start_are_refused_before_anything_is_written(tiny, tmp_path, monkeypatch):
    def refused(error: type[Exception], message: str, launcher: str, **changes):
        with pytest.raises(error, match=message):
            trainer.check(a_run("dpo", tiny, tmp_path / "out", **SETTINGS | changes, launcher=launcher), "dpo")
        assert not (tmp_path / "out").exists()

    def written(old: str, new: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(resolve(TWO).read_text().replace(old, new))
        return str(path)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(FileNotFoundError, r"no launcher 'many' \(there are: ddp, fsdp, one_gpu, zero3\)", "many")
    refused(ValueError, "fsdp.yaml: asks for 0 processes .* GPUs visible here: 0", "fsdp")
    refused(ValueError, "accumulation is 3 and must be a multiple of the number of processes, 2", TWO, accumulation=3)
    refused(ValueError, "mine.yaml: .*unknown keys.*processes", written("num_processes", "processes"))
    refused(ValueError, "mine.yaml: num_machines must be 1", written("num_machines: 1", "num_machines: 2"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    refused(ValueError, "zero3.yaml: needs DeepSpeed, .* pip install deepspeed", "zero3")


def test_the_notebooks_error_ends_with_the_launched_ones(tiny, tmp_path):
    rows = [{"prompt": "no other column"}]
    with pytest.raises(
        RuntimeError, match=r"(?s)two_cpus.yaml failed \(exit status 1\).*KeyError.*All of its output: output.log"
    ):
        trainer.adapter(a_run("dpo", tiny, tmp_path, **SETTINGS, launcher=TWO), "dpo", rows)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_a_step_sees_as_many_rows_on_any_number_of_processes(processes, tmp_path, monkeypatch):
    changes = SETTINGS | {"accumulation": 8, "max_steps": 0}
    given = parameters.Dpo(**changes)
    alone = trainer.trl_arguments(tmp_path, PAIRS * 8, given)
    monkeypatch.setattr(trainer, "_processes", lambda: processes)
    monkeypatch.setattr(trainer.GRPOConfig, "world_size", processes)
    dpo = trainer.trl_arguments(tmp_path, PAIRS * 8, given)
    assert dpo.per_device_train_batch_size * dpo.gradient_accumulation_steps * processes == 8
    assert dpo.max_steps == alone.max_steps == 6
    given = parameters.Grpo(**changes, group_size=4, max_new_tokens=2)
    grpo = trainer.trl_arguments(tmp_path, PAIRS * 8, given)
    assert grpo.generation_batch_size == 8 * 4 and grpo.max_steps == 6


def test_vllm_is_refused_where_it_is_not_installed(tiny, tmp_path, monkeypatch):
    run = a_run("grpo", tiny, tmp_path / "out", **SETTINGS, group_size=2, max_new_tokens=5, use_vllm=True)
    monkeypatch.setattr(trainer, "is_vllm_available", lambda: False)
    with pytest.raises(ValueError, match=r"use_vllm is true, and vLLM isn't installed: pip install trl\[vllm\]"):
        trainer.check(run, "grpo")
    assert not (tmp_path / "out").exists()


def test_vllm_shares_the_training_gpus_and_keeps_room_for_the_longest_chat(tmp_path):
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    rows = [{"prompt": "a"}, {"prompt": "one two three four"}]
    given = parameters.Grpo(**SETTINGS, group_size=2, max_new_tokens=5, use_vllm=True)
    arguments = trainer.trl_arguments(tmp_path, rows, given)
    assert arguments.use_vllm and arguments.vllm_mode == "colocate"
    assert arguments.vllm_max_model_length == len(tokenizer("one two three four")["input_ids"]) + 5
    plain = trainer.trl_arguments(tmp_path, rows, parameters.Grpo(**SETTINGS, group_size=2))
    assert not plain.use_vllm and plain.vllm_max_model_length is None
