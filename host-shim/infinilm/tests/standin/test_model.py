"""The stand-ins are a Llama: Hugging Face's own, with the same weights, writes the reference's tokens."""

import pytest

from standin import model_files, weights
from standin.engines import prompt
from standin.model_files import byte_ids


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_reference_is_a_llama(infinilm, model, answers, heads):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = model(num_key_value_heads=heads, seed=2)
    config = model_files.config(folder)
    named = {key: value for key, value in config.items() if key not in ("seed", "torch_dtype")}
    theirs = LlamaForCausalLM(LlamaConfig(**named)).double().eval()
    theirs.load_state_dict(
        {
            _name(name): torch.from_numpy(value).double()
            for name, value in weights.make(config).items()
        }
    )
    for length in (1, 17, 90):
        ids = byte_ids(prompt(length))
        expected = answers(folder, prompt(length), 20)
        with torch.inference_mode():
            for token in expected.tokens:
                logits = theirs(torch.tensor([ids])).logits[0, -1]
                assert int(logits.argmax()) == token
                ids = ids + [token]


def _name(name: str) -> str:
    if name == "lm_head":
        return "lm_head.weight"
    parent, _, last = name.rpartition(".")
    if last in ("q_proj", "k_proj", "v_proj", "o_proj"):
        last = f"self_attn.{last}"
    elif last in ("gate_proj", "up_proj", "down_proj"):
        last = f"mlp.{last}"
    return ".".join(filter(None, ("model", parent, last, "weight")))
