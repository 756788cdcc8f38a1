"""Answer a question from the documents: search Milvus, give the passages to a served model, print its sources.

    workbench serve ask "how do I read a parquet file in parallel" configs/demo/ask.yaml

Two modes. ``free``: the model writes an answer and cites passages by number. ``quote``: the model chooses one sentence
of the passages under vLLM's guided decoding (``structured_outputs``), so the answer is always a quotation with its
source; this suits models that are too small to write.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from data_pipelines.store import MilvusUri
from serve.citations import NOT_FOUND, cited, load_template, prompt
from serve.endpoint import DEFAULT_URL, choose_model, context_length, count_tokens, open_client, served_models
from serve.passages import preference, rank, sentences
from serve.retrieval import Documents, wordings
from workbench.config import Config, InputPath, OutputPath
from workbench.errors import Failure, UserError
from workbench.runs import Run, Summary

if TYPE_CHECKING:
    import openai

    from data_pipelines.search import Hit

TEMPLATE_TOKENS = 48
"""Kept free for the chat template's own tokens, which no endpoint counts for us."""

QUOTE = "Choose the sentence that answers the question."
SENTENCE_CHARACTERS = (20, 300)


class AskConfig(Config):
    """A question, where to look and whom to ask."""

    question: str = Field(description="The question", min_length=1)
    uri: MilvusUri = Field(default="runs/milvus/documents.db", description="Milvus Lite folder NAME.db, or a server")
    collection: str = Field(default="documents", description="Collection to search")
    embedding_model: str = Field(default="", description="Where the collection's model lies now; empty: where it lay")
    limit: int = Field(default=4, ge=1, le=50, description="Passages to retrieve")
    search: Literal["dense", "keywords", "hybrid"] = Field(
        default="dense", description="dense: by meaning; keywords: by words (BM25); hybrid: both, ranks fused"
    )
    queries: int = Field(default=1, ge=1, le=8, description="Wordings to search with; the model writes the others")
    threshold: float = Field(default=0.0, description="Best dense score below which the documents have no answer")
    template: InputPath | None = Field(default=None, description="Jinja file of the prompt in mode free")
    mode: Literal["free", "quote"] = Field(
        default="free", description="free: write an answer; quote: choose a sentence"
    )
    candidates: int = Field(default=8, ge=1, description="Sentences the model may choose from in mode quote")
    base_url: str = Field(default=DEFAULT_URL, description="OpenAI-compatible endpoint")
    model: str | None = Field(default=None, description="Served model; default: the endpoint's last")
    api_key_file: OutputPath | None = Field(
        default=None, description="File of the API key; default OPENAI_API_KEY, else the key that 'serve up' made"
    )
    max_tokens: int = Field(default=256, ge=1, description="Longest answer in mode free")
    temperature: float = Field(default=0.0, ge=0, description="Sampling temperature; 0 takes the likeliest token")
    timeout: float = Field(default=120.0, gt=0, description="Seconds to wait for the answer")


@dataclass(frozen=True)
class Answer:
    """What the model said, and which hits (by position) it rests on."""

    text: str
    cited: list[int]
    prompt_tokens: int


def run(config: AskConfig, run: Run) -> Summary:
    """Retrieve, ask, and return the answer with its numbered sources."""
    load_template(config.template)
    with open_client(config.base_url, config.api_key_file, config.timeout) as client:
        model = choose_model(served_models(client), config.model)
        documents = Documents(config.uri, config.collection, config.embedding_model)
        asked = wordings(config.question, config.queries, lambda text: _chat(client, model, config, text, 256)[0])
        found = documents.find(asked, config.limit, config.search, config.threshold)
        hits = found.hits
        if not hits:
            raise Failure(f"the collection '{config.collection}' has no passage for this question")
        if found.weak:
            run.say(f"the nearest passage scores {found.nearest:.3f}, below {config.threshold:g}")
            answer = Answer(NOT_FOUND, [], 0)
        else:
            run.say(f"{len(hits)} passages found, asking {model} (mode {config.mode})")
            answer = answer_from(client, model, config, hits, context_length(client, model))
    rows = [
        {"number": i, "used": i - 1 in answer.cited, "score": hit.score, "title": hit.title, "source": hit.source,
         "text": hit.text}
        for i, hit in enumerate(hits, 1)
    ]  # fmt: skip
    if not answer.text:
        run.say(f"{model} gave an empty answer")
    run.report.text(f"Answer of {model} (mode {config.mode})", f"{config.question}\n\n{answer.text}")
    run.report.table("Passages", rows)
    return {
        "question": config.question,
        "answer": answer.text,
        "mode": config.mode,
        "model": model,
        "cited": ", ".join(f"[{i + 1}]" for i in answer.cited),
        "prompt_tokens": answer.prompt_tokens,
        **{f"[{i}]": f"{hit.title} ({hit.source}, score {hit.score:.3f})" for i, hit in enumerate(hits, 1)},
    }


