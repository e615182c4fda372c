"""Breakdowns by hand: what a recorder would have left of steps in which every kernel's place is known."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from helpers_latency import put
from helpers_points import MS, gpu_environment, step_rows, write_point

from tunescope import expert_tokens
from tunescope import latency_files as files
from tunescope.config import Point

NUM_RECORDED_STEPS = 2
US = 1_000  # ns

# --- a recording by hand ---------------------------------------------------------------------------------------------

MAIN, ENGINE = 1, 2  # threads
STREAM, SIDE_STREAM = 7, 13
TICK_NS = 10  # between any two moments on the CPU


class Place(NamedTuple):
    """Where a piece of work belongs. label: only for the MoE layer."""

    layer: int
    part: str
    phase: str
    label: str = ""


class Placed(NamedTuple):
    """step: recorded step from 0; -1 for work whose launch the recording lacks."""

    place: Place
    kernel: str
    duration_ns: int
    step: int


class Tape:
    """Writes the events of a recording in the order in which they happen, and keeps what is known of each kernel."""

    def __init__(self, modules: Sequence[tuple[str, str]]) -> None:
        """modules: path and class of each."""
        self.modules = list(modules)
        self.numbers = {path: number for number, (path, _) in enumerate(modules)}
        self.events: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.placed: list[Placed] = []
        self.now_ns = self.gpu_free_ns = 10**18
        self.step = -1
        self._sequence = 100
        self._correlation = 0
        self._last_kernel_ns = 0

    def event(self, kind: str, name: str, start_ns: int, duration_ns: int, **more: Any) -> None:
        common = {"device": -1, "correlation": 0, "sequence": -1, "forward_thread": 0, "ref": -1, "allocated_bytes": 0}
        times = {"start_ns": start_ns, "duration_ns": duration_ns}
        self.events.append({"kind": kind, "name": name, **times, "thread": MAIN, **common, **more})

    def tick(self) -> int:
        self.now_ns += TICK_NS
        return self.now_ns

    @contextlib.contextmanager
    def range(self, kind: str, name: str, **more: Any) -> Iterator[None]:
        begin_ns = self.tick()
        yield
        self.event(kind, name, begin_ns, self.tick() - begin_ns, **more)

    def mark(self, name: str) -> None:
        self.step += name == files.RESUME
        self.event(files.MARK, files.MARK_PREFIX + name, self.tick(), 1)

    @contextlib.contextmanager
    def call(self, path: str, *, thread: int = MAIN, again: bool = False) -> Iterator[int]:
        """A module's forward. Gives the sequence number of the node that it makes."""
        number, made = len(self.calls), self._sequence
        row = {"call": number, "module": self.numbers[path], "is_recompute": again, "sequence_begin": made}
        self.calls.append(row)
        self._sequence += 1
        with self.range(files.CALL, files.CALL_PREFIX, thread=thread, ref=number):
            yield made
        row["sequence_end"] = self._sequence

    @contextlib.contextmanager
    def node(self, name: str, sequence: int, forward_thread: int) -> Iterator[None]:
        """An autograd node with its function in it, as the engine runs them."""
        more = {"thread": ENGINE, "sequence": sequence, "forward_thread": forward_thread}
        with self.range(files.NODE, files.NODE_PREFIX + name, **more), self.range(files.OP, name, **more):
            yield

    def work(
        self,
        place: Place,
        ops: Sequence[str],
        kernel: str,
        duration_ns: int,
        *,
        thread: int = MAIN,
        kind: str = files.KERNEL,
        beside: bool = False,
        is_known: bool = True,
    ) -> None:
        """Operators from the outermost in, and what the innermost runs on the GPU.

        beside: at the same time as the work before, on another stream. is_known: its launch is in the recording.
        """
        with contextlib.ExitStack() as stack:
            for op in ops:
                stack.enter_context(self.range(files.OP, op, thread=thread))
            self._correlation += 1
            if is_known:
                with self.range(files.LAUNCH, "cudaLaunchKernel", thread=thread, correlation=self._correlation):
                    pass
        start_ns = self._last_kernel_ns if beside else max(self.gpu_free_ns, self.now_ns)
        where = {"thread": SIDE_STREAM if beside else STREAM, "device": 0, "correlation": self._correlation}
        self.event(kind, kernel, start_ns, duration_ns, **where)
        self._last_kernel_ns = start_ns
        self.gpu_free_ns = max(self.gpu_free_ns, start_ns + duration_ns)
        self.placed.append(Placed(place, kernel, duration_ns, self.step if is_known else -1))

    def memory(self, num_bytes: int, *, device: int = 0, thread: int = MAIN) -> None:
        self.event(files.MEMORY, "[memory]", self.tick(), 0, device=device, thread=thread, allocated_bytes=num_bytes)

    def wait_until(self, time_ns: int) -> None:
        assert max(self.now_ns, self.gpu_free_ns) < time_ns
        self.now_ns = time_ns - TICK_NS  # the next moment ticks

    def files(self) -> dict[str, pd.DataFrame]:
        modules = [
            {"module": number, "path": path, "class_name": name, "frozen_bytes": 0, "trained_bytes": 0}
            for number, (path, name) in enumerate(self.modules)
        ]
        events = sorted(self.events, key=lambda event: event["start_ns"])
        return {
            files.EVENTS_FILE: pd.DataFrame(events, columns=files.EVENTS_SCHEMA.names),
            files.CALLS_FILE: pd.DataFrame(self.calls, columns=files.CALLS_SCHEMA.names),
            files.MODULES_FILE: pd.DataFrame(modules, columns=files.MODULES_SCHEMA.names),
        }


