"""Times the losses and says what memory they need, beside others' at the same shapes and dtype, in one process.

    python benchmarks/losses.py                                   # SHAPES in both dtypes: 5 minutes on two cores
    python benchmarks/losses.py --tokens 2048 --width 576 --vocabulary 49152 --dtype bfloat16
    python benchmarks/losses.py --memory                          # XLA's accounting at 8192 x 4096 x 128256, no run
    python benchmarks/losses.py --memory --tpu v5e:1x1            # the same, compiled for a TPU chip (needs libtpu)

Every contender computes the value and the gradient, with respect to the hidden states and the embedding table that is
the unembedding, of one of two losses:

    raft   cross entropy of N answer tokens, and the KL on the top 512 of N rollout tokens
    jsd    cross entropy and generalised Jensen-Shannon divergence of the same N tokens, which is what Liger fuses

Contenders on torch run where their packages are importable (`pip install trl==1.16.0`, `pip install liger-kernel`).
Rounds are interleaved; the table gives the median of each contender, and its range.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from raft_jax.losses import (
    TiedEmbedding,
    cross_entropy,
    jensen_shannon,
    linear_cross_entropy,
    linear_jensen_shannon,
    linear_raft_losses,
    linear_top_k_forward_kl,
    token_mean,
    token_weight,
    top_k_forward_kl,
)

TEMPERATURE, GIB = 1.5, 2**30
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
SHAPES = [  # tokens, width, vocabulary: SmolLM2-135M; the width of Llama-3.2-1B; that of Llama-3.1-8B
    (256, 576, 49152),
    (1024, 576, 49152),
    (128, 2048, 128256),
    (32, 4096, 128256),
]


def jax_losses(shape, chunk_size):
    """{name: function of (answer, rollout, table, teacher, teacher_table, labels)}"""
    mask = jnp.ones((1, shape.tokens), bool)
    distil = {"k": shape.k, "temperature": TEMPERATURE}

    def linear(answer, rollout, table, teacher, teacher_table, labels):
        sft = linear_cross_entropy(
            answer, TiedEmbedding(table), labels, weight_BT=token_weight(mask), chunk_size=chunk_size
        )
        kl = linear_top_k_forward_kl(
            rollout, TiedEmbedding(table), teacher, TiedEmbedding(teacher_table), chunk_size=chunk_size, **distil
        )
        return sft + token_mean(kl, mask)

    def at_once(answer, rollout, table, teacher, teacher_table, labels):
        sft, kl = linear_raft_losses(
            answer, labels, rollout, TiedEmbedding(table), teacher, TiedEmbedding(teacher_table),
            chunk_size=chunk_size, **distil,
        )  # fmt: skip
        return token_mean(sft, mask) + token_mean(kl, mask)

    def unreduced(answer, rollout, table, teacher, teacher_table, labels):
        sft = linear_cross_entropy(answer, TiedEmbedding(table), labels, chunk_size=chunk_size)
        kl = linear_top_k_forward_kl(
            rollout, TiedEmbedding(table), teacher, TiedEmbedding(teacher_table), chunk_size=chunk_size, **distil
        )
        return token_mean(sft, mask) + token_mean(kl, mask)

    def of_logits(answer, rollout, table, teacher, teacher_table, labels):
        sft = cross_entropy(answer @ table.T, labels)
        kl = top_k_forward_kl(rollout @ table.T, teacher @ teacher_table.T, **distil)
        return token_mean(sft, mask) + token_mean(kl, mask)

    def naive(answer, rollout, table, teacher, teacher_table, labels):
        """As usually written: both log-softmaxes whole, then the truncation. With float64 arrays a reference."""
        logprobs = jax.nn.log_softmax(wide(answer @ table.T))
        sft = -jnp.take_along_axis(logprobs, labels[..., None], axis=-1).mean()
        u = wide(jax.lax.stop_gradient(teacher @ teacher_table.T))
        q = jax.nn.log_softmax(u / TEMPERATURE)
        p = jax.nn.log_softmax(wide(rollout @ table.T) / TEMPERATURE)
        q, kept = jax.lax.top_k(q, shape.k)
        q, p = jax.nn.log_softmax(q), jax.nn.log_softmax(jnp.take_along_axis(p, kept, axis=-1))
        return sft + TEMPERATURE**2 * (jnp.exp(q) * (q - p)).sum(-1).mean()

    def naive_jsd(answer, rollout, table, teacher, teacher_table, labels):
        p = jax.nn.log_softmax(wide(answer @ table.T))
        q = jax.nn.log_softmax(wide(jax.lax.stop_gradient(teacher @ teacher_table.T)))
        sft = -jnp.take_along_axis(p, labels[..., None], axis=-1).mean()
        middle = jnp.logaddexp(p, q) - jnp.log(2.0)
        jsd = (jnp.exp(p) * (p - middle) + jnp.exp(q) * (q - middle)).sum(-1).mean() / 2
        return (sft + jsd) / 2

    def linear_jsd(answer, rollout, table, teacher, teacher_table, labels):
        settings = {"weight_BT": token_weight(mask), "chunk_size": chunk_size}
        sft = linear_cross_entropy(answer, TiedEmbedding(table), labels, **settings)
        models = answer, TiedEmbedding(table), teacher, TiedEmbedding(teacher_table)
        return (sft + linear_jensen_shannon(*models, temperature=1.0, **settings)) / 2

    def jsd_of_logits(answer, rollout, table, teacher, teacher_table, labels):
        logits = answer @ table.T
        jsd = jensen_shannon(logits, teacher @ teacher_table.T, temperature=1.0)
        return (token_mean(cross_entropy(logits, labels), mask) + token_mean(jsd, mask)) / 2

    return {
        "raft": {
            "raft_jax linear, at once": at_once,
            "raft_jax linear": linear,
            "raft_jax linear, unreduced": unreduced,
            "raft_jax on logits": of_logits,
            "naive JAX": naive,
        },
        "jsd": {"raft_jax linear": linear_jsd, "raft_jax on logits": jsd_of_logits, "naive JAX": naive_jsd},
    }


def wide(array):
    """float32 at least."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def random_arrays(shape):
    """Hidden states of answer and rollout, table, the teacher's hidden states and table, labels; made on the device."""

    @jax.jit
    def make(key):
        *keys, last = jax.random.split(key, 6)
        hidden, table = (1, shape.tokens, shape.width), (shape.vocabulary, shape.width)
        arrays = [
            (jax.random.normal(key, size) * (1 if size == hidden else shape.width**-0.5)).astype(shape.dtype)
            for key, size in zip(keys, (hidden, hidden, table, hidden, table), strict=True)
        ]
        return *arrays, jax.random.randint(last, hidden[:2], 0, shape.vocabulary)

    return make(jax.random.key(0))


