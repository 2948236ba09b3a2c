#!/usr/bin/env python3
"""Convert a llama-architecture GGUF file to a Hugging Face model folder in float32.

    gguf_to_hf.py IN.gguf OUT_DIR

Everything is taken from the GGUF itself, so no network is needed:

* ``model.safetensors``       all weights, dequantised to float32
* ``config.json``             a ``LlamaForCausalLM`` configuration
* ``generation_config.json``  greedy decoding and the end-of-text token
* ``tokenizer.json``          a byte-level BPE tokenizer built from vocabulary and merges
* ``tokenizer_config.json``   special tokens and the chat template

Only GGUF files with ``general.architecture = llama``, without RoPE scaling, and with
a ``gpt2`` (byte-level BPE) tokenizer whose pre-tokenizer is listed in
``PRE_TOKENIZERS`` are understood. Anything else is refused with an error instead of
being converted wrongly.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


class ConversionError(Exception):
    """The GGUF file cannot be converted; the message says why."""


# Names of tensors outside the layers, GGUF -> Hugging Face.
GLOBAL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# Names of tensors inside layer i ("blk.i." -> "model.layers.i.").
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

# `tokenizer.ggml.pre` -> the pre-tokenizers of the original tokenizer.json.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader):
        self._fields = reader.fields

    def get(self, key, default=None):
        """The value of `key`, or `default` if the file does not have it."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def require(self, key):
        """The value of `key`; it is an error if the file does not have it."""
        value = self.get(key)
        if value is None:
            raise ConversionError(f"the GGUF file has no '{key}'")
        return value


def unpermute(weight, n_heads):
    """Undo the row order that GGUF gives to the q and k projections of llama models.

    GGUF stores each head's rows as (0, d/2, 1, d/2 + 1, ...), as its RoPE rotates
    neighbouring pairs; Hugging Face rotates the first half of a head against the second.
    """
    rows, cols = weight.shape
    half = rows // n_heads // 2
    return weight.reshape(n_heads, half, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def hf_name(name):
    """The Hugging Face name of the GGUF tensor `name`."""
    if name in GLOBAL_TENSORS:
        return GLOBAL_TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match and match[2] in LAYER_TENSORS:
        return f"model.layers.{match[1]}.{LAYER_TENSORS[match[2]]}"
    raise ConversionError(f"unknown tensor '{name}'")


def convert_tensors(reader, config):
    """All tensors of the file as float32 arrays under their Hugging Face names."""
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    tensors = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        try:
            weight = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ConversionError(f"tensor '{tensor.name}': {error}") from error
        # GGUF lists the fastest dimension first.
        weight = weight.astype(np.float32).reshape([int(n) for n in tensor.shape[::-1]])
        projection = name.split(".")[-2]
        if projection in heads:
            weight = unpermute(weight, heads[projection])
        tensors[name] = np.ascontiguousarray(weight)

    expected = len(LAYER_TENSORS) * config["num_hidden_layers"] + 2
    expected += not config["tie_word_embeddings"]
    if len(tensors) != expected:
        raise ConversionError(f"{len(tensors)} tensors, expected {expected}")
    return tensors


def build_config(meta, tensor_names):
    """The contents of config.json."""
    architecture = meta.require("general.architecture")
    if architecture != "llama":
        raise ConversionError(f"architecture '{architecture}' is not supported")
    if meta.get("llama.rope.scaling.type", "none") != "none":
        raise ConversionError("RoPE scaling is not supported")
    if meta.get("llama.expert_count", 0):
        raise ConversionError("mixture-of-experts models are not supported")

    hidden_size = meta.require("llama.embedding_length")
    n_heads = meta.require("llama.attention.head_count")
    head_dim = meta.get("llama.attention.key_length", hidden_size // n_heads)
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ConversionError("partial rotary embeddings are not supported")
    rope_theta = meta.get("llama.rope.freq_base", 10000.0)
    # The file holds a float32; the shortest decimal that rounds to it is the original.
    rms_norm_eps = float(str(np.float32(meta.require("llama.attention.layer_norm_rms_epsilon"))))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": len(meta.require("tokenizer.ggml.tokens")),
        "hidden_size": hidden_size,
        "intermediate_size": meta.require("llama.feed_forward_length"),
        "num_hidden_layers": meta.require("llama.block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.require("llama.context_length"),
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.require("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }


def build_tokenizer(meta):
    """A `tokenizers.Tokenizer` made from the file's vocabulary and merges."""
    model = meta.require("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConversionError(f"tokenizer model '{model}' is not supported")
    pre = meta.get("tokenizer.ggml.pre", "gpt-2")
    if pre not in PRE_TOKENIZERS:
        raise ConversionError(f"pre-tokenizer '{pre}' is not supported")

    tokens = meta.require("tokenizer.ggml.tokens")
    types = meta.require("tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ConversionError("the vocabulary holds a token twice")
    merges = [tuple(merge.split(" ")) for merge in meta.require("tokenizer.ggml.merges")]
    if any(len(merge) != 2 for merge in merges):
        raise ConversionError("a merge does not consist of two parts")

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, types)
            if kind == TokenType.CONTROL
        ]
    )
    return tokenizer


def build_tokenizer_config(meta, config):
    """The contents of tokenizer_config.json."""
    tokens = meta.require("tokenizer.ggml.tokens")
    result = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "add_bos_token": meta.get("tokenizer.ggml.add_bos_token", False),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = meta.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            result[f"{name}_token"] = tokens[token]
    template = meta.get("tokenizer.chat_template")
    if template is not None:
        result["chat_template"] = template
    return result


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(source, out_dir):
    """Convert the GGUF file `source` into the Hugging Face folder `out_dir`."""
    source, out_dir = Path(source), Path(out_dir)
    if not source.is_file():
        raise ConversionError(f"{source}: no such file")
    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise ConversionError(f"{source}: not a GGUF file ({error})") from error

    meta = Metadata(reader)
    config = build_config(meta, {tensor.name for tensor in reader.tensors})
    tokenizer = build_tokenizer(meta)
    tensors = convert_tensors(reader, config)

    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    write_json(out_dir / "config.json", config)
    generation = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config[key] is not None
    }
    write_json(out_dir / "generation_config.json", {**generation, "do_sample": False})
    tokenizer.save(str(out_dir / "tokenizer.json"))
    write_json(out_dir / "tokenizer_config.json", build_tokenizer_config(meta, config))
    return len(tensors)


def main():
    parser = argparse.ArgumentParser(
        description="Convert a llama GGUF file to a float32 Hugging Face folder."
    )
    parser.add_argument("source", metavar="IN.gguf")
    parser.add_argument("out_dir", metavar="OUT_DIR")
    args = parser.parse_args()
    try:
        count = convert(args.source, args.out_dir)
    except ConversionError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    print(f"{args.out_dir}: {count} tensors")


if __name__ == "__main__":
    main()
