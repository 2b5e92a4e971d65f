"""The losses, for this project and for any other JAX code: `from raft_jax.losses import ...`.

Letters, used in every name, suffix and einsum string:

    B batch      T time                 D model width                 V vocabulary    K tokens kept by the truncation
    A answer     N tokens of a chunk    M columns of the vocabulary

Every loss returns unreduced values of shape [B, T] in nats; `sequence_mean` and `token_mean` reduce them. The student
comes before the teacher in every signature, and no gradient flows to the teacher. Only jax is imported.

Where to start reading: reference.py defines every loss in plain `jax.numpy`; pointwise.py has the value and the
derivative of each loss at one token; logits.py and linear.py are the public functions; linear.py is built on
chunked.py, which never holds [B, T, V].
"""

from raft_jax.losses.balance import BalanceState, init_balance, raft_objective, update_balance
from raft_jax.losses.linear import (
    linear_cross_entropy,
    linear_forward_kl,
    linear_jensen_shannon,
    linear_raft_losses,
    linear_reverse_kl,
    linear_top_k,
    linear_top_k_forward_kl,
)
from raft_jax.losses.lm_head import TiedEmbedding
from raft_jax.losses.logits import cross_entropy, forward_kl, jensen_shannon, reverse_kl, top_k_forward_kl
from raft_jax.losses.reduce import sequence_mean, sequence_weight, token_mean, token_weight
from raft_jax.losses.truncation import TopK, top_k

Tied = TiedEmbedding  # the former name

__all__ = [
    "BalanceState",
    "Tied",
    "TiedEmbedding",
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
