"""Fused operations of the scripts, in Triton: same names, arguments and results as the plain ones.

    interpolate gradient_penalty     gradient_penalty.py
    consistency icr_d_loss           consistency.py
    augment                          augment.py

Each file stands alone: formula, derivative and bytes moved; plain reference; kernels; operator;
public function. A function runs fused on CUDA tensors, and on CPU tensors under TRITON_INTERPRET=1
(slow, for tests); elsewhere, without triton, for float64 and for empty tensors it runs its
reference. First derivatives only: a second one raises instead of being silently wrong. Nothing
here synchronises with the host or chooses a launch by a value, so CUDA graphs can capture it.
"""
from kernels.augment import augment
from kernels.consistency import consistency, icr_d_loss
from kernels.gradient_penalty import gradient_penalty, interpolate

__all__ = ["augment", "consistency", "gradient_penalty", "icr_d_loss", "interpolate"]
