"""BlackMamba against golden vectors of the original code, and as a model of transformers like any other."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from helpers_blackmamba import SETS, golden_config, golden_gradients, golden_io, golden_model, relative
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from tunescope.families.blackmamba import BLACKMAMBA_2_8B, BLACKMAMBA_TINY
from tunescope.models import blackmamba
from tunescope.models.blackmamba.configuration import BlackMambaConfig
from tunescope.models.blackmamba.conversion import to_original
from tunescope.models.blackmamba.loss import study_loss
from tunescope.models.blackmamba.modeling import BlackMambaForCausalLM

EXACT, ROUNDED = torch.float64, torch.float32
SUFFIX = {EXACT: "_f64", ROUNDED: ""}
MOE = ("grouped", "loop")

both_sets = pytest.mark.parametrize("name", SETS)
both_ways = pytest.mark.parametrize("moe", MOE)


def small(**changes: Any) -> BlackMambaForCausalLM:
    torch.manual_seed(0)
    return BlackMambaForCausalLM(BlackMambaConfig(**BLACKMAMBA_TINY | {"vocab_size": 64} | changes))


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


# --- golden vectors --------------------------------------------------------------------------------------------------


@both_sets
@both_ways
def test_float64_equals_the_original_to_rounding(name: str, moe: str) -> None:
    """Logits, both losses and every gradient of which there is a float64 twin: the sharpest test there is."""
    io, gradients = golden_io(name), golden_gradients(name)
    model = golden_model(name, EXACT, moe=moe, loss="study")
    out = model(input_ids=io["input_ids"], attention_mask=io["attention_mask"], labels=io["labels"])
    assert (out.logits - io["logits_f64"]).abs().max() < 1e-12
    assert abs(out.loss - io["loss_finetune_f64"]) < 1e-12
    plain = golden_model(name, EXACT, moe=moe)(input_ids=io["input_ids"], labels=io["labels"])
    assert abs(plain.loss - io["loss_ce_f64"]) < 1e-12

    out.loss.backward()
    found = to_original({key: p.grad for key, p in model.named_parameters()}, golden_config(name))
    twins = {key.removeprefix("finetune_f64."): g for key, g in gradients.items() if key.startswith("finetune_f64.")}
    assert len(twins) >= 10
    for key, wanted in twins.items():
        assert relative(found[key], wanted) < 1e-12, key


@both_sets
@both_ways
def test_float32_gradients_of_every_parameter(name: str, moe: str) -> None:
    """With the tolerances of golden/README.md; an expert without tokens gets zeros, not nothing."""
    io, gradients = golden_io(name), golden_gradients(name)
    for loss, prefix in (("study", "finetune."), ("cross_entropy", "ce.")):
        model = golden_model(name, moe=moe, loss=loss)
        out = model(input_ids=io["input_ids"], labels=io["labels"])
        assert abs(out.loss - io["loss_finetune" if loss == "study" else "loss_ce"]) < 2e-6
        out.loss.backward()
        found = to_original({key: p.grad for key, p in model.named_parameters()}, golden_config(name))
        wanted = {key.removeprefix(prefix): g for key, g in gradients.items() if key.startswith(prefix)}
        if loss == "study":
            assert wanted.keys() == found.keys()
        zero = {key for key, g in wanted.items() if not g.any()}
        assert {key for key in wanted if not found[key].any()} == zero
        assert bool(zero) == (name == "a_top2" and loss == "study") or loss == "cross_entropy"
        for key, g in wanted.items():
            assert relative(found[key], g) < 1e-5, key


@both_sets
def test_what_every_block_computes(name: str) -> None:
    """Residuals, mixer outputs, router logits and choices: where a mistake would lie, not just that there is one."""
    io, model = golden_io(name), golden_model(name)
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[key] = output[1] if key.endswith("residual") else output

        return hook

    model.model.embeddings.register_forward_hook(keep("embedding_out"))
    model.model.final_norm.register_forward_hook(keep("final_norm_out"))
    for i, layer in enumerate(model.model.layers):
        layer.norm.register_forward_hook(keep(f"layer.{i:02}.residual"))
        (layer.mamba if layer.is_mamba else layer.moe).register_forward_hook(keep(f"layer.{i:02}.mixer_out"))
        if not layer.is_mamba:
            layer.moe.router.register_forward_hook(keep(f"layer.{i:02}.router_logits"))
    model(input_ids=io["input_ids"])
    assert len(seen) == 2 + 2 * 4 + 2
    for key, found in seen.items():
        assert (found - io[key]).abs().max() < (1e-5 if "logits" in key else 3e-5), key
    for i in (1, 3):
        weight, expert = seen[f"layer.{i:02}.router_logits"].sigmoid().topk(SETS[name], dim=-1)
        assert torch.equal(expert, io[f"layer.{i:02}.topk_index"])
        assert (weight - io[f"layer.{i:02}.topk_weight"]).abs().max() < 1e-5


@both_sets
def test_losses_of_unmasked_labels_differ_in_how_they_are_shifted(name: str) -> None:
    """The study's pairs the last position of a sequence with the first label of the next one."""
    io = golden_io(name)
    model = golden_model(name, loss="study")
    logits = model(input_ids=io["input_ids"]).logits
    labels = io["labels_unmasked"]
    assert abs(study_loss(logits, labels) - io["loss_finetune_unmasked"]) < 2e-6
    plain = golden_model(name)(input_ids=io["input_ids"], labels=labels).loss
    assert abs(plain - io["loss_ce_unmasked"]) < 2e-6
    alone = torch.stack([study_loss(logits[[i]], labels[[i]]) for i in range(len(labels))]).mean()
    assert abs(alone - io["loss_finetune_unmasked"]) > 1e-3


