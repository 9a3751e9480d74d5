"""Families of complex problems: their solvers (paper, Appendix A.1.2).

The paper takes its complex problems ("multi-step algorithmic reasoning, combinatorial calculations, or advanced
algebraic manipulations") from OpenThoughts. These families stand in for them where the hub can't be reached: short
code solves them, mental arithmetic doesn't. ``data/environments/complex_problems.yaml`` words them and says what
their numbers are drawn from; where these depend on each other, ``draw_NAME`` draws them. A solver stands on its own:
its source is shown as a tool-assisted solution. Tests hold it against a second one that shares no method with it.
"""

import itertools
import math


def linear_recurrence(p, q, r, first, second, n, modulus):
    for _ in range(n):
        first, second = second, (p * second + q * first + r) % modulus
    return first % modulus


def draw_prime_sum(rng):
    classes = [dict(modulus=m, residue=r) for m in range(3, 12) for r in range(1, m) if math.gcd(m, r) == 1]
    return dict(limit=rng.randint(500, 3000), **rng.choice(classes))


def prime_sum(limit, modulus, residue):
    sieve = [False, False] + [True] * (limit - 2)
    for n in range(2, limit):
        if sieve[n]:
            for multiple in range(n * n, limit, n):
                sieve[multiple] = False
    return sum(n for n in range(limit) if sieve[n] and n % modulus == residue)


def divisor_sum(limit, skip):
    return sum(d * (limit // d) for d in range(1, limit + 1) if d % skip)  # d divides limit // d of them


def draw_remainders(rng):
    moduli = sorted(rng.sample([7, 11, 13, 17, 19, 23, 25, 27, 29, 31, 32, 37], 3))  # pairwise coprime
    return dict(moduli=moduli, residues=[rng.randint(1, m - 1) for m in moduli])


def remainders(moduli, residues):
    x = residues[-1]
    while [x % m for m in moduli] != residues:
        x += moduli[-1]
    return x


def determinant(matrix):
    if not matrix:
        return 1
    top, rest = matrix[0], matrix[1:]
    return sum(
        (-1) ** j * top[j] * determinant([row[:j] + row[j + 1 :] for row in rest]) for j in range(len(top)) if top[j]
    )


def polynomial_root(a, b, c):
    low, high = 0, 2000 * (1 + a + b + c)  # bisection over x = t / 2000, in whole numbers
    while high - low > 1:
        t = (low + high) // 2
        if t**3 + a * 2000 * t**2 - b * 2000**2 * t - c * 2000**3 <= 0:
            low = t
        else:
            high = t
    return (low + 1) // 2 / 1000  # low / 2000 <= x < (low + 1) / 2000


def root_power_sum(a, b, c, k):
    sums = [3, -a, a * a - 2 * b]  # Newton's identities
    while len(sums) <= k:
        sums.append(-a * sums[-1] - b * sums[-2] - c * sums[-3])
    return sums[k]


def josephus(people, step):
    survivor = 0
    for size in range(2, people + 1):
        survivor = (survivor + step) % size
    return survivor + 1


def pile_game(piles, most):
    # Each pile is worth its size modulo most + 1; the second player wins where the three xor to zero.
    a, b, c = piles
    return sum(
        (x % (most + 1)) ^ (y % (most + 1)) ^ (z % (most + 1)) == 0
        for x in range(1, a + 1)
        for y in range(1, b + 1)
        for z in range(1, c + 1)
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


def draw_lattice_paths(rng):
    width, height = rng.randint(6, 10), rng.randint(6, 10)
    inner = list(itertools.product(range(1, width), range(1, height)))
    return dict(width=width, height=height, blocked=sorted(rng.sample(inner, rng.randint(3, 5))))


def lattice_paths(width, height, blocked):
    ways = {(0, 0): 1}
    for x in range(width + 1):
        for y in range(height + 1):
            if (x, y) in blocked:
                ways[x, y] = 0
            elif (x, y) != (0, 0):
                ways[x, y] = ways.get((x - 1, y), 0) + ways.get((x, y - 1), 0)
    return ways[width, height]


def draw_bounded_solutions(rng):
    a, b, c = rng.choice([abc for abc in itertools.combinations(range(2, 12), 3) if math.gcd(*abc) == 1])
    bound = rng.randint(15, 24)
    total = rng.randint((a + b + c) * bound // 3, (a + b + c) * bound // 2)  # amid the possible totals
    return dict(a=a, b=b, c=c, total=total, bound=bound)


def bounded_solutions(a, b, c, total, bound):
    ways = [1] + [0] * total  # ways[s]: choices of the variables so far whose terms sum to s
    for factor in (a, b, c):
        ways = [sum(ways[s - factor * x] for x in range(min(bound, s // factor) + 1)) for s in range(total + 1)]
    return ways[total]


def draw_assignments(rng):
    return dict(forbidden=[sorted(rng.sample(range(1, 8), rng.randint(1, 3))) for _ in range(7)])


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


def grid_path(grid):
    best = {}
    for i, row in enumerate(grid):
        for j, number in enumerate(row):
            best[i, j] = number + max(best.get((i - 1, j), 0), best.get((i, j - 1), 0))
    return best[i, j]


def knapsack(weights, values, capacity):
    best = [0] * (capacity + 1)  # best[w]: the largest value of the parcels so far within weight w
    for weight, value in zip(weights, values, strict=True):
        for w in range(capacity, weight - 1, -1):
            best[w] = max(best[w], best[w - weight] + value)
    return best[capacity]
