"""The losses again in float64 NumPy, written from the formulas, one token at a time; gradients by differences."""

import numpy as np


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(probs):
    return -sum(p * np.log(p) for p in probs if p > 0)


def kl(p, q):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def over_tokens(function):
    """A function of one token's arrays, over [B, T]."""

    def many(*arrays, **settings):
        arrays = [np.asarray(x, np.float64) if np.asarray(x).dtype.kind == "f" else np.asarray(x) for x in arrays]
        batch, time = arrays[0].shape[:2]
        return np.array([[function(*(x[b, t] for x in arrays), **settings) for t in range(time)] for b in range(batch)])

    return many


@over_tokens
def cross_entropy(logits, label, vocab_size=None):
    return -np.log(softmax(logits[:vocab_size])[label])


def keep(teacher, k):
    """Indices of the k largest."""
    return sorted(range(len(teacher)), key=lambda a: -teacher[a])[:k]


@over_tokens
def top_k_forward_kl(student, teacher, k=512, temperature=1.5, vocab_size=None):
    student, teacher = student[:vocab_size] / temperature, teacher[:vocab_size] / temperature
    kept = keep(teacher, k)
    return temperature**2 * kl(softmax(teacher[kept]), softmax(student[kept]))


@over_tokens
def forward_kl(student, teacher, temperature=1.5, vocab_size=None):
    p, q = softmax(student[:vocab_size] / temperature), softmax(teacher[:vocab_size] / temperature)
    return temperature**2 * kl(q, p)


@over_tokens
def reverse_kl(student, teacher, temperature=1.5, vocab_size=None):
    p, q = softmax(student[:vocab_size] / temperature), softmax(teacher[:vocab_size] / temperature)
    return temperature**2 * kl(p, q)


@over_tokens
def jensen_shannon(student, teacher, beta=0.5, temperature=1.5, vocab_size=None):
    p, q = softmax(student[:vocab_size] / temperature), softmax(teacher[:vocab_size] / temperature)
    m = beta * q + (1 - beta) * p
    return temperature**2 * (beta * kl(q, m) + (1 - beta) * kl(p, m))


def metrics(student_BTV, teacher_BTV, k, temperature):
    values = {"teacher_mass": [], "student_mass": [], "teacher_entropy": [], "student_entropy": [], "agreement": []}
    for student, teacher in zip(
        student_BTV.reshape(-1, student_BTV.shape[-1]), teacher_BTV.reshape(-1, teacher_BTV.shape[-1]), strict=True
    ):
        p, q = softmax(np.float64(student) / temperature), softmax(np.float64(teacher) / temperature)
        kept = keep(teacher, k)
        values["teacher_mass"].append(q[kept].sum())
        values["student_mass"].append(p[kept].sum())
        values["teacher_entropy"].append(entropy(q))
        values["student_entropy"].append(entropy(p))
        values["agreement"].append(float(p.argmax() == q.argmax()))
    return {name: np.reshape(x, student_BTV.shape[:2]) for name, x in values.items()}


def logits(hidden, unembedding, bias=None, scale=1.0, softcap=None):
    values = scale * (
        np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64)
        + (0 if bias is None else np.asarray(bias, np.float64))
    )
    return values if softcap is None else softcap * np.tanh(values / softcap)


def gradient(function, x, step=1e-6):
    """Central differences of a scalar function of one float64 array."""
    slope = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        slope[place] = (function(up) - function(down)) / (2 * step)
    return slope
