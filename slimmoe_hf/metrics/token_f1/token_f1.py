"""F1 of the words that answers share with their references (SQuAD).

For `evaluate.load`, whose scanner of imports knows `import X` and `from X import Y` on one line, and nothing else.
"""

from __future__ import annotations

import datasets
import evaluate

from slimmoe_hf.generation_evaluation import score_answers

_DESCRIPTION = """
SQuAD's F1 (arXiv 1606.05250), from 0 to 1, against one reference each: of the words that an answer and its reference
share, in any order, in small letters, without punctuation and without the words a, an and the.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the answers.
    references (list of str): what each should have been.

Returns:
    token_f1 (float): the mean over the answers, from 0 to 1.
"""


class TokenF1(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {"token_f1": score_answers(predictions, references).token_f1}
