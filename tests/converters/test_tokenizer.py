"""The checkpoint's tokenizer: ids, kinds of token, roles, and everything that is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from converters.pretokenizers import steps_json
from converters.probe_strings import BYTE_LETTERS, probe_strings, random_strings
from converters.token_roles import DEEPSEEK_END
from converters.tokenizer import CheckpointTokenizer, read_tokenizer, tokenizer_from_vocabulary
from converters.vocabulary import TokenType, Vocabulary
from quantize.errors import TokenizerError

Edit = Callable[[dict[str, Any]], None]
MakeFolder = Callable[..., Path]
ROWS = 2304


@pytest.fixture
def make_folder(demo_folder: Path, tmp_path: Path) -> MakeFolder:
    """Return a maker of tokenizer folders: the demo model's files, each changed by `name=edit`."""

    def make(**edits: Edit) -> Path:
        for name in ("tokenizer", "tokenizer_config", "generation_config", "config"):
            content = json.loads((demo_folder / f"{name}.json").read_text("utf-8"))
            if name in edits:
                edits[name](content)
            (tmp_path / f"{name}.json").write_text(json.dumps(content), "utf-8")
        return tmp_path

    return make


def _link_real(shared: Path, folder: Path, kind: str) -> Path:
    real = shared / "deepseek-coder"
    (folder / "tokenizer.json").symlink_to(real / "tokenizer.json")
    (folder / "tokenizer_config.json").symlink_to(real / f"tokenizer_config.{kind}.json")
    (folder / "generation_config.json").symlink_to(real / f"generation_config.{kind}.json")
    (folder / "config.json").symlink_to(real / f"config.1.3b-{kind}.json")
    return folder


@pytest.fixture
def instruct(shared: Path, tmp_path: Path) -> CheckpointTokenizer:
    """The real tokenizer of the instruct models."""
    return read_tokenizer(_link_real(shared, tmp_path, "instruct"), 32256)


def test_the_real_base_tokenizer(shared: Path, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(_link_real(shared, tmp_path, "base"), 32256)
    v = tokenizer.vocabulary
    assert (v.bos_id, v.eos_id, v.eot_id, v.pad_id) == (32013, 32014, None, 32014)
    assert (v.add_bos, v.add_eos) == (True, False)
    assert (v.fim_prefix, v.fim_suffix, v.fim_middle) == (32016, 32015, 32017)
    assert (v.pre, len(v.merges), v.merges[0], v.chat_template) == ("deepseek-coder", 31757, "Ġ Ġ", None)
    assert (len(v.tokens), tokenizer.n_tokens, tokenizer.notes) == (32256, 32022, ())


def test_the_real_instruct_tokenizer(instruct: CheckpointTokenizer, shared: Path) -> None:
    v = instruct.vocabulary
    assert (v.bos_id, v.eos_id, v.eot_id) == (32013, 32021, 32014)
    config = json.loads((shared / "deepseek-coder" / "tokenizer_config.instruct.json").read_text("utf-8"))
    assert v.chat_template == config["chat_template"]


def test_the_real_token_types(instruct: CheckpointTokenizer) -> None:
    types = instruct.vocabulary.token_types
    assert set(types[:32000]) == {TokenType.NORMAL}
    assert set(types[32000:32013]) == {TokenType.USER_DEFINED}
    assert "".join(instruct.vocabulary.tokens[32000:32013]) == BYTE_LETTERS
    assert set(types[32013:32022]) == {TokenType.CONTROL}
    assert set(types[32022:]) == {TokenType.UNUSED}
    assert instruct.vocabulary.tokens[32022::233] == ("[PAD32022]", "[PAD32255]")
    assert len(set(instruct.vocabulary.tokens)) == 32256


def test_real_ids_with_bos_digits_cjk_and_byte_letters(instruct: CheckpointTokenizer) -> None:
    assert instruct.encode("Führer") == [32013, 37, 32009, 71, 6247]
    assert instruct.encode("12", add_bos=False) == [16, 17]
    assert instruct.encode("") == [32013]
    assert instruct.encode("<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>") == [
        32013,
        32016,
        64,
        32015,
        65,
        32017,
    ]


def test_real_eos_for_completion(shared: Path, tmp_path: Path) -> None:
    v = read_tokenizer(_link_real(shared, tmp_path, "instruct"), 32256, eos="completion").vocabulary
    assert (v.eos_id, v.eot_id) == (32014, None)


def test_the_real_tokenizer_survives_a_gguf(instruct: CheckpointTokenizer) -> None:
    rebuilt = tokenizer_from_vocabulary(instruct.vocabulary)
    assert (rebuilt.n_tokens, rebuilt.fingerprint) == (instruct.n_tokens, instruct.fingerprint)
    for text in [*probe_strings(), *(text for _, text in random_strings(2000, seed=11))]:
        assert rebuilt.encode(text) == instruct.encode(text), repr(text)


def test_the_real_tokenizer_gives_back_what_it_was_given(instruct: CheckpointTokenizer) -> None:
    for text in probe_strings():
        assert instruct.decode(instruct.encode(text, add_bos=False)) == text
    assert instruct.missing_bytes == frozenset()


def test_the_demo_tokenizer_has_the_same_shape(demo_folder: Path) -> None:
    tokenizer = read_tokenizer(demo_folder, ROWS)
    v = tokenizer.vocabulary
    assert (v.bos_id, v.eos_id, v.eot_id, v.pad_id, v.add_bos) == (2213, 2221, 2214, 2214, True)
    assert (v.fim_prefix, v.fim_suffix, v.fim_middle) == (2216, 2215, 2217)
    assert tokenizer.n_tokens == 2222
    assert len(v.tokens) == ROWS


def test_ids_are_those_of_the_tokenizers_library(demo_folder: Path) -> None:
    library = Tokenizer.from_file(str(demo_folder / "tokenizer.json"))
    tokenizer = read_tokenizer(demo_folder, ROWS)
    for text in probe_strings():
        want = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_bos=False) == want
        assert tokenizer.encode(text) == [2213, *want]


