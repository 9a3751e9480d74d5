"""The `paper` profile from the first notebook to the last, on a tiny random model of each of its two families.

Everything is the profile's (protocol, thinking, hyperparameters, what each model has of its own) but the counts, the
source of problems (the hub's data sets are not here), and who trains: this process, without launcher and vLLM. Random
weights write garbage, from which no preference pair can be made. One training prompt's replies are therefore written by
this test into the journals that notebook 2 goes on from; all other prompts are answered by the model, and left out by
the notebook.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny_models import FAMILIES, HUB_IDS

from atp_utils import ROOT, models, parameters, profiles, runs
from atp_utils.engines.scripted import ScriptedEngine
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.evolution import journal, loop
from atp_utils.evolution.parsing import answer_json
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Sampling
from atp_utils.sandbox import ToolResult
from atp_utils.scenarios import preferences
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.scenarios.tool_use import alignment

pytestmark = pytest.mark.timeout(3600)

EVOLVE = parameters.EVOLVE
# One arm a family: merging an adapter is tried on both, and both kinds of adapter are. The other arm of each is trained
# for one scenario, without an evolution.
ARMS = dict(zip(FAMILIES, ("dpo", "grpo"), strict=True))
PAIRS = [(scenario, family) for scenario in SCENARIOS for family in FAMILIES]
TRAININGS = [(*pair, ARMS[pair[1]]) for pair in PAIRS]
TRAININGS += [("role_play", family, arm) for family, arm in zip(FAMILIES, reversed(ARMS.values()), strict=True)]
ELICITED = [(scenario, family) for scenario, family, method in TRAININGS if method == "dpo"]
DATA = {"train_per_environment": 2, "test_per_environment": 2, "instances_per_game": 2}
DATA |= {"simple_problems": 8, "complex_problems": 8, "simple_test": 4, "complex_test": 4}
SMALLEST = {
    "01_generate_data": DATA | {"problem_source": "generated"},
    "02_align_dpo": {"max_steps": 1, "accumulation": 1, "max_new_tokens": 8, "launcher": ""},
    "02_align_dpo/tool_use": {"samples_per_problem": 1},
    "03_align_grpo": {"max_steps": 1, "accumulation": 1, "max_new_tokens": 8, "launcher": "", "use_vllm": False},
    "04_evolve_role_play": {"seeds": [0], "rounds": 2, "items": 2, "max_new_tokens": 8},
    "05_evolve_tool_use": {"seeds": [0], "rounds": 2, "simple_per_round": 1, "complex_per_round": 2},
    "06_evolve_collusion": {"seeds": [0], "rounds": 2, "agents": 2, "thresholds": [2], "payoffs": [[1.2, 1.0, 0.8]]},
}
for book in ("05_evolve_tool_use", "06_evolve_collusion"):
    SMALLEST[book]["max_new_tokens"] = 8


class Run:
    """Where one pass through the profile keeps its files, and how a notebook of it is run."""

    def __init__(self, folder: Path, tiny: dict[str, str]):
        self.folder, self.tiny = folder, tiny
        self.profile = folder / "paper.yaml"
        paper = yaml.safe_load((ROOT / "profiles/paper.yaml").read_text())
        paper["models"] = {tiny[family]: paper["models"][HUB_IDS[family]] for family in FAMILIES}
        for key, values in paper["notebooks"].items():
            values |= SMALLEST[key.partition("/")[0]] | SMALLEST.get(key, {})
        self.profile.write_text(yaml.safe_dump(paper))

    def settings(self, book, scenario, family):
        return profiles.read_profile(str(self.profile)).parameters(book, scenario, self.tiny[family])

    def adapter(self, scenario, family, method):
        return self.folder / "adapters" / scenario / family / method

    def pairs(self, scenario, family):
        """Where notebook 2 keeps the replies that it makes pairs from."""
        return runs.Run("02_align_dpo", None, self.adapter(scenario, family, "dpo")).beside("written")

    def own(self, scenario, family):
        """The replies to notebook 2 that the model wrote itself."""
        replies = journal.read_record(self.pairs(scenario, family) / "replies.jsonl").replies
        return list(replies.values())[self.written[scenario, family] :]

    def evolution(self, scenario, family):
        return self.folder / "evolution" / scenario / family

    def book(self, name, out, **given):
        """Run a notebook as the pipeline does; its standard error where it fails."""
        command = [sys.executable, "-m", "atp_utils.run", f"notebooks/{name}.ipynb"]
        log = self.folder / "notebooks" / f"{'-'.join(out.relative_to(self.folder).parts)}.ipynb"
        command += [str(log), "--profile", str(self.profile), "-p", "out", str(out)]
        command += [word for key, value in given.items() for word in ("-p", key, str(value))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return f"{name} {given}: {done.stderr[-2000:]}" if done.returncode else ""


def readable_reply(run, scenario, family):
    """Journal replies to the first training prompt, as if the model had written them: thinking, reasons, an answer."""
    settings = run.settings("02_align_dpo", scenario, family)
    sampling = Sampling(settings.max_new_tokens, settings.temperature)
    protocol, own = Protocol(settings.protocol, settings.max_attempts, sampling), SCENARIOS[scenario]
    item = own.training_items(own.read_items("train", run.folder / "data"), "dpo")[0]
    if scenario == "tool_use":
        ways = {"count": settings.samples_per_problem, "run_tool": lambda _: ToolResult("ok", item.answer, "", 0.0)}
        episode = alignment.sampling(item, protocol, seed=settings.seed, **ways)
    else:
        episode = preferences.elicitation(item, own.opening, protocol, settings.seed)

    def rule(request):
        words = "I guess \\boxed{7}." if scenario == "tool_use" else f"So {answer_json(request.key.split('/')[2])}"
        return f"<think>\nHm.\n</think>\n\n{words}"

    engine = ScriptedEngine(rule, identity=TransformersEngine(run.tiny[family]).identity)
    with journal.Journal(run.pairs(scenario, family)) as record:
        loop.run_all([episode], engine, record)
        return record.paid


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The finished pass: data, then all trainings, then all evolutions; two notebooks at a time."""
    run = Run(tmp_path_factory.mktemp("paper"), tiny)
    data = run.folder / "data"
    failed = [run.book("01_generate_data", data)]
    assert not any(failed), failed
    run.written = {(scenario, family): readable_reply(run, scenario, family) for scenario, family in ELICITED}

    def align_one(job):
        scenario, family, method = job
        given = {"model": tiny[family], "scenario": scenario, "data": data}
        return run.book(parameters.ALIGN[method], run.adapter(*job), **given)

    def evolve_one(job):
        scenario, family = job
        given = {"model": tiny[family], "arm": ARMS[family], "adapter": run.adapter(*job, ARMS[family])}
        given |= {"data": data}
        return run.book(EVOLVE[scenario], run.evolution(*job), **given)

    with ThreadPoolExecutor(2) as pool:
        failed = [*pool.map(align_one, TRAININGS), *pool.map(evolve_one, PAIRS)]
    assert not any(failed), "\n".join(filter(None, failed))
    return run


