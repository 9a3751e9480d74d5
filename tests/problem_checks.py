"""Second solvers of the families of complex problems, by brute force or another formula."""

import itertools
import math
from collections import deque

import numpy as np
import sympy
from sympy.ntheory.modular import crt


def _digit_count_check(limit, modulus, digit):
    return sum(str(digit) not in str(n) and sum(map(int, str(n))) % modulus == 0 for n in range(1, limit + 1))


def _lattice_paths_check(width, height, blocked):
    # Inclusion-exclusion: of the paths to a point, take off those that met a blocked point first.
    points, clean = [*blocked, (width, height)], []
    for i, (x, y) in enumerate(points):
        hit = sum(clean[j] * math.comb(x - a + y - b, x - a) for j, (a, b) in enumerate(points[:i]) if b <= y)
        clean.append(math.comb(x + y, x) - hit)
    return clean[-1]


def _bounded_solutions_check(a, b, c, total, bound):
    rests = (total - a * x - b * y for x, y in itertools.product(range(bound + 1), repeat=2))
    return sum(rest % c == 0 and 0 <= rest // c <= bound for rest in rests)


def _assignments_check(forbidden):
    return sum(
        all(job not in banned for job, banned in zip(jobs, forbidden, strict=True))
        for jobs in itertools.permutations(range(1, len(forbidden) + 1))
    )


def _grid_path_check(grid):
    size, best = len(grid), 0
    for downs in itertools.combinations(range(2 * size - 2), size - 1):
        row, total = 0, grid[0][0]
        for step in range(2 * size - 2):
            row += step in downs
            total += grid[row][step + 1 - row]
        best = max(best, total)
    return best


def _knapsack_check(weights, values, capacity):
    subsets = np.arange(2 ** len(weights))[:, None] >> np.arange(len(weights)) & 1
    return int((subsets @ values)[subsets @ weights <= capacity].max())


def _linear_recurrence_check(p, q, r, first, second, n, modulus):
    step = sympy.Matrix([[p, q, r], [1, 0, 0], [0, 0, 1]])
    power = sympy.eye(3)
    for bit in bin(n - 1)[2:]:
        power = (power * power * (step if bit == "1" else sympy.eye(3))).applyfunc(lambda v: v % modulus)
    return (power * sympy.Matrix([second, first, 1]))[0] % modulus


def _polynomial_root_check(a, b, c):
    roots = np.roots([1, a, -b, -c])
    return round(float(max(roots.real[np.abs(roots.imag) < 1e-9])), 3)


def _root_power_sum_check(a, b, c, k):
    companion = sympy.Matrix([[0, 0, -c], [1, 0, -b], [0, 1, -a]])
    return (companion**k).trace()


def _josephus_check(people, step):
    circle = deque(range(1, people + 1))
    while len(circle) > 1:
        circle.rotate(1 - step)
        circle.popleft()
    return circle[0]


def _pile_game_check(piles, most):
    wins = {}  # by search: a position wins if some move leads to one that doesn't
    for state in itertools.product(*(range(size + 1) for size in piles)):
        moves = (
            state[:i] + (n - take,) + state[i + 1 :] for i, n in enumerate(state) for take in range(1, min(most, n) + 1)
        )
        wins[state] = not all(wins[after] for after in moves)
    return sum(not won for state, won in wins.items() if all(state))


CHECKS = {
    "digit_count": _digit_count_check,
    "lattice_paths": _lattice_paths_check,
    "bounded_solutions": _bounded_solutions_check,
    "assignments": _assignments_check,
    "grid_path": _grid_path_check,
    "knapsack": _knapsack_check,
    "linear_recurrence": _linear_recurrence_check,
    "prime_sum": lambda limit, modulus, residue: sum(n for n in sympy.primerange(limit) if n % modulus == residue),
    "divisor_sum": lambda limit, skip: sum(d for n in range(1, limit + 1) for d in sympy.divisors(n) if d % skip),
    "remainders": lambda moduli, residues: crt(moduli, residues)[0],
    "determinant": lambda matrix: sympy.Matrix(matrix).det(),
    "polynomial_root": _polynomial_root_check,
    "root_power_sum": _root_power_sum_check,
    "josephus": _josephus_check,
    "pile_game": _pile_game_check,
}
