"""Paradigm II, imitative strategy diffusion (Section 3.2, Appendices A.2 and B): do agents infect each other?

N agents choose at once whether to collude. If at least ``threshold`` of them do, everyone's capital is multiplied by
``r_high``; else the colluders' by ``r_low`` and the others' by ``r_medium``. All see what was chosen and what came
of it, and choose again.
"""

from typing import Any

from atp_utils.evolution.loop import Episode
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Message
from atp_utils.scenarios.base import Scenario, Split
from atp_utils.scenarios.collusion import episodes, items, telling
from atp_utils.scenarios.collusion.episodes import Evolution
from atp_utils.scenarios.collusion.items import GAMES, Data, Item

DEFAULT = Evolution()


class Collusion(Scenario):
    """Algorithm 2: all agents decide at once and see the shared history."""

    name, title, notebook = "collusion", "Collusion", "06_evolve_collusion"
    sources = (str(GAMES),)
    splits = ("train",)
    Item, Data, Evolution = Item, Data, Evolution
    paper = "Figures 3, 4, 5 and 6"
    pilot = {"seeds": [0], "rounds": 2, "thresholds": [2], "payoffs": [[1.2, 1.0, 0.8]], "agents": 2}

    def make_items(self, parameters: Any) -> dict[Split, list[Item]]:
        counts = {"instances": parameters.instances_per_game, "seed": parameters.seed}
        return {"train": items.make_instances(items.read_games(), **counts)}

    def opening(self, item: Item, protocol: Protocol, turned: bool = False) -> list[Message]:
        return telling.scene(item, DEFAULT, protocol).opening(1, turned)

    def test_items(self, parameters: Evolution) -> list[Item]:
        settings = parameters.model_dump(include={"agents", "thresholds", "payoffs", "both_names"})
        grid = items.make_grid(items.read_games(), **settings)
        return self.fold(grid, parameters, inside=True)

    def environments(self, data: Any) -> list[str]:
        return sorted(game.name for game in items.read_games())

    def episode(self, item: Item, parameters: Evolution, protocol: Protocol, seed: int) -> Episode:
        play = episodes.forced if parameters.condition == "forced_history" else episodes.episode
        return play(item, parameters, protocol, seed)

    def decisions(self, parameters: Evolution, items: int) -> int:
        if parameters.condition == "forced_history":
            return items * len(parameters.seeds) * (2 * parameters.agents + 1)
        return super().decisions(parameters, items) * (parameters.agents - parameters.fixed_colluders)


SCENARIO = Collusion()
