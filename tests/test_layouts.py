"""Where a module lies in its model, and what an operator is called: by a layout, or by the model's own names."""

import re
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from tunescope import paper
from tunescope.analyze.layouts import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LAYER_ITSELF,
    LAYOUTS,
    OUTSIDE_LAYERS,
    Division,
)
from tunescope.families import find_family
from tunescope.families.family import OpRule
from tunescope.families.mixtral import MIXTRAL as FAMILY
from tunescope.families.mixtral import MIXTRAL_TINY
from tunescope.measure.module_calls import ModuleCalls
from tunescope.measure.phases import decoder_layers

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
DEQUANT_4BIT, GEMM_4BIT = "bitsandbytes::dequantize_4bit", "bitsandbytes::gemm_4bit"
DECODE = "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)"
DECODE_FP4 = "void kDequantizeBlockwise<__half, 512, 64, 8, 1>(float*, unsigned char*)"
DECODE_SCALES = "void kDequantizeBlockwise<float, 512, 64, 8, 0>(float*, unsigned char*)"
ADD_FLOAT = "void at::native::elementwise_kernel<128, 2, CUDAFunctor_add<float> >(int)"
ADD_BF16 = "void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add<c10::BFloat16> >(int)"
FUSED = "void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>(int, int)"
GEMM = "nvjet_sm90_tst_64x8_64x16_2x4_h_bz_TNT"


def modules_of(model: torch.nn.Module) -> pd.DataFrame:
    return pd.DataFrame(ModuleCalls(model).module_rows())


def table(**classes: str) -> pd.DataFrame:
    """path -> class, with '__' for '.' and '_root' for the model itself."""
    rows = [
        {"path": path.replace("__", ".").replace("_root", ""), "class_name": name} for path, name in classes.items()
    ]
    return pd.DataFrame(rows, columns=["path", "class_name"])


def mixtral(*, wrapped: bool) -> Any:
    config = FAMILY.config_at(MIXTRAL_TINY, 2, 2)
    model = MixtralForCausalLM(MixtralConfig(**config))
    if not wrapped:
        return model
    adapters = peft.LoraConfig(r=4, target_modules=["gate", "w1", "w2", "w3"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapters)


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "peft"])
def divided(request: Any) -> tuple[Any, Division, str]:
    """A tiny Mixtral, its division, and what stands before its paths."""
    model = mixtral(wrapped=request.param)
    return model, Division(modules_of(model)), "base_model.model." if request.param else ""


# --- places ----------------------------------------------------------------------------------------------------------


def test_every_module_of_mixtral_has_its_place(divided: tuple[Any, Division, str]) -> None:
    model, division, prefix = divided
    assert division.layout is FAMILY.layout
    within = {
        "input_layernorm": "input_norm",
        "self_attn": "attention",
        "post_attention_layernorm": "post_attention_norm",
        "block_sparse_moe": "moe",
    }
    outside = {
        "model.embed_tokens": EMBEDDING,
        "model.norm": FINAL_NORM,
        "lm_head": HEAD,
        "model": OUTSIDE_LAYERS,
        "model.layers": OUTSIDE_LAYERS,
        "model.rotary_emb": OUTSIDE_LAYERS,
        "": HEAD,
    }
    for path, _ in model.named_modules():
        if match := re.fullmatch(rf"{re.escape(prefix)}model\.layers\.(\d+)((?:\.(\w+))?.*)", path):
            part = within[match[3]] if match[3] else LAYER_ITSELF
            assert division.place(path) == (int(match[1]), part, match[2])
        elif path.startswith(prefix):
            assert division.place(path) == (-1, outside[path.removeprefix(prefix)], "")
        else:  # PEFT's own, around the model: what its forward does last is the loss
            assert division.place(path or type(model).__name__) == (-1, HEAD, "")


def test_the_model_itself_goes_by_its_class_where_its_path_is_empty(divided: tuple[Any, Division, str]) -> None:
    """As attribution names it."""
    model, division, _ = divided
    assert division.place(type(model).__name__) == (-1, HEAD, "")


@pytest.mark.parametrize("name", ["(optimizer)", "(between steps)", "(outside modules)", "unattributed"])
def test_what_is_no_module_keeps_its_name(name: str, divided: tuple[Any, Division, str]) -> None:
    assert divided[1].place(name) == (-1, name, "")


