"""The notebooks' parameters, each declared once: name, type, default, help.

A notebook's cell tagged ``parameters`` repeats its model's names and defaults, which a test compares: papermill needs
them there, only warns of an unknown name, and runs with the default. Names and values are therefore checked here,
before anything starts.
"""

import contextlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, create_model, model_validator

from atp_utils.engines import Servers
from atp_utils.evolution.protocol import Name as ProtocolName
from atp_utils.scenarios.base import Fold
from atp_utils.scenarios.registry import SCENARIOS
from atp_utils.support import files
from atp_utils.support.values import (
    Flag,
    Natural,
    NotNegative,
    Parameters,
    Positive,
    Precision,
    Rate,
    Share,
    Temperature,
    Text,
    option,
)


def _scenario(name: str) -> str:
    if name not in SCENARIOS:
        raise ValueError(f"expected one of {', '.join(SCENARIOS)}")
    return name


ScenarioName = Annotated[str, AfterValidator(_scenario)]


class _Data(Parameters):
    seed: Natural = option(0, "what the prompts are drawn from")
    out: Text = option("data", "folder of the prompts, one below it for each scenario")
    overwrite: Flag = option(False, "whether prompts of other parameters in out may be replaced")


class Training(Parameters):
    """Parameters of both alignment notebooks."""

    model: Text = option("smollm2-135m", "name of an embedded model, Hugging Face id, or folder")
    scenario: ScenarioName = option("role_play", f"what is aligned: {', '.join(SCENARIOS)}")
    data: Text = option("data", "folder of the prompts that notebook 1 wrote")
    out: str = option("", "folder of the adapter; empty: one of its own below runs/demo")
    overwrite: Flag = option(False, "whether another adapter in out may be set aside")
    held_out: Fold = option(0, "quarter of the environments that is left out, 1 to 4; 0: none")
    history_pairs: Natural = option(0, "compliant rounds with equal payoffs in front of each training prompt")
    protocol: ProtocolName = option("choose", "form of the answer that prompts ask for")
    learning_rate: Rate = option(5e-4, "at its highest")
    max_steps: Natural = option(3, "optimiser steps; 0: as many as the epochs take")
    batch_size: Positive = option(1, "pairs, or prompts of GRPO, that are computed at once")
    accumulation: Positive = option(1, "batches of a step, shared out among processes")
    lora_rank: Natural = option(8, "rank of the adapter; 0: all weights are trained, in float32")
    lora_alpha: Rate = option(16.0, "scale of the adapter, over its rank")
    lora_targets: Text = option("all-linear", "layers that it adapts: all-linear, or names with commas between")
    scheduler: Literal["cosine", "linear"] = option("cosine", "how the learning rate falls to 0")
    warmup_ratio: Share = option(0.1, "share of the steps in which the learning rate rises")
    save_steps: Positive = option(10, "steps between checkpoints")
    temperature: Temperature = option(1.0, "of written replies")
    checkpoint_activations: Flag = option(False, "whether activations are computed again to save memory")
    dtype: Precision = option("auto", "precision of the weights; auto: what is fast here")
    launcher: str = option("", "file of profiles/accelerate whose processes train; empty: this process")
    seed: Natural = option(0, "of adapter, order and draws")


class Dpo(Training):
    """Parameters of notebook 2."""

    servers: str = option("", "servers of the base model that write replies: addresses, or a YAML file")
    pairs: Literal["answers", "written"] = option("answers", "bare JSON answers, or replies that the model writes")
    samples_per_problem: Positive = option(1, "written replies of a problem (tool use)")
    max_pairs: Positive = option(2000, "most pairs (tool use)")
    epochs: Rate = option(12.0, "passes over the pairs, where max_steps is 0")
    batch_size: Positive = option(4, "pairs that are computed at once")
    beta: NotNegative = option(0.1, "how far the policy may move from where it started")
    max_attempts: Positive = option(3, "how often a reply is asked for in all")
    max_new_tokens: Positive = option(96, "longest written reply")
    thinking: Flag = option(False, "whether written replies are trained on with the thinking in front of them")
    min_mass: Share = option(0.5, "least probability of the two bare answers together; below it a training fails")
    stop_margin: NotNegative = option(0.0, "margin at which training ends, all pairs being apart; 0: never")

    @model_validator(mode="after")
    def _bare_answers_have_no_thinking(self):
        if self.thinking and self.pairs == "answers":
            raise ValueError("thinking must be false where pairs are answers: nobody has thought in front of these")
        return self


