"""What the fork server imports once for all points.

Only modules that leave CUDA alone: llamafactory and bitsandbytes touch it on import, and a process forked after that
can never use the GPU ("Cannot re-initialize CUDA in forked subprocess"); each point imports those two itself (0.6 s).
"""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import transformers.models.mixtral.modeling_mixtral
import transformers.models.qwen3_moe.modeling_qwen3_moe
import transformers.trainer  # noqa: F401
import trl  # noqa: F401

import tunescope.measure.worker  # noqa: F401

assert not torch.cuda.is_initialized(), "a preloaded module started CUDA; no point could use the GPU"
