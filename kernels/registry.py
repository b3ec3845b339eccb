"""The kernels as data: what each computes, where it may run, what it costs, how it is launched.

A pass replaces a subgraph by a kernel where :func:`unify` finds a renaming of axis letters between
the subgraph's signature and the kernel's, and :meth:`Kernel.available` agrees for the device and
dtype. ``reference`` and ``launch`` take the same arguments and give the same results, so calling
the :class:`Kernel` itself runs whichever the device allows.
"""

from __future__ import annotations

from fxmem.axes.signature import Signature
from fxmem.kernels.kernel import Kernel, unify


def kernels() -> tuple[Kernel, ...]:
    """All kernels. Modules are imported on the first call, so that ``import fxmem`` stays light."""
    from fxmem.kernels import (
        adamw,
        chunk_attention,
        chunk_attention_backward,
        gated,
        linear_nll,
        linear_nll_backward,
        norm,
        rotary,
        weight_grad,
    )

    modules = (
        chunk_attention,
        chunk_attention_backward,
        linear_nll,
        linear_nll_backward,
        weight_grad,
        norm,
        gated,
        rotary,
        adamw,
    )
    return tuple(kernel for module in modules for kernel in module.KERNELS)


def find(name: str) -> Kernel:
    """The kernel of that name; :class:`KeyError` lists the names there are."""
    table = {kernel.name: kernel for kernel in kernels()}
    if name not in table:
        raise KeyError(f"no kernel {name!r}; there are {', '.join(table)}")
    return table[name]


def lookup(op: str, target: Signature | None = None) -> tuple[Kernel, ...]:
    """Kernels that can stand for ``op`` and, where given, whose signature unifies with it."""
    found = (kernel for kernel in kernels() if op in kernel.ops)
    return tuple(k for k in found if target is None or unify(k.signature, target) is not None)
