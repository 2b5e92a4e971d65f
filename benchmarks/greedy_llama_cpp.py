"""Greedy text of a real GGUF model, ours against llama.cpp's: python benchmarks/greedy_llama_cpp.py MODEL.gguf

Of an exported folder: python convert_hf_to_gguf.py FOLDER --outfile OUT.gguf (llama.cpp's own script), then
python benchmarks/greedy_llama_cpp.py FOLDER --gguf OUT.gguf.

Needs xllamacpp. llama.cpp answers each prompt; at every token of its answers it is asked how far that token lies below
our most likely one. llama.cpp rounds activations to 8 bits where weights are quantised, so near ties may fall the other
way; any other difference ends the script with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.data.batches import pad
from raft_jax.models import load_pretrained
from raft_jax.sampling import Sampler

QUESTIONS = (
    "List three fruits, one per line.",
    "Who wrote Romeo and Juliet?",
    "What is 12 times 3?",
    "Write a Python function that reverses a string.",
    "What is the capital of France?",
    "Name the four seasons.",
    "Explain in one sentence what a lighthouse is for.",
    "Translate 'good morning' into Spanish.",
    "What colour is the sky on a clear day?",
    "How many minutes are there in two hours?",
    "Write an SQL query that counts the rows of a table named users.",
    "What does HTTP stand for?",
)
NEAR_TIE = 0.5  # of the logits, nats


def llama_cpp_answers(path: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """llama.cpp's greedy continuation of each prompt, as ids."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx = path, 1024
    server = xllamacpp.Server(params)

    def answer(prompt: list[int]) -> list[int]:
        body = {
            "prompt": prompt,
            "n_predict": num_tokens,
            "temperature": 0.0,
            "return_tokens": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["tokens"]

    return [answer(prompt) for prompt in prompts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gguf", help="what llama.cpp runs, such as an exported folder converted; default: the model")
    parser.add_argument("--own", action="store_true", help="show our own greedy answers, too")
    args = parser.parse_args()
    began = time.perf_counter()
    model = load_pretrained(args.model, dtype=jnp.dtype(args.dtype))
    print(f"loaded in {time.perf_counter() - began:.0f} s")
    tokenizer = model.tokenizer
    prompts = [tokenizer.chat_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    theirs = llama_cpp_answers(os.fspath(args.gguf or args.model), prompts, args.tokens)
    rows = [prompt + answer for prompt, answer in zip(prompts, theirs, strict=True)]
    tokens_BT, mask_BT = pad(rows, max(map(len, rows)), tokenizer.pad_id, left=False)
    hidden_BTD = jax.jit(model.hidden)(model.params, tokens_BT, None, mask_BT)
    logits = jax.jit(model.logits)
    exact, close, wrong = 0, 0, 0
    for row, (question, prompt, answer) in enumerate(zip(QUESTIONS, prompts, theirs, strict=True)):
        places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logits_TV = np.asarray(logits(hidden_BTD[row, places], model.unembedding(model.params)))
        below = logits_TV.max(-1) - logits_TV[np.arange(len(answer)), answer]
        exact, close = exact + int((below == 0).sum()), close + int(((below > 0) & (below < NEAR_TIE)).sum())
        wrong += int((below >= NEAR_TIE).sum())
        print(
            f"{question} -> {tokenizer.decode(answer)!r}; {(below == 0).sum()} of {len(answer)} tokens are ours, "
            f"largest distance {below.max():.3f}"
        )
    if args.own:
        found = Sampler(model, batch_size=len(prompts)).generate(
            model.params, prompts, key=jax.random.key(0), temperature=0.0, max_new_tokens=args.tokens
        )
        for question, completion, answer in zip(QUESTIONS, found, theirs, strict=True):
            same = int(np.cumprod([a == b for a, b in zip(completion.tokens, answer, strict=False)]).sum())
            print(f"ours: {question} -> {tokenizer.decode(completion.tokens)!r}; the first {same} tokens are the same")
    print(f"{exact} tokens are ours, {close} are near ties, {wrong} are neither")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
