"""Compression of causal language models by GPTQ, SparseGPT and both at once.

walk: through the model block by block: Hessians, compressing, the next block's inputs
calibration: which linears share an input, and faster linears for calibration
routing: Hessians of the experts of a mixture
solver: GPTQ and SparseGPT for one weight (factorise the Hessian, then settle the columns)
settle: the innermost loop, column by column; settle_cpu (numba) and settle_cuda (Triton) are its fast forms
quantize: scales and zero points
refit: scales fitted again when all codes are settled
"""
