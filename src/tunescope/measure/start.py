"""What happens once as training begins, before the first step: limits are set, facts are read."""

import bisect
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
            "attention": model.config._attn_implementation if hasattr(model.config, "num_attention_heads") else None,
            "compute_dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        }


class MeetLongestBatch(TrainerCallback):
    """One forward and backward of the longest batch of the data, before anything is timed and without a step.

    In random order a new longest query comes at any time, and the step that meets it pays for memory and kernels that
    all later ones find in place: 5.5 s where the mean was 2.4 (docs/LOG.md). And whether a batch size fits is known at
    once, not when an epoch meets its longest batch. Nothing that is learned changes: gradients are dropped, no weight
    and no optimizer state is touched.

    by_length: also a batch of half that length, of a quarter and so on, down to the shortest. A model with Triton
    kernels compiles them anew for some lengths, which takes seconds once on a machine, and timed steps would pay.

    `why_not` says why it was left out, where it was.
    """

    def __init__(self, *, by_length: bool = False) -> None:
        self.by_length = by_length
        self.why_not: str | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        try:
            self._meet(args, model, train_dataloader)
        except Exception as error:  # a warm-up must not cost a run that could have been measured without it
            if is_out_of_memory(error):
                raise
            self.why_not = f"{type(error).__name__}: {error}"[:300]
        finally:
            model.zero_grad(set_to_none=True)

    def _meet(self, args: Any, model: Any, train_dataloader: Any) -> None:
        dataset, size = train_dataloader.dataset, args.per_device_train_batch_size
        lengths = [len(ids) for ids in dataset["input_ids"]]
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        model.train()
        end = len(by_length)
        while end > 0:
            numbers = by_length[max(end - size, 0) : end]
            batch = train_dataloader.collate_fn([dataset[number] for number in (numbers + by_length)[:size]])
            tensors = {name: value.to(args.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
            model(**tensors).loss.backward()
            if not self.by_length:
                return
            half = lengths[numbers[-1]] / 2
            end = bisect.bisect_right(by_length, half, key=lengths.__getitem__)


def is_out_of_memory(error: Exception) -> bool:
    """Torch's allocator has a type for it; CUDA and its libraries, asked beside the allocator, only have words."""
    words = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
