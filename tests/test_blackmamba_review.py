"""BlackMamba where its parts meet: dtypes of the real recipe, adapters, folders that do not fit, what rows then say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from helpers_blackmamba import SETS, golden_io, golden_model, relative
from helpers_trainer import profiler, trainer
from safetensors.torch import load_file, save_file
from test_plan import gpu
from torch._subclasses.fake_tensor import FakeTensorMode

from tunescope.analyze.latency_tables import latency_tables
from tunescope.analyze.layouts import Division
from tunescope.errors import UserError
from tunescope.families import blackmamba as family_file
from tunescope.families.blackmamba import BLACKMAMBA, BLACKMAMBA_TINY
from tunescope.families.weight_files import check_weight_files
from tunescope.gpus import GpuInventory
from tunescope.kernels import causal_conv, moe
from tunescope.measure import inputs, plan
from tunescope.measure.experts import RouterCounter
from tunescope.measure.plan import Options, Plan, make_plan
from tunescope.models.blackmamba.configuration import BlackMambaConfig
from tunescope.models.blackmamba.modeling import BlackMambaForCausalLM
from tunescope.train import run_recipe

HALF = torch.bfloat16


def small(**changes: Any) -> BlackMambaForCausalLM:
    torch.manual_seed(0)
    special = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 0}
    return BlackMambaForCausalLM(BlackMambaConfig(**BLACKMAMBA_TINY | special | changes))


def write_model(folder: Path, **changes: Any) -> Path:
    """A whole folder with weights; changes: of its config.json afterwards."""
    small().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# --- bf16 weights under bf16 autocast, as the recipe trains ---------------------------------------------------------


def test_dtypes_of_all_activations_under_autocast_on_a_gpu() -> None:
    """Fake tensors know a GPU's autocast without having one: its list of operators that become fp32 is longer."""
    seen: dict[str, list[torch.dtype]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            made = output if isinstance(output, tuple) else (output,)
            seen[name] = [x.dtype for x in made if isinstance(x, torch.Tensor)]

        return hook

    with FakeTensorMode():
        torch.set_default_dtype(HALF)
        try:
            with torch.device("cuda"):
                model = small(scan="reference", loss="study")
        finally:
            torch.set_default_dtype(torch.float32)
        for name, module in model.named_modules():
            module.register_forward_hook(keep(name))
        ids = torch.zeros(2, 16, dtype=torch.long, device="cuda")
        torch.set_autocast_dtype("cuda", HALF)
        torch.set_autocast_enabled("cuda", True)
        try:
            out = model(input_ids=ids, labels=ids)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert out.loss.dtype == torch.float32
    assert out.logits.dtype == HALF
    assert seen.pop("model.final_norm") == [torch.float32]  # as in the study: the head rounds it
    pairs = {name: dtypes for name, dtypes in seen.items() if len(dtypes) == 2}
    assert len(pairs) == 2 * len(model.model.layers)  # norms and blocks hand the residual on
    assert all(dtypes == [HALF, torch.float32] for dtypes in pairs.values())
    alone = {name: dtypes for name, dtypes in seen.items() if len(dtypes) == 1}
    assert {name for name, dtypes in alone.items() if dtypes != [HALF]} <= {"model"}
    assert sum(name.endswith(".moe") for name in alone) == 2


@pytest.mark.parametrize("way", moe.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SETS)
def test_bf16_weights_under_autocast_learn_the_same(name: str, way: str) -> None:
    io = golden_io(name)
    exact, rounded = (golden_model(name, dtype, loss="study", moe=way) for dtype in (torch.float32, HALF))
    wanted = exact(input_ids=io["input_ids"], labels=io["labels"]).loss
    with torch.autocast("cpu", HALF):
        found = rounded(input_ids=io["input_ids"], labels=io["labels"]).loss
    assert found.dtype == torch.float32
    assert abs(found - wanted) < 0.01 * wanted
    for loss in (wanted, found):
        loss.backward()
    # With 8 of 8 experts no token can change its experts, and gradients can be compared.
    for (key, one), (_, other) in zip(rounded.named_parameters(), exact.named_parameters(), strict=True):
        assert one.grad.dtype == HALF
        if name == "b_top8":
            assert relative(one.grad.float(), other.grad) < 0.08, key


# --- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_widths_that_no_grouped_matmul_takes_run_one_expert_after_another(dtype: torch.dtype) -> None:
    """17 and 13 numbers are no whole multiple of 16 bytes in any dtype; torch refuses them."""
    torch.manual_seed(0)
    to = moe.dispatch(torch.tensor([[0, 2], [2, 1], [0, 1]]), 4)
    x = torch.randn(6, 17).to(dtype).requires_grad_()
    weight = torch.randn(4, 13, 17).to(dtype).requires_grad_()
    y = moe.grouped_linear(x, weight, to.ends_X)
    y.sum().backward()
    expert_R = torch.tensor([[0, 2], [2, 1], [0, 1]]).flatten()[to.choice_R]
    by_hand = torch.einsum("rfd,rd->rf", weight.detach().double()[expert_R], x.detach().double())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y.double(), by_hand, rtol=tolerance, atol=tolerance)
    assert not weight.grad[3].any()
    assert weight.grad[:3].any(dim=(1, 2)).all()


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 8, 2), (1, 128, 8), (40, 128, 8)])
def test_no_token_one_token_and_many_experts_all_tied(num_tokens: int, num_experts: int, top_k: int) -> None:
    """Equal scores: whichever experts win, a token has top_k different ones, and their sum is right."""
    torch.manual_seed(0)
    score, expert = torch.full((num_experts, num_tokens), 0.5).t().topk(top_k, dim=-1)
    x, weight = torch.randn(4, num_tokens).t(), torch.randn(num_experts, 4, 4).transpose(1, 2).requires_grad_()
    to = moe.dispatch(expert, num_experts)
    y = moe.combine_rows(moe.grouped_linear(moe.gather_rows(x, to), weight, to.ends_X), score, to)
    assert all(len(set(row)) == top_k for row in expert.tolist())
    torch.testing.assert_close(y, torch.einsum("tk,tkfd,td->tf", score, weight[expert], x))
    y.sum().backward()
    unused = sorted(set(range(num_experts)) - set(expert.flatten().tolist()))
    assert not weight.grad[unused].any()


