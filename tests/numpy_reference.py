"""The whole RAFT train step a second time: NumPy, float64, row by row, no padding, gradients by hand.

It is written from the paper's equations and shares nothing with raft_jax. The model is any map from a prefix to
logits; here the logits at step t are U' h_t with h_t = s * tanh(W' c_t), c_t the mean of the embeddings up to t.
"""

from __future__ import annotations

import numpy as np


def forward(params, tokens):
    """Logits [T, V] of one sequence, and what the backward pass needs."""
    mean_TD = np.cumsum(params["embedding_VD"][tokens], axis=0) / np.arange(1, len(tokens) + 1)[:, None]
    tanh_TD = np.tanh(mean_TD @ params["mixer_DD"])
    hidden_TD = tanh_TD * params["scale_D"]
    return hidden_TD @ params["unembedding_DV"], (mean_TD, tanh_TD, hidden_TD)


def backward(params, tokens, saved, slope_TV):
    """Gradient of the parameters from that of the logits."""
    mean_TD, tanh_TD, hidden_TD = saved
    hidden_slope_TD = slope_TV @ params["unembedding_DV"].T
    inner_TD = hidden_slope_TD * params["scale_D"] * (1 - tanh_TD**2)
    mean_slope_TD = inner_TD @ params["mixer_DD"].T / np.arange(1, len(tokens) + 1)[:, None]
    embedding_VD = np.zeros_like(params["embedding_VD"])
    np.add.at(embedding_VD, tokens, np.cumsum(mean_slope_TD[::-1], axis=0)[::-1])
    return {
        "embedding_VD": embedding_VD,
        "mixer_DD": mean_TD.T @ inner_TD,
        "scale_D": np.sum(hidden_slope_TD * tanh_TD, axis=0),
        "unembedding_DV": hidden_TD.T @ slope_TV,
    }


def softmax(logits):
    weight = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return weight / np.sum(weight, axis=-1, keepdims=True)


def sft_loss(params, row):
    """Eq. 5 for one row: mean cross entropy of the answer's tokens, and its gradient."""
    tokens, answer = np.array([*row["prompt"], *row["answer"]]), np.array(row["answer"])
    logits_TV, saved = forward(params, tokens)
    places = np.arange(len(row["prompt"]) - 1, len(tokens) - 1)  # token t is predicted at t - 1
    probs_AV = softmax(logits_TV[places])
    slope_TV = np.zeros_like(logits_TV)
    slope_TV[places] = (probs_AV - np.eye(probs_AV.shape[1])[answer]) / len(answer)
    return -np.mean(np.log(probs_AV[np.arange(len(answer)), answer])), backward(params, tokens, saved, slope_TV)


def dft_loss(params, row):
    """DFT for one row: each token's cross entropy times its probability, which is a constant to the gradient."""
    tokens, answer = np.array([*row["prompt"], *row["answer"]]), np.array(row["answer"])
    logits_TV, saved = forward(params, tokens)
    places = np.arange(len(row["prompt"]) - 1, len(tokens) - 1)
    probs_AV = softmax(logits_TV[places])
    chosen_A = probs_AV[np.arange(len(answer)), answer]
    slope_TV = np.zeros_like(logits_TV)
    slope_TV[places] = chosen_A[:, None] * (probs_AV - np.eye(probs_AV.shape[1])[answer]) / len(answer)
    return np.mean(chosen_A * -np.log(chosen_A)), backward(params, tokens, saved, slope_TV)


def anchor_loss(params, base, row):
    """For one row: mean over the answer's tokens of KL(base || student), both given the question."""
    tokens = np.array([*row["prompt"], *row["answer"]])
    logits_TV, saved = forward(params, tokens)
    places = np.arange(len(row["prompt"]) - 1, len(tokens) - 1)
    p_AV, q_AV = softmax(logits_TV[places]), softmax(forward(base, tokens)[0][places])
    slope_TV = np.zeros_like(logits_TV)
    slope_TV[places] = (p_AV - q_AV) / len(places)
    return np.mean(np.sum(q_AV * np.log(q_AV / p_AV), axis=-1)), backward(params, tokens, saved, slope_TV)


def kl_loss(params, teacher, row, rollout, top_k, temperature, reverse=False):
    """Eqs. 7-10 for one row: the teacher has read the answer, and both see the same prefix of the rollout.

    Without top_k over the whole vocabulary; `reverse` is KL(student || teacher).
    """
    if not rollout:
        return 0.0, {name: np.zeros_like(value) for name, value in params.items()}
    tokens, told = np.array([*row["prompt"], *rollout]), np.array([*row["teacher_prompt"], *rollout])
    logits_TV, saved = forward(params, tokens)
    places = np.arange(len(row["prompt"]) - 1, len(tokens) - 1)
    teacher_CV = forward(teacher, told)[0][len(row["teacher_prompt"]) - 1 : -1]
    total, slope_TV = 0.0, np.zeros_like(logits_TV)
    for place, u_V in zip(places, teacher_CV, strict=True):
        kept = np.argsort(-softmax(u_V / temperature), kind="stable")[:top_k]
        q, p = softmax(u_V / temperature)[kept], softmax(logits_TV[place] / temperature)[kept]
        q, p = q / np.sum(q), p / np.sum(p)
        if reverse:
            divergence = np.sum(p * np.log(p / q))
            total += temperature**2 * divergence / len(rollout)
            slope_TV[place, kept] = temperature * p * (np.log(p / q) - divergence) / len(rollout)
            continue
        total += temperature**2 * np.sum(q * np.log(q / p)) / len(rollout)
        slope_TV[place, kept] = temperature * (p - q) / len(rollout)
    return total, backward(params, tokens, saved, slope_TV)


def train_step(
    state,
    teacher,
    rows,
    rollouts,
    *,
    top_k,
    temperature,
    ema_decay,
    learning_rate,
    weight_decay,
    epsilon=1e-8,
    b1=0.9,
    b2=0.999,
    adam_epsilon=1e-8,
    fixed_weight=None,
    reverse=False,
):
    """Eqs. 5-12 and one step of AdamW: the next state, and the numbers of the step."""
    params, step = state["params"], state["step"] + 1
    sft = [sft_loss(params, row) for row in rows]
    kl = [kl_loss(params, teacher, row, z, top_k, temperature, reverse) for row, z in zip(rows, rollouts, strict=True)]
    sft_value, kl_value = np.mean([loss for loss, _ in sft]), np.mean([loss for loss, _ in kl])
    averages = {  # Eq. 11
        "sft": ema_decay * state["averages"]["sft"] + (1 - ema_decay) * sft_value,
        "kl": ema_decay * state["averages"]["kl"] + (1 - ema_decay) * kl_value,
    }
    unbiased = {name: value / (1 - ema_decay**step) for name, value in averages.items()}
    weight = unbiased["sft"] / (unbiased["kl"] + epsilon) if fixed_weight is None else fixed_weight  # Eq. 12
    grads = {
        name: np.mean([a[name] + weight * b[name] for (_, a), (_, b) in zip(sft, kl, strict=True)], axis=0)
        for name in params
    }
    next_state = updated_state(state, grads, learning_rate, weight_decay, b1, b2, adam_epsilon)
    return next_state | {"averages": averages}, {
        "loss": sft_value + weight * kl_value,
        "sft_loss": sft_value,
        "kl_loss": kl_value,
        "weight": weight,
        "sft_average": unbiased["sft"],
        "kl_average": unbiased["kl"],
        "gradient_norm": norm(grads),
    }


def anchored_step(state, base, rows, *, first_term, anchor_weight, learning_rate, weight_decay):
    """One step of SFT (or DFT) with a KL to the base model: the next state, and the numbers of the step."""
    params = state["params"]
    likelihood = [{"sft": sft_loss, "dft": dft_loss}[first_term](params, row) for row in rows]
    anchor = [anchor_loss(params, base, row) for row in rows]
    grads = {
        name: np.mean([a[name] + anchor_weight * b[name] for (_, a), (_, b) in zip(likelihood, anchor, strict=True)], 0)
        for name in params
    }
    values = [np.mean([loss for loss, _ in losses]) for losses in (likelihood, anchor)]
    return updated_state(state, grads, learning_rate, weight_decay), {
        "loss": values[0] + anchor_weight * values[1],
        f"{first_term}_loss": values[0],
        "anchor_loss": values[1],
        "gradient_norm": norm(grads),
    }


def norm(grads):
    return np.sqrt(sum(np.sum(grad**2) for grad in grads.values()))


def updated_state(state, grads, learning_rate, weight_decay, b1=0.9, b2=0.999, adam_epsilon=1e-8):
    """One step of AdamW."""
    params, step = state["params"], state["step"] + 1
    first = {name: b1 * state["first"][name] + (1 - b1) * grads[name] for name in params}
    second = {name: b2 * state["second"][name] + (1 - b2) * grads[name] ** 2 for name in params}

    def updated(name):
        move = first[name] / (1 - b1**step) / (np.sqrt(second[name] / (1 - b2**step)) + adam_epsilon)
        decay = weight_decay * params[name] if params[name].ndim > 1 else 0
        return params[name] - learning_rate * (move + decay)

    params = {name: updated(name) for name in params}
    return {**state, "params": params, "first": first, "second": second, "step": step}


def fapm(tuned, base, sparsity):
    """FAPM for one matrix: the entries of the task vector with the lowest scores go back to the base model's."""
    mean = np.mean(np.abs(base))

    def scored(t, b):
        if b == 0:
            return 0.0 if t == 0 else -np.inf
        return abs(t - b) - mean * abs(t - b) / abs(b)

    score = [scored(t, b) for t, b in zip(tuned.flat, base.flat, strict=True)]
    num_kept = base.size - int(np.floor(sparsity * base.size + 0.5))
    kept = sorted(range(base.size), key=lambda place: -score[place])[:num_kept]
    pruned = base.copy()
    for place in kept:
        pruned.flat[place] = tuned.flat[place]
    return pruned


def first_state(params):
    zeros = {name: np.zeros_like(value) for name, value in params.items()}
    return {"params": params, "first": zeros, "second": zeros, "averages": {"sft": 0.0, "kl": 0.0}, "step": 0}
