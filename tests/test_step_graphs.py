"""Steps that are replayed, with a function run again standing in for a CUDA graph: what is kept where, and when."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_fast_moe import FAMILIES, blocks, build, tokens
from helpers_trainer import trainer
from torch import Tensor

from tunescope import accelerate_moe
from tunescope.models import fast_moe
from tunescope.models.fast_moe import AccelerateMoe
from tunescope.models.step_graphs import StepGraphs


class Rerun:
    """As a graph: capturing runs nothing that counts, replaying reads and writes the same tensors each time."""

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.num_captures += 1
        with torch.enable_grad():
            function()

        def replay() -> None:
            self.num_replays += 1
            with torch.enable_grad():
                function()

        return replay


def made(family: str = "mixtral", **settings: Any) -> tuple[Any, StepGraphs, Rerun]:
    model = build(FAMILIES[family], **settings)
    accelerate_moe(model)
    rerun = Rerun()
    stacks = [block.forward.__self__.stacks for block in blocks(model)]
    return model, StepGraphs(model, stacks, capture=rerun, max_shapes=2), rerun


def run(model: Any, ids: Tensor, scale: float = 1.0) -> float:
    loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
    (loss * scale).backward()
    return float(loss.detach())


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def check_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reentrant", [None, False])
def test_a_replayed_step_is_the_step(family: str, reentrant: bool | None) -> None:
    model, graphs, rerun = made(family, reentrant=reentrant)
    plain = build(FAMILIES[family], reentrant=reentrant)
    accelerate_moe(plain)
    for seed in range(4):
        ids = tokens(seed=seed)
        for one in (model, plain):
            one.zero_grad()
        assert run(model, ids, 0.5) == pytest.approx(run(plain, ids, 0.5), abs=1e-6)
        check_equal(gradients(model), gradients(plain))
    assert graphs.why_not is None
    assert (graphs.num_shapes, graphs.num_replays) == (1, 3)
    assert (rerun.num_captures, rerun.num_replays) == (2, 6)


def test_gradients_of_micro_batches_add_up() -> None:
    model, _, _ = made()
    plain = build(FAMILIES["mixtral"])
    for seed in range(5):  # the first runs as ever, the second is captured, and all of them are one step
        for one in (model, plain):
            run(one, tokens(seed=seed))
        check_equal(gradients(model), gradients(plain))


def test_steps_learn_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping and AdamW work on the gradients where they are, and see each step's own."""
    curves = []
    for replayed in (True, False):
        model, graphs, _ = made()
        if not replayed:
            graphs.remove()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for seed in range(12):
            losses.append(run(model, tokens(seed=seed % 3)))
            if replayed:
                graphs.clip_gradients(1.0)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)
    assert curves[0][-1] < curves[0][0]


def test_each_shape_has_its_own_graphs_and_only_so_many_do() -> None:
    model, graphs, rerun = made()
    for _ in range(3):
        for length in (8, 16, 24):
            model.zero_grad()
            run(model, tokens(length=length))
    assert graphs.num_shapes == 2
    assert rerun.num_captures == 4
    assert graphs.num_replays == 4


def test_what_cannot_be_replayed_runs_as_ever() -> None:
    model, graphs, _ = made()
    for seed in range(3):
        run(model, tokens(seed=seed))
    replays = graphs.num_replays
    ids = tokens()
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape[:2] == ids.shape
    model.eval()
    model(input_ids=ids, labels=ids).loss.backward()
    model.train()
    with model.disable_adapter():
        output = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    assert output.logits is not None
    assert graphs.num_replays == replays


def test_a_failed_capture_costs_nothing_but_itself() -> None:
    model, graphs, _ = made()

    def refuse(function: Callable[[], Any]) -> Callable[[], Any]:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphs._capture = refuse
    plain = build(FAMILIES["mixtral"])
    run(model, tokens())
    model.zero_grad()
    with pytest.warns(UserWarning, match="not permitted when stream"):
        found = run(model, tokens(seed=1))
    assert found == pytest.approx(run(plain, tokens(seed=1)), abs=1e-6)
    check_equal(gradients(model), gradients(plain))
    assert graphs.why_not == "RuntimeError: operation not permitted when stream is capturing"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, tokens(seed=2))
    assert graphs.num_replays == 0


def test_dropout_is_not_replayed() -> None:
    model = build(FAMILIES["mixtral"])
    model.get_input_embeddings().register_module("noise", torch.nn.Dropout(0.1))
    graphs = StepGraphs(model, [], capture=Rerun())
    assert "dropout" in str(graphs.why_not)
    run(model, tokens())
    run(model, tokens())
    assert graphs.num_replays == 0


def test_remove_gives_the_forward_back() -> None:
    model, graphs, _ = made()
    forward = model.forward
    for seed in range(3):
        run(model, tokens(seed=seed))
    graphs.remove()
    graphs.remove()
    assert model.forward != forward
    model.zero_grad()
    run(model, tokens())
    assert graphs.num_replays == 2
    plain = build(FAMILIES["mixtral"])
    run(plain, tokens())
    check_equal(gradients(model), gradients(plain))


@pytest.mark.parametrize("num_steps", [1, 3])  # the first runs as ever, the third is replayed
def test_clipping_is_torchs(num_steps: int) -> None:
    model, graphs, _ = made()
    plain = build(FAMILIES["mixtral"])
    for seed in range(num_steps):
        for one in (model, plain):
            one.zero_grad()
            run(one, tokens(seed=seed))
    assert graphs.num_replays == num_steps // 2 * 2
    for max_norm in (1e6, 0.01):  # which changes nothing, and which does
        wanted = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        torch.testing.assert_close(graphs.clip_gradients(max_norm), wanted, rtol=1e-5, atol=0)
        check_equal(gradients(model), gradients(plain))
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    graphs.remove()
    assert "zero_grad" not in vars(model)


def test_the_callback_clips_in_the_trainers_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With graphs the Trainer's own clipping is off while it trains, and losses are those of training without."""
    losses = []
    for graphs in (True, False):
        model = build(FAMILIES["mixtral"])
        callback = AccelerateMoe(graphs=graphs)
        if graphs:
            monkeypatch.setattr(fast_moe, "StepGraphs", partial(StepGraphs, capture=Rerun()))
            monkeypatch.setattr(fast_moe, "_is_on_gpu", lambda model: True)
        its = trainer(model, tmp_path, [callback], num_steps=8, learning_rate=3e-3, max_grad_norm=0.05, bf16=False)
        its.train()
        assert its.args.max_grad_norm == 0.05
        assert callback.accelerated is not None
        if callback.accelerated.graphs is not None:
            assert callback.accelerated.graphs.num_replays >= 4
        losses.append([entry["loss"] for entry in its.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
