"""A text cut to a number of tokens, at the end of a line where there is one."""

from converters.tokenizer import CheckpointTokenizer

# A text of more characters than this per token wanted is cut before it is encoded: 16 characters a token is
# more than any prose or code reaches, and a long file need not be encoded whole.
_CHARS_PER_TOKEN = 16


def head_of(tokenizer: CheckpointTokenizer, text: str, limit: int) -> str:
    """Return the longest head of whole lines that is at most `limit` tokens (without BOS).

    A first line that is longer by itself is cut inside. "" when `limit` is below one.
    """
    head = text[: max(limit, 0) * _CHARS_PER_TOKEN]
    # The head is encoded again: in rare vocabularies a cut changes the tokens before it.
    for room in range(limit, -1, -1):
        encoding = tokenizer.running.encode(head, add_special_tokens=False)
        if len(encoding.ids) <= limit:
            return head
        head = _whole_lines(head[: encoding.offsets[room][0]])
    return ""


def _whole_lines(text: str) -> str:
    end = text.rfind("\n") + 1
    return text[:end] if end else text