def test_tokens_per_expert_are_those_that_were_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the routers, and once more where tokens are sent to experts; padding left out, in batches of
    different lengths."""
    sent: list[torch.Tensor] = []
    dispatch = moe.dispatch

    def spy(expert_TK: torch.Tensor, num_experts: int) -> Any:
        sent.append(expert_TK)
        return dispatch(expert_TK, num_experts)

    monkeypatch.setattr(moe, "dispatch", spy)
    model = small(num_experts_per_tok=2)
    generator = torch.Generator().manual_seed(5)
    wanted = {layer: [0] * 8 for layer in (1, 3)}
    with RouterCounter(model) as counter, torch.no_grad():
        for lengths in ([9, 4], [16, 1], [3, 3]):
            slots = max(lengths)
            mask = torch.tensor([[1] * length + [0] * (slots - length) for length in lengths])
            sent.clear()
            model(input_ids=torch.randint(0, 64, mask.shape, generator=generator), attention_mask=mask)
            for layer, expert_TK in zip((1, 3), sent, strict=True):
                for experts, is_real in zip(expert_TK.tolist(), mask.flatten().tolist(), strict=True):
                    for expert in experts:
                        wanted[layer][expert] += is_real
    rows = counter.rows()
    found = {layer: [row["tokens"] for row in rows if row["layer"] == layer] for layer in wanted}
    assert found == wanted
    assert sum(found[1]) == 2 * (9 + 4 + 16 + 1 + 3 + 3)


# --- adapters --------------------------------------------------------------------------------------------------------


def test_all_linears_of_the_engine_can_be_adapted() -> None:
    """`lora_target: all` goes by class names; the stacked experts are no linears that PEFT knows."""
    from llamafactory.model.model_utils.misc import find_all_linear_modules

    model = small()
    names = find_all_linear_modules(model, freeze_vision_tower=False)
    assert set(names) == {"in_proj", "x_proj", "out_proj", "router"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    assert sum(p.requires_grad for p in adapted.parameters()) == 2 * (2 * 3 + 2)


def test_a_breakdown_knows_the_operators_of_adapted_linears(tmp_path: Path) -> None:
    """Somebody's own Trainer with LoRA and checkpointing, full fine-tuning beside it."""
    for name in ("full", "lora"):
        model: Any = small()
        if name == "lora":
            chosen = peft.LoraConfig(r=4, target_modules=["in_proj", "router"], init_lora_weights=False)
            model = peft.get_peft_model(model, chosen)
            model.enable_input_require_grads()
        trainer(model, tmp_path, [profiler(tmp_path / "profile", name=name)], reentrant=False).train()
    tables = latency_tables(tmp_path / "profile")
    assert tables.points["attributed_frac"].tolist() == [1.0, 1.0]
    labels = tables.operators.groupby(["point_id", "part"])["label"].agg(set)
    adapters = {"matmul(lora)", "lora scaling and adding"}
    matmuls = {"mamba": {f"matmul({name}_proj)" for name in ("in", "x", "dt", "out")}, "moe": {"matmul(router)"}}
    for part, wanted in matmuls.items():
        assert labels["lora", part] >= wanted | adapters
        assert labels["full", part] >= wanted
        assert not labels["full", part] & adapters
    held = tables.memory_parts.pivot(index="part", columns="point_id", values="allocated_bytes")
    assert held.loc["frozen_weights", "lora"] == held.loc["trained_weights", "full"]


