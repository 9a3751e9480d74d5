"""An engine that answers by a known rule: for tests worked out by hand, and as a control with a known habit."""

import math
from collections.abc import Callable, Iterator, Sequence

from atp_utils.evolution.requests import Reply, Request, collapse


class ScriptedEngine:
    """``rule(request)`` returns the reply's text, or for a forced choice the options' probabilities.

    ``answered`` counts the requests of different content, as a model would pay for them.
    """

    def __init__(self, rule: Callable[[Request], str | Sequence[float]], identity: str = "scripted"):
        self.rule, self.identity, self.answered = rule, identity, 0

    def answer(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
        for group in collapse(requests):
            self.answered += 1
            for index in group:
                outcome = self.rule(requests[index])
                if isinstance(outcome, str):
                    yield index, Reply(outcome)
                else:
                    yield index, Reply("", logprobs=tuple(math.log(p) if p > 0 else -math.inf for p in outcome))
