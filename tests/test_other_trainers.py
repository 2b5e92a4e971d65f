"""The losses in another project's trainer: its own package, in an environment of its own."""

from __future__ import annotations

import ast
import json

import pytest
from environments import ROOT, build_packages, make_environment, python_from

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


def requirements(example: str) -> list[str]:
    """What the example says to install besides the losses."""
    page = ast.get_docstring(ast.parse((ROOT / "examples" / f"{example}.py").read_text("utf-8")))
    (command,) = (line for line in page.replace("\\\n", "").splitlines() if line.startswith("    pip install "))
    return [name for name in command.split()[2:] if name != "raft-jax"]


@pytest.mark.slow
def test_tunix(tmp_path):
    wheel, _ = build_packages(tmp_path / "packages")
    run = make_environment(tmp_path / "venv", *requirements("tunix_loss"), wheel)
    found = json.loads(run("-c", TUNIX, ROOT / "examples").splitlines()[-1])
    assert found["losses"][0] == pytest.approx(found["expected"], abs=2e-5)
    assert len(found["losses"]) == 4 and found["losses"][-1] < found["losses"][0]


# Eight devices, some tokens without a target. What the first step must report, from whole logits of MaxText's own head
# for the parameters that its trainer begins with, in float64, by the equations of the method.
MAXTEXT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from flax import nnx
from maxtext.utils import train_utils
import maxtext_loss as example

seen = {}

def logits(model, config, batch):
    given = {"decoder_" + name: batch[key] for name, key in (
        ("input_tokens", "inputs"), ("positions", "inputs_position"), ("segment_ids", "inputs_segmentation"))}
    model(**given, enable_dropout=False)
    hidden = nnx.pop(model, nnx.Intermediate)["decoder"]["hidden_states"].get_value()[0]
    return np.asarray(model.logits_from_hidden_states_for_vocab_tiling(hidden, True, "train"), np.float64)

class Padded:
    def __init__(self, batches):
        self.batches = batches

    def __next__(self):
        batch = dict(next(self.batches))
        batch["targets_segmentation"] = batch["targets_segmentation"].at[1, 9:].set(0).at[3].set(0)
        return batch

class WithTeacher(example.WithTeacher):
    def __init__(self, batches, config, mesh):
        super().__init__(Padded(batches), config, mesh)
        seen["batch"] = jax.device_get(next(self.batches))
        seen["teacher"] = logits(self.teacher, config, seen["batch"])

def setup_train_loop(config, *others, setup=train_utils.setup_train_loop):
    made = setup(config, *others)
    student = nnx.merge(*nnx.split(made[-1].model), copy=True)
    with jax.set_mesh(made[4]):
        seen["student"] = logits(student, config, seen["batch"])
    return made

example.WithTeacher, train_utils.setup_train_loop = WithTeacher, setup_train_loop
lines = example.main(num_steps=4, **json.loads(sys.argv[2]))

def logprobs(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

def among(logits, places):
    kept = np.exp(np.take_along_axis(logits, places, -1) / example.TEMPERATURE)
    return kept / kept.sum(-1, keepdims=True)

mask = seen["batch"]["targets_segmentation"] != 0
nll = -np.take_along_axis(logprobs(seen["student"]), seen["batch"]["targets"][..., None], -1)[..., 0]
places = np.argsort(-seen["teacher"], -1)[..., :example.K]
q, p = among(seen["teacher"], places), among(seen["student"], places)
kl = example.TEMPERATURE**2 * (q * np.log(q / p)).sum(-1)
print(json.dumps({
    "tokens": int(mask.sum()), "sft": nll[mask].mean(), "loss": (nll + kl)[mask].mean(), "lines": lines,
    "devices": len(jax.devices()),
}))
"""


@pytest.mark.slow
def test_maxtext(tmp_path):
    python = python_from((3, 12))
    if python is None:
        pytest.skip("MaxText 0.2.5 needs Python 3.12")
    wheel, _ = build_packages(tmp_path / "packages")
    run = make_environment(tmp_path / "venv", *requirements("maxtext_loss"), wheel, python=python)
    mesh = {"ici_fsdp_parallelism": 4, "ici_tensor_parallelism": 2}
    seen = json.loads(run("-c", MAXTEXT, ROOT / "examples", json.dumps(mesh), devices=8).splitlines()[-1])
    lines = seen["lines"]
    assert seen["devices"] == 8 and 0 < seen["tokens"] < 8 * 16 and len(lines) == 4
    assert lines[0]["learning/total_weights"] == seen["tokens"]
    assert lines[0]["learning/lm_loss"] == pytest.approx(seen["sft"], abs=2e-5)
    assert lines[0]["learning/loss"] == pytest.approx(seen["loss"], abs=2e-5)
    assert seen["loss"] - seen["sft"] > 0.1 and lines[-1]["learning/loss"] < lines[0]["learning/loss"]
