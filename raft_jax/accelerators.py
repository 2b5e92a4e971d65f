"""TPUs and NVIDIA's GPUs, at their makers' figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One JAX device.

    Attributes:
      flops: dense bfloat16 operations per second (float16 where there is no bfloat16).
      bandwidth: bytes per second from its memory.
      memory: bytes.
      link: bytes per second that it sends to the devices beside it, nine tenths of the maker's figure: of a TPU in a
        corner of a slice without wrap-around links (two of a v5e's and a v6e's links, three of the others'), of a GPU
        over NVLink, or PCIe where it has none.
      clock: Hz, for the TPU compiler's estimates of cycles; None where not known.
      devices: JAX devices of one chip.
    """

    flops: float
    bandwidth: float
    memory: float
    link: float
    clock: float | None = None
    devices: int = 1


# By the beginning of the kind of device that JAX names.
ACCELERATORS = {
    "TPU v4": Accelerator(275e12, 1.2e12, 32e9, 135e9),
    "TPU v5 lite": Accelerator(197e12, 0.82e12, 16e9, 90e9, 1.5e9),
    "TPU v5p": Accelerator(459e12, 2.8e12, 95e9, 270e9),
    "TPU v5": Accelerator(459e12, 2.8e12, 95e9, 270e9),
    "TPU v6 lite": Accelerator(918e12, 1.6e12, 32e9, 180e9),
    "TPU7x": Accelerator(1153.5e12, 3.7e12, 96e9, 135e9, devices=2),
    "Tesla T4": Accelerator(65e12, 0.32e12, 16e9, 14e9),
    "NVIDIA L4": Accelerator(121e12, 0.3e12, 24e9, 28e9),
    "NVIDIA GeForce RTX 4090": Accelerator(165e12, 1.0e12, 25e9, 28e9),
    "NVIDIA A100-SXM4-40GB": Accelerator(312e12, 1.55e12, 42e9, 270e9),
    "NVIDIA A100-SXM4-80GB": Accelerator(312e12, 2.04e12, 85e9, 270e9),
    "NVIDIA A100": Accelerator(312e12, 1.55e12, 42e9, 28e9),
    "NVIDIA H100": Accelerator(989e12, 3.35e12, 85e9, 405e9),
    "NVIDIA H200": Accelerator(989e12, 4.8e12, 151e9, 405e9),
    "NVIDIA B200": Accelerator(2250e12, 7.7e12, 191e9, 810e9),
}


def find_accelerator(kind: str) -> tuple[str, Accelerator] | None:
    """The name in `ACCELERATORS` and the figures of a kind of device; None if it is not known.

    Example:
      >>> find_accelerator("NVIDIA H100 80GB HBM3")[0]
      'NVIDIA H100'
    """
    name = max((name for name in ACCELERATORS if kind.lower().startswith(name.lower())), key=len, default=None)
    return None if name is None else (name, ACCELERATORS[name])
