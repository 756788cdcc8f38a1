"""Configs: what a YAML file and overrides become, and what each mistake is answered."""

from pathlib import Path

import pytest
from pydantic import Field

from workbench.config import Config, InputPath, OutputPath, dump, load, resolve_path
from workbench.errors import UserError
from workbench.files import write_json


class Index(Config):
    kind: str = "HNSW"
    ef: int = Field(100, ge=1)


class Source(Config):
    path: str
    weight: float = 1.0


class Example(Config):
    batch_size: int = Field(32, ge=1)
    learning_rate: float = 1e-3
    index: Index = Index()
    sources: list[Source] = Field(default_factory=list)
    documents: InputPath | None = None
    out: OutputPath | None = None


def yaml_file(folder: Path, text: str) -> Path:
    file = folder / "example.yaml"
    file.write_text(text)
    return file


def refusal(file: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(Example, file, overrides)
    return str(error.value)


def test_file_then_overrides_then_defaults(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "batch_size: 8\nindex:\n  ef: 7\n")
    config = load(Example, file, ["batch_size=64", "index.kind=FLAT"])
    assert (config.batch_size, config.index.ef, config.index.kind, config.learning_rate) == (64, 7, "FLAT", 1e-3)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(Example, yaml_file(tmp_path, "# nothing\n")) == Example()


def test_an_override_reaches_into_a_list_and_into_a_group_set_to_null(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "index: null\nsources: [{path: a}, {path: b}]\n")
    config = load(Example, file, ["index.ef=3", "sources.1.weight=2"])
    assert (config.index.ef, config.sources[0].weight, config.sources[1].weight) == (3, 1.0, 2.0)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_exponents_are_numbers_wherever_they_stand(tmp_path: Path, text: str) -> None:
    class Loose(Config):
        value: object = None

    assert load(Loose, None, [f"value={text}"]).value == 1e-4
    assert load(Loose, yaml_file(tmp_path, f"value: {text}")).value == 1e-4


def test_a_dumped_config_loads_as_itself(tmp_path: Path) -> None:
    config = load(Example, None, ["learning_rate=3e-05", "sources=[{path: a}]", f"out={tmp_path}/x"])
    assert load(Example, yaml_file(tmp_path, dump(config))) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nbatchsize: 3\n", ["example.yaml:2: unknown key 'batchsize'; did you mean 'batch_size'?"]),
        ("index:\n  kin: X\n", ["example.yaml:2: unknown key 'index.kin'; did you mean 'index.kind'?"]),
        ("sources:\n- path: a\n- path: b\n  wait: 2\n", ["example.yaml:4: unknown key 'sources.1.wait'", "weight"]),
        ("zzzzzz: 1\n", ["example.yaml:1: unknown key 'zzzzzz'; valid keys: batch_size, learning_rate"]),
        ("batch_size: many\n", ["example.yaml:1: batch_size:", "valid integer", "'many'"]),
        ("\nbatch_size: 0\n", ["example.yaml:2: batch_size:", "greater than or equal to 1", "(given: 0)"]),
        ("sources:\n- weight: 1\n", ["example.yaml:2: key 'sources.0.path' is required"]),
        ("batch_size: 1\nbatch_size: 2\n", ["example.yaml:2: key 'batch_size' is given twice (first on line 1)"]),
        ("index:\n  ef: 1\n  ef: 2\n", ["example.yaml:3: key 'index.ef' is given twice (first on line 2)"]),
        ("batch_size: [1\nx", ["example.yaml:2: not valid YAML"]),
        ("- 1\n- 2\n", ["example.yaml:1: a config is a mapping of keys to values, this is a list"]),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path: Path, text: str, expected: list[str]) -> None:
    message = refusal(yaml_file(tmp_path, text))
    assert all(part in message for part in expected), message


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    assert len(refusal(yaml_file(tmp_path, "batch_size: x\nindex: {ef: 0}\nnope: 1\n")).splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("batchsize=3", "override 'batchsize=3': unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("batch_size=no", "override 'batch_size=no': batch_size:"),
        ("batch_size=[1", "override 'batch_size=[1': the value is not valid YAML"),
        ("batch_size.x=1", "'batch_size' holds a value, not a group of keys"),
        ("sources.5.path=x", "'5' is no place in a list of 1"),
        ("batch_size=true", "override 'batch_size=true': batch_size: give a number: YAML reads yes"),
        ("learning_rate=yes", "override 'learning_rate=yes': learning_rate: give a number"),
        ("documents=", "override 'documents=': documents: an empty path"),
        ("out=", "override 'out=': out: an empty path"),
        ("batch_size", "'batch_size' is not an override: write key=value"),
    ],
)
def test_a_mistake_in_an_override_is_named_by_it(tmp_path: Path, override: str, expected: str) -> None:
    file = yaml_file(tmp_path, "batch_size: 4\nsources: [{path: a}]\n")
    assert expected in refusal(file, override)


