"""The losses, for this project and for any other JAX code: `from raft_jax.losses import ...`.

Letters, used in every name, suffix and einsum string:

    B batch        T time         D model width    V vocabulary    K tokens kept by the truncation
    S cache length N query heads  H head width     F feed-forward  L layers

Every loss returns unreduced nats of shape [B, T]; `sequence_mean` and `token_mean` reduce them.
The student comes before the teacher in every signature, and the teacher never carries a gradient.
Only jax is imported.
"""

from raft_jax.losses.balance import BalanceState, init_balance, update_balance
from raft_jax.losses.divergences import forward_kl, jensen_shannon, reverse_kl
from raft_jax.losses.head import Tied
from raft_jax.losses.linear import linear_cross_entropy, linear_top_k, linear_top_k_forward_kl
from raft_jax.losses.linear_divergences import linear_forward_kl, linear_jensen_shannon, linear_reverse_kl
from raft_jax.losses.linear_raft import linear_raft_losses
from raft_jax.losses.objective import raft_objective
from raft_jax.losses.reduce import sequence_mean, sequence_weight, token_mean, token_weight
from raft_jax.losses.tokens import cross_entropy, top_k_forward_kl
from raft_jax.losses.truncation import TopK, top_k

__all__ = [
    "BalanceState",
    "Tied",
    "TopK",
    "cross_entropy",
    "forward_kl",
    "init_balance",
    "jensen_shannon",
    "linear_cross_entropy",
    "linear_forward_kl",
    "linear_jensen_shannon",
    "linear_raft_losses",
    "linear_reverse_kl",
    "linear_top_k",
    "linear_top_k_forward_kl",
    "raft_objective",
    "reverse_kl",
    "sequence_mean",
    "sequence_weight",
    "token_mean",
    "token_weight",
    "top_k",
    "top_k_forward_kl",
    "update_balance",
]
