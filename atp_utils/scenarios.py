"""The scenarios by name: each a module with ``Item`` (one prompt) and ``opening(item, protocol)`` (its chat)."""

from pathlib import Path
from types import ModuleType

from atp_utils import collusion, files, resolve, role_play, tool_use

SCENARIOS: dict[str, ModuleType] = {"role_play": role_play, "tool_use": tool_use, "collusion": collusion}


def read_items(scenario: str, split: str, data: str | Path) -> list:
    """Items of ``<data>/<scenario>/<split>.jsonl``; raises an error that names the file, and the bad line."""
    return files.read_jsonl(resolve(data) / scenario / f"{split}.jsonl", SCENARIOS[scenario].Item)
