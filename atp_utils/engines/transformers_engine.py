"""The in-process engine: batched transformers, with each conversation's KV cache kept between rounds.

A round costs its new tokens, not its history: the keys and values of every answered chat that may go on are kept, and
a chat that extends one starts from the longest common token prefix. Chats may fork (two agents with one past) and
batches may mix lengths: a row is padded on the left only, so that windows and positions are those of the chat alone.
Floating-point sums depend on the batch's shape, so log-probabilities repeat to rounding (about 0.01 in bfloat16), not
to the bit.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from atp_utils import models
from atp_utils.engines.kv_cache import KeptChats, check_attention, context_length, growing_cache
from atp_utils.engines.next_token import processors
from atp_utils.evolution.parsing import prompted_thinking
from atp_utils.evolution.requests import Reply, Request, Sampling, collapse
from atp_utils.models import weights_memory
from atp_utils.models.chat_template import common_prefix, decode, encode, render, tokenised, turn_end
from atp_utils.support.code_digest import PACKAGE, code_of

SHARE = 0.7  # of the free memory that a batch's keys and values may take: buffers grow by an eighth, and copy


@dataclass
class _Row:
    """A chat in work: token ids, the part of an option's answer that all options share, its kept prefix.

    ``opening`` is the mark of thinking that the prompt ends with and the reply therefore lacks, as a rule "";
    ``indices`` are those of the requests that it answers.
    """

    request: Request
    opening: str
    ids: list[int]
    tails: list[list[int]]
    shared: int
    kept: torch.Tensor | None
    indices: Sequence[int]

    @property
    def new(self) -> int:
        return len(self.ids) - (0 if self.kept is None else self.kept.shape[-2])


class TransformersEngine:
    """Answers `Request`s with the model ``name`` (and a LoRA adapter) in this process.

    Weights are loaded at the first request, so a replayed run never needs them. ``batch_tokens`` bounds the
    padded tokens of one forward pass (by default 4096, on a GPU 16384), ``cache_bytes`` the kept keys and
    values (least recently used conversations go first). ``forward_tokens`` counts the tokens that the model
    had to read, ``answered`` the chats of different content. A reply ends with the model's context where
    ``max_new_tokens`` would go beyond it. A chat that fills the context, or does so with an option, gets the finish
    reason ``context``, no text and no log-probabilities.

    Raises ValueError for a model whose layers keep a running state, and what `models.identity` raises.
    """

    def __init__(
        self,
        name: str,
        adapter: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        batch_tokens: int = 0,
        cache_bytes: float = 6e9,
    ):
        code = code_of(f"{PACKAGE}/engines/transformers_engine.py")
        self.identity = f"{models.identity(name, adapter, dtype)}|code={code[:16]}"
        config = models.read_config(name)
        check_attention(name, config)
        self.context = context_length(config)
        self.tokenizer = models.load_tokenizer(name)
        self.batch_tokens = batch_tokens or (16384 if torch.cuda.is_available() else 4096)
        self.answered = self.forward_tokens = 0
        self._load = lambda: models.load(name, adapter, dtype)
        self._kept = KeptChats(cache_bytes)

    @cached_property
    def model(self):
        """The loaded model."""
        return self._load()

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        """Yield ``(index, reply)``, batch by batch; requests of equal content are computed once."""
        rows = []
        for group in collapse(requests):
            # Of equal chats one may go on, and others not.
            request = max((requests[index] for index in group), key=lambda request: request.extended)
            rows.append(self._row(request, group))
        # Requests of one kind can share a batch: as many options, or the same sampling settings.
        kinds: dict[int | Sampling, list[_Row]] = {}
        for row in sorted(rows, key=lambda row: len(row.ids)):
            sampling = row.request.sampling
            if len(row.ids) + max(map(len, row.tails), default=1) > self.context:
                yield from ((index, Reply("", len(row.ids) - row.shared, 0, "context")) for index in row.indices)
            else:
                kinds.setdefault(len(row.tails) or sampling, []).append(row)
        for batch in (batch for kind in kinds.values() for batch in self._batches(kind)):
            outcomes = self._choose(batch) if batch[0].tails else self._generate(batch)
            self.answered += len(batch)
            for row, outcome in zip(batch, outcomes, strict=True):
                row.kept = None
                yield from ((index, outcome) for index in row.indices)

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        batch, fresh, room = [], 0, self._room()
        for row in rows:
            fresh = max(fresh, row.new)
            longest = len(row.ids) + (0 if row.tails else self._limit(row))
            if batch and (fresh * (len(batch) + 1) > self.batch_tokens or longest * (len(batch) + 1) > room):
                yield batch
                batch, fresh, room = [], row.new, self._room()
            batch.append(row)
        yield batch

    def _room(self) -> float:
        """Tokens whose keys and values fit on the GPUs; a batch has all of its rows as long as its longest reply."""
        if not torch.cuda.is_available():
            return math.inf
        needed = self._token_bytes
        return SHARE * weights_memory.free_bytes(all_gpus=True)[0] / needed

    @cached_property
    def _token_bytes(self) -> int:
        """Bytes of the keys and values of one token."""
        one, cache = torch.zeros(1, 1, dtype=torch.long, device=self.model.device), growing_cache()
        self.model(one, past_key_values=cache, use_cache=True)
        return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))

    def _row(self, request: Request, indices: Sequence[int] = ()) -> _Row:
        opening = ""
        if request.options:
            prompt, options = tokenised(self.tokenizer, request.messages, request.options)
            shared = common_prefix(options)
            ids = prompt + options[0][:shared]
        else:
            text = render(self.tokenizer, request.messages, request.sampling.thinking)
            opening, ids, options, shared = prompted_thinking(text), encode(self.tokenizer, text), [], 0
        tails = [option[shared:] for option in options]
        # What follows the prompt proper is always read anew: its logits are what is wanted.
        kept = self._kept.find(request.messages, ids, len(ids) - shared - 1)
        return _Row(request, opening, ids, tails, shared, kept, indices)

    def _padded(self, rows: Sequence[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [rows, longest row], padded on the ``side``."""
        ids = [torch.tensor(row, dtype=torch.long, device=self.model.device) for row in rows]
        mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, side)
        return pad_sequence(ids, True, self.tokenizer.pad_token_id, side), mask

    def _assemble(self, rows: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor, Cache]:
        """Ids and mask [rows, prefix + new tokens], and a cache holding the prefixes, all left-padded."""
        self.forward_tokens += sum(row.new for row in rows)
        fresh = max(row.new for row in rows)
        ids, mask = self._padded([row.ids for row in rows], "left")
        prefix, cache = ids.shape[1] - fresh, growing_cache()
        if prefix:
            sample = next(row.kept for row in rows if row.kept is not None)
            # Where padding would stand between prefix and new tokens, the prefix's last tokens are read once more: a
            # gap takes places in a sliding window.
            ends = [max(len(row.ids) - fresh, 0) for row in rows]
            kept = [(row.kept if end else sample)[..., :end, :] for row, end in zip(rows, ends, strict=True)]
            for layer in range(len(sample)):
                both = [pad(each[layer], (0, 0, prefix - each.shape[-2], 0)) for each in kept]
                cache.update(*torch.stack(both, dim=1), layer)
        return ids, mask, cache

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Cache, keep: int) -> torch.Tensor:
        """Logits [rows, keep, vocabulary] in float32 after the last ``keep`` tokens of ``ids``."""
        # A reply that has ended is padded, beyond the context too.
        last = int(min(self.context, sys.maxsize)) - 1
        positions = (mask.cumsum(-1) - 1).clamp(0, last)[:, -ids.shape[1] :]
        read = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        out = self.model(**read, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return out.logits.float()

    def _choose(self, rows: Sequence[_Row]) -> list[Reply]:
        """Score every option's complete answer."""
        ids, mask, cache = self._assemble(rows)
        keep = max(row.shared for row in rows) + 1
        after = self._forward(ids[:, cache.get_seq_length() :], mask, cache, keep).log_softmax(-1)
        starts = [len(row.ids) - row.shared for row in rows]
        shared = [_total(after[i, -row.shared - 1 :], row.ids[starts[i] :]) for i, row in enumerate(rows)]
        for place, row in enumerate(rows):
            if row.request.extended:
                self._kept.keep(row.request.messages, row.ids, cache, place, mask[place].nonzero().flatten())
        by_option = zip(*(row.tails for row in rows), strict=True)
        ends = [self._score_tails(tails, after[:, -1], mask, cache) for tails in by_option]
        replies = []
        for place, row in enumerate(rows):
            scores = tuple(shared[place] + end[place] for end in ends)
            longest = row.shared + max(map(len, row.tails))
            replies.append(Reply("", starts[place], longest, logprobs=scores, shared=shared[place]))
        return replies

    def _score_tails(
        self, tails: Sequence[list[int]], after: torch.Tensor, mask: torch.Tensor, cache: Cache
    ) -> list[float]:
        """log P(tail | what the cache holds) of one option for every row; the cache is left as it was.

        ``after`` [rows, vocabulary] are the log-probabilities of a tail's first token.
        """
        scores = [_total(row[None], tail[:1]) for row, tail in zip(after, tails, strict=True)]
        read = [tail[:-1] for tail in tails]
        if not any(read):
            return scores
        self.forward_tokens += sum(map(len, read))
        ids, read_mask = self._padded(read, "right")
        following = self._forward(ids, torch.cat([mask, read_mask], dim=1), cache, ids.shape[1]).log_softmax(-1)
        cache.crop(-ids.shape[1])
        return [score + _total(following[place], tails[place][1:]) for place, score in enumerate(scores)]

    def _generate(self, rows: list[_Row]) -> list[Reply]:
        ids, mask, cache = self._assemble(rows)
        new = self._drawn(rows, ids, mask, cache)
        replies = []
        for place, row in enumerate(rows):
            tokens = new[place].tolist()[: self._limit(row)]
            end = next((i for i, token in enumerate(tokens) if token in self._stop_ids()), None)
            # A reply that is cut off in a block that the prompt opened would otherwise pass for an answer.
            text = row.opening + decode(self.tokenizer, tokens[:end])
            count = len(tokens) if end is None else end + 1
            replies.append(Reply(text, len(row.ids), count, "length" if end is None else "stop"))
            self.forward_tokens += count
            # The last token sampled was never read, so it has no keys.
            read = min(count, cache.get_seq_length() - ids.shape[1])
            slots = torch.cat([mask[place].nonzero().flatten(), ids.shape[1] + torch.arange(read).to(mask.device)])
            self._kept.keep(row.request.messages, row.ids + tokens[:read], cache, place, slots)
        return replies

    def _limit(self, row: _Row) -> int:
        """Most new tokens of a reply: those asked for, or what its chat leaves of the context."""
        return int(min(row.request.sampling.max_new_tokens, self.context - len(row.ids)))

    def _drawn(self, rows: list[_Row], ids: torch.Tensor, mask: torch.Tensor, cache: Cache) -> torch.Tensor:
        """New tokens [rows, up to the largest limit], padded behind a stop token or a row's own limit.

        Drawn here, because `generate` mixes in the settings that come with a model: penalties, suppressed or forced
        tokens, stop strings.
        """
        sampling = rows[0].request.sampling
        process = processors(sampling, [row.request.seed for row in rows])
        stops = torch.tensor(self._stop_ids(), device=ids.device)
        limits = torch.tensor([self._limit(row) for row in rows], device=ids.device)
        ended = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
        fed, new = ids[:, cache.get_seq_length() :], []
        for count in range(1, int(limits.max()) + 1):
            scores = process(ids, self._forward(fed, mask, cache, 1)[:, -1])
            token = scores.argmax(-1).masked_fill(ended, self.tokenizer.pad_token_id)
            new.append(token)
            ended |= torch.isin(token, stops) | (limits <= count)
            if ended.all():
                break
            fed, mask = token[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        return torch.stack(new, dim=1)

    def _stop_ids(self) -> list[int]:
        """What ends a reply: the end of a turn, and the end tokens of tokenizer and model."""
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        found = {turn_end(self.tokenizer), self.tokenizer.eos_token_id, *configured}
        return sorted(token for token in found if token is not None)


def _total(logprobs: torch.Tensor, tokens: Sequence[int]) -> float:
    """Sum of the log-probabilities [tokens or more, vocabulary] of ``tokens``."""
    return float(sum(logprobs[i, token] for i, token in enumerate(tokens)))
