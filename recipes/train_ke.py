"""Train a KE editor: a recurrent network reads the change and masks the gradient.

    python recipes/train_ke.py
    python recipes/train_ke.py hparams/TRAINING/ke-world-llama.yaml --max_steps 100 --output_dir out/ke
    torchrun --nproc_per_node 2 recipes/train_ke.py --ddp_find_unused_parameters false

The file names base model, data, the editor's fields and the training arguments; options change the latter.
`kedit train` with the same file does the same. An interrupted run goes on with --resume_from_checkpoint true, if
--save_strategy steps was on.
"""

from __future__ import annotations

from hf_kedit import EditableModel, EditTrainer, KEConfig, evaluate_edits
from hf_kedit.methods.ke import KEEditor
from hf_kedit.training import TrainingPlan, train_and_save


def main() -> None:
    """Read the plan, train, save, and try the editor on facts that it never saw."""
    plan = TrainingPlan.from_command_line("hparams/TRAINING/ke-world-gpt2.yaml")
    args = plan.arguments()
    base, tokenizer = plan.load()  # the base model stays as it is: it is neither trained nor saved
    facts, held_out = plan.train_facts(), plan.eval_facts() or []

    # The reader starts with the model's own word embeddings.
    editor = KEEditor.for_model(base, KEConfig(**plan.editor))

    # The new answer, as long as other prompts change by no more than a margin: descent in the networks, ascent in the
    # multiplier. After an evaluation in which nearly all edits succeeded, the margin shrinks.
    trainer = EditTrainer(editor, args, facts, held_out or None, processing_class=tokenizer)
    trainer.log_metrics("eval", train_and_save(trainer, args.resume_from_checkpoint))
    if editor.edit_config.objective == "constrained":
        trainer.log_metrics("constraint", {"margin": float(editor.margin), "multiplier": editor.multiplier.item()})

    if not trainer.is_world_process_zero():
        return
    # One fact at a time; the request's ground truth, or what the model says now, is the answer to be replaced.
    model = EditableModel(base, KEConfig(editor=args.output_dir), tokenizer)
    report = evaluate_edits(model, held_out[:10], setting="single")
    said = report.summary()["post"]
    trainer.log_metrics("single", {name: said[name] for name in ("rewrite_acc", "rephrase_acc", "locality")})


if __name__ == "__main__":
    main()
