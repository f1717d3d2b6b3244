"""Clocks, power modes and temperatures, from each place that tells them."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from evaluators.measurement import Measurement
from evaluators.runtimes import device_state
from evaluators.runtimes.device_state import DeviceState, cpu_state, gpu_state, state_changes
from search.config.environment import environment

NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)(0x100000000ul + index);
    return 0;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
    *device = (void *)0x100000001ul;
    return strcmp(bus, "0000:41:00.0") ? 6 : 0;
}
int nvmlDeviceGetClockInfo(void *device, int kind, unsigned *clock) {
    *clock = kind == 1 ? 1980 : kind == 2 ? 2619 : 0;
    return 0;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *degrees) {
    *degrees = 41 + ((unsigned long)device & 1);
    return sensor;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 120500; return %(power)d; }
int nvmlDeviceGetPerformanceState(void *device, int *state) { *state = 0; return 0; }
"""
"""NVML as its reference declares it, for one GPU at index 0 and another on bus 41."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Returns a function that puts a compiled NVML in place; there is none before."""
    compiled: list[str] = []
    load = ctypes.CDLL

    def cdll(name: str) -> ctypes.CDLL:
        return load(compiled[0] if compiled and name == "libnvidia-ml.so.1" else "/no/such/library.so")

    def make(power: int = 0) -> None:
        compiler = shutil.which("gcc")
        if compiler is None:
            pytest.skip("a stand-in for NVML is compiled with gcc, which is not installed")
        (tmp_path / "nvml.c").write_text(NVML % {"power": power})
        library = str(tmp_path / f"nvml{power}.so")
        subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, str(tmp_path / "nvml.c")], check=True)
        compiled[:] = [library]
        device_state._nvml.cache_clear()

    monkeypatch.setattr(ctypes, "CDLL", cdll)
    device_state._nvml.cache_clear()
    yield make
    device_state._nvml.cache_clear()


def test_a_gpu_tells_by_nvml(nvml: Any, tmp_path: Path) -> None:
    nvml()
    assert gpu_state("", tmp_path) == DeviceState("GPU", 1.98e9, 2.619e9, 41.0, 120.5, "P0")
    assert gpu_state("0000:41:00.0", tmp_path).temperature_c == 42.0
    assert gpu_state("0000:99:00.0", tmp_path).temperature_c == 41.0


def test_what_nvml_refuses_is_left_out(nvml: Any, tmp_path: Path) -> None:
    nvml(power=3)
    assert gpu_state("", tmp_path) == DeviceState("GPU", 1.98e9, 2.619e9, 41.0, None, "P0")


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


JETSON = {
    "sys/class/devfreq/17000000.gpu/cur_freq": "624750000",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "51000",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
    "sys/class/thermal/thermal_zone1/temp": "48500",
    "var/lib/nvpmodel/status": "pmode:0002",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=15W >",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64",
}


def test_a_jetson_tells_by_its_files(nvml: Any, tmp_path: Path) -> None:
    root = written(tmp_path, JETSON)
    wanted = DeviceState("GPU", 624.75e6, None, 48.5, None, "15W", "L4T 36.4.3")
    assert gpu_state("", root) == wanted
    written(root, {"sys/class/devfreq/17000000.gpu/min_freq": "1020000000"})
    assert gpu_state("", root).power_mode == "15W, clocks held"
    written(root, {"var/lib/nvpmodel/status": "pmode:0007"})
    assert gpu_state("", root).power_mode == "mode 7, clocks held"


def test_a_cpu_tells_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {7, 3}, raising=False)
    files = JETSON | {
        "sys/devices/system/cpu/cpu3/cpufreq/scaling_cur_freq": "1479000",
        "sys/devices/system/cpu/cpu3/cpufreq/scaling_governor": "schedutil",
    }
    wanted = DeviceState("CPU", 1.479e9, None, 51.0, None, "schedutil", "L4T 36.4.3")
    assert cpu_state(written(tmp_path, files)) == wanted


def test_nothing_is_told_where_there_is_nothing_or_it_cannot_be_read(nvml: Any, tmp_path: Path) -> None:
    assert gpu_state("", tmp_path) == DeviceState("GPU")
    zone = "sys/class/thermal/thermal_zone0/"
    written(tmp_path, {zone + "type": "cpu-thermal", zone + "temp": "broken"})
    assert cpu_state(tmp_path) == DeviceState("CPU")
    assert cpu_state(tmp_path).known() == {}


def test_a_state_that_moved_is_told_and_one_that_did_not_is_not() -> None:
    before = DeviceState("GPU", 1.5e9, 2e9, 50.0, 30.0, "MAXN")
    assert state_changes(before, DeviceState("GPU", 1.49e9, 2e9, 55.0, 31.0, "MAXN")) == []
    moved = state_changes(before, DeviceState("GPU", 1.0e9, 2e9, 65.0, 31.0, "15W"))
    words = ("1000 MHz", "the GPU went from 50 to 65 degrees", "'15W'")
    assert len(moved) == 3
    assert all(word in line for word, line in zip(words, moved, strict=True))
    assert state_changes(DeviceState("GPU"), before)[0].startswith("the power mode")


def test_a_cpus_clock_may_jump_but_not_its_governor() -> None:
    before = DeviceState("CPU", 1.0e9, None, 50.0, None, "powersave")
    assert state_changes(before, DeviceState("CPU", 3.0e9, None, 55.0, None, "powersave")) == []
    (line,) = state_changes(before, DeviceState("CPU", 1.0e9, None, 50.0, None, "performance"))
    assert "governor" in line


def test_records_have_it() -> None:
    known = DeviceState("GPU", 1.0e9, None, 50.0, None, "15W", "L4T 36.4.3").known()
    assert known == {"kind": "GPU", "clock_hz": 1e9, "temperature_c": 50.0, "power_mode": "15W", "system": "L4T 36.4.3"}
    measured = Measurement("latency", 1.0, "median", 1, 0.0, "t", "p", states={"before": known, "after": known})
    assert Measurement.from_dict(measured.to_dict()) == measured
    recorded = environment("a GPU", DeviceState("GPU", power_mode="15W"))
    assert recorded["device's power_mode"] == "15W"
    assert "device's clock_hz" not in recorded
