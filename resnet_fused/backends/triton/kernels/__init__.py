"""The Triton kernels. These modules import triton; the backend imports them on first use."""