# --- a Mixtral of two layers -----------------------------------------------------------------------------------------

NUM_LAYERS = 2
LAYERS = "base_model.model.model.layers"
_OF_LAYER = (
    ("", "MixtralDecoderLayer"), (".input_layernorm", "MixtralRMSNorm"), (".self_attn", "MixtralAttention"),
    (".self_attn.q_proj", "Linear4bit"), (".post_attention_layernorm", "MixtralRMSNorm"),
    (".block_sparse_moe", "MixtralSparseMoeBlock"), (".block_sparse_moe.gate", "Linear4bit"),
    (".block_sparse_moe.gate.base_layer", "Linear4bit"), (".block_sparse_moe.gate.lora_A.default", "Linear"),
    (".block_sparse_moe.experts", "ModuleList"), (".block_sparse_moe.experts.0", "MixtralBlockSparseTop2MLP"),
    *(
        (f".block_sparse_moe.experts.0.{name}{below}", kind)
        for name in ("w1", "w2", "w3")
        for below, kind in (
            ("", "Linear4bit"), (".base_layer", "Linear4bit"), (".lora_A.default", "Linear"),
            (".lora_B.default", "Linear"),
        )
    ),
    (".block_sparse_moe.experts.0.act_fn", "SiLUActivation"),
)  # fmt: skip
MODULES = (
    ("", "PeftModelForCausalLM"), ("base_model", "LoraModel"), ("base_model.model", "MixtralForCausalLM"),
    ("base_model.model.model", "MixtralModel"), ("base_model.model.model.embed_tokens", "Embedding"),
    (LAYERS, "ModuleList"),
    *((f"{LAYERS}.{layer}{below}", kind) for layer in range(NUM_LAYERS) for below, kind in _OF_LAYER),
    ("base_model.model.model.norm", "MixtralRMSNorm"), ("base_model.model.lm_head", "Linear"),
)  # fmt: skip

_ADD = "void at::native::elementwise_kernel<128, 2, CUDAFunctor_add<float> >(int)"
_DECODE_SCALES = "void kDequantizeBlockwise<float, 512, 64, 8, 0>(float*, unsigned char*)"
_DECODE = "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)"
_FUSED = "void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>(int, int)"
_GEMM = "nvjet_sm90_tst_64x8_64x16_2x4_h_bz_TNT"
_COPY_KERNEL = "void at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)"
_DTOH, _DTOD = "Memcpy DtoH (Device -> Pageable)", "Memcpy DtoD (Device -> Device)"
_GATE, _EXPERT = ".block_sparse_moe.gate", ".block_sparse_moe.experts.0"
_GEMM_4BIT = "bitsandbytes::gemm_4bit"
_TO_COPY = ("aten::to", "aten::copy_")

