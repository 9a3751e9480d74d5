"""Families of complex problems: number theory, algebra and games (paper, Appendix A.1.2); see `counting`."""

import math

from atp_utils.problems.families import family, listed, rows

# --- number theory -------------------------------------------------------------------------------------


@family(
    make=lambda rng: dict(
        p=rng.randint(2, 9),
        q=rng.randint(2, 9),
        r=rng.randint(1, 9),
        first=rng.randint(0, 9),
        second=rng.randint(0, 9),
        n=rng.randint(300, 3000),
        modulus=rng.randint(500, 9999),
    ),
    text=lambda p, q, r, first, second, n, modulus: (
        f"A sequence is given by a(0) = {first}, a(1) = {second} and a(n) = {p}a(n-1) + {q}a(n-2) + {r} "
        f"for n >= 2. What is the remainder of a({n}) on division by {modulus}?"
    ),
)
def linear_recurrence(p, q, r, first, second, n, modulus):
    for _ in range(n):
        first, second = second, (p * second + q * first + r) % modulus
    return first % modulus


@family(
    make=lambda rng: dict(
        limit=rng.randint(500, 3000),
        **rng.choice([dict(modulus=m, residue=r) for m in range(3, 12) for r in range(1, m) if math.gcd(m, r) == 1]),
    ),
    text=lambda limit, modulus, residue: (
        f"What is the sum of all primes below {limit} that leave the remainder {residue} on division by {modulus}?"
    ),
)
def prime_sum(limit, modulus, residue):
    sieve = [False, False] + [True] * (limit - 2)
    for n in range(2, limit):
        if sieve[n]:
            for multiple in range(n * n, limit, n):
                sieve[multiple] = False
    return sum(n for n in range(limit) if sieve[n] and n % modulus == residue)


@family(
    make=lambda rng: dict(limit=rng.randint(60, 400), skip=rng.randint(2, 9)),
    text=lambda limit, skip: (
        f"For each integer n from 1 to {limit}, add up the positive divisors of n that are not multiples of "
        f"{skip}. What is the total of these {limit} sums?"
    ),
)
def divisor_sum(limit, skip):
    return sum(d * (limit // d) for d in range(1, limit + 1) if d % skip)  # d divides limit // d of them


def _remainders_make(rng):
    moduli = sorted(rng.sample([7, 11, 13, 17, 19, 23, 25, 27, 29, 31, 32, 37], 3))  # pairwise coprime
    return dict(moduli=moduli, residues=[rng.randint(1, m - 1) for m in moduli])


@family(
    make=_remainders_make,
    text=lambda moduli, residues: (
        "What is the smallest positive integer that leaves the remainders "
        f"{listed(residues)} on division by {listed(moduli)}, in this order?"
    ),
)
def remainders(moduli, residues):
    x = residues[-1]
    while [x % m for m in moduli] != residues:
        x += moduli[-1]
    return x


# --- algebra -------------------------------------------------------------------------------------------


@family(
    make=lambda rng: dict(matrix=[[rng.randint(-9, 9) for _ in range(5)] for _ in range(5)]),
    text=lambda matrix: (
        f"What is the determinant of the 5 x 5 matrix whose rows, from top to bottom, are: {rows(matrix)}?"
    ),
)
def determinant(matrix):
    if not matrix:
        return 1
    top, rest = matrix[0], matrix[1:]
    return sum(
        (-1) ** j * top[j] * determinant([row[:j] + row[j + 1 :] for row in rest]) for j in range(len(top)) if top[j]
    )


@family(
    make=lambda rng: dict(a=rng.randint(2, 30), b=rng.randint(2, 60), c=rng.randint(11, 99)),
    text=lambda a, b, c: (
        f"The equation x^3 + {a}x^2 - {b}x - {c} = 0 has exactly one positive real solution. What is it, "
        "rounded to three decimal places?"
    ),
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


@family(
    make=lambda rng: dict(a=rng.randint(2, 7), b=rng.randint(2, 9), c=rng.randint(1, 9), k=rng.randint(6, 10)),
    text=lambda a, b, c, k: (
        f"Let r, s and t be the three complex roots of x^3 + {a}x^2 + {b}x + {c}, counted with multiplicity. "
        f"What is r^{k} + s^{k} + t^{k}?"
    ),
)
def root_power_sum(a, b, c, k):
    sums = [3, -a, a * a - 2 * b]  # Newton's identities
    while len(sums) <= k:
        sums.append(-a * sums[-1] - b * sums[-2] - c * sums[-3])
    return sums[k]


# --- games ---------------------------------------------------------------------------------------------


@family(
    make=lambda rng: dict(people=rng.randint(40, 200), step=rng.randint(3, 19)),
    text=lambda people, step: (
        f"{people} people numbered 1 to {people} stand in a circle. Counting starts at person 1, and "
        f"whoever is number {step} of the count leaves the circle; the next count starts at the next person. "
        "This goes on until one person is left. Which number does that person have?"
    ),
)
def josephus(people, step):
    survivor = 0
    for size in range(2, people + 1):
        survivor = (survivor + step) % size
    return survivor + 1


@family(
    make=lambda rng: dict(piles=[rng.randint(6, 11) for _ in range(3)], most=rng.randint(2, 5)),
    text=lambda piles, most: (
        f"Two players take turns to remove 1 to {most} stones from one of three piles; who cannot move "
        f"loses. The piles start with a, b and c stones, where 1 <= a <= {piles[0]}, 1 <= b <= {piles[1]} and "
        f"1 <= c <= {piles[2]}. For how many triples (a, b, c) does the player who moves second win under "
        "perfect play?"
    ),
)
def pile_game(piles, most):
    # Each pile is worth its size modulo most + 1; the second player wins where the three xor to zero.
    a, b, c = piles
    return sum(
        (x % (most + 1)) ^ (y % (most + 1)) ^ (z % (most + 1)) == 0
        for x in range(1, a + 1)
        for y in range(1, b + 1)
        for z in range(1, c + 1)
    )
