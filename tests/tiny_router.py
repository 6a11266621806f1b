"""Tiny backbones that the tests make themselves: a Qwen2-type model with a chat template, and a BERT-type encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.toy import PLANS

__all__ = ["TEMPLATE", "make_encoder", "make_qwen", "make_tokenizer"]

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE, drop: str = "") -> PreTrainedTokenizerFast:
    """Byte-level BPE of some toy text; without the characters of `drop`."""
    bpe = Tokenizer(models.BPE(unk_token="<|unk|>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in drop]
    text = [f"{kind} {action}".translate({ord(c): None for c in drop}) for kind, p in PLANS.items() for action in p]
    bpe.train_from_iterator(
        [*text, "task: budget: unlimited; steps left 20\n> | You"],
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<|unk|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]"],
            initial_alphabet=alphabet, show_progress=False,
        ),
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<|unk|>", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def make_qwen(
    folder: Path, template: str | None = TEMPLATE, drop: str = "", seed: int = 0, dropout: float = 0.0
) -> Path:
    """A causal language model with two layers and random weights."""
    tokenizer = make_tokenizer(template, drop)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.2,
        attention_dropout=dropout, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, dtype="float32",
    )  # fmt: skip
    return _saved(Qwen2ForCausalLM, config, tokenizer, folder, seed)


def make_encoder(folder: Path, seed: int = 0) -> Path:
    """A BERT with two layers, dropout as usual, and random weights."""
    tokenizer = make_tokenizer(None)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id, initializer_range=0.2, dtype="float32",
    )  # fmt: skip
    return _saved(BertForMaskedLM, config, tokenizer, folder, seed)


def _saved(kind: type, config: object, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
