"""Metrics for the `evaluate` library, shipped with the package: nothing is downloaded.

```python
import evaluate
from slimmoe_hf.metrics import metric_path

perplexity = evaluate.load(metric_path("perplexity"))
perplexity.compute(predictions=texts, model_id="my-run/model", max_length=1024)
```
"""

from __future__ import annotations

from pathlib import Path

METRICS = ("perplexity", "expert_load_balance", "exact_match", "token_f1", "accuracy")


def metric_path(name: str) -> str:
    """The folder of a metric, as `evaluate.load` takes it.

    Args:
        name: One of `METRICS`.

    Raises:
        ValueError: There is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r}: unknown; there are {', '.join(METRICS)}.")
    return str(Path(__file__).parent / name)
