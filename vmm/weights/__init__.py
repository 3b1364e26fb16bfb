"""Weights as safetensors: parameter trees ↔ flat files; nothing is ever unpickled."""

from vmm.weights.tensors import load_params, save_params

__all__ = ["load_params", "save_params"]