def test_a_place_in_a_list_that_is_not_there_is_named_by_its_override(tmp_path: Path) -> None:
    message = refusal(None, "sources.0=x")
    assert message.startswith("override 'sources.0=x': 'sources' is a list") and "sources=[...]" in message


def test_an_override_takes_the_blame_from_the_line_it_replaces(tmp_path: Path) -> None:
    assert refusal(yaml_file(tmp_path, "batch_size: 4\n"), "batch_size=0").startswith("override 'batch_size=0'")


def test_a_missing_config_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    yaml_file(tmp_path, "")
    assert f"did you mean {tmp_path / 'example.yaml'}?" in refusal(tmp_path / "exampel.yaml")


def test_a_missing_input_names_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "documents.parquet").touch()
    message = refusal(None, f"documents={tmp_path}/document.parquet")
    assert f"no such file or folder: {tmp_path}/document.parquet; did you mean {tmp_path}/documents.parquet?" in message


def test_a_missing_folder_names_the_last_one_that_exists(tmp_path: Path) -> None:
    assert f"; {tmp_path} exists" in refusal(None, f"documents={tmp_path}/no/such/file")


def test_inputs_may_be_missing_where_paths_are_not_visited() -> None:
    config = load(Example, None, ["documents=runs/data-audit/latest/artifacts"], visit_paths=False)
    assert config.documents == Path("runs/data-audit/latest/artifacts")


def finished_run(root: Path, kind: str, name: str, state: str = "finished") -> Path:
    write_json(root / kind / name / "status.json", {"state": state, "host": "elsewhere", "pid": 1})
    return root / kind / name


def test_latest_is_the_newest_finished_run(runs_root: Path) -> None:
    finished_run(runs_root, "data-audit", "20260101T000000")
    newest = finished_run(runs_root, "data-audit", "20260102T000000-b")
    finished_run(runs_root, "data-audit", "20260103T000000", state="failed")
    assert resolve_path(Path("runs/data-audit/latest/artifacts/x")) == newest / "artifacts/x"


def test_latest_without_a_finished_run_says_which_command_makes_one(runs_root: Path) -> None:
    assert "run: workbench data audit" in refusal(None, "documents=runs/data-audit/latest")


def test_latest_of_a_misspelt_kind_names_the_nearest(runs_root: Path) -> None:
    finished_run(runs_root, "data-audit", "20260101T000000")
    assert "did you mean data-audit?" in refusal(None, "documents=runs/data-adit/latest")


def test_run_paths_follow_the_runs_root(runs_root: Path) -> None:
    assert load(Example, None, ["out=runs/x/y"]).out == runs_root / "x/y"


def test_a_relative_runs_root_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS_ROOT", "some/runs")
    assert "WORKBENCH_RUNS_ROOT=some/runs is relative" in refusal(None, "out=runs/x")
