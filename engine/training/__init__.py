"""The step, the loop around it, and what it reports.

`trainer.Trainer` runs what `prepare.prepare` has checked; `dpo_trainer.DPOTrainer` is
both, for Python; an `events.Listener` hears what happens.
"""
