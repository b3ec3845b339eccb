"""The private names of DistributedDataParallel: the wrapper that runs, and how it stops reducing.

Its reducer holds a bucket for the gradient of every parameter, and hooks that fill them. What
remains of the wrapper is as before: buffers are sent, ``no_sync`` says what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["active", "disarm", "options_in_the_way", "syncs"]


def active() -> Any:
    """The DistributedDataParallel module whose forward runs now, or None."""
    return nn.parallel.DistributedDataParallel._get_active_ddp_module()


def syncs(wrapper: Any) -> bool:
    """The forward that runs now is not inside ``no_sync``."""
    return bool(wrapper.require_backward_grad_sync)


def options_in_the_way(wrapper: Any) -> str | None:
    """What the wrapper was asked for that only its own reducer does."""
    if wrapper.mixed_precision is not None:
        return "mixed_precision=..."
    if wrapper._comm_hooks:
        return "register_comm_hook(...)"
    return "join()" if wrapper._join_config.enable else None


def disarm(wrapper: Any, check: Callable[[], None], refused: Callable[[str], Exception]) -> None:
    """Let the wrapper reduce nothing from now on, and give its buckets back; once is enough.
    ``check`` may raise before each forward that would have been reduced; ``refused`` makes the
    error for anything else that is asked of the reducer.
    """
    if not isinstance(wrapper.reducer, _Nothing):
        wrapper.reducer._remove_autograd_hooks()
        wrapper.reducer = wrapper.logger = _Nothing(check, refused)


class _Nothing:
    """In the place of a wrapper's reducer and of the logger that holds on to it."""

    def __init__(self, check: Callable[[], None], refused: Callable[[str], Exception]) -> None:
        self.prepare_for_forward, self._refused = check, refused

    def prepare_for_backward(self, _outputs: Any) -> None:
        """There is nothing to wait for."""

    def set_runtime_stats_and_log(self) -> None:
        """There is nothing to log."""

    def _rebuild_buckets(self) -> bool:
        return False

    def _delay_all_reduce(self) -> None:
        """After the first backward of a static graph."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._refused(name)
