"""The cache of data sets: what is in it, where each came from and how large it is; `clear` removes it.

Usage: python recipes/data.py [list | clear]
"""

from typing import Annotated

from cifar_fastai.cli import command

ACTIONS = ("list", "clear")


@command
def main(
    action: Annotated[str, {"opt": False, "nargs": "?", "choices": ACTIONS}] = "list",  # What to do
    debug: bool = False,  # Show tracebacks
):
    "List the data sets and unfinished downloads in the cache, or remove them."
    from cifar_fastai.data.cache import cache_folder, files  # loads numpy, which --help does not need

    folder, total = cache_folder(), 0
    print(f"cache: {folder}")
    for path, text, size in files(folder):
        if action == "clear":
            path.unlink(missing_ok=True)
        total += size
        print(f"  {size / 1e6:>8,.1f} MB  {text}")
    print(f"  {total / 1e6:>8,.1f} MB  {'removed' if action == 'clear' else 'in all'}")


if __name__ == "__main__":
    main()
