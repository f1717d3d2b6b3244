"""Numbers as people read them: SI inside, units here."""

import math

_DECIMAL = ((1e9, "G"), (1e6, "M"), (1e3, "K"))


def milliseconds(seconds: float) -> str:
    """Returns seconds as milliseconds, `4.97 ms`; below a tenth of one as microseconds, `28.5 µs`."""
    if 0 < seconds < 1e-4:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.{2 if seconds < 0.1 else 0}f} ms"


def millijoules(joules: float) -> str:
    """Returns joules as millijoules, `2.04 mJ`."""
    return f"{joules * 1e3:.3g} mJ"


def percent(share: float) -> str:
    """Returns a share as a percentage: `98.57%`."""
    return f"{share:.2%}"


def points(difference: float) -> str:
    """Returns a difference of shares in points, signed: `-0.29`."""
    return f"{difference * 100:+.2f}"


def count(value: float) -> str:
    """Returns a count with its decimal prefix: `40.9 M`."""
    for scale, prefix in _DECIMAL:
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.0f}"


def size(byte_count: float) -> str:
    """Returns bytes with their decimal prefix: `320 KB`."""
    return count(byte_count) + "B" if byte_count >= 1e3 else f"{byte_count:.0f} B"


def quantity(value: float, unit: str) -> str:
    """Returns a value in SI units as text; units are those of `evaluators.measurement.METRICS`."""
    formats = {"s": milliseconds, "byte": size, "ratio": percent, "joule": millijoules}
    return formats.get(unit, count)(value)


def threshold(value: float) -> str:
    """Returns an exit's threshold with as many digits as tell it from 1: `0.951`, `0.99986`."""
    return f"{value:.{max(3, 1 - math.floor(math.log10(1 - value))) if value < 1 else 3}g}"
