"""Train an InstructEdit editor: MEND for several tasks, told by an instruction which one a fact belongs to.

    python recipes/train_instructedit.py
    python recipes/train_instructedit.py my-tasks.yaml --max_steps 100 --output_dir out/instructedit

The file names base model, data, the editor's fields (among them every task with its descriptions) and the training
arguments; options change the latter. `kedit train` with the same file does the same. Data of several sources are mixed
with `data: {dataset: [zsre, counterfact], weights: [0.5, 0.5], …}`.
"""

from __future__ import annotations

from hf_kedit import EditableModel, EditTrainer, InstructEditConfig, evaluate_edits
from hf_kedit.methods.instructedit import InstructEditEditor
from hf_kedit.training import TrainingPlan, train_and_save


def main() -> None:
    """Read the plan, train, save, and try the editor on facts that it never saw."""
    plan = TrainingPlan.from_command_line("hparams/TRAINING/instructedit-world-gpt2.yaml")
    args = plan.arguments()
    base, tokenizer = plan.load()  # the base model stays as it is: it is neither trained nor saved
    facts, held_out = plan.train_facts(), plan.eval_facts() or []

    # MEND's networks; each fact is read behind "Task: … Description: … Input: …".
    editor = InstructEditEditor.for_model(base, InstructEditConfig(**plan.editor))

    # Every row draws one of its task's descriptions but the last.
    trainer = EditTrainer(editor, args, facts, held_out or None, processing_class=tokenizer)
    trainer.log_metrics("eval", train_and_save(trainer, args.resume_from_checkpoint))

    if not trainer.is_world_process_zero():
        return
    # One edit at a time; each fact's metadata say its task, `InstructEditConfig(task=…)` says it for all.
    model = EditableModel(base, InstructEditConfig(editor=args.output_dir), tokenizer)
    report = evaluate_edits(model, held_out[:10], setting="single")
    said = report.summary()["post"]
    trainer.log_metrics("single", {name: said[name] for name in ("rewrite_acc", "rephrase_acc", "locality")})


if __name__ == "__main__":
    main()
