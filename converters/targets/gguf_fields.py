"""The metadata of a GGUF, written from a checkpoint. `converters/gguf_metadata.py` reads it back.

Nothing here depends on the time, the machine or a path, so the same input gives the same bytes.
"""

import re
from importlib.metadata import PackageNotFoundError, version

from gguf import GGUFWriter, RopeScalingType, size_label

from converters.checkpoint import Checkpoint, Provenance
from converters.findings import stops_before_turns_end
from converters.fold_fields import add_fold
from converters.imatrix import Importances
from converters.plan import ConvertOptions
from converters.targets.gguf_types import GgufTypes
from converters.token_roles import DEEPSEEK_END, EosRule
from converters.vocabulary import Vocabulary
from quantize.llama import LlamaConfig

_QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION
_NAME = re.compile(r"(?P<base>.+?)-\d+(\.\d+)?[bBmM]\w*(-(?P<finetune>.+))?")


def bare_fields() -> GGUFWriter:
    """Return a writer, without a file, for a shard after the first: no more than the architecture."""
    return GGUFWriter(path=None, arch="llama")


def gguf_fields(checkpoint: Checkpoint, types: GgufTypes) -> GGUFWriter:
    """Return a writer, without a file, that holds every field of an export of these types."""
    writer = bare_fields()
    _add_general(writer, checkpoint.provenance, checkpoint.config)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_file_type(types.recipe.file_type)
    if types.importance_users() and types.options.importances is not None:
        _add_importances(writer, types.options.importances)
    _add_own(writer, checkpoint, types)
    _add_llama(writer, checkpoint.config)
    _add_tokenizer(writer, checkpoint.tokenizer.vocabulary)
    return writer


def add_split_fields(writer: GGUFWriter, number: int, count: int, n_tensors: int) -> GGUFWriter:
    """Add what every shard must say: its number (from 0), how many there are, tensors in all of them."""
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", n_tensors)
    return writer


def _add_general(writer: GGUFWriter, provenance: Provenance, config: LlamaConfig) -> None:
    writer.add_type("model")
    writer.add_name(provenance.name)
    if parts := _NAME.fullmatch(provenance.name):
        writer.add_basename(parts["base"])
        writer.add_finetune(parts["finetune"] or "")
    writer.add_size_label(size_label(config.n_parameters, config.n_parameters, 0, 0))
    writer.add_license(provenance.licence or "")
    if _is_hub_id(provenance.source):
        writer.add_source_repo_url(f"https://huggingface.co/{provenance.source}")


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1


def _add_importances(writer: GGUFWriter, importances: Importances) -> None:
    """Add what llama-quantize says of an imatrix; of its path the name alone."""
    writer.add_string("quantize.imatrix.file", importances.file)
    writer.add_string("quantize.imatrix.dataset", importances.dataset)
    writer.add_uint32("quantize.imatrix.entries_count", len(importances.rows))
    if importances.n_chunks:
        writer.add_uint32("quantize.imatrix.chunks_count", importances.n_chunks)


def _add_own(writer: GGUFWriter, checkpoint: Checkpoint, types: GgufTypes) -> None:
    """Add how the file came about; fields without a value are left out."""
    provenance = checkpoint.provenance
    writer.add_string("dscq.version", _own_version())
    writer.add_string("dscq.recipe", types.recipe.name)
    writer.add_string("dscq.overrides", ", ".join(_overrides(types.options)))
    writer.add_string("dscq.eos", eos_rule(checkpoint.tokenizer.vocabulary))
    writer.add_string("dscq.source", provenance.source)
    writer.add_string("dscq.revision", provenance.revision or "")
    writer.add_string("dscq.adapter", provenance.adapter or "")
    if checkpoint.fold is not None:
        add_fold(writer, checkpoint.fold)


def eos_rule(vocabulary: Vocabulary) -> EosRule:
    """Return "completion" where the end of sentence is EOS although the chat template closes turns otherwise.

    Any other EOS that does not close turns is a mistake of the checkpoint, and stays one in the findings.
    """
    by_sentence = vocabulary.eos_id is not None and vocabulary.tokens[vocabulary.eos_id] == DEEPSEEK_END
    return "completion" if by_sentence and stops_before_turns_end(vocabulary) else "model"


def _overrides(options: ConvertOptions) -> list[str]:
    """Return the options that changed the recipe, as they were given."""
    named = {
        "token_embd": options.token_embedding_type,
        "output": options.output_tensor_type,
    }
    return [
        *(["pure"] if options.pure else []),
        *(f"{name}: {quant}" for name, quant in named.items() if quant),
        *(f"{pattern}={quant}" for pattern, quant in options.tensor_types),
    ]


def _own_version() -> str:
    try:
        return version("dscq")
    except PackageNotFoundError:  # run from the source tree
        return "uninstalled"


def _add_llama(writer: GGUFWriter, config: LlamaConfig) -> None:
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.head_dim * config.n_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_factor != 1:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)


def _add_tokenizer(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.token_types])
    writer.add_token_merges(list(vocabulary.merges))
    ids = {
        "bos": vocabulary.bos_id,
        "eos": vocabulary.eos_id,
        "eot": vocabulary.eot_id,
        "padding": vocabulary.pad_id,
        "fim_pre": vocabulary.fim_prefix,
        "fim_suf": vocabulary.fim_suffix,
        "fim_mid": vocabulary.fim_middle,
    }
    for role, token_id in ids.items():
        if token_id is not None:
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token_id)
    # Always said: absent means false to llama.cpp, and DeepSeek Coder wants its BOS.
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_chat_template(vocabulary.chat_template or "")
