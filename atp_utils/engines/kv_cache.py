"""Keys and values: a cache that grows in place, the prefixes kept between rounds, and the models that this fits."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from atp_utils.evolution.requests import Message
from atp_utils.models.chat_template import common_prefix

ATTENDING = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)


ROOM = 64  # tokens beside an eighth of those that are there


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` [rows, heads, tokens, width] whose tensors are views of buffers with room for more tokens.

    transformers' own one concatenates, that is, copies all keys and values for every token that is generated: more than
    half of the time of a batch of chats on a CPU.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers: list[torch.Tensor | None] = [None, None]
        start = self.get_seq_length()
        self.keys = self._extended(0, self.keys, start, key_states)
        self.values = self._extended(1, self.values, start, value_states)
        return self.keys, self.values

    def _extended(self, place: int, held: torch.Tensor, start: int, new: torch.Tensor) -> torch.Tensor:
        end = start + new.shape[-2]
        buffer = self._buffers[place]
        if buffer is None or buffer.shape[-2] < end:
            buffer = new.new_empty((*new.shape[:-2], end + ROOM + end // 8, new.shape[-1]))
            if start:
                buffer[..., :start, :] = held
            self._buffers[place] = buffer
        buffer[..., start:end, :] = new
        return buffer[..., :end, :]


def growing_cache() -> Cache:
    """An empty cache for one batch, with a `GrowingLayer` for each layer of the model.

    Layers with a sliding window get one too: every key is kept, and the model's mask hides those outside the window.
    """
    return Cache(layer_class_to_replicate=GrowingLayer)


class KeptChats:
    """Token ids, keys and values of answered chats, up to ``limit`` bytes: the least recently used one goes first."""

    def __init__(self, limit: float):
        self.limit, self.bytes = limit, 0
        self.chats: OrderedDict[str, tuple[list[int], torch.Tensor]] = OrderedDict()

    def clear(self) -> None:
        """Forget all chats."""
        self.chats.clear()
        self.bytes = 0

    def find(self, messages: Sequence[Message], ids: list[int], most: int) -> torch.Tensor | None:
        """Keys and values [layers, 2, heads, tokens, width] of the longest kept beginning of ``ids``.

        None without any; at most ``most`` tokens.
        """
        for end in range(len(messages), 0, -1):
            key = _chat_key(messages[:end])
            if key in self.chats:
                self.chats.move_to_end(key)
                found, values = self.chats[key]
                length = min(common_prefix([ids, found]), most)
                return values[..., :length, :] if length > 0 else None
        return None

    def keep(self, messages: Sequence[Message], ids: list[int], cache: Cache, place: int, slots: torch.Tensor) -> None:
        """Keep row ``place`` of a batch's ``cache``, whose tokens ``ids`` lie at ``slots``.

        Nothing where the layers' keys and values differ in shape.
        """
        layers = [(layer.keys[place], layer.values[place]) for layer in cache.layers if layer.is_initialized]
        if self.limit <= 0 or len({tensor.shape for pair in layers for tensor in pair}) != 1:
            return
        values = torch.stack([torch.stack(pair) for pair in layers])[..., slots, :]
        key = _chat_key(messages)
        if key in self.chats:
            self.bytes -= self.chats.pop(key)[1].nbytes
        self.chats[key] = (ids, values)
        self.bytes += values.nbytes
        while self.bytes > self.limit:
            self.bytes -= self.chats.popitem(last=False)[1][1].nbytes


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token of a model with this configuration; an estimate where layers differ."""
    text = config.get_text_config(decoder=True)
    heads = _told(text, "num_key_value_heads", text.num_attention_heads)
    width = _told(text, "head_dim", text.hidden_size // text.num_attention_heads)
    return text.num_hidden_layers * 2 * heads * width * dtype.itemsize


def _told(config: Any, name: str, otherwise: int) -> int:
    try:
        return getattr(config, name, None) or otherwise
    except AmbiguousGlobalPerLayerAttributeError:  # Gemma 4's layers have several
        return otherwise


def check_attention(name: str, config: Any) -> None:
    """Raise ValueError for a model ``name`` with layers whose state can't be cut back to a shared beginning."""
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    layers = DynamicCache(config=config).layers
    if getattr(model, "_is_stateful", False) or any(type(layer) not in ATTENDING for layer in layers):
        raise ValueError(
            f"model {name!r} ({config.model_type}) has layers with a running state instead of keys and values, which "
            "can't be cut back to what chats share: take a model of attention layers only, or serve this one and name "
            "the server"
        )


def context_length(config: Any) -> float:
    """Tokens that a model can read with the positions that it was trained on; infinite where it has no limit.

    LongRoPE (Phi 3) has other frequencies for long chats than for short ones. They would mix in a batch and in kept
    keys, so the limit is where they change.
    """
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return getattr(text, "max_position_embeddings", None) or math.inf


def _chat_key(messages: Sequence[Message]) -> str:
    return "\x00".join(f"{message['role']}\x01{message['content']}" for message in messages)
