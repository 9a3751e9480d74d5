"""Training of all weights: a folder that holds a model, and is evolved, identified and published as that."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES
from trainings import a_run, rows_of

from atp_utils import models, parameters, run, runs
from atp_utils.engines import open_engine
from atp_utils.engines.kv_cache import GrowingCache
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.models import digests
from atp_utils.runs import adapters
from atp_utils.support.files import sha256
from atp_utils.training import trainer

SETTINGS = {
    "lora_rank": 0, "learning_rate": 1e-3, "scheduler": "linear", "warmup_ratio": 0, "max_steps": 2, "batch_size": 2,
    "accumulation": 1, "epochs": 1, "seed": 0, "save_steps": 1,
}  # fmt: skip
SMALL = {"train_per_environment": 2, "test_per_environment": 2, "instances_per_game": 2}
SMALL |= {"simple_problems": 4, "complex_problems": 4, "simple_test": 2, "complex_test": 2}
OWN = {"dpo": {"min_mass": 0}, "grpo": {"group_size": 2, "max_new_tokens": 4, "batch_size": 1}}


@pytest.fixture(scope="module", params=[(family, method) for family in FAMILIES for method in OWN], ids="-".join)
def trained(request, tiny, splits, tmp_path_factory):
    """(base, method, folder, log) of a training of all weights of a tiny model."""
    family, method = request.param
    out = tmp_path_factory.mktemp("whole") / method
    run = a_run(method, tiny[family], out, **SETTINGS | OWN[method])
    log = trainer.adapter(run, method, rows_of(run, splits[0][:2]))
    return tiny[family], method, out, log


def test_all_weights_are_trained_and_the_folder_holds_a_model(trained):
    base, method, folder, log = trained
    assert list(log["step"]) == [1, 2]
    # Before the first step the policy is the reference.
    assert log["loss"][0] == pytest.approx(0.6931, abs=1e-3) if method == "dpo" else log["kl"][0] == 0
    before, after = load_file(f"{base}/model.safetensors"), load_file(folder / "model.safetensors")
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    # Groups of garbage have no variance and teach nothing; what DPO moves is everywhere, norms and embeddings included.
    assert method == "grpo" or moved == set(before)
    assert not (folder / "checkpoints").exists() and not (folder / "adapter_config.json").exists()
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["sha256"] == {"model.safetensors": sha256(folder / "model.safetensors")}
    assert facts["settings"]["lora_rank"] == 0 and facts["settings"]["scheduler"] == "linear"


def test_it_is_evolved_as_an_adapter_is(trained, ask, tmp_path):
    base, method, folder, _ = trained
    assert models.check_adapter(folder, base) is False
    plain = open_engine(base, "role_play", "base", "", "", tmp_path)
    tuned = open_engine(base, "role_play", method, str(folder), "", tmp_path)
    digest = digests.adapter_digest(folder)
    assert tuned.identity.startswith(plain.identity.rpartition("|code=")[0] + "|" + digest[:16])
    assert tuned.made_of["adapter"] == digest
    logits = [engine._forward(*inputs(engine)) for engine in (plain, tuned)]
    weights = load_file(folder / "model.safetensors")
    loaded = tuned.model.state_dict()
    assert all(
        torch.equal(loaded[name].float(), value.to(loaded[name].dtype).float()) for name, value in weights.items()
    )
    assert (logits[0] - logits[1]).abs().max() > 0 or method == "grpo"


def test_notebook_2_works_its_loss_out_for_a_whole_model_too(tiny, tmp_path):
    data = runs.write_data({"out": str(tmp_path / "data")} | SMALL) and tmp_path / "data"
    own = {name: SETTINGS[name] for name in ("lora_rank", "scheduler", "max_steps")} | {"min_mass": 0}
    given = {"model": tiny["qwen3"], "data": str(data), "out": str(tmp_path / "whole")} | own
    run.run("notebooks/02_align_dpo.ipynb", tmp_path / "done.ipynb", given)
    assert models.check_adapter(tmp_path / "whole", tiny["qwen3"]) is False
    assert "By hand: margin" in (tmp_path / "done.ipynb").read_text()


def inputs(engine):
    ids = torch.tensor([[1, 2, 3]])
    return ids, torch.ones_like(ids), GrowingCache(), 1


def test_its_weights_decide_the_identity_and_its_training_doesnt(trained, tmp_path):
    base, _, folder, _ = trained
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = models.identity(base, copy)
    (copy / "training_log.csv").write_text("step\n1\n")
    facts = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(facts | {"finished": "later"}))
    assert models.identity(base, copy) == before == models.identity(base, folder)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert models.identity(base, copy) != before


def test_a_model_of_another_base_is_refused(trained, tiny, embedded):
    base, _, folder, _ = trained
    other = next(path for path in tiny.values() if path != base)
    with pytest.raises(ValueError, match="is a model of"):
        TransformersEngine(other, folder)
    shutil.copytree(base, folder.parent / "base", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="is a model trained from"):
        models.check_adapter(folder, str(folder.parent / "base"))


def test_no_whole_model_is_published(trained, tmp_path):
    base, method, folder, _ = trained
    shutil.copytree(folder, tmp_path / "run/adapters/role_play/m" / f"{method}-0")
    assert adapters.publish(tmp_path / "run", tmp_path / "published") == []
    given = json.loads((folder / "manifest.json").read_text())["settings"]
    assert adapters.published(base, "role_play", method, 0, given, {}, tmp_path / "published") == ""


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_the_schedule_is_the_one_that_was_asked_for(scheduler, tmp_path):
    given = parameters.Dpo(scheduler=scheduler, warmup_ratio=0, max_steps=4)
    arguments = trainer.trl_arguments(tmp_path, [{}] * 4, given)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps) == (scheduler, 0)
    assert parameters.Dpo().scheduler == "cosine"
