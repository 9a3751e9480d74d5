"""Tiny random models of the paper's two families, with their chat templates, special tokens and stop tokens.

What is real: the architectures (Qwen3: normed queries and keys; Llama 3.1: scaled rotary positions), the chat
templates (TRL ships both as published, so none is copied here), the special tokens and which of them end a turn, how
text is split before merging, Llama's tokenizer putting ``<|begin_of_text|>`` before any text, the generation configs.
What is not: the weights (random, seeded), the sizes and the vocabulary (merges learnt from this repository's prompts).
"""

import json
from pathlib import Path

import torch
import trl
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    AddedToken,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from atp_utils import ROOT

FAMILIES = ("qwen3", "llama3_1")
HUB_IDS = dict(zip(FAMILIES, ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct"), strict=True))
# Nothing that is edited often: other words are another tokenizer, and another tiny model for every test.
TEXTS = [ROOT / "data/environments/role_play.yaml", ROOT / "data/environments/collusion.yaml"]
# The last token of a turn comes first.
STOPS = {"qwen3": ("<|im_end|>", "<|endoftext|>"), "llama3_1": ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>")}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16384,
    # Ten times the usual spread: every token of a prompt then moves the log-probabilities visibly.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


def template(name: str) -> str:
    """The chat template that TRL ships under ``name``, as its model's authors published it."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def build(family: str, folder: Path) -> Path:
    """Save model, tokenizer and generation config of ``family`` (one of `FAMILIES`) to ``folder``; returns it."""
    tokenizer = _qwen3_tokenizer() if family == "qwen3" else _llama_tokenizer()
    tokenizer.chat_template = template(family)
    ids = tokenizer.convert_tokens_to_ids(list(STOPS[family]))
    shape = SIZES | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    if family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, eos_token_id=ids[0], bos_token_id=ids[1]))
        settings = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "pad_token_id": ids[1], "bos_token_id": ids[1]}
    else:
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192}
        bos = tokenizer.bos_token_id
        model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=scaling, eos_token_id=ids, bos_token_id=bos))
        settings = {"temperature": 0.6, "top_p": 0.9, "bos_token_id": bos}
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=ids, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _qwen3_tokenizer() -> Qwen2Tokenizer:
    vocabulary, merges = _learnt(Qwen2Tokenizer().backend_tokenizer.pre_tokenizer)
    tokenizer = Qwen2Tokenizer(vocabulary, merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)])
    # Not special: decoding without special tokens leaves the marks of thinking in the text.
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in ("<think>", "</think>")])
    return tokenizer


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(TikTokenConverter().pattern), behavior="isolated")
    before = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    vocabulary, merges = _learnt(before)
    backend = Tokenizer(BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = before, decoders.ByteLevel()
    bos = "<|begin_of_text|>"
    special = [bos, *STOPS["llama3_1"], "<|start_header_id|>", "<|end_header_id|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    begins = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, backend.token_to_id(bos))])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    # The published tokenizer asks for this clean-up, which would take spaces out of code; transformers refuses it.
    marks = {"bos_token": bos, "eos_token": STOPS["llama3_1"][0], "clean_up_tokenization_spaces": True}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


def _learnt(before: pre_tokenizers.PreTokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE tokenizer of 1,000 tokens, learnt from `TEXTS`."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = before
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator((path.read_text(encoding="utf-8") for path in TEXTS), trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]
