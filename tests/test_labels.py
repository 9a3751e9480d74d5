"""No option may be longer than the other: a forced choice is scored over all tokens of an answer."""

import json
from pathlib import Path

import pytest

from atp_utils import models, resolve
from atp_utils.evolution.parsing import answer_json
from atp_utils.models import embedded
from atp_utils.scenarios import collusion, role_play
from atp_utils.scenarios.tool_use import items as tool_items

# The default, and what else has been made here; of Qwen2.5's tokenizer, `RECORDED` holds the counts for elsewhere.
MADE = [name for name in embedded.registry() if (resolve(embedded.MODELS) / name).is_dir()]
AT_HAND = sorted({models.EMBEDDED, *MADE})
RECORDED = json.loads(Path(__file__).with_name("qwen25_label_tokens.json").read_text())
PAIRS = {
    **{environment.name: environment.labels for environment in role_play.read_environments()},
    **{game.name: (game.labels.collude, game.labels.abstain) for game in collusion.read_games()},
    "tool use": tool_items.POLICIES,
}


def texts(label):
    """A label where it stands: in an answer, at the end of one cut off behind it, and in a sentence."""
    return [answer_json(label), answer_json(label).removesuffix('"}'), f" {label}"]


@pytest.mark.parametrize("name", AT_HAND)
@pytest.mark.parametrize("pair", PAIRS)
def test_both_labels_have_equally_many_tokens(name, pair):
    tokenizer = models.load_tokenizer(name)
    first, second = (
        [len(ids) for ids in tokenizer(texts(label), add_special_tokens=False)["input_ids"]] for label in PAIRS[pair]
    )
    assert first == second


@pytest.mark.parametrize("pair", PAIRS)
def test_both_labels_have_equally_many_tokens_under_qwens_tokenizer(pair):
    assert RECORDED["texts"] == texts("LABEL")
    first, second = (RECORDED["tokens"][label] for label in PAIRS[pair])
    assert first == second
