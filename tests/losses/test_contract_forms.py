"""What every loss keeps, row by row: under every dtype, shape and transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import MASK, assert_close, every_linear_loss, every_loss, step_of
from quick import quick_jit
from rows import ROWS

from raft_jax.losses import sequence_mean


@pytest.mark.parametrize(
    ("row", "dtype"),
    [(row, jnp.bfloat16) for row in ROWS] + [(row, jnp.float16) for row in ROWS if "top_k" in row.name],
    ids=lambda value: getattr(value, "name", None),
)
def test_narrow_in_float32_out(row, dtype):
    student, fixed = row.student(), row.fixed()
    narrow = jax.tree.map(lambda x: jnp.asarray(x, dtype) if x.dtype == np.float32 else x, (student, fixed))
    same = jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == dtype else x, narrow)
    loss_BT, _, grads = step_of(row)(*narrow, MASK)
    wide_loss_BT, _, wide_grads = step_of(row)(*same, MASK)
    assert loss_BT.dtype == jnp.float32 and all(x.dtype == dtype for x in jax.tree.leaves(grads))
    assert_close(loss_BT, wide_loss_BT, rtol=1e-5, atol=1e-5)
    assert_close(jax.tree.map(np.float32, grads), wide_grads, rtol=0.03, atol=2e-3)


@every_linear_loss
def test_linear_is_logits_variant(row):
    """Over several chunks of tokens and, backward, several blocks of the vocabulary."""
    student, fixed = row.student(vocabulary=300), row.fixed(vocabulary=300)
    _, means, grads = step_of(row)(student, fixed, MASK)
    mean = quick_jit(jax.value_and_grad(lambda student: sequence_mean(row.losses_of_logits(student, fixed), MASK)))
    assert_close((means[0], grads[0]), mean(student))


@every_loss
def test_one_token(row):
    student, fixed = row.student(), row.fixed()
    one = (student[0][:1, :1], *student[1:]), (fixed[0][:1, :1], *fixed[1:])
    assert_close(step_of(row)(*one, MASK[:1, :1])[0], row.losses_in_numpy(student, fixed)[:1, :1])


@every_loss
def test_under_vmap_scan_and_checkpoint(row):
    student, fixed = row.student(), row.fixed()
    _, means, grads = step_of(row)(student, fixed, MASK)

    def many(student):
        inner = jax.checkpoint(lambda x: row.means((x, *student[1:]), fixed, MASK)[0])
        mapped = jax.vmap(inner)(jnp.stack([student[0]] * 2))
        scanned = jax.lax.scan(lambda total, x: (total + inner(x), None), 0.0, jnp.stack([student[0]] * 2))[0]
        return (mapped.sum() + scanned) / 4

    assert_close(quick_jit(jax.value_and_grad(many))(student), (means[0], grads[0]))
