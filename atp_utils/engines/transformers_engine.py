"""The in-process engine: batched transformers, with each conversation's KV cache kept between rounds.

A round costs its new tokens, not its history: the keys and values of every answered chat that may go on are kept, and
a chat that extends one starts from the longest common token prefix. Chats may fork (two agents with one past) and
batches may mix lengths: a row is padded on the left only, so that windows and positions are those of the chat alone.
Floating-point sums depend on the batch's shape, so log-probabilities repeat to rounding (about 0.01 in bfloat16), not
to the bit. Replies that are written leave their batch when they end, and waiting chats take their places.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from atp_utils import models
from atp_utils.engines.kv_cache import (
    ROOM,
    GrowingCache,
    KeptChats,
    check_attention,
    context_length,
    first_tokens,
    shared_heads,
    token_bytes,
)
from atp_utils.engines.next_token import draw
from atp_utils.evolution.parsing import prompted_thinking
from atp_utils.evolution.requests import Reply, Request, Sampling, collapse
from atp_utils.models import weights_memory
from atp_utils.models.chat_template import common_prefix, decode, encode, render, tokenised, turn_end
from atp_utils.support.code_digest import PACKAGE, code_of

# A batch holds keys and values of at most so many times ``batch_tokens`` tokens, its histories and replies included.
HELD = 8


@dataclass
class _Row:
    """A chat in work: token ids, the part of an option's answer that all options share, its kept prefix.

    ``opening`` is the mark of thinking that the prompt ends with and the reply therefore lacks, as a rule "";
    ``indices`` are those of the requests that it answers; ``written`` are a reply's tokens so far, drawn by the
    ``generator``; the last of them hasn't been read.
    """

    request: Request
    opening: str
    ids: list[int]
    tails: list[list[int]]
    shared: int
    kept: list[torch.Tensor] | None
    indices: Sequence[int]
    written: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None

    @property
    def new(self) -> int:
        return len(self.ids) - (0 if self.kept is None else self.kept[0].shape[-2])

    @property
    def length(self) -> int:
        return len(self.ids) + len(self.written)


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
        parts = models.made_of(name, adapter, dtype)
        self.identity, self.made_of = f"{models.short(parts)}|code={code[:16]}", parts | {"code": code}
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

    @cached_property
    def held_tokens(self) -> float:
        """Tokens whose keys and values a batch may hold, its histories and replies included; loads the model."""
        token = token_bytes(self.model.config, self.model.dtype)
        left = weights_memory.free_bytes(all_gpus=True)[0] / 2  # of what the loaded weights leave
        self._kept.limit = min(self._kept.limit, left / 2)
        room = left / (9 / 8 * token)
        # A GPU's memory is there for this; a machine's is others' as well.
        return room if torch.cuda.is_available() else min(HELD * self.batch_tokens, room)

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
            if len(row.ids) + max(map(len, row.tails), default=1) > self.context:
                yield from ((index, Reply("", len(row.ids) - row.shared, 0, "context")) for index in row.indices)
            else:
                kinds.setdefault(len(row.tails) or row.request.sampling, []).append(row)
        for kind in kinds.values():
            for row, reply in self._outcomes(kind):
                self.answered += 1
                yield from ((index, reply) for index in row.indices)

    def _outcomes(self, rows: Sequence[_Row]) -> Iterator[tuple[_Row, Reply]]:
        """Replies as they are ready; where memory runs out, chats without one are asked again, half as many at once.

        Raises MemoryError where it doesn't do for one chat, all kept ones being forgotten.
        """
        answer, left = self._choices if rows[0].tails else self._written, {id(row): row for row in rows}
        while left:
            try:
                for row, reply in answer(list(left.values())):
                    del left[id(row)]
                    yield row, reply
            except (RuntimeError, MemoryError) as error:
                if not weights_memory.ran_out(error):
                    raise
                told = str(error)
            else:
                return
            # Here the error is gone, and with it what its frames held.
            self._halve(list(left.values()), told)

    def _halve(self, rows: Sequence[_Row], told: str) -> None:
        """Ask at most half of ``rows`` at once from now on; of a single one, without what is kept of any chat."""
        longest, size = max(map(self._longest, rows)), max(map(self._size, rows))
        written, read = (min(len(rows), most) for most in (self.held_tokens / longest, self.batch_tokens / size))
        if max(written, read) < 2:
            if not self._kept.chats and all(row.kept is None for row in rows):
                advice = "take a shorter history (history_window), a smaller model or a larger machine"
                raise MemoryError(f"no room for a chat of {longest} tokens ({told}): {advice}")
            self._kept.clear()
        for row in rows:
            row.kept, row.written = None, []
        self.held_tokens, self.batch_tokens = written * longest / 2, read * size / 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _limit(self, row: _Row) -> int:
        """Most new tokens of a reply: those asked for, or what its chat leaves of the context."""
        return int(min(row.request.sampling.max_new_tokens, self.context - len(row.ids)))

    def _longest(self, row: _Row) -> int:
        """Tokens of the chat with its longest option, or the longest reply, and room for its buffers to grow."""
        return len(row.ids) + max(map(len, row.tails), default=self._limit(row)) + ROOM

    def _size(self, row: _Row) -> float:
        """What it counts in a batch of ``batch_tokens``: its new tokens, or the share of those that are held."""
        return max(row.new, self._longest(row) * self.batch_tokens / self.held_tokens)

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        batch, size = [], 0.0
        for row in rows:
            size = max(size, self._size(row))
            if batch and size * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch, size = [], self._size(row)
            batch.append(row)
        yield batch

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

    def _assemble(self, rows: Sequence[_Row]) -> tuple[torch.Tensor, torch.Tensor, GrowingCache]:
        """Ids and mask [rows, prefix + new tokens], and a cache holding the prefixes, all left-padded."""
        self.forward_tokens += sum(row.new for row in rows)
        fresh = max(row.new for row in rows)
        ids, mask = self._padded([row.ids for row in rows], "left")
        prefix, cache = ids.shape[1] - fresh, GrowingCache()
        if prefix:
            sample = next(row.kept for row in rows if row.kept is not None)
            # Where padding would stand between prefix and new tokens, the prefix's last tokens are read once more: a
            # gap takes places in a sliding window.
            ends = [max(len(row.ids) - fresh, 0) for row in rows]
            kept = [first_tokens(row.kept if end else sample, end) for row, end in zip(rows, ends, strict=True)]
            for layer in range(len(sample)):
                both = [pad(each[layer], (0, 0, prefix - each[layer].shape[-2], 0)) for each in kept]
                cache.update(*torch.stack(both, dim=1), layer)
        for row in rows:
            row.kept = None
        return ids, mask, cache

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: GrowingCache, keep: int) -> torch.Tensor:
        """Logits [rows, keep, vocabulary] in float32 after the last ``keep`` tokens of ``ids``."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        read = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with shared_heads(ids):
            out = self.model(**read, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return out.logits.float()

    def _choices(self, rows: Sequence[_Row]) -> Iterator[tuple[_Row, Reply]]:
        for batch in self._batches(rows):
            yield from zip(batch, self._choose(batch), strict=True)

    def _choose(self, rows: Sequence[_Row]) -> list[Reply]:
        """Score every option's complete answer."""
        ids, mask, cache = self._assemble(rows)
        keep = max(row.shared for row in rows) + 1
        after = self._forward(ids[:, cache.get_seq_length() :], mask, cache, keep).log_softmax(-1)
        starts = [len(row.ids) - row.shared for row in rows]
        shared = [_total(after[i, -row.shared - 1 :], row.ids[starts[i] :]) for i, row in enumerate(rows)]
        for place, row in enumerate(rows):
            if row.request.extended:
                self._kept.keep(row.request.messages, row.ids, cache, place)
        by_option = zip(*(row.tails for row in rows), strict=True)
        ends = [self._score_tails(tails, after[:, -1], mask, cache) for tails in by_option]
        replies = []
        for place, row in enumerate(rows):
            scores = tuple(shared[place] + end[place] for end in ends)
            longest = row.shared + max(map(len, row.tails))
            replies.append(Reply("", starts[place], longest, logprobs=scores, shared=shared[place]))
        return replies

    def _score_tails(
        self, tails: Sequence[list[int]], after: torch.Tensor, mask: torch.Tensor, cache: GrowingCache
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

    def _written(self, rows: Sequence[_Row]) -> Iterator[tuple[_Row, Reply]]:
        """Replies as they end.

        Drawn here, because `generate` mixes in the settings that come with a model: penalties, suppressed or forced
        tokens, stop strings.
        """
        sampling = rows[0].request.sampling
        # The longest first: a chat that joins is then never longer than what those under way hold.
        waiting = sorted(rows, key=lambda row: len(row.ids), reverse=True)
        places = max(1, int(self.held_tokens // max(map(self._longest, rows))))
        live, cache = [], GrowingCache()
        while waiting or live:
            free = places - len(live)
            # Chats are read together, an eighth of the places at a time: a step is hardly faster for so few rows less.
            if waiting and (not live or 8 * free >= places):
                asked = next(self._batches(waiting[:free]))
                del waiting[: len(asked)]
                ids, mask, own = self._assemble(asked)
                logits = self._forward(ids[:, own.get_seq_length() :], mask, own, 1)
                if live:
                    cache.join(own)
                else:
                    cache = own
                live += asked
                for row in asked:
                    row.generator = torch.Generator(logits.device).manual_seed(row.request.seed)
            else:
                asked = live
                last, lengths = torch.tensor([(row.written[-1], row.length) for row in live]).to(self.model.device).T
                columns = torch.arange(cache.get_seq_length(), -1, -1, device=lengths.device)
                logits = self._forward(last[:, None], (columns < lengths[:, None]).long(), cache, 1)
            tokens = draw(logits[:, -1], sampling, [row.generator for row in asked])
            for row, token in zip(asked, tokens, strict=True):
                row.written.append(token)
            ended = [self._ended(row) for row in live]
            if any(ended):
                yield from ((row, self._reply(row, cache, place)) for place, row in enumerate(live) if ended[place])
                held = max((row.length - 1 for row in live if not self._ended(row)), default=0)
                live = [live[place] for place in cache.leave(ended, held)]

    def _ended(self, row: _Row) -> bool:
        return row.written[-1] in self._stop_ids or len(row.written) == self._limit(row)

    def _reply(self, row: _Row, cache: GrowingCache, place: int) -> Reply:
        stopped = row.written[-1] in self._stop_ids
        # A reply that is cut off in a block that the prompt opened would otherwise pass for an answer.
        text = row.opening + decode(self.tokenizer, row.written[: -1 if stopped else None])
        self.forward_tokens += len(row.written)
        # The last token drawn was never read, so it has no keys.
        self._kept.keep(row.request.messages, row.ids + row.written[:-1], cache, place)
        return Reply(text, len(row.ids), len(row.written), "stop" if stopped else "length")

    @cached_property
    def _stop_ids(self) -> set[int]:
        """What ends a reply: the end of a turn, and the end tokens of tokenizer and model."""
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        return {turn_end(self.tokenizer), self.tokenizer.eos_token_id, *configured} - {None}


def _total(logprobs: torch.Tensor, tokens: Sequence[int]) -> float:
    """Sum of the log-probabilities [tokens or more, vocabulary] of ``tokens``."""
    return float(sum(logprobs[i, token] for i, token in enumerate(tokens)))
