"""Answer the questions of `snap ask` with a server of vLLM. Not run: vLLM was not installed here.

vllm serve CHECKPOINT --dtype float32 --max-logprobs 20
python answer_with_vllm.py QUESTIONS CHECKPOINT ANSWERS
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from safetensors.torch import save_file

SERVER = "http://127.0.0.1:8000/v1/completions"


def best(step: dict[str, Any]) -> list[tuple[float, int]]:
    """Return the 20 best of a position, whose tokens are named "token_id:5" or "5"."""
    values = {k: v["logprob"] if isinstance(v, dict) else v for k, v in step.items()}
    return sorted(((v, int(k.rpartition(":")[2])) for k, v in values.items()), reverse=True)[:20]


def answer(asked: Path, checkpoint: Path, out: Path) -> None:
    """Write tokens, and 20 log-probabilities for each token of prompts and answers."""
    questions, found = json.loads((asked / "questions.json").read_text()), {}
    for case in questions["cases"]:
        pairs = zip(case["input_ids"], case["attention_mask"], strict=True)
        body = {
            "model": str(checkpoint), "prompt": [i for i, real in pairs if real], "temperature": 0,
            "max_tokens": case["max_new_tokens"], "stop_token_ids": case["eos_token_ids"],
            "logprobs": 20, "prompt_logprobs": 20, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        request = Request(SERVER, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=600) as reply:
            choice = json.load(reply)["choices"][0]
        steps = [best(step) for step in choice["logprobs"]["top_logprobs"]]
        # What chooses the first new token is also what follows the prompt's last one.
        prompt = [*(best(step) for step in choice["prompt_logprobs"][1:]), steps[0]]
        found[f"{case['name']}/generate.token_ids"] = torch.tensor([step[0][1] for step in steps])
        for part, rows in (("forward", prompt), ("generate", steps)):
            for index, kind in enumerate(("logprobs", "ids")):
                values = torch.tensor([[entry[index] for entry in row] for row in rows])
                found[f"{case['name']}/{part}.topk_{kind}"] = values
    out.mkdir(parents=True)
    save_file(found, out / "answers.safetensors")
    weights = [(checkpoint / name).read_bytes() for name in questions["weights"]]
    header = {
        "schema": "snap-answers/1", "golden": questions["golden"], "engine": "vllm", "version": "",
        "device": "cpu", "dtype": "float32",
        "checkpoint": [hashlib.sha256(data).hexdigest() for data in weights],
    }  # fmt: skip
    (out / "answers.json").write_text(json.dumps(header))


if __name__ == "__main__":
    answer(*map(Path, sys.argv[1:4]))