def test_added_letters_are_decoded_as_letters(demo_folder: Path) -> None:
    tokenizer = read_tokenizer(demo_folder, ROWS)
    assert tokenizer.decode(list(range(2200, 2213))) == BYTE_LETTERS
    ids = tokenizer.encode("Führer 你好 🙂")
    assert tokenizer.decode(ids, skip_control=True) == "Führer 你好 🙂"
    assert tokenizer.decode(ids).startswith("<｜begin▁of▁sentence｜>")
    assert tokenizer.decode(tokenizer.encode("🙂", add_bos=False)[:1]) == "\ufffd"


def test_truncation_and_padding_in_the_file_are_not_used(make_folder: MakeFolder) -> None:
    def limit(content: dict[str, Any]) -> None:
        content["truncation"] = {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        }

    text = "a b c d e f g h"
    assert len(read_tokenizer(make_folder(tokenizer=limit), ROWS).encode(text)) > 8


def test_the_fingerprint_changes_with_any_field(demo_folder: Path) -> None:
    tokenizer = read_tokenizer(demo_folder, ROWS)
    other = replace(tokenizer, vocabulary=replace(tokenizer.vocabulary, add_bos=False))
    assert other.fingerprint != tokenizer.fingerprint
    assert read_tokenizer(demo_folder, ROWS).fingerprint == tokenizer.fingerprint


# --- BOS ------------------------------------------------------------------------------------------


def _saved_by_transformers_5(config: dict[str, Any]) -> None:
    config["tokenizer_class"] = "TokenizersBackend"
    del config["add_bos_token"]


def test_bos_is_added_though_transformers_5_dropped_the_rule(make_folder: MakeFolder) -> None:
    tokenizer = read_tokenizer(make_folder(tokenizer_config=_saved_by_transformers_5), ROWS)
    assert tokenizer.vocabulary.add_bos
    assert "add_bos_token" in tokenizer.notes[0]


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast"])
def test_a_stated_false_is_kept(make_folder: MakeFolder, name: str) -> None:
    folder = make_folder(tokenizer_config=lambda c: c.update(add_bos_token=False, tokenizer_class=name))
    tokenizer = read_tokenizer(folder, ROWS)
    assert not tokenizer.vocabulary.add_bos
    assert tokenizer.encode("x") == tokenizer.encode("x", add_bos=False)


def test_the_llama_class_adds_bos_where_nothing_is_stated(make_folder: MakeFolder) -> None:
    tokenizer = read_tokenizer(make_folder(tokenizer_config=lambda c: c.pop("add_bos_token")), ROWS)
    assert tokenizer.vocabulary.add_bos
    assert tokenizer.notes == ()


def _without_family(content: dict[str, Any]) -> None:
    """Another family's file: a begin token of another name."""
    content["added_tokens"][13]["content"] = "<s>"


