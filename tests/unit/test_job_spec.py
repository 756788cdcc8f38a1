"""What is asked of Ray for a job: nothing secret in it, the upload's limit, the request of the flags."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from made_cluster import nodes

from cluster.job_secrets import FILE_VARIABLE, NAMES_VARIABLE, adopt, read_secrets
from cluster.job_spec import HOLD_VARIABLE, EntrypointResources, JobSpec, hidden_line
from cluster.jobs_cli import _custom, _refuse_what_nobody_has, _request
from cluster.nodes import Node
from cluster.upload import check_upload
from workbench.cli import _places, _requests, _takes_resources, main
from workbench.errors import UserError

LIST = ["runs", "list", "--json"]
ROOT = Path("/runs")


def spec(**keys: Any) -> JobSpec:
    return JobSpec(**{"command": LIST, "runs_root": ROOT, **keys})


def test_a_plain_job_is_the_command_and_nothing_else() -> None:
    assert spec().entrypoint() == "exec python -m workbench runs list --json"
    assert spec().arguments().keys() == {"entrypoint", "runtime_env", "metadata"}


def test_of_secrets_only_names_travel() -> None:
    job = spec(secrets=["HF_TOKEN", "WANDB_API_KEY"])
    assert job.entrypoint() == (
        "exec python -m cluster.job_entry --secret HF_TOKEN --secret WANDB_API_KEY -- runs list --json"
    )
    assert job.runtime_env()["env_vars"][NAMES_VARIABLE] == "HF_TOKEN,WANDB_API_KEY"


@pytest.mark.parametrize(
    "wrong",
    [
        {"command": ["data", "embed", "api_key=sk-123"]},
        {"command": ["data", "embed", "uri=http://root:sk-123@host:19530"]},
        {"command": ["data", "embed", "uri=http://root:pa@sk-123@host:19530"]},
        {"command": ["data", "embed", "uri=http://root:pa/sk-123@host"]},
        {"variables": {"HF_TOKEN": "sk-123"}},
        {"variables": {"STORE": "http://root:sk-123@host"}},
    ],
)
def test_what_looks_like_a_secret_is_refused_without_repeating_it(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--secret NAME") as error:
        spec(**wrong)
    assert "sk-123" not in str(error.value)


@pytest.mark.parametrize("plain", ["uri=http://host:19530", "base_url=http://host:8000/v1/a@b", "question=who@where?"])
def test_what_has_no_password_is_not_refused(plain: str) -> None:
    assert shlex.split(spec(command=["data", "embed", plain]).metadata()["command"])[-1] == plain


def test_a_list_of_jobs_shows_no_password_of_a_job_that_others_submitted() -> None:
    assert hidden_line("data embed uri=http://root:pa@ss@host x='a b'") == (
        "data embed 'uri=http://root:(secret)@host' 'x=a b'"
    )
    assert hidden_line("data search 'a  b") == "data search 'a  b"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (["--cpus", "-1", "--", "data", "audit"], "--cpus: Input should be greater than or equal to 0"),
        (["--name", "a b/c", "--", "data", "audit"], "--name 'a b/c': use letters"),
        (["--", "data", "embed", "uri=http://root:pa@ss@host"], "uri=http://root:(secret)@host would be written"),
        (["--", "nosuch", "cmd"], "No such command 'nosuch'"),
        (["--", "data", "embd"], "No such command 'embd'"),
        (["--", "data", "audit", "--nosuch"], "No such option: --nosuch"),
        (["--", "data", "embed", "documents=x", "bach_size=3"], "did you mean 'batch_size'?"),
        (["--", "data", "embed", "documents=x", "batch_size=many"], "batch_size: Input should be a valid integer"),
        (["--", "data", "audit", "nosuch.yaml"], "nosuch.yaml is not in this checkout"),
    ],
)
def test_a_mistake_is_found_before_the_cluster_is_asked(
    line: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["submit", "--address", "http://127.0.0.1:1", "--runs", "/runs", *line])
    assert stop.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_card_is_set_in_the_jobs_own_process_and_not_in_its_workers() -> None:
    job = spec(resources=EntrypointResources(custom={"rtx-pro-6000": 1.0}, cards="GPU-22"))
    assert "--cards GPU-22" in job.entrypoint()
    assert "GPU-22" not in json.dumps(job.runtime_env())


@pytest.mark.parametrize("given", ["HF_TOKEN=hf_abcdefgh", "A B", "", "--"])
def test_a_secret_is_named_and_its_value_not_repeated(given: str) -> None:
    with pytest.raises(UserError, match="give the NAME of a secret") as error:
        spec(secrets=[given])
    assert "hf_abcdefgh" not in str(error.value)


@pytest.mark.parametrize("after", ["", "a b/c"])
def test_a_job_to_wait_for_has_a_jobs_name(after: str) -> None:
    with pytest.raises(UserError):
        spec(after=[after])


def test_the_plain_line_has_whole_numbers_where_ray_wants_them() -> None:
    line = spec(resources=EntrypointResources(memory=4096 << 20, cpus=0.5)).plain_line("http://h:1", "")
    assert "--entrypoint-memory 4294967296 " in line and "--entrypoint-num-cpus 0.5 " in line


def test_what_no_host_has_is_refused() -> None:
    nodes = [Node("a", "linux", (), {"CPU": 8.0, "memory": 64.0 * 2**30, "mps": 1.0, "node:1.2.3.4": 1.0}, None)]
    _refuse_what_nobody_has(nodes, 32 << 30, {"mps": 1.0})
    with pytest.raises(UserError, match="no host has more than 65536 MiB"):
        _refuse_what_nobody_has(nodes, 65 << 30, {})
    with pytest.raises(UserError, match="foo=1: no host has more than 0 of it; there is CPU, memory, mps"):
        _refuse_what_nobody_has(nodes, 0, {"foo": 1.0})
    for wrong in ("mps=-1", "foo=nan", "foo=inf", "foo"):
        with pytest.raises(UserError, match="NAME=AMOUNT"):
            _custom([wrong])


def test_a_supervisor_reserves_nothing_and_knows_what_its_attempts_do() -> None:
    job = spec(after=["first"], retries=2, resources=EntrypointResources(cpus=2), secrets=["A"])
    assert job.entrypoint() == "exec python -m cluster.job_hold -- runs list --json"
    assert "entrypoint_num_cpus" not in job.arguments()
    held = json.loads(job.runtime_env()["env_vars"][HOLD_VARIABLE])
    assert (held["after"], held["retries"], held["arguments"]) == (["first"], 2, {"entrypoint_num_cpus": 2})
    assert held["entrypoint"] == "exec python -m cluster.job_entry --secret A -- runs list --json"
    assert HOLD_VARIABLE not in held["runtime_env"]["env_vars"]


def test_a_secrets_file_is_read_only_where_others_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secrets.env"
    file.write_text("# hub\nHF_TOKEN=hf_1=2\nexport WANDB='w b'\n\n")
    file.chmod(0o640)
    with pytest.raises(UserError, match="chmod 600"):
        read_secrets(file)
    file.chmod(0o600)
    assert read_secrets(file) == {"HF_TOKEN": "hf_1=2", "WANDB": "w b"}
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    with pytest.raises(UserError, match="has no OTHER") as error:
        adopt(["HF_TOKEN", "OTHER"])
    assert "hf_1" not in str(error.value)
    file.write_text("hf_secret\n")
    with pytest.raises(UserError, match="write NAME=VALUE") as error:
        read_secrets(file)
    assert "hf_secret" not in str(error.value)


def test_an_upload_over_the_limit_names_the_largest_files(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("ignored/\n*.bin\n")
    for name, size in {"small.py": 10, "a.npy": 3_000_000, "b.npy": 2_000_000, "c.bin": 9_000_000}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "ignored").mkdir()
    (tmp_path / "ignored" / "d.npy").write_bytes(b"x" * 9_000_000)
    assert check_upload(tmp_path, 6) == 5_000_010 + len("ignored/\n*.bin\n")
    with pytest.raises(UserError) as error:
        check_upload(tmp_path, 4)
    lines = str(error.value).splitlines()
    assert "weighs 5.0 MB, more than the 4 MB" in lines[0]
    assert [line.split()[-1] for line in lines[1:3]] == ["a.npy", "b.npy"]
    assert "cluster push" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gpu": "RTX 5090"}, "--gpu: write a card's model in lower case"),
        ({"gpus": "0.5"}, "--gpus: write 'all on HOST'"),
        ({"gpus": "all on a", "gpu": "any"}, "gpu and gpus cannot be had together"),
        ({"cpu": -1.0}, "--cpus:"),
    ],
)
def test_a_wrong_flag_is_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        _request(**{"gpu": "", "gpus": "", **flags})
    assert str(error.value).startswith(message)


def test_flags_make_the_request_that_they_say() -> None:
    assert _request(gpu="", gpus="", host="", share=None, mps=False) is None
    assert str(_request(gpu=">=24GB", gpus="", share=0.5)) == "0.5 of any card with >=24GB"
    assert str(_request(gpu="", gpus="all on system-a")) == "all cards on system-a"


SFT = ["train", "sft", "configs/train/lora_one_card.yaml", "base=owner/model"]


def test_the_workers_of_a_command_are_known_before_it_is_submitted() -> None:
    assert _takes_resources(SFT) and _takes_resources(["tune", "run"])
    assert not _takes_resources(["runs", "list"]) and not _takes_resources(["serve", "up"])
    assert _places([*SFT, "--name", "trial", "resources={gpu: rtx-pro-6000}"], nodes()) == []
    held = nodes(system_a={"rtx_pro_6000": 1.0})
    assert "0 of 1 rtx-pro-6000 free" in _places([*SFT, "resources={gpu: rtx-pro-6000}"], held)[0]
    with pytest.raises(UserError, match="the nearest is rtx-5090"):
        _places([*SFT, "resources={gpu: rtx-4090}"], nodes())
    assert _requests([*SFT, "resources={gpu: rtx-5090}"]) == "(rtx-5090 and 4 CPU)"


def test_served_models_and_sweeps_are_placed_before_they_are_submitted() -> None:
    pytest.importorskip("vllm")
    serve = ["serve", "up", "configs/serve/two_cards.yaml"]
    with pytest.raises(UserError, match="lower"):
        _places([*serve, "models.0.resources={gpu: rtx-pro-6000}"], nodes())
    assert _places([*serve, "models.0.resources={gpus: all on system-a}"], nodes()) == []
    with pytest.raises(UserError, match="the nearest is"):
        _places(["tune", "run", "configs/tune/qlora_lr_rank.yaml", "resources={gpu: rtx-4090}"], nodes())
