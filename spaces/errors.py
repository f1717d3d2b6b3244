"""The root of every error that is the user's to mend."""


class UserError(Exception):
    """A mistake in what was asked: shown as one line, exit code 2, nothing written."""


class StructureError(UserError):
    """A network that is not built as the study says, or that cannot be compressed as it asks."""
