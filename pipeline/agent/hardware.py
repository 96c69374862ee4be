"""Where the network learns, and in which number format."""

from __future__ import annotations

import torch as th


def choose_device(device: str) -> th.device:
    """``auto`` is CUDA, else Apple's GPU, else the CPU."""
    if device != "auto":
        return th.device(device)
    if th.cuda.is_available():
        return th.device("cuda")
    return th.device("mps" if th.backends.mps.is_available() else "cpu")


def choose_dtype(precision: str, device: th.device) -> th.dtype:
    """The convolutions' number format. ``auto`` is bf16 where the hardware multiplies it, float32 elsewhere."""
    if precision == "auto":
        return th.bfloat16 if has_fast_bf16(device) else th.float32
    return th.bfloat16 if precision == "bf16" else th.float32


def has_fast_bf16(device: th.device) -> bool:
    """Whether the device has bf16 multiply instructions: AMX or AVX512-BF16 on a CPU, Ampere or later on a GPU."""
    if device.type == "cuda":
        return th.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(th.cpu, probe, lambda: False)() for probe in probes)
    return False