def _of_another_class(config: dict[str, Any]) -> None:
    config.update(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>")


def _with_template(content: dict[str, Any]) -> None:
    _without_family(content)
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequence]
    tokens = {"<s>": {"id": "<s>", "ids": [2213], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens}
    content["post_processor"] = {"type": "Sequence", "processors": [content["post_processor"], template]}


def test_other_families_follow_their_template(make_folder: MakeFolder) -> None:
    folder = make_folder(tokenizer=_with_template, tokenizer_config=_of_another_class)
    v = read_tokenizer(folder, ROWS).vocabulary
    assert (v.add_bos, v.add_eos, v.bos_id) == (True, False, 2213)


def test_a_template_with_two_tokens_in_front_is_refused(make_folder: MakeFolder) -> None:
    def doubled(content: dict[str, Any]) -> None:
        _with_template(content)
        single = content["post_processor"]["processors"][1]["single"]
        single.insert(0, single[0])

    folder = make_folder(tokenizer=doubled, tokenizer_config=_of_another_class)
    with pytest.raises(TokenizerError, match="more than one token before"):
        read_tokenizer(folder, ROWS)


def test_other_families_without_a_template_add_nothing(make_folder: MakeFolder) -> None:
    folder = make_folder(tokenizer=_without_family, tokenizer_config=_of_another_class)
    assert not read_tokenizer(folder, ROWS).vocabulary.add_bos


# --- EOS, pad, chat ---------------------------------------------------------------------------------


def test_files_that_disagree_on_eos_give_eos_and_eot_and_a_note(make_folder: MakeFolder) -> None:
    folder = make_folder(generation_config=lambda c: c.update(eos_token_id=2214))
    tokenizer = read_tokenizer(folder, ROWS)
    assert (tokenizer.vocabulary.eos_id, tokenizer.vocabulary.eot_id) == (2214, 2221)
    assert "generation_config.json says 2214" in tokenizer.notes[0]


def test_in_a_list_the_tokenizers_own_eos_leads(make_folder: MakeFolder) -> None:
    folder = make_folder(generation_config=lambda c: c.update(eos_token_id=[2214, 2221]))
    v = read_tokenizer(folder, ROWS).vocabulary
    assert (v.eos_id, v.eot_id) == (2221, 2214)


def test_completion_stops_at_the_end_of_sentence_alone(demo_folder: Path) -> None:
    v = read_tokenizer(demo_folder, ROWS, eos="completion").vocabulary
    assert (v.tokens[v.eos_id or 0], v.eot_id) == (DEEPSEEK_END, None)


def test_completion_needs_an_end_of_sentence(make_folder: MakeFolder) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["added_tokens"][14]["content"] = "</s>"

    folder = make_folder(tokenizer=rename)
    with pytest.raises(TokenizerError, match="--eos completion needs"):
        read_tokenizer(folder, ROWS, eos="completion")


def test_special_tokens_map_fills_what_the_others_leave_out(make_folder: MakeFolder) -> None:
    folder = make_folder(
        tokenizer_config=lambda c: c.pop("pad_token"),
        generation_config=lambda c: c.pop("pad_token_id"),
    )
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}', "utf-8")
    assert read_tokenizer(folder, ROWS).vocabulary.pad_id == 2218


def test_the_template_file_wins_and_keeps_its_line_ends(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "chat_template.jinja").write_bytes("{{ x }}\r\n  é\n".encode())
    tokenizer = read_tokenizer(folder, ROWS)
    assert tokenizer.vocabulary.chat_template == "{{ x }}\r\n  é\n"
    assert "chat_template.jinja" in tokenizer.notes[0]


def test_of_several_named_templates_the_default_is_taken(make_folder: MakeFolder) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    folder = make_folder(tokenizer_config=lambda c: c.update(chat_template=named))
    assert read_tokenizer(folder, ROWS).vocabulary.chat_template == "D"


# --- refusals ---------------------------------------------------------------------------------------


def _metaspace(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}


def test_what_transformers_5_damages_is_refused_with_the_cure(make_folder: MakeFolder) -> None:
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(make_folder(tokenizer=_metaspace), ROWS)
    assert "transformers 5" in str(caught.value)
    assert "hf download" in caught.value.hint


