"""Folders of tiny models, as InfiniLM reads them."""

from __future__ import annotations

import json
from pathlib import Path

import byte_tokenizer

CONFIG = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    torch_dtype="float32",
    vocab_size=258,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    bos_token_id=256,
    eos_token_id=257,
    tie_word_embeddings=False,
    seed=1,
)

HYBRID = dict(
    architectures=["Qwen3NextForCausalLM"],
    model_type="qwen3_next",
    layer_types=["linear_attention", "full_attention"] * 2,
)
"""Every other layer without a cache."""


def write(folder: Path, **changes) -> Path:
    """Writes config and tokenizer; the weights come from the config's `seed`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    tokenizer = byte_tokenizer.make()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def config(folder: Path) -> dict:
    """A folder's config."""
    return json.loads((folder / "config.json").read_text())


def byte_ids(text: str) -> list[int]:
    """A text's tokens, computed without a tokenizer: the place of each byte's character in the vocabulary."""
    # ASCII's printable characters stand for themselves, in order, before all others.
    return [ord(character) - ord("!") for character in text]
