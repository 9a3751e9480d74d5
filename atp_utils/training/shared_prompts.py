"""Rows of one batch that have a prompt in common: it is computed once.

TRL reads a preference pair as two rows, prompt + chosen and prompt + rejected. Here the rows of one prompt are a single
one: what they begin with alike, then the rest of each. An attention mask keeps a rest from seeing another's, and the
positions of each go on from where they part, so that every token is read as in a row of its own. TRL goes on to see its
rows. Where replies are sampled, the keys and values of a prompt are computed once for all of them.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import FusedCausalLMOutput

# Models in which nothing but attention lets tokens see each other, and attention that goes by any mask.
FAMILIES, ATTENTION = {"llama", "qwen2", "qwen3"}, {"sdpa", "eager"}
IGNORED = -100  # the label of what isn't scored, in PyTorch and TRL
SHARED = -1  # whose a token is that all rows of its group have


@dataclass(frozen=True)
class Packed:
    """TRL's ``rows`` of ``tokens``, those of one prompt in one of ``groups`` rows of ``length``.

    A token stands for what it predicts: the last one that all rows of a group have is there once for each rest, and the
    last one of a row isn't there.
    """

    input_ids: torch.Tensor  # [groups, length]
    position_ids: torch.Tensor  # [groups, length], counted from 0
    labels: torch.Tensor  # [groups, length]: the token that comes next, or IGNORED
    owner: torch.Tensor  # [groups, length]: the row whose token it is, or SHARED
    group: torch.Tensor  # [rows]: the packed row of each of TRL's
    columns: torch.Tensor  # [rows, tokens - 1]: where in it each of a row's tokens is; anywhere for padding

    @property
    def sees(self) -> torch.Tensor:
        """Who (third dimension) sees whom (fourth), bool [groups, 1, length, length]."""
        length = self.owner.size(1)
        # Behind its last token a row goes on with padding, which comes too late to be seen.
        causal = torch.ones(length, length, dtype=torch.bool, device=self.owner.device).tril()
        who, whom = self.owner[..., None], self.owner[:, None]
        return (causal & ((whom == SHARED) | (whom == who)))[:, None]


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Packed:
    """Pack a batch of TRL's, each [rows, tokens] and padded on either side; ``labels`` are IGNORED for the prompt."""
    device, (rows, tokens) = input_ids.device, input_ids.shape
    # GRPO pads prompts on the left: each row is turned until it begins with its first token.
    before = attention_mask.int().argmax(dim=1, keepdim=True)
    turned = (torch.arange(tokens, device=device) + before) % tokens
    input_ids, labels, read = (part.gather(1, turned) for part in (input_ids, labels, attention_mask.bool()))
    prompt = read & (labels != IGNORED).cumsum(dim=1).eq(0)
    group = torch.unique(input_ids.masked_fill(~prompt, SHARED), dim=0, return_inverse=True)[1]
    mates = group[:, None] == group
    first = mates.int().argmax(dim=1)
    alike = ((input_ids == input_ids[first]) & read & read[first]).cumprod(dim=1).sum(dim=1)
    # Of a row's tokens [0, end), which predict the next, [0, part) are shared and the rest begins in column `start`.
    end = read.sum(dim=1) - 1
    part = (torch.where(mates, alike, tokens).amin(dim=1) - 1).clamp(min=0)
    start = part + (mates.tril(-1) * (end - part)).sum(dim=1)
    own = torch.arange(tokens - 1, device=device).expand(rows, -1)
    end, part, start = end[:, None], part[:, None], start[:, None]
    columns = torch.where(own < part, own, own - part + start)
    read = own < end
    place = group[:, None].expand_as(own)[read], columns[read]
    shape = int(group.max()) + 1, int(place[1].max()) + 1

    def packed(values: torch.Tensor, empty: int) -> torch.Tensor:
        # Where rows share a token its values are the same.
        return values.new_full(shape, empty).index_put_(place, values[read])

    return Packed(
        input_ids=packed(input_ids[:, :-1], 0),
        position_ids=packed(own, 0),
        labels=packed(labels[:, 1:], IGNORED),
        owner=packed(torch.where(own < part, SHARED, torch.arange(rows, device=device)[:, None]), SHARED),
        group=group,
        columns=columns.clamp(max=shape[1] - 1).gather(1, (own - before).clamp(min=0)),
    )


