"""Every runtime, by its name in `--target`; a library is imported when its runtime is first used."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from spaces.registry import FORM, Registry, UnknownNameError, is_reference, nearest

if TYPE_CHECKING:
    from evaluators.runtimes.base import Runtime

RUNTIMES: "Registry[type[Runtime]]" = Registry(
    "a target",
    {
        "onnxruntime": "evaluators.runtimes.onnxruntime_cpu:OnnxRuntime",
        "tensorrt": "evaluators.runtimes.tensorrt_gpu.runtime:TensorRT",
        "openvino": "evaluators.runtimes.openvino_cpu:OpenVino",
    },
)
"""Runtimes on this machine."""

REMOTE: "Registry[Callable[[str], Runtime]]" = Registry(
    "a remote target", {"ssh": "evaluators.runtimes.remote.runtime:RemoteRuntime"}
)
"""Runtimes on other machines, by the scheme of the target's URL."""


def check_target(name: str) -> None:
    """Checks that a target has a name that exists, without importing its library.

    Raises:
        UnknownNameError: it has not.
    """
    if not _is_remote(name) and name not in RUNTIMES and not is_reference(name):
        near = nearest(name, RUNTIMES)
        remedy = f"did you mean {near!r}?" if near else "see: python -m search doctor"
        known = f"ssh://[user@]host, {FORM} or one of {', '.join(RUNTIMES)}"
        raise UnknownNameError(f"a target is {known}, got {name!r}; {remedy}")


def _is_remote(name: str) -> bool:
    scheme, separator, _ = name.partition("://")
    return bool(separator) and scheme in REMOTE


def runtime(name: str) -> "Runtime":
    """Returns the runtime called `name` on this machine, or for `ssh://[user@]host` the one on that board.

    Raises:
        UnknownNameError: there is no such runtime.
        TargetError: it is not installed here, or the board cannot be reached.
    """
    from evaluators.runtimes.base import TargetError  # not before a name is checked

    check_target(name)
    if _is_remote(name):
        return REMOTE[name.partition("://")[0]](name)
    runtime_class = RUNTIMES[name]
    reason = runtime_class.missing()
    if reason:
        raise TargetError(f"target {name!r} is not available here: {reason}")
    return runtime_class()
