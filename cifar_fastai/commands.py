"""The commands: functions with annotated arguments, for the pages in recipes/ and the console script `cifar-fastai`.

They load torch only when they run, so that `--help` answers at once.
"""

from functools import partial
from typing import Annotated

from cifar_fastai.cli import command_line, read_settings, start, start_script
from cifar_fastai.errors import check_extra

__all__ = [*"data demo explain export find_lr predict results sweep train".split(), "COMMANDS", "main", "start"]


def train(
    resume: str = None,  # Go on with an interrupted run: its folder, or "latest"
    **arguments,
):
    """Train, evaluate and explain a network; RECIPE is resnet18, resnet34 or custom_resnet."""
    from cifar_fastai.runs.results import write_results
    from cifar_fastai.runs.train import train

    train(resume=resume, finish=partial(write_results, command_line=command_line), **arguments)


def find_lr(
    start_lr: float = 1e-5,  # Lowest learning rate
    end_lr: float = 10.0,  # Highest learning rate
    num_it: int = 100,  # Steps
    **arguments,
):
    """The learning-rate range test alone: a picture of the curve with its suggestions, and the numbers."""
    from cifar_fastai.runs.train import find_lr

    find_lr(start_lr=start_lr, end_lr=end_lr, num_it=num_it, **arguments)


def predict(
    files: Annotated[str, {"opt": False, "nargs": "+", "metavar": "FILE"}],  # Image files of any size
    run: str = None,  # The folder of a finished run (default: the newest in runs/)
    csv: str = None,  # Also write the predictions into this file
    device: str = "auto",  # auto, cpu, cuda, cuda:N or mps
):
    """The three most probable classes of image files, from the network of a finished run."""
    from cifar_fastai.runs.explain import predict_run

    predict_run(files, run, csv, device)


def explain(
    run: str,  # The folder of a finished run
    images: Annotated[str, {"nargs": "+", "metavar": "FILE"}] = None,  # Image files of any size, not the run's errors
    layer: str = None,  # Layer or layers, separated by commas (default: deepest with a map of at least 5 pixels)
    method: str = "GradCAM",  # A method of pytorch-grad-cam: GradCAM, GradCAM++, LayerCAM, EigenCAM, ...
    target: str = "predicted",  # Class to explain: predicted, true, or a class by name
    n: int = 10,  # How many of the run's errors
    alpha: float = 0.5,  # Opacity of the heatmap in the overlay
    out: str = None,  # The picture (default: explain.png in the run's folder)
    data: str = None,  # Where the run's images are, if they have moved
    device: str = "auto",  # auto, cpu, cuda, cuda:N or mps
):
    """Explain a finished run: the three most probable classes as a table, the heatmaps as a picture."""
    from cifar_fastai.runs.explain import explain_run

    explain_run(run, images or (), layer, method, target, n, alpha, out, data, device)


def export(
    run: str,  # The folder of a finished run
    to: str = "onnx",  # onnx or safetensors
    out: str = None,  # The folder to write (default: of that name, in the run's folder)
    data: str = None,  # Where the run's images are, if they have moved
):
    """Write a run's network for other programs, as ONNX or safetensors, with a model card."""
    from cifar_fastai.runs.export import export_run

    export_run(run, to, out, data, command_line)


def sweep(
    settings: str,  # A text file, flags of a recipe on each line; empty lines and # lines are skipped
    seeds: str = "1,2,3",  # Seeds, separated by commas
    valid_pct: float = 0.1,  # Fraction of train for validation; the test split is never read
    out: str = "sweep.csv",  # The csv file; trials that have a row in it are skipped, interrupted ones go on
    runs: str = "runs/sweep",  # Folder for the runs themselves
    workers: int = None,  # Trials that are trained side by side (default: one for each GPU)
    storage: str = None,  # The file of an Optuna journal that hands out the trials to several machines
):
    """Train every setting with every seed and write its validation accuracy and seconds to a csv file."""
    trials = read_settings(settings)

    from cifar_fastai.runs.sweep import sweep

    sweep(trials, seeds, valid_pct, out, runs, workers=workers, storage=storage)


def data(
    action: Annotated[str, {"opt": False, "nargs": "?", "choices": ("list", "clear")}] = "list",  # What to do
):
    """List the data sets and unfinished downloads in the cache, or remove them."""
    from cifar_fastai.data.cache import cache_folder, files

    folder, total = cache_folder(), 0
    print(f"cache: {folder}")
    for path, text, size in files(folder):
        if action == "clear":
            path.unlink(missing_ok=True)
        total += size
        print(f"  {size / 1e6:>8,.1f} MB  {text}")
    print(f"  {total / 1e6:>8,.1f} MB  {'removed' if action == 'clear' else 'in all'}")


def demo(
    run: str,  # The folder of a finished run
    host: str = None,  # Address to serve at; 0.0.0.0 is for everybody in the network (default: 127.0.0.1)
    port: int = None,  # Port (default: the first free one from 7860)
    space: str = None,  # Serve nothing; write the folder of a Hugging Face Space
    data: str = None,  # Where the run's images are, if they have moved
    device: str = "auto",  # auto, cpu, cuda, cuda:N or mps
):
    """A page in the browser: the network of a run on any picture, with heatmaps, and the run's errors."""
    check_extra("demo", "gradio", "safetensors")
    from cifar_fastai.runs.demo import serve_demo, write_space

    write_space(run, space, data, command_line) if space else serve_demo(run, host, port, data, device)


def results(
    runs: Annotated[str, {"opt": False, "nargs": "+", "metavar": "RUN"}],  # Folders of finished runs
    out: str = "compare.html",  # The page
    data: str = None,  # Where their images are, if they have moved
):
    """Compare finished runs: settings that differ, accuracy and time as a table; curves and images on a page."""
    from cifar_fastai.runs.compare import compare_runs

    compare_runs(runs, out, data)


_ALL = train, find_lr, predict, explain, export, demo, results, sweep, data
COMMANDS = {f.__name__.replace("_", "-"): f for f in _ALL}


def main():
    """The console script."""
    start_script(COMMANDS)
