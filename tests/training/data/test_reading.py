"""Files as people have them: each format is read, and each kind of bad data is a clear error."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import InputError
from advisor.training.data import RowStream, check_rows
from advisor.training.data.samples import Alpaca, Completion, Conversation, PlainText

Write = Callable[[str, Any], str]

ASKED = {"role": "user", "content": "What is 日本?"}
ANSWERED = {"role": "assistant", "content": "A country."}
GOOD = {"messages": [ASKED, ANSWERED]}
PAIR = {"prompt": "a", "completion": "b"}


def refusal(source: str) -> str:
    """All that the error says."""
    with pytest.raises(InputError) as caught:
        check_rows(source)
    assert caught.value.exit_code == 2
    return f"{caught.value.what}\n{caught.value.why}\n{caught.value.hint}"


def samples(source: str) -> list[Any]:
    stream = RowStream(source)
    found = [sample for _, sample in stream]
    assert not stream.bad.count, stream.bad.shown
    return found


@pytest.mark.parametrize(
    ("row", "layout", "kind"),
    [
        (GOOD, "messages", Conversation),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "conversations",
            Conversation,
        ),
        (PAIR, "prompt/completion", Completion),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt/completion", Conversation),
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, "alpaca", Alpaca),
        ({"instruction": "a", "output": "b"}, "alpaca", Alpaca),
        ({"text": "a"}, "text", PlainText),
    ],
)
def test_formats_are_recognised_by_their_columns(row: Any, layout: str, kind: type, write: Write) -> None:
    path = write("a.jsonl", [row] * 3)
    assert check_rows(path).format == layout
    assert [type(sample) for sample in samples(path)] == [kind] * 3


def test_every_kind_of_file_gives_the_same_rows(write: Write, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": f"ask, {n}\n", "completion": f'"{n}"; 日本'} for n in range(5)]
    csv = "prompt,completion\r\n" + "".join(
        f'"{row["prompt"]}","{row["completion"].replace(chr(34), chr(34) * 2)}"\r\n' for row in rows
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [Completion(row["prompt"], row["completion"]) for row in rows]
    assert samples(write("a.jsonl", rows)) == expected
    assert samples(write("a.json", json.dumps(rows))) == expected
    assert samples(write("b.json", json.dumps(rows, indent=2, ensure_ascii=False))) == expected
    assert samples(write("lines.json", rows)) == expected
    assert samples(write("a.csv", csv)) == expected
    assert samples(write("semicolon.csv", csv.replace('","', '";"').replace("prompt,", "prompt;"))) == expected
    assert samples(str(tmp_path / "a.parquet")) == expected


def test_parquet_holds_conversations(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{**GOOD, "id": 1}] * 3), tmp_path / "a.parquet")
    assert len(samples(str(tmp_path / "a.parquet"))) == 3


def test_a_byte_order_mark_and_carriage_returns_are_dropped(write: Write) -> None:
    for name, text in {
        "a.jsonl": json.dumps(PAIR) + "\r\n\r\n" + json.dumps(PAIR),
        "a.json": json.dumps([PAIR, PAIR]).replace(",", ",\r\n"),
        "a.csv": "prompt,completion\r\na,b\r\na,b\r\n",
    }.items():
        assert samples(write(name, b"\xef\xbb\xbf" + text.encode())) == [Completion("a", "b")] * 2


def test_a_folder_is_read_in_the_order_of_its_names_without_held_out_splits(write: Write, tmp_path: Path) -> None:
    for name, prompt in (
        ("b.jsonl", "2"),
        ("sub/c.jsonl", "3"),
        ("a.jsonl", "1"),
        ("test.jsonl", "4"),
        (".x.jsonl", "5"),
    ):
        write(f"d/{name}", [{**PAIR, "prompt": prompt}])
    write("d/README.md", "text")
    assert [sample.prompt for sample in samples(str(tmp_path / "d"))] == ["1", "2", "3"]
    assert check_rows(str(tmp_path / "d")).notes == ("Left out, by their names: test.jsonl.",)


def test_what_is_below_a_held_out_folder_is_left_out_and_many_names_are_counted(write: Write, tmp_path: Path) -> None:
    write("d/train/a.jsonl", [PAIR])
    for number in range(8):
        write(f"d/test/{number}.jsonl", [PAIR])
    found = check_rows(str(tmp_path / "d"))
    assert found.rows == 1
    names = ", ".join(f"test/{number}.jsonl" for number in range(6))
    assert found.notes == (f"Left out, by their names: {names}, and 2 more.",)
    assert check_rows(str(tmp_path / "d" / "test")).rows == 8


def test_linked_files_and_folders_are_read_once(write: Write, tmp_path: Path) -> None:
    write("elsewhere/b.jsonl", [PAIR])
    write("d/a.jsonl", [PAIR])
    for name in ("more", "again"):
        (tmp_path / "d" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "c.jsonl").symlink_to(write("c.jsonl", [PAIR]))
    assert check_rows(str(tmp_path / "d")).rows == 3


def test_a_link_to_nothing_is_refused_alone_and_in_a_folder(write: Write, tmp_path: Path) -> None:
    write("d/a.jsonl", [PAIR])
    (tmp_path / "d" / "b.jsonl").symlink_to("/not/fetched.jsonl")
    for path in (tmp_path / "d", tmp_path / "d" / "b.jsonl"):
        said = refusal(str(path))
        assert "b.jsonl is a link to a file that is not there" in said
        assert "'/not/fetched.jsonl'" in said


def test_compressed_files_are_refused_and_not_passed_over(write: Write, tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps(PAIR).encode())
    assert "'a.jsonl.gz' is compressed" in refusal(write("a.jsonl.gz", packed))
    assert "a.jsonl is compressed" in refusal(write("a.jsonl", packed))
    write("d/a.jsonl", [PAIR])
    write("d/test.jsonl.gz", packed)
    assert check_rows(str(tmp_path / "d")).rows == 1
    write("d/b.jsonl.gz", packed)
    assert "holds compressed data files: b.jsonl.gz" in refusal(str(tmp_path / "d"))


def test_a_path_with_blanks_and_japanese_characters_is_read(write: Write) -> None:
    path = write("私の データ/訓練 一.csv", "prompt,completion\n質問,答え\n質問,\n")
    assert "訓練 一.csv, line 3: completion is empty" in refusal(path)
    assert check_rows(path, skip_bad_rows=True).rows == 1


def test_a_column_that_is_there_twice_is_refused_where_it_matters(write: Write, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    said = refusal(write("a.csv", "prompt,completion,prompt\na,b,c\n"))
    assert "a.csv has more than one column called prompt" in said
    assert check_rows(write("b.csv", "prompt,completion,,\na,b,,\n")).rows == 1
    text = pyarrow.array(["a"])
    twice = pyarrow.Table.from_arrays([text, text, text], names=["prompt", "completion", "completion"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    assert "a.parquet has more than one column called completion" in refusal(str(tmp_path / "a.parquet"))


def test_text_in_parquet_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    raw = pyarrow.array([b"good", b"caf\xe9", b"good"])
    text = pyarrow.StringArray.from_buffers(3, *raw.buffers()[1:])
    parquet.write_table(pyarrow.table({"prompt": text, "completion": ["x"] * 3}), tmp_path / "a.parquet")
    said = refusal(str(tmp_path / "a.parquet"))
    assert "1 of 3 rows" in said
    assert "a.parquet, row 2: not UTF-8: byte 0xe9" in said
    assert check_rows(str(tmp_path / "a.parquet"), skip_bad_rows=True).rows == 2


def test_a_data_set_that_comes_with_the_package_is_read_by_its_name() -> None:
    assert check_rows("phi3-advise-qa").rows == 300


def test_reading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from advisor.training.data import check_rows; check_rows('phi3-advise-qa');"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} speaks"} for role in roles]}


def with_content(content: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", "content": content}]}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (with_content(""), "turn 2: the assistant's content is empty"),
        (with_content(" \n"), "turn 2: the assistant's content is empty"),
        (with_content(None), "turn 2: the assistant's content is null, not text"),
        (with_content(7), "turn 2: the assistant's content is a number, not text"),
        (with_content([{"type": "image"}]), "turn 2 has content other than text"),
        (turns("assistant", "user"), "roles out of order: turn 1 is the assistant's, expected the user's"),
        (turns("user", "user", "assistant"), "roles out of order: turn 2 is the user's, expected the assistant's"),
        (turns("user", "assistant", "system"), "roles out of order: turn 3 is the system's, expected the user's"),
        (turns("user", "assistant", "user"), "the last turn is the user's"),
        (turns("user", "tool"), "turn 2 has the role 'tool', and not system, user or assistant"),
        ({"messages": []}, "there are no turns"),
        ({"messages": "hello"}, "messages is text, not a list of turns"),
        ({"messages": [1]}, "turn 1 is a number"),
        (PAIR, "no messages; it has 'prompt', 'completion'"),
        ([1], "[1] is not an object"),
    ],
)
def test_a_bad_row_is_reported_with_file_line_and_reason(row: Any, why: str, write: Write) -> None:
    path = write("train.jsonl", [GOOD, GOOD, row, GOOD])
    said = refusal(path)
    assert "1 of 4 rows" in said
    assert f"train.jsonl, line 3: {why}" in said
    assert "--skip-bad-rows" in said
    found = check_rows(path, skip_bad_rows=True)
    assert (found.rows, found.bad.count) == (3, 1)


def test_broken_json_and_text_that_is_not_utf8_are_reported(write: Write) -> None:
    good = json.dumps(GOOD).encode()
    said = refusal(
        write("a.jsonl", b"\n".join([good, b'{"messages": ', "é".encode("latin-1") + good, b'{"a": "\\ud800"}']))
    )
    assert "line 2: not JSON: Expecting value at column 14" in said
    assert "line 3: not UTF-8: byte 0xe9 at column 1" in said
    assert "3 of 4 rows" in said
    assert "half of a surrogate" in refusal(write("b.jsonl", json.dumps(PAIR).replace('"a"', '"\\ud800"').encode()))
    assert "nested too deep" in refusal(write("c.jsonl", good + b"\n" + b"[" * 100_000))
    assert "UTF-16" in refusal(write("d.jsonl", json.dumps(GOOD).encode("utf-16")))


def test_ten_bad_rows_are_shown_and_all_are_counted(write: Write) -> None:
    said = refusal(write("a.jsonl", [GOOD] + [{**GOOD, "messages": []}] * 25))
    assert "25 of 26 rows" in said
    assert said.count("there are no turns") == 10
    assert "and 15 more" in said


def test_rows_that_are_all_bad_are_refused_even_where_bad_rows_may_be_skipped(write: Write) -> None:
    with pytest.raises(InputError, match="2 of 2 rows"):
        check_rows(write("a.jsonl", b"{\n{\n"), skip_bad_rows=True)


def test_unknown_columns_are_listed_with_those_that_are_understood(write: Write) -> None:
    for path in (write("a.jsonl", [{"question": "a", "answer": "b"}]), write("a.csv", "question,answer\na,b\n")):
        said = refusal(path)
        assert "'question', 'answer'" in said
        assert "prompt + completion" in said
        assert "instruction + output" in said


def test_a_csv_whose_columns_are_shifted_is_reported(write: Write) -> None:
    said = refusal(write("a.csv", 'prompt,completion\na,b\n"a\nb",c,d\na\n"x"y,z\n'))
    assert "a.csv, line 3: 3 fields where the header has 2: the columns are shifted" in said
    assert "a.csv, line 5: 1 field where the header has 2" in said
    assert "a.csv, line 6: not CSV" in said
    assert "3 of 4 rows" in said


def test_a_quote_that_stays_open_is_refused_where_it_opens(write: Write) -> None:
    assert "a.csv, line 3: a quote opens" in refusal(write("a.csv", 'prompt,completion\na,b\n"a,b\na,b\n'))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_dict_of_lists_is_refused(indent: int | None, write: Write) -> None:
    table = {"prompt": ["a", "b"], "completion": ["c", "d"]}
    assert "a dict of lists: 'prompt', 'completion'" in refusal(write("a.json", json.dumps(table, indent=indent)))
    wrapped = {"version": 1, "data": [PAIR]}
    assert "a dict of lists: 'data'" in refusal(write("b.json", json.dumps(wrapped, indent=indent)))


def test_one_object_alone_is_a_row_if_it_looks_like_one(write: Write) -> None:
    assert len(samples(write("a.json", json.dumps(GOOD)))) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(name: str, content: bytes, write: Write) -> None:
    assert f"{name} is empty" in refusal(write(name, content))


def test_files_without_rows_are_refused(write: Write) -> None:
    assert "holds no rows" in refusal(write("a.jsonl", "\n\n"))
    assert "holds no rows" in refusal(write("a.csv", "prompt,completion\n"))
    assert "empty array" in refusal(write("a.json", "[ ]"))


def test_files_of_the_wrong_kind_are_refused(write: Write) -> None:
    assert "is a JSON array" in refusal(write("a.jsonl", json.dumps([PAIR])))
    assert "cannot be read as Parquet" in refusal(write("a.parquet", b"PAR1 no PAR1"))
    assert "no kind that is understood" in refusal(write("a.xlsx", "x"))
    assert "neither a JSON array nor" in refusal(write("b.json", '"text"'))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"prompt": "a", "completion": "b"},\n{"prompt": }]', "On line 2, expecting value"),
        ('[{"prompt": "a", "completion": "b"}\n{"prompt": "a"}]', "On line 2, ',' is missing"),
        ('[{"prompt": "a", "completion": "b"},\n', "On line 2, expecting value"),
        ('[{"prompt": "a", "completion": "b"}', "On line 1, ',' is missing"),
        ('[{"prompt": "a", "completion": "b"}] []', "there is more after the end"),
    ],
)
def test_a_broken_array_is_refused_where_it_breaks(text: str, why: str, write: Write) -> None:
    assert why in refusal(write("a.json", text))


def test_a_folder_with_several_kinds_or_none_is_refused(write: Write, tmp_path: Path) -> None:
    write("mixed/a.jsonl", [GOOD])
    write("mixed/b.csv", "prompt,completion\n")
    write("none/readme.txt", "x")
    assert "several kinds of files: csv (b.csv), jsonl (a.jsonl)" in refusal(str(tmp_path / "mixed"))
    assert "holds no data files" in refusal(str(tmp_path / "none"))


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "data/missing.csv", "/no/such/folder", "a\0b", ""])
def test_a_path_that_does_not_exist_is_bad_input(path: str) -> None:
    refusal(path)


def test_a_hub_id_without_a_network_lacks_something(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "from advisor.training.data import check_rows\n"
        "from advisor.errors import AdvisorError\n"
        "try: check_rows('nobody-of-this-name/no-such-data')\n"
        "except AdvisorError as error: print(error.exit_code, error.what)"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "3 The data set nobody-of-this-name/no-such-data cannot be reached."


def test_rows_of_a_hub_data_set_are_those_of_its_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    # A column that cannot be decoded: what is not needed is not read.
    split = datasets.Dataset.from_list([{**PAIR, "image": {"bytes": b"no image", "path": None}}] * 2500)
    split = split.cast_column("image", datasets.Image())
    asked = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        return datasets.DatasetDict({"train": split, "test": split.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert check_rows("owner/name:config").rows == 2500
    assert asked == [("owner/name", "config")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_line_of_a_gigabyte_is_never_held_in_memory(name: str, tmp_path: Path) -> None:
    head = {"a.jsonl": b'{"prompt": "', "a.json": b'[{"prompt": "', "a.csv": b"prompt,completion\n"}[name]
    with (tmp_path / name).open("wb") as file:  # sparse
        file.write(head)
        file.truncate(2**30 + 2**20)
        file.seek(0, 2)
        file.write(b'\n{"prompt": "a", "completion": "b"}\n' if name != "a.csv" else b"\na,b\n")
    code = (
        "import resource, sys\n"
        "from advisor.training.data import check_rows\n"
        "from advisor.errors import AdvisorError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (256 * 2**20, 256 * 2**20))\n"
        "try: print(check_rows(sys.argv[1], skip_bad_rows=True))\n"
        "except AdvisorError as error: print(error, error.why)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    if name == "a.json":  # there is no telling where the next element would start
        assert "beyond line 1" in found.stdout
        assert "longer than 8.0 MiB" in found.stdout
    else:
        assert "rows=1," in found.stdout
        assert "1.00 GiB long; at most 8.0 MiB are read" in found.stdout
