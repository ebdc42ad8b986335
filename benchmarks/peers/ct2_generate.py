"""CTranslate2 generates with the GPT-2 checkpoint in a folder; one run a line (see channel.py).

    python ct2_generate.py FOLDER --prompts N --prompt-tokens N --new-tokens N --threads N [--compute-type int8]

Tokens are drawn from the whole distribution, as for reinforcement learning, and every response has all its tokens.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from typing import Any

import ctranslate2
from channel import Channel
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, PreTrainedTokenizerFast


class Converter(TransformersConverter):
    """For a checkpoint without a tokenizer: the token of id i is called "i"."""

    def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerFast:
        size = AutoConfig.from_pretrained(model_name_or_path).vocab_size
        words = WordLevel({str(i): i for i in range(size)}, unk_token="0")
        last = str(size - 1)
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), bos_token=last, eos_token=last, unk_token="0")


def main(given: argparse.Namespace) -> None:
    channel = Channel()
    with tempfile.TemporaryDirectory() as folder:
        Converter(given.folder).convert(folder, quantization=given.compute_type, force=True)
        generator = ctranslate2.Generator(
            folder, device="cpu", compute_type=given.compute_type, inter_threads=1, intra_threads=given.threads
        )
    size = AutoConfig.from_pretrained(given.folder).vocab_size
    draw = random.Random(0)
    prompts = [[str(draw.randrange(size - 1)) for _ in range(given.prompt_tokens)] for _ in range(given.prompts)]
    while True:
        channel.wait()
        results = generator.generate_batch(
            prompts,
            max_length=given.new_tokens,
            min_length=given.new_tokens,
            sampling_topk=0,
            sampling_temperature=1.0,
            include_prompt_in_result=False,
        )
        tokens = sum(len(result.sequences_ids[0]) for result in results)
        if tokens != given.prompts * given.new_tokens:
            raise RuntimeError(
                f"expected {given.prompts} responses of {given.new_tokens} tokens, found {tokens} tokens"
            )
        channel.answer(tokens=tokens)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--compute-type", default="int8")
    main(parser.parse_args())
