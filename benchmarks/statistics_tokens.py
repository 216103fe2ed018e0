"""How many tokens do second moments need? What a sample costs in MEMIT's own objective.

    python -m benchmarks.statistics_tokens --model kedit/world-gpt2 --keys 1 20

The update of ``n`` new keys is solved for with the second moment of a sample, and judged with that of a far larger
one: ``λ tr(D C Dᵀ) + ‖D K − R‖²`` relative to the best possible, and the size of the change that old keys see,
``tr(D C Dᵀ)``, likewise. Residuals are unit vectors, so that every key counts alike.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.shapes import requests, texts
from benchmarks.timing import Table, begin, environment, parser
from hf_kedit import EditableModel, MEMITConfig
from hf_kedit.engine.capture import Tap
from hf_kedit.engine.forward import frozen_eval
from hf_kedit.engine.sweep import Sweep
from hf_kedit.statistics.collecting import collect_moments
from hf_kedit.statistics.corpora import text_corpus
from hf_kedit.statistics.moments import SecondMoment
from hf_kedit.statistics.solve import factor_moment, ridge_columns
from hf_kedit.tokens import needed_tokenizer


def main() -> None:
    """Collect growing samples of one layer and print what each costs."""
    options = parser(__doc__)
    options.add_argument("--model", default="kedit/world-gpt2")
    options.add_argument("--layer", type=int, default=2)
    options.add_argument("--keys", nargs="+", type=int, default=[1, 20])
    options.add_argument("--weight", nargs="+", type=float, default=[100.0, 15000.0], help="λ of MEMIT")
    options.add_argument("--multiples", nargs="+", type=int, default=[1, 2, 5, 10, 20, 50, 100])
    options.add_argument("--truth", type=int, default=300, help="tokens of the truth, per dimension")
    chosen = options.parse_args()
    begin(chosen)
    model = EditableModel.from_pretrained(
        chosen.model, MEMITConfig(layers=[chosen.layer], context_templates=["{}"]), device_map=chosen.device
    )
    tokenizer = needed_tokenizer(model.tokenizer, "The benchmark")
    path = model.anatomy.down(chosen.layer).path
    width = model.anatomy.down(chosen.layer).in_features
    method: Any = model._method
    rows = [group[0] for group in method.rows(requests(max(chosen.keys)), [["{}"]])]
    tap = Tap(path, "input")
    with frozen_eval(model.base_model):
        keys = Sweep(model.base_model, model.anatomy, rows).read([tap], chosen.layer)[tap].T.double().cpu()
    corpus, samples = texts(chosen.truth * width // 4), {}
    sample: SecondMoment | None = None
    position = 0
    for multiple in [*chosen.multiples, chosen.truth]:
        while sample is None or sample.count < multiple * width:
            part = corpus[position : position + 8]
            position += len(part)
            if not part:
                break
            found = collect_moments(
                model.base_model, tokenizer, [path], text_corpus(part), token_budget=1024, show_progress=False
            )[path]
            sample = found if sample is None else sample.merged(found)
        assert sample is not None, "the corpus is empty"
        samples[multiple] = SecondMoment(sample.total, sample.count)
    truth = samples[chosen.truth].mean()
    table = Table(
        [
            ("tokens per dimension", "multiple", "20.1f"),
            ("keys", "keys", "5d"),
            ("λ", "weight", "7.0f"),
            ("objective", "objective", "9.3f"),
            ("change for old keys", "disturbance", "19.3f"),
            ("cosine", "cosine", "6.3f"),
        ],
        chosen.json,
    )
    for weight in chosen.weight:
        for count in chosen.keys:
            k = keys[:, :count]

            def judge(a: torch.Tensor, k: torch.Tensor = k, weight: float = weight) -> tuple[float, float]:
                old = float((a.T @ truth @ a).trace())
                missing = a.T @ k - torch.eye(k.shape[1], dtype=k.dtype)
                return weight * old + float(missing.square().sum()), old

            best = ridge_columns(factor_moment(truth), k, weight)
            floor, least = judge(best)
            for multiple in chosen.multiples:
                estimate = ridge_columns(factor_moment(samples[multiple].mean(), name="the sample"), k, weight)
                cost, old = judge(estimate)
                table.add(
                    {
                        "multiple": samples[multiple].count / width,
                        "wanted": multiple,
                        "keys": count,
                        "weight": weight,
                        "objective": cost / floor,
                        "disturbance": old / least,
                        "cosine": float((estimate * best).sum() / (estimate.norm() * best.norm())),
                        "model": chosen.model,
                        **environment(chosen.device, "float32"),
                    }
                )


if __name__ == "__main__":
    main()
