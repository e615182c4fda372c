"""BlackMamba's configuration."""

from typing import Any

from transformers import PretrainedConfig

MAMBA, MOE = BLOCK_TYPES = ("mamba", "moe")
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
        layer_norm_epsilon: float = 1e-5,
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
        self.layers_block_type = layers_block_type or [BLOCK_TYPES[i % 2] for i in range(num_hidden_layers)]
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
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
        return int(self.expand * self.hidden_size)

    @property
    def delta_rank(self) -> int:
        """Rank of the scan's step sizes."""
        return -(-self.hidden_size // 16)

    def _check(self) -> None:
        if len(self.layers_block_type) != self.num_hidden_layers or not set(self.layers_block_type) <= {MAMBA, MOE}:
            raise ValueError(
                f"layers_block_type must say mamba or moe for each of {self.num_hidden_layers} layers, and is "
                f"{self.layers_block_type}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; it must be from 1 to {self.num_local_experts}"
            )
        if not self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings is false; BlackMamba's head is its embedding")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; it must be one of {', '.join(LOSSES)}")
