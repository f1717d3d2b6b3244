"""What a user can mend: shown as one line, `<rule>, got <value>; <remedy>`; a command then ends with exit code 2.

UserError
  - BudgetError           a budget that cannot be read or cannot be kept
  - StudyError            a study that does not exist or says something that cannot be
  - SourceError           a network or images that cannot be had as they were named
  - UserCodeError         a function of the study's that fails or returns something else
  - ChanceError           a network that is hardly better than guessing
  - UnknownNameError      a name that a registry does not have
  - PatternError          a pattern of zeros that does not exist
  - StructureError        a network that cannot be compressed as the study asks
  - ExportError           a network that cannot be written as ONNX
  - QuantizationError     a network that cannot be written in a lower precision as the study asks
  - FileError             a file that cannot be compared with a network
  - DivergedError         a training whose loss is not finite
  - NoGradientError       a training in which no gradient gets to the weights
  - TargetError           a target that does not exist, or not on this machine
      + EngineError       a stage that TensorRT refuses to build or to load
      + CudaError         a call of the CUDA runtime that failed
          - NoCudaLibraryError
          - NoDriverError
          - NoGpuError
          - OutOfDeviceMemoryError
          - LaunchError
          - CaptureError
  - InspectionError       an engine that does not tell what it became
  - FolderError           a folder that cannot be written to
  - StoreError            a run directory that cannot be used
  - BundleError           a bundle that cannot be written where it was asked for

Each stands beside what raises it; those that several rooms raise are here.
"""


class UserError(Exception):
    """A mistake in what was asked: shown as one line, exit code 2; nothing that was there is lost."""


class StructureError(UserError):
    """A network that is not built as the study says, or that cannot be compressed as it asks."""


class QuantizationError(UserError):
    """A network, or a weight or an activation of it, that cannot be written in a lower precision as the study asks."""


class FolderError(UserError):
    """A folder that cannot be written to, or that holds something else."""
