"""The memory model's formulas against what autograd really keeps, counted in real models at small sizes, on the CPU."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from tunescope.cost.memory import RESIDENT, kept_bytes, memory_terms
from tunescope.cost.memory_layers import decoder_layer
from tunescope.cost.memory_shapes import Batch, read_decoder, read_setup
from tunescope.cost.memory_weights import allocated, blackmamba_weights, decoder_weights
from tunescope.families.blackmamba import BLACKMAMBA_TINY
from tunescope.families.mixtral import MIXTRAL_TINY
from tunescope.families.qwen3_moe import QWEN3_TINY
from tunescope.models.blackmamba.configuration import BlackMambaConfig
from tunescope.models.blackmamba.modeling import BlackMambaForCausalLM
from tunescope.models.random_weights import random_model

RANK = 8
COMMON = {"optim": "adamw_torch", "gradient_accumulation_steps": 1, "lora_rank": RANK}
QLORA = COMMON | {"finetuning_type": "lora", "quantization_bit": 4, "bf16": True}
LORA = COMMON | {"finetuning_type": "lora", "bf16": True}
FULL = COMMON | {"finetuning_type": "full"}
UNCHECKPOINTED = {"disable_gradient_checkpointing": True}
MIXTRAL = MIXTRAL_TINY | {"num_hidden_layers": 2}
# 16 experts instead of 128, so that few tokens reach them all.
QWEN3_MOE = QWEN3_TINY | {"num_hidden_layers": 2, "num_experts": 16}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN2 = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 32}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PEFT asks whether CUDA's autocast is on, and casts inputs to and fro where it is not."""
    real = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: real(*device) if device else real("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(config: dict[str, Any], recipe: dict[str, Any]) -> Any:
    """As LLaMA-Factory prepares it: adapters and fully trained weights in fp32 unless pure_bf16."""
    own = AutoConfig.for_model(**config)
    own._attn_implementation = "sdpa"
    if recipe.get("quantization_bit"):
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
        )
        model = random_model(type(AutoModelForCausalLM.from_config(own)), own, nf4, None)
        model.config._attn_implementation = "sdpa"
    else:
        model = AutoModelForCausalLM.from_config(own)
        is_bf16 = recipe.get("pure_bf16") or (recipe.get("bf16") and recipe["finetuning_type"] == "lora")
        model = model.to(torch.bfloat16 if is_bf16 else torch.float32)
    if recipe["finetuning_type"] == "lora":
        shape = read_decoder(config)
        targets = sorted(read_setup(recipe, shape.linears).targets)
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM"))
        model.enable_input_require_grads()
    return model.train()


