"""``python -m eva_rl.finetune``: adapt a pretrained policy to a task."""