def test_bfloat16_stays_near_the_original() -> None:
    """It is not pinned: the original itself deviates by 2 % on this set, where all experts run and none can change."""
    io = golden_io("b_top8")
    logits = golden_model("b_top8", torch.bfloat16)(input_ids=io["input_ids"]).logits
    assert relative(logits.float(), io["logits"]) < 0.04


# --- what it computes ------------------------------------------------------------------------------------------------


def test_no_position_sees_a_later_one_and_sequences_are_apart() -> None:
    model, ids = small(), tokens()
    before = model(input_ids=ids).logits
    changed = ids.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 64
    after = model(input_ids=changed).logits
    torch.testing.assert_close(after[0, :6], before[0, :6], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)
    assert (after[0, 6:] - before[0, 6:]).abs().amax(-1).min() > 1e-4


def test_the_attention_mask_is_ignored_and_right_padding_changes_nothing_before_it() -> None:
    model, ids = small(), tokens()
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    logits = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, logits)
    torch.testing.assert_close(model(input_ids=ids[:, :8]).logits, logits[:, :8], rtol=0, atol=1e-6)


def test_training_and_evaluation_are_the_same_function() -> None:
    model, ids = small(), tokens()
    assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_top_k_is_the_configurations(top_k: int) -> None:
    model, ids = small(num_experts_per_tok=top_k), tokens()
    rows: list[int] = []
    for layer in model.model.layers[1::2]:
        layer.moe.experts.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    model(input_ids=ids)
    assert rows == [ids.numel() * top_k] * 2


def test_the_last_logits_alone_are_the_last_logits() -> None:
    model, ids = small(), tokens()
    every = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=2).logits, every[:, -2:])


