"""The README.md of an exported folder: what it is, what it was made from, on what data and with which result.

Its front matter is what a model hub reads. See https://huggingface.co/docs/hub/model-cards.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.redact import redact
from workbench.run_records import Record, flatten
from workbench.runs import find_runs, state_of
from workloads.sources import HUB

if TYPE_CHECKING:
    from workloads.trained_run import TrainedRun

FORMATS = {
    "safetensors": "a whole model for Transformers and vLLM",
    "adapter": "what PEFT and vLLM put on the base",
    "base": "the base without the adapter, as it was in NF4",
    "gguf": "a whole model for llama.cpp",
}
"""The formats of an export, and what each is."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank``."""

WHERE = {"resources", "resume", "checkpoint_every", "keep_last", "log_every", "max_failures", "base", "data"}
"""Keys of a training config that say nothing of the weights, or are told elsewhere in the card."""


def write_card(trained: "TrainedRun", form: str, dtype: str, folder: Path, name: str) -> None:
    """Write the card of ``folder``, which will be called ``name``."""
    from huggingface_hub import ModelCard

    card = ModelCard(f"---\n{_front_matter(trained, form).to_yaml()}\n---\n\n{_text(trained, form, dtype, name)}")
    card.save(folder / "README.md")


def _front_matter(trained: "TrainedRun", form: str) -> Any:
    from huggingface_hub import ModelCardData

    sets = [str(source).removeprefix(HUB) for source in _sources(trained) if str(source).startswith(HUB)]
    relation = {"adapter": "adapter", "base": "quantized"}.get(form, "finetune")
    base: dict[str, Any] = (
        {"base_model": trained.base, "base_model_relation": relation} if _is_hub_name(trained.base) else {}
    )
    return ModelCardData(
        datasets=[name.partition(":")[0] for name in sets] or None,
        library_name={"adapter": "peft", "gguf": None}.get(form, "transformers"),
        pipeline_tag="text-generation",
        tags=[trained.record.status["command"].split()[1], *([form] if form in ("gguf", "adapter") else [])],
        **base,
    )


def _text(trained: "TrainedRun", form: str, dtype: str, name: str) -> str:
    record = trained.record
    facts = [("what it is", FORMATS[form]), ("weights in", dtype), ("made by", _method(trained)), ("run", record.id)]
    if trained.base:
        facts.insert(2, ("base", _called(trained.base)))
    if trained.checkpoint is not None:
        facts.append(("checkpoint", f"{trained.checkpoint.name} of {trained.config.steps} steps"))
    packages = record.environment.get("packages", {})
    versions = {"workbench commit": record.environment.get("git_commit", ""), **packages}
    parts = [
        f"# {name}, from {record.id}\n",
        _table(("", ""), facts),
        f"## How to load it\n\n{_loading(trained, form, name)}",
        "## Data\n",
        _table(("input", "fingerprint", "facts"), _inputs(record)),
        _table(("rows and tokens", ""), _amounts(trained)),
        "## Result\n",
        _table(("metric", ""), _metrics(trained)),
        "## Hyperparameters\n",
        _table(("key", ""), _hyperparameters(trained)),
        "## Made with\n",
        _table(("package", ""), [(key, value) for key, value in versions.items() if value]),
    ]
    if trained.base:
        parts.append("The licence of the base applies to what was made of it.\n")
    return "\n".join(parts)


def _method(trained: "TrainedRun") -> str:
    command = f"`workbench {trained.record.status['command']}`"
    if not trained.is_adapter:
        return f"{command}: all weights were trained"
    return f"{command}: a LoRA adapter on the base in {'NF4 (QLoRA)' if trained.quantized else 'full precision'}"


def _loading(trained: "TrainedRun", form: str, name: str) -> str:
    if form == "gguf":
        return _code("bash", f"llama-cli -m {name}/{name}.gguf")
    if form == "adapter":
        return _loading_adapter(trained, name)
    return _code(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ) + _code("bash", f"vllm serve {name}")  # fmt: skip


