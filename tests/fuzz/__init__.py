"""Fuzzers: random sequences, damaged files and inputs, saves that are killed, calls that are interrupted.

Each has a short run with fixed seeds in the default suite and a long one under the mark ``slow``. The environment
variable ``KEDIT_FUZZ`` says how many cases a long run has (default 1000), ``KEDIT_FUZZ_SEED`` where its seeds begin.

What a case may end in is the same everywhere: a `KeditError`, or what was asked for. Never another exception, another
model, a folder that holds neither the old nor the new, or a file outside the folder.
"""
