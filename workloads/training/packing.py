"""Packed examples must not see each other: no attention across them, positions that restart.

Whether they do depends on the model. Which rows share a sequence is in ``dealing.py``, how they are joined in
``batches.py``.
"""

from typing import Any

import torch

from workbench.errors import UserError
from workloads.training.adapters import empty_model
from workloads.training.batches import Row, collate, join
from workloads.training.fsdp import computes_on, decoder_layers, evaluation_mode

LEAK = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""How much the logits of an example may change, in their own standard deviations, when its neighbour does: nothing but
rounding. A model whose layers carry state along the sequence is off by one or more."""


@torch.no_grad()
def check_packing(model: Any, sequences: int) -> None:
    """Raise UserError for a model that lets packed examples see each other, which depends on its architecture and on
    its attention: the second example of a sequence must give the same logits whatever the first one is.

    ``sequences`` are those of one forward pass. Collective where the model is sharded.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, other, second = ([(step * i + 1) % vocabulary for i in range(16)] for step in (3, 5, 7))
    device = computes_on(model)
    examples = [join([Row(ids, ids), Row(second, second)]) for ids in (first, other)]
    with evaluation_mode(model):
        seen_ST = [
            model(**collate([example] * sequences, device).inputs, use_cache=False).logits[:, 16:].float()
            for example in examples
        ]
    spread = seen_ST[0].std()
    change = (seen_ST[0] - seen_ST[1]).abs().max() / spread
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if not change <= LEAK[dtype]:
        raise UserError(
            f"packing: in {type(model).__name__} with {sequences} sequences in a pass, packed examples see each "
            f"other (logits move by {float(change):.2g} standard deviations): give packing=false"
        )


AT_MOST = 300_000_000
"""Weights of the small model that ``refuse_leaking`` makes; of a larger one the workers find out."""


def refuse_leaking(base: str) -> None:
    """Ask ``check_packing`` before a worker starts, of a model of the base's architecture: a layer of each kind, as
    wide as the base's, with random weights and few tokens. Raises UserError as it does.

    Says nothing of layers that are too large for that, and where such a model cannot be made: the workers ask the base
    itself.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base)
        text = config.get_text_config(decoder=True)
        text.vocab_size, text.num_hidden_layers = 64, _layers_of_each_kind(empty_model(base))
        if isinstance(vars(text).get("layer_types"), list):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, name, None)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32) if size <= AT_MOST else None
    except Exception:  # of an architecture that does not let itself be cut down, whatever its code raises
        return
    if model is not None:
        check_packing(model, sequences=2)


def _layers_of_each_kind(model: Any) -> int:
    """How many of the first decoder layers have one of each kind among them."""
    kinds = [tuple(type(module).__name__ for module in layer.modules()) for layer in decoder_layers(model)]
    return 1 + max(kinds.index(kind) for kind in set(kinds))
