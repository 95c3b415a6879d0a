"""Text to ids: a small superword tokenizer trained on the questions, or any Hugging Face one.

Templated questions repeat long stretches of wording that carry one bit of information together.
A superword tokenizer gives such a stretch one id, so that a question costs 6 to 16 positions
instead of 60, while everything the answer depends on (nouns, digits, option letters) stays an id
of its own. Both kinds are ordinary Hugging Face tokenizer folders on disk.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from geode_jax.errors import UserError
from geode_jax.exports import files

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_MANY = 1000
"""Texts that are worth all cores. A scene's few take three times the CPU time there, beside a
training step that wants the same cores."""

# The smallest pieces: a digit, a word, a white space, a sign; all but the white space carry the
# space before them, so that decoding is plain concatenation.
_UNIT = r" ?[0-9]| ?[\p{L}\p{M}]+|\s| ?[^\s\p{L}\p{M}0-9]"
_LETTER = r"[^\W\d_]"  # for Python's re, which knows no \p{L}
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


class Tokenizer:
    """A tokenizer and the four ids that the trainer needs.

    `encode` adds no special ids: the pipeline places bos and eos itself. Special tokens that
    appear in a text as text are read as text.

    Attributes:
        pad_id, bos_id, eos_id, unk_id: ids of the special tokens. Where a Hugging Face tokenizer
            lacks one: pad falls back to eos, bos to pad (Qwen's `<|endoftext|>`), unk to pad.
        vocab_size: largest id + 1, the rows an embedding needs.
        sha256: hex digest of the `tokenizer.json` that `save` writes.
    """

    def __init__(self, tokenizer_json: str, special_tokens: dict[str, str]):
        """Args: the text of a `tokenizer.json`, and pad/bos/eos/unk_token -> token."""
        self._json = tokenizer_json
        self._special = dict(special_tokens)
        self._backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
        eos = self._special["eos_token"]
        pad = self._special.get("pad_token") or eos
        self.eos_id = vocabulary[eos]
        self.pad_id = vocabulary[pad]
        self.bos_id = vocabulary[self._special.get("bos_token") or pad]
        self.unk_id = vocabulary[self._special.get("unk_token") or pad]

    def __reduce__(self):
        return Tokenizer, (self._json, self._special)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text; of many on all cores."""
        if len(texts) < _MANY:
            return [self.encode(text) for text in texts]
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_batch` of texts that follow a prompt: with one space before each.

        Llama's tokenizers put it there by themselves, and the older ones would put a second before
        one that stands already, which is not how a Llama answers.
        """
        own = self._backend.encode("a", add_special_tokens=False).tokens[:1] or [""]
        space = "" if own[0].startswith("▁") else " "
        return self.encode_batch([space + text for text in texts])

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """As `encode_batch`, and where in its text (in characters) every token ends."""
        found = (self._backend.encode(text, add_special_tokens=False) for text in texts)
        return [(encoding.ids, [end for _, end in encoding.offsets]) for encoding in found]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids; special tokens are left out unless `skip_special` is False.

        Ids beyond the vocabulary (padding rows of an embedding) decode to nothing.
        """
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int:
        """The id of a token of the vocabulary.

        Raises:
            UserError: it has no such token.
        """
        found = self._backend.token_to_id(token)
        if found is None:
            raise UserError(f"tokenizer: no token {token!r}")
        return found

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with further special tokens.

        Args:
            tokens: get the next free ids in this order; one that it has already keeps its id.

        Raises:
            UserError: the ids have gaps, among which the new ones would be lost.
        """
        backend = tokenizers.Tokenizer.from_str(self._json)
        new = [t for t in dict.fromkeys(tokens) if backend.token_to_id(t) is None]
        backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])
        grown = Tokenizer(backend.to_str(), self._special)
        if [grown.id_of(t) for t in new] != [self.vocab_size + i for i in range(len(new))]:
            raise UserError(f"tokenizer: its ids have gaps, so {', '.join(new)} cannot follow them")
        return grown

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `AutoTokenizer` loads."""
        folder = Path(folder)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e9),
            **self._special,
        }
        files.write_text(folder / "tokenizer.json", self._json)
        files.write_json(folder / "tokenizer_config.json", config)

    @staticmethod
    def load(folder: str | Path) -> "Tokenizer":
        """Same as `load_tokenizer`."""
        return load_tokenizer(folder)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads a tokenizer folder: one written by `Tokenizer.save`, or any Hugging Face one.

    Args:
        folder: local folder; nothing is downloaded.

    Raises:
        UserError: the folder is missing, is no tokenizer folder, or names no eos token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer {folder}: no such folder")
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        ours = [config.get(f"{name}_token") for name in ("pad", "bos", "eos", "unk")]
        if ours == [PAD, BOS, EOS, UNK]:
            return Tokenizer(text, _specials(config.get))
    except (OSError, ValueError):
        pass  # not ours: transformers decides whether it is one at all
    return _load_through_transformers(folder)


def _load_through_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and rarely needed

    try:
        fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = fast.backend_tokenizer
    except Exception as error:  # transformers raises whatever its many readers raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"tokenizer {folder}: no Hugging Face tokenizer ({reason[0]})") from error
    specials = _specials(lambda name: getattr(fast, name, None))
    if "eos_token" not in specials:
        raise UserError(f"tokenizer {folder}: tokenizer_config.json: eos_token is needed")
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8") if file.is_file() else backend.to_str()
    return Tokenizer(text, specials)


def _specials(get) -> dict[str, str]:
    names = ("pad_token", "bos_token", "eos_token", "unk_token")
    return {name: get(name) for name in names if get(name)}


def train_tokenizer(texts: Iterable[str], nouns: Sequence[str], min_count: int) -> Tokenizer:
    """Learns a superword tokenizer.

    Nouns, digits and option markers (a new line with `A.`) are atoms: always one id each. What
    stands between two atoms is a run, and an option's line ends one; a run seen at least
    `min_count` times is one id, any other run is spelled by its words and signs. A word that no
    text contained becomes `<unk>`. Every known word has an id with and one without the space
    before it, so `decode(encode(x)) == x` for every text made of known words.

    Args:
        texts: prompts and answers (answers with the space that will precede them).
        nouns: words or phrases that are atoms, lower case as they appear in the texts.
        min_count: how often a run must occur to become one id.

    Returns:
        The tokenizer; its ids depend on the texts as a multiset, not on their order.
    """
    atom = _atom_pattern(nouns)
    runs, markers = Counter(), set()
    for text, count in Counter(texts).items():
        marker = ""
        for i, piece in enumerate(atom.split(text)):
            if i % 2:
                marker = piece if piece[0] == "\n" else ""
                markers.add(marker)
            elif marker:  # an option ends with its line
                option, _, rest = piece.partition("\n")
                runs[option] += count
                runs["\n" + rest if rest else ""] += count
            else:
                runs[piece] += count
    runs.pop("", None)
    markers.discard("")

    units = pre_tokenizers.Split(Regex(_UNIT), "isolated")
    words, superwords = Counter(), Counter()
    for run, count in runs.items():
        spelled = [piece for piece, _ in units.pre_tokenize_str(run)]
        if len(spelled) > 1 and count >= min_count:
            superwords[run] = count
        for piece in spelled:
            words[piece.removeprefix(" ") or " "] += count
    for noun in nouns:
        for piece, _ in units.pre_tokenize_str(noun):
            words[piece.removeprefix(" ")] += 1

    atoms = [*"0123456789", *_PUNCTUATION, *sorted(set(nouns)), *_ranked(words)]
    vocabulary = [PAD, BOS, EOS, UNK, " ", "\n", "\t", *sorted(markers)]
    for piece in atoms:
        vocabulary += [piece] if piece.isspace() else [piece, " " + piece]
    vocabulary += _ranked(superwords)
    phrases = [noun for noun in nouns if len(units.pre_tokenize_str(noun)) > 1]
    long_pieces = [*markers, *superwords, *phrases, *(" " + noun for noun in phrases)]
    return Tokenizer(
        _word_level(dict.fromkeys(vocabulary), long_pieces).to_str(),
        {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK},
    )


def _atom_pattern(nouns: Sequence[str]) -> re.Pattern[str]:
    """Splits a text so that the odd pieces are atoms and the even ones the runs between them."""
    # Longest first: Python's alternation takes the first that fits, "table" or "table lamp".
    longest_first = sorted({re.escape(noun) for noun in nouns}, key=lambda n: (-len(n), n))
    atoms = [r" ?[0-9]", r"\n[A-Z]\."]
    if longest_first:
        atoms.append(rf"(?: |(?<!{_LETTER}))(?:{'|'.join(longest_first)})(?!{_LETTER})")
    return re.compile(f"({'|'.join(atoms)})")


def _ranked(counts: Counter) -> list[str]:
    return sorted(counts, key=lambda piece: (-counts[piece], piece))


def _word_level(vocabulary: Iterable[str], long_pieces: Iterable[str]) -> tokenizers.Tokenizer:
    """A WordLevel tokenizer that cuts a text into the longest known pieces, else into units."""
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=UNK))
    pattern = "|".join([*_trie_patterns(long_pieces), _UNIT])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (PAD, BOS, EOS, UNK)])
    return tokenizer


def _trie_patterns(pieces: Iterable[str]) -> list[str]:
    """A regular expression for "the longest of these", as a trie: three times as fast as a list.

    A piece that ends in a letter must not be followed by one ("the b" is no piece of "the bed").
    Chains without a branch are written out in one go, so nesting stays far below Oniguruma's
    limit of 4096 levels.
    """
    trie: dict = {}
    for piece in pieces:
        node = trie
        for char in piece:
            node = node.setdefault(char, {})
        node[""] = r"(?![\p{L}\p{M}])" if re.match(_LETTER, piece[-1]) else ""

    def pattern(node: dict) -> str:
        prefix = ""
        while len(node) == 1 and "" not in node:
            char, node = next(iter(node.items()))
            prefix += re.escape(char)
        branches = [re.escape(char) + pattern(node[char]) for char in sorted(node) if char]
        if not branches:
            return prefix + node[""]
        if "" in node:
            branches.append(node[""])
        return f"{prefix}(?:{'|'.join(branches)})"

    return [pattern(trie)] if trie else []
