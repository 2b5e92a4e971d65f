"""Both losses at once: what the two give from logits, and one array of the unembedding's size fewer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_close
from quick import as_one, quick_jit
from test_memory import GIB, WIDENED, compiled

from raft_jax.losses import TiedEmbedding, cross_entropy, linear_raft_losses, linear_top_k, top_k_forward_kl

B, A, C, WIDTH, TEACHER_WIDTH, VOCABULARY = 2, 7, 3, 4, 6, 300
SETTINGS = {"k": 9, "temperature": 1.3, "vocab_size": 290}


def arrays():
    random = np.random.default_rng(3)
    sizes = {
        "answer": (B, A, WIDTH), "rollout": (B, C, WIDTH), "unembedding": (WIDTH, VOCABULARY), "bias": (VOCABULARY,),
        "teacher": (B, C, TEACHER_WIDTH), "teacher_unembedding": (TEACHER_WIDTH, VOCABULARY),
        "sft_weight": (B, A), "kl_weight": (B, C),
    }  # fmt: skip
    given = {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    return given, random.integers(0, 290, (B, A))


@pytest.mark.parametrize("chunk_size", [4, 512], ids=["in blocks", "in one block"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_both_at_once_are_the_two_of_logits(tied, chunk_size):
    given, labels = arrays()

    def at_once(answer, rollout, unembedding, bias):
        head = TiedEmbedding(unembedding.T) if tied else unembedding
        sft, (kl, seen) = linear_raft_losses(
            answer, labels, rollout, head, given["teacher"], given["teacher_unembedding"], student_bias_V=bias,
            logit_softcap=(5.0, None), logit_scale=(0.5, 1.0), chunk_size=chunk_size, return_metrics=True, **SETTINGS,
        )  # fmt: skip
        return (sft * given["sft_weight"]).sum() + 3 * (kl * given["kl_weight"]).sum(), (sft, kl, seen)

    def of_logits(answer, rollout, unembedding, bias):
        def logits(hidden):
            return 5 * jnp.tanh(0.5 * (hidden @ unembedding + bias) / 5)

        sft = cross_entropy(logits(answer), labels, vocab_size=290)
        teacher = given["teacher"] @ given["teacher_unembedding"]
        kl, seen = top_k_forward_kl(logits(rollout), teacher, return_metrics=True, **SETTINGS)
        return (sft * given["sft_weight"]).sum() + 3 * (kl * given["kl_weight"]).sum(), (sft, kl, seen)

    student = [given[name] for name in ("answer", "rollout", "unembedding", "bias")]
    got, want = (quick_jit(jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True))(*student) for f in (at_once, of_logits))
    assert_close(got, want, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("chunk_size", [4, 512], ids=["in blocks", "in one block"])
def test_more_rollouts_than_answers(chunk_size):
    """Two rollouts a prompt: losses and gradients of the two calls on logits."""
    given, labels = arrays()
    random = np.random.default_rng(4)
    rollouts, teacher = random.normal(size=(2 * B, C, WIDTH)), random.normal(size=(2 * B, C, TEACHER_WIDTH))
    rollouts, teacher = rollouts.astype(np.float32), teacher.astype(np.float32)

    def at_once(answer, rollouts, unembedding):
        sft, kl = linear_raft_losses(
            answer, labels, rollouts, unembedding, teacher, given["teacher_unembedding"], chunk_size=chunk_size,
            **SETTINGS,
        )  # fmt: skip
        assert sft.shape == (B, A) and kl.shape == (2 * B, C)
        return sft.sum() + (kl**2).sum()

    def of_logits(answer, rollouts, unembedding):
        kl = top_k_forward_kl(rollouts @ unembedding, teacher @ given["teacher_unembedding"], **SETTINGS)
        return cross_entropy(answer @ unembedding, labels, vocab_size=290).sum() + (kl**2).sum()

    student = given["answer"], rollouts, given["unembedding"]
    got, want = (quick_jit(jax.value_and_grad(f, (0, 1, 2)))(*student) for f in (at_once, of_logits))
    assert_close(got, want, rtol=5e-5, atol=2e-5)


def test_a_teacher_that_was_kept():
    given, labels = arrays()
    kept = as_one(linear_top_k, given["teacher"], given["teacher_unembedding"], **SETTINGS)
    student = given["answer"], labels, given["rollout"], given["unembedding"]
    got = as_one(linear_raft_losses, *student, kept, **SETTINGS)
    want = as_one(linear_raft_losses, *student, given["teacher"], given["teacher_unembedding"], **SETTINGS)
    assert_close(got, want)


def test_temporary_memory():
    """8,192 tokens x 4,096 x 128,256 in bfloat16: 2 GiB at most, where the two calls may take 3."""
    whole = compiled(1024, tied=True, at_once=True, vocab_shards=1)
    assert whole.memory_analysis().temp_size_in_bytes <= 2 * GIB + WIDENED
