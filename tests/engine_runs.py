"""Runs one engine over exported models, in a Python that has it: `python engine_runs.py mlx FOLDER IDS`.

Prints JSON: name -> greatest difference of a logit from what is expected, or the error. Imports nothing of ours.
"""

import json
import sys
from pathlib import Path


def transformers4(folder, ids):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = json.loads((Path(folder).parent / "tokens.json").read_text())
    assert AutoTokenizer.from_pretrained(folder)(tokens["text"]).input_ids == tokens["ids"]
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    assert not any(found.values()), found
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].tolist()


def mlx(folder, ids):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder))
    return model(mx.array([ids]))[0].tolist()


def convert(folder, ids):
    """llama.cpp's converter, without a vocabulary: it refuses those that it has not seen."""
    from conversion import base, load_all_models

    load_all_models()
    for known in base.ModelBase._model_classes[base.ModelType.TEXT].values():
        known.set_vocab = lambda self: self._set_vocab_none()
    import convert_hf_to_gguf

    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f32", "--outfile", str(Path(folder) / "model.gguf")]
    convert_hf_to_gguf.main()


def main():
    run, folder, ids = {"mlx": mlx, "transformers4": transformers4, "llama.cpp": convert}[sys.argv[1]], *sys.argv[2:]
    found, ids = {}, json.loads(ids)
    for name, expected in json.loads((Path(folder) / "expected.json").read_text()).items():
        try:
            got = run(str(Path(folder) / name), ids)
            rows = zip(got, expected, strict=True) if got is not None else ()
            found[name] = max((abs(a - b) for row in rows for a, b in zip(*row, strict=True)), default=0.0)
        except Exception as error:  # whatever an engine says of it
            found[name] = f"{type(error).__name__}: {error}"
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
