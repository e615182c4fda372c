#!/usr/bin/env python3
"""Where do the steps of your own Trainer go? A small random Llama on any machine, in less than a minute:

    PYTHONPATH=src python examples/attach_to_trainer.py [--finetuning lora|full] \\
        [--checkpointing none|reentrant|non-reentrant]
    python -m tunescope table latency profile

Only the lines marked (1) to (3) are tunescope's; put them into your own script.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tunescope import StepProfiler  # (1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finetuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--checkpointing", choices=("none", "reentrant", "non-reentrant"), default="non-reentrant")
    parser.add_argument("--out", default="profile")
    options = parser.parse_args()

    torch.set_num_threads(1)  # of so small a model: two on busy cores mostly wait for each other
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4,
        )
    )  # fmt: skip
    if options.finetuning == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
        model.enable_input_require_grads()
    tokens = torch.randint(0, 2048, (256, 64)).tolist()
    arguments = TrainingArguments(
        output_dir=f"{options.out}-checkpoints",
        max_steps=40,
        per_device_train_batch_size=4,
        gradient_checkpointing=options.checkpointing != "none",
        gradient_checkpointing_kwargs={"use_reentrant": options.checkpointing == "reentrant"},
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}))
    name = f"{options.finetuning}-{options.checkpointing}"
    trainer.add_callback(StepProfiler(options.out, name=name))  # (2)
    trainer.train()
    print(f"Table: python -m tunescope table latency {options.out}")  # (3)


if __name__ == "__main__":
    main()
