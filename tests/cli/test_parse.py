"""From the command line to a configuration."""

import shlex
from pathlib import Path

import pytest

from llara.cli.parse import Parsed, parse
from llara.config import AdaptConfig, EvaluateConfig, FinetuneConfig, SearchConfig, VerifyConfig
from llara.errors import ConfigError
from llara.plan.config import PlanAdaptConfig


def parsed(line: str) -> Parsed:
    result = parse(shlex.split(line))
    assert result is not None
    return result


def faults(line: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(shlex.split(line))
    return caught.value.problems


@pytest.mark.parametrize("line", ["--corpus a b", "--corpus a --corpus b"])
def test_lists_are_separated_by_blanks_or_repeated(line: str) -> None:
    config = parsed(f"adapt {line} --model mini --output o").config
    assert config == AdaptConfig(model="mini", corpus=(Path("a"), Path("b")), output=Path("o"))


def test_a_list_ends_at_the_next_flag() -> None:
    config = parsed("evaluate --run a b c --qrels q --metrics nDCG@10 R@10 --seed 3").config
    assert isinstance(config, EvaluateConfig)
    assert config.run == (Path("a"), Path("b"), Path("c"))
    assert (config.metrics, config.seed) == (("nDCG@10", "R@10"), 3)


@pytest.mark.parametrize("line", ["'why is it' --index i", "--index i 'why is it'", "--index=i --query 'why is it'"])
def test_a_query_may_stand_anywhere(line: str) -> None:
    assert parsed(f"search {line}").config == SearchConfig(query="why is it", index=Path("i"))


def test_a_query_that_looks_like_a_flag_goes_behind_two_dashes() -> None:
    config = parsed("search --index i -- --help").config
    assert isinstance(config, SearchConfig) and config.query == "--help"


def test_verify_takes_its_path_bare() -> None:
    assert parsed("verify some/folder").config == VerifyConfig(path=Path("some/folder"))


def test_what_is_on_by_default_can_be_switched_off() -> None:
    config = parsed("finetune --model m --train t --output o --no-titles").config
    assert isinstance(config, FinetuneConfig) and not config.titles


def test_options_may_stand_before_the_command() -> None:
    before, after = parsed("--json --quiet doctor"), parsed("doctor --json --quiet")
    assert before == after
    assert before.options.json and before.options.quiet


def test_a_command_of_two_words_takes_the_flags_of_its_job_and_its_own() -> None:
    line = "plan adapt --model m --corpus c --steps 7 --fleet 8xH100 --json"
    result = parsed(line)
    assert result.config == PlanAdaptConfig(model="m", corpus=(Path("c"),), steps=7, fleet="8xH100")
    assert result == parsed("--json plan adapt --model m --corpus c --steps 7 --fleet 8xH100")


def test_unknown_flags_come_with_the_nearest_name_and_all_other_faults() -> None:
    assert faults("adapt --modle x --corpus c --steps -5 --ouptut=o") == (
        "--modle: unknown flag (did you mean '--model'?)",
        "--ouptut: unknown flag (did you mean '--output'?)",
        "--output: is required",
        "--model: is required (a folder, a hub id, or mini)",
        "--steps: must be 1 or more, got -5",
    )


def test_a_command_without_any_flag_names_those_that_are_required() -> None:
    model = "--model: is required (a folder, a hub id, or mini)"
    for line, flag in (("adapt", "--corpus"), ("finetune", "--train"), ("encode", "--corpus")):
        assert set(faults(line)) == {"--output: is required", f"{flag}: is required", model}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("adap", "adap: unknown command (did you mean 'adapt'?); see llara --help"),
        ("distil --run r", "distil: unknown command; see llara --help"),
        ("plan", "plan: needs a job: plan adapt, plan encode, plan index; see llara plan --help"),
        ("plan --model m", "plan: needs a job: plan adapt, plan encode, plan index; see llara plan --help"),
        ("plan adpt", "plan adpt: unknown command; there are plan adapt, plan encode, plan index"),
        ("plan adapt --corpus c --model m --sampel 3", "--sampel: unknown flag (did you mean '--sample'?)"),
        ("--foo", "--foo: needs a command, and goes behind it; see llara --help"),
        ("--jsno doctor", "--jsno: unknown flag (did you mean '--json'?)"),
        ("doctor extra", "extra: not expected here; a text with blanks needs quotes"),
        ("search a b --index i", "b: not expected here; a text with blanks needs quotes"),
        ("verify", "--path: is required"),
        ("adapt --steps x", "--steps: must be a whole number, got 'x'"),
        ("adapt --steps 2.5", "--steps: must be a whole number, got '2.5'"),
        ("adapt --batch-size 0.5", "--batch-size: must be a whole number, got '0.5'"),
        ("adapt --batch-size x", "--batch-size: must be a whole number, got 'x'"),
        ("finetune --matryoshka-dims 8 16.5", "--matryoshka-dims: must be a whole number, got '16.5'"),
        ("finetune --matryoshka-dims 8 x", "--matryoshka-dims: must be a whole number, got 'x'"),
        ("adapt --warmup x", "--warmup: must be a number, got 'x'"),
        ("adapt --steps 1 --steps 2", "--steps: given more than once"),
        ("adapt --config", "--config: needs a value"),
        (
            "adapt --objective ebr",
            "--objective: must be one of ebae+ebar, ebae, ebar, lm; got 'ebr' (did you mean 'ebar'?)",
        ),
    ],
)
def test_single_faults(line: str, fault: str) -> None:
    assert faults(line) == (fault,)


