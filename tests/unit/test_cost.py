"""What work cost: cards by its request, energy where it was recorded, money only where there is a price."""

from pathlib import Path

import pytest

from workbench.config import Config
from workbench.cost import Prices, cards_of, cost, cost_text, energy_told, joules_in, read_prices, write_energy
from workbench.errors import UserError
from workbench.run_records import record_row
from workbench.runs import finish, open_run
from workbench.session import state_folder


@pytest.mark.parametrize(
    "config, cards",
    [
        ({}, 0),
        ({"workers": 2}, 0),
        ({"workers": 2, "gpus_per_worker": 0.5}, 1),
        ({"workers": 2, "resources": {"gpu": {"model": "rtx-5090"}}, "gpus_per_worker": 1}, 2),
        ({"resources": {"gpu": {}, "share": 0.25}}, 0.25),
        ({"resources": {"gpus": 2}}, 2),
        ({"workers": 2, "resources": {"gpus": "all on system-a"}}, 2),
        ({"workers": 2, "resources": {"cpu": 4}}, 0),
        ({"concurrent": 4, "config": {"workers": 2, "resources": {"gpu": {}}}}, 8),
        ({"concurrent": 4, "config": {"workers": 1, "gpus_per_worker": 0}}, 0),
        ({"models": [{"device": "gpu", "gpus": 0.5}, {"device": "cpu", "gpus": 1.0}, {"device": "auto"}]}, 0.5),
        ({"models": [{"resources": {"gpu": {}}, "engine": {"tensor_parallel_size": 2}, "replicas": 2}]}, 4),
        ({"models": [{"resources": {"gpus": 2}, "engine": {"tensor_parallel_size": 2}}]}, 2),
        ({"models": [{"resources": {"gpus": "all on system-a"}, "engine": {"data_parallel_size": 2}}]}, 2),
    ],
)
def test_cards_are_those_of_all_workers(config: dict[str, object], cards: float) -> None:
    assert cards_of(config) == cards


def test_money_is_of_hours_and_of_energy() -> None:
    prices = Prices(currency="CHF", gpu_hour=0.4, kilowatt_hour=0.3)
    paid = cost(1800, 2, 3.6e6, prices)
    assert paid == {"gpu_hours": 1.0, "joules": 3.6e6, "money": 0.7, "currency": "CHF"}
    assert cost_text(paid) == "1.00 GPU h 1.000 kWh 0.70 CHF"


def test_what_is_not_known_costs_no_zero() -> None:
    assert cost(1800, 2, None, Prices())["money"] is None
    assert cost_text(cost(1800, 0, None, Prices(gpu_hour=1.0))) == ""


def test_the_joules_of_a_job_are_those_that_its_log_tells() -> None:
    assert joules_in(f"step 3\n[10:00:01] {energy_told(1234.4)}\nrun runs/x") == 1234
    assert joules_in("no word of it") is None


def test_a_list_of_runs_has_what_each_cost(runs_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORKBENCH_STATE", str(tmp_path))
    (state_folder() / "prices.yaml").write_text("kilowatt_hour: 0.5\n")
    with open_run("train", "sft", Config()) as run:
        finish(run, {})
    write_energy(run.folder, 7.2e6)
    assert record_row(run.folder)["cost"] == {"gpu_hours": 0.0, "joules": 7.2e6, "money": 1.0, "currency": "EUR"}
    (state_folder() / "prices.yaml").write_text("kilowatthour: 0.5\n")
    with pytest.raises(UserError, match="did you mean 'kilowatt_hour'"):
        read_prices()
