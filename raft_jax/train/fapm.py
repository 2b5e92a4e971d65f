"""FAPM: prunes the task vector of a tuned model, so that it forgets less; nothing is trained (arXiv:2509.08255)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from raft_jax.models.xla_cpu import compiler_options
from raft_jax.train.state import is_matrix


def fapm(
    params: Mapping[str, jax.Array], base_params: Mapping[str, jax.Array], sparsity: float = 0.9
) -> dict[str, jax.Array]:
    """Resets the entries of each tuned matrix that count least for the task and most for what the base model knows.

        S = |ΔW| - mean(|W₀|) |ΔW| / |W₀|,    ΔW = W - W₀

    Of each weight matrix the entries with the highest scores S keep their tuned value; `sparsity` times the number of
    entries, rounded, go back to the base model's. Where W₀ is 0, S is -inf: such an entry goes first. Of equal scores
    the earlier entry is kept.

    Args:
      params: the tuned model's weights by name; those stacked over layers are pruned layer by layer.
      base_params: the base model's weights, with the same names and shapes.
      sparsity: share of the entries that are reset, 0 to 1; 0.9 in the paper.

    Returns:
      The pruned weights, in the dtypes of `params`. Norms and biases, which are no matrices, keep their tuned values.

    Raises:
      ValueError: names or shapes differ, or the sparsity is not in 0 to 1.

    FAPM (arXiv:2509.08255).

    Example:
      >>> base = {"up_DF": jnp.array([[1.0, 2.0], [4.0, 1.0]])}
      >>> tuned = {"up_DF": jnp.array([[1.5, 2.5], [4.5, 1.0]])}
      >>> fapm(tuned, base, sparsity=0.5)["up_DF"].tolist()  # the same change counts more at a larger weight
      [[1.0, 2.5], [4.5, 1.0]]
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity} must be between 0 and 1")
    shapes, base_shapes = ({name: x.shape for name, x in tree.items()} for tree in (params, base_params))
    if shapes != base_shapes:
        names = sorted(name for name in {*shapes, *base_shapes} if shapes.get(name) != base_shapes.get(name))
        raise ValueError(f"params and base_params must have the same names and shapes; {', '.join(names)} differ")
    prune = jax.jit(_prune, static_argnames=("sparsity", "stacked"), compiler_options=compiler_options(base_params))
    return {
        name: prune(tuned, base_params[name], sparsity, stacked=name.rpartition("_")[2].startswith("L"))
        if is_matrix(name)
        else tuned
        for name, tuned in params.items()
    }


def _prune(tuned: jax.Array, base: jax.Array, sparsity: float, stacked: bool) -> jax.Array:
    def matrix(pair):
        tuned, base = (array.reshape(-1) for array in pair)
        wide = jnp.promote_types(tuned.dtype, jnp.float32)
        change, size = jnp.abs(tuned.astype(wide) - base.astype(wide)), jnp.abs(base.astype(wide))
        ratio = jnp.where(change == 0, 0, change / size)
        scores = change - jnp.mean(size) * ratio
        num_kept = len(scores) - int(sparsity * len(scores) + 0.5)
        order = jnp.argsort(scores, descending=True, stable=True)
        kept = jnp.zeros(len(scores), bool).at[order[:num_kept]].set(True)
        return jnp.where(kept, tuned, base.astype(tuned.dtype)).reshape(pair[0].shape)

    return jax.lax.map(matrix, (tuned, base)) if stacked else matrix((tuned, base))
