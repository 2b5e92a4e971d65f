"""The settings of a model on a server. No jax here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from raft_jax.errors import require


class _NotShown:
    """A value that is not repeated in an error, as it may hold a secret."""

    def __repr__(self) -> str:
        return "not shown here, as it may hold a secret"


@dataclass(frozen=True)
class EndpointConfig:
    """A model on a server with OpenAI's chat completions; `refine.rewriter`, `.fuser` and `.judges` name it.

    NAME is of your choice, as in `endpoints.strong.model=Qwen3-32B refine.fuser=strong`. Results depend on `model`,
    `temperature`, `max_tokens` and `extra_body`; the other keys may change without anything being asked again.
    """

    base_url: str = "???"  # such as http://127.0.0.1:8000/v1; /chat/completions is added
    model: str = "???"  # the server's name for the model
    api_key_env: str | None = None  # name of the environment variable that holds the key; null: no key is sent
    temperature: float | None = None  # null: refine.temperature for texts, 0 for judges
    max_tokens: int = 4096  # of a reply, what a model thinks included; a longer one is cut and not used
    concurrency: int = 16  # requests in flight at most; fewer while the server answers 429
    timeout: float = 300.0  # seconds that one request may take
    extra_body: dict[str, Any] = field(default_factory=dict)  # more keys of each request; null leaves one of ours out
    price_in: float | None = None  # of a million tokens of prompt, in any currency
    price_out: float | None = None  # of a million tokens of reply

    def require_valid(self, key: str) -> None:
        """Raises InputError, naming the setting below `key`, if one has a value that is not allowed."""
        hidden: Any = _NotShown()
        address = r"https?://[^\s/?#@]+(/[^\s?#@]*)?"
        allowed = "http:// or https://, a host and a path, without a name, a password or a query"
        shown = hidden if re.search(r"[@?#]", self.base_url) else self.base_url
        require(re.fullmatch(address, self.base_url) is not None, f"{key}.base_url", shown, allowed)
        require(bool(self.model.strip()), f"{key}.model", self.model, "the server's name for the model")
        name = self.api_key_env is None or re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env) is not None
        allowed = "the name of an environment variable in capitals, such as OPENAI_API_KEY, never the key itself"
        require(name, f"{key}.api_key_env", hidden, allowed)
        good = self.temperature is None or self.temperature >= 0
        require(good, f"{key}.temperature", self.temperature, "0 or more, or null")
        for name in ("max_tokens", "concurrency"):
            require(getattr(self, name) >= 1, f"{key}.{name}", getattr(self, name), "1 or more")
        require(self.timeout > 0, f"{key}.timeout", self.timeout, "above 0")
        for name in ("price_in", "price_out"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{key}.{name}", value, "0 or more, or null")
