"""What can go wrong in the demo and on the command line, beyond the core's own errors."""

from __future__ import annotations

import importlib
from types import ModuleType

from fxmem.errors import FxmemError


class MissingExtraError(FxmemError):
    """A library of the ``demo`` extra is not installed."""

    default_advice = 'install it with: pip install "fxmem[demo]"'


class UsageError(FxmemError, ValueError):
    """An argument on the command line has a value that cannot work."""


def require(name: str) -> ModuleType:
    """Import a library of the ``demo`` extra.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise
        raise MissingExtraError(f"{name.split('.')[0]} is not installed") from error
