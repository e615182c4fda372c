"""BlackMamba's original config.json, against ours. No torch.

What the original can be told and our model does not compute is refused, never passed over.
"""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from tunescope.errors import UserError
from tunescope.families.blackmamba import EPSILON
from tunescope.models.blackmamba.tokenizer import STUDY_TOKEN_IDS

# Sizes: original key -> ours.
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "state_size": "state_size",
    "conv_dimension": "conv_kernel",
    "vocab_size": "vocab_size",
    "expansion_factor": "expand",
    "ffn_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
}
# Keys with the only value that our model computes. The first two have another default in the original, so that they
# must be there.
MUST_SAY: dict[str, Any] = {"add_bias_linear": False, "swiglu": True}
MAY_SAY: dict[str, Any] = {
    "base_model_type": "mamba",
    "rms_norm": True,
    "fused_add_norm": False,
    "residual_in_fp32": True,
    "conv_bias": True,
    "dt_rank": "auto",
    "routing_mode": "sinkhorn",
    "hidden_dropout": 0.0,
    "layernorm_zero_centered_gamma": False,
}
# Read by nothing, or by the initialisation alone, which a checkpoint overwrites.
WITHOUT_EFFECT = frozenset(
    ("bias", "device", "use_fast_path", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "init_method_std")
)
EPSILON_KEY = "layernorm_epsilon"
TOP_K_KEY, RELEASED_TOP_K = "topk", 1  # the key is the study's; the release sends a token to one expert
BLOCKS_KEY, MAMBA_BLOCK = "mamba_moe_layers", "r"
# The original takes the last character of a block's string for the number of experts, and "1" for a plain MLP.
EXPERT_DIGITS = "23456789"


def config_from_original(original: Mapping[str, Any]) -> dict[str, Any]:
    """Our config.json for an original one. Raises UserError, with key and value, for what cannot be represented.

    The ids of special tokens are those of the study, or null where the vocabulary is too small for them.
    """
    known = {*SIZES, *MUST_SAY, *MAY_SAY, *WITHOUT_EFFECT, EPSILON_KEY, TOP_K_KEY, BLOCKS_KEY}
    for key in (*SIZES, *MUST_SAY, BLOCKS_KEY):
        if key not in original:
            raise UserError(
                f"BlackMamba's configuration has no {key}.",
                cause="the file is cut short, or that of another model.",
                cure="use the config.json that came with the checkpoint.",
            )
    for key, value in original.items():
        if key not in known:
            _refuse(key, value, "this key is not known, and may change what the model computes")
        wanted = (MUST_SAY | MAY_SAY).get(key, value)
        if isinstance(value, bool) != isinstance(wanted, bool) or value != wanted:  # 0 is no false, but is 0.0
            _refuse(key, value, f"this model is built for {json.dumps(wanted)} only")
    for key in SIZES:
        if type(original[key]) is not int or original[key] < 1:
            _refuse(key, original[key], "it must be a whole number from 1")
    epsilon = original.get(EPSILON_KEY, EPSILON)
    if type(epsilon) is not float or not 0 < epsilon < 1:
        _refuse(EPSILON_KEY, epsilon, "it must be a number between 0 and 1")
    blocks, num_experts = _blocks_from_original(original[BLOCKS_KEY], original["num_layers"])
    top_k = original.get(TOP_K_KEY, RELEASED_TOP_K)
    if type(top_k) is not int or not 1 <= top_k <= num_experts:
        _refuse(TOP_K_KEY, top_k, f"it must be a whole number from 1 to the {num_experts} experts")
    has_room = original["vocab_size"] > max(STUDY_TOKEN_IDS.values())
    return {
        "architectures": ["BlackMambaForCausalLM"],
        "model_type": "blackmamba",
        **{ours: original[key] for key, ours in SIZES.items()},
        "layers_block_type": blocks,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "layer_norm_epsilon": epsilon,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **{f"{role}_token_id": STUDY_TOKEN_IDS[role] if has_room else None for role in ("bos", "eos", "pad")},
    }


def config_to_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """The original's config.json for ours, with the study's `topk` unless it is the release's 1.

    Keys that only say how our model runs or trains are left out. Raises UserError for what the original cannot be told.
    """
    if config.get("tie_word_embeddings", True) is not True:
        _refuse("tie_word_embeddings", config["tie_word_embeddings"], "the original's head is its embedding", to=True)
    kinds, num_experts = config["layers_block_type"], config["num_local_experts"]
    if len(kinds) != config["num_hidden_layers"] or not set(kinds) <= {"mamba", "moe"} or "moe" not in kinds:
        _refuse(
            "layers_block_type", kinds, f"it must be mamba or moe for {config['num_hidden_layers']} blocks", to=True
        )
    if str(num_experts) not in EXPERT_DIGITS:
        _refuse("num_local_experts", num_experts, "the original has one digit for it, from 2", to=True)
    original = {key: config[ours] for key, ours in SIZES.items()}
    original[BLOCKS_KEY] = [str(num_experts) if kind == "moe" else MAMBA_BLOCK for kind in kinds]
    original |= {"bias": False, **MUST_SAY}
    if config["layer_norm_epsilon"] != EPSILON:
        original[EPSILON_KEY] = config["layer_norm_epsilon"]
    if config["num_experts_per_tok"] != RELEASED_TOP_K:
        original[TOP_K_KEY] = config["num_experts_per_tok"]
    return original


def _blocks_from_original(strings: Any, num_layers: int) -> tuple[list[str], int]:
    """Kind of each block, and the experts of every MoE block."""
    if not isinstance(strings, list) or not strings:
        _refuse(BLOCKS_KEY, strings, "it must name each block; all-Mamba models are not built")
    if len(strings) != num_layers:
        _refuse(BLOCKS_KEY, strings, f"it names {len(strings)} blocks, num_layers is {num_layers}")
    for string in strings:
        if string == MAMBA_BLOCK or (isinstance(string, str) and len(string) == 1 and string in EXPERT_DIGITS):
            continue
        cause = 'a block must be "r" (Mamba) or the number of its experts, "2" to "9"'
        if isinstance(string, str) and string.startswith("1"):
            cause += '; from "1" on it is a plain MLP, which is not built'
        elif isinstance(string, str) and string.startswith(MAMBA_BLOCK):
            cause += "; Mamba and experts side by side in one block are not built"
        _refuse(BLOCKS_KEY, string, cause)
    counts = sorted(set(strings) - {MAMBA_BLOCK})
    if len(counts) != 1:
        cause = f"its MoE blocks have {' and '.join(counts)} experts" if counts else "it has no MoE block"
        _refuse(BLOCKS_KEY, strings, f"{cause}; all must have the same number")
    return ["mamba" if string == MAMBA_BLOCK else "moe" for string in strings], int(counts[0])


def _refuse(key: str, value: Any, cause: str, *, to: bool = False) -> NoReturn:
    """to: on the way to the original."""
    reader = "the original BlackMamba" if to else "this project's BlackMamba"
    raise UserError(
        f"The configuration says {key}: {json.dumps(value)}, which {reader} cannot represent.",
        cause=f"{cause}.",
        cure="use the config.json that came with the checkpoint."
        if not to
        else "keep the model in this project's form, or set the key to what the original knows.",
    )
