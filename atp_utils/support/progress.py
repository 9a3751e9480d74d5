"""Progress bars that a person sees and a notebook doesn't keep.

``ATP_PROGRESS`` names the file that bars are drawn on; `atp_utils.run` points it at its own terminal, so that
a headless notebook shows its progress there and stores none of it. Without it a bar appears where the code
runs and is cleared at the end.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.std import tqdm


@contextmanager
def bar(total: int | None, label: str) -> Iterator[tqdm]:
    """A bar of ``total`` steps; ``update(n)`` moves it."""
    target = os.environ.get("ATP_PROGRESS")
    if not target:
        # Imported where it is needed: it looks for widgets, and complains without a front end.
        from tqdm.auto import tqdm as auto_tqdm

        with auto_tqdm(total=total, desc=label, leave=False) as shown:
            yield shown
        return
    with open(target, "a", encoding="utf-8") as file:
        # A log file gets a line now and then, a terminal a bar that moves.
        interval = 0.5 if file.isatty() else 30
        with tqdm(total=total, desc=label, leave=True, file=file, mininterval=interval, ncols=90) as shown:
            yield shown
