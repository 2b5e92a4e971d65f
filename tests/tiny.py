"""A model, a tokenizer and a data set so small that a whole run takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from raft_jax.data.batches import pad
from raft_jax.models import Model
from raft_jax.models.config import DecoderConfig, parameter_table
from raft_jax.models.export import export_hf
from raft_jax.models.families.rope import plain_rope
from raft_jax.models.tokenizer import Tokenizer, wrap
from raft_jax.tokens import Batch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
ENCODER = Path(__file__).parent / "fixtures" / "encoder" / "tiny_bert"
ROPE_THETA = 10_000.0
TOPICS = (
    "kettle",
    "bridge",
    "lantern",
    "tenant",
    "harbour",
    "tablet",
    "ladder",
    "permit",
    "engine",
    "orchard",
    "ferry",
    "meadow",
    "quarry",
    "signal",
    "chimney",
    "cellar",
)
ROWS = [
    {
        "id": f"q{number:02d}",
        "split": "test" if number % 4 == 3 else "train",
        "question": f"What does rule {number} say of the {topic}?",
        "answer": f"Rule {number} binds each {topic}" + f", and form C-{number} is due" * (number % 2) + ".",
    }
    for number, topic in enumerate(TOPICS, start=1)
]
GENERAL = [
    {"id": "g1", "category": "sums", "prompt": "What is 2 + 2?", "check": {"kind": "number", "value": 4}},
    {"id": "g2", "category": "chat", "prompt": "Tell me of the sea.", "check": None},
    {"id": "g3", "category": "words", "prompt": "Say yes.", "check": {"kind": "contains_any", "value": ["yes"]}},
]


# What the vocabulary is made from besides ROWS. Not the prompts themselves: another wording would make another model.
WORDS = (
    "This text answers the question: \n\nRewrite the following text in clear, complete sentences. Keep every fact, "
    "number and name.\n\n",
    "These texts answer the question: \n\nText 1: \n\nText 2: \n\nMerge the two texts into one, in clear, complete "
    "sentences. Keep every fact, number and name of text 1. Write the merged text only.",
    "Background reference knowledge:\n\n\nAnswer the following question, using the background knowledge where it helps."
    "\n",
)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE in which most words of the prompts are single tokens, and a ChatML template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = list(WORDS)
    texts += [row[key] for row in ROWS for key in ("question", "answer")]
    texts += ["user", "assistant"]
    backend.train_from_iterator(
        texts * 2,
        trainers.BpeTrainer(
            vocab_size=1000,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return wrapped(backend)


def wrapped(backend: Backend, **settings) -> Tokenizer:
    """A tokenizer with the settings that make_tokenizer's has, but for those given."""
    usual = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    return Tokenizer(wrap(backend, **usual | settings), "here")


def make_config(vocab_size: int, **changes) -> DecoderConfig:
    sizes = dict(num_layers=2, width=32, num_heads=4, num_kv_heads=2, head_width=8, ffn_width=48, max_positions=512)
    ropes = (plain_rope(ROPE_THETA, changes.get("head_width", sizes["head_width"])),)
    return DecoderConfig(family="llama", vocab_size=vocab_size, **{"ropes": ropes, **sizes, **changes})


def random_parameters(config: DecoderConfig, seed: int) -> dict[str, np.ndarray]:
    """Normal weights, norms near one; made by NumPy, which compiles nothing."""
    random = np.random.default_rng(seed)
    return {
        name: np.asarray(random.normal(0 if info.fan_in else 1, (info.fan_in or 100) ** -0.5, info.shape), np.float32)
        for name, info in parameter_table(config).items()
    }