class Grpo(Training):
    """Parameters of notebook 3."""

    prefill: str = option('{"choice": "', "beginning of every reply, given to the model")
    epochs: Rate = option(6.0, "passes over the prompts, where max_steps is 0")
    group_size: Annotated[int, Field(ge=2, strict=True)] = option(4, "replies to a prompt")
    beta: NotNegative = option(0.04, "weight of the KL term")
    max_new_tokens: Positive = option(8, "longest reply")
    thinking: Flag = option(False, "whether a model that can think may (reason)")
    use_vllm: Flag = option(False, "whether vLLM writes the replies on the same GPUs")


class Drawing(Parameters):
    """Parameters of the notebooks that draw recorded results."""

    results: Text = option("data/results", "folder of complete runs")
    figures: Text = option("figures", "folder of the drawings")
    overwrite: Flag = option(False, "whether figures of other results may be replaced")


class Exploring(Parameters):
    """Parameters of notebook 11."""

    model: Text = option("smollm2-135m", "name of an embedded model, Hugging Face id, or folder")
    adapter: str = option("", "folder of an adapter of it; empty: the base model")
    results: Text = option("data/results", "folder of complete runs")
    data: Text = option("data", "folder of the prompts that notebook 1 wrote")


def _data_of_all() -> type[Parameters]:
    own = {name: field for scenario in SCENARIOS.values() for name, field in scenario.Data.model_fields.items()}
    fields = {name: (field.rebuild_annotation(), field) for name, field in own.items()}
    return create_model("Data", __base__=_Data, __doc__="Parameters of notebook 1.", **fields)


MODELS: dict[str, type[Parameters]] = {
    "01_generate_data": _data_of_all(),
    "02_align_dpo": Dpo,
    "03_align_grpo": Grpo,
    "07_heatmaps": Drawing,
    "08_figures": Drawing,
    "09_dose_response": Drawing,
    "10_critical_mass": Drawing,
    "11_explore": Exploring,
}
ALIGN = {"dpo": "02_align_dpo", "grpo": "03_align_grpo"}
# A scenario from outside that has no notebook evolves under its own name.
EVOLVE = {name: scenario.notebook or name for name, scenario in SCENARIOS.items()}
MODELS |= {notebook: SCENARIOS[name].Evolution for name, notebook in EVOLVE.items()}


def model_of(notebook: str) -> type[Parameters]:
    """The parameters of a notebook; raises ValueError where there is none of this name."""
    if notebook not in MODELS:
        raise ValueError(f"no notebook {notebook!r} (there are: {', '.join(sorted(MODELS))})")
    return MODELS[notebook]


def check(notebook: str, values: Mapping[str, Any]) -> Any:
    """All parameters of the notebook with ``values`` for some; raises ValueError for an unknown name or wrong value."""
    model = model_of(notebook)
    for name in values:
        if name not in model.model_fields:
            raise ValueError(f"{notebook} has no parameter {name!r} (it has: {', '.join(model.model_fields)})")
    try:
        checked = model(**values)
    except ValidationError as error:
        named = "parameter " if error.errors()[0]["loc"] else ""
        raise ValueError(f"{notebook}, {named}{files.explain(error)}") from None
    Servers.of(getattr(checked, "servers", ""))
    return checked


def from_text(notebook: str, name: str, text: str) -> Any:
    """A command line's value of a parameter: the text itself where one is taken, else what it is as JSON."""
    fields = model_of(notebook).model_fields
    kind = TypeAdapter(fields[name].rebuild_annotation() if name in fields else str)
    with contextlib.suppress(ValidationError):
        if isinstance(kind.validate_python(text), str):
            return text
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return text


def table(notebook: str) -> str:
    """Names, defaults and help of a notebook's parameters, one a line."""
    fields = model_of(notebook).model_fields
    defaults = {name: json.dumps(field.default) for name, field in fields.items()}
    wide, far = max(map(len, fields)), max(map(len, defaults.values()))
    return "\n".join(f"{name:{wide}}  {defaults[name]:{far}}  {fields[name].description}" for name in fields)
