"""--plan, and the refusal of cards that cannot hold what a run needs."""

import json
from pathlib import Path
from typing import Any

import pytest
from models import make_tiny_llama

from cluster.labels import CardOnHost
from cluster.nodes import Node
from workbench.cli import main
from workbench.errors import UserError
from workbench.resources import ResourceRequest
from workloads.plan import GIB, candidates, check_memory, estimate, plan_run
from workloads.pretrain import PretrainConfig
from workloads.sft import SftConfig
from workloads.training.config import DistillConfig
from workloads.training.devices import refuse_small


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model's config and nothing else."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4
    )
    config.save_pretrained(folder)
    return str(folder)


def config_of(base: str, **keys: Any) -> SftConfig:
    keys = {"base": base, "workers": 2, "batch_size": 8, "max_length": 256, **keys}
    return SftConfig(resources=ResourceRequest(gpu=keys.pop("gpu", {"model": "small"})), **keys)


def host(name: str, *cards: tuple[str, float], reserved: bool = False) -> Node:
    named = tuple(CardOnHost(model, f"GPU-{place}", gb, reserved) for place, (model, gb) in enumerate(cards))
    return Node(name, cards=named, total={"GPU": float(len(cards))})


def test_gpt2_is_planned_in_four_bits_too(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=512, n_positions=256, n_embd=256, n_layer=3, n_head=4).save_pretrained(tmp_path)
    whole, packed = (estimate(config_of(str(tmp_path), quantization=kind)) for kind in ("none", "nf4"))
    assert packed.parts["weights"] < 0.5 * whole.parts["weights"]


def test_the_plan_is_printed_as_json_without_weights_or_a_run(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS_ROOT", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["train", "sft", f"base={base}", "gpus_per_worker=1", "--plan", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert plan["estimate"] and plan["tensor_bytes"] == plan["phases"][plan["phase"]] == sum(plan["parts"].values())
    assert plan["card_bytes"] > plan["tensor_bytes"] and {card["fits"] for card in plan["cards"]} == {"yes"}
    assert not list(tmp_path.iterdir())


def test_pretraining_is_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "pretrain", "--plan"])
    assert ended.value.code == 0 and "an estimate, for" in capsys.readouterr().out


def test_a_student_is_planned_with_the_vocabulary_of_its_teacher(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from workloads.pretraining import llama_config
    from workloads.training.transformer import Transformer

    teacher = make_tiny_llama(tmp_path / "teacher", hidden=64)
    config = PretrainConfig(distill=DistillConfig(teacher=str(teacher)), vocabulary=5000)
    student = Transformer(llama_config(config, AutoTokenizer.from_pretrained(teacher)))
    assert plan_run(config).memory.parameters == sum(weight.numel() for weight in student.parameters())


def test_a_teacher_that_cannot_be_read_is_a_mistake(base: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"distill\.teacher: .* holds an adapter"):
        plan_run(config_of(base, distill=DistillConfig(teacher=str(tmp_path))))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"distill\.teacher: Transformers cannot read"):
        plan_run(config_of(base, distill=DistillConfig(teacher=str(tmp_path))))
    with pytest.raises(UserError, match=r"distill\.teacher: the tokenizer of .* cannot be read"):
        plan_run(PretrainConfig(distill=DistillConfig(teacher=base)))


def test_a_run_that_goes_on_with_fewer_workers_is_planned_for_both_numbers(base: str) -> None:
    keys: dict[str, Any] = {
        "method": "full",
        "quantization": "none",
        "batch_size": 32,
        "max_length": 2048,
        "loss_chunk": 8192,
    }
    elastic = config_of(base, least_workers=1, **keys)
    two, one = (estimate(config_of(base, workers=count, **keys)) for count in (2, 1))
    plan = plan_run(elastic)
    assert plan.memory.peak == one.peak > two.peak and plan.ends == {2: two.card, 1: one.card}
    assert "fsdp2 over 1" in plan.about
    assert all(f"with {count} workers" in plan.text() for count in (2, 1))
    between = (two.card + one.peak) / 2 / GIB
    with pytest.raises(UserError, match="give least_workers=2"):
        check_memory(elastic, [host("a", ("small", between), ("small", between))], pytest.fail)


