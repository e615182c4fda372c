"""accelerate_moe(): the MoE blocks of a live QLoRA or LoRA model computed by grouped matmuls, all experts at once.

Weights, adapters, state_dict and optimizer stay what they are: what is trained, saved, loaded, merged or resumed is
interchangeable with the stock path, and restore() gives that path back.
"""

# B batch, L length, T tokens = B * L, D model width, E experts, K top_k

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from tunescope.errors import UserError
from tunescope.models.fast_moe_function import run_experts
from tunescope.models.fast_moe_linears import compute_dtype, read_linears
from tunescope.models.fast_moe_recompute import StepMemory, layers_to_recompute, set_checkpointed
from tunescope.models.fast_moe_stacks import ExpertStacks
from tunescope.models.fast_norms import fuse_norms
from tunescope.models.fast_rotary import fuse_rotary
from tunescope.models.forwards import unfuse
from tunescope.models.step_graphs import StepGraphs


@dataclass(frozen=True)
class _Kind:
    """How transformers names the parts of a block. normalises: whether the weights of a token's experts add up to 1."""

    linears: tuple[str, str, str]  # gate, up, down
    normalises: Callable[[Any], bool]


_KINDS = {
    "MixtralSparseMoeBlock": _Kind(("w1", "w3", "w2"), lambda block: True),
    "Qwen3MoeSparseMoeBlock": _Kind(("gate_proj", "up_proj", "down_proj"), lambda block: bool(block.norm_topk_prob)),
}


class AcceleratedMoe:
    """What accelerate_moe() did to a model, and the way back.

    num_blocks: MoE blocks that are grouped now. checkpointed_layers: numbers of the decoder layers that are recomputed
    in backward, as this left them. graphs: what replays steps as CUDA graphs, None where it was not asked for.
    """

    graphs: StepGraphs | None = None

    def __init__(self, blocks: list["_GroupedBlock"], layers: list[Any], checkpointed: tuple[int, ...] | None) -> None:
        self._blocks = blocks
        self._fused: list[nn.Module] = []
        self._switched = [] if checkpointed is None else set_checkpointed(layers, checkpointed)
        self.num_blocks = len(blocks)
        self.checkpointed_layers = tuple(i for i, layer in enumerate(layers) if layer.gradient_checkpointing)

    def fuse_the_rest(self, model: nn.Module) -> None:
        """What is no expert's."""
        self._fused = [*fuse_norms(model), *fuse_rotary(model)]

    def restore(self) -> None:
        """The stock forward, checkpointing and memory layout again, with the weights as trained. Safe to call twice."""
        if self.graphs is not None:
            self.graphs.remove()
        for block in self._blocks:
            block.detach()
        self._blocks = []
        unfuse(self._fused)
        self._fused = []
        for layer, was_checkpointed in self._switched:
            layer.gradient_checkpointing = was_checkpointed
        self._switched = []


