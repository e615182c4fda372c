"""BlackMamba as a causal language model of transformers: Mamba and mixture-of-experts blocks in turn, no attention."""

# B batch, L seq_len, H hidden size, V vocabulary

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from tunescope import checkpoints
from tunescope.kernels.rms_norm import add_rms_norm
from tunescope.models import random_weights
from tunescope.models.blackmamba.configuration import CROSS_ENTROPY, MAMBA, BlackMambaConfig
from tunescope.models.blackmamba.loss import cross_entropy_loss, study_loss
from tunescope.models.blackmamba.mamba import BlackMambaMixer
from tunescope.models.blackmamba.moe import BlackMambaMoe, ExpertMatrices

EMBEDDING_STD = 0.02


class BlackMambaRMSNorm(nn.Module):
    """Adds the last block's output to the residual, which stays fp32, and normalises the sum."""

    def __init__(self, config: BlackMambaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.epsilon = config.layer_norm_epsilon
        self.implementation = "reference" if config.scan == "reference" else "auto"

    def forward(self, hidden_BLH: Tensor, residual_BLH: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_rms_norm(hidden_BLH, residual_BLH, self.weight, self.epsilon, implementation=self.implementation)


class BlackMambaBlock(GradientCheckpointingLayer):
    """A norm and a mixer. The mixer's output is added to the residual by the next block's norm."""

    def __init__(self, config: BlackMambaConfig, block_type: str) -> None:
        super().__init__()
        self.norm = BlackMambaRMSNorm(config)
        if block_type == MAMBA:
            self.mamba = BlackMambaMixer(config)
        else:
            self.moe = BlackMambaMoe(config)
        self.is_mamba = block_type == MAMBA

    def forward(self, hidden_BLH: Tensor, residual_BLH: Tensor | None) -> tuple[Tensor, Tensor]:
        normed_BLH, residual_BLH = self.norm(hidden_BLH, residual_BLH)
        return (self.mamba if self.is_mamba else self.moe)(normed_BLH), residual_BLH


class BlackMambaPreTrainedModel(PreTrainedModel):
    """What BlackMamba's models share."""

    config_class = BlackMambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("BlackMambaBlock",)

    def _init_weights(self, module: nn.Module) -> None:
        """As the original: uniform linears, step sizes and decays that span time scales (arXiv 2312.00752, 3.6)."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
        elif isinstance(module, ExpertMatrices):
            module.reset_parameters()
        elif isinstance(module, BlackMambaMixer):
            module.reset_parameters(self.config.num_hidden_layers)
        elif isinstance(module, BlackMambaMoe):
            bound = module.router.in_features**-0.5
            nn.init.uniform_(module.router.weight, -bound, bound)
            nn.init.zeros_(module.router.bias)
        elif isinstance(module, BlackMambaRMSNorm | nn.LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)


class BlackMambaModel(BlackMambaPreTrainedModel):
    """Token ids (B, L) -> hidden states (B, L, H) behind the final norm."""

    def __init__(self, config: BlackMambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BlackMambaBlock(config, kind) for kind in config.layers_block_type)
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        """Attention masks and position ids are accepted and ignored, as by the original: padding is a token like any
        other, and changes nothing to the left of it. Raises ValueError for none or both of the inputs."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_BLH = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        residual_BLH = None
        for layer in self.layers:
            hidden_BLH, residual_BLH = layer(hidden_BLH, residual_BLH)
        if residual_BLH is not None:
            hidden_BLH = hidden_BLH + residual_BLH
        return BaseModelOutput(last_hidden_state=self.final_norm(hidden_BLH.to(self.final_norm.weight.dtype)))


class BlackMambaForCausalLM(BlackMambaPreTrainedModel, GenerationMixin):
    """With its tied head and the loss that the configuration names. There is no cache: generation runs the whole
    sequence for each token, and batches of prompts must be of one length."""

    _tied_weights_keys = ("lm_head.weight",)

    def __init__(self, config: BlackMambaConfig) -> None:
        super().__init__(config)
        self.model = BlackMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The study's is a mean over one micro-batch; the Trainer then divides by the number of them.
        self.accepts_loss_kwargs = config.loss == CROSS_ENTROPY
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Also of a folder with a config.json and no weights, which are then random, made on their device."""
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "config.json").is_file() or checkpoints.holds_weights(folder):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if kwargs.get("quantization_config") is not None:
            raise ValueError(f"{folder} holds no weights, and random ones of BlackMamba are made unquantised only")
        config = kwargs.get("config") or BlackMambaConfig.from_pretrained(folder)
        return random_model(config, kwargs.get("torch_dtype", kwargs.get("dtype")), kwargs.get("device_map"))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits (B, L, V), or of the last `logits_to_keep` positions only; the loss where labels (B, L) are given.

        attention_mask is ignored: see BlackMambaModel.forward.
        """
        hidden_BLH = self.model(input_ids=input_ids, inputs_embeds=inputs_embeds).last_hidden_state
        logits = self.lm_head(hidden_BLH[:, -logits_to_keep:] if logits_to_keep else hidden_BLH)
        loss = None
        if labels is not None:
            if self.config.loss == CROSS_ENTROPY:
                loss = cross_entropy_loss(logits, labels, num_items_in_batch)
            else:
                loss = study_loss(logits, labels)
        return CausalLMOutput(loss=loss, logits=logits)


def random_model(config: BlackMambaConfig, dtype: Any, device_map: Any) -> BlackMambaForCausalLM:
    """A freshly initialised model, in `dtype` (the configuration's own where it is None or auto). For device_map see
    random_weights.target_device."""
    device = random_weights.target_device(device_map)
    if not isinstance(dtype, torch.dtype):
        dtype = config.torch_dtype if isinstance(config.torch_dtype, torch.dtype) else torch.bfloat16
    with torch.device("meta"):
        model = BlackMambaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(random_weights.SEED)
        model.apply(model._init_weights)
    return model.eval()
