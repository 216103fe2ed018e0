"""Decoding that contrasts a model's layers against hallucination: DoLa and DeCo.

with decode_with(model, "dola", layers="high"):
    model.generate(**inputs)

settings.py     what can be set, checked
premature.py    what earlier layers would have said: states of blocks, through norm, head and what follows it
dola.py         one function: final and premature logits → scores, as in the paper
deco.py         likewise
switch.py       `decode_with`: inside its block every logit that the model returns is such a score
"""

from .settings import DECODINGS, DeCoConfig, Decoding, DoLaConfig, decoding_of
from .switch import decode_with, decoding_now

__all__ = [
    "DECODINGS",
    "DeCoConfig",
    "Decoding",
    "DoLaConfig",
    "decode_with",
    "decoding_now",
    "decoding_of",
]
