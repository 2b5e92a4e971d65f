"""The TPU's own compiler takes the whole train step of the paper's three models, on a machine without a TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("libtpu", reason="the extra [tpu] is not installed")

ROOT = Path(__file__).parents[1]
CHIP_BYTES = 16e9  # of a v5e

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from raft_jax.config import load_config
from raft_jax.models import Model, parameter_shardings
from raft_jax.models.config import parameter_table
from raft_jax.models.families import config_from_hf
from raft_jax.sharding import make_mesh, partition_spec
from raft_jax.train.state import init_state, make_optimizer, state_shardings
from raft_jax.tokens import Batch, Tokens
from raft_jax.train.step import LossConfig, make_train_step
from raft_jax.train.student import make_student
from dataclasses import replace

config = load_config(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=devices)
decoder = replace(config_from_hf(json.loads(sys.argv[2])), remat=config.model.remat, kernel="splash")
dtype = jnp.dtype(config.model.dtype)
shardings = parameter_shardings(decoder, mesh)
params = {name: jax.ShapeDtypeStruct(info.shape, dtype, sharding=shardings[name])
          for name, info in parameter_table(decoder).items()}
model = Model(decoder, params)
optimizer = make_optimizer(config.train.learning_rate)
student = make_student(model, config.train.lora, mesh)
start = lambda params: init_state(student.init(params, jax.random.key(0)), optimizer)
state = jax.eval_shape(start, params)
state = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    state, state_shardings(state, student.shardings),
)
rows = NamedSharding(mesh, partition_spec(("batch",)))
rows_per_chip = int(sys.argv[3])
B, P, A = rows_per_chip * 16, 256, config.data.max_answer_tokens
Q, C = 1024, config.train.rollout.max_new_tokens
array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
# Rows of half the longest, where there is more than one on a chip, that begin as equally as the loop allows.
shared = 32 if all(rope.long_frequencies is None for rope in decoder.ropes) else 0
tokens = lambda length, shared: Tokens(
    array(jnp.int32, B, length), array(bool, B, length), max(1, rows_per_chip // 2) * length, shared
)
batch = Batch(tokens(P, shared), tokens(A, 0), tokens(Q, shared), array(jnp.int32, B), tokens(C, 0))
losses = LossConfig(student.model.completion_hidden, student.unembedding, student.forward_params,
                    head_settings=model.head_settings)
step = jax.jit(make_train_step(losses, optimizer), donate_argnums=0)
with jax.set_mesh(mesh):
    compiled = step.lower(state, params, batch).compile()
memory = compiled.memory_analysis()
total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
total -= memory.alias_size_in_bytes
print("bytes per chip", total, "arguments", memory.argument_size_in_bytes, "temporary", memory.temp_size_in_bytes)
"""


# What matters of the config.json of Llama-3.2-3B-Instruct, SmolLM3-3B and Phi-4-mini-instruct. LongRoPE's divisors are
# numbers that change no shape.
MODELS = {
    "llama-3.2-3b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "smollm3-3b": {
        "model_type": "smollm3",
        "vocab_size": 128256,
        "num_hidden_layers": 36,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 11008,
        "rope_theta": 5000000.0,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-6,
        "no_rope_layer_interval": 4,
    },
    "phi-4-mini": {
        "model_type": "phi3",
        "vocab_size": 200064,
        "num_hidden_layers": 32,
        "hidden_size": 3072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "rope_theta": 10000.0,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "sliding_window": 262144,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    },
}


@pytest.mark.parametrize(("name", "rows_per_chip"), [*((name, 1) for name in MODELS), ("llama-3.2-3b", 4)])
def test_train_step_fits_a_v5e_slice_of_16_chips(name, rows_per_chip):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            str(ROOT / f"configs/{name}.yaml"),
            json.dumps(MODELS[name]),
            str(rows_per_chip),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(name, done.stdout)
    assert int(done.stdout.split()[3]) < CHIP_BYTES
