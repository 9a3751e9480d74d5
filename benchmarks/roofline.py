"""Holds the plan's roofline against this repository's recorded timings: predicted beside measured seconds.

The CPU's rate is fitted to one of them, the DPO step; the others say how far an estimate is off. No model runs.

    python benchmarks/roofline.py
"""

import pandas as pd

from atp_utils import costs, models, parameters, plan, workload
from atp_utils.costs import Chat, Machine
from atp_utils.workload import Replies

# Seconds on two cores of an AMD EPYC, bfloat16: benchmarks/evolution.py (64 items, 6 rounds) and single training steps
# of the laptop profile (a range where steps differed).
MEASURED = {"choose": (42.8, 42.8), "reason": (130.2, 130.2), "dpo": (16.0, 17.0), "grpo": (19.0, 21.0)}


def predicted(machine):
    """Seconds of each of `MEASURED` by the roofline."""
    arch = costs.read_architecture(models.EMBEDDED)
    planner = plan.Planner(parameters.read_profile("laptop"), machine, Replies())
    items = workload.items_of(planner.settings("01_generate_data"), "role_play", "test")
    settings = planner.settings("04_evolve_role_play") | {"seeds": [0]}
    chosen = workload.evolution("role_play", settings, items, planner.tokenizer, planner.replies)
    # Of the free replies nearly none is valid: the history stays as it was, and a round reads one token anew.
    first = [Chat(chat.prompt, chat.prompt, written=64, limit=64) for chat in chosen.calls[0]]
    later = [Chat(chat.prompt, 1, written=64, limit=64) for chat in first]
    steps = {}
    for method in ("dpo", "grpo"):
        job = plan.Job("align", "role_play", models.EMBEDDED, method)
        load = planner.workload(job)
        steps[method] = planner.seconds(arch, load) / load.training.steps
    return {
        "choose": planner.seconds(arch, chosen),
        "reason": machine.answer(arch, first) + 5 * machine.answer(arch, later),
        **steps,
    }


def main():
    """Print the table."""
    rows = predicted(Machine(costs.DEVICES["cpu"], costs.ASSUMED["cpu"]))
    frame = pd.DataFrame(
        {
            "measured, s": {
                name: f"{low:g}" if low == high else f"{low:g}-{high:g}" for name, (low, high) in MEASURED.items()
            },
            "predicted, s": {name: round(value, 1) for name, value in rows.items()},
            "predicted / measured": {name: round(2 * rows[name] / sum(MEASURED[name]), 2) for name in MEASURED},
        }
    )
    print(frame.to_markdown())


if __name__ == "__main__":
    main()