def test_an_adapter_of_the_embedding_is_the_embeddings() -> None:
    division = Division(
        table(
            _root="PeftModel", model__embed_tokens="Embedding", model__embed_tokens__lora_embedding_A="ParameterDict",
            model__embed_tokens__base_layer="Embedding", model__rotary_emb="LlamaRotaryEmbedding",
        )
    )  # fmt: skip
    for below in ("", ".base_layer", ".lora_embedding_A"):
        assert division.place(f"model.embed_tokens{below}")[1] == EMBEDDING
    assert division.place("model.rotary_emb")[1] == OUTSIDE_LAYERS


# --- models without a layout -----------------------------------------------------------------------------------------


def test_llama_is_divided_by_its_own_names() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS))
    division = Division(modules_of(model))
    assert division.layout is None
    assert division.place("model.layers.2.mlp.down_proj") == (2, "mlp", ".mlp.down_proj")
    assert division.place("model.layers.0") == (0, LAYER_ITSELF, "")
    assert division.place("model.norm")[1] == FINAL_NORM
    assert division.place("lm_head")[1] == HEAD
    parts = {division.place(path)[1] for path, _ in model.named_modules() if path.startswith("model.layers.1.")}
    assert parts == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def test_an_unknown_mixture_is_divided_by_its_own_names_and_experts_are_no_layers() -> None:
    model = OlmoeForCausalLM(OlmoeConfig(**SMALL, **HEADS, num_experts=4, num_experts_per_tok=2))
    division = Division(modules_of(model))
    assert division.layout is None
    assert division.place("model.layers.1.mlp.experts.3.up_proj") == (1, "mlp", ".mlp.experts.3.up_proj")
    assert {division.place(path)[0] for path, _ in model.named_modules()} == {-1, 0, 1, 2}


def test_layers_are_those_that_are_timed() -> None:
    """The reading side and the measuring side find the same ones, each by itself."""
    models = [
        mixtral(wrapped=True),
        LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS)),
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList([torch.nn.ReLU(), torch.nn.GELU()])),
        torch.nn.ModuleDict({"a": torch.nn.ModuleList([torch.nn.Linear(2, 2)]), "b": torch.nn.ModuleList()}),
    ]
    for model in models:
        division = Division(modules_of(model))
        timed = {path for path, module in model.named_modules() if module in set(decoder_layers(model))}
        layers = {path for path, _ in model.named_modules() if division.place(path)[1] == LAYER_ITSELF}
        assert layers == timed


def test_a_model_without_layers_and_no_model_at_all() -> None:
    division = Division(table(_root="Net", body="Linear", head="Linear"))
    assert division.place("body") == (-1, OUTSIDE_LAYERS, "")
    assert division.place("head") == (-1, HEAD, "")
    assert division.place("Net") == (-1, HEAD, "")
    empty = Division(table())
    assert empty.layout is None
    assert empty.place("anything") == (-1, OUTSIDE_LAYERS, "")
    assert empty.place("(optimizer)") == (-1, "(optimizer)", "")


def test_paths_are_no_patterns() -> None:
    division = Division(table(_root="Net", **{"a(b[c": "ModuleList", "a(b[c.0": "Linear", "a(b[c.1": "Linear"}))
    assert division.place("a(b[c.1") == (1, LAYER_ITSELF, "")
    assert division.place("aXb[c.1") == (-1, OUTSIDE_LAYERS, "")


def test_two_stacks_of_layers_are_not_mixed() -> None:
    """An encoder and a decoder, or a vision tower before a language model."""
    stacks = {f"{name}__block": "ModuleList" for name in ("encoder", "decoder")}
    stacks |= {f"{name}__block__{layer}": "T5Block" for name in ("encoder", "decoder") for layer in (0, 1)}
    division = Division(table(_root="T5", **stacks))
    assert division.place("encoder.block.0.mlp")[:2] != division.place("decoder.block.0.mlp")[:2]


