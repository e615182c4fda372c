"""How many layers need not be recomputed: the choice, its numbers against counted tensors, and the launches saved."""

from collections import Counter
from typing import Any

import pytest
import torch
from helpers_fast_moe import FAMILIES, MIXTRAL, TARGETS, blocks, build
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tunescope import accelerate_moe
from tunescope.accelerate import grouped_layer, step_memory
from tunescope.cost import memory
from tunescope.cost.memory_shapes import Batch, read_decoder, read_setup
from tunescope.families.mixtral import MIXTRAL_8X7B
from tunescope.hardware import GIB
from tunescope.kernels import nf4
from tunescope.models import fast_moe_ops, fast_moe_wide
from tunescope.models.fast_moe_recompute import StepMemory, choose_checkpointed_layers

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = {
    "finetuning_type": "lora",
    "quantization_bit": 4,
    "bf16": True,
    "optim": "adamw_torch",
    "lora_rank": 16,
    "lora_target": "w1,w2,w3,gate",
}

num_bytes = st.integers(0, 2**40)
memories = st.builds(
    StepMemory,
    room_bytes=num_bytes,
    saved_bytes=num_bytes,
    input_bytes=num_bytes,
    moments_bytes=st.fixed_dictionaries({"loss": num_bytes, "optimizer": num_bytes}),
    growing=st.just(frozenset(["loss"])),
)


@given(st.integers(0, 80), memories)
def test_as_few_layers_as_will_do_and_the_first_ones(num_layers: int, step: StepMemory) -> None:
    chosen = choose_checkpointed_layers(num_layers, step)
    assert chosen == tuple(range(len(chosen)))
    kept = num_layers - len(chosen)
    assert kept == 0 or step.peak_bytes(kept) <= step.room_bytes
    assert kept == num_layers or step.peak_bytes(kept + 1) > step.room_bytes


def test_a_moment_that_does_not_grow_hides_layers_below_it() -> None:
    step = StepMemory(
        room_bytes=100, saved_bytes=12, input_bytes=2, moments_bytes={"loss": 50, "optimizer": 90},
        growing=frozenset(["loss"]),
    )  # fmt: skip
    assert [step.peak_bytes(kept) for kept in (0, 4, 5, 6)] == [90, 90, 100, 110]
    assert choose_checkpointed_layers(8, step) == (0, 1, 2)


def test_mixtral_on_large_and_small_gpus() -> None:
    """Top-2, 128 tokens. The study's GPU has 48 GB, the largest here 141."""
    sparse = MIXTRAL_8X7B | {"num_experts_per_tok": 2}

    def num_recomputed(batch_size: int, gib: float) -> int:
        step = step_memory(sparse, RECIPE, batch_size, 128, int(gib * GIB), is_masked=False)
        return len(choose_checkpointed_layers(32, step))

    assert num_recomputed(1, 139.8) == num_recomputed(32, 139.8) == 0
    assert num_recomputed(1, 24) == 32  # the weights alone are 22.8 GiB
    counts = [num_recomputed(batch_size, 44.4) for batch_size in (1, 8, 16, 24, 32, 48)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] > 0
    # What the whole step takes without recomputing any, against a measured program of the same kind: 57 GiB.
    step = step_memory(sparse, RECIPE, 32, 128, int(139.8 * GIB), is_masked=False)
    assert 40 * GIB < step.peak_bytes(32) < 57 * GIB


