"""Sizes: bytes of the weights, and which preset a GPU gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunescope.errors import UserError
from tunescope.families.family import NF4_BLOCK_WEIGHTS
from tunescope.families.mixtral import (
    MIXTRAL,
    MIXTRAL_8X7B,
    MIXTRAL_TINY,
    linear_weights_per_layer,
    nf4_weight_bytes,
)
from tunescope.hardware import DEVICES
from tunescope.presets import GIB, choose_size, with_budget

# The driver of each reports somewhat less than the sheet prints.
REPORTED_GIB = {24: 22.06, 32: 31.4, 48: 44.4, 80: 79.1, 141: 139.8}


def size(memory_gib: float | None, wanted: str = "auto", own_model: bool = False):
    memory_bytes = None if memory_gib is None else round(memory_gib * GIB)
    return choose_size(MIXTRAL, MIXTRAL_8X7B, wanted, memory_bytes, own_model=own_model)


# --- bytes ---


def test_nf4_bytes_of_full_mixtral_are_those_measured() -> None:
    """24.48 GB on an H200 (FACTS.md)."""
    assert nf4_weight_bytes(MIXTRAL_8X7B, 32) == pytest.approx(24.48e9, rel=0.005)


def test_linears_of_a_layer_by_hand() -> None:
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    assert linear_weights_per_layer(MIXTRAL_8X7B) == attention + 4096 * 8 + 8 * 3 * 4096 * 14336
    assert linear_weights_per_layer(MIXTRAL_8X7B) == linear_weights_per_layer(MIXTRAL.config_at(MIXTRAL_8X7B, 4, 8))


def test_bytes_are_affine_in_depth() -> None:
    per_layer = nf4_weight_bytes(MIXTRAL_8X7B, 2) - nf4_weight_bytes(MIXTRAL_8X7B, 1)
    for depth in range(33):
        assert nf4_weight_bytes(MIXTRAL_8X7B, depth) == pytest.approx(
            nf4_weight_bytes(MIXTRAL_8X7B, 0) + depth * per_layer, abs=depth + 1
        )


def test_a_packed_weight_takes_a_little_over_half_a_byte() -> None:
    weights = 32 * linear_weights_per_layer(MIXTRAL_8X7B)
    packed = nf4_weight_bytes(MIXTRAL_8X7B, 32) - nf4_weight_bytes(MIXTRAL_8X7B, 0)
    assert 0.515 < packed / weights < 0.5165


# --- configurations ---


def test_config_at_changes_depth_and_sparsity_only() -> None:
    changed = MIXTRAL.config_at(MIXTRAL_8X7B, 4, 8)
    differing = {key for key in changed if changed[key] != MIXTRAL_8X7B[key]}
    assert differing == {"num_hidden_layers", "num_experts_per_tok"}
    assert MIXTRAL_8X7B["num_hidden_layers"] == 32
    assert MIXTRAL_8X7B["num_experts_per_tok"] == 2


def test_tiny_is_the_same_architecture_in_whole_blocks() -> None:
    same = ("model_type", "num_local_experts", "hidden_act", "architectures", "rope_theta", "tie_word_embeddings")
    assert all(MIXTRAL_TINY[key] == MIXTRAL_8X7B[key] for key in same)
    for key in ("hidden_size", "intermediate_size"):
        assert MIXTRAL_TINY[key] % NF4_BLOCK_WEIGHTS == 0
    assert MIXTRAL_TINY["num_attention_heads"] * MIXTRAL_TINY["head_dim"] == MIXTRAL_TINY["hidden_size"]


# --- the choice ---


@pytest.mark.parametrize(
    ("memory_gb", "preset"), [(24, "slice"), (32, "full"), (48, "full"), (80, "full"), (141, "full")]
)
def test_auto_takes_the_largest_that_fits(memory_gb: int, preset: str) -> None:
    chosen = size(REPORTED_GIB[memory_gb])
    assert chosen.preset == preset
    assert chosen.total_layers == 32
    assert chosen.depths[0] <= 32


def test_without_a_gpu_auto_takes_tiny() -> None:
    chosen = size(None)
    assert (chosen.preset, chosen.depths, chosen.total_layers) == ("tiny", (2,), 2)


@given(st.floats(0.1, 300))
def test_auto_never_takes_tiny_where_there_is_a_gpu(memory_gib: float) -> None:
    if memory_gib < 11.2:
        with pytest.raises(UserError, match="too small"):
            size(memory_gib)
    elif memory_gib > 11.4:
        assert size(memory_gib).preset in ("full", "slice")


@given(st.floats(1, 300), st.floats(1, 300))
def test_more_memory_never_means_fewer_layers(one_gib: float, other_gib: float) -> None:
    def deepest(memory_gib: float, wanted: str) -> int:
        try:
            return size(memory_gib, wanted).depths[0]
        except UserError:
            return 0

    small, large = sorted((one_gib, other_gib))
    for wanted in ("auto", "slice"):
        assert deepest(small, wanted) <= deepest(large, wanted)


@given(st.floats(12, 300))
def test_a_slice_has_two_depths_that_fit(memory_gib: float) -> None:
    chosen = size(memory_gib, "slice")
    deep, shallow = chosen.depths
    assert 1 <= shallow < deep <= chosen.total_layers == 32
    assert nf4_weight_bytes(MIXTRAL_8X7B, deep) < memory_gib * GIB


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_gpu_of_the_table_gets_a_preset(device) -> None:
    chosen = size(device.memory_gb * 0.92)
    assert chosen.preset == ("slice" if device.memory_gb <= 24 else "full")
    assert nf4_weight_bytes(MIXTRAL_8X7B, chosen.depths[0]) < 0.92 * device.memory_gb * GIB


@pytest.mark.parametrize("wanted", ["full", "slice"])
def test_what_needs_a_gpu_says_so(wanted: str) -> None:
    with pytest.raises(UserError, match="needs a GPU"):
        size(None, wanted)


def test_full_is_tried_where_the_user_insists() -> None:
    assert size(16, "full").preset == "full"  # an oom row is an answer


def test_tiny_never_stands_in_for_the_users_own_model() -> None:
    for memory_gib, wanted in ((None, "auto"), (None, "tiny"), (80, "tiny")):
        with pytest.raises(UserError, match="cannot be your model"):
            size(memory_gib, wanted, own_model=True)
    assert size(None, "full", own_model=True).depths == (32,)


def test_budget_only_ever_takes_away() -> None:
    assert with_budget(None, 24) is None
    assert with_budget(80 * GIB, None) == 80 * GIB
    assert with_budget(80 * GIB, 24) == 24 * GIB
    assert with_budget(80 * GIB, 1000) == 80 * GIB
