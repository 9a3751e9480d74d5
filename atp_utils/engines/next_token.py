"""How the next token is drawn: only by a request's own settings, never by what a model's files suggest."""

from collections.abc import Sequence

import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from atp_utils.evolution.requests import Sampling


def draw(scores: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """The next token of each row of ``scores`` [rows, vocabulary]; each row has a generator of its own.

    The argmax behind Gumbel noise is an exact sample, and moves with the scores' rounding less than any other way.
    """
    if sampling.temperature == 0:
        return scores.argmax(-1).tolist()
    if sampling.temperature != 1:
        scores = TemperatureLogitsWarper(sampling.temperature)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return (scores - _minus_gumbel(scores, generators)).argmax(-1).tolist()


def _minus_gumbel(scores: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Noise like ``scores``, each row from its generator, drawn where the scores are.

    From uniform numbers: a CPU draws exponential ones five times as long, a quarter of a step of 64 rows. In double
    precision, because a token that is less probable than a number's last digit couldn't win otherwise.
    """
    noise = torch.empty_like(scores, dtype=torch.float64)
    for row, generator in zip(noise, generators, strict=True):
        row.uniform_(generator=generator)
    return noise.log_().neg_().float().log_()