def test_embeddings_may_be_given_in_place_of_ids() -> None:
    model, ids = small(), tokens()
    given = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(given, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


# --- as any model ----------------------------------------------------------------------------------------------------


def test_parameters_of_the_two_released_sizes() -> None:
    sizes = {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 30, "layers_block_type": None}
    with torch.device("meta"):
        large = BlackMambaForCausalLM(BlackMambaConfig(**BLACKMAMBA_2_8B))
        smaller = BlackMambaForCausalLM(BlackMambaConfig(**BLACKMAMBA_2_8B | sizes))
    assert large.num_parameters() == 2_783_213_584
    assert smaller.num_parameters() == 1_458_462_072
    assert sum(p.numel() for p in large.model.layers[0].parameters()) == 13_705_792
    assert sum(p.numel() for p in large.model.layers[1].parameters()) == 136_803_272


def test_saved_and_loaded_it_is_the_same_and_still_tied(tmp_path: Path) -> None:
    blackmamba.register()
    model, ids = small(), tokens()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BlackMambaConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is BlackMambaForCausalLM
    assert loaded.lm_head.weight is loaded.model.embeddings.weight
    for (name, before), (other, after) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(before, after), name
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_folder_without_weights_gets_random_ones_the_same_each_time(tmp_path: Path) -> None:
    blackmamba.register()
    BlackMambaConfig(**BLACKMAMBA_TINY).save_pretrained(tmp_path)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.isfinite().all(), name
    assert first.lm_head.weight is first.model.embeddings.weight
    assert first.model.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)
    mixer = first.model.layers[0].mamba
    assert mixer.A_log.exp()[0].tolist() == pytest.approx(range(1, 17))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.999 <= steps.min() <= 3e-3
    assert 0.03 <= steps.max() <= 0.1 * 1.001
    half = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    ids = tokens()
    plain, checkpointed = small(), small()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    runs: list[int] = []
    checkpointed.model.layers[1].moe.register_forward_pre_hook(lambda *_: runs.append(1))
    for model in (plain, checkpointed):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    assert len(runs) == 2
    for (name, one), (_, other) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_lora_adapts_its_linears_and_merges_exactly() -> None:
    """Also those whose output has an unusual layout."""
    model, ids = small(), tokens()
    before = model(input_ids=ids).logits
    targets = ["in_proj", "x_proj", "out_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted.eval()
    logits = adapted(input_ids=ids).logits
    assert (logits - before).abs().max() > 1e-3
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets) * 2
    assert all(gradient is not None and gradient.any() for gradient in trained.values())
    torch.testing.assert_close(adapted.merge_and_unload()(input_ids=ids).logits, logits, rtol=0, atol=1e-5)


def test_loaded_in_4_bit_it_is_the_same_function_of_the_rounded_weights(tmp_path: Path) -> None:
    """A quantiser puts its own linears in place of those here; none of them may add what the scan adds itself."""
    blackmamba.register()
    model, ids = small(), tokens()
    model.save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, torch_dtype=torch.float32)
    replaced = {name: m for name, m in quantised.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert {name.rpartition(".")[2] for name in replaced} == {"in_proj", "x_proj", "out_proj", "router"}
    for name, module in replaced.items():
        rounded = bitsandbytes.functional.dequantize_4bit(module.weight, module.weight.quant_state)
        model.get_submodule(name).weight.data.copy_(rounded)
    torch.testing.assert_close(quantised(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="holds no weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "empty", quantization_config=nf4)


def test_generation_continues_with_the_likeliest_token_each_time() -> None:
    model, ids = small().eval(), tokens(batch=2, length=3)
    made = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert made.shape == (2, 8)
    for end in range(3, 8):
        assert torch.equal(model(input_ids=made[:, :end]).logits[:, -1].argmax(-1), made[:, end])


def test_under_autocast_a_float32_model_runs_its_matmuls_in_bfloat16() -> None:
    model, ids = small(), tokens()
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if re.search(r"(in_proj|fc1|router)$", name):
            module.register_forward_hook(lambda m, args, output, name=name: seen.update({name: output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert set(seen.values()) == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"layers_block_type": ["mamba"]}, "layers_block_type"),
        ({"layers_block_type": ["mamba", "mlp"] * 2}, "layers_block_type"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BlackMambaConfig(**BLACKMAMBA_TINY | changes)


def test_a_few_steps_of_descent_lower_the_loss() -> None:
    model, ids = small(), tokens(batch=4, length=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(after < before for before, after in pairwise(losses))
