"""What 'cluster up' and its like refuse, and say, before any host is asked."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_bring_up import THREE

from cluster.bring_up_cli import down, push, up
from cluster.client_state import find_token, inventory_in_use, keep_token, remember, token_copy
from cluster.inventory import Inventory
from cluster.jobs_cli import runs_root_for
from cluster.push import _is_there, _objects
from workbench.errors import Failure, UserError
from workbench.session import ClusterAddress

UNREACHABLE = {"head": "only", "storage": "/srv", "hosts": {"only": {"address": "127.0.0.3", "user": "nobody",
               "ssh_port": 1, "os": "linux"}}}  # fmt: skip


@pytest.fixture(autouse=True)
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's state of the test's own, and a working folder."""
    monkeypatch.setenv("WORKBENCH_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(content: dict[str, Any], **changes: Any) -> Path:
    file = Path("cluster.yaml")
    file.write_text(yaml.safe_dump({**content, **changes}))
    return file


def test_a_dry_run_asks_no_host_and_leaves_nothing(laptop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(UNREACHABLE)
    assert up(dry_run=True) == 0
    assert "Nothing was touched" in capsys.readouterr().out
    assert not (laptop / "state").exists()


def test_an_open_cluster_takes_the_word_twice(capsys: pytest.CaptureFixture[str]) -> None:
    write(UNREACHABLE, open_cluster=True)
    with pytest.raises(UserError, match="say it once more with --open"):
        up(dry_run=True)
    assert up(dry_run=True, open_=True) == 0
    assert "RAY_AUTH_MODE=disabled" in capsys.readouterr().out
    write(UNREACHABLE)
    with pytest.raises(UserError, match="set open_cluster: true in it as well"):
        up(dry_run=True, open_=True)


def test_cards_without_uuids_are_refused_with_what_to_type() -> None:
    hosts = {"system-a": THREE["hosts"]["system-a"]}  # type: ignore[index]
    cards = [{**card, "uuid": ""} for card in hosts["system-a"]["cards"]]
    write(THREE, hosts={"system-a": {**hosts["system-a"], "cards": cards}})
    with pytest.raises(UserError, match=r"no uuid for system-a: rtx-5090.*init --discover"):
        up()


def test_an_unreachable_head_ends_it() -> None:
    write(UNREACHABLE)
    with pytest.raises(Failure, match=r"cannot reach nobody@127\.0\.0\.3"):
        up()


def test_down_of_the_head_alone_is_refused() -> None:
    write(THREE)
    with pytest.raises(UserError, match="system-a is the head"):
        down(["system-a"])
    with pytest.raises(UserError, match="no host 'system-b'"):
        down(["system-b"])


def test_push_refuses_a_name_that_is_a_path(laptop: Path) -> None:
    write(UNREACHABLE)
    (laptop / "x").write_text("x")
    with pytest.raises(UserError, match="is no name"):
        push(laptop / "x", name="../x")


def test_the_last_inventory_is_found_where_there_is_none(laptop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(UNREACHABLE).resolve()
    remember(file)
    elsewhere = laptop / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert inventory_in_use(None)[1] == file


def test_the_token_is_kept_private() -> None:
    inventory = Inventory.model_validate(UNREACHABLE)
    keep_token(inventory, "secret")
    copy = token_copy(inventory)
    assert copy.stat().st_mode & 0o777 == 0o600
    assert copy.parent.stat().st_mode & 0o077 == 0
    copy.chmod(0o644)
    assert find_token(inventory, make=False) == "secret"
    assert copy.stat().st_mode & 0o777 == 0o600


def test_a_job_through_a_tunnel_writes_to_the_clusters_runs_not_to_ours() -> None:
    tunnel = ClusterAddress("", "http://127.0.0.1:4000", None, Path("/mnt/cluster/runs"), remote=True)
    assert runs_root_for(tunnel, None) == Path("/mnt/cluster/runs")


def test_objects_that_are_there_are_not_sent_again(laptop: Path) -> None:
    from pyarrow import fs

    (laptop / "corpus/part").mkdir(parents=True)
    file = laptop / "corpus/part/a.txt"
    file.write_text("one")
    assert _objects(laptop / "corpus", "bucket/corpus") == [(file, "bucket/corpus/part/a.txt")]
    store = fs.LocalFileSystem()
    copy = laptop / "copy.txt"
    assert not _is_there(store, file, str(copy))
    copy.write_text("one")
    assert _is_there(store, file, str(copy))
    file.write_text("three")
    assert not _is_there(store, file, str(copy))
