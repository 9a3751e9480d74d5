"""Keys and values: a cache that grows in place, the prefixes kept between rounds, and the models that this fits."""

import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from atp_utils.evolution.requests import Message
from atp_utils.models.chat_template import common_prefix

SHARED_HEADS = "TRANSFORMERS_SDPA_FORCE_GQA"
ATTENDING = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
ROOM = 64  # tokens that a buffer is made larger by, beside an eighth of those that are there


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` [rows, heads, tokens, width] whose tensors are views of buffers with room for more tokens.

    transformers' own one concatenates, that is, copies all keys and values for every token that is generated: more than
    half of the time of a batch of chats on a CPU. All rows end with the same token, and are padded on the left.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self._buffers, self._first = [self.keys, self.values], 0
        new = key_states.shape[-2]
        self._show(len(key_states), self.get_seq_length() + new)
        self.keys[..., -new:, :], self.values[..., -new:, :] = key_states, value_states
        return self.keys, self.values

    def join(self, other: "GrowingLayer") -> None:
        rows, tokens = len(self.keys), other.get_seq_length()
        self._show(rows + len(other.keys), self.get_seq_length())
        for mine, new in ((self.keys[rows:], other.keys), (self.values[rows:], other.values)):
            # Masked, and all the same multiplied: what lay in memory there may be no number.
            mine[..., :-tokens, :] = 0
            mine[..., -tokens:, :] = new

    def leave(self, moves: Sequence[tuple[int, int]], rows: int, tokens: int) -> None:
        """Move rows ``(from, to)``, then keep the first ``rows`` and the last ``tokens``."""
        self._first += self.get_seq_length() - tokens
        for held in (self.keys, self.values):
            for origin, target in moves:
                held[target] = held[origin]
        self.keys, self.values = self.keys[:rows, :, -tokens:], self.values[:rows, :, -tokens:]

    def _show(self, rows: int, tokens: int) -> None:
        """Let keys and values be views of ``rows`` and ``tokens``, in larger buffers where these don't suffice."""
        end = self._first + tokens
        if len(self._buffers[0]) < rows or self._buffers[0].shape[-2] < end:
            self._buffers = [_enlarged(held, rows, tokens) for held in (self.keys, self.values)]
            self._first, end = 0, tokens
        self.keys, self.values = (buffer[:rows, :, self._first : end] for buffer in self._buffers)


def _enlarged(held: torch.Tensor, rows: int, tokens: int) -> torch.Tensor:
    buffer = held.new_empty((rows, held.shape[1], tokens + ROOM + tokens // 8, held.shape[-1]))
    buffer[: len(held), :, : held.shape[-2]] = held
    return buffer


class GrowingCache(Cache):
    """The cache of one batch, with a `GrowingLayer` for each layer of the model.

    Layers with a sliding window get one too: every key is kept, and the model's mask hides those outside the window.
    """

    def __init__(self):
        super().__init__(layer_class_to_replicate=GrowingLayer)

    def join(self, other: "GrowingCache") -> None:
        """Take in the rows of ``other``, which holds no more tokens, behind the own ones."""
        for layer, new in zip(self.layers, other.layers, strict=True):
            if layer.is_initialized:
                layer.join(new)

    def leave(self, ended: Sequence[bool], tokens: int) -> list[int]:
        """Take out the rows that have ``ended``, the last ones filling their places; the last ``tokens`` stay.

        Returns the former places of the rows that are left, in their new order. Nothing else is copied.
        """
        order, left = list(range(len(ended))), ended.count(False)
        moves = list(zip((i for i in order[left:] if not ended[i]), (i for i in order[:left] if ended[i]), strict=True))
        for origin, target in moves:
            order[target] = origin
        for layer in self.layers:
            if layer.is_initialized:
                layer.leave(moves, left, tokens)
        return order[:left]


class KeptChats:
    """Token ids, keys and values of answered chats, up to ``limit`` bytes: the least recently used one goes first."""

    def __init__(self, limit: float):
        self.limit, self.bytes = limit, 0
        self.chats: OrderedDict[str, tuple[list[int], list[torch.Tensor]]] = OrderedDict()

    def clear(self) -> None:
        """Forget all chats."""
        self.chats.clear()
        self.bytes = 0

    def find(self, messages: Sequence[Message], ids: list[int], most: int) -> list[torch.Tensor] | None:
        """Keys and values [2, heads, tokens, width], a layer each, of the longest kept beginning of ``ids``.

        None without any; at most ``most`` tokens. Layers may lie on several devices.
        """
        for end in range(len(messages), 0, -1):
            key = _chat_key(messages[:end])
            if key in self.chats:
                self.chats.move_to_end(key)
                found, values = self.chats[key]
                length = min(common_prefix([ids, found]), most)
                return first_tokens(values, length) if length > 0 else None
        return None

    def keep(self, messages: Sequence[Message], ids: list[int], cache: Cache, place: int) -> None:
        """Keep row ``place`` of a batch's ``cache``, whose last tokens are ``ids``.

        Nothing where the layers' keys and values differ in shape.
        """
        pairs = ((layer.keys, layer.values) for layer in cache.layers if layer.is_initialized)
        layers = [[held[place, :, -len(ids) :] for held in pair] for pair in pairs]
        if self.limit <= 0 or len({tensor.shape for pair in layers for tensor in pair}) != 1:
            return
        key = _chat_key(messages)
        if key in self.chats:
            self.bytes -= _bytes(self.chats.pop(key)[1])
        self.chats[key] = (ids, [torch.stack(pair) for pair in layers])
        self.bytes += _bytes(self.chats[key][1])
        while self.bytes > self.limit:
            self.bytes -= _bytes(self.chats.popitem(last=False)[1][1])


def first_tokens(values: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Of each layer's keys and values [2, heads, tokens, width] those of the first ``count`` tokens."""
    return [layer[..., :count, :] for layer in values]


def _bytes(values: Sequence[torch.Tensor]) -> int:
    return sum(layer.nbytes for layer in values)


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


@contextmanager
def shared_heads(ids: torch.Tensor) -> Iterator[None]:
    """Let query heads that share keys and values read them in place while ``ids`` [rows, tokens] are read on a CPU.

    transformers copies them for each head wherever there is a mask, unless told so. Not for single tokens, where it
    doesn't, nor on a GPU, whose fast kernels would then take no mask.
    """
    if ids.device.type != "cpu" or ids.shape[1] == 1 or SHARED_HEADS in os.environ:
        yield
        return
    os.environ[SHARED_HEADS] = "1"
    try:
        yield
    finally:
        del os.environ[SHARED_HEADS]


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
