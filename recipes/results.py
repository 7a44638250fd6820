"""Keep finished runs as results, and make the tables of README.md and docs/evidence.md from them.

Usage: python recipes/results.py runs/resnet18-20260101-120000
"""

from pathlib import Path
from typing import Annotated

from cifar_fastai.cli import command_line, start
from cifar_fastai.errors import RunError

HERE = Path(__file__).resolve().parent


def main(
    runs: Annotated[str, {"opt": False, "nargs": "*", "metavar": "RUN"}] = None,  # Folders of finished runs to keep
    check: bool = False,  # Write nothing; fail where a table differs from the results
):
    "Keep the numbers of runs under recipes/results and bring the tables of results up to date."
    from cifar_fastai.runs.table import keep_result, update_table  # loads torch, which --help does not need

    for run in runs or ():
        print(f"kept: {keep_result(run, HERE / 'results').name}")
    for page, summary in ("README.md", True), ("docs/evidence.md", False):
        changed = update_table(HERE.parent / page, HERE / "results", command_line, check, summary)
        if changed and check:
            raise RunError(f"{page}: its table is not the one that recipes/results gives; run recipes/results.py")


if __name__ == "__main__":
    start(main)
