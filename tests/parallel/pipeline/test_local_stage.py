"""What a stage hands on untouched costs it nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.pipeline.boundary import TensorSpec
from parallel.pipeline.local_stage import Inbox, LocalStage, Tensors

SHAPE = (2, 3)


def _inbox() -> Inbox:
    return Inbox(None, (0,), lambda: None)


def test_of_an_input_that_is_an_output_nothing_is_kept_and_its_gradient_is_that_of_the_output() -> None:
    """Beside one that is worked on, and one without a gradient."""
    specs = TensorSpec(SHAPE), TensorSpec(SHAPE), TensorSpec(SHAPE, carries_gradient=False)
    inputs, gradients = _inbox(), _inbox()
    outputs, given_back = dict[int, Tensors](), dict[int, Tensors]()
    weight = torch.full(SHAPE, 3.0, requires_grad=True)

    def module(given: list[Tensor], _: object) -> Tensors:
        x, ride, still = given
        return ride, x * weight, still  # in another place

    stage = LocalStage(
        module, inputs=inputs, gradients=gradients, boundary_before=specs, boundary_after=specs, outputs=outputs,
        input_gradients=given_back, deferrer=None,
    )  # fmt: skip
    stage.begin([None], lambda *_: torch.zeros(()), trains=True)
    inputs.here[0] = tuple(torch.randn(SHAPE) for _ in specs)
    values = [x.clone() for x in inputs.here[0]]
    memory = [StorageWeakRef(x.untyped_storage()) for x in inputs.here[0]]
    stage.forward(0)
    assert [torch.equal(x, y) for x, y in zip(outputs.pop(0), (values[1], values[0] * 3, values[2]), strict=True)]
    assert [reference.expired() for reference in memory] == [False, True, True]
    grads = torch.randn(SHAPE), torch.randn(SHAPE)
    gradients.here[0] = grads
    stage.backward(0)
    back = given_back.pop(0)
    assert back[1] is grads[0]
    assert torch.equal(back[0], grads[1] * 3) and weight.grad is not None
    assert torch.equal(weight.grad, grads[1] * values[0])
    assert stage.end() == []