def compiled(loss, arrays):
    """The program of a loss's value and gradient."""
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arrays).compile()


def jax_contenders(shape, kind, chunk_size, leave_out=()):
    arrays = random_arrays(shape)
    for name, loss in jax_losses(shape, chunk_size)[kind].items():
        if name in leave_out:
            continue
        program = compiled(loss, arrays)
        yield name, lambda program=program: jax.block_until_ready(program(*arrays)), temporary(program)


def torch_contenders(shape, kind):
    """TRL's and Liger's functions as they come; what is around them is the product with the unembedding."""
    try:
        import torch
    except ImportError:
        return
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    dtype = getattr(torch, shape.dtype)
    torch.manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, device=device) * scale).to(dtype)

    small = shape.width**-0.5
    answer, rollout, teacher = (normal(shape.tokens, shape.width) for _ in range(3))
    weight, teacher_weight = (normal(shape.vocabulary, shape.width, scale=small) for _ in range(2))
    labels = torch.randint(shape.vocabulary, (shape.tokens,), device=device)
    student = [x.requires_grad_() for x in (answer, rollout, weight)]

    def run(loss):
        for x in student:
            x.grad = None
        loss().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    if kind == "raft":
        try:
            from trl.experimental.sdft.loss_utils import compute_topk_self_distillation_loss
        except ImportError:
            return

        def trl():
            sft = torch.nn.functional.cross_entropy((answer @ weight.T).float(), labels)
            with torch.no_grad():
                u = (teacher @ teacher_weight.T).float() / TEMPERATURE
            v = (rollout @ weight.T).float() / TEMPERATURE
            kl = compute_topk_self_distillation_loss(
                v, u, distillation_topk=shape.k, distillation_alpha=0.0, distillation_add_tail=False
            )
            return sft + TEMPERATURE**2 * kl.mean()

        yield "TRL (torch)", lambda: run(trl), None
    else:
        try:
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        except ImportError:
            return
        fused = LigerFusedLinearJSDLoss(compiled=device == "cuda")
        yield "Liger (torch)", lambda: run(lambda: fused(answer, weight, teacher, teacher_weight, labels)), None


def temporary(program) -> int:
    """Bytes that a compiled program takes besides its arguments and results, by XLA's own account."""
    return program.memory_analysis().temp_size_in_bytes


