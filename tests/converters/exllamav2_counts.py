"""What ExLlamaV2's own code allocates, in a process of its own: FOLDER_OF_THE_PACKAGE FOLDER CONTEXT."""

import json
import sys
from types import ModuleType
from typing import Any


def main() -> None:
    """Make the model's modules without loading them, and every cache in main memory; print the bytes."""
    sys.modules["exllamav2_ext"] = ModuleType("exllamav2_ext")
    sys.path.insert(0, sys.argv[1])
    import exllamav2

    config = exllamav2.ExLlamaV2Config(sys.argv[2])
    config.max_seq_len = int(sys.argv[3])
    model = exllamav2.ExLlamaV2(config)
    found = {"scratch": max(module.scratch_space_fixed() for module in model.modules)}
    kinds = {"fp16": "", "q8": "_Q8", "q6": "_Q6", "q4": "_Q4"}
    for name, suffix in kinds.items():
        made: Any = getattr(exllamav2, f"ExLlamaV2Cache{suffix}")
        cache = made(model, max_seq_len=config.max_seq_len, fixed_device="cpu")
        tensors = list(cache.all_tensors())
        for pair in getattr(cache, "temp_tensors", {}).values():
            tensors += pair
        found[name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
