"""What a model costs: parameters from its configuration, seconds by a roofline, bytes of memory.

Every figure is an estimate. Work (operations, bytes) follows from the configuration and is close; how much of a
device's peak a program reaches is an assumption, kept apart in `Assumptions` so that it can be stated and changed.
``docs/scale.md`` says how far such estimates were off where they could be checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from atp_utils import ROOT, models, resolve

# Configurations of published models, for planning without their weights or a hub.
CONFIGS = ROOT / "data/architectures"
BYTES = 2  # bfloat16
# Adapter weights, their gradients and AdamW's two moments, all float32.
ADAPTER_BYTES = 16
# TRL's loss never holds all logits: it works in tiles of so many tokens and vocabulary entries, in float32.
TILE = (4096, 32768)


@dataclass(frozen=True)
class Architecture:
    """The facts of a dense decoder that costs depend on; ``source`` says where they were read.

    ``layer_weights`` and ``head_weights`` are the entries of the matrices that every token (the output layer: every
    scored token) is multiplied with; ``lora_width`` is the sum of inputs and outputs over the adapted layers.
    """

    name: str
    source: str
    parameters: int
    layer_weights: int
    head_weights: int
    lora_width: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def forward_flops(self, tokens: float, context: float, scored: float) -> float:
        """Operations of ``tokens`` read at a mean ``context`` length, ``scored`` of them through the output layer."""
        attention = 4 * self.layers * self.heads * self.head_dim * context
        return tokens * (2 * self.layer_weights + attention) + 2 * self.head_weights * scored

    def kv_bytes(self, tokens: float) -> float:
        """Bytes of the keys and values of ``tokens``."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES * tokens

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of a LoRA adapter on all linear layers but the output layer."""
        return rank * self.lora_width

    def activation_bytes(self, tokens: float, checkpointed: bool) -> float:
        """Bytes kept for the backward pass of ``tokens`` through a frozen, adapted model.

        A layer keeps, a token: the inputs of the adapted layers in float32 (as PEFT's adapters are), six hidden-wide
        tensors of norms and residuals, queries, keys, values and the attention's output, and two of the feed-forward's
        width. With checkpoints only a layer's input is kept, and one layer is computed anew at a time.
        """
        adapted = 2 * BYTES * (6 * self.hidden + self.intermediate)
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        layer = adapted + BYTES * (6 * self.hidden + attention + 2 * self.intermediate)
        if checkpointed:
            return tokens * (BYTES * self.hidden * self.layers + layer)
        return tokens * layer * self.layers


def read_architecture(name: str) -> Architecture:
    """The architecture of a model, from its configuration alone; no weights are read.

    In this order: a local folder or a cached hub model, the committed ``data/architectures``, the hub.
    Raises ValueError for a mixture of experts (the estimates are of dense models), OSError where nothing is found.
    """
    config, source = _read_config(name)
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        raise ValueError(f"{name}: a mixture of experts; costs can be estimated for dense models only")
    # On the meta device a model has shapes and no memory: transformers itself says what its parameters are.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    return Architecture(
        name=name,
        source=source,
        parameters=sum(weight.numel() for weight in model.parameters()),
        layer_weights=sum(part.weight.numel() for part in linear),
        head_weights=head.weight.numel(),
        lora_width=sum(part.in_features + part.out_features for part in linear),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
    )


def _read_config(name: str) -> tuple:
    try:
        return AutoConfig.from_pretrained(models.locate(name), local_files_only=True), "local"
    except OSError:
        # A hub id that isn't cached. Asking an unreachable hub takes half a minute, so what is committed comes first.
        committed = CONFIGS / name.replace("/", "--")
        if committed.is_dir():
            return AutoConfig.from_pretrained(committed), str(committed.relative_to(resolve(".")))
        return AutoConfig.from_pretrained(name), "hub"


@dataclass(frozen=True)
class Device:
    """Peak bfloat16 operations a second (dense), bytes a second and bytes of memory of one device.

    ``batch_tokens`` is `TransformersEngine`'s default there; ``cache_bytes`` what it keeps of past conversations.
    ``compact``: TRL's loss puts replies only through the output layer; without Triton it does so with prompts too.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    batch_tokens: int
    cache_bytes: float = 6e9
    compact: bool = True


@dataclass(frozen=True)
class Assumptions:
    """What share of a device's peak is reached, and what a decoding step costs besides; none of it is measured on GPUs.

    ``mfu`` is of the peak operations (reading prompts, training), ``bandwidth`` of the peak memory bandwidth
    (decoding). A step of decoding takes ``step_seconds`` at least (kernel launches of eager transformers), and
    ``draw_seconds`` a row and vocabulary entry for the in-process engine's random numbers (on a CPU, measured).
    """

    mfu: float
    bandwidth: float
    step_seconds: float
    draw_seconds: float


# NVIDIA's data sheets: H100 SXM 80 GB 989 TFLOP/s bfloat16 without sparsity, 3.35 TB/s; A100 SXM 80 GB 312 TFLOP/s,
# 2.039 TB/s. The CPU has no data sheet that helps: its rates are fitted to this repository's benchmarks, see
# docs/scale.md, and are therefore used whole.
DEVICES = {
    "h100": Device("H100 80 GB", 989e12, 3.35e12, 80e9, 16384),
    "a100": Device("A100 80 GB", 312e12, 2.039e12, 80e9, 16384),
    "cpu": Device("two cores of an AMD EPYC, fitted", 1.27e11, 2.0e10, 8e9, 4096, compact=False),
}
_GPU = Assumptions(mfu=0.4, bandwidth=0.6, step_seconds=0.02, draw_seconds=0.0)
ASSUMED = {"h100": _GPU, "a100": _GPU, "cpu": Assumptions(1.0, 1.0, 0.0, 2.2e-8)}


@dataclass(frozen=True)
class Chat:
    """One chat that a model answers, in tokens: its ``prompt``, how many of it are ``fresh`` (not kept from an earlier
    round), how many ``scored`` answers' tokens are read, and the reply's ``written`` length and ``limit``."""

    prompt: int
    fresh: int
    scored: int = 0
    written: int = 0
    limit: int = 0


@dataclass(frozen=True)
class Machine:
    """A device and what is assumed of it: turns work into seconds."""

    device: Device
    assumed: Assumptions

    def compute(self, flops: float) -> float:
        """Seconds for ``flops`` operations on large matrices."""
        return flops / (self.device.flops * self.assumed.mfu)

    def read(self, arch: Architecture, batch: Sequence[Chat]) -> float:
        """Seconds to read a batch's fresh tokens and scored answers; the output layer sees the scored ones only."""
        flops = sum(
            arch.forward_flops(chat.fresh + chat.scored, chat.prompt - chat.fresh / 2, 1 + chat.scored)
            for chat in batch
        )
        return max(self.compute(flops), self._load(BYTES * arch.parameters))

    def write(self, arch: Architecture, batch: Sequence[Chat]) -> float:
        """Seconds to decode a batch: as many steps as its longest reply has, each for all rows, drawing excluded."""
        steps = max(chat.written for chat in batch)
        if not steps:
            return 0.0
        rows, context = len(batch), sum(chat.prompt + chat.written / 2 for chat in batch)
        compute = self.compute(arch.forward_flops(rows, context / rows, rows))
        load = self._load(BYTES * arch.parameters + arch.kv_bytes(context))
        return steps * max(compute, load, self.assumed.step_seconds)

    def draw(self, arch: Architecture, batch: Sequence[Chat]) -> float:
        """Seconds of the in-process engine's random numbers for a batch: each row has a generator of its own."""
        steps = max(chat.written for chat in batch)
        return steps * len(batch) * arch.vocabulary * self.assumed.draw_seconds

    def _load(self, size: float) -> float:
        return size / (self.device.bandwidth * self.assumed.bandwidth)

    def answer(self, arch: Architecture, call: Sequence[Chat]) -> float:
        """Seconds for one engine call, in the batches that `TransformersEngine` makes."""
        return sum(
            self.read(arch, batch) + self.write(arch, batch) + self.draw(arch, batch) for batch in self.batches(call)
        )

    def batches(self, call: Sequence[Chat]) -> list[list[Chat]]:
        """A call's chats in batches, by the engine's rule: by kind and length, padded fresh tokens bounded."""
        batches: list[list[Chat]] = []
        for chat in sorted(call, key=lambda chat: (chat.limit, chat.prompt)):
            last = batches[-1] if batches else []
            widest = max([chat.fresh, *(other.fresh for other in last)])
            if last and last[0].limit == chat.limit and widest * (len(last) + 1) <= self.device.batch_tokens:
                last.append(chat)
            else:
                batches.append([chat])
        return batches

    def inference_bytes(self, arch: Architecture, calls: Sequence[Sequence[Chat]]) -> float:
        """Most bytes that answering takes: weights, one batch with every reply at its limit, and kept conversations."""
        batches = [batch for call in calls for batch in self.batches(call)]
        live = max(len(batch) * max(chat.prompt + chat.scored + chat.limit for chat in batch) for batch in batches)
        kept = sum(arch.kv_bytes(chat.prompt + chat.written) for call in calls for chat in call)
        working = self.device.batch_tokens * BYTES * (4 * arch.hidden + 3 * arch.intermediate)
        return BYTES * arch.parameters + arch.kv_bytes(live) + min(kept, self.device.cache_bytes) + working


def training_flops(arch: Architecture, chat: Chat, checkpointed: bool, compact: bool) -> float:
    """Operations of one sequence (prompt and ``scored`` reply) in a step of LoRA training with a reference.

    Frozen weights need no gradient of their own: forward 2, backward 2, and with checkpoints forward once more; the
    reference is the same model with its adapter off, forward only. The output layer's tiles are computed anew in the
    backward pass.
    """
    length = chat.prompt + chat.scored
    body = arch.forward_flops(length, length / 2, 0)
    return body * (4 if checkpointed else 3) + 2 * arch.head_weights * (chat.scored if compact else length) * 4


def training_bytes(arch: Architecture, rank: int, chats: Sequence[Chat], checkpointed: bool) -> float:
    """Bytes of a training step on a micro-batch ``chats``: weights, adapter and optimiser, activations, logits."""
    tokens = len(chats) * max(chat.prompt + chat.scored for chat in chats)
    scored = min(sum(chat.scored for chat in chats), TILE[0])
    # A tile and its gradient; the hidden states' gradients are collected in float32.
    logits = 2 * 4 * scored * min(arch.vocabulary, TILE[1]) + 4 * arch.hidden * tokens
    adapter = ADAPTER_BYTES * arch.adapter_parameters(rank)
    return BYTES * arch.parameters + adapter + arch.activation_bytes(tokens, checkpointed) + logits


def devices_needed(arch: Architecture, total: float, device: Device) -> int | None:
    """How many devices hold ``total`` bytes with sharded weights (FSDP); None where the rest alone is too much."""
    weights = BYTES * arch.parameters
    room = device.memory - (total - weights)
    return None if room <= 0 else max(1, ceil(weights / room))
