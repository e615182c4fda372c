"""Tokens per expert: counted at a model's routers, on a fixed probe before the first step and after the last.

What the routers of a kind of model are is its families.Routing; everything else here knows no model.
"""

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback

from tunescope.expert_tokens import AFTER, BEFORE
from tunescope.families import family_of
from tunescope.families.family import Routing

MICRO_BATCH = 4  # queries of a probe in one forward: few, so that a probe never needs more memory than training
PAD_MULTIPLE = 8  # as the engine pads

# T tokens (queries * slots), E experts, K top_k


def _chosen(routing: Routing, block: Any, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (T, E), not negative, and the experts chosen (T, K), of a router's output.

    It repeats the model's own operations on the same tensor: bf16 scores often tie, and any other way to the K largest
    would break ties otherwise than the model did.
    """
    if routing.score == "softmax":
        scores_TE = functional.softmax(logits_TE, dim=1, dtype=torch.float)
    else:
        scores_TE = logits_TE.sigmoid()
    return scores_TE, torch.topk(scores_TE, getattr(block, routing.top_k), dim=-1).indices


@dataclass
class _Layer:
    """What one layer's router did so far, on the model's device: reading it waits for the GPU, adding does not."""

    tokens_per_expert_E: torch.Tensor
    entropy_sum_bits: torch.Tensor
    top_k: int


class RouterCounter:
    """Counts, from entering to leaving it, how many tokens each expert of each layer was given.

    Forwards of a training step and forwards without gradients are counted alike. A recompute by gradient checkpointing,
    of either kind, is not: it is the only forward that runs inside backward. Slots that the attention mask calls
    padding are counted apart, though experts do work on them. Nothing waits for the GPU until the counts are read.

    Raises LookupError for a model whose routers are not known.
    """

    def __init__(self, model: nn.Module) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        family = family_of({"model_type": model_type})
        if family is None:
            raise LookupError(f"where a model of type {model_type!r} has its routers is not known")
        routing = family.routing
        matches = [(re.fullmatch(routing.path, name), name, module) for name, module in model.named_modules()]
        self._routers = {int(match[1]): (name, module) for match, name, module in matches if match is not None}
        if not self._routers:
            raise LookupError(f"the model of type {model_type!r} has no module named like {routing.path}")
        self._model, self._routing = model, routing
        self._handles: list[Any] = []
        self._layers: dict[int, _Layer] = {}
        self._real_T: torch.Tensor | None = None  # of the forward under way: which slots hold a token
        self._num_tokens: list[torch.Tensor] = []
        self._num_slots = 0
        self.num_queries = 0

    def __enter__(self) -> "RouterCounter":
        self._handles.append(self._model.register_forward_pre_hook(self._see_batch, with_kwargs=True))
        for layer, (name, module) in self._routers.items():
            block = self._model.get_submodule(name.rpartition(".")[0])
            self._handles.append(module.register_forward_hook(partial(self._count, layer, block)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _see_batch(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Raises ValueError for a mask of four dimensions, which does not say what is padding."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        elif mask.shape != ids.shape:
            raise ValueError(f"an attention mask of shape {tuple(mask.shape)} does not say which slots are padding")
        self._real_T = mask.flatten() != 0
        self._num_tokens.append(self._real_T.sum())
        self._num_slots += ids.numel()
        self.num_queries += ids.shape[0]

    @torch.no_grad()
    def _count(self, layer: int, block: Any, module: Any, args: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # inside backward: a recompute
            return
        scores_TE, chosen_TK = _chosen(self._routing, block, output)
        real_T = self._real_T
        if real_T is None or len(real_T) != len(scores_TE):
            raise RuntimeError("a router ran outside the forward of the model that is counted")
        num_experts, top_k = scores_TE.shape[1], chosen_TK.shape[1]
        if layer not in self._layers:
            self._layers[layer] = _Layer(
                tokens_per_expert_E=torch.zeros(num_experts, dtype=torch.int64, device=scores_TE.device),
                entropy_sum_bits=torch.zeros((), dtype=torch.float64, device=scores_TE.device),
                top_k=top_k,
            )
        counted = self._layers[layer]
        # Not bincount or a boolean index: their sizes depend on values, so each would wait for the GPU.
        given_TK = real_T.long()[:, None].expand_as(chosen_TK)
        counted.tokens_per_expert_E.scatter_add_(0, chosen_TK.flatten(), given_TK.flatten())
        entropy_T = entropy_bits(scores_TE)
        counted.entropy_sum_bits += torch.where(real_T, entropy_T, torch.zeros_like(entropy_T)).sum()

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer and expert: EXPERT_TOKENS_SCHEMA but for probe and when. Waits for the GPU.

        Raises RuntimeError where a router never ran: a model may use its weights without calling it.
        """
        if self.num_queries and (unseen := sorted(self._routers.keys() - self._layers.keys())):
            raise RuntimeError(f"the routers of layers {unseen} were not called")
        num_tokens = sum(int(num) for num in self._num_tokens)
        return [
            {
                "layer": layer,
                "expert": expert,
                "tokens": tokens,
                "num_queries": self.num_queries,
                "num_tokens": num_tokens,
                "padding_tokens": self._num_slots - num_tokens,
                "top_k": counted.top_k,
                "num_experts": len(counted.tokens_per_expert_E),
                "router_entropy_bits": float(counted.entropy_sum_bits) / max(num_tokens, 1),
            }
            for layer, counted in sorted(self._layers.items())
            for expert, tokens in enumerate(counted.tokens_per_expert_E.tolist())
        ]


def entropy_bits(scores_TE: torch.Tensor) -> torch.Tensor:
    """Entropy (T,) in bits of each token's scores as shares of their sum: 0 is certain, log2(E) knows no favourite."""
    scores_TE = scores_TE.double()
    return torch.special.entr(scores_TE / scores_TE.sum(-1, keepdim=True)).sum(-1) / math.log(2)


class ExpertProbe(TrainerCallback):
    """Runs fixed queries through the model before the first step and after the last, and counts tokens per expert.

    queries: makes the probes, name -> token ids of each query; called once, as training begins.

    Training goes on as if the probe had not run: no gradient, no random number and no module's mode is left changed.
    Give the Trainer `around(callbacks)`, not the probe beside them: its own time then falls outside what they measure.

    `why_not` says why something was left out, where it was; rows() has what was counted.
    """

    def __init__(
        self, queries: Callable[[], Mapping[str, Sequence[Sequence[int]]]], micro_batch_size: int = MICRO_BATCH
    ) -> None:
        self.why_not: str | None = None
        self._make_queries = queries
        self._micro_batch_size = micro_batch_size
        self._queries: Mapping[str, Sequence[Sequence[int]]] | None = None
        self._rows: list[dict[str, Any]] = []

    def around(self, callbacks: Iterable[TrainerCallback]) -> list[TrainerCallback]:
        """The callbacks, with the probe's first run before them all and its second after them all."""
        return [_Beginning(self), *callbacks, _End(self)]

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._run(BEFORE, model, args.device)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._run(AFTER, model, args.device)

    def rows(self) -> list[dict[str, Any]]:
        """Rows of EXPERT_TOKENS_SCHEMA; none where the probe was left out."""
        return list(self._rows)

    def _run(self, when: str, model: nn.Module, device: torch.device) -> None:
        if self.why_not is not None:
            return
        try:
            if self._queries is None:
                self._queries = self._make_queries()
            made = []
            for probe, queries in self._queries.items():
                with RouterCounter(model) as counter, undisturbed(model, device):
                    for batch in batches(queries, self._micro_batch_size):
                        _forward(model, *(tensor.to(device) for tensor in batch))
                made += [{"probe": probe, "when": when, **row} for row in counter.rows()]
            self._rows += made
        except Exception as error:  # the point's times are worth having without it
            self.why_not = f"{when} training: {type(error).__name__}: {error}"[:300]
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or what is measured next would seem to reserve the probe's memory


class _Beginning(TrainerCallback):
    def __init__(self, probe: ExpertProbe) -> None:
        self._probe = probe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._probe.on_train_begin(args, state, control, **kwargs)


class _End(TrainerCallback):
    def __init__(self, probe: ExpertProbe) -> None:
        self._probe = probe

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._probe.on_train_end(args, state, control, **kwargs)


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode and the random numbers are as before."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            model.eval()
            for module, _ in modes:
                if _is_repacked_by_evaluation(module):
                    module.training = True
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training


def _is_repacked_by_evaluation(module: nn.Module) -> bool:
    """Whether one forward in evaluation mode changes the module for good.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 then lays out NF4 weights anew and rounds their scales to bf16: losses
    and gradients differed from the first step on, and a router (8 outputs, where it wants a multiple of 32) ended in
    an assertion. The mode of these modules decides nothing else.
    """
    return type(module).__name__ == "Linear4bit" and hasattr(module, "support_avx512bf16_for_cpu")


def batches(queries: Sequence[Sequence[int]], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and attention mask (size, slots) of `size` queries at a time, padded on the right."""
    for start in range(0, len(queries), size):
        part = queries[start : start + size]
        num_slots = -(-max(map(len, part)) // PAD_MULTIPLE) * PAD_MULTIPLE
        # What stands in a padded slot is seen by no token, for all of them stand to its left.
        ids = torch.tensor([[*query, *[0] * (num_slots - len(query))] for query in part])
        mask = torch.tensor([[1] * len(query) + [0] * (num_slots - len(query)) for query in part])
        yield ids, mask


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = inspect.signature(base.forward).parameters
    # Logits of every token would take 128 kB each with a vocabulary of 32,000, and nobody reads them.
    wanted = {"use_cache": False, "logits_to_keep": 1}
    model(input_ids=ids, attention_mask=mask, **{name: value for name, value in wanted.items() if name in taken})
