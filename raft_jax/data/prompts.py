"""The three prompts of the method, as conversations: rewriting, fusion, and what the teacher sees."""

from __future__ import annotations

Conversation = list[dict[str, str]]


def question_prompt(question: str, context: str = "") -> Conversation:
    """What the student sees: the question, after its context where it has one."""
    return _ask(f"{context}\n\n{question}" if context else question)


def rewrite_prompt(question: str, answer: str) -> Conversation:
    """The model answers again with the gold answer before it, in its own words (Eq. 1)."""
    return _ask(
        f"Question: {question}\n\nReference answer: {answer}\n\n"
        "Answer the question in your own words. Keep every fact, number and name of the reference answer, "
        "and add nothing to it. Write the answer only."
    )


def fusion_prompt(question: str, answer: str, rewrite: str) -> Conversation:
    """Merges the gold answer and the rewriting into one (Eq. 4)."""
    return _ask(
        f"Question: {question}\n\nAnswer A (correct): {answer}\n\nAnswer B (well written): {rewrite}\n\n"
        "Write one answer to the question that has every fact, number and name of answer A and the style of "
        "answer B. Write the answer only."
    )


def teacher_prompt(question: str, answer: str, context: str = "") -> Conversation:
    """What the teacher sees (Eq. 7, App. H): background knowledge, then the question to be answered from it."""
    question = f"{context}\n\n{question}" if context else question
    return _ask(
        f"Background reference knowledge:\n{answer}\n\n"
        f"Answer the following question, using the background knowledge where it helps.\n{question}"
    )


def _ask(text: str) -> Conversation:
    return [{"role": "user", "content": text}]
