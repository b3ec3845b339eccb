"""Where saved tensors wait for the backward when they do not wait on their device.

:class:`Disk` writes them into one unlinked temporary file, whose place the operating system takes
back however the process ends; one thread moves bytes while the caller computes. :class:`Host`
copies them into pinned memory on a stream of its own. What is away gives its memory back as soon as
it has been moved; what a backward wants next comes back ahead of time.
"""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from fxmem.errors import ModifiedParameterError, OffloadError

SMALLEST = 1 << 16
"""Bytes under which a tensor is not worth moving."""
AHEAD = 1
"""Tensors that may be on their way at the same time, in each direction."""
CHANGED = "a saved tensor was changed in place before its backward"


class Home(Protocol):
    """Takes the bytes of tensors and gives them back."""

    def put(self, tensor: Tensor) -> Ticket:
        """Begin to move a tensor away."""


class Ticket(Protocol):
    """One tensor that was moved away."""

    def begin(self) -> None:
        """Begin to bring it back."""

    def get(self) -> Tensor:
        """The tensor, when it is here again."""


class Away:
    """What one region saved, away from the device; ``before``: what the backward wants next."""

    def __init__(self, tickets: dict[int, tuple[Tensor, Ticket]], before: Away | None) -> None:
        self._tickets = {i: ticket for i, (_, ticket) in tickets.items()}
        self._saved = [(weakref.ref(t), t._version) for t, _ in tickets.values()]
        self._before = None if before is None else weakref.ref(before)
        self._begun = False

    def begin(self) -> None:
        """Begin to bring it back, ahead of time."""
        if not self._begun:
            self._begun = True
            for ticket in self._tickets.values():
                ticket.begin()

    def get(self) -> dict[int, Tensor]:
        """The tensors by position; from now on those of the region before are on their way.

        Raises:
            ModifiedParameterError: one was changed in place after it was moved.
        """
        if any((t := found()) is not None and t._version != v for found, v in self._saved):
            raise ModifiedParameterError(CHANGED)
        self.begin()
        before = None if self._before is None else self._before()
        if before is not None:
            before.begin()
        return {i: ticket.get() for i, ticket in self._tickets.items()}


class Leaving:
    """Moves what the regions of one call save, in the order of its forward."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._known: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Ticket]]] = {}
        self._last: weakref.ref[Away] | None = None

    def save(self, tensors: Sequence[Tensor | None]) -> tuple[Away, frozenset[int]]:
        """Those that are dense and large go; their positions."""
        given = {i: t for i, t in enumerate(tensors) if t is not None and _worth(t)}
        before = None if self._last is None else self._last()
        away = Away({i: (t, self._ticket(t)) for i, t in given.items()}, before)
        self._last = weakref.ref(away)
        return away, frozenset(given)

    def _ticket(self, tensor: Tensor) -> Ticket:
        """One for what several regions save."""
        if id(tensor) in self._known:
            whose, ticket = self._known[id(tensor)]
            if whose() is tensor and (found := ticket()) is not None:
                return found
        made = self.home.put(tensor.detach())
        self._known[id(tensor)] = weakref.ref(tensor), weakref.ref(made)
        return made


def _worth(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage().nbytes()
    return tensor.nbytes >= SMALLEST and tensor.is_contiguous() and storage == tensor.nbytes


class Disk:
    """An unlinked file in the temporary directory, and the thread that reads and writes it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0
        self._moving: list[tuple[Future[None], Tensor]] = []
        try:
            with tempfile.TemporaryFile(prefix="fxmem-") as file:
                self.fd = os.dup(file.fileno())  # which keeps it, and no name leads to it
        except OSError as error:
            raise OffloadError(f"no temporary file can be made: {error}") from error
        self._worker = ThreadPoolExecutor(1, "fxmem-offload")
        weakref.finalize(self, os.close, self.fd)

    def put(self, tensor: Tensor) -> Ticket:
        size, device = tensor.nbytes, tensor.device
        at = self._reserve(size)
        self._wait(AHEAD - 1)
        ticket = _OnDisk(self, at, torch.empty_like(tensor, device="meta"), device)
        weakref.finalize(ticket, self._release, size, at)
        there = tensor.cpu()
        ticket.moved = self._worker.submit(_write, self.fd, [there], at, there._version)
        self._moving.append((ticket.moved, there))
        return ticket

    def _wait(self, most: int) -> None:
        """Until no more than so many writes are under way: their memory is not free before.

        It is this thread that frees it, where whoever measures memory looks.
        """
        while len(self._moving) > most:
            try:
                self._moving[0][0].result()
            finally:
                del self._moving[0]

    def _reserve(self, size: int) -> int:
        with self._lock:
            if self._free[size]:
                return self._free[size].pop()
            at = self._end
            try:
                if hasattr(os, "posix_fallocate"):  # now, not in the middle of a backward
                    os.posix_fallocate(self.fd, at, size)
            except OSError as error:
                raise OffloadError(
                    f"the disk has no room for {size / 2**20:.0f} MiB more beside {at / 2**20:.0f} "
                    f"MiB of saved tensors in {tempfile.gettempdir()}: {error.strerror}"
                ) from error
            self._end += size
            return at

    def _release(self, size: int, at: int) -> None:
        # the worker takes its jobs in order, so what takes the place comes after what was there
        with self._lock:
            self._free[size].append(at)

    def read(self, into: Tensor, at: int) -> Future[None]:
        self._wait(0)
        return self._worker.submit(_read, self.fd, [into], at)


