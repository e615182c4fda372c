"""A small Llama and somebody's own Trainer for it, watched by StepProfiler."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from tunescope import StepProfiler

NEEDED_STEPS = 1 + 2 + 1 + 3  # warm-up, timed, recorded, and three to start the profiler twice and to follow memory
LENGTH_TOKENS, BATCH = 16, 2


def profiler(folder: Path, **settings: Any) -> StepProfiler:
    return StepProfiler(folder, **{"num_warmup_steps": 1, "num_timed_steps": 2, "num_profiled_steps": 1} | settings)


def llama(*, lora: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    if lora:
        adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, adapters)
        model.enable_input_require_grads()
    return model


def trainer(
    model: Any,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
    *,
    num_steps: int = NEEDED_STEPS + 2,
    reentrant: bool | None = None,
    **arguments: Any,
) -> Trainer:
    """reentrant: how to checkpoint; None: not at all."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 64, (32, LENGTH_TOKENS), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    settings = {
        "output_dir": str(folder / "output"),
        "max_steps": num_steps,
        "per_device_train_batch_size": BATCH,
        "gradient_checkpointing": reentrant is not None,
        "gradient_checkpointing_kwargs": None if reentrant is None else {"use_reentrant": reentrant},
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    chosen = TrainingArguments(**settings | arguments)
    return Trainer(model, chosen, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def hooks(model: torch.nn.Module) -> int:
    """All that hang on a model and its parameters."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) + sum(
        len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters()
    )
