"""A weight update that is a kernel function of two low-rank factors, sparsified: SNELL and SNELLA.

`dW[i, j] = Σ_p c_p k(a[p, :, i], b[p, :, j])`, `dW^s = dW ∘ multiplier(|dW|, t)`, with a gradient in closed
form that keeps only the factors: no distances, update or mask. Shen et al. 2024, arXiv 2411.01800;
Shen et al. 2025, arXiv 2510.24037.
"""

from peftjax.kernels.kernelized_merge.kernel_function import KernelFunction
from peftjax.kernels.kernelized_merge.merge import sparse_update, threshold, update

__all__ = ["KernelFunction", "sparse_update", "threshold", "update"]
