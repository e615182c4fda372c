"""What bench/peers.py runs in each peer's environment: programs as text, for they import nothing of this project."""

# Each reads questions as JSON and prints, for each, [predicted or null, note].
PREAMBLE = """
import json, os, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
class NoAnswer(Exception):
    pass
def answers(answer):
    out = []
    for ask in json.load(sys.stdin):
        ask = SimpleNamespace(**ask, is_qlora=ask["model"] != "blackmamba")
        try:
            out.append(answer(ask))
        except Exception as error:
            kind = "" if isinstance(error, NoAnswer) else f"{type(error).__name__}: "
            text = " ".join(str(error).split()).split(". ")[0][:160]
            out.append([None, f"no answer: {kind}{text}"])
    print("\\n" + json.dumps(out))
"""
ACCELERATE = """
from accelerate.commands import estimate
from tunescope.models import blackmamba
blackmamba.register()
def on_hub(repo, token=None):
    config = json.loads((Path(repo) / "config.json").read_text())
    own = {"auto_map": {"AutoModelForCausalLM": ""}} if config["model_type"] == "blackmamba" else {}
    return SimpleNamespace(library_name="transformers", config=config | own)
estimate.verify_on_hub = on_hub
sizes = {}
def size(config, dtype):
    key = json.dumps([config, dtype], sort_keys=True)
    if key not in sizes:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            args = SimpleNamespace(
                model_name=folder, library_name="transformers", trust_remote_code=False, dtypes=[dtype]
            )
            [[_, _, total, training]] = estimate.gather_data(args)
            sizes[key] = total, max(training.values())
    return sizes[key]
def answer(ask):
    if ask.quantity != "peak_bytes":
        return None, "no answer: counts weights, gradients and states of Adam only"
    config = {key: value for key, value in ask.config.items() if key != "num_experts_per_tok"}
    if ask.is_qlora:
        total, training = size(config, "int4")
        assert training == -1
        return None, f"no answer: training with int4 is N/A (loading: {total:.0f} bytes)"
    if ask.batch_size != 1:
        return None, "no answer: for a batch of 1 only"
    return size(config, "float16")[1], "float16, Training using Adam"
answers(answer)
"""
LLM_ANALYSIS = """
import contextlib
with contextlib.redirect_stdout(sys.stderr):
    from llm_analysis import config as configs
    from llm_analysis.analysis import train
def summary(ask, folder, **options):
    path = Path(folder) / "model.json"
    if ask.is_qlora:
        c = ask.config
        # It counts two matrices a gated MLP that has three.
        ffn = c["intermediate_size"] * 3 // 2
        path.write_text(json.dumps({
            "name": str(path), "model_type": c["model_type"], "num_layers": c["num_hidden_layers"],
            "n_head": c["num_attention_heads"], "num_key_value_heads": c["num_key_value_heads"],
            "hidden_dim": c["hidden_size"], "vocab_size": c["vocab_size"], "max_seq_len": c["max_position_embeddings"],
            "ffn_embed_dim": ffn, "expansion_ratio": ffn / c["hidden_size"],
            "moe_num_experts": c["num_local_experts"], "moe_top_k": c["num_experts_per_tok"],
        }))
    else:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(ask.config))
        try:
            configs.get_model_config_by_name(folder)
        except Exception as error:
            raise NoAnswer(f"knows no Mamba layer ({type(error).__name__}: {error})")
    configs.gpu_configs[ask.gpu] = configs.GPUConfig(
        ask.gpu, ask.gpu_memory_gib, ask.gpu_dram_bytes_per_s / 1e9, 450, 8e-6, ask.gpu_bf16_flop_per_s / 1e12
    )
    with contextlib.redirect_stdout(sys.stderr):
        return train(
            model_name=str(path), gpu_name=ask.gpu, dtype_name="w4a16e16", seq_len=round(ask.seq_len_tokens),
            activation_recomputation=2, master_weights_dtype_bytes=0, other_op_bytes=0, flops_efficiency=0.5,
            mlp_gated_linear_units=True, log_level="ERROR", **options,
        )
def answer(ask):
    if ask.quantity == "reserved_bytes":
        return None, "no answer: models no allocator"
    with tempfile.TemporaryDirectory() as folder:
        if ask.quantity == "max_batch":
            return summary(ask, folder)["max_batch_size_per_gpu"], "no LoRA: gradients and states left out"
        said = summary(ask, folder, batch_size_per_gpu=ask.batch_size)
    if ask.quantity == "step_s":
        return said["latency_per_iter"], "no LoRA: as if all weights were trained; efficiency 0.5"
    return said["(weight+op_state+grad+act)_memory_per_gpu"], "no LoRA: gradients and states left out"
answers(answer)
"""
FITCHECK = """
import subprocess
home = tempfile.TemporaryDirectory()
GPUS = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA H100 80GB HBM3": "h100"}
said = {}
def report(config, flags):
    key = json.dumps([config, flags], sort_keys=True)
    if key not in said:
        cached = Path(home.name) / "hub" / "models--peer--model"
        (cached / "snapshots" / "main").mkdir(parents=True, exist_ok=True)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text("main")
        (cached / "snapshots" / "main" / "config.json").write_text(json.dumps(config))
        said[key] = subprocess.run(
            [sys.executable, "-m", "fitcheck", "peer/model", *flags, "--json"], capture_output=True, text=True,
            env={**os.environ, "HF_HOME": home.name, "HF_HUB_CACHE": f"{home.name}/hub", "HF_HUB_OFFLINE": "1"},
        )
    done = said[key]
    if done.returncode not in (0, 1):
        raise NoAnswer(" ".join(done.stderr.split()).removeprefix("Error: 'peer/model' ").removeprefix("Error: "))
    return json.loads(done.stdout)
def answer(ask):
    if ask.quantity == "step_s":
        return None, "no answer: estimates no time"
    config, note = ask.config, ""
    if STAND_IN:
        experts = config["num_local_experts"]
        config = {k: v for k, v in config.items() if k not in ("num_local_experts", "num_experts_per_tok")}
        config |= {"model_type": "mistral", "intermediate_size": experts * config["intermediate_size"]}
        note = f"dense, MLP {experts} times as wide"
    if ask.is_qlora:
        how = ["--qlora", "--double-quant", "--lora-r", "16", "--lora-targets", "gate_proj,up_proj,down_proj"]
    else:
        how = ["--no-lora", "--optimizer-dtype", "bf16"]
    gpu = GPUS.get(ask.gpu)
    where = ["--gpu", gpu] if gpu else ["--vram-mib", str(round(ask.gpu_memory_gib * 1024))]
    shape = ["--batch-size", str(ask.batch_size), "--seq-len", str(ask.seq_len_tokens)]
    found = report(config, [*how, *where, *shape, "--optimizer", "adamw", "--flash-attn"])
    memory_mib = found["memory_mib"]
    if ask.quantity == "max_batch":
        return found["verdict"]["max_batch_size"], note
    if ask.quantity == "peak_bytes":
        return (memory_mib["total"] - memory_mib["overhead"]) * 2**20, f"{note}; without its overhead".lstrip("; ")
    return memory_mib["total"] * 2**20, f"{note}; with its overhead".lstrip("; ")
answers(answer)
"""
FTUNEAI = """
from ftuneai.core.memory import MemoryEstimator
from ftuneai.core.models import (
    FineTuneMethod, GPUSpec, LoRATarget, ModelSpec, OptimizerType, Quantization, TrainingConfig,
)
from ftuneai.core.time import TimeEstimator
def gpu_of(ask):
    tflops = ask.gpu_bf16_flop_per_s / 1e12
    return GPUSpec(ask.gpu, ask.gpu_memory_gib, tflops, tflops, tflops / 2, ask.gpu_dram_bytes_per_s / 1e9)
def estimators(ask, batch_size):
    c = ask.config
    model = ModelSpec(
        name=ask.model, parameters=ask.num_parameters, hidden_size=c["hidden_size"], num_layers=c["num_hidden_layers"],
        num_attention_heads=c.get("num_attention_heads", 1), num_kv_heads=c.get("num_key_value_heads", 1),
        intermediate_size=c["intermediate_size"], vocab_size=c["vocab_size"], max_seq_length=32768, is_moe=True,
        num_experts=c["num_local_experts"], num_active_experts=c["num_experts_per_tok"],
    )
    how = TrainingConfig(
        method=FineTuneMethod.QLORA if ask.is_qlora else FineTuneMethod.FULL,
        quantization=Quantization.INT4 if ask.is_qlora else Quantization.NONE,
        batch_size=batch_size, seq_length=round(ask.seq_len_tokens), gradient_checkpointing=ask.is_qlora,
        optimizer=OptimizerType.ADAMW, lora_rank=16, lora_target=LoRATarget.ALL_LINEAR, flash_attention=ask.is_qlora,
    )
    return MemoryEstimator(model, how), TimeEstimator(model, how)
def answer(ask):
    if ask.quantity == "max_batch":
        fits = lambda batch_size: estimators(ask, batch_size)[0].check_gpu_fit([gpu_of(ask)])[0].fits
        batch_size = 0
        while fits(batch_size + 1):
            batch_size += 1
        return batch_size, "largest that check_gpu_fit passes"
    memory, time = estimators(ask, ask.batch_size)
    if ask.quantity == "step_s":
        # Hours are rounded to 0.01.
        num_steps = 10**7
        found = time.estimate(
            gpu_of(ask), ask.batch_size * num_steps, epochs=1, avg_seq_length=round(ask.seq_len_tokens)
        )
        return found.total_hours * 3600 / num_steps, f"its MFU of {found.mfu}"
    found = memory.estimate()
    if ask.quantity == "peak_bytes":
        return (found.total_gb - found.overhead_gb) * 2**30, "without its overhead"
    return found.total_gb * 2**30, "with its overhead"
answers(answer)
"""
# Tool -> the distribution it comes in, and what is run.
PEERS = {
    "accelerate estimate-memory": ("accelerate", ACCELERATE),
    "llm-analysis": ("llm-analysis", LLM_ANALYSIS),
    "fitcheck-llm": ("fitcheck-llm", f"STAND_IN = False\n{FITCHECK}"),
    "fitcheck-llm, dense stand-in": ("fitcheck-llm", f"STAND_IN = True\n{FITCHECK}"),
    "ftuneai": ("ftuneai", FTUNEAI),
}
