"""Explain a run's predictions: Grad-CAM for its errors, or for any image files.

Usage: python recipes/explain.py runs/resnet18-20260101-120000 --images holiday.jpg cat.png
"""

from typing import Annotated

from cifar_fastai.cli import command


@command
def main(
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
    debug: bool = False,  # Show tracebacks
):
    "Explain a finished run: the three most probable classes as a table, the heatmaps as a picture."
    from cifar_fastai.runs.explain import explain_run  # loads torch, which --help does not need

    return explain_run(run, images or (), layer, method, target, n, alpha, out, data, device)


if __name__ == "__main__":
    main()
