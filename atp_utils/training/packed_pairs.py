"""The two answers of a preference pair behind one prompt: what both begin with is computed once.

TRL reads a pair as two rows, prompt + chosen and prompt + rejected. Here they are one row: the chosen row, then what
the rejected one doesn't begin with alike. An attention mask keeps this rest from seeing the chosen one's, and its
positions count on from where they part, so that every token is read as in a row of its own. TRL goes on to see two rows
a pair.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

# Models in which nothing but attention lets tokens see each other, and attention that goes by any mask.
FAMILIES, ATTENTION = {"llama", "qwen2", "qwen3"}, {"sdpa", "eager"}
IGNORED = -100  # the label of what isn't scored, in PyTorch and TRL


@dataclass(frozen=True)
class PackedPairs:
    """TRL's rows of a batch, [2 * pairs, tokens], as ``pairs`` rows of ``length`` tokens.

    A token stands for what it predicts: the last one that both rows have is there twice, before each rest, and the last
    one of a row isn't there.
    """

    input_ids: torch.Tensor  # [pairs, length]
    position_ids: torch.Tensor  # [pairs, length], counted from 0
    labels: torch.Tensor  # [pairs, length]: the token that comes next, or IGNORED
    sees: torch.Tensor  # bool [pairs, 1, length, length]: who (third) sees whom (fourth)
    columns: torch.Tensor  # [2 * pairs, tokens - 1]: where each token of TRL's rows is in the packed row


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> PackedPairs:
    """Pack TRL's batch of pairs, each [2 * pairs, tokens]: chosen rows before rejected ones, padded on the right."""
    (chosen, rejected), (read, read_too) = input_ids.chunk(2), attention_mask.bool().chunk(2)
    device, tokens = input_ids.device, input_ids.size(1)
    alike = ((chosen == rejected) & read & read_too).cumprod(dim=1).sum(dim=1, keepdim=True)
    end, end_too = (mask.sum(dim=1, keepdim=True) - 1 for mask in (read, read_too))
    # A packed row: [0, part) of both rows, [part, end) of the chosen one, [end, end + end_too - part) of the rejected.
    part = (alike - 1).clamp(min=0)
    column = torch.arange(int((end + end_too - part).max()), device=device)[None]
    of_chosen, of_rejected = (column >= part) & (column < end), column >= end
    # Behind its last token a row goes on with padding, which nobody sees or scores.
    position = torch.where(of_rejected, column - end + part, column).clamp(max=tokens - 1)

    def packed(rows: torch.Tensor) -> torch.Tensor:
        one, other = (side.gather(1, position) for side in rows.chunk(2))
        return torch.where(of_rejected, other, one)

    own = torch.arange(tokens - 1, device=device)[None]
    columns = torch.cat([own.expand(len(chosen), -1), torch.where(own < part, own, own - part + end)])
    causal = column[..., None] >= column[:, None]
    return PackedPairs(
        input_ids=packed(input_ids),
        position_ids=position,
        labels=packed(pad(labels[:, 1:], (0, 1), value=IGNORED)),
        sees=(causal & ~(of_rejected[..., None] & of_chosen[:, None]))[:, None],
        columns=columns.clamp(max=column.size(1) - 1),
    )


def can_pack(config: Any) -> bool:
    """Whether a model of this configuration reads a packed pair as the two rows that it stands for."""
    windows = getattr(config, "sliding_window", None)
    return config.model_type in FAMILIES and config._attn_implementation in ATTENTION and not windows


def pack_pairs(model: Any) -> None:
    """Let ``model``, a causal language model with TRL's fused head, read each pair of a batch as one row.

    Called with TRL's batch, its forward returns what it did: per-token outputs [2 * pairs, tokens - 1], zero where
    nothing is scored. Only the hidden states of scored tokens go through the head; on a CPU TRL sends all of them.
    Replaced here, below PEFT and a launcher's wrapper, the forward serves policy and reference.
    """
    fused = model.forward

    @functools.wraps(fused)  # generate() reads the signature
    def forward(*given: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        if not fused_lm_head:
            return fused(*given, **named)
        labels = named.pop("labels")
        pairs = pack(named.pop("input_ids"), named.pop("attention_mask"), labels)
        scored = pairs.labels != IGNORED

        def keep_scored(_: Any, __: Any, outputs: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
            return BaseModelOutputWithPast(last_hidden_state=outputs.last_hidden_state[scored][None])

        hook = model.base_model.register_forward_hook(keep_scored)
        try:
            outputs = fused(
                input_ids=pairs.input_ids,
                position_ids=pairs.position_ids,
                attention_mask=_mask(pairs.sees, model),
                shift_labels=pairs.labels[scored][None],
                fused_lm_head=True,
                **named,
            )
        finally:
            hook.remove()
        # The outputs are those of the scored tokens, one after the other.
        place = (scored.flatten().cumsum(0) - 1).clamp(min=0).view_as(scored)
        place = place.repeat(2, 1).gather(1, pairs.columns)
        left_out = labels[:, 1:] == IGNORED
        rows = {name: value[0, place].masked_fill(left_out, 0) for name, value in outputs.items() if name != "loss"}
        return FusedCausalLMOutput(**rows)

    model.forward = forward


def _mask(sees: torch.Tensor, model: Any) -> torch.Tensor:
    """``sees`` in the form that the model's attention takes: eager attention adds it to the scores."""
    if model.config._attn_implementation == "sdpa":
        return sees
    return torch.zeros_like(sees, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
