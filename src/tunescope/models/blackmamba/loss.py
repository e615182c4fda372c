"""The two losses that a BlackMamba can be trained with."""

# B batch, L seq_len, V vocabulary

import torch
from torch import Tensor
from torch.nn import functional

LABEL_SMOOTHING = 0.1
IGNORED = -100


def cross_entropy_loss(logits_BLV: Tensor, labels_BL: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Next-token cross-entropy within each sequence: mean over labels that are not IGNORED, or their sum divided by
    num_items_in_batch, as the Trainer wants it under gradient accumulation."""
    logits_NV = _full_precision(logits_BLV[:, :-1].flatten(0, 1))
    reduction = "mean" if num_items_in_batch is None else "sum"
    labels_N = labels_BL[:, 1:].flatten().to(logits_NV.device)
    loss = functional.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def study_loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """The study's (arXiv 2408.04693): cross-entropy smoothed over the whole vocabulary, padding rows included.

    Flattened before it is shifted, so that the last position of a sequence is paired with the first label of the next;
    a masked prompt leaves nothing of that. NaN where every label is IGNORED.
    """
    logits_NV = _full_precision(logits_BLV.flatten(0, 1)[:-1])
    labels_N = labels_BL.flatten()[1:].to(logits_NV.device)
    return functional.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, label_smoothing=LABEL_SMOOTHING)


def _full_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
