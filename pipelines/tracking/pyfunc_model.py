"""The model that ``mlflow.pyfunc.load_model`` gives: images in, masks out.

MLflow copies this file beside the checkpoint, with ``pspnet_core``, and runs it to load the model ("models from
code"): nothing is pickled. It imports nothing else of this project.

Shapes: ``B`` images, ``H W`` pixels, ``N`` bands (3 for RGB).
"""

from typing import Any

import mlflow.models
import numpy as np
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from pspnet_core import Segmenter

ARTIFACT = "checkpoint"
"""Name of the checkpoint folder among the model's artifacts."""


class MaskModel(PythonModel):
    """A checkpoint and its ``Segmenter`` on the best device there is."""

    segmenter: Segmenter

    def load_context(self, context: PythonModelContext) -> None:
        """Read the checkpoint; called by MLflow."""
        self.segmenter = Segmenter.load(context.artifacts[ARTIFACT])

    # MLflow lets the context be left out, and reads the hint: with this one it relies on the model's signature.
    def predict(  # type: ignore[override]
        self, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> Any:
        """Label images, each at its own size.

        Args:
            model_input: ``(B, H, W, N)`` uint8 (RGB by default), or a sequence of ``(H, W, N)`` uint8 images of any
                sizes; MLflow's own ``predict`` lets such a sequence through as an array of objects.
            params: none are known.

        Returns:
            ``(B, H, W)`` uint8 class ids (uint16 above 256 classes) for an array, a list of ``(H, W)`` for a sequence.

        Raises:
            ValueError: for an image of another shape or type.
        """
        masks = [prediction.mask for prediction in self.segmenter(np.asarray(image) for image in model_input)]
        return np.stack(masks) if masks and getattr(model_input, "ndim", 1) == 4 else masks


mlflow.models.set_model(MaskModel())
