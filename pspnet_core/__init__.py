"""PSPNet semantic segmentation: the model, its images and masks, and the numbers taken from them.

Depends on torch, numpy, Pillow and safetensors only; it knows nothing of clusters or object storage.
"""

__version__ = "0.1.0"
