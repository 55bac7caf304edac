"""Texts and tasks: found, pinned to exact versions, read, and cut into token windows. Planning imports no torch here.

texts      the texts there are, built in or defined by a grid file
documents  a text's location, revision and documents
textfiles  .jsonl and .txt files, checked line by line
packaged   texts that come with Python packages
windows    token windows cut from documents
specials   the special tokens of a tokenizer
tasks      tasks of lm-evaluation-harness, pinned with their data
taskfiles  the YAML files that define them
download   local copies of hub texts and tasks
"""
