"""A run's network for other programs, as ONNX or safetensors, with a model card.

python recipes/export.py runs/resnet18-20260101-120000 --to onnx
"""

from cifar_fastai.commands import export, start

if __name__ == "__main__":
    start(export)
