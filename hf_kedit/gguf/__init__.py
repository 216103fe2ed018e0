"""GGUF, the file format of llama.cpp and Ollama: whole models read from it and written to it, LoRA adapters written.

    reading       a file as a base model: found by its name, checked, turned into a plain transformers model
    families      what llama.cpp calls the weights of a family, how it stores them, and what else it must be told
    vocabulary    a tokenizer as llama.cpp keeps it
    writing       the file itself

Knows nothing of edits; `artifact.gguf_export` brings them. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
