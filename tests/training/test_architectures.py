"""Any decoder: every shape of model is adapted in full and with LoRA, saved, and opened with the same vectors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llara.config import ModelConfig
from llara.errors import ConfigError, ModelError
from llara.loading import load_model
from llara.model import EmbeddingModel
from llara.training import adapt as adapt_module
from llara.training import final
from llara.training.adapt import adapt
from llara.training.finetune import finetune
from llara.training.lora import add_lora, merge_lora
from tests import tiny
from tests.training.helpers import adapt_config, finetune_config, write_lines, write_text

TEXTS = ["the sky is blue", "read a file line by line and close it"]
RELEASE_TOKENS = [f"<s{i}>" for i in range(1, 17)]
# Why one pass over both branches would be wrong here; see parity.py, which finds it out.
TWO_PASSES = {"bloom": "ALiBi"}
# PEFT trains a mixture of experts as whole parameters, for which it has no dropout.
NO_DROPOUT = {"mixtral"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("architectures") / "text.jsonl", documents=4)


def load(folder: Path) -> EmbeddingModel:
    return load_model(ModelConfig(model=str(folder), device="cpu", verify=True))


def vectors(model: EmbeddingModel) -> torch.Tensor:
    return torch.cat([model.encode(TEXTS, "query"), model.encode(TEXTS, "passage")])


def settings(base: Path, corpus: Path, output: Path, **changes: Any) -> Any:
    values = {"steps": 2, "batch_size": 2, "chunk_length": 24, "warmup": 0.0, "held_out": 0}
    return adapt_config(base, corpus, output, **(values | changes))


def check_folder(folder: Path) -> EmbeddingModel:
    """Opens a saved folder, and compares it with what the model gave when it was saved."""
    model = load(folder)
    for entry in json.loads((folder / "llara.json").read_text())["probe"]["entries"]:
        found = model.encode([entry["text"]], entry["side"])[0]
        assert float((found - torch.tensor(entry["vector"])).abs().max()) < 1e-5
    return model


# Those of tiny.FAMILIES are in test_adapt.py.
@pytest.mark.parametrize("family", ["opt", "phi", "gemma2", "gemma3_text", "bloom", "falcon", "mixtral"])
def test_any_decoder_is_adapted_saved_and_opened(
    family: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.save_base(tmp_path / "base", family)
    result = adapt(settings(base, corpus, tmp_path / "out"))
    said = capsys.readouterr().err
    assert ("running each branch in a pass of its own" in said) == (family in TWO_PASSES), said
    assert {"loss_ebae", "loss_ebar"} <= result.log.keys()
    made = vectors(check_folder(result.output))
    assert float((made - vectors(load(base))).abs().max()) > 1e-4
    torch.testing.assert_close(made.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_any_decoder_takes_lora_and_new_tokens(
    family: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Merged equals unmerged; the rows of new tokens are trained in both tables and saved; no old row is touched."""
    merged: list[EmbeddingModel] = []

    def compare(model: EmbeddingModel, peft_model: Any) -> None:
        before = vectors(model)
        merge_lora(model, peft_model)
        assert float((vectors(model) - before).abs().max()) < 1e-5
        assert not [name for name, _ in model.lm.named_parameters() if "lora" in name or "table" in name]
        merged.append(model)

    monkeypatch.setattr(final, "merge_lora", compare)
    dropout = 0.0 if family in NO_DROPOUT else 0.1
    base = tiny.save_base(tmp_path / "base", family)
    config = settings(base, corpus, tmp_path / "out", template="release", lora_rank=2, lora_dropout=dropout)
    torch.manual_seed(config.seed)  # as `adapt` does, so that the new rows start alike
    start = load_model(config, for_training=True, new_template=True)
    assert len(start.new_tokens) == 16

    model = check_folder(adapt(config).output)
    said = capsys.readouterr().err
    assert ("running each branch in a pass of its own" in said) == (family in TWO_PASSES), said
    torch.testing.assert_close(vectors(model), vectors(merged[0]), rtol=0, atol=1e-6)
    ids = model.tokenizer.convert_tokens_to_ids(RELEASE_TOKENS)
    for table in ("get_input_embeddings", "get_output_embeddings"):
        fresh, kept, found = (getattr(each.lm, table)().weight.detach() for each in (start, merged[0], model))
        assert ((found[ids] - fresh[ids]).abs().amax(dim=1) > 1e-4).all(), f"every new row is trained, {table}"
        assert torch.equal(found, kept)
        assert torch.equal(found[: ids[0]], fresh[: ids[0]])


