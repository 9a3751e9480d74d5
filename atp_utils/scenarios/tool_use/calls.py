r"""What a reply does with the tool, and what comes back (Appendix A.1.2: ``<tool>...</tool>`` holds Python).

The paper says that tags are parsed and the code is run; what malformed ones mean is ours. A call is the first
*well-formed* block: opened outside any other, closed, without a tag inside, not blank. Whatever else stands there
(nested, unclosed, stray or empty tags, further blocks) is never run, and counted by a `Tally`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction

from atp_utils.evolution.journal import Journal
from atp_utils.evolution.parsing import encodable, ends_thinking, split_thinking, tool_blocks
from atp_utils.problems.answers import boxed, extract_answer, parse_number, visible
from atp_utils.sandbox import ToolResult

RunTool = Callable[[str], ToolResult]

MAX_SHOWN = 1000  # characters of the tool's output that return to the model
MAX_EXAMPLE = 300


@dataclass(frozen=True)
class Call:
    """``code`` of a reply's tool call (None without one), what stands before its end, and what was wrong with the tags.

    ``said`` is all of the reply's visible text where there is no call. What follows a call was written without
    having seen its result, and is no part of the conversation.
    """

    code: str | None
    said: str
    faults: tuple[str, ...] = ()


def read_call(reply: str) -> Call:
    """The tool call of a reply, if it makes one; tags inside its thinking are none. Linear; never raises on text."""
    text = split_thinking(encodable(reply))[1]
    blocks, faults = tool_blocks(text)
    if len(blocks) > 1:
        faults.append("several calls")
    code, end = blocks[0] if blocks else (None, len(text))
    return Call(code, text[:end], tuple(dict.fromkeys(faults)))


def read_answer(reply: str, cut: bool) -> Fraction | None:
    r"""The number that a reply marks as its answer (`extract_answer`); None without one, or if it ends in thinking.

    A reply that the token limit ``cut`` off may end in half a number; of these only a closed ``\boxed{}`` counts.
    """
    if ends_thinking(reply) or cut and not any(box and box.strip() for box in boxed(visible(reply))):
        return None
    # A cut end must not look like an end.
    return extract_answer(reply + "…" if cut else reply)


def printed_answer(result: ToolResult) -> Fraction | None:
    """The number in the last line that a call printed; None where it failed, or printed none."""
    lines = result.output.strip().splitlines()
    return parse_number(lines[-1]) if result.status == "ok" and lines else None


def result_message(result: ToolResult) -> str:
    """What the model is told of its call: the output, cut at `MAX_SHOWN` characters, and why it failed if it did."""
    output = encodable(result.output).strip()
    if len(output) > MAX_SHOWN:
        output = f"{output[:MAX_SHOWN]}\n[{len(output) - MAX_SHOWN} more characters]"
    lines = [f"The tool printed:\n{output}" if output else "The tool printed nothing."]
    if result.status != "ok":
        lines.append(f"It failed ({result.status}): {encodable(result.error)[:MAX_EXAMPLE]}")
    return "\n".join(lines)


class RecordedTool:
    """A `RunTool` whose results are kept in the journal beside the model's replies.

    Whether code runs into a time limit depends on the machine. Replay therefore takes the recorded result, so that
    re-scoring gives the same decisions anywhere and runs no code; the same code is run once. ``limits`` names
    everything else that a result depends on (the sandbox's).
    """

    def __init__(self, run: RunTool, journal: Journal, limits: str):
        self.run, self.journal, self.limits = run, journal, limits

    def __call__(self, code: str) -> ToolResult:
        return ToolResult(**self.journal.result(self.limits, code, lambda: asdict(self.run(code))))


class Tally:
    """How often what happened, by kind of problem, with a first example of each; counts replies, retries included."""

    def __init__(self):
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: dict[str, str] = {}

    def note(self, kind: str, event: str, text: str = "") -> None:
        """Count ``event`` for a problem of ``kind`` ("simple" or "complex"); ``text`` may become its example."""
        self.counts[event, kind] += 1
        self.examples.setdefault(event, " ".join(text.split())[:MAX_EXAMPLE])

    def rows(self) -> list[dict]:
        """One row an event, by name: ``event``, ``simple``, ``complex`` (counts) and ``example``."""
        return [
            {"event": event, "simple": self.counts[event, "simple"], "complex": self.counts[event, "complex"]}
            | {"example": self.examples[event]}
            for event in sorted(self.examples)
        ]
