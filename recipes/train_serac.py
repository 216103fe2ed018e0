"""Train SERAC's two networks: one that tells which prompts an edit is about, one that answers these.

    python recipes/train_serac.py
    python recipes/train_serac.py hparams/TRAINING/serac-world-llama.yaml --max_steps 100 --output_dir out/serac

The file names base model, data, the editor's fields and the training arguments; options change the latter.
`kedit train` with the same file does the same. The editor's fields `encoder` and `small_model` name pretrained
networks to start from (published: distilbert-base-cased, the smallest model of the base's family).
"""

from __future__ import annotations

from hf_kedit import EditableModel, EditTrainer, SERACConfig, evaluate_edits
from hf_kedit.methods.serac import SERACEditor
from hf_kedit.training import TrainingPlan, train_and_save


def main() -> None:
    """Read the plan, train, save, and put a sequence of edits that were never seen into the memory."""
    plan = TrainingPlan.from_command_line("hparams/TRAINING/serac-world-gpt2.yaml")
    args = plan.arguments()
    base, tokenizer = plan.load()  # only its tokens matter: neither network looks at its weights
    facts, held_out = plan.train_facts(), plan.eval_facts() or []

    # The scope classifier compares edits with prompts, the counterfactual model reads the edit in front of the prompt.
    editor = SERACEditor.for_model(base, SERACConfig(**plan.editor))

    # In a step, other wordings of each fact are in its scope, unrelated prompts in that of no fact of the batch.
    trainer = EditTrainer(editor, args, facts, held_out or None, processing_class=tokenizer)
    trainer.log_metrics("eval", train_and_save(trainer, args.resume_from_checkpoint))

    if not trainer.is_world_process_zero():
        return
    # Edits are kept as texts: one after another, all measured at the end.
    model = EditableModel(base, SERACConfig(editor=args.output_dir), tokenizer)
    report = evaluate_edits(model, held_out[:10], setting="sequential")
    said = report.summary()["post"]
    trainer.log_metrics("sequential", {name: said[name] for name in ("rewrite_acc", "rephrase_acc", "locality")})


if __name__ == "__main__":
    main()
