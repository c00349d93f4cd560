"""What makes a `tokenizer.json` unfit for export: damage, and features that no GGUF can express.

The rule is that nothing is dropped in silence. A normaliser, a token that swallows the spaces around it or
an id that two files give to two tokens would all load in a runtime and give other ids than the model was
trained on; each is refused by name.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.pretokenizers import KNOWN, describe
from converters.token_roles import TokenizerFiles
from quantize.errors import TokenizerError


def refuse_damaged(files: TokenizerFiles, folder: Path) -> None:
    """Refuse a byte-level vocabulary under a SentencePiece pre-tokenizer: what transformers 5 writes."""
    model = _model(files.tokenizer)
    steps = describe(files.tokenizer.get("pre_tokenizer"))
    if not any(step.startswith("Metaspace") for step in steps) or "Ġ" not in model.get("vocab", {}):
        return
    raise TokenizerError(
        f"{folder / 'tokenizer.json'} is damaged",
        reasons=[
            "its vocabulary is byte-level BPE, but its pre-tokenizer is Metaspace, which is SentencePiece's",
            "transformers 5 writes this when it loads such a tokenizer as LlamaTokenizer and saves it again",
            "such a tokenizer drops every space: the model sees other text than it was trained on",
        ],
        hint="Restore tokenizer.json from the original repository, for example:\n"
        "  hf download deepseek-ai/deepseek-coder-6.7b-instruct tokenizer.json --local-dir FOLDER",
    )


def bpe_model(tokenizer: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Return tokenizer.json's BPE model; raises TokenizerError for what no runtime could follow."""
    model = _model(tokenizer)
    reasons = []
    # The oldest files name no type; merges are what makes them BPE.
    if model.get("type", "BPE") != "BPE" or not model.get("vocab") or "merges" not in model:
        reasons.append(f"its model is {model.get('type') or 'missing'}; expected BPE with vocab and merges")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            reasons.append(f"model.{key} is {model[key]!r}; byte-level BPE has none")
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if not isinstance(token, dict):
            continue
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if flags:
            reasons.append(
                f"added token {token.get('content')!r} has {', '.join(flags)}, which GGUF cannot say"
            )
    if reasons:
        raise TokenizerError(f"{folder / 'tokenizer.json'} is not supported", reasons=reasons)
    return model


def _model(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    model = tokenizer.get("model")
    return model if isinstance(model, dict) else {}


def conflicts(files: TokenizerFiles, ids: Mapping[str, int], pre: str, n_rows: int) -> list[str]:
    """What does not fit together: ids, rows, the normaliser, tokens that another file adds."""
    rule = KNOWN[pre]
    reasons = []
    n_tokens = max(ids.values()) + 1
    if n_tokens > n_rows:
        reasons.append(f"it has {n_tokens} tokens, but the embedding has only {n_rows} rows")
    if shared := [i for i, count in Counter(ids.values()).items() if count > 1]:
        reasons.append(f"several tokens share an id: {shared[:5]}")
    if clash := [text for i in range(n_rows) if ids.get(text := f"[PAD{i}]", i) != i]:
        reasons.append(f"tokens are spelt like the names of rows without a token: {clash[:5]}")
    normalizer = _normalizers(files.tokenizer.get("normalizer"))
    if normalizer and not (rule.nfc and normalizer == ["NFC"]):
        reasons.append(
            f"normalizer {' + '.join(normalizer)}; {pre} has {'NFC or none' if rule.nfc else 'none'}"
        )
    if bool(files.tokenizer["model"].get("ignore_merges")) != rule.ignore_merges:
        reasons.append(f"model.ignore_merges is not {rule.ignore_merges}, as runtimes take it for {pre}")
    return [*reasons, *_lost_tokens(files, ids)]


def _lost_tokens(files: TokenizerFiles, ids: Mapping[str, int]) -> list[str]:
    """Tokens that tokenizer_config.json lists and tokenizer.json does not have, or has elsewhere."""
    listed = files.tokenizer_config.get("added_tokens_decoder")
    listed = listed if isinstance(listed, dict) else {}
    reasons, lost = [], []
    for token_id, token in listed.items():
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or not token_id.isdecimal():
            reasons.append(
                f"tokenizer_config.json: added_tokens_decoder: expected an id and a token with its content, "
                f"found {token_id!r}: {token!r}"
            )
        elif ids.get(text) != int(token_id):
            lost.append(f"{text!r} ({token_id})")
    if lost:
        reasons.append(f"tokenizer_config.json lists tokens that tokenizer.json lacks: {', '.join(lost[:5])}")
    return reasons


def _normalizers(normalizer: Mapping[str, Any] | None) -> list[str]:
    if normalizer is None:
        return []
    if normalizer.get("type") == "Sequence":
        return [name for part in normalizer["normalizers"] for name in _normalizers(part)]
    return [str(normalizer.get("type"))]
