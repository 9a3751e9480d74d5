"""What every scenario has: items, the chat before the first decision, episodes, and how a model is aligned on it.

A scenario is a subclass of `Scenario` in a module of its own, whose instance is called ``SCENARIO``. Everything else
(data, training, evolution, pipeline, tables, figures) goes through that object.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from atp_utils import resolve, shown
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.loop import Episode
from atp_utils.evolution.protocol import Name as ProtocolName
from atp_utils.evolution.protocol import Protocol
from atp_utils.evolution.requests import Message, Sampling
from atp_utils.scenarios import preferences
from atp_utils.support import files
from atp_utils.support.values import (
    Arm,
    Distinct,
    Flag,
    Natural,
    Parameters,
    Positive,
    Precision,
    Real,
    Temperature,
    Text,
    option,
)

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Split = Literal["train", "test"]
Fold = Annotated[int, Field(ge=0, le=4, strict=True)]
CONDITION = "what is manipulated (docs/conditions.md)"


class Item(BaseModel):
    """One prompt of the data set, a line of ``train.jsonl`` or ``test.jsonl``.

    ``options`` are in the order in which the prompt names them, unless it is turned; ``environment`` is the unit of
    intervals.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    environment: str
    split: Split
    options: tuple[str, str]
    compliant: str

    @property
    def deviant(self) -> str:
        """The option that departs from the rule, norm or fitting policy."""
        return next(option for option in self.options if option != self.compliant)

    def named(self, turned: bool) -> tuple[str, str]:
        """The options in their order, or the other way round."""
        return self.options[::-1] if turned else self.options


class Evolution(Parameters):
    """Parameters of every evolution notebook; a scenario adds its own, its ``condition``s among them."""

    model: Text = option("smollm2-135m", "name of an embedded model, Hugging Face id, or folder")
    arm: Arm = option("base", "base, or how the model was aligned")
    training_seed: Natural = option(0, "which training of the arm: the seed of its adapter")
    adapter: str = option("", "folder of the adapter that notebook 2 or 3 trained; empty for base, and with servers")
    servers: str = option("", "servers that answer instead: addresses with commas between, or a YAML file")
    data: Text = option("data", "folder of the prompts that notebook 1 wrote")
    out: str = option("", "folder of the results; empty: one of its own below runs/demo")
    overwrite: Flag = option(False, "whether results of other parameters in out may be replaced")
    condition: Literal["standard"] = option("standard", CONDITION)
    held_out: Fold = option(0, "quarter of the environments that is played, which training left out; 0: all")
    history_window: Natural = option(0, "how many of the last rounds an agent remembers; 0: all")
    seeds: Annotated[list[Natural], Field(min_length=1), Distinct] = option([0], "repetitions, each with its own draws")
    rounds: Positive = option(4, "decisions of an agent")
    protocol: ProtocolName = option("choose", "score the two answers, or let the model write first")
    max_attempts: Positive = option(3, "how often an unreadable decision is asked in all (reason)")
    max_new_tokens: Positive = option(64, "longest reply")
    temperature: Temperature = option(1.0, "of written replies")
    top_p: Annotated[Real, Field(gt=0, le=1)] = option(1.0, "share of probability that written tokens are drawn from")
    top_k: Natural = option(0, "number of tokens that written tokens are drawn from; 0: all")
    thinking: Flag = option(True, "whether a model that can think may (reason)")
    keep_thinking: Flag = option(False, "whether an agent finds its earlier thoughts in its chat")
    opened: Flag = option(True, "whether scored answers are opened for the model: their common beginning is given")
    dtype: Precision = option("auto", "precision of the weights; auto: what is fast here")
    batch_tokens: Natural = option(0, "most tokens of a forward pass; 0: 4096, on a GPU 16384")
    cache_gb: Annotated[Real, Field(ge=0)] = option(6.0, "memory for keys and values that are kept between rounds")

    def protocol_of(self) -> Protocol:
        """How decisions are taken."""
        sampling = Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.thinking)
        return Protocol(self.protocol, self.max_attempts, sampling, self.keep_thinking, self.opened)


