"""Learning through a frozen model: soft prompts and LoRA, from token windows and settings.

soft_prompt  learn a soft prompt: Eq. (1) of the paper
lora         learn LoRA
train        the training loop that both share
run          one run's live objects: parameters, optimiser, state
steps        learning rates and batches, as functions of the step
objective    the loss, and the fastest way to compute its gradient
checkpoint   the state of a run, exact to resume
accelerator  accelerate's precision and device for one run
"""
