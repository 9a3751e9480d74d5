"""The plan against the pipeline, the paper's list of exhibits, and arithmetic done by hand."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from atp_utils import ROOT, costs, models, parameters, plan, role_play, workload
from atp_utils.chat_template import render
from atp_utils.costs import ASSUMED, DEVICES, Chat, Machine
from atp_utils.protocol import Protocol
from atp_utils.workload import Replies

EXHIBITS = ["Figure 3", "Figure 4", "Figure 5", "Figure 6", "Table 1", "Table 2"]
H100 = Machine(DEVICES["h100"], ASSUMED["h100"])


def by_hand(layers, hidden, inner, heads, kv_heads, width, vocabulary, *, tied, head_norms=0):
    """Parameters of a dense decoder, matrix by matrix."""
    attention = 2 * hidden * heads * width + 2 * hidden * kv_heads * width
    layer = attention + 3 * hidden * inner + 2 * hidden + head_norms * width
    return layers * layer + hidden + vocabulary * hidden * (1 if tied else 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (plan.QWEN, by_hand(36, 4096, 12288, 32, 8, 128, 151936, tied=False, head_norms=2)),
        (plan.LLAMA, by_hand(32, 4096, 14336, 32, 8, 128, 128256, tied=False)),
        (models.EMBEDDED, by_hand(30, 576, 1536, 9, 3, 64, 49152, tied=True)),
    ],
)
def test_parameters_follow_from_the_configuration(name, expected, embedded):
    arch = costs.read_architecture(name)
    assert arch.parameters == expected
    # Norms and the input embedding are in no matrix that a token is multiplied with.
    assert arch.layer_weights + arch.head_weights < expected + arch.head_weights
    assert arch.layer_weights > 0.5 * expected


def test_the_published_sizes():
    sizes = [costs.read_architecture(name).parameters / 1e9 for name in (plan.QWEN, plan.LLAMA)]
    assert [round(size, 2) for size in sizes] == [8.19, 8.03]


def test_the_embedded_model_has_as_many_parameters_as_its_weights(embedded):
    with safe_open(models.prepare_embedded() / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    real = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    assert costs.read_architecture(models.EMBEDDED).parameters == real


def test_an_unknown_architecture_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "owner--mixture"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 8}')
    monkeypatch.setattr(costs, "CONFIGS", tmp_path)
    monkeypatch.setattr(costs, "resolve", lambda path: tmp_path)
    with pytest.raises(ValueError, match="owner/mixture: a mixture of experts"):
        costs.read_architecture("owner/mixture")


# --- the roofline, by hand on a model of round numbers --------------------------------------------------------

TOY = costs.Architecture("toy", "", 1000, 600, 200, 50, 2, 10, 20, 4, 1, 5, 100)
UNIT = Machine(
    replace(DEVICES["h100"], flops=2000.0, bandwidth=100.0, memory=5000.0, batch_tokens=20, cache_bytes=0.0),
    costs.Assumptions(mfu=0.5, bandwidth=0.5, step_seconds=0.0, draw_seconds=0.0),
)


def test_reading_is_bound_by_operations_or_by_loading_the_weights():
    # 10 tokens: 2 * 600 * 10 for the layers; attention 4 * 2 layers * 4 heads * 5 * 10 tokens * 5 mean context; one
    # token through the output layer.
    flops = 12000 + 4 * 2 * 4 * 5 * 10 * 5 + 2 * 200
    wide = replace(UNIT, device=replace(UNIT.device, bandwidth=1e12))
    assert wide.read(TOY, [Chat(10, 10)]) == pytest.approx(flops / 1000)
    quick = replace(UNIT, device=replace(UNIT.device, flops=1e12))
    assert quick.read(TOY, [Chat(10, 10)]) == pytest.approx(2 * 1000 / 50)


def test_decoding_takes_the_longest_reply_and_the_slowest_limit():
    batch = [Chat(10, 10, written=4), Chat(10, 10, written=2)]
    kv = 2 * 2 * 1 * 5 * 2
    quick = replace(UNIT, device=replace(UNIT.device, flops=1e12))
    assert quick.write(TOY, batch) == pytest.approx(4 * (2000 + kv * (12 + 11)) / 50)
    slow = replace(quick, assumed=replace(quick.assumed, step_seconds=1000.0, draw_seconds=1.0))
    assert slow.write(TOY, batch) == pytest.approx(4 * 1000)
    assert slow.draw(TOY, batch) == pytest.approx(4 * 2 * 100)
    assert UNIT.write(TOY, [Chat(10, 10, scored=3)]) == 0


def test_training_counts_forward_backward_and_reference():
    chat = Chat(6, 6, scored=4)
    body, head = 2 * 600 * 10 + 4 * 2 * 4 * 5 * 10 * 5, 2 * 200
    assert costs.training_flops(TOY, chat, False, True) == 3 * body + 4 * 4 * head
    assert costs.training_flops(TOY, chat, True, False) == 4 * body + 4 * 10 * head


def test_batches_are_those_of_the_engine():
    chats = [Chat(4, 4, limit=8)] * 6 + [Chat(10, 10, limit=8), Chat(4, 4)]
    sizes = [[chat.prompt for chat in batch] for batch in UNIT.batches(chats)]
    assert sizes == [[4], [4, 4, 4, 4, 4], [4, 10]]


def test_kept_activations_are_about_what_autograd_keeps():
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    own, kept = {weight.data_ptr() for weight in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.base_model.model.model(input_ids=torch.ones((2, 100), dtype=torch.long), use_cache=False)
    names = dict(layers=3, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16)
    estimate = replace(TOY, **names).activation_bytes(200, checkpointed=False)
    assert outputs.last_hidden_state.requires_grad and 0.75 < estimate / sum(kept.values()) < 1.33


def test_what_does_not_fit_is_sharded_or_refused():
    arch, device = TOY, replace(DEVICES["h100"], memory=1000.0)
    assert costs.devices_needed(arch, 2000.0, replace(device, memory=2000.0)) == 1
    assert costs.devices_needed(arch, 2500.0, device) == 4
    assert costs.devices_needed(arch, 3000.0, device) is None


def test_checkpoints_save_memory():
    arch = costs.read_architecture(plan.QWEN)
    chats = [Chat(300, 300, scored=2048)] * 4
    kept, checkpointed = (costs.training_bytes(arch, 8, chats, flag) for flag in (False, True))
    assert checkpointed < DEVICES["h100"].memory < kept + 2 * arch.parameters


# --- tokens --------------------------------------------------------------------------------------------------


def evolution(scenario, prompts, /, **changes):
    book = parameters.EVOLVE[scenario]
    settings = dict(parameters.defaults_of(book)) | changes
    return workload.evolution(scenario, settings, prompts, models.load_tokenizer(models.EMBEDDED), Replies(40, 30))


def test_role_play_is_counted_on_the_real_prompts(splits, embedded, engine):
    load = evolution("role_play", splits[1], items=2, rounds=3, seeds=[0, 1], protocol="choose")
    # Two seeds share their first chat, and there are at most four from then on.
    assert [len(call) for call in load.calls][0] == 2
    assert all(len(call) <= 4 for call in load.calls) and len(load.calls) == 3
    chosen = role_play.balanced_subset(splits[1], 2)
    first = [render(engine.tokenizer, role_play.opening(item, Protocol("choose"))) for item in chosen]
    lengths = [len(engine.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in first]
    assert sorted(chat.prompt for chat in load.calls[0]) == sorted(lengths)
    assert all(chat.fresh == chat.prompt for chat in load.calls[0])
    assert all(chat.fresh < chat.prompt / 2 for chat in load.calls[2])


def test_agents_of_one_past_are_one_chat_where_options_are_scored(embedded):
    ways = {"agents": 8, "thresholds": [4], "rounds": 2, "seeds": [0]}
    forced, free = (evolution("collusion", [], protocol=name, **ways) for name in ("choose", "reason"))
    assert len(forced.calls[0]) == 7 and len(forced.calls[1]) <= 14
    assert [len(call) for call in free.calls] == [56, 56]
    # Within a call nothing is shared; a later round reads what is new.
    assert all(chat.fresh == chat.prompt for chat in free.calls[0])
    assert all(chat.fresh < chat.prompt for chat in free.calls[1])


def test_replies_have_the_assumed_length(embedded):
    load = evolution("collusion", [], protocol="reason", thresholds=[4], seeds=[0], max_new_tokens=64)
    assert {(chat.written, chat.limit) for chat in load.chats} == {(40, 64)}
    assert {chat.written for chat in load.at_limit().chats} == {64}
    assert [Replies().length(limit) for limit in (8, 100, 2048)] == [8, 64, 512]
    # What an agent has said is in its next prompt, as long as it was assumed to be.
    shorter = replace(load, calls=load.calls[:1]).chats[0]
    grown = min(chat.prompt for chat in load.calls[1]) - max(chat.prompt for chat in load.calls[0])
    assert shorter.prompt > 100 and grown > 30
    ways = {"protocol": "reason", "thresholds": [4], "seeds": [0], "max_new_tokens": 64, "keep_thinking": True}
    kept = evolution("collusion", [], **ways)
    assert min(chat.prompt for chat in kept.calls[1]) == min(chat.prompt for chat in load.calls[1]) + 10


def test_dpo_and_grpo_have_the_steps_of_the_trainer(splits, embedded):
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    profile = parameters.read_profile("paper")
    found = {}
    for method in ("dpo", "grpo"):
        settings = dict(parameters.defaults_of(parameters.ALIGN[method]))
        settings |= profile.parameters(parameters.ALIGN[method], "role_play", plan.QWEN)
        found[method] = workload.alignment(method, "role_play", settings, splits[0][:16], tokenizer, Replies())
    # 16 prompts: 12 epochs of 16 pairs in steps of 8; 6 epochs in steps of 8 prompts with 4 replies each.
    dpo, grpo = found["dpo"].training, found["grpo"].training
    assert (len(dpo.rows), dpo.steps, dpo.step_rows, dpo.micro_rows) == (32, 24, 16, 2)
    assert (len(grpo.rows), grpo.steps, grpo.step_rows, grpo.micro_rows) == (16, 12, 32, 4)
    # The model is asked for either option of each prompt.
    assert [len(call) for call in found["dpo"].calls] == [32] and not found["grpo"].calls


# --- jobs and their output -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper", "quick"])
def test_the_jobs_are_snakemakes(name):
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--forceall", "--nolock", "--config", f"profile={name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.findall(r"Job \d+: ((?:data|align|evolve|figures): .*)", done.stdout + done.stderr)
    titles = [job.title for job in plan.jobs(parameters.read_profile(name))]
    assert sorted(re.sub("^data: .*", "data: ", line).strip() for line in said) == sorted(map(str.strip, titles))


def test_every_table_and_figure_has_its_jobs():
    drawn = [name for book in ("07_heatmaps", "08_figures") for name in plan.drawn_by(book)]
    assert sorted(drawn) == EXHIBITS == sorted(name for names, _ in plan.PAPER.values() for name in names)
    profile = parameters.read_profile("paper")
    jobs = plan.jobs(profile)
    assert all(job.makes for job in jobs) and {name for job in jobs for name in job.makes} == {*EXHIBITS}
    assert {model for _, published in plan.PAPER.values() for model in published} == {*profile.models}
    assert "NOT MADE" not in plan.made(profile)
    assert plan.made(profile.model_copy(update={"scenarios": ["role_play"]})).count("NOT MADE") == 5


@pytest.fixture(scope="module")
def planner(embedded):
    small = parameters.read_profile("tests/profiles/smoke.yaml")
    return plan.Planner(small, H100, Replies())


def test_the_text_is_narrow_and_adds_up(planner):
    text = plan.text(planner, "smoke")
    assert max(map(len, text.splitlines())) < 100
    for name in EXHIBITS:
        assert f"  {name}: data" in text
    estimates = [planner.estimate(job) for job in plan.jobs(planner.profile)]
    assert f"Total on one device: {sum(cost.hours for cost in estimates):.1f} h" in text
    assert all(cost.most >= cost.hours for cost in estimates) and sum(cost.hours for cost in estimates) > 0
    assert all(cost.memory > 0 for cost in estimates if cost.hours)


def test_more_of_the_peak_takes_less_time(planner):
    job = plan.Job("align", "role_play", models.EMBEDDED, "dpo")
    fast = plan.Planner(planner.profile, replace(H100, assumed=replace(H100.assumed, mfu=0.8)), Replies())
    assert fast.estimate(job).hours == pytest.approx(planner.estimate(job).hours / 2)


def test_a_wrong_profile_gets_the_usual_error(capsys):
    assert plan.main(["no_such_profile"]) == 2
    assert "error: no profile 'no_such_profile' (there are: " in capsys.readouterr().err
