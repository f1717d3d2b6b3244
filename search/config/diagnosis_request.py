"""What a command line wants to have compared; nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

from spaces.errors import UserError

PRECISIONS = ("int8", "fp16", "fp8", "fp32")


@dataclass(frozen=True)
class DiagnosisRequest:
    """What a command line wants to have compared.

    Args:
        precision: of every layer; int8 where not given, and neither a trial nor a file is.
        trial: a finished one of a search.
        file: an ONNX file, or the folder of a bundle.
        other_target: a second runtime or board for the same files, instead of the float network.
        images: how many.
    """

    precision: str | None = None
    trial: int | None = None
    file: Path | None = None
    other_target: str | None = None
    images: int = 64

    def check(self) -> None:
        """Checks that one version is named.

        Raises:
            UserError: none is, or several are.
        """
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UserError(f"a precision is one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        given = [f"--{name}" for name in ("precision", "trial") if getattr(self, name) is not None]
        if self.file is not None and self.precision is not None:
            given.append("--file")
        if len(given) > 1:
            raise UserError(f"one version is compared, got {' and '.join(given)}; leave one out")
        if self.precision == "fp32" and self.other_target is None:
            raise UserError("fp32 is what others are compared with, got --precision fp32; add --against-target")
        if self.file is not None and not self.file.exists():
            raise UserError(f"a file to compare exists, got {self.file}; give an ONNX file or a bundle's folder")

    @property
    def bundle(self) -> Path | None:
        """The folder of the bundle that is compared; None where something else is."""
        return self.file if self.file is not None and self.file.is_dir() else None

    @property
    def own_study(self) -> str | None:
        """The study file that the bundle brings; None where something else is compared."""
        return str(self.bundle / "study.toml") if self.bundle is not None else None
