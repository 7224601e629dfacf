"""How far the predictions of a 4-bit base are from those of the 16-bit one: bitsandbytes' codes, and calibrated ones.

    qlora load MODEL --calibrate DATA --save CALIBRATED
    python benchmarks/calibrated_divergence.py MODEL CALIBRATED TEXT…

prints the mean KL divergence, in nats a token, on the given text files, and the ratio. All three models are loaded by
plain transformers and compute in fp32.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

MOST_TOKENS = 512  # of a text


def predictions(name: str, texts: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Return the log-probabilities of a model, `(tokens, vocabulary)` for each text of `(1, tokens)` ids."""
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return [log_softmax(model(input_ids=ids).logits[0].float(), -1) for ids in texts]


def divergence(exact: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the mean divergence of `other` from `exact`, in nats a token."""
    sums = [kl_div(two, one, log_target=True, reduction="sum") for one, two in zip(exact, other, strict=True)]
    return float(sum(sums)) / sum(map(len, exact))


def main() -> None:
    """Compare, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibrated")
    parser.add_argument("texts", nargs="+", type=Path)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model, trust_remote_code=False)
    texts = [
        torch.tensor([tokenizer(path.read_text(encoding="utf-8")).input_ids[:MOST_TOKENS]]) for path in given.texts
    ]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    exact = predictions(given.model, texts)
    plain = divergence(exact, predictions(given.model, texts, quantization_config=nf4))
    calibrated = divergence(exact, predictions(given.calibrated, texts))
    figures = {"tokens": sum(map(len, exact)), "nf4": plain, "calibrated": calibrated, "ratio": calibrated / plain}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
