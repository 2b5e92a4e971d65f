"""Second derivatives, traced numbers, strict dtypes and ranks, export, any leading shape, and nothing at all."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from contract import MASK, assert_close, each, every_loss, unreduced_and_grad
from quick import as_one, enable_x64, quick_jit
from rows import ROWS, B, T, V

from raft_jax import losses
from raft_jax.losses import reference, sequence_mean, sequence_weight

EXPORTED = "cross_entropy", "linear_cross_entropy-tied", "linear_top_k", "linear_raft_losses-kl"


def reference_loss(row, student, fixed):
    if not row.linear:
        return row.reference(*student, *fixed)
    teacher = (reference.logits(*fixed),) if row.distils else fixed
    return row.reference(reference.logits(*student), *teacher)


def hvp(loss, student, direction):
    """Gradient, and its derivative in a direction: forward over reverse, as `jax.hessian` does."""
    return jax.jvp(jax.grad(loss), (student,), (direction,))


@every_loss
def test_value_gradient_and_second_derivative_are_those_of_plain_jax(row):
    """Over several chunks of tokens and, backward, several blocks of the vocabulary; of the teacher there is none."""
    vocabulary = 150 if row.linear else V
    student, fixed = row.student(vocabulary=vocabulary), row.fixed(vocabulary=vocabulary)
    direction = row.student(seed=5, vocabulary=vocabulary)

    def step(loss):
        return quick_jit(lambda s, d: (loss(s), *hvp(loss, s, d)))(student, direction)

    got = step(lambda student: row.means(student, fixed, MASK)[0])
    want = step(lambda student: sequence_mean(reference_loss(row, student, fixed), MASK))
    assert_close(got, want, rtol=2e-4, atol=5e-6)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(got[2]))


def test_second_derivative_at_the_teacher():
    """There the Hessian of every KL is the Fisher matrix, diag(p) - p pᵀ, whatever the branch."""
    logits = np.random.default_rng(0).normal(size=(1, 1, 5)).astype(np.float32)
    p = np.exp(np.float64(logits[0, 0]) / 1.5)
    p /= p.sum()
    fisher = np.diag(p) - np.outer(p, p)
    for loss, scale in [
        (losses.forward_kl, 1), (losses.reverse_kl, 1), (partial(losses.top_k_forward_kl, k=5), 1),
        (partial(losses.jensen_shannon, beta=0.3), 0.3 * 0.7),
    ]:  # fmt: skip
        hessian = quick_jit(jax.hessian(lambda x, f=loss: f(x, logits).sum()))(logits).reshape(5, 5)
        np.testing.assert_allclose(hessian, scale * fisher, atol=2e-6)


@pytest.mark.parametrize("loss", [losses.linear_cross_entropy, losses.linear_forward_kl])
def test_second_derivative_in_16_bits(loss):
    """XLA on CPU is given bits in place of bfloat16 (xla_cpu.py), which have no derivative."""
    random = np.random.default_rng(0)
    hidden, table, teacher, direction = (random.normal(size=s) for s in [(2, 4, 3), (3, 300), (3, 300), (3, 300)])
    labels = random.integers(0, 300, (2, 4))
    fixed = (labels,) if loss is losses.linear_cross_entropy else (hidden, teacher)

    def second(dtype):
        arrays = [jnp.asarray(x, dtype) for x in (hidden, table, direction)]
        targets = [x if x.dtype.kind == "i" else jnp.asarray(x, dtype) for x in fixed]
        of = lambda table: loss(arrays[0], table, *targets, chunk_size=3).sum()  # noqa: E731
        return np.float32(quick_jit(lambda table, d: hvp(of, table, d)[1])(*arrays[1:]))

    want = second(jnp.float32)
    np.testing.assert_allclose(second(jnp.bfloat16), want, rtol=0.1, atol=0.05 * np.abs(want).max())


@every_loss
def test_strict_dtypes_and_ranks(row):
    """Also with narrow hidden states before a float32 head, and with float64."""
    student, fixed = row.student(), row.fixed()

    def narrow(arrays):
        return (arrays[0].astype(jnp.bfloat16), *arrays[1:]) if arrays[0].dtype.kind == "f" else arrays

    def wide(arrays):
        return tuple(x.astype(np.float64) if x.dtype.kind == "f" else x for x in arrays)

    step = jax.grad(lambda student, fixed: sum(row.means(student, fixed, MASK)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jax.eval_shape(step, student, fixed)
        jax.eval_shape(step, narrow(student), narrow(fixed))
        with enable_x64(True):
            grads = jax.eval_shape(step, wide(student), wide(fixed))
            assert all(x.dtype == np.float64 for x in jax.tree.leaves(grads))


def test_balance_is_strict_too():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        weight, _ = jax.jit(losses.update_balance)(losses.init_balance(), jnp.bfloat16(2), jnp.float32(0.5))
        assert weight == 4


@every_loss
def test_a_traced_temperature(row):
    """Works, and a derivative with respect to it is refused by name, not 0."""
    if not row.distils:
        pytest.skip("has no temperature")
    student, fixed = row.student(), row.fixed()
    fixed_temperature = row.loss.keywords.get("temperature", 1.5)
    at = lambda t: row.loss(*student, *fixed, temperature=t)  # noqa: E731
    assert_close(quick_jit(at)(fixed_temperature), as_one(row.unreduced, student, fixed))
    with pytest.raises(ValueError, match="temperature carries no gradient"):
        jax.eval_shape(jax.grad(lambda t: at(t).sum()), 1.5)
    traced = jax.make_jaxpr(jax.grad(lambda x, t: row.loss(x, *student[1:], *fixed, temperature=t).sum()))
    traced(student[0], 1.5)  # by another argument: no error


@pytest.mark.parametrize("name, call", [
    ("logit_scale", lambda h, w, x: losses.linear_cross_entropy(h, w, jnp.zeros(2, int), logit_scale=x)),
    ("logit_softcap", lambda h, w, x: losses.linear_top_k(h, w, logit_softcap=x)),
    ("logit_softcap", lambda h, w, x: losses.linear_top_k_forward_kl(h, w, h, w, logit_softcap=(None, x))),
    ("beta", lambda h, w, x: losses.linear_jensen_shannon(h, w, h, w, beta=x)),
    ("label_smoothing", lambda h, w, x: losses.cross_entropy(h, jnp.zeros(2, int), label_smoothing=x)),
])  # fmt: skip
def test_traced_numbers_that_are_refused_by_name(name, call):
    hidden, unembedding = jnp.ones((2, 3)), jnp.ones((3, 4))
    call(hidden, unembedding, jnp.float32(0.5))  # an array that is not traced is a number
    with pytest.raises(ValueError, match=f"{name} must be known when the program is traced, got a traced array"):
        jax.jit(call)(hidden, unembedding, 0.5)


def test_traced_decay():
    want, _ = losses.update_balance(losses.init_balance(), 3.0, 2.0, decay=0.8, max_weight=1.2)
    step = jax.jit(lambda **settings: losses.update_balance(losses.init_balance(), 3.0, 2.0, **settings))
    np.testing.assert_allclose(step(decay=0.8, max_weight=1.2)[0], want, rtol=1e-6)


@every_loss
@pytest.mark.parametrize("shape", [(0, T), (B, 0)], ids=["no rows", "no tokens"])
def test_nothing_at_all(row, shape):
    student, fixed = row.student(batch=shape[0], time=shape[1]), row.fixed(batch=shape[0], time=shape[1])
    mask = np.zeros(shape, bool)
    step = quick_jit(jax.value_and_grad(lambda student: row.means(student, fixed, mask)[0]))
    value, grads = step(student)
    assert value == 0 and all(g.shape == x.shape and not g.any() for g, x in zip(grads, student, strict=True))
    assert jax.eval_shape(row.unreduced, student, fixed).shape == shape


@every_loss
def test_any_leading_shape(row):
    """[N, V], [V] and [A, B, T, V], as [B, T, V]."""
    student, fixed = row.student(), row.fixed()

    def reshaped(arrays, lead):
        trailing = arrays[0].shape[2:]
        return arrays[0].reshape(*lead, *trailing), *arrays[1:]

    def step(lead):
        weight = {"weight_BT": sequence_weight(MASK).reshape(lead)} if row.weighted else {}
        loss = lambda x: row.loss(x, *reshaped(student, lead)[1:], *reshaped(fixed, lead), **weight)  # noqa: E731
        loss_X, grad = unreduced_and_grad(loss)(reshaped(student, lead)[0])
        return np.asarray(loss_X).reshape(-1), np.asarray(grad).reshape(student[0].shape)

    want = step((B, T))
    assert_close(step((B * T,)), want)
    if row.linear:
        loss = lambda *arrays: row.loss(*arrays)  # noqa: E731
        shapes = jax.eval_shape(loss, *reshaped(student, (1, B, T)), *reshaped(fixed, (1, B, T)))
        assert shapes.shape == (1, B, T)
        one = jax.eval_shape(loss, student[0][0, 0], *student[1:], fixed[0][0, 0], *fixed[1:])
        assert one.shape == ()


@each([row for row in ROWS if row.name in EXPORTED])
def test_a_symbolic_batch_exports(row):
    (batch,) = jax.export.symbolic_shape("b")
    student, fixed = row.student(), row.fixed()

    def symbolic(arrays, *lead):
        first = jax.ShapeDtypeStruct((batch, *arrays[0].shape[1:]), jax.dtypes.canonicalize_dtype(arrays[0].dtype))
        return first, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[1:])

    step = jax.jit(jax.value_and_grad(lambda student, fixed, mask: row.means(student, fixed, mask)[0]))
    mask = jax.ShapeDtypeStruct((batch, T), bool)
    exported = jax.export.export(step)(symbolic(student), symbolic(fixed), mask)
    assert_close(exported.call(student, fixed, MASK), step(student, fixed, MASK))


def test_jax_before_0_10(monkeypatch):
    """Its types say `vma` where later ones say `manual_axis_type`."""
    from raft_jax.losses import sharding

    class Old:
        vma = frozenset({"data"})

    monkeypatch.setattr(jax, "typeof", lambda x: Old())
    assert sharding._varying(jnp.zeros(3)) == {"data"}
