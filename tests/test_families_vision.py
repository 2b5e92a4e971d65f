"""Models that see, too: their decoder is read from a folder that transformers wrote, and goes out alone."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file  # noqa: E402
from test_families import GEMMA3, SIZES, TOKENS, assert_close, full, logits_of  # noqa: E402
from tiny import make_tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration  # noqa: E402

from raft_jax.errors import InputError  # noqa: E402
from raft_jax.models import load_pretrained  # noqa: E402
from raft_jax.models.export import export_hf  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
# What the larger Gemma 3 leave out is transformers' default: 8 heads, 4 of keys, a width of 256, a tied head.
LEFT_OUT = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_activation")
TEXT = {key: value for key, value in (SIZES | GEMMA3).items() if key not in LEFT_OUT} | {
    "model_type": "gemma3_text",
    "rope_local_base_freq": 99.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
OLDER = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def older(key: str) -> str:
    """As the keys were when these models came out."""
    return next((theirs + key.removeprefix(now) for now, theirs in OLDER.items() if key.startswith(now)), key)


@pytest.mark.parametrize("rename", [lambda key: key, older], ids=["today's keys", "older keys"])
def test_the_decoder_of_a_model_that_sees(tmp_path, rename):
    hf = {
        "model_type": "gemma3",
        "text_config": TEXT,
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 1,
        "eos_token_id": [1, 5],
    }
    torch.manual_seed(0)
    reference = Gemma3ForConditionalGeneration(Gemma3Config(**json.loads(json.dumps(hf)))).float().eval()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            weight.normal_(0.0, 0.1 if "norm" in name else 0.2)
    folder = tmp_path / "theirs"
    reference.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 64, "top_p": 0.95, "do_sample": True}))
    make_tokenizer().save(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / "model.safetensors")

    model, expected = load_pretrained(str(folder)), logits_of(reference)
    assert_close(full(model.config, model.params, TOKENS, np.ones(TOKENS.shape, bool)), expected)
    export_hf(model, model.params, tmp_path / "ours", dtype=jnp.float32)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again).__name__ == "Gemma3ForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(logits_of(again.eval()), expected, atol=1e-5)
    generation = again.generation_config
    assert (generation.top_k, generation.top_p, generation.do_sample) == (64, 0.95, True)


def test_what_it_lacks_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    with pytest.raises(InputError, match="gemma3 needs an object under the key text_config"):
        load_pretrained(str(tmp_path))
