"""What int4 weights cost: perplexity of the stock builder's graph by quantization method, and the size of its data.

    python benchmarks/int4_methods.py --out benchmarks/results/int4_methods.json
    python benchmarks/int4_methods.py --quick           # a look, below 3 minutes

The model is dense and its cache is full, so that nothing but the weights differs. A method is a set of options of
onnxruntime-genai's model builder; `thinkkv export --quantize int4 --builder-option KEY=VALUE` takes the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from environment import save
from export_equality import text_ids
from export_speed import build_stock

from thinkkv.export.onnx.generate import GENAI_FILE
from thinkkv.export.onnx.session import GRAPH_FILE
from thinkkv.sdk import models

METHODS = {
    "float32": ("fp32", ()),
    "int8": ("int8", ()),
    "int4": ("int4", ()),
    "int4 k_quant": ("int4", ("algo_config=k_quant",)),
    "int4 block_size=16": ("int4", ("block_size=16",)),
    "int4 k_quant_last": ("int4", ("algo_config=k_quant_last",)),
    "int4 k_quant_mixed": ("int4", ("algo_config=k_quant_mixed",)),
}


def main() -> None:
    """Build each, score the same text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=3000, help="of text that is scored")
    parser.add_argument("--scratch", type=Path, help="folder for the bundles")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a look: float32 and int4, 300 tokens")
    arguments = parser.parse_args()
    methods = METHODS
    if arguments.quick:
        arguments.tokens, methods = 300, {name: METHODS[name] for name in ("float32", "int4")}
    model, tokenizer = models.load(arguments.model, dtype="float32")
    ids = text_ids(tokenizer)[-arguments.tokens :]
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        for number, (name, (precision, options)) in enumerate(methods.items()):
            folder = Path(scratch) / str(number)
            build_stock(checkpoint, folder, *options, precision=precision)
            size = (folder / f"{GRAPH_FILE}.data").stat().st_size
            rows.append({"weights": name, "perplexity": _perplexity(folder, ids), "data_bytes": size})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        save(arguments.out, {"scored": len(ids) - 1, "rows": rows})


def _perplexity(folder: Path, ids: list[int]) -> float:
    """Of all tokens but the first, in one forward."""
    session = onnxruntime.InferenceSession(str(folder / GRAPH_FILE), providers=["CPUExecutionProvider"])
    inputs: dict[str, Any] = {
        "input_ids": np.array([ids], np.int64),
        "attention_mask": np.ones((1, len(ids)), np.int64),
    }
    decoder = json.loads((folder / GENAI_FILE).read_text())["model"]["decoder"]
    empty = np.empty((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    inputs |= {value.name: empty for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    (logits,) = session.run(["logits"], inputs)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits[0, :-1]), torch.tensor(ids[1:]))
    return round(loss.exp().item(), 2)


if __name__ == "__main__":
    main()
