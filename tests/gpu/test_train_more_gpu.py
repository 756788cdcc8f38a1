"""On CUDA cards: a mixture of experts, streamed rows, a resume, fewer workers, cards too small. Skipped where there is
none."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA card", allow_module_level=True)

import ray
from kills import found, wait_until
from raylets import bare_head
from training_runs import curve, folder_of, sft, training_root
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import workloads.training.ray_train
from workbench.errors import UserError
from workbench.tracking import read_metrics
from workloads.training.checkpoint import complete
from workloads.training.devices import check_cards

pytestmark = pytest.mark.timeout(900)

ONE = ["workers=1", "gpus_per_worker=1", "learning_rate=0.004"]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    with training_root(tmp_path) as folder:
        yield folder


def losses(folder: Path) -> list[float]:
    return [loss for _, loss in curve(folder)]


@pytest.mark.parametrize("way", [[], ["adapter.targets=[q_proj, experts.down_proj]"], ["quantization=none"]], ids=str)
def test_a_mixture_of_experts_learns_on_a_card(way: list[str], root: Path, ray_session: None) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(root / "base")), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    (root / "base/model.safetensors").unlink()
    MixtralForCausalLM(config).save_pretrained(root / "base")
    folder, _ = sft(root, "experts", *ONE, *way)
    assert losses(folder)[-1] < losses(folder)[0]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_rows_that_are_streamed_to_a_card_are_those_that_lie_ready(packing: str, root: Path, ray_session: None) -> None:
    way = [*ONE, "dtype=float32", f"packing={packing}"]
    ready, streamed = (sft(root, on, *way, f"streaming={on}")[0] for on in ("false", "true"))
    assert losses(streamed) == pytest.approx(losses(ready), abs=1e-4)


def test_a_killed_worker_on_a_card_goes_on_from_a_checkpoint(root: Path, ray_session: None) -> None:
    way = [*ONE, "dtype=float32", "steps=400", "checkpoint_every=20", "validate_every=0"]
    whole, _ = sft(root, "whole", *way)

    def kill() -> None:
        wait_until(lambda: (run := folder_of(root, "killed")) and complete(run / "checkpoints"), 240, "a checkpoint")
        for process in found(os.getpid(), "RayTrainWorker"):
            process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    folder, summary = sft(root, "killed", *way)
    killer.join(timeout=10)
    assert summary["resumed_from"] > 0
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-3)


def test_cards_that_the_workers_got_are_compared_with_what_is_needed() -> None:
    cuda = torch.device("cuda", 0)
    memory = torch.cuda.get_device_properties(cuda).total_memory
    check_cards(memory // 2, cuda, 1.0)
    for needed, share in ((memory + 1, 1.0), (memory // 2, 0.25)):
        with pytest.raises(UserError, match=r"worker 0 got .*: ask for larger cards"):
            check_cards(needed, cuda, share)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a card for each of two hosts")
def test_training_goes_on_with_the_card_that_is_left(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads.training.ray_train, "RESIZE_SECONDS", 5.0)
    monkeypatch.setattr(ray._private.utils, "set_sigterm_handler", lambda _: None)  # a thread may set none
    with bare_head() as cluster:
        hosts = []
        for card in (0, 1):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(card))
            hosts.append(cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=200 << 20))

        def kill() -> None:
            wait_until(lambda: (run := folder_of(root, "fewer")) and len(read_metrics(run)) > 20, 240, "20 steps")
            hosts[1].kill_raylet()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        way = ["gpus_per_worker=1", "steps=600", "checkpoint_every=10", "validate_every=0", "least_workers=1"]
        folder, _ = sft(root, "fewer", *way)
        killer.join(timeout=10)
    cards = [sum(name.startswith("peak_memory_gib/") for name in row) for row in read_metrics(folder)]
    assert (cards[0], cards[-1]) == (2, 1)
    assert [step for step, _ in curve(folder)] == list(range(1, 601))