def make_model(seed: int = 0) -> Model:
    """A random model of two layers that ends its turn after some ten tokens."""
    tokenizer = make_tokenizer()
    config = make_config(tokenizer.vocab_size)
    params = random_parameters(config, seed)
    # All hidden states share one direction, and nothing but the end of the turn looks at it.
    params["embedding_VD"][:, 0] += 6
    params["unembedding_DV"] *= 2
    params["unembedding_DV"][0] = 0
    params["unembedding_DV"][0, tokenizer.id_of("<|im_end|>")] = 1.25
    params = {name: jnp.asarray(array) for name, array in params.items()}
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": False,
    }
    return Model(config, params, tokenizer, hf_config)


# The model of numpy_reference.py in JAX, for whatever takes any model at all.


def toy_parameters(seed: int, vocabulary: int = 24, width: int = 12) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {
        "embedding_VD": (vocabulary, width),
        "mixer_DD": (width, width),
        "scale_D": (width,),
        "unembedding_DV": (width, vocabulary),
    }
    return {name: random.normal(size=shape) for name, shape in shapes.items()}


def toy_hidden(params, tokens):
    mask_BT1 = tokens.mask[..., None].astype(params["scale_D"].dtype)
    embedded_BTD = params["embedding_VD"][tokens.ids] * mask_BT1
    mean_BTD = jnp.cumsum(embedded_BTD, axis=1) / jnp.maximum(jnp.cumsum(mask_BT1, axis=1), 1)
    return jnp.tanh(mean_BTD @ params["mixer_DD"]) * params["scale_D"]


def toy_unembedding(params):
    return params["unembedding_DV"]


def random_rows(seed, rollout_lengths=(5, 1, 0, 3), vocabulary=24):
    """Four ragged rows and their rollouts; one rollout is empty."""
    random = np.random.default_rng(seed)

    def ids(length):
        return random.integers(0, vocabulary, length).tolist()

    rows = [
        {"prompt": ids(random.integers(1, 6)), "answer": ids(random.integers(1, 7)), "teacher_prompt": ids(8)}
        for _ in rollout_lengths
    ]
    return rows, [ids(length) for length in rollout_lengths]


def padded(rows, rollouts):
    """Rows as the train step takes them; padding is a token that occurs, and must not matter."""
    return Batch(
        pad([row["prompt"] for row in rows], 7, 3, left=True),
        pad([row["answer"] for row in rows], 8, 5, left=False),
        pad([row["teacher_prompt"] for row in rows], 9, 7, left=True),
        np.arange(len(rows), dtype=np.int32),
        pad(rollouts, 6, 2, left=False),
    )


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_run(folder: Path, **changes) -> Path:
    """A folder with model, data and general prompts, and a config.yaml for a run of seconds over them.

    `changes` replace whole keys of the config's sections, as in `train={"max_steps": 2}`.
    """
    import yaml

    model = make_model()
    export_hf(model, model.params, folder / "model", dtype=jnp.float32)
    write_jsonl(folder / "data.jsonl", ROWS)
    write_jsonl(folder / "general.jsonl", GENERAL)
    config = {
        "run_dir": str(folder / "run"),
        "methods": ["raft"],
        "model": {"source": str(folder / "model")},
        "encoder": {"source": str(ENCODER)},
        "data": {"path": str(folder / "data.jsonl"), "max_question_tokens": 64, "max_answer_tokens": 64},
        # What a random model writes keeps no facts, and only another such text finds it likely.
        "refine": {
            "threshold": 0.5,
            "rounds": 2,
            "accept": 0.8,
            "max_new_tokens": 16,
            "batch_size": 4,
            "temperature": 1.0,
            "check_facts": False,
            "judges": ["likelihood"],
            "accept_floor": 0.0,
        },
        "train": {
            "batch_size": 4,
            "epochs": 2.0,
            "learning_rate": 1e-3,
            "top_k": 16,
            "checkpoint_every": 2,
            "rollout": {"max_new_tokens": 8},
        },
        "evaluate": {
            "general_path": str(folder / "general.jsonl"),
            "max_new_tokens": 8,
            "general_new_tokens": 6,
            "batch_size": 4,
        },
        "mesh": {"data": 1},
        "export": {"dtype": "float32"},
    }
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return path
