"""The command line: settings and functions as commands, errors as one line and an exit status.

This is the only place where names of arguments become flags.
"""

import argparse
import errno
import io
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import get_args

from fastcore.script import anno_parser

from cifar_fastai.errors import InputError, RunError, check_choice, escaped, printable, reason
from cifar_fastai.recipes import PRESETS, RECIPES
from cifar_fastai.settings import OPTIONS

SCRIPT = "cifar-fastai"  # the console script
POSITIONAL = "command", "recipe"  # its words without a flag


def start(command, recipe=None, description=None, **defaults):
    """Call `command`, a function with annotated arguments, with those of the command line; exit with a status.

    With `recipe`, the name of one, it also takes the flags of a recipe, and gets the name and what was set. `--help`
    shows `description` in place of the docstring, and the recipe's values or `defaults`.
    """
    words, arguments = _split_command_line()
    parser = anno_parser(command, " ".join([SCRIPT, *words[1:]]) if _is_script() else None)
    for action in parser._actions:
        action.help = (action.help or "").replace(" (default: False)", "") or None
    if recipe:
        parser.usage, parser.formatter_class = "%(prog)s [options]", argparse.RawDescriptionHelpFormatter
        _add_settings(parser, RECIPES[recipe].to_dict() | defaults)
        parser.set_defaults(recipe=recipe)
    parser.description = description or parser.description
    parser.add_argument("--debug", action="store_true", help="Show tracebacks")
    values = vars(parser.parse_args(arguments))
    debug, *_ = [values.pop(name) for name in ("debug", "pdb", "xtra")]  # fastcore adds the last two
    sys.exit(_run(partial(command, **values), debug))


def start_script(commands):
    """The console script, `cifar-fastai COMMAND ...`, for `commands`, {name: function}; alone it lists them."""
    name, word = [*sys.argv[1:3], "", ""][:2]
    if name in ("", "-h", "--help"):
        print(f"usage: {SCRIPT} COMMAND [options]\n")
        for name, command in commands.items():
            print(f"  {name:<{max(map(len, commands))}}  {command.__doc__}")
        print(f"\n`{SCRIPT} COMMAND --help` lists the options of a command.")
    else:
        sys.exit(_run(partial(_start_command, commands, name, word), False))


def _start_command(commands, name, word):
    command = commands[check_choice(tuple(commands), command=name)]
    if name == "find-lr":
        start(command, "resnet18", lr="find")
    if name != "train":
        start(command)
    if word in ("-h", "--help"):
        sys.argv.insert(2, "RECIPE")
        start(command, "resnet18")
    start(command, check_choice([recipe for recipe in RECIPES if recipe not in PRESETS], recipe=word))


def _is_script():
    return Path(sys.argv[0]).stem == SCRIPT


def _split_command_line():
    """(the words that start this command again, its arguments): `python recipes/x.py`, or the script and a command."""
    if not _is_script():
        return [_as_called(sys.executable or "python"), sys.argv[0]], sys.argv[1:]
    n = 3 if sys.argv[1:2] == ["train"] else 2  # the name of its recipe belongs to it
    return [_as_called(sys.argv[0]), *sys.argv[1:n]], sys.argv[n:]


def _add_settings(parser, defaults):
    """Add a flag for every field of `Settings`; `--help` shows `defaults`, parsing gives None for what is not set."""
    for name, option in OPTIONS.items():
        kinds, default = get_args(option.type) or (option.type,), defaults.get(name)
        names = PRESETS if name == "preset" else option.metadata.get("choices")
        help = option.metadata["help"].replace("%", "%%") + (f": {', '.join(names)}" if names else "")
        other, *values = option.metadata.get("needs", (None,))
        context = f"{flag(other)} {' or '.join(values)}".strip() if other else ""
        help += f" (with {context})" if context else ""
        if bool in kinds:
            parser.add_argument(flag(name), action="store_true", default=None, help=help)
        else:
            kind = str if str in kinds else kinds[0]
            help += "" if default is None else f" (default: {default})"
            parser.add_argument(flag(name), type=kind, help=help, metavar=kind.__name__.upper())