def batch_of(config: dict[str, Any], size: int, length: int, *, is_masked: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, config["vocab_size"], (size, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if is_masked:
        mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def saved_by(run: Callable[[], Any], without: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps of a forward, each once."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in without}
    kept = []  # so that no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def forward(model: Any, batch: dict[str, torch.Tensor], recipe: dict[str, Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(recipe.get("bf16"))):
            return model(**batch).loss

    return run


CASES = [
    pytest.param(MIXTRAL | {"num_experts_per_tok": 2}, QLORA | {"lora_target": "w1,w2,w3,gate"}, id="mixtral-sparse"),
    pytest.param(MIXTRAL | {"num_experts_per_tok": 8}, QLORA | {"lora_target": "w1,w2,w3,gate"}, id="mixtral-dense"),
    pytest.param(MIXTRAL, QLORA | {"lora_target": "all"}, id="mixtral-all"),
    pytest.param(MIXTRAL, QLORA | {"lora_target": "q_proj,v_proj"}, id="mixtral-attention"),
    pytest.param(MIXTRAL, QLORA | {"lora_target": "w1"}, id="mixtral-w1"),
    pytest.param(MIXTRAL, FULL | {"bf16": True, "pure_bf16": True}, id="mixtral-full-pure"),
    pytest.param(QWEN3_MOE, QLORA | {"lora_target": "gate_proj,up_proj,down_proj,gate"}, id="qwen3-moe"),
    pytest.param(QWEN3_MOE | {"norm_topk_prob": False}, QLORA, id="qwen3-moe-all"),
    pytest.param(LLAMA, QLORA, id="llama-qlora"),
    pytest.param(LLAMA, LORA, id="llama-lora"),
    pytest.param(LLAMA, LORA | {"lora_target": "q_proj,down_proj"}, id="llama-lora-two"),
    pytest.param(LLAMA, LORA | {"bf16": False}, id="llama-lora-fp32"),
    pytest.param(LLAMA, FULL | {"bf16": True}, id="llama-full"),
    pytest.param(LLAMA, FULL | {"bf16": True, "pure_bf16": True}, id="llama-full-pure"),
    pytest.param(LLAMA, FULL | {"bf16": False}, id="llama-full-fp32"),
    pytest.param(QWEN2, LORA, id="qwen2-lora"),
    pytest.param(QWEN2, FULL | {"bf16": True}, id="qwen2-full"),
    pytest.param(QWEN3, QLORA, id="qwen3-qlora"),
    pytest.param(QWEN3, FULL | {"bf16": True}, id="qwen3-full"),
    pytest.param(QWEN3, FULL | {"bf16": True, "pure_bf16": True}, id="qwen3-full-pure"),
]


@pytest.mark.parametrize(("config", "recipe"), CASES)
def test_autograd_keeps_to_the_byte_what_is_predicted(config: dict[str, Any], recipe: dict[str, Any]) -> None:
    recipe = recipe | UNCHECKPOINTED
    model = model_of(config, recipe)
    stream = read_setup(recipe, read_decoder(config).linears).stream
    for size, length, is_masked in ((1, 64, False), (2, 64, True), (3, 40, True)):
        batch = batch_of(config, size, length, is_masked=is_masked)
        found = saved_by(forward(model, batch, recipe), [*model.parameters(), *batch.values()])
        # The rotary tables are resident, not a layer's. The loss keeps its total weight, and of one query the labels
        # with the one that shifting added.
        others = 2 * length * read_decoder(config).head_width * stream + 4 + (8 if size == 1 else 0)
        assert found - others == kept_bytes(config, recipe, size, length, is_masked=is_masked), (size, length)


@pytest.mark.parametrize(
    ("config", "recipe"),
    [case for case in CASES if case.id in ("mixtral-sparse", "llama-lora", "llama-full", "qwen3-qlora")],
)
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpointing_keeps_the_inputs_of_layers(
    config: dict[str, Any], recipe: dict[str, Any], is_reentrant: bool
) -> None:
    model = model_of(config, recipe)
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    batch = batch_of(config, 2, 40, is_masked=True)
    inputs: list[torch.Tensor] = []
    for layer in find_layers(model):
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    saved_by(forward(model, batch, recipe), [*model.parameters(), *batch.values()])
    terms = memory_terms(config, recipe, 2, 40)["loss"]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in inputs}
    assert sum(storages.values()) == terms["inputs of layers"]
    assert kept_bytes(config, recipe, 2, 40) < kept_bytes(config, recipe | UNCHECKPOINTED, 2, 40)


@pytest.mark.parametrize(("config", "recipe"), CASES)
def test_a_recomputed_layer_saves_to_the_byte_what_is_predicted(config: dict[str, Any], recipe: dict[str, Any]) -> None:
    model = model_of(config, recipe)
    shape = read_decoder(config)
    setup = read_setup(recipe, shape.linears)
    size, length = 2, 64
    dtype = torch.float32 if setup.stream == 4 else torch.bfloat16
    hidden = torch.randn(size, length, shape.width, dtype=dtype, generator=torch.Generator().manual_seed(0))
    hidden.requires_grad_()
    tables = [torch.randn(1, length, shape.head_width, dtype=dtype) for _ in range(2)]
    layer = find_layers(model)[0]

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(recipe.get("bf16"))):
            return layer(hidden, position_embeddings=tuple(tables), attention_mask=None)

    found = saved_by(run, [*model.parameters(), *tables, hidden])
    layer_memory = decoder_layer(shape, setup, Batch(size, length, False), holds_nf4_inputs=False)
    copies = decoder_weights(shape, setup).layer_copies[0]
    assert found == layer_memory.saved_bytes - layer_memory.saved_input + copies


def find_layers(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.layers


@pytest.mark.parametrize(("config", "recipe"), CASES)
def test_weights_gradients_and_moments_are_exact(config: dict[str, Any], recipe: dict[str, Any]) -> None:
    model = model_of(config, recipe)
    shape = read_decoder(config)
    setup = read_setup(recipe, shape.linears)
    weights = decoder_weights(shape, setup)
    frozen = trained = num_trained = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            num_bytes = allocated(parameter.nbytes)
            if parameter.requires_grad:
                trained += num_bytes
                num_trained += 1
            else:
                frozen += num_bytes
                state = getattr(parameter, "quant_state", None)
                if state is not None:
                    tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
                    frozen += sum(allocated(tensor.nbytes) for tensor in tensors)
    if shape.is_tied:  # met twice, as embedding and as head
        tied = allocated(shape.vocab_size * shape.width * (setup.frozen if setup.is_lora else setup.trained))
        frozen, trained = (frozen - tied, trained) if setup.is_lora else (frozen, trained - tied)
        num_trained -= not setup.is_lora
    assert (weights.frozen, weights.trained, weights.num_trained) == (frozen, trained, num_trained)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    forward(model, batch_of(config, 2, 64, is_masked=False), recipe)().backward()
    optimizer.step()
    gradients = sum(allocated(parameter.grad.nbytes) for parameter in parameters)
    state = [value for values in optimizer.state.values() for name, value in values.items() if name != "step"]
    terms = memory_terms(config, recipe, 2, 64)
    assert terms["optimizer"]["gradients"] == gradients
    assert terms["optimizer"]["optimizer state"] == sum(allocated(tensor.nbytes) for tensor in state)


@pytest.mark.parametrize(("top_k", "size", "length"), [(2, 2, 72), (8, 1, 40)])
def test_blackmamba_keeps_to_the_byte_what_is_predicted(top_k: int, size: int, length: int) -> None:
    config = BLACKMAMBA_TINY | {"num_experts_per_tok": top_k, "loss": "study", "num_hidden_layers": 2}
    config["layers_block_type"] = ["mamba", "moe"]
    recipe = FULL | UNCHECKPOINTED | {"bf16": True, "pure_bf16": True}
    model = BlackMambaForCausalLM(BlackMambaConfig(**config | {"scan": "triton"})).to(torch.bfloat16).train()
    for layer in model.model.layers:
        layer.norm.implementation = "triton"  # which a CPU would not choose by itself
    batch = batch_of(config, size, length, is_masked=False)
    found = saved_by(forward(model, batch, recipe), [*model.parameters(), *batch.values()])
    tokens, width = size * length, config["hidden_size"]
    # Not by autograd's hooks but in a function's own hands: rows' tokens, choices and places.
    found += 3 * 8 * tokens * top_k
    # The final norm's input and its statistics: a CPU's autocast leaves them in bf16.
    found += 2 * tokens * width + 2 * 2 * tokens
    # Which labels are ignored, how many are not, and the loss's total weight.
    found -= (tokens - 1) + 8 + 4
    assert found == kept_bytes(config, recipe, size, length)

    setup = read_setup(recipe, ())
    assert blackmamba_weights(config, setup).trained == sum(allocated(p.nbytes) for p in model.parameters())


def peak_of(run: Callable[[], Any]) -> int:
    """Highest sum of what is allocated while something runs, less what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated_bytes = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated_bytes += event.nbytes()
        highest = max(highest, allocated_bytes)
    return highest


WIDE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


@pytest.mark.parametrize(
    ("vocab_size", "checkpointing"),
    [
        pytest.param(256, {}, id="checkpointed"),  # a layer's backward is the peak
        pytest.param(4096, {}, id="checkpointed-wide-head"),  # the logits are
        pytest.param(1024, UNCHECKPOINTED, id="all-kept"),
    ],
)
@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        case
        for case in CASES
        if case.id in ("mixtral-sparse", "mixtral-dense", "llama-qlora", "llama-lora", "llama-full", "llama-full-pure")
    ],
)
def test_the_peak_of_forward_and_backward_is_predicted(
    config: dict[str, Any], recipe: dict[str, Any], checkpointing: dict[str, Any], vocab_size: int
) -> None:
    """Within 6 %: working sets are of the largest operator, and a CPU's operators are not a GPU's."""
    config, recipe = config | WIDE | {"vocab_size": vocab_size}, recipe | checkpointing
    model = model_of(config, recipe)
    if not checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    run = forward(model, batch_of(config, 4, 256, is_masked=False), recipe)
    run().backward()  # libraries keep something of their first run
    model.zero_grad(set_to_none=True)
    found = peak_of(lambda: run().backward())
    moments = memory_terms(config, recipe, 4, 256, is_masked=False)
    del moments["optimizer"]
    sums = [sum(terms[term] for term in terms if term not in RESIDENT) for terms in moments.values()]
    assert max(sums) == pytest.approx(found, rel=0.06)
