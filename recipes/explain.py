"""Explain a run's predictions: Grad-CAM for its errors, or for any image files.

python recipes/explain.py runs/resnet18-20260101-120000 --images holiday.jpg cat.png
"""

from cifar_fastai.commands import explain, start

if __name__ == "__main__":
    start(explain)
