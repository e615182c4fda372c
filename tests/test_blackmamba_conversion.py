"""BlackMamba's parameters and configuration between the original's form and ours: nothing lost, nothing guessed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_original import TINY, random_original
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tunescope.errors import UserError
from tunescope.families.blackmamba import BLACKMAMBA_2_8B
from tunescope.families.blackmamba_shapes import num_parameters, parameter_shapes
from tunescope.models.blackmamba.conversion import from_original, to_original
from tunescope.models.blackmamba.original_config import config_from_original, config_to_original
from tunescope.models.blackmamba.original_keys import FORMS, Form, original_shapes

GOLDEN = Path(__file__).with_name("golden")
RELEASED_2_8B = TINY | {
    "num_layers": 36, "hidden_size": 1472, "state_size": 16, "vocab_size": 50304, "ffn_hidden_size": 3872,
    "mamba_moe_layers": ["r", "8"] * 18,
}  # fmt: skip
RELEASED_1_5B = RELEASED_2_8B | {
    "num_layers": 30, "hidden_size": 1152, "ffn_hidden_size": 3072, "mamba_moe_layers": ["r", "8"] * 15,
}  # fmt: skip


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy().data)


def assert_same(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state_dict.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (state_dict[name].dtype, state_dict[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(state_dict[name]) == bits(tensor), name


# --- sizes ---


@pytest.mark.parametrize(
    ("original", "total", "mamba_block", "moe_block", "expert", "embedding", "num_released"),
    [
        (RELEASED_2_8B, 2_783_213_584, 13_705_792, 136_803_272, 17_098_752, 74_047_488, 525),
        (RELEASED_1_5B, 1_458_462_072, 8_422_272, 84_945_032, 10_616_832, 57_950_208, 438),
    ],
    ids=["2.8B", "1.5B"],
)
def test_the_published_models_have_their_published_sizes(
    original: dict[str, Any],
    total: int,
    mamba_block: int,
    moe_block: int,
    expert: int,
    embedding: int,
    num_released: int,
) -> None:
    config = config_from_original(original)
    shapes = parameter_shapes(config)

    def size_of(prefix: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))

    assert num_parameters(config) == size_of("") == total
    assert size_of("model.layers.0.") == size_of("model.layers.2.") == mamba_block
    assert size_of("model.layers.1.") == size_of(f"model.layers.{original['num_layers'] - 1}.") == moe_block
    assert size_of("model.layers.1.moe.experts.") == 8 * expert
    assert size_of("model.embeddings.") == embedding
    assert len(original_shapes(config, "release")) == num_released
    assert len(original_shapes(config, "in_memory")) == num_released + 1


def test_the_published_configuration_is_that_of_preset_full() -> None:
    chosen_by_us = ("num_experts_per_tok", "loss")  # of the study, and of a run
    config = config_from_original(RELEASED_2_8B)
    assert config["num_experts_per_tok"] == 1
    assert {key: value for key, value in BLACKMAMBA_2_8B.items() if key not in chosen_by_us} == {
        key: value for key, value in config.items() if key not in chosen_by_us
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers_block_type": ["mamba", "moe"]}, "2 blocks"), ({"layers_block_type": ["mlp"] * 4}, "unknown blocks mlp")],
)
def test_blocks_that_do_not_add_up_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parameter_shapes(config_from_original(TINY) | change)


# --- state dicts ---


def test_the_golden_checkpoint_there_and_back() -> None:
    original = load_file(GOLDEN / "blackmamba_a_top2" / "model.safetensors")
    config = config_from_original(json.loads((GOLDEN / "blackmamba_a_top2" / "config.json").read_text()))
    ours = from_original(original, config)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == parameter_shapes(config)
    assert_same(to_original(ours, config), original)
    in_memory = to_original(ours, config, form="in_memory")
    assert in_memory["output_layer.weight"] is in_memory["embedding.weight"]
    assert_same(from_original(in_memory, config), ours)


def test_each_parameter_has_its_own_original() -> None:
    """One entry of a kind, by hand: the table of names, read by somebody else."""
    config = config_from_original(TINY)
    original = random_original(TINY)
    ours = from_original(original, config)
    pairs = {
        "model.embeddings.weight": "embedding.word_embeddings.weight",
        "model.layers.2.norm.weight": "decoder.layers.2.norm.weight",
        "model.layers.2.mamba.in_proj.weight": "decoder.layers.2.mixer.in_proj.weight",
        "model.layers.2.mamba.conv1d.bias": "decoder.layers.2.mixer.conv1d.bias",
        "model.layers.2.mamba.dt_proj.bias": "decoder.layers.2.mixer.dt_proj.bias",
        "model.layers.2.mamba.A_log": "decoder.layers.2.mixer.A_log",
        "model.layers.3.norm.weight": "decoder.layers.3.norm.weight",
        "model.layers.3.moe.router.bias": "decoder.layers.3.mixer.router.bias",
        "model.final_norm.weight": "decoder.final_layernorm.weight",
        "model.final_norm.bias": "decoder.final_layernorm.bias",
    }
    for name, original_name in pairs.items():
        assert ours[name] is original[original_name], name
    for expert in range(8):
        path = f"decoder.layers.3.mixer.local_experts.{expert}"
        fc1, fc2 = (ours[f"model.layers.3.moe.experts.{matrix}.weight"] for matrix in ("fc1", "fc2"))
        assert bits(fc1[expert]) == bits(original[f"{path}.linear_fc1.weight"])
        assert bits(fc2[expert]) == bits(original[f"{path}.linear_fc2.weight"])


@st.composite
def originals(draw: st.DrawFn) -> dict[str, Any]:
    experts = str(draw(st.integers(2, 9)))
    blocks = draw(st.lists(st.sampled_from(["r", experts]), min_size=1, max_size=12).filter(lambda b: experts in b))
    sizes = {
        "hidden_size": draw(st.integers(1, 40)),
        "state_size": draw(st.sampled_from([1, 4])),
        "conv_dimension": draw(st.integers(1, 4)),
        "ffn_hidden_size": draw(st.integers(1, 6)),
        "vocab_size": draw(st.integers(1, 9)),
        "expansion_factor": draw(st.integers(1, 3)),
    }
    top_k = draw(st.integers(1, int(experts)))
    given_top_k = {"topk": top_k} if top_k > 1 else {}
    return TINY | sizes | {"mamba_moe_layers": blocks, "num_layers": len(blocks)} | given_top_k


@settings(deadline=None, max_examples=25)
@given(original=originals(), form=st.sampled_from(FORMS), seed=st.integers(0, 2**31))
def test_any_bits_survive_the_way_there_and_back(original: dict[str, Any], form: Form, seed: int) -> None:
    config = config_from_original(original)
    assert config_to_original(config) == original
    generator = torch.Generator().manual_seed(seed)
    # Every pattern of 16 bits may occur, NaN and both zeros included.
    state_dict = {
        name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
        for name, shape in original_shapes(config, form).items()
    }
    if form == "in_memory":
        state_dict["output_layer.weight"] = state_dict["embedding.weight"]
    ours = from_original(state_dict, config)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == parameter_shapes(config)
    assert_same(to_original(ours, config, form), state_dict)


def test_experts_are_stacked_by_number_whatever_the_order_of_entries() -> None:
    """A stack in the order of the dictionary would pass a round trip."""
    config = config_from_original(TINY)
    original = dict(reversed(random_original(TINY).items()))
    ours = from_original(original, config)["model.layers.1.moe.experts.fc1.weight"]
    for expert in range(8):
        assert bits(ours[expert]) == bits(original[f"decoder.layers.1.mixer.local_experts.{expert}.linear_fc1.weight"])


def test_a_tied_head_is_accepted_and_an_untied_one_refused() -> None:
    config = config_from_original(TINY)
    ours = from_original(random_original(TINY), config)
    head = ours["model.embeddings.weight"].clone()
    assert_same(to_original(ours | {"lm_head.weight": head}, config), to_original(ours, config))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embeddings\.weight"):
        to_original(ours | {"lm_head.weight": head + 1}, config)
    in_memory = random_original(TINY, "in_memory")
    in_memory["output_layer.weight"] = in_memory["embedding.weight"] * 2
    with pytest.raises(UserError, match=r"output_layer\.weight differs from embedding\.weight"):
        from_original(in_memory, config)


FC1 = "decoder.layers.{}.mixer.local_experts.{}.linear_fc1.weight"


def without(*names: str) -> Any:
    return lambda entries: {name: tensor for name, tensor in entries.items() if name not in names}


def with_(**changed: Any) -> Any:
    return lambda entries: entries | {name.replace("__", "."): value for name, value in changed.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("decoder.layers.0.mixer.D"), r"of 61 entries it lacks 1 \(decoder\.layers\.0\.mixer\.D\)"),
        (
            without(*(FC1.format(1, expert) for expert in range(5))),
            r"it lacks 5 \(\S+0\.linear_fc1\.weight, \S+1\.linear_fc1\.weight, \S+2\.linear_fc1\.weight, \.\.\.\)",
        ),
        (with_(decoder__x__bias=torch.zeros(1)), r"entries that are not expected: 1 \(decoder\.x\.bias\)"),
        (
            with_(decoder__final_layernorm__bias=torch.zeros(31, dtype=torch.bfloat16)),
            r"shapes differ: 1 \(decoder\.final_layernorm\.bias is 31, not 32\)",
        ),
        (
            with_(decoder__final_layernorm__bias=torch.tensor(0, dtype=torch.bfloat16)),
            "bias is a single number, not 32",
        ),
        (with_(decoder__final_layernorm__bias=3), r"no dense tensors: 1 \(decoder\.final_layernorm\.bias\)"),
        (with_(decoder__final_layernorm__bias=torch.zeros(32).to_sparse()), "no dense tensors: 1"),
        (
            with_(decoder__final_layernorm__bias=torch.zeros(32)),
            r"entries are torch\.bfloat16; 1 \(decoder\.final_layernorm\.bias\) not, torch\.float32",
        ),
        (lambda entries: {name: tensor.to(torch.int8) for name, tensor in entries.items()}, r"are torch\.int8"),
        (lambda entries: {}, "of 61 entries it lacks 61"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(spoil: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        from_original(spoil(random_original(TINY)), config_from_original(TINY))
    assert caught.value.cause
    assert caught.value.cure


def test_every_kind_of_fault_is_named_at_once() -> None:
    entries = random_original(TINY)
    entries["foreign"] = entries.pop("decoder.final_layernorm.bias")
    entries["decoder.final_layernorm.weight"] = torch.zeros(2, 2)
    with pytest.raises(UserError) as caught:
        from_original(entries, config_from_original(TINY))
    assert "it lacks 1 (decoder.final_layernorm.bias)" in caught.value.what
    assert "not expected: 1 (foreign)" in caught.value.what
    assert "decoder.final_layernorm.weight is 2×2, not 32" in caught.value.what


def test_to_the_original_checks_too() -> None:
    config = config_from_original(TINY)
    ours = from_original(random_original(TINY), config)
    del ours["model.final_norm.bias"]
    with pytest.raises(UserError, match=r"lacks 1 \(model\.final_norm\.bias\)"):
        to_original(ours, config)
    with pytest.raises(UserError, match="no form 'flat'"):
        to_original(ours, config, form="flat")  # type: ignore[arg-type]


# --- configurations ---


@pytest.mark.parametrize("name", ["blackmamba_a_top2", "blackmamba_b_top8"])
def test_a_configuration_there_and_back(name: str) -> None:
    original = json.loads((GOLDEN / name / "config.json").read_text())
    config = config_from_original(original)
    assert config["num_experts_per_tok"] == original["topk"]
    assert config["pad_token_id"] is None  # 256 rows have no room for the study's tokens
    assert config_to_original(config) == original


def test_what_has_no_effect_is_passed_over_and_an_epsilon_is_kept() -> None:
    harmless = {"bias": True, "device": "cuda", "dt_min": 0.1, "rms_norm": True, "hidden_dropout": 0}
    assert config_from_original(TINY | harmless) == config_from_original(TINY)
    config = config_from_original(TINY | {"layernorm_epsilon": 1e-6})
    assert config["layer_norm_epsilon"] == 1e-6
    assert config_to_original(config)["layernorm_epsilon"] == 1e-6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_bias_linear", True),
        ("add_bias_linear", 0),
        ("swiglu", False),
        ("rms_norm", False),
        ("fused_add_norm", True),
        ("residual_in_fp32", False),
        ("conv_bias", False),
        ("dt_rank", 92),
        ("routing_mode", "softmax"),
        ("hidden_dropout", 0.1),
        ("layernorm_zero_centered_gamma", True),
        ("layernorm_epsilon", 0.0),
        ("layernorm_epsilon", "1e-5"),
        ("num_moe_experts", 8),
        ("hidden_size", 0),
        ("hidden_size", 32.0),
        ("vocab_size", True),
        ("topk", 0),
        ("topk", 9),
        ("topk", "2"),
        ("mamba_moe_layers", []),
        ("mamba_moe_layers", "r8r8"),
        ("mamba_moe_layers", ["r", "8"]),
        ("mamba_moe_layers", ["r", "8", "r", "4"]),
        ("mamba_moe_layers", ["r", "r", "r", "r"]),
    ],
)
def test_what_cannot_be_represented_is_refused_with_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        config_from_original(TINY | {key: value})
    assert f"{key}: {json.dumps(value)}" in caught.value.what
    assert caught.value.cause
    assert caught.value.cure


@pytest.mark.parametrize(
    ("block", "cause"),
    [("r8", "side by side"), ("1", "plain MLP"), ("16", "plain MLP"), ("28", "number of its experts"), ("0", "number"),
     ("", "number"), (8, "number"), ("x", "number")],
)  # fmt: skip
def test_a_block_of_another_kind_is_refused(block: Any, cause: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_original(TINY | {"mamba_moe_layers": ["r", "8", "r", block]})
    assert f"mamba_moe_layers: {json.dumps(block)}" in caught.value.what
    assert cause in caught.value.cause


@pytest.mark.parametrize("key", ["add_bias_linear", "swiglu", "mamba_moe_layers", "num_layers", "max_sequence_length"])
def test_a_missing_key_is_an_error_and_no_default(key: str) -> None:
    with pytest.raises(UserError, match=f"has no {key}"):
        config_from_original({name: value for name, value in TINY.items() if name != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_local_experts", 1),
        ("num_local_experts", 16),
        ("tie_word_embeddings", False),
        ("layers_block_type", ["mamba", "moe"]),
        ("layers_block_type", ["mamba"] * 4),
    ],
)
def test_what_the_original_cannot_be_told_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        config_to_original(config_from_original(TINY) | {key: value})
    assert f"{key}: {json.dumps(value)}" in caught.value.what
