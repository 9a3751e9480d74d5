"""What a profile takes on GPUs that aren't at hand: a roofline, so an estimate; `make pilot` measures, where they are.

Jobs, decisions and steps are the profile's own numbers. All else is assumed here: reading costs 2 operations a weight
and token, training 8 (activations are computed again), the reference and TRL's second look at the policy 2 each;
writing loads the weights and the batch's keys and values for every token. A batch takes as long as its longest reply.

    python benchmarks/plan.py paper --gpus 8 --dollars PRICE_OF_A_GPU_HOUR
"""

import argparse
import math
from dataclasses import dataclass

import pandas as pd

from atp_utils.parameters import ALIGN, EVOLVE
from atp_utils.profiles import read_profile
from atp_utils.runs import Run
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.training import pairs, trainer

# An H100 with 80 GB as its maker describes it, and the share of it that programs reach as a rule.
OPERATIONS, BANDWIDTH, MEMORY = 0.4 * 989e12, 0.6 * 3.35e12, 80e9
# Weights, and bytes of keys and values of a token, of the two models in bfloat16.
MODELS = {"Qwen/Qwen3-8B": (8.2e9, 147_456), "meta-llama/Llama-3.1-8B-Instruct": (8.0e9, 131_072)}
# Tokens of a first prompt (the recorded runs'), and what a round adds to it.
PROMPTS = {"role_play": (180, 250), "collusion": (160, 250), "tool_use": (220, 120)}
LOADING = 120  # seconds a job


@dataclass(frozen=True)
class Replies:
    """Tokens of a reply on average, and of the longest of a batch; both bounded by the limit."""

    mean: float
    longest: float

    def within(self, limit: int) -> tuple[float, float]:
        return min(self.mean, limit), min(self.longest, limit)


TYPICAL, FULL = Replies(1500, 6000), Replies(math.inf, math.inf)


def writing(model: str, rows: int, prompt: float, reply: tuple[float, float], at_once: float) -> float:
    """Seconds in which one copy of the model writes so many replies, ``at_once`` of them in a batch."""
    weights, token = MODELS[model]
    batch = min(rows, max(1, int(at_once)))
    step = (2 * weights + batch * token * (prompt + reply[0])) / BANDWIDTH
    reading = 2 * weights * rows * prompt / OPERATIONS
    return math.ceil(rows / batch) * reply[1] * step + reading


def evolution(profile, scenario: str, model: str, replies: Replies, gpus: int, served: bool) -> float:
    """Seconds of all evolutions of a scenario and model: in process, one a GPU, or one by one on a server a GPU."""
    given = profile.parameters(EVOLVE[scenario], None, model)
    own, (first, more) = SCENARIOS[scenario], PROMPTS[scenario]
    weights, token = MODELS[model]
    conditions = sum(name == scenario for name, _ in profile.evolutions)
    # A round's chats, in as many turns as follow each other: tool use has two blocks with a call each.
    turns = 4 if scenario == "tool_use" else 1
    rows = own.decisions(given, len(own.test_items(given))) / given.rounds / turns
    reply, seconds = replies.within(given.max_new_tokens), LOADING
    for number in range(given.rounds):
        prompt = first + more * number
        if served:
            # A server puts a new chat where one has ended; the longest reply is waited for once.
            room = (0.9 * MEMORY - 2 * weights) / (token * (prompt + reply[0]))
            share = rows / gpus
            seconds += turns * max(
                writing(model, share, prompt, (reply[0], reply[0]), room), writing(model, 1, prompt, reply, 1)
            )
        else:
            room = 0.7 * (MEMORY - 2 * weights) / (token * (prompt + given.max_new_tokens))
            fresh = first if number == 0 else more
            seconds += turns * writing(model, rows, prompt, reply, min(room, 16384 / fresh))
    return seconds * len(profile.arms) * conditions / (1 if served else gpus)


def training(profile, scenario: str, model: str, method: str, replies: Replies, gpus: int) -> tuple[int, float]:
    """Steps and seconds of a training on all GPUs, its written pairs or replies included."""
    given = profile.parameters(ALIGN[method], scenario, model)
    run, (first, _) = Run(ALIGN[method], given, None, SCENARIOS[scenario]), PROMPTS[scenario]
    items, (weights, token) = len(pairs.training_items(run, method)), MODELS[model]
    reply = replies.within(given.max_new_tokens)
    if method == "dpo":
        count, asked = min(items * given.samples_per_problem, given.max_pairs), items * (2 + given.samples_per_problem)
        room = 0.7 * (gpus * MEMORY - 2 * weights) / (token * (first + given.max_new_tokens))
        once = writing(model, asked, first, reply, min(room, 16384 / first))
        tokens, operations, each = 2 * given.accumulation * (first + reply[0]), 8, 0.0
    else:
        count, once = 2 * items, 0.0
        rows = given.accumulation * given.group_size
        tokens, operations = rows * (first + reply[0]), 8 + 2 + 2
        each = writing(model, rows / gpus, first, reply, 64)
    steps = trainer.steps(given, count)
    return steps, LOADING + once + steps * (each + tokens * weights * operations / (gpus * OPERATIONS))


def plan(profile, replies: Replies, gpus: int) -> pd.DataFrame:
    """Hours of each kind of job, on all GPUs at a time."""
    rows = []
    for name in profile.scenarios:
        for arm in (arm for arm in profile.arms if arm != "base"):
            found = [training(profile, name, model, arm, replies, gpus) for model in profile.models]
            rows.append(
                (f"{arm}, {name}", sum(steps for steps, _ in found), sum(seconds for _, seconds in found) / 3600)
            )
    for served in (False, True):
        for name in profile.scenarios:
            seconds = sum(evolution(profile, name, model, replies, gpus, served) for model in profile.models)
            rows.append((f"evolutions{', served' * served}, {name}", None, seconds / 3600))
    return pd.DataFrame(rows, columns=["job", "steps", "hours"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("profile")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--dollars", type=float, help="what a GPU costs an hour")
    options = parser.parse_args()
    profile = read_profile(options.profile)
    tables = {name: plan(profile, replies, options.gpus) for name, replies in (("typical", TYPICAL), ("full", FULL))}
    both = tables["typical"].assign(at_limit=tables["full"]["hours"])
    print(both.to_string(index=False, float_format="{:.2f}".format, na_rep=""))
    served, here = both["job"].str.contains("served"), both["job"].str.contains("evolutions, (?!served)")
    for name, kept in (("all in process", ~served), ("evolutions served", ~here)):
        hours = both[kept][["hours", "at_limit"]].sum() * options.gpus
        print(f"{name}: {hours.iloc[0]:.0f} GPU hours, {hours.iloc[1]:.0f} with every reply at its limit", end="")
        print("" if options.dollars is None else "; $" + " to ".join(f"{h * options.dollars:,.0f}" for h in hours))


if __name__ == "__main__":
    main()
