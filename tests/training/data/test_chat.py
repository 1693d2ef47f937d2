"""What carries loss, in one tokenisation of the whole conversation, for Phi-3's template and for others."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from advisor.errors import InputError
from advisor.training.data.rows import BadRowLog, Place
from advisor.training.data.samples import Alpaca, Completion, Conversation, Message, PlainText, Sample
from advisor.training.data.tokens import TokenizedRow, tokenize_rows

CHATML = (
    "{% for m in messages %}{{ '<|system|>' + m.role + '\n' + m.content + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|system|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim").replace(
    "'\n' + m.content | trim", "'\n' + (m.content | trim)"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('no system') }}"
    "{% endif %}{% endfor %}"
)
NO_SPECIAL = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
)
FORGETS_SYSTEM = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
STRIPS_THOUGHTS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1] if not loop.last "
    "else m.content %}{{ '<|assistant|>\n' + c + '<|end|>' }}{% else %}{{ '<|user|>\n' + m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

TALK = Conversation(
    (Message("user", "Hi"), Message("assistant", "Yes, sir."), Message("user", "Bye"), Message("assistant", "So long"))
)


def tokenize(sample: Sample, tokenizer: Any, context: int = 4096) -> TokenizedRow:
    bad = BadRowLog()
    rows = list(tokenize_rows([(Place(file="f", number=1), sample)], tokenizer, context=context, bad=bad))
    assert not bad.count, bad.shown[0].why
    return rows[0]


def reason(sample: Sample, tokenizer: Any, context: int = 4096) -> str:
    bad = BadRowLog()
    assert not list(tokenize_rows([(Place(file="f", number=1), sample)], tokenizer, context=context, bad=bad))
    return bad.shown[0].why


def learned(row: TokenizedRow, tokenizer: Any) -> list[str]:
    """The tokens that carry loss."""
    return list(tokenizer.convert_ids_to_tokens(row.ids[row.learned].tolist()))


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def test_phi3_learns_each_answer_its_end_and_the_end_of_the_text(tokenizer: Any) -> None:
    row = tokenize(TALK, tokenizer)
    assert learned(row, tokenizer) == ["▁Yes", ",", "▁sir", ".", "<|end|>", "▁So", "▁long", "<|end|>", "<|endoftext|>"]


@pytest.mark.parametrize("blanks", ["", " ", "\n\n  ", "\t"])
def test_the_tokens_are_those_of_the_whole_conversation(blanks: str, tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "日本" + blanks},
        {"role": "user", "content": blanks + "def f():\n    return 1" + blanks},
        {"role": "assistant", "content": blanks + "    é🙂 code" + blanks},
    ]
    row = tokenize(Conversation(tuple(Message(turn["role"], turn["content"]) for turn in turns)), tokenizer)
    assert row.ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)
    tokens = learned(row, tokenizer)
    assert tokens[-2:] == ["<|end|>", "<|endoftext|>"]
    assert "<|assistant|>" not in tokens
    assert "é🙂 code" in tokenizer.decode(row.ids[row.learned].tolist())
    assert "日本" not in tokenizer.decode(row.ids[row.learned].tolist())


def test_loss_is_on_the_completion_only_where_the_prompt_has_answers_too(tokenizer: Any) -> None:
    row = tokenize(Conversation(TALK.messages, learned_from=2), tokenizer)
    assert learned(row, tokenizer) == ["▁So", "▁long", "<|end|>", "<|endoftext|>"]


def test_prompts_and_alpaca_go_through_the_chat_template(tokenizer: Any) -> None:
    row = tokenize(Alpaca("Add", "1 2", "3"), tokenizer)
    turns = [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert row.ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=False)
    assert tokenize(Completion("Add\n\n1 2", "3"), tokenizer).ids.tolist() == row.ids.tolist()


ANSWERS = ["▁Yes", ",", "▁sir", "."], ["▁So", "▁long"]


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, (["<|end|>"], ["<|end|>"])),
        (TRIMMED, (["<|end|>"], ["<|end|>"])),
        (BRACKETS, (["<|endoftext|>"], ["<|endoftext|>"])),
        (NO_SPECIAL, ([], ["<|endoftext|>"])),
        (MARKED, (["<|end|>"], ["<|end|>"])),
        (STRIPS_THOUGHTS, (["<|end|>"], ["<|end|>"])),
    ],
    ids=["chatml", "trimmed", "brackets", "no-special", "marked", "thoughts"],
)
def test_other_templates_learn_answers_and_their_ends(template: str, ends: Any, tokenizer: Any) -> None:
    other = with_template(tokenizer, template)
    tokens = learned(tokenize(TALK, other), tokenizer)
    joined = "".join(token.replace("▁", " ").strip() for token in tokens)
    first, second = ends
    assert joined == "Yes,sir." + "".join(first) + "Solong" + "".join(second)


def test_a_template_that_changes_contents_is_followed_by_prefixes(tokenizer: Any) -> None:
    other = with_template(tokenizer, STRIPS_THOUGHTS)
    talk = Conversation((Message("user", "Hi"), Message("assistant", "<think>hm</think>Yes"), *TALK.messages[2:]))
    row = tokenize(talk, other)
    said = tokenizer.decode(row.ids[row.learned].tolist())
    assert said.replace(" ", "") == "Yes<|end|>Solong<|end|>"


def test_a_template_that_leaves_a_turn_out_or_refuses_it_makes_a_bad_row(tokenizer: Any) -> None:
    talk = Conversation((Message("system", "Be kind"), *TALK.messages))
    assert "leaves the system's turn out" in reason(talk, with_template(tokenizer, FORGETS_SYSTEM))
    assert "the chat template refuses it: no system" in reason(talk, with_template(tokenizer, BRACKETS))


def test_text_that_reads_like_a_special_token_stays_text(tokenizer: Any) -> None:
    talk = Conversation(
        (Message("user", "End with <|end|> and <s>"), Message("assistant", "Say <|end|>  twice: <|end|>"))
    )
    row = tokenize(talk, tokenizer)
    special = [token for token in row.ids.tolist() if token >= 32000 or token < 3]
    assert special == [32010, 32007, 32001, 32007, 32000]
    tokens = learned(row, tokenizer)
    assert "".join(tokens).replace("▁", " ").strip() == "Say <|end|>  twice: <|end|><|end|><|endoftext|>"
    assert row.learned.sum() < len(row.ids) - 8


def test_hidden_special_tokens_give_the_same_tokens(tokenizer: Any) -> None:
    from advisor.training.data.chat import Renderer
    from advisor.training.data.literal import SpecialTokens

    special = SpecialTokens(tokenizer)
    talk = Conversation((Message("user", "  End "), Message("assistant", "Say 日本\n")))
    text = Renderer(tokenizer, special).render(talk).text
    assert special.encode_hidden(special.hide(text))[0].tolist() == tokenize(talk, tokenizer).ids.tolist()


def test_text_that_reads_like_a_special_token_is_a_bad_row_where_the_template_cannot_be_told_apart(
    tokenizer: Any,
) -> None:
    talk = Conversation((Message("user", "a <|end|> b"), Message("assistant", "c")))
    assert (
        reason(talk, with_template(tokenizer, MARKED))
        == "the user's turn 1 contains <|end|>, a special token of the model"
    )


def test_plain_text_is_learned_whole_between_one_start_and_one_end(tokenizer: Any) -> None:
    expected = tokenizer("Some text").input_ids
    assert expected[0] == tokenizer.bos_token_id
    for text in ("Some text", "<s>Some text", "Some text<|endoftext|>"):
        row = tokenize(PlainText(text), tokenizer)
        assert row.ids.tolist() == [*expected, tokenizer.eos_token_id]
        assert row.learned.tolist() == [False, *[True] * (len(row.ids) - 1)]


def test_without_a_template_prompt_and_completion_are_one_string(tokenizer: Any) -> None:
    base = with_template(tokenizer, None)
    row = tokenize(Completion("Once upon a", " time"), base)
    assert row.ids.tolist() == [*tokenizer("Once upon a time").input_ids, tokenizer.eos_token_id]
    assert learned(row, tokenizer) == ["▁time", "<|endoftext|>"]
    alpaca = tokenize(Alpaca("Add", "", "3"), base)
    assert "### Response:" in tokenizer.decode(alpaca.ids.tolist())
    assert learned(alpaca, tokenizer)[-2:] == ["3", "<|endoftext|>"]


def test_conversations_need_a_template(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no chat template"):
        tokenize(TALK, with_template(tokenizer, None))


def test_a_row_longer_than_the_context_is_bad(tokenizer: Any) -> None:
    tokens = len(tokenize(TALK, tokenizer).ids)
    assert reason(TALK, tokenizer, context=tokens - 1) == f"{tokens} tokens; the model's context is {tokens - 1}"
