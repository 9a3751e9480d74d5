"""Critical mass: from how an agent answers to what others did, to where a group of N ends up.

The response P(collude | own last choice, others who colluded) is measured behind written rounds, so that it can't owe
anything to who chose what before. From it follow, without a model: the mean map and its fixed points, the exact Markov
chain of N agents, its prediction of rounds that were played, hysteresis, and groups of any size. The chain remembers
one round; agents remember all, so that its misfit is a measure of what longer memory does.
"""

import numpy as np
import pandas as pd
from scipy.stats import binom

from atp_utils.analysis import stats

KEYS = ["model", "arm", "threshold", "incentive_ratio"]
ROUNDS = 50  # until groups are where they end


def response(decisions: pd.DataFrame) -> pd.DataFrame:
    """P(collude) by `KEYS`, own last choice and the number of others who colluded, with 95 % intervals over games.

    ``decisions`` are those behind written rounds. Columns: `KEYS`, own ("abstained", "colluded", or "start" without a
    round before), others, n, rate, low, high.
    """
    others = decisions["past_others"]
    own = decisions["past_deviant"].map({0: "abstained", 1: "colluded"}).where(others.notna(), "start")
    rows = decisions.assign(own=own, others=others.fillna(0).astype(int))
    return stats.rate_table(rows, stats.value_of(rows), (*KEYS, "own", "others")).drop(columns="invalid")


def curves(table: pd.DataFrame) -> tuple[float, np.ndarray, np.ndarray]:
    """P at the start, P by others after abstaining [N] and after colluding [N], of one group of `response`."""
    by = {own: rows.sort_values("others")["rate"].to_numpy() for own, rows in table.groupby("own")}
    return float(by["start"][0]), by["abstained"], by["colluded"]


def transitions(abstained: np.ndarray, colluded: np.ndarray, fixed: int = 0) -> np.ndarray:
    """Markov chain of N agents, N the length of the curves: P(y collude next | x collude) [N + 1, N + 1].

    The first ``fixed`` agents always collude; states below that number stay in the table and can't be reached.
    """
    size = len(abstained)
    chain = np.zeros((size + 1, size + 1))
    for now in range(size + 1):
        # Of those that colluded the fixed ones do so again; each sees the others, itself left out.
        again = max(now - fixed, 0)
        stay = colluded[max(now - 1, 0)] if again else 0.0
        join = abstained[min(now, size - 1)]
        free = size - max(now, fixed)
        moved = np.convolve(binom.pmf(range(again + 1), again, stay), binom.pmf(range(free + 1), free, join))
        chain[now, fixed : fixed + len(moved)] = moved
    return chain


def mean_map(abstained: np.ndarray, colluded: np.ndarray, points: int = 401) -> tuple[np.ndarray, np.ndarray]:
    """Shares x in [0, 1] and the expected share next, f(x), in a large group whose agents see shares as N ones do."""
    seen, x = np.linspace(0, 1, len(abstained)), np.linspace(0, 1, points)
    return x, x * np.interp(x, seen, colluded) + (1 - x) * np.interp(x, seen, abstained)


def fixed_points(x: np.ndarray, f: np.ndarray) -> list[tuple[float, bool]]:
    """(share, stable?) where f crosses the diagonal; an unstable one is the critical mass."""
    gap, found = f - x, []
    for place in np.flatnonzero(np.sign(gap[:-1]) * np.sign(gap[1:]) <= 0):
        if gap[place] == gap[place + 1] or (found and gap[place] == 0):
            continue
        share = x[place] + gap[place] / (gap[place] - gap[place + 1]) * (x[place + 1] - x[place])
        found.append((float(share), bool(gap[place + 1] < gap[place])))
    return found


def predicted(start: float, chain: np.ndarray, rounds: int) -> np.ndarray:
    """Expected share that colludes in each round [rounds], of agents who begin with probability ``start`` each."""
    size = len(chain) - 1
    state, shares = binom.pmf(range(size + 1), size, start), []
    for _ in range(rounds):
        shares.append(float(state @ np.arange(size + 1)) / size)
        state = state @ chain
    return np.array(shares)


def hysteresis(chain: np.ndarray, rounds: int = ROUNDS) -> tuple[float, float]:
    """Expected share after so many rounds, from nobody and from all: apart, the past decides; together, it is gone."""
    moved, size = np.linalg.matrix_power(chain, rounds), len(chain) - 1
    return float(moved[0] @ np.arange(size + 1)) / size, float(moved[-1] @ np.arange(size + 1)) / size


def simulate(
    abstained: np.ndarray, colluded: np.ndarray, agents: int, shares: np.ndarray | float, seed: int = 0
) -> np.ndarray:
    """Share after `ROUNDS` of groups of ``agents``, any number, one for each of the ``shares`` that they begin with."""
    rng, seen = np.random.default_rng(seed), np.linspace(0, 1, len(abstained))
    now = np.rint(np.asarray(shares) * agents).astype(int)
    for _ in range(ROUNDS):
        stay = np.interp(np.maximum(now - 1, 0) / max(agents - 1, 1), seen, colluded)
        join = np.interp(np.minimum(now, agents - 1) / max(agents - 1, 1), seen, abstained)
        now = rng.binomial(now, stay) + rng.binomial(agents - now, join)
    return now / agents


def dynamics(table: pd.DataFrame) -> pd.DataFrame:
    """What follows from a `response` table: one row a model, arm, threshold and ratio.

    Columns: `KEYS`, start, critical (unstable fixed points as text, or a dash), settles (stable ones), from_none,
    from_all (`hysteresis`).
    """
    rows = []
    for key, group in table.groupby(KEYS, sort=True, observed=True):
        start, abstained, colluded = curves(group)
        points = fixed_points(*mean_map(abstained, colluded))
        ends = hysteresis(transitions(abstained, colluded))
        named = [
            ", ".join(f"{share:.2f}" for share, stable in points if stable == kind) or "–" for kind in (False, True)
        ]
        rows.append((*key, start, *named, *ends))
    return pd.DataFrame(rows, columns=[*KEYS, "start", "critical", "settles", "from_none", "from_all"])


def committed(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the free agents that collude after `ROUNDS`, from nobody, beside 0, 1, ... that always do.

    One row a group of `KEYS`, one column a number of committed agents, up to all but one.
    """
    rows = {}
    for key, group in table.groupby(KEYS, sort=True, observed=True):
        _, abstained, colluded = curves(group)
        size = len(abstained)
        rows[key] = []
        for fixed in range(size):
            state = np.linalg.matrix_power(transitions(abstained, colluded, fixed), ROUNDS)[fixed]
            rows[key].append(float(state @ np.arange(size + 1) - fixed) / (size - fixed))
    index = pd.MultiIndex.from_tuples(rows, names=KEYS)
    return pd.DataFrame(list(rows.values()), index=index)


def beside(table: pd.DataFrame, played: pd.DataFrame) -> pd.DataFrame:
    """The chain's prediction of each round beside the rounds that were ``played``: `KEYS`, round, predicted, played."""
    rates = stats.rate_table(played, stats.value_of(played), (*KEYS, "round"))
    rows = []
    for key, group in table.groupby(KEYS, sort=True, observed=True):
        start, abstained, colluded = curves(group)
        own = rates[(rates[KEYS] == list(key)).all(axis=1)]
        shares = predicted(start, transitions(abstained, colluded), int(own["round"].max()) if len(own) else 0)
        rows += [(*key, row.round, shares[row.round - 1], row.rate, row.low, row.high) for row in own.itertuples()]
    return pd.DataFrame(rows, columns=[*KEYS, "round", "predicted", "played", "low", "high"])
