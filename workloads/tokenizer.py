"""A byte-level BPE tokenizer trained on the corpus, with a chat template that Transformers and vLLM read.

Text is cut so that SMILES come out alike wherever they stand: every digit, bracket and bond is a token of its own, and
an upper-case letter begins a new piece, so ``CCO`` is always C, C, O and a run of aromatic ``c`` is one piece.
"""

from collections.abc import Iterable
from typing import Any

END = "<|end|>"
PAD = "<|pad|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
SYSTEM = "<|system|>"
SPECIAL = (END, PAD, SYSTEM, USER, ASSISTANT)

# A piece: one digit; one capital with the lower-case run behind it; a lower-case run (a leading space stays with
# the word); one other sign; a run of line breaks or of blanks.
PIECE = r"\p{N}| ?\p{Lu}\p{Ll}*| ?\p{L}+?(?=\p{Lu})| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int, max_length: int) -> Any:
    """Train on ``texts``; returns a ``PreTrainedTokenizerFast`` whose end-of-sequence token is ``<|end|>``.

    ``vocabulary`` counts the 256 bytes and the special tokens; ``max_length`` is the model's context in tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