REFUSED: dict[str, tuple[Edit, str]] = {
    "normalizer": (lambda c: c.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    "ignore_merges": (lambda c: c["model"].update(ignore_merges=True), "ignore_merges is not False"),
    "byte_fallback": (lambda c: c["model"].update(byte_fallback=True), "byte_fallback"),
    "unigram": (
        lambda c: c.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}, added_tokens=[]),
        "its model is Unigram",
    ),
    "prefix": (lambda c: c["model"].update(continuing_subword_prefix="x"), "continuing_subword_prefix"),
    "a list for the model": (lambda c: c.update(model=[]), "its model is missing"),
    "a number for a token": (lambda c: c["added_tokens"].append(5), "cannot be read"),
    "a number for the steps": (lambda c: c.update(pre_tokenizer=5), "cannot be read"),
    "lstrip": (lambda c: c["added_tokens"][3].update(lstrip=True), "lstrip"),
    "shared id": (lambda c: c["added_tokens"][3].update(id=2200), "share an id"),
    "pad name": (lambda c: c["added_tokens"][18].update(content="[PAD2300]"), "spelt like"),
    "broken merges": (lambda c: c["model"]["merges"].append("☃ ☃"), "cannot be read"),
    "roberta": (
        lambda c: c.update(
            post_processor={"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}
        ),
        "RobertaProcessing",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_no_gguf_can_say_is_refused(make_folder: MakeFolder, case: str) -> None:
    edit, told = REFUSED[case]
    with pytest.raises(TokenizerError, match=told):
        read_tokenizer(make_folder(tokenizer=edit), ROWS)


def test_more_tokens_than_rows_are_refused(demo_folder: Path) -> None:
    with pytest.raises(TokenizerError, match="2222 tokens, but the embedding has only 2221 rows"):
        read_tokenizer(demo_folder, 2221)
    assert read_tokenizer(demo_folder, 2222).n_tokens == 2222


def test_all_reasons_come_at_once(make_folder: MakeFolder) -> None:
    folder = make_folder(
        tokenizer=lambda c: c.update(normalizer={"type": "NFKC"}),
        tokenizer_config=lambda c: c.update(eos_token="<nowhere>"),
        generation_config=lambda c: c.update(eos_token_id=99999),
    )
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(folder, ROWS)
    assert len(caught.value.reasons) == 3


def test_tokens_that_only_the_config_lists_are_refused(make_folder: MakeFolder) -> None:
    listed = {"2222": {"content": "<tool>"}}
    with pytest.raises(TokenizerError, match="'<tool>' \\(2222\\)"):
        read_tokenizer(make_folder(tokenizer_config=lambda c: c.update(added_tokens_decoder=listed)), ROWS)


@pytest.mark.parametrize("listed", [{"0": "x"}, {"zero": {"content": "<tool>"}}, {"0": {}}])
def test_added_tokens_that_are_none_are_reported(make_folder: MakeFolder, listed: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer(make_folder(tokenizer_config=lambda c: c.update(added_tokens_decoder=listed)), ROWS)
    assert "added_tokens_decoder: expected an id and a token" in str(caught.value)


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path, ROWS)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_file_that_is_no_json_object(make_folder: MakeFolder, content: bytes) -> None:
    folder = make_folder()
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"generation_config\.json"):
        read_tokenizer(folder, ROWS)


def test_no_eos_anywhere_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder(
        tokenizer_config=lambda c: c.pop("eos_token"),
        generation_config=lambda c: c.pop("eos_token_id"),
        config=lambda c: c.pop("eos_token_id"),
    )
    with pytest.raises(TokenizerError, match="no EOS token"):
        read_tokenizer(folder, ROWS)


# --- from a vocabulary ------------------------------------------------------------------------------


def test_a_vocabulary_rebuilds_the_demo_tokenizer(demo_folder: Path) -> None:
    tokenizer = read_tokenizer(demo_folder, ROWS)
    rebuilt = tokenizer_from_vocabulary(tokenizer.vocabulary)
    assert rebuilt.vocabulary == tokenizer.vocabulary
    for text in [*probe_strings(), *(text for _, text in random_strings(1000, seed=5))]:
        assert rebuilt.encode(text) == tokenizer.encode(text), repr(text)


def test_added_tokens_below_the_bpe_tokens_keep_their_ids() -> None:
    """SmolLM2 has its special tokens at the front, and no token for some bytes."""
    tokens = ("<|im_end|>", *(chr(code) for code in range(0x21, 0x7F)))
    types = (TokenType.CONTROL, *[TokenType.NORMAL] * (len(tokens) - 1))
    vocabulary = Vocabulary(tokens, types, (), "smollm", None, 0, None, add_bos=False, add_eos=False)
    rebuilt = tokenizer_from_vocabulary(vocabulary)
    assert rebuilt.encode("!<|im_end|>!") == [1, 0, 1]
    assert rebuilt.missing_bytes >= {0x20, 0xE4}
    assert rebuilt.can_spell("abc")
    assert not rebuilt.can_spell("a b")


def test_a_normaliser_that_llama_cpp_does_not_have_is_told(make_folder: MakeFolder) -> None:
    def qwen2(content: dict[str, Any]) -> None:
        content["pre_tokenizer"] = steps_json("qwen2")
        content["normalizer"] = {"type": "NFC"}

    tokenizer = read_tokenizer(make_folder(tokenizer=qwen2), ROWS)
    assert any("NFC" in note for note in tokenizer.notes)
