"""Tokens per expert: counted as the model routes, once each, and as if nobody had counted."""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import helpers_points as points
import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from tunescope import results
from tunescope.analyze import experts as analyze
from tunescope.config import Point, Protocol
from tunescope.expert_tokens import AFTER, BEFORE, EXPERT_TOKENS_FILE, EXPERT_TOKENS_SCHEMA
from tunescope.families.mixtral import MIXTRAL, MIXTRAL_TINY
from tunescope.measure import experts
from tunescope.measure.energy import EnergyMeter
from tunescope.measure.experts import ExpertProbe, RouterCounter
from tunescope.measure.steps import StepRecorder
from tunescope.train.engine import run_workload
from tunescope.train.probe import probe_queries

NUM_EXPERTS, NUM_LAYERS = 8, 2
POINT = Point(
    model="mixtral", dataset="cs", top_k=2, per_device_batch_size=2, preset="tiny", num_layers=2, total_layers=2
)
QUERIES = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [17, 18, 19, 20], [21] * 20, [22, 23]]


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_model(top_k: int = 2, *, wrapped: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = MIXTRAL.config_at(MIXTRAL_TINY, NUM_LAYERS, top_k)
    model = MixtralForCausalLM(MixtralConfig(**config)).to(dtype)
    if not wrapped:
        return model
    adapters = peft.LoraConfig(r=4, target_modules=["gate", "w1"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapters)


def probe(queries: dict[str, list[list[int]]], **settings: Any) -> ExpertProbe:
    return ExpertProbe(lambda: queries, **settings)


def run_probe(model: Any, queries: list[list[int]], **settings: Any) -> list[dict[str, Any]]:
    made = probe({"cs": queries}, **settings)
    made.on_train_begin(SimpleNamespace(device=torch.device("cpu")), None, None, model=model)
    assert made.why_not is None
    return made.rows()


def counts(rows: Sequence[dict[str, Any]]) -> dict[int, list[int]]:
    """Layer -> tokens of each expert."""
    found: dict[int, list[int]] = {}
    for row in rows:
        found.setdefault(row["layer"], []).append(row["tokens"])
    return found


# --- counting --------------------------------------------------------------------------------------------------------


def counted_by_hand(logits: list[list[float]], top_k: int) -> list[int]:
    tokens = [0] * NUM_EXPERTS
    for scores in logits:
        left = list(range(NUM_EXPERTS))
        for _ in range(top_k):
            best = left[0]
            for expert in left:
                if scores[expert] > scores[best]:
                    best = expert
            left.remove(best)
            tokens[best] += 1
    return tokens


def entropy_by_hand(logits: list[list[float]]) -> float:
    total = 0.0
    for scores in logits:
        shares = [math.exp(score) for score in scores]
        total -= sum(share / sum(shares) * math.log2(share / sum(shares)) for share in shares)
    return total / len(logits)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("top_k", [1, 2, NUM_EXPERTS])
def test_counts_are_those_of_plain_python_on_the_routers_logits(top_k: int, wrapped: bool) -> None:
    model = tiny_model(top_k, wrapped=wrapped).eval()
    logits: dict[int, list[list[float]]] = {}

    def keep(layer: int, module: Any, args: Any, output: torch.Tensor) -> None:
        logits.setdefault(layer, []).extend(output.tolist())

    for layer, decoder in enumerate(model.get_base_model().model.layers if wrapped else model.model.layers):
        decoder.block_sparse_moe.gate.register_forward_hook(partial(keep, layer))
    rows = run_probe(model, QUERIES, micro_batch_size=len(QUERIES))
    longest = 24  # the longest query, padded to a multiple of 8
    real = [slot < len(query) for query in QUERIES for slot in range(longest)]
    for layer in range(NUM_LAYERS):
        of_tokens = [scores for scores, is_real in zip(logits[layer], real, strict=True) if is_real]
        assert counts(rows)[layer] == counted_by_hand(of_tokens, top_k)
        entropies = [row["router_entropy_bits"] for row in rows if row["layer"] == layer]
        assert entropies == pytest.approx([entropy_by_hand(of_tokens)] * NUM_EXPERTS, abs=1e-6)
    num_tokens = sum(map(len, QUERIES))
    facts = {
        (row["num_queries"], row["num_tokens"], row["padding_tokens"], row["top_k"], row["num_experts"]) for row in rows
    }
    assert facts == {(len(QUERIES), num_tokens, len(QUERIES) * longest - num_tokens, top_k, NUM_EXPERTS)}


@pytest.mark.parametrize("all_tie", [False, True])
def test_ties_are_broken_as_the_model_breaks_them(all_tie: bool) -> None:
    """In bf16 scores of different experts are often equal; what counts is what the experts were really given."""
    model = tiny_model(dtype=torch.bfloat16).eval()
    given_tokens: Counter[tuple[int, int]] = Counter()
    for layer, decoder in enumerate(model.model.layers):
        if all_tie:
            decoder.block_sparse_moe.gate.weight.data.zero_()
        for number, expert in enumerate(decoder.block_sparse_moe.experts):

            def see(module: Any, args: Any, key: tuple[int, int] = (layer, number)) -> None:
                given_tokens[key] += args[0].shape[0]

            expert.register_forward_pre_hook(see)
    with RouterCounter(model) as counter, torch.no_grad():
        model(input_ids=torch.randint(5, 1000, (4, 64), generator=torch.Generator().manual_seed(0)))
    for layer, tokens in counts(counter.rows()).items():
        assert tokens == [given_tokens[layer, number] for number in range(NUM_EXPERTS)]
        assert sum(tokens) == 4 * 64 * 2


def test_how_queries_are_batched_changes_only_padding() -> None:
    model = tiny_model(wrapped=True)
    one, three = (run_probe(model, QUERIES, micro_batch_size=size) for size in (1, 3))
    assert counts(one) == counts(three)
    assert one[0]["num_tokens"] == three[0]["num_tokens"]
    assert one[0]["padding_tokens"] < three[0]["padding_tokens"]


def test_a_counter_leaves_no_hook_and_counts_only_inside() -> None:
    model = tiny_model()
    ids = torch.tensor(QUERIES[:1])
    with RouterCounter(model) as counter:
        model(input_ids=ids)
    before = counter.rows()
    model(input_ids=ids)
    assert counter.rows() == before
    assert before[0]["num_queries"] == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_router_that_is_not_called_is_no_router_without_tokens() -> None:
    model = tiny_model()
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with RouterCounter(model) as counter:
        assert counter.rows() == []
        model(input_ids=torch.tensor(QUERIES[:1]))
    with pytest.raises(RuntimeError, match=r"layers \[1\] were not called"):
        counter.rows()


def test_a_mask_that_does_not_name_padding_is_refused() -> None:
    model = tiny_model()
    with RouterCounter(model), pytest.raises(ValueError, match="which slots are padding"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.zeros(1, 1, 4, 4))


def test_only_the_last_tokens_logits_are_made() -> None:
    model = tiny_model(wrapped=True)
    shapes = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    run_probe(model, QUERIES)
    assert set(shapes) == {1}


def test_a_model_without_known_routers_is_left_out_with_a_reason() -> None:
    dense = torch.nn.Linear(2, 2)
    with pytest.raises(LookupError, match="type None"):
        RouterCounter(dense)
    dense.config = SimpleNamespace(model_type="mixtral")
    with pytest.raises(LookupError, match="no module named like"):
        RouterCounter(dense)
    left_out = probe({"cs": QUERIES})
    arguments = SimpleNamespace(device=torch.device("cpu"))
    left_out.on_train_begin(arguments, None, None, model=dense)
    left_out.on_train_end(arguments, None, None, model=dense)
    assert left_out.rows() == []
    assert left_out.why_not is not None
    assert left_out.why_not.startswith("before training: LookupError")


@given(st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=1, max_size=5))
def test_entropy_lies_between_certain_and_even(logits: list[list[float]]) -> None:
    scores = torch.softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
    bits = experts.entropy_bits(scores)
    assert ((bits >= 0) & (bits <= 2 + 1e-9)).all()
    # Sigmoid scores do not sum to 1: their shares count.
    assert torch.allclose(experts.entropy_bits(scores * 3), bits)
    assert experts.entropy_bits(torch.full((1, 4), 0.3)).item() == pytest.approx(2)


# --- in training -----------------------------------------------------------------------------------------------------


class Trained(TrainerCallback):
    """What a run has learned: losses and gradient norms of each step, and the trained weights in the end."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.model = model
        self.steps = [(entry["loss"], entry["grad_norm"]) for entry in state.log_history if "loss" in entry]
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}


class CountSteps(TrainerCallback):
    """A RouterCounter over all of training, and how often routers ran in all, recompute included."""

    def __init__(self) -> None:
        self.router_rows = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.counter = RouterCounter(model)
        for _, module in self.counter._routers.values():
            module.register_forward_hook(self.see)
        self.counter.__enter__()

    def see(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.router_rows += output.shape[0]

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.counter.__exit__()


def recipe_of(**changes: Any) -> dict[str, Any]:
    return points.recipe() | {"logging_steps": 1} | changes


@pytest.fixture(scope="module", params=[False, True], ids=["non-reentrant", "reentrant"])
def counted_steps(request: Any, tmp_path_factory: Any) -> tuple[CountSteps, StepRecorder, Trained]:
    workload = points.tiny_workload(POINT, num_samples=8, max_steps=3, recipe=recipe_of(use_reentrant_gc=request.param))
    counting, trained = CountSteps(), Trained()
    recorder = StepRecorder(Protocol(num_queries=6), lambda done, expected: None, EnergyMeter(use_gpu=False))
    run_workload(workload, tmp_path_factory.mktemp("counted"), [recorder, counting, trained])
    return counting, recorder, trained


def test_a_training_steps_recompute_is_not_counted(counted_steps: tuple[CountSteps, StepRecorder, Trained]) -> None:
    counting, recorder, _ = counted_steps
    rows, steps = counting.counter.rows(), recorder.rows()
    slots = sum(step["padded_tokens"] for step in steps)
    assert counting.router_rows == 2 * NUM_LAYERS * slots  # they did run twice
    tokens = sum(step["tokens"] for step in steps)
    assert {row["num_tokens"] for row in rows} == {tokens}
    assert {row["padding_tokens"] for row in rows} == {slots - tokens}
    assert {row["num_queries"] for row in rows} == {6}
    assert {sum(of_layer) for of_layer in counts(rows).values()} == {tokens * POINT.top_k}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: Any) -> tuple[ExpertProbe, Trained, StepRecorder]:
    """The same training as `counted_steps` without reentrance, with the probe and without the counter."""
    folder = tmp_path_factory.mktemp("probed")
    workload = points.tiny_workload(POINT, num_samples=8, max_steps=3, recipe=recipe_of(use_reentrant_gc=False))
    probed, trained = ExpertProbe(partial(probe_queries, workload, folder / "model")), Trained()
    recorder = StepRecorder(Protocol(num_queries=6), lambda done, expected: None, EnergyMeter(use_gpu=False))
    run_workload(workload, folder, probed.around([recorder, trained]))
    return probed, trained, recorder


def test_training_with_the_probe_is_bit_equal(
    probed: tuple[ExpertProbe, Trained, StepRecorder], tmp_path: Path
) -> None:
    bare = Trained()
    workload = points.tiny_workload(POINT, num_samples=8, max_steps=3, recipe=recipe_of(use_reentrant_gc=False))
    run_workload(workload, tmp_path, [bare])
    probe, with_probe, _ = probed
    assert probe.why_not is None
    assert len(bare.steps) == 3
    assert with_probe.steps == bare.steps
    for kept in ("weights", "buffers"):
        ours, theirs = getattr(with_probe, kept), getattr(bare, kept)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for module in with_probe.model.modules():  # what evaluation on some CPUs would have changed for good
        if type(module).__name__ == "Linear4bit" and hasattr(module, "quant_state"):
            assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)


def test_the_probe_lies_outside_what_is_measured(probed: tuple[ExpertProbe, Trained, StepRecorder]) -> None:
    _, _, recorder = probed
    assert [(row["num_queries"], row["micro_steps"]) for row in recorder.rows()] == [(2, 1)] * 3


def test_both_moments_of_both_probes_are_written_and_read(
    probed: tuple[ExpertProbe, Trained, StepRecorder], tmp_path: Path
) -> None:
    rows = probed[0].rows()
    assert len(rows) == 2 * 2 * NUM_LAYERS * NUM_EXPERTS
    assert {(row["probe"], row["when"]) for row in rows} == {(p, w) for p in ("cs", "math") for w in (BEFORE, AFTER)}
    results.write_arrow(tmp_path / EXPERT_TOKENS_FILE, rows, EXPERT_TOKENS_SCHEMA)
    loads = analyze.expert_tokens(results.read_arrow(tmp_path / EXPERT_TOKENS_FILE, EXPERT_TOKENS_SCHEMA))
    layers = loads.groupby(["probe", "when", "layer"]).agg({"tokens_per_query": "sum", "num_tokens": "first"})
    assert len(layers) == 2 * 2 * (NUM_LAYERS + 1)
    assert np.allclose(layers["tokens_per_query"], layers["num_tokens"] / 8 * POINT.top_k)
    before, after = (loads.loc[loads["when"] == when, "tokens"].tolist() for when in (BEFORE, AFTER))
    assert before != after  # a router that is trained routes otherwise


def test_modes_and_random_numbers_are_as_before() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    # A forward that draws random numbers, as this one does not by itself.
    model.model.layers[1].register_forward_pre_hook(lambda module, args: torch.rand(1) and None)
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    random.seed(7)
    run_probe(model, QUERIES)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.rand(3), wanted)
    assert random.random() == random.Random(7).random()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_modules_that_evaluation_would_change_for_good_stay_in_training() -> None:
    """On this CPU or another: see measure.experts._is_repacked_by_evaluation."""

    class Linear4bit(torch.nn.Linear):
        support_avx512bf16_for_cpu = False

    model = torch.nn.Sequential(Linear4bit(1, 1), torch.nn.Dropout())
    with experts.undisturbed(model, torch.device("cpu")):
        assert [module.training for module in model] == [True, False]
        assert not torch.is_grad_enabled()
    assert bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu in (True, False)  # it is still known by this


def test_a_probe_that_fails_leaves_the_modes_as_they_were() -> None:
    model = tiny_model().train()
    failed = probe({"cs": [[10**6]]})  # beyond the vocabulary
    failed.on_train_begin(SimpleNamespace(device=torch.device("cpu")), None, None, model=model)
    assert failed.rows() == []
    assert failed.why_not is not None
    assert "IndexError" in failed.why_not
    assert all(module.training for module in model.modules())


# --- probe queries ---------------------------------------------------------------------------------------------------


def test_probe_queries_are_read_templated_and_cut_as_training_does(tmp_path: Path) -> None:
    data = tmp_path / "math_14k.json"
    rows = [{"instruction": f"w{i} w1 w2", "input": f"w{i}", "output": "w3 " * (i + 1)} for i in range(4)]
    del rows[2]["input"]
    data.write_text(json.dumps(rows))
    recipe = recipe_of(cutoff_len=100)
    of_math = replace(POINT, dataset="math")
    synthetic = points.tiny_workload(POINT, num_samples=8, recipe=recipe)
    entry = {"file_name": str(data), "columns": {"prompt": "instruction", "response": "output", "query": "input"}}
    from_file = points.tiny_workload(of_math, num_samples=3, recipe=recipe, data_entry=entry)
    for workload in (synthetic, from_file):
        wanted = points.engine_queries(workload, tmp_path / workload.point.dataset)
        found = probe_queries(
            synthetic, tmp_path / workload.point.dataset / "model", {"math": data}, num_queries=workload.num_samples
        )
        assert found[workload.point.dataset][: len(wanted)] == wanted
        assert max(map(len, wanted)) <= 100


def test_probe_queries_are_the_same_at_every_point(tmp_path: Path) -> None:
    workload = points.tiny_workload(POINT)
    other_point = replace(POINT, dataset="math", top_k=8, per_device_batch_size=1, seq_len_tokens=64)
    folder = tmp_path / "one"
    points.engine_queries(replace(workload, num_samples=2), folder)
    one = probe_queries(workload, folder / "model")
    assert probe_queries(replace(workload, point=other_point, num_samples=99), folder / "model") == one
    assert {name: len(queries) for name, queries in one.items()} == {"cs": 8, "math": 8}
    full = probe_queries(replace(workload, point=replace(POINT, preset="slice")), folder / "model")
    assert {len(queries) for queries in full.values()} == {32}
