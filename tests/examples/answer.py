"""Answer the questions of `snap ask` with FMS's idefics3. Nothing of snap is needed."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def answer(model: Any, asked: Path, out: Path, **who: object) -> None:
    """Write the new tokens of each case, and 20 log-probabilities for each token."""
    questions, found = json.loads((asked / "questions.json").read_text()), {}
    inputs = load_file(asked / "questions.safetensors")
    model.requires_grad_(False)
    for case in questions["cases"]:
        given = {key: inputs[f"{case['name']}/{key}"] for key in case["inputs"]}
        ids, mask = given["input_ids"], given["attention_mask"]
        images = {key: given[key][None] for key in given if key.startswith("pixel_")}
        ends = {"max_new_tokens": case["max_new_tokens"], "eos_token_id": case["eos_token_ids"][0]}
        whole = model.generate(input_ids=ids, attention_mask=mask, **images, **ends)
        prompt, seen = ids.shape[1], mask.new_ones(whole.shape)
        seen[:, :prompt] = mask
        logits = model(input_ids=whole, attention_mask=seen, **images)[0]
        best = logits.log_softmax(-1).topk(20)
        found[f"{case['name']}/generate.token_ids"] = whole[0, prompt:].clone()
        for part, rows in (("forward", slice(prompt)), ("generate", slice(prompt - 1, -1))):
            found[f"{case['name']}/{part}.topk_ids"] = best.indices[rows].clone()
            found[f"{case['name']}/{part}.topk_logprobs"] = best.values[rows].clone()
    out.mkdir()
    save_file(found, out / "answers.safetensors")
    header = {"schema": "snap-answers/1", "golden": questions["golden"], **who}
    (out / "answers.json").write_text(json.dumps(header))
