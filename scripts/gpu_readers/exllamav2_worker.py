"""Continue prompts in ExLlamaV2, in its own environment: FOLDER PROMPTS N_NEW; PROMPTS is a JSON list."""

import json
import sys

import torch
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer


def main() -> None:
    """Load, continue token by token, answer."""
    folder, prompts, n_new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    config = ExLlamaV2Config(folder)
    config.max_seq_len = 1024
    model = ExLlamaV2(config)
    model.load()
    tokenizer = ExLlamaV2Tokenizer(config)
    answers = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt, add_bos=True)
        known = ids[0].tolist()
        cache = ExLlamaV2Cache(model, max_seq_len=1024)
        step = ids
        for _ in range(n_new):
            logits = model.forward(step, cache)
            step = logits[:, -1].argmax(-1, keepdim=True).cpu().to(torch.long)
            known.append(int(step))
        answers.append({"prompt": ids[0].tolist(), "new": known[ids.shape[1] :]})
    print("ANSWERS" + json.dumps(answers))


if __name__ == "__main__":
    main()