def answer_from(client: "openai.OpenAI", model: str, config: AskConfig, hits: "list[Hit]", context: int) -> Answer:
    """The answer of ``model``, which has ``context`` tokens, from ``hits``, in the configured mode.

    Raises UserError if the passages cannot fit, Failure if the endpoint gives no proper answer.
    """
    ask = _quote if config.mode == "quote" else _free
    return ask(client, model, config, hits, context)


def _free(client: "openai.OpenAI", model: str, config: AskConfig, hits: "list[Hit]", context: int) -> Answer:
    """An answer in the model's own words over the passages that fit its context."""
    template = load_template(config.template)
    bare = prompt(template, config.question, [], 0)
    fixed = count_tokens(client, model, bare) + TEMPLATE_TOKENS + 8 * len(hits)
    budget = context - config.max_tokens - fixed
    if budget < 16 * len(hits):
        raise UserError(
            f"model '{model}' has {context} tokens of context: no room for {len(hits)} passages beside "
            f"max_tokens={config.max_tokens}; lower max_tokens or limit, or use mode=quote"
        )
    asked = prompt(template, config.question, hits, budget, lambda text: count_tokens(client, model, text))
    text, tokens = _chat(client, model, config, asked, config.max_tokens)
    return Answer(text, [number - 1 for number in cited(text, len(hits))[0]], tokens)


def _quote(client: "openai.OpenAI", model: str, config: AskConfig, hits: "list[Hit]", context: int) -> Answer:
    """One sentence of the passages, chosen by the model among those that share most with the question."""
    origin: dict[str, int] = {}
    for position, hit in enumerate(hits):
        for sentence in sentences(hit.text):
            if SENTENCE_CHARACTERS[0] <= len(sentence) <= SENTENCE_CHARACTERS[1]:
                origin.setdefault(sentence, position)
    texts = list(origin)
    budget = context - TEMPLATE_TOKENS - count_tokens(client, model, f"{QUOTE}\nQuestion: {config.question}")
    chosen: list[str] = []
    longest = 0
    preferred = preference([hit.score for hit in hits])
    weights = [preferred[position] for position in origin.values()]
    for index in rank(config.question, texts, weights)[: config.candidates]:
        length = count_tokens(client, model, f"- {texts[index]}\n") + 1
        longest_then = max(longest, length)
        if budget - length >= longest_then - longest:  # the prompt's copy, and room to write the longest out again
            chosen.append(texts[index])
            budget -= length + longest_then - longest
            longest = longest_then
    if not chosen:
        raise Failure(f"no sentence of the passages fits the {context} tokens of model '{model}'")
    listed = "\n".join(f"- {sentence}" for sentence in chosen)
    body = {"structured_outputs": {"choice": chosen}}
    asked = f"{QUOTE}\n{listed}\nQuestion: {config.question}"
    # Room to spare, for the model may spell a sentence in more tokens than the tokenizer would. Where even that is cut
    # short, what was written begins one of the sentences, and so names it.
    text, tokens = _chat(client, model, config, asked, min(2 * longest, longest + budget), body)
    begun = [sentence for sentence in chosen if text and sentence.startswith(text)]
    if not begun:
        raise Failure(f"the endpoint does not keep to structured_outputs (it answered {text[:80]!r}): use mode=free")
    return Answer(begun[0], [origin[begun[0]]], tokens)


def _chat(client: "openai.OpenAI", model: str, config: AskConfig, prompt: str, max_tokens: int,
          extra_body: dict[str, Any] | None = None) -> tuple[str, int]:  # fmt: skip
    """The model's answer and the tokens of the prompt. Raises Failure with the endpoint's reason."""
    import openai

    try:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],  # not every chat template has a system role
            max_tokens=max_tokens,
            temperature=config.temperature,
            extra_body=extra_body,
        )
    except openai.OpenAIError as error:
        raise Failure(f"{config.base_url} gave no answer: {error}") from None
    return (answer.choices[0].message.content or "").strip(), answer.usage.prompt_tokens if answer.usage else 0
