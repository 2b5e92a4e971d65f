"""The losses in another project's trainer: its own package, in an environment of its own."""

from __future__ import annotations

import json

import pytest
from environments import ROOT, build_packages, make_environment

# What the first step must report, from whole logits of Tunix's own call in float64, by the equations of the method.
TUNIX = """
import json, sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import tunix_loss as example

def logprobs(seed, tokens, mask, temperature):
    positions, attention = example.build_positions_from_mask(mask), example.make_causal_attn_mask(mask)
    logits, _ = example.Llama3(example.CONFIG, rngs=nnx.Rngs(seed))(tokens, positions, None, attention)
    logits = np.asarray(logits, np.float64)[:, :-1] / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

def among(logprobs, places):
    kept = np.exp(np.take_along_axis(logprobs, places, -1))
    return kept / kept.sum(-1, keepdims=True)

tokens = jax.random.randint(jax.random.key(2), (4, 12), 0, example.CONFIG.vocab_size)
mask = jnp.arange(12) < jnp.array([[12], [9], [12], [7]])
nll = -np.take_along_axis(logprobs(0, tokens, mask, 1.0), np.asarray(tokens)[:, 1:, None], -1)[..., 0]
teacher, student = (logprobs(seed, tokens, mask, example.TEMPERATURE) for seed in (1, 0))
places = np.argsort(-teacher, -1)[..., :example.K]
q, p = among(teacher, places), among(student, places)
kl = example.TEMPERATURE**2 * (q * np.log(q / p)).sum(-1)
expected = float((nll + kl)[np.asarray(mask)[:, 1:]].mean())
print(json.dumps({"expected": expected, "losses": example.main(num_steps=4)}))
"""


@pytest.mark.slow
def test_tunix(tmp_path):
    wheel, _ = build_packages(tmp_path / "packages")
    run = make_environment(tmp_path / "venv", "google-tunix==0.1.7", wheel)
    found = json.loads(run("-c", TUNIX, ROOT / "examples").splitlines()[-1])
    assert found["losses"][0] == pytest.approx(found["expected"], abs=2e-5)
    assert len(found["losses"]) == 4 and found["losses"][-1] < found["losses"][0]
