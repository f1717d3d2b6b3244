"""What the runtimes on CPUs share: the device's name, and what its int8 instructions hold."""

import platform
from functools import cache
from pathlib import Path


@cache
def cpu_flags() -> frozenset[str]:
    """Returns the instruction sets that Linux reports; none elsewhere."""
    return frozenset(_cpu_field("flags").split())


def has_vnni() -> bool:
    """Returns whether the CPU adds u8 x s8 products without overflow."""
    return any(flag in cpu_flags() for flag in ("avx512_vnni", "avx_vnni", "amx_int8"))


def weight_bits() -> int:
    """Returns how many bits an int8 weight may have: 7 on x86 without VNNI, else 8.

    There, products of u8 and s8 are summed in 16 bits, which eight-bit weights can overflow.
    Source: ONNX Runtime documentation, Quantize ONNX models, "When to use reduce-range"; OpenVINO documentation,
    `OverflowFix` of NNCF, for the same instruction.
    """
    return 7 if platform.machine().lower() in ("x86_64", "amd64") and not has_vnni() else 8


@cache
def cpu_name() -> str:
    """Returns the CPU's model name, or its architecture where the system does not tell."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
