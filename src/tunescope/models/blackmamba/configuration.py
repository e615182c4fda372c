"""BlackMamba's configuration."""

from typing import Any

from transformers import PretrainedConfig

from tunescope.families.blackmamba import EPSILON
from tunescope.families.blackmamba_shapes import delta_rank, inner_width
from tunescope.families.family import MOE_PATHS, SCANS

MAMBA, MOE = BLOCK_TYPES = ("mamba", "moe")
SIZES = (
    "vocab_size", "hidden_size", "state_size", "conv_kernel", "intermediate_size", "num_hidden_layers",
    "num_local_experts", "num_experts_per_tok",
)  # fmt: skip
CROSS_ENTROPY, STUDY = LOSSES = ("cross_entropy", "study")


class BlackMambaConfig(PretrainedConfig):
    """Sizes as in families/blackmamba.py; the defaults are BlackMamba-2.8B's.

    layers_block_type: `mamba` or `moe` for each block; None: in turn. num_experts_per_tok: experts a token is sent to;
    the released weights were trained with 1, the study ran 2 (sparse) and 8 (dense).
    loss: `cross_entropy`, or `study`, that of loss.py.
    scan: how the selective scan runs: auto, triton, mamba-ssm or reference (kernels/selective_scan.py).
    moe: `grouped` matmuls or the `loop` over experts (kernels/moe.py).

    Raises ValueError for what cannot be built.
    """

    model_type = "blackmamba"
    keys_to_ignore_at_inference = ()

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 1472,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: float = 2,
        intermediate_size: int = 3872,
        num_hidden_layers: int = 36,
        layers_block_type: list[str] | None = None,
        num_local_experts: int = 8,
        num_experts_per_tok: int = 1,
        max_position_embeddings: int = 2048,
        layer_norm_epsilon: float = EPSILON,
        tie_word_embeddings: bool = True,
        loss: str = CROSS_ENTROPY,
        scan: str = "auto",
        moe: str = "grouped",
        use_cache: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.state_size = state_size
        self.conv_kernel = conv_kernel
        self.expand = expand
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        for name in SIZES:
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a whole number from 1")
        self.layers_block_type = layers_block_type or [BLOCK_TYPES[i % 2] for i in range(num_hidden_layers)]
        self.max_position_embeddings = max_position_embeddings
        self.layer_norm_epsilon = layer_norm_epsilon
        self.loss = loss
        self.scan = scan
        self.moe = moe
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self._check()

    @property
    def inner_size(self) -> int:
        """Channels of a Mamba mixer."""
        return inner_width(vars(self))

    @property
    def delta_rank(self) -> int:
        """Rank of the scan's step sizes."""
        return delta_rank(vars(self))

    def _check(self) -> None:
        kinds = self.layers_block_type
        is_list = isinstance(kinds, list | tuple) and len(kinds) == self.num_hidden_layers
        if not is_list or not all(kind in BLOCK_TYPES for kind in kinds):
            raise ValueError(
                f"layers_block_type must say mamba or moe for each of {self.num_hidden_layers} layers, and is {kinds}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must be from 1 to {self.num_local_experts}"
            )
        if not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is false; BlackMamba's head is its embedding")
        if not (isinstance(self.expand, int | float) and self.expand * self.hidden_size >= 1):
            raise ValueError(f"expand is {self.expand!r}; times hidden_size it must be a width from 1")
        if not (isinstance(self.layer_norm_epsilon, float) and 0 < self.layer_norm_epsilon < 1):
            raise ValueError(f"layer_norm_epsilon is {self.layer_norm_epsilon!r}; it must be between 0 and 1")
        choices = {"loss": LOSSES, "scan": ("auto", *SCANS), "moe": MOE_PATHS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
