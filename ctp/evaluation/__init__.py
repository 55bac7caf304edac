"""Measures of a model, with or without a soft prompt in front: a model and settings in, numbers out.

perplexity  over fixed token windows
tasks       of lm-evaluation-harness
harness     the harness's model with a prompt in front
generation  answers to questions
latency     seconds to read tokens and to write them
neighbours  vocabulary words nearest to a prompt's rows
recovered   the share of the loss that a prompt wins back
"""
