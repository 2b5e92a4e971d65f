from raft_jax.errors import require_train

require_train("flax", "optax", "orbax")
