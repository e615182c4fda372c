"""Grouped experts against the stock path of transformers, PEFT and bitsandbytes: the same numbers, the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_fast_moe import (
    FAMILIES,
    MIXTRAL,
    QWEN3,
    assert_alike,
    blocks,
    both_ways,
    build,
    gradients,
    routed,
    step,
    tokens,
)
from helpers_trainer import trainer
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.checkpoint import checkpoint

from tunescope import accelerate_moe
from tunescope.models import fast_moe_function, fast_moe_wide
from tunescope.models.fast_moe import AccelerateMoe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, params=[True, False], ids=["written out", "decoded in the product"])
def written_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways with 4-bit weights, of which a CPU would take one only."""
    if not request.param:
        monkeypatch.setattr(fast_moe_wide, "is_wide", lambda *args: False)
    return bool(request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_all_gradients_equal_the_stock_paths(family: str) -> None:
    """Loss with the routers' balance in it, logits, router logits; adapters of experts and routers, and the input."""
    model = build(FAMILIES[family])
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()

    def run() -> tuple[Any, dict[str, torch.Tensor]]:
        embedded.grad = None
        model.zero_grad()
        out = model(inputs_embeds=embedded, labels=tokens(), output_router_logits=True)
        out.loss.backward()
        return out, gradients(model) | {"input": embedded.grad.clone()}

    (stock, wanted), (grouped, found) = both_ways(model, accelerate_moe, run)
    torch.testing.assert_close(grouped.loss, stock.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grouped.aux_loss, stock.aux_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(grouped.logits, stock.logits, rtol=1e-4, atol=1e-5)
    assert len(grouped.router_logits) == len(stock.router_logits) == 2
    for one, other in zip(grouped.router_logits, stock.router_logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert sum("lora_" in name for name in wanted) == 2 * (3 * len(blocks(model)[0].experts) + 1) * 2
    assert_alike(found, wanted)


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        pytest.param({"quantised": False}, MIXTRAL, id="not quantised"),
        pytest.param({"nested": False}, MIXTRAL, id="scales not nested"),
        pytest.param({"quant_type": "fp4"}, MIXTRAL, id="fp4"),
        pytest.param({"storage": torch.bfloat16}, MIXTRAL, id="stored as bf16"),
        pytest.param({"storage": torch.float32}, QWEN3, id="stored as fp32"),
        pytest.param({"targets": ["w1"]}, MIXTRAL, id="w1 alone"),
        pytest.param({"targets": ["w3", "w2"]}, MIXTRAL, id="w3 and w2"),
        pytest.param({"targets": ["w1", "w3"]}, MIXTRAL, id="w1 and w3"),
        pytest.param({"targets": ["q_proj", "gate"]}, MIXTRAL, id="attention and router"),
        pytest.param({"r": 3, "use_rslora": True}, MIXTRAL, id="odd rank"),
        pytest.param({}, QWEN3 | {"norm_topk_prob": False}, id="not normalised"),
        pytest.param({}, MIXTRAL | {"num_experts_per_tok": 8}, id="all experts"),
        pytest.param({}, MIXTRAL | {"num_experts_per_tok": 1}, id="one expert"),
        pytest.param({"rank_pattern": {"w2": 16}, "alpha_pattern": {"w2": 4}}, MIXTRAL, id="w2 of another rank"),
    ],
)
def test_every_kind_of_model_that_is_not_refused(settings: dict[str, Any], config: dict[str, Any]) -> None:
    model = build(config, **settings)
    (stock, wanted), (grouped, found) = both_ways(model, accelerate_moe, lambda: step(model, tokens()))
    torch.testing.assert_close(grouped.logits, stock.logits, rtol=1e-4, atol=1e-5)
    assert_alike(found, wanted)


@pytest.mark.parametrize("case", ["an expert without tokens", "two experts take all", "one token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_routing(family: str, case: str) -> None:
    config = FAMILIES[family] | {"num_experts_per_tok": 2}
    model = build(config)
    bias_E = torch.zeros(len(blocks(model)[0].experts))
    if case == "an expert without tokens":
        bias_E[3] = -1e4
    elif case == "two experts take all":
        bias_E[[1, 6]] = 100.0
    ids = tokens(1, 1) if case == "one token" else tokens()

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        return logits, gradients(model)

    with routed(model, bias_E):
        (stock, wanted), (grouped, found) = both_ways(model, accelerate_moe, run)
    torch.testing.assert_close(grouped, stock, rtol=1e-4, atol=1e-5)
    assert_alike(found, wanted)
    idle = [name for name, gradient in found.items() if "experts" in name and not gradient.any()]
    least = {"an expert without tokens": 1, "two experts take all": len(bias_E) - 2, "one token": len(bias_E) - 4}
    assert len(idle) >= 6 * least[case]


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_with_autocast_is_as_near_to_fp32_as_the_stock_path(family: str) -> None:
    """As LLaMA-Factory trains: bf16 weights, fp32 adapters. Bf16 rounds both paths at different places."""
    exact_model = build(FAMILIES[family])
    _, exact_gradients = step(exact_model, tokens())
    model = build(FAMILIES[family], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}

    def run() -> tuple[Any, dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, tokens())

    (stock, wanted), (grouped, found) = both_ways(model, accelerate_moe, run)
    assert grouped.logits.dtype == stock.logits.dtype
    assert abs(grouped.loss - stock.loss) < 0.01 * stock.loss

    def error(gradient: dict[str, torch.Tensor]) -> float:
        """Over all experts: single ones change where bf16 tips a router's choice."""
        names = [name for name in gradient if "experts" in name]
        wrong = sum(float((gradient[name] - exact_gradients[name]).norm()) ** 2 for name in names)
        return (wrong / sum(float(exact_gradients[name].norm()) ** 2 for name in names)) ** 0.5

    assert error(found) < 1.2 * error(wanted) + 0.01
    assert all(found[name].dtype == wanted[name].dtype for name in wanted)


def test_autocast_to_another_dtype_than_the_weights_are_multiplied_in() -> None:
    """bitsandbytes keeps its own, fp32 here, and so do the grouped experts with their adapters."""
    model = build(MIXTRAL)

    def run() -> tuple[Any, dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, tokens())

    (stock, wanted), (grouped, found) = both_ways(model, accelerate_moe, run)
    assert abs(grouped.loss - stock.loss) < 0.01 * stock.loss
    assert all(found[name].dtype == wanted[name].dtype == torch.float32 for name in wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_gradient_checkpointing(
    family: str, reentrant: bool, written_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same gradients; the down projection is not computed again, for nothing reads what it would give.

    Where weights are written out, those of a recompute serve its backward: as many are as without a recompute.
    """
    model = build(FAMILIES[family], reentrant=reentrant)
    stock, wanted = step(model, tokens())
    linears = []
    module, name = (fast_moe_wide, "dequantize") if written_out else (fast_moe_function, "linear")
    real = getattr(module, name)
    monkeypatch.setattr(module, name, lambda base, *args: (linears.append(base), real(base, *args))[1])
    accelerated = accelerate_moe(model)
    assert accelerated.checkpointed_layers == (0, 1)
    grouped, found = step(model, tokens())
    torch.testing.assert_close(grouped.loss, stock.loss, rtol=1e-6, atol=0)
    assert_alike(found, wanted)
    assert len(linears) == 2 * (3 + 2 + written_out)

    accelerated.restore()
    linears.clear()
    accelerated = accelerate_moe(model, recompute="none")
    assert accelerated.checkpointed_layers == ()
    grouped, found = step(model, tokens())
    assert_alike(found, wanted)
    assert len(linears) == 2 * 3 * (1 + written_out)
    accelerated.restore()
    assert [layer.gradient_checkpointing for layer in model.base_model.model.model.layers] == [True, True]


@pytest.mark.parametrize(("outer", "inner"), [(True, True), (True, False), (False, True), (False, False)])
def test_checkpoints_in_a_checkpoint(outer: bool, inner: bool) -> None:
    """Then a forward inside backward may be one whose output is needed."""
    model = build(MIXTRAL, reentrant=inner)
    embedded = model.get_input_embeddings()(tokens()).detach().requires_grad_()

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        whole = lambda x: model(inputs_embeds=x).logits  # noqa: E731
        logits = checkpoint(whole, embedded, use_reentrant=outer)
        logits.square().mean().backward()
        return logits, gradients(model)

    (stock, wanted), (grouped, found) = both_ways(model, accelerate_moe, run)
    torch.testing.assert_close(grouped, stock, rtol=1e-4, atol=1e-5)
    assert all(gradient.any() for gradient in wanted.values())
    assert_alike(found, wanted)


def test_accumulated_gradients_are_the_sum() -> None:
    model = build(MIXTRAL)
    parts = [step(model, tokens(1, 16, seed))[1] for seed in (1, 2)]
    accelerate_moe(model)
    model.zero_grad()
    for seed in (1, 2):
        model(input_ids=tokens(1, 16, seed), labels=tokens(1, 16, seed)).loss.backward()
    assert_alike(gradients(model), {name: parts[0][name] + parts[1][name] for name in parts[0]})


def test_gradients_are_taken_over_without_a_copy() -> None:
    model = build(MIXTRAL)
    accelerate_moe(model)
    step(model, tokens())  # zero_grad, then one backward
    experts = blocks(model)[0].experts
    for name in ("w1", "w2", "w3"):
        for side in ("lora_A", "lora_B"):
            grads = [getattr(getattr(expert, name), side)["default"].weight.grad for expert in experts]
            assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_of_training_give_the_same_losses(family: str) -> None:
    losses: dict[str, list[float]] = {}
    trained: dict[str, dict[str, torch.Tensor]] = {}
    for path in ("stock", "grouped"):
        model = build(FAMILIES[family], reentrant=False)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        if path == "grouped":
            accelerate_moe(model)
        losses[path] = []
        for number in range(20):
            ids = tokens(2, 24, number % 4)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[path].append(float(loss.detach()))
        trained[path] = get_peft_model_state_dict(model)
    assert losses["stock"][-1] < losses["stock"][0] - 0.1
    torch.testing.assert_close(losses["grouped"], losses["stock"], rtol=1e-3, atol=0)
    assert losses["grouped"][:2] == pytest.approx(losses["stock"][:2], rel=1e-6)
    assert trained["grouped"].keys() == trained["stock"].keys()


def test_the_model_stays_what_it_was_and_restoring_gives_its_memory_back() -> None:
    model = build(MIXTRAL, storage=torch.bfloat16)  # as LLaMA-Factory stores it
    named = dict(model.named_parameters())
    identities = [id(parameter) for parameter in model.parameters()]

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        """Packed weights seen as bf16 have NaNs, which do not equal themselves."""
        return tensor.flatten().view(torch.uint8)

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = step(model, tokens())

    def storages() -> list[int]:
        found = []
        for expert in blocks(model)[0].experts:
            for linear in (expert.w1, expert.w2, expert.w3):
                weight = linear.base_layer.weight
                found += [weight.data, weight.quant_state.absmax, weight.quant_state.state2.absmax]
                found += [linear.lora_A["default"].weight.data, linear.lora_B["default"].weight.data]
        addresses = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
        assert sum(tensor.numel() * tensor.itemsize for tensor in found) <= sum(addresses.values())
        return [sum(addresses.values()), len(addresses)]

    num_bytes, pieces = storages()
    accelerated = accelerate_moe(model)
    assert accelerated.num_blocks == 2
    assert storages() == [pytest.approx(num_bytes, rel=0.01), 3 * 3 + 1]
    for _ in range(2):
        assert [id(parameter) for parameter in model.parameters()] == identities
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(bits(tensor), bits(state[name])) for name, tensor in model.state_dict().items())
        accelerated.restore()
    assert storages() == [num_bytes, pieces]
    assert all(parameter is named[name] for name, parameter in model.named_parameters())
    assert not any("forward" in vars(block) for block in blocks(model))
    again = step(model, tokens())
    assert torch.equal(again[0].logits, wanted[0].logits)
    assert all(torch.equal(again[1][name], wanted[1][name]) for name in wanted[1])


def test_adapters_saved_by_one_path_load_in_the_other(tmp_path: Path) -> None:
    model = build(MIXTRAL)
    model.save_pretrained(tmp_path / "stock")
    accelerated = accelerate_moe(model)
    model.save_pretrained(tmp_path / "grouped")
    files = [tmp_path / path / "adapter_model.safetensors" for path in ("stock", "grouped")]
    assert files[0].read_bytes() == files[1].read_bytes()

    with torch.no_grad():  # trained on, grouped
        for parameter in accelerated._blocks[0].stacks.parameters:
            parameter += 0.01
    moved = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    model.save_pretrained(tmp_path / "trained")
    other = PeftModel.from_pretrained(build(MIXTRAL, targets=[]), tmp_path / "trained", is_trainable=True).train()
    loaded = get_peft_model_state_dict(other)
    assert loaded.keys() == moved.keys()
    assert all(torch.equal(loaded[name], moved[name]) for name in moved)
    assert_alike(step(model, tokens())[1], step(other, tokens())[1])

    # And back: a checkpoint is loaded into the grouped model as into any.
    first = {name: tensor + 0.02 for name, tensor in moved.items()}
    set_peft_model_state_dict(model, first)
    set_peft_model_state_dict(other, first)
    assert_alike(step(model, tokens())[1], step(other, tokens())[1])


def test_evaluation_generation_and_adapters_switched_off() -> None:
    model = build(MIXTRAL).eval()

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            logits = model(input_ids=tokens()).logits
        generated = model.generate(input_ids=tokens(1, 8), max_new_tokens=6, do_sample=False)
        with model.disable_adapter(), torch.no_grad():
            base = model(input_ids=tokens()).logits
        return [logits, generated, base]

    stock, grouped = both_ways(model, accelerate_moe, run)
    for one, other in zip(grouped, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (stock[0] - stock[2]).abs().max() > 1e-3


def test_merging_after_restoring() -> None:
    wanted = build(MIXTRAL).merge_and_unload().state_dict()
    model = build(MIXTRAL)
    accelerated = accelerate_moe(model)
    accelerated.restore()
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_a_trainer_with_the_callback(tmp_path: Path) -> None:
    losses = {}
    for path, callbacks in (("stock", []), ("grouped", [AccelerateMoe(recompute="none")])):
        model = build(MIXTRAL | {"vocab_size": 64}, reentrant=False)
        run = trainer(model, tmp_path / path, callbacks, num_steps=4, reentrant=False, learning_rate=1e-3)
        run.train()
        losses[path] = [row["loss"] for row in run.state.log_history if "loss" in row]
        if callbacks:
            assert callbacks[0].accelerated.num_blocks == 2
            assert callbacks[0].accelerated.checkpointed_layers == ()
    assert len(losses["stock"]) == 4
    assert losses["grouped"] == pytest.approx(losses["stock"], rel=1e-4)
