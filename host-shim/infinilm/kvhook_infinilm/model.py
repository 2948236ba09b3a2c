"""The model as the host is told of it: from InfiniLM's `hf_config` and the shapes of its cache tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from . import native
from .errors import Refused
from .native import array, ffi, sized, text
from .views import RankCache

_logger = logging.getLogger("kvhook")

_CPU = "cpu"

# Their attention is their own: it does not read the cache through lengths and tables alone.
_OWN_ATTENTION = {"videonsa", "minicpm_sala"}


class RankModel:
    """The `KvhModel` of one rank, with the memory that it points to."""

    def __init__(self, config: Mapping, rank: int, ranks: int, cache: RankCache):
        """Describes one rank.

        Args:
            config: `InferEngine.hf_config`.
            cache: The rank's cache tensors.

        Raises `Refused` for a device that the host does not serve, and for a config without a number that is needed.
        """
        model = text_config(config)
        heads = _number(model, "num_attention_heads")
        kv_heads = int(model.get("num_key_value_heads") or heads)
        head_dim = int(model.get("head_dim") or _number(model, "hidden_size") // heads)
        if cache.device != _CPU:
            raise Refused(
                f"the cache lies on device {cache.device!r}; this version of kvhook moves rows in ordinary memory "
                "(--device cpu) only"
            )
        name, self._name = text(str(config.get("model_type", "model")))
        infos = ffi.new("KvhLayerInfo[]", cache.layers)
        for info, layer in zip(infos, cache.geometry):
            info.struct_size = ffi.sizeof("KvhLayerInfo")
            info.kind = native.KVH_LAYER_FULL if layer else native.KVH_LAYER_LINEAR
            info.shared_with = -1
            if layer:
                info.kv_heads = layer.kv_heads
                info.q_heads = heads // ranks
                info.k_head_dim = info.v_head_dim = layer.head_dim
        self._infos = infos
        self._frequencies, base, rotary_dim = _rope(model, head_dim)
        code, bits = cache.dtype
        self.layers = cache.layers
        self.raw = sized(
            "KvhModel",
            name=name[0],
            rank=rank,
            ranks=ranks,
            total_kv_heads=kv_heads,
            first_kv_head=rank * kv_heads // ranks,
            device={"device_type": native.KVH_DEVICE_CPU, "device_id": 0},
            cache_dtype={"code": code, "bits": bits, "lanes": 1},
            position_axes=int(config.get("position_id_axes", 1)),
            max_positions=max_positions(config) or 0,
            rope_base=base,
            rope_frequencies=self._frequencies,
            rotary_dim=rotary_dim,
            rope_pairing=native.KVH_ROPE_HALF_SPLIT,
            layers=array(infos),
        )


def text_config(config: Mapping) -> Mapping:
    """The language model's part of a config."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def max_positions(config: Mapping) -> int | None:
    """`max_position_embeddings`, where the config has it."""
    value = text_config(config).get("max_position_embeddings")
    return int(value) if value else None


def check_served(config: Mapping) -> None:
    """Raises `Refused` for a model whose attention does not go through lengths and tables alone."""
    model = text_config(config)
    for model_type in {config.get("model_type"), model.get("model_type")}:
        if model_type in _OWN_ATTENTION:
            raise Refused(
                f"model type {model_type!r} has an attention of its own, which kvhook does not know"
            )
    if "sliding_attention" in (model.get("layer_types") or []):
        raise Refused("the model has sliding-window layers; InfiniLM gives all layers one length")


def _number(config: Mapping, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise Refused(f"config.json: {key!r} is {value!r}; expected a whole number above 0")
    return value


def _rope(model: Mapping, head_dim: int):
    """Inverse frequencies (or null), base and rotated channels, as in Hugging Face's `modeling_rope_utils`."""
    scaling = model.get("rope_parameters") or model.get("rope_scaling") or {}
    base = float(model.get("rope_theta") or scaling.get("rope_theta") or 10000.0)
    factor = float(
        model.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0
    )
    rotary_dim = int(head_dim * factor) // 2 * 2
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("default", "mrope"):
        return ffi.NULL, base, rotary_dim
    plain = [base ** (-2 * pair / rotary_dim) for pair in range(rotary_dim // 2)]
    if kind == "linear":
        scaled = [frequency / float(scaling["factor"]) for frequency in plain]
    elif kind == "llama3":
        scaled = [_llama3(frequency, scaling) for frequency in plain]
    else:
        # Nothing that this adapter offers depends on it: plugins may not move positions.
        _logger.info(
            "RoPE scaling %r is not described to plugins; they are told the plain base", kind
        )
        return ffi.NULL, base, rotary_dim
    return ffi.new("float[]", scaled), 0.0, rotary_dim


def _llama3(frequency: float, scaling: Mapping) -> float:
    """Llama 3.1's scaling: long waves are stretched, short ones kept, a smooth passage between."""
    factor, low, high = (
        float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    turns = float(scaling["original_max_position_embeddings"]) * frequency / (2 * math.pi)
    smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - smooth) * frequency / factor + smooth * frequency
