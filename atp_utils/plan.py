"""``python -m atp_utils.plan PROFILE``: what `make reproduce` would run, and what it would cost, before it runs.

Every job of the pipeline with its tokens, GPU hours and memory, and which table or figure of the paper it makes. No
model is loaded and nothing is written.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pandas as pd

from atp_utils import costs, models, parameters, resolve, workload
from atp_utils.costs import Architecture, Machine
from atp_utils.workload import Replies, Workload

# What the paper shows of each scenario, and of which models.
QWEN, LLAMA = "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct"
PAPER = {
    "role_play": (("Table 1",), (QWEN, LLAMA)),
    "tool_use": (("Table 2",), (QWEN,)),
    "collusion": (("Figure 3", "Figure 4", "Figure 5", "Figure 6"), (QWEN,)),
}
# Parameters that change what is learnt or said, and not how much of it there is.
FREE = {"temperature", "top_p", "top_k", "learning_rate", "beta", "warmup_ratio", "save_steps"}
NOTE = """\
Tokens are counted on the real prompts with the tokenizer of {tokenizer}; another one differs by
some per cent. Generated problems stand in for those of the hub. Assumed, not measured:
  replies   {replies} (--reply-tokens), valid at once;
            {visible} tokens of them stay in the history (--answer-tokens)
  device    {device}: {mfu:.0%} of its operations a second (--mfu)
            and {bandwidth:.0%} of its bandwidth (--bandwidth-share)
  decoding  in process; a step takes {step:.0f} ms at least (--step-ms), and {draw:.0f} ns a row and
            vocabulary entry for random numbers (--draw-ns)
h is the estimate on one device, h max the same with every reply at its limit, GB the memory that
this would take. How far off such an estimate can be: docs/scale.md. Tokens are in millions:
prompts as they are sent, fresh what is not kept from the round before, trained in all steps.
A column says for which tables (T) and figures (F) of the paper a job is."""


@dataclass(frozen=True)
class Job:
    """One job of the pipeline; ``makes`` are the tables and figures of the paper that need it."""

    rule: str
    scenario: str = ""
    model: str = ""
    arm: str = ""
    makes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What Snakemake says when the job starts, without the run's folder."""
        if self.rule == "align":
            return f"align: {self.arm} of {self.model} on {self.scenario}"
        return f"{self.rule}: " + ", ".join(filter(None, (self.scenario, self.model, self.arm)))


@dataclass(frozen=True)
class Estimate:
    """Tokens, hours on one device (and with every reply at its limit) and bytes of a job."""

    chats: int = 0
    prompts: float = 0
    fresh: float = 0
    replies: float = 0
    trained: float = 0
    hours: float = 0
    most: float = 0
    memory: float = 0
    devices: int | None = 0


def jobs(profile: parameters.Profile) -> list[Job]:
    """The pipeline's jobs in the order in which they can run, as the Snakefile makes them from the same profile."""
    everything = tuple(name for scenario in profile.scenarios for name in PAPER[scenario][0])
    found = [Job("data", makes=everything)]
    for model in profile.models:
        for scenario in profile.scenarios:
            makes = PAPER[scenario][0]
            arms = [arm for arm in profile.arms if arm != "base"]
            found += [Job("align", scenario, model, arm, makes) for arm in arms]
            found += [Job("evolve", scenario, model, arm, makes) for arm in profile.arms]
    return found + [Job("figures", scenario=book, makes=drawn_by(book)) for book in profile.figures]


