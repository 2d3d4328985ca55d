"""The tokenizer of the reference models: one token a word, for `transformers` and lm-eval alike.

Text is lower-cased and split at white space and punctuation; decoding joins with single spaces, which is how the
world writes. ref_llama and ref_opt begin every text with <bos>, ref_qwen2 does not, as their namesakes do.
"""

from functools import cache

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from .world import vocabulary

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
PAD, BOS, EOS, UNK = range(4)
CONTEXT = 512  # tokens that a model was trained to see


@cache
def word_ids() -> dict[str, int]:
    """Token id of every word, special tokens first."""
    return {word: i for i, word in enumerate(SPECIAL + vocabulary())}


def build_tokenizer(*, add_bos: bool) -> PreTrainedTokenizerFast:
    """The tokenizer as a `PreTrainedTokenizerFast`, padding on the left, ready to save."""
    words = Tokenizer(WordLevel(word_ids(), unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins with spaces; no word starts with ##
    if add_bos:
        words.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>" if add_bos else None,
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
