"""How alike an answer is to another: ROUGE-L of a pair, BLEU of a set."""

from collections.abc import Sequence

from data_pipelines.words import words_of


def rouge_l(reference: str, answer: str) -> float:
    """F1 of the longest common subsequence of words (Lin, 2004), case and punctuation aside; 1 for two empty texts."""
    from rapidfuzz.distance import LCSseq

    first, second = words_of(reference), words_of(answer)
    if not first or not second:
        return float(first == second)
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second))


def bleu(references: Sequence[str], answers: Sequence[str]) -> float:
    """Corpus BLEU as ``sacrebleu`` counts it, from 0 to 100, one reference an answer."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score)
