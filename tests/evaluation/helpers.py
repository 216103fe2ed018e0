"""Tiny random models in memory, edited by the library itself, and comparing weights."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from hf_kedit.evaluation import score_pairs
from hf_kedit.methods.ft import FTMConfig
from hf_kedit.model import EditableModel
from hf_kedit.requests import load_requests

TEXT = [
    "The capital of Norland is Oslo. The capital of Sudland is Rome, and of Westland it is Lima.",
    "Ada Bell was born in Bergen. Jan Mol works for the railway. What is the mother tongue of Piet?",
    "Please answer the question:\n\nQ: who\nA: the king of 1998",
]


def tiny_tokenizer():
    """A byte-level BPE without BOS and with an end token, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def tiny_gpt2(tokenizer, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=96,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


def tiny_t5(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def make_editable(base_model, tokenizer, lr=0.02, num_steps=12):
    """FT-M on the last layer, with a log of the calls that an evaluation makes."""
    config = FTMConfig(layers=[-1], lr=lr, num_steps=num_steps, stop_probability=None, drift_bound=None)
    editable = EditableModel(base_model, config, tokenizer=tokenizer)
    editable.log = []
    inner_edit, inner_rollback = editable.edit, editable.rollback

    def edit(requests, **kwargs):
        editable.log.append(("edit", [r.target_new for r in load_requests(requests)]))
        return inner_edit(requests, **kwargs)

    def rollback(which):
        editable.log.append(("rollback", list(which)))
        return inner_rollback(which)

    editable.edit, editable.rollback = edit, rollback
    return editable


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def accuracies(model, tokenizer, pairs):
    return [s.token_acc for s in score_pairs(model, tokenizer, pairs)]