def parse_settings(words):
    """The parameters in a list of command-line words, {name: value}. Raises InputError for anything else."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    _add_settings(parser, {})
    try:
        overrides, unknown = parser.parse_known_args(words)
    except (argparse.ArgumentError, SystemExit) as error:
        raise InputError(f"not flags of a recipe ({error})") from None
    if unknown:
        raise InputError(f"{unknown[0]} is not a flag of a recipe")
    return {name: value for name, value in vars(overrides).items() if value is not None}


def read_settings(path):
    """[(line, overrides)] of a text file with flags of a recipe on each line, as a sweep takes them.

    Empty lines and lines that begin with # are skipped. Raises InputError for a file or a line that cannot be used.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    trials = []
    for line in (line.strip() for line in lines):
        if line and not line.startswith("#"):
            try:
                trials.append((line, parse_settings(shlex.split(line))))
            except (InputError, ValueError) as error:
                raise InputError(f"{path}: {line}: {error}") from None
    if not trials:
        raise InputError(f"{path}: no settings in it; write flags of a recipe on each line")
    return trials


def command_line(config, without=()):
    """The command that repeats the run of a config.json in a folder of its own, quoted for a shell.

    `without`: parameters that are left out. None where no recipe made the run.
    """
    if not config.get("recipe"):
        return None
    words = [SCRIPT, "train", config["recipe"]] if _is_script() else ["python", f"recipes/{config['recipe']}.py"]
    for name, value in config["given"].items():
        if name in ("out", *without) or value is None or value is False:
            continue
        if value is True:
            words.append(flag(name))
        elif str(value).startswith("-"):
            words.append(f"{flag(name)}={value}")
        else:
            words += [flag(name), str(value)]
    return shlex.join(words)


def flag(name):
    """The flag of an argument: valid_pct -> --valid-pct."""
    return "--" + name.replace("_", "-")


def _run(run, debug):
    """Call `run`; its exit status is 0, that of the error, or 128 + the number of the signal that ended it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # torch about its own jit, at import
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a class name that its encoding lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        run()
        status, message = 0, None
    except KeyboardInterrupt as stop:
        status, message = 128 + getattr(stop, "signum", signal.SIGINT), f"\nstopped{_resume_hint(stop)}"
    except BrokenPipeError as stop:  # the program that reads the output has ended
        status, message = 128 + 13, _resume_hint(stop) and f"stopped{_resume_hint(stop)}"
    except Exception as error:
        if debug:
            raise
        is_bad_name = getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ELOOP)
        status, message = getattr(error, "status", 2 if is_bad_name else 1), f"error: {escaped(_describe(error))}"
    for stream, text in (sys.stdout, None), (sys.stderr, message):
        try:
            if text:
                print(text, file=stream)
            stream.flush()
        except OSError:  # it is closed or its disk is full: Python would try again at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _open_streams():
    """Open the null device where stdout or stderr is closed (`>&-`): the next file would get the number of either."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))


def _describe(error):
    """An error in one line, with flags in place of arguments: "valid_pct=2: ..." becomes "--valid-pct 2: ..."."""
    if isinstance(error, RunError):
        values = [_as_words(name, value) for name, value in error.arguments.items()]
        text = re.sub(r"`([a-z]\w*)`", lambda match: flag(match[1]), error.text)
        return f"{', '.join(values)}: {text}" if values else text
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}{_resume_hint(error)}"
    lines = (str(error).strip() or "no message").splitlines()
    first = lines[-1].strip() if lines[0].startswith("Exception occured in") else lines[0]  # fastai puts that in front
    return f"{type(error).__name__}: {first} (the traceback: --debug){_resume_hint(error)}"


def _as_words(name, value):
    """An argument on the command line: no value for a switch; in quotes one that would not print on one line."""
    text = "" if value is True else str(value)
    text = text if len(text) <= 300 else printable(text)
    text = text if value is True or text.strip() and text.isprintable() else printable(repr(value))
    return text if name in POSITIONAL else f"{flag(name)} {text}".strip()


def _resume_hint(error):
    """How to go on after an error that carries `resume`: the folder of its run, or words."""
    resume = getattr(error, "resume", None)
    if not isinstance(resume, Path):
        return f"; go on with: {resume}" if resume else ""
    words, more, n = _split_command_line()[0], [flag("resume"), str(resume)], os.environ.get("LOCAL_WORLD_SIZE", "1")
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # of torchrun, whose other flags nobody knows here
        return f"; go on with: the same command on each machine and {shlex.join(more)}"
    if n != "1":
        words = ["torchrun", "--nproc_per_node", n, *(["--no-python", *words] if _is_script() else words[1:])]
    return f"; go on with: {shlex.join(words + more)}"


def _as_called(program):
    """A program's path as a user here would call it: by name where the shell finds it, else relative to here."""
    path = Path(program)
    if shutil.which(path.name) == str(path):
        return path.name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
