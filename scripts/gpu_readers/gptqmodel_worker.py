"""Continue prompts in transformers over GPTQModel: FOLDER PROMPTS N_NEW; PROMPTS is a JSON list."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load, continue, answer."""
    folder, prompts, n_new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device)
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        length = {"min_new_tokens": n_new, "max_new_tokens": n_new}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
        answers.append({"prompt": ids[0].tolist(), "new": made[0, ids.shape[1] :].tolist()})
    print("ANSWERS" + json.dumps(answers))


if __name__ == "__main__":
    main()
