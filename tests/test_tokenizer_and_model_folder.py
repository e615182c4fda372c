"""The generated tokenizer, and the folder through which a point's depth and sparsity reach the engine."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tunescope import checkpoints
from tunescope.families.mixtral import MIXTRAL, MIXTRAL_8X7B, MIXTRAL_TINY
from tunescope.models import mixtral, tokenizer
from tunescope.models.folder import build_model_folder
from tunescope.models.tokenizer import num_words, word

VOCAB_SIZE = MIXTRAL_TINY["vocab_size"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(folder, VOCAB_SIZE, 1024)
    return AutoTokenizer.from_pretrained(folder)


# --- tokenizer ---


def test_vocabulary_fills_the_model_exactly(loaded) -> None:
    assert len(loaded) == VOCAB_SIZE
    assert sorted(loaded.get_vocab().values()) == list(range(VOCAB_SIZE))
    assert loaded.get_vocab()[word(num_words(VOCAB_SIZE) - 1)] == VOCAB_SIZE - 1


def test_special_ids_are_those_of_the_config(loaded) -> None:
    assert loaded.bos_token_id == MIXTRAL_8X7B["bos_token_id"]
    assert loaded.eos_token_id == MIXTRAL_8X7B["eos_token_id"]
    assert loaded.unk_token_id == 0
    assert loaded.pad_token_id == loaded.eos_token_id
    assert loaded.model_max_length == 1024


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.lists(st.integers(0, num_words(VOCAB_SIZE) - 1), max_size=60))
def test_one_token_a_word(numbers: list[int], loaded) -> None:
    text = " ".join(word(number) for number in numbers)
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(numbers)
    assert loaded.unk_token_id not in ids
    assert loaded.decode(ids) == text


@pytest.mark.parametrize("text", ["[INST] w1 [/INST]", "[INST]w1[/INST]", " [INST]  w1  [/INST] "])
def test_markers_are_one_token_each_however_the_template_spaces_them(text: str, loaded) -> None:
    assert loaded(text, add_special_tokens=False)["input_ids"] == [3, loaded.get_vocab()["w1"], 4]


def test_a_foreign_word_is_unknown_and_nothing_worse(loaded) -> None:
    assert loaded("hello w1", add_special_tokens=False)["input_ids"] == [0, loaded.get_vocab()["w1"]]


def test_a_full_vocabulary_fits_too(tmp_path: Path) -> None:
    tokenizer.write_tokenizer(tmp_path, 32000, 1024)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 32000


# --- model folder ---


def test_without_a_source_it_holds_a_config_and_a_tokenizer(tmp_path: Path) -> None:
    config = MIXTRAL.config_at(MIXTRAL_TINY, 2, 8)
    assert build_model_folder(tmp_path / "model", config, None, 1024) == tokenizer.KIND
    read = AutoConfig.from_pretrained(tmp_path / "model")
    assert (read.num_experts_per_tok, read.num_hidden_layers, read.hidden_size) == (8, 2, 64)
    assert not checkpoints.holds_weights(tmp_path / "model")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == VOCAB_SIZE


def test_a_source_is_linked_and_never_changed(tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    source.mkdir()
    tokenizer.write_tokenizer(source, VOCAB_SIZE, 1024)
    (source / "config.json").write_text(json.dumps(MIXTRAL_TINY))
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "original").mkdir()
    before = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    config = MIXTRAL.config_at(MIXTRAL_TINY, 1, 8)
    assert build_model_folder(tmp_path / "model", config, source, 1024) == "checkpoint"
    assert {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()} == before
    assert (tmp_path / "model" / "model.safetensors").resolve() == source / "model.safetensors"
    assert not (tmp_path / "model" / "config.json").is_symlink()
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == config
    assert checkpoints.holds_weights(tmp_path / "model")


def test_a_source_without_a_tokenizer_gets_one(tmp_path: Path) -> None:
    source = tmp_path / "only-config"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(MIXTRAL_TINY))
    assert build_model_folder(tmp_path / "model", MIXTRAL_TINY, source, 1024) == tokenizer.KIND
    assert [path.name for path in source.iterdir()] == ["config.json"]


def test_links_of_a_hub_snapshot_lead_to_its_files(tmp_path: Path) -> None:
    """A snapshot is links into blobs; ours must not be relative to it."""
    blob, snapshot = tmp_path / "blobs" / "abc", tmp_path / "snapshots" / "rev"
    blob.parent.mkdir()
    snapshot.mkdir(parents=True)
    blob.write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    build_model_folder(tmp_path / "model", MIXTRAL_TINY, snapshot, 1024)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"weights"


# --- random weights ---


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory):
    mixtral.register()
    folder = tmp_path_factory.mktemp("random") / "model"
    build_model_folder(folder, MIXTRAL.config_at(MIXTRAL_TINY, 2, 8), None, 1024)
    return folder, AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)


def test_random_weights_are_of_the_config_and_on_no_meta_device(random_model) -> None:
    _, model = random_model
    assert type(model).__name__ == "MixtralForCausalLM"  # the Trainer looks this name up to shift the labels
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert model.config.num_experts_per_tok == 8
    embedding = model.model.embed_tokens.weight.float()
    assert embedding.std().item() == pytest.approx(MIXTRAL_TINY["initializer_range"], rel=0.05)
    assert (model.model.norm.weight == 1).all()


def test_random_weights_are_the_same_each_time(random_model) -> None:
    folder, model = random_model
    again = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_experts_differ_so_that_routing_has_a_choice(random_model) -> None:
    _, model = random_model
    experts = model.model.layers[0].block_sparse_moe.experts
    assert len(experts) == 8
    assert not torch.equal(experts[0].w1.weight, experts[1].w1.weight)


def test_random_weights_behave_like_a_fresh_model(random_model) -> None:
    """The loss of a model that knows nothing is ln(vocabulary); the rotary embedding is real, not empty memory."""
    _, model = random_model
    ids = torch.randint(5, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(torch.log(torch.tensor(float(VOCAB_SIZE))).item(), rel=0.02)
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies[0].item() == 1.0
    assert frequencies[-1].item() == pytest.approx(1e6 ** (-14 / 16), rel=1e-4)


def test_a_folder_with_weights_is_loaded_and_not_made_up(random_model, tmp_path: Path) -> None:
    _, model = random_model
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", torch_dtype=model.dtype)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.weight[0, 0] -= 1


def test_a_generated_tokenizer_is_never_written_through_a_link(tmp_path: Path) -> None:
    """Some tokenizer files but no tokenizer: ours of the same names must not land in the user's folder."""
    source = tmp_path / "half"
    source.mkdir()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (source / name).write_text('{"mine": 1}')
    (source / "config.json").write_text(json.dumps(MIXTRAL_TINY))
    (source / "model-00001-of-00001.safetensors").write_bytes(b"weights")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert build_model_folder(tmp_path / "model", MIXTRAL_TINY, source, 1024) == tokenizer.KIND
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    linked = {path.name for path in (tmp_path / "model").iterdir() if path.is_symlink()}
    assert linked == {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
