"""A checkpoint as an ``mlflow.pyfunc`` model, which loads and predicts without this project.

::

    <model>/MLmodel                      signature, class table, what to run
           /pyfunc_model.py, code/       the code that predicts: pspnet_core as it was
           /artifacts/checkpoint/        the checkpoint, a folder like any other
"""

import importlib.metadata
import tempfile
from pathlib import Path

import mlflow.pyfunc
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

import pspnet_core
from pspnet_core.checkpoints.checkpoint import Checkpoint

CODE = Path(__file__).with_name("pyfunc_model.py")
REQUIREMENTS = ("mlflow", "torch", "numpy", "opencv-python-headless", "pillow", "safetensors")


def save_pyfunc(checkpoint: Checkpoint, folder: Path, about: Model) -> None:
    """Write the model into ``folder``, which must be empty or absent.

    Args:
        about: what MLflow knows of the model already.
    """
    bands, classes = checkpoint.config.bands, len(checkpoint.classes)
    mask = np.dtype(np.uint8 if classes <= 256 else np.uint16)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, bands))]),
        outputs=Schema([TensorSpec(mask, (-1, -1, -1))]),
    )
    with tempfile.TemporaryDirectory() as place:
        artifact = Path(place) / "checkpoint"
        checkpoint.save(artifact)
        mlflow.pyfunc.save_model(
            str(folder),
            mlflow_model=about,
            python_model=str(CODE),
            code_paths=[str(Path(pspnet_core.__file__).parent)],
            artifacts={artifact.name: str(artifact)},
            signature=signature,
            input_example=np.full((1, 32, 32, bands), 127, np.uint8),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in REQUIREMENTS],
            metadata={"classes": checkpoint.classes.to_json(), "fingerprint": checkpoint.fingerprint},
        )


def _public_version(package: str) -> str:
    """The version without its local part, such as ``+cpu``, which no registry has."""
    return importlib.metadata.version(package).partition("+")[0]
