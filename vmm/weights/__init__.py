"""Weights as safetensors: parameter trees ↔ flat files, ours or in a published family's layout; nothing is ever unpickled."""

from vmm.weights.fit import Report, fit
from vmm.weights.tensors import load_tensors, parameter_tree, save_params

__all__ = ["Report", "fit", "load_tensors", "parameter_tree", "save_params"]
