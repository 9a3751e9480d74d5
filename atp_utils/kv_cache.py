"""A cache of keys and values that grows in place.

transformers' own one concatenates, that is, copies all keys and values for every token that is generated: more than
half of the time of a batch of chats on a CPU.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` [rows, heads, tokens, width] whose tensors are views of buffers with room for more tokens."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[torch.Tensor | None] = [None, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        self.keys = self._extended(0, self.keys, start, key_states)
        self.values = self._extended(1, self.values, start, value_states)
        return self.keys, self.values

    def _extended(self, place: int, held: torch.Tensor, start: int, new: torch.Tensor) -> torch.Tensor:
        end = start + new.shape[-2]
        buffer = self._buffers[place]
        if buffer is None or buffer.shape[-2] < end:
            buffer = new.new_empty((*new.shape[:-2], end + 64 + end // 8, new.shape[-1]))
            if start:
                buffer[..., :start, :] = held
            self._buffers[place] = buffer
        buffer[..., start:end, :] = new
        return buffer[..., :end, :]


def growing_cache() -> Cache:
    """An empty cache for one batch, with a `GrowingLayer` for each layer of the model."""
    return Cache(layer_class_to_replicate=GrowingLayer)
