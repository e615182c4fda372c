"""Every model is data: its tables must agree with the model that is built from them, and with the paper."""

import importlib
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunescope import config, paper
from tunescope.errors import UserError
from tunescope.families import FAMILIES, family_of, find_family
from tunescope.families.blackmamba import BLACKMAMBA, BLACKMAMBA_2_8B
from tunescope.families.blackmamba_shapes import num_parameters
from tunescope.families.family import NF4_BYTES_PER_WEIGHT, Family
from tunescope.flops import train_flop
from tunescope.kernels import causal_conv, selective_scan
from tunescope.measure import inputs
from tunescope.train import recipe as recipes

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def built(family: Family, model_config: dict[str, Any]) -> torch.nn.Module:
    """On the meta device: shapes and names, no memory."""
    importlib.import_module(family.registration).register()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config))


@every_family
def test_it_is_found_by_its_name_and_by_its_config(family: Family) -> None:
    assert find_family(family.name) is family
    assert family_of(family.full) is family_of(family.tiny) is family
    assert family_of({"model_type": "llama"}) is None
    with pytest.raises(UserError, match="mixtral, blackmamba, qwen3_moe"):
        find_family("llama")


@every_family
def test_tiny_is_the_same_architecture(family: Family) -> None:
    assert family.tiny.keys() == family.full.keys()
    same = {"architectures", "model_type", family.experts_key, "tie_word_embeddings"}
    assert all(family.tiny[key] == family.full[key] for key in same)
    assert all(type(given[key]) is int for key in family.size_keys for given in (family.tiny, family.full))


@every_family
def test_a_depth_and_a_sparsity_reach_the_model(family: Family) -> None:
    depth = family.depth_step
    shallow = family.config_at(family.full, depth, 1)
    assert (shallow["num_hidden_layers"], shallow["num_experts_per_tok"]) == (depth, 1)
    assert family.full["num_hidden_layers"] % depth == 0
    model = built(family, shallow)
    assert len(model.model.layers) == depth
    assert type(model).__name__ == family.full["architectures"][0]


@every_family
def test_linears_counted_for_flop_are_those_of_the_model(family: Family) -> None:
    """2 FLOP a weight and token, over the weights that a token meets, with all experts and no adapters."""
    dense = family.config_at(family.tiny, family.tiny["num_hidden_layers"], family.num_experts)
    model = built(family, dense)
    of_layers = sum(
        parameter.numel()
        for name, parameter in model.model.layers.named_parameters()
        if parameter.dim() > 1 and "A_log" not in name and "conv1d" not in name
    )
    forward = family.forward_flop(dense, {"lora_rank": 16, "lora_target": "nothing"})
    scans = 0.0
    if family is BLACKMAMBA:  # 6 a channel and state, 2 a tap of the convolution
        mixers = [layer.mamba for layer in model.model.layers if layer.is_mamba]
        scans = sum(6 * mixer.A_log.numel() + 2 * mixer.conv1d.weight.numel() for mixer in mixers)
    assert forward.frozen + forward.trained == 2 * of_layers + scans
    assert forward.head == 2 * model.lm_head.weight.numel()
    sparse = family.forward_flop(family.config_at(family.tiny, 2, 1), {"lora_rank": 16, "lora_target": "nothing"})
    assert sparse.frozen + sparse.trained < forward.frozen + forward.trained


def test_with_all_parameters_trained_a_weight_costs_six_flop() -> None:
    forward = BLACKMAMBA.forward_flop(BLACKMAMBA_2_8B, {})
    assert forward.frozen == 0
    assert train_flop(forward, 10, 999, recompute_frac=0) == 3 * 10 * (forward.trained + forward.head)


@every_family
def test_resident_bytes_are_those_of_the_models_parameters(family: Family) -> None:
    depth = family.depth_step
    few = family.config_at(family.full, depth, 2)
    model = built(family, few)
    weights = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if family is BLACKMAMBA:
        assert family.resident_bytes(family.full, depth) == 8 * sum(weights.values())
        return
    linears = sum(number for name, number in weights.items() if ".layers." in name and "norm" not in name)
    outside = weights["model.embed_tokens.weight"] + weights["lm_head.weight"]
    frozen = linears * NF4_BYTES_PER_WEIGHT + 2 * outside
    adapters = 0
    if family.name == "qwen3_moe":
        experts = [module for name, module in model.named_modules() if name.endswith("_proj") and ".experts." in name]
        adapters = 16 * 16 * sum(module.in_features + module.out_features for module in experts)
    assert family.resident_bytes(family.full, depth) == pytest.approx(frozen + adapters, rel=1e-6)


def test_parameters_of_blackmamba_by_its_table() -> None:
    assert num_parameters(BLACKMAMBA_2_8B) == 2_783_213_584
    assert BLACKMAMBA.resident_bytes(BLACKMAMBA_2_8B, 36) == 4 * 5_566_427_168


@every_family
def test_its_recipe_is_there_and_its_points_are_points(family: Family) -> None:
    recipe = recipes.load_recipe(recipes.recipe_folder() / family.recipe)
    assert recipe["finetuning_type"] == ("full" if family is BLACKMAMBA else "lora")
    for kind in (config.THROUGHPUT, config.LATENCY):
        points = config.paper_points(family.name, kind)
        assert points
        assert {point.model for point in points} == {family.name}
        assert {point.sparsity for point in points} <= {"sparse", "dense"}


def test_points_of_blackmamba_are_the_papers() -> None:
    bars = [(point.dataset, point.sparsity, point.per_device_batch_size) for point in config.paper_points("blackmamba")]
    sizes = {
        ("cs", "sparse"): (1, 6, 20),
        ("cs", "dense"): (1, 6),
        ("math", "sparse"): (1, 2, 8),
        ("math", "dense"): (1, 2),
    }
    assert sorted(bars) == sorted((*group, batch) for group, batches in sizes.items() for batch in batches)
    steps = [
        (point.sparsity, point.per_device_batch_size, point.seq_len_tokens)
        for point in config.paper_points("blackmamba", config.LATENCY)
    ]
    assert steps == [("sparse", batch, 128) for batch in (1, 30, 84)] + [("dense", batch, 128) for batch in (1, 30)]


def test_bars_of_another_batch_size_in_the_papers_own_sweep() -> None:
    mamba = paper.relabelled_bars("blackmamba")
    assert [(bar.dataset, bar.top_k, bar.figure_batch_size, bar.sweep_batch_size) for bar in mamba] == [
        ("math", 8, 2, 3), ("math", 2, 2, 3), ("math", 2, 8, 10),
    ]  # fmt: skip
    assert [bar.figure_batch_size for bar in paper.relabelled_bars("mixtral")] == [3]
    assert paper.relabelled_bars("qwen3_moe") == ()


@every_family
def test_only_the_papers_own_sizes_are_the_papers_model(family: Family) -> None:
    depth = family.full["num_hidden_layers"]
    is_in_paper = family.name != "qwen3_moe"
    assert family.is_papers_model(family.full, depth) == is_in_paper
    assert not family.is_papers_model(family.full, depth - family.depth_step)
    assert not family.is_papers_model(family.tiny, depth)
    assert family.is_papers_model(family.full | {"vocab_size": 5}, depth) == is_in_paper


def test_scans_that_a_launcher_offers_are_those_of_the_kernels() -> None:
    """Two lists, because planning starts without torch."""
    for kernel in (selective_scan, causal_conv):
        assert set(kernel.IMPLEMENTATIONS) == {"auto", *inputs.SCANS}