# What the MoE layer's forward runs: module below the layer, operators, kernel, us, and the label that it must get.
MOE_FORWARD: tuple[tuple[str, tuple[str, ...], str, int, str], ...] = (
    (f"{_GATE}.base_layer", ("MatMul4Bit", _GEMM_4BIT), _DECODE_SCALES, 3, "scales_dequant"),
    (f"{_GATE}.base_layer", ("MatMul4Bit", "aten::add"), _ADD, 2, "scales_dequant"),
    (f"{_GATE}.base_layer", ("MatMul4Bit", _GEMM_4BIT), _DECODE, 7, "router_dequant"),
    (f"{_GATE}.base_layer", ("MatMul4Bit", "aten::mm"), _GEMM, 13, "matmul(router)"),
    (_GATE, ("aten::clone", "aten::copy_"), _DTOD, 4, "casts and copies"),
    (f"{_GATE}.lora_A.default", ("aten::linear", "aten::mm"), _GEMM, 17, "matmul(lora)"),
    (_GATE, ("aten::add",), _ADD, 6, "lora scaling and adding"),
    (".block_sparse_moe", ("aten::softmax", "aten::_softmax"), "softmax_warp_forward<float, 3>", 19, "softmax"),
    (".block_sparse_moe", ("aten::topk",), "void at::native::sbtopk::gatherTopK<float>()", 23, "topk"),
    (".block_sparse_moe", ("aten::topk",), "void at::native::bitonicSortKVInPlace<2>()", 5, "topk"),
    (".block_sparse_moe", ("aten::one_hot", "aten::scatter_"), "_scatter_gather_kernel<8>", 29, "gather/scatter/index"),
    (".block_sparse_moe", ("aten::nonzero",), _DTOH, 8, "gather/scatter/index"),
    (".block_sparse_moe", ("aten::index",), "vectorized_gather_kernel<16>", 31, "gather/scatter/index"),
    (f"{_EXPERT}.w1.base_layer", ("MatMul4Bit", _GEMM_4BIT), _DECODE_SCALES, 3, "scales_dequant"),
    (f"{_EXPERT}.w1.base_layer", ("MatMul4Bit", _GEMM_4BIT), _DECODE, 101, "w1_dequant"),
    (f"{_EXPERT}.w1.base_layer", ("MatMul4Bit", "aten::mm"), _GEMM, 1009, "matmul(w1)"),
    (f"{_EXPERT}.w1.base_layer", ("aten::empty_like", "aten::fill_"), "Memset (Device)", 9, "rest of the NF4 linears"),
    (f"{_EXPERT}.w1.lora_B.default", ("aten::linear", "aten::mm"), _GEMM, 37, "matmul(lora)"),
    (f"{_EXPERT}.w1", ("aten::mul",), "vectorized_elementwise_kernel<AUnaryFunctor>", 10, "lora scaling and adding"),
    (f"{_EXPERT}.act_fn", ("aten::silu",), "vectorized_elementwise_kernel<silu>", 41, "activation"),
    (f"{_EXPERT}.w3.base_layer", ("MatMul4Bit", _GEMM_4BIT), _DECODE, 103, "w3_dequant"),
    (f"{_EXPERT}.w3.base_layer", ("MatMul4Bit", "aten::mm"), _GEMM, 1013, "matmul(w3)"),
    (_EXPERT, ("aten::mul",), "vectorized_elementwise_kernel<MulFunctor>", 43, "elementwise_mult"),
    (f"{_EXPERT}.w2.base_layer", ("MatMul4Bit", _GEMM_4BIT), _FUSED, 1019, "matmul(w2) decoding"),
    (f"{_EXPERT}.w2.lora_A.default", _TO_COPY, _COPY_KERNEL, 11, "casts and copies"),
    (".block_sparse_moe", ("aten::index_add_",), "indexFuncLargeIndex<BFloat16>", 47, "gather/scatter/index"),
)
# What its backward runs, as above after the node's name; parents are made by the recompute of the same module.
MOE_BACKWARD: tuple[tuple[str, str, tuple[str, ...], str, int, str], ...] = (
    (".block_sparse_moe", "IndexAddBackward0", ("aten::index_select",), "gather_kernel", 53, "gather/scatter/index"),
    (f"{_EXPERT}.w2.base_layer", "MatMul4BitBackward", ("bitsandbytes::dequantize_4bit",), _DECODE, 107, "w2_dequant"),
    (f"{_EXPERT}.w2.base_layer", "MatMul4BitBackward", ("aten::matmul", "aten::mm"), _GEMM, 1021, "matmul(w2)"),
    (_EXPERT, "MulBackward0", ("aten::mul",), "vectorized_elementwise_kernel<MulFunctor>", 59, "elementwise_mult"),
    (f"{_EXPERT}.act_fn", "SiluBackward0", ("aten::silu_backward",), "silu_backward_kernel", 61, "activation"),
    (f"{_EXPERT}.w1.lora_B.default", "MmBackward0", ("aten::mm",), _GEMM, 67, "matmul(lora)"),
    (f"{_EXPERT}.w1.lora_B.default", "ToCopyBackward0", _TO_COPY, _COPY_KERNEL, 12, "casts and copies"),
    (".block_sparse_moe", "TopkBackward0", ("aten::scatter_",), "_scatter_gather_topk_kernel", 14, "topk"),
    (".block_sparse_moe", "SoftmaxBackward0", ("aten::_softmax_backward_data",), "softmax_backward", 71, "softmax"),
    (f"{_GATE}.base_layer", "MatMul4BitBackward", ("aten::matmul", "aten::mm"), _GEMM, 73, "matmul(router)"),
)  # fmt: skip
ACCUMULATE_US = 15  # of the gradient of w1's LoRA B
ATTENTION_US, COPY_BESIDE_US = 500, 12  # the copy runs while attention's kernel does
UNKNOWN_US = 70  # a kernel whose launch the recording lacks
RECORDED_STEP_NS = 100 * MS  # the first; the second takes twice as long, and so do its kernels
BLOCK = "base_model.model.model"


