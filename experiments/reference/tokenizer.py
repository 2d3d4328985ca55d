"""The tokenizers of the reference models, for `transformers` and lm-eval alike.

ref_llama and ref_opt read whole words: text is lower-cased and split at white space and punctuation, decoding joins
with single spaces, which is how the world writes; every text begins with <bos>. `AutoTokenizer` gives every Qwen2
checkpoint a `Qwen2Tokenizer`, a byte-level BPE without <bos>, so ref_qwen2 has a real one whose merges make each
word of the world one token; numbers are read digit by digit, as that class does.
"""

import json
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from .world import vocabulary

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
PAD, BOS, EOS = range(3)
CONTEXT = 512  # tokens that a model was trained to see


def _word_level() -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(SPECIAL + vocabulary())}
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins with spaces; no word starts with ##
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _byte_level() -> PreTrainedTokenizerFast:
    """A `Qwen2Tokenizer`; the special tokens take the same ids as in the others, unused ones included."""
    words = [word for word in vocabulary() if not word.isdigit()]
    learned = Tokenizer(BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = BpeTrainer(
        vocab_size=20_000,  # never reached: training stops when every word is one token
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator([form for word in words for form in (word, f" {word}")], trainer)
    model = json.loads(learned.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]  # pairs, whatever the annotation says
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token="<eos>",  # as in Qwen2; bytes leave nothing unknown
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


@cache
def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a reference model, padding on the left, ready to save."""
    return _byte_level() if name == "ref_qwen2" else _word_level()


@cache
def _word_ids(name: str) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Token ids of every word at the start of a text, and after a space."""
    tokenizer = build_tokenizer(name)
    words = vocabulary()
    starting = tokenizer(words, add_special_tokens=False)["input_ids"]
    following = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    return dict(zip(words, starting, strict=True)), dict(zip(words, following, strict=True))


def encode(name: str, document: str) -> list[int]:
    """Token ids of a document of the world, with <bos> where the model has one: the tokenizer's, word by word, fast."""
    starting, following = _word_ids(name)
    first, *others = document.split()
    ids = [] if name == "ref_qwen2" else [BOS]
    ids += starting[first]
    for word in others:
        ids += following[word]
    return ids
