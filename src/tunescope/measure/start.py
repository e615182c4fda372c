"""What happens once as training begins, before the first step: limits are set, facts are read."""

from typing import Any

import torch
from transformers import TrainerCallback


class MemoryBudget(TrainerCallback):
    """Gives the process no more GPU memory than `budget_bytes`, from the start of training.

    And gives back what loading left behind: with a checkpoint transformers first allocates up to half the bf16 size in
    one block, which would otherwise stay reserved and be taken for what training needs.
    """

    def __init__(self, budget_bytes: int | None) -> None:
        self.budget_bytes = budget_bytes

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.device.type != "cuda":
            return
        torch.cuda.empty_cache()
        if self.budget_bytes is not None:
            limit_memory(self.budget_bytes)


def limit_memory(budget_bytes: int) -> None:
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(budget_bytes / total_bytes, 1.0))


class RunFacts(TrainerCallback):
    """What the model and the Trainer really use, which is not always what the recipe asked for."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.facts = {
            "attention": getattr(model.config, "_attn_implementation", None),
            "compute_dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        }