def test_a_mixtral_of_one_layer_has_one_layer() -> None:
    experts = {f"layers__0__block_sparse_moe__experts__{number}": "MixtralBlockSparseTop2MLP" for number in range(8)}
    division = Division(
        table(
            _root="MixtralForCausalLM", layers="ModuleList", layers__0="MixtralDecoderLayer",
            layers__0__block_sparse_moe="MixtralSparseMoeBlock", layers__0__block_sparse_moe__experts="ModuleList",
            **experts,
        )
    )  # fmt: skip
    assert division.place("layers.0.block_sparse_moe.experts.3")[:2] == (0, "moe")


# --- operators -------------------------------------------------------------------------------------------------------


def labels_of(rule: OpRule) -> set[str]:
    """All that a rule can give: {1} stands for the names between which its path's last group chooses."""
    if "{1}" not in rule.label:
        return {rule.label}
    names = re.search(r"\(([^()?]+)\)", rule.path)[1]
    alternatives = [f"w{number}" for number in (1, 2, 3)] if names == "w[123]" else names.split("|")
    return {rule.label.replace("{1}", name) for name in alternatives}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_order_of_operators_has_every_label_once(layout: Any) -> None:
    assert len(set(layout.op_order)) == len(layout.op_order)
    rules = [rule for rules in layout.operators.values() for rule in rules]
    assert set(layout.op_order) == set.union(*map(labels_of, rules))
    assert set(layout.operators) <= set(layout.parts)


@pytest.mark.parametrize("model", ["mixtral", "blackmamba"])
def test_the_papers_operators_have_our_names(model: str) -> None:
    layout = find_family(model).layout
    named = {row["kernel"] for row in paper.rows("kernel_latency") if row["model"] == model}
    assert named
    assert named <= set.union(*map(labels_of, layout.operators["moe"]))
    assert next(iter(layout.operators)) == "moe"
    parts = {row["layer"] for row in paper.rows("layer_latency") if row["model"] == model}
    assert parts == set(layout.parts)


