"""Share of the words that stand where they should.

For `evaluate.load`, whose scanner of imports knows `import X` and `from X import Y` on one line, and nothing else.
"""

from __future__ import annotations

import datasets
import evaluate

from slimmoe_hf.generation_evaluation import score_answers

_DESCRIPTION = """
Share of the places, of the longer of the two, where an answer and its reference have the same word. With answers of one
word it is the accuracy of a classification, as of `evaluate`'s own metric of this name, whose labels are numbers.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the answers.
    references (list of str): what each should have been.

Returns:
    accuracy (float): the mean over the answers, from 0 to 1.
"""


class Accuracy(evaluate.Metric):
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
        return {"accuracy": score_answers(predictions, references).accuracy}
