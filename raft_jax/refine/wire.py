"""Reads what a server with OpenAI's chat completions sends back."""

from __future__ import annotations

from typing import Any

from raft_jax.files import parse_json
from raft_jax.refine.chat import Reply, without_thoughts
from raft_jax.terminal import one_line


class Unreadable(ValueError):
    """A body that is no chat completion; says why."""


def read_reply(content: bytes) -> Reply:
    """The reply in the body of a response.

    Raises:
      Unreadable: it is not JSON, not UTF-8, has no choice with a message, or reports an error.

    Example:
      >>> read_reply(b'{"choices": [{"message": {"content": "Yes."}, "finish_reason": "length"}]}').status
      'truncated'
    """
    try:
        body = parse_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unreadable("not UTF-8") from error
    except ValueError as error:
        raise Unreadable(f"not JSON ({error})" if content else "nothing in it") from error
    body = body if isinstance(body, dict) else {}
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        complaint = complaint_of(content)
        raise Unreadable(complaint or "no choices[0].message in it")
    finish = choice.get("finish_reason")
    if not (finish is None or isinstance(finish, str)) or finish == "error":
        raise Unreadable(f"finish_reason {one_line(finish, 40)!r}")
    text, status, note = _answer(message, finish)
    usage = body.get("usage")
    return Reply(
        text,
        status,
        note,
        prompt_tokens=_count(usage, "prompt_tokens"),
        num_tokens=_count(usage, "completion_tokens"),
        finish=one_line(finish or "", 40),
    )


def _answer(message: dict[str, Any], finish: str | None) -> tuple[str, str, str]:
    """Text, status and note of a message."""
    content = message.get("content")
    if isinstance(content, list):  # parts, as some servers send them
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if content is not None and not isinstance(content, str):
        raise Unreadable("message.content is not text")
    try:
        (content or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unreadable("half a character in its text") from error
    text = without_thoughts(content or "")
    if finish == "length":
        return text or "", "truncated", "cut at the limit of length (finish_reason length)"
    if finish == "content_filter" or isinstance(message.get("refusal"), str):
        return text or "", "refusal", f"refused by the server ({finish or 'refusal'})"
    if text is None:
        return "", "truncated", "it ends in the middle of its thoughts"
    return (text, "ok", "") if text else ("", "empty", "no text in the reply")


def complaint_of(content: bytes) -> str:
    """The message of an error's body, such as {"error": {"message": …}}; "" if it is in no form that is known.

    Example:
      >>> complaint_of(b'{"error": {"message": "no such model"}}'), complaint_of(b"<html><h1>Bad Gateway</h1>")
      ('no such model', '')
    """
    try:
        body = parse_json(content.decode("utf-8", "replace"))
    except ValueError:
        return ""
    error = body.get("error", body) if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return one_line(message, 160) if isinstance(message, str) else ""


def _count(usage: object, key: str) -> int:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
