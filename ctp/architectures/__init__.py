"""The structure of transformers' causal language models.

blocks: the list of decoder blocks, and whether their weights can be compressed
calls: the arguments that a model calls a block with
chain: those arguments for all blocks, and the check that blocks can be run one by one
context: the longest input
experts: the experts of a mixture as linears, and their routers
families: what is refused for a model type, by its configuration
head: the head of a model apart from its body
layouts: where experts are stored in a module's parameters
linears: the linears of a block
names: names of tensors in original checkpoints
"""