def drawn_by(book: str) -> tuple[str, ...]:
    """The tables and figures of the paper that a notebook's headings name."""
    cells = json.loads(resolve(f"notebooks/{book}.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return tuple(re.findall(r"^## ((?:Table|Figure) \d+)", text, re.MULTILINE))


class Planner:
    """Workloads and estimates of a profile's jobs on a ``machine``, with ``replies`` of an assumed length."""

    def __init__(self, profile: parameters.Profile, machine: Machine, replies: Replies):
        self.profile, self.machine, self.replies = profile, machine, replies
        self.tokenizer = models.load_tokenizer(models.EMBEDDED)
        self.architecture = cache(costs.read_architecture)
        self._items, self._workload = cache(self._make_items), cache(self._measure)

    def settings(self, book: str, scenario: str | None = None, model: str | None = None) -> dict:
        """All parameters of a notebook's run: the profile's, and the notebook's own where it says nothing."""
        return dict(parameters.defaults_of(book)) | self.profile.parameters(book, scenario, model)

    def workload(self, job: Job) -> Workload:
        """What a job asks of its model; nothing for data and figures."""
        if job.rule not in ("align", "evolve"):
            return Workload()
        book = parameters.ALIGN[job.arm] if job.rule == "align" else parameters.EVOLVE[job.scenario]
        settings = self.settings(book, job.scenario if job.rule == "align" else None, job.model)
        # One value for all, so that models that differ in these only are measured once.
        kept = {name: 1 if name in FREE else value for name, value in settings.items() if name not in ("model", "arm")}
        return self._workload(job.rule, job.scenario, job.arm if job.rule == "align" else "", json.dumps(kept))

    def _make_items(self, scenario: str, split: str) -> list:
        return workload.items_of(self.settings("01_generate_data"), scenario, split)

    def _measure(self, rule: str, scenario: str, method: str, settings: str) -> Workload:
        values = json.loads(settings)
        if rule == "align":
            items = self._items(scenario, "train")
            return workload.alignment(method, scenario, values, items, self.tokenizer, self.replies)
        items = [] if scenario == "collusion" else self._items(scenario, "test")
        return workload.evolution(scenario, values, items, self.tokenizer, self.replies)

    def estimate(self, job: Job) -> Estimate:
        """The job's tokens, hours and memory."""
        load = self.workload(job)
        if not (load.calls or load.training):
            return Estimate()
        arch, chats, training = self.architecture(job.model), load.chats, load.training
        counts = {"chats": len(chats)}
        counts |= {"prompts": sum(c.prompt for c in chats), "fresh": sum(c.fresh for c in chats)}
        counts |= {"replies": sum(c.written for c in chats)}
        if training:
            rows, mean = training.steps * training.step_rows, training.mean
            counts["trained"] = rows * (mean.prompt + mean.scored)
            if training.generated:
                written = {"chats": rows, "prompts": rows * mean.prompt, "replies": rows * mean.written}
                counts = {name: counts[name] + written.get(name, 0) for name in counts}
                counts["fresh"] = counts["prompts"]
        memory = self.memory(arch, load)
        return Estimate(
            **counts,
            hours=self.seconds(arch, load) / 3600,
            most=self.seconds(arch, load.at_limit()) / 3600,
            memory=memory,
            devices=costs.devices_needed(arch, memory, self.machine.device),
        )

    def seconds(self, arch: Architecture, load: Workload) -> float:
        """Seconds on one device for a workload: its engine calls, then its training steps."""
        total = sum(self.machine.answer(arch, call) for call in load.calls)
        if load.training:
            training, mean, compact = load.training, load.training.mean, self.machine.device.compact
            step = costs.training_flops(arch, mean, training.checkpointed, compact) * training.step_rows
            total += training.steps * self.machine.compute(step)
            if training.generated:
                batch = [replace(mean, scored=0)] * training.step_rows
                total += training.steps * (self.machine.read(arch, batch) + self.machine.write(arch, batch))
        return total

    def memory(self, arch: Architecture, load: Workload) -> float:
        """Bytes at the job's fullest moment, every reply at its limit."""
        needed = self.machine.inference_bytes(arch, load.calls) if load.calls else 0.0
        if load.training:
            training = load.at_limit().training
            longest = max(training.rows, key=lambda row: row.prompt + row.scored)
            micro = [longest] * training.micro_rows
            step = costs.training_bytes(arch, training.rank, micro, training.checkpointed)
            if training.generated:
                rows = training.step_rows * (longest.prompt + longest.limit)
                step = max(step, costs.BYTES * arch.parameters + arch.kv_bytes(rows))
            needed = max(needed, step)
        return needed


def table(found: Sequence[tuple[Job, Estimate]]) -> pd.DataFrame:
    """One row a job of one model, and their sum; tokens in millions, memory in GB (10^9 bytes).

    ``for`` are the tables (T) and figures (F) of the paper that need the job.
    """
    rows = [
        {"job": f"{job.rule} {job.scenario} {job.arm}", "chats": cost.chats}
        | {name: getattr(cost, name) / 1e6 for name in ("prompts", "fresh", "replies", "trained")}
        | {"h": cost.hours, "h max": cost.most, "GB": cost.memory / 1e9, "fits": _fits(cost.devices)}
        | {"for": _short(job.makes)}
        for job, cost in found
    ]
    frame = pd.DataFrame(rows).set_index("job")
    sums = frame.drop(columns=["GB", "fits", "for"]).sum()
    frame.loc["sum"] = {**sums, "GB": frame["GB"].max(), "fits": "", "for": ""}
    return frame.astype({"chats": int}).rename_axis(None)


def _short(makes: Sequence[str]) -> str:
    """Names of tables and figures by their letter: ``T1``, ``F3-6``."""
    numbers = [name.split()[1] for name in makes]
    return f"{makes[0][0]}{numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")


def _fits(devices: int | None) -> str:
    if devices is None:
        return "smaller batch"
    return "1 device" if devices <= 1 else f"FSDP x{devices}"


def text(planner: Planner, name: str) -> str:
    """The plan as plain text, less than 100 columns wide."""
    found = [(job, planner.estimate(job)) for job in jobs(planner.profile)]
    kinds = {rule: sum(job.rule == rule for job, _ in found) for rule in ("data", "align", "evolve", "figures")}
    parts = [f"Plan of profile {name}: {len(found)} jobs ({', '.join(f'{n} {rule}' for rule, n in kinds.items())})"]
    parts.append(_note(planner))
    for model in planner.profile.models:
        arch = planner.architecture(model)
        parts.append(
            f"{model}: {arch.parameters / 1e9:.3f} billion parameters, {arch.kv_bytes(1) / 1e3:.0f} kB of keys and "
            f"values a token\n(configuration: {arch.source})"
        )
        parts.append(_plain(table([(job, cost) for job, cost in found if job.model == model])))
    spent = [cost for _, cost in found]
    parts.append(
        f"Total on one device: {sum(c.hours for c in spent):.1f} h, with every reply at its limit "
        f"{sum(c.most for c in spent):.1f} h;\n{sum(c.prompts for c in spent) / 1e6:.1f} million tokens of prompts, "
        f"{sum(c.replies for c in spent) / 1e6:.1f} million of replies. Data and figures: minutes on a CPU."
    )
    return "\n\n".join([*parts, made(planner.profile)])


def made(profile: parameters.Profile) -> str:
    """Which jobs make which table or figure of the paper; what has none is said."""
    every, lines = jobs(profile), []
    for scenario, (names, published) in PAPER.items():
        for name in names:
            needed = [job for job in every if name in job.makes]
            runs = [job for job in needed if job.scenario == scenario]
            book = next((job.scenario for job in needed if job.rule == "figures"), None)
            if not runs or book is None:
                lines.append(f"{name}: NOT MADE by this profile")
                continue
            short = ", ".join(model.rpartition("/")[2] for model in published)
            lines.append(f"{name}: data, {_counted(runs)} of {scenario}, {book} (of {short})")
    return "Tables and figures of the paper\n" + "\n".join(f"  {line}" for line in lines)


def _counted(runs: Sequence[Job]) -> str:
    return ", ".join(f"{sum(job.rule == rule for job in runs)} {rule}" for rule in ("align", "evolve"))


def _note(planner: Planner) -> str:
    assumed, replies = planner.machine.assumed, planner.replies
    return NOTE.format(
        tokenizer=models.EMBEDDED,
        replies=f"{replies.written} tokens" if replies.written else "a quarter of their limit, 64 tokens at least",
        visible=replies.visible,
        device=planner.machine.device.name,
        mfu=assumed.mfu,
        bandwidth=assumed.bandwidth,
        step=assumed.step_seconds * 1e3,
        draw=assumed.draw_seconds * 1e9,
    )


def _plain(frame: pd.DataFrame) -> str:
    formats = dict.fromkeys(("prompts", "fresh", "replies", "trained", "h", "h max"), "{:.2f}".format)
    return frame.to_string(formatters=formats | {"GB": "{:.1f}".format}, line_width=200)


def _positive(value: str) -> float:
    number = float(value)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {value}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 for a profile or model that can't be read."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("profile", help="a name in profiles/, or a .yaml file")
    parser.add_argument("--device", choices=costs.DEVICES, help="default: cpu for the embedded model, else h100")
    parser.add_argument("--reply-tokens", type=int, help="length of a free reply; default: a quarter of its limit")
    parser.add_argument("--answer-tokens", type=int, default=Replies.visible, help="of these, kept in the history")
    parser.add_argument("--mfu", type=_positive, help="share of peak operations reached")
    parser.add_argument("--bandwidth-share", type=_positive, help="share of peak bandwidth reached")
    parser.add_argument("--step-ms", type=float, help="least milliseconds of a decoding step")
    parser.add_argument("--draw-ns", type=float, help="nanoseconds of random numbers a row and vocabulary entry")
    options = parser.parse_args(arguments)
    try:
        profile = parameters.read_profile(options.profile)
        device = options.device or ("cpu" if set(profile.models) == {models.EMBEDDED} else "h100")
        given = {"mfu": options.mfu, "bandwidth": options.bandwidth_share}
        given |= {"step_seconds": options.step_ms and options.step_ms / 1e3}
        given |= {"draw_seconds": options.draw_ns and options.draw_ns / 1e9}
        assumed = replace(costs.ASSUMED[device], **{k: v for k, v in given.items() if v is not None})
        machine = Machine(costs.DEVICES[device], assumed)
        print(text(Planner(profile, machine, Replies(options.reply_tokens, options.answer_tokens)), options.profile))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
