"""Attention by kernels that others maintain: splash attention on a TPU, cuDNN's on an NVIDIA GPU.

Neither keeps a mask of T x S numbers. The reference is `peftjax.backbone.attention.attend`, which also
computes what a kernel refuses.
"""
