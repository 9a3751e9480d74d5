"""How often the intervals of `analysis/stats` hold the truth, by simulation, beside the percentile bootstrap.

The truth is known: clusters draw their rates from a beta distribution with a given mean and correlation within
clusters, rows from their cluster's rate; or rates are sums of a family's and an agent's effects (`crossed`). A
nominal 95 % interval should hold the mean in 95 % of the samples.

    python benchmarks/coverage.py [--samples 2000] [--write]

``--write`` puts the table into docs/statistics.md.
"""

import argparse
import re

import numpy as np
import pandas as pd

from atp_utils import resolve
from atp_utils.analysis import stats
from atp_utils.support import files

ROWS, RESAMPLES, PAGE = 12, 999, "docs/statistics.md"


def rates(rng, clusters, mean, correlation):
    """A rate: rows of clusters, and the truth."""
    shape = (1 - correlation) / correlation
    own = rng.beta(mean * shape, (1 - mean) * shape, clusters)
    return rng.binomial(1, own[:, None], (clusters, ROWS)).astype(float), mean


def changes(rng, clusters, mean, correlation):
    """A change between rounds, paired by cluster: each row is a difference of two decisions."""
    first, _ = rates(rng, clusters, mean, correlation)
    second, _ = rates(rng, clusters, mean / 2, correlation)
    return second - first, -mean / 2


def crossed(rng, clusters, mean, correlation):
    """A rate where rows share a cluster (family) and one of six agents, whose effects add up.

    Each of the two has half of the variance that ``correlation`` stands for. Sums are cut to [0, 1], which moves their
    mean: the truth is that of the rates as they are cut, by the midpoints of a grid.
    """
    most = np.sqrt(3 * correlation * mean * (1 - mean) / 2)
    family, agent = rng.uniform(-most, most, clusters), rng.uniform(-most, most, 6)
    grid = most * (2 * (np.arange(200) + 0.5) / 200 - 1)
    truth = float(np.clip(mean + grid[:, None] + grid, 0, 1).mean())
    return rng.binomial(1, np.clip(mean + family[:, None] + agent, 0, 1)).astype(float), truth


def ours(kind, sample):
    """Our interval of a sample [clusters, rows]."""
    clusters, rows = sample.shape
    units = [np.repeat(np.arange(clusters), rows)]
    if kind is crossed:
        units.append(np.tile(np.arange(rows), clusters))
    if kind is changes:
        return stats.interval(sample.mean(axis=1), np.arange(clusters), proportion=False)
    return stats.interval(sample.ravel(), *units)


def percentile(sample, rng):
    """The percentile bootstrap over clusters."""
    means = sample.mean(axis=1)
    drawn = means[rng.integers(0, len(means), (RESAMPLES, len(means)))].mean(axis=1)
    return np.quantile(drawn, (0.025, 0.975))


def coverage(kind, clusters, mean, correlation, samples):
    """Shares of samples in which either interval holds the truth, and in which ours can't be given."""
    rng, held, without = np.random.default_rng(0), np.zeros(2), 0
    for _ in range(samples):
        sample, truth = kind(rng, clusters, mean, correlation)
        found = ours(kind, sample)
        if np.isnan(found[0]):
            without += 1
            continue
        for place, (low, high) in enumerate((found, percentile(sample, rng))):
            held[place] += low <= truth <= high
    return *(100 * held / max(samples - without, 1)), 100 * without / samples


def main():
    """Print the table; with --write, put it into the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = [
        (kind.__name__, mean, correlation, clusters, *coverage(kind, clusters, mean, correlation, options.samples))
        for kind in (rates, changes, crossed)
        for mean in (0.5, 0.2)
        for correlation in (0.05, 0.3)
        for clusters in (4, 7, 16)
    ]
    names = ["measure", "mean", "correlation", "units", "ours, %", "percentile bootstrap, %", "no interval, %"]
    table = pd.DataFrame(rows, columns=names).round({name: 1 for name in names[4:]}).to_markdown(index=False)
    print(table)
    if options.write:
        page = resolve(PAGE)
        text = re.sub(r"\| measure .*?(?=\n\n)", lambda _: table, page.read_text(encoding="utf-8"), flags=re.DOTALL)
        files.write_text(page, text)


if __name__ == "__main__":
    main()
