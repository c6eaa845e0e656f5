"""Streams and graphs of CUDA, where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradblend import Blender, GradBlend, TensorGrads
from networks import Network, batches, bits


@pytest.fixture
def gpu(device: str) -> str:
    if device == "cpu":
        pytest.skip("for a GPU only")
    return device


def example(device: str) -> tuple[list[TensorGrads], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    t, g, *v = (torch.randn(1000, generator=generator).to(device) for _ in range(4))
    blended = torch.zeros(1000, device=device)
    return [TensorGrads(t, g, v, blended)], blended


def test_replayed_graphs_equal_calls(gpu: str) -> None:
    blender, captured = Blender(2, device=gpu), Blender(2, device=gpu)
    tensors, blended = example(gpu)
    its, its_blended = example(gpu)
    plan, its_plan = blender.plan(tensors), captured.plan(its)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # torch's current stream is the one that captures
        captured.step(its_plan)
        captured.reweight()
    for _ in range(3):
        blender.step(plan)
        blender.reweight()
        graph.replay()
    torch.cuda.synchronize()
    assert blender.save() == captured.save()
    assert bits(blended) == bits(its_blended)


def test_training_on_another_stream_gives_the_same_bits(gpu: str) -> None:
    def run(stream: Any) -> tuple[bytes, list[list[int]]]:
        torch.manual_seed(0)
        model, data = Network(3).to(gpu), batches(3, 0, gpu)
        gb, optimizer = GradBlend(model.parameters(), 3, every=2), torch.optim.SGD(model.parameters(), lr=0.1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(6):
                optimizer.zero_grad()
                gb.backward(model.losses(next(data)), held_out=lambda: model.losses(next(data))[-1])
                optimizer.step()
            state = gb.blender.save()
        torch.cuda.synchronize()
        return state, [bits(param) for param in model.parameters()]

    assert run(torch.cuda.current_stream()) == run(torch.cuda.Stream())
