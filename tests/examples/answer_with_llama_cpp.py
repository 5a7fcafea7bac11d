"""Answer the questions of `snap ask` with a server of llama-cpp-python: tokens and their steps.

    python -m llama_cpp.server --model FILE.gguf --logits_all true --port 8123
    python answer_with_llama_cpp.py QUESTIONS TOKENIZER.json ANSWERS

The server takes prompts as text and names tokens by their text, so the tokenizer must be at hand.
It returns no distribution after the first token of a prompt: prompts are not answered.
"""

import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

SERVER = "http://127.0.0.1:8123"
FIRST = 40  # of which 20 with a text of their own are kept


def post(path: str, body: dict[str, Any]) -> Any:
    """Return what the server answers."""
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(SERVER + path, data, kind), timeout=600) as answer:
        return json.load(answer)


def answer(asked: Path, tokenizer: Path, out: Path, version: str) -> None:
    """Answer each case whose prompt the server splits into the same tokens."""
    questions, found = json.loads((asked / "questions.json").read_text()), {}
    splitter = Tokenizer.from_file(str(tokenizer))
    numbers = range(splitter.get_vocab_size())
    ids = {splitter.decode([i], skip_special_tokens=False): i for i in numbers}
    # The server has no text for special tokens. The only likely one is the end token.
    ids[""] = questions["config"]["eos_token_id"]
    for case in questions["cases"]:
        own = [i for i, real in zip(case["input_ids"], case["attention_mask"], strict=True) if real]
        prompt = splitter.decode(own, skip_special_tokens=False)
        # This path puts a first token before the prompt's; completions do not.
        if post("/extras/tokenize", {"input": prompt})["tokens"][-len(own) :] != own:
            print(f"{case['name']}: the server has other tokens")
            continue
        greedy = {"max_tokens": case["max_new_tokens"], "temperature": 0, "repeat_penalty": 1}
        body = {"prompt": prompt, "logprobs": FIRST, **greedy}
        choice = post("/v1/completions", body)["choices"][0]
        steps = choice["logprobs"]["top_logprobs"]
        ranked = [
            sorted(((v, ids[t]) for t, v in step.items() if t in ids))[::-1] for step in steps
        ]
        new = [step[0][1] for step in ranked]
        ends = [n for n, token in enumerate(new, 1) if token in case["eos_token_ids"]]
        new, ranked = new[: ends[0] if ends else None], ranked[: ends[0] if ends else None]
        name, best = f"{case['name']}/generate", [step[:20] for step in ranked]
        if choice["finish_reason"] == "stop" and not ends:  # the server leaves the end token out
            new += case["eos_token_ids"][:1]
        else:
            found[f"{name}.topk_ids"] = torch.tensor([[i for _, i in step] for step in best])
            found[f"{name}.topk_logprobs"] = torch.tensor([[v for v, _ in step] for step in best])
        found[f"{name}.token_ids"] = torch.tensor(new)
    out.mkdir(parents=True)
    save_file(found, out / "answers.safetensors")
    who = {"engine": "llama.cpp", "version": version, "device": "cpu", "dtype": "q4_1"}
    who |= {"schema": "snap-answers/1", "golden": questions["golden"]}
    header = {
        **who,
        "checkpoint": list(questions["weights"].values()),
        "note": "from the GGUF file",
    }
    (out / "answers.json").write_text(json.dumps(header))


if __name__ == "__main__":
    answer(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), "")
