"""Japanese screens: nothing is left in English, nothing in the catalogue is stale, and every line is in its columns."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html import unescape
from itertools import pairwise
from pathlib import Path

import click
import pytest
from report.left_over import JAPANESE, STAYS, left_in_english
from rich.cells import cell_len
from rich.console import Console

from advisor.advise import Advice, advise
from advisor.cli import _SUBCOMMANDS, main
from advisor.errors import EnvironmentLacksError, InputError
from advisor.hardware import what_if
from advisor.profiles import gpu_names, load_gpu, load_model, model_names
from advisor.report import language
from advisor.report.catalogue import Template
from advisor.report.html import render_report
from advisor.report.language import check_language, language_of, languages, listening, localise, speaking
from advisor.report.terminal import render_trace
from advisor.report.terminal.wrapping import _NO_LINE_BEGINS_WITH, _NO_LINE_ENDS_WITH, wrap_lines
from advisor.traced import TracedPlan
from advisor.units import GIB

ROOT = Path(__file__).resolve().parents[2]


def tables() -> dict[str, dict[str, str]]:
    return tomllib.loads((ROOT / "profiles/messages/ja.toml").read_text(encoding="utf-8"))


def shown(*words: str, width: int = 80, **environment: str) -> str:
    """What a command prints, on either stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        for name, value in environment.items():
            patch.setenv(name, value)
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
            main(list(words))
        return out.getvalue()


