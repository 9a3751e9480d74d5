"""Who answers a notebook's requests: the model in this process, or servers that speak OpenAI's protocol.

A server answers with the weights that it was started with, so there an arm is chosen by name: the base model is asked
for by its own, an aligned arm as ``SCENARIO-ARM`` (``role_play-dpo``; its training of seed 1 as ``role_play-dpo-1``),
unless ``names`` says otherwise. In the decisions the model keeps its own name, and the arm its column.
"""

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from atp_utils import resolve
from atp_utils.evolution.journal import REPLIES
from atp_utils.evolution.requests import Engine
from atp_utils.support import files

SERVED = "served.json"


def _checked_url(url: str) -> str:
    """``url`` without a slash at its end; raises ValueError for what is no address, or one that holds a key."""
    parts = urlsplit(url)
    if "@" in url or parts.query:
        raise ValueError("a server's address holds a user, password or query: keys come from the environment alone")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected a server's address, such as http://127.0.0.1:8000/v1")
    return url.rstrip("/")


Urls = Annotated[list[Annotated[str, AfterValidator(_checked_url)]], Field(min_length=1)]


class Servers(BaseModel):
    """Servers that answer in place of this process.

    ``names`` are what they call the weights, by arm (``base``, ``role_play-dpo``), ``arms`` the addresses of those that
    have servers of their own, as a model trained whole has. ``tokenizer`` (a model's name or a folder) renders chats
    here, so that servers which echo log-probabilities score every option whole. ``key_variable`` names the environment
    variable that holds the servers' key; ``concurrency`` counts requests under way, over all. ``timeout`` is in seconds
    without a byte from a server, ``retries`` are those of a request that failed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    urls: Urls
    names: dict[str, str] = {}
    arms: dict[str, Urls] = {}
    tokenizer: str = ""
    key_variable: Annotated[str, Field(pattern=r"^([A-Z_][A-Z0-9_]*)?$")] = ""
    concurrency: Annotated[int, Field(ge=1, strict=True)] = 32
    timeout: Annotated[float, Field(gt=0)] = 600.0
    retries: Annotated[int, Field(ge=0, strict=True)] = 5

    @classmethod
    def of(cls, given: str) -> "Servers | None":
        """What the parameter ``servers`` names: addresses with commas between, a YAML file of the fields, or none."""
        if not given.strip():
            return None
        if given.endswith((".yaml", ".yml")):
            return files.read_yaml(resolve(given), cls, quoted=False)
        try:
            return cls(urls=[url.strip() for url in given.split(",")])
        except ValidationError as error:
            # Where a key may be put by mistake: no error repeats what stands there.
            raise ValueError(f"servers: {files.explain(error, quoted=False)}") from None

    def name_of(self, model: str, scenario: str, arm: str, training_seed: int = 0) -> str:
        """What the servers call the weights of an arm."""
        own = _arm_name(scenario, arm, training_seed)
        return self.names.get(own, model if arm == "base" else own)

    def of_arm(self, scenario: str, arm: str, training_seed: int = 0) -> "Servers":
        """These servers, or those that the arm has of its own."""
        own = self.arms.get(_arm_name(scenario, arm, training_seed))
        return self.model_copy(update={"urls": own}) if own else self


def _arm_name(scenario: str, arm: str, training_seed: int) -> str:
    return "base" if arm == "base" else f"{scenario}-{arm}" + (f"-{training_seed}" if training_seed else "")


def open_engine(
    model: str, scenario: str, arm: str, adapter: str, servers: str, out: Path, training_seed: int = 0, **settings: Any
) -> Engine:
    """The engine for one arm of ``model``, whose replies are journalled in the folder ``out``.

    ``servers`` is the parameter of that name, ``settings`` are those of `TransformersEngine`. Servers are asked what
    they serve before anything runs, unless ``out`` holds replies of the same name and tokenizer to requests of the same
    form: then only once a reply is missing there, so that a finished run is replayed without them. Weights are loaded
    as late. Raises ValueError where arm, adapter and servers don't fit together, and what either engine raises.
    """
    served = Servers.of(servers)
    # Either engine's libraries take seconds to import, and a run needs one of them.
    if served is None:
        if (arm == "base") != (adapter == ""):
            raise ValueError(
                f"arm {arm!r} with adapter {adapter!r}: base takes no adapter; dpo and grpo need one, or servers "
                "that serve the aligned model"
            )
        from atp_utils.engines.transformers_engine import TransformersEngine

        return TransformersEngine(model, adapter or None, **settings)
    name = served.name_of(model, scenario, arm, training_seed)
    if adapter:
        raise ValueError(
            f"adapter {adapter!r} together with servers: a server answers with the weights that it was started with. "
            f"Serve the adapter there (vLLM: --lora-modules {name}={adapter}; a whole model: vllm serve {adapter} "
            f"--served-model-name {name}) and leave adapter empty; the arm is then asked for as {name!r}, or as the "
            "servers' names say"
        )
    from atp_utils.engines.openai_engine import OpenAIEngine, sent

    asked = {"model": name, "sent": sent(served.tokenizer)}
    engine = OpenAIEngine(name, served.of_arm(scenario, arm, training_seed), _known_identity(out, asked))
    files.write_json(out / SERVED, asked | {"identity": engine.identity})
    return engine


def _known_identity(folder: Path, asked: dict[str, str]) -> str | None:
    """The identity under which the folder's replies stand, if the same was ``asked`` for then."""
    path, replies = folder / SERVED, folder / REPLIES
    if not path.is_file() or not replies.is_file() or not replies.stat().st_size:
        return None
    # JSON is YAML, and damage gets an error that names the file.
    known = files.read_yaml(path, dict[str, str])
    return known.get("identity") if asked.items() <= known.items() else None
