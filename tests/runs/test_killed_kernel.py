"""A notebook whose kernel is killed in the middle of an epoch, run again, ends as one that nothing happened to."""

import os
from pathlib import Path

import pytest
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook
from tiny_runs import assert_same_state, history

from cifar_fastai.files import read_json
from cifar_fastai.training.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
IMPORTS = """
import os, signal
import tiny_recipe
import torch
from fastai.torch_core import set_seed
from cifar_fastai.all import *
torch.set_num_threads(1)
tiny_recipe.use_tiny_net()
tiny_recipe.draw_nothing()
"""
LEARNER = """
set_seed(7)
dls = cifar_dls(DATA, bs=8, device="cpu", cutout=8, flip_by="epoch")
learn = cifar_learner(dls, "resnet18")
learn.lr_find(num_it=20, show_plot=False)
"""
KILL = "tiny_recipe.strike('step', 10, lambda: os.kill(os.getpid(), signal.SIGKILL))  # in the second epoch"
TRAIN = "learn.fit_one_cycle(3, 0.1, cbs=KeepRun(RUN))"


def execute(folder, *cells):
    """What the cells print and show, as text, after they ran in a kernel of their own in `folder`."""
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("MPLBACKEND", raising=False)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    return "\n".join(output.get("text", "") + str(output.get("data", {}).get("text/html", "")) for output in outputs)


@pytest.mark.slow
def test_a_killed_kernel_goes_on(tiny_folder, tmp_path):
    begin = IMPORTS + f"DATA, RUN = {str(tiny_folder)!r}, 'runs/x'", LEARNER
    with pytest.raises(DeadKernelError):
        execute(tmp_path, *begin, KILL, TRAIN)
    run, straight = tmp_path / "runs" / "x", tmp_path / "runs" / "straight"
    assert len(history(run)) == 1 and load_checkpoint(run / "checkpoint.pth")["epoch"] == 1
    keep = "import shutil; shutil.copy(f'{RUN}/checkpoint.pth', f'{RUN}.pth')"
    straightly = "RUN = 'runs/straight'", LEARNER, TRAIN, keep
    text = execute(tmp_path, *begin, TRAIN, keep, "write_run(learn, RUN)", *straightly)
    assert "going on with runs/x after epoch 1 of 3" in text
    assert [row["epoch"] for row in history(run)] == ["1", "2", "3"] and history(run) == history(straight)
    assert_same_state(*(load_checkpoint(folder.with_suffix(".pth")) for folder in (run, straight)))
    assert read_json(run / "metrics.json")["epochs"] == 3
    table = text[text.index("epoch</th>") :]
    assert table.index("<td>0</td>") < table.index("<td>1</td>") < table.index("<td>2</td>"), "with the first epoch"
