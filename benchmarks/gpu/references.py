"""Whether what runs on this device is right: kernels, losses, the decoder and the whole train step, against float64.

Errors are relative, ||found - reference|| / ||reference||, over real tokens, on random inputs that both sides share.
A part that finds one above its bound fails, but only after it has measured all of them.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import losses
import numpy as np
import numpy_reference
import tiny as toy
from shapes import random_model
from timing import measured

from raft_jax.models import attention
from raft_jax.models.decoder import positions_from_mask
from raft_jax.tokens import Tokens
from raft_jax.train.state import init_state, make_optimizer
from raft_jax.train.step import LossConfig, completions_of, make_train_step

BOUNDS = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-3, "float64": 1e-6}
# Table and hidden states rounded to bfloat16 are shared; what differs is the rounding of logits and gradients.
PREDICTED = {
    "bfloat16": "errors of 2e-3 to 1e-2",
    "float32": "3e-4 where products are TF32, far below 1e-4 where they are not",
    "reference": "1e-4 in float32, where products of 12 numbers may be TF32; 1e-6 in float64",
}
STEP = {"top_k": 6, "temperature": 1.5, "ema_decay": 0.9}
LEARNING_RATE, WEIGHT_DECAY, NUM_STEPS = 0.01, 0.1, 5


def relative(found, reference) -> float:
    found, reference = (np.asarray(x, np.float64) for x in (found, reference))
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def verdict(errors: dict[str, float], dtype: str, bound: float | None = None) -> dict:
    bound = BOUNDS[dtype] if bound is None else bound
    bad = {name: error for name, error in errors.items() if not error <= bound}  # NaN is bad, too
    return {"errors": errors, "bound": bound, "status": "wrong" if bad else "right"}


def finish(record, part: str) -> None:
    """Fails where anything is wrong or could not be measured."""
    bad = [name for name, found in record.of(part).items() if found.get("status") not in ("right", "skipped")]
    if bad:
        raise AssertionError(f"not right: {', '.join(bad)}")


def kernels_and_losses(record, tiny: bool) -> None:
    record.set(predicted=PREDICTED)
    on_gpu = jax.default_backend() == "gpu"
    widths = (8,) if tiny else (64, 128)
    length = 24 if tiny else 513  # odd: cuDNN's call pads it
    for width in widths:
        for kernel, dtype in (("cudnn", "bfloat16"), ("cudnn", "float16"), ("plain", "bfloat16"), ("plain", "float32")):
            name = f"attention {kernel} {dtype} {width}"
            if kernel == "cudnn" and not on_gpu:
                record.add(name, status="skipped", why="cuDNN runs on CUDA devices only")
                continue
            measured(record, name, partial(attention_error, kernel, dtype, width, length))
    shape = (48, 16, 512, 16) if tiny else (512, 1024, 16_384, 512)
    dtypes = ("bfloat16",) if tiny else ("float32", "bfloat16")
    for kind, dtype in itertools.product(("raft", "jsd"), dtypes):
        measured(record, f"losses {kind} {dtype}", partial(loss_error, kind, dtype, *shape))
    for dtype in dtypes:
        measured(record, f"decoding {dtype}", partial(decoding_error, "tiny" if tiny else "smollm2", dtype))
    finish(record, record.part)


def attention_error(kernel: str, dtype: str, width: int, length: int) -> dict:
    """Values and gradients of one attention against a naive one in float64, prompts padded on the left."""
    B, N, K = 2, 4, 2
    keys = jax.random.split(jax.random.key(1), 4)
    sizes = ((B, length, heads, width) for heads in (N, K, K, N))
    query, key, value, slope = (
        jax.random.normal(key, size).astype(dtype) for key, size in zip(keys, sizes, strict=True)
    )
    mask = jnp.arange(length)[None] >= jnp.array([0, length // 3])[:, None]
    slope = slope * mask[..., None, None].astype(slope.dtype)
    config = SimpleNamespace(kernel=kernel, attention_softcap=None, windows=None)

    def ours(query, key, value):
        key, value = attention.for_attention(key, value)
        positions = positions_from_mask(mask)
        mixed = attention.attend(config, query * width**-0.5, key, value, positions, mask, None, None)
        return jnp.vdot(mixed.astype(jnp.float32), slope.astype(jnp.float32)), mixed

    def naive(query, key, value):
        key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * width**-0.5
        seen = jnp.tri(length, dtype=bool) & mask[:, None, None, :]
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -1e30)), value)
        return jnp.vdot(mixed, slope.astype(mixed.dtype)), mixed

    real = np.asarray(mask)
    (_, mixed), grads = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(query, key, value)
    with jax.enable_x64(True):
        given = [jnp.asarray(np.asarray(x, np.float64)) for x in (query, key, value)]
        (_, wide), wide_grads = jax.jit(jax.value_and_grad(naive, (0, 1, 2), has_aux=True))(*given)
    errors = {"values": relative(np.asarray(mixed)[real], np.asarray(wide)[real])}
    for name, found, expected in zip(("query", "key", "value"), grads, wide_grads, strict=True):
        errors[f"{name} gradient"] = relative(found, expected)
    return verdict(errors, dtype)


def loss_error(kind: str, dtype: str, tokens: int, width: int, vocabulary: int, k: int) -> dict:
    """Every form of a loss that this project has, value and gradients, against the naive one in float64."""
    shape = SimpleNamespace(tokens=tokens, width=width, vocabulary=vocabulary, k=k, dtype=dtype)
    arrays = losses.random_arrays(shape)
    functions = losses.jax_losses(shape, max(tokens // 4, 1))[kind]
    naive = functions.pop("naive JAX")
    functions.pop("raft_jax linear, unreduced", None)  # the gradient of the one above, by a longer way
    if dtype != "float32":
        functions.pop("raft_jax on logits")  # these logits have been rounded before the loss sees them
    with jax.enable_x64(True):
        given = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays[:-1]]
        value, grads = losses.compiled(naive, (*given, arrays[-1]))(*given, arrays[-1])
        value, grads = jax.device_get((value, grads))
    errors = {}
    for name, function in functions.items():
        found, found_grads = losses.compiled(function, arrays)(*arrays)
        errors[name] = relative(found, value)
        for argument, one, other in zip(("answer", "rollout", "table"), found_grads, grads, strict=True):
            if np.any(other):
                errors[f"{name}, {argument} gradient"] = relative(one, other)
    return verdict(errors, dtype)


def decoding_error(name: str, dtype: str) -> dict:
    """Hidden states of tokens that are decoded one by one against those of one pass in float32 without kernels."""
    model = random_model(name, dtype)
    plain = replace(model, config=replace(model.config, kernel="plain"))
    B, P, steps = 2, 16, 4
    tokens = jax.random.randint(jax.random.key(2), (B, P + steps), 0, model.config.vocab_size)
    mask = jnp.arange(P + steps)[None] >= jnp.array([0, 5])[:, None]
    one_by_one = jax.jit(model.step)
    hidden, cache = jax.jit(model.prefill, static_argnums=2)(
        model.params, Tokens(tokens[:, :P], mask[:, :P]), P + steps
    )
    found = [hidden[:, -1]]
    for index in range(P, P + steps - 1):
        hidden, cache = one_by_one(model.params, tokens[:, index : index + 1], mask[:, index : index + 1], cache)
        found.append(hidden[:, 0])
    with jax.default_matmul_precision("highest"):
        params = jax.tree.map(lambda array: array.astype(jnp.float32), model.params)
        expected = jax.jit(plain.hidden)(params, Tokens(tokens, mask))[:, P - 1 : -1]
    # The rounding of all layers adds up.
    return verdict({"hidden": relative(jnp.stack(found, 1), expected)}, dtype, bound=5 * BOUNDS[dtype])


def train_step(record, tiny: bool) -> None:
    """Five steps of Eqs. 5-12 and AdamW against NumPy in float64 (tests/numpy_reference.py), gradients by hand."""
    record.set(predicted=PREDICTED["reference"])
    for dtype in ("float32", "float64"):
        measured(record, f"train step {dtype}", partial(step_error, dtype))
    finish(record, record.part)


def step_error(dtype: str) -> dict:
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        optimizer = make_optimizer(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        losses = LossConfig(
            completions_of(toy.toy_hidden), toy.toy_unembedding, top_k=STEP["top_k"], temperature=STEP["temperature"]
        )
        step = jax.jit(make_train_step(losses, optimizer, ema_decay=STEP["ema_decay"]))
        params, teacher = (jax.tree.map(lambda x: jnp.asarray(x, dtype), toy.toy_parameters(seed)) for seed in (0, 1))
        state, expected = init_state(params, optimizer), numpy_reference.first_state(toy.toy_parameters(0))
        errors = {}
        for number in range(NUM_STEPS):
            rows, rollouts = toy.random_rows(number)
            state, metrics = step(state, teacher, toy.padded(rows, rollouts))
            expected, numbers = numpy_reference.train_step(
                expected,
                toy.toy_parameters(1),
                rows,
                rollouts,
                learning_rate=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                **STEP,
            )
            for name, value in numbers.items():
                errors[name] = max(errors.get(name, 0.0), relative(metrics[name], value))
        moved = {name: value - toy.toy_parameters(0)[name] for name, value in expected["params"].items()}
        for name, value in moved.items():
            found = np.asarray(state.params[name], np.float64) - toy.toy_parameters(0)[name]
            errors[f"{name} moved"] = relative(found, value)
    return verdict(errors, dtype)
