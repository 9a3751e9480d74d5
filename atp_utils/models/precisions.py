"""Which precision a machine answers fastest in, found by measuring: a processor's flags don't tell.

With AVX512-BF16 an Intel core without AMX multiplies bfloat16 at half of float32's speed, where an AMD core gains by
it; a core without it is a hundred times slower. On a GPU bfloat16 is always taken.
"""

from functools import lru_cache
from time import perf_counter

import torch

SHAPE = (512, 896, 896)  # tokens, width in, width out: of smaller ones an AMD core gains less than models do
REPEATS = 9
HOPELESS = 4  # times slower; then once is enough, which takes a second where bfloat16 is emulated
# How many times faster bfloat16 must be: float32 is the more exact, and a busy machine must choose the same each time.
CLEARLY = 1.25


def precision(dtype: str | torch.dtype) -> torch.dtype:
    """The precision called ``dtype``; "auto" is the `fastest` here."""
    if dtype == "auto":
        return fastest()
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def name_of(dtype: str | torch.dtype) -> str:
    """What the `precision` is called, never "auto"."""
    return str(precision(dtype)).removeprefix("torch.")


@lru_cache(maxsize=1)
def fastest() -> torch.dtype:
    """bfloat16 on a GPU, or where it multiplies clearly faster than float32, which is measured once a process."""
    if torch.cuda.is_available():
        return torch.bfloat16
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other wherever another process has one's core
    try:
        taken: list[dict[torch.dtype, float]] = []
        for _ in range(REPEATS):
            # In turn, so that what else runs slows both.
            taken.append({dtype: _seconds(dtype) for dtype in (torch.float32, torch.bfloat16)})
            least = {dtype: min(times[dtype] for times in taken) for dtype in taken[0]}
            if least[torch.bfloat16] > HOPELESS * least[torch.float32]:
                break
    finally:
        torch.set_num_threads(threads)
    return choose(least)


def _seconds(dtype: torch.dtype) -> float:
    tokens, wide, far = SHAPE
    left, right = torch.ones(tokens, wide, dtype=dtype), torch.ones(far, wide, dtype=dtype)
    begin = perf_counter()
    torch.nn.functional.linear(left, right)
    return perf_counter() - begin


def choose(seconds: dict[torch.dtype, float]) -> torch.dtype:
    """The precision to take where the same product took so many ``seconds`` in either."""
    faster = seconds[torch.float32] > CLEARLY * seconds[torch.bfloat16]
    return torch.bfloat16 if faster else torch.float32
