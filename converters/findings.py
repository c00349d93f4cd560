"""What is wrong with a DeepSeek Coder GGUF, told from its metadata alone, or with a GPTQ or EXL2 folder.

Many files of this family are in circulation that load without a word and answer badly: made before llama.cpp
knew the pre-tokenizer, or by a converter that lost the RoPE factor or the BOS rule. Each fault has a
sentence that says what it does to the output. All of them are mended by a new conversion.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from converters.config import read_json
from converters.exl2_source import Exl2Folder
from converters.gptq_config import MAIN, SIDE_FILES
from converters.gptq_source import GptqFolder
from converters.vocabulary import TokenType, Vocabulary
from quantize.codecs.gptq import unpack_zeros
from quantize.llama import LlamaConfig

PRE = "deepseek-coder"
THETA, FACTOR = 100000.0, 4.0
_OLD_THETA = 10000.0
MARKER = "<｜fim▁hole｜>"
END_OF_TURN = "<|EOT|>"
CONTROLS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜fim▁begin｜>",
    MARKER,
    "<｜fim▁end｜>",
    END_OF_TURN,
)


def gguf_findings(
    config: LlamaConfig, vocabulary: Vocabulary, metadata: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return a sentence for every fault of a DeepSeek Coder file; none for another family's."""
    if MARKER not in vocabulary.tokens:
        return ()
    rope = _rope_faults(config) if config.context_length > 4096 else ()
    return (
        *rope,
        *_vocabulary_faults(vocabulary, metadata.get("dscq.eos") == "completion"),
        *_missing_keys(metadata),
    )


def _rope_faults(config: LlamaConfig) -> Iterator[str]:
    if config.rope_factor == 1:
        yield "RoPE scaling factor is 1, the family's is 4: every position is four times too far"
    elif config.rope_factor != FACTOR:
        yield f"RoPE scaling factor is {config.rope_factor:g}, the family's is {FACTOR:g}"
    if config.rope_theta != THETA:
        yield f"RoPE base is {config.rope_theta:g}, the family's is {THETA:g}: attention sees wrong distances"


def _vocabulary_faults(vocabulary: Vocabulary, for_completion: bool) -> Iterator[str]:
    if vocabulary.pre != PRE:
        yield f"tokenizer.ggml.pre is {vocabulary.pre!r}, not {PRE!r}: text is split in a way it never saw"
    if not vocabulary.add_bos:
        yield "add_bos_token is false: the model expects BOS before every prompt"
    kinds = dict(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    if loose := [token for token in CONTROLS if kinds.get(token, TokenType.CONTROL) is not TokenType.CONTROL]:
        yield f"not typed CONTROL, so they are printed or not recognised in prompts: {' '.join(loose)}"
    if kinds.get("ü") is TokenType.NORMAL:
        yield "the letters that spell bytes (ü, õ, ...) are typed NORMAL: text with them gets other ids"
    if stops_before_turns_end(vocabulary) and not for_completion:
        yield f"EOS is not {END_OF_TURN}, with which the chat template closes turns: chat may not stop"


def stops_before_turns_end(vocabulary: Vocabulary) -> bool:
    """Return whether EOS is not the token with which the chat template closes turns.

    `--eos completion` makes it so on purpose, and then the file says it (`dscq.eos`).
    """
    turn = vocabulary.chat_template is not None and END_OF_TURN in vocabulary.chat_template
    return turn and vocabulary.eos_id is not None and vocabulary.tokens[vocabulary.eos_id] != END_OF_TURN


def _missing_keys(metadata: Mapping[str, Any]) -> Iterator[str]:
    roles = [role for role in ("pre", "suf", "mid") if f"tokenizer.ggml.fim_{role}_token_id" not in metadata]
    if roles:
        yield (
            "fill-in-the-middle ids are not written ("
            + ", ".join(roles)
            + "): runtimes have to guess them by text"
        )


def gptq_findings(file: GptqFolder) -> tuple[str, ...]:
    """Return a sentence for everything that some reader of a GPTQ folder will take otherwise than others."""
    family = MARKER in file.vocabulary.tokens and file.config.context_length > 4096
    rope = _rope_faults(file.config) if family else ()
    return (*rope, *_config_faults(file), *_zero_faults(file))


def _config_faults(file: GptqFolder) -> Iterator[str]:
    folder = file.paths[0]
    config = read_json(folder / MAIN)
    if config.get("rope_theta") is None:
        yield f"{MAIN} has no top-level rope_theta: AutoGPTQ and exllamav2 take 10000"
    if file.config.rope_factor != 1 and config.get("rope_scaling") is None:
        yield f"{MAIN} has no top-level rope_scaling: readers of before transformers 5 do not scale positions"
    side, other = SIDE_FILES
    if not (folder / side).is_file():
        instead = f", it does not look at {other}" if (folder / other).is_file() else ""
        yield f"no {side}: AutoGPTQ does not load the folder{instead}"
    if not any(place.startswith(MAIN) for place in file.quantization.stated_in):
        yield f"{MAIN} has no quantization_config: transformers and vLLM take the folder for unquantized"
    if "desc_act" not in file.quantization.fields:
        yield "the quantization config has no desc_act: vLLM refuses the folder"


def exl2_findings(file: Exl2Folder) -> tuple[str, ...]:
    """Return a sentence for everything that ExLlamaV2 takes otherwise than the folder means it."""
    family = MARKER in file.vocabulary.tokens and file.config.context_length > 4096
    rope = _rope_faults(file.config) if family else ()
    return (*rope, *_exl2_faults(file))


def _exl2_faults(file: Exl2Folder) -> Iterator[str]:
    folder = file.paths[0]
    config = read_json(folder / MAIN)
    scaling = config.get("rope_scaling")
    if config.get("rope_theta") is None and file.config.rope_theta != _OLD_THETA:
        yield f"{MAIN} has no top-level rope_theta: exllamav2 takes 10000"
    if file.config.rope_factor != 1 and scaling is None:
        yield f"{MAIN} has no rope_scaling: exllamav2 does not scale positions"
    if isinstance(scaling, dict) and {"type", "rope_type"} <= scaling.keys():
        yield f"{MAIN}: rope_scaling has both type and rope_type: exllamav2 does not load the folder"
    if (folder / "model.safetensors.index.json").is_file():
        yield "model.safetensors.index.json: exllamav2 does not read it, it takes all *.safetensors"


def _zero_faults(file: GptqFolder) -> Iterator[str]:
    """Yield linears with zero-points that readers take differently."""
    odd = [name for name, scheme in file.weights.schemes.items() if _zero_range(file, name, scheme.bits)]
    if odd:
        where = f"{len(odd)} tensors, first {odd[0]}"
        yield f"zero-points outside 1 to 2^bits - 1, which readers take differently: {where}"


def _zero_range(file: GptqFolder, name: str, bits: int) -> bool:
    zeros = unpack_zeros(file.weights.part(name, "qzeros"), bits, file.quantization.version)
    return int(zeros.min()) < 1 or int(zeros.max()) >= 2**bits