def test_preferences_are_planned_too_as_pairs(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "dpo", f"base={base}", f"data={tmp_path / 'pairs.jsonl'}", "--plan"])
    assert ended.value.code == 0 and "8 pairs of 1024 tokens at once" in capsys.readouterr().out


def test_offloaded_shards_are_the_hosts(base: str) -> None:
    on_cards, on_hosts = (estimate(config_of(base, strategy=way)) for way in ("fsdp2", "fsdp2-offload"))
    assert on_cards.host == 0 and on_hosts.peak < on_cards.peak
    assert "update" not in on_hosts.phases  # AdamW works on the host
    assert 0 < on_hosts.host <= on_cards.phases["update"]


def test_each_stage_of_zero_leaves_less_on_a_card(base: str) -> None:
    keys = {"method": "full", "quantization": "none", "dtype": "float32", "batch_size": 2}
    ways: dict[str, int] = {"single": 1, "zero2": 2, "zero3": 2}
    alone, two, three = (
        estimate(config_of(base, strategy=way, workers=workers, **keys)).phases["update"]
        for way, workers in ways.items()
    )
    assert alone > two > three


def test_a_command_without_a_plan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "eval", "--plan"])
    assert ended.value.code == 2 and "no --plan" in capsys.readouterr().err


def test_cards_that_cannot_hold_the_tensors_are_refused_with_what_would_fit(base: str) -> None:
    config = config_of(base, batch_size=32, max_length=2048, dtype="float32", loss_chunk=8192)
    kept, recomputed = estimate(config), estimate(config.model_copy(update={"gradient_checkpointing": True}))
    between = (recomputed.card + kept.peak) / 2 / GIB
    with pytest.raises(UserError, match=r"needs .* GiB .*small on a has .* give gradient_checkpointing=true"):
        check_memory(config, [host("a", ("small", between), ("small", between))], pytest.fail)


def test_of_unequal_cards_the_smallest_that_is_taken_counts(base: str) -> None:
    nodes = [host("a", ("small", 0.01), ("large", 96))]
    both = SftConfig(base=base, workers=2, batch_size=8, resources=ResourceRequest(gpus="all on a"))
    with pytest.raises(UserError, match="small on a has"):
        check_memory(both, nodes, pytest.fail)
    said: list[str] = []
    check_memory(config_of(base, gpu="any", workers=1), nodes, said.append)
    assert len(said) == 1 and 'ask for resources.gpu.memory=">=96GB"' in said[0]


def test_a_card_that_only_the_tensors_fit_on_is_called_tight(base: str) -> None:
    said: list[str] = []
    config = config_of(base, workers=1)
    tensors = estimate(config).peak / GIB
    check_memory(config, [host("a", ("small", round(tensors + 0.1, 2)))], said.append)
    assert said[0].startswith("tight: each worker needs")


def test_nothing_is_checked_where_a_cards_memory_is_not_known(base: str) -> None:
    unnamed = Node("b", total={"GPU": 1.0})
    assert not candidates(config_of(base, gpu="any"), [host("a", ("small", 0.01)), unnamed])
    assert not candidates(SftConfig(base=base), [host("a", ("small", 0.01))])
    assert [card.memory_gb for card in candidates(config_of(base), [host("a", ("small", 0.01)), unnamed])] == [0.01]


def test_the_cards_that_the_workers_got_are_compared_too() -> None:
    cards = [("RTX 5090", 32 * GIB), ("RTX PRO 6000", 96 * GIB)]
    refuse_small(30 * GIB, cards, 1.0)
    with pytest.raises(UserError, match=r"needs 40.0 GiB .* worker 0 got RTX 5090 with 32.0"):
        refuse_small(40 * GIB, cards, 1.0)
    with pytest.raises(UserError, match=r"worker 0 got RTX 5090 with 16.0"):
        refuse_small(30 * GIB, cards, 0.5)


def test_what_a_card_must_hold_is_told_to_the_workers(base: str) -> None:
    config = config_of(base, gpu="any")
    unnamed = [Node("b", total={"GPU": 1.0})]
    assert check_memory(config, unnamed, pytest.fail) == estimate(config).peak
    assert check_memory(SftConfig(base=base), unnamed, pytest.fail) == 0  # on CPUs
