"""The program ``cadapt``: finds the commands, runs one, and is the one place where errors become exit codes.

A command is a file of this package whose name has no leading underscore; it defines ``command``. Nothing here
imports torch, so that help and completion come at once.
"""

# no postponed annotations here: Typer reads those of the local function in build_app
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

if TYPE_CHECKING:
    import typer

_SILENT = {"-q", "--quiet", "--help", "-h", "--version", "--json", "--show-completion", "--install-completion"}


def build_app(only: str | None = None) -> "typer.Typer":
    """Return the Typer application with every command of this package.

    Args:
        only: the one command that will be run, where it is known: the others then cost no time.
    """
    import typer

    app = typer.Typer(
        name="cadapt",
        help="Surgery on pretrained vision checkpoints: splice adapters into any timm model, train only those, "
        "ship a megabyte or a verified ONNX file.",
        epilog="cadapt insert resnet50 --scheme conv-par | cadapt train ./imgs | cadapt export --onnx",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
        ] = False,
        debug: Annotated[
            bool, typer.Option("--debug", help="Show a traceback with an error; also CADAPT_DEBUG=1.")
        ] = False,
    ) -> None:
        """Options before the command."""

    _add_commands(app, only)
    return app


def _add_commands(app: "typer.Typer", only: str | None) -> None:
    import importlib
    import pkgutil

    import cadapt.cli

    modules = [item.name for item in pkgutil.iter_modules(cadapt.cli.__path__)]
    commands = {name.replace("_", "-"): name for name in modules if not name.startswith("_") and name != "main"}
    for command in [only] if only in commands else commands:
        module = importlib.import_module(f"cadapt.cli.{commands[command]}")
        app.command(command, epilog=module.EXAMPLE)(module.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        import typer

        from cadapt.version import __version__

        print(f"cadapt {__version__}")
        raise typer.Exit


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with the contract's code."""
    given = sys.argv[1:] if arguments is None else arguments
    _say_hello(given)
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run(given))


def _run(given: list[str]) -> int:
    debug = "--debug" in given or bool(os.environ.get("CADAPT_DEBUG"))
    given = [item for item in given if item != "--debug"]
    try:
        code = build_app(given[0] if given else None)(given, prog_name="cadapt", standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # whoever reads our output has gone: nothing to say
        _give_up_stdout()
        return 1
    except Exception as error:
        return _fail(error, debug=debug)
    return code if isinstance(code, int) else 0


def _fail(error: Exception, *, debug: bool) -> int:
    """Show an error that the user can mend and return its exit code; any other goes on, with its traceback."""
    from cadapt.cli._errors import explain
    from cadapt.cli._streams import StdoutError
    from cadapt.report.console import printable

    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2
    known = explain(error)
    if known is None:
        raise error
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"cadapt: error: {printable(known.message)}", file=sys.stderr)
    if known.hint:
        print(f"  hint: {printable(known.hint)}", file=sys.stderr)
    if isinstance(error, StdoutError):
        _give_up_stdout()
    return known.exit_code


def _give_up_stdout() -> None:
    """Let nothing more go to stdout: what is still buffered would fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _terminate(number: int, frame: FrameType | None) -> None:
    # as an exception, so that every `finally` runs and no temporary file stays
    raise SystemExit(128 + number)


def _say_hello(given: list[str]) -> None:
    """Say at once what was understood: importing torch takes seconds."""
    given = [item for item in given if item != "--debug"]
    if given and not given[0].startswith("-") and not _SILENT & set(given) and "_CADAPT_COMPLETE" not in os.environ:
        print(f"cadapt {given[0]} …", file=sys.stderr, flush=True)
