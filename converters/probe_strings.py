"""Strings that tokenizers disagree on: the corpus of the tokenizer's parity check.

Two implementations of one tokenizer part company at the edges: a letter that only a newer Unicode table
knows, white space that is not ASCII, a special token glued to a space, the thirteen letters that are tokens
of their own, a byte that is no character. Each class below makes strings of one such kind; `Mixed` glues
kinds together, because it is at the seams that cutting rules differ.

Every string is made from a seeded generator and the tables in this file, so that the corpus is the same
on every machine. No string holds a lone surrogate (it has no UTF-8 form).
"""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final

SPECIAL: Final = (
    *(
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
    ),
    *("<pad>", "<|User|>", "<|Assistant|>", "<|EOT|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    # Near misses: the pieces of a special token must stay text.
    *("<｜begin▁of▁sentence|>", "<|EOT", "|EOT|>", "<pad", "< pad>", "<|eot|>", "[PAD32022]"),
)
BYTE_LETTERS: Final = "õ÷ÁýÀÿøúþüùöû"
WHITE_SPACE: Final = (
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)
INVISIBLE: Final = (
    "\xad\u034f\u061c\u115f\u180e\u200b\u200c\u200d\u200e\u200f\u202e\u2060\ufe0f\ufeff\ufffd\uffff"
)
EMOJI: Final = (
    *("🙂", "👍🏽", "👩\u200d💻", "🏳\ufe0f\u200d🌈", "🇩🇪", "❤\ufe0f", "☃", "1\ufe0f\u20e3"),
    *("🧑🏿\u200d🚀", "™", "©", "⌨\ufe0f"),
)
PUNCTUATION: Final = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~¡§«»¿‐–—‘’“”…‰′※€、。《》「」！，．：；？～｜"
NUMBERS: Final = "0123456789²³¹¼½¾٠١٢३४五六Ⅷⅷ①⑳㉈〇𝟘𝟗𐄇߀"
WORDS: Final = (
    *(
        "the",
        "quick",
        "brown",
        "fox",
        "I'm",
        "don't",
        "they'LL",
        "naïve",
        "café",
        "Führer",
        "Straße",
        "İstanbul",
    ),
    *("résumé", "ångström", "Đặng", "Việt", "ЖУРНАЛ", "журнал", "Ελλάδα", "שלום", "مرحبا", "नमस्ते", "สวัสดี"),
    *(
        "မြန်မာ",
        "ქართული",
        "Հայերեն",
        "한국어",
        "你好",
        "世界",
        "東京",
        "ひらがな",
        "カタカナ",
        "ﾊﾝｶｸ",
        "ﬁle",
        "ǅ",
        "ℵ",
    ),
)
CODE: Final = (
    "def f(x: int = 3) -> list[int]:\n    return [i ** 2 for i in range(x) if i % 2 == 0]\n",
    '#include <math.h>\nint main(void) {\n\tfor (int i = 0; i < 9; i++) puts("%d\\n");\n\treturn 0;\n}\n',
    "template <typename T> auto max(const T& a, const T& b) { return a < b ? b : a; } // C++\n",
    'package main\n\nimport "fmt"\n\nfunc main() {\n\tch := make(chan int, 1)\n\tfmt.Println(<-ch)\n}\n',
    "fn parse(s: &str) -> Result<u32, ParseIntError> { s.trim().parse::<u32>() }\r\n",
    "const f = async ({a, ...rest}) => await fetch(`/api/${a}?x=${rest.x ?? 0}`);\n",
    'public static void main(String[] args) { System.out.println("α=" + args.length); }\n',
    'for f in *.txt; do awk \'{s+=$1} END {print s}\' "$f" | tee -a "${OUT:-/dev/null}"; done\n',
    "SELECT u.id, COUNT(*) AS n FROM users u LEFT JOIN orders o ON o.uid = u.id GROUP BY 1 HAVING n >= 2;\n",
    "<div class=\"a b\" data-x='1'><p>&nbsp;&amp; text</p><!-- c --></div>\n",
    "module Main where\nmain :: IO ()\nmain = mapM_ print $ takeWhile (<100) [x^2 | x <- [1..]]\n",
    "body { margin: 0 auto; color: #ff00ff; } @media (width < 600px) { a::after { content: '\\201C'; } }\n",
)


def _some(random: Random, choices: Sequence[str], most: int, glue: Sequence[str] = ("",)) -> str:
    parts = [random.choice(choices) + random.choice(glue) for _ in range(random.randint(1, most))]
    return "".join(parts)


def _code_point(random: Random, low: int, high: int) -> str:
    while 0xD800 <= (code := random.randint(low, high)) <= 0xDFFF:
        pass
    return chr(code)


def _range(*bounds: tuple[int, int]) -> Callable[[Random], str]:
    """A maker of strings of up to 24 characters from the ranges of code points, with some spaces."""

    def make(random: Random) -> str:
        characters = (
            " " if random.random() < 0.15 else _code_point(random, *random.choice(bounds))
            for _ in range(random.randint(1, 24))
        )
        return "".join(characters)

    return make


def _special(random: Random) -> str:
    return _some(random, SPECIAL, 4, ("", "", " ", "\n", "a", "  ", "。", "ü", "1"))


def _white_space(random: Random) -> str:
    runs = (
        random.choice(WHITE_SPACE) * random.randint(1, 9) + random.choice(("", "x", ".", "1", "你"))
        for _ in range(random.randint(1, 8))
    )
    return "".join(runs)


def _byte_letters(random: Random) -> str:
    return _some(random, (*BYTE_LETTERS, *"aoué ßÑãñ", "F", "hr"), 16)


def _control(random: Random) -> str:
    return _some(random, [chr(code) for code in (*range(32), *range(0x7F, 0xA0))], 16, ("", "", "a", " "))


def _code(random: Random) -> str:
    """A stretch of source code, cut at two random places."""
    text = _some(random, CODE, 2)
    start = random.randrange(len(text))
    return text[start : start + random.randint(1, 160)]


def _mixed(random: Random) -> str:
    makers = [maker for name, maker in CLASSES.items() if name != "mixed"]
    return "".join(
        random.choice(makers)(random)[: random.randint(1, 12)] for _ in range(random.randint(2, 6))
    )


CLASSES: Final[Mapping[str, Callable[[Random], str]]] = {
    "ascii": _range((0x20, 0x7E)),
    "latin-1": _range((0x80, 0xFF), (0x41, 0x7A)),
    "basic plane": _range((0x80, 0xFFFF)),
    "supplementary plane": _range((0x10000, 0x1FFFF)),
    "ideographic planes": _range((0x20000, 0x3FFFF)),
    "other planes": _range((0x40000, 0x10FFFF)),
    "cjk": _range((0x4E00, 0x9FFF), (0x3000, 0x30FF), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF), (0x30, 0x7A)),
    "scripts": _range((0x370, 0x1CFF), (0x1E00, 0x2BFF), (0xA4D0, 0xABFF)),
    "emoji": lambda random: _some(random, (*EMOJI, "a", " "), 8, ("", " ", "\ufe0f", "\u200d")),
    "punctuation": lambda random: _some(random, (*PUNCTUATION,), 12, ("", "", " ", "a", "\n")),
    "numbers": lambda random: _some(random, (*NUMBERS,), 12, ("", "", " ", ",", "x")),
    "words": lambda random: _some(random, WORDS, 8, (" ", " ", "", "  ", ", ", "\n")),
    "white space": _white_space,
    "invisible": lambda random: _some(random, (*INVISIBLE,), 8, ("", "a", " ", "\u0301")),
    "control bytes": _control,
    "byte letters": _byte_letters,
    "special tokens": _special,
    "code": _code,
    "mixed": _mixed,
}


def random_strings(count: int, seed: int) -> list[tuple[str, str]]:
    """Return `count` pairs (class, string), the classes in turn; equal for equal seeds."""
    random = Random(seed)
    names = list(CLASSES)
    return [(name, CLASSES[name](random)) for name in (names[i % len(names)] for i in range(count))]


def probe_strings() -> tuple[str, ...]:
    """Return the fixed corpus of the parity check: the tables' own entries and 12 random strings a class."""
    fixed = ["", " ", "  ", "\n", "\r\n", "\t\t", " \n ", *SPECIAL, *WORDS, *CODE, *EMOJI]
    fixed += [f" {letter}{letter} x{letter}1" for letter in BYTE_LETTERS]
    fixed += [f"a{space}b {space} {space}{space}." for space in WHITE_SPACE]
    made = [text for _, text in random_strings(12 * len(CLASSES), seed=32013)]
    return tuple(dict.fromkeys([*fixed, *made]))