def _kind(kernel: str) -> str:
    return next((kind for kind in (files.MEMCPY, files.MEMSET) if kernel.lower().startswith(kind)), files.KERNEL)


def mixtral_tape(*, moe_factor: int = 1) -> Tape:
    """Two recorded steps of forward, reentrant recompute, backward and optimizer.

    moe_factor: so many times as long do the MoE layer's kernels take.
    """
    tape = Tape(MODULES)
    for step in range(NUM_RECORDED_STEPS):
        begin_ns = tape.now_ns + MS
        tape.wait_until(begin_ns)
        tape.mark(files.RESUME)
        _step(tape, 1 + step, moe_factor)
        tape.wait_until(begin_ns + (1 + step) * moe_factor * RECORDED_STEP_NS)
        tape.mark(files.STEP_END)
    return tape


def _step(tape: Tape, factor: int, moe_factor: int) -> None:
    def outside(part: str, phase: str, ops: Sequence[str], kernel: str, us: int, thread: int = MAIN) -> None:
        tape.work(Place(-1, part, phase), ops, kernel, us * US * factor, thread=thread, kind=_kind(kernel))

    outside("(between steps)", files.REST, ("aten::to", "aten::copy_"), "Memcpy HtoD (Pinned -> Device)", 30)
    tape.mark(files.STEP_BEGIN)
    outside("(data)", files.REST, ("aten::ones",), "fill_kernel", 1)
    with tape.call(""), tape.call("base_model.model"):
        with tape.call(BLOCK):
            with tape.call(f"{BLOCK}.embed_tokens"):
                outside("embedding", files.FORWARD, ("aten::embedding",), "gather_embedding", 11)
            for layer in range(NUM_LAYERS):
                _layer(tape, layer, files.FORWARD, factor, moe_factor)
            with tape.call(f"{BLOCK}.norm"):
                outside("final_norm", files.FORWARD, ("aten::mul",), "norm_kernel", 25)
        with tape.call("base_model.model.lm_head") as head:
            outside("lm_head + loss", files.FORWARD, ("aten::linear", "aten::mm"), _GEMM, 50)
        outside("lm_head + loss", files.FORWARD, ("aten::cross_entropy_loss",), "nll_loss_kernel", 17)
    outside("(after forward)", files.FORWARD, ("aten::div",), "div_kernel", 3)
    with tape.node("MmBackward0", head, MAIN):
        outside("lm_head + loss", files.BACKWARD, ("aten::mm",), _GEMM, 60, ENGINE)
    outside("(autograd engine)", files.BACKWARD, ("aten::add_",), _ADD, 4, ENGINE)
    for layer in reversed(range(NUM_LAYERS)):
        with tape.node("CheckpointFunctionBackward", -1, MAIN):
            made = _layer(tape, layer, files.RECOMPUTE, factor, moe_factor)
            _layer_backward(tape, layer, made, factor, moe_factor)
    outside("(loss check)", files.REST, ("aten::isnan",), "isnan_kernel", 2)
    outside("(gradient clipping)", files.CLIP, ("aten::_foreach_norm",), "lpnorm_kernel", 8)
    outside("(gradient clipping)", files.CLIP, ("aten::_foreach_mul_",), "multi_tensor_apply<mul>", 9)
    tape.mark(files.PRE_OPTIMIZER)
    with tape.range(files.ANNOTATION, "Optimizer.step#AdamW.step"):
        outside("(optimizer)", files.OPTIMIZER_STEP, ("aten::_fused_adamw_",), "multi_tensor_apply<adam>", 40)
    tape.mark(files.OPTIMIZER)
    outside("(after the optimizer)", files.REST, ("aten::add",), "lr_kernel", 16)
    with tape.range(files.ANNOTATION, "Optimizer.zero_grad#AdamW.zero_grad"):
        outside("(zero_grad)", files.REST, ("aten::zero_",), "Memset (Device)", 18)
    if factor == 1:
        unknown = Place(-1, "unattributed", "unattributed")
        tape.work(unknown, (), "a kernel from nowhere", UNKNOWN_US * US, is_known=False)


