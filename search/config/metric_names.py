"""What people call metrics that are measured under another name, and how the one follows from the other."""

import re
from collections.abc import Iterable, Mapping

from spaces.registry import nearest

_RATE = "a rate is a latency: latency = batch / rate, so 100 images/s at batch 8 is latency<80ms"
_TIME = "it is called latency, of a whole batch: latency<5ms"
_FLOPS = "one multiply-add counts as one FLOP, so flops = MACs: flops<20M"
_TOP1 = "accuracy is top-1: accuracy>98%"
_MEMORY = "memory in use is not measured; the weights in it are about the size of the files: size<1MB"
_SIZE = "bytes of the files are size: size<1MB"
_PARAMS = "trainable values are params: params<200K"
_MEANT: Mapping[str, str] = {
    **dict.fromkeys(("fps", "throughput", "ips", "qps", "rate", "imagespersecond", "framespersecond"), _RATE),
    **dict.fromkeys(("time", "runtime", "inferencetime", "delay", "ms", "milliseconds", "wall", "speed"), _TIME),
    **dict.fromkeys(("p50", "median"), "latency is the median: latency<5ms"),
    **{name: f"a percentile is one of latency: latency.{name}<8ms" for name in ("p90", "p95", "p99")},
    "speedup": "latency in % is of the dense network's, so 2 times as fast is latency<50%",
    **dict.fromkeys(("mac", "macs", "gmacs", "mmacs", "madds", "multadds", "mflops", "gflops", "ops"), _FLOPS),
    **dict.fromkeys(("top1", "acc", "acc1", "accuracytop1", "top1accuracy", "prec1"), _TOP1),
    "top5": "top-5 is not measured; accuracy is top-1: accuracy>98%",
    **dict.fromkeys(("error", "err", "top1error"), "accuracy = 100% - error, so 2% error is accuracy>98%"),
    **dict.fromkeys(("drop", "loss", "accdrop", "accuracyloss"), "it is called accuracy_drop: accuracy_drop<1%"),
    **dict.fromkeys(("memory", "mem", "ram", "vram", "peakmemory"), _MEMORY),
    **dict.fromkeys(("disk", "storage", "bytes", "filesize", "modelsize", "flash"), _SIZE),
    **dict.fromkeys(("parameters", "param", "weights", "nparams"), _PARAMS),
    **dict.fromkeys(("power", "joules", "watts"), "energy is FLOPs at a price that you state: energy<2mJ@50pJ"),
    "sparsity": "what is left is limited, not what is gone: params<30% or flops<50% of the dense network's",
}
"""A rule and an example of it, by names as people type them, in small letters and digits alone."""


def meant(name: str, known: Iterable[str]) -> str | None:
    """Returns which metric a name means, as a remedy in words; None if it is like none.

    Args:
        name: as it was typed; no metric.
        known: the names of the metrics that are asked for.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    near = nearest(name.lower(), known)
    return _MEANT.get(plain) or (f"did you mean {near!r}?" if near else None)