def _loading_adapter(trained: "TrainedRun", name: str) -> str:
    config, base = trained.config, _called(trained.base)
    rank = config.adapter.rank  # type: ignore[union-attr]
    allowed = next((each for each in VLLM_RANKS if each >= rank), rank)
    made, given, served = "", "", base
    if trained.quantized:
        made = (
            'nf4 = BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant=True,\n    bnb_4bit_compute_dtype=torch.{config.compute_dtype},\n)\n"
        )
        given, served = f", dtype=torch.{config.compute_dtype}, quantization_config=nf4", "EXPORTED_BASE"
    python = (
        ("import torch\n" if made else "")
        + "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, "
        f"AutoTokenizer{', BitsAndBytesConfig' if made else ''}\n\n{made}"
        f'base = AutoModelForCausalLM.from_pretrained("{base}"{given})\n'
        f'model = PeftModel.from_pretrained(base, "{name}")\ntokenizer = AutoTokenizer.from_pretrained("{name}")'
    )
    shell = f"vllm serve {served} --enable-lora --max-lora-rank {allowed} --lora-modules tuned={name}"
    note = (
        "The base was in NF4. A server that does not quantise it likewise answers as it was trained on the base of "
        f"`workbench train export {trained.record.id} format=base`.\n\n"
    )
    return _code("python", python) + (note if trained.quantized else "") + _code("bash", shell)


def _inputs(record: Record) -> list[tuple[Any, ...]]:
    """The fingerprint, and where there is one the data version, of each input of the run."""
    rows = []
    for name, described in record.inputs.items():
        told = {key: value for key, value in described.items() if key not in ("path", "sha256", "version", "data")}
        prints = [described.get("version", ""), described.get("sha256", "")]
        facts = ", ".join(f"{key}: {value}" for key, value in told.items())
        rows.append((name, " / ".join(filter(None, prints)), facts))
    return rows


def _amounts(trained: "TrainedRun") -> list[tuple[str, Any]]:
    summary = trained.record.summary
    keys = ("rows", "tokens", "targets", "truncated", "tokens_lost", "rows_dropped", "packing_efficiency", "alike")
    said = [(key.replace("_", " "), summary[key]) for key in keys if key in summary]
    sources = ", ".join(source if source.startswith(HUB) else Path(source).name for source in _sources(trained))
    if not summary:
        rows = trained.record.folder / "artifacts" / "train.jsonl"
        if rows.is_file():
            with rows.open("rb") as lines:
                said.append(("rows", sum(1 for _ in lines)))
        said.append(("tokens", "not recorded: the run was cut short"))
    return [*([("data", sources)] if sources else []), *said]


def _sources(trained: "TrainedRun") -> list[str]:
    data = getattr(trained.config, "data", [])
    return [data] if isinstance(data, str) else [str(source) for source in data]


def _metrics(trained: "TrainedRun") -> list[tuple[str, Any]]:
    """The losses up to the exported step, or the run's own figures where it came to its end, and its evaluations."""
    if trained.checkpoint is None:
        summary = trained.record.summary
        names = ("steps", "loss", "best_step")
        rows = [(key, summary[key]) for key in summary if key in names or key.startswith(("validation", "best_valid"))]
    else:
        from workloads.training.checkpoint import history_of

        history = history_of(trained.checkpoint)
        curves = (("loss", history.train), ("held-out loss", history.validation))
        rows = [("steps", history.step), *((name, curve[-1][1]) for name, curve in curves if curve)]
    return rows + _evaluations(trained.checkpoint or trained.record.folder / "artifacts")


def _evaluations(folder: Path) -> list[tuple[str, Any]]:
    """What ``train eval`` found of the model or adapter that lies in ``folder``, newest last."""
    rows = []
    for each in find_runs():
        if each.parent.name != "train-eval" or state_of(each) != "finished":
            continue
        record = Record.read(each)
        if Path(record.config.get("tuned", "")).is_relative_to(folder):
            shares = {key: record.summary.get(f"accuracy_{key}", math.nan) for key in ("tuned", "base")}
            said = f"{shares['tuned']:.1%} of {record.summary.get('questions')} right, the base {shares['base']:.1%}"
            rows.append((record.id, said))
    return rows


def _hyperparameters(trained: "TrainedRun") -> list[tuple[str, Any]]:
    given = {key: value for key, value in trained.config.model_dump(mode="json").items() if key not in WHERE}
    if trained.base and not trained.is_adapter:
        given.pop("adapter", None)
    values = {key: value for key, value in flatten(redact(given)).items() if value not in (None, "")}
    return [(key, Path(value).name if Path(str(value)).is_absolute() else value) for key, value in values.items()]


def _is_hub_name(base: str) -> bool:
    return bool(base) and not Path(base).is_dir()


def _called(base: str) -> str:
    """A hub name as it is; of a folder its name alone, for a card is made to be shown to others."""
    return base if _is_hub_name(base) else Path(base).name


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```\n\n"


def _table(columns: tuple[str, ...], rows: list[Any]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join("| " + " | ".join(_cell(value) for value in line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    text = f"{value:.6g}" if isinstance(value, float) else text
    return text.replace("|", "\\|").replace("\n", " ")