def cost(input_ids: torch.Tensor, width: int) -> int:
    """What reading ``input_ids`` [rows, tokens] costs a model of a ``width``, to compare: products, and attention.

    A layer's products take some 24 * width^2 operations a token, attention by a mask 4 * width a token of a row.
    """
    return input_ids.numel() * (6 * width + input_ids.size(1))


def can_share(config: Any) -> bool:
    """Whether a model of this configuration reads packed rows as those that they stand for."""
    windows = getattr(config, "sliding_window", None)
    return config.model_type in FAMILIES and config._attn_implementation in ATTENTION and not windows


def score_answers(model: Any) -> None:
    """Let ``model``, a causal language model with TRL's fused head, score answers only, and compute prompts once each.

    Called with TRL's batch, its forward returns what it did: per-token outputs [rows, tokens - 1], zero where nothing
    is scored. Only the hidden states of scored tokens go through the head; on a CPU TRL sends all of them. Rows of one
    prompt are read as one, unless that costs more. Replaced here, below PEFT and a launcher's wrapper, the forward
    serves policy and reference: of one batch both read the same, and an adapter that says nothing differs by nothing.
    A model that can't (`can_share`) stays as it is.
    """
    if not can_share(model.config):
        return
    fused = model.forward

    @functools.wraps(fused)  # generate() reads the signature
    def forward(*given: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        if not fused_lm_head:
            return fused(*given, **named)
        ids, mask, labels = (named.pop(name) for name in ("input_ids", "attention_mask", "labels"))
        wanted = labels[:, 1:]
        packed, width = pack(ids, mask, labels), model.config.hidden_size
        if cost(packed.input_ids, width) < cost(ids, width):
            named |= {"position_ids": packed.position_ids, "attention_mask": _mask(packed.sees, model)}
            outputs, place = _scored(model, fused, packed.input_ids, packed.labels, named)
            place = place[packed.group].gather(1, packed.columns)
        else:
            named["attention_mask"] = mask
            outputs, place = _scored(model, fused, ids, pad(wanted, (0, 1), value=IGNORED), named)
            place = place[:, :-1]
        left_out = wanted == IGNORED
        rows = {name: value[0, place].masked_fill(left_out, 0) for name, value in outputs.items() if name != "loss"}
        return FusedCausalLMOutput(**rows)

    model.forward = forward


def _scored(model: Any, fused: Any, ids: torch.Tensor, labels: torch.Tensor, named: dict) -> tuple[Any, torch.Tensor]:
    """Outputs [1, scored] of the tokens that have a label, in a line, and a token's place in it [as ``ids``]."""
    scored = labels != IGNORED

    def keep(_: Any, __: Any, outputs: BaseModelOutputWithPast) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=outputs.last_hidden_state[scored][None])

    hook = model.base_model.register_forward_hook(keep)
    try:
        outputs = fused(input_ids=ids, shift_labels=labels[scored][None], fused_lm_head=True, **named)
    finally:
        hook.remove()
    return outputs, (scored.flatten().cumsum(0) - 1).clamp(min=0).view_as(scored)


def _mask(sees: torch.Tensor, model: Any) -> torch.Tensor:
    """``sees`` in the form that the model's attention takes: eager attention adds it to the scores."""
    if model.config._attn_implementation == "sdpa":
        return sees
    return torch.zeros_like(sees, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)


def share_prefill(model: Any) -> None:
    """Let ``model.generate`` read each prompt of a batch once, for all replies to it that it samples."""
    if not can_share(model.config):
        return
    generate = model.generate

    @functools.wraps(generate)
    def shared(input_ids: torch.Tensor, attention_mask: torch.Tensor, **named: Any) -> torch.Tensor:
        group = torch.unique(input_ids, dim=0, return_inverse=True)[1]
        first = (torch.arange(int(group.max()) + 1, device=group.device)[:, None] == group).int().argmax(dim=1)
        if len(first) < len(group):
            # All but the last token, which generate() reads in each row to sample what comes next.
            ids, mask = input_ids[first, :-1], attention_mask[first, :-1]
            cache = DynamicCache(config=model.config)
            position = (mask.cumsum(dim=1) - 1).clamp(min=0)
            model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
            cache.batch_select_indices(group)
            named["past_key_values"] = cache
        return generate(input_ids=input_ids, attention_mask=attention_mask, **named)

    model.generate = shared