BLOCK, GATE, EXPERT = ".block_sparse_moe", ".block_sparse_moe.gate", ".block_sparse_moe.experts.5"
BACKWARD = "MatMul4BitBackward"
# Module below its layer, node, outermost operator, innermost operator, kernel -> label. Most are from an H200.
OPERATORS: list[tuple[tuple[str, str, str, str, str], str]] = [
    ((f"{EXPERT}.w1.base_layer", "", "MatMul4Bit", GEMM_4BIT, DECODE), "w1_dequant"),
    ((f"{EXPERT}.w2.base_layer", "", "MatMul4Bit", GEMM_4BIT, DECODE_FP4), "w2_dequant"),
    ((f"{EXPERT}.w3.base_layer", "", "MatMul4Bit", GEMM_4BIT, DECODE_SCALES), "scales_dequant"),
    ((f"{EXPERT}.w3.base_layer", "", "MatMul4Bit", "aten::add", ADD_FLOAT), "scales_dequant"),
    ((f"{EXPERT}.w3.base_layer", "", "MatMul4Bit", "aten::mm", GEMM), "matmul(w3)"),
    ((f"{EXPERT}.w2.base_layer", "", "MatMul4Bit", GEMM_4BIT, FUSED), "matmul(w2) decoding"),
    ((f"{EXPERT}.w2.base_layer", BACKWARD, DEQUANT_4BIT, DEQUANT_4BIT, DECODE), "w2_dequant"),
    ((f"{EXPERT}.w2.base_layer", BACKWARD, "aten::add_", "aten::add_", ADD_FLOAT), "scales_dequant"),
    ((f"{EXPERT}.w2.base_layer", BACKWARD, "aten::matmul", "aten::mm", GEMM), "matmul(w2)"),
    ((f"{EXPERT}.w2.base_layer", BACKWARD, "aten::to", "aten::copy_", "direct_copy_kernel"), "casts and copies"),
    ((f"{EXPERT}.w1", "", "aten::linear", "aten::mm", GEMM), "matmul(w1)"),  # not quantised, not adapted
    ((GATE, "", "aten::linear", "aten::mm", GEMM), "matmul(router)"),
    ((f"{GATE}.base_layer", "", "MatMul4Bit", GEMM_4BIT, DECODE), "router_dequant"),
    ((f"{GATE}.base_layer", "", "MatMul4Bit", GEMM_4BIT, FUSED), "matmul(router) decoding"),
    ((f"{GATE}.base_layer", "", "MatMul4Bit", "aten::mm", GEMM), "matmul(router)"),
    ((f"{GATE}.base_layer", "", "MatMul4Bit", GEMM_4BIT, DECODE_SCALES), "scales_dequant"),
    ((f"{GATE}.lora_A.default", "", "aten::linear", "aten::mm", GEMM), "matmul(lora)"),
    ((f"{EXPERT}.w1.lora_B.default", "MmBackward0", "aten::mm", "aten::mm", GEMM), "matmul(lora)"),
    ((f"{EXPERT}.w1.lora_B.default", "ToCopyBackward0", "aten::to", "aten::copy_", "copy"), "casts and copies"),
    (
        (f"{EXPERT}.w1.lora_B.default", "torch::autograd::AccumulateGrad", "aten::add_", "aten::add_", ADD_FLOAT),
        "gradient accumulation",
    ),
    ((f"{EXPERT}.w1", "", "aten::mul", "aten::mul", "AUnaryFunctor"), "lora scaling and adding"),
    ((GATE, "", "aten::add", "aten::add", ADD_BF16), "lora scaling and adding"),
    ((f"{EXPERT}.w1", "", "aten::clone", "aten::copy_", "Memcpy DtoD (Device -> Device)"), "casts and copies"),
    ((f"{EXPERT}.act_fn", "", "aten::silu", "aten::silu", "silu_kernel"), "activation"),
    ((f"{EXPERT}.act_fn", "SiluBackward0", "aten::silu_backward", "aten::silu_backward", "k"), "activation"),
    ((EXPERT, "", "aten::mul", "aten::mul", "MulFunctor"), "elementwise_mult"),
    ((EXPERT, "MulBackward0", "aten::mul", "aten::mul", "MulFunctor"), "elementwise_mult"),
    ((BLOCK, "", "aten::softmax", "aten::_softmax", "softmax_warp_forward"), "softmax"),
    ((BLOCK, "", "aten::softmax", "aten::copy_", "unrolled_elementwise_kernel"), "softmax"),
    ((BLOCK, "SoftmaxBackward0", "aten::_softmax_backward_data", "aten::mul", "MulFunctor"), "softmax"),
    ((BLOCK, "", "aten::topk", "aten::topk", "void at::native::sbtopk::gatherTopK<float>()"), "topk"),
    ((BLOCK, "TopkBackward0", "aten::zeros", "aten::fill_", "FillFunctor"), "topk"),
    ((BLOCK, "", "aten::one_hot", "aten::scatter_", "_scatter_gather_elementwise_kernel"), "gather/scatter/index"),
    ((BLOCK, "", "aten::nonzero", "aten::nonzero", "Memcpy DtoH (Device -> Pageable)"), "gather/scatter/index"),
    ((BLOCK, "", "aten::item", "aten::_local_scalar_dense", "Memcpy DtoH"), "gather/scatter/index"),
    ((BLOCK, "", "aten::index_add_", "aten::index_add_", "indexFuncLargeIndex"), "gather/scatter/index"),
    ((BLOCK, "IndexBackward0", "aten::_index_put_impl_", "aten::mul", "AUnaryFunctor"), "gather/scatter/index"),
    ((f"{EXPERT}.w1.base_layer", "", "aten::empty_like", "aten::fill_", "Memset (Device)"), "rest of the NF4 linears"),
    # The grouped path: all experts in the block itself.
    ((BLOCK, "", "_Experts", "_Experts", "forward_kernel"), "matmul(experts) decoding"),
    ((BLOCK, "_ExpertsBackward", "_ExpertsBackward", "_ExpertsBackward", "dx_kernel"), "matmul(experts) decoding"),
    ((BLOCK, "", "aten::_grouped_mm", "aten::_grouped_mm", "void cutlass::device_kernel<at::cuda>"), "matmul(experts)"),
    ((BLOCK, "", "_Experts", "_Experts", "dequantize_kernel"), "experts_dequant"),
    ((BLOCK, "", "_Experts", "_Experts", "scales_kernel"), "scales_dequant"),
    ((BLOCK, "", "_Experts", "_Experts", "gated_silu_kernel"), "activation"),
    ((BLOCK, "_ExpertsBackward", "_ExpertsBackward", "_ExpertsBackward", "gated_silu_backward_kernel"), "activation"),
    ((BLOCK, "", "_Experts", "_Experts", "gather_sum_kernel"), "gather/scatter/index"),
    ((".block_sparse_moe.experts", "", "aten::abs", "aten::abs", "k"), "other"),
]  # fmt: skip


