"""Train a MALMEN editor: least squares over all tokens of many facts.

    python recipes/train_malmen.py
    python recipes/train_malmen.py hparams/TRAINING/malmen-world-llama.yaml --max_steps 100 --output_dir out/malmen
    torchrun --nproc_per_node 2 recipes/train_malmen.py --ddp_find_unused_parameters false

The file names base model, data, the editor's fields and the training arguments; options change the latter.
`kedit train` with the same file does the same. An interrupted run goes on with --resume_from_checkpoint true, if
--save_strategy steps was on.
"""

from __future__ import annotations

from hf_kedit import EditableModel, EditTrainer, MALMENConfig, evaluate_edits
from hf_kedit.methods.malmen import MALMENEditor
from hf_kedit.training import TrainingPlan, train_and_save


def main() -> None:
    """Read the plan, train, save, and try the editor on facts that it never saw."""
    plan = TrainingPlan.from_command_line("hparams/TRAINING/malmen-world-gpt2.yaml")
    args = plan.arguments()
    base, tokenizer = plan.load()  # the base model stays as it is: it is neither trained nor saved
    facts, held_out = plan.train_facts(), plan.eval_facts() or []

    # The network says how the output of a matrix should move at every token; a ridge regression finds the change.
    editor = MALMENEditor.for_model(base, MALMENConfig(**plan.editor))

    # A step is one group of facts. They pass the model `micro_batch` at a time, and the network `rows` tokens at a
    # time, so that large groups need little memory: train with the number that you will edit with.
    trainer = EditTrainer(editor, args, facts, held_out or None, processing_class=tokenizer)
    trainer.log_metrics("eval", train_and_save(trainer, args.resume_from_checkpoint))

    if not trainer.is_world_process_zero():
        return
    # As many facts in one batch as in training.
    model = EditableModel(base, MALMENConfig(editor=args.output_dir), tokenizer)
    report = evaluate_edits(model, held_out[:50], setting="batch", batch_size=args.edits_per_group)
    said = report.summary()["post"]
    trainer.log_metrics("batch", {name: said[name] for name in ("rewrite_acc", "rephrase_acc", "locality")})


if __name__ == "__main__":
    main()
