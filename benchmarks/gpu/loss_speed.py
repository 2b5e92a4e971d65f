"""Value and gradient of the losses at 8192 tokens x 4096 x 128256 in bfloat16: ours, naive JAX, TRL's and Liger's."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import losses
from record import Skipped
from timing import measured, shares, timed

FULL = SimpleNamespace(tokens=8192, width=4096, vocabulary=128_256, k=512, dtype="bfloat16")
TINY = SimpleNamespace(tokens=32, width=16, vocabulary=256, k=8, dtype="bfloat16")
ORDER = ("raft_jax linear, at once", "naive JAX", "raft_jax linear", "raft_jax on logits")
# Products of tokens, width and vocabulary, each 2 N D V operations: three of the forward pass (answer, rollout,
# teacher), four of the backward pass (two for each pair of hidden states and table). JSD has one student's product
# and one teacher's, and two of its gradient.
NUM_PRODUCTS = {"raft": 7, "jsd": 4}
PREDICTED = {
    "raft": "7 products of 8.6 TFLOP: 76 ms at 790 TFLOP/s; ours makes logits again in its backward pass (9: 98 ms)",
    "jsd": "4 products: 44 ms; with logits made again 5 to 6",
    "memory": "naive JAX holds several arrays of 8192 x 128256 in float32, 4.2 GB each; ours a chunk of it",
}


def ours(record, tiny: bool) -> None:
    shape = TINY if tiny else FULL
    record.set(predicted=PREDICTED, shape=vars(shape))
    arrays = losses.random_arrays(shape)
    for kind in ("raft", "jsd"):
        functions = losses.jax_losses(shape, 16 if tiny else 512)[kind]
        for name in [name for name in ORDER if name in functions][: 2 if tiny else None]:
            measured(record, f"{kind}: {name}", partial(speed, record, functions[name], arrays, kind, shape))
    del arrays
    logits = (16, 256, 8) if tiny else (1024, 128_256, 512)
    for name, backward in (("top-K forward", False), ("top-K forward and backward", True)):
        measured(record, name, partial(top_k_speed, record, *logits, backward), tokens=logits[0], k=logits[2])


def flops(kind: str, shape) -> float:
    return NUM_PRODUCTS[kind] * 2.0 * shape.tokens * shape.width * shape.vocabulary


def speed(record, function, arrays, kind: str, shape) -> dict:
    program = losses.compiled(function, arrays)
    found = timed(lambda: program(*arrays), repeats=5)
    return {
        **found,
        "temporary_bytes": losses.temporary(program),
        **shares(record, seconds=found["seconds"], flops=flops(kind, shape)),
    }


def top_k_speed(record, tokens: int, vocabulary: int, k: int, backward: bool) -> dict:
    """The K largest of float32 logits, and the scatter that is their gradient; the floor is one reading."""
    logits = jax.random.normal(jax.random.key(0), (tokens, vocabulary))

    def largest(logits):
        return jax.lax.top_k(logits, k)[0]

    def gradient(logits):
        return jax.grad(lambda logits: jnp.sum(jnp.square(largest(logits))))(logits)

    program = jax.jit(gradient if backward else largest)
    found = timed(lambda: program(logits), repeats=5)
    return {**found, **shares(record, seconds=found["seconds"], moved=logits.nbytes * (2 if backward else 1))}


def others(record, tiny: bool) -> None:
    """The same on torch, from the packages that are there."""
    import torch

    shape = TINY if tiny else FULL
    record.set(
        predicted={"Liger": "as fast as ours on JSD: it makes the products chunk by chunk, too"},
        shape=vars(shape),
        torch=torch.__version__,
    )
    on_gpu = torch.cuda.is_available() and not tiny
    wanted = {"raft": "TRL (torch)", "jsd": "Liger (torch)"}
    for kind, name in wanted.items():
        contenders = list(losses.torch_contenders(shape, kind))
        if not contenders:
            package = {"raft": "trl", "jsd": "liger_kernel"}[kind]
            record.add(f"{kind}: {name}", status="skipped", why=f"{package} is not installed")
            continue
        for found, run, _ in contenders:
            measured(record, f"{kind}: {found}", partial(torch_speed, record, run, kind, shape, on_gpu))
        del contenders
    if all(found.get("status") == "skipped" for found in record.of(record.part).values()):
        raise Skipped("neither trl nor liger_kernel is installed")


def torch_speed(record, run, kind: str, shape, on_gpu: bool) -> dict:
    import torch

    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found = timed(run, wait=lambda _: None, repeats=5)  # `run` waits for the device itself
    peak = {"temporary_bytes": torch.cuda.max_memory_allocated() - before} if on_gpu else {}
    return {**found, **peak, **shares(record, seconds=found["seconds"], flops=flops(kind, shape))}