def test_auto_switches_the_last_layers() -> None:
    model = build(MIXTRAL | {"num_hidden_layers": 4}, reentrant=False)
    step = StepMemory(
        room_bytes=25, saved_bytes=11, input_bytes=1, moments_bytes={"loss": 5}, growing=frozenset(["loss"])
    )
    accelerated = accelerate_moe(model, recompute="auto", step_memory=step)
    assert accelerated.checkpointed_layers == (0, 1)
    layers = model.base_model.model.model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [True, True, False, False]
    accelerated.restore()
    assert all(layer.gradient_checkpointing for layer in layers)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("targets", [None, ["w1"], ["w1", "w3", "w2"]], ids=["all", "w1", "no router"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layer_keeps_to_the_byte(family: str, targets: list[str] | None, top_k: int) -> None:
    """Counted by autograd's hooks in a block: under autocast, as training runs."""
    config = FAMILIES[family] | {"num_experts_per_tok": top_k}
    names = TARGETS[config["model_type"]]
    if targets is not None:
        targets = [dict(zip(("w1", "w2", "w3", "gate"), names, strict=True))[name] for name in targets]
    model = build(config, targets=targets, dtype=torch.bfloat16)
    accelerate_moe(model)
    block = blocks(model)[0]
    hidden = torch.randn(2, 24, config["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # PEFT asks whether CUDA's autocast is on, and would cast inputs to and fro.
        real, torch.is_autocast_enabled = torch.is_autocast_enabled, lambda *device: True
        try:
            out = block(hidden)
        finally:
            torch.is_autocast_enabled = real
    recipe = RECIPE | {"lora_rank": 8, "lora_target": ",".join(targets or names)}
    shape = read_decoder(config)
    setup = read_setup(recipe, shape.linears)
    saved = grouped_layer(shape, setup, Batch(2, 24, is_masked=False)).saved
    router_copies = 8 * (config["hidden_size"] + shape.num_experts) * 2 if setup.is_adapted(shape.router[0]) else 0
    counted = sum(tensor.untyped_storage().nbytes() for address, tensor in seen.items() if address not in weights)
    assert out[0].requires_grad
    assert counted == saved["router"] + saved["experts"] + router_copies


def test_grouped_layers_keep_less_and_the_step_is_as_predicted_elsewhere() -> None:
    sparse = MIXTRAL_8X7B | {"num_experts_per_tok": 2}
    shape = read_decoder(sparse)
    setup = read_setup(RECIPE, shape.linears)
    batch = Batch(32, 128, is_masked=False)
    stock = memory.kept_bytes(sparse, RECIPE | {"disable_gradient_checkpointing": True}, 32, 128, is_masked=False)
    assert grouped_layer(shape, setup, batch).saved_bytes * 32 < 0.65 * stock
    step = step_memory(sparse, RECIPE, 32, 128, 2**40, is_masked=False)
    moments = memory.memory_terms(sparse, RECIPE, 32, 128, is_masked=False)
    assert step.moments_bytes[memory.OPTIMIZER] == sum(moments[memory.OPTIMIZER].values())


_NOT_LAUNCHED = {
    "view", "_unsafe_view", "t", "transpose", "unsqueeze", "slice", "select", "as_strided", "unbind", "detach",
    "expand", "alias", "split", "permute", "squeeze", "empty", "empty_like", "new_empty", "empty_strided",
    "_reshape_alias", "new_empty_strided",
}  # fmt: skip
_WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}


class _Launches(TorchDispatchMode):
    """Counts operators that launch a kernel on a GPU; a kernel of this project counts as one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self._is_inside = False
        for module, name in (
            (fast_moe_ops, "gated_silu"), (fast_moe_ops, "gated_silu_backward"), (fast_moe_ops, "gather_sum"),
            (nf4, "grouped_linear_nf4"), (nf4, "grouped_linear_nf4_dx"), (fast_moe_wide, "dequantize"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, self._as_one(getattr(module, name)))

    def _as_one(self, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.names[function.__name__] += 1
            self._is_inside = True
            try:
                return function(*args, **kwargs)
            finally:
                self._is_inside = False

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not self._is_inside and name not in _NOT_LAUNCHED:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("written_out", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_few_launches_whatever_the_number_of_experts_and_none_that_waits(
    family: str, written_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of the stock path has 339 and 475 of them with 8 experts, 651 and 923 with 16."""
    real = fast_moe_wide.is_wide
    monkeypatch.setattr(fast_moe_wide, "is_wide", real if written_out else lambda *args: False)
    model = build(FAMILIES[family], dtype=torch.bfloat16)
    accelerate_moe(model)
    block = blocks(model)[0]
    hidden = torch.randn(2, 24, 64, dtype=torch.bfloat16, requires_grad=True)
    forward, backward = _Launches(monkeypatch), None
    with torch.autocast("cpu", torch.bfloat16), forward:
        out, logits = block(hidden)
    monkeypatch.undo()
    monkeypatch.setattr(fast_moe_wide, "is_wide", real if written_out else lambda *args: False)
    backward = _Launches(monkeypatch)
    gradients = [torch.randn_like(out), torch.randn_like(logits)]
    with backward:
        torch.autograd.backward([out, logits], gradients)
    assert sum(forward.names.values()) < (50 if written_out else 40), forward.names
    assert sum(backward.names.values()) < (70 if written_out else 60), backward.names
    names = ("dequantize", "dequantize") if written_out else ("grouped_linear_nf4", "grouped_linear_nf4_dx")
    assert [forward.names[names[0]], backward.names[names[1]]] == [3, 3]
    assert not (forward.names.keys() | backward.names.keys()) & _WAITS
