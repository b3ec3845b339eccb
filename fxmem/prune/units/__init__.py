"""What can be removed, and which of it is."""

from fxmem.prune.units.units import Coupling, UnitGroup

__all__ = ["Coupling", "UnitGroup"]
