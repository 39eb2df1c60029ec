"""A tokenizer as llama.cpp has it: what it cannot express is refused, because it would read text as other tokens."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from thinkkv.export.bake import Baked
from thinkkv.patches.errors import ExportError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
SPLITS = {
    (_LLAMA_3, True): "llama-bpe",
    (_LLAMA_3, False): "smaug-bpe",
    (_QWEN_2, False): "qwen2",
    (_TEKKEN, True): "tekken",
}
"""llama.cpp's name of a splitting rule, by regex and ``ignore_merges``. Qwen3 and DeepSeek-R1-Distill-Qwen split as
Qwen2 does; tekken's cases are ASCII's there, and its words end at combining marks."""

BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
"""What a byte-fallback tokenizer calls bytes."""


def write_tokenizer(writer: Any, baked: Baked) -> None:
    """The vocabulary as ``tokenizer.json`` has it, how text is split, special tokens and the chat template.

    Args:
        writer: a ``gguf.GGUFWriter``.
        baked: whose tokenizer.

    Raises:
        ExportError: llama.cpp would make other tokens of a text.
    """
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        baked.tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        if not path.is_file():
            raise ExportError("the tokenizer has no fast form (tokenizer.json) - convert it with transformers first")
        content = json.loads(path.read_text(encoding="utf-8"))
        _check_expressible(content)
        sentencepiece = bool(content["model"].get("byte_fallback"))
        size = baked.model.config.vocab_size
        special = gguf.SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=size)
    tokens, types = _vocabulary(content, size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(content, tokens))
        writer.add_add_space_prefix(_space_prefix(content, baked.tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(content))
    if "eos" not in special.special_token_ids:
        raise ExportError("the tokenizer names no end of text, llama.cpp would take some token for it - set eos_token")
    special.add_special_token = _added_around(baked.tokenizer)
    special.chat_template = special.chat_template or baked.tokenizer.chat_template
    special.add_to_gguf(writer, quiet=True)


def _check_expressible(content: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp would read past without a word."""
    model = content["model"]
    if model["type"] != "BPE":
        raise ExportError(f"GGUF export knows BPE tokenizers, not {model['type']} - use --format safetensors")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ExportError("llama.cpp knows no marks inside or at the end of words - use --format safetensors")
    prepends = any(step["type"] == "Prepend" for step in _steps(content["normalizer"], "normalizers"))
    for token in content["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or (token["normalized"] and prepends):
            raise ExportError(
                f"llama.cpp finds the token {token['content']!r} wherever it stands and strips no spaces beside it, "
                "this tokenizer does otherwise - use --format safetensors"
            )


def _steps(rule: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as a list of plain ones."""
    if rule is None:
        return []
    return list(rule[parts]) if rule["type"] == "Sequence" else [rule]


def _added_around(tokenizer: Any) -> dict[str, bool]:
    """Whether begin and end are added to a text, by what the tokenizer does: its files do not always say."""
    text = tokenizer("a", add_special_tokens=False).input_ids
    for begin, end in ((False, False), (True, False), (False, True), (True, True)):
        if tokenizer("a").input_ids == [tokenizer.bos_token_id] * begin + text + [tokenizer.eos_token_id] * end:
            return {"bos": begin, "eos": end}
    raise ExportError(
        f"llama.cpp adds begin and end to a text, this tokenizer makes {tokenizer.decode(tokenizer('a').input_ids)!r} "
        "of 'a' - use --format safetensors"
    )


def _vocabulary(content: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids of the embedding that no token has are marked unused."""
    from gguf import TokenType

    by_id = {index: token for token, index in content["model"]["vocab"].items()}
    types = {index: _plain_type(token, content) for index, token in by_id.items()}
    for added in content["added_tokens"]:
        by_id[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    if len({token.partition("\0")[0] for token in tokens}) < size:
        # It reads C strings, and duplicates end the whole process.
        raise ExportError("llama.cpp wants every token to have a text of its own - use --format safetensors")
    return tokens, [types.get(index, TokenType.UNUSED) for index in range(size)]


def _plain_type(token: str, content: Mapping[str, Any]) -> int:
    from gguf import TokenType

    return int(TokenType.BYTE if content["model"].get("byte_fallback") and token in BYTES else TokenType.NORMAL)


def _splitting(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text."""
    if _steps(content["normalizer"], "normalizers") not in ([], [{"type": "NFC"}]):  # NFC is left to the caller there
        raise ExportError(
            f"llama.cpp cannot change text as the tokenizer does ({json.dumps(content['normalizer'])}) - "
            "use --format safetensors"
        )
    ignore_merges, name = content["model"].get("ignore_merges", False), None
    match _steps(content["pre_tokenizer"], "pretokenizers"):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            name = None if ignore_merges else "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            name = None if ignore_merges else "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            name = SPLITS.get((regex, ignore_merges))
    if name is None:
        raise ExportError(
            f"llama.cpp has no name for how the tokenizer splits text ({json.dumps(content['pre_tokenizer'])}, "
            f"ignore_merges {str(ignore_merges).lower()}) - use --format safetensors"
        )
    return name


def _space_prefix(content: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether llama.cpp puts a space before text at the beginning and after every special token, or nowhere.

    Metaspace's ``first`` does so at the beginning only. That is ``always`` for plain text, and ``never`` for a chat
    that begins with a special token.
    """
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    match _steps(content["normalizer"], "normalizers"), _steps(content["pre_tokenizer"], "pretokenizers"):
        case [{"type": "Prepend", "prepend": "▁"}, last], [] if last == space:
            return True
        case [only], [] if only == space:
            return False
        case [], [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}]:
            if scheme != "first" or not tokenizer.chat_template:
                return bool(scheme != "never")
            chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
            return not chat.startswith(tuple(token["content"] for token in content["added_tokens"]))
    raise ExportError(
        "llama.cpp cannot treat spaces as this byte-fallback tokenizer does "
        f"({json.dumps(content['normalizer'])}, {json.dumps(content['pre_tokenizer'])}) - use --format safetensors"
    )


def _scores(content: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """By rank of the merges: llama.cpp has no merges here, it joins whatever two neighbours make the best token."""
    model = content["model"]
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    results = [token for token, _ in groupby(left + right for left, right in pairs)]
    rank = {token: place for place, token in enumerate(results)}
    known = set(pairs)
    reachable = {token for token in model["vocab"] if len(token) == 1} | rank.keys()
    added = {token["content"] for token in content["added_tokens"]}
    further = any(
        {token[:cut], token[cut:]} <= reachable and (token[:cut], token[cut:]) not in known
        for token in model["vocab"].keys() - added
        for cut in range(1, len(token))
    )
    if further or len(rank) < len(results) or model.get("ignore_merges") or not model["vocab"].keys() >= BYTES:
        raise ExportError(
            "llama.cpp merges by scores and falls back to all 256 bytes, as SentencePiece does; the merges of this "
            "tokenizer are others - use --format safetensors"
        )
    return [-float(rank.get(token, len(rank))) for token in tokens]