def accelerate_moe(
    model: nn.Module,
    *,
    recompute: str | tuple[int, ...] = "all",
    step_memory: StepMemory | None = None,
    graphs: bool = False,
) -> AcceleratedMoe:
    """Computes every MoE block of `model` (Mixtral or Qwen3-MoE of transformers, with or without PEFT) grouped.

    Call it once PEFT has wrapped the model and it is on its device, before or after a Trainer is made. What the blocks
    return, router logits included, equals the stock path up to rounding. Experts' own modules are not called any more,
    so that hooks on them see nothing; the router's is.

    recompute: `all` leaves gradient checkpointing as it is; `none` switches it off; `auto` switches it off in the last
    layers, as many as step_memory has room for; or the numbers of the layers to leave it on in. It changes nothing
    where checkpointing is off, and a Trainer with gradient_checkpointing=True switches it on again when training
    starts: then call this in on_train_begin.

    graphs: whether training steps on a GPU are replayed as CUDA graphs; what that changes is in StepGraphs.

    Norms whose weights are frozen, and rotary embeddings, are computed in one launch each.

    The experts' matmuls, adapters included, run in the dtype that the stock base linears would multiply in. An expert
    without a token in a batch gets gradients of zeros, where the stock path leaves None: finding out which would make
    the host wait. So AdamW carries on its moments, and weight decay applies, where it would have passed the expert by.

    Raises UserError, having changed nothing, for a model without such blocks or with something that would not be
    computed alike: dropout in adapters, DoRA, biases, merged or several active adapters, experts adapted differently,
    trained base weights, weights off their device. After that, forward raises it if weights or adapters are replaced.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ in _KINDS]
    if not found:
        raise UserError(
            "the model has no MoE block that could be grouped",
            cause=f"it has none of {', '.join(_KINDS)}",
            cure="accelerate_moe() is for Mixtral and Qwen3-MoE as transformers 4.57 has them",
        )
    checkpointed = layers_to_recompute(recompute, len(layers), step_memory)
    of_block = {id(module): layer for layer in layers for module in layer.modules()}
    read = []
    for name, block in found:  # all of them, before the first is touched
        _check_block(block, name)
        read.append((block, [read_linears(block.experts, linear, name) for linear in _kind(block).linears]))
    for _, linears in read:
        ExpertStacks.check(*linears)
    blocks: list[_GroupedBlock] = []
    try:
        for block, linears in read:
            blocks.append(_GroupedBlock(block, of_block.get(id(block)), ExpertStacks(*linears)))
            if torch.cuda.is_available():
                # Or the pieces that experts lay in pile up, each too small for a stack of them.
                torch.cuda.empty_cache()
    except BaseException:
        for done in blocks:
            done.detach()
        raise
    accelerated = AcceleratedMoe(blocks, layers, checkpointed)
    accelerated.fuse_the_rest(model)
    if graphs and _is_on_gpu(model):
        accelerated.graphs = StepGraphs(model, [block.stacks for block in blocks])
    return accelerated


class AccelerateMoe(TrainerCallback):
    """accelerate_moe() as training begins: for LLaMA-Factory's run_exp and any other Trainer.

    By then PEFT has wrapped the model, a checkpoint to resume from is loaded, and checkpointing is set up. The
    optimizer has the parameters already, and keeps them.

    graphs: with them gradients are clipped here, just before the optimizer's step, and not by the Trainer, which would
    look at each of some thousand parameters; its log then has no grad_norm.
    """

    def __init__(
        self,
        *,
        recompute: str | tuple[int, ...] = "all",
        step_memory: StepMemory | None = None,
        graphs: bool = False,
    ) -> None:
        self.recompute = recompute
        self.step_memory = step_memory
        self.graphs = graphs
        self.accelerated: AcceleratedMoe | None = None
        self._max_norm = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.accelerated = accelerate_moe(
            kwargs["model"], recompute=self.recompute, step_memory=self.step_memory, graphs=self.graphs
        )
        if self.accelerated.graphs is not None and args.max_grad_norm:
            self._max_norm, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._max_norm and self.accelerated is not None and self.accelerated.graphs is not None:
            self.accelerated.graphs.clip_gradients(self._max_norm)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._max_norm:
            self._max_norm, args.max_grad_norm = 0.0, self._max_norm


class _GroupedBlock:
    """One block's new forward. layer: the decoder layer it belongs to, None if it is in none."""

    def __init__(self, block: Any, layer: Any, stacks: ExpertStacks) -> None:
        self.block, self.layer, self.stacks = block, layer, stacks
        self.normalises = _kind(block).normalises(block)
        self.stock_forward = vars(block).get("forward")
        block.forward = self.forward

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> the same, and the router's logits (T, E)."""
        block = self.block
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = block.gate(x_TD)
        score_TK, expert_TK = functional.softmax(logits_TE, dim=1, dtype=torch.float).topk(block.top_k, dim=-1)
        if self.normalises:
            score_TK = score_TK / score_TK.sum(dim=-1, keepdim=True)
        dtype = compute_dtype(self.stacks.linears[0][0], x_TD)
        needs_output = not _is_recomputed_for_backward(self.layer)
        out_TD = run_experts(x_TD, score_TK.to(x_TD.dtype), expert_TK, self.stacks, dtype, needs_output=needs_output)
        if self.layer is not None and self.layer.gradient_checkpointing and self.layer.training:
            # Keeps something small for backward after the experts have. A recompute ends by an exception at the last
            # thing kept, and while a profiler listens torch loses one from inside an autograd function like theirs.
            score_TK.exp()
        return out_TD.view_as(hidden_states), logits_TE

    def detach(self) -> None:
        if self.stock_forward is None:
            vars(self.block).pop("forward", None)
        else:
            self.block.forward = self.stock_forward
        self.stacks.restore()


def _is_on_gpu(model: nn.Module) -> bool:
    return next(model.parameters()).is_cuda


def _kind(block: nn.Module) -> _Kind:
    return _KINDS[type(block).__name__]


def _check_block(block: Any, name: str) -> None:
    """Raises UserError for a block that does not compute what the grouped one would."""
    own = vars(block).get("forward")
    if isinstance(getattr(own, "__self__", None), _GroupedBlock):
        raise UserError(
            f"{name} is grouped already", cause="accelerate_moe() was called twice", cure="restore() the first one"
        )
    # transformers puts a block's own forward back as an attribute after it has listened to it.
    if own is not None and getattr(own, "__func__", None) is not type(block).forward:
        raise UserError(
            f"{name} cannot be grouped",
            cause="its forward was replaced, as by offloading or another accelerator",
            cure="use only one of them",
        )
    if not type(block).__module__.startswith("transformers.models."):
        raise UserError(f"{name} cannot be grouped", cause=f"it is a {type(block).__module__}.{type(block).__name__}")
    if getattr(block, "jitter_noise", 0) > 0:
        raise UserError(
            f"{name} cannot be grouped", cause="its router is trained with noise", cure="set router_jitter_noise to 0"
        )
    for expert in block.experts:
        if not isinstance(expert.act_fn, nn.SiLU | type(ACT2FN["silu"])):
            raise UserError(f"{name} cannot be grouped", cause=f"its experts' activation is {expert.act_fn}, not SiLU")


def _is_recomputed_for_backward(layer: Any) -> bool:
    """Whether this forward is the one that gradient checkpointing repeats for `layer`, and nobody reads its output.

    A MoE block comes last in its layer, and its output is only added to the residual. So of a repeated layer's forward
    the down projection need not be computed. False wherever it is not certain: then it is computed, and not read.
    """
    if torch._C._current_graph_task_id() == -1 or not torch.is_grad_enabled():
        return False
    if layer is None or not (layer.gradient_checkpointing and layer.training):
        return False
    # Under checkpoints in checkpoints the outer one repeats the first forward of the inner, which must be whole.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is None or getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook.")
