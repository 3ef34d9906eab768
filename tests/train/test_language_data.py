import dataclasses
import json
import logging
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tiny_language as tiny

from peftjax.core.errors import PeftError
from peftjax.text.chat import compile_template, render
from peftjax.train.data.language import conversations
from peftjax.train.data.language.batches import evaluation_batches, make_batch, training_batches
from peftjax.train.data.language.completions import Completion, read_completions, tokenize_completions
from peftjax.train.data.language.conversations import (
    Conversation,
    count_open_turns,
    read_conversations,
    tokenize_conversations,
)
from peftjax.train.data.language.corpus import split_document, tokenize_corpus
from peftjax.train.data.language.dataset import LanguageOptions
from peftjax.train.data.language.example import Example, encode_pieces
from peftjax.train.data.language.open import find_source, open_language_data
from peftjax.train.data.language.packing import best_fit_decreasing
from peftjax.train.data.language.rows import corpus_rows, example_rows
from peftjax.train.data.language.truncation import Cut, truncate

pytest.importorskip("jinja2", reason="jinja2 is in peftjax[train]")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("bos"), bos=True)


@pytest.fixture(scope="module")
def examples():
    """60 examples; example i has its own token 1000 + i everywhere."""
    generator = np.random.default_rng(0)
    made = []
    for i, length in enumerate(generator.integers(2, 50, size=60)):
        own = np.arange(length) >= generator.integers(0, length - 1)
        made.append(Example(1000 * (i + 1) + np.arange(length, dtype=np.int32), own))
    return made


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def said(tokenizer, example):
    return tokenizer.decode(example.ids[example.own], skip_special_tokens=False)


def joined(pieces):
    return [id for piece in pieces for id in piece]


def chat(messages=tiny.CHAT):
    return Conversation(tuple(messages), None, "chats.jsonl, line 3")


# Completions


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, Completion("a\n", "b")),
        ({"question": "a ", "answer": "b"}, Completion("a ", "b")),
        ({"prompt": "a", "response": " b"}, Completion("a", " b")),
        ({"input": "", "output": "b"}, Completion("", "b")),
        ({"instruction": "a", "input": "x", "output": "b"}, Completion("a\n\nx\n", "b")),
        ({"instruction": "a", "context": "", "response": "b"}, Completion("a\n", "b")),
        ({"question": "a", "context": "x", "answer": "b"}, Completion("a\n\nx\n", "b")),
        ({"prompt": "a", "input": "x", "completion": "b"}, Completion("a\n\nx\n", "b")),
        (
            {"instruction": "a", "output": "b", "system": "be kind", "history": [["q", "r"], ["s", "t"]]},
            Completion("be kind\n\nq\nr\n\ns\nt\n\na\n", "b"),
        ),
    ],
)
def test_columns_are_guessed(tmp_path, row, expected):
    assert read_completions(write_jsonl(tmp_path / "c.jsonl", [row])) == [expected]


def test_the_order_of_rows_does_not_choose_the_columns(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "x", "output": "d"}]
    expected = [Completion("a\n", "b"), Completion("c\n\nx\n", "d")]
    assert read_completions(write_jsonl(tmp_path / "c.jsonl", rows)) == expected
    assert read_completions(write_jsonl(tmp_path / "d.jsonl", rows[::-1])) == expected[::-1]


def test_a_column_that_is_null_at_first_decides_on_the_source(tmp_path):
    rows = [{"text": "a", "prompt": None}, {"text": "b", "prompt": "c", "completion": "d"}]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    assert find_source(path, LanguageOptions()) == "completions"


def test_columns_without_a_use_are_named_once(tmp_path, caplog):
    rows = [{"prompt": "a", "completion": "b", "score": 1, "id": 2}] * 3
    read_completions(write_jsonl(tmp_path / "c.jsonl", rows))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("c.jsonl: not used: the columns 'score', 'id'")


