"""What the user asks for: :class:`Plan` and its parts."""

from fxmem.plan.plan import Plan, Stream

__all__ = ["Plan", "Stream"]