# --- folders that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_block_type": None}, "layers_block_type: null; it must be mamba or moe for each of the 4 layers"),
        ({"layers_block_type": ["mamba"]}, 'layers_block_type: ["mamba"]'),
        ({"layers_block_type": "mamba"}, 'layers_block_type: "mamba"'),
        ({"layers_block_type": ["mamba", "mlp"] * 2}, "layers_block_type"),
        ({"layers_block_type": [["mamba"], "moe", "mamba", "moe"]}, "layers_block_type"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: false"),
        ({"layer_norm_epsilon": "x"}, 'layer_norm_epsilon: "x"'),
        ({"moe": "fast"}, 'moe: "fast"; it must be grouped or loop'),
        ({"expand": 1.5}, "expand: 1.5; it must be a whole number from 1"),
        ({"hidden_size": -32}, "hidden_size: -32"),
        ({"torch_dtype": "float99"}, "dtype: 'float99'; it must be one of bfloat16, float16, float32"),
        ({"dtype": "int8"}, "dtype: 'int8'"),
    ],
)
def test_a_config_that_nothing_can_be_built_of_is_refused_before_anything_starts(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BLACKMAMBA_TINY | changes))
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        inputs.checked_config(tmp_path, BLACKMAMBA)
    assert words in caught.value.what
    assert caught.value.cure


@pytest.mark.parametrize("config", [BLACKMAMBA_TINY, BLACKMAMBA_TINY | {"moe": "loop"}])
def test_a_config_of_ours_passes(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inputs.checked_config(tmp_path, BLACKMAMBA) == config
    write_model(tmp_path / "saved")  # as transformers writes it
    inputs.checked_config(tmp_path / "saved", BLACKMAMBA)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": -32}, "hidden_size is -32"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ({"state_size": True}, "state_size is True"),
        ({"expand": "2"}, "expand is '2'"),
        ({"expand": 0}, "expand is 0"),
        ({"layers_block_type": "mamb"}, "layers_block_type"),
        ({"layers_block_type": [["mamba"], "moe", "mamba", "moe"]}, "layers_block_type"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x'"),
        ({"scan": "fast"}, "scan is 'fast'; it must be one of auto, triton, mamba-ssm, reference"),
        ({"moe": "fast"}, "moe is 'fast'; it must be one of grouped, loop"),
    ],
)
def test_the_configuration_itself_refuses_what_cannot_be_built(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BlackMambaConfig(**BLACKMAMBA_TINY | changes)


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")


def one_lost(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.moe.router.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "spoil", "words"),
    [
        ({}, cut_short, "is cut short"),
        ({}, no_safetensors, "is no safetensors file"),
        ({}, one_lost, r"lack 1 of 33 parameters: model.layers.1.moe.router.bias"),
        ({"intermediate_size": 80}, None, r"have other shapes for 4 of 33 .*fc1.weight \(\(8, 128, 32\), not \(8, 160"),
        ({"num_hidden_layers": 6, "layers_block_type": ["mamba", "moe"] * 3}, None, "lack 15 of 48 parameters"),
    ],
)
def test_weights_that_are_not_the_configs_are_refused_everywhere(
    changes: dict[str, Any], spoil: Callable[[Path], None] | None, words: str, tmp_path: Path
) -> None:
    """transformers would fill what is missing with random numbers, and the row would say `checkpoint`."""
    folder = write_model(tmp_path / "model", **changes)
    if spoil is not None:
        spoil(folder)
    with pytest.raises(UserError, match=words):
        inputs.checked_config(folder, BLACKMAMBA)
    with pytest.raises(UserError, match=words):
        run_recipe._local_model(str(folder))


def test_weights_of_more_layers_in_shards_of_a_base_model_or_none_pass(tmp_path: Path) -> None:
    shallow = BLACKMAMBA.at_depth(BLACKMAMBA_TINY | {"vocab_size": 64}, 2)
    check_weight_files(write_model(tmp_path / "one"), BLACKMAMBA, shallow)
    small().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    small().model.save_pretrained(tmp_path / "base")
    (tmp_path / "none").mkdir()
    for name in ("one", "shards", "base", "none"):
        check_weight_files(tmp_path / name, BLACKMAMBA, BLACKMAMBA_TINY | {"vocab_size": 64})