def _layer(tape: Tape, layer: int, phase: str, factor: int, moe_factor: int) -> dict[str, int]:
    """A layer's forward, again or not. Returns the number of the node that each module made."""
    again = phase == files.RECOMPUTE
    thread = ENGINE if again else MAIN
    made: dict[str, int] = {}

    def call(below: str) -> contextlib.AbstractContextManager[int]:
        return tape.call(f"{LAYERS}.{layer}{below}", thread=thread, again=again)

    def work(part: str, ops: Sequence[str], kernel: str, us: int, label: str = "", **more: Any) -> None:
        kind, place = _kind(kernel), Place(layer, part, phase, label)
        tape.work(place, ops, kernel, us * US * factor, thread=thread, kind=kind, **more)

    with call(""):
        with call(".input_layernorm"):
            work("input_norm", ("aten::mul",), "norm_kernel", 20)
        with call(".self_attn"):
            with call(".self_attn.q_proj"):
                work("attention", ("aten::linear", "aten::mm"), _GEMM, 300)
            work("attention", ("aten::scaled_dot_product_attention",), "flash_fwd_kernel", ATTENTION_US)
            work("attention", ("aten::copy_",), _DTOD, COPY_BESIDE_US, beside=True)
        work("layer itself", ("aten::add",), _ADD, 33)
        with call(".post_attention_layernorm"):
            work("post_attention_norm", ("aten::mul",), "norm_kernel", 21)
        with call(".block_sparse_moe") as made[".block_sparse_moe"]:
            for below, ops, kernel, us, label in MOE_FORWARD:
                with contextlib.ExitStack() as stack:
                    if below != ".block_sparse_moe":
                        made[below] = stack.enter_context(call(below))
                    work("moe", ops, kernel, us * moe_factor, label)
    return made


def _layer_backward(tape: Tape, layer: int, made: Mapping[str, int], factor: int, moe_factor: int) -> None:
    for below, node, ops, kernel, us, label in MOE_BACKWARD:
        place = Place(layer, "moe", files.BACKWARD, label)
        with tape.node(node, made[below], ENGINE):
            tape.work(place, ops, kernel, us * US * factor * moe_factor, thread=ENGINE)
    module = tape.numbers[f"{LAYERS}.{layer}{_EXPERT}.w1.lora_B.default"]
    place = Place(layer, "moe", files.BACKWARD, "gradient accumulation")
    accumulate = "torch::autograd::AccumulateGrad"
    with tape.range(files.NODE, files.NODE_PREFIX + accumulate, thread=ENGINE):
        tape.work(place, (accumulate, "aten::add_"), _ADD, ACCUMULATE_US * US * factor * moe_factor, thread=ENGINE)
        tape.event(files.PARAMETER, f"{files.PARAMETER_PREFIX}x", tape.tick(), 1, thread=ENGINE, ref=module)


EVERYTHING_BYTES = 5_000  # of torch's allocator as the recorded step is about to optimize


