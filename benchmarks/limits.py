"""What a machine can do at best, measured at a model's shapes: multiply, and read memory.

No pass through a model takes less than its layers' products at the speed at which the machine multiplies by their
weights, nor less than reading these weights once. Attention, the language-model head and all the rest are left out, so
a share of 100 % can't be reached.
"""

import time

import torch

TOKENS, REPEATS, BUFFER = 1024, 5, 2**28  # rows of a product; measured so often; float32 numbers that are read


def weights(model):
    """The matrices of the model's layers, without embeddings and language-model head."""
    named = model.base_model.named_parameters()
    return [part for name, part in named if part.dim() == 2 and ".layers." in f".{name}" and "lora_" not in name]


@torch.inference_mode()
def measure(model, before=None, repeats=REPEATS):
    """What `least` goes by: the best of ``repeats``, and of what was measured ``before``, on the ``model``'s device."""
    layers = weights(model)
    device, dtype = layers[0].device, layers[0].dtype
    rows = {width: torch.ones(TOKENS, width, dtype=dtype, device=device) for width in {w.size(1) for w in layers}}
    buffer = torch.ones(BUFFER if device.type == "cuda" else BUFFER // 2, device=device)

    def multiply():
        for weight in layers:
            torch.nn.functional.linear(rows[weight.size(1)], weight)

    numbers = sum(weight.numel() for weight in layers)
    found = {
        "gflops": 2 * TOKENS * numbers / 1e9 / _best(multiply, device, repeats),
        "gb_s": buffer.numel() * buffer.element_size() / 1e9 / _best(buffer.sum, device, repeats),
        "weights": numbers,
        "bytes": numbers * layers[0].element_size(),
    }
    return {name: max(value, (before or found)[name]) for name, value in found.items()}


def least(found, tokens, passes=1):
    """Seconds that ``passes`` through the model which read ``tokens`` in all take at least."""
    products = 2 * found["weights"] * tokens / 1e9 / found["gflops"]
    return max(products, passes * found["bytes"] / 1e9 / found["gb_s"])


def wait(device):
    """Let a GPU finish what it was told to do: only then is there a time to take."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(work, device, repeats):
    taken = []
    for _ in range(repeats + 1):  # the first one warms up
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
