"""Train a MEND editor: the gradient of a few facts becomes a better one.

    python recipes/train_mend.py
    python recipes/train_mend.py hparams/TRAINING/mend-world-llama.yaml --max_steps 100 --output_dir out/mend
    torchrun --nproc_per_node 2 recipes/train_mend.py --ddp_find_unused_parameters false

The file names base model, data, the editor's fields and the training arguments; options change the latter.
`kedit train` with the same file does the same. An interrupted run goes on with --resume_from_checkpoint true, if
--save_strategy steps was on.
"""

from __future__ import annotations

from transformers import EarlyStoppingCallback

from hf_kedit import EditableModel, EditTrainer, MENDConfig, evaluate_edits
from hf_kedit.methods.mend import MENDEditor
from hf_kedit.training import TrainingPlan, train_and_save


def main() -> None:
    """Read the plan, train, save, and try the editor on facts that it never saw."""
    plan = TrainingPlan.from_command_line("hparams/TRAINING/mend-world-gpt2.yaml")
    args = plan.arguments()
    base, tokenizer = plan.load()  # the base model stays as it is: it is neither trained nor saved
    facts, held_out = plan.train_facts(), plan.eval_facts() or []

    # Two networks for all matrices, one per shape; at first an edit is a plain gradient step of length edit_lr.
    editor = MENDEditor.for_model(base, MENDConfig(**plan.editor))

    # Each step edits `edits_per_group` facts together and asks for them in other words; unrelated prompts must stay.
    # With --save_strategy steps --load_best_model_at_end true, five evaluations without gain end the run.
    stopping = [EarlyStoppingCallback(early_stopping_patience=5)] if args.load_best_model_at_end else []
    trainer = EditTrainer(editor, args, facts, held_out or None, processing_class=tokenizer, callbacks=stopping)
    trainer.log_metrics("eval", train_and_save(trainer, args.resume_from_checkpoint))

    if not trainer.is_world_process_zero():
        return
    # One edit at a time, as after any `MENDConfig(editor="folder or Hub id")`.
    model = EditableModel(base, MENDConfig(editor=args.output_dir), tokenizer)
    report = evaluate_edits(model, held_out[:10], setting="single")
    said = report.summary()["post"]
    trainer.log_metrics("single", {name: said[name] for name in ("rewrite_acc", "rephrase_acc", "locality")})


if __name__ == "__main__":
    main()
