"""What grouped experts refuse, and that a refused model is as it was."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from helpers_fast_moe import MIXTRAL, blocks, build, step, tokens
from torch import nn

from tunescope import accelerate_moe
from tunescope.errors import UserError
from tunescope.models import fast_moe
from tunescope.models.fast_moe_stacks import ExpertStacks

pytestmark = pytest.mark.usefixtures("one_thread")


def expert(model: Any, number: int = 1) -> Any:
    return blocks(model)[1].experts[number]


def add_second(model: Any) -> None:
    model.add_adapter("second", peft.LoraConfig(r=8, target_modules=["w1", "w2", "w3"]))
    model.base_model.set_adapter(["default", "second"])


def unadapt_one(model: Any) -> None:
    expert(model).w1 = expert(model).w1.base_layer


def give_bias(model: Any) -> None:
    expert(model).w1.base_layer.bias = nn.Parameter(torch.zeros(128), requires_grad=False)


def move_elsewhere(model: Any) -> None:
    expert(model, 0).w1.lora_A["default"].to("meta")


def wrap_forward(model: Any) -> None:
    expert(model).w2.base_layer.forward = lambda x: x


def replace_forward(model: Any) -> None:
    blocks(model)[1].forward = lambda x: (x, x)


def shard(model: Any) -> None:
    weight = expert(model).w3.base_layer.weight
    weight.data = weight.data[: len(weight.data) // 2]


def pack_for_inference(model: Any) -> None:
    expert(model).w3.base_layer.weight.quant_state.packing_format_for_cpu = True


REFUSED: list[Any] = [
    pytest.param({"lora_dropout": 0.1}, None, "drops out 0.1", id="dropout"),
    pytest.param({"use_dora": True}, None, "variant of LoRA", id="dora"),
    pytest.param({"lora_bias": True, "init_lora_weights": True}, None, "bias", id="bias of an adapter"),
    pytest.param({"rank_pattern": {"w1": 4}}, None, "ranks and scalings differ", id="gate and up of two ranks"),
    pytest.param(
        {"rank_pattern": {"layers.0.*experts.2.w2": 4}}, None, "different adapters", id="experts of two ranks"
    ),
    pytest.param({}, add_second, "2 adapters are active", id="two active adapters"),
    pytest.param({}, lambda model: model.merge_adapter(), "is merged", id="merged"),
    pytest.param({}, unadapt_one, "7 of 8 experts have an adapter", id="adapter missing"),
    pytest.param({}, give_bias, "it has a bias", id="bias"),
    pytest.param({}, move_elsewhere, "different devices", id="another device"),
    pytest.param({}, wrap_forward, "its forward was replaced", id="wrapped linear"),
    pytest.param({}, replace_forward, "its forward was replaced", id="wrapped block"),
    pytest.param({}, shard, "sharded weights", id="sharded"),
    pytest.param({}, pack_for_inference, "packed it for inference", id="packed"),
    pytest.param({}, lambda model: setattr(blocks(model)[0], "jitter_noise", 0.1), "noise", id="jitter"),
    pytest.param({}, lambda model: setattr(expert(model), "act_fn", nn.GELU()), "not SiLU", id="activation"),
    pytest.param({}, lambda model: expert(model).w1.lora_B["default"].to(torch.bfloat16), "dtypes", id="dtype"),
    pytest.param(
        {"quantised": False},
        lambda model: expert(model).w1.base_layer.requires_grad_(),
        "is trained",
        id="trained base",
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("settings", "spoil", "message"), REFUSED)
def test_refused_and_untouched(settings: dict[str, Any], spoil: Callable[[Any], None] | None, message: str) -> None:
    model = build(MIXTRAL, **settings)
    if spoil is not None:
        spoil(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters() if not parameter.is_meta]
    with pytest.raises(UserError) as refusal:
        accelerate_moe(model)
    assert message in str(refusal.value)
    assert "Cause:" in str(refusal.value)
    assert [parameter.data_ptr() for parameter in model.parameters() if not parameter.is_meta] == addresses
    if spoil is not replace_forward:
        assert not any("forward" in vars(block) for block in blocks(model))


def replace_adapter(model: Any) -> None:
    expert(model).w1.lora_A["default"].weight = nn.Parameter(torch.zeros(8, 64))


def move_data(model: Any) -> None:
    parameter = expert(model).w2.lora_B["default"].weight
    parameter.data = parameter.data.clone()


def move_weight(model: Any) -> None:
    weight = expert(model).w2.base_layer.weight
    weight.data = weight.data.clone()


CHANGES: list[Any] = [
    pytest.param(lambda model: model.merge_adapter(), "replaced or moved", id="merged"),
    pytest.param(lambda model: model.merge_and_unload(), "replaced or moved", id="unloaded"),
    pytest.param(replace_adapter, "adapters were replaced", id="replaced adapter"),
    pytest.param(move_data, "adapters were replaced or moved", id="moved adapter"),
    pytest.param(move_weight, "replaced or moved", id="moved weight"),
    pytest.param(add_second, "another adapter", id="another adapter"),
    pytest.param(lambda model: expert(model).w3.set_scale("default", 2.0), "another scaling", id="scaling"),
    pytest.param(lambda model: expert(model).w3.enable_adapters(False), "some experts' adapters", id="one disabled"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_model_changed_afterwards_is_not_computed_wrongly(change: Callable[[Any], Any], message: str) -> None:
    model = build(MIXTRAL)
    accelerated = accelerate_moe(model)
    changed = change(model)
    with pytest.raises(UserError, match=message):
        model(input_ids=tokens())
    accelerated.restore()
    whole = changed if isinstance(changed, nn.Module) else model
    stock = whole(input_ids=tokens()).logits
    assert torch.isfinite(stock).all()


def test_twice_and_a_model_of_another_kind() -> None:
    model = build(MIXTRAL)
    accelerated = accelerate_moe(model)
    with pytest.raises(UserError, match="grouped already"):
        accelerate_moe(model)
    accelerated.restore()
    accelerate_moe(model).restore()
    with pytest.raises(UserError, match="no MoE block"):
        accelerate_moe(nn.Linear(3, 3))
    with pytest.raises(UserError, match="recompute='some'"):
        accelerate_moe(model, recompute="some")
    with pytest.raises(UserError, match="step_memory"):
        accelerate_moe(model, recompute="auto")


def test_what_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out."""
    model = build(MIXTRAL)
    wanted = model(input_ids=tokens()).logits
    made = []

    def stacks(*linears: Any) -> Any:
        made.append(ExpertStacks(*linears))
        if len(made) == 2:
            raise torch.OutOfMemoryError("no")
        return made[-1]

    stacks.check = ExpertStacks.check  # type: ignore[attr-defined]
    monkeypatch.setattr(fast_moe, "ExpertStacks", stacks)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate_moe(model)
    assert not any("forward" in vars(block) for block in blocks(model))
    assert torch.equal(model(input_ids=tokens()).logits, wanted)


def test_a_block_that_transformers_listened_to_is_not_refused() -> None:
    """Asked for router logits, it leaves a block's own forward as an attribute of the block."""
    model = build(MIXTRAL)
    step(model, tokens(), output_router_logits=True)
    assert "forward" in vars(blocks(model)[0])
    wanted = model(input_ids=tokens()).logits
    accelerated = accelerate_moe(model)
    out = model(input_ids=tokens(), output_router_logits=True)
    torch.testing.assert_close(out.logits, wanted, rtol=1e-4, atol=1e-5)
    accelerated.restore()
    assert torch.equal(model(input_ids=tokens()).logits, wanted)