def measure(contenders, num_rounds):
    """{name: seconds of each round}, after one round that does not count."""
    seconds = {name: [] for name, _, _ in contenders}
    for index in range(num_rounds + 1):
        for name, run, _ in contenders:
            start = time.perf_counter()
            run()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_growth(shape, kind, chunk_size, wanted):
    """How far one run of one contender raises this process's largest resident size; for a process of its own."""
    contenders = jax_contenders(shape, kind, chunk_size) if "torch" not in wanted else torch_contenders(shape, kind)
    for name, run, _ in contenders:
        if name == wanted:
            before = resident()
            run()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    raise SystemExit(f"no contender {wanted}")


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def table(shape, given):
    leave_out = () if given.all else ("raft_jax linear, unreduced", "raft_jax on logits")
    contenders = [
        *jax_contenders(shape, given.loss, given.chunk_size, leave_out), *torch_contenders(shape, given.loss)
    ]  # fmt: skip
    seconds = measure(contenders, given.rounds)
    fastest = min(map(statistics.median, seconds.values()))
    print(
        f"\n{given.loss}: {shape.tokens} tokens, width {shape.width}, vocabulary {shape.vocabulary}, K {shape.k}, "
        f"{shape.dtype}, chunk_size {given.chunk_size}, {jax.default_backend()}, {given.rounds} rounds"
    )
    print(f"{'':28}{'median ms':>10}{'range':>16}{'/ fastest':>11}{'XLA temp GiB':>14}{'peak growth GiB':>17}")
    for name, _, temp in contenders:
        middle, low, high = statistics.median(seconds[name]), min(seconds[name]), max(seconds[name])
        temp = "" if temp is None else f"{temp / GIB:.3f}"
        growth = f"{child_growth(shape, given, name) / GIB:.3f}" if given.peak else ""
        spread = f"{low * 1e3:.0f}-{high * 1e3:.0f}"
        print(f"{name:28}{middle * 1e3:10.0f}{spread:>16}{middle / fastest:11.2f}{temp:>14}{growth:>17}", flush=True)


def child_growth(shape, given, name) -> int:
    arguments = [f"--{key}={value}" for key, value in vars(shape).items()]
    command = [
        sys.executable, __file__, *arguments, f"--chunk-size={given.chunk_size}", f"--loss={given.loss}",
        f"--peak-of={name}",
    ]  # fmt: skip
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory(shape, chunk_size, topology):
    """Bytes of temporary memory by XLA's own accounting; compiles and runs nothing."""
    sharding, where = None, jax.default_backend()
    if topology:
        from jax.experimental import topologies
        from jax.sharding import SingleDeviceSharding

        device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
        sharding, where = SingleDeviceSharding(device), topology

    def array(*size, dtype=shape.dtype):
        return jax.ShapeDtypeStruct(size, jnp.dtype(dtype), sharding=sharding)

    hidden, embedding = array(1, shape.tokens, shape.width), array(shape.vocabulary, shape.width)
    labels = array(1, shape.tokens, dtype="int32")
    for name, loss in jax_losses(shape, chunk_size)["raft"].items():
        if topology and "linear" not in name:
            continue  # does not fit the chip: the compiler refuses
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        program = step.lower(hidden, hidden, embedding, hidden, embedding, labels).compile()
        print(f"{where:10} {name:28} {temporary(program) / GIB:8.3f} GiB of temporary memory", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: both, one after the other")
    parser.add_argument("--loss", choices=["raft", "jsd"], default="raft")
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="also the means of unreduced values, and losses on logits")
    parser.add_argument("--peak", action="store_true", help="also the growth of the resident size, one process each")
    parser.add_argument("--memory", action="store_true", help="only XLA's accounting, at 8192 x 4096 x 128256")
    parser.add_argument("--tpu", help="a TPU topology to compile --memory for, such as v5e:1x1")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    defaults = [(8192, 4096, 128256)] if given.memory else SHAPES
    if given.tokens or given.width or given.vocabulary:
        defaults = defaults[:1]
    dtypes = [given.dtype] if given.dtype else ["bfloat16"] if given.memory else ["float32", "bfloat16"]
    for dtype in dtypes:
        for tokens, width, vocabulary in defaults:
            shape = argparse.Namespace(
                tokens=given.tokens or tokens, width=given.width or width, vocabulary=given.vocabulary or vocabulary,
                k=given.k, dtype=dtype,
            )  # fmt: skip
            if given.peak_of:
                print(peak_growth(shape, given.loss, given.chunk_size, given.peak_of))
            elif given.memory:
                memory(shape, given.chunk_size, given.tpu)
            else:
                table(shape, given)


if __name__ == "__main__":
    main()