def test_train_says_which_folder_is_not_there_and_what_is_not_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        run_recipe._local_model(str(tmp_path / "missing"))
    checkpoints = run_recipe.checkpoints
    monkeypatch.setattr(checkpoints, "find_checkpoint", lambda model: None)
    for found, words in ((tmp_path, "downloaded and not converted"), (None, "not in the Hub cache")):
        monkeypatch.setattr(checkpoints, "find_unconverted", lambda model, found=found: found)
        with pytest.raises(UserError, match=words):
            run_recipe._local_model("Zyphra/BlackMamba-2.8B")


# --- what a launcher plans -------------------------------------------------------------------------------------------


def planned(monkeypatch: pytest.MonkeyPatch, model_path: Path | None, *, on_gpu: bool = True, **flags: Any) -> Plan:
    monkeypatch.setattr(plan, "list_gpus", lambda: GpuInventory(gpus=(gpu(),) if on_gpu else ()))
    chosen = {"model": "blackmamba", "preset": "full", "points": "cs:sparse:bs=1"}
    return make_plan(Options(**chosen | flags, model_path=model_path))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_weights_saved_in_fp32_are_trained_in_bf16_as_the_recipe_says(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine loads in the dtype of config.json, whatever `pure_bf16` says."""
    config = {name: value for name, value in BLACKMAMBA_TINY.items() if name != "torch_dtype"}
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "float32"}))
    (spec,) = planned(monkeypatch, tmp_path).specs
    assert BlackMambaConfig(**spec.workload.model_config).dtype == HALF
    (tiny,) = planned(monkeypatch, None, preset="tiny").specs
    assert BlackMambaConfig(**tiny.workload.model_config).dtype == HALF
    (on_cpu,) = planned(monkeypatch, tmp_path, on_gpu=False).specs
    assert on_cpu.workload.model_config[key] == "float32"


def test_a_convolution_that_no_kernel_takes_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BLACKMAMBA_TINY | {"conv_kernel": 5}))
    with pytest.raises(UserError, match="has 5 taps, and that of --scan triton takes 2 to 4") as caught:
        planned(monkeypatch, tmp_path)
    assert "--scan reference" in caught.value.cure
    (spec,) = planned(monkeypatch, tmp_path, scan="reference").specs
    assert spec.workload.model_config["scan"] == "reference"


def test_a_row_says_how_its_experts_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in moe.IMPLEMENTATIONS:
        (tmp_path / "config.json").write_text(json.dumps(BLACKMAMBA_TINY | {"moe": way}))
        (spec,) = planned(monkeypatch, tmp_path, on_gpu=False).specs
        assert spec.point_json()["moe"] == way


def test_what_is_written_twice_for_planning_without_torch_is_the_same() -> None:
    assert inputs.CONV_TAPS == causal_conv.TRITON_WIDTHS
    assert family_file.MOE_PATHS == moe.IMPLEMENTATIONS
    assert BlackMambaConfig().layer_norm_epsilon == family_file.EPSILON


@pytest.mark.parametrize(
    ("part", "below", "work", "label"),
    [
        (
            "moe",
            ".moe.experts",
            ("SplitBackward0", "aten::cat", "aten::cat", "CatArrayBatchedCopy"),
            "casts and copies",
        ),
        ("mamba", ".mamba", ("SplitBackward0", "aten::cat", "aten::cat", "CatArrayBatchedCopy"), "casts and copies"),
        ("mamba", ".mamba.in_proj.base_layer", ("", "aten::linear", "aten::mm", "gemm"), "matmul(in_proj)"),
        ("mamba", ".mamba.in_proj.lora_A.default", ("", "aten::linear", "aten::mm", "gemm"), "matmul(lora)"),
        ("mamba", ".mamba.in_proj", ("", "aten::add", "aten::add", "elementwise"), "lora scaling and adding"),
        ("moe", ".moe.router", ("", "aten::linear", "aten::addmm", "gemm"), "matmul(router)"),
        ("moe", ".moe.router.base_layer", ("", "aten::linear", "aten::addmm", "gemm"), "matmul(router)"),
        ("moe", ".moe", ("", "aten::mul", "aten::mul", "elementwise"), "gather/scatter/index"),
    ],
)
def test_kernels_of_a_gpu_have_their_label(part: str, below: str, work: tuple[str, ...], label: str) -> None:
    modules = pd.DataFrame([{"path": "model.layers.1.moe", "class_name": "BlackMambaMoe"}])
    assert Division(modules).op_label(part, below, *work) == label
