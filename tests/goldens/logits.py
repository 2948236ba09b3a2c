#!/usr/bin/env python3
"""Writes logits.json: what an independent implementation answers on the same weights.

The weights are the GGUF's, dequantised to f32 by the `gguf` package, with the rows of q and k put back into the
half-split order of Hugging Face; the model is transformers' LlamaForCausalLM in f32 on PyTorch's CPU backend, with
eager attention and the whole prompt in one pass. The token ids come from a byte-pair encoder written out below, so
that neither the model nor the tokenizer shares code with the engine.

    pip install torch==2.15.0 transformers==5.23.0 gguf==0.19.0 numpy==2.4.6 regex==2026.11.15
    python3 logits.py MODEL.gguf ../text/moby-dick.txt logits.json
"""

import hashlib
import json
import sys

import numpy as np
import regex
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

GPT2_SPLIT = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
TRICKY = [
    "",
    " ",
    "a",
    " leading space",
    "  two leading spaces",
    "trailing space ",
    "line\nbreak\n\n\nthree breaks",
    "tab\tand\r\ncarriage return",
    "digits 1234567890 and 3.14159, 1,000,000",
    "x=1+2; y=0x1F; z=12a34",
    "don't, I'll, we've, they're, IT'S",
    "naïve café — “quotes” … ½ ²",
    "你好，世界。こんにちは",
    "emoji 🙂👩‍👩‍👧 and flags 🇨🇳",
    "Привет мир",
    "arabic digits ٣٤٥",
    "\u00a0non-breaking\u2003em space",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system",
    " <|im_end|> ",
    "<|endoftext|><|im_start|>",
    "not special: <|im_start |> <im_end>",
    "The secret pass key is 71432. Remember it.",
]


def bytes_to_unicode():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table, extra = {b: chr(b) for b in plain}, 0
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + extra)
            extra += 1
    return table


class Tokenizer:
    def __init__(self, reader):
        def strings(key):
            field = reader.fields[key]
            return [bytes(field.parts[i]).decode("utf-8") for i in field.data]

        tokens = strings("tokenizer.ggml.tokens")
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(strings("tokenizer.ggml.merges"))}
        kinds = reader.fields["tokenizer.ggml.token_type"]
        kinds = [int(kinds.parts[i][0]) for i in kinds.data]
        special = [t for t, kind in zip(tokens, kinds) if kind == 3]
        self.special = regex.compile("(" + "|".join(regex.escape(t) for t in special) + ")")
        self.alphabet = bytes_to_unicode()

    def merge(self, word):
        parts = [self.alphabet[b] for b in word.encode("utf-8")]
        while len(parts) > 1:
            pairs = [(self.ranks.get(pair, len(self.ranks)), i) for i, pair in enumerate(zip(parts, parts[1:]))]
            rank, at = min(pairs)
            if rank == len(self.ranks):
                break
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        return [self.ids[p] for p in parts]

    def encode(self, text):
        out = []
        for piece in self.special.split(text):
            if self.special.fullmatch(piece):
                out.append(self.ids[piece])
                continue
            for run in regex.findall(r"\p{N}|\P{N}+", piece):
                for word in GPT2_SPLIT.findall(run):
                    out.extend(self.merge(word))
        return out


def number(reader, key):
    field = reader.fields[key]
    return field.parts[field.data[0]][0].item()


def load_model(reader):
    heads, kv_heads = number(reader, "llama.attention.head_count"), number(reader, "llama.attention.head_count_kv")
    tensors = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).astype(np.float32)) for t in reader.tensors}
    layers = number(reader, "llama.block_count")
    config = LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=number(reader, "llama.embedding_length"),
        intermediate_size=number(reader, "llama.feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=number(reader, "llama.context_length"),
        rms_norm_eps=number(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=number(reader, "llama.rope.freq_base"),
        tie_word_embeddings=True,
        attn_implementation="eager",
    )

    def half_split(weight, n):
        """GGUF keeps each rotated pair in adjacent rows; Hugging Face in rows head_dim/2 apart."""
        rows, columns = weight.shape
        return weight.reshape(n, rows // n // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {"model.embed_tokens.weight": tensors["token_embd.weight"], "model.norm.weight": tensors["output_norm.weight"]}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for layer in range(layers):
        for ours, theirs in names.items():
            weight = tensors[f"blk.{layer}.{ours}.weight"]
            if ours == "attn_q":
                weight = half_split(weight, heads)
            if ours == "attn_k":
                weight = half_split(weight, kv_heads)
            state[f"model.layers.{layer}.{theirs}.weight"] = weight
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(state, strict=True)
    return model


def main(gguf_path, text_path, out_path):
    torch.set_num_threads(2)
    reader = GGUFReader(gguf_path)
    tokenizer = Tokenizer(reader)
    model = load_model(reader)
    text = open(text_path, encoding="utf-8").read()
    novel = tokenizer.encode(text[:8000])
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompts = {"chat": tokenizer.encode(chat), "novel-200": novel[:200], "novel-700": novel[200:900]}
    cases = []
    for name, ids in prompts.items():
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        positions = []
        for at in range(len(ids) - 8, len(ids)):
            row = logits[at]
            top = torch.topk(row, 20)
            positions.append(
                {
                    "position": at,
                    "top": [[int(i), round(float(v), 5)] for i, v in zip(top.indices, top.values)],
                    "mean": round(float(row.mean()), 6),
                    "std": round(float(row.std(correction=0)), 6),
                    "logsumexp": round(float(torch.logsumexp(row, 0)), 6),
                }
            )
        cases.append({"name": name, "tokens": ids, "positions": positions})
    golden = {
        "gguf_sha256": hashlib.sha256(open(gguf_path, "rb").read()).hexdigest(),
        "logits": cases,
        "tokenizer": [{"text": t, "tokens": tokenizer.encode(t)} for t in TRICKY],
        "novel_tokens": novel,
        "novel_characters": 8000,
    }
    with open(out_path, "w", encoding="utf-8") as out:
        json.dump(golden, out, ensure_ascii=False, separators=(",", ":"))
        out.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
