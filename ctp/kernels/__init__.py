"""What training computes faster than the model's own modules.

attention  causal attention where all windows share one prompt
block      a LLaMA block as one function, on a CPU
llama      a LLaMA block on a GPU, with liger-kernel
modules    norms and gated MLPs of other blocks; putting all of these in place
"""
