"""Languages of many texts at once are those that py3langid tells of each alone."""

from hypothesis import given, settings
from hypothesis import strategies as st
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from data_pipelines.language import CONFIDENCE, LANGUAGE_CHARACTERS, languages

ALONE = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=CONFIDENCE)
SAMPLES = [
    "The river that runs below the old town has been to the people of the valley what a road is to others.",
    "Der Fluss unterhalb der alten Stadt ist für die Leute im Tal, was für andere eine Straße ist.",
    "La rivière qui coule sous la vieille ville est aux gens de la vallée ce qu'une route est aux autres.",
    "Река, что течёт под старым городом, для жителей долины то же, что для других дорога.",
    "旧市街の下を流れる川は、谷の人々にとって、ほかの人々にとっての道のようなものである。",
    "LA RIVIÈRE QUI COULE SOUS LA VIEILLE VILLE",
    "static int __init probe(struct device *dev)",
    "0 1 2 3",
    "e\u0301te\u0301",
    "\x00\x01",
    "a",
    "",
]


def alone(text: str) -> str:
    label: str = ALONE.classify(text[:LANGUAGE_CHARACTERS])[0]
    return label if text else "und"


def test_known_languages() -> None:
    found = languages(SAMPLES)
    assert found[:5] == ["en", "de", "fr", "ru", "ja"]
    assert found == [alone(text) for text in SAMPLES]
    assert languages([]) == []
    assert languages([""]) == ["und"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.text(max_size=260), st.sampled_from(SAMPLES).map(lambda t: t * 3)), max_size=12))
def test_a_batch_is_told_as_each_text_alone(texts: list[str]) -> None:
    assert languages(texts) == [alone(text) for text in texts]
