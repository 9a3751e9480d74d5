"""Families of complex problems: counting and dynamic programming (paper, Appendix A.1.2).

The paper takes its complex problems ("multi-step algorithmic reasoning, combinatorial calculations, or
advanced algebraic manipulations") from OpenThoughts. The families here and in `algebra` stand in for them where the
hub can't be reached: short code solves them, mental arithmetic doesn't.
"""

import itertools
import math

from atp_utils.problems.families import family, listed, rows

# --- counting ------------------------------------------------------------------------------------------


@family(
    make=lambda rng: dict(limit=rng.randint(2000, 9999), modulus=rng.randint(3, 9), digit=rng.randint(1, 9)),
    text=lambda limit, modulus, digit: (
        f"How many integers from 1 to {limit} have a digit sum divisible by {modulus} and do not contain "
        f"the digit {digit}?"
    ),
)
def digit_count(limit, modulus, digit):
    # Digits from the left; state: (digit sum mod modulus, do all digits so far equal the limit's?).
    states = {(0, True): 1}
    for top in map(int, str(limit)):
        following = {}
        for (total, tight), ways in states.items():
            for d in range(top + 1 if tight else 10):
                if d != digit:
                    key = (total + d) % modulus, tight and d == top
                    following[key] = following.get(key, 0) + ways
        states = following
    return states.get((0, True), 0) + states.get((0, False), 0) - 1  # without 0 itself


def _lattice_paths_make(rng):
    width, height = rng.randint(6, 10), rng.randint(6, 10)
    inner = list(itertools.product(range(1, width), range(1, height)))
    return dict(width=width, height=height, blocked=sorted(rng.sample(inner, rng.randint(3, 5))))


@family(
    make=_lattice_paths_make,
    text=lambda width, height, blocked: (
        f"A path goes from (0, 0) to ({width}, {height}) in unit steps, each to the right or up. How many "
        f"such paths avoid all of the points {listed(blocked)}?"
    ),
)
def lattice_paths(width, height, blocked):
    ways = {(0, 0): 1}
    for x in range(width + 1):
        for y in range(height + 1):
            if (x, y) in blocked:
                ways[x, y] = 0
            elif (x, y) != (0, 0):
                ways[x, y] = ways.get((x - 1, y), 0) + ways.get((x, y - 1), 0)
    return ways[width, height]


def _bounded_solutions_make(rng):
    a, b, c = rng.choice([abc for abc in itertools.combinations(range(2, 12), 3) if math.gcd(*abc) == 1])
    bound = rng.randint(15, 24)
    total = rng.randint((a + b + c) * bound // 3, (a + b + c) * bound // 2)  # amid the possible totals
    return dict(a=a, b=b, c=c, total=total, bound=bound)


@family(
    make=_bounded_solutions_make,
    text=lambda a, b, c, total, bound: (
        f"How many triples (x, y, z) of integers, each from 0 to {bound}, satisfy {a}x + {b}y + {c}z = {total}?"
    ),
)
def bounded_solutions(a, b, c, total, bound):
    ways = [1] + [0] * total  # ways[s]: choices of the variables so far whose terms sum to s
    for factor in (a, b, c):
        ways = [sum(ways[s - factor * x] for x in range(min(bound, s // factor) + 1)) for s in range(total + 1)]
    return ways[total]


@family(
    make=lambda rng: dict(forbidden=[sorted(rng.sample(range(1, 8), rng.randint(1, 3))) for _ in range(7)]),
    text=lambda forbidden: (
        "Seven workers, numbered 1 to 7, are each given one of seven jobs, numbered 1 to 7, and no two get "
        "the same job. "
        + " ".join(f"Worker {i} cannot do job {' or '.join(map(str, jobs))}." for i, jobs in enumerate(forbidden, 1))
        + " In how many ways can the jobs be given out?"
    ),
)
def assignments(forbidden):
    ways = {0: 1}  # set of jobs given out, as bits -> number of ways
    for banned in forbidden:
        following = {}
        for used, count in ways.items():
            for job in range(1, len(forbidden) + 1):
                if job not in banned and not used >> job & 1:
                    key = used | 1 << job
                    following[key] = following.get(key, 0) + count
        ways = following
    return sum(ways.values())


# --- dynamic programming -------------------------------------------------------------------------------


@family(
    make=lambda rng: dict(grid=[[rng.randint(1, 99) for _ in range(5)] for _ in range(5)]),
    text=lambda grid: (
        f"The rows of a 5 x 5 grid, from top to bottom, are: {rows(grid)}. A path starts in the top left "
        "cell and moves one cell to the right or down until it reaches the bottom right cell. What is the "
        "largest possible sum of the numbers on the path, both ends included?"
    ),
)
def grid_path(grid):
    best = {}
    for i, row in enumerate(grid):
        for j, number in enumerate(row):
            best[i, j] = number + max(best.get((i - 1, j), 0), best.get((i, j - 1), 0))
    return best[i, j]


@family(
    make=lambda rng: dict(
        weights=[rng.randint(5, 40) for _ in range(11)],
        values=[rng.randint(10, 99) for _ in range(11)],
        capacity=rng.randint(80, 130),
    ),
    text=lambda weights, values, capacity: (
        "Eleven parcels have the weights "
        + listed(weights)
        + " kg and, in the same order, the values "
        + listed(values)
        + " dollars. What is the largest total value, in dollars, of parcels that together "
        f"weigh at most {capacity} kg?"
    ),
)
def knapsack(weights, values, capacity):
    best = [0] * (capacity + 1)  # best[w]: the largest value of the parcels so far within weight w
    for weight, value in zip(weights, values, strict=True):
        for w in range(capacity, weight - 1, -1):
            best[w] = max(best[w], best[w - weight] + value)
    return best[capacity]