class _OnDisk:
    def __init__(self, disk: Disk, at: int, like: Tensor, device: torch.device) -> None:
        self.disk, self.at, self.like, self.device = disk, at, like, device
        self.moved: Future[None] | None = None
        self.back: tuple[Tensor, Future[None]] | None = None

    def begin(self) -> None:
        if self.back is None:
            into = torch.empty_like(self.like, device="cpu")
            self.back = into, self.disk.read(into, self.at)

    def get(self) -> Tensor:
        self.begin()
        assert self.back is not None and self.moved is not None
        (tensor, read), self.back = self.back, None
        self.moved.result()
        read.result()
        return tensor.to(self.device)


def _bytes(tensor: Tensor) -> memoryview:
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def _write(fd: int, given: list[Tensor], at: int, version: int) -> None:
    tensor = given.pop()  # no job that is done holds one
    left = _bytes(tensor)
    try:
        while left:
            done = os.pwrite(fd, left, at)
            left, at = left[done:], at + done
    except OSError as error:
        raise OffloadError(f"a saved tensor cannot be written: {error.strerror}") from error
    if tensor._version != version:
        raise ModifiedParameterError(CHANGED)


def _read(fd: int, given: list[Tensor], at: int) -> None:
    left = _bytes(given.pop())
    while left:
        done = os.preadv(fd, [left], at)
        if not done:
            raise OffloadError("the file of saved tensors is shorter than what was written")
        left, at = left[done:], at + done


class Host:
    """Pinned memory of the host, reused from step to step, and a stream that copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        self.stream = torch.Stream(device)

    def put(self, tensor: Tensor) -> Ticket:
        key = (tensor.dtype, *tensor.shape)
        spare = self._free[key]
        place = spare.pop() if spare else torch.empty_like(tensor, device="cpu", pin_memory=True)
        module = torch.get_device_module(self.device)
        self.stream.wait_stream(module.current_stream(self.device))
        with module.stream(self.stream):
            place.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)
        ticket = _OnHost(self, place)
        weakref.finalize(ticket, spare.append, place)
        return ticket


class _OnHost:
    def __init__(self, host: Host, place: Tensor) -> None:
        self.host, self.place = host, place
        self.back: tuple[Tensor, Any] | None = None

    def begin(self) -> None:
        if self.back is None:
            module = torch.get_device_module(self.host.device)
            with module.stream(self.host.stream):
                tensor = self.place.to(self.host.device, non_blocking=True)
                self.back = tensor, self.host.stream.record_event()

    def get(self) -> Tensor:
        self.begin()
        assert self.back is not None
        (tensor, event), self.back = self.back, None
        current = torch.get_device_module(self.host.device).current_stream(self.host.device)
        current.wait_event(event)
        tensor.record_stream(current)
        return tensor


@functools.lru_cache
def home(where: str, device: torch.device) -> Home:
    """The one of a process for ``"cpu"`` or ``"disk"``.

    Raises:
        OffloadError: the temporary directory cannot be written.
    """
    return Host(device) if where == "cpu" else Disk()


__all__ = ["Away", "Disk", "Home", "Host", "Leaving", "home"]