def test_chosen_columns_in_csv_and_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "c.csv").write_text('ask,say,prompt\n"a, b",c,no\n')
    parquet.write_table(arrow.table({"ask": ["a, b"], "say": ["c"]}), tmp_path / "c.parquet")
    for name in ("c.csv", "c.parquet"):
        rows = read_completions(
            tmp_path / name, prompt_column="ask", completion_column="say", separator=" => "
        )
        assert rows == [Completion("a, b => ", "c")]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "has no rows"),
        ([{"prompt": "a"}], "no completion column"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], r"line 2 lacks the column 'completion'"),
        ([{"prompt": 3, "completion": "b"}], "the prompt is 3, not a string"),
        ([{"prompt": "a", "completion": ["b"]}], r"the completion is \['b'\]"),
        ([{"prompt": "a", "completion": "b", "history": [["c"]]}], r"line 1: the history has \['c'\], not a"),
        ([{"prompt": "a", "completion": "b", "history": "{"}], "line 1: the history is not JSON"),
        ([{"prompt": "a", "completion": "b", "system": 3}], "line 1: the system is 3, not a string"),
    ],
)
def test_bad_completions(tmp_path, rows, says):
    with pytest.raises(PeftError, match=says):
        read_completions(write_jsonl(tmp_path / "c.jsonl", rows))


def test_only_the_completion_and_its_eos_are_learnt(tokenizer):
    rows = [Completion("the cat ", "sat on"), Completion("", "the"), Completion("<s>the", " dog</s>")]
    examples = tokenize_completions(rows, tokenizer)
    assert [said(tokenizer, example) for example in examples] == ["sat on</s>", "the</s>", " dog</s>"]
    whole = [tokenizer.decode(example.ids, skip_special_tokens=False) for example in examples]
    assert whole == ["<s>the cat sat on</s>", "<s>the</s>", "<s>the dog</s>"]


def test_no_eos_is_an_error(tokenizer):
    without = dataclasses.replace(tokenizer, eos_id=None, stop_ids=())
    with pytest.raises(PeftError, match="name an eos_token"):
        tokenize_completions([Completion("a", "b")], without)


def test_no_token_crosses_a_seam(tokenizer):
    # 'the' is one token, so after 't' the rest has to be tokenized alone.
    (pieces,) = encode_pieces(tokenizer, [["t", "he cat", " sat"]])
    assert [tokenizer.decode(ids) for ids in pieces] == ["t", "he cat", " sat"]
    assert joined(pieces) != tokenizer.token_ids(["the cat sat"])[0]
    (pieces,) = encode_pieces(tokenizer, [["the", " cat", "", " sat"]])
    assert joined(pieces) == tokenizer.token_ids(["the cat sat"])[0]


def test_a_piece_gets_no_space_in_front(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path, metaspace=True)
    (pieces,) = encode_pieces(tokenizer, [["the cat?", "no"]])
    assert joined(pieces) == tokenizer.token_ids(["the cat?no"])[0]
    assert pieces[1] != tokenizer.token_ids(["no"])[0]


def test_a_token_across_the_seam_puts_no_space_there(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path, metaspace=True)
    (pieces,) = encode_pieces(tokenizer, [["t", "he cat", " sat"]])
    assert pieces[0] != tokenizer.token_ids(["the"])[0][:1] or len(tokenizer.token_ids(["the"])[0]) > 1
    assert tokenizer.decode(joined(pieces)) == "the cat sat"


# Conversations


@pytest.mark.parametrize("name", tiny.TEMPLATES)
def test_every_turn_with_its_end_and_nothing_else(tokenizer, name):
    template = compile_template(tiny.TEMPLATES[name], tokenizer.special_tokens)
    (example,) = tokenize_conversations([chat()], template, tokenizer)
    end = tiny.END_OF_TURN[name]
    space = " " if name == "mistral" else ""
    assert said(tokenizer, example) == "".join(space + m["content"] + end for m in tiny.CHAT[1::2])
    assert example.ids.tolist() == tokenizer.token_ids([render(template, tiny.CHAT)])[0]
    assert count_open_turns([example], tokenizer) == 0


def test_generation_blocks_agree_with_prefixes(tokenizer):
    by_prefix, by_block = (
        tokenize_conversations([chat()], compile_template(source, tokenizer.special_tokens), tokenizer)[0]
        for source in (tiny.CHATML, tiny.GENERATION)
    )
    np.testing.assert_array_equal(by_prefix.ids, by_block.ids)
    np.testing.assert_array_equal(by_prefix.own, by_block.own)