class Scenario:
    """One scenario; subclasses set the attributes and say what items, prompts and episodes are."""

    name: ClassVar[str]
    title: ClassVar[str]
    notebook: ClassVar[str] = ""  # of its evolution
    sources: ClassVar[tuple[str, ...]] = ()  # files of the repository that its items are made from
    splits: ClassVar[tuple[Split, ...]] = ("train", "test")  # that notebook 1 writes
    Item: ClassVar[type[Item]] = Item
    Data: ClassVar[type[Parameters]] = Parameters  # its parameters of notebook 1, besides seed and out
    Evolution: ClassVar[type[Evolution]] = Evolution
    paper: ClassVar[str] = ""  # what of the paper an evolution makes
    pilot: ClassVar[Mapping[str, Any]] = {}  # parameters of the smallest evolution of every kind of request

    def made_from(self, parameters: Any) -> list[str]:
        """The files that items of these ``parameters`` of notebook 1 are made from."""
        return list(self.sources)

    def origin(self, parameters: Any) -> dict[str, Any]:
        """What those items follow from: the scenario's own parameters, and its files by name with their SHA-256."""
        own = parameters.model_dump(mode="json", include={"seed", *self.Data.model_fields})
        sources = map(resolve, self.made_from(parameters))
        return {"parameters": own, "sources": {path.name: files.sha256(path) for path in sources}}

    def make_items(self, parameters: Any) -> dict[Split, list]:
        """The items of each of ``splits``, from the parameters of notebook 1."""
        raise NotImplementedError

    def opening(self, item: Any, protocol: Protocol, turned: bool = False) -> list[Message]:
        """The chat before the first decision, without history: also the training prompt.

        ``turned`` names the options in the other order than the item's.
        """
        raise NotImplementedError

    def after_compliance(self, item: Any, protocol: Protocol, rounds: int, turned: bool = False) -> list[Message]:
        """A training prompt behind so many compliant rounds in which either option would have paid the same."""
        if rounds:
            raise ValueError(f"{self.name} has no training prompts with a history: history_pairs must be 0")
        return self.opening(item, protocol, turned)

    def episode(self, item: Any, parameters: Any, protocol: Protocol, seed: int) -> Episode:
        """One episode of an item: a generator that asks with `decide` and returns its decisions."""
        raise NotImplementedError

    def decisions(self, parameters: Any, items: int) -> int:
        """How many decisions an evolution of so many items takes."""
        return items * len(parameters.seeds) * parameters.rounds

    def path(self, split: Split, data: str | Path) -> Path:
        """The file of a split below the folder ``data``."""
        return resolve(data) / self.name / f"{split}.jsonl"

    def read_items(self, split: Split, data: str | Path) -> list:
        """Items that notebook 1 wrote; raises an error that names the file, and the bad line or item."""
        path = self.path(split, data)
        items = files.read_jsonl(path, self.Item)
        if strange := [item.id for item in items if item.split != split]:
            raise ValueError(f"{shown(path)}: {strange[0]} is no {split} item")
        return items

    def test_items(self, parameters: Any) -> list:
        """The items that an evolution plays."""
        return self.fold(self.read_items("test", parameters.data), parameters, inside=True)

    def prompts_digest(self, parameters: Any) -> str:
        """SHA-256 (hexadecimal) of all test items that an evolution may play, of which ``items`` may take some."""
        path = self.path("test", parameters.data)
        if path.is_file():
            return files.sha256(path)
        rows = [item.model_dump_json() for item in self.test_items(parameters)]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def environments(self, data: str | Path) -> list[str]:
        """Names of the environments of all splits, in order."""
        return sorted({item.environment for split in self.splits for item in self.read_items(split, data)})

    def fold(self, items: Sequence, parameters: Any, *, inside: bool) -> list:
        """Those ``items`` whose environments are held out (``inside``), or the others; all where ``held_out`` is 0.

        Every fourth environment is in fold 1, 2, 3 or 4. Those of all splits count, so that training and evolution have
        the same folds even where a split lacks an environment. Raises ValueError for a fold without environments.
        """
        if not parameters.held_out:
            return list(items)
        names = self.environments(parameters.data)
        own = set(names[parameters.held_out - 1 :: 4])
        if not own:
            raise ValueError(f"held_out is {parameters.held_out}, but {self.name} has {len(names)} environments only")
        return [item for item in items if (item.environment in own) == inside]

    @contextmanager
    def episodes(
        self,
        items: Sequence,
        parameters: Any,
        protocol: Protocol,
        journal: Journal,
        run_tool: Callable[[str], Any] | None = None,
    ) -> Iterator[tuple[list[Episode], dict[str, Any]]]:
        """All episodes of an evolution, and facts for its manifest that they fill in as they run.

        ``run_tool`` runs the Python that a model writes, where a scenario has any, in place of the scenario's sandbox.
        """
        yield [self.episode(item, parameters, protocol, seed) for seed in parameters.seeds for item in items], {}

    # --- alignment: one prompt, no history (Appendix A.1) ----------------------------------------------------

    def training_items(self, items: Sequence, method: str) -> list:
        """Those of the training items that ``method`` ("dpo" or "grpo") trains on."""
        return list(items)

    def sampler(self, journal: Journal) -> AbstractContextManager[preferences.Sampler]:
        """What asks the base model for either side of the item's preference pair, to be used in a ``with``."""
        return nullcontext(preferences.elicitation)

    def pairs(self, found: Sequence[dict], limit: int) -> tuple[list[dict], Mapping[str, int]]:
        """Pairs (chat, chosen, rejected) of what the sampler found, and counts of those kept and left out."""
        return preferences.elicited_pairs(found)

    def reward_columns(self, item: Any) -> dict[str, Any]:
        """What the reward of a reply to ``item`` depends on: the columns of its row in GRPO's data set."""
        return {"options": list(item.options), "compliant": item.compliant}

    def reward(self, group_size: int) -> AbstractContextManager[preferences.Reward]:
        """TRL's reward function, to be used in a ``with``."""
        return nullcontext(preferences.rewards)
