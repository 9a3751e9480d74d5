"""The in-process engine: batched transformers, with each conversation's KV cache kept between rounds.

A round costs its new tokens, not its history: the keys and values of every answered chat are kept, and a chat
that extends one starts from the longest common token prefix. Chats may fork (two agents with one past) and
batches may mix lengths: rows are assembled left-padded, and padding between a kept prefix and new tokens is
masked and takes no position. Floating-point sums depend on the batch's shape, so log-probabilities repeat to
rounding (about 0.01 in bfloat16), not to the bit.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import Cache, LogitsProcessorList
from transformers.generation.logits_process import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from atp_utils import models
from atp_utils.engine import Reply, Request, Sampling, collapse, drawn, opens_thinking, render
from atp_utils.kv_cache import growing_cache


@dataclass
class _Row:
    """A chat in work: token ids, the part of an option's answer that all options share, its kept prefix.

    ``opening`` is the mark of thinking that the prompt ends with and the reply therefore lacks, as a rule "".
    """

    request: Request
    opening: str
    ids: list[int]
    tails: list[list[int]]
    shared: int
    kept: torch.Tensor | None

    @property
    def length(self) -> int:
        return 0 if self.kept is None else self.kept.shape[-2]


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


class TransformersEngine:
    """Answers `Request`s with the model ``name`` (and a LoRA adapter) in this process.

    Weights are loaded at the first request, so a replayed run never needs them. ``batch_tokens`` bounds the
    padded tokens of one forward pass (by default 4096, on a GPU 16384), ``cache_bytes`` the kept keys and
    values (least recently used conversations go first). ``forward_tokens`` counts the tokens that the model
    really read, ``answered`` the chats of different content.
    """

    def __init__(
        self,
        name: str,
        adapter: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        batch_tokens: int | None = None,
        cache_bytes: float = 6e9,
    ):
        self.identity = models.identity(name, adapter, dtype)
        self.tokenizer = models.load_tokenizer(name)
        self.batch_tokens = batch_tokens or (16384 if torch.cuda.is_available() else 4096)
        self.cache_bytes = cache_bytes
        self.answered = self.forward_tokens = 0
        self._load = lambda: models.load(name, adapter, dtype)
        self._kept: OrderedDict[str, tuple[list[int], torch.Tensor]] = OrderedDict()
        self._kept_bytes = 0

    @cached_property
    def model(self):
        """The loaded model."""
        return self._load()

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield ``(index, reply)``, batch by batch; requests of equal content are computed once."""
        groups = collapse(requests)
        rows = [self._row(requests[group[0]]) for group in groups]
        order = sorted(range(len(rows)), key=lambda i: (_kind(rows[i].request), len(rows[i].ids)))
        for batch in self._batches(order, rows):
            chunk = [rows[i] for i in batch]
            forced = bool(chunk[0].request.options)
            outcomes = self._choose(chunk) if forced else self._generate(chunk)
            self.answered += len(chunk)
            for i, outcome in zip(batch, outcomes, strict=True):
                rows[i].kept = None
                for index in groups[i]:
                    yield index, drawn(requests[index], outcome)

    def _batches(self, order: list[int], rows: list[_Row]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in order:
            grown = [*batch, i]
            new = max(len(rows[j].ids) - rows[j].length for j in grown)
            differs = batch and _kind(rows[i].request) != _kind(rows[batch[0]].request)
            if batch and (differs or new * len(grown) > self.batch_tokens):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _row(self, request: Request) -> _Row:
        prompt = render(self.tokenizer, request.messages, request.sampling.thinking and not request.options)
        opening = "<think>" if opens_thinking(prompt) else ""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        options = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in request.options]
        shared = _common_prefix(options) if options else 0
        ids = ids + (options[0][:shared] if options else [])
        tails = [option[shared:] for option in options]
        return _Row(request, opening, ids, tails, shared, self._prefix(request, ids, shared))

    def _prefix(self, request: Request, ids: list[int], shared: int) -> torch.Tensor | None:
        """Keys and values [layers, 2, heads, tokens, width] of the longest kept beginning of ``ids``."""
        messages = list(request.messages)
        for end in range(len(messages), 0, -1):
            found = self._kept.get(_chat_key(messages[:end]))
            if found is not None:
                self._kept.move_to_end(_chat_key(messages[:end]))
                # What follows the prompt proper is always read anew: its logits are what is wanted.
                length = max(min(_common_prefix([ids, found[0]]), len(ids) - shared - 1), 0)
                return found[1][..., :length, :] if length else None
        return None

    def _keep(self, row: _Row, ids: list[int], cache: Cache, place: int, slots: torch.Tensor) -> None:
        if self.cache_bytes <= 0:
            return
        layers = [torch.stack((layer.keys[place], layer.values[place])) for layer in cache.layers]
        values = torch.stack(layers)[..., slots, :]
        key = _chat_key(row.request.messages)
        if key in self._kept:
            self._kept_bytes -= self._kept.pop(key)[1].nbytes
        self._kept[key] = (ids, values)
        self._kept_bytes += values.nbytes
        while self._kept_bytes > self.cache_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1][1].nbytes

    def _assemble(self, rows: list[_Row]) -> tuple[torch.Tensor, torch.Tensor, Cache]:
        """Ids and mask [rows, prefix + new tokens], and a cache holding the prefixes, all left-padded."""
        prefix = max(row.length for row in rows)
        fresh = max(len(row.ids) - row.length for row in rows)
        ids = torch.full((len(rows), prefix + fresh), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            old, new = row.ids[: row.length], row.ids[row.length :]
            for part, end in ((old, prefix), (new, prefix + fresh)):
                ids[place, end - len(part) : end] = torch.tensor(part, dtype=ids.dtype)
                mask[place, end - len(part) : end] = 1
        cache = growing_cache()
        if prefix:
            sample = next(row.kept for row in rows if row.kept is not None)
            for layer in range(sample.shape[0]):
                shape = (2, len(rows), sample.shape[2], prefix, sample.shape[4])
                both = sample.new_zeros(shape)
                for place, row in enumerate(rows):
                    if row.kept is not None:
                        both[:, place, :, prefix - row.length :] = row.kept[layer]
                cache.update(both[0], both[1], layer)
        self.forward_tokens += sum(len(row.ids) - row.length for row in rows)
        return ids.to(self.model.device), mask.to(self.model.device), cache

    def _forward(self, ids, mask, cache, keep: int) -> torch.Tensor:
        """Log-probabilities [rows, keep, vocabulary] after the last ``keep`` tokens of ``ids``."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return out.logits.float().log_softmax(-1)

    def _choose(self, rows: list[_Row]) -> list[Reply]:
        """Score every option's complete answer; the outcome's text is left to each request's own draw."""
        ids, mask, cache = self._assemble(rows)
        keep = max(row.shared for row in rows) + 1
        after = self._forward(ids[:, cache.get_seq_length() :], mask, cache, keep)
        shared = [_last_sum(after[p], row.ids[len(row.ids) - row.shared :]) for p, row in enumerate(rows)]
        for place, row in enumerate(rows):
            self._keep(row, row.ids, cache, place, mask[place].nonzero().flatten())
        ends = [
            self._score_tails([row.tails[i] for row in rows], after[:, -1], mask, cache)
            for i in range(len(rows[0].tails))
        ]
        return [
            Reply(
                text="",
                prompt_tokens=len(row.ids) - row.shared,
                completion_tokens=row.shared + max(map(len, row.tails)),
                logprobs=tuple(shared[place] + end[place] for end in ends),
            )
            for place, row in enumerate(rows)
        ]

    def _score_tails(
        self, tails: list[list[int]], after: torch.Tensor, mask: torch.Tensor, cache: Cache
    ) -> list[float]:
        """log P(tail | what the cache holds) of one option for every row; the cache is left as it was.

        ``after`` [rows, vocabulary] are the log-probabilities of a tail's first token. Tails are right-padded.
        """
        scores = [float(after[place, tail[0]]) if tail else 0.0 for place, tail in enumerate(tails)]
        longest = max(map(len, tails)) - 1
        if longest < 1:
            return scores
        fed = torch.full((len(tails), longest), self.tokenizer.pad_token_id)
        fed_mask = torch.zeros_like(fed)
        for place, tail in enumerate(tails):
            read = tail[:-1]
            fed[place, : len(read)] = torch.tensor(read, dtype=fed.dtype)
            fed_mask[place, : len(read)] = 1
            self.forward_tokens += len(read)
        joint = torch.cat([mask, fed_mask.to(mask.device)], dim=1)
        following = self._forward(fed.to(mask.device), joint, cache, longest)
        cache.crop(-longest)
        return [
            score + float(sum(following[place, i, token] for i, token in enumerate(tails[place][1:])))
            for place, score in enumerate(scores)
        ]

    def _generate(self, rows: list[_Row]) -> list[Reply]:
        ids, mask, cache = self._assemble(rows)
        sampling = rows[0].request.sampling
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            logits_processor=_processors(sampling, [row.request.seed for row in rows]),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self._stop_ids(),
        )
        replies = []
        for place, row in enumerate(rows):
            new = out[place, ids.shape[1] :].tolist()
            end = next((i for i, token in enumerate(new) if token in self._stop_ids()), None)
            # A reply that is cut off in a block that the prompt opened would otherwise pass for an answer.
            text = row.opening + self.tokenizer.decode(new[:end], skip_special_tokens=True)
            count = len(new) if end is None else end + 1
            replies.append(Reply(text, len(row.ids), count, "length" if end is None else "stop"))
            self.forward_tokens += count
            # The last token sampled was never read, so it has no keys.
            read = min(count, cache.get_seq_length() - ids.shape[1])
            slots = torch.cat([mask[place].nonzero().flatten(), ids.shape[1] + torch.arange(read).to(mask.device)])
            self._keep(row, row.ids + new[:read], cache, place, slots)
        return replies

    def _stop_ids(self) -> list[int]:
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        return sorted({self.tokenizer.eos_token_id, *(token for token in configured if token is not None)})


def _kind(request: Request) -> tuple:
    """Requests of one kind can share a batch: as many options, or the same sampling settings."""
    sampling = request.sampling
    if request.options:
        return (0, len(request.options))
    return (
        1,
        sampling.max_new_tokens,
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.thinking,
    )


def _processors(sampling: Sampling, seeds: Sequence[int]) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if sampling.temperature == 0:
        return processors
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(_Gumbel(seeds))
    return processors


def _chat_key(messages: Sequence) -> str:
    return "\x00".join(f"{message['role']}\x01{message['content']}" for message in messages)


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    shortest = min(map(len, sequences))
    for place in range(shortest):
        if len({sequence[place] for sequence in sequences}) > 1:
            return place
    return shortest


def _last_sum(logprobs: torch.Tensor, tokens: Sequence[int]) -> float:
    """Sum of the log-probabilities of ``tokens``, the last ones that were read; the last row follows them."""
    rows = logprobs[-len(tokens) - 1 : -1]
    return float(sum(rows[i, token] for i, token in enumerate(tokens)))
