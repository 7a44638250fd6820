"""The runs that README quotes, kept in the repository, and the table that is made from them."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from cifar_fastai.config import command_line
from cifar_fastai.errors import InputError
from cifar_fastai.files import atomic_write, write_json

__all__ = ["keep_result", "load_results", "results_table", "update_readme"]

BEGIN, END = "<!-- results: made by recipes/results.py -->", "<!-- end of results -->"
_KEPT = ("history.csv", "metrics.json", "predictions.csv")
_PATHS = ("out", "data", "resume")  # parameters that may name a place on somebody's disk


def keep_result(run, folder):
    """Copy what is needed to check a finished run into `folder`/<run's name>, without any path of the machine.

    Raises InputError where `run` is not finished.
    """
    run, target = Path(run), Path(folder) / Path(run).resolve().name
    missing = [name for name in ("config.json", *_KEPT) if not (run / name).exists()]
    if missing:
        raise InputError(f"{run}: no {', '.join(missing)} in it; only a finished run can be kept")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    if not config.get("recipe"):
        raise InputError(f"{run}: was made in a notebook; only a run that a command repeats can be kept")
    target.mkdir(parents=True, exist_ok=True)
    for name in _PATHS:
        for values in (config["parameters"], config["given"]):
            if values.get(name) is not None:
                values[name] = _public(name, values[name])
    config["data_source"] = _public("data", config["data_source"])
    write_json(target / "config.json", config)
    for name in _KEPT:
        shutil.copyfile(run / name, target / name)
    return target


def _public(name, value):
    """`value` where it is a word that anybody may give, else the file's name alone."""
    return value if name == "data" and "/" not in str(value) and "\\" not in str(value) else Path(str(value)).name


def load_results(folder):
    """[(config, metrics)] of the runs kept in `folder`, by name."""
    found = sorted(Path(folder).glob("*/metrics.json"))
    return [tuple(json.loads((path.parent / name).read_text(encoding="utf-8")) for name in ("config.json", path.name))
            for path in found]  # fmt: skip


def results_table(results):
    """Markdown: a row for each setting, with mean and standard deviation over its seeds, and its command.

    By data set, the most accurate first.
    """
    groups = defaultdict(list)
    for config, metrics in results:
        machine = metrics["hardware"], metrics["precision"]
        groups[command_line(config, without=("seed",)), metrics["dataset"], *machine].append(metrics)
    lines = ["| data | network | epochs | seeds | test accuracy | with flip TTA | and shifts | training | hardware |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    commands = []
    for (command, dataset, hardware, precision), runs in sorted(groups.items(), key=_rank):
        columns = [_percent([run[name] for run in runs])
                   for name in ("test_accuracy", "tta_accuracy", "tta_shift_accuracy")]  # fmt: skip
        minutes = mean(run["seconds"] for run in runs) / 60
        facts = [dataset, runs[0]["model"], runs[0]["epochs"], len(runs), *columns, f"{minutes:.1f} min",
                 f"{hardware}, {precision}"]  # fmt: skip
        lines.append("| " + " | ".join(str(fact) for fact in facts) + " |")
        seeds = sorted(run["seed"] for run in runs)
        commands.append(f"`{command} --seed {' | '.join(map(str, seeds))}`")
    return "\n".join([*lines, "", "The commands, row by row: " + "; ".join(commands) + "."])


def _rank(group):
    """Rows stand by data set, the most accurate first."""
    (command, dataset, *machine), runs = group
    return dataset, -mean(run["test_accuracy"] or 0 for run in runs), command, machine


def _percent(values):
    if None in values:
        return "-"
    spread = f" ± {stdev(values):.2%}" if len(values) > 1 else ""
    return f"{mean(values):.2%}{spread}"


def update_readme(readme, folder, check=False):
    """Write the table of the results in `folder` into `readme`, between its two marks; whether it changed.

    With `check` nothing is written. Raises InputError where the marks are missing.
    """
    text = Path(readme).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{readme}: the lines {BEGIN} and {END} must stand in it once")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{results_table(load_results(folder))}\n{END}{after}"
    if new != text and not check:
        with atomic_write(readme) as file:
            file.write(new)
    return new != text
