"""Clocks, power mode and temperature of a device, which limit its speed, read without starting a program.

A reading takes well under a millisecond, so there is one before and one after each measurement. A GPU is read through
NVML, a Jetson and a CPU through files of the system; unknown values are left out.
"""

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

_NVML = "libnvidia-ml.so.1"
_SM = 1
_MEMORY = 2
_GPU = 0
"""Values of NVML's nvmlClockType_t and nvmlTemperatureSensors_t. Source: NVML API reference."""
_UNKNOWN_PSTATE = 32
ROOT = Path("/")


@dataclass(frozen=True)
class DeviceState:
    """The state of a device; None or "" for unknown values.

    Args:
        kind: `GPU` or `CPU`.
        clock_hz: current clock of a GPU's multiprocessors, or of one core of the CPU.
        memory_clock_hz: current clock of a GPU's memory.
        temperature_c: in degrees Celsius.
        power_w: current power draw.
        power_mode: a Jetson's power mode, another GPU's performance state, a CPU's frequency governor.
        system: release of Linux for Tegra (L4T) on a Jetson.
    """

    kind: str
    clock_hz: float | None = None
    memory_clock_hz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_mode: str = ""
    system: str = ""

    def known(self) -> dict[str, float | str]:
        """Returns the known values by name of the field; empty if only the kind is known."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, "")}
        return known if len(known) > 1 else {}


def state_changes(before: DeviceState, after: DeviceState) -> list[str]:
    """Returns, as sentences, the changes that may affect a latency: 5% of a GPU's clock, 10 degrees, the power mode.

    A CPU's clock is not included: it changes by more within a second, which paired timing compensates for.
    """
    lines = []
    for name, old, new in (
        ("clock", before.clock_hz, after.clock_hz),
        ("memory clock", before.memory_clock_hz, after.memory_clock_hz),
    ):
        if before.kind == "GPU" and old and new and abs(new / old - 1) > 0.05:
            lines.append(f"the GPU's {name} moved from {old / 1e6:.0f} to {new / 1e6:.0f} MHz")
    if before.temperature_c and after.temperature_c and abs(after.temperature_c - before.temperature_c) > 10:
        lines.append(
            f"the {before.kind} went from {before.temperature_c:.0f} to {after.temperature_c:.0f} degrees Celsius"
        )
    if before.power_mode != after.power_mode:
        mode = "power mode" if before.kind == "GPU" else "frequency governor"
        lines.append(f"the {mode} went from {before.power_mode!r} to {after.power_mode!r}")
    return lines


def cpu_state(root: Path = ROOT) -> DeviceState:
    """Returns the state of the first CPU that this process may use.

    Args:
        root: of the file system.
    """
    first = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    frequency = root / f"sys/devices/system/cpu/cpu{first}/cpufreq"
    return DeviceState(
        "CPU",
        clock_hz=_scaled(frequency / "scaling_cur_freq", 1e3),
        temperature_c=_zone_temperature(root, r"pkg|cpu|soc|core"),
        power_mode=_text(frequency / "scaling_governor"),
        system=_l4t(root),
    )


def gpu_state(bus_id: str = "", root: Path = ROOT) -> DeviceState:
    """Returns the state of a GPU.

    Args:
        bus_id: its PCI bus id; the first GPU if empty.
        root: of the file system.
    """
    clock, memory_clock, temperature, power, performance = _from_nvml(bus_id)
    return DeviceState(
        "GPU",
        clock_hz=_kernel_clock(root) if clock is None else clock * 1e6,
        memory_clock_hz=None if memory_clock is None else memory_clock * 1e6,
        temperature_c=_zone_temperature(root, "gpu") if temperature is None else float(temperature),
        power_w=None if power is None else power / 1e3,
        power_mode=_jetson_mode(root) or ("" if performance in (None, _UNKNOWN_PSTATE) else f"P{performance}"),
        system=_l4t(root),
    )


@cache
def _nvml() -> Any:
    """Returns NVML; None if it is not installed or cannot be initialized."""
    try:
        library = ctypes.CDLL(_NVML)
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def _from_nvml(bus_id: str) -> Sequence[int | None]:
    """Returns clock and memory clock in MHz, degrees Celsius, milliwatts and the performance state; None if unknown."""
    library, device = _nvml(), ctypes.c_void_p()
    if library is None:
        return [None] * 5
    handle = ctypes.byref(device)
    by_bus = bool(bus_id) and library.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), handle) == 0
    if not by_bus and library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(0), handle) != 0:
        return [None] * 5

    def value_of(function: str, *arguments: int) -> int | None:
        value = ctypes.c_uint()
        code = getattr(library, function)(device, *map(ctypes.c_uint, arguments), ctypes.byref(value))
        return value.value if code == 0 else None

    return [
        value_of("nvmlDeviceGetClockInfo", _SM),
        value_of("nvmlDeviceGetClockInfo", _MEMORY),
        value_of("nvmlDeviceGetTemperature", _GPU),
        value_of("nvmlDeviceGetPowerUsage"),
        value_of("nvmlDeviceGetPerformanceState"),
    ]


def _jetson_mode(root: Path) -> str:
    """Returns the power mode from nvpmodel's files, and whether jetson_clocks has fixed the GPU's clock."""
    number = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if number is None:
        return ""
    models = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", _text(root / "etc/nvpmodel.conf"))
    names = {int(index): name for index, name in models}
    mode = names.get(int(number.group(1)), f"mode {int(number.group(1))}")
    device = _devfreq_folder(root)
    limits = {_text(device / f"{bound}_freq") for bound in ("min", "max")} if device else set()
    return f"{mode}, clocks held" if len(limits) == 1 and "" not in limits else mode


def _devfreq_folder(root: Path) -> Path | None:
    folders = sorted((root / "sys/class/devfreq").glob("*"))
    return next((folder for folder in folders if re.search(r"gpu|gv11b|ga10b|gp10b|gb10b", folder.name)), None)


def _kernel_clock(root: Path) -> float | None:
    folder = _devfreq_folder(root)
    return _scaled(folder / "cur_freq", 1.0) if folder else None


def _zone_temperature(root: Path, kinds: str) -> float | None:
    """Returns the temperature, in degrees Celsius, of the first thermal zone whose type matches `kinds`."""
    for kind in sorted((root / "sys/class/thermal").glob("thermal_zone*/type")):
        if re.search(kinds, _text(kind), re.IGNORECASE):
            return _scaled(kind.with_name("temp"), 1e-3)
    return None


def _l4t(root: Path) -> str:
    release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    return f"L4T {release.group(1)}.{release.group(2)}" if release else ""


def _scaled(path: Path, factor: float) -> float | None:
    try:
        return float(_text(path)) * factor
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
