"""What a CUDA card makes of this: a model of Qwen3-8B's shape with random weights made on the card, so without a hub.

    python -m benchmarks.gpu [--items 64] [--rounds 3] [--parts choose reason vllm dpo grpo] [--tiny]

Prints one JSON object: evolutions (decisions and tokens a second, share of the card's limits measured in the same run),
a LoRA step of DPO and of GRPO, and vLLM on the chats of `reason` where it is installed. The tokenizer is the embedded
model's. Random weights end no reply early: lengths don't differ, which real ones do. ``--tiny`` is the same on any
machine with a model of no size, to see that it runs. On a CPU memory isn't told.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import multiprocessing
import statistics
import tempfile
import time
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from atp_utils import models
from atp_utils.engines.transformers_engine import TransformersEngine
from atp_utils.models import precisions
from atp_utils.support.manifest import made_by
from benchmarks import evolution, limits, training

PARTS = ("choose", "reason", "vllm", "dpo", "grpo")
EIGHT_B = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
TINY = EIGHT_B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16}


def config(tiny):
    """Qwen3-8B's shape, or hardly any; turns end where the embedded model's do."""
    ends = models.load_tokenizer(models.EMBEDDED).eos_token_id
    named = {"architectures": ["Qwen3ForCausalLM"], "eos_token_id": ends, "bos_token_id": None, "pad_token_id": None}
    return Qwen3Config(**(TINY if tiny else EIGHT_B), **named)


def random_model(shape):
    """A model of random weights, made on the card where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        model = AutoModelForCausalLM.from_config(shape, dtype=precisions.precision("auto"))
    model.get_output_embeddings().register_forward_pre_hook(models._in_one_piece)
    return model


def evolve(case, given):
    """An evolution: decisions and tokens a second, and the share of the card's limits; and its requests."""
    scenario, parameters, items = evolution.settings(case, **given)
    engine = TransformersEngine(models.EMBEDDED)
    best = limits.measure(engine.model)
    evolution.ours(engine, scenario, parameters, items[:1])  # warms up
    engine = TransformersEngine(models.EMBEDDED)
    _forget()
    seconds, passes, requests, calls = evolution.ours(engine, scenario, parameters, items)
    tokens = engine.forward_tokens
    decisions = scenario.decisions(parameters, len(items))
    found = {"seconds": seconds, "decisions a second": decisions / seconds, "tokens a second": tokens / seconds}
    found |= best | {"share of the limit": limits.least(best, tokens, passes) / seconds}
    found["seconds of each round"] = [taken for _, taken in calls]
    return found | _memory(), requests


def train(method, steps):
    """Steps of LoRA training: the median of their seconds, and the share of the card's products."""
    taken = []
    _forget()
    with contextlib.ExitStack() as stack:
        made = training.prepare(stack, "ours", method, models.EMBEDDED, "auto", steps + 1, checkpoint_activations=True)
        made.add_callback(training.Steps(made.model, taken.append))
        made.train()
        best = limits.measure(made.model.get_base_model())
        # Activations are computed again: a token to learn from is read twice, and its gradient goes back.
        read = statistics.median(step["read"] + 3 * step["learnt"] for step in taken[1:])
        least = limits.least(best, read)
    seconds = statistics.median(step["seconds"] for step in taken[1:])
    return {"seconds a step": seconds, "share of the limit": least / seconds} | best | _memory()


def vllm(shape, requests):
    """vLLM's seconds for the chats of an evolution, all at once, with weights that it makes up itself."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        tokenizer = models.locate(models.EMBEDDED)
        asked = {"model": folder, "tokenizer": tokenizer, "load_format": "dummy", "dtype": "bfloat16"}
        llm = LLM(**asked, max_model_len=8192, enable_prefix_caching=True)
        sampling = SamplingParams(max_tokens=requests[0].sampling.max_new_tokens)
        chats = [list(one.messages) for one in requests]
        llm.chat(chats[:1], sampling, use_tqdm=False)
        start = time.perf_counter()
        answers = llm.chat(chats, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
    written = sum(len(answer.outputs[0].token_ids) for answer in answers)
    return {
        "seconds": seconds,
        "decisions a second": len(chats) / seconds,
        "written tokens a second": written / seconds,
    }


def _forget():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _memory():
    return {"peak memory, GiB": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}


def main(arguments=None):
    """Run the parts, one after the other, and print what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64, help="of a `reason` reply")
    parser.add_argument("--steps", type=int, default=3, help="of a training that are timed; one before them is not")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("torch sees no CUDA card; --tiny runs a model of no size on the CPU")
    shape, requests, given = config(options.tiny), [], {"items": options.items, "rounds": options.rounds}
    found = {"machine": made_by() | {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else None}}
    with mock.patch.object(models, "load_weights", lambda *_, **__: random_model(shape)):
        for part in options.parts:
            if part == "choose":
                found[part], _ = evolve(part, given)
            elif part == "reason":
                found[part], requests = evolve(part, given | {"max_new_tokens": options.new_tokens})
            elif part in ("dpo", "grpo"):
                found[part] = train(part, options.steps)
            elif requests and importlib.util.find_spec("vllm"):
                _forget()
                with multiprocessing.get_context("spawn").Pool(1) as pool:  # which gives the card back at its end
                    found[part] = pool.apply(vllm, (shape, requests))
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
