"""Refuses quantised weights, which config.json or the names and dtypes of the tensors reveal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from raft_jax.errors import InputError

CONFIG_KEYS = {  # keys of config.json: the method if the value does not name one
    "quantization_config": "an unnamed method",
    "quantization": "MLX",
    "compression_config": "compressed-tensors",
}
# Parts of tensor names that only occur with a method; the error names the first method that matches.
NAME_PARTS = {
    "GPTQ": (".g_idx",),
    "AWQ": (".qweight",),
    "bitsandbytes, 4 bits": (".absmax", ".quant_map", ".quant_state"),
    "bitsandbytes, 8 bits": (".SCB",),
    "MLX": (".biases",),
    "EXL2": (".q_weight",),
    "EXL3": (".trellis",),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks",),
    "VPTQ": (".centroids",),
    "QuIP#": (".Qidxs",),
    "compressed-tensors": (".weight_packed", ".weight_zero_point"),
    "EETQ": (".weight_scales",),
    "MXFP4": ("_blocks",),
    "NVFP4": (".weight_scale_2",),
    "quanto": ("._data", "._qdata"),
    "FP8": (".weight_scale", ".input_scale", ".act_scale"),
    "an unknown method": (".scales", ".qzeros"),
}
FLOATS = ("F64", "F32", "F16", "BF16")


def refuse_config(hf: Mapping[str, Any]) -> None:
    """Raises InputError if config.json says that the weights are quantised."""
    for key, method in CONFIG_KEYS.items():
        if not (value := hf.get(key)):
            continue
        if isinstance(value, Mapping) and isinstance(value.get("quant_method"), str):
            method = value["quant_method"]
        raise InputError(
            f"config.json: quantised weights ({method}, key {key}) cannot be trained; use the unquantised model"
        )


def refuse_names(keys: Iterable[str], place) -> None:
    """Raises InputError if there are tensors that only quantised weights have."""
    keys = sorted(keys)
    for method, parts in NAME_PARTS.items():
        if key := next((key for key in keys if any(part in key for part in parts)), None):
            raise InputError(
                f"{place}: quantised weights ({method}: there is {key}) cannot be trained; use the unquantised model"
            )


def refuse_dtype(key: str, dtype: str, file) -> None:
    """Raises InputError unless a tensor's dtype, as safetensors names it, is one of unquantised weights."""
    if dtype in FLOATS:
        return
    if dtype.startswith("F"):  # F8_E4M3, F4, ...
        raise InputError(
            f"{file}: quantised weights ({'FP' + dtype[1:]}: {key}) cannot be trained; use the unquantised model"
        )
    raise InputError(
        f"{file}: {key} holds {dtype}; expected F32, F16 or BF16. Whole numbers are quantised weights; "
        "use the unquantised model"
    )
