"""Whatever happens while StepProfiler watches: training goes on or ends as it would, and nothing of ours stays."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers_latency import read
from helpers_trainer import BATCH, LENGTH_TOKENS, NEEDED_STEPS, hooks, llama, profiler, trainer
from transformers import TrainerCallback

from tunescope import results

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def profiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Torch's profilers that run. None can be stopped twice: by torch that is a segmentation fault in some states.

    Those that are left are stopped in the end, or no other test of this process could use one.
    """
    running: list[Any] = []

    class Profile(torch.profiler.profile):
        def start(self) -> None:
            super().start()
            running.append(self)

        def stop(self) -> None:
            assert self in running, "stopped twice"
            running.remove(self)
            super().stop()

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    yield running
    stop_all(running)


def stop_all(running: list[Any]) -> None:
    for profile in list(running):
        with contextlib.suppress(RuntimeError):  # another has taken its place
            profile.stop()


def at_step_end(step: int, act: Callable[[Any], None]) -> TrainerCallback:
    class Act(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                act(control)

    return Act()


def stop_training(control: Any) -> None:
    control.should_training_stop = True


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_training_that_somebody_else_ends(step: int, tmp_path: Path, profiles: list[Any]) -> None:
    """Early stopping, at any moment of ours."""
    model, watched = llama(), profiler(tmp_path / "profile")
    watching = trainer(model, tmp_path, [watched, at_step_end(step, stop_training)])
    watching.train()
    assert watching.state.global_step == step
    assert watched.why_not == "training ended before all steps were recorded"
    assert hooks(model) == 0
    following = profiler(tmp_path / "profile")
    trainer(llama(), tmp_path, [following]).train()
    assert (following.is_done, following.why_not) == (True, None)


def test_training_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    trainer(llama(), tmp_path, [profiler(tmp_path / "profile"), at_step_end(2, stop_training)]).train()
    assert not (tmp_path / "profile").exists() or not list((tmp_path / "profile").iterdir())


def fail(control: Any) -> None:
    raise RuntimeError("training is at fault")


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_an_exception_in_training_passes_through(step: int, tmp_path: Path, profiles: list[Any]) -> None:
    """What is left then is a folder that no table reads and the next run of the name removes."""
    folder = tmp_path / "profile"
    watched = profiler(folder)
    with pytest.raises(RuntimeError, match="training is at fault"):
        trainer(llama(), tmp_path, [watched, at_step_end(step, fail)]).train()
    assert not watched.is_done
    assert {entry.name for entry in folder.iterdir()} == {"run.unfinished"}
    trainer(llama(), tmp_path, [profiler(folder)]).train()
    assert {entry.name for entry in folder.iterdir()} == {"run"}


def test_after_an_exception_all_can_be_taken_off_the_model(tmp_path: Path, profiles: list[Any]) -> None:
    """No event tells a callback of it, so it is for the user to do, or the next run's."""
    model, watched = llama(), profiler(tmp_path / "profile")
    with pytest.raises(RuntimeError, match="training is at fault"):
        trainer(model, tmp_path, [watched, at_step_end(4, fail)]).train()
    watched.detach()
    watched.detach()
    assert (hooks(model), profiles) == (0, [])


def test_after_an_exception_the_next_run_measures(tmp_path: Path, profiles: list[Any]) -> None:
    with pytest.raises(RuntimeError, match="training is at fault"):
        trainer(llama(), tmp_path, [profiler(tmp_path / "profile"), at_step_end(3, fail)]).train()
    watched = profiler(tmp_path / "profile")
    trainer(llama(), tmp_path, [watched]).train()
    assert (watched.is_done, watched.why_not) == (True, None)


def test_a_training_begun_again_by_the_trainer_itself(tmp_path: Path, profiles: list[Any]) -> None:
    """auto_find_batch_size: out of memory once, then the whole training again with half the batch."""
    model, forwards = llama(), [0]

    def out_of_memory_once(*_: Any) -> None:
        forwards[0] += 1
        if forwards[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(out_of_memory_once)
    watched = profiler(tmp_path / "profile")
    trainer(model, tmp_path, [watched], auto_find_batch_size=True).train()
    assert (watched.is_done, watched.why_not) == (True, None)
    assert hooks(model) == 1


def test_another_profiler_keeps_what_it_has_and_ours_says_why_there_is_nothing(tmp_path: Path) -> None:
    model, watched = llama(), profiler(tmp_path / "profile")
    watching = trainer(model, tmp_path, [watched])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as other:
        watching.train()
    assert watching.state.global_step == NEEDED_STEPS + 2
    assert len(other.events()) > 1000
    assert "profiler" in (watched.why_not or "")
    assert hooks(model) == 0


def test_two_of_ours_in_one_training_do_not_lose_one_without_a_word(tmp_path: Path) -> None:
    watched = [profiler(tmp_path / "profile", name=name) for name in ("a", "b")]
    trainer(llama(), tmp_path, watched).train()
    assert [one.is_done or one.why_not is not None for one in watched] == [True, True]
    assert not list((tmp_path / "profile").glob("*.unfinished"))


def test_a_profiler_that_begins_and_ends_within_ours_costs_no_training(tmp_path: Path) -> None:
    """Theirs takes torch's one profiler away; ours gives up and says so."""

    class Theirs(TrainerCallback):
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                self.profile.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6:
                self.profile.stop()

    model, watched = llama(), profiler(tmp_path / "profile")
    watching = trainer(model, tmp_path, [watched, Theirs()])
    watching.train()
    assert watching.state.global_step == NEEDED_STEPS + 2
    assert not watched.is_done
    assert "rofiler" in (watched.why_not or "")
    assert hooks(model) == 0


def test_an_infinite_setting_of_the_trainer_costs_no_training(tmp_path: Path) -> None:
    """max_grad_norm=inf is how to see the norm without clipping."""
    watched = profiler(tmp_path / "profile")
    watching = trainer(llama(), tmp_path, [watched], max_grad_norm=float("inf"))
    watching.train()
    assert watched.is_done


class Regression(torch.nn.Module):
    """A model of somebody who trains no language model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return {"loss": torch.nn.functional.mse_loss(x.sum(dim=-1), labels), "logits": x}


def test_a_model_without_token_ids_can_be_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    watched = profiler(tmp_path / "profile")
    watching = trainer(Regression(), tmp_path, [watched])
    rows = {"x": torch.randn(16, 8).tolist(), "labels": torch.randn(16).tolist()}
    watching.train_dataset = Dataset.from_dict(rows)
    watching.train()
    assert watching.state.global_step == NEEDED_STEPS + 2


def test_evaluation_between_steps_is_no_part_of_them(tmp_path: Path) -> None:
    watched = profiler(tmp_path / "profile")
    trainer(llama(), tmp_path, [watched], eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=8).train()
    assert watched.is_done
    steps = read(tmp_path / "profile" / "run", results.STEPS_FILE)
    assert steps["tokens"].tolist() == [BATCH * LENGTH_TOKENS] * 3
    assert steps["micro_steps"].tolist() == [1] * 3