def write(folder: Path, text: str) -> Path:
    file = folder / "job.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'model = "mini"\ncorpus = ["a", "b"]\noutput = "o"\nsteps = 5\nwarmup = 0\noffline = true\n')
    config = parsed(f"adapt --config {file} --steps 7 --corpus c --offline=false").config
    assert config == AdaptConfig(model="mini", corpus=(Path("c"),), output=Path("o"), steps=7, warmup=0.0)


def test_a_key_may_have_the_name_of_a_command(tmp_path: Path) -> None:
    file = write(tmp_path, 'index = "i"')
    config = parsed(f"search why --config {file}").config
    assert isinstance(config, SearchConfig) and config.index == Path("i")


def test_keys_may_be_written_like_flags(tmp_path: Path) -> None:
    config = parsed(f"search why --index i --config {write(tmp_path, 'top-k = 3')}").config
    assert isinstance(config, SearchConfig) and config.top_k == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('modle = "x"\ncorpsu = "y"', ("unknown key 'modle' (did you mean 'model'?)", "unknown key 'corpsu' (did you")),
        ("json = true", ("unknown key 'json'",)),
        ("[steps]\nx = 1", ("'steps' must be one value or a list, not a table",)),
        ('steps = "x"', ("steps: must be a whole number, got 'x'",)),
        ("steps = 2.5", ("steps: must be a whole number, got '2.5'",)),
        ("steps = [1, 2]", ("steps: must be one value, got '[1, 2]'",)),
        ("steps = ", ("cannot be read as TOML: Invalid value (at end of document)",)),
        ('bos = "maybe"', ("bos: must be one of auto, yes, no; got 'maybe'",)),
    ],
)
def test_faults_in_the_file_name_the_file(text: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    file = write(tmp_path, text)
    found = faults(f"adapt --config {file} --corpus c --output o --model m")
    assert len(found) == len(expected)
    for fault, part in zip(found, expected, strict=True):
        assert fault.startswith(f"{file}: {part}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert faults(f"adapt --config {tmp_path / 'no.toml'}") == (
        f"{tmp_path / 'no.toml'}: there is no such file (--config)",
    )
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    assert "cannot be read as TOML" in faults(f"adapt --config {tmp_path / 'bytes.toml'}")[0]
    assert "cannot be read as TOML" in faults(f"adapt --config {tmp_path}")[0]
