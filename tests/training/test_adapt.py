"""Adaptation on every shape of decoder, with and without LoRA, and what it refuses."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from llara.config import ModelConfig
from llara.errors import ConfigError, DataError, ModelError, StorageError
from llara.hardware import WORKS, probe_torch
from llara.loading import load_model
from llara.model import EmbeddingModel
from llara.parity import Parity
from llara.training import adapt as adapt_module
from llara.training.adapt import adapt
from llara.training.lora import add_lora, merge_lora
from llara.training.prepare import prepare_chunks
from tests import tiny
from tests.training.helpers import adapt_config, log_lines, weights, write_lines, write_text

TEXTS = ["the sky is blue", "read a file line by line and close it"]
RELEASE_TOKENS = [f"<s{i}>" for i in range(1, 17)]


def load(folder: Path, **changes: Any) -> EmbeddingModel:
    return load_model(ModelConfig(model=str(folder), device="cpu", **changes))


def vectors(folder: Path, **changes: Any) -> torch.Tensor:
    model = load(folder, **changes)
    return torch.cat([model.encode(TEXTS, "query"), model.encode(TEXTS, "passage")])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_shape_of_decoder_is_adapted(
    family: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_base(tmp_path / "base", family)
    result = adapt(adapt_config(base, corpus, tmp_path / "out", steps=3, log_every=1, chunk_length=24))
    assert (result.steps, result.reused) == (3, False)
    assert {"loss", "loss_ebae", "learning_rate"} <= result.log.keys()
    assert any("loss_ebar" in line for line in log_lines(result.output))
    assert [line["step"] for line in log_lines(result.output)] == [1, 2, 3]
    made, before = vectors(result.output, verify=True), vectors(base)
    assert torch.isfinite(made).all()
    assert float((made - before).abs().max()) > 1e-3
    torch.testing.assert_close(made.norm(dim=1), torch.ones(4))
    # Also mistral's, whose window the chunks here are longer than.
    assert "in a pass of its own" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["text.jsonl.gz", "text.parquet", "texts"])
def test_every_format_trains_the_same_model(name: str, base: Path, corpus: Path, tmp_path: Path) -> None:
    rows, other = [json.loads(line) for line in corpus.read_text().splitlines()], tmp_path / name
    if name == "text.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), other)
    elif name == "texts":
        other.mkdir()
        for number, row in enumerate(rows):
            (other / f"{number:02d}.txt").write_text(row["text"], encoding="utf-8")
    else:
        other.write_bytes(gzip.compress(corpus.read_bytes()))
    plain, found = (adapt(adapt_config(base, path, tmp_path / f"of {path.name}")).output for path in (corpus, other))
    assert all(torch.equal(weight, weights(found)[key]) for key, weight in weights(plain).items())


def test_a_run_in_bfloat16_learns(base: Path, corpus: Path, tmp_path: Path) -> None:
    if probe_torch()[2] != WORKS:
        pytest.skip("this CPU multiplies no bfloat16")
    config = adapt_config(base, corpus, tmp_path / "out", steps=30, log_every=10, batch_size=8, dtype="bfloat16")
    losses = [line["loss"] for line in log_lines(adapt(config).output)]
    assert losses[-1] < 0.95 * losses[0]
    assert {weight.dtype for weight in weights(config.output).values()} == {torch.bfloat16}
    assert torch.isfinite(vectors(config.output, verify=True)).all()


def test_the_loss_falls(base: Path, corpus: Path, tmp_path: Path) -> None:
    config = adapt_config(base, corpus, tmp_path / "out", steps=24, log_every=4, batch_size=8)
    adapt(config)
    losses = [(line["loss_ebae"], line["loss_ebar"]) for line in log_lines(config.output)]
    assert losses[-1][0] < 0.9 * losses[0][0]
    assert losses[-1][1] < 0.9 * losses[0][1]


@pytest.mark.parametrize(
    ("changes", "logged"),
    [
        ({"objective": "ebae"}, {"loss_ebae"}),
        ({"objective": "ebar"}, {"loss_ebar"}),
        ({"objective": "lm"}, {"loss_lm"}),
        ({"lm_weight": 0.5, "targets": "all", "schedule": "constant"}, {"loss_ebae", "loss_ebar", "loss_lm"}),
    ],
)
def test_the_log_shows_what_is_trained(
    base: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any], logged: set[str]
) -> None:
    result = adapt(adapt_config(base, corpus, tmp_path / "out", steps=2, **changes))
    assert {key for key in result.log if key.startswith("loss_")} == logged


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_the_release_template_adds_tokens_and_trains_them(corpus: Path, tmp_path: Path, rank: int, tied: bool) -> None:
    base = tiny.save_base(tmp_path / "base", tie_word_embeddings=tied)
    old = load(base)
    rows = len(old.tokenizer)
    config = adapt_config(base, corpus, tmp_path / "out", template="release", steps=3, lora_rank=rank)
    torch.manual_seed(config.seed)  # as `adapt` does, so that the new rows start alike
    start = load_model(config, for_training=True, new_template=True)
    assert len(start.new_tokens) == 16
    fresh = start.lm.get_input_embeddings().weight[start.new_tokens].detach().clone()
    frozen = start.lm.get_input_embeddings().weight[:rows].detach().clone()

    made = load(adapt(config).output, verify=True)
    assert made.contract.template.name == "release"
    assert made.tokenizer.convert_tokens_to_ids(RELEASE_TOKENS) == start.new_tokens == list(range(rows, rows + 16))
    table = made.lm.get_input_embeddings().weight.detach()
    assert table.shape[0] == made.lm.get_output_embeddings().weight.shape[0] == rows + 16
    assert made.lm.config.vocab_size == rows + 16
    moved = (table[start.new_tokens] - fresh).abs().amax(dim=1)
    assert (moved > 1e-4).all(), "every new row is trained"
    assert torch.equal(table[:rows], frozen) == (rank > 0), "LoRA leaves the old rows alone"
    assert torch.isfinite(made.encode(TEXTS, "query")).all()


def test_a_template_without_branches_is_refused(base: Path, corpus: Path, tmp_path: Path) -> None:
    config = adapt_config(base, corpus, tmp_path / "out", template="repllama")
    with pytest.raises(ConfigError, match="'repllama' has no two branches over one text, which adaptation needs"):
        adapt(config)
    assert list(tmp_path.iterdir()) == []
    assert adapt(replace(config, objective="lm", steps=1)).output.is_dir()  # needs none


def test_a_model_without_head_is_refused(base: Path, corpus: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    headless.mkdir()
    for path in base.iterdir():
        (headless / path.name).write_bytes(path.read_bytes())
    kept = {name: value for name, value in weights(base).items() if not name.startswith("lm_head")}
    save_file(kept, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="holds no LM head, which adaptation projects through"):
        adapt(adapt_config(headless, corpus, tmp_path / "out"))


# LoRA ---------------------------------------------------------------------------------------------------------------


def trained_lora(family: str = "llama", **changes: Any) -> tuple[EmbeddingModel, Any]:
    """A tiny model whose LoRA update is not zero any more."""
    model = tiny.model(family)
    peft_model = add_lora(model, adapt_config(Path("b"), Path("c"), Path("o"), lora_rank=2, **changes))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_B" in name:
                value.normal_(0.0, 0.05)
    return model, peft_model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_and_unmerged_models_give_the_same_vectors(family: str) -> None:
    plain = tiny.model(family).encode(TEXTS, "passage")
    model, peft_model = trained_lora(family)
    unmerged = model.encode(TEXTS, "passage")
    merge_lora(model, peft_model)
    merged = model.encode(TEXTS, "passage")
    assert float((merged - unmerged).abs().max()) < 1e-5
    assert float((merged - plain).abs().max()) > 1e-3
    assert not any("lora" in name for name, _ in model.lm.named_parameters())


def test_a_zero_update_is_refused_at_merge() -> None:
    model = tiny.model()
    peft_model = add_lora(model, adapt_config(Path("b"), Path("c"), Path("o"), lora_rank=2))
    with pytest.raises(ModelError, match="merging LoRA changes no weight"):
        merge_lora(model, peft_model)


def test_an_update_lost_in_rounding_is_refused_at_merge() -> None:
    model, peft_model = trained_lora()
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_B" in name:
                value.fill_(1e-30)
    with pytest.raises(ModelError, match="merging LoRA changes no weight"):
        merge_lora(model, peft_model)


@pytest.mark.parametrize("skipped", ["all", "one"])
def test_a_merge_that_does_not_happen_is_found(skipped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, peft_model = trained_lora()
    layers = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    for layer in layers if skipped == "all" else layers[3:4]:
        monkeypatch.setattr(layer, "merge", lambda **_: None)
    left = len(layers) if skipped == "all" else 1
    with pytest.raises(ModelError, match=f"left {left} of the {len(layers)} layers that it changes"):
        merge_lora(model, peft_model)


def test_lora_goes_where_it_is_told() -> None:
    model, _ = trained_lora(lora_modules=("q_proj", "v_proj"))
    touched = {name.split(".")[-4] for name, _ in model.lm.named_parameters() if ".lora_A." in name}
    assert touched == {"q_proj", "v_proj"}
    trainable = {name for name, value in model.lm.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in trainable)
    everything, _ = trained_lora()
    touched = {name.split(".")[-4] for name, _ in everything.lm.named_parameters() if ".lora_A." in name}
    assert touched == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_an_unknown_module_is_refused_and_can_be_mended(base: Path, corpus: Path, tmp_path: Path) -> None:
    config = adapt_config(base, corpus, tmp_path / "out", steps=2, lora_rank=2, lora_modules=("q_proy",))
    with pytest.raises(ConfigError, match=r"--lora-modules: .*q_proy"):
        adapt(config)
    made = adapt(replace(config, lora_modules=("q_proj",))).output
    before, after = weights(base), weights(made)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(tiny.LAYERS)}
    assert before.keys() == after.keys()


def test_two_passes_train_like_one_where_both_are_right(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = adapt(adapt_config(base, corpus, tmp_path / "one", steps=2, learning_rate=1e-4))
    monkeypatch.setattr(adapt_module, "check_branches", lambda *_: Parity(False, "asked to"))
    two = adapt(adapt_config(base, corpus, tmp_path / "two", steps=2, learning_rate=1e-4))
    assert two.log["loss"] == pytest.approx(one.log["loss"], rel=1e-5)
    assert two.log["loss_ebar"] == pytest.approx(one.log["loss_ebar"], rel=1e-5)


def test_an_adapted_model_is_adapted_again(base: Path, tmp_path: Path) -> None:
    corpus = write_text(tmp_path / "text.jsonl", documents=4)
    first = adapt(adapt_config(base, corpus, tmp_path / "first", steps=1)).output
    second = adapt(adapt_config(first, corpus, tmp_path / "second", steps=1, template="release")).output
    assert load(second).contract.template.name == "release"
    identity = json.loads((second / "training.json").read_text())["identity"]
    assert identity["base"] == load(first).fingerprint
    assert load_file(second / "model.safetensors").keys() == load_file(first / "model.safetensors").keys()


def test_ebar_without_a_next_text_is_refused(base: Path, tmp_path: Path) -> None:
    short = write_lines(
        tmp_path / "short.jsonl", [{"_id": str(i), "text": "read a file the sky is blue"} for i in range(6)]
    )
    config = adapt_config(base, short, tmp_path / "out", objective="ebar", chunk_length=64)
    with pytest.raises(DataError, match="no text has a next one, so EBAR has no target; lower --chunk-length"):
        adapt(config)


def test_the_number_of_chained_chunks_is_said(
    base: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapt(adapt_config(base, corpus, tmp_path / "out", steps=1))
    store = prepare_chunks(tmp_path / "chunks", adapt_config(base, corpus, tmp_path / "out"), load(base))
    assert 0 < store.chained < len(store)
    assert f"{len(store):,} chunks, {store.chained:,} with a next text" in capsys.readouterr().err


def test_a_long_template_gets_the_room_it_needs(base: Path, corpus: Path, tmp_path: Path) -> None:
    prompt = "the sky is blue " * 40
    template = tmp_path / "long.toml"
    template.write_text(
        f'name = "long"\n[query]\nsuffix = "{prompt}one"\nslots = ["{{eos}}"]\n'
        f'[passage]\nsuffix = "{prompt}two"\nslots = ["{{eos}}"]\n'
    )
    config = adapt_config(base, corpus, tmp_path / "out", steps=1, template=str(template))
    adapt(config)
    model = load(config.output)
    assert model.contract.query_length > model.bind().query.overhead > 64


def test_chunks_beyond_the_positions_are_refused(corpus: Path, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", "gpt2", n_positions=64)
    with pytest.raises(ConfigError, match=r"--chunk-length with the template of .* is more than the 64 positions"):
        adapt(adapt_config(base, corpus, tmp_path / "out", chunk_length=64))


def test_a_model_without_a_head_stays_one(base: Path, corpus: Path, tmp_path: Path) -> None:
    model = load(base)
    model.has_head = False
    model.save(tmp_path / "headless")
    with pytest.raises(ModelError, match="holds no LM head"):
        adapt(adapt_config(tmp_path / "headless", corpus, tmp_path / "out"))


def test_a_full_disk_is_the_users_to_mend(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adapt_config(base, corpus, tmp_path / "out", save_every=2)

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0")

    with monkeypatch.context() as patched:
        patched.setattr("torch.save", full)
        with pytest.raises(StorageError, match=r"cannot be written .* bytes are free"):
            adapt(config)
    assert not config.output.exists()
    assert adapt(config).steps == 4