def memory_tape() -> Tape:
    """One step of which every change of memory is known; less than it begins with is freed."""
    tape = Tape(MODULES)
    tape.mark(files.RESUME)
    tape.mark(files.STEP_BEGIN)
    tape.memory(40)
    tape.memory(10**9, device=-1)  # the CPU's, of no interest
    with tape.call(""), tape.call("base_model.model"):
        for layer, num_bytes in enumerate((1_000, 500)):
            with tape.call(f"{LAYERS}.{layer}"), tape.call(f"{LAYERS}.{layer}.block_sparse_moe"):
                tape.memory(num_bytes)
                tape.memory(-200)
        with tape.call("base_model.model.lm_head") as head:
            tape.memory(2_000)
            tape.memory(-900)
    with tape.node("MmBackward0", head, MAIN):
        tape.memory(150, thread=ENGINE)
        tape.memory(-1_100, thread=ENGINE)
    with (
        tape.node("CheckpointFunctionBackward", -1, MAIN),
        tape.call(f"{LAYERS}.1", thread=ENGINE, again=True),
        tape.call(f"{LAYERS}.1.self_attn", thread=ENGINE, again=True),
    ):
        tape.memory(3_000, thread=ENGINE)
        tape.memory(-2_500, thread=ENGINE)
    tape.mark(files.PRE_OPTIMIZER)
    with tape.range(files.ANNOTATION, "Optimizer.step#AdamW.step"):
        tape.memory(25)
        tape.memory(-25)
    tape.mark(files.OPTIMIZER)
    tape.memory(-1_990)
    tape.mark(files.STEP_END)
    return tape


# --- a whole point ---------------------------------------------------------------------------------------------------

TIMED_STEPS_NS = (40 * MS, 50 * MS, 60 * MS)
PHASE_FRACS = {files.FORWARD: 0.3, files.RECOMPUTE: 0.2, files.BACKWARD: 0.5, files.CLIP: 0.05, files.REST: 0.05}


def random_point(top_k: int = 2, batch: int = 1, *, preset: str = "full", **more: Any) -> Point:
    layers = 32 if preset == "full" else 2
    settings = {"dataset": "random", "seq_len_tokens": 128, "num_layers": layers, "total_layers": layers}
    return Point(model="mixtral", top_k=top_k, per_device_batch_size=batch, preset=preset, **settings | more)


def write_breakdown(
    folder: Path,
    point: Point,
    *,
    tape: Tape | None = None,
    optimizer_frac: float = 0.1,
    spans: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, Any] | None = None,
    point_changes: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """One whole breakdown by hand, by default on an H200: three warm-up steps and TIMED_STEPS_NS.

    optimizer_frac: the optimizer's part of each timed step; what is left of the step is added to the rest.
    """
    tape = tape or mixtral_tape()
    rows = step_rows([90 * MS] * 3 + list(TIMED_STEPS_NS), num_queries=point.per_device_batch_size)
    changes = {"kind": "latency", "probes": {}, **(point_changes or {})}
    environment = environment or gpu_environment("NVIDIA H200", 139.8)
    write_point(folder, point, rows=rows, environment=environment, point_changes=changes, **more)
    fracs = PHASE_FRACS | {files.OPTIMIZER_STEP: optimizer_frac, files.REST: 0.15 - optimizer_frac}
    phases = [
        {"step": 3 + number, "phase": phase, "duration_ns": round(frac * ns), "host_duration_ns": round(frac * ns / 2)}
        for number, ns in enumerate(TIMED_STEPS_NS)
        for phase, frac in fracs.items()
    ]
    held = {"frozen_weights": 1_500, "trained_weights": 300, "gradients": 200, "buffers": 100, "optimizer": 600}
    held["everything"] = EVERYTHING_BYTES
    parts = [{"moment": "before the optimizer", "part": name, "allocated_bytes": size} for name, size in held.items()]
    recorded = tape.files()
    memory = memory_tape()
    offset = len(tape.calls)  # one file has the calls of both recordings
    memory_events = memory.files()[files.EVENTS_FILE]
    memory_events.loc[memory_events["kind"] == files.CALL, "ref"] += offset
    more_calls = memory.files()[files.CALLS_FILE].assign(call=lambda frame: frame["call"] + offset)
    recorded[files.CALLS_FILE] = pd.concat([recorded[files.CALLS_FILE], more_calls])
    frames = recorded | {
        files.MEMORY_EVENTS_FILE: memory_events,
        files.PHASES_FILE: pd.DataFrame(phases),
        files.SPANS_FILE: pd.DataFrame(list(spans), columns=files.SPANS_SCHEMA.names),
        files.MEMORY_PARTS_FILE: pd.DataFrame(parts),
        expert_tokens.EXPERT_TOKENS_FILE: pd.DataFrame(columns=expert_tokens.EXPERT_TOKENS_SCHEMA.names),
    }
    for name, frame in frames.items():
        put(folder, name, frame)
    return folder
