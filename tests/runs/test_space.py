"""The folder of a Hugging Face Space, started where it sees the dependencies alone."""

import os
import re
import shutil
import subprocess
import sys
import venv
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from cifar_fastai import predict_files
from cifar_fastai.commands import demo
from cifar_fastai.runs.run import load_network
from cifar_fastai.runs.train import train

gradio_client = pytest.importorskip("gradio_client")


@pytest.mark.slow
def test_a_space_runs_without_the_checkout(tmp_path):
    """In an environment that sees the dependencies alone; the data set is not needed either."""
    run, space, photo = tmp_path / "run", tmp_path / "space", tmp_path / "photo.jpg"
    Image.fromarray(load_sample_image("china.jpg")).save(photo)
    train("resnet18", data="digits", epochs=1, subset=40, bs=20, width=16, no_explain=True, device="cpu", out=str(run))
    demo(str(run), space=str(space))
    learn = load_network(run, "cpu")
    with learn.no_bar():
        (expected,) = predict_files(learn, photo)
    shutil.rmtree(run)
    card, requires = (space / "README.md").read_text(), (space / "requirements.txt").read_text().split()
    assert card.startswith("---\n") and 'sdk: "gradio"' in card and "digits" in card
    assert {"fastai", "torch", "gradio"} <= {re.split("[<>=]", line)[0] for line in requires}
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{Path(gradio_client.__file__).parent.parent}\n")
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= dict(GRADIO_SERVER_PORT="7987", OMP_NUM_THREADS="1")
    where = [python, "-c", "import cifar_fastai"]
    assert subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True).returncode, "it sees the checkout"
    options = dict(cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([python, space / "app.py"], **options)
    try:
        line = process.stdout.readline()
        assert "http://127.0.0.1:7987" in line, process.stderr.read()
        with closing(gradio_client.Client("http://127.0.0.1:7987", verbose=False)) as client:
            inputs = gradio_client.handle_file(photo), 3, "layer2", "GradCAM", "", 0.5
            bars, html = client.predict(*inputs, api_name="/answer")
            bars = {row["label"]: row["confidence"] for row in bars["confidences"]}
            assert [*bars] == [name for name, _ in expected.top3] and "<img" in html
            np.testing.assert_allclose([*bars.values()], [p for _, p in expected.top3], atol=1e-3)
            assert "<img" in client.predict(5, "", "", "highest loss", api_name="/show_errors")
    finally:
        process.terminate()
        process.wait()
    (wheel,) = space.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "there", wheel]
    subprocess.run(install, check=True, capture_output=True)
    assert (tmp_path / "there" / "cifar_fastai" / "report" / "templates" / "demo.css").exists()
