"""ExLlamaV2 over a folder, in its own environment: FOLDER PROMPTS N_NEW [ROWS LOGITS].

PROMPTS is a JSON list of texts that are continued. ROWS is a file with a JSON list of lists of ids; their
logits go to the safetensors file LOGITS, halves (n, vocabulary) each, by the number of the row, with a line
that says what they were made with.
"""

import json
import sys
from pathlib import Path

import exllamav2
import torch
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
from exllamav2.attn import has_flash_attn, has_xformers
from safetensors.torch import save_file

PAGE = 256


def main() -> None:
    """Load, give the rows' logits, continue the prompts token by token, answer."""
    folder, prompts, n_new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    rows = json.loads(Path(sys.argv[4]).read_text("ascii")) if len(sys.argv) > 4 else []
    config = ExLlamaV2Config(folder)
    longest = max([1024, *map(len, rows)])
    config.max_seq_len = longest + -longest % PAGE
    # Where flash-attn is missing: 0.3.2 gives PyTorch's own attention no causal mask.
    config.no_sdpa = True
    model = ExLlamaV2(config)
    model.load()
    cache = ExLlamaV2Cache(model, max_seq_len=config.max_seq_len)
    if rows:
        save_file(row_logits(model, cache, rows), sys.argv[5], {"ran": ran_with()})
    tokenizer = ExLlamaV2Tokenizer(config)
    answers = [continued(model, cache, tokenizer, prompt, n_new) for prompt in prompts]
    print("ANSWERS" + json.dumps(answers))


def row_logits(model: ExLlamaV2, cache: ExLlamaV2Cache, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return the logits of every position of every row."""
    found = {}
    for number, row in enumerate(rows):
        cache.current_seq_len = 0
        logits = model.forward(torch.tensor([row]), cache, cpu_logits=True)
        found[str(number)] = logits[0].cpu().half().contiguous()
    return found


def continued(
    model: ExLlamaV2, cache: ExLlamaV2Cache, tokenizer: ExLlamaV2Tokenizer, prompt: str, n_new: int
) -> dict[str, list[int]]:
    """Return a prompt's ids and the likeliest new ones."""
    cache.current_seq_len = 0
    ids = tokenizer.encode(prompt, add_bos=True)
    step, new = ids, list[int]()
    for _ in range(n_new):
        step = model.forward(step, cache)[:, -1].argmax(-1, keepdim=True).cpu().to(torch.long)
        new.append(int(step))
    return {"prompt": ids[0].tolist(), "new": new}


def ran_with() -> str:
    """Return versions, device and kind of attention."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    attention = "flash-attn" if has_flash_attn else "xformers" if has_xformers else "plain attention"
    return f"exllamav2 {exllamav2.__version__}, torch {torch.__version__}, {device}, {attention}"


if __name__ == "__main__":
    main()