def injected(family: str, dtype: torch.dtype = torch.float32, size: float = 0.0, **changes: Any) -> tuple[Any, Any]:
    """A tiny model with LoRA layers whose B has values of one size."""
    model = tiny.model(family)
    model.lm.to(dtype)
    dropout = 0.0 if family in NO_DROPOUT else 0.1
    values: dict[str, Any] = {"lora_rank": 2, "lora_dropout": dropout, **changes}
    peft_model = add_lora(model, adapt_config(Path("b"), Path("c"), Path("o"), **values))
    with torch.no_grad():
        for name, value in peft_model.named_parameters():
            if "lora_B" in name:
                value.fill_(size)
    return model, peft_model


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_a_merge_that_equals_the_base_cannot_be_missed(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = (
        "merging LoRA changes no weight, so that the result would be the base model: its update is zero, no number, or"
    )
    with pytest.raises(ModelError, match=f"{refusal} lost in rounding to float32"):
        merge_lora(*injected(family))
    with pytest.raises(ModelError, match=f"{refusal} lost in rounding to bfloat16"):
        merge_lora(*injected(family, torch.bfloat16, 1e-6))
    with pytest.raises(ModelError, match=refusal):
        merge_lora(*injected(family, torch.float32, float("nan")))
    merge_lora(*injected(family, torch.float32, 1e-5))
    assert capsys.readouterr().err == ""
    merge_lora(*injected(family, torch.bfloat16, 0.1))


def test_an_update_that_is_lost_in_part_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    merge_lora(*injected("llama", torch.bfloat16, 3e-4))
    said = capsys.readouterr().err
    assert "% of the LoRA update is lost in rounding to bfloat16; --dtype float32 keeps it" in said


def test_dropout_on_experts_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"^--lora-dropout: the experts .* use --lora-dropout 0, or name the linear"):
        injected("mixtral", lora_dropout=0.1)
    model, peft_model = injected("mixtral", size=0.1, lora_dropout=0.1, lora_modules=("q_proj", "v_proj"))
    merge_lora(model, peft_model)


def test_a_layer_that_is_not_there_is_found_before_the_corpus_is_read(corpus: Path, tmp_path: Path) -> None:
    config = settings(tiny.save_base(tmp_path / "base"), corpus, tmp_path / "out", lora_rank=2, lora_modules=("nope",))
    with pytest.raises(ConfigError, match=r"--lora-modules: .*nope"):
        adapt(config)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_lora_where_a_job_does_not_look_is_refused(tmp_path: Path) -> None:
    rows = [{"query": "the sky", "pos": ["the sky is blue"], "neg": ["read a file"]}] * 2
    train = write_lines(tmp_path / "train.jsonl", rows)
    base = tiny.save_base(tmp_path / "base")
    with pytest.raises(ConfigError, match="--lora-modules: names no layer that this job reads"):
        finetune(finetune_config(base, train, tmp_path / "out", lora_rank=2, lora_modules=("lm_head",)))


@pytest.mark.parametrize(("family", "name"), [("gpt2", "wte"), ("opt", "lm_head")])
def test_a_tied_table_is_no_place_for_lora(family: str, name: str) -> None:
    with pytest.raises(ConfigError, match="--lora-modules: the LM head and the embeddings of this model share"):
        injected(family, lora_modules=(name,))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_an_untied_table_takes_lora_beside_new_rows(name: str) -> None:
    model = tiny.model("llama")
    model.new_tokens = [5, 9]
    peft_model = add_lora(model, adapt_config(Path("b"), Path("c"), Path("o"), lora_rank=2, lora_modules=(name,)))
    with torch.no_grad():
        for value in (value for value in peft_model.parameters() if value.requires_grad):
            value.normal_(0.0, 0.1)
    ids = torch.tensor([[5, 6, 7, 9, 1]])
    before = model.lm.eval()(input_ids=ids).logits  # LoRA's own layers begin with their dropout on
    merge_lora(model, peft_model)
    torch.testing.assert_close(model.lm(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)


def test_lora_with_new_tokens_is_resumed_bit_for_bit(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_base(tmp_path / "base")
    changes: dict[str, Any] = {"template": "release", "lora_rank": 2, "lora_dropout": 0.3, "steps": 4, "save_every": 2}
    whole = adapt(settings(base, corpus, tmp_path / "whole", **changes))
    done = []
    step = adapt_module.JobTrainer.training_step

    def stop(self: Any, *arguments: Any, **named: Any) -> Any:
        done.append(self.state.global_step)
        if len(done) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    config = settings(base, corpus, tmp_path / "parts", **changes)
    with monkeypatch.context() as patched:
        patched.setattr(adapt_module.JobTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            adapt(config)
    resumed = adapt(config)
    assert done == [0, 1, 2, 3]
    assert not resumed.reused
    before, after = load(whole.output).lm.state_dict(), load(resumed.output).lm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
