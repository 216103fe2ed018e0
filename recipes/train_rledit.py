"""Train an RLEdit editor: MALMEN for a life of edits.

    python recipes/train_rledit.py
    python recipes/train_rledit.py hparams/TRAINING/rledit-world-llama.yaml --max_steps 100 --output_dir out/rledit
    torchrun --nproc_per_node 2 recipes/train_rledit.py --ddp_find_unused_parameters false

The file names base model, data, the editor's fields and the training arguments; options change the latter.
`kedit train` with the same file does the same. An interrupted run goes on with --resume_from_checkpoint true, if
--save_strategy steps was on.
"""

from __future__ import annotations

from hf_kedit import EditableModel, EditTrainer, RLEditConfig, evaluate_edits
from hf_kedit.methods.rledit import RLEditEditor
from hf_kedit.training import TrainingPlan, train_and_save


def main() -> None:
    """Read the plan, train, save, and try the editor on facts that it never saw."""
    plan = TrainingPlan.from_command_line("hparams/TRAINING/rledit-world-gpt2.yaml")
    args = plan.arguments()
    base, tokenizer = plan.load()  # the base model stays as it is: it is neither trained nor saved
    facts, held_out = plan.train_facts(), plan.eval_facts() or []

    # MALMEN's network, which also sees models that were edited before.
    editor = RLEditEditor.for_model(base, RLEditConfig(**plan.editor))

    # A step is a turn: one batch of facts, edited on top of those before. After `turns` of them the sequence starts
    # again on the unedited model. --gradient_accumulation_steps takes the gradients of several turns together.
    trainer = EditTrainer(editor, args, facts, held_out or None, processing_class=tokenizer)
    trainer.log_metrics("eval", train_and_save(trainer, args.resume_from_checkpoint))

    if not trainer.is_world_process_zero():
        return
    # A sequence of such batches, measured at its end.
    model = EditableModel(base, RLEditConfig(editor=args.output_dir), tokenizer)
    report = evaluate_edits(model, held_out[:50], setting="sequential", batch_size=args.edits_per_group)
    said = report.summary()["post"]
    trainer.log_metrics("sequence", {name: said[name] for name in ("rewrite_acc", "rephrase_acc", "locality")})


if __name__ == "__main__":
    main()
