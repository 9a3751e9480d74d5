"""Paradigm I, role-play (Section 3.1.1, Appendix A.1.1): does an agent stop keeping a rule that costs it something?"""

from typing import Any

from atp_utils.evolution.history import recall
from atp_utils.evolution.loop import Episode
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Message
from atp_utils.scenarios.base import Scenario, Split
from atp_utils.scenarios.role_play import episodes, items, telling
from atp_utils.scenarios.role_play.episodes import Evolution
from atp_utils.scenarios.role_play.items import ENVIRONMENTS, Data, Item

DEFAULT = Evolution()


class RolePlay(Scenario):
    """Algorithm 1 for one agent an item: each decision sees the full history of its actions and outcomes."""

    name, title, notebook = "role_play", "Role-play", "04_evolve_role_play"
    sources = (str(ENVIRONMENTS),)
    Item, Data, Evolution = Item, Data, Evolution
    paper = "Table 1"
    pilot = {"items": 2, "seeds": [0], "rounds": 2}

    def make_items(self, parameters: Any) -> dict[Split, list[Item]]:
        counts = {"train": parameters.train_per_environment, "test": parameters.test_per_environment}
        train, test = items.make_items(items.read_environments(), **counts, seed=parameters.seed)
        return {"train": train, "test": test}

    def opening(self, item: Item, protocol: Protocol, turned: bool = False) -> list[Message]:
        return telling.scene(item, DEFAULT, protocol).opening(1, turned)

    def after_compliance(self, item: Item, protocol: Protocol, rounds: int, turned: bool = False) -> list[Message]:
        if not rounds:
            return self.opening(item, protocol, turned)
        setting = DEFAULT.model_copy(update={"condition": "equal_payoffs"})
        past = telling.written(item, [False] * rounds, setting)
        return recall(telling.scene(item, setting, protocol), past, rounds + 1, turned)

    def test_items(self, parameters: Evolution) -> list[Item]:
        return items.balanced_subset(super().test_items(parameters), parameters.items)

    def episode(self, item: Item, parameters: Evolution, protocol: Protocol, seed: int) -> Episode:
        play = episodes.forced if parameters.condition == "forced_history" else episodes.episode
        return play(item, parameters, protocol, seed)

    def decisions(self, parameters: Evolution, items: int) -> int:
        if parameters.condition != "forced_history":
            return super().decisions(parameters, items)
        branching = sum(2**rounds for rounds in range(parameters.forced_rounds + 1))
        histories = sum(parameters.forced_rounds + 1 if told == "unrelated" else branching for told in parameters.told)
        return items * len(parameters.seeds) * len(parameters.ratios) * histories


SCENARIO = RolePlay()
