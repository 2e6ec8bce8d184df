"""Perplexity of a checkpoint on texts, by the convention of `slimmoe eval`.

For `evaluate.load`, whose scanner of imports knows `import X` and `from X import Y` on one line, and nothing else.
"""

from __future__ import annotations

import datasets
import evaluate
import torch

from slimmoe_hf.evaluation import held_out, measure_loss
from slimmoe_hf.families import refuse_encoder_decoder
from slimmoe_hf.loading import find_checkpoint, load_config, load_model, load_tokenizer

_DESCRIPTION = """
exp of the mean loss per token, by the convention of `slimmoe eval`: every text is one document, ended with the
end-of-text token; all are concatenated and cut into rows of `max_length` tokens, the rest is dropped, and the mean is
over the T - 1 predicted tokens of every row. Unlike `evaluate`'s own metric of this name it does not depend on padding,
on the batch size, or on texts being shorter than the window. Models with different tokenizers cannot be compared by it:
compare their bits per byte.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the texts, one document each.
    model_id (str): folder or Hub id of a checkpoint; its tokenizer is used.
    max_length (int): T, tokens per row. Default: 1024.
    batch_size (int): rows at a time; the result does not depend on it. Default: 8.
    device (str): where to run. Default: a GPU where there is one.

Returns:
    perplexity (float), loss (float, nats per token), bits_per_byte (float), tokens (int, predicted tokens).
"""


class Perplexity(evaluate.Metric):
    """See the description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model_id: str,
        max_length: int = 1024,
        batch_size: int = 8,
        device: str | None = None,
    ) -> dict[str, float | int]:
        if not any(predictions):
            raise ValueError("perplexity needs text: all predictions are empty.")
        path = find_checkpoint(model_id)
        refuse_encoder_decoder(load_config(path, shared=True), "perplexity")
        model = load_model(path, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        data = held_out(datasets.Dataset.from_dict({"text": predictions}), load_tokenizer(path), max_length)
        loss = measure_loss(model, data.rows_NT, batch_size, progress=False).loss
        return {
            "perplexity": float(torch.tensor(loss, dtype=torch.float64).exp()),
            "loss": loss,
            "bits_per_byte": data.bits_per_byte(loss),
            "tokens": data.tokens,
        }
