"""How the next token is drawn: only by a request's own settings, never by what a model's files suggest."""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from atp_utils.evolution.requests import Sampling


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise from each row's own generator: the argmax is then an exact sample, seeded by row.

    The noise is drawn where the scores are: on a CPU it would take some 20 ns an entry, with 100 rows and a large
    vocabulary more than ten times as long as a GPU's decoding step.
    """

    def __init__(self, seeds: Sequence[int]):
        self.seeds, self.generators = seeds, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log_()


def processors(sampling: Sampling, seeds: Sequence[int]) -> LogitsProcessorList:
    """Turn scores [rows, vocabulary] into ones whose argmax is the token drawn; ``seeds`` has one for each row."""
    found = LogitsProcessorList()
    if sampling.temperature == 0:
        return found
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    found.append(_Gumbel(seeds))
    return found
