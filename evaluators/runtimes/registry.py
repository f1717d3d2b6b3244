"""Every runtime, by its name in `--target`; a library is imported when its runtime is first used."""

from collections.abc import Callable

from evaluators.runtimes.base import Runtime, TargetError
from spaces.registry import FORM, Registry, is_reference, nearest

RUNTIMES: Registry[type[Runtime]] = Registry(
    "a target",
    {
        "onnxruntime": "evaluators.runtimes.onnxruntime_cpu:OnnxRuntime",
        "tensorrt": "evaluators.runtimes.tensorrt_gpu.runtime:TensorRT",
        "openvino": "evaluators.runtimes.openvino_cpu:OpenVino",
    },
)
"""Runtimes on this machine."""

REMOTE: Registry[Callable[[str], Runtime]] = Registry(
    "a remote target", {"ssh": "evaluators.runtimes.remote.runtime:RemoteRuntime"}
)
"""Runtimes on other machines, by the scheme of the target's URL."""


def runtime(name: str) -> Runtime:
    """Returns the runtime called `name` on this machine, or for `ssh://[user@]host` the one on that board.

    Raises:
        TargetError: there is no such runtime, it is not installed here, or the board cannot be reached.
        UnknownNameError: it is named `package.module:attribute`, and cannot be imported.
    """
    scheme, separator, _ = name.partition("://")
    if separator and scheme in REMOTE:
        return REMOTE[scheme](name)
    if name not in RUNTIMES and not is_reference(name):
        near = nearest(name, RUNTIMES)
        remedy = f"did you mean {near!r}?" if near else "see: python -m search doctor"
        known = f"ssh://[user@]host, {FORM} or one of {', '.join(RUNTIMES)}"
        raise TargetError(f"a target is {known}, got {name!r}; {remedy}")
    runtime_class = RUNTIMES[name]
    reason = runtime_class.missing()
    if reason:
        raise TargetError(f"target {name!r} is not available here: {reason}")
    return runtime_class()
