"""Train an editor for a model: MEND, MALMEN or KE, whichever the settings name.

    python recipes/train_editor.py hparams/TRAINING/mend-world-gpt2.yaml
    python recipes/train_editor.py hparams/TRAINING/malmen-world-gpt2.yaml --output_dir out/malmen --max_steps 100
    torchrun --nproc_per_node 2 recipes/train_editor.py hparams/TRAINING/mend-world-gpt2.yaml

The YAML names base model, method, data, the editor's size and the training arguments; options after it change the
latter. `kedit train` does the same. An interrupted run goes on with --resume_from_checkpoint true.
"""

from __future__ import annotations

import sys

import yaml
from datasets import concatenate_datasets

from hf_kedit import EditTrainer, EditTrainingArguments, load_edit_dataset
from hf_kedit.loading import load_base, load_tokenizer
from hf_kedit.methods.editor import editor_class


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

    # The editor: a small network beside the model, which proposes changes of some of its matrices.
    kind = editor_class(settings["method"])
    editor = kind.for_model(base, kind.config_class(**settings["editor"]))
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
