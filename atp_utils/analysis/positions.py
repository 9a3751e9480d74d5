"""What a folder of results holds, and what its decisions owe to the place of an option."""

import numpy as np
import pandas as pd

from atp_utils.analysis import stats, verdicts


def contents(decisions: pd.DataFrame) -> pd.DataFrame:
    """What was run: decisions, invalid ones, items, seeds and rounds by scenario, condition, model and arm.

    Where replies were cut by the token limit before their answer, those are counted beside the invalid decisions that
    they made.
    """
    groups = decisions.groupby(["scenario", "condition", "model", "arm"], observed=True)
    counts = groups.agg(
        decisions=("valid", "size"), valid=("valid", "sum"), items=("item", "nunique"), seeds=("seed", "nunique"),
        rounds=("round", "nunique"), scored=("p_deviate", "count"),
    )  # fmt: skip
    counts.insert(1, "invalid", counts["decisions"] - counts.pop("valid").astype(int))
    cut = decisions["fault"].eq(stats.CUT).fillna(False).groupby([decisions[name] for name in groups.keys]).sum()
    if cut.any():
        counts.insert(2, "cut", cut.astype(int))
    return counts.assign(protocol=np.where(counts.pop("scored") > 0, "choose", "reason"))


def position_table(decisions: pd.DataFrame) -> pd.DataFrame:
    """P(deviate) where the deviant option is named first, and second, their difference, and the mass of both answers.

    In percent, with 95 % intervals over environments or games, in tool use over problem families and agents: one row a
    model, arm and measure, one column a round. Every forced choice is scored in both orders, so these are of the same
    decisions, all of one scenario. Empty for free text.
    """
    known = decisions[decisions["p_first"].notna()]
    rows, units = verdicts.with_units(known, known["scenario"].iloc[0] if len(known) else "")
    rows = rows.assign(place=rows["p_first"] - rows["p_second"])
    parts = []
    for measure, value in (
        ("P(deviate), deviant option first", "p_first"),
        ("P(deviate), deviant option second", "p_second"),
        ("first minus second", "place"),
        ("probability of both answers", "mass"),
    ):
        table = stats.rate_table(rows, value, units=units, proportion=value != "place")
        parts.append(table.assign(measure=measure, cell=stats.cells(table)))
    cells = pd.concat(parts, ignore_index=True)
    index = ["model", "arm", "measure"]
    wide = stats.by_round(cells, index)
    wide.insert(0, "n a round", cells.groupby(index)["n"].min())
    return wide