def test_a_template_that_ends_every_chat_with_eos(tokenizer):
    source = tiny.CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    (example,) = tokenize_conversations(
        [chat()], compile_template(source, tokenizer.special_tokens), tokenizer
    )
    first, last = (m["content"] + "<|im_end|>" for m in tiny.CHAT[1::2])
    assert said(tokenizer, example) == f"{first}{last}\n</s>"


def test_a_block_may_hold_the_white_space_after_a_turn(tokenizer):
    source = tiny.GENERATION.replace("<|im_end|>{% endgen", "<|im_end|>{{ '\n' }}{% endgen")
    (example,) = tokenize_conversations([chat()], compile_template(source, {}), tokenizer)
    assert said(tokenizer, example).endswith("how are you?<|im_end|>\n")
    assert count_open_turns([example], tokenizer) == 0


def test_a_template_that_rewrites_history_is_an_error(tokenizer):
    template = compile_template(tiny.FORGETFUL, {})
    thinking = [dict(message) for message in tiny.CHAT]
    thinking[1]["content"] = "<think>so</think>the answer"
    with pytest.raises(PeftError, match=r"line 3: .* up to message 2 in another way"):
        tokenize_conversations([chat(thinking)], template, tokenizer)
    (example,) = tokenize_conversations([chat(thinking[:2])], template, tokenizer)
    assert said(tokenizer, example) == "<think>so</think>the answer<|im_end|>"


def test_a_generation_prompt_that_turns_do_not_begin_with_is_an_error(tokenizer):
    template = compile_template(tiny.CHATML.replace("assistant\n'", "assistant\n<think>'"), {})
    with pytest.raises(PeftError, match="is not how message 2 begins"):
        tokenize_conversations([chat()], template, tokenizer)


def test_a_template_without_a_generation_prompt_is_an_error(tokenizer):
    template = compile_template(tiny.CHATML.split("{% if add_")[0], {})
    with pytest.raises(PeftError, match="no generation prompt"):
        tokenize_conversations([chat()], template, tokenizer)


def test_a_refusal_names_the_row(tokenizer):
    template = compile_template(tiny.GEMMA, {})
    with pytest.raises(PeftError, match=r"line 3: .*no system role"):
        tokenize_conversations([chat([{"role": "system", "content": "a"}])], template, tokenizer)


def test_turns_without_an_end_are_counted(tokenizer):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    template = compile_template(source + "{% if add_generation_prompt %}assistant: {% endif %}", {})
    (example,) = tokenize_conversations([chat()], template, tokenizer)
    assert count_open_turns([example], tokenizer) == 2
    assert said(tokenizer, example).startswith("the answer is here.\nthe cat.\n\n")


def test_both_forms_of_chat_files(tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in tiny.CHAT]
    rows = [{"conversations": turns, "system": "be kind", "tools": '[{"name": "f"}]'}]
    (shared,) = read_conversations(write_jsonl(tmp_path / "s.jsonl", rows))
    assert shared.messages == ({"role": "system", "content": "be kind"}, *tiny.CHAT)
    assert shared.tools == ({"name": "f"},)
    (plain,) = read_conversations(write_jsonl(tmp_path / "p.jsonl", [{"messages": tiny.CHAT}]))
    assert plain.messages == tuple(tiny.CHAT)


@pytest.mark.parametrize("source", [tiny.CHATML, tiny.GENERATION])
@pytest.mark.parametrize("left_out", [{"weight": 0}, {"train": False}])
def test_a_message_can_be_left_unlearnt(tmp_path, tokenizer, source, left_out):
    messages = [tiny.CHAT[0], tiny.CHAT[1] | left_out, tiny.CHAT[2], tiny.CHAT[3] | {"weight": 1}]
    chats = read_conversations(write_jsonl(tmp_path / "c.jsonl", [{"messages": messages}]))
    template = compile_template(source, tokenizer.special_tokens)
    (example,) = tokenize_conversations(chats, template, tokenizer)
    assert said(tokenizer, example) == "how are you?<|im_end|>"
    assert example.ids.tolist() == tokenizer.token_ids([render(template, tiny.CHAT)])[0]


