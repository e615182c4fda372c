"""FLOP counts against numbers worked out by hand for Mixtral-8x7B (32 layers, width 4096, hidden 14336)."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunescope.families.mixtral import MIXTRAL, MIXTRAL_8X7B, MIXTRAL_TINY
from tunescope.flops import ForwardFlop, train_flop

RECIPE = {"lora_rank": 16, "lora_target": "w1,w2,w3,gate"}
NO_LORA = {"lora_rank": 16, "lora_target": ""}
EXPERT_WEIGHTS = 3 * 4096 * 14336  # 176,160,768
# q and o are 4096 x 4096; k and v are 4096 x 1024 (8 of 32 heads).
ATTENTION_WEIGHTS = 2 * 4096 * 4096 + 2 * 4096 * 1024  # 41,943,040
ROUTER_WEIGHTS = 4096 * 8

flop_counts = st.floats(1.0, 1e12)
forwards = st.builds(
    ForwardFlop,
    frozen=flop_counts,
    trained=flop_counts,
    head=flop_counts,
    head_is_trained=st.booleans(),
    attention_per_key=flop_counts,
)


forward_flop = MIXTRAL.forward_flop


def mixtral(top_k: int, recipe: dict[str, Any] = RECIPE) -> ForwardFlop:
    return forward_flop(MIXTRAL.config_at(MIXTRAL_8X7B, 32, top_k), recipe)


def test_active_weights_of_sparse_mixtral_by_hand() -> None:
    per_layer = ATTENTION_WEIGHTS + ROUTER_WEIGHTS + 2 * EXPERT_WEIGHTS
    assert mixtral(2).frozen == 2 * 32 * per_layer
    assert mixtral(2).head == 2 * 4096 * 32000


def test_active_parameters_are_those_mistral_states() -> None:
    """ "12.9B active parameters": linears, the head and the embedding table (looked up, no FLOP), and norms."""
    linears = (mixtral(2).frozen + mixtral(2).head) / 2
    embedding, norms = 32000 * 4096, (2 * 32 + 1) * 4096
    assert linears + embedding + norms == pytest.approx(12.88e9, rel=1e-3)
    everything = (mixtral(8).frozen + mixtral(8).head) / 2 + embedding + norms
    assert everything == pytest.approx(46.70e9, rel=1e-3)


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_sparsity_changes_the_experts_and_nothing_else(top_k: int) -> None:
    dense, other = mixtral(8), mixtral(top_k)
    assert dense.frozen - other.frozen == 2 * 32 * (8 - top_k) * EXPERT_WEIGHTS
    assert (dense.head, dense.attention_per_key) == (other.head, other.attention_per_key)
    # Each expert's w1 and w3 map 4096 to 14336, w2 back: rank 16 on in + out features, three times.
    assert dense.trained - other.trained == 2 * 32 * (8 - top_k) * 3 * 16 * (4096 + 14336)


def test_adapters_by_hand() -> None:
    experts, router = 2 * 3 * 16 * (4096 + 14336), 16 * (4096 + 8)
    assert mixtral(2).trained == 2 * 32 * (experts + router)
    assert mixtral(2, NO_LORA).trained == 0
    attention_only = mixtral(2, {"lora_rank": 8, "lora_target": "q_proj, k_proj,v_proj,o_proj"})
    assert attention_only.trained == 2 * 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024))


def test_attention_by_hand() -> None:
    """Scores and their product with the values: 2 x 2 FLOP for each of 4096 channels, per key."""
    assert mixtral(2).attention_per_key == 4 * 32 * 4096


def test_depth_scales_everything_but_the_head() -> None:
    full, half = mixtral(2), forward_flop(MIXTRAL.config_at(MIXTRAL_8X7B, 16, 2), RECIPE)
    assert (2 * half.frozen, 2 * half.trained, 2 * half.attention_per_key) == (
        full.frozen,
        full.trained,
        full.attention_per_key,
    )
    assert half.head == full.head


def test_head_width_may_be_left_to_the_config() -> None:
    without = {key: value for key, value in MIXTRAL_TINY.items() if key != "head_dim"}
    assert forward_flop(without, RECIPE) == forward_flop(MIXTRAL_TINY, RECIPE)


def test_a_frozen_base_costs_four_flop_a_weight_and_token_not_six() -> None:
    base_only = mixtral(2, NO_LORA)
    weights = (base_only.frozen + base_only.head) / 2
    assert train_flop(base_only, 100, 0, recompute_frac=0) == 4 * weights * 100


def test_adapters_and_attention_cost_three_forwards() -> None:
    only_lora = ForwardFlop(frozen=0, trained=10, head=0, head_is_trained=False, attention_per_key=0)
    assert train_flop(only_lora, 7, 99, recompute_frac=0) == 3 * 10 * 7
    only_attention = ForwardFlop(frozen=0, trained=0, head=0, head_is_trained=False, attention_per_key=10)
    assert train_flop(only_attention, 7, 99, recompute_frac=0) == 3 * 10 * 99


@given(
    forwards,
    st.floats(1, 1e6),
    st.floats(1, 1e9),
)
def test_recompute_is_one_more_forward_of_the_layers_without_the_head(
    forward: ForwardFlop, tokens: float, keys: float
) -> None:
    extra = train_flop(forward, tokens, keys, recompute_frac=1) - train_flop(forward, tokens, keys, recompute_frac=0)
    expected = (forward.frozen + forward.trained) * tokens + forward.attention_per_key * keys
    assert extra == pytest.approx(expected, rel=1e-6, abs=1e-9 * train_flop(forward, tokens, keys, recompute_frac=1))


@given(
    forwards,
    st.integers(1, 64),
    st.integers(1, 1024),
    st.integers(0, 512),
    st.booleans(),
)
def test_hardware_never_does_less_than_the_model(
    forward: ForwardFlop, queries: int, length: int, padding: int, recompute: bool
) -> None:
    """HFU >= MFU: padding only adds slots and keys, recompute only adds a forward."""
    slots = length + padding
    model = train_flop(forward, queries * length, queries * length**2 / 2, recompute_frac=0)
    assert train_flop(forward, queries * slots, queries * slots**2 / 2, recompute_frac=float(recompute)) >= model


def test_a_whole_step_by_hand() -> None:
    """Batch 32 of length 128, sparse: FACTS.md's 312 TFLOP a step with recompute, attention and head."""
    tokens = 32 * 128
    step = train_flop(mixtral(2), tokens, tokens * 128 / 2, recompute_frac=1)
    assert step == pytest.approx(312e12, rel=0.02)


def test_all_linears_are_adapted_where_the_recipe_says_all() -> None:
    named = "w1,w2,w3,gate,q_proj,k_proj,v_proj,o_proj"
    every, each = (forward_flop(MIXTRAL_8X7B, {"lora_rank": 16, "lora_target": target}) for target in ("all", named))
    assert every == each
    assert every.trained > forward_flop(MIXTRAL_8X7B, {"lora_rank": 16, "lora_target": "w1,w2,w3,gate"}).trained
