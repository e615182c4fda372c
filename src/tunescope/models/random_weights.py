"""Full-size weights without a checkpoint: random, quantised on the device as they are made.

A folder with a config.json and no weights then loads through AutoModelForCausalLM like any model, so that the training
engine needs no change. Mixtral-8x7B in NF4 (24.5 GB) takes seconds on a GPU and never exists in bf16.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

from tunescope import checkpoints

SEED = 20240806  # any fixed number: two runs on one machine then train the same weights


def register(own_config_class: type[PretrainedConfig], model_class: Any) -> None:
    """Makes AutoModelForCausalLM build random weights for a folder of this config that holds none. Safe to call twice.

    model_class: a causal language model of transformers with NF4-ready linears and a rotary embedding.
    """

    class Filled(model_class):
        """The stock model, whose from_pretrained also accepts a folder without weights."""

        config_class = own_config_class

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
            folder = Path(pretrained_model_name_or_path)
            if not (folder / "config.json").is_file() or checkpoints.holds_weights(folder):
                return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            config = kwargs.get("config") or own_config_class.from_pretrained(folder)
            return random_model(cls, config, kwargs.get("quantization_config"), kwargs.get("device_map"))

    # The name stays that of the class it stands for: the Trainer looks it up to decide whether labels are shifted.
    Filled.__name__ = Filled.__qualname__ = model_class.__name__
    AutoModelForCausalLM.register(own_config_class, Filled, exist_ok=True)


def target_device(device_map: Any) -> torch.device:
    """device_map: `{"": device}` as the engine passes it, or None for the CPU."""
    return torch.device(device_map[""] if isinstance(device_map, dict) else "cpu")


def random_model(
    model_class: type[nn.Module],
    config: PretrainedConfig,
    quantization_config: Any,
    device_map: Any,
) -> Any:
    """A model with N(0, initializer_range) weights on one device, linears quantised if asked. See target_device."""
    device = target_device(device_map)
    dtype = config.torch_dtype if isinstance(config.torch_dtype, torch.dtype) else torch.bfloat16
    with torch.device("meta"):
        model = model_class(config)
    quantizer = None
    if quantization_config is not None:
        quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=device_map, keep_in_fp32_modules=[])
        model.config.quantization_config = quantization_config
    generator = torch.Generator(device).manual_seed(SEED)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = _random_weight(module, parameter.shape, config.initializer_range, dtype, device, generator)
            setattr(module, name, _as_parameter(parameter, weight))
    # Its buffers are computed, not loaded, and must not stay on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config, device=device)
    model.tie_weights()
    if quantizer is not None:
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    return model.eval()


def _random_weight(
    module: nn.Module,
    shape: torch.Size,
    std: float,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> torch.Tensor:
    if not isinstance(module, nn.Linear | nn.Embedding):  # RMSNorm
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)


def _as_parameter(placeholder: nn.Parameter, weight: torch.Tensor) -> nn.Parameter:
    """A parameter of the placeholder's own kind; a bitsandbytes one quantises when it is moved to its device."""
    if type(placeholder).__name__ == "Params4bit":
        fresh = type(placeholder)(
            weight.cpu() if weight.device.type == "cpu" else weight,
            requires_grad=False,
            blocksize=placeholder.blocksize,
            compress_statistics=placeholder.compress_statistics,
            quant_type=placeholder.quant_type,
            quant_storage=placeholder.quant_storage,
            module=placeholder.module,
        )
        return fresh.to(weight.device)
    return nn.Parameter(weight, requires_grad=placeholder.requires_grad)
