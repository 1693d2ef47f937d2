"""The command line: parse, call, render. No arithmetic, and every heavy import inside the command that needs it."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from advisor.cli.completion import complete_gpus, complete_models, complete_recipes
from advisor.cli.help import HelpContext
from advisor.cli.language import lang_option, language_asked
from advisor.errors import AdvisorError, InputError
from advisor.report.language import localise_label, speaking
from advisor.stopping import Stopped, silence_stdout, stopped_by, stopped_once

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_SUBCOMMANDS = {
    "doctor": "What this machine has for training, and whether it computes.",
    "estimate": "Memory of one plan, in closed form.",
    "explore": "Change a plan with keys and see its memory.",
    "export": "A plan as another tool's configuration.",
    "gpus": "Methods against every known GPU.",
    "merge": "A run's adapter into its base model, on the CPU.",
    "models": "Known models.",
    "probe": "Measure one plan on this GPU: a few steps with random weights.",
    "train": "Train a plan, or go on with a run.",
    "trace": "Memory of one plan, from the installed code run without storage.",
}

_SIGNALLED = 128
_READER_GONE = _SIGNALLED + 13
"""As a shell reports a program that SIGPIPE ended."""


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are called, each with --lang."""

    context_class = HelpContext

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _SUBCOMMANDS:
            return None
        from importlib import import_module

        command: click.Command = import_module(f"advisor.cli.{cmd_name}").command
        command.context_class = HelpContext
        if not any(param.name == "lang" for param in command.params):
            lang_option(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands and options; click would import every command to ask it for its line of help."""
        from click.shell_completion import CompletionItem

        commands = [
            CompletionItem(name, help=said)
            for name, said in sorted(_SUBCOMMANDS.items())
            if name.startswith(incomplete)
        ]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # click would exit with 1, which here means that nothing fits.
            silence_stdout()
            ctx.exit(_READER_GONE)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _SUBCOMMANDS:
            from advisor.errors import UnknownNameError

            raise UnknownNameError("command", args[0], tuple(_SUBCOMMANDS), hint="See phi3-advise --help.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_SUBCOMMANDS.items()))


def _show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from advisor import __version__

        click.echo(f"phi3-advise {__version__}")
        ctx.exit()


@click.group(
    cls=_LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 it fits or it ran; 1 nothing fits; 2 bad input; 3 something is missing; 4 the run failed.",
)
@click.option(
    "--model",
    shell_complete=complete_models,
    default=None,
    help="A profile, a folder or config.json, or a hub id.  [default: phi-3-mini]",
)
@click.option(
    "--gpu",
    shell_complete=complete_gpus,
    default=None,
    help="What if: a GPU by name (t4, rtx-4090, a100-80gb; see `gpus`).",
)
@click.option("--vram", default=None, help="What if: a GPU with that much memory (12GiB; a bare 12 means GiB).")
@click.option("--free", default=None, help="How much of the GPU's memory is free.")
@click.option("--device", default=None, help="A number as nvidia-smi counts; or cuda, cuda:1, cpu, mps, xpu.")
@click.option("--method", type=click.Choice(["full", "lora", "qlora"]), default=None, help="Take this method.")
@click.option("--seq-len", default=None, help="Tokens in the longest sequence.  [default: 2048; launching: auto]")
@click.option("--effective-batch", type=int, default=None, help="Sequences to an optimizer step.  [default: 16]")
@click.option("--lora-rank", type=int, default=None, help="Rank of the adapters.  [default: 16]")
@click.option("--target-modules", default=None, help="Modules with an adapter, by comma.  [default: all-linear]")
@click.option(
    "--prefer",
    type=click.Choice(["quality", "balanced", "speed", "memory"]),
    default=None,
    help="What decides between methods that fit.  [default: balanced]",
)
@click.option("--tokens", default=None, help="Tokens that the run trains on (12M), for how long it takes.")
@click.option("--trace", is_flag=True, help="Prove the memory of what fits: run the installed code without storage.")
@click.option(
    "--recipe",
    shell_complete=complete_recipes,
    default=None,
    help="Judge a recipe instead (cookbook-full, -lora, -qlora).",
)
@click.option("--save-plan", type=click.Path(), default=None, help="Write the recommended plan to a TOML file.")
@click.option("--html", type=click.Path(), default=None, help="Write a page of the answer, with a traced step.")
@click.option("--probe/--no-probe", default=None, help="Measure it here: a few steps with random weights, no download.")
@click.option("--find-batch", is_flag=True, help="With --probe: the largest micro-batch that runs, by trying.")
@click.option("--find-seq-len", is_flag=True, help="With --probe: the longest sequence that runs, by trying.")
@click.option("--as", "as_gpu", default=None, help="With --probe: stand in for a smaller GPU (t4).")
@click.option("--launch", is_flag=True, help="Train what is recommended. All options below go with it.")
@click.option("--data", default=None, help="A file or folder (JSONL, JSON, CSV, Parquet), or a data set's hub id.")
@click.option("--out", type=click.Path(), default=None, help="The run folder.  [default: a new one under runs/]")
@click.option("--dry-run", is_flag=True, help="Everything up to the training: plan, checks, command; then stop.")
@click.option("--yes", is_flag=True, help="Ask nothing. Where nobody can answer, nothing is asked anyway.")
@click.option("--fallback", is_flag=True, help="If memory runs out, start again with the next smaller plan.")
@click.option("--epochs", type=float, default=None, help="Passes over the data.  [default: 1]")
@click.option("--max-steps", type=int, default=None, help="Optimizer steps, instead of epochs.")
@click.option("--learning-rate", type=float, default=None, help="Peak learning rate.  [default: the method's]")
@click.option("--packing/--no-packing", default=None, help="Samples end to end in a row.  [default: where it pays]")
@click.option("--compile", "compiled", is_flag=True, help="Run the model through torch.compile.")
@click.option("--seed", type=int, default=None, help="Of adapters, data order and dropout.  [default: 42]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its last checkpoint.")
@click.option("--skip-bad-rows", is_flag=True, help="Leave out rows that cannot be used, and count them.")
@click.option("--report-to", multiple=True, help="tensorboard, wandb or trackio; may be given again.")
@click.option("--trust-remote-code", is_flag=True, help="Let code that comes with the model run.")
@click.option("--explain", is_flag=True, help="Say what the words of the answer mean, and where the memory goes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
@lang_option
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Version.")
@click.pass_context
def cli(ctx: click.Context, /, **options: Any) -> None:
    """Which of full fine-tuning, LoRA and QLoRA fits this GPU, at what settings, and why.

    \b
    phi3-advise                             this machine's GPU, Phi-3-mini
    phi3-advise --gpu t4 --model phi-4      what if
    phi3-advise --vram 12GiB --seq-len 4096
    phi3-advise --gpu t4 --trace            proven by the installed code, in seconds
    phi3-advise --gpu t4 --html report.html   a page to look at and to show
    phi3-advise --recipe cookbook-full --gpu a100-40gb
    phi3-advise --probe                     measured on this GPU, in a minute, without a download
    phi3-advise --launch --data train.jsonl --dry-run
    phi3-advise --launch --data train.jsonl   advise, check, train
    """
    given = [name for name in options if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT]
    if ctx.invoked_subcommand is not None:
        given = [name for name in given if name != "debug"]
        if given:
            names = ", ".join(map(_spelled, given))
            raise InputError(
                f"{names} stands before {ctx.invoked_subcommand}.",
                why="Options before a command belong to phi3-advise itself.",
                hint=f"Leave them out, or see what it takes: phi3-advise {ctx.invoked_subcommand} --help",
            )
        return
    launch = {name: options.pop(name) for name in _LAUNCH_ONLY}
    found = {name: options.pop(name) for name in _PROBE_ONLY}
    debug, probe = options.pop("debug"), options.pop("probe")
    if options.pop("launch"):
        from advisor.cli.main import launch_advised

        refused = [name for name in given if name in (*_NOT_LAUNCHED, *_PROBE_ONLY)]
        ctx.exit(launch_advised(**options, **launch, debug=debug, probe=probe, refused=tuple(map(_spelled, refused))))
    if probe:
        from advisor.cli.main import probe_advised
        from advisor.cli.probe import Dryness

        refused = [name for name in given if name in _NOT_LAUNCHED or name in set(_LAUNCH_ONLY) - _PROBED_DATA]
        how = Dryness(
            **{name: launch[name] for name in _PROBED_DATA},
            find_batch=found["find_batch"],
            find_seq_len=found["find_seq_len"],
            as_json=options["as_json"],
            debug=debug,
        )
        ctx.exit(probe_advised(**options, as_gpu=found["as_gpu"], how=how, refused=tuple(map(_spelled, refused))))
    if stray := [name for name in given if name in _PROBE_ONLY]:
        raise InputError(f"{', '.join(map(_spelled, stray))}: only a probe takes that.", hint="Add --probe.")
    stray = [name for name in given if name in (*_LAUNCH_ONLY, "probe")]
    if stray:
        raise InputError(
            f"{', '.join(map(_spelled, stray))}: only a run takes that.",
            hint="Add --launch to train, or leave it out to ask.",
        )
    from advisor.cli.main import answer

    ctx.exit(answer(**options))


_LAUNCH_ONLY = (
    *("data", "out", "dry_run", "yes", "fallback", "epochs", "max_steps", "learning_rate", "packing", "compiled"),
    *("seed", "resume", "skip_bad_rows", "report_to", "trust_remote_code"),
)
_PROBE_ONLY = ("find_batch", "find_seq_len", "as_gpu")
_PROBED_DATA = frozenset({"data", "skip_bad_rows", "trust_remote_code"})
_NOT_LAUNCHED = ("gpu", "vram", "free", "tokens", "trace", "recipe", "html", "explain")


def _spelled(name: str) -> str:
    """A parameter as it is typed."""
    spelled = {"as_json": "json", "compiled": "compile", "as_gpu": "as", "probe": "no-probe"}
    return "--" + spelled.get(name, name).replace("_", "-")


def main(arguments: list[str] | None = None) -> NoReturn:
    """The console script: runs a command and turns whatever goes wrong into one screen and an exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    language, error = language_asked(words)
    with speaking(language):
        try:
            with stopped_once(ends_process=arguments is None):
                code = _run(words) if error is None else _fail(error, words)
        except Stopped as stop:
            # Just before the end of what it was to say.
            code = _stopped(stop.number)
    sys.exit(code)


def _run(words: list[str]) -> int:
    try:
        code = cli.main(args=words, prog_name="phi3-advise", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except AdvisorError as error:
        return _fail(error, words)
    except click.UsageError as error:
        hint = f"See {error.ctx.command_path} --help." if error.ctx else "See phi3-advise --help."
        return _fail(InputError(error.format_message(), hint=hint), words)
    except (KeyboardInterrupt, click.Abort):
        return _stopped(stopped_by())
    except BrokenPipeError:
        silence_stdout()
        return _READER_GONE
    except Exception as error:
        if stopped_by() is not None:
            # A library that was interrupted while it was being imported, say, made its own error of that.
            return _stopped(stopped_by())
        unexpected = AdvisorError(
            f"Something went wrong that should not: {type(error).__name__}: {error}",
            why="This is a fault of phi3-advise, not of what you typed.",
            hint="Run it again with --debug and report what it prints.",
        )
        return _fail(unexpected, words, cause=error)


def _stopped(number: int | None) -> int:
    """Says so; returns the exit code, as a shell reports a program that a signal ended. None is a Ctrl-D."""
    sys.stderr.write(f"\n{localise_label('Stopped.')}\n")
    return _SIGNALLED + (number or signal.SIGINT)


def _fail(error: AdvisorError, words: list[str], cause: Exception | None = None) -> int:
    """One screen on stderr; the traceback only where --debug asks for it."""
    from advisor.report.terminal import make_console, render_error

    if "--debug" in words:
        import traceback

        traceback.print_exception(cause or error)
    render_error(error, make_console(stderr=True))
    return error.exit_code
