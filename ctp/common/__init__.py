"""What every package may use: messages, terminal text, files and hashes, YAML, the Hugging Face hub.

messages    names, values and errors in one line
exit_codes  of every command line
terminal    columns, sizes, durations, closed pipes
redact      secrets taken out of texts
files       cache, atomic writes, hashes, paths
yaml        YAML within limits
hub         the Hugging Face hub
"""
