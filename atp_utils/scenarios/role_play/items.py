"""The environments and items of role-play (Section 3.1.1, Appendix A.1.1).

Each environment has a persona, a recurring task, a rule and two options; the one that breaks the rule pays
more. No label or position can pass for rule-breaking: over the items of an environment, and over those of any
`balanced_subset`, each label is the compliant one in half, and the compliant option is named first in half.
"""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from atp_utils import resolve
from atp_utils.evolution.requests import derive_seed
from atp_utils.scenarios import base
from atp_utils.scenarios.base import Words
from atp_utils.support import files
from atp_utils.support.values import Even, Parameters, option

ENVIRONMENTS = Path("data/environments/role_play.yaml")
TRAIN_OCCASIONS = 5
# (index of the compliant label, whether it is named first); the first two are opposites, and so are the last two.
CORNERS = ((0, True), (1, False), (0, False), (1, True))

Span = Annotated[list[int], Field(min_length=2, max_length=2)]


class Payoff(BaseModel):
    """Inclusive ranges of whole numbers that an option's payoff is drawn from; breaking the rule pays more."""

    model_config = ConfigDict(extra="forbid")
    compliant: Span
    deviant: Span

    @model_validator(mode="after")
    def _deviation_pays_more(self):
        if not 0 < self.compliant[0] <= self.compliant[1] < self.deviant[0] <= self.deviant[1]:
            raise ValueError("payoff ranges must satisfy 0 < compliant <= its end < deviant <= its end")
        return self


class Environment(BaseModel):
    """One entry of ``data/environments/role_play.yaml``; that file explains the fields."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, StringConstraints(pattern=r"^[a-z_]+$")]
    persona: Words
    task: Words
    rule: Words
    rule_by: Words
    # Sorted, so that an item alone tells whether its compliant label is the first of them or the second.
    labels: Annotated[list[Words], Field(min_length=2, max_length=2), AfterValidator(sorted)]
    action: Words
    unit: Words
    gain: Words
    payoff: Payoff
    occasions: Annotated[list[Words], Field(min_length=TRAIN_OCCASIONS + 1)]

    @model_validator(mode="after")
    def _has_placeholders(self):
        for field, mark in (("rule", "{compliant}"), ("action", "{label}")):
            if getattr(self, field).count(mark) != 1:
                raise ValueError(f"{self.name}: {field} must hold {mark} exactly once")
        if len(set(self.labels)) < 2 or len(set(self.occasions)) < len(self.occasions):
            raise ValueError(f"{self.name}: labels and occasions must be distinct")
        return self


class Item(base.Item):
    """One prompt of the data set, in parts; payoffs are in ``unit``, a round. ``rule_by`` set the rule."""

    system: str
    rule: str
    rule_by: str
    prompt: str
    action: str
    unit: str
    payoff_compliant: int
    payoff_deviant: int


class Data(Parameters):
    """Parameters of notebook 1."""

    train_per_environment: Even = option(10, "training prompts of an environment; even, for the counterbalance")
    test_per_environment: Even = option(4, "test prompts of an environment; even")


def read_environments(path: str | Path = ENVIRONMENTS) -> list[Environment]:
    """The environments of a YAML file; raises ValueError naming the file and what is wrong in it."""
    return files.read_named(resolve(path), Environment, "environments")


def make_items(
    environments: list[Environment], *, train: int = 10, test: int = 4, seed: int = 0
) -> tuple[list[Item], list[Item]]:
    """``(train, test)`` items, so many an environment (Appendix A.1.1: 160 and 64 in all for 16).

    Payoffs are distinct within an environment, and test items have occasions that no training item has, so
    the splits cannot overlap. Both counts must be even, for the counterbalance.
    """
    for name, count in (("train", train), ("test", test)):
        if count < 2 or count % 2:
            raise ValueError(f"{name}_per_environment must be an even number >= 2, got {count}")
    splits: tuple[list[Item], list[Item]] = ([], [])
    for place, environment in enumerate(environments):
        rng = random.Random(derive_seed(seed, "role_play", environment.name))
        pairs = _payoffs(environment, train + test, rng)
        occasions = environment.occasions[:TRAIN_OCCASIONS], environment.occasions[TRAIN_OCCASIONS:]
        for split, items, count in (("train", splits[0], train), ("test", splits[1], test)):
            texts = occasions[split == "test"]
            for number in range(count):
                # A Latin square: four items of an environment, and the n-th ones of four environments, take all
                # corners; two neighbours take opposite ones, and they share an occasion.
                label, first = CORNERS[number % 4 ^ place % 4]
                occasion = texts[number // 2 % len(texts)]
                items.append(_item(environment, split, number, label, first, pairs.pop(), occasion))
    return splits


def _payoffs(environment: Environment, count: int, rng: random.Random) -> list[tuple[int, int]]:
    columns = []
    for low, high in (environment.payoff.compliant, environment.payoff.deviant):
        if high - low + 1 < count:
            raise ValueError(f"{environment.name}: {count} prompts need payoff ranges of {count} values or more")
        columns.append(rng.sample(range(low, high + 1), count))
    return list(zip(*columns, strict=True))


def _item(
    environment: Environment,
    split: str,
    number: int,
    label: int,
    first: bool,
    pay: tuple[int, int],
    occasion: str,
) -> Item:
    compliant, deviant = environment.labels[label], environment.labels[1 - label]
    return Item(
        id=f"{environment.name}-{split}-{number}",
        environment=environment.name,
        split=split,
        system=f"{environment.persona} {environment.task}",
        rule=environment.rule.format(compliant=compliant),
        rule_by=environment.rule_by,
        prompt=f"{occasion}\n{environment.gain}",
        options=(compliant, deviant) if first else (deviant, compliant),
        compliant=compliant,
        action=environment.action,
        unit=environment.unit,
        payoff_compliant=pay[0],
        payoff_deviant=pay[1],
    )


def balanced_subset(items: Sequence[Item], count: int) -> list[Item]:
    """``count`` of the items, in their order; 0 takes all.

    Out of `make_items`, any count takes environments evenly, either label as the compliant one in half, the compliant
    option first in half, and both crossed. Raises ValueError for a negative count, or where there are fewer items.
    """
    if not 0 <= count <= len(items):
        raise ValueError(f"items must lie in 0..{len(items)} (the number of test items; 0 takes all), got {count}")
    if count in (0, len(items)):
        return list(items)
    own: dict[str, list[Item]] = {}
    for item in items:
        own.setdefault(item.environment, []).append(item)
    corners, chosen = Counter(), set()
    for row in range(max(map(len, own.values()))):
        # One more item of every environment, out of the four that cross label and position.
        waiting = {name: part[row - row % 4 :][:4] for name, part in own.items() if row < len(part)}
        while waiting and len(chosen) < count:
            left = (item for part in waiting.values() for item in part if item.id not in chosen)
            item = min(left, key=lambda item: _unbalance(corners, _corner(item)))
            corners[_corner(item)] += 1
            chosen.add(item.id)
            del waiting[item.environment]
    return [item for item in items if item.id in chosen]


def _corner(item: Item) -> tuple[bool, bool]:
    return item.compliant == min(item.options), item.compliant == item.options[0]


def _unbalance(corners: Counter, corner: tuple[bool, bool]) -> tuple[int, int]:
    """How uneven ``corners`` and one more ``corner`` are over label and position, and then over their crossing."""
    after = corners + Counter([corner])
    sides = [sum(n if taken[axis] else -n for taken, n in after.items()) for axis in (0, 1)]
    return sum(map(abs, sides)), corners[corner]
