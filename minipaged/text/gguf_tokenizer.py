"""Builds a tokenizer from the metadata of a GGUF file: byte-level BPE (GPT-2 and its successors) and SentencePiece.

``tokenizer.ggml.pre`` names how a text is split before byte pairs are merged. A wrong split gives tokens that the model
was not trained on, so an unknown name is refused. The splits are llama.cpp's, which defines the names. transformers can
read such files, too, but takes seconds, and splits by GPT-2's rule where it does not know the name: "smollm" for one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minipaged.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from minipaged.models.gguf import GGUFFile  # a file's metadata, with checked access

# --- how texts are split before merging -----------------------------------------------------------------------------

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BREAKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"  # with the space or sign before it
LLAMA_3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BREAKS}"
QWEN_2 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BREAKS}"
SEED = rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{BREAKS}"
# Words that begin with capitals or are all capitals, of which a change of case begins a new one.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{{0}}"
TEKKEN = CASED.replace("{0}", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BREAKS}"
GPT_4O = CASED.replace("{0}", f"{CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BREAKS}"
SIGNS = r"[\p{P}\$\+<=>\^~\|]+"
DEEPSEEK_3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{BREAKS}"
)

# Each expression splits the pieces that those before it left.
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "a.x-4.0", "mellum", "trillion",
                     "granite-docling"), (GPT_2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
                    (r"\p{N}", GPT_2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
                     "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), (LLAMA_3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "grok-2"),
                    (QWEN_2,)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (GPT_4O,)),
    "tekken": (TEKKEN,),
    "seed-coder": (SEED,),
    "falcon": (SIGNS.replace("|]", "|`]"), GPT_2, "[0-9][0-9][0-9]"),
    "default": (SIGNS, GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_3),
}  # fmt: skip

# These take a piece that is a token of its own without merging it, and begin texts with the token BOS.
WHOLE_PIECES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")

# --- the tokenizer --------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # in tokenizer.ggml.token_type
LONGEST = 1000  # characters of a token; the vocabularies of Llama 3 and Qwen have up to 128
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerBase | None:
    """The tokenizer that a GGUF file describes, with its special tokens and chat template; ``None`` if it has none.

    Raises ModelError if it is of another kind, splits texts in an unknown way, or is inconsistent.
    """
    kind = file.get("tokenizer.ggml.model", str, "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{file.path}: tokenizer.ggml.model {kind!r} is not supported. Supported: gpt2, llama")
    # llama.cpp gives names to empty tokens, which some files have as padding.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(file.get_list("tokenizer.ggml.tokens", str))]
    if not tokens:
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens is missing or empty")
    types = file.get_list("tokenizer.ggml.token_type", int, len(tokens)) or [NORMAL] * len(tokens)
    named = {name: file.token_id(f"tokenizer.ggml.{key}_token_id", tokens) for name, key in NAMED.items()}
    for name in ("unk_token", "pad_token"):  # some files pad with "!"; as a special token it would vanish from outputs
        if (token_id := named[name]) is not None and types[token_id] == NORMAL:
            named[name] = None
    ids = {token: i for i, token in enumerate(tokens)}
    if len(longest := max(tokens, key=len, default="")) > LONGEST:
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens has a token of {len(longest)} characters")
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise ModelError(f"{file.path}: tokenizer.ggml.tokens has {twice!r} twice")
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = _byte_level(file, ids) if kind == "gpt2" else _sentencepiece(file, tokens, types, ids)
        # Added tokens are found in the text before anything else. Only the special ones can be left out of the output.
        special = {i for i in named.values() if i is not None} | {i for i, type in enumerate(types) if type == CONTROL}
        added = special | {i for i, type in enumerate(types) if type in (UNKNOWN, USER_DEFINED)}
        tokenizer.add_tokens([AddedToken(tokens[i], normalized=False, special=i in special) for i in sorted(added)])
        pre = file.get("tokenizer.ggml.pre", str, "default")
        begins = kind == "llama" or pre in WHOLE_PIECES
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **{name: None if i is None else tokens[i] for name, i in named.items()},
            add_bos_token=file.get("tokenizer.ggml.add_bos_token", bool, begins),
            add_eos_token=file.get("tokenizer.ggml.add_eos_token", bool, False),
            chat_template=file.get("tokenizer.chat_template", str, None),
            clean_up_tokenization_spaces=False,
        )
    except ModelError:
        raise
    except Exception as error:  # the library's builders raise several types
        raise ModelError(f"{file.path}: its tokenizer cannot be built: {str(error).splitlines()[0]}") from None


def _byte_level(file: GGUFFile, ids: dict[str, int]) -> Any:
    """Byte-level BPE: every byte is a letter of its alphabet, so no text is unknown."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = file.get("tokenizer.ggml.pre", str, "default")
    if pre not in SPLITS:
        raise ModelError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not supported. Supported: {', '.join(sorted(SPLITS))}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.get_list("tokenizer.ggml.merges", str)]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ModelError(f"{file.path}: tokenizer.ggml.merges has {wrong[0]!r}, which is not two parts")
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pre in WHOLE_PIECES))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int], ids: dict[str, int]) -> Any:
    """SentencePiece's BPE: spaces are "▁", and a character without a token becomes its bytes' tokens, ``<0xE2>``.

    The file has scores in place of merges: of all neighbours that form a token, those with the best score merge first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.get_list("tokenizer.ggml.scores", float, len(tokens))
    if not scores:
        raise ModelError(f"{file.path}: tokenizer.ggml.scores is missing")
    merges = [
        (scores[i], token[:cut], token[cut:])
        for i, token in enumerate(tokens)
        if types[i] not in (UNKNOWN, CONTROL, BYTE)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    unknown = file.token_id("tokenizer.ggml.unknown_token_id", tokens)
    bpe = models.BPE(ids, [merge[1:] for merge in merges], byte_fallback=True, fuse_unk=True)
    if unknown is not None:
        bpe.unk_token = tokens[unknown]
    tokenizer = Tokenizer(bpe)
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer
