"""Who answers a notebook's requests: the model in this process, or servers that speak OpenAI's protocol.

A server answers with the weights that it was started with, so there an arm is chosen by name: the base model is asked
for by its own, an aligned arm as ``SCENARIO-ARM`` (``role_play-dpo``), unless ``served_name`` says otherwise. In the
decisions the model keeps its own name, and the arm its column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atp_utils import files, resolve
from atp_utils.engine import Engine
from atp_utils.journal import REPLIES

SERVED = "served.json"


@dataclass(frozen=True)
class Servers:
    """The notebooks' parameters of these names. Without ``urls`` the model runs in this process.

    ``served_name`` is what the servers call the weights of this run. ``tokenizer`` (a model's name or a folder)
    renders chats here, so that servers which echo log-probabilities score every option whole. ``key_variable`` names
    the environment variable that holds the servers' key; ``concurrency`` counts requests under way, over all servers.
    """

    urls: Sequence[str] = ()
    served_name: str = ""
    tokenizer: str = ""
    key_variable: str = ""
    concurrency: int = 32


def open_engine(model: str, scenario: str, arm: str, adapter: str, servers: Servers, out: str | Path) -> Engine:
    """The engine for one arm of ``model``, whose replies are journalled in the folder ``out``.

    Servers are asked what they serve before anything runs, unless ``out`` holds replies of the same served name and
    tokenizer to requests of the same form: then only once a reply is missing there, so that a finished run is replayed
    without them. Weights are loaded as late. Raises ValueError where arm, adapter and servers don't fit together, and
    what `OpenAIEngine` or `TransformersEngine` raises.
    """
    _check(scenario, arm, adapter, servers)
    # Either engine's libraries take seconds to import, and a run needs one of them.
    if not servers.urls:
        from atp_utils.transformers_engine import TransformersEngine

        return TransformersEngine(model, adapter or None)
    from atp_utils.openai_engine import OpenAIEngine

    name = servers.served_name or (model if arm == "base" else _aligned(scenario, arm))
    asked, folder = {"model": name, "tokenizer": servers.tokenizer}, resolve(out)
    engine = OpenAIEngine(
        name,
        servers.urls,
        tokenizer=servers.tokenizer or None,
        key_variable=servers.key_variable,
        concurrency=servers.concurrency,
        identity=_known_identity(folder, asked),
    )
    files.write_json(folder / SERVED, asked | {"identity": engine.identity})
    return engine


def _aligned(scenario: str, arm: str) -> str:
    return f"{scenario}-{arm}"


def _check(scenario: str, arm: str, adapter: str, servers: Servers) -> None:
    if servers.urls and adapter:
        name = servers.served_name or _aligned(scenario, arm)
        raise ValueError(
            f"adapter {adapter!r} together with urls: a server answers with the weights that it was started with. "
            f"Serve the adapter there (vLLM: --lora-modules {name}={adapter}) and leave adapter empty; the arm is "
            f"then asked for as {name!r}, or as what served_name says"
        )
    if servers.served_name and not servers.urls:
        raise ValueError(f"served_name {servers.served_name!r} without urls: name the servers that serve it")
    if not servers.urls and (arm == "base") != (adapter == ""):
        raise ValueError(
            f"arm {arm!r} with adapter {adapter!r}: base takes no adapter; dpo and grpo need one, or urls of servers "
            "that serve the aligned model"
        )


def _known_identity(folder: Path, asked: dict[str, str]) -> str | None:
    """The identity under which the folder's replies stand, if the same was ``asked`` for then."""
    replies = folder / REPLIES
    if not (folder / SERVED).is_file() or not replies.is_file() or not replies.stat().st_size:
        return None
    # JSON is YAML, and damage gets an error that names the file.
    known = files.read_yaml(folder / SERVED, dict[str, str])
    if not asked.items() <= known.items():
        return None
    from atp_utils.openai_engine import sent

    identity = known.get("identity", "")
    return identity if f"sent={sent(asked['tokenizer'])}" in identity.split("|") else None
