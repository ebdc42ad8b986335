"""Tokenizers: loaded, trained, saved; special tokens only where they belong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyrlhf.data import Message, Prompt, Tokenizer

Find = Callable[[str], Path]
SAMPLE = ["the quick brown fox jumps over the lazy dog. ", "你好，世界。你好！", "a  b\n\n\tc"] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (Message("system", "be kind"), Message("user", "hi"))


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(SAMPLE, 300)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_a_trained_tokenizer_gives_every_text_back(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text
    assert not {trained.bos_id, trained.eos_id} & set(trained.encode(text))


def test_training(trained: Tokenizer) -> None:
    assert trained.vocab_size == 300
    assert (trained.bos_id, trained.eos_id, trained.add_bos) == (0, 1, True)
    assert len(trained.encode("the quick brown fox")) < 10, "pairs were merged"
    assert Tokenizer.train(["ab"] * 5, 5000).vocab_size == 259, "there is one pair to merge and no more"
    with pytest.raises(ValueError, match="vocab_size: expected at least 258"):
        Tokenizer.train(SAMPLE, 257)


def test_training_is_the_same_in_every_process(trained: Tokenizer) -> None:
    here = hashlib.sha1(trained.fast.backend_tokenizer.to_str().encode()).hexdigest()
    code = (
        "import hashlib; from pyrlhf.data import Tokenizer\n"
        f"t = Tokenizer.train({SAMPLE!r}, 300)\n"
        "print(hashlib.sha1(t.fast.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "5", "RAYON_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == here


@pytest.mark.parametrize("model_type", [None, "gpt2", "llama", "qwen2", "bert", "pyrlhf"])
def test_saved_and_loaded_again(trained: Tokenizer, tmp_path: Path, model_type: str | None) -> None:
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode(SAMPLE[0]) == trained.encode(SAMPLE[0])
    assert (again.bos_id, again.eos_id, again.add_bos, again.vocab_size) == (0, 1, True, 300)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(SAMPLE[1]).input_ids == [0, *trained.encode(SAMPLE[1])]
    assert auto.eos_token_id == 1


def test_special_tokens_only_where_they_belong(trained: Tokenizer) -> None:
    assert trained.encode_prompt("the") == [0, *trained.encode("the")]
    assert trained.encode_prompt(Prompt("the")) == trained.encode_prompt("the")
    assert trained.encode_response("the") == [*trained.encode("the"), 1]
    assert trained.encode_response("the", eos=False) == trained.encode("the")
    assert trained.encode_prompt("") == [0]
    assert 1 not in trained.encode("a<|eos|>b")
    assert 1 in trained.encode("a<|eos|>b", special=True)
    assert trained.decode(trained.encode("a<|eos|>b")) == "a<|eos|>b"
    assert trained.decode([0, *trained.encode("a"), 1]) == "a"
    assert trained.decode([0, *trained.encode("a"), 1], special=True) == "<|bos|>a<|eos|>"
    without = Tokenizer(trained.fast, add_bos=False)
    assert without.encode_prompt("the") == trained.encode("the")
    assert without.encode_prompt("") == [0]


def test_messages_without_a_chat_template(trained: Tokenizer) -> None:
    assert trained.render(TURNS) == "system:\nbe kind\n\nuser:\nhi\n\nassistant:\n"
    assert trained.encode_prompt(TURNS) == [0, *trained.encode(trained.render(TURNS))]
    assert 1 not in trained.encode_prompt((Message("user", "<|eos|>"),))


def test_messages_through_a_chat_template(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.train(SAMPLE, 300).fast.backend_tokenizer
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    Tokenizer(fast).save(tmp_path)
    chat = Tokenizer.from_pretrained(tmp_path, add_bos=False)
    assert chat.vocab_size == 302
    text = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render(TURNS) == text
    found = chat.encode_prompt(Prompt(TURNS))
    assert found == chat.encode(text, special=True)
    assert chat.eos_id is not None
    assert found.count(chat.eos_id) == 2
    assert chat.decode(found, special=True) == text
    assert chat.encode_prompt("hi") == chat.encode("hi"), "plain text is never put into a template"
    chat.fast.chat_template = "{{ bos_token }}" + CHATML
    chat.add_bos = True
    assert chat.encode_prompt(TURNS) == [chat.bos_id, *found], "a template that writes BOS itself gets no second one"


def test_stories260k_reproduces_its_golden_ids(shared_data: Find) -> None:
    folder = shared_data("stories260k")
    golden = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    stories = Tokenizer.from_pretrained(folder)
    assert (stories.bos_id, stories.eos_id, stories.add_bos, stories.vocab_size) == (1, 2, True, 512)
    assert stories.encode_prompt(golden["text"]) == golden["token_ids"]
    assert stories.decode(golden["token_ids"]) == golden["text"]
    assert stories.encode_prompt("") == [1]


def test_answers_continue_their_prompt(shared_data: Find) -> None:
    """A tokenizer that puts a space before every text must not put one between prompt and answer."""
    stories = Tokenizer.from_pretrained(shared_data("stories260k"))
    whole = "Once upon a time, there was"
    prompt = stories.encode_prompt("Once upon a time")
    assert prompt + stories.encode_response(", there was", eos=False) == stories.encode_prompt(whole)
    assert stories.encode_response("Once", follows=False) == [*stories.encode("Once"), 2]
    assert stories.decode(prompt + stories.encode_response("ly")) == "Once upon a timely"
    for text in (" there was", "there", "\nLily", "é你"):
        assert stories.decode_response(prompt, stories.encode_response(text)) == text


def test_gpt2_files(shared_data: Find, tmp_path: Path) -> None:
    gpt2 = Tokenizer.from_pretrained(shared_data("gpt2_bpe"))
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("hello world") == [31373, 995]
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.add_bos, gpt2.vocab_size) == (50256, 50256, False, 50257)
    assert gpt2.encode_prompt("Hello world") == [15496, 995]
    assert gpt2.encode_prompt("") == [50256]
    assert gpt2.encode_response(" world") == [995, 50256]
    text = "It's   1234 naïve\n\n\tcafés, 你好 🙂!"
    assert gpt2.decode(gpt2.encode(text)) == text
    gpt2.save(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).encode(text) == gpt2.encode(text)


def test_truncation_and_padding_in_a_file_are_turned_off(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "<|bos|>"}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode(SAMPLE[0]) == trained.encode(SAMPLE[0])
    assert again.encode("a") == trained.encode("a")


def test_a_bare_tokenizer_json_and_named_tokens(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_pretrained(tmp_path)
    assert bare.eos_id is None
    with pytest.raises(ValueError, match="no EOS token, so no answer can end"):
        bare.encode_response("a")
    with pytest.raises(ValueError, match="add_bos: true, but the tokenizer has no BOS"):
        Tokenizer.from_pretrained(tmp_path, add_bos=True)
    assert Tokenizer.from_pretrained(tmp_path, eos_token="<|eos|>").encode_response("a")[-1] == 1


def test_missing_tokenizers_say_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"looked for a folder or a cached model at '{tmp_path}/no'"):
        Tokenizer.from_pretrained(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"looked for tokenizer.json, or \*vocab.json and \*merges.txt at"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="expected a fast tokenizer"):
        Tokenizer(object())  # type: ignore[arg-type]
