"""Train a MEND editor for a model (Mitchell et al. 2022, arXiv 2110.11309).

    python recipes/train_mend.py hparams/TRAINING/mend-world-gpt2.yaml
    python recipes/train_mend.py hparams/TRAINING/mend-world-gpt2.yaml --output_dir out/mend --max_steps 100
    torchrun --nproc_per_node 2 recipes/train_mend.py hparams/TRAINING/mend-world-gpt2.yaml

The YAML names base model, data, the editor's size and the training arguments; options after it change the latter.
`kedit train` does the same for every method. A run that was interrupted goes on with --resume_from_checkpoint true.
"""

from __future__ import annotations

import sys

import yaml
from datasets import concatenate_datasets

from hf_kedit import EditTrainer, EditTrainingArguments, load_edit_dataset
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.mend import MENDConfig, MENDEditor


def main() -> None:
    """Read the settings, train, evaluate, save."""
    with open(sys.argv[1], encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    options = dict(
        zip((o.removeprefix("--") for o in sys.argv[2::2]), map(yaml.safe_load, sys.argv[3::2]), strict=True)
    )
    resume = options.pop("resume_from_checkpoint", None)

    # The frozen base model and its tokenizer.
    base = load_base(settings["model"], dtype=settings.get("dtype", "float32"))
    tokenizer = load_tokenizer(settings["model"])

    # The editor: two small networks, and a step size for each edited matrix.
    editor = MENDEditor.for_model(base, MENDConfig(**settings["editor"]))
    editor.origin["base_model_name_or_path"] = settings["model"]

    # Facts with other wordings (for the edit loss) and unrelated prompts (for the locality loss).
    data = settings["data"]
    versions = range(data.get("train_seeds", 1))  # the fact world makes other new answers with every seed
    parts = [load_edit_dataset(data["dataset"], split=data["train"], seed=s) for s in versions]
    train = concatenate_datasets(parts).remove_columns("id")  # the versions share their ids
    validation = load_edit_dataset(data["dataset"], split=data["eval"]).select(range(data["eval_size"]))

    trainer = EditTrainer(
        model=editor,
        args=EditTrainingArguments(**{**settings["training"], **options}),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
