"""Triton kernels, one file an op: jit kernel and launcher only. Installed as ``pyrlhf.kernels``; imported only for CUDA tensors."""
