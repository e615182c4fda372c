"""What there is to say of a model: its sizes, its recipe, how it is divided, where its routers are. No torch.

Patterns of an operator are searched in `NODE|OUTER OP|OP|KERNEL` of a piece of work: the autograd node (empty outside
backward), the outermost and the innermost operator, and the kernel (without a GPU the operator again).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunescope.flops import ForwardFlop

MATMUL = r"\|aten::(mm|addmm|bmm|baddbmm|matmul|linear|mv|addmv|_scaled_mm|_grouped_mm)\|[^|]*$"
COPY = r"\|aten::(copy_|_to_copy|to|clone|contiguous)\|[^|]*$|\|[^|]*[Mm]emcpy[^|]*$"
# Of a parameter by its own node, of activations by autograd as it passes them on.
ACCUMULATION = r"AccumulateGrad\||^\w+Backward\w*\|aten::add_?\|aten::add_?\|"

# Ways that this project has to compute one thing, by the names that flags, config.json and rows have for them.
TRITON, MAMBA_SSM, REFERENCE = SCANS = ("triton", "mamba-ssm", "reference")
GROUPED, LOOP = MOE_PATHS = ("grouped", "loop")
STOCK = "stock"  # as transformers has it

BF16_BYTES = 2
NF4_BLOCK_WEIGHTS = 64  # weights that share one absmax
NF4_NESTED_BLOCK = 256  # absmax values, one byte each, that share one fp32 scale under double quantisation
NF4_BYTES_PER_WEIGHT = 0.5 + (1 + 4 / NF4_NESTED_BLOCK) / NF4_BLOCK_WEIGHTS


@dataclass(frozen=True)
class OpRule:
    """label: may hold a group of `path` as {1}. path: below the layer. work: in NODE|OUTER OP|OP|KERNEL."""

    label: str
    path: str
    work: str = ""


@dataclass(frozen=True)
class Layout:
    """How an architecture is divided. The first rule or part that fits gives the name.

    block_class: class whose presence tells the model. parts: label -> pattern of the path below a layer, in the order
    of a table. operators: part -> the rules that divide it; a figure's part first. op_order: their labels in the order
    of a table. op_note: what must be known to read them.
    """

    name: str
    block_class: str
    parts: dict[str, str]
    operators: dict[str, Sequence[OpRule]]
    op_order: Sequence[str]
    op_note: str = ""


@dataclass(frozen=True)
class Routing:
    """How tokens find their experts.

    path: pattern of a router's full name, with the layer's number as group; it must match the outermost module of that
    name (PEFT's wrapper, where there is one, whose output the model uses). score: what is made of the router's output
    before the largest are taken. top_k: attribute of the module that holds the router.
    """

    path: str
    score: str  # softmax or sigmoid
    top_k: str = "top_k"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model.

    name: as --model takes it. scripts: what its launchers and parsers at the top of the project begin with, None where
    it has none. model_type: of its config.json. registration: module whose register() makes the model
    known to transformers, random weights included. recipe: file in LLaMA-Factory/. launch_config: what the recipe asks
    of a config.json.

    full, tiny: config.json of the presets. size_keys: numbers that a config.json must have for it to be planned.
    experts_key: the one that holds the number of experts. depth_step: a depth must be a multiple of it.
    at_depth: (config, num_layers) -> config, where more than num_hidden_layers must change.
    check_config: raises UserError for a config.json that no model can be built of, whatever its sizes.
    parameter_shapes: config -> parameter -> shape, where that is known; the weights of a folder are held against it.
    resident_bytes: (config, num_layers) -> GPU bytes held throughout a step: weights, and with full fine-tuning their
    gradients and optimizer state. headroom_gib: what a small batch needs besides, in preset full.
    forward_flop: (config, recipe) -> flops.ForwardFlop.

    moe_path: how its experts run, as rows say it, if nothing else is asked for; moe_paths: all ways that there are.
    is_moe_in_config: whether config.json says which; else the loaded model is switched. has_scan: whether --scan means
    something.
    layout, routing: how a breakdown divides it and where its tokens are counted.

    sparse_top_k: top_k of the points called sparse. points: kind of measurement -> its points where the paper has
    none. paper_keys: what of `full` a config.json must equal to be the paper's model; empty: the paper has it not.
    """

    name: str
    scripts: str | None = None
    model_type: str
    registration: str
    recipe: str
    launch_config: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any]
    tiny: dict[str, Any]
    size_keys: tuple[str, ...]
    experts_key: str = "num_local_experts"
    depth_step: int = 1
    at_depth: Callable[[dict[str, Any], int], dict[str, Any]] = field(
        default=lambda config, num_layers: config | {"num_hidden_layers": num_layers}
    )
    check_config: Callable[[dict[str, Any]], None] = field(default=lambda config: None)
    parameter_shapes: Callable[[dict[str, Any]], dict[str, tuple[int, ...]]] | None = None
    resident_bytes: Callable[[dict[str, Any], int], int]
    headroom_gib: float
    forward_flop: Callable[[dict[str, Any], dict[str, Any]], ForwardFlop]
    moe_path: str = STOCK
    moe_paths: tuple[str, ...] = (STOCK,)
    is_moe_in_config: bool = False
    has_scan: bool = False
    layout: Layout
    routing: Routing
    sparse_top_k: int = 2
    points: dict[str, str] = field(default_factory=dict)
    paper_keys: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        return int(self.full[self.experts_key])

    def config_at(self, config: dict[str, Any], num_layers: int, top_k: int) -> dict[str, Any]:
        """A model's config.json with a point's depth and sparsity."""
        return self.at_depth(config, num_layers) | self.launch_config | {"num_experts_per_tok": top_k}

    def is_papers_model(self, config: dict[str, Any], total_layers: int) -> bool:
        """Whether a config.json, at its full depth of total_layers, is of the model that the paper measured.

        A few tokens more in the vocabulary, as fine-tuned copies have, change nothing that could be measured.
        """
        return (
            bool(self.paper_keys)
            and total_layers == self.full["num_hidden_layers"]
            and all(config.get(key) == self.full[key] for key in self.paper_keys)
        )
