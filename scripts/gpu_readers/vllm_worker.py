"""Continue prompts in vLLM, in its own environment: FOLDER PROMPTS N_NEW; PROMPTS is a JSON list.

The last prompt goes in as a chat where the folder has a template: it must not get a second BOS.
"""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    """Load, continue, answer."""
    folder, prompts, n_new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    model = LLM(folder, max_model_len=1024, dtype="float16", enforce_eager=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=n_new, ignore_eos=True)
    outputs = model.generate(prompts, sampling)
    if model.get_tokenizer().chat_template:
        chat = [{"role": "user", "content": prompts[-1]}]
        outputs[-1] = model.chat(chat, sampling)[0]
    answers = [
        {"prompt": list(one.prompt_token_ids), "new": list(one.outputs[0].token_ids)} for one in outputs
    ]
    print("ANSWERS" + json.dumps(answers))


if __name__ == "__main__":
    main()