@pytest.mark.parametrize(("scenario", "family", "method"), TRAININGS)
def test_adapters_are_trained_with_the_papers_settings(run, scenario, family, method):
    folder = run.adapter(scenario, family, method)
    # DPO leaves an adapter, GRPO a whole model.
    assert models.check_adapter(folder, run.tiny[family]) == (method == "dpo")
    manifest, log = json.loads((folder / "manifest.json").read_text()), pd.read_csv(folder / "training_log.csv")
    assert manifest["steps"] == len(log) == 1
    paper = profiles.read_profile("paper").parameters(parameters.ALIGN[method], scenario, HUB_IDS[family])
    same = {"learning_rate", "beta", "lora_rank", "epochs", "batch_size", "temperature", "checkpoint_activations"}
    for name in same | {"scheduler", "warmup_ratio", "thinking"}:
        assert manifest["settings"][name] == getattr(paper, name), name
    if method == "grpo":
        assert manifest["settings"]["group_size"] == paper.group_size and log["kl"].notna().all()
    else:
        # Before the first step the policy is the reference: log 2. One pair was written; a random model that happens
        # to end its words within the limit has given the other side of one more.
        assert log["loss"][0] == pytest.approx(0.6931, abs=1e-3)
        assert 1 <= manifest["rows"] <= 1 + sum(reply.finish_reason == "stop" for reply in run.own(scenario, family))


@pytest.mark.parametrize(("scenario", "family"), ELICITED)
def test_garbage_makes_no_pairs(run, scenario, family):
    own = run.own(scenario, family)
    assert len([reply for reply in own if reply.finish_reason == "length"]) > 0
    assert all(reply.completion_tokens <= 8 for reply in own)


@pytest.mark.parametrize(("scenario", "family"), PAIRS)
def test_evolutions_count_what_cannot_be_read(run, scenario, family):
    folder, sizes = run.evolution(scenario, family), SMALLEST[EVOLVE[scenario]]
    table = pd.read_parquet(folder / "decisions.parquet")
    games = 7 * sizes.get("agents", 0)
    problems = sizes.get("simple_per_round", 0) + sizes.get("complex_per_round", 0)
    assert len(table) == sizes["rounds"] * {"role_play": 2, "collusion": games, "tool_use": problems}[scenario]
    assert (
        set(table["arm"]) == {ARMS[family]} and table["p_deviate"].isna().all() and (table["prompt_tokens"] > 0).all()
    )
    invalid = table[~table["valid"]]
    paper = profiles.read_profile("paper").parameters(EVOLVE[scenario], None, HUB_IDS[family])
    assert len(invalid) > 0 and (invalid["attempts"] == paper.max_attempts).all()
    assert invalid[["deviated", "choice", "reward"]].isna().all(axis=None)
