"""One model type of transformers in a small configuration: exact, how much streams, how many bytes.

``python -m benchmarks.coverage_case KIND TYPE`` prints one JSON object. Run it through
:mod:`benchmarks.coverage`, which gives every type a process and a time limit.
"""

from __future__ import annotations

import copy
import json
import math
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import fxmem
from fxmem import Plan, Stream
from fxmem.measure.live import peak_bytes

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
import double  # noqa: E402
import zoo  # noqa: E402

TOLERANCE, CHUNK, LONG = 1e-10, 7, 256
Batch = dict[str, Tensor]


def text(length: int, padded: bool) -> Batch:
    return zoo.batch(length, padded=padded)


def text_pair(length: int, padded: bool) -> Batch:
    """What an encoder reads and what a decoder writes, of other lengths."""
    return {
        **zoo.batch(length, padded=padded),
        "labels": zoo.batch(length - 4, padded=False)["labels"],
    }


def text_beside(length: int, padded: bool) -> Batch:
    """Text for models that do not train without an image."""
    pixels = images(length, padded)["pixel_values"]
    return {**zoo.batch(length, padded=padded), "pixel_values": pixels}


def images(length: int, padded: bool) -> Batch:
    """As many images as rows of text; ``length`` seeds them."""
    made = torch.Generator().manual_seed(length)
    pixels = torch.randn(2, 3, zoo.IMAGE, zoo.IMAGE, generator=made, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


Make = Callable[[int, bool], Batch]
KINDS: dict[str, tuple[str, Any, tuple[Make, ...]]] = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", tf.AutoModelForCausalLM, (text,)),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", tf.AutoModelForMaskedLM, (text,)),
    "encoder-decoder": (
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", tf.AutoModelForSeq2SeqLM,
        (text_pair, text),
    ),
    "image": (
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", tf.AutoModelForImageClassification,
        (images,),
    ),
    "vision-language": (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", tf.AutoModelForImageTextToText,
        (text, text_beside),
    ),
}  # fmt: skip
"""The table of transformers that lists the types, what builds one, and inputs, of which the first
that train are used. Vision-language models are trained on text here where they can be: their towers
are those of the images.
"""


def types(kind: str) -> list[str]:
    """Every model type of a kind."""
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, KINDS[kind][0]))


def step(net: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients that there are."""
    net.zero_grad()
    loss = net(**inputs).loss
    loss.backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return loss.item(), grads


def cases(kind: str, name: str) -> Iterator[dict[str, Any]]:
    """``status`` and what belongs to it; then the same with peaks, which may take long."""
    _, family, makes = KINDS[kind]
    with double.everything_in_double():
        try:
            torch.manual_seed(0)
            net = family.from_config(zoo.config(name)).double().train(name not in zoo.EVALUATED)
            for p in net.parameters():
                p.data.add_(torch.randn_like(p) * 0.05)
            checkpointed = copy.deepcopy(net)  # now: some keep states of their latest step
            make, want = _trains(net, makes)
        except Exception as error:
            yield {"status": "does not train in plain PyTorch", "reason": _line(error)}
            return
        if any(math.isnan(loss) for _, (loss, _) in want):
            yield {"status": "NaN in plain PyTorch"}
            return
        fxmem.transform(net, Plan(stream=Stream(chunk=CHUNK, loss_chunk=5)))
        try:
            worst = max(_difference(step(net, inputs), w) for inputs, w in want)
        except Exception as error:
            yield {"status": "stopped", "reason": _line(error)}
            return
        report = fxmem.explain(net)
        found = {
            "status": "exact" if worst <= TOLERANCE else _wrong(net, checkpointed, want),
            "difference": worst,
            "bodies": report.executed_bodies, "pieces": len(report.pieces),
            "barriers": sorted({b.op for b in report.barriers}),
            "reasons": sorted({_cause(p.reason) for p in report.pieces}),
        }  # fmt: skip
        yield found
        yield {**found, **_bytes(net, checkpointed, make(LONG // 2, False))}


def _wrong(net: nn.Module, plain: nn.Module, want: Sequence[Any]) -> str:
    """Whether ``torch.compile`` alone gives what streaming gives: code that asks if it is compiled
    (a mask that is left out if not) may say another thing then.
    """
    other = copy.deepcopy(plain)
    other.compile(backend="eager")
    worst = max(_difference(step(net, inputs), step(other, inputs)) for inputs, _ in want)
    return "exact, to torch.compile" if worst <= TOLERANCE else "wrong"


def _trains(net: nn.Module, makes: Sequence[Make]) -> tuple[Make, list[Any]]:
    """The first inputs that the model trains on, and its steps."""
    make, *others = makes
    try:
        return make, [_plain(net, inputs) for inputs in (make(23, False), make(37, True))]
    except Exception:
        if not others:
            raise
        return _trains(net, others)


def _plain(net: nn.Module, inputs: Batch) -> tuple[Batch, tuple[float, dict[str, Tensor]]]:
    """Without the mask where the model cannot take a row that is padded on the left."""
    found = step(net, inputs)
    if math.isnan(found[0]) and "attention_mask" in inputs:
        inputs = {k: inputs["input_ids"] for k in ("input_ids", "labels")}
        found = step(net, inputs)
    return inputs, found


def _difference(got: tuple[float, Any], want: tuple[float, Any]) -> float:
    if got[1].keys() != want[1].keys():
        return math.inf
    apart = abs(got[0] - want[0]) / max(abs(want[0]), 1e-300)
    return max(apart, double.largest_difference(got[1], want[1])[0])


def _bytes(net: nn.Module, plain: Any, inputs: Batch) -> dict[str, Any]:
    """Peaks of a step, streamed and with every layer checkpointed where the model can do that."""
    found: dict[str, Any] = {}
    try:
        plain.gradient_checkpointing_enable({"use_reentrant": False})
        for name, one in (("checkpointed", plain), ("streamed", net)):
            step(one, inputs)
            found[name] = peak_bytes(lambda one=one: step(one, inputs))  # type: ignore[misc]
    except Exception as error:
        return {"unmeasured": _line(error)}
    return found


def _cause(reason: str) -> str:
    """The line of code for which a piece runs as it is, as code, or the reason itself."""
    code = re.search(r'File "[^"]*", line \d+, in \S+ +(.*)', reason.split("\n")[0])
    return f"`{code[1]}`" if code else reason


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def run(kind: str, name: str, sends: Connection | None = None, seconds: float = math.inf) -> None:
    """The rows of :func:`cases`, sent or printed, in so many seconds of a processor."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if seconds < math.inf:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), resource.RLIM_INFINITY))
    for row in cases(kind, name):
        sends.send(row) if sends else print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run(*sys.argv[1:3])
