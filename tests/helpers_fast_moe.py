"""Small Mixtral and Qwen3-MoE models, in NF4 with adapters as this project trains them, and a step of one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from tunescope.families.mixtral import MIXTRAL_TINY
from tunescope.families.qwen3_moe import QWEN3_TINY
from tunescope.models.random_weights import random_model

MIXTRAL = MIXTRAL_TINY
QWEN3 = QWEN3_TINY | {"num_hidden_layers": 2, "num_experts": 16}
TARGETS = {"mixtral": ["w1", "w2", "w3", "gate"], "qwen3_moe": ["gate_proj", "up_proj", "down_proj", "gate"]}
FAMILIES = {"mixtral": MIXTRAL, "qwen3": QWEN3}


def build(
    config: dict[str, Any],
    *,
    targets: list[str] | None = None,
    quantised: bool = True,
    nested: bool = True,
    quant_type: str = "nf4",
    storage: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    reentrant: bool | None = None,
    **lora: Any,
) -> Any:
    """The same model at each call, in training mode, with adapters that are not zero.

    targets: what has adapters, by default the experts and the router; [] for no PEFT at all. reentrant: how to
    checkpoint; None: not.
    """
    own = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "torch_dtype"}, dtype=dtype)
    own._attn_implementation = "sdpa"
    model_class = type(AutoModelForCausalLM.from_config(own))
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_quant_storage=storage,
    )
    model = random_model(model_class, own, quantisation if quantised else None, {"": device})
    model.config._attn_implementation = "sdpa"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        # Or bitsandbytes packs weights anew for inference on some CPUs, and fails at a router of 8 outputs.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    targets = TARGETS[config["model_type"]] if targets is None else targets
    if targets:
        torch.manual_seed(1)
        settings = {"r": 8, "lora_alpha": 12, "init_lora_weights": False} | lora
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings))
        # As training leaves them: all of about the same weight in the output.
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(0.2)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model.train()


def blocks(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("SparseMoeBlock")]


def tokens(batch: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 1000, (batch, length), generator=torch.Generator().manual_seed(seed))


def step(model: Any, ids: torch.Tensor, **arguments: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """What forward returns, and the gradients by name; zeros where the stock path leaves none."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, **arguments)
    out.loss.backward()
    return out, gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    """By the norm of each tensor's difference."""
    assert found.keys() == wanted.keys()
    assert found
    for name, tensor in wanted.items():
        error, size = float((found[name].float() - tensor.float()).norm()), float(tensor.float().norm())
        assert error <= relative * size + 1e-9, f"{name}: {error / max(size, 1e-30):.2e}"


@contextmanager
def routed(model: Any, bias_E: torch.Tensor) -> Iterator[None]:
    """Every router's logits with something added, so that it sends tokens where a test wants them."""
    handles = [block.gate.register_forward_hook(lambda module, args, out: out + bias_E) for block in blocks(model)]
    yield
    for handle in handles:
        handle.remove()


def both_ways(model: Any, accelerate: Callable[..., Any], run: Callable[[], Any]) -> tuple[Any, Any]:
    """What run() gives on the stock path, and grouped; the model is as it was afterwards."""
    stock = run()
    accelerated = accelerate(model)
    try:
        return stock, run()
    finally:
        accelerated.restore()
