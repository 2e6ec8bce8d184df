"""Share of the answers that are their reference.

For `evaluate.load`, whose scanner of imports knows `import X` and `from X import Y` on one line, and nothing else.
"""

from __future__ import annotations

import datasets
import evaluate

from slimmoe_hf.generation_evaluation import score_answers

_DESCRIPTION = """
Share of the answers that are their reference letter by letter; how much white space is between the words does not
count. Capitals, punctuation and articles do, unlike in SQuAD's script.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the answers.
    references (list of str): what each should have been.

Returns:
    exact_match (float): the mean over the answers, from 0 to 1.
"""


class ExactMatch(evaluate.Metric):
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
        return {"exact_match": score_answers(predictions, references).exact_match}
