"""Which tokens are learned: compared with lists made by hand, for templates of several kinds."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from workbench.conversations import Message
from workbench.errors import UserError
from workloads.chat_templates import TEMPLATES, answers_in, end_generation, load_tokenizer
from workloads.conversations import Conversation
from workloads.encoding import Counts, Recipe, encode
from workloads.tokenizer import CHAT_TEMPLATE
from workloads.training.batches import IGNORE

WORDS = ["be brief", "one and one", "two", "and two more", "four it is"]
TALK = Conversation(
    [
        Message("system", WORDS[0]), Message("user", WORDS[1]), Message("assistant", WORDS[2]),
        Message("user", WORDS[3]), Message("assistant", WORDS[4]),
    ],
    "talk",
)  # fmt: skip
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[A]{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}[U]{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
THINKING = (  # the last answer is written with a thought before it, as by Qwen3
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNCLOSED = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REWRITING = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}?{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that has the tokens of ChatML and of Llama 3, with a beginning and an end token."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", *TEMPLATES["chatml"].tokens, *TEMPLATES["llama3"].tokens, "<|end|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(WORDS * 9, vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def template(folder: Path, jinja: str) -> str:
    if jinja in TEMPLATES:
        return jinja
    file = folder / f"{abs(hash(jinja))}.jinja"
    file.write_text(jinja)
    return str(file)


def learned(folder: Path, jinja: str, row: Conversation = TALK, **recipe: Any) -> tuple[list[str], str, Counts]:
    """Runs of learned tokens as text, the whole text, and the counts of one row."""
    given = Recipe(str(folder), template(folder, jinja), **recipe)
    tokenizer = load_tokenizer(given.base, given.chat_template)
    rows, counts = encode([row], tokenizer, given)
    runs: list[list[int]] = [[]]
    for label, ids in zip(rows[0].labels, rows[0].ids, strict=True):
        assert label in (IGNORE, ids)
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run], tokenizer.decode(rows[0].ids), counts


@pytest.mark.parametrize(
    ("jinja", "answers", "text"),
    [
        (
            "chatml",
            ["two<|im_end|>", "four it is<|im_end|>"],
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none and one<|im_end|>\n<|im_start|>assistant\n"
            "two<|im_end|>\n<|im_start|>user\nand two more<|im_end|>\n<|im_start|>assistant\nfour it is<|im_end|>",
        ),
        (
            "llama3",
            ["two<|eot_id|>", "four it is<|eot_id|>"],
            "<s><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|><|start_header_id|>user"
            "<|end_header_id|>\n\none and one<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\ntwo<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nand two more<|eot_id|><|start_header_id|>assistant"
            "<|end_header_id|>\n\nfour it is<|eot_id|>",
        ),
        (
            "alpaca",
            ["two</s>", "four it is</s>"],
            "<s>be brief\n\n### Instruction:\none and one\n\n### Response:\ntwo</s>\n### Instruction:\nand two more\n\n"
            "### Response:\nfour it is</s>",
        ),
        (
            "plain",
            ["two</s>", "four it is</s>"],
            "<s>be brief\n\nUser:\none and one\n\nAssistant:\ntwo</s>\n"
            "User:\nand two more\n\nAssistant:\nfour it is</s>",
        ),
        (MARKED, ["two</s>", "four it is</s>"], "[U]be brief[U]one and one[A]two</s>[U]and two more[A]four it is</s>"),
        (
            CHAT_TEMPLATE,
            ["two<|end|>", "four it is<|end|>"],
            "<|system|>be brief<|end|><|user|>one and one<|end|><|assistant|>two<|end|><|user|>and two more<|end|>"
            "<|assistant|>four it is<|end|>",
        ),
        (
            THINKING,
            ["two<|im_end|>", "<think>\n\n</think>\n\nfour it is<|im_end|>"],
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none and one<|im_end|>\n<|im_start|>assistant\n"
            "two<|im_end|>\n<|im_start|>user\nand two more<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            "four it is<|im_end|>",
        ),
        (
            UNCLOSED,
            ["two", "four it is</s>"],
            "system: be brief\nuser: one and one\nassistant: two\nuser: and two more\nassistant: four it is</s>",
        ),
    ],
    ids=["chatml", "llama3", "alpaca", "plain", "marked", "ours", "thinking", "unclosed"],
)
def test_every_answer_with_its_end_is_learned_and_nothing_else(
    folder: Path, jinja: str, answers: list[str], text: str
) -> None:
    assert learned(folder, jinja)[:2] == (answers, text)
    assert learned(folder, jinja, train_on="last_answer")[:2] == (answers[1:], text)
    assert learned(folder, jinja, train_on="all")[0] == [learned(folder, jinja, train_on="all")[1]]


def test_a_marked_template_is_read_as_transformers_reads_it(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder), template(folder, MARKED))
    theirs = tokenizer.apply_chat_template(TALK.turns, return_assistant_tokens_mask=True, return_dict=True)
    ((row,), _) = encode([TALK], tokenizer, Recipe(str(folder)))
    assert row.ids == theirs["input_ids"]
    assert [int(label != IGNORE) for label in row.labels] == theirs["assistant_masks"]


def test_a_prompt_for_generation_is_what_the_answer_follows_in_training(folder: Path) -> None:
    for name in TEMPLATES:
        tokenizer = load_tokenizer(str(folder), name)
        text, spans = answers_in(TALK.turns, tokenizer)
        asked = tokenizer.apply_chat_template(TALK.turns[:-1], add_generation_prompt=True, tokenize=False)
        assert text.startswith(asked) and spans[-1][0] == len(asked)
        assert text[: spans[-1][1]].endswith(tokenizer.eos_token)  # generation stops there


def test_a_template_that_rewrites_its_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"talk: .*writes a prompt otherwise"):
        learned(folder, REWRITING)
    with pytest.raises(UserError, match=r"talk: the chat template does not take"):
        learned(folder, "{{ raise_exception('no system messages') }}")
    for faulty in ("{{ messages[0]['content'] + 1 }}", MARKED + "{{ 1 // 0 }}"):
        with pytest.raises(UserError, match=r"talk: the chat template does not take"):
            learned(folder, faulty)


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "has no chat template: give chat_template=alpaca"), ("chatlm", "did you mean chatml"), ("/no", "Jinja file")],
)
def test_a_template_that_is_not_there_says_what_to_type(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(folder), name)


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    from workloads.tokenizer import train_tokenizer

    train_tokenizer(WORDS, 300, 64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"chatml needs the token <\|im_start\|>"):
        load_tokenizer(str(tmp_path), "chatml")
    assert load_tokenizer(str(tmp_path)).eos_token == "<|end|>"


def test_generation_stops_at_the_end_token_of_the_template(folder: Path, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(str(folder), "chatml")
    tokenizer.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=1).save_pretrained(tmp_path)
    for _ in range(2):
        end_generation(tmp_path)
        ends = GenerationConfig.from_pretrained(tmp_path).eos_token_id
        assert ends == [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_long_row_loses_its_beginning_and_is_counted(folder: Path) -> None:
    _, whole, full = learned(folder, "chatml")
    answers, text, counts = learned(folder, "chatml", max_length=full.tokens - 7)
    assert answers == ["two<|im_end|>", "four it is<|im_end|>"]
    assert whole.endswith(text)
    assert (counts.rows_cut, counts.answers_cut, counts.tokens_lost) == (1, 0, 7)
    assert (counts.tokens, counts.longest) == (full.tokens - 7, full.tokens)


def test_an_answer_that_is_longer_than_all_loses_its_end(folder: Path) -> None:
    row = Conversation([Message("user", "hm"), Message("assistant", "two and " * 9)], "long")
    answers, _, counts = learned(folder, "chatml", row, max_length=8)
    assert len(answers) == 1 and ("two and " * 9).startswith(answers[0])
    assert (counts.tokens, counts.targets, counts.rows_cut, counts.answers_cut) == (8, 7, 1, 1)
    assert counts.shortest_answer > 8


def test_rows_without_an_answer_are_dropped_and_counted(folder: Path) -> None:
    silent = Conversation([Message("user", "hm"), Message("assistant", " ")], "silent")
    mute = Conversation([*TALK.messages[:4], Message("assistant", "")], "mute")
    recipe = Recipe(str(folder), "alpaca", train_on="last_answer")
    rows, counts = encode([silent, TALK, mute], load_tokenizer(str(folder), "alpaca"), recipe)
    assert [row.sources for row in rows] == [("talk",)]
    assert (counts.rows, counts.rows_dropped) == (1, 2)


def test_counts_of_parts_add_up(folder: Path) -> None:
    tokenizer, recipe = load_tokenizer(str(folder), "alpaca"), Recipe(str(folder), "alpaca", max_length=40)
    short = Conversation([Message("user", "hm"), Message("assistant", "two")], "short")
    whole = encode([TALK, short, TALK], tokenizer, recipe)[1]
    parts = [encode([row], tokenizer, recipe)[1] for row in (TALK, short, TALK)]
    assert dataclasses.asdict(sum(parts, Counts())) == dataclasses.asdict(whole)
    assert whole.rows_cut == 2
