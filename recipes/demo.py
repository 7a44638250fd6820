"""A page in the browser for a finished run: its network on any picture, with heatmaps, and its errors.

python recipes/demo.py runs/resnet18-20260101-120000
"""

from cifar_fastai.commands import demo, start

if __name__ == "__main__":
    start(demo)