@pytest.mark.parametrize(("work", "label"), OPERATORS, ids=["|".join(work[:4]) for work, _ in OPERATORS])
def test_label_of_an_operator(work: tuple[str, str, str, str, str], label: str) -> None:
    division = Division(table(_root="MixtralForCausalLM", moe="MixtralSparseMoeBlock"))
    assert division.op_label("moe", *work) == label


def test_every_label_has_a_case() -> None:
    decoding = {f"matmul({name}) decoding" for name in ("w1", "w3")}
    rules = FAMILY.layout.operators["moe"]
    assert {label for _, label in OPERATORS} | decoding | {"w3_dequant"} == set.union(*map(labels_of, rules))


def test_a_copy_in_an_adapters_linear_is_no_product() -> None:
    division = Division(table(_root="MixtralForCausalLM", moe="MixtralSparseMoeBlock"))
    work = (f"{EXPERT}.w1.lora_A.default", "", "aten::linear", "aten::copy_", "bfloat16_copy_kernel_cuda")
    assert division.op_label("moe", *work) == "casts and copies"


def test_a_sum_of_gradients_is_no_shift_of_scales() -> None:
    """Autograd adds up the gradients of an expert's input in the node that comes last; scales are never bf16."""
    division = Division(table(_root="MixtralForCausalLM", moe="MixtralSparseMoeBlock"))
    work = (f"{EXPERT}.w1.base_layer", BACKWARD, "aten::add_", "aten::add_", ADD_BF16)
    assert division.op_label("moe", *work) != "scales_dequant"


def test_every_module_of_the_moe_layer_is_known_for_what_it_mainly_does(divided: tuple[Any, Division, str]) -> None:
    """A module that runs anything has no work that is `other`."""
    model, division, prefix = divided
    mains = {"Linear": "aten::mm", "SiLUActivation": "aten::silu", "SiLU": "aten::silu"}
    mains |= {"MixtralBlockSparseTop2MLP": "aten::mul", "MixtralSparseMoeBlock": "aten::topk"}
    seen = set()
    for path, module in model.named_modules():
        _, part, below = division.place(path)
        op = mains.get(type(module).__name__)
        if part == "moe" and op is not None:
            label = division.op_label("moe", below, "", op, op, op)
            assert label != "other", path
            seen.add(label)
    matrices = {"matmul(w1)", "matmul(w2)", "matmul(w3)", "matmul(router)", "activation", "elementwise_mult", "topk"}
    assert seen == matrices | ({"matmul(lora)"} if prefix else set())


@pytest.mark.parametrize(
    ("node", "outer_op", "op", "label"),
    [
        ("", "aten::linear", "aten::addmm", "matmul"),
        ("MmBackward0", "aten::mm", "aten::mm", "matmul"),
        ("", "aten::to", "aten::copy_", "copy"),
        ("", "aten::scaled_dot_product_attention", "aten::_flash_attention_forward", "attention"),
        ("", "aten::rms_norm", "aten::rms_norm", "norm"),
        ("", "aten::softmax", "aten::_softmax", "softmax"),
        ("", "aten::index", "aten::index", "index"),
        ("", "aten::embedding", "aten::index_select", "index"),
        ("", "aten::mean", "aten::mean", "reduction"),
        ("", "MatMul4Bit", "bitsandbytes::dequantize_4bit", "dequantisation"),
        ("torch::autograd::AccumulateGrad", "aten::add_", "aten::add_", "gradient accumulation"),
        ("", "aten::mul", "aten::mul", "elementwise"),
    ],
)
def test_operators_of_any_model_are_named_by_kind(node: str, outer_op: str, op: str, label: str) -> None:
    division = Division(table(_root="LlamaForCausalLM"))
    assert division.op_label("mlp", ".mlp", node, outer_op, op, op) == label
