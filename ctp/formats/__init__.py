"""Compressed weights as files, of ctp and of other tools.

Of ctp:
layer: the compressed form of one weight, and how it becomes an ordinary one
bits: streams of whole numbers 1 to 16 bits wide
pack: layers as tensors of bit streams
artifact: a whole compressed model, its folder, and the ordinary model made of it
packed: linears and experts that stay packed in memory
unpack: the GPU kernel that unpacks a weight

Of other tools:
checkpoint: opens a folder of any format below, or a pruned model
gptq, compressed_tensors: read and written
awq, bitsandbytes, gguf: read
checks: what the readers share
export: writes a compressed model for other tools
loaders: which models those tools would open
"""

FORMATS = ("hf", "compressed-tensors", "gptq")  # that a compressed model is exported to