class Source:
    """Every text of the source that a person can see."""

    SILENT = (
        *("report/yaml", "report/json", "report/run_json", "report/snapshot", "report/page"),
        *(
            "report/history",
            "report/catalogue",
            "report/terminal/wrapping",
            "training/model_card",
            "training/log",
        ),
        *(
            "training/step",
            "training/outcome",
            "training/data/samples",
            "memory/trace/tracker",
            "memory/kernels/choice",
        ),
        *("__init__", "probe/imitate.py:"),
    )
    """Files whose texts nobody reads: formats, patterns, other tools' words."""

    STAYS = re.compile(
        r"bold |halo |backward of layer \(|Screen \{|SaveDialog, |phi3-advise |from \w+ import|(model|tokenizer) = "
        r"|pip install|.*\{file\}|\{\"train\"|# |TRL |axolotl "
        r"|LLaMA|accelerate |Please also|method = |GPU \{|NVIDIA GPU|Apple GPU|capability \{|.*TFLOP/s|model name"
        r"|random tokens|field larger|unexpected end|[Cc]an(not|'t) allocate memory|(cuda|xpu) allocator|--"
        r"|compute capability"
        r"|\{\} (tokens/s|h|min|GiB|MiB|KiB|in|on|at|of)\b|a \{\} too large|names? (is|are)|\{\}, autocast"
    )
    """What is the same in every language, and the patterns by which other programs' words are known."""

    @classmethod
    def templates(cls) -> Iterator[tuple[str, str]]:
        for path in sorted((ROOT / "advisor").rglob("*.py")):
            name = path.relative_to(ROOT / "advisor").as_posix()
            if not name.startswith(cls.SILENT):
                texts = cls._of(ast.parse(path.read_text("utf-8")))
                yield from ((f"{name}:{line}", cls._without_markup(name, text)) for line, text in texts)
        for path in sorted((ROOT / "advisor/report/parts").glob("*.html")):
            yield from ((path.name, text) for text in cls.of_page(path))

    @staticmethod
    def _without_markup(name: str, text: str) -> str:
        if not name.startswith(("report/html/", "report/timeline")):
            return text
        return re.sub(r"""</?\w[^>]*>|[\w-]+=(["']).*?\1|aria-label="{}: {}">""", " ", text)

    @staticmethod
    def of_page(path: Path) -> list[str]:
        """The texts that a page's template hands to the catalogue."""
        return [" ".join(text.split()) for text in re.findall(r'{{"(.*?)"}}', path.read_text("utf-8"), re.DOTALL)]

    @classmethod
    def _of(cls, tree: ast.Module) -> Iterator[tuple[int, str]]:
        inner = {id(part) for node in ast.walk(tree) for part in cls._not_texts(node)}
        for node in ast.walk(tree):
            if id(node) in inner:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                yield node.lineno, "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.lineno, node.value

    @staticmethod
    def _not_texts(node: ast.AST) -> Iterator[ast.AST]:
        """Docstrings, parts of f-strings, annotations."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value
        if isinstance(node, ast.JoinedStr):
            yield from (part for part in node.values if isinstance(part, ast.Constant))
            formats = [part.format_spec for part in node.values if isinstance(part, ast.FormattedValue)]
            yield from (part for spec in formats if spec is not None for part in ast.walk(spec))
        for name in ("annotation", "returns"):
            note = getattr(node, name, None)
            if isinstance(note, ast.AST):
                yield from ast.walk(note)


PARTS = frozenset(
    {
        *("{} to an optimizer step.", " {} to an optimizer step."),
        *("{} steps{} an evaluation{} were run", " and the saving path"),
        *(" with an encoder.", ": near the edge, let the probe decide", ", a dict of lists: ", "would save"),
        *(": queries, keys and values are one module, so are gate and up.", " ({} predicted, libraries included)"),
        *(", {} on what was held out", ", with {} of RAM at the most", " (as far as was tried)"),
        *("the estimate said {}", "the estimate had none", "Other speeds assume", "Speed assumes"),
        *(
            "{} fits as well: --prefer quality takes it{}",
            "needs {} of {}, {} to spare{}",
            "{} rule{} flash attention out",
        ),
        *("The nearest {} {}.", "out of memory{}. {}", "The probe failed{}.", "{} held by others{}{}"),
        "Packing {} {} of the tokens computed: {} samples to a row, {} full.",
        *("{} Speed assumes {}.", "phi3-advise: {}", "{} --launch --data {}", "{}, {}, {} × {} tokens on {}"),
    }
)
"""Parts of sentences that the catalogue has whole, and sentences that are taken apart; the screens below show them."""


def is_sentence(text: str) -> bool:
    """Two words or more that are said to somebody."""
    words = re.sub(r"\{\}", " ", text)
    return len(re.findall(r"[A-Za-z]{2,}", words)) > 1 and " " in text.strip() and not Source.STAYS.match(text.strip())


def test_every_sentence_of_the_source_has_japanese() -> None:
    """A sentence that is new has none: write it into profiles/messages/ja.toml."""
    catalogue = language._catalogue("ja")
    missing = []
    for where, text in Source.templates():
        if text not in PARTS and is_sentence(text):
            said = catalogue.render(text.replace("{}", "7").strip(" ,;\n"), words=True)
            if not JAPANESE.search(said) or left_in_english(said):
                missing.append(f"{where}: {text!r} is said as {said!r}")
    assert not missing, "\n".join(missing)


def test_every_entry_is_said_by_something() -> None:
    """Each entry is made from a text of the source, or its literal pieces stand in a profile or a library."""
    said = [" ".join(text.split()) for text in _everything_said()]
    everything = "\n".join(said).lower()
    made = [_made_from(text) for text in said if len(re.findall(r"[A-Za-z]", text.replace("{}", ""))) > 8]
    stale = []
    for table, entries in tables().items():
        for english in entries if table not in ("joints", "words") else ():
            pieces = [" ".join(piece.strip(" .,;:()").split()).lower() for piece in re.split(r"\{n?\}", english)]
            text = re.sub(r"\{n?\}", "7", english)
            if not (all(piece in everything for piece in pieces) or any(one.fullmatch(text) for one in made)):
                stale.append(f"{table}: {english}")
    assert not stale, "\n".join(stale)


def _made_from(template: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, template.strip(" .").split("{}"))) + r"\.?", re.IGNORECASE | re.DOTALL)


def _everything_said() -> Iterator[str]:
    for path in (ROOT / "advisor").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        yield from (text for _, text in Source._of(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield ast.get_docstring(node) or ""
                yield node.name.replace("_", " ")  # terms are called so
    for path in (ROOT / "advisor/report/parts").glob("*.html"):
        yield from Source.of_page(path)
    yield from (path.read_text("utf-8") for path in (ROOT / "profiles").rglob("*.toml") if path.name != "ja.toml")
    yield from (path.read_text("utf-8") for path in Path(click.__file__).parent.glob("*.py"))
    yield "4-bit matmul on {}\nmatmul on {}\nattention on {}"  # doctor puts a trial and a device together
    yield from map(os.strerror, range(1, 40))
    yield "It needs {} of {}, {} to spare{}"  # the main screen says "It" and the reason
    yield "autograd's thread, the caller's thread"  # "autograd" and "the caller's", in the allocator's words
    yield "unified memory"  # Apple's products are called so


def test_single_words_are_in_the_table_of_words() -> None:
    """A file or a folder may be called like one, so elsewhere they are never rendered."""
    for table, entries in tables().items():
        assert not [english for english in entries if " " not in english and english != "({})"] or table in (
            "joints",
            "words",
        )


def test_a_rendering_has_each_value_once() -> None:
    for table, entries in tables().items():
        for english, rendering in entries.items() if table != "joints" else ():
            places = re.findall(r"\{\*?(\d?)\}", rendering)
            numbered = [int(place) for place in places if place]
            assert len(places) == len(re.findall(r"\{n?\}", english)), english
            assert not numbered or sorted(numbered) == list(range(len(places))), f"{english}: all numbered, or none"
            assert not rendering.endswith("。"), f"{english}: the joints put it there"


# --- What runs really say ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plan") / "plan.toml"
    path.write_text('model = "phi-3-mini-4k"\nmethod = "qlora"\ngpu = "t4"\n', encoding="utf-8")
    return str(path)


SCREENS = [
    *(["--gpu", name] for name in gpu_names()),
    *(["--gpu", "t4", "--model", name, "--explain"] for name in model_names()),
    *(["--gpu", "a100-40gb", "--prefer", prefer, "--tokens", "12M"] for prefer in ("quality", "speed", "memory")),
    *(["--gpu", name, "--method", "full", "--seq-len", "4096"] for name in ("t4", "rtx-4090", "h200")),
    *(
        ["--recipe", f"cookbook-{name}", "--gpu", gpu]
        for name in ("full", "lora", "qlora")
        for gpu in ("t4", "a100-40gb")
    ),
    ["--gpu", "t4", "--free", "9GiB"],
    ["--vram", "3GiB"],
    ["--gpu", "t4", "--target-modules", "q_proj,o_proj"],
    ["gpus"],
    ["models"],
]
ERRORS = [
    ["--gpu", "no-such"],
    ["--gpu", "t4", "--device", "cpu"],
    ["--gpu", "t4", "--seq-len", "x"],
    ["--gpu", "t4", "--seq-len", "auto"],
    ["--gpu", "t4", "--vram", "much"],
    ["--gpu", "t4", "--tokens", "some"],
    ["--gpu", "t4", "--effective-batch", "0"],
    ["--gpu", "t4", "--effective-batch", "many"],
    ["--gpu", "t4", "--lora-rank", "0"],
    ["--gpu", "t4", "--target-modules", "nothing"],
    ["--gpu", "t4", "--method", "dora"],
    ["--gpu", "t4", "--explain", "--json"],
    ["--gpu", "t4", "--recipe", "lora", "--trace"],
    ["--model", "no/such/config.json"],
    ["--gpu", "t4", "--dry-run"],
    ["--launch"],
    ["--launch", "--gpu", "t4"],
    ["--bogus"],
    ["frobnicate"],
    ["estimate"],
    ["export"],
    ["train", "--plan", "plan.toml"],
    ["estimate", "--plan", "/no/such/plan.toml"],
    ["trace", "--plan"],
    ["train", "--resume"],
    ["--gpu", "t4", "models"],
    ["merge", "/no/such/run"],
    ["merge"],
]
HELP = [["--help"], *([name, "--help"] for name in _SUBCOMMANDS)]


def named(words: list[str]) -> str:
    return " ".join(words)


@pytest.mark.parametrize("words", [*SCREENS, *ERRORS, *HELP], ids=named)
def test_nothing_is_left_in_english(words: list[str]) -> None:
    with listening() as heard:
        said = shown(*words, "--lang", "ja")
    assert JAPANESE.search(said)
    catalogue = language._catalogue("ja")
    left = {text: left_in_english(catalogue.render(text, words=True)) for text in dict.fromkeys(heard)}
    cards = {profile.split(",")[0] for profile in _products()}
    assert not {text: words for text, words in left.items() if words and text.split(",")[0].strip() not in cards}


@pytest.mark.parametrize("words", HELP, ids=named)
def test_what_click_adds_to_an_option_is_in_japanese(words: list[str]) -> None:
    said = " ".join(shown(*words, "--lang", "ja").split())
    assert not re.search(r"\[(default|required)|\]\[", said)
    assert ("[必須]" in said) == (words[0] in {"estimate", "trace", "probe", "export"})


def test_names_in_a_table_are_whole() -> None:
    """They are copied from it."""
    said = shown("models", "--lang", "ja")
    assert all(re.search(rf"^{re.escape(name)} ", said, re.MULTILINE) for name in model_names())


def _products() -> set[str]:
    return {tomllib.loads(path.read_text("utf-8"))["product"] for path in (ROOT / "profiles/gpus").glob("*.toml")}


def test_an_estimate_explains_its_terms_in_japanese(plan_file: str) -> None:
    said = shown("estimate", "--plan", plan_file, "--explain", "--lang", "ja")
    assert "4bitの重み行列（1バイトに2要素）" in "".join(said.split())
    assert "出典：" in said


def test_a_trace_is_told_in_japanese(small_step: TracedPlan) -> None:
    console = Console(file=io.StringIO(), width=80)
    with speaking("ja"), listening() as heard:
        render_trace(small_step, console)
    catalogue = language._catalogue("ja")
    left = {text: left_in_english(catalogue.render(text, words=True)) for text in heard}
    assert not {text: words for text, words in left.items() if words}
    assert all(cell_len(line.rstrip()) <= 80 for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


@pytest.fixture(params=["step", "no step", "nothing fits", "near the edge"])
def japanese_page(request: pytest.FixtureRequest, small_advice: Advice, small_step: TracedPlan) -> str:
    """A page of each kind, and of every warning that there is on the way."""
    missing = EnvironmentLacksError("A trace needs torch, not installed here.", hint="pip install torch")
    mini = load_model("phi-3-mini")
    pages: dict[str, tuple[Advice, TracedPlan | EnvironmentLacksError]] = {
        "step": (small_advice, small_step),
        "no step": (advise(mini, what_if(load_gpu("t4"))), missing),
        "nothing fits": (advise(mini, what_if(vram_bytes=2 * GIB)), missing),
        "near the edge": (advise(mini, what_if(load_gpu("a100-80gb"), free_bytes=20 * GIB)), missing),
    }
    with speaking("ja"):
        return render_report(*pages[request.param])


def test_the_page_is_in_japanese(japanese_page: str) -> None:
    """But for plans, commands, and the names of modules, tensors and operations."""
    assert '<html lang="ja">' in japanese_page
    read = re.sub(r"<(script|style|pre|ol).*?</\1>|<td></td>", " ", japanese_page, flags=re.DOTALL)
    attributes = " ".join(re.findall(r'aria-label="([^"]*)"|<title>(.*?)</title>', read)[0])
    text = unescape(re.sub(r"<[^>]+>", "\n", read)) + attributes
    shown = [" ".join(line.split()) for line in text.splitlines() if not re.match(r"\S+ · |[\d.]+ \w+ .* · ", line)]
    assert JAPANESE.search(text)
    words = {word for word, rendering in tables()["words"].items() if rendering != word and word.isascii()}
    left = [
        line
        for line in shown
        if left_in_english(line) or words & set(re.findall(r"[\w-]+", STAYS.sub(" ", re.sub(r"--\w+ \w+", " ", line))))
    ]
    cards = {profile.split(",")[0] for profile in _products()}
    assert [line for line in left if line not in cards] == []


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d[\d,.]*\d|\d", text))


@pytest.mark.parametrize(
    "words",
    [["--gpu", "t4"], ["--gpu", "h100", "--model", "phi-4"], ["--recipe", "cookbook-full", "--gpu", "a100-40gb"]],
)
def test_a_japanese_screen_has_the_numbers_of_the_english_one(words: list[str]) -> None:
    english, japanese = shown(*words, "--lang", "en"), shown(*words, "--lang", "ja")
    assert numbers(english) - numbers(japanese) <= {"4-bit", "4"}
    for size in re.findall(r"[\d,.]+ (?:GiB|MiB)", english.replace("\n", " ")):
        assert size in re.sub(r"\s+", " ", japanese)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize(
    "words", [["--gpu", "t4"], ["--gpu", "rtx-3070", "--model", "phi-4"], ["--gpu", "t4", "--explain"]]
)
def test_every_line_is_in_its_columns(words: list[str], width: int) -> None:
    lines = shown(*words, "--lang", "ja", width=width).splitlines()
    too_wide = [line for line in lines if cell_len(line.rstrip()) > width and "phi3-advise" not in line]
    assert not too_wide
    for before, line in pairwise(lines):
        if line.strip() and before.strip() and "  " not in line.strip() and not line.startswith("! "):
            assert line.lstrip()[0] not in _NO_LINE_BEGINS_WITH
            assert before.rstrip()[-1] not in _NO_LINE_ENDS_WITH


def test_bars_and_columns_begin_where_the_headings_do() -> None:
    lines = shown("--gpu", "t4", "--lang", "ja").splitlines()
    rule = next(line for line in lines if line.startswith("───"))
    starts = [cell_len(rule[: match.start()]) for match in re.finditer(r"(?<=  )[─━]", rule)]
    bars = next(line for line in lines if "█" in line and line.startswith(" "))
    assert [cell_len(bars[: match.start()]) for match in re.finditer(r"(?<=  )█", bars)] == starts


# --- Which language ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "ja_JP.UTF-8"}, "ja"),
        ({"LANG": "ja_JP.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "ja_JP"}, "ja"),
        ({"LANG": "fr_FR.UTF-8"}, "en"),
        ({"LANG": "ja_JP.UTF-8", "PHI3_ADVISE_LANG": "en"}, "en"),
        ({"PHI3_ADVISE_LANG": "ja"}, "ja"),
        ({"LC_ALL": "", "LANG": "ja_JP"}, "ja"),
    ],
)
def test_the_environment_chooses_the_language(environment: dict[str, str], expected: str) -> None:
    assert language_of(environment) == expected


def test_an_option_overrides_the_environment() -> None:
    assert "Recommended: LoRA." in shown("--gpu", "t4", "--lang", "en", PHI3_ADVISE_LANG="ja")
    assert "推薦：LoRA。" in shown("--gpu", "t4", "--lang=ja", PHI3_ADVISE_LANG="en")


def test_an_unknown_language_names_those_there_are() -> None:
    assert languages() == ("en", "ja")
    with pytest.raises(InputError) as caught:
        check_language("fr")
    assert "en, ja" in caught.value.hint
    for said in (shown("--lang", "fr"), shown("models", PHI3_ADVISE_LANG="fr")):
        assert "names no language that there is: 'fr'" in said


def test_an_unknown_language_is_refused_in_the_environment_s() -> None:
    said = shown("models", "--lang", "fr", PHI3_ADVISE_LANG="ja")
    assert "--lang の 'fr' という言語はありません" in said
    assert not left_in_english(said)


def test_each_command_takes_the_option() -> None:
    assert "パラメータ" in shown("models", "--lang", "ja")


def test_json_stays_english() -> None:
    english = shown("--gpu", "t4", "--json", "--lang", "en")
    assert shown("--gpu", "t4", "--json", "--lang", "ja") == english
    assert json.loads(english)["recommended"] == "lora"


def test_the_language_ends_with_the_command_and_reaches_what_it_starts() -> None:
    with speaking("ja"):
        assert os.environ["PHI3_ADVISE_LANG"] == "ja"
        assert localise("Nothing fits") == "収まる手法がありません"
    assert localise("Nothing fits") == "Nothing fits"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "euc-jp", "utf-8"])
def test_an_encoding_without_japanese_gets_english(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    for words in (["--gpu", "t4"], ["--help"], ["--gpu", "nothing"], ["estimate", "--help"]):
        command = [sys.executable, "-m", "advisor", *words, "--lang", "ja"]
        ran = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT)
        said = (ran.stdout + ran.stderr).decode(encoding)
        assert "Traceback" not in said
        assert bool(JAPANESE.search(said)) == (encoding not in ("ascii", "latin-1")), said[:300]


# --- How it is rendered --------------------------------------------------------------------------------------------


def test_a_template_takes_only_what_was_made_from_it() -> None:
    template = Template("{} is {n} short", "{}は {} 足りません")
    assert template.match("LoRA is 2.00 GiB short") == ("LoRA", "2.00 GiB")
    assert template.match("LoRA is very short") is None
    assert template.match("No. LoRA is 2.00 GiB short") is None


@pytest.mark.parametrize(
    ("english", "japanese"),
    [
        ("It is warm.", "It is warm."),  # nothing says it, so nothing translates it
        ("full fine-tuning is 2.00 GiB short", "フルファインチューニングは 2.00 GiB 足りません"),
        ("QLoRA is 2.00 GiB short.", "QLoRA は 2.00 GiB 足りません。"),
        ("run.txt cannot be written.", "run.txt に書き込めません。"),
        ("full cannot be written.", "full に書き込めません。"),  # a file may be called like a word
        (
            "lora.rank: 0 is not a whole number from 1 to 16,384",
            "lora.rank: 0 は 1 から 16,384 までの整数ではありません",
        ),
        ("micro_batch: is missing", "micro_batch がありません"),
        (
            "out of memory at loading: 96.0 MiB asked for, 86.0 MiB left.",
            "読み込みでメモリ不足になります。要求 96.0 MiB、残り 86.0 MiB。",
        ),
        (  # the number of a list's entry is no value of the sentence behind it
            "2. 1 of 2 rows of a.jsonl cannot be used.",
            "2. a.jsonl の 2 行のうち 1 行が使えません。",
        ),
        (
            "The columns of x.csv, line 2 are not understood: 'a', 'b'.",
            "x.csv、2 行目の列を解釈できません：'a', 'b'。",
        ),
        ("lora: full fine-tuning has no adapters", "lora: フルファインチューニングにアダプタはありません"),
        (
            "No such option '--bogus'. (Did you mean one of: '--gpu', '--out'?)",
            "'--bogus' というオプションはありません。（候補：'--gpu', '--out'）",
        ),
        ("Missing option '--to'. Choose from:\n\ttrl", "オプション '--to' がありません。次から選んでください：\n\ttrl"),
        (  # no template of one sentence takes the next one with it
            "The dashed line is what the allocator has reserved. The numbers are traced, not measured.",
            "破線はアロケータが予約した量です。数値はトレースによるもので、実測ではありません。",
        ),
    ],
)
def test_sentences_are_rendered_with_their_values(english: str, japanese: str) -> None:
    with speaking("ja"):
        assert localise(english) == japanese


@pytest.mark.parametrize("width", range(12, 40))
def test_lines_break_by_the_rules_of_japanese(width: int) -> None:
    text = (
        "「勾配チェックポイント」（メモリを減らす方法）は、/tmp/run-1/plan.toml のとおり 14.56 GiB で、うまくいきます。"
    )
    lines = wrap_lines(text, width, first="! ", rest="  ")
    assert "".join("".join(lines).split()) == "!" + "".join(text.split())
    for number, line in enumerate(lines):
        assert cell_len(line) <= max(width, cell_len("  「勾配チェックポイント」"))
        assert number == 0 or line[2] not in _NO_LINE_BEGINS_WITH
        assert line[-1] not in _NO_LINE_ENDS_WITH
    assert any("14.56 GiB" in line for line in lines)


def test_an_english_paragraph_breaks_as_it_did() -> None:
    assert wrap_lines("one two three", 9, first="- ", rest="  ") == ["- one two", "  three"]
    assert wrap_lines("", 9, first="label: ") == ["label:"]


# --- The glossary --------------------------------------------------------------------------------------------------


def explained(*words: str) -> list[str]:
    said = shown(*words, "--explain", "--lang", "en", width=120)
    lines = said.partition("Words of this screen\n")[2].splitlines()
    return [line.strip().partition(":")[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]


def test_a_screen_explains_the_words_that_it_used_and_no_others() -> None:
    t4, h200 = explained("--gpu", "t4"), explained("--gpu", "h200")
    assert {"peak reserved", "micro-batch", "accumulation", "checkpointing", "chunked loss", "paged states"} <= set(t4)
    assert "near the edge" not in t4
    assert "paged states" not in h200
    assert "other processes" in t4  # the legend of the bars says it


def test_the_components_add_up_to_the_peak() -> None:
    said = shown("--gpu", "t4", "--explain", "--lang", "en", width=120)
    part = said.partition("come from")[2].partition("Words of this screen")[0]
    assert "activations" in part
    assert "Most of it: hidden states" in part
