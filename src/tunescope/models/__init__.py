"""Models to fine-tune: their architectures, weights without a checkpoint, and a tokenizer without one."""