def test_of_prompt_and_completion_in_messages_only_the_completion_is_learnt(tmp_path, tokenizer):
    row = {"prompt": tiny.CHAT[:3], "completion": tiny.CHAT[3:], "tools": None}
    path = write_jsonl(tmp_path / "c.jsonl", [row])
    assert find_source(path, LanguageOptions()) == "conversations"
    template = compile_template(tiny.CHATML, tokenizer.special_tokens)
    (example,) = tokenize_conversations(read_conversations(path), template, tokenizer)
    assert said(tokenizer, example) == "how are you?<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": json.dumps(tiny.CHAT)},
        {"conversations": [{"from": m["role"], "content": m["content"]} for m in tiny.CHAT]},
        {"prompt": json.dumps(tiny.CHAT[:3]), "completion": tiny.CHAT[3]},
    ],
)
def test_other_forms_of_messages(tmp_path, row):
    (one,) = read_conversations(write_jsonl(tmp_path / "c.jsonl", [row]))
    assert one.messages == tuple(tiny.CHAT)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "model", "content": "a"}]}, "a message has the role 'model'"),
        ({"messages": [{"role": "Assistant", "content": "a"}]}, "'Assistant'; closest: 'assistant'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"the role \['user'\]"),
        ({"messages": [{"from": {"a": 1}, "value": "a"}]}, r"is from {'a': 1}"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content of a message is 3, not"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0.5}]}, "the weight of a message is 0.5"),
        ({"messages": [{"role": "user", "content": "a", "train": "no"}]}, "the train of a message is 'no'"),
        ({"messages": "[{"}, "the messages are not JSON"),
        ({"messages": tiny.CHAT, "tools": ["f"]}, "a tool is 'f', not an object"),
        ({"messages": "hello"}, "messages is 'hello', not a list"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": ["hello"]}, "a message is 'hello'"),
        ({"messages": [{"text": "a"}]}, r"neither a role .* it has \['text'\]"),
        ({"conversations": [{"from": "humam", "value": "a"}]}, "'humam'; closest: 'human'"),
        ({"messages": tiny.CHAT, "tools": "{"}, "tools are not JSON"),
        ({"messages": tiny.CHAT, "tools": "{}"}, "tools are '{}', not a list"),
        ({"messages": tiny.CHAT, "system": 3}, "the system is 3"),
    ],
)
def test_bad_chats(tmp_path, row, says):
    with pytest.raises(PeftError, match=f"line 1.*{says}"):
        read_conversations(write_jsonl(tmp_path / "c.jsonl", [row]))


# Truncation


def example(text):
    """Tokens numbered from 0; '-' a prompt's, '+' a completion's."""
    return Example(np.arange(len(text), dtype=np.int32), np.array([letter == "+" for letter in text]))


@pytest.mark.parametrize(
    ("text", "ids", "own", "cut"),
    [
        ("----++", [0, 1, 2, 3, 4, 5], "----++", Cut()),
        ("-----++", [0, 2, 3, 4, 5, 6], "----++", Cut(shortened=1, tokens=1)),
        ("-------+++++", [0, 7, 8, 9, 10, 11], "-+++++", Cut(shortened=1, tokens=6)),
        ("-------++++++", None, "", Cut(too_long=1)),
        ("-+++++++", None, "", Cut(too_long=1)),
        ("--+++-++", [0, 3, 4, 5, 6, 7], "----++", Cut(shortened=1, tokens=2, turns=1)),
        ("--++--+++", [0, 4, 5, 6, 7, 8], "---+++", Cut(shortened=1, tokens=3, turns=1)),
        ("---++-----", [0, 1, 2, 3, 4], "---++", Cut()),
        ("----", None, "", Cut(empty=1)),
    ],
)
def test_the_prompt_is_cut_from_the_left(text, ids, own, cut):
    kept, counted = truncate([example(text)], 6, prefix=(0,))
    assert counted == cut
    assert [one.ids.tolist() for one in kept] == ([] if ids is None else [ids])
    assert ["".join("-+"[int(flag)] for flag in one.own) for one in kept] == ([own] if own else [])


def test_truncation_without_bos_keeps_a_token_to_start_from():
    kept, cut = truncate([example("--+++++"), example("--++++++")], 6)
    assert [one.ids.tolist() for one in kept] == [[1, 2, 3, 4, 5, 6]]
    assert cut == Cut(shortened=1, tokens=1, too_long=1)


def test_truncation_where_prompts_count():
    kept, cut = truncate([example("--------"), example("-")], 6, prefix=(0,), train_on_prompt=True)
    assert [one.ids.tolist() for one in kept] == [[0, 3, 4, 5, 6, 7]]
    assert cut == Cut(shortened=1, tokens=2, empty=1)


# Packing


def test_packing_fills_rows():
    # Three hundred rows cut in random places can be put together again without a gap, almost.
    generator = np.random.default_rng(1)
    lengths = []
    for _ in range(300):
        cuts = np.sort(generator.choice(np.arange(1, 128), 4, replace=False))
        lengths += np.diff([0, *cuts, 128]).tolist()
    rows = best_fit_decreasing(lengths, 128)
    assert Counter(i for row in rows for i in row) == Counter(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 128
    assert len(rows) <= 303
    assert rows == best_fit_decreasing(lengths, 128)


def segments_of(batch):
    """(ids, labels that count, positions) of every segment of a packed batch."""
    found = []
    for row in range(len(batch["input_ids"])):
        for number in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["segment_ids"][row] == number
            one = {name: batch[name][row][at] for name in batch}
            assert (one["attention_mask"] == 1).all()
            assert one["position_ids"].tolist() == list(range(at.sum()))
            counted = np.where(one["weights"] > 0, one["labels"], -1)
            found.append((one["input_ids"].tolist(), counted.tolist()))
    return found


@pytest.mark.parametrize("everywhere", [False, True])
def test_packed_segments_are_the_examples(examples, everywhere):
    rows = example_rows(examples, max_length=64, pad_id=7, packed=True, train_on_prompt=everywhere)
    assert rows.efficiency == rows.tokens / (64 * len(rows)) > 0.93
    batch = make_batch(rows, range(len(rows)), len(rows))
    expected = []
    for one in examples:
        learnt = [int(one.ids[t + 1]) if everywhere or one.own[t + 1] else -1 for t in range(len(one) - 1)]
        expected.append((one.ids.tolist(), [*learnt, -1]))
    assert sorted(segments_of(batch)) == sorted(expected)
    padding = batch["segment_ids"] == 0
    assert (batch["input_ids"][padding] == 7).all()
    assert not batch["attention_mask"][padding].any()
    assert not batch["weights"][padding].any()
    assert rows.counted_tokens == batch["weights"].sum()


def test_bucketed_rows_are_the_examples(examples):
    rows = example_rows(examples, max_length=50, pad_id=7, packed=False)
    slots = sum(next(b for b in (16, 32, 50) if b >= len(one)) for one in examples)
    assert rows.efficiency == sum(map(len, examples)) / slots
    for chosen in ([3], [0, 5, 9], range(60)):
        batch = make_batch(rows, chosen, 60)
        assert "segment_ids" not in batch
        longest = max(len(examples[i]) for i in chosen)
        assert batch["input_ids"].shape == (60, next(b for b in (16, 32, 50) if b >= longest))
        for row, i in enumerate(chosen):
            n = len(examples[i])
            assert batch["input_ids"][row, :n].tolist() == examples[i].ids.tolist()
            assert batch["attention_mask"][row].sum() == n
            assert batch["position_ids"][row, :n].tolist() == list(range(n))
            counted = batch["labels"][row][batch["weights"][row] > 0]
            assert counted.tolist() == examples[i].ids[1:][examples[i].own[1:]].tolist()
        assert not batch["weights"][len(chosen) :].any()
        assert batch["attention_mask"][len(chosen) :].sum(axis=1).tolist() == [1] * (60 - len(chosen))
    kinds = {name: array.dtype.name for name, array in batch.items()}
    assert kinds.pop("weights") == "float32"
    assert set(kinds.values()) == {"int32"}


# Running text


@pytest.mark.parametrize("count", [30, 31, 32, 40, 41])
def test_blocks_have_every_token_as_label_once(count):
    stream = np.arange(100, 100 + count, dtype=np.int32)
    documents = [Example(part, np.ones(len(part), bool)) for part in np.split(stream, [7, 20, 21])]
    rows = corpus_rows(documents, max_length=10, pad_id=0)
    assert rows.layout == "blocks"
    batch = make_batch(rows, range(len(rows)), len(rows))
    assert batch["labels"][batch["weights"] > 0].tolist() == stream[1:].tolist()
    assert batch["input_ids"][batch["attention_mask"] > 0].tolist() == stream[:-1].tolist()
    assert "segment_ids" not in batch
    assert batch["input_ids"].shape == (-(-(count - 1) // 10), 10)


def test_documents_apart():
    stream = np.arange(100, 145, dtype=np.int32)
    ends = [7, 20, 21, 30]
    documents = [Example(part, np.ones(len(part), bool)) for part in np.split(stream, ends)]
    rows = corpus_rows(documents, max_length=10, pad_id=0, attend_across_documents=False)
    batch = make_batch(rows, range(len(rows)), len(rows))
    assert batch["input_ids"].shape == (5, 10)
    assert batch["segment_ids"][0].tolist() == [1] * 7 + [2] * 3
    assert batch["segment_ids"][2].tolist() == [1] + [2] * 9
    assert batch["segment_ids"][4].tolist() == [1] * 4 + [0] * 6
    assert batch["position_ids"][2].tolist() == [0, *range(9)]
    expected = [token for token in stream[1:].tolist() if token - 100 not in ends]
    assert batch["labels"][batch["weights"] > 0].tolist() == expected
    assert (batch["labels"] - batch["input_ids"])[batch["weights"] > 0].tolist() == [1] * len(expected)


def test_documents_stand_between_bos_and_eos(tokenizer):
    documents = tokenize_corpus(["the cat", "a dog"], tokenizer)
    texts = [tokenizer.decode(one.ids, skip_special_tokens=False) for one in documents]
    assert texts == ["<s>the cat</s>", "<s>a dog</s>"]


def test_a_single_text_is_split_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    train, held = split_document(text)
    assert train + held == text
    assert train.endswith("\n")
    assert 0.05 < len(held) / len(text) <= 0.1
    assert split_document("ab " * 20) == ("ab " * 19, "ab ")
    with pytest.raises(PeftError, match="too short"):
        split_document("one")


# Batches


@pytest.mark.parametrize("packed", [False, True])
def test_every_epoch_has_every_example_once(examples, packed):
    rows = example_rows(examples[:48], max_length=50, pad_id=0, packed=packed)
    size = 8 if not packed else 1
    stream = training_batches(rows, size, seed=3)
    epochs = [[next(stream) for _ in range(len(rows) // size)] for _ in range(2)]
    firsts = []
    for epoch in epochs:
        flat = np.concatenate([batch["input_ids"].ravel() for batch in epoch])
        ids = flat[(flat > 0) & (flat % 1000 == 0)].tolist()
        assert Counter(ids) == Counter(1000 * (i + 1) for i in range(48))
        firsts.append(ids)
    assert firsts[0] != firsts[1]
    if packed:
        assert {batch["input_ids"].shape for epoch in epochs for batch in epoch} == {(1, 50)}


def test_batches_have_examples_of_similar_length(examples):
    rows = example_rows(examples[:48], max_length=50, pad_id=0, packed=False)
    stream = training_batches(rows, 8, seed=3)
    lengths = sorted(sorted(next(stream)["attention_mask"].sum(axis=1).tolist()) for _ in range(6))
    assert all(shorter[-1] <= longer[0] for shorter, longer in pairwise(lengths))


@pytest.mark.parametrize("packed", [False, True])
def test_restored_iterator_continues_with_the_next_batch(examples, packed):
    rows = example_rows(examples, max_length=50, pad_id=0, packed=packed)
    stream = training_batches(rows, 4, seed=5)
    for _ in range(17):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(20)]
    resumed = training_batches(rows, 4, seed=5)
    resumed.set_state(state)
    for batch in expected:
        np.testing.assert_equal(next(resumed), batch)


@pytest.mark.parametrize("packed", [False, True])
def test_evaluation_counts_every_label_once(examples, packed):
    rows = example_rows(examples, max_length=50, pad_id=0, packed=packed)
    taken = list(evaluation_batches(rows, 7))
    labels = [label for b in taken for label in b["labels"][b["weights"] > 0].tolist()]
    assert Counter(labels) == Counter(int(id) for one in examples for id in one.ids[1:][one.own[1:]])
    assert {len(batch["input_ids"]) for batch in taken} == {7}
    for batch in taken:
        assert (batch["attention_mask"][:, 0] == 1).all()
        if packed:
            np.testing.assert_array_equal(batch["attention_mask"], batch["segment_ids"] > 0)


# Whole files


@pytest.fixture
def completions(tmp_path):
    rows = [{"prompt": f"the cat {i // 2}", "completion": f"sat {i}"} for i in range(200)]
    return write_jsonl(tmp_path / "cats.jsonl", rows)


def texts_of(rows, tokenizer):
    return [tokenizer.decode(rows.ids[start:stop]) for start, stop in rows.segments]


def test_a_tenth_is_held_out_and_prompts_stay_together(completions, tokenizer):
    data = open_language_data(completions, tokenizer, max_length=32)
    assert (data.name, data.source, data.train.layout) == ("cats", "completions", "bucketed")
    assert data.train_cut == data.evaluation_cut == Cut()
    train, held = (texts_of(rows, tokenizer) for rows in (data.train, data.evaluation))
    assert len(train) + len(held) == 200
    assert 6 <= len(held) <= 40
    assert not {text.split("\n")[0] for text in train} & {text.split("\n")[0] for text in held}


def test_what_is_cut_is_reported(completions, tokenizer, caplog, tmp_path):
    rows = [{"prompt": "the cat " * 40, "completion": "sat"}, {"prompt": "a", "completion": "dog " * 90}]
    held = write_jsonl(tmp_path / "held.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        data = open_language_data(completions, tokenizer, max_length=24, eval_data=held)
    cut = data.evaluation_cut
    assert (cut.shortened, cut.too_long, data.train_cut) == (1, 1, Cut())
    assert len(data.train) == 200
    assert len(data.evaluation) == 1
    assert data.evaluation.lengths.tolist() == [24]
    assert f"examples to evaluate on (2): {cut}" in caplog.text
    with pytest.raises(PeftError, match="none of 200 can be used with max_length 2: 200 examples left out"):
        open_language_data(completions, tokenizer, max_length=2, eval_data=held)


def test_chats_with_the_tokenizers_own_template(tmp_path):
    tokenizer = tiny.tokenizer(tmp_path, settings={"chat_template": tiny.LLAMA})
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": tiny.CHAT}] * 3)
    options = LanguageOptions(packed=True)
    data = open_language_data(path, tokenizer, max_length=128, eval_data=path, options=options)
    assert (data.source, data.train.layout) == ("conversations", "packed")
    (batch,) = evaluation_batches(data.train, len(data.train))
    learnt = tokenizer.decode(batch["labels"][batch["weights"] > 0], skip_special_tokens=False)
    assert learnt == "the answer is here.\nthe cat.<|eot|>how are you?<|eot|>" * 3
    everything = dataclasses.replace(options, train_on_prompt=True)
    more = open_language_data(path, tokenizer, max_length=128, eval_data=path, options=everything)
    assert more.train.counted_tokens == more.train.tokens - 3


def test_turns_without_an_end_are_reported(tmp_path, tokenizer, caplog):
    source = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": tiny.CHAT}])
    open_language_data(path, tokenizer, max_length=128, eval_data=path, template=compile_template(source, {}))
    assert "ends 2 of the assistant's turns without" in caplog.text


def test_running_text_from_both_formats(tmp_path, tokenizer, caplog):
    plain = tmp_path / "book.txt"
    plain.write_text("the cat sat on the mat\n" * 50)
    data = open_language_data(plain, tokenizer, max_length=16)
    assert (data.source, data.train.layout) == ("corpus", "blocks")
    assert data.train.efficiency > 0.9
    table = write_jsonl(tmp_path / "t.jsonl", [{"text": f"the cat {i}"} for i in range(99)] + [{"text": " "}])
    options = LanguageOptions(attend_across_documents=False)
    data = open_language_data(table, tokenizer, max_length=16, options=options)
    assert (data.source, data.train.layout) == ("corpus", "packed")
    assert "left out 1 empty documents" in caplog.text
    ids = np.concatenate([data.train.ids, data.evaluation.ids])
    assert (ids == tokenizer.eos_id).sum() == 99


@pytest.mark.parametrize(
    ("columns", "options", "source"),
    [
        (["messages", "prompt", "completion"], {}, "conversations"),
        (["text", "instruction", "output"], {}, "completions"),
        (["text", "output"], {}, "corpus"),
        (["text", "instruction", "output"], {"text_column": "text"}, "corpus"),
        (["text", "a", "b"], {"prompt_column": "a", "completion_column": "b"}, "completions"),
        (["text", "instruction", "output"], {"source": "corpus"}, "corpus"),
    ],
)
def test_the_columns_decide_on_the_source(tmp_path, tokenizer, columns, options, source):
    row = {name: tiny.CHAT if name == "messages" else "the cat" for name in columns}
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    data = open_language_data(
        path,
        tokenizer,
        max_length=128,
        eval_data=path,
        options=LanguageOptions(**options),
        template=compile_template(tiny.CHATML, {}),
    )
    assert data.source == source


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        ({"a": "b", "c": "d"}, {}, r"columns of .* \('a', 'c'\) are neither"),
        ({"text": "a"}, {"source": "chats"}, "no source of texts is called 'chats'"),
        ({"text": "a"}, {"text_column": "txt"}, "did you mean 'text'"),
        ({"text": 3}, {}, "the text is 3, not a string"),
        ({"text": " "}, {}, "has no text"),
        ({"messages": tiny.CHAT}, {}, "the tokenizer has no chat template"),
        ({"prompt": "a", "completion": "b"}, {}, "too few rows to hold some out"),
    ],
)
def test_bad_files_and_options(tmp_path, tokenizer, row, options, says):
    path = write_jsonl(tmp_path / "d.jsonl", [row, row])
    held = None if "hold" in says else path
    with pytest.raises(PeftError, match=says):
        open_language_data(path, tokenizer, max_length=16, eval_data=held, options=LanguageOptions(**options))


CALL = {"name": "weather", "arguments": {"city": "Rome"}}
CALLING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
CALLING += "[{{ c.function.name }} {{ c.function.arguments.city }}]{% endfor %}</s>{% endfor %}"
CALLING += "{% if add_generation_prompt %}<assistant>{% endif %}"


def sharegpt(tmp_path, call):
    turns = [("human", "how is it?"), ("function_call", call), ("observation", "sun"), ("gpt", "fine")]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns]}
    return read_conversations(write_jsonl(tmp_path / "chats.jsonl", [row]))[0]


@pytest.mark.parametrize(
    ("source", "texts"),
    [(CALLING, ("[weather Rome]", "fine")), (tiny.CHATML, (json.dumps(CALL), "fine"))],
    ids=["a template that reads calls", "one that reads content alone"],
)
def test_a_function_call_of_sharegpt_is_learnt_as_the_assistants(source, texts, tmp_path, tokenizer):
    chat = sharegpt(tmp_path, json.dumps(CALL))
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    template = compile_template(source, tokenizer.special_tokens)
    text = "".join(conversations._pieces(chat, template))
    learnt = conversations._pieces(chat, template)[1::2]
    assert all(own in piece for own, piece in zip(texts, learnt, strict=True))
    assert "sun" in text
    assert "how is it?" not in "".join(learnt)


def test_a_function_call_that_is_no_call_is_text(tmp_path):
    call = sharegpt(tmp_path, "{}").messages[1]
    assert call == {"role": "assistant", "content": "{}"}
