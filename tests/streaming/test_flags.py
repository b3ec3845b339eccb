"""Every flag and every spelling of an operator counts: streamed equals plain, or is refused.

A layer with one call of the operator, streamed in chunks of three tokens, in float64 at 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as fn
from double import largest_difference
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream

D, V = 6, 9
Call = Callable[[Tensor, Tensor, "Weights"], Tensor]


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(4)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=source, dtype=torch.float64) * 0.4)

        self.table, self.square, self.head = parameter(V, D), parameter(D, D), parameter(D, V)
        self.bias, self.scale = parameter(D), parameter(D)
        self.classes = nn.Buffer(torch.rand(V, generator=source, dtype=torch.float64) + 0.5)
        self.mean, self.var = nn.Buffer(torch.zeros(D).double()), nn.Buffer(torch.ones(D).double())


def inner(call: Call) -> Callable[[Weights, Tensor], Tensor]:
    """The operator within a layer."""

    def run(m: Weights, ids: Tensor) -> Tensor:
        x = fn.embedding(ids, m.table) @ m.square
        return (call(x, ids, m).double() * x.sum(-1, keepdim=True)).square().mean()

    return run


def loss(call: Callable[[Tensor, Tensor, Weights], Tensor]) -> Callable[[Weights, Tensor], Tensor]:
    """The operator is the loss, of logits ``[B, T, V]`` and targets ``[B, T]``."""

    def run(m: Weights, ids: Tensor) -> Tensor:
        logits = fn.embedding(ids, m.table) @ m.square @ m.head
        return call(logits, ids.masked_fill(ids == 2, -100), m)

    return run


def rows(call: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Weights], Tensor]:
    return lambda x, y, m: call(x.flatten(0, 1), y.flatten(), m)


INNER: dict[str, Call] = {
    # spellings
    "cat axis": lambda x, i, m: torch.cat([x[..., :2], x[..., 2:]], axis=-1),
    "concat": lambda x, i, m: torch.concat(tensors=(x, x * 2), dim=-1)[..., ::2],
    "concatenate": lambda x, i, m: torch.concatenate((x, x * 2), axis=2)[..., ::2],
    "stack": lambda x, i, m: torch.stack(tensors=[x, x.sin()], dim=-1).sum(axis=-1),
    "dropout": lambda x, i, m: fn.dropout(input=x, p=0.3, training=False),
    "torch.dropout": lambda x, i, m: torch.dropout(input=x, p=0.3, train=False),
    "dropout inplace": lambda x, i, m: fn.dropout(x * 2, 0.3, training=False, inplace=True),
    "sum": lambda x, i, m: torch.sum(input=x, axis=-1, keepdims=True) + x,
    "mean": lambda x, i, m: x.mean(axis=1, keepdims=True) + x,
    "softmax": lambda x, i, m: torch.softmax(input=x, dim=-1),
    "method softmax": lambda x, i, m: x.softmax(dim=1),
    "gather": lambda x, i, m: torch.gather(input=x, dim=-1, index=(i % D)[..., None]) + x,
    "linear": lambda x, i, m: fn.linear(input=x, weight=m.square, bias=m.bias),
    "layer norm": lambda x, i, m: fn.layer_norm(input=x, normalized_shape=[D], bias=m.bias),
    "attention": lambda x, i, m: fn.scaled_dot_product_attention(
        query=x[:, None], key=x[:, None], value=x[:, None], is_causal=True, scale=0.3
    )[:, 0],
    "attention mask": lambda x, i, m: fn.scaled_dot_product_attention(
        x[:, None], value=x[:, None], key=(x * 2)[:, None], attn_mask=(i != 3)[:, None, None]
    )[:, 0],
    "where": lambda x, i, m: torch.where(condition=x > 0, input=x, other=x * 0.1),
    "clamp": lambda x, i, m: torch.clamp(input=x, min=-0.2, max=0.3),
    "transpose": lambda x, i, m: torch.transpose(input=x, dim0=1, dim1=2).transpose(dim0=1, dim1=2),
    "max": lambda x, i, m: torch.max(input=x, dim=-1, keepdim=True).values + x,
    # flags
    "embedding frequencies": lambda x, i, m: fn.embedding(i, m.table, scale_grad_by_freq=True) + x,
    "embedding padding": lambda x, i, m: fn.embedding(i, m.table, padding_idx=-V + 2) + x,
    "embedding sparse": lambda x, i, m: fn.embedding(i, m.table * 2, sparse=True) + x,
    "bag sparse": lambda x, i, m: (
        fn.embedding_bag(i, m.table * 2, mode="sum", sparse=True)[:, None] + x
    ),
    "gather sparse": lambda x, i, m: x + torch.gather(x, 2, i[..., None] % D, sparse_grad=True),
    "embedding max norm": lambda x, i, m: fn.embedding(i, m.table, max_norm=0.5) + x,
    "batch norm": lambda x, i, m: fn.batch_norm(
        x.transpose(1, 2), m.mean, m.var, m.scale, m.bias, training=True
    ).transpose(1, 2),
    "batch norm evaluated": lambda x, i, m: fn.batch_norm(
        x.transpose(1, 2), m.mean, m.var, m.scale, m.bias, training=False
    ).transpose(1, 2),
    "instance norm": lambda x, i, m: fn.instance_norm(
        x.transpose(1, 2), m.mean, m.var, use_input_stats=True
    ).transpose(1, 2),
    "instance norm evaluated": lambda x, i, m: fn.instance_norm(
        x.transpose(1, 2), m.mean, m.var, use_input_stats=False
    ).transpose(1, 2),
    "instance norm alone": lambda x, i, m: fn.instance_norm(x.transpose(1, 2)).transpose(1, 2),
    "sum dtype": lambda x, i, m: x + x.float().sum(1, keepdim=True, dtype=torch.float64),
    # of float32 the gradient is summed in float32, chunk by chunk in another order
    "cumsum dtype": lambda x, i, m: x.cumsum(1, dtype=torch.float64),
    "softmax dtype": lambda x, i, m: x.float().softmax(-1, dtype=torch.float64),
    "variance": lambda x, i, m: x + x.var(1, correction=2, keepdim=True),
    "deviation": lambda x, i, m: x + x.std(dim=(1, 2), unbiased=False, keepdim=True),
    "top values": lambda x, i, m: (
        x + x.topk(2, -1, largest=False, sorted=True).values.sum(-1, True)
    ),
    "top tokens": lambda x, i, m: x + x.topk(2, 1, largest=False).values.mean(1, keepdim=True),
    "sorted": lambda x, i, m: x.sort(dim=-1, descending=True, stable=True).values,
    "gelu": lambda x, i, m: fn.gelu(x, approximate="tanh"),
    "division": lambda x, i, m: x + torch.div(x * 7, 2.0, rounding_mode="floor"),
    "added with alpha": lambda x, i, m: torch.add(x, m.bias, alpha=-2),
    "addmm": lambda x, i, m: torch.addmm(m.bias, x.flatten(0, 1), m.square, beta=0.5, alpha=3).view(
        x.shape
    ),
    "norm": lambda x, i, m: x / torch.linalg.vector_norm(x, ord=3, dim=-1, keepdim=True),
    "scatter add": lambda x, i, m: torch.zeros_like(x).scatter_add(
        2, (i % D)[..., None].expand(-1, -1, D), x
    ),
    "layer norm eps": lambda x, i, m: fn.layer_norm(x, (D,), eps=0.7),
    "rms norm": lambda x, i, m: fn.rms_norm(x, (D,), m.scale, eps=0.3),
    "celu": lambda x, i, m: fn.celu(x, alpha=0.4),
    "softplus": lambda x, i, m: fn.softplus(x, beta=2, threshold=0.5),
    "hardtanh": lambda x, i, m: fn.hardtanh(x, -0.1, 0.2),
    "prelu": lambda x, i, m: fn.prelu(x.transpose(1, 2), m.bias).transpose(1, 2),
    "glu": lambda x, i, m: torch.cat([fn.glu(x, dim=-1)] * 2, -1),
    "quantile": lambda x, i, m: x + x.quantile(0.3, dim=-1, keepdim=True),
}
LOSSES: dict[str, Callable[[Tensor, Tensor, Weights], Tensor]] = {
    "all by keyword": rows(lambda x, y, m: fn.cross_entropy(target=y, input=x)),
    "class weights": rows(lambda x, y, m: fn.cross_entropy(x, y, weight=m.classes)),
    "smoothing": rows(lambda x, y, m: fn.cross_entropy(x, y, m.classes, label_smoothing=0.2)),
    "sum": rows(lambda x, y, m: fn.cross_entropy(x, y, reduction="sum")),
    "none": rows(lambda x, y, m: fn.cross_entropy(x, y, reduction="none").square().sum()),
    "legacy": rows(lambda x, y, m: fn.cross_entropy(x, y, size_average=False, reduce=True)),
    "ignored": rows(lambda x, y, m: fn.cross_entropy(x, y.abs() % V, ignore_index=4)),
    "probabilities": lambda x, y, m: fn.cross_entropy(
        x.transpose(1, 2), x.detach().sin().softmax(-1).transpose(1, 2), label_smoothing=0.1
    ),
    "classes in front": lambda x, y, m: fn.cross_entropy(x.transpose(1, 2), y),
    "likelihood": rows(lambda x, y, m: fn.nll_loss(input=x.log_softmax(dim=-1), target=y)),
    "likelihood weights": rows(
        lambda x, y, m: fn.nll_loss(x.log_softmax(-1), y, weight=m.classes, reduction="sum")
    ),
    "binary": lambda x, y, m: fn.binary_cross_entropy_with_logits(
        x, (x > 0).to(x), pos_weight=m.classes, weight=m.classes
    ),
    "divergence": lambda x, y, m: fn.kl_div(
        x.log_softmax(-1), x.detach().sin().log_softmax(-1), log_target=True, reduction="batchmean"
    ),
    "smooth": lambda x, y, m: fn.smooth_l1_loss(x, x.detach().sin(), beta=0.4),
    "huber": lambda x, y, m: fn.huber_loss(x, x.detach().sin(), delta=0.3, reduction="sum"),
}


def check(run: Callable[[Weights, Tensor], Tensor]) -> None:
    torch.compiler.reset()
    model = Weights()
    model.forward = lambda ids: run(model, ids)  # type: ignore[method-assign]
    ids = torch.randint(V, (2, 11), generator=torch.Generator().manual_seed(1))
    plan = Plan(stream=Stream(chunk=3, loss_chunk=3))
    streamed = torch.compile(model, backend=fxmem.backend(plan), fullgraph=True)
    start = {n: v.clone() for n, v in model.state_dict().items()}
    found = []
    for step in (model, streamed):
        model.load_state_dict(start)
        model.zero_grad()
        try:
            value = step(ids)
        except fxmem.FxmemError as error:
            assert error.op and error.source and error.advice, str(error)
            for name, kept in start.items():
                assert torch.equal(kept, model.state_dict()[name]), name
            return
        value.backward()
        grads = {n: p.grad.to_dense() for n, p in model.named_parameters() if p.grad is not None}
        state = {f"state {n}": b.clone() for n, b in model.state_dict().items()}
        found.append({"loss": value.detach(), **grads, **state})
    error, name = largest_difference(found[1], found[0])
    assert error < 1e-10, f"{name} differs by {error:.1e}"


REFUSED = {"embedding max norm", "batch norm", "instance norm"}
"""They write to a parameter or a buffer."""


@pytest.mark.parametrize("name", INNER)
def test_operator(name: str) -> None:
    check(inner(INNER[name]))


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name: str) -> None:
    check(loss(LOSSES[name]))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_hidden_writes_are_refused(name: str) -> None:
    with pytest.raises(fxmem.MutationError):
        torch.compiler.reset()
        model, run = Weights(), inner(INNER[name])
        step = torch.compile(lambda ids: run(model, ids), backend=fxmem.backend(), fullgraph=True)
        step(torch.zeros(2, 11, dtype=torch.int64))
