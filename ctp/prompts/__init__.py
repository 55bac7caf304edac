"""Rows in front of a frozen model: soft prompts, hard prompts, and adapters in PEFT's format.

attach     windows behind a prompt: logits, summed log-likelihoods, and the checks that it fits
prefix     a prompt's keys and values, computed once for all windows
attached   a prompt attached to a model, which then generates behind it
opening    texts that begin with BOS, behind a hard prompt
rows       prompts made of rows of the model's embedding
adapter    PEFT adapters applied to a model, and taken off again
files      prompts and histories on disk
agreement  whether two ways to compute the same thing agree
"""
